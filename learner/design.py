"""Which coefficient stands where in the core block, and the numbers that an impression gives to each of them.

The core holds what generalizes from one element, product or request to others. An impression becomes x in R^D: 1, the
context, for every slot the content of its element, content x context, and for every pair of slots content x content.
What is particular to a product, an element or a pair of elements stands in `learner.rest`, so D depends neither on how
many products there are nor on how many elements.

D is capped: the pairs, of which there are most, use as many of the content numbers as fit.

The order of the columns follows from the sizes alone. When a vocabulary grows, `Layout.old_columns` says where each old
coefficient stands in the new order; every statistic is moved once and nothing is computed again.

Shapes: N impressions, S slots, Q slot pairs (s, t), s < t, at index t (t - 1) / 2 + s, F content numbers an element, of
which the first G stand in pairs, C context columns, D coefficients.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


def slot_pairs(num_slots: int) -> tuple[list[int], list[int]]:
    """Return the first and the second slot of each pair; a new slot appends pairs and moves none.

    Example:
        >>> slot_pairs(3)
        ([0, 0, 1], [1, 2, 2])
    """
    pairs = [(s, t) for t in range(num_slots) for s in range(t)]
    return [s for s, _ in pairs], [t for _, t in pairs]


@dataclass(frozen=True)
class Layout:
    """Sizes of the feature groups, and from them the column of every coefficient."""

    slots: int = 0
    content: int = 0
    """F: content numbers in use; the trailing ones that no element has had take no columns."""
    context: int = 0
    pair_content: int = 0
    """G: content numbers that stand in pairs, at most F."""

    @classmethod
    def capped(cls, *, slots: int, content: int, context: int, max_coefficients: int, least: Layout) -> Layout:
        """Return the layout whose pairs use as many content numbers as the cap on D leaves room for.

        Args:
            slots: S.
            content: F.
            context: C.
            max_coefficients: The cap; exceeded only if there is no room even without pairs.
            least: No size becomes smaller than its own, for what was learned is kept.
        """
        pairs = slots * (slots - 1) // 2
        room = max_coefficients - (1 + context + slots * content * (1 + context))
        fitting = [g for g in range(content + 1) if pairs * g * g <= max(room, 0)]
        return cls(slots, content, context, max(fitting[-1], least.pair_content))

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Group -> shape of its coefficients, in the order of the columns."""
        pairs = self.slots * (self.slots - 1) // 2
        return {
            "bias": (1,),
            "context": (self.context,),
            "content": (self.slots, self.content),
            "content_context": (self.slots, self.content, self.context),
            "content_pair": (pairs, self.pair_content, self.pair_content),
        }

    @cached_property
    def columns(self) -> dict[str, Tensor]:
        """Group -> its column numbers, in the shape of its coefficients."""
        out, start = {}, 0
        for name, shape in self.shapes.items():
            size = torch.Size(shape).numel()
            out[name] = torch.arange(start, start + size).reshape(shape)
            start += size
        return out

    @cached_property
    def size(self) -> int:
        """D."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    def old_columns(self, old: Layout) -> Tensor:
        """Return where the coefficients of a smaller layout stand in this one, (old D,).

        Raises:
            ValueError: If a size has shrunk.
        """
        for name, shape in old.shapes.items():
            if any(was > now for was, now in zip(shape, self.shapes[name], strict=True)):
                raise ValueError(f"group {name} had shape {shape} and has {self.shapes[name]} now; it may only grow")
        parts = [self.columns[name][tuple(slice(n) for n in shape)].flatten() for name, shape in old.shapes.items()]
        return torch.cat(parts)


@dataclass(frozen=True)
class Rows:
    """N impressions as numbers; index -1 is "not in the vocabulary" or "slot not on this card"."""

    product: Tensor
    """(N,)"""
    context: Tensor
    """(N, C)"""
    chosen: Tensor
    """(N, S): element of each slot."""
    content: Tensor
    """(N, S, F): content of each chosen element; zeros where there is none."""

    def __len__(self) -> int:
        """Return N."""
        return len(self.product)


def design(context_NC: Tensor, content_NSF: Tensor, layout: Layout) -> Tensor:
    """Return the rows x of impressions, (N, D).

    Args:
        context_NC: Contexts.
        content_NSF: Content of the chosen elements, traits included.
        layout: The order of the columns; content beyond its F contributes nothing.
    """
    content_NSF = content_NSF[:, :, : layout.content]
    pair_NSG = content_NSF[:, :, : layout.pair_content]
    first, second = slot_pairs(layout.slots)
    parts = [
        content_NSF.new_ones(len(context_NC), 1),
        context_NC,
        content_NSF,
        content_NSF[..., None] * context_NC[:, None, None, :],
        pair_NSG[:, first, :, None] * pair_NSG[:, second, None, :],
    ]
    return torch.cat([part.flatten(1) for part in parts], 1)
