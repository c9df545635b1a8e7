"""Log files to curves to pictures."""

import math

import pytest
from matplotlib.figure import Figure

from llm_trainer.cli import plots
from llm_trainer.cli.plots import LogError, draw, plot_run, read_curves, smoothed, vis_log, vis_lr
from llm_trainer.train.log_files import JsonLines, LearningRates, TextLog


@pytest.fixture
def run(tmp_path):
    """The log folder of a small run."""

    def run(name, scale=1.0):
        folder = tmp_path / name / "log"
        for writer in (TextLog(folder), JsonLines(folder)):
            for step in (10, 20, 30):
                writer.write(
                    step,
                    {
                        "loss": scale / step,
                        "learning_rate": 1e-3,
                        "epoch": 0.5,
                        "reward": math.nan if step == 20 else 1.0,
                    },
                )
            writer.write(30, {"eval_loss": 0.5})
            writer.close()
        rates = LearningRates(folder)
        for step in (10, 20, 30):
            rates.note(step, 1e-3)
        rates.close()
        return folder

    return run


@pytest.mark.parametrize("name", ["log.txt", "metrics.jsonl"])
def test_both_formats_give_the_same_curves(run, name):
    curves = read_curves(run("a") / name)
    assert set(curves) == {"loss", "learning_rate", "reward", "eval_loss"}
    assert curves["loss"][0] == [10, 20, 30]
    assert curves["loss"][1] == pytest.approx([0.1, 0.05, 1 / 30], rel=1e-7)
    assert math.isnan(curves["reward"][1][1])
    assert curves["eval_loss"] == ([30], [0.5])


def test_a_torn_last_line_is_passed_over(run):
    path = run("a") / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 40, "lo')
    assert read_curves(path)["loss"][0] == [10, 20, 30]


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "the file is empty"), ("Dear diary\n", "no line with a step and a metric"), ("[1]\n", "no line with a step")],
)
def test_files_without_curves_are_named(tmp_path, text, message):
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(LogError, match=rf"notes\.txt: .*{message}"):
        read_curves(path)


def test_smoothing_is_unbiased_from_the_first_value():
    assert smoothed([3.0, 3.0, 3.0], 0.9) == pytest.approx([3.0] * 3)
    assert smoothed([1.0, 2.0], 0.5) == pytest.approx([1.0, (0.25 * 1 + 0.5 * 2) / 0.75])
    assert smoothed([1.0, math.nan, 2.0], 0.0) == [1.0, 1.0, 2.0]


def test_panels_and_legend(run):
    figure = Figure()
    runs = {name: read_curves(run(name) / "metrics.jsonl") for name in ("a", "b")}
    draw(figure, runs, smooth=0.5)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["loss", "reward", "learning rate"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    loss, _, learning_rate = figure.axes
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["train", "eval"]
    assert len([line for line in learning_rate.get_lines() if len(line.get_xdata())]) == 2  # never smoothed


def test_vis_log_without_a_display_writes_beside_the_file(run, capsys, monkeypatch):
    monkeypatch.setattr(plots, "_show", lambda runs, smooth: False)
    path = run("a") / "log.txt"
    vis_log([str(path)])
    picture = path.with_suffix(".png")
    assert capsys.readouterr().out.strip() == str(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_several_files_overlay_and_are_told_apart(run, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "draw", lambda figure, runs, smooth: drawn.append(list(runs)))
    files = [str(run(name) / "lr.txt") for name in ("a", "b")]
    vis_lr([*files, "-o", str(tmp_path / "out" / "lr.svg")])
    assert drawn == [["a", "b"]]
    assert "<svg" in (tmp_path / "out" / "lr.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.txt"], "none.txt: cannot be read"),
        (["{log}/log.txt", "--smooth", "1"], "--smooth: got 1.0, expected at least 0 and below 1"),
        (["{log}/log.txt", "-o", "a.bmp"], "a.bmp: expected a name that ends in .png, .svg or .pdf"),
    ],
)
def test_mistakes_on_the_command_line(run, capsys, arguments, message):
    folder = run("a")
    with pytest.raises(SystemExit) as exit:
        vis_log([argument.format(log=folder) for argument in arguments])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_vis_lr_asks_for_learning_rates(tmp_path, capsys):
    path = tmp_path / "log.txt"
    path.write_text("step=1 loss=2\n")
    with pytest.raises(SystemExit):
        vis_lr([str(path)])
    assert "log.txt: no learning_rate in it" in capsys.readouterr().err


def test_plot_run_draws_a_log_folder(run, tmp_path):
    output = plot_run(run("a"), tmp_path / "curves.png", smooth=0.6)
    assert output.read_bytes().startswith(b"\x89PNG")
