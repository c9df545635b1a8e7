"""A rollout server in this process: the protocol of vLLM's over a tiny model, and what can go wrong with it."""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import torch
from torch import Tensor, nn

from llm_trainer.generation.decoding import Decoding
from llm_trainer.generation.in_process import InProcess
from llm_trainer.generation.servers import Servers
from llm_trainer.generation.service import Request
from llm_trainer.generation.transports import Files
from llm_trainer.generation.verify import Verified, probe_ids
from llm_trainer.generation.vllm_server import Vllm
from llm_trainer.generation.worker.llm_trainer_wire import (
    Bucket,
    Hashes,
    Joining,
    check_file,
    joined,
    receive,
    tensors_of,
)

BLOCK = 4  # tokens of a block of the prefix cache
FIRST = "default"  # what vLLM calls the weights that it was started with


class FakeServer:
    """Answers as vLLM does with `llm_trainer_vllm.py` in its workers. Use it as a context.

    Args:
        model: Whose weights it is started with.
        options: What it says of itself instead (`llm_trainer_facts`).

    Attributes:
        fault: What goes wrong from now on; one of `FAULTS`, or what a test reads below.
        asked: Paths of the requests, in their order.
        seconds: That every completion takes longer.
        hung_up: Completions whose trainer did not wait for them.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.first = deepcopy(model)
        self.options, self.fault, self.seconds = options, "", 0.0
        self.asked: list[str] = []
        self.hung_up = 0
        self.lock = threading.RLock()
        self.running, self.ended = threading.Event(), threading.Event()
        self.restart()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, answer = server.answer(urlsplit(self.path).path, json.loads(body) if body else {})
                data = json.dumps(answer).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    server.hung_up += 1

            do_GET = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        self.handler = Handler
        self.port = 0
        self.open()

    def open(self) -> None:
        """Listen, on the port of before."""
        ThreadingHTTPServer.allow_reuse_address = True
        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), self.handler)
        self.port = self.http.server_port
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.ended.clear()
        self.thread.start()

    def close(self) -> None:
        """Do not answer any more."""
        self.ended.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def __enter__(self) -> "FakeServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def restart(self) -> None:
        """As after a start: with the weights of the folder that it was given."""
        self.sampler = InProcess(deepcopy(self.first))
        self.sampler.version = 0
        self.label, self.started = FIRST, uuid4().hex
        self.hashes: dict[str, str] = {}
        self.arrived_label = ""
        self.cached: dict[tuple[Any, ...], int] = {}
        self.group: Any = None
        self.running.set()
        self.updating: list[Bucket] | None = None

    # What it is asked.

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        self.asked.append(path)
        method = getattr(self, "on" + path.replace("/", "_"), None)
        if method is None:
            return 404, {"detail": "Not Found"}
        try:
            return 200, method(body)
        except Exception as error:  # vLLM says so and lives on
            return 500, {"error": {"message": f"Worker failed with error '{error}'"}}

    def on_collective_rpc(self, body: dict[str, Any]) -> Any:
        return {"results": [getattr(self, body["method"])()]}

    def llm_trainer_facts(self) -> dict[str, Any]:
        config = self.first.config.to_dict()
        found = {
            "started": self.started,
            "config": config,
            "dtype": "float32",
            "context": config["max_position_embeddings"],
            "max_rows": 3,
            "block_size": BLOCK,
            "is_processed": True,
            "returns_kept": False,
            "is_torn": False,
        }
        return found | self.options

    def llm_trainer_arrived(self) -> dict[str, Any]:
        return {"version": self.arrived_label, "hashes": self.hashes}

    def llm_trainer_forget(self) -> None:
        self.updating = None

    def on_pause(self, body: Any) -> None:
        with self.lock:  # what is under way ends before
            self.running.clear()

    def on_resume(self, body: Any) -> None:
        self.running.set()

    def on_init_weight_transfer_engine(self, body: Any) -> None:
        joining = Joining(**body["init_info"])
        self.group = joined(joining, joining.first_rank)

    def on_start_weight_update(self, body: Any) -> None:
        assert self.updating is None, "start_weight_update called while a weight update is already active"
        self.updating, self.new, self.seen = [], {}, Hashes()

    def on_update_weights(self, body: Any) -> None:
        bucket = Bucket(**body["update_info"])
        assert self.updating is not None and not self.running.is_set()
        if bucket.path:
            check_file(bucket)
            tensors = tensors_of(bucket, torch.device("cpu"))
        else:
            tensors = receive(self.group, bucket, torch.device("cpu"))
        self.updating.append(bucket)
        for name, tensor in tensors:
            self.seen.note(name, tensor)
            self.new[name] = tensor

    def on_finish_weight_update(self, body: Any) -> None:
        assert self.updating is not None
        own = self.sampler.model.state_dict()
        head = own["lm_head.weight"].clone()
        for name, tensor in self.new.items():
            own[name].copy_(tensor)
        if self.fault == "head left old":
            self.sampler.model.lm_head.weight = nn.Parameter(head)
        self.hashes = {name: f"{number:016x}" for name, number in self.seen.read().items()}
        if self.updating:
            self.arrived_label = self.updating[-1].version
        self.updating = None

    def on_reset_prefix_cache(self, body: Any) -> Any:
        if self.fault != "old prefix cache":
            self.cached.clear()
        return {"success": True}

    def on_update_weight_version(self, body: Any) -> None:
        self.label = body["new_version"]

    def on_inference_v1_generate(self, body: Any) -> Any:
        ids, how = body["token_ids"], body["sampling_params"]
        self.ended.wait(self.seconds)
        if self.fault == "dies":
            threading.Thread(target=self.close).start()
            raise RuntimeError("dying")
        with self._running():
            if how.get("prompt_logprobs") is not None:
                (scores,) = self.sampler.logprobs([ids], Decoding(max_new_tokens=1))
                found = [{str(token): {"logprob": score}} for token, score in zip(ids[1:], scores, strict=True)]
                return {"prompt_logprobs": [None, *found], "choices": []}
            return self._drawn(ids, how, body.get("cache_salt"))

    @contextmanager
    def _running(self) -> Iterator[None]:
        """One request at a time, and none while it is paused."""
        while self.running.wait(10):
            with self.lock:
                if self.running.is_set():
                    yield
                    return
        raise RuntimeError("paused for ever")

    def _drawn(self, ids: list[int], how: dict[str, Any], salt: str) -> Any:
        biased = how.get("logit_bias", {})
        decoding = Decoding(
            max_new_tokens=how["max_tokens"],
            temperature=how["temperature"],
            repetition_penalty=how["repetition_penalty"],
            stop_token_ids=how["stop_token_ids"],
            top_k=how.get("top_k", 0),
            top_p=how.get("top_p", 1.0),
            suppress_tokens=[int(token) for token in biased],
            seed=0,
        )
        requests = [Request(ids, how["seed"] + sample) for sample in range(how["n"])]
        written = self.sampler.generate(requests, decoding, lambda: False)
        if self.fault == "old prefix cache":
            salt = ""
        blocks = [(salt, *ids[:end]) for end in range(BLOCK, len(ids), BLOCK)]
        num_cached = BLOCK * sum(block in self.cached for block in blocks)
        self.cached |= dict.fromkeys(blocks, 1)
        choices = [self._choice(number, one) for number, (one,) in enumerate(written)]
        details = {"cached_tokens": num_cached}
        return {"choices": choices, "usage": {"prompt_tokens_details": details}}

    def _choice(self, number: int, one: Any) -> Any:
        content = [{"token_id": token, "logprob": score} for token, score in zip(one.ids, one.logprobs, strict=True)]
        return {
            "index": number,
            "token_ids": one.ids,
            "finish_reason": one.finish,
            "logprobs": {"content": content},
            "weight_versions": [{"version": self.label, "start": 0, "end": len(one.ids)}],
            "sampling_mask": one.kept if self.options.get("returns_kept") else None,
        }


def streamed(model: nn.Module) -> list[tuple[str, Tensor]]:
    """As an engine streams weights: tied tensors once."""
    seen, found = set(), []
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found.append((name, tensor.detach()))
    return found


def never() -> bool:
    return False


def verified(model: nn.Module, *urls: str, **options: Any) -> Verified:
    """Servers behind the checks of a run."""
    ours = InProcess(model)

    def score(rows: list[list[int]]) -> list[list[float]]:
        return ours.logprobs(rows, Decoding(max_new_tokens=1))

    return Verified(
        Servers(list(urls), **options), score, probe_ids(ours.model.config.vocab_size), where="the rollout servers"
    )


def moved(model: nn.Module, by: float = 0.05) -> nn.Module:
    """The model after a step."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * by)
    return model


# What may go wrong on the way.


class Skips(Vllm):
    """The update never comes to the server."""

    def begin_update(self) -> None: ...

    def update(self, bucket: Any) -> None: ...

    def finish_update(self) -> None: ...


class Unannounced(Vllm):
    """The version moves, and the weights do not."""

    def update(self, bucket: Any) -> None: ...


class Drops(Files):
    """One tensor is not in the file."""

    def send(self, version: str, tensors: Any, to_all: Any) -> None:
        super().send(version, tensors[:-1], to_all)


class Swaps(Files):
    """Two tensors of a shape have each other's names."""

    def send(self, version: str, tensors: Any, to_all: Any) -> None:
        names = [name for name, _ in tensors]
        one, other = (names.index(f"model.layers.{layer}.mlp.up_proj.weight") for layer in (0, 1))
        names[one], names[other] = names[other], names[one]
        super().send(version, list(zip(names, [tensor for _, tensor in tensors], strict=True)), to_all)


class Truncates(Files):
    """The file is cut short."""

    def send(self, version: str, tensors: Any, to_all: Any) -> None:
        def shorter(update: Any) -> None:
            assert self._update is not None
            path = next(self._update.iterdir())
            os.truncate(path, path.stat().st_size // 2)
            to_all(update)

        super().send(version, tensors, shorter)
