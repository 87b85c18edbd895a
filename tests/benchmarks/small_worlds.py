"""Worlds in which a policy of the regret benchmark is tested in a second."""

from benchmarks.regret.worlds import BenchWorld
from genco.world_config import WorldConfig

# A world in which a few thousand impressions are enough: many clicks and strong effects.
TINY = BenchWorld(
    config=WorldConfig(
        seed=1, num_products=1, slots=("title", "image"), elements_per_slot=4, candidates_per_slot=4, content_size=2,
        click_rate=0.1, content_sd=0.5, own_sd=0.4, pair_sd=0.3, context_element_sd=0.1, product_sd=0.1,
    )
)  # fmt: skip
RENEWED = BenchWorld(
    config=WorldConfig(
        num_products=2, slots=("title", "image", "tag"), elements_per_slot=5, candidates_per_slot=3, click_rate=0.2,
        new_elements_every_s=20.0, content_size=40, hidden_traits=3, delay_median_s=30.0, delay_cap_s=100.0,
    ),
    label_wait_s=30.0,
)  # fmt: skip
