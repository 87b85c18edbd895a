"""Cut the examples of a raw log into updates that depend on the examples alone.

A live learner's updates depend on timing and are recorded. A log that is joined again has no such record, so the rule
must not know partitions, files, portions or machines: time is cut into spans, an example belongs to the span in which
it becomes due (shown + label wait; a late click: clicked), an update takes whole spans until it has enough examples or
covers enough time, and within it the examples stand in the order of decision id, a negative before its late positive.

How far a joiner had read when a click came decides whether a positive left at once or after a negative. `canonical`
undoes that: what was clicked after the label wait becomes the negative and the late positive that a joiner without any
delay would have made. Nothing here knows files or the clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from streams.contracts.examples import EXAMPLE_SCHEMA, LabelKind

_NEVER: Final = 2**62


@dataclass(frozen=True, slots=True)
class SpanRule:
    """When an example is due, and how much an update covers."""

    label_wait_ms: int
    attribution_window_ms: int
    span_ms: int = 1_000
    min_examples: int = 1_000
    """An update ends with the span in which it reaches so many, or with an attribution window: what is learned at once
    may stand in any order of time, and decisions are remembered for a few windows only."""

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if not 0 <= self.label_wait_ms <= self.attribution_window_ms:
            raise ValueError(
                f"the label wait is {self.label_wait_ms} ms; expected 0 to the attribution window "
                f"({self.attribution_window_ms} ms)"
            )
        if self.span_ms < 1 or self.min_examples < 1:
            raise ValueError(f"span_ms is {self.span_ms} and min_examples {self.min_examples}; expected 1 at least")


def canonical(examples: pa.Table, rule: SpanRule) -> pa.Table:
    """Return the examples (`EXAMPLE_SCHEMA`) with each click after the label wait as a negative and a late positive."""
    if rule.label_wait_ms >= rule.attribution_window_ms:
        return examples
    is_final = pc.equal(examples.column("label_kind"), LabelKind.FINAL.value)
    is_late = pc.greater(examples.column("delay_ms"), rule.label_wait_ms)
    split = pc.and_(is_final, pc.fill_null(is_late, False))
    if not pc.any(split).as_py():
        return examples
    late = examples.filter(split)
    num_late = late.num_rows
    negative = {
        "label": pa.array(np.zeros(num_late, np.int8)),
        "reward": pa.array(np.zeros(num_late)),
        "label_kind": pa.array([LabelKind.PROVISIONAL.value] * num_late),
        "delay_ms": pa.nulls(num_late, pa.int64()),
    }
    positive = {"label_kind": pa.array([LabelKind.LATE_POSITIVE.value] * num_late)}
    return pa.concat_tables(
        [examples.filter(pc.invert(split)), _replaced(late, negative), _replaced(late, positive)]
    ).combine_chunks()


def _replaced(table: pa.Table, columns: dict[str, pa.Array]) -> pa.Table:
    arrays = [columns.get(name, table.column(name)) for name in EXAMPLE_SCHEMA.names]
    return pa.Table.from_arrays(arrays, schema=EXAMPLE_SCHEMA)


def due_ms(examples: pa.Table, rule: SpanRule) -> NDArray[np.int64]:
    """Return when each of N examples is due, in Unix milliseconds."""
    shown_N = examples.column("occurred_at_ms").to_numpy()
    delay_N = pc.fill_null(examples.column("delay_ms"), 0).to_numpy()
    is_late_N = pc.equal(examples.column("label_kind"), LabelKind.LATE_POSITIVE.value).to_numpy(zero_copy_only=False)
    due_N: NDArray[np.int64] = shown_N + np.where(
        is_late_N, np.maximum(delay_N, rule.label_wait_ms), rule.label_wait_ms
    )
    return due_N


class SpanCutter:
    """Collects examples in any order and gives out updates as soon as nothing more can come for them."""

    def __init__(self, rule: SpanRule) -> None:
        self._rule = rule
        self._waiting = EXAMPLE_SCHEMA.empty_table()
        self._span_N = np.empty(0, np.int64)
        self._given_until = -_NEVER
        """Spans before this one were given out."""
        self.num_behind = 0
        """Examples that came after their span was given out, and went to a later one."""

    def add(self, examples: pa.Table) -> None:
        """Take examples of `EXAMPLE_SCHEMA`."""
        examples = canonical(examples, self._rule)
        span_N = due_ms(examples, self._rule) // self._rule.span_ms
        self.num_behind += int((span_N < self._given_until).sum())
        self._waiting = pa.concat_tables([self._waiting, examples])
        self._span_N = np.concatenate([self._span_N, np.maximum(span_N, self._given_until)])

    def updates(self, complete_until_ms: int | None) -> Iterator[tuple[int, pa.Table]]:
        """Yield updates: the last span of each, and its examples in their order.

        Args:
            complete_until_ms: Everything that is due before this has been added; None: everything has, and the rest
                becomes an update too, however small.
        """
        end = _NEVER if complete_until_ms is None else complete_until_ms // self._rule.span_ms
        order = np.argsort(self._span_N, kind="stable")
        span_N = self._span_N[order]
        start = 0
        while start < len(span_N) and (last := self._last_span(span_N[start:], end)) is not None:
            stop = int(np.searchsorted(span_N, last, side="right"))
            self._given_until = last + 1
            yield last, _in_order(self._waiting.take(pa.array(order[start:stop])))
            start = stop
        if start:
            rest = np.sort(order[start:])  # as they came
            self._waiting = self._waiting.take(pa.array(rest)).combine_chunks()
            self._span_N = self._span_N[rest]

    def _last_span(self, span_N: NDArray[np.int64], end: int) -> int | None:
        """Return the last span of the next update; None if more may come for it.

        Args:
            span_N: Sorted; at least one.
            end: Spans before this one are complete.
        """
        rule = self._rule
        limit = int(span_N[0]) + max(1, rule.attribution_window_ms // rule.span_ms)
        if len(span_N) >= rule.min_examples and span_N[rule.min_examples - 1] < limit:
            last = int(span_N[rule.min_examples - 1])
        elif limit <= end:
            last = int(span_N[np.searchsorted(span_N, limit) - 1])
        else:
            return None
        return last if last < end else None


def _in_order(examples: pa.Table) -> pa.Table:
    keys = [("decision_id", "ascending"), ("label", "ascending")]
    return examples.take(pc.sort_indices(examples, sort_keys=keys))
