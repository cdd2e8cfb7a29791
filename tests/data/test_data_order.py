"""The global order is a permutation in every epoch, and random enough to learn from."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis.strategies import integers

from stretto.data.order import permute, windows_of

pytestmark = pytest.mark.pure

SEEDS = integers(0, 2**63 - 1)


@given(n=integers(1, 3000), seed=SEEDS, epoch=integers(0, 5))
def test_every_window_comes_exactly_once(n: int, seed: int, epoch: int) -> None:
    images = permute(np.arange(n), n, seed=seed, epoch=epoch)
    assert sorted(images) == list(range(n))


@given(n=integers(2**33, 2**40), first=integers(0, 2**32), seed=SEEDS)
def test_ten_billion_windows_need_no_memory_and_do_not_collide(n: int, first: int, seed: int) -> None:
    images = permute(np.arange(first, first + 500), n, seed=seed, epoch=0)
    assert len(set(images.tolist())) == 500
    assert images.min() >= 0
    assert images.max() < n


@given(n=integers(1, 200), first=integers(0, 500), count=integers(0, 300), cut=integers(0, 300), seed=SEEDS)
def test_a_stretch_of_samples_is_the_same_however_it_is_asked_for(
    n: int, first: int, count: int, cut: int, seed: int
) -> None:
    cut = min(cut, count)
    whole = windows_of(first, count, n, seed=seed)
    parts = [windows_of(first, cut, n, seed=seed), windows_of(first + cut, count - cut, n, seed=seed)]
    assert np.array_equal(whole, np.concatenate(parts))


@given(n=integers(1, 200), epochs=integers(1, 4), seed=SEEDS)
def test_each_epoch_sees_all_windows(n: int, epochs: int, seed: int) -> None:
    run = windows_of(0, n * epochs, n, seed=seed).reshape(epochs, n)
    assert all(sorted(epoch) == list(range(n)) for epoch in run)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [permute(np.arange(1000), 1000, seed=s, epoch=e) for s in range(3) for e in range(3)]
    same = [(a == b).mean() for i, a in enumerate(orders) for b in orders[:i]]
    assert max(same) < 0.02  # two random permutations of 1000 agree in 1 place on average


@pytest.mark.parametrize("n", [5, 97, 1000])
def test_each_place_gets_each_window_equally_often(n: int) -> None:
    """Over 2000 seeds, the window at place 0 (and at the last) is uniform: chi-square within 5 sigma."""
    for place in (0, n - 1):
        images = [int(permute(np.array([place]), n, seed=seed, epoch=0)[0]) for seed in range(2000)]
        counts = np.bincount(images, minlength=n)
        chi_square = ((counts - 2000 / n) ** 2 / (2000 / n)).sum()
        assert abs(chi_square - (n - 1)) < 5 * np.sqrt(2 * (n - 1))


def test_neighbours_are_torn_apart() -> None:
    images = permute(np.arange(100_000), 100_000, seed=1, epoch=0)
    steps = np.diff(images)
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.02
    assert np.unique(steps).size > 50_000  # a lattice would have few distinct steps


def test_the_order_is_frozen() -> None:
    """A changed order would break every resumed run, so it changes only on purpose, with this line."""
    assert permute(np.arange(10), 10, seed=1234, epoch=0).tolist() == [0, 9, 5, 4, 8, 7, 2, 1, 6, 3]


def test_an_index_outside_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"indices 3\.\.10 lie outside 0\.\.9"):
        permute(np.array([3, 10]), 10, seed=0, epoch=0)
