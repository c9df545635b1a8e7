"""What the machine chose is shown before training and logged, once each, with an option that decides otherwise."""

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm_trainer import SFTTrainer, Trainer
from llm_trainer.cli.plots import read_curves
from llm_trainer.config.errors import ConfigError
from llm_trainer.config.load import load_config
from llm_trainer.config.options import Settings
from llm_trainer.state import Choice
from llm_trainer.train.hooks import Hook
from llm_trainer.train.preflight import screen
from llm_trainer.train.signals import TrainingInterrupted

sys.path.insert(0, str(Path(__file__).parents[2] / "faults"))
from victim import make_trainer

from small_runs import config

SOURCE = Path(__file__).resolve().parents[3] / "src" / "llm_trainer"
LAYOUT = Choice("layout", "flat", "no padding is computed", "data_loader_config.packing: none")
BUDGET = Choice("micro-batches", "2,048 tokens", "the fastest", "data_loader_config.micro_batch_tokens: null")


def test_the_screen_shows_a_line_each_in_columns() -> None:
    shown = screen({"steps": "8"}, [], [LAYOUT, BUDGET])
    assert shown.splitlines() == [
        "         steps  8",
        "     automatic  the option in brackets decides otherwise",
        "                layout         flat          no padding is computed [data_loader_config.packing=none]",
        "                micro-batches  2,048 tokens  the fastest [data_loader_config.micro_batch_tokens=null]",
    ]
    assert "automatic" not in screen({"steps": "8"}, [])


def logged(folder: Path) -> list[dict[str, Any]]:
    """The lines of choices in metrics.jsonl, without their times."""
    lines = map(json.loads, (folder / "log" / "metrics.jsonl").read_text().splitlines())
    return [{"step": line["step"], **line["choices"]} for line in lines if "choices" in line]


def test_choices_are_logged_once_before_training_and_under_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later = Choice("compile", "on", "8 steps are left", "run_config.compile: false")

    def choose(run: Any) -> None:
        if run.progress.step >= 4:
            run.chosen(later)  # at every step, and said once
        if run.progress.step == 6:
            run.stop_requested = True

    # 1. A life that ends after step 6.
    options = {"max_epochs": 1, "hooks": [Hook("choose", choose, every_steps=1)], "description": "a: 1"}
    trainer = make_trainer(tmp_path, **options)
    trainer.run.chosen(LAYOUT)
    with pytest.raises(TrainingInterrupted):
        trainer.train()
    said = capsys.readouterr().out
    assert "layout  " in said and "[data_loader_config.packing=none]" in said
    assert said.count("step 4  compile on: 8 steps are left [run_config.compile=false]") == 1
    layout = {"value": "flat", "why": "no padding is computed", "key": "data_loader_config.packing: none"}
    compiled = {"value": "on", "why": "8 steps are left", "key": "run_config.compile: false"}
    first = json.loads((tmp_path / "log" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["choices"]["layout"] == layout
    assert [line["layout"] for line in logged(tmp_path) if "layout" in line] == [layout]
    assert {"step": 4, "compile": compiled} in logged(tmp_path)

    # 2. One that goes on, and says what it runs with.
    trainer = make_trainer(tmp_path, **options)
    for choice in (LAYOUT, later):
        trainer.run.chosen(choice)
    trainer.train()
    assert "step 6  compile" not in capsys.readouterr().out
    assert [line["step"] for line in logged(tmp_path) if "compile" in line] == [4, 6]
    assert "choices" not in read_curves(tmp_path / "log" / "metrics.jsonl")


def test_the_precision_is_said_where_it_was_left_open(tmp_path: Path) -> None:
    left_open = make_trainer(tmp_path / "open", precision="auto").run
    assert left_open.choices["precision"].value == left_open.engine.precision_name
    assert "precision" not in make_trainer(tmp_path / "said", precision="fp32").run.choices


def test_without_a_configuration_the_key_is_a_keyword(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.run.chosen(LAYOUT)
    trainer.run.chosen(BUDGET)
    keys = [trainer.run.choices[choice.name].key for choice in (LAYOUT, BUDGET)]
    assert keys == ["packing='none'", "micro_batch_tokens=None"]


# Keys.


def written_keys() -> Iterator[Any]:
    """The key of every `Choice(...)` of the package that is written out where it is made, or in a constant of the file."""
    for path in sorted(SOURCE.rglob("*.py")):
        text = path.read_text()
        if "Choice(" not in text:
            continue  # each worker collects this: 300 files are parsed in two seconds
        tree = ast.parse(text)
        constants = {}
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                constants[ast.unparse(node.targets[0])] = node.value.value
        for call in ast.walk(tree):
            is_choice = isinstance(call, ast.Call) and ast.unparse(call.func) == "Choice"
            if is_choice and path.parent.name != "plan":  # those are ways to train
                given = {keyword.arg: keyword.value for keyword in call.keywords}
                key = given.get("key") or call.args[3]
                found = key.value if isinstance(key, ast.Constant) else constants.get(ast.unparse(key))
                if found is not None:
                    yield pytest.param(found, id=f"{path.stem}-{found}")


@pytest.mark.parametrize("key", [*written_keys()])
def test_written_keys_are_options(key: str, tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text("{model_config: m, file_dataset: a, sft_config: {}}")
    check_key(key, run)


# Of what the configuration style makes: without a configuration it is the user's own, and nothing is chosen.
OF_OBJECTS = ("attention", "fused")


def check_key(key: str, run: Path) -> None:
    """Both styles take the option that `key` names, with its value."""
    choice = Choice("name", "value", "why", key)
    if ": " not in key:
        variable, equals, _ = key.partition("=")
        assert equals and variable in (SOURCE / "config" / "env.py").read_text()
        return
    section, name = key.partition(": ")[0].split(".")
    value = yaml.safe_load(key.partition(": ")[2])
    config = load_config(run, [choice.option])
    assert getattr(getattr(config, section), name) == value
    keyword, _, literal = choice.as_keyword().key.partition("=")
    if name not in OF_OBJECTS:
        assert getattr(Settings.of("Trainer", {keyword: ast.literal_eval(literal)}), name) == value
    with pytest.raises(ConfigError):
        load_config(run, [choice.option.replace("=", "x=")])


def test_keys_that_a_run_shows_can_be_followed(tmp_path: Path, reference_dir: Path) -> None:
    """A run with no option at all; and one with all that it advises, which leaves nothing open."""
    data, run = tmp_path / "a.jsonl", tmp_path / "run.yaml"
    data.write_text("".join(json.dumps({"text": f"document {number}"}) + "\n" for number in range(8)))
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32}
    values = {"model_config": shape, "tokenizer": str(reference_dir / "tokenizer"), "file_dataset": str(data)}
    run.write_text(yaml.safe_dump(values | {"pretrain_config": {}, "run_config": {"device": "cpu"}}))

    def choices(name: str, *options: str) -> dict[str, dict[str, str]]:
        """What a run of this name chooses."""
        folder = f"run_config.save_dir={json.dumps(str(tmp_path / name))}"
        Trainer(train_config=load_config(run, [folder, *options])).train()
        lines = logged(tmp_path / name)
        return {key: value for key, value in lines[0].items() if key != "step"} if lines else {}

    automatic = choices("automatic")
    advice = []
    for choice in automatic.values():
        check_key(choice["key"], run)
        if ": " in choice["key"]:
            advice.append(choice["key"].replace(": ", "="))
    left = choices("advised", *advice)
    assert [name for name, choice in left.items() if ": " in choice["key"]] == []


def test_what_counts_tokens_of_padded_rows_gets_such(tmp_path: Path, reference_dir: Path) -> None:
    """A class of the user's that shows something of its batches, and says nothing of flat ones."""

    class Counts(SFTTrainer):
        def _count_tokens(self, batch: Any) -> int:
            return int(batch["attention_mask"].sum())

    trainer = Counts(train_config=config(tmp_path, reference_dir, "fp32", n_epochs=1))
    trainer.train()
    layout = trainer.run.choices["layout"]
    assert layout.value == "padded, rows of similar length together" and "_count_tokens of its own" in layout.why
    assert trainer.run.budget.tokens is not None and trainer.run.progress.tokens > 0
