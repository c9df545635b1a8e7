"""One table of ways to run the same optimization. Every cell must give the same losses and gradient norms.

`torchrun ... table.py OUT [ENGINE [DEVICE]]` runs the cells of several processes and writes their curves.
"""

import copy
import json
import os
import sys
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from pictures import Pictured, Shades, vision_model

TRAINERS: dict[str, dict[str, Any]] = {  # name -> its options
    "pretrain": {},
    "sft": {},
    "dpo": {"loss_type": {"sigmoid": 1.0, "sft": 0.5}},  # pairs and tokens: two denominators
    "kto": {},
    "reward": {"center_coef": 0.01},
    # Of rollouts that are there; each step has further rows, whose loss is a mean of its own.
    "grpo": {"kl_coef": 0.1, "entropy_coef": 0.01, "ptx_coef": 0.5},
    "ppo": {"kl_beta": 0.0, "critic_warmup_steps": 1, "ptx_coef": 0.5},  # two models; the policy waits for a step
    # 'sft' with a mixture of experts: a mean over all tokens is added to one over the supervised.
    "moe": {"aux_loss_coef": 0.5, "router_z_loss_coef": 0.01},
    # The same, whose routers are balanced by biases that move after each step, so far that the next one has other routes.
    "bias": {"bias_update_speed": 0.1},
    "lora": {},  # 'sft' of adapters alone,
    "qlora": {},  # and on a base in 4 bits
    # 'sft' and 'dpo' of rows that show images, of which a rank may have none.
    "vlm": {},
    "vlm-dpo": {"loss_type": {"sigmoid": 1.0, "sft": 0.5}},
}
PACKAGES = {"lora": ("peft",), "qlora": ("peft", "bitsandbytes", "accelerate")}  # without which there is no such row
for _name, _packages in PACKAGES.items():
    if not all(map(find_spec, _packages)):
        del TRAINERS[_name]
ENGINES: dict[str, dict[str, Any]] = {  # name -> the options that ask for it
    "torch": {},
    "hf": {"engine": "hf"},
    "fsdp": {"engine": "fsdp"},
    **{
        f"zero{stage}": {"engine": "deepspeed", "deepspeed": {"zero_optimization": {"stage": stage}}}
        for stage in range(4)
    },
}
GATHER = ("torch", "fsdp", "zero2", "zero3")  # engines whose steps have other collectives each
OF_SEEING_REWARDS = ("torch", "fsdp", "zero3")  # engines on which a reward model that sees is tried
OF_SEEN = ("grpo", "ppo")  # trainers of policies whose prompts show images
# trainers of models that see, and what they are without images
SEEING = {"vlm": "sft", "vlm-dpo": "dpo", "vlm-reward": "reward"}
MIXTURES = {"moe": "qwen3_moe", "bias": "glm4_moe"}  # trainers of mixtures of experts, and of which
STEPS = 3
ROWS_PER_STEP = 8
FURTHER, FURTHER_PER_STEP = (
    4,
    3,
)  # rows, of which the second step has one: the second of two ranks has none; then they repeat
# What may be left to the machine, as the user says it who leaves nothing to it.
PLAIN: dict[str, Any] = {"packing": "none", "micro_batch_tokens": None, "compile": False}


class StepSeen(NamedTuple):
    """What a step was: its loss, its gradient norm, and a number that tells its rows from others, whatever their order."""

    loss: float
    grad_norm: float
    rows: int


Curve = list[StepSeen]


@dataclass(frozen=True)
class Cell:
    """A way to run: an engine, `batch_size` x `accumulation` x `ranks` rows per step, their layout, and a token budget.

    `automatic`: nothing is said about the machine. Rows come padded from a loader of the user, or, `flat`, from a stream.
    """

    trainer: str
    batch_size: int
    accumulation: int
    ranks: int = 1
    flat: bool = False
    micro_batch_tokens: int | None = None
    engine: str = "torch"
    automatic: bool = False

    def __str__(self) -> str:
        layout = "flat" if self.flat else "padded"
        if self.automatic:
            layout = "stream" if self.flat else "loader"
        budget = f"-{self.micro_batch_tokens}tokens" if self.micro_batch_tokens else ""
        return f"{self.trainer}-{self.engine}-{self.batch_size}x{self.accumulation}x{self.ranks}-{layout}{budget}"


def cells(trainer: str, ranks: int, every: bool = False) -> list[Cell]:
    """All ways to cut steps of eight rows in one process; among several, a row, all rows, and a budget at a time.

    A row and all rows are laid out in one way each, unless `every`: the other is held in one process.
    """
    per_rank = ROWS_PER_STEP // ranks
    layouts = (False, True)
    by_budget = [Cell(trainer, 2, per_rank // 2, ranks, flat, 40) for flat in layouts]
    if ranks > 1 and not every:
        return few([Cell(trainer, 1, per_rank, ranks), Cell(trainer, per_rank, 1, ranks, True), *by_budget])
    sizes = (1, 2, 4, 8) if ranks == 1 else (1, per_rank)
    splits = [(n, per_rank // n) for n in sizes]
    return few([Cell(trainer, size, count, ranks, flat) for size, count in splits for flat in layouts] + by_budget)


def few(found: list[Cell]) -> list[Cell]:
    """Of experts the cell that is cut most unevenly, of adapters the least too: all else they have in common with 'sft'."""
    trainer, ranks = found[0].trainer, found[0].ranks
    if trainer in MIXTURES:
        return found[-1:]
    if trainer in SEEING:  # padded, and cut most unevenly
        return ends(found) if ranks > 1 else found[-3:]
    return ends(found) if trainer in PACKAGES and ranks > 1 else found


def ends(found: list[Cell]) -> list[Cell]:
    """The first and the last, which may be one."""
    return list(dict.fromkeys((found[0], found[-1])))


def engine_cells(trainer: str, engine: str, ranks: int, every: bool = False) -> list[Cell]:
    """Ways to cut steps, on an engine: by a token budget that gives ranks different numbers of batches, rows laid flat.

    Of 'sft' and of images, or of `every` trainer, also padded and not at all; of 'sft' also into single rows. That other
    trainers may be cut so is held on DDP; that an engine takes padded rows, one micro-batch and more, by 'sft'.
    """
    per_rank = ROWS_PER_STEP // ranks
    found = [Cell(trainer, 2, per_rank // 2, ranks, True, 40, engine)]
    if every or trainer in ("sft", "vlm"):
        found.insert(0, Cell(trainer, per_rank, 1, ranks, False, None, engine))
    if trainer == "sft":
        found.insert(1, Cell(trainer, 1, per_rank, ranks, True, None, engine))
    return few(found)


def is_fast(cell: Cell) -> bool:
    """Whether the fast suite runs a cell; `left_out` has the others, of which nothing is known that these do not have.

    ZeRO-0 and ZeRO-1 share their code with ZeRO-2 but for the collectives, of which one model, two, adapters and images
    have all. ZeRO-2 and transformers' driver have each kind of model and of step once; DDP, FSDP2 and ZeRO-3 have every
    trainer. In one process single rows, two rows, flat rows and a budget are every way in which a trainer is cut; adapters
    have the forward of 'sft'.
    """
    if cell.engine in ("zero0", "zero1"):
        return cell.trainer in ("sft", "dpo", "ppo", "lora", "vlm")
    if cell.engine in ("zero2", "hf"):
        return cell.trainer not in ("pretrain", "kto", "reward", "qlora", "vlm-dpo")
    if cell.ranks > 1 or cell.automatic or cell.trainer == "sft":
        return True
    if cell.trainer in PACKAGES:
        return cell.batch_size == 1 or cell.micro_batch_tokens is not None
    return cell.batch_size != 4 and cell != Cell(cell.trainer, 8, 1)  # which all are compared with


def left_out(engine: str, ranks: int) -> list[Cell]:
    """Cells that are slow tests."""
    make = cells if engine == "torch" else partial(engine_cells, engine=engine)
    found = []
    for trainer in TRAINERS:
        usual = make(trainer, ranks=ranks)
        found += [cell for cell in make(trainer, ranks=ranks, every=ranks > 1) if cell not in usual]
        found += [cell for cell in usual + automatic_cells(trainer, engine, ranks) if not is_fast(cell)]
    return found


def automatic_cells(trainer: str, engine: str, ranks: int) -> list[Cell]:
    """Everything left to the machine, with a loader of the user and with a stream of ours."""
    if trainer == "bias":
        return []  # nothing is chosen otherwise than for 'moe'
    count = ROWS_PER_STEP // ranks // 2
    found = [Cell(trainer, 2, count, ranks, False, None, engine, automatic=True)]
    if engine == "torch":
        found.append(Cell(trainer, 2, count, ranks, True, None, engine, automatic=True))
    return found


def weighed_cell(engine: str, ranks: int) -> Cell:
    """'sft' whose loss weights are hundredths, cut as unevenly as can be: the curve must be that of 'sft'.

    It does not clip, and says so by None.
    """
    per_rank = ROWS_PER_STEP // ranks
    return Cell("weighed", 2, per_rank // 2, ranks, True, 40, engine)


def seeing_reward_cell(engine: str, ranks: int) -> Cell:
    """A reward model that sees, cut as unevenly as can be; it has all else in common with 'reward' and 'vlm-dpo'."""
    return Cell("vlm-reward", 2, ROWS_PER_STEP // ranks // 2, ranks, True, 40, engine)


def trainer_class_of(cell: Cell) -> Any:
    """The class that trains a cell."""
    from llm_trainer import PPOTrainer, SFTTrainer, get_trainer_class

    class Weighed(SFTTrainer):
        def _loss_weight(self, batch: Any) -> float:
            return 0.01 * super()._loss_weight(batch)

    class OfStoredRows(PPOTrainer):
        takes_flat = True

        def _build_source(self, source: Any, training: bool) -> Any:
            if self._judges:
                return super()._build_source(source, training)
            return self._with_further(source, training)

    if cell.trainer in SEEING:
        return get_trainer_class(SEEING[cell.trainer])
    own = dict.fromkeys((*MIXTURES, *PACKAGES), SFTTrainer) | {"weighed": Weighed, "ppo": OfStoredRows}
    return own.get(cell.trainer) or get_trainer_class(cell.trainer)


class Rows:
    """Ragged rows of random ids.

    All but those of 'pretrain' have prompts. In the second step every other row has an answer of one token, and in 'sft'
    nothing to train on: one of two ranks has no term at all. The tokens of 'sft' have weights, so small that those of
    a whole step sum to less than 1.
    """

    def __init__(self, trainer: str, vocab_size: int, seed: int = 0, count: int = STEPS * ROWS_PER_STEP) -> None:
        noise = np.random.default_rng(seed)
        self.lengths = noise.integers(4, 30, count)
        self.file_sizes = [len(self.lengths)]
        self._ids = [noise.integers(3, vocab_size, n) for n in self.lengths]
        whole = trainer == "pretrain"
        prompts = np.zeros(len(self.lengths), dtype=int) if whole else noise.integers(1, 4, len(self.lengths))
        if not whole:  # every other row of the second step, which are those of the first of two ranks
            every_other = slice(ROWS_PER_STEP, 2 * ROWS_PER_STEP, 2)
            prompts[every_other] = self.lengths[every_other] - (trainer != "sft")
        self._weights = [noise.random(n).astype(np.float32) / 500 for n in self.lengths] if trainer == "sft" else None
        self._trained = [np.arange(n) >= prompt for n, prompt in zip(self.lengths, prompts, strict=True)]

    def __getitem__(self, index: int) -> dict[str, Any]:
        length = int(self.lengths[index])
        row = {"input_ids": self._ids[index], "trained": self._trained[index], "document_lengths": [length]}
        if self._weights is not None:
            row["loss_weights"] = self._weights[index]
        return row


class Answers:
    """Pairs of such rows, or rows that are judged and have a mismatched one beside them."""

    def __init__(self, trainer: str, vocab_size: int) -> None:
        self.trainer = trainer
        self.rows, self.others = Rows(trainer, vocab_size), Rows(trainer, vocab_size, seed=1)
        self.lengths = self.rows.lengths if trainer == "kto" else self.rows.lengths + self.others.lengths
        self.file_sizes = self.rows.file_sizes

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, other = self.rows[index], self.others[index]
        if self.trainer == "kto":
            return {"row": row, "mismatched": other, "desirable": index % 3 == 0}
        return {"chosen": row, "rejected": other, "margin": index / 10}


class Completions:
    """Such rows as completions of prompts, with what a rollout says of their tokens; prompts are those of every third row."""

    def __init__(self, vocab_size: int) -> None:
        self.rows = Rows("grpo", vocab_size)
        self.lengths, self.file_sizes = self.rows.lengths, self.rows.file_sizes

    def __getitem__(self, index: int) -> Any:
        from llm_trainer.data.rollouts import RolloutRow

        row, noise = self.rows[index], np.random.default_rng(index)
        length = len(row["input_ids"])
        columns = {name: row[name] for name in ("input_ids", "trained")}
        columns["old_logprobs"] = -6 - noise.random(length).astype(np.float32)
        columns["advantages"] = np.full(length, noise.normal(), dtype=np.float32)
        columns["values"] = noise.normal(size=length).astype(np.float32) / 10  # these are PPO's
        columns["returns"] = noise.normal(size=length).astype(np.float32)
        columns["group"] = np.array([index % 3])
        found = RolloutRow(columns)
        found.per_token = frozenset(columns) - {"group"}
        return found


def data_of(cell: Cell) -> tuple[Any, Any]:
    """The rows of a trainer, and how they become batches."""
    from llm_trainer.data.collate import collate_flat, collate_padded, lay_with_images
    from llm_trainer.data.kinds.pairs import collate_pairs
    from llm_trainer.data.kinds.unpaired import collate_unpaired
    from llm_trainer.data.rollouts import collate_rollout

    collate: Any = collate_flat if cell.flat else collate_padded
    if cell.trainer in SEEING:
        collate = partial(lay_with_images, lay=collate, images=Shades())
        if cell.trainer == "vlm":
            return Pictured(Rows("sft", 512), ROWS_PER_STEP), collate
        pairs = Answers("dpo", 512)
        pairs.rows, pairs.others = (Pictured(rows, ROWS_PER_STEP) for rows in (pairs.rows, pairs.others))
        pairs.lengths = pairs.rows.lengths + pairs.others.lengths
        return pairs, partial(collate_pairs, lay=collate)
    if cell.trainer in ("pretrain", "sft", "weighed", *MIXTURES, *PACKAGES):
        return Rows("pretrain" if cell.trainer == "pretrain" else "sft", 512), collate
    if cell.trainer in ("grpo", "ppo"):
        return Completions(512), partial(collate_rollout, lay=collate)
    return Answers(cell.trainer, 512), partial(
        collate_unpaired if cell.trainer == "kto" else collate_pairs, lay=collate
    )


def tiny_model(attention: str = "sdpa", seed: int = 0) -> Any:
    """A two-layer Qwen3-shaped model with 512 ids, the same at every call."""
    from llm_trainer.config.model import ModelConfig
    from llm_trainer.models.build import build_model

    torch.manual_seed(seed)
    shape = ModelConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    return build_model(shape, attention=attention)


def experts_model(seed: int = 0, **changes: Any) -> Any:
    """A mixture of experts of the same size, whose routers prefer some; `changes` of its configuration."""
    from llm_trainer.config.model import ModelConfig, MoeConfig
    from llm_trainer.models.build import build_model

    torch.manual_seed(seed)
    shape: dict[str, Any] = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "architecture": "qwen3_moe", "initializer_range": 0.1} | changes
    moe = MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    return build_model(ModelConfig(**shape, moe=moe), attention="sdpa")


@cache
def quantized_model() -> Any:
    """The tiny model in 4 bits, as it is loaded from a folder."""
    from llm_trainer.checkpoint import write_model
    from llm_trainer.config.quantization import QuantizationConfig
    from llm_trainer.models.build import build_model
    from llm_trainer.models.quantized_loading import loading_options

    with tempfile.TemporaryDirectory() as folder:
        write_model(tiny_model(), folder)  # on every rank
        how = loading_options(QuantizationConfig(), folder, torch.device("cpu"), torch.float32)
        return build_model(folder, attention="sdpa", options=how)


def adapted_model(base: Any) -> Any:
    """Adapters on every linear layer but the head; their B is not 0, so that A has gradients in the first step."""
    from llm_trainer.config.adapters import AdapterConfig
    from llm_trainer.models.adapters import adapt

    torch.manual_seed(0)
    model = adapt(base, AdapterConfig(rank=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def model_of(cell: Cell) -> Any:
    """The model of a row of the table."""
    if cell.trainer in SEEING:
        return vision_model()
    if cell.trainer in MIXTURES:
        return experts_model(architecture=MIXTURES[cell.trainer])
    if cell.trainer == "lora":
        return adapted_model(tiny_model())
    if cell.trainer == "qlora":
        return adapted_model(copy.deepcopy(quantized_model()))
    return tiny_model()


def further_of(cell: Cell) -> Any:
    """The rows that each step of a cell has beside its own."""
    from llm_trainer.data.collate import collate_flat, collate_padded
    from llm_trainer.data.stream import SampleStream
    from llm_trainer.engine import dist

    return SampleStream(
        Rows("sft", 512, seed=7, count=FURTHER),
        collate_flat if cell.flat else collate_padded,
        rows_per_step=FURTHER_PER_STEP,
        batch_size=cell.batch_size,
        rank=dist.rank(),
        world_size=cell.ranks,
        micro_batch_tokens="auto" if cell.automatic else cell.micro_batch_tokens,
        flat=cell.flat,
    )


def loader_of(cell: Cell) -> Any:
    """What the rows of a cell come from."""
    from torch.utils.data import DataLoader

    from llm_trainer.data.stream import SampleStream
    from llm_trainer.engine import dist

    dataset, collate = data_of(cell)
    if cell.automatic and not cell.flat:
        rows = [dataset[i] for i in range(len(dataset.lengths))]
        return DataLoader(rows, batch_size=cell.batch_size, collate_fn=collate)  # type: ignore[arg-type]  # a list
    return SampleStream(
        dataset,
        collate,
        rows_per_step=ROWS_PER_STEP,
        batch_size=cell.batch_size,
        rank=dist.rank(),
        world_size=cell.ranks,
        micro_batch_tokens="auto" if cell.automatic else cell.micro_batch_tokens,
        flat=cell.flat,
        shuffle=False,
    )


def run(
    cell: Cell,
    device: str = "cpu",
    ready: Callable[[Any], object] = id,
    into: str | None = None,
    last_step: int = STEPS,
    loader: Any = None,
    model: Any = None,
    **options: Any,
) -> Curve:
    """What the steps of a cell are.

    Args:
        cell: how to run.
        device: where.
        ready: sees the trainer before it trains.
        into: the folder of the run, from whose checkpoint it goes on; None: one that is forgotten.
        last_step: the one after which it ends.
        loader: what the rows come from, in place of the cell's own.
        model: that is trained, in place of a tiny one.
        options: further keywords of the trainer.
    """
    from llm_trainer import configure_optimizer
    from llm_trainer.engine import dist
    from llm_trainer.models.rewarding import reward_model
    from llm_trainer.train.hooks import Hook

    of_trainer = TRAINERS.get(cell.trainer, {"max_grad_norm": None})
    left_open = {} if cell.automatic else PLAIN
    options = of_trainer | ENGINES[cell.engine] | {"use_amp": False} | left_open | options
    if model is None:
        model = model_of(cell)
    if cell.trainer in ("dpo", "kto", "grpo"):
        options.setdefault("ref_model", tiny_model(seed=1))
    elif cell.trainer == "vlm-dpo":
        options.setdefault("ref_model", vision_model(seed=1))
    elif cell.trainer.endswith("reward"):
        model = reward_model(model)
    if cell.trainer in ("grpo", "ppo"):
        options.setdefault("ptx_loader", further_of(cell))
    curve: Curve = []
    rows: list[int] = []  # of this rank

    def watch(run: Any) -> None:
        if not rows:
            return  # the last step of the life before was saved before this hook had seen it
        curve.append(StepSeen(run.values["loss"], run.values["grad_norm"], sum(dist.gather_objects(rows[-1]))))

    with tempfile.TemporaryDirectory(dir=os.environ.get("PYTEST_DEBUG_TEMPROOT")) as own_folder:  # in memory
        folder = dist.broadcast_object(into or own_folder)  # into which all ranks write their shards
        trainer = trainer_class_of(cell)(
            model=model,
            optimizer=configure_optimizer(model=model, lr=1e-3 if cell.trainer.endswith("reward") else 1e-2),
            train_loader=loader_of(cell) if loader is None else loader,
            device=device,
            max_epochs=1,
            max_steps=last_step,
            grad_accum_steps=cell.accumulation,
            log_interval=1,
            save_dir=folder,
            save_interval=0,
            resume="never" if into is None else "auto",
            hooks=[Hook("watch", watch, every_steps=1)],
            **options,
        )
        after = trainer.run.after

        def noting(done: Any) -> bool:
            if done is not None:
                rows.append(sum(number_of(batch.batch) for batch in done.batches if batch.counts))
            return after(done)

        trainer.run.after = noting
        if into is None and not cell.automatic:
            trainer.run._save = lambda: (
                None
            )  # a fifth of a short run; every engine saves every trainer in automatic cells
        ready(trainer)
        trainer.train()
        dist.gather_objects(None)  # nobody looks into the folder any more, which goes with the main process
    return curve


def number_of(batch: dict[str, torch.Tensor]) -> int:
    """A sum over the rows of a batch, padded, flat or in parts, and over the images that they show: another for others."""
    from llm_trainer.trainers.answers import join

    if "prompt_input_ids" in batch:
        parts = [name.removesuffix("_input_ids") for name in batch if name.endswith("_input_ids")]
        batch = join(batch, [part for part in parts if part not in ("prompt", "kl")])
    ids = batch["input_ids"]
    if "document_lengths" in batch:
        documents = ids[0].split(batch["document_lengths"].tolist())
    else:
        documents = [row[:length] for row, length in zip(ids, batch["attention_mask"].sum(1).tolist(), strict=True)]
    found = sum(zlib.crc32(document.numpy().astype(np.int64).tobytes()) for document in documents)
    if "images" in batch:
        images: Any = batch["images"]
        numbers = [zlib.crc32(image.cpu().numpy().tobytes()) for image in images.inputs["pixel_values"]]
        found += sum(numbers[which] for which in images.order.tolist())
    return found


def differences(a: Curve, b: Curve) -> tuple[float, float]:
    """Largest difference of losses (relative, of those above 1) and of gradient norms (relative).

    Raises:
        AssertionError: a step had other rows.
    """
    pairs = [(StepSeen(*x), StepSeen(*y)) for x, y in zip(a, b, strict=True)]
    assert [x.rows for x, _ in pairs] == [y.rows for _, y in pairs]
    losses = max(abs(x.loss - y.loss) / max(1.0, abs(y.loss)) for x, y in pairs)
    norms = max(abs(x.grad_norm - y.grad_norm) / y.grad_norm for x, y in pairs)
    return losses, norms


def main(out: str, engine: str = "torch", device: str = "cpu") -> None:
    """Run every cell of an engine in one process group; the main process writes the curves."""
    from llm_trainer.config.env import environment
    from llm_trainer.engine import dist
    from llm_trainer.engine.device import detect_device

    torch.set_num_threads(1)
    dist.start(detect_device(device), 60)
    ranks = environment().world_size
    wanted = [cells(name, ranks) if engine == "torch" else engine_cells(name, engine, ranks) for name in TRAINERS]
    curves = {str(cell): run(cell, device) for group in wanted for cell in group}
    if dist.is_main():
        Path(out).write_text(json.dumps(curves))
    dist.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
