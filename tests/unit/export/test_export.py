"""The command and the door of exports: what lies in the folder, what is said, and what is refused by name."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from exported import Made
from llm_trainer.checkpoint import weights
from llm_trainer.checkpoint.tensor_files import TensorFolder
from llm_trainer.cli.main import main
from llm_trainer.export.door import export
from llm_trainer.export.gate import Refused
from llm_trainer.export.probe import read_probe, write_probe
from llm_trainer.export.source import find_source
from llm_trainer.models.pretrained import find_pretrained

PROJECTION = "model.layers.0.self_attn.q_proj.weight"


def quiet(line: str) -> None:
    pass


def test_the_command_writes_a_folder_that_transformers_opens(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["export", str(made.run("dense")), "--to", "hf", "--dtype", "bf16", "--out", str(tmp_path / "out")])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "gate: log-probabilities of " in said and "rounded to bfloat16" in said and "exported: " in said
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.dtype is torch.bfloat16 and tokenizer.chat_template
    stops = [tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id]
    assert sorted(model.generation_config.eos_token_id) == sorted(stops)


def test_the_command_ends_with_1_where_the_model_differs(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights that somebody has changed since: what training recorded no longer holds."""
    shutil.copytree(find_pretrained(made.run("dense")).source, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in TensorFolder(file.parent).read_all().items()}
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1.1
    weights.write_files(file.parent, {file.name: weights.tensor_file(tensors)})
    with pytest.raises(SystemExit) as ended:
        main(["export", str(tmp_path / "model"), "--to", "hf"])
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert "does not answer as the model did in training" in said and "Nothing was left at" in said
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_without_a_record_is_compared_with_itself_and_that_is_said(made: Made, tmp_path: Path) -> None:
    said: list[str] = []
    out = export(made.base(), "hf", tmp_path / "out", say=said.append)
    assert "no record of what the model answered in training" in said[0]
    card = (out / "README.md").read_text()
    assert "nobody had asked it in training" in card


def test_a_record_of_another_version_is_refused(made: Made, tmp_path: Path) -> None:
    probe = read_probe(made.run("dense") / "model")
    assert probe is not None
    write_probe(probe, tmp_path)
    content = json.loads((tmp_path / "probe.json").read_text())
    (tmp_path / "probe.json").write_text(json.dumps(content | {"version": 0}))
    with pytest.raises(ValueError, match=r"probe\.json: not a probe of this version \(its version is another\)"):
        read_probe(tmp_path)


def test_large_models_are_several_files(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "MODEL_FILE_BYTES", 100_000)
    out = export(made.run("dense"), "hf", tmp_path / "out", say=quiet)
    assert len(list(out.glob("model-*.safetensors"))) > 1 and (out / "model.safetensors.index.json").is_file()


def test_weights_have_the_names_of_the_folder_that_the_model_came_from(made: Made, tmp_path: Path) -> None:
    """Experts are one tensor in memory, and one each in the folders of this architecture."""
    pytest.importorskip("peft", reason="needs peft")
    out = export(made.run("experts"), "merged", tmp_path / "out", say=quiet)
    found = find_pretrained(made.run("experts"))
    names = TensorFolder(out).shapes
    assert names == TensorFolder(Path(found.model_source)).shapes
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in names


def test_a_head_that_training_took_apart_is_saved_and_said(made: Made, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs peft")
    said: list[str] = []
    out = export(made.run("lora on the head"), "merged", tmp_path / "out", say=said.append)
    assert any("training took head and embeddings apart" in line for line in said)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    base = TensorFolder(Path(find_pretrained(made.run("lora on the head")).model_source))
    there = TensorFolder(out)
    assert torch.equal(there.read("model.embed_tokens.weight"), base.read("model.embed_tokens.weight"))
    assert not torch.equal(there.read("lm_head.weight"), base.read("model.embed_tokens.weight"))
    assert "Training took head and embeddings apart" in (out / "README.md").read_text()


def test_adapters_that_changed_their_base_become_plain_ones_of_twice_the_rank(made: Made, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    out = export(made.run("pissa"), "adapter", tmp_path / "out", say=quiet)
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"], config["base_model_name_or_path"]) == (8, True, str(made.base()))
    assert not (out / "base").exists()
    trained = find_source(made.run("pissa"), quiet).whole()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of a name of transformers that peft still uses
        opened = peft.AutoPeftModelForCausalLM.from_pretrained(out)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(opened.eval()(ids).logits, trained.eval()(ids).logits, atol=2e-4, rtol=0)


def test_adapters_on_a_base_that_was_changed_otherwise_become_no_plain_ones(made: Made, tmp_path: Path) -> None:
    """Such as by rows for new tokens: they are in the checkpoint alone."""
    pytest.importorskip("peft", reason="needs peft")
    with pytest.raises(
        ValueError, match="embed_tokens.weight of the base is another one than before.*expected --to merged"
    ):
        export(made.run("lora on new rows"), "adapter", tmp_path / "out", say=quiet)
    export(made.run("lora on new rows"), "merged", tmp_path / "out", say=quiet)


def test_adapters_are_merged_with_weights(made: Made) -> None:
    pytest.importorskip("peft", reason="needs peft")
    run = made.run("two adapters")
    by_weight = find_source(run, quiet, {"default": 0.5, "second": -1.0}).whole()
    one, other = (find_source(run, quiet, {name: 1.0}).whole() for name in ("default", "second"))
    base = AutoModelForCausalLM.from_pretrained(made.base())
    start = base.get_parameter(PROJECTION)
    first, second = one.get_parameter(PROJECTION) - start, other.get_parameter(PROJECTION) - start
    assert first.abs().max() > 1e-3 and second.abs().max() > 1e-3
    torch.testing.assert_close(by_weight.get_parameter(PROJECTION) - start, 0.5 * first - second, atol=1e-6, rtol=0)


def test_adapters_of_several_runs_are_merged_with_weights(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft", reason="needs peft")
    one, other, out = made.run("lora"), made.run("rslora"), tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        main(["export", str(one), "--to", "merged", "--with", f"{other}:0.5", "--out", str(out)])
    assert ended.value.code == 0 and "merged: log-probabilities" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(out)
    alone = [find_source(run, quiet).whole() for run in (one, other)]
    start = AutoModelForCausalLM.from_pretrained(made.base()).get_parameter(PROJECTION)
    first, second = (model.get_parameter(PROJECTION) - start for model in alone)
    assert first.abs().max() > 1e-3 and (first - second).abs().max() > 1e-3
    found = merged.get_parameter(PROJECTION) - start
    torch.testing.assert_close(found, first + 0.5 * second, atol=1e-6, rtol=0)
    assert "by weight: rslora (0.5); its own: 1. How: sum." in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("option", "values", "name"),
    [("--with", ["run:0.5", "run:1"], "run"), ("--weights", ["default=1, default=0.5"], "default")],
)
def test_two_adapters_of_one_name_are_refused(
    option: str, values: list[str], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word for value in values for word in (option, value)]
    with pytest.raises(SystemExit) as ended:
        main(["export", str(tmp_path), "--to", "merged", *given])
    assert ended.value.code == 2
    assert f"{option}: got '{name}' twice, expected one weight for each" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["linear", "svd", "ties"])
def test_adapters_are_combined_as_peft_does(how: str, made: Made, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    said: list[str] = []
    one, other, out = made.run("lora"), made.run("rslora"), tmp_path / "out"
    export(one, "merged", out, weights={"default": 0.5}, others={str(other): 0.5}, combine=how, say=said.append)
    assert any(line.startswith(f"{how}: from the sum of the adapters log-probabilities of ") for line in said)

    base = AutoModelForCausalLM.from_pretrained(made.base())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of a name of transformers that peft still uses
        theirs = peft.PeftModel.from_pretrained(base, one / "model")
        theirs.load_adapter(other / "model", "other")
    density = 0.2 if how == "ties" else None
    theirs.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both", combination_type=how, density=density)
    theirs.set_adapter("both")
    expected = theirs.merge_and_unload().get_parameter(PROJECTION)
    found = AutoModelForCausalLM.from_pretrained(out).get_parameter(PROJECTION)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("others", "combine", "message"),
    [
        ("dense", "sum", "--with: .* is a whole model without adapters; expected adapters on the same base"),
        ("two adapters", "sum", r"--with: .* has several adapters \(default, second\); expected one"),
        (
            "pissa",
            "sum",
            "--with: the adapters in .* were trained on the folder 'base' .* expected the same weights bit",
        ),
        ("dora", "sum", "'other1' is not only a sum with its layers"),
        ("rslora", "cat", "--combine: got 'cat', expected one of sum, linear, svd, ties"),
        (None, "svd", "--combine svd: found one adapter; expected several: --with DIR:WEIGHT"),
    ],
)
def test_adapters_that_do_not_belong_together(
    others: str | None, combine: str, message: str, made: Made, tmp_path: Path
) -> None:
    pytest.importorskip("peft", reason="needs peft")
    given = {} if others is None else {str(made.run(others)): 0.5}
    with pytest.raises(ValueError, match=message):
        export(made.run("lora"), "merged", tmp_path / "out", others=given, combine=combine, say=quiet)
    assert list(tmp_path.iterdir()) == []


def test_the_card_says_where_a_model_comes_from_and_what_was_measured(made: Made, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs peft")
    from huggingface_hub import metadata_load

    out = export(made.run("lora"), "merged", tmp_path / "out", say=quiet)
    facts: Any = metadata_load(out / "README.md")
    assert facts["license"] == "apache-2.0" and facts["base_model"] == made.base().name
    assert facts["library_name"] == "transformers" and "merged" in facts["tags"]
    card = (out / "README.md").read_text()
    assert "its README says apache-2.0" in card and "asked in training, at step 2" in card
    assert "| steps | 2 |" in card and "| loss |" in card


@pytest.mark.parametrize(
    ("kind", "to", "options", "message"),
    [
        ("lora", "hf", {}, r"--to hf: .* holds adapters on a base.*expected --to merged.*or --to adapter"),
        ("dense", "merged", {}, "--to merged: .* is a whole model without adapters.*expected --to hf"),
        ("dense", "adapter", {}, "--to adapter: .* is a whole model without adapters; expected --to hf"),
        ("dense", "onnx", {}, r"--to: got 'onnx', expected one of hf, merged"),
        ("lora", "adapter", {"dtype": torch.bfloat16}, "--dtype: --to adapter does not have this option"),
        ("two adapters", "merged", {"weights": {"third": 1.0}}, "found no 'third'; expected some of default, second"),
        ("dora", "merged", {"weights": {"default": 0.5}}, "'default' is not only a sum with its layers"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_what_cannot_be_exported_is_refused_by_name(
    kind: str, to: str, options: dict[str, Any], message: str, made: Made, tmp_path: Path
) -> None:
    if kind != "dense":
        pytest.importorskip("peft", reason="needs peft")
    with pytest.raises(ValueError, match=message):
        export(made.run(kind), to, tmp_path / "out", say=quiet, **options)
    assert list(tmp_path.iterdir()) == []


def test_models_that_see_are_not_exported_without_their_processor(tmp_path: Path) -> None:
    described = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(
        ValueError, match="found LlavaForConditionalGeneration without its processor.*expected processor_con"
    ):
        find_source(tmp_path, quiet)


def test_models_that_see_are_no_file_for_llama_cpp(seen: Any, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"--to gguf: .* is a vision-language model.*expected --to hf or merged.*--mmproj"
    ):
        export(seen.run("llava"), "gguf", tmp_path / "out", say=quiet)
    assert list(tmp_path.iterdir()) == []


def test_rows_of_a_few_tokens_leave_head_and_embeddings_tied(made: Made, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs peft")
    out = export(made.run("a few tokens"), "merged", tmp_path / "out", say=quiet)
    there = TensorFolder(out)
    before = TensorFolder(made.base()).read("model.embed_tokens.weight")
    changed = (there.read("model.embed_tokens.weight") != before).any(dim=1).nonzero()[:, 0].tolist()
    assert changed == [30, 40] and "lm_head.weight" not in there.shapes
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_folder_that_is_there_stays(made: Made, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(ValueError, match=r"--out: .* exists already"):
        export(made.run("dense"), "hf", tmp_path, say=quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_base_that_was_changed_since_is_refused(made: Made, tmp_path: Path) -> None:
    """Of adapters whose base is believed: what training recorded tells."""
    pytest.importorskip("peft", reason="needs peft")
    shutil.copytree(find_pretrained(made.run("lora")).source, tmp_path / "model")
    content = json.loads((tmp_path / "model" / "base.json").read_text())
    other = made.base(rms_norm_eps=1e-2)
    changed = content | {"fingerprint": None, "source": str(other)}
    (tmp_path / "model" / "base.json").write_text(json.dumps(changed))
    with pytest.raises(Refused, match="did in training"):
        export(tmp_path / "model", "merged", tmp_path / "out", say=quiet)
