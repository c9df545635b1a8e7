"""Rows with images, from a file to a micro-batch: what is learned, where it is cut, and that nothing is lost."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL")
import numpy as np
import torch

from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.kinds import DataOptions, get_kind
from llm_trainer.data.load import load, open_stream
from llm_trainer.data.read.errors import DataError
from llm_trainer.data.vision import ImageFormat
from vision_data import PATCH, SIDE, asked, file_of, llava_processor, loaded, picture, write

NUM = (SIDE // PATCH) ** 2  # placeholders of an image
PARTS_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}[<image>]{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LISTS_ONLY = PARTS_TEMPLATE.replace("{% if m.content is string %}{{ m.content }}{% else %}", "", 1).replace(
    "{% endfor %}{% endif %}<|im_end|>", "{% endfor %}<|im_end|>"
)


@pytest.fixture
def chat() -> ChatFormat:
    processor = llava_processor()
    return ChatFormat(processor.tokenizer, images=ImageFormat(processor))


ROWS = [
    {"messages": asked("<image>What is it?"), "images": ["0.png"]},
    {"messages": asked("Compare <image> and <image>") + asked("And <image>?"), "images": ["1.png", "0.png", "2.png"]},
    {"messages": asked("No picture here.")},
    {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image", "image": {"url": "3.png"}}, {"type": "text", "text": "What?"}],
            },
            {"role": "assistant", "content": "Two dogs."},
        ]
    },
]


@pytest.mark.parametrize("template", [None, PARTS_TEMPLATE, LISTS_ONLY], ids=["text", "some", "all"])
def test_what_is_learned_with_images_is_what_is_learned_without_them(template: str | None, chat: ChatFormat) -> None:
    chat = replace(chat, template=template)
    blind = replace(chat, images=None)
    counted = chat.images.count(file_of(picture()), None, None)
    turns = asked("<image>What is <image> it? 图片", "A 图 cat.") + asked("<image>", "Two.")
    seen = [{**turn, "images": [counted] * turn["content"].count("<image>")} for turn in turns]
    around = "" if template is None else "[]"
    without = [{**turn, "content": turn["content"].replace("<image>", around)} for turn in turns]
    if template is LISTS_ONLY:
        without = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in without]
        blind = replace(blind, train_on="assistant")
    one = chat.encode(seen)
    ids = np.array(one.input_ids)
    is_image = ids == chat.images.image_token_id
    assert is_image.sum() == 3 * NUM
    assert [place.first for place in one.places] == [int(i) for i in np.flatnonzero(np.diff(is_image, prepend=0) == 1)]
    assert not np.array(one.trained)[is_image].any()
    if template is not LISTS_ONLY:  # without images ours takes texts alone
        other = blind.encode(without)
        trained = chat.tokenizer.decode(ids[np.array(one.trained)])
        assert trained == chat.tokenizer.decode(np.array(other.input_ids)[np.array(other.trained)])
    if template is None:
        assert ids[~is_image].tolist() == other.input_ids
        assert np.array(one.trained)[~is_image].tolist() == other.trained
    prompt = chat.encode_prompt(seen[:1])
    asked_alone = len(chat.encode(seen[:1]).input_ids)
    assert prompt[:asked_alone] == one.input_ids[:asked_alone] and prompt.count(chat.images.image_token_id) == 2 * NUM


def test_rows_become_batches_in_which_each_distinct_image_is_opened_once(
    tmp_path: Path, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = loaded(write(tmp_path, ROWS), chat, packing="flat")
    assert data.ledgers[0].images.read == data.ledgers[0].images.used == 5
    assert data.costs.tolist() == (data.lengths + NUM * np.array([1, 3, 0, 1])).tolist()
    opened: list[Any] = []
    real = ImageFormat.open
    monkeypatch.setattr(ImageFormat, "open", lambda self, *args: opened.append(args) or real(self, *args))
    for flat in (True, False):
        options = DataOptions(packing="flat" if flat else "none")
        stream = open_stream(data, get_kind("conversations"), options, 0, rows_per_step=4, batch_size=4, shuffle=False)
        [(batches, _)] = list(stream.steps(0))
        batch = batches[0].batch
        images = batch["images"]
        assert images.counts.tolist() == [1, 3, 0, 1]
        assert images.order.tolist() == [0, 1, 0, 2, 3]
        assert images.inputs["pixel_values"].shape[0] == 4
        alone = chat.images.numbers([picture(21, 30, seed=1)])["pixel_values"][0]
        assert torch.equal(images.inputs["pixel_values"][1], alone)
        assert (batch["labels"] != chat.images.image_token_id).all()
        assert int((batch["input_ids"] == chat.images.image_token_id).sum()) == 5 * NUM
    assert len(opened) == 2 * 4


def test_files_with_and_without_images_are_trained_on_together(tmp_path: Path, chat: ChatFormat) -> None:
    (tmp_path / "text").mkdir()
    with_images, text = write(tmp_path, ROWS[:2]), write(tmp_path / "text", [ROWS[2]] * 2)
    for paths in ([with_images, text], [text, with_images]):
        data = load(list(map(str, paths)), get_kind("conversations"), chat, DataOptions(), tmp_path / "cache")
        read = [0 if ledger.images is None else ledger.images.read for ledger in data.ledgers]
        assert sorted(read) == [0, 4]
        how: dict[str, Any] = {"rows_per_step": 4, "batch_size": 1, "interleave": True}
        stream = open_stream(data, get_kind("conversations"), DataOptions(), 0, **how)
        assert stream.shows_images
        [(batches, _)] = list(stream.steps(0))
        counts = [int(one.batch["images"].counts.sum()) if "images" in one.batch else 0 for one in batches]
        assert sorted(counts) == [0, 0, 1, 3]


def test_a_step_without_images_says_nothing_of_them(tmp_path: Path, chat: ChatFormat) -> None:
    data = loaded(write(tmp_path, [ROWS[2]]), chat)
    stream = open_stream(data, get_kind("conversations"), DataOptions(), 0, rows_per_step=1, batch_size=1)
    [(batches, _)] = list(stream.steps(0))
    assert "images" not in batches[0].batch and data.ledgers[0].images is None


@pytest.mark.parametrize("end", ["keep_start", "keep_end"])
def test_a_row_is_cut_between_images_and_never_inside_one(end: str, tmp_path: Path, chat: ChatFormat) -> None:
    path = write(
        tmp_path,
        [{"messages": asked("<image> a <image> b <image>", "<image>A cat <image> it is."), "images": ["0.png"] * 5}],
    )
    whole = loaded(path, chat)[0]
    ids = whole["input_ids"].tolist()
    length = len(ids)
    for size in range(4, length + 1):
        try:
            data = loaded(path, chat, block_size=size, truncation=end)
        except DataError as error:
            assert "image longer than the context" in str(error) or "nothing to train on" in str(error)
            continue
        ledger, sample = data.ledgers[0].check(), data[0]
        part = sample["input_ids"].tolist()
        assert 0 < len(part) <= size and part == (ids[: len(part)] if end == "keep_start" else ids[-len(part) :])
        holders = part.count(chat.images.image_token_id)
        assert holders % NUM == 0 and holders // NUM == len(sample.get("images", ())) == ledger.images.used
        assert ledger.images.used + ledger.images.cut == 5
        for place in sample.get("image_places", ()):
            assert part[place : place + NUM] == [chat.images.image_token_id] * NUM
        assert len(part) + NUM > size or len(part) == size or len(part) + NUM + 1 >= size


def test_long_rows_are_split_between_images(tmp_path: Path, chat: ChatFormat) -> None:
    rows = [
        {"messages": asked("<image> " * 6, f"It is {number}. " + "<image>"), "images": ["0.png"] * 7}
        for number in range(3)
    ]
    path = write(tmp_path, [*rows, ROWS[2]])
    whole = loaded(path, chat)
    for size in (NUM, NUM + 3, 2 * NUM + 5, 200):
        data = loaded(path, chat, packing="bfd_split", block_size=size)
        ledger = data.ledgers[0].check()
        assert ledger.images.used == 21 and ledger.images.cut == 0
        total = 0
        for number in range(len(data.lengths)):
            row = data[number]
            assert len(row["input_ids"]) <= size
            images = row.get("images", ())
            assert np.count_nonzero(row["input_ids"] == chat.images.image_token_id) == NUM * len(images)
            for place in row.get("image_places", ()):
                assert (row["input_ids"][place : place + NUM] == chat.images.image_token_id).all()
            edges = np.cumsum(row["document_lengths"])
            for place in row.get("image_places", ()):
                assert np.searchsorted(edges, place, side="right") == np.searchsorted(
                    edges, place + NUM - 1, side="right"
                )
            total += len(row["input_ids"])
            assert data.costs[number] == len(row["input_ids"]) + NUM * len(images)  # a patch each
        assert total == whole.lengths.sum()


def test_a_row_whose_one_image_is_longer_than_the_context_is_left_out(tmp_path: Path, chat: ChatFormat) -> None:
    path = write(tmp_path, ROWS)
    for packing in ("none", "bfd_split"):
        data = loaded(path, chat, block_size=NUM - 1, packing=packing, truncation="keep_end")
        assert data.ledgers[0].dropped_rows["an image longer than the context"] == 3
        assert data.ledgers[0].images.dropped == {"an image longer than the context": 5}
        assert any("5 images read = 0 used" in line for line in data.ledgers[0].lines())


COUNTS = {
    "more markers": (
        {"messages": asked("<image><image>?"), "images": ["0.png"]},
        "found 2 <image> markers and 1 image",
    ),
    "more images": (
        {"messages": asked("<image>?"), "images": ["0.png", "1.png"]},
        "found 1 <image> marker and 2 images",
    ),
    "missing": ({"messages": asked("<image>?"), "images": ["no.png"]}, "rows.jsonl:1: key 'images': found no file at"),
    "outside": ({"messages": asked("<image>?"), "images": ["/etc/hostname"]}, "which leads to /etc/hostname"),
    "marker": ({"messages": asked("?", "<image>")}, "found 1 <image> marker and 0 images"),
    "video": ({"messages": asked("?"), "videos": ["a.mp4"]}, "key 'videos': .* expected text alone"),
}


@pytest.mark.parametrize("name", COUNTS)
def test_bad_counts_and_bad_images_name_their_row(name: str, tmp_path: Path, chat: ChatFormat) -> None:
    row, message = COUNTS[name]
    with pytest.raises(DataError, match=message):
        loaded(write(tmp_path, [row]), chat)


def test_bad_images_can_be_left_out_and_are_counted(tmp_path: Path, chat: ChatFormat) -> None:
    bad = {"messages": asked("<image><image>?"), "images": ["0.png", "no.png"]}
    path = write(tmp_path, [*ROWS, bad])
    with pytest.raises(DataError, match="no file at"):
        loaded(path, chat, bad_rows="drop")
    ledger = loaded(path, chat, bad_images="drop").ledgers[0]
    assert ledger.dropped_rows == {"image_missing": 1} and ledger.rows == 4
    assert ledger.images.dropped == {"image_missing": 2} and ledger.images.read == 7


def test_for_a_model_that_reads_text_nothing_has_changed(tmp_path: Path, chat: ChatFormat) -> None:
    blind = replace(chat, images=None)
    path = write(tmp_path, [{"messages": asked("What does <image> mean in html?")}])
    data = loaded(path, blind)
    assert "<image>" in blind.tokenizer.decode(data[0]["input_ids"])
    assert blind.images is None and not (data[0]["input_ids"] == chat.images.image_token_id).any()
    assert not [name for name in data.stores[0].columns if name.startswith("image")]
    path = write(tmp_path, ROWS[:1])
    with pytest.raises(
        DataError, match="rows of kind 'vision' .*; fix: train a model that sees .*image_columns: ignore"
    ):
        loaded(path, blind)
    # on purpose its text alone is learned, counted
    data = loaded(path, blind, image_columns="ignore")
    assert data.ledgers[0].notes["row: its column 'images' is left out, rows of conversations are text"] == 1


def test_an_image_that_changed_since_it_was_counted_names_its_row(tmp_path: Path, chat: ChatFormat) -> None:
    path = write(tmp_path, ROWS)
    loaded(path, chat)
    (tmp_path / "1.png").write_bytes(file_of(picture(21, 30, seed=9)))
    data = loaded(path, chat)  # found again, as after a resume
    stream = open_stream(data, get_kind("conversations"), DataOptions(), 0, rows_per_step=4, batch_size=4)
    with pytest.raises(DataError, match=r"rows.jsonl:2: found another image than the one that was counted"):
        list(stream.steps(0))


def test_text_and_images_in_turn_are_pretrained_on(tmp_path: Path, chat: ChatFormat) -> None:
    rows = [
        {"text": "A cat: <image> and a dog: <image>.", "images": ["0.png", "1.png"]},
        {
            "messages": [
                {"role": "pretrain", "content": [{"type": "image", "image": "2.png"}, {"type": "text", "text": "Dog."}]}
            ]
        },
    ]
    for row, uses in zip(rows, (2, 1), strict=True):
        (tmp_path / str(uses)).mkdir()
        path = write(tmp_path / str(uses), [row])
        sample = loaded(path, chat, "text", packing="none")[0]
        is_image = sample["input_ids"] == chat.images.image_token_id
        assert is_image.sum() == uses * NUM and sample["trained"].tolist() == (~is_image).tolist()
        assert len(sample["images"]) == uses
        with pytest.raises(DataError, match="packing 'wrapped' would cut anywhere"):
            loaded(path, chat, "text", packing="wrapped", block_size=64)


def test_documents_of_one_row_keep_their_own_images(tmp_path: Path, chat: ChatFormat) -> None:
    text = "One <image>.<|endoftext|>None.<|endoftext|><image> and <image>."
    path = write(tmp_path, [{"text": text, "images": ["2.png", "0.png", "1.png"]}])
    data = loaded(path, chat, "text", packing="none", text_unit="endoftext")
    heights = [[ref.height for ref in data[number].get("images", ())] for number in range(3)]
    assert heights == [[22], [], [20, 21]]


def test_images_come_as_bytes_beside_dead_paths(tmp_path: Path, chat: ChatFormat) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    data = file_of(picture())
    row = {"messages": asked("<image>What?"), "images": [{"bytes": data, "path": "/dead/path.png"}]}
    path = tmp_path / "rows.parquet"
    pq.write_table(pyarrow.Table.from_pylist([row, row]), path)
    joined = loaded(path, chat)
    [ref] = joined[1]["images"]
    assert ref.source == data and (ref.height, ref.width) == (20, 30)


def test_a_csv_beside_the_file_names_the_images(tmp_path: Path, chat: ChatFormat) -> None:
    rows = [asked("<image>What?"), asked("Nothing."), asked("<image> or <image>?")]
    path = write(tmp_path, rows)
    tags = tmp_path / "tags.csv"
    how: dict[str, Any] = {"image_tags": {str(path): str(tags)}}
    tags.write_text("0.png,\n\n1.png,2.png\n")
    data = loaded(path, chat, **how)
    assert [len(data[number].get("images", ())) for number in range(3)] == [1, 0, 2]
    assert [Path(ref.source).name for ref in data[2]["images"]] == ["1.png", "2.png"]
    for text, message in {
        "0.png\n\n": r"rows.jsonl:3: found no line 3 in the csv of its images, which has 2",
        "0.png\n\n1.png,2.png\n3.png\n": r"tags.csv: found 4 lines for 3 rows of",
        "0.png\n1.png\n1.png,2.png\n": "found 0 <image> markers and 1 image",
    }.items():
        tags.write_text(text)
        with pytest.raises(DataError, match=message):
            loaded(path, chat, **how)
    with pytest.raises(DataError, match="tags.csv: found .*No such file"):
        tags.unlink()
        loaded(path, chat, **how)


def test_ids_whose_placeholders_are_there_find_their_images_in_the_csv(tmp_path: Path, chat: ChatFormat) -> None:
    path = write(tmp_path, ROWS)
    text = loaded(path, chat)
    ids = [text[number]["input_ids"].astype(np.int64).tolist() for number in range(2)]
    import pickle

    tokens, tags = tmp_path / "rows.pkl", tmp_path / "tags.csv"
    tokens.write_bytes(pickle.dumps(ids))
    tags.write_text("0.png\n1.png,0.png,2.png\n")
    how: dict[str, Any] = {"image_tags": {str(tokens): str(tags)}}
    data = loaded(tokens, chat, **how)
    for number in range(2):
        for name in ("input_ids", "trained", "image_places"):
            assert data[number][name].tolist() == text[number][name].tolist(), name
        assert [ref.digest for ref in data[number]["images"]] == [ref.digest for ref in text[number]["images"]]
    tags.write_text("0.png\n1.png,0.png\n")
    with pytest.raises(DataError, match=f"{NUM} placeholders behind those of the 2 images"):
        loaded(tokens, chat, **how)


def test_placeholders_without_images_are_an_error(tmp_path: Path, chat: ChatFormat) -> None:
    ids = np.array([chat.images.image_token_id, 70, 71, 72] * 8, dtype=np.int64)
    np.save(tmp_path / "rows.npy", ids)
    data = loaded(tmp_path / "rows.npy", chat, "text", packing="wrapped", block_size=16)
    how: dict[str, Any] = {"rows_per_step": 2, "batch_size": 2}
    stream = open_stream(data, get_kind("text"), DataOptions(packing="wrapped"), 0, **how)
    with pytest.raises(ValueError, match="a micro-batch has 8 placeholders of images, and its images have 0 tokens"):
        list(stream.steps(0))


def test_the_marker_in_an_answer_is_an_error(chat: ChatFormat) -> None:
    from llm_trainer.data.encode.templates import ChatTemplateError

    with pytest.raises(ChatTemplateError, match="1 times the marker <image> in a text with 0 images"):
        chat.encode([*asked("What?", "<image>")])


def preferred(question: str, chosen: str, rejected: str, images: list[str]) -> dict[str, Any]:
    prompt = [{"role": "user", "content": question}]
    sides = {
        name: [{"role": "assistant", "content": answer}]
        for name, answer in {"chosen": chosen, "rejected": rejected}.items()
    }
    return {"prompt": prompt, **sides, "images": images}


PAIRS = [
    preferred("<image>What?", "A cat.", "A dog.", ["0.png"]),
    preferred("Draw", "This: <image>", "<image> or <image>", ["1.png", "2.png", "0.png"]),
    preferred("No picture?", "Yes.", "No.", []),
]


def test_both_answers_of_a_pair_show_the_images_of_its_prompt(tmp_path: Path, chat: ChatFormat) -> None:
    data = loaded(write(tmp_path, PAIRS), chat, "pairs")
    assert data.ledgers[0].images.read == data.ledgers[0].images.used == 2 + 3
    assert loaded(tmp_path / "rows.jsonl", chat, "pairs", packing="flat", share_prompts=True).lengths.tolist() == [
        sum(len(side["input_ids"]) for side in (data[number]["chosen"], data[number]["rejected"]))
        for number in range(3)
    ]
    stream = open_stream(data, get_kind("pairs"), DataOptions(), 0, rows_per_step=3, batch_size=3, shuffle=False)
    [(batches, _)] = list(stream.steps(0))
    images = batches[0].batch["images"]
    assert images.counts.tolist() == [1, 1, 0, 1, 2, 0]
    assert images.order.tolist() == [0, 1, 0, 2, 0]  # both sides of a pair, and other pairs, show image 0
    assert len(images.lengths) == 3


def test_judged_answers_and_their_mismatched_ones_show_their_own_images(tmp_path: Path, chat: ChatFormat) -> None:
    rows = [
        {
            "prompt": asked(f"<image>{question}?")[:1],
            "completion": asked("", answer)[1:],
            "label": True,
            "images": images,
        }
        for question, answer, images in (("a", "A <image>.", ["0.png", "1.png"]), ("b", "Dog.", ["2.png"]))
    ]
    path = write(tmp_path, rows)
    data = loaded(path, chat, "unpaired")
    first, second = (sample["mismatched"] for sample in (data[0], data[1]))
    names = [[Path(ref.source).stem for ref in sample["images"]] for sample in (first, second)]
    assert names == [["0"], ["2", "1"]]
    for sample in (first, second):
        for place in sample["image_places"]:
            assert (sample["input_ids"][place : place + NUM] == chat.images.image_token_id).all()
    full = len(second["input_ids"])
    num_cut = 0
    for size in range(NUM + 8, full + 1):
        try:
            cut = loaded(path, chat, "unpaired", block_size=size)
        except DataError:  # nothing to learn is left
            continue
        num_cut += 1
        for number in range(len(cut.lengths)):
            sample = cut[number]["mismatched"]
            holders = int((sample["input_ids"] == chat.images.image_token_id).sum())
            assert holders == NUM * len(sample.get("images", ())) and len(sample["input_ids"]) <= size
            assert len(sample["input_ids"]) == len(sample["trained"]) == sum(sample["document_lengths"])
    assert num_cut > 5


def test_prompts_bring_their_images(tmp_path: Path, chat: ChatFormat) -> None:
    rows = [{"prompt": asked("<image>What?")[:1], "answer": "cat", "images": ["0.png"], "level": 3}]
    data = loaded(write(tmp_path, rows), chat, "prompts", packing="none")
    sample = data[0]
    assert [ref.height for ref in sample["images"]] == [20]
    assert sample["row"]["level"] == 3 and "images" not in sample["row"]
    assert int((sample["input_ids"] == chat.images.image_token_id).sum()) == NUM
    batch = get_kind("prompts").collate([sample], None)
    assert batch["image_refs"] == [sample["images"]]


def test_near_duplicates_of_rows_with_images_are_refused_and_exact_ones_compare_them(
    tmp_path: Path, chat: ChatFormat
) -> None:
    rows = [{"messages": asked("<image>What is it?"), "images": [name]} for name in ("0.png", "1.png", "0.png")]
    path = write(tmp_path, rows)
    data = loaded(path, chat, duplicates="exact")
    assert len(data.lengths) == 2 and data.ledgers[0].dropped_rows == {"exact duplicate": 1}
    with pytest.raises(ValueError, match="duplicates: near, of rows with images"):
        loaded(path, chat, duplicates="near")


def test_steps_judged_one_by_one_take_no_images(tmp_path: Path, chat: ChatFormat) -> None:
    row = {"prompt": "<image>?", "completions": ["a"], "labels": [1], "images": ["0.png"]}
    with pytest.raises(DataError, match="expected text alone, for process"):
        loaded(write(tmp_path, [row]), chat, "process")


def test_a_token_budget_counts_what_the_tower_sees(tmp_path: Path, chat: ChatFormat) -> None:
    data = loaded(write(tmp_path, [ROWS[0]] * 8), chat, packing="flat")
    cost = int(data.costs[0])
    assert cost == int(data.lengths[0]) + NUM
    options = DataOptions(packing="flat")
    stream = open_stream(
        data, get_kind("conversations"), options, 0, rows_per_step=8, batch_size=8, micro_batch_tokens=2 * cost
    )
    [(batches, _)] = list(stream.steps(0))
    assert [len(batch.batch["document_lengths"]) for batch in batches] == [2] * 4


def test_workers_open_the_same_images(tmp_path: Path, chat: ChatFormat) -> None:
    """And what is wrong with one is said as without them, not as the last words of a worker."""
    data = loaded(write(tmp_path, ROWS), chat, packing="flat")
    found = []
    for workers in (0, 1):
        how: dict[str, Any] = {"rows_per_step": 2, "batch_size": 2, "num_workers": workers, "seed": 3}
        stream = open_stream(data, get_kind("conversations"), DataOptions(packing="flat"), 0, **how)
        found.append([batches[0].batch["images"] for batches, _ in stream.steps(0)])
    for here, there in zip(*found, strict=True):
        assert torch.equal(here.inputs["pixel_values"], there.inputs["pixel_values"])
        assert torch.equal(here.order, there.order) and torch.equal(here.counts, there.counts)
    (tmp_path / "2.png").unlink()
    with pytest.raises(
        DataError, match=r"^\S*rows.jsonl:2: found no file at .*2.png; .* `llm-trainer data check FILE"
    ) as found:
        list(stream.steps(0))
    assert "Traceback" not in str(found.value)


def test_the_report_of_a_file_says_sizes_tokens_and_problems(tmp_path: Path, chat: ChatFormat) -> None:
    from llm_trainer.data.check import check_file

    damaged = bytearray(file_of(picture(64, 64)))
    damaged[600:700] = bytes(100)
    bad = [
        {"messages": asked("<image>?"), "images": ["damaged.png"]},
        {"messages": asked("<image>?"), "images": ["no.png"]},
    ]
    path = write(tmp_path, [*ROWS, *bad])
    (tmp_path / "damaged.png").write_bytes(damaged)
    report = check_file(path, chat)
    assert report.usable_as == ["conversations"] and report.schema == "messages"
    assert report.image_sizes == {(20, 30): 2, (21, 30): 1, (22, 30): 1, (23, 30): 1} and report.distinct_images == 4
    assert report.image_tokens == [NUM] * 5
    shown = "".join(text for text, _ in report.examples[0])
    assert f"<image> x {NUM} " in shown and "<image><image>" not in shown
    assert [error.location.row for error in report.problems] == [5, 6]
    assert "a damaged image" in str(report.problems[0]) and "no file at" in str(report.problems[1])


# --- real files, with every quirk of theirs


@pytest.mark.parametrize(
    ("file", "kind", "rows", "images"),
    [
        ("coco_two_images/sft_single_image.jsonl", "conversations", 22, 22),
        ("coco_two_images/sft_multi_image.jsonl", "conversations", 11, None),
        ("coco_two_images/pretrain_image.jsonl", "text", 12, None),
        ("open_images_qa/conversations.json", "conversations", 20, None),
        ("easy_vqa_train/questions.json", "conversations", 2951, 2951),
        ("deepeyes_verl_6.parquet", "prompts", 6, 6),
    ],
)
def test_real_files(
    file: str, kind: str, rows: int, images: int | None, shared_data: Path, tmp_path: Path, chat: ChatFormat
) -> None:
    if file.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    path = shared_data / "vlm" / file
    data = load([str(path)], get_kind(kind), chat, DataOptions(packing="none"), tmp_path)
    ledger = data.ledgers[0].check()
    assert ledger.rows == rows and ledger.images.read == ledger.images.used
    assert images is None or ledger.images.read == images
    total = 0
    for number in range(min(rows, 40)):
        sample = data[number]
        holders = int((sample["input_ids"] == chat.images.image_token_id).sum())
        assert holders == NUM * len(sample.get("images", ()))
        total += len(sample.get("images", ()))
        for ref in sample.get("images", ())[:1]:
            assert chat.images.open(ref, None).size == (ref.width, ref.height)
    assert total


def test_a_size_that_a_row_states_wrongly_is_not_believed(shared_data: Path, tmp_path: Path, chat: ChatFormat) -> None:
    path = shared_data / "vlm" / "coco_two_images" / "sft_multi_image.jsonl"
    row = json.loads(path.read_text().splitlines()[5])
    parts = [part for turn in row["messages"] for part in turn["content"] if isinstance(part, dict)]
    stated = [tuple(part["image"]["image_wh"]) for part in parts if part["type"] == "image"]
    data = load([str(path)], get_kind("conversations"), chat, DataOptions(packing="none"), tmp_path)
    found = [(ref.width, ref.height) for ref in data[5]["images"]]
    assert found == [(640, 480)] * 2 != stated
