"""The arithmetic of plans: against published numbers, against real optimizers, and against a real training step."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llm_trainer import AdapterConfig, adapt
from llm_trainer.config.errors import ConfigError
from llm_trainer.config.model import ModelConfig, MoeConfig
from llm_trainer.config.quantization import QuantizationConfig
from llm_trainer.models.build import build_model, num_parameters
from llm_trainer.models.quantized_loading import loading_options
from llm_trainer.optim.optimizers import configure_optimizer
from llm_trainer.plan.choices import RESERVE, choices, recommend, usable
from llm_trainer.plan.describe import quantized_by
from llm_trainer.plan.gpus import GB, GPUS, Gpu, find_gpu, half_peak
from llm_trainer.plan.memory import DDP, FSDP2, ONE, STRATEGIES, ZERO1, ZERO2, ZERO3, Step, moments, peak
from llm_trainer.plan.shapes import Adapters, Job, Shape, optimizer_bytes, shape_of
from llm_trainer.plan.speed import LINK_SHARE, Cluster, estimate
from llm_trainer.train.size import Size

BENCHMARK = Path(__file__).resolve().parents[3] / "benchmarks" / "plan_error.py"
# 7.5 billion parameters, most of them in layers, as in the figure of the ZeRO paper.
BIG = Shape(
    num_parameters=7_500_000_000,
    layer_parameters=200_000_000,
    product_parameters=7_200_000_000,
    num_layers=36,
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=12288,
    vocab_size=32000,
    experts_per_token=0,
    normed_heads=True,
    tied=False,
)
SMALL = replace(BIG, num_parameters=100_000_000, layer_parameters=2_000_000, product_parameters=72_000_000)
JOB = Job(row_tokens=2048, rows=8, rows_per_sample=1, flops_per_token=45e9, state_bytes=60e9)
SMALL_JOB = replace(JOB, flops_per_token=0.6e9, state_bytes=0.8e9)
NODE = Cluster(GPUS["h100"], devices=8, per_node=8)


def small_model(**changes):
    return build_model(
        ModelConfig(**{"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4} | changes)
    )


# GPUs


def test_an_unknown_gpu_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="--gpu: got 'h1000', expected one of b200, h200, h100, a100-80"):
        find_gpu("h1000")
    assert find_gpu("H200") is GPUS["h200"]


@pytest.mark.parametrize(
    ("device", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("Tesla V100-SXM2-32GB", 125),
        ("NVIDIA L40", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_a_device_is_known_by_the_word_of_its_chip(device, teraflops):
    assert half_peak(device) == (teraflops and teraflops * 1e12)


# Shapes


def test_a_shape_counts_like_the_model():
    model = small_model(num_key_value_heads=2, intermediate_size=80)
    shape = shape_of(model)
    assert shape.num_parameters == num_parameters(model)
    attention, feed_forward = 32 * 32 * 2 + 32 * 16 * 2, 3 * 32 * 80
    assert shape.product_parameters == 2 * (attention + feed_forward)
    assert shape.layer_parameters == attention + feed_forward + 2 * 32 + 2 * 8  # two norms, and those of the heads
    assert (shape.num_kv_heads, shape.head_dim, shape.intermediate_size, shape.vocab_size) == (2, 8, 80, 40)
    assert shape.normed_heads and shape.tied
    assert not shape_of(small_model(architecture="llama")).normed_heads


def test_of_experts_only_the_chosen_ones_make_activations():
    moe = MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    shape = shape_of(small_model(architecture="qwen3_moe", moe=moe))
    assert (shape.intermediate_size, shape.experts_per_token) == (48, 2)
    moe = MoeConfig(4, 2, moe_intermediate_size=24, num_shared_experts=2, num_dense_layers=1)
    shape = shape_of(small_model(architecture="glm4_moe", moe=moe, intermediate_size=80))
    assert (shape.intermediate_size, shape.experts_per_token) == ((80 + 4 * 24) / 2, 2)


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "muon", "adafactor"])
@pytest.mark.parametrize("tied", [True, False])
def test_optimizer_state_is_what_optimizers_allocate(name, tied):
    model = small_model(tie_word_embeddings=tied)
    optimizer = configure_optimizer(model, name, lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.numel() > 1]
    expected = sum(tensor.numel() * 4 for tensor in tensors)
    first_screen = Size.of(model, configure_optimizer(model, name, lr=1e-3), None).optimizer_bytes
    assert optimizer_bytes(name, 0.0, model) == first_screen == expected


def test_momentum_makes_state_and_unknown_optimizers_are_refused():
    model = small_model()
    assert optimizer_bytes("sgd", 0.9, model) == 4 * num_parameters(model)
    with pytest.raises(ConfigError, match="optim_type: got 'rmsprop'"):
        optimizer_bytes("rmsprop", 0.0, model)


# Memory


@pytest.mark.parametrize(("strategy", "gigabytes"), [(ZERO1, 31.4), (ZERO2, 16.6), (ZERO3, 1.9)])
def test_states_are_those_of_the_zero_paper(strategy, gigabytes):
    """Rajbhandari et al. 2020, figure 1: 7.5 B parameters, 64 devices, Adam in mixed precision."""
    first = next(moments(BIG, JOB, strategy, 64, Step(tokens=1)))
    assert (first.weights + first.gradients + first.optimizer) / 1e9 == pytest.approx(gigabytes, abs=0.05)


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("plan_error", BENCHMARK)
    found = sys.modules["plan_error"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("cases", ["QUICK", "FEW_BITS"])
def test_prediction_and_measurement_of_a_training_step_agree(benchmark, cases):
    """Live bytes of real steps of `SFTTrainer` (see the benchmark, which has more and larger cases)."""
    pytest.importorskip("peft", reason="needs peft")
    if cases == "FEW_BITS":
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    for case in getattr(benchmark, cases):
        expected, measured = benchmark.compare(case)
        assert expected == pytest.approx(measured, rel=0.06), str(case)


@pytest.mark.parametrize("how", [{"bits": 8}, {"bits": 4}, {"bits": 4, "double": False}], ids=str)
def test_weights_in_few_bits_take_what_plan_says(how, tmp_path):
    """From the section and an empty model as much as the loaded one has; the head and what is skipped stay as they are."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    config = QuantizationConfig(skip_modules=["o_proj"], **how)
    small_model(hidden_size=64).save_pretrained(tmp_path)
    options = loading_options(config, tmp_path, torch.device("cpu"), torch.float32)
    loaded = shape_of(build_model(tmp_path, options=options))
    empty = build_model(tmp_path, empty=True)
    shape = shape_of(empty, quantized_by(empty, config))
    assert shape.quantized == loaded.quantized
    assert shape.num_parameters == loaded.num_parameters and shape.product_parameters == loaded.product_parameters
    kept = shape.num_parameters - shape.quantized.parameters
    assert shape.stored_bytes(4) == 4 * kept + shape.quantized.bytes
    assert 0 < shape.quantized.bytes < shape.quantized.parameters * (how["bits"] / 8 + 0.1)


def test_the_head_of_adapters_has_gradients_of_their_size_only():
    pytest.importorskip("peft", reason="needs peft")
    model = small_model(tie_word_embeddings=False)
    whole = shape_of(model)
    assert whole.trained_head == whole.vocabulary_parameters and whole.adapters is None
    adapted = shape_of(adapt(model, AdapterConfig(rank=4, target=["q_proj", "down_proj", "lm_head"])).get_base_model())
    assert adapted.trained_head == 4 * whole.vocab_size
    assert adapted.adapters == Adapters(on_hidden=1, on_attention=0, on_product=1, ranks=8)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_more_tokens_need_more_and_recomputation_and_chunks_need_less(strategy, precision):
    job = replace(JOB, precision=precision)

    def needs(tokens, checkpointing=False, chunked=True):
        return peak(BIG, job, strategy, 8, Step(tokens, checkpointing, chunked)).total

    assert needs(4096) > needs(2048)
    assert needs(8192, checkpointing=True) < needs(8192)
    assert needs(8192, chunked=False) >= needs(8192)  # equal where the peak is elsewhere
    whole, chunked = (next(moments(BIG, job, strategy, 8, Step(8192, chunked=how))).head for how in (False, True))
    assert whole > chunked


def test_layers_are_narrower_where_the_weights_have_16_bits():
    autocast, half = (peak(BIG, JOB, strategy, 8, Step(8192)).activations for strategy in (DDP, FSDP2))
    # Residuals and norms in fp32 and five copies for products against 16 D: (26 - 16) D of the sum below.
    kept = 16 * 4096 + 10 * 4096 + 10 * 1024 + 8 * 12288
    assert autocast / half == pytest.approx(1 + 10 * 4096 / kept, rel=0.01)


def test_a_reference_is_sharded_by_fsdp_only():
    job = replace(JOB, frozen_bytes=30e9)
    assert {s.name: peak(BIG, job, s, 8, Step(1)).frozen for s in STRATEGIES} == {
        s.name: 30e9 / 8 if s is FSDP2 else 30e9 for s in STRATEGIES
    }


def test_a_sampler_keeps_its_copy_and_fills_its_cache_between_steps():
    few = Step(64, checkpointing=True)
    for strategy in STRATEGIES:
        plain, copied = (peak(BIG, replace(JOB, copy_bytes=copy), strategy, 8, few) for copy in (0.0, 15e9))
        assert copied.total == pytest.approx(plain.total + 15e9) and copied.sampler == 15e9
        sampling = peak(BIG, replace(JOB, copy_bytes=15e9, cache_bytes=900e9), strategy, 8, few)
        assert sampling.sampler == 915e9 and sampling.activations == sampling.head == 0
        assert sampling.optimizer == plain.optimizer and sampling.frozen == plain.frozen
        meanwhile = replace(JOB, copy_bytes=15e9, cache_bytes=900e9, samples_meanwhile=True)
        assert peak(BIG, meanwhile, strategy, 8, few).total == pytest.approx(plain.total + 915e9)
    assert peak(BIG, replace(JOB, copy_bytes=15e9, cache_bytes=1.0), FSDP2, 8, few).sampler == 15e9  # no peak


def test_two_models_that_are_trained_together_count_as_one_of_both():
    both = BIG.beside(SMALL)
    assert both.num_parameters == BIG.num_parameters + SMALL.num_parameters
    assert both.num_layers == BIG.num_layers  # of a hundredth of its layers
    assert BIG.beside(BIG).num_layers == 72 and BIG.beside(BIG).product_parameters == 2 * BIG.product_parameters


def test_without_a_head_there_are_no_logits():
    assert peak(BIG, replace(JOB, has_head=False), ONE, 1, Step(4096)).head == 0


# Speed


def test_one_device_computes_at_the_share_of_its_peak():
    job, cluster = replace(JOB, frozen_flops_per_token=15e9), Cluster(GPUS["h100"], 1, 1)
    speed = estimate(BIG, job, ONE, cluster, checkpointing=True, micro_rows=2, share=0.5)
    assert speed.compute_s == pytest.approx(8 * 2048 * (45e9 * 4 / 3 + 15e9) / (989e12 * 0.5))
    assert speed.exposed_s == 0
    assert speed.update_s == pytest.approx((24 * 7.5e9 + 2 * 60e9) / 3350e9)
    assert speed.tokens_per_second == pytest.approx(8 * 2048 / speed.step_s)
    assert speed.mfu == pytest.approx(speed.tokens_per_second * 45e9 / 989e12)


def test_between_nodes_all_adapters_of_a_node_work_together():
    gpu = Gpu("X", 80 * GB, 1e15, 1e14, 3000 * GB, link=400 * GB, network=25 * GB)
    assert Cluster(gpu, 8, 8).bandwidth == LINK_SHARE * 400 * GB
    assert Cluster(gpu, 16, 8).bandwidth == LINK_SHARE * 200 * GB
    assert Cluster(gpu, 16, 16).bandwidth == LINK_SHARE * 400 * GB


@pytest.mark.parametrize(("strategy", "sent"), [(DDP, 8), (ZERO1, 4), (ZERO2, 10), (ZERO3, 24), (FSDP2, 32)])
def test_on_a_slow_network_a_step_waits_for_every_byte(strategy, sent):
    """Bytes per parameter of four micro-batches: ZeRO-2 reduces and ZeRO-3 and FSDP2 gather in each of them."""
    slow = Cluster(replace(GPUS["h100"], link=1e6), 8, 8)  # computing takes no time beside it
    speed = estimate(BIG, JOB, strategy, slow, checkpointing=False, micro_rows=2, share=0.4)
    assert speed.exposed_s == pytest.approx(sent * 7.5e9 * 7 / 8 / (LINK_SHARE * 1e6), rel=1e-3)


def test_on_a_fast_network_only_one_layers_transfer_is_seen():
    speed = estimate(BIG, JOB, FSDP2, NODE, checkpointing=False, micro_rows=8, share=0.4)
    assert speed.exposed_s == pytest.approx(8 * 7.5e9 * 7 / 8 / NODE.bandwidth / 36)


# Choices


def test_the_largest_micro_batch_fits_and_one_row_more_does_not():
    choice = next(
        c for c in choices(BIG, JOB, NODE, 2048, 0.4) if c.strategy is FSDP2 and c.chunked and c.checkpointing
    )
    rows = choice.largest_rows
    assert rows > JOB.rows

    def needs(number):
        return peak(BIG, JOB, FSDP2, 8, Step(number * 2048, checkpointing=True)).total

    assert needs(rows) <= usable(NODE) < needs(rows + 1)
    assert usable(NODE) == (1 - RESERVE) * NODE.gpu.memory


@pytest.mark.parametrize("rows", [1, 6, 7, 8, 48])
def test_the_rows_of_a_step_stay_the_same(rows):
    for choice in choices(BIG, replace(JOB, rows=rows), NODE, 2048, 0.4):
        assert choice.micro_rows * choice.accumulation == rows
        assert not choice.largest_rows or choice.micro_rows <= choice.largest_rows


def test_a_small_model_is_trained_the_simple_way():
    chosen, why = recommend(SMALL, SMALL_JOB, NODE, choices(SMALL, SMALL_JOB, NODE, 2048, 0.4))
    assert (chosen.strategy, chosen.checkpointing, chosen.chunked) == (DDP, False, True)
    assert why.startswith("DDP, because it is")


def test_a_big_one_is_sharded_and_the_reason_is_given():
    chosen, why = recommend(BIG, JOB, NODE, choices(BIG, JOB, NODE, 2048, 0.4))
    assert chosen.strategy is FSDP2
    assert "DDP does not fit into 76 GB" in why


def test_too_big_says_how_many_devices_would_do():
    pair = Cluster(GPUS["rtx4090"], 2, 2)
    chosen, why = recommend(BIG, JOB, pair, choices(BIG, JOB, pair, 2048, 0.4))
    assert chosen is None
    assert "nothing fits: FSDP2 with activation checkpointing" in why
    enough = int(why.split("FSDP2 on ")[1].split()[0])
    step = Step(2048, checkpointing=True)
    room = usable(pair)
    assert peak(BIG, JOB, FSDP2, enough, step).total <= room < peak(BIG, JOB, FSDP2, enough // 2, step).total


def test_too_long_says_that_more_devices_do_not_help():
    job = replace(JOB, row_tokens=2**20)
    _, why = recommend(BIG, job, NODE, choices(BIG, job, NODE, 2**20, 0.4))
    assert "shorten dataset_block_size" in why


def test_fp16_has_no_fsdp_and_one_device_one_strategy():
    half = choices(BIG, replace(JOB, precision="fp16"), NODE, 2048, 0.4)
    assert FSDP2 not in {choice.strategy for choice in half} and DDP in {choice.strategy for choice in half}
    assert {c.strategy for c in choices(SMALL, SMALL_JOB, Cluster(GPUS["h100"], 1, 1), 2048, 0.4)} == {ONE}
