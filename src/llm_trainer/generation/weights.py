"""A copy of a model's weights to decode with: in the decoding dtype, and laid out for products with few rows."""

from collections.abc import Iterable, Iterator
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn

from llm_trainer.generation.readers import knows_cache, reads_slots
from llm_trainer.models.inside import adapted_model, is_kind_of

# Products with so many rows are what weights are laid out for; others run with the same layout.
USUAL_ROWS = 32


class WeightsCopy:
    """A model like `like`, without its weights until they are loaded.

    Args:
        like: The trained model; a transformers model may be sharded, its class and configuration are what counts.
        dtype: Of the copy.
        device: Of the copy.

    Attributes:
        model: In evaluation mode and without gradients.
    """

    def __init__(self, like: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self.like, self.dtype, self.device = like, dtype, device
        self.model = _empty_like(like, dtype, device)
        self.model.requires_grad_(False).eval()
        self.packed: dict[str, PackedLinear] = {}  # by the name of the weight
        # Other models may read the weight of a linear layer without calling it.
        read = adapted_model(like)
        if knows_cache(read) and reads_slots(read) and _can_pack(dtype, device):
            self._pack_linear()
        self.targets: dict[str, Tensor] = dict(self.model.named_parameters(remove_duplicate=False))
        for name, buffer in self.model.named_buffers(remove_duplicate=False):
            self.targets[name] = buffer

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take over all weights.

        Raises:
            ValueError: A tensor is unknown, missing, or of another shape.
        """
        # 1. what arrives
        arrived: set[str] = set()
        for name, tensor in weights:
            expected = self.packed[name].shape if name in self.packed else self._target(name).shape
            if tensor.shape != expected:
                raise ValueError(
                    f"{name} arrived as {list(tensor.shape)}, the sampler's copy has {list(expected)}: its model is "
                    "another one than the trained model"
                )
            if name in self.packed:
                self.packed[name].pack(tensor.detach().to(self.device, self.dtype))
            if name in self.targets:
                self.targets[name].copy_(tensor.detach())
            arrived.add(name)

        # 2. what does not: buffers that no checkpoint holds, and the other names of tensors that have several
        have = {id(self.targets[name]) for name in arrived & self.targets.keys()}
        for name, buffer in self.like.named_buffers():
            if name not in arrived and name in self.targets:
                self.targets[name].copy_(buffer)
                have.add(id(self.targets[name]))
        missing = [name for name, target in self.targets.items() if id(target) not in have]
        missing += [name for name in self.packed if name not in arrived and name not in self.targets]
        if missing:
            raise ValueError(
                f"{len(missing)} tensors of the sampler's copy did not arrive, {missing[0]} is the first: every load "
                "must bring all weights of the model"
            )
        for name, linear in self.packed.items():
            if name not in arrived:  # the head that is the embedding
                linear.pack(self.targets[name])

    def held(self) -> Iterator[tuple[str, Tensor]]:
        """What is decoded with, under all its names; packed weights are unpacked one at a time."""
        for name, tensor in self.model.state_dict().items():
            if name not in self.packed:
                yield name, tensor
        for name, linear in self.packed.items():
            yield name, linear.unpacked()

    def _target(self, name: str) -> Tensor:
        if name not in self.targets:
            raise ValueError(
                f"{name} is no tensor of the sampler's copy: its model is another one than the trained one"
            )
        return self.targets[name]

    def _pack_linear(self) -> None:
        """Have the linear layers keep their weights as the processor multiplies fastest."""
        owners: dict[int, int] = {}
        for _, parameter in self.model.named_parameters(remove_duplicate=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
        called = _called_alone(self.model)
        for name, module in self.model.named_modules():
            if type(module) is nn.Linear and module in called:
                linear = PackedLinear(module)
                module.forward = linear  # type: ignore[method-assign, assignment]
                self.packed[f"{name}.weight"] = linear
                if owners[id(module.weight)] == 1:
                    del module.weight  # its own copy is packed; one that others share stays plain for them


def _called_alone(model: nn.Module) -> set[nn.Module]:
    """The layers whose weights nobody reads: of those with adapters the base of plain LoRA alone."""
    called = set(model.modules())
    for module in model.modules():
        if is_kind_of(module, "peft.", "BaseTunerLayer") or is_kind_of(module, "peft.", "AuxiliaryTrainingWrapper"):
            called.difference_update(module.modules())
        if is_kind_of(module, "peft.tuners.lora.layer", "Linear") and not module.lora_variant:
            called.add(cast(nn.Module, module.base_layer))
    return called


class PackedLinear:
    """The forward of a linear layer whose weight is laid out once, not for every product.

    On two cores with AMX a token of 32 rows of the 27 M model took 9 ms of products instead of 14 (bf16), and 26 instead
    of 32 (fp32).
    """

    def __init__(self, module: nn.Linear) -> None:
        self.module, self.shape = module, module.weight.shape
        self.weight: Tensor | None = None

    def pack(self, weight: Tensor) -> None:
        """Use `weight [out, in]` from now on."""
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), USUAL_ROWS)

    def unpacked(self) -> Tensor:
        """The weight that is used, bit for bit."""
        assert self.weight is not None
        return self.weight.to_dense()

    def __call__(self, inputs: Tensor) -> Tensor:
        assert self.weight is not None
        return torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.module.bias, "none", [], "")


def _can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch multiplies packed weights of this dtype here."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def is_sharded(model: nn.Module) -> bool:
    """Whether no process has all of the weights: FSDP2, ZeRO-3."""
    from torch.distributed.fsdp import FSDPModule

    is_fsdp = any(isinstance(module, FSDPModule) for module in model.modules())
    return is_fsdp or any("ds_id" in vars(parameter) for parameter in model.parameters())


def _empty_like(model: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A model of the same kind whose parameters hold anything."""
    from torch.distributed.fsdp import FSDPModule
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        if is_sharded(model):
            raise ValueError(
                f"engine: the weights are sharded, and completions are drawn with a copy of them, which is made by the "
                f"configuration of a transformers model; got {type(model).__name__}. Use engine: torch"
            )
        return deepcopy(model).to(device, dtype)
    # What shards a model adds a class of its own in front of it.
    kinds = [kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule)]
    # NOTE: not `_from_config`, which shards what it makes where a run uses ZeRO-3.
    with torch.device("meta"):
        empty: Any = kinds[0](deepcopy(model.config))  # type: ignore[call-arg]
    for parameter in empty.parameters():  # buffers keep their type: rotations are in float32
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    empty = empty.to_empty(device=device)
    empty.tie_weights()
    return empty
