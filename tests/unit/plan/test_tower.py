"""FLOPs of a model that sees, against those that PyTorch counts in a step."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llm_trainer.config.model import VLMConfig
from llm_trainer.config.vision import VisionConfig
from llm_trainer.image_batch import num_pixels
from llm_trainer.models.build import build_model, flops_per_token
from llm_trainer.models.freezing import freeze_parts
from llm_trainer.plan.shapes import shape_of

IMAGE, ROWS, LENGTH = 3, 2, 128
TOWER = VisionConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=4)


@pytest.mark.parametrize("tokens", [64, 16])
@pytest.mark.parametrize("frozen", [(), ("vision",), ("language", "vision"), ("language",)], ids=str)
def test_flops_are_those_that_pytorch_counts(frozen: tuple[str, ...], tokens: int) -> None:
    """LLaVA, and InternVL, whose projector sees one token of four patches."""
    text = {"vocab_size": 512, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = build_model(VLMConfig(**text, vision=TOWER, tokens_per_image=tokens, image_token_id=IMAGE))
    model.set_attn_implementation("eager")  # of the fused ones the counter sees nothing
    freeze_parts(model, frozen)
    ids = torch.randint(IMAGE + 1, 512, (ROWS, LENGTH))
    ids[:, :tokens] = IMAGE
    batch = {"input_ids": ids, "labels": ids, "pixel_values": torch.randn(ROWS, 3, 32, 32)}
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    tower = shape_of(model).tower
    assert tower is not None and tower.patches == 64
    patches = num_pixels(batch) / tower.values_per_patch
    assert patches == ROWS * 64
    of_images = patches * tower.flops_per_patch(64)
    expected = ROWS * LENGTH * flops_per_token(model, LENGTH) + of_images
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.03)
    assert of_images > 0.05 * expected  # more than what is tolerated
