"""Compiled models that see: the same numbers as plain ones, and one graph for images of any number and size."""

from functools import partial
from typing import Any

import pytest
import torch
from tiny_models import VOCAB
from vision_families import family_model

from llm_trainer.image_batch import ImageBatch
from llm_trainer.models import seeing
from llm_trainer.models.attention import resolve_attention
from llm_trainer.models.rewarding import Judge, Rewarding, reward_model
from llm_trainer.models.scored import scored
from llm_trainer.models.vision import Vision

TRACERS_WARN = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
# Images that each row shows, of micro-batches: none in one, several in others.
SHOWN = [(1, 0, 1), (2, 1), (0, 0), (1, 1, 1, 1), (3,), (0, 2, 1), (1, 2, 3), (5, 1), (0, 4)]
FIRST = 4  # micro-batches after which nothing is compiled any more

resolve_attention("blocked")


def micro_batch(vision: Vision, counts: tuple[int, ...], seed: int) -> dict[str, Any]:
    """Rows laid flat; of Qwen's models images of several sizes."""
    noise = torch.Generator().manual_seed(seed)
    number = 1 + sum(counts) % 3
    images = vision.example(number)
    inputs, lengths = images.inputs, images.lengths
    if "image_grid_thw" in inputs:
        grids = [[1, 2 * (1 + which), 4] for which in range(number)]
        patches = sum(height * width for _, height, width in grids)
        pixels = torch.randn(patches, inputs["pixel_values"].shape[1], generator=noise)
        inputs = {"pixel_values": pixels, "image_grid_thw": torch.tensor(grids)}
        lengths = torch.tensor([height * width // 4 for _, height, width in grids])
    order = [use % number for use in range(sum(counts))]
    rows, used = [], 0
    for count in counts:
        ids = [7, 8]
        for which in order[used : used + count]:
            ids += [*[vision.image_token_id] * int(lengths[which]), 9]
        used += count
        words = torch.randint(10, VOCAB, (3 + seed % 4,), generator=noise)
        rows.append(torch.cat([torch.tensor(ids), words]))
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    batch: dict[str, Any] = {"input_ids": torch.cat(rows)[None], "position_ids": positions}
    batch["document_lengths"] = torch.tensor([len(row) for row in rows])
    if order:
        batch["images"] = ImageBatch(inputs, torch.tensor(order), torch.tensor(counts), lengths)
    return batch


@TRACERS_WARN
@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
@pytest.mark.parametrize("rewards", [False, True])
def test_images_of_any_number_and_size_take_one_graph(
    rewards: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced and not compiled, which takes too long for a fast test."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(seeing, "compiled", partial(torch.compile, backend="eager"))
    model: Any = family_model(name)
    if rewards:
        model = reward_model(model, pad_token_id=0)
    make = Rewarding if rewards else scored
    plain, compiled = make(model), make(model)
    if rewards:  # as a run compiles what judges
        judge = Judge(model)
        judge.compile(dynamic=True)
        compiled = judge.model
    else:
        compiled.compile(dynamic=True)
    plain.with_images = compiled.with_images = True
    graphs = []
    for seed, counts in enumerate(SHOWN):
        batch = micro_batch(plain.vision, counts, seed)
        found = []
        for one in (plain, compiled):
            output = one(**batch)
            value = output.sum() if rewards else output.loss_sum
            value.backward()
            gradients = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
            found.append((value.detach(), torch.stack(gradients).norm()))
            model.zero_grad()
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs[-1] == graphs[FIRST - 1], graphs
