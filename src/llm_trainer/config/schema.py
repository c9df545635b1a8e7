"""Every configuration class: the keys of a YAML file, their types, their bounds and their defaults.

A leaf of the package: pydantic and the standard library only. A `Field`'s description is the comment that
`llm-trainer config` writes beside the key. A new section is its class and one field of `TrainConfig`.
"""

from __future__ import annotations

import os
from typing import Any, Literal

from pydantic import Field, StrictBool, StrictFloat, StrictInt

from llm_trainer.config.adapters import LORA, AdapterConfig, refuse_tensor_parallelism
from llm_trainer.config.algorithms import DPOConfig, KTOConfig, PretrainConfig, RewardConfig, SFTConfig
from llm_trainer.config.deepspeed import DsConfig
from llm_trainer.config.env import environment
from llm_trainer.config.errors import WHOLE, ConfigError
from llm_trainer.config.files import Files
from llm_trainer.config.model import AnyModel, VLMConfig, VocabularyConfig
from llm_trainer.config.optim import OptimConfig
from llm_trainer.config.options import Balancing, EarlyStopping, Execution, FsdpConfig, MicroBatches, Reading, Sampling
from llm_trainer.config.ppo import PPOConfig
from llm_trainer.config.quantization import QuantizationConfig
from llm_trainer.config.reinforcement import GRPOConfig, ReinforceConfig, ReMaxConfig, RLOOConfig
from llm_trainer.config.section import config_section


@config_section
class DataLoaderConfig(MicroBatches, Reading):
    """How files become batches."""

    data_loader_num_workers: StrictInt = Field(
        default=0, ge=0, description="processes that collate ahead of the training step"
    )
    data_loader_pin_memory: StrictBool = Field(default=False, description="copy batches through page-locked memory")
    data_loader_shuffle: StrictBool = Field(default=True, description="a new order of samples each epoch")
    file_weights: list[StrictFloat] | None = Field(
        default=None, description="for each path of file_dataset, how often its rows are visited per epoch; null: once"
    )
    mixture: Literal["files", "rows", "tokens"] = Field(
        default="files",
        description="files: one after another; rows, tokens: all files in one order, with shares of the rows or of the tokens",
    )
    file_shares: list[StrictFloat] | None = Field(
        default=None, description="for each path of file_dataset, its share of a mixture; null: as large as it is"
    )
    curriculum_epochs: StrictInt = Field(default=1, ge=1, description="first epochs that go from easy to hard")
    packing: Literal["auto", "none", "flat", "bfd", "bfd_split", "wrapped"] = Field(
        default="auto",
        description="several documents per row; auto: wrapped for pretraining, otherwise flat where the model scores rows so "
        "as it would padded, tried out on two",
    )
    truncation: Literal["error", "drop", "keep_start", "keep_end"] = Field(
        default="keep_start",
        description="what happens to samples that are too long; prompts, whose end must stay, are left out by keep_start too",
    )
    image_columns: Literal["error", "ignore"] = Field(
        default="error",
        description="what happens to rows that are trained as text and have images, videos or sounds; ignore: they are "
        "counted",
    )
    max_left_out: StrictFloat = Field(
        default=0.1,
        ge=0,
        le=1,
        description="share of the conversations' characters that the chat template may leave out, before training stops",
    )
    parse_special_tokens: StrictBool = Field(
        default=False,
        description="text of a special token in what users and documents say is that token; whoever writes the data can then "
        "end a turn",
    )
    cache_dir: str | None = Field(
        default=None, description="folder of tokenized data; null: LLM_TRAINER_CACHE, one for all runs"
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        if self.mixture == "files" and self.file_shares is not None:
            raise ConfigError("file_shares: files are visited one after another; set mixture to rows or tokens")
        if self.mixture != "files" and self.file_weights is not None:
            raise ConfigError("file_weights: a mixture has file_shares; give one of them")
        if self.mixture != "files" and not self.data_loader_shuffle:
            raise ConfigError(f"mixture: {self.mixture} is an order that is drawn; set data_loader_shuffle to true")


@config_section
class LossConfig(Balancing):
    """What is minimised, beside cross-entropy."""

    critical_tokens: list[StrictInt] = Field(
        default_factory=list, description="token ids that count more or less than others"
    )
    critical_alpha: StrictFloat = Field(default=1.0, ge=0, description="weight of the critical tokens in the loss")
    label_smoothing: StrictFloat = Field(
        default=0.0, ge=0, lt=1, description="probability spread evenly over the vocabulary"
    )
    z_loss_coef: StrictFloat = Field(default=0.0, ge=0, description="weight of log(Z)^2, which keeps logits small")
    dft: StrictBool = Field(default=False, description="weight each token by its own probability (dynamic fine-tuning)")


@config_section
class EvalConfig(EarlyStopping, Sampling):
    """When the model is evaluated, how samples are drawn, and when to stop early."""

    eval_batch_interval: StrictInt = Field(default=100, ge=1, description="steps between evaluations")
    eval_batch_size: StrictInt | None = Field(
        default=None, ge=1, description="rows per evaluation batch; null: batch_size"
    )


@config_section
class RunConfig(Execution):
    """Where a run writes, how long it goes on, and what it runs on."""

    save_dir: str = Field(
        default_factory=lambda: environment().checkpoint_dir or "./checkpoints",
        description="folder of checkpoints (CHECKPOINT_DIR)",
    )
    attention: str = Field(default="auto", description="attention implementation, as in transformers")
    experts: Literal["auto", "grouped_mm", "eager"] = Field(
        default="auto",
        description="how the experts of a mixture are computed: by one grouped product, or one after the other; auto: grouped "
        "where torch has it",
    )
    device: str | None = Field(default=None, description="cpu, cuda, mps; null: the best there is")
    log_interval: StrictInt = Field(default=10, ge=1, description="steps between lines of the log")

    @property
    def log_folder(self) -> str:
        """Where logs lie; `log_dir` stays as it was given, so that a recorded configuration may get another save_dir."""
        return self.log_dir or os.path.join(self.save_dir, "log")


@config_section
class TrainConfig:
    """A whole run.

    The optional sections of the algorithms are those of `config.table`, written out here for readers and type checkers; what
    is registered from outside is added to them.
    """

    model_config: AnyModel = Field(
        description="a shape to train from scratch, or the path or name of a Hugging Face model"
    )
    model_overrides: dict[str, Any] = Field(
        default_factory=dict,
        description="changes of a loaded model's configuration: rope_parameters, max_position_embeddings, its dropout",
    )
    tokenizer: str | None = Field(
        default_factory=lambda: environment().token_dir, description="tokenizer folder (TOKEN_DIR); null: the model's"
    )
    vocabulary_config: VocabularyConfig = Field(
        default_factory=VocabularyConfig, description="tokens that are added to tokenizer and model"
    )
    file_dataset: Files = Field(description="training data: a path or a list of paths")
    eval_dataset: Files | None = Field(default=None, description="evaluation data, in the same form")
    n_epochs: StrictInt = Field(default=1, ge=1, description="passes over the data")
    batch_size: StrictInt = Field(default=4, ge=1, description="rows per micro-batch and device")
    dataset_block_size: StrictInt | None = Field(
        default=None, ge=2, description="tokens per row; null: the model's longest sequence"
    )
    init_state_dict: Any = Field(default=None, description="initial weights as an object (Python only)")
    init_weights_path: str | None = Field(default=None, description="initial weights as a file or folder")
    eval_prompts: list[str] = Field(default_factory=list, description="prompts answered at each evaluation")
    eval_image_tags: list[str | list[str]] = Field(
        default_factory=list,
        description="for each of these prompts the image that its <image> shows, or several in a list; paths below image_root",
    )
    plugins: list[str] = Field(
        default_factory=list, description="modules or .py files imported first, which register algorithms"
    )
    adapter_config: AdapterConfig | None = Field(
        default=None, description="a few new weights are trained in place of all (LoRA and others, by peft)"
    )
    quantization_config: QuantizationConfig | None = Field(
        default=None, description="the weights under adapters in 4 or 8 bits (QLoRA, by bitsandbytes)"
    )
    freeze: list[str] = Field(
        default_factory=list,
        description="what is not trained: language, vision, projector, or regular expressions that parameter names hold",
    )
    data_loader_config: DataLoaderConfig = Field(default_factory=DataLoaderConfig, description="files to batches")
    loss_config: LossConfig = Field(default_factory=LossConfig, description="what is minimised")
    optim_config: OptimConfig = Field(default_factory=OptimConfig, description="optimizer and learning rate")
    eval_config: EvalConfig = Field(default_factory=EvalConfig, description="evaluation, samples, early stopping")
    run_config: RunConfig = Field(default_factory=RunConfig, description="folders, length, device")
    fsdp_config: FsdpConfig | None = Field(default=None, description="sharding by FSDP2")
    ds_config: DsConfig | None = Field(default=None, description="training with DeepSpeed")
    pretrain_config: PretrainConfig | None = Field(default=None, description="plain language modelling")
    sft_config: SFTConfig | None = Field(default=None, description="supervised fine-tuning")
    dpo_config: DPOConfig | None = Field(default=None, description="preference optimisation on pairs")
    kto_config: KTOConfig | None = Field(default=None, description="preference optimisation on single answers")
    reward_config: RewardConfig | None = Field(default=None, description="a reward model from pairs")
    grpo_config: GRPOConfig | None = Field(
        default=None, description="reinforcement learning from groups of completions"
    )
    rloo_config: RLOOConfig | None = Field(default=None, description="the same, with the others of a group as baseline")
    reinforce_config: ReinforceConfig | None = Field(default=None, description="the same, with all others as baseline")
    remax_config: ReMaxConfig | None = Field(
        default=None, description="the same, with the reward of the greedy completion as baseline"
    )
    ppo_config: PPOConfig | None = Field(default=None, description="reinforcement learning with a critic")

    def __post_init__(self) -> None:
        source = self.model_config
        if isinstance(source, VLMConfig):
            source = source.language_path or source
        if self.tokenizer is None and isinstance(source, str):
            self.tokenizer = source
        if self.eval_image_tags and len(self.eval_image_tags) != len(self.eval_prompts):
            raise ConfigError(
                f"eval_image_tags: got {len(self.eval_image_tags)} for {len(self.eval_prompts)} eval_prompts, expected one each"
            )
        if self.init_state_dict is not None and self.init_weights_path is not None:
            raise ConfigError("init_weights_path: init_state_dict already gives initial weights; give one of them")
        if self.ds_config is not None:
            self._one_clipping(self.ds_config)
        if self.adapter_config is not None and self.fsdp_config is not None:
            refuse_tensor_parallelism(self.fsdp_config.tensor_parallel_size)
        if self.freeze and self.adapter_config is not None:
            raise ConfigError(
                "freeze: beside adapter_config, which freezes all that has no adapters; expected adapter_config.parts and "
                "modules_to_save to say what is trained"
            )
        if self.quantization_config is not None:
            self._check_quantization()
        if self.adapter_config is not None:
            self._refuse_another_base(self.adapter_config)

    def _check_quantization(self) -> None:
        """Weights in few bits are read from a folder, stay as they are, and have adapters; others are trained for bits."""
        assert self.quantization_config is not None
        if self.quantization_config.of_whole_weights:
            self._check_whole_weights(self.quantization_config.of_whole_weights)
            return
        if self.adapter_config is None:
            raise ConfigError(
                "quantization_config: weights in few bits cannot be trained; expected an adapter_config, such as "
                "adapter_config: {}, or leave the section out"
            )
        if not isinstance(self.model_config, str):
            raise ConfigError(
                "quantization_config: model_config is a shape, whose random weights adapters cannot make good; expected the "
                "path or name of a model"
            )
        for name in ("init_state_dict", "init_weights_path"):
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"{name}: its weights cannot be put into matrices that are in 4 or 8 bits already (quantization_config); "
                    f"expected a model_config that has them"
                )
        if self.adapter_config.changes_the_base:
            raise ConfigError(
                f"adapter_config.init: {self.adapter_config.init} takes what it begins with out of the weights, which are in 4 "
                f"or 8 bits (quantization_config); expected default, gaussian, orthogonal, or eva, which looks at the rows too"
            )

    def _check_whole_weights(self, name: str) -> None:
        """Whole weights are trained for few bits, or multiplied in few, where that was tried."""
        key, tried = f"quantization_config.{name}", ["pretrain_config", "sft_config"]
        if name == "qat":
            tried.append("dpo_config")
        if self.adapter_config is not None:
            raise ConfigError(
                f"{key}: got adapters beside it, under which weights are not trained; expected no adapter_config, or no {name} "
                f"(weights in few bits under adapters are bits: 4 or 8)"
            )
        if all(getattr(self, section) is None for section in tried):
            raise ConfigError(f"{key}: tried out with {', '.join(tried)} only; expected one of them")

    def _refuse_another_base(self, adapters: AdapterConfig) -> None:
        """Refuse what would not be in the folder of adapters, which are saved without a base that is elsewhere."""
        vocabulary = self.vocabulary_config
        positions = [name for name in self.model_overrides if "rope" in name or "position" in name]
        if positions:
            raise ConfigError(
                f"model_overrides.{positions[0]}: beside adapter_config, which saves adapters without their base, whoever "
                f"opens the folder would have the old positions; expected them in the folder that model_config names: one of "
                f"a run without adapters, or made by build_model(..., overrides=...) and save_pretrained"
            )
        if not (vocabulary.add_tokens or vocabulary.add_special_tokens or vocabulary.pad_to_multiple_of):
            return
        why = ""
        if adapters.path is not None:
            why = "the adapter in adapter_config.path was trained on the rows that its base has"
        elif adapters.kind != LORA:
            why = f"adapter_config.kind: {adapters.kind} trains no rows of new tokens, which lora does"
        elif self.quantization_config is not None:
            why = "a base in few bits is not saved, nor would its new rows be (quantization_config)"
        if why:
            raise ConfigError(
                f"vocabulary_config: {why}; expected the tokens in the folder that model_config names: one of a run without "
                f"adapters, or made by models.vocabulary.extend_vocabulary and save_pretrained"
            )

    def _one_clipping(self, ds_config: DsConfig) -> None:
        """Two names for one number: the one that was changed counts."""
        ours, theirs, default = self.optim_config.max_grad_norm, ds_config.gradient_clipping, OptimConfig.max_grad_norm
        if ours != theirs and default not in (ours, theirs):
            raise ConfigError(
                f"ds_config.gradient_clipping: got {theirs}, but optim_config.max_grad_norm is {ours}; give one of them"
            )
        self.optim_config.max_grad_norm = theirs if ours == default else ours


WHOLE.append(TrainConfig)
