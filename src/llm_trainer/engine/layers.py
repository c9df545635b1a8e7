"""The layers that a model consists of, which are sharded, and compiled, one by one."""

from torch import nn


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The layers of a model: those a transformers model names, else the members of every `ModuleList`."""
    from transformers import PreTrainedModel

    names: set[str] = set()
    in_lists: list[nn.Module] = []
    for inner in module.modules():
        if isinstance(inner, PreTrainedModel):
            names.update(inner._no_split_modules or ())
        elif isinstance(inner, nn.ModuleList):
            in_lists += [layer for layer in inner if next(layer.parameters(), None) is not None]
    if names:
        return [inner for inner in module.modules() if type(inner).__name__ in names]
    return in_lists
