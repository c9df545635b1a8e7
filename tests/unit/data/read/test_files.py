"""Files of every format become the same rows, whatever their bytes look like; token files become ids."""

import gzip
import json
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from llm_trainer.data.read import formats
from llm_trainer.data.read.errors import DataError
from llm_trainer.data.read.files import data_files, files_of, read_rows
from llm_trainer.data.read.token_files import open_tokens

ROWS = [{"text": "a\u2028b\u0085c"}, {"text": 'say "x",\r\nthen'}, {"text": "né 子"}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()


def read(path: Path, **options: Any) -> list:
    return [row for _, row in read_rows(path, **options)]


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def places(path: Path, **options: Any) -> list[str]:
    return [str(location).removeprefix(f"{path.parent}/") for location, _ in read_rows(path, **options)]


@pytest.mark.parametrize(
    ("name", "content"),
    {
        "plain.jsonl": LINES,
        "newline.ndjson": LINES + b"\n",
        "bom_crlf.jsonl": b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n"),
        "blank.jsonl": b"\n  \n" + LINES.replace(b"\n", b"\n\n") + b"\n\n",
        # mtime: the content is part of the name of a test, which must be the same in every process
        "zipped.jsonl.gz": gzip.compress(LINES, mtime=0),
        "zipped_unnamed.jsonl": gzip.compress(LINES, mtime=0),
        "array.json": json.dumps(ROWS).encode(),
        "array_bom.json": b"\xef\xbb\xbf" + json.dumps(ROWS, indent=2).replace("\n", "\r\n").encode(),
        "really_lines.json": LINES,
        "really_array.jsonl": json.dumps(ROWS).encode(),
        "really_pretty_array.jsonl": json.dumps(ROWS, indent=1).encode(),
        "table.csv": 'text\n"a\u2028b\u0085c"\n"say ""x"",\r\nthen"\nné 子\n'.encode(),
        "table.tsv.gz": gzip.compress('text\r\na\u2028b\u0085c\r\n"say ""x"",\r\nthen"\r\nné 子'.encode(), mtime=0),
    }.items(),
)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str, content: bytes) -> None:
    assert read(write(tmp_path / name, content)) == ROWS


def test_parquet_and_folders_in_name_order(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(ROWS * 200), tmp_path / "b.parquet", row_group_size=100)
    write(tmp_path / "a.jsonl", LINES)
    write(tmp_path / "README.md", b"not data")
    assert read(tmp_path) == ROWS * 201
    assert places(tmp_path / "b.parquet")[-1] == "b.parquet:600"
    with pytest.raises(DataError, match=r"c\.parquet: found damaged parquet"):
        read(write(tmp_path / "c.parquet", LINES))


def test_arrow_and_zstandard(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS * 200)
    with pyarrow.ipc.new_file(tmp_path / "file.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=100)
    with pyarrow.ipc.new_stream(str(tmp_path / "stream.arrow"), table.schema) as stream:
        stream.write_table(table)
    lines = pyarrow.compress(LINES, "zstd", asbytes=True)
    write(tmp_path / "lines.jsonl.zst", lines + pyarrow.compress(b"\n" + LINES, "zstd", asbytes=True))
    assert read(tmp_path / "file.arrow") == read(tmp_path / "stream.arrow") == ROWS * 200
    assert places(tmp_path / "file.arrow")[-1] == "file.arrow:600"
    assert read(tmp_path / "lines.jsonl.zst") == ROWS * 2
    for name, content in (("a.arrow", LINES), ("a.jsonl.zst", lines[:-9])):
        with pytest.raises(DataError, match=r"a\.\w.* found damaged .*; fix: fetch or write the file again"):
            read(write(tmp_path / name, content))


def test_folders_in_folders_and_patterns(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/one.jsonl", "a/deep/two.jsonl.gz", ".hidden/x.jsonl", "a/.x.jsonl", "a/notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, LINES)
    (tmp_path / "a" / "deep" / "around").symlink_to(tmp_path)
    found = [str(path.relative_to(tmp_path)) for path in data_files(tmp_path)]
    assert found == ["a/deep/two.jsonl.gz", "a/one.jsonl", "b.jsonl"]
    assert data_files(tmp_path / "a" / "*") == [tmp_path / "a/one.jsonl"]
    assert data_files(tmp_path / "**" / "[ot]*.jsonl*")[0] == tmp_path / "a/deep/two.jsonl.gz"
    odd = tmp_path / "odd[1].jsonl"
    assert data_files(write(odd, LINES)) == [odd]
    np.save(tmp_path / "ids.npy", np.arange(3))
    assert files_of(tmp_path / "*.npy") == [tmp_path / "ids.npy"]
    with pytest.raises(DataError, match=r"\*\.csv: found no data file that matches; expected a folder, a pattern"):
        data_files(tmp_path / "*.csv")


def test_folders_that_datasets_saved(tmp_path: Path) -> None:
    """Written by hand as `datasets.Dataset.save_to_disk` does, so that it is tested without the library."""
    for split in ("train", "test"):
        folder = tmp_path / "saved" / split
        folder.mkdir(parents=True)
        table = pyarrow.Table.from_pylist(ROWS)
        for shard in ("data-0", "data-1", "cache-left-over"):
            with pyarrow.ipc.new_stream(str(folder / f"{shard}.arrow"), table.schema) as stream:
                stream.write_table(table)
        state = {"_data_files": [{"filename": "data-0.arrow"}, {"filename": "data-1.arrow"}]}
        write(folder / "state.json", json.dumps(state).encode())
        write(folder / "dataset_info.json", b"{}")
    assert read(tmp_path / "saved") == ROWS * 4
    write(tmp_path / "saved" / "dataset_dict.json", b'{"splits": ["train", "test"]}')
    assert read(tmp_path / "saved" / "test") == ROWS * 2
    with pytest.raises(DataError, match=r"saved: found a saved dataset with the splits train, test; .*saved/train"):
        read(tmp_path)
    write(tmp_path / "saved" / "dataset_dict.json", b'{"splits": ["train"]}')
    assert read(tmp_path) == ROWS * 2


def test_rows_know_their_line(tmp_path: Path) -> None:
    assert places(write(tmp_path / "a.jsonl", b"\n{}\n\n{}")) == ["a.jsonl:2", "a.jsonl:4"]
    assert places(write(tmp_path / "a.json", b"[\n{},\n{}]")) == ["a.json:1", "a.json:2"]
    assert places(write(tmp_path / "a.csv", b'x\n"1\n2"\n3')) == ["a.csv:2", "a.csv:4"]
    assert places(write(tmp_path / "a.txt", b"\n\nx\ny\n\nz"), text_unit="paragraph") == ["a.txt:3", "a.txt:6"]


def test_bare_lists_are_rows_of_jsonl_and_arrays_are_files_of_json(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "x"}]
    assert read(write(tmp_path / "one.jsonl", json.dumps(turns).encode())) == [turns]
    assert read(write(tmp_path / "two.jsonl", (json.dumps(turns) + "\n" + json.dumps(turns)).encode())) == [
        turns,
        turns,
    ]
    assert read(write(tmp_path / "one.json", json.dumps([turns]).encode())) == [turns]
    assert read(write(tmp_path / "pretty.json", json.dumps(turns[0], indent=2).encode())) == turns


def test_units_of_text(tmp_path: Path) -> None:
    book = write(tmp_path / "book.txt", b"\xef\xbb\xbfone\r\ntwo\r\n \r\n\r\nthree\r\n")
    assert read(book) == [{"text": "one\ntwo\n \n\nthree"}]
    assert read(book, text_unit="paragraph") == [{"text": "one\ntwo"}, {"text": "three"}]
    assert read(book, text_unit="line") == [{"text": "one"}, {"text": "two"}, {"text": "three"}]
    assert read(write(tmp_path / "names.txt", b"ann\nbob\n\n")) == [{"text": "ann"}, {"text": "bob"}]
    with pytest.raises(ValueError, match="text_unit is 'word'; expected one of auto, file"):
        read(book, text_unit="word")


def test_long_text_is_cut_at_paragraphs_and_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_DOCUMENT", 1000)
    paragraphs = [f"{i} " + "x" * 300 for i in range(3000)]
    path = write(tmp_path / "long.txt", "\n\n".join(paragraphs).encode())
    tracemalloc.start()
    texts = [len(row["text"]) for _, row in read_rows(path)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(texts) == path.stat().st_size - 2 * (len(texts) - 1)
    assert max(texts) < 1400 and min(texts[:-1]) >= 1000
    assert peak < path.stat().st_size / 4
    assert "\n\n".join(row["text"] for row in read(path)).split("\n\n") == paragraphs
    one_line = write(tmp_path / "line.txt", b"y" * 2500)
    assert [len(row["text"]) for row in read(one_line)] == [1000, 1000, 500]
    no_paragraphs = write(tmp_path / "lines.txt", b"z" * 99 + (b"\n" + b"z" * 99) * 49)
    assert [len(row["text"]) for row in read(no_paragraphs, text_unit="file")] == [1999, 1999, 999]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"a": 1}\n{"a": "hal', r"x\.jsonl:2: found broken JSON .*Unterminated string.*may be cut short"),
        ("x.jsonl", b'{"a": "hal\n{"a": 1}', r"x\.jsonl:1: found broken JSON"),
        ("x.json", b'[{"a": 1},\n{"a": ]', r"x\.json:2: found broken JSON \(Expecting value at line 2, column 7"),
        ("x.jsonl", b"\x89PNG\0\0", "binary data or UTF-16"),
        ("x.txt", "héllo".encode("utf-16"), "binary data or UTF-16"),
        ("x.txt", "héllo".encode("latin1"), r"x\.txt:1: found .* not UTF-8 \(0xe9 at .*iconv"),
        ("x.jsonl.gz", gzip.compress(LINES, mtime=0)[:-20], "damaged gzip data"),
        ("x.jsonl", b"", r"x\.jsonl: found no rows \(the file is empty\)"),
        ("x.jsonl", b"\n \n", "no rows"),
        ("x.json", b"[]", "no rows"),
        ("x.csv", b"text\n", "no rows"),
        ("x.csv", b"a,b\n1,2\n1,2,3\n", r"x\.csv:3: found 3 cells; expected 2"),
        ("x.csv", b'a,b\n"1,2\n', r"x\.csv:2: found broken CSV"),
        ("x.docx", b"hello", r"the suffix '.docx'; expected .*\.jsonl"),
        ("x.npy", b"hello", "open it with open_tokens"),
    ],
)
def test_unusable_files_say_where_and_why(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / name, content))


def test_missing_files_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path / "nothing.jsonl")
    with pytest.raises(DataError, match="a folder without data files"):
        read(tmp_path)


def test_bad_rows_can_be_counted_and_dropped(tmp_path: Path) -> None:
    errors: list[DataError] = []
    path = write(tmp_path / "x.jsonl", b'{"a": 1}\n{"a": \n{"a": 3}\nnope\n')
    assert read(path, on_error=errors.append) == [{"a": 1}, {"a": 3}]
    assert [(error.location.row, error.reason) for error in errors] == [(2, "bad_json"), (4, "bad_json")]


# --- token files


def test_a_flat_array_is_memory_mapped(tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    np.lib.format.open_memmap(path, "w+", np.uint16, (40_000_000,))[:3] = [5, 6, 7]
    tracemalloc.start()
    tokens = open_tokens(path)
    ids = tokens[0]["input_ids"]
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert (tokens.kind, len(tokens), ids.shape, ids[:4].tolist()) == ("sequences", 1, (40_000_000,), [5, 6, 7, 0])
    assert isinstance(ids, np.memmap) and not ids.flags.writeable


RAGGED = [[1, 2], [3]]
PAIRS = [{"chosen": [1, 2], "rejected": [3]}, {"chosen": [4], "rejected": [5, 6]}]


@pytest.mark.parametrize(
    ("value", "kind", "rows"),
    [
        ([1, 2, 3], "sequences", [{"input_ids": [1, 2, 3]}]),
        (np.array([1, 2, 3]), "sequences", [{"input_ids": [1, 2, 3]}]),
        (RAGGED, "sequences", [{"input_ids": [1, 2]}, {"input_ids": [3]}]),
        (np.array(RAGGED, dtype=object), "sequences", [{"input_ids": [1, 2]}, {"input_ids": [3]}]),
        ([np.array([1, 2], dtype=np.int32)], "sequences", [{"input_ids": [1, 2]}]),
        (np.array([[1, 2], [3, 4]]), "sequences", [{"input_ids": [1, 2]}, {"input_ids": [3, 4]}]),
        (PAIRS, "preference", PAIRS),
        ({"chosen": [[1, 2], [4]], "rejected": [[3], [5, 6]]}, "preference", PAIRS),
        (PAIRS[0], "preference", PAIRS[:1]),
        ([{"prompt": [1], "answer": []}], "prompt", [{"prompt": [1], "answer": []}]),
        ([{"prompt": [1]}], "prompt", [{"prompt": [1]}]),
    ],
)
@pytest.mark.parametrize("suffix", [".npy", ".pkl"])
def test_token_rows_of_every_shape(tmp_path: Path, value: Any, kind: str, rows: list, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps(value))
    else:
        is_ragged = isinstance(value, list) and value == RAGGED
        np.save(path, np.array(value, dtype=object) if is_ragged else value, allow_pickle=True)
    tokens = open_tokens(path)
    assert tokens.kind == kind
    assert [{name: ids.tolist() for name, ids in tokens[i].items()} for i in range(len(tokens))] == rows


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "no token ids"),
        ("text", "expected token ids"),
        (np.ones(3), "array of float64"),
        (np.zeros((2, 2, 2), dtype=int), r"shape \(2, 2, 2\)"),
        ([{"tokens": [1]}], r"x\.pkl:1: found the keys \['tokens'\]; expected 'chosen' or 'prompt'"),
        ({"chosen": [[1]], "rejected": [[1], [2]]}, "columns of different lengths"),
        ([1, -2], "non-negative"),
    ],
)
def test_what_is_no_token_file(tmp_path: Path, value: Any, message: str) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(value))
    with pytest.raises(DataError, match=message):
        open_tokens(tmp_path / "x.pkl")


@pytest.mark.parametrize("bad", [[0.5], [[1]], [1, -1], "12", None, [True]])
def test_a_bad_token_row_is_named(tmp_path: Path, bad: Any) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps([{"chosen": [1], "rejected": [2]}, {"chosen": [1], "rejected": bad}]))
    with pytest.raises(DataError, match=r"x\.pkl:2: key 'rejected'.*non-negative integers"):
        open_tokens(tmp_path / "x.pkl")[1]


def test_damaged_and_unsafe_arrays(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.arange(1000))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"damaged \.npy"):
        open_tokens(path)
    np.save(path, np.empty(0, dtype=int))
    with pytest.raises(DataError, match="no token ids"):
        open_tokens(path)
    np.save(path, np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"'builtins\.print'"):
        open_tokens(path)
    with pytest.raises(DataError, match=r"damaged \.npy"):
        open_tokens(write(path, b"hello"))


def test_documents_that_end_with_a_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever in a line the mark is; blank lines inside belong to the document, empty documents are none."""
    path = tmp_path / "stories.txt"
    path.write_text(
        "One.\n\nStill one.\n<|endoftext|>\nTwo.<|endoftext|>Three\nis long.\n<|endoftext|><|endoftext|>\nLast."
    )
    found = [(location.row, row["text"]) for location, row in read_rows(path, "endoftext")]
    assert found == [(1, "One.\n\nStill one."), (5, "Two."), (5, "Three\nis long."), (8, "Last.")]
    monkeypatch.setattr("llm_trainer.data.read.formats.MAX_DOCUMENT", 8)
    pieces = [row["text"] for _, row in read_rows(path, "endoftext")]
    assert max(map(len, pieces)) <= 4 * 8 and "".join("".join(pieces).split()) == "One.Stillone.Two.Threeislong.Last."
