"""A connection to one rollout server: questions and answers in JSON over HTTP, from several threads at a time."""

import http.client
import json
import socket
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

SAID = 600  # characters of a server's own words that a message repeats


class ServerError(OSError):
    """A server does not answer, or cannot do what it was asked.

    Attributes:
        is_gone: It could not be reached, or did not answer in time; else it said no.
    """

    def __init__(self, message: str, is_gone: bool) -> None:
        super().__init__(message)
        self.is_gone = is_gone


class Link:
    """Asks one server.

    Args:
        url: Such as `http://gpu-3:8000`.
        seconds: That an answer may take.

    Raises:
        ValueError: It is no address of a server.
    """

    def __init__(self, url: str, seconds: float) -> None:
        where = urlsplit(url)
        if where.scheme not in ("http", "https") or not where.hostname:
            raise ValueError(f"rollout server '{url}': expected an address such as http://gpu-3:8000")
        self.url, self.seconds = url.rstrip("/"), seconds
        self._where = where
        self._open: dict[int, http.client.HTTPConnection] = {}  # by the thread that waits
        self._lock = threading.Lock()

    def ask(self, method: str, path: str, body: Any = None, seconds: float | None = None) -> Any:
        """Its answer to one question.

        Raises:
            ServerError: It does not answer, or answers that it has failed.
            ValueError: It does not accept the question.
        """
        kind = http.client.HTTPSConnection if self._where.scheme == "https" else http.client.HTTPConnection
        assert self._where.hostname is not None
        connection = kind(self._where.hostname, self._where.port, timeout=seconds or self.seconds)
        with self._lock:
            self._open[threading.get_ident()] = connection
        try:
            headers = {"Content-Type": "application/json"}
            sent = None if body is None else json.dumps(body)
            connection.request(method, self._where.path.rstrip("/") + path, sent, headers)
            response = connection.getresponse()
            status, answer = response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"{self.url}{path}: {type(error).__name__}: {error}", is_gone=True) from error
        finally:
            with self._lock:
                del self._open[threading.get_ident()]
            connection.close()
        if status >= 400:
            said = f"{self.url}{path} answered {status}: {answer.decode(errors='replace')[:SAID]}"
            if status < 500:
                raise ValueError(said)
            raise ServerError(said, is_gone=False)
        return json.loads(answer) if answer else None

    def hang_up(self, threads: Iterable[int]) -> None:
        """End the questions of these threads; servers abort what nobody waits for."""
        with self._lock:
            under_way = [self._open[thread] for thread in threads if thread in self._open]
        for connection in under_way:
            if connection.sock is not None:
                with suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)
