"""Files of real data and what happens to them: read right, refused rightly, refused wrongly, or read wrong.

    python benchmarks/read_files.py ../shared/data

Every file as it is; as another format would hold it; with one bad row; under other names of columns; rows in the dialects of
other frameworks; and files that have to be refused. To judge an older revision, put its `src` on PYTHONPATH.
"""

import ast
import gzip
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.tokenizer import load_tokenizer
from llm_trainer.data.kinds import DataOptions, get_kind
from llm_trainer.data.load import load
from llm_trainer.data.read.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
FEW = 20  # rows of a file that is changed
BAD_ROWS = {
    "half a surrogate pair": rb'{"text": "\ud83d", "id": 1}',
    "an integer of 5,000 digits": b'{"text": "x", "id": ' + b"7" * 5000 + b"}",
    "brackets 1,000 deep": b'{"text": "x", "id": ' + b"[" * 1000 + b"]" * 1000 + b"}",
    "a latin-1 byte": b'{"text": "caf\xe9"}',
    "half a line": b'{"text": "caf',
}
U, A, B = ({"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b")))
DIALECTS: dict[str, tuple[str, dict[str, Any]]] = {
    "query, response, history": ("conversations", {"query": "q", "response": "a", "history": [["q", "a"]]}),
    "conversation of human, assistant": ("conversations", {"conversation": [{"human": "q", "assistant": "a"}]}),
    "the same with system": ("conversations", {"conversation": [{"human": "q", "assistant": "a"}], "system": "s"}),
    "context, chosen, rejected": ("pairs", {"context": "q", "chosen": "a", "rejected": "b"}),
    "context, answer_w, answer_l": ("pairs", {"context": "q", "answer_w": "a", "answer_l": "b"}),
    "chosen_messages": ("pairs", {"chosen_messages": [U, A], "rejected_messages": [U, B]}),
    "a part of type reasoning": (
        "conversations",
        {"messages": [U, A | {"content": [{"type": "reasoning", "text": "hm"}, {"type": "text", "text": "a"}]}]},
    ),
    "a part of type tool_call": (
        "conversations",
        {"messages": [U, A | {"content": [{"type": "tool_call", "name": "f", "arguments": {}}]}]},
    ),
}
RENAMED = [  # file, kind, our columns under new names
    ("sft/alpaca_en.json", "conversations", {"instruction": "task", "input": "given", "output": "gold"}),
    ("sft/openai_messages.jsonl", "conversations", {"messages": "dialogue"}),
    ("preference/ultrafeedback_trl.jsonl", "pairs", {"prompt": "ask", "chosen": "good", "rejected": "bad"}),
    ("rl/gsm8k_train_1k.jsonl", "prompts", {"question": "problem", "answer": "solution"}),
    ("corpus/c4_demo.jsonl", "text", {"text": "page"}),
]


@dataclass
class Case:
    """Some data, and what should become of it."""

    group: str
    name: str
    path: Path
    kind: str
    rows: int | None  # that are trained on or left out with a reason; None: it must be refused, with a place and a fix
    options: dict[str, Any] = field(default_factory=dict)


def as_they_are(shared: Path) -> Iterator[Case]:
    """Every file, with the numbers that a test holds."""
    source = (ROOT / "tests/unit/data/read/test_schemas.py").read_text()
    tables = [n for n in ast.parse(source).body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "FILES"]
    for file, kind, schema, _, samples, dropped in ast.literal_eval(tables[0].value):
        no_kind = schema in ("vision", "easy_vqa") or (kind, schema) == ("conversations", "text")
        expected = None if no_kind else samples + sum(dropped.values())
        yield Case("as they are", f"{file} for {kind}", shared / file, kind, expected)


def changed(shared: Path, folder: Path) -> Iterator[Case]:
    """A few rows of files of JSON lines with a bad one among them, and in other formats."""
    for number, source in enumerate(sorted(shared.glob("*/*.jsonl"))):
        kind = "text"
        lines = source.read_bytes().splitlines()[:FEW]
        texts = [json.dumps({"text": line.decode()}).encode() for line in lines]
        for bad, row in BAD_ROWS.items():
            path = folder / f"{number}-{bad.replace(' ', '_')}.jsonl"
            path.write_bytes(b"\n".join([*texts[:3], row, *texts[3:]]))
            yield Case(
                "one bad row, dropped", f"{source.name}: {bad}", path, kind, len(texts) + 1, {"bad_rows": "drop"}
            )
            yield Case("one bad row, named", f"{source.name}: {bad}", path, kind, None)
        for name, write in FORMATS.items():
            path = folder / f"{number}-formats" / name
            path.parent.mkdir(exist_ok=True)
            write(path, texts)
            yield Case("other formats", f"{source.name} as {name}", path, kind, len(texts))
        nested = folder / f"{number}-nested" / "a" / "b"
        nested.mkdir(parents=True)
        (nested / "x.jsonl").write_bytes(b"\n".join(texts))
        yield Case("folders and patterns", f"{source.name} in folders", nested.parent.parent, kind, len(texts))
        yield Case("folders and patterns", f"{source.name} by pattern", nested / "*.jsonl", kind, len(texts))


def _arrow(path: Path, texts: list[bytes]) -> None:
    table = pyarrow.Table.from_pylist([json.loads(text) for text in texts])
    with pyarrow.ipc.new_stream(str(path), table.schema) as stream:
        stream.write_table(table)


FORMATS: dict[str, Callable[[Path, list[bytes]], Any]] = {
    "x.jsonl.gz": lambda path, texts: path.write_bytes(gzip.compress(b"\n".join(texts))),
    "x.jsonl.zst": lambda path, texts: path.write_bytes(pyarrow.compress(b"\n".join(texts), "zstd", asbytes=True)),
    "x.json": lambda path, texts: path.write_bytes(b"[" + b",\n".join(texts) + b"]"),
    "x.arrow": _arrow,
    "x.parquet": lambda path, texts: parquet.write_table(pyarrow.Table.from_pylist(list(map(json.loads, texts))), path),
}


def renamed(shared: Path, folder: Path) -> Iterator[Case]:
    """Files whose columns are called otherwise, with the mapping that says so, and without."""
    for file, kind, names in RENAMED:
        text = (shared / file).read_text(encoding="utf-8")
        rows = json.loads(text) if file.endswith(".json") else list(map(json.loads, text.splitlines()))
        path = folder / f"renamed-{Path(file).stem}.jsonl"
        others = [{names.get(key, key): value for key, value in row.items()} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in others))
        yield Case("other columns, mapped", file, path, kind, len(rows), {"columns": names})
        yield Case("other columns, not mapped", file, path, kind, None)


def dialects(folder: Path) -> Iterator[Case]:
    """A row in each dialect of other frameworks."""
    for number, (name, (kind, row)) in enumerate(DIALECTS.items()):
        path = folder / f"dialect-{number}.jsonl"
        path.write_text(json.dumps(row) + "\n")
        yield Case("dialects", name, path, kind, 1)


def judge(case: Case, chat: ChatFormat, cache: Path) -> str:
    """Which column of the table a case belongs to."""
    try:
        options = DataOptions(max_left_out=1.0, **case.options)
    except (TypeError, ValueError):  # an older revision
        try:
            options = DataOptions(**case.options)
        except TypeError:
            return "refused wrongly"
    try:
        ledgers = load([str(case.path)], get_kind(case.kind), chat, options, cache).ledgers
    except DataError as error:
        is_placed = error.location.row is not None or "columns" in str(error) or "no data" in str(error)
        return "refused rightly" if case.rows is None and is_placed else "refused wrongly"
    except Exception:  # what no user should see
        return "a bare error"
    found = sum(ledger.rows + sum(ledger.dropped_rows.values()) for ledger in ledgers)
    return "right" if found == case.rows else "read wrong"


def main() -> None:
    shared = Path(sys.argv[1])
    chat: ChatFormat = ChatFormat(load_tokenizer(ROOT / "tests" / "reference" / "tokenizer"))
    table: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = [*as_they_are(shared), *changed(shared, folder), *renamed(shared, folder), *dialects(folder)]
        for case in cases:
            verdict = judge(case, chat, folder / "cache")
            table.setdefault(case.group, Counter())[verdict] += 1
            if verdict not in ("right", "refused rightly"):
                print(f"{verdict}: {case.group}: {case.name}", file=sys.stderr)
    columns = ("right", "refused rightly", "refused wrongly", "read wrong", "a bare error")
    print(f"| files | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for group, counts in table.items():
        print(f"| {group} | {' | '.join(str(counts[column]) for column in columns)} |")


if __name__ == "__main__":
    main()
