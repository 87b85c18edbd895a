"""`genco bench search` on a world small enough for every creative to be looked at."""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.search import command
from benchmarks.search.methods import FULL, METHODS, SERVED, Request
from benchmarks.search.scene import KINDS, KNOWN_PRODUCTS, Scene
from genco.cli import main
from learner.generator import GeneratorSettings
from serving.policy import Policy

S, A = 3, 4


@pytest.fixture(scope="module")
def scene() -> Scene:
    return Scene(S, A)


@pytest.fixture(scope="module")
def policy(scene: Scene) -> Policy:
    return scene.learn(3_000, GeneratorSettings(), lambda _: None).policy()


def request_of(policy: Policy, scene: Scene, kind: str = "known") -> Request:
    (asked,) = scene.requests(kind, 1)
    return Request(policy, policy.problem(asked), np.random.default_rng(0))


def test_kinds_of_requests_are_what_they_say(scene: Scene) -> None:
    for kind in KINDS:
        for asked in scene.requests(kind, 20):
            is_known = int(asked.product_id[1:]) < KNOWN_PRODUCTS
            numbers = [int(e.rpartition("-")[2]) for ids in asked.candidates.values() for e in ids]
            share = np.mean([number >= scene.num_known for number in numbers])
            assert is_known == (kind in ("known", "new elements"))
            assert share == {"new elements": 0.5, "all new": 1.0}.get(kind, 0.0)
            assert set(asked.content) == {e for ids in asked.candidates.values() for e in ids}


def test_traffic_keeps_to_what_is_known_and_repeats_itself(scene: Scene) -> None:
    batch, again = scene.traffic(500, 7), scene.traffic(500, 7)
    assert batch.creative == again.creative
    assert batch.label.tolist() == again.label.tolist()
    assert {int(p[1:]) for p in batch.product_id} <= set(range(KNOWN_PRODUCTS))
    assert all(e in batch.candidates[i][s] for i, row in enumerate(batch.creative) for s, e in row.items())
    # Clicked 20 % by design; five standard errors.
    assert abs(batch.label.mean() - 0.2) < 0.09


@pytest.mark.parametrize("kind", KINDS)
def test_full_search_and_the_served_one_find_the_best_of_all_creatives(policy: Policy, scene: Scene, kind: str) -> None:
    request = request_of(policy, scene, kind)
    every = np.array(list(itertools.product(range(A), repeat=S)))
    best = request.problem.on_draws().values(np.broadcast_to(every, (request.num_draws, *every.shape))).max(1)
    worst = request.rewards(request.random(request.num_draws, 1)[:, 0])[0]
    for family, setting in (FULL, SERVED):
        found = request.rewards(METHODS[family][setting](request).winners)[0]
        assert (found <= best + 1e-5).all()
        assert (found - worst).mean() > 0.98 * (best - worst).mean()


def test_evaluations_are_counted(policy: Policy, scene: Scene) -> None:
    request = request_of(policy, scene)
    proposal = request.best_proposal(4)
    assert proposal.evaluations == pytest.approx(4 * S * A / request.num_draws + 4 * S)
    # The best main effects, and one pass over all candidates.
    assert request.greedy(1).evaluations == 2 * S * A
    assert request.ascents(6).evaluations > 4 * request.ascents(1).evaluations


def test_command_writes_figures_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written, picture = tmp_path / "out.json", tmp_path / "out.png"
    arguments = ["--sizes", "3x4", "--impressions", "1000", "--requests", "2"]
    assert main(["bench", "search", *arguments, "--json", str(written), "--plot", str(picture)]) == 0
    (result,) = json.loads(written.read_text())["sizes"]
    assert (result["slots"], result["candidates"], result["generator_steps"]) == (3, 4, 2)
    for kind in KINDS:
        assert {family: set(settings) for family, settings in METHODS.items()} == {
            family: set(settings) for family, settings in result["kinds"][kind].items()
        }
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "relay from proposals, 16, 4 sweeps" in capsys.readouterr().out


def test_sizes_that_are_none_are_refused() -> None:
    for text in ("8", "8x", "1x9", "9x1", "8x50;9x9", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="such as 8x50"):
            command._sizes(text)


def test_an_unknown_variant_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "search", "--variant", "sideways"]) == 1
    assert "expected one of autoregressive" in capsys.readouterr().err
