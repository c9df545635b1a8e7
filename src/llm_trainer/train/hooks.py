"""What happens every n steps or epochs besides training: log, evaluate, sample, save. A hook is a function."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from llm_trainer.engine import dist
from llm_trainer.train.loop import validate

if TYPE_CHECKING:
    from llm_trainer.train.run import Run


@dataclass(frozen=True)
class Hook:
    """A function that the loop calls, at most once per step count unless `when` asks for more.

    Attributes:
        name: under which the run remembers when it was called last.
        call: what is called, on every rank.
        every_steps: after each n-th optimizer step; None: not by steps.
        every_epochs: after each n-th epoch; None: not by epochs.
        at_end: also after the last step.
        when: a further reason to call it, even again at the same step.
    """

    name: str
    call: Callable[["Run"], None]
    every_steps: int | None = None
    every_epochs: int | None = None
    at_end: bool = False
    when: Callable[["Run"], bool] | None = None

    def is_due(self, run: "Run") -> bool:
        """Whether it is to be called where the run stands now."""
        progress = run.progress
        if self.when is not None and self.when(run):
            return True
        if progress.hooks_done.get(self.name) == progress.step:
            return False
        by_steps = self.every_steps is not None and progress.step > 0 and progress.step % self.every_steps == 0
        at_epoch_end = progress.position == 0 and progress.epoch > 0
        by_epochs = bool(self.every_epochs) and at_epoch_end and progress.epoch % (self.every_epochs or 1) == 0
        at_end = self.at_end and run.finished()
        return by_steps or by_epochs or at_end


def built_in(run: "Run", log_interval: int, save_interval: int) -> list[Hook]:
    """The hooks of every run, in the order in which they are called."""
    settings = run.settings
    by_epoch = 1 if settings.eval_interval is None else None
    hooks = [Hook("log", log, every_steps=log_interval, at_end=True)]
    if run.val_sources:
        hooks.append(Hook("evaluate", evaluate, settings.eval_interval, by_epoch, at_end=True))
    if run.trainer.eval_prompts:
        hooks.append(Hook("sample", sample, settings.eval_interval, by_epoch, at_end=True))
    every_epochs = save_interval if settings.save_interval_steps is None else None
    save_hook = Hook("save", save, settings.save_interval_steps, every_epochs, True, when=lambda run: run.new_best)
    return [*hooks, save_hook]


def log(run: "Run") -> None:
    """Write the metrics since the last call."""
    values = run.metrics.reduce(dist.all_reduce)
    if values:
        run.write(values | run.speed())


def evaluate(run: "Run") -> None:
    """Evaluate; remember the best, lower a plateau schedule, stop early after too many evaluations without progress."""
    with run.pause_clock():
        values = validate(run)
    if run.stop_requested:
        run.progress.hooks_done.pop("evaluate", None)  # cut short by a signal: a resumed run evaluates again
        return
    run.write(values)
    progress, settings, loss = run.progress, run.settings, values.get("eval_loss", math.nan)
    best = math.inf if progress.best_loss is None else progress.best_loss
    if loss < best - settings.early_stopping_min_delta:
        progress.best_loss, progress.best_step, progress.evals_without_progress = loss, progress.step, 0
        run.new_best = True
    else:
        progress.evals_without_progress += 1
    run.observe_loss(loss)
    patience = settings.early_stopping_patience
    if patience is not None and progress.evals_without_progress >= patience:
        progress.stopped_early = True
        run.say(
            f"stopped early: {patience} evaluations without progress, best eval_loss {progress.best_loss} at step "
            f"{progress.best_step}"
        )


def sample(run: "Run") -> None:
    """Answer `eval_prompts` with the model as it is now; in lockstep all ranks give the same answers."""
    if run.stop_requested or not (dist.is_main() or run.engine.in_lockstep):
        return
    from llm_trainer.data.encode.chat import ChatFormat
    from llm_trainer.generation.sampler import generate

    trainer, how = run.trainer, run.settings.sampling
    chat = ChatFormat(trainer.tokenizer)
    prompts = [run.encode_prompt(chat, text) for text in trainer.eval_prompts]
    with run.pause_clock(), torch.no_grad(), run.engine.inference():
        answers = generate(
            trainer.base_model,
            prompts,
            max_new_tokens=how.max_seq_len,
            temperature=how.temperature,
            top_k=how.top_k,
            top_p=how.top_p,
            stop_token_ids=chat.stop_token_ids(),
            pad_token_id=trainer.tokenizer.pad_token_id,
            seed=run.settings.seed,
        )
    for prompt, ids in zip(trainer.eval_prompts, answers.ids, strict=True):
        run.say(f"[step {run.progress.step}] {prompt!r} -> {trainer.tokenizer.decode(ids, skip_special_tokens=True)!r}")


def save(run: "Run") -> None:
    """Save a checkpoint; a disk that is full now is reported and tried again at the next turn, except at the end."""
    with run.pause_clock():
        run.save(is_best=run.new_best, may_fail=not run.finished())
