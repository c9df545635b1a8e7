"""Which layers of a model get adapters: what target, parts and experts of a section mean in it."""

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import NamedTuple

from torch import nn

from llm_trainer.config.adapters import ALL_LINEAR, LANGUAGE_MODEL, LORA, RANK, AdapterConfig
from llm_trainer.models.experts import fused_experts, recorded_routers
from llm_trainer.models.quantize import is_quantized


class Targets(NamedTuple):
    """What gets adapters, by names in the model.

    Attributes:
        modules: layers, in the order of the model.
        parameters: matrices of modules that are no layers: `[E, ., .]` of fused experts, `[E, D]` of routers.
    """

    modules: list[str]
    parameters: list[str]


def find_targets(model: nn.Module, config: AdapterConfig) -> Targets:
    """What `target`, `parts` and `experts` mean in a model.

    Raises:
        ValueError: they mean nothing in it, or a matrix is smaller than the rank.
    """
    parts = Parts(model)
    parts.check(config.parts)
    for ending in config.modules_to_save:
        if not any(ends_in(name, ending) for name, _ in model.named_modules()):
            raise ValueError(
                f"adapter_config.modules_to_save: {ending} matches no module of this {type(model).__name__}"
            )
    routers = _routers(model)

    # 1. what the target names, wherever it is
    named: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        is_whole = any(ends_in(name, ending) for ending in config.modules_to_save)
        if name and not is_whole and _is_meant(config.target, name, module, routers, config.experts):
            named[name] = module
    if config.target == ALL_LINEAR:
        for head in _heads(model):
            named.pop(head, None)
    elif not named:
        raise ValueError(_not_found(model, config))

    # 2. what of it is in the parts that are wanted
    inside = {name: module for name, module in named.items() if parts.of(name) in config.parts}
    found = Targets([], [])
    for name, module in inside.items():
        if name in routers and not isinstance(module, nn.Linear):
            found.parameters.append(f"{name}.weight")
        else:
            found.modules.append(name)
    if config.experts:
        experts = [name for name in fused_experts(model) if parts.of(name) in config.parts]
        if not experts and not any("experts" in name.split(".") for name in inside):
            raise ValueError(f"adapter_config.experts: found no experts in {', '.join(config.parts)}; expected false")
        found.parameters.extend(experts)
    if not found.modules and not found.parameters:
        elsewhere = ", ".join(dict.fromkeys(parts.of(name) for name in named)) or "none of its parts"
        raise ValueError(
            f"adapter_config.target: {config.target} is found in {elsewhere}, which is not trained; expected layers in "
            f"{', '.join(config.parts)}, or parts: [{elsewhere}]"
        )
    _check_rank(model, found, config)
    _check_ties(model, [*found.modules, *config.modules_to_save])
    return found


def tables_of(model: nn.Module, config: AdapterConfig, targets: Targets) -> list[str]:
    """Names of embedding and head, of tied ones of the embedding, of which peft is to train some rows.

    Raises:
        ValueError: all of their rows are trained too, or peft would compute something else with such rows.
    """
    from transformers import PreTrainedModel

    kind = type(model).__name__
    if config.kind != LORA:
        raise ValueError(f"adapter_config.kind: {config.kind} trains no rows of new tokens; expected lora")
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"new_tokens: got a {kind}, expected a language model of transformers")
    if is_quantized(model):
        raise ValueError(
            "new_tokens: a base in few bits is not saved, nor would its new rows be; expected one in 16 or 32"
        )
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules() if module in (embedding, head)}
    for name in names.values():
        if any(ends_in(name, other) for other in (*targets.modules, *config.modules_to_save)):
            raise ValueError(
                f"adapter_config: rows of new tokens are trained of {name}, which target or modules_to_save names too; "
                f"expected it in neither"
            )
    if head is None:
        return [names[embedding]]
    is_tied = head.weight is embedding.weight
    if is_tied != bool(getattr(model.config, "tie_word_embeddings", False)):
        raise ValueError(
            f"new_tokens: embedding and head of this {kind} are tied: {is_tied}, and its configuration says "
            f"tie_word_embeddings: {not is_tied}, by which peft goes; expected both to agree"
        )
    if getattr(head, "bias", None) is not None:
        raise ValueError(
            f"new_tokens: the head of this {kind} has a bias, which peft leaves out where rows of it are trained; add the "
            f"tokens in a run without adapters"
        )
    return [names[embedding]] if is_tied else [names[embedding], names[head]]


def _is_meant(
    target: str | list[str], name: str, module: nn.Module, routers: Mapping[str, nn.Module], with_experts: bool
) -> bool:
    """Whether `target` means a module; a router only where it says its name."""
    if module._parameters.get("weight") is None:
        return False  # a container, of layers or of experts: what is meant is inside
    leaf = name.rpartition(".")[2]
    if target == ALL_LINEAR:
        is_expert = "experts" in name.split(".")
        return _is_linear(module) and name not in routers and (with_experts or not is_expert)
    if isinstance(target, str):
        says_name = re.search(rf"(?<!\w){re.escape(leaf)}(?!\w)", target) is not None
        return re.fullmatch(target, name) is not None and (says_name or name not in routers)
    return any(ends_in(name, ending) for ending in target)


def ends_in(name: str, ending: str) -> bool:
    """Whether a name is `ending`, or ends in it after a dot."""
    return name == ending or name.endswith(f".{ending}")


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _heads(model: nn.Module) -> list[str]:
    """Names of the layers that make logits or scores, which are a vocabulary's or new and not for adapters."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return []
    heads = {model.get_output_embeddings(), getattr(model, "score", None)}
    return [name for name, module in model.named_modules() if module in heads]


def _routers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that choose experts, by name: those of which transformers records `router_logits`, and gates by name."""
    recorded, found = recorded_routers(model), {}
    for name, module in model.named_modules():
        parent, _, leaf = name.rpartition(".")
        is_gate = leaf in ("gate", "router", "shared_expert_gate") and _has_experts(model.get_submodule(parent))
        if is_gate or name in recorded:
            found[name] = module
    return found


def _has_experts(module: nn.Module) -> bool:
    return any("expert" in name for name, _ in module.named_children())


class Parts:
    """The parts of a model by name: `language_model`, and what else transformers has beside it, such as `visual`."""

    def __init__(self, model: nn.Module) -> None:
        from transformers import PreTrainedModel

        self._others: dict[str, str] = {}  # beginning of names -> part
        if not isinstance(model, PreTrainedModel) or model.base_model is model:
            return
        body, decoder = model.base_model, model.get_decoder()
        if decoder is body or not isinstance(body, nn.Module):
            return
        inside = set(decoder.modules())
        (where,) = [name for name, module in model.named_modules() if module is body]
        for name, child in body.named_children():
            if child not in inside and decoder not in set(child.modules()):
                self._others[f"{where}.{name}"] = name

    def of(self, name: str) -> str:
        """The part of a module or parameter."""
        for beginning, part in self._others.items():
            if name == beginning or name.startswith(f"{beginning}."):
                return part
        return LANGUAGE_MODEL

    @property
    def names(self) -> list[str]:
        return [LANGUAGE_MODEL, *self._others.values()]

    def check(self, wanted: Iterable[str]) -> None:
        """
        Raises:
            ValueError: one is no part of this model.
        """
        for part in wanted:
            if part not in self.names:
                raise ValueError(f"adapter_config.parts: got {part!r}, and this model has {', '.join(self.names)}")


def _not_found(model: nn.Module, config: AdapterConfig) -> str:
    """What to say of a target that matches nothing."""
    leaves = dict.fromkeys(name.rpartition(".")[2] for name, module in model.named_modules() if _is_linear(module))
    wanted = [config.target] if isinstance(config.target, str) else config.target
    fused = {name.rpartition(".")[2] for name in fused_experts(model)}
    near: list[str] = []
    for name in wanted:
        near += get_close_matches(name.rpartition(".")[2], leaves, n=2)
    advice = f"expected ends of names: {', '.join(leaves)}"
    if fused and any(name in fused | {"gate_proj", "up_proj", "w1", "w2", "w3"} for name in wanted):
        advice = "the experts of this model are fused, which experts: true reaches"
    elif isinstance(config.target, str) and config.target in leaves:
        advice = f"a regular expression matches whole names; for ends of names write target: [{config.target}]"
    elif near:
        advice = f"did you mean {' or '.join(dict.fromkeys(near))}?"
    return f"adapter_config.target: {config.target} matches no layer of this {type(model).__name__}; {advice}"


def _shape(model: nn.Module, name: str) -> Sequence[int]:
    """Of a matrix, by its name; one in 4 bits lies in memory otherwise, and its layer knows."""
    layer = model.get_submodule(name.rpartition(".")[0])
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return model.get_parameter(name).shape


def _check_rank(model: nn.Module, targets: Targets, config: AdapterConfig) -> None:
    if config.kind != LORA:
        return
    rank = config.rank or RANK
    for name in [f"{module}.weight" for module in targets.modules] + targets.parameters:
        shape = _shape(model, name)
        if rank > min(shape[-2:]):
            raise ValueError(
                f"adapter_config.rank: got {rank}, but {name} is {list(shape)}; expected at most {min(shape[-2:])}"
            )
        if config.needs_rows and 2 * rank > min(shape[-2:]):
            raise ValueError(
                f"adapter_config.rank: got {rank}, and init: {config.init} looks for twice as many directions, but {name} is "
                f"{list(shape)}; expected at most {min(shape[-2:]) // 2}"
            )


def _check_ties(model: nn.Module, endings: Iterable[str]) -> None:
    """
    Raises:
        ValueError: the weights of a layer are those of another one too, whose they would be no longer.
    """
    first_names: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = first_names.setdefault(parameter, name)
        for one, other in ((name, first), (first, name)):
            if one != other and any(ends_in(one, f"{ending}.weight") for ending in endings):
                raise ValueError(
                    f"adapter_config.target: {one.removesuffix('.weight')} has the weights of "
                    f"{other.removesuffix('.weight')}, to which they are tied, and would have others; expected other "
                    f"layers, or a model whose weights are apart (tie_word_embeddings: false)"
                )
