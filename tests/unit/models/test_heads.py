"""A head that is read computes as the one that is called: adapters on it, saved copies, rows, 4 bits; or it is not read."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tiny_models import padded_batch, tiny_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from llm_trainer.losses import chunked
from llm_trainer.losses.chunked import Objective
from llm_trainer.losses.language import LanguageLoss
from llm_trainer.models.heads import read_head
from llm_trainer.models.inside import transformers_model
from llm_trainer.models.scored import ScoredModel, scored

peft = pytest.importorskip("peft", reason="needs peft")

pytestmark = pytest.mark.filterwarnings("ignore")  # of what peft asks of transformers, and of heads not tied any more
VOCAB = 67  # of no other tensor in the model


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 1)  # one tile of rows


def model(tied: bool = False) -> nn.Module:
    return tiny_model(vocab_size=VOCAB, tie_word_embeddings=tied)


def with_lora(module: nn.Module, name: str = "default", **options: Any) -> nn.Module:
    settings: dict[str, Any] = {"r": 3, "lora_alpha": 6, "init_lora_weights": False} | options
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what peft imports, and of embeddings that are not tied any more
        if isinstance(module, peft.PeftModel):
            module.add_adapter(name, config)
            return module
        return peft.get_peft_model(module, config)


def with_two_adapters() -> nn.Module:
    module = with_lora(with_lora(model()), "other", r=2, use_rslora=True)
    module.base_model.set_adapter(["default", "other"])  # type: ignore[operator, union-attr]
    return module


def with_head_beside(**options: Any) -> nn.Module:
    tied = "trainable_token_indices" in options and "embed_tokens" in options["trainable_token_indices"]
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **options)
    module = peft.get_peft_model(model(tied), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # else they would be what they were copied of
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and "lora" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return module


READ: dict[str, Callable[[], nn.Module]] = {
    "plain": model,
    "LoRA": lambda: with_lora(model()),
    "rsLoRA": lambda: with_lora(model(), use_rslora=True),
    "LoRA on a tied head": lambda: with_lora(model(tied=True)),
    "LoRA with a bias": lambda: with_lora(model(), lora_bias=True),
    "two adapters": with_two_adapters,
    "a saved head": lambda: with_head_beside(modules_to_save=["lm_head"]),
    "rows of the head": lambda: with_head_beside(trainable_token_indices={"lm_head": [3, 9, 1]}),
    "rows of a tied head": lambda: with_head_beside(trainable_token_indices={"embed_tokens": [3, 9, 1]}),
}


class Widest(TorchDispatchMode):
    """Sees every tensor with a column for each id, and remembers how many rows the tallest has."""

    rows = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, Tensor) and tensor.dim() > 1 and tensor.shape[-1] == VOCAB:
                self.rows = max(self.rows, tensor.numel() // VOCAB)
        return output


def scores_of(module: ScoredModel, way: str, batch: dict[str, Any]) -> Any:
    """A loss by one of the three ways through the head."""
    if way == "objective":
        columns = {"scale": torch.linspace(0.5, 2.0, batch["labels"].numel()).view(batch["labels"].shape)}
        objective = Objective(lambda logprobs, entropy, c: c["scale"] * (entropy - 2 * logprobs), columns)
        return module(**batch, temperature=0.7, objective=objective).loss_sum
    if way == "logprobs":
        scores = module(**batch, temperature=0.7, differentiable_logprobs=True)
        return (scores.logprobs.square() + 0.3 * scores.entropy).sum()
    return module(**batch).loss_sum


def whole(module: nn.Module) -> ScoredModel:
    plain = scored(module, LanguageLoss(label_smoothing=0.1))
    plain._split = None
    return plain


CASES = [(kind, "loss") for kind in READ]
CASES += [("two adapters", "logprobs"), ("two adapters", "objective"), ("rows of a tied head", "logprobs")]


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_a_head_that_is_read_gives_loss_and_gradients_of_whole_logits(kind: str, way: str) -> None:
    batch = padded_batch()
    batch = {name: tensor.repeat(4, 1) for name, tensor in batch.items()}  # 72 labels: three tiles
    found = []
    for make in (partial(scored, loss=LanguageLoss(label_smoothing=0.1)), whole):
        torch.manual_seed(0)
        module = make(READ[kind]().double())  # so that rounding hides nothing
        with Widest() as widest:
            loss = scores_of(module, way, batch)
            loss.backward()
        is_chunked = module._split is not None
        assert is_chunked == (module.whole_logits == "" and make is not whole)
        assert (widest.rows <= chunked.TILE_ROWS) == is_chunked
        found.append((loss.detach(), {n: p.grad for n, p in module.named_parameters() if p.grad is not None}))
    (ours, gradients), (theirs, expected) = found
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0.0)
    assert gradients.keys() == expected.keys() == {name for name, p in module.named_parameters() if p.requires_grad}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-9, msg=name)


def test_what_is_read_follows_what_the_adapters_are_set_to() -> None:
    module = with_lora(model())
    wrapped, plain = scored(module), scored(model())
    batch = padded_batch()
    on = wrapped(**batch).loss_sum
    with module.disable_adapter():  # type: ignore[operator]
        off = wrapped(**batch).loss_sum
    torch.testing.assert_close(off, plain(**batch).loss_sum)
    assert (on - off).abs() > 0.1
    module.merge_adapter()  # type: ignore[operator]
    torch.testing.assert_close(wrapped(**batch).loss_sum, on)
    with module.disable_adapter():  # type: ignore[operator]
        torch.testing.assert_close(wrapped(**batch).loss_sum, off)


def test_saved_heads_are_switched_with_their_adapters() -> None:
    module = with_head_beside(modules_to_save=["lm_head"])
    head = transformers_model(module).get_output_embeddings()  # type: ignore[union-attr]
    assert read_head(head).weight is head.modules_to_save["default"].weight  # type: ignore[union-attr, index]
    with module.disable_adapter():  # type: ignore[operator]
        assert read_head(head).weight is head.original_module.weight  # type: ignore[union-attr]


def test_what_adapters_have_learned_is_not_rounded_into_a_weight_in_16_bits() -> None:
    module = with_lora(model().to(torch.bfloat16), init_lora_weights=True)
    head: Any = transformers_model(module).get_output_embeddings()  # type: ignore[union-attr]
    with torch.no_grad():
        head.lora_B["default"].weight.fill_(1e-5)  # far below the last place of the base
    read = read_head(head)
    states = torch.randn(5, 32)
    narrow = read.narrowed(states)
    assert narrow is not None and read.up is not None and read.weight is head.base_layer.weight
    expected = head.lora_B["default"](head.lora_A["default"](states)) * 2  # alpha 6 over rank 3
    torch.testing.assert_close(narrow @ read.up.t(), expected)
    assert expected.abs().max() > 0


NOT_READ = {
    "dropout": (lambda: with_lora(model(), lora_dropout=0.1), "dropout, 0.1; set lora_dropout to 0"),
    "DoRA": (lambda: with_lora(model(), use_dora=True), "DoraLinearVariant; use plain LoRA"),
    "another tuner": (
        lambda: peft.get_peft_model(model(), peft.LoHaConfig(r=2, target_modules=["lm_head"], init_weights=False)),
        "its head is a Linear",
    ),
    "no transformers model": (
        lambda: nn.Sequential(nn.Embedding(VOCAB, 4), nn.Linear(4, VOCAB)),
        "no transformers model",
    ),
}


@pytest.mark.parametrize("kind", NOT_READ)
def test_where_a_head_cannot_be_read_it_is_called_and_the_reason_is_known(kind: str) -> None:
    make, reason = NOT_READ[kind]
    torch.manual_seed(0)
    module = make().eval()
    wrapped, batch = scored(module), padded_batch()
    assert reason in wrapped.whole_logits and type(module).__name__ in wrapped.whole_logits
    ids = batch["input_ids"]
    logits = (
        module(ids) if isinstance(module, nn.Sequential) else module(ids, attention_mask=batch["attention_mask"]).logits
    )
    expected = logits[1, 3].log_softmax(-1)[batch["labels"][1, 4]]
    torch.testing.assert_close(wrapped(**batch).logprobs[1, 4], expected)


def test_a_head_in_4_bits_is_read_without_a_gradient_to_it() -> None:
    bitsandbytes: Any = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    found = []
    for make in (partial(scored, loss=LanguageLoss(label_smoothing=0.1)), whole):
        base: Any = model()
        head = bitsandbytes.nn.Linear4bit(32, VOCAB, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        head.weight = bitsandbytes.nn.Params4bit(base.lm_head.weight.data, requires_grad=False, quant_type="nf4")
        base.lm_head = head.to("cpu")
        torch.manual_seed(0)
        module = make(with_lora(base))
        assert module.whole_logits == ""
        loss = module(**padded_batch()).loss_sum
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in module.named_parameters() if p.grad is not None}))
    (ours, gradients), (theirs, expected) = found
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0.0)
    assert gradients.keys() == expected.keys() and any("lm_head.lora_B" in name for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)
