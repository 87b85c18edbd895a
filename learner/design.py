"""Which coefficient stands where in the core block, and the numbers that an impression gives to each of them.

An impression becomes x in R^D: 1, the context, for every slot the content of its element, content x context, for every
pair of slots content x content (dense, the first D_1 columns), and one-hots of the product and of each element (the
other D_2 columns). The dense part makes a matrix; the one-hots stay column numbers, so that their sums are additions of
rows instead of products with zeros.

The order of the columns follows from the sizes alone. When a vocabulary grows, `Layout.old_columns` says where each old
coefficient stands in the new order; every statistic is moved once and nothing is computed again.

Shapes: N impressions, S slots, Q slot pairs (s, t), s < t, at index t (t - 1) / 2 + s, F content numbers an element,
C context columns, P products, E elements, D = D_1 + D_2 coefficients, J = 1 + S one-hots an impression.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

DENSE = ("bias", "context", "content", "content_context", "content_pair")
GROUPS = (*DENSE, "product", "element")


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
    """Content numbers in use: the trailing ones that no element has had take no columns."""
    context: int = 0
    products: int = 0
    elements: int = 0

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Group -> shape of its coefficients, in the order of the columns."""
        pairs = self.slots * (self.slots - 1) // 2
        return {
            "bias": (1,),
            "context": (self.context,),
            "content": (self.slots, self.content),
            "content_context": (self.slots, self.content, self.context),
            "content_pair": (pairs, self.content, self.content),
            "product": (self.products,),
            "element": (self.elements,),
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
    def dense_size(self) -> int:
        """D_1."""
        return sum(torch.Size(self.shapes[name]).numel() for name in DENSE)

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


@dataclass(frozen=True)
class Design:
    """The rows x of N impressions."""

    dense: Tensor
    """(N, D_1)"""
    hot: Tensor
    """(N, J): columns of the ones among the last D_2; D_2 itself stands for none."""
    num_hot: int
    """D_2."""

    def times(self, theta_KD: Tensor) -> Tensor:
        """Return x . theta, (N, K)."""
        width = self.dense.shape[1]
        hot_K = torch.nn.functional.pad(theta_KD[:, width:], (0, 1))
        return self.dense @ theta_KD[:, :width].T + hot_K[:, self.hot].sum(-1).T

    def transposed_times(self, value_NK: Tensor) -> Tensor:
        """Return sum_n x_n value_n, (K, D)."""
        hot = value_NK.new_zeros(self.num_hot + 1, value_NK.shape[1])
        for hot_N in self.hot.T:
            hot.index_add_(0, hot_N, value_NK)
        return torch.cat([self.dense.T @ value_NK, hot[:-1]]).T

    def gram(self, weight_N: Tensor) -> Tensor:
        """Return sum_n weight_n x_n x_n', (D, D)."""
        width = self.dense.shape[1]
        out = weight_N.new_empty(width + self.num_hot, width + self.num_hot)
        weighted_ND1 = self.dense * weight_N[:, None]
        torch.mm(self.dense.T, weighted_ND1, out=out[:width, :width])
        mixed = weight_N.new_zeros(self.num_hot + 1, width)
        square = weight_N.new_zeros((self.num_hot + 1) ** 2)
        for first_N in self.hot.T:
            mixed.index_add_(0, first_N, weighted_ND1)
            for second_N in self.hot.T:
                square.index_add_(0, first_N * (self.num_hot + 1) + second_N, weight_N)
        out[width:, :width] = mixed[:-1]
        out[:width, width:] = mixed[:-1].T
        out[width:, width:] = square.view(self.num_hot + 1, -1)[:-1, :-1]
        return out


def design(rows: Rows, layout: Layout) -> Design:
    """Return the rows x of impressions in the order of a layout; what the layout lacks contributes nothing."""
    n = len(rows)
    first, second = slot_pairs(layout.slots)
    content_NSF = rows.content[:, :, : layout.content]
    parts = [
        content_NSF.new_ones(n, 1),
        rows.context,
        content_NSF,
        content_NSF[..., None] * rows.context[:, None, None, :],
        content_NSF[:, first, :, None] * content_NSF[:, second, None, :],
    ]
    none = layout.products + layout.elements
    product_N1 = torch.where((rows.product >= 0) & (rows.product < layout.products), rows.product, none)[:, None]
    known_NS = (rows.chosen >= 0) & (rows.chosen < layout.elements)
    element_NS = torch.where(known_NS, rows.chosen + layout.products, none)
    return Design(torch.cat([p.flatten(1) for p in parts], 1), torch.cat([product_N1, element_NS], 1), none)
