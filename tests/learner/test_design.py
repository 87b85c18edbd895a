"""Columns keep their meaning when the vocabulary grows, and the sparse sums equal the dense ones."""

import pytest
import torch
from torch import Tensor

from learner.design import Design, Layout, Rows, design, slot_pairs


def rows(n: int = 40, layout: Layout | None = None) -> Rows:
    layout = layout or Layout(slots=3, content=2, context=4, products=5, elements=7)
    rng = torch.Generator().manual_seed(0)
    chosen = torch.randint(-1, layout.elements, (n, layout.slots), generator=rng)
    return Rows(
        product=torch.randint(-1, layout.products, (n,), generator=rng),
        context=torch.randn(n, layout.context, generator=rng),
        chosen=chosen,
        content=torch.randn(n, layout.slots, layout.content, generator=rng) * (chosen >= 0)[..., None],
    )


def dense(x: Design) -> Tensor:
    hot = torch.zeros(len(x.dense), x.num_hot + 1)
    for column in x.hot.T:
        hot[torch.arange(len(hot)), column] += 1.0
    return torch.cat([x.dense, hot[:, :-1]], 1)


def test_sums_equal_those_of_the_dense_matrix() -> None:
    layout = Layout(slots=3, content=2, context=4, products=5, elements=7)
    x = design(rows(), layout)
    X_ND, weight_N = dense(x), torch.rand(40, generator=torch.Generator().manual_seed(1))
    theta_KD = torch.randn(2, layout.size, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(x.times(theta_KD), X_ND @ theta_KD.T)
    torch.testing.assert_close(x.transposed_times(x.times(theta_KD)), (X_ND.T @ (X_ND @ theta_KD.T)).T)
    torch.testing.assert_close(x.gram(weight_N), X_ND.T @ (X_ND * weight_N[:, None]))


def test_old_coefficients_keep_their_meaning_in_a_larger_layout() -> None:
    old = Layout(slots=2, content=2, context=3, products=2, elements=3)
    new = Layout(slots=4, content=3, context=5, products=4, elements=9)
    small = rows(layout=old)
    theta_KD = torch.randn(1, old.size, generator=torch.Generator().manual_seed(2))
    grown_KD = torch.zeros(1, new.size)
    grown_KD[:, new.old_columns(old)] = theta_KD
    n = len(small)
    large = Rows(
        product=small.product,
        context=torch.nn.functional.pad(small.context, (0, 2)),
        chosen=torch.nn.functional.pad(small.chosen, (0, 2), value=-1),
        content=torch.nn.functional.pad(small.content, (0, 1, 0, 2)),
    )
    torch.testing.assert_close(design(large, new).times(grown_KD), design(small, old).times(theta_KD))
    assert n == 40


def test_layout_may_not_shrink() -> None:
    with pytest.raises(ValueError, match="only grow"):
        Layout(slots=1).old_columns(Layout(slots=2))


def test_pairs_of_a_new_slot_come_last() -> None:
    first, second = slot_pairs(4)
    assert list(zip(first, second, strict=True))[:3] == list(zip(*slot_pairs(3), strict=True))
