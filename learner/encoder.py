"""Fits what turns rich content into few numbers: the principal components of the catalog's contents.

The content of an element is rich when it has more features than the F numbers of the model, or a text that a text
encoder turns into a vector. Contents of one kind (a slot's, so many features or a text) share a reduction: the
directions in which they differ most, each scaled to the same variance, at most F and only those that differ at least a
fiftieth as much as the first. The others would be noise, and each costs coefficients: with 16 numbers the pairs of four
slots alone have 1,536. For each slot its own, or the first directions of texts would say which slot a text is of.

A reduction is never fitted again once something was learned with it, so the numbers of an element, and what the
coefficients mean, stay as they are; `extended` adds reductions for kinds that had none. `explained` tells how much of
the contents a reduction still sees. Components were measured against a random projection and a network trained on the
clicks: "Rich content" in `benchmarks/README.md`.

Shapes: m distinct contents of a kind, n numbers of each, k <= F components.

References:
    Jolliffe (2002), Principal Component Analysis. Riquelme et al. (2018), Deep Bayesian Bandits Showdown (the learned
    encoder that it was measured against).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from streams.contracts.catalog import Element
from streams.contracts.encoders import TEXT, ContentEncoder, Kind, Reduction

FloatArray = NDArray[np.float64]
Content = TypeVar("Content")

MIN_CONTENTS = 16
"""Distinct contents of a kind below which its components would be chance."""
MIN_VARIANCE = 0.02
"""Variance that a component must have, as a share of the first one's."""
MAX_CONTENTS = 1_024
"""Contents of a kind that are looked at, evenly over all of them: embedding so many texts takes half a minute."""
FAR = 5.0
"""Contents farther than so many times the median distance from the center are drawn in: one wild vector must not become
a component."""


def extended(encoder: ContentEncoder, elements: Iterable[Element]) -> ContentEncoder:
    """Return the encoder with a reduction for each kind of rich content that had none and has enough contents now.

    The same contents in any order give the same encoder.

    Args:
        encoder: The encoder so far; one without reductions to fit all of them.
        elements: The catalog.

    Returns:
        A new encoder, or `encoder` itself if there is nothing to fit.

    Raises:
        TextModelError: If the text model is needed and not there.
    """
    fitted = {
        kind: _components(content_mn, encoder.size, is_text=kind.length == TEXT)
        for kind, content_mn in _rich_contents(encoder, elements).items()
        if kind not in encoder.reductions and len(content_mn) >= MIN_CONTENTS
    }
    new = {kind: reduction for kind, reduction in fitted.items() if reduction is not None}
    if not new:
        return encoder
    return ContentEncoder(encoder.size, text_encoder=encoder.text_encoder, reductions={**encoder.reductions, **new})


def explained(encoder: ContentEncoder, elements: Iterable[Element]) -> dict[Kind, float]:
    """Return by kind how much of what contents differ in can be told from the numbers they are reduced to, in [0, 1].

    The share of variance of a linear regression of the contents on their numbers, over the catalog as it is now (kinds
    of fewer than `MIN_CONTENTS` are left out). A catalog that has moved away from what was fitted falls towards k / n.
    """
    shares = {}
    for kind, content_mn in _rich_contents(encoder, elements).items():
        reduction = encoder.reductions.get(kind)
        if reduction is not None and len(content_mn) >= MIN_CONTENTS:
            numbers_mk = (content_mn - reduction.mean) @ reduction.matrix.T.astype(np.float64)
            numbers_mk -= numbers_mk.mean(0)
            beyond_mn = (content_mn - content_mn.mean(0)) / _units(content_mn, is_text=kind.length == TEXT)
            told_mn = numbers_mk @ np.linalg.lstsq(numbers_mk, beyond_mn)[0]
            total = float((beyond_mn**2).sum())
            shares[kind] = float((told_mn**2).sum()) / total if total > 0 else 1.0
    return shares


def _rich_contents(encoder: ContentEncoder, elements: Iterable[Element]) -> dict[Kind, FloatArray]:
    """Return the distinct contents of each kind in an order of their own, (m, n)."""
    features: dict[Kind, set[tuple[float, ...]]] = {}
    texts: dict[Kind, set[str]] = {}
    for element in elements:
        if len(element.features) > encoder.size:
            features.setdefault(Kind(element.slot, len(element.features)), set()).add(element.features)
        elif element.text and len(element.features) < encoder.size:
            texts.setdefault(Kind(element.slot, TEXT), set()).add(element.text)
    found = {kind: np.array(_evenly(sorted(contents))) for kind, contents in sorted(features.items())}
    if encoder.text_encoder is not None:
        for kind, contents in sorted(texts.items()):
            vectors = np.array([encoder.text_encoder.encode(text) for text in _evenly(sorted(contents))], np.float64)
            found[kind] = vectors[vectors.any(1)]
    return found


def _evenly(contents: list[Content]) -> list[Content]:
    step = -(-len(contents) // MAX_CONTENTS)
    return contents[::step]


def _components(content_mn: FloatArray, size: int, *, is_text: bool) -> Reduction | None:
    """Return the reduction of contents (m, n), or None if they do not differ."""
    center_n = np.median(content_mn, 0)
    unit_n = _units(content_mn, is_text=is_text)
    beyond_mn = (content_mn - center_n) / unit_n
    distance_m = np.linalg.norm(beyond_mn, axis=1)
    near = FAR * float(np.median(distance_m))
    if near > 0:
        beyond_mn *= np.minimum(1.0, near / np.maximum(distance_m, near))[:, None]
    mean_n = beyond_mn.mean(0)
    _, singular, axes = np.linalg.svd(beyond_mn - mean_n, full_matrices=False)
    variance = singular**2 / len(beyond_mn)
    if not variance[0] > 0:
        return None
    k = min(size, int((variance >= MIN_VARIANCE * variance[0]).sum()))
    axes_kn = axes[:k]
    # A component and its opposite are equally good; the larger end points up.
    axes_kn = axes_kn * np.sign(axes_kn[np.arange(k), np.abs(axes_kn).argmax(1)])[:, None]
    matrix_kn = axes_kn / np.sqrt(variance[:k])[:, None] / unit_n
    if is_text:
        # Length 1 in the mean, like the hashed texts whose place they take.
        matrix_kn /= np.sqrt(k)
    return Reduction((center_n + mean_n * unit_n).astype(np.float32), matrix_kn.astype(np.float32))


def _units(content_mn: FloatArray, *, is_text: bool) -> FloatArray:
    """Return what counts as one in each number, (n,): features may be in any unit, and one may hold wild values."""
    if is_text:  # one vector, whose numbers have one unit
        return np.ones(content_mn.shape[1])
    low_n, high_n = np.quantile(content_mn, (0.16, 0.84), axis=0)
    unit_n = (high_n - low_n) / 2  # the standard deviation of a normal distribution
    unit_n = np.where(unit_n > 0, unit_n, content_mn.std(0))
    # A feature that is always the same stays at 0 whatever its unit is.
    return np.where(unit_n > 1e-9 * np.abs(content_mn).max(0), unit_n, 1.0)
