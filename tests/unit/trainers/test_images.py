"""Ready-made batches with images: their pixels reach the model, and what no model would read is refused by its name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_trainer import (
    DPOTrainer,
    GRPOTrainer,
    KTOTrainer,
    RewardTrainer,
    SFTTrainer,
    Trainer,
    configure_optimizer,
)
from llm_trainer.trainers.distill import Distillation, TeacherError

IMAGE, PER_IMAGE, VOCABULARY = 31, 4, 32


def llava(seed: int = 0) -> Any:
    """A tower of one layer that makes 4 tokens of 8 x 8 pixels, and a language model of one layer."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen3Config, SiglipVisionConfig

    torch.manual_seed(seed)
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    shape["num_attention_heads"] = 2
    vision = SiglipVisionConfig(**shape, image_size=8, patch_size=4, vision_use_head=False)
    text = Qwen3Config(**shape, num_key_value_heads=1, head_dim=8, vocab_size=VOCABULARY, max_position_embeddings=64)
    options = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full", "image_token_id": IMAGE}
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, **options))


def language_model() -> Any:
    from transformers import Qwen3ForCausalLM

    return Qwen3ForCausalLM(llava().config.text_config)


def ids_with_images(rows: int, length: int = 10) -> torch.Tensor:
    """`[rows, length]` with an image's tokens from position 1 on."""
    ids = torch.randint(0, IMAGE, (rows, length), generator=torch.Generator().manual_seed(1))
    ids[:, 1 : 1 + PER_IMAGE] = IMAGE
    return ids


def pixels(images: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(images, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def language_batch(seed: int = 2) -> dict[str, torch.Tensor]:
    ids = ids_with_images(2)
    labels = ids.masked_fill(ids == IMAGE, -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "pixel_values": pixels(2, seed)}


def made(kind: Any, model: Any, batch: Mapping[str, Any], folder: Path, **options: Any) -> Any:
    optimizer = configure_optimizer(model=model, lr=1e-2)
    options = {"max_epochs": 1, "use_amp": False, "progress": False, "save_interval": 0, "device": "cpu"} | options
    return kind(model=model, optimizer=optimizer, train_loader=[batch], save_dir=str(folder), **options)


def test_the_pixels_of_a_ready_made_batch_reach_the_model(tmp_path: Path) -> None:
    batch = language_batch()
    model = llava()
    with torch.no_grad():
        expected = model(**batch).loss
    logged = made(SFTTrainer, model, batch, tmp_path / "pixels").train()
    assert logged["loss"] == pytest.approx(float(expected), rel=1e-5)
    dark = made(SFTTrainer, llava(), batch | {"pixel_values": pixels(2) * 0}, tmp_path / "dark").train()
    assert abs(dark["loss"] - logged["loss"]) > 1e-4


def test_a_batch_with_images_is_neither_cut_nor_laid_flat(tmp_path: Path) -> None:
    """Only the model knows which rows images belong to."""
    batch = language_batch()
    batch["attention_mask"][1, 8:] = 0
    batch["labels"][1, 8:] = -100
    trainer = made(SFTTrainer, llava(), batch, tmp_path, packing="flat")
    assert "position_ids" not in trainer._prepare_batch(batch)
    with pytest.raises(ValueError, match=r"micro_batch_tokens: found a batch with images \(pixel_values\)"):
        made(SFTTrainer, llava(), batch, tmp_path, micro_batch_tokens=10).train()


@pytest.mark.parametrize("kind", [Trainer, SFTTrainer])
def test_what_nobody_would_read_is_named(kind: Any, tmp_path: Path) -> None:
    batch = language_batch()
    of_text = batch | {"input_ids": ids_with_images(2).clamp(max=IMAGE - 1)}
    with pytest.raises(ValueError, match=r"a batch has pixel_values, which Qwen3ForCausalLM.forward does not take"):
        made(kind, language_model(), of_text, tmp_path).train()
    with pytest.raises(
        ValueError, match=r"a batch has image_grid_thw, which LlavaForCondi.* does not take, so that nobody"
    ):
        made(kind, llava(), batch | {"image_grid_thw": torch.ones(2, 3)}, tmp_path).train()
    with pytest.raises(ValueError, match="a batch has colour, which Llava"):
        made(kind, llava(), batch | {"colour": torch.ones(2)}, tmp_path).train()


def test_what_a_class_of_the_user_reads_is_left_to_it(tmp_path: Path) -> None:
    class Weighted(SFTTrainer):
        def _compute_loss(self, outputs: Any, batch: Any) -> torch.Tensor:
            return super()._compute_loss(outputs, batch) * batch["weight"].mean()

    batch = language_batch()
    plain = made(SFTTrainer, llava(), batch, tmp_path / "plain").train()
    twice = made(Weighted, llava(), batch | {"weight": torch.full((2,), 2.0)}, tmp_path / "twice").train()
    assert twice["loss"] == pytest.approx(2 * plain["loss"])


def preference_batch() -> dict[str, torch.Tensor]:
    """Two prompts with an image each, padded on the left as prompts are; answers of text."""
    prompt = ids_with_images(2, 7)
    parts = {"prompt": prompt, "chosen": torch.tensor([[3, 4], [5, 6]]), "rejected": torch.tensor([[7, 8], [9, 2]])}
    batch = {"pixel_values": pixels(2)}
    for name, ids in parts.items():
        batch |= {f"{name}_input_ids": ids, f"{name}_attention_mask": torch.ones_like(ids)}
    return batch


def test_an_image_of_a_prompt_is_seen_before_both_answers(tmp_path: Path) -> None:
    batch, model = preference_batch(), llava()
    trainer = made(DPOTrainer, model, batch, tmp_path)
    prepared = trainer._prepare_batch(batch)
    with torch.no_grad():
        logprobs = trainer._forward(prepared).logprobs.sum(1)
        for row, name in enumerate(("chosen", "chosen", "rejected", "rejected")):
            ids = torch.cat([batch["prompt_input_ids"], batch[f"{name}_input_ids"]], 1)[row % 2][None]
            image = batch["pixel_values"][row % 2][None]
            scores = model(input_ids=ids, pixel_values=image).logits[0, -3:-1].log_softmax(-1)
            expected = scores.gather(1, ids[0, -2:, None]).sum()
            assert logprobs[row] == pytest.approx(float(expected), rel=1e-4)
    assert trainer.train()["loss"] == pytest.approx(0.6931, abs=1e-4)


def test_a_policy_with_adapters_is_compared_with_its_base_that_sees_the_same(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from llm_trainer.config.adapters import AdapterConfig
    from llm_trainer.models.adapters import adapt

    model = adapt(llava(), AdapterConfig(), [])
    values = made(DPOTrainer, model, preference_batch(), tmp_path, reference="base").train()
    assert values["loss"] == pytest.approx(0.6931, abs=1e-4) and values["grad_norm"] > 0


def test_the_images_of_judged_answers_are_seen(tmp_path: Path) -> None:
    pairs = preference_batch()
    del pairs["rejected_input_ids"], pairs["rejected_attention_mask"]
    batch = {name.replace("chosen", "completion"): value for name, value in pairs.items()}
    batch["desirable"] = torch.tensor([True, False])
    losses = [made(KTOTrainer, llava(), batch, tmp_path, max_epochs=3).train()["logps/chosen"]]
    batch["pixel_values"] = batch["pixel_values"] * 0
    losses.append(made(KTOTrainer, llava(), batch, tmp_path, max_epochs=3).train()["logps/chosen"])
    assert abs(losses[0] - losses[1]) > 1e-3


def test_a_teacher_sees_the_images_too(tmp_path: Path) -> None:
    batch, teacher = language_batch(), llava(1)
    far = made(
        SFTTrainer, llava(), batch, tmp_path / "far", kd=Distillation(kd_coef=1.0), teacher_model=teacher
    ).train()
    dark = batch | {"pixel_values": pixels(2) * 0}
    other = made(SFTTrainer, llava(), dark, tmp_path / "dark", kd=Distillation(kd_coef=1.0), teacher_model=teacher)
    assert abs(far["kd_loss"] - other.train()["kd_loss"]) > 1e-5
    same = made(SFTTrainer, llava(), batch, tmp_path / "same", kd=Distillation(kd_coef=1.0), teacher_model=llava())
    assert same.train()["kd_loss"] == pytest.approx(0.0, abs=1e-5)


def test_a_teacher_without_eyes_is_refused(tmp_path: Path) -> None:
    blind = language_model()
    kd = Distillation(kd_coef=1.0)
    with pytest.raises(TeacherError, match="pixel_values, which Qwen3ForCausalLM.forward does not take"):
        made(SFTTrainer, llava(), language_batch(), tmp_path, kd=kd, teacher_model=blind).train()
    by_ids = Distillation(kd_coef=1.0, teacher_logits_provider=lambda ids, mask: torch.zeros(*ids.shape, VOCABULARY))
    with pytest.raises(ValueError, match="teacher_logits_provider is given ids alone; found a batch with pixel_values"):
        made(SFTTrainer, llava(), language_batch(), tmp_path, kd=by_ids).train()


def test_a_reward_model_sees_the_images_of_prompts(tmp_path: Path) -> None:
    """Its numbers are those of the model that is called with pixels, and its loss that of these."""
    from llm_trainer.models.rewarding import Rewarding, reward_model

    batch, judge = preference_batch(), reward_model(llava(), pad_token_id=0)
    trainer = made(RewardTrainer, judge, batch, tmp_path / "run")
    rewards = []
    with torch.no_grad():
        for name in ("chosen", "rejected"):
            ids = torch.cat([batch["prompt_input_ids"], batch[f"{name}_input_ids"]], 1)
            rewards.append(judge(ids, pixel_values=batch["pixel_values"]).logits[:, 0])
    expected = -(rewards[0] - rewards[1]).sigmoid().log().mean()
    assert trainer.train()["loss"] == pytest.approx(float(expected), rel=1e-5)
    with torch.no_grad():
        prompts = batch["prompt_input_ids"], batch["prompt_attention_mask"]
        shown = Rewarding(judge)(*prompts, pixel_values=batch["pixel_values"])
        unlit = Rewarding(judge)(*prompts, pixel_values=batch["pixel_values"] * 0)
    assert float((shown - unlit).abs().max()) > 1e-4

    blind = reward_model(language_model(), pad_token_id=0)
    with pytest.raises(ValueError, match="a batch has pixel_values, which Qwen3Model.forward does not take"):
        made(RewardTrainer, blind, batch, tmp_path / "blind").train()


def test_whoever_reads_text_alone_says_so(tmp_path: Path) -> None:
    """Nothing is trained on silently without its pixels."""
    given = {
        "prompts": ids_with_images(2),
        "responses": torch.tensor([[3, 4], [5, 6]]),
        "rewards": torch.tensor([1.0, 0.0]),
    }
    with pytest.raises(ValueError, match="completions that come with their rewards are learned from as text; found"):
        made(GRPOTrainer, llava(), given | {"pixel_values": pixels(2)}, tmp_path / "given").train()
    prompts = {"prompts": ids_with_images(2), "pixel_values": pixels(2)}
    options: dict[str, Any] = {
        "reward_func": lambda prompts, completions, **_: [0.0] * len(prompts),
        "stop_token_ids": [1],
    }
    with pytest.raises(ValueError, match="a batch of prompts with pixel_values, which no rollout can keep"):
        made(GRPOTrainer, llava(), prompts, tmp_path / "prompts", **options).train()
