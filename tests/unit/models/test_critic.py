"""What a policy's critic may be, and what it says of the tokens before a label."""

import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm_trainer.models.critic import ActorCritic, critic_of
from llm_trainer.models.rewarding import reward_model
from llm_trainer.models.scored import scored

sys.path.insert(0, str(Path(__file__).parents[2] / "invariance"))
from table import experts_model, tiny_model

IDS = torch.tensor([[5, 6, 7, 8, 9]])
LABELS = torch.tensor([[-100, -100, 7, -100, 9]])


class Own(nn.Module):
    """The value of a token is its id, in tenths."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.1))
        self.dims = dims

    def forward(self, input_ids: Tensor) -> Tensor:
        values = input_ids * self.scale
        return values[..., None].expand(*values.shape, self.dims) if self.dims else values


@pytest.mark.parametrize("dims", [0, 1])
def test_a_value_is_of_what_stands_before_the_label(dims: int) -> None:
    model = ActorCritic(scored(tiny_model()), Own(dims))
    acted = model(input_ids=IDS, labels=LABELS, attention_mask=torch.ones_like(IDS))
    torch.testing.assert_close(acted.values, torch.tensor([[0, 0, 0.6, 0, 0.8]]))


def test_on_the_policys_body_it_says_what_it_says_by_itself() -> None:
    policy = tiny_model()
    critic = critic_of(policy, on_policy=True)
    together = ActorCritic(scored(policy), critic)
    assert together.shares_body
    acted = together(input_ids=IDS, labels=LABELS, attention_mask=torch.ones_like(IDS))
    alone = critic.score(policy.base_model(IDS).last_hidden_state)[0, :, 0]
    torch.testing.assert_close(acted.values.detach(), torch.where(LABELS > 0, F.pad(alone.detach(), (1, 0))[:-1], 0.0))
    acted.values.sum().backward()
    assert policy.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0
    policy.zero_grad()
    together(input_ids=IDS, labels=LABELS, detach_body=True).values.sum().backward()
    assert policy.model.layers[0].mlp.up_proj.weight.grad is None and critic.score.weight.grad is not None


def test_where_a_critic_comes_from() -> None:
    policy = tiny_model()
    copied = critic_of(policy)
    assert torch.equal(copied.model.embed_tokens.weight, policy.model.embed_tokens.weight)
    assert set(copied.parameters()).isdisjoint(policy.parameters())
    rewards = reward_model(tiny_model(seed=1))
    assert critic_of(policy, rewards) is rewards
    other = tiny_model(seed=2)
    of_language_model = critic_of(policy, other)
    assert of_language_model.base_model is other.base_model and of_language_model.score.out_features == 1
    own = Own(0)
    assert critic_of(policy, own) is own


def test_adapters_are_shared() -> None:
    """A copy of all weights would cost more than the adapters save."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, about transformers
        policy = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    critic = critic_of(policy)
    trained = [name for name, parameter in critic.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 + 2 and trained[-2:] == ["score.weight", "score.bias"]
    assert ActorCritic(scored(policy), critic).shares_body


def test_a_family_without_classifiers_is_named() -> None:
    with pytest.raises(
        ValueError, match="no classifier on the body of a model of kind glm4_moe, so that no reward model"
    ):
        critic_of(experts_model(architecture="glm4_moe"))


def test_what_is_no_critic() -> None:
    from llm_trainer.config.model import ModelConfig
    from llm_trainer.models.build import build_model

    policy = tiny_model()
    shape = ModelConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ValueError, match="the policy itself.*critic_on_policy=True"):
        critic_of(policy, policy)
    with pytest.raises(ValueError, match="value_model knows 300 tokens, the policy 512"):
        critic_of(policy, build_model(shape))
    with pytest.raises(ValueError, match="critic_on_policy: value_model is a critic with a body of its own"):
        critic_of(policy, Own(0), on_policy=True)
    with pytest.raises(ValueError, match="value_model: none given, and a Own is no transformers model"):
        critic_of(Own(0))
    with pytest.raises(ValueError, match=r"Own returned the shape \(1, 5, 2\).*one number for each token"):
        ActorCritic(scored(policy), Own(2))(input_ids=IDS, labels=LABELS)
