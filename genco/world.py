"""A simulated world whose truth is known: products, creative elements, shoppers, clicks and their delays.

The logit of a click is

    bias + appeal(product, device, segment) + hour(h) + sum_s main_s(e_s, device, segment) + sum_{s<t} pair_st(e_s, e_t)

so the best creative depends on product, device and segment, never on the hour. Every strength in `WorldConfig` is the
standard deviation that its term gives the logit of a random card, however many slots the card has.

Everything follows from the configuration (and from the generators that callers pass in): two worlds of one
configuration are equal, at any time, in any order of calls. Time is an argument, in seconds since the world began.

Shapes: N requests, P products, S slots, K = S (S - 1) / 2 pairs of slots, E elements alive in a slot, A candidates of
a product in a slot, C = 18 contexts (device and segment), T traits of an element, M creatives of a product.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from genco.world_catalog import Catalog, Context, ElementRecord, ProductRecord, Request, element_text
from genco.world_config import WorldConfig

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

DEVICES = ("ios", "android", "web")
SEGMENTS = ("u0", "u1", "u2", "u3", "u4", "u5")
NUM_CONTEXTS = len(DEVICES) * len(SEGMENTS)
HOURS = 24

MAX_ENUMERATED = 20_000  # creatives of a product up to which best and uniform are exact
SAMPLED_CREATIVES = 4_096  # stands for uniform play beyond that
ASCENT_STARTS = 16  # one start was 2.8 % short of the optimum, six .3 %
CALIBRATION_DRAWS = 200_000
CHUNK_NUMBERS = 2_000_000  # numbers in the largest temporary array of a table
MAX_ERAS = 4  # truths kept: now, and a little of the past

# Roots of the random streams, so that none depends on how much another has drawn.
_PRODUCTS, _ELEMENTS, _TASTES, _CALIBRATION, _SEARCH, _MIXING = range(6)


@dataclass(frozen=True, kw_only=True, slots=True)
class Requests:
    """Page views that need a creative, as arrays of shape (N,)."""

    product: IntArray
    device: IntArray
    """Index into `DEVICES`."""
    segment: IntArray
    """Index into `SEGMENTS`."""
    hour: IntArray
    """0 to 23."""

    def __len__(self) -> int:
        return len(self.product)

    @property
    def cell(self) -> IntArray:
        """(N,) index of product, device and segment together: requests of a cell share their best creative."""
        return (self.product * len(DEVICES) + self.device) * len(SEGMENTS) + self.segment


def regret(best_sum: float, obtained_sum: float, uniform_sum: float) -> float:
    """Return the normalized regret: 0 is the best play, 1 is uniform play.

    Args:
        best_sum: Sum of the click probabilities of the best creatives over some requests.
        obtained_sum: The same for the creatives that were shown (or the number of clicks they got).
        uniform_sum: The same for uniform play.

    Raises:
        ValueError: If best play is not above uniform play, so that nothing can be won.

    Example:
        >>> regret(best_sum=30.0, obtained_sum=25.0, uniform_sum=10.0)
        0.25
    """
    if not best_sum > uniform_sum:
        raise ValueError(f"best_sum is {best_sum} and uniform_sum {uniform_sum}; regret needs best_sum > uniform_sum")
    return (best_sum - obtained_sum) / (best_sum - uniform_sum)


@dataclass(frozen=True, slots=True)
class _Element:
    content: FloatArray  # (content_size,) what the catalog tells
    basis: FloatArray  # (T,) what of it acts
    traits: FloatArray  # (T,) the basis and a hidden deviation
    own: float  # effect of its own, in logits


@dataclass(frozen=True, slots=True)
class _Tastes:
    """What shoppers like in this drift epoch."""

    main: FloatArray  # (S, T)
    pair: FloatArray  # (K, T, T)
    context: FloatArray  # (S, C, T)


@dataclass(frozen=True, slots=True)
class _Truth:
    """The effects of one era, and what is best in it as far as it was asked.

    A place is where an element stands in its slot: element number modulo E.
    """

    first_alive: int  # number of the oldest element alive
    main: FloatArray  # (S, E, C) by place
    pair: FloatArray  # (K, E, E) by place
    known: npt.NDArray[np.bool_]  # (P C,) whether the cell is in the tables below
    best_logit: FloatArray  # (P C,) creative part only
    best_places: IntArray  # (P C, S)
    uniform: FloatArray  # (P C, HOURS) click probability of uniform play


class World:
    """Answers what is in the catalog, who comes, who clicks, and what the best and uniform play would get."""

    def __init__(self, config: WorldConfig) -> None:
        self.config = config
        self.product_ids = tuple(f"p{product}" for product in range(config.num_products))
        self._slot_pairs = tuple(itertools.combinations(range(len(config.slots)), 2))
        self._num_traits = config.hidden_traits or config.content_size
        self._mixing, self._warp = self._draw_mixing()
        self._elements: dict[tuple[int, int], _Element] = {}
        self._tastes = [self._draw_tastes(epoch=0)]
        self._truths: dict[tuple[int, int], _Truth] = {}

        rng = self._rng(_PRODUCTS)
        self._candidates = self._draw_candidates(rng)  # (P, S, A) places
        self._allowed = np.zeros((config.num_products, len(config.slots), config.elements_per_slot), dtype=np.bool_)
        np.put_along_axis(self._allowed, self._candidates, values=True, axis=2)
        self._hour = config.hour_sd * math.sqrt(2) * np.cos((np.arange(HOURS) - 20) * 2 * np.pi / HOURS)  # evening peak
        self._appeal = self._draw_appeal(rng)  # (P C,)
        self._appeal += self._calibrated_bias()

    # -- what there is ---------------------------------------------------------------------------------------------

    def catalog(self, now_s: float) -> Catalog:
        """Return the elements alive and the products with their candidates, as plain Python data."""
        first = self.first_alive(now_s)
        elements = [
            self._element_record(slot, number)
            for slot in range(len(self.config.slots))
            for number in range(first, first + self.config.elements_per_slot)
        ]
        products = [
            ProductRecord(product_id=product_id, slots=self._candidate_ids(product, first))
            for product, product_id in enumerate(self.product_ids)
        ]
        return Catalog(elements, products)

    def candidates(self, product: int, now_s: float) -> IntArray:
        """Return the (S, A) numbers of the elements that a product may use, ascending in each slot."""
        return np.sort(self._numbers(self._candidates[product], self.first_alive(now_s)), axis=1)

    def all_candidates(self, now_s: float) -> IntArray:
        """Return the (P, S, A) numbers of the elements that each product may use, ascending in each slot."""
        return np.sort(self._numbers(self._candidates, self.first_alive(now_s)), axis=2)

    def content(self, now_s: float) -> tuple[int, FloatArray]:
        """Return the number of the oldest element alive, and the (S, E, content_size) content of it and those after it.

        What `catalog` tells of the elements, as an array.
        """
        first = self.first_alive(now_s)
        numbers = range(first, first + self.config.elements_per_slot)
        content = [[self._element(slot, n).content for n in numbers] for slot in range(len(self.config.slots))]
        return first, np.array(content)

    def requests(self, rng: np.random.Generator, n: int, now_s: float) -> Requests:
        """Draw n requests, evenly over products and contexts; shoppers of all time zones come at any time.

        The traffic does not depend on `now_s` in this world.
        """
        self.era(now_s)  # refuses a wrong time
        return Requests(
            product=rng.integers(self.config.num_products, size=n),
            device=rng.integers(len(DEVICES), size=n),
            segment=rng.integers(len(SEGMENTS), size=n),
            hour=rng.integers(HOURS, size=n),
        )

    def request_dicts(self, requests: Requests, now_s: float) -> list[Request]:
        """Return the requests ready for JSON; requests of one product share their `candidates`."""
        first = self.first_alive(now_s)
        candidates = {int(product): self._candidate_ids(product, first) for product in np.unique(requests.product)}
        rows = zip(requests.product, requests.device, requests.segment, requests.hour, strict=True)
        return [
            Request(
                product_id=self.product_ids[product],
                context=Context(device=DEVICES[device], segment=SEGMENTS[segment], hour=int(hour)),
                candidates=candidates[int(product)],
            )
            for product, device, segment, hour in rows
        ]

    def element_id(self, slot: int, number: int) -> str:
        """Return the id of an element: its slot's name and its number."""
        return f"{self.config.slots[slot]}-{number}"

    def encode(self, creatives: Sequence[Mapping[str, str]]) -> IntArray:
        """Return the (N, S) element numbers of creatives given as slot → element id.

        Raises:
            ValueError: If a creative lacks a slot or names an element that is not of it.
        """
        numbers = np.empty((len(creatives), len(self.config.slots)), dtype=np.int64)
        for row, creative in enumerate(creatives):
            for column, slot in enumerate(self.config.slots):
                element_id = creative.get(slot, "")
                prefix, _, number = element_id.rpartition("-")
                if prefix != slot or not number.isdecimal():
                    raise ValueError(f"slot {slot!r} of creative {row} is {element_id!r}; must be like '{slot}-3'")
                numbers[row, column] = int(number)
        return numbers

    def delays(self, rng: np.random.Generator, n: int) -> FloatArray:
        """Draw (N,) seconds from impression to click, log-normal up to the cap."""
        config = self.config
        delays = config.delay_median_s * np.exp(config.delay_sigma * rng.standard_normal(n))
        return np.minimum(delays, config.delay_cap_s)

    # -- what is true ----------------------------------------------------------------------------------------------

    def click_probability(self, requests: Requests, creatives: IntArray, now_s: float) -> FloatArray:
        """Return the (N,) true click probabilities of the creatives.

        Args:
            requests: The N requests.
            creatives: (N, S) element numbers, as from `encode`, among the candidates of each request's product.
            now_s: When they are shown.

        Raises:
            ValueError: If the shape is wrong or an element is not a candidate now.
        """
        truth = self._truth(now_s)
        expected = (len(requests), len(self.config.slots))
        if creatives.shape != expected:
            raise ValueError(f"creatives have shape {creatives.shape}; must be {expected}: a row for each request")
        places = creatives % self.config.elements_per_slot
        alive = self._numbers(places, truth.first_alive) == creatives
        slots = np.arange(len(self.config.slots))
        wrong = ~(alive & self._allowed[requests.product[:, None], slots, places])
        if wrong.any():
            row, slot = np.argwhere(wrong)[0]
            element_id = self.element_id(slot, creatives[row, slot])
            product_id = self.product_ids[requests.product[row]]
            raise ValueError(f"element {element_id} of creative {row} is not a candidate of {product_id} at {now_s} s")
        appeal = self._appeal[requests.cell] + self._hour[requests.hour]
        return _sigmoid(appeal + self._creative_logit(truth, requests.cell, places))

    def best(self, requests: Requests, now_s: float) -> FloatArray:
        """Return the (N,) click probabilities of the best creatives.

        Exact up to `MAX_ENUMERATED` creatives a product; beyond that the best of `ASCENT_STARTS` coordinate ascents,
        so a lower bound.
        """
        truth = self._tabulated(requests, now_s)
        cell = requests.cell
        return _sigmoid(self._appeal[cell] + self._hour[requests.hour] + truth.best_logit[cell])

    def best_creatives(self, requests: Requests, now_s: float) -> IntArray:
        """Return the (N, S) element numbers of the creatives that `best` speaks of."""
        truth = self._tabulated(requests, now_s)
        return self._numbers(truth.best_places[requests.cell], truth.first_alive)

    def uniform(self, requests: Requests, now_s: float) -> FloatArray:
        """Return the (N,) mean click probabilities of creatives drawn evenly among the candidates.

        Exact up to `MAX_ENUMERATED` creatives a product; beyond that the mean of the same `SAMPLED_CREATIVES` drawn
        combinations in every cell.
        """
        return self._tabulated(requests, now_s).uniform[requests.cell, requests.hour]

    # -- time ------------------------------------------------------------------------------------------------------

    def era(self, now_s: float) -> tuple[int, int]:
        """Return how often tastes have moved and how often elements were replaced: nothing else changes with time.

        Raises:
            ValueError: If the time is before the world began, or no number.
        """
        if not (math.isfinite(now_s) and now_s >= 0):
            raise ValueError(f"now_s is {now_s}; must be the seconds since the world began, at least 0")
        drift, turnover = self.config.drift_every_s, self.config.new_elements_every_s
        return (int(now_s // drift) if drift else 0, int(now_s // turnover) if turnover else 0)

    def first_alive(self, now_s: float) -> int:
        """Return the number of the oldest element alive, the same in every slot."""
        return self.era(now_s)[1] * self.config.new_elements

    def _numbers(self, places: IntArray, first_alive: int) -> IntArray:
        """Return the element numbers alive at places: of E successive numbers one falls on each place."""
        return first_alive + (places - first_alive) % self.config.elements_per_slot

    def _truth(self, now_s: float) -> _Truth:
        era = self.era(now_s)
        if era not in self._truths:
            while len(self._truths) >= MAX_ERAS:
                del self._truths[next(iter(self._truths))]  # the one made first
            self._truths[era] = self._make_truth(drift_epoch=era[0], first_alive=era[1] * self.config.new_elements)
        return self._truths[era]

    def _make_truth(self, drift_epoch: int, first_alive: int) -> _Truth:
        config = self.config
        tastes = self._tastes_of(drift_epoch)
        numbers = self._numbers(np.arange(config.elements_per_slot), first_alive)
        elements = [[self._element(slot, int(number)) for number in numbers] for slot in range(len(config.slots))]
        basis = np.array([[element.basis for element in slot] for slot in elements])
        traits = np.array([[element.traits for element in slot] for slot in elements])
        own = np.array([[element.own for element in slot] for slot in elements])
        main = np.einsum("set,st->se", basis, tastes.main) + own
        pair = [traits[s] @ tastes.pair[k] @ traits[t].T for k, (s, t) in enumerate(self._slot_pairs)]
        cells = config.num_products * NUM_CONTEXTS
        return _Truth(
            first_alive=first_alive,
            main=main[:, :, None] + np.einsum("set,sct->sec", traits, tastes.context),
            pair=np.array(pair).reshape(-1, config.elements_per_slot, config.elements_per_slot),
            known=np.zeros(cells, dtype=np.bool_),
            best_logit=np.empty(cells),
            best_places=np.empty((cells, len(config.slots)), dtype=np.int64),
            uniform=np.empty((cells, HOURS)),
        )

    # -- tables of the best and of uniform play --------------------------------------------------------------------

    def _creative_logit(self, truth: _Truth, cell: IntArray, places: IntArray) -> FloatArray:
        """Return the (N,) creative parts of the logit; `places` is (N, S)."""
        context = cell % NUM_CONTEXTS
        logit = np.zeros(len(cell))
        for slot in range(places.shape[1]):
            logit += truth.main[slot, places[:, slot], context]
        for k, (s, t) in enumerate(self._slot_pairs):
            logit += truth.pair[k, places[:, s], places[:, t]]
        return logit

    def _tabulated(self, requests: Requests, now_s: float) -> _Truth:
        """Return the truth with the cells of all requests in its tables."""
        truth = self._truth(now_s)
        missing = np.unique(requests.cell[~truth.known[requests.cell]])
        if len(missing) == 0:
            return truth
        if self.config.num_creatives <= MAX_ENUMERATED:
            chunks = math.ceil(len(missing) * self.config.num_creatives / CHUNK_NUMBERS)
            for cells in np.array_split(missing, min(chunks, len(missing))):
                self._enumerate(truth, cells)
        else:
            # Cells of one product share its pairs, the largest part of the work.
            for cells in np.split(missing, np.flatnonzero(np.diff(missing // NUM_CONTEXTS)) + 1):
                self._approximate(truth, cells)
        truth.known[missing] = True
        return truth

    def _main_effects(self, truth: _Truth, cells: IntArray) -> FloatArray:
        """Return the (cells, S, A) effects of the candidates of cells by themselves."""
        places = self._candidates[cells // NUM_CONTEXTS]
        main: FloatArray = truth.main[
            np.arange(places.shape[1])[:, None], places, (cells % NUM_CONTEXTS)[:, None, None]
        ]
        return main

    def _pair_effects(self, truth: _Truth, products: IntArray) -> FloatArray:
        """Return the (products, K, A, A) effects of pairs of candidates, the same in all contexts."""
        places = self._candidates[products]
        pairs = [
            truth.pair[k, places[:, s, :, None], places[:, t, None, :]] for k, (s, t) in enumerate(self._slot_pairs)
        ]
        width = places.shape[2]
        return np.stack(pairs, axis=1) if pairs else np.empty((len(products), 0, width, width))

    def _enumerate(self, truth: _Truth, cells: IntArray) -> None:
        """Tabulate the cells over all creatives."""
        main, pair = self._main_effects(truth, cells), self._pair_effects(truth, cells // NUM_CONTEXTS)
        num_cells, num_slots, width = main.shape
        logit = np.zeros((num_cells,) + (width,) * num_slots)
        for slot in range(num_slots):
            logit += np.expand_dims(main[:, slot], [1 + other for other in range(num_slots) if other != slot])
        for k, (s, t) in enumerate(self._slot_pairs):
            logit += np.expand_dims(pair[:, k], [1 + other for other in range(num_slots) if other not in (s, t)])
        logit = logit.reshape(num_cells, -1)
        best = logit.argmax(axis=1)
        choice = np.stack(np.unravel_index(best, (width,) * num_slots), axis=1)
        self._record_best(truth, cells, choice, logit[np.arange(num_cells), best])
        self._record_uniform(truth, cells, logit)

    def _approximate(self, truth: _Truth, cells: IntArray) -> None:
        """Tabulate cells of one product by coordinate ascent from many starts and by a fixed sample of creatives."""
        main = self._main_effects(truth, cells)
        (pair,) = self._pair_effects(truth, cells[:1] // NUM_CONTEXTS)
        num_cells, num_slots, width = main.shape
        rng = self._rng(_SEARCH)
        starts = rng.integers(width, size=(ASCENT_STARTS, num_slots))
        sample = rng.integers(width, size=(SAMPLED_CREATIVES, num_slots))

        given = np.zeros((num_slots, num_slots, width, width))
        for k, (s, t) in enumerate(self._slot_pairs):
            given[s, t] = pair[k].T
            given[t, s] = pair[k]
        choice, logit = _coordinate_ascent(main, given, np.repeat(starts[None], num_cells, axis=0))
        best = logit.argmax(axis=1)
        rows = np.arange(num_cells)
        self._record_best(truth, cells, choice[rows, best], logit[rows, best])

        sampled = np.zeros((num_cells, SAMPLED_CREATIVES))
        for k, (s, t) in enumerate(self._slot_pairs):
            sampled[0] += pair[k, sample[:, s], sample[:, t]]
        sampled[1:] = sampled[0]
        for slot in range(num_slots):
            sampled += main[:, slot, sample[:, slot]]
        self._record_uniform(truth, cells, sampled)

    def _record_best(self, truth: _Truth, cells: IntArray, choice: IntArray, logit: FloatArray) -> None:
        candidates = self._candidates[cells // NUM_CONTEXTS]
        truth.best_places[cells] = np.take_along_axis(candidates, choice[:, :, None], axis=2)[:, :, 0]
        truth.best_logit[cells] = logit

    def _record_uniform(self, truth: _Truth, cells: IntArray, logit: FloatArray) -> None:
        """Average the click probabilities of (cells, M) logits; the hour only shifts them, so one exp serves all."""
        odds_against = np.exp(-logit - self._appeal[cells][:, None])
        for hour, shift in enumerate(self._hour):
            truth.uniform[cells, hour] = (1 / (1 + odds_against * math.exp(-shift))).mean(axis=1)

    # -- how the world is made -------------------------------------------------------------------------------------

    def _rng(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, *stream])

    def _draw_mixing(self) -> tuple[FloatArray, FloatArray]:
        """Return how hidden traits show in the content (T, content_size) and how they act (T, T)."""
        rng = self._rng(_MIXING)
        mixing = rng.standard_normal((self._num_traits, self.config.content_size)) / math.sqrt(self._num_traits)
        return mixing, _unit(rng.standard_normal((self._num_traits, self._num_traits)), axis=0)

    def _draw_candidates(self, rng: np.random.Generator) -> IntArray:
        """Return the (P, S, A) places of each product's candidates: a random subset of every slot."""
        config = self.config
        places = np.arange(config.elements_per_slot)
        shuffled = rng.permuted(np.tile(places, (config.num_products, len(config.slots), 1)), axis=2)
        return np.sort(shuffled[:, :, : config.candidates_per_slot], axis=2)

    def _draw_appeal(self, rng: np.random.Generator) -> FloatArray:
        """Return the (P C,) appeal of products to contexts, without the bias."""
        config = self.config
        product = config.product_sd * rng.standard_normal((config.num_products, 1, 1))
        device = rng.standard_normal((1, len(DEVICES), 1)) / 2
        segment = rng.standard_normal((1, 1, len(SEGMENTS))) / 2
        particular = rng.standard_normal((config.num_products, len(DEVICES), len(SEGMENTS))) / math.sqrt(2)
        return (product + config.context_sd * (device + segment + particular)).ravel()

    def _element(self, slot: int, number: int) -> _Element:
        """Return an element, made on first use from the seed, its slot and its number alone."""
        if (slot, number) not in self._elements:
            config = self.config
            rng = self._rng(_ELEMENTS, slot, number)
            if config.hidden_traits is None:
                content = basis = rng.standard_normal(config.content_size)
            else:
                hidden = rng.standard_normal(config.hidden_traits)
                content = hidden @ self._mixing + 0.1 * rng.standard_normal(config.content_size)
                basis = np.sin(1.5 * hidden @ self._warp) / 0.703  # unit variance, half of it linear in `hidden`
            deviation = config.trait_deviation * rng.standard_normal(self._num_traits)
            traits = (basis + deviation) / math.hypot(1, config.trait_deviation)
            own = config.own_sd / math.sqrt(len(config.slots)) * rng.standard_normal()
            self._elements[slot, number] = _Element(content, basis, traits, float(own))
        return self._elements[slot, number]

    def _tastes_of(self, epoch: int) -> _Tastes:
        """Return the tastes of a drift epoch: each keeps part of the one before, at constant variance."""
        keep, renew = math.sqrt(1 - self.config.drift_rate), math.sqrt(self.config.drift_rate)
        while len(self._tastes) <= epoch:
            old, new = self._tastes[-1], self._draw_tastes(len(self._tastes))
            moved = {
                name: keep * getattr(old, name) + renew * getattr(new, name) for name in ("main", "pair", "context")
            }
            self._tastes.append(_Tastes(**moved))
        return self._tastes[epoch]

    def _draw_tastes(self, epoch: int) -> _Tastes:
        """Draw tastes whose effects have the configured strengths on elements of unit variance."""
        config, T, S, K = self.config, self._num_traits, len(self.config.slots), len(self._slot_pairs)
        rng = self._rng(_TASTES, epoch)
        main = _unit(rng.standard_normal((S, T)), axis=1)
        pair = _unit(rng.standard_normal((K, T * T)), axis=1).reshape(K, T, T)
        device = _unit(rng.standard_normal((S, len(DEVICES), 1, T)), axis=3)
        segment = _unit(rng.standard_normal((S, 1, len(SEGMENTS), T)), axis=3)
        return _Tastes(
            main=main * config.content_sd / math.sqrt(S),
            pair=pair * config.pair_sd / math.sqrt(max(K, 1)),
            context=(device + segment).reshape(S, NUM_CONTEXTS, T) * config.context_element_sd / math.sqrt(2 * S),
        )

    def _calibrated_bias(self) -> float:
        """Return the bias with which uniform play at time 0 has the configured click rate, to about .5 % of it."""
        rng = self._rng(_CALIBRATION)
        cell = rng.integers(len(self._appeal), size=CALIBRATION_DRAWS)
        hour = rng.integers(HOURS, size=CALIBRATION_DRAWS)
        choice = rng.integers(self.config.candidates_per_slot, size=(CALIBRATION_DRAWS, len(self.config.slots)))
        candidates = self._candidates[cell // NUM_CONTEXTS]
        places = np.take_along_axis(candidates, choice[:, :, None], axis=2)[:, :, 0]
        logit = self._appeal[cell] + self._hour[hour] + self._creative_logit(self._truth(0.0), cell, places)
        low, high = -50.0, 50.0
        while high - low > 1e-6:
            middle = (low + high) / 2
            if _sigmoid(logit + middle).mean() < self.config.click_rate:
                low = middle
            else:
                high = middle
        return low

    # -- how it reads ----------------------------------------------------------------------------------------------

    def _candidate_ids(self, product: int, first_alive: int) -> dict[str, list[str]]:
        numbers = np.sort(self._numbers(self._candidates[product], first_alive), axis=1)
        return {
            name: [self.element_id(slot, number) for number in numbers[slot]]
            for slot, name in enumerate(self.config.slots)
        }

    def _element_record(self, slot: int, number: int) -> ElementRecord:
        content = self._element(slot, number).content
        name = self.config.slots[slot]
        return ElementRecord(
            element_id=self.element_id(slot, number),
            slot=name,
            features=content.tolist(),
            text=element_text(name, content),
        )


def _coordinate_ascent(main: FloatArray, given: FloatArray, choice: IntArray) -> tuple[IntArray, FloatArray]:
    """Climb from each start by the best candidate of one slot after the other, until no slot changes.

    Args:
        main: (cells, S, A) main effects.
        given: (S, S, A, A), the same in all cells; given[s, t, b] is what candidate b in slot t adds to each candidate
            of slot s.
        choice: (cells, starts, S) candidates to start from; changed in place.

    Returns:
        The (cells, starts, S) candidates reached and their (cells, starts) logits.
    """
    num_slots = main.shape[1]
    rows = np.arange(len(main))[:, None]
    changed = True
    while changed:
        changed = False
        for slot in range(num_slots):
            score = np.repeat(main[:, slot, None], choice.shape[1], axis=1)
            for other in range(num_slots):
                if other != slot:
                    score += given[slot, other, choice[:, :, other]]
            here = np.take_along_axis(score, choice[:, :, slot, None], axis=2)[:, :, 0]
            better = score.max(axis=2) > here + 1e-12  # rounding must not make it walk in circles
            choice[:, :, slot] = np.where(better, score.argmax(axis=2), choice[:, :, slot])
            changed = changed or bool(better.any())
    logit = np.zeros(choice.shape[:2])
    for slot in range(num_slots):
        logit += main[rows, slot, choice[:, :, slot]]
        for other in range(slot):
            logit += given[slot, other, choice[:, :, other], choice[:, :, slot]]
    return choice, logit


def _unit(values: FloatArray, axis: int) -> FloatArray:
    """Scale vectors along an axis to length 1."""
    length: FloatArray = np.linalg.norm(values, axis=axis, keepdims=True)
    return values / length


def _sigmoid(logit: FloatArray) -> FloatArray:
    return 1 / (1 + np.exp(-logit))
