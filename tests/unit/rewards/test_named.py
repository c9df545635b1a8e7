"""Reward functions by name, and those that judge the form of a completion."""

from pathlib import Path
from typing import Any

import pytest

from llm_trainer.config.errors import ConfigError
from llm_trainer.rewards.named import named, several
from llm_trainer.rewards.shape import Format, Overlong


def test_format() -> None:
    thinks = Format(r"<think>.*</think>.+")
    assert thinks(["<think>a\nb</think> c", "<think>a</think>", " <think></think>x\n"]) == [1.0, 0.0, 1.0]


def test_overlong() -> None:
    """Equation 13 of DAPO, with 10 tokens of which the last 4 are the buffer."""
    lengths = [1, 6, 7, 9, 10, 11]
    assert Overlong(max_tokens=10, buffer=4)([""] * 6, lengths) == [0.0, 0.0, -0.25, -0.75, -1.0, -1.0]
    assert Overlong(max_tokens=10, buffer=0)([""] * 6, lengths) == [0.0, 0.0, 0.0, 0.0, 0.0, -1.0]


def test_built_in_and_own(tmp_path: Path) -> None:
    own = tmp_path / "mine.py"
    own.write_text(
        "def short(completions):\n    return [-len(c) for c in completions]\n"
        "class Times:\n"
        "    def __init__(self, factor): self.factor = factor\n"
        "    def __call__(self, p, c, a): return [self.factor] * len(c)\n"
    )
    functions, weights = several(
        [
            "numeric",
            {"name": "format", "pattern": "a.*", "weight": 0.5, "label": "begins"},
            f"{own}:short",
            {"name": f"{own}:Times", "factor": 3.0},
            "os.path:basename",
        ]
    )
    assert weights == {"numeric": 1.0, "begins": 0.5, "short": 1.0, "Times": 1.0, "basename": 1.0}
    assert functions["begins"](["abc", "b"]) == [1.0, 0.0]
    assert functions["short"](["abc"]) == [-3]
    assert functions["Times"]([], ["a"], []) == [3.0]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("numerical", "got 'numerical', expected one of exact_match, numeric, "),
        ({"weight": 1.0}, "expected the name of a function"),
        ({"name": "numeric", "weight": "much"}, "numeric: got the weight 'much', expected a number"),
        ({"name": "numeric", "tolerant": 1}, "numeric: got the option tolerant; expected tolerance"),
        ("format", "format: the option pattern is missing; expected pattern"),
        ({"name": "format", "pattern": "("}, r"got the pattern '\(', expected a regular expression"),
        ({"name": "overlong", "max_tokens": 4, "buffer": 5}, "got buffer 5 and max_tokens 4"),
        ("missing.py:f", "there is no file missing.py"),
        ("no_such_module:f", "there is no module no_such_module"),
        ("os.path:nothing", "os.path has no function nothing"),
        ("os.path:basenam", "has no function basenam; did you mean os.path:basename?"),
        ("os.path:sep", "os.path:sep: found '/', expected a function, or a class that makes one"),
        ({"name": "os.path:basename", "x": 1}, r"got options \(x\); only a class"),
    ],
)
def test_what_does_not_fit_is_said(entry: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        named(entry)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def f(prompts:\n    return 1\n", r"mine.py is no Python that can be read: .* \(.*mine.py, line 1\)"),
        ("\nimport nowhere_at_all\n", r"cannot be imported: it raised ModuleNotFoundError: .* \(mine.py, line 2\)"),
        ("x = {}['a']\n", r"mine.py cannot be imported: it raised KeyError: 'a' \(mine.py, line 1\)"),
        ("class f:\n    def __init__(self, high): pass\n", r"f\(low=3\) raised TypeError: .*; expected the keywords"),
    ],
)
def test_a_file_that_cannot_be_imported_is_said(code: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(ConfigError, match=message):
        named({"name": f"{tmp_path / 'mine.py'}:f", "low": 3})


def test_labels_differ() -> None:
    with pytest.raises(ConfigError, match="two functions are called numeric"):
        several(["numeric", "numeric"])
