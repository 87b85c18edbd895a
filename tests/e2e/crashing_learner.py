"""`genco learn` that kills itself, as the kernel would, when it reaches a crash point for the n-th time.

python -m tests.e2e.crashing_learner POINT N
"""

import os
import signal
import sys

from learner.agents import run
from learner.crash_points import CrashPoint
from streams.contracts.settings import LearnSettings, load
from streams.telemetry import configure_logging


def main() -> None:
    point, visits_left = CrashPoint(sys.argv[1]), int(sys.argv[2])

    def at(reached: CrashPoint) -> None:
        nonlocal visits_left
        if reached is point:
            visits_left -= 1
            if visits_left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    configure_logging("INFO")
    run(load(LearnSettings), at=at)


if __name__ == "__main__":
    main()
