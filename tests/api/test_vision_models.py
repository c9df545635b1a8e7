"""Vision-language models from a configuration: what a run saves opens elsewhere and here, and is planned."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from llm_trainer import SFTTrainer
from llm_trainer.builder.objects import Builder
from llm_trainer.checkpoint import CheckpointManager
from llm_trainer.checkpoint.valid import CheckpointError
from llm_trainer.checkpoint.weights import read_weights
from llm_trainer.cli.main import main
from llm_trainer.config.load import dump_config, parse
from llm_trainer.data.encode.templates import has_default_template
from llm_trainer.models.build import build_model, flops_per_token, num_parameters
from llm_trainer.models.freezing import describe_frozen
from llm_trainer.models.inside import beside_language
from llm_trainer.models.vision import Vision
from llm_trainer.train_configs import VLMConfig

TOWER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "vision": TOWER,
}
ROWS = [[{"role": "user", "content": "count"}, {"role": "assistant", "content": "1 2 3" + " 4" * n}] for n in range(4)]


def config(folder: Path, model: Any, tokenizer: Path, **sections: Any) -> Any:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    run = {"save_dir": str(folder), "log_interval": 1, "progress": False, "precision": "fp32", "device": "cpu"}
    values = {
        "model_config": model,
        "tokenizer": str(tokenizer),
        "file_dataset": str(folder / "rows.jsonl"),
        "batch_size": 2,
        "run_config": run | {"max_steps": 2},
        "sft_config": {},
    }
    return parse(values | sections, "test")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, reference_dir: Path) -> Path:
    """The checkpoint of a run that began with nothing but a tokenizer."""
    folder = tmp_path_factory.mktemp("first")
    SFTTrainer(train_config=config(folder, SHAPE, reference_dir / "tokenizer")).train()
    found = CheckpointManager(folder).latest()
    assert found is not None
    return found / "model"


def test_the_folder_of_a_run_opens_in_transformers(first: Path) -> None:
    model, processor = AutoModelForImageTextToText.from_pretrained(first), AutoProcessor.from_pretrained(first)
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert model.config.image_token_id == image_id == len(processor.tokenizer) - 1
    assert model.get_input_embeddings().num_embeddings == len(processor.tokenizer)
    assert processor.chat_template == processor.tokenizer.chat_template is not None
    assert model.generation_config.eos_token_id  # where an answer ends
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]  # as other tools say it
    printed = processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    assert "<image>What?" in printed and has_default_template(processor.tokenizer)


def test_weights_of_another_family_are_refused(first: Path) -> None:
    """transformers reads them too, and makes anew what it does not find."""
    shape = SHAPE | {"vocab_size": 300, "image_token_id": 299, "tokens_per_image": 1}
    with pytest.raises(CheckpointError, match="holds a model of type llava, the run trains one of type internvl"):
        read_weights(build_model(VLMConfig(**shape)), first)


@pytest.mark.parametrize("adapters", [False, True])
def test_a_run_goes_on_from_the_folder_of_another(first: Path, tmp_path: Path, adapters: bool) -> None:
    more: dict[str, Any] = {"adapter_config": {"rank": 2}} if adapters else {}
    if adapters:
        pytest.importorskip("peft", reason="needs peft")
    trainer = SFTTrainer(train_config=config(tmp_path, str(first), first, **more))
    assert Vision.of(trainer.base_model).model is not None
    assert type(trainer.processor).__name__ == "LlavaProcessor" and trainer.tokenizer is trainer.processor.tokenizer
    # no loss reaches the last norm of the tower, for LLaVA reads the states before it
    frozen = [name for name, parameter in trainer.base_model.named_parameters() if not parameter.requires_grad]
    if not adapters:
        assert frozen == [f"model.vision_tower.post_layernorm.{name}" for name in ("weight", "bias")]
        said = describe_frozen(trainer.base_model)
        assert said.startswith("vision: 32 of ")
        assert said.endswith("parameters (model.vision_tower.post_layernorm)")
    trainer.train()
    saved = CheckpointManager(tmp_path).latest()
    assert saved is not None
    opened = AutoProcessor.from_pretrained(saved / "model")
    assert opened.image_processor.size == {"height": 16, "width": 16} and opened.patch_size == 8


def test_a_run_gives_eyes_to_the_language_model_of_another(tmp_path: Path, reference_dir: Path) -> None:
    """`language_path` from a configuration: the placeholder is a new row, and the projector alone has learned."""
    shape = {key: value for key, value in SHAPE.items() if key != "vision"}
    SFTTrainer(train_config=config(tmp_path / "words", shape, reference_dir / "tokenizer")).train()
    words = CheckpointManager(tmp_path / "words").latest()
    assert words is not None
    model = {"language_path": str(words / "model"), "vision": TOWER}
    (tmp_path / "eyes").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "eyes" / "a.png")
    frozen = {"freeze_llm_model": True}
    described = config(tmp_path / "eyes", model, words / "model", sft_config=frozen)
    row = {"prompt": "<image> is", "completion": " black", "images": ["a.png"]}
    (tmp_path / "eyes" / "rows.jsonl").write_text(json.dumps(row) + "\n")
    SFTTrainer(train_config=described).train()
    saved = CheckpointManager(tmp_path / "eyes").latest()
    assert saved is not None
    read = AutoModelForCausalLM.from_pretrained(words / "model").model.state_dict()
    seen = AutoModelForImageTextToText.from_pretrained(saved / "model").model.language_model.state_dict()
    for name, value in read.items():
        assert torch.equal(seen[name][: len(value)], value), name


def test_the_plan_knows_the_tower(tmp_path: Path, reference_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = reference_dir / "tokenizer"
    whole = config(tmp_path, SHAPE, tokenizer)
    (tmp_path / "run.yaml").write_text(dump_config(whole))
    text = {key: value for key, value in SHAPE.items() if key != "vision"}
    model = Builder(whole, SFTTrainer).policy
    plain = Builder(config(tmp_path, text, tokenizer), SFTTrainer).policy
    tower = sum(parameter.numel() for parameter in beside_language(model))
    row = 32  # of the placeholder
    assert num_parameters(model) == num_parameters(plain) + tower + row
    assert flops_per_token(model, 64) == flops_per_token(plain, 64) + 6 * row
    with pytest.raises(SystemExit):
        main(["plan", str(tmp_path / "run.yaml"), "--gpus", "1"])
    shown = capsys.readouterr().out
    [parts] = [line for line in shown.splitlines() if line.startswith("parts ")]
    numbers = [int(number.replace(",", "")) for number in re.findall(r"(?:tower|projector) ([\d,]+)", parts)]
    assert len(numbers) == 2 and sum(numbers) == tower
