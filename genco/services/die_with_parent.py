"""Become another program that the kernel kills when the process that started this one dies.

    python die_with_parent.py PARENT_PID SIGNAL PROGRAM [ARGUMENT ...]

A wrapper instead of `preexec_fn`, which runs Python between fork and exec, where a lock held by another thread of the
parent stays held for ever. The wish to die survives `exec`, so the program keeps it, with the process id of the
wrapper. The file stands alone, so that it starts in 20 ms (`python -I -S`). Where there is no prctl (macOS) it only
runs the program.
"""

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1
EXIT_CANNOT_RUN = 126
"""What a shell answers for a program that is there and does not run."""


def main(arguments: list[str]) -> None:
    """Bind this process to its parent and replace it by the program; does not return."""
    parent_pid, signal_number, *command = arguments
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0) != 0:
            sys.exit(f"prctl(PR_SET_PDEATHSIG) failed: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != int(parent_pid):
        return  # The parent died before the kernel knew our wish: no signal will come.
    try:
        os.execvp(command[0], command)  # noqa: S606 - no shell is the point; the command is the caller's
    except OSError as error:
        sys.stderr.write(f"cannot run {command[0]}: {error.strerror}\n")
        sys.exit(EXIT_CANNOT_RUN)


if __name__ == "__main__":
    main(sys.argv[1:])
