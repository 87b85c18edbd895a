"""The catalog in memory: read to its end before it counts, kept through outages, renewed as a whole."""

from __future__ import annotations

import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kafka.errors import KafkaConnectionError

from serving.catalog_view import CatalogView
from serving.metrics import ServingMetrics, totals
from streams.contracts.catalog import Element, Product, catalog_key

Record = namedtuple("Record", "key value partition offset")


def wait_until(condition: Callable[[], Any], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


class FakeTopic:
    """A compacted topic of one partition, and the consumers that read it."""

    def __init__(self) -> None:
        self.log: list[Record] = []
        self.failure: Exception | None = None
        self.connections = 0
        self.readable = 10**9

    def put(self, record: Element | Product) -> None:
        self.log.append(Record(catalog_key(record), record.model_dump_json().encode(), 0, len(self.log)))

    def put_raw(self, key: bytes | None, value: bytes | None) -> None:
        self.log.append(Record(key, value, 0, len(self.log)))

    def connect(self) -> FakeConsumer:
        if self.failure is not None:
            raise self.failure
        self.connections += 1
        return FakeConsumer(self)


class FakeConsumer:
    def __init__(self, topic: FakeTopic) -> None:
        self.topic = topic
        self.at = 0

    def partitions_for_topic(self, topic: str) -> set[int]:
        return {0}

    def assign(self, partitions: Any) -> None: ...

    def seek_to_beginning(self, *partitions: Any) -> None: ...

    def end_offsets(self, partitions: Any, timeout_ms: int) -> dict[Any, int]:
        return dict.fromkeys(partitions, len(self.topic.log))

    def position(self, partition: Any) -> int:
        return self.at

    def poll(self, timeout_ms: int) -> dict[Any, list[Record]]:
        if self.topic.failure is not None:
            raise self.topic.failure
        time.sleep(0.002)
        batch = self.topic.log[self.at : min(self.at + 2, self.topic.readable)]
        self.at += len(batch)
        return {"catalog": batch}

    def close(self, timeout_ms: int) -> None: ...


@pytest.fixture
def topic() -> FakeTopic:
    return FakeTopic()


@pytest.fixture
def view(topic: FakeTopic, metrics: ServingMetrics) -> Iterator[CatalogView]:
    made = CatalogView(topic.connect, metrics)
    yield made
    made.stop()


def test_catalog_counts_when_it_is_read_to_its_end(view: CatalogView, topic: FakeTopic) -> None:
    for number in range(5):
        topic.put(Element(element_id=f"t{number}", slot="title"))
    topic.readable = 3
    view.start()
    time.sleep(0.1)
    assert view.fault is not None
    assert view.catalog.elements == {}
    topic.readable = 10**9
    wait_until(lambda: view.fault is None)
    assert set(view.catalog.elements) == {f"t{number}" for number in range(5)}


def test_later_records_are_followed(view: CatalogView, topic: FakeTopic) -> None:
    view.start()
    wait_until(lambda: view.fault is None)
    topic.put(Product(product_id="p1", slots={"title": ("t1",)}))
    wait_until(lambda: "p1" in view.catalog.products)
    topic.put_raw(b"product/p1", None)
    wait_until(lambda: not view.catalog.products)


def test_bad_record_is_counted_and_skipped(view: CatalogView, topic: FakeTopic, metrics: ServingMetrics) -> None:
    topic.put_raw(b"element/t1", b"{not json")
    topic.put_raw(None, b"{}")
    topic.put(Element(element_id="t2", slot="title"))
    view.start()
    wait_until(lambda: view.fault is None)
    assert set(view.catalog.elements) == {"t2"}
    assert totals(metrics.catalog_rejected) == {(): 2}


def test_outage_keeps_the_catalog_and_a_reconnect_renews_it(view: CatalogView, topic: FakeTopic) -> None:
    topic.put(Element(element_id="t1", slot="title"))
    topic.put(Element(element_id="t2", slot="title"))
    view.start()
    wait_until(lambda: view.fault is None)
    topic.failure = KafkaConnectionError("gone")
    wait_until(lambda: "gone" in (view.fault or ""))
    assert set(view.catalog.elements) == {"t1", "t2"}
    del topic.log[0]  # retired and compacted away meanwhile: no tombstone is left
    topic.failure = None
    wait_until(lambda: view.fault is None)
    assert set(view.catalog.elements) == {"t2"}
    assert topic.connections == 2
