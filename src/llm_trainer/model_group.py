"""Several models of one run, such as a policy and its critic, as one module: engines and optimizers see no difference."""

from collections.abc import Mapping

from torch import Tensor, nn

MODEL = (
    "model"  # the name of the model that the run is about, alone or among others; also of its folder in a checkpoint
)


class ModelGroup(nn.Module):
    """The model that a run is about and others beside it, by name; a checkpoint writes each as a folder of its name.

    Members may share parameters, such as a critic on the policy's body: every member's folder is whole nevertheless, unless
    the parameters are those of a model of which the adapters alone are saved.

    Args:
        model: the first of them.
        others: the others by name.
    """

    def __init__(self, model: nn.Module, others: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, member in {MODEL: model, **others}.items():
            self.add_module(name, member)


def members_of(model: nn.Module) -> dict[str, nn.Module]:
    """The models of a group by name; a model that stands alone is called 'model'."""
    if not isinstance(model, ModelGroup):
        return {MODEL: model}
    return {name: member for name, member in model._modules.items() if member is not None}


def weights_by_member(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of a model or group, by their names in it, as those of each member by their names in that."""
    if not isinstance(model, ModelGroup):
        return {MODEL: dict(weights)}
    found: dict[str, dict[str, Tensor]] = {name: {} for name in members_of(model)}
    for name, tensor in weights.items():
        member, _, inner = name.partition(".")
        found[member][inner] = tensor
    return found


def weights_of_group(model: nn.Module, members: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What `weights_by_member` took apart, as one mapping by the names in the model or group."""
    if not isinstance(model, ModelGroup):
        return dict(members[MODEL])
    weights = {}
    for member, tensors in members.items():
        weights.update({f"{member}.{name}": tensor for name, tensor in tensors.items()})
    return weights
