"""What calls have cost: summed by whom it is for, told in reports, and what a budget makes of it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import pytest
from controlled import ControlledSite, controller_of
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import PATIENCE_S, until

from nalar_mq import changes as changes_module
from nalar_mq import spend
from nalar_mq.actions import Limit
from nalar_mq.changes import Changes
from nalar_mq.client import connect
from nalar_mq.columns import MOST_ACCOUNTS, Account, decode_report
from nalar_mq.config import BrokerAccess, Settings
from nalar_mq.controllers import spending as spending_module
from nalar_mq.controllers.local_controller import LocalController
from nalar_mq.controllers.policies import BudgetLimits
from nalar_mq.controllers.policy import Action
from nalar_mq.controllers.spending import Accounts, Spending
from nalar_mq.controllers.view import View
from nalar_mq.errors import ForgedReportError, MalformedReportError, MissedReportError, RemoteError
from nalar_mq.messages import Call
from nalar_mq.spending import spent_by

APP = Path(__file__).parent / "apps" / "spending_app.py"
LEASE_S = 3.0


class Play:
    """Processes that spend, a view that hears of it or does not, and the sums that there should be."""

    def __init__(self, seed: int, *, loses: bool, is_heard: bool = False) -> None:
        self.chance = Random(seed)
        self.loses = loses
        self.is_heard = is_heard
        self.view = View()
        self.processes = {name: Changes(name, 1, "n") for name in ("w1", "w2")}
        self.lives = dict.fromkeys(self.processes, 1)
        self.sums: dict[tuple[str, str, str], float] = defaultdict(float)
        self.untold: list[tuple[str, tuple[str, str, str], float]] = []

    def spend(self, name: str) -> None:
        chance = self.chance
        call = Call(b"", chance.choice("ab"), "", b"", session=f"s{chance.randrange(12)}", tenant=chance.choice(["", "t"]))
        amount, unit, workflow = float(chance.randrange(5)), chance.choice(["tokens", "usd"]), chance.choice(["", "w"])
        self.processes[name].spend(call, workflow, amount, unit)
        for scope, whose in (("session", call.session), ("workflow", workflow), ("agent", call.actor), ("tenant", call.tenant)):
            if whose:
                self.untold.append((name, (scope, whose, unit), amount))

    def report(self, name: str, *, is_lost: bool = False, whole: bool = False) -> None:
        changes = self.processes[name]
        for data in changes.whole(1.0, 2_000) if whole else changes.reports(1.0, 2_000):
            if not is_lost:
                self.hear(name, data)
        for told in [told for told in self.untold if told[0] == name]:
            self.untold.remove(told)
            self.sums[told[1]] += told[2]

    def hear(self, name: str, data: bytes) -> None:
        try:
            self.view.fold(name, data, 1.0)
        except MissedReportError:
            assert self.loses

    def restart(self, name: str) -> None:
        """What it has not told goes with it."""
        self.lives[name] += 1
        self.processes[name] = Changes(name, self.lives[name], "n")
        self.untold = [told for told in self.untold if told[0] != name]

    def step(self) -> None:
        name = self.chance.choice(["w1", "w2"])
        act = self.chance.choice(["spend", "spend", "spend", "report", "whole", "restart", "lose", "silence"])
        if act == "spend":
            self.spend(name)
        elif act == "restart":
            self.report(name, whole=True)
            self.restart(name)
        elif act == "silence" and not self.is_heard:
            self.view.forget(name)  # and it is heard again, in the same life
            self.report(name, is_lost=True)
            self.report(name, whole=True)
        else:
            self.report(name, is_lost=self.loses and act == "lose", whole=act == "whole")

    def check(self) -> None:
        for name in self.processes:
            self.report(name, whole=True)
        told = {
            (scope, whose, unit): amount
            for scope in ("session", "workflow", "agent", "tenant")
            for unit in ("tokens", "usd")
            for whose, amount in self.view.spending.totals(scope, unit).items()
        }
        assert told == {account: amount for account, amount in self.sums.items() if account in told or amount}
        assert not self.view.refused.keys() - {"MissedReportError"}


@given(seed=st.integers(0, 1 << 32), steps=st.integers(1, 100), loses=st.booleans())
@settings(max_examples=100, deadline=None)
def test_sums_are_right_whatever_is_told_when(seed: int, steps: int, loses: bool) -> None:
    play = Play(seed, loses=loses)
    for _ in range(steps):
        play.step()
    play.check()


@given(seed=st.integers(0, 1 << 32), steps=st.integers(1, 200))
@settings(max_examples=60, deadline=None)
def test_sums_stay_right_when_accounts_are_dropped_to_make_room(seed: int, steps: int) -> None:
    """As long as every report is heard: what was told of an account that is not there any more cannot be told again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(changes_module, "MOST_ACCOUNTS", 3)
        patch.setattr(spending_module, "MOST_ACCOUNTS", 3)
        play = Play(seed, loses=False, is_heard=True)
        for _ in range(steps):
            play.step()
        play.check()


def test_of_many_sessions_those_that_spent_last_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spending_module, "MOST_NAMES", 2)
    spending, accounts = Spending(), Accounts()
    for number, name in enumerate(["a", "b", "c"]):
        spending.take(accounts, (Account(number, "session", name, "tokens"),), (), {number: 1.0})
        spending.take(accounts, (), (), {0: 2.0 + number})
    assert spending.totals("session") == {"c": 1.0, "a": 4.0}


@pytest.mark.parametrize(
    ("accounts", "spent"),
    [
        ((), {1: 1.0}),
        ((Account(1, "planet", "mars", "tokens"),), {1: 1.0}),
        ((Account(1, "agent", "b", "tokens"), Account(1, "agent", "c", "tokens")), {1: 1.0}),
        ((Account(0, "agent", "b", "tokens"),), {0: 3.0}),
        ((), {0: 1.0}),
        ((), {0: float("inf")}),
        ((), {0: float("nan")}),
        (tuple(Account(number, "agent", f"a{number}", "tokens") for number in range(1, 10 * MOST_ACCOUNTS + 1)), {}),
    ],
)
def test_accounts_that_contradict_themselves(accounts: tuple[Account, ...], spent: dict[int, float]) -> None:
    known = Accounts()
    Spending().take(known, (Account(0, "agent", "a", "tokens"),), (), {0: 2.0})
    known.check((), {0: 2.0})
    with pytest.raises(MalformedReportError):
        known.check(accounts, spent)


def test_who_was_silent_and_is_heard_again_has_not_spent_everything_anew() -> None:
    changes, view = Changes("w", 1, "n"), View()
    for round in range(3):
        changes.spend(Call(b"", "agent", "", b"", session="s", tenant="acme"), "", 100.0, "tokens")
        for data in changes.whole(float(round), 1 << 20):
            view.fold("w", data, float(round))
        assert view.spending.totals("tenant") == {"acme": 100.0 * (round + 1)}
        view.forget("w")


def test_of_former_incarnations_only_the_sums_are_kept() -> None:
    view = View()
    for incarnation in range(1, 6):
        changes = Changes("w", incarnation, "n")
        for number in range(10):
            changes.spend(Call(b"", "agent", "", b"", session=f"s{incarnation}-{number}"), "", 1.0, "tokens")
        for data in changes.reports(1.0, 1 << 20):
            view.fold("w", data, 1.0)
        view.forget("w")
        assert view._silent_count == 11
    assert view.spending.totals("agent") == {"agent": 50.0}


@pytest.mark.interpreted
def test_a_controller_that_begins_later_learns_what_tenants_have_spent_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes_module, "MOST_ACCOUNTS", 5)
    changes = Changes("w", 1, "n")
    for number in range(100):
        changes.spend(Call(b"", "agent", "", b"", session=f"s{number}", tenant="acme"), "flow", 1.0, "tokens")
        changes.reports(1.0, 1 << 20)
    view = View()
    for data in changes.whole(1.0, 1 << 20):
        view.fold("w", data, 1.0)
    assert [view.spending.totals(scope) for scope in ("tenant", "agent", "workflow")] == [
        {"acme": 100.0},
        {"agent": 100.0},
        {"flow": 100.0},
    ]
    assert len(view.spending.totals("session")) == 5


def test_a_client_which_runs_no_calls_cannot_spend_for_others() -> None:
    changes, view = Changes("client-x", 1, "n"), View()
    changes.spend(Call(b"", "agent", "", b"", session="s", tenant="acme"), "", 100.0, "tokens")
    (data,) = changes.reports(1.0, 1 << 20)
    with pytest.raises(ForgedReportError):
        view.fold("client-x", data, 1.0)
    assert view.spending.totals("tenant") == {}


def test_however_many_units_there_are_the_first_ones_count() -> None:
    spending, accounts = Spending(), Accounts()
    for number in range(1000):
        spending.take(accounts, (Account(number, "agent", "a", f"unit-{number}"),), (), {number: 1.0})
    assert spending.total("agent", "a", "unit-0") == 1.0
    assert len(spending.units()) == 64 * 5


def test_a_name_that_is_too_long_for_reports_spoils_none() -> None:
    changes, view = Changes("w", 1, "n"), View()
    changes.spend(Call(b"", "agent", "", b"", session="s" * 300, tenant="acme"), "", 1.0, "tokens")
    for data in changes.reports(1.0, 1 << 20):
        view.fold("w", data, 1.0)
    assert (view.spending.total("tenant", "acme"), view.spending.totals("session")) == (1.0, {})


def test_names_travel_once() -> None:
    changes = Changes("w", 1, "n")
    call = Call(b"", "agent", "", b"", session="s")
    told: list[int] = []
    for _ in range(3):
        changes.spend(call, "", 1.0, "tokens")
        (data,) = changes.reports(1.0, 1 << 20)
        told.append(len(decode_report(data).accounts))
    assert told == [2, 0, 0]


@pytest.mark.parametrize("amount", [-1.0, float("nan"), float("inf")])
def test_an_amount_that_is_none(amount: float) -> None:
    with pytest.raises(ValueError, match="finite and not negative"):
        spend(amount)


@pytest.mark.parametrize("unit", ["", "x" * 33])
def test_a_unit_that_is_none(unit: str) -> None:
    with pytest.raises(ValueError, match="characters"):
        spend(1, unit)


def test_outside_of_calls_nothing_is_counted() -> None:
    spend(3)
    spent: list[tuple[float, str]] = []
    with spent_by(lambda amount, unit: spent.append((amount, unit))):
        spend(3)
        spend(0)
    spend(3)
    assert spent == [(3.0, "tokens")]


# With real processes.


class Mind:
    """A policy of which the budgets may change."""

    def __init__(self) -> None:
        self.limits = BudgetLimits()

    def decide(self, view: View) -> Iterable[Action]:
        return self.limits.decide(view)


class Site(ControlledSite):
    """Two workers, a client, and a controller that minds budgets."""

    mind: Mind

    def spent(self, scope: str, name: str, unit: str = "tokens") -> float:
        return self.controller.view.spending.total(scope, name, unit)

    async def limited(self, **whose: str) -> list[Limit]:
        """Returns when those are limited, and every process of ours knows it."""
        wanted = [Limit(agent, 0, **whose) for agent in ("buy", "wait_for")]
        states = lambda: [  # noqa: E731
            Limit(state.agent, state.running, state.session, state.tenant, job=state.job)
            for state in self.client.process.enforcement.standing.states
            if isinstance(state, Limit)
        ]
        await until(lambda: all(limit in states() for limit in wanted), f"never limited: {self.controller.governor.history}")
        await asyncio.sleep(LEASE_S)  # within which each worker has heard of it, whatever becomes of messages
        return [state for state in self.client.process.enforcement.standing.states if isinstance(state, Limit)]


@asynccontextmanager
async def running(access: BrokerAccess, namespace: str, folder: Path) -> AsyncIterator[Site]:
    settings = Settings(broker=access, namespace=namespace, node="here", lease_s=LEASE_S, state=str(folder / "state"))
    mind = Mind()
    async with (
        LocalController(APP, settings, workers=2, variables={"SPENDING_FOLDER": str(folder)}, log_level="warning") as node,
        connect(settings=settings) as client,
        controller_of(access, namespace, mind, lease_s=LEASE_S) as controller,
    ):
        await node.ready()
        await client.wait_for("buy")
        await until(lambda: controller.is_leader and len(controller.view.workers) == 2, "nobody has reported")
        yield Site(folder, node, client, controller, mind)


@pytest.fixture
async def site(broker_access: BrokerAccess, namespace: str, tmp_path: Path) -> AsyncIterator[Site]:
    async with running(broker_access, namespace, tmp_path) as found:
        yield found


async def test_what_a_call_spends_is_counted_for_all_that_it_belongs_to(site: Site) -> None:
    client = site.client.options(session="s", tenant="acme")
    await client.call("outer", 5.0)
    await client.call("buy", "usd", 2.0, "usd")
    with pytest.raises(ValueError, match="paid for nothing"):
        await client.call("buy_and_fail", 7.0)
    await client.call("buy_apart", 11.0)
    await client.call("Shop.buy_in_thread", 13.0)
    await until(lambda: site.spent("session", "s") == 36.0, "it was never told, or wrongly")
    assert site.spent("tenant", "acme") == 36.0
    agents = {name: site.spent("agent", name) for name in ("buy", "buy_and_fail", "buy_apart", "Shop")}
    assert agents == {"buy": 5.0, "buy_and_fail": 7.0, "buy_apart": 11.0, "Shop": 13.0}
    assert (site.spent("workflow", "outer"), site.spent("workflow", "inner")) == (5.0, 0.0)
    assert (site.spent("tenant", "acme", "usd"), site.spent("agent", "buy_apart", "searches")) == (2.0, 11.0)


async def test_calls_that_run_as_a_batch_bear_equal_parts(site: Site) -> None:
    calls = [site.client.options(session=f"s{number}").call("buy_together", 1.0) for number in range(40)]
    await asyncio.gather(*calls)
    await until(lambda: site.spent("agent", "buy_together") == pytest.approx(40.0), "it was never told, or wrongly")
    assert sum(site.controller.view.spending.totals("session").values()) == pytest.approx(40.0)


async def test_a_job_over_its_budget_begins_nothing_more_and_others_do(site: Site) -> None:
    site.mind.limits = BudgetLimits(per_job=100.0)
    dear = await site.client.submit("shop", "dear", 100.0, "open", job_id="dear")
    cheap = await site.client.submit("shop", "cheap", 99.0, "open", job_id="cheap")
    limits = await site.limited(job="dear")
    assert {limit.job for limit in limits} == {"dear"}
    site.open("open")
    assert await cheap.result(timeout=PATIENCE_S) == ["cheap-1", "cheap-2"]
    told = [state for decision in site.controller.governor.history for state in decision.began if isinstance(state, Limit)]
    assert "job 'dear' has spent 100 tokens" in {state.reason for state in told if state.job == "dear"}
    assert "dear-2" not in site.written("bought")
    site.mind.limits = BudgetLimits(per_job=1000.0)
    assert await dear.result(timeout=PATIENCE_S) == ["dear-1", "dear-2"]


async def test_a_tenant_over_its_budget_begins_nothing_more_and_others_do(site: Site) -> None:
    site.mind.limits = BudgetLimits({"poor": 10.0, "rich": 1000.0})
    poor, rich = (site.client.options(tenant=tenant) for tenant in ("poor", "rich"))
    await asyncio.gather(poor.call("buy", "poor-1", 10.0), rich.call("buy", "rich-1", 10.0))
    limits = await site.limited(tenant="poor")
    assert {(limit.tenant, limit.reason) for limit in limits} == {("poor", "tenant 'poor' has spent 10 tokens")}
    held = poor.call("buy", "poor-2", 0.0)
    assert await rich.call("buy", "rich-2", 0.0) == "rich-2"
    assert await site.client.call("buy", "nobody's", 0.0) == "nobody's"
    assert "poor-2" not in site.written("bought")
    site.mind.limits = BudgetLimits()
    assert await held == "poor-2"


async def test_a_job_of_a_tenant_counts_for_it_and_is_limited_with_it(site: Site) -> None:
    site.mind.limits = BudgetLimits({"poor": 100.0})
    poor, rich = (site.client.options(tenant=tenant) for tenant in ("poor", "rich"))
    dear = await poor.submit("shop", "dear", 100.0, "open")
    cheap = await rich.submit("shop", "cheap", 100.0, "open")
    await site.limited(tenant="poor")
    site.open("open")
    assert await cheap.result(timeout=PATIENCE_S) == ["cheap-1", "cheap-2"]
    assert "dear-2" not in site.written("bought")
    assert site.spent("tenant", "rich") >= 100.0
    site.mind.limits = BudgetLimits()
    assert await dear.result(timeout=PATIENCE_S) == ["dear-1", "dear-2"]


async def test_a_job_over_its_budget_fails_with_the_reason_where_that_is_wanted(site: Site) -> None:
    site.mind.limits = BudgetLimits(per_job=100.0, refuses=True)
    dear = await site.client.submit("shop", "dear", 100.0, "open", job_id="dear")
    cheap = await site.client.submit("shop", "cheap", 99.0, "open", job_id="cheap")
    await site.limited(job="dear")
    site.open("open")
    with pytest.raises(RemoteError, match="job 'dear' has spent 100 tokens") as failed:
        await dear.result(timeout=PATIENCE_S)
    assert failed.value.type_name == "NotAllowedError"
    assert await cheap.result(timeout=PATIENCE_S) == ["cheap-1", "cheap-2"]
    assert "dear-2" not in site.written("bought")


async def test_a_job_keeps_its_tenant_in_another_worker(site: Site) -> None:
    job = await site.client.options(tenant="acme").submit("on_behalf", "open")
    waits = site.folder / "waits"
    await until(lambda: waits.exists() and waits.read_text().endswith("\n"), "it never began")
    os.kill(int(waits.read_text()), signal.SIGKILL)
    await until(lambda: waits.read_text().count("\n") == 2, "nobody went on with it")
    site.open("open")
    assert await job.result(timeout=PATIENCE_S) == ["acme", "acme", "acme"]
