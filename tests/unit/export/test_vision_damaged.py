"""Exports of models that see which were damaged on purpose, each in one way, do not pass the gate."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("PIL")
from exported_vision import Seen
from llm_trainer.export.door import pass_gate
from llm_trainer.export.gate import Refused
from llm_trainer.export.request import Written

Tensors = dict[str, Tensor]
Damage = Callable[[Path], None]
PROCESSOR, CONFIG, TEMPLATE = "processor_config.json", "config.json", "chat_template.jinja"


def in_json(file: str, part: str = "", **changes: Any) -> Damage:
    """Other values in a file, or in a part of it; of a value that is None the key is removed."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        inner = content[part] if part else content
        inner |= changes
        for key, value in changes.items():
            if value is None:
                del inner[key]
        (folder / file).write_text(json.dumps(content))

    return damage


def of_images(**changes: Any) -> Damage:
    """Other settings of what makes numbers of images."""
    return in_json(PROCESSOR, "image_processor", **changes)


def in_tensors(change: Callable[[Tensors], object]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return damage


def zero(part: str) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        names = [name for name in tensors if part in name]
        assert names, f"no {part} among {list(tensors)}"
        for name in names:
            tensors[name] = torch.zeros_like(tensors[name])

    return change


def swap(one: str, other: str) -> Callable[[Tensors], object]:
    """Two tensors of the same shape, found by the ends of their names."""

    def change(tensors: Tensors) -> None:
        (first,) = [name for name in tensors if name.endswith(one)]
        (second,) = [name for name in tensors if name.endswith(other)]
        tensors[first], tensors[second] = tensors[second], tensors[first]

    return change


def rows(end: str, first: int, second: int) -> Callable[[Tensors], object]:
    """Two rows of a matrix."""

    def change(tensors: Tensors) -> None:
        (name,) = [name for name in tensors if name.endswith(end)]
        changed = tensors[name].clone()
        changed[[first, second]] = changed[[second, first]]
        tensors[name] = changed

    return change


def without_marker(folder: Path) -> None:
    text = (folder / TEMPLATE).read_text()
    (folder / TEMPLATE).write_text(text.replace("<image>", ""))
    assert "<image>" in text


def removed(*names: str) -> Damage:
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def marker_is_no_token(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = [one for one in content["added_tokens"] if one["content"] != "<image>"]
    (folder / "tokenizer.json").write_text(json.dumps(content))


HALVES = [0.5, 0.5, 0.5]
LARGER, LARGE = {"height": 24, "width": 24}, {"shortest_edge": 256, "longest_edge": 4096}
PINPOINTS = [[16, 32], [32, 16]]
SQUARE = "numbers of a picture of 64 x 64: pixel_values"
TALK = "conversation with pictures of 48 x 80"

CASES: dict[str, tuple[str, Damage, str]] = {  # name -> kind, damage, what the message says
    # 1. what makes numbers of images
    "another mean": ("llava", of_images(image_mean=[0.48, 0.46, 0.41]), SQUARE),
    "another deviation": ("llava", of_images(image_std=[0.51, 0.5, 0.5]), SQUARE),
    "another way to resize": ("llava", of_images(resample=2), SQUARE),
    "another scale": ("llava", of_images(rescale_factor=1 / 256), SQUARE),
    "numbers are not normalised": ("llava", of_images(do_normalize=False), SQUARE),
    "another image size": ("llava", of_images(size=LARGER), SQUARE),
    "a mean by default": ("llava", of_images(image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.499]), SQUARE),
    "larger pictures are cut": ("qwen2_5_vl", of_images(size=LARGE), "processor.image_processor.size"),
    # 2. how many tokens they are
    "another patch size": ("llava", in_json(PROCESSOR, patch_size=8), "pictures of 64 x 64, 48 x 80: expected .* ids"),
    "another way to count": ("llava", in_json(PROCESSOR, num_additional_image_tokens=1), f"{TALK}: expected .* ids"),
    "patches are merged otherwise": ("qwen2_5_vl", of_images(merge_size=1), f"{TALK}: expected .* ids, found"),
    "other tiles": ("llava_next", of_images(image_grid_pinpoints=PINPOINTS), "numbers of a picture of 64 x 64"),
    "no tiles": ("idefics3", of_images(do_image_splitting=False), "numbers of a picture of 64 x 64"),
    # 3. where they stand
    "no processor": ("llava", removed(PROCESSOR), "there is no processor"),
    "a template without the marker": ("llava", without_marker, "how its template takes images: expected 'some', fou"),
    "no template": ("llava", removed(TEMPLATE), "chat template: there is none"),
    "another marker": ("llava", in_json(PROCESSOR, image_token="<pad>"), f"{TALK}"),
    "the marker is no token": ("llava", marker_is_no_token, "transformers does not open|pictures of|ids of the text"),
    "another placeholder": ("llava", in_json(CONFIG, image_token_index=7), "settings.image_token_i"),
    "another placeholder of Qwen": ("qwen2_5_vl", in_json(CONFIG, image_token_id=7), f"{TALK}: the export cannot be"),
    # 4. what is made of them
    "a projector of zeros": ("llava", in_tensors(zero("projector")), f"log-probabilities of the {TALK}"),
    "a tower of zeros": ("llava", in_tensors(zero("vision_tower")), f"log-probabilities of the {TALK}"),
    "two matrices of the tower swapped": (
        "llava",
        in_tensors(
            swap(
                "vision_tower.encoder.layers.1.self_attn.q_proj.weight",
                "vision_tower.encoder.layers.1.self_attn.k_proj.weight",
            )
        ),
        f"log-probabilities of the {TALK}",
    ),
    "patches at other places": (
        "llava",
        in_tensors(rows("position_embedding.weight", 0, 9)),
        f"log-probabilities of the {TALK}",
    ),
    "the placeholder's row": ("llava", in_tensors(rows("embed_tokens.weight", 30, 31)), "weights.*embed_tokens"),
    "another layer of the tower": ("llava", in_json(CONFIG, vision_feature_layer=-2), "settings.vision_feature_layer"),
    "the end of a row is missing": (
        "llava_next",
        in_tensors(lambda tensors: [tensors.pop(name) for name in list(tensors) if "image_newline" in name]),
        "1 missing_keys: .*image_newline",
    ),
    "the end of a row is zero": ("llava_next", in_tensors(zero("image_newline")), f"log-probabilities of the {TALK}"),
    "other windows": (
        "qwen2_5_vl",
        in_json(CONFIG, "vision_config", fullatt_block_indexes=[0, 1]),
        "settings.vision_config",
    ),
    "other deep layers": (
        "qwen3_vl",
        in_json(CONFIG, "vision_config", deepstack_visual_indexes=[1]),
        "settings.vision_config.deepstack_visual_indexes",
    ),
    "tied though it is not": (
        "llava",
        in_json(CONFIG, tie_word_embeddings=True),
        "tie_word_embeddings: expected False",
    ),
    "untied though it is tied": (
        "llava tied",
        in_json(CONFIG, "text_config", tie_word_embeddings=False),
        "inner tie_word_embeddings: expected True, found False",
    ),
    "pixels are shuffled otherwise": (
        "internvl",
        in_json(CONFIG, downsample_ratio=0.25),
        "does not open|mismatch|settings.down",
    ),
}
QUICK = ["llava"]  # the model that every session makes


def cases(of_quick: bool) -> list[str]:
    return [name for name, (kind, _, _) in CASES.items() if (kind in QUICK) is of_quick]


def refused(name: str, written: Callable[[str, str], tuple[Path, Written]], folder: Path) -> None:
    kind, damage, message = CASES[name]
    export, whole = written(kind, "hf")
    shutil.copytree(export, folder / "export")
    damage(folder / "export")
    with pytest.raises(Refused, match=message):
        pass_gate(folder / "export", whole)


@pytest.mark.parametrize("name", cases(of_quick=True))
def test_a_damaged_export_is_refused(name: str, written_seen: Any, tmp_path: Path) -> None:
    refused(name, written_seen, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", cases(of_quick=False))
def test_a_damaged_export_of_another_family_is_refused(name: str, written_seen: Any, tmp_path: Path) -> None:
    refused(name, written_seen, tmp_path)


def test_what_was_shown_otherwise_in_training_is_refused(seen: Seen, tmp_path: Path) -> None:
    """The folder of a run whose processor somebody has changed since."""
    from llm_trainer.export.door import export

    shutil.copytree((seen.run("llava") / "model").resolve(), tmp_path / "model")
    of_images(image_mean=[0.4, 0.4, 0.4])(tmp_path / "model")
    with pytest.raises(Refused, match="does not answer as the model did in training") as refusal:
        export(tmp_path / "model", "hf", tmp_path / "out")
    lines = str(refusal.value).splitlines()
    assert sum("numbers of a picture of" in line for line in lines) == 3  # every difference is said
    assert any("processor.image_processor.image_mean" in line for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
