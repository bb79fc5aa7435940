"""Where the command `nalar` begins: `cli` is imported here, for which Python takes a moment.

An interrupt in that moment ends the process at once, in the way that `cli` ends later; there is nothing yet to clean up.
"""

from __future__ import annotations

import os
import signal
from typing import NoReturn

_EXIT_INTERRUPTED = 130


def main() -> NoReturn:
    """Entry point of the command; leaves with one of the documented exit codes."""
    is_heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a shell may have it ignored
    if is_heard:
        signal.signal(signal.SIGINT, _end)
    from nalar_mq.cli import main as run

    if is_heard:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


def _end(_number: int, _frame: object) -> NoReturn:
    os.write(2, b"nalar: interrupted\n")
    os._exit(_EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
