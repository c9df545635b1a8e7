"""Models and tokenizers as GGUF files: llama.cpp answers as transformers does, and no damaged file gets through."""

import copy
import dataclasses
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gguf_files import (
    ARCHITECTURES,
    TEXT,
    learned,
    should_answer,
    skip_where_llama_cpp_does_not_run,
    tokenizer_of_ours,
    untrained,
    write_and_ask,
)
from llm_trainer.cli.main import main
from llm_trainer.config.errors import ConfigError
from llm_trainer.export import gguf_writer
from llm_trainer.export.door import export, pass_gate
from llm_trainer.export.gate import Refused
from llm_trainer.export.gguf_settings import settings_of
from llm_trainer.export.gguf_tokenizer import GgufError, vocabulary_of
from llm_trainer.export.gguf_writer import Declared, declared_in, read_gguf, write_gguf
from llm_trainer.export.llama_cpp import LlamaCpp


@pytest.fixture(autouse=True)
def runs_here() -> None:
    skip_where_llama_cpp_does_not_run()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_llama_cpp_answers_as_transformers_does(architecture: str, tmp_path: Path) -> None:
    assert write_and_ask(learned(architecture), "F32", tmp_path) == {}


@pytest.mark.parametrize("dtype", gguf_writer.DTYPES[1:])
def test_every_type_of_weights(dtype: str, tmp_path: Path) -> None:
    others = write_and_ask(learned("llama", is_tied=False), dtype, tmp_path)
    tables = {"token_embd.weight": "Q8_0", "output.weight": "Q8_0"}
    assert others == (tables if dtype == "Q4_0" else {})


def test_how_to_draw_goes_with_the_file_and_not_into_the_comparison(tmp_path: Path) -> None:
    model = copy.deepcopy(learned("llama"))
    how = {"temperature": 0.625, "top_k": 17, "top_p": 0.75, "min_p": 0.125, "repetition_penalty": 1.5}
    model.generation_config.update(do_sample=True, **how)
    write_and_ask(model, "F32", tmp_path)
    path = tmp_path / "model.gguf"
    found = LlamaCpp(path, declared_in(read_gguf(path)), []).drawing()
    names = {"repetition_penalty": "repeat_penalty"}
    assert {name: found[names.get(name, name)] for name in how} == how


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("qwen3", {"rope_scaling": YARN}),
        ("llama", {"rope_scaling": LLAMA3}),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "head_dim": 8}),
        ("qwen3_moe", {"rope_theta": 1e6, "rms_norm_eps": 1e-3}),
    ],
)
def test_what_a_configuration_says_is_in_the_file(architecture: str, changes: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(1)
    write_and_ask(untrained(architecture, initializer_range=0.2, **changes), "F32", tmp_path)


def test_biases_of_llama_are_rotated_with_their_rows(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = untrained("llama", initializer_range=0.2).config
    config.attention_bias = config.mlp_bias = True
    model = type(learned("llama"))(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.generation_config = learned("llama").generation_config
    write_and_ask(model, "F32", tmp_path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_reads_the_same_weights_back(architecture: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = learned(architecture)
    write_gguf(model, tokenizer_of_ours(), tmp_path / "model.gguf", "F32")
    # NOTE: transformers does not read the width of Qwen3's heads, nor that of experts, from a file.
    widths = {
        name: getattr(model.config, name) for name in ("head_dim", "moe_intermediate_size") if name in model.config
    }
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32, **widths)
    ids = torch.tensor([tokenizer_of_ours()(TEXT).input_ids])
    with torch.no_grad():
        assert (again.eval()(ids).logits - model(ids).logits).abs().max() < 1e-6
    assert again.config.rope_parameters["rope_theta"] == model.config.rope_parameters["rope_theta"]


# --- damaged files


def say_instead(**changes: Any) -> Callable[[Any, pytest.MonkeyPatch], None]:
    """Another vocabulary than the tokenizer's is written."""

    def damage(model: Any, patch: pytest.MonkeyPatch) -> None:
        def of(*arguments: Any) -> Any:
            tokenizer, _, stops = arguments
            vocabulary = vocabulary_of(tokenizer, 400, stops)
            new = {name: change(getattr(vocabulary, name)) for name, change in changes.items()}
            return dataclasses.replace(vocabulary, **new)

        patch.setattr(gguf_writer, "vocabulary_of", of)

    return damage


def configure(name: str, value: Any) -> Callable[[Any, pytest.MonkeyPatch], None]:
    def damage(model: Any, patch: pytest.MonkeyPatch) -> None:
        setattr(model.config, name, value)

    return damage


def rotary_heads_as_they_were(model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gguf_writer, "_neighbours", lambda rows, heads: rows)


def another_base_of_rope(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 20_000.0}


def rows_of_the_vocabulary_swapped(model: Any, patch: pytest.MonkeyPatch) -> None:
    rows = model.get_input_embeddings().weight.data
    last = len(tokenizer_of_ours()) - 1
    rows[[last, last - 5]] = rows[[last - 5, last]]


def vocabulary_cut(model: Any, patch: pytest.MonkeyPatch) -> None:
    """Without the last two tokens."""
    size = len(tokenizer_of_ours()) - 2
    embedding = model.get_input_embeddings()
    embedding.weight.data = embedding.weight.data[:size]
    say_instead(tokens=lambda tokens: tokens[:size], kinds=lambda kinds: kinds[:size])(model, patch)
    patch.setattr(gguf_writer, "settings_of", lambda config: settings_of(config) | {"vocab_size": size})


def a_layer_of_zeros(model: Any, patch: pytest.MonkeyPatch) -> None:
    for parameter in model.model.layers[1].parameters():
        parameter.data.zero_()


def experts_swapped(model: Any, patch: pytest.MonkeyPatch) -> None:
    down = model.model.layers[0].mlp.experts.down_proj.data
    down[[0, 1]] = down[[1, 0]]


def gate_and_up_swapped(model: Any, patch: pytest.MonkeyPatch) -> None:
    both = model.model.layers[0].mlp.experts.gate_up_proj
    gate, up = both.data.chunk(2, dim=1)
    both.data = torch.cat([up, gate], dim=1)


def head_forgotten(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.lm_head.weight = model.get_input_embeddings().weight


OTHER_TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
DAMAGES: dict[str, tuple[str, Callable[[Any, pytest.MonkeyPatch], None], str]] = {
    "rotary heads not permuted": ("llama", rotary_heads_as_they_were, "log-probabilities"),
    "RoPE base": ("qwen3", another_base_of_rope, "log-probabilities"),
    "norm epsilon": ("qwen3", configure("rms_norm_eps", 1e-5), "file.attention.layer_norm_rms_epsilon"),
    "head width": ("qwen3", configure("head_dim", 16), "llama.cpp gave up"),
    "experts per token": ("qwen3_moe", configure("num_experts_per_tok", 1), "log-probabilities"),
    "BOS added": ("qwen3", say_instead(adds_bos=lambda _: True, ids=lambda ids: ids | {"bos": 0}), "ids of the text"),
    "EOS added": ("qwen3", say_instead(adds_eos=lambda _: True), "ids of the text"),
    "cut vocabulary": ("qwen3", vocabulary_cut, "llama.cpp"),
    "swapped rows": ("qwen3", rows_of_the_vocabulary_swapped, "log-probabilities"),
    "swapped experts": ("qwen3_moe", experts_swapped, "log-probabilities"),
    "gate for up": ("qwen3_moe", gate_and_up_swapped, "log-probabilities"),
    "wrong tie": ("untied", head_forgotten, "tied: expected False, found True"),
    "zeroed layer": ("qwen3", a_layer_of_zeros, "log-probabilities"),
    "swapped template": ("qwen3", say_instead(chat_template=lambda _: OTHER_TEMPLATE), "conversation user"),
    "no template": ("qwen3", say_instead(chat_template=lambda _: None), "there is none"),
    "dropped stop id": ("qwen3", say_instead(ids=lambda ids: ids | {"eom": ids["eos"]}), "stop ids"),
    "wrong pre-tokenizer": ("qwen3", say_instead(rule=lambda _: "qwen2"), "ids of the text"),
    "fewer merges": ("qwen3", say_instead(merges=lambda merges: merges[:-20]), "ids of the text"),
    "control tokens as text": ("qwen3", say_instead(kinds=lambda kinds: [1] * len(kinds)), "ids of the text"),
}


# In few bits: what their rounding could hide.
IN_FEW_BITS = (
    "RoPE base",
    "norm epsilon",
    "experts per token",
    "swapped rows",
    "gate for up",
    "wrong tie",
    "zeroed layer",
)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "F16") for name in DAMAGES), *((name, "Q4_0") for name in IN_FEW_BITS)]
)
def test_damaged_files_are_refused(name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture, damage, what = DAMAGES[name]
    model = learned("llama", is_tied=False) if architecture == "untied" else learned(architecture)
    damaged, path = copy.deepcopy(model), tmp_path / "model.gguf"
    with monkeypatch.context() as patch:
        damage(damaged, patch)
        write_gguf(damaged, tokenizer_of_ours(), path, dtype)
        if damage is not rotary_heads_as_they_were:
            patch.undo()
        with pytest.raises(Refused) as refused:
            pass_gate(tmp_path, should_answer(model, dtype, path))
    if dtype == "F16":
        assert what in str(refused.value)


# --- what is refused before a file is written


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **more}}


@pytest.mark.parametrize(
    ("architecture", "changes", "found"),
    [
        ("qwen3", {"model_type": "gemma3_text"}, "model_type gemma3_text; expected llama, qwen3, qwen3_moe"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act gelu"),
        ("qwen3", {"attention_bias": True}, "attention_bias in a model of qwen3"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layers that look at a sliding window"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob false"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "layers without experts among others"),
        ("llama", rope("dynamic", factor=2.0), "rope_type dynamic; expected one of default, linear, yarn, llama3"),
        ("qwen3", rope("llama3"), "rope_type llama3; expected one of default, linear, yarn;"),
        ("qwen3", rope("yarn", attention_factor=2.0), "attention_factor 2.0 in rope_parameters"),
        ("llama", rope("default", partial_rotary_factor=0.5), "partial_rotary_factor 0.5 in rope_parameters"),
    ],
)
def test_other_models_are_refused_by_name(
    architecture: str, changes: dict[str, Any], found: str, tmp_path: Path
) -> None:
    model = copy.deepcopy(learned(architecture))
    for name, value in changes.items():
        setattr(model.config, name, value) if name != "model_type" else model.config.__dict__.update(model_type=value)
    with pytest.raises(GgufError, match=f"the model has {found}.* use --to hf or --to merged"):
        write_gguf(model, tokenizer_of_ours(), tmp_path / "model.gguf", "F16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "dtype", "found"),
    [
        (float("nan"), "F32", "blk.0.attn_q.weight has numbers that are not finite"),
        (7e4, "Q8_0", "a number of 70000, and Q8_0 holds up to 65504; use --dtype bf16 or fp32"),
        (7e4, "BF16", None),
    ],
)
def test_numbers_that_a_type_does_not_hold(value: float, dtype: str, found: str | None, tmp_path: Path) -> None:
    model = copy.deepcopy(learned("qwen3"))
    model.model.layers[0].self_attn.q_proj.weight.data[3, 3] = value
    if found is None:
        write_gguf(model, tokenizer_of_ours(), tmp_path / "model.gguf", dtype)
        return
    with pytest.raises(GgufError, match=found):
        write_gguf(model, tokenizer_of_ours(), tmp_path / "model.gguf", dtype)


def test_matrices_of_odd_width_stay_in_16_bits(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = untrained("llama", hidden_size=24, head_dim=8, initializer_range=0.2)
    others = write_and_ask(model, "Q8_0", tmp_path)
    assert set(others.values()) == {"F16"} and "blk.0.attn_q.weight" in others and "blk.0.ffn_down.weight" not in others


# --- a native library that dies


@pytest.mark.parametrize(
    ("signal", "kind", "message"),
    [
        ("ILL", ConfigError, "was built for another processor .* export on another machine"),
        ("SEGV", Refused, "llama.cpp died with SIGSEGV over model.gguf; it said:\n  no such luck"),
    ],
)
def test_a_library_that_dies_takes_nothing_with_it(
    signal: str, kind: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho no such luck >&2\nkill -{signal} $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(kind, match=message):
        LlamaCpp(tmp_path / "model.gguf", Declared({}, (), "", False, True), [])


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(learned("llama"), tokenizer_of_ours(), path, "F16")
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(Refused, match="llama.cpp gave up over model.gguf"):
        LlamaCpp(path, Declared({}, (), "", False, True), [])


# --- by way of the command's door


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param("dense", {}, marks=pytest.mark.slow),
        ("untied", {"quantize": "q8_0"}),
        ("moe", {"quantize": "Q4_0"}),
        ("new tokens", {"dtype": torch.bfloat16}),
        ("lora", {"dtype": torch.float16}),
        pytest.param("pissa", {}, marks=pytest.mark.slow),
        pytest.param("experts", {}, marks=pytest.mark.slow),
        ("qlora", {"dtype": torch.float16}),
    ],
    ids=lambda value: str(value),
)
def test_runs_become_files_that_pass_the_gate(kind: str, options: dict[str, Any], made: Any, tmp_path: Path) -> None:
    needed = {"lora": "peft", "pissa": "peft", "experts": "peft", "qlora": "bitsandbytes"}
    if kind in needed:
        pytest.importorskip(needed[kind], reason=f"needs {needed[kind]}")
    said: list[str] = []
    out = export(made.run(kind), "gguf", tmp_path / "out", say=said.append, **options)
    assert said[0].startswith("reopened, compared with training in fp32")
    assert said[-1].startswith("gate: log-probabilities of ") and "not compared" not in said[-1]
    (file,) = out.glob("*.gguf")
    assert {path.name for path in out.iterdir()} == {file.name, "README.md"}
    is_rounded = options.get("quantize") or options.get("dtype") is torch.bfloat16
    assert any("moves log-probabilities by" in line for line in said) == bool(is_rounded)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "q5_k"}, "--quantize: got 'q5_k', expected one of Q8_0, Q4_0"),
        ({"quantize": "Q8_0", "dtype": torch.float16}, "--quantize Q8_0: .* so is --dtype; expected one of the two"),
    ],
)
def test_options_that_are_not_meant(options: dict[str, Any], message: str, made: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export(made.run("dense"), "gguf", tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["gguf", "xllamacpp"])
def test_a_package_that_is_missing_is_named_before_anything_is_loaded(
    package: str, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    said: list[str] = []
    with pytest.raises(
        ConfigError, match=f"--to gguf needs the package {package}, .* pip install {package}, or use --to hf"
    ):
        export(made.run("dense"), "gguf", tmp_path / "out", say=said.append)
    assert not said and not list(tmp_path.iterdir())


def test_a_model_without_a_tokenizer_is_refused(made: Any, tmp_path: Path) -> None:
    shutil.copytree(made.run("dense") / "model", tmp_path / "model")
    for path in tmp_path.glob("model/*token*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"--to gguf: .*model has no tokenizer, which is a part of the file"):
        export(tmp_path / "model", "gguf", tmp_path / "out")


def test_a_model_that_stops_nowhere_stops_at_the_end_of_texts(tmp_path: Path) -> None:
    model = copy.deepcopy(learned("llama"))
    model.generation_config.eos_token_id = None
    write_and_ask(model, "F32", tmp_path)


def test_the_command_says_what_the_type_of_weights_costs(
    made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["export", str(made.run("dense")), "--to", "gguf", "--quantize", "q4_0", "--out", str(tmp_path / "out")])
    assert ended.value.code == 0
    said, card = capsys.readouterr().out, (tmp_path / "out" / "README.md").read_text()
    assert "gate: log-probabilities of " in said and "in Q8_0: 1 of the matrices, such as token_embd.weight" in said
    assert "Q4_0 moves log-probabilities by " in said and "Q4_0 moves log-probabilities by " in card
