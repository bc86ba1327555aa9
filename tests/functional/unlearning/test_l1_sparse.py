import pytest

from lightning_trust.functional.unlearning import l1_coefficient


def test_decay_starts_at_alpha_and_is_half_in_the_middle():
    assert l1_coefficient(0, 10, 5e-4) == 5e-4
    assert l1_coefficient(5, 10, 5e-4) == 2.5e-4
    # the last epoch is not 0
    assert l1_coefficient(9, 10, 5e-4) == pytest.approx(5e-5)


def test_growth_mirrors_decay():
    for epoch in range(8):
        total = l1_coefficient(epoch, 8, 0.3) + l1_coefficient(epoch, 8, 0.3, "linear_growth")
        assert total == pytest.approx(0.3)


def test_constant():
    assert [l1_coefficient(epoch, 3, 0.2, "constant") for epoch in range(3)] == [0.2] * 3


@pytest.mark.parametrize("schedule", ["linear_decay", "constant", "linear_growth"])
def test_last_epochs_without_the_term(schedule):
    values = [l1_coefficient(epoch, 6, 1.0, schedule, no_l1_epochs=2) for epoch in range(6)]
    assert values[4:] == [0.0, 0.0]
    expected = {"linear_decay": [1, 0.75, 0.5, 0.25], "constant": [1] * 4, "linear_growth": [0, 0.25, 0.5, 0.75]}
    assert values[:4] == expected[schedule]


def test_all_epochs_without_the_term_keep_alpha_as_the_authors_code_does():
    assert [l1_coefficient(epoch, 3, 0.1, no_l1_epochs=3) for epoch in range(3)] == [0.1] * 3
