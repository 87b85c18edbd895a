"""Elements and products: the records of the compacted topic `catalog`.

The key of a record is `element/<element_id>` or `product/<product_id>`, its value the JSON of the model, an empty value
retires it. New elements may appear and old ones retire at any time.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Identifier = Annotated[str, Field(min_length=1, max_length=128)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False, ge=-1e6, le=1e6)]
MAX_SLOTS = 32
MAX_CANDIDATES = 1024
MAX_FEATURES = 2048
MAX_TEXT = 2000


class Element(BaseModel):
    """Content that can fill a slot: its features and/or its text say where a new element starts."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    type: Literal["element"] = "element"
    schema_version: Literal[1] = 1
    element_id: Identifier
    slot: Identifier
    features: Annotated[tuple[FiniteFloat, ...], Field(max_length=MAX_FEATURES)] = ()
    text: Annotated[str, Field(max_length=MAX_TEXT)] = ""


class Product(BaseModel):
    """A product and, for each slot of its card, the elements that may fill it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    type: Literal["product"] = "product"
    schema_version: Literal[1] = 1
    product_id: Identifier
    slots: Annotated[
        dict[Identifier, Annotated[tuple[Identifier, ...], Field(min_length=1, max_length=MAX_CANDIDATES)]],
        Field(min_length=1, max_length=MAX_SLOTS),
    ]
    features: Annotated[tuple[FiniteFloat, ...], Field(max_length=MAX_FEATURES)] = ()

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        for slot, elements in self.slots.items():
            if len(set(elements)) != len(elements):
                raise ValueError(f"slot {slot!r} of product {self.product_id!r} names an element twice")
        return self


class Catalog:
    """The newest record of every element and product, fed with the records of the topic in order."""

    def __init__(self) -> None:
        self.elements: dict[str, Element] = {}
        self.products: dict[str, Product] = {}

    def apply(self, key: bytes | None, value: bytes | None) -> None:
        """Take one record of the topic `catalog`.

        Raises:
            ValueError: If the key or the value is not of the topic's form; the catalog is unchanged then.
        """
        kind, _, name = (key or b"").decode("utf-8", "replace").partition("/")
        if kind not in ("element", "product") or not name:
            raise ValueError(f"key of a catalog record is {key!r}; expected element/<id> or product/<id>")
        if not value:
            (self.elements if kind == "element" else self.products).pop(name, None)
            return
        try:
            record = Element.model_validate_json(value) if kind == "element" else Product.model_validate_json(value)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"catalog record {key!r}: {field}: {first['msg']}") from None
        if catalog_key(record) != key:
            raise ValueError(f"catalog record {key!r} holds {catalog_key(record)!r}; key and id must be the same")
        if isinstance(record, Element):
            self.elements[name] = record
        else:
            self.products[name] = record


def catalog_key(record: Element | Product) -> bytes:
    """Return the Kafka key of a catalog record."""
    if isinstance(record, Element):
        return b"element/" + record.element_id.encode()
    return b"product/" + record.product_id.encode()
