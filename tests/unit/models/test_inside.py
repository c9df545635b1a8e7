"""What is looked for is found through everything that is put around a model, and in configurations that nest."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import VOCAB, tiny_model
from torch import nn
from transformers import AutoConfig, Qwen3VLMoeConfig

from llm_trainer.model_group import ModelGroup
from llm_trainer.models.inside import (
    adapted_model,
    context_of,
    has_adapters,
    language_config,
    model_context,
    transformers_model,
    transformers_models,
    unwrapped,
    vocab_size_of,
)
from llm_trainer.models.scored import scored

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # what peft asks of transformers

TEXT = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
    "max_position_embeddings": 40,
}  # fmt: skip
VISION = {
    "depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": 16,
    "deepstack_visual_indexes": [0],
}  # fmt: skip


def with_adapters(model: nn.Module, **options: Any) -> nn.Module:
    peft = pytest.importorskip("peft", reason="needs peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], **options))


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "itself": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),  # type: ignore[dict-item, return-value]
    "adapters": with_adapters,
    "compiled adapters": lambda model: torch.compile(with_adapters(model), backend="eager"),  # type: ignore[return-value]
    "scores": scored,
    "a group": lambda model: ModelGroup(model, {"critic": nn.Linear(2, 1)}),
    "a user's": nn.Sequential,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_model_is_found_through_what_is_around_it(wrapper: str) -> None:
    model = tiny_model()
    module = WRAPPERS[wrapper](model)
    assert transformers_model(module) is model
    assert next(transformers_models(module)) is model and model.model in transformers_models(module)
    assert (vocab_size_of(module), model_context(module)) == (VOCAB, 64)


def test_where_there_is_none_nothing_is_known() -> None:
    module = nn.Linear(2, 2)
    assert (transformers_model(module), vocab_size_of(module), model_context(module)) == (None, None, None)
    assert adapted_model(module) is module and not has_adapters(module)


def test_only_what_changes_no_number_is_taken_off() -> None:
    model = tiny_model()
    users = nn.Sequential(model)
    adapted = with_adapters(model)
    for wrapped in (adapted, torch.compile(adapted, backend="eager")):
        assert unwrapped(wrapped) is adapted and has_adapters(unwrapped(wrapped))
        assert adapted_model(wrapped) is model
    assert unwrapped(users) is users and adapted_model(users) is users
    looks_at_ids = with_adapters(tiny_model(), task_type="CAUSAL_LM", alora_invocation_tokens=[1])
    assert adapted_model(looks_at_ids) is looks_at_ids


def test_prompts_that_are_learned_stay_around_their_model() -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    options = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    prompted = peft.get_peft_model(tiny_model(), options)
    assert adapted_model(prompted) is prompted


def test_the_configuration_of_the_language_model() -> None:
    nested = Qwen3VLMoeConfig(text_config=TEXT, vision_config=VISION)
    assert language_config(nested) is nested.text_config
    assert language_config(nested).to_dict()["num_experts_per_tok"] == 2
    assert context_of(nested) == 40
    plain = tiny_model().config
    assert language_config(plain) is plain and context_of(plain) == 64
    assert context_of(AutoConfig.for_model("t5")) is None  # its positions are relative
