"""Completions that the user gives, beside their prompts: joined into rows, and which rows are a group.

Letters: `B` rows, `P` positions of prompts, `L` of completions, `T` of both together.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llm_trainer.config.reinforcement import GRPOConfig
from llm_trainer.image_batch import require_text
from llm_trainer.losses.advantages import Advantages, level_share, weighted_rewards
from llm_trainer.models.inside import language_config, transformers_model
from llm_trainer.trainers.answers import IGNORE, OF_TOKENS, Batch, compact

_PROMPTS, _RESPONSES = ("prompts", "input_ids"), "responses"
MOST_LOGPROB = 0.01  # 0, and what rounding adds to it
# Options that do nothing without rollouts, and what they are where they are left out.
OF_ROLLOUTS = {
    "ref_sync_steps": None,
    "grpo_steps": 1,
    "rows_per_update": None,
    "max_resamplings": 0,
    "overlong": "train",
}


def is_given(batch: Any) -> bool:
    """Whether a batch carries the completions to learn from, which are not joined to their prompts yet."""
    return isinstance(batch, dict) and _RESPONSES in batch


def refuse_of_rollouts(how: GRPOConfig) -> None:
    """
    Raises:
        ValueError: an option is of rollouts, and there are none.
    """
    for name, unset in OF_ROLLOUTS.items():
        value = getattr(how, name)
        if value != unset:
            raise ValueError(
                f"{name}: got {value}, but nothing makes rollouts, since nothing judges completions: those that batches carry "
                f"are learned from as they come. Expected a reward_func (or reward_model), or leave {name} out; more epochs "
                f"(max_epochs) take the batches again"
            )


def join_responses(batch: Batch, pad_id: int | None, pad_ends: bool = False) -> Batch:
    """Prompts and completions as rows, by their true lengths, whatever side they were padded on.

    Args:
        batch: `prompts [B, P]` (or `input_ids`), `responses [B, L]`, perhaps `prompt_attention_mask` and
            `response_attention_mask`; `rewards [B]` or `[B, F]`, or `advantages [B]` or `[B, L]`; perhaps `old_logprobs`,
            `ref_logprobs` and `sampled_logprobs`, of each token `[B, L]` or summed over the completion `[B]`.
        pad_id: without masks, what stands at either end of a prompt and behind a completion is padding; None: nothing is.
        pad_ends: it is also the token that ends a completion, so that the first one behind it is no padding.

    Returns:
        `input_ids`, `labels`, `attention_mask` and what there is per token, all `[B, T]`, padded on the right (numbers of
        a token stand where it stands); `rewards [B, F]`; `prompt_keys [B]`, equal where prompts are.

    Raises:
        ValueError: a key is missing, or a shape is not what it should be.
    """
    require_text(batch, "completions that come with their rewards are learned from as text")
    prompts, responses = _tokens(batch)
    prompt_mask = _mask_of(batch, "prompt_attention_mask", prompts)
    response_mask = mask_of_responses(batch, responses, pad_id, pad_ends)
    if prompt_mask is None:
        prompt_mask = _without_padding(prompts, pad_id) & _without_padding(prompts.flip(1), pad_id).flip(1)
    _require_prompts(prompt_mask)
    mask = torch.cat([prompt_mask, response_mask], 1)
    columns = {
        "input_ids": torch.cat([prompts, responses], 1),
        "labels": torch.cat([torch.full_like(prompts, IGNORE), responses], 1),
    }
    for name in OF_TOKENS:
        if name in batch:
            numbers = per_token(name, batch[name], response_mask)
            columns[name] = torch.cat([torch.zeros(prompts.shape, dtype=numbers.dtype), numbers], 1)
    rows = compact(columns, mask)
    if "old_logprobs" in batch and batch["old_logprobs"].dim() == 1:
        rows["has_sums"] = torch.ones(len(prompts))  # of whole completions: there is no ratio of a token
    if "rewards" in batch:
        rows["rewards"] = _rewards(batch["rewards"], len(prompts))
        has_none = rows["rewards"].isnan().all(1, keepdim=True)
        rows["labels"] = rows["labels"].masked_fill(has_none, IGNORE)
    keys = [_key_of(row[present]) for row, present in zip(prompts, prompt_mask, strict=True)]
    rows["prompt_keys"] = torch.tensor(keys)
    return rows


def as_table(name: str, values: Any) -> Tensor:
    """What came with responses, as a tensor; ids are integers.

    Raises:
        ValueError: they are no numbers, or numbers that are no ids.
    """
    try:
        table = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: found no numbers ({error}); expected a tensor, or lists of one length") from None
    if name in (*_PROMPTS, _RESPONSES) and table.is_floating_point() and table.numel():
        raise ValueError(
            f"{name}: found {table.dtype} of the shape {tuple(table.shape)}; expected integers, the ids of tokens"
        )
    return table


def check_rewards(rewards: Tensor) -> Tensor:
    """
    Raises:
        ValueError: one that came with a response is infinite.
    """
    if rewards.isinf().any():
        raise ValueError(
            "rewards: found an infinite one beside a response; expected finite numbers, NaN where there is none"
        )
    return rewards


def _tokens(batch: Batch) -> tuple[Tensor, Tensor]:
    """`prompts [B, P]`, `responses [B, L]`."""
    name = next((key for key in _PROMPTS if key in batch), None)
    if name is None or not ("rewards" in batch or "advantages" in batch):
        raise ValueError(
            f"a batch with the keys {', '.join(batch)}: expected prompts [B, P] (or input_ids), responses [B, L], and rewards "
            f"[B] (or advantages); leave responses out and give a reward_func, and completions are sampled"
        )
    prompts, responses = as_table(name, batch[name]).cpu(), as_table(_RESPONSES, batch[_RESPONSES]).cpu()
    if prompts.dim() != 2 or responses.dim() != 2 or len(prompts) != len(responses):
        raise ValueError(
            f"{name} {tuple(prompts.shape)} and responses {tuple(responses.shape)}: expected [B, P] and [B, L], a prompt for "
            f"each response; repeat a prompt for every completion of its group"
        )
    return prompts.long(), responses.long()


def mask_of_responses(batch: Batch, responses: Tensor, pad_id: int | None, pad_ends: bool) -> Tensor:
    """Bool, as `responses [B, L]`: what is no padding; the batch says it, or `pad_id` and `pad_ends` do (`join_responses`)."""
    given = _mask_of(batch, "response_attention_mask", responses)
    if given is not None:
        return given
    mask = _without_padding(responses, pad_id)
    if pad_ends:
        mask[:, 1:] |= mask[:, :-1].clone()
    return mask


def _mask_of(batch: Batch, name: str, ids: Tensor) -> Tensor | None:
    """Bool, as `ids`: what is no padding, where the batch says so."""
    if name not in batch:
        return None
    mask = batch[name].cpu().bool()
    if mask.shape != ids.shape:
        raise ValueError(f"{name} {tuple(mask.shape)}: expected {tuple(ids.shape)}, one number for each token")
    return mask


def _without_padding(ids: Tensor, pad_id: int | None) -> Tensor:
    """Bool, as `ids [B, T]`: everything but the padding on the right."""
    if pad_id is None:
        return torch.ones_like(ids, dtype=torch.bool)
    is_token = ids != pad_id
    return is_token.flip(1).cumsum(1).flip(1) > 0


def _require_prompts(mask: Tensor) -> None:
    empty = (~mask.any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"prompts: row {empty[0]} of a batch has no token ({len(empty)} such rows); expected at least one each, such as "
            f"the BOS token: nothing would predict the first token of the response"
        )


def check_known(name: str, ids: Tensor, vocab_size: int | None) -> None:
    """
    Raises:
        ValueError: one of `ids` is none of the model's; None: it does not say how many it has.
    """
    if vocab_size is None or not len(ids):
        return
    smallest, largest = int(ids.min()), int(ids.max())
    if smallest < 0 or largest >= vocab_size:
        found = smallest if smallest < 0 else largest
        raise ValueError(
            f"{name}: found the id {found}, and the model knows the ids 0 to {vocab_size - 1}; expected tokens that its own "
            f"tokenizer has made, and a mask of 0 where there are none"
        )


def per_token(name: str, values: Tensor, mask: Tensor) -> Tensor:
    """Numbers `[B, L]` of completions' tokens. A sum over the completion is spread evenly over its tokens."""
    values = values.detach().cpu().float()
    if values.shape == mask.shape:
        _check_logprobs(name, values[mask])
        return values
    if values.shape == (len(mask),):
        _check_logprobs(name, values)
        if name != "advantages":
            values = values / mask.sum(1).clamp(min=1)
        return values[:, None].expand(mask.shape)
    raise ValueError(
        f"{name}: found the shape {tuple(values.shape)} beside responses {tuple(mask.shape)}; expected {tuple(mask.shape)}, "
        f"one number for each token of the responses, or ({len(mask)},), one for each response. Cut and pad both alike"
    )


def _check_logprobs(name: str, values: Tensor) -> None:
    """
    Raises:
        ValueError: they are to be log-probabilities, and one is none.
    """
    if not name.endswith("logprobs"):
        return
    is_wrong = ~values.isfinite() | (values > MOST_LOGPROB)
    if is_wrong.any():
        raise ValueError(
            f"{name}: found {float(values[is_wrong][0]):g} for a token of a response; expected its log-probability, a finite "
            f"number of at most 0"
        )


def _rewards(rewards: Tensor, count: int) -> Tensor:
    """`[B, F]`."""
    table = check_rewards(as_table("rewards", rewards).detach().cpu().float())
    if table.dim() == 1:
        table = table[:, None]
    if table.dim() != 2 or len(table) != count:
        raise ValueError(
            f"rewards: found the shape {tuple(rewards.shape)} for {count} responses; expected ({count},), or ({count}, number "
            f"of reward functions)"
        )
    return table


def pad_id_of(tokenizer: Any, model: nn.Module) -> tuple[int | None, bool]:
    """The id of padding, as tokenizer or model say it, and whether it also ends a completion; (None, False): nobody says."""
    found = transformers_model(model)
    for source in (tokenizer, None if found is None else language_config(found.config)):
        if source is not None and source.pad_token_id is not None:
            return source.pad_token_id, source.pad_token_id == source.eos_token_id
    return None, False


def without_missing(rows: Batch) -> Batch:
    """Rows whose labels are the tokens that can be learned from: an advantage that is missing is NaN."""
    if "advantages" not in rows:
        return rows
    is_missing = rows["advantages"].isnan()
    labels = rows["labels"].masked_fill(is_missing, IGNORE)
    return rows | {"labels": labels, "advantages": rows["advantages"].masked_fill(is_missing, 0.0)}


def compare(
    given: list[Batch],
    how: Advantages,
    device: torch.device,
    rank: int,
    sum_over_ranks: Callable[[Tensor], Tensor],
    record: Callable[[str, float], None],
) -> None:
    """Give rows with rewards their `advantages [B, T]`: a group are all rows of the step, on all ranks, with equal prompts."""
    # 1. the rewards of all ranks
    width = max((rows["rewards"].shape[1] for rows in given), default=1)
    rewards, keys = torch.zeros(0, width), torch.zeros(0, dtype=torch.long)
    if given:
        rewards = torch.cat([rows["rewards"] for rows in given])
        keys = torch.cat([rows["prompt_keys"] for rows in given])
    everything, start = gather([rewards.to(device), keys.to(device)], rank, sum_over_ranks)
    rewards, groups = (column.cpu() for column in everything)
    if not len(rewards):
        return

    # 2. what they say about each row
    advantages, _ = how(rewards, groups)
    total = weighted_rewards(rewards, how.weights)
    for name, value in reward_metrics(total, groups).items():
        record(name, value)
    for rows in given:
        own = advantages[start : start + len(rows["labels"])]
        rows["advantages"] = own[:, None] * (rows["labels"] != IGNORE)
        start += len(own)


def reward_metrics(rewards: Tensor, groups: Tensor) -> dict[str, float]:
    """What one watches of rewards `[R]`, NaN where missing, of completions in groups `[R]`."""
    present = rewards[~rewards.isnan()]
    if not len(present):
        return {}
    level, count = level_share(rewards, groups)
    deviation = float(present.std()) if len(present) > 1 else 0.0
    return {
        "reward": float(present.mean()),
        "reward_std": deviation,
        "frac_reward_zero_std": level / count,
    }


def _key_of(ids: Tensor) -> int:
    """A number that tells a prompt from others: 63 bits of its hash."""
    digest = hashlib.blake2b(ids.numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def gather(
    columns: Sequence[Tensor], rank: int, sum_over_ranks: Callable[[Tensor], Tensor]
) -> tuple[list[Tensor], int]:
    """Columns of equally many rows, `[n, ...]`, as all ranks have them, one rank after the other; and where ours begin.

    A sum is all that an algorithm may ask of ranks: each puts its rows where the others have zeros.
    """
    device = columns[0].device
    ranks = int(sum_over_ranks(torch.ones((), dtype=torch.long, device=device)))
    own = rank if ranks > 1 else 0  # in evaluation every rank is alone
    counts = torch.zeros(ranks, dtype=torch.long, device=device)
    counts[own] = len(columns[0])
    counts = sum_over_ranks(counts)
    start, total = int(counts[:own].sum()), int(counts.sum())
    gathered = []
    for column in columns:
        table = column.new_zeros(total, *column.shape[1:])
        table[start : start + len(column)] = column
        gathered.append(sum_over_ranks(table))
    return gathered, start
