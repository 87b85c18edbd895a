"""Columns keep their meaning when the vocabulary grows, and their number stays under its cap."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.design import Layout, design, slot_pairs


def content_of(n: int, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    content_NSF = torch.randn(n, layout.slots, layout.content, generator=rng)
    content_NSF[::3, 0] = 0.0  # a slot that is not on the card
    return torch.randn(n, layout.context, generator=rng), content_NSF


def test_rows_hold_every_product_of_their_parts() -> None:
    layout = Layout(slots=3, content=2, context=4, pair_content=1)
    context_NC, content_NSF = content_of(5, layout)
    x_ND = design(context_NC, content_NSF, layout)
    assert x_ND.shape == (5, layout.size)
    for n in range(5):
        c, z = context_NC[n], content_NSF[n]
        pairs = [z[0, :1], z[1, :1], z[2, :1]]
        expected = [torch.ones(1), c, z.flatten(), torch.einsum("sf,c->sfc", z, c).flatten()]
        expected += [pairs[0] * pairs[1], pairs[0] * pairs[2], pairs[1] * pairs[2]]
        torch.testing.assert_close(x_ND[n], torch.cat(expected))


def test_old_coefficients_keep_their_meaning_in_a_larger_layout() -> None:
    old = Layout(slots=2, content=2, context=3, pair_content=2)
    new = Layout(slots=4, content=3, context=5, pair_content=3)
    context_NC, content_NSF = content_of(40, old)
    theta_D = torch.randn(old.size, generator=torch.Generator().manual_seed(2))
    grown_D = torch.zeros(new.size)
    grown_D[new.old_columns(old)] = theta_D
    pad = torch.nn.functional.pad
    large = design(pad(context_NC, (0, 2)), pad(content_NSF, (0, 1, 0, 2)), new)
    torch.testing.assert_close(large @ grown_D, design(context_NC, content_NSF, old) @ theta_D)


def test_layout_may_not_shrink() -> None:
    with pytest.raises(ValueError, match="only grow"):
        Layout(slots=1).old_columns(Layout(slots=2))


@given(st.integers(0, 12), st.integers(0, 16), st.integers(0, 32), st.integers(1, 6000))
def test_pairs_give_way_to_the_cap_and_nothing_else_does(slots: int, content: int, context: int, most: int) -> None:
    layout = Layout.capped(
        slots=slots, content=content, context=context, max_coefficients=most, least=Layout(pair_content=0)
    )
    assert (layout.slots, layout.content, layout.context) == (slots, content, context)
    assert layout.size <= most or layout.pair_content == 0 or slots < 2
    if layout.pair_content < content:
        assert Layout(slots, content, context, layout.pair_content + 1).size > most


def test_cap_takes_nothing_back_that_was_learned() -> None:
    small = Layout.capped(slots=3, content=8, context=4, max_coefficients=500, least=Layout())
    large = Layout.capped(slots=4, content=8, context=4, max_coefficients=500, least=small)
    assert large.pair_content == small.pair_content == 8
    large.old_columns(small)


def test_pairs_of_a_new_slot_come_last() -> None:
    first, second = slot_pairs(4)
    assert list(zip(first, second, strict=True))[:3] == list(zip(*slot_pairs(3), strict=True))
