"""Impressions and clicks for `genco bench join`: as `serving` would write them, made cheaply and repeatably.

Four slots of six candidates, 860 bytes an impression, in records of 256; decision ids are genuine; 2 % are clicked,
after seconds, some after the label wait, and few after the attribution window. Lines are put together from pieces made
once for each product, because building and encoding a million objects would take longer than joining them.

What repeats is what repeats in life: a product's candidates, and its favorite creatives. Ids, contexts, propensities
and seeds do not. With `varied` candidates do not repeat either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from streams.contracts.codec import END_OF_LOG_MS, encode_mark
from streams.contracts.decision_ids import make_decision_id
from streams.contracts.events import Impression
from streams.contracts.impressions import encode_impressions
from streams.contracts.topics import CLICKS, IMPRESSIONS

SLOTS: Final = ("title", "image", "highlight", "tag")
CANDIDATES: Final = 6
PRODUCTS: Final = 200
CREATIVES: Final = 24
"""That a product is shown with; a policy that has learned something chooses among few."""
IMPRESSIONS_A_RECORD: Final = 256
CLICKS_A_RECORD: Final = 32
"""Clicks are fifty times as rare, so a server collects fewer of them before it sends."""
ROUTES: Final = 1_024
"""Of one server, as `GENCO_ROUTES` has them by default."""
CLICK_RATE: Final = 0.02
MEDIAN_DELAY_MS: Final = 2_000
DELAY_SPREAD: Final = 1.0
"""Of the delay's logarithm: 18 % come after 5 s and 0.3 % after 30 s."""

_decode_lines = msgspec.json.Decoder(Impression).decode_lines
_CHUNK: Final = 8_192
_DEVICES: Final = ("ios", "android", "desktop", "tablet")
_SEGMENTS: Final = 100
_PROPENSITIES: Final = 4_096
_DRAWS: Final = 32
_EPSILON: Final = 0.01
_KEY: Final = b"the key of a benchmark's decisions"
_ID_DIGITS: Final = 5
_DIGITS: Final = len(SLOTS) * CANDIDATES * _ID_DIGITS
_BASE_32: Final = (b"0123456789abcdefghijklmnopqrstuv" * 8)[:256]
_CANDIDATES_TEMPLATE: Final = ",".join(
    f'"{slot}":["' + '","'.join([f"{slot[0]}%s"] * CANDIDATES) + '"]' for slot in SLOTS
)
_CREATIVE_TEMPLATE: Final = ",".join(f'"{slot}":"{slot[0]}%s"' for slot in SLOTS)
"""For the ids of a product, each after the letter of its slot."""


class KafkaRecord(NamedTuple):
    """What is sent to Kafka."""

    topic: str
    partition: int
    value: bytes
    key: bytes | None = None
    timestamp_ms: int = 0
    """0: the time of sending."""
    headers: Sequence[tuple[str, bytes]] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class TrafficOptions:
    """How much traffic, and of what kind."""

    impressions: int
    first_ms: int
    """Event time of the first impression. Leave enough time until now: what lies ahead is a dead letter."""
    impressions_per_second: int = 2_000
    """Of event time; with the attribution window it says how many are open at once."""
    columnar: bool = True
    """Impressions in columns, as our servers write them; else NDJSON, as other clients do."""
    varied: bool = False
    """Every impression has candidates of its own."""
    partitions: int = 4
    seed: int = 0


@dataclass(frozen=True, slots=True)
class _Product:
    """The pieces of a line that a product repeats."""

    product_id: str
    candidates: str
    creatives: list[str]


@dataclass(slots=True)
class Traffic:
    """A log of impressions and their clicks, the same for the same options."""

    options: TrafficOptions
    ids: list[str] = field(init=False, repr=False)
    """Decision ids in the order of time."""
    partitions: NDArray[np.int64] = field(init=False, repr=False)
    """Partition of each impression and of its click."""
    times_ms: NDArray[np.int64] = field(init=False, repr=False)
    clicked: NDArray[np.intp] = field(init=False, repr=False)
    """Numbers of the impressions that are clicked, in the order of the clicks."""
    delays_ms: NDArray[np.int64] = field(init=False, repr=False)
    """From impression to click, for each of `clicked`."""

    def __post_init__(self) -> None:
        """Draw what is drawn for each impression."""
        options = self.options
        count = options.impressions
        rng = np.random.default_rng(options.seed)
        routes = rng.integers(0, ROUTES, count)
        self.partitions = routes % options.partitions
        self.times_ms = options.first_ms + np.arange(count) * 1000 // options.impressions_per_second
        self.ids = [
            make_decision_id(route, time_ms, number, _KEY)
            for route, time_ms, number in zip(
                routes.tolist(), self.times_ms.tolist(), rng.permutation(count).tolist(), strict=True
            )
        ]
        clicked = np.flatnonzero(rng.random(count) < CLICK_RATE)
        delays = np.exp(rng.normal(np.log(MEDIAN_DELAY_MS), DELAY_SPREAD, len(clicked))).astype(np.int64)
        order = np.argsort(self.times_ms[clicked] + delays, kind="stable")
        self.clicked, self.delays_ms = clicked[order], delays[order]

    def joined(self, attribution_window_ms: int) -> NDArray[np.bool_]:
        """Return for each impression whether it has a click within the window."""
        joined = np.zeros(self.options.impressions, np.bool_)
        joined[self.clicked[self.delays_ms <= attribution_window_ms]] = True
        return joined

    def impression_lines(self) -> Iterator[str]:
        """Yield the impressions as JSON, in the order of time."""
        rng = np.random.default_rng([self.options.seed, 1])
        products = [_product(number, rng) for number in range(PRODUCTS)]
        propensities = _propensities(rng)
        popularity = 1 / (np.arange(PRODUCTS) + 10.0)
        popularity /= popularity.sum()
        for start in range(0, self.options.impressions, _CHUNK):
            count = min(_CHUNK, self.options.impressions - start)
            drawn = zip(
                self.ids[start : start + count],
                self.times_ms[start : start + count].tolist(),
                rng.choice(PRODUCTS, count, p=popularity).tolist(),
                rng.integers(0, CREATIVES, count).tolist(),
                rng.integers(0, _PROPENSITIES, count).tolist(),
                rng.integers(0, len(_DEVICES), count).tolist(),
                rng.integers(0, _SEGMENTS, count).tolist(),
                np.round(rng.random(count) * 100, 2).tolist(),
                rng.integers(0, 2**63 - 1, count).tolist(),
                strict=True,
            )
            digits = _random_digits(rng, count if self.options.varied else 0)
            for row, (decision_id, time_ms, number, creative, propensity, device, segment, discount, seed) in enumerate(
                drawn
            ):
                product = products[number]
                candidates, shown = product.candidates, product.creatives[creative]
                if self.options.varied:
                    elements = _elements(digits, row)
                    candidates, shown = _candidates(elements), _creative(elements, (creative % CANDIDATES, 1, 2, 3))
                yield (
                    f'{{"schema_version":1,"decision_id":"{decision_id}","occurred_at_ms":{time_ms},'
                    f'"product_id":"{product.product_id}","context":{{"device":"{_DEVICES[device]}",'
                    f'"hour":{time_ms // 3_600_000 % 24},"segment":"u{segment}","discount":{discount}}},'
                    f"{candidates},{shown},{propensities[propensity]},"
                    f'"model_id":"default","epoch":3,"policy_version":{42 + time_ms // 1000 % 1000},'
                    f'"source":"policy","holdout":false,"seed":{seed},"survival_probability":1.0}}'
                )

    def click_lines(self) -> Iterator[str]:
        """Yield the clicks as JSON, in the order of time."""
        times = self.times_ms[self.clicked] + self.delays_ms
        for number, time_ms in zip(self.clicked.tolist(), times.tolist(), strict=True):
            yield f'{{"schema_version":1,"decision_id":"{self.ids[number]}","occurred_at_ms":{time_ms},"reward":1.0}}'

    def batches(self) -> Iterator[KafkaRecord]:
        """Yield the records that ours reads: many events each."""
        impressions = zip(self.partitions.tolist(), self.impression_lines(), strict=True)
        clicks = zip(self.partitions[self.clicked].tolist(), self.click_lines(), strict=True)
        for topic, lines, size in (
            (IMPRESSIONS, impressions, IMPRESSIONS_A_RECORD),
            (CLICKS, clicks, CLICKS_A_RECORD),
        ):
            waiting: list[list[str]] = [[] for _ in range(self.options.partitions)]
            for partition, line in lines:
                batch = waiting[partition]
                batch.append(line)
                if len(batch) == size:
                    yield KafkaRecord(topic, partition, self._value(topic, batch))
                    batch.clear()
            for partition, batch in enumerate(waiting):
                if batch:
                    yield KafkaRecord(topic, partition, self._value(topic, batch))

    def _value(self, topic: str, lines: Sequence[str]) -> bytes:
        value = _ndjson(lines)
        if topic == IMPRESSIONS and self.options.columnar:
            return encode_impressions(_decode_lines(value))
        return value

    def end_marks(self) -> Iterator[KafkaRecord]:
        """Yield the marks that end the log in every partition of both topics."""
        value, headers = encode_mark(END_OF_LOG_MS)
        for topic in (IMPRESSIONS, CLICKS):
            for partition in range(self.options.partitions):
                yield KafkaRecord(topic, partition, value, headers=headers)

    def single_events(self, impressions: str, clicks: str) -> Iterator[KafkaRecord]:
        """Yield the records that the peers read: one event each, keyed by decision id, with the event's time.

        Args:
            impressions: Topic of the impressions.
            clicks: Topic of the clicks.
        """
        times = self.times_ms.tolist()
        for number, line in enumerate(self.impression_lines()):
            key = self.ids[number].encode()
            yield KafkaRecord(impressions, int(self.partitions[number]), line.encode(), key, times[number])
        click_times = (self.times_ms[self.clicked] + self.delays_ms).tolist()
        for number, time_ms, line in zip(self.clicked.tolist(), click_times, self.click_lines(), strict=True):
            key = self.ids[number].encode()
            yield KafkaRecord(clicks, int(self.partitions[number]), line.encode(), key, time_ms)


def _ndjson(lines: Sequence[str]) -> bytes:
    return ("\n".join(lines) + "\n").encode()


def _product(number: int, rng: np.random.Generator) -> _Product:
    elements = _elements(_random_digits(rng, 1))
    choices = rng.integers(0, CANDIDATES, (CREATIVES, len(SLOTS))).tolist()
    return _Product(f"p{number}", _candidates(elements), [_creative(elements, choice) for choice in choices])


def _random_digits(rng: np.random.Generator, products: int) -> str:
    """Return the digits of the elements of so many products."""
    return rng.bytes(products * _DIGITS).translate(_BASE_32).decode()


def _elements(digits: str, product: int = 0) -> list[str]:
    """Return the element ids of one product, slot after slot, without the letter of their slot."""
    start = product * _DIGITS
    return [digits[k : k + _ID_DIGITS] for k in range(start, start + _DIGITS, _ID_DIGITS)]


def _candidates(elements: Sequence[str]) -> str:
    return f'"candidates":{{{_CANDIDATES_TEMPLATE % tuple(elements)}}}'


def _creative(elements: Sequence[str], choice: Sequence[int]) -> str:
    chosen = tuple(elements[slot * CANDIDATES + k] for slot, k in enumerate(choice))
    return f'"creative":{{{_CREATIVE_TEMPLATE % chosen}}}'


def _propensities(rng: np.random.Generator) -> list[str]:
    """Return what a mixture of posterior draws and a uniform share may say about its choices, slot after slot."""
    pieces = []
    for _ in range(_PROPENSITIES):
        draws = np.sort(rng.integers(1, _DRAWS + 1, len(SLOTS)))[::-1].tolist()
        before, propensity, given = 1.0, 1.0, []
        for slot, (name, agreeing) in enumerate(zip(SLOTS, draws, strict=True), 1):
            after = (1 - _EPSILON) * agreeing / _DRAWS + _EPSILON / CANDIDATES**slot
            given.append(f'"{name}":{after / before!r}')
            propensity *= after / before
            before = after
        pieces.append(f'"slot_propensities":{{{",".join(given)}}},"propensity":{propensity!r}')
    return pieces
