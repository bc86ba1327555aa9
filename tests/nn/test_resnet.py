import pytest
import torch
import torch.nn.functional as F

from lightning_trust.nn import ThinResNet, resnet18_small, resnet20


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("network", "parameters"),
    [
        # figures of the literature and of widely used CIFAR repositories: three channels, ten classes
        (resnet18_small(), 11_173_962),
        (resnet20(shortcut="A"), 269_722),
        (resnet20(shortcut="B"), 272_474),
        (ThinResNet(blocks=9), 853_018),
        (ThinResNet(blocks=18), 1_727_962),
    ],
    ids=["resnet18_small", "resnet20-A", "resnet20-B", "resnet56", "resnet110"],
)
def test_number_of_parameters(network, parameters):
    assert count(network) == parameters


@pytest.mark.parametrize("build", [resnet18_small, resnet20, lambda **sizes: resnet20(shortcut="B", **sizes)])
@pytest.mark.parametrize("pixels", [8, 28, 32])
def test_logits(build, pixels):
    network = build(in_channels=1, num_classes=7)
    assert network(torch.rand(2, 1, pixels, pixels)).shape == (2, 7)


def test_resnet18_small_keeps_the_resolution_up_to_its_second_stage():
    network = resnet18_small(in_channels=1)
    sizes = []
    for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
        stage.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[1:])))
    network(torch.rand(1, 1, 28, 28))
    assert sizes == [(64, 28, 28), (128, 14, 14), (256, 7, 7), (512, 4, 4)]


def test_resnet18_small_has_the_names_of_torchvision():
    import torchvision

    names = set(torchvision.models.resnet18().state_dict())
    assert set(resnet18_small().state_dict()) == names


def test_shortcut_a_takes_every_second_pixel_and_fills_with_zeros():
    block = resnet20().layer2[0].eval()
    x = torch.rand(2, 16, 6, 6)
    with torch.no_grad():
        branch = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
        joined = torch.zeros_like(branch)
        joined[:, :16] = x[:, :, ::2, ::2]
        torch.testing.assert_close(block(x), (branch + joined).clamp(min=0))


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_resnet20_has_twenty_weight_layers_beside_the_shortcuts(shortcut):
    network = resnet20(shortcut=shortcut)
    layers = [
        name
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear) and "downsample" not in name
    ]
    assert len(layers) == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shortcut": "C"}, "Expected argument `shortcut` to be 'A' or 'B', but got 'C'."),
        ({"in_channels": 0}, "Expected argument `in_channels` to be a positive integer, but got 0."),
        ({"blocks": 0}, "Expected argument `blocks` to be a positive integer, but got 0."),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ThinResNet(**arguments)


def test_resnet18_small_bad_arguments():
    with pytest.raises(ValueError, match="Expected argument `num_classes` to be a positive integer, but got -1."):
        resnet18_small(num_classes=-1)
