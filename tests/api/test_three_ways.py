"""The three ways to train a YAML: the hand-written loop, transformers' Trainer, and what LLaMA-Factory is told."""

import json
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from llm_trainer.cli.main import main
from llm_trainer.cli.plots import read_curves
from llm_trainer.config.errors import ConfigError
from llm_trainer.config.load import parse
from vision_data import file_of, picture

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "three_ways"
TOKENIZER = str(ROOT / "tests" / "reference" / "tokenizer")
SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32}
BASE: dict[str, Any] = {"model_config": SHAPE, "tokenizer": TOKENIZER, "file_dataset": ["a.jsonl"], "batch_size": 2}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a file of the folder, with its neighbours in reach."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name: str) -> ModuleType:
        spec = spec_from_file_location(name, FOLDER / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Conversations in alpaca's format, of different lengths."""
    path = tmp_path / "rows.jsonl"
    lines = [{"instruction": f"say {i}", "input": "", "output": "so " * (i % 5 + 1) + str(i)} for i in range(12)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def run_yaml(tmp_path: Path, rows: Path) -> Path:
    values = BASE | {
        "file_dataset": [str(rows)],
        "optim_config": {"initial_lr": 1e-2, "enable_lr_scheduler": True, "warmup_iters": 1},
        "run_config": {"save_dir": str(tmp_path / "out"), "device": "cpu", "precision": "fp32"},
        "sft_config": {"gradient_accumulation_steps": 2},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    assert isinstance(exit.value.code, int)
    return exit.value.code


def test_ours_give_the_same_curve_and_a_model(
    run_yaml: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    warm_commands: Path,
) -> None:
    """Each in a process of its own, through the command that compares them."""
    monkeypatch.setattr(sys, "executable", str(warm_commands / "python"))
    out = tmp_path / "compared"
    assert run("compare", run_yaml, "--engines", "torch,hf,lowmem", "--steps", 4, "--out", out) == 0
    curves = {way: read_curves(out / way / "log" / "metrics.jsonl") for way in ("torch", "hf", "lowmem")}
    steps, losses = curves["torch"]["loss"]
    assert steps == [1, 2, 3, 4] and losses[3] < losses[0] - 0.01
    for name in ("loss", "grad_norm", "learning_rate"):
        for way in ("hf", "lowmem"):
            assert curves[way][name][1] == pytest.approx(curves["torch"][name][1], rel=2e-5), (way, name)
    assert (out / "lowmem" / "model" / "model.safetensors").exists()
    assert capsys.readouterr().out.count("the same within 0.001") == 2


def test_gradients_move_to_the_host_as_they_are_made(load: Callable[[str], ModuleType]) -> None:
    kept: Any = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8, bias=False))
    kept[1].weight = kept[0].weight  # tied
    working = load("train_low_mem").working_copy(kept, torch.device("cpu"))
    assert working[0].weight is working[1].weight and working[0].weight is not kept[0].weight
    ids = torch.tensor([1, 2, 3])
    for _ in range(2):
        working(ids).square().sum().backward()
    assert all(p.grad is None for p in working.parameters())
    moved, kept[0].weight.grad = kept[0].weight.grad, None
    kept(ids).square().sum().backward()
    assert moved.any() and torch.equal(moved, 2 * kept[0].weight.grad)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_the_hand_written_loop_evaluates_and_goes_on(
    run_yaml: Path, rows: Path, tmp_path: Path, load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after three steps of six and started again it ends with the same weights; its `eval_loss` is the trainer's."""
    from accelerate.state import AcceleratorState

    from llm_trainer import create_trainer
    from llm_trainer.config.load import load_config

    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    script = load("train_low_mem")
    common = [f"eval_dataset={rows}", "eval_config.eval_batch_interval=2", "n_epochs=2", "run_config.log_interval=1"]
    common += ["run_config.progress=false", "optim_config.enable_lr_scheduler=false"]

    def go(name: str, steps: int) -> list[str]:
        changes = [*common, f"run_config.save_dir={tmp_path / name}", f"run_config.max_steps={steps}"]
        monkeypatch.setattr(sys, "argv", ["train_low_mem.py", str(run_yaml), *changes, "--state", "host"])
        script.main()
        return changes

    go("whole", 6)
    go("parts", 3)
    go("parts", 6)
    saved = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "parts")]
    assert saved[0].read_bytes() == saved[1].read_bytes()
    curves = [read_curves(tmp_path / name / "log" / "metrics.jsonl") for name in ("whole", "parts")]
    assert curves[0]["loss"] == curves[1]["loss"] and curves[0]["eval_loss"][0] == [2, 4, 6]

    changes = [*common, f"run_config.save_dir={tmp_path / 'ours'}", "run_config.max_steps=6", "run_config.engine=torch"]
    create_trainer("sft", train_config=load_config(run_yaml, changes)).train()
    ours = read_curves(tmp_path / "ours" / "log" / "metrics.jsonl")
    for name in ("loss", "eval_loss"):
        assert curves[0][name][1] == pytest.approx(ours[name][1], rel=2e-5)


# What LLaMA-Factory is told.


def translation(load: Callable[[str], ModuleType], **sections: Any) -> Any:
    config = parse(BASE | sections, "test")
    how = {"cutoff_len": 32, "precision": "bf16", "on_cpu": True, "total_steps": 100}
    return load("llamafactory_yaml").translate(config, Path("model"), **how)


SFT: dict[str, Any] = {"sft_config": {}}


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (SFT, {"stage": "sft", "finetuning_type": "full", "per_device_train_batch_size": 2, "cutoff_len": 32}),
        (SFT, {"bf16": True, "fp16": False, "use_cpu": True, "packing": False, "lr_scheduler_type": "constant"}),
        ({"sft_config": {"gradient_accumulation_steps": 3}}, {"gradient_accumulation_steps": 3}),
        ({"sft_config": {"train_on": "last"}}, {"mask_history": True, "train_on_prompt": False}),
        ({"sft_config": {"mask_prompt": False}}, {"mask_history": False, "train_on_prompt": True}),
        ({"pretrain_config": {}}, {"stage": "pt", "packing": True}),
        (SFT | {"n_epochs": 3}, {"num_train_epochs": 3}),
        (SFT | {"data_loader_config": {"packing": "bfd"}}, {"neat_packing": True, "cutoff_len": 33}),
        (SFT | {"data_loader_config": {"data_loader_shuffle": False}}, {"disable_shuffling": True}),
        (SFT | {"loss_config": {"label_smoothing": 0.1, "dft": True}}, {"label_smoothing_factor": 0.1, "use_dft_loss": True}),
        (
            SFT | {"optim_config": {"initial_lr": 2e-4, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.2}},
            {"learning_rate": 2e-4, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6, "weight_decay": 0.2},
        ),
        (SFT | {"optim_config": {"max_grad_norm": 0.5}}, {"max_grad_norm": 0.5, "optim": "adamw_torch"}),
        (SFT | {"optim_config": {"optim_type": "muon"}}, {"use_muon": True}),
        (
            SFT | {"run_config": {"seed": 7, "max_steps": 9, "log_interval": 2, "gradient_checkpointing": True}},
            {"seed": 7, "max_steps": 9, "logging_steps": 2, "disable_gradient_checkpointing": False},
        ),
        (SFT | {"run_config": {"save_interval_steps": 5}}, {"save_strategy": "steps", "save_steps": 5}),
        (SFT | {"adapter_config": {"path": "adapter"}}, {"finetuning_type": "lora", "adapter_name_or_path": "adapter"}),
        (SFT | {"run_config": {"resume": "never"}}, {"overwrite_output_dir": True}),
        (SFT | {"eval_dataset": "b.jsonl"}, {"eval_strategy": "steps", "eval_steps": 100, "per_device_eval_batch_size": 2}),
        (
            {"dpo_config": {"loss_type": "simpo", "loss_beta": 2.0, "loss_simpo_gamma": 1.5}},
            {"stage": "dpo", "pref_loss": "simpo", "pref_beta": 2.0, "simpo_gamma": 1.5},
        ),
        ({"dpo_config": {"loss_ipo": True, "nll_loss_coef": 0.3}}, {"pref_loss": "ipo", "pref_ftx": 0.3}),
    ],
)  # fmt: skip
def test_every_field(sections: dict[str, Any], expected: dict[str, Any], load: Callable[[str], ModuleType]) -> None:
    result = translation(load, **sections)
    assert {name: result.arguments.get(name) for name in expected} == expected and result.untold == []


@pytest.mark.filterwarnings("ignore:Both num_training_steps and num_stable_steps")  # LLaMA-Factory needs the latter
@pytest.mark.parametrize(
    ("options", "name", "shape"),
    [
        ({}, "cosine", None),
        ({"min_lr": 1e-5}, "cosine_with_min_lr", {"min_lr": 1e-5}),
        ({"lr_scheduler": "linear"}, "linear", None),
        ({"lr_scheduler": "linear", "min_lr": 1e-5}, "polynomial", {"lr_end": 1e-5, "power": 1.0}),
        ({"lr_scheduler": "polynomial", "polynomial_power": 2.0}, "polynomial", {"lr_end": 0.0, "power": 2.0}),
        ({"lr_scheduler": "constant"}, "constant_with_warmup", None),
        ({"lr_scheduler": "inverse_sqrt"}, "inverse_sqrt", None),
        (
            {"lr_scheduler": "wsd", "min_lr": 1e-4},
            "warmup_stable_decay",
            {"num_decay_steps": 20, "num_stable_steps": 75, "decay_type": "linear", "min_lr_ratio": 0.1},
        ),
    ],
)
def test_schedules_are_those_of_transformers(
    options: dict[str, Any], name: str, shape: dict[str, Any] | None, load: Callable[[str], ModuleType]
) -> None:
    """The rates of all steps, by their implementation and by ours."""
    from transformers.optimization import get_scheduler

    from llm_trainer.assemble import make_scheduler

    section = {"enable_lr_scheduler": True, "warmup_iters": 5, "initial_lr": 1e-3} | options
    arguments = translation(load, **SFT, optim_config=section).arguments
    assert (arguments["lr_scheduler_type"], arguments["lr_scheduler_kwargs"]) == (name, shape)
    config = parse(BASE | SFT | {"optim_config": section}, "test")
    rates: list[list[float]] = []
    for make in (
        lambda optimizer: make_scheduler(config, optimizer, 100),
        lambda optimizer: get_scheduler(name, optimizer, arguments["warmup_steps"], 100, shape),
    ):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
        scheduler = make(optimizer)
        rates.append([])
        for _ in range(99):
            rates[-1].append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    assert rates[0] == pytest.approx(rates[1], rel=1e-6, abs=1e-9)


def test_nothing_is_dropped_silently(load: Callable[[str], ModuleType]) -> None:
    result = translation(
        load,
        sft_config={"thinking": "all", "kd_config": {"teacher_model": "teacher"}},
        loss_config={"z_loss_coef": 0.1, "critical_tokens": [5]},
        optim_config={"optim_type": "lion"},
        data_loader_config={"packing": "flat", "micro_batch_tokens": 64},
        run_config={"resume": "some/checkpoint", "attention": "blocked"},
        eval_prompts=["hello"],
    )
    told = "\n".join(result.untold)
    names = ("sft_config.thinking: all", "sft_config.kd_config", "loss_config.z_loss_coef: 0.1", "critical_tokens: [5]",
             "optim_type: lion; it trains with adamw", "packing: flat", "micro_batch_tokens: 64", "run_config.resume",
             "eval_prompts: ['hello']", "run_config.attention: blocked")  # fmt: skip
    assert [name for name in names if name not in told] == [] and len(result.untold) == len(names)


def test_adapters_in_its_words(load: Callable[[str], ModuleType]) -> None:
    section = {"rank": 4, "dropout": 0.1, "target": ["q_proj", "v_proj"], "rslora": True, "init": "pissa_niter_8"}
    result = translation(load, **SFT, adapter_config=section, optim_config={"lr_multipliers": {"lora_B": 16}})
    expected = {"finetuning_type": "lora", "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.1, "use_rslora": True,
                "lora_target": "q_proj,v_proj", "pissa_init": True, "pissa_iter": 8, "loraplus_lr_ratio": 16}  # fmt: skip
    assert {name: result.arguments.get(name) for name in expected} == expected
    assert result.untold == ["adapter_config: the first weights of the adapters, which it draws itself"]
    section = {"target": r".*\.q_proj", "parts": ["visual"], "init": "olora", "options": {"lora_bias": True}}
    told = "\n".join(translation(load, **SFT, adapter_config=section, optim_config={"lr_multipliers": {"v": 2}}).untold)
    for name in ("target: .*", "parts: ['visual']", "init: olora", "options: {'lora_bias'", "lr_multipliers: {'v': 2"):
        assert name in told
    with pytest.raises(ConfigError, match="adapter_config.kind: got loha, and LLaMA-Factory has lora"):
        translation(load, **SFT, adapter_config={"kind": "loha"})


USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
SEES = {
    "architecture": "qwen3",
    "vision": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4},
}


@pytest.fixture
def pictured(tmp_path: Path) -> Path:
    """Conversations about images, the last of text alone."""
    pytest.importorskip("PIL")
    lines = []
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(file_of(picture(8, 8, seed=number)))
        shown = {"images": [f"{number}.png"]} if number < 7 else {}
        turns = [USER | {"content": "<image>what?" if shown else "and?"}, ANSWER | {"content": f"it is {number}"}]
        lines.append(json.dumps({"messages": turns} | shown) + "\n")
    path = tmp_path / "pictured.jsonl"
    path.write_text("".join(lines))
    return path


@pytest.mark.parametrize(
    ("sections", "arguments", "untold"),
    [
        ({}, {"freeze_vision_tower": False, "freeze_multi_modal_projector": False, "freeze_language_model": False}, ""),
        ({"freeze": ["vision"]}, {"freeze_vision_tower": True, "freeze_language_model": False}, ""),
        (
            {"sft_config": {"freeze_llm_model": True}},
            {"freeze_vision_tower": True, "freeze_multi_modal_projector": False, "freeze_language_model": True},
            "",
        ),
        ({"freeze": ["embed"]}, {"freeze_language_model": False}, "freeze: 'embed'; it freezes whole parts"),
        ({"adapter_config": {}}, {"freeze_vision_tower": True, "freeze_multi_modal_projector": True}, "adapter_config"),
        ({"data_loader_config": {"max_pixels": 900}}, {"image_max_pixels": 900, "image_min_pixels": 1}, ""),
        ({"eval_prompts": ["<image>?"], "eval_image_tags": ["a.png"]}, {}, "eval_image_tags: ['a.png']"),
        (
            {"sft_config": {"pixel_values_provider": print, "image_tags_file_dataset": "a.csv"}},
            {},
            "sft_config.pixel_values_provider",
        ),
    ],
)  # fmt: skip
def test_images_in_its_words(
    sections: dict[str, Any],
    arguments: dict[str, Any],
    untold: str,
    tmp_path: Path,
    load: Callable[[str], ModuleType],
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "vision_config": {"hidden_size": 16}}))
    how = {"cutoff_len": 32, "precision": "bf16", "on_cpu": True, "total_steps": 100}
    module = load("llamafactory_yaml")
    result = module.translate(parse(BASE | SFT | sections, "test"), tmp_path, **how)
    assert {name: result.arguments[name] for name in arguments} == arguments and result.arguments["template"] == "llava"
    told = "\n".join(result.untold)
    assert untold in told and "its own template 'llava'" in told
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "idefics3", "vision_config": {"hidden_size": 16}}))
    with pytest.raises(ConfigError, match="a idefics3, which LLaMA-Factory shows no images"):
        module.translate(parse(BASE | SFT, "test"), tmp_path, **how)


def test_rows_with_images_name_their_files(
    pictured: Path, tmp_path: Path, load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And tokens of ours, which have no pixels, are refused; what is written is the folder of a model that sees."""
    script = load("train_with_real_llamafactory")
    values = BASE | SFT | {"model_config": SHAPE | SEES, "file_dataset": [str(pictured)]}
    config = parse(values | {"run_config": {"save_dir": str(tmp_path / "out"), "device": "cpu"}}, "test")
    folder = tmp_path / "for"
    folder.mkdir()
    result = script.write_run(config, folder, our_tokens=False)
    assert result.datasets["train_0_pictured"]["columns"]["images"] == "images"
    rows = [json.loads(line) for line in (folder / "train_0_pictured.jsonl").read_text().splitlines()]
    assert [row["images"] for row in rows] == [[str(tmp_path / f"{n}.png")] for n in range(7)] + [[]]
    assert [row["messages"][0]["content"].count("<image>") for row in rows] == [1] * 7 + [0]
    assert (folder / "model" / "processor_config.json").is_file() and result.arguments["template"] == "llava"
    with pytest.raises(ConfigError, match="--tokens ours: rows that show images"):
        script.write_run(config, folder, our_tokens=True)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_rows_with_images_are_trained_alike(
    pictured: Path, tmp_path: Path, load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By our loop, by transformers' and by the one that is written by hand."""
    from accelerate.state import AcceleratorState

    from llm_trainer import create_trainer
    from llm_trainer.config.load import load_config

    values = BASE | SFT | {"model_config": SHAPE | SEES, "file_dataset": [str(pictured)], "batch_size": 4}
    values |= {
        "optim_config": {"initial_lr": 1e-2},
        "run_config": {"device": "cpu", "precision": "fp32", "log_interval": 1},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    losses = {}
    for way in ("torch", "hf", "lowmem"):
        changes = [f"run_config.save_dir={tmp_path / way}", "run_config.progress=false"]
        if way == "lowmem":
            monkeypatch.setattr(AcceleratorState, "_shared_state", {})
            script = load("train_low_mem")
            monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "run.yaml"), *changes, "--state", "host"])
            script.main()
        else:
            config = load_config(tmp_path / "run.yaml", [*changes, f"run_config.engine={way}"])
            create_trainer("sft", train_config=config).train()
        losses[way] = read_curves(tmp_path / way / "log" / "metrics.jsonl")["loss"][1]
    assert len(losses["torch"]) == 2 and losses["torch"][0] != losses["torch"][1]
    for way in ("hf", "lowmem"):
        assert losses[way] == pytest.approx(losses["torch"], rel=2e-5), way


def test_only_three_stages(load: Callable[[str], ModuleType]) -> None:
    with pytest.raises(ConfigError, match="expected a pretrain_config, an sft_config or a dpo_config"):
        translation(load, kto_config={})
    with pytest.raises(ConfigError, match="loss_type: got 'robust', and LLaMA-Factory has sigmoid|dpo, hinge"):
        translation(load, dpo_config={"loss_type": "robust"})


HUMAN, GPT = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}


@pytest.mark.parametrize(
    ("stage", "row", "columns", "is_direct"),
    [
        ("sft", {"instruction": "a", "output": "b"}, {"prompt": "instruction", "response": "output"}, True),
        (
            "sft",
            {"instruction": "a", "input": "c", "output": "b", "system": "s"},
            {"prompt": "instruction", "query": "input", "response": "output", "system": "system"},
            True,
        ),
        ("sft", {"question": "a", "answer": "b"}, {"prompt": "question", "response": "answer"}, True),
        ("sft", {"prompt": "a", "completion": "b"}, {"prompt": "prompt", "response": "completion"}, True),
        ("sft", {"conversations": [HUMAN, GPT]}, {"messages": "conversations"}, True),
        ("sft", {"messages": [USER, ANSWER]}, {"messages": "messages"}, True),
        ("sft", {"messages": [USER, ANSWER | {"loss_weight": 0}]}, {"messages": "messages", "tools": "tools"}, False),
        ("sft", {"conversations": [HUMAN, {"from": "bot", "value": "ho"}]}, {"messages": "messages", "tools": "tools"}, False),
        ("sft", [USER, ANSWER], {"messages": "messages", "tools": "tools"}, False),
        ("pretrain", {"text": "a"}, {"prompt": "text"}, True),
        (
            "dpo",
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            {"messages": "messages", "chosen": "chosen", "rejected": "rejected"},
            False,
        ),
    ],
)  # fmt: skip
def test_data_by_recognised_schema(
    stage: str, row: Any, columns: dict[str, str], is_direct: bool, tmp_path: Path, load: Callable[[str], ModuleType]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    config = parse(BASE | {"file_dataset": [str(path)], f"{stage}_config": {}}, "test")
    module = load("llamafactory_yaml")
    result = module.Translation({})
    module.add_data(config, tmp_path, result)
    assert result.arguments["dataset"] == "train_0_rows" and result.arguments["dataset_dir"] == str(tmp_path)
    entry = result.datasets["train_0_rows"]
    assert entry["columns"] == columns and entry.get("ranking", False) == (stage == "dpo")
    assert entry["file_name"] == (str(path) if is_direct else "train_0_rows.jsonl")
    assert ("template" in result.arguments) == ("completion" in row)
    assert any("written anew" in line for line in result.untold) != is_direct


def test_conversations_are_written_anew_in_its_words(tmp_path: Path, load: Callable[[str], ModuleType]) -> None:
    """Its reader crashes on calls whose arguments differ from row to row, so they are text."""
    rows = [
        [USER, CALL, {"role": "tool", "content": "1"}, ANSWER | {"think": "hm"}],
        [USER, ANSWER | {"loss_weight": 0}, USER, ANSWER],
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    module = load("llamafactory_yaml")
    result = module.Translation({})
    module.add_data(parse(BASE | {"file_dataset": [str(path)]} | SFT, "test"), tmp_path, result)
    turns = json.loads((tmp_path / "train_0_rows.jsonl").read_text().splitlines()[0])["messages"]
    assert [turn["role"] for turn in turns] == ["user", "function_call", "tool", "assistant"]
    assert json.loads(turns[1]["content"]) == [{"name": "f", "arguments": {"x": 1}}]
    assert turns[3]["content"] == "<think>\nhm\n</think>\n\nho"
    assert result.untold[-1] == "rows.jsonl: 1 rows have a loss_weight, which it ignores"


def test_its_log_becomes_ours(tmp_path: Path, load: Callable[[str], ModuleType]) -> None:
    entries = [
        {"current_steps": 1, "loss": 2.5, "lr": 0.1, "epoch": 0.5, "throughput": 50.0, "total_tokens": 100},
        {"current_steps": 2, "loss": 2.0, "lr": 0.2, "epoch": 1.0, "throughput": 100.0, "total_tokens": 300},
        {"current_steps": 2, "eval_loss": 2.25, "epoch": 1.0},
        {"current_steps": 2, "epoch": 1.0, "percentage": 100.0},
    ]
    (tmp_path / "trainer_log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    history = [{"step": 1, "grad_norm": 0.75}, {"step": 2, "grad_norm": 0.5}, {"step": 2, "eval_loss": 2.25}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    first, second, evaluated = load("train_with_real_llamafactory").translated_log(tmp_path)
    assert first == (1, {"loss": 2.5, "learning_rate": 0.1, "epoch": 0.5, "num_tokens": 100, "tokens_per_second": 50,
                         "grad_norm": 0.75})  # fmt: skip
    assert second[1]["tokens_per_second"] == pytest.approx(200)  # 200 tokens between 2 s and 3 s
    assert evaluated == (2, {"eval_loss": 2.25, "epoch": 1.0})


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "pretrain"])
def test_llamafactory_gives_our_curve(
    stage: str, tmp_path: Path, run_yaml: Path, load: Callable[[str], ModuleType], capsys: pytest.CaptureFixture
) -> None:
    """On our tokens; its transformers divide a pretraining loss by 32 where 31 tokens are predicted."""
    if not load("train_with_real_llamafactory").is_ready():
        pytest.skip("LLaMA-Factory has no environment: train_with_real_llamafactory.py --install")
    changes = []
    if stage == "pretrain":
        (tmp_path / "text.jsonl").write_text(
            "".join(json.dumps({"text": f"{i} and so on " * 20}) + "\n" for i in range(20))
        )
        changes = [f"file_dataset={tmp_path / 'text.jsonl'}", "sft_config=null", "pretrain_config={}"]
    out = tmp_path / "compared"
    assert run("compare", run_yaml, *changes, "--engines", "torch,llamafactory", "--steps", 4, "--out", out) == 0
    ours, theirs = (read_curves(out / way / "log" / "metrics.jsonl") for way in ("torch", "llamafactory"))
    factor = 31 / 32 if stage == "pretrain" else 1.0
    assert theirs["loss"][1] == pytest.approx([factor * loss for loss in ours["loss"][1]], rel=1e-4)
    assert theirs["learning_rate"][1] == pytest.approx(ours["learning_rate"][1])
    shown = capsys.readouterr().out
    assert ("only the divisor differs" in shown) == (stage == "pretrain")
