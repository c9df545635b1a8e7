"""Both ways through the head give the same scores, and the wrapper leaves the user's model as it was."""

import copy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import LENGTHS, VOCAB, flat_batch, padded_batch, tiny_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from llm_trainer.losses.chunked import Objective
from llm_trainer.losses.drawn_from import DrawnFrom
from llm_trainer.losses.experts import balance_loss, shares_of
from llm_trainer.losses.language import IGNORE, LanguageLoss
from llm_trainer.losses.policy import PolicyLoss, PolicyTokens
from llm_trainer.losses.sequences import Sequences
from llm_trainer.models.scored import ScoredModel, restarting_positions, scored
from plain_losses import cross_entropy


class Plain(nn.Module):
    """A user's module: logits of a model in one of the three forms, and only the inputs it knows."""

    def __init__(self, model: nn.Module, form: str = "tensor") -> None:
        super().__init__()
        self.inner, self.form = nn.ModuleList([model])[0], form

    def forward(self, input_ids: Tensor) -> Any:
        logits = self.inner(input_ids).logits * 1.5
        return {"tensor": logits, "object": SimpleNamespace(logits=logits), "dict": {"logits": logits}}[self.form]


def as_plain(model: nn.Module) -> ScoredModel:
    """The same model, not taken apart."""
    wrapped = scored(model, LanguageLoss(label_smoothing=0.1, critical_tokens=(5,), critical_alpha=3.0))
    wrapped._split = None
    return wrapped


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunked_and_plain_agree(differentiable: bool, temperature: float) -> None:
    loss = LanguageLoss(label_smoothing=0.1, critical_tokens=(5,), critical_alpha=3.0)
    ours, plain = scored(tiny_model(), loss), as_plain(tiny_model())
    assert ours._split is not None
    batch = padded_batch() | {"differentiable_logprobs": differentiable, "temperature": temperature}
    a, b = ours(**batch), plain(**batch)
    for name in ("loss_sum", "num_tokens", "logprobs", "correct", "entropy"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-5, atol=1e-5)
    for scores in (a, b):
        assert scores.logprobs.requires_grad == differentiable
        value = (scores.logprobs.square() + 0.3 * scores.entropy).sum() if differentiable else scores.loss_sum
        value.backward()
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("flat", [False, True], ids=["padded", "flat"])
@pytest.mark.parametrize("is_restricted", [False, True], ids=["all ids", "some ids"])
def test_a_policy_loss_in_one_run_of_the_head(flat: bool, is_restricted: bool) -> None:
    batch = flat_batch() if flat else padded_batch()
    sequences, labels = Sequences.of_batch(batch), batch["labels"]
    torch.manual_seed(0)
    tokens = PolicyTokens(torch.randn(len(LENGTHS)), -5 + torch.rand(labels.shape), -5 + torch.rand(labels.shape))
    loss = PolicyLoss("dapo", kl_coef=0.1, entropy_coef=0.1)
    how: dict[str, Any] = {"temperature": 0.7}
    if is_restricted:  # to its label and ids below 9; of prompts, where nothing counts, something else
        kept = [[*range(9), int(label)] if label != IGNORE else [1, 2] for label in labels.flatten()]
        counts = torch.tensor([len(ids) for ids in kept]).view(labels.shape)
        how["drawn_from"] = DrawnFrom(torch.tensor(sum(kept, [])), counts, torch.tensor([VOCAB - 1]))
    results = []
    for one_pass in (True, False):
        for model in (scored(tiny_model()), as_plain(tiny_model())):
            if one_pass:
                scores = model(**batch, **how, objective=Objective(*loss.per_token(tokens, sequences)))
                assert not scores.logprobs.requires_grad
                mean = scores.loss_sum / loss.num_terms(sequences)
            else:
                scores = model(**batch, **how, differentiable_logprobs=True)
                losses = loss.token_losses(scores.logprobs, tokens, sequences, scores.entropy)
                mean = loss.mean(losses, sequences)
            mean.backward()
            results.append([mean, scores.logprobs, scores.entropy, *(p.grad for p in model.parameters())])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_scores_stand_at_their_labels() -> None:
    model, batch = tiny_model(), padded_batch()
    scores = scored(model)(**batch)
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = logits[1, 3].log_softmax(-1)[batch["labels"][1, 4]]
    assert scores.logprobs[1, 4].item() == pytest.approx(expected.item(), abs=1e-5)
    assert not scores.logprobs[batch["labels"] == IGNORE].any()
    assert scores.num_tokens.item() == (batch["labels"][:, 1:] != IGNORE).sum().item()
    assert scores.loss_sum.item() == pytest.approx(
        cross_entropy(logits, batch["labels"]).item() * scores.num_tokens.item(), rel=1e-5
    )


def test_labels_are_the_unpadded_inputs_by_default() -> None:
    batch = padded_batch()
    del batch["labels"]
    assert scored(tiny_model())(**batch).num_tokens.item() == sum(LENGTHS) - len(LENGTHS)


def test_position_ids_follow_from_document_lengths() -> None:
    assert restarting_positions(torch.tensor([2, 3])).tolist() == [[0, 1, 0, 1, 2]]
    batch, model = flat_batch(), scored(tiny_model())
    expected = model(**batch).logprobs
    del batch["position_ids"]
    assert torch.equal(model(**batch).logprobs, expected)


@pytest.mark.parametrize("form", ["tensor", "object", "dict"])
def test_any_module_that_gives_logits(form: str) -> None:
    model = tiny_model()
    wrapped, batch = scored(Plain(model, form)), padded_batch()
    assert wrapped._split is None  # its logits are scaled
    scores = wrapped(**batch)
    logits = model(batch["input_ids"]).logits * 1.5
    assert scores.loss_sum.item() / scores.num_tokens.item() == pytest.approx(
        cross_entropy(logits, batch["labels"]).item(), rel=1e-5
    )
    with pytest.raises(ValueError, match="position_ids"):
        wrapped(**flat_batch())


def test_a_module_without_logits_is_named() -> None:
    with pytest.raises(ValueError, match=r"Embedding.*expected logits|Tuple.*tuple"):
        scored(_Tuple())(torch.zeros(1, 3, dtype=torch.long))


class _Tuple(nn.Module):
    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        return (input_ids,)


def small(config: Any) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def test_soft_capped_logits_take_the_plain_path_and_gpt2_the_chunked_one() -> None:
    gemma = Gemma2Config(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=30.0, attn_logit_softcapping=None,
    )  # fmt: skip
    gpt2 = small(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    assert scored(small(gemma))._split is None
    wrapped = scored(gpt2.eval())
    assert wrapped._split is not None
    torch.testing.assert_close(wrapped(**padded_batch()).logprobs, as_plain(gpt2)(**padded_batch()).logprobs)


def test_logits_that_the_model_casts_are_still_those_of_the_head() -> None:
    class Casting(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.inner, self.scale = tiny_model().to(torch.bfloat16), scale

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
            return self.inner(input_ids, attention_mask=attention_mask).logits.float() * self.scale

    model, batch = Casting(1.0), padded_batch()
    wrapped = scored(model)
    assert wrapped._split is not None
    torch.testing.assert_close(wrapped(**batch).logprobs, as_plain(model)(**batch).logprobs, rtol=1e-2, atol=1e-2)
    assert scored(Casting(2.0))._split is None


def test_wrapping_leaves_the_model_as_it_was() -> None:
    model = tiny_model().train()
    model.model.layers[0].eval()
    names, modes = list(model.state_dict()), [module.training for module in model.modules()]
    wrapped = scored(model)
    assert wrapped.base is model
    assert list(model.state_dict()) == names and [module.training for module in model.modules()] == modes
    assert [name.removeprefix("base.") for name in wrapped.state_dict()] == names
    assert not model.lm_head._forward_hooks
    twin = copy.deepcopy(wrapped)
    with torch.no_grad():
        twin.base.get_parameter("model.embed_tokens.weight").zero_()
    assert twin(**padded_batch()).loss_sum != wrapped(**padded_batch()).loss_sum  # and not the head of the original


def test_experts_are_balanced_over_real_tokens() -> None:
    model, batch = tiny_model(architecture="qwen3_moe"), padded_batch()
    scores = scored(model)(**batch)
    output = model(batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True)
    assert scores.routing is not None and scores.routing.tokens == batch["attention_mask"].sum()
    loss = balance_loss(scores.routing, shares_of(scores.routing.assigned, 2))
    assert loss.item() == pytest.approx(output.aux_loss.item(), rel=1e-5)  # transformers' own
    assert scored(tiny_model())(**batch).routing is None


def test_the_experts_of_a_vision_language_model_are_found() -> None:
    """Their number stands in the configuration of its language model."""
    text = {
        "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "num_experts": 4,
        "num_experts_per_tok": 2, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        "pad_token_id": None,
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": 16,
        "deepstack_visual_indexes": [0],
    }  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision)).eval()
    batch = padded_batch()
    scores = scored(model)(**batch)
    output = model(batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True)
    assert scores.routing is not None
    loss = balance_loss(scores.routing, shares_of(scores.routing.assigned, 2))
    assert loss.item() == pytest.approx(output.aux_loss.item(), rel=1e-5)


def test_nothing_supervised_is_zero_with_zero_gradients() -> None:
    model, batch = scored(tiny_model()), padded_batch()
    batch["labels"].fill_(IGNORE)
    scores = model(**batch)
    scores.loss_sum.backward()
    assert scores.loss_sum.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


OUTLIVES = []  # modules that stay until the process ends


def test_inside_ddp(tmp_path: Path) -> None:
    """NOTE: the module is kept. It holds the process group, whose threads end with it; one that is still about to free what
    it reduced last needs Python's lock for that, and who waits for the thread has the lock: nobody would go on."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(scored(tiny_model()))
        OUTLIVES.append(model)
        scores = model(**padded_batch())
        scores.loss_sum.backward()
        assert all(p.grad is not None for p in model.parameters())
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # in a part of torch that its compiler imports
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_backbone_gives_the_same_scores_on_every_batch(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    compiler = partial(torch.compile, backend=backend)
    monkeypatch.setattr("llm_trainer.models.seeing.compiled", compiler)
    ours, compiled = scored(tiny_model()), scored(tiny_model())
    names = list(compiled.state_dict())
    compiled.compile()
    for batch in (flat_batch(), padded_batch()):
        a, b = ours(**batch), compiled(**batch)
        torch.testing.assert_close(b.logprobs, a.logprobs, rtol=1e-4, atol=1e-4)
        a.loss_sum.backward()
        b.loss_sum.backward()
    for p, q in zip(ours.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-4)
    assert list(compiled.state_dict()) == names
