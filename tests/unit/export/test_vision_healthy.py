"""Healthy exports of models that see pass the gate; what is written is opened and asked by transformers alone."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("PIL")
from transformers import AutoModelForImageTextToText

from exported_vision import Seen
from llm_trainer.checkpoint.tensor_files import TensorFolder
from llm_trainer.checkpoint.weights import tensors_by_name
from llm_trainer.export.door import export
from llm_trainer.export.gate import Limits, compare
from llm_trainer.export.pictures import PICTURES, SHOWINGS, draw, other_numbers, sampled
from llm_trainer.export.probe import ANSWER_TOKENS, read_probe, write_probe
from llm_trainer.export.source import find_source
from llm_trainer.models.pretrained import find_pretrained
from llm_trainer.models.vision_build import processor_class
from vision_data import PROCESSORS

ADAPTED = ("lora", "dora", "pissa", "qlora")
BF16: dict[str, Any] = {"dtype": torch.bfloat16}
QUICK: list[tuple[str, str, dict[str, Any]]] = [
    ("llava", "hf", {}),
    ("llava", "hf", BF16),
    ("lora", "merged", {}),
    ("lora", "adapter", {}),
]
SLOW: list[tuple[str, str, dict[str, Any]]] = [
    *((family, "hf", {}) for family in PROCESSORS if family != "llava"),
    *((kind, "hf", {}) for kind in ("llava tied", "llava, markers in text", "llava without a template")),
    *((kind, "hf", {}) for kind in ("llava of a shape", "internvl of a shape")),
    *(
        (kind, to, {})
        for kind in ("lora everywhere", "lora of qwen3_vl", "dora", "pissa")
        for to in ("merged", "adapter")
    ),
    ("lora on a tied head", "merged", {}),
    ("lora on a tied head", "adapter", {}),
    ("lora in bf16", "merged", {}),
    ("lora in bf16", "adapter", {}),
    ("qwen2_5_vl", "hf", BF16),
    ("llava_next", "hf", BF16),
    ("lora", "merged", BF16),
    ("qlora", "merged", {}),
    ("qlora", "adapter", {}),
]


def passes(kind: str, to: str, options: dict[str, Any], seen: Seen, folder: Path) -> None:
    if kind.startswith(ADAPTED):
        pytest.importorskip("peft", reason="needs peft")
    if kind == "qlora":
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    # 1. what training has recorded
    probe = read_probe(seen.run(kind) / "model")
    assert probe is not None and probe.was_trained and probe.numbers is not None and probe.looks
    assert not any(look.problem for look in probe.looks) and len(probe.numbers) == len(PICTURES)
    assert sum(showing.num_answered for showing in probe.questions.showings) == ANSWER_TOKENS
    if kind != "llava without a template" and "markers" not in kind:
        assert len(probe.questions.showings) == len(SHOWINGS)
    # 2. the export
    said: list[str] = []
    out = export(seen.run(kind), to, folder / "out", say=said.append, **options)
    precision = "bf16" if "in bf16" in kind else "fp32"
    assert said[0].startswith(f"reopened, compared with training in {precision}: log-probabilities of ")
    assert said[-1].startswith("gate: log-probabilities of ") and "not compared" not in said[-1]
    assert sorted(folder.iterdir()) == [out] and not (out / "probe.json").exists()
    # 3. as other tools open it
    assert processor_class(out).from_pretrained(out).image_processor is not None
    if to != "adapter":
        found = AutoModelForImageTextToText.from_pretrained(out, dtype="auto")
        expected = options.get("dtype", torch.bfloat16 if "in bf16" in kind else torch.float32)
        assert found.dtype is expected and "lora" not in str(found)


@pytest.mark.parametrize(("kind", "to", "options"), QUICK, ids=str)
def test_healthy_exports_pass(kind: str, to: str, options: dict[str, Any], seen: Seen, tmp_path: Path) -> None:
    passes(kind, to, options, seen, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "to", "options"), SLOW, ids=str)
def test_healthy_exports_of_all_families_pass(
    kind: str, to: str, options: dict[str, Any], seen: Seen, tmp_path: Path
) -> None:
    passes(kind, to, options, seen, tmp_path)


def test_weights_have_the_names_of_the_folder_that_the_model_came_from(seen: Seen, tmp_path: Path) -> None:
    """And the card says what is opened how."""
    pytest.importorskip("peft", reason="needs peft")
    out = export(seen.run("lora"), "merged", tmp_path / "out")
    base = find_pretrained(seen.run("lora")).model_source
    assert TensorFolder(out).shapes == TensorFolder(Path(base)).shapes
    card = (out / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card and "AutoModelForImageTextToText" in card


def test_adapters_of_another_run_are_added_in_the_tower_too(seen: Seen, tmp_path: Path) -> None:
    """Of one run on the language model alone, and of another one on all parts: pictures are shown to both merged."""
    pytest.importorskip("peft", reason="needs peft")
    run, other = seen.run("lora"), seen.run("lora everywhere")
    said: list[str] = []
    out = export(run, "merged", tmp_path / "out", others={str(other): 0.5}, say=said.append)
    assert said[-1].startswith("gate: log-probabilities of ") and "not compared" not in said[-1]
    source = find_pretrained(run).model_source
    base, merged = (tensors_by_name(AutoModelForImageTextToText.from_pretrained(folder)) for folder in (source, out))
    alone = [tensors_by_name(find_source(one, lambda line: None).whole()) for one in (run, other)]
    found, first, second = (changed(weights, base) for weights in (merged, *alone))
    assert set(found) == set(second) > set(first) > set()
    for name, change in found.items():
        own = first.get(name, torch.zeros_like(change))
        torch.testing.assert_close(change, own + 0.5 * second[name], atol=1e-6, rtol=0)


def changed(weights: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """How far weights are from those of a base, where they are."""
    found = {name: weight.detach() - base[name].detach() for name, weight in weights.items()}
    return {name: change for name, change in found.items() if change.abs().max() > 1e-4}


def test_a_model_that_was_shown_nothing_in_training_is_shown_pictures_now(seen: Seen, tmp_path: Path) -> None:
    """Such as one whose run had a tokenizer and no processor."""
    folder = tmp_path / "model"
    found = (seen.run("llava") / "model").resolve()
    folder.mkdir()
    for file in found.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    content = json.loads((folder / "probe.json").read_text())
    for name in ("numbers", "looks"):
        content.pop(name)
    for name in ("pictures", "showings"):
        content["questions"].pop(name)
    for name in ("processor", "how its template takes images"):
        content["facts"].pop(name)
    (folder / "probe.json").write_text(json.dumps(content))
    said: list[str] = []
    export(folder, "hf", tmp_path / "out", say=said.append)
    assert said[1].startswith(
        "training had no processor: what the export makes of pictures is compared with the reopened"
    )
    assert int(said[0].split()[8]) < int(said[-1].split()[3])  # tokens: the gate has shown pictures too


def test_a_mean_is_of_all_tokens_and_not_of_one_showing(seen: Seen) -> None:
    """Of a few tokens the mean of a healthy run in 16 bits is beyond what it may be of all."""
    probe = read_probe(seen.run("llava") / "model")
    assert probe is not None and probe.looks is not None
    limits = Limits(worst=1.0, mean=0.04)

    def moved(by: float, which: int) -> list[str]:
        looks = [*probe.looks]
        looks[which] = looks[which]._replace(logprobs=[number + by for number in looks[which].logprobs])
        return compare(probe, replace(probe, looks=looks), limits).differences

    assert moved(0.05, 1) == []
    assert [line[:39] for line in moved(0.9, 1)] == ["log-probabilities of texts and pictures"]
    assert moved(1.1, 1)[0].startswith("log-probabilities of the conversation with pictures of 48 x 80: 1.1 nats apart")


def test_the_record_is_read_as_it_was_written(seen: Seen, tmp_path: Path) -> None:
    probe = read_probe(seen.run("llava") / "model")
    assert probe is not None
    write_probe(probe, tmp_path)
    assert read_probe(tmp_path) == probe


def test_pictures_are_the_same_everywhere() -> None:
    """By a rule of whole numbers: other sizes, other courses in each colour, edges and a grain."""
    import numpy as np

    pixels = {size: np.asarray(draw(*size), dtype=np.int64) for size in PICTURES}
    assert [values.shape[:2] for values in pixels.values()] == list(PICTURES)
    assert [int(values.sum()) for values in pixels.values()] == [1544789, 1454290, 1156809]
    for values in pixels.values():
        for one, other in ((0, 1), (0, 2), (1, 2)):
            assert abs(np.corrcoef(values[..., one].ravel(), values[..., other].ravel())[0, 1]) < 0.8


def test_what_is_kept_of_numbers_tells_small_changes() -> None:
    numbers = torch.linspace(-2, 2, 3 * 40 * 40).view(1, 3, 40, 40)
    kept = sampled({"pixel_values": numbers})
    assert len(kept["pixel_values"][1]) == 65 and other_numbers(kept, kept) == ""
    assert other_numbers(kept, sampled({"pixel_values": numbers + 1e-3})).startswith(
        "pixel_values: 0.001 apart at worst"
    )
    assert "found [1, 3, 1600]" in other_numbers(kept, sampled({"pixel_values": numbers.flatten(2)}))
    assert other_numbers(kept, sampled({"pixels": numbers})) == "expected pixel_values, found pixels"
    assert other_numbers(kept, sampled({"pixel_values": numbers * float("nan")})) != ""
