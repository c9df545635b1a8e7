"""The token ledger: where every token that was read went. It must balance."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from llm_trainer.config.errors import counted
from llm_trainer.data.encode.printed import ALL_CHARACTERS, LEFT_OUT, share_left_out


@dataclass
class ImageLedger:
    """Where every image that was read went; one that several answers show is counted as often."""

    read: int = 0
    used: int = 0
    cut: int = 0  # outside of what is used of rows that were kept
    dropped: Counter[str] = field(default_factory=Counter)  # of rows that were left out, by reason

    def check(self, name: str) -> None:
        """Assert that images read = used + cut + dropped."""
        known = self.used + self.cut + sum(self.dropped.values())
        assert self.read == known, f"{name}: {self.read} images were read, {known} are accounted for"

    def merge(self, other: "ImageLedger") -> "ImageLedger":
        """The ledger of both together."""
        numbers = (self.read + other.read, self.used + other.used, self.cut + other.cut)
        return ImageLedger(*numbers, self.dropped + other.dropped)

    def line(self) -> str:
        """The ledger as a screen shows it."""
        said = f"{counted(self.read, 'image')} read = {self.used:,} used + {self.cut:,} cut off"
        said += f" + {sum(self.dropped.values()):,} dropped"
        if self.dropped:
            said += f" ({', '.join(f'{number:,} {reason}' for reason, number in sorted(self.dropped.items()))})"
        return said


@dataclass
class Ledger:
    """Counts of one dataset, in tokens unless said otherwise."""

    name: str = ""  # what was read
    kept_in: str = ""  # the folder of its tokens, and whether they were made now; '': used where they lie
    rows: int = 0  # that will be trained on
    read: int = 0  # tokens of all rows that were read
    trained: int = 0  # that the loss counts
    weighted: int = 0  # of these, that weigh something else than 1
    weights: tuple[float, float] | None = None  # the smallest and the largest of all that are trained on; None: all 1
    context: int = 0  # that the model only reads (prompts, first tokens of documents)
    truncated: int = 0  # cut from rows that were kept
    truncated_rows: int = 0  # rows that lost tokens
    dropped: Counter[str] = field(default_factory=Counter)  # tokens of rows that were left out, by reason
    dropped_rows: Counter[str] = field(default_factory=Counter)  # the number of these rows, by reason
    notes: Counter[str] = field(default_factory=Counter)  # what else must not be silent: `turn: an empty answer, ...`
    unread: list[str] = field(default_factory=list)  # columns of the rows that are not read
    images: ImageLedger | None = None  # None: no row has an image

    def drop_images(self, reason: str, images: int) -> None:
        """Note images of rows that were left out for `reason`."""
        if images:
            self.images = self.images or ImageLedger()
            self.images.read += images
            self.images.dropped[reason] += images

    def drop(self, reason: str, tokens: int = 0, rows: int = 1) -> None:
        """Note rows of `tokens` tokens altogether as left out for `reason`."""
        self.read += tokens
        self.dropped[reason] += tokens
        self.dropped_rows[reason] += rows

    def weigh(self, weights: np.ndarray, counts: np.ndarray) -> None:
        """Note weights `[N]`, and how many tokens that the loss counts have each of them, `[N]`."""
        if len(weights):
            self.weighted += int(counts[weights != 1].sum())
            self.weights = _span(self.weights, (float(weights.min()), float(weights.max())))

    def check(self) -> "Ledger":
        """Assert that tokens read = trained on + context only + truncated + dropped, and likewise for images."""
        known = self.trained + self.context + self.truncated + sum(self.dropped.values())
        assert self.read == known, f"{self.name}: {self.read} tokens were read, {known} are accounted for"
        if self.images is not None:
            self.images.check(self.name)
        return self

    def merge(self, other: "Ledger") -> "Ledger":
        """The ledger of both datasets together."""
        numbers = ("rows", "read", "trained", "weighted", "context", "truncated", "truncated_rows")
        return Ledger(
            name=self.name or other.name,
            **{key: getattr(self, key) + getattr(other, key) for key in numbers},
            weights=_span(*(one.weights or (1.0, 1.0) for one in (self, other) if one.trained)),
            dropped=self.dropped + other.dropped,
            dropped_rows=self.dropped_rows + other.dropped_rows,
            notes=self.notes + other.notes,
            unread=list(dict.fromkeys(self.unread + other.unread)),
            images=_both(self.images, other.images),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for trainer_state.json and metrics."""
        counters = {"dropped": self.dropped, "dropped_rows": self.dropped_rows, "notes": self.notes}
        facts = asdict(self) | {name: dict(counter) for name, counter in counters.items()}
        facts.pop("kept_in")  # of this start alone, not of the run
        facts.pop("images")
        if self.images is not None:
            facts["images"] = asdict(self.images) | {"dropped": dict(self.images.dropped)}
        return facts

    def lines(self) -> list[str]:
        """The ledger as a screen shows it."""
        share = f" ({self.trained / self.read:.1%})" if self.read else ""
        lines = [
            f"{counted(self.rows, 'row')}, {counted(self.read, 'token')} read = {self.trained:,} trained on{share}"
            f" + {self.context:,} context only + {self.truncated:,} truncated + {sum(self.dropped.values()):,} dropped"
        ]
        if self.truncated_rows:
            rows, tokens = counted(self.truncated_rows, "row"), counted(self.truncated, "token")
            lines.append(f"{rows} longer than the context, truncated by {tokens}")
        if self.images is not None:
            lines.append(self.images.line())
        lines += self.weight_lines()
        lines += [f"{counted(rows, 'row')} dropped: {reason}" for reason, rows in sorted(self.dropped_rows.items())]
        if self.unread:
            lines.append(f"columns that are not read: {', '.join(self.unread)}")
        return lines + note_lines(self.notes)

    def weight_lines(self) -> list[str]:
        """A line about the weights of tokens, where they differ."""
        if self.weights is None or not self.weighted:
            return []
        span = f"from {self.weights[0]:g} to {self.weights[1]:g}"
        return [f"{counted(self.weighted, 'token')} with another weight than 1; weights go {span}"]


def _both(one: ImageLedger | None, other: ImageLedger | None) -> ImageLedger | None:
    if one is None or other is None:
        return one or other
    return one.merge(other)


def _span(*spans: tuple[float, float] | None) -> tuple[float, float] | None:
    """The smallest and the largest number of several such spans; None: there is none."""
    known = [span for span in spans if span is not None]
    if not known:
        return None
    return min(low for low, _ in known), max(high for _, high in known)


def note_lines(notes: Counter[str]) -> list[str]:
    """What was noted, as a screen shows it: `3 turns: an empty answer, ...`."""
    lines = []
    if notes[LEFT_OUT]:
        numbers = f"{notes[LEFT_OUT]:,} of {notes[ALL_CHARACTERS]:,} characters ({share_left_out(notes):.1%})"
        lines.append(f"{numbers} of the conversations are left out by the chat template")
    for text, count in sorted(notes.items()):
        if text in (LEFT_OUT, ALL_CHARACTERS):
            continue
        what, said = text.split(": ", 1)
        lines.append(f"{counted(count, what)}: {said}")
    return lines
