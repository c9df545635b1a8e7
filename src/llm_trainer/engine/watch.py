"""Ranks that watch over each other: one that fails, dies or waits in vain stops the others with an error, never a hang.

Every rank holds a connection to the main process. The operating system closes it when a process ends, however it
ends, also while the others wait inside a collective that cannot notice; a machine that is gone is found by keep-alives.
Over the same connections ranks say why they fail, and, once they stand still, where.
"""

import json
import math
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from socket import SHUT_RDWR, socket
from typing import Any

import torch.distributed

from llm_trainer.engine.peers import connect

GRACE_S = 10.0  # for the main thread to raise, which it does where its collective notices
STANDSTILL_S = 2.0  # a rank that is in one place for longer says where
FAIL_ALIKE_S = 10.0  # that a rank which has failed waits for the others to fail in the same place
LOOKS_EVERY_S = 0.1  # while it waits, whether it has been told to stop
MOST_PLACES = 1000  # of one stretch, that are kept


class RankLostError(RuntimeError):
    """Another process of the run has failed or is gone."""


class CollectiveTimeoutError(RuntimeError):
    """The ranks have waited for each other in vain; all of them are alive."""


class Watch:
    """This rank's connections; `on_duty` is the time during which the others need it.

    Args:
        rank: this process.
        names: how every rank is called in messages, by rank.
        peers: connections by rank: to all others on the main process, to rank 0 elsewhere.
        timeout_s: after which a collective in which a rank is missing fails.
    """

    def __init__(self, rank: int, names: list[str], peers: dict[int, socket], timeout_s: float = math.inf) -> None:
        self.rank, self.names, self.peers = rank, names, peers
        # Those that have not failed wait in a collective meanwhile, and must hear of the cause before it fails.
        self._fail_alike_s = min(FAIL_ALIKE_S, timeout_s / 3)
        self.stopped_by = ""  # what stops this rank: another one and why, or where the ranks part
        self._gone: list[int] = []  # peers whose process has ended
        self._served, self._entered = dict.fromkeys(peers, 0), 0  # times on duty, of each peer to the end; of this rank
        self._is_on_duty, self._heard, self._closed = False, threading.Event(), threading.Event()
        self._last_words: Callable[[], str] = str
        self._sending = threading.Lock()
        self._stretch: list[str] = []  # where this rank has been since the last `reached`
        self._moves = 0
        self._stretches: dict[int, list[str]] = {}  # of ranks that stand still
        self._failed: dict[int, str] = {}  # places where ranks have failed, on the main process
        self._all_failed = threading.Event()
        for peer, connection in peers.items():
            threading.Thread(target=self._listen, args=(peer, connection), daemon=True, name=f"watch {peer}").start()
        threading.Thread(target=self._notice_standstill, daemon=True, name="watch standstill").start()

    # Where this rank is.

    def reached(self, place: str) -> None:
        """Note that this rank begins something, such as `step 3, micro-batch 1`."""
        self._stretch = [place]
        self._moves += 1

    def passed(self, place: str) -> None:
        """Note something on the way that all ranks must do in the same order, such as a forward that gathers weights."""
        if len(self._stretch) < MOST_PLACES:
            self._stretch.append(place)
        self._moves += 1

    def _notice_standstill(self) -> None:
        """Tell the main process where this rank is, when it has been there for a while."""
        seen = told = -1
        while not self._closed.wait(STANDSTILL_S):
            moves, stretch = self._moves, list(self._stretch)
            if self._is_on_duty and moves == seen and moves != told:
                told = moves
                self._stands(self.rank, stretch)
            seen = moves

    def _stands(self, rank: int, stretch: list[str]) -> None:
        """Let the main process know where a rank stands; it looks whether they can ever meet."""
        if self.rank != 0:
            return self._tell({"stretch": stretch})
        self._stretches[rank] = stretch
        if len(self._stretches) == len(self.names):
            parting = where_they_part(self._stretches)
            if parting:
                self._alarm(parting)

    def _give_up(self) -> None:
        """Stop all, from the main process, as a collective has timed out: say where each rank is."""
        self._heard.wait(2 * STANDSTILL_S)  # until all have said it
        places = []
        for rank in range(len(self.names)):
            stretch = self._stretches.get(rank)
            if rank == 0:
                stretch = self._stretch
            place = "an unknown place"
            if stretch:
                place = " > ".join(dict.fromkeys([stretch[0], stretch[-1]]))
            places.append(f"rank {rank} is in {place}")
        self._alarm(
            f"the ranks waited for each other in vain; all are alive: {'; '.join(places)}. If one of them only needs more "
            f"time, raise ddp_timeout_s"
        )

    # What fails on all ranks alike.

    def all_fail(self, place: str) -> bool:
        """Whether all ranks fail in `place`. It is no collective, which those that go on would never come to."""
        self.reached(f"{place}, failed")
        self._note_failure(self.rank, place)
        until = time.monotonic() + self._fail_alike_s
        while not self._all_failed.wait(LOOKS_EVERY_S):
            if self._heard.is_set() or time.monotonic() > until:
                return False
        return True

    def _note_failure(self, rank: int, place: str) -> None:
        """Let the main process know that a rank has failed; it tells all when they all have."""
        if self.rank != 0:
            return self._tell({"failed": place})
        self._failed[rank] = place
        if len(self._failed) == len(self.names) and len({*self._failed.values()}) == 1:
            self._tell({"all_failed": True})
            self._all_failed.set()

    # What others say.

    def _listen(self, peer: int, connection: socket) -> None:
        working = False
        with suppress(OSError), connection.makefile() as lines:  # an error: keep-alives were not answered
            for line in lines:
                said = json.loads(line)
                if "stretch" in said:
                    self._stands(peer, said["stretch"])
                elif "failed" in said:
                    self._note_failure(peer, said["failed"])
                elif "all_failed" in said:
                    self._all_failed.set()
                elif "gave_up" in said:
                    self._give_up()
                elif "alarm" in said:
                    self._alarm(said["alarm"])
                else:
                    working = said["on_duty"]
                    self._served[peer] += not working
        self._gone.append(peer)
        is_awaited = self._is_on_duty and self._served[peer] < self._entered
        if working or is_awaited:
            self._alarm(self._is_gone(peer))

    def _alarm(self, why: str) -> None:
        """Stop this rank, and from the main process all others, unless something stops it already."""
        if self._heard.is_set():
            return
        self.stopped_by = why
        self._heard.set()
        if self.rank == 0:
            self._tell({"alarm": why})
        leave = threading.Timer(GRACE_S, self._leave)
        leave.daemon = True
        leave.start()

    def _leave(self) -> None:
        """End a process whose main thread still waits for the lost rank, inside a collective that does not notice."""
        if self._is_on_duty:
            print(self._message(), file=sys.stderr, flush=True)
            os._exit(1)

    def _tell(self, what: Mapping[str, Any]) -> None:
        line = json.dumps(what).encode() + b"\n"
        with self._sending:
            for connection in self.peers.values():
                with suppress(OSError):  # it is gone, which is noticed where it is listened to
                    connection.sendall(line)

    def _is_gone(self, rank: int) -> str:
        return f"{self.names[rank]} is gone: it failed (see its own output), was killed, or its machine is lost"

    def _message(self) -> str:
        why = self.stopped_by or "another rank is gone (see its own output)"
        return f"{self.names[self.rank]}: {why}. This process stops too. {self._last_words()}"

    # On duty.

    @contextmanager
    def on_duty(self, last_words: Callable[[], str]) -> Iterator[None]:
        """While the block runs, the others need this rank, and it needs them.

        Args:
            last_words: says how to go on, at the end of the message.

        Raises:
            RankLostError: a rank has failed or is gone; the message names it.
            CollectiveTimeoutError: the ranks waited for each other in vain; the message says where each of them is.
        """
        self._last_words = last_words
        self._entered += 1
        for peer in self._gone:
            if self._served[peer] < self._entered:  # else it has finished what this rank begins: there was little to do
                self.stopped_by = self.stopped_by or self._is_gone(peer)
                raise RankLostError(self._message())
        self._is_on_duty = True
        self._tell({"on_duty": True})
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            stop = self._what_to_raise(error)
            self.close()
            if stop is error:
                raise
            raise stop from error
        finally:
            self._is_on_duty = False
            self._tell({"on_duty": False})

    def _what_to_raise(self, error: BaseException) -> BaseException:
        """The error that this rank ends with, having told the others if it began here."""
        if not isinstance(error, RuntimeError) or not is_broken_connection(error):
            self._tell({"alarm": f"{self.names[self.rank]} failed: {in_one_line(error)}"})
            return error
        if not is_timeout(error) or self._heard.is_set():
            self._heard.wait(GRACE_S / 2)  # which rank it is
            return RankLostError(self._message())
        if self.rank == 0:
            self._give_up()
        else:
            self._tell({"gave_up": True})
            self._heard.wait(4 * STANDSTILL_S)  # for what the main process says
        return CollectiveTimeoutError(self._message())

    def close(self) -> None:
        """Hang up; while on duty this is how the others learn at once that this rank fails."""
        self._closed.set()
        for connection in self.peers.values():
            with suppress(OSError):
                connection.shutdown(SHUT_RDWR)


def where_they_part(stretches: Mapping[int, Sequence[str]]) -> str:
    """What ranks do differently that they must do alike, having begun alike; empty if nothing is known of that."""
    ranks = sorted(stretches)
    if any(not stretches[rank] or stretches[rank][0] != stretches[ranks[0]][0] for rank in ranks):
        return ""
    for number in range(1, max(len(stretch) for stretch in stretches.values())):
        found: dict[str, list[int]] = {}
        for rank in ranks:
            if number < len(stretches[rank]):  # else it may still get there
                found.setdefault(stretches[rank][number], []).append(rank)
        if len(found) > 1:
            said = [f"{_ranks(those)} in {place}" for place, those in found.items()]
            return (
                f"the ranks part in {stretches[ranks[0]][0]}: {', '.join(said)}. Every rank must use the same layers of a "
                f"model that is sharded, whatever its data: call them all (and multiply by 0), or use engine: torch"
            )
    return ""


def _ranks(numbers: Sequence[int]) -> str:
    noun = "rank" if len(numbers) == 1 else "ranks"
    return f"{noun} {', '.join(map(str, numbers))}"


def in_one_line(error: BaseException) -> str:
    """`ValueError: what happened`, short enough for another rank's message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:1000]


def is_broken_connection(error: RuntimeError) -> bool:
    """Whether a collective says that a peer is gone or late: gloo has no error class of its own."""
    if type(error).__module__.startswith("llm_trainer."):
        return False  # such as that of a judge, whose own connections failed
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error) or "Connection" in str(error)


def is_timeout(error: BaseException) -> bool:
    """Whether a collective says that it has waited for too long."""
    return "imed out" in str(error) or "timeout" in str(error).lower()


def start(rank: int, host: str, exchange: Callable[[object], list], world_size: int, timeout_s: float) -> Watch | None:
    """Connect all ranks with the main process; None where they cannot reach it (a firewall), which is no reason to stop.

    Args:
        host: address of the main process.
        exchange: gives every rank the values of all ranks, by rank.
        timeout_s: of the collectives of training.
    """
    names, peers = connect(rank, host, exchange, world_size)
    if peers is None:
        if rank == 0:
            print(
                "the ranks cannot watch over each other: not all could open a connection to rank 0 (a firewall?). A rank "
                "that dies may leave the others waiting until ddp_timeout_s",
                file=sys.stderr,
            )
        return None
    watch = Watch(rank, names, peers, timeout_s)
    _not_in_children(watch)
    return watch


def _not_in_children(watch: Watch) -> None:
    """A forked process (a worker of a DataLoader) must not hold the connections open when its parent dies."""
    known = weakref.ref(watch)

    def let_go() -> None:
        if (inherited := known()) is not None:
            for connection in inherited.peers.values():
                os.close(connection.detach())

    os.register_at_fork(after_in_child=let_go)
