"""What a policy is compared with where little of it is trained: itself, as it was where the run began."""

import copy
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llm_trainer import create_trainer
from llm_trainer.checkpoint.valid import CheckpointError
from llm_trainer.config.model import ModelConfig
from llm_trainer.models.build import build_model
from llm_trainer.models.frozen import StartingPoint, frozen_copy
from llm_trainer.models.scored import scored
from llm_trainer.trainers.answers import join, lay_flat, score
from llm_trainer.trainers.references import precompute_reference

peft = pytest.importorskip("peft", reason="needs peft")

SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def with_adapters(seed: int = 0, **options: Any) -> torch.nn.Module:
    """Two layers whose attention has adapters of rank 2."""
    torch.manual_seed(0)
    base = build_model(ModelConfig(**SHAPE))
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what peft imports
        return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options))


def partly_frozen() -> torch.nn.Module:
    """A model of which one module is trained, as the projector of a vision-language model is."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(**SHAPE))
    model.requires_grad_(False)
    model.model.layers[0].mlp.down_proj.requires_grad_(True)
    return model


def beside_norms(model: torch.nn.Module) -> torch.nn.Module:
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.requires_grad_(True)
    return model


# Adapters that begin with the base, that change it, that have learned before, and what is trained beside them.
KINDS: dict[str, Callable[[], torch.nn.Module]] = {
    "lora": with_adapters,
    "rslora": lambda: with_adapters(use_rslora=True),
    "dora": lambda: with_adapters(use_dora=True),
    "pissa": lambda: with_adapters(init_lora_weights="pissa"),
    "olora": lambda: with_adapters(init_lora_weights="olora"),
    "continued": lambda: with_adapters(init_lora_weights=False),
    "saved module": lambda: with_adapters(init_lora_weights=False, modules_to_save=["o_proj"]),
    "new rows": lambda: with_adapters(init_lora_weights=False, trainable_token_indices={"embed_tokens": [3, 5, 9]}),
    "norms beside them": lambda: beside_norms(with_adapters(init_lora_weights=False)),
    "projector": partly_frozen,
}


def data_of(trainer: str) -> list[dict[str, Any]]:
    noise = torch.Generator().manual_seed(1)
    parts = {"dpo": ("prompt", "chosen", "rejected"), "kto": ("prompt", "completion")}[trainer]
    batch = {f"{part}_input_ids": torch.randint(1, 64, (4, 5), generator=noise) for part in parts}
    masks = {f"{part}_attention_mask": torch.ones(4, 5, dtype=torch.long) for part in parts}
    further = {"desirable": torch.tensor([1, 0, 1, 0])} if trainer == "kto" else {}
    return [batch | masks | further] * 3


def make(trainer: str, model: torch.nn.Module, folder: Path, **options: Any) -> Any:
    given = {
        "optimizer": torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2),
        "train_loader": data_of(trainer),
        "val_loader": data_of(trainer)[:1],
        "eval_interval": 2,
        "max_epochs": 1,
        "precision": "fp32",
        "log_interval": 1,
        "device": "cpu",
        "save_dir": str(folder),
        "save_interval": 0,
        "best_file": False,
        "progress": False,
    }
    return create_trainer(trainer, model=model, **(given | options))


def curve_of(folder: Path) -> list[Any]:
    lines = map(json.loads, (folder / "log" / "metrics.jsonl").read_text().splitlines())
    return [
        (line["step"], name, line[name])
        for line in lines
        for name in ("loss", "grad_norm", "eval_loss")
        if name in line
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_policy_where_the_run_began(kind: str, tmp_path: Path) -> None:
    """Bit for bit what a frozen copy says, when the policy has gone on."""
    policy = KINDS[kind]()
    copied = scored(frozen_copy(policy))
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    made = make("dpo", policy, tmp_path)
    assert isinstance(made.reference, StartingPoint)
    made.train()
    rows = lay_flat(join(data_of("dpo")[0], ("chosen", "rejected")), made.machine.layout)
    with torch.no_grad():
        expected, now = (score(model, rows).logprobs for model in (copied, made.model))
    assert torch.equal(score(made.reference, rows).logprobs, expected)
    assert (now - expected).abs().max() > 1e-2
    assert curve_of(tmp_path)[0] == (1, "loss", pytest.approx(math.log(2), abs=1e-6))
    assert {name for name, parameter in policy.named_parameters() if parameter.requires_grad} == trained


def test_dpo_learns_what_it_learns_with_a_frozen_copy(tmp_path: Path) -> None:
    """Whose adapters have learned before; losses, gradients and evaluations bit for bit."""
    options = {"init_lora_weights": False, "modules_to_save": ["o_proj"]}
    make("dpo", with_adapters(**options), tmp_path / "start").train()
    copied = frozen_copy(with_adapters(**options))
    make("dpo", with_adapters(**options), tmp_path / "copy", ref_model=copied).train()
    found = curve_of(tmp_path / "start")
    assert found == curve_of(tmp_path / "copy")
    assert len({value for _, name, value in found if name == "loss"}) == 3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kto_in_any_precision(precision: str, tmp_path: Path) -> None:
    """NOTE: what autocast has cast in the reference's forward is not what the policy learns with."""
    policy = with_adapters(init_lora_weights=False)
    reference = frozen_copy(policy)
    for name, options in {"start": {}, "copy": {"ref_model": reference}}.items():
        model = with_adapters(init_lora_weights=False)
        make("kto", model, tmp_path / name, precision=precision, **options).train()
    found = curve_of(tmp_path / "start")
    assert found == curve_of(tmp_path / "copy") and all(value > 0 for _, name, value in found if name == "grad_norm")


def test_dpo_under_autocast_and_with_recomputed_activations(tmp_path: Path) -> None:
    options = {"precision": "bf16", "gradient_checkpointing": True}
    make("dpo", partly_frozen(), tmp_path / "start", **options).train()
    make("dpo", partly_frozen(), tmp_path / "copy", ref_model=frozen_copy(partly_frozen()), **options).train()
    found = curve_of(tmp_path / "start")
    assert found == curve_of(tmp_path / "copy") and all(value > 0 for _, name, value in found if name == "grad_norm")


@pytest.mark.parametrize("trainer", ["dpo", "kto"])
def test_the_base_is_the_policy_without_adapters(trainer: str, tmp_path: Path) -> None:
    """Of adapters that have learned before, with dropout."""
    policy = with_adapters(init_lora_weights=False, lora_dropout=0.2)
    base = copy.deepcopy(policy).base_model.unload()  # type: ignore[operator,union-attr]
    made = make(trainer, policy, tmp_path / "base", reference="base")
    made.train()
    copied = with_adapters(init_lora_weights=False, lora_dropout=0.2)
    make(trainer, copied, tmp_path / "copy", ref_model=base).train()
    expected = curve_of(tmp_path / "copy")
    assert curve_of(tmp_path / "base") == [
        (step, name, pytest.approx(value, rel=1e-6)) for step, name, value in expected
    ]
    assert not any(p.requires_grad for name, p in policy.named_parameters() if "lora" not in name)
    found, *_ = curve_of(tmp_path / "base")
    assert trainer == "kto" or abs(found[2] - math.log(2)) > 1e-3  # there is something to tell apart


class OneBatch:
    """Stands for the stream, the dataset and the builder of a run whose pairs are scored before training."""

    device = torch.device("cpu")

    def __init__(self, folder: Path) -> None:
        self.store, self.collate = SimpleNamespace(folder=folder), None
        self.how = SimpleNamespace(block_size=8, truncation="error")
        self.dataset, self.parts = self, [self]

    def score(self, model: Any, dataset: Any, collate: Any, function: Any, cache: Path) -> Any:
        with torch.no_grad():
            return cache.name, function(join(data_of("dpo")[0], ("chosen", "rejected")))


def test_a_base_that_is_scored_before_training(tmp_path: Path) -> None:
    """Its numbers have a file of their own."""
    policy, run = with_adapters(init_lora_weights=False), OneBatch(tmp_path)
    found = {}
    for which in ("start", "base"):
        precompute_reference(run, policy, run, False, which)  # type: ignore[arg-type]
        found[which] = run.ref_logps  # type: ignore[attr-defined]
    precompute_reference(run, copy.deepcopy(policy).base_model.unload(), run, False)  # type: ignore[operator,union-attr,arg-type]
    base = run.ref_logps[1]  # type: ignore[attr-defined]
    assert found["start"][0] != found["base"][0]
    assert torch.equal(found["base"][1]["chosen"], base["chosen"])
    assert (found["start"][1]["chosen"] - base["chosen"]).abs().min() > 1e-3


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (partly_frozen, {}, "reference: got 'base', .* but a Qwen3ForCausalLM has none. Expected reference: start"),
        (KINDS["pissa"], {}, "the initialisation of the adapter 'default', 'pissa', changes the base"),
        (KINDS["olora"], {}, "'olora', changes the base"),
        (lambda: with_adapters(bias="all"), {}, "the adapter 'default' trains biases of the base"),
        (KINDS["norms beside them"], {}, "parameters beside them are trained, which cannot be switched off"),
        (with_adapters, {"ref_model": partly_frozen()}, "reference: got 'base', .* and a model to compare with"),
    ],
)
def test_a_base_that_is_none_is_refused(model: Any, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make("dpo", model(), tmp_path, reference="base", **options)


def test_a_model_of_which_much_is_trained_is_copied(tmp_path: Path) -> None:
    model = partly_frozen()
    model.requires_grad_(True)
    assert not isinstance(make("dpo", model, tmp_path).reference, StartingPoint)


def test_a_run_that_goes_on_has_the_reference_of_where_it_began(tmp_path: Path) -> None:
    """Though the model that the second leg is given has other adapters: they are of another seed."""
    whole = make("dpo", with_adapters(1, init_lora_weights=False), tmp_path / "whole")
    whole.train()
    make("dpo", with_adapters(1, init_lora_weights=False), tmp_path / "cut", max_steps=2).train()
    rest = make("dpo", with_adapters(2, init_lora_weights=False), tmp_path / "cut", resume="auto")
    rest.train()
    assert curve_of(tmp_path / "cut") == curve_of(tmp_path / "whole")
    theirs = dict(whole.base_model.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in rest.base_model.named_parameters())


def test_a_single_file_holds_it_too(tmp_path: Path) -> None:
    made = make("kto", with_adapters(1, init_lora_weights=False), tmp_path / "one", max_steps=2)
    made.train()
    path = made.save_checkpoint(path=str(tmp_path / "all.pt"))
    other = make("kto", with_adapters(2, init_lora_weights=False), tmp_path / "two")
    other.load_checkpoint(path)
    assert other.evaluate() == made.evaluate()


def test_a_checkpoint_of_a_run_that_trains_other_parameters(tmp_path: Path) -> None:
    """The optimizer has both, so that only the reference tells."""
    model, other = partly_frozen(), partly_frozen()
    other.model.layers[1].self_attn.o_proj.requires_grad_(True)
    options = {"max_steps": 1, "eval_interval": None}
    make("dpo", model, tmp_path, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), **options).train()
    rest = make("dpo", other, tmp_path, optimizer=torch.optim.SGD(other.parameters(), lr=0.1), resume="auto")
    assert isinstance(rest.reference, StartingPoint)
    with pytest.raises(
        CheckpointError, match="other parameters, so that its reference does not fit: 1 missing: .*o_proj"
    ):
        rest.train()


def test_a_failure_in_its_forward_leaves_the_policy_as_it_was(tmp_path: Path) -> None:
    made = make("dpo", with_adapters(init_lora_weights=False), tmp_path)
    made.train()
    before = copy.deepcopy(made.base_model.state_dict())
    with pytest.raises(IndexError):
        made.reference(input_ids=torch.full((1, 4), 10**6))
    assert all(torch.equal(before[name], value) for name, value in made.base_model.state_dict().items())
    assert made.base_model.training


def test_what_is_trained_later_is_refused(tmp_path: Path) -> None:
    model = partly_frozen()
    made = make("dpo", model, tmp_path)
    model.model.layers[1].self_attn.o_proj.requires_grad_(True)
    with pytest.raises(
        ValueError,
        match=r"1 more are trained now, such as model.layers.1.self_attn.o_proj.weight. Expected them to be trained",
    ):
        made.train()
