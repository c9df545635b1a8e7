"""What every trainer accepts beyond the objects it trains: one frozen set of options, checked by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from llm_trainer.data.ledger import Ledger


@dataclass(frozen=True)
class Sampling:
    """How sample answers are drawn during training.

    Attributes:
        max_new_tokens: tokens of an answer at most.
        temperature: 0 is greedy.
        top_p: smallest set of tokens with this probability mass; 1 keeps all.
        top_k: number of most likely tokens kept; 0 keeps all.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class Fsdp:
    """How a model is sharded over ranks by FSDP2.

    Attributes:
        reshard_after_forward: free a layer's whole weights after its forward and gather them again for its backward
            (ZeRO-3); False keeps them until the backward (ZeRO-2): more memory, a third less to send.
        cpu_offload: parameters, gradients and optimizer state stay in host memory, and so does the update.
        shard_size: ranks that share one copy of the model, such as those of a node; the groups exchange gradients
            (hybrid sharding). None: all ranks share one.
        tensor_parallel_size: neighbouring processes, best of one node, that also split every layer's matrices among them
            and see the same data: together they count as one rank.
        sync_each_micro_batch: sum gradients over ranks after every micro-batch, so that only a part of them is kept;
            False: once per step, with whole gradients kept until then.
    """

    reshard_after_forward: bool = True
    cpu_offload: bool = False
    shard_size: int | None = None
    tensor_parallel_size: int = 1
    sync_each_micro_batch: bool = True


@dataclass(frozen=True)
class Settings:
    """Options of a run that all algorithms share (keywords of every trainer).

    Attributes:
        max_steps: stop after this many optimizer steps, whatever `max_epochs` says.
        seed: order of samples and all noise follow from it.
        precision: 'auto', 'fp32', 'bf16' or 'fp16'; only with `use_amp`.
        engine: 'torch' (one process, DDP), 'fsdp', 'deepspeed', 'hf' (driven by `transformers.Trainer`), or 'auto':
            what PARALLEL_TYPE says, else the one that options are given for, else 'torch'.
        fsdp: how FSDP shards; None: with the defaults of `Fsdp` where `engine` asks for it.
        deepspeed: DeepSpeed's own configuration (its JSON); None: ZeRO-2 where `engine` asks for it.
        compile: compile the transformer with `torch.compile`.
        gradient_checkpointing: recompute activations in the backward to save memory.
        micro_batch_tokens: cut each step into micro-batches of at most this many tokens instead of by rows.
        max_bad_steps: steps in a row with a gradient that is not finite before the run stops.
        eval_interval: steps between evaluations; None: after each epoch.
        save_interval_steps: steps between checkpoints; None: every `save_interval` epochs.
        checkpoints_to_keep: newest checkpoints that rotation leaves; the best one stays as well.
        early_stopping_patience: evaluations without improvement before the run stops; None: never.
        early_stopping_min_delta: how much lower the validation loss must be to count as an improvement.
        resume: 'never', 'auto' (the newest valid checkpoint in `save_dir`), or the path of a checkpoint.
        log_dir: where log.txt, lr.txt and metrics.jsonl go; None: `save_dir`/log.
        writers: further metric writers, 'tensorboard' and 'wandb'.
        progress: show progress on the console.
        ddp_timeout_s: seconds a rank waits for the others.
        best_file: write best_model.pt beside the checkpoint folders whenever the validation loss improves.
        sampling: how answers to `eval_prompts` are drawn.
        ledgers: token ledgers of the data, shown before the first step and stored with the run.
        description: the resolved configuration as YAML, stored with the run; empty in the explicit style.
    """

    max_steps: int | None = None
    seed: int = 0
    precision: str = "auto"
    engine: str = "auto"
    fsdp: Fsdp | None = None
    deepspeed: Mapping[str, Any] | None = None
    compile: bool = False
    gradient_checkpointing: bool = False
    micro_batch_tokens: int | None = None
    max_bad_steps: int = 3
    eval_interval: int | None = None
    save_interval_steps: int | None = None
    checkpoints_to_keep: int = 2
    early_stopping_patience: int | None = None
    early_stopping_min_delta: float = 0.0
    resume: str = "never"
    log_dir: str | None = None
    writers: Sequence[str] = ()
    progress: bool = True
    ddp_timeout_s: float = 600
    best_file: bool = True
    sampling: Sampling = field(default_factory=Sampling)
    ledgers: Sequence["Ledger"] = ()
    description: str = ""

    @classmethod
    def of(cls, trainer: str, options: dict[str, Any]) -> Self:
        """Settings from a trainer's further keywords.

        Raises:
            TypeError: an option is not known; the message names the nearest known one.
        """
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                near = get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else f"; known options: {', '.join(known)}"
                raise TypeError(f"{trainer} has no option {name!r}{hint}")
        return cls(**options)
