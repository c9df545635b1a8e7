"""GRPO on prompts that show images: sampler and trainer see the same, whatever shares a micro-batch, and rollouts keep it."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("PIL")
import torch

import policies
import seeing_policies as seeing
from llm_trainer.data.images import count_image
from llm_trainer.data.order import fingerprint
from llm_trainer.data.read.errors import DataError, Location
from llm_trainer.data.rollout_prompts import in_groups, rows_of
from llm_trainer.data.rollouts import Plan, Rollout
from llm_trainer.data.vision import ImageFormat
from llm_trainer.image_batch import ImageBatch
from llm_trainer.models.rewarding import Rewarding, StepJudge, process_reward_model, reward_model
from llm_trainer.models.seeing import may_be_shown_images
from llm_trainer.models.vision import Vision
from vision_data import file_of, picture

LEARNED = ("loss", "grad_norm", "reward")


def curve(seen: list[dict[str, float]]) -> list[list[float]]:
    return [[values[name] for name in LEARNED if name in values] for values in seen]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, list[dict[str, float]]]:
    """Three rollouts of text, of one picture and of two, of which each is learned from twice."""
    folder = tmp_path_factory.mktemp("seen")
    asked: list[Any] = []

    def judged(prompts: Any, completions: list[str], answers: Any, images: list[Any]) -> list[float]:
        asked.extend(images)
        return seeing.even_share(prompts, completions, answers)

    how: dict[str, Any] = {"reward_func": judged, "reward_in_process": True, "kl_coef": 0.1, "grpo_steps": 2}
    trainer, seen = seeing.train("grpo", folder, **how)
    trainer.asked = asked
    return folder, trainer, seen


def test_sampler_and_trainer_see_the_same(run: tuple[Path, Any, Any]) -> None:
    folder, trainer, seen = run
    assert trainer.shares_prompts and trainer.machine.layout.flat
    assert max(values["sampling/sampling_logp_difference/max"] for values in seen) < 1e-5
    shown = [sum(part.tower_tokens > 0) for part in policies.rollouts_of(folder)]
    assert shown == [4, 4, 8]


def test_a_rollout_keeps_the_images_of_its_prompts_and_their_bytes_once_per_group(run: tuple[Path, Any, Any]) -> None:
    rollout = policies.rollouts_of(run[0])[2]
    of_rows = [[image.source for image in rollout.images(row)] for row in range(8)]
    pictures = seeing.pictures()
    assert of_rows == [[pictures[1]]] * 4 + [[pictures[2], pictures[0]]] * 4
    sizes = np.diff(rollout.store["image_bytes"].offsets).tolist()
    assert [size > 0 for size in sizes] == [True, *[False] * 3] * 2
    assert rollout.costs.tolist() == (rollout.lengths + np.repeat([4, 8], 4)).tolist()
    assert rollout[4].place == "completion 4 of rollout 00000002"


def test_rewards_may_look_at_the_images(run: tuple[Path, Any, Any]) -> None:
    pictures = seeing.pictures()
    assert run[1].asked[4:8] == [[pictures[1]]] * 4 and run[1].asked[:4] == [[]] * 4


@pytest.mark.parametrize(
    "how", [{"share_prompts": False}, {"packing": "none"}, {"micro_batch_tokens": 45}], ids=lambda how: next(iter(how))
)
def test_losses_do_not_depend_on_how_rows_are_laid(run: tuple[Path, Any, Any], how: Any, tmp_path: Path) -> None:
    """Prompts once per group or again and again, padded, and cut by tokens."""
    own = {"kl_coef": 0.1, "grpo_steps": 2, "reward_in_process": True}
    trainer, seen = seeing.train("grpo", tmp_path, **own, **how)
    assert trainer.shares_prompts is ("micro_batch_tokens" in how)
    for found, expected in zip(curve(seen), curve(run[2]), strict=True):
        assert found == pytest.approx(expected, abs=1e-5, rel=1e-5)


def test_each_image_of_a_micro_batch_is_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all completions of its group; and for policy and reference where neither learns to see. Text runs the tower too."""
    seen: list[int] = []
    encode, zero = Vision.encode, Vision.zero

    def counting(self: Any, images: Any) -> Any:
        seen.append(len(images.lengths))
        return encode(self, images)

    def blank(self: Any, images: Any = None) -> Any:
        seen.append(0)
        return zero(self, images)

    monkeypatch.setattr(Vision, "encode", counting)
    monkeypatch.setattr(Vision, "zero", blank)
    monkeypatch.setattr(
        "llm_trainer.train.run.probe_file", lambda *given: {}
    )  # the record at the end shows pictures too
    model = seeing.tiny()
    for parameter in (*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()):
        parameter.requires_grad_(False)
    how = {"kl_coef": 0.1, "grpo_steps": 2, "train_loader": seeing.prompts(3, 3), "reward_in_process": True}
    trainer = policies.make("grpo", tmp_path, model, **seeing.options(**how))
    del seen[:]  # of what was tried out
    trainer.train()
    # The probe is text; prompts 1 and 2 show a picture and two to the sampler; 12 rows are scored, once for policy and
    # reference, and then learned from twice, in two micro-batches each time.
    assert seen[:4] == [0, 1, 2, 3] and len(seen) == 8 and all(0 <= count <= 3 for count in seen[4:])


# Reward models that see what prompts show.


@pytest.mark.parametrize("judges_steps", [False, True], ids=["answers", "steps"])
def test_a_reward_model_sees_what_prompts_show(judges_steps: bool, tmp_path: Path) -> None:
    """Its numbers are those of each row alone with its own pictures, whatever shares a micro-batch."""
    make = process_reward_model if judges_steps else reward_model
    judge = make(seeing.tiny(seed=1), pad_token_id=0).eval()
    alone = Rewarding(copy.deepcopy(judge))
    how: dict[str, Any] = {"reward_func": None, "reward_model": judge, "micro_batch_tokens": 45}
    if judges_steps:
        how["reward_model_steps"] = "e"
    _, seen = seeing.train("grpo", tmp_path, **how)
    assert all(values["grad_norm"] > 0 for values in seen)
    images, shown, others = ImageFormat(seeing.processor()), 0, []
    for rollout in policies.rollouts_of(tmp_path):
        judged = rollout.step_rewards() if judges_steps else rollout.column("model_reward")
        for row in range(len(rollout)):
            ids = torch.from_numpy(rollout.store["input_ids"][row].astype(np.int64))[None]
            opened = images.opened([(rollout.images(row), "here")])
            expected = of_row(alone, ids, opened, judged[row])
            assert np.nanmax(np.abs(judged[row] - expected)) < 1e-5
            if opened is not None:
                shown += 1
                unlit = {name: value * 0 for name, value in opened.inputs.items()}
                dark = of_row(alone, ids, replace(opened, inputs=unlit), judged[row])
                others.append(np.nanmax(np.abs(judged[row] - dark)))
    assert shown == 16 and min(others) > 1e-5 and max(others) > 1e-2


@torch.no_grad()
def of_row(model: Rewarding, ids: torch.Tensor, images: Any, judged: Any) -> Any:
    """The number of a row, or those of the steps that were judged, by a model that is shown this row alone."""
    if np.ndim(judged) == 0:
        return float(model(ids, torch.ones_like(ids), images=images))
    scores = model.per_token(ids, attention_mask=torch.ones_like(ids), images=images)[0].sigmoid()
    return np.where(np.isnan(judged), np.nan, scores.numpy())


def test_a_judge_with_two_labels_sees_the_steps() -> None:
    from transformers import LlavaConfig

    from llm_trainer.models.pretrained import Kind
    from llm_trainer.models.rewarding import classifier_class

    config = copy.deepcopy(seeing.tiny().config)
    assert isinstance(config, LlavaConfig)
    config.id2label = {0: "wrong", 1: "right"}
    torch.manual_seed(3)
    model = classifier_class(Kind.STEP_REWARD_MODEL, config)._from_config(config).eval()
    judge, ids = StepJudge(model), torch.randint(10, 250, (2, 9))
    ids[:, 2:6] = seeing.image_id()
    refs = [count_image(data, None, Location("here")) for data in seeing.pictures()[:2]]
    opened = ImageFormat(seeing.processor()).opened([([ref], "here") for ref in refs])
    with torch.no_grad():
        found = judge(ids, torch.ones_like(ids), opened)
        logits = model(ids, attention_mask=torch.ones_like(ids), pixel_values=opened.inputs["pixel_values"]).logits
    torch.testing.assert_close(found, logits.softmax(-1)[..., 1])
    assert may_be_shown_images(judge.model)
    assert not may_be_shown_images(StepJudge(process_reward_model(policies.tiny())).model)


def test_a_judge_with_another_placeholder_is_refused(tmp_path: Path) -> None:
    other = seeing.tiny(seed=1)
    other.config.image_token_id = 7
    trainer = policies.make("grpo", tmp_path, seeing.tiny(), **seeing.options(reward_model=reward_model(other)))
    expected = (
        f"the placeholder of an image is token 7 for the reward model, and {seeing.image_id()} for the policy; expected"
    )
    with pytest.raises(ValueError, match=expected):
        trainer._rollout_maker().images.check()


class Uses(torch.nn.Module):
    """Of the user: how many images a row shows."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, images: Any = None) -> torch.Tensor:
        return torch.zeros(len(input_ids)) if images is None else images.counts.float()


def test_a_module_of_the_user_may_take_images(tmp_path: Path) -> None:
    seeing.train("grpo", tmp_path, reward_func=None, reward_model=Uses())
    found = [rollout.column("model_reward").tolist() for rollout in policies.rollouts_of(tmp_path)]
    assert found == [[0.0] * 4 + [1.0] * 4, [2.0] * 4 + [0.0] * 4, [1.0] * 4 + [2.0] * 4]


# A critic that sees what prompts show.

CRITICS: dict[str, Any] = {
    "on the policy": lambda: {"critic_on_policy": True},
    "a copy": dict,
    "a model": lambda: {"value_model": seeing.tiny(seed=3)},
}
CUTS: list[dict[str, Any]] = [{"packing": "none"}, {"micro_batch_tokens": 45}]


@pytest.mark.parametrize("which", CRITICS)
def test_policy_and_critic_see_the_same_however_rows_are_laid(which: str, tmp_path: Path) -> None:
    """Flat, padded, and cut by tokens; what the critic says of a row is what it says of the row alone."""
    own: dict[str, Any] = {"kl_beta": 0.1, "reward_in_process": True}
    torch.manual_seed(4)  # of the new head
    trainer, seen = seeing.train("ppo", tmp_path / "flat", **own, **CRITICS[which]())
    assert trainer.machine.layout.flat and len(seen) == 6 and trainer._acting.shares_body is (which == "on the policy")
    assert max(values["sampling/sampling_logp_difference/max"] for values in seen) < 1e-5
    for number, how in enumerate(CUTS):
        torch.manual_seed(4)
        _, other = seeing.train("ppo", tmp_path / str(number), **own, **how, **CRITICS[which]())
        for found, expected in zip(of_ppo(other), of_ppo(seen), strict=True):
            assert found == pytest.approx(expected, abs=1e-5, rel=1e-5)


def of_ppo(seen: list[dict[str, float]]) -> list[list[float]]:
    return [[values[name] for name in ("loss", "loss/value_avg", "grad_norm", "reward")] for values in seen]


@pytest.mark.parametrize(
    ("name", "how"),
    [("grpo", {"kl_coef": 0.1}), ("ppo", {"kl_beta": 0.1}), ("ppo", {"kl_beta": 0.1, "critic_on_policy": False})],
)
def test_a_policy_with_adapters_is_held_to_itself_and_sees(name: str, how: dict[str, Any], tmp_path: Path) -> None:
    """The reference is the policy with its adapters off, or as they began, shown the same."""
    pytest.importorskip("peft")
    from llm_trainer.config.adapters import AdapterConfig
    from llm_trainer.models.adapters import adapt

    torch.manual_seed(5)
    model = adapt(seeing.tiny(), AdapterConfig(), [])
    trainer, seen = seeing.train(name, tmp_path, model, max_steps=3, reward_in_process=True, **how)
    assert len(seen) == 3 and min(values["grad_norm"] for values in seen) > 0
    if name == "ppo":
        assert trainer._acting.shares_body is ("critic_on_policy" not in how)
    for rollout in policies.rollouts_of(tmp_path)[:1]:
        for row in range(len(rollout)):
            old, held_to = (rollout.store[f"{which}_logprobs"][row] for which in ("sampled", "ref"))
            drawn = rollout.store["trained"][row]
            np.testing.assert_allclose(held_to[drawn], old[drawn], atol=1e-5)


def test_values_are_those_of_each_row_alone(tmp_path: Path) -> None:
    critic = reward_model(seeing.tiny(seed=3), pad_token_id=0).eval()
    alone = Rewarding(copy.deepcopy(critic))
    seeing.train("ppo", tmp_path, value_model=critic, reward_in_process=True, micro_batch_tokens=45, max_steps=1)
    (rollout, *_), images = policies.rollouts_of(tmp_path), ImageFormat(seeing.processor())
    differences = []
    for row in range(len(rollout)):
        ids = torch.from_numpy(rollout.store["input_ids"][row].astype(np.int64))[None]
        opened, trained = images.opened([(rollout.images(row), "here")]), rollout.store["trained"][row]
        with torch.no_grad():
            values = alone.per_token(ids, attention_mask=torch.ones_like(ids), images=opened)[0]
        expected = np.where(trained[1:], values[:-1].numpy(), 0.0)  # of what stands before each token
        np.testing.assert_allclose(rollout.store["values"][row][1:], expected, atol=1e-5)
        if opened is not None:
            unlit = {name: value * 0 for name, value in opened.inputs.items()}
            with torch.no_grad():
                dark = alone.per_token(ids, attention_mask=torch.ones_like(ids), images=replace(opened, inputs=unlit))[
                    0
                ]
            differences.append(float((dark - values).abs().max()))
    assert len(differences) == 2 and min(differences) > 1e-2


@pytest.mark.parametrize("learns", [False, True])
def test_policy_reference_and_critic_that_do_not_learn_to_see_encode_once(
    learns: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A critic that was made of the policy; where eyes learn, each sees for itself."""
    seen: list[int] = []
    encode = Vision.encode

    def counting(self: Any, images: Any) -> Any:
        seen.append(len(images.lengths))
        return encode(self, images)

    monkeypatch.setattr(Vision, "encode", counting)
    monkeypatch.setattr("llm_trainer.train.run.probe_file", lambda *given: {})
    model = seeing.tiny()
    for parameter in (*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()):
        parameter.requires_grad_(learns)
    how = {"kl_beta": 0.1, "ppo_batch_size": None, "train_loader": seeing.prompts(3, 3), "reward_in_process": True}
    trainer = policies.make("ppo", tmp_path, model, **seeing.options(**how))
    del seen[:]  # of what was tried out
    trainer.train()
    # The sampler sees prompts 1 and 2; six rows are scored by all three models, and learned from twice by two of them.
    assert seen == ([1, 2, *3 * [3], *4 * [3]] if learns else [1, 2, 3, 3, 3])


def test_the_sampler_gets_the_weights_of_tower_and_projector(tmp_path: Path) -> None:
    trainer, _ = seeing.train("grpo", tmp_path, max_steps=1, reward_in_process=True)
    before = seeing.tiny().state_dict()
    service = trainer._service_of_run()
    service.load(trainer.machine.stream_weights(), 1)
    held = dict(service.service.copy.held())
    changed = [name for name, value in held.items() if not torch.equal(value, before[name])]
    assert any("vision_tower" in name for name in changed) and any("projector" in name for name in changed)


def test_no_placeholder_is_ever_drawn(tmp_path: Path) -> None:
    """The likeliest token of all, and what is learned from knows that it could not be drawn."""
    model = seeing.tiny()
    with torch.no_grad():
        model.lm_head.weight[seeing.image_id()] = 20 * model.lm_head.weight.mean(0) + 1
    _, seen = seeing.train("grpo", tmp_path, model, reward_in_process=True)
    for rollout in policies.rollouts_of(tmp_path):
        for row in range(len(rollout)):
            ids, trained = rollout.store["input_ids"][row], rollout.store["trained"][row]
            assert seeing.image_id() not in ids[trained]
    assert max(values["sampling/sampling_logp_difference/max"] for values in seen) < 1e-5


def test_rollouts_made_ahead_show_their_images_too(tmp_path: Path) -> None:
    _, seen = seeing.train("grpo", tmp_path, max_staleness=1, reward_in_process=False)
    assert [values["staleness/max"] for values in seen] == [0, 1, 1]
    assert seen[0]["sampling/sampling_logp_difference/max"] < 1e-5


def test_a_prompt_is_known_by_its_images() -> None:
    images = ImageFormat(seeing.processor())
    batch = seeing.prompts()[2]
    other = copy.copy(batch) | {"images": [[seeing.pictures()[2]], batch["images"][1]]}
    prints = []
    for one in (batch, batch, other):
        prints.append([prompt.fingerprint(0) for prompt in in_groups(rows_of(one, images=images))])
    assert prints[0] == prints[1] and prints[0][0] != prints[2][0] and prints[0][1] == prints[2][1]
    text = in_groups(rows_of({"prompts": torch.ones(1, 3).long()}))[0]
    assert text.images == () and text.fingerprint(0) == fingerprint([np.ones(3, dtype=np.int64), "None", {}, []])


def test_images_of_batches_come_as_paths_bytes_or_pictures(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(seeing.pictures()[0])
    image = picture(seeing.SIDE, seeing.SIDE, 0)
    counted = count_image(seeing.pictures()[0], None, Location("here"))
    forms: list[Any] = [str(tmp_path / "a.png"), seeing.pictures()[0], image, {"bytes": file_of(image)}, counted, None]
    batch = {"prompts": torch.ones(6, 2).long(), "images": [*[[form] for form in forms[:5]], None]}
    rows = rows_of(batch, images=ImageFormat(seeing.processor()))
    assert [len(row["images"]) for row in rows] == [1, 1, 1, 1, 1, 0]
    assert len({row["images"][0].digest for row in rows[:5]}) == 1


# What cannot be.


def refused(folder: Path, name: str = "grpo", model: Any = None, **changes: Any) -> str:
    with pytest.raises((ValueError, DataError)) as found:
        seeing.train(name, folder, model, **({"reward_in_process": True} | changes))
    return str(found.value)


def test_more_placeholders_than_images_and_the_reverse(tmp_path: Path) -> None:
    fewer, more = seeing.prompts(2), seeing.prompts(2)
    fewer[0]["images"], more[0]["images"] = [[], []], [[], seeing.pictures()[:2]]
    found = refused(tmp_path / "fewer", train_loader=fewer)
    assert "number 1 of a rollout: 4 placeholders behind those of the 0 images; expected none" in found
    found = refused(tmp_path / "more", train_loader=more)
    assert "other placeholders than the 4 of image 2 (8 x 8 pixels)" in found


def test_an_image_that_is_gone_or_another_one(tmp_path: Path) -> None:
    """When it is drawn for, and when it is learned from: its path is kept, and its digest."""
    paths = []
    for number, data in enumerate(seeing.pictures()):
        paths.append(tmp_path / f"{number}.png")
        paths[-1].write_bytes(data)

    def change(name: str, becomes: bytes | None) -> str:
        def reward(prompts: Any, completions: list[str], answers: Any) -> list[float]:
            if becomes is None:
                paths[0].unlink()
            else:
                paths[0].write_bytes(becomes)
            return [float(len(text)) for text in completions]

        batches = seeing.prompts(6, 6, list(map(str, paths)))
        return refused(tmp_path / name, train_loader=batches, reward_func=reward)

    found = change("other", seeing.pictures()[1])
    assert "found another image than the one that was counted (8 x 8 pixels)" in found and "completion " in found
    paths[0].write_bytes(seeing.pictures()[0])
    assert f"found no file at {paths[0]}" in change("gone", None)


def test_a_model_that_reads_text_is_shown_nothing(tmp_path: Path) -> None:
    text = policies.tiny(vocab_size=300, max_position_embeddings=64)
    found = refused(tmp_path, model=text)
    assert "row 1 of a batch of prompts shows 1 image, and nothing makes tokens and numbers of them" in found


def test_pixels_are_no_images(tmp_path: Path) -> None:
    batch = seeing.prompts(2)[0] | {"pixel_values": torch.zeros(1, 3, 8, 8)}
    del batch["images"]
    assert "with pixel_values, which no rollout can keep; expected images" in refused(tmp_path, train_loader=[batch])
    given = {"prompts": torch.ones(2, 3).long(), "responses": torch.ones(2, 2).long(), "rewards": torch.ones(2)}
    given["pixel_values"] = torch.zeros(1, 3, 8, 8)
    found = refused(tmp_path, train_loader=[given], reward_func=None)
    assert "completions that come with their rewards are learned from as text" in found


def looked_up(word: str) -> str:
    """What a word means.

    Args:
        word: any.
    """
    return word


PLAN = Plan(0, 0, 0, True, lambda: False)


class Judge(torch.nn.Module):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return attention_mask.sum(1).float()


@pytest.mark.parametrize(
    ("changes", "who"),
    [
        ({"reward_model": Judge(), "reward_func": None}, "the reward model reads text alone"),
        ({"tools": [looked_up]}, "environments, tools and agents speak in text alone"),
        ({"rollout_servers": ["http://127.0.0.1:9"]}, "rollout_servers are sent ids alone"),
    ],
    ids=["judge", "tools", "servers"],
)
def test_who_takes_no_images_is_named(changes: dict[str, Any], who: str, tmp_path: Path) -> None:
    trainer = policies.make("grpo", tmp_path, seeing.tiny(), **seeing.options(**changes))
    (prompt,) = in_groups(rows_of(seeing.prompts(2)[0], images=trainer._images))[1:]
    with pytest.raises(ValueError, match=f"prompts show images, and {who}"):
        trainer._rollout_maker()._drawn(PLAN, [prompt], 0)


class Values(torch.nn.Module):
    """A critic of the user's, which counts the images of the first row where it is shown some."""

    def __init__(self, sees: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.counts: list[int] = []
        if sees:
            self.forward = self.seeing  # type: ignore[method-assign]

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.weight * input_ids

    def seeing(self, input_ids: torch.Tensor, images: Any = None) -> torch.Tensor:
        self.counts.append(0 if images is None else len(images.order))
        return self.weight * input_ids / 300


@pytest.mark.parametrize("kind", ["model", "module"])
def test_a_critic_that_reads_text_is_refused(kind: str, tmp_path: Path) -> None:
    critic: Any = policies.tiny(vocab_size=300, max_position_embeddings=64)
    if kind == "module":
        critic = Values(sees=False)
    found = refused(tmp_path, "ppo", value_model=critic, ppo_batch_size=None)
    assert "prompts show images, and the critic reads text alone; expected a value_model that sees" in found


def test_a_critic_of_the_user_may_take_images(tmp_path: Path) -> None:
    critic = Values(sees=True)
    seeing.train("ppo", tmp_path, value_model=critic, reward_in_process=True, packing="none", ppo_batch_size=None)
    assert 6 in critic.counts and critic.counts.count(0) < len(critic.counts)


def test_stored_rollouts_with_images_are_for_models_that_see(run: tuple[Path, Any, Any], tmp_path: Path) -> None:
    given = {"rollouts": str(run[0]), "grpo_steps": 2}
    text = policies.tiny(vocab_size=300, max_position_embeddings=64)
    batches = [{"prompts": torch.ones(2, 3).long()}] * 3
    found = refused(tmp_path / "text", model=text, train_loader=batches, **given)
    assert "has prompts that show images, and this run sees none" in found
    _, seen = seeing.train("grpo", tmp_path / "again", kl_coef=0.1, reward_in_process=True, **given)
    for one, expected in zip(curve(seen), curve(run[2]), strict=True):
        assert one == pytest.approx(expected, abs=1e-5, rel=1e-5)


def test_completions_that_are_given_and_judged_are_grouped_by_their_images(tmp_path: Path) -> None:
    """Two prompts with the same ids, which show different pictures."""
    batch = {name: value[:1] * 4 if isinstance(value, list) else value[1:].repeat(4, 1) for name, value in BOTH.items()}
    batch["images"] = [[seeing.pictures()[number // 2]] for number in range(4)]
    batch["responses"] = torch.tensor([[20, 21], [22, 23], [24, 25], [26, 27]])
    how = {"reward_in_process": True, "reward_func": lambda prompts, completions, answers: [1.0, 2.0, 4.0, 3.0]}
    _, seen = seeing.train("grpo", tmp_path, train_loader=[batch], **how)
    (rollout,) = policies.rollouts_of(tmp_path)
    assert rollout.column("group").tolist() == [0, 0, 1, 1] and seen[0]["grad_norm"] > 0
    assert [rollout.images(row)[0].source for row in (1, 3)] == seeing.pictures()[:2]


BOTH = {name: value for name, value in seeing.prompts(2)[0].items() if name != "images"}


def test_uses_of_some_rows() -> None:
    images = ImageBatch({}, torch.tensor([0, 1, 1, 2]), torch.tensor([1, 0, 2, 1]), torch.full((3,), 4))
    some = images.of_rows([2, 1, 0])
    assert some.order.tolist() == [1, 1, 0] and some.counts.tolist() == [2, 0, 1] and some.lengths.tolist() == [4] * 3
    assert images.of_rows([]).order.tolist() == []


def test_a_rollout_of_text_has_no_costs_beside_its_tokens(tmp_path: Path) -> None:
    policies.train("grpo", tmp_path, max_steps=1)
    (rollout,) = policies.rollouts_of(tmp_path)
    assert isinstance(rollout, Rollout) and rollout.tower_tokens is None and rollout.costs is rollout.lengths
    assert rollout.images(0) == [] and "image_refs" not in rollout.store.columns
