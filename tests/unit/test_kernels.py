"""Element-wise kernels: in blocks they give the same bits, and whether they are compiled follows from the run."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_trainer import SFTTrainer, configure_optimizer, kernels
from llm_trainer.kernels import Kernel, compile_after
from llm_trainer.losses import chunked
from llm_trainer.models import document_attention as attention
from llm_trainer.train.hooks import Hook

sys.path.insert(0, str(Path(__file__).parent / "models"))
from tiny_models import tiny_model


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is compiled, and few rows are a block."""
    monkeypatch.setattr(kernels, "_compiles", False)
    monkeypatch.setattr(kernels, "BLOCK_BYTES", 4 * 3 * 401)  # 3 rows of the head's tables
    monkeypatch.setattr(kernels, "LARGE", 1)
    yield


def bits(result: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_give_the_same_bits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    logits, labels = random(10, 401), torch.randint(0, 401, (10,), generator=generator)
    labels[::2] = logits[::2].float().argmax(-1)
    for with_entropy in (False, True):
        whole = chunked._statistics(logits, labels, with_entropy)
        in_blocks = chunked.statistics(logits, labels, with_entropy)
        assert all(map(torch.equal, bits(in_blocks), bits(whole)))

    coefficients = [random(10, dtype=torch.float32) for _ in range(4)]
    outs = [logits.clone() for _ in range(2)]
    chunked.softmax_gradient(outs[0], *coefficients)
    chunked._softmax_gradient(outs[1], *coefficients)
    assert torch.equal(*outs) and not torch.equal(outs[0], logits)

    # As many rows as the mask has, which all of them share.
    scores, on_probs = random(7, 7, 9), random(7, 7, 9)
    statistics = random(7, 7, 1, dtype=torch.float32).abs(), random(7, 7, 1, dtype=torch.float32)
    mask = torch.ones(7, 9).tril(2)
    pairs = [(scores.clone(), on_probs.clone()) for _ in range(2)]
    attention.probabilities(*pairs[0], *statistics, mask, 0.3)
    attention._probabilities(*pairs[1], *statistics, mask, 0.3)
    assert all(map(torch.equal, *pairs))

    left, right = random(4, 3, 50, 8).transpose(1, 2), random(4, 3, 50, 8).transpose(1, 2)
    assert torch.equal(attention.row_products(left, right), attention._row_products(left, right))
    total, product = random(11, 200, dtype=torch.float32), random(11, 200)
    expected = total + product
    chunked.add_product(total, product)
    assert torch.equal(total, expected)


def test_a_run_is_long_enough_by_what_it_has_computed() -> None:
    assert compile_after(kernels.REPAID_FLOPS - 1.0) is False and not kernels._compiles
    assert compile_after(float(kernels.REPAID_FLOPS)) is True and kernels._compiles
    assert compile_after(0.0) is False and not kernels._compiles  # another run
    assert compile_after(None) is True


def test_a_kernel_is_traced_once_for_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where two of them were equal in its first call."""

    def traced(function: Callable[..., Any], dynamic: bool) -> Callable[..., Any]:
        return torch.compile(function, backend="eager", dynamic=dynamic)  # compiling takes too long for a fast test

    monkeypatch.setattr(kernels, "compiled", traced)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compile_after(None)
    kernel = Kernel(attention._probabilities, per_row=4)
    for heads, queries, keys in ((4, 8, 8), (4, 8, 16), (8, 4, 12), (2, 6, 6)):
        scores, on_probs = torch.ones(heads, queries, keys), torch.ones(heads, queries, keys)
        statistics = torch.ones(heads, keys + queries, 1)[:, queries // 2 :][:, :queries]
        kernel(scores, on_probs, statistics, statistics, torch.ones(queries, keys), 0.5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_without_a_compiler_the_kernels_run_uncompiled() -> None:
    from torch._inductor.exc import InductorError

    def fails(*_: object) -> None:
        raise InductorError(RuntimeError("no C++ compiler"), None)

    compile_after(None)
    kernel = Kernel(lambda x: x + 1, per_row=1)
    kernel.compiled = fails
    with pytest.warns(UserWarning, match="uncompiled"):
        assert kernel(torch.ones(2)).tolist() == [2, 2]
    assert kernel(torch.ones(2)).tolist() == [2, 2]  # without trying or warning again


def test_a_resumed_run_meets_the_kernels_it_would_have_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are compiled from the step on by which the run has done enough, in whichever process it is done."""
    seen: list[tuple[int, bool]] = []

    def look(run: Any) -> None:
        seen.append((run.progress.step, kernels._compiles))

    def run(steps: int, **options: Any) -> SFTTrainer:
        torch.manual_seed(0)
        model = tiny_model()
        batch = {"input_ids": torch.ones(2, 8, dtype=torch.int64), "labels": torch.ones(2, 8, dtype=torch.int64)}
        options = {"max_epochs": 1, "max_steps": steps, "progress": False, "resume": "auto", **options}
        hooks = [Hook("look", look, every_steps=1)]
        optimizer = configure_optimizer(model=model, lr=1e-3)
        return SFTTrainer(model, optimizer, [batch] * 6, device="cpu", hooks=hooks, save_dir=str(tmp_path), **options)

    monkeypatch.setattr(kernels, "LARGE", 2**40)  # what would be compiled does not matter here
    trainer = run(4)
    per_token = trainer.run.size.flops_per_token
    assert per_token is not None
    monkeypatch.setattr(kernels, "REPAID_FLOPS", 3 * 16 * per_token)
    trainer.train()
    assert seen == [(1, False), (2, False), (3, True), (4, True)]
    kernels.compile_after(0.0)  # a new process, say
    run(6).train()
    assert seen[-2:] == [(5, True), (6, True)]
    lines = map(json.loads, (tmp_path / "log" / "metrics.jsonl").read_text().splitlines())
    said = [(line["step"], line["choices"]["kernels"]["key"]) for line in lines if "kernels" in line.get("choices", {})]
    assert said == [(3, "compile=False"), (4, "compile=False")]  # under way, and on the screen of who goes on
    for wanted in (True, False):  # asked for, so from the first step on, or never
        run(1, resume="never", compile=wanted).run._choose_kernels()
        assert kernels._compiles == wanted
        kernels.compile_after(None)
