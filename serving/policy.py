"""The policy that decides: propose and refine for every posterior draw, with exact propensities.

The policy is a finite mixture. For each of the M draws (particles) of a snapshot, coordinate ascent from a proposal of
the generator, and from the best of what the other draws found so (`serving.refine`), finds the creative e^(m) that the
draw believes in. With a uniform share eps

    pi(e | context, product) = (1 - eps) #{m : e^(m) = e} / M + eps uniform(e)

Where exploration was shrunk to a share x, the e^(m) that the posterior mean likes best takes the rest: instead of the
fraction stands x #{m : e^(m) = e} / M + (1 - x) [e = best].

The starts follow from snapshot and request alone (a hash of both drives the proposals), and only the draw m and the
coin of eps follow from the request's seed. So pi is a fact about (snapshot, request), the logged propensity is exact,
and a decision can be repeated bit for bit. Slot propensities count how many e^(m) share the choices of earlier slots.

The logit of creative e under one draw, with z(e) what the draw sees in an element (its content and its traits):

    bias + context + product . (1, context)
      + sum_s [ z_s . (w_s + V_s context) + own(e_s) + by_context(e_s) . context ]
      + sum_{s<t} [ z_s' W_st z_t + pair(e_s, e_t) ]

The pairs of content enter a search as the *pull* of a choice on the other slots, W_st z_t, so time and memory of a
request are linear in the sum of its candidates, times M. The effects of single pairs of elements need a table of a
card's candidates; it is kept where it is small (`serving.search.MAX_PAIRED`).

Shapes: N requests of one shape, M draws (L = M + 1 with the posterior mean last), S slots of the vocabulary, T slots of
a request, A candidates of a slot, R starts, F content numbers, C context columns, K cards kept.

References:
    Chapelle and Li (2011), An Empirical Evaluation of Thompson Sampling. Hill et al. (2017), An Efficient Bandit
    Algorithm for Realtime Multivariate Optimization (coordinate ascent on a posterior draw).
"""

from __future__ import annotations

import copy
import hashlib
import math
import struct
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from serving.credits import CardEffects, Credit, widened
from serving.effects import Effects
from serving.pointer import VARIANTS, Pointer
from serving.refine import relay
from serving.search import Card, Deck, Problem, Shape
from streams.contracts.catalog import Element
from streams.contracts.encoders import ContentEncoder
from streams.contracts.features import ContextValue, FeatureSpec
from streams.contracts.sentences import text_encoders
from streams.contracts.snapshot import SnapshotError, SnapshotManifest, unpack_tensors

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

MAX_BATCH = 64
"""Requests that one pass of the search takes; more are cut, so that its arrays stay in the cache of a core."""
MAX_CARDS = 4096
MAX_DECKS = 16
"""Shapes of requests for which prepared cards are kept, at most 64 MiB each."""
MAX_SOLVED = 4096
"""Requests whose winners are remembered."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicySettings:
    """How a snapshot is played; travels inside it."""

    epsilon: float = 0.01
    """Share of the traffic that stays uniform over the candidates, in [0, 1]."""
    thompson_scale: float = 0.2
    """Spread of the draws in posterior standard deviations; undone where uncertainty is shown."""
    proposals: int = 16
    """Creatives that the generator proposes for a request; the draws start from them in turn. 0: each starts from its
    best main effects."""
    temperature: float = 2.0
    """Above 1 the proposals differ more than the generator's own samples: the draws then find more, together."""
    variant: str = "autoregressive"
    """How the generator proposes, see `serving.pointer`."""
    max_sweeps: int = 4
    """Passes of coordinate ascent over the slots before the draws exchange what they found; it stops earlier where
    nothing moves."""
    noise_seed: int = 0
    """Decides what the draws believe of single elements, see `serving.effects`."""

    def __post_init__(self) -> None:
        """Refuse what no policy can play."""
        if not 0.0 <= self.epsilon <= 1.0:
            raise ValueError(f"epsilon is {self.epsilon}; must be in [0, 1]")
        if not 0.0 < self.thompson_scale <= 10.0:
            raise ValueError(f"thompson_scale is {self.thompson_scale}; must be in (0, 10]")
        if not 0 <= self.proposals <= 64 or not 1 <= self.max_sweeps <= 64:
            raise ValueError(
                f"proposals is {self.proposals} and max_sweeps {self.max_sweeps}; must be in [0, 64] and [1, 64]"
            )
        if not 0.01 <= self.temperature <= 100.0:
            raise ValueError(f"temperature is {self.temperature}; must be in [.01, 100]")
        if self.variant not in VARIANTS:
            raise ValueError(f"variant is {self.variant!r}; expected one of {', '.join(VARIANTS)}")


@dataclass(frozen=True, slots=True)
class DecisionRequest:
    """What a decision depends on."""

    product_id: str
    context: Mapping[str, ContextValue]
    candidates: Mapping[str, Sequence[str]]
    """Slot -> element ids, in slot order."""
    content: Mapping[str, Element] = field(default_factory=dict)
    """Element id -> its content, for elements that the snapshot may not know."""
    seed: int = 0
    """Decides which draw is played and whether the uniform share is; nothing else depends on it."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A creative and the probability with which the policy chose it."""

    creative: dict[str, str]
    """Slot -> element id, in slot order."""
    slot_propensities: dict[str, float]
    """Slot -> probability of its element given those of the earlier slots."""
    propensity: float
    """Probability of the whole creative, in (0, 1]."""
    holdout: bool
    """Whether the uniform share chose it."""
    expected_ctr: float | None
    """Click probability under the posterior mean, in (0, 1); None where no model decided."""


class UniformPolicy:
    """Every candidate with the same probability: the last rung of the ladder, and the uniform share."""

    def choose(self, requests: Sequence[DecisionRequest]) -> list[Choice]:
        """Decide each request from its own seed.

        Raises:
            ValueError: If a request has no slot, or a slot no or twice the same candidate.
        """
        choices = []
        for request in requests:
            names, elements = _checked(request)
            places = _uniform_places(_unit_numbers(request.seed, 2 + len(names)), elements)
            slot_propensities = {name: 1.0 / len(ids) for name, ids in zip(names, elements, strict=True)}
            choices.append(
                Choice(
                    creative={n: ids[i] for n, ids, i in zip(names, elements, places, strict=True)},
                    slot_propensities=slot_propensities,
                    propensity=float(np.prod(list(slot_propensities.values()))),
                    holdout=True,
                    expected_ctr=None,
                )
            )
        return choices


class Policy:
    """A snapshot, ready to decide. Choosing changes nothing but caches, and may be called from several threads."""

    def __init__(
        self, spec: FeatureSpec, tensors: Mapping[str, NDArray[Any]], settings: PolicySettings, identity: str = ""
    ) -> None:
        """Build a policy from tensors named and shaped as in `streams.contracts.snapshot`.

        Args:
            spec: The vocabulary that the tensors' rows and columns follow.
            tensors: The tensors; `vocabulary` and `settings` are not read.
            settings: How to play them.
            identity: What seeds the proposals together with the request: the sha256 of the snapshot.

        Raises:
            SnapshotError: With reason `shape`, if vocabulary and tensors do not fit each other.
        """
        self.spec, self.settings, self._identity = spec, settings, identity.encode()
        _check_sizes(spec, tensors)
        self._effects = Effects(tensors, settings.thompson_scale, settings.noise_seed)
        self.num_draws = self._effects.num_draws
        self.pointer = Pointer(
            {n.removeprefix("generator."): w for n, w in tensors.items() if n.startswith("generator.")},
            settings.variant,
        )
        self._encoder = ContentEncoder.from_id(
            spec.encoder,
            {name: tensors[f"encoder.{name}"] for name in ("kinds", "mean", "matrix")},
            text_encoders(),
        )
        self._explored = 1.0
        self._lock = threading.Lock()
        self._cards: OrderedDict[bytes, Card] = OrderedDict()
        self._decks: OrderedDict[Shape, Deck] = OrderedDict()
        self._solved: OrderedDict[bytes, _Solved] = OrderedDict()

    @classmethod
    def from_snapshot(cls, blob: bytes, manifest: SnapshotManifest) -> Policy:
        """Read a published snapshot whose manifest has been verified.

        Raises:
            SnapshotError: If the blob is not of the format, or not the one that the manifest describes.
        """
        tensors = unpack_tensors(blob)
        try:
            spec = FeatureSpec.from_json(tensors["vocabulary"].tobytes())
            settings = msgspec.json.decode(tensors["settings"].tobytes(), type=PolicySettings)
            policy = cls(spec, tensors, settings, manifest.sha256)
        except SnapshotError:
            raise
        except (ValueError, msgspec.MsgspecError) as error:
            raise SnapshotError("contents", f"snapshot holds a bad vocabulary or settings: {error}") from None
        if spec.hash != manifest.feature_spec_hash:
            raise SnapshotError(
                "contents",
                f"feature spec has hash {spec.hash[:16]}; the manifest says {manifest.feature_spec_hash[:16]}",
            )
        return policy

    def exploring(self, share: float) -> Policy:
        """Return this policy with only a share of the traffic beside the uniform one played by the draws.

        Args:
            share: In [0, 1]; 1: as the snapshot says.
        """
        policy = copy.copy(self)  # with the same caches, for the winners are the same
        policy._explored = share  # noqa: SLF001 - its own class
        return policy

    @staticmethod
    def uniform() -> UniformPolicy:
        """Return the policy that needs no snapshot."""
        return UniformPolicy()

    def choose(self, requests: Sequence[DecisionRequest]) -> list[Choice]:
        """Decide each request; the result of one does not depend on the others in the batch.

        Raises:
            ValueError: If a request has no slot, or a slot no or twice the same candidate.
        """
        epsilon = self.settings.epsilon
        choices = []
        for request, solved in zip(requests, self._solve(requests), strict=True):
            card = solved.card
            unit = _unit_numbers(request.seed, 2 + len(card.names))
            holdout = unit[0] < epsilon
            if holdout:
                places = _uniform_places(unit, card.elements)
            else:
                places = solved.winners[self._played(solved, float(unit[1]))].tolist()
            agree_MT = _agreeing(solved, places)
            slot_propensities, propensity = self._propensities(solved, agree_MT)
            choices.append(
                Choice(
                    creative={n: ids[i] for n, ids, i in zip(card.names, card.elements, places, strict=True)},
                    slot_propensities=dict(zip(card.names, slot_propensities, strict=True)),
                    propensity=propensity,
                    holdout=holdout,
                    expected_ctr=self._expected_ctr(request, solved, places, agree_MT),
                )
            )
        return choices

    def propensity(self, request: DecisionRequest, creative: Mapping[str, str]) -> tuple[dict[str, float], float]:
        """Return the exact probability of any creative: of each slot given the earlier ones, and of the whole.

        A slot after one that the policy never fills so has propensity 0.

        Raises:
            ValueError: If the creative does not fill each slot with one of its candidates.
        """
        return self.propensities([request], [creative])[0]

    def propensities(
        self, requests: Sequence[DecisionRequest], creatives: Sequence[Mapping[str, str]]
    ) -> list[tuple[dict[str, float], float]]:
        """Return `propensity` for each pair of a request and a creative."""
        out = []
        for solved, creative in zip(self._solve(requests), creatives, strict=True):
            slot_propensities, joint = self._propensities(solved, _agreeing(solved, solved.card.places(creative)))
            out.append((dict(zip(solved.card.names, slot_propensities, strict=True)), joint))
        return out

    def expected_ctr(self, request: DecisionRequest, creative: Mapping[str, str]) -> float:
        """Return the click probability of any creative under the posterior mean.

        Raises:
            ValueError: If the creative does not fill each slot with one of its candidates.
        """
        (solved,) = self._solve([request])
        places = solved.card.places(creative)
        return self._expected_ctr(request, solved, places, _agreeing(solved, places))

    def winners(self, requests: Sequence[DecisionRequest]) -> list[IntArray]:
        """Return for each request the (M, T) places of e^(m) among the candidates of its slots."""
        return [solved.winners for solved in self._solve(requests)]

    def credits(self, request: DecisionRequest, creative: Mapping[str, str]) -> dict[str, Credit]:
        """Explain a creative: slot -> credit of its element.

        Raises:
            ValueError: If the creative does not fill each slot with one of its candidates.
        """
        effects = self.card_effects(request, self.spec.context_row(request.context))
        card = self._card_of(request)
        return dict(zip(card.names, effects.credits(card.elements, card.places(creative)), strict=True))

    def card_effects(
        self, request: DecisionRequest, context_C: FloatArray, pair: Sequence[Sequence[FloatArray]] | None = None
    ) -> CardEffects:
        """Return the effects of a request's candidates, with posterior draws at full width.

        Args:
            request: Its context is not looked at.
            context_C: The context as numbers; an average of contexts gives the average of the effects.
            pair: Effects of the pairs, which no context changes, if they are known from an earlier call.

        Raises:
            ValueError: If the request has no slot, or a slot no or twice the same candidate.
        """
        scale = self.settings.thompson_scale
        card = self._card_of(request)
        with self._lock:
            deck, (row,) = self._deal([card])
            main = self._main(deck, np.array([row]), context_C[None])
            narrow = None if pair is not None else deck.pair_effects(row)
        deviation = self._effects.context_deviation(card.index, context_C, self.settings.noise_seed)
        wide = [widened(main_1LA[0], scale) + dev_LA for main_1LA, dev_LA in zip(main, deviation, strict=True)]
        if narrow is not None:
            of_pairs = self._effects.pair_deviation(card.index, self.settings.noise_seed)
            pair = [
                [widened(pair_LAB, scale) + dev_LAB for pair_LAB, dev_LAB in zip(pairs, deviations, strict=True)]
                for pairs, deviations in zip(narrow, of_pairs, strict=True)
            ]
        return CardEffects(wide, pair or [])

    def appeal(self, product_id: str, context_C: FloatArray) -> float:
        """Return the logit of a product in a context, without any creative; unknown products have the average one."""
        return self._effects.appeal(self.spec.product_index.get(product_id, -1), context_C)

    def _card_of(self, request: DecisionRequest) -> Card:
        with self._lock:
            return self._card(_request_key(request)[0], request)

    def _shares(self, request: DecisionRequest, card: Card, places: Sequence[int]) -> list[FloatArray]:
        """Return the credits (L, A) of every candidate of each slot, the other slots filled with `places`."""
        with self._lock:
            deck, (row,) = self._deal([card])
            context_1C = self.spec.context_matrix([request.context])
            main = self._main(deck, np.array([row]), context_1C)
            return deck.shares(row, [main_NLA[0] for main_NLA in main], places)

    def _expected_ctr(
        self, request: DecisionRequest, solved: _Solved, places: Sequence[int], agree_MT: NDArray[np.bool_]
    ) -> float:
        """Return the click probability under the posterior mean."""
        (same_M,) = agree_MT[:, -1].nonzero()
        if len(same_M):
            creative = float(solved.logits[same_M[0]])
        else:
            shares = self._shares(request, solved.card, places)
            creative = sum(float(share_LA[-1, a]) for share_LA, a in zip(shares, places, strict=True))
        logit = solved.appeal + creative
        return 1.0 / (1.0 + math.exp(-min(max(logit, -30.0), 30.0)))

    def _played(self, solved: _Solved, unit: float) -> int:
        """Return which draw's winner is played."""
        num_draws = len(solved.winners)
        if self._explored == 1.0:
            return int(unit * num_draws)
        if unit >= self._explored:
            return solved.best
        return min(int(unit / self._explored * num_draws), num_draws - 1)

    def _propensities(self, solved: _Solved, agree_MT: NDArray[np.bool_]) -> tuple[list[float], float]:
        agree_T = np.count_nonzero(agree_MT, axis=0).tolist()
        if self._explored < 1.0:
            agrees_T = agree_MT[solved.best]
            rest = (1.0 - self._explored) * self.num_draws
            agree_T = [self._explored * n + rest * best for n, best in zip(agree_T, agrees_T.tolist(), strict=True)]
        epsilon, uniform, earlier, out = self.settings.epsilon, 1.0, 1.0, []
        for count, ids in zip(agree_T, solved.card.elements, strict=True):
            uniform /= len(ids)
            joint = (1.0 - epsilon) * count / self.num_draws + epsilon * uniform
            out.append(joint / earlier if earlier > 0.0 else 0.0)
            earlier = joint
        return out, earlier

    # -- search -------------------------------------------------------------------------------------------------------

    def _solve(self, requests: Sequence[DecisionRequest]) -> list[_Solved]:
        """Return the winners of each request, searching for those that are not remembered, alike ones together."""
        with self._lock:
            keys = [_request_key(request) for request in requests]
            found: dict[bytes, _Solved] = {}
            missing: dict[Shape, dict[bytes, tuple[DecisionRequest, Card]]] = {}
            for request, (card_key, key) in zip(requests, keys, strict=True):
                if key in self._solved:
                    self._solved.move_to_end(key)
                    found[key] = self._solved[key]
                else:
                    card = self._card(card_key, request)
                    missing.setdefault(card.shape, {})[key] = request, card
            for group in missing.values():
                items = list(group.items())
                step = min(MAX_BATCH, self._deck(items[0][1][1]).capacity)
                for start in range(0, len(items), step):
                    found.update(self._search(items[start : start + step]))
            self._solved.update((key, found[key]) for _, key in keys if key not in self._solved)
            while len(self._solved) > MAX_SOLVED:
                self._solved.popitem(last=False)
            return [found[key] for _, key in keys]

    def _card(self, key: bytes, request: DecisionRequest) -> Card:
        card = self._cards.get(key)
        if card is None:
            names, elements = _checked(request)
            slots = tuple(self.spec.slot_index.get(name, -1) for name in names)
            element_index = self.spec.element_index
            index = [
                np.array([element_index.get((slot, e), -1) for e in ids], np.int64)
                for slot, ids in zip(slots, elements, strict=True)
            ]
            content = [self._effects.content_of(rows) for rows in index]
            for t, ids in enumerate(elements):
                for a, element_id in enumerate(ids):
                    # Known from an impression but not yet from the catalog counts as unknown here.
                    if element_id in request.content and not content[t][a].any():
                        element = request.content[element_id]
                        content[t][a] = self._encoder.encode(names[t], element.features, element.text)
            card = self._cards[key] = Card(key, names, elements, slots, index, content)
            while len(self._cards) > MAX_CARDS:
                self._cards.popitem(last=False)
        return card

    def _deck(self, card: Card) -> Deck:
        deck = self._decks.get(card.shape)
        if deck is None:
            while len(self._decks) >= MAX_DECKS:
                self._decks.popitem(last=False)
            sizes = self.num_draws + 1, self.spec.content_size, self.pointer.width, len(self.spec.context)
            deck = Deck(card.shape, *sizes)
            self._decks[card.shape] = deck
        return deck

    def _deal(self, cards: Sequence[Card]) -> tuple[Deck, list[int]]:
        """Return the deck of cards of one shape, all of them prepared in it, and their rows."""
        deck = self._deck(cards[0])
        for _ in range(2):
            for card in cards:
                if card.key not in deck.rows and len(deck.rows) < deck.capacity:
                    self._prepare(card, deck)
            if all(card.key in deck.rows for card in cards):
                break
            # Full: start again. A batch is never larger than the deck, so the second pass fits.
            deck.rows.clear()
        return deck, [deck.rows[card.key] for card in cards]

    def _prepare(self, card: Card, deck: Deck) -> None:
        """Compute what a card's candidates contribute whatever the context is."""
        row = deck.rows[card.key] = len(deck.rows)
        known = [s for s in card.slots if s >= 0]
        targets = [t for t, s in enumerate(card.slots) if s >= 0]
        is_whole = card.slots == tuple(range(len(self.spec.slots)))
        effects = self._effects
        for t, slot in enumerate(card.slots):
            content_AF, index_A = card.content[t], card.index[t]
            deck.keys[t][row] = self.pointer.keys(content_AF, index_A)
            content_LAF = deck.content[t][row] = effects.drawn(content_AF, index_A)
            base_LA, pull_ALTF = deck.base[t][row], deck.pulls[t][row]
            if slot < 0:
                base_LA[:] = 0.0
                pull_ALTF[:] = 0.0
                deck.by_context[t][row] = 0.0
                continue
            weights_LF1 = effects.content_LSF[:, slot, :, None]
            base_LA[:] = np.matmul(content_LAF, weights_LF1)[..., 0] + effects.own(index_A)
            deck.by_context[t][row] = effects.by_context(index_A)
            num_draws, size, num_slots, _ = effects.pull_SLFSF[slot].shape
            flat_LFZ = effects.pull_SLFSF[slot].reshape(num_draws, size, num_slots * size)
            pull_LAZ = np.matmul(content_LAF, flat_LFZ)
            pull_ALSF = pull_LAZ.reshape(num_draws, -1, num_slots, size).transpose(1, 0, 2, 3)
            if is_whole:  # the common case, without a detour over indices
                pull_ALTF[:] = pull_ALSF
            else:
                pull_ALTF[:] = 0.0
                pull_ALTF[:, :, targets] = pull_ALSF[:, :, known]
        if deck.has_pairs:
            table_ZZ = deck.all_pairs[row]
            for t, span in enumerate(deck.spans):
                table_ZZ[span, span] = 0.0
                if t:  # with the slots before; the other way round it is the same
                    before = slice(0, span.start)
                    table_ZZ[span, before] = effects.pairs(card.index[t], np.concatenate(card.index[:t]))
                    table_ZZ[before, span] = table_ZZ[span, before].T

    def problem(self, request: DecisionRequest) -> Problem:
        """Return what a search of one request works on, until the next one is prepared: for benchmarks of searches."""
        with self._lock:
            card_key, _ = _request_key(request)
            return self._problem([request], [self._card(card_key, request)])

    def _problem(self, requests: Sequence[DecisionRequest], cards: Sequence[Card]) -> Problem:
        """Return requests of one shape, ready to be searched."""
        deck, rows = self._deal(cards)
        rows_N = np.array(rows)
        context_NC = self.spec.context_matrix([request.context for request in requests])
        product_N = np.array([self.spec.product_index.get(request.product_id, -1) for request in requests])
        content = deck.content_of(rows_N)
        main = deck.main(rows_N, content, self._effects.context_weights(context_NC), context_NC)
        return Problem(deck, rows_N, content, main, product_N, context_NC)

    def _main(self, deck: Deck, rows_N: IntArray, context_NC: FloatArray) -> list[FloatArray]:
        return deck.main(rows_N, deck.content_of(rows_N), self._effects.context_weights(context_NC), context_NC)

    def _search(self, items: Sequence[tuple[bytes, tuple[DecisionRequest, Card]]]) -> dict[bytes, _Solved]:
        """Find e^(m) of every draw for requests of one shape."""
        cards = [card for _, (_, card) in items]
        problem = self._problem([request for _, (request, _) in items], cards)
        winners_NMT = self._winners(problem, self._starts([key for key, _ in items], problem))
        logit_NM = problem.on_mean().values(winners_NMT[:, None])[:, 0]
        appeal = self._effects.appeal
        return {
            key: _Solved(card, winners_NMT[n], logit_NM[n], appeal(int(problem.product[n]), problem.context[n]))
            for n, (key, (_, card)) in enumerate(items)
        }

    def _winners(self, problem: Problem, start_NRT: IntArray) -> IntArray:
        """Return the creative e^(m) that each draw ends at, (N, M, T)."""
        return relay(problem, start_NRT, self.settings.max_sweeps)

    def _starts(self, keys: Sequence[bytes], problem: Problem) -> IntArray:
        """Return what the draws of each request start from, (N, R, T): proposals, or the best main effects."""
        if not self.settings.proposals:
            return np.stack([main_NLA[:, :-1].argmax(-1) for main_NLA in problem.main], -1)
        uniform_NRT = np.stack([self._proposal_numbers(key, len(problem.main)) for key in keys])
        return self.pointer.propose(problem.asked, uniform_NRT, self.settings.temperature)

    def _proposal_numbers(self, key: bytes, num_slots: int) -> NDArray[np.float64]:
        shape = self.settings.proposals, num_slots
        digest = hashlib.shake_128(self._identity + key).digest(4 * shape[0] * shape[1])
        return (np.frombuffer(digest, "<u4") / 2.0**32).reshape(shape)


# -- one request ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Solved:
    """What a snapshot says about a request, whatever its seed."""

    card: Card
    winners: IntArray
    """(M, T) places of e^(m) among the candidates."""
    logits: FloatArray
    """(M,) creative logits of these under the posterior mean."""
    appeal: float
    """Logit of the product and the context alone."""

    @property
    def best(self) -> int:
        """Which draw's winner the posterior mean likes best."""
        return int(np.argmax(self.logits))


def _agreeing(solved: _Solved, places: Sequence[int]) -> NDArray[np.bool_]:
    """Return which winners share the choices of a creative up to each slot, (M, T)."""
    agree_MT: NDArray[np.bool_] = np.logical_and.accumulate(solved.winners == np.asarray(places), axis=1)
    return agree_MT


def _request_key(request: DecisionRequest) -> tuple[bytes, bytes]:
    """Return what identifies the candidate set, and the whole request without its seed."""
    content = [(e.element_id, e.features, e.text) for _, e in sorted(request.content.items())]
    # The order of slots and candidates counts, that of the context's fields does not.
    card_key = msgspec.json.encode((request.candidates, content))
    return card_key, card_key + msgspec.json.encode((request.product_id, request.context), order="sorted")


def _checked(request: DecisionRequest) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Return slot names and candidates of a request that can be decided."""
    if not request.candidates:
        raise ValueError(f"request for product {request.product_id!r} has no slot; expected at least one")
    for name, ids in request.candidates.items():
        if not ids or len(set(ids)) != len(ids):
            raise ValueError(
                f"slot {name!r} has {len(ids)} candidates, {len(set(ids))} distinct; expected >= 1, distinct"
            )
    return tuple(request.candidates), tuple(tuple(ids) for ids in request.candidates.values())


def _unit_numbers(seed: int, count: int) -> list[float]:
    """Return numbers in [0, 1) that follow from a seed, on every machine and in every release the same."""
    digest = hashlib.shake_128(seed.to_bytes(16, "little", signed=True)).digest(8 * count)
    # 53 bits, so that the quotient is exact and stays below 1.
    return [(word >> 11) / 2.0**53 for (word,) in struct.iter_unpack("<Q", digest)]


def _uniform_places(unit: Sequence[float], elements: Sequence[Sequence[str]]) -> list[int]:
    """Return a uniform choice for each slot; the first two numbers are spent on the coin and the draw."""
    return [int(u * len(ids)) for u, ids in zip(unit[2:], elements, strict=True)]


def _check_sizes(spec: FeatureSpec, tensors: Mapping[str, NDArray[Any]]) -> None:
    num_slots, num_elements, columns = len(spec.slots), len(spec.elements), len(spec.context)
    num_draws = len(tensors["draws.content"])
    pairs = tensors["mean.content_pair"].shape
    found: dict[str, tuple[bool, int, int | str]] = {
        "draws": (num_draws >= 1, num_draws, "at least 1"),
        "content numbers in pairs": (pairs[1] <= spec.content_size, pairs[1], f"at most {spec.content_size}"),
        "pairs of elements": (len(tensors["pairs"]) == 8 * len(tensors["pair"]), len(tensors["pairs"]), "8 bytes each"),
    }
    for name, tensor, axis, want in (
        ("elements", "element_content", 0, num_elements),
        ("content size", "element_content", 1, spec.content_size),
        ("slots", "mean.content", 0, num_slots),
        ("pairs of slots", "mean.content_pair", 0, num_slots * (num_slots - 1) // 2),
        ("context columns", "mean.context", 0, columns),
        ("products", "product", 0, len(spec.products)),
        ("columns of element", "element", 1, 1 + columns),
        ("columns of product", "product", 1, 1 + columns),
    ):
        got = tensors[tensor].shape[axis]
        found[name] = got == want, got, want
    for name, (ok, got, expected) in found.items():
        if not ok:
            raise SnapshotError("shape", f"snapshot has {got} {name}; its vocabulary says {expected}")
