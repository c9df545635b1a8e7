"""A language model whose forward ends in per-token scores instead of logits.

`scored(model)` wraps any causal language model. Where the model is a transformers backbone followed by nothing but a
linear head, the head runs in chunks and `[B, T, V]` logits never exist; every other model is called as it is and its
logits are scored. Both give the same numbers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm_trainer.image_batch import of_images
from llm_trainer.losses.chunked import HeadScores, LowRank, Objective, chunked_logprobs, chunked_loss, chunked_objective
from llm_trainer.losses.drawn_from import DrawnFrom, excluding
from llm_trainer.losses.experts import Routing, count_chosen, count_routes
from llm_trainer.losses.language import IGNORE, LanguageLoss, at_least_float32, flat_losses
from llm_trainer.models.attention import KNOWN, document_bounds, knows_branches
from llm_trainer.models.experts import Routes, biased_routers, expert_shape, experts_of, recorded_routers
from llm_trainer.models.heads import logits_of, read_head, split_of
from llm_trainer.models.inside import language_config, transformers_model
from llm_trainer.models.overrides import check_steady, steady_context
from llm_trainer.models.seeing import Seeing, accepted_inputs
from llm_trainer.models.vision import Features, Images, SeenOnce


class TokenScores(NamedTuple):
    """What a model says about the labels of a batch. Supervised: a label other than -100, after position 0.

    Attributes:
        loss_sum: scalar, the token losses, times their weights, summed over the supervised tokens; differentiable. Of an
            objective: what it makes of them.
        num_tokens: scalar int64, the number of supervised tokens.
        logprobs: `[B, T]`, log-probability of the token AT each position, 0 where unsupervised; differentiable only when
            asked for.
        correct: `[B, T]` bool, the label is the most probable token.
        entropy: `[B, T]` in nats of the distribution that predicts each position, or None; differentiable as `logprobs`.
        routing: what the routers of a mixture of experts did with the tokens, padding left out, or None.
        distance: what `distance` made of the states before the supervised labels, or None.
    """

    loss_sum: Tensor
    num_tokens: Tensor
    logprobs: Tensor
    correct: Tensor
    entropy: Tensor | None
    routing: Routing | None
    distance: Tensor | None = None


# A scalar, or `[N]`, of the states that predict N tokens and the head that reads them; see `ScoredModel.states`.
Distance = Callable[[Tensor, nn.Module | None], Tensor]


class _How(NamedTuple):
    """How N tokens are scored: the arguments of `ScoredModel.forward` of that name, laid flat."""

    weights: Tensor | None
    differentiable: bool
    temperature: float
    objective: Objective | None
    drawn_from: DrawnFrom | None

    @property
    def wants_scores(self) -> bool:
        """Whether log-probs and entropies are differentiated."""
        return self.differentiable or self.drawn_from is not None or self.objective is not None


class ScoredModel(Seeing, nn.Module):
    """Wraps a causal language model so that its forward returns `TokenScores`.

    Attributes:
        base: the user's module, untouched: its parameter names, its `generate`, its `save_pretrained`.
        loss: what a token contributes to `loss_sum`.
        with_entropy: whether entropies are computed.
        whole_logits: why the head does not run in chunks; empty where it does.
    """

    def __init__(self, model: nn.Module, loss: LanguageLoss | None = None, with_entropy: bool = True) -> None:
        super().__init__()
        self.base = model
        self.loss = loss or LanguageLoss()
        self.with_entropy = with_entropy
        self._split, self.whole_logits = split_of(model)  # a tuple, so that no parameter gets a second name
        self._experts = experts_of(model)
        routers = biased_routers(model)
        self._routes: Routes | None = None  # whom routers choose that a bias balances, or that are told whom to take
        if routers:
            self._routes = Routes(list(routers.values()))
        self._look(model)
        self._causal = self._split is not None and self._language_config.model_type in KNOWN
        self._accepted = accepted_inputs(model)
        inner = transformers_model(model)
        self._steady = None if inner is None else steady_context(inner.config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_lengths: Tensor | None = None,
        labels: Tensor | None = None,
        differentiable_logprobs: bool = False,
        temperature: float = 1.0,
        distance: Distance | None = None,
        repeats: Tensor | None = None,
        loss_weights: Tensor | None = None,
        objective: Objective | None = None,
        drawn_from: DrawnFrom | None = None,
        routes: Tensor | None = None,
        images: Images | Features | SeenOnce | None = None,
        rope_positions: Tensor | None = None,
        **model_inputs: Any,
    ) -> TokenScores:
        """Score `labels` under the model.

        Args:
            input_ids: `[B, T]`; documents laid flat: `[1, N]`.
            attention_mask: `[B, T]`, 0 on padding; None for flat batches.
            position_ids: `[B, T]`, restarting at 0 in every document of a flat batch.
            document_lengths: of a flat batch; read only when there are no `position_ids`.
            labels: `[B, T]` un-shifted, -100 where nothing counts; by default `input_ids` without padding.
            differentiable_logprobs: `logprobs` and `entropy` carry gradients; `loss_sum` is then the plain negative
                log-likelihood. Costs one more run of the head in the backward.
            temperature: the logits are divided by it.
            distance: something else, differentiable, of what the head is given, such as how far it is from a teacher.
            loss_weights: `[B, T]` what the loss of each label is multiplied by in `loss_sum`; None: 1.
            repeats: `[B, T]` how many tokens each one stands for in `routing`: those that branches share are several.
            objective: `loss_sum` is its sum over the supervised tokens, made in one run of the head; its columns `[B, T]`.
            drawn_from: the ids that the softmax is taken over, where not over all; its counts `[B, T]`.
            routes: `[B, T, R]` the experts that each token takes in all layers (`models.experts.Routes.told`); None: its own.
            images: those of the batch, or what `vision.encode` has made of them; None: it has none. Images without a use are
                encoded, and count for nothing.
            rope_positions: `[3, B, T]` of `models.vision.rope_positions`; made here where they are needed and not given.
            model_inputs: handed to the model as they are.
        """
        # 1. which positions are scored
        if labels is None:
            labels = input_ids
            if attention_mask is not None:
                labels = labels.masked_fill(attention_mask == 0, IGNORE)
        supervised = labels[:, 1:] != IGNORE  # (B, T - 1)
        chosen = labels[:, 1:][supervised]  # (N,)
        weights = None if loss_weights is None else loss_weights[:, 1:][supervised].float()  # (N,)
        if objective is not None:
            columns = {name: column[:, 1:][supervised] for name, column in objective.columns.items()}
            objective = Objective(objective.function, columns)
        if drawn_from is not None:
            drawn_from = drawn_from.of(F.pad(supervised, (1, 0)))
        how = _How(weights, differentiable_logprobs, temperature, objective, drawn_from)

        # 2. the model, up to what its head is given
        self._tell(routes)
        given = {"attention_mask": attention_mask, "position_ids": position_ids, **model_inputs}
        given |= {"images": images, "rope_positions": rope_positions}
        states, output = self.states(input_ids, supervised, document_lengths=document_lengths, **given)
        if self._routes is not None:
            self._routes.is_inside = False

        # 3. the head and the scores
        if self._split is None:
            scores = self._scores_of_logits(states, chosen, how)
        else:
            scores = self._scores_of_hidden(states, chosen, how)

        # 4. back to the shape of the labels
        entropy = None
        if scores.entropy is not None:
            entropy = _spread(scores.entropy, supervised)
        token_weights = attention_mask if repeats is None else repeats
        token_scores = TokenScores(
            loss_sum=scores.loss_sum,
            num_tokens=supervised.sum(),
            logprobs=_spread(scores.logprobs, supervised),
            correct=_spread(scores.correct, supervised),
            entropy=entropy,
            routing=self._routing(output, token_weights),
        )
        if distance is not None:
            token_scores = token_scores._replace(distance=distance(states, self.head))
        return token_scores

    def per_token(self, input_ids: Tensor, **layout: Any) -> Tensor:
        """Log-probabilities of `input_ids [B, T]` or `[1, N]`, of the same shape; `layout` as in `forward`."""
        return self(input_ids, **layout).logprobs

    def knows_branches(self, device: torch.device) -> bool:
        """Whether flat batches may have branches (see `models.attention`) when the model runs on `device`."""
        return self._split is not None and knows_branches(self._language_config, device)

    @property
    def _language_config(self) -> Any:
        assert self._split is not None
        return language_config(self._split.backbone.config)

    @property
    def head(self) -> nn.Module | None:
        """The layer that makes logits of `states`, or None where these are the logits."""
        return None if self._split is None else self._split.head

    def states(
        self,
        input_ids: Tensor,
        supervised: Tensor,
        position_ids: Tensor | None = None,
        document_lengths: Tensor | None = None,
        images: Images | Features | SeenOnce | None = None,
        rope_positions: Tensor | None = None,
        **model_inputs: Any,
    ) -> tuple[Tensor, Any]:
        """What the head is given to predict the labels after position 0 that are `supervised [B, T - 1]`.

        Returns:
            Hidden states `[N, D]`, or logits `[N, V]` where the model does not come apart; and what the model returned.
        """
        if self._steady is not None and input_ids.shape[1] > self._steady:  # else nobody waits for the device
            longest = input_ids.shape[1] if document_lengths is None else int(document_lengths.max())
            check_steady(longest, self._steady, "a micro-batch")
        # 1. what the model is called with
        if position_ids is None and document_lengths is not None:
            position_ids = restarting_positions(document_lengths).to(input_ids.device)
        given = {"position_ids": position_ids, **model_inputs}
        inputs = self._inputs(given, is_packed=document_lengths is not None)
        if self._split is not None:
            inputs |= document_bounds(self._language_config, input_ids, position_ids, document_lengths)
        features, zero = self._seen(images, brings_pixels=bool(of_images(model_inputs)))
        if self.vision.model is not None:
            mask = model_inputs.get("attention_mask")
            inputs |= self.vision.inputs(input_ids, features, mask, position_ids, rope_positions)
        # 2. its states
        output = self._run(input_ids, **inputs)
        if self._split is None:
            states = logits_of(output, type(self.base).__name__)  # (B, T, V)
        else:
            states = output.last_hidden_state  # (B, T, D)
        states = states[:, :-1][supervised]
        if zero is not None:
            states = states + zero.to(states.dtype)
        return states, output

    def _call(self, input_ids: Tensor, **inputs: Any) -> Any:
        """The part of the model that is called as a module: all of it, or all but the head."""
        called = self.base if self._split is None else self._split.backbone
        return called(input_ids, **inputs)

    def _inputs(self, given: dict[str, Any], is_packed: bool) -> dict[str, Any]:
        """What of `given` the model is called with."""
        inputs = {name: value for name, value in given.items() if value is not None}
        if is_packed and self._accepted is not None and "position_ids" not in self._accepted:
            raise ValueError(
                f"{type(self.base).__name__}.forward takes no position_ids, so documents laid flat in one row would see "
                "each other; train it on padded batches (packing off), or give it the argument"
            )
        if self._causal and "attention_mask" in inputs and _padded_on_the_right(inputs["attention_mask"]):
            del inputs["attention_mask"]  # no token looks at what comes after it, and no mask has to be made
        if self._accepted is not None:
            inputs = {name: value for name, value in inputs.items() if name in self._accepted}
        if self._split is not None:
            inputs["use_cache"] = False
        if self._experts is not None:
            inputs["output_router_logits"] = True
        return inputs

    def _scores_of_hidden(self, hidden: Tensor, chosen: Tensor, how: _How) -> HeadScores:
        """`hidden [N, D]`, `chosen [N]`."""
        assert self._split is not None
        weight, bias, _, up = head = read_head(self._split.head)
        if how.temperature != 1.0:  # (x / t) W + b / t, without touching the logits
            hidden = hidden / how.temperature
            if bias is not None:
                bias = bias / how.temperature
        narrow = head.narrowed(hidden)
        low_rank = None if narrow is None or up is None else LowRank(narrow, up)
        if how.objective is not None:
            return chunked_objective(hidden, weight, bias, chosen, how.objective, how.drawn_from, low_rank)
        if how.differentiable or how.drawn_from is not None:
            return chunked_logprobs(hidden, weight, bias, chosen, self.with_entropy, how.drawn_from, low_rank)
        return chunked_loss(hidden, weight, bias, chosen, self.loss, self.with_entropy, how.weights, low_rank)

    def _scores_of_logits(self, logits: Tensor, chosen: Tensor, how: _How) -> HeadScores:
        """`logits [N, V]`, `chosen [N]`: the same scores by autograd."""
        logits = logits / how.temperature
        if how.drawn_from is not None:
            excluded = how.drawn_from.excluded(slice(0, len(chosen)), logits.shape[-1])
            logits = excluding(logits, excluded)
        values, logprobs = flat_losses(logits, chosen, self.loss, how.weights)
        correct = logits.argmax(-1) == chosen
        entropy = None
        if self.with_entropy or how.objective is not None:
            with torch.set_grad_enabled(how.wants_scores and torch.is_grad_enabled()):
                log_probs = at_least_float32(logits).log_softmax(-1)
                entropy = -(log_probs.exp() * log_probs).sum(-1)
        if how.objective is not None:
            assert entropy is not None
            losses = how.objective.function(logprobs, entropy, how.objective.columns)
            return HeadScores(losses.sum(), logprobs.detach(), correct, entropy.detach())
        if how.wants_scores:
            return HeadScores(-logprobs.sum(), logprobs, correct, entropy)
        return HeadScores(values.sum(), logprobs.detach(), correct, entropy)

    def _routing(self, output: Any, token_weights: Tensor | None) -> Routing | None:
        chosen = None if self._routes is None else self._routes.chosen
        if self._experts is not None:
            return count_routes(output.router_logits, self._experts.per_token, token_weights, chosen)
        shape = expert_shape(self.base)
        if chosen is None or shape is None:
            return None
        return count_chosen(chosen, shape.number, token_weights)

    def _tell(self, routes: Tensor | None) -> None:
        """Tell routers whom to take in the forward to come, and in its recomputation; None: whom they choose."""
        if routes is not None and self._routes is None:
            self._routes = Routes(list(recorded_routers(self.base).values()))
        if self._routes is not None:
            self._routes.is_inside = True
            self._routes.told = None if routes is None else routes.flatten(0, 1)


def scored(model: nn.Module, loss: LanguageLoss | None = None, with_entropy: bool = True) -> ScoredModel:
    """`model` with a forward that ends in per-token scores.

    Args:
        model: any causal language model whose forward takes `input_ids [B, T]` (and, where it has them,
            `attention_mask` and `position_ids`) and returns logits `[B, T, V]` as a tensor, as `.logits`, or as
            `["logits"]`.
        loss: what a token contributes to `loss_sum`.
        with_entropy: compute the entropy of every prediction (nearly free).
    """
    return ScoredModel(model, loss, with_entropy)


def restarting_positions(document_lengths: Tensor) -> Tensor:
    """`document_lengths [K]` -> `[1, N]`: 0, 1, 2, ... in every document."""
    starts = document_lengths.cumsum(0) - document_lengths
    positions = torch.arange(int(document_lengths.sum()), device=document_lengths.device)  # (N,), of the whole row
    return (positions - starts.repeat_interleave(document_lengths))[None]


def _spread(values: Tensor, supervised: Tensor) -> Tensor:
    """`values [N]`, `supervised [B, T - 1]` -> `[B, T]`, each at the position of its label and 0 elsewhere."""
    rows, length = supervised.shape
    full = values.new_zeros(rows, length).masked_scatter(supervised, values)
    return torch.cat([full.new_zeros(rows, 1), full], dim=1)


def _padded_on_the_right(attention_mask: Tensor) -> bool:
    """Every row of `[B, T]` is ones, then zeros. The host waits for the device."""
    mask = attention_mask.bool()
    return bool(mask[:, 0].all() & (mask[:, 1:] <= mask[:, :-1]).all())
