"""What sees images in a vision-language model as arithmetic sees it: a tower over patches, and the projector behind it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from llm_trainer.models.freezing import PROJECTOR, VISION, parts_of
from llm_trainer.models.inside import sees_images
from llm_trainer.models.quantize import num_values
from llm_trainer.models.vision_build import INTERN_VIT, SIGLIP

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

MEASURED = (*SIGLIP, *INTERN_VIT)  # towers whose live bytes `benchmarks/plan_error.py` has compared


class Size(NamedTuple):
    """Parameters of a part of a model.

    Attributes:
        number: all of them.
        trained: those with gradients.
    """

    number: int = 0
    trained: int = 0

    @classmethod
    def of(cls, parameters: Iterable[Tensor]) -> "Size":
        """Counted; weights in few bits as what they stand for."""
        number = trained = 0
        for parameter in parameters:
            size = num_values(parameter)
            number += size
            trained += size * parameter.requires_grad
        return cls(number, trained)

    def training_flops(self, begins_before: bool) -> int:
        """Of what passes these matrices once: 2 per parameter forward, 2 for the gradient of each that is trained, and 2 for
        the gradients of what enters, where something learns by them.

        Args:
            begins_before: whether something that comes before these learns.
        """
        learns = begins_before or self.trained > 0
        return 2 * self.number + 2 * self.trained + 2 * self.number * learns


@dataclass(frozen=True)
class Tower:
    """A tower and its projector.

    Attributes:
        tower, projector: their parameters.
        tower_products, projector_products: those that multiply every patch, or every token of an image.
        num_layers, hidden_size, num_heads, intermediate_size: of the tower.
        is_gated: its feed-forward layers have two matrices side by side.
        text_size: width of the language model.
        values_per_patch: numbers of `pixel_values` that a patch is made of.
        patches: of an image, where all are made squares of one size; None: their size says it.
        patches_per_token: that become one token.
    """

    tower: Size
    projector: Size
    tower_products: Size
    projector_products: Size
    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    is_gated: bool
    text_size: int
    values_per_patch: int
    patches: int | None
    patches_per_token: float

    @property
    def parameters(self) -> Size:
        """Of both."""
        return Size(self.tower.number + self.projector.number, self.tower.trained + self.projector.trained)

    def flops_per_patch(self, patches: float) -> float:
        """Training FLOPs of a patch in an image of so many: products as `Size.training_flops` counts them, and attention as
        in `models.build.flops_per_token` (PaLM, Chowdhery et al. 2022, arXiv 2204.02311, appendix B): 4 L D P forward and
        twice that backward, where every patch sees all others of its image. The projector sees tokens, one of
        `patches_per_token` patches.
        """
        tower_learns = self.tower_products.trained > 0
        in_tower = self.tower_products.training_flops(begins_before=False)
        attention = 4 * self.num_layers * self.hidden_size * patches * (1 + 2 * tower_learns)
        in_projector = self.projector_products.training_flops(begins_before=tower_learns)
        return in_tower + attention + in_projector / self.patches_per_token

    def forward_flops_per_patch(self, patches: float) -> float:
        """Those of a reference, of which nothing learns."""
        in_projector = 2 * self.projector_products.number / self.patches_per_token
        return 2 * self.tower_products.number + 4 * self.num_layers * self.hidden_size * patches + in_projector

    @property
    def learns(self) -> bool:
        """Whether anything of it does."""
        return self.parameters.trained > 0

    def layer_activations(self, product: int, residual: int) -> float:
        """Bytes per patch that a layer of the tower keeps for its backward, counted as in
        `plan.memory.layer_activations` for layers with LayerNorm and plain feed-forward layers, as SigLIP's are.

        With D the width, F the feed-forward width, e and r the bytes of products and residuals: what enters two norms, 2 r D,
        and their statistics, 16; what enters query, key and value, and the first matrix, in a copy for each where autocast
        casts, 4 e D, else 2 e D; queries, keys, values and what attention returns, 4 e D, its normaliser 4 per head; what the
        feed-forward layer's activation takes and returns, 2 e F, and where it is gated twice that.
        """
        d, e, r = self.hidden_size, product, residual
        entering = (4 if product != residual else 2) * e * d
        attention = 4 * e * d + 4 * self.num_heads
        return 2 * r * d + 16 + entering + attention + (4 if self.is_gated else 2) * e * self.intermediate_size

    def activations(self, product: int, residual: int, checkpointing: bool) -> float:
        """Bytes per patch that are kept from the forward of the tower until its backward, at the end of a micro-batch."""
        if not self.learns:
            return 0.0
        projected = product * (self.hidden_size + 2 * self.text_size / self.patches_per_token)
        placed = residual * self.text_size / self.patches_per_token
        if not self.tower.trained:
            return projected + placed
        layer = self.layer_activations(product, residual)
        if checkpointing:
            layer = residual * self.hidden_size
        cast = product * self.values_per_patch * (product != residual)
        last_norm = residual * self.hidden_size
        return cast + self.num_layers * layer + last_norm + projected + placed

    def at_work(self, product: int, residual: int, checkpointing: bool) -> float:
        """Bytes per patch of the layer whose backward runs."""
        again = self.layer_activations(product, residual) * checkpointing
        return 2 * product * self.intermediate_size + 2 * residual * self.hidden_size + again


def is_known(config: "PretrainedConfig") -> bool:
    """Whether the activations of what sees images in a model of this configuration were measured, or it sees none."""
    return not sees_images(config) or config.vision_config.model_type in MEASURED


def tower_of(model: "PreTrainedModel") -> Tower | None:
    """What sees images in a transformers model, which may live on the meta device; None: nothing does, or nobody knows how."""
    if not sees_images(model.config):
        return None
    c: Any = model.config
    parts = dict(parts_of(model))
    of_part: dict[str, list[tuple[str, nn.Parameter]]] = {VISION: [], PROJECTOR: []}
    for name, parameter in model.named_parameters():
        if parts[name] in of_part:
            of_part[parts[name]].append((name, parameter))
    stack = _stack(model, {id(parameter) for _, parameter in of_part[VISION]})
    if stack is None:
        return None
    widths = [layer.in_features for layer in stack[0].modules() if isinstance(layer, nn.Linear)]
    hidden_size, intermediate_size = min(widths), max(widths)
    wide = [layer for layer in stack[0].modules() if isinstance(layer, nn.Linear) and layer.out_features == max(widths)]
    vision = c.vision_config.to_dict()
    side = _first(vision, ("patch_size",), 1)
    side = side[0] if isinstance(side, list | tuple) else side
    channels = _first(vision, ("num_channels", "in_channels", "in_chans"), 3)
    patches = _patches(vision, side)
    in_layers = {id(parameter) for parameter in stack.parameters()}
    tower_products = []
    for name, parameter in of_part[VISION]:
        is_first = "patch_embed" in name
        if parameter.ndim > 1 and (is_first or id(parameter) in in_layers):
            tower_products.append(parameter)
    projector = [parameter for _, parameter in of_part[PROJECTOR]]
    return Tower(
        tower=Size.of(parameter for _, parameter in of_part[VISION]),
        projector=Size.of(projector),
        tower_products=Size.of(tower_products),
        projector_products=Size.of(parameter for parameter in projector if parameter.ndim > 1),
        num_layers=len(stack),
        hidden_size=hidden_size,
        num_heads=_first(vision, ("num_attention_heads", "num_heads"), 1),
        intermediate_size=intermediate_size,
        is_gated=len(wide) > 1,
        text_size=c.get_text_config().hidden_size,
        values_per_patch=channels * side**2 * _first(vision, ("temporal_patch_size",), 1),
        patches=patches,
        patches_per_token=_patches_per_token(c.to_dict(), vision, patches),
    )


def _stack(model: nn.Module, of_tower: set[int]) -> nn.ModuleList | None:
    """The layers of the tower: the largest list of modules of its parameters that has matrices."""
    found, most = None, 0
    for module in model.modules():
        if not isinstance(module, nn.ModuleList):
            continue
        parameters = list(module.parameters())
        size = sum(map(num_values, parameters))
        if size > most and of_tower.issuperset(map(id, parameters)):
            found, most = module, size
    return found


def _patches(vision: dict[str, Any], side: int) -> int | None:
    """Of an image, where the tower's configuration says it."""
    if "spatial_merge_size" in vision or not vision.get("image_size"):
        return None
    size = vision["image_size"]
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return (height // side) * (width // side)


def _patches_per_token(config: dict[str, Any], vision: dict[str, Any], patches: int | None) -> float:
    """How many patches become one token, as the configurations of the families say it."""
    if patches and config.get("image_seq_length"):
        return patches / config["image_seq_length"]
    if vision.get("spatial_merge_size"):
        return vision["spatial_merge_size"] ** 2
    return _first(config, ("scale_factor",), 1) ** 2


def _first(values: dict[str, Any], names: tuple[str, ...], default: Any) -> Any:
    """The first of some keys that is there."""
    return next((values[name] for name in names if values.get(name)), default)
