"""Names and subjects: the whole grammar of what travels over the broker.

A token is `[A-Za-z0-9_-]{1,128}`. Process names, actor names, session ids and job ids are tokens, so that each of them can
stand in a subject and be matched by the broker's permissions. `NS` is the namespace, `nalar` unless told otherwise.

    NS.box.<to>.<from>      channel frames from process <from> to process <to>. A process subscribes to `NS.box.<me>.*` and
                            publishes to `NS.box.*.<me>`; two permissions at the broker hold it to its own name.

    NS.job.<workflow>       a durable call of a workflow, from any client; held by the queue `NS-jobs` until it has ended
    NS.job.<workflow>.<tenant>    the same on behalf of a tenant, from who may publish there
    NS.result.<job>         how the job ended, as JSON; kept in the ledger `NS-results` for a time
    NS.dead.<job>           a job that cannot or did not succeed, as it was published, with the cause in its headers; kept in
                            the ledger `NS-dead` until somebody retries or drops it; `seq-<number>` where the id is no token
    NS.running.<job>        the process that runs a job, and how often it has failed; kept in the ledger `NS-running`
    NS.journal.<process>.<incarnation>
                            what the calls of jobs that this process made have come to; in the ledger `NS-journal`
    NS.cancel.<job>         somebody has cancelled the job: whoever runs it may stop
    NS.call.<name>          a call with an answer and no durability, from any client: a workflow, a tool, `agent.method`

    NS.question.<id>        a question that waits for its answer; kept in the ledger `NS-questions`
    NS.answered.<id>        its answer; kept in the ledger `NS-answers` for a time
    NS.answer.<id>          somebody answers it, with JSON, from any client

    NS.inbox.<me>.>         where the broker answers process <me>, and whom else it asks
    NS.load.<process>       what a worker has in hand, told a few times a second while it changes; every caller listens
    NS.look.<to>.<from>     process <from> asks <to> for its queues and its calls, those that have ended included
    NS.seen.<to>.<from>     the pieces of the answer
    NS.report.<process>     what becomes of a process's calls, as numbered columns; every controller listens
    NS.again.<process>      asks the process to tell everything anew
    NS.states               the routes, priorities, limits and permissions that hold from now on
    NS.ranks.<process>      priorities of the sessions of one process
    NS.decided              what the global controller has decided and refused, and why, as JSON; kept in the ledger
                            `NS-decisions` for a time
    NS.overview             asks the global controller what it sees; the answer is JSON

Key-value buckets (their names are the namespace, a dash and the word):

    NS-members              <process>              who is alive, its incarnation, and which actors it serves
    NS-places               <actor>.<instance>     the process that holds the memory of a session
    NS-lost                 <process>              its highest incarnation that has been declared lost
    NS-leader               leader                 the global controller that decides, while it lives
    NS-control              states                 what it has last published as `NS.states`
    NS-acts                 acts                   what it wants done once, for one lease

Object stores:

    NS-claims               <process>.<incarnation>.<random>    a large value that this process answers for
                            <job>.job.<digest>                  one of the calls of a job, kept until the job has ended
    NS-results              <job>.<digest>                      the value of a job, as JSON, that is too large for its result
"""

from __future__ import annotations

import os
import re
from typing import Final, NamedTuple

from nalar_mq.errors import AddressError

DEFAULT_NAMESPACE = "nalar"
CLIENT_PREFIX = "client-"
LONGEST_TOKEN: Final = 128
_TOKEN = re.compile(rf"[A-Za-z0-9_-]{{1,{LONGEST_TOKEN}}}")


def is_token(name: str) -> bool:
    """True if `name` can stand as one token of a subject."""
    return _TOKEN.fullmatch(name) is not None


def check_token(name: str, what: str = "name") -> str:
    """Returns `name` unchanged.

    Raises:
        AddressError: `name` is not a token; `what` names its role in the message.
    """
    if not is_text(name):
        raise AddressError(f"{what} is a text of 1 to 128 characters of A-Z, a-z, 0-9, '_' and '-', not {name!r}")
    if _TOKEN.fullmatch(name) is None:
        shown = name if len(name) <= 140 else name[:137] + "..."
        raise AddressError(f"{what} {shown!r} is not allowed: 1 to 128 characters of A-Z, a-z, 0-9, '_' and '-' are")
    return name


def is_text(given: object) -> bool:
    """True for a text: what a user has given may be anything, whatever the annotation says."""
    return isinstance(given, str)


def random_token(prefix: str, entropy: bytes | None = None) -> str:
    """A fresh token `prefix-xxxxxxxx`; `entropy` replaces the operating system's randomness."""
    return f"{prefix}-{(entropy or os.urandom(6)).hex()}"


def is_client_name(name: str) -> bool:
    """True for the names of clients: whoever has one serves nothing, whatever it says of itself."""
    return name.startswith(CLIENT_PREFIX)


class Address(NamedTuple):
    """One life of a process: its name, and the incarnation that tells this life from earlier ones.

    Incarnations of one name grow: of two addresses with the same name the higher incarnation is the successor.
    """

    name: str
    incarnation: int

    @classmethod
    def parse(cls, text: str) -> Address | None:
        """The address in `name/incarnation`, as `str` writes it; None if it is none."""
        name, _, incarnation = text.partition("/")
        return cls(name, int(incarnation)) if is_token(name) and incarnation.isdecimal() else None

    def __str__(self) -> str:
        return f"{self.name}/{self.incarnation}"


class Subjects:
    """The subjects and buckets of one namespace. Immutable; cheap to share."""

    __slots__ = (
        "acts_bucket",
        "answers_ledger",
        "claims_bucket",
        "control_bucket",
        "dead_ledger",
        "decided",
        "decisions_ledger",
        "jobs_queue",
        "journal_ledger",
        "leader_bucket",
        "lost_bucket",
        "members_bucket",
        "namespace",
        "nodes_bucket",
        "overview",
        "places_bucket",
        "questions_ledger",
        "replicas_ledger",
        "results_bucket",
        "results_ledger",
        "running_ledger",
        "snapshots_bucket",
        "stores_bucket",
    )

    def __init__(self, namespace: str = DEFAULT_NAMESPACE) -> None:
        self.namespace = check_token(namespace, "namespace")
        self.members_bucket = f"{namespace}-members"
        self.places_bucket = f"{namespace}-places"
        self.lost_bucket = f"{namespace}-lost"
        self.leader_bucket = f"{namespace}-leader"
        self.control_bucket = f"{namespace}-control"
        self.acts_bucket = f"{namespace}-acts"
        self.nodes_bucket = f"{namespace}-nodes"
        self.decisions_ledger = f"{namespace}-decisions"
        self.decided = f"{namespace}.decided"
        self.overview = f"{namespace}.overview"
        self.journal_ledger = f"{namespace}-journal"
        self.claims_bucket = f"{namespace}-claims"
        self.replicas_ledger = f"{namespace}-replicas"
        self.snapshots_bucket = f"{namespace}-snapshots"
        self.stores_bucket = f"{namespace}-stores"
        self.running_ledger = f"{namespace}-running"
        self.jobs_queue = f"{namespace}-jobs"
        self.results_ledger = f"{namespace}-results"
        self.results_bucket = f"{namespace}-results"
        self.dead_ledger = f"{namespace}-dead"
        self.questions_ledger = f"{namespace}-questions"
        self.answers_ledger = f"{namespace}-answers"

    def box(self, to: str, sender: str) -> str:
        """Subject of frames from process `sender` to process `to`."""
        return f"{self.namespace}.box.{to}.{sender}"

    def box_filter(self, me: str) -> str:
        """What process `me` subscribes to."""
        return f"{self.namespace}.box.{me}.*"

    def box_sender(self, subject: str) -> str:
        """The sender's name in a subject that `box` made."""
        return subject.rpartition(".")[2]

    def inbox(self, me: str) -> str:
        """What the subjects begin with on which process `me` is answered; `>` for those of all processes."""
        return f"{self.namespace}.inbox.{me}"

    def load(self, sender: str) -> str:
        """Where process `sender` tells its load; `*` for all of them."""
        return f"{self.namespace}.load.{sender}"

    def look(self, to: str, sender: str) -> str:
        """Where process `sender` asks process `to` what it has in hand; `*` for all senders."""
        return f"{self.namespace}.look.{to}.{sender}"

    def seen(self, to: str, sender: str) -> str:
        """Where process `sender` answers process `to`; `*` for all senders."""
        return f"{self.namespace}.seen.{to}.{sender}"

    def report(self, sender: str) -> str:
        """Where process `sender` reports to the controllers; `*` for all of them."""
        return f"{self.namespace}.report.{sender}"

    def again(self, to: str) -> str:
        """Where process `to` is asked to tell everything anew."""
        return f"{self.namespace}.again.{to}"

    @property
    def states(self) -> str:
        """Where it is told what holds from now on."""
        return f"{self.namespace}.states"

    def ranks(self, to: str) -> str:
        """Where process `to` is told the priorities of its sessions."""
        return f"{self.namespace}.ranks.{to}"

    def job(self, workflow: str, tenant: str = "") -> str:
        """Where jobs of a workflow are published on behalf of a tenant, or of nobody; `*` for all of them, `>` for both."""
        return f"{self.namespace}.job.{workflow}" + (f".{tenant}" if tenant else "")

    def result(self, job: str) -> str:
        """Where the result of a job is published; `*` for all of them."""
        return f"{self.namespace}.result.{job}"

    def running(self, job: str) -> str:
        """Where it is written who runs a job; `*` for all of them."""
        return f"{self.namespace}.running.{job}"

    def journal(self, process: str, incarnation: int | str) -> str:
        """Where a process keeps what its calls have come to; `*` and `*` for all of them."""
        return f"{self.namespace}.journal.{process}.{incarnation}"

    def replica(self, store: str) -> str:
        """Where a replicated store keeps what it has written; `*` for all of them."""
        return f"{self.namespace}.replica.{store}"

    def journal_writer(self, subject: str) -> Address | None:
        """The process in a subject that `journal` made; None if it is none."""
        name, _, incarnation = subject.removeprefix(f"{self.namespace}.journal.").partition(".")
        return Address(name, int(incarnation)) if is_token(name) and incarnation.isdecimal() else None

    def dead(self, job: str) -> str:
        """Where a job goes that cannot be done; `*` for all of them."""
        return f"{self.namespace}.dead.{job}"

    def cancel(self, job: str) -> str:
        """Where the cancellation of a job is told; `*` for all of them."""
        return f"{self.namespace}.cancel.{job}"

    def call(self, name: str) -> str:
        """Where a workflow, a tool or `agent.method` is called; `>` for all of them."""
        return f"{self.namespace}.call.{name}"

    def question(self, id: str) -> str:
        """Where a question stands that waits for its answer; `*` for all of them."""
        return f"{self.namespace}.question.{id}"

    def answered(self, id: str) -> str:
        """Where the answer to a question stands; `*` for all of them."""
        return f"{self.namespace}.answered.{id}"

    def answer(self, id: str) -> str:
        """Where any client answers a question; `*` for all of them."""
        return f"{self.namespace}.answer.{id}"
