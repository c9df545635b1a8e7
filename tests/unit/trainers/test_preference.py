"""DPOTrainer: joining, one forward in any layout, the reference, the invariant before step 1, second denominators."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_trainer import DPOTrainer, configure_optimizer
from llm_trainer.config.model import ModelConfig, MoeConfig
from llm_trainer.models.build import build_model
from llm_trainer.models.frozen import same_weights
from llm_trainer.trainers.answers import as_rows, join, share_prompts, supervised
from llm_trainer.trainers.preference import StartError

Batch = dict[str, torch.Tensor]
SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def tiny(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    return build_model(ModelConfig(**SHAPE | changes))


def padded(rows: list[list[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask; the padding holds ids of real tokens, which nobody may read."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), 7), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(width - len(row), None) if left else slice(len(row))
        ids[i, where], mask[i, where] = torch.tensor(row), 1
    return ids, mask


def pairs_batch(size: int = 4, seed: int = 0, left: bool = False) -> Batch:
    """The explicit style's batch: random prompts and answers of different lengths."""
    noise = torch.Generator().manual_seed(seed)

    def rows(low: int, high: int) -> list[list[int]]:
        lengths = torch.randint(low, high, (size,), generator=noise).tolist()
        return [torch.randint(3, 64, (n,), generator=noise).tolist() for n in lengths]

    batch: Batch = {}
    for part in ("prompt", "chosen", "rejected"):
        batch[f"{part}_input_ids"], batch[f"{part}_attention_mask"] = padded(rows(2, 9), left)
    return batch


def flat_of(joined: Batch) -> Batch:
    """A padded joined batch laid end to end."""
    mask = joined["attention_mask"].bool()
    lengths = mask.sum(1)
    labels = joined["labels"].clone()
    labels[:, 0] = -100
    return {
        "input_ids": joined["input_ids"][mask][None],
        "labels": labels[mask][None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "document_lengths": lengths,
    }


def trainer(folder: Path, batches: list[Batch], model: Any = None, **options: Any) -> DPOTrainer:
    model = model or tiny()
    return DPOTrainer(
        **{
            "model": model,
            "optimizer": configure_optimizer(model=model, lr=1e-2),
            "train_loader": batches,
            "device": "cpu",
            "max_epochs": 1,
            "use_amp": False,
            "log_interval": 1,
            "save_dir": str(folder),
            "save_interval": 0,
            "progress": False,
            **options,
        }
    )


def loss_of(made: DPOTrainer, batch: Batch) -> torch.Tensor:
    made._begin_step([batch], [made._loss_weight(batch)], lambda numbers: numbers)
    prepared = made._prepare_batch(batch)
    outputs = made._forward(prepared)
    loss, added = made._compute_loss(outputs, prepared), made.regulariser.mean(outputs, counts=True)
    return loss if added is None else loss + added


def test_a_micro_batch_is_joined_once_also_where_its_step_counts_nll_terms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llm_trainer.trainers import preference

    joined: list[int] = []
    monkeypatch.setattr(preference, "join", lambda batch, sides: joined.append(id(batch)) or join(batch, sides))
    batches = [pairs_batch(seed=0), pairs_batch(seed=1)]
    how = {"grad_accum_steps": 2, "micro_batch_tokens": None}
    trainer(tmp_path, batches, loss_type={"sigmoid": 1.0, "sft": 0.5}, **how).train()
    assert sorted(joined) == sorted(map(id, batches))


def test_prompt_and_answer_are_joined_by_true_length_whatever_the_padding() -> None:
    left, right = join(pairs_batch(left=True), ("chosen", "rejected")), join(pairs_batch(), ("chosen", "rejected"))
    for name in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(left[name], right[name])
    batch = pairs_batch()
    prompt = batch["prompt_input_ids"][1][batch["prompt_attention_mask"][1].bool()]
    answer = batch["rejected_input_ids"][1][batch["rejected_attention_mask"][1].bool()]
    row, labels = right["input_ids"][5], right["labels"][5]
    assert row[: len(prompt) + len(answer)].tolist() == [*prompt.tolist(), *answer.tolist()]
    assert labels[labels != -100].tolist() == answer.tolist() and (labels[: len(prompt)] == -100).all()


def test_missing_keys_and_empty_answers_are_named() -> None:
    batch = pairs_batch()
    with pytest.raises(ValueError, match="lacks chosen_attention_mask; expected prompt_input_ids"):
        join({k: v for k, v in batch.items() if k != "chosen_attention_mask"}, ("chosen", "rejected"))
    batch["rejected_attention_mask"][2] = 0
    with pytest.raises(ValueError, match=r"1 answers without a token to learn from \(rejected of row 2\)"):
        join(batch, ("chosen", "rejected"))


@pytest.mark.parametrize(
    "options",
    [{}, {"loss_type": "orpo", "mask_prompt": False}, {"loss_type": "ld_dpo"}, {"loss_type": {"ipo": 1.0, "sft": 0.3}}],
)
def test_flat_and_padded_batches_give_the_same_loss(options: dict[str, Any], tmp_path: Path) -> None:
    joined = join(pairs_batch(), ("chosen", "rejected"))
    made = trainer(tmp_path, [], ref_model=tiny(1), **options)
    torch.testing.assert_close(loss_of(made, flat_of(joined)), loss_of(made, joined), rtol=1e-5, atol=1e-6)


def alike_batch() -> Batch:
    """Pairs whose answers begin alike, one of them behind a prompt of one token and one with an answer of one."""
    batch = pairs_batch(3)
    batch["rejected_input_ids"][:, :2] = batch["chosen_input_ids"][:, :2]
    batch["prompt_attention_mask"][0, 1:] = 0
    batch["rejected_attention_mask"][1, 1:] = 0
    return batch


def test_a_shared_prompt_is_there_once_and_nothing_else_is_lost() -> None:
    rows = join(alike_batch(), ("chosen", "rejected"))
    shared = share_prompts(rows)
    prompts = alike_batch()["prompt_attention_mask"].sum(1)
    assert shared["input_ids"].numel() == rows["attention_mask"].sum() - (prompts - 1).sum()
    assert shared["repeats"].sum() == rows["attention_mask"].sum()
    assert shared["position_ids"].max() == rows["attention_mask"].sum(1).max() - 1
    labels, wanted = (as_rows(r["labels"], r)[supervised(r)] for r in (shared, rows))
    assert torch.equal(labels, wanted)
    for name, value in share_prompts(flat_of(rows)).items():
        assert torch.equal(value, shared[name]), name


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("qwen3", {}),
        ("llama", {"loss_type": "orpo", "mask_prompt": False}),
        ("llama", {"loss_type": "ld_dpo"}),
        ("qwen3_moe", {"loss_type": {"ipo": 1.0, "sft": 0.3}, "aux_loss_coef": 0.5}),
    ],
)
def test_shared_prompts_change_no_number(architecture: str, options: dict[str, Any], tmp_path: Path) -> None:
    moe = MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    shape: dict[str, Any] = {
        "architecture": architecture,
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.3,
        "moe": moe if architecture == "qwen3_moe" else None,
    }
    model, reference = tiny(**shape), tiny(1, **shape)
    for batch in (pairs_batch(5), pairs_batch(1), alike_batch()):
        found = []
        for share in (True, False):
            made = trainer(tmp_path, [], model, ref_model=reference, share_prompts=share, **options)
            assert made.shares_prompts is share
            model.zero_grad()
            loss = loss_of(made, batch)
            loss.backward()
            found.append((loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
        torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-5 * float(found[1][1].abs().max()))


def test_prompts_are_repeated_where_attention_knows_no_branches(tmp_path: Path) -> None:
    eager = tiny()
    eager.set_attn_implementation("eager")
    assert trainer(tmp_path, []).shares_prompts
    unshared = trainer(tmp_path, [], eager)
    assert not unshared.shares_prompts and unshared._get_extra_config_info()["prompts"] == "repeated"
    assert not trainer(tmp_path, [], ref_model=eager).shares_prompts


def test_the_reference_is_a_frozen_copy_and_the_first_loss_is_ln_2(tmp_path: Path) -> None:
    batches = [pairs_batch(seed=i) for i in range(3)]
    made = trainer(tmp_path, batches, val_loader=batches)
    assert made.reference is not None
    before = tiny()
    first = loss_of(made, batches[0])
    torch.testing.assert_close(first, torch.tensor(math.log(2.0)))
    values = made.train()
    assert same_weights(made.reference.base, before) and not same_weights(made.base_model, before)
    assert not made.reference.training and not any(p.requires_grad for p in made.reference.parameters())
    assert values["eval_loss"] < math.log(2) and values["eval_rewards/accuracies"] > 0.5
    assert values["eval_rewards/margins"] > 0


def test_dropout_breaks_the_invariant_before_the_first_update(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="the log-probs differ by .* per token.*attention_dropout"):
        trainer(tmp_path, [pairs_batch()], tiny(attention_dropout=0.5)).train()
    different = trainer(tmp_path, [pairs_batch()], ref_model=tiny(1))
    assert different.train()["loss"] != pytest.approx(math.log(2), abs=1e-4)
    equal = trainer(tmp_path, [pairs_batch()], ref_model=tiny())
    assert equal._at_start and not different._at_start
    with pytest.raises(StartError, match="rewards must be 0"):
        trainer(tmp_path, [pairs_batch()], ref_model=tiny(1), starts_at_reference=True).train()


def test_the_policy_is_no_reference_of_itself(tmp_path: Path) -> None:
    model = tiny()
    with pytest.raises(ValueError, match="ref_model is the policy itself"):
        trainer(tmp_path, [], model, ref_model=model)


def test_reference_free_losses_keep_no_reference(tmp_path: Path) -> None:
    assert trainer(tmp_path, [], loss_type="simpo").reference is None
    with pytest.raises(ValueError, match="did you mean 'simpo'"):
        trainer(tmp_path, [], loss_type="simop")


def test_given_log_probs_replace_the_reference(tmp_path: Path) -> None:
    batch, reference = pairs_batch(), tiny(1)
    held = trainer(tmp_path, [], ref_model=reference)
    prepared = held._prepare_batch(batch)
    chosen, rejected = as_rows(prepared["ref_logprobs"], prepared).sum(1).chunk(2)
    given = trainer(tmp_path, [], ref_log_probs_given=True)
    assert given.reference is None
    found = loss_of(given, batch | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected})
    torch.testing.assert_close(found, loss_of(held, batch))
    with pytest.raises(ValueError, match="needs the log-probs of a reference model"):
        loss_of(given, batch)


@pytest.mark.parametrize("nll_norm", ["token", "sequence"])
def test_the_nll_term_is_a_mean_over_the_whole_step(nll_norm: str, tmp_path: Path) -> None:
    def step(batches: list[Batch]) -> float:
        made = trainer(tmp_path, batches, loss_type="cpo", nll_norm=nll_norm, grad_accum_steps=len(batches))
        return made.train()["grad_norm"]

    whole = pairs_batch(6)
    parts = [{name: value[rows] for name, value in whole.items()} for rows in (slice(0, 1), slice(1, 6))]
    assert step(parts) == pytest.approx(step([whole]), rel=1e-5)


def test_the_nll_term_can_count_the_prompt(tmp_path: Path) -> None:
    batch = pairs_batch(3)
    terms = {}
    for mask_prompt in (True, False):
        made = trainer(tmp_path, [], loss_type="orpo", mask_prompt=mask_prompt)
        loss_of(made, batch)
        terms[mask_prompt] = made._nll_terms_per_pair * 3
    assert terms[True] == batch["chosen_attention_mask"].sum()
    assert terms[False] == batch["chosen_attention_mask"].sum() + batch["prompt_attention_mask"].sum() - 3


@pytest.mark.parametrize("left", [False, True])
def test_a_token_budget_cuts_between_pairs_and_changes_no_step(left: bool, tmp_path: Path) -> None:
    batches = [pairs_batch(4, seed=i, left=left) for i in range(2)]
    norms, micro_batches = [], []
    for budget in (None, 40):
        how = {"micro_batch_tokens": budget, "packing": "none"}
        made = trainer(tmp_path, batches, tiny(), ref_model=tiny(1), grad_accum_steps=2, **how)
        micro_batches += [[m.batch for m in step] for step, _ in made.run.source.steps(0, 0)]
        norms.append(made.train()["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    assert len(micro_batches[0]) == 2 < len(micro_batches[1])
    assert sum(len(batch["prompt_input_ids"]) for batch in micro_batches[1]) == 8
    for batch in micro_batches[1]:
        rows = join(batch, ("chosen", "rejected"))["input_ids"]
        assert rows.numel() <= 40 or len(rows) == 2
    joined = [join(batch, ("chosen", "rejected")) for batch in batches]
    made = trainer(tmp_path, joined, tiny(), ref_model=tiny(1), grad_accum_steps=2, micro_batch_tokens=40)
    assert made.train()["grad_norm"] == pytest.approx(norms[0], rel=1e-5)  # a pair's rows are not beside each other
    with pytest.raises(ValueError, match="found a batch laid flat"):
        trainer(tmp_path, [flat_of(one) for one in joined], micro_batch_tokens=40).train()


def test_pairs_of_validation_stay_pairs_where_they_are_cut(tmp_path: Path) -> None:
    joined = [join(pairs_batch(4, seed=i), ("chosen", "rejected")) for i in range(2)]
    made = trainer(tmp_path, joined, tiny(), ref_model=tiny(1), val_loader=joined)
    whole = made.evaluate()
    made.run.budget.settle(40, "to see what comes of it")
    cut = [micro_batch for step, _ in made.run.val_sources[""].steps(0, 0) for micro_batch in step]
    assert len(cut) > 2 and made.evaluate() == pytest.approx(whole, rel=1e-5)


def test_bco_compares_with_the_rewards_of_earlier_steps_and_resumes_there(tmp_path: Path) -> None:
    batches = [pairs_batch(seed=i) for i in range(4)]
    whole = trainer(tmp_path / "whole", batches, loss_type="bco_pair")
    whole.train()
    total, number = whole._baseline.tolist()
    assert number == 4 * 8 and total != 0
    part = trainer(tmp_path / "part", batches, loss_type="bco_pair", max_steps=2)
    part.train()
    part.save_checkpoint(path=str(tmp_path / "part.pt"))
    rest = trainer(tmp_path / "rest", batches, loss_type="bco_pair")
    rest.load_checkpoint(str(tmp_path / "part.pt"))
    assert rest._baseline.tolist() == part._baseline.tolist() != [0.0, 0.0]
    rest.train()
    assert rest._baseline.tolist() == [total, number]
    assert same_weights(rest.base_model, whole.base_model)


def test_bco_does_not_count_what_is_only_tried_out(tmp_path: Path) -> None:
    batch = pairs_batch()
    made = trainer(tmp_path, [batch], loss_type="bco_pair")
    with made.run._metrics.recording(counts=False):  # as fillers and trials are
        loss_of(made, batch)
    assert made._new_rewards.tolist() == [0.0, 0.0]
    loss_of(made, batch)
    assert made._new_rewards[1] == 8
