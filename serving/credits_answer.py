"""GET /v1/credits: from a product id and a query string to an explanation, or to a refusal that names what was meant.

No HTTP: the policy comes from the holder and the card's candidates from the catalog in memory.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from typing import Any, Final

from serving.explain import Question, QuestionError, explain, read_context
from serving.explanation import CandidatesFrom, CardCredits, SnapshotName
from serving.messages import Fault, InvalidBodyError
from serving.policy import Policy
from serving.policy_holder import Loaded
from streams.contracts.catalog import Catalog, Element
from streams.contracts.events import MAX_CONTEXT_FIELDS
from streams.contracts.features import FeatureSpec
from streams.contracts.snapshot import SnapshotManifest

PARAMETERS: Final[tuple[dict[str, Any], ...]] = (
    {
        "name": "product_id",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "minLength": 1, "maxLength": 128},
        "example": "p123",
    },
    {
        "name": "context",
        "in": "query",
        "style": "form",
        "explode": True,
        "description": "Fields of the context, each as context.FIELD=VALUE, such as context.device=ios; the others are "
        "averaged over.",
        "schema": {"type": "object", "additionalProperties": {"type": "string"}},
        "example": {"context.device": "ios"},
    },
    {
        "name": "slot",
        "in": "query",
        "description": "Only this slot, and the pairs with it.",
        "schema": {"type": "string", "minLength": 1, "maxLength": 128},
        "example": "title",
    },
)
_PREFIX: Final = "context."
_MOST_COMPARED: Final = 5_000
"""Ids among which those like a misspelled one are looked for: 10 us each."""


class ProductError(ValueError):
    """Nobody knows the product."""


def answer(loaded: Loaded, catalog: Catalog, product_id: str, query: Sequence[tuple[str, str]]) -> CardCredits:
    """Return the credits of a product's card under the policy that serves.

    Args:
        loaded: The policy.
        catalog: Has the card's candidates.
        product_id: Which card.
        query: Names and values of the query string, in order.

    Raises:
        InvalidBodyError: 404 for a product that the catalog lacks, 422 for a wrong query, 503 without a learned policy.
    """
    fields, slot = _read(query)
    policy, manifest = loaded.policy, loaded.manifest
    if not isinstance(policy, Policy) or manifest is None:
        raise _refused("policy", "the server plays uniformly, nothing was learned yet; try again later", 503)
    try:
        candidates, source = card_of(product_id, policy.spec, catalog)
    except ProductError as error:
        raise _refused("product_id", str(error), 404) from None
    try:
        question = Question(
            product_id=product_id,
            candidates=candidates,
            content=content_of(candidates, catalog),
            context=read_context(policy.spec, fields),
            slot=slot,
        )
        found = explain(policy, question)
    except QuestionError as error:
        raise _refused(error.field, error.reason, 422) from None
    return CardCredits(snapshot=snapshot_name(manifest), candidates_from=source, explanation=found)


def card_of(product_id: str, spec: FeatureSpec, catalog: Catalog) -> tuple[Mapping[str, Sequence[str]], CandidatesFrom]:
    """Return slot -> candidates of a product, and where they come from.

    A product whose requests bring their own candidates is in the snapshot, but not in the catalog; which elements are
    its own is known to nobody then.

    Raises:
        ProductError: If neither catalog nor snapshot have the product.
    """
    if product_id in catalog.products:
        return catalog.products[product_id].slots, "catalog"
    if product_id not in spec.product_index:
        raise ProductError(unknown_product(product_id, dict.fromkeys([*catalog.products, *spec.product_index])))
    candidates: dict[str, list[str]] = {}
    slots = {index: name for name, index in spec.slot_index.items()}
    for slot, element_id in spec.element_index:
        candidates.setdefault(slots[slot], []).append(element_id)
    return candidates, "snapshot"


def snapshot_name(manifest: SnapshotManifest) -> SnapshotName:
    """Return what says which snapshot was explained."""
    return SnapshotName(
        model_id=manifest.model_id,
        epoch=manifest.epoch,
        version=manifest.version,
        max_event_time_ms=manifest.max_event_time_ms,
    )


def content_of(candidates: Mapping[str, Sequence[str]], catalog: Catalog) -> dict[str, Element]:
    """Return what the catalog knows of candidates; a policy looks at it where its snapshot knows nothing."""
    elements = catalog.elements
    return {e: elements[e] for ids in candidates.values() for e in ids if e in elements}


def unknown_product(product_id: str, known: Collection[str]) -> str:
    """Return what to say of a product that is not there: the ids most like it."""
    if not known:
        return f"{product_id[:80]!r} is unknown: neither catalog nor snapshot have any product"
    # In a long catalog, those that begin alike are compared.
    start = product_id[:3] if len(known) > _MOST_COMPARED else ""
    compared = list(islice((name for name in known if name.startswith(start)), _MOST_COMPARED))
    near = difflib.get_close_matches(product_id, compared, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(islice(known, 3))}, ..."
    return f"{product_id[:80]!r} is unknown to catalog and snapshot ({len(known)} products); {hint}"


def _read(query: Sequence[tuple[str, str]]) -> tuple[dict[str, str], str | None]:
    """Return the fields of the context as text, and the slot."""
    fields: dict[str, str] = {}
    slot: str | None = None
    for name, value in query:
        if name.startswith(_PREFIX) and len(name) > len(_PREFIX):
            field = name.removeprefix(_PREFIX)
            if field in fields:
                raise _refused(name[:80], "stands twice", 422)
            fields[field] = value
        elif name == "slot":
            if slot is not None:
                raise _refused("slot", "stands twice", 422)
            slot = value
        else:
            raise _refused(name[:80], "is no parameter; expected slot=NAME and context.FIELD=VALUE", 422)
    if len(fields) > MAX_CONTEXT_FIELDS:
        raise _refused("context", f"has {len(fields)} fields; at most {MAX_CONTEXT_FIELDS}", 422)
    return fields, slot


def _refused(field: str, reason: str, status: int) -> InvalidBodyError:
    return InvalidBodyError([Fault(index=None, field=field, reason=reason)], status)
