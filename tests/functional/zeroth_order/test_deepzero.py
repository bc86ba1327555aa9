"""GraSP by autograd and by estimates: against closed forms, and the masks that its scores make."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_trust.functional.zeroth_order import grasp_masks, grasp_scores, layer_pruning_ratios, zo_grasp_scores


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_scores_of_a_quadratic_in_closed_form():
    """l = 0.5 x'Ax + b'x over two tensors that A couples: s = -x * A (A x + b)."""
    half = draw(5, 5, seed=1)
    a, b, x = half @ half.T, draw(5, seed=2), draw(5, seed=3)
    first, second = x[:2].clone().requires_grad_(), x[2:].clone().requires_grad_()
    whole = torch.cat([first, second])
    found = grasp_scores(0.5 * whole @ a @ whole + b @ whole, {"first": first, "second": second})
    expected = -x * (a @ (a @ x + b))
    torch.testing.assert_close(torch.cat([found["first"], found["second"]]), expected)
    assert not found["first"].requires_grad
    assert first.grad is None
    # of one tensor alone its own block of the matrix counts
    whole = torch.cat([first, second])
    alone = grasp_scores(0.5 * whole @ a @ whole + b @ whole, {"second": second})["second"]
    torch.testing.assert_close(alone, -x[2:] * (a[2:, 2:] @ (a @ x + b)[2:]))


def test_scores_of_a_network_are_those_of_its_whole_hessian():
    weight, bias, rows = draw(3, 4, seed=1), draw(3, seed=2), draw(7, 4, seed=3)
    targets = torch.arange(7) % 3

    def loss(w):
        return F.cross_entropy((rows @ w.T + bias).tanh(), targets)

    leaf = weight.clone().requires_grad_()
    found = grasp_scores(loss(leaf), {"w": leaf})["w"]
    hessian = torch.autograd.functional.hessian(loss, weight).reshape(12, 12)
    gradient = torch.autograd.functional.jacobian(loss, weight).flatten()
    torch.testing.assert_close(found.flatten(), -weight.flatten() * (hessian @ gradient))


def test_scores_from_differences_come_near():
    half = draw(4, 4, seed=1)
    a, x = half @ half.T, draw(4, seed=2)
    leaf = x.clone().requires_grad_()
    exact = grasp_scores(0.5 * leaf @ a @ leaf, {"w": leaf})["w"]
    gradient, mu = a @ x, 1e-3
    found = zo_grasp_scores({"w": x}, {"w": gradient}, {"w": a @ (x + mu * gradient)}, mu)["w"]
    # the gradient of a quadratic is linear: no error but rounding
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)


def test_weights_without_a_part_in_it_score_zero():
    used, unused = draw(3, seed=1).requires_grad_(), draw(2, seed=2).requires_grad_()
    found = grasp_scores(used.square().sum(), {"used": used, "unused": unused})
    torch.testing.assert_close(found["used"], -4.0 * used.detach().square())
    assert torch.equal(found["unused"], torch.zeros_like(unused))
    # a linear loss has no curvature
    assert torch.equal(grasp_scores(used.sum(), {"used": used})["used"], torch.zeros_like(used))


@pytest.mark.parametrize("loss", [torch.tensor(1.0), torch.ones(2, requires_grad=True) * 2.0])
def test_a_loss_without_a_graph_or_not_a_scalar(loss):
    with pytest.raises(ValueError, match="Expected argument `loss` to be a scalar with a graph, but got shape"):
        grasp_scores(loss, {"w": torch.ones(2, requires_grad=True)})


@pytest.mark.parametrize("keep", ["abs", "signed"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9])
def test_masks_and_ratios_by_sorting(keep, sparsity):
    scores = {"a": draw(4, 5, seed=1), "b": 0.1 * draw(7, seed=2), "c": draw(1, 3, seed=3)}
    ranked = sorted(
        ((name, place) for name, score in scores.items() for place in range(score.numel())),
        key=lambda each: (
            scores[each[0]].flatten()[each[1]].abs() if keep == "abs" else -scores[each[0]].flatten()[each[1]]
        ),
    )
    gone = set(ranked[: round(sparsity * 30)])
    masks = grasp_masks(scores, sparsity, keep)
    for name, score in scores.items():
        expected = [(name, place) not in gone for place in range(score.numel())]
        assert masks[name].flatten().tolist() == expected
        assert masks[name].shape == score.shape
        ratio = layer_pruning_ratios(scores, sparsity, keep)[name]
        assert ratio == pytest.approx(1.0 - sum(expected) / len(expected))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((1.0, "abs"), r"`sparsity` to be a share of zeros in \[0, 1\), but got 1.0"),
        ((0.5, "largest"), "`keep` to be 'abs' or 'signed', but got 'largest'"),
    ],
)
def test_bad_arguments(arguments, words):
    for function in (grasp_masks, layer_pruning_ratios):
        with pytest.raises(ValueError, match=words):
            function({"a": torch.ones(2)}, *arguments)
