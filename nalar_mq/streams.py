"""The streams, buckets and object stores of a runtime, created before anybody needs them.

A process opens what it needs and would create what is not there. Where processes have permissions of their own
(`permissions`) they may not, so whoever runs the broker lays all of it out first.
"""

from __future__ import annotations

import asyncio

from nalar_mq import journal, local_store
from nalar_mq.address import Address, Subjects
from nalar_mq.controllers.decision_ledger import open_history
from nalar_mq.controllers.leadership import open_lead
from nalar_mq.jobs import RESULTS_KEPT_S, Jobs
from nalar_mq.membership import LOST_KEPT_S
from nalar_mq.questions import Questions
from nalar_mq.replication import Replication
from nalar_mq.transport import Transport


async def lay_out(transport: Transport, subjects: Subjects, lease_s: float) -> None:
    """Creates what does not exist yet; what does stays as it is.

    Args:
        transport: a connection that may create streams.
        subjects: of the namespace.
        lease_s: after which the record of a silent process goes.

    Raises:
        BrokerError: the broker does not answer, or does not let us.
    """
    replication = Replication(transport, subjects, Address("", 0), lambda: None)
    await asyncio.gather(
        transport.key_value(subjects.members_bucket, ttl_s=lease_s),
        transport.key_value(subjects.lost_bucket, ttl_s=LOST_KEPT_S),
        transport.key_value(subjects.places_bucket),
        open_lead(transport, subjects, lease_s),
        transport.key_value(subjects.control_bucket),
        transport.key_value(subjects.acts_bucket, ttl_s=lease_s),
        transport.key_value(subjects.nodes_bucket, ttl_s=lease_s),
        transport.ledger(subjects.journal_ledger, [subjects.journal("*", "*")], max_age_s=journal.KEPT_S),
        open_history(transport, subjects),
        transport.object_store(subjects.claims_bucket, max_age_s=local_store.KEPT_S),
        transport.object_store(subjects.results_bucket, max_age_s=RESULTS_KEPT_S),
        replication.ledger(),
        replication.snapshots(),
        replication.holders(),
        Jobs.open(transport, subjects),
    )
    await Questions.open(transport, subjects)  # after the jobs, which have the results in common with it
