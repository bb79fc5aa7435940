"""A long job that uses whatever a job may: completion order, time, chance, effects of its own and managed state.

The keys of its calls hold all that may be different in another attempt. One that saw anything else than the former ones would
make other calls, and leave other keys behind.
"""

import math
import os
from typing import Any

import long_job_tools as tools
from witness import note

from nalar_mq import (
    Future,
    ManagedList,
    ManagedValue,
    agent,
    as_completed,
    effect,
    gather,
    method,
    now,
    random,
    sleep,
    workflow,
)

SQUARES = 6
ADDS = 3
CALLS_OF_A_ROUND = SQUARES + ADDS + 1


@agent
class Tally:
    """Kept on disk by the workers that run the job."""

    numbers: ManagedList[int]
    total: ManagedValue[int] = ManagedValue(0)

    @method
    async def add(self, number: int) -> tuple[int, int]:
        self.numbers.append(number)
        self.total.value += number
        return len(self.numbers), self.total.value

    @method
    async def read(self) -> tuple[int, list[int]]:
        return self.total.value, list(self.numbers)


async def leave(key: str) -> int:
    note("began", key)
    return os.getpid()


async def _squares(name: str, seconds: float) -> list[int]:
    """In the order in which they came."""
    draws = [random().randrange(1_000_000) for _ in range(SQUARES)]
    calls: list[Future[int]] = [
        tools.square(f"{name}/{n}/{drawn}", n, seconds * drawn / 1_000_000) for n, drawn in enumerate(draws)
    ]
    return [math.isqrt(await call) async for call in as_completed(calls)]


@workflow(timeout_s=None)
async def long_job(key: str, rounds: int, seconds: float) -> dict[str, Any]:
    """`rounds` times: squares beside each other, a sum over them in their order, and some numbers for the tally."""
    note("attempt", key)
    add = Tally.add.options(session=key)
    folded, orders, effects, counts = 0, [], [], []
    for number in range(rounds):
        name = f"{key}/{number}"
        order = await _squares(name, seconds)
        effects.append(await effect(leave, f"effect/{name}/{len(effects)}"))
        await sleep(seconds * random().random())
        folded = await tools.fold(f"{name}/fold/{now().timestamp()}/{folded}/{''.join(map(str, order))}", folded, order)
        counts += await gather(*[add(ADDS * number + n) for n in range(ADDS)])
        orders.append(order)
    return {"folded": folded, "orders": orders, "effects": effects, "counts": counts}
