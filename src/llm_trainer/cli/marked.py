"""Text of which a part is trained on: coloured in a terminal, between brackets elsewhere."""

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

Piece = tuple[str, bool]  # some text, and whether it is trained on


def marked(pieces: Sequence[Piece], console: Console) -> tuple[Text, str]:
    """The text, which is printable already, and by what is shown what is trained on."""
    if console.is_terminal:
        return _coloured(pieces), "green"
    return _bracketed(pieces), "in [[ ]]"


def _bracketed(pieces: Sequence[Piece]) -> Text:
    text = Text()
    for part, trained in pieces:
        if trained:
            part = f"[[{part}]]"
        text.append(part)
    return text


def _coloured(pieces: Sequence[Piece]) -> Text:
    text = Text()
    for part, trained in pieces:
        style = "bold green" if trained else "dim"
        text.append(part, style)
    return text
