"""A judge over HTTP: a server of the test's own says what a judge would."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from llm_trainer.config.errors import ConfigError
from llm_trainer.rewards import judge
from llm_trainer.rewards.functions import RewardFunctions
from llm_trainer.rewards.judge import Judge


class Server(BaseHTTPRequestHandler):
    """Answers by what is written in the completion that it is to judge."""

    asked: ClassVar[list[dict[str, Any]]] = []
    keys: ClassVar[list[str | None]] = []
    failures = 0

    def do_POST(self) -> None:
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Server.asked.append(question)
        Server.keys.append(self.headers.get("Authorization"))
        text = question["messages"][0]["content"]
        status, said = 200, "It is good.\nScore: 7"
        if "TWICE" in text and Server.failures < 1:
            Server.failures += 1
            status = 503
        if "REFUSED" in text:
            status = 401
        if "NONSENSE" in text:
            said = "I cannot say."
        if "TOO MUCH" in text:
            said = "Score: 70"
        body = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
        if "NO JSON" in text:
            body = b"<html>"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def test_scores_and_what_is_missing(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "BACK_OFF_S", 0.01)
    monkeypatch.setenv("A_KEY", "secret")
    functions = RewardFunctions({"judge": Judge(url, "a-model", api_key="A_KEY")}, in_process=True, max_failed=1.0)
    completions = ["good {prompt}", "TWICE", "REFUSED", "NONSENSE", "TOO MUCH", "NO JSON"]
    rewards = functions(["Why?"] * 6, completions, ["since", *[None] * 5])
    assert rewards.values[[0, 1, 4], 0].tolist() == [0.7, 0.7, 1.0]
    assert rewards.causes == {"unavailable": 3}
    assert "HTTP Error 401" in rewards.errors[2]["judge"]
    assert "found no score in what the judge wrote" in rewards.errors[3]["judge"]
    assert "JSONDecodeError" in rewards.errors[5]["judge"]
    first = next(asked for asked in Server.asked if "good" in asked["messages"][0]["content"])
    text = first["messages"][0]["content"]
    assert "Why?" in text and "good {prompt}" in text and "Reference answer:\nsince" in text
    assert first["model"] == "a-model" and set(Server.keys) == {"Bearer secret"}


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "BACK_OFF_S", 0.01)
    functions = RewardFunctions(Judge("http://127.0.0.1:9/v1", "m"), in_process=True, max_failed=1.0)
    rewards = functions(["p"], ["c"], [None])
    assert rewards.causes == {"unavailable": 1}
    assert "got no answer from http://127.0.0.1:9/v1 in 3 attempts: " in rewards.errors[0]["Judge"]


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ConfigError, match="the prompt has no {completion}"):
        Judge("http://x", "m", prompt="grade this")
    with pytest.raises(ConfigError, match="A_KEY_THAT_IS_NOT_SET is not set"):
        Judge("http://x", "m", api_key="A_KEY_THAT_IS_NOT_SET")
