"""Buffers that training changes, such as BatchNorm's running statistics: the same on all ranks, so that one rank's are all."""

import torch
from torch import Tensor, nn

from llm_trainer.engine import dist


class SharedBuffers:
    """Makes the saved buffers of a model that its forward changes equal on all ranks after every step.

    Floating-point ones become the mean over the ranks: running means are linear in what they have seen, so it is the
    running mean over all ranks' rows. Others (counters) become those of the main process.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._changing: list[str] | None = None  # names; None: the first step will say
        self._before: dict[str, Tensor] = {}  # torch's own count of writes leaves BatchNorm's out

    def begin(self) -> None:
        """Before the first step: remember what there is."""
        self._changing = None
        if dist.world_size() > 1:
            self._before = {name: buffer.detach().clone() for name, buffer in self._saved().items()}

    def share(self) -> str:
        """After a step: make them equal; after the first one says which they are, if there are any."""
        if dist.world_size() == 1:
            return ""
        said = ""
        if self._changing is None:
            self._changing = self._that_change()
            if self._changing:
                names = [*self._changing[:4], "..."] if len(self._changing) > 4 else self._changing
                said = (
                    f"buffers that training changes become the mean over the ranks after every step: {', '.join(names)}. "
                    f"BatchNorm still normalises by one rank's rows; torch.nn.SyncBatchNorm does by those of all"
                )
        if self._changing:
            self._make_equal()
        return said

    def _saved(self) -> dict[str, Tensor]:
        """The buffers that a checkpoint holds, by name; no rank knows the shapes of another's caches."""
        saved = self._model.state_dict(keep_vars=True).keys()
        return {name: buffer for name, buffer in self._model.named_buffers() if name in saved}

    def _that_change(self) -> list[str]:
        """Names of what the first step has changed on any rank.

        Raises:
            ValueError: such a buffer has another shape on another rank.
        """
        buffers = self._saved()
        changed = []
        for name, buffer in buffers.items():
            before = self._before.get(name)
            if before is None or before.shape != buffer.shape or not torch.equal(before, buffer):
                changed.append(name)
        self._before = {}
        names = sorted(set().union(*dist.gather_objects(sorted(changed))))
        shapes = [tuple(buffers[name].shape) for name in names if name in buffers]
        everybody = dist.gather_objects(shapes)
        if any(found != shapes for found in everybody):
            raise ValueError(
                f"buffers that training changes ({', '.join(names)}) have different shapes on different ranks: {everybody}; "
                f"expected one shape, or persistent=False for what need not be saved"
            )
        return names

    @torch.no_grad()
    def _make_equal(self) -> None:
        buffers, names = self._saved(), self._changing or []
        floating = [buffers[name] for name in names if buffers[name].is_floating_point()]
        if floating:
            flat = torch.cat([buffer.float().flatten() for buffer in floating])
            mean = dist.all_reduce(flat) / dist.world_size()
            for buffer, part in zip(floating, mean.split([buffer.numel() for buffer in floating]), strict=True):
                buffer.copy_(part.view_as(buffer))
        for name in names:
            if not buffers[name].is_floating_point():
                buffers[name].copy_(dist.broadcast_tensor(buffers[name]))
