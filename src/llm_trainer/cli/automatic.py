"""What a run will choose on GPUs that are not here, for `llm-trainer plan`: by the functions that the run itself asks."""

from functools import partial

import torch

from llm_trainer.assemble import attention_choice, experts_choice, foreseen_kernel
from llm_trainer.builder.objects import LAYOUT_KEY
from llm_trainer.config.registry import options_of
from llm_trainer.config.schema import TrainConfig
from llm_trainer.config.table import ALGORITHMS
from llm_trainer.data.kinds import get_kind
from llm_trainer.engine.device import precision_choice
from llm_trainer.layout import choose_layout, is_open, made_flat, takes_flat
from llm_trainer.models.attention import attends, best_attention, describe_attention
from llm_trainer.models.experts import describe_experts, experts_of
from llm_trainer.models.packing import packing_of
from llm_trainer.plan.choices import Choice as Way
from llm_trainer.plan.choices import Finding
from llm_trainer.plan.describe import without_weights
from llm_trainer.plan.memory import DDP, ONE
from llm_trainer.plan.shapes import Job
from llm_trainer.state import Choice
from llm_trainer.train.budget import choice_of, class_may_cut
from llm_trainer.train.compiling import foreseen
from llm_trainer.train.sizing import ON_GPUS, largest_that_fits

DEVICE = "cuda"


class Automatic:
    """The choices of a run that a configuration leaves open.

    Args:
        config: the whole run.
        name: of the algorithm.
    """

    def __init__(self, config: TrainConfig, name: str) -> None:
        self.config = config
        self.trainer_class = ALGORITHMS[name].load()
        self.model = without_weights(config)
        self._wanted = self.trainer_class._data_from_config(options_of(config, self.trainer_class))

    def micro_tokens(self, job: Job) -> int | Finding:
        """Positions of a micro-batch as configured, or how they are found."""
        configured = self.config.data_loader_config.micro_batch_tokens
        couples = experts_of(self.model) is not None and self.config.loss_config.couples_rows
        couples = couples or self._wanted.couples_rows
        if configured == "auto" and not couples and class_may_cut(self.trainer_class, self.model):
            return partial(largest_that_fits, *ON_GPUS, limit="device memory")
        if isinstance(configured, int):
            return configured
        return self.config.batch_size * job.sample_tokens

    def layout(self) -> Choice | None:
        """How rows will be laid out; a small model of the same class is tried out here."""
        rows = self._wanted.rows
        if not is_open(self.config.data_loader_config.packing, get_kind(rows[0]).packings):
            return None
        takes = takes_flat(self.trainer_class)
        tried = [made_flat(self.trainer_class)]
        if takes:
            tried.append(packing_of(self.model, self.trainer_class.reader, torch.device("cpu")))
        return choose_layout(tried, takes, self.trainer_class.__name__, LAYOUT_KEY).choice

    def choices(self, way: Way, precision: str, steps: float | None) -> list[Choice]:
        """What the run will choose when it is trained in this way, so many steps. Threads depend on that machine's cores."""
        found = []
        if self.config.run_config.precision == "auto":
            found.append(precision_choice(precision, DEVICE))
        layout = self.layout()
        if layout is not None:
            found.append(layout)
        if way.why_tokens:
            found.append(choice_of(way.micro_tokens, way.why_tokens))
        if self.config.run_config.attention == "auto" and attends(self.model.config):
            described = describe_attention(self.model.config, DEVICE)
            if described[0] != "eager":  # the only one it has
                described = best_attention(DEVICE)
            found.append(attention_choice(*described))
        computed = describe_experts(self.model) if self.config.run_config.experts == "auto" else None
        if computed is not None:
            found.append(experts_choice(*computed))
        optimizer = self.config.optim_config
        if optimizer.fused == "auto" and not way.strategy.is_zero:  # DeepSpeed may put one of its own in its place
            kernel = foreseen_kernel(optimizer.optimizer, DEVICE)
            if kernel is not None:
                found.append(kernel)
        is_compiled = self.config.run_config.compile == "auto" and way.strategy in (ONE, DDP)
        if is_compiled and way.speed is not None:
            compiled = foreseen(DEVICE, precision, way.speed.step_s, steps)
            if compiled is not None:
                found.append(compiled)
        return found
