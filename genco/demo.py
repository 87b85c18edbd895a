"""`genco demo`: the whole loop on this machine, with simulated shoppers, a live view and a report.

Broker, Redis, joiner, learner, server and shoppers run as processes of their own, and one that dies is started again.
This process only watches: it audits the topics, asks the server what it serves, and reads the shoppers' status.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from genco.folders import require_folder
from genco.follow import Follower
from genco.loop import KafkaKind, Loop, LoopOptions
from genco.services import ManagedProcess
from serving.client import Client, ClientError

logger = logging.getLogger(__name__)

LABEL_WAIT_MS: Final = 5_000
WINDOW_MS: Final = 30_000
START_TIMEOUT_S: Final = 60.0
DRAIN_TIMEOUT_S: Final = 20.0
BARS: Final = "▁▂▃▄▅▆▇█"


class DemoError(RuntimeError):
    """The loop did not come up, or broke for good; the message is for the user."""


def run(
    *,
    kafka: KafkaKind,
    seconds: float | None,
    rate: float,
    seed: int,
    report: Path | None,
    directory: Path | None,
) -> int:
    """Run the demo until Ctrl-C, SIGTERM or the end of `seconds`; return the exit code.

    Raises:
        ServiceError: If a local service does not start.
        DemoError: If the loop does not come up.
    """
    require_folder(report)
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: stopped.append(received))
    console = Console()
    with Loop(loop_options(kafka=kafka, rate=rate, directory=directory)) as loop:
        watch = Watch(loop, rate=rate, seed=seed, should_stop=lambda: bool(stopped))
        try:
            watch.start(console)
            _view(watch, console, seconds)
            if not watch.broken:
                console.print("shoppers have left; waiting for the last labels (Ctrl-C again to skip)")
                watch.drain(lambda: len(stopped) > 1)
            result = watch.report()
        finally:
            watch.close()
    if report is not None:
        report.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    _summary(result, console)
    if watch.broken:
        raise DemoError(watch.broken)
    return 0 if result["ledger"]["imbalance"] == 0 else 1


def loop_options(*, kafka: KafkaKind, rate: float, directory: Path | None) -> LoopOptions:
    """Return what the loop can do in near real time: short waits, an update and a publication each second."""
    return LoopOptions(
        kafka=kafka,
        attribution_window_ms=WINDOW_MS,
        label_wait_ms=LABEL_WAIT_MS,
        rate=rate,
        settings={
            "GENCO_IDLE_TIMEOUT_MS": "300",
            "GENCO_EMIT_LINGER_MS": "100",
            "GENCO_REFRESH_INTERVAL_MS": "250",
            # So that a killed joiner or learner is back soon.
            "GENCO_KAFKA_SESSION_TIMEOUT_MS": "6000",
            "GENCO_LEASE_MS": "5000",
        },
        directory=directory,
    )


class Watch:
    """Everything the demo knows about the loop, without touching it."""

    def __init__(
        self,
        loop: Loop,
        *,
        rate: float,
        seed: int,
        should_stop: Callable[[], bool],
        shoppers: Sequence[str] = (),
    ) -> None:
        if loop.url is None:
            raise ValueError("the demo watches a loop with a server; this one has none")
        self.loop = loop
        self.should_stop = should_stop
        self.started = time.monotonic()
        self.policy: dict[str, Any] = {}
        self.status: dict[str, Any] = {}
        self.ctr_history: list[tuple[float, float, float]] = []
        self.versions: set[tuple[int, int]] = set()
        self._client = Client(loop.url, timeout_s=2.0)
        self._follower = Follower(loop.join_settings(), from_beginning=True)
        self._status_path = loop.directory / "shoppers.json"
        argv = [sys.executable, "-m", "genco", "simulate", "--url", loop.url, "--rate", str(rate), "--seed", str(seed)]
        self._shoppers = ManagedProcess(
            "shoppers",
            [*argv, *shoppers, "--status", str(self._status_path)],
            log_path=loop.directory / "shoppers.log",
            env=loop.env,
        )

    @property
    def broken(self) -> str | None:
        """Why the loop cannot go on, or None."""
        if failure := self.loop.supervisor.failure:
            return failure
        if self._follower.failure is not None:
            return f"reading the topics failed: {self._follower.failure}"
        return None

    def start(self, console: Console) -> None:
        """Wait until the server answers, then let the shoppers in."""
        console.print(f"starting {self.loop.kafka_name}, Redis, joiner, learner, server; logs in {self.loop.directory}")
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._ask():
            if self.broken:
                raise DemoError(self.broken)
            if time.monotonic() > deadline:
                last = " ".join(self.loop.supervisor.last_lines("serve", 2))
                raise DemoError(f"the server did not answer within {START_TIMEOUT_S:.0f} s; its log ends with: {last}")
            if self.should_stop():
                return
            time.sleep(0.1)
        self._shoppers.start()
        self.started = time.monotonic()

    def look(self) -> None:
        """Ask everybody for news."""
        self._ask()
        try:
            self.status = json.loads(self._status_path.read_text("utf-8"))
        except (OSError, ValueError):
            return
        recent = self.status["recent"]
        if recent["decisions"]:
            served, uniform, best = (
                recent[k] / recent["decisions"] for k in ("obtained_sum", "uniform_sum", "best_sum")
            )
            self.ctr_history.append((served, uniform, best))

    def _ask(self) -> bool:
        try:
            self.policy = self._client.policy(swaps=50)
        except ClientError:
            return False
        swaps = self.policy.get("swaps", [])
        self.versions |= {(swap["epoch"], swap["version"]) for swap in swaps}
        with self._follower.lock:
            self._follower.audit.feed_swaps(swaps)
        return True

    def ledger(self, *, drained: bool = False) -> dict[str, Any]:
        """Return the audit's ledger."""
        with self._follower.lock:
            return self._follower.audit.ledger(drained=drained)

    def freshness(self) -> dict[str, float | None]:
        """Return the audit's freshness."""
        with self._follower.lock:
            return self._follower.audit.freshness()

    def drain(self, should_skip: Callable[[], bool] = lambda: False) -> None:
        """Stop the shoppers and wait until every impression has its label, or until `should_skip`."""
        self._shoppers.stop(grace=10.0)
        deadline = time.monotonic() + DRAIN_TIMEOUT_S
        quiet_since = time.monotonic()
        before: dict[str, Any] = {}
        while time.monotonic() < deadline and not self.broken and not should_skip():
            self.look()
            now = self.ledger(drained=True)
            if now != before:
                quiet_since = time.monotonic()
            before = now
            settled = now["impressions"]["pending"] == 0 and now["imbalance"] == 0
            if settled and time.monotonic() - quiet_since > 2.0:
                return
            time.sleep(0.25)

    def report(self) -> dict[str, Any]:
        """Return the report of the run."""
        self.look()
        shoppers = self.status.get("report", {})
        with self._follower.lock:
            audit = self._follower.audit
            ledger = audit.ledger(drained=True)
            freshness = audit.freshness()
            consumed = dict(audit.consumed)
            kinds = dict(audit.label_kinds)
        restarts = self.loop.supervisor.restarts
        events = self.policy.get("counters", {}).get("events", {})
        errors = {
            "requests_rejected": self.status.get("rejected", 0),
            "connection_errors": self.status.get("connection_errors", 0),
            "restarts": sum(restarts.values()),
            "events_dropped": sum(sum(topic["dropped"].values()) for topic in events.values()),
            "dead_letters": ledger["impressions"]["dead_letter"] + ledger["clicks"]["dead_letter"],
        }
        return {
            "seconds": round(time.monotonic() - self.started, 1),
            "kafka": self.loop.kafka_name,
            "decisions": self.status.get("decisions", 0),
            "impressions": consumed.get("impressions", 0),
            "clicks": consumed.get("clicks", 0),
            "clicks_drawn": self.status.get("clicks_drawn", 0),
            "examples": consumed.get("examples", 0),
            "label_kinds": kinds,
            "ledger": ledger,
            "policy_versions": len(self.versions),
            "freshness_seconds": freshness,
            "label_wait_seconds": LABEL_WAIT_MS / 1000,
            "ctr": shoppers.get("ctr"),
            "ctr_last_20pct": shoppers.get("ctr_last_20pct"),
            "regret": shoppers.get("regret"),
            "errors": sum(errors.values()),
            "errors_by_kind": errors,
            "restarts": restarts,
        }

    def close(self) -> None:
        """Stop watching and let the shoppers go."""
        self._shoppers.stop(grace=5.0)
        self._follower.close()
        self._client.close()


def _view(watch: Watch, console: Console, seconds: float | None) -> None:
    """Show the loop until the end."""
    interactive = console.is_terminal
    with Live(console=console, auto_refresh=False, transient=False) as live:
        next_look = time.monotonic()
        next_line = next_look + 5.0
        while not watch.should_stop() and not watch.broken:
            now = time.monotonic()
            if seconds is not None and now - watch.started >= seconds:
                break
            if now >= next_look:
                next_look = now + 1.0
                watch.look()
                if interactive:
                    live.update(_screen(watch), refresh=True)
                elif now >= next_line:
                    # No terminal: a line now and then instead of a screen.
                    next_line = now + 5.0
                    console.print(_line(watch))
            time.sleep(0.05)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


def _recent(watch: Watch) -> tuple[float | None, float | None, float | None]:
    return watch.ctr_history[-1] if watch.ctr_history else (None, None, None)


def _line(watch: Watch) -> str:
    served, uniform, best = _recent(watch)
    freshness = watch.freshness()
    ledger = watch.ledger()
    return (
        f"{time.monotonic() - watch.started:5.0f} s  click rate {_percent(served)} "
        f"(uniform {_percent(uniform)}, best {_percent(best)})  policy {_version(watch)}  "
        f"freshness p95 {_seconds(freshness['p95'])}  imbalance {ledger['imbalance']}"
    )


def _version(watch: Watch) -> str:
    manifest = watch.policy.get("manifest") or {}
    return f"{manifest.get('epoch', '-')}.{manifest.get('version', '-')} ({watch.policy.get('source', '-')})"


def _screen(watch: Watch) -> Group:
    served, uniform, best = _recent(watch)
    rates = Table.grid(padding=(0, 2))
    rates.add_row(
        "served", Text(_percent(served), style="bold green"), _bars([row[0] for row in watch.ctr_history], best)
    )
    rates.add_row("uniform", _percent(uniform), "")
    rates.add_row("best", _percent(best), "what a shopper who knows everything would see")
    if served is not None and uniform is not None and best is not None and best > uniform:
        rates.add_row("regret", f"{(best - served) / (best - uniform):.2f}", "0 best, 1 uniform; last 10 seconds")

    freshness = watch.freshness()
    recent = watch.status.get("recent", {})
    manifest = watch.policy.get("manifest") or {}
    metrics = manifest.get("metrics", {})
    facts = Table.grid(padding=(0, 2))
    facts.add_row("policy", _version(watch), f"{len(watch.versions)} versions served")
    facts.add_row("freshness", f"p50 {_seconds(freshness['p50'])}", f"p95 {_seconds(freshness['p95'])}")
    facts.add_row(
        "events", f"{recent.get('decisions', 0) / 10:.0f} decisions/s", f"{watch.status.get('clicks_sent', 0)} clicks"
    )
    facts.add_row(
        "learner",
        f"normalized entropy {metrics.get('normalized_entropy', float('nan')):.3f}",
        f"calibration {metrics.get('calibration', float('nan')):.2f}",
    )
    restarts = {name: count for name, count in watch.loop.supervisor.restarts.items() if count}
    facts.add_row("restarts", str(restarts or "none"), "")

    ledger = watch.ledger()
    buckets = Table("", "joined", "negative", "pending", "late", "duplicate", "orphan", "dead", box=None)
    shown = ledger["impressions"]
    buckets.add_row(
        "impressions",
        *(str(shown[k]) for k in ("joined", "expired", "pending")),
        "",
        str(shown["duplicate"]),
        "",
        str(shown["dead_letter"]),
    )
    shown = ledger["clicks"]
    buckets.add_row(
        "clicks",
        str(shown["joined"]),
        "",
        *(str(shown[k]) for k in ("pending", "late", "duplicate", "orphan", "dead_letter")),
    )
    return Group(
        Panel(rates, title="click rate, last 10 seconds", title_align="left"),
        Panel(
            facts,
            title=f"the loop, {time.monotonic() - watch.started:.0f} s, {watch.loop.kafka_name}",
            title_align="left",
        ),
        Panel(buckets, title=f"ledger, imbalance {ledger['imbalance']}", title_align="left"),
        Text(f"API {watch.loop.url}   Ctrl-C to stop", style="dim"),
    )


def _bars(values: list[float], top: float | None) -> str:
    """Draw the last minute, from 0 to the best click rate."""
    if not top:
        return ""
    return "".join(BARS[min(int(value / top * len(BARS)), len(BARS) - 1)] for value in values[-60:])


def _summary(result: dict[str, Any], console: Console) -> None:
    table = Table("", "all", "last 20 %", title=f"{result['seconds']:.0f} s on the {result['kafka']}")
    overall, late = result["ctr"] or {}, result["ctr_last_20pct"] or {}
    for name in ("served", "uniform", "best"):
        table.add_row(f"click rate {name}", _percent(overall.get(name)), _percent(late.get(name)))
    regret = result["regret"] or {}
    table.add_row("normalised regret", str(regret.get("overall")), str(regret.get("last_20pct")))
    console.print(table)
    console.print(
        f"{result['decisions']} decisions, {result['impressions']} impressions, {result['clicks']} clicks, "
        f"{result['examples']} examples, {result['policy_versions']} policy versions"
    )
    freshness = result["freshness_seconds"]
    console.print(
        f"freshness beyond the label wait: p50 {_seconds(freshness['p50'])}, p95 {_seconds(freshness['p95'])}; "
        f"ledger imbalance {result['ledger']['imbalance']}; errors {result['errors']}"
    )
