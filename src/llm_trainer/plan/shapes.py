"""The numbers of a model, of the job it is trained in, and of the optimizer, that a plan is made from."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from llm_trainer.config.errors import ConfigError
from llm_trainer.models.experts import expert_shape
from llm_trainer.models.inside import beside_language, is_kind_of, language_config
from llm_trainer.models.quantize import is_quantized_layer, num_values, stored_bytes
from llm_trainer.optim.optimizers import OPTIMIZERS, configure_optimizer, state_bytes
from llm_trainer.plan.tower import Size, Tower, tower_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Adapters:
    """Layers with adapters in an average layer of a transformer, by what enters them.

    Attributes:
        on_hidden, on_attention, on_product: how many are multiplied by hidden states, by what attention returns, and by the
            product in a feed-forward layer.
        ranks: of all of them together.
    """

    on_hidden: float
    on_attention: float
    on_product: float
    ranks: float


NO_ADAPTERS = Adapters(0, 0, 0, 0)  # of layers that are frozen, while something before them learns


@dataclass(frozen=True)
class Quantized:
    """Weights in few bits.

    Attributes:
        bits: of a weight.
        parameters: how many numbers they stand for.
        bytes: that they take with their scales.
        largest: numbers of the largest matrix.
    """

    bits: int = 16
    parameters: int = 0
    bytes: float = 0.0
    largest: int = 0


NOT_QUANTIZED = Quantized()


@dataclass(frozen=True)
class Shape:
    """A transformer as arithmetic sees it.

    Attributes:
        num_parameters: all, tied ones once.
        layer_parameters: of the largest layer.
        product_parameters: in matrices of the layers, which autocast copies to 16 bit.
        num_layers, hidden_size, num_heads, num_kv_heads, head_dim, vocab_size: as in its configuration.
        intermediate_size: width that a token passes in a feed-forward layer (of experts: those chosen; the mean over layers).
        experts_per_token: 0 without experts.
        normed_heads: queries and keys are normalised (Qwen3).
        tied: the head is the embedding matrix.
        frozen_parameters: of all, those that are not trained.
        frozen_head: the head is among them.
        head_rank: of the adapters on it.
        adapters: on what layers they are, none perhaps; None: the layers themselves are trained.
        quantized: what of the weights is kept in few bits.
        tower: what sees images; None: nothing does.
    """

    num_parameters: int
    layer_parameters: int
    product_parameters: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    experts_per_token: int
    normed_heads: bool
    tied: bool
    frozen_parameters: int = 0
    frozen_head: bool = False
    head_rank: int = 0
    adapters: Adapters | None = None
    quantized: Quantized = NOT_QUANTIZED
    tower: Tower | None = None

    def beside(self, other: "Shape") -> "Shape":
        """This model and another one that is trained in the same steps, as one.

        The other's layers count as so many layers of this width as have their parameters.
        """
        layers = round(other.product_parameters / (self.product_parameters / self.num_layers))
        return replace(
            self,
            num_parameters=self.num_parameters + other.num_parameters,
            product_parameters=self.product_parameters + other.product_parameters,
            layer_parameters=max(self.layer_parameters, other.layer_parameters),
            num_layers=self.num_layers + layers,
            frozen_parameters=self.frozen_parameters + other.frozen_parameters,
        )

    @property
    def trained_parameters(self) -> int:
        """Those that have gradients."""
        return self.num_parameters - self.frozen_parameters

    @property
    def language(self) -> Size:
        """Parameters of the language model."""
        beside = Size() if self.tower is None else self.tower.parameters
        return Size(self.num_parameters - beside.number, self.trained_parameters - beside.trained)

    @property
    def trained_share(self) -> float:
        """Of all parameters."""
        return self.trained_parameters / self.num_parameters

    @property
    def vocabulary_parameters(self) -> int:
        """Of one vocabulary table `[V, D]`."""
        return self.vocab_size * self.hidden_size

    @property
    def trained_head(self) -> int:
        """Parameters of the head that have gradients: the table, or the wide matrix of its adapters."""
        return self.head_rank * self.vocab_size if self.frozen_head else self.vocabulary_parameters

    def stored_bytes(self, each: int) -> float:
        """Of all weights, where those that are not quantized have `each`."""
        return each * (self.num_parameters - self.quantized.parameters) + self.quantized.bytes

    def stored_layer_bytes(self, each: int) -> float:
        """The same of one layer."""
        few = self.quantized
        return each * (self.layer_parameters - few.parameters / self.num_layers) + few.bytes / self.num_layers


def shape_of(model: "PreTrainedModel", quantized: Quantized | None = None) -> Shape:
    """The shape of a transformers language model, which may live on the meta device.

    Args:
        model: without the wrapper of adapters.
        quantized: what will be in few bits, where that is not seen in the model.

    Raises:
        ConfigError: it has no stack of equal blocks, so that nothing is known about its activations.
    """
    of_images = set(map(id, beside_language(model)))
    layers, c = _stack(model, of_images), language_config(model.config)
    if layers is None or len(layers) != c.num_hidden_layers:
        raise ConfigError(
            f"model_config: {type(model).__name__} has no single stack of layers; plan cannot describe it"
        )
    values = c.to_dict()
    if not getattr(c, "num_attention_heads", None):
        raise ConfigError(f"model_config: {type(model).__name__} has no attention; plan cannot describe it")
    experts = expert_shape(model)
    width, per_token = values.get("intermediate_size") or 4 * c.hidden_size, 0
    if experts is not None:
        per_token = experts.per_token
    if per_token and values.get("moe_intermediate_size"):
        width = _mean_width(values, per_token, width)
    head_rank, is_frozen = _head_of(model)
    adapters = _adapters_of(layers, c.hidden_size, width)
    if adapters is None and not any(parameter.requires_grad for parameter in layers.parameters()):
        adapters = NO_ADAPTERS
    return Shape(
        num_parameters=_count(model),
        layer_parameters=max(map(_count, layers)),
        product_parameters=sum(num_values(p) for p in layers.parameters() if p.ndim > 1),
        num_layers=len(layers),
        hidden_size=c.hidden_size,
        num_heads=c.num_attention_heads,
        num_kv_heads=values.get("num_key_value_heads") or c.num_attention_heads,
        head_dim=values.get("head_dim") or c.hidden_size // c.num_attention_heads,
        intermediate_size=width,
        vocab_size=cast(Tensor, model.get_input_embeddings().weight).shape[0],
        experts_per_token=per_token,
        normed_heads=any(name.endswith("q_norm.weight") for name, _ in layers.named_parameters()),
        tied=bool(values.get("tie_word_embeddings")),
        frozen_parameters=sum(num_values(p) for p in model.parameters() if not p.requires_grad),
        frozen_head=is_frozen,
        head_rank=head_rank,
        adapters=adapters,
        quantized=quantized or _quantized_of(model),
        tower=tower_of(model),
    )


def _stack(model: nn.Module, of_images: set[int]) -> nn.ModuleList | None:
    """The layers of the language model: the largest list of modules, none of a tower."""
    stacks = []
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and of_images.isdisjoint(map(id, module.parameters())):
            stacks.append(module)
    return max(stacks, key=_count, default=None)


def _mean_width(values: Mapping[str, Any], per_token: int, dense_width: int) -> int:
    """What a token passes in a feed-forward layer, the mean of those with experts, shared ones too, and those without."""
    shared = values.get("shared_expert_intermediate_size") or 0
    shared += (values.get("n_shared_experts") or 0) * values["moe_intermediate_size"]
    width = values["moe_intermediate_size"] * per_token + shared
    num_layers = values["num_hidden_layers"]
    num_dense = len(values.get("mlp_only_layers") or []) or values.get("first_k_dense_replace") or 0
    return round((num_dense * dense_width + (num_layers - num_dense) * width) / num_layers)


def _head_of(model: "PreTrainedModel") -> tuple[int, bool]:
    """The rank of the adapters on the head, and whether its own matrix is frozen."""
    head = model.get_output_embeddings()
    if head is None:
        return 0, False
    rank, inner = _rank(head), getattr(head, "base_layer", head)
    return rank, not any(parameter.requires_grad for parameter in inner.parameters())


def _rank(layer: nn.Module) -> int:
    """Of the adapters on a layer, as LoRA has them."""
    down: Any = getattr(layer, "lora_A", None)
    if down is None:
        return 0
    return sum(matrix.weight.shape[0] for matrix in down.values())


def _adapters_of(layers: nn.Module, hidden_size: int, width: int) -> Adapters | None:
    """What of a stack of layers has adapters."""
    on_hidden, on_attention, on_product, ranks = 0, 0, 0, 0
    for module in layers.modules():
        if not is_kind_of(module, "peft.", "BaseTunerLayer") or not hasattr(module, "in_features"):
            continue
        entering = cast(int, module.in_features)
        on_hidden += entering == hidden_size
        on_product += entering == width != hidden_size
        on_attention += entering not in (hidden_size, width)
        ranks += _rank(module)
    if not any((on_hidden, on_attention, on_product)):
        return None
    num_layers = len(cast(nn.ModuleList, layers))
    return Adapters(on_hidden / num_layers, on_attention / num_layers, on_product / num_layers, ranks / num_layers)


def _quantized_of(model: nn.Module) -> Quantized:
    """What of a model that was loaded is in few bits."""
    few = [module for module in model.modules() if is_quantized_layer(module)]
    if not few:
        return NOT_QUANTIZED
    weights = [cast(Tensor, module.weight) for module in few]
    sizes = [num_values(weight) for weight in weights]
    bits = 4 if is_kind_of(few[0], "bitsandbytes.", "Linear4bit") else 8
    return Quantized(bits, sum(sizes), sum(map(stored_bytes, weights)), max(sizes))


def _count(module: nn.Module) -> int:
    return sum(num_values(parameter) for parameter in module.parameters())


@dataclass(frozen=True)
class Job:
    """What one device does per optimizer step, whatever the strategy.

    Attributes:
        row_tokens: positions of a row, padding included.
        rows: rows of a step on one device: batch size times accumulation, and of each prompt its completions.
        completions: of each row of data, where they are sampled; each is a row of its own.
        rows_per_sample: sequences per row of data: 2 for pairs of answers.
        flops_per_token: of training, forward and backward of the trained model.
        frozen_flops_per_token: of the forward of reference, teacher or reward model.
        frozen_bytes: weights of reference, teacher and reward model, which every device holds in full.
        moving_bytes: those of a reference that moves, which every checkpoint holds too.
        state_bytes: of the optimizer, for all parameters.
        update_bytes: that the optimizer makes besides on a CPU, while it updates the largest parameter.
        precision: fp32, bf16 or fp16.
        has_head: the vocabulary head runs (not in reward models).
        teacher_chunk: elements of the logits at a time that a student is compared with a teacher on; 0: no teacher.
        copy_bytes: of the weights that completions are sampled with, beside the trained ones; every device has all of them.
        cache_bytes: of keys and values, while completions are sampled.
        samples_meanwhile: they are sampled while steps are taken (asynchronous mode).
        disk_bytes: of a rollout, the share of one device.
        images, patches: that a row of data shows, the same image once, and the tower sees; means.
        image_flops: of training, for these.
        frozen_image_flops: of the forward of reference or teacher, for these.
        offloads: what enters layers that are computed again waits in host memory.
    """

    row_tokens: int
    rows: int
    rows_per_sample: int
    flops_per_token: float
    state_bytes: float
    update_bytes: float = 0.0
    precision: str = "bf16"
    frozen_flops_per_token: float = 0.0
    frozen_bytes: float = 0.0
    moving_bytes: float = 0.0
    has_head: bool = True
    teacher_chunk: int = 0
    completions: int = 1
    copy_bytes: float = 0.0
    cache_bytes: float = 0.0
    samples_meanwhile: bool = False
    disk_bytes: float = 0.0
    images: float = 0.0
    patches: float = 0.0
    image_flops: float = 0.0
    frozen_image_flops: float = 0.0
    offloads: bool = False

    @property
    def sample_tokens(self) -> int:
        """Positions of one row of data with all its sequences."""
        return self.row_tokens * self.rows_per_sample

    @property
    def sample_cost(self) -> float:
        """What a row of data takes of a budget in tokens: its positions, and the patches of its images."""
        return self.sample_tokens + self.patches

    @property
    def flops_with_images(self) -> float:
        """Of training, per position."""
        return self.flops_per_token + self.image_flops / self.sample_tokens

    @property
    def frozen_flops_with_images(self) -> float:
        """Of the forward of reference or teacher, per position."""
        return self.frozen_flops_per_token + self.frozen_image_flops / self.sample_tokens


def optimizer_bytes(name: str, momentum: float | None, model: "PreTrainedModel") -> float:
    """Bytes of the state that the optimizer called `name` (a key of `OPTIMIZERS`) keeps for `model`, which may be empty.

    Raises:
        ConfigError: the name is not known.
    """
    if name.lower() not in OPTIMIZERS:
        raise ConfigError(f"optim_config.optim_type: got {name!r}, expected one of {', '.join(OPTIMIZERS)}")
    return float(state_bytes(configure_optimizer(model, name, momentum=momentum)))


def update_bytes(name: str, model: "PreTrainedModel") -> float:
    """Bytes that the optimizer called `name` makes on a CPU, at the worst, while it updates one parameter of `model`."""
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    return 4.0 * OPTIMIZERS[name.lower()].scratch * max(trained, default=0)
