"""How long a step takes: products at a share of the peak, and what of the communication they do not hide.

Volumes are those of Rajbhandari et al. 2020 (arXiv:1910.02054, section 7): an all-gather or a reduce-scatter of S bytes
makes each of N devices send S (N - 1) / N, an all-reduce is both. Rings enter a node through every adapter at once, so
between nodes a device sends at the speed of all adapters of its node, but never faster than inside it.
"""

from dataclasses import dataclass

from llm_trainer.plan.gpus import Gpu
from llm_trainer.plan.memory import Strategy
from llm_trainer.plan.shapes import Job, Shape

# What collectives reach of a link's data sheet: NCCL's tests on large messages lie around it.
LINK_SHARE = 0.8


@dataclass(frozen=True)
class Cluster:
    """Equal devices in equal nodes.

    Attributes:
        gpu: each device.
        devices: all of them.
        per_node: of one machine.
    """

    gpu: Gpu
    devices: int
    per_node: int

    @property
    def bandwidth(self) -> float:
        """Bytes/s that a device sends while all of them exchange one large tensor."""
        inside, outside = self.gpu.link, self.gpu.network * self.per_node
        return LINK_SHARE * (inside if self.devices <= self.per_node else min(inside, outside))


@dataclass(frozen=True)
class Speed:
    """One optimizer step on all devices.

    Attributes:
        compute_s: seconds of forward and backward.
        exposed_s: seconds that computing waits for the network.
        update_s: seconds of the optimizer.
        tokens_per_second: positions, padding included, of all devices.
        mfu: model FLOPs (without recomputation and frozen models) over the peak of all devices.
    """

    compute_s: float
    exposed_s: float
    update_s: float
    tokens_per_second: float
    mfu: float

    @property
    def step_s(self) -> float:
        """Seconds of the whole step."""
        return self.compute_s + self.exposed_s + self.update_s


def _sent(shape: Shape, job: Job, strategy: Strategy) -> tuple[float, float, float]:
    """Bytes of collectives (all-gathers and reduce-scatters) per micro-batch, with the last one, and after the update.

    DDP all-reduces fp32 gradients with the last micro-batch. ZeRO-1 reduces 16-bit gradients then, ZeRO-2 with every
    micro-batch, and both gather new weights after the update. ZeRO-3 and FSDP2 gather weights for every forward and
    backward; FSDP2 sums gradients in fp32.
    """
    n, learned, e = shape.num_parameters, shape.trained_parameters, 4 if job.precision == "fp32" else 2
    if strategy.weights:
        return 2 * e * n + (e if strategy.is_zero else 4) * learned, 0.0, 0.0
    if strategy.gradients:
        return e * learned, 0.0, e * learned
    return (0.0, e * learned, e * learned) if strategy.is_zero else (0.0, 8.0 * learned, 0.0)


def forward_image_flops(shape: Shape, job: Job) -> float:
    """Of the forward of the trained model, for the images of a row of data."""
    if shape.tower is None or not job.patches:
        return 0.0
    return job.patches * shape.tower.forward_flops_per_patch(job.patches / job.images)


def estimate(
    shape: Shape, job: Job, strategy: Strategy, cluster: Cluster, *, checkpointing: bool, micro_rows: int, share: float
) -> Speed:
    """The speed of a step of `job.rows` rows per device, split into micro-batches of `micro_rows`.

    Args:
        shape: the model.
        job: the work of a step.
        strategy: how states are spread.
        cluster: the devices.
        checkpointing: the forward runs twice.
        micro_rows: rows per micro-batch.
        share: of the peak that products reach while nothing waits.
    """
    gpu, devices, e = cluster.gpu, cluster.devices, 4 if job.precision == "fp32" else 2
    tokens, micros = job.rows * job.sample_tokens, -(-job.rows // micro_rows)
    peak_flops = gpu.half_flops if e == 2 else gpu.single_flops
    # A step is three products for each weight that is trained, and two for one that is frozen.
    language = shape.language
    forward = (job.flops_per_token + 2 * (language.number - language.trained)) / 3
    forward += forward_image_flops(shape, job) / job.sample_tokens
    work = job.flops_with_images + forward * checkpointing + job.frozen_flops_with_images
    compute = tokens * work / (peak_flops * share)
    per_micro, with_last, after = (
        sent * (devices - 1) / devices / cluster.bandwidth for sent in _sent(shape, job, strategy)
    )
    backward = compute / micros * (work - forward - job.frozen_flops_with_images) / work
    # A layer's transfer hides behind its neighbours' computing; the first or the last one has none.
    exposed = micros * max(per_micro - compute / micros, per_micro / shape.num_layers)
    exposed += max(with_last - backward, with_last / shape.num_layers) + after
    # Norm and clipping read gradients twice and write them once; the update reads them, and reads and writes the rest.
    update = (24.0 * shape.trained_parameters + 2 * job.state_bytes) / gpu.memory_bandwidth
    update *= 1 / devices if strategy.optimizer else 1.0
    seconds = compute + exposed + update
    return Speed(
        compute_s=compute,
        exposed_s=exposed,
        update_s=update,
        tokens_per_second=tokens * devices / seconds,
        mfu=tokens * job.flops_with_images / (seconds * peak_flops),
    )
