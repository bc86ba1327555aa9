"""What zeroth-order SciML has to be compared with: all that does without an estimate of the simulator's gradient.

Each is a function of problem, seed, learning rate and number of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torchvision.ops import MLP

from benchmarks.zo_sciml_problems import Fitted, Problem, encoder, fit
from lightning_trust.functional.zeroth_order import random_vjp
from lightning_trust.modules import SKSModule
from lightning_trust.nn import BlackBoxLayer

#: Steps, in units of the spread of what is moved.
MU = 1e-2
#: And those of the score function, whose variance falls with the square of it.
SIGMA = 0.3


def through(problem: Problem, layer: BlackBoxLayer, seed: int, rate: float, steps: int) -> Fitted:
    """Train an SKSModule, comparing its encoder's gradient with that through the twin."""
    module = SKSModule(encoder(problem, problem.dim, seed), layer, known=problem.known)
    x, y = problem.train
    seen, known = problem.split(x)
    cosines: list[float] = []

    def compare() -> None:
        z = problem.inputs(module.encoder(seen))
        loss = (problem.twin(torch.cat([z, known], dim=1)) - y).square().mean()
        true = torch.autograd.grad(loss, list(module.encoder.parameters()))
        flat = [
            torch.cat([each.flatten() for each in group])
            for group in ([parameter.grad for parameter in module.encoder.parameters()], true)
        ]
        cosines.append(float(torch.cosine_similarity(*flat, dim=0)))

    fit(module, lambda: (module(x) - y).square().mean(), rate, steps, compare)
    counts = layer.simulator.counts if layer.simulator is not None else None
    queries, failures = (counts.queries, counts.failures) if counts is not None else (0, 0)

    return Fitted(problem.predictor(module.encoder), queries, failures, cosines)


def estimated(estimator: str, q: int = 4) -> Callable[..., Fitted]:
    """Ours."""

    def method(problem: Problem, seed: int, rate: float, steps: int) -> Fitted:
        layer = BlackBoxLayer(
            problem.simulator, problem.out_dim, estimator, q=q, mu=MU, bounds=problem.bounds, squash=True, seed=seed
        )
        return through(problem, layer, seed, rate, steps)

    return method


def twin(problem: Problem, seed: int, rate: float, steps: int) -> Fitted:
    """Autograd through a differentiable version of the simulator: the upper bound, where there is one."""
    layer = BlackBoxLayer(problem.twin, problem.out_dim, bounds=problem.bounds, squash=True, direct=True)
    return through(problem, layer, seed, rate, steps)


def data_only(problem: Problem, seed: int, rate: float, steps: int) -> Fitted:
    """The same network straight to the targets."""
    x, y = problem.train
    mean, spread = y.mean(dim=0), y.std(dim=0)
    net = encoder(problem, problem.out_dim, seed)
    seen = problem.split(x)[0]
    fit(net, lambda: (net(seen) - (y - mean) / spread).square().mean(), rate, steps)
    return Fitted(lambda inputs: (net(problem.split(inputs)[0]) * spread + mean).detach())


def nominal(problem: Problem, seed: int, rate: float, steps: int) -> Fitted:
    """The simulator alone, in the middle of its domain."""
    low, high = problem.box()
    return Fitted(lambda inputs: problem.ask(((low + high) / 2).expand(len(inputs), -1), problem.split(inputs)[1]))


def two_stage(problem: Problem, seed: int, rate: float, steps: int) -> Fitted:
    """Calibrate the simulator for each row by a black-box optimiser, then regress what was found."""
    x, y = problem.train
    seen, known = problem.split(x)
    low, high = problem.box()
    queries, found = 0, []
    for row in range(len(x)):

        def misfit(unit: np.ndarray, row: int = row) -> float:
            z = low + (high - low) * torch.as_tensor(unit, dtype=torch.float32)
            return float((problem.ask(z[None], known[row : row + 1]) - y[row]).square().mean())

        best = minimize(
            misfit,
            np.full(problem.dim, 0.5),
            method="Nelder-Mead",
            bounds=[(0.0, 1.0)] * problem.dim,
            options={"maxfev": 40},
        )
        queries += best.nfev
        found.append(best.x)
    target = torch.as_tensor(np.array(found), dtype=torch.float32)
    net = encoder(problem, problem.dim, seed)
    fit(net, lambda: (net(seen).sigmoid() - target).square().mean(), rate, steps)

    return Fitted(problem.predictor(net), queries)


def surrogate(problem: Problem, seed: int, rate: float, steps: int, pairs: int = 1000) -> Fitted:
    """A network that imitates the simulator on random inputs, frozen, and trained through."""
    known = problem.split(problem.train[0])[1]
    low, high = problem.box()
    generator = torch.Generator().manual_seed(seed)
    z = low + (high - low) * torch.rand(pairs, problem.dim, generator=generator)
    beside = known[torch.randint(len(known), (pairs,), generator=generator)]
    answers = problem.ask(z, beside)
    inputs = torch.cat([z, beside], dim=1)
    center, unit = inputs.mean(dim=0), inputs.std(dim=0).clamp(min=1e-6)
    mean, spread = answers.mean(dim=0), answers.std(dim=0)
    torch.manual_seed(seed)
    net = MLP(inputs.shape[1], [64, 64, problem.out_dim], activation_layer=nn.Tanh, inplace=None)
    scaled = (inputs - center) / unit
    fit(net, lambda: (net(scaled) - (answers - mean) / spread).square().mean(), 1e-2, 3 * steps)
    net.requires_grad_(False)

    def imitation(points: Tensor) -> Tensor:
        return net((points - center) / unit) * spread + mean

    layer = BlackBoxLayer(imitation, problem.out_dim, bounds=problem.bounds, squash=True, direct=True)
    fitted = through(problem, layer, seed, rate, steps)
    fitted.queries = pairs
    return fitted


class _ScoreFunction(torch.autograd.Function):
    """The loss of each row, with the gradient (l(z + mu u) - b) u / mu."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, loss: Callable[[Tensor], Tensor], state: dict[str, Any]) -> Tensor:
        step = SIGMA * (z.std(dim=0) + 1e-3)
        u = torch.randn(state["q"], *z.shape, generator=state["generator"])
        losses = torch.stack([loss(z + step * each) for each in u])
        # of each row, for batches are whole
        base = state.setdefault("baseline", losses.mean(dim=0))
        state["baseline"] = 0.9 * base + 0.1 * losses.mean(dim=0)
        ctx.save_for_backward(((losses - base).unsqueeze(-1) * u / step).mean(dim=0))
        return loss(z)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0].unsqueeze(1) * ctx.saved_tensors[0], None, None


def score_function(problem: Problem, seed: int, rate: float, steps: int, q: int = 4) -> Fitted:
    """REINFORCE with a moving baseline."""
    x, y = problem.train
    seen, known = problem.split(x)
    low, high = problem.box()
    net = encoder(problem, problem.dim, seed)
    state = {"q": q, "generator": torch.Generator().manual_seed(seed)}

    def losses(z: Tensor) -> Tensor:
        inside = torch.minimum(torch.maximum(z, low), high)
        return (problem.ask(inside, known) - y).square().mean(dim=1)

    def loss() -> Tensor:
        z = problem.inputs(net(seen))
        return _ScoreFunction.apply(z, losses, state).mean()

    fit(net, loss, rate, steps)

    return Fitted(problem.predictor(net), steps * (1 + q) * len(x))


class _StraightThrough(torch.autograd.Function):
    """The simulator forward, nothing backward."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, answers: Tensor) -> Tensor:
        return answers.view_as(answers)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(problem: Problem, seed: int, rate: float, steps: int) -> Fitted | None:
    """The gradient of the answer is taken for that of the input: only where there are as many of both."""
    if problem.dim != problem.out_dim:
        return None

    def run(points: Tensor) -> Tensor:
        answers = problem.ask(points[:, : problem.dim].detach(), points[:, problem.dim :].detach())
        return _StraightThrough.apply(points[:, : problem.dim], answers)

    layer = BlackBoxLayer(run, problem.out_dim, bounds=problem.bounds, squash=True, direct=True)
    fitted = through(problem, layer, seed, rate, steps)
    fitted.queries = steps * len(problem.train[0])
    return fitted


def full_zo(problem: Problem, seed: int, rate: float, steps: int, q: int = 4) -> Fitted:
    """The paper's plain form: the weights of the network themselves are moved, along random directions."""
    x, y = problem.train
    seen, known = problem.split(x)
    net = encoder(problem, problem.dim, seed)
    parameters = list(net.parameters())
    generator = torch.Generator().manual_seed(seed)

    def losses(weights: Tensor, _: Tensor) -> Tensor:
        found = []
        for each in weights:
            nn.utils.vector_to_parameters(each, parameters)
            found.append((problem.ask(problem.inputs(net(seen)), known) - y).square().mean())
        return torch.stack(found).unsqueeze(1)

    optimizer = torch.optim.Adam(parameters, lr=rate)
    for _ in range(steps):
        weights = nn.utils.parameters_to_vector(parameters).detach()
        directions = torch.randn(q, 1, len(weights), generator=generator)
        with torch.no_grad():
            gradient = random_vjp(losses, weights[None], torch.ones(1, 1), directions, 1e-3).gradient[0]
            nn.utils.vector_to_parameters(weights, parameters)
        for parameter, part in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return Fitted(problem.predictor(net), steps * 2 * q * len(x))
