"""Groups of completions with their prompt once: the numbers of repeated prompts, wherever the rows of a group stand."""

from typing import Any

import pytest
import torch

from llm_trainer.config.model import ModelConfig
from llm_trainer.layout import Layout
from llm_trainer.losses.policy import PolicyLoss, PolicyTokens
from llm_trainer.losses.sequences import Sequences
from llm_trainer.models.build import build_model
from llm_trainer.models.scored import scored
from llm_trainer.trainers.answers import Batch, lay_flat, score, share_prompts

PROMPTS = {0: 9, 1: 1, 2: 6, 3: 4}  # tokens of each group's prompt; one that has one token shares nothing
GROUPS = [2, 0, 1, 0, 3, 2, 0, 1, 0]  # of the rows; the fourth is one of its own
COMPLETIONS = [4, 7, 3, 1, 5, 2, 6, 2, 3]


def model() -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"num_key_value_heads": 1, "initializer_range": 0.3, "max_position_embeddings": 64}
    config = ModelConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, **shape)
    return scored(build_model(config))


def batch() -> Batch:
    """Padded rows with old log-probs and advantages per token; a hole in one completion, a row that is masked."""
    noise = torch.Generator().manual_seed(0)
    prompts, rows = {}, []
    for group, size in zip(GROUPS, COMPLETIONS, strict=True):
        if group not in prompts:
            prompts[group] = torch.randint(3, 64, (PROMPTS[group],), generator=noise)
        rows.append(torch.cat([prompts[group], torch.randint(3, 64, (size,), generator=noise)]))
    rows[6] = torch.cat([rows[6][:5], rows[6][6:]])  # a template has rewritten its prompt: it shares five tokens
    width = max(map(len, rows)) + 2
    ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
    mask = torch.zeros_like(ids)
    for number, (group, row) in enumerate(zip(GROUPS, rows, strict=True)):
        ids[number, : len(row)], mask[number, : len(row)] = row, 1
        begin = len(prompts[group]) - (number == 6)
        labels[number, begin : len(row)] = row[begin:]
    labels[1, 11], labels[8] = -100, -100
    numbers = {name: torch.randn(ids.shape, generator=noise) for name in ("old_logprobs", "advantages")}
    numbers["old_logprobs"] -= 4
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "group": torch.tensor(GROUPS), **numbers}


def evaluate(loss: PolicyLoss, rows: Batch) -> list[torch.Tensor]:
    """Loss, its number of terms, the sums of rows and all gradients."""
    policy, sequences = model(), Sequences.of_batch(rows)
    outputs = score(policy, rows, differentiable=True)
    losses = loss.token_losses(outputs.logprobs, PolicyTokens(rows["advantages"], rows["old_logprobs"]), sequences)
    mean = loss.mean(losses, sequences)
    mean.backward()
    gradients = [parameter.grad for parameter in policy.parameters()]
    return [mean.detach(), loss.num_terms(sequences), sequences.sum(outputs.logprobs).detach(), *gradients]


@pytest.mark.parametrize("kind", ["grpo", "gspo"])
@pytest.mark.parametrize("comes_flat", [False, True])
def test_groups_change_no_number(kind: str, comes_flat: bool) -> None:
    rows = batch()
    given = lay_flat(rows, Layout(flat=True)) if comes_flat else rows
    shared = share_prompts(given, given["group"])
    for found, expected in zip(evaluate(PolicyLoss(kind), shared), evaluate(PolicyLoss(kind), rows), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * max(1.0, float(expected.abs().max())))


def test_a_prompt_of_a_group_is_there_once() -> None:
    rows = batch()
    shared = share_prompts(rows, rows["group"])
    tokens = int(rows["attention_mask"].sum())
    # Of 9 tokens the last is repeated; row 6 has five of them; row 8, without a label, shares what is equal.
    once = (9 - 1) + 5 + 9 + (6 - 1)
    assert shared["input_ids"].numel() == tokens - once
    assert shared["repeats"].sum() == tokens
    assert shared["group"].tolist() == GROUPS
    lengths, place = shared["document_lengths"], shared["document_order"]
    assert lengths[place].tolist() == [10, 16, 4, 2, 9, 3, 9, 3, 3]


def test_the_ids_that_tokens_were_drawn_from_follow_their_tokens() -> None:
    rows = batch()
    counts = torch.arange(rows["labels"].numel()).view(rows["labels"].shape) % 3 * (rows["labels"] != -100)
    counts[8, 9:12] = 1  # a masked row, whose tokens were drawn from few ids too
    tokens = torch.arange(counts.numel())  # ids that name the token that they belong to
    rows |= {"kept_counts": counts, "kept": tokens.repeat_interleave(counts.flatten())}
    rows["names"] = tokens.view(counts.shape)
    for given in (rows, rows | {"labels": rows["labels"].index_fill(0, torch.tensor([1]), -100)}):
        shared = share_prompts(given, given["group"])
        found = shared["names"].flatten().repeat_interleave(shared["kept_counts"].flatten())
        assert torch.equal(found, shared["kept"])


def test_pairs_are_groups_of_two() -> None:
    rows = batch()
    pairs = {name: value[[1, 0, 3, 5]] for name, value in rows.items()}
    for name, value in share_prompts(pairs).items():
        assert torch.equal(value, share_prompts(pairs, torch.tensor([4, 9, 4, 9]))[name]), name
