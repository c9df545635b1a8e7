"""Text of which a part is trained on: coloured in a terminal, between brackets elsewhere."""

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

Piece = tuple[str, bool | None]  # some text, and whether it is trained on; None: others said it in between

_STYLES = {True: "bold green", False: "dim", None: "cyan"}


def marked(pieces: Sequence[Piece], console: Console) -> tuple[Text, str]:
    """The text, which is printable already, and by what is shown what is trained on."""
    has_others = any(trained is None for _, trained in pieces)
    if console.is_terminal:
        return _coloured(pieces), "green" + ", what others said cyan" * has_others
    return _bracketed(pieces), "in [[ ]]" + ", what others said in {{ }}" * has_others


def _bracketed(pieces: Sequence[Piece]) -> Text:
    text = Text()
    for part, trained in pieces:
        if trained:
            part = f"[[{part}]]"
        elif trained is None:
            part = f"{{{{{part}}}}}"
        text.append(part)
    return text


def _coloured(pieces: Sequence[Piece]) -> Text:
    text = Text()
    for part, trained in pieces:
        text.append(part, _STYLES[trained])
    return text
