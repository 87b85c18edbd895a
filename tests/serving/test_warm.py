"""What is compiled ahead is all that a decision runs: in another process nothing is left to compile."""

import subprocess
import sys
from pathlib import Path

import pytest

CHECK = """
from serving import ascent, pointer, refine
from serving.warm import warm
warm()
for kernel in (ascent.main_effects, ascent.values, refine._relay, pointer._visit):
    assert len(kernel.signatures) == 1, kernel
    assert sum(kernel.stats.cache_misses.values()) == {misses}, kernel
"""


@pytest.mark.long
def test_second_process_compiles_nothing(tmp_path: Path) -> None:
    for misses in (1, 0):
        environment = {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
        subprocess.run([sys.executable, "-c", CHECK.format(misses=misses)], check=True, env=environment)
