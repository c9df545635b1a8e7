"""Language modelling: next-token prediction on the tokens that are trained on. Pretraining and SFT are this."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llm_trainer.losses.language import LanguageLoss
from llm_trainer.models.scored import TokenScores, scored
from llm_trainer.trainers.base import BaseTrainer

if TYPE_CHECKING:
    from llm_trainer.config.schema import TrainConfig


class Trainer(BaseTrainer):
    """Pretraining: the mean cross-entropy of the supervised tokens of the whole optimizer step.

    Batches: `input_ids [B, T]`, `labels [B, T]` with -100 where nothing is learnt (position t holds the token AT t),
    optional `attention_mask [B, T]`; or flat packed ones (see `data.collate.LanguageBatch`).

    Args:
        loss: label smoothing, z-loss, critical tokens, DFT.
        aux_loss_coef: weight of the load-balancing loss of a mixture-of-experts model (Fedus et al. 2021).
    """

    config_section = "pretrain_config"

    def __init__(
        self, *args: Any, loss: LanguageLoss | None = None, aux_loss_coef: float = 0.001, **kwargs: Any
    ) -> None:
        self.loss = loss or LanguageLoss()
        self.aux_loss_coef = aux_loss_coef
        super().__init__(*args, **kwargs)

    @classmethod
    def _from_config(cls, config: "TrainConfig") -> dict[str, Any]:
        options = config.loss_config
        return {
            "loss": LanguageLoss(
                label_smoothing=options.label_smoothing,
                z_loss_coef=options.z_loss_coef,
                critical_tokens=tuple(options.critical_tokens),
                critical_alpha=options.critical_alpha,
                dft=options.dft,
            ),
            "aux_loss_coef": options.aux_loss_coef,
        }

    def _build_module(self, model: nn.Module) -> nn.Module:
        return scored(model, self.loss)

    def _loss_weight(self, batch: dict[str, torch.Tensor]) -> float:
        return float((batch["labels"][:, 1:] != -100).sum())  # the label of position 0 has nothing to be predicted from

    def _count_tokens(self, batch: dict[str, torch.Tensor]) -> int:
        return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()

    def _prepare_batch(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def _forward(self, batch: dict[str, torch.Tensor]) -> TokenScores:
        names = ("input_ids", "labels", "attention_mask", "position_ids", "document_lengths")
        return self.model(**{name: batch[name] for name in names if name in batch})

    def _compute_loss(self, outputs: TokenScores, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        count = outputs.num_tokens
        self.record("mean_token_accuracy", outputs.correct.sum(), count)
        if outputs.entropy is not None:
            self.record("entropy", outputs.entropy.sum(), count)
        loss = outputs.loss_sum / count.clamp(min=1)
        if outputs.aux_loss is not None and self.aux_loss_coef:
            self.record("aux_loss", outputs.aux_loss.detach() * count, count)
            loss = loss + self.aux_loss_coef * outputs.aux_loss
        return loss


class SFTTrainer(Trainer):
    """Supervised fine-tuning: language modelling whose labels are -100 on everything but the answers."""

    config_section = "sft_config"


PretrainTrainer = SFTTrainer  # in the explicit style the labels alone tell them apart
