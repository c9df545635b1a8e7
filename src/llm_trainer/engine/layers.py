"""The layers that a model consists of, which are sharded, and compiled, one by one."""

from torch import nn

from llm_trainer.models.inside import beside_language, transformers_models


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


def language_layers_of(module: nn.Module) -> list[nn.Module]:
    """Those of `layers_of` that read tokens: of models that see, no layer of a tower or projector."""
    beside = set[int]()
    for model in transformers_models(module):
        beside.update(map(id, beside_language(model)))
    found = []
    for layer in layers_of(module):
        if not any(id(parameter) in beside for parameter in layer.parameters()):
            found.append(layer)
    return found
