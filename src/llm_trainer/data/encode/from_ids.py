"""What is trained on of a conversation that is token ids already."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.templates import ChatTemplateError


def spans_from_ids(ids: Sequence[int], chat_format: ChatFormat) -> list[bool]:
    """Which tokens of a conversation in ids are trained on: from each assistant header to the end of its turn.

    That is the whole of what the template prints there; or its last token, or the eos, where one of them comes first,
    for files whose answers are closed by less than the template prints.

    Args:
        ids: `[T]` token ids; a conversation may be cut off at its end.
        chat_format: its template gives the header (the generation prompt) and the end; its `train_on` is honoured.

    Returns:
        `[T]` bools.

    Raises:
        ChatTemplateError: the header does not occur in the ids, or the template has none.
    """
    ids = list(ids)
    if chat_format.train_on == "all":
        return [True] * len(ids)
    header, end = chat_format.header_ids, chat_format.turn_end_ids
    headers = list(_places(ids, header, 0, len(ids)))
    if not headers:
        text = chat_format.tokenizer.decode(header)
        raise ChatTemplateError(
            f"no assistant turn in {len(ids)} token ids: the template's header {header} ({text!r}) does "
            "not occur; expected conversations made with this tokenizer and template; pass the template they came from"
        )
    end_tokens = set(chat_format.stop_token_ids())
    trained = [False] * len(ids)
    for place, following in pairwise([*headers, len(ids)]):
        if chat_format.train_on == "last" and place != headers[-1]:
            continue
        start = place + len(header)
        whole = next(_places(ids, end, start, following), len(ids))
        single = next((i for i in range(start, len(ids)) if ids[i] in end_tokens), len(ids))
        # An eos before it ends the turn as well: the next whole end may be that of somebody else's turn.
        stop = single + 1
        if whole <= single:
            stop = whole + len(end)
        stop = min(stop, len(ids))
        trained[start:stop] = [True] * (stop - start)
    return trained


def _places(ids: list[int], piece: list[int], start: int, stop: int) -> Iterator[int]:
    """Where `piece` stands in `ids[start:stop]`."""
    for i in range(start, stop - len(piece) + 1):
        if piece and ids[i] == piece[0] and ids[i : i + len(piece)] == piece:
            yield i
