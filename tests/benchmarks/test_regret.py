"""The regret benchmark: what it measures, what a policy is told and when, and that results are kept."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.regret.cache import ROOT, ResultCache, run_key, source_version
from benchmarks.regret.command import _seeds
from benchmarks.regret.labels import LabelQueue
from benchmarks.regret.policies import REGISTRY
from benchmarks.regret.policies.base import (
    FINAL,
    LATE_POSITIVE,
    PROVISIONAL,
    BenchPolicy,
    CatalogNow,
    Choice,
    Labels,
    RequestBatch,
)
from benchmarks.regret.policies.uniform import Uniform
from benchmarks.regret.pool import _ONE_THREAD, Results, _Job, _run_missing
from benchmarks.regret.report import summarize, tables
from benchmarks.regret.run import Outcome, Run, play_policy
from benchmarks.regret.traffic import Reference, Traffic
from benchmarks.regret.worlds import BATCH, RATE, WORLDS, BenchWorld
from genco.cli import main
from genco.world import Requests, World
from genco.world_config import WorldConfig

SMALL = BenchWorld(
    config=WorldConfig(
        num_products=3, slots=("title", "image"), elements_per_slot=5, candidates_per_slot=4, click_rate=0.2
    )
)
DELAYED = BenchWorld(
    config=replace(SMALL.config, delay_median_s=60.0, delay_sigma=1.5, delay_cap_s=3600.0),
    label_wait_s=60.0,
    attribution_window_s=100.0,
)
RENEWED = BenchWorld(config=replace(SMALL.config, new_elements_every_s=2 * BATCH / RATE))


@pytest.fixture(autouse=True)
def restored_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command sets these for the processes that it starts."""
    for name in _ONE_THREAD:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "numba"))


class Recorder(BenchPolicy):
    """Plays as told and keeps all that it is told."""

    def __init__(self, traffic: Traffic, seed: int = 0, *, cheats: bool = False) -> None:
        super().__init__(traffic.facts(), seed)
        self.inner = Uniform(traffic.facts(), seed)
        self.world: World | None = traffic.world if cheats else None
        self.now_s = 0.0
        self.requests: list[RequestBatch] = []
        self.labels: list[Labels] = []
        self.catalogs: list[CatalogNow] = []

    def catalog(self, catalog: CatalogNow) -> None:
        self.catalogs.append(catalog)

    def choose(self, requests: RequestBatch) -> Choice:
        self.requests.append(requests)
        if self.world is None:
            return self.inner.choose(requests)
        asked = Requests(product=requests.product, device=requests.device, segment=requests.segment, hour=requests.hour)
        best = self.world.best_creatives(asked, self.now_s)
        self.now_s += BATCH / RATE
        return Choice(best)

    def learn(self, labels: Labels) -> None:
        self.labels.append(labels)


def played(bench: BenchWorld, seed: int, batches: int, **options: object) -> tuple[Recorder, Outcome, Traffic]:
    traffic = Traffic(bench, 3, batches * BATCH)
    policy = Recorder(traffic, seed, **options)  # type: ignore[arg-type]
    return policy, play_policy(policy, traffic), traffic


def test_requests_are_the_same_for_all_policies_and_for_longer_runs() -> None:
    one, _, _ = played(SMALL, seed=1, batches=2)
    other, _, _ = played(SMALL, seed=2, batches=3)
    for mine, theirs in zip(one.requests, other.requests, strict=False):
        for name in ("product", "device", "segment", "hour", "candidates"):
            assert np.array_equal(getattr(mine, name), getattr(theirs, name))
    assert not np.array_equal(one.labels[0].chosen, other.labels[0].chosen)


def test_what_two_policies_both_show_is_clicked_for_both_or_for_neither() -> None:
    one, _, _ = played(SMALL, seed=1, batches=3)
    other, _, _ = played(SMALL, seed=2, batches=3)
    mine, theirs = Labels.concat(one.labels), Labels.concat(other.labels)
    same = (mine.chosen == theirs.chosen).all(axis=1)
    assert 100 < same.sum() < 300  # 16 creatives
    assert np.array_equal(mine.label[same], theirs.label[same])
    assert mine.label[same].sum() > 10
    assert not np.array_equal(mine.label, theirs.label)


def test_regret_is_1_for_uniform_play_and_0_for_the_best() -> None:
    _, uniform, traffic = played(SMALL, seed=1, batches=10)
    _, best, _ = played(SMALL, seed=1, batches=10, cheats=True)
    reference = traffic.reference()
    assert best.regret(reference) == pytest.approx(0.0, abs=1e-9)
    assert best.regret(reference, 0.2) == pytest.approx(0.0, abs=1e-9)
    # Its standard error: 16 creatives whose click rates spread like the gap to the best, over 10,000 impressions.
    assert uniform.regret(reference) == pytest.approx(1.0, abs=0.03)


def test_the_end_of_a_run_is_judged_by_its_end() -> None:
    reference = Reference(best=[2.0] * 10, uniform=[1.0] * 10)
    outcome = Outcome(obtained=[1.0] * 8 + [2.0] * 2, clicks=0, decide_us=0, update_ms=0, memory_mb=0)
    assert outcome.regret(reference) == pytest.approx(0.8)
    assert outcome.regret(reference, 0.2) == 0.0


def test_without_delays_each_update_learns_exactly_the_batch_before_it() -> None:
    policy, outcome, _ = played(SMALL, seed=1, batches=3)
    for number, (requests, labels) in enumerate(zip(policy.requests, policy.labels, strict=True)):
        assert np.array_equal(labels.number, number * BATCH + np.arange(BATCH))
        assert np.array_equal(labels.requests.product, requests.product)
        assert np.array_equal(labels.kind == FINAL, labels.label == 1)
        assert set(labels.kind) <= {FINAL, PROVISIONAL}
    assert sum(int(labels.label.sum()) for labels in policy.labels) == outcome.clicks


def test_delayed_labels_come_when_a_joiner_would_tell_them() -> None:
    policy, outcome, _ = played(DELAYED, seed=1, batches=12)
    wait_ms, window_ms = 60_000, 100_000
    first_label: dict[int, int] = {}
    num_late = 0
    for update, labels in enumerate(policy.labels):
        now_ms = round((update + 1) * BATCH / RATE * 1000)
        before_ms = round(update * BATCH / RATE * 1000)
        rows = zip(labels.number, labels.kind, labels.label, labels.occurred_ms, labels.delay_ms, strict=True)
        for number, kind, label, occurred_ms, delay_ms in rows:
            assert label == (kind != PROVISIONAL)
            if kind == LATE_POSITIVE:
                num_late += 1
                assert wait_ms < delay_ms <= window_ms
                assert before_ms <= occurred_ms + delay_ms < now_ms
                assert first_label[number] == PROVISIONAL  # told before, or earlier in this update
            else:
                assert number not in first_label
                assert before_ms <= occurred_ms + wait_ms < now_ms
                assert delay_ms <= wait_ms
                first_label[number] = kind
    # 12 batches of 20 s: those of the first 9 are told, none after.
    assert sorted(first_label) == list(range(9 * BATCH))
    final = sum(kind == FINAL for kind in first_label.values())
    # The median delay is the wait; P(60 s < delay <= 100 s) = .133, for those whose window has passed.
    assert final / num_late == pytest.approx(0.5 / 0.133, rel=0.2)
    assert outcome.clicks > final + num_late  # the rest come after the window, or after the run


def test_a_click_after_the_window_is_never_told() -> None:
    traffic = Traffic(DELAYED, 3, BATCH)
    batch = next(traffic.batches())
    requests = traffic.request_batch(batch, traffic.catalog(0.0))
    queue = LabelQueue(DELAYED)
    late = replace(batch, delay_ms=np.full(BATCH, 100_001))
    queue.add(late, requests, Uniform(traffic.facts(), 0).choose(requests), np.ones(BATCH, np.bool_))
    labels = Labels.concat([queue.due(now_ms) for now_ms in range(20_000, 141_000, 20_000)])
    assert len(labels) == BATCH
    assert not labels.label.any()


def test_new_elements_are_told_before_they_are_candidates() -> None:
    policy, _, traffic = played(RENEWED, seed=1, batches=5)
    assert [catalog.first for catalog in policy.catalogs] == [0, 1, 2]
    facts = traffic.facts()
    assert facts.num_elements == 7
    assert max(int(requests.candidates.max()) for requests in policy.requests) == facts.num_elements - 1
    for number, requests in enumerate(policy.requests):
        assert requests.candidates.min() >= number // 2


def test_the_catalog_as_arrays_says_what_the_catalog_says() -> None:
    world = RENEWED.make(3)
    now_s = 4.5 * BATCH / RATE
    first, content = world.content(now_s)
    catalog = world.catalog(now_s)
    for record in catalog.elements:
        slot, number = record["slot"], int(record["element_id"].rpartition("-")[2])
        assert content[world.config.slots.index(slot), number - first].tolist() == record["features"]
    for product in range(world.config.num_products):
        assert np.array_equal(world.all_candidates(now_s)[product], world.candidates(product, now_s))


def test_runs_are_of_whole_batches() -> None:
    with pytest.raises(ValueError, match="impressions is 1500; must be a multiple of 1000"):
        Traffic(SMALL, 0, 1500)


@pytest.mark.parametrize("name", WORLDS)
def test_every_world_has_room_to_learn(name: str) -> None:
    bench = WORLDS[name]
    world = bench.make(0)
    requests = world.requests(np.random.default_rng(0), 50, 0.0)
    best, uniform = world.best(requests, 0.0).mean(), world.uniform(requests, 0.0).mean()
    assert 1.3 < best / uniform < 5


# -- results that are kept ---------------------------------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the sources of the project are looked for."""
    monkeypatch.setattr("benchmarks.regret.cache.ROOT", tmp_path)
    source_version.cache_clear()
    yield tmp_path
    source_version.cache_clear()


def test_the_version_of_sources_is_that_of_what_is_executed(sources: Path) -> None:
    (sources / "part").mkdir()

    def version(policy: str = "from part import helper\n", helper: str = "def f():\n    return 1\n") -> str:
        (sources / "policy.py").write_text(policy, "utf-8")
        (sources / "part" / "helper.py").write_text(helper, "utf-8")
        source_version.cache_clear()
        return source_version("policy")

    plain = version()
    assert version(helper='"""Module."""\n\n\ndef f():\n    """Say it."""\n    return 1  # why\n') == plain
    assert version(helper="def f():\n    return 2\n") != plain
    assert version(policy="from part.helper import f\n") != plain
    assert version() == plain
    with pytest.raises(ValueError, match="no_such is no module below"):
        source_version("no_such")


def test_results_of_ours_depend_on_the_learner_and_those_of_peers_do_not(sources: Path) -> None:
    for package in ("benchmarks", "genco", "learner", "serving", "streams"):
        shutil.copytree(ROOT / package, sources / package, ignore=shutil.ignore_patterns("__pycache__"))
    ours = Run(world="drift", policy="genco", seed=1, repeat=0, impressions=1000)
    peer = replace(ours, policy="mvt")
    before = run_key(ours), run_key(peer)
    with (sources / "learner" / "reward_model.py").open("a", encoding="utf-8") as source:
        source.write("\nEXTRA = 1\n")
    source_version.cache_clear()
    assert run_key(ours) != before[0]
    assert run_key(peer) == before[1]


def test_a_result_is_kept_for_exactly_one_run() -> None:
    run = Run(world="drift", policy="uniform", seed=1, repeat=0, impressions=1000)
    others = [
        replace(run, world="delays"),
        replace(run, policy="beta-ts"),
        replace(run, seed=2),
        replace(run, repeat=1),
        replace(run, impressions=2000),
    ]
    assert len({run_key(r) for r in [run, *others]}) == 6


def test_a_damaged_result_counts_as_none(tmp_path: Path) -> None:
    cache = ResultCache(tmp_path / "new")
    assert cache.get("a") is None
    cache.put("a", {"x": 1})
    assert cache.get("a") == {"x": 1}
    (tmp_path / "new" / "a.json").write_text('{"x"', "utf-8")
    assert cache.get("a") is None


def test_every_policy_can_be_told_apart_in_the_cache() -> None:
    keys = {run_key(Run(world="big", policy=name, seed=0, repeat=0, impressions=1000)) for name in REGISTRY}
    assert len(keys) == len(REGISTRY)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_run_is_told_of(tmp_path: Path) -> None:
    jobs = [_Job("a", "drift 0: mvt", killed, ())]
    with pytest.raises(RuntimeError, match=r"drift 0: mvt: its process was killed.*exit code -9"):
        _run_missing(jobs, ResultCache(tmp_path), {}, 1, lambda _: None)


# -- the report --------------------------------------------------------------------------------------------------------


def made_results(obtained: dict[tuple[str, int, int], float]) -> Results:
    """Return results of one batch each; keys are policy, seed and repeat."""
    return Results(
        {("drift", seed): Reference(best=[3.0], uniform=[1.0]) for _, seed, _ in obtained},
        {
            Run(world="drift", policy=policy, seed=seed, repeat=repeat, impressions=1000): Outcome(
                obtained=[value], clicks=1, decide_us=2.0, update_ms=3.0, memory_mb=4.0
            )
            for (policy, seed, repeat), value in obtained.items()
        },
    )


def test_the_difference_is_paired_by_seed_and_averaged_over_repeats() -> None:
    summary = summarize(
        made_results(
            {
                ("genco", 0, 0): 2.0,  # regret .5
                ("genco", 0, 1): 2.4,  # .3
                ("genco", 1, 0): 3.0,  # 0
                ("mvt", 0, 0): 1.0,  # 1
                ("mvt", 1, 0): 2.0,  # .5
                ("mvt", 2, 0): 1.0,  # no run of ours
            }
        )
    )
    world = summary["worlds"]["drift"]
    assert world["policies"]["genco"]["overall"] == {"mean": pytest.approx(0.2), "se": pytest.approx(0.2)}
    paired = world["paired"]["mvt"]
    assert paired["difference"] == pytest.approx((-0.6 - 0.5) / 2)
    assert paired["se"] == pytest.approx(0.05)
    assert world["policies"]["mvt"]["last_20pct"]["mean"] == pytest.approx(2.5 / 3)
    assert [table.row_count for table in tables(summary)] == [2]


def test_one_seed_has_no_standard_error_and_no_ours_no_difference() -> None:
    world = summarize(made_results({("mvt", 0, 0): 1.0}))["worlds"]["drift"]
    assert world["policies"]["mvt"]["overall"] == {"mean": 1.0, "se": None}
    assert world["paired"] == {}


@pytest.mark.parametrize("num_worlds", [1, 3])
def test_the_picture_holds_all_names_and_a_curve_for_each(num_worlds: int) -> None:
    plot = pytest.importorskip("benchmarks.regret.plot")
    made = made_results({(name, seed, 0): 2.0 for name in REGISTRY for seed in (0, 1)})
    worlds = list(WORLDS)[:num_worlds]
    figure = plot.picture(
        Results(
            {(world, seed): reference for world in worlds for (_, seed), reference in made.references.items()},
            {replace(run, world=world): outcome for world in worlds for run, outcome in made.outcomes.items()},
        )
    )
    figure.draw_without_rendering()
    shown = [panel for panel in figure.axes if panel.get_visible()]
    assert [panel.get_title() for panel in shown] == worlds
    assert all(len(panel.lines) == len(REGISTRY) for panel in shown)
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == set(REGISTRY)
    box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_writes_its_json_and_plays_nothing_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["bench", "regret", "--worlds", "single-product", "--policies", "uniform,beta-ts", "--seeds", "3"]
    arguments += ["--impressions", "2000", "--workers", "1", "--cache", str(tmp_path)]
    assert main([*arguments, "--json", str(tmp_path / "first")]) == 0
    assert "3 of" not in capsys.readouterr().err
    first = json.loads((tmp_path / "first").read_text("utf-8"))
    policies = first["worlds"]["single-product"]["policies"]
    assert policies["uniform"]["overall"]["mean"] == pytest.approx(1.0, abs=0.2)
    assert policies["beta-ts"].keys() == {"overall", "last_20pct", "runs", "decide_us", "update_ms", "memory_mb"}

    def no_process(_: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr("benchmarks.regret.pool._start", no_process)
    assert main([*arguments, "--json", str(tmp_path / "again")]) == 0
    assert "3 of 3 results are in" in capsys.readouterr().err.replace("\n", " ")
    assert json.loads((tmp_path / "again").read_text("utf-8")) == first


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--worlds", "mars", "there is no world 'mars'; expected some of interactions"),
        ("--policies", "oracle", "there is no policy 'oracle'; expected some of genco"),
        ("--impressions", "1500", "must be a multiple of 1000"),
        ("--json", "/no/such/folder/x", "must be an existing folder"),
    ],
)
def test_the_command_says_what_is_wrong(
    option: str, value: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--worlds", "drift", "--policies", "uniform", "--seeds", "0", "--workers", "1"]
    assert main(["bench", "regret", *arguments, "--cache", str(tmp_path), option, value]) == 1
    assert message in capsys.readouterr().err


def test_seeds_are_read_as_ranges_and_lists() -> None:
    assert _seeds("0-2,7,1") == [0, 1, 2, 7]
