"""The code of a reward function, by which rollouts know whether their rewards are still those of it."""

from functools import partial

from llm_trainer.rewards.identity import code_hash


def made(body: str, before: str = "") -> object:
    """A function called `reward` with that body, after some lines of a file."""
    names: dict[str, object] = {}
    exec(f"{before}\ndef reward(completions):\n    {body}\n", names)  # a file that was edited
    return names["reward"]


def test_code_is_told_from_other_code_and_not_by_where_it_stands() -> None:
    counts = "return [float(c in {'a', 'b', 'c'}) + sum(x > 1 for x in [1, 2]) for c in completions]"
    one, same = made(counts), made(counts, before="\n\nother = 3\n")
    assert code_hash(one) == code_hash(same) == code_hash(partial(one))  # type: ignore[arg-type]
    others = [counts.replace("x > 1", "x > 2"), counts.replace("'b'", "'d'"), counts.replace("sum", "max")]
    assert len({code_hash(made(body)) for body in [counts, *others]}) == 4  # type: ignore[arg-type]


def test_what_has_no_code_has_no_hash() -> None:
    assert code_hash(len) == "" and code_hash(partial(len)) == ""
