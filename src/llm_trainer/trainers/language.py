"""Language modelling: next-token prediction on the tokens that are trained on. Pretraining and SFT are this."""

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from llm_trainer.algorithm import PromptFormat
from llm_trainer.config.algorithms import PretrainConfig, SFTConfig
from llm_trainer.config.options import KDConfig
from llm_trainer.data.stream import Amended
from llm_trainer.image_batch import moved, of_images
from llm_trainer.layout import OF_MICRO_BATCHES
from llm_trainer.losses.distill import mix_with_task
from llm_trainer.losses.language import IGNORE, LanguageLoss, mean_over, weight_sum
from llm_trainer.models.scored import TokenScores, scored
from llm_trainer.state import MicroBatch
from llm_trainer.trainers.answers import lay_flat, model_inputs
from llm_trainer.trainers.base import BaseTrainer
from llm_trainer.trainers.building import DataRequest
from llm_trainer.trainers.distill import (
    CHUNK_ELEMENTS,
    Distillation,
    TeacherDistance,
    distillation_from_config,
    make_teacher,
    own_answers,
    with_teacher,
)

if TYPE_CHECKING:
    from llm_trainer.config.schema import LossConfig, TrainConfig
    from llm_trainer.trainers.building import Build, Sketch

_INPUTS = ("input_ids", "labels", "loss_weights", "attention_mask", "position_ids", "document_lengths", "distance")


def language_loss(options: "LossConfig") -> LanguageLoss:
    """The loss of the section `loss_config`, which has every option of `LanguageLoss` under the same name."""
    values = {f.name: getattr(options, f.name) for f in fields(LanguageLoss)}
    return LanguageLoss(**values | {"critical_tokens": tuple(options.critical_tokens)})


def labels_of(batch: Any, name: str) -> torch.Tensor:
    """`[B, T]` the labels of a batch; all of its tokens where it has none.

    Args:
        batch: as `Trainer` takes it.
        name: of who takes it, for the message.

    Raises:
        ValueError: this is no batch of tokens.
    """
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            f"{name}: got {found} as a batch; expected a dict with input_ids [B, T], labels [B, T] and, "
            "where rows are padded, attention_mask [B, T]: let the loader's collate_fn return one"
        )
    for key in ("input_ids", "labels"):
        if key in batch and batch[key].is_floating_point():
            raise ValueError(
                f"{name}: {key}: got {batch[key].dtype}; expected token ids, which are integers: torch.long"
            )
    if "labels" in batch:
        return batch["labels"]
    labels = batch["input_ids"]
    if "attention_mask" in batch:
        labels = labels.masked_fill(batch["attention_mask"] == 0, IGNORE)
    if "position_ids" in batch:  # of rows laid flat: nothing comes before the first token of a document
        labels = labels.masked_fill(batch["position_ids"] == 0, IGNORE)
    return labels


def _kd_of(section: Any) -> KDConfig | None:
    """The distillation of a section; one from outside the package need not have any."""
    return section.kd_config if isinstance(section, PretrainConfig | SFTConfig) else None


class Trainer(BaseTrainer):
    """Pretraining: the mean cross-entropy of the supervised tokens of the whole optimizer step.

    Batches: `input_ids [B, T]`, `labels [B, T]` with -100 where nothing is learnt (position t holds the token AT t; without
    labels every token but padding), optional `attention_mask [B, T]`, optional `loss_weights [B, T]` (float, from 0 up: how
    much the loss of the label at t counts; the loss of a step is sum(weight * loss) / sum(weight)); or flat packed ones (see
    `data.collate.LanguageBatch`).

    Args:
        loss: label smoothing, z-loss, critical tokens, DFT.
        kd: learn from a teacher as well.
        teacher_model: the teacher of `kd`; without `kd`, of a `Distillation()`.
    """

    section = "pretrain_config"
    rows = ("text",)
    prompt_format: ClassVar[PromptFormat] = "text"
    shards_first_weights = True
    takes_flat = True
    takes_images = True
    balances_experts = True

    def __init__(
        self,
        *args: Any,
        loss: LanguageLoss | None = None,
        kd: Distillation | None = None,
        teacher_model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        self.loss = loss or LanguageLoss()
        self.kd = kd if teacher_model is None else with_teacher(kd, teacher_model)
        self.learns_from_rows_alone = self.kd is None
        super().__init__(*args, **kwargs)
        self.teacher = None if self.kd is None else make_teacher(self.kd, self.base_model, self.device)
        if self.kd is not None and isinstance(self.kd.teacher_model, nn.Module):
            self._reads_rows(self.kd.teacher_model)

    @classmethod
    def _from_config(cls, config: "TrainConfig", build: "Build") -> dict[str, Any]:
        made = {"loss": language_loss(config.loss_config)}
        kd = _kd_of(build.section)
        if kd is None or "kd" in build.given:
            return made
        return made | {"kd": distillation_from_config(kd, build)}

    @classmethod
    def _data_from_config(cls, section: Any) -> DataRequest:
        if isinstance(section, PretrainConfig):  # of SFTTrainer as well: PretrainTrainer is another name of it
            return DataRequest(("text",))
        chat = {}
        if isinstance(section, SFTConfig):
            chat = {"train_on": section.train_on, "thinking": section.thinking}
        return DataRequest(cls.rows, chat=chat)

    @classmethod
    def _plan_costs(cls, config: "TrainConfig", sketch: "Sketch") -> dict[str, Any]:
        kd = _kd_of(sketch.section)
        if kd is None or not isinstance(kd.teacher_model, str):
            return {}
        return {**sketch.frozen(kd.teacher_model, in_half=True), "teacher_chunk": CHUNK_ELEMENTS}

    def _build_module(self, model: nn.Module) -> nn.Module:
        return scored(model, self.loss)

    def _loss_weight(self, batch: dict[str, torch.Tensor]) -> float:
        return float(weight_sum(self._labels(batch), batch.get("loss_weights")))

    def _labels(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """`[B, T]` the labels of a batch; all of its tokens where it has none."""
        return labels_of(batch, type(self).__name__)

    def _count_tokens(self, batch: dict[str, torch.Tensor]) -> int:
        return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()

    def _get_extra_config_info(self) -> dict[str, Any]:
        return {} if self.kd is None else {"distillation": self.kd}

    def _build_source(self, source: Any, training: bool) -> Any:
        learns_own_answers = self.kd is not None and self.kd.on_policy_fraction > 0
        return Amended(source, self._write_own_answers) if training and learns_own_answers else source

    def _write_own_answers(self, batches: list[MicroBatch]) -> None:
        """In the share of the steps that is on-policy, put what the model answers in place of the answers of a step."""
        assert self.kd is not None
        seed = self.kd.sampling_seed(self.machine.seed, self.machine.step)
        if seed is None:
            return
        with self.machine.generating() as service:
            for micro_batch in batches:
                if micro_batch.counts:
                    micro_batch.batch = own_answers(dict(micro_batch.batch), service, self.kd, seed)

    def _policy_rows(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        batch = lay_flat(batch, self.machine.layout)
        on_device = moved(batch, self.device)
        return on_device | {"labels": self._labels(on_device)}

    def _prepare_batch(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        on_device = self._policy_rows(batch)
        if self.kd is not None and self.teacher is not None:
            weights = on_device.get("loss_weights")
            if weights is not None:
                weights = weights[:, 1:][on_device["labels"][:, 1:] != IGNORE].float()
            on_device["distance"] = TeacherDistance(self.teacher(on_device), self.kd, weights)
        return on_device

    def _forward(self, batch: dict[str, Any]) -> TokenScores:
        inputs = {name: batch[name] for name in _INPUTS if name in batch}
        unknown = of_images(batch)
        if self._knows_batches:
            unknown = [name for name in batch if name not in _INPUTS]
        inputs |= model_inputs({name: batch[name] for name in unknown}, self.model)
        return self.model(**inputs)

    @property
    def _knows_batches(self) -> bool:
        """Whether nobody else's method reads what is in a batch beside the inputs of the model."""
        return all(getattr(type(self), name) is getattr(Trainer, name) for name in OF_MICRO_BATCHES)

    def _compute_loss(self, outputs: TokenScores, batch: dict[str, Any]) -> torch.Tensor:
        count = outputs.num_tokens
        self.record("mean_token_accuracy", outputs.correct.sum(), count)
        if outputs.entropy is not None:
            self.record("entropy", outputs.entropy.sum(), count)
        total = weight_sum(batch["labels"], batch.get("loss_weights"))
        loss = mean_over(outputs.loss_sum, total)
        if self.kd is not None and outputs.distance is not None:
            self.record("task_loss", outputs.loss_sum.detach(), total)
            self.record("kd_loss", outputs.distance.detach(), total)
            loss = mix_with_task(loss, mean_over(outputs.distance, total), self.kd.kd_coef)
        return loss


class SFTTrainer(Trainer):
    """Supervised fine-tuning: language modelling whose labels are -100 on everything but the answers."""

    section = "sft_config"
    rows = ("conversations",)
    prompt_format: ClassVar[PromptFormat] = "chat"

    def _labels(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        labels = super()._labels(batch)
        if "labels" not in batch:  # what the user wrote would be learned as if the model had
            raise ValueError(
                f"{type(self).__name__}: a batch has {', '.join(batch)}, but no labels [B, T], which are -100 on prompts and "
                "padding; to learn every token, as in pretraining, use Trainer"
            )
        return labels


PretrainTrainer = SFTTrainer  # in the explicit style the labels alone tell them apart
