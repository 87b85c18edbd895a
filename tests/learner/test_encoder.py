"""Reductions of rich content: what they keep, that they stay as they are, and that nothing wild decides them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import learner.encoder as encoder_module
from learner.encoder import MIN_CONTENTS, explained, extended
from streams.contracts.catalog import Element
from streams.contracts.encoders import TEXT, ContentEncoder, HashedText, Kind


def hidden_content(
    m: int, n: int = 64, rank: int = 6, seed: int = 0, noise: float = 0.1
) -> tuple[np.ndarray, np.ndarray]:
    """Return contents (m, n) that are a noisy linear mixture of a few hidden traits, and these (m, rank)."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).standard_normal((rank, n)) / np.sqrt(rank)
    hidden = rng.standard_normal((m, rank))
    return hidden @ mixing + noise * rng.standard_normal((m, n)), hidden


def elements(content: np.ndarray, prefix: str = "e") -> list[Element]:
    return [
        Element(element_id=f"{prefix}{i}", slot="image", features=tuple(row.tolist())) for i, row in enumerate(content)
    ]


def encoded(encoder: ContentEncoder, content: np.ndarray) -> np.ndarray:
    return np.array([encoder.encode("image", tuple(row), "") for row in content])


def r_squared(x: np.ndarray, y: np.ndarray) -> float:
    x = np.column_stack([x, np.ones(len(x))])
    residual = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
    return float(1 - (residual**2).sum() / ((y - y.mean(0)) ** 2).sum())


def test_few_numbers_keep_the_hidden_traits_of_contents_never_seen() -> None:
    content, _ = hidden_content(80)
    encoder = extended(ContentEncoder(8), elements(content))
    assert encoder.reductions[Kind("image", 64)].matrix.shape == (6, 64)  # the noise is left out although there is room
    fresh, hidden = hidden_content(200, seed=1)
    numbers = encoded(encoder, fresh)
    assert not numbers[:, 6:].any()
    assert r_squared(numbers, hidden) > 0.95
    assert encoded(encoder, content)[:, :6].std(0) == pytest.approx(1.0, abs=0.15)


def test_contents_that_differ_in_everything_alike_take_all_numbers() -> None:
    content = np.random.default_rng(0).standard_normal((400, 200))
    assert extended(ContentEncoder(8), elements(content)).reductions[Kind("image", 200)].matrix.shape == (8, 200)


def test_units_of_the_features_do_not_matter() -> None:
    content, hidden = hidden_content(80)
    units = 10.0 ** np.random.default_rng(0).uniform(-3, 3, 64)
    encoder = extended(ContentEncoder(8), elements(content * units))
    assert r_squared(encoded(encoder, content * units), hidden) > 0.95


def test_one_wild_element_does_not_become_a_component() -> None:
    content, hidden = hidden_content(80)
    wild = content.copy()
    wild[3] = 1e6 * np.random.default_rng(5).choice([-1, 1], 64)
    encoder = extended(ContentEncoder(8), elements(wild))
    rest = np.arange(80) != 3
    assert r_squared(encoded(encoder, content[rest]), hidden[rest]) > 0.95
    assert np.abs(encoded(encoder, wild)).max() == 4.0


def test_constant_features_and_contents_without_difference_do_no_harm() -> None:
    content, _ = hidden_content(80, n=20)
    content[:, 4] = 7e5
    encoder = extended(ContentEncoder(8), elements(content))
    assert encoded(encoder, content)[:, 0].std() > 0.5
    same = [Element(element_id=f"e{i}", slot="s", features=(1.0,) * 20) for i in range(100)]
    plain = ContentEncoder(8)
    assert extended(plain, same) is plain


def test_reduction_stays_as_it_was_and_new_kinds_get_theirs() -> None:
    content, _ = hidden_content(80)
    first = extended(ContentEncoder(8), elements(content))
    moved, _ = hidden_content(300, seed=4)
    assert extended(first, elements(moved)) is first
    shorter, _ = hidden_content(60, n=20, seed=5)
    second = extended(first, [*elements(moved), *elements(shorter, "f")])
    assert sorted(second.reductions) == [("image", 20), ("image", 64)]
    assert second.id != first.id
    assert np.array_equal(encoded(second, content), encoded(first, content))


def test_each_slot_has_a_reduction_of_its_own() -> None:
    images, hidden = hidden_content(80)
    titles = 5.0 + 0.3 * np.random.default_rng(3).standard_normal((80, 64)) ** 3
    catalog = [
        *elements(images),
        *(Element(element_id=f"t{i}", slot="title", features=tuple(row.tolist())) for i, row in enumerate(titles)),
    ]
    encoder = extended(ContentEncoder(8), catalog)
    alone = extended(ContentEncoder(8), elements(images))
    assert np.array_equal(encoded(encoder, images), encoded(alone, images))
    assert r_squared(encoded(encoder, images), hidden) > 0.95
    assert sorted(encoder.reductions) == [("image", 64), ("title", 64)]


def test_too_few_contents_are_not_fitted() -> None:
    content, _ = hidden_content(MIN_CONTENTS)
    plain = ContentEncoder(8)
    assert extended(plain, elements(content[:-1])) is plain
    # The same content twice says nothing new.
    assert extended(plain, elements(np.repeat(content[:-1], 2, axis=0))) is plain
    assert Kind("image", 64) in extended(plain, elements(content)).reductions


def test_large_catalog_is_looked_at_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    content, _ = hidden_content(400)
    fresh, hidden = hidden_content(200, seed=1)
    monkeypatch.setattr(encoder_module, "MAX_CONTENTS", 50)
    encoder = extended(ContentEncoder(8), elements(content))
    assert encoder.id != extended(ContentEncoder(8), elements(content[:50])).id
    assert r_squared(encoded(encoder, fresh), hidden) > 0.95


@given(st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_order_of_the_catalog_does_not_matter(seed: int) -> None:
    catalog = elements(hidden_content(50)[0])
    shuffled = [catalog[i] for i in np.random.default_rng(seed).permutation(50)]
    assert extended(ContentEncoder(8), shuffled).id == extended(ContentEncoder(8), catalog).id


def test_explained_share_falls_when_the_catalog_moves_away() -> None:
    content, _ = hidden_content(80)
    encoder = extended(ContentEncoder(8), elements(content))
    fresh, _ = hidden_content(80, seed=1)
    other = np.random.default_rng(7).standard_normal((80, 64))
    assert explained(encoder, elements(fresh))[Kind("image", 64)] > 0.95
    assert explained(encoder, elements(other))[Kind("image", 64)] < 0.3
    assert explained(ContentEncoder(8), elements(fresh)) == explained(encoder, elements(fresh[:10])) == {}


KINDS, THINGS = ("Warm", "Soft", "Bold", "Classic"), ("jacket", "sneakers", "backpack", "dress", "hoodie", "scarf")
ENDS = ("for work", "for winter", "for two")


def test_new_title_starts_where_similar_titles_are() -> None:
    titles = [f"{kind} {thing} {end}" for kind in KINDS for thing in THINGS for end in ENDS]
    known = [t for t in titles if t != "Warm jacket for winter"]
    catalog = [Element(element_id=t, slot="title", text=t) for t in known]
    encoder = extended(ContentEncoder(8, text_encoder=HashedText(256)), catalog)
    assert encoder.reductions[Kind("title", TEXT)].matrix.shape == (8, 256)
    new = encoder.encode("title", (), "Warm jacket for winter")
    distance = np.array([np.linalg.norm(encoder.encode("title", (), title) - new) for title in known])
    nearest = [known[i] for i in np.argsort(distance)[:5]]
    # 14 % of the titles share two of its three parts: five by chance is one in 30,000.
    assert all(sum(part in title for part in ("Warm", "jacket", "for winter")) >= 2 for title in nearest), nearest
