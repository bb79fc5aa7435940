"""What calls have cost, by session, job, workflow, agent and tenant: the sums of all processes together. Pure.

Each process tells its own sums, by accounts that it numbers (`nalar_mq.columns.Account`); what they have grown by since it last
told them is added here. What a process has spent stays spent when it is gone. Of sessions and jobs those that spent something
last are remembered, `MOST_NAMES` of each; of units the first `MOST_UNITS`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import inf
from typing import Final

from nalar_mq.columns import MOST_ACCOUNTS, SCOPES, Account
from nalar_mq.errors import MalformedReportError

MOST_NAMES: Final = 100_000
MOST_UNITS: Final = 64


class Accounts:
    """The accounts of one incarnation of a process, and what it has told of them.

    They outlive what else is known of it: who falls silent and is heard again tells the sums of its whole life.
    """

    def __init__(self) -> None:
        self._accounts: dict[int, Account] = {}
        self._amounts: dict[int, float] = {}
        self._numbers: dict[str, dict[int, None]] = {scope: {} for scope in SCOPES}

    def __len__(self) -> int:
        return len(self._accounts)

    def check(self, accounts: tuple[Account, ...], spent: Mapping[int, float]) -> None:
        """Checks what `Spending.take` is to be given; changes nothing.

        Raises:
            MalformedReportError: it is no spending, or contradicts what the process has told before.
        """
        newly = {account.number: account for account in accounts}
        for account in accounts:
            known = self._accounts.get(account.number, newly[account.number])
            if account.scope not in SCOPES or known != account:
                raise MalformedReportError(f"account {account.number} is of {account.scope!r}, or of something else by now")
        for number, amount in spent.items():
            if number not in self._accounts and number not in newly:
                raise MalformedReportError(f"an amount for account {number}, which was never named")
            if not self._amounts.get(number, 0.0) <= amount < inf:
                raise MalformedReportError("a cost that is none, or has shrunk")
        if len(self._accounts) + len(newly) > 2 * MOST_ACCOUNTS * len(SCOPES):
            raise MalformedReportError(f"more than {MOST_ACCOUNTS} accounts of each scope")

    def grow(self, number: int, amount: float) -> tuple[Account, float]:
        """The account of that number, which has come to `amount`, and what that is more than before."""
        former = self._amounts.get(number, 0.0)
        self._amounts[number] = amount
        return self._accounts[number], amount - former

    def open(self, accounts: tuple[Account, ...]) -> None:
        """Further ones."""
        for account in accounts:
            self._accounts.setdefault(account.number, account)
            self._numbers[account.scope].setdefault(account.number)

    def close(self, below: Sequence[int]) -> None:
        """Those of lower numbers are not told of any more, for each of `SCOPES`."""
        for scope, least in zip(SCOPES, below, strict=False):
            numbers = self._numbers[scope]
            # As a rule the first ones are the lowest; where reports were missed they need not be.
            gone = [] if numbers and len(numbers) <= MOST_ACCOUNTS else [number for number in numbers if number < least]
            while numbers and (first := next(iter(numbers))) < least:
                del numbers[first]
                gone.append(first)
            for number in gone:
                numbers.pop(number, None)
                self._accounts.pop(number, None)
                self._amounts.pop(number, None)


class Spending:
    """All sums."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str], dict[str, float]] = {}

    def total(self, scope: str, name: str, unit: str = "tokens") -> float:
        """What a session, job, workflow, agent or tenant has cost as far as is known; `scope` says which of these it is."""
        return self._sums.get((scope, unit), {}).get(name, 0.0)

    def totals(self, scope: str, unit: str = "tokens") -> dict[str, float]:
        """The same for all of them, by name; those that spent last come last."""
        return dict(self._sums.get((scope, unit), {}))

    def over(self, scope: str, most: float, unit: str = "tokens") -> Iterator[str]:
        """The names of those that have cost `most` or more."""
        return (name for name, amount in self._sums.get((scope, unit), {}).items() if amount >= most)

    def units(self) -> list[str]:
        """All units in which something was spent."""
        return sorted({unit for _, unit in self._sums})

    def take(self, of: Accounts, accounts: tuple[Account, ...], below: Sequence[int], spent: Mapping[int, float]) -> None:
        """Takes what a process tells: further accounts, the numbers below which it has none any more, and sums by number.

        It has to have been checked.
        """
        of.open(accounts)
        for number, amount in spent.items():
            self._add(*of.grow(number, amount))
        of.close(below)

    def _add(self, account: Account, more: float) -> None:
        sums = self._sums.get((account.scope, account.unit))
        if sums is None:
            if len(self._sums) >= MOST_UNITS * len(SCOPES):
                return
            sums = self._sums[account.scope, account.unit] = {}
        sums[account.name] = sums.pop(account.name, 0.0) + more
        if len(sums) > MOST_NAMES:
            del sums[next(iter(sums))]
