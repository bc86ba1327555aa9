import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_trust.nn import SmallCNN, ThinResNet, create_network


class NotSized(nn.Module):
    """A network whose constructor knows of no sizes."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 2)


def takes_any(**arguments):
    network = nn.Identity()
    network.arguments = arguments
    return network


def not_a_module(num_classes):
    return num_classes


@pytest.mark.parametrize(
    ("name", "arguments", "pixels"),
    [
        ("SmallCNN", {"widths": (4,)}, 8),
        ("moe_small_cnn", {"widths": (4, 4)}, 8),
        ("resnet20", {"shortcut": "B"}, 8),
        ("resnet18_small", {}, 8),
        ("test_resnet", {}, 32),  # timm's own tiny network for tests
        ("shufflenet_v2_x0_5", {}, 32),  # torchvision only
        ("torchvision.models.shufflenet_v2_x0_5", {}, 32),
    ],
)
@pytest.mark.parametrize("in_channels", [1, 3])
def test_every_source_gives_a_classifier_of_the_sizes_asked_for(name, arguments, pixels, in_channels):
    network = create_network(name, in_channels, 5, **arguments).eval()
    with torch.no_grad():
        assert network(torch.rand(2, in_channels, pixels, pixels)).shape == (2, 5)


def test_sources_are_asked_in_the_documented_order():
    assert type(create_network("SmallCNN")) is SmallCNN
    assert type(create_network("resnet20")) is ThinResNet
    assert type(create_network("resnet18")).__module__ == "timm.models.resnet"
    assert type(create_network("torchvision.models.resnet18")).__module__ == "torchvision.models.resnet"
    assert type(create_network("shufflenet_v2_x0_5")).__module__ == "torchvision.models.shufflenetv2"


def test_replaced_stem_of_a_torchvision_network_differs_in_its_channels_only():
    one, three = (create_network("shufflenet_v2_x0_5", channels).state_dict() for channels in (1, 3))
    differ = {name for name in three if one[name].shape != three[name].shape}
    assert list(one) == list(three)
    assert differ == {"conv1.0.weight"}
    assert one["conv1.0.weight"].shape == (24, 1, 3, 3)


def test_import_path_gets_the_sizes_that_it_names():
    path = f"{__name__}.NotSized"
    assert create_network(path, 1, 5).layer.in_features == 3
    assert create_network(path, 1, 5, width=4).layer.in_features == 4
    assert create_network(f"{__name__}.takes_any", 1, 5).arguments == {"in_channels": 1, "num_classes": 5}


@pytest.mark.parametrize(
    ("name", "close"),
    [("SmalCNN", "SmallCNN"), ("resnet19", "resnet18"), ("shufflenet_v2_x0_6", "shufflenet_v2_x0_5")],
)
def test_unknown_name_lists_close_ones(name, close):
    with pytest.raises(ValueError, match=f"but got '{name}'. Did you mean one of .*'{close}'"):
        create_network(name)


def test_unknown_name_without_a_close_one():
    with pytest.raises(ValueError, match=r"or the import path of one, but got '\?\?\?'\.$"):
        create_network("???")


@pytest.mark.parametrize("path", ["no_such_package.Net", "lightning_trust.nn.NoSuchNet", ".relative"])
def test_path_that_cannot_be_imported(path):
    with pytest.raises(ValueError, match=f"but got '{path}', which cannot be imported"):
        create_network(path)


def test_path_that_builds_no_module():
    with pytest.raises(ValueError, match=r"to build a torch.nn.Module, but got int\."):
        create_network(f"{__name__}.not_a_module")


def test_pretrained_torchvision_weights_with_other_channels_are_refused():
    with pytest.raises(MisconfigurationException, match="are for three channels, but got in_channels=1"):
        create_network("shufflenet_v2_x0_5", in_channels=1, weights="DEFAULT")


def test_bad_sizes():
    with pytest.raises(ValueError, match="Expected argument `in_channels` to be a positive integer, but got 0."):
        create_network("test_resnet", in_channels=0)
