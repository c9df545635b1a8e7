"""RewardTrainer: rewards are read at the true end, and the saved folder is one that `transformers` reads the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from llm_trainer import RewardTrainer, configure_optimizer
from llm_trainer.config.model import ModelConfig
from llm_trainer.models.build import build_model
from llm_trainer.models.rewarding import Rewarding, load_reward_model, process_reward_model, reward_model
from llm_trainer.trainers.answers import join, share_prompts

Batch = dict[str, torch.Tensor]


def tiny() -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return build_model(ModelConfig(**shape, max_position_embeddings=64))


def pairs(size: int, seed: int) -> Batch:
    """Good answers consist of the ids 40 to 63, bad ones of 3 to 39."""
    noise = torch.Generator().manual_seed(seed)
    batch: Batch = {}
    for part, low, high in (("prompt", 3, 64), ("chosen", 40, 64), ("rejected", 3, 40)):
        batch[f"{part}_input_ids"] = torch.randint(low, high, (size, 6), generator=noise)
        lengths = torch.randint(2, 7, (size, 1), generator=noise)
        batch[f"{part}_attention_mask"] = (torch.arange(6) < lengths).long()
    return batch


def test_held_out_accuracy_and_a_folder_that_transformers_reads(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = reward_model(tiny(), pad_token_id=0)
    trainer = RewardTrainer(
        model=model,
        optimizer=configure_optimizer(model=model, lr=1e-2),
        train_loader=[pairs(8, seed) for seed in range(16)],
        val_loader=[pairs(16, 99)],
        device="cpu",
        max_epochs=1,
        use_amp=False,
        save_dir=str(tmp_path),
        progress=False,
        center_coef=0.01,
    )
    before = trainer.evaluate()["eval_accuracy"]
    values = trainer.train()
    assert values["eval_accuracy"] > max(0.9, before) and values["eval_margin"] > 1
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert saved.config.num_labels == 1
    rows = join(pairs(4, 7), ("chosen", "rejected"))
    ours = Rewarding(model.eval())(rows["input_ids"], rows["attention_mask"])
    with torch.no_grad():
        theirs = saved.eval()(rows["input_ids"], attention_mask=rows["attention_mask"]).logits.squeeze(-1)
    torch.testing.assert_close(ours, theirs)


def test_rewards_are_read_by_length_also_where_padding_is_a_real_token() -> None:
    model = Rewarding(reward_model(tiny(), pad_token_id=5).eval())
    ids = torch.tensor([[9, 8, 5, 5, 5]])
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    torch.testing.assert_close(model(ids, mask), model(ids[:, :3], mask[:, :3]))
    assert (model(ids, mask) - model(ids[:, :2], mask[:, :2])).abs() > 1e-4  # not the last token other than 5


def test_margins_count_unless_they_are_ignored(tmp_path: Path) -> None:
    batch = pairs(3, 0) | {"margin": torch.full((3,), 2.0)}
    losses = []
    for use_margin in (True, False):
        model = reward_model(tiny())
        made = RewardTrainer(
            model=model,
            optimizer=configure_optimizer(model=model, lr=1e-2),
            train_loader=[batch],
            device="cpu",
            save_dir=str(tmp_path),
            use_margin=use_margin,
        )
        prepared = made._prepare_batch(batch)
        losses.append(float(made._compute_loss(made._forward(prepared), prepared).detach()))
    assert losses[0] > losses[1] + 1


@pytest.mark.parametrize("attention", ["blocked", "sdpa"])
def test_layouts_and_shared_prompts_change_no_reward(attention: str, tmp_path: Path) -> None:
    language = tiny()
    language.set_attn_implementation(attention)
    model = reward_model(language)
    rows = join(pairs(5, 0), ("chosen", "rejected"))
    mask = rows["attention_mask"].bool()
    flat = {name: rows[name][mask][None] for name in ("input_ids", "labels")}
    flat |= {"document_lengths": mask.sum(1), "position_ids": (mask.cumsum(1) - 1)[mask][None]}
    found = []
    for batch, share in ((rows, False), (flat, False), (rows, True), (flat, True)):
        made = RewardTrainer(
            model=model,
            optimizer=configure_optimizer(model=model, lr=1e-2),
            train_loader=[],
            device="cpu",
            use_amp=False,
            save_dir=str(tmp_path),
            share_prompts=share,
        )
        assert made.shares_prompts is (share and attention == "blocked")
        found.append(made._forward(made._prepare_batch(batch)))
        torch.testing.assert_close(found[-1], found[0], rtol=1e-5, atol=1e-6)
    assert share_prompts(rows)["input_ids"].numel() < flat["input_ids"].numel()


def steps(size: int, seed: int) -> Batch:
    """Three steps of four tokens behind a prompt of five; a right step consists of the ids 40 to 63, a wrong one of 3 to 39."""
    noise = torch.Generator().manual_seed(seed)
    right = torch.rand(size, 3, generator=noise) < 0.5
    low = torch.where(right, 40, 3).repeat_interleave(4, 1)
    answers = low + torch.randint(0, 24, (size, 12), generator=noise)
    ids = torch.cat([torch.randint(3, 64, (size, 5), generator=noise), answers], 1)
    labels = torch.full(ids.shape, -100.0)
    labels[:, 8::4] = right.float()
    mask = torch.ones_like(ids)
    mask[0, 13:], labels[0, 13:] = 0, -100.0
    return {"input_ids": ids, "attention_mask": mask, "step_labels": labels}


def test_steps_are_judged_and_the_folder_is_one_that_transformers_reads(tmp_path: Path) -> None:
    from transformers import AutoModelForTokenClassification

    model = process_reward_model(tiny(), pad_token_id=0)
    trainer = RewardTrainer(
        model=model,
        optimizer=configure_optimizer(model=model, lr=1e-2),
        train_loader=[steps(8, seed) for seed in range(16)],
        val_loader=[steps(16, 99)],
        device="cpu",
        max_epochs=2,
        use_amp=False,
        save_dir=str(tmp_path),
        progress=False,
    )
    assert trainer._loss_weight(steps(8, 0)) == 8 * 3 - 1
    before = trainer.evaluate()["eval_accuracy"]
    assert trainer.train()["eval_accuracy"] > 0.9 > before
    saved = AutoModelForTokenClassification.from_pretrained(tmp_path / "model").eval()
    batch = steps(4, 7)
    with torch.no_grad():
        theirs = saved(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.squeeze(-1)
        ours = trainer._forward(batch)
    judged = batch["step_labels"] != -100
    torch.testing.assert_close(ours[judged], theirs[judged])
    assert type(load_reward_model(tmp_path / "model")) is type(saved)


@pytest.mark.parametrize("scale", [None, 0.01])
def test_a_step_counts_the_same_however_the_batches_are_cut(tmp_path: Path, scale: float | None) -> None:
    whole = steps(6, 0)
    if scale is not None:
        whole["loss_weights"] = scale * torch.rand(whole["input_ids"].shape, generator=torch.Generator().manual_seed(1))
    parts = [{name: value[rows] for name, value in whole.items()} for rows in (slice(0, 1), slice(1, 6))]
    norms = []
    for batches in ([whole], parts):
        model = process_reward_model(tiny())
        made = RewardTrainer(
            model=model,
            optimizer=configure_optimizer(model=model, lr=1e-2),
            train_loader=batches,
            device="cpu",
            max_epochs=1,
            grad_accum_steps=len(batches),
            use_amp=False,
            log_interval=1,
            save_dir=str(tmp_path / str(len(batches))),
            save_interval=0,
            progress=False,
            packing="none",
        )
        torch.nn.init.constant_(made.base_model.score.weight, 0.1)
        with torch.no_grad():
            scores = made._forward(made._prepare_batch(whole))
        values = made.train()
        norms.append(values["grad_norm"])
        judged = whole["step_labels"] != -100
        weights = whole.get("loss_weights", torch.ones(judged.shape))[judged]
        losses = F.binary_cross_entropy_with_logits(scores[judged], whole["step_labels"][judged], reduction="none")
        assert values["loss"] == pytest.approx(float((weights * losses).sum() / weights.sum()), rel=1e-5)
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="is no reward model"):
        Rewarding(torch.nn.Linear(2, 1))
    model = reward_model(tiny())
    model.score = torch.nn.Linear(32, 3)
    with pytest.raises(ValueError, match="has 3 labels, expected 1"):
        Rewarding(model)
