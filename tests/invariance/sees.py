"""A run of a model that sees, from files: it answers prompts with images while it is trained, on any engine.

The model is a LLaVA-Next, whose parameter between the rows of an image lies in no layer: it is read before any forward of the
module that has it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

NEWLINE = "model.image_newline"
PROMPTS = ["<image>?", "<image><image>?", "?"]


def make_files(folder: Path) -> None:
    """A model with its processor, pictures, and rows that show none, one and two."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    from vision_data import PROCESSORS, file_of, picture

    folder.mkdir()
    processor = PROCESSORS["llava_next"]()
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    tokens = {name: getattr(processor.tokenizer, name) for name in ("pad_token_id", "eos_token_id")}
    text = LlamaConfig(
        **shape,
        **tokens,
        num_hidden_layers=1,
        vocab_size=len(processor.tokenizer),
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=None,
    )
    tower = CLIPVisionConfig(**shape, num_hidden_layers=2, image_size=16, patch_size=4, projection_dim=16)
    torch.manual_seed(0)
    config = LlavaNextConfig(
        text_config=text,
        vision_config=tower,
        image_token_index=processor.image_token_id,
        image_grid_pinpoints=processor.image_processor.image_grid_pinpoints,
        tie_word_embeddings=False,
    )
    LlavaNextForConditionalGeneration(config).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    rows = []
    for number in range(8):
        (folder / f"{number}.png").write_bytes(file_of(picture(20 + 8 * number, 30, seed=number)))
        count = number % 3
        turns = [
            {"role": "user", "content": "<image>?" * count or "?"},
            {"role": "assistant", "content": "A cat." if number % 2 else "Two dogs."},
        ]
        rows.append({"messages": turns, "images": [f"{(number + one) % 8}.png" for one in range(count)]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def asked(engine: str, ranks: int, folder: Path, save_dir: Path) -> dict[str, Any]:
    """Losses and gradient norms of two steps, what is answered after them, and the parameter between rows.

    Args:
        engine: 'torch', 'fsdp' or 'zero3'.
        ranks: processes.
        folder: with the files of `make_files`.
        save_dir: of the run.
    """
    from llm_trainer import SFTTrainer
    from llm_trainer.engine import dist
    from llm_trainer.train.hooks import Hook
    from llm_trainer.train_configs import (
        DataLoaderConfig,
        DsConfig,
        DsZero3Config,
        EvalConfig,
        OptimConfig,
        RunConfig,
        SFTConfig,
        TrainConfig,
    )

    quiet: dict[str, Any] = {"precision": "fp32", "progress": False, "log_interval": 1, "compile": False}
    more: dict[str, Any] = {"run_config": RunConfig(save_dir=str(save_dir), **quiet)}
    if engine == "zero3":
        more["run_config"] = RunConfig(save_dir=str(save_dir), engine="deepspeed", **quiet)
        more["ds_config"] = DsConfig(zero_config=DsZero3Config())
    elif engine == "fsdp":
        more["run_config"] = RunConfig(save_dir=str(save_dir), engine="fsdp", **quiet)
    curve: list[list[float]] = []
    hook = Hook("watch", lambda run: curve.append([run.values["loss"], run.values["grad_norm"]]), every_steps=1)
    described = TrainConfig(
        model_config=str(folder / "model"),
        tokenizer=str(folder / "model"),
        file_dataset=str(folder / "rows.jsonl"),
        n_epochs=2,
        batch_size=8 // ranks,
        eval_prompts=PROMPTS,
        eval_image_tags=[str(folder / "0.png"), [str(folder / "1.png"), str(folder / "2.png")], []],
        eval_config=EvalConfig(max_seq_len=6, temperature=0.0),
        optim_config=OptimConfig(initial_lr=1e-2),
        sft_config=SFTConfig(),
        data_loader_config=DataLoaderConfig(cache_dir=str(folder / "cache"), data_loader_shuffle=False),
        **more,
    )
    trainer = SFTTrainer(train_config=described, hooks=[hook])
    before = {name: value.clone() for name, value in trainer.run.engine.stream_weights()}[NEWLINE]
    trainer.train()
    after = {name: value.clone() for name, value in trainer.run.engine.stream_weights()}[NEWLINE]
    report = {"curve": curve, "moved": (after - before).tolist()}
    if dist.is_main():
        lines = (save_dir / "log" / "gen.txt").read_text(encoding="utf-8").splitlines()
        report["answers"] = [line.partition(" step=")[2] for line in lines]
    return report
