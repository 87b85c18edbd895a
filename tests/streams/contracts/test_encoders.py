"""Content becomes the same numbers everywhere; reductions travel as tensors; similar texts are close."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.contracts.encoders import TEXT, ContentEncoder, HashedText, Kind, Reduction
from streams.contracts.snapshot import TensorSpec, pack_tensors, unpack_tensors


def test_short_features_are_taken_as_they_are_and_clipped() -> None:
    assert ContentEncoder(4).encode("s", (1.0, -9.0), "").tolist() == [1.0, -4.0, 0.0, 0.0]


def test_long_features_keep_their_variance() -> None:
    rng = np.random.default_rng(0)
    encoder = ContentEncoder(8)
    encoded = np.array([encoder.encode("s", tuple(row), "") for row in rng.standard_normal((400, 64))])
    # 3,200 numbers of standard deviation 1: their variance is within 15 % but for one run in 10^8; the seed is fixed.
    assert np.var(encoded) == pytest.approx(1.0, abs=0.15)
    assert np.abs(np.corrcoef(encoded.T) - np.eye(8)).max() < 0.25


def test_text_is_of_length_one_and_similar_texts_are_close() -> None:
    encoder = ContentEncoder(16)
    warm, warmer, other = (
        encoder.encode("s", (), text) for text in ("Warm winter jacket", "warm Winter jackets", "USB cable 3 m")
    )
    assert np.linalg.norm(warm) == pytest.approx(1.0, abs=1e-6)
    assert warm @ warmer > 0.6 > warm @ other
    assert not encoder.encode("s", (), "  !! ").any()


def test_text_fills_only_what_features_leave_free() -> None:
    encoded = ContentEncoder(4).encode("s", (0.5, 0.25), "warm winter")
    assert encoded[:2].tolist() == [0.5, 0.25]
    assert np.linalg.norm(encoded[2:]) == pytest.approx(1.0, abs=1e-6)


def test_not_finite_features_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        ContentEncoder(4).encode("s", (float("inf"),), "")


def test_unknown_encoder_is_refused() -> None:
    assert ContentEncoder.from_id("hash-1:5").size == 5
    with pytest.raises(ValueError, match="hash-1"):
        ContentEncoder.from_id("hash-2:5")


def test_encoding_is_the_same_in_a_process_with_another_hash_seed() -> None:
    code = "from streams.contracts.encoders import *; print(ContentEncoder(6).encode('s', (), 'Red shoes').tolist())"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(ContentEncoder(6).encode("s", (), "Red shoes").tolist())


WIDE, TEXTS = Kind("s", 20), Kind("s", TEXT)


def reduction(k: int = 3, n: int = 20, seed: int = 0) -> Reduction:
    rng = np.random.default_rng(seed)
    return Reduction(rng.standard_normal(n).astype(np.float32), rng.standard_normal((k, n)).astype(np.float32))


def test_fitted_reduction_takes_features_of_its_slot_and_length_only() -> None:
    fitted = reduction()
    encoder, plain = ContentEncoder(4, reductions={WIDE: fitted}), ContentEncoder(4)
    features = tuple(np.linspace(-1, 1, 20))
    want = fitted.matrix.astype(float) @ (np.array(features) - fitted.mean)
    assert encoder.encode("s", features, "")[:3] == pytest.approx(np.clip(want, -4, 4), abs=1e-6)
    assert encoder.encode("s", features, "")[3] == 0.0
    assert encoder.encode("s", (*features, 1.0), "").tolist() == plain.encode("s", (*features, 1.0), "").tolist()
    assert encoder.encode("t", features, "").tolist() == plain.encode("t", features, "").tolist()
    assert encoder.encode("s", (1.0, 2.0), "").tolist() == [1.0, 2.0, 0.0, 0.0]


def test_text_takes_the_numbers_that_features_leave_free_and_none_beside_reduced_ones() -> None:
    reductions = {WIDE: reduction(k=4), TEXTS: reduction(5, 32, 1)}
    encoder = ContentEncoder(6, text_encoder=HashedText(32), reductions=reductions)
    alone = encoder.encode("s", (), "red shoes")
    vector = HashedText(32).encode("red shoes")
    assert alone[:5] == pytest.approx(
        np.clip(reductions[TEXTS].matrix @ (vector - reductions[TEXTS].mean), -4, 4), abs=1e-5
    )
    assert encoder.encode("s", (1.0, 2.0, 3.0), "red shoes").tolist() == [1.0, 2.0, 3.0, *alone[:3]]
    features = tuple(np.linspace(-0.1, 0.1, 20))
    assert encoder.encode("s", features, "red shoes").tolist() == encoder.encode("s", features, "").tolist()
    assert not encoder.encode("s", (), " !! ").any()  # and not what the mean text is away from nothing


def test_text_is_hashed_until_a_reduction_of_texts_is_fitted() -> None:
    waiting = ContentEncoder(8, text_encoder=HashedText(64))
    assert waiting.encode("s", (), "red shoes").tolist() == ContentEncoder(8).encode("s", (), "red shoes").tolist()


@given(
    sizes=st.dictionaries(st.integers(9, 40), st.integers(1, 8), max_size=4),
    seed=st.integers(0, 1000),
    with_text=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_encoder_that_travels_as_tensors_is_the_same(sizes: dict[int, int], seed: int, with_text: bool) -> None:
    reductions = {Kind("s", n): reduction(k, n, seed) for n, k in sizes.items()}
    text_encoder = HashedText(16) if with_text else None
    if with_text:
        reductions[TEXTS] = reduction(2, 16, seed)
    encoder = ContentEncoder(8, text_encoder=text_encoder, reductions=reductions)
    known = {HashedText(16).id: HashedText(16)}
    again = ContentEncoder.from_id(encoder.id, encoder.tensors(), known)
    assert again.id == encoder.id
    for n in (0, 3, *sizes):
        features = tuple(np.random.default_rng(seed + n).standard_normal(n))
        assert again.encode("s", features, "red shoes").tolist() == encoder.encode("s", features, "red shoes").tolist()


@pytest.mark.parametrize("reductions", [{}, {WIDE: reduction(), Kind("title ü", 30): reduction(8, 30)}])
def test_tensors_pass_through_the_bytes_of_a_snapshot(reductions: dict[Kind, Reduction]) -> None:
    encoder = ContentEncoder(8, reductions=reductions)
    expected = {
        "kinds": TensorSpec("U8", ("bytes",)),
        "mean": TensorSpec("F32", ("means",)),
        "matrix": TensorSpec("F32", ("numbers",)),
    }
    blob = pack_tensors(encoder.tensors())
    assert ContentEncoder.from_id(encoder.id, unpack_tensors(blob, expected)).id == encoder.id


def test_id_tells_encoders_apart() -> None:
    ids = {
        ContentEncoder(8).id,
        ContentEncoder(8, text_encoder=HashedText(16)).id,
        ContentEncoder(8, reductions={WIDE: reduction(3)}).id,
        ContentEncoder(8, reductions={WIDE: reduction(4)}).id,
        ContentEncoder(8, reductions={WIDE: reduction(3, seed=1)}).id,
        ContentEncoder(9, reductions={WIDE: reduction(3)}).id,
    }
    assert len(ids) == 6
    assert ContentEncoder(8, reductions={WIDE: reduction(3)}).id in ids


def test_wrong_tensors_are_refused() -> None:
    encoder = ContentEncoder(8, reductions={WIDE: reduction()})
    tensors = encoder.tensors()
    other = {**tensors, "mean": tensors["mean"] + 1}
    with pytest.raises(ValueError, match="tensors that came with it make"):
        ContentEncoder.from_id(encoder.id, other)
    with pytest.raises(ValueError, match="do not add up"):
        ContentEncoder.from_id(encoder.id, {**tensors, "matrix": tensors["matrix"][:-1]})
    with pytest.raises(ValueError, match="do not add up"):
        ContentEncoder.from_id(encoder.id, {**tensors, "matrix": np.append(tensors["matrix"], np.float32(0))})
    for kinds in (b"", b"[[1]]", b'[["s",20,-3,20]]', b'[["s",20,3,20],["s",20,3,20]]'):
        with pytest.raises(ValueError, match=r"reductions of an element encoder|do not add up"):
            ContentEncoder.from_id(encoder.id, {**tensors, "kinds": np.frombuffer(kinds, np.uint8)})
    with pytest.raises(ValueError, match="not finite"):
        ContentEncoder.from_id(encoder.id, {**tensors, "mean": tensors["mean"] * np.float32("nan")})
    with pytest.raises(ValueError, match="from 20 to 3 numbers; must be from 20 to <= 2"):
        ContentEncoder(2, reductions={WIDE: reduction()})
    with pytest.raises(ValueError, match="from 20 to 3 numbers; must be from 21"):
        ContentEncoder(8, reductions={Kind("s", 21): reduction()})
    with pytest.raises(ValueError, match=r"must be \(n,\) and \(k, n\)"):
        Reduction(np.zeros(3, np.float32), np.zeros((2, 4), np.float32))


def test_missing_text_encoder_is_named() -> None:
    encoder_id = ContentEncoder(8, text_encoder=HashedText(16)).id
    with pytest.raises(ValueError, match=r"needs text encoder 'ngrams-1-16'; there are: \['ngrams-1-8'\]"):
        ContentEncoder.from_id(encoder_id, None, {"ngrams-1-8": HashedText(8)})
