"""Several rollout servers as one: the least loaded is asked, one that does not answer is left out, questions can be ended."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

from llm_trainer.generation.link import ServerError
from llm_trainer.generation.service import Interrupted
from llm_trainer.generation.vllm_server import Dialect

IN_FLIGHT = 128  # requests of one process at a time; servers queue them
ASK_STOP_SECONDS = 0.1


class Server:
    """One server, and what this process knows of it."""

    def __init__(self, dialect: Dialect) -> None:
        self.ask, self.url = dialect, dialect.link.url
        self.rows = 0  # completions under way
        self.lost = ""  # why it is no longer asked


class Fleet:
    """Servers that are asked the same.

    Args:
        dialects: Of each.

    Attributes:
        first: Number of the server that is asked first where all have as much to do: each process knows only what it asked.
        say: Prints.
    """

    def __init__(self, dialects: Sequence[Dialect]) -> None:
        self.servers = [Server(dialect) for dialect in dialects]
        self.first = 0
        self.say: Callable[[str], None] = print
        self._lock = threading.Lock()
        self._call = threading.local()  # of each thread, which call of `ask_all` it works for

    def ask_all(self, answer: Callable[[Any], Any], asked: Sequence[Any], stop: Callable[[], bool]) -> list[Any]:
        """The answers to many questions, each in a thread.

        Raises:
            Interrupted: `stop` said so; what was under way is aborted.
        """
        ended, threads = threading.Event(), set()

        def begin(one: Any) -> Any:
            threads.add(threading.get_ident())
            self._call.ended = ended
            return answer(one)

        pool = ThreadPoolExecutor(max(1, min(IN_FLIGHT, len(asked))), thread_name_prefix="rollouts")
        waiting: list[Future[Any]] = [pool.submit(begin, one) for one in asked]
        left: set[Future[Any]] = set(waiting)
        try:
            while left:
                done, left = wait(left, ASK_STOP_SECONDS, FIRST_COMPLETED)
                for one in done:
                    one.result()  # the first error ends all
                if stop():
                    raise Interrupted
            return [one.result() for one in waiting]
        finally:
            ended.set()
            pool.shutdown(wait=False, cancel_futures=True)
            left = {one for one in left if not one.cancelled()}
            while left:  # again and again: a thread may be about to ask
                for server in self.servers:
                    server.ask.link.hang_up(threads)
                _, left = wait(left, ASK_STOP_SECONDS)

    def ask_one(self, rows: int, question: Callable[[Dialect], Any]) -> Any:
        """The answer of the server that has least to do; where it fails, of another.

        Raises:
            ServerError: None is left.
            Interrupted: The call that this question belongs to has been ended.
        """
        while True:
            with self._chosen(rows) as server:
                try:
                    return question(server.ask)
                except ServerError as error:
                    if self._call.ended.is_set():
                        raise Interrupted from error
                    self._lose(server, error)

    @contextmanager
    def _chosen(self, rows: int) -> Iterator[Server]:
        """The server with the fewest completions under way; they are `rows` more in the context."""
        with self._lock:
            up = self.up()
            start = self.first % len(up)
            server = min(up[start:] + up[:start], key=lambda one: one.rows)
            server.rows += rows
        try:
            yield server
        finally:
            with self._lock:
                server.rows -= rows

    def to_all(self, action: Callable[[Server], Any]) -> dict[str, Any]:
        """Do something with every server that is left, at once; those that do not answer are left out.

        Returns:
            What it gave, by the address of the server, in the order of the servers and not in that of their answers.

        Raises:
            ServerError: One answers that it has failed, or none is left.
        """
        up = self.up()
        with ThreadPoolExecutor(len(up)) as pool:
            waiting = [pool.submit(action, server) for server in up]
        found = {}
        for server, one in zip(up, waiting, strict=True):
            try:
                found[server.url] = one.result()
            except ServerError as error:
                if not error.is_gone:
                    raise
                self._lose(server, error)
        self.up()
        return found

    def _lose(self, server: Server, error: ServerError) -> None:
        with self._lock:
            is_news, server.lost = not server.lost, server.lost or str(error)
        if is_news:
            self.say(f"WARNING: rollout server left out until the next weights: {error}")

    def up(self) -> list[Server]:
        """The servers that are asked.

        Raises:
            ServerError: There are none.
        """
        up = [server for server in self.servers if not server.lost]
        if not up:
            raise ServerError(
                f"no rollout server is left: {reasons(self.servers)}. Start them again with `llm-trainer rollout-server`, "
                f"then the run: it goes on from its last checkpoint, and with the parts of the rollout that are done",
                is_gone=True,
            )
        return up

    def leave_out(self, lost: Mapping[str, str]) -> None:
        """Ask all servers but those, by address, each with the reason."""
        with self._lock:
            for server in self.servers:
                server.lost = lost.get(server.url, "")


def reasons(servers: Sequence[Server]) -> str:
    return "; ".join(server.lost or server.url for server in servers)
