"""What goes wrong in a drill: how simulated shoppers, and the way of their clicks, change for a while.

Each scenario is a small strategy that the shoppers ask; the plain `Scenario` changes nothing. Times are seconds since
the shoppers came.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np

from genco.world import Requests, World
from genco.world_config import WorldConfig

SKEW_MS: Final = 45_000
"""Below what the joiner refuses, so that the clicks count as too late and not as bad."""
MIX_SHARE: Final = 6
"""After the mix has moved only one in so many products is asked for."""

Delivery = Literal["now", "later", "never"]


@dataclass(frozen=True, slots=True)
class Scenario:
    """Nothing goes wrong; what the others change."""

    begin_s: float = 20.0
    """When it begins."""
    end_s: float = 40.0
    """When it is mended, where that is possible."""

    def lasts(self, now_s: float) -> bool:
        """Say whether it is under way."""
        return self.begin_s <= now_s < self.end_s

    def config(self, config: WorldConfig) -> WorldConfig:
        """Return the world in which it happens."""
        return config

    def world_s(self, now_s: float) -> float:
        """Return the time in the world."""
        return now_s

    def requests(self, world: World, rng: np.random.Generator, n: int, now_s: float) -> Requests:
        """Draw n page views."""
        return world.requests(rng, n, self.world_s(now_s))

    def delivery(self, now_s: float) -> Delivery:
        """Say what becomes of clicks that are due."""
        return "now"

    def skew_ms(self, now_s: float) -> int:
        """Return how far the shoppers' clocks are ahead."""
        return 0


class ClicksStop(Scenario):
    """Clicks are stuck, and come when it is mended, with the time at which they happened."""

    def delivery(self, now_s: float) -> Delivery:
        """Keep them."""
        return "later" if self.lasts(now_s) else "now"


class ClicksLost(Scenario):
    """Clicks are lost; those that follow come."""

    def delivery(self, now_s: float) -> Delivery:
        """Lose them."""
        return "never" if self.lasts(now_s) else "now"


class ClockSkew(Scenario):
    """Clocks are wrong where clicks are taken."""

    def skew_ms(self, now_s: float) -> int:
        """Be ahead."""
        return SKEW_MS if self.lasts(now_s) else 0


class WorldDrift(Scenario):
    """All that shoppers like is something else from `begin_s` on; that cannot be mended."""

    def config(self, config: WorldConfig) -> WorldConfig:
        """Let tastes move."""
        return replace(config, drift_every_s=self.begin_s, drift_rate=1.0)

    def world_s(self, now_s: float) -> float:
        """Let them move once."""
        return min(now_s, 1.5 * self.begin_s)


class MixShift(Scenario):
    """Few products are asked for."""

    def requests(self, world: World, rng: np.random.Generator, n: int, now_s: float) -> Requests:
        """Draw them from the first few."""
        requests = world.requests(rng, n, self.world_s(now_s))
        if not self.lasts(now_s):
            return requests
        few = max(1, world.config.num_products // MIX_SHARE)
        return replace(requests, product=requests.product % few)


SCENARIOS: Final[dict[str, type[Scenario]]] = {
    "clicks-stop": ClicksStop,
    "clicks-lost": ClicksLost,
    "clock-skew": ClockSkew,
    "world-drift": WorldDrift,
    "mix-shift": MixShift,
}
