import numpy as np
import pytest
import torch
from sklearn.svm import SVC

from lightning_trust.functional.unlearning import membership_feature, membership_inference


def confidences(count, low, high, seed):
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(count, 1, generator=generator)


def test_equals_a_direct_support_vector_machine():
    retain, test, forget = confidences(60, 0.4, 1, 1), confidences(60, 0.1, 0.9, 2), confidences(40, 0.3, 0.9, 3)
    attack = SVC(C=3, gamma="auto", kernel="rbf")
    attack.fit(torch.cat([retain, test]).numpy(), np.array([1] * 60 + [0] * 60))
    non_members = (attack.predict(forget.numpy()) == 0).sum()
    assert 0 < non_members < 40
    assert membership_inference(retain, test, forget) == (100.0 * non_members / 40, 60)


def test_separated_confidences():
    members, others = confidences(50, 0.9, 1, 1), confidences(50, 0.0, 0.3, 2)
    assert membership_inference(members, others, confidences(20, 0.9, 1, 3))[0] == 0.0
    assert membership_inference(members, others, confidences(20, 0.0, 0.3, 3))[0] == 100.0


def test_constant_model_gives_all_or_nothing():
    same = torch.full((30, 1), 0.5)
    assert membership_inference(same, same, same[:10])[0] in (0.0, 100.0)


def test_sides_are_of_equal_size_and_bounded():
    many, few = confidences(500, 0.2, 1, 1), confidences(80, 0.0, 0.8, 2)
    assert membership_inference(many, few, few)[1] == 80
    assert membership_inference(few, many, few)[1] == 80
    assert membership_inference(many, many, few, max_rows=30)[1] == 30


def test_rows_are_drawn_by_seed_and_nothing_else():
    retain, test, forget = confidences(500, 0.3, 1, 1), confidences(400, 0.1, 0.9, 2), confidences(300, 0.2, 1, 3)
    first = membership_inference(retain, test, forget, max_rows=20, seed=1)
    torch.manual_seed(99)
    np.random.seed(99)
    assert membership_inference(retain, test, forget, max_rows=20, seed=1) == first
    others = {membership_inference(retain, test, forget, max_rows=20, seed=seed)[0] for seed in range(2, 8)}
    assert len(others) > 1


def test_rows_are_drawn_from_the_whole_of_a_side():
    # were they the first rows, all of them would be members that look like non-members
    retain = torch.cat([torch.full((50, 1), 0.1), torch.full((450, 1), 0.9)])
    efficacy, _ = membership_inference(retain, torch.full((500, 1), 0.1), torch.full((10, 1), 0.9), max_rows=50)
    assert efficacy == 0.0


@pytest.mark.parametrize("part", ["retain", "test", "forget"])
def test_empty_and_non_finite_parts(part):
    whole = {name: confidences(8, 0, 1, 1) for name in ("retain", "test", "forget")}
    with pytest.raises(ValueError, match=rf"^Expected argument `{part}` to hold at least one row, but got none\.$"):
        membership_inference(**{**whole, part: torch.empty(0, 1)})
    with pytest.raises(
        ValueError, match=rf"^Expected argument `{part}` to be finite, but got NaN or infinite features\.$"
    ):
        membership_inference(**{**whole, part: torch.full((8, 1), float("nan"))})


# -- features ----------------------------------------------------------------------------------------------------------
PROBABILITIES = torch.tensor([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0], [0.3, 0.3, 0.4]], dtype=torch.float64)
TARGETS = torch.tensor([0, 1, 1])


def test_confidence_and_correctness():
    assert membership_feature(PROBABILITIES, TARGETS).flatten().tolist() == [0.7, 1.0, 0.3]
    assert membership_feature(PROBABILITIES, TARGETS, "correctness").flatten().tolist() == [1.0, 1.0, 0.0]
    assert membership_feature(PROBABILITIES, TARGETS, "probability") is PROBABILITIES


def test_entropy_equals_scipy():
    from scipy.stats import entropy

    found = membership_feature(PROBABILITIES, TARGETS, "entropy").flatten()
    assert found.numpy() == pytest.approx(entropy(PROBABILITIES.numpy(), axis=1))


def test_modified_entropy_equals_its_formula():
    found = membership_feature(PROBABILITIES, TARGETS, "m_entropy").flatten().tolist()
    for value, p, y in zip(found, PROBABILITIES.tolist(), TARGETS.tolist(), strict=True):
        # limits: 0 log 0 = 0
        own = -(1 - p[y]) * np.log(p[y]) if p[y] < 1 else 0.0
        others = -sum(q * np.log(1 - q) for k, q in enumerate(p) if k != y and q > 0)
        assert value == pytest.approx(own + others)


def test_modified_entropy_of_a_sure_mistake_is_large_and_finite():
    wrong = membership_feature(torch.tensor([[1.0, 0.0]]), torch.tensor([1]), "m_entropy")
    assert torch.isfinite(wrong).all()
    assert float(wrong) > 50.0


def test_unknown_feature():
    with pytest.raises(
        ValueError,
        match=(
            r"^Expected argument `feature` to be 'confidence', 'correctness', 'entropy', 'm_entropy' or 'probability',"
            r" but got 'loss'\.$"
        ),
    ):
        membership_feature(PROBABILITIES, TARGETS, "loss")
