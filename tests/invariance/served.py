"""What a run serves to those who make rollouts, on any engine, between two of its steps."""

import hashlib
import zlib
from typing import Any

import numpy as np
import torch
from table import Cell, Curve, Rows, run, tiny_model
from torch import Tensor

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
