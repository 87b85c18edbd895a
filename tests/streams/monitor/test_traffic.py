"""What is said of the policy without labels."""

from streams.monitor.reading import Arrivals
from streams.monitor.traffic import POLICY_WINDOW, PolicyHealth

EPSILON = 0.02


def window(entropy_ratio: float) -> Arrivals:
    return Arrivals(num=POLICY_WINDOW, surprise=entropy_ratio, log_actions=1.0, weight=1.0, min_scaled=1.0)


def test_entropy_while_exploration_is_shrunk_is_neither_judged_nor_usual() -> None:
    policy = PolicyHealth()
    for _ in range(10):
        policy.observe(window(0.5), EPSILON)
    for _ in range(30):
        policy.observe(window(0.01), EPSILON, is_shrunk=True)
        assert policy.num_collapsed == 0
    assert policy.usual_entropy_ratio == 0.5
    for _ in range(2):
        policy.observe(window(0.01), EPSILON)
    assert policy.num_collapsed == 2
