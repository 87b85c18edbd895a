"""How the generator learns from the reward model: group-relative policy gradient, and imitation of refined winners.

For a card c, G creatives are sampled from pi and rewarded by one posterior draw of the reward model. What a choice
earns in slot s is half its slot's marginal contribution (its own effect and its pairs with all other slots) and half
the whole creative's reward, each against the mean of the group, on the scale of the group's spread (with a floor):

    A_gs = 1/2 [(m_gs - mean_g m_gs) + (r_g - mean_g r_g)] / max(sd_g r_g, floor)
    loss = - mean_{c,g} sum_s A_gs log pi(e_gs | earlier)  - entropy H(pi)  + leash KL(pi || pi_published)
           - distillation mean_w log pi(w)

w are refined winners of the draws, that is the served policy itself: imitating them amortizes its search.

Shapes: B cards, G creatives a card, W winners a card, S slots, A candidates, F content numbers, C context columns, M
draws.

References:
    Shao et al. (2024), DeepSeekMath (group-relative policy optimization). Williams (1992), REINFORCE.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.design import slot_pairs
from learner.generator import Cards, Generator


@dataclass(frozen=True)
class Rewards:
    """What sampled creatives earn under a draw of the reward model, in logits."""

    total: Tensor
    """(B, G): creative logit."""
    marginal: Tensor
    """(B, G, S): what the choice in a slot contributes, its pairs with all other slots included."""


@dataclass(frozen=True)
class GeneratorReport:
    """What a training step saw."""

    reward: float
    """Mean creative logit of the samples on their draws."""
    entropy: float
    """Mean entropy of a creative, in nats."""
    divergence: float
    """Mean KL divergence from the last published generator, in nats."""
    distillation: float
    """Mean negative log-probability of the refined winners, in nats."""
    gradient_norm: float


def rewards(cards: Cards, chosen_BGS: Tensor, effects: Mapping[str, Tensor], draw_B: Tensor) -> Rewards:
    """Reward creatives with one draw of the reward model for each card.

    Args:
        cards: The cards.
        chosen_BGS: Places of the chosen candidates.
        effects: The core's effects under M draws, as in a snapshot without the prefix `draws.`, and `element`
            (E, 1 + C), the effects of single elements under the posterior mean.
        draw_B: Which draw judges each card.
    """
    weight_BSF = effects["content"][draw_B] + torch.einsum(
        "bsfc,bc->bsf", effects["content_context"][draw_B], cards.context
    )
    element_BSAC = torch.nn.functional.pad(effects["element"], (0, 0, 0, 1))[cards.candidate]
    own_BSA = element_BSAC[..., 0] + torch.einsum("bsac,bc->bsa", element_BSAC[..., 1:], cards.context)
    main_BSA = (torch.einsum("bsaf,bsf->bsa", cards.content, weight_BSF) + own_BSA) * cards.mask
    main_BGS = main_BSA.gather(2, chosen_BGS.transpose(1, 2)).transpose(1, 2)
    index = chosen_BGS.transpose(1, 2)[..., None].expand(-1, -1, -1, cards.content.shape[-1])
    content_BGSF = (cards.content * cards.mask[..., None]).gather(2, index).transpose(1, 2)
    num_cards, _, num_slots, size = content_BGSF.shape
    pair_BSFSF = effects["content_pair"].new_zeros(num_cards, num_slots, size, num_slots, size)
    width = effects["content_pair"].shape[-1]
    for q, (s, t) in enumerate(zip(*slot_pairs(num_slots), strict=True)):
        pair_BSFSF[:, s, :width, t, :width] = effects["content_pair"][draw_B, q]
        pair_BSFSF[:, t, :width, s, :width] = effects["content_pair"][draw_B, q].transpose(1, 2)
    pull = content_BGSF.flatten(2) @ pair_BSFSF.reshape(num_cards, num_slots * size, num_slots * size)
    pairs_BGS = (content_BGSF * pull.view_as(content_BGSF)).sum(-1)
    return Rewards((main_BGS + 0.5 * pairs_BGS).sum(-1), main_BGS + pairs_BGS)


def advantages(rewarded: Rewards, floor: float) -> Tensor:
    """Return how much better each choice was than the group's, (B, G, S), in units of the group's spread."""
    marginal = rewarded.marginal - rewarded.marginal.mean(1, keepdim=True)
    total = rewarded.total - rewarded.total.mean(1, keepdim=True)
    scale = rewarded.total.std(1, correction=0).clamp(min=floor)
    return 0.5 * (marginal + total[..., None]) / scale[:, None, None]


def train_step(
    generator: Generator,
    cards: Cards,
    effects: Mapping[str, Tensor],
    winner_BWS: Tensor,
    published: Mapping[str, Tensor] | None,
    rng: torch.Generator,
) -> GeneratorReport:
    """Make one step on B cards.

    Args:
        generator: What is trained.
        cards: The cards.
        effects: The reward model's effects, see `rewards`.
        winner_BWS: Places of W refined winners of each card.
        published: Weights of the last published generator, of the present sizes; None if there is none.
        rng: Decides draws and samples.
    """
    settings = generator.settings
    draw_B = torch.randint(len(effects["content"]), (len(cards.product),), generator=rng).to(generator.device)
    sampled_BGS = generator.sample(cards, settings.group_size, rng)
    rewarded = rewards(cards, sampled_BGS, effects, draw_B)
    advantage_BGS = advantages(rewarded, settings.advantage_floor)
    has_B1S = cards.mask.any(-1)[:, None]

    weights = {name: w.detach().requires_grad_() for name, w in generator.weights.items()}
    both_BGS = torch.cat([sampled_BGS, winner_BWS], 1)
    log_pi = generator.log_probabilities(cards, both_BGS, weights)
    chosen = log_pi.gather(-1, both_BGS[..., None])[..., 0] * has_B1S
    gradient = (advantage_BGS * chosen[:, : settings.group_size]).sum(-1).mean()
    imitation = -chosen[:, settings.group_size :].sum(-1).mean()

    # 0 log 0 = 0: what is masked has probability 0 and log-probability -inf.
    finite = log_pi[:, : settings.group_size].clamp(min=-30.0)
    pi = log_pi[:, : settings.group_size].exp() * has_B1S[..., None]
    entropy = -(pi * finite).sum((-1, -2)).mean()
    divergence = torch.zeros((), device=generator.device)
    if published is not None:
        with torch.no_grad():
            leash = generator.log_probabilities(cards, sampled_BGS, published).clamp(min=-30.0)
        divergence = (pi * (finite - leash)).sum((-1, -2)).mean()
    loss = -gradient - settings.entropy * entropy + settings.leash * divergence + settings.distillation * imitation
    gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    norm = generator.step({name: g for name, g in zip(weights, gradients, strict=True) if g is not None})
    return GeneratorReport(
        reward=float(rewarded.total.mean()),
        entropy=float(entropy.detach()),
        divergence=float(divergence.detach()),
        distillation=float(imitation.detach()),
        gradient_norm=norm,
    )
