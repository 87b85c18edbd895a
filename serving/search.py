"""Coordinate ascent for all posterior draws of many requests at once.

A *card* is the candidate set of a request; a *deck* holds, for cards of one shape (the same slots and numbers of
candidates), what their candidates contribute whatever the context is, in arrays that a search gathers from. Every
product of matrices is done request by request in the same shape, so a result never depends on the batch it was part of.

Shapes: N requests, L draws with the posterior mean last, M = L - 1 draws, T slots of the card, A candidates of a slot,
R starts, F content numbers, d width of the generator's keys, K cards in the deck.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serving.pointer import Asked

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

DECK_BYTES = 64 * 1024 * 1024
MAX_CARDS = 4096

Shape = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Card:
    """The candidates of a request as a snapshot sees them."""

    key: bytes
    names: tuple[str, ...]
    elements: tuple[tuple[str, ...], ...]
    slots: tuple[int, ...]
    """Vocabulary index of each slot, -1 if the snapshot lacks it."""
    index: list[IntArray]
    """(A,) vocabulary index of each candidate, -1 if the snapshot lacks it."""
    content: list[FloatArray]
    """(A, F) content of each candidate."""

    @property
    def shape(self) -> Shape:
        """Slots and numbers of candidates: cards that agree in it are searched together."""
        return self.slots, tuple(len(ids) for ids in self.elements)

    def places(self, creative: Mapping[str, str]) -> list[int]:
        """Return the place of each element of a creative among its slot's candidates.

        Raises:
            ValueError: If the creative does not fill each slot with one of its candidates.
        """
        if creative.keys() != set(self.names):
            raise ValueError(f"creative fills the slots {sorted(creative)}; the request has {sorted(self.names)}")
        places = []
        for name, ids in zip(self.names, self.elements, strict=True):
            if creative[name] not in ids:
                raise ValueError(f"element {creative[name]!r} is no candidate of slot {name!r}")
            places.append(ids.index(creative[name]))
        return places


class Deck:
    """Prepared cards of one shape, in arrays with one row a card."""

    def __init__(self, shape: Shape, num_draws: int, content_size: int, key_size: int) -> None:
        self.slots, sizes = shape
        num_slots = len(sizes)
        card_bytes = 4 * sum(sizes) * (num_draws * (1 + num_slots * content_size) + content_size + key_size)
        self.capacity = max(1, min(MAX_CARDS, DECK_BYTES // card_bytes))
        self.rows: dict[bytes, int] = {}
        # np.empty: memory is taken from the system when a row is first written.
        self.content = [np.empty((self.capacity, a, content_size), np.float32) for a in sizes]
        self.keys = [np.empty((self.capacity, a, key_size), np.float32) for a in sizes]
        self.base = [np.empty((self.capacity, num_draws, a), np.float32) for a in sizes]
        """(K, L, A): main effect of a candidate without context."""
        self.pulls = [np.empty((self.capacity, a, num_draws, num_slots, content_size), np.float32) for a in sizes]
        """(K, A, L, T, F): what choosing a candidate adds to the content weights of every slot."""

    def main(self, rows_N: IntArray, weights_NLSF: FloatArray) -> list[FloatArray]:
        """Return the main effects (N, L, A) of each slot's candidates, given what the contexts add to the weights."""
        out = []
        for t, slot in enumerate(self.slots):
            base_NLA = self.base[t][rows_N]
            if slot >= 0:
                base_NLA += np.matmul(weights_NLSF[:, :, slot], self.content[t][rows_N].transpose(0, 2, 1))
            out.append(base_NLA)
        return out

    def pull_of(self, t: int, row: int, place: int) -> FloatArray:
        """Return what one choice adds to the content weights of every slot, (L, T, F)."""
        pull_LTF: FloatArray = self.pulls[t][row, place]
        return pull_LTF

    def mean_pulls(self, row: int) -> list[FloatArray]:
        """Return copies of a card's pulls under the posterior mean, (A, T, F) for each slot."""
        return [pulls[row, :, -1].copy() for pulls in self.pulls]


@dataclass(frozen=True, slots=True)
class Problem:
    """N requests of one shape, ready to be searched."""

    deck: Deck
    rows: IntArray
    """(N,) row of each request's card in the deck."""
    main: list[FloatArray]
    """(N, L, A) main effects of each slot's candidates."""
    product: IntArray
    """(N,) vocabulary index of the product, -1 if the snapshot lacks it."""
    context: FloatArray
    """(N, C)"""

    @property
    def asked(self) -> Asked:
        """The same requests as the generator sees them."""
        keys = [keys_KAd[self.rows] for keys_KAd in self.deck.keys]
        return Asked(self.deck.slots, keys, self.product, self.context)

    @property
    def num_draws(self) -> int:
        """M."""
        return self.main[0].shape[1] - 1

    def on_draws(self) -> Ascent:
        """Return the search under each of the M draws."""
        return Ascent(self.deck, self.rows, [np.ascontiguousarray(main_NLA[:, :-1]) for main_NLA in self.main])

    def on_mean(self) -> Ascent:
        """Return the search under the posterior mean alone, as if it were the only draw."""
        main = [np.ascontiguousarray(main_NLA[:, -1:]) for main_NLA in self.main]
        return Ascent(self.deck, self.rows, main, first_draw=self.num_draws)


class Ascent:
    """Searches the best creatives of N requests under each of M draws."""

    def __init__(self, deck: Deck, rows_N: IntArray, main: Sequence[FloatArray], first_draw: int = 0) -> None:
        """Take the prepared cards and their main effects (N, M, A) in their contexts, M draws from the first one on."""
        self.num_scores = 0
        """Scores of single elements that were needed so far; a start at rest needs none."""
        self._main = main
        self._content = [content_KAF[rows_N] for content_KAF in deck.content]
        num_requests, num_draws = main[0].shape[:2]
        _, _, all_draws, self._num_slots, self._size = deck.pulls[0].shape
        # Gathers go through flat views: np.take of rows took 1.5 us where indexing by arrays took 1.9 (32 x 2 rows);
        # row = first + candidate * stride.
        self._flat_pulls = [p.reshape(-1, self._num_slots, self._size) for p in deck.pulls]
        self._flat_content = [c.reshape(-1, self._size) for c in self._content]
        self._flat_main = [m.reshape(-1) for m in main]
        draw_M, request_N = np.arange(num_draws), np.arange(num_requests)
        self._stride = all_draws
        self._first_pull = [
            (rows_N[:, None] * p.shape[1] * all_draws + first_draw + draw_M)[:, :, None] for p in deck.pulls
        ]
        self._first_content = [(request_N * c.shape[1])[:, None, None] for c in self._content]
        self._first_main = [((request_N[:, None] * num_draws + draw_M) * m.shape[2])[:, :, None] for m in main]

    def _pull(self, t: int, chosen_NMR: IntArray) -> FloatArray:
        """Return what choices in slot t add to the content weights of every slot, (N, M, R, T, F)."""
        return np.take(self._flat_pulls[t], self._first_pull[t] + chosen_NMR * self._stride, axis=0)

    def _values(self, chosen_NMRT: IntArray, total_NMRTF: FloatArray) -> FloatArray:
        """Return the creative logits (N, M, R); the pulls count each pair twice, hence the half."""
        value: FloatArray = np.zeros(chosen_NMRT.shape[:3], np.float32)
        content_NMRTF = np.empty_like(total_NMRTF)
        for t in range(self._num_slots):
            chosen_NMR = chosen_NMRT[..., t]
            value += np.take(self._flat_main[t], self._first_main[t] + chosen_NMR)
            content_NMRTF[:, :, :, t] = np.take(self._flat_content[t], self._first_content[t] + chosen_NMR, axis=0)
        content_NMRTF *= total_NMRTF
        value += 0.5 * content_NMRTF.reshape(*value.shape, -1).sum(-1)
        return value

    def values(self, chosen_NMRT: IntArray) -> FloatArray:
        """Return the creative logits of R creatives on each draw, (N, M, R)."""
        total_NMRTF = self._pull(0, chosen_NMRT[..., 0])
        for t in range(1, self._num_slots):
            total_NMRTF += self._pull(t, chosen_NMRT[..., t])
        self.num_scores += chosen_NMRT.size
        return self._values(chosen_NMRT, total_NMRTF)

    def best(self, chosen_NMRT: IntArray) -> IntArray:
        """Return the best of R creatives on each draw, (N, M, T)."""
        return _best(chosen_NMRT, self.values(chosen_NMRT))

    def climb(self, start_NMRT: IntArray, max_sweeps: int) -> IntArray:
        """Improve R starts, slot by slot, until nothing moves; return the best end on each draw, (N, M, T)."""
        chosen_NMRT = start_NMRT.copy()
        num_requests, num_draws, num_starts, num_slots = chosen_NMRT.shape
        pulls = [self._pull(t, chosen_NMRT[..., t]) for t in range(num_slots)]
        total_NMRTF: FloatArray = sum(pulls[1:], start=pulls[0].copy())
        # Steps since a start last moved; one that no slot moved any more is at rest for good.
        still_NMR = np.zeros(chosen_NMRT.shape[:3], np.int64)
        for step in range(max_sweeps * num_slots):
            t = step % num_slots
            weights_NKF = total_NMRTF[:, :, :, t].reshape(num_requests, num_draws * num_starts, self._size)
            value = np.matmul(weights_NKF, self._content[t].transpose(0, 2, 1))
            value = value.reshape(num_requests, num_draws, num_starts, -1) + self._main[t][:, :, None]
            self.num_scores += int((still_NMR < num_slots).sum()) * value.shape[3]
            best_NMR = value.argmax(-1)
            moved_NMR = best_NMR != chosen_NMRT[..., t]
            still_NMR = np.where(moved_NMR, 1, still_NMR + 1)
            # A request that has come to rest adds exact zeros while others in the batch still move.
            if moved_NMR.any():
                chosen_NMRT[..., t] = best_NMR
                pull = self._pull(t, best_NMR)
                total_NMRTF += pull - pulls[t]
                pulls[t] = pull
            elif (still_NMR >= num_slots).all():
                break
        return _best(chosen_NMRT, self._values(chosen_NMRT, total_NMRTF))


def _best(chosen_NMRT: IntArray, value_NMR: FloatArray) -> IntArray:
    num_starts, num_slots = chosen_NMRT.shape[2:]
    first_NM = np.arange(value_NMR[..., 0].size).reshape(value_NMR.shape[:2]) * num_starts
    rows: IntArray = np.take(chosen_NMRT.reshape(-1, num_slots), first_NM + value_NMR.argmax(-1), axis=0)
    return rows
