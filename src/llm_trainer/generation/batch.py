"""Rows decoded together: who waits enters when there is room, who has ended leaves, and nobody notices the others.

Letters: `B` rows, `T` positions, `V` vocabulary.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_trainer.generation.decoding import Decoding, Draw, id_tensor, noise
from llm_trainer.generation.readers import Reader
from llm_trainer.generation.service import Completion, Request
from llm_trainer.generation.slots import SlotReader

# Rows that enter are a forward of their own, which takes about as long as one token of all rows: some are awaited.
WAIT_FOR_SHARE = 8  # an eighth of all rows


@dataclass(eq=False)
class Group:
    """The completions of one prompt: the prompt is computed once as long as one of its rows is there."""

    request: Request
    place: int  # among the requests
    budget: int
    waiting: deque[int] = field(default_factory=deque)  # numbers of samples
    logits: Tensor | None = None  # [V], after the prompt; None: not computed
    routes: Tensor | None = None  # [P, R], of the prompt's tokens, where somebody sees them


@dataclass(eq=False)
class Row:
    """A completion that is being written."""

    group: Group
    sample: int
    ids: list[int] = field(default_factory=list)  # where texts end it
    kept: list[list[int]] = field(default_factory=list)


def prompts_of(requests: Sequence[Request]) -> tuple[list[Any], ...]:
    """Arguments of `Reader.enter`: the ids of prompts, and their images where any has some."""
    ids, images = [request.ids for request in requests], [request.images for request in requests]
    return (ids,) if all(shown is None for shown in images) else (ids, images)


class Batch:
    """Completions of some requests, token by token.

    Args:
        reader: Reads the model, at most `num_rows` rows at a time.
        requests: At least one token each; `budgets` says how many new tokens each may get.
        keeps_cuts: Whether `Completion.kept` is wanted.

    Attributes:
        done: Of each request the finished completions by sample.
    """

    def __init__(
        self,
        reader: Reader,
        requests: Sequence[Request],
        budgets: Sequence[int],
        decoding: Decoding,
        num_rows: int,
        device: torch.device,
        version: int = 0,
        keeps_cuts: bool = False,
    ) -> None:
        self.reader, self.decoding, self.num_rows = reader, decoding, num_rows
        self.device, self.version = device, version
        self.keeps_cuts = keeps_cuts and decoding.is_cut
        self.seed = decoding.base_seed()
        self.waiting: deque[Group] = deque()
        self.done: list[dict[int, Completion]] = [{} for _ in requests]
        for place, (request, budget) in enumerate(zip(requests, budgets, strict=True)):
            if request.samples:
                numbers = range(request.sample, request.sample + request.samples)
                self.waiting.append(Group(request, place, budget, deque(numbers)))
        self.rows: list[Row] = []
        longest = max(budgets, default=0)
        self.noise = torch.zeros(num_rows, longest, device=device)
        self.ids = torch.zeros(num_rows, longest, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(num_rows, longest, device=device)
        self.count = torch.zeros(num_rows, dtype=torch.long, device=device)  # new tokens so far
        self.budget = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.seen: Tensor | None = None  # [num_rows, V], for the repetition penalty
        self.scores: Tensor | None = None  # [num_rows, V], the logits of a token
        self.routes: Tensor | None = (
            None  # [num_rows, tokens, R], of new tokens that were read, where somebody sees them
        )
        self.new = self.count[:0]

    @property
    def is_busy(self) -> bool:
        """Whether a completion is not finished."""
        return bool(self.rows or self.waiting)

    @torch.no_grad()
    def step(self) -> Tensor:
        """One token of every row, and the first ones of those that enter; the new ids `[B]`, before rows leave."""
        # 1. logits of the rows that are there, then of those that enter
        logits = []
        if self.rows:
            logits.append(self.reader.read(self.new))
            self._note_routes()
        if self._may_enter():
            logits.extend(self._enter())
        scores = self._together(logits)

        # 2. one token each
        num = len(self.rows)
        place = self.count[:num, None]
        seen = self._seen(scores)
        draw = self.decoding.choose(scores, self.noise[:num].gather(1, place)[:, 0], seen)
        self.new = draw.ids
        self.ids[:num].scatter_(1, place, draw.ids[:, None])
        self.logprobs[:num].scatter_(1, place, draw.logprobs[:, None])
        self.count[:num] += 1
        if seen is not None:
            seen.scatter_(1, draw.ids[:, None], True)
        if self.keeps_cuts and draw.cut is not None:
            for row, ids, left in zip(self.rows, draw.cut.ids.tolist(), draw.cut.num_left.tolist(), strict=True):
                row.kept.append(ids[:left])

        # 3. who has ended leaves
        chosen = draw.ids
        ended = self._ended(draw).tolist()  # the host waits for the device, once per token
        if any(ended):
            self._finish(ended)
        return chosen

    def completions(self) -> list[list[Completion]]:
        """Those of each request, by sample."""
        found = []
        for done in self.done:
            found.append([done[sample] for sample in sorted(done)])
        return found

    def _sees_routes(self) -> bool:
        return isinstance(self.reader, SlotReader) and self.reader.routes is not None

    def _taken_routes(self) -> Tensor:
        """`[tokens, R]` of all tokens that were read since the last call."""
        assert isinstance(self.reader, SlotReader)
        found = torch.cat(self.reader.sent_to)
        self.reader.sent_to = []
        return found

    def _note_routes(self) -> None:
        """Keep where the tokens that were read last were sent to, each of which its row has written last."""
        if not self._sees_routes():
            return
        found = self._taken_routes()
        if self.routes is None:
            self.routes = found.new_full((self.num_rows, self.ids.shape[1], found.shape[1]), -1)
        num = len(self.rows)
        self.routes[torch.arange(num, device=self.device), self.count[:num] - 1] = found

    def _routes_of(self, number: int, count: int) -> np.ndarray | None:
        """`[T, R]` of the prompt and the first `count` tokens of a row; those of the last one are not known."""
        prompt = self.rows[number].group.routes
        if prompt is None:
            return None
        own = prompt.new_full((count, prompt.shape[1]), -1)
        if self.routes is not None:
            own[:-1] = self.routes[number, : count - 1]
        return torch.cat([prompt, own]).cpu().numpy()

    def _ended(self, draw: Draw) -> Tensor:
        """Whether each row was ended by its last token. `[B]`"""
        num = len(self.rows)
        ended = (self.count[:num] == self.budget[:num]) | ~draw.logprobs.isfinite()
        if self.decoding.stop_token_ids:
            ended |= torch.isin(draw.ids, id_tensor(tuple(self.decoding.stop_token_ids), self.device))
        if self.decoding.stop_strings:
            for row, token in zip(self.rows, draw.ids.tolist(), strict=True):
                row.ids.append(token)
            says_stop = [self.decoding.says_stop(row.ids) for row in self.rows]
            ended |= torch.tensor(says_stop, device=self.device)
        return ended

    def _may_enter(self) -> bool:
        if not self.waiting or not self.reader.has_room():
            return False
        num_free = self.num_rows - len(self.rows)
        num_waiting = sum(len(group.waiting) for group in self.waiting)
        enough = max(1, self.num_rows // WAIT_FOR_SHARE)
        return not self.rows or num_free >= min(enough, num_waiting)

    def _enter(self) -> list[Tensor]:
        """Let as many rows enter as there is room for; their logits, in their order."""
        # 1. who enters: of each group one row is read, the others are forked from it or from one that is there
        num_free = self.num_rows - len(self.rows)
        places = {row.group: number for number, row in enumerate(self.rows)}
        entering: list[Row] = []
        forked: list[Row] = []
        while num_free and self.waiting:
            group = self.waiting[0]
            while num_free and group.waiting:
                row = Row(group, group.waiting.popleft())
                num_free -= 1
                if group in places:
                    forked.append(row)
                else:
                    places[group] = len(self.rows) + len(entering)
                    entering.append(row)
            if not group.waiting:
                self.waiting.popleft()

        # 2. their logits
        logits = []
        if entering:
            read = self.reader.enter(*prompts_of([row.group.request for row in entering]))
            logits.append(read)
            for row, scores in zip(entering, read, strict=True):
                row.group.logits = scores
            if self._sees_routes():
                lengths = [len(row.group.request.ids) for row in entering]
                for row, routes in zip(entering, self._taken_routes().split(lengths), strict=True):
                    if row.group.routes is None:  # else it is there: all its rows say the same of their prompt
                        row.group.routes = routes
        if forked:
            lengths = [len(row.group.request.ids) for row in forked]
            self.reader.fork([places[row.group] for row in forked], lengths)
            logits.append(torch.stack([self._after_prompt(row.group) for row in forked]))
        for row in (*entering, *forked):
            if not row.group.waiting:
                row.group.logits = None

        # 3. what is known of them
        first = len(self.rows)
        self.rows += entering + forked
        for number, row in enumerate(self.rows[first:], start=first):
            request, budget = row.group.request, row.group.budget
            self.count[number], self.budget[number] = 0, budget
            if self.decoding.temperature > 0:
                uniform = noise(self.seed, request.number, row.sample, request.first + budget)[request.first :]
                self.noise[number, :budget] = torch.from_numpy(uniform).float()
        return logits

    def _together(self, logits: list[Tensor]) -> Tensor:
        """Logits of all rows, `[B, V]` in float32, in memory that is used for every token."""
        if self.scores is None:
            self.scores = logits[0].new_zeros(self.num_rows, logits[0].shape[1], dtype=torch.float32)
        first = 0
        for part in logits:
            self.scores[first : first + len(part)] = part
            first += len(part)
        return self.scores[:first]

    def _after_prompt(self, group: Group) -> Tensor:
        assert group.logits is not None
        return group.logits

    def _seen(self, logits: Tensor) -> Tensor | None:
        """`[B, V]`, whether a token stands in a row already; None: nobody asks."""
        if self.decoding.repetition_penalty == 1:
            return None
        if self.seen is None:
            self.seen = torch.zeros(self.num_rows, logits.shape[1], dtype=torch.bool, device=self.device)
        for number, is_new in enumerate((self.count[: len(self.rows)] == 0).tolist()):
            if is_new:
                prompt = torch.tensor(list(self.rows[number].group.request.ids), device=self.device)
                self.seen[number] = False
                self.seen[number, prompt] = True
        return self.seen[: len(self.rows)]

    def _finish(self, ended: Sequence[bool]) -> None:
        """Record the rows that have ended, and close the gaps with the last ones that go on."""
        # 1. record
        counts = self.count[: len(ended)].tolist()
        for number, has_ended in enumerate(ended):
            if has_ended:
                self._record(number, counts[number])

        # 2. close the gaps
        going_on = [number for number, has_ended in enumerate(ended) if not has_ended]
        num_left = len(going_on)
        movers = [number for number in going_on if number >= num_left]
        gaps = [number for number in range(num_left) if ended[number]]
        order = list(range(num_left))
        for gap, mover in zip(gaps, movers, strict=True):
            order[gap] = mover
        self.reader.keep(order)
        self.rows = [self.rows[number] for number in order]
        self.new = self.new[torch.tensor(order, dtype=torch.long, device=self.device)]
        if movers:
            to = torch.tensor(gaps, device=self.device)
            of = torch.tensor(movers, device=self.device)
            for buffer in (self.noise, self.ids, self.logprobs, self.count, self.budget, self.seen, self.routes):
                if buffer is not None:
                    buffer[to] = buffer[of]

    def _record(self, number: int, count: int) -> None:
        row = self.rows[number]
        ids, logprobs = self.ids[number, :count].tolist(), self.logprobs[number, :count].tolist()
        group = row.group
        if not torch.isfinite(self.logprobs[number, count - 1]):
            raise ValueError(f"the model's logits are not finite at new token {count - 1} of prompt {group.place}")
        is_stop = ids[-1] in self.decoding.stop_token_ids
        if not is_stop and self.decoding.stop_strings:
            is_stop = self.decoding.says_stop(ids)
        finish = "stop" if is_stop else "length"
        kept = row.kept if self.keeps_cuts else None
        self.done[group.place][row.sample] = Completion(
            ids, logprobs, finish, [(0, self.version)], kept, routes=self._routes_of(number, count)
        )
