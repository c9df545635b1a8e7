"""Token ids that were made elsewhere: all of them must be in the vocabulary, or training ends with an index error."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.kinds import Kind
from llm_trainer.data.read.errors import DataError, Location
from llm_trainer.data.read.token_files import TokenFile, open_tokens
from llm_trainer.disk import DiskError, whole_file

AT_ONCE = 1 << 22  # ids in memory while a whole file is checked
QUICK_LOOK = 1 << 20  # ids that are looked at before a file is encoded


def open_tokens_of(path: Path, kind: Kind, chat: ChatFormat) -> TokenFile:
    """A token file that the kind can use and whose first and last million ids are in the vocabulary.

    Raises:
        DataError: it is another kind's, or was made with another tokenizer.
    """
    tokens = open_tokens(path)
    if tokens.kind != kind.token_kind:
        found = f"token rows of kind '{tokens.kind}'"
        expected = f"text, or token rows of kind '{kind.token_kind or 'none'}', for {kind.name}"
        raise DataError(Location(path), found, expected, "use the matching trainer, or store the rows as text")
    for row in (*tokens[0].values(), *tokens[len(tokens) - 1].values()):
        for piece in (row[:QUICK_LOOK], row[-QUICK_LOOK:]):
            check_ids(piece, chat, Location(path))
    return tokens


def check_ids(ids: np.ndarray, chat: ChatFormat, location: Location) -> None:
    """Every id must be in the vocabulary.

    Raises:
        DataError: one is not.
    """
    largest, smallest = int(ids.max(initial=0)), int(ids.min(initial=0))
    fix = "use the tokenizer that made the file, or make the file again"
    if largest >= chat.vocab_size:
        expected = f"ids below {chat.vocab_size}, the size of the vocabulary"
        raise DataError(location, f"token id {largest}", expected, fix)
    if smallest < 0:
        raise DataError(location, f"token id {smallest}", "ids from 0 on", fix)


def check_all_ids(tokens: TokenFile, chat: ChatFormat, record: Path) -> None:
    """Look at every id of a file that is used where it lies, unless this has been done.

    Args:
        tokens: has its ids in one array.
        record: exists where it has been done; its name holds everything that this depends on.

    Raises:
        DataError: an id is not in the vocabulary.
    """
    if record.exists():
        return
    assert isinstance(tokens.rows, np.ndarray)
    for ids in _blocks(tokens.rows):
        check_ids(ids, chat, Location(tokens.path))
    with suppress(DiskError):  # then it is done again
        record.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(record) as partial:
            partial.write_text(f"all {tokens.rows.size} ids of {tokens.path} are below {chat.vocab_size}\n")


def _blocks(ids: np.ndarray) -> Iterator[np.ndarray]:
    """All ids, some at a time. Those of a file are read: pages of a memory map would count as memory of this process."""
    if not isinstance(ids, np.memmap):
        flat = ids.reshape(-1)
        for first in range(0, len(flat), AT_ONCE):
            yield flat[first : first + AT_ONCE]
        return
    with open(str(ids.filename), "rb") as file:
        file.seek(ids.offset)
        while len(block := np.fromfile(file, ids.dtype, AT_ONCE)):
            yield block
