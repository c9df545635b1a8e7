"""`--to hf`: a model whose weights were trained themselves, as a folder of transformers."""

from llm_trainer.export.folder import write_folder
from llm_trainer.export.request import Request, Written


def write(request: Request) -> Written:
    """See `formats.py`.

    Raises:
        ValueError: there are adapters, which are not in the weights.
        Refused: the checkpoint does not answer as the model did in training.
    """
    found = request.source.found
    if found.base is not None:
        raise ValueError(
            f"--to hf: {found.source} holds adapters on a base, and no model of its own; expected --to merged, which adds "
            f"them to the weights, or --to adapter, which leaves them beside these"
        )
    return write_folder(request, *request.source.whole_with_answers())
