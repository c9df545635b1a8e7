"""The model card of an export, its README.md: what it was trained on and from, how, and what was measured."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llm_trainer.checkpoint.adapter_bases import place_of
from llm_trainer.export.gate import Comparison
from llm_trainer.export.request import Written
from llm_trainer.export.source import Source
from llm_trainer.models.freezing import PROJECTOR_ALONE

LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")
OPENED = {
    "transformers": "`AutoModelForCausalLM.from_pretrained(folder)`, and whatever reads such folders",
    "peft": "`peft.AutoPeftModelForCausalLM.from_pretrained(folder)`, on its base",
    "gguf": "llama.cpp (`llama-cli --model FILE`), and whatever is built on it",
}
TASKS = {False: "text-generation", True: "image-text-to-text"}
OPENED_SEEING = {
    "transformers": "`AutoModelForImageTextToText.from_pretrained(folder)` with `AutoProcessor.from_pretrained(folder)`",
    "peft": "`peft.PeftModel.from_pretrained(base, folder)`, the base by `AutoModelForImageTextToText`",
}


class Licence(NamedTuple):
    """What the folder of a base says of its licence.

    Attributes:
        facts: of its README's front matter: `license`, `license_name`, `license_link`.
        where: it was found, for people; empty: nowhere.
    """

    facts: dict[str, str]
    where: str


def write_card(source: Source, to: str, written: Written, result: Comparison, folder: Path) -> None:
    """Write README.md into the folder of an export.

    Args:
        source: what was exported.
        to: name of the format.
        written: what the format handed back.
        result: of the gate.
        folder: of the export.
    """
    from huggingface_hub import ModelCardData

    base = base_of(source)
    licence, base_name = Licence({}, ""), None
    if base is not None:
        licence, base_name = licence_of(base, source), name_of(base)
    named: dict[str, Any] = dict(licence.facts)
    facts = ModelCardData(
        base_model=base_name,
        library_name=written.library,
        pipeline_tag=TASKS[source.found.sees_images],
        tags=["llm-trainer", to],
        **named,
    )
    sections = [
        f"---\n{facts.to_yaml()}\n---",
        f"# {_title(source)}",
        _origin(base, licence),
        _other_adapters(source),
        _how_it_was_checked(source, to, written, result),
        _results(source.state),
        _data(source.state),
        _images(source),
        _config(source.state),
    ]
    text = "\n\n".join(section for section in sections if section)
    (folder / "README.md").write_text(text + "\n", encoding="utf-8")


def _other_adapters(source: Source) -> str:
    if not source.others:
        return ""
    named = ", ".join(f"{Path(folder).name} ({weight:g})" for folder, weight in source.others.items())
    own = ", ".join(f"{name} ({weight:g})" for name, weight in source.weights.items()) or "1"
    what = "The adapters of other runs on the same base are in it too, by weight"
    return f"{what}: {named}; its own: {own}. How: {source.combine}."


def base_of(source: Source) -> str | None:
    """What was trained on: the base of adapters, or the model that a run began with; None: its weights were drawn."""
    base = source.found.base
    if base is not None and base.source is not None:
        return base.source
    began_with = _configured(source.state).get("model_config")
    return began_with if isinstance(began_with, str) else None


def name_of(base: str) -> str:
    """What a base is called where its folder is not: a name of the hub as it is, of a folder the last part."""
    path = Path(base)
    return path.resolve().name if path.is_dir() or path.is_absolute() else base


def licence_of(base: str, source: Source) -> Licence:
    """The licence of a base, as its README or a file of its folder says."""
    from huggingface_hub import metadata_load

    revision = None if source.found.base is None else source.found.base.revision
    folder = place_of(base, revision)
    if folder is None:
        return Licence({}, "")
    readme = folder / "README.md"
    if readme.is_file():
        metadata: Mapping[str, Any] = metadata_load(readme) or {}
        facts = {name: str(metadata[name]) for name in ("license", "license_name", "license_link") if name in metadata}
        if facts:
            return Licence(facts, f"its README says {facts.get('license_name') or facts['license']}")
    for name in LICENCE_FILES:
        if (folder / name).is_file():
            return Licence({}, f"it lies in its folder as {name}")
    return Licence({}, "")


def _configured(state: Mapping[str, Any]) -> dict[str, Any]:
    import yaml

    found = yaml.safe_load(state.get("config") or "") or {}
    return found if isinstance(found, dict) else {}


def _title(source: Source) -> str:
    checkpoint = source.checkpoint
    return source.folder.resolve().name if checkpoint is None else checkpoint.parent.name


def _origin(base: str | None, licence: Licence) -> str:
    if base is None:
        return "Trained from weights that were drawn at random, or from a model that is not known."
    where = licence.where or "nothing in its folder says; look it up before you pass this model on"
    return f"Trained from `{name_of(base)}`. The licence of that model: {where}."


def _how_it_was_checked(source: Source, to: str, written: Written, result: Comparison) -> str:
    openers = OPENED_SEEING if source.found.sees_images else OPENED
    lines = [f"Exported by `llm-trainer export --to {to}`; opened by {openers.get(written.library, written.library)}."]
    probe = source.recorded
    if probe is None:
        lines.append("What it is compared with was asked of the reopened checkpoint: nobody had asked it in training.")
    else:
        lines.append(f"What it is compared with was asked in training, at step {probe.made.get('step')}.")
    lines.append(f"Opened again, it gave the same ids, texts and stop tokens; {result}.")
    lines += [f"{note[:1].upper()}{note[1:]}." for note in written.notes]
    return "\n".join(lines)


def _results(state: Mapping[str, Any]) -> str:
    progress = state.get("progress")
    if progress is None:
        return ""
    rows = [("steps", progress["step"]), ("tokens", progress["tokens"])]
    if progress["best_loss"] is not None:
        rows.append((f"best, at step {progress['best_step']}", progress["best_loss"]))
    measured: dict[str, float] = {}
    for line in progress["lines"]:
        measured.update(line)
    rows += sorted(measured.items())
    lines = ["## Results", "", "| measured | at the end |", "|---|---|"]
    for name, value in rows:
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
        lines.append(f"| {name} | {shown} |")
    return "\n".join(lines)


def _data(state: Mapping[str, Any]) -> str:
    ledgers = state.get("ledger") or []
    if not ledgers:
        return ""
    lines = [
        "## Data",
        "",
        "| read | rows | tokens | trained on | context | truncated | left out |",
        "|---|---|---|---|---|---|---|",
    ]
    for ledger in ledgers:
        left_out = ", ".join(f"{tokens:,} ({reason})" for reason, tokens in ledger["dropped"].items()) or "0"
        name = _name_of_data(ledger)
        numbers = " | ".join(f"{ledger[key]:,}" for key in ("rows", "read", "trained", "context", "truncated"))
        lines.append(f"| {name} | {numbers} | {left_out} |")
    return "\n".join(lines)


def _images(source: Source) -> str:
    """What images a model that sees was trained on, and which of its parts learned."""
    if not source.found.sees_images:
        return ""
    lines = ["## Images", ""]
    # 1. where they went
    counted = [ledger for ledger in source.state.get("ledger") or [] if ledger.get("images")]
    if counted:
        lines += ["| read | images | used | cut off | left out |", "|---|---|---|---|---|"]
    for ledger in counted:
        images = ledger["images"]
        numbers = " | ".join(f"{images[key]:,}" for key in ("read", "used", "cut"))
        left_out = ", ".join(f"{number:,} ({reason})" for reason, number in images["dropped"].items()) or "0"
        lines.append(f"| {_name_of_data(ledger)} | {numbers} | {left_out} |")
    if not counted:
        lines.append("No ledger of images: the rows showed none, or came from a loader that does not count them.")
    # 2. what of the configuration says how they were seen
    config = _configured(source.state)
    max_pixels = (config.get("data_loader_config") or {}).get("max_pixels")
    if max_pixels is not None:
        lines += ["", f"Larger images were made smaller, to {max_pixels:,} pixels, before the processor saw them."]
    frozen = _frozen(config)
    if frozen:
        lines += ["", f"Frozen: {', '.join(frozen)}."]
    return "\n".join(lines)


def _frozen(config: Mapping[str, Any]) -> list[str]:
    """What did not learn, in the words of the configuration."""
    if config.get("adapter_config"):
        return ["all but the adapters"]
    found = list(config.get("freeze") or ())
    if (config.get("sft_config") or {}).get("freeze_llm_model"):
        found += PROJECTOR_ALONE
    return [f"`{part}`" for part in found]


def _name_of_data(ledger: Mapping[str, Any]) -> str:
    return Path(ledger["name"]).name if ledger["name"] else "the data"


def _config(state: Mapping[str, Any]) -> str:
    config = state.get("config")
    if not config:
        return ""
    versions = json.dumps(state.get("versions", {}))
    return f"## Configuration\n\nVersions: `{versions}`.\n\n```yaml\n{config.strip()}\n```"
