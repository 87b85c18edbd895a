"""The policies under test: ours and the peers, by the names of the command line.

A policy's module is imported only where it plays, for each needs other libraries, and one that is missing must not stop
the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from benchmarks.regret.policies.base import BenchPolicy

OURS: Final = "genco"


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a policy is found, and where it can play."""

    module: str
    """Below this package."""
    name: str
    """Of its class."""
    needs: tuple[str, ...] = ()
    """Libraries that it imports, of the extra `bench`."""
    worlds: tuple[str, ...] | None = None
    """Worlds that it can play; None: all."""

    def load(self) -> type[BenchPolicy]:
        """Return the class of the policy.

        Raises:
            ImportError: If a library that it needs is not installed.
        """
        policy: type[BenchPolicy] = getattr(import_module(f"{__name__}.{self.module}"), self.name)
        return policy


REGISTRY: Final[dict[str, Entry]] = {
    OURS: Entry("genco", "Genco"),
    "uniform": Entry("uniform", "Uniform"),
    "beta-ts": Entry("beta_ts", "BetaTs"),
    "linear-ts": Entry("linear_ts", "LinearTs", needs=("numba",)),
    "mvt": Entry("mvt", "Mvt", needs=("numba",)),
    "fm-ensemble": Entry("fm_ensemble", "FmEnsemble", needs=("numba", "torch")),
    "vw-ccb": Entry("vw", "VwCcb", needs=("vowpalwabbit",)),
    "vw-slates": Entry("vw", "VwSlates", needs=("vowpalwabbit",)),
    "aes-tree": Entry("aes_tree", "AesTree", worlds=("single-product",)),
    "bayes-content": Entry("bayes_content", "BayesContent", needs=("numba",)),
    "bayes-content-forget": Entry("bayes_content", "BayesContentForget", needs=("numba",)),
}

ABLATIONS: Final[dict[str, Entry]] = {
    "diagonal": Entry("ablation_diagonal", "Diagonal"),
    "no-rest": Entry("ablations", "NoRest"),
    "no-pairs": Entry("ablations", "NoPairs"),
    "no-traits": Entry("ablations", "NoTraits"),
    "no-appeal": Entry("ablations", "NoAppeal"),
    "fixed-variances": Entry("ablations", "FixedVariances"),
    "one-memory": Entry("ablations", "OneMemory"),
    "same-pairs": Entry("ablations", "SamePairs"),
    "no-change-test": Entry("ablations", "NoChangeTest"),
    "no-content": Entry("ablations", "NoContent"),
    "no-generator": Entry("ablations", "NoGenerator"),
    "raw-generator": Entry("ablations", "RawGenerator"),
    "creative-credit": Entry("ablations", "CreativeCredit"),
    "labels-as-they-come": Entry("ablations", "LabelsAsTheyCome", worlds=("delays",)),
    "waits-for-the-window": Entry("ablations", "WaitsForTheWindow", worlds=("delays",)),
}
"""Ours without one of its parts each."""

VARIANTS: Final[dict[str, Entry]] = {
    "neural-additive": Entry("neural_mil", "NeuralAdditive", needs=("numba", "torch")),
    "neural-attention": Entry("neural_mil", "NeuralAttention", needs=("numba", "torch")),
    "neural-noisy-or": Entry("neural_mil", "NeuralNoisyOr", needs=("numba", "torch")),
}
"""Other ways to model a card, played only when they are named."""

ENTRIES: Final = REGISTRY | ABLATIONS | VARIANTS
