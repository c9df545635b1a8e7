"""What one device holds at the worst moment of a training step, in bytes.

The activations of a layer follow Korthikanti et al. 2022 (arXiv:2205.05198, section 4.1: add up what each operation
keeps for its backward), for the layers that are trained here: RMSNorm computed in fp32, grouped queries, rotary
positions, attention that keeps no matrix of scores (Dao et al. 2022, arXiv:2205.14135), SwiGLU. States of the sharded
strategies follow Rajbhandari et al. 2020 (arXiv:1910.02054, section 3 and figure 1).
`benchmarks/plan_error.py` and `benchmarks/quantized_memory.py` compare with what PyTorch allocates.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from llm_trainer.config.options import ON_THEIR_WAY
from llm_trainer.losses.chunked import CHUNK_BYTES, CHUNK_BYTES_GPU, PRODUCT_BYTES, PRODUCT_BYTES_GPU
from llm_trainer.plan.shapes import Adapters, Job, Shape

# DeepSpeed's defaults, in elements (deepspeed.ai/docs/config-json): gradients travel in buckets of this many, and ZeRO-3
# keeps at most so many gathered parameters.
ZERO_BUCKET = 5e8
ZERO3_LIVE = 1e9


@dataclass(frozen=True)
class Strategy:
    """How states are spread over devices.

    Attributes:
        name: what users call it.
        optimizer, gradients, weights: which of them each device holds only its share of.
        is_zero: DeepSpeed with 16-bit weights and fp32 copies in the optimizer (`ds_config.bf16_config`).
    """

    name: str
    optimizer: bool
    gradients: bool
    weights: bool
    is_zero: bool


ONE = Strategy("one GPU", False, False, False, False)
DDP = Strategy("DDP", False, False, False, False)
ZERO1 = Strategy("ZeRO-1", True, False, False, True)
ZERO2 = Strategy("ZeRO-2", True, True, False, True)
ZERO3 = Strategy("ZeRO-3", True, True, True, True)
FSDP2 = Strategy("FSDP2", True, True, True, False)
STRATEGIES = (DDP, ZERO1, ZERO2, ZERO3, FSDP2)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by purpose, at one moment.

    Attributes:
        weights: of the trained model, with fp32 copies of 16-bit ones, and 16-bit copies of fp32 ones.
        gradients: of all weights that are trained.
        optimizer: state.
        activations: kept for the backward, and what the layer at work needs besides.
        images: the same of what sees images.
        head: logits, which become their gradient, and the gradient of the vocabulary matrix.
        buffers: what is gathered from other devices or on its way to them.
        frozen: a reference, a teacher or a reward model.
        sampler: what completions are sampled with: a copy of the weights, and its cache.
    """

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    images: float = 0.0
    head: float = 0.0
    buffers: float = 0.0
    frozen: float = 0.0
    sampler: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return float(sum(getattr(self, field.name) for field in fields(self)))


@dataclass(frozen=True)
class Widths:
    """Bytes per value of activations: `product` where it enters a matrix product, `residual` between the layers.

    Autocast keeps what lies between the layers in fp32; 16-bit weights (FSDP2, ZeRO) make that 16-bit too.
    """

    product: int
    residual: int

    @classmethod
    def of(cls, strategy: Strategy, precision: str) -> "Widths":
        """As `strategy` computes in `precision`."""
        if precision == "fp32":
            return cls(4, 4)
        if strategy.weights or strategy.is_zero:
            return cls(2, 2)
        return cls(2, 4)

    @property
    def cast(self) -> bool:
        """Whether autocast copies what enters a product."""
        return self.product != self.residual


def layer_activations(shape: Shape, w: Widths, on_gpu: bool = True) -> float:
    """Bytes per token that one layer keeps for its backward.

    With D the width, Q and K all query and all key heads together, F the feed-forward width, e and r the bytes of
    products and residuals:

    * each of two norms: its input in fp32, 4 D; normalised, r D; the result, e D, once for each product that autocast
      copies it for (query, key, value; gate, up), else once for all;
    * queries and keys, normalised (Qwen3): in fp32, normalised, rotated, (4 + 2 e) (Q + K); else e (Q + K);
    * values and attention's output e (K + Q), its normaliser 4 per head; statistics of the norms 4 each;
    * feed-forward: gate, its SiLU, up, their product, 4 e F. With k experts also the gathered inputs, e k D, and the
      outputs before and after their weights, 2 e k D.
    """
    d, e, r = shape.hidden_size, w.product, w.residual
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    statistics = 4.0 * (2 + shape.num_heads + (shape.num_heads + shape.num_kv_heads) * shape.normed_heads)
    experts = 3 * e * shape.experts_per_token * d
    around = e * (keys + queries) + statistics + experts
    if shape.adapters is not None:
        return around + _beside_adapters(shape, shape.adapters, w, on_gpu)
    norms = 2 * (4 + r) * d + (5 if w.cast else 2) * e * d
    rotated = (4 + 2 * e if shape.normed_heads else e) * (queries + keys)
    return norms + rotated + around + 4 * e * shape.intermediate_size


def _beside_adapters(shape: Shape, adapters: Adapters, w: Widths, on_gpu: bool) -> float:
    """The part of `layer_activations` that is another one where the layers are frozen and have adapters.

    A product with a frozen weight keeps nothing of what enters it, a norm with a frozen weight not what it normalises; an
    adapter keeps what enters it, in a copy of its own where autocast makes one, and what it is narrowed to. Layers in 8
    bits also keep what they are given.
    """
    d, f, e, r = shape.hidden_size, shape.intermediate_size, w.product, w.residual
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    keeps_inputs = shape.quantized.bits == 8
    returned = _returned(shape, w, on_gpu)
    rotated = (4 + e if shape.normed_heads else e) * (queries + keys)
    if w.cast:
        entering = e * (adapters.on_hidden * d + adapters.on_attention * queries + adapters.on_product * f)
        entering += (2 * r * d + returned * f) * keeps_inputs
    else:
        entering = e * (min(2, adapters.on_hidden) * d + adapters.on_product * f)
        entering = max(entering, (2 * r * d + returned * f) * keeps_inputs)
    return 2 * 4 * d + rotated + 3 * returned * f + entering + e * adapters.ranks


def _returned(shape: Shape, w: Widths, on_gpu: bool) -> int:
    """Bytes of a value that a product with a weight of the layers returns: in few bits the type that it is given, but
    bitsandbytes' code of 8 bits for CPUs leaves the type to autocast.
    """
    bits = shape.quantized.bits
    if bits == 4 or (bits == 8 and on_gpu):
        return w.residual
    return w.product


def _kept_by_eight_bits(shape: Shape, w: Widths) -> float:
    """Bytes per token that the layers in 8 bits of one layer keep although it is computed again.

    bitsandbytes holds what enters them where checkpointing does not see it: both norms, attention's output, the product.
    """
    if shape.quantized.bits != 8:
        return 0.0
    attention = w.product * shape.num_heads * shape.head_dim
    return 2 * w.residual * shape.hidden_size + attention + w.product * shape.intermediate_size


@dataclass(frozen=True)
class Step:
    """What is decided about one micro-batch.

    Attributes:
        tokens: positions of it.
        checkpointing: only the inputs of layers are kept, and one layer at a time is computed again.
        chunked: the head takes a few rows at a time; otherwise all logits exist at once, as in a plain loop.
        accumulates: gradients of earlier micro-batches are there already.
        on_gpu: the head takes chunks of the size that suits GPUs.
        patches: that the tower sees in it.
    """

    tokens: int
    checkpointing: bool = False
    chunked: bool = True
    accumulates: bool = False
    on_gpu: bool = True
    patches: float = 0.0


def _head(shape: Shape, job: Job, w: Widths, step: Step) -> tuple[float, float]:
    """Bytes of the head while the loss is computed, and those that remain until the backward of the last layer.

    Chunked: a chunk of logits, which becomes its gradient, in 16 bit a slice of the weight's gradient, and that gradient
    in fp32; of every token the hidden state, its copy for the product, and the gradients of both. Whole: the log-softmax of
    fp32 logits and the gradients of both.
    """
    table, e, r = shape.vocabulary_parameters, w.product, w.residual
    if not job.has_head:
        return 0.0, 0.0
    learned = shape.trained_head
    after = step.tokens * r * shape.hidden_size + (4 if r == 4 else 2) * learned
    if not step.chunked:
        return 12.0 * step.tokens * shape.vocab_size + e * table * w.cast, after
    logits = step.tokens * shape.vocab_size * e
    chunk_bytes, product_bytes = (CHUNK_BYTES_GPU, PRODUCT_BYTES_GPU) if step.on_gpu else (CHUNK_BYTES, PRODUCT_BYTES)
    chunk = logits / max(1, -(-logits // chunk_bytes))  # chunks are of equal size
    product = min(product_bytes, e * learned) if e == 2 else 0  # a slice of the weight's gradient in half precision
    per_token = (2 * r + 2 * e if w.cast else r + e) * shape.hidden_size
    casts = e * (table if w.cast else learned * (r == 2))  # of the weight before, or of its gradient after
    # After the loss comes a teacher: both models' logits of a chunk in fp32 and what lies between them.
    buffers = max(chunk + product, 24 * min(step.tokens * shape.vocab_size, job.teacher_chunk))
    gradients = 4 * learned * (2 if job.teacher_chunk else 1)
    fixed = buffers + gradients + casts
    return step.tokens * per_token + fixed, after


def _states(shape: Shape, job: Job, strategy: Strategy, devices: int) -> tuple[Memory, float]:
    """Weights, optimizer and frozen models, which are always there, and the gradients of all weights once they are."""
    trained, precise = shape.trained_parameters, job.precision == "fp32"
    share = {True: 1 / devices, False: 1.0}
    each = 2 if strategy.is_zero and not precise else 4
    weights = shape.stored_bytes(each) * share[strategy.weights]
    if strategy.is_zero and not precise:
        weights += 4 * trained / devices  # the fp32 copies
    states = Memory(
        weights=weights,
        optimizer=job.state_bytes * share[strategy.optimizer],
        frozen=job.frozen_bytes * share[strategy is FSDP2],
    )
    return states, each * trained * share[strategy.gradients]


def autocast_copies(shape: Shape, checkpointing: bool) -> float:
    """Bytes of the weights of products as autocast copies them to 16 bit, in the backward of the last layer.

    Those of trained weights are cached until the end of the backward. Of frozen ones every product keeps one of its own,
    in a layer that is computed again only meanwhile; of those in few bits there is none.
    """
    of_images = 2.0 * _trained_of_images(shape)
    if shape.adapters is None:
        return 2.0 * shape.product_parameters + of_images
    frozen = 2.0 * (shape.product_parameters - shape.quantized.parameters)
    return of_images + (frozen / shape.num_layers if checkpointing else frozen)


def _trained_of_images(shape: Shape) -> int:
    """Parameters of the products of what sees images that are trained."""
    if shape.tower is None:
        return 0
    return shape.tower.tower_products.trained + shape.tower.projector_products.trained


def _buffers(shape: Shape, job: Job, strategy: Strategy, devices: int, accumulates: bool) -> tuple[float, float, float]:
    """Bytes that exist only because there are several devices: in the head, and in the backward of layers and embedding.

    FSDP2: the whole embedding and head; in the backward of the layers two whole layers (the next one is on its way), the
    gradient of one and the fp32 sum that is exchanged; at its end those of embedding and head, whose sum stays until the
    step's last micro-batch and is added to that of the micro-batches before. ZeRO-2 and 3: two buckets
    of gradients, one being filled while one travels, and for ZeRO-3 the gathered parameters. DDP's buckets are the
    gradients themselves.
    """
    if devices == 1 or not strategy.gradients:
        return 0.0, 0.0, 0.0
    n, e = shape.language.number, 4 if job.precision == "fp32" else 2
    if strategy.is_zero:
        buckets = 2 * e * min(shape.trained_parameters, ZERO_BUCKET)
        if strategy.weights:
            buckets += min(shape.stored_bytes(e), e * ZERO3_LIVE)
        return buckets, buckets, buckets
    layer, outside = shape.layer_parameters, n - shape.num_layers * shape.layer_parameters
    learned = shape.head_rank * shape.vocab_size if shape.frozen_head else outside  # of embedding and head
    stays, share = 4 * learned * accumulates, 4 * learned / devices * accumulates
    in_layers = e * outside + 2 * shape.stored_layer_bytes(e) + (e + 4) * layer * shape.trained_share
    return e * outside + stays, in_layers + stays, e * outside + (e + 4) * learned + stays + share


def moments(shape: Shape, job: Job, strategy: Strategy, devices: int, step: Step) -> Iterator[Memory]:
    """The moments of a step at which memory may peak: the head, the backward of the last layer, that of the first layer,
    that of the embedding, the update; and before, where completions are sampled, when their cache is full, which it may be at
    any of these in asynchronous mode.
    """
    w = Widths.of(strategy, job.precision)
    states, gradients = _states(shape, job, strategy, devices)
    in_head, in_layers, in_embedding = _buffers(shape, job, strategy, devices, step.accumulates)
    r, d = w.residual, shape.hidden_size
    table = 0 if shape.frozen_head else shape.vocabulary_parameters  # that has a gradient
    layer = layer_activations(shape, w, step.on_gpu) * step.tokens
    computed_again = (r * d + _kept_by_eight_bits(shape, w)) * step.tokens
    kept = (computed_again if step.checkpointing else layer) * shape.num_layers
    if step.checkpointing and job.offloads:
        kept -= r * d * step.tokens * max(0, shape.num_layers - ON_THEIR_WAY)
    outer = (4 + 2 * r) * d * step.tokens + 24.0 * step.tokens  # around the last norm; token ids, labels, mask
    wide = _returned(shape, w, step.on_gpu)
    at_work = (2 * wide * shape.intermediate_size + 2 * r * d) * step.tokens + layer * step.checkpointing
    at_work += (4 + w.product * w.cast) * shape.quantized.largest  # a matrix in few bits as numbers, and cast
    copies = 0.0
    if strategy in (ONE, DDP) and job.precision != "fp32":
        copies = autocast_copies(shape, step.checkpointing)
    head, after_head = _head(shape, job, w, step)
    there = gradients if step.accumulates or strategy.is_zero or strategy is DDP else 0.0  # DDP's buckets stay
    seen, in_tower = _images(shape, w, step)
    sampler = job.copy_bytes
    if job.samples_meanwhile:
        sampler += job.cache_bytes

    def at(activations: float, head: float, gradients: float, buffers: float) -> Memory:
        fixed = (states.frozen, sampler)
        return Memory(states.weights + copies, gradients, states.optimizer, activations, seen, head, buffers, *fixed)

    yield at(kept + outer, head, there, in_head)
    yield at(kept + at_work, after_head, there, in_layers)
    first = (computed_again if step.checkpointing else layer) + at_work
    shared = shape.tied and job.has_head  # the head's gradient waits for the embedding's
    missing = (shape.layer_parameters + table * (not shared)) * shape.language.trained / shape.language.number
    if shape.tower is not None:
        missing += shape.tower.parameters.trained
    missing /= max(1, shape.trained_parameters)  # of the gradients, so far
    twice = 4.0 * table if there or shared else 0.0  # the embedding's, before it is added
    held = 0.0
    if strategy is FSDP2:  # the head's is sharded together with the embedding's
        held = float(w.product * table * job.has_head)
        twice = held if shared else 0.0
    yield at(first, held, there or gradients * (1 - missing), in_layers)
    yield at(r * d * step.tokens, twice, gradients, in_embedding)
    if shape.tower is not None and in_tower:  # whose backward is the last
        missing = shape.tower.parameters.trained / shape.trained_parameters
        yield replace(at(0.0, 0.0, there or gradients * (1 - missing), in_embedding), images=seen + in_tower)
        first_layer = seen / shape.tower.num_layers
        yield replace(at(0.0, 0.0, gradients, in_embedding), images=first_layer + in_tower)
    seen = 0.0
    update = 4 * shape.trained_parameters / devices if strategy.is_zero and job.precision != "fp32" else 0.0
    if not step.on_gpu:
        update += job.update_bytes
    copies = 0.0  # autocast is over
    yield at(0.0, 0.0, gradients + update, 0.0)
    if job.cache_bytes:
        between = gradients if strategy.is_zero or strategy is DDP else 0.0  # what keeps its buckets between steps
        yield replace(at(0.0, 0.0, between, 0.0), sampler=job.copy_bytes + job.cache_bytes)


def _images(shape: Shape, w: Widths, step: Step) -> tuple[float, float]:
    """Bytes that are kept of the images of a micro-batch until the backward of their tower, and those that it needs besides."""
    tower = shape.tower
    if tower is None or not step.patches:
        return 0.0, 0.0
    kept = tower.activations(w.product, w.residual, step.checkpointing) * step.patches
    at_work = tower.at_work(w.product, w.residual, step.checkpointing) * step.patches
    return kept, at_work * (tower.tower.trained > 0)


def on_the_host(shape: Shape, job: Job, strategy: Strategy, tokens: int) -> float:
    """Bytes of what enters the layers, of a micro-batch of so many tokens, where that waits in host memory."""
    if not job.offloads:
        return 0.0
    return float(Widths.of(strategy, job.precision).residual * shape.hidden_size * tokens * shape.num_layers)


def peak(shape: Shape, job: Job, strategy: Strategy, devices: int, step: Step) -> Memory:
    """The worst of `moments`."""
    return max(moments(shape, job, strategy, devices, step), key=lambda memory: memory.total)
