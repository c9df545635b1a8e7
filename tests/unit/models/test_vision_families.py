"""Every named family of vision-language models: the model's own loss, documents with images apart, there and back."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText
from vision_families import FAMILIES, family_model
from vision_rows import documents, flat, gradients, images, padded

from llm_trainer.checkpoint.weights import read_model, write_model
from llm_trainer.models.attention import describe_attention, resolve_attention
from llm_trainer.models.heads import small_sibling
from llm_trainer.models.inside import context_of, vocab_size_of
from llm_trainer.models.packing import packing_of
from llm_trainer.models.scored import ScoredModel, scored
from llm_trainer.models.vision import Vision, rope_positions, unreached

CPU = torch.device("cpu")
NOT_OURS = ("gemma3",)  # of which the language model has no attention of ours
NOT_PACKED = ("gemma3",)  # its sliding mask looks images up by positions inside the document
ONCE = ([1, 2, "a", 3, 4], ["b", 7, 8, 9], [9, 10, 11, 12])  # each image is shown once

resolve_attention("blocked")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_scores_are_the_models_own(name: str) -> None:
    model = family_model(name)
    ours = scored(model)
    assert ours.whole_logits == ""
    assert describe_attention(model.config, CPU)[0] == ("sdpa" if name in NOT_OURS else "blocked")
    assert context_of(model.config) == 128 and vocab_size_of(model) == 61

    # 1. the same loss and the same gradients, through the head in chunks and features that were made before
    shown = images(ours, ONCE)
    each = int(shown.lengths[0])
    batch = padded(each, ONCE)
    scores = ours(**batch, images=shown)
    (scores.loss_sum / scores.num_tokens).backward()
    found = gradients(model)
    is_image = (batch["input_ids"] == ours.vision.image_token_id).long()
    more = {"token_type_ids": is_image} if ours.vision.marks_images else {}
    if ours.vision.takes_rope_positions:
        more = {"mm_token_type_ids": is_image.int()}
    own = model(**batch, **shown.inputs, **more).loss
    own.backward()
    torch.testing.assert_close(scores.loss_sum / scores.num_tokens, own)
    torch.testing.assert_close(found, gradients(model), rtol=1e-4, atol=1e-5)

    # 2. what got no gradient is what was found without a backward
    ours(**padded(each), images=images(ours)).loss_sum.backward()
    without = [parameter_name for parameter_name, p in model.named_parameters() if p.grad is None]
    assert unreached(model, with_images=True) == without
    assert len(without) == {"llava": 13, "llava_next": 18, "gemma3": 11}.get(name, 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_documents_with_images_are_scored_as_alone_or_refused(name: str) -> None:
    model = family_model(name)
    ours = scored(model)
    shown = images(ours)
    each = int(shown.lengths[0])
    found = {}
    for layout, batch in {"padded": padded(each), "flat": flat(each)}.items():
        scores = ours(**batch, images=shown)
        scores.loss_sum.backward()
        found[layout] = scores.loss_sum.detach(), gradients(model)
    difference = (found["flat"][0] - found["padded"][0]).abs() / found["padded"][0]
    of_gradients = (found["flat"][1] - found["padded"][1]).norm() / found["padded"][1].norm()
    fault = packing_of(model, ScoredModel, CPU).fault
    assert packing_of(small_sibling(model), ScoredModel, CPU).fault[:40] == fault[:40]
    if name in NOT_PACKED:
        assert max(difference, of_gradients) > 1e-2
        assert "with images, a document laid behind another is scored otherwise than alone, by 0." in fault
    else:
        assert max(difference, of_gradients) < 1e-4
        assert fault == ""


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    model = family_model(name)
    write_model(model, tmp_path)
    opened = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(opened) is type(model)
    with torch.no_grad():
        other = family_model(name)
        for parameter in other.parameters():
            parameter.zero_()
    read_model(other, tmp_path)
    for key, tensor in model.state_dict().items():
        assert torch.equal(opened.state_dict()[key], tensor), key
        assert torch.equal(other.state_dict()[key], tensor), key


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_positions_of_images_count_inside_each_document(name: str) -> None:
    model = family_model(name)
    ours = scored(model)
    shown = images(ours)
    each = int(shown.lengths[0])  # 1 x 2 patches become a token each
    assert each == 2
    laid, batch = flat(each), padded(each)
    flat_positions = rope_positions(ours.vision, laid["input_ids"], shown, position_ids=laid["position_ids"])
    rows = rope_positions(ours.vision, batch["input_ids"], shown, attention_mask=batch["attention_mask"])
    alone = [row[:, mask.bool()] for row, mask in zip(rows.unbind(1), batch["attention_mask"], strict=True)]
    assert torch.equal(flat_positions[:, 0], torch.cat(alone, dim=1))
    # 1, 2, an image of one row and two columns, 3, an image, 4
    assert alone[0].tolist() == [
        [0, 1, 2, 2, 4, 5, 5, 7],
        [0, 1, 2, 2, 4, 5, 5, 7],
        [0, 1, 2, 3, 4, 5, 6, 7],
    ]
    given = ours(**laid, images=shown, rope_positions=flat_positions).loss_sum
    assert torch.equal(given, ours(**laid, images=shown).loss_sum)
    cut = laid | {"position_ids": torch.arange(laid["input_ids"].shape[1])[None]}
    cut["position_ids"][0, 3:] -= 3  # a document that begins inside an image
    with pytest.raises(ValueError, match="expected documents that are cut between images"):
        ours(**cut, images=shown)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_what_a_sampler_calls_the_model_with_gives_its_own_logits(name: str) -> None:
    model = family_model(name).eval()
    vision = Vision.of(model)
    shown = vision.example(2)
    each = int(shown.lengths[0])
    ids = torch.tensor([[1, 2, *[vision.image_token_id] * each, 3, *[vision.image_token_id] * each, 4]])
    is_image = (ids == vision.image_token_id).int()
    more = {"token_type_ids": is_image.long()} if vision.marks_images else {}
    if vision.takes_rope_positions:
        more = {"mm_token_type_ids": is_image}
    with torch.no_grad():
        own = model(ids, **shown.inputs, **more)
        ours = model(ids, **vision.inputs(ids, vision.encode(shown)))
        torch.testing.assert_close(ours.logits, own.logits)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_branches_go_on_from_a_prompt_with_an_image(name: str) -> None:
    ours = scored(family_model(name))
    assert ours.knows_branches(CPU)
    each = int(ours.vision.example().lengths[0])
    prompt: list[object] = [1, "a", 2]
    ends: list[list[object]] = [[3, 4, 9], [6, "b", 7, 8]]
    whole = (prompt + ends[0], prompt + ends[1])
    plain = padded(each, whole)
    shown = images(ours, whole)
    alone = ours.per_token(plain["input_ids"], attention_mask=plain["attention_mask"], images=shown)

    # the prompt and the first end, then the second end, whose positions go on from the prompt
    first, second = documents(each, whole)
    shared = each + 2
    ids = torch.cat([first, second[shared:]])[None]
    positions = torch.cat([torch.arange(len(first)), torch.arange(shared, len(second))])[None]
    found = ours.per_token(ids, position_ids=positions, images=images(ours, (whole[0], ends[1])))
    torch.testing.assert_close(found[0, : len(first)], alone[0, : len(first)], rtol=1e-4, atol=1e-4)
    behind = found[0, len(first) + 1 :]  # its first token is predicted from the prompt's last, which stands elsewhere
    torch.testing.assert_close(behind, alone[1, shared + 1 : len(second)], rtol=1e-4, atol=1e-4)
