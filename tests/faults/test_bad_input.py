"""Everything a user can get wrong, through the command line: one message that says what, where and how to mend it."""

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llm_trainer import SFTTrainer
from llm_trainer.checkpoint import CheckpointError
from llm_trainer.cli.main import main
from llm_trainer.config.load import load_config
from llm_trainer.train.guards import NonFiniteError

WAITS = re.compile(r"\A([\w ]+ \.\.\.\n)+")  # what a busy machine says that it waits for

CHAT = [
    [{"role": "user", "content": f"count to {n}"}, {"role": "assistant", "content": " ".join(map(str, range(n)))}]
    for n in range(1, 9)
]
LONG = [{"role": "user", "content": "x " * 300}, {"role": "assistant", "content": "y"}]


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def chat(role: str, content: str | None) -> list[dict[str, Any]]:
    return [{"role": role, "content": content}, {"role": "assistant", "content": "b"}]


@dataclass
class Case:
    """A mistake, and what the message must say, in this order."""

    name: str
    says: tuple[str, ...]
    data: str | bytes | None = lines(*CHAT)
    file: str = "rows.jsonl"
    config: dict[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    code: int = 2

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("missing file", ("rows.jsonl: found no such file", "expected", "fix: check the path"), data=None),
    Case("empty file", ("rows.jsonl: found no rows (the file is empty)", "expected at least one row", "fix"), data=""),
    Case("blank lines", ("rows.jsonl: found no rows", "at least one row", "fix"), data="\n\n  \n"),
    Case("binary file", ("rows.jsonl: found binary data", "expected", "fix: convert it"), data=bytes(range(256)) * 9),
    Case("half a line", ("rows.jsonl:2: found broken JSON", "expected one complete", "fix"), lines(*CHAT[:2])[:-30]),
    Case("a number per line", ("rows.jsonl:1: found int 1", "expected an object", "fix"), data="1\n2\n"),
    Case(
        "unknown columns", ("rows.jsonl:1: found the columns foo", "expected", "fix: map columns"), data='{"foo": 1}\n'
    ),
    Case(
        "no answer",
        ("rows.jsonl:1: found no assistant turn", "at least one", "fix: add the answer"),
        lines(CHAT[0][:1]),
    ),
    Case(
        "unknown role",
        ("rows.jsonl:1: key '[0].role'", "'wizard'", "expected one of", "fix"),
        lines(chat("wizard", "a")),
    ),
    Case("null content", ("rows.jsonl:2: key '[0].content'", "expected", "fix"), lines(CHAT[0], chat("user", None))),
    Case(
        "a row longer than the context",
        ("rows.jsonl:2: found 611 tokens", "at most 64", "fix: raise dataset_block_size"),
        data=lines(CHAT[0], LONG),
        config={"data_loader_config": {"truncation": "error"}},
    ),
    Case("all rows longer", ("rows.jsonl: found no row to train on (2 rows", "expected", "fix"), lines(LONG, LONG)),
    Case(
        "small embedding",
        ("ids up to 511, the model's embedding has 100 rows", "expected at least 512", "set model_config.vocab_size"),
        config={"model_config": {"vocab_size": 100}},
    ),
    Case(
        "a vocabulary smaller than the tokenizer",
        ("needs 512 rows before any token is added, and the model has 100", "expected the tokenizer of this model"),
        config={"model_config": {"vocab_size": 100}, "vocabulary_config": {"add_tokens": ["<|tool|>"]}},
    ),
    Case(
        "a new token that exists",
        ("add_tokens: '<|im_end|>' exists already, as id", "leave it out"),
        config={"vocabulary_config": {"add_special_tokens": ["<|im_end|>"]}},
    ),
    Case(
        "no such RoPE",
        ("rope_scaling.rope_type: got 'ntk'", "transformers knows no such RoPE", "expected one of default, linear"),
        config={"model_config": {"rope_scaling": {"type": "ntk", "factor": 2.0}}},
    ),
    Case(
        "overrides of a shape",
        ("model_overrides: got attention_dropout", "model_config is a shape"),
        config={"model_overrides": {"attention_dropout": 0.1}},
    ),
    Case("wrong key", ("run.yaml: sft_confg is not a known key; did you mean sft_config?",), config={"sft_confg": {}}),
    Case(
        "wrong override", ("optim_config.initial_lrr is not", "initial_lr?"), overrides=("optim_config.initial_lrr=3",)
    ),
    Case(
        "a key of another section",
        ("run.yaml: sft_config.max_steps is not a known key; max_steps is a key of run_config (RunConfig)",),
        config={"sft_config": {"max_steps": 3}},
    ),
    Case(
        "an override in another section",
        ("run.yaml: run_config.n_epochs is not a known key; n_epochs is a key of the top level (TrainConfig)",),
        overrides=("run_config.n_epochs=2",),
    ),
    Case("batch size 0", ("run.yaml: batch_size: got 0, expected an integer of at least 1",), config={"batch_size": 0}),
    Case(
        "negative learning rate",
        ("optim_config.initial_lr: got -0.1, expected a number above 0",),
        config={"optim_config": {"initial_lr": -0.1}},
    ),
    Case("two stages", ("exactly one of", "found pretrain_config and sft_config"), config={"pretrain_config": {}}),
    Case("no such device", ("device: got 'gpu', but this machine has cpu",), config={"run_config": {"device": "gpu"}}),
    Case("fp16 on a CPU", ("fp16 needs a GPU", "use bf16 or fp32"), config={"run_config": {"precision": "fp16"}}),
    Case(
        "float8",
        (
            "run_config.precision: got 'float8': products in 8 bits need a GPU of compute capability 8.9",
            "expected auto",
        ),
        config={"run_config": {"precision": "float8"}},
    ),
    Case(
        "block too long",
        ("dataset_block_size: got 1000", "longest sequence is 64"),
        config={"dataset_block_size": 1000},
    ),
    Case("no such weights", ("none.pt' does not exist",), config={"init_weights_path": "none.pt"}),
    Case("no such tokenizer", ("/none: no such file or folder", "expected", "check"), config={"tokenizer": "/none"}),
    Case("no such checkpoint", ("none' does not exist",), config={"run_config": {"resume": "none"}}, code=1),
    Case(
        "an absurd learning rate",
        ("gradient not finite", "3 steps in a row", "Likely cause", "lower the learning rate", "Last valid checkpoint"),
        config={"optim_config": {"initial_lr": 1e30, "max_grad_norm": 0.0}, "run_config": {"max_steps": 9}},
        code=1,
    ),
]


def write(case: Case, folder: Path, tokenizer: Path) -> Path:
    """The YAML file of a case, with its data beside it."""
    data = folder / case.file
    if case.data is not None:
        data.write_bytes(case.data if isinstance(case.data, bytes) else case.data.encode())
    shape = {"vocab_size": 512, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    run = {"save_dir": str(folder / "run"), "max_steps": 1, "device": "cpu", "progress": False}
    config: dict[str, Any] = {
        "model_config": shape | {"max_position_embeddings": 64},
        "tokenizer": str(tokenizer),
        "file_dataset": str(data),
        "batch_size": 2,
        "n_epochs": 9,
        "run_config": run,
        "sft_config": {},
    }
    for name, value in case.config.items():
        config[name] = {**config.get(name, {}), **value} if isinstance(value, dict) else value
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def train(path: Path, *overrides: str) -> int:
    """The exit code of `llm-trainer train`."""
    try:
        main(["train", str(path), *overrides])
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code
    return 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_message_says_what_where_and_how_to_mend_it(
    case: Case, tmp_path: Path, reference_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(write(case, tmp_path, reference_dir / "tokenizer"), *case.overrides) == case.code
    message, position = WAITS.sub("", capsys.readouterr().err), 0
    assert message.startswith("error: ") and "Traceback" not in message
    for part in case.says:
        assert part in message[position:], message
        position = message.index(part, position)


def test_nothing_is_lost_by_mistakes(tmp_path: Path, reference_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint survives wrong data and a truncated neighbour; the run goes on from the one that is whole."""
    path = write(Case("good", ()), tmp_path, reference_dir / "tokenizer")
    assert train(path, "run_config.max_steps=2", "run_config.save_interval_steps=1") == 0
    first, second = sorted((tmp_path / "run").glob("checkpoint-*"))
    weights = second / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    (tmp_path / "rows.jsonl").write_text(lines(*CHAT[:6]))
    assert train(path, "run_config.max_steps=3") == 1
    told = capsys.readouterr()
    assert "was made with other data" in told.err and f"{weights}' is damaged: 100 bytes" in told.out
    (tmp_path / "rows.jsonl").write_text(lines(*CHAT))
    assert train(path, "run_config.max_steps=3") == 0
    told = capsys.readouterr()
    assert f"continuing from {first}: step 1" in told.out and "set-aside-1" in told.out
    assert train(path, "run_config.max_steps=3") == 0
    assert "already finished at step 3, nothing to do" in capsys.readouterr().out


def test_a_read_only_folder_is_refused_before_the_first_step(
    tmp_path: Path, reference_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(Case("good", ()), tmp_path, reference_dir / "tokenizer")
    touch = Path.touch

    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        if (tmp_path / "run") in self.parents:
            raise OSError(30, os.strerror(30))
        touch(self, *args, **kwargs)

    monkeypatch.setattr(Path, "touch", refuse)
    assert train(path) == 2
    message = capsys.readouterr().err
    assert "cannot be written" in message and "Read-only file system" in message and "Choose another" in message


def test_weights_that_are_not_finite_are_named(tmp_path: Path, reference_dir: Path) -> None:
    config = load_config(write(Case("good", ()), tmp_path, reference_dir / "tokenizer"))
    trainer = SFTTrainer(train_config=config)
    with torch.no_grad():
        trainer.base_model.model.layers[0].mlp.up_proj.weight[3, 5] = float("nan")
    with pytest.raises(
        NonFiniteError, match=r"before the first step: model.layers.0.mlp.up_proj.weight \(1 of [\d,]+ val"
    ):
        trainer.train()
    assert trainer.run.progress.step == 0 and not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_full_disk_while_saving_keeps_the_previous_checkpoint(
    tmp_path: Path, reference_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second save fails: said, and training goes on; the last one fails: an error that names what is valid."""
    from llm_trainer.train import saving

    write_files, saves = saving.write_files, []

    def fill_the_disk(folder: Path, files: Any) -> Any:
        saves.append(folder)
        if len(saves) > 1:
            raise OSError(28, os.strerror(28))
        return write_files(folder, files)

    monkeypatch.setattr(saving, "write_files", fill_the_disk)
    config = load_config(write(Case("good", ()), tmp_path, reference_dir / "tokenizer"))
    trainer = SFTTrainer(train_config=config, save_interval_steps=1, max_steps=3)
    with pytest.raises(CheckpointError, match=r"(?s)No space left on device.*newest valid checkpoint.*00000001"):
        trainer.train()
    assert "WARNING" in (told := capsys.readouterr().out) and "Training goes on" in told and len(saves) == 3
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-00000001"]


ODD = [  # of the shared data: byte-order mark and CRLF, no last newline, one article per line, trees, strings for lists, ...
    ("corpus/alice_gutenberg_11-0.txt", "pretrain_config"),
    ("corpus/names.txt", "pretrain_config"),
    ("corpus/wiki_demo.txt", "pretrain_config"),
    ("corpus/zh/lunyu.json", "pretrain_config"),
    ("sft/content_parts_loss_weight.jsonl", "sft_config"),
    ("sft/glaive_toolcall_en.json", "sft_config"),
    ("sft/oasst_trees.jsonl", "sft_config"),
    ("sft/openai_bare_list.jsonl", "sft_config"),
    ("rl/gsm8k_train_1k.jsonl", "sft_config"),
]


@pytest.mark.parametrize(("file", "stage"), ODD)
def test_odd_files_train(
    file: str, stage: str, shared_data: Path, tmp_path: Path, reference_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case(
        "odd",
        (),
        config={
            "file_dataset": str(shared_data / file),
            "batch_size": 1,
            "model_config": {"max_position_embeddings": 256},
        },
    )
    path = write(case, tmp_path, reference_dir / "tokenizer")
    text = path.read_text().replace("sft_config", stage)
    path.write_text(text)
    assert train(path) == 0, capsys.readouterr().err
    assert list((tmp_path / "run").glob("checkpoint-00000001"))


@pytest.mark.parametrize(
    "file", ["preference/hh_strings.jsonl", "rl/mt_bench_prompts.jsonl", "spec_formats/rl_answer.jsonl"]
)
def test_data_of_another_stage_is_refused(
    file: str, shared_data: Path, tmp_path: Path, reference_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(
        Case("stage", (), config={"file_dataset": str(shared_data / file)}), tmp_path, reference_dir / "tokenizer"
    )
    assert train(path) == 2
    message = capsys.readouterr().err
    assert f"{file}:1: found rows of kind" in message and "for conversations; fix:" in message
