"""One idea per line: what would have to be taken apart in the head to be read is not written, in any file."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src" / "llm_trainer"
FILES = sorted(SOURCE.rglob("*.py"))
Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


def inside(node: ast.AST, kind: type[ast.AST] | type[Comprehension]) -> bool:
    """Whether anything of a kind is in `node`, itself not counted."""
    return any(isinstance(found, kind) for found in ast.walk(node) if found is not node)


def arguments(call: ast.Call) -> list[ast.expr]:
    return [*call.args, *(keyword.value for keyword in call.keywords)]


def nested_comprehensions(tree: ast.AST) -> Iterator[int]:
    """Comprehensions with several `for`, or with another comprehension in them."""
    for node in ast.walk(tree):
        if isinstance(node, Comprehension) and (len(node.generators) > 1 or inside(node, Comprehension)):
            yield node.lineno


def walruses_in_comprehensions(tree: ast.AST) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, Comprehension) and inside(node, ast.NamedExpr):
            yield node.lineno


def conditionals_as_arguments(tree: ast.AST) -> Iterator[int]:
    """`f(a if b else c)`: the value wants a name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from (value.lineno for value in arguments(node) if isinstance(value, ast.IfExp))


def conditionals_in_strings(tree: ast.AST) -> Iterator[int]:
    """A conditional anywhere inside the braces of an f-string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FormattedValue) and inside(node, ast.IfExp):
            yield node.lineno


RULES = [nested_comprehensions, walruses_in_comprehensions, conditionals_as_arguments, conditionals_in_strings]
HARD_TO_READ = """
rows = [cell for row in table for cell in row]
sums = [sum(x for x in row) for row in table]
found = [match for line in lines if (match := search(line))]
f(a if b else c)
f(name=a if b else c)
text = f"{'a' if b else 'c'}"
text = f"{'a' if b else 'c'!r:>4}"
"""
EASY_TO_READ = """
cells = [cell.strip() for cell in row if cell]
if match := search(line):
    pass
name = a if b else c
f([*cells], name=name)
text = f"{name:>4}"
"""


@pytest.mark.parametrize("rule", RULES)
def test_no_line_has_to_be_taken_apart(rule) -> None:
    found = []
    for path in FILES:
        for line in rule(ast.parse(path.read_text())):
            found.append(f"{path.relative_to(SOURCE)}:{line}")
    assert len(found) == 0, f"{rule.__name__}: {', '.join(found)}"


def test_the_rules_see_what_they_are_for() -> None:
    counts = [len(list(rule(ast.parse(HARD_TO_READ)))) for rule in RULES]
    assert counts == [2, 1, 2, 2]
    assert not any(list(rule(ast.parse(EASY_TO_READ))) for rule in RULES)
