"""The service in this process: groups, rows that enter and leave, versions, interruptions."""

import pytest

from decoding_models import MODELS, PROMPTS, build_qwen3
from llm_trainer.generation.decoding import Decoding
from llm_trainer.generation.in_process import InProcess
from llm_trainer.generation.service import Interrupted, Request


def never() -> bool:
    return False


@pytest.mark.parametrize("name", MODELS)
def test_rows_enter_and_leave_and_nobody_notices(name: str) -> None:
    """Groups of different sizes and lengths through few rows give what each sample alone gives."""
    model = MODELS[name]()
    requests = [Request(prompt, 7 + number, samples=3 - number % 2) for number, prompt in enumerate(PROMPTS)]
    decoding = Decoding(max_new_tokens=8, seed=3, stop_token_ids=range(8), context_length=12)
    wide = InProcess(model).generate(requests, decoding, never)
    for num_rows in (1, 4):
        narrow = InProcess(model, max_rows=num_rows).generate(requests, decoding, never)
        assert [[one.ids for one in group] for group in narrow] == [[one.ids for one in group] for group in wide]
    assert [len(group) for group in wide] == [3, 2, 3, 2]
    assert len({len(one.ids) for group in wide for one in group}) > 3
    assert len({tuple(one.ids) for one in wide[0]}) > 1
    for group in wide:
        assert all((one.finish == "stop") == (one.ids[-1] < 8) for one in group)


def test_a_request_is_interrupted_between_tokens() -> None:
    asked = []

    def stop() -> bool:
        asked.append(True)
        return len(asked) == 3

    service = InProcess(build_qwen3())
    with pytest.raises(Interrupted):
        service.generate([Request([1, 2], 0)], Decoding(max_new_tokens=9, seed=0), stop)
    assert len(asked) == 3


def test_completions_carry_the_version_that_was_loaded() -> None:
    service = InProcess(build_qwen3())
    service.load([], version=5)
    [[completion]] = service.generate([Request([1, 2], 0)], Decoding(max_new_tokens=2, seed=0), never)
    assert completion.versions == [(0, 5)] and service.version == 5


def test_a_stop_string_ends_a_row_after_the_token_that_completes_it() -> None:
    model = build_qwen3()

    def decode(ids: list[int]) -> str:
        return "".join(chr(97 + token % 26) for token in ids)

    free = InProcess(model).generate([Request([1, 2], 0)], Decoding(max_new_tokens=20, seed=0), never)[0][0]
    text = decode(free.ids)
    decoding = Decoding(max_new_tokens=20, seed=0, stop_strings=[text[4:7]], decode=decode)
    [[stopped]] = InProcess(model).generate([Request([1, 2], 0)], decoding, never)
    assert stopped.finish == "stop" and decode(stopped.ids) == text[: text.index(text[4:7]) + 3]
    with pytest.raises(ValueError, match="decode is None"):
        Decoding(max_new_tokens=1, stop_strings=["x"])
