"""The catalog is the newest record of every element and product."""

import json

import pytest
from pydantic import ValidationError

from streams.contracts.catalog import (
    MAX_CANDIDATES,
    MAX_FEATURES,
    MAX_SLOTS,
    MAX_TEXT,
    Catalog,
    Element,
    Product,
    catalog_key,
)

ELEMENT = Element(element_id="t1", slot="title", features=(0.5, -1.0), text="Free shipping")
PRODUCT = Product(product_id="p1", slots={"title": ("t1", "t2"), "image": ("i1",)}, features=(1.0,))


def value(record: Element | Product) -> bytes:
    return record.model_dump_json().encode()


@pytest.fixture
def catalog() -> Catalog:
    catalog = Catalog()
    for record in (ELEMENT, PRODUCT):
        catalog.apply(catalog_key(record), value(record))
    return catalog


def test_records_survive_the_way(catalog: Catalog) -> None:
    assert catalog.elements == {"t1": ELEMENT}
    assert catalog.products == {"p1": PRODUCT}
    assert list(catalog.products["p1"].slots) == ["title", "image"]
    assert (catalog_key(ELEMENT), catalog_key(PRODUCT)) == (b"element/t1", b"product/p1")


def test_ids_with_slashes_and_other_letters_survive() -> None:
    catalog = Catalog()
    odd = Element(element_id="a/b/é", slot="title")
    catalog.apply(catalog_key(odd), value(odd))
    assert catalog.elements == {"a/b/é": odd}


def test_newer_record_replaces_the_older(catalog: Catalog) -> None:
    newer = ELEMENT.model_copy(update={"text": "Half price"})
    catalog.apply(b"element/t1", value(newer))
    assert catalog.elements == {"t1": newer}


@pytest.mark.parametrize("empty", [b"", None])
def test_empty_value_retires_what_its_key_names(catalog: Catalog, empty: bytes | None) -> None:
    catalog.apply(b"element/p1", empty)  # no such element; the product of that name stays
    assert catalog.products == {"p1": PRODUCT}
    catalog.apply(b"element/t1", empty)
    assert (catalog.elements, catalog.products) == ({}, {"p1": PRODUCT})
    catalog.apply(b"product/p1", empty)
    assert catalog.products == {}


def test_retired_element_may_come_back(catalog: Catalog) -> None:
    catalog.apply(b"element/t1", b"")
    catalog.apply(b"element/t1", value(ELEMENT))
    assert catalog.elements == {"t1": ELEMENT}


def test_unknown_field_is_ignored(catalog: Catalog) -> None:
    raw = json.loads(value(ELEMENT)) | {"color": "red"}
    catalog.apply(b"element/t1", json.dumps(raw).encode())
    assert catalog.elements == {"t1": ELEMENT}


def test_optional_fields_may_be_missing() -> None:
    catalog = Catalog()
    catalog.apply(b"element/e", b'{"element_id":"e","slot":"s"}')
    assert catalog.elements == {"e": Element(element_id="e", slot="s", features=(), text="")}


BAD_ELEMENTS = {
    "no JSON": b"x",
    "no object": b"[]",
    "truncated": value(ELEMENT)[:-3],
    "not UTF-8": value(ELEMENT).replace(b"Free", b"\xff"),
    "a product": value(PRODUCT),
    "future version": value(ELEMENT).replace(b'"schema_version":1', b'"schema_version":2'),
    "without slot": b'{"element_id":"t1"}',
    "empty id": b'{"element_id":"","slot":"title"}',
    "long id": json.dumps({"element_id": "x" * 129, "slot": "title"}).encode(),
    "NaN": b'{"element_id":"t1","slot":"title","features":[NaN]}',
    "too large a feature": b'{"element_id":"t1","slot":"title","features":[1e7]}',
    "too many features": json.dumps({"element_id": "t1", "slot": "s", "features": [0] * (MAX_FEATURES + 1)}).encode(),
    "too long a text": json.dumps({"element_id": "t1", "slot": "s", "text": "x" * (MAX_TEXT + 1)}).encode(),
    "deep": b"[" * 100_000,
}
BAD_PRODUCTS = {
    "an element": value(ELEMENT),
    "no slots": b'{"product_id":"p1","slots":{}}',
    "empty slot": b'{"product_id":"p1","slots":{"title":[]}}',
    "element twice": b'{"product_id":"p1","slots":{"title":["t1","t1"]}}',
    "too many slots": json.dumps({"product_id": "p1", "slots": {str(n): ["e"] for n in range(MAX_SLOTS + 1)}}).encode(),
    "too many elements": json.dumps(
        {"product_id": "p1", "slots": {"s": [str(n) for n in range(MAX_CANDIDATES + 1)]}}
    ).encode(),
}


@pytest.mark.parametrize(
    ("key", "bad"),
    [
        *(pytest.param(b"element/t1", bad, id=name) for name, bad in BAD_ELEMENTS.items()),
        *(pytest.param(b"product/p1", bad, id=name) for name, bad in BAD_PRODUCTS.items()),
    ],
)
def test_bad_record_is_refused_and_changes_nothing(catalog: Catalog, key: bytes, bad: bytes) -> None:
    with pytest.raises(ValueError, match=r"catalog record b'(element/t1|product/p1)': "):
        catalog.apply(key, bad)
    assert (catalog.elements, catalog.products) == ({"t1": ELEMENT}, {"p1": PRODUCT})


@pytest.mark.parametrize(
    "key", [None, b"", b"element", b"element/", b"/t1", b"click/t1", b"Element/t1", b"\xff\xfe/t1"]
)
def test_record_with_another_key_is_refused(catalog: Catalog, key: bytes | None) -> None:
    for data in (value(ELEMENT), b""):
        with pytest.raises(ValueError, match="expected element/<id> or product/<id>"):
            catalog.apply(key, data)
    assert (catalog.elements, catalog.products) == ({"t1": ELEMENT}, {"p1": PRODUCT})


def test_reason_names_the_field() -> None:
    with pytest.raises(ValueError, match=r"features\.1: "):
        Catalog().apply(b"element/e", b'{"element_id":"e","slot":"s","features":[1,"x"]}')
    with pytest.raises(ValueError, match="slot 'title' of product 'p1' names an element twice"):
        Catalog().apply(b"product/p1", BAD_PRODUCTS["element twice"])


def test_records_are_frozen() -> None:
    with pytest.raises(ValidationError):
        ELEMENT.slot = "image"  # type: ignore[misc]


def test_record_under_a_key_that_is_not_its_own_is_refused() -> None:
    catalog = Catalog()
    with pytest.raises(ValueError, match="t2"):
        catalog.apply(b"element/t2", value(ELEMENT))
