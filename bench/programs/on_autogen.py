"""AutoGen: two agents in worker processes, joined by its gRPC host in a third one."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from dataclasses import dataclass
from typing import Any

import nats_process
import work
from autogen_core import AgentId, MessageContext, RoutedAgent, message_handler, try_get_known_serializers_for_type
from autogen_ext.runtimes.grpc import GrpcWorkerAgentRuntime, GrpcWorkerAgentRuntimeHost


@dataclass
class Work:
    x: int
    added: int = 0


class Echo(RoutedAgent):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__("echo")

    @message_handler  # type: ignore[untyped-decorator]
    async def on_work(self, message: Work, ctx: MessageContext) -> Work:
        return Work(message.x + message.added)


async def joined(port: int) -> Any:
    runtime = GrpcWorkerAgentRuntime(f"127.0.0.1:{port}")
    runtime.add_message_serializer(try_get_known_serializers_for_type(Work))
    await runtime.start()
    return runtime


async def serve(port: int, worker: str) -> None:
    if worker == "host":
        GrpcWorkerAgentRuntimeHost(f"127.0.0.1:{port}").start()
    else:
        nats_process.wait_until_listens(port)
        await Echo.register(await joined(port), f"echo{worker}", Echo)
    await asyncio.Event().wait()


async def collect(calls: list[Any]) -> list[Any]:
    return await asyncio.gather(*calls)


async def measure(port: int) -> None:
    nats_process.wait_until_listens(port)
    runtime = await joined(port)
    agents = [AgentId(f"echo{worker}", "0") for worker in range(2)]

    async def call(worker: int, x: int, added: int = 0) -> int:
        answer: int = (await runtime.send_message(Work(x, added), agents[worker])).x
        return answer

    def submit(i: int) -> Any:
        return asyncio.ensure_future(call(i & 1, i))

    for worker in range(2):
        await nats_process.first_answer(lambda worker=worker: call(worker, 1))
    work.answered()
    if work.wants("rtt"):
        await work.round_trips_async(lambda i: call(0, i))
    if work.wants("pipe"):
        await work.many_async("pipe", work.PIPE_CALLS, submit, collect)
    if work.wants("chain"):
        await work.chain_awaited(lambda x, i: call(i & 1, x, 1))
    if work.wants("fan"):
        await work.many_async("fan", work.FAN_CALLS, submit, collect)
    work.done()
    with contextlib.suppress(Exception):
        await runtime.stop()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        asyncio.run(serve(int(sys.argv[1]), sys.argv[2]))
    else:
        chosen = nats_process.free_port()
        with nats_process.workers(__file__, [[str(chosen), name] for name in ("host", "0", "1")]):
            asyncio.run(measure(chosen))
