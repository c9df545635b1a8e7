"""Where every image that rows name went: used, cut off, or dropped with its row, for whichever reason."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL")

from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.read.errors import DataError
from llm_trainer.data.vision import ImageFormat
from vision_data import asked, llava_processor, loaded, write

# Refuses what a template may: turns of the system.
PARTICULAR = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM = [{"role": "system", "content": "Look."}]
SEEN = asked("<image> or <image>?")
PART = {"type": "image", "image": "3.png"}


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    processor = llava_processor()
    return ChatFormat(processor.tokenizer, images=ImageFormat(processor), template=PARTICULAR)


def pair(chosen: str, rejected: str, images: list[str], **more: Any) -> dict[str, Any]:
    sides = {
        name: [{"role": "assistant", "content": answer}]
        for name, answer in {"chosen": chosen, "rejected": rejected}.items()
    }
    prompt = [{"role": "user", "content": "<image>?" * len(images)}]
    return {"prompt": prompt, **sides, "images": images, **more}


TWO = ["0.png", "1.png"]
# name -> kind, a row that is left out, why, and how many images leave with it
LEFT_OUT: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "weight 0": ("conversations", {"messages": SEEN, "images": TWO, "weight": 0}, "a row of weight 0", 2),
    "text of weight 0": ("text", {"text": "<image>", "images": "0.png", "loss_weight": 0}, "a row of weight 0", 1),
    "empty answer": ("conversations", {"messages": asked("<image>?", ""), "image": "0.png"}, "empty_answer", 1),
    "no answer": ("conversations", {"messages": SEEN[:1], "images": TWO}, "no_assistant_turn", 2),
    "parts": ("conversations", {"messages": [{"role": "user", "content": [PART, PART]}]}, "no_assistant_turn", 2),
    "json": ("conversations", {"messages": SEEN[:1], "images": json.dumps(TWO)}, "no_assistant_turn", 2),
    "more markers": ("conversations", {"messages": SEEN, "images": TWO[:1]}, "image_count", 1),
    "more images": ("conversations", {"messages": SEEN, "images": [*TWO, "2.png"]}, "image_count", 3),
    "missing image": ("conversations", {"messages": SEEN, "images": ["0.png", "none.png"]}, "image_missing", 2),
    "template": ("conversations", {"messages": SYSTEM + SEEN, "images": TWO}, "template", 2),
    "weight 0 of a pair": ("pairs", pair("A cat.", "Dog.", TWO, loss_weight=0), "a row of weight 0", 4),
    "missing image of a pair": ("pairs", pair("A cat.", "Dog.", ["none.png"]), "image_missing", 2),
    "weights in a pair": (
        "pairs",
        pair("A cat.", "Dog.", TWO) | {"chosen": [{"role": "assistant", "content": "A", "loss_weight": 0.5}]},
        "loss_weight",
        4,
    ),
    "tie": ("pairs", pair("A cat.", "A cat.", TWO), "identical", 2),  # nothing is made of it: as the row names them
    "empty side": ("pairs", pair("A cat.", "", TWO), "empty_rejected", 2),
    "prompt": ("prompts", {"prompt": SYSTEM + SEEN[:1], "answer": "x", "images": TWO}, "template", 2),
}
GOOD: dict[str, tuple[dict[str, Any], int]] = {  # kind -> a row, and how many images it shows
    "conversations": ({"messages": asked("<image>?"), "images": ["3.png"]}, 1),
    "text": ({"text": "A <image> and more.", "images": ["3.png"]}, 1),
    "pairs": (pair("Two dogs.", "A cat.", ["3.png"]), 2),
    "prompts": ({"prompt": asked("<image>?")[:1], "answer": "x", "images": ["3.png"]}, 1),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_images_leave_with_their_row(name: str, tmp_path: Path, chat: ChatFormat) -> None:
    kind, bad, reason, number = LEFT_OUT[name]
    good, shown = GOOD[kind]
    packing = "flat" if kind == "text" else "none"
    data = loaded(write(tmp_path, [good, bad]), chat, kind, bad_rows="drop", bad_images="drop", packing=packing)
    ledger = data.ledgers[0].check()
    assert ledger.dropped_rows == {reason: 1}
    assert ledger.images.dropped == {reason: number}
    assert ledger.images.used == shown and ledger.images.read == shown + number


def test_every_image_is_accounted_for_whatever_becomes_of_its_row(tmp_path: Path, chat: ChatFormat) -> None:
    """Rows of every kind of defect in one file, cut to a context, in which several reasons meet in one part of the store."""
    draw = random.Random(0)
    of_defects = {name: LEFT_OUT[name] for name in LEFT_OUT if LEFT_OUT[name][0] == "conversations"}
    rows, expected = [], Counter[str]()
    named = 0
    for _ in range(120):
        if draw.random() < 0.4:
            _, row, reason, number = of_defects[draw.choice(list(of_defects))]
            expected[reason] += number
        else:
            number = draw.randrange(4)
            said = " ".join(["<image>"] * number + ["What?"] * draw.randrange(1, 40))
            row = {"messages": asked(said), "images": [f"{draw.randrange(4)}.png" for _ in range(number)]}
        named += number
        rows.append(row)
    path = write(tmp_path, rows)
    for packing in ("none", "bfd", "bfd_split"):
        how: dict[str, Any] = {"bad_rows": "drop", "bad_images": "drop", "packing": packing, "block_size": 60}
        ledger = loaded(path, chat, **how).ledgers[0].check()
        images = ledger.images
        assert images.read == named == images.used + images.cut + sum(images.dropped.values())
        assert expected.items() <= images.dropped.items()


def test_repeated_rows_take_their_images_along(tmp_path: Path, chat: ChatFormat) -> None:
    row = {"messages": SEEN, "images": TWO}
    broken = {"messages": SEEN[:1], "images": ["3.png"]}
    path = write(tmp_path, [row, row, broken, row])
    ledger = loaded(path, chat, duplicates="exact", bad_rows="drop").ledgers[0].check()
    assert ledger.images.dropped == {"exact duplicate": 4, "no_assistant_turn": 1}
    assert ledger.images.read == 7 and ledger.images.used == 2


def test_images_of_a_csv_leave_with_their_row(tmp_path: Path, chat: ChatFormat) -> None:
    path = write(tmp_path, [asked("<image>?"), SEEN[:1], SEEN])
    tags = tmp_path / "tags.csv"
    tags.write_text("0.png\n1.png,2.png\n3.png\n")
    ledger = loaded(path, chat, image_tags={str(path): str(tags)}, bad_rows="drop").ledgers[0].check()
    assert ledger.images.dropped == {"no_assistant_turn": 2, "image_count": 1} and ledger.images.used == 1


def test_a_file_of_which_nothing_is_left_still_says_where_its_images_went(tmp_path: Path, chat: ChatFormat) -> None:
    path = write(tmp_path, [{"messages": SEEN[:1], "images": TWO}])
    with pytest.raises(DataError, match="2 images read = 0 used .* 2 dropped"):
        loaded(path, chat, bad_rows="drop")
