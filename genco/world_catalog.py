"""What a simulated world shows of itself: catalog records, requests as JSON, and the words of its elements."""

import math
from typing import NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt


class ElementRecord(TypedDict):
    """An element as the catalog knows it."""

    element_id: str
    slot: str
    features: list[float]
    text: str


class ProductRecord(TypedDict):
    """A product as the catalog knows it: its candidates in each slot."""

    product_id: str
    slots: dict[str, list[str]]


class Catalog(NamedTuple):
    """What can be shown at one time."""

    elements: list[ElementRecord]
    products: list[ProductRecord]


class Context(TypedDict):
    """What a request tells about the shopper."""

    device: str
    segment: str
    hour: int


class Request(TypedDict):
    """A request for a decision, ready for JSON."""

    product_id: str
    context: Context
    candidates: dict[str, list[str]]


# A word for each part of an element's text; the content feature of the same position says which, from low to high.
_WORDS = {
    "title": (
        "Classic|Soft|Light|Everyday|Bold|Premium",
        "Cotton|Linen|Denim|Wool|Leather|Recycled",
        "Shirt|Sneakers|Jacket|Backpack|Dress|Hoodie",
        "for Work|for Weekends|for Summer|for Travel|for Two|for Winter",
    ),
    "image": (
        "studio|street|beach|mountain|home|city",
        "photo|close-up|flat lay|portrait|collage|sketch",
        "in soft light|in bright colors|in black and white|at dawn|at night|on white",
    ),
    "highlight": (
        "Free returns|Fast delivery|Two-year warranty|Gift wrapping|Easy care|Hand-finished",
        "this week|for members|on every order|at no extra cost|in all sizes|while stocks last",
    ),
    "tag": ("New|Sale|Popular|Limited|Eco|Top rated", "today|pick|deal|edition|find|choice"),
}
_OTHER_WORDS = ("plain|warm|clear|lively|bold|loud", "one|two|three|four|five|six")


def element_text(slot: str, content: npt.NDArray[np.float64]) -> str:
    """Return marketing words that follow from an element's content: elements of like content share words."""
    parts = [] if slot in _WORDS else [slot]
    for position, choices in enumerate(_WORDS.get(slot, _OTHER_WORDS)):
        words = choices.split("|")
        quantile = (1 + math.erf(content[position % len(content)] / math.sqrt(2))) / 2
        parts.append(words[min(int(quantile * len(words)), len(words) - 1)])
    return " ".join(parts)
