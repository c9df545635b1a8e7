"""A GGUF file asked through llama.cpp: see `probe.Asked`.

llama.cpp runs in a process of its own (`llama_cpp_process.py`), by the package xllamacpp: a native library that dies over a
damaged file, or over a processor that it was not built for, takes nothing else with it.
"""

import json
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from llm_trainer.config.errors import ConfigError, require
from llm_trainer.export.gate import Refused
from llm_trainer.export.gguf_writer import Declared
from llm_trainer.export.probe import Conversation, Greedy, Rendered

_LINES_OF_LOG = 8


class LlamaCpp:
    """llama.cpp with a file open, until nobody holds this object.

    Args:
        path: the file.
        declared: what the file says of itself.
        stop_token_ids: where an answer should end. llama.cpp ends it at further tokens, by their names, whatever a file
            says; only those are answered that are asked for or declared.
        facts: what is known of the file besides: see `probe.Probe.facts`.
        context: the most tokens of a question.

    Raises:
        ConfigError: the package xllamacpp is missing, or this build of it does not run on this processor.
        Refused: llama.cpp does not open the file.
    """

    def __init__(
        self,
        path: Path,
        declared: Declared,
        stop_token_ids: Sequence[int],
        facts: Mapping[str, Any] | None = None,
        context: int = 512,
        threads: int = 1,
    ) -> None:
        require("xllamacpp", "--to gguf, which has llama.cpp run what was exported,", "use --to hf or --to merged")
        self._path, self._declared, self._stops = path, declared, stop_token_ids
        self._facts = {"tied": declared.is_tied, **(facts or {})}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "llm_trainer.export.llama_cpp_process", str(path), str(context), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        self.close = weakref.finalize(self, _end, self._process, self._log)
        self._answer()

    @property
    def sight(self) -> None:
        """`gguf.py` takes no models that see."""

    def tokenise(self, text: str) -> list[int]:
        ids: list[int] = self._ask("tokenise", text, True)
        return ids

    def render(self, conversation: Conversation) -> Rendered | None:
        if not self._declared.has_template:  # llama.cpp would take one of its own
            return None
        body: dict[str, Any] = {
            "messages": conversation.messages,
            "add_generation_prompt": conversation.add_generation_prompt,
        }
        if conversation.enable_thinking is not None:
            body["chat_template_kwargs"] = {"enable_thinking": conversation.enable_thinking}
        text = self._ask("render", body)
        if text is None:
            return None
        # llama.cpp takes the bos off what the template has printed, if it is one that tokenising adds.
        text = self._declared.added_before + text
        return Rendered(text, self._ask("tokenise", text, False))

    def stop_token_ids(self) -> list[int]:
        wanted = {*self._stops, *self._declared.stop_ids}
        return [stop for stop in self._ask("stop_ids") if stop in wanted]

    def logprobs(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        return [self._ask("logprobs", list(row)) for row in rows]

    def distributions(self, row: Sequence[int]) -> list[list[float]]:
        """Log-probabilities of all ids at each place of a row but the first, `[T - 1, V]`: for small vocabularies."""
        found: list[list[float]] = self._ask("distributions", list(row))
        return found

    def drawing(self) -> dict[str, Any]:
        """How the next token is drawn where nobody says anything, in llama.cpp's words."""
        found: dict[str, Any] = self._ask("drawing")
        return found

    def greedy(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Greedy]:
        return [Greedy(**self._ask("greedy", list(prompt), max_new_tokens)) for prompt in prompts]

    def facts(self) -> dict[str, Any]:
        return self._facts

    def _ask(self, *question: Any) -> Any:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer says why
        return self._answer()

    def _answer(self) -> Any:
        """
        Raises:
            Refused, ConfigError: the process has died.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        status = self._process.wait()
        self._log.seek(0)
        lines = [line for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        said = "\n  ".join(lines[-_LINES_OF_LOG:])
        self.close()
        if status == -signal.SIGILL:
            raise ConfigError(
                "--to gguf: the installed xllamacpp was built for another processor (SIGILL; its wheels need AVX2); expected "
                "one that runs here, since what is exported is run before it is handed out: export on another machine, or "
                "build xllamacpp on this one"
            )
        how = f"died with {signal.Signals(-status).name}" if status < 0 else "gave up"
        raise Refused(f"llama.cpp {how} over {self._path.name}; it said:\n  {said}")


def _end(process: "subprocess.Popen[bytes]", log: IO[bytes]) -> None:
    assert process.stdin is not None and process.stdout is not None
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, log):
        with suppress(BrokenPipeError):  # a question that nobody has read
            stream.close()
