"""A reference that moves towards the policy while that learns."""

from torch import nn

from llm_trainer.machine import Machine
from llm_trainer.models.frozen import freeze


class MovingReference:
    """A reference that moves towards the policy from time to time: reference <- alpha * policy + (1 - alpha) * reference.

    With alpha 1 that is TR-DPO's hard update, below it the soft one (Gorbatovski et al. 2024, arXiv:2404.09656).

    Args:
        model: the reference, which is frozen here; or the policy itself, whose values of before move.
        policy: the model that is trained.
        which: 'base': the reference is the policy with its adapters off.
        every: optimizer steps between two moves, at least.
        alpha: how far it moves.

    Attributes:
        moved_at: the step of the last move; 0: there was none.

    Raises:
        ValueError: the policy has no weights of its own that the reference could take, or others than the reference.
    """

    def __init__(self, model: nn.Module, policy: nn.Module, which: str, every: int, alpha: float) -> None:
        if which == "base":
            raise ValueError(
                "ref_sync_steps: the reference is the policy with its adapters off (reference: base), which has no weights "
                "that could move; expected reference: start, or leave ref_sync_steps out"
            )
        if model is not policy:
            different = different_tensors(policy, model)
            if different:
                raise ValueError(
                    f"ref_sync_steps: the reference cannot take the policy's weights: {different}. Expected a model of the "
                    f"same architecture, or none, which means the policy as it is at the start; or leave ref_sync_steps out"
                )
            freeze(model)
        self.model, self.every, self.alpha = model, every, alpha
        self.moved_at = 0

    def move(self, machine: Machine) -> None:
        """Move it if it is time; all processes call this together. A second call at the same step does nothing."""
        if machine.step - self.moved_at >= self.every:
            machine.follow(self.model, self.alpha)
            self.moved_at = machine.step


def different_tensors(ours: nn.Module, theirs: nn.Module) -> str:
    """What is different about the weights of a policy and its reference, but for their values; empty: nothing."""
    here, there = _described(ours), _described(theirs)
    different = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    if not different:
        return ""
    name = different[0]
    return (
        f"{len(different)} tensors differ, such as {name}, which is {here.get(name, 'absent')} in the policy and "
        f"{there.get(name, 'absent')} in the reference"
    )


def _described(model: nn.Module) -> dict[str, str]:
    """By name the shapes of a model's parameters and persistent buffers, and which are no parameters of their own."""
    own, found = dict(model.named_parameters()), {}
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        found[name] = f"{shape}" if name in own else f"{shape}, tied or a buffer"
    return found
