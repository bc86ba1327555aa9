"""Routed convolutions: against the dense network, both ways to dispatch, the straight-through gradient, cost."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from lightning_trust.attacks import PGD
from lightning_trust.core.modes import eval_mode
from lightning_trust.nn import (
    MoEConv2d,
    MoENetwork,
    Router,
    Routing,
    RoutingContext,
    SmallCNN,
    convert_to_moe,
    count_multiply_adds,
    create_network,
    moe_resnet18,
    moe_small_cnn,
    resnet18_small,
    resnet20,
    straight_through_top1,
)


class ByBrightness(nn.Module):
    """Sends images to an expert by their mean, so that a test knows where they go; scores take gradients."""

    def __init__(self, edges: tuple[float, ...] = (0.5,)) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.linspace(0.0, len(edges) + 0.0, len(edges) + 1))
        self.offset = nn.Parameter(torch.tensor([0.0, *edges]).cumsum(0))

    def forward(self, x):
        return x.mean(dim=(1, 2, 3))[:, None] * self.slope - self.offset


def images(rows: int = 9, pixels: int = 8) -> torch.Tensor:
    """Images that alternate between dark and bright."""
    generator = torch.Generator().manual_seed(1)
    bright = (torch.arange(rows) % 3 == 1).float()[:, None, None, None]
    return 0.45 * torch.rand(rows, 1, pixels, pixels, generator=generator) + 0.5 * bright


def network(**arguments) -> MoENetwork:
    torch.manual_seed(2)
    return convert_to_moe(SmallCNN(widths=(8, 16, 16)), router=ByBrightness(), **arguments)


# -- the dense network -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "dense",
    [
        resnet18_small(1),
        resnet20(1),
        SmallCNN(batch_norm=False),
        create_network("torchvision.models.resnet18", 1),
        timm.create_model("resnet18", in_chans=1, num_classes=10),
    ],
    ids=lambda network: type(network).__module__.partition(".")[0] + type(network).__name__,
)
@pytest.mark.parametrize("training", [False, True])
def test_one_expert_of_full_width_is_the_dense_network(dense, training):
    moe = convert_to_moe(dense, num_experts=1, ratio=1.0)
    state = moe.state_dict()
    for name, value in dense.state_dict().items():
        assert torch.equal(state[f"network.{name}"], value), name
    own = {name for name in state if name.startswith("network.")}
    assert len(own) == len(dense.state_dict())
    moe.load_state_dict({**{f"network.{n}": v for n, v in dense.state_dict().items()}}, strict=False)
    x = torch.rand(3, 1, 32, 32)
    dense, moe = copy.deepcopy(dense).train(training), moe.train(training)
    with torch.no_grad():
        assert torch.equal(moe(x), dense(x))


def test_experts_of_full_width_all_begin_as_the_dense_network():
    dense = SmallCNN(widths=(8, 8)).eval()
    moe = convert_to_moe(dense, num_experts=3, ratio=1.0).eval()
    for expert in range(3):
        assert torch.equal(moe.through(images(), expert), dense(images()))


def test_thin_pathways_have_the_shapes_of_a_thin_network():
    moe = convert_to_moe(resnet20(), num_experts=2, ratio=0.5)
    stem, block = moe.network.conv1, moe.network.layer2[0]
    assert (type(stem), stem.out_channels) == (nn.Conv2d, 8)
    assert (block.conv1.in_channels, block.conv1.out_channels, block.bn1.num_features) == (8, 16, 16)
    assert block.conv1.weight.shape == (32, 8, 3, 3)
    assert moe.network.fc.in_features == 32
    assert moe(torch.rand(2, 3, 16, 16)).shape == (2, 10)


@pytest.mark.parametrize("name", ["resnet18", "torchvision.models.resnet18"])
def test_networks_of_timm_and_torchvision_convert_at_half_width(name):
    moe = convert_to_moe(create_network(name, 3, 5), ratio=0.5).eval()
    shared = [name for name, layer in moe.network.named_modules() if type(layer) is nn.Conv2d]
    assert shared == ["conv1", *(f"layer{stage}.0.downsample.0" for stage in (2, 3, 4))]
    assert moe(torch.rand(2, 3, 32, 32)).shape == (2, 5)


# -- dispatch ----------------------------------------------------------------------------------------------------------
def gradients(moe, x, dispatch):
    moe.zero_grad()
    with moe.dispatching(dispatch):
        logits = moe(x)
    F.cross_entropy(logits, torch.arange(len(x)) % 10).backward()
    return logits.detach(), {name: p.grad.clone() for name, p in moe.network.named_parameters()}


@pytest.mark.parametrize("mode", ["train", "eval", "eval_with_batch_statistics"])
def test_group_and_mask_give_the_same_outputs_statistics_and_gradients(mode):
    first = network().double().train(mode == "train")
    if mode == "eval_with_batch_statistics":
        for layer in first.network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.train()
    second, x = copy.deepcopy(first), images().double()
    assert torch.bincount(first.route(x).argmax(1)).tolist() == [6, 3]
    (out_group, group), (out_mask, mask) = gradients(first, x, "group"), gradients(second, x, "mask")
    torch.testing.assert_close(out_group, out_mask, rtol=0.0, atol=1e-6)
    for name in group:
        torch.testing.assert_close(group[name], mask[name], rtol=0.0, atol=1e-6, msg=name)
    for name, value in first.state_dict().items():
        torch.testing.assert_close(value, second.state_dict()[name], rtol=0.0, atol=1e-6, msg=name)


def test_each_image_meets_its_expert_and_order_is_kept():
    moe, x = network().eval(), images()
    chosen = moe.route(x).argmax(dim=1)
    assert chosen.tolist() == [0, 1, 0] * 3
    for place, expert in enumerate(chosen.tolist()):
        alone = moe.through(x[place : place + 1], expert)
        torch.testing.assert_close(moe(x)[place : place + 1], alone, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(moe.through(x, 0), moe.through(x, 1))


@pytest.mark.parametrize("dispatch", ["group", "mask"])
def test_expert_without_images_gets_exactly_zero_gradient(dispatch):
    moe = network().train()
    _, found = gradients(moe, images()[::3], dispatch)
    layers = {name: layer for name, layer in moe.network.named_modules() if isinstance(layer, MoEConv2d)}
    assert layers
    for name in layers:
        chosen, other = found[f"{name}.weight"].chunk(2)
        assert torch.count_nonzero(other) == 0
        assert torch.count_nonzero(chosen) > 0


def test_layer_equals_a_loop_over_images():
    torch.manual_seed(0)
    layer = MoEConv2d(2, 3, 3, stride=2, padding=1, num_experts=3)
    nn.init.normal_(layer.bias)
    x, chosen = torch.rand(5, 2, 7, 7), [0, 0, 1, 2, 2]
    hot = F.one_hot(torch.tensor(chosen), 3).float()
    expected = torch.cat(
        [
            F.conv2d(x[i : i + 1], layer.weight[3 * e : 3 * e + 3], layer.bias[3 * e : 3 * e + 3], stride=2, padding=1)
            for i, e in enumerate(chosen)
        ]
    )
    torch.testing.assert_close(layer(x, Routing(hot, (2, 1, 2))), expected)
    torch.testing.assert_close(layer(x, Routing(hot, None)), expected)


@pytest.mark.parametrize("dispatch", ["group", "mask"])
@pytest.mark.parametrize("training", [True, False])
def test_batch_without_images(dispatch, training):
    moe = convert_to_moe(SmallCNN(widths=(4, 4), batch_norm=False), dispatch=dispatch).train(training)
    assert moe(torch.zeros(0, 1, 8, 8)).shape == (0, 10)


# -- straight-through gradient -----------------------------------------------------------------------------------------
def test_gradient_of_the_one_hot_is_that_of_the_scores():
    scores = torch.tensor([[0.3, -1.0, 2.0], [5.0, 5.0, 0.1]], requires_grad=True)
    weights = torch.randn(2, 3)
    hot = straight_through_top1(scores)
    assert hot.tolist() == [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    (gradient,) = torch.autograd.grad((weights * hot).sum(), scores)
    assert torch.equal(gradient, weights)


@pytest.mark.parametrize("dispatch", ["group", "mask"])
def test_scores_that_change_without_their_argmax_leave_the_logits_as_they_are(dispatch):
    moe, x = network(dispatch=dispatch).eval(), images()
    before = moe(x)
    with torch.no_grad():
        moe.router.slope.mul_(1.01)
    assert not torch.equal(moe.route(x), network().route(x))
    assert torch.equal(moe(x), before)


def test_router_gets_its_whole_gradient_from_mask_and_that_of_the_chosen_from_group():
    """Of one layer and a linear loss the derivative with respect to a score is the inner product with its expert."""
    torch.manual_seed(0)
    layer = MoEConv2d(1, 2, 3, num_experts=2, bias=False)
    x, weights = torch.rand(3, 1, 5, 5), torch.randn(3, 2, 3, 3)
    scores = torch.tensor([[2.0, 1.0], [3.0, 0.0], [0.0, 1.0]], requires_grad=True)
    each = torch.stack([(F.conv2d(x, kernels) * weights).sum(dim=(1, 2, 3)) for kernels in layer.weight.chunk(2)], 1)
    found = {}
    for name, counts in (("mask", None), ("group", (2, 1))):
        out = layer(x, Routing(straight_through_top1(scores), counts))
        (found[name],) = torch.autograd.grad((out * weights).sum(), scores)
    torch.testing.assert_close(found["mask"], each)
    torch.testing.assert_close(found["group"], each * torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))


@pytest.mark.parametrize("dispatch", ["group", "mask"])
@pytest.mark.parametrize("rows", [slice(None), slice(1, 2)], ids=["both experts", "one expert"])
def test_gradient_at_the_images_in_eval_mode_is_that_of_finite_differences(rows, dispatch):
    """An attack that follows anything else finds less than there is."""
    moe = network().double().eval()
    moe.dispatch = dispatch
    x = images()[rows].double()
    targets = torch.arange(len(x)) % 10
    direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(4))

    def losses(place):
        return F.cross_entropy(moe(place), targets, reduction="none")

    size = 1e-6
    further, nearer = x + size * direction, x - size * direction
    assert torch.equal(moe.route(further).argmax(1), moe.route(nearer).argmax(1))
    with torch.no_grad():
        expected = (losses(further) - losses(nearer)) / (2.0 * size)
    place = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(losses(place).sum(), place)
    torch.testing.assert_close((gradient * direction).sum(dim=(1, 2, 3)), expected, rtol=1e-5, atol=1e-7)


# -- the routing is passed safely --------------------------------------------------------------------------------------
def test_two_forward_passes_before_a_backward_pass_keep_their_own_routing():
    moe = network().train()
    for layer in moe.network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    x, other = images(), 1.0 - images()
    assert moe.route(x).argmax(1).tolist() != moe.route(other).argmax(1).tolist()
    weights = [layer.weight for layer in moe.network.modules() if isinstance(layer, MoEConv2d)]
    both = torch.autograd.grad(moe(x).square().sum() + moe(other).square().sum(), weights)
    alone = [torch.autograd.grad(moe(part).square().sum(), weights) for part in (x, other)]
    for total, first, second in zip(both, *alone, strict=True):
        torch.testing.assert_close(total, first + second, rtol=1e-4, atol=1e-5)


def test_routing_is_put_back_after_an_exception_and_nothing_is_left():
    moe = network()
    with pytest.raises(RuntimeError, match="channels"):
        moe.network(torch.zeros(1, 5, 8, 8))
    with pytest.raises((RuntimeError, ValueError)), moe.context.routed(Routing(torch.eye(2), (1, 1))):
        raise ValueError
    with pytest.raises(RuntimeError, match="no routing is set"):
        moe.network(images())
    with pytest.raises(RuntimeError, match="no routing is set"):
        MoEConv2d(1, 1, 3)(images())


def test_copies_and_pickles_route_by_themselves():
    moe, x = network().eval(), images()
    for twin in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe))):
        assert twin.context is not moe.context
        assert all(layer.context is twin.context for layer in twin.modules() if isinstance(layer, MoEConv2d))
        assert torch.equal(twin(x), moe(x))


def test_router_decides_in_float32_under_autocast():
    moe, x = network().eval(), images()
    scores = moe.route(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(moe.route(x), scores)
        assert moe(x).dtype == torch.bfloat16
    assert scores.dtype == torch.float32
    whole = network().bfloat16().eval()
    assert whole(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("training", [False, True])
def test_where_an_image_goes_depends_on_others_in_training_with_batchnorm_only(norm, training):
    torch.manual_seed(0)
    router, x = Router(2, 1, widths=(8, 16), blocks=(1, 1), norm=norm).train(training), images()
    before = copy.deepcopy(router.state_dict())
    with torch.no_grad():
        alone, beside = router(x[:3]), router(x)[:3]
    of_the_batch = training and norm == "batch"
    assert torch.allclose(alone, beside, atol=1e-5) != of_the_batch
    assert any(not torch.equal(before[name], value) for name, value in router.state_dict().items()) == of_the_batch


@pytest.mark.parametrize("dispatch", ["group", "mask"])
def test_attack_goes_through_and_leaves_no_gradients(dispatch):
    moe, x = network(dispatch=dispatch).train(), images()
    targets = moe.through(x, 0).argmax(1)
    adversarial = PGD(eps=0.2, steps=3)(moe, x, targets)
    assert (adversarial - x).abs().max() <= 0.2 + 1e-6
    with eval_mode(moe), torch.no_grad():
        before, after = (F.cross_entropy(moe(each), targets) for each in (x, adversarial))
    assert after > before
    assert all(parameter.grad is None and parameter.requires_grad for parameter in moe.parameters())


# -- cost --------------------------------------------------------------------------------------------------------------
def test_router_leaves_what_the_experts_save():
    """The count against a sum over layers by hand; half the width, a quarter of the inner layers."""
    dense, moe = resnet18_small(1), moe_resnet18(1)
    wide, thin = (count_multiply_adds(each, (1, 28, 28)) for each in (dense, moe))
    pixels = {1: 28 * 28, 2: 14 * 14, 3: 7 * 7, 4: 4 * 4}

    def by_hand(width):
        total = 9 * width * pixels[1] + 8 * width * 10
        for stage in range(1, 5):
            channels = width * 2 ** (stage - 1)
            before = channels if stage == 1 else channels // 2
            total += pixels[stage] * 9 * channels * (before + 3 * channels)
            total += pixels[stage] * channels * before if stage > 1 else 0
        return total

    assert wide == by_hand(64)
    assert thin == by_hand(32) + count_multiply_adds(moe.router, (1, 28, 28))
    assert thin < 0.5 * wide


def test_small_network_of_experts_costs_half_the_dense_one():
    dense, thin = SmallCNN(widths=(32,) * 4), SmallCNN(widths=(16,) * 4)
    moe = moe_small_cnn()
    wide, narrow, router, routed = (count_multiply_adds(each, (1, 28, 28)) for each in (dense, thin, moe.router, moe))
    assert routed == narrow + router
    assert routed < 0.5 * wide


def test_cost_of_a_routed_layer_is_ratio_squared_inside_and_ratio_at_the_edge():
    dense = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    moe = convert_to_moe(
        dense, num_experts=2, ratio=0.5, skip=(), router=nn.Sequential(nn.Flatten(), nn.Linear(400, 2))
    )
    edge, inside = 8 * 8 * 9 * 4 * 8, 6 * 6 * 9 * 8 * 8
    assert count_multiply_adds(dense, (4, 10, 10)) == edge + inside
    assert count_multiply_adds(moe, (4, 10, 10)) == edge // 2 + inside // 4 + 800
    with moe.dispatching("mask"):
        assert count_multiply_adds(moe, (4, 10, 10)) == edge + inside // 2 + 800


@pytest.mark.parametrize("training", [False, True])
def test_multiply_adds_of_a_batch_do_not_grow_with_the_number_of_experts(training):
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for experts in (1, 4):
        moe = convert_to_moe(SmallCNN(widths=(8, 8)), experts, router=ByBrightness((0.2, 0.4, 0.6)[: experts - 1]))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            moe.train(training)(images())
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


# -- bad input ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (SmallCNN(), {"num_experts": 0}, "`num_experts` to be a positive integer, but got 0"),
        (SmallCNN(), {"ratio": 0.0}, "`ratio` to be in .0, 1., but got 0.0"),
        (SmallCNN(), {"ratio": 1.5}, "`ratio` to be in .0, 1., but got 1.5"),
        (SmallCNN(widths=(5, 5)), {"ratio": 0.5}, "layer 'features.0' to be an integer of at least 1, but got 0.5 . 5"),
        (SmallCNN(), {"skip": ("*",)}, "`skip` to leave a convolution to be routed"),
        (SmallCNN(), {"dispatch": "sparse"}, "`dispatch` to be 'group' or 'mask', but got 'sparse'"),
        (nn.Linear(2, 2), {}, "`model` to have convolutions, but Linear has none"),
        (nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=2)), {}, "layer '1' to be a plain Conv2d"),
        (nn.Sequential(nn.Conv2d(2, 4, 3), nn.PReLU(4)), {}, "Cannot make layer '1' .PReLU. thinner"),
    ],
)
def test_bad_conversions(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        convert_to_moe(model, **arguments)


def test_bad_networks_and_inputs():
    moe = network()
    with pytest.raises(ValueError, match=r"`expert` to be in \[0, 2\), but got 2"):
        moe.through(images(), 2)
    with pytest.raises(ValueError, match=r"shape \(N, 1, H, W\).*but got \(2, 3, 8, 8\)"):
        convert_to_moe(SmallCNN())(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"scores of shape \(9, 2\), one an expert, but got \(9, 3\)"):
        convert_to_moe(SmallCNN(), router=Router(3, 1))(images())
    with pytest.raises(ValueError, match="to have layers of MoEConv2d"):
        MoENetwork(SmallCNN(), Router(2, 1), 2, RoutingContext())
    with pytest.raises(ValueError, match="layer '0' to have num_experts=2 and the context of the network"):
        MoENetwork(nn.Sequential(MoEConv2d(1, 1, 3)), Router(2, 1), 2, RoutingContext())
    with pytest.raises(ValueError, match="`out_channels` to be a positive integer, but got 0"):
        MoEConv2d(1, 0, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 0}, "`num_experts`"),
        ({"in_channels": 0}, "`in_channels`"),
        ({"stem_stride": 0}, "`stem_stride`"),
        ({"widths": (8, 16), "blocks": (1,)}, "equally many positive integers"),
        ({"widths": (8, 0), "blocks": (1, 1)}, "equally many positive integers"),
        ({"norm": "layer"}, "`norm` to be 'batch' or 'group', but got 'layer'"),
    ],
)
def test_bad_routers(arguments, message):
    with pytest.raises(ValueError, match=message):
        Router(**arguments)
