"""The test of change stays quiet while creatives earn what they are said to, and speaks soon when they do not."""

import numpy as np
import pytest
import torch

from learner.change_test import ChangeSettings, ChangeTest
from learner.reward_model import RewardModel, RewardModelSettings
from tests.learner.test_reward_model import CONTENT, PRODUCTS, SIZES, batch

BATCHES, N = 300, 1_000


def batches_until_change(slope: float, seed: int, appeal: float = 0.0, threshold: float = 6.0) -> int | None:
    """Return after how many batches it speaks when clicks follow `slope` times the creative's part."""
    rng = torch.Generator().manual_seed(seed)
    test = ChangeTest(ChangeSettings(threshold=threshold))
    for number in range(BATCHES):
        creative_N = 0.6 + 0.3 * torch.randn(N, generator=rng, dtype=torch.float64)
        probability_N = torch.sigmoid(-3.2 + creative_N)
        label_N = (torch.rand(N, generator=rng) < torch.sigmoid(-3.2 + appeal + slope * creative_N)).double()
        if test.observe(creative_N, probability_N, label_N, torch.ones(N, dtype=torch.float64)):
            assert test.num_changes == 1
            assert test.evidence == 0.0
            return number + 1
    return None


@pytest.mark.parametrize(("threshold", "most"), [(6.0, 5), (12.0, 0)])
def test_quiet_worlds_raise_few_alarms(threshold: float, most: int) -> None:
    """Ten times 300 batches: some six alarms are to be expected at 6, and .02 at 12; the seeds are fixed."""
    alarms = [batches_until_change(1.0, seed, threshold=threshold) for seed in range(10)]
    assert sum(alarm is not None for alarm in alarms) <= most


def test_better_days_are_no_alarm() -> None:
    assert all(batches_until_change(1.0, seed, appeal=0.3) is None for seed in range(3))


@pytest.mark.parametrize(("slope", "within"), [(0.7, 40), (0.4, 12)])
def test_effects_that_are_lost_are_noticed(slope: float, within: int) -> None:
    taken = [batches_until_change(slope, seed) for seed in range(10)]
    assert all(batches is not None and batches <= within for batches in taken), taken


def test_settings_that_are_no_test_are_refused() -> None:
    with pytest.raises(ValueError, match="expected"):
        ChangeSettings(deficit=0.0)
    with pytest.raises(ValueError, match="expected"):
        ChangeSettings(widening=1.0)


def test_change_widens_tastes_and_leaves_products_and_traits() -> None:
    def learned(threshold: float) -> RewardModel:
        model = RewardModel(
            RewardModelSettings(warm_examples=200, change=ChangeSettings(threshold=threshold, warm_examples=0))
        )
        model.grow(**SIZES)
        rng = torch.Generator().manual_seed(0)
        for number in range(8):
            rows, _ = batch(np.random.default_rng(number), 500)
            # The first element of each slot is good, and in the last batch nobody clicks any more.
            good_N = (rows.chosen % 3 == 0).sum(1)
            label_N = (torch.rand(500, generator=rng) < 0.05 + 0.3 * good_N).double() * (number < 7)
            model.learn(rows, label_N, torch.ones(500))
        return model

    quiet, noticed = learned(1e9), learned(1.0)
    assert (quiet.change.num_changes, noticed.change.num_changes) == (0, 1)
    before, after = (
        model.effects(2, torch.Generator(), content_size=CONTENT, num_products=PRODUCTS) for model in (quiet, noticed)
    )
    assert (after.element_sd[:, 0] > before.element_sd[:, 0]).all()
    assert float(torch.diagonal(noticed.core.factor(0)).mean()) < float(torch.diagonal(quiet.core.factor(0)).mean())
    assert (after.product == before.product).all()
    assert (after.trait == before.trait).all()
