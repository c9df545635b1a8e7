"""Who is let into the connections of a run, on which network, and what ranks say when they wait in vain."""

import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

from llm_trainer.engine import peers
from llm_trainer.engine.watch import where_they_part

TOKEN = "ab" * 32


def exchange_of(ranks: int) -> Callable[[int], Callable[[object], list]]:
    """A gather over threads, for each of `ranks`."""
    barrier, values = threading.Barrier(ranks), [None] * ranks

    def of(rank: int) -> Callable[[object], list]:
        def exchange(value: Any) -> list:
            values[rank] = value
            barrier.wait(20)
            found = list(values)
            barrier.wait(20)
            return found

        return exchange

    return of


def connect_all(ranks: int, host: str = "127.0.0.1") -> list[Any]:
    """What `connect` gave each rank."""
    exchange, found = exchange_of(ranks), [None] * ranks

    def run(rank: int) -> None:
        found[rank] = peers.connect(rank, host, exchange(rank), ranks)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def test_ranks_of_one_machine_meet_on_its_loopback_alone() -> None:
    (names, of_main), *others = connect_all(3)
    assert sorted(of_main) == [1, 2] and [sorted(found) for _, found in others] == [[0], [0]]
    assert names[1].startswith("rank 1 (pid ")
    for connection in of_main.values():
        assert connection.getsockname()[0] == "127.0.0.1"
    for found in (of_main, *(found for _, found in others)):
        for connection in found.values():
            connection.close()


def test_the_server_stands_on_the_network_that_the_others_come_from() -> None:
    """Also where the main process knows itself by its loopback, as Debian's /etc/hosts has it."""
    own = peers.address_towards("192.0.2.1")  # of documentation (RFC 5737): nothing is sent
    if own == "127.0.0.1":
        pytest.skip("this machine has no network but the loopback")
    for others, expected in ((["127.0.0.1", "192.0.2.1"], own), (["127.0.1.1"], "127.0.0.1")):
        with peers._listen_towards(others, backlog=1) as server:
            assert server.getsockname()[0] == expected


def test_strangers_are_ignored_whether_they_speak_or_not() -> None:
    server = socket.create_server(("127.0.0.1", 0))
    address = server.getsockname()
    silent, wrong, hasty = (socket.create_connection(address) for _ in range(3))
    wrong.sendall(f"{'cd' * 32} {1:8d}\n".encode())
    hasty.close()
    caller = threading.Thread(target=lambda: friends.append(peers._call(*address, TOKEN, 1)))
    friends: list[socket.socket] = []
    caller.start()
    found = peers.answer(server, TOKEN, 1)
    caller.join()
    assert list(found) == [1] and found[1].getpeername() == friends[0].getsockname()
    for connection in (silent, wrong, *friends, *found.values()):
        connection.close()


def test_ranks_part_where_they_do_different_things_after_the_same_beginning() -> None:
    begin, end = "step 3, micro-batch 1", "the end of its forward"
    assert where_they_part({0: [begin, "layers.0", end], 1: [begin, "layers.0"]}) == ""  # it may still get there
    assert where_they_part({0: [begin, "layers.0"], 1: ["step 3, beginning"]}) == ""
    text = where_they_part(
        {0: [begin, "layers.0", end], 1: [begin, "layers.0", "layers.2"], 2: [begin, "layers.0", end]}
    )
    assert text.startswith(f"the ranks part in {begin}: ranks 0, 2 in {end}, rank 1 in layers.2. Every rank must use")
