"""CGE: closed forms, and the three levers against one coordinate at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from lightning_trust.core.blocks import split
from lightning_trust.nn import SmallCNN
from lightning_trust.nn.resnet import ThinResNet
from lightning_trust.optim import CGE, LossOracle
from lightning_trust.optim.zeroth_order.block_queries import BlockQueries

CLASSES, ROWS = 5, 12


def quadratic() -> tuple:
    generator = torch.Generator().manual_seed(2)
    matrix = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    matrix = matrix + matrix.T
    x = torch.randn(2, 3, generator=generator, dtype=torch.float64).requires_grad_()
    b = torch.randn(6, generator=generator, dtype=torch.float64)
    flat = x.detach().flatten()
    return x, (lambda: 0.5 * x.flatten() @ matrix @ x.flatten() + b @ x.flatten()), (matrix @ flat + b), matrix


@pytest.mark.parametrize("mu", [1e-3, 0.4])
def test_a_quadratic(mu):
    x, loss, gradient, matrix = quadratic()
    found = CGE(mu=mu).estimate(loss, [x])
    expected = gradient + mu * matrix.diagonal() / 2.0
    torch.testing.assert_close(x.grad.flatten(), expected, rtol=0.0, atol=1e-9)
    assert found.queries == 7
    x.grad = None
    assert CGE(mu=mu, central=True).estimate(loss, [x]).queries == 13
    torch.testing.assert_close(x.grad.flatten(), gradient, rtol=0.0, atol=1e-9)


def test_estimates_add_up_as_gradients_do():
    x, loss, gradient, _ = quadratic()
    for _ in range(2):
        CGE(central=True).estimate(loss, [x])
    torch.testing.assert_close(x.grad.flatten(), 2.0 * gradient)


def test_only_active_entries_are_asked():
    x, loss, gradient, _ = quadratic()
    mask = torch.tensor([[True, False, False], [False, True, False]])
    found = CGE(central=True).add(LossOracle(loss, {"x": x}, masks={"x": mask}))
    assert found.queries == 5
    expected = torch.where(mask, gradient.view(2, 3), 0.0)
    torch.testing.assert_close(x.grad, expected)


def test_parameters_that_are_views_and_scalars():
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    turned = torch.ones(2, 3, dtype=torch.float64).T.detach().requires_grad_()
    assert not turned.is_contiguous()
    weight = torch.arange(6.0, dtype=torch.float64).view(3, 2)
    CGE(central=True).estimate(lambda: scale * (weight * turned).sum(), [scale, turned])
    torch.testing.assert_close(turned.grad, 2.0 * weight)
    torch.testing.assert_close(scale.grad, torch.tensor(15.0, dtype=torch.float64))


# -- the levers --------------------------------------------------------------------------------------------------------
def images(channels: int = 1, size: int = 9) -> torch.Tensor:
    return torch.randn(ROWS, channels, size, size, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def mlp():
    return nn.Sequential(nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 7, bias=False), nn.GELU(), nn.Linear(7, CLASSES))


def normalised_mlp():
    return nn.Sequential(
        nn.Linear(9, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.LayerNorm(6), nn.Linear(6, CLASSES)
    )


def two_convolutions():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.Conv2d(3, 4, 3, stride=2, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(16, CLASSES),
        nn.BatchNorm1d(CLASSES, affine=False),
    )


def odd_convolutions():
    """Groups, strides, dilation, uneven kernels, other paddings, and normalisation over groups."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.Dropout2d(0.3),
        nn.Conv2d(4, 4, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(0, 1)),
        nn.GroupNorm(2, 4),
        nn.LeakyReLU(0.1, inplace=True),
        nn.Conv2d(4, 3, 3, padding="same"),
        nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"),
        nn.AvgPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, CLASSES),
    )


def residual():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        BasicBlock(4, 4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, CLASSES),
    )


class Tokens(nn.Module):
    """Linear layers over three dimensions, in a chain that the network tells."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4 * 3, CLASSES)

    def blocks(self):
        return [nn.Unflatten(1, (3, 3)), self.embed, nn.Tanh(), self.norm, nn.Flatten(), self.head]

    def forward(self, x):
        return self.head(self.norm(self.embed(x.unflatten(1, (3, 3))).tanh()).flatten(1))


NETWORKS = {
    "mlp": (mlp, lambda: images()[:, 0, 0]),
    "normalised_mlp": (normalised_mlp, lambda: images()[:, 0, 0]),
    "tokens": (Tokens, lambda: images()[:, 0, 0]),
    "two_convolutions": (two_convolutions, images),
    "odd_convolutions": (odd_convolutions, lambda: images(2)),
    "residual": (residual, images),
    "small_cnn": (lambda: SmallCNN(num_classes=CLASSES, widths=(3, 4)), images),
    "thin_resnet": (lambda: nn.Sequential(nn.Conv2d(1, 16, 1), ThinResNet(1, 16, CLASSES).layer1[0].conv1), images),
}


def gradients(network, x, targets, estimator, **kwargs):
    for parameter in network.parameters():
        parameter.grad = None
    torch.manual_seed(8)
    found = estimator.add(
        LossOracle(
            lambda: F.cross_entropy(network(x).flatten(1)[:, :CLASSES], targets),
            dict(network.named_parameters()),
            module=network,
            network=network,
            **kwargs,
        )
    )
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters()}, found


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_levers_change_nothing(name, training):
    make, data = NETWORKS[name]
    torch.manual_seed(5)
    network, x = make().double().train(training), data()
    targets = torch.arange(ROWS) % CLASSES
    before = {key: value.clone() for key, value in network.state_dict().items()}
    inputs = x.clone()
    slow, plain = gradients(network, x, targets, CGE(feature_reuse=False, chunk=1))
    # statistics move with every plain evaluation, and come back for the comparison
    network.load_state_dict(before)
    fast, reused = gradients(network, x, targets, CGE(feature_reuse=True, memory=0.02))
    for key, value in before.items():
        assert torch.equal(network.state_dict()[key], value), f"{key} was moved"
    assert torch.equal(x, inputs)
    batched, _ = gradients(network, x, targets, CGE(feature_reuse=False, chunk=7))
    central, _ = gradients(network, x, targets, CGE(mu=1e-6, central=True))
    torch.manual_seed(8)
    network.zero_grad()
    F.cross_entropy(network(x).flatten(1)[:, :CLASSES], targets).backward()
    for key, expected in slow.items():
        torch.testing.assert_close(fast[key], expected, rtol=0.0, atol=1e-10)
        torch.testing.assert_close(batched[key], expected, rtol=0.0, atol=1e-10)
        torch.testing.assert_close(central[key], dict(network.named_parameters())[key].grad, rtol=0.0, atol=1e-5)
    assert reused.queries == plain.queries == 1 + sum(parameter.numel() for parameter in network.parameters())
    assert reused.equivalent_forwards < plain.equivalent_forwards


def test_a_network_of_torchvision():
    torch.manual_seed(5)
    network = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=CLASSES).double()
    blocks = split(network)
    network.eval()
    x = images(3, 32)[:2]
    y = x
    for block in blocks:
        y = block(y)
    torch.testing.assert_close(y, network(x))
    # of so large a network some coordinates, those of each kind of layer
    masks = {key: torch.zeros_like(value, dtype=torch.bool) for key, value in network.named_parameters()}
    for mask in masks.values():
        mask.view(-1)[:2] = True
    targets = torch.tensor([0, 3])
    network.train()
    slow, _ = gradients(network, x, targets, CGE(feature_reuse=False, chunk=1), masks=masks)
    fast, _ = gradients(network, x, targets, CGE(feature_reuse=True), masks=masks)
    for key, expected in slow.items():
        torch.testing.assert_close(fast[key], expected, rtol=0.0, atol=1e-10)


def test_block_evaluations_are_counted():
    """A coordinate of block b runs through L - b blocks."""
    network = mlp().double()
    x, targets = images()[:, 0, 0], torch.arange(ROWS) % CLASSES
    _, found = gradients(network, x, targets, CGE(feature_reuse=True))
    sizes = [(60, 5), (42, 3), (40, 1)]
    assert found.equivalent_forwards == pytest.approx(1.0 + sum(count * blocks for count, blocks in sizes) / 5.0)


def test_a_loss_that_cannot_be_vectorised():
    network, x = mlp().double(), images()[:, 0, 0]
    targets = torch.arange(ROWS) % CLASSES
    seen = []

    def loss():
        value = F.cross_entropy(network(x), targets)
        seen.append(value.item())
        return 1.0 * value

    estimator = CGE(feature_reuse=True)
    estimator.estimate(loss, dict(network.named_parameters()), module=network)
    found = [parameter.grad.clone() for parameter in network.parameters()]
    expected, _ = gradients(network, x, targets, CGE())
    for each, value in zip(found, expected.values(), strict=True):
        torch.testing.assert_close(each, value, rtol=0.0, atol=1e-10)
    # the next estimate does not try again
    assert not estimator._vectorized_outputs


def test_a_network_that_is_called_twice():
    network, x = mlp().double(), images()[:, 0, 0]
    targets = torch.arange(ROWS) % CLASSES

    def loss():
        return F.cross_entropy(network(x), targets) + network(0.5 * x).square().mean()

    results = []
    for estimator in (CGE(feature_reuse=True), CGE(feature_reuse=False, chunk=1)):
        network.zero_grad()
        estimator.estimate(loss, dict(network.named_parameters()), module=network)
        results.append([parameter.grad.clone() for parameter in network.parameters()])
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=0.0, atol=1e-10)


def test_a_network_that_is_given_what_it_gave():
    network, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)).double(), torch.randn(6, 4).double()
    calls = [2]

    def loss():
        state = x
        for _ in range(calls[0]):
            state = state + network(state)
        return state.square().mean()

    found = CGE(mu=1e-6, central=True).estimate(loss, dict(network.named_parameters()), module=network)
    expected = torch.autograd.grad(loss(), list(network.parameters()))
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0.0, atol=1e-7)
    assert found.queries >= 1 + 2 * sum(parameter.numel() for parameter in network.parameters())
    with pytest.raises(MisconfigurationException, match="does not depend on what it gave before"):
        CGE(feature_reuse=True).estimate(loss, dict(network.named_parameters()), module=network)
    # once a step it is a chain
    calls[0] = 1
    CGE(feature_reuse=True).estimate(loss, dict(network.named_parameters()), module=network)


@pytest.mark.parametrize("penalty", [lambda p: 1e-4 * p.abs().sum(), lambda p: 1e-4 * p.square().sum()])
def test_a_loss_that_reads_the_weights_itself(penalty):
    network, x = mlp().double(), images()[:, 0, 0]
    targets = torch.arange(ROWS) % CLASSES

    def loss():
        return F.cross_entropy(network(x), targets) + sum(penalty(parameter) for parameter in network.parameters())

    before = [parameter.detach().clone() for parameter in network.parameters()]
    found = CGE(mu=1e-6, central=True).estimate(loss, dict(network.named_parameters()), module=network)
    assert all(torch.equal(value, parameter) for value, parameter in zip(before, network.parameters(), strict=True))
    expected = torch.autograd.grad(loss(), list(network.parameters()))
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0.0, atol=1e-7)
    assert found.queries >= 1 + 2 * sum(parameter.numel() for parameter in network.parameters())
    with pytest.raises(MisconfigurationException, match="all that the loss reads of the weights"):
        CGE(feature_reuse=True).estimate(loss, dict(network.named_parameters()), module=network)


def test_parameters_outside_the_chain():
    network, x = mlp().double(), images()[:, 0, 0]
    scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
    targets = torch.arange(ROWS) % CLASSES
    holder = nn.ModuleDict({"net": network})
    holder.scale = scale

    def loss():
        return F.cross_entropy(scale * network(x), targets)

    found = CGE(mu=1e-6, central=True).add(
        LossOracle(loss, dict(holder.named_parameters()), module=holder, network=network)
    )
    expected = torch.autograd.grad(loss(), list(holder.parameters()))
    for parameter, gradient in zip(holder.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0.0, atol=1e-7)
    assert found.queries == 1 + 2 * sum(parameter.numel() for parameter in holder.parameters())


class Hidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(9, CLASSES)

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize("case", ["no_blocks", "hooked", "tied", "no_network"])
def test_feature_reuse_that_is_asked_for_and_cannot_be(case):
    network = mlp()
    if case == "no_blocks":
        network = Hidden()
    elif case == "hooked":
        network[1].register_forward_hook(lambda module, inputs, output: output * 2)
    elif case == "tied":
        network = nn.Sequential(nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 9))
        network[2].weight = network[0].weight
    network = network.double()
    x = images()[:, 0, 0]
    oracle = LossOracle(
        lambda: network(x).square().mean(),
        dict(network.named_parameters()),
        module=network,
        network=None if case == "no_network" else network,
    )
    with pytest.raises(MisconfigurationException, match="nn.Sequential or implements SplitModule"):
        CGE(feature_reuse=True).add(oracle)
    CGE().add(oracle)
    for parameter, gradient in zip(
        network.parameters(), torch.autograd.grad(network(x).square().mean(), list(network.parameters())), strict=True
    ):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0.0, atol=0.05)


def test_random_layers_inside_a_block_are_evaluated_as_a_whole():
    class Drops(nn.Sequential):
        pass

    network = nn.Sequential(Drops(nn.Linear(9, 4), nn.Dropout(0.5)), nn.Linear(4, CLASSES)).double()
    oracle = LossOracle(lambda: network(images()[:, 0, 0]).mean(), dict(network.named_parameters()), network, network)
    assert BlockQueries.of(oracle, 1 << 20) is None


def test_shares_have_equal_costs(monkeypatch):
    """Prefix sums: no list with an entry a unit of cost is made, and shares differ by one coordinate at most."""
    import lightning_trust.optim.zeroth_order.oracle as module

    monkeypatch.setattr(module, "world_size", lambda: 3)
    costs = torch.cat([torch.full((1000,), 5e9), torch.full((3000,), 1e9), torch.full((10,), 3e8)]).double()
    oracle = LossOracle(lambda: torch.tensor(0.0), [torch.zeros(1, requires_grad=True)], parallel="queries")
    shares = []
    for rank in range(3):
        monkeypatch.setattr(module, "rank", lambda rank=rank: rank)
        shares.append(oracle.share(costs))
    assert [share.start for share in shares] == [0, shares[0].stop, shares[1].stop]
    assert shares[2].stop == len(costs)
    sums = [float(costs[share].sum()) for share in shares]
    assert max(sums) - min(sums) < 1.1e10
    assert shares[0].stop < shares[1].stop - shares[0].stop


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mu": 0.0}, "`mu` to be a positive number, but got 0.0"),
        ({"mu": float("nan")}, "`mu` to be a positive number, but got nan"),
        ({"chunk": 0}, "`chunk` to be an integer of at least 1, but got 0"),
        ({"feature_reuse": "yes"}, "`feature_reuse` to be True, False or 'auto', but got 'yes'"),
        ({"memory": 0.0}, "`memory` to be a positive number of MiB, but got 0.0"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        CGE(**arguments)


def test_bad_losses():
    x = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match=r"one floating number, but got a torch.float64 tensor of shape \(2, 2\)"):
        CGE().estimate(lambda: x * 2, [x])
    with pytest.raises(ValueError, match="one floating number, but got 3"):
        CGE().estimate(lambda: 3, [x])
    with pytest.raises(ValueError, match=r"got nan at coordinate 3 of 'weight' \(mu=0.005\)"):
        CGE().estimate(lambda: (0.001 - x[1, 1]).sqrt() + x.sum(), {"weight": x})
    assert (x == 0.0).all()
    with pytest.raises(ValueError, match="to hold one that requires a gradient, but got none"):
        CGE().estimate(lambda: x.sum(), [x.detach()])
    with pytest.raises(ValueError, match=r"mask of 'w' to have its shape, \(2, 2\), but got \(2,\)"):
        LossOracle(lambda: x.sum(), {"w": x}, masks={"w": torch.ones(2, dtype=torch.bool)})
    meta = torch.zeros(1, device="meta", requires_grad=True)
    with pytest.raises(MisconfigurationException, match=r"parameters on \['cpu', 'meta'\]"):
        LossOracle(lambda: x.sum(), [x, meta])


def test_bottlenecks_are_blocks_too():
    network = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=3).eval()
    y = x = torch.randn(1, 3, 32, 32)
    for block in split(network):
        y = block(y)
    torch.testing.assert_close(y, network(x))


@pytest.mark.parametrize(
    ("loss", "recognised"),
    [
        (lambda z, y: F.cross_entropy(z, y), True),
        (lambda z, y: nn.CrossEntropyLoss()(z, y), True),
        (lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1), False),
        (lambda z, y: F.cross_entropy(z, y, weight=torch.arange(1.0, CLASSES + 1).double()), False),
        (lambda z, y: F.cross_entropy(z, torch.where(y == 0, -100, y)), False),
        (lambda z, y: F.cross_entropy(z, F.one_hot(y, CLASSES).double()), False),
        (lambda z, y: F.cross_entropy(z, y, reduction="sum"), False),
        (lambda z, y: 2.0 * F.cross_entropy(z, y), False),
        (lambda z, y: F.cross_entropy(2.0 * z, y), False),
        (lambda z, y: F.mse_loss(z, F.one_hot(y, CLASSES).double()), False),
    ],
)
def test_losses_of_all_kinds(loss, recognised):
    network, x = mlp().double(), images()[:, 0, 0]
    targets = torch.arange(ROWS) % CLASSES

    def oracle():
        value = lambda: loss(network(x), targets)  # noqa: E731
        return LossOracle(value, dict(network.named_parameters()), module=network, network=network)

    assert (BlockQueries.of(oracle(), 1 << 20)._cross_entropy is not None) == recognised
    CGE(mu=1e-6, central=True).add(oracle())
    expected = torch.autograd.grad(loss(network(x), targets), list(network.parameters()))
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0.0, atol=1e-7)


def test_coordinates_that_lead_far_away():
    """Exponentials relative to the clean outputs would overflow."""
    network, x = mlp().double(), 100.0 * images()[:, 0, 0]
    targets = torch.arange(ROWS) % CLASSES
    slow, _ = gradients(network, x, targets, CGE(mu=1e3, feature_reuse=False, chunk=1))
    fast, _ = gradients(network, x, targets, CGE(mu=1e3, feature_reuse=True))
    assert max(gradient.abs().max() for gradient in slow.values()) > 10.0
    for key, expected in slow.items():
        torch.testing.assert_close(fast[key], expected, rtol=1e-12, atol=1e-10)
