"""`--to merged`: adapters added to the weights that they were trained on, as a folder of transformers."""

from llm_trainer.export.folder import write_folder
from llm_trainer.export.request import Request, Written


def write(request: Request) -> Written:
    """See `formats.py`.

    Raises:
        ValueError: there are no adapters.
        Refused: the checkpoint does not answer as the model did in training, or not once it is merged.
    """
    found = request.source.found
    if found.base is None:
        raise ValueError(
            f"--to merged: {found.source} is a whole model without adapters, so there is nothing to merge; expected --to hf"
        )
    return write_folder(request, *request.source.whole_with_answers())
