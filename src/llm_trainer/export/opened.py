"""A model of transformers with its tokenizer, asked as any tool would ask it: by transformers' own functions."""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llm_trainer.checkpoint.tensor_files import bytes_of
from llm_trainer.checkpoint.weights import first_few, tensors_by_name, without_progress_bars
from llm_trainer.export.asking import facts_of, margin_of, rendered, stops_of
from llm_trainer.export.gate import Refused
from llm_trainer.export.probe import Conversation, Greedy, Rendered
from llm_trainer.export.seeing import TransformersSight, facts_of_processor, processor_in
from llm_trainer.models.inside import auto_class, evaluating, sees_images

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Opened:
    """See `probe.Asked`.

    NOTE: the weights are widened to fp32, in place, after they have been noted: what rounding has left of them is what is
    computed with, and the computation itself adds nothing to it.

    Args:
        model: of transformers; a model of peft is given as the one inside of it.
        tokenizer: of it; None: there is none.
        with_weights: every tensor is compared too, bit for bit.
        precision: that products are computed in.
        processor: of a model that sees; None: it is shown no pictures.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: "PreTrainedTokenizerBase | None",
        with_weights: bool = False,
        precision: str = "fp32",
        processor: Any = None,
    ) -> None:
        self._facts = facts_of(model)
        if with_weights:
            self._facts["weights"] = {name: _hash(tensor) for name, tensor in tensors_by_name(model).items()}
        self.model, self.tokenizer, self._precision = model.float(), tokenizer, precision
        self.sight: TransformersSight | None = None
        if processor is not None:
            self._facts |= facts_of_processor(processor)
            self.sight = TransformersSight(self.model, processor, self._computing, _plain_generation)

    def tokenise(self, text: str) -> list[int]:
        if self.tokenizer is None:  # asked nevertheless: there was one
            return []
        found: list[int] = self.tokenizer(text)["input_ids"]
        return list(found)

    def render(self, conversation: Conversation) -> Rendered | None:
        return rendered(self.tokenizer, conversation)

    def stop_token_ids(self) -> list[int]:
        return stops_of(self.model)

    @torch.no_grad()
    def logprobs(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        found = []
        with self._computing():
            for row in rows:
                ids = torch.tensor([list(row)], device=self.model.device)
                logits = self.model(input_ids=ids).logits[0, :-1].float()  # (T - 1, V)
                chosen = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])
                found.append(chosen[:, 0].tolist())
        return found

    @torch.no_grad()
    def greedy(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Greedy]:
        from transformers import GenerationConfig

        stops = stops_of(self.model)
        how = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=stops or None,
            pad_token_id=0,  # nothing is padded
            output_logits=True,
            return_dict_in_generate=True,
        )
        found = []
        for prompt in prompts:
            ids = torch.tensor([list(prompt)], device=self.model.device)
            with self._computing(), _plain_generation(self.model):
                written = self.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=how)
            answer = written.sequences[0, len(prompt) :].tolist()
            found.append(Greedy(answer, [margin_of(logits[0]) for logits in written.logits]))
        return found

    def facts(self) -> dict[str, Any]:
        return self._facts

    @contextmanager
    def _computing(self) -> Iterator[None]:
        is_rounded = self._precision in DTYPES
        autocast = torch.autocast(
            self.model.device.type, dtype=DTYPES.get(self._precision, torch.bfloat16), enabled=is_rounded
        )
        with evaluating(self.model), autocast:
            yield


@contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """Only what is asked for counts, and not what the folder's generation config says of sampling and penalties."""
    from transformers import GenerationConfig

    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _hash(tensor: Tensor) -> str:
    described = f"{tensor.dtype} {list(tensor.shape)}"
    return f"{described} {hashlib.sha256(bytes_of(tensor)).hexdigest()[:16]}"


def reopened(folder: Path) -> Opened:
    """A folder as any tool opens it: by the class of transformers for such models and `AutoTokenizer`, from itself alone; one
    of a model that sees by `AutoProcessor` too.

    Weights stay as they are written, and are compared so; what is computed with them is computed in fp32.

    Raises:
        Refused: it does not open, or its weights are not those of its configuration.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoConfig

    what_may_come = (OSError, ValueError, RuntimeError, LookupError, TypeError, SafetensorError, StrictDataclassError)
    try:
        with without_progress_bars():
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            loaded: Any = auto_class(config).from_pretrained(
                folder, dtype="auto", local_files_only=True, output_loading_info=True
            )
    except what_may_come as error:
        raise Refused(f"transformers does not open it: {str(error).strip().splitlines()[0][:300]}") from error
    model, report = loaded
    problems = {}
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        problems[kind] = sorted(map(str, report[kind]))
    if any(problems.values()):
        raise Refused(f"its weights are not those of its config.json: {first_few(problems)}")
    processor = required_processor(folder) if sees_images(config) else None
    return Opened(model, tokenizer_in(folder), with_weights=True, processor=processor)


def required_processor(folder: Path) -> Any:
    """The processor in the folder of a model that sees.

    Raises:
        Refused: there is none, or it does not open.
    """
    processor = processor_in(folder)
    if processor is None:
        raise Refused("there is no processor: without one nobody can show the model an image")
    return processor


def tokenizer_in(folder: Path) -> "PreTrainedTokenizerBase | None":
    """The tokenizer in a folder; None: there is none.

    Raises:
        Refused: it does not open.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise Refused(f"transformers does not open its tokenizer: {str(error)[:300]}") from error
    return found
