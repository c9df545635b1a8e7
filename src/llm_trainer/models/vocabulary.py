"""More tokens for a model that has learned without them: its tokenizer, and its rows of embedding and head.

Letters: `V` rows of the vocabulary, `D` width.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from llm_trainer.models.heads import evaluating, logits_of
from llm_trainer.models.inside import language_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Pieces = Mapping[int, Sequence[int]]  # id of a new token -> the ids that its text was before


def extend_vocabulary(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    tokens: Sequence[str] = (),
    special_tokens: Sequence[str] = (),
    pad_to_multiple_of: int | None = None,
) -> list[int]:
    """Add tokens to a tokenizer, and the rows for them to its model, in place: before an optimizer or an engine is made.

    A new row of the embedding, of the head and of its bias is the mean of the rows of the pieces that the tokenizer cut the
    token's text into before. Rows behind the last token, up to the multiple, are the mean of all tokens' rows. The logits of
    all other ids stay as they were, and a tied head stays tied.

    Args:
        model: a language model of transformers, without adapters.
        tokenizer: of it.
        tokens: ordinary text that becomes one token each.
        special_tokens: control tokens, which `skip_special_tokens` hides and no user can write (`parse_special_tokens`).
        pad_to_multiple_of: the number of rows is raised to a multiple of it; None: as many as are needed.

    Returns:
        The new ids; beside adapters `adapt(..., new_tokens=)` has their rows trained.

    Raises:
        ValueError: a token exists already, or the model has fewer rows than the tokenizer has tokens, or cannot be extended.
    """
    check_rows(model, tokenizer)
    pieces = extend_tokenizer(tokenizer, tokens, special_tokens)
    extend_rows(model, pieces, num_ids(tokenizer), pad_to_multiple_of)
    return list(pieces)


def num_ids(tokenizer: "PreTrainedTokenizerFast") -> int:
    """The rows that a tokenizer needs: its largest id and 0."""
    return max(tokenizer.get_vocab().values()) + 1


def extend_tokenizer(
    tokenizer: "PreTrainedTokenizerFast", tokens: Sequence[str] = (), special_tokens: Sequence[str] = ()
) -> Pieces:
    """Add tokens to a tokenizer, in place.

    Each is found in raw text as it is written, wherever it stands, before anything is normalised.

    Returns:
        The new ids, in their order, each with the ids that its text was before.

    Raises:
        ValueError: a token exists already, is named twice, or is no text.
    """
    from tokenizers import AddedToken

    # 1. what they were until now
    before: dict[str, list[int]] = {}
    known = tokenizer.get_vocab()
    for token in (*tokens, *special_tokens):
        if not token.strip():
            raise ValueError(f"add_tokens: got {token!r}, expected text that is not only white space")
        if token in known:
            raise ValueError(
                f"add_tokens: {token!r} exists already, as id {known[token]} of tokenizer {tokenizer.name_or_path!r}; leave "
                f"it out: its row has been learned"
            )
        if token in before:
            raise ValueError(f"add_tokens: {token!r} is named twice; leave one out")
        before[token] = tokenizer.backend_tokenizer.encode(token, add_special_tokens=False).ids
        if not before[token]:
            raise ValueError(
                f"add_tokens: {token!r} is nothing to this tokenizer, whose normalizer removes it; leave it out"
            )

    # 2. in the order in which they are given
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in tokens])
    special = [AddedToken(token, special=True, normalized=False) for token in special_tokens]
    if special:
        tokenizer.add_special_tokens({"extra_special_tokens": special}, replace_extra_special_tokens=False)  # type: ignore[dict-item]
    vocabulary = tokenizer.get_vocab()
    return {vocabulary[token]: pieces for token, pieces in before.items()}


def check_rows(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", new: Collection[int] = ()) -> None:
    """Compare a model that has not been extended with its tokenizer.

    Args:
        model: of transformers.
        tokenizer: of it.
        new: ids that were added to the tokenizer alone.

    Raises:
        ValueError: the model has fewer rows than the tokenizer had tokens.
    """
    rows, needed = _embedding(model).num_embeddings, min(new, default=num_ids(tokenizer))
    if rows < needed:
        raise ValueError(
            f"vocabulary_config: tokenizer {tokenizer.name_or_path!r} needs {needed} rows before any token is added, and the "
            f"model has {rows}; expected the tokenizer of this model: a row is made of those of other tokens"
        )


def extend_rows(model: "PreTrainedModel", pieces: Pieces, num_ids: int, pad_to_multiple_of: int | None = None) -> None:
    """Give the new tokens of a model their rows, in place; there are more rows where it has not enough.

    Args:
        model: with or without weights (on the meta device).
        pieces: what `extend_tokenizer` returns.
        num_ids: of the tokenizer, the new ones included.
        pad_to_multiple_of: as in `extend_vocabulary`.

    Raises:
        ValueError: the model has no table that can be extended, or does not read the new ids.
    """
    embedding = _embedding(model)
    head = cast(nn.Linear, model.get_output_embeddings())
    old_rows = embedding.num_embeddings
    multiple = pad_to_multiple_of or 1
    rows = -(-max(old_rows, num_ids) // multiple) * multiple
    if not pieces and rows == old_rows:
        return
    known = min(pieces, default=num_ids)  # rows behind them may never have been learned
    before = _logits(model, [0, 1])

    # 1. the rows; the parameters stay the same objects, so that tied ones stay tied
    tables = [embedding.weight]
    if head.weight is not embedding.weight:
        tables.append(head.weight)
    if isinstance(head.bias, nn.Parameter):
        tables.append(head.bias)
    for table in tables:
        table.data = _extended(table.data, pieces, rows, known)

    # 2. what else knows how many they are
    embedding.num_embeddings = head.out_features = rows
    language_config(model.config).vocab_size = rows
    model.vocab_size = rows  # type: ignore[assignment]  # as transformers' own `resize_token_embeddings` does

    # 3. is everything else as it was?
    last = num_ids - 1
    after = _logits(model, [0, 1])
    if before is None or after is None:
        return
    if not torch.allclose(after[..., :known], before[..., :known], rtol=1e-4, atol=1e-5):
        raise ValueError(
            f"vocabulary_config: {type(model).__name__} gives other logits with more rows; it cannot be extended"
        )
    try:
        _logits(model, [last, 0])
    except (IndexError, RuntimeError) as error:
        raise ValueError(
            f"vocabulary_config: {type(model).__name__} does not read the id {last}: it has another table of its vocabulary "
            f"({error}); it cannot be extended"
        ) from error


def _embedding(model: "PreTrainedModel") -> nn.Embedding:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"vocabulary_config: got a {type(model).__name__}, expected a language model of transformers; add tokens before "
            f"adapters are put on it"
        )
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise ValueError(
            f"vocabulary_config: {type(model).__name__} has a {type(embedding).__name__} and a {type(head).__name__}, expected "
            f"an embedding and a linear head to add rows to"
        )
    for table in (embedding.weight, head.weight):
        if not table.is_floating_point() or len(table) != embedding.num_embeddings:
            raise ValueError(
                f"vocabulary_config: {type(model).__name__} has a table of {table.dtype} {list(table.shape)} for "
                f"{embedding.num_embeddings} ids, expected a row of floating-point numbers for each; extend it before it is "
                f"quantised"
            )
    return embedding


def _extended(table: Tensor, pieces: Pieces, rows: int, known: int) -> Tensor:
    """A table `[V, D]`, or a bias `[V]`, with `rows` rows, of which the first `known` stay."""
    mean = table[:known].mean(0, keepdim=True, dtype=torch.float32).to(table.dtype)
    missing = mean.expand(rows - len(table), *table.shape[1:])
    extended = torch.cat([table, missing])
    for new, old in pieces.items():
        extended[new] = table[list(old)].float().mean(0).to(table.dtype)
    return extended


def _logits(model: "PreTrainedModel", ids: list[int]) -> Tensor | None:
    """Of one row of `ids`; None: the model has no weights."""
    device = _embedding(model).weight.device
    if device.type == "meta":
        return None
    with evaluating(model), torch.no_grad():
        return logits_of(model(torch.tensor([ids], device=device)), type(model).__name__).float()
