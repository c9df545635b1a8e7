"""Connections from all ranks to the main process, on the network that they share and to nobody else."""

import ipaddress
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

CONNECT_S = 30.0
KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # silent for 30 s: gone


def connect(
    rank: int, host: str, exchange: Callable[[object], list], world_size: int
) -> tuple[list[str], dict[int, socket.socket] | None]:
    """Connect all ranks with the main process.

    Args:
        host: address of the main process, as the ranks know it.
        exchange: gives every rank the values of all ranks, by rank.

    Returns:
        How each rank is called in messages; and connections by rank: to all others on the main process, to rank 0
        elsewhere, None on all ranks where one of them could not connect.
    """
    # 1. who is where
    name = f"rank {rank} (pid {os.getpid()} on {socket.gethostname()})"
    everybody = exchange((name, address_towards(host)))
    names = [name for name, _ in everybody]

    # 2. the main process listens, with a word that only this run knows
    server, listening = None, None
    if rank == 0:
        with suppress(OSError):
            server = _listen_towards([address for _, address in everybody[1:]], backlog=world_size)
            listening = (*server.getsockname()[:2], secrets.token_hex())
    address = exchange(listening)[0]

    # 3. the others call
    peers: dict[int, socket.socket] = {}
    if address is not None:
        with suppress(OSError):
            if server is not None:
                peers = answer(server, address[2], world_size - 1)
            else:
                address_of_main, port, token = address
                peers = {0: _call(address_of_main, port, token, rank)}
    expected = world_size - 1 if rank == 0 else 1
    if not all(exchange(len(peers) == expected)):
        for connection in peers.values():
            connection.close()
        return names, None
    for connection in peers.values():
        _keep_alive(connection)
    return names, peers


def address_towards(host: str) -> str:
    """This machine's own address on the way to `host`. Nothing is sent."""
    with suppress(OSError):
        for family, kind, _, _, address in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind) as probe, suppress(OSError):
                probe.connect(address)
                return str(probe.getsockname()[0])
    return "127.0.0.1"


def _listen_towards(others: list[str], backlog: int) -> socket.socket:
    """A server on the interface that leads to the `others`: the loopback where all of them are on this machine.

    Trap: what the main process is called (MASTER_ADDR) may lead it to its own loopback and others to its network.
    """
    far = [address for address in others if not ipaddress.ip_address(address).is_loopback]
    own = address_towards(far[0]) if far else address_towards(others[0])
    family = socket.AF_INET6 if ":" in own else socket.AF_INET
    return socket.create_server((own, 0), family=family, backlog=backlog)


def _call(address: str, port: int, token: str, rank: int) -> socket.socket:
    connection = socket.create_connection((address, port), timeout=CONNECT_S)
    connection.sendall(f"{token} {rank:8d}\n".encode())
    return connection


def answer(server: socket.socket, token: str, number: int) -> dict[int, socket.socket]:
    """The connections of `number` ranks; who does not know the token, or says nothing, is not one of them."""
    peers: dict[int, socket.socket] = {}

    def greet(connection: socket.socket) -> None:
        # Each in a thread of its own: a stranger that says nothing keeps nobody waiting.
        with suppress(OSError):
            connection.settimeout(CONNECT_S)
            said = connection.recv(len(token) + 10, socket.MSG_WAITALL).decode(errors="replace").split()
            if len(said) == 2 and secrets.compare_digest(said[0].encode(), token.encode()):
                peers[int(said[1])] = connection
                return
        connection.close()

    deadline = time.monotonic() + CONNECT_S
    with server:
        server.settimeout(0.05)
        while len(peers) < number and time.monotonic() < deadline:
            with suppress(TimeoutError):
                connection, _ = server.accept()
                threading.Thread(target=greet, args=(connection,), daemon=True, name="greet").start()
    return peers


def _keep_alive(connection: socket.socket) -> None:
    """Let the operating system notice a machine that is gone."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEP_ALIVE.items():
        if name in vars(socket):  # not every system lets them be chosen
            connection.setsockopt(socket.IPPROTO_TCP, vars(socket)[name], value)
