"""YAML to configuration and back."""

import re

import pytest
import yaml

from llm_trainer.config.load import dump_config, example, load_config, parse
from llm_trainer.train_configs import ConfigError, FileDataset, TrainConfig

MINIMAL = {"model_config": "m", "file_dataset": "a.jsonl"}


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


def test_load_reads_numbers_as_people_write_them(write):
    path = write(
        "model_config: m\nfile_dataset: [a, b]\noptim_config: {initial_lr: 3e-4, eps: 1E-8, weight_decay: 0}\n"
    )
    config = load_config(path)
    assert config.optim_config.initial_lr == 3e-4
    assert config.optim_config.eps == 1e-8
    assert list(config.file_dataset) == ["a", "b"]


@pytest.mark.parametrize("text", ["1e3x", "12e", "e3", "v1.0"])
def test_words_with_digits_stay_words(write, text):
    assert load_config(write(f"model_config: {text}\nfile_dataset: a\n")).model_config == text


def test_overrides_reach_into_sections(write):
    path = write("model_config: m\nfile_dataset: a\noptim_config: {initial_lr: 0.1}\nsft_config:\n")
    changes = [
        "optim_config.initial_lr=1e-3",
        "sft_config.train_on=last",
        "run_config.max_steps=7",
        "eval_prompts=[a b]",
    ]
    config = load_config(path, changes)
    assert config.optim_config.initial_lr == 1e-3
    assert config.sft_config is not None and config.sft_config.train_on == "last"
    assert config.run_config.max_steps == 7
    assert config.eval_prompts == ["a b"]
    assert load_config(path, ["run_config.max_steps=null"]).run_config.max_steps is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch_size", "override 'batch_size': expected key=value"),
        (".a=1", "override '.a=1': expected key=value"),
        ("file_dataset.x=1", "override 'file_dataset.x=1': file_dataset is no section but 'a'"),
        ("optim_config.lr=1", "optim_config.lr is not a known key"),
        ("batch_size=[", "override 'batch_size=[': not readable as YAML"),
    ],
)
def test_wrong_overrides(write, override, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(write("model_config: m\nfile_dataset: a\n"), [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model_config: m\nfile_dataset: a\noptim_config: {initail_lr: 1}",
            "optim_config.initail_lr is not a known key",
        ),
        ("batch_size: 1\nbatch_size: 2", "not readable as YAML, line 2: key 'batch_size' stands twice"),
        ("a: [", "not readable as YAML, line 1: expected the node content"),
        ("a: \x01", "not readable as YAML: unacceptable character #x0001"),
        ("", "got None, expected a mapping of keys to values"),
        ("- a", "got ['a'], expected a mapping of keys to values"),
        (
            "model_config: {hidden_size: '64', num_hidden_layers: 1, num_attention_heads: 1}\nfile_dataset: a",
            "model_config.hidden_size: got '64', expected an integer of at least 1",
        ),
    ],
)
def test_wrong_files_are_named(write, text, message):
    path = write(text)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "string" not in str(caught.value)  # `model_config` may be one, but a section was given


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read as a text file"):
        load_config(tmp_path / "none.yaml")


def test_dump_is_complete_and_loads_back():
    config = parse(MINIMAL | {"optim_config": {"initial_lr": 3e-5}, "sft_config": {}}, "here")
    text = dump_config(config)
    values = yaml.safe_load(text)  # any YAML reader sees the number
    assert values["optim_config"]["initial_lr"] == 3e-5
    assert values["optim_config"]["eps"] == 1e-8
    assert values["run_config"]["log_dir"] is None  # with another save_dir it is another folder
    assert values["pretrain_config"] is None
    assert dump_config(parse(values, "dump")) == text


def test_dump_leaves_out_weights_and_lists_files():
    config = TrainConfig(model_config="m", file_dataset=FileDataset(["a", "b"]), init_state_dict={"w": object()})
    values = yaml.safe_load(dump_config(config))
    assert values["file_dataset"] == ["a", "b"]
    assert "init_state_dict" not in values


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_example_loads_back_with_the_defaults(write, stage):
    text = example(stage)
    config = load_config(write(text))
    assert (config.pretrain_config is None, config.sft_config is None) == (stage == "sft", stage == "pretrain")
    bare = parse(MINIMAL, "bare")
    for section in ("data_loader_config", "loss_config", "optim_config", "eval_config", "run_config"):
        assert getattr(config, section) == getattr(bare, section)
    assert all("# " in line for line in text.splitlines())
    assert "precision: auto" in text and "(one of auto, fp32, bf16, fp16)" in text


def test_example_of_an_unknown_stage():
    with pytest.raises(ConfigError, match="stage: got 'dop', expected one of pretrain, sft"):
        example("dop")
