"""Ranks that watch over each other: one that dies stops the others with an error that names it, never a hang.

Every rank holds a connection to the main process. The operating system closes it when a process ends, however it
ends, also while the others wait inside a collective that cannot notice; a machine that is gone is found by keep-alives.
"""

import os
import secrets
import socket
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch.distributed

ON_DUTY, OFF_DUTY = "on", "off"  # else a line is the number of a rank that is gone
CONNECT_S = 30.0
GRACE_S = 10.0  # for the main thread to raise, which it does where its collective notices
KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # silent for 30 s: gone


class RankLostError(RuntimeError):
    """Another process of the run is gone."""


class Watch:
    """This rank's connections; `on_duty` is the time during which the others need it.

    Args:
        rank: this process.
        names: how every rank is called in messages, by rank.
        peers: connections by rank: to all others on the main process, to rank 0 elsewhere.
    """

    def __init__(self, rank: int, names: list[str], peers: dict[int, socket.socket]) -> None:
        self.rank, self.names, self.peers = rank, names, peers
        self.lost: int | None = None
        self._gone: list[int] = []  # peers whose process has ended
        self._served, self._entered = dict.fromkeys(peers, 0), 0  # times on duty, of each peer to the end; of this rank
        self._is_on_duty, self._heard = False, threading.Event()
        self._last_words: Callable[[], str] = str
        for peer, connection in peers.items():
            threading.Thread(target=self._listen, args=(peer, connection), daemon=True, name=f"watch {peer}").start()

    def _listen(self, peer: int, connection: socket.socket) -> None:
        working = False
        with suppress(OSError), connection.makefile() as lines:  # an error: keep-alives were not answered
            for line in map(str.strip, lines):
                if line.isdecimal():
                    self._alarm(int(line))
                working = line == ON_DUTY
                self._served[peer] += line == OFF_DUTY
        self._gone.append(peer)
        if working:
            self._alarm(peer)

    def _alarm(self, lost: int) -> None:
        self.lost = lost if self.lost is None else self.lost
        if self.rank == 0:
            self._tell(str(lost))
        self._heard.set()
        leave = threading.Timer(GRACE_S, self._leave)
        leave.daemon = True
        leave.start()

    def _leave(self) -> None:
        """End a process whose main thread still waits for the lost rank, inside a collective that does not notice."""
        if self._is_on_duty:
            print(self._message(), file=sys.stderr, flush=True)
            os._exit(1)

    def _tell(self, line: str) -> None:
        for connection in self.peers.values():
            with suppress(OSError):  # it is gone, which is noticed where it is listened to
                connection.sendall(f"{line}\n".encode())

    def _message(self) -> str:
        who = "another rank" if self.lost is None else self.names[self.lost]
        return (
            f"{self.names[self.rank]}: {who} is gone: it failed (see its own output), was killed, or its machine is lost. "
            f"This process stops too. {self._last_words()}"
        )

    @contextmanager
    def on_duty(self, last_words: Callable[[], str]) -> Iterator[None]:
        """While the block runs, the others need this rank, and it needs them.

        Args:
            last_words: says how to go on, at the end of the message.

        Raises:
            RankLostError: a rank is gone; the message names it.
        """
        self._last_words = last_words
        self._entered += 1
        for peer in self._gone:
            if self._served[peer] < self._entered:  # else it has finished what this rank begins: there was little to do
                self.lost = peer
                raise RankLostError(self._message())
        self._is_on_duty = True
        self._tell(ON_DUTY)
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            lost = isinstance(error, RuntimeError) and is_broken_connection(error)
            if lost:
                self._heard.wait(GRACE_S / 2)  # which rank it is
            self.close()
            if lost:
                raise RankLostError(self._message()) from error
            raise
        finally:
            self._is_on_duty = False
            self._tell(OFF_DUTY)

    def close(self) -> None:
        """Hang up; while on duty this is how the others learn at once that this rank fails."""
        for connection in self.peers.values():
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def is_broken_connection(error: RuntimeError) -> bool:
    """Whether a collective says that a peer is gone: gloo has no error class of its own."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error) or "Connection" in str(error)


def start(rank: int, host: str, exchange: Callable[[object], list], world_size: int) -> Watch | None:
    """Connect all ranks with the main process; None where they cannot reach it (a firewall), which is no reason to stop.

    Args:
        host: address of the main process.
        exchange: gives every rank the values of all ranks, by rank.
    """
    server = socket.create_server(("", 0), backlog=world_size) if rank == 0 else None
    mine = (
        f"rank {rank} (pid {os.getpid()} on {socket.gethostname()})",
        server and server.getsockname()[1],
        secrets.token_hex(),
    )
    everybody = exchange(mine)
    _, port, token = everybody[0]
    try:
        peers = {0: _call(host, port, token, rank)} if server is None else _answer(server, token, world_size)
    except OSError:
        peers = {}
    if not all(exchange(len(peers) == (world_size - 1 if rank == 0 else 1))):
        return None
    for connection in peers.values():
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEP_ALIVE.items():
            if name in vars(socket):  # not every system lets them be chosen
                connection.setsockopt(socket.IPPROTO_TCP, vars(socket)[name], value)
    watch = Watch(rank, [name for name, _, _ in everybody], peers)
    _not_in_children(watch)
    return watch


def _call(host: str, port: int, token: str, rank: int) -> socket.socket:
    connection = socket.create_connection((host, port), timeout=CONNECT_S)
    connection.sendall(f"{token} {rank:8d}\n".encode())
    return connection


def _answer(server: socket.socket, token: str, world_size: int) -> dict[int, socket.socket]:
    """The connections of all other ranks; who does not know the token is not one of them."""
    peers: dict[int, socket.socket] = {}
    with server:
        server.settimeout(CONNECT_S)
        while len(peers) < world_size - 1:
            connection, _ = server.accept()
            connection.settimeout(CONNECT_S)
            said = connection.recv(len(token) + 10, socket.MSG_WAITALL).decode(errors="replace").split()
            if len(said) == 2 and secrets.compare_digest(said[0], token):
                peers[int(said[1])] = connection
            else:
                connection.close()
    return peers


def _not_in_children(watch: Watch) -> None:
    """A forked process (a worker of a DataLoader) must not hold the connections open when its parent dies."""
    known = weakref.ref(watch)

    def let_go() -> None:
        if (inherited := known()) is not None:
            for connection in inherited.peers.values():
                os.close(connection.detach())

    os.register_at_fork(after_in_child=let_go)
