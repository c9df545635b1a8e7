"""A policy behind the OpenAI chat protocol: what an agent says through a session is recorded as ids, log-probs and masks.

`GET .../v1/models` and `POST .../v1/chat/completions` below `/sessions/ID`. Requests that wait are answered together.
"""

import json
import queue
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from llm_trainer.episodes.conversation import Chat, Conversation, Message, Segment
from llm_trainer.episodes.playing import Generate, Limits
from llm_trainer.generation.service import Request

MODEL = "policy"
MOST_BYTES = 64 << 20  # of a request
GATHER_S = 0.01  # that further requests are awaited, once there is one


class Refused(Exception):
    """A request that is answered with an error of the protocol."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(eq=False)
class Turn:
    """A request that waits, and then its answer."""

    session: "Session"
    messages: list[Message]
    tools: list[Mapping[str, Any]]
    most: int | None
    done: threading.Event = field(default_factory=threading.Event)
    answer: dict[str, Any] = field(default_factory=dict)
    refused: Refused | None = None

    def refuse(self, status: int, message: str) -> None:
        """Answer with an error."""
        self.refused = Refused(status, message)
        self.done.set()


class Session:
    """What an agent says to the policy, and hears from it: one episode, of one or several conversations.

    Args:
        number: of its prompt, in the noise.
        sample: its own, in the noise.
    """

    def __init__(self, chat: Chat, stops: Sequence[int], limits: Limits, number: int = 0, sample: int = 0) -> None:
        self.chat, self.stops, self.limits, self.number, self.sample = chat, stops, limits, number, sample
        self._talks: list[tuple[Conversation, list[Message]]] = []  # each with what the agent knows of it

    @property
    def segments(self) -> list[Segment]:
        """The rows of all conversations."""
        found: list[Segment] = []
        for conversation, _ in self._talks:
            found += conversation.segments
        return found

    @property
    def num_turns(self) -> int:
        """Of the policy."""
        return sum(conversation.num_turns for conversation, _ in self._talks)

    @property
    def num_written(self) -> int:
        """Tokens by the policy."""
        return sum(conversation.num_written for conversation, _ in self._talks)

    def text(self) -> str:
        """Of all conversations, as reward functions get it."""
        return "\n".join(conversation.text() for conversation, _ in self._talks)

    def request(self, turn: Turn) -> Request:
        """What the policy is asked.

        Raises:
            Refused: the session has come to a limit, or the chat template refuses the messages.
        """
        left = self.limits.tokens - self.num_written
        if left <= 0 or self.num_turns >= self.limits.turns:
            raise Refused(400, f"the session is over: {self.num_turns} turns, {self.num_written} tokens were written")
        try:
            place = self._place_of(turn)
        except ValueError as error:
            raise Refused(400, str(error)) from None
        conversation, _ = self._talks[place]
        self._talks.append(self._talks.pop(place))  # that of the answer is the last one
        context = self.limits.context
        if context is not None and len(conversation.ids) >= context:
            raise Refused(
                400, f"the messages have {len(conversation.ids)} tokens, and the model's context is {context}"
            )
        most = min(left, turn.most or left)
        return conversation.request(self.number, self.sample, most)._replace(first=self.num_written)

    def _place_of(self, turn: Turn) -> int:
        """The conversation that a request goes on with, or a new one; it has heard what is new then."""
        known = [_comparable(message) for message in turn.messages]
        for place, (conversation, told) in enumerate(self._talks):
            goes_on = len(told) < len(known) and known[: len(told)] == [_comparable(message) for message in told]
            if goes_on and list(conversation.tools or []) == turn.tools:
                conversation.hear(turn.messages[len(told) :])
                told += turn.messages[len(told) :]
                return place
        conversation = Conversation(self.chat, tuple(self.stops), turn.tools)
        conversation.hear(turn.messages)
        self._talks.append((conversation, list(turn.messages)))
        return len(self._talks) - 1

    def write(self, completion: Any, request: Request) -> dict[str, Any]:
        """Take the policy's turn in the last conversation; the protocol's answer."""
        conversation, told = self._talks[-1]
        message = _in_protocol(conversation.write(completion), self.num_turns)
        told.append(message)
        finish = "length" if completion.finish == "length" else "stop"
        if "tool_calls" in message and finish == "stop":
            finish = "tool_calls"
        counts = {"prompt_tokens": len(request.ids), "completion_tokens": len(completion.ids)}
        return {
            "id": f"chatcmpl-{self.number}-{self.sample}-{self.num_turns}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": MODEL,
            "choices": [{"index": 0, "message": message, "finish_reason": finish, "logprobs": None}],
            "usage": {**counts, "total_tokens": sum(counts.values())},
        }


class ChatEndpoint:
    """A server of the protocol on this machine; a context, at whose end it is gone.

    It answers when it is told to (`answer`), in the thread that tells it: nothing else may use the model meanwhile.

    Args:
        host: address that it listens on.
        port: 0: any that is free.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self.sessions: dict[str, Session] = {}
        self._waiting: queue.Queue[Turn] = queue.Queue()
        self._held: list[Turn] = []  # of sessions that have another turn in this round
        self._server = _Server((host, port), self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> "ChatEndpoint":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.is_closing = True
        self._server.shutdown()
        for turn in self._turns():
            turn.refuse(503, "the policy is not there any more")
        self._server.server_close()
        self._thread.join()

    def base_url(self, session: str) -> str:
        """What a client of the protocol is told as its base_url."""
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}/sessions/{session}/v1"

    def submit(self, turn: Turn) -> dict[str, Any]:
        """Wait for the answer to a turn, in the thread of its connection.

        Raises:
            Refused: there is none.
        """
        self._waiting.put(turn)
        while not turn.done.wait(0.2):
            if self._server.is_closing:
                raise Refused(503, "the policy is not there any more")
        if turn.refused is not None:
            raise turn.refused
        return turn.answer

    def answer(self, generate: Generate, seconds: float) -> int:
        """Answer the requests that wait, together; wait for one for so many seconds at most. How many there were."""
        turns = self._turns()
        if not turns:
            try:
                turns.append(self._waiting.get(timeout=seconds))
            except queue.Empty:
                return 0
            time.sleep(GATHER_S)
            turns += self._turns()
        # 1. one turn of each session, so that its noise follows the order of its turns
        now: dict[int, Turn] = {}
        for turn in turns:
            if now.setdefault(id(turn.session), turn) is not turn:
                self._held.append(turn)
        # 2. their requests
        asked: list[tuple[Turn, Request]] = []
        for turn in now.values():
            try:
                asked.append((turn, turn.session.request(turn)))
            except Refused as refused:
                turn.refuse(refused.status, str(refused))
        # 3. their answers
        if asked:
            drawn = generate([request for _, request in asked])
            for (turn, request), (completion,) in zip(asked, drawn, strict=True):
                turn.answer = turn.session.write(completion, request)
                turn.done.set()
        return len(now)

    def _turns(self) -> list[Turn]:
        turns, self._held = self._held, []
        while True:
            try:
                turns.append(self._waiting.get_nowait())
            except queue.Empty:
                return turns


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], endpoint: ChatEndpoint) -> None:
        self.endpoint, self.is_closing = endpoint, False
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing where a client has gone, as one does that was ended."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: it would be a line for every turn."""

    def do_GET(self) -> None:
        self._reply(lambda session, path: self._models(path))

    def do_POST(self) -> None:
        self._reply(self._complete)

    def _reply(self, answer: Any) -> None:
        try:
            session, path = self._session()
            status, found = 200, answer(session, path)
        except Refused as refused:
            status, found = refused.status, _error(str(refused))
            self.close_connection = True  # of this request something may not have been read
        data = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _session(self) -> tuple[Session, str]:
        parts = self.path.partition("?")[0].strip("/").split("/", 2)
        sessions = self.server.endpoint.sessions
        if len(parts) == 3 and parts[0] == "sessions" and parts[1] in sessions:
            return sessions[parts[1]], parts[2]
        raise Refused(404, f"there is no session under {self.path}; expected the base_url that the agent was given")

    @staticmethod
    def _models(path: str) -> dict[str, Any]:
        if path != "v1/models":
            raise Refused(404, f"there is no {path}; expected v1/models or v1/chat/completions")
        return {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "llm-trainer"}]}

    def _complete(self, session: Session, path: str) -> dict[str, Any]:
        size = int(self.headers.get("Content-Length") or 0)
        if size > MOST_BYTES:
            raise Refused(413, f"the request has {size:,} bytes; expected at most {MOST_BYTES:,}")
        body = self.rfile.read(size)
        if path != "v1/chat/completions":
            raise Refused(404, f"there is no {path}; expected v1/chat/completions")
        try:
            asked = json.loads(body)
        except ValueError as error:
            raise Refused(400, f"the request is no JSON: {error}") from None
        return self.server.endpoint.submit(turn_of(session, asked))


def turn_of(session: Session, asked: Any) -> Turn:
    """A request of the protocol. How tokens are drawn is the trainer's: temperature and the like are not looked at.

    Raises:
        Refused: it asks for what there is not.
    """
    if not isinstance(asked, Mapping) or not isinstance(asked.get("messages"), list) or not asked["messages"]:
        raise Refused(400, "expected an object with messages, a list of at least one")
    if asked.get("stream"):
        raise Refused(400, "stream: answers come whole; expected stream: false")
    if asked.get("n") not in (None, 1):
        raise Refused(400, f"n: got {asked['n']}, expected 1: ask again for another answer")
    if asked.get("stop"):
        raise Refused(400, "stop: turns end where the policy ends them; expected no stop")
    most = asked.get("max_completion_tokens") or asked.get("max_tokens")
    if most is not None and (not isinstance(most, int) or most < 1):
        raise Refused(400, f"max_tokens: got {most!r}, expected an integer above 0")
    return Turn(session, [_plain(message) for message in asked["messages"]], list(asked.get("tools") or []), most)


def _plain(message: Any) -> Message:
    """A message as templates take it: content as text, arguments of calls as objects.

    Raises:
        Refused: it is none.
    """
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise Refused(400, f"messages: got {message!r:.200}, expected an object with role and content")
    content = message.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
            raise Refused(400, "messages: got content that is no text; expected text alone")
        content = "".join(str(part.get("text", "")) for part in content)
    plain = {**message, "content": content or ""}
    calls = message.get("tool_calls")
    if not calls:
        plain.pop("tool_calls", None)
        return plain
    try:
        plain["tool_calls"] = [_with_object(call) for call in calls]
    except (TypeError, KeyError, ValueError):
        raise Refused(
            400, f"messages: got tool_calls {calls!r:.200}, expected functions with name and arguments"
        ) from None
    return plain


def _with_object(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    if isinstance(function.get("arguments"), str):
        function["arguments"] = json.loads(function["arguments"] or "{}")
    return {"type": "function", "function": {"name": function["name"], "arguments": function.get("arguments") or {}}}


def _in_protocol(message: Message, turn: int) -> dict[str, Any]:
    """A message of the policy as clients of the protocol expect it."""
    found = {"role": "assistant", "content": message["content"]}
    if "reasoning_content" in message:
        found["reasoning_content"] = message["reasoning_content"]
    calls = []
    for number, call in enumerate(message.get("tool_calls", ())):
        function = call["function"]
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        called = {"name": function["name"], "arguments": arguments}
        calls.append({"id": f"call_{turn}_{number}", "type": "function", "function": called})
    return found | ({"tool_calls": calls} if calls else {})


def _comparable(message: Message) -> tuple[str, str, str]:
    """What two messages are compared by: clients leave out, or add, much of what is beside it."""
    calls = [_with_object(call)["function"] for call in message.get("tool_calls") or ()]
    return message["role"], str(message.get("content") or "").strip(), json.dumps(calls, sort_keys=True)


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
