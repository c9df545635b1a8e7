"""Rewards that compare a completion's final answer with the reference: as text, as a number, as mathematics."""

import re
from collections.abc import Sequence
from fractions import Fraction

from llm_trainer.config.errors import ConfigError, is_installed

# NOTE: completions repeat themselves for thousands of tokens; no pattern may search again from every place in them.
BRACES = re.compile(r"(?P<boxed>\\(?:boxed|fbox)\s*)?\{|\}")
SAID = re.compile(r"(?:final answer|the answer|answer) *(?:is|=|:)\**:? *([^\n]*)", re.IGNORECASE)
# `-1,080.5`, `3/4`, `1e-3`; a number inside of a word or of a longer number is none
NUMBER = re.compile(
    r"(?<![\w.,/])[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?(?:/\d+)?(?![\w/])"
)
FRACTION = re.compile(r"([-+]?)\s*\\[dtc]?frac\s*\{?\s*(-?\d+)\s*\}?\s*\{?\s*(-?\d+)\s*\}?")
WRAPPED = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{([^{}]*)\}")
UNITS = re.compile(r"^(?:\\?[$£€¥]\s*)?(.*?)(?:\s*\\?%|\s*\\?[$£€¥]|\s*\^?\\circ|\s+[A-Za-z][A-Za-z .]*)?$", re.DOTALL)
LARGEST_EXPONENT = 300
LONGEST_NUMBER = 200  # characters, with its unit


def final_answer(text: str) -> str | None:
    """What a text says its answer is: the last of `\\boxed{...}`, else `<answer>...</answer>`, `#### ...`, `the answer is ...`.

    None: it says none in any of these ways.
    """
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    end = text.rfind("</answer>")
    begin = text.rfind("<answer>", 0, max(0, end))
    if begin >= 0:
        return text[begin + len("<answer>") : end].strip()
    _, hashes, rest = text.rpartition("####")  # as GSM8K ends its answers (Cobbe et al. 2021)
    if hashes:
        return rest.partition("\n")[0].strip()
    said = SAID.findall(text)
    if said:
        return said[-1].partition(". ")[0].strip().removesuffix(".")
    return None


def _last_boxed(text: str) -> str | None:
    """What stands between the braces of the last `\\boxed{...}` that is closed; it may hold others."""
    found = None
    open_ends: list[int] = []  # of braces that are open: where its text begins, or -1
    for match in BRACES.finditer(text):
        if match[0] != "}":
            begins = -1
            if match["boxed"]:
                begins = match.end()
            open_ends.append(begins)
        elif open_ends:
            begins = open_ends.pop()
            if begins >= 0:
                found = text[begins : match.start()]
    return found


def plain(text: str) -> str:
    """Text without what says nothing: `$` around it, spaces, the stop at its end, styles of LaTeX."""
    text = text.strip()
    for mark in ("$$", "$", r"\(", r"\[", r"\)", r"\]", "**"):
        text = text.removeprefix(mark).removesuffix(mark)
    text = WRAPPED.sub(r"\1", text).strip()
    for word, meaning in (
        (r"\left", ""),
        (r"\right", ""),
        (r"\dfrac", r"\frac"),
        (r"\tfrac", r"\frac"),
        (r"\!", ""),
        (r"\,", ""),
    ):
        text = text.replace(word, meaning)
    return re.sub(r"\s+", " ", text).removesuffix(".").strip()


def as_number(text: str) -> Fraction | None:
    """The number that a text is, perhaps with a currency or a unit; None: it is something else."""
    text = plain(text).replace("\N{MINUS SIGN}", "-").replace(r"\$", "$").replace("{,}", ",")
    if len(text) > LONGEST_NUMBER:
        return None
    text = FRACTION.sub(r"\1\2/\3", text)
    negated = re.fullmatch(r"-\s*(.+)", text)  # also `-$5`
    if negated:
        text = negated[1]
    match = UNITS.match(text)
    assert match is not None
    number = match[1].strip()
    if not NUMBER.fullmatch(number):
        return None
    value = _value(number)
    if value is not None and negated:
        return -value
    return value


def _value(number: str) -> Fraction | None:
    number = number.replace(",", "")
    exponent = re.search(r"[eE]([-+]?\d+)", number)
    if exponent and abs(int(exponent[1])) > LARGEST_EXPONENT:
        return None  # it would take long to write out
    over, _, under = number.partition("/")
    try:
        return Fraction(over) / Fraction(under or "1")
    except (ValueError, ZeroDivisionError):
        return None


def last_number(text: str) -> Fraction | None:
    """The last number in a text."""
    found = [match[0] for match in NUMBER.finditer(text.replace("\N{MINUS SIGN}", "-").replace("{,}", ",")) if match[0]]
    while found:
        value = _value(found.pop().lstrip("+"))
        if value is not None:
            return value
    return None


class ExactMatch:
    """1 where the completion's final answer, or else all of it, is the reference; else 0. None where there is no reference.

    Args:
        ignore_case: letters may be large or small.
    """

    def __init__(self, ignore_case: bool = False) -> None:
        self.ignore_case = ignore_case

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], answers: Sequence[str | None]
    ) -> list[float | None]:
        rewards: list[float | None] = []
        for completion, answer in zip(completions, answers, strict=True):
            if not answer or not answer.strip():
                rewards.append(None)
                continue
            wanted = {self._form(answer), self._form(final_answer(answer) or answer)}
            given = {self._form(completion), self._form(final_answer(completion) or completion)}
            rewards.append(float(not wanted.isdisjoint(given)))
        return rewards

    def _form(self, text: str) -> str:
        text = plain(text)
        if self.ignore_case:
            return text.casefold()
        return text


class Numeric:
    """1 where the completion's final answer, or else its last number, equals the reference; else 0.

    None where the reference is not a number. `1,080`, `$1080`, `1080.0` and `2160/2` are equal; `50%` is 50.

    Args:
        tolerance: how far the number may be off, as a share of the reference.
    """

    def __init__(self, tolerance: float = 1e-9) -> None:
        self.tolerance = Fraction(tolerance)

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], answers: Sequence[str | None]
    ) -> list[float | None]:
        rewards: list[float | None] = []
        for completion, answer in zip(completions, answers, strict=True):
            wanted = None if answer is None else as_number(final_answer(answer) or answer)
            if wanted is None:
                rewards.append(None)
                continue
            given = _number_of(completion)
            is_equal = given is not None and abs(given - wanted) <= self.tolerance * abs(wanted)
            rewards.append(float(is_equal))
        return rewards


def _number_of(completion: str) -> Fraction | None:
    said = final_answer(completion)
    if said is None:
        return last_number(completion)
    value = as_number(said)
    if value is None:
        return last_number(said)
    return value


class MathVerify:
    """1 where `math-verify` holds the completion's answer for equal to the reference, such as `\\frac{1}{2}` and `0.5`; else 0.

    None where there is no reference. One that math-verify cannot read is compared as text.

    Args:
        seconds: that one comparison may take.

    Raises:
        ConfigError: math-verify is not installed.
    """

    def __init__(self, seconds: int = 3) -> None:
        if not is_installed("math_verify"):
            raise ConfigError(
                "the reward math_verify needs math-verify, which is not installed: pip install 'llm_trainer[math]'"
            )
        self.seconds = seconds
        self.text = ExactMatch()

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], answers: Sequence[str | None]
    ) -> list[float | None]:
        from math_verify import parse, verify

        rewards = self.text(prompts, completions, answers)
        for row, (completion, answer) in enumerate(zip(completions, answers, strict=True)):
            if answer is None or rewards[row] != 0.0:
                continue
            wanted = parse(_as_latex(final_answer(answer) or answer), parsing_timeout=self.seconds)
            given = parse(_as_latex(final_answer(completion) or completion), parsing_timeout=self.seconds)
            if wanted and given:
                rewards[row] = float(verify(wanted, given, timeout_seconds=self.seconds))
        return rewards


def _as_latex(text: str) -> str:
    """A formula between dollars, where math-verify looks for one; a whole text as it is, which has its own."""
    text = text.strip()
    if "\n" in text or "$" in text or r"\(" in text or r"\[" in text or len(text.split()) > 20:
        return text
    return f"${text}$"
