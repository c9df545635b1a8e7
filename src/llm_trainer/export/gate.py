"""The gate: what an export answers is compared with what was expected of it, everything, before it says how it ended."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llm_trainer.export.pictures import Look, other_numbers
from llm_trainer.export.probe import Greedy, Probe, Rendered

SHOWN = 60  # characters of a text around the place where it differs


class Refused(Exception):
    """An export, or what it was to be made of, does not answer as the model did in training."""


class Limits(NamedTuple):
    """How far log-probabilities may be apart, in nats.

    Attributes:
        worst: of one token.
        mean: of all tokens.
        relative: of one token more, for each nat of it: products in 16 bits are off by a share of the logits.
    """

    worst: float
    mean: float
    relative: float = 0.0


# The same weights, computed by the same operations.
SAME = Limits(worst=2e-5, mean=2e-6)
# The same function of other operations in fp32, such as adapters beside the weights and in them.
FP32 = Limits(worst=2e-3, mean=1e-4, relative=1e-4)
# Products in 16 bits, by other kernels than in training. A single token may be sent to other experts.
ROUNDED = {
    "bf16": Limits(worst=1.0, mean=0.04, relative=0.05),
    "fp16": Limits(worst=0.25, mean=0.01, relative=0.01),
}


@dataclass
class Comparison:
    """What was compared, and what was found.

    Attributes:
        differences: one line each; none: the gate is open.
        not_compared: what one side cannot be asked.
        tokens: whose log-probabilities were compared.
        worst: of them, in nats: how far they are apart.
        total: of them, in nats.
    """

    differences: list[str] = field(default_factory=list)
    not_compared: list[str] = field(default_factory=list)
    tokens: int = 0
    worst: float = 0.0
    total: float = 0.0

    @property
    def mean(self) -> float:
        """Of the tokens, in nats."""
        return self.total / max(1, self.tokens)

    def __str__(self) -> str:
        found = f"log-probabilities of {self.tokens} tokens at most {self.worst:.1e} nats apart, {self.mean:.1e} in the mean"
        if self.not_compared:
            found += f"; not compared: {', '.join(self.not_compared)}"
        return found


def compare(expected: Probe, found: Probe, limits: Limits) -> Comparison:
    """All differences between two probes with the same questions."""
    assert expected.questions == found.questions
    result = Comparison()
    _compare_ids(result, expected, found)
    _compare_conversations(result, expected, found)
    _compare_stops(result, expected, found)
    _compare_facts(result, expected.facts, found.facts)
    _compare_logprobs(result, "log-probabilities", expected.logprobs, found.logprobs, limits)
    _compare_answers(result, expected, found, limits)
    _compare_sight(result, expected, found, limits)
    return result


def _compare_ids(result: Comparison, expected: Probe, found: Probe) -> None:
    for text, wanted, ids in zip(expected.questions.texts, expected.text_ids, found.text_ids, strict=True):
        if wanted is None or ids is None:
            _leave_out(result, "ids of texts")
        elif wanted != ids:
            result.differences.append(f"ids of the text {_short(text)}: {_first_other(wanted, ids)}")


def _compare_conversations(result: Comparison, expected: Probe, found: Probe) -> None:
    rendered: Sequence[Rendered | None] = found.rendered
    if all(one is None for one in rendered) and any(one is not None for one in expected.rendered):
        result.differences.append("chat template: there is none, or it prints no conversation")
        return
    for conversation, wanted, printed in zip(
        expected.questions.conversations, expected.rendered, rendered, strict=True
    ):
        roles = "-".join(message["role"] for message in conversation.messages)
        name = f"conversation {roles}"
        if conversation.add_generation_prompt:
            name += " with a prompt"
        if wanted is None or printed is None:
            if wanted is not printed:
                by = "the export" if printed is None else "the trained tokenizer"
                result.differences.append(f"{name}: the chat template of {by} refuses it")
        elif wanted.text != printed.text:
            result.differences.append(f"{name}: its text {_first_other(wanted.text, printed.text)}")
        elif wanted.ids != printed.ids:
            result.differences.append(f"{name}: its ids {_first_other(wanted.ids, printed.ids)}")


def _compare_stops(result: Comparison, expected: Probe, found: Probe) -> None:
    if expected.stop_token_ids is None or found.stop_token_ids is None:
        _leave_out(result, "stop ids")
    elif expected.stop_token_ids != found.stop_token_ids:
        result.differences.append(f"stop ids: expected {expected.stop_token_ids}, found {found.stop_token_ids}")


def _compare_facts(result: Comparison, expected: Mapping[str, Any], found: Mapping[str, Any], name: str = "") -> None:
    """What both say; inside of settings and weights also what only one of them says."""
    names = expected.keys() & found.keys()
    if name:
        names = expected.keys() | found.keys()
    for key in sorted(names):
        wanted, there = expected.get(key), found.get(key)
        path = f"{name}.{key}" if name else key
        if isinstance(wanted, dict) and isinstance(there, dict):
            _compare_facts(result, wanted, there, path)
        elif wanted != there:
            result.differences.append(f"{path}: expected {_short(wanted)}, found {_short(there)}")


def _compare_logprobs(
    result: Comparison,
    name: str,
    expected: Sequence[Sequence[float]],
    found: Sequence[Sequence[float]],
    limits: Limits,
) -> None:
    here, beyond = Comparison(), 0
    for wanted, there in zip(expected, found, strict=True):
        for one, other in zip(wanted, there, strict=True):
            apart = abs(one - other)
            if not apart <= limits.worst + limits.relative * abs(one):  # NaN is beyond any limit
                beyond += 1
            here.worst = max(here.worst, apart)
            here.total += apart
            here.tokens += 1
    if beyond or not here.mean <= limits.mean:
        result.differences.append(
            f"{name}: {here.worst:.2g} nats apart at worst and {here.mean:.2g} in the mean of {here.tokens} tokens, {beyond} "
            f"of them beyond the limit; expected at most {limits.worst:.2g} and {limits.mean:.2g}"
        )
    result.worst = max(result.worst, here.worst)
    result.total += here.total
    result.tokens += here.tokens


def _compare_answers(result: Comparison, expected: Probe, found: Probe, limits: Limits) -> None:
    if expected.answers is None or found.answers is None:
        _leave_out(result, "greedy answers")
        return
    for number, (wanted, there) in enumerate(zip(expected.answers, found.answers, strict=True)):
        _compare_answer(result, f"greedy answer {number + 1}", wanted, there, limits)


def _compare_answer(result: Comparison, name: str, wanted: Greedy, there: Greedy, limits: Limits) -> None:
    place = _where_they_part(wanted, there)
    if place is None:
        return
    # A token whose runner-up is as near as the numbers may be apart is a matter of luck; where one side stops is not.
    both = min(len(wanted.ids), len(there.ids))
    if place < both and wanted.margins[place] <= 2 * limits.worst:
        return
    result.differences.append(f"{name}: expected {wanted.ids}, found {there.ids}, another from token {place + 1} on")


def _compare_sight(result: Comparison, expected: Probe, found: Probe, limits: Limits) -> None:
    """What they make of pictures."""
    if expected.numbers is None or found.numbers is None:
        if expected.questions.pictures:
            _leave_out(result, "pictures")
        return
    pictures = expected.questions.pictures
    for (height, width), numbers, there in zip(pictures, expected.numbers, found.numbers, strict=True):
        how = other_numbers(numbers, there)
        if how:
            result.differences.append(f"numbers of a picture of {height} x {width}: {how}")
    for showing, wanted, look in zip(expected.questions.showings, expected.looks or (), found.looks or (), strict=True):
        _compare_look(result, showing.described(pictures), wanted, look, limits)
    if not result.mean <= limits.mean:
        result.differences.append(
            f"log-probabilities of texts and pictures: {result.mean:.2g} nats apart in the mean of {result.tokens} tokens; "
            f"expected at most {limits.mean:.2g}"
        )


def _compare_look(result: Comparison, name: str, wanted: Look, there: Look, limits: Limits) -> None:
    for side, look in {"the trained model": wanted, "the export": there}.items():
        if look.problem:
            result.differences.append(f"{name}: {side} cannot be shown it: {look.problem}")
    if wanted.shown.text != there.shown.text:
        result.differences.append(f"{name}: its text {_first_other(wanted.shown.text, there.shown.text)}")
    elif wanted.shown.ids != there.shown.ids:
        num, others = len(wanted.shown.ids), len(there.shown.ids)
        how = _first_other(wanted.shown.ids, there.shown.ids)
        result.differences.append(f"{name}: expected {num} ids, found {others}, which {how}")
    elif not wanted.problem and not there.problem:
        # NOTE: of so few tokens the mean of a healthy run in 16 bits may be beyond what it may be of all.
        alone = limits._replace(mean=limits.worst)
        _compare_logprobs(result, f"log-probabilities of {name}", [wanted.logprobs], [there.logprobs], alone)
        answers = Greedy(wanted.answer, wanted.margins), Greedy(there.answer, there.margins)
        _compare_answer(result, f"greedy answer to {name}", *answers, limits)


def _where_they_part(wanted: Greedy, there: Greedy) -> int | None:
    for place, (one, other) in enumerate(zip(wanted.ids, there.ids, strict=False)):
        if one != other:
            return place
    if len(wanted.ids) != len(there.ids):
        return min(len(wanted.ids), len(there.ids))
    return None


def _leave_out(result: Comparison, what: str) -> None:
    if what not in result.not_compared:
        result.not_compared.append(what)


def _first_other(wanted: Sequence[Any], there: Sequence[Any]) -> str:
    """`differs from place 3 on: expected ..., found ...`"""
    place = 0
    while place < min(len(wanted), len(there)) and wanted[place] == there[place]:
        place += 1
    around = slice(max(0, place - 4), place + 12)
    return f"differs from place {place} on: expected {wanted[around]!r}, found {there[around]!r}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."
