"""The width of SwiGLU layers on the command line."""

import pytest

from llm_trainer.cli.sizes import main


@pytest.mark.parametrize(
    ("arguments", "width", "parameters"),
    [
        (["4096"], "10944", "134,479,872"),
        (["4096", "256"], "11008", "135,266,304"),
        (["4096", "multiple_of=256"], "11008", "135,266,304"),
    ],
)
def test_width_and_parameters(capsys, arguments, width, parameters):
    main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"intermediate_size {width}"
    assert lines[1].startswith(f"{parameters} parameters per SwiGLU layer")


def test_nonsense_is_refused(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["0"])
    assert exit.value.code == 2
    assert "hidden_size: got 0, expected an integer of at least 1" in capsys.readouterr().err
