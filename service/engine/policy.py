"""The policies of the scheduler, as functions: who goes first, and who gives up its blocks.

They see sequences and change nothing. A new policy is a new function here, never a branch in the scheduler.
"""

from __future__ import annotations

import collections.abc

from service.engine.messages import Limits
from service.engine.sequence import Sequence


def urgency(limits: Limits) -> tuple[float, ...]:
    """The rank of a sequence: larger priority, then earlier deadline, then earlier arrival. The smaller goes first."""
    return (-limits.priority, limits.deadline, limits.arrival)


def last_in_order(candidates: collections.abc.Sequence[Sequence]) -> Sequence:
    """The victim of a preemption: whoever goes last, so that whoever goes first always progresses."""
    return max(candidates, key=lambda sequence: sequence.rank)
