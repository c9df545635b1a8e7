"""Tiny trained vision-language models that are exported, each a run's folder with what it answered in training."""

import json
import sys
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from exported import Made
from llm_trainer import AdapterConfig, adapt
from llm_trainer.checkpoint import write_model
from llm_trainer.config.quantization import QuantizationConfig
from llm_trainer.data.encode.templates import default_template
from llm_trainer.data.vision import ImageFormat
from llm_trainer.models.build import build_model, model_of_config
from llm_trainer.models.quantized_loading import loading_options
from llm_trainer.models.vision_build import processor_for
from llm_trainer.train_configs import VisionConfig, VLMConfig
from vision_data import PATCH, PROCESSORS, SIDE, picture

sys.path.insert(0, str(Path(__file__).parent / "unit" / "models"))
from vision_families import FAMILIES

# How published templates print images: content parts, the marker and what is around it.
TEMPLATE = """\
{%- for m in messages -%}
    {{- '[' + m.role + ']' -}}
    {%- if m.content is string -%}{{ m.content }}
    {%- else -%}{%- for part in m.content -%}
        {%- if part.type == 'image' -%}MARKER{%- else -%}{{ part.text }}{%- endif -%}
    {%- endfor -%}{%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '[assistant]' }}{%- endif -%}
"""
PARTS = ["language_model", "vision_tower", "multi_modal_projector"]
AROUND = {"qwen2_5_vl": "<|vision_start|>{}<|vision_end|>", "qwen3_vl": "<|vision_start|>{}<|vision_end|>"}


def processor_of(family: str) -> Any:
    """The processor of a family, with a chat template that takes parts."""
    processor = deepcopy(PROCESSORS[family]())
    marker = AROUND.get(family, "{}").format(processor.image_token)
    processor.chat_template = processor.tokenizer.chat_template = TEMPLATE.replace("MARKER", marker)
    return processor


def model_of(family: str, processor: Any, **of_text: Any) -> Any:
    """A model of a family that goes with the processor."""
    config = FAMILIES[family]()
    text = config.get_text_config()
    for name, value in {"vocab_size": len(processor.tokenizer), "max_position_embeddings": 256, **of_text}.items():
        setattr(text, name, value)
    config.tie_word_embeddings = text.tie_word_embeddings
    if family.startswith("llava") or family == "gemma3":
        config.vision_config.patch_size, config.vision_config.image_size = PATCH, SIDE
    config.image_token_id = processor.image_token_ids[0]
    torch.manual_seed(2)
    model: Any = model_of_config(config, "sdpa")
    for name, parameter in model.named_parameters():  # pictures that change what is said
        if "embed" not in name and "language" not in name and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    return model


def batches_of(processor: Any) -> list[dict[str, Any]]:
    """Two micro-batches of two rows, of which one shows a picture."""
    images, found = ImageFormat(processor), []
    for seed in range(2):
        shown = torch.tensor(images.ids(20, 30))
        words = torch.randint(20, 200, (2, 8 + len(shown)), generator=torch.Generator().manual_seed(seed))
        words[0, 2 : 2 + len(shown)] = shown
        batch = images.batch([picture(seed=seed)], [[0], []])
        labels = words.masked_fill(words == images.image_token_id, -100)
        found.append({"input_ids": words, "labels": labels, "images": batch})
    return found


class Seen(Made):
    """Makes each model once; the kinds are those of `VISION_KINDS`."""

    def run(self, kind: str) -> Path:
        run = self.folder / kind
        if not run.exists():
            torch.manual_seed(3)
            VISION_KINDS[kind](self, run)
        return run

    def base_of(self, family: str, **of_text: Any) -> Path:
        """The folder of a model that a run begins with."""
        folder = self.folder / "bases" / "-".join([family, *of_text])
        if not folder.exists():
            processor = processor_of(family)
            write_model(model_of(family, processor, **of_text), folder, processor)
            (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nA base.\n")
        return folder

    def whole_of(self, run: Path, family: str, template: str | None = None, **of_text: Any) -> None:
        processor = processor_of(family)
        if template is not None:
            processor.chat_template = processor.tokenizer.chat_template = template
        self.learn(model_of(family, processor, **of_text), processor, run)

    def adapted_of(self, run: Path, family: str, few_bits: bool = False, dtype: Any = torch.float32, **of: Any) -> None:
        base, options = self.base_of(family), {}
        if few_bits:
            options["options"] = loading_options(QuantizationConfig(), base, torch.device("cpu"), torch.float32)
        model = build_model(str(base), dtype=dtype, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.learn(adapt(model, AdapterConfig(rank=4, **of)), processor_of(family), run)

    def of_shape(self, run: Path, tokens_per_image: int) -> None:
        """As a configuration describes it; of a quarter of the patches an InternVL, with the processor of a LLaVA."""
        tokenizer = deepcopy(PROCESSORS["llava"]().tokenizer)
        tokenizer.chat_template = default_template(tokenizer, "<image>")
        tower = VisionConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=SIDE, patch_size=PATCH
        )
        text: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        token = tokenizer.convert_tokens_to_ids("<image>")
        of_images: dict[str, Any] = {"tokens_per_image": tokens_per_image, "image_token_id": token}
        shape = VLMConfig(vocab_size=len(tokenizer), vision=tower, max_position_embeddings=256, **text, **of_images)
        torch.manual_seed(2)
        model = build_model(shape)
        self.learn(model, processor_for(model.config, tokenizer), run)

    def by_peft_of(self, run: Path, **options: Any) -> None:
        """As peft makes them, which puts adapters on tied heads too."""
        import peft

        model: Any = build_model(str(self.base_of("llava", tie_word_embeddings=True)))
        values = {"r": 2, "init_lora_weights": False, "task_type": "CAUSAL_LM"} | options
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.learn(peft.get_peft_model(model, peft.LoraConfig(**values)), processor_of("llava"), run)

    def learn(self, model: Any, processor: Any, run: Path) -> None:
        self.train(model, run, processor, train_loader=batches_of(processor))


def settings_in(folder: Path, file: str) -> dict[str, Any]:
    """A file of settings."""
    found: dict[str, Any] = json.loads((folder / file).read_text())
    return found


DEFAULT = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
VISION_KINDS: dict[str, Callable[[Seen, Path], None]] = {
    **{family: lambda seen, run, family=family: seen.whole_of(run, family) for family in PROCESSORS},  # type: ignore[misc]
    "llava tied": lambda seen, run: seen.whole_of(run, "llava", tie_word_embeddings=True),
    "llava, markers in text": lambda seen, run: seen.whole_of(run, "llava", DEFAULT),
    "llava without a template": lambda seen, run: seen.whole_of(run, "llava", ""),
    "llava of a shape": lambda seen, run: seen.of_shape(run, 16),
    "internvl of a shape": lambda seen, run: seen.of_shape(run, 4),
    "lora": lambda seen, run: seen.adapted_of(run, "llava"),
    "lora of qwen3_vl": lambda seen, run: seen.adapted_of(run, "qwen3_vl"),
    "lora everywhere": lambda seen, run: seen.adapted_of(run, "llava", parts=PARTS),
    "lora in bf16": lambda seen, run: seen.adapted_of(run, "llava", dtype=torch.bfloat16),
    "lora on a tied head": lambda seen, run: seen.by_peft_of(run, target_modules=["q_proj", "lm_head"]),
    "dora": lambda seen, run: seen.adapted_of(run, "llava", dora=True),
    "pissa": lambda seen, run: seen.adapted_of(run, "llava", init="pissa"),
    "qlora": lambda seen, run: seen.adapted_of(run, "llava", few_bits=True),
}
