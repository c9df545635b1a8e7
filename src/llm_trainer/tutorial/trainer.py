"""Lesson 4: the training loop.

Shapes: B rows of a micro-batch, T positions, V entries of the vocabulary. One *step* is one update of the parameters;
its batch may be too large for memory, so it is cut into `grad_accum_steps` *micro-batches* whose gradients add up.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from inspect import signature
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .loss import IGNORED, cross_entropy_sum
from .optimizers import AdamWFromScratch, SGDFromScratch
from .schedule import warmup_cosine

Batch = Mapping[str, Tensor]


class TrainerFromScratch:
    """Trains a causal language model.

    A batch is a dict with `input_ids [B, T]`, `labels [B, T]` (-100: nothing is learned; shifted in here) and maybe
    `attention_mask [B, T]`. The model returns logits `[B, T, V]` as a tensor, as `.logits` or under `"logits"`.

    Args:
        model: what is trained.
        optimizer: one of the optimizers of lesson 2; its learning rate is the peak.
        train_loader: an iterable of batches. A `DataLoader` that shuffles must draw from torch's global generator
            (leave its `generator` unset), which this trainer seeds and saves.
        val_loader: batches on which the model is judged after each epoch.
        device: `None`: the GPU if there is one.
        max_epochs: passes over the data.
        grad_accum_steps: micro-batches of one step.
        max_grad_norm: longest gradient; 0 or None: any.
        use_amp: mixed precision: matrix products in `amp_dtype`, parameters and sums in float32.
        amp_dtype: bfloat16 (the range of float32), or float16 (which needs loss scaling).
        warmup_steps: steps of the learning rate's way up.
        total_steps: the step at which it has come down to `min_lr`; `None`: it stays up.
        min_lr: the last learning rate.
        log_interval: steps between two printed lines; 0: silence.
        save_dir: folder for `latest.pt` (after each epoch) and `best.pt`.
        save_interval: steps between two more `latest.pt`; 0: none.
        seed: of the order of the data.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: AdamWFromScratch | SGDFromScratch,
        train_loader: Iterable[Batch],
        val_loader: Iterable[Batch] | None = None,
        device: str | torch.device | None = None,
        max_epochs: int = 1,
        grad_accum_steps: int = 1,
        max_grad_norm: float | None = 1.0,
        use_amp: bool = False,
        amp_dtype: torch.dtype = torch.bfloat16,
        warmup_steps: int = 0,
        total_steps: int | None = None,
        min_lr: float = 0.0,
        log_interval: int = 10,
        save_dir: str | Path | None = None,
        save_interval: int = 0,
        seed: int = 0,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.to(self.device)
        # Padding on the right is seen by nothing before it, so a causal model that takes no mask needs none.
        accepted = signature(model.forward).parameters
        self.takes_mask = "attention_mask" in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values())
        self.optimizer = optimizer
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.max_epochs = max_epochs
        self.grad_accum_steps = grad_accum_steps
        self.max_grad_norm = max_grad_norm or 0.0
        self.use_amp = use_amp
        self.amp_dtype = amp_dtype
        self.peak_lr = optimizer.get_lr()
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.min_lr = min_lr
        self.log_interval = log_interval
        self.save_dir = Path(save_dir) if save_dir is not None else None
        self.save_interval = save_interval
        self.seed = seed

        self.epoch = 0  # epochs that are finished
        self.batches_done = 0  # micro-batches of the current epoch that are used up
        self.step = 0  # updates that are made
        self.best_val_loss = math.inf
        # float16 cannot hold numbers below 6e-8. Gradients are such numbers, so the loss is multiplied before backward.
        self.scales_loss = use_amp and amp_dtype == torch.float16
        self.loss_scale = 2.0**16 if self.scales_loss else 1.0
        self.good_steps = 0  # since the scale last changed
        self.resumed_rng: dict[str, Any] | None = None
        self.history: dict[str, list[float]] = {"loss": [], "grad_norm": [], "lr": [], "val_loss": []}

    # ---------------------------------------------------------------------------------------------- the whole run

    def train(self) -> dict[str, list[float]]:
        """Train until `max_epochs` epochs are finished, from wherever `load_checkpoint` has put us.

        Returns:
            Lists of one number per step, `loss`, `grad_norm` (before clipping) and `lr`, and `val_loss` per epoch.
        """
        while self.epoch < self.max_epochs:
            self.train_epoch()
            self.epoch += 1
            self.batches_done = 0
            if self.val_loader is not None:
                val_loss = self.validate(self.val_loader)
                self.history["val_loss"].append(val_loss)
                if self.log_interval:
                    print(f"epoch {self.epoch} val_loss {val_loss:.4f}")
                if val_loss < self.best_val_loss:
                    self.best_val_loss = val_loss
                    if self.save_dir is not None:
                        self.save_checkpoint(self.save_dir / "best.pt")
            if self.save_dir is not None:
                self.save_checkpoint(self.save_dir / "latest.pt")
        return self.history

    def train_epoch(self) -> None:
        """One pass over the data, or what is left of it."""
        self.model.train()
        # The order of an epoch depends on nothing but (seed, epoch), so a resumed run can draw the same order again.
        torch.manual_seed(self.seed + self.epoch)
        batches: Iterator[Batch] = iter(self.train_loader)
        for _ in islice(batches, self.batches_done):
            pass  # used up before the checkpoint
        if self.resumed_rng is not None:
            self.restore_rng(self.resumed_rng)  # dropout goes on where it was
            self.resumed_rng = None

        while micro_batches := list(islice(batches, self.grad_accum_steps)):
            self.train_step(micro_batches)
            self.batches_done += len(micro_batches)
            if self.save_dir is not None and self.save_interval and self.step % self.save_interval == 0:
                self.save_checkpoint(self.save_dir / "latest.pt")

    # ------------------------------------------------------------------------------------------------- one update

    def train_step(self, micro_batches: list[Batch]) -> None:
        """One update of the parameters from the micro-batches of one step."""
        # The loss of a step is the mean over ALL of its learned tokens. A mean of the micro-batches' means would be
        # another number whenever they hold unequally many, so the tokens of the whole step are counted first.
        total_tokens = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in micro_batches)
        total_tokens = total_tokens or 1  # nothing to learn at all: loss 0, not 0 / 0

        # L = sum_k S_k / N: S_k is the summed loss of micro-batch k and N the tokens of the step.
        # The derivative of a sum is the sum of the derivatives: each backward() adds its dS_k / N to p.grad.
        step_loss = 0.0
        for batch in micro_batches:
            loss_sum, _ = self.forward(batch)  # []
            loss = loss_sum / total_tokens  # []
            (loss * self.loss_scale).backward()
            step_loss += loss.item()  # the host waits for the device here

        # The loss was multiplied by the scale, so every gradient is, too.
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]  # each of its parameter's shape
        for gradient in gradients:
            gradient /= self.loss_scale
        grad_norm = self.clip(gradients)

        lr = warmup_cosine(self.step, self.peak_lr, self.warmup_steps, self.total_steps, self.min_lr)
        self.optimizer.set_lr(lr)
        if self.gradients_are_finite(grad_norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1

        for name, value in (("loss", step_loss), ("grad_norm", grad_norm), ("lr", lr)):
            self.history[name].append(value)
        if self.log_interval and self.step % self.log_interval == 0:
            print(f"step {self.step} loss {step_loss:.4f} grad_norm {grad_norm:.3f} lr {lr:.2e}")

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The summed loss `[]` of one micro-batch and the number of its terms `[]`."""
        batch = {key: value.to(self.device) for key, value in batch.items()}  # each [B, T]
        gives_mask = self.takes_mask and "attention_mask" in batch
        mask = {"attention_mask": batch["attention_mask"]} if gives_mask else {}
        # Inside autocast each operation chooses: matrix products run in amp_dtype, sums and exponentials in float32.
        with torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.use_amp):
            output = self.model(batch["input_ids"], **mask)
        if isinstance(output, Mapping):
            output = output["logits"]
        logits = output if isinstance(output, Tensor) else output.logits  # [B, T, V]
        return cross_entropy_sum(logits, batch["labels"])

    @torch.no_grad()
    def clip(self, gradients: list[Tensor]) -> float:
        """Shorten the gradient, seen as one long vector, to `max_grad_norm`; return its length before."""
        # |g| = sqrt(sum over all parameters and entries of g^2)
        squares = sum((g**2).sum() for g in gradients)  # []
        grad_norm = math.sqrt(float(squares))  # the host waits for the device here
        if self.max_grad_norm > 0:
            # c = min(1, max / (|g| + 1e-6)): the direction stays, only the length changes (Pascanu et al. 2012)
            coefficient = min(1.0, self.max_grad_norm / (grad_norm + 1e-6))
            for gradient in gradients:
                gradient *= coefficient
        return grad_norm

    def gradients_are_finite(self, grad_norm: float) -> bool:
        """Whether this update may be made; with float16 also adapts the loss scale (Micikevicius et al. 2017)."""
        finite = math.isfinite(grad_norm)
        if self.loss_scale == 1.0 and not (self.use_amp and self.amp_dtype == torch.float16):
            if not finite:
                raise FloatingPointError(
                    f"the gradient norm is {grad_norm} at step {self.step}: lower the learning rate?"
                )
            return True
        if not finite:
            # The scaled gradients left the range of float16: leave this update out, and scale less.
            self.loss_scale, self.good_steps = self.loss_scale / 2, 0
            return False
        self.good_steps += 1
        if self.good_steps == 2000:
            self.loss_scale, self.good_steps = self.loss_scale * 2, 0
        return True

    # ------------------------------------------------------------------------------------------------- validation

    @torch.no_grad()
    def validate(self, loader: Iterable[Batch]) -> float:
        """The mean loss per learned token over all batches of `loader`."""
        self.model.eval()  # no dropout
        loss_sum, num_tokens = 0.0, 0
        for batch in loader:
            batch_sum, batch_tokens = self.forward(batch)
            loss_sum += batch_sum.item()
            num_tokens += int(batch_tokens)
        self.model.train()
        return loss_sum / (num_tokens or 1)

    # ------------------------------------------------------------------------------------------------ checkpoints

    def save_checkpoint(self, path: str | Path) -> None:
        """Write everything that the rest of the run depends on."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": rng,
            "epoch": self.epoch,
            "batches_done": self.batches_done,
            "step": self.step,
            "best_val_loss": self.best_val_loss,
            "loss_scale": self.loss_scale,
            "good_steps": self.good_steps,
            "history": self.history,
        }
        # Written beside it and renamed: whoever is killed half-way still has the old file.
        unfinished = path.with_name(path.name + ".unfinished")
        torch.save(state, unfinished)
        os.replace(unfinished, path)

    def load_checkpoint(self, path: str | Path) -> None:
        """Go back to a saved moment; `train()` then goes on exactly as the run that saved it."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch = state["epoch"]
        self.batches_done = state["batches_done"]
        self.step = state["step"]
        self.best_val_loss = state["best_val_loss"]
        self.loss_scale = state["loss_scale"]
        self.good_steps = state["good_steps"]
        self.history = state["history"]
        self.resumed_rng = state["rng"] if self.batches_done else None  # a new epoch seeds itself

    def restore_rng(self, rng: dict[str, Any]) -> None:
        """Put the random generators back to a saved moment."""
        torch.set_rng_state(rng["cpu"])
        if rng["cuda"]:
            torch.cuda.set_rng_state_all(rng["cuda"])
