"""A vision-language model is trained from a configuration on rows with images: files, csv, tags and token files."""

import contextlib
import io
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL")
import torch

from llm_trainer import DPOTrainer, GRPOTrainer, KTOTrainer, PPOTrainer, RewardTrainer, SFTTrainer, Trainer
from llm_trainer.cli.chat import Speaker
from llm_trainer.cli.main import main
from llm_trainer.data.encode.tokenizer import load_tokenizer, train_tokenizer
from llm_trainer.export.door import export
from llm_trainer.models.build import build_model
from llm_trainer.models.rewarding import reward_model
from llm_trainer.models.seeing import may_be_shown_images
from llm_trainer.models.vision_build import processor_for
from llm_trainer.train.metrics import Clock, Shares
from llm_trainer.train_configs import (
    AdapterConfig,
    DataLoaderConfig,
    DPOConfig,
    EvalConfig,
    GRPOConfig,
    KTOConfig,
    ModelConfig,
    OptimConfig,
    PPOConfig,
    PretrainConfig,
    RewardConfig,
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
    from llm_trainer.builder.objects import Builder

    stream, *_ = Builder(described, trainer_class).streams
    [(batches, _)] = list(stream.steps(0))
    return batches[0].batch


def test_a_model_that_sees_is_trained_on_the_images_of_a_csv(folder: Path, tmp_path: Path) -> None:
    loader = {"cache_dir": str(tmp_path / "cache"), "data_loader_shuffle": False, "max_pixels": 1000}
    how: dict[str, Any] = {"data_loader_config": DataLoaderConfig(**loader), "freeze": ["vision"]}
    values = SFTTrainer(train_config=config(folder, tmp_path / "run", **how)).train()
    assert values["loss"] > 0
    state = json.loads(next((tmp_path / "run").rglob("trainer_state.json")).read_text())
    assert '"images": {"read": 6, "used": 6, "cut": 0' in json.dumps(state)
    batch = first_batch(config(folder, tmp_path / "run"))
    assert batch["images"].counts.tolist() == [0, 1, 2, 0, 1, 2]
    assert len(batch["images"].lengths) == 5 and set(batch["images"].lengths.tolist()) == {NUM}
    # what is made of it says what it was trained on
    card = (export(tmp_path / "run", "hf", tmp_path / "out") / "README.md").read_text()
    assert (
        "| read | images | used | cut off | left out |\n|---|---|---|---|---|\n| rows.jsonl | 6 | 6 | 0 | 0 |" in card
    )
    assert "made smaller, to 1,000 pixels, before" in card and "Frozen: `vision`." in card


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
    assert asked == [["0.png", "1.png", "2.png", "4.png", "5.png"]] * 2  # the first time twice, to compare
    # what a run writes down of itself has no place for a function
    described = config(folder, tmp_path / "run", file_dataset=str(tmp_path / "rows.pkl"), **how)
    assert SFTTrainer(train_config=described).train()["loss"] > 0


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


def packed_config(folder: Path, save_dir: Path, packing: str, **loader: Any) -> TrainConfig:
    cache = str(save_dir.parent / "cache")
    how = {"packing": packing, "cache_dir": cache, "data_loader_shuffle": False}
    return config(folder, save_dir, data_loader_config=DataLoaderConfig(**how | loader))


def test_packed_rows_with_images_learn_what_padded_ones_do(folder: Path, tmp_path: Path) -> None:
    """A step of all rows: several in one of 96 tokens, one each, or laid flat. Nothing is cut."""
    losses, norms = {}, {}
    for packing in ("none", "flat", "bfd", "bfd_split"):
        values = SFTTrainer(train_config=packed_config(folder, tmp_path / packing, packing)).train()
        losses[packing], norms[packing] = values["loss"], values["grad_norm"]
    assert losses == pytest.approx(dict.fromkeys(losses, losses["none"]), abs=1e-5)
    assert norms == pytest.approx(dict.fromkeys(norms, norms["none"]), rel=1e-4)


def test_split_rows_are_cut_between_images_and_budgets_count_what_the_tower_sees(folder: Path, tmp_path: Path) -> None:
    from llm_trainer.builder.objects import Builder

    block, budget = 12, 24
    described = packed_config(folder, tmp_path / "run", "bfd_split", micro_batch_tokens=budget)
    described.dataset_block_size = block
    stream, *_ = Builder(described, SFTTrainer).streams
    [ledger] = [part.ledger.check() for part in stream.dataset.parts]
    assert (ledger.images.read, ledger.images.used, ledger.images.cut) == (6, 6, 0)
    whole, *_ = Builder(packed_config(folder, tmp_path / "run", "none"), SFTTrainer).streams
    assert int(stream.dataset.lengths.sum()) == int(whole.dataset.lengths.sum()) > block * 6
    placeholder = load_tokenizer(folder / "tokenizer").convert_tokens_to_ids("<image>")
    shown, trained = 0, 0
    for micro_batches, _ in stream.steps(0):
        for micro_batch in micro_batches:
            batch = micro_batch.batch
            images = batch.get("images")
            uses = 0 if images is None else len(images.order)
            assert int((batch["input_ids"] == placeholder).sum()) == NUM * uses  # whole ones alone
            assert batch["input_ids"].numel() + NUM * uses <= budget  # a patch for each of their tokens
            is_predicted = (batch["labels"] != -100) & (batch["position_ids"] > 0)  # nothing comes before a first token
            shown, trained = shown + uses, trained + int(is_predicted.sum())
    assert (shown, trained) == (6, ledger.trained)
    assert SFTTrainer(train_config=described).train()["loss"] > 0


def tower_parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.model.vision_tower.parameters())


def test_the_screen_says_what_a_step_shows_and_what_it_takes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """MFU is of the whole step: with what the tower does, counted as it is shown."""
    trainer = SFTTrainer(train_config=config(folder, tmp_path / "run"))
    trainer.train()
    told = capsys.readouterr().out
    assert "6 with 24 patches per step on average (4 each), 6 in an epoch" in told
    assert "6 images read = 6 used" in told
    assert f"parts  vision {tower_parameters(trainer.base_model):,}, projector " in told
    size, tower = trainer.run.size, trainer.run.size.shape.tower
    assert size.flops_per_pixel == tower.flops_per_patch(4) / tower.values_per_patch > 0
    clock = Clock()
    clock.add(100, 2.0, pixels=5 * 3 * 8 * 8)  # of five images
    found = clock.read(trainer.run.progress, None, Shares(size.flops_per_token, size.flops_per_pixel))
    expected = (100 * size.flops_per_token + 5 * 4 * tower.flops_per_patch(4)) / 2
    assert found["mfu"] == pytest.approx(expected)


def test_images_for_a_model_that_reads_text_are_an_error(folder: Path, tmp_path: Path) -> None:
    blind = {"model_config": ModelConfig(**TEXT)}
    with pytest.raises(ValueError, match="image_tags_file_dataset: found a model that reads text"):
        first_batch(config(folder, tmp_path / "run", **blind))
    whole_folder = {"file_dataset": str(folder)}
    with pytest.raises(ValueError, match="in file_dataset is no single file; expected one for each csv"):
        first_batch(config(folder, tmp_path / "run", **whole_folder))
    two = SFTConfig(image_tags_file_dataset=[str(folder / "tags.csv")] * 2)
    with pytest.raises(ValueError, match="got 2 files for 1 path of file_dataset, expected one each"):
        first_batch(config(folder, tmp_path / "run", sft_config=two))


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run whose projector alone has learned, with answers to prompts that show one image, two and none; and its screen."""
    save_dir, said = tmp_path_factory.mktemp("trained") / "run", io.StringIO()
    described = config(
        folder,
        save_dir,
        eval_prompts=["<image>?", "<image><image>?", "?"],
        eval_image_tags=[str(folder / "0.png"), [str(folder / "1.png"), str(folder / "2.png")], []],
        eval_config=EvalConfig(max_seq_len=4, temperature=0.0),
        sft_config=SFTConfig(image_tags_file_dataset=str(folder / "tags.csv"), freeze_llm_model=True),
    )
    with contextlib.redirect_stdout(said):
        SFTTrainer(train_config=described).train()
    return save_dir, said.getvalue()


def test_the_projector_alone_learns_where_the_rest_is_frozen(folder: Path, trained: tuple[Path, str]) -> None:
    save_dir, screen = trained
    before = first_model(config(folder, save_dir))
    after = build_model(str(save_dir / "model")).state_dict()
    changed = [name for name, value in before.state_dict().items() if not torch.equal(value, after[name])]
    assert changed and all(name.startswith("model.multi_modal_projector.") for name in changed)
    assert "not trained  vision: " in screen and ", language: " in screen
    assert "images  6 with 24 patches per step on average (4 each), 6 in an epoch" in screen


def first_model(described: TrainConfig) -> Any:
    """The model that a run begins with."""
    from llm_trainer.builder.objects import Builder

    return Builder(described, SFTTrainer).policy


def test_prompts_show_their_images_during_training(folder: Path, trained: tuple[Path, str]) -> None:
    """What it answers is what `chat` answers, and depends on the image."""
    save_dir, _ = trained
    lines = (save_dir / "log" / "gen.txt").read_text().splitlines()
    answers = {}
    for line in lines:
        for prompt in ("<image><image>?", "<image>?", "?"):
            if repr(prompt) in line:
                answers[prompt] = line.rpartition(repr(prompt))[2]
                break
    assert len(answers) == 3
    speaker = Speaker(save_dir / "model", max_new_tokens=4, temperature=0.0)
    said = "".join(speaker.answer("?", [str(folder / "0.png")]))
    assert repr(said) in answers["<image>?"]
    for source, found in {"https://some.where/0.png": "the address", "9.png": "no file at"}.items():
        with pytest.raises(ValueError, match=f"--image: found {found}.*; fix: (fetch|name an image)"):
            list(speaker.answer("?", [source]))
    with pytest.raises(ValueError, match=r"--image: 0 images and 1 <image> marker in '<image>\?'"):
        list(speaker.answer("<image>?"))


def test_what_prompts_show_must_be_there(folder: Path, tmp_path: Path) -> None:
    def run(prompt: str, tags: Any, **changes: Any) -> None:
        given = {"eval_prompts": [prompt], "eval_image_tags": tags} | changes
        SFTTrainer(train_config=config(folder, tmp_path / "run", **given)).train()

    with pytest.raises(ValueError, match=r"eval_image_tags: got 2 for 1 eval_prompts, expected one each"):
        run("<image>?", ["a.png", "b.png"])
    with pytest.raises(
        ValueError, match=r"2 images and 1 <image> marker in '<image>\?'; expected one marker per image, su"
    ):
        run("<image>?", [[str(folder / "0.png")] * 2])
    with pytest.raises(ValueError, match="eval_image_tags: found no file at"):
        run("<image>?", [str(folder / "9.png")])
    with pytest.raises(ValueError, match=r"eval_image_tags: 0 images and 1 <image> marker in '<image>\?'"):
        run("<image>?", [])
    loader = DataLoaderConfig(image_root=str(folder / "nowhere"), cache_dir=str(folder / "cache"))
    below = {"data_loader_config": loader, "sft_config": SFTConfig(), "file_dataset": [str(folder / "text.jsonl")]}
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "cat"}]
    (folder / "text.jsonl").write_text(json.dumps(turns) + "\n")
    for tags in (["0.png"], [["0.png"]]):
        with pytest.raises(ValueError, match=r"no file at .*nowhere/0\.png; expected an image; fix: name an image"):
            run("<image>?", tags, **below)


PAIRS = [
    {
        "prompt": [{"role": "user", "content": "<image>What?" * (number % 3)}],
        "chosen": [{"role": "assistant", "content": "A cat."}],
        "rejected": [{"role": "assistant", "content": f"dog {number}"}],
        "images": [f"{number}.png", f"{(number + 1) % 6}.png"][: number % 3],
    }
    for number in range(6)
]


@pytest.mark.parametrize(("packing", "freeze"), [("none", []), ("flat", []), ("flat", ["vision", "projector"])])
def test_pairs_show_their_images_to_policy_and_reference(
    packing: str, freeze: list[str], folder: Path, tmp_path: Path
) -> None:
    """The tower runs once for all answers of a micro-batch to an image; where it does not learn, once for both models."""
    rows = [row | {"prompt": row["prompt"] if row["images"] else [{"role": "user", "content": "Hm"}]} for row in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loader = DataLoaderConfig(cache_dir=str(tmp_path / "cache"), image_root=str(folder), packing=packing)
    changes: dict[str, Any] = {"sft_config": None, "dpo_config": DPOConfig(), "data_loader_config": loader}
    changes["freeze"] = freeze
    described = config(folder, tmp_path / "run", file_dataset=str(tmp_path / "pairs.jsonl"), **changes)
    trainer = DPOTrainer(train_config=described)
    seen: list[int] = []
    for model in (trainer.base_model, trainer.reference.base):
        model.model.vision_tower.register_forward_hook(lambda _, inputs, out: seen.append(len(out.last_hidden_state)))
    values = trainer.train()
    assert values["loss"] == pytest.approx(0.6931, abs=1e-4)
    expected = [6] if freeze else [6, 6]
    # of twelve answers with twelve uses: each image once; then the pictures that are recorded at the end
    assert seen == [*expected, 2, 1, 2]


def pairs_file(tmp_path: Path) -> Path:
    """Pairs with two images, one and none, and an evaluation that is them."""
    rows = [row | {"prompt": row["prompt"] if row["images"] else [{"role": "user", "content": "Hm"}]} for row in PAIRS]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def score(*arguments: Any) -> Any:
    with pytest.raises(SystemExit) as end:
        main(["score", *map(str, arguments)])
    return end.value.code


def test_a_reward_model_sees_and_scores_what_it_was_trained_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = pairs_file(tmp_path)
    loader = DataLoaderConfig(cache_dir=str(tmp_path / "cache"), image_root=str(folder), max_pixels=36)
    changes: dict[str, Any] = {"sft_config": None, "reward_config": RewardConfig(), "data_loader_config": loader}
    changes |= {"file_dataset": str(file), "eval_dataset": str(file)}
    trainer = RewardTrainer(train_config=config(folder, tmp_path / "run", **changes))
    seen: list[int] = []
    trainer.base_model.model.vision_tower.register_forward_hook(
        lambda _, inputs, out: seen.append(len(out.last_hidden_state))
    )
    trainer.train()
    assert seen == [6, 6]  # of twelve answers with twelve uses, in training and in evaluation
    assert type(trainer.base_model).__name__ == "LlavaForSequenceClassification"
    values = trainer.evaluate()

    # its folder is scored with, is trained on, and is no language model
    capsys.readouterr()
    saved, out = tmp_path / "run" / "model", tmp_path / "scores.jsonl"
    how = ["--image-root", folder, "--max-pixels", 36]
    assert score(saved, file, "--out", out, "--batch-size", 5, *how) == 0
    scores = [json.loads(line) for line in out.read_text().splitlines()]
    margins = [one["chosen"] - one["rejected"] for one in scores]
    assert len(margins) == 6
    assert sum(margins) / 6 == pytest.approx(values["eval_margin"], abs=1e-5)
    expected = [value for one in scores for value in (one["chosen"], one["rejected"])]
    assert sum(expected) / 12 == pytest.approx(values["eval_mean_reward"], abs=1e-5)
    again = config(
        folder, tmp_path / "again", **changes | {"model_config": str(tmp_path / "run"), "tokenizer": str(saved)}
    )
    assert RewardTrainer(train_config=again).evaluate() == pytest.approx(values, abs=1e-5)
    with pytest.raises(ValueError, match="found LlavaForSequenceClassification, expected a language model"):
        Speaker(saved)

    # single answers have the scores of the sides; another image has another score
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    turns = [{"messages": row["prompt"] + row["chosen"], "images": row["images"]} for row in rows]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turns))
    score(saved, tmp_path / "chat.jsonl", "--out", out, *how)
    alone = [json.loads(line)["score"] for line in out.read_text().splitlines()]
    assert alone == pytest.approx([one["chosen"] for one in scores], abs=1e-5)
    turns[1]["images"] = ["5.png"]
    (tmp_path / "other.jsonl").write_text(json.dumps(turns[1]) + "\n")
    score(saved, tmp_path / "other.jsonl", "--out", out, *how)
    assert abs(json.loads(out.read_text())["score"] - alone[1]) > 1e-6

    # images that cannot be used stop it, or are counted
    turns[2]["images"] = ["5.png", "9.png"]
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turns))
    capsys.readouterr()
    assert score(saved, tmp_path / "bad.jsonl", *how) == 2
    assert "bad.jsonl:3: key 'images': found no file at" in capsys.readouterr().err
    assert score(saved, tmp_path / "bad.jsonl", "--drop-bad-images", *how) == 0
    said = capsys.readouterr().out
    assert said.startswith("5 answers: ") and "left out: 1 row (image" in said


def test_a_reward_model_without_eyes_is_not_given_images(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    torch.manual_seed(0)
    reward_model(build_model(ModelConfig(**TEXT, vocab_size=290)), 0).save_pretrained(tmp_path / "blind")
    load_tokenizer(folder / "tokenizer").save_pretrained(tmp_path / "blind")
    file = pairs_file(tmp_path)
    assert score(tmp_path / "blind", file) == 2
    said = capsys.readouterr().err
    assert (
        "found rows of kind 'vision'" in said and "a reward model that sees, or score the text alone with --ig" in said
    )
    assert score(tmp_path / "blind", file, "--schema", "preference") == 2
    said = capsys.readouterr().err
    assert "pairs.jsonl:2: key 'images': found" in said and "expected text alone, for pairs" in said
    assert score(tmp_path / "blind", file, "--ignore-images") == 0


def test_who_takes_no_images_says_so(folder: Path, tmp_path: Path) -> None:
    class Own(PPOTrainer):
        def _forward(self, batch: Any) -> Any:
            return super()._forward(batch)

    described = asked(folder, tmp_path, ppo_config=PPOConfig(), grpo_config=None)
    how: dict[str, Any] = {"train_config": described, "reward_func": lambda completions, **_: [0.0] * len(completions)}
    with pytest.raises(ValueError, match="its rows show images, and Own takes none yet"):
        Own(**how)


def asked(folder: Path, tmp_path: Path, **changes: Any) -> TrainConfig:
    """Prompts of text, with an image in a column, and with two as parts; the last is longer than the context."""
    parts = [{"type": "image", "image": "3.png"}, {"type": "text", "text": "or"}, {"type": "image", "image": "4.png"}]
    rows: list[dict[str, Any]] = [
        {"prompt": [{"role": "user", "content": "Which?"}], "answer": "0"},
        {"prompt": [{"role": "user", "content": "<image>Which?"}], "images": ["1.png"], "answer": "1", "level": 5},
        {"prompt": [{"role": "user", "content": parts}], "answer": "7"},
        {"prompt": [{"role": "user", "content": "<image>?" + 80 * "x"}], "images": ["2.png"], "answer": "2"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loader = DataLoaderConfig(cache_dir=str(tmp_path / "cache"), image_root=str(folder), data_loader_shuffle=False)
    section = GRPOConfig(group_size=2, gen_max_seq_len=4, share_prompts=True)
    given: dict[str, Any] = {"sft_config": None, "data_loader_config": loader, "grpo_config": section, "batch_size": 3}
    return config(folder, tmp_path / "run", file_dataset=str(tmp_path / "rows.jsonl"), **(given | changes))


def test_prompts_of_files_show_their_images(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], reference: float = 1e-5
) -> None:
    """In a column or as parts; what is too long is left out whole, and rewards see the other columns and the images."""
    seen: list[Any] = []

    def reward(completions: list[str], answers: list[str], images: Any, level: list[Any], **_: Any) -> list[float]:
        seen.append((answers, images, level))
        return [float(len(text)) for text in completions]

    trainer = GRPOTrainer(train_config=asked(folder, tmp_path), reward_func=reward, reward_in_process=True)
    values = trainer.train()
    (answers, images, level) = seen[0]
    assert answers == ["0", "0", "1", "1", "7", "7"] and level == [None, None, 5, 5, None, None]
    names = [[Path(source).name for source in listed] for listed in images]
    assert names == [[], [], ["1.png"], ["1.png"], ["3.png", "4.png"], ["3.png", "4.png"]]
    assert values["sampling/sampling_logp_difference/max"] < reference
    screen = capsys.readouterr().out
    assert "4 images read = 3 used + 0 cut off + 1 dropped" in screen
    assert "images  3 with 12 patches per step on average (4 each), 3 in an epoch" in screen


def test_the_folder_of_a_reward_model_that_sees_judges_prompts_with_images(folder: Path, tmp_path: Path) -> None:
    """With the processor of the policy; another one, and a model that reads text, are refused before any step."""
    save_seeing_models(folder, tmp_path)

    def described(name: str) -> TrainConfig:
        section = GRPOConfig(group_size=2, gen_max_seq_len=4, reward_model_checkpoint=str(tmp_path / name))
        return asked(folder, tmp_path, grpo_config=section)

    trainer = GRPOTrainer(train_config=described("judge"))
    values = trainer.train()
    assert trainer.judge is not None and may_be_shown_images(trainer.judge.model)
    assert values["grad_norm"] > 0 and values["rewards/model_reward"] == pytest.approx(values["reward"])
    other = (
        f"the processor of {tmp_path / 'other'} differs from that of this run (the pixel_values of an image of 64 x 64 "
    )
    with pytest.raises(ValueError, match=re.escape(f"reward_model_checkpoint: {other}pixels are other numbers)")):
        GRPOTrainer(train_config=described("other"))
    with pytest.raises(
        ValueError, match="prompts show images, and the reward model reads text alone; expected one that"
    ):
        GRPOTrainer(train_config=described("blind"))


def save_seeing_models(folder: Path, into: Path) -> None:
    """Reward models that see, `judge` and, with another processor, `other`; `language`, whose tower has a head that no loss
    reaches; and `blind`, which reads text.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    tokenizer = load_tokenizer(folder / "tokenizer")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {**TEXT, "vocab_size": 291, "vision": VISION}
    model = build_model(VLMConfig(**sizes, image_token_id=tokenizer.convert_tokens_to_ids("<image>")))
    processor = processor_for(model.config, tokenizer)
    described = LlavaConfig.from_dict(model.config.to_dict())
    described.vision_config.vision_use_head = True
    language = LlavaForConditionalGeneration(described)
    for name, saved in (("language", language), ("judge", reward_model(model, 0)), ("other", reward_model(model, 0))):
        if name == "other":
            processor.image_processor.image_mean = [0.1, 0.2, 0.3]
        saved.save_pretrained(into / name)
        processor.save_pretrained(into / name)
    reward_model(build_model(ModelConfig(**TEXT, vocab_size=291)), 0).save_pretrained(into / "blind")
    tokenizer.save_pretrained(into / "blind")


def test_a_reward_model_with_adapters_sees_is_scored_with_and_judges(folder: Path, tmp_path: Path) -> None:
    """On the body of a language model and on a reward model; the processor lies beside the adapters, and not by the base."""
    pytest.importorskip("peft")
    save_seeing_models(folder, tmp_path)
    file, out = pairs_file(tmp_path), tmp_path / "scores.jsonl"
    loader = DataLoaderConfig(cache_dir=str(tmp_path / "cache"), image_root=str(folder))
    changes: dict[str, Any] = {"sft_config": None, "reward_config": RewardConfig(), "data_loader_config": loader}
    changes |= {"file_dataset": str(file), "eval_dataset": str(file), "adapter_config": AdapterConfig()}
    for name in ("language", "judge"):
        run = tmp_path / f"{name}-run"
        changes |= {"model_config": str(tmp_path / name), "tokenizer": str(tmp_path / name)}
        trainer = RewardTrainer(train_config=config(folder, run, **changes))
        values = trainer.train()
        learned = [key for key, parameter in trainer.base_model.named_parameters() if parameter.requires_grad]
        assert values["grad_norm"] > 0 and all("lora_" in key or ".score." in key for key in learned)
        assert score(run / "model", file, "--out", out, "--image-root", folder) == 0
        scores = [json.loads(line) for line in out.read_text().splitlines()]
        margins = [one["chosen"] - one["rejected"] for one in scores]
        assert sum(margins) / 6 == pytest.approx(trainer.evaluate()["eval_margin"], abs=1e-6)
        assert not (run / "model" / "base" / "processor_config.json").exists()

    section = GRPOConfig(group_size=2, gen_max_seq_len=4, reward_model_checkpoint=str(run / "model"))
    policy = GRPOTrainer(train_config=asked(folder, tmp_path, grpo_config=section))
    assert policy.judge is not None and may_be_shown_images(policy.judge.model)
    assert policy.train()["grad_norm"] > 0


def test_ppo_learns_from_files_of_prompts_with_images(folder: Path, tmp_path: Path) -> None:
    """With a critic made of the policy, on its body, of a language model that sees, and of a reward model that does."""
    save_seeing_models(folder, tmp_path)

    def lengths(completions: list[str], **_: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    def values_of(**how: Any) -> tuple[Any, dict[str, float]]:
        section = PPOConfig(gen_max_seq_len=4, completions_per_prompt=2, kl_beta=0.0, **how)
        described = asked(folder, tmp_path, grpo_config=None, ppo_config=section)
        described.run_config.resume = "never"
        trainer = PPOTrainer(train_config=described, reward_in_process=True, reward_func=lengths)
        return trainer, trainer.train()

    critics = [{"value_model_checkpoint": str(tmp_path / name)} for name in ("language", "judge")]
    for how in ({}, {"critic_on_policy": True}, *critics):
        trainer, values = values_of(**how)
        assert values["grad_norm"] > 0 and values["loss/value_avg"] > 0, how
        frozen = [name for name, parameter in trainer.critic.named_parameters() if not parameter.requires_grad]
        heads = [name for name in frozen if "vision_tower.head." in name]  # no loss reaches them
        assert bool(heads) is (how == critics[0])
        assert len(frozen) == len(heads) + 2 and all("post_layernorm" in name for name in set(frozen) - set(heads))
        assert type(trainer.critic).__name__.startswith("LlavaFor")
    with pytest.raises(ValueError, match=r"value_model_checkpoint: the processor of .*other differs"):
        values_of(value_model_checkpoint=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="prompts show images, and the critic reads text alone"):
        values_of(value_model_checkpoint=str(tmp_path / "blind"))


def test_prompts_with_images_need_a_model_that_sees(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found an image|images"):
        GRPOTrainer(train_config=asked(folder, tmp_path, model_config=ModelConfig(**TEXT)), reward_func=len)


def test_a_class_of_the_user_says_that_its_forward_hands_on_images(folder: Path, tmp_path: Path) -> None:
    class Own(SFTTrainer):
        def _forward(self, batch: Any) -> Any:
            names = ("input_ids", "labels", "position_ids", "document_lengths")
            return self.model(**{name: batch[name] for name in names if name in batch})

    with pytest.raises(ValueError, match="its rows show images, and Own takes none yet"):
        Own(train_config=config(folder, tmp_path / "run"))


def test_judged_answers_and_teachers_show_their_images(folder: Path, tmp_path: Path) -> None:
    """KTO, whose mismatched rows show images too, and a teacher that sees what its student does."""
    rows = []
    for number, row in enumerate(PAIRS):
        asked = row["prompt"] if row["images"] else [{"role": "user", "content": "Hm"}]
        completion = {"completion": row["rejected"], "label": bool(number % 2), "images": row["images"]}
        rows.append({"prompt": asked} | completion)
    (tmp_path / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loader = DataLoaderConfig(cache_dir=str(tmp_path / "cache"), image_root=str(folder))
    changes: dict[str, Any] = {"sft_config": None, "kto_config": KTOConfig(), "data_loader_config": loader}
    described = config(folder, tmp_path / "kto", file_dataset=str(tmp_path / "judged.jsonl"), **changes)
    batch = first_batch(described, KTOTrainer)
    assert {"images", "kl_images"} <= batch.keys()
    assert KTOTrainer(train_config=described).train()["loss"] == pytest.approx(0.5, abs=1e-3)

    teacher = first_model(config(folder, tmp_path / "teacher"))
    trainer = SFTTrainer(train_config=config(folder, tmp_path / "student"), teacher_model=teacher)
    assert trainer.train()["kd_loss"] == pytest.approx(0.0, abs=1e-5)
