"""Whether a model keeps documents apart that are laid flat in one row. It is tried out, not read from a list."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from llm_trainer.layout import Packing, couples_rows
from llm_trainer.models.heads import small_sibling
from llm_trainer.models.inside import adapted_model, evaluating, language_config, transformers_model
from llm_trainer.models.scored import restarting_positions
from llm_trainer.models.seeing import Seeing, accepted_inputs
from llm_trainer.models.vision import ImageInputs

# Two documents of ids that every vocabulary has. The second is compared after its first token, which nothing predicts.
FIRST, SECOND = (0, 1, 1, 0, 1, 0, 0), (1, 0, 1, 1, 0)
# Of the difference that seeing the first document makes to the second, how much may be rounding.
ROUNDING, ROUNDING_HALF = 0.01, 0.1
DENSE = ("sdpa", "eager")  # attention that computes all pairs of tokens of a row, and masks those of other documents


class Reader(Protocol):
    """A model with a number for every token: `ScoredModel`, `Rewarding`."""

    def per_token(self, input_ids: Tensor, **layout: Any) -> Tensor:
        """Of `input_ids [B, T]`, or `[1, N]` with `position_ids` and `document_lengths`: numbers of the same shape."""


def packing_of(model: nn.Module, reader: Callable[[nn.Module], Any], device: torch.device) -> Packing:
    """Try a model out on two short documents, alone and laid flat, in the precision of the context.

    The model stays as it is: evaluation mode, without gradients, no buffer changed and no random number consumed. Where its
    weights are not on `device` (an engine brings them there, or they come from another process), a model of the same class
    and configuration is tried there, with one layer of each type.

    Args:
        model: any module.
        reader: makes a `Reader` of it.
        device: where it will train.
    """
    from transformers import PreTrainedModel

    name = type(model).__name__
    is_elsewhere = any(parameter.device.type != device.type for parameter in model.parameters())
    try:
        with _without_a_trace(model, device), torch.no_grad():
            tried, inner = model, adapted_model(model)
            if is_elsewhere and isinstance(inner, PreTrainedModel):
                sibling: nn.Module = small_sibling(inner)
                tried = sibling.to(device, inner.dtype)
            with evaluating(tried):
                fault = _fault(reader(tried), tried)
    except Exception as error:  # NOTE: whatever a model of the user's raises, it can be trained on padded rows
        said = str(error).partition(";")[0].partition("\n")[0]
        fault = f"it cannot be tried: {type(error).__name__}: {said}"
    has_batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    if has_batch_norm:
        fault = "its BatchNorm sees padding as well"
    if fault:
        fault = f"{name}: {fault}"
    return Packing(fault, _dense_width(model), couples_rows(model))


@contextmanager
def _without_a_trace(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The context after which random numbers and buffers are as before: a model may count its calls, or draw by itself."""
    noise = random.getstate(), np.random.get_state()
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
    cuda = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(cuda):
            yield
    finally:
        random.setstate(noise[0])
        np.random.set_state(noise[1])
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _fault(reader: Any, model: nn.Module) -> str:
    """What is wrong with documents laid flat, of text and, where the model takes them, with images; empty: nothing."""
    accepted = accepted_inputs(model)
    if accepted is not None and "position_ids" not in accepted:
        return "its forward takes no position_ids"
    parameter = next(model.parameters())
    in_half = torch.is_autocast_enabled(parameter.device.type) or parameter.dtype.itemsize < torch.float32.itemsize
    share = ROUNDING_HALF if in_half else ROUNDING
    fault = _not_apart(reader, [torch.tensor([ids], device=parameter.device) for ids in (FIRST, SECOND)], share)
    vision = reader.vision if isinstance(reader, Seeing) else None
    if fault or vision is None or vision.model is None:
        return fault
    images = vision.example(2)
    shown = [vision.image_token_id] * int(images.lengths[0])
    documents = []
    for ids, place in ((FIRST, 2), (SECOND, 1)):  # at other positions: some models look images up by these
        documents.append(torch.tensor([[*ids[:place], *shown, *ids[place:]]], device=parameter.device))
    fault = _not_apart(reader, documents, share, images)
    return f"with images, {fault}" if fault else ""


def _not_apart(reader: Reader, documents: list[Tensor], share: float, images: ImageInputs | None = None) -> str:
    """What is wrong with two documents `[1, T]` laid flat; empty: nothing.

    Args:
        reader: of the model.
        documents: two, of which each shows one of the `images`, where there are some.
        share: of the difference that seeing the first document makes to the second, how much may be rounding.
        images: two.
    """
    together = torch.cat(documents, dim=1)
    lengths = torch.tensor([document.shape[1] for document in documents])
    first = int(lengths[0])
    positions = restarting_positions(lengths).to(together.device)
    after_the_first = slice(first + 1, None)
    both: dict[str, Any] = {} if images is None else {"images": images}
    each: list[dict[str, Any]] = [{}, {}]
    if images is not None:
        each = [{"images": images._replace(order=torch.tensor([index]))} for index in range(2)]

    # 1. alone, flat, and as one document: what it looks like where the second sees the first
    alone = torch.cat([reader.per_token(ids, **own) for ids, own in zip(documents, each, strict=True)], dim=1)
    flat = reader.per_token(together, position_ids=positions, document_lengths=lengths, **both)
    as_one = reader.per_token(together, **both)

    # 2. the difference must be rounding only
    differences = (flat - alone).float().abs()
    difference = float(torch.cat([differences[:, 1:first], differences[:, after_the_first]], dim=1).max())
    if_seen = float((as_one - alone)[:, after_the_first].float().abs().max())
    rounding = if_seen * share
    if if_seen == 0.0:
        return "whether documents in one row see each other does not show in its numbers"
    if difference <= rounding:
        return ""
    return (
        f"a document laid behind another is scored otherwise than alone, by {difference:.2g}, where rounding is below "
        f"{rounding:.2g}"
    )


def _dense_width(model: nn.Module) -> int:
    """The width of a model whose attention computes all pairs of tokens of a row, 1 where it is not known; 0 for others."""
    found = transformers_model(model)
    if found is None:
        return 1
    config = language_config(found.config)
    is_dense = config._attn_implementation in DENSE
    return int(getattr(config, "hidden_size", 1)) if is_dense else 0
