"""A worker as a program: `one_worker.py SETTINGS APP`. It says when it is ready, and goes on until somebody stops it."""

import asyncio
import sys
from pathlib import Path

import msgspec

from nalar_mq.app import load_app
from nalar_mq.config import Settings
from nalar_mq.worker import Worker


async def main() -> None:
    settings = msgspec.json.decode(sys.argv[1], type=Settings)
    async with Worker(load_app(Path(sys.argv[2])), settings, name="w") as worker:
        print("ready", flush=True)
        await worker.closed


asyncio.run(main())
