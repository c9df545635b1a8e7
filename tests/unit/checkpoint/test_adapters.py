"""Checkpoints of models with adapters: a PEFT folder, which opens elsewhere and from which a run goes on, bit for bit."""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llm_trainer import SFTTrainer
from llm_trainer.checkpoint import CheckpointError, load_checkpoint, write_model
from llm_trainer.checkpoint.adapter_bases import find_base, read_base
from llm_trainer.checkpoint.adapter_names import saves_adapters
from llm_trainer.config.model import ModelConfig
from llm_trainer.models.build import build_model
from llm_trainer.train import bases

peft = pytest.importorskip("peft", reason="needs peft")

SHAPE = ModelConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}
IDS = torch.arange(12).reshape(2, 6)


def base_model(seed: int = 0, **more: Any) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(SHAPE, **more)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_model(base_model(), folder)
    return folder


def adapted(source: Path | None, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A model with adapters, on the base in a folder or (None) on one made in memory; the same at every call."""
    model = base_model() if source is None else build_model(str(source), dtype=dtype)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what peft imports
        kind = options.pop("kind", peft.LoraConfig)
        return peft.get_peft_model(model, kind(**({**LORA, **options} if kind is peft.LoraConfig else options)))


def with_norm(source: Path) -> Any:
    """Adapters, and a norm that somebody has unfrozen."""
    model = adapted(source)
    model.get_base_model().model.norm.requires_grad_(True)
    return model


def with_two(source: Path) -> Any:
    """The second adapter learns, on top of the first."""
    model = adapted(source, init_lora_weights=False)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    return model


KINDS: dict[str, Callable[[Path], Any]] = {
    "lora": adapted,
    "dora": lambda source: adapted(source, use_dora=True, use_rslora=True),
    "head trained whole": lambda source: adapted(source, modules_to_save=["lm_head"]),
    "a few tokens": lambda source: adapted(source, trainable_token_indices={"embed_tokens": [1, 5]}),
    "loha": lambda source: adapted(source, kind=peft.LoHaConfig, r=2, target_modules=["q_proj"]),
    "vera": lambda source: adapted(source, kind=peft.VeraConfig, r=2, target_modules=["q_proj"]),
    "a norm too": with_norm,
    "pissa": lambda source: adapted(source, init_lora_weights="pissa"),
}


def trainer_of(model: Any, folder: Path, steps: int = 2, **options: Any) -> SFTTrainer:
    torch.manual_seed(2)
    batches = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 64, (4, 2, 8))]
    values = {
        "optimizer": torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2),
        "max_steps": steps,
        "device": "cpu",
        "use_amp": False,
        "save_interval": 0,
        "save_dir": str(folder),
        "resume": "auto",
        "progress": False,
    }
    return SFTTrainer(model=model, train_loader=batches, **(values | options))


def opened(source: Path, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, about transformers
        return peft.PeftModel.from_pretrained(build_model(str(source)), str(folder))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
def test_peft_opens_the_folder_and_a_model_is_read_from_it(kind: str, base: Path, tmp_path: Path) -> None:
    trainer = trainer_of(KINDS[kind](base), tmp_path)
    trainer.train()
    folder = tmp_path / "checkpoint-00000002" / "model"
    source = base
    if kind == "pissa":  # which has changed the base
        source = folder / "base"
        assert "is not the model at" in json.loads((folder / "base.json").read_text())["kept_because"]
    assert (folder / "base").is_dir() == (kind == "pissa")

    # 1. by PEFT, on the base
    found, without = logits(opened(source, folder)), logits(build_model(str(source)))
    torch.testing.assert_close(found, logits(trainer.base_model), rtol=0, atol=1e-6)
    assert (found - without).abs().max() > 1e-4

    # 2. into a model of the same kind, which has learned nothing
    other = KINDS[kind](base)
    load_checkpoint(tmp_path, model=other)
    ours, theirs = other.state_dict(), trainer.base_model.state_dict()
    assert trained(other) and ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("kind", ["lora", "pissa"])
def test_a_run_goes_on_bit_for_bit(kind: str, base: Path, tmp_path: Path) -> None:
    whole = trainer_of(KINDS[kind](base), tmp_path / "whole", steps=4)
    whole.train()
    trainer_of(KINDS[kind](base), tmp_path / "run").train()
    # The base of the adapters that PiSSA makes elsewhere may differ in the last bits: the right one is in the folder.
    again = KINDS[kind](base)
    if kind == "pissa":
        with torch.no_grad():
            again.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.mul_(1 + 1e-6)
    second = trainer_of(again, tmp_path / "run", steps=4)
    second.train()
    ends, ours = whole.base_model.state_dict(), second.base_model.state_dict()
    for name in ends:
        assert torch.equal(ends[name], ours[name]), name


def test_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    trainer_of(adapted(base), tmp_path / "run").train()
    write_model(base_model(seed=7), tmp_path / "other")
    with pytest.raises(CheckpointError) as refused:
        trainer_of(adapted(tmp_path / "other"), tmp_path / "run", steps=4).train()
    message = str(refused.value)
    assert f"trained on '{base}'" in message and f"this run's '{tmp_path / 'other'}'" in message
    assert message.count("fingerprint") == 2 and f"load the base from '{base}' as float32" in message
    with pytest.raises(CheckpointError, match="or the same one in another dtype"):
        trainer_of(adapted(base, dtype=torch.bfloat16), tmp_path / "run", steps=4).train()
    with pytest.raises(CheckpointError, match="this model's base has the fingerprint"):
        load_checkpoint(tmp_path / "run", model=adapted(tmp_path / "other"))
    with pytest.raises(CheckpointError, match=r"holds the adapters of a model, and this Qwen3ForCausalLM has none"):
        load_checkpoint(tmp_path / "run", model=base_model())
    trainer_of(base_model(), tmp_path / "whole").train()
    with pytest.raises(CheckpointError, match="are those of a whole model, and this run trains adapters .*save_dir of"):
        load_checkpoint(tmp_path / "whole", model=adapted(base))


def test_a_base_that_is_configured_otherwise_is_kept(base: Path, tmp_path: Path) -> None:
    """Its weights are those of the folder, and mean something else there."""
    model = build_model(str(base))
    model.config.rope_parameters["rope_theta"] = 50.0
    stretched = type(model)(model.config)
    stretched.load_state_dict(model.state_dict())
    model.config.attention_dropout = 0.1
    for changed, reason in ((stretched, "rope_parameters.rope_theta of its configuration differs"), (None, "")):
        wrapped = adapted(base)
        if changed is not None:
            changed.name_or_path = str(base)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                wrapped = peft.get_peft_model(changed, peft.LoraConfig(**LORA))
        found = find_base(wrapped)
        assert found is not None and found.kept_because.endswith(reason) and (found.source is None) == bool(reason)


def test_the_same_base_may_have_moved(base: Path, tmp_path: Path) -> None:
    trainer_of(adapted(base), tmp_path / "run").train()
    write_model(base_model(), tmp_path / "moved")
    trainer = trainer_of(adapted(tmp_path / "moved"), tmp_path / "run", steps=4)
    trainer.train()
    there = read_base(tmp_path / "run" / "checkpoint-00000004" / "model")
    assert there is not None and there.source == str(tmp_path / "moved")


def test_a_base_that_was_made_in_memory_is_kept_once(tmp_path: Path) -> None:
    """Every checkpoint is whole, and the base takes its space once, whichever of them are deleted; a lost link is a copy."""
    options: dict[str, Any] = {"save_interval_steps": 1, "checkpoints_to_keep": 2, "save_in_background": False}
    trainer_of(adapted(None), tmp_path / "whole", steps=5, **options).train()
    trainer_of(adapted(None), tmp_path / "run", steps=3, **options).train()
    second = trainer_of(adapted(None), tmp_path / "run", steps=5, **options)
    second.train()
    folders = sorted((tmp_path / "run").glob("checkpoint-*"))
    assert [folder.name[-1] for folder in folders] == ["4", "5"]
    stats = [(folder / "model" / "base" / "model.safetensors").stat() for folder in folders]
    assert stats[0].st_ino == stats[1].st_ino and stats[0].st_nlink == 2
    found = logits(opened(folders[1] / "model" / "base", folders[1] / "model"))
    torch.testing.assert_close(found, logits(second.base_model), rtol=0, atol=1e-6)
    same = [
        (tmp_path / run / "checkpoint-00000005/model/adapter_model.safetensors").read_bytes()
        for run in ("run", "whole")
    ]
    assert same[0] == same[1]


def test_the_base_is_copied_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def refuse(source: Any, target: Any, **more: Any) -> None:
        if "base" in Path(target).parts:
            raise OSError("no links here")
        link(source, target, **more)

    monkeypatch.setattr(os, "link", refuse)
    options: dict[str, Any] = {"save_interval_steps": 1, "save_in_background": False}
    trainer_of(adapted(None), tmp_path, **options).train()
    first, second = sorted(tmp_path.glob("checkpoint-*/model/base/model.safetensors"))
    assert first.read_bytes() == second.read_bytes() and first.stat().st_ino != second.stat().st_ino
    load_checkpoint(tmp_path, model=adapted(None))


def test_checkpoints_that_hold_all_of_the_model_still_load(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they were written before; what is saved then stands on the base that was in them."""
    whole = trainer_of(adapted(base), tmp_path / "whole", steps=4)
    whole.train()
    with monkeypatch.context() as before:
        before.setattr(bases, "find_base", lambda model: None)
        trainer_of(adapted(base), tmp_path / "run").train()
    assert (tmp_path / "run" / "checkpoint-00000002" / "model" / "model.safetensors").is_file()
    other = adapted(base)
    other.get_base_model().model.norm.weight.data.add_(1)  # what is in the checkpoint counts
    for model in (adapted(base), other):
        shutil.copytree(tmp_path / "run", tmp_path / "again", symlinks=True)
        again = trainer_of(model, tmp_path / "again", steps=4)
        again.train()
        for name, tensor in whole.base_model.state_dict().items():
            assert torch.equal(tensor, again.base_model.state_dict()[name]), name
        folder = tmp_path / "again" / "checkpoint-00000004" / "model"
        source = folder / "base" if model is other else base
        torch.testing.assert_close(logits(opened(source, folder)), logits(again.base_model), rtol=0, atol=1e-6)
        shutil.rmtree(tmp_path / "again")


def test_the_best_file_holds_what_was_trained(base: Path, tmp_path: Path) -> None:
    batches = [{"input_ids": IDS, "labels": IDS}]
    trainer = trainer_of(adapted(base), tmp_path, val_loader=batches, eval_interval=2)
    trainer.train()
    file = tmp_path / "best_model.pt"
    other = adapted(base)
    assert load_checkpoint(file, model=other)["step"] == 2
    expected = trained(trainer.base_model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained(other).items())
    assert set(torch.load(file, weights_only=True)["model"]) == set(expected)
    write_model(base_model(seed=7), tmp_path / "other")
    with pytest.raises(CheckpointError, match="were trained on"):
        load_checkpoint(file, model=adapted(tmp_path / "other"))
    again = trainer_of(adapted(base), tmp_path / "again", steps=4, resume="never")
    again.load_checkpoint(str(file))
    assert again.run.progress.step == 2


def test_two_adapters_are_both_saved(base: Path, tmp_path: Path) -> None:
    trainer = trainer_of(with_two(base), tmp_path)
    trainer.train()
    folder = tmp_path / "checkpoint-00000002" / "model"
    model = opened(base, folder)
    model.load_adapter(str(folder / "second"), "second")
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(logits(model), logits(trainer.base_model), rtol=0, atol=1e-6)
    other = with_two(base)
    load_checkpoint(tmp_path, model=other)
    assert torch.equal(logits(other), logits(trainer.base_model))
    with pytest.raises(CheckpointError, match="do not fit this model"):
        load_checkpoint(tmp_path, model=adapted(base, target_modules=["k_proj"]))


def test_adapters_of_a_model_that_is_none_of_transformers_are_saved_with_all_of_it(tmp_path: Path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(64, 8), nn.Linear(8, 64)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(input_ids))

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Plain(), peft.LoraConfig(r=2, target_modules=["head"]))
    assert not saves_adapters(model)
    trainer = trainer_of(model, tmp_path)
    trainer.train()
    assert (tmp_path / "checkpoint-00000002" / "model" / "model.safetensors").is_file()
