"""BlackBoxLayer: the oracles of the card, counts, failures, state, precision."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_trust.nn import BlackBoxLayer, Simulator, SimulatorAnswerError, SimulatorError, suggest_mu
from tests.two_ranks import run_on_two_ranks

D, M = 3, 2
W = torch.randn(M, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def smooth(z):
    """g(z) = tanh(W z) + a quadratic part, in torch."""
    return torch.tanh(z @ W.to(z).T) + 0.1 * z.square().sum(dim=-1, keepdim=True)


def smooth_numpy(points):
    return np.tanh(points @ W.numpy().T) + 0.1 * np.square(points).sum(axis=1, keepdims=True)


def row_dependent(points):
    """As ``smooth_numpy``, without an answer where the first coordinate is large."""
    values = smooth_numpy(points)
    values[points[:, 0] > 50.0] = np.nan
    return values


def points(rows=5, seed=1, **kwargs):
    z = torch.randn(rows, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return z.requires_grad_(**kwargs)


def gradient(layer, z, weights=None):
    out = layer(z)
    weights = torch.linspace(1.0, 2.0, out.numel(), dtype=out.dtype).view_as(out) if weights is None else weights
    (found,) = torch.autograd.grad((out * weights).sum(), z)
    return found


class Net(nn.Module):
    def __init__(self, box):
        super().__init__()
        torch.manual_seed(3)
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, D)).double()
        self.box = box
        self.decoder = nn.Linear(M + 4, 1).double()

    def forward(self, x):
        return self.decoder(torch.cat([self.box(self.encoder(x)), x], dim=1))


# -- the oracles -------------------------------------------------------------------------------------------------------
def test_parameter_gradients_equal_those_of_autograd():
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    nets = [Net(BlackBoxLayer(smooth_numpy, M, "cge", mu=1e-4)), Net(smooth)]
    for net in nets:
        net(x).square().mean().backward()
    assert any(p.grad.abs().max() > 1e-2 for p in nets[0].encoder.parameters())
    for (name, ours), theirs in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0.0, atol=1e-6, msg=name)


@pytest.mark.parametrize("bounds", [None, (-4.0, 4.0)])
def test_gradcheck(bounds):
    layer = BlackBoxLayer(smooth, M, "cge", mu=1e-4, scale=1.0, tensors=True, bounds=bounds, squash=bounds is not None)
    assert torch.autograd.gradcheck(layer, points())
    one_sided = BlackBoxLayer(smooth, M, "cge", mu=1e-7, scale=1.0, tensors=True, central=False)
    assert torch.autograd.gradcheck(one_sided, points(), atol=1e-4)


def test_random_directions_are_right_in_the_mean():
    layer = BlackBoxLayer(smooth_numpy, M, "rge", q=4000, mu=1e-3, seed=1)
    z = points()
    truth = gradient(smooth, z)
    found = gradient(layer, z)
    # the mean square error is (d + 1) |a|^2 / q
    error = truth.norm(dim=1) * ((D + 1) / 4000) ** 0.5
    assert ((found - truth).norm(dim=1) < 3.0 * error).all()
    assert ((found - truth).norm(dim=1) > 0.05 * error).all()


@pytest.mark.parametrize(
    ("settings", "backward"),
    [
        ({"estimator": "cge"}, 2 * D),
        ({"estimator": "cge", "central": False}, D),
        ({"estimator": "rge", "q": 5}, 2 * 5),
        ({"estimator": "rge", "q": 5, "central": False}, 5),
        ({"estimator": "auto", "q": 1}, 2 * D),
    ],
)
def test_what_a_sample_costs(settings, backward):
    layer = BlackBoxLayer(smooth_numpy, M, **settings)
    asked = lambda: layer.simulator.counts.queries  # noqa: E731
    z = points()
    out = layer(z)
    assert asked() == 5
    out.sum().backward()
    assert asked() == 5 * (1 + backward) == 5 * layer.queries_per_sample()
    with torch.no_grad():
        layer(z)
    assert asked() == 5 * (2 + backward)
    layer.eval()
    layer(z)
    assert asked() == 5 * (3 + backward)
    # samples whose gradient is zero, as under a mask, cost nothing backward
    layer(z)[:2].sum().backward()
    assert asked() == 5 * (4 + backward) + 2 * backward


def test_auto_takes_coordinates_where_they_are_few():
    few = BlackBoxLayer(smooth_numpy, M, q=20)
    assert [few.chosen_estimator(size) for size in (8, 20, 21)] == ["cge", "cge", "rge"]
    assert [BlackBoxLayer(smooth_numpy, M, q=2).chosen_estimator(size) for size in (8, 9)] == ["cge", "rge"]


def test_a_frozen_encoder_costs_nothing_backward():
    net = Net(BlackBoxLayer(smooth_numpy, M))
    net.encoder.requires_grad_(False)
    net(torch.ones(3, 4, dtype=torch.float64)).sum().backward()
    assert net.box.simulator.counts.queries == 3
    assert net.decoder.weight.grad is not None
    assert net.box.calls == 0


def test_equal_points_are_asked_once():
    layer = BlackBoxLayer(smooth_numpy, M, "cge", cache=100, scale=1.0)
    z = points()
    first = gradient(layer, z)
    asked = layer.simulator.counts.queries
    assert torch.equal(gradient(layer, z), first)
    assert layer.simulator.counts.queries == asked
    assert layer.simulator.counts.hits == asked


def test_executors_give_the_same_answers_and_gradients(tmp_path, monkeypatch):
    (tmp_path / "my_box.py").write_text(
        "import numpy as np\ndef run(points):\n    return np.sin(points[:, :2]) * points[:, 2:]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for settings in ({}, {"executor": "threads", "workers": 2}, {"executor": "processes", "workers": 2}):
        layer = BlackBoxLayer("my_box.run", 2, "rge", q=3, seed=5, **settings)
        z = points()
        out = layer(z)
        (slope,) = torch.autograd.grad(out.square().sum(), z)
        found.append((out.detach(), slope))
        layer.close()
    for out, slope in found[1:]:
        assert torch.equal(out, found[0][0])
        assert torch.equal(slope, found[0][1])


def test_direct_is_plain_autograd():
    z = points()
    assert torch.equal(gradient(BlackBoxLayer(smooth, M, direct=True), z), gradient(smooth, z))
    inner = BlackBoxLayer(nn.Linear(D, M), M, direct=True)
    assert len(list(inner.parameters())) == 2
    with pytest.raises(ValueError, match=r"shape \(5, 3\) with the shape \(5, 2\), but got \(5, 3\)"):
        BlackBoxLayer(torch.tanh, M, direct=True)(z)


# -- failures ----------------------------------------------------------------------------------------------------------
def failing(rows=5, row=2):
    z = points(rows).detach().clone()
    z[row, 0] = 99.0
    return z.requires_grad_()


def test_raise_quotes_the_point():
    with pytest.raises(SimulatorAnswerError, match=r"input \[99.0, .*answered \[nan, nan\]") as error:
        BlackBoxLayer(row_dependent, M)(failing())
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("estimator", ["cge", "rge"])
def test_drop_leaves_the_sample_out_and_the_others_as_they_are(estimator):
    z = failing()
    layer = BlackBoxLayer(row_dependent, M, estimator, on_failure="drop", scale=1.0, seed=1)
    out = layer(z)
    assert layer.valid.tolist() == [True, True, False, True, True]
    assert out[2].isnan().all()
    (found,) = torch.autograd.grad(out[layer.valid].square().sum(), z)
    # the same rows, with one in between that does not fail
    calm = BlackBoxLayer(row_dependent, M, estimator, scale=1.0, seed=1)
    other = points()
    rows = torch.tensor([0, 1, 3, 4])
    (expected,) = torch.autograd.grad(calm(other)[rows].square().sum(), other)
    assert torch.equal(found[rows], expected[rows])
    assert torch.equal(found[2], torch.zeros(D, dtype=torch.float64))


def test_a_point_of_a_difference_that_fails_is_done_without():
    z = points(1).detach().clone()
    z[0, 0] = 50.0 - 1e-4
    z.requires_grad_()
    layer = BlackBoxLayer(row_dependent, M, "cge", mu=1e-3, scale=1.0, on_failure="drop")
    found = gradient(layer, z)
    torch.testing.assert_close(found, gradient(smooth, z), rtol=1e-2, atol=1e-2)
    assert layer.statistics.one_sided == 1
    assert layer.simulator.counts.failures == 1


def test_nearest_gives_an_answer_without_a_gradient():
    z = failing()
    layer = BlackBoxLayer(row_dependent, M, "cge", on_failure="nearest", scale=1.0)
    out = layer(z)
    assert out.isfinite().all()
    assert any(torch.equal(out[2], other) for other in out[[0, 1, 3, 4]])
    (found,) = torch.autograd.grad(out.sum(), z)
    assert torch.equal(found[2], torch.zeros(D, dtype=torch.float64))
    assert found[0].abs().min() > 0.0


# -- the loss as the box -----------------------------------------------------------------------------------------------
def test_differences_of_the_loss():
    target = torch.randn(5, M, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def downstream(answers, wanted):
        return (answers - wanted).square().sum(dim=1)

    z = points()
    layer = BlackBoxLayer(smooth_numpy, M, "cge", mu=1e-4, mode="loss", downstream=downstream)
    losses = layer(z, target)
    torch.testing.assert_close(losses, downstream(smooth(z), target))
    (found,) = torch.autograd.grad(losses.mean(), z)
    (expected,) = torch.autograd.grad(downstream(smooth(z), target).mean(), z)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert layer.simulator.counts.queries == 5 * (1 + 2 * D)
    torch.testing.assert_close(layer.simulate(z), smooth(z).detach())
    wrong = BlackBoxLayer(smooth_numpy, M, mode="loss", downstream=lambda answers: answers)
    with pytest.raises(ValueError, match=r"of shape \(5,\), but got \(5, 2\)"):
        wrong(z)


def test_a_loss_of_steps_is_smoothed_by_random_directions():
    """The share of answers above zero: no derivative, but P(z + mu u > 0) = Phi(z / mu) has one."""
    layer = BlackBoxLayer(
        lambda z: z, 1, "rge", q=20_000, mu=0.5, scale=1.0, mode="loss", downstream=lambda g: (g[:, 0] > 0.0).double()
    )
    z = torch.tensor([[0.3], [-0.6]], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(layer(z).sum(), z)
    density = torch.exp(-0.5 * (z.detach() / 0.5) ** 2) / (2.0 * torch.pi) ** 0.5 / 0.5
    torch.testing.assert_close(found, density, rtol=0.1, atol=0.0)


def test_known_inputs_are_asked_and_not_moved():
    known = torch.randn(5, 2, generator=torch.Generator().manual_seed(6), dtype=torch.float64).requires_grad_()

    def box(asked):
        return (asked[:, 0] * asked[:, 3] + asked[:, 1] * asked[:, 2])[:, None]

    z = points(5).detach()[:, :2].clone().requires_grad_()
    layer = BlackBoxLayer(box, 1, "cge", mu=1e-3, in_dim=2)
    out = layer(z, known)
    torch.testing.assert_close(out, box(torch.cat([z, known], dim=1)))
    out.sum().backward()
    torch.testing.assert_close(z.grad, known.detach()[:, [1, 0]])
    assert known.grad is None
    assert layer.simulator.counts.queries == 5 * (1 + 2 * 2)
    torch.testing.assert_close(layer.simulate(z, known), out.detach())
    direct = BlackBoxLayer(box, 1, direct=True)
    torch.testing.assert_close(direct(z, known), out)


# -- unit and bounds ---------------------------------------------------------------------------------------------------
def test_steps_follow_the_running_spread_of_each_coordinate():
    seen = []

    def box(z):
        seen.append(z.copy())
        return z[:, 0]

    layer = BlackBoxLayer(box, 1, "cge", mu=0.1)
    spread = torch.tensor([0.01, 1.0, 100.0], dtype=torch.float64)
    z = (points(200).detach() * spread).requires_grad_()
    layer(z).sum().backward()
    std = z.detach().std(dim=0)
    for place, ends in enumerate(np.split(seen[1][: 3 * 200], 3)):
        np.testing.assert_allclose(ends[:, place] - z.detach().numpy()[:, place], 0.1 * std[place], rtol=1e-5)
    layer(2.0 * z).sum().backward()
    torch.testing.assert_close(layer.variance.double(), std**2 * (0.9 + 0.1 * 4.0), rtol=1e-5, atol=0.0)
    layer.eval()
    layer(5.0 * z).sum().backward()
    torch.testing.assert_close(layer.variance.double(), std**2 * 1.3, rtol=1e-5, atol=0.0)


def test_coordinates_that_do_not_vary_have_a_step_all_the_same():
    z = torch.tensor([[2.0, 0.0, 1.0]] * 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(
        gradient(BlackBoxLayer(smooth_numpy, M, "cge", mu=1e-4), z), gradient(smooth, z), rtol=1e-5, atol=1e-7
    )


def test_no_question_leaves_the_bounds():
    seen = []

    def box(z):
        seen.append(z.copy())
        return smooth_numpy(z)

    bounds = ([-1.0, 0.0, 2.0], [1.0, 3.0, 2.5])
    layer = BlackBoxLayer(box, M, "rge", q=50, mu=0.2, scale=1.0, bounds=bounds, squash=True)
    z = (5.0 * points(50).detach()).requires_grad_()
    layer(z).sum().backward()
    assert all((np.array(bounds[0]) <= ask).all() and (ask <= np.array(bounds[1])).all() for ask in seen)
    assert layer.statistics.one_sided > 0
    strict = BlackBoxLayer(box, M, bounds=bounds)
    inside = torch.tensor([[0.0, 1.0, 2.0], [1.0, 3.0, 2.5]])
    strict(inside)
    with pytest.raises(ValueError, match=r"`z` to stay within the bounds .* but got \[0.0, 1.0, 1.89.*squash=True"):
        strict(inside - torch.tensor([0.0, 0.0, 0.1]))


# -- noise -------------------------------------------------------------------------------------------------------------
def test_a_stochastic_box_gets_the_same_noise_on_both_sides():
    def noisy(z, seeds):
        noise = np.stack([np.random.default_rng(seed).normal(size=D) for seed in seeds])
        return (z * (1.0 + noise)).sum(axis=1)

    layer = BlackBoxLayer(Simulator(noisy, seeded=True), 1, "cge", mu=1e-3, scale=1.0, seed=3)
    z = points()
    out = layer(z)
    (found,) = torch.autograd.grad(out.sum(), z, retain_graph=True)
    # one noise a sample: the gradient is that of the realisation that was seen
    torch.testing.assert_close((found * z).sum(dim=1, keepdim=True).detach(), out.detach(), rtol=1e-8, atol=1e-8)
    assert not torch.allclose(found[0], found[1], rtol=1e-2)
    # the next call has another one
    assert not torch.allclose(layer(z), out)


def test_directions_double_while_noise_is_too_high():
    def box(z):
        return np.random.default_rng(0).normal(size=len(z))

    layer = BlackBoxLayer(box, 1, "rge", q=4, max_q=30, scale=1.0)
    for expected in (8, 16, 30, 30):
        layer(points(500)).sum().backward()
        assert layer.directions == expected
    assert layer.statistics.snr < 0.1
    calm = BlackBoxLayer(lambda z: z.sum(axis=1), 1, "rge", q=40, max_q=80, scale=1.0)
    calm(points()).sum().backward()
    assert calm.directions == 40
    assert layer.queries_per_sample() == 61


# -- randomness and state ----------------------------------------------------------------------------------------------
def test_directions_are_keyed_by_seed_and_call_and_leave_the_global_generator():
    state = torch.get_rng_state()
    z = points()
    layers = [BlackBoxLayer(smooth_numpy, M, "rge", q=2, seed=seed) for seed in (1, 1, 2)]
    first, same, other = (gradient(layer, z) for layer in layers)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert not torch.equal(gradient(layers[0], z), first)
    assert torch.equal(torch.get_rng_state(), state)
    # twice through the same graph: the same
    out = layers[1](z)
    assert torch.equal(*(torch.autograd.grad(out.sum(), z, retain_graph=True)[0] for _ in range(2)))


def test_a_layer_goes_on_where_its_state_was_saved(tmp_path):
    layer, other = (BlackBoxLayer(smooth_numpy, M, "rge", q=2, max_q=9, seed=1) for _ in range(2))
    z = points()
    for _ in range(3):
        gradient(layer, z)
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    other.load_state_dict(state)
    assert torch.equal(gradient(layer, z), gradient(other, z))
    fresh = BlackBoxLayer(smooth_numpy, M)
    fresh.load_state_dict(BlackBoxLayer(smooth_numpy, M).state_dict())
    assert not fresh.variance.numel()


def test_pickle_and_copy():
    layer = BlackBoxLayer(smooth_numpy, M, "rge", seed=2, cache=3)
    z = points()
    gradient(layer, z)
    twins = [pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)]
    expected = gradient(layer, z)
    assert all(torch.equal(gradient(twin, z), expected) for twin in twins)
    assert twins[1].simulator is layer.simulator


def test_ranks_draw_what_one_rank_would(tmp_path):
    def found(rank):
        z = points(6).detach()[rank::2].clone().requires_grad_()
        layer = BlackBoxLayer(smooth_numpy, M, "rge", q=2, scale=1.0, seed=1)
        return gradient(layer, z, torch.ones(3, M))

    ranks = run_on_two_ranks(tmp_path, found)
    z = points(6)
    whole = gradient(BlackBoxLayer(smooth_numpy, M, "rge", q=2, scale=1.0, seed=1), z, torch.ones(6, M))
    for rank, rows in enumerate(ranks):
        torch.testing.assert_close(rows, whole[rank::2])


def test_ranks_have_one_scale(tmp_path):
    def found(rank):
        layer = BlackBoxLayer(smooth_numpy, M)
        for seed in (1, 2):
            layer(points(6, seed).detach()[rank::2].clone().requires_grad_())
        return layer.variance

    first, second = run_on_two_ranks(tmp_path, found)
    assert torch.equal(first, second)
    whole = BlackBoxLayer(smooth_numpy, M)
    for seed in (1, 2):
        whole(points(6, seed))
    torch.testing.assert_close(first, whole.variance)


def test_one_instance_serves_the_backward_passes_of_all_ranks(tmp_path):
    def found(rank):
        z = points(3).detach().requires_grad_()
        layer = BlackBoxLayer(Simulator(smooth_numpy, out_dim=M, rank_zero_service=True), M, "cge", scale=1.0)
        # rank 1 has nothing to ask for
        weights = torch.full((3, M), 1.0 - rank, dtype=torch.float64)
        return gradient(layer, z, weights), layer.simulator.counts.queries

    (first, asked), (second, none) = run_on_two_ranks(tmp_path, found)
    torch.testing.assert_close(first, gradient(smooth, points(3), torch.ones(3, M)), rtol=1e-3, atol=1e-3)
    assert not second.any()
    assert (asked, none) == (3 + 3 + 3 * 2 * D, 0)


# -- types and transformations -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_box_sees_float64_and_the_network_its_own_type(kind):
    seen = []

    def box(z):
        seen.append(z.dtype)
        return smooth_numpy(z)

    z = points().detach().to(kind).requires_grad_()
    out = BlackBoxLayer(box, M, "cge")(z)
    assert out.dtype == kind
    out.sum().backward()
    assert z.grad.dtype == kind
    assert set(seen) == {np.dtype("float64")}
    torch.testing.assert_close(z.grad.double(), gradient(smooth, points(), torch.ones(5, M)), rtol=0.05, atol=0.05)


def test_autocast_stays_outside():
    net = Net(BlackBoxLayer(smooth, M, tensors=True)).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoded = net.encoder(torch.ones(3, 4))
        assert encoded.dtype == torch.bfloat16
        out = net.box(encoded)
        assert out.dtype == torch.float32
    out.sum().backward()
    assert net.encoder[0].weight.grad.dtype == torch.float32


def test_leading_dimensions_are_kept():
    z = points(6).detach().view(2, 3, D).requires_grad_()
    layer = BlackBoxLayer(smooth_numpy, M, "cge", mu=1e-4)
    out = layer(z)
    assert out.shape == (2, 3, M)
    assert layer.valid.shape == (2, 3)
    torch.testing.assert_close(gradient(layer, z), gradient(smooth, z), rtol=1e-5, atol=1e-7)


def test_second_derivatives_are_refused_in_words():
    z = points()
    (first,) = torch.autograd.grad(BlackBoxLayer(smooth_numpy, M)(z).square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="BlackBoxLayer estimates first derivatives .*direct=True"):
        first.sum().backward()


def test_activation_checkpointing_repeats_no_question():
    from torch.utils.checkpoint import checkpoint

    net = Net(BlackBoxLayer(smooth_numpy, M, "cge", cache=1000, scale=1.0))
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    checkpoint(net, x, use_reentrant=False).sum().backward()
    assert net.box.simulator.counts.queries == 4 * (1 + 2 * D)


def test_compiled_networks_leave_the_layer_out():
    net = Net(BlackBoxLayer(smooth_numpy, M, "cge", mu=1e-4))
    twin = copy.deepcopy(net)
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    torch.compile(net, backend="eager")(x).sum().backward()
    twin(x).sum().backward()
    torch.testing.assert_close(net.encoder[0].weight.grad, twin.encoder[0].weight.grad)


# -- the step ----------------------------------------------------------------------------------------------------------
def test_suggested_step_is_near_the_best():
    """A solver with a tolerance of 1e-6 on a sine: the best central difference is at about (3e-6)^(1/3)."""

    def solver(z):
        return np.round(np.sin(3.0 * z).sum(axis=1) / 1e-6) * 1e-6

    z = points(8).detach()
    found = suggest_mu(solver, z)
    truth = 3.0 * torch.cos(3.0 * z)

    def error(mu):
        layer = BlackBoxLayer(solver, 1, "cge", mu=mu, scale=1.0)
        inputs = z.clone().requires_grad_()
        return float((gradient(layer, inputs, torch.ones(8, 1)) - truth).norm())

    assert error(found.mu) < 4.0 * min(map(error, found.grid))
    assert error(found.mu) < 1e-3 * float(truth.norm())
    assert found.queries == 17 * 2 * 8 * D
    assert found.grid[0] < found.mu < found.grid[-1]
    noisy = suggest_mu(lambda p: np.stack([p[:, 0], p[:, 1]], axis=1), z, out_dim=2, grid=[0.1, 0.01, 1.0])
    assert noisy.grid == (0.01, 0.1, 1.0)
    with pytest.raises(ValueError, match="three positive steps"):
        suggest_mu(solver, z, grid=[0.1, 0.2])


# -- bad input ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"out_dim": 0}, "`out_dim` to be at least 1, but got 0"),
        ({"q": 0}, "`q` to be at least 1, but got 0"),
        ({"q": 5, "max_q": 4}, "`max_q` to be at least 5, but got 4"),
        ({"mu": 0.0}, "`mu` to be positive, but got 0.0"),
        ({"mu": float("nan")}, "`mu` to be positive, but got nan"),
        ({"workers": 0}, "`workers` to be at least 1, but got 0"),
        ({"estimator": "spsa"}, r"`estimator` to be one of \['auto', 'cge', 'rge'\], but got 'spsa'"),
        ({"mode": "grad"}, "`mode` to be one of .*, but got 'grad'"),
        ({"scale": -1.0}, "`scale` to be 'batch' or positive numbers, but got -1.0"),
        ({"scale": "data"}, "`scale` to be 'batch' or positive numbers, but got 'data'"),
        ({"bounds": (1.0, 0.0)}, r"`bounds` to have the lowest below the highest, but got \(1.0, 0.0\)"),
        ({"on_failure": "skip"}, "`on_failure` to be one of .*, but got 'skip'"),
    ],
)
def test_bad_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        BlackBoxLayer(smooth_numpy, **arguments)


def test_bad_combinations():
    simulator = Simulator(smooth_numpy, out_dim=M)
    with pytest.raises(MisconfigurationException, match="`downstream` to be given with mode='loss'"):
        BlackBoxLayer(smooth_numpy, mode="loss")
    with pytest.raises(MisconfigurationException, match="`downstream` to be given with mode='loss'"):
        BlackBoxLayer(smooth_numpy, downstream=F.mse_loss)
    with pytest.raises(MisconfigurationException, match="`squash` maps into the `bounds`"):
        BlackBoxLayer(smooth_numpy, squash=True)
    with pytest.raises(MisconfigurationException, match=r"its own settings, but got \{'cache': 3\}"):
        BlackBoxLayer(simulator, M, cache=3)
    with pytest.raises(ValueError, match="`out_dim` to be that of the Simulator, 2, but got 1"):
        BlackBoxLayer(simulator)
    with pytest.raises(MisconfigurationException, match="direct=True needs `fn` to be a callable"):
        BlackBoxLayer(simulator, M, direct=True)


def test_bad_answers_and_points():
    layer = BlackBoxLayer(smooth_numpy, M, in_dim=D)
    with pytest.raises(ValueError, match=r"shape \(..., 3\), with a row a sample, but got \(2, 4\)"):
        layer(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"shape \(..., 3\), .* but got \(3,\)"):
        layer(torch.zeros(3))
    with pytest.raises(SimulatorAnswerError, match=r"shape \(2, 3\), but got \(2, 2\)"):
        BlackBoxLayer(smooth_numpy, 3)(torch.zeros(2, D))
    with pytest.raises(SimulatorError, match=r"for the input \[1.5, 0.0, 0.0\], but it raised KeyError: 'x'"):
        BlackBoxLayer(lambda z: {}["x"], M)(torch.tensor([[1.5, 0.0, 0.0]]))


def test_coordinates_of_a_large_input_are_warned_of():
    layer = BlackBoxLayer(lambda z: z.sum(axis=1), 1, "cge")
    with pytest.warns(UserWarning, match="asks 2 x 513 points for every sample .* q=10 asks 2 x 10"):
        layer(torch.zeros(1, 513))


# -- many at a time ----------------------------------------------------------------------------------------------------
def with_known(rows):
    """The first three columns through ``smooth``, times the fourth, which is known."""
    return smooth_numpy(rows[:, :D]) * rows[:, D:]


@pytest.mark.parametrize("place", [0, 1])
def test_vmap_asks_for_all_at_once(place):
    calls = []

    def watched(rows):
        calls.append(len(rows))
        return smooth_numpy(rows)

    layer, z = BlackBoxLayer(watched, out_dim=M), torch.stack([points(seed=seed) for seed in range(4)], dim=place)
    found = torch.func.vmap(layer, in_dims=place)(z)
    assert calls == [20]
    assert layer.simulator.counts.queries == 20
    expected = smooth(z.movedim(place, 0))
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-12)


def test_vmap_over_some_of_its_inputs():
    layer, z = BlackBoxLayer(with_known, out_dim=M), points()
    known = torch.rand(6, 5, 1, dtype=torch.float64)
    expected = smooth(z) * known
    with torch.no_grad():
        found = torch.func.vmap(layer, in_dims=(None, 0))(z, known)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-12)


def test_vmap_of_losses():
    def downstream(answers, targets):
        return (answers - targets).square().sum(dim=1)

    layer = BlackBoxLayer(smooth_numpy, out_dim=M, mode="loss", downstream=downstream)
    z, targets = torch.stack([points(seed=1), points(seed=2)]), torch.zeros(5, M, dtype=torch.float64)
    found = torch.func.vmap(layer, in_dims=(0, None))(z, targets)
    torch.testing.assert_close(found, smooth(z).square().sum(dim=2), rtol=0.0, atol=1e-12)


def test_differentiable_code_keeps_the_gradient_of_its_own_weights():
    inner = nn.Linear(D, M).double()
    layer, z = BlackBoxLayer(inner, out_dim=M, direct=True), points()
    layer(z).sum().backward()
    torch.testing.assert_close(inner.weight.grad, z.sum(dim=0).expand(M, D))
    stacked = torch.stack([z, 2.0 * z])
    torch.testing.assert_close(torch.func.vmap(layer)(stacked), inner(stacked))
