"""Stages of runs from configurations, and what the models that they save answer: for the tables of models that see."""

import contextlib
import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

AT_ONCE = 180  # questions of a forward
TAKEN = ("input_ids", "attention_mask", "pixel_values")  # by the model


class Eyes(NamedTuple):
    """A model, and what makes numbers of texts and images for it."""

    model: Any
    processor: Any  # of a model that reads: its tokenizer

    @classmethod
    def of(cls, run: Path) -> "Eyes":
        """What a run has saved, opened by transformers."""
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

        folder = run / "model"
        if "vision_config" not in json.loads((folder / "config.json").read_text()):
            return cls(AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder))
        return cls(AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder))

    @torch.no_grad()
    def answers(self, prompts: Sequence[str], images: Sequence[Sequence[Any]] | None = None) -> list[str]:
        """The most likely token behind each prompt, as text."""
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        tokenizer.padding_side = "left"
        said: list[str] = []
        for start in range(0, len(prompts), AT_ONCE):
            texts = list(prompts[start : start + AT_ONCE])
            how: dict[str, Any] = {"return_tensors": "pt", "padding": True}
            if images is None:
                made = tokenizer(texts, **how)
            else:
                shown = [list(one) for one in images[start : start + AT_ONCE]]
                made = self.processor(text=texts, images=shown, **how)
            inputs = {name: made[name] for name in TAKEN if name in made}
            best = self.model(**inputs).logits[:, -1].argmax(-1)
            said += [tokenizer.decode(token).strip() for token in best.tolist()]
        return said


def percent(said: Sequence[str], answers: Sequence[str]) -> float:
    """Of answers that are right."""
    return 100 * statistics.mean(one == other for one, other in zip(said, answers, strict=True))


def rows_file(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    """Write rows as .jsonl."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def described(save_dir: Path, data: str, steps: int, lr: float, batch_size: int, seed: int) -> dict[str, Any]:
    """What all stages have in common of their configurations: a cosine from `lr` to a tenth of it."""
    schedule = {"enable_lr_scheduler": True, "warmup_iters": 20, "cosine_annealing_period": steps}
    return {
        "file_dataset": data,
        "batch_size": batch_size,
        "n_epochs": 1000,
        "data_loader_config": {"cache_dir": str(save_dir.parent / "cache"), "image_root": str(save_dir.parent)},
        "optim_config": {"initial_lr": lr, "min_lr": lr / 10, "weight_decay": 0.0, **schedule},
        "run_config": {
            "save_dir": str(save_dir),
            "seed": seed,
            "max_steps": steps,
            "precision": "fp32",
            "device": "cpu",
            "progress": False,
            "log_interval": 100,
            "compile": False,
        },
    }


def trainer_of(values: dict[str, Any], name: str) -> Any:
    """The trainer of a configuration as a YAML file holds it."""
    from llm_trainer import SFTTrainer
    from llm_trainer.config.load import parse

    with contextlib.redirect_stdout(io.StringIO()):
        return SFTTrainer(train_config=parse(values, name))


def train(values: dict[str, Any], name: str) -> dict[str, Any]:
    """Run it, saying nothing; its last values."""
    trainer = trainer_of(values, name)
    with contextlib.redirect_stdout(io.StringIO()):
        return trainer.train()
