"""The model and the work of a run as arithmetic sees them, from its configuration alone; no weights are made."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

from llm_trainer.config.errors import ConfigError
from llm_trainer.config.model import VLMConfig
from llm_trainer.config.registry import accumulation, options_of
from llm_trainer.config.table import ALGORITHMS
from llm_trainer.data.encode.tokenizer import load_tokenizer
from llm_trainer.models.adapters import adapt
from llm_trainer.models.build import build_config, flops_per_token, model_of_config, refuse_overrides
from llm_trainer.models.freezing import freeze_parts, parts_to_freeze
from llm_trainer.models.inside import model_context
from llm_trainer.models.overrides import overridden
from llm_trainer.models.pretrained import Kind, find_pretrained
from llm_trainer.models.rewarding import REWARD_MODELS, reward_model
from llm_trainer.models.targets import ends_in
from llm_trainer.models.vision import unreached_if_known
from llm_trainer.models.vocabulary import check_rows, extend_rows, extend_tokenizer, num_ids
from llm_trainer.plan.shapes import Job, Quantized, Shape, optimizer_bytes, shape_of, update_bytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from llm_trainer.config.quantization import QuantizationConfig
    from llm_trainer.config.schema import TrainConfig

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
MAX_ROWS, MAX_CACHE_BYTES = 64, 4 * 2**30  # of `generation.in_process.InProcess`
ON_DISK = 9  # bytes of a token of a rollout: id, whether it is trained on, log-probability that it was drawn with


class Shown(NamedTuple):
    """What rows of data show.

    Attributes:
        images: different ones in a row, on average.
        patches: that the tower sees of each; None: as many as its configuration says.
    """

    images: float = 1.0
    patches: int | None = None


ONE_IMAGE = Shown()


def describe(config: "TrainConfig", name: str, has_bf16: bool = True, shown: Shown = ONE_IMAGE) -> tuple[Shape, Job]:
    """The model and the work of a step on one device, for the algorithm called `name`.

    Args:
        config: the whole run.
        name: of the algorithm.
        has_bf16: what 16 bit means on the device.
        shown: to a model that sees.

    Raises:
        ConfigError: the configuration does not say what the model looks like.
    """
    trainer_class = ALGORITHMS[name].load()
    model = without_weights(config)
    length = config.dataset_block_size or model_context(model)
    if length is None:
        raise ConfigError(
            f"dataset_block_size: none given, and a {type(model).__name__} does not say how long its rows may be; expected "
            f"a number of tokens"
        )
    precision = config.run_config.precision
    if precision == "auto":
        precision = "bf16" if has_bf16 else "fp16"
    rows = config.batch_size * accumulation(config, trainer_class)
    adapters = config.adapter_config
    section = options_of(config, trainer_class)
    sketch = Sketch(section, model, length, rows, precision, adapters is not None, config.eval_dataset is not None)
    costs: dict[str, Any] = {"rows_per_sample": 1, "has_head": True, "row_tokens": length, "rows": rows}
    costs |= trainer_class._plan_costs(config, sketch)
    critic, further_share = costs.pop("critic", None), costs.pop("further_share", 0.0)
    if not costs["has_head"]:
        with torch.device("meta"):
            model = reward_model(model)
    quantized = None
    if config.quantization_config is not None:
        name = config.quantization_config.of_whole_weights
        if name:
            raise ConfigError(
                f"quantization_config.{name}: plan does not know what rounded weights take in a step; expected none: the run "
                f"takes more than without it"
            )
        quantized = quantized_by(model, config.quantization_config)
    if adapters is not None:
        vocabulary = config.vocabulary_config
        new_tokens = range(len(vocabulary.add_tokens) + len(vocabulary.add_special_tokens))  # how many count here
        model = cast("PreTrainedModel", adapt(model, adapters, new_tokens).get_base_model())
    else:
        freeze_parts(model, parts_to_freeze(config.freeze, section))
        for name in unreached_if_known(model):
            model.get_parameter(name).requires_grad_(False)
    shape = shape_of(model, quantized)
    flops = _flops(model, costs["row_tokens"], costs["has_head"])
    optim = config.optim_config
    state = optimizer_bytes(optim.optimizer, optim.momentum, model)
    costs["update_bytes"] = update_bytes(optim.optimizer, model)
    if critic is not None:
        flops += _flops(critic, costs["row_tokens"], has_head=False)
        state += optimizer_bytes(optim.optimizer, optim.momentum, critic)
        shape = shape.beside(shape_of(critic))
    flops *= 1 + further_share
    costs["offloads"] = config.run_config.activation_offload
    job = Job(flops_per_token=flops, state_bytes=state, precision=precision, **costs)
    return shape, _with_images(shape, job, shown)


def _with_images(shape: Shape, job: Job, shown: Shown) -> Job:
    """The same work with what rows of data show."""
    tower = shape.tower
    if tower is None:
        return job
    each = shown.patches or tower.patches
    if each is None or not shown.images:
        return job  # nobody knows what an image is
    images = shown.images / job.completions  # those of a group are the same
    reference = 0.0
    if job.frozen_flops_per_token and tower.learns:  # one that sees alike takes what the model has made
        reference = images * each * tower.forward_flops_per_patch(each)
    return replace(
        job,
        images=images,
        patches=images * each,
        image_flops=images * each * tower.flops_per_patch(each),
        frozen_image_flops=reference,
    )


def quantized_by(model: "PreTrainedModel", config: "QuantizationConfig") -> Quantized:
    """What of a model without weights and adapters a section will keep in few bits: the linear layers but the head."""
    head = model.get_output_embeddings()
    sizes, num_bytes = [], 0.0
    for name, module in model.named_modules():
        is_skipped = any(ends_in(name, ending) for ending in config.skip_modules)
        if isinstance(module, torch.nn.Linear) and module is not head and not is_skipped:
            sizes.append(module.weight.numel())
            num_bytes += config.bytes_of(*module.weight.shape)
    return Quantized(config.bits, sum(sizes), num_bytes, max(sizes, default=0))


def _flops(model: "PreTrainedModel", length: int, has_head: bool) -> float:
    """Of training, per token; without a head the rows of a vocabulary table are only looked up."""
    flops, shape = flops_per_token(model, length), shape_of(model)
    if not has_head and shape.tied:
        flops -= 6 * shape.vocabulary_parameters
    return flops


def without_weights(config: "TrainConfig") -> "PreTrainedModel":
    """The model of a run on the meta device, with the rows of tokens that are added."""
    model = model_of_config(_configuration(config), empty=True)
    vocabulary = config.vocabulary_config
    added = (vocabulary.add_tokens, vocabulary.add_special_tokens)
    if any(added) or vocabulary.pad_to_multiple_of:
        tokenizer = load_tokenizer(_tokenizer_of(config))
        pieces = extend_tokenizer(tokenizer, *added)
        check_rows(model, tokenizer, pieces)
        extend_rows(model, pieces, num_ids(tokenizer), vocabulary.pad_to_multiple_of)
    return model


class Sketch:
    """What an algorithm is given when it is asked for its costs (`trainers.building.Sketch`)."""

    def __init__(
        self,
        section: Any,
        model: "PreTrainedModel",
        length: int,
        rows: int,
        precision: str,
        has_adapters: bool = False,
        evaluates: bool = True,
    ) -> None:
        self.section, self.model, self.has_adapters, self.evaluates = section, model, has_adapters, evaluates
        self.length, self.rows, self.precision = length, rows, precision

    def frozen(
        self, source: str | None = None, forwards: float = 1.0, in_half: bool = False, key: str = "teacher_model"
    ) -> dict[str, float]:
        model = self.model
        if source is not None:
            model = model_of_config(_of_folder(source, key), empty=True)
        precision = self.precision if in_half else "fp32"
        held = shape_of(model).num_parameters
        if source is None and self.has_adapters:
            held = 0  # the policy is its own reference
        return {
            "frozen_bytes": float(_BYTES[precision] * held),
            "frozen_flops_per_token": flops_per_token(model, self.length) / 3 * forwards,  # a step is three forwards
        }

    def judge(self, source: str) -> dict[str, float]:
        model = model_of_config(_of_folder(source, "reward_model_checkpoint", REWARD_MODELS), empty=True)
        with torch.device("meta"):
            judge = reward_model(model)
        forward = _flops(judge, self.length, has_head=False) / 3
        return {
            "frozen_bytes": float(_BYTES["fp32"] * shape_of(judge).num_parameters),
            "frozen_flops_per_token": forward,
        }

    def sampled(self, completions: int, new_tokens: int, columns: int, only_compared: int = 0) -> dict[str, float]:
        shape, each = shape_of(self.model), _BYTES[self.precision]
        longest = self.length + new_tokens
        row_tokens = min(longest, model_context(self.model) or longest)
        rows, drawn = self.rows * completions, self.rows * (completions + only_compared)
        per_token = 2 * each * shape.num_layers * shape.num_kv_heads * shape.head_dim
        copy_bytes = float(each * shape.num_parameters)
        cache_bytes = float(min(MAX_CACHE_BYTES, min(drawn, MAX_ROWS) * row_tokens * per_token))
        disk_bytes = float(drawn * row_tokens * (ON_DISK + 4 * columns))
        learns_from_given = self.section.rollouts is not None and not self.evaluates
        if learns_from_given or self.section.rollout_servers:  # these have the weights, and the cache
            copy_bytes = cache_bytes = 0.0
        if learns_from_given:  # another run's are read where they lie
            disk_bytes = 0.0
        return {
            "row_tokens": row_tokens,
            "rows": rows,
            "completions": completions,
            "copy_bytes": copy_bytes,
            "cache_bytes": cache_bytes,
            "samples_meanwhile": self.section.max_staleness > 0,
            "disk_bytes": disk_bytes,
        }

    def critic(self, source: str | None = None) -> dict[str, "PreTrainedModel"]:
        model = self.model
        if source is not None:
            kinds = (Kind.LANGUAGE_MODEL, *REWARD_MODELS)
            model = model_of_config(_of_folder(source, "value_model_checkpoint", kinds), empty=True)
        with torch.device("meta"):
            return {"critic": reward_model(model)}


def _configuration(config: "TrainConfig") -> "PretrainedConfig":
    """The shape of the model in transformers' words."""
    wanted = config.model_config
    if isinstance(wanted, str):
        found = _of_folder(wanted)
        return overridden(found, config.model_overrides) if config.model_overrides else found
    refuse_overrides(config.model_overrides)
    if wanted.vocab_size is None:
        wanted = replace(wanted, vocab_size=len(load_tokenizer(_tokenizer_of(config))))
    if isinstance(wanted, VLMConfig) and wanted.image_token_id is None:
        wanted = replace(wanted, image_token_id=0)  # whichever: nothing is read
    return build_config(wanted)


def _tokenizer_of(config: "TrainConfig") -> str:
    if config.tokenizer is None:
        raise ConfigError("model_config.vocab_size: none given, and no tokenizer that would tell; give one of them")
    return config.tokenizer


def _of_folder(
    source: str, key: str = "model_config", kinds: tuple[Kind, ...] = (Kind.LANGUAGE_MODEL,)
) -> "PretrainedConfig":
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(find_pretrained(source, kinds, key).model_source)
