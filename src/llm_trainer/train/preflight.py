"""What is about to happen, on one screen, before the first step. Functions of plain values."""

import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from llm_trainer.config.adapters import LORA, SHARDED_NOT, refuse_tensor_parallelism
from llm_trainer.config.errors import ConfigError, counted
from llm_trainer.config.options import ON_THEIR_WAY
from llm_trainer.data.encode.templates import describe_default, has_default_template
from llm_trainer.data.ledger import Ledger
from llm_trainer.data.rollout_source import RolloutSource
from llm_trainer.data.stream import SampleStream, StepSource, innermost
from llm_trainer.engine import dist
from llm_trainer.engine.base import Engine
from llm_trainer.engine.choose import left_out
from llm_trainer.model_group import members_of
from llm_trainer.models.attention import slow_attention
from llm_trainer.models.float8 import describe_rounded
from llm_trainer.models.inside import has_adapters
from llm_trainer.optim.multipliers import describe_multiples, rate_of_run
from llm_trainer.optim.schedules import Scheduler
from llm_trainer.plan.shapes import Shape
from llm_trainer.state import Choice
from llm_trainer.train.size import Size
from llm_trainer.train.work import Work

if TYPE_CHECKING:
    from llm_trainer.config.options import Settings


def check_numbers(max_grad_norm: float | None, **counts: Any) -> None:
    """Look at what a trainer was given.

    Raises:
        ValueError: one of `counts` is no integer of at least 1, or the norm is below 0.
    """
    for name, value in counts.items():
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name}: got {value}, expected an integer of at least 1")
    if not (max_grad_norm is None or max_grad_norm >= 0):
        raise ValueError(f"max_grad_norm: got {max_grad_norm}, expected a number of at least 0; 0 or None: no clipping")


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, module: nn.Module) -> None:
    """Look whether every parameter of the optimizer is one of the model, by whose names everything is saved.

    Args:
        module: what is trained, with `model` in it; knows the names of parameters that are only there.

    Raises:
        ValueError: one is not.
    """
    own = set(model.parameters())
    names = {parameter: name for name, parameter in module.named_parameters()}
    strangers = []
    for number, group in enumerate(optimizer.param_groups):
        given = group.get("param_names") or [None] * len(group["params"])
        for position, (parameter, name) in enumerate(zip(group["params"], given, strict=True)):
            if parameter not in own:
                name = names.get(parameter) or name or f"number {position} of group {number}"
                strangers.append(f"{name} ({list(parameter.shape)})")
    if strangers:
        more = ", ..." if len(strangers) > 3 else ""
        raise ValueError(
            f"optimizer: {counted(len(strangers), 'parameter')} of it not in the {type(model).__name__} that is trained: "
            f"{', '.join(strangers[:3])}{more}. No checkpoint could hold them. Make the optimizer from the model's parameters, "
            f"after the model has its final form; what a loss learns besides belongs into the model"
        )


def check_adapters(model: nn.Module, settings: "Settings", engine: Engine) -> None:
    """Look whether the engine can train a model, or group of models, with adapters.

    Raises:
        ConfigError: it splits their layers, or shards them and they are of a method that does not stand that.
    """
    for member in members_of(model).values():
        if not has_adapters(member):
            continue
        if settings.fsdp is not None:
            refuse_tensor_parallelism(settings.fsdp.tensor_parallel_size)
        kinds = {str(config.peft_type.value).lower() for config in member.peft_config.values()}  # type: ignore[operator, union-attr]
        place = engine.name
        if getattr(engine, "stage", 0):
            place = f"zero-{engine.stage}"  # type: ignore[attr-defined]
        for kind in sorted(kinds):
            why = SHARDED_NOT.get((kind, place))
            if why is not None:
                raise ConfigError(
                    f"adapter_config.kind: got {kind} on {place}, where {why}; expected {LORA} or another method, or engine: "
                    f"torch"
                )


def mean_row_length(source: StepSource) -> int | None:
    """Tokens of a row on average; None where the data does not say."""
    source = innermost(source)
    if not isinstance(source, SampleStream):
        return None
    return round(float(source.dataset.lengths.mean()))


class Pictured(NamedTuple):
    """What rows show, per row.

    Attributes:
        images: on average.
        patches: that towers see of them.
    """

    images: float
    patches: float


def pictured(source: StepSource) -> Pictured | None:
    """What the rows of a source show, on average; None where they show nothing, or nobody knows."""
    source = innermost(source)
    if not isinstance(source, SampleStream) or not source.shows_images:
        return None
    parts = getattr(source.dataset, "parts", ())  # a dataset of the user has none
    images = sum(part.ledger.images.used for part in parts if part.ledger.images is not None)
    patches = sum(int(part.tower_tokens.sum()) for part in parts if getattr(part, "tower_tokens", None) is not None)
    num_rows = len(source.dataset.lengths)
    return Pictured(images / num_rows, patches / num_rows) if images else None


def mean_patches(source: StepSource) -> float | None:
    """Of an image; None where the data does not say."""
    found = pictured(source)
    return None if found is None else found.patches / found.images


def human(count: float, unit: str = "") -> str:
    """A number with three digits and a letter: 1.23 M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {letter}{unit}"
    return f"{count:.3g} {unit}"


def describe_size(size: Size) -> str:
    """How many parameters there are, and how many of them learn."""
    trained = "" if size.trained == size.parameters else f", {human(size.trained)} trained"
    return f"{human(size.parameters)} ({size.parameters:,}){trained}"


def expected_memory(size: Size, engine: Engine, source: StepSource, settings: "Settings") -> dict[str, float]:
    """Bytes on one device, by purpose: weights, gradients, optimizer, and activations where their formula is known."""
    weights, gradients, states = engine.shard_fractions()
    memory = {
        "weights": size.bytes * weights,
        "gradients": size.trained_bytes * gradients,
        "optimizer": size.optimizer_bytes * states,
    }
    return memory | _expected_activations(size.shape, engine, source, settings)


def _expected_activations(
    shape: Shape | None, engine: Engine, source: StepSource, settings: "Settings"
) -> dict[str, float]:
    """What the layers, and those of a tower, keep of a micro-batch for the backward, in bytes; empty for other layers than
    those of `plan`.
    """
    from llm_trainer.plan.memory import Widths, layer_activations

    tokens = _tokens_of_micro_batch(source)
    if shape is None or tokens is None:
        return {}
    product_bytes = 4 if engine.precision_name == "fp32" else 2
    widths = Widths(product_bytes, 4)
    per_layer = layer_activations(shape, widths)
    if settings.gradient_checkpointing:
        per_layer = widths.residual * shape.hidden_size
    num_layers = min(shape.num_layers, ON_THEIR_WAY) if settings.activation_offload else shape.num_layers
    found = {"activations": tokens * num_layers * per_layer}
    seen, length = pictured(source), mean_row_length(source)
    if shape.tower is not None and seen is not None and length:
        per_patch = shape.tower.activations(widths.product, widths.residual, settings.gradient_checkpointing)
        found["images"] = tokens / length * seen.patches * per_patch
    return found


def _tokens_of_micro_batch(source: StepSource) -> float | None:
    """As it is cut, which is not more than the rows of a step come to; None where nobody knows."""
    budget, length = source.micro_batch_tokens, mean_row_length(source)
    tokens = float(budget) if isinstance(budget, int) else None
    if isinstance(source, SampleStream) and length is not None:
        rows = source.batch_size if tokens is None else math.ceil(source.rows_per_step / source.world_size)
        seen = pictured(source)
        if tokens is not None and seen is not None:  # a budget counts what the tower sees, too
            tokens *= length / (length + seen.patches)
        tokens = min(tokens or math.inf, rows * length)
    return tokens


def describe_memory(memory: Mapping[str, float]) -> str:
    """Bytes in all and by purpose."""
    purposes = ", ".join(f"{name} {human(size, 'B')}" for name, size in memory.items())
    return f"{human(sum(memory.values()), 'B')} expected: {purposes}"


def describe_batch(source: StepSource, accumulation: int) -> str:
    """What an optimizer step consists of, as an equation."""
    if isinstance(source, RolloutSource):
        return source.describe() + _budget_of(source)
    ranks = counted(dist.world_size(), "rank")
    if not isinstance(source, SampleStream):
        in_all = counted(accumulation * dist.world_size(), "micro-batch")
        return f"{counted(accumulation, 'micro-batch')} x {ranks} = {in_all} per step{_budget_of(source)}"
    rows, in_all = counted(source.batch_size, "row"), counted(source.rows_per_step, "row")
    tokens = human(source.rows_per_step * float(source.dataset.lengths.mean()), "tokens")
    product = f"{rows} x {accumulation} accumulation x {ranks} = "
    found = source.batch_size * accumulation * dist.world_size()
    if found != source.rows_per_step:  # of a stream of the user's, who says the latter
        product = ""
    return f"{product}{in_all} = {tokens} per step{_budget_of(source)}"


def _budget_of(source: StepSource) -> str:
    """By what its steps are cut."""
    budget = source.micro_batch_tokens
    return f", in micro-batches of {budget:,} tokens" if isinstance(budget, int) else ""


def facts(work: Work, size: Size, settings: "Settings", accumulation: int) -> dict[str, str]:
    """What is about to happen, by name: model, batch-size equation, steps, precision, expected memory."""
    trainer, engine, source = work.algorithm, work.engine, innermost(work.source)
    model, steps = trainer.base_model, work.horizon.total()
    processes = counted(dist.num_processes(), "process")
    memory = expected_memory(size, engine, source, settings)
    learning_rate = f"{rate_of_run(trainer.optimizer):g}"
    if isinstance(trainer.scheduler, Scheduler):
        learning_rate = trainer.scheduler.describe()
    multiples = describe_multiples(trainer.optimizer)
    if multiples:
        learning_rate = f"{learning_rate}; {multiples}"
    found = {
        "trainer": f"{type(trainer).__name__} of {type(model).__name__}",
        "parameters": describe_size(size),
        **_adapters_of(size),
        **_frozen_of(size, model),
        **_images_of(source),
        "batch": describe_batch(source, accumulation),
        "steps": "unknown" if steps is None else f"{steps:,}, from step {work.run.progress.step:,}",
        "learning rate": learning_rate,
        "engine": f"{type(engine).__name__}, {processes}",
        "precision": f"{engine.precision_name} on {engine.device}",
        "memory": describe_memory(memory),
    }
    is_described = bool(settings.description)  # then attention is an option of the configuration
    if not is_described and (slow := slow_attention(model, engine.device)):
        found["attention"] = slow
    if rounded := describe_rounded(model):
        found["float8"] = rounded
    if balance := trainer.regulariser.describe():
        found["experts"] = balance
    if why := _whole_logits(trainer.model):
        found["head"] = f"all logits of a micro-batch at once, not in chunks. {why}"
    if trainer.prompt_format == "chat" and trainer.tokenizer is not None and has_default_template(trainer.tokenizer):
        found["chat template"] = describe_default(trainer.tokenizer)
    if not_used := left_out(settings):
        found["left out"] = not_used
    if settings.save_in_background:
        copy = engine.bytes_to_copy(size.saved_bytes, size.optimizer_bytes)
        found["saving"] = f"in the background, from a copy of {human(copy, 'B')} in host memory"
    return found


def _whole_logits(module: nn.Module) -> str:
    """Why the head of a model does not run in chunks; empty where it does, or where nothing has a head."""
    from llm_trainer.models.scored import ScoredModel

    reasons = [inner.whole_logits for inner in module.modules() if isinstance(inner, ScoredModel)]
    return next(filter(None, reasons), "")


def _adapters_of(size: Size) -> dict[str, str]:
    """The table of a model with adapters, as one fact of several lines."""
    if size.adapters is None:
        return {}
    return {"adapters": f"\n{'':>16}".join(size.adapters.lines())}


def _images_of(source: StepSource) -> dict[str, str]:
    """How many images a step shows, and what a tower sees of them; nothing where there are none."""
    if isinstance(source, RolloutSource):
        source = source.source
    found = pictured(source)
    if found is None or not isinstance(source, SampleStream):
        return {}
    images, patches = (source.rows_per_step * mean for mean in found)
    in_all = found.images * len(source)
    each = found.patches / found.images
    return {
        "images": f"{images:,.3g} with {patches:,.0f} patches per step on average ({each:,.0f} each), "
        f"{in_all:,.0f} in an epoch; one that a micro-batch shows twice is encoded once"
    }


def _frozen_of(size: Size, model: nn.Module) -> dict[str, str]:
    """The parts of a model that sees, and what of a model is not trained, but where a table of adapters says it."""
    from llm_trainer.models.freezing import describe_frozen, describe_parts

    frozen = "" if size.adapters is not None else describe_frozen(model)
    found = {"parts": describe_parts(model), "not trained": frozen}
    return {name: text for name, text in found.items() if text}


def describe_choices(choices: Sequence[Choice]) -> list[str]:
    """What was chosen, why, and in brackets the option by which the user decides otherwise; a line each, in columns."""
    names = max((len(choice.name) for choice in choices), default=0)
    values = max((len(choice.value) for choice in choices), default=0)
    lines = []
    for choice in choices:
        lines.append(f"{choice.name:<{names}}  {choice.value:<{values}}  {choice.why} [{choice.option}]")
    return lines


def screen(facts: Mapping[str, str], ledgers: Sequence[Ledger], choices: Sequence[Choice] = ()) -> str:
    """Facts, one per line, what was chosen, and where every token of the data went."""
    lines = [f"{name:>14}  {text}" for name, text in facts.items()]
    if choices:
        lines.append(f"{'automatic':>14}  the option in brackets decides otherwise")
        lines += [f"{'':>14}  {line}" for line in describe_choices(choices)]
    for ledger in ledgers:
        lines.append(f"{'data':>14}  {ledger.name}")
        if ledger.kept_in:
            lines.append(f"{'':>14}  tokens in {ledger.kept_in}")
        lines += [f"{'':>14}  {line}" for line in ledger.lines()]
    return "\n".join(lines)
