"""Images in the forward: each is encoded once, shown as often as it is used, and documents with images are apart when flat."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_model, tiny_vlm
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from transformers import LlavaForConditionalGeneration
from vision_rows import flat, gradients, images, padded

from llm_trainer.engine.lockstep import _on_device, _on_host
from llm_trainer.image_batch import ImageBatch
from llm_trainer.models.heads import small_sibling
from llm_trainer.models.packing import packing_of
from llm_trainer.models.scored import ScoredModel, scored
from llm_trainer.models.vision import SeenOnce, unreached


@pytest.mark.parametrize("tokens", [4, 1])
def test_the_loss_is_the_models_own(tokens: int) -> None:
    model = tiny_vlm(tokens_per_image=tokens)
    ours = scored(model)
    assert ours.whole_logits == ""
    shown, batch = images(ours), padded(tokens)
    scores = ours(**batch, images=shown)
    (scores.loss_sum / scores.num_tokens).backward()
    found = gradients(model)

    pixels = shown.inputs["pixel_values"][shown.order]  # every use by itself
    own = model(**batch, pixel_values=pixels).loss
    own.backward()
    torch.testing.assert_close(scores.loss_sum / scores.num_tokens, own)
    torch.testing.assert_close(found, gradients(model), rtol=1e-4, atol=1e-6)

    other = ours(**batch, images=replace(shown, order=1 - shown.order)).loss_sum
    assert (other - scores.loss_sum).abs().item() > 1e-2  # images are seen


@pytest.mark.parametrize("tokens", [4, 1])
def test_flat_documents_with_images_are_scored_as_alone(tokens: int) -> None:
    model = tiny_vlm(tokens_per_image=tokens)
    ours = scored(model)
    shown = images(ours)
    found = {}
    for name, batch in {"padded": padded(tokens), "flat": flat(tokens)}.items():
        scores = ours(**batch, images=shown)
        scores.loss_sum.backward()
        found[name] = scores.loss_sum, gradients(model)
    torch.testing.assert_close(found["flat"], found["padded"], rtol=1e-5, atol=1e-5)


def test_each_distinct_image_is_encoded_once_and_may_be_encoded_before() -> None:
    ours = scored(tiny_vlm())
    shown, seen = images(ours), []
    ours.vision.model.vision_tower.register_forward_hook(lambda module, args, output: seen.append(len(output[0])))
    first = ours(**padded(4), images=shown).loss_sum
    assert seen == [2]  # three uses
    features = ours.vision.encode(shown)
    assert torch.equal(ours(**padded(4), images=features).loss_sum, first)
    assert seen == [2, 2]


def test_a_micro_batch_without_images_runs_the_tower_and_scores_the_same() -> None:
    model = tiny_vlm()
    ours = scored(model)
    text = {"input_ids": torch.tensor([[1, 2, 3, 4]])}
    plain = ours(**text).loss_sum
    plain.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert not any("vision_tower" in name for name in reached)
    model.zero_grad()

    none = torch.zeros(0, dtype=torch.long)
    blank = replace(images(ours), order=none, counts=none)  # as data makes it, and as the model makes it itself
    for given in ({"images": blank}, {}):
        ours.with_images = not given
        scores = ours(**text, **given)
        assert torch.equal(scores.loss_sum, plain)
        scores.loss_sum.backward()
        reached = {name for name, p in model.named_parameters() if p.grad is not None}
        tower = {
            name for name, _ in model.named_parameters() if "vision_tower" in name and "post_layernorm" not in name
        }
        assert tower <= reached
        assert float(gradients(model.model.vision_tower).abs().max()) == 0.0


def test_nothing_of_the_model_has_a_second_name() -> None:
    model = tiny_vlm()
    assert set(scored(model).state_dict()) == {f"base.{name}" for name in model.state_dict()}


def test_placeholders_and_features_that_disagree_are_an_error() -> None:
    ours = scored(tiny_vlm())
    shown = images(ours)
    with pytest.raises(ValueError, match="makes 8 tokens of 2 images, for which the processor has put 6 placeholders"):
        ours(**padded(4), images=replace(shown, lengths=torch.tensor([3, 3])))


def test_images_of_a_text_model_are_an_error() -> None:
    shown = images(scored(tiny_vlm()))
    with pytest.raises(ValueError, match="expected a vision-language model"):
        scored(tiny_model())(torch.tensor([[1, 2]]), images=shown)


def test_what_no_loss_reaches_is_named() -> None:
    # SigLIP with the head that LLaVA does not read, as published models have it
    model = tiny_vlm()
    config = deepcopy(model.config)
    config.vision_config.vision_use_head = True
    model = LlavaForConditionalGeneration(config)
    found = unreached(model, with_images=True)
    assert len(found) == 13
    assert {name.split(".")[2] for name in found} == {"post_layernorm", "head"}

    # none of these gets a gradient, all others do
    ours = scored(model)
    ours(**padded(4), images=images(ours)).loss_sum.backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == set(found)

    # without images it is all beside the language model, and what is frozen is not named
    parts = {name.split(".")[1] for name in unreached(model, with_images=False)}
    assert parts == {"vision_tower", "multi_modal_projector"}
    model.requires_grad_(False)
    assert unreached(model, with_images=True) == []
    assert unreached(tiny_model(), with_images=True) == []


@pytest.mark.parametrize("attention", ["blocked", "sdpa", "eager"])
@pytest.mark.parametrize("tokens", [4, 1])
def test_packing_is_tried_with_images(attention: str, tokens: int) -> None:
    model = tiny_vlm(attention, tokens_per_image=tokens)
    assert packing_of(model, ScoredModel, torch.device("cpu")).fault == ""
    sibling = small_sibling(model)
    assert packing_of(sibling, ScoredModel, torch.device("cpu")).fault == ""


def test_a_model_whose_images_are_seen_from_other_documents_is_not_packed() -> None:
    # every token sees the mean of all images of the row; text alone stays apart
    model = tiny_vlm()
    body = model.model
    embed = body.get_input_embeddings()

    def leak(module: nn.Module, args: object, given: dict[str, Tensor]) -> tuple[object, dict[str, Tensor]]:
        embeds = given["inputs_embeds"]
        is_token = (embeds[..., None, :] == embed.weight).all(-1).any(-1)  # (B, T)
        of_images = embeds.masked_fill(is_token[..., None], 0.0).mean(1, keepdim=True)
        return args, given | {"inputs_embeds": embeds + of_images}

    body.language_model.register_forward_pre_hook(leak, with_kwargs=True)
    fault = packing_of(model, ScoredModel, torch.device("cpu")).fault
    assert fault.startswith(
        "LlavaForConditionalGeneration: with images, a document laid behind another is scored otherwise"
    )


def test_who_brings_inputs_to_another_process_finds_the_tensors_of_images() -> None:
    """A rank that makes up for a forward of another one gets its inputs on its own device; what the host reads stays there."""
    ours = scored(tiny_vlm())
    shown = images(ours)
    seen = SeenOnce(shown)
    seen.features, seen.is_seen = ours.vision.encode(shown), True
    inputs = {"input_ids": torch.ones(1, 2), "images": shown, "seen": seen}
    leaves, _ = tree_flatten(inputs)
    assert sum(leaf is shown.inputs["pixel_values"] for leaf in leaves) == 3
    assert not any(isinstance(leaf, ImageBatch | SeenOnce) for leaf in leaves)

    sent, places, with_gradients = _on_host(inputs)
    assert set(places) == {"cpu", None} and with_gradients
    elsewhere = []  # on a device what is beside a model, on the host what is counted
    for leaf in tree_flatten(sent)[0]:
        is_tensor = isinstance(leaf, Tensor)
        assert not (is_tensor and leaf.requires_grad)  # not what a tower would have learned from
        elsewhere.append("meta" if is_tensor and leaf.is_floating_point() else "cpu")
    there, _ = _on_device((sent, elsewhere, True), torch.device("meta"))
    assert isinstance(there["images"], ImageBatch) and isinstance(there["seen"], SeenOnce)
    assert there["images"].inputs["pixel_values"].is_meta and not there["images"].order.is_meta
    assert there["seen"].is_seen and all(value.is_meta for level in there["seen"].features.levels for value in level)
    assert there["seen"].features.images.inputs["pixel_values"].is_meta
