"""What a run serves to those who make rollouts, on any engine, between two of its steps."""

import hashlib
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from table import Cell, Curve, Rows, run, tiny_model
from torch import Tensor

from llm_trainer.data.rollouts import Rollout
from llm_trainer.engine import dist
from llm_trainer.train.hooks import Hook


def add_buffers(model: Any) -> None:
    """Of numbers and of counts, and one that is not saved."""
    model.register_buffer("scale", torch.linspace(0, 1, 5))
    model.register_buffer("seen", torch.tensor(7))
    model.register_buffer("cache", torch.ones(3), persistent=False)


def model_with_everything() -> Any:
    """A tiny model with a tied head, a frozen parameter and buffers, of a class of the user's."""
    model = tiny_model()
    kind = type(model)

    class Own(kind):  # type: ignore[misc, valid-type]
        def __init__(self, config: Any) -> None:
            kind.__init__(self, config)
            add_buffers(self)

    add_buffers(model)
    model.__class__ = Own
    model.model.norm.weight.requires_grad_(False)
    return model


def digest(weights: dict[str, Tensor]) -> str:
    """A hash of names and bits."""
    of = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        of.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        of.update(
            tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else b"%r" % tensor.item()
        )
    return of.hexdigest()


def streamed(trainer: Any) -> dict[str, Any]:
    """The weights of a run as they are streamed and as they are saved."""
    machine = trainer.machine
    found = {name: tensor.clone() for name, tensor in machine.stream_weights()}
    half = {name: tensor.clone() for name, tensor in machine.stream_weights(torch.bfloat16)}
    saved = trainer.run.engine.weights()
    cast = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in found.items()}
    report: dict[str, Any] = {
        "names": [*found],
        "everywhere": dist.gather_objects(digest(found)),
        "half": dist.gather_objects(digest(half)),
        "cast": digest(cast),
    }
    if dist.is_main():
        report["saved"] = digest({name: saved[name] for name in found})
        report["tied"] = sorted(saved.keys() - found.keys())
        report["is_tied"] = saved["lm_head.weight"] is saved["model.embed_tokens.weight"]
    return report


def scored(trainer: Any) -> dict[str, Any]:
    """Log-probabilities of rows, padded and flat, of every token and summed; more micro-batches than ranks, unevenly dealt."""
    from llm_trainer.data.collate import collate_flat, collate_padded
    from llm_trainer.trainers.answers import as_rows, score

    def logprobs(batch: Any) -> dict[str, Tensor]:
        found = score(trainer.model, batch).logprobs
        return {"each": found, "sum": as_rows(found, batch).sum(1)}

    report = {"modes": [trainer.model.training]}
    for name, collate in (("padded", collate_padded), ("flat", collate_flat)):
        columns = trainer.machine.score(Rows("sft", 512), collate, logprobs)
        report[name] = {column: [array.tolist() for array in arrays] for column, arrays in columns.items()}
        report[f"{name} everywhere"] = dist.gather_objects(zlib.crc32(repr(report[name]).encode()))
    report["modes"].append(trainer.model.training)
    return report


def written(trainer: Any) -> dict[str, Any]:
    """Completions of prompts, greedy and drawn, with the log-probabilities of their tokens; of every rank all of them."""
    from llm_trainer.generation.decoding import Decoding
    from llm_trainer.generation.service import Request

    noise = np.random.default_rng(1)
    requests = []
    for number in range(5):
        requests.append(Request(noise.integers(3, 512, 2 + 3 * number).tolist(), number, samples=2))
    report: dict[str, Any] = {}
    with trainer.machine.generating() as service:
        for name, temperature in (("greedy", 0.0), ("drawn", 1.0)):
            decoding = Decoding(max_new_tokens=12, temperature=temperature, stop_token_ids=range(0, 512, 40), seed=3)
            mine = requests[dist.rank() :] + requests[: dist.rank()]  # other lengths on every rank
            completions = service.generate(mine, decoding, lambda: False)
            found = {request.number: group for request, group in zip(mine, completions, strict=True)}
            report[name] = [[completion.ids for completion in found[request.number]] for request in requests]
            logprobs = [[completion.logprobs for completion in found[request.number]] for request in requests]
            report[f"{name} logprobs"] = sum(logprobs, [])
            report[f"{name} everywhere"] = dist.gather_objects(report[name])
    return report


def even_share(prompts: Any, completions: Any, answers: Any) -> list[float]:
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completions]


def every_weight(trainer: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.run.engine.stream_weights(every_model=True)}


# Hashes of weights, which differ in the last bits, and a place in a loader.
OF_A_LAYOUT = ("weights", "scored", "position")


def stored(folder: Path) -> dict[str, Any]:
    """All columns of a rollout, and what it was made of but what belongs to one layout."""
    rollout = Rollout(folder)
    meta = rollout.store.meta
    facts = {name: meta[name] for name in ("ledger", "reasons")}
    facts["made_of"] = {name: value for name, value in meta["made_of"].items() if name not in OF_A_LAYOUT}
    columns = {}
    for name, column in rollout.store.columns.items():
        columns[name] = [np.asarray(column[row]).tolist() for row in range(len(rollout))]
    return {"facts": facts, "columns": columns}


def note_steps(trainer: Any, report: dict[str, Any], *metrics: str) -> None:
    """Has a run write into `report` what each of its steps measured, and the rollout it learned from."""
    steps = report["steps"] = []
    rollouts = report["rollouts"] = []

    def note(view: Any) -> None:
        steps.append([view.values[name] for name in ("loss", "grad_norm", *metrics)])
        rollouts.append(stored(view.save_dir / "rollouts" / f"{view.progress.step - 1:08d}"))
        dist.gather_objects(None)  # the main rank goes on to remove what no checkpoint needs

    trainer.run._user_hooks.append(Hook("note", note, every_steps=1))


def moved(engine: str, ranks: int) -> dict[str, Any]:
    """Two rollouts; before the second one the reference moves by a quarter: how, the steps that were taken, the rollouts."""
    report: dict[str, Any] = {}

    def watch(trainer: Any) -> None:
        note_steps(trainer, report, "kl")
        follow = trainer.machine.follow

        def noting(*args: Any) -> None:
            before = every_weight(trainer)
            follow(*args)
            after = every_weight(trainer)
            expected = dict(before)
            for name, tensor in before.items():
                if name.startswith("reference.") and tensor.is_floating_point():
                    expected[name] = torch.lerp(tensor, before[name.replace("reference", "model", 1)], 0.25)
            report["right"] = all(torch.equal(after[name], expected[name]) for name in after)
            report["moved"] = sum(not torch.equal(after[name], before[name]) for name in after)
            report["everywhere"] = dist.gather_objects(digest(after))
            report["step"] = trainer.machine.step

        trainer.machine.follow = noting

    prompts = torch.randint(3, 512, (8, 4), generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {
        "reward_func": even_share,
        "reward_in_process": True,
        "stop_token_ids": [*range(0, 512, 20)],
    }
    options |= {"num_samples_per_prompt": 2, "gen_max_seq_len": 6, "kl_coef": 0.5}
    options |= {"ref_model": None, "ref_sync_steps": 1, "mixup_alpha": 0.25}
    loader = [{"prompts": some} for some in prompts.split(4 // ranks)]
    cell = Cell("grpo", 4 // ranks, 1, ranks, engine=engine)
    run(cell, model=model_with_everything(), loader=loader, ready=watch, **options)
    return report


def seen(engine: str, ranks: int, name: str = "grpo") -> dict[str, Any]:
    """Two rollouts of prompts that show none, one and two pictures, in small micro-batches: the steps, and what was made.

    A function judges them, and a reward model that sees.

    Args:
        engine: of the table.
        ranks: processes.
        name: 'grpo', or 'ppo', whose critic has a body of its own that sees.
    """
    import seeing_policies
    from llm_trainer.models.rewarding import reward_model

    report: dict[str, Any] = {}
    of_trainer, last = dict[str, Any](num_samples_per_prompt=2), "kl"
    if name == "ppo":
        of_trainer = {"completions_per_prompt": 2, "ppo_epochs": 1, "kl_beta": 0.1, "critic_warmup_steps": 0}
        of_trainer["value_model"] = reward_model(seeing_policies.tiny(seed=3))
        last = "loss/value_avg"

    def watch(trainer: Any) -> None:
        note_steps(trainer, report, last)

    options: dict[str, Any] = {
        "reward_func": by_length,
        "reward_in_process": True,
        "tokenizer": seeing_policies.processor(),
        "gen_max_seq_len": 6,
        "stop_token_ids": [*range(0, 290, 20)],
        "ref_model": seeing_policies.tiny(seed=1),
        "reward_model": reward_model(seeing_policies.tiny(seed=2)),
        "ptx_loader": None,
        "ptx_coef": 0.0,
        "micro_batch_tokens": 40,
    }
    loader, model = seeing_policies.prompts(8, 4 // ranks), seeing_policies.tiny()
    cell = Cell(name, 4 // ranks, 1, ranks, engine=engine)
    run(cell, model=model, loader=loader, ready=watch, **(options | of_trainer))
    return report


def by_length(prompts: Any, completions: list[str], answers: Any) -> list[float]:
    return [len(text) + sum(text.encode()) % 5 for text in completions]


class Judge(torch.nn.Module):
    """The share of even tokens, by a module: functions would be asked in processes of their own."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return ((input_ids % 2 == 0) * attention_mask).sum(1) / attention_mask.sum(1)


def made_ahead(engine: str, ranks: int) -> dict[str, Any]:
    """Three rollouts, of which the last two are made while the one before is learned from: steps, and what was made."""
    report: dict[str, Any] = {}

    def watch(trainer: Any) -> None:
        note_steps(trainer, report, "staleness/max")

    prompts = torch.randint(3, 512, (12, 4), generator=torch.Generator().manual_seed(2))
    loader = [{"prompts": some} for some in prompts.split(4 // ranks)]
    options: dict[str, Any] = {"reward_model": Judge(), "stop_token_ids": [*range(0, 512, 20)], "max_staleness": 1}
    options |= {"num_samples_per_prompt": 2, "gen_max_seq_len": 6}
    run(Cell("grpo", 4 // ranks, 1, ranks, engine=engine), loader=loader, ready=watch, **options)
    return report


def served(engine: str, ranks: int) -> dict[str, Any]:
    """What a run of an engine serves after its first step, and the curve of the run, which goes on."""
    report: dict[str, Any] = {}

    def serve(view: Any) -> None:
        if view.progress.step == 1:
            report["weights"] = streamed(view.trainer)
            report["scores"] = scored(view.trainer)

    cell = Cell("sft", 8 // ranks, 1, ranks, micro_batch_tokens=150, engine=engine)

    def hook(trainer: Any) -> None:
        report["written"] = written(trainer)
        trainer.run._user_hooks.append(Hook("serve", serve, every_steps=1))

    curve: Curve = run(cell, model=model_with_everything(), ready=hook)
    return report | {"curve": curve}
