"""The policy's gradient by enumeration, advantages and figures by formulas written out, tempered scores by autograd."""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from client.objectives.rollouts import answer_figures, leave_one_out, policy_loss
from client.objectives.tokens import token_losses
from offsite.text.batches import IGNORED, Example, collate

SEQUENCES = list(itertools.product(range(3), repeat=2))
"""Every answer of two tokens in a vocabulary of three."""


class Bigrams(nn.Module):
    """What comes next by the token before it alone; token 3 stands before every answer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        drawn = torch.randn((4, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.scores = nn.Parameter(drawn)

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=self.scores[input_ids])

    def logs(self, temperature):
        """Log-probabilities of all answers, (9,)."""
        by_token = (self.scores / temperature).log_softmax(-1)
        return torch.stack([by_token[3, first] + by_token[first, second] for first, second in SEQUENCES])


def rows_of(sequences):
    return [Example([3, *one], [IGNORED, *one]) for one in sequences]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_gradient_is_that_of_the_expected_reward_under_the_leash(temperature):
    """Over every pair of samples, each as likely as it is, the estimate is the gradient itself."""
    policy, start, beta = Bigrams(0), Bigrams(1), 0.3
    given = torch.rand(9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    logs, before = policy.logs(temperature), start.logs(temperature).detach()
    expected = (logs.exp() * (given - beta * (logs - before))).sum()
    wanted = torch.autograd.grad(expected, policy.scores)[0]

    leashed = given - beta * (logs.detach() - before)
    pairs = list(itertools.product(range(9), repeat=2))
    both = torch.tensor(pairs)
    chances = logs.detach().exp()[both].prod(1, keepdim=True)
    batch = collate(rows_of([SEQUENCES[one] for pair in pairs for one in pair]), pad_id=0)
    batch |= {"advantages": (leave_one_out(leashed[both]) * chances).flatten(), "rewards": leashed[both].flatten()}
    total, count = policy_loss(policy, batch, temperature=temperature)
    assert count == len(pairs) * 2
    assert total.item() == pytest.approx(-leashed[both].sum().item())
    found = torch.autograd.grad(total / 2, policy.scores)[0]
    torch.testing.assert_close(-found, wanted, rtol=1e-9, atol=1e-12)


def test_an_advantage_is_over_the_mean_of_the_others():
    rewards = torch.tensor([[1.0, 0.0, 2.0, 5.0], [3.0, 3.0, 3.0, 3.0]])
    wanted = [one - (8 - one) / 3 for one in (1, 0, 2, 5)]
    torch.testing.assert_close(leave_one_out(rewards), torch.tensor([wanted, [0.0] * 4]))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_and_entropies_are_those_of_the_tempered_model(full_llama, temperature):
    rows = [Example(ids, [IGNORED] * 3 + ids[3:]) for ids in ([5, 9, 30, 7], [8, 200, 31, 40, 41, 2], [9, 3, 4, 6, 7])]
    logs, entropies = answer_figures(full_llama, rows, pad_id=0, temperature=temperature, precision="fp32")
    for row, log, entropy in zip(rows, logs, entropies, strict=True):
        ids = torch.tensor([row.input_ids])
        with torch.no_grad():
            wanted = (full_llama(input_ids=ids).logits[0].double() / temperature).log_softmax(-1)[2:-1]
        assert float(log) == pytest.approx(float(wanted.gather(1, ids[0, 3:, None]).sum()), rel=1e-4)
        assert float(entropy) == pytest.approx(float(-(wanted.exp() * wanted).sum()), rel=1e-4)


def test_the_gradient_of_tempered_scores_is_autograds(full_llama):
    model = copy.deepcopy(full_llama)
    batch = collate([Example([5, 9, 30, 7, 2], [IGNORED, IGNORED, 30, 7, 2])], pad_id=0)
    norm = model.model.layers[3].input_layernorm.weight
    losses, _ = token_losses(model, batch, temperature=0.6)
    found = torch.autograd.grad(losses.sum(), norm)[0]
    logs = (model(input_ids=batch["input_ids"]).logits[0, 1:-1] / 0.6).log_softmax(-1)
    wanted = torch.autograd.grad(-logs.gather(1, batch["labels"][0, 2:, None]).sum(), norm)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
