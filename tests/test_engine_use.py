"""What processes ask of model servers, and what those say of themselves: counted, told, and put together."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from nalar_mq import engines
from nalar_mq.address import Address, Subjects
from nalar_mq.changes import Changes
from nalar_mq.cli import _show_overview
from nalar_mq.client import connect
from nalar_mq.columns import MOST_ENGINES, EngineFigures, decode_report
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.controllers.global_controller import GlobalController, Trusted
from nalar_mq.controllers.local_controller import LocalController
from nalar_mq.controllers.overview import decode_overview, encode_overview, engine_rows, overview_of
from nalar_mq.controllers.policies import default
from nalar_mq.controllers.view import Engine, View
from nalar_mq.engine_use import EngineUse, EngineUses, Metrics, read_metrics
from nalar_mq.errors import EngineError, MalformedReportError
from nalar_mq.messages import Call
from nalar_mq.nats_transport import NatsTransport

APP = Path(__file__).parent / "apps" / "model_app"
PATIENCE_S = 120.0
LLAMA = """# HELP llamacpp:requests_processing Number of requests processing.
# TYPE llamacpp:requests_processing gauge
llamacpp:requests_processing 2
llamacpp:requests_deferred 1
llamacpp:tokens_predicted_total 3469
llamacpp:predicted_tokens_seconds 0.978744
"""
VLLM = """# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a model, with } and {"} 4.0
vllm:num_requests_running{engine="1",model_name="m"} 1.0
vllm:num_requests_waiting{engine="0",model_name="m"} 7.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="x"} 70.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.75
vllm:generation_tokens_total{engine="0",model_name="m"} 1.5e+03
vllm:generation_tokens_total{engine="1",model_name="m"} 500
vllm:generation_tokens_created{engine="0",model_name="m"} 1.7e9
"""


@pytest.mark.parametrize(
    ("page", "metrics"),
    [
        (LLAMA, Metrics(2, 1, None, 3469.0)),
        (VLLM, Metrics(5, 7, 0.75, 2000.0)),
        (VLLM.replace("kv_cache", "gpu_cache"), Metrics(5, 7, 0.75, 2000.0)),
        ("vllm:num_requests_running 1\n", Metrics(1, 0, None, 0.0)),
        ("", None),
        ("<html>404</html>\n{}\n } \n#", None),
        ("vllm:num_requests_running NaN\nvllm:num_requests_waiting 3", None),
        ("vllm:num_requests_running{", None),
        ("vllm:num_requests_running -1", None),
    ],
)
def test_pages_of_metrics(page: str, metrics: Metrics | None) -> None:
    assert read_metrics(page) == metrics


def test_tokens_per_second_are_of_the_time_between_two_looks() -> None:
    use = EngineUse("http://user:secret@host:8000/v1", "key")
    assert use.name == "host:8000"
    assert use.figures(Metrics(0, 0, None, 1000.0), 10.0).tokens_per_s == 0.0, "from when these are is not known"
    assert use.figures(Metrics(0, 0, None, 1600.0), 12.0).tokens_per_s == 300.0
    assert use.figures(Metrics(0, 0, None, 5.0), 13.0).tokens_per_s == 0.0, "it has begun anew"
    use.write(50)
    assert use.figures(None, 14.0).tokens_per_s == 0.0, "other tokens than before"
    use.write(50)
    assert use.figures(None, 16.0).tokens_per_s == 25.0


def test_a_process_tells_of_a_bounded_number_of_servers() -> None:
    uses = EngineUses()
    for number in range(MOST_ENGINES + 10):
        with uses.of(f"http://h:{number}/v1", "").request():
            pass
    assert len(uses.all()) == MOST_ENGINES
    assert uses.of("http://h:1/v1", "") is uses.of("http://h:1/v1", "")


def test_an_engine_is_forgotten_unless_something_runs_there() -> None:
    uses = EngineUses()
    use = uses.of("http://h:1/v1", "")
    with use.request():
        assert not uses.forget(use)
    assert uses.forget(use)
    assert uses.all() == []


def seen(*told: dict[str, EngineFigures]) -> View:
    view = View()
    for number, engines_told in enumerate(told):
        changes = Changes(f"w{number}", 1, "n")
        changes.set_engines(engines_told)
        for data in changes.reports(1.0, 1 << 20):
            view.fold(f"w{number}", data, 1.0 + number)
    view.settle(9.0)
    return view


def test_what_an_engine_says_of_itself_counts_once_and_what_workers_ask_of_it_together() -> None:
    view = seen(
        {"vllm": EngineFigures(3, 1, 0.5, 10.0, 7, 1, True), "other": EngineFigures(2, None, None, 5.0, 3, 0)},
        {"vllm": EngineFigures(4, 0, 0.6, 20.0, 2, 0, True), "other": EngineFigures(1, None, None, 1.0, 1, 1)},
        {"vllm": EngineFigures(1, None, None, 1.0, 1, 1)},
    )
    assert view.engines == {
        "other": Engine("other", ("w0", "w1"), 3, None, None, 6.0, 4, 1),
        "vllm": Engine("vllm", ("w0", "w1", "w2"), 4, 0, 0.6, 20.0, 10, 2),
    }
    assert [row.name for row in engine_rows(view)] == ["vllm", "other"]
    view.forget("w1")
    assert view.engines["other"].workers == ("w0",)


def test_top_shows_engines_and_what_has_been_spent(capsys: pytest.CaptureFixture[str]) -> None:
    view = seen({"vllm:8000": EngineFigures(3, 1, 0.5, 10.0, 7, 1, True), "other": EngineFigures(2)})
    changes = Changes("payer", 1, "n")
    changes.spend(Call(b"", "a", "", b"", tenant="acme"), "report", 1234.5, "tokens")
    for data in changes.reports(1.0, 1 << 20):
        view.fold("payer", data, 1.0)
    view.settle(9.0)
    overview = overview_of(view, controller="c", policy="p", term=1, rounds=1, round_s=0.1, decisions=())
    _show_overview(decode_overview(encode_overview(overview)))
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["vllm:8000", "1", "3", "1", "50%", "10.0", "7", "1"] in shown
    assert ["other", "1", "2", "-", "-", "0.0", "0", "0"] in shown
    assert ["tenant", "acme", "1234.5", "tokens"] in shown
    assert ["workflow", "report", "1234.5", "tokens"] in shown


def test_what_has_not_changed_is_not_told_again() -> None:
    changes = Changes("w", 1, "n")
    told: list[bool] = []
    for _ in range(2):
        changes.set_engines({"e": EngineFigures(1)})
        (data,) = changes.reports(1.0, 1 << 20)
        told.append(decode_report(data).engines is not None)
    assert told == [True, False]


@pytest.mark.parametrize(
    "engines_told",
    [
        {"x" * 300: EngineFigures(1)},
        {"e": EngineFigures(-1)},
        {"e": EngineFigures(0, 0, float("nan"))},
        {"e": EngineFigures(0, 0, 0.0, float("inf"))},
        {f"e{number}": EngineFigures(0) for number in range(MOST_ENGINES + 1)},
    ],
)
def test_figures_that_are_none_are_refused(engines_told: dict[str, EngineFigures]) -> None:
    with pytest.raises(MalformedReportError):
        seen(engines_told)


def has_local_model() -> bool:
    with contextlib.suppress(EngineError):
        return engines.model_path().exists() and importlib.util.find_spec("xllamacpp") is not None
    return False


@pytest.mark.timeout(400)
@pytest.mark.skipif(not has_local_model(), reason="the embedded model is not installed")
async def test_the_embedded_model_is_seen_at_work_and_its_tokens_count(
    broker_access: BrokerAccess, namespace: str, tmp_path: Path
) -> None:
    settings = Settings(broker=broker_access, namespace=namespace, node="here", lease_s=3.0, state=str(tmp_path / "state"))
    variables = {"NALAR_ENGINE_DIR": str(tmp_path / "engine"), "NALAR_ENGINE_URL": "", "OPENAI_BASE_URL": ""}
    transport = await NatsTransport.connect(broker_access, name="control")
    try:
        async with (
            LocalController(APP, settings, workers=1, variables=variables, log_level="warning") as node,
            connect(settings=settings) as client,
            GlobalController(
                transport, Subjects(namespace), Address("control", 1), Trusted(default()), lease_s=3.0
            ) as controller,
        ):
            await node.ready()
            await client.wait_for("llm")
            view = controller.view
            rates: list[float] = []

            async def until(holds: Callable[[Engine], object]) -> None:
                async with asyncio.timeout(PATIENCE_S):
                    while not any(rates.append(engine.tokens_per_s) or holds(engine) for engine in view.engines.values()):
                        await asyncio.sleep(0.05)

            call = client.options(tenant="acme", timeout_s=None).call("llm.chat", "Count to a hundred.", max_tokens=100)
            await until(lambda engine: engine.running == 1)
            overview = decode_overview((await transport.request(Subjects(namespace).overview, b"", timeout_s=30.0)).data)
            (row,) = overview.engines
            assert (row.workers, row.errors) == (1, 0)
            assert row.waiting is not None, "it says so itself"
            assert await call
            await until(lambda engine: engine.requests == 1 and not engine.running)
            await until(lambda engine: any(rates))
            spending = view.spending
            await until(lambda engine: spending.total("tenant", "acme") == spending.total("agent", "llm") > 20)
    finally:
        await transport.aclose()
