"""Successive halving finds the best of candidates whose times are noisy, with few measurements."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from rtk.autotune import halving


class Card:
    """Times with what a real card adds: noise of each turn, a drift that hits all of a round, rare outliers."""

    def __init__(self, true_us, seed, noise=0.01):
        self.true_us, self.noise, self.turns = true_us, noise, 0
        self.draw = random.Random(seed)

    def __call__(self, candidates, rounds):
        found = {index: [] for index in candidates}
        for _ in range(rounds):
            drift = 1 + 0.05 * self.draw.random()
            for index in candidates:
                self.turns += 1
                spike = 1.5 if self.draw.random() < 0.02 else 1.0
                found[index].append(self.true_us[index] * drift * spike * (1 + self.noise * self.draw.gauss(0, 1)))
        return found


times = st.lists(st.floats(10.0, 30.0), min_size=1, max_size=16)


@given(times, st.integers(0, 2**32))
def test_the_winner_is_as_good_as_the_best_within_the_noise(true_us, seed):
    card = Card(true_us, seed)
    found = halving.best(len(true_us), card)
    assert true_us[found.winner] <= 1.03 * min(true_us)
    assert all(len(found.rounds[index]) >= halving.FIRST_ROUNDS for index in range(len(true_us)))
    assert card.turns <= 3 * 16 + 6 * 8 + 12 * 4 + 24 * 2 + 48, "halving"


@given(times)
def test_without_noise_it_is_the_best(true_us):
    found = halving.best(len(true_us), lambda left, rounds: {index: [true_us[index]] * rounds for index in left})
    assert true_us[found.winner] <= 1.005 * min(true_us)


@given(st.integers(1, 16), st.integers(0, 2**32))
def test_of_equals_the_one_that_was_expected_to_be_better_is_taken(count, seed):
    found = halving.best(count, lambda left, rounds: {index: [10.0] * rounds for index in left})
    assert found.winner == 0
    noisy = halving.best(count, Card([10.0] * count, seed, noise=0.0))
    assert noisy.winner == 0 or count > 1


def test_what_is_hopeless_is_timed_once():
    card = Card([10.0, 100.0, 12.0, 200.0], 1)
    found = halving.best(4, card)
    assert found.winner == 0 and len(found.rounds[1]) == len(found.rounds[3]) == halving.FIRST_ROUNDS


@given(st.lists(st.floats(10.0, 30.0), min_size=33, max_size=188), st.integers(0, 2**32))
def test_many_are_screened_first(true_us, seed):
    card = Card(true_us, seed)
    found = halving.best(len(true_us), card)
    assert true_us[found.winner] <= 1.03 * min(true_us)
    assert all(found.rounds.values()), "each was timed"
    slow = [index for index, us in enumerate(true_us) if us > 1.5 * min(true_us)]
    assert all(len(found.rounds[index]) == 2 for index in slow)


def test_one_candidate_needs_one_rung():
    card = Card([10.0], 0)
    assert halving.best(1, card).winner == 0 and card.turns == halving.FIRST_ROUNDS
