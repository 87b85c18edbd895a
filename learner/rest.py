"""The diagonal rest: what is particular to a product, to an element, and to a pair of elements.

    o = product(p) . (1, context) + sum_s element(e_s) . (1, context) + sum_{s<t} pair(e_s, e_t)

These effects are many and each is seen rarely, so each keeps a mean and a variance of its own, and no covariance. They
are learned one example after the other, given the core's logit, by an extended Kalman step: with p the click
probability, w = p (1 - p), v = sum of x^2 times variance, s the example's weight,

    mean <- mean + variance x s (y - p) / (1 + s w v),    variance <- variance - (variance x)^2 s w / (1 + s w v)

Memories differ in what they expect of pairs, besides in what they forget: where content tells little of how elements
go together, the memory with wide priors predicts best, elsewhere it would only learn noise.

What a memory forgets moves variances towards the prior by f and means to zero by f / 2 for each 1,000 examples. A row
is moved when it is touched next, so an update costs what its examples touch, however many products there are.

Pairs get a row when they are first seen; when there is no room, those that were not seen for longest make some.

Shapes: N examples, K memories, S slots, Q pairs of slots, C context columns, P products, E elements, R pairs with a
row, U rows that a batch touches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from learner.design import Rows, slot_pairs

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

TABLES = ("product", "element", "pair")
_HALF = 32  # bits of an element's index in the code of a pair


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """One way to remember: each memory sees every example and keeps effects of its own."""

    forget: float = 0.0
    """What it forgets for each 1,000 examples, in [0, 1)."""
    pair_width: float = 1.0
    """Factor on the prior standard deviation of the effects of pairs of elements."""

    def __post_init__(self) -> None:
        """Refuse what cannot be learned with."""
        if not (0.0 <= self.forget < 1.0 and self.pair_width > 0.0):
            raise ValueError(
                f"memory forgets {self.forget} with pair_width {self.pair_width}; must be in [0, 1) and > 0"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class RestSettings:
    """Standard deviations of the effects before any click, in logits, and how many pairs there may be."""

    product: float = 0.7
    product_context: float = 0.2
    element: float = 0.08
    element_context: float = 0.03
    pair: float = 0.03
    max_pairs: int = 65_536

    def prior(self, table: str, width: int) -> FloatArray:
        """Return the prior variances of a row, (width,): its own effect, then its effects with each context column."""
        own, by_context = {
            "product": (self.product, self.product_context),
            "element": (self.element, self.element_context),
            "pair": (self.pair, 0.0),
        }[table]
        return np.array([own**2] + [by_context**2] * (width - 1))


@dataclass(slots=True)
class _Table:
    """Means and variances (K, rows, width), and when each row was moved last, in examples learned."""

    mean: FloatArray
    variance: FloatArray
    moved: FloatArray


@dataclass(slots=True)
class Touched:
    """The rows of a batch, forgotten up to now: copies, until `DiagonalRest.put` writes them back."""

    keys: dict[str, IntArray]
    """Table -> (U,) row numbers; of pairs, their codes."""
    index: dict[str, IntArray]
    """Table -> place of each example's rows among them, -1 for none: (N,), (N, S), (N, Q)."""
    mean: dict[str, FloatArray]
    """Table -> (K, U, width)"""
    variance: dict[str, FloatArray]
    context: FloatArray
    """(N, 1 + C): a leading one, then the context."""

    def logits(self) -> FloatArray:
        """Return the logit of each memory, (N, K)."""
        nothing = np.zeros(len(self.context))
        return np.stack([self._pass(k, False, nothing, nothing, nothing) for k in range(len(self.mean["product"]))], 1)

    def appeal(self) -> FloatArray:
        """Return the products' part of it, (N, K)."""
        mean_KUC, index_N = self.mean["product"], self.index["product"]
        if not mean_KUC.shape[1]:
            return np.zeros((len(index_N), len(mean_KUC)))
        appeal_KN = np.einsum("knc,nc->kn", mean_KUC[:, index_N], self.context)
        return np.where(index_N[:, None] >= 0, appeal_KN.T, 0.0)

    def learn(self, core_NK: FloatArray, label_N: FloatArray, weight_N: FloatArray) -> None:
        """Learn the examples one after the other, given the core's logits."""
        for k in range(core_NK.shape[1]):
            self._pass(k, True, np.ascontiguousarray(core_NK[:, k]), label_N, weight_N)

    def _pass(self, k: int, learn: bool, core_N: FloatArray, label_N: FloatArray, weight_N: FloatArray) -> FloatArray:
        index, mean, variance = self.index, self.mean, self.variance
        out_N = np.empty(len(self.context))
        _filter(
            learn,
            core_N,
            index["product"],
            index["element"],
            index["pair"],
            self.context,
            label_N,
            weight_N,
            mean["product"][k],
            variance["product"][k],
            mean["element"][k],
            variance["element"][k],
            mean["pair"][k],
            variance["pair"][k],
            out_N,
        )
        return out_N


class DiagonalRest:
    """The tables of all memories."""

    def __init__(self, memories: tuple[Memory, ...], settings: RestSettings) -> None:
        self.settings = settings
        self._forget_K1 = np.array([[memory.forget] for memory in memories])
        self._pair_width_K = np.array([memory.pair_width for memory in memories])
        self._tables = {name: self._empty(name, 0, 1) for name in TABLES}
        # Code of a pair, see `_codes`, -> its row.
        self._pair_rows: dict[int, int] = {}

    def _empty(self, name: str, rows: int, width: int) -> _Table:
        shape = (len(self._pair_width_K), rows, width)
        return _Table(np.zeros(shape), np.broadcast_to(self._prior(name, width), shape).copy(), np.zeros(rows))

    def _prior(self, name: str, width: int) -> FloatArray:
        """Return the prior variances of a row, (K, 1, width)."""
        factor_K = self._pair_width_K**2 if name == "pair" else np.ones(len(self._pair_width_K))
        return factor_K[:, None, None] * self.settings.prior(name, width)

    def grow(self, *, products: int, elements: int, context: int) -> None:
        """Make room for new names; they start at their prior."""
        self._resize("product", products, 1 + context)
        self._resize("element", elements, 1 + context)

    def _resize(self, name: str, rows: int, width: int) -> None:
        old = self._tables[name]
        _, num_rows, num_columns = old.mean.shape
        if rows <= num_rows and width == num_columns:
            return
        if rows > num_rows:
            # Room for half as many more, so that growing by one name at a time copies nothing most of the time.
            rows = max(rows, num_rows * 3 // 2)
        rows = max(rows, num_rows)
        new = self._empty(name, rows, width)
        new.mean[:, :num_rows, :num_columns] = old.mean
        new.variance[:, :num_rows, :num_columns] = old.variance
        new.moved[:num_rows] = old.moved
        self._tables[name] = new

    def reset(self, name: str, rows: IntArray) -> None:
        """Bring rows of a table back to their prior: their names are gone, others take the places."""
        table = self._tables[name]
        table.mean[:, rows] = 0.0
        table.variance[:, rows] = self._prior(name, table.mean.shape[2])
        table.moved[rows] = 0.0
        if name == "element":
            stale_R = np.isin(self.pairs, rows).any(1)
            if stale_R.any():
                self._forget_pairs(np.flatnonzero(stale_R))

    def widen(self, share: float) -> None:
        """Forget a share of what is known of elements and pairs, in every memory."""
        for name in ("element", "pair"):
            table = self._tables[name]
            prior = self._prior(name, table.mean.shape[2])
            table.mean *= 1.0 - share / 2
            table.variance += share * (prior - table.variance)

    def reset_context(self, columns: IntArray) -> None:
        """Bring the effects with context columns back to the prior: other categories take the columns."""
        for name in ("product", "element"):
            table = self._tables[name]
            table.mean[:, :, 1 + columns] = 0.0
            table.variance[:, :, 1 + columns] = self._prior(name, table.mean.shape[2])[..., 1 + columns]

    def touch(self, rows: Rows, now: int) -> Touched:
        """Return the rows of a batch after `now` learned examples; pairs that have none yet come with their prior."""
        context_NC = rows.context.cpu().double().numpy()
        chosen_NS = rows.chosen.cpu().numpy()
        keys = {"product": rows.product.cpu().numpy(), "element": chosen_NS, "pair": _codes(chosen_NS)}
        touched = Touched({}, {}, {}, {}, np.concatenate([np.ones((len(context_NC), 1)), context_NC], 1))
        for name, key in keys.items():
            found, index = np.unique(key, return_inverse=True)
            index = index.reshape(key.shape)
            if len(found) and found[0] < 0:  # -1, the smallest, stands for none
                found, index = found[1:], index - 1
            places = self._places(found) if name == "pair" else found
            touched.keys[name], touched.index[name] = found, np.ascontiguousarray(index)
            touched.mean[name], touched.variance[name] = self._forgotten(name, places, now)
        return touched

    def _places(self, codes: IntArray) -> IntArray:
        """Return the row of each pair, -1 where it has none."""
        return np.array([self._pair_rows.get(code, -1) for code in codes.tolist()], np.int64)

    def _forgotten(self, name: str, rows: IntArray, now: int) -> tuple[FloatArray, FloatArray]:
        """Return means and variances (K, U, width) of rows as they are now; row -1 is a new one."""
        table = self._tables[name]
        num_memories, _, width = table.mean.shape
        prior = self._prior(name, width)
        if not table.mean.shape[1]:
            shape = (num_memories, len(rows), width)
            return np.zeros(shape), np.broadcast_to(prior, shape).copy()
        age_U = (now - table.moved[rows]) / 1000.0
        is_new_U = (rows < 0)[:, None]
        kept_KU1 = ((1.0 - self._forget_K1) ** age_U)[..., None]
        halved_KU1 = ((1.0 - self._forget_K1 / 2) ** age_U)[..., None]
        mean = np.where(is_new_U, 0.0, table.mean[:, rows] * halved_KU1)
        variance = np.where(is_new_U, prior, prior + (table.variance[:, rows] - prior) * kept_KU1)
        return mean, variance

    def put(self, touched: Touched, now: int) -> None:
        """Write rows back, learned by a batch before which there had been `now` examples."""
        for name, keys in touched.keys.items():
            mean, variance = touched.mean[name], touched.variance[name]
            if name == "pair":
                keys, kept = self._add_pairs(keys)
                mean, variance = mean[:, kept], variance[:, kept]
            table = self._tables[name]
            table.mean[:, keys], table.variance[:, keys] = mean, variance
            table.moved[keys] = now

    def _add_pairs(self, codes: IntArray) -> tuple[IntArray, NDArray[np.bool_]]:
        """Return the rows of pairs, new ones included, and which of the pairs have one."""
        places = self._places(codes)
        new = codes[places < 0]
        limit = self.settings.max_pairs
        if len(self._pair_rows) + len(new) > limit:
            self._make_room(places[places >= 0], len(new))
        for code in new[: limit - len(self._pair_rows)].tolist():
            self._pair_rows[code] = len(self._pair_rows)
        self._resize("pair", max(len(self._pair_rows), self._tables["pair"].mean.shape[1]), 1)
        places = self._places(codes)
        return places[places >= 0], places >= 0

    def _make_room(self, in_use: IntArray, wanted: int) -> None:
        """Forget the pairs that were not seen for longest, at least a quarter of them."""
        seen = self._tables["pair"].moved[: len(self._pair_rows)].copy()
        seen[in_use] = np.inf
        count = min(len(seen) - len(in_use), max(wanted, len(seen) // 4))
        self._forget_pairs(np.argsort(seen, kind="stable")[:count])

    def _forget_pairs(self, rows: IntArray) -> None:
        """Remove pairs; the rows of the others close ranks."""
        table = self._tables["pair"]
        stays = np.ones(len(self._pair_rows), np.bool_)
        stays[rows] = False
        kept = [code for code, row in self._pair_rows.items() if stays[row]]
        old = self._places(np.array(kept, np.int64))
        fresh = self._empty("pair", table.mean.shape[1], 1)
        fresh.mean[:, : len(old)], fresh.variance[:, : len(old)] = table.mean[:, old], table.variance[:, old]
        fresh.moved[: len(old)] = table.moved[old]
        self._tables["pair"] = fresh
        self._pair_rows = {code: row for row, code in enumerate(kept)}

    def now(self, name: str, num_rows: int, now: int) -> tuple[FloatArray, FloatArray]:
        """Return means and variances (K, rows, width) of a table's first rows after `now` learned examples."""
        return self._forgotten(name, np.arange(num_rows), now)

    @property
    def pairs(self) -> IntArray:
        """Pairs of elements that have a row, (R, 2), in the order of the rows."""
        code_R = np.array(list(self._pair_rows), np.int64)
        return np.stack([code_R >> _HALF, code_R & (1 << _HALF) - 1], 1)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything learned, for a checkpoint."""
        parts = ("mean", "variance", "moved")
        tables = {
            f"{name}.{part}": torch.from_numpy(getattr(table, part))
            for name, table in self._tables.items()
            for part in parts
        }
        return tables | {"pairs": torch.tensor(list(self._pair_rows), dtype=torch.int64)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the place of the rest that a checkpoint holds."""
        for name in TABLES:
            self._tables[name] = _Table(
                *(tensors[f"{name}.{part}"].numpy().copy() for part in ("mean", "variance", "moved"))
            )
        self._pair_rows = {code: row for row, code in enumerate(tensors["pairs"].tolist())}


def _codes(chosen_NS: IntArray) -> IntArray:
    """Return a number for each pair of chosen elements, (N, Q), -1 where one of them is none."""
    first, second = slot_pairs(chosen_NS.shape[1])
    a_NQ, b_NQ = chosen_NS[:, first], chosen_NS[:, second]
    code_NQ: IntArray = np.where((a_NQ >= 0) & (b_NQ >= 0), a_NQ << _HALF | b_NQ, -1)
    return code_NQ


@njit(cache=True)
def _filter(
    learn: bool,
    core_N: FloatArray,
    product_N: IntArray,
    element_NS: IntArray,
    pair_NQ: IntArray,
    context_NC: FloatArray,
    label_N: FloatArray,
    weight_N: FloatArray,
    product_mean: FloatArray,
    product_var: FloatArray,
    element_mean: FloatArray,
    element_var: FloatArray,
    pair_mean: FloatArray,
    pair_var: FloatArray,
    out_N: FloatArray,
) -> None:
    """Write the rest's logit of each example into `out_N`, and learn the example before the next if asked to."""
    num_columns = context_NC.shape[1]
    for n in range(len(core_N)):
        mean, variance = 0.0, 0.0
        a = product_N[n]
        if a >= 0:
            for c in range(num_columns):
                x = context_NC[n, c]
                mean += product_mean[a, c] * x
                variance += product_var[a, c] * x * x
        for s in range(element_NS.shape[1]):
            e = element_NS[n, s]
            if e >= 0:
                for c in range(num_columns):
                    x = context_NC[n, c]
                    mean += element_mean[e, c] * x
                    variance += element_var[e, c] * x * x
        for q in range(pair_NQ.shape[1]):
            r = pair_NQ[n, q]
            if r >= 0:
                mean += pair_mean[r, 0]
                variance += pair_var[r, 0]
        out_N[n] = mean
        if not learn:
            continue
        p = 1.0 / (1.0 + np.exp(-(core_N[n] + mean)))
        w = weight_N[n] * p * (1.0 - p)
        step = weight_N[n] * (label_N[n] - p) / (1.0 + w * variance)
        shrink = w / (1.0 + w * variance)
        if a >= 0:
            for c in range(num_columns):
                gain = product_var[a, c] * context_NC[n, c]
                product_mean[a, c] += gain * step
                product_var[a, c] -= gain * gain * shrink
        for s in range(element_NS.shape[1]):
            e = element_NS[n, s]
            if e >= 0:
                for c in range(num_columns):
                    gain = element_var[e, c] * context_NC[n, c]
                    element_mean[e, c] += gain * step
                    element_var[e, c] -= gain * gain * shrink
        for q in range(pair_NQ.shape[1]):
            r = pair_NQ[n, q]
            if r >= 0:
                gain = pair_var[r, 0]
                pair_mean[r, 0] += gain * step
                pair_var[r, 0] -= gain * gain * shrink
