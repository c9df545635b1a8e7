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
from llm_trainer.export.gguf_settings import Family, family_of, refusal, settings_of
from llm_trainer.export.gguf_tokenizer import END_KEYS, GgufError, Vocabulary, vocabulary_of

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
    from numpy import ndarray
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

DTYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
_BLOCK = 32  # numbers that share a scale in Q8_0 and Q4_0
_LARGEST_F16 = 65504.0


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
    _describe_sampling(writer, model)

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


def _describe_model(writer: "GGUFWriter", architecture: str, settings: dict[str, int | float | str]) -> None:
    write = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in settings.items():
        write[type(value)](f"{architecture}.{key}", value)  # type: ignore[operator]


def _describe_sampling(writer: "GGUFWriter", model: "PreTrainedModel") -> None:
    """How the folder's generation config draws, which llama.cpp takes where a user says nothing."""
    how: Any = model.generation_config
    if how is None or not how.do_sample:
        return
    for name, write in (
        ("temperature", writer.add_sampling_temp),
        ("top_k", writer.add_sampling_top_k),
        ("top_p", writer.add_sampling_top_p),
        ("min_p", writer.add_sampling_min_p),
        ("repetition_penalty", writer.add_sampling_penalty_repeat),
    ):
        value = getattr(how, name, None)
        if value is not None:
            write(value)


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
                raise refusal(f"a tensor {ours} ({numbers.dtype})", f"the plain weights of a {c.model_type}, in floats")
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
