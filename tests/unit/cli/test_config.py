"""`llm-trainer config`."""

from llm_trainer.config.load import load_config


def test_config_prints_a_file_that_loads(run, tmp_path, capsys):
    assert run("config", "sft") == 0
    path = tmp_path / "run.yaml"
    path.write_text(capsys.readouterr().out)
    assert load_config(path).sft_config is not None
    assert run("config", "sfd") == 2
    assert "expected one of pretrain, sft" in capsys.readouterr().err
