"""The head of a language model, found, tried out, and read instead of called, so that it can run in chunks.

It may be plain, have adapters of `peft`, be saved beside them, have token rows that are trained alone, or be quantised. Of
both libraries only names and attributes stand here: neither is imported where nobody uses it.
"""

from copy import deepcopy
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from llm_trainer.models.inside import (
    adapted_model,
    evaluating,
    is_kind_of,
    language_config,
    sees_images,
    transformers_models,
)
from llm_trainer.models.quantize import dequantized, keep_layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of the largest logit, how far the logits of a head that is read may be from those of the head that is called.
ROUNDING, ROUNDING_HALF = 1e-3, 2e-2


class UnreadableHead(ValueError):
    """A head whose logits are not known without calling it; the message says why, and what helps."""


class HeadWeights(NamedTuple):
    """What a head computes with: its logits are `x @ weight.T + (x @ down.T) @ up.T + bias`.

    Low-rank adapters stay two matrices: their product has the size of the weight, and so would its gradient have, and
    added to a weight in 16 bits what they have learned would be rounded away.

    Attributes:
        weight: `[V, D]`.
        bias: `[V]` or None.
        down: `[R, D]`, of all adapters, times their scaling; None: there are none.
        up: `[V, R]`.
    """

    weight: Tensor
    bias: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None

    def narrowed(self, states: Tensor) -> Tensor | None:
        """`[N, R]`, what the adapters make of `states [N, D]`, which `up` makes logits of."""
        return None if self.down is None else F.linear(states.to(self.down.dtype), self.down)

    def as_one(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """`[N, D']` and `[V, D']` whose product are the logits of `states [N, D]`."""
        inputs, columns = [states], [self.weight]
        if self.up is not None:
            inputs.append(cast(Tensor, self.narrowed(states)).to(states.dtype))
            columns.append(self.up.to(self.weight.dtype))
        if self.bias is not None:  # the weight of one more input, which is 1
            inputs.append(states.new_ones(len(states), 1))
            columns.append(self.bias[:, None])
        if len(inputs) == 1:
            return states, self.weight
        return torch.cat(inputs, dim=1), torch.cat(columns, dim=1)


class Split(NamedTuple):
    """A causal language model taken apart: its logits are exactly those of the head on the backbone's last hidden state."""

    backbone: "PreTrainedModel"
    head: nn.Module


def read_head(head: nn.Module) -> HeadWeights:
    """What a head computes with now; differentiable where it is trained.

    Raises:
        UnreadableHead: nobody knows without calling it.
    """
    if is_kind_of(head, "peft.", "ModulesToSaveWrapper"):
        return read_head(_saved(head))
    if is_kind_of(head, "peft.", "TrainableTokensWrapper"):
        return _with_token_rows(head.token_adapter)
    if is_kind_of(head, "peft.tuners.lora.", "LoraLayer"):
        return _with_low_rank(head)
    if is_kind_of(head, "bitsandbytes.", "Linear4bit"):
        return _dequantised(head)
    if type(head) is not nn.Linear or type(head.weight) not in (Tensor, nn.Parameter, DTensor):
        weight = type(getattr(head, "weight", None)).__name__
        raise UnreadableHead(f"its head is a {type(head).__name__} with a {weight}, expected a linear layer")
    bias = None if head.bias is None else _here(head.bias)
    return HeadWeights(_here(head.weight), bias)


def _here(tensor: Tensor) -> Tensor:
    """A tensor that is replicated over processes (tensor parallelism) as this one has it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _saved(head: Any) -> nn.Module:
    """The copy of a head that is trained and saved beside adapters, or the one it was copied of, while they are off."""
    if head.disable_adapters or not head.active_adapters:
        return cast(nn.Module, head.original_module)
    return cast(nn.Module, head.modules_to_save[head.active_adapters[0]])


def _with_token_rows(layer: Any) -> HeadWeights:
    """A head of which some rows are trained, in a parameter of their own."""
    _take_out(layer)
    if layer.disable_adapters or layer.merged or not layer.active_adapters:
        return read_head(layer.base_layer)
    read_head(layer.base_layer)  # that it can be read
    # NOTE: peft calls such a head without its bias.
    return HeadWeights(_here(layer.get_merged_weights(layer.active_adapters)))


def _with_low_rank(layer: Any) -> HeadWeights:
    """A head with LoRA, rsLoRA or what else peft runs as `lora_B(lora_A(x)) * scaling`."""
    for name in layer.lora_A:
        if name in layer.lora_variant:
            kind = type(layer.lora_variant[name]).__name__
            raise UnreadableHead(f"its head has an adapter that is a {kind}; use plain LoRA, or leave the head out")
        probability = getattr(layer.lora_dropout[name], "p", 0.0)
        if probability:
            raise UnreadableHead(
                f"its head has an adapter with dropout, {probability:g}; set lora_dropout to 0, or leave the head out"
            )
    if type(layer).__name__ not in ("Linear", "Linear4bit"):
        raise UnreadableHead(f"its head is a {type(layer).__name__} of peft; expected LoRA on a linear layer")
    _take_out(layer)
    read = read_head(layer.base_layer)
    if layer.disable_adapters or layer.merged:
        return read
    bias, downs, ups = read.bias, [], []
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        down, up, scaling = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
        downs.append(_here(down.weight) * scaling)
        ups.append(_here(up.weight))
        if up.bias is not None:
            added = _here(up.bias) * scaling
            bias = added if bias is None else bias + added
    if not downs:
        return read
    return HeadWeights(read.weight, bias, torch.cat(downs), torch.cat(ups, dim=1))


def _take_out(layer: Any) -> None:
    """Adapters that are switched off are taken out of a weight that they were merged into, as peft does at the next call."""
    if layer.disable_adapters and layer.merged:
        layer.unmerge()


def _dequantised(head: Any) -> HeadWeights:
    """A head in 4 bits, as it computes: its weight has no gradient."""
    weight = dequantized(head.weight)
    if head.compute_dtype is not None:
        weight = weight.to(head.compute_dtype)
    bias = None if head.bias is None else head.bias.to(weight.dtype)
    return HeadWeights(weight, bias)


def split_of(model: nn.Module) -> tuple[Split | None, str]:
    """Backbone and head of a model whose logits are the head's of the backbone's last hidden state.

    Tried out rather than read from the class: the head's output is replaced by large numbers, so that soft-capping, a
    scale or a second head would show, on two tokens in evaluation mode.

    Returns:
        Both, or None where logits have to be asked of the whole model; and why so, empty where not.
    """
    keep_layout(model)
    try:
        return _split(model), ""
    except UnreadableHead as reason:
        return None, f"{type(model).__name__}: {reason}"


def _split(model: nn.Module) -> Split:
    # 1. the candidates
    outer = _with_head(model)
    head = cast(nn.Module, outer.get_output_embeddings())
    if outer.base_model is outer or outer.config.is_encoder_decoder:
        raise UnreadableHead("it has no body that only its head is behind")
    read = read_head(head)
    split = Split(cast("PreTrainedModel", outer.base_model), head)
    if any(parameter.is_meta for parameter in model.parameters()):  # its weights will come from another process
        if adapted_model(model) is not outer:
            raise UnreadableHead("it cannot be tried out before its weights are here")
        _split(small_sibling(outer))
        return split

    # 2. both ways to the logits
    seen: dict[str, Tensor] = {}

    def replace_logits(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        large = torch.linspace(-100, 100, output.shape[-1], dtype=output.dtype, device=output.device)
        seen["hidden"], seen["output"] = args[0], output
        seen["logits"] = output + large
        return seen["logits"]

    hook = head.register_forward_hook(replace_logits)
    try:
        with evaluating(model), torch.no_grad():
            input_ids = torch.tensor([[0, 1]], device=read.weight.device)
            logits = logits_of(model(input_ids), type(model).__name__)
            hidden = split.backbone(input_ids, use_cache=False).last_hidden_state
            read = read_head(head)  # quantised layers know only now what they compute in
    finally:
        hook.remove()

    # 3. the same? In float32: many models cast what the head returns, as the scores do with theirs.
    other = UnreadableHead("its logits are not those of its head alone: they are capped, scaled, or of other inputs")
    if "logits" not in seen or logits.shape != seen["logits"].shape or hidden.shape != seen["hidden"].shape:
        raise other
    same_logits = torch.allclose(logits.float(), seen["logits"].float(), 1e-4)
    same_hidden = torch.allclose(hidden.float(), seen["hidden"].float(), 1e-3, 1e-4)
    if not (same_logits and same_hidden):
        raise other
    if not _reads_as_it_computes(read, seen["hidden"], seen["output"]):
        raise UnreadableHead("its head computes something else than its weights say")
    return split


@torch.no_grad()
def _reads_as_it_computes(read: HeadWeights, hidden: Tensor, output: Tensor) -> bool:
    """Whether `output [1, T, V]` is what a head says of `hidden [1, T, D]` by its weights."""
    states, weight = read.as_one(hidden[0].to(read.weight.dtype))
    difference = (states @ weight.t() - output[0]).abs().max()
    rounding = ROUNDING_HALF if min(read.weight.itemsize, output.itemsize) < torch.float32.itemsize else ROUNDING
    return bool(difference <= rounding * output.abs().max())


def _with_head(model: nn.Module) -> "PreTrainedModel":
    """The outermost transformers model in `model` with output embeddings."""
    found = None
    for found in transformers_models(model):
        if found.get_output_embeddings() is not None:
            return found
    why = "it is no transformers model" if found is None else "it has no output embeddings"
    raise UnreadableHead(why)


def logits_of(output: Any, name: str) -> Tensor:
    """Logits `[B, T, V]` from what a model returned."""
    if isinstance(output, Tensor):
        return output
    try:
        if isinstance(output, dict):  # transformers' outputs are dicts too
            return output["logits"]
        return output.logits
    except (KeyError, AttributeError):
        raise ValueError(
            f"{name}.forward returned {type(output).__name__}; expected logits [B, T, V] as a tensor, an object with "
            ".logits, or a dict with 'logits'"
        ) from None


def small_sibling(model: "PreTrainedModel") -> "PreTrainedModel":
    """A model of the same class with one layer of each type, a few ids and random weights."""
    config = deepcopy(model.config)
    text = language_config(config)
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = 1, 16, None
    if getattr(text, "layer_types", None):
        text.layer_types = list(dict.fromkeys(text.layer_types))
        text.num_hidden_layers = len(text.layer_types)
    if sees_images(config):
        config.image_token_id = 2
    return type(model)(config)
