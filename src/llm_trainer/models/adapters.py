"""Adapters of the `peft` library, put into a model; the only file that imports it."""

import dataclasses
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from llm_trainer.checkpoint.adapter_bases import BASE_FOLDER, Base, fingerprint_of, read_base
from llm_trainer.config.adapters import ALL_LINEAR, INITS, LORA, OF_FIRST_ROWS, RANK, AdapterConfig
from llm_trainer.config.errors import require
from llm_trainer.models.inside import has_adapters, sees_images, transformers_model
from llm_trainer.models.pretrained import ENDINGS, Kind
from llm_trainer.models.quantize import hush, is_quantized
from llm_trainer.models.targets import Targets, find_targets, tables_of

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

_TASKS = {Kind.ANSWER_REWARD_MODEL: "SEQ_CLS", Kind.STEP_REWARD_MODEL: "TOKEN_CLS"}
# Options of peft that have names of their own in `AdapterConfig`.
_OWN_NAMES = {"target_modules": "target", "target_parameters": "experts", "modules_to_save": "modules_to_save"}
_OWN_NAMES_OF_LORA = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "init_lora_weights": "init",
    "use_rslora": "rslora",
    "use_dora": "dora",
}
# Its options that are no user's: what peft notes itself, and what would look past our choice of layers.
_NOT_OPTIONS = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
_NOT_OPTIONS |= {"inference_mode", "exclude_modules", "layers_to_transform", "layers_pattern", "runtime_config"}
# LoRA's relatives that need data, several adapters, or a loop that knows them.
_NOT_OPTIONS |= {"loftq_config", "eva_config", "corda_config", "lora_ga_config", "arrow_config", "monteclora_config"}
_NOT_OPTIONS |= {"alora_invocation_tokens", "layer_replication", "megatron_config", "megatron_core", "kasa_config"}
_NOT_OPTIONS |= {"trainable_token_indices", "ensure_weight_tying", "use_bdlora", "velora_config"}

WAITS = "_awaited_init"  # an attribute of a model whose adapters are to begin with what rows say


def adapt(model: nn.Module, config: AdapterConfig, new_tokens: Sequence[int] = ()) -> "PeftModel":
    """Put adapters into a model, in place; from then on they alone have gradients.

    New ones are drawn from torch's random state, as `peft.get_peft_model` draws them. Those of `init: eva` and `lora_ga` are
    made by the trainer that gets the model, of the first rows of its data.

    Args:
        model: any module; of transformers' models the parts are known. It may be on the meta device.
        config: which adapters.
        new_tokens: ids whose rows of embedding and head are trained too, of these tables nothing else; of LoRA.
            `models.vocabulary.extend_vocabulary` returns them.

    Returns:
        The `PeftModel` around it, which is what a trainer and an optimizer are to be given.

    Raises:
        ValueError: (or `ConfigError`) the adapters cannot be had: the message says why, and what to write instead.
    """
    require("peft", "adapter_config", "leave the section out, which trains all weights")
    if has_adapters(model):
        names = ", ".join(model.peft_config)  # type: ignore[arg-type]
        raise ValueError(
            f"adapter_config: the model has an adapter called {names} already; expected a model without any. Go on "
            f"training that one, or merge it first (merge_and_unload)"
        )
    if config.path is not None:
        if new_tokens:
            raise ValueError(f"adapter_config.path: {config.path} says which rows are trained; expected no new tokens")
        return _continued(model, Path(config.path))
    _check_first_rows(model, config, new_tokens)
    targets = _without_namesakes(model, config, find_targets(model, config))
    described = _described(model, config, targets)
    if new_tokens:
        rows = {table: list(new_tokens) for table in tables_of(model, config, targets)}
        described.trainable_token_indices = rows  # type: ignore[attr-defined]
    try:
        adapted = _inserted(model, described)
    except (ValueError, TypeError) as error:  # a layer or a combination that the method does not know
        raise ValueError(f"adapter_config: peft's {config.kind} refuses: {error}") from error
    _check_adapted(adapted, targets)
    if config.needs_rows:
        setattr(adapted, WAITS, config.init)
    return adapted


def opened(model: nn.Module, folder: Path, active: tuple[str, ...] = ()) -> "PeftModel":
    """A base with the adapters of a PEFT folder, to read from; those of its subfolders are there too.

    Args:
        model: the base, in which they are put.
        active: names of those that compute, the first being 'default'; none: that one alone.

    Raises:
        ValueError: they do not fit the model.
    """
    peft = library()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of a name of transformers that peft still uses
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # as it was trained
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            adapted: PeftModel = peft.PeftModel.from_pretrained(model, str(folder), torch_device="cpu")
        except (ValueError, RuntimeError, UserWarning) as error:
            raise ValueError(
                f"{folder}: the adapters do not fit their base, a {type(model).__name__}: {str(error)[:300]}"
            ) from error
    for config in sorted(folder.glob("*/adapter_config.json")):
        add_opened(adapted, config.parent, config.parent.name)
    if active:
        adapted.base_model.set_adapter(list(active))  # type: ignore[operator]
    return adapted


def add_opened(adapted: "PeftModel", folder: Path, name: str) -> None:
    """Put the adapters of one more PEFT folder into a model that has some, to read from; they do not compute yet.

    Raises:
        ValueError: they do not fit the model.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message="Model with `tie_word_embeddings=True`")
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            adapted.load_adapter(str(folder), name, torch_device="cpu")
        except (ValueError, RuntimeError, UserWarning) as error:
            base = type(adapted.get_base_model()).__name__  # type: ignore[operator]
            raise ValueError(f"{folder}: the adapters do not fit their base, a {base}: {str(error)[:300]}") from error


def has_own_adapters(layer: nn.Module) -> bool:
    """Whether peft has put adapters around a layer, which are added to its weight when they are merged."""
    library()
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(layer, BaseTunerLayer)


def _check_first_rows(model: nn.Module, config: AdapterConfig, new_tokens: Sequence[int]) -> None:
    """
    Raises:
        ValueError: an initialisation that looks at rows was not tried with such a model.
    """
    if not config.needs_rows:
        return
    found = transformers_model(model)
    why = ""
    if found is not None and sees_images(found.config):
        why = "it sees images, with which this was not tried"
    elif new_tokens:
        why = "it gets rows of new tokens (vocabulary_config), with which this was not tried"
    elif config.init == "lora_ga" and is_quantized(model):
        why = "its weights are in few bits and have no gradients"
    if why:
        kept = [name for name in INITS if name not in OF_FIRST_ROWS]
        raise ValueError(
            f"adapter_config.init: got {config.init}, and found a {type(model).__name__}: {why}; expected {', '.join(kept)}"
        )


def library() -> Any:
    """`peft`, without what it and bitsandbytes, where that is installed, warn of while they are imported."""
    hush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it imports
        import peft
    return peft


def _inserted(model: nn.Module, described: "PeftConfig") -> "PeftModel":
    peft = library()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of a name of transformers that peft still uses
        warnings.filterwarnings("ignore", message="lora with eva initialization used")  # of how to save memory
        adapted: PeftModel = peft.get_peft_model(model, described)
    return adapted


def _without_namesakes(model: nn.Module, config: AdapterConfig, targets: Targets) -> Targets:
    """`targets` but for dense layers that peft, here and where the folder is opened, takes for the experts beside them.

    It takes names such as `shared_experts.gate_proj` for those that experts had before transformers fused them.

    Raises:
        ValueError: the configuration names them.
    """
    if config.kind != LORA or transformers_model(model) is None:
        return targets
    peft = library()
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    def is_read_as_it_is(leaf: str) -> bool:
        tried = peft.LoraConfig(target_modules=[leaf])
        try:
            convert_peft_config_for_transformers(tried, model=model, conversions=None)
        except ValueError:  # one of several that would be fused
            return False
        return leaf in tried.target_modules

    leaves = {name.rpartition(".")[2] for name in targets.modules}
    lost = {leaf for leaf in leaves if not is_read_as_it_is(leaf)}
    if lost and config.target != ALL_LINEAR:
        raise ValueError(
            f"adapter_config.target: peft {peft.__version__} takes {', '.join(sorted(lost))} of a {type(model).__name__} for "
            f"its experts, though the layers of that name are others (shared experts, or layers without experts); expected a "
            f"target without them; experts: true reaches the experts"
        )
    return targets._replace(modules=[name for name in targets.modules if name.rpartition(".")[2] not in lost])


# In peft's words, and back.


def _described(model: nn.Module, config: AdapterConfig, targets: Targets) -> "PeftConfig":
    """
    Raises:
        ValueError: an option is none of the method's.
    """
    peft = library()
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind: Any = PEFT_TYPE_TO_CONFIG_MAPPING[config.kind.upper()]  # type: ignore[index]
    values: dict[str, Any] = {"target_modules": targets.modules, "task_type": _task_of(model)}
    own_names = _OWN_NAMES
    if config.kind == LORA:
        rank = config.rank or RANK
        own_names = _OWN_NAMES | _OWN_NAMES_OF_LORA
        is_empty = any(parameter.is_meta for parameter in model.parameters())
        values |= {
            "r": rank,
            "lora_alpha": config.alpha or 2 * rank,
            "lora_dropout": config.dropout,
            "use_rslora": config.rslora,
            "use_dora": config.dora,
            # Weights that come from another process are not there to look at: neither are the adapters' counted.
            "init_lora_weights": True if is_empty else INITS.get(config.init, config.init),
            "target_parameters": targets.parameters or None,
        }
        if config.init == "eva" and not is_empty:
            values["eva_config"] = peft.EvaConfig(rho=1.0)  # all layers keep their rank
        if config.init == "lora_ga" and not is_empty:
            values["lora_ga_config"] = peft.LoraGAConfig()
    if config.modules_to_save:
        values["modules_to_save"] = list(config.modules_to_save)
    also = _also_named(model, targets.modules)
    if also:
        values["exclude_modules"] = also
    known = sorted({field.name for field in dataclasses.fields(kind)} - _NOT_OPTIONS - own_names.keys())
    for name in config.options:
        if name in own_names:
            raise ValueError(f"adapter_config.options: {name} is adapter_config.{own_names[name]}; write it there")
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"adapter_config.options: {config.kind} has no {name!r}; {hint}known: {', '.join(known)}")
    options = dict(config.options)
    if "feedforward_modules" in options:  # of IA3: those of its layers whose inputs it scales, by their whole names too
        endings = tuple(f".{ending}" for ending in options["feedforward_modules"])
        options["feedforward_modules"] = [name for name in targets.modules if name.endswith(endings)]
    try:
        described: PeftConfig = kind(**values, **options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"adapter_config.options: peft's {config.kind} refuses: {error}") from error
    return described


def _task_of(model: nn.Module) -> str | None:
    """What peft calls what the model is for, by which other tools open its folder."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return None
    for ending, kind in ENDINGS.items():
        if type(model).__name__.endswith(ending):
            return _TASKS[kind]
    return None if model.get_output_embeddings() is None else "CAUSAL_LM"


def _also_named(model: nn.Module, modules: list[str]) -> list[str]:
    """What peft, to which a name means all that end in it, would take besides `modules`."""
    chosen, endings = set(modules), tuple(f".{name}" for name in modules)
    return [name for name, _ in model.named_modules() if name not in chosen and name.endswith(endings)]


def _check_adapted(model: "PeftModel", targets: Targets) -> None:
    """
    Raises:
        ValueError: peft has put adapters elsewhere. It renames layers of some mixtures of experts.
    """
    modules, parameters = set(model.targeted_module_names), set(model.targeted_parameter_names)
    missing = sorted(set(targets.modules) - modules | set(targets.parameters) - parameters)
    more = sorted(modules - set(targets.modules) | parameters - set(targets.parameters))
    if missing or more:
        kind = type(model.get_base_model()).__name__
        raise ValueError(
            f"adapter_config.target: in a {kind} peft takes {', '.join(missing[:3]) or 'nothing'} for "
            f"{', '.join(more[:3]) or 'nothing'}, as names of its experts; expected layers of other names, such as "
            f"target: [q_proj, k_proj, v_proj, o_proj]"
        )


def _continued(model: nn.Module, folder: Path) -> "PeftModel":
    """The adapter in a PEFT folder, trained on.

    Raises:
        ValueError: there is none, it is of a method that is not trained here, or its base is another model.
    """
    peft = library()
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    places = [place for place in (folder, folder / "model") if (place / "adapter_config.json").is_file()]
    if not places:
        raise ValueError(f"adapter_config.path: found no adapter_config.json in {folder}; expected a PEFT folder")
    described = peft.PeftConfig.from_pretrained(str(places[0]))
    AdapterConfig(kind=str(described.peft_type.value).lower())  # refuses what cannot be trained
    described.base_model_name_or_path, described.inference_mode = None, False
    stands_on = read_base(places[0])
    is_known = stands_on is not None and stands_on.fingerprint is not None
    if described.peft_type == "LORA" and (is_known or described.init_lora_weights in OF_FIRST_ROWS):
        described.init_lora_weights = True  # that base is what an initialisation has left of it
    base = type(model).__name__
    try:
        adapted = _inserted(model, described)
        weights = load_peft_weights(str(places[0]), device="cpu")
        loaded: Any = set_peft_model_state_dict(adapted, weights)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"adapter_config.path: the adapter in {places[0]} does not fit this {base}: {str(error)[:300]}. Expected the "
            f"model that it was trained on"
        ) from error
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    missing = sorted(trained.intersection(loaded.missing_keys))
    if missing or loaded.unexpected_keys:
        first = [*missing, *loaded.unexpected_keys][0]
        raise ValueError(
            f"adapter_config.path: the adapter in {places[0]} does not fit this {base}: {len(missing)} tensors are missing "
            f"and {len(loaded.unexpected_keys)} have no place, such as {first}. Expected the model that it was trained on"
        )
    is_empty = any(parameter.is_meta for parameter in model.parameters())
    if stands_on is not None and is_known and not is_empty:
        _check_base(adapted, stands_on, places[0])
    return adapted


def _check_base(adapted: "PeftModel", stands_on: Base, folder: Path) -> None:
    """
    Raises:
        ValueError: other weights than those that the adapter was trained on, bit for bit.
    """
    own = fingerprint_of(adapted)
    if own == stands_on.fingerprint:
        return
    expected = f"model_config: {stands_on.source or folder / BASE_FOLDER}"
    if is_quantized(adapted) and stands_on.quantization is None:
        own, expected = f"{own} in few bits", f"{expected}, and no quantization_config"
    if stands_on.quantization is not None and not is_quantized(adapted):
        expected += ", and the quantization_config of that run"
    raise ValueError(
        f"adapter_config.path: the adapter in {folder} was trained on {stands_on}, and this model has {own}: other weights, or "
        f"other bits of the same ones. Expected {expected}"
    )
