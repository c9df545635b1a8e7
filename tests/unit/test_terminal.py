"""What a terminal would obey is shown instead."""

import time

import pytest

from llm_trainer.state import Progress
from llm_trainer.terminal import printable, waiting
from llm_trainer.train.reporter import Reporter


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("\x1b[2J\x1b]0;owned\x07", r"\x1b[2J\x1b]0;owned\x07"),  # clear the screen, name the window
        ("\x9b31m", r"\x9b31m"),  # the same escape in one character
        ("a\rb\x08c\x7f", r"a\rb\x08c\x7f"),
        ("\u202eabc\u2066", r"\u202eabc\u2066"),  # written from right to left
        ("\ud83d", r"\ud83d"),
        ("two\n\tlines, 你好 \U0001f469\u200d\U0001f52c \\x1b", None),
    ],
)
def test_controls_are_written_out_and_text_stays(written: str, shown: str | None) -> None:
    expected = written if shown is None else shown
    assert printable(written) == expected
    assert "".join(map(printable, written)) == expected  # however it is cut
    expected.encode()


def test_what_a_run_says_is_printable(capsys: pytest.CaptureFixture[str]) -> None:
    Reporter(True, Progress()).say("\x1b[31mred")
    assert capsys.readouterr().out == "\\x1b[31mred\n"


def test_what_is_waited_for_is_said_where_it_takes_long(capsys: pytest.CaptureFixture[str]) -> None:
    with waiting("loading the tokenizer", after_s=60):
        pass
    with waiting("another process loads it", speaks=False, after_s=0.0):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""
    with waiting("loading the tokenizer", after_s=0.0):
        time.sleep(0.1)
    assert capsys.readouterr().err == "loading the tokenizer ...\n"
