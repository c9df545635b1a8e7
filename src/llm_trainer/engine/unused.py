"""Parameters that a micro-batch does not use, on one rank or on all: engines exchange gradients parameter by parameter."""

import zlib
from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llm_trainer.engine import dist


class Unused:
    """Notes which parameters the backwards of a step reach, on this rank; tells ranks what the others have left out.

    What no rank has used in a whole step has no gradient, as in one process: the optimizer leaves it alone.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._targets: dict[Tensor, tuple[str, Tensor]] = {}
        self._used: set[Tensor] = set()  # by the backward under way
        self._used_in_step: set[Tensor] = set()
        self._completes = False
        self._exchanges: bool | None = (
            None  # whether ranks tell each other what they have not used; the first step says
        )

    def add(self, name: str, leaf: Tensor, target: Tensor) -> None:
        """Watch a parameter.

        Args:
            name: of it, in messages.
            leaf: to which a backward gives its gradient; the parameter itself, or what stands for it in a forward.
            target: whose gradient the optimizer reads.
        """
        if leaf not in self._targets:
            self._targets[leaf] = (name, target)
            leaf.register_post_accumulate_grad_hook(self._note)

    def add_all(self, module: nn.Module) -> None:
        """Watch all parameters of `module` that are trained."""
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                self.add(name, parameter, parameter)

    def _note(self, leaf: Tensor) -> None:
        if not self._completes:
            self._used.add(leaf)

    def begin(self) -> None:
        """Before a backward."""
        self._used_in_step |= self._used
        self._used.clear()

    def complete(self) -> None:
        """After a backward in which DDP exchanges gradients: it waits for one of every parameter, so give it zeros."""
        missing = [leaf for leaf in self._targets if leaf not in self._used]
        if not missing:
            return
        zeros = [leaf.new_zeros(()).expand_as(leaf) for leaf in missing]  # of one number each: memory may be short
        self._completes = True  # a second backward: DDP's hooks stand at the parameters, whatever leads there
        try:
            torch.autograd.backward(missing, zeros)
        finally:
            self._completes = False

    def make_up(self, module: DistributedDataParallel, has_begun: bool) -> None:
        """After a failure on this rank: bring the exchange of gradients that other ranks wait in to its end, with zeros.

        DDP is then as after any other backward, on every rank, and the gradients are to be dropped.

        Args:
            module: DDP around the model.
            has_begun: the last forward of the step is done, so the failure may lie inside the backward that exchanges.
        """
        if not has_begun:
            module.reducer._rebuild_buckets()  # talks to the others at the second step's first forward, else it does nothing
            module.reducer.prepare_for_backward([])
            self.begin()
        self.complete()

    def in_step(self) -> list[Tensor]:
        """After all backwards of a step: the leaves that this rank has not used; begins a new step."""
        self.begin()
        unused = [leaf for leaf in self._targets if leaf not in self._used_in_step]
        self._used_in_step.clear()
        return unused

    def drop(self) -> None:
        """After all backwards of a step: leave parameters that no rank has used without a gradient."""
        unused = set(self.in_step())
        if self._exchanges is None:
            self._exchanges = dist.largest(len(unused), self._device) > 0
        if not self._exchanges:
            return
        flags = [float(leaf in unused) for leaf in self._targets]
        for (_, target), ranks in zip(self._targets.values(), dist.sum_numbers(flags, self._device), strict=True):
            if ranks == dist.world_size():
                target.grad = None

    def differences(self) -> str:
        """After all backwards of a step: what some ranks have used and others not, in words; empty if nothing."""
        return used_differently([self._targets[leaf][0] for leaf in self.in_step()])


def reached_by(loss: Tensor) -> set[Tensor]:
    """The leaves that a backward of `loss` will give gradients to."""
    leaves, seen, to_visit = set(), set(), [loss.grad_fn]
    while to_visit:
        node = to_visit.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(node.variable)
        to_visit += [following for following, _ in node.next_functions]
    return leaves


def used_differently(unused: Collection[str]) -> str:
    """Which parameters some ranks use and others do not, in words; empty where all use the same. All ranks ask together.

    Args:
        unused: names of those that this rank does not use.
    """
    if dist.all_equal(zlib.crc32("\n".join(sorted(unused)).encode())):
        return ""
    everybody = [set(names) for names in dist.gather_objects(sorted(unused))]
    differing = sorted(set.union(*everybody) - set.intersection(*everybody))
    told = []
    for name in differing[:5]:
        without = [str(rank) for rank, names in enumerate(everybody) if name in names]
        told.append(f"{name} is not used on rank {_few(without)}")
    more = f", and {len(differing) - 5} more" if len(differing) > 5 else ""
    return f"the ranks use different parameters: {', '.join(told)}{more}"


def _few(words: Iterable[str]) -> str:
    listed = list(words)
    if len(listed) > 4:
        listed[4:] = ["..."]
    return ", ".join(listed)
