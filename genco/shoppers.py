"""`genco simulate`: shoppers of a simulated world, behind the HTTP API.

They ask for cards, look at them, and click as the world's truth says, with its delays. The world knows the best and the
uniform click rate of every request, so they can tell the regret, and nobody else sees the truth.

Once a second a line of JSON goes to standard output.
"""

from __future__ import annotations

import heapq
import json
import logging
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from genco.scenarios import Scenario
from genco.world import World, regret
from genco.world_config import WorldConfig
from serving.client import Client, ClientError
from streams.telemetry import now_ms

logger = logging.getLogger(__name__)

BATCH: Final = 64
CLICK_BATCH: Final = 256
TICK_S: Final = 0.1
INTRODUCTIONS: Final = 3
"""How often a product's elements travel with its requests, so that a server learns them from the traffic."""


@dataclass(slots=True)
class Totals:
    """What the shoppers did and what it was worth. `*_sum` are sums of true click probabilities."""

    decisions: int = 0
    clicks_drawn: int = 0
    clicks_sent: int = 0
    best_sum: float = 0.0
    uniform_sum: float = 0.0
    obtained_sum: float = 0.0
    rejected: int = 0
    connection_errors: int = 0
    history: list[tuple[int, float, float, float, int]] = field(default_factory=list)
    """For each second: decisions, best, uniform, obtained, clicks drawn."""

    def report(self) -> dict[str, Any]:
        """Return click rates and regret, over the whole run and its last fifth."""
        rows = np.array(self.history, np.float64).reshape(-1, 5)
        # The last fifth of the decisions, by whole seconds.
        late = np.cumsum(rows[:, 0]) > 0.8 * rows[:, 0].sum()
        return {
            "decisions": self.decisions,
            "clicks_drawn": self.clicks_drawn,
            "clicks_sent": self.clicks_sent,
            "rejected": self.rejected,
            "connection_errors": self.connection_errors,
            "ctr": _rates(rows),
            "ctr_last_20pct": _rates(rows[late]),
            "regret": {"overall": _regret(rows), "last_20pct": _regret(rows[late])},
        }


def _rates(rows: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, float | None]:
    count, best, uniform, _, clicks = rows.sum(axis=0)
    if not count:
        return {"served": None, "uniform": None, "best": None}
    return {"served": round(clicks / count, 5), "uniform": round(uniform / count, 5), "best": round(best / count, 5)}


def _regret(rows: np.ndarray[Any, np.dtype[np.float64]]) -> float | None:
    _, best, uniform, obtained, _ = rows.sum(axis=0)
    return round(regret(best, obtained, uniform), 4) if best > uniform else None


class Shoppers:
    """A crowd with a steady rate of visits."""

    def __init__(
        self, world: World, client: Client, *, rate: float, seed: int, scenario: Scenario | None = None
    ) -> None:
        self._world = world
        self._scenario = scenario or Scenario()
        self._client = client
        self._rate = rate
        self._rng = np.random.default_rng(seed)
        self._clicks: list[tuple[float, str]] = []
        self._introduced: dict[str, int] = {}
        self._started = time.monotonic()
        self._recent: deque[tuple[float, float, float, float, float]] = deque()
        self.totals = Totals()

    def run(self, seconds: float | None, tell: Callable[[str], None], should_stop: Callable[[], bool]) -> None:
        """Visit until the time is over or `should_stop`; `tell` gets a line each second."""
        begun = time.monotonic()
        next_line = begun + 1.0
        visits = 0.0
        last = begun
        while not should_stop():
            now = time.monotonic()
            if seconds is not None and now - begun >= seconds:
                break
            # A slow server does not leave a debt that is then paid in one burst.
            visits = min(visits + self._rate * (now - last), self._rate)
            last = now
            while visits >= 1:
                count = min(int(visits), BATCH)
                self._visit(count)
                visits -= count
            self._send_clicks()
            if now >= next_line:
                next_line += 1.0
                self._line(tell)
            time.sleep(max(0.0, TICK_S - (time.monotonic() - now)))
        self._line(tell, final=True)

    def _visit(self, count: int) -> None:
        world, since_s = self._world, time.monotonic() - self._started
        now_s = self._scenario.world_s(since_s)
        requests = self._scenario.requests(world, self._rng, count, since_s)
        bodies: list[dict[str, Any]] = [dict(body) for body in world.request_dicts(requests, now_s)]
        for body in bodies:
            if self._introduced.get(body["product_id"], 0) < INTRODUCTIONS:
                self._introduce(body, now_s)
        try:
            decisions = self._client.decide(bodies)
        except ClientError as error:
            self._refused(error, count)
            return
        creatives = world.encode([decision["creative"] for decision in decisions])
        obtained = world.click_probability(requests, creatives, now_s)
        clicked = self._rng.random(count) < obtained
        delays = world.delays(self._rng, count)
        at = time.monotonic()
        for index in np.flatnonzero(clicked):
            heapq.heappush(self._clicks, (at + float(delays[index]), decisions[index]["decision_id"]))
        row = (
            count,
            float(world.best(requests, now_s).sum()),
            float(world.uniform(requests, now_s).sum()),
            float(obtained.sum()),
            int(clicked.sum()),
        )
        totals = self.totals
        totals.decisions += count
        totals.best_sum += row[1]
        totals.uniform_sum += row[2]
        totals.obtained_sum += row[3]
        totals.clicks_drawn += row[4]
        self._recent.append((at, *row[:4]))
        second = int(at - self._started)
        if len(totals.history) <= second:
            totals.history.extend([(0, 0.0, 0.0, 0.0, 0)] * (second + 1 - len(totals.history)))
        before = totals.history[second]
        totals.history[second] = (
            before[0] + row[0],
            before[1] + row[1],
            before[2] + row[2],
            before[3] + row[3],
            before[4] + row[4],
        )

    def _introduce(self, body: dict[str, Any], now_s: float) -> None:
        """Let the content of the candidates travel along: whoever has not seen them learns what they are."""
        product_id = body["product_id"]
        self._introduced[product_id] = self._introduced.get(product_id, 0) + 1
        wanted = {element_id for ids in body["candidates"].values() for element_id in ids}
        body["elements"] = [e for e in self._world.catalog(now_s).elements if e["element_id"] in wanted]

    def _send_clicks(self) -> None:
        due: list[tuple[float, str]] = []
        now = time.monotonic()
        delivery = self._scenario.delivery(now - self._started)
        if delivery == "later":
            return
        while self._clicks and self._clicks[0][0] <= now and len(due) < CLICK_BATCH:
            due.append(heapq.heappop(self._clicks))
        if not due or delivery == "never":
            return
        ahead_ms = now_ms() + self._scenario.skew_ms(now - self._started)
        clicks = [
            {"decision_id": decision_id, "occurred_at_ms": ahead_ms - round(1000 * (now - at))}
            for at, decision_id in due
        ]
        try:
            answer = self._client.click(clicks)
        except ClientError as error:
            # A browser would try again too.
            for _, decision_id in due:
                heapq.heappush(self._clicks, (now + 0.5, decision_id))
            self._refused(error, 0)
            return
        self.totals.clicks_sent += answer["accepted"]
        self.totals.rejected += len(answer["rejected"])

    def _refused(self, error: ClientError, count: int) -> None:
        if error.status is None:
            self.totals.connection_errors += 1
            self._introduced.clear()
            time.sleep(0.2)
        else:
            self.totals.rejected += max(count, 1)
            logger.warning("the server refused a request", extra={"status": error.status, "error": str(error)})

    def _line(self, tell: Callable[[str], None], *, final: bool = False) -> None:
        horizon = time.monotonic() - 10
        while self._recent and self._recent[0][0] < horizon:
            self._recent.popleft()
        recent = np.array([row[1:] for row in self._recent], np.float64).reshape(-1, 4).sum(axis=0)
        line: dict[str, Any] = {
            "final": final,
            **{k: v for k, v in asdict(self.totals).items() if k != "history"},
            "recent": dict(zip(("decisions", "best_sum", "uniform_sum", "obtained_sum"), recent.tolist(), strict=True)),
        }
        if final:
            line["report"] = self.totals.report()
        tell(json.dumps(line))


def run(
    url: str,
    config: WorldConfig,
    *,
    rate: float,
    seconds: float | None,
    seed: int,
    token: str | None,
    status: Path | None,
    scenario: Scenario | None = None,
) -> int:
    """Run the shoppers until the time is over, SIGTERM or SIGINT; return the exit code."""
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: stopped.append(received))
    with Client(url, token=token, timeout_s=5.0) as client:
        scenario = scenario or Scenario()
        shoppers = Shoppers(World(scenario.config(config)), client, rate=rate, seed=seed, scenario=scenario)
        shoppers.run(seconds, lambda line: _tell(line, status), lambda: bool(stopped))
    if not shoppers.totals.decisions and not stopped:
        raise ConnectionError(f"no server made a decision at {url}; start one with: genco serve")
    return 0


def _tell(line: str, status: Path | None) -> None:
    """Print a line, and put it in place of the last one in the status file."""
    print(line, flush=True)
    if status is not None:
        temporary = status.with_name(f".{status.name}.tmp")
        temporary.write_text(line, "utf-8")
        temporary.replace(status)
