"""Whether a model keeps documents of a row apart is tried out on it."""

import random

import numpy as np
import pytest
import torch
from tiny_models import tiny_config, tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, LlamaConfig, MambaConfig

from llm_trainer.layout import Packing
from llm_trainer.models.build import build_model
from llm_trainer.models.packing import packing_of
from llm_trainer.models.rewarding import Rewarding, reward_model
from llm_trainer.models.scored import ScoredModel

CPU = torch.device("cpu")


class Own(nn.Module):
    """Attention of the user's own over everything before; `given` is what its forward takes beside ids."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16)

    def mixed(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        return self.head(hidden.cumsum(1))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.mixed(input_ids)


class TakesAnything(Own):
    def forward(self, input_ids: Tensor, **ignored: object) -> Tensor:
        return self.mixed(input_ids)


class Fails(Own):
    def forward(self, input_ids: Tensor, **ignored: object) -> Tensor:
        raise RuntimeError("out of tune; see the manual")


class Counts(Own):
    """Counts its calls, and draws by itself."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, input_ids: Tensor, **ignored: object) -> Tensor:
        self.calls += 1
        return self.mixed(input_ids) + 0 * (random.random() + np.random.random() + torch.rand(()))


class Bigrams(Own):
    def forward(self, input_ids: Tensor, **ignored: object) -> Tensor:
        return self.head(self.embed(input_ids))


@pytest.mark.parametrize("attention", ["blocked", "sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["qwen3", "llama", "qwen3_moe", "glm4_moe"])
def test_our_models_keep_documents_apart(architecture: str, attention: str) -> None:
    found = packing_of(tiny_model(attention, architecture), ScoredModel, CPU)
    assert found == Packing("", 0 if attention == "blocked" else 32)


@pytest.mark.parametrize("attention", ["blocked", "sdpa"])
def test_in_bf16_too(attention: str) -> None:
    model = tiny_model(attention)
    with torch.autocast("cpu", torch.bfloat16):
        assert packing_of(model, ScoredModel, CPU).fault == ""


def test_a_reward_model_keeps_them_apart() -> None:
    assert packing_of(reward_model(tiny_model()), Rewarding, CPU) == Packing()


def test_a_window_of_attention_changes_nothing() -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    assert packing_of(AutoModelForCausalLM.from_config(config), ScoredModel, CPU).fault == ""
    assert packing_of(build_model(tiny_config(), attention="sdpa"), ScoredModel, CPU).fault == ""


@pytest.mark.parametrize(
    ("model", "fault"),
    [
        (Own(), "Own: its forward takes no position_ids"),
        (TakesAnything(), "TakesAnything: a document laid behind another is scored otherwise than alone, by "),
        (Fails(), "Fails: it cannot be tried: RuntimeError: out of tune"),
        (Bigrams(), "Bigrams: whether documents in one row see each other does not show in its numbers"),
        (nn.Sequential(Bigrams(), nn.BatchNorm1d(4)), "Sequential: its BatchNorm sees padding as well"),
        (nn.Linear(2, 2), "Linear: its forward takes no position_ids"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_wrong_is_said(model: nn.Module, fault: str) -> None:
    found = packing_of(model, ScoredModel, CPU).fault
    assert found.startswith(fault) and "\n" not in found


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize(
    ("config", "keeps_apart"),
    [
        (GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, bos_token_id=1, eos_token_id=1), True),
        (BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=64), False),  # counts positions by its mask
    ],
    ids=["gpt2", "bloom"],
)
def test_others_are_tried_with_weights_or_without(config: object, keeps_apart: bool, empty: bool) -> None:
    with torch.device("meta" if empty else "cpu"):
        model = AutoModelForCausalLM.from_config(config)
    assert (packing_of(model, ScoredModel, CPU).fault == "") == keeps_apart


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # what peft asks of transformers
def test_adapters_on_a_model_without_weights_are_tried_by_a_sibling_of_it() -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    options = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    model = peft.get_peft_model(
        build_model(tiny_config(tie_word_embeddings=False), attention="sdpa", empty=True), options
    )
    assert packing_of(model, ScoredModel, CPU).fault == ""
    assert ScoredModel(model).whole_logits == ""


def test_a_state_that_goes_on_into_the_next_document_shows() -> None:
    config = MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64)
    assert "scored otherwise than alone" in packing_of(AutoModelForCausalLM.from_config(config), ScoredModel, CPU).fault


@pytest.mark.parametrize("empty", [False, True])
def test_the_model_and_the_noise_stay_as_they_are(empty: bool) -> None:
    model = build_model(tiny_config(), attention="sdpa", empty=empty)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    noise = torch.get_rng_state()
    packing_of(model, ScoredModel, CPU)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), noise)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_a_model_counts_and_draws_by_itself_stays_as_it_was() -> None:
    model = Counts()
    noise = [random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()]
    assert packing_of(model, ScoredModel, CPU).fault and model.calls == 0
    assert [random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()] == noise
