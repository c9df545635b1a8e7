"""The numbers of a model, of the job it is trained in, and of the optimizer, that a plan is made from."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from llm_trainer.config.errors import ConfigError
from llm_trainer.models.experts import expert_shape
from llm_trainer.models.inside import language_config
from llm_trainer.models.quantize import num_values
from llm_trainer.optim.optimizers import OPTIMIZERS, configure_optimizer, state_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    def trained_share(self) -> float:
        """Of all parameters."""
        return self.trained_parameters / self.num_parameters

    @property
    def vocabulary_parameters(self) -> int:
        """Of one vocabulary table `[V, D]`."""
        return self.vocab_size * self.hidden_size


def shape_of(model: "PreTrainedModel") -> Shape:
    """The shape of a transformers language model, which may live on the meta device.

    Raises:
        ConfigError: it has no stack of equal blocks, so that nothing is known about its activations.
    """
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = max(stacks, key=_count, default=None)
    c = language_config(model.config)
    if layers is None or len(layers) != c.num_hidden_layers:
        raise ConfigError(
            f"model_config: {type(model).__name__} has no single stack of layers; plan cannot describe it"
        )
    values = c.to_dict()
    experts = expert_shape(model)
    width, per_token = values.get("intermediate_size") or 4 * c.hidden_size, 0
    if experts is not None:
        per_token = experts.per_token
    if per_token and values.get("moe_intermediate_size"):
        width = _mean_width(values, per_token, width)
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
        frozen_parameters=sum(p.numel() for p in model.parameters() if not p.requires_grad),
        frozen_head=_is_frozen(model.get_output_embeddings()),
    )


def _mean_width(values: Mapping[str, Any], per_token: int, dense_width: int) -> int:
    """What a token passes in a feed-forward layer, the mean of those with experts, shared ones too, and those without."""
    shared = values.get("shared_expert_intermediate_size") or 0
    shared += (values.get("n_shared_experts") or 0) * values["moe_intermediate_size"]
    width = values["moe_intermediate_size"] * per_token + shared
    num_layers = values["num_hidden_layers"]
    num_dense = len(values.get("mlp_only_layers") or []) or values.get("first_k_dense_replace") or 0
    return round((num_dense * dense_width + (num_layers - num_dense) * width) / num_layers)


def _is_frozen(head: nn.Module | None) -> bool:
    return head is not None and not any(parameter.requires_grad for parameter in head.parameters())


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
        frozen_flops_per_token: of the forward of reference or teacher.
        frozen_bytes: weights of reference or teacher, which every device holds in full.
        moving_bytes: those of a reference that moves, which every checkpoint holds too.
        state_bytes: of the optimizer, for all parameters.
        precision: fp32, bf16 or fp16.
        has_head: the vocabulary head runs (not in reward models).
        teacher_chunk: elements of the logits at a time that a student is compared with a teacher on; 0: no teacher.
        copy_bytes: of the weights that completions are sampled with, beside the trained ones; every device has all of them.
        cache_bytes: of keys and values, while completions are sampled.
        disk_bytes: of a rollout, the share of one device.
    """

    row_tokens: int
    rows: int
    rows_per_sample: int
    flops_per_token: float
    state_bytes: float
    precision: str = "bf16"
    frozen_flops_per_token: float = 0.0
    frozen_bytes: float = 0.0
    moving_bytes: float = 0.0
    has_head: bool = True
    teacher_chunk: int = 0
    completions: int = 1
    copy_bytes: float = 0.0
    cache_bytes: float = 0.0
    disk_bytes: float = 0.0

    @property
    def sample_tokens(self) -> int:
        """Positions of one row of data with all its sequences."""
        return self.row_tokens * self.rows_per_sample


def optimizer_bytes(name: str, momentum: float | None, model: "PreTrainedModel") -> float:
    """Bytes of the state that the optimizer called `name` (a key of `OPTIMIZERS`) keeps for `model`, which may be empty.

    Raises:
        ConfigError: the name is not known.
    """
    if name.lower() not in OPTIMIZERS:
        raise ConfigError(f"optim_config.optim_type: got {name!r}, expected one of {', '.join(OPTIMIZERS)}")
    return float(state_bytes(configure_optimizer(model, name, momentum=momentum)))
