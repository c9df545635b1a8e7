"""Answers that are given: prompt and answer joined into rows for the model, and its scores back as one row per answer.

A joined batch is what the language trainers use, `input_ids`, `labels` (-100 on prompt and padding) and either
`attention_mask` or, laid flat, `position_ids` and `document_lengths`. Pairs put all chosen rows before all rejected;
a flat batch whose documents lie in another order says in `document_order` where each row's is. `row_weights [B]`, how much each
pair or judged answer counts as a whole, is optional.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from llm_trainer.image_batch import of_images
from llm_trainer.layout import Layout
from llm_trainer.losses.language import IGNORE, mean_over
from llm_trainer.losses.pairs import num_shared
from llm_trainer.models.frozen import StartingPoint
from llm_trainer.models.seeing import Seeing

if TYPE_CHECKING:
    from llm_trainer.models.scored import TokenScores

Batch = dict[str, Tensor]
_INPUTS = ("input_ids", "labels", "attention_mask", "position_ids", "document_lengths", "repeats")
_LABELS = ("labels", "completion", "step_labels")
# What the tokens of completions have in reinforcement learning.
OF_TOKENS = ("old_logprobs", "ref_logprobs", "sampled_logprobs", "advantages", "returns", "values")
_LAID_FLAT = ("input_ids", "loss_weights", *_LABELS, *OF_TOKENS)
# What is made anew where prompts are shared, and tables with a line per row, which may be as wide as rows are long.
_NOT_OF_TOKENS = ("attention_mask", "position_ids", "repeats", "rewards", "kept")
_PADDING = {"input_ids": 0, "labels": IGNORE, "attention_mask": 0}


def join(batch: Batch, answers: Sequence[str]) -> Batch:
    """Join prompts and answers by their true lengths, whatever side they were padded on.

    Args:
        batch: `prompt_input_ids [B, P]`, and `<answer>_input_ids [B, L]` for each answer, each with its
            `..._attention_mask`; or a batch that is joined already.
        answers: 'chosen' and 'rejected', or 'completion'.

    Returns:
        `input_ids`, `labels`, `attention_mask`, all `[len(answers) * B, T]`, padded on the right, one answer's rows
        after the other's; and every other key of the batch.

    Raises:
        ValueError: a key is missing, or an answer is empty.
    """
    if "labels" in batch:
        rows = batch
    else:
        keys = []
        for part in ("prompt", *answers):
            keys += [f"{part}_input_ids", f"{part}_attention_mask"]
        missing = [key for key in keys if key not in batch]
        if missing:
            raise ValueError(
                f"a batch with the keys {', '.join(batch)} lacks {', '.join(missing)}; expected {', '.join(keys)}, or "
                f"input_ids, attention_mask and labels of prompt and answer already joined"
            )
        sides = [_join_side(batch, answer) for answer in answers]
        width = max(side["input_ids"].shape[1] for side in sides)
        rows = {key: value for key, value in batch.items() if key not in keys}
        for key, padding in _PADDING.items():
            padded = [F.pad(side[key], (0, width - side[key].shape[1]), value=padding) for side in sides]
            rows[key] = torch.cat(padded)
        for key in of_images(batch):  # those of the prompts, which stand before every answer
            rows[key] = torch.cat([rows[key]] * len(answers))
    _require_answers(rows, answers)
    return rows


def _join_side(batch: Batch, answer: str) -> Batch:
    prompt, ids = batch["prompt_input_ids"], batch[f"{answer}_input_ids"]
    mask = torch.cat([batch["prompt_attention_mask"], batch[f"{answer}_attention_mask"]], 1).bool()  # [B, P + L]
    labels = torch.cat([torch.full_like(prompt, IGNORE), ids], 1)
    return compact({"input_ids": torch.cat([prompt, ids], 1), "labels": labels}, mask)


def compact(columns: Batch, mask: Tensor) -> Batch:
    """Columns `[B, L]` with only the tokens of a bool `mask [B, L]`, in their order, padded on the right; `attention_mask`."""
    order = (~mask).byte().argsort(dim=1, stable=True)[:, : int(mask.sum(1).max())]  # the tokens first, in their order
    present = mask.gather(1, order)
    rows = {name: value.gather(1, order).where(present, _PADDING.get(name, 0)) for name, value in columns.items()}
    return rows | {"attention_mask": present.long()}


def _require_answers(rows: Batch, answers: Sequence[str]) -> None:
    empty = (supervised(rows).sum(1) == 0).nonzero().flatten().tolist()
    if empty:
        num_rows = num_answers(rows) // len(answers)
        where = ", ".join(f"{answers[i // num_rows]} of row {i % num_rows}" for i in empty[:3])
        raise ValueError(
            f"a batch holds {len(empty)} answers without a token to learn from ({where}); expected at least one token "
            f"each, after the first of the row. Drop such rows, or cut long prompts instead of the answers behind them"
        )


def share_prompts(rows: Batch, groups: Tensor | None = None, image_ids: Sequence[int] = ()) -> Batch:
    """Answers laid flat with the prompts of pairs, or of groups, once: each further answer is a branch of the first one.

    A branch (`models.attention`) begins with the last token before the first label, so that every label is still predicted by
    the token before it. What the answers themselves have in common is not shared: its tokens are labels of both.

    Args:
        rows: a joined batch, padded or flat, with numbers per token, like `completion`, further labels.
        groups: `[rows]`, equal for answers to one prompt, wherever they stand; None: pairs, all chosen rows before all
            rejected.
        image_ids: placeholders of images, of which rows of a group show the same: each is run with the first of these rows.

    Returns:
        `input_ids`, `labels` and the like `[1, N]`, `position_ids [1, N]`, `document_lengths [rows]` (of a group together:
        first its trunk, then the branches), `document_order [rows]`, and `repeats [1, N]`, for how many rows each token
        stands; and every other key of the batch.
    """
    columns: dict[str, Sequence[Tensor]] = {}
    for name, value in rows.items():
        is_per_token = isinstance(value, Tensor) and value.shape == rows["input_ids"].shape
        if is_per_token and name not in _NOT_OF_TOKENS:
            columns[name] = _documents(value, rows)
    documents = columns["input_ids"]
    if groups is None:
        groups = torch.arange(len(documents)) % (len(documents) // 2)
    trunks = _first_of_group(groups.cpu())
    shared = _shared_with(trunks, documents, columns["labels"])
    for row, number in enumerate(shared):
        if int(documents[row][number]) in image_ids:  # a prompt that ends in an image: no branch may begin inside of it
            shared[row] = 0
    pieces: dict[str, list[Tensor]] = {name: [] for name in (*columns, "position_ids", "repeats")}
    # A row that shares nothing begins anew, so that no branch may come behind it.
    order = sorted(range(len(documents)), key=lambda row: (trunks[row], row != trunks[row] and not shared[row], row))
    followers: dict[int, list[int]] = {}
    for row in order:
        if shared[row]:
            followers.setdefault(trunks[row], []).append(shared[row])
    for row in order:
        positions = torch.arange(shared[row], len(documents[row]))
        begun = torch.tensor(followers.get(row, []), dtype=torch.long)
        for name, values in columns.items():
            pieces[name].append(values[row][shared[row] :])
        pieces["position_ids"].append(positions)
        pieces["repeats"].append(1 + (positions[:, None] < begun).sum(1))
    laid = {name: torch.cat(parts)[None] for name, parts in pieces.items()}
    lengths = torch.tensor([len(part) for part in pieces["input_ids"]])
    laid["labels"][0, lengths.cumsum(0) - lengths] = IGNORE  # nothing predicts a first token
    others = {name: value for name, value in rows.items() if name not in ("attention_mask", *laid)}
    if "kept" in rows:
        others["kept"] = _kept_of(rows["kept"], columns["kept_counts"], order, shared)
    if "images" in rows:
        images: Any = rows["images"]
        others["images"] = images.of_rows([row for row in order if not shared[row]])
    place = torch.tensor(order).argsort()  # the document of each row
    return others | laid | {"document_lengths": lengths, "document_order": place}


def _kept_of(kept: Tensor, counts: Sequence[Tensor], order: list[int], shared: list[int]) -> Tensor:
    """`kept [M]`, ids of the tokens of all rows as `counts` says (`losses.drawn_from`), of rows in another `order`."""
    of_rows = kept.split([int(count.sum()) for count in counts])
    return torch.cat([of_rows[row][int(counts[row][: shared[row]].sum()) :] for row in order])


def _first_of_group(groups: Tensor) -> list[int]:
    """`groups [rows]` -> of each row, the first one of its group."""
    first: dict[int, int] = {}
    return [first.setdefault(group, row) for row, group in enumerate(groups.tolist())]


def _shared_with(trunks: list[int], documents: Sequence[Tensor], labels: Sequence[Tensor]) -> list[int]:
    """How many tokens each row has in common with the first one of its group; 0 for that one itself."""
    shared = [0] * len(documents)
    branches = [row for row, trunk in enumerate(trunks) if row != trunk]
    if branches:
        before = [documents[trunks[row]] for row in branches]
        own = [documents[row] for row in branches]
        sizes = torch.tensor([[len(a), len(b)] for a, b in zip(before, own, strict=True)])
        is_label = torch.cat([labels[row] for row in branches]) != IGNORE
        found = num_shared(torch.cat(before), sizes[:, 0], torch.cat(own), sizes[:, 1], is_label)
        for row, number in zip(branches, found.tolist(), strict=True):
            shared[row] = number
    return shared


def _documents(values: Tensor, rows: Batch) -> Sequence[Tensor]:
    """`values` of a joined batch, answer by answer, without padding."""
    if "document_lengths" in rows:
        return values[0].split(rows["document_lengths"].tolist())
    mask = rows["attention_mask"].bool() if "attention_mask" in rows else torch.ones_like(values, dtype=torch.bool)
    return [row[present] for row, present in zip(values, mask, strict=True)]


def lay_flat(rows: Batch, layout: Layout) -> Batch:
    """Padded rows laid end to end without their padding, as `data.collate.collate_flat` does, where the layout says so.

    As they came: rows with padding elsewhere than on the right, with labels on padding, with images, with a mask of another
    shape, or with keys that are not known; and rows that are laid flat already. What is no tensor is left as it is.

    Args:
        rows: `input_ids [B, T]`, with `attention_mask`, labels and weights of that shape, and numbers per row.
        layout: of the run (`Machine.layout`).
    """
    if not layout.flat or "position_ids" in rows or rows["input_ids"].dim() != 2 or of_images(rows):
        return rows
    ids = rows["input_ids"]
    mask = rows["attention_mask"].bool() if "attention_mask" in rows else torch.ones_like(ids, dtype=torch.bool)
    per_token = [name for name in _LAID_FLAT if name in rows]
    per_row = [name for name in rows if name not in per_token and name != "attention_mask"]
    tables = [name for name in per_row if isinstance(rows[name], Tensor) and rows[name].dim() > 1]
    if tables or mask.shape != ids.shape or any(rows[name].shape != ids.shape for name in per_token):
        return rows
    lengths = mask.sum(1)
    ends_in_padding = (mask[:, 1:] <= mask[:, :-1]).all() and (lengths > 0).all()
    learned = [rows[name][~mask] for name in _LABELS if name in rows]
    if not ends_in_padding or any((labels != IGNORE).any() for labels in learned) or not layout.pays(lengths.tolist()):
        return rows
    laid = {name: rows[name][mask][None] for name in per_token}
    positions = (mask.cumsum(1) - 1)[mask][None]
    for name in ("labels", "completion"):
        if name in laid:
            laid[name] = laid[name].masked_fill(positions == 0, IGNORE)  # nothing predicts a first token
    others = {name: rows[name] for name in per_row}
    return others | laid | {"position_ids": positions, "document_lengths": lengths.cpu()}


def num_answers(rows: Batch) -> int:
    """Rows of a joined batch, documents of a flat one."""
    return len(rows["document_lengths"]) if "document_lengths" in rows else len(rows["input_ids"])


def row_weights(batch: Batch, count: int) -> Tensor:
    """`[count]` how much each row of a batch, or each pair, counts as a whole: its `row_weights`, or 1.

    Raises:
        ValueError: there are more or fewer of them, or one is below 0.
    """
    if "row_weights" not in batch:
        return torch.ones(count)
    weights: Tensor = batch["row_weights"].float()
    if weights.shape != (count,) or not (weights >= 0).all():
        raise ValueError(
            f"row_weights: found the shape {tuple(weights.shape)} and the smallest {weights.min():g}; expected "
            f"({count},), a number from 0 up for each row, or pair, of the batch"
        )
    return weights


def mean_over_rows(losses: Tensor, batch: Batch) -> Tensor:
    """The mean of `losses [B]`, in which each row, or pair, of the batch counts as much as it weighs."""
    if "row_weights" not in batch:
        return losses.mean()
    weights = batch["row_weights"].to(losses.dtype)
    return mean_over((losses * weights).sum(), weights.sum())


def num_pairs(batch: Batch) -> int:
    """Pairs of a batch, whose prompts and answers may come apart."""
    if "chosen_input_ids" in batch:
        return len(batch["chosen_input_ids"])
    return num_answers(batch) // 2


def as_rows(values: Tensor, rows: Batch) -> Tensor:
    """`values [1, N]` of a flat batch as `[answers, T]`, 0 behind each row's end; `[B, T]` of a padded one as it is."""
    if "document_lengths" not in rows:
        return values
    documents = pad_sequence(values[0].split(rows["document_lengths"].tolist()), batch_first=True)
    return documents[rows["document_order"]] if "document_order" in rows else documents


def supervised(rows: Batch) -> Tensor:
    """`[answers, T]` bool: the tokens that are predicted from one before them and whose label is set."""
    mask = as_rows(rows["labels"] != IGNORE, rows)
    return mask & (torch.arange(mask.shape[1], device=mask.device) > 0)


def with_prompts(rows: Batch, chosen: int) -> Batch:
    """The batch whose first `chosen` rows have their prompts as labels too; padding and first tokens still have none."""
    ids = rows["input_ids"]
    if "document_lengths" in rows:
        split = int(rows["document_lengths"][:chosen].sum())
        wanted = (torch.arange(ids.shape[1], device=ids.device) < split)[None] & (rows["position_ids"] > 0)
    else:
        wanted = rows["attention_mask"].bool() & (torch.arange(len(ids), device=ids.device) < chosen)[:, None]
    return rows | {"labels": torch.where(wanted, ids, rows["labels"])}


def model_inputs(others: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """`others`, what a batch has for the model alone, such as `pixel_values`.

    Args:
        others: of a ready-made batch, by name.
        model: a module that is or holds a `Seeing`, scores or rewards; or the policy as it was, whose reader is the policy's.

    Raises:
        ValueError: the model does not read one of them, so that it would be lost.
    """
    if not others:
        return {}
    if isinstance(model, StartingPoint):
        model = model.policy
    reader = next(module for module in model.modules() if isinstance(module, Seeing))
    unread = [] if reader.named_inputs is None else sorted(others.keys() - reader.named_inputs)
    if unread:
        raise ValueError(
            f"a batch has {', '.join(unread)}, which {reader.model_name}.forward does not take, so that nobody would read it; "
            f"expected tokens and labels, and inputs of the model by its own names. Leave it out of what collate_fn returns, "
            f"or train a model that takes it"
        )
    return dict(others)


def score(model: nn.Module, rows: Batch, differentiable: bool = False, **how: Any) -> "TokenScores":
    """The model's scores of a joined batch: log-probs of its labels, with gradients if `differentiable`.

    `how`: further arguments of `ScoredModel.forward`, such as `temperature`.
    """
    device = rows["input_ids"].device
    inputs = {name: rows[name].to(device, non_blocking=True) for name in _INPUTS if name in rows}
    inputs |= model_inputs({name: rows[name] for name in of_images(rows)}, model)
    return model(**inputs, differentiable_logprobs=differentiable, **how)


def count_tokens(batch: Batch) -> int:
    """Tokens of a joined batch, or of its parts, without padding."""
    masks = [value for name, value in batch.items() if name.endswith("attention_mask")]
    if masks:
        return sum(int(mask.sum()) for mask in masks)
    return sum(ids.numel() for name, ids in batch.items() if name.endswith("input_ids"))
