"""PTX: language modelling mixed into the updates of a policy (Ouyang et al. 2022, arXiv:2203.02155, eq. 2)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from llm_trainer.algorithm import Algorithm, StepLoss
from llm_trainer.config.errors import ConfigError
from llm_trainer.data.added import Added
from llm_trainer.data.loaders import as_step_source
from llm_trainer.image_batch import moved, require_text
from llm_trainer.losses.language import mean_over, weight_sum
from llm_trainer.models.critic import Acted
from llm_trainer.models.scored import TokenScores
from llm_trainer.trainers.answers import Batch, count_tokens, lay_flat
from llm_trainer.trainers.building import DataRequest
from llm_trainer.trainers.language import labels_of

if TYPE_CHECKING:
    from llm_trainer.config.schema import TrainConfig
    from llm_trainer.trainers.building import Build

PTX = "ptx"
PTX_OBJECTS = ("ptx_dataset", "ptx_ratio")  # what a section says about the rows, beside the loss
ROWS = DataRequest(("text", "conversations"))
_INPUTS = ("input_ids", "labels", "loss_weights", "attention_mask", "position_ids", "document_lengths")


class Ptx(StepLoss):
    """`coef` times the mean cross-entropy of the supervised tokens of further rows, over a whole optimizer step.

    It keeps a policy from forgetting what it had learned before. Batches are those of `trainers.language.Trainer`.

    Args:
        trainer: of the policy, whose model this is a loss of.
        coef: its weight beside the policy's loss.
        loader: of the rows; they begin anew when they end.
        waits: whether the policy does not learn yet.
    """

    def __init__(self, trainer: Algorithm, coef: float, loader: Any, waits: Callable[[], bool]) -> None:
        self._trainer, self._coef, self._loader, self._waits = trainer, coef, loader, waits

    def __str__(self) -> str:
        return f"{self._coef:g} x their cross-entropy in every update"

    def source(self, source: Any) -> Added:
        """The steps of a source, with a step of further rows in each."""
        machine = self._trainer.machine
        rows = as_step_source(
            self._loader,
            rank=machine.rank,
            world_size=machine.world_size,
            micro_batch_tokens=source.micro_batch_tokens,
            seed=machine.seed,
            name="ptx_loader",
            largest=partial(_largest, machine.gather),
        )
        return Added(source, rows, PTX, machine)

    def _loss_weight(self, batch: Batch) -> float:
        return float(weight_sum(labels_of(batch, PTX), batch.get("loss_weights")))

    def _count_tokens(self, batch: Batch) -> int:
        return count_tokens(batch)

    def _prepare_batch(self, batch: Batch) -> Batch:
        require_text(batch, "ptx_loader: further rows are text")
        rows = lay_flat(batch, self._trainer.machine.layout)
        rows = moved({name: rows[name] for name in _INPUTS if name in rows}, self._trainer.machine.device)
        return rows | {"labels": labels_of(rows, PTX)}

    def _forward(self, batch: Batch) -> TokenScores | Acted:
        return self._trainer.model(**batch)

    def _compute_loss(self, outputs: TokenScores | Acted, batch: Batch) -> Tensor:
        scores = outputs.scores if isinstance(outputs, Acted) else outputs
        total = weight_sum(batch["labels"], batch.get("loss_weights"))
        self._trainer.machine.record("ptx_loss", scores.loss_sum.detach(), total)
        coef = 0.0 if self._waits() else self._coef
        loss = coef * mean_over(scores.loss_sum, total)
        if isinstance(outputs, Acted):  # engines want a gradient of every parameter, the critic's too
            loss = loss + 0.0 * outputs.values.sum()
        return loss


def ptx_of(trainer: Algorithm, coef: float, loader: Any, waits: Callable[[], bool]) -> Ptx | None:
    """What an explicit trainer says.

    Raises:
        ValueError: there is a weight and no rows, or the other way round.
    """
    if coef and loader is None:
        raise ValueError(
            f"ptx_coef: got {coef:g}, but there are no further rows to learn from; expected ptx_loader, batches of input_ids "
            f"and labels as SFTTrainer takes them (ptx_dataset, files, in a configuration)"
        )
    if loader is not None and not coef:
        raise ValueError("ptx_loader: nothing is learned from it, since ptx_coef is 0; expected a weight, such as 0.1")
    return None if loader is None else Ptx(trainer, coef, loader, waits)


def ptx_from_config(config: "TrainConfig", build: "Build", samples: int, rows_per_update: int | None) -> dict[str, Any]:
    """The loader as a keyword, if there are further rows.

    Args:
        samples: completions of each prompt.
        rows_per_update: completions of an update, over all ranks; None: a whole rollout.

    Raises:
        ConfigError: it is not said which rows.
    """
    section = build.section
    if not section.ptx_coef or "ptx_loader" in build.given:
        return {}
    if section.ptx_dataset is None:
        raise ConfigError(
            f"ptx_coef: got {section.ptx_coef:g}, but there are no further rows to learn from; expected ptx_dataset, a file of "
            f"texts or conversations"
        )
    completions = rows_per_update or build.streams[0].rows_per_step * samples
    rows = max(1, round(section.ptx_ratio * completions))
    block_size = build.block_size + section.gen_max_seq_len  # as long as a prompt and its completion
    return {"ptx_loader": build.further(section.ptx_dataset, ROWS, rows, block_size)}


def further_share(section: Any) -> float:
    """Rows of an update for each of its completions, for `plan`."""
    return section.ptx_ratio if section.ptx_coef else 0.0


def _largest(gather: Any, number: int) -> int:
    """The largest number that any rank passes."""
    numbers: Sequence[int] = gather(number)
    return max(numbers)
