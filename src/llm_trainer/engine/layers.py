"""The layers that a model consists of, which are sharded, and compiled, one by one."""

from torch import nn

from llm_trainer.models.inside import transformers_models


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The layers of a model: those a transformers model names, else the members of every `ModuleList`."""
    names: set[str] = set()
    for model in transformers_models(module):
        names.update(model._no_split_modules or ())
    if names:
        return [inner for inner in module.modules() if type(inner).__name__ in names]
    in_lists: list[nn.Module] = []
    for inner in module.modules():
        if isinstance(inner, nn.ModuleList):
            in_lists += [layer for layer in inner if next(layer.parameters(), None) is not None]
    return in_lists
