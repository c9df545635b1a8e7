"""The images of a sequence of tokens in a store: where they stand, which are inside a window, and where it may be cut."""

from typing import NamedTuple

import numpy as np

from llm_trainer.data.encode.pictured import BYTES, PLACE_SIZE, PLACES, REFS, refs_of
from llm_trainer.data.encode.store import TokenStore
from llm_trainer.data.images import ImageRef


class Shown(NamedTuple):
    """Images inside a window: what they are, and the first placeholder of each `[images]`, counted from its start."""

    images: list[ImageRef]
    places: np.ndarray


class Images:
    """All images of one sequence per row of a store.

    Attributes:
        rows: `[images]` the row in the store that each stands in, ascending.
        starts, stops: `[images]` its tokens `[start, stop)` in the sequence.
        towers: `[images]` patches that the tower sees.
    """

    def __init__(self, store: TokenStore, number: int) -> None:
        self._store = store
        table = np.asarray(store[PLACES].values, dtype=np.int64).reshape(-1, PLACE_SIZE)
        counts = np.diff(np.asarray(store[PLACES].offsets)) // PLACE_SIZE
        rows = np.repeat(np.arange(len(store)), counts)
        is_here = table[:, 0] == number
        self.rows, table = rows[is_here], table[is_here]
        self.which, self.starts, self.firsts, self.stops, self.towers = table[:, 1:].T
        self._bounds = np.searchsorted(self.rows, np.arange(len(store) + 1))

    @classmethod
    def of(cls, store: TokenStore, number: int) -> "Images | None":
        """Those of the sequence of that number in every row; None: nobody has looked for any, or there are none."""
        if PLACES not in store.columns or not len(store[PLACES].values):
            return None
        found = cls(store, number)
        return found if len(found.rows) else None

    def cut_between(self, starts: np.ndarray, stops: np.ndarray) -> None:
        """Move the ends of windows that lie inside an image, so that it is outside.

        Args:
            starts: `[rows of the store]`, changed in place.
            stops: `[rows of the store]`, changed in place.
        """
        edge = stops[self.rows]
        is_cut = (self.starts < edge) & (edge < self.stops)
        stops[self.rows[is_cut]] = self.starts[is_cut]
        edge = starts[self.rows]
        is_cut = (self.starts < edge) & (edge < self.stops)
        starts[self.rows[is_cut]] = self.stops[is_cut]
        np.minimum(starts, stops, out=starts)

    def longer_than(self, tokens: int) -> np.ndarray:
        """`[rows of the store]` bool: the row has an image of more tokens."""
        found = np.zeros(len(self._store), dtype=bool)
        found[self.rows[self.stops - self.starts > tokens]] = True
        return found

    def inside(self, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """`[images]` bool: it stands in the window of its row, of which there is one `[rows of the store]`."""
        return (self.starts >= starts[self.rows]) & (self.stops <= stops[self.rows])

    def per_row(self, which: np.ndarray | None = None, weights: np.ndarray | None = None) -> np.ndarray:
        """`[rows of the store]` how many of the images (of `which`, bool) each row has, or the sum of `weights` of them."""
        chosen = slice(None) if which is None else which
        values = None if weights is None else weights[chosen]
        counts = np.bincount(self.rows[chosen], weights=values, minlength=len(self._store))
        return counts.astype(np.int64)

    def blocks(self, row: int) -> np.ndarray:
        """`[images, 3]` tokens `[start, stop)` of the images in a row of the store, and their patches."""
        here = slice(self._bounds[row], self._bounds[row + 1])
        return np.stack([self.starts[here], self.stops[here], self.towers[here]], axis=1)

    def shown(self, row: int, start: int, stop: int) -> Shown | None:
        """The images in the tokens `[start, stop)` of a row of the store; None: there are none."""
        here = np.arange(self._bounds[row], self._bounds[row + 1])
        here = here[(self.starts[here] >= start) & (self.stops[here] <= stop)]
        if not len(here):
            return None
        refs = refs_of(self._store[REFS][row], self._store[BYTES][row])
        return Shown([refs[which] for which in self.which[here].tolist()], self.firsts[here] - start)
