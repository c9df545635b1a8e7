"""Reward models on the bodies of models that see: every named family, its layouts, there and back, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tiny_vlm
from torch import nn
from vision_families import FAMILIES, family_model
from vision_rows import flat, gradients, images, padded

from llm_trainer.checkpoint.weights import write_model
from llm_trainer.models import seeing
from llm_trainer.models.attention import resolve_attention
from llm_trainer.models.critic import ActorCritic, critic_of
from llm_trainer.models.packing import packing_of
from llm_trainer.models.pretrained import Kind, find_pretrained
from llm_trainer.models.rewarding import (
    Judge,
    Rewarding,
    StepJudge,
    load_reward_model,
    process_reward_model,
    reward_model,
)
from llm_trainer.models.scored import scored
from llm_trainer.models.seeing import may_be_shown_images

CPU = torch.device("cpu")
NOT_PACKED = ("gemma3",)

resolve_attention("blocked")


def inputs_of(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "labels"}


@pytest.mark.parametrize("name", FAMILIES)
def test_rewards_with_images_are_the_models_own_padded_flat_and_opened_again(name: str, tmp_path: Path) -> None:
    base = family_model(name)
    base.config.text_config.initializer_range = 0.3
    model: Any = reward_model(base, pad_token_id=0).eval()
    language_name = type(base).__name__
    assert type(model).__name__ == language_name.replace("ForConditionalGeneration", "ForSequenceClassification")
    ours = Rewarding(model)
    shown = images(ours)
    each = int(shown.lengths[0])
    batch = padded(each)

    # 1. what transformers' own forward says of each row alone, with the pixels of its images
    rewards = ours(**inputs_of(batch), images=shown)
    alone, first = [], 0
    for ids, mask, count in zip(batch["input_ids"], batch["attention_mask"], shown.counts.tolist(), strict=True):
        ids = ids[mask.bool()][None]
        here = shown.order[first : first + count]
        first += count
        given: dict[str, Any] = {}
        if count:
            given = ours.vision.inputs(ids, ours.vision.encode(of_order(shown, here)))
        alone.append(model(ids, **given).logits[0, 0])
    torch.testing.assert_close(rewards, torch.stack(alone), rtol=1e-4, atol=1e-5)
    assert float(rewards.detach().std()) > 1e-2

    # 2. laid flat, with their gradients
    (rewards * torch.tensor([1.0, -2.0, 3.0])).sum().backward()
    expected = gradients(model)
    fault = packing_of(model, Rewarding, CPU).fault
    if name in NOT_PACKED:
        assert "with images, a document laid behind another is scored otherwise than alone" in fault
    else:
        assert fault == ""
        laid = ours(**inputs_of(flat(each)), images=shown)
        torch.testing.assert_close(laid, rewards, rtol=1e-4, atol=1e-5)
        (laid * torch.tensor([1.0, -2.0, 3.0])).sum().backward()
        assert (gradients(model) - expected).norm() < 1e-4 * expected.norm()

    # 3. there and back
    write_model(model, tmp_path)
    assert find_pretrained(tmp_path).kind is Kind.ANSWER_REWARD_MODEL
    opened = load_reward_model(tmp_path, "blocked")
    assert type(opened) is type(model)
    for key, tensor in model.state_dict().items():
        assert torch.equal(opened.state_dict()[key], tensor), key


def of_order(shown: Any, order: torch.Tensor) -> Any:
    """Some uses of images, each by itself."""
    from dataclasses import replace

    return replace(shown, order=order, counts=torch.tensor([len(order)]))


def test_each_distinct_image_is_encoded_once_and_text_alone_runs_the_tower() -> None:
    model = reward_model(tiny_vlm(), pad_token_id=0)
    ours = Rewarding(model)
    seen: list[int] = []
    shown = images(ours)
    ours.vision.model.vision_tower.register_forward_hook(lambda module, args, output: seen.append(len(output[0])))
    ours(**inputs_of(padded(4)), images=shown)
    assert seen == [2]  # of three uses
    text = {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.ones(1, 3)}
    plain = ours(**text)
    assert seen == [2]
    ours.with_images = True
    again = ours(**text)
    assert seen == [2, 1] and torch.equal(plain, again)
    again.sum().backward()
    assert all(float(p.grad.abs().max()) == 0.0 for p in ours.vision.model.multi_modal_projector.parameters())


def test_a_judge_is_shown_images() -> None:
    """Whatever judges what a policy writes: a model of transformers, or a module that takes them."""
    ours = Rewarding(reward_model(tiny_vlm(), pad_token_id=0).eval())
    shown, batch = images(ours), inputs_of(padded(4))
    judge = Judge(reward_model(tiny_vlm(), pad_token_id=0).eval())
    judge.load_state_dict({f"model.{name}": value for name, value in ours.state_dict().items()})
    rewards = judge(**batch, images=shown)
    assert torch.equal(rewards, ours(**batch, images=shown))
    other = judge(**batch, images=of_order(shown, 1 - shown.order))
    assert float((rewards - other).detach().abs().max()) > 1e-4

    class Own(nn.Module):
        def forward(self, input_ids: Any, attention_mask: Any, images: Any) -> torch.Tensor:
            return images.counts.float()

    assert Judge(Own())(**batch, images=shown).tolist() == [2.0, 1.0, 0.0]


@pytest.mark.parametrize(("on_policy", "expected"), [(True, 1), (False, 2)])
def test_policy_and_critic_that_see_have_their_language_models_compiled(
    on_policy: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their towers and what puts images among tokens run plain; the numbers are the same."""
    asked: list[Any] = []

    def compiled(function: Any, **options: Any) -> Any:
        asked.append(function)

        def call(*args: Any, **kwargs: Any) -> Any:
            asked.append("called")
            return function(*args, **kwargs)

        return call

    policy = tiny_vlm()
    together = ActorCritic(scored(policy), critic_of(policy, on_policy=on_policy))
    shown = images(together.policy)
    before = together(**padded(4), images=shown)
    monkeypatch.setattr(seeing, "compiled", compiled)
    together.compile(dynamic=True)
    decoders = [function.__self__ for function in asked]
    assert decoders[0] is policy.model.language_model and len(decoders) == expected
    after = together(**padded(4), images=shown)
    assert asked.count("called") == expected
    assert torch.equal(after.values, before.values) and torch.equal(after.logprobs, before.logprobs)
    other = together(**padded(4), images=of_order(shown, 1 - shown.order))
    assert float((other.values - after.values).detach().abs().max()) > 1e-4


@pytest.mark.parametrize("of_steps", [False, True])
def test_a_judge_with_adapters_sees(of_steps: bool) -> None:
    """Given as an object: what its adapters add is there, and it is no module of the user's."""
    pytest.importorskip("peft")
    from llm_trainer.config.adapters import AdapterConfig
    from llm_trainer.models.adapters import adapt

    make = process_reward_model if of_steps else reward_model
    adapted = adapt(make(tiny_vlm(), pad_token_id=0), AdapterConfig(), []).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    judge: Any = StepJudge(adapted) if of_steps else Judge(adapted)
    assert may_be_shown_images(judge.model)
    shown, batch = images(judge.model), inputs_of(padded(4))
    with torch.no_grad():
        found = judge(**batch, images=shown)
        rewards = Rewarding(adapted)(**batch, images=shown, every_token=of_steps)
        with adapted.disable_adapter():
            plain = judge(**batch, images=shown)
    torch.testing.assert_close(found, rewards.sigmoid() if of_steps else rewards)
    assert float((found - plain).abs().max()) > 1e-3


def test_steps_are_judged_on_the_same_bodies(tmp_path: Path) -> None:
    model = process_reward_model(tiny_vlm(), pad_token_id=0).eval()
    assert type(model).__name__ == "LlavaForTokenClassification"
    ours = Rewarding(model)
    scores = ours(**inputs_of(padded(4)), images=images(ours), every_token=True)
    assert scores.shape == padded(4)["input_ids"].shape
    write_model(model, tmp_path)
    assert find_pretrained(tmp_path).kind is Kind.STEP_REWARD_MODEL
    again = Rewarding(load_reward_model(tmp_path, "blocked").eval())
    assert torch.equal(again(**inputs_of(padded(4)), images=images(again), every_token=True), scores)


def test_images_for_a_reward_model_that_reads_text_are_an_error() -> None:
    shown = images(Rewarding(reward_model(tiny_vlm(), pad_token_id=0)))
    blind = Rewarding(reward_model(tiny_model(), pad_token_id=0))
    with pytest.raises(ValueError, match="expected a vision-language model"):
        blind(**inputs_of(padded(4)), images=shown)
