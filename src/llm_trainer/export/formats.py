"""The table of formats. One more is a file with a function `(Request) -> Written`, and a line here.

The function gets an empty folder and what is to be exported (`request.py`): `source.whole()` is the model as one, adapters
merged; `source.ask(model)` asks a model in memory what the probe asks. It writes files, and hands back how they have to
answer (`expected`), how they are opened again (`reopen`), and how far the answers may be apart (`limits`). Everything else,
the model card, the gate and the final name, is done for all formats in `door.py`.

What transformers opens is asked by `opened.Opened`. A format of another program brings an `Asked` (`probe.py`) of its own:
it turns text into ids, prints conversations, and gives log-probabilities and greedy answers as that program does. What it
cannot be asked it answers with None, and the gate says that it was not compared.
"""

from llm_trainer.export import adapter, gguf, hf, merged
from llm_trainer.export.request import Format

OF_ADAPTERS = {"weights", "with", "combine"}
FORMATS: dict[str, Format] = {
    "hf": Format(hf.write, frozenset({"dtype"}), "a trained model as a folder of transformers"),
    "merged": Format(
        merged.write,
        frozenset({"dtype", *OF_ADAPTERS}),
        "adapters added to their base, as such a folder",
    ),
    "adapter": Format(adapter.write, frozenset(), "adapters beside their base, as a folder of peft"),
    "gguf": Format(
        gguf.write,
        frozenset({"dtype", "quantize", *OF_ADAPTERS}),
        "one file for llama.cpp, run by it here",
    ),
}
