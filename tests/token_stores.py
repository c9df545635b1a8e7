"""Small token stores whose rows tests cut and pack."""

import numpy as np

from llm_trainer.data.encode.store import Part
from llm_trainer.data.encode.workers import build_store


def store_of(folder, rows):
    """A store of (ids, number of leading tokens that are not trained on)."""

    def encode(chunk):
        ids = [np.asarray(ids, dtype=np.uint16) for ids, _ in chunk]
        trained = [(np.arange(len(ids)) >= prompt).astype(np.uint8) for ids, prompt in chunk]
        return Part({"input_ids": ids, "trained": trained})

    return build_store(folder, rows, encode, ("input_ids", "trained"))


ROWS = [(range(10, 15), 2), (range(20, 32), 10), (range(40, 43), 3), (range(50, 58), 0)]
