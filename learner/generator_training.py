"""How the generator learns from the reward model: group-relative policy gradient, and imitation of refined winners.

For a card c, G creatives are sampled from pi and rewarded by one posterior draw of the reward model. What a choice
earns in slot s is a share k of its slot's marginal contribution (its own effect and its pairs with all other slots) and
the rest of the whole creative's reward, each against the mean of the group, on the scale of the group's spread (with a
floor):

    A_gs = [k (m_gs - mean_g m_gs) + (1 - k) (r_g - mean_g r_g)] / max(sd_g r_g, floor)
    loss = - mean_{c,g} sum_s A_gs log pi(e_gs | earlier)  - entropy H(pi)  + leash KL(pi || pi_published)
           - distillation mean_c log pi(w_c)

w_c is the winner: the best sample after coordinate ascent under the draw. Imitating it amortizes the search, and as
the samples get better so do the winners (expert iteration).

Shapes: B cards, G creatives a card, S slots, A candidates, F content numbers, C context columns, M draws.

References:
    Shao et al. (2024), DeepSeekMath (group-relative policy optimization). Williams (1992), REINFORCE. Anthony, Tian and
    Barber (2017), Thinking Fast and Slow with Deep Learning and Tree Search (expert iteration).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.generator import Cards, Generator
from learner.generator_cards import unseen
from learner.generator_rewards import Judge, Rewards


@dataclass(frozen=True)
class GeneratorReport:
    """What a training step saw."""

    reward: float
    """Mean creative logit of the samples on their draws."""
    winner_reward: float
    """Mean creative logit of the refined winners on their draws."""
    entropy: float
    """Mean entropy of a creative, in nats."""
    divergence: float
    """Mean KL divergence from the last published generator, in nats."""
    distillation: float
    """Mean negative log-probability of the refined winners, in nats."""
    gradient_norm: float


def advantages(rewarded: Rewards, floor: float, slot_credit: float) -> Tensor:
    """Return how much better each choice was than the group's, (B, G, S), in units of the group's spread."""
    marginal = rewarded.marginal - rewarded.marginal.mean(1, keepdim=True)
    total = rewarded.total - rewarded.total.mean(1, keepdim=True)
    scale = rewarded.total.std(1, correction=0).clamp(min=floor)
    credit = slot_credit * marginal + (1.0 - slot_credit) * total[..., None]
    return credit / scale[:, None, None]


def train_step(
    generator: Generator,
    cards: Cards,
    judge: Judge,
    published: Mapping[str, Tensor] | None,
    rng: torch.Generator,
) -> GeneratorReport:
    """Make one step on B cards.

    Args:
        generator: What is trained.
        cards: The cards; some are made into unseen ones first.
        judge: The reward model's draws.
        published: Weights of the last published generator, of the present sizes; None if there is none.
        rng: Decides draws, samples and what is unseen.
    """
    settings = generator.settings
    cards = unseen(cards, settings.unseen_share, rng)
    draw_B = torch.randint(judge.num_draws, (len(cards.product),), generator=rng).to(generator.device)
    judged = judge.cards(cards, draw_B)
    sampled_BGS = generator.sample(cards, settings.group_size, rng)
    rewarded = judged.rewards(sampled_BGS)
    best_B11 = rewarded.total.argmax(1)[:, None, None].expand(-1, 1, sampled_BGS.shape[2])
    winner_B1S = judged.refined(sampled_BGS.gather(1, best_B11), settings.sweeps)

    creatives_BGS = torch.cat([winner_B1S, sampled_BGS], 1)
    weights = {name: w.detach().requires_grad_() for name, w in generator.weights.items()}
    log_pi = generator.log_probabilities(cards, creatives_BGS, weights)
    has_B1S = cards.mask.any(-1)[:, None]
    chosen = log_pi.gather(-1, creatives_BGS[..., None])[..., 0] * has_B1S
    imitation = -chosen[:, 0].sum(-1).mean()
    gradient = (advantages(rewarded, settings.advantage_floor, settings.slot_credit) * chosen[:, 1:]).sum(-1).mean()
    entropy, divergence = _regularizers(generator, cards, creatives_BGS, log_pi, published)
    loss = (
        settings.distillation * imitation
        - settings.policy_gradient * gradient
        - settings.entropy * entropy
        + settings.leash * divergence
    )
    gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    norm = generator.optimizer.step({name: g for name, g in zip(weights, gradients, strict=True) if g is not None})
    return GeneratorReport(
        reward=float(rewarded.total.mean()),
        winner_reward=float(judged.rewards(winner_B1S).total.mean()),
        entropy=float(entropy.detach()),
        divergence=float(divergence.detach()),
        distillation=float(imitation.detach()),
        gradient_norm=norm,
    )


def _regularizers(
    generator: Generator, cards: Cards, chosen_BGS: Tensor, log_pi: Tensor, published: Mapping[str, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Return the mean entropy of a creative and its divergence from the published generator's, in nats."""
    # 0 log 0 = 0: what is masked has probability 0 and log-probability -inf.
    finite = log_pi.clamp(min=-30.0)
    pi = log_pi.exp() * cards.mask.any(-1)[:, None, :, None]
    entropy = -(pi * finite).sum((-1, -2)).mean()
    if published is None:
        return entropy, torch.zeros((), device=generator.device)
    with torch.no_grad():
        leash = generator.log_probabilities(cards, chosen_BGS, published).clamp(min=-30.0)
    return entropy, (pi * (finite - leash)).sum((-1, -2)).mean()
