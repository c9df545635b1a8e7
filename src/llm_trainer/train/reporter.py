"""What a run says and writes: to the console and the log files, all of it from here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_trainer.disk import FULL_OR_BROKEN, storage_failure
from llm_trainer.state import Choice, Progress
from llm_trainer.terminal import printable
from llm_trainer.train.log_files import Answers, FullDisk, JsonLines, LearningRates, TextLog, set_aside
from llm_trainer.train.writers import ConsoleWriter, Writer, even_on_a_full_disk, open_writers

if TYPE_CHECKING:
    from llm_trainer.config.options import Settings


class Reporter:
    """What a run says and writes. Only the main process does either."""

    def __init__(self, is_main: bool, progress: Progress) -> None:
        """`progress`: where the run stands; what is written of its last step is noted there, to be written again."""
        self.is_main = is_main
        self.choices: dict[str, Choice] = {}  # what was left to the machine, by name
        self.facts: dict[str, Any] = {}  # what else the first line of metrics.jsonl says
        self._progress = progress
        self._writers: Sequence[Writer] = ()
        self._learning_rates: LearningRates | None = None
        self._answers: Answers | None = None

    def open(self, folder: Path, save_dir: Path, settings: Settings, total_steps: int | None) -> None:
        """Give metrics to the writers that `settings` ask for from now on, and messages to the console among them.

        The files begin with what was chosen. Lines of the last step are cut off and written again, so that each is there
        once.

        Args:
            folder: of the log files.
            save_dir: of the run; the logs of another one stay, under other names.
            settings: name further writers.
            total_steps: the run's length.
        """
        # 1. the files, up to the step before the last one
        progress = self._progress
        last_step = last_answered = progress.step - 1
        if progress.hooks_done.get("sample") == progress.step:
            last_answered = progress.step  # the prompts are not asked again
        trouble = FullDisk(self.warn)
        kept = set_aside(folder, save_dir) if self.is_main else None
        if kept is not None:
            self.warn(kept)
        self._writers = open_writers(
            folder,
            is_main=self.is_main,
            total_steps=total_steps,
            last_step=last_step,
            extra=settings.writers,
            live=settings.progress,
            config=asdict(settings),
            trouble=trouble,
        )
        if self.is_main:
            self._learning_rates = LearningRates(folder, last_step, trouble)
            self._answers = Answers(folder, last_answered, trouble)

        # 2. what was chosen, and the lines of the last step
        if self.choices or self.facts:
            self._write_choices(self.choices.values(), **self.facts)
        if progress.step:
            self.note_learning_rate(progress.step, progress.learning_rate)
        written, progress.lines = progress.lines, []
        for values in written:
            self.write(values)
        if progress.words:
            self.note_words(progress.words)

    def close(self) -> None:
        """Finish what is open; messages are printed from now on."""
        for writer in self._writers:
            with self._without(writer):
                writer.close()
        for file in (self._learning_rates, self._answers):
            if file is not None:
                file.close()
        self._writers, self._learning_rates, self._answers = [], None, None

    @contextmanager
    def _without(self, writer: Any) -> Iterator[None]:
        """A library whose disk is full loses its metrics; the run and the other writers do not."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            reason = storage_failure(error, FULL_OR_BROKEN)
            if reason is None:
                raise
            self._writers = [other for other in self._writers if other is not writer]
            self.warn(f"{type(writer).__name__}: {reason}; it gets no more metrics. metrics.jsonl has all of them")

    def say(self, message: str) -> None:
        """Print above any progress bar."""
        if not self.is_main:
            return
        message = printable(message)
        for writer in self._writers:
            if isinstance(writer, ConsoleWriter):
                writer.say(message)
                return
        with even_on_a_full_disk():
            print(message, flush=True)

    def warn(self, message: str) -> None:
        """Print a warning."""
        self.say(f"WARNING: {message}")

    def write(self, values: dict[str, float]) -> None:
        """Give metrics of the last step to all writers."""
        self._progress.lines.append(values)
        for writer in self._writers:
            with self._without(writer):
                writer.write(self._progress.step, values)

    def note_words(self, words: str) -> None:
        """Print words of the algorithm about the last step, and put them into log.txt."""
        step = self._progress.step
        self._progress.words = words
        self.say(f"step {step:,}  {words}")
        for writer in self._writers:
            if isinstance(writer, TextLog):
                writer.note(step, words)

    def note_choice(self, choice: Choice, is_said: bool = False) -> None:
        """Note what the machine chose; one that comes when the logs are open is said, unless it was, and replaces the one of
        its name.
        """
        if self.choices.get(choice.name) == choice:
            return
        self.choices[choice.name] = choice
        if self._writers:
            if not is_said:
                self.say(f"step {self._progress.step:,}  {choice}")
            self._write_choices([choice])

    def _write_choices(self, choices: Iterable[Choice], **facts: Any) -> None:
        chosen = {choice.name: choice.facts for choice in choices}
        for writer in self._writers:
            if isinstance(writer, JsonLines):
                writer.note_choices(self._progress.step, chosen, **facts)

    def note_learning_rate(self, step: int, learning_rate: float) -> None:
        """Put the learning rate of a step into lr.txt."""
        if self._learning_rates is not None:
            self._learning_rates.note(step, learning_rate)

    def note_answer(self, step: int, prompt: str, answer: str) -> None:
        """Print an answer to one of `eval_prompts`, and put it into gen.txt."""
        self.say(f"[step {step}] {prompt!r} -> {answer!r}")
        if self._answers is not None:
            self._answers.note(step, prompt, answer)
