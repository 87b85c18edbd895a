"""The online learner: examples in, snapshots out. No Kafka, no Redis, no clock.

An update validates first (each example is predicted before it is learned), then teaches the reward model, then the
generator. Everything random follows from the settings' seed and the number of the update, so the same catalog and the
same batches in the same order give the same bytes of a snapshot, and a learner that is restored from `state` goes on
bit for bit like one that never stopped. `snapshot` changes nothing that is learned.

Shapes: N examples, S slots, F content numbers, C context columns, E elements, M draws.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, Self

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.design import Rows
from learner.encoder import extended
from learner.encoding import ExampleEncoder
from learner.faults import faults
from learner.gate import GateSettings, Validation
from learner.gatekeeper import Gatekeeper
from learner.generator import Cards, Generator, GeneratorSettings, padded
from learner.generator_rewards import Judge
from learner.generator_training import GeneratorReport, train_step
from learner.intake import Intake
from learner.parsing import ExampleParser, ParsedExamples
from learner.recent import RecentImpression, RecentImpressions
from learner.reward_model import Effects, RewardModel, RewardModelSettings
from learner.workers import ALONE, Workers
from serving.policy import Policy, PolicySettings
from streams.contracts.catalog import Element, Product
from streams.contracts.encoders import ContentEncoder
from streams.contracts.examples import ExampleBatch, LabelKind
from streams.contracts.features import FeatureSpec
from streams.contracts.growing import FeatureLimits, GrowingFeatureSpec
from streams.contracts.sentences import text_encoder_named, text_encoders
from streams.contracts.settings import LearnSettings
from streams.contracts.snapshot import PolicySnapshot, SnapshotManifest, pack_pairs, pack_tensors, sign

VALIDATION_EXAMPLES = 5_000
"""Progressive validation looks back at least so far, if there are so many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnerSettings:
    """Settings of the learner; those of its parts stand beside them."""

    seed: int = 0
    num_draws: int = 32
    """M: posterior draws in a snapshot."""
    epsilon: float = 0.01
    """Share of the traffic that stays uniform."""
    proposals: int = 16
    """Creatives that the generator proposes for a decision."""
    horizon_ms: int = 3_600_000
    """Decisions are remembered against duplicates for this much event time."""
    replay_size: int = 2_048
    """Recent impressions that the generator trains on and the gate looks at."""
    newest_share: float = 0.4
    """Share of a generator batch that comes from the newest examples."""
    text_encoder: str = "hash"
    """What reads the texts of elements: `hash`, `ngrams` or `minilm`, see `streams.contracts.sentences`."""
    features: FeatureLimits = field(default_factory=FeatureLimits)
    reward_model: RewardModelSettings = field(default_factory=RewardModelSettings)
    generator: GeneratorSettings = field(default_factory=GeneratorSettings)
    gate: GateSettings = field(default_factory=GateSettings)

    @classmethod
    def from_settings(cls, settings: LearnSettings) -> Self:
        """Return the settings that a process `genco learn` was configured with."""
        return cls(
            seed=settings.seed,
            num_draws=settings.particles,
            epsilon=settings.epsilon,
            text_encoder=settings.text_encoder,
            features=FeatureLimits(
                max_products=settings.max_products, max_elements=settings.max_elements, min_seen=settings.min_seen
            ),
            # A joiner that starts again emits one attribution window again, and may itself be one behind.
            horizon_ms=3 * settings.attribution_window_ms,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateReport:
    """What an update did."""

    num_learned: int
    skipped: dict[str, int]
    """Examples that were not learned (or, `beyond_horizon`, not remembered), by reason."""
    metrics: dict[str, float]
    """Progressive validation over the last examples, late share, weights of the memories, generator."""


class _Part(Protocol):
    """A part of the learner that a checkpoint holds."""

    def tensors(self) -> dict[str, Tensor]: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None: ...


class OnlineLearner:
    """Reward model, generator, vocabulary and memory of one model."""

    def __init__(self, settings: LearnerSettings | None = None, device: str = "cpu", workers: Workers = ALONE) -> None:
        self.settings = settings = settings or LearnerSettings()
        self.device = torch.device(device)
        text_encoder = text_encoder_named(settings.text_encoder)
        content_encoder = ContentEncoder(settings.features.content_size, text_encoder=text_encoder)
        self.features = GrowingFeatureSpec(settings.features, content_encoder)
        self.reward_model = RewardModel(settings.reward_model, device, workers)
        self.generator = Generator(
            settings.features.content_size, settings.generator, seed=settings.seed, device=device
        )
        self.num_updates = 0
        self.max_event_time_ms = 0
        self._intake = Intake(settings.horizon_ms)
        self._content_EF = torch.zeros(0, settings.features.content_size)
        self._late = [1.0, 20.0]
        self._stepless = 0
        self._validation: deque[Validation] = deque()
        self._recent = RecentImpressions(settings.replay_size)
        self._parser = ExampleParser()
        self._encoder = ExampleEncoder(self.features)
        self._spec: FeatureSpec = self.features.freeze()
        self._effects: Effects | None = None
        self._metrics: dict[str, float] = {}
        self._gatekeeper = Gatekeeper(settings.gate, settings.seed)

    # -- learning -----------------------------------------------------------------------------------------------------

    def apply_catalog(self, elements: Mapping[str, Element], products: Mapping[str, Product]) -> None:
        """Take the catalog as it is now: names enter the vocabulary, contents replace those known before."""
        named = dict.fromkeys((element.slot, element.element_id) for element in elements.values())
        for product in products.values():
            named |= dict.fromkeys((slot, element_id) for slot, ids in product.slots.items() for element_id in ids)
        self.features.catalog([product.product_id for product in products.values()], named)
        self._extend_encoder(elements)
        self._grow()
        for element in elements.values():
            index = self._spec.row_of(element.slot, element.element_id)
            if index >= 0:
                content_F = self.features.encoder.encode(element.slot, element.features, element.text)
                self._content_EF[index] = torch.from_numpy(content_F)
        self._grow()

    def _extend_encoder(self, elements: Mapping[str, Element]) -> None:
        """Fit reductions to kinds of rich content that had none."""
        encoder = extended(self.features.encoder, elements.values())
        if encoder is not self.features.encoder:
            self.features.encoder = encoder
            if self.reward_model.num_examples:
                self.reward_model.reset_content()

    def update(self, batch: ExampleBatch) -> UpdateReport:
        """Learn a batch: each decision at most once as a negative and once as a positive.

        Raises:
            FloatingPointError: If the batch would make the model not finite; the reward model has learned nothing then.
        """
        parsed = self._parser.parse(batch)
        rows, skipped = self._intake.admit(batch, faults(batch, parsed))
        unknown = Counter(self.features.unknown)
        if len(rows):
            self.features.advance(int(batch.occurred_at_ms[rows].max()))
            encoded = self._encode(parsed, rows)
            label_N = batch.label[rows].astype(np.float64)
            is_late_N = batch.has_kind(LabelKind.LATE_POSITIVE)[rows]
            learned = self.reward_model.learn(
                encoded,
                self._on_device(label_N),
                self._on_device(1.0 / batch.survival_probability[rows]),
                self._on_device(batch.has_kind(LabelKind.PROVISIONAL)[rows]),
                self.late_share,
            )
            self._validate(learned.probability.cpu().numpy(), label_N, ~is_late_N)
            self._count_late(label_N, is_late_N)
            self._recent.add(batch, parsed, rows[~is_late_N])
            self.max_event_time_ms = max(self.max_event_time_ms, int(batch.occurred_at_ms[rows].max()))
            self.num_updates += 1
            self._effects = None
            self._metrics = self._train_generator(len(rows), int((~is_late_N).sum()))
            self._expire()
        for kind, count in (self.features.unknown - unknown).items():
            skipped[f"unknown_{kind}"] += count
        return UpdateReport(num_learned=len(rows), skipped=dict(skipped), metrics=self.metrics())

    @property
    def late_share(self) -> float:
        """Share of the clicks that come after the wait, from the clicks so far and a prior of twenty."""
        return self._late[0] / self._late[1]

    @property
    def newest_validation(self) -> Validation:
        """Progressive validation over the newest update's examples alone."""
        return self._validation[-1] if self._validation else Validation()

    def metrics(self) -> dict[str, float]:
        """Return the state of learning: progressive validation, memories, generator."""
        weights = self.reward_model.memory_weights
        memories = self.settings.reward_model.memories
        return {
            **sum(self._validation, start=Validation()).metrics(),
            "late_share": self.late_share,
            "remembered_decisions": float(len(self._intake)),
            "remembered_bytes": float(self._intake.num_bytes),
            "num_examples": float(self.reward_model.num_examples),
            "num_coefficients": float(self.reward_model.layout.size),
            "changes": float(self.reward_model.change.num_changes),
            "change_evidence": self.reward_model.change.evidence,
            "num_jittered": float(self.reward_model.num_jittered),
            **{
                f"memory_weight_{memory.forget:g}_{memory.pair_width:g}": weight
                for memory, weight in zip(memories, weights, strict=True)
            },
            **self._metrics,
        }

    def _encode(self, parsed: ParsedExamples, rows: NDArray[np.int64]) -> Rows:
        """Return the numbers of these rows; their new names enter the vocabulary first."""
        indexed = self._encoder.observe(parsed, rows)
        self._grow()
        numbers = indexed.encode(self._spec, self._content_EF)
        return Rows(*(getattr(numbers, field.name).to(self.device) for field in fields(numbers)))

    def _expire(self) -> None:
        """Give rows back whose names were not seen for long."""
        freed = self.features.expire()
        if freed:
            self._encoder.forget()
            self.reward_model.reset(freed)
            self.generator.reset(freed)
            self._content_EF[list(freed.elements)] = 0.0
            self._grow()

    def _on_device(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(self.device)

    def _grow(self) -> None:
        """Make room for everything in the vocabulary."""
        self._spec = spec = self.features.freeze()
        self._content_EF = padded(self._content_EF, (len(spec.elements), spec.content_size))
        in_use = self._content_EF.any(0).nonzero()
        content = max(int(in_use[-1]) + 1 if len(in_use) else 0, self.reward_model.layout.content)
        sizes = {"slots": len(spec.slots), "context": len(spec.context)}
        names = {"products": len(spec.products), "elements": len(spec.elements)}
        self.reward_model.grow(content=content, **sizes, **names)
        self.generator.grow(**sizes, **names)
        self._effects = None

    def _validate(
        self, probability_N: NDArray[np.float64], label_N: NDArray[np.float64], first: NDArray[np.bool_]
    ) -> None:
        click_N = -np.log(probability_N.clip(1e-12))
        no_click_N = -np.log((1.0 - probability_N).clip(1e-12))
        loss_N = np.where(label_N > 0, click_N, no_click_N)
        # A late click belongs to an impression that was counted before, as a negative: its loss then is taken back, at
        # the probability of now, for that of then is not kept.
        loss_N[~first] -= no_click_N[~first]
        self._validation.append(
            Validation(
                num_examples=float(first.sum()),
                num_clicks=float(label_N.sum()),
                expected_clicks=float(probability_N[first].sum()),
                log_loss=float(loss_N.sum()),
            )
        )
        while sum(v.num_examples for v in list(self._validation)[1:]) >= VALIDATION_EXAMPLES:
            self._validation.popleft()

    def _count_late(self, label_N: NDArray[np.float64], is_late_N: NDArray[np.bool_]) -> None:
        keep = 0.99 ** (len(label_N) / 1000.0)
        self._late = [self._late[0] * keep + float(is_late_N.sum()), self._late[1] * keep + float(label_N.sum())]

    # -- generator ----------------------------------------------------------------------------------------------------

    def _train_generator(self, num_learned: int, num_new: int) -> dict[str, float]:
        """Train on recent impressions against the model as it is now; the leash is the generator before this update."""
        settings = self.settings.generator
        # The remainder is kept for the next update, so many small updates give as many steps as few large ones.
        num_steps, self._stepless = divmod(self._stepless + num_learned, settings.examples_per_step)
        if not (len(self._recent) and num_steps):
            return self._metrics
        rng = np.random.default_rng([self.settings.seed, self.num_updates])
        torch_rng = torch.Generator().manual_seed(_seed(self.settings.seed, "generator", self.num_updates))
        judge = self._judge()
        published = dict(self.generator.weights) if self.num_updates > 1 else None
        recent = self._recent
        newest = max(1, min(num_new, len(recent)))
        shape = num_steps, settings.cards
        is_new = rng.random(shape) < self.settings.newest_share
        back = np.where(is_new, rng.integers(newest, size=shape), rng.integers(len(recent), size=shape))
        report: GeneratorReport | None = None
        for row in back.tolist():
            report = train_step(self.generator, self._cards([recent[-1 - i] for i in row]), judge, published, torch_rng)
        return {f"generator_{name}": value for name, value in vars(report).items()} if report else {}

    def _judge(self) -> Judge:
        """Return the draws that judge the generator's creatives."""
        effects = self._effects_now()
        return Judge(effects.draws | {"element": torch.from_numpy(effects.element).to(self.device)})

    def _cards(self, drawn: Sequence[RecentImpression]) -> Cards:
        """Return impressions as cards in numbers."""
        spec, num_slots = self._spec, len(self._spec.slots)
        widest = max(int(each.candidates.size_T.max()) for each in drawn)
        candidate = np.full((len(drawn), num_slots, widest), -1, np.int64)
        mask = np.zeros(candidate.shape, np.bool_)
        for b, each in enumerate(drawn):
            index, size_T = self._encoder.find(each.candidates, spec), each.candidates.size_T
            for t in np.flatnonzero(index.slot >= 0):
                slot, first, size = index.slot[t], index.first[t], size_T[t]
                candidate[b, slot, :size] = index.element[first : first + size]
                mask[b, slot, :size] = True
        content_EF = self._content_EF + torch.from_numpy(self._effects_now().trait)
        content_EF = padded(content_EF, (len(content_EF) + 1, spec.content_size))
        parts = (
            torch.tensor([spec.product_index.get(each.product_id, -1) for each in drawn]),
            torch.from_numpy(spec.context_matrix([each.context for each in drawn])),
            torch.from_numpy(candidate),
            torch.from_numpy(mask),
            content_EF[torch.from_numpy(candidate)],
        )
        return Cards(*(part.to(self.device) for part in parts))

    # -- snapshots ----------------------------------------------------------------------------------------------------

    def _effects_now(self) -> Effects:
        """Return the effects under the mean and under the draws that belong to this update."""
        if self._effects is None:
            rng = torch.Generator().manual_seed(_seed(self.settings.seed, "draws", self.num_updates))
            sizes = {"content_size": self._spec.content_size, "num_products": len(self._spec.products)}
            self._effects = self.reward_model.effects(self.settings.num_draws, rng, **sizes)
        return self._effects

    def _tensors(self) -> dict[str, NDArray[Any]]:
        effects = self._effects_now()
        core = ("content", "content_context", "content_pair")
        named = {
            **{f"draws.{name}": effects.draws[name] for name in core},
            **{f"mean.{name}": effects.mean[name] for name in ("bias", "context", *core)},
            **{f"generator.{name}": w for name, w in self.generator.weights.items()},
            "element_content": self._content_EF,
        }
        encoder = {f"encoder.{name}": array for name, array in self.features.encoder.tensors().items()}
        return (
            {name: np.asarray(w.detach().cpu().numpy(), order="C") for name, w in named.items()}
            | encoder
            | {
                "product": effects.product,
                "element": effects.element,
                "element_sd": effects.element_sd,
                "trait": effects.trait,
                "trait_root": effects.trait_root,
                "pair": effects.pair,
                "pair_sd": effects.pair_sd,
                "pairs": pack_pairs(effects.pairs),
            }
        )

    def _policy_settings(self) -> PolicySettings:
        return PolicySettings(
            epsilon=self.settings.epsilon,
            thompson_scale=self.settings.reward_model.thompson_scale,
            proposals=self.settings.proposals,
            variant=self.settings.generator.variant,
            noise_seed=_seed(self.settings.seed, "noise", self.num_updates),
        )

    def _policy(self, identity: str) -> Policy:
        return Policy(self._spec, self._tensors(), self._policy_settings(), identity)

    def policy(self) -> Policy:
        """Return the policy as it is now, for use in this process; published ones are read from `snapshot`."""
        return self._policy(f"update {self.num_updates}")

    def snapshot(
        self,
        *,
        model_id: str,
        epoch: int,
        version: int,
        parent_sha256: str | None,
        trained_through: Mapping[str, int],
        due_ms_quantiles: Sequence[float],
        created_at_ms: int,
        signing_key: bytes,
    ) -> PolicySnapshot:
        """Return a signed snapshot of the policy as it is now, with the gate's verdict.

        Args:
            model_id: Name of the model.
            epoch: Fencing token of the caller's lease.
            version: Number of the snapshot.
            parent_sha256: sha256 of the snapshot that was published last; the gate compares with it.
            trained_through: Partition -> offset of the next example to learn.
            due_ms_quantiles: See `SnapshotManifest`.
            created_at_ms: The time now.
            signing_key: Key of the manifest's HMAC.

        Raises:
            SnapshotError: If a tensor is not finite or the snapshot is too large to be read again.
        """
        tensors = self._tensors()
        extra = {"vocabulary": self._spec.to_json(), "settings": msgspec.json.encode(self._policy_settings())}
        blob = pack_tensors(tensors | {name: np.frombuffer(data, np.uint8) for name, data in extra.items()})
        sha256 = hashlib.sha256(blob).hexdigest()
        policy = Policy(self._spec, tensors, self._policy_settings(), sha256)
        verdict, golden = self._gatekeeper.judge(
            policy,
            tensors,
            sha256=sha256,
            parent_sha256=parent_sha256,
            recent=self._recent,
            validation=sum(self._validation, start=Validation()),
            num_updates=self.num_updates,
        )
        manifest = SnapshotManifest(
            model_id=model_id,
            epoch=epoch,
            version=version,
            parent_sha256=parent_sha256 or "",
            sha256=sha256,
            num_bytes=len(blob),
            feature_spec_hash=self._spec.hash,
            trained_through=dict(trained_through),
            max_event_time_ms=self.max_event_time_ms,
            due_ms_quantiles=tuple(due_ms_quantiles),
            metrics=self.metrics(),
            gate=verdict,
            golden=golden,
            created_at_ms=created_at_ms,
        )
        return PolicySnapshot(sign(manifest, signing_key), blob)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _parts(self) -> dict[str, _Part]:
        return {"reward_model": self.reward_model, "generator": self.generator, "intake": self._intake}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything that learning depends on: tensors, and the rest as JSON-able values."""
        parts = self._parts()
        tensors = {f"{name}.{key}": w.contiguous() for name, part in parts.items() for key, w in part.tensors().items()}
        tensors["content"] = self._content_EF
        encoder = self.features.encoder.tensors()
        tensors |= {f"encoder.{name}": torch.from_numpy(array.copy()) for name, array in encoder.items()}
        state = {name: part.state() for name, part in parts.items()} | {
            "features": self.features.state(),
            "encoder": self.features.encoder.id,
            "num_updates": self.num_updates,
            "max_event_time_ms": self.max_event_time_ms,
            "late": self._late,
            "stepless": self._stepless,
            "metrics": self._metrics,
            "validation": [[v.num_examples, v.num_clicks, v.expected_clicks, v.log_loss] for v in self._validation],
            "recent": self._recent.state(),
        }
        return tensors, state

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Become the learner whose `state` this was; settings are those of this one."""
        parts = self._parts()
        for name, part in parts.items():
            prefix = f"{name}."
            own = {key.removeprefix(prefix): w.clone() for key, w in tensors.items() if key.startswith(prefix)}
            part.restore(own, state[name])
        encoder = {name: tensors[f"encoder.{name}"].numpy().copy() for name in ("kinds", "mean", "matrix")}
        self.features.encoder = ContentEncoder.from_id(state["encoder"], encoder, text_encoders())
        self.features.restore(state["features"])
        self._content_EF = tensors["content"].clone()
        self.num_updates, self.max_event_time_ms = state["num_updates"], state["max_event_time_ms"]
        self._late, self._metrics = list(state["late"]), dict(state["metrics"])
        self._stepless = state.get("stepless", 0)
        self._validation = deque(
            Validation(num_examples=n, num_clicks=c, expected_clicks=e, log_loss=loss)
            for n, c, e, loss in state["validation"]
        )
        self._recent.restore(state["recent"], self._parser.shelf.make)
        self._encoder.forget()
        self._spec, self._effects = self.features.freeze(), None
        self._gatekeeper = Gatekeeper(self.settings.gate, self.settings.seed)


def _seed(*parts: object) -> int:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
