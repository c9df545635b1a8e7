"""Tiny trained models of every kind that is exported: each is a run's folder, with what it answered in training."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llm_trainer import AdapterConfig, SFTTrainer, adapt
from llm_trainer.checkpoint import write_model
from llm_trainer.config.model import ModelConfig, MoeConfig
from llm_trainer.config.quantization import QuantizationConfig
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.templates import default_template
from llm_trainer.data.encode.tokenizer import load_tokenizer
from llm_trainer.models.build import build_model, set_stops
from llm_trainer.models.quantized_loading import loading_options
from llm_trainer.models.vocabulary import extend_rows, extend_tokenizer, num_ids

MOE = MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
PROJECTIONS = ["q_proj", "v_proj", "down_proj"]


def shape(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 96,
        "initializer_range": 0.15,  # logits that differ, and attention that is not uniform
    }
    return ModelConfig(**(values | changes))


class Made:
    """Makes each model once.

    Args:
        folder: where their runs are.
        tokenizer: a folder.
    """

    def __init__(self, folder: Path, tokenizer: Path) -> None:
        self.folder, self._tokenizer = folder, tokenizer

    def run(self, kind: str) -> Path:
        """The folder of the run of one of `KINDS`."""
        run = self.folder / kind
        if not run.exists():
            torch.manual_seed(3)
            KINDS[kind](self, run)
        return run

    def tokenizer(self) -> Any:
        tokenizer = load_tokenizer(self._tokenizer)
        tokenizer.chat_template = default_template(tokenizer)
        return tokenizer

    def base(self, **changes: Any) -> Path:
        """The folder of a model that adapters are put on."""
        name = "-".join(["base", *(f"{key}-{value}" for key, value in changes.items() if key != "moe")])
        folder = self.folder / "bases" / name
        if not folder.exists():
            torch.manual_seed(1)
            model = build_model(shape(**changes))
            set_stops(model, ChatFormat(self.tokenizer()).stop_token_ids(), None)
            write_model(model, folder, self.tokenizer())
            (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nA base.\n")
        return folder

    def train(self, model: Any, run: Path, tokenizer: Any = None, steps: int = 2, **options: Any) -> None:
        """Two steps, large enough to be seen."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        batches = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 512, (steps, 2, 12))]
        values: dict[str, Any] = {
            "optimizer": torch.optim.AdamW(parameters, lr=1e-2),
            "train_loader": batches,
            "max_epochs": 1,
            "device": "cpu",
            "use_amp": False,
            "save_interval": 0,
            "progress": False,
            "save_dir": str(run),
            "tokenizer": tokenizer or self.tokenizer(),
        }
        SFTTrainer(model=model, **(values | options)).train()

    def whole(self, run: Path, **changes: Any) -> None:
        model = build_model(shape(**changes))
        set_stops(model, ChatFormat(self.tokenizer()).stop_token_ids(), None)
        self.train(model, run)

    def adapted(self, run: Path, base: Path | None = None, **config: Any) -> None:
        model = build_model(str(base or self.base()), dtype=config.pop("dtype", torch.float32))
        values = {"rank": 4, "target": PROJECTIONS} | config
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tied heads
            adapted = adapt(model, AdapterConfig(**values))
            self.train(adapted, run)

    def quantized(self, run: Path) -> None:
        base = self.base()
        how = loading_options(QuantizationConfig(), base, torch.device("cpu"), torch.float32)
        self.train(adapt(build_model(str(base), options=how), AdapterConfig(rank=4)), run)

    def with_new_tokens(self, run: Path) -> None:
        tokenizer = self.tokenizer()
        model = build_model(str(self.base()))
        pieces = extend_tokenizer(tokenizer, ["<new>"], ["<|special|>"])
        extend_rows(model, pieces, num_ids(tokenizer), None)
        self.train(model, run, tokenizer)

    def by_peft(self, run: Path, second: list[str] | None = None, **options: Any) -> None:
        """As peft makes them, which puts adapters on tied heads too."""
        import peft

        model = build_model(str(self.base()))
        values = {"r": 2, "init_lora_weights": False, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | options
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted: Any = peft.get_peft_model(model, peft.LoraConfig(**values))
            if second is not None:
                adapted.add_adapter("second", peft.LoraConfig(**(values | {"target_modules": second})))
                adapted.base_model.set_adapter(["default", "second"])
            self.train(adapted, run)

    def on_new_rows(self, run: Path) -> None:
        tokenizer = self.tokenizer()
        model = build_model(str(self.base()))
        extend_rows(model, extend_tokenizer(tokenizer, ["<new>"], []), num_ids(tokenizer), None)
        self.train(adapt(model, AdapterConfig(rank=4, target=PROJECTIONS)), run, tokenizer)

    def with_a_norm(self, run: Path) -> None:
        adapted = adapt(build_model(str(self.base())), AdapterConfig(rank=4, target=PROJECTIONS))
        adapted.get_base_model().model.norm.requires_grad_(True)
        self.train(adapted, run)


KINDS: dict[str, Callable[[Made, Path], None]] = {
    "dense": lambda made, run: made.whole(run),
    "untied": lambda made, run: made.whole(run, tie_word_embeddings=False),
    "llama": lambda made, run: made.whole(run, architecture="llama", head_dim=16),
    "moe": lambda made, run: made.whole(run, architecture="qwen3_moe", moe=MOE),
    "new tokens": lambda made, run: made.with_new_tokens(run),
    "lora": lambda made, run: made.adapted(run),
    "rslora": lambda made, run: made.adapted(run, rslora=True),
    "dora": lambda made, run: made.adapted(run, dora=True),
    "pissa": lambda made, run: made.adapted(run, init="pissa"),
    "rs-pissa": lambda made, run: made.adapted(run, init="pissa", rslora=True),
    "olora": lambda made, run: made.adapted(run, init="olora"),
    "lora-ga": lambda made, run: made.adapted(run, init="lora_ga"),
    "qlora": lambda made, run: made.quantized(run),
    "lora on the head": lambda made, run: made.by_peft(run, target_modules=["q_proj", "lm_head"]),
    "saved head": lambda made, run: made.by_peft(run, modules_to_save=["lm_head"]),
    "lora on new rows": lambda made, run: made.on_new_rows(run),
    "a norm too": lambda made, run: made.with_a_norm(run),
    "a few tokens": lambda made, run: made.by_peft(run, trainable_token_indices={"embed_tokens": [30, 40]}),
    "two adapters": lambda made, run: made.by_peft(run, second=["o_proj", "q_proj"]),
    "lora of llama": lambda made, run: made.adapted(run, made.base(architecture="llama")),
    "lora of an untied model": lambda made, run: made.adapted(
        run, made.base(tie_word_embeddings=False), target=["q_proj", "lm_head", "embed_tokens"]
    ),
    "lora in bf16": lambda made, run: made.adapted(run, dtype=torch.bfloat16),
    "experts": lambda made, run: made.adapted(
        run, made.base(architecture="qwen3_moe", moe=MOE), target=["q_proj"], experts=True
    ),
}
