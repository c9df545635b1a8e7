"""`llm-trainer plan`: what it reads from a run, and what it says."""

import json
from pathlib import Path

import pytest
import torch

from llm_trainer.cli.main import main
from llm_trainer.config.load import load_config
from llm_trainer.config.model import ModelConfig, VLMConfig
from llm_trainer.config.options import ON_THEIR_WAY, Fsdp
from llm_trainer.config.vision import VisionConfig
from llm_trainer.engine import dist
from llm_trainer.engine.fsdp import FsdpEngine
from llm_trainer.engine.torch import TorchEngine
from llm_trainer.models.build import build_model, flops_per_token, num_parameters
from llm_trainer.models.rewarding import reward_model
from llm_trainer.optim.optimizers import configure_optimizer, state_bytes
from llm_trainer.plan.describe import Sketch, describe, without_weights
from llm_trainer.plan.memory import ONE, Step, moments
from llm_trainer.plan.shapes import shape_of
from llm_trainer.train.budget import KEY
from llm_trainer.train.compiling import UNDECIDED
from llm_trainer.train.sizing import MOST
from llm_trainer.trainers.distill import CHUNK_ELEMENTS

MODEL = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
RUN = "{model_config: %s, file_dataset: none.jsonl, batch_size: 4, dataset_block_size: 64, %s: {%s}}"


@pytest.fixture
def run(tmp_path: Path):
    def write(section: str = "sft_config", options: str = "", model: str = json.dumps(MODEL)) -> str:
        path = tmp_path / f"{section}.yaml"
        path.write_text(RUN % (model, section, options))
        return str(path)

    return write


def job_of(path: str, name: str, *overrides: str):
    return describe(load_config(path, overrides), name)[1]


def said(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit:
        main(["plan", *arguments])
    assert exit.value.code == 0
    return capsys.readouterr().out


def planned(capsys, *arguments: str) -> dict:
    return json.loads(said(capsys, *arguments, "--json"))


def test_the_model_and_the_step_are_the_runs_own(run):
    shape, job = describe(load_config(run(options="gradient_accumulation_steps: 3")), "sft")
    model = build_model(ModelConfig(**MODEL))
    assert shape.num_parameters == num_parameters(model)
    assert (job.row_tokens, job.rows, job.rows_per_sample, job.precision) == (64, 12, 1, "bf16")
    assert job.flops_per_token == flops_per_token(model, 64)
    assert job.state_bytes == 8 * num_parameters(model)
    assert job_of(run(), "sft", "optim_config.optim_type=lion").state_bytes == 4 * num_parameters(model)
    assert job_of(run(), "sft", "run_config.precision=fp32").precision == "fp32"


def test_a_folder_of_a_model_is_read_without_its_weights(run, tmp_path):
    model = build_model(ModelConfig(**MODEL))
    model.config.save_pretrained(tmp_path / "model")
    shape, _ = describe(load_config(run(model=str(tmp_path / "model"))), "sft")
    assert shape.num_parameters == num_parameters(model)


SEEING = {
    "vision": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
}


def test_what_sees_is_counted_by_its_parts(run, tmp_path):
    """Weights and optimizer of what is trained, to the byte as the run's own model and optimizer have them."""
    from llm_trainer.models.freezing import freeze_parts
    from llm_trainer.models.vision import unreached

    model = build_model(VLMConfig(**MODEL, **{"vision": VisionConfig(**SEEING["vision"])}, image_token_id=3))
    model.save_pretrained(tmp_path / "model")
    for frozen in ([], ["vision"], ["language", "vision"]):
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        freeze_parts(model, frozen)
        for name in unreached(model, with_images=True):
            model.get_parameter(name).requires_grad_(False)
        learned = configure_optimizer(model, "adamw", lr=0.1)
        for described in (json.dumps(MODEL | SEEING), str(tmp_path / "model")):
            shape, job = describe(load_config(run(model=described), [f"freeze={json.dumps(frozen)}"]), "sft")
            assert shape.num_parameters == num_parameters(model) and job.state_bytes == state_bytes(learned)
            assert shape.trained_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
            assert (
                shape.language.number + shape.tower.tower.number + shape.tower.projector.number == shape.num_parameters
            )
    alone = describe(load_config(run(model=described), ["sft_config.freeze_llm_model=true"]), "sft")[0]
    assert alone.trained_parameters == shape.trained_parameters == shape.tower.projector.number


def test_what_rows_show_takes_memory_and_time(run, capsys):
    """A row has so many images: twice as many, twice as much, and both answers of a pair show the same."""
    seeing = json.dumps(MODEL | SEEING)
    path = run(model=seeing)
    one, two, none = (planned(capsys, path, "--images", number) for number in ("1", "2", "0"))
    assert (one["job"]["images"], one["job"]["patches"]) == (1, 16)
    assert two["job"]["image_flops"] == 2 * one["job"]["image_flops"] > 0 == none["job"]["image_flops"]
    images = [found["choices"][0]["memory"]["images"] for found in (none, one, two)]
    assert images[0] == 0 < images[1] < images[2]
    assert planned(capsys, path, "--patches", "64")["job"]["patches"] == 64
    assert "1 a row, of 16 patches each" in said(capsys, path)
    assert "tower 7,632 (7,600 trained), projector " in said(capsys, path)
    pairs = job_of(run("dpo_config", model=seeing), "dpo")
    assert pairs.patches == 16 and 0 < pairs.frozen_image_flops < pairs.image_flops
    blind = job_of(run("dpo_config", model=seeing), "dpo", 'freeze=["vision", "projector"]')
    assert blind.frozen_image_flops == 0  # the reference takes what the model has made


def test_pairs_and_references(run):
    dpo, parameters = job_of(run("dpo_config"), "dpo"), num_parameters(build_model(ModelConfig(**MODEL)))
    assert (dpo.rows_per_sample, dpo.sample_tokens) == (2, 128)
    assert dpo.frozen_bytes == 4 * parameters
    assert dpo.frozen_flops_per_token == pytest.approx(dpo.flops_per_token / 3)
    assert job_of(run("dpo_config", "loss_type: simpo"), "dpo").frozen_bytes == 0
    assert job_of(run("dpo_config", "precompute_ref_log_probs: true"), "dpo").frozen_bytes == 0
    kto = job_of(run("kto_config"), "kto")
    assert (kto.rows_per_sample, kto.frozen_bytes) == (1, 4 * parameters)
    assert kto.frozen_flops_per_token == pytest.approx(kto.flops_per_token)


def test_a_reward_model_has_no_vocabulary_head(run):
    reward, sft = job_of(run("reward_config"), "reward"), job_of(run(), "sft")
    assert not reward.has_head and reward.rows_per_sample == 2
    assert sft.flops_per_token - reward.flops_per_token == 6 * 32 * (100 - 1)  # one number instead
    shape, _ = describe(load_config(run("reward_config")), "reward")
    assert shape.num_parameters == num_parameters(build_model(ModelConfig(**MODEL))) + 32


def test_a_reference_that_moves_is_in_every_checkpoint(run, capsys):
    parameters = num_parameters(build_model(ModelConfig(**MODEL)))
    stays, moves = run("grpo_config", "loss_beta: 0.1"), "grpo_config.ref_sync_steps=8"
    assert planned(capsys, stays, moves)["job"]["moving_bytes"] == 4 * parameters
    alone = ("--gpus", "1")
    more = planned(capsys, stays, moves, *alone)["host_copy_bytes"] - planned(capsys, stays, *alone)["host_copy_bytes"]
    assert more == 4 * parameters
    in_each = f"disk  {4 * parameters / 1e9:.2g} GB more in each checkpoint: the reference that moves"
    assert in_each in said(capsys, stays, moves) and "reference that moves" not in said(capsys, stays)


def test_completions_are_rows_of_their_own_and_are_sampled_with_a_copy(run, capsys, tmp_path):
    options = "group_size: 6, gen_max_seq_len: 32, gradient_accumulation_steps: 2"
    job, parameters = job_of(run("grpo_config", options), "grpo"), num_parameters(build_model(ModelConfig(**MODEL)))
    assert (job.rows, job.completions, job.row_tokens, job.sample_tokens) == (4 * 2 * 6, 6, 64 + 32, 96)
    assert job.copy_bytes == 2 * parameters and job.frozen_bytes == 0
    assert job.cache_bytes == 48 * 96 * (2 * 2) * 2 * 32  # rows, tokens, keys and values of 16 bits, layers, width
    assert job.disk_bytes == 48 * 96 * (9 + 4)  # and advantages
    held = job_of(run("grpo_config", options + ", loss_beta: 0.1"), "grpo")
    assert held.frozen_bytes == 4 * parameters and held.disk_bytes == 48 * 96 * (9 + 8)
    larger = build_model(ModelConfig(**MODEL | {"num_hidden_layers": 3}))
    larger.config.save_pretrained(tmp_path / "reference")
    beside = options + f", loss_beta: 0.1, ref_model_checkpoint: {tmp_path}/reference"
    other = job_of(run("grpo_config", beside), "grpo")
    assert other.frozen_bytes == 4 * num_parameters(larger) and other.moving_bytes == 0
    assert job_of(run("grpo_config", "group_size: 1000"), "grpo").cache_bytes == 64 * (64 + 256) * 256
    assert job_of(run("grpo_config", options + ", grpo_steps: 2"), "grpo").disk_bytes == 48 * 96 * (
        9 + 8
    )  # older log-probs
    assert not job.samples_meanwhile
    assert job_of(run("grpo_config", "max_staleness: 1, grpo_steps: 2"), "grpo").samples_meanwhile
    elsewhere = job_of(run("grpo_config", "rollout_servers: ['http://a:1']"), "grpo")
    assert elsewhere.copy_bytes == elsewhere.cache_bytes == 0  # servers have both
    given = run("grpo_config", f"rollouts: {tmp_path}")
    assert job_of(given, "grpo").copy_bytes == job_of(given, "grpo").cache_bytes == 0  # nothing is sampled
    assert job_of(given, "grpo", "eval_dataset=held_out.jsonl").copy_bytes == job.copy_bytes  # but in evaluations
    assert job_of(given, "grpo").disk_bytes == 0 and "for each rollout" not in said(capsys, given)  # nor written
    assert job_of(given, "grpo", "eval_dataset=held_out.jsonl").disk_bytes > 0
    lines = said(capsys, run("grpo_config", options), "--gpus", "4", "--gpu", "a100-40")
    assert "sampler" in lines.splitlines()[5] and "disk  0.00024 GB for each rollout" in lines
    assert "batch_size=4 grpo_config.gradient_accumulation_steps=2" in lines.splitlines()[-1]
    judge = reward_model(build_model(ModelConfig(**MODEL | {"num_hidden_layers": 3})))
    judge.save_pretrained(tmp_path / "judge")
    judged = job_of(run("grpo_config", f"{options}, loss_beta: 0.1, reward_model_checkpoint: {tmp_path}/judge"), "grpo")
    assert judged.frozen_bytes == held.frozen_bytes + 4 * num_parameters(judge)
    assert judged.frozen_flops_per_token > held.frozen_flops_per_token
    compared = job_of(run("remax_config", "gen_max_seq_len: 32"), "remax")  # with the greedy completion of each prompt
    assert (compared.rows, compared.cache_bytes, compared.disk_bytes) == (4, 8 * 96 * 256, 8 * 96 * (9 + 4))


def test_ppo_trains_a_critic_beside_the_policy(run, tmp_path):
    parameters = num_parameters(build_model(ModelConfig(**MODEL)))
    shape, job = describe(load_config(run("ppo_config", "gen_max_seq_len: 32")), "ppo")
    assert shape.num_parameters == 2 * parameters + 32 and shape.num_layers == 4
    assert job.state_bytes == 8 * shape.num_parameters and job.frozen_bytes == 4 * parameters
    assert (job.rows, job.row_tokens, job.copy_bytes) == (4, 96, 2 * parameters)  # of the policy alone
    judge = reward_model(build_model(ModelConfig(**MODEL | {"num_hidden_layers": 3})))
    judge.save_pretrained(tmp_path / "judge")
    options = f"value_model_checkpoint: {tmp_path}/judge, kl_beta: 0.0"
    shape, job = describe(load_config(run("ppo_config", options)), "ppo")
    assert shape.num_layers == 2 + 3 and job.frozen_bytes == 0
    shape, job = describe(load_config(run("ppo_config", "critic_on_policy: true")), "ppo")
    assert shape.num_parameters == parameters


@pytest.mark.parametrize("section", ["sft_config", "dpo_config", "ppo_config"])
def test_adapters_have_the_gradients_and_the_optimizer(run, section, capsys):
    pytest.importorskip("peft", reason="needs peft")
    name = section.removesuffix("_config")
    path, adapters = run(section), "adapter_config.rank=2"
    shape, job = describe(load_config(path, [adapters]), name)
    model = build_model(ModelConfig(**MODEL))
    new = sum(2 * sum(m.weight.shape) for n, m in model.named_modules() if n.endswith("_proj"))
    assert (shape.num_parameters, shape.trained_parameters) == (num_parameters(model) + new, new)
    assert job.state_bytes == 8 * new and job.frozen_bytes == 0  # its reference is itself, and its critic too
    products = 4 * num_parameters(model) + 6 * new  # a frozen weight has two, a trained one three, of two operations
    assert job.flops_per_token == products + 12 * 2 * 32 * job.row_tokens
    found = [*moments(shape, job, ONE, 1, Step(64))]
    assert max(moment.gradients for moment in found) == 4 * new
    assert {moment.optimizer for moment in found} == {8 * new}
    assert f"({new:,} trained)" in said(capsys, path, adapters, "--gpus", "1")


def test_a_critic_is_trained_beside_the_policy(run, tmp_path):
    config = load_config(run())
    model = without_weights(config)
    sketch = Sketch(None, model, 64, 4, "bf16")
    own = sketch.critic()["critic"]
    assert num_parameters(own) == num_parameters(model) + 32
    larger = build_model(ModelConfig(**MODEL | {"num_hidden_layers": 6}))
    larger.config.save_pretrained(tmp_path / "critic")
    both = shape_of(model).beside(shape_of(sketch.critic(str(tmp_path / "critic"))["critic"]))
    assert both.num_layers == 2 + 6
    assert both.num_parameters == num_parameters(model) + num_parameters(larger) + 32


def test_a_teacher_is_held_in_16_bits(run, tmp_path):
    teacher = build_model(ModelConfig(**MODEL | {"num_hidden_layers": 4}))
    teacher.config.save_pretrained(tmp_path / "teacher")
    job = job_of(run(options=f"kd_config: {{teacher_model: {tmp_path}/teacher}}"), "sft")
    assert job.frozen_bytes == 2 * num_parameters(teacher)
    assert job.frozen_flops_per_token == pytest.approx(flops_per_token(teacher, 64) / 3)
    assert job.teacher_chunk == CHUNK_ELEMENTS
    assert job_of(run(), "sft").teacher_chunk == 0


def test_the_table_has_every_way_and_marks_the_one_to_take(run, capsys):
    rows_as_given = ("batch_size=4096", "data_loader_config.micro_batch_tokens=null")
    lines = said(capsys, run(), *rows_as_given, "--gpus", "16", "--gpu", "a100-40", "--tokens", "1e9").splitlines()
    rows = [line.split() for line in lines if line.lstrip("* ").startswith(("DDP", "ZeRO", "FSDP2"))]
    assert len(rows) == 5 * 2 * 2
    assert [row[:4] for row in rows if row[0] == "*"] == [["*", "DDP", "no", "chunked"]]
    assert "16 x A100: 37.7 GB each (10% are left free), 312 TFLOP/s at 40%, 160 GB/s between them" in "\n".join(lines)
    assert lines[-2].startswith("take  DDP, because ")
    assert lines[-1].split()[0] == "run_config.engine=torch"
    assert "batch_size=4096 sft_config.gradient_accumulation_steps=1" in lines[-1]
    assert not any("frozen" in line for line in lines)  # a column that would be 0 everywhere


def test_days_come_from_the_tokens_or_from_the_steps(run, capsys):
    def first(*more: str) -> dict:
        return planned(capsys, run(), "--gpus", "2", "--gpu", "h100", *more)["choices"][0]

    assert "days" not in first()
    told = first("--tokens", "1e9")
    assert told["days"] == pytest.approx(1e9 / told["speed"]["tokens_per_second"] / 86400)
    steps = first("run_config.max_steps=1000")
    assert steps["days"] == pytest.approx(1000 * steps["speed"]["step_s"] / 86400)


def test_the_copy_of_a_checkpoint_in_host_memory_is_what_engines_take(run, capsys, monkeypatch):
    """Of two machines the first one holds it; of sharded optimizers each process its share."""
    cluster = ("batch_size=4096", "--gpus", "16", "--gpu", "a100-40")
    model = build_model(ModelConfig(**MODEL))
    weights, states = 4 * num_parameters(model), 8 * num_parameters(model)
    ddp = planned(capsys, run(), *cluster)
    assert ddp["recommendation"]["choice"]["strategy"] == "DDP"
    assert ddp["host_copy_bytes"] == TorchEngine(torch.device("cpu"), "fp32").bytes_to_copy(weights, states)
    assert planned(capsys, run(), "run_config.save_in_background=false", *cluster)["host_copy_bytes"] == 0
    shape = {"vocab_size": 151936, "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32}
    large = run(model=json.dumps(shape | {"max_position_embeddings": 4096}))
    sharded = planned(capsys, large, "dataset_block_size=4096", "batch_size=16", "--gpus", "16", "--gpu", "h200")
    assert sharded["recommendation"]["choice"]["strategy"] == "FSDP2"
    engine = FsdpEngine(torch.device("cpu"), "fp32", Fsdp())
    monkeypatch.setattr(dist, "world_size", lambda: 16)
    of_each = engine.bytes_to_copy(4 * sharded["model"]["num_parameters"], int(sharded["job"]["state_bytes"]))
    assert sharded["host_copy_bytes"] == 8 * of_each
    assert "host  " in said(capsys, run(), *cluster)


def test_what_enters_recomputed_layers_may_wait_on_the_host(run, capsys):
    shape = json.dumps({"vocab_size": 5000, "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32})
    path = run(model=shape)
    plain, offloaded = "run_config.activation_offload=false", "run_config.activation_offload=true"
    big = ("batch_size=1", "dataset_block_size=65536", "data_loader_config.micro_batch_tokens=null")
    kept, rows = [], []
    for how in (plain, offloaded):
        model, job = describe(load_config(path, [*big, how]), "sft")
        _, in_layers, *_ = moments(model, job, ONE, 1, Step(65536, checkpointing=True))
        kept.append(in_layers.activations)
        answer = planned(capsys, path, *big, how, "--gpus", "1")
        rows.append(answer["recommendation"]["choice"]["largest_rows"])
    assert kept[0] - kept[1] == (24 - ON_THEIR_WAY) * 4 * 2048 * 65536
    assert rows[0] < rows[1]
    text, host = said(capsys, path, *big, offloaded, "--gpus", "1"), 24 * 4 * 2048 * 65536 / 1e9
    assert f"host  {host:.2g} GB of each machine's host memory, for what enters the layers" in text
    assert "yes, host" in text


def test_what_is_left_open_is_what_the_run_would_find(run, capsys):
    """A step of 262,144 tokens is cut by the largest size that helps, or by what fits; words of the user stay."""
    cluster = ("batch_size=4096", "--gpus", "16", "--gpu", "a100-40")
    told = planned(capsys, run(), *cluster)
    budget = told["automatic"]["micro-batches"]
    assert budget == {"value": f"{MOST:,} tokens", "why": "more gains nothing", "key": KEY}
    assert told["recommendation"]["choice"]["micro_rows"] * 64 == MOST
    assert told["recommendation"]["choice"]["accumulation"] == 4
    assert told["automatic"]["precision"]["value"] == "bf16"
    assert told["automatic"]["attention"]["value"] == "sdpa"
    assert told["automatic"]["layout"]["value"] == "flat"
    shown = said(capsys, run(), *cluster)
    assert (
        "auto  micro-batches  65,536 tokens          more gains nothing [data_loader_config.micro_batch_tokens=null]"
        in shown
    )
    assert "batch_size=4096 sft_config.gradient_accumulation_steps=1" in shown.splitlines()[-1]  # the user's own

    shape = {"vocab_size": 151936, "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32}
    large = run(model=json.dumps(shape | {"max_position_embeddings": 4096}))
    tight = planned(capsys, large, "dataset_block_size=4096", "batch_size=64", "--gpus", "16", "--gpu", "h200")
    assert "what fits into" in tight["automatic"]["micro-batches"]["why"]
    for choice in tight["choices"]:
        assert choice["total_bytes"] < 0.9 * tight["cluster"]["gpu"]["memory"] or choice["micro_tokens"] == 4096

    given = planned(
        capsys,
        run(),
        *(
            told["automatic"][name]["key"].replace(": ", "=")
            for name in ("precision", "layout", "attention", "optimizer", "compile")
        ),
        *cluster,
    )
    assert list(given["automatic"]) == ["micro-batches"]
    given = planned(capsys, run("pretrain_config"), "data_loader_config.micro_batch_tokens=2048", *cluster)
    assert list(given["automatic"]) == [
        "precision",
        "attention",
        "optimizer",
        "compile",
    ]  # documents of a text are packed in any case
    assert given["recommendation"]["choice"]["micro_tokens"] == 2048


def test_kernels_and_compiling_are_what_the_run_would_choose(run, capsys):
    def automatic(*arguments: str) -> dict:
        return planned(capsys, run(), *arguments)["automatic"]

    found = automatic("--gpus", "1", "optim_config.optim_type=muon")
    assert found["optimizer"]["value"] == "Muon, fused" and found["compile"] == UNDECIDED.facts
    assert "optimizer" not in automatic("optim_config.optim_type=lion")
    assert "compile" not in automatic("--gpus", "1", "--tokens", "1e6")  # seconds
    long = automatic("--gpus", "1", "--tokens", "1e12")
    assert long["compile"]["value"] == "on" and "90 s longer" in long["compile"]["why"]


def test_json_adds_up(run, capsys):
    told = planned(
        capsys, run("dpo_config"), "batch_size=2048", "--gpus", "4", "--gpu", "v100", "--network", "3", "--mfu", "0.3"
    )
    assert told["job"]["precision"] == "fp16"  # a V100 has no bf16
    assert told["cluster"]["gpu"]["network"] == 3e9
    for choice in told["choices"]:
        assert choice["total_bytes"] == pytest.approx(sum(choice["memory"].values()))
    assert told["recommendation"]["choice"]["strategy"] == "DDP"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "abacus"], "--gpu: got 'abacus', expected one of b200"),
        (["optim_config.optim_type=magic"], "optim_config.optim_type: got 'magic'"),
        (["model_config=./nowhere"], "model_config: ./nowhere: no such folder or file; expected a language model"),
        (["model_config.vocab_size=null"], "model_config.vocab_size: none given"),
    ],
)
def test_mistakes_are_one_message(run, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        main(["plan", run(), *arguments])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "gpus", "engine"), [("b200", "2", "torch"), ("v100", "64", "deepspeed")])
def test_what_to_take_can_be_handed_to_the_run(run, capsys, kind, gpus, engine):
    """Seven billion parameters: DDP where the GPUs are large; where they have neither room nor bf16, ZeRO in fp16."""
    big = {"vocab_size": 100, "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32}
    path = run(model=json.dumps(big))
    last = said(
        capsys, path, "batch_size=256", "optim_config.optim_type=sgd", "--gpus", gpus, "--gpu", kind
    ).splitlines()[-1]
    config = load_config(path, last.split())
    assert config.run_config.engine == engine
    assert config.batch_size * config.sft_config.gradient_accumulation_steps == 256
    if engine == "deepspeed":
        assert config.ds_config.fp16_config.enabled and config.ds_config.zero_config.stage == 1
