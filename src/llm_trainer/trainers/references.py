"""What a reference says about data, computed once before training."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from llm_trainer.models.frozen import fingerprint
from llm_trainer.models.scored import scored
from llm_trainer.trainers.completions import as_rows, placed, score, share_prompts

if TYPE_CHECKING:
    from llm_trainer.data.stream import SampleStream


@torch.no_grad()
def precompute_reference(
    stream: "SampleStream",
    reference: nn.Module,
    device: torch.device,
    precision: Callable[[], AbstractContextManager[None]],
    shares_prompts: bool,
) -> None:
    """Give every pair the reference's summed log-probs, from a file beside the pairs' tokens or computed now.

    All ranks score their share, the main process writes the file.

    Args:
        stream: of pairs.
        reference: whatever `scored` takes; it is moved to `device`.
        device: where it computes.
        precision: the context of its forwards.
        shares_prompts: run the prompt of a pair once, where attention can do it.
    """
    from llm_trainer.engine import dist

    model, was_training, key = scored(reference).to(device), reference.training, fingerprint(reference)
    shares_prompts = shares_prompts and model.knows_branches(device)
    model.eval()
    parts: Any = stream.dataset.parts  # type: ignore[attr-defined]
    for rows in parts:
        path = rows.store.folder / f"ref_logps-{key}-{rows.how.block_size}-{rows.how.truncation}.npy"
        if not dist.broadcast_object(path.exists()):
            table = torch.zeros(len(rows.lengths), 2, device=device)
            mine = np.argsort(-rows.lengths)[dist.rank() :: dist.world_size()]  # of similar lengths together
            for first in range(0, len(mine), stream.batch_size):
                group = mine[first : first + stream.batch_size].tolist()
                batch = stream.collate([rows[i] for i in group])
                batch = placed(share_prompts(batch) if shares_prompts else batch, device)
                with precision():
                    sums = as_rows(score(model, batch).logprobs, batch).sum(1)  # [2B], chosen first
                table[group] = sums.view(2, -1).T
            table = dist.all_reduce(table)
            if dist.is_main():
                partial_path = path.with_suffix(".tmp.npy")
                np.save(partial_path, table.cpu().numpy())
                partial_path.rename(path)
            dist.broadcast_object(None)  # nobody reads before it is written
        rows.ref_logps = np.load(path)
    model.train(was_training)
