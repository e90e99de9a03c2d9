"""attribution_core.subsets: sizes, laws, seeds, groups."""

import numpy as np
import pytest
import torch

from attribution_core.subsets import (
    all_subsets,
    bernoulli_subsets,
    group_subsets,
    leave_out_subsets,
    permutation_subsets,
    random_subsets,
)

LABELS = np.array(["b", "a", "b", "c", "a", "b"])


def test_several_fractions_take_turns():
    sizes = random_subsets(100, 6, keep=[0.1, 0.5, 0.9]).sum(1)
    assert sizes.tolist() == [10, 50, 90, 10, 50, 90]


def test_bernoulli_players_come_by_themselves():
    weights = bernoulli_subsets(50, 4000, keep=[0.2, 0.7])
    for k, p in enumerate((0.2, 0.7)):
        rows = weights[k::2]
        # 100,000 draws: standard error .0015; sizes vary as a binomial, a standard error of .11 of 3.2 at most
        assert abs(rows.mean() - p) < 5 * 0.0015
        assert abs(rows.sum(1).std() - np.sqrt(50 * p * (1 - p))) < 5 * 0.06


def test_permutations_add_one_player_at_a_time_in_antithetic_pairs():
    chains = permutation_subsets(5, 4).reshape(4, 6, 5)
    assert (chains[:, 0] == 0).all()
    assert (chains[:, -1] == 1).all()
    added = np.diff(chains, axis=1)
    assert set(np.unique(added)) == {0.0, 1.0}
    assert (added.sum(2) == 1).all()
    orders = added.argmax(2)
    np.testing.assert_array_equal(orders[1], orders[0][::-1])
    assert (orders[2] != orders[0]).any()


def test_all_subsets_once_each():
    weights = all_subsets(6)
    assert len(np.unique(weights, axis=0)) == len(weights) == 64
    assert not weights[0].any()
    assert weights[-1].all()


@pytest.mark.parametrize(
    "sampler",
    [
        lambda n, seed: random_subsets(n, 7, keep=0.6, seed=seed),
        lambda n, seed: bernoulli_subsets(n, 7, keep=0.6, seed=seed),
        lambda n, seed: permutation_subsets(n, 3, seed=seed),
    ],
)
def test_groups_share_their_weight_and_seeds_repeat(sampler):
    players, rows = sampler(3, 5), sampler(LABELS, 5)
    np.testing.assert_array_equal(rows, players[:, [1, 0, 1, 2, 0, 1]])  # a, b, c in order
    np.testing.assert_array_equal(players, sampler(3, 5))
    assert any((sampler(3, seed) != players).any() for seed in range(3))


@pytest.mark.parametrize(
    "sampler",
    [
        lambda n: random_subsets(n, 3, keep=0.5),
        lambda n: group_subsets(n, 3, keep=0.5),
        leave_out_subsets,
        all_subsets,
    ],
)
def test_labels_may_be_a_tensor(sampler):
    labels = [0, 0, 1, 1, 2, 2]
    np.testing.assert_array_equal(sampler(torch.tensor(labels)), sampler(labels))


def test_groups_left_out_listed_and_drawn():
    np.testing.assert_array_equal(leave_out_subsets(LABELS)[1], LABELS != "a")
    np.testing.assert_array_equal(all_subsets(LABELS)[2], LABELS == "b")
    assert group_subsets(LABELS, 3, keep=1.0).all()


def test_what_cannot_be_drawn():
    with pytest.raises(ValueError, match="at most 20 players"):
        all_subsets(21)
    for keep in (0, 1.5, []):
        with pytest.raises(ValueError, match=r"expected a keep fraction in \(0, 1\]"):
            bernoulli_subsets(4, 2, keep=keep)


@pytest.mark.parametrize("nobody", [float("nan"), None])
@pytest.mark.parametrize(
    "sampler",
    [
        all_subsets,
        leave_out_subsets,
        lambda groups: permutation_subsets(groups, 2),
        lambda groups: random_subsets(groups, 2, keep=0.5),
        lambda groups: group_subsets(groups, 2, keep=0.5),
    ],
)
def test_players_without_a_name_are_refused(sampler, nobody):
    """A list with a missing label, as pandas writes it, made a player "nan" of text."""
    with pytest.raises(ValueError, match=r"a group label for every example, got none for \[1\]"):
        sampler(["a", nobody, "b"])
