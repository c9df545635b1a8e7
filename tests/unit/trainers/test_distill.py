"""Distillation in the trainers: its loss against the plain formula, cuts of a step, teachers that do not fit, own answers."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llm_trainer import Distillation, SFTTrainer, configure_optimizer
from llm_trainer.config.model import ModelConfig
from llm_trainer.data.collate import collate_flat
from llm_trainer.generation.in_process import InProcess
from llm_trainer.losses.distill import divergence
from llm_trainer.models.build import build_model
from llm_trainer.train.hooks import Hook
from llm_trainer.trainers import distill
from llm_trainer.trainers.distill import TeacherError, check_same_tokenizer, own_answers

V, PADDED = 40, 48


def model(vocab_size: int = V, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    shape = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,
    )
    return build_model(shape)


LENGTHS, PROMPTS = (9, 4, 12, 7), (3, 3, 2, 6)


def batch(rows: slice = slice(None)) -> dict[str, Tensor]:
    """Four rows of random ids, padded on the right with garbage, prompts unsupervised."""
    ids = torch.randint(3, V, (4, 12), generator=torch.Generator().manual_seed(0))
    positions, lengths, prompts = torch.arange(12), torch.tensor(LENGTHS)[:, None], torch.tensor(PROMPTS)[:, None]
    labels = ids.where((positions >= prompts) & (positions < lengths), -100)
    whole = {"input_ids": ids, "labels": labels, "attention_mask": (positions < lengths).long()}
    return {name: value[rows] for name, value in whole.items()}


def flat_batch() -> dict[str, Tensor]:
    ids = batch()["input_ids"].numpy()
    rows = zip(ids, LENGTHS, PROMPTS, strict=True)
    return collate_flat(
        [{"input_ids": r[:n], "trained": [t >= p for t in range(n)], "document_lengths": [n]} for r, n, p in rows]
    )


def trainer(path: Path, batches: list, student: Any = None, watch: list | None = None, **options: Any) -> SFTTrainer:
    student = student or model()
    watch = [] if watch is None else watch
    defaults: dict[str, Any] = {"grad_accum_steps": len(batches), "max_epochs": 1, "save_interval": 0}
    return SFTTrainer(
        model=student,
        optimizer=configure_optimizer(model=student, lr=1e-2),
        train_loader=batches,
        device="cpu",
        use_amp=False,
        log_interval=1,
        save_dir=str(path),
        progress=False,
        hooks=[Hook("watch", lambda run: watch.append(dict(run.values)), every_steps=1)],
        **(defaults | options),
    )


def first_step(path: Path, batches: list, **options: Any) -> dict[str, float]:
    seen: list[dict[str, float]] = []
    trainer(path, batches, watch=seen, **options).train()
    return seen[0]


def plain_step(student: Any, teacher: Any, kd: Distillation, beta: float) -> dict[str, float]:
    """The first step by the formula, from whole logits."""
    rows = batch()
    logits, theirs = (  # padding is on the right: without a mask, no token sees it
        out if isinstance(out, Tensor) else out.logits
        for out in (student(rows["input_ids"]), teacher(rows["input_ids"]))
    )
    labels = rows["labels"][:, 1:]
    distances = divergence(logits[:, :-1], theirs[:, :-1], beta, kd.temperature)[labels != -100]
    distance = distances.mean() * (kd.temperature**2 if kd.t_squared else 1.0)
    task = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())
    loss = kd.kd_coef * distance + (1 - kd.kd_coef) * task
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    norm = torch.stack([g.norm() for g in torch.autograd.grad(loss, trained)]).norm()
    return {"kd_loss": distance.item(), "task_loss": task.item(), "loss": loss.item(), "grad_norm": norm.item()}


def biased(vocab_size: int = V, seed: int = 0) -> Any:
    one = model(vocab_size, seed)
    one.lm_head = torch.nn.Linear(16, vocab_size)
    return one


def adapted(vocab_size: int = V, seed: int = 0) -> Any:
    """With adapters that have learned before, on its body and its head."""
    peft = pytest.importorskip("peft", reason="needs peft")
    options = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "lm_head"], init_lora_weights=False)
    base = model(vocab_size, seed)
    base.lm_head = torch.nn.Linear(16, vocab_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what peft imports
        return peft.get_peft_model(base, options)


def bigrams(vocab_size: int = V, seed: int = 0) -> Any:
    """A module of which nothing but its logits is known."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Embedding(vocab_size, 8), torch.nn.Linear(8, vocab_size))


@pytest.mark.parametrize(
    ("make", "kind", "beta", "t_squared"),
    [
        (model, "forward_kl", 0.0, False),
        (model, "jsd", 0.3, True),
        (biased, "reverse_kl", 1.0, True),
        (adapted, "jsd", 0.3, True),
        (bigrams, "jsd", 0.3, True),
    ],
)
def test_the_loss_is_the_plain_formula(make: Any, kind: str, beta: float, t_squared: bool, tmp_path: Path) -> None:
    student, teacher = make(), make(PADDED, seed=1)
    options: dict[str, Any] = {"divergence": kind} | ({"beta": beta} if kind == "jsd" else {})
    how = Distillation(teacher_model=teacher, kd_coef=0.7, temperature=2.0, t_squared=t_squared, **options)
    expected = plain_step(student, teacher, how, beta)
    found = first_step(tmp_path, [batch()], student=student, kd=how)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert expected["kd_loss"] > 0.01


def test_neither_cuts_nor_layout_nor_the_kind_of_teacher_change_the_step(tmp_path: Path) -> None:
    teacher = model(PADDED, seed=1)

    def provider(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return teacher(input_ids, attention_mask=attention_mask).logits

    whole, cut = [batch()], [batch(slice(0, 1)), batch(slice(1, 4))]
    steps = [
        first_step(tmp_path, batches, kd=Distillation(**source))
        for batches in (whole, cut, [flat_batch()])
        for source in ({"teacher_model": teacher}, {"teacher_logits_provider": provider})
    ] + [first_step(tmp_path, whole, teacher_model=teacher)]
    for name in ("loss", "kd_loss", "task_loss", "grad_norm"):
        assert [step[name] for step in steps] == pytest.approx([steps[0][name]] * 7, rel=2e-5), name


def test_few_rows_of_logits_exist_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    teacher_head = distill.teacher_head

    def counting(hidden: Tensor, weight: Tensor) -> Any:
        logits = teacher_head(hidden, weight)
        return lambda start, stop: asked.append(stop - start) or logits(start, stop)

    monkeypatch.setattr(distill, "teacher_head", counting)
    whole = first_step(tmp_path, [batch()], teacher_model=model(seed=1))
    monkeypatch.setattr(distill, "CHUNK_ELEMENTS", 5 * V + 1)
    chunked = first_step(tmp_path, [batch()], teacher_model=model(seed=1))
    assert asked == [18, 5, 5, 5, 3]
    assert chunked["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5)


def test_teachers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    def short(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.zeros(len(input_ids), 3, V)

    same = model()
    with pytest.raises(TeacherError, match="teacher_model knows 32 tokens, the student 40; expected"):
        trainer(tmp_path, [batch()], teacher_model=model(32))
    with pytest.raises(ValueError, match="teacher has 32 tokens, the student 40"):
        first_step(
            tmp_path, [batch()], kd=Distillation(teacher_logits_provider=lambda ids, _: torch.zeros(*ids.shape, 32))
        )
    with pytest.raises(TeacherError, match=r"shape \(4, 3, 40\) for input_ids \(4, 12\); expected \(4, 12\) and"):
        first_step(tmp_path, [batch()], kd=Distillation(teacher_logits_provider=short))
    for options, found in (
        ({"kd": Distillation()}, "neither"),
        ({"kd": Distillation(teacher_logits_provider=short), "teacher_model": same}, "both"),
        ({"student": same, "teacher_model": same}, "the student itself"),
    ):
        with pytest.raises(TeacherError, match=f"found {found}"):
            trainer(tmp_path, [batch()], **options)
    for wrong in ({"divergence": "kl"}, {"beta": 1.0}, {"kd_coef": 1.5}, {"on_policy_fraction": 0.5}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}.*expected"):
            Distillation(**wrong)


def test_another_tokenizer_is_refused_by_its_first_ids() -> None:
    ours = {"a": 0, "b": 1, "c": 2}
    check_same_tokenizer(ours, dict(ours), "same")
    with pytest.raises(
        TeacherError, match="'big' has .* 3 ids differ .id 1 is 'b' here and 'c' there; id 2 .*id 3 is None"
    ):
        check_same_tokenizer(ours, {"a": 0, "c": 1, "b": 2, "<pad>": 3}, "big")


GKD = Distillation(on_policy_fraction=0.5, max_new_tokens=5, stop_token_ids=(1, 2, 3, 4))


def test_own_answers_replace_the_last_answer_whatever_the_batch() -> None:
    student, rows = InProcess(model()), batch()
    rows["labels"][0, 5:7] = -100  # two answers: what is asked for is all before the second
    rows["labels"][1] = -100  # no answer
    found = own_answers(rows, student, GKD, seed=7)
    for r, start in enumerate((7, 4, 2, 6)):
        assert found["input_ids"][r, :start].equal(rows["input_ids"][r, :start])
        length = int(found["attention_mask"][r].sum())
        assert found["labels"][r].ne(-100).nonzero()[:, 0].tolist() == list(range(start, length))
        assert found["labels"][r, start:length].equal(found["input_ids"][r, start:length])
        assert 1 <= length - start <= 5 or r == 1
        new = found["input_ids"][r, start:length].tolist()
        assert len(new) in (0, 5) or new[-1] in GKD.stop_token_ids
        left = {name: value[r : r + 1].roll(12 - LENGTHS[r], 1) for name, value in rows.items()}
        alone = own_answers(left, student, GKD, seed=7)  # padded on the left, in a batch of its own
        assert alone["input_ids"][0].equal(found["input_ids"][r, :length])
    assert not own_answers(rows, student, GKD, seed=8)["input_ids"].equal(found["input_ids"])
    plain, flat = own_answers(batch(), student, GKD, 7), own_answers(flat_batch(), student, GKD, 7)
    assert all(plain[name].equal(flat[name]) for name in plain)


def test_on_policy_steps_are_a_function_of_seed_and_step_and_resume(tmp_path: Path) -> None:
    assert [GKD.sampling_seed(0, k) is not None for k in range(1000)].count(True) == pytest.approx(500, abs=50)
    assert Distillation().sampling_seed(0, 0) is None

    def run(name: str, **options: Any) -> tuple[list, SFTTrainer]:
        seen: list[dict[str, float]] = []
        one = trainer(
            tmp_path / name,
            [batch()] * 4,
            watch=seen,
            kd=GKD,
            teacher_model=model(seed=1),
            grad_accum_steps=1,
            **options,
        )
        one.train()
        return [(step["loss"], step["num_tokens"]) for step in seen], one

    whole, _ = run("whole")
    first, _ = run("part", max_steps=2)
    rest, resumed = run("part", resume="auto")
    # A resumed run first calls the hooks that the checkpoint came before.
    assert first + rest[-2:] == whole and resumed.run.progress.step == 4
    tokens = {after - before for (_, before), (_, after) in zip([(0, 0), *whole], whole, strict=False)}
    assert sum(LENGTHS) in tokens and len(tokens) > 1  # some steps on the given answers, some on its own
