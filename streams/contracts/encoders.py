"""What an element is becomes F numbers: its features as they are, then its text, or its features reduced.

An encoder is pure and has an `id`: two encoders with one id give the same numbers, in every process and release. So a
server encodes an element that its snapshot has never met, and it starts where elements like it are. The learner fits
the reductions of rich content to its catalog (`learner.encoder`), for each slot its own, because only elements of one
slot are ever compared; they travel in the snapshot as tensors.

Shapes: n numbers of rich content, k <= F numbers it is reduced to.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from streams.contracts.features import CLIP, MAX_CONTENT_SIZE, FloatArray

TEXT = 0
"""Length of the features that a reduction of texts takes the place of, in its `Kind`."""


class Kind(NamedTuple):
    """Which contents share a reduction: those of a slot with as many features, or its texts."""

    slot: str
    length: int
    """Number of features, or `TEXT`."""


class ElementEncoder(Protocol):
    """The content of an element as F numbers."""

    @property
    def id(self) -> str:
        """Version: equal ids, equal numbers."""

    @property
    def size(self) -> int:
        """F."""

    def encode(self, slot: str, features: Sequence[float], text: str) -> FloatArray:
        """Return the (F,) numbers of an element of a slot, each in [-4, 4]; zeros without content.

        Raises:
            ValueError: If a feature is not finite.
        """


class TextEncoder(Protocol):
    """A text as a vector of length 1, or zeros if there is nothing in it."""

    @property
    def id(self) -> str:
        """Version: equal ids, equal vectors."""

    @property
    def size(self) -> int:
        """Numbers of a vector."""

    def encode(self, text: str) -> FloatArray:
        """Return the (size,) vector of a text."""


@dataclass(frozen=True)
class Reduction:
    """An affine map from n numbers to k: matrix (k, n) times what is beyond the mean (n,), both float32."""

    mean: FloatArray
    matrix: FloatArray

    def __post_init__(self) -> None:
        """Refuse shapes that do not fit and numbers that are not finite."""
        k, n = self.matrix.shape
        if self.mean.shape != (n,) or not 1 <= k <= MAX_CONTENT_SIZE or n < 1:
            raise ValueError(
                f"a reduction has mean {self.mean.shape} and matrix {self.matrix.shape}; must be (n,) and (k, n)"
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.matrix).all()):
            raise ValueError(f"the reduction of {n} numbers holds a value that is not finite")

    def apply(self, vector: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the (k,) numbers of a vector (n,)."""
        return self.matrix.astype(np.float64) @ (vector - self.mean)


class ContentEncoder:
    """The encoder of this release.

    At most F features are taken as they are. More are reduced, by the reduction that was fitted to such contents of the
    slot, or else by a fixed random matrix with orthonormal rows, which keeps the variance of a number (Johnson and
    Lindenstrauss 1984). Text goes into the numbers that features leave free which are taken as they are: on top of them
    it would blur what is exact, and beside reduced ones its numbers would tell little and cost clicks. It becomes
    signed hashed counts of words and of character trigrams (Weinberger et al. 2009) of length 1, or what a text encoder
    says, once a reduction of that was fitted.

    Example:
        >>> ContentEncoder(4).encode("image", (1.0, -2.0), "")
        array([ 1., -2.,  0.,  0.], dtype=float32)
    """

    def __init__(
        self,
        content_size: int = 8,
        *,
        text_encoder: TextEncoder | None = None,
        reductions: Mapping[Kind, Reduction] | None = None,
    ) -> None:
        """Build an encoder.

        Args:
            content_size: F, in [1, 16].
            text_encoder: What reads texts; None: they are hashed straight into the free numbers.
            reductions: Fitted reductions; those of texts take what `text_encoder` gives.

        Raises:
            ValueError: If a reduction does not fit its kind or F.
        """
        if not 1 <= content_size <= MAX_CONTENT_SIZE:
            raise ValueError(f"content_size is {content_size}; must be in [1, {MAX_CONTENT_SIZE}]")
        self.size = content_size
        self.text_encoder = text_encoder
        self.reductions = dict(sorted((reductions or {}).items()))
        for kind, reduction in self.reductions.items():
            k, n = reduction.matrix.shape
            want = kind.length if kind.length != TEXT else text_encoder.size if text_encoder else 0
            if k > content_size or n != want:
                raise ValueError(
                    f"reduction {tuple(kind)} is from {n} to {k} numbers; must be from {want} to <= {content_size}"
                )

    @cached_property
    def id(self) -> str:
        """`hash-1:F`, or `content-1:F:<text encoder>:<hash of the reductions>`."""
        if self.text_encoder is None and not self.reductions:
            return f"hash-1:{self.size}"
        digest = hashlib.sha256()
        for array in self.tensors().values():
            digest.update(f"{array.shape}".encode() + array.tobytes())
        return f"content-1:{self.size}:{self.text_encoder.id if self.text_encoder else ''}:{digest.hexdigest()[:16]}"

    def encode(self, slot: str, features: Sequence[float], text: str) -> FloatArray:
        """See `ElementEncoder`; the text model, if any, is loaded by the first text.

        Raises:
            ValueError: If a feature is not finite.
            TextModelError: If the text model is not installed or not the one that the id names.
        """
        x = np.asarray(features, np.float64)
        if not np.isfinite(x).all():
            raise ValueError(f"element features hold a value that is not finite: {x[~np.isfinite(x)][0]}")
        if len(x) > self.size:
            fitted = self.reductions.get(Kind(slot, len(x)))
            parts = [fitted.apply(x) if fitted else _projection(self.size, len(x)) @ x]
        else:
            parts = [x, self._text(slot, text, self.size - len(x))]
        numbers = np.concatenate(parts)
        out = np.zeros(self.size)
        out[: len(numbers)] = numbers
        clipped: FloatArray = np.clip(out, -CLIP, CLIP).astype(np.float32)
        return clipped

    def _text(self, slot: str, text: str, room: int) -> NDArray[np.float64]:
        if not room or not text:
            return np.zeros(0)
        fitted = self.reductions.get(Kind(slot, TEXT))
        if self.text_encoder is None or fitted is None:
            return hashed(text, room)
        vector = self.text_encoder.encode(text).astype(np.float64)
        # Its numbers are in the order of what they explain. Nothing to read is no text, not one far from the mean.
        return fitted.apply(vector)[:room] if vector.any() else np.zeros(0)

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Return the reductions as tensors of a snapshot.

        Returns:
            `kinds`: uint8, JSON of slot, length, k and n of each; `mean` and `matrix`: float32, their numbers, one
            reduction after the other.
        """
        kinds = [(*kind, *reduction.matrix.shape) for kind, reduction in self.reductions.items()]
        empty = np.zeros(0, np.float32)
        return {
            "kinds": np.frombuffer(msgspec.json.encode(kinds), np.uint8),
            "mean": np.concatenate([empty, *(r.mean for r in self.reductions.values())]),
            "matrix": np.concatenate([empty, *(r.matrix.ravel() for r in self.reductions.values())]),
        }

    @classmethod
    def from_id(
        cls,
        encoder_id: str,
        tensors: Mapping[str, NDArray[Any]] | None = None,
        text_encoders: Mapping[str, TextEncoder] | None = None,
    ) -> ContentEncoder:
        """Return the encoder of that id.

        Args:
            encoder_id: As `id` says.
            tensors: What `tensors` returned; None: there are no reductions.
            text_encoders: The text encoders that there are, by id.

        Raises:
            ValueError: If this release has no such encoder, or the tensors are not those of the id.
        """
        match = re.fullmatch(r"hash-1:(\d{1,2})|content-1:(\d{1,2}):(.*):([0-9a-f]{16})", encoder_id)
        if match is None:
            raise ValueError(f"element encoder is {encoder_id!r}; this release knows hash-1:<size> and content-1:...")
        text_id, text_encoders = match[3] or "", text_encoders or {}
        if text_id and text_id not in text_encoders:
            known = sorted(text_encoders) or "none"
            raise ValueError(f"element encoder {encoder_id!r} needs text encoder {text_id!r}; there are: {known}")
        encoder = cls(
            int(match[1] or match[2]),
            text_encoder=text_encoders[text_id] if text_id else None,
            reductions=_unpacked(tensors) if tensors else None,
        )
        if encoder.id != encoder_id:
            raise ValueError(f"element encoder is {encoder_id!r}; the tensors that came with it make {encoder.id!r}")
        return encoder


class HashedText:
    """Signed hashed counts of words and trigrams: texts that share words and word parts are close."""

    def __init__(self, size: int = 256) -> None:
        if size < 1:
            raise ValueError(f"size of hashed texts is {size}; must be at least 1")
        self.size = size
        self.id = f"ngrams-1-{size}"

    def encode(self, text: str) -> FloatArray:
        """Return the (size,) vector of a text."""
        return hashed(text, self.size).astype(np.float32)


def _unpacked(tensors: Mapping[str, NDArray[Any]]) -> dict[Kind, Reduction]:
    mean, matrix = tensors["mean"], tensors["matrix"]
    try:
        kinds = msgspec.json.decode(tensors["kinds"].tobytes(), type=list[tuple[str, int, int, int]])
    except msgspec.MsgspecError as error:
        raise ValueError(f"reductions of an element encoder: {error}") from None
    if any(min(sizes) < 0 for _, *sizes in kinds) or (
        (len(mean), len(matrix)) != (sum(n for *_, n in kinds), sum(k * n for *_, k, n in kinds))
    ):
        raise ValueError(
            f"an element encoder has {len(mean)} + {len(matrix)} numbers, which its {kinds} do not add up to"
        )
    reductions = {}
    for slot, length, k, n in kinds:
        reductions[Kind(slot, length)] = Reduction(mean[:n], matrix[: k * n].reshape(k, n))
        mean, matrix = mean[n:], matrix[k * n :]
    return reductions


def hashed(text: str, size: int) -> NDArray[np.float64]:
    """Return signed counts of words and trigrams in `size` buckets, of length 1 (zeros without any)."""
    out = np.zeros(size)
    words = re.findall(r"\w+", text.lower())
    if not words or not size:
        return out
    spaced = f" {' '.join(words)} "
    for gram in [f"w:{word}" for word in words] + [f"c:{spaced[i : i + 3]}" for i in range(len(spaced) - 2)]:
        # crc32 and not hash(): Python salts the latter in every process.
        code = zlib.crc32(gram.encode())
        out[(code >> 1) % size] += 1.0 if code & 1 else -1.0
    return _unit(out)


def _unit(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    length = float(np.linalg.norm(vector))
    return vector / length if length > 0 else vector


@lru_cache(maxsize=64)
def _projection(rows: int, columns: int) -> NDArray[np.float64]:
    normal = np.random.default_rng([rows, columns]).standard_normal((columns, rows))
    q, r = np.linalg.qr(normal)
    # QR leaves the signs of the columns open; the diagonal of R fixes them, so every LAPACK gives the same matrix.
    result: NDArray[np.float64] = (q * np.sign(np.diag(r))).T
    return result
