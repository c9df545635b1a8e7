"""The token ledger: where every token that was read went. It must balance."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from llm_trainer.config.errors import counted


@dataclass
class Ledger:
    """Counts of one dataset, in tokens unless said otherwise."""

    name: str = ""  # what was read
    rows: int = 0  # that will be trained on
    read: int = 0  # tokens of all rows that were read
    trained: int = 0  # that the loss counts
    context: int = 0  # that the model only reads (prompts, first tokens of documents)
    truncated: int = 0  # cut from rows that were kept
    truncated_rows: int = 0  # rows that lost tokens
    dropped: Counter[str] = field(default_factory=Counter)  # tokens of rows that were left out, by reason
    dropped_rows: Counter[str] = field(default_factory=Counter)  # the number of these rows, by reason

    def drop(self, reason: str, tokens: int = 0, rows: int = 1) -> None:
        """Note rows of `tokens` tokens altogether as left out for `reason`."""
        self.read += tokens
        self.dropped[reason] += tokens
        self.dropped_rows[reason] += rows

    def check(self) -> "Ledger":
        """Assert that tokens read = trained on + context only + truncated + dropped."""
        known = self.trained + self.context + self.truncated + sum(self.dropped.values())
        assert self.read == known, f"{self.name}: {self.read} tokens were read, {known} are accounted for"
        return self

    def merge(self, other: "Ledger") -> "Ledger":
        """The ledger of both datasets together."""
        numbers = ("rows", "read", "trained", "context", "truncated", "truncated_rows")
        return Ledger(
            name=self.name or other.name,
            **{key: getattr(self, key) + getattr(other, key) for key in numbers},
            dropped=self.dropped + other.dropped,
            dropped_rows=self.dropped_rows + other.dropped_rows,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for trainer_state.json and metrics."""
        return asdict(self) | {"dropped": dict(self.dropped), "dropped_rows": dict(self.dropped_rows)}

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
        lines += [f"{counted(rows, 'row')} dropped: {reason}" for reason, rows in sorted(self.dropped_rows.items())]
        return lines
