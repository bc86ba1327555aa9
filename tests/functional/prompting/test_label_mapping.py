import pytest
import torch
from scipy.optimize import linear_sum_assignment

from lightning_trust.functional.prompting import (
    count_predictions,
    frequency_label_mapping,
    mapping_precision,
    semantic_label_mapping,
)


def random_counts(sources, targets, seed=0, most=20):
    return torch.randint(most, (sources, targets), generator=torch.Generator().manual_seed(seed))


def slow_greedy(counts, m):
    """As the paper says it: the largest entry left, again and again."""
    left, given = counts.clone().double(), [[] for _ in range(counts.shape[1])]
    for _ in range(m * counts.shape[1]):
        source, target = divmod(int(left.flatten().argmax()), counts.shape[1])
        given[target].append(source)
        left[source] = -1.0
        if len(given[target]) == m:
            left[:, target] = -1.0
    return torch.tensor(given)


def test_a_matrix_by_hand():
    assert frequency_label_mapping(torch.tensor([[5, 4], [6, 0], [0, 3]])).tolist() == [[1], [0]]


def test_diagonal_counts_give_the_identity_and_permuted_rows_permute_it():
    counts = torch.diag(torch.arange(1, 7)) * 3
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert frequency_label_mapping(counts).flatten().tolist() == list(range(6))
    permuted = frequency_label_mapping(counts[order]).flatten()
    assert order[permuted].tolist() == list(range(6))


@pytest.mark.parametrize("m", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_the_greedy_solver_equals_the_papers_words(m, seed):
    # few different counts, so that many are equal
    counts = random_counts(17, 5, seed, most=4)
    assert torch.equal(frequency_label_mapping(counts, m), slow_greedy(counts, m))


@pytest.mark.parametrize("solver", ["greedy", "hungarian"])
@pytest.mark.parametrize("m", [1, 3])
def test_no_source_is_given_twice(solver, m):
    for seed in range(10):
        given = frequency_label_mapping(random_counts(20, 6, seed), m, solver)
        assert given.shape == (6, m)
        assert len(set(given.flatten().tolist())) == 6 * m


def mass(counts, given):
    return sum(int(counts[source, target]) for target, some in enumerate(given.tolist()) for source in some)


def test_no_assignment_has_more_mass_than_the_hungarian():
    for seed in range(10):
        counts = random_counts(15, 6, seed)
        best = counts.numpy()[linear_sum_assignment(counts.numpy(), maximize=True)].sum()
        assert mass(counts, frequency_label_mapping(counts, 1, "hungarian")) == best
        assert mass(counts, frequency_label_mapping(counts)) <= best
    apart = torch.tensor([[9, 0, 1], [0, 8, 0], [1, 0, 7], [0, 0, 0]])
    assert mass(apart, frequency_label_mapping(apart)) == 24


def test_a_class_that_is_never_predicted_gets_the_lowest_source_left():
    counts = torch.zeros(5, 3, dtype=torch.int64)
    counts[0, 1] = 4
    assert frequency_label_mapping(counts).tolist() == [[1], [0], [2]]


def test_names_that_are_their_own_are_given_themselves():
    embedded = torch.nn.functional.normalize(torch.randn(7, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    assert semantic_label_mapping(embedded @ embedded.T).flatten().tolist() == list(range(7))


def test_counts_of_parts_add_up():
    generator = torch.Generator().manual_seed(1)
    predictions, targets = torch.randint(9, (50,), generator=generator), torch.randint(4, (50,), generator=generator)
    whole = count_predictions(predictions, targets, 9, 4)
    parts = [count_predictions(predictions[part], targets[part], 9, 4) for part in (slice(0, 20), slice(20, 50))]
    assert torch.equal(whole, sum(parts))
    assert int(whole.sum()) == 50
    assert int(whole[3, 2]) == int(((predictions == 3) & (targets == 2)).sum())


def test_the_order_of_sources_does_not_count_for_precision():
    assert mapping_precision(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[2, 1], [3, 5]])) == 0.5


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: frequency_label_mapping(torch.ones(5, 3), 2), r"at least sources_per_target \* num_target = 2 \* 3"),
        (lambda: frequency_label_mapping(torch.ones(5)), r"shape \(num_source, num_target\), but got \(5,\)"),
        (lambda: frequency_label_mapping(-torch.ones(5, 3)), "not to be negative, but got -1"),
        (lambda: frequency_label_mapping(torch.ones(5, 3), solver="best"), "'greedy' or 'hungarian', but got 'best'"),
        (lambda: frequency_label_mapping(torch.ones(5, 3), 0), "`sources_per_target` to be at least 1, but got 0"),
        (
            lambda: count_predictions(torch.tensor([3]), torch.tensor([0]), 3, 2),
            r"`predictions` .* \[0, 3\), but",
        ),
        (lambda: count_predictions(torch.tensor([0]), torch.tensor([-1]), 3, 2), r"`targets` .* \[0, 2\), but got -1"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
