"""A vision-language model is trained from a configuration on rows with images: files, csv, tags and token files."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL")
import torch

from llm_trainer import SFTTrainer, Trainer
from llm_trainer.data.encode.tokenizer import train_tokenizer
from llm_trainer.train_configs import (
    DataLoaderConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    RunConfig,
    SFTConfig,
    TrainConfig,
    VisionConfig,
    VLMConfig,
)
from vision_data import file_of, picture

VISION = VisionConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 96,
}
NUM = 4  # placeholders of an image


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("seen")
    train_tokenizer(["What? A cat."] * 2, 290, ["<image>"]).save_pretrained(made / "tokenizer")
    rows = []
    for number in range(6):
        (made / f"{number}.png").write_bytes(file_of(picture(8, 8, seed=number)))
        turns = [
            {"role": "user", "content": "<image>?" * (number % 3)},
            {"role": "assistant", "content": f"cat {number}"},
        ]
        rows.append(turns)
    (made / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (made / "tags.csv").write_text("\n0.png\n1.png,2.png\n\n4.png\n5.png,5.png\n")
    return made


def config(folder: Path, save_dir: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "model_config": VLMConfig(**TEXT, vision=VISION),
        "tokenizer": str(folder / "tokenizer"),
        "file_dataset": str(folder / "rows.jsonl"),
        "batch_size": 6,
        "sft_config": SFTConfig(image_tags_file_dataset=str(folder / "tags.csv")),
        "data_loader_config": DataLoaderConfig(cache_dir=str(save_dir.parent / "cache"), data_loader_shuffle=False),
        "optim_config": OptimConfig(initial_lr=1e-3),
        "run_config": RunConfig(save_dir=str(save_dir), precision="fp32", progress=False, log_interval=1),
    }
    return TrainConfig(**(values | changes))


def first_batch(described: TrainConfig, trainer_class: type = SFTTrainer) -> dict[str, Any]:
    from llm_trainer.builder import Builder, make_streams

    stream, _ = make_streams(described, Builder(described, trainer_class))
    [(batches, _)] = list(stream.steps(0))
    return batches[0].batch


def test_a_model_that_sees_is_trained_on_the_images_of_a_csv(folder: Path, tmp_path: Path) -> None:
    values = SFTTrainer(train_config=config(folder, tmp_path / "run")).train()
    assert values["loss"] > 0
    state = json.loads(next((tmp_path / "run").rglob("trainer_state.json")).read_text())
    assert '"images": {"read": 6, "used": 6, "cut": 0' in json.dumps(state)
    batch = first_batch(config(folder, tmp_path / "run"))
    assert batch["images"].counts.tolist() == [0, 1, 2, 0, 1, 2]
    assert len(batch["images"].lengths) == 5 and set(batch["images"].lengths.tolist()) == {NUM}


def test_ids_and_pixels_of_a_function_give_the_same_tokens(folder: Path, tmp_path: Path) -> None:
    text = first_batch(
        config(
            folder,
            tmp_path / "run",
            data_loader_config=DataLoaderConfig(
                cache_dir=str(tmp_path / "cache"), data_loader_shuffle=False, packing="none"
            ),
        )
    )
    ids = [row[mask.bool()].tolist() for row, mask in zip(text["input_ids"], text["attention_mask"], strict=True)]
    (tmp_path / "rows.pkl").write_bytes(pickle.dumps(ids))
    asked: list[list[str]] = []

    def provider(tags: list[str]) -> torch.Tensor:
        asked.append(tags)
        return torch.stack([torch.full((3, 8, 8), float(tag[0])) for tag in tags])

    section = SFTConfig(image_tags_file_dataset=str(folder / "tags.csv"), pixel_values_provider=provider)
    loader = DataLoaderConfig(cache_dir=str(tmp_path / "cache"), data_loader_shuffle=False, packing="none")
    how: dict[str, Any] = {"sft_config": section, "data_loader_config": loader}
    batch = first_batch(config(folder, tmp_path / "run", file_dataset=str(tmp_path / "rows.pkl"), **how))
    assert torch.equal(batch["input_ids"], text["input_ids"]) and torch.equal(batch["labels"], text["labels"])
    assert batch["images"].inputs["pixel_values"][:, 0, 0, 0].tolist() == [0, 1, 2, 4, 5]
    assert asked == [["0.png", "1.png", "2.png", "4.png", "5.png"]]


def test_text_and_images_in_turn_are_pretrained_on_without_being_cut_through(folder: Path, tmp_path: Path) -> None:
    rows = [{"text": f"a cat <image> and {number}", "images": [str(folder / f"{number}.png")]} for number in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loader = DataLoaderConfig(cache_dir=str(tmp_path / "cache"), image_root=str(folder), max_pixels=16)
    changes: dict[str, Any] = {"sft_config": None, "pretrain_config": PretrainConfig(), "data_loader_config": loader}
    described = config(
        folder, tmp_path / "run", file_dataset=str(tmp_path / "rows.jsonl"), dataset_block_size=40, **changes
    )
    batch = first_batch(described, Trainer)
    assert batch["images"].counts.sum() == 6
    assert int((batch["labels"] == batch["input_ids"]).sum()) > 0


def test_images_for_a_model_that_reads_text_are_an_error(folder: Path, tmp_path: Path) -> None:
    blind = {"model_config": ModelConfig(**TEXT)}
    with pytest.raises(ValueError, match="image_tags_file_dataset: found a model that reads text"):
        first_batch(config(folder, tmp_path / "run", **blind))
    two = SFTConfig(image_tags_file_dataset=[str(folder / "tags.csv")] * 2)
    with pytest.raises(ValueError, match="got 2 files for 1 path of file_dataset, expected one each"):
        first_batch(config(folder, tmp_path / "run", sft_config=two))
