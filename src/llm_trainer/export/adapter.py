"""`--to adapter`: adapters beside the base that they name, as a folder of peft."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from llm_trainer.checkpoint import CheckpointError
from llm_trainer.checkpoint.adapter_bases import BASE_FILE, BASE_FOLDER, Base
from llm_trainer.checkpoint.adapter_names import CONFIG_FILE, WEIGHTS_FILE
from llm_trainer.checkpoint.tensor_files import TensorFolder, write_files
from llm_trainer.checkpoint.weights import tensor_file, without_progress_bars
from llm_trainer.export.gate import FP32, ROUNDED, SAME, Limits, Refused
from llm_trainer.export.opened import Opened, required_processor, tokenizer_in
from llm_trainer.export.probe import FILE
from llm_trainer.export.request import Request, Written
from llm_trainer.models.adapter_folder import beside, fingerprint_of_base
from llm_trainer.models.adapter_sums import PlainLora, plain_lora
from llm_trainer.models.pretrained import Kind, find_pretrained


def write(request: Request) -> Written:
    """See `formats.py`.

    Raises:
        ValueError: there are no adapters, or their base is nowhere that the export could name.
        Refused: the checkpoint does not answer as the model did in training.
    """
    source = request.source
    base = source.found.base
    if base is None:
        raise ValueError(
            f"--to adapter: {source.folder} is a whole model without adapters; expected --to hf, which is all of it"
        )
    adapted = beside(source.found.auto_class, source.found)
    before = source.check(adapted.get_base_model())
    notes, limits = [], SAME
    if base.source is None:
        limits = _as_plain_lora(request, adapted, base)
        rank = json.loads((request.folder / CONFIG_FILE).read_text(encoding="utf-8"))["r"]
        notes.append(
            f"the adapters began with a part of their base's weights; here they are a plain LoRA of rank {rank} on the base "
            f"as it was before"
        )
        expected = replace(before, facts={})
    else:
        _copy(source.folder, request.folder)
        expected = source.ask(adapted.get_base_model(), with_weights=True)
    notes += _what_a_reader_must_know(request.folder, base)
    for note in notes:
        request.say(note)
    return Written(expected, reopened, limits, tuple(notes), library="peft")


def reopened(folder: Path) -> Opened:
    """Adapters through peft on the base that their folder names, both in fp32; of a base in few bits what these stand for.

    Raises:
        Refused: it does not open.
    """
    try:
        found = find_pretrained(folder, (Kind.LANGUAGE_MODEL,), hub=False)
        named = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["base_model_name_or_path"]
        if found.base is None or found.base.source != named:
            raise Refused(f"{CONFIG_FILE} names the base {named!r}, and {BASE_FILE} another one")
        model = beside(found.auto_class, found).get_base_model()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise Refused(f"peft does not open it: {str(error).strip()[:300]}") from error
    processor = required_processor(folder) if found.sees_images else None
    return Opened(model, tokenizer_in(folder), with_weights=True, processor=processor)


def _copy(source: Path, folder: Path) -> None:
    """All of a PEFT folder but what is only of the run."""
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if path.is_dir() or name.parts[0] in (BASE_FOLDER, FILE):
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(path.read_bytes())


def _as_plain_lora(request: Request, adapted: Any, base: Base) -> Limits:
    """Write adapters whose initialisation has changed their base as plain ones on the base as it was.

    Returns:
        How far the answers may be off: in 16 bits the changed base was rounded once more.

    Raises:
        ValueError: there is no base as it was, or these adapters have no such form.
    """
    source = request.source
    if base.began_as is None:
        raise ValueError(
            f"--to adapter: the base of these adapters is nowhere but in the checkpoint ({base.kept_because}), so no other "
            f"tool could find it; expected --to merged"
        )
    dtype = getattr(torch, base.dtype)
    try:
        with without_progress_bars():
            original = source.found.auto_class.from_pretrained(base.began_as, dtype=dtype)
    except OSError as error:
        raise ValueError(
            f"--to adapter: the base as it was before the adapters changed it cannot be loaded from '{base.began_as}' "
            f"({str(error)[:200]}); put it back, or use --to merged"
        ) from None
    named = Base(
        source=base.began_as,
        fingerprint=fingerprint_of_base(original),
        architecture=base.architecture,
        dtype=base.dtype,
    )
    tensors = TensorFolder(source.folder).read_all()
    config = json.loads((source.folder / CONFIG_FILE).read_text(encoding="utf-8"))
    try:
        plain: PlainLora = plain_lora(adapted, original.float(), tensors, config)
    except CheckpointError as error:
        raise ValueError(f"--to adapter: {error}; expected --to merged") from None
    _copy(source.folder, request.folder)
    write_files(request.folder, {WEIGHTS_FILE: tensor_file(plain.tensors)})
    content = plain.config | {"base_model_name_or_path": named.source, "revision": None}
    (request.folder / CONFIG_FILE).write_text(json.dumps(content, indent=2), encoding="utf-8")
    (request.folder / BASE_FILE).write_text(json.dumps(asdict(named), indent=2), encoding="utf-8")
    short = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    return ROUNDED.get(short.get(dtype, ""), FP32)


def _what_a_reader_must_know(folder: Path, base: Base) -> list[str]:
    notes = []
    if base.quantization is not None:
        notes.append(
            "these adapters were trained on their base in few bits (see base.json), and answer so only on that; on the base "
            "in full precision they answer otherwise"
        )
    configs = [json.loads(path.read_text(encoding="utf-8")) for path in folder.rglob(CONFIG_FILE)]
    if any(config.get("target_parameters") for config in configs):
        notes.append(
            "there are adapters on the experts of a mixture, which peft reads and most servers do not; merged they are read "
            "everywhere"
        )
    return notes
