"""Prompts as the sampler takes them: ids, and the images that stand among them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llm_trainer.config.errors import counted
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.images import ImageRef
from llm_trainer.data.read.errors import DataError, Location
from llm_trainer.data.read.messages import IMAGE
from llm_trainer.data.vision import ImageFormat
from llm_trainer.image_batch import ImageBatch


class Asked(NamedTuple):
    """A prompt.

    Attributes:
        ids: up to where the model begins to write.
        images: that stand among them; None: there are none.
    """

    ids: list[int]
    images: ImageBatch | None = None


def ask(chat: ChatFormat, messages: Sequence[Mapping[str, Any]], where: str) -> Asked:
    """A conversation up to where the model answers; of each message `images` are those that its `<image>`s show.

    Args:
        chat: of the model.
        messages: with `images` as `counted_images` gives them.
        where: they come from, for messages.

    Raises:
        DataError: an image is gone, or has changed since it was counted.
        ChatTemplateError: there are more or fewer `<image>`s than images.
    """
    if chat.images is None:
        return Asked(chat.encode_prompt(messages))
    (encoded,) = chat.encode_pictured([messages])
    return Asked(encoded.input_ids, chat.images.opened([(encoded.images, where)]))


def ask_text(chat: ChatFormat, text: str, images: Sequence[ImageRef], where: str) -> Asked:
    """The beginning of a text, which the model goes on with; else as `ask`."""
    if chat.images is None:
        return Asked(chat.encode_text(text).input_ids[:-1])  # without the end of the text
    (encoded,) = chat.encode_documents([text], [images])
    return Asked(encoded.input_ids[:-1], chat.images.opened([(encoded.images, where)]))


def counted_images(chat: ChatFormat, text: str, sources: Sequence[str], where: str) -> list[ImageRef]:
    """The images that the `<image>`s of a prompt show.

    Args:
        chat: of the model.
        text: of the prompt.
        sources: paths, or tags of a provider; none: the prompt shows nothing.
        where: they come from, for messages.

    Raises:
        ValueError: the model sees nothing, or there are more or fewer `<image>`s than images.
        DataError: one is missing or damaged.
    """
    if chat.images is None:
        if not sources:
            return []
        raise ValueError(f"{where}: {counted(len(sources), 'image')} for a model that reads text; expected none")
    markers = text.count(IMAGE)
    if markers != len(sources):
        raise ValueError(
            f"{where}: {counted(len(sources), 'image')} and {counted(markers, f'{IMAGE} marker')} in {text!r}; expected one "
            f"marker per image, such as {IMAGE * len(sources) + text.replace(IMAGE, '')!r}"
        )
    return [_counted(chat.images, source, where) for source in sources]


def _counted(images: ImageFormat, source: str, where: str) -> ImageRef:
    try:
        return images.count(source, None, Location(where))
    except DataError as error:
        location, found, expected, _, reason = error.said  # the fix is one for rows of a file
        raise DataError(location, found, expected, "name an image that can be opened", reason) from error
