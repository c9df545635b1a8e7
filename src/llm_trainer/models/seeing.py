"""What modules have in common that read micro-batches whose rows may show images: scores and rewards."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from llm_trainer.compiler import compiled
from llm_trainer.models.inside import adapted_model, transformers_model
from llm_trainer.models.vision import Features, Images, SeenOnce, Vision


class Seeing:
    """A module whose model may see images.

    Attributes:
        vision: what of the model sees images.
        named_inputs: what its forward reads of a batch; None: nobody knows.
        model_name: the class of the model, for messages.
        with_images: some micro-batches have images. Those that have none then run the tower too, on one image that counts
            for nothing, so that every rank exchanges the same.
    """

    with_images = False
    vision: Vision
    named_inputs: frozenset[str] | None
    model_name: str
    _call: Callable[..., Any]  # the part of the model that is called as a module
    _run: Callable[..., Any]  # the same, perhaps compiled

    def _look(self, model: nn.Module) -> None:
        """Find out what of `model` sees, and what it reads."""
        self.model_name = type(adapted_model(model)).__name__
        self.vision = Vision.of(model)
        self.named_inputs = named_inputs(model)
        if self.named_inputs is not None and self.vision.model is not None:
            self.named_inputs |= {"images", "rope_positions"}
        self._run = self._call

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile what `_call` calls, and of a model that sees its language model alone. The model itself stays as it is.

        What puts images among the tokens would be compiled anew for every number of them.
        """
        if self.vision.model is None:
            self._run = compiled(self._call, **options)
            return
        decoder = self.vision.model.get_decoder()
        call = compiled(decoder._call_impl, **options)

        def run(input_ids: Tensor, **inputs: Any) -> Any:
            with _called_by(decoder, call):
                return self._call(input_ids, **inputs)

        self._run = run

    def _seen(
        self, images: Images | Features | SeenOnce | None, brings_pixels: bool
    ) -> tuple[Features | None, Tensor | None]:
        """What the tower makes of the images; where there are none, a 0 that depends on the tower, if others have some.

        Args:
            images: of the micro-batch.
            brings_pixels: the model itself is given images, as a loader of the user has them.
        """
        if isinstance(images, SeenOnce):
            if images.is_seen:
                return images.features, None
            images.features, zero = self._seen(images.images, brings_pixels)
            images.is_seen = True
            return images.features, zero
        if isinstance(images, Features):
            return images, None
        if images is not None and len(images.order):
            return self.vision.encode(images), None
        if images is not None or (self.with_images and not brings_pixels):
            return None, self.vision.zero(images)
        return None, None


def placeholder_of(reader: nn.Module) -> int | None:
    """The id of the placeholders of a `Seeing` whose model sees; None: it reads text, or is a module of the user's."""
    if not isinstance(reader, Seeing) or reader.vision.model is None:
        return None
    return reader.vision.image_token_id


def may_be_shown_images(reader: nn.Module) -> bool:
    """Whether it is a `Seeing` whose model sees, or a module of the user's whose forward names `images`."""
    if isinstance(reader, Seeing):
        return reader.vision.model is not None
    return "images" in (accepted_inputs(reader) or ())


@contextmanager
def _called_by(module: Any, call: Callable[..., Any]) -> Iterator[None]:
    """The context in which a module is called by `call`; samplers, with caches that grow, call it as it is."""
    module._compiled_call_impl = call  # what `nn.Module.compile` sets and `nn.Module.__call__` asks
    try:
        yield
    finally:
        module._compiled_call_impl = None


def see_in_every_batch(module: nn.Module) -> None:
    """Run towers in micro-batches without images too (`Seeing.with_images`).

    So ranks gather the same weights, and every step gives a tower a gradient.
    """
    for inner in module.modules():
        if isinstance(inner, Seeing):
            inner.with_images = inner.vision.model is not None


def accepted_inputs(model: nn.Module) -> frozenset[str] | None:
    """The names that `model.forward` takes, or None when it takes any."""
    parameters = inspect.signature(model.forward).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    return frozenset(parameters)


def named_inputs(model: nn.Module) -> frozenset[str] | None:
    """The names that `model.forward` reads, or None where nobody knows: it takes any and is no model of transformers.

    Those of transformers take any name too, but drop what they do not name.
    """
    accepted = accepted_inputs(model)
    inner = adapted_model(model)
    if accepted is None and transformers_model(inner) is inner:
        return frozenset(inspect.signature(inner.forward).parameters)
    return accepted
