"""The first of three ways to train a run.yaml: a loop written by hand, for research, that needs little memory.

    python examples/three_ways/train_low_mem.py run.yaml [a.b=c ...] [--state 8bit|host]

Everything that happens in a step stands in `Loop.backward` and `Loop.update`: the place to try an idea. What saves memory:
- tokens stay on disk (memory-mapped), a batch is read when its turn comes;
- the head runs in chunks, so logits `[B, T, V]` never exist (`models/scored.py`);
- activations are recomputed in the backward;
- `--state 8bit`: Adam's two moments take a byte each instead of four (bitsandbytes; the default where it is installed);
- `--state host`: on a GPU, moments, gradients and the weights that are updated live in host memory. The device holds a
  working copy of the weights, 4 bytes per parameter instead of 16, and the numbers are those of `llm-trainer train`.

Several processes (`accelerate launch`, `torchrun`) share the rows of a step. `eval_dataset` is evaluated every
`eval_batch_interval` steps, and the same command again goes on from `save_dir`/low_mem.pt, to the same numbers. What is left
out: sample answers, early stopping, and the best model.
"""

import argparse
import copy
import sys
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from llm_trainer.assemble import make_optimizer, make_scheduler
from llm_trainer.builder.objects import Builder
from llm_trainer.checkpoint import load_checkpoint, save_checkpoint
from llm_trainer.config.errors import ConfigError
from llm_trainer.config.load import load_config
from llm_trainer.config.schema import TrainConfig
from llm_trainer.data.stream import mix_seeds
from llm_trainer.engine.device import choose_precision, detect_device
from llm_trainer.losses.experts import balance_loss, shares_of
from llm_trainer.losses.language import weight_sum
from llm_trainer.models.experts import experts_of, is_balanced_by_a_bias
from llm_trainer.models.scored import TokenScores, scored
from llm_trainer.optim.multipliers import multiplied, rate_of_run
from llm_trainer.optim.optimizers import OPTIMIZERS, get_parameter_groups
from llm_trainer.train.writers import open_writers
from llm_trainer.trainers.language import SFTTrainer, Trainer, language_loss


def working_copy(kept: nn.Module, device: torch.device) -> nn.Module:
    """A copy of `kept` on `device`, each of whose gradients moves to `kept` as soon as it has been computed."""
    working = copy.deepcopy(kept).to(device)
    for target, source in zip(kept.parameters(), working.parameters(), strict=True):
        if source.requires_grad:

            def hand_over(source: Tensor, target: Tensor = target) -> None:
                assert source.grad is not None
                gradient = source.grad.cpu()
                target.grad = gradient if target.grad is None else target.grad + gradient
                source.grad = None

            source.register_post_accumulate_grad_hook(hand_over)
    return working


def eight_bit_adamw(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW whose moments take 8 bits each (Dettmers et al. 2022, arXiv 2110.02861)."""
    from bitsandbytes.optim import AdamW8bit

    options = config.optim_config
    if options.optim_type not in ("adam", "adamw"):
        raise ConfigError(
            f"optim_config.optim_type: got {options.optim_type!r}, but 8-bit state is Adam's; use --state host"
        )
    own = OPTIMIZERS["adamw"]
    decay = own.weight_decay if options.weight_decay is None else options.weight_decay
    groups = multiplied(get_parameter_groups(model, decay), model, options.initial_lr, options.lr_multipliers)
    return AdamW8bit(groups, lr=options.initial_lr, betas=options.betas or own.betas, eps=options.eps)


def read_arguments() -> tuple[TrainConfig, str]:
    """The run, and where the optimizer's state is kept."""
    parser = argparse.ArgumentParser(description="Train a run.yaml with a hand-written loop and little memory.")
    parser.add_argument("run", type=Path, help="the YAML of a run with a pretrain_config or an sft_config")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="changes to it")
    default = "8bit" if find_spec("bitsandbytes") else "host"
    parser.add_argument("--state", choices=["8bit", "host"], default=default, help="where moments are kept")
    given = parser.parse_intermixed_args()
    config = load_config(given.run, given.overrides)
    if config.pretrain_config is None and config.sft_config is None:
        parser.exit(69, f"{given.run}: this loop trains a pretrain_config or an sft_config\n")  # EX_UNAVAILABLE
    return config, given.state


class Loop:
    """The weights that are updated (`kept`), the copy that the device computes with (`working`), and what moves them."""

    def __init__(self, config: TrainConfig, state: str) -> None:
        run = config.run_config
        device = detect_device(run.device)
        precision = choose_precision(run.precision, device)
        if precision == "fp16":
            raise ConfigError(
                "run_config.precision: fp16 needs a loss scaler, which this loop has not; use bf16 or fp32"
            )
        self.config = config
        # Under torchrun without a GPU, accelerate joins the processes only when it is told `cpu`.
        self.accelerator = Accelerator(
            mixed_precision="no" if precision == "fp32" else precision, cpu=device.type == "cpu"
        )
        self.device = self.accelerator.device
        build = Builder(config, SFTTrainer if config.sft_config else Trainer)
        self.tokenizer, self.kept = build.tokenizer, build.policy
        options = config.loss_config
        if experts_of(self.kept) and (options.aux_loss_scope != "micro_batch" or options.router_z_loss_coef):
            raise ConfigError(
                f"loss_config.aux_loss_scope: got {options.aux_loss_scope}, but this loop balances the experts of each "
                f"micro-batch alone, without a z-loss; expected micro_batch, or use the command `llm-trainer train`"
            )
        if is_balanced_by_a_bias(self.kept) and options.bias_update_speed != 0:
            raise ConfigError(
                f"loss_config.bias_update_speed: got {options.bias_update_speed}, but this loop does not move the biases of "
                f"routers; expected 0, or use the command `llm-trainer train`"
            )
        self.kept.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.stream, *_ = build.streams
        self.evaluation = build.evaluation
        if state == "8bit":
            self.working = self.kept.to(self.device)
            self.optimizer = eight_bit_adamw(config, self.kept)
        else:
            self.working = self.kept if device.type == "cpu" else working_copy(self.kept, self.device)
            self.optimizer = make_optimizer(config, self.kept)
        self.model = scored(self.working, language_loss(config.loss_config), with_entropy=False).train()
        every = self.stream.num_steps() * config.n_epochs
        self.num_steps = min(every, run.max_steps or every)
        self.scheduler = make_scheduler(config, self.optimizer, self.num_steps)
        self.file = Path(run.save_dir) / "low_mem.pt"
        self.step = self.epoch = self.position = 0  # where the run stands: steps, epochs, and samples of this epoch

    def backward(self, batches: list[dict[str, Tensor]]) -> tuple[Tensor, float]:
        """Gradients of a step: its loss, scalar, and the number of its tokens, both over all processes.

        The loss is a mean over ALL supervised tokens of the step: micro-batches and processes only share the work.
        """
        weights = [weight_of(batch) for batch in batches]
        seen = [
            int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["labels"].numel()
            for batch in batches
        ]
        counts = torch.tensor([sum(weights), float(sum(seen))], dtype=torch.float64).to(self.device)
        total, tokens = self.accelerator.reduce(counts).tolist()
        total = total or 1.0  # nothing to learn: 0, not 0 / 0
        step_loss = torch.zeros((), device=self.device)
        for batch, weight in zip(batches, weights, strict=True):
            scores = self.scores(batch)
            loss = scores.loss_sum / total
            if experts_of(self.kept) and scores.routing is not None:  # each micro-batch balanced alone
                shares = shares_of(scores.routing.assigned, self.kept.config.num_experts_per_tok)
                balance = balance_loss(scores.routing, shares)
                loss = loss + self.config.loss_config.aux_loss_coef * balance * (weight / total)
            self.accelerator.backward(loss)
            step_loss += loss.detach()
        return self.accelerator.reduce(step_loss), tokens

    def scores(self, batch: Mapping[str, Tensor]) -> TokenScores:
        """What the model says about the labels of a batch."""
        with self.accelerator.autocast():
            return self.model(**{name: value.to(self.device) for name, value in batch.items()})

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """`eval_loss`, the mean over all supervised tokens of the evaluation data, over all processes."""
        sums = torch.zeros(2, device=self.device)  # of losses, and of what they are a mean of
        self.model.eval()
        for stream in self.evaluation.values():
            for batches, _ in stream.steps(0):
                for batch in (each.batch for each in batches if each.counts):
                    sums[0] += self.scores(batch).loss_sum
                    sums[1] += weight_of(batch)
        self.model.train()
        loss_sum, count = self.accelerator.reduce(sums).tolist()
        return {"eval_loss": loss_sum / count} if count else {}

    def update(self) -> float:
        """Sum the gradients of all processes, clip, update; returns the norm before clipping."""
        trained = [p for p in self.kept.parameters() if p.requires_grad]
        if self.accelerator.num_processes > 1:
            for p in trained:  # one at a time on the device
                gradient = torch.zeros_like(p) if p.grad is None else p.grad
                p.grad = self.accelerator.reduce(gradient.to(self.device)).to(p.device)
        grad_norm = nn.utils.clip_grad_norm_(trained, self.config.optim_config.max_grad_norm or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()
        self.refresh()
        return float(grad_norm)

    @torch.no_grad()
    def refresh(self) -> None:
        """Let the device compute with the weights as they are now."""
        if self.working is self.kept:
            return
        for source, target in zip(self.kept.parameters(), self.working.parameters(), strict=True):
            target.copy_(source)

    def save(self) -> None:
        """Write all that the rest of the run depends on; the noise of a step follows from its number."""
        if self.accelerator.is_main_process:
            parts: dict[str, Any] = {"optimizer": self.optimizer, "scheduler": self.scheduler}
            where = {"step": self.step, "epoch": self.epoch, "position": self.position}
            save_checkpoint(self.file, model=self.kept, **(parts | where))
        self.accelerator.wait_for_everyone()

    def go_on(self) -> None:
        """Stand where the run was saved, if `run_config.resume` wants that and it was."""
        wanted = self.config.run_config.resume
        file = self.file if wanted == "auto" else Path(wanted)
        if wanted == "never" or (wanted == "auto" and not file.exists()):
            return
        where = load_checkpoint(file, model=self.kept, optimizer=self.optimizer, scheduler=self.scheduler)
        self.step, self.epoch, self.position = where["step"], where["epoch"], where["position"]
        self.refresh()


def weight_of(batch: Mapping[str, Tensor]) -> float:
    """What the loss of a batch is a mean of: its supervised tokens, or the sum of their weights."""
    return float(weight_sum(batch["labels"], batch.get("loss_weights")))


def train(loop: Loop, writers: list[Any]) -> None:
    """Take all steps that are left."""
    run, every = loop.config.run_config, loop.config.eval_config.eval_batch_interval
    while loop.step < loop.num_steps:
        for batches, position in loop.stream.steps(loop.epoch, loop.position):
            # 1. one step; dropout is the same when it is run again
            torch.manual_seed(mix_seeds(run.seed, loop.step, loop.accelerator.process_index))
            started, learning_rate = time.perf_counter(), rate_of_run(loop.optimizer)
            loss, tokens = loop.backward([batch.batch for batch in batches if batch.counts])
            values = {"loss": loss.item(), "grad_norm": loop.update(), "learning_rate": learning_rate}
            values["tokens_per_second"] = tokens / (time.perf_counter() - started)
            loop.step, loop.position = loop.step + 1, position

            # 2. once in a while: evaluate, save
            is_last = loop.step == loop.num_steps
            if loop.evaluation and (is_last or loop.step % every == 0):
                values |= loop.evaluate()
            for writer in writers:
                writer.write(loop.step, values)
            if is_last or (run.save_interval_steps and loop.step % run.save_interval_steps == 0):
                loop.save()
            if is_last:
                return
        loop.epoch, loop.position = loop.epoch + 1, 0
        if run.save_interval_steps is None:
            loop.save()


def main() -> None:
    """Train to the end and save a Hugging Face folder."""
    config, state = read_arguments()
    disable_progress_bar()  # of saving; the run has its own
    run, loop = config.run_config, Loop(config, state)
    loop.go_on()
    is_main = loop.accelerator.is_main_process
    last_step = loop.step or -1  # lines of steps that will be taken again are dropped
    writers = open_writers(
        Path(run.log_folder), is_main=is_main, total_steps=loop.num_steps, last_step=last_step, live=run.progress
    )
    train(loop, writers)
    for writer in writers:
        writer.close()
    if is_main:
        loop.kept.save_pretrained(Path(run.save_dir) / "model")
        loop.tokenizer.save_pretrained(Path(run.save_dir) / "model")
    loop.accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # something that the user can mend
        sys.exit(f"error: {error}")
