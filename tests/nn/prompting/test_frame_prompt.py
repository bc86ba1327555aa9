import math

import pytest
import torch
from torch import nn

from lightning_trust.nn import (
    FramePrompt,
    FullyMapping,
    LabelMapping,
    LearnableScale,
    VisualPrompt,
    load_prompt,
    save_prompt,
)


def smooth(size, dtype=torch.float64):
    """An image that falls to nought at its rim."""
    points = torch.linspace(0.0, math.pi, size + 2, dtype=dtype)[1:-1]
    return (points.sin()[:, None] * (2.0 * points).sin()[None] ** 2)[None, None]


@pytest.mark.parametrize(("image", "canvas"), [(8, 16), (7, 16), (9, 12), (12, 12)])
def test_at_scale_one_the_image_is_padded_and_nothing_else(image, canvas):
    x = torch.rand(2, 1, image, image)
    found, side = LearnableScale(image, canvas, channels=1)(x)
    before = (canvas - image + 1) // 2
    expected = torch.zeros(2, 1, canvas, canvas)
    expected[:, :, before : before + image, before : before + image] = x
    assert side == image
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("at", [0.6137, 0.9731, 1.2741])
def test_the_gradient_of_the_scale(at):
    weights = torch.rand(1, 1, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scale = LearnableScale(16, 24, channels=1, init=at).double()

    def loss(value):
        scale.scale.data.fill_(value)
        return (scale(smooth(16))[0] * weights).sum()

    loss(at).backward()
    # between two pixels the image is a straight line: a step within one of them
    step = 1e-7
    expected = (loss(at + step) - loss(at - step)) / (2.0 * step)
    assert float(scale.scale.grad) == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize(("at", "side"), [(0.5, 8), (0.7, 11), (1.0, 16), (2.0, 24)])
def test_the_occupied_square(trainable, at, side):
    scale = LearnableScale(16, 24, channels=3, init=at, trainable=trainable)
    canvas, found = scale(torch.ones(1, 1, 16, 16))
    assert found == side
    assert canvas.shape == (1, 3, 24, 24)
    if not trainable:
        assert int((canvas > 0).sum()) == 3 * side**2


def test_frame_and_square_share_the_canvas_and_the_prompt_gets_no_gradient_inside():
    prompt = FramePrompt(LearnableScale(8, 12, channels=2, init=0.5))
    out = prompt(torch.rand(3, 2, 8, 8))
    out.square().sum().backward()
    mask = prompt.frame(4)
    assert int(mask.sum()) == 144 - 16
    assert torch.equal(prompt.delta.grad != 0, (mask > 0).expand(2, -1, -1))


def test_the_scale_is_kept_within_its_bounds():
    scale = LearnableScale(8, 12, channels=1, bounds=(0.5, 2.0))
    scale.scale.data.fill_(7.0)
    scale(torch.rand(1, 1, 8, 8))
    assert float(scale.scale) == 2.0


def test_an_identity_is_the_first_classes():
    logits = torch.randn(5, 12)
    assert torch.equal(FullyMapping(12, 4, init="identity")(logits), logits[:, :4])


def test_weights_of_one_over_m_are_a_mapping_of_m_sources():
    indices = [[3, 1], [0, 5], [2, 4]]
    mapped, full = LabelMapping(6, 3, "fixed", sources_per_target=2, indices=indices), FullyMapping(6, 3)
    with torch.no_grad():
        full.linear.weight.zero_()
        full.linear.bias.zero_()
        for target, some in enumerate(indices):
            full.linear.weight[target, some] = 0.5
    logits = torch.randn(4, 6)
    torch.testing.assert_close(full(logits), mapped(logits), rtol=0.0, atol=1e-6)


def test_a_framed_prompt_is_saved_with_its_scale(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(144, 6))
    part = VisualPrompt(FramePrompt(LearnableScale(8, 12, channels=1, init=0.75), init="randn"), FullyMapping(6, 3))
    part.prompt.scale.scale.data.fill_(0.8)
    save_prompt(tmp_path, part, network)
    x = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(load_prompt(tmp_path, network)(x), part.after(network(part.before(x))))


def test_groups_of_an_optimizer():
    part = VisualPrompt(FramePrompt(LearnableScale(8, 12, channels=1)), FullyMapping(6, 3))
    pattern, others = part.parameter_groups(1e-3)
    assert [id(each) for each in pattern["params"]] == [id(part.prompt.delta)]
    assert len(others["params"]) == 3
    assert others["lr"] == 1e-3
    assert len(part.parameter_groups()) == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: LearnableScale(8, 12, init=6.0), r"`init` to be within bounds=\(0.1, 5.0\).*, but got 6.0"),
        (lambda: LearnableScale(8, 12, init=0.5, bounds=(0.0, 1.0)), "above zero"),
        (lambda: LearnableScale(13, 12), r"`image_size` to be in 1, \.\.\., out_size=12, but got 13"),
        (lambda: LearnableScale(8, 12)(torch.zeros(1, 2, 8, 8)), "images of 3 channels, or of one, but got 2"),
        (lambda: LearnableScale(8, 12)(torch.zeros(1, 3, 9, 9)), r"shape \(B, C, 8, 8\), but got \(1, 3, 9, 9\)"),
        (lambda: FramePrompt(LearnableScale(8, 12), squash="tanh"), "'sigmoid' or 'none', but got 'tanh'"),
        (lambda: FullyMapping(3, 4, "identity"), "num_source=3 and num_target=4"),
        (lambda: FullyMapping(4, 3, "zero"), "'default' or 'identity', but got 'zero'"),
        (lambda: FullyMapping(4, 3)(torch.zeros(1, 5)), r"\(B, num_source=4\), but got \(1, 5\)"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
