"""Successive halving: many candidates timed a little, the better half of them more, until the best one stands out.

The candidates take turns, so what slows the card down for a while slows all of them, and rounds can be compared pair by
pair (Jamieson, Talwalkar, "Non-stochastic best arm identification", 2016, is the bandit form of this).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

Measure = Callable[[Sequence[int], int], Mapping[int, Sequence[float]]]  # (candidates, rounds) -> µs of each round

FIRST_ROUNDS = 3
_MOST_ROUNDS = 27
_TIE = 0.005  # times that differ by less are equal; then the candidate that was expected to be better is taken
_HOPELESS = 0.3  # over the root of the rounds: by how much slower than the leader is not timed again
_MANY, _SCREENING_ROUNDS = 32, 2  # so many candidates are first screened by the best of so few rounds


@dataclass
class Outcome:
    """The index of the winner, and every round of each candidate."""

    winner: int
    rounds: dict[int, list[float]] = field(default_factory=dict)

    def paired(self) -> list[list[float]]:
        """The rounds of each candidate, as they would have been had the winner taken its median time in each.

        Who ran in the first rounds only met another card, cooler and faster, than who ran to the end.
        """
        ours = self.rounds[self.winner]
        typical = statistics.median(ours)
        return [
            [us * typical / winners for us, winners in zip(self.rounds[index], ours, strict=False)]
            for index in sorted(self.rounds)
        ]


def best(count: int, measure: Measure) -> Outcome:
    """The best of `count` candidates, which are numbered in the order in which they are expected to be good."""
    found: dict[int, list[float]] = {index: [] for index in range(count)}
    left, rounds = list(range(count)), FIRST_ROUNDS
    if count > _MANY:
        found |= {index: list(times) for index, times in measure(left, _SCREENING_ROUNDS).items()}
        bound = min(min(times) for times in found.values()) * _hopeless(_SCREENING_ROUNDS)
        left = [index for index in left if min(found[index]) < bound]
    while True:
        for index, times in measure(left, rounds).items():
            found[index] += times
        medians = {index: statistics.median(found[index]) for index in left}
        leader = min(left, key=lambda index: medians[index])
        if len(left) == 1 or len(found[leader]) >= _MOST_ROUNDS:
            break
        ranked = sorted(left, key=lambda index: medians[index])
        close = [index for index in ranked if medians[index] < _hopeless(len(found[leader])) * medians[leader]]
        survivors = close[: max(2, -(-len(ranked) // 2))]
        left = [leader, *(i for i in survivors if i != leader and not _is_beaten(found, leader, i))]
        if len(left) == 1:
            break
        left.sort()
        rounds *= 2
    tied = [index for index in left if medians[index] <= medians[leader] * (1 + _TIE)]
    return Outcome(min(tied), found)


def _hopeless(rounds: int) -> float:
    """How many times the leader's time, after so many rounds, is beyond what noise can explain."""
    return 1 + _HOPELESS / math.sqrt(rounds)


def _is_beaten(found: Mapping[int, Sequence[float]], leader: int, other: int) -> bool:
    """Whether nearly all of the rounds that both ran say so, and there are enough of them to say anything."""
    pairs = list(zip(found[leader], found[other], strict=False))
    lost = sum(theirs > ours * (1 + _TIE) for ours, theirs in pairs)
    return len(pairs) >= 2 * FIRST_ROUNDS and lost >= 0.9 * len(pairs)
