"""The list of mistakes that `make mutate` makes on purpose keeps up with the code; what it finds is in docs/results.md."""

import pytest

from mutate import MUTATIONS, ROOT, SOURCE, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mistake_can_still_be_made_and_its_tests_are_there(mutation: Mutation) -> None:
    text = (SOURCE / mutation.file).read_text()
    compile(mutation.made_in(text), mutation.file, "exec")
    for test in mutation.tests:
        file, _, name = test.partition("::")
        assert name.partition("[")[0] in (ROOT / file).read_text(), test


def test_a_mistake_whose_text_is_gone_is_said() -> None:
    with pytest.raises(ValueError, match="mine: src/llm_trainer/state.py has 'no such text' 0 times, expected once"):
        Mutation("mine", "state.py", "no such text", "", ()).made_in((SOURCE / "state.py").read_text())
