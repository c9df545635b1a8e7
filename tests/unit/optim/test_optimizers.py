"""What the reference trajectories do not say: grouping, defaults, errors, states, and the composite Muon."""

import copy
import math

import pytest
import torch
from torch import nn

from llm_trainer import optimizer
from llm_trainer.assemble import make_optimizer
from llm_trainer.optim import optimizers as optim
from llm_trainer.optim.optimizers import (
    OPTIMIZERS,
    configure_optimizer,
    create_optimizer,
    get_parameter_groups,
    recipe_of,
    state_bytes,
)
from llm_trainer.train_configs import TrainConfig
from optimizers_here import HERE, is_here


class Tiny(nn.Module):
    """Every kind of parameter once: a table, a hidden matrix, a bias, a norm, a head (tied or not), a frozen matrix."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.hidden = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.frozen = nn.Linear(4, 4, bias=False).requires_grad_(False)
        self.head = nn.Linear(4, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.frozen(self.hidden(self.embed(ids)))))


def take_step(model: nn.Module, stepper: torch.optim.Optimizer, seed: int = 0) -> None:
    ids = torch.randint(0, 11, (8,), generator=torch.Generator().manual_seed(seed))
    stepper.zero_grad()
    nn.functional.cross_entropy(model(ids), ids).backward()
    stepper.step()


def names_of(model: nn.Module, params: list[torch.Tensor]) -> set[str]:
    return {name for name, param in model.named_parameters() if any(param is other for other in params)}


@pytest.mark.parametrize("tied", [False, True])
def test_matrices_decay_and_vectors_do_not(tied: bool) -> None:
    model = Tiny(tied)
    decaying, plain = get_parameter_groups(model, 0.3)
    assert (decaying["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert names_of(model, decaying["params"]) == {"embed.weight", "hidden.weight"} | (
        set() if tied else {"head.weight"}
    )
    assert names_of(model, plain["params"]) == {"hidden.bias", "norm.weight", "norm.bias"}
    trainable = [param for param in model.parameters() if param.requires_grad]
    assert len(decaying["params"]) + len(plain["params"]) == len(trainable)


def test_names_can_be_exempt_and_empty_groups_are_left_out() -> None:
    model = Tiny()
    decaying, _ = get_parameter_groups(model, 0.3, no_decay=("embed", "head"))
    assert names_of(model, decaying["params"]) == {"hidden.weight"}
    assert len(get_parameter_groups(nn.Linear(2, 2, bias=False), 0.3)) == 1


def test_group_decay_reaches_the_update() -> None:
    model = Tiny()
    stepper = configure_optimizer(model=model, optimizer_type="sgd", lr=0.5, weight_decay=0.1)
    before = {name: param.clone() for name, param in model.named_parameters()}
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    stepper.step()
    torch.testing.assert_close(model.hidden.weight, before["hidden.weight"] * 0.95)
    for name in ("hidden.bias", "norm.weight", "frozen.weight"):
        assert torch.equal(model.get_parameter(name), before[name])


def test_defaults_belong_to_the_optimizer() -> None:
    params = [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))]
    adamw = create_optimizer(params)
    assert type(adamw) is torch.optim.AdamW
    assert adamw.defaults["fused"] is True
    assert (adamw.defaults["betas"], adamw.defaults["weight_decay"]) == ((0.9, 0.999), 0.01)
    assert create_optimizer(params, fused=False).defaults["fused"] is False
    assert create_optimizer([p.detach().to("meta") for p in params]).defaults["fused"] is False
    assert type(create_optimizer(params, "ADAM")) is torch.optim.Adam
    assert create_optimizer(params, "lion").defaults["betas"] == (0.9, 0.99)
    assert create_optimizer(params, "lion", betas=(0.8, 0.7)).defaults["betas"] == (0.8, 0.7)
    assert [create_optimizer(params, name, eps=None).defaults["weight_decay"] for name in ("lion", "sgd")] == [
        0.1,
        0.01,
    ]
    muon = create_optimizer(params, "muon")
    assert [group.get("momentum") for group in muon.param_groups] == [0.95, None]


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        (
            {"optimizer_type": "adamx"},
            "unknown optimizer 'adamx'; known optimizers: adafactor, adam, adamw, adamw8bit, adamw8bit_fsdp, lion, lion8bit, "
            "muon, sgd",
        ),
        ({"lr": -1.0}, "lr is -1.0, expected a number >= 0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"eps": -1e-8}, "eps is"),
        ({"momentum": -0.5, "optimizer_type": "sgd"}, "momentum is -0.5"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\), expected two numbers in \[0, 1\)"),
        ({"nesterov": True}, "'adamw' has no option nesterov; its options: amsgrad"),
        ({"params": []}, "is every parameter of the model frozen"),
    ],
)
def test_errors_say_what_was_found(hyper: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_optimizer(**({"params": [nn.Parameter(torch.ones(1))]} | hyper))


@pytest.mark.parametrize("name", HERE)
def test_every_optimizer_learns_and_resumes_exactly(name: str) -> None:
    torch.manual_seed(0)
    model = Tiny()
    stepper = configure_optimizer(model, name, lr=0.02)
    ids = torch.arange(11)
    start = nn.functional.cross_entropy(model(ids), ids).item()
    for seed in range(40):
        take_step(model, stepper, seed)
    assert nn.functional.cross_entropy(model(ids), ids).item() < 0.9 * start
    other = copy.deepcopy(model)
    resumed = configure_optimizer(other, name, lr=0.5)
    resumed.load_state_dict(copy.deepcopy(stepper.state_dict()))
    for seed in range(3):
        take_step(model, stepper, seed)
        take_step(other, resumed, seed)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_muon_takes_hidden_matrices_and_leaves_tables_to_adamw() -> None:
    torch.manual_seed(0)
    model = Tiny()
    halves = [copy.deepcopy(model) for _ in range(2)]
    stepper = configure_optimizer(model, "muon", lr=0.02, weight_decay=0.1)
    muon = [param for group in stepper.param_groups if group["use_muon"] for param in group["params"]]
    assert names_of(model, muon) == {"hidden.weight"}
    theirs = torch.optim.Muon(
        [halves[0].hidden.weight], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw", momentum=0.95
    )
    adamw = torch.optim.AdamW(get_parameter_groups(halves[1], 0.1), lr=0.02)
    for seed in range(3):
        take_step(model, stepper, seed)
        for half, half_stepper in zip(halves, (theirs, adamw), strict=True):
            for ours, copied in zip(model.parameters(), half.parameters(), strict=True):
                copied.grad = None if ours.grad is None else ours.grad.clone()
            half_stepper.step()
    torch.testing.assert_close(model.hidden.weight, halves[0].hidden.weight, rtol=0, atol=0)
    torch.testing.assert_close(model.head.weight, halves[1].head.weight, rtol=0, atol=1e-7)
    torch.testing.assert_close(model.norm.bias, halves[1].norm.bias, rtol=0, atol=1e-7)


def test_a_parameter_without_gradient_stays() -> None:
    model = Tiny()
    for name in filter(is_here, OPTIMIZERS):
        before = model.head.weight.clone()
        configure_optimizer(model, name).step()
        assert torch.equal(model.head.weight, before)


def test_closure_is_evaluated_with_gradients() -> None:
    weight = nn.Parameter(torch.ones(2, 2))

    def closure() -> float:
        loss = weight.square().sum()
        weight.grad = torch.autograd.grad(loss, weight)[0]
        return loss.item()

    assert create_optimizer([weight], "lion", lr=0.1, weight_decay=0.0).step(closure) == 4.0
    assert create_optimizer([weight], "muon", lr=0.1).step(closure) == pytest.approx(4 * 0.9**2)
    assert weight.max() < 0.9


def test_a_lion_of_a_configuration_has_its_own_betas_and_decay() -> None:
    described = TrainConfig(model_config="m", file_dataset="a", optim_config={"optim_type": "lion", "betas": None})
    lion = make_optimizer(described, Tiny())
    assert [(group["betas"], group["weight_decay"]) for group in lion.param_groups] == [
        ((0.9, 0.99), 0.1),
        ((0.9, 0.99), 0.0),
    ]
    described.optim_config.weight_decay = 0.3
    assert make_optimizer(described, Tiny()).param_groups[0]["weight_decay"] == 0.3
    adamw = configure_optimizer(Tiny(), weight_decay=None)
    assert adamw.param_groups[0]["weight_decay"] == configure_optimizer(Tiny()).param_groups[0]["weight_decay"] == 0.01


def test_the_public_import_path_is_the_same_object() -> None:
    assert all(vars(optimizer)[name] is vars(optim)[name] for name in optimizer.__all__)


@pytest.mark.parametrize("name", HERE)
def test_a_recipe_says_how_much_state_its_optimizer_keeps(name: str) -> None:
    model = Tiny()
    stepper = configure_optimizer(model, name, lr=0.02)
    expected = state_bytes(stepper)  # before there is any
    take_step(model, stepper, seed=0)
    states = []
    for state in stepper.state.values():
        states += [value for key, value in state.items() if torch.is_tensor(value) and not key.startswith("qmap")]
    assert expected == sum(value.numel() * value.element_size() for value in states if value.numel() > 1)
    assert recipe_of(stepper) is OPTIMIZERS[name]


def test_state_of_options_and_of_strangers() -> None:
    weight = nn.Parameter(torch.ones(4, 4))
    assert state_bytes(create_optimizer([weight], "adamw", amsgrad=True)) == 3 * 64
    assert state_bytes(create_optimizer([weight], "sgd", momentum=0.9)) == 64
    assert state_bytes(torch.optim.Muon([weight])) == 64
    assert recipe_of(torch.optim.RMSprop([weight])) is None and state_bytes(torch.optim.RMSprop([weight])) == 64
    assert state_bytes(torch.optim.Adamax([weight])) == 2 * 64


def test_lion_looks_ahead_with_its_first_beta_and_remembers_with_its_second() -> None:
    """Chen et al. 2023, algorithm 2, by hand: after a gradient of 1 one of -0.5 turns the step, as 0.9 m is but 0.009."""
    weight = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    lion = create_optimizer([weight], "lion", lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    momentum, expected = 0.0, 1.0
    for gradient in (1.0, -0.5, 0.25):
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        lion.step()
        direction = math.copysign(1.0, 0.9 * momentum + 0.1 * gradient)
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * direction
        momentum = 0.99 * momentum + 0.01 * gradient
        assert weight.item() == pytest.approx(expected, rel=1e-12)
        assert lion.state[weight]["momentum"].item() == pytest.approx(momentum, rel=1e-12)
