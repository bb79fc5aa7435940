"""What policies make of a load: short calls behind long ones, a load that swings, very many futures alive at once."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import alive
import head_of_line
import swing
import work

from nalar_mq import event_loop
from nalar_mq.broker import EmbeddedBroker


async def main() -> None:
    """One after the other, on one broker."""
    seed = int(os.environ.get("BENCH_SEED", "1"))
    with tempfile.TemporaryDirectory(prefix="nalar-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        async with EmbeddedBroker(folder / "broker") as broker:
            if work.wants("head"):
                await head_of_line.measure(broker.access, folder, seed)
            if work.wants("swing"):
                await swing.measure(broker.access, folder, seed)
            if work.wants("alive"):
                await alive.measure(broker.access, folder, seed)
    work.done()


if __name__ == "__main__":
    event_loop.run(main())
