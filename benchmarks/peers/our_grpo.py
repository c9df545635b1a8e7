"""llm_trainer's `GRPOTrainer`: no option but what is learned, with the attention that configurations choose by themselves."""

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from grpo_work import LEARNING_RATE, MAX_GRAD_NORM, Clock, Job, share_even

from llm_trainer import GRPOTrainer, create_optimizer
from llm_trainer.data import rollout_making
from llm_trainer.data.rollout_store import RolloutFolder
from llm_trainer.data.rollout_supply import RolloutSupply
from llm_trainer.generation.in_process import InProcess
from llm_trainer.generation.verify import Hashes
from llm_trainer.models.attention import resolve_attention
from llm_trainer.train import loop
from llm_trainer.train.hooks import Hook, RunView
from llm_trainer.trainers.rollouts import RolloutMaker


class Prompts:
    """A rollout of prompts per batch; of given completions one of their rows."""

    def __init__(self, job: Job) -> None:
        self.job, self.rows = job, job.prompts()

    def __len__(self) -> int:
        return len(self.rows) // self.job.shape.prompts

    def __iter__(self) -> Any:
        job = self.job
        for first in range(0, len(self.rows), job.shape.prompts):
            prompts = torch.tensor(self.rows[first : first + job.shape.prompts])
            if not job.given:
                yield {"prompts": prompts}
                continue
            completions = job.completions()
            rewards = torch.tensor(share_even(completions))
            responses = torch.tensor(completions)
            yield {
                "prompts": prompts.repeat_interleave(job.shape.group, 0),
                "responses": responses,
                "response_attention_mask": torch.ones_like(responses),
                "rewards": rewards,
            }


def watch(clock: Clock) -> None:
    """Count what a step consists of."""

    def num_written(written: list[Any]) -> int:
        return sum(len(one.completion.ids) for one in written)

    clock.watch_sampling(RolloutMaker, "_drawn", num_written)
    clock.watch(RolloutMaker, "_judged", "reward")
    clock.watch(RolloutMaker, "begin", "sync")
    clock.watch(RolloutMaker, "finish", "score")
    clock.watch(RolloutSupply, "_made_of", "checks")
    clock.watch(Hashes, "note", "checks")
    clock.watch(InProcess, "held", "checks")
    clock.watch(InProcess, "logprobs", "checks")  # of the probe, by both
    clock.watch(GRPOTrainer, "_probe_logprobs", "checks")
    for method in ("find", "set_aside", "prune", "begin", "write_part", "join", "finish"):
        clock.watch(RolloutFolder, method, "checks")
    for function in ("checked", "account"):
        clock.watch(rollout_making, function, "checks")
    clock.watch(loop, "train_step", "learn")


def main() -> None:
    """Train one job."""
    job = Job.from_argv()
    clock, model = Clock(job), job.model()
    watch(clock)
    model.set_attn_implementation(resolve_attention("auto", "cpu"))

    def after_step(run: RunView) -> None:
        clock.tick()
        if clock.is_done:
            run.stop("measured")

    options: dict[str, Any] = {} if job.given else {"reward_func": share_even}
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        trainer = GRPOTrainer(
            model=model,
            optimizer=create_optimizer(model.parameters(), "adamw", lr=LEARNING_RATE, weight_decay=0.0),
            train_loader=Prompts(job),
            tokenizer=job.tokenizer(),
            stop_token_ids=tuple(job.shape.stops),
            num_samples_per_prompt=job.shape.group,
            gen_max_seq_len=job.shape.new,
            max_epochs=1,
            max_grad_norm=MAX_GRAD_NORM,
            precision=job.precision,
            log_interval=1,
            progress=False,
            save_dir=folder,
            save_interval=0,
            hooks=[Hook("clock", after_step, every_steps=1)],
            **options,
        )
        with contextlib.redirect_stdout(nowhere):
            trainer.train()
        lines = (Path(folder) / "log" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    clock.report([row for row in map(json.loads, lines) if "loss" in row])


if __name__ == "__main__":  # reward functions run in processes of their own
    main()
