"""Adapters: which layers get them, that they are peft's own, what the table says, and what is refused."""

import logging
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import flat_batch, tiny_model
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel, Qwen3Config

from llm_trainer.config.adapters import KINDS, AdapterConfig
from llm_trainer.config.errors import ConfigError
from llm_trainer.config.model import MoeConfig
from llm_trainer.models.adapter_table import AdaptersTable
from llm_trainer.models.adapters import adapt
from llm_trainer.models.scored import ScoredModel
from llm_trainer.models.targets import find_targets

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what peft imports
    peft = pytest.importorskip("peft", reason="needs peft")

# Of peft where the tests call it themselves: a name of transformers, and experts that it adds to all-linear.
pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
DENSE = ATTENTION | {"gate_proj", "up_proj", "down_proj"}


def vision_language_model() -> PreTrainedModel:
    """A tower, a projector and a language model of one layer each, all with layers called q_proj."""
    text = Qwen3Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=63))


def trained(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def layers(model: nn.Module) -> set[str]:
    """The last words of the names of what has LoRA adapters."""
    return {name.split(".lora_")[0].rpartition(".")[2] for name in trained(model)}


def loss_and_gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    batch = flat_batch()
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    loss = logits.float().log_softmax(-1).square().mean()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def shaken(model: nn.Module) -> nn.Module:
    """Adapters that do something: new ones are the identity."""
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


# They are peft's own.

LORA_KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": ({}, {}),
    "rslora": ({"rslora": True}, {"use_rslora": True}),
    "dora": ({"dora": True}, {"use_dora": True}),
    "pissa": ({"init": "pissa"}, {"init_lora_weights": "pissa"}),
    "olora": ({"init": "olora"}, {"init_lora_weights": "olora"}),
    "dropout": ({"dropout": 0.5}, {"lora_dropout": 0.5}),
}


@pytest.mark.parametrize("kind", LORA_KINDS)
def test_outputs_and_gradients_are_those_of_peft(kind: str) -> None:
    ours, theirs = LORA_KINDS[kind]
    model, other = tiny_model(), tiny_model()
    torch.manual_seed(3)
    adapted = adapt(model, AdapterConfig(rank=4, alpha=12, **ours))
    torch.manual_seed(3)
    expected = peft.get_peft_model(
        other,
        peft.LoraConfig(r=4, lora_alpha=12, target_modules=sorted(DENSE), task_type="CAUSAL_LM", **theirs),
    )
    results = []
    for each in (adapted, expected):
        shaken(each).train()
        torch.manual_seed(7)
        results.append(loss_and_gradients(each))
    (loss, gradients), (expected_loss, expected_gradients) = results
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=1e-6)
    assert gradients.keys() == expected_gradients.keys() == set(trained(adapted))
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=0, atol=1e-6)
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) > 1e-3


@pytest.mark.parametrize("kind", [*LORA_KINDS, "experts"])
def test_merged_is_unmerged(kind: str) -> None:
    ours = {"experts": True} if kind == "experts" else LORA_KINDS[kind][0]
    architecture = "qwen3_moe" if kind == "experts" else "qwen3"
    model = shaken(adapt(tiny_model(architecture=architecture), AdapterConfig(rank=4, **ours))).eval()
    ids = flat_batch()["input_ids"]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        off = deepcopy(model).unload()(input_ids=ids).logits  # type: ignore[operator]
        merged = model.merge_and_unload()(input_ids=ids).logits  # type: ignore[operator]
    torch.testing.assert_close(merged, before, rtol=0, atol=1e-5)
    assert float((before - off).abs().max()) > 1e-2


OPTIONS: dict[str, dict[str, Any]] = {
    "c3a": {"block_size": 8},
    "fourierft": {"n_frequency": 20},
    "ia3": {"feedforward_modules": ["down_proj"]},
    "miss": {"r": 4},
    "oft": {"oft_block_size": 4, "r": 0},
    "psoft": {"r": 4},
    "road": {"group_size": 16},
    "waveft": {"n_frequency": 20},
}
FEW = ("ia3", "loha", "oft", "vera")
EVERY = [pytest.param(kind, marks=[] if kind in FEW else [pytest.mark.slow]) for kind in KINDS if kind != "lora"]


@pytest.mark.parametrize("kind", EVERY)
def test_other_methods_learn_and_come_back(kind: str, tmp_path: Path) -> None:
    """Through the chunked head and rows laid flat; written, read, and merged they are what they were."""
    batch = flat_batch()
    torch.manual_seed(0)
    model = adapt(tiny_model(), AdapterConfig(kind=kind, options=OPTIONS.get(kind, {})))
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-2)
    reader = ScoredModel(model)
    losses = []
    for _ in range(4):
        loss = reader(**batch).loss_sum
        loss.backward()
        assert all(parameter.grad is not None for parameter in learned)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    model.eval()
    model.save_pretrained(tmp_path)
    again = adapt(tiny_model(), AdapterConfig(path=str(tmp_path))).eval()
    ids = batch["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert torch.equal(again(input_ids=ids).logits, expected)
        merged = model.merge_and_unload()(input_ids=ids).logits  # type: ignore[operator]
    torch.testing.assert_close(merged, expected, rtol=0, atol=2e-5)


def test_new_adapters_change_nothing_yet() -> None:
    ids = flat_batch()["input_ids"]
    model = tiny_model().eval()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        for init in ("default", "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora"):
            adapted = adapt(deepcopy(model), AdapterConfig(rank=4, init=init)).eval()
            torch.testing.assert_close(adapted(input_ids=ids).logits, before, rtol=0, atol=2e-5)


def test_an_empty_model_gets_empty_adapters() -> None:
    """Where FSDP takes all weights from another process."""
    with torch.device("meta"):
        empty = tiny_model()
    for options in ({}, {"init": "pissa"}, {"dora": True}):
        adapted = adapt(deepcopy(empty), AdapterConfig(rank=4, **options))
        assert all(parameter.is_meta for parameter in adapted.parameters()) and trained(adapted)


# Which layers.


def test_a_vision_tower_is_not_trained_unless_it_is_named() -> None:
    with_peft = peft.get_peft_model(vision_language_model(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert any("vision_tower" in name for name in trained(with_peft))  # what this is about
    for target in ("all-linear", ["q_proj"], r".*\.q_proj"):
        adapted = adapt(vision_language_model(), AdapterConfig(rank=2, target=target))
        assert trained(adapted) and all("language_model" in name for name in trained(adapted))
    tower = adapt(vision_language_model(), AdapterConfig(rank=2, target=["q_proj"], parts=["vision_tower"]))
    assert trained(tower) and all("vision_tower" in name for name in trained(tower))
    parts = ["language_model", "multi_modal_projector"]
    both = adapt(vision_language_model(), AdapterConfig(rank=2, parts=parts))
    assert any("projector" in name for name in trained(both)) and not any("tower" in name for name in trained(both))


def test_routers_are_not_trained_unless_they_are_named() -> None:
    with_peft = peft.get_peft_model(
        tiny_model(architecture="qwen3_moe"), peft.LoraConfig(r=2, target_modules="all-linear")
    )
    assert any(".gate." in name for name in trained(with_peft))  # what this is about
    for options in ({}, {"experts": True}, {"target": r"model\.layers\..*"}):
        if options.get("target"):
            options["target"] = r"model\.layers\.\d\.(self_attn\.._proj|mlp\..*)"
        adapted = adapt(tiny_model(architecture="qwen3_moe"), AdapterConfig(rank=2, **options))  # type: ignore[arg-type]
        assert trained(adapted) and not any(".gate." in name for name in trained(adapted))
    named = adapt(tiny_model(architecture="qwen3_moe"), AdapterConfig(rank=2, target=["gate"]))
    assert layers(named) == {"gate"}
    _, gradients = loss_and_gradients(shaken(named))
    assert all(gradient.abs().max() > 0 for gradient in gradients.values()) and len(gradients) == 4


def test_experts_are_reached_when_they_are_wanted() -> None:
    assert layers(adapt(tiny_model(architecture="qwen3_moe"), AdapterConfig(rank=2))) == ATTENTION
    reached = adapt(tiny_model(architecture="qwen3_moe"), AdapterConfig(rank=2, experts=True))
    experts = [name for name in trained(reached) if ".experts." in name]
    assert len(experts) == 8  # A and B of two matrices in two layers
    assert reached.get_parameter(experts[0]).shape[0] == 4 * 2  # rows of all four experts
    only = adapt(tiny_model(architecture="qwen3_moe"), AdapterConfig(rank=2, target=["q_proj"], experts=True))
    assert {"q_proj", "experts"} >= {name.split(".")[-4] for name in trained(only)} - {"base_layer"}


def test_layers_beside_experts_that_peft_takes_for_them_are_left_as_they_are() -> None:
    """Shared experts, and layers without experts, have the names that experts had once: opened, they would be others."""
    moe = MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, num_dense_layers=1)
    for architecture in ("glm4_moe", "qwen3_moe"):
        assert layers(adapt(tiny_model(architecture=architecture, moe=moe), AdapterConfig(rank=2))) == ATTENTION
    model = tiny_model(architecture="glm4_moe")
    with pytest.raises(ValueError, match=r"takes up_proj of a Glm4MoeForCausalLM for its experts, though the layers"):
        adapt(model, AdapterConfig(rank=2, target=["q_proj", "up_proj"]))
    reached = adapt(model, AdapterConfig(rank=2, experts=True))
    assert not any("shared" in name or ".gate." in name for name in trained(reached))
    assert sum(".experts." in name for name in trained(reached)) == 8


def test_targets_in_all_three_forms() -> None:
    model = tiny_model()
    assert layers(adapt(deepcopy(model), AdapterConfig(rank=2))) == DENSE  # not the head
    assert layers(adapt(deepcopy(model), AdapterConfig(rank=2, target=["self_attn.q_proj", "down_proj"]))) == {
        "q_proj",
        "down_proj",
    }
    last = adapt(deepcopy(model), AdapterConfig(rank=2, target=r"model\.layers\.1\..*_proj"))
    assert layers(last) == DENSE and not any(".layers.0." in name for name in trained(last))
    untied = tiny_model(tie_word_embeddings=False)
    assert layers(adapt(untied, AdapterConfig(rank=2, target=["lm_head"]))) == {"lm_head"}
    whole = adapt(deepcopy(model), AdapterConfig(rank=2, target=["q_proj"], modules_to_save=["model.norm"]))
    assert [name for name in trained(whole) if "lora" not in name] == [
        "base_model.model.model.norm.modules_to_save.default.weight"
    ]


def test_layers_are_found_alike_in_a_module_that_transformers_does_not_know() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    assert find_targets(model, AdapterConfig(rank=2)).modules == ["0", "2"]


# The table.


def test_the_table_counts_every_parameter_once() -> None:
    model = tiny_model(architecture="qwen3_moe")
    total = sum(parameter.numel() for parameter in model.parameters())
    adapted = adapt(model, AdapterConfig(rank=2, experts=True, target=["q_proj"]))
    table = AdaptersTable.of(adapted)
    rows = {row.kind: row for row in table.rows}
    new = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert sum(row.parameters for row in table.rows) == total + new and sum(row.trained for row in table.rows) == new
    assert (rows["Linear"].found, rows["Linear"].adapted) == (8, 2)  # q, k, v, o of two layers; q of each
    assert rows["Linear"].trained == 2 * 2 * (32 + 32)
    assert (rows["Qwen3MoeExperts"].found, rows["Qwen3MoeExperts"].adapted) == (2, 2)
    assert rows["Qwen3MoeTopKRouter"].trained == 0
    first, header, *lines = table.lines()
    assert first == "lora of rank 2, alpha 4" and header.split()[-1] == "share"
    assert len({len(line) for line in lines}) == 1


def test_the_table_has_a_row_for_each_part() -> None:
    table = AdaptersTable.of(adapt(vision_language_model(), AdapterConfig(rank=2, target=["q_proj"])))
    by_part = {}
    for row in table.rows:
        by_part.setdefault(row.part, []).append(row.trained)
    assert by_part.keys() == {"vision_tower", "multi_modal_projector", "language_model"}
    assert sum(by_part["vision_tower"]) == 0 and sum(by_part["language_model"]) == 2 * (16 + 16)


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"kind": "prefix_tuning"},
            "kind: prefix_tuning adds to the prompt in peft's own forward.*expected one of lora",
        ),
        ({"kind": "prompt_tuning"}, "kind: prompt_tuning adds to the prompt"),
        ({"kind": "p_tuning"}, "kind: p_tuning adds to the prompt"),
        ({"kind": "adalora"}, "kind: adalora wants to be told of every step"),
        (
            {"kind": "vera", "rank": 4},
            "rank: got 4 beside kind: vera: an option of lora; vera has its own, write options",
        ),
        ({"kind": "Lora"}, "kind: got 'Lora', expected one of lora"),
        (
            {"experts": True, "dropout": 0.1},
            "dropout: got 0.1 beside experts: True: adapters of fused experts are mult",
        ),
        ({"experts": True, "dora": True}, "dora: got True beside experts"),
        ({"experts": True, "init": "pissa"}, "init: got 'pissa' beside experts"),
        (
            {"init": "corda"},
            "init: corda needs the covariance of every layer's inputs.*expected default, gaussian.*eva",
        ),
        ({"init": "eva", "parts": ["visual"]}, r"parts: got \['visual'\] beside init: eva: it was tried out on layers"),
        (
            {"init": "lora_ga", "dora": True},
            "dora: got True beside init: lora_ga: lengths are those of the weights before",
        ),
        (
            {"init": "zeros"},
            "init: got 'zeros', expected default, gaussian, orthogonal, pissa, olora, eva, lora_ga, or pissa_niter_N",
        ),
        ({"target": []}, r"target: got an empty list, expected ends of names such as \[q_proj\], or all-linear"),
        ({"parts": []}, "parts: got an empty list"),
        ({"path": "folder", "rank": 4}, "rank: got 4 beside path: folder: the folder says it; remove it"),
        ({"rank": 0}, "rank: got 0, expected an integer of at least 1"),
    ],
)
def test_a_section_that_cannot_be_meant(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdapterConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": ["qproj"]}, r"target: \['qproj'\] matches no layer of this Qwen3ForCausalLM; did you mean q_proj"),
        ({"target": "q_proj"}, r"matches no layer.*a regular expression matches whole names.*target: \[q_proj\]"),
        ({"target": ["xyz"]}, "matches no layer.*expected ends of names: q_proj, k_proj"),
        ({"experts": True}, "experts: found no experts in language_model; expected false"),
        ({"parts": ["visual"]}, "parts: got 'visual', and this model has language_model"),
        (
            {"rank": 17, "init": "eva"},
            "rank: got 17, and init: eva looks for twice as many directions.*expected at most 16",
        ),
        ({"rank": 33}, r"rank: got 33, but model.layers.0.self_attn.q_proj.weight is \[32, 32\]; expected at most 32"),
        ({"kind": "vera", "options": {"rr": 1}}, "vera has no 'rr'; did you mean r\\? known: .*vera_dropout"),
        ({"kind": "oft", "options": {"r": 8, "oft_block_size": 4}}, "peft's oft refuses: "),
        ({"options": {"lora_alpha": 3}}, "options: lora_alpha is adapter_config.alpha; write it there"),
        (
            {"options": {"rank_patern": {}}},
            "lora has no 'rank_patern'; did you mean rank_pattern.*known: alpha_pattern",
        ),
        ({"options": {"eva_config": {}}}, "lora has no 'eva_config'"),
        ({"target": ["embed_tokens"]}, "model.embed_tokens has the weights of lm_head, to which they are tied"),
        ({"modules_to_save": ["lm_head"]}, "lm_head has the weights of model.embed_tokens, to which they are tied"),
        ({"modules_to_save": ["heads"]}, "modules_to_save: heads matches no module of this Qwen3ForCausalLM"),
    ],
)
def test_adapters_that_this_model_cannot_have(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapt(tiny_model(), AdapterConfig(**options))


def test_a_target_in_a_part_that_is_not_trained() -> None:
    with pytest.raises(
        ValueError, match=r"\['fc1'\] is found in vision_tower, which is not.*or parts: \[vision_tower\]"
    ):
        adapt(vision_language_model(), AdapterConfig(target=["fc1"]))


def test_fused_experts_are_no_layers() -> None:
    with pytest.raises(ValueError, match="the experts of this model are fused, which experts: true reaches"):
        adapt(tiny_model(architecture="qwen3_moe"), AdapterConfig(rank=2, target=["gate_proj"]))


def test_a_model_with_an_adapter_gets_no_second_one() -> None:
    model = adapt(tiny_model(), AdapterConfig(rank=2))
    with pytest.raises(ValueError, match="has an adapter called default already; expected a model without any"):
        adapt(model, AdapterConfig(rank=2))


def test_without_peft_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ConfigError, match="adapter_config needs the package peft.*pip install peft, or leave the sect"):
        adapt(tiny_model(), AdapterConfig())


def test_what_bitsandbytes_says_of_kernels_is_not_heard() -> None:
    """peft imports it where it is installed, and on some CPUs it then advises another package for inference."""
    adapt(tiny_model(), AdapterConfig())
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)


# Going on.


def test_an_adapter_in_a_folder_is_trained_on(tmp_path: Path) -> None:
    begun = shaken(adapt(tiny_model(), AdapterConfig(rank=4, target=["q_proj"], modules_to_save=["model.norm"])))
    begun.save_pretrained(tmp_path)
    continued = adapt(tiny_model(), AdapterConfig(path=str(tmp_path)))
    assert trained(continued) == trained(begun)
    for (name, ours), theirs in zip(continued.named_parameters(), begun.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    adapt(tiny_model(), AdapterConfig(rank=4)).save_pretrained(tmp_path)
    for other in (tiny_model(hidden_size=64), tiny_model(num_hidden_layers=1), tiny_model(architecture="qwen3_moe")):
        with pytest.raises(ValueError, match="(?s)does not fit this Qwen3.*Expected the model that it was trained on"):
            adapt(other, AdapterConfig(path=str(tmp_path)))
    with pytest.raises(ValueError, match="path: found no adapter_config.json in .*nowhere; expected a PEFT folder"):
        adapt(tiny_model(), AdapterConfig(path=str(tmp_path / "nowhere")))
