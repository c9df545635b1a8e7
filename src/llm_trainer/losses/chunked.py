"""The language-model head and its loss without ever holding the logits of all tokens.

Two ways through the head, both over N supervised tokens laid flat, a few rows of logits `[n, V]` at a time:

* `chunked_loss` and `chunked_objective`: the sum of token losses, of a language model or of any function of a token's
  log-probability and entropy. The gradient of a sum is known before the backward up to one factor, so the forward
  computes it chunk by chunk, in place of the logits, and the backward only multiplies.
* `chunked_logprobs`: one differentiable log-probability (and entropy) per token, for losses that couple tokens (DPO,
  GSPO). The backward computes the logits a second time.

The weight is used as a whole however many tokens there are, so ranks of a sharded engine stay in step.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llm_trainer.kernels import Kernel
from llm_trainer.losses.drawn_from import DrawnFrom, excluding
from llm_trainer.losses.language import LanguageLoss, at_least_float32

# One chunk of logits, in bytes. Fewer chunks mean fewer passes over the weight's gradient; measured on 2 CPU cores at
# V = 151,936 (benchmarks/head.py).
CHUNK_BYTES = 112 * 2**20
# A GPU has no cache to stay in, wants products of thousands of rows, and pays for every kernel that is started.
CHUNK_BYTES_GPU = 512 * 2**20
# A half-precision weight gradient of a chunk is added to the float32 sum in slices of this many bytes: they stay in the
# cache between the product and the sum, and their buffer is reused.
PRODUCT_BYTES = 8 * 2**20
PRODUCT_BYTES_GPU = 512 * 2**20
# Matrix units work on tiles of this many rows.
TILE_ROWS = 32
NO_ADAPTER = (None, None)


class LowRank(NamedTuple):
    """What an adapter of the head adds to the logits: `narrow @ up.T`, and no more of it ever exists than of the logits.

    Attributes:
        narrow: `[N, R]`, made of what the head sees.
        up: `[V, R]`.
    """

    narrow: Tensor
    up: Tensor


class HeadScores(NamedTuple):
    """What the head says about N tokens.

    Attributes:
        loss_sum: scalar, the sum of the token losses; differentiable from `chunked_loss`.
        logprobs: `[N]` log-probability of each label; differentiable from `chunked_logprobs`.
        correct: `[N]` bool, the label has the largest logit (the first such token, as argmax).
        entropy: `[N]` of the predicted distribution in nats, or None when not asked for; differentiable from
            `chunked_logprobs`.
    """

    loss_sum: Tensor
    logprobs: Tensor
    correct: Tensor
    entropy: Tensor | None


# What a token contributes: (log-probs [n], entropies [n], columns [n] by name) -> losses [n], each of its own token alone.
TokenFunction = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Objective:
    """A loss that is a sum over tokens. No tuple, so that no engine looks inside of it for tensors to cast.

    Attributes:
        function: what a token contributes.
        columns: what the function knows of the tokens, `[N]` each; for `ScoredModel`, in the layout of its labels.
    """

    function: TokenFunction
    columns: dict[str, Tensor]


def _statistics(logits: Tensor, labels: Tensor, with_entropy: bool) -> tuple[Tensor, ...]:
    """`logits [n, V]`, `labels [n]` -> label's log-probability, log normaliser, mean log-probability, correct, entropy.

    All `[n]`; the entropy is 0 when not wanted.
    """
    values = at_least_float32(logits)
    largest = values.amax(-1, keepdim=True)
    shifted = values - largest
    exps = shifted.exp()
    total = exps.sum(-1)
    chosen = shifted.gather(-1, labels[:, None])
    # argmax takes the first of equal logits, and in bfloat16 there are many equal ones. Token ids are compared as
    # floats, exact up to 2^24, because integers are not vectorised next to floats.
    ids = torch.arange(logits.shape[-1], dtype=values.dtype, device=logits.device)
    best_before = torch.where(ids < labels[:, None].to(values.dtype), shifted, -torch.inf).amax(-1)
    correct = (chosen.squeeze(-1) == 0) & (best_before < 0)
    # H = log Z - E[logit], of logits shifted so that no large numbers are subtracted.
    entropy = total.log() - (exps * shifted).sum(-1) / total if with_entropy else torch.zeros_like(total)
    logprobs = chosen.squeeze(-1) - total.log()
    mean_logprobs = shifted.mean(-1) - total.log()
    return logprobs, largest.squeeze(-1) + total.log(), mean_logprobs, correct, entropy


def _softmax_gradient(
    logits: Tensor, log_normaliser: Tensor, on_prob: Tensor, on_surprise: Tensor, everywhere: Tensor
) -> None:
    """Overwrites `logits [n, V]` with p * (on_prob + on_surprise * log p) + everywhere; the coefficients are `[n]`."""
    log_probs = at_least_float32(logits) - log_normaliser[:, None]
    factor = on_prob[:, None] + on_surprise[:, None] * log_probs
    logits.copy_(log_probs.exp_().mul_(factor).add_(everywhere[:, None]))


def _add_product(total: Tensor, product: Tensor) -> None:
    """`total [v, D]` float32 += `product [v, D]` in half precision, without a float32 copy of the product."""
    total.add_(product)


statistics = Kernel(_statistics, per_row=2)
softmax_gradient = Kernel(_softmax_gradient, per_row=5)
add_product = Kernel(_add_product, per_row=2)


class LogitCoefficients(NamedTuple):
    """A gradient of logits: p_v * (on_prob + on_surprise * log p_v) + everywhere + on_label * [v = label], all `[n]`."""

    on_prob: Tensor
    on_surprise: Tensor
    everywhere: Tensor
    on_label: Tensor


def _loss_coefficients(
    stats: list[Tensor], weights: Tensor, loss: LanguageLoss, num_tokens: int
) -> tuple[Tensor, LogitCoefficients]:
    """Token losses `[n]` and the gradient of their sum, from the statistics of n tokens and V = `num_tokens`.

    With f and c = `weights` as in `LanguageLoss`:
    d loss / d logit_v = c * (p_v * (f + 2 z log Z) - f * (1 - e) * [v = y] - f * e / V).
    """
    logprobs, log_normaliser, mean_logprobs = stats[:3]
    smoothing = loss.label_smoothing
    factor = logprobs.exp() if loss.dft else torch.ones_like(logprobs)
    losses = -factor * ((1 - smoothing) * logprobs + smoothing * mean_logprobs)
    losses = weights * (losses + loss.z_loss_coef * log_normaliser.square())
    scaled = weights * factor
    return losses, LogitCoefficients(
        on_prob=scaled + 2 * loss.z_loss_coef * weights * log_normaliser,
        on_surprise=torch.zeros_like(scaled),
        everywhere=scaled * (-smoothing / num_tokens),
        on_label=scaled * (smoothing - 1),
    )


def _score_coefficients(on_logprob: Tensor, on_entropy: Tensor, entropy: Tensor) -> LogitCoefficients:
    """The gradient of logits from those of log-probs and entropies, all `[n]`.

    d log p_y / d logit_v = [v = y] - p_v and d H / d logit_v = -p_v * (log p_v + H).
    """
    return LogitCoefficients(
        on_prob=-on_logprob - on_entropy * entropy,
        on_surprise=-on_entropy,
        everywhere=torch.zeros_like(on_logprob),
        on_label=on_logprob,
    )


# (statistics of n tokens, which of the N they are) -> their losses `[n]`, and the gradient of their sum.
Losses = Callable[[list[Tensor], slice], tuple[Tensor, LogitCoefficients]]


def _language_losses(loss: LanguageLoss, labels: Tensor, own_weights: Tensor | None, num_ids: int) -> Losses:
    """Those of `loss`, times `own_weights [N]`."""

    def losses(stats: list[Tensor], rows: slice) -> tuple[Tensor, LogitCoefficients]:
        weights = loss.token_weights(labels[rows])
        if own_weights is not None:
            weights = weights * own_weights[rows]
        return _loss_coefficients(stats, weights, loss, num_ids)

    return losses


def _objective_losses(objective: Objective) -> Losses:
    """Those of `objective`; what it says of a token is differentiated by autograd, on `[n]`."""

    def losses(stats: list[Tensor], rows: slice) -> tuple[Tensor, LogitCoefficients]:
        columns = {name: column[rows] for name, column in objective.columns.items()}
        logprobs, entropy = stats[0].detach().requires_grad_(), stats[4].detach().requires_grad_()
        with torch.enable_grad():
            values = objective.function(logprobs, entropy, columns)
            inputs = logprobs, entropy
            on_logprob, on_entropy = torch.autograd.grad(
                values.sum(), inputs, allow_unused=True, materialize_grads=True
            )
        return values.detach(), _score_coefficients(on_logprob, on_entropy, stats[4])

    return losses


# hidden [N, D], weight [V, D], bias [V], narrow [N, R] and up [V, R], or what belongs to each, such as its gradient.
Operands = Sequence[Tensor | None]
NUM_OPERANDS = 5


class _Head:
    """The matrix products of the head, a chunk of rows at a time, in one reused buffer.

    The operands are in the dtype of the products; gradients of weight, bias and `up` add up in float32 (float64 for
    float64).
    """

    def __init__(self, operands: Operands, drawn_from: DrawnFrom | None = None) -> None:
        hidden, weight, self.bias, self.narrow, self.up = operands
        assert hidden is not None and weight is not None
        self.hidden, self.weight, self.drawn_from = hidden, weight, drawn_from
        chunk_bytes = CHUNK_BYTES if hidden.device.type == "cpu" else CHUNK_BYTES_GPU
        num_rows = max(16, chunk_bytes // (weight.shape[0] * weight.element_size()))
        num_chunks = max(1, -(-len(hidden) // num_rows))
        # Chunks of about equal size, so that the last one is not small, in whole tiles.
        self.rows = -(-len(hidden) // (num_chunks * TILE_ROWS)) * TILE_ROWS
        self.buffer = hidden.new_empty(self.rows, weight.shape[0])

    @cached_property
    def product(self) -> Tensor:
        """The buffer for a slice of the weight's gradient in half precision, `[v, D]`."""
        product_bytes = PRODUCT_BYTES if self.hidden.device.type == "cpu" else PRODUCT_BYTES_GPU
        num_columns, width = self.weight.shape
        num_rows = max(1, product_bytes // (width * 2))
        return self.hidden.new_empty(min(num_columns, num_rows), width)

    def chunks(self) -> list[slice]:
        """Slices of the N rows."""
        return [slice(i, min(i + self.rows, len(self.hidden))) for i in range(0, len(self.hidden), self.rows or 1)]

    def logits(self, rows: slice) -> Tensor:
        """-> `[n, V]`, a view of the buffer: valid until the next call."""
        out = self.buffer[: rows.stop - rows.start]
        torch.mm(self.hidden[rows], self.weight.t(), out=out)
        if self.narrow is not None and self.up is not None:
            out.addmm_(self.narrow[rows], self.up.t())
        if self.bias is not None:
            out.add_(self.bias)
        if self.drawn_from is not None:
            out.copy_(excluding(out, self.drawn_from.excluded(rows, len(self.weight))))
        return out

    def gradient_buffers(self, wanted: Sequence[bool]) -> Operands:
        """Zeros for the gradients of the operands that are `wanted`."""
        precise = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        operands = self.hidden, self.weight, self.bias, self.narrow, self.up
        dtypes = self.hidden.dtype, precise, precise, self.hidden.dtype, precise
        buffers: list[Tensor | None] = []
        for operand, dtype, is_wanted in zip(operands, dtypes, wanted, strict=True):
            buffer = None
            if is_wanted and operand is not None:
                buffer = torch.zeros_like(operand, dtype=dtype)
            buffers.append(buffer)
        return buffers

    def backward(
        self, rows: slice, logits: Tensor, labels: Tensor, stats: list[Tensor], to: LogitCoefficients, into: Operands
    ) -> None:
        """Adds what n tokens, `labels [n]` and `stats` of `[n]`, give to the gradients of the operands.

        The `logits` are overwritten with their gradient.
        """
        logprobs, log_normaliser = stats[:2]
        softmax_gradient(logits, log_normaliser, to.on_prob, to.on_surprise, to.everywhere)
        gradient = logits
        # p_y - 1 in one rounding: in bfloat16 a p_y of 0.999 would be 1.
        at_label = logprobs.exp() * (to.on_prob + to.on_surprise * logprobs) + to.everywhere + to.on_label
        gradient[torch.arange(len(labels), device=labels.device), labels] = at_label.to(gradient.dtype)
        hidden, weight, bias, narrow, up = into
        if hidden is not None:
            torch.mm(gradient, self.weight, out=hidden[rows])
        if weight is not None and weight.dtype == gradient.dtype:
            weight.addmm_(gradient.t(), self.hidden[rows])
        elif weight is not None:
            # A product into float32 does not exist for half-precision factors; slices keep the detour small.
            size = len(self.product)
            for part, columns in zip(weight.split(size), gradient.split(size, dim=-1), strict=True):
                add_product(part, torch.mm(columns.t(), self.hidden[rows], out=self.product[: len(part)]))
        if bias is not None:
            bias.add_(gradient.sum(0, dtype=bias.dtype))
        if narrow is not None and self.up is not None:
            torch.mm(gradient, self.up, out=narrow[rows])
        if up is not None and self.narrow is not None:
            up.add_(torch.mm(gradient.t(), self.narrow[rows]))


def _product_operands(hidden: Tensor, weight: Tensor, *others: Tensor | None) -> Operands:
    """The operands in the dtype in which autocast would multiply them (the weight's, without autocast)."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return _cast((hidden, weight, *others), dtype)


def _cast(operands: Operands, dtype: torch.dtype) -> Operands:
    return [None if operand is None else operand.detach().to(dtype) for operand in operands]


class _LossSum(torch.autograd.Function):
    """Sum of token losses, its gradients computed in the forward."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        labels, token_losses, drawn_from, with_entropy, with_gradient = inputs[NUM_OPERANDS:]
        wanted = [with_gradient and needed for needed in ctx.needs_input_grad[:NUM_OPERANDS]]
        columns: list[list[Tensor]] = []
        operands = _product_operands(*inputs[:NUM_OPERANDS])  # asks autocast, so before it is switched off
        with torch.autocast(labels.device.type, enabled=False):
            head = _Head(operands, drawn_from)
            buffers = head.gradient_buffers(wanted)
            for rows in head.chunks():
                logits = head.logits(rows)
                stats = list(statistics(logits, labels[rows], with_entropy))
                losses, coefficients = token_losses(stats, rows)
                if any(wanted):
                    head.backward(rows, logits, labels[rows], stats, coefficients, buffers)
                columns.append([losses, *stats])
        losses, logprobs, _, _, correct, entropy = _joined(columns, 6, head.buffer)
        ctx.gradients = [None if g is None else g.to(x.dtype) for g, x in zip(buffers, inputs, strict=False)]
        ctx.mark_non_differentiable(logprobs, correct, entropy)
        return losses.sum(), logprobs, correct, entropy

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        if ctx.gradients is None:
            raise RuntimeError("a chunked loss was run backward twice: its gradients are given away by the first time")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [None if g is None else g.mul_(upstream[0]) for g in gradients]
        return *scaled, None, None, None, None, None


class _Logprobs(torch.autograd.Function):
    """Log-probability and entropy of each label; the backward computes the logits again."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        labels, with_entropy, drawn_from = inputs[NUM_OPERANDS:]
        operands = _product_operands(*inputs[:NUM_OPERANDS])
        with torch.autocast(labels.device.type, enabled=False):
            head = _Head(operands, drawn_from)
            columns = [statistics(head.logits(rows), labels[rows], with_entropy) for rows in head.chunks()]
        logprobs, log_normaliser, _, correct, entropy = _joined(columns, 5, head.buffer)
        ctx.dtype, ctx.drawn_from = head.hidden.dtype, drawn_from
        ctx.save_for_backward(*inputs[:NUM_OPERANDS], labels, logprobs, log_normaliser, entropy)
        ctx.mark_non_differentiable(*(correct,) if with_entropy else (correct, entropy))
        return logprobs, correct, entropy

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        *inputs, labels, logprobs, log_normaliser, entropy = ctx.saved_tensors
        on_logprob, _, on_entropy = upstream
        to = _score_coefficients(on_logprob, on_entropy, entropy)
        with torch.autocast(labels.device.type, enabled=False):
            head = _Head(_cast(inputs, ctx.dtype), ctx.drawn_from)
            buffers = head.gradient_buffers(ctx.needs_input_grad[:NUM_OPERANDS])
            for rows in head.chunks():
                stats = [logprobs[rows], log_normaliser[rows]]
                part = LogitCoefficients(*(x[rows] for x in to))
                head.backward(rows, head.logits(rows), labels[rows], stats, part, buffers)
        gradients = [None if g is None else g.to(x.dtype) for g, x in zip(buffers, inputs, strict=True)]
        return *gradients, None, None, None


def _joined(columns: Sequence[Sequence[Tensor]], num_columns: int, like: Tensor) -> list[Tensor]:
    """Per-chunk columns -> `num_columns` tensors `[N]`, empty when there was no chunk; the last but one is bool."""
    if columns:
        return [torch.cat(parts) for parts in zip(*columns, strict=True)]
    empty = [at_least_float32(like.new_empty(0)) for _ in range(num_columns)]
    return [*empty[:-2], empty[-2].bool(), empty[-1]]


def chunked_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    loss: LanguageLoss | None = None,
    with_entropy: bool = False,
    weights: Tensor | None = None,
    low_rank: LowRank | None = None,
) -> HeadScores:
    """The sum of token losses of `softmax(hidden @ weight.T + bias)`, one chunk of tokens at a time.

    Runs backward once: the gradients are computed in the forward and handed over.

    Args:
        hidden: `[N, D]`, what the head sees of the position before each label.
        weight: `[V, D]`.
        bias: `[V]` or None.
        labels: `[N]`, every one a token id.
        loss: what a token contributes.
        with_entropy: also return the entropies.
        weights: `[N]` float, what each token's loss is multiplied by; None: 1.
        low_rank: what an adapter adds to the logits.
    """
    token_losses = _language_losses(loss or LanguageLoss(), labels, weights, len(weight))
    operands = hidden, weight, bias, *(low_rank or NO_ADAPTER)
    scores = _loss_sum(*operands, labels, token_losses, None, with_entropy)
    return scores if with_entropy else scores._replace(entropy=None)


def chunked_objective(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    objective: Objective,
    drawn_from: DrawnFrom | None = None,
    low_rank: LowRank | None = None,
) -> HeadScores:
    """The sum of what `objective` makes of each token's log-probability and entropy, one chunk of tokens at a time.

    Runs backward once, as `chunked_loss`; its other arguments are the same. `drawn_from`: where not from all ids.
    """
    operands = hidden, weight, bias, *(low_rank or NO_ADAPTER)
    return _loss_sum(*operands, labels, _objective_losses(objective), drawn_from, True)


def _loss_sum(*inputs: Any) -> HeadScores:
    # NOTE: inside `forward` gradients always look switched off, so that it has to be given.
    return HeadScores(*_LossSum.apply(*inputs, torch.is_grad_enabled()))


def chunked_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    with_entropy: bool = False,
    drawn_from: DrawnFrom | None = None,
    low_rank: LowRank | None = None,
) -> HeadScores:
    """Differentiable log-probabilities of `labels`; arguments as in `chunked_objective`; `loss_sum` is their negative sum."""
    operands = hidden, weight, bias, *(low_rank or NO_ADAPTER)
    logprobs, correct, entropy = _Logprobs.apply(*operands, labels, with_entropy, drawn_from)
    scores = HeadScores(-logprobs.sum(), logprobs, correct, entropy)
    return scores if with_entropy else scores._replace(entropy=None)
