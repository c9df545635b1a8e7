"""Exports that were damaged on purpose, each in one way, do not pass the gate; the message says what is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from exported import Made
from llm_trainer.export.door import export, pass_gate
from llm_trainer.export.formats import FORMATS
from llm_trainer.export.gate import Refused
from llm_trainer.export.request import Written
from llm_trainer.models.adapter_folder import beside, merge
from llm_trainer.models.pretrained import find_pretrained

Tensors = dict[str, Tensor]
Damage = Callable[[Path, Made], None]


def in_json(file: str, **changes: Any) -> Damage:
    """Other values in a file; of a value that is None the key is removed."""

    def damage(folder: Path, made: Made) -> None:
        content = json.loads((folder / file).read_text()) | changes
        kept = {key: value for key, value in content.items() if value is not None}
        (folder / file).write_text(json.dumps(kept))

    return damage


def in_tensors(change: Callable[[Tensors], object], file: str = "model.safetensors") -> Damage:
    """Other weights."""

    def damage(folder: Path, made: Made) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file, {"format": "pt"})

    return damage


def swap(names: list[str], place: int, other: int) -> Callable[[Tensors], object]:
    """Two rows of a matrix."""

    def change(tensors: Tensors) -> None:
        for name in names:
            rows = tensors[name].clone()
            rows[[place, other]] = rows[[other, place]]
            tensors[name] = rows

    return change


def zero(part: str) -> Callable[[Tensors], object]:
    """All weights of a part of the model."""

    def change(tensors: Tensors) -> None:
        for name in tensors:
            if part in name:
                tensors[name] = torch.zeros_like(tensors[name])

    return change


def rotary(tensors: Tensors) -> None:
    """The halves of each head in the order in which other formats keep them."""
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = tensors[name]
    tensors[name] = weight.view(4, 2, 8, -1).transpose(1, 2).reshape(weight.shape).contiguous()


def cut(tensors: Tensors) -> None:
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-16].clone()


def rounded(tensors: Tensors) -> None:
    for name in tensors:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn).float()


def adds_bos(folder: Path, made: Made) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    bos = next(token for token in content["added_tokens"] if token["content"] == "<s>")
    begin = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": begin,
        "pair": [*begin, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [bos["id"]], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))


def without_added_tokens(folder: Path, made: Made) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = [one for one in content["added_tokens"] if one["content"] != "<new>"]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def in_text(file: str, old: str, new: str) -> Damage:
    def damage(folder: Path, made: Made) -> None:
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new))

    return damage


def removed(*names: str) -> Damage:
    def damage(folder: Path, made: Made) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def merged_by(scale: float) -> Callable[[str], Damage]:
    """The adapters of a kind of model, added with another weight than 1."""

    def of(kind: str) -> Damage:
        def damage(folder: Path, made: Made) -> None:
            from transformers import AutoModelForCausalLM

            found = find_pretrained(made.run(kind))
            merge(beside(AutoModelForCausalLM, found, {"default": scale})).save_pretrained(folder)

        return damage

    return of


def onto_the_original(folder: Path, made: Made) -> None:
    """Adapters that were trained on weights in 4 bits, added to the weights before."""
    from dataclasses import replace

    from transformers import AutoModelForCausalLM

    found = find_pretrained(made.run("qlora"))
    assert found.base is not None
    plain = replace(found.base, quantization=None, fingerprint=None)
    merge(beside(AutoModelForCausalLM, replace(found, base=plain))).save_pretrained(folder)


CONFIG, GENERATION, TEMPLATE = "config.json", "generation_config.json", "chat_template.jinja"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
EMBEDDINGS = "model.embed_tokens.weight"
ROPE = {"rope_theta": 500000.0, "rope_type": "default"}
SCALED = {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}

CASES: dict[str, tuple[str, str, Damage, str]] = {  # name -> kind, format, damage, what the message says
    "tied though it is not": (
        "untied",
        "hf",
        in_json(CONFIG, tie_word_embeddings=True),
        "tie_word_embeddings: expected False",
    ),
    "untied though it is tied": ("dense", "hf", in_json(CONFIG, tie_word_embeddings=False), "missing_keys: lm_head"),
    "another template": ("dense", "hf", in_text(TEMPLATE, "<|im_start|>", "<|im_end|>"), "conversation user with a pr"),
    "thinking is printed otherwise": ("dense", "hf", in_text(TEMPLATE, "<think>", "<thinking>"), "conversation user"),
    "no template": ("dense", "hf", removed(TEMPLATE), "chat template: there is none"),
    "no tokenizer": ("dense", "hf", removed("tokenizer.json", "tokenizer_config.json"), "ids|tokenizer"),
    "a stop id is missing": ("dense", "hf", in_json(GENERATION, eos_token_id=[2]), "stop ids: expected"),
    "no stop ids": ("dense", "hf", in_json(GENERATION, eos_token_id=None), "stop ids: expected"),
    "a BOS is added": ("dense", "hf", adds_bos, "ids of the text ''"),
    "an added token is none": (
        "new tokens",
        "hf",
        without_added_tokens,
        "ids of the text '|transformers does not open",
    ),
    "rows swapped": ("dense", "hf", in_tensors(swap([EMBEDDINGS], 40, 41)), EMBEDDINGS),
    "rows swapped in head and embeddings": (
        "untied",
        "hf",
        in_tensors(swap([EMBEDDINGS, "lm_head.weight"], 500, 501)),
        "lm_head",
    ),
    "experts swapped": ("moe", "hf", in_tensors(swap(["model.layers.0.mlp.gate.weight"], 0, 1)), "log-probabilities: "),
    "a tensor is missing": (
        "dense",
        "hf",
        in_tensors(lambda tensors: tensors.pop("model.norm.weight")),
        "1 missing_keys: model.norm.weight",
    ),
    "heads are not permuted": ("llama", "hf", in_tensors(rotary), "log-probabilities: "),
    "another RoPE base": ("dense", "hf", in_json(CONFIG, rope_parameters=ROPE), "settings.rope_parameters.rope_theta"),
    "another RoPE type": ("llama", "hf", in_json(CONFIG, rope_parameters=SCALED), "settings.rope_parameters.factor"),
    "another epsilon of norms": ("dense", "hf", in_json(CONFIG, rms_norm_eps=1e-5), "settings.rms_norm_eps"),
    "another width of heads": ("dense", "hf", in_json(CONFIG, head_dim=32), "settings.head_dim|does not open|mismatch"),
    "another number of key heads": ("llama", "hf", in_json(CONFIG, num_key_value_heads=4), "does not open|mismatch"),
    "a layer less": ("dense", "hf", in_json(CONFIG, num_hidden_layers=1), "transformers does not open it: "),
    "more experts per token": ("moe", "hf", in_json(CONFIG, num_experts_per_tok=3), "settings.num_experts_per_tok"),
    "weights of experts normalised": ("moe", "hf", in_json(CONFIG, norm_topk_prob=False), "settings.norm_topk_prob"),
    "a shorter context": ("dense", "hf", in_json(CONFIG, max_position_embeddings=48), "max_position_embeddings"),
    "a layer of zeros": ("dense", "hf", in_tensors(zero("layers.1.mlp")), "log-probabilities: "),
    "the vocabulary is cut": ("dense", "hf", in_tensors(cut), "does not open|mismatch"),
    "rounded twice": ("dense", "hf", in_tensors(rounded), "log-probabilities: "),
    "adapters are not merged": ("lora", "merged", merged_by(0.0)("lora"), "log-probabilities: "),
    "merged twice": ("lora", "merged", merged_by(2.0)("lora"), "log-probabilities: "),
    "merged with another scale": ("lora", "merged", merged_by(0.5)("lora"), "log-probabilities: "),
    "merged onto the original base": ("qlora", "merged", onto_the_original, "log-probabilities: "),
    "another alpha": ("lora", "adapter", in_json(ADAPTER_CONFIG, lora_alpha=4), "log-probabilities: "),
    "rsLoRA though it is not": ("lora", "adapter", in_json(ADAPTER_CONFIG, use_rslora=True), "log-probabilities: "),
    "another base": (
        "lora",
        "adapter",
        in_json(ADAPTER_CONFIG, base_model_name_or_path="elsewhere"),
        "names the base 'elsewhere'",
    ),
    "half of a plain LoRA": ("pissa", "adapter", in_tensors(zero("lora_A"), ADAPTER), "log-probabilities: "),
    "an adapter is missing": (
        "lora",
        "adapter",
        in_tensors(lambda tensors: [tensors.pop(name) for name in list(tensors) if ".0." in name], ADAPTER),
        "missing adapter keys",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_damaged_export_is_refused(
    name: str, written: Callable[[str, str], tuple[Path, Written]], made: Made, tmp_path: Path
) -> None:
    kind, to, damage, message = CASES[name]
    if to != "hf":
        pytest.importorskip("peft", reason="needs peft")
    if kind == "qlora":
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    folder, whole = written(kind, to)
    shutil.copytree(folder, tmp_path / "export")
    damage(tmp_path / "export", made)
    with pytest.raises(Refused, match=message):
        pass_gate(tmp_path / "export", whole)


def test_nothing_is_left_of_a_refused_export(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_damaged(request: Any) -> Written:
        whole = FORMATS["hf"].write(request)
        in_tensors(zero("layers.1.mlp"))(request.folder, made)
        return whole

    entry = FORMATS["hf"]._replace(write=write_damaged)
    monkeypatch.setitem(FORMATS, "damaged", entry)
    with pytest.raises(Refused, match="weights.model.layers.1.mlp"):
        export(made.run("dense"), "damaged", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
