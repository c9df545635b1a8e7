"""Groups of options that both styles share: each option's name, type, bound, default and meaning stands here, once.

A section of the configuration is one of these classes or derives from some of them; `Settings` are those that every
trainer takes as keywords.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from itertools import chain
from typing import Annotated, Any, Literal, Self, TypeGuard

from pydantic import AfterValidator, BeforeValidator, Field, StrictBool, StrictFloat, StrictInt

from llm_trainer.config.engines import known_engine
from llm_trainer.config.env import environment
from llm_trainer.config.errors import ConfigError, fields_of
from llm_trainer.config.section import config_section


@config_section
class Sampling:
    """How sample answers are drawn during training."""

    max_seq_len: StrictInt = Field(default=128, ge=1, description="new tokens of a sample")
    temperature: StrictFloat = Field(default=1.0, ge=0, description="0: the likeliest token")
    top_p: StrictFloat = Field(
        default=1.0, gt=0, le=1, description="sample from the likeliest tokens that hold this much probability"
    )
    top_k: StrictInt = Field(default=0, ge=0, description="sample from this many likeliest tokens; 0: all")


@config_section
class EarlyStopping:
    """When a run stops because it no longer improves."""

    early_stopping_patience: StrictInt | None = Field(
        default=None, ge=1, description="evaluations without progress before stopping; null: never"
    )
    early_stopping_min_delta: StrictFloat = Field(
        default=0.0, ge=0, description="a smaller fall of the loss is no progress"
    )


@config_section
class MicroBatches:
    """How steps are cut."""

    micro_batch_tokens: Annotated[StrictInt, Field(ge=1)] | Literal["auto"] | None = Field(
        default="auto",
        description="cut the rows of a step into micro-batches of this many tokens; auto: the fastest that fits into memory; "
        "null: by batch_size rows",
    )


@config_section
class ReferenceOptions:
    """What a policy is compared with, or held to."""

    ref_model_checkpoint: Any = Field(
        default=None, description="weights of the reference: a path, or a state dict; null: the policy at the start"
    )
    reference: Literal["start", "base"] = Field(
        default="start",
        description="the policy where the run began, or with its adapters off; where no ref_model_checkpoint is named",
    )


@config_section
class Balancing:
    """How the experts of a mixture are kept in use."""

    aux_loss_coef: StrictFloat = Field(default=0.001, ge=0, description="weight of the experts' load-balance loss")
    router_z_loss_coef: StrictFloat = Field(
        default=0.0, ge=0, description="weight of log(Z)^2 of the experts' routers, which keeps their logits small"
    )
    aux_loss_scope: Literal["step", "previous_step", "micro_batch"] = Field(
        default="step",
        description="whose tokens are balanced: the step's, exactly, for one more forward where it is cut; as those of the "
        "step before were routed; or each micro-batch's alone, as in transformers",
    )
    bias_update_speed: Annotated[StrictFloat, Field(ge=0)] | None = Field(
        default=None,
        description="of routers that a bias balances (glm4_moe): how far it moves after each step, against the load; null: "
        "0.001 where all biases are 0, as in a new model; otherwise they stay",
    )

    @property
    def couples_rows(self) -> bool:
        """Whether it makes a difference which rows a micro-batch has: each is balanced alone."""
        return self.aux_loss_scope == "micro_batch" and self.aux_loss_coef > 0


ROLES = ("system", "user", "assistant", "tool")


@config_section
class Reading:
    """How files become rows."""

    schema: str | None = Field(default=None, description="the rows' schema; null: recognised from the rows")
    columns: dict[str, str | dict[str, str]] | None = Field(
        default=None,
        description="our column: the file's, such as {prompt: query, completion: response}; only these are read; or such a "
        "mapping per file, {path or pattern: {prompt: query}}; null: the file's names are ours",
    )
    roles: dict[str, str | list[str] | dict[str, str | list[str]]] | None = Field(
        default=None,
        description="our role: the file's word or words for it, such as {user: customer, assistant: agent}; or such a mapping "
        "per file, {path or pattern: {user: customer}}",
    )
    text_unit: Literal["auto", "file", "line", "paragraph", "endoftext"] = Field(
        default="auto",
        description="what one document of a plain text file is; endoftext: what ends with <|endoftext|>, also inside a row",
    )
    bad_rows: Literal["error", "drop"] = Field(default="error", description="what happens to rows that cannot be read")
    image_root: str | None = Field(
        default=None,
        description="folder that paths of images begin in, and do not lead out of; null: that of their file",
    )
    max_pixels: StrictInt | None = Field(
        default=None,
        ge=1,
        description="larger images are made smaller, to this many pixels; null: as their processor does",
    )
    bad_images: Literal["error", "drop"] = Field(
        default="error", description="what happens to rows with an image that is missing, damaged or cannot be used"
    )
    duplicates: Literal["keep", "exact", "near"] = Field(
        default="keep",
        description="rows of the training data that repeat an earlier one; exact, near: they are left out",
    )
    duplicate_similarity: StrictFloat = Field(
        default=0.8, gt=0, le=1, description="share of common runs of 5 tokens from which on rows are near duplicates"
    )
    curriculum: str | None = Field(
        default=None,
        min_length=1,
        description="the easiest samples first. length: the shortest; any other word: those with the smallest number in this "
        "column of the file, or at a path into it such as meta.difficulty; null: drawn from seed and epoch",
    )

    @property
    def hardness_column(self) -> str | None:
        """The column of a file that a curriculum sorts by; None: there is no curriculum, or it sorts by length."""
        return None if self.curriculum == "length" else self.curriculum

    def __post_init__(self) -> None:
        for option in ("columns", "roles"):
            _refuse_mixed(option, getattr(self, option))
        mappings: list[Any] = [self.roles or {}]
        if names_files(self.roles):
            mappings = list(self.roles.values())
        for role in chain.from_iterable(mappings):
            if role not in ROLES:
                raise ConfigError(f"roles: got the role {role!r} on the left, expected {' or '.join(ROLES)}")


def names_files(names: Mapping[str, Any] | None) -> TypeGuard[Mapping[str, Any]]:
    """Whether columns or roles are said per file."""
    return any(isinstance(value, Mapping) for value in (names or {}).values())


def _refuse_mixed(option: str, names: Mapping[str, Any] | None) -> None:
    """Columns or roles are those of all files, or said per file.

    Raises:
        ConfigError: both at once.
    """
    plain = [name for name, value in (names or {}).items() if not isinstance(value, Mapping)]
    if names_files(names) and plain:
        raise ConfigError(
            f"{option}: got names ({', '.join(plain)}) beside mappings of single files, expected one or the other; for all "
            f"files write {{'*': {{{plain[0]}: ...}}}}"
        )


@config_section
class Fsdp:
    """How FSDP2 shards a model over ranks."""

    reshard_after_forward: StrictBool = Field(
        default=True,
        description="free a layer's whole weights between its forward and backward (ZeRO-3); false: more memory, a third "
        "less to send (ZeRO-2)",
    )
    cpu_offload: StrictBool = Field(
        default=False, description="keep parameters, gradients and optimizer state in host memory, and update there"
    )
    shard_size: StrictInt | None = Field(
        default=None, ge=1, description="ranks that share one copy of the model (hybrid sharding); null: all"
    )
    tensor_parallel_size: StrictInt = Field(
        default=1, ge=1, description="neighbouring processes that split every layer's matrices and see the same data"
    )
    sync_each_micro_batch: StrictBool = Field(
        default=True, description="sum gradients after each micro-batch; false: once per step, for more memory"
    )


FsdpConfig = Fsdp


@config_section
class KDConfig:
    """Knowledge distillation: a teacher's distribution is learned beside the labels."""

    teacher_model: str | Callable[..., Any] | None = Field(
        default=None,
        description="folder or name of the teacher, which has the same tokenizer; or the model itself (Python only)",
    )
    teacher_logits_provider: Callable[..., Any] | None = Field(
        default=None, description="(input_ids, attention_mask) -> logits [B, L, V], instead of a model (Python only)"
    )
    kd_coef: StrictFloat = Field(
        default=0.4, ge=0, le=1, description="share of the distillation; the task has the rest"
    )
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
        default="forward_kl", description="distance of the student's distribution from the teacher's"
    )
    beta: StrictFloat = Field(default=0.5, gt=0, lt=1, description="weight of the teacher in the mixture of jsd")
    temperature: StrictFloat = Field(default=1.0, gt=0, description="divides the logits of both")
    t_squared: StrictBool = Field(
        default=False, description="multiply by temperature^2, which keeps gradients of one size"
    )
    on_policy_fraction: StrictFloat = Field(
        default=0.0, ge=0, le=1, description="share of the steps on answers that the student writes itself (GKD)"
    )
    max_new_tokens: StrictInt = Field(
        default=128, ge=1, description="longest answer that the student writes, in tokens"
    )
    sampling_temperature: StrictFloat = Field(
        default=1.0, ge=0, description="temperature of these answers; 0: the likeliest token"
    )

    def __post_init__(self) -> None:
        if self.teacher_model is not None and self.teacher_logits_provider is not None:
            raise ConfigError("teacher_model: teacher_logits_provider already gives the teacher; give one of them")


def not_in_eight_bits(precision: Any) -> Any:
    """`precision` itself.

    Raises:
        ValueError: products in 8 bits are asked for.
    """
    if str(precision).lower() in ("float8", "fp8"):
        raise ValueError(
            f"got {precision!r}: products in 8 bits need a GPU of compute capability 8.9 or later (Ada, Hopper), and are "
            f"quantization_config: {{float8: tensorwise}} beside precision: bf16; expected auto, which takes bf16 where a "
            f"machine is fast in it, or bf16, fp16, fp32"
        )
    return precision


ON_THEIR_WAY = 2  # layers whose input is still, or again, on the device where inputs wait in host memory


@config_section
class Execution:
    """How long a run goes on, what it runs on, and what it keeps."""

    log_dir: str | None = Field(
        default_factory=lambda: environment().log_dir, description="folder of logs (LOG_DIR); null: <save_dir>/log"
    )
    max_steps: StrictInt | None = Field(
        default=None, ge=1, description="stop after this many steps; null: after all epochs"
    )
    seed: StrictInt = Field(default=0, ge=0, description="seed of weights, order and dropout")
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"], BeforeValidator(not_in_eight_bits)] = Field(
        default="auto", description="what matrices are multiplied in"
    )
    engine: Annotated[str, AfterValidator(known_engine)] = Field(
        default="auto",
        description="what executes the steps: torch, fsdp, deepspeed, hf; auto: PARALLEL_TYPE, else deepspeed or fsdp if "
        "configured, else torch",
    )
    without_deepspeed: Literal["stop", "leave_out"] = Field(
        default="stop",
        description="where DeepSpeed is configured and not installed: stop, or leave its section out and say so",
    )
    compile: StrictBool | Literal["auto"] = Field(
        default="auto",
        description="torch.compile the model; auto: its layers, after the first steps, where the run is long enough",
    )
    gradient_checkpointing: StrictBool = Field(
        default=False, description="recompute activations: less memory, more time"
    )
    activation_offload: StrictBool = Field(
        default=False,
        description="with gradient_checkpointing, on GPUs: what enters the layers waits in host memory for the backward",
    )
    save_interval_steps: StrictInt | None = Field(
        default=None, ge=1, description="steps between checkpoints; null: each epoch"
    )
    checkpoints_to_keep: StrictInt = Field(
        default_factory=lambda: environment().checkpoints_to_keep,
        ge=1,
        description="older checkpoints are removed, but for the best one (CKPT_MAX_TO_KEEP)",
    )
    save_in_background: StrictBool = Field(
        default=True,
        description="write checkpoints of a copy in host memory, while training goes on; false, or too little memory: "
        "training stands still",
    )
    resume: str = Field(
        default="auto", description="auto: go on from save_dir's newest checkpoint; never; or a checkpoint's path"
    )
    max_bad_steps: StrictInt = Field(default=3, ge=1, description="non-finite steps in a row before the run stops")
    writers: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list, description="more places for metrics")
    progress: StrictBool = Field(default=True, description="a live progress bar in terminals")
    ddp_timeout_s: StrictInt = Field(
        default=600, ge=1, description="seconds that processes wait for each other before the run stops"
    )


@config_section
class Settings(MicroBatches, EarlyStopping, Balancing, Execution):
    """Options of a run that all algorithms share (keywords of every trainer)."""

    # A script that is started twice trains twice; only a described run goes on by itself.
    resume: str = Field(default="never", description=fields_of(Execution)["resume"].description)
    fsdp: Fsdp | None = Field(default=None, description="how FSDP shards; None: with the defaults of `Fsdp`")
    packing: Literal["auto", "none", "flat"] = Field(
        default="auto",
        description="how the padded micro-batches of a loader are laid out: flat, end to end without padding, or as they come "
        "(none); auto: flat where the model scores rows as it would padded, tried out on two",
    )
    deepspeed: Mapping[str, Any] | None = Field(
        default=None, description="DeepSpeed's own configuration (its JSON); None: ZeRO-2 where `engine` asks for it"
    )
    eval_interval: StrictInt | None = Field(
        default=None, ge=1, description="steps between evaluations; None: after each epoch"
    )
    best_file: StrictBool = Field(
        default=True, description="write best_model.pt beside the checkpoints whenever the validation loss improves"
    )
    loader_is_sharded: StrictBool = Field(
        default=False,
        description="the loaders give every rank batches of its own, which are not dealt out again",
    )
    sampling: Sampling = Field(default_factory=Sampling, description="how answers to `eval_prompts` are drawn")
    ledgers: Sequence[Any] = Field(
        default=(), description="token ledgers of the data, shown before the first step and stored with the run"
    )
    choices: Sequence[Any] = Field(
        default=(),
        description="what the machine chose while model and optimizer were made, shown before the first step",
    )
    description: str = Field(default="", description="the configuration as YAML, stored with the run")

    @classmethod
    def of(cls, trainer: str, options: dict[str, Any], others: Callable[[], Iterable[str]] = tuple) -> Self:
        """Settings from a trainer's further keywords; `others` gives its other ones, which may have been meant.

        Raises:
            TypeError: an option is not known; the message names the nearest known one.
            ConfigError: a value cannot be meant.
        """
        known = list(fields_of(cls))
        for name in options:
            if name not in known:
                near = get_close_matches(name, [*known, *others()], n=1)
                hint = f"; did you mean {near[0]}?" if near else f"; known options: {', '.join(known)}"
                raise TypeError(f"{trainer} has no option {name!r}{hint}")
        return cls(**options)
