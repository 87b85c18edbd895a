"""Decide: from requests to creatives, with ids, propensities and the impressions that are learned from.

No HTTP, Redis, Kafka or clock: the policy comes from the holder, the product's slots from the catalog in memory, and
the impressions go to a log that only queues them. When the policy fails on a call, the uniform rung answers it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

import msgspec
import numpy as np
from msgspec import UNSET

from serving.feedback import make_token
from serving.messages import DecideRequest, Decision, Fault, InvalidBodyError
from serving.metrics import ServingMetrics
from serving.policy import Choice, DecisionRequest
from serving.policy_holder import Loaded, PolicyHolder
from streams.contracts.catalog import Catalog, Element
from streams.contracts.decision_ids import make_decision_id
from streams.contracts.events import Impression

logger = logging.getLogger(__name__)

MAX_CALL_CANDIDATES: Final = 65_536
"""Over all slots and requests of a call: bounds its memory and time, also when the catalog brings the candidates."""
MAX_REQUEST_BYTES: Final = 128 * 1024
"""Context and candidates of one request as JSON; with the rest, the impression stays below the codec's line limit."""
_SMALL: Final = 128
"""A request with so few candidates in a body below 64 KiB cannot come near MAX_REQUEST_BYTES."""


class ImpressionLog(Protocol):
    """What deciding needs of the event log."""

    def current_route(self, num_decisions: int, now_ms: int) -> int:
        """Return the route that decisions made now should carry."""
        ...

    def offer_impression(self, impression: Impression) -> bool:
        """Queue an impression, or drop it and count that."""
        ...

    def offer_elements(self, elements: Sequence[Element]) -> None:
        """Queue new elements for the catalog, before the impressions that follow."""
        ...


class CatalogSource(Protocol):
    """Where the newest catalog is."""

    @property
    def catalog(self) -> Catalog:
        """The catalog; replaced as a whole after a reconnect."""
        ...


class Decider:
    """Answers decide calls.

    Args:
        holder: Has the policy.
        catalog: Has products and elements.
        log: Takes impressions and new elements.
        signing_key: Signs decision ids and impression tokens.
        model_id: Written on the decisions of the uniform rung, which has no manifest.
        rng: Draws the decisions' seeds.
        metrics: Counts decisions by rung.
    """

    def __init__(
        self,
        *,
        holder: PolicyHolder,
        catalog: CatalogSource,
        log: ImpressionLog,
        signing_key: bytes,
        model_id: str,
        rng: np.random.Generator,
        metrics: ServingMetrics,
    ) -> None:
        self._holder = holder
        self._catalog = catalog
        self._log = log
        self._key = signing_key
        self._model_id = model_id
        self._rng = rng
        self._metrics = metrics
        self._by_source = {source: metrics.decisions.labels(source) for source in ("policy", "last_good", "uniform")}

    def decide(
        self, requests: Sequence[DecideRequest], now_ms: int, *, body_bytes: int, many: bool = True
    ) -> list[Decision]:
        """Choose a creative for each request and log the impressions.

        Args:
            requests: As read from a body.
            now_ms: Time of the decisions and, unless a token is asked for, of the impressions.
            body_bytes: Length of the body they came in.
            many: They came in an envelope; names of fields in faults start with their place in it then.

        Raises:
            InvalidBodyError: With every fault of every request; nothing was decided then.
        """
        catalog = self._catalog.catalog
        loaded = self._holder.current
        prepared = _prepare(requests, catalog, loaded.described, body_bytes=body_bytes, many=many)
        seeds = self._rng.integers(0, 2**63 - 1, size=len(requests)).tolist()
        questions = [
            DecisionRequest(request.product_id, request.context, candidates, content, seed)
            for request, (candidates, content), seed in zip(requests, prepared, seeds, strict=True)
        ]
        loaded, choices = self._choose(loaded, questions)
        self._by_source[loaded.rung].inc(len(choices))
        self._offer_new_elements(requests, catalog)
        route = self._log.current_route(len(requests), now_ms)
        random_32 = np.frombuffer(os.urandom(4 * len(requests)), dtype="<u4").tolist()
        decisions = []
        for request, question, choice, random in zip(requests, questions, choices, random_32, strict=True):
            impression = self._impression(
                question, choice, loaded, decision_id=make_decision_id(route, now_ms, random, self._key), now_ms=now_ms
            )
            token: str | msgspec.UnsetType = UNSET
            if request.log_impression is False:
                token = make_token(impression, self._key)
            else:
                self._log.offer_impression(impression)
            decisions.append(_decision(impression, choice.expected_ctr, token))
        return decisions

    def _choose(self, loaded: Loaded, questions: Sequence[DecisionRequest]) -> tuple[Loaded, list[Choice]]:
        try:
            return loaded, loaded.policy.choose(questions)
        except Exception:
            # A bug in the policy must not darken the cards; what the request did wrong was refused before.
            logger.exception("policy failed; the uniform rung answers", extra={"revision": loaded.revision})
            self._metrics.policy_errors.inc()
        return Loaded(self._holder.uniform, "uniform"), self._holder.uniform.choose(questions)

    def _offer_new_elements(self, requests: Sequence[DecideRequest], catalog: Catalog) -> None:
        new = {
            element.element_id: element
            for request in requests
            if request.elements is not UNSET
            for element in request.elements
            if element.element_id not in catalog.elements
        }
        if new:
            self._log.offer_elements([element.to_element() for element in new.values()])

    def _impression(
        self, question: DecisionRequest, choice: Choice, loaded: Loaded, *, decision_id: str, now_ms: int
    ) -> Impression:
        manifest = loaded.manifest
        return Impression(
            schema_version=1,
            decision_id=decision_id,
            occurred_at_ms=now_ms,
            product_id=question.product_id,
            context=dict(question.context),
            candidates={slot: list(ids) for slot, ids in question.candidates.items()},
            creative=choice.creative,
            slot_propensities=choice.slot_propensities,
            propensity=choice.propensity,
            model_id=manifest.model_id if manifest else self._model_id,
            epoch=manifest.epoch if manifest else 0,
            policy_version=manifest.version if manifest else 0,
            source=loaded.rung,
            holdout=choice.holdout,
            seed=question.seed,
            survival_probability=1.0,
        )


def _decision(impression: Impression, expected_ctr: float | None, token: str | msgspec.UnsetType) -> Decision:
    return Decision(
        decision_id=impression.decision_id,
        creative=impression.creative,
        slot_propensities=impression.slot_propensities,
        propensity=impression.propensity,
        model_id=impression.model_id,
        epoch=impression.epoch,
        policy_version=impression.policy_version,
        source=impression.source,
        holdout=impression.holdout,
        expected_ctr=expected_ctr,
        impression_token=token,
    )


Described = Mapping[str, frozenset[str]]
_NOTHING: Final[frozenset[str]] = frozenset()

Prepared = tuple[Mapping[str, Sequence[str]], Mapping[str, Element]]
"""Candidates of a request, and the content that is known of them."""


def _prepare(
    requests: Sequence[DecideRequest], catalog: Catalog, described: Described, *, body_bytes: int, many: bool
) -> list[Prepared]:
    """Fill in from the catalog what requests leave out, and refuse what cannot be decided."""
    faults: list[Fault] = []
    prepared: list[Prepared] = []
    left = MAX_CALL_CANDIDATES
    for index, request in enumerate(requests):
        candidates, problem = _candidates(request, catalog)
        if problem is None:
            num_candidates = sum(map(len, candidates.values()))
            left -= num_candidates
            if left < 0:
                problem = "candidates", f"more than {MAX_CALL_CANDIDATES} in one call; send fewer requests at a time"
            elif num_candidates > _SMALL or body_bytes > MAX_REQUEST_BYTES // 2:
                problem = _too_large(request, candidates)
        if problem is not None:
            field, reason = problem
            name = f"requests[{index}].{field}" if many else field
            faults.append(Fault(index=index if many else None, field=name, reason=reason))
            if left < 0:
                break
            continue
        prepared.append((candidates, _content(request, candidates, catalog, described)))
    if faults:
        raise InvalidBodyError(faults)
    return prepared


Problem = tuple[str, str]
"""Field and reason."""


def _candidates(request: DecideRequest, catalog: Catalog) -> tuple[Mapping[str, Sequence[str]], Problem | None]:
    product = catalog.products.get(request.product_id)
    if request.candidates is UNSET:
        if product is None:
            return {}, ("product_id", f"{request.product_id[:80]!r} is not in the catalog; send candidates with it")
        return product.slots, None
    candidates = request.candidates
    for slot, ids in candidates.items():
        if product is not None and slot not in product.slots:
            known = ", ".join(product.slots)
            return {}, (
                f"candidates.{slot[:80]}",
                f"no slot of product {request.product_id[:80]!r}; it has {known[:400]}",
            )
        if len(set(ids)) != len(ids):
            return {}, (f"candidates.{slot[:80]}", "names an element twice")
    if request.elements is not UNSET:
        for place, element in enumerate(request.elements):
            if element.slot not in candidates:
                return {}, (f"elements[{place}].slot", f"{element.slot[:80]!r} is not a slot of candidates")
    return candidates, None


def _too_large(request: DecideRequest, candidates: Mapping[str, Sequence[str]]) -> Problem | None:
    num_bytes = len(msgspec.json.encode((request.context, candidates)))
    if num_bytes <= MAX_REQUEST_BYTES:
        return None
    return "candidates", f"with the context they take {num_bytes} bytes; at most {MAX_REQUEST_BYTES}"


def _content(
    request: DecideRequest, candidates: Mapping[str, Sequence[str]], catalog: Catalog, described: Described
) -> Mapping[str, Element]:
    """Return what is known of the candidates that the snapshot does not describe; mostly that is nothing."""
    elements = catalog.elements
    content = {
        element_id: elements[element_id]
        for slot, ids in candidates.items()
        for element_id in set(ids) - described.get(slot, _NOTHING)
        if element_id in elements
    }
    if request.elements is not UNSET:
        for new in request.elements:
            # The catalog's record wins: it is the one that the learner sees.
            if new.element_id not in content and new.element_id not in described.get(new.slot, _NOTHING):
                content[new.element_id] = new.to_element()
    return content
