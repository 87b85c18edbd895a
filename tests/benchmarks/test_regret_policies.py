"""Each policy of the regret benchmark: it shows candidates only, learns, and follows from its seed."""

import numpy as np
import pytest

from benchmarks.regret.policies import ABLATIONS, REGISTRY
from benchmarks.regret.policies.base import FINAL, LATE_POSITIVE, BenchPolicy, Labels
from benchmarks.regret.policies.content import MAX_SIZE, ContentTable
from benchmarks.regret.policies.genco import Genco
from benchmarks.regret.run import play_policy
from benchmarks.regret.traffic import Reference, Traffic
from benchmarks.regret.worlds import BATCH
from tests.benchmarks.small_worlds import RENEWED, TINY

SLOW = ("genco", "fm-ensemble", "vw-ccb", "vw-slates")


def made(name: str, traffic: Traffic, seed: int = 0) -> BenchPolicy:
    entry = REGISTRY[name]
    for library in entry.needs:
        pytest.importorskip(library)
    return entry.load()(traffic.facts(), seed)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Traffic(TINY, 5, 6 * BATCH).reference()


@pytest.mark.parametrize("name", [name for name in REGISTRY if name != "uniform"])
def test_it_learns(name: str, reference: Reference) -> None:
    """Uniform play has regret 1 +- .03 over the last two batches; the weakest seen here had .69."""
    traffic = Traffic(TINY, 5, 6 * BATCH)
    outcome = play_policy(made(name, traffic), traffic)
    assert outcome.regret(reference, 1 / 3) < 0.85


@pytest.mark.parametrize("name", [name for name in REGISTRY if name not in ("uniform", "aes-tree")])
def test_it_plays_new_elements_rich_content_and_late_labels(name: str) -> None:
    # Whoever shows what is no candidate is refused by the world.
    traffic = Traffic(RENEWED, 5, 4 * BATCH)
    assert len(play_policy(made(name, traffic), traffic).obtained) == 4


@pytest.mark.parametrize("name", [name for name in REGISTRY if name not in SLOW])
def test_it_follows_from_its_seed(name: str) -> None:
    outcomes = []
    for seed in (1, 1, 2):
        traffic = Traffic(TINY, 5, 2 * BATCH)
        outcomes.append(play_policy(made(name, traffic, seed), traffic).obtained)
    assert outcomes[0] == outcomes[1] != outcomes[2]


@pytest.mark.long
@pytest.mark.parametrize("name", ABLATIONS)
def test_ours_plays_without_one_of_its_parts(name: str) -> None:
    traffic = Traffic(TINY, 5, 2 * BATCH)
    policy = ABLATIONS[name].load()(traffic.facts(), 0)
    assert len(play_policy(policy, traffic).obtained) == 2


@pytest.mark.parametrize("name", ["no-rest", "no-pairs", "no-appeal"])
def test_part_that_is_left_out_learns_nothing(name: str) -> None:
    traffic = Traffic(TINY, 5, 2 * BATCH)
    policy = ABLATIONS[name].load()(traffic.facts(), 0)
    assert isinstance(policy, Genco)
    play_policy(policy, traffic)
    effects = policy._learner._effects_now()
    left_out = {"no-rest": [effects.element], "no-pairs": [effects.pair], "no-appeal": [effects.product]}
    assert all(abs(part).max() < 1e-6 for part in left_out[name])
    assert abs(effects.mean["content"]).max() > 1e-6


def test_ours_that_waits_learns_every_label_once_and_final(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.regret.policies.ablations.WINDOW_MS", 90_000)
    learned: list[Labels] = []
    monkeypatch.setattr(Genco, "learn", lambda _, labels: learned.append(labels))
    # A label wait of 30 s, and clicks after 100 s at the latest.
    traffic = Traffic(RENEWED, 5, 12 * BATCH)
    policy = ABLATIONS["waits-for-the-window"].load()(traffic.facts(), 0)
    told: list[Labels] = []
    waits = policy.learn

    def tell(labels: Labels) -> None:
        told.append(labels)
        waits(labels)

    monkeypatch.setattr(policy, "learn", tell)
    play_policy(policy, traffic)
    known, all_told = Labels.concat(learned), Labels.concat(told)
    assert len(set(known.number.tolist())) == len(known) > 4 * BATCH
    assert set(known.kind.tolist()) == {FINAL}
    positive = set(all_told.number[all_told.label > 0].tolist())
    assert [number in positive for number in known.number.tolist()] == (known.label > 0).tolist()
    assert known.label.mean() > all_told.label[all_told.kind != LATE_POSITIVE].mean()


def test_the_tree_refuses_many_products() -> None:
    with pytest.raises(ValueError, match="aes-tree plays one product; the world has 2"):
        made("aes-tree", Traffic(RENEWED, 5, BATCH))


def test_rich_content_becomes_its_principal_components() -> None:
    traffic = Traffic(RENEWED, 5, 4 * BATCH)
    table = ContentTable(traffic.facts())
    assert table.size == MAX_SIZE < traffic.facts().content_size
    catalog = traffic.catalog(0.0)
    table.see(catalog)
    kept = table.table_SEG[:, :5].reshape(15, MAX_SIZE).astype(np.float64)
    whole = catalog.content.reshape(15, -1).astype(np.float64)
    whole -= whole.mean(axis=0)
    # Three traits and a little noise: distances between elements survive, but for the common scale.
    distances = [np.linalg.norm(x[:, None] - x[None], axis=2)[np.triu_indices(15, 1)] for x in (kept, whole)]
    assert np.corrcoef(*distances)[0, 1] > 0.99
    assert kept.var(axis=0).mean() == pytest.approx(1.0, rel=1e-5)
    assert not table.table_SEG[:, 5:].any()
