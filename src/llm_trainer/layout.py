"""How the rows of a micro-batch are laid out: padded, or flat, end to end without padding. Values, and when which one pays."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from llm_trainer.state import Choice

if TYPE_CHECKING:
    from torch import nn


class Packing(NamedTuple):
    """What a model makes of documents laid flat in one row (`models.packing` tries it out).

    Attributes:
        fault: why it does not score them as it would score each alone; empty where it does.
        dense_width: width of a model whose attention computes all pairs of tokens of a row, 1 where nothing is known of it;
            0: only pairs of a document.
        couples_rows: what a row contributes depends on the others of its micro-batch: BatchNorm, or a loss that sorts them.
    """

    fault: str = ""
    dense_width: int = 0
    couples_rows: bool = False


@dataclass(frozen=True)
class Layout:
    """The layout of a run.

    Attributes:
        flat: padded rows are laid flat wherever that costs less.
        dense_width: as in `Packing`, of the widest such model that sees the rows.
        by_length: rows of similar length of a step come together, where they are padded.
        choice: what the machine chose; None: the user said it.
    """

    flat: bool = False
    dense_width: int = 0
    by_length: bool = False
    choice: Choice | None = None

    @property
    def counts_padding(self) -> bool:
        """Whether a micro-batch may be padded in the end, so that a token budget has to count padding."""
        return not self.flat or self.dense_width > 0

    def pays(self, lengths: Sequence[int]) -> bool:
        """Whether rows of these lengths, in tokens, are laid flat: where they cost less than padded to the longest.

        Matrix products cost about 24 D^2 per token and layer, attention 4 D per pair of tokens that it computes (D: width):
        of a padded row T x T pairs, of a row laid flat N x N where attention is dense.
        """
        if not self.flat:
            return False
        tokens, longest = sum(lengths), max(lengths)
        padded = len(lengths) * longest
        if not self.dense_width:
            return tokens < padded
        products = 6 * self.dense_width
        return tokens * (products + tokens) < padded * (products + longest)


AS_IT_CAME = Layout()


def is_open(wanted: str, packings: Sequence[str]) -> bool:
    """Whether rows are padded or flat as the machine likes: `wanted` leaves it open, and the kind of rows, with `packings`."""
    return wanted == "auto" and packings[0] == "none" and "flat" in packings


def choose_layout(
    packings: Sequence[Packing], takes_flat: bool, trainer: str, key: str, are_loaded: bool = False
) -> Layout:
    """The layout where the user left it open; it changes neither the rows of a step nor its gradient.

    Args:
        packings: of all models that see the rows.
        takes_flat: whether the algorithm lets its micro-batches be cut and laid flat (`takes_flat`).
        trainer: name of the algorithm, for the reason.
        key: how the user says it himself.
        are_loaded: micro-batches come from a loader of the user's, padded as it likes.
    """

    def chosen(value: str, why: str, **how: bool | int) -> Layout:
        return Layout(choice=Choice("layout", value, why, key), **how)  # type: ignore[arg-type]

    if not takes_flat:
        return chosen("as rows come", f"{trainer} does not say that it takes flat batches (takes_flat)")
    may_regroup = not any(packing.couples_rows for packing in packings)
    fault = next((packing.fault for packing in packings if packing.fault), "")
    if fault:
        how = ", rows of similar length together" if may_regroup else ""
        return chosen("padded" + how, fault, by_length=may_regroup)
    dense_width = max((packing.dense_width for packing in packings), default=0)
    why = "rows end to end give the same numbers, tried out on two"
    if dense_width:
        why += "; padded where attention over a flat row would cost more"
    if are_loaded:
        why += "; as they come: batches not padded on the right, or with further tensors per token"
    return chosen("flat", why, flat=True, dense_width=dense_width, by_length=may_regroup and dense_width > 0)


def given_layout(packings: Sequence[Packing], key: str) -> Layout:
    """The layout of a user who asked for flat rows.

    Raises:
        ValueError: a model would score them otherwise than padded ones.
    """
    for packing in packings:
        if packing.fault:
            raise ValueError(
                f"{key}: {packing.fault}; expected a model that scores documents of one row as it scores each alone. Set "
                f"packing to none, or leave it out: the gradient of padded rows is the same"
            )
    return Layout(flat=True)


# The methods that see micro-batches, and so could count on their rows.
OF_MICRO_BATCHES = ("_prepare_batch", "_forward", "_compute_loss", "_loss_weight", "_begin_step")
# Those that see them as they are made, to show something of them.
OF_MADE_ONES = ("_count_tokens", "_get_extra_log_info")


def takes_flat(algorithm: type) -> bool:
    """Whether the machine may cut the micro-batches of an algorithm (`algorithm.Algorithm`) anew and lay them flat.

    `Algorithm.takes_flat` speaks for the methods that its class writes or inherits. A subclass that overrides one of
    them says it again, or its micro-batches stay as they come.
    """
    return _says(algorithm, "takes_flat", OF_MICRO_BATCHES)


def made_flat(algorithm: type) -> Packing:
    """What an algorithm that `takes_flat` makes of rows that are laid flat before it sees any of them, as our streams do."""
    for kind in algorithm.__mro__:
        if "takes_flat" in vars(kind):
            break
        own = [name for name in OF_MADE_ONES if name in vars(kind)]
        if own:
            return Packing(
                f"{kind.__name__} has a {own[0]} of its own, and does not say that it takes flat batches (takes_flat)"
            )
    return Packing()


def takes_images(algorithm: type) -> bool:
    """Whether an algorithm hands the images of its batches to the model: said as `takes_flat`, by who writes `_forward`."""
    return _says(algorithm, "takes_images", ("_forward",))


def _says(algorithm: type, what: str, of_methods: Sequence[str]) -> bool:
    """What is said by the class that writes the methods, or by one derived from it."""
    for kind in algorithm.__mro__:
        if what in vars(kind):
            return bool(vars(kind)[what])
        if any(name in vars(kind) for name in of_methods):
            return False
    return False


def couples_rows(model: "nn.Module") -> bool:
    """Whether what a row contributes depends on the others of its micro-batch, in `model` or in one that it wraps."""
    from torch.nn.modules.batchnorm import _BatchNorm

    return any(isinstance(module, _BatchNorm) for module in model.modules())
