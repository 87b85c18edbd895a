"""The topic table, and the key names of the registry."""

import inspect

import pytest

from streams.contracts import registry, topics
from streams.contracts.topics import CATALOG, CLICKS, DEAD_LETTERS, EXAMPLES, IMPRESSIONS, JOINED, TOPICS


def test_names_are_those_of_the_design() -> None:
    assert set(TOPICS) == {
        "impressions", "clicks", "examples", "dead_letters", "catalog", "updates", "control", "alerts",
    }  # fmt: skip
    assert all(name == topic.name and topic.holds for name, topic in TOPICS.items())


def test_every_name_of_the_module_has_a_row() -> None:
    names = {v for n, v in vars(topics).items() if n.isupper() and isinstance(v, str)}
    assert names == set(TOPICS)


def test_joined_topics_are_those_that_are_partitioned() -> None:
    assert set(JOINED) == {IMPRESSIONS, CLICKS, EXAMPLES, DEAD_LETTERS}
    assert {name for name, topic in TOPICS.items() if topic.partitioned} == set(JOINED)


@pytest.mark.parametrize("partitions", [1, 4, 100])
def test_only_joined_topics_have_several_partitions(partitions: int) -> None:
    counts = topics.partition_counts(partitions)
    assert counts == {name: partitions if name in JOINED else 1 for name in TOPICS}


def test_catalog_alone_is_compacted() -> None:
    assert [name for name, topic in TOPICS.items() if topic.compacted] == [CATALOG]


def test_what_everything_else_is_made_from_is_kept_for_ever() -> None:
    assert {name for name, t in TOPICS.items() if t.retention_hours is None} == {"catalog", "updates", "control"}
    # Longer than the longest outage over a weekend.
    assert all(t.retention_hours is None or t.retention_hours >= 72 for t in TOPICS.values())


def test_registry_keys_are_those_of_the_design_and_never_meet() -> None:
    members = inspect.getmembers(registry, inspect.isfunction)
    functions = {name: function for name, function in members if function.__module__ == registry.__name__}
    made = {n: f("m", 3, 42) if len(inspect.signature(f).parameters) == 3 else f("m") for n, f in functions.items()}
    assert made == {
        "blob_prefix": "blob:m:",
        "manifest_prefix": "manifest:m:",
        "blob_key": "blob:m:3:42",
        "manifest_key": "manifest:m:3:42",
        "current_key": "current:m",
        "pin_key": "pin:m",
        "freeze_key": "freeze:m",
        "switches_key": "switches:m",
        "revision_key": "revision:m",
        "sequence_key": "sequence:m",
        "audit_key": "audit:m",
        "lease_key": "lease:m",
        "epoch_key": "epoch:m",
        "history_key": "history:m",
        "candidate_key": "candidate:m",
        "published_channel": "published:m",
    }
