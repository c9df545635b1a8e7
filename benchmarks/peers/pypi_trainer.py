"""The PyPI package `project_llm_trainer` with its own model, started from the same weights (fp32: its CPU path has no bf16).

Its import name is `llm_trainer` too, so this file must only run in the environment made for it.
"""

# mypy: ignore-errors
# (a type checker outside that environment would see our package under its name)

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from workload import LEARNING_RATE, MAX_GRAD_NORM, SHAPE, Job, Meter

RENAMED = {  # transformers' parameter names -> those of project_llm_model
    "model.norm.": "head_norm.",
    "model.": "",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attn": "attn",
}


def write_weights(job: Job, path: Path) -> None:
    """The initial weights under the names of project_llm_model."""
    from safetensors.torch import load_file

    state = {}
    for name, tensor in load_file(job.weights / "model.safetensors").items():
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        state[name] = tensor
    state["lm_head.weight"] = state["embed_tokens.weight"]  # tied
    torch.save(state, path)


def train(job: Job, folder: Path) -> None:
    """Pretraining over one flat array of ids, cut into blocks as long as the rows."""
    from llm_model import ModelConfig, RoPEConfig
    from llm_trainer.tools import FileDataset

    from llm_trainer import Trainer
    from llm_trainer.train_configs import OptimConfig, PretrainConfig, TrainConfig

    ids = np.concatenate([row["input_ids"] for row in job.rows()[: job.total_steps * job.rows_per_micro_batch]])
    np.save(folder / "ids.npy", ids)
    write_weights(job, folder / "weights.pt")

    class Files(FileDataset):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> str:
            return str(folder / "ids.npy")

    shape = {name: value for name, value in SHAPE.items() if name != "rms_norm_eps"}
    config = TrainConfig(
        n_epochs=1,
        batch_size=job.rows_per_micro_batch,
        model_config=ModelConfig(
            vocab_size=job.vocabulary,
            norm_eps=SHAPE["rms_norm_eps"],
            use_qk_norm=True,
            rope_config=RoPEConfig(rope_theta=10000.0),
            **shape,
        ),
        init_weights_path=str(folder / "weights.pt"),
        file_dataset=Files(),
        dataset_block_size=512,
        optim_config=OptimConfig(initial_lr=LEARNING_RATE, weight_decay=0.0),
        save_interval=0,
        eval_interval=0,
        gradient_clipping=MAX_GRAD_NORM,
        pretrain_config=PretrainConfig(),
    )
    meter, losses = Meter(job), []

    class Timed(Trainer):
        def _log(self, keys: dict[str, Any], values: dict[str, Any]) -> None:
            losses.append(values["loss/total"])
            meter.tick()

    trainer = Timed(train_config=config, eval_prompts=[])
    meter.watch(trainer.train_model)
    trainer.train()
    meter.report(losses)


def main() -> None:
    """Train one job in a folder that is thrown away."""
    job = Job.from_argv()
    with tempfile.TemporaryDirectory() as folder:
        places = dict.fromkeys(("LOG_DIR", "DIST_CHECKPOINT_DIR", "CHECKPOINT_DIR"), folder)
        os.environ.update(TOKEN_DIR=job.folder, PARALLEL_TYPE="none", COMPUTE_DTYPE="fp32", **places)
        train(job, Path(folder))


main()
