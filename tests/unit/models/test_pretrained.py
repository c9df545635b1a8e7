"""What is found at a path or behind a name."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from llm_trainer.checkpoint import CheckpointManager, load_checkpoint, save_checkpoint, write_model
from llm_trainer.models.pretrained import REWARD_MODELS, Kind, find_pretrained


def folder_of(path: Path, architecture: str | None = None) -> Path:
    """A folder with the config.json of a model."""
    path.mkdir(parents=True)
    config = {} if architecture is None else {"architectures": [architecture], "model_type": "qwen3"}
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_runs_and_checkpoints_lead_to_their_model(tmp_path: Path) -> None:
    def save(step: int) -> Path:
        return CheckpointManager(tmp_path / "run").save(step, lambda f: (f / "config.json").write_text("{}"), {})

    folder = folder_of(tmp_path / "talks")
    assert find_pretrained(folder).source == folder
    older, newest = save(1), save(2)
    assert find_pretrained(older).source == older / "model"
    assert find_pretrained(tmp_path / "run").source == tmp_path / "run" / "model"
    (tmp_path / "run" / "model").unlink()  # of a version that published only at the end
    assert find_pretrained(tmp_path / "run").source == newest / "model"


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("Qwen3ForCausalLM", Kind.LANGUAGE_MODEL),
        ("Qwen3ForSequenceClassification", Kind.ANSWER_REWARD_MODEL),
        ("Qwen3ForTokenClassification", Kind.STEP_REWARD_MODEL),
        (None, Kind.LANGUAGE_MODEL),
    ],
)
def test_the_kind_of_a_model_is_read_from_its_config(tmp_path: Path, architecture: str | None, kind: Kind) -> None:
    found = find_pretrained(str(folder_of(tmp_path / "model", architecture)))
    assert found.kind is kind
    assert found.config.get("architectures") == (architecture and [architecture])


def test_weights_without_a_config_are_what_load_checkpoint_takes(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    file = save_checkpoint(tmp_path / "a.pt", model=model)
    CheckpointManager(tmp_path / "run").save(3, lambda folder: write_model(model, folder), {})
    newest = tmp_path / "run" / "checkpoint-00000003"
    for source, expected in ((file, file), (tmp_path / "run", newest), (newest, newest)):
        found = find_pretrained(source)
        assert (found.kind, found.source) == (Kind.WEIGHTS, expected)
        other = nn.Linear(2, 1)
        load_checkpoint(found.source, model=other)
        assert torch.equal(other.weight, model.weight)


def test_tokenizers(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    reference = request.config.rootpath / "tests" / "reference" / "tokenizer"
    assert find_pretrained(reference).kind is Kind.TOKENIZER
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text("")
    assert find_pretrained(tmp_path).kind is Kind.TOKENIZER
    with pytest.raises(ValueError, match="found a tokenizer without a model, expected a language model: a Hugging"):
        find_pretrained(reference, [Kind.LANGUAGE_MODEL])


def test_nothing_there_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such folder or file; expected .* or a name of the hub"):
        find_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no model in it \\(found nothing\\); expected a language model or"):
        find_pretrained(tmp_path, hub=False)
    with pytest.raises(ValueError, match=r"^kd_config\.teacher_model: \./x: no such .* checkpoint-\.\.\. folders$"):
        find_pretrained("./x", [Kind.LANGUAGE_MODEL], key="kd_config.teacher_model", hub=False)


def test_another_kind_of_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found Qwen3ForCausalLM, expected a reward model of answers or a reward"):
        find_pretrained(folder_of(tmp_path / "a", "Qwen3ForCausalLM"), REWARD_MODELS)
    with pytest.raises(ValueError, match="found Qwen3ForTokenClassification, expected a language model:"):
        find_pretrained(folder_of(tmp_path / "b", "Qwen3ForTokenClassification"), [Kind.LANGUAGE_MODEL])
    (tmp_path / "a" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        find_pretrained(tmp_path / "a")


def test_names_of_the_hub_are_asked_for_only_where_they_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PretrainedConfig

    def from_the_hub(name: str) -> tuple[dict, dict]:
        if name != "owner/judge":
            raise OSError(f"{name} is not cached\nand more")
        return {"architectures": ["Qwen3ForSequenceClassification"]}, {}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PretrainedConfig, "get_config_dict", from_the_hub)
    found = find_pretrained("owner/judge")
    assert (found.kind, found.source) == (Kind.ANSWER_REWARD_MODEL, "owner/judge")
    with pytest.raises(ValueError, match=r"no model of this name could be read from the hub \(other is not cached\)"):
        find_pretrained("other")
    for source, hub in (("owner/judge", False), ("./judge", True), ("a/b/judge", True)):
        with pytest.raises(ValueError, match="judge: no such folder or file;"):
            find_pretrained(source, hub=hub)
