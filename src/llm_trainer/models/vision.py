"""Images in a vision-language model: what its tower makes of them, once for each, and where they stand among the tokens.

What a model takes is learned from its own methods (`get_image_features`, `get_rope_index`), so that there is no list of
architectures here.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain, pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from llm_trainer.config.errors import counted
from llm_trainer.models.inside import beside_language, evaluating, transformers_models


class Images(Protocol):
    """The images of a micro-batch; `data.vision.ImageBatch` is one.

    Attributes:
        inputs: of the DISTINCT images, as the model's processor lays them out.
        order: `[uses]`, which distinct image each use shows, in the order of the placeholders, row after row.
        lengths: `[distinct]`, placeholder tokens of each.
    """

    @property
    def inputs(self) -> Mapping[str, Tensor]: ...

    @property
    def order(self) -> Tensor: ...

    @property
    def lengths(self) -> Tensor: ...


class ImageInputs(NamedTuple):
    """`Images` that no data was read for."""

    inputs: dict[str, Tensor]
    order: Tensor
    lengths: Tensor


class Features(NamedTuple):
    """What a tower and its projector make of the distinct images of a micro-batch.

    Attributes:
        images: of which.
        levels: per level, and for each image `[tokens, D]`: first what takes the place of the placeholders, then what is
            added to states of deeper layers (DeepStack, Meng et al. 2024, arXiv 2406.04334), where a model does so.
        like: what the model itself returned, whose form it wants back.
    """

    images: Images
    levels: list[tuple[Tensor, ...]]
    like: Any

    def placed(self) -> dict[str, Any]:
        """`mm_encoder_outputs` of transformers: every use of an image, in the order of the placeholders."""
        order = self.images.order.tolist()
        # Joined here, so that compiled models are given one tensor, however many images there are.
        levels = list[Tensor]()
        for level in self.levels:
            shown = [level[which] for which in order]
            levels.append(torch.cat(shown))
        fields: dict[str, Any] = {"pooler_output": levels[0]}
        if not isinstance(self.like.pooler_output, Tensor):  # where the model joins them itself
            fields["pooler_output"] = (levels[0],)
        if len(levels) > 1:
            fields["deepstack_features"] = [(level,) for level in levels[1:]]
        return {"image": type(self.like)(**fields)}


class SeenOnce:
    """The images of a micro-batch for several models that make the same of them and do not learn to see: the first encodes.

    Attributes:
        images: of the micro-batch; None: it has none.
        features: what the first model has made of them; None: nobody has yet, or there are none.
        is_seen: whether it has.
    """

    def __init__(self, images: Images | None) -> None:
        self.images, self.is_seen = images, False
        self.features: Features | None = None


def _taken_apart(seen: SeenOnce) -> tuple[list[Any], bool]:
    return [seen.images, seen.features], seen.is_seen


def _put_together(parts: Iterable[Any], is_seen: bool) -> SeenOnce:
    images, features = parts
    found = SeenOnce(images)
    found.features, found.is_seen = features, is_seen
    return found


_pytree.register_pytree_node(SeenOnce, _taken_apart, _put_together)  # as `ImageBatch`


def joined_features(parts: Sequence[Features]) -> Features:
    """Features of several batches of images as one, in the order of their rows."""
    orders, lengths = list[Tensor](), list[Tensor]()
    before = 0
    for part in parts:
        orders.append(part.images.order.cpu() + before)
        lengths.append(part.images.lengths.cpu())
        before += len(part.images.lengths)
    inputs: dict[str, Tensor] = {}
    if "image_grid_thw" in parts[0].images.inputs:  # all that positions need
        inputs["image_grid_thw"] = torch.cat([part.images.inputs["image_grid_thw"] for part in parts])
    levels = []
    for number in range(len(parts[0].levels)):
        levels.append(tuple(chain.from_iterable(part.levels[number] for part in parts)))
    return Features(ImageInputs(inputs, torch.cat(orders), torch.cat(lengths)), levels, parts[0].like)


class Vision(NamedTuple):
    """The model inside that makes features of images and puts them among the tokens: the body, where a head is around it.

    A tuple, so that a module which has one does not have its parameters twice.

    Attributes:
        model: of transformers; None: there is none.
        marks_images: it wants to know which tokens are images, for they see each other.
    """

    model: Any
    marks_images: bool = False

    @classmethod
    def of(cls, module: nn.Module) -> "Vision":
        found = None
        for model in transformers_models(module):
            makes_features = getattr(model, "get_image_features", None) is not None
            if makes_features and "mm_encoder_outputs" in _parameters(model.forward):
                found = model
        if found is None:
            return cls(None)
        _capture_at_once(found)
        return cls(found, "token_type_ids" in _parameters(found.forward))

    @property
    def image_token_id(self) -> int:
        """The id of the placeholders."""
        return int(self.model.config.image_token_id)

    @property
    def takes_rope_positions(self) -> bool:
        """Whether it turns its heads by three positions of a token: time, row and column."""
        return getattr(self.model, "get_rope_index", None) is not None

    def encode(self, images: Images) -> Features:
        """What the tower makes of the distinct images.

        Raises:
            ValueError: there is no tower, or they are not as many tokens as the placeholders that stand for them.
        """
        levels, output = self._levels(images.inputs)
        lengths = images.lengths.tolist()
        if len(levels[0]) != sum(lengths):
            raise ValueError(
                f"{type(self.model).__name__} makes {len(levels[0])} tokens of {counted(len(lengths), 'image')}, for which the "
                f"processor has put {sum(lengths)} placeholders; expected the processor of this model: the same image size, "
                f"patches and tokens per image"
            )
        return Features(images, [level.split(lengths) for level in levels], output)

    def inputs(
        self,
        input_ids: Tensor,
        features: Features | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        given_positions: Tensor | None = None,
    ) -> dict[str, Any]:
        """What the model is called with to see images, beside the ids: in training, and before the first token that is drawn.

        Args:
            input_ids: `[B, T]`, or `[1, N]` of documents laid flat.
            features: of the images that their placeholders show; None: there are none.
            attention_mask: `[B, T]`, 0 on padding.
            position_ids: `[B, T]`, restarting at 0 in every document; None: a row is one document.
            given_positions: `[3, B, T]`, as `rope_positions` makes them; None: they are made here if there is need.

        Returns:
            Keywords of transformers, among them `position_ids [4, B, T]` where the model has three positions of a token:
            those inside the document come before them.
        """
        inputs = self.shown(input_ids, features)
        if self.takes_rope_positions and (position_ids is not None or features is not None):
            if given_positions is None:
                images = None if features is None else features.images
                given_positions = rope_positions(self, input_ids, images, attention_mask, position_ids)
            if position_ids is None:
                position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
            inside = position_ids.expand(1, *input_ids.shape)
            inputs["position_ids"] = torch.cat([inside, given_positions.to(inside.device)])
        return inputs

    def shown(self, input_ids: Tensor, features: Features | None) -> dict[str, Any]:
        """Of `inputs` what is not positions."""
        if features is None:
            return {}
        found: dict[str, Any] = {"mm_encoder_outputs": features.placed()}
        if self.marks_images:
            found["token_type_ids"] = (input_ids == self.image_token_id).long()
        return found

    def zero(self, images: Images | None = None) -> Tensor:
        """A scalar 0 that depends on all that the tower makes of images, by default of one that nobody took.

        For micro-batches that show none, where others do: engines exchange parameters and gradients of a tower, and every
        rank has to take part.
        """
        inputs = plain_images(self.model).inputs if images is None else images.inputs
        levels, _ = self._levels(inputs)
        return 0.0 * torch.stack([level.float().sum() for level in levels]).sum()

    def example(self, number: int = 1) -> ImageInputs:
        """`number` different images of one size, each shown once, for trials."""
        images = plain_images(self.model, number)
        with torch.no_grad():
            levels, _ = self._levels(images.inputs)
        each = len(levels[0]) // number
        return images._replace(lengths=torch.full((number,), each))

    def _levels(self, inputs: Mapping[str, Tensor]) -> tuple[list[Tensor], Any]:
        """`[all tokens, D]` per level, and what the model returned."""
        if self.model is None:
            raise ValueError(
                "the model was given images, and makes no features of any; expected a vision-language model of transformers"
            )
        device = next(self.model.parameters()).device
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        output = self.model.get_image_features(**inputs, return_dict=True)
        levels = [output.pooler_output, *(output.get("deepstack_features") or ())]
        return [_joined(level) for level in levels], output


def _joined(pieces: Any) -> Tensor:
    """Of `[images, tokens, D]`, or of `[tokens, D]` per image: `[all tokens, D]`."""
    return pieces.flatten(0, -2) if isinstance(pieces, Tensor) else torch.cat(list(pieces))


def _capture_at_once(model: Any) -> None:
    """Have transformers hook into the layers of a tower now, which it does at the first forward otherwise.

    Engines hook into them too, and the graph of a forward depends on who came first: so it must be the same on every rank,
    whichever of them has tried the model out before.
    """
    from transformers.utils.output_capturing import maybe_install_capturing_hooks

    decoder = model.get_decoder()
    for child in model.children():
        if child is decoder:
            continue
        for tower in transformers_models(child):
            if tower._can_record_outputs:
                maybe_install_capturing_hooks(tower)


def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


# What is trained.


def unreached(model: nn.Module, with_images: bool) -> list[str]:
    """Names of the trained parameters of tower and projector that no loss depends on, as SigLIP's pooling head.

    Tried out: the parameters that an image's features were computed from are in their graph. Whatever is not among them never
    gets a gradient, which some engines do not accept, so it is to be frozen.

    Args:
        model: with its weights.
        with_images: whether images are trained on; where they are not, it is all of the tower.
    """
    vision = Vision.of(model)
    if vision.model is None:
        return []
    reached = set[int]()
    if with_images:
        with evaluating(model), torch.enable_grad():
            levels, _ = vision._levels(plain_images(vision.model).inputs)
        for level in levels:
            reached |= _leaves(level)
    lost = set(map(id, beside_language(model))) - reached
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad and id(parameter) in lost]


def unreached_if_known(model: nn.Module) -> list[str]:
    """The same where images are trained on; of a family that nobody has tried it may not be known, and is empty."""
    with suppress(AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        return unreached(model, with_images=True)
    return []


def _leaves(tensor: Tensor) -> set[int]:
    """The ids of the parameters that a tensor was computed from."""
    found, seen, waiting = set[int](), set[Any](), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found.add(id(leaf))
        waiting += [before for before, _ in node.next_functions]
    return found


# Positions.


@torch.no_grad()
def rope_positions(
    vision: Vision,
    input_ids: Tensor,
    images: Images | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Positions in time, row and column of every token, as the model itself counts them inside each document.

    No weights are needed. The host waits for tensors that are on a device.

    Args:
        vision: of a model that `takes_rope_positions`.
        input_ids: `[B, T]`, or `[1, N]` of documents laid flat.
        images: those that the placeholders show; None: there are none.
        attention_mask: `[B, T]`, 0 on padding.
        position_ids: `[B, T]`, restarting at 0 in every document; None: a row is one document.

    Returns:
        `[3, B, T]`, 0 on padding.
    """
    ids = input_ids.cpu()
    found = torch.zeros(3, *ids.shape, dtype=torch.long)
    uses = _Uses(images, vision.image_token_id)
    for row, place, shared in _documents(ids, attention_mask, position_ids):
        here = ids[row, place]
        document, shown = uses.of_the_next(here, shared)
        inputs: dict[str, Any] = {"mm_token_type_ids": (document == vision.image_token_id).int()[None]}
        if images is not None and shown:
            inputs["image_grid_thw"] = images.inputs["image_grid_thw"].cpu()[shown]
        positions, _ = vision.model.get_rope_index(document[None], **inputs)
        found[:, row, place] = positions[:, 0, -len(here) :]
    return found.to(input_ids.device)


def _documents(
    ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> Iterator[tuple[int, slice | Tensor, int]]:
    """Row and place of each document in `[B, T]`, in their order; of a branch also how many tokens it goes on from."""
    for row in range(len(ids)):
        if attention_mask is not None:
            (place,) = attention_mask[row].cpu().nonzero(as_tuple=True)
            yield row, place, 0
            continue
        bounds, inside = [0, ids.shape[1]], torch.zeros(1, dtype=torch.long)
        if position_ids is not None:
            inside = position_ids[row % len(position_ids)].cpu()
            restarts = (inside.diff() != 1).nonzero().flatten() + 1
            bounds = [0, *restarts.tolist(), ids.shape[1]]
        for start, stop in pairwise(bounds):
            yield row, slice(start, stop), int(inside[start])


class _Uses:
    """The images that documents show, one document after the other."""

    def __init__(self, images: Images | None, image_token_id: int) -> None:
        self._order, self._lengths, self._token = list[int](), list[int](), image_token_id
        if images is not None:
            self._order, self._lengths = images.order.tolist(), images.lengths.tolist()
        self._whole, self._shown = torch.empty(0, dtype=torch.long), list[int]()  # the last document that is no branch

    def of_the_next(self, here: Tensor, shared: int) -> tuple[Tensor, list[int]]:
        """All tokens of a document of which `here [T]` are its own, and the distinct images that they show.

        Args:
            here: the tokens where it lies.
            shared: of a branch, how many tokens of the last document that is none come before them.
        """
        shown = self._take(here, self._order)
        del self._order[: len(shown)]
        if not shared:
            self._whole, self._shown = here, shown
            return here, shown
        before = self._whole[:shared]
        return torch.cat([before, here]), [*self._take(before, self._shown), *shown]

    def _take(self, ids: Tensor, order: list[int]) -> list[int]:
        """The first of the images in `order`, as many as there are placeholders for in `ids`."""
        num_tokens = int((ids == self._token).sum())
        left, taken = num_tokens, 0
        while left > 0 and taken < len(order):
            left -= self._lengths[order[taken]]
            taken += 1
        if left:
            raise ValueError(
                f"a document has {num_tokens} placeholders of images, which are not those of its images; expected documents "
                f"that are cut between images"
            )
        return order[:taken]


# Images that nobody took, to try a model out on.


def plain_images(model: Any, number: int = 1) -> ImageInputs:
    """`number` different images as a vision-language model takes them, as small as its tower allows.

    Their `lengths`, 0 here, are unknown until the tower has seen them.
    """
    config = model.config.vision_config
    names = _parameters(model.get_image_features)
    channels = getattr(config, "num_channels", getattr(config, "in_channels", 3))
    if "image_grid_thw" in names:
        side = config.spatial_merge_size
        patch = channels * config.temporal_patch_size * config.patch_size**2
        pixels = _shades(number, 2 * side * side, patch).flatten(0, 1)
        inputs = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, side, 2 * side]] * number)}
    else:
        height, width = _pair(config.image_size)
        pixels = _shades(number, channels, height, width)
        inputs = {"pixel_values": pixels}
        if "pixel_attention_mask" in names:  # pieces of an image in a dimension of their own
            inputs = {"pixel_values": pixels[None]}
        elif _is_required(names.get("image_sizes")):  # pieces of an image, as many as its size makes
            pieces = 1 + max(a * b for a, b in model.config.image_grid_pinpoints) // (height * width)
            inputs = {
                "pixel_values": pixels[:, None].expand(-1, pieces, -1, -1, -1).contiguous(),
                "image_sizes": torch.tensor([[height, width]] * number),
            }
    return ImageInputs(inputs, torch.arange(number), torch.zeros(number, dtype=torch.long))


def _shades(number: int, *shape: int) -> Tensor:
    """`[number, *shape]`: different everywhere, the same at every call, and nowhere 0, which some models take for padding."""
    count = number * torch.Size(shape).numel()
    return torch.linspace(-3.0, 3.0, count + 1)[1:].sin().add(1.5).view(number, *shape)


def _pair(size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return height, width


def _is_required(parameter: inspect.Parameter | None) -> bool:
    return parameter is not None and parameter.default is inspect.Parameter.empty
