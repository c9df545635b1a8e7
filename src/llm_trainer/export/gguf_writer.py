"""A model and its tokenizer as one GGUF file, the format of llama.cpp."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llm_trainer.config.errors import require
from llm_trainer.export.asking import stops_of
from llm_trainer.export.gguf_tokenizer import END_KEYS, GgufError, Vocabulary, vocabulary_of

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
    from numpy import ndarray
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

DTYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
_BLOCK = 32  # numbers that share a scale in Q8_0 and Q4_0
_LARGEST_F16 = 65504.0
_INSTEAD = "use --to hf or --to merged, and the converter of llama.cpp on that folder"


@dataclass(frozen=True)
class Family:
    """What of a transformers family differs in GGUF."""

    architecture: str  # llama.cpp's name
    rotates_neighbours: bool = False  # positions rotate numbers 2i and 2i + 1 of a head, not i and i + D/2
    takes_biases: bool = False
    takes_frequencies: bool = False  # a table of its own for RoPE, as Llama 3.1 needs it


FAMILIES = {
    "llama": Family("llama", rotates_neighbours=True, takes_biases=True, takes_frequencies=True),
    "qwen3": Family("qwen3"),
    "qwen3_moe": Family("qwen3moe"),
}


@dataclass(frozen=True)
class Weight:
    """One tensor of the file: its name, where its numbers are, and how they are stored."""

    name: str
    numbers: Tensor
    dtype: str
    rotary_heads: int = 0  # of a matrix whose rows are reordered for rotary positions; 0: they are not


def write_gguf(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", path: Path, dtype: str = "F16"
) -> dict[str, str]:
    """Write one file that llama.cpp loads. One tensor at a time is in memory beside the model.

    Vectors and routers stay in F32, and in files of 4 bits the tables of the vocabulary have 8. A matrix whose rows are
    no multiple of 32 cannot be quantised and is written in F16.

    Args:
        model: adapters merged, weights in floats. What ends an answer is its generation_config's.
        dtype: of the matrices, one of `DTYPES`.

    Returns:
        The types of matrices that have another one than `dtype`, by their names.

    Raises:
        GgufError: GGUF has no such model or tokenizer, or a weight does not fit into F16.
    """
    require("gguf", "--to gguf", "use --to hf or --to merged")
    from gguf import GGUFWriter, LlamaFileType

    assert dtype in DTYPES, dtype
    config = model.config.get_text_config()
    family = family_of(config)
    settings = settings_of(config)
    embedding: Any = model.get_input_embeddings()
    vocabulary = vocabulary_of(tokenizer, len(embedding.weight), stops_of(model))
    weights = list(_weights(model, family, dtype))

    # 1. what the file says
    writer = GGUFWriter(None, family.architecture)
    writer.add_file_type(LlamaFileType["ALL_F32" if dtype == "F32" else f"MOSTLY_{dtype}"])
    _describe_model(writer, family.architecture, settings)
    _describe_tokenizer(writer, vocabulary)

    # 2. where each tensor will be
    for weight in weights:
        _announce(writer, weight)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()

        # 3. the tensors
        for weight in weights:
            writer.write_tensor_data(_stored(weight))
    finally:
        writer.close()
    return {weight.name: weight.dtype for weight in weights if weight.numbers.ndim > 1 and weight.dtype != dtype}


@torch.no_grad()
def round_as_written(model: "PreTrainedModel", dtype: str) -> None:
    """Give a model, in place, the numbers that a file of it holds; they are widened to fp32."""
    from gguf import dequantize, quantize

    family = family_of(model.config.get_text_config())
    for weight in _weights(model.float(), family, dtype):
        kind = _kind(weight.dtype)
        numbers = weight.numbers.to("cpu").contiguous().numpy()
        weight.numbers.copy_(torch.from_numpy(dequantize(quantize(numbers, kind), kind)))


@dataclass(frozen=True)
class Declared:
    """What a file says of itself, besides its weights.

    Attributes:
        settings: see `settings_of`.
        stop_ids: the ids that end an answer.
        added_before: the text of the token that is put before every text; empty: none is.
        has_template: whether there is a chat template.
        is_tied: whether the embedding is the head too.
    """

    settings: dict[str, Any]
    stop_ids: tuple[int, ...]
    added_before: str
    has_template: bool
    is_tied: bool


def read_gguf(path: Path) -> "GGUFReader":
    """Open a file to be read; of a large vocabulary it takes seconds.

    Raises:
        ValueError: it is no GGUF file.
    """
    from gguf import GGUFReader

    return GGUFReader(path)


def declared_in(reader: "GGUFReader") -> Declared:
    """What a GGUF file says of itself."""

    def value(key: str) -> Any:
        field = reader.get_field(key)
        return None if field is None else field.contents()

    prefix = f"{value('general.architecture')}."
    stops = [value(f"tokenizer.ggml.{name}_token_id") for name in END_KEYS]
    added_before = ""
    if value("tokenizer.ggml.add_bos_token"):
        tokens = reader.fields["tokenizer.ggml.tokens"]
        added_before = str(tokens.contents(value("tokenizer.ggml.bos_token_id")))
    return Declared(
        settings={key.removeprefix(prefix): value(key) for key in reader.fields if key.startswith(prefix)},
        stop_ids=tuple(stop for stop in stops if stop is not None),
        added_before=added_before,
        has_template=value("tokenizer.chat_template") is not None,
        is_tied="output.weight" not in {tensor.name for tensor in reader.tensors},
    )


def other_weights(reader: "GGUFReader", model: "PreTrainedModel", dtype: str) -> list[str]:
    """Names of tensors that a file holds with other numbers than `model`, which `round_as_written` has rounded."""
    from gguf import dequantize

    there = {tensor.name: tensor for tensor in reader.tensors}
    expected = {weight.name: weight for weight in _weights(model, family_of(model.config.get_text_config()), dtype)}
    found = sorted(there.keys() ^ expected.keys())
    for name in there.keys() & expected.keys():
        numbers = torch.from_numpy(dequantize(there[name].data, there[name].tensor_type).copy())
        if not torch.equal(numbers, _arranged(expected[name])):
            found.append(name)
    return found


def family_of(config: "PretrainedConfig") -> Family:
    """
    Raises:
        GgufError: llama.cpp would compute something else than this model, or our writer does not know it.
    """
    c: Any = config
    family = FAMILIES.get(c.model_type)
    if family is None:
        raise _refusal(f"model_type {c.model_type}", ", ".join(FAMILIES))
    if c.hidden_act != "silu":
        raise _refusal(f"hidden_act {c.hidden_act}", "silu")
    for name in ("attention_bias", "mlp_bias"):
        if getattr(c, name, False) and not family.takes_biases:
            raise _refusal(f"{name} in a model of {c.model_type}", "no biases")
    if "sliding_attention" in (getattr(c, "layer_types", None) or []):
        raise _refusal("layers that look at a sliding window", "full attention in every layer")
    if c.model_type == "qwen3_moe":
        _check_experts(c)
    return family


def _check_experts(c: Any) -> None:
    if not c.norm_topk_prob:
        raise _refusal("norm_topk_prob false", "true: llama.cpp makes the weights of the chosen experts sum to 1")
    if c.decoder_sparse_step != 1 or c.mlp_only_layers:
        raise _refusal("layers without experts among others", "experts in every layer")


def _refusal(found: str, expected: str) -> GgufError:
    return GgufError(f"GGUF: the model has {found}; expected {expected}; {_INSTEAD}")


def settings_of(config: "PretrainedConfig") -> dict[str, int | float | str]:
    """What a file says of the model, by its keys without the architecture; floats are rounded to the file's 32 bits."""
    c: Any = config
    found: dict[str, int | float | str] = {
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
        "vocab_size": c.vocab_size,
    }
    if c.model_type == "qwen3_moe":
        found["expert_count"] = c.num_experts
        found["expert_used_count"] = c.num_experts_per_tok
        found["expert_feed_forward_length"] = c.moe_intermediate_size
    found |= _rope_settings(c)
    return {key: _in_32_bits(value) for key, value in found.items()}


def _rope_settings(c: Any) -> dict[str, int | float | str]:
    """Rotary positions; the frequencies of Llama 3.1 are a tensor (`_frequencies`), not numbers."""
    rope = c.rope_parameters
    kind = rope["rope_type"]
    known = ["default", "linear", "yarn"]
    if FAMILIES[c.model_type].takes_frequencies:
        known.append("llama3")
    if kind not in known:
        raise _refusal(f"rope_type {kind}", f"one of {', '.join(known)}")
    for name in ("partial_rotary_factor", "attention_factor", "mscale", "mscale_all_dim"):
        if rope.get(name) not in (None, 1.0):
            raise _refusal(f"{name} {rope[name]} in rope_parameters", f"no {name}")
    found: dict[str, int | float | str] = {
        "rope.dimension_count": c.head_dim,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if kind in ("linear", "yarn"):
        found["rope.scaling.type"] = kind
        found["rope.scaling.factor"] = float(rope["factor"])
    if kind == "yarn":
        found["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        found["rope.scaling.yarn_beta_fast"] = float(rope.get("beta_fast") or 32)
        found["rope.scaling.yarn_beta_slow"] = float(rope.get("beta_slow") or 1)
    return found


def _in_32_bits(value: int | float | str) -> int | float | str:
    return torch.tensor(value).item() if isinstance(value, float) else value


def _describe_model(writer: "GGUFWriter", architecture: str, settings: dict[str, int | float | str]) -> None:
    write = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in settings.items():
        write[type(value)](f"{architecture}.{key}", value)  # type: ignore[operator]


def _describe_tokenizer(writer: "GGUFWriter", vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")  # byte-level BPE, whatever the rule
    writer.add_tokenizer_pre(vocabulary.rule)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    writer.add_token_merges(vocabulary.merges)
    for name in (*END_KEYS, "bos", "pad", "unk"):
        if name in vocabulary.ids:
            getattr(writer, f"add_{name}_token_id")(vocabulary.ids[name])
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _weights(model: "PreTrainedModel", family: Family, dtype: str) -> Iterator[Weight]:
    """The tensors of the file. A head that is the embedding is named once, and llama.cpp takes it for both."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    c: Any = model.config.get_text_config()
    names = get_tensor_name_map(MODEL_ARCH[family.architecture.upper()], c.num_hidden_layers)
    heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}
    for ours, parameter in model.named_parameters():
        for part, numbers in _parts(ours, parameter.detach()):
            name = names.get_name(part, try_suffixes=(".weight", ".bias"))
            if name is None or not numbers.is_floating_point():
                raise _refusal(
                    f"a tensor {ours} ({numbers.dtype})", f"the plain weights of a {c.model_type}, in floats"
                )
            if "_exps" in name:
                name += ".weight"
            rotary_heads = heads.get(part.split(".")[-2], 0) if family.rotates_neighbours else 0
            yield Weight(name, numbers, _dtype_of(name, numbers, dtype), rotary_heads)
    if c.rope_parameters["rope_type"] == "llama3":
        yield Weight("rope_freqs.weight", _frequencies(c), "F32")


def _parts(name: str, numbers: Tensor) -> list[tuple[str, Tensor]]:
    """transformers holds the experts of a layer as two tensors, `[E, 2 I, D]` and `[E, D, I]`; GGUF as three."""
    if not name.endswith("experts.gate_up_proj"):
        return [(name, numbers)]
    gate, up = numbers.chunk(2, dim=1)
    return [(name.replace("gate_up_proj", "gate_proj"), gate), (name.replace("gate_up_proj", "up_proj"), up)]


def _dtype_of(name: str, numbers: Tensor, dtype: str) -> str:
    is_router = "ffn_gate_inp" in name
    if numbers.ndim == 1 or is_router:
        return "F32"
    is_quantised = dtype in ("Q8_0", "Q4_0")
    if is_quantised and numbers.shape[-1] % _BLOCK:
        return "F16"
    of_vocabulary = re.match(r"token_embd|output\.", name) is not None
    if dtype == "Q4_0" and of_vocabulary:
        return "Q8_0"
    return dtype


def _frequencies(config: "PretrainedConfig") -> Tensor:
    """What the frequencies of plain RoPE are divided by, `[D / 2]`."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    c: Any = config
    exponents = torch.arange(0, c.head_dim, 2, dtype=torch.float32) / c.head_dim
    plain = c.rope_parameters["rope_theta"] ** -exponents
    scaled, _ = ROPE_INIT_FUNCTIONS[c.rope_parameters["rope_type"]](c, torch.device("cpu"))
    return plain / scaled


def _announce(writer: "GGUFWriter", weight: Weight) -> None:
    import numpy
    from gguf import quant_shape_to_byte_shape

    kind = _kind(weight.dtype)
    shape: Sequence[int] = quant_shape_to_byte_shape(tuple(weight.numbers.shape), kind)
    stored_bytes = int(numpy.prod(shape))
    writer.add_tensor_info(weight.name, shape, numpy.dtype(numpy.uint8), stored_bytes, raw_dtype=kind)


def _stored(weight: Weight) -> "ndarray[Any, Any]":
    """The bytes of a tensor as they stand in the file.

    Raises:
        GgufError: it has a number that is not finite, or too large for F16.
    """
    from gguf import quantize

    numbers = _arranged(weight)
    largest = numbers.abs().max().item()
    if not largest < float("inf"):
        raise GgufError(f"GGUF: {weight.name} has numbers that are not finite; expected a model that can be used")
    if weight.dtype != "F32" and weight.dtype != "BF16" and largest > _LARGEST_F16:
        raise GgufError(
            f"GGUF: {weight.name} has a number of {largest:g}, and {weight.dtype} holds up to {_LARGEST_F16:g}; use "
            "--dtype bf16 or fp32"
        )
    return quantize(numbers.contiguous().numpy(), _kind(weight.dtype))


def _arranged(weight: Weight) -> Tensor:
    """Its numbers in fp32, in the order of the file."""
    numbers = weight.numbers.to("cpu", torch.float32)
    if weight.rotary_heads:
        numbers = _neighbours(numbers, weight.rotary_heads)
    return numbers


def _neighbours(rows: Tensor, heads: int) -> Tensor:
    """Rows of each head in the order 0, D/2, 1, D/2 + 1 ...: what is rotated together stands together."""
    halves = rows.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2)


def _kind(dtype: str) -> "GGMLQuantizationType":
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[dtype]
