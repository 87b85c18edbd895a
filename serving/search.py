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

DECK_BYTES = 256 * 1024 * 1024
MAX_CARDS = 4096
MAX_PAIRED = 160
"""Candidates of a card, over all slots, up to which the effects of pairs of elements are searched: they take a table of
the square of it. Wider cards are searched by content, main effects and pairs of content alone."""

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

    def __init__(self, shape: Shape, num_draws: int, content_size: int, key_size: int, num_columns: int) -> None:
        self.slots, self.sizes = shape
        num_slots, total = len(self.sizes), sum(self.sizes)
        self.has_pairs = total <= MAX_PAIRED
        numbers = num_draws * (1 + content_size + num_slots * content_size) + num_columns + key_size
        card_bytes = 4 * total * (numbers + (total if self.has_pairs else 0))
        self.capacity = max(1, min(MAX_CARDS, DECK_BYTES // card_bytes))
        self.rows: dict[bytes, int] = {}
        k, sizes = self.capacity, self.sizes
        # np.empty: memory is taken from the system when a row is first written.
        self.content = [np.empty((k, num_draws, a, content_size), np.float32) for a in sizes]
        """(K, L, A, F): content of a candidate as each draw sees it."""
        self.keys = [np.empty((k, a, key_size), np.float32) for a in sizes]
        self.base = [np.empty((k, num_draws, a), np.float32) for a in sizes]
        """(K, L, A): main effect of a candidate without context."""
        self.by_context = [np.empty((k, a, num_columns), np.float32) for a in sizes]
        """(K, A, C): effect of the candidate itself with each context column."""
        self.pulls = [np.empty((k, a, num_draws, num_slots, content_size), np.float32) for a in sizes]
        """(K, A, L, T, F): what choosing a candidate adds to the content weights of every slot."""
        self.pairs = [np.empty((k, a, total if self.has_pairs else 0), np.float32) for a in sizes]
        """(K, A, all candidates): what choosing a candidate adds to each candidate of every slot."""
        ends = np.cumsum(sizes).tolist()
        self.spans = [slice(end - a, end) for end, a in zip(ends, sizes, strict=True)]
        """Which of all candidates are those of a slot."""

    def main(self, rows_N: IntArray, weights_NLSF: FloatArray, context_NC: FloatArray) -> list[FloatArray]:
        """Return the main effects (N, L, A) of each slot's candidates.

        Args:
            rows_N: Cards.
            weights_NLSF: What the contexts add to the content weights.
            context_NC: The contexts.
        """
        out = []
        for t, slot in enumerate(self.slots):
            base_NLA = self.base[t][rows_N]
            if slot >= 0:
                weights_NLF1 = weights_NLSF[:, :, slot, :, None]
                base_NLA += np.matmul(self.content[t][rows_N], weights_NLF1)[..., 0]
                base_NLA += np.matmul(self.by_context[t][rows_N], context_NC[:, :, None])[:, None, :, 0]
            out.append(base_NLA)
        return out

    def shares(self, row: int, main: Sequence[FloatArray], places: Sequence[int]) -> list[FloatArray]:
        """Return the credit (L, A) of every candidate of each slot, the other slots filled as they are.

        Pair terms are shared half and half, so the credits of the chosen ones add up to the creative logit.

        Args:
            row: The card.
            main: (L, A) main effects of each slot's candidates.
            places: What is chosen.
        """
        pull_LTF = np.sum([self.pulls[t][row, place] for t, place in enumerate(places)], axis=0)
        beside = np.sum([self.pairs[t][row, place] for t, place in enumerate(places)], axis=0)
        out = []
        for t, main_LA in enumerate(main):
            share_LA = main_LA + 0.5 * np.matmul(self.content[t][row], pull_LTF[:, t, :, None])[..., 0]
            out.append(share_LA + 0.5 * beside[self.spans[t]] if self.has_pairs else share_LA)
        return out

    def pair_effects(self, row: int) -> list[list[FloatArray]]:
        """Return what pairs of a card's candidates add together: [t][s] with s < t, (L, A of slot t, B of slot s)."""
        out: list[list[FloatArray]] = []
        for t, size in enumerate(self.sizes):
            pull_LATF = self.pulls[t][row].transpose(1, 0, 2, 3)
            beside_AB = self.pairs[t][row] if self.has_pairs else np.zeros((size, sum(self.sizes)), np.float32)
            out.append(
                [
                    np.matmul(pull_LATF[:, :, s], self.content[s][row].transpose(0, 2, 1)) + beside_AB[:, self.spans[s]]
                    for s in range(t)
                ]
            )
        return out


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
        num_all: int = self.main[0].shape[1]
        return num_all - 1

    def on_draws(self) -> Ascent:
        """Return the search under each of the M draws."""
        return Ascent(self.deck, self.rows, self.main, slice(0, -1))

    def on_mean(self) -> Ascent:
        """Return the search under the posterior mean alone, as if it were the only draw."""
        return Ascent(self.deck, self.rows, self.main, slice(-1, None))


class Ascent:
    """Searches the best creatives of N requests under each of M draws."""

    def __init__(self, deck: Deck, rows_N: IntArray, main: Sequence[FloatArray], draws: slice) -> None:
        """Take the prepared cards and their main effects (N, L, A) in their contexts, and which draws to look at."""
        self.num_scores = 0
        """Scores of single elements that were needed so far; a start at rest needs none."""
        _, _, all_draws, self._num_slots, self._size = deck.pulls[0].shape
        draw_L = np.arange(all_draws)[draws]
        self._spans = deck.spans
        self._content = [content_KLAF[rows_N][:, draws] for content_KLAF in deck.content]
        self._main = [np.ascontiguousarray(main_NLA[:, draws]) for main_NLA in main]
        # Gathers go through flat views: np.take of rows took 1.5 us where indexing by arrays took 1.9 (32 x 2 rows);
        # row = first + candidate * stride.
        self._flat_pulls = [p.reshape(-1, self._num_slots, self._size) for p in deck.pulls]
        self._flat_content = [c.reshape(-1, self._size) for c in self._content]
        self._flat_main = [m.reshape(-1) for m in self._main]
        first_NL = np.arange(len(rows_N) * len(draw_L)).reshape(len(rows_N), -1)
        self._stride = all_draws
        self._first_pull = [(rows_N[:, None] * p.shape[1] * all_draws + draw_L)[:, :, None] for p in deck.pulls]
        self._first_place = [(first_NL * m.shape[2])[:, :, None] for m in main]
        self._flat_pairs = [p.reshape(-1, p.shape[2]) for p in deck.pairs] if deck.has_pairs else None
        self._first_pair = [(rows_N * p.shape[1])[:, None, None] for p in deck.pairs]

    def _pull(self, t: int, chosen_NLR: IntArray) -> FloatArray:
        """Return what choices in slot t add to the content weights of every slot, (N, L, R, T, F)."""
        return np.take(self._flat_pulls[t], self._first_pull[t] + chosen_NLR * self._stride, axis=0)

    def _beside(self, t: int, chosen_NLR: IntArray) -> FloatArray | None:
        """Return what choices in slot t add to every candidate as its partners, (N, L, R, all candidates)."""
        if self._flat_pairs is None:
            return None
        return np.take(self._flat_pairs[t], self._first_pair[t] + chosen_NLR, axis=0)

    def values(self, chosen_NLRT: IntArray) -> FloatArray:
        """Return the creative logits (N, L, R) of R creatives on each draw."""
        slots = range(self._num_slots)
        total_NLRTF = sum((self._pull(t, chosen_NLRT[..., t]) for t in slots[1:]), self._pull(0, chosen_NLRT[..., 0]))
        self.num_scores += chosen_NLRT.size
        value = self._values(chosen_NLRT, total_NLRTF, None)
        if self._flat_pairs is not None:
            # Single numbers, where an ascent takes the rows of all partners: here nothing else is asked of them.
            for t, pairs in enumerate(self._flat_pairs):
                row_NLR = (self._first_pair[t] + chosen_NLRT[..., t]) * pairs.shape[1]
                for s in range(t):
                    value += np.take(pairs.reshape(-1), row_NLR + (self._spans[s].start + chosen_NLRT[..., s]))
        return value

    def _values(self, chosen_NLRT: IntArray, total_NLRTF: FloatArray, beside: FloatArray | None) -> FloatArray:
        """Return the creative logits (N, L, R); pulls and partners count each pair twice, hence the half."""
        value: FloatArray = np.zeros(chosen_NLRT.shape[:3], np.float32)
        content_NLRTF = np.empty_like(total_NLRTF)
        for t in range(self._num_slots):
            chosen_NLR = chosen_NLRT[..., t]
            place = self._first_place[t] + chosen_NLR
            value += np.take(self._flat_main[t], place)
            content_NLRTF[:, :, :, t] = np.take(self._flat_content[t], place, axis=0)
            if beside is not None:
                partners = beside[..., self._spans[t]]
                value += 0.5 * np.take_along_axis(partners, chosen_NLR[..., None], -1)[..., 0]
        content_NLRTF *= total_NLRTF
        value += 0.5 * content_NLRTF.reshape(*value.shape, -1).sum(-1)
        return value

    def best(self, chosen_NLRT: IntArray) -> IntArray:
        """Return the best of R creatives on each draw, (N, L, T)."""
        return _best(chosen_NLRT, self.values(chosen_NLRT))

    def climb(self, start_NLRT: IntArray, max_sweeps: int) -> IntArray:
        """Improve R starts, slot by slot, until nothing moves; return the best end on each draw, (N, L, T)."""
        chosen_NLRT = start_NLRT.copy()
        num_slots = chosen_NLRT.shape[3]
        pulls = [self._pull(t, chosen_NLRT[..., t]) for t in range(num_slots)]
        partners = [self._beside(t, chosen_NLRT[..., t]) for t in range(num_slots)]
        total_NLRTF: FloatArray = sum(pulls[1:], start=pulls[0].copy())
        beside = _sum(partners)
        # Steps since a start last moved; one that no slot moved any more is at rest for good.
        still_NLR = np.zeros(chosen_NLRT.shape[:3], np.int64)
        for step in range(max_sweeps * num_slots):
            t = step % num_slots
            value = np.matmul(total_NLRTF[:, :, :, t], self._content[t].transpose(0, 1, 3, 2))
            value += self._main[t][:, :, None]
            if beside is not None:
                value += beside[..., self._spans[t]]
            self.num_scores += int((still_NLR < num_slots).sum()) * value.shape[3]
            best_NLR = value.argmax(-1)
            moved_NLR = best_NLR != chosen_NLRT[..., t]
            still_NLR = np.where(moved_NLR, 1, still_NLR + 1)
            # A request that has come to rest adds exact zeros while others in the batch still move.
            if moved_NLR.any():
                chosen_NLRT[..., t] = best_NLR
                pull, partner = self._pull(t, best_NLR), self._beside(t, best_NLR)
                total_NLRTF += pull - pulls[t]
                pulls[t] = pull
                if beside is not None and partner is not None:
                    beside += partner - partners[t]
                    partners[t] = partner
            elif (still_NLR >= num_slots).all():
                break
        return _best(chosen_NLRT, self._values(chosen_NLRT, total_NLRTF, beside))


def _sum(parts: Sequence[FloatArray | None]) -> FloatArray | None:
    arrays = [part for part in parts if part is not None]
    return sum(arrays[1:], start=arrays[0].copy()) if arrays else None


def _best(chosen_NLRT: IntArray, value_NLR: FloatArray) -> IntArray:
    num_starts, num_slots = chosen_NLRT.shape[2:]
    first_NL = np.arange(value_NLR[..., 0].size).reshape(value_NLR.shape[:2]) * num_starts
    rows: IntArray = np.take(chosen_NLRT.reshape(-1, num_slots), first_NL + value_NLR.argmax(-1), axis=0)
    return rows
