"""`genco credits`: where it reads, what it prints and draws, and what it says when something is wrong."""

import argparse
import hashlib
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
from rich.console import Console

from genco.credits import add_parser
from genco.credits_tables import percent, show
from genco.services import MockBroker, RedisServer
from serving.explain import Question, explain
from serving.explanation import CardCredits, SnapshotName
from serving.snapshot_store import Fetched, LastGood
from streams.clients import UnreachableError, kafka_producer
from streams.contracts.catalog import Element, Product, catalog_key
from streams.contracts.registry import blob_key, current_key, manifest_key
from streams.contracts.settings import KafkaSettings
from streams.contracts.snapshot import SnapshotError, SnapshotManifest, sign
from streams.contracts.topics import CATALOG, partition_counts
from tests.serving.test_policy import SLOTS, blob_of, manifest_of, policy_of, tensors_of

KEY = "0123456789abcdef0123456789abcdef"
SIGNED = {"GENCO_SIGNING_KEY": KEY}


def genco(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("GENCO_")}
    return subprocess.run(
        [sys.executable, "-m", "genco", "credits", *arguments],
        env=env | {"COLUMNS": "100"} | settings,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs the command in this process: a new one takes seconds to import everything."""

    def call(*arguments: str, **settings: str) -> None:
        for name in [name for name in os.environ if name.startswith("GENCO_")]:
            monkeypatch.delenv(name)
        for name, value in (SIGNED | settings).items():
            monkeypatch.setenv(name, value)
        parser = argparse.ArgumentParser()
        add_parser(parser.add_subparsers())
        parsed = parser.parse_args(["credits", *arguments])
        assert parsed.command(parsed) == 0

    return call


def only_line(result: subprocess.CompletedProcess[str]) -> str:
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert result.stdout == ""
    return lines[0]


@pytest.fixture(scope="module")
def snapshot() -> tuple[SnapshotManifest, bytes]:
    blob = blob_of(tensors_of())
    manifest = manifest_of(
        model_id="default", epoch=1, version=3, sha256=hashlib.sha256(blob).hexdigest(), num_bytes=len(blob)
    )
    return sign(manifest, KEY.encode()), blob


@pytest.fixture(scope="module")
def file(snapshot: tuple[SnapshotManifest, bytes], tmp_path_factory: pytest.TempPathFactory) -> str:
    last_good = LastGood(tmp_path_factory.mktemp("last_good"), "default", KEY.encode())
    last_good.save(Fetched(1, *snapshot))
    return str(last_good.path)


@pytest.fixture(scope="module")
def redis_server(snapshot: tuple[SnapshotManifest, bytes]) -> Iterator[RedisServer]:
    manifest, blob = snapshot
    with RedisServer() as server:
        client = redis.Redis.from_url(server.url, socket_timeout=2.0)
        client.set(blob_key("default", 1, 3), blob)
        client.set(manifest_key("default", 1, 3), manifest.model_dump_json())
        pointer = {"epoch": 1, "version": 3, "revision": 1, "sha256": manifest.sha256}
        client.hset(current_key("default"), mapping=pointer)
        client.close()
        yield server


@pytest.fixture(scope="module")
def broker() -> Iterator[MockBroker]:
    records: list[Element | Product] = [
        Product(product_id="p1", slots={"title": ("t1", "t2", "new"), "tag": SLOTS["tag"]}),
        Element(element_id="new", slot="title", features=(1.0, 2.0)),
    ]
    with MockBroker(partition_counts(4)) as started:
        settings = KafkaSettings(kafka_bootstrap_servers=started.bootstrap_servers, kafka_api_version="2.1")
        producer = kafka_producer(settings)
        for record in records:
            producer.send(CATALOG, key=catalog_key(record), value=record.model_dump_json().encode())
        producer.send(CATALOG, key=b"nonsense", value=b"{}")
        producer.flush()
        producer.close()
        yield started


def test_snapshot_of_redis_and_candidates_of_the_catalog(redis_server: RedisServer, broker: MockBroker) -> None:
    settings = SIGNED | redis_server.client_settings() | broker.client_settings()
    result = genco("p1", "--context", "device=ios", "--json", **settings)
    assert result.returncode == 0, result.stderr
    assert "1 records of the topic catalog could not be read" in result.stderr
    found = msgspec.json.decode(result.stdout, type=CardCredits)
    assert (found.snapshot.epoch, found.snapshot.version) == (1, 3)
    shown = {slot.slot: {e.element_id: e.uplift.verdict for e in slot.elements} for slot in found.explanation.slots}
    assert shown.keys() == {"title", "tag"}
    assert shown["title"].keys() == {"t1", "t2", "new"}
    assert shown["title"]["new"] == "unknown"
    assert found.explanation.context == {"device": "ios"}
    misspelled = genco("p2", **settings)
    assert misspelled.returncode == 1
    assert "'p2' is unknown to catalog and snapshot (2 products); did you mean p1, p0?" in misspelled.stderr


def test_tables_show_what_was_asked_for(file: str, here: Any, capsys: Any) -> None:
    here("p1", "--snapshot", file, "--slot", "title", "--context", "device=ios")
    out, err = capsys.readouterr()
    assert err == ""
    assert "every element of the snapshot counts as a candidate" in " ".join(out.split())
    assert "epoch 1, version 3" in out
    assert "for device=ios" in out
    card = out.split("Pairs")[0]
    assert all(element_id in card for element_id in SLOTS["title"])
    assert "i0" not in card


def test_file_of_candidates_says_what_the_card_has(file: str, here: Any, capsys: Any, tmp_path: Path) -> None:
    candidates = tmp_path / "candidates.json"
    candidates.write_text('{"title": ["t0", "t2"]}')
    here("other", "--snapshot", file, "--candidates", str(candidates), "--json")
    found = msgspec.json.decode(capsys.readouterr().out, type=CardCredits).explanation
    assert not found.product_known
    assert [sorted(e.element_id for e in slot.elements) for slot in found.slots] == [["t0", "t2"]]
    for text, reason in (("[]", "expected such as"), ('{"title": ["t0", "t0"]}', "names an element twice")):
        candidates.write_text(text)
        with pytest.raises(ValueError, match=reason):
            here("p1", "--snapshot", file, "--candidates", str(candidates))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("nope",), r"'nope' is unknown to catalog and snapshot \(2 products\); there are p0, p1"),
        (("p1", "--slot", "headline"), "it has title, image, tag"),
        (("p1", "--context", "device=tv"), "it knows ios, web"),
        (("p1", "--context", "device"), "expected such as device=ios"),
        (("p1", "--context", "device=ios", "device=web"), "a second time"),
        (("p1", "--model-id", "other"), "snapshot is of model 'default'; expected 'other'"),
        (("p1", "--plot", "/nowhere/picture.png"), "/nowhere must be an existing folder"),
    ],
)
def test_wrong_questions_are_answered_with_what_is_there(
    file: str, here: Any, capsys: Any, arguments: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        here(*arguments, "--snapshot", file)
    assert capsys.readouterr().out == ""


def test_snapshots_are_verified(file: str, here: Any, tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="signature"):
        here("p1", "--snapshot", file, GENCO_SIGNING_KEY="x" * 32)
    flipped = tmp_path / "flipped.snapshot"
    data = bytearray(Path(file).read_bytes())
    data[-1] ^= 1
    flipped.write_bytes(data)
    with pytest.raises(SnapshotError, match="sha256"):
        here("p1", "--snapshot", str(flipped))
    with pytest.raises(FileNotFoundError, match="absent"):
        here("p1", "--snapshot", str(tmp_path / "absent"))


def test_registry_without_a_snapshot_says_what_to_do(redis_server: RedisServer, here: Any) -> None:
    with pytest.raises(ValueError, match=r"no snapshot of model 'empty'.* genco learn"):
        here("p1", "--model-id", "empty", **redis_server.client_settings())
    with pytest.raises(UnreachableError, match="set GENCO_REDIS_URL"):
        here("p1", GENCO_REDIS_URL="redis://127.0.0.1:1")


def card_of(slots: dict[str, tuple[str, ...]] | None = None, **changes: Any) -> CardCredits:
    question = Question(product_id="p1", candidates=SLOTS if slots is None else slots, **changes)
    name = SnapshotName(model_id="default", epoch=1, version=3, max_event_time_ms=0)
    return CardCredits(snapshot=name, candidates_from="catalog", explanation=explain(policy_of(), question))


def printed(found: CardCredits) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    show(found, console)
    return console.export_text()


def test_words_follow_from_the_verdicts() -> None:
    found = card_of()
    rows = {line.split()[0]: line for line in printed(found).splitlines() if line.strip()}
    words = {"better": "better", "worse": "worse", "average": "about average", "unclear": "not known yet"}
    for slot in found.explanation.slots:
        for element in slot.elements:
            assert rows[element.element_id].rstrip().endswith(words[element.uplift.verdict])
            assert percent(element.uplift.clicks) in rows[element.element_id]


def test_hostile_names_are_shown_and_drawn_as_text(tmp_path: Path) -> None:
    names = ("\x1b[31mred", "[bold]x[/bold]", "$\\frac{", "x" * 128)
    found = card_of({"title": (*SLOTS["title"], *names)})
    text = printed(found)
    assert "\x1b" not in text
    assert "\\x1b[31mred" in text
    assert "[bold]x[/bold]" in text
    assert "never seen by the model" in text
    pytest.importorskip("matplotlib")
    from genco.credits_plot import draw

    draw(found, tmp_path / "hostile.png")
    assert (tmp_path / "hostile.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_hold_slots_of_any_size(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from genco.credits_plot import MOST_DRAWN, draw

    for number, slots in enumerate(({"title": ("t0",)}, {"title": tuple(f"x{n}" for n in range(MOST_DRAWN + 9))})):
        draw(card_of(slots), tmp_path / f"{number}.svg")
        text = (tmp_path / f"{number}.svg").read_text()
        assert text.startswith("<?xml")
    assert "(9 in the middle not drawn)" in printed_svg(tmp_path / "1.svg")


def printed_svg(path: Path) -> str:
    """Return the texts of a picture: matplotlib draws letters as paths and keeps what they say in comments."""
    return "\n".join(line for line in path.read_text().splitlines() if line.strip().startswith("<!--"))


def test_picture_needs_its_library_and_says_which(file: str, tmp_path: Path) -> None:
    blocked = tmp_path / "matplotlib"
    blocked.mkdir()
    (blocked / "__init__.py").write_text("raise ModuleNotFoundError('no', name='matplotlib')\n")
    result = genco(
        "p1", "--snapshot", file, "--plot", str(tmp_path / "x.png"), **SIGNED, PYTHONPATH=f"{tmp_path}:{os.getcwd()}"
    )
    assert result.returncode == 1
    assert "needs the package matplotlib; install it with the extra plot" in only_line(result)
