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
from typing import Any, Final

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
PART_FROM: Final = 256
"""Climbers from which those at rest are left behind once they are half; with fewer that takes more than it saves."""

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
        k, sizes, ends = self.capacity, self.sizes, np.cumsum(self.sizes).tolist()
        self.spans = [slice(end - a, end) for end, a in zip(ends, sizes, strict=True)]
        """Which of all candidates are those of a slot."""
        later, earlier = np.tril_indices(num_slots, -1)
        self.slot_pairs = later, earlier
        self.size_T = np.array(sizes)
        self.first_T = np.array([0, *ends[:-1]])
        """How many candidates the slots before have."""
        # np.empty: memory is taken from the system when a row is first written. Slot after slot, as a product over the
        # candidates of a slot takes half the time where they lie together; in one array, so that one gather serves all.
        self.all_content = np.empty(k * num_draws * total * content_size, np.float32)
        content = np.split(self.all_content, [k * num_draws * content_size * end for end in ends[:-1]])
        self.content = [c.reshape(k, num_draws, a, content_size) for c, a in zip(content, sizes, strict=True)]
        """(K, L, A, F): content of a candidate as each draw sees it."""
        self.keys = [np.empty((k, a, key_size), np.float32) for a in sizes]
        self.base = [np.empty((k, num_draws, a), np.float32) for a in sizes]
        """(K, L, A): main effect of a candidate without context."""
        self.by_context = [np.empty((k, a, num_columns), np.float32) for a in sizes]
        """(K, A, C): effect of the candidate itself with each context column."""
        self.all_pulls = np.empty((k, total, num_draws, num_slots, content_size), np.float32)
        self.pulls = [self.all_pulls[:, span] for span in self.spans]
        """(K, A, L, T, F): what choosing a candidate adds to the content weights of every slot."""
        self.all_pairs = np.empty((k, total, total if self.has_pairs else 0), np.float32)
        self.pairs = [self.all_pairs[:, span] for span in self.spans]
        """(K, A, all candidates): what choosing a candidate adds to each candidate of every slot."""

    def content_of(self, rows_N: IntArray) -> list[FloatArray]:
        """Return the content (N, L, A, F) of each slot's candidates."""
        return [_rows(content_KLAF, rows_N) for content_KLAF in self.content]

    def main(
        self, rows_N: IntArray, content: Sequence[FloatArray], weights_NLSF: FloatArray, context_NC: FloatArray
    ) -> list[FloatArray]:
        """Return the main effects (N, L, A) of each slot's candidates.

        Args:
            rows_N: Cards.
            content: Their content, from `content_of`.
            weights_NLSF: What the contexts add to the content weights.
            context_NC: The contexts.
        """
        out = []
        for t, slot in enumerate(self.slots):
            base_NLA = self.base[t][rows_N]
            if slot >= 0:
                base_NLA += np.matmul(content[t], weights_NLSF[:, :, slot, :, None])[..., 0]
                base_NLA += np.matmul(_rows(self.by_context[t], rows_N), context_NC[:, :, None])[:, None, :, 0]
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
    content: list[FloatArray]
    """(N, L, A, F) content of each slot's candidates."""
    main: list[FloatArray]
    """(N, L, A) main effects of each slot's candidates."""
    product: IntArray
    """(N,) vocabulary index of the product, -1 if the snapshot lacks it."""
    context: FloatArray
    """(N, C)"""

    @property
    def asked(self) -> Asked:
        """The same requests as the generator sees them."""
        keys = [_rows(keys_KAd, self.rows) for keys_KAd in self.deck.keys]
        return Asked(self.deck.slots, keys, self.product, self.context)

    @property
    def num_draws(self) -> int:
        """M."""
        num_all: int = self.main[0].shape[1]
        return num_all - 1

    def on_draws(self) -> Ascent:
        """Return the search under each of the M draws."""
        return Ascent(self, slice(0, -1))

    def on_mean(self) -> Ascent:
        """Return the search under the posterior mean alone, as if it were the only draw."""
        return Ascent(self, slice(-1, None))


class Ascent:
    """Searches the best creatives of N requests under each of M draws."""

    def __init__(self, problem: Problem, draws: slice) -> None:
        """Take the requests, and which draws to look at."""
        self.num_scores = 0
        """Scores of single elements that were needed so far; a start at rest needs none."""
        deck, rows_N = problem.deck, problem.rows
        _, num_all, _, self._size = problem.content[0].shape
        draw_L = np.arange(num_all)[draws]
        self._spans, self._slot_pairs, self._num_draws = deck.spans, deck.slot_pairs, num_all
        self._content = [content_NLAF[:, draws] for content_NLAF in problem.content]
        self._main = [main_NLA[:, draws] for main_NLA in problem.main]
        # Gathers go through flat views: np.take of rows took 1.5 us where indexing by arrays took 1.9 (32 x 2 rows).
        # Candidates are numbered over all slots: their place is that in their slot plus the slot's first.
        self._first_T = deck.first_T
        self._total = deck.spans[-1].stop
        self._flat_pulls = deck.all_pulls.reshape(-1, len(deck.spans) * self._size)
        self._first_pull = (rows_N * (self._total * num_all))[:, None] + draw_L
        self._flat_pairs = deck.all_pairs.reshape(-1, self._total) if deck.has_pairs else None
        self._first_pair = (rows_N * self._total)[:, None]
        self._flat_content = deck.all_content.reshape(-1, self._size)
        self._flat_main = np.concatenate([main_NLA.reshape(-1) for main_NLA in problem.main])
        # Here slot comes after slot, each with a group of candidates for every card and draw.
        groups_NL1 = (rows_N[:, None] * num_all + draw_L)[:, :, None]
        self._first_content = groups_NL1 * deck.size_T + (deck.capacity * num_all - 1) * deck.first_T
        groups_NL1 = (np.arange(len(rows_N))[:, None] * num_all + draw_L)[:, :, None]
        self._first_main = groups_NL1 * deck.size_T + (len(rows_N) * num_all - 1) * deck.first_T

    def values(self, chosen_NLRT: IntArray) -> FloatArray:
        """Return the creative logits (N, L, R) of R creatives on each draw."""
        self.num_scores += chosen_NLRT.size
        return self._values(chosen_NLRT + self._first_T)

    def _values(self, place_NLRT: IntArray) -> FloatArray:
        """Return the creative logits (N, L, R); pulls count each pair twice, hence the half."""
        total_NLRX = self._sum_of_pulls(place_NLRT)
        content = self._flat_content.take(self._first_content[:, :, None] + place_NLRT, axis=0)
        total_NLRX *= content.reshape(total_NLRX.shape)
        main_NLRT = self._first_main[:, :, None] + place_NLRT
        # Added up in the order of the slots.
        value: FloatArray = np.add.reduce(self._flat_main.take(main_NLRT.transpose(3, 0, 1, 2)))
        value += 0.5 * np.add.reduce(total_NLRX, -1)
        if self._flat_pairs is not None:
            later, earlier = self._slot_pairs
            row_NLRT = self._first_pair[:, :, None, None] + place_NLRT
            row_NLRT *= self._total
            row_QNLR = row_NLRT.transpose(3, 0, 1, 2)[later] + place_NLRT.transpose(3, 0, 1, 2)[earlier]
            for pair_NLR in self._flat_pairs.reshape(-1).take(row_QNLR):
                value += pair_NLR
        return value

    def _sum_of_pulls(self, place_NLRT: IntArray) -> FloatArray:
        """Return what creatives add to the content weights of all slots, slot after slot, (N, L, R, T F)."""
        row_NLRT = place_NLRT * self._num_draws
        row_NLRT += self._first_pull[:, :, None, None]
        total: FloatArray = self._flat_pulls.take(row_NLRT[..., 0], axis=0)
        for t in range(1, row_NLRT.shape[3]):
            total += self._flat_pulls.take(row_NLRT[..., t], axis=0)
        return total

    def best(self, chosen_NLRT: IntArray) -> IntArray:
        """Return the best of R creatives on each draw, (N, L, T)."""
        return _best(chosen_NLRT, self.values(chosen_NLRT))

    def climb(self, start_NLRT: IntArray, max_sweeps: int) -> IntArray:
        """Improve R starts, slot by slot, until nothing moves; return the best end on each draw, (N, L, T)."""
        num_slots = start_NLRT.shape[3]
        climbers = self._climbers(start_NLRT)
        ends_TG = np.empty((num_slots, climbers.last.size), np.int64)
        steps_G = np.empty(climbers.last.size, np.int64)
        rows_G = np.arange(climbers.last.size)
        step, moved_at = -1, 0
        for step in range(max_sweeps * num_slots):
            if step % num_slots == 0 and climbers.last.size >= PART_FROM:
                moving = np.flatnonzero(step - climbers.last < num_slots)
                if 2 * len(moving) <= climbers.last.size:
                    ends_TG[:, rows_G], steps_G[rows_G] = climbers.ends(num_slots)
                    rows_G, climbers = rows_G[moving], climbers.part(moving)
            if self._step(climbers, step % num_slots, step):
                moved_at = step
            elif step - moved_at + 1 >= num_slots:
                break
        ends_TG[:, rows_G], steps_G[rows_G] = climbers.ends(num_slots)
        steps_G = np.minimum(steps_G, step + 1)
        self.num_scores += int((steps_G // num_slots * self._total + self._first_T[steps_G % num_slots]).sum())
        ends_NLRT = ends_TG.T.reshape(start_NLRT.shape)
        if start_NLRT.shape[2] == 1:
            return ends_NLRT[:, :, 0]
        return _best(ends_NLRT, self._values(ends_NLRT + self._first_T))

    def _climbers(self, start_NLRT: IntArray) -> _Climbers:
        chosen_TNLR = start_NLRT.transpose(3, 0, 1, 2).copy()
        place_TNLR = chosen_TNLR + self._first_T[:, None, None, None]
        last = np.zeros(start_NLRT.shape[:3], np.int64)
        # For each start its own, so that some of them can be taken.
        first_pull, first_pair = self._first_pull[:, :, None] + last, self._first_pair[:, :, None] + last
        pulls = self._flat_pulls.take(first_pull + place_TNLR * self._num_draws, axis=0)
        partners = None if self._flat_pairs is None else self._flat_pairs.take(first_pair + place_TNLR, axis=0)
        return _Climbers(
            chosen=chosen_TNLR,
            last=last,
            content=[content_NLAF.swapaxes(2, 3) for content_NLAF in self._content],
            main=[main_NLA[:, :, None] for main_NLA in self._main],
            first_pull=first_pull,
            first_pair=first_pair,
            pulls=pulls,
            total=np.add.reduce(pulls),
            partners=partners,
            beside=None if partners is None else np.add.reduce(partners),
        )

    def _step(self, climbers: _Climbers, t: int, step: int) -> bool:
        """Give every climber its best candidate of a slot; return whether one has moved."""
        span, size, chosen = self._spans[t], self._size, climbers.chosen[t]
        value = np.matmul(climbers.total[..., t * size : (t + 1) * size], climbers.content[t])
        value += climbers.main[t]
        if climbers.beside is not None:
            value += climbers.beside[..., span]
        best = value.argmax(-1)
        moved = best != chosen
        num_moved = np.count_nonzero(moved)
        if not num_moved:
            return False
        climbers.last[moved] = step
        chosen[...] = best
        # The others would add exact zeros, which is quicker for a few.
        at = moved.nonzero() if moved.size >= PART_FROM and 3 * num_moved < moved.size else ...
        place, old = best[at] + span.start, climbers.pulls[t]
        pull = self._flat_pulls.take(climbers.first_pull[at] + place * self._num_draws, axis=0)
        climbers.total[at] += pull - old[at]
        old[at] = pull
        if self._flat_pairs is not None and climbers.partners is not None and climbers.beside is not None:
            old = climbers.partners[t]
            partner = self._flat_pairs.take(climbers.first_pair[at] + place, axis=0)
            climbers.beside[at] += partner - old[at]
            old[at] = partner
        return True


@dataclass(slots=True)
class _Climbers:
    """Starts on their way up. The leading axes (...) are (N, L) and R starts at first, and (G,) and 1 for a part."""

    chosen: IntArray
    """(T, ..., R) the place of each slot's choice among its candidates."""
    last: IntArray
    """(..., R) step in which each moved last; one that no slot moves any more is at rest for good."""
    content: list[FloatArray]
    """Of each slot (..., F, A)."""
    main: list[FloatArray]
    """Of each slot (..., 1, A)."""
    first_pull: IntArray
    first_pair: IntArray
    """(..., R) where the rows of each begin in the deck."""
    pulls: FloatArray
    """(T, ..., R, T F): what the choice in each slot adds to the content weights of every slot."""
    total: FloatArray
    """(..., R, T F) sum of the pulls."""
    partners: FloatArray | None
    """(T, ..., R, all candidates): what it adds to every candidate as its partner; None without effects of pairs."""
    beside: FloatArray | None
    """(..., R, all candidates) sum of the partners."""

    def ends(self, num_slots: int) -> tuple[IntArray, IntArray]:
        """Return where each is, (T, G), and after how many steps it was at rest, (G,)."""
        return self.chosen.reshape(num_slots, -1), self.last.reshape(-1) + num_slots

    def part(self, rows_G: IntArray) -> _Climbers:
        """Return some of them, each with content and main effects of its own."""
        index: Any = np.unravel_index(rows_G, self.last.shape)
        card, of_slots = index[:-1], (slice(None), *index)
        return _Climbers(
            chosen=self.chosen[of_slots][:, :, None],
            last=self.last[index][:, None],
            # Swapped for the gather alone: in another layout the products would be rounded differently.
            content=[content.swapaxes(-1, -2)[card].swapaxes(-1, -2) for content in self.content],
            main=[main[card] for main in self.main],
            first_pull=self.first_pull[index][:, None],
            first_pair=self.first_pair[index][:, None],
            pulls=self.pulls[of_slots][:, :, None],
            total=self.total[index][:, None],
            partners=None if self.partners is None else self.partners[of_slots][:, :, None],
            beside=None if self.beside is None else self.beside[index][:, None],
        )


def _rows(array: FloatArray, rows_N: IntArray) -> FloatArray:
    """Return rows of an array; a single one as a view of it."""
    if len(rows_N) == 1:
        return array[rows_N[0] : rows_N[0] + 1]
    return array.take(rows_N, axis=0)


def _best(chosen_NLRT: IntArray, value_NLR: FloatArray) -> IntArray:
    num_starts, num_slots = chosen_NLRT.shape[2:]
    first_NL = np.arange(value_NLR[..., 0].size).reshape(value_NLR.shape[:2]) * num_starts
    rows: IntArray = np.take(chosen_NLRT.reshape(-1, num_slots), first_NL + value_NLR.argmax(-1), axis=0)
    return rows
