"""Rewards that compare answers: what is equal, what is not, and the real data sets."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_trainer.config.errors import ConfigError, is_installed
from llm_trainer.rewards.answers import ExactMatch, MathVerify, Numeric, as_number, final_answer, last_number

DATA = Path(__file__).resolve().parents[4] / "shared" / "data" / "rl"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is not here")
needs_math_verify = pytest.mark.skipif(not is_installed("math_verify"), reason="math-verify is not installed")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,080", 1080), ("$1080", 1080), ("\\$5", 5), ("1080.0", 1080), ("2160/2", 1080), ("-5", -5), ("\N{MINUS SIGN}5", -5),
        ("-$5", -5), ("50%", 50), ("50\\%", 50), ("72 clips", 72), ("\\frac{3}{4}", 0.75), ("-\\dfrac12", -0.5), (".5", 0.5),
        ("1.", 1), ("2.5e3", 2500), ("$7$", 7), ("90^\\circ", 90), ("1{,}080", 1080), ("1e999999999", None), ("1/0", None),
        ("x", None), ("3 + 4", None), ("\\frac{\\pi}{2}", None), ("2\\sqrt{3}", None), ("12,34", None), ("", None),
        ("1" * 1_000_000 + "x", None),
    ],
)  # fmt: skip
def test_as_number(text: str, number: float | None) -> None:
    assert as_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [("5 and then 7.", 7), ("= 1,080.", 1080), ("room 3a costs 4", 4), ("x=-5", -5), ("so 1/2", 0.5), ("none", None)],
)
def test_last_number(text: str, number: float | None) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{\\frac{1}{2}} it is", "\\frac{1}{2}"),
        ("\\boxed{1} no, \\boxed{2}", "2"),
        ("a \\boxed{1", None),
        ("<answer> 5 </answer>", "5"),
        ("48/2 = 24\n#### 72", "72"),
        ("The answer is 5.", "5"),
        ("**Answer:** 1,5", "1,5"),
        ("no idea", None),
    ],
)
def test_final_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


def test_long_texts_take_no_time() -> None:
    """A model that repeats itself: no pattern may take time that grows with the square of the length."""
    repeated = ["1,", "\\boxed{", "answer is ", "<answer>", " ", "#### ", "{", "$", "-", "\\frac"]
    texts = [part * (50_000 // len(part)) for part in repeated]
    texts += ["1" * 50_000 + "a", f"the answer is x{' ' * 50_000}y", f"$x{' ' * 50_000}y$"]
    for text in texts:
        Numeric()(["p"], [text], ["5"])
        ExactMatch()(["p"], [text], ["5"])


def judged(function: Any, completion: str, answer: str | None) -> Any:
    return function(["p"], [completion], [answer])[0]


def test_exact_match() -> None:
    assert judged(ExactMatch(), "I think \\boxed{Paris}.", "Paris") == 1
    assert judged(ExactMatch(), "Paris", "Paris") == 1
    assert judged(ExactMatch(), "paris", "Paris") == 0
    assert judged(ExactMatch(ignore_case=True), "paris", "Paris") == 1
    assert judged(ExactMatch(), "$x^2$", "x^2") == 1
    assert judged(ExactMatch(), "Paris", None) is None


def test_numeric() -> None:
    assert judged(Numeric(), "It costs $1,080.", "1080") == 1
    assert judged(Numeric(), "The answer is 1080 dollars", "1080.0") == 1
    assert judged(Numeric(), "1080, no, 1081", "1080") == 0
    assert judged(Numeric(), "no number", "5") == 0
    assert judged(Numeric(), "5", "a word") is None
    assert judged(Numeric(), "5", None) is None
    assert judged(Numeric(tolerance=0.01), "3.14", "3.14159") == 1
    assert judged(Numeric(), "3.14", "3.14159") == 0


def test_math_verify_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "math_verify", None)
    with pytest.raises(ConfigError, match=r"pip install 'llm_trainer\[math\]'"):
        MathVerify()


@needs_math_verify
def test_math_verify() -> None:
    assert judged(MathVerify(), "\\boxed{0.5}", "\\frac{1}{2}") == 1
    assert judged(MathVerify(), "So it is $x(x+1)$", "x^2 + x") == 1
    assert judged(MathVerify(), "\\boxed{\\sqrt{8}}", "2\\sqrt{2}") == 1
    assert judged(MathVerify(), "\\boxed{0.4}", "\\frac{1}{2}") == 0


# Real data: each file's answers, with the function that is made for them.


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").split("\n") if line]


def answers_of(name: str) -> list[str]:
    rows = rows_of(name)
    if name.startswith("gsm8k_train"):
        return [row["answer"] for row in rows]
    if name.startswith("gsm8k_verl"):
        return [row["reward_model"]["ground_truth"] for row in rows]
    if name.startswith("mt_bench"):
        return [row["reference"][0] for row in rows if row.get("reference", [""])[0]]
    return [row["ground_truth"] for row in rows]


FILES: dict[str, Callable[[], Any]] = {
    "gsm8k_train_1k.jsonl": Numeric,
    "gsm8k_verl_200.jsonl": Numeric,
    "rlvr_arith.jsonl": Numeric,
    "mt_bench_prompts.jsonl": ExactMatch,
    "deepmath_messages_string.jsonl": ExactMatch,
}


def disturbed(answer: str, draw: random.Random) -> str:
    """Another answer: one of its digits or letters is another one."""
    final = final_answer(answer) or answer
    places = [match.start() for match in re.finditer(r"[0-9a-zA-Z]", final)]
    if not places:
        return final + "1"
    place = draw.choice(places)
    others = "0123456789" if final[place].isdigit() else "abcdefghijklmnopqrstuvwxyz"
    other = draw.choice([letter for letter in others if letter != final[place].lower()])
    return final[:place] + other + final[place + 1 :]


def accepted_and_refused(name: str, function: Any, draw: random.Random) -> tuple[float, float]:
    """Shares of reference answers that are accepted, and of disturbed ones that are refused."""
    answers = answers_of(name)
    completions, references = list(answers), list(answers)
    for text in answers:
        final = final_answer(text) or text
        if final.count("{") == final.count("}"):
            completions.append(f"Let us see.\nThe answer is \\boxed{{{final}}}.")
            references.append(text)
    accepted = function([""] * len(completions), completions, references)
    chosen = [draw.choice(answers) for _ in range(200)]
    wrong = [f"The answer is \\boxed{{{disturbed(answer, draw)}}}." for answer in chosen]
    refused = function([""] * len(wrong), wrong, chosen)
    return sum(map(float, accepted)) / len(accepted), 1 - sum(map(float, refused)) / len(refused)


@needs_data
def test_references_are_accepted_and_disturbed_ones_refused() -> None:
    """On five files; 200 disturbed answers of each."""
    draw, shares = random.Random(0), []
    for name, make in FILES.items():
        accepted, refused = accepted_and_refused(name, make(), draw)
        assert accepted == 1.0, name
        shares.append(refused)
    assert sum(shares) / len(shares) >= 0.99, shares


@needs_data
@needs_math_verify
def test_references_in_latex_are_accepted_and_disturbed_ones_refused() -> None:
    accepted, refused = accepted_and_refused("deepmath_messages_string.jsonl", MathVerify(), random.Random(0))
    assert accepted == 1.0 and refused >= 0.97  # \dfrac{2}{3} and \dfrac{4}{6} are one digit apart where 2/4 = 1/2
