"""Models as whoever asks for one gets it: from a folder of weights, or from one of adapters with the base that it names."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm_trainer.checkpoint import CheckpointError, load_checkpoint, load_weights
from llm_trainer.checkpoint.adapter_bases import check_base, fingerprint, fingerprint_in_few_bits, place_of
from llm_trainer.checkpoint.weights import tensors_by_name, without_progress_bars
from llm_trainer.models.adapter_sums import weigh
from llm_trainer.models.adapters import add_opened, has_own_adapters, opened
from llm_trainer.models.inside import is_tied, untie
from llm_trainer.models.pretrained import Pretrained, find_pretrained
from llm_trainer.models.quantize import is_quantized, keep_layout
from llm_trainer.models.quantized_loading import loading_again


def load_pretrained(
    auto_class: Any,
    found: Pretrained,
    attention: str | dict[str, str] | None = None,
    dtype: torch.dtype | str = "auto",
    merged: bool = True,
    config: Any = None,
    **options: Any,
) -> Any:
    """The model that was found.

    Args:
        auto_class: of transformers, or a class of its models.
        found: a folder of weights, or of adapters.
        attention: as `build.attention_of` gives it; None: transformers' choice.
        dtype: of the parameters; 'auto': the one that they are saved in, of a base with adapters that of its training.
        merged: adapters are added to the weights, which is what can be trained on and saved as a model; in fp32, since
            a small difference would be lost in the rounding of 16 bits. False: they stay beside them, exact, to read from.
        config: of transformers, in place of the folder's.
        options: further ones of transformers, such as in how few bits weights are kept; not for adapters.

    Raises:
        CheckpointError: the base is another than that of the adapters.
        ValueError: there are options, and adapters.
    """
    given: dict[str, Any] = {"attn_implementation": attention, **options}
    if options and found.base is not None:
        raise ValueError(
            f"{found.source}: found adapters on a base, which are merged in full precision, and got {', '.join(options)}; "
            f"expected a plain model: give the base, and the adapters as adapter_config.path"
        )
    if config is not None:
        given["config"] = config
    if found.base is None:
        with without_progress_bars():
            plain = auto_class.from_pretrained(found.source, dtype=dtype, **given)
        keep_layout(plain)  # before anything is tried out on it
        return plain

    model, trained_in = _base(auto_class, found, dtype, given)
    if merged:
        model = merge(_in_full(model, found))
    else:
        model = opened(model, Path(found.source), found.base.active).get_base_model()
        if found.base.quantization is not None:  # bits have no dtype
            return model
    if dtype == "auto":
        dtype = trained_in
    in_dtype(model, dtype)
    return model


def in_dtype(model: nn.Module, dtype: torch.dtype | str) -> None:
    """Round the weights of a model, in place, and nothing else.

    NOTE: `model.to(dtype)` would round the frequencies of its positions too, which no folder holds and loading computes.
    """
    assert isinstance(dtype, torch.dtype)
    for tensor in dict.fromkeys(tensors_by_name(model).values()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def beside(
    auto_class: Any,
    found: Pretrained,
    weights: Mapping[str, float] | None = None,
    others: Mapping[str, float] | None = None,
) -> Any:
    """A base with its adapters around it (a `PeftModel`), both in fp32; of one in few bits the numbers that these stand for.

    Args:
        auto_class: of transformers, or a class of its models.
        found: a folder of adapters.
        weights: of adapters by name, by which they are multiplied; those that are not named do not compute.
        others: weights of the adapters of other runs, by their folders; beside these the own ones count 1, or `weights`.

    Raises:
        CheckpointError: the base is another than that of the adapters.
        ValueError: there is no adapter of such a name, or of a kind that cannot be weighed, or one of another base.
    """
    base = found.base
    assert base is not None
    theirs: dict[str, tuple[Path, float]] = {}
    for number, (folder, weight) in enumerate((others or {}).items(), start=1):
        theirs[f"other{number}"] = _on_the_same_base(folder, found), weight
    model, _ = _base(auto_class, found, "auto", {})
    adapted = _in_full(model, found)
    wanted = dict(weights or {})
    if theirs and not wanted:
        wanted = dict.fromkeys(base.active or ("default",), 1.0)
    for name, (place, weight) in theirs.items():
        add_opened(adapted, place, name)
        wanted[name] = weight
    if wanted:
        weigh(adapted, wanted)
    return adapted


def _on_the_same_base(folder: str, found: Pretrained) -> Path:
    """Where the adapters of another run are.

    Raises:
        ValueError: there are none, several, or they stand on another base.
    """
    other = find_pretrained(folder, hub=False)
    if other.base is None:
        raise ValueError(f"--with: {folder} is a whole model without adapters; expected adapters on the same base")
    if other.base.active:
        names = ", ".join(other.base.active)
        raise ValueError(f"--with: {folder} has several adapters ({names}); expected one")
    base = found.base
    assert base is not None
    if base.fingerprint is None or base.fingerprint != other.base.fingerprint:
        raise ValueError(
            f"--with: the adapters in {folder} were trained on {other.base}, and those in {found.source} on {base}; expected "
            f"the same weights bit for bit. Adapters that have changed their base (PiSSA, OLoRA, LoRA-GA) stand on the one "
            f"before once they are exported by themselves: --to adapter"
        )
    return Path(other.source)


def merge(adapted: Any) -> Any:
    """The model inside of a `PeftModel`, its adapters added to its weights, all of them to be trained."""
    inner = adapted.get_base_model()
    head, embeddings = inner.get_output_embeddings(), inner.get_input_embeddings()
    is_adapted = is_tied(inner) and (has_own_adapters(head) or has_own_adapters(embeddings))
    if is_adapted:
        # NOTE: peft adds to the weight in place, and that of the other one would change with it.
        layer = head.get_base_layer() if has_own_adapters(head) else head
        layer.weight = nn.Parameter(head.weight.detach().clone())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        warnings.filterwarnings("ignore", message="Model with `tie_word_embeddings=True`")
        model = adapted.merge_and_unload()
    model.requires_grad_(True)  # adapters have frozen it
    embeddings = model.get_input_embeddings()
    if is_adapted and torch.equal(
        model.get_output_embeddings().weight, embeddings.weight
    ):  # by one and the same adapter
        model.get_output_embeddings().weight = embeddings.weight
    if model.get_output_embeddings() is not None and not is_tied(model):  # training took them apart
        untie(model.config)
    return model


def _base(
    auto_class: Any, found: Pretrained, dtype: torch.dtype | str, given: Mapping[str, Any]
) -> tuple[Any, torch.dtype]:
    """The base of adapters as it was when they were trained, and the type that it then had."""
    base, options = found.base, dict(given)
    assert base is not None
    trained_in = getattr(torch, base.dtype) if base.dtype else dtype
    if base.source is not None and base.revision is not None:
        options["revision"] = base.revision
    if base.quantization is not None:
        options |= loading_again(base.quantization)
    with without_progress_bars():
        model = auto_class.from_pretrained(found.place, dtype=trained_in, **options)
    keep_layout(model)
    if base.fingerprint is not None and base.source is not None:
        moved = "put the model back that was there, or say where it is: BASE_MODEL=path/or/name in the environment"
        lies = place_of(str(found.place), base.revision) or Path(found.place)
        own = fingerprint_of_base(model, lies)
        check_base(own, f"'{found.place}' as their", base, Path(found.source), moved)
    return model, model.dtype


def _in_full(model: Any, found: Pretrained) -> Any:
    """The adapters of a folder on their base, which becomes fp32."""
    assert found.base is not None
    if found.base.quantization is not None:  # the numbers that the bits stand for: with these the adapters were trained
        model = model.dequantize()
    return opened(model.float(), Path(found.source), found.base.active)


def fingerprint_of_base(model: nn.Module, folder: Path | None = None) -> str:
    """That of a model without adapters, in which it is the base of others; `folder`: of one in few bits, where it lies."""
    once: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in tensors_by_name(model).items():
        once.setdefault(id(tensor), (name, tensor))
    if is_quantized(model):
        assert folder is not None
        return fingerprint_in_few_bits(model, folder, dict(once.values()))
    return fingerprint(once.values())


def load_start(model: Any, path: str) -> None:
    """Load the weights that a run starts from into `model`, which has no adapters; those of a folder of adapters merged.

    Raises:
        CheckpointError: they do not fit it, or are damaged.
    """
    found = find_pretrained(path, hub=False) if Path(path).is_dir() else None
    if found is None or found.base is None:
        load_checkpoint(path, model=model)
        return
    merged = load_pretrained(type(model), found, dtype=model.dtype)
    if is_tied(model) and not is_tied(merged):
        raise CheckpointError(
            f"'{path}' holds adapters that were trained with a head of their own, and this model ties its head to the "
            f"embeddings; expected one that does not (tie_word_embeddings: false)"
        )
    load_weights(model, merged.state_dict(), path)
