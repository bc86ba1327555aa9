"""Triggers against slices written out, their gradients, limits and bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_trust.nn import BorderTrigger, ConcatTrigger, PatchTrigger, VisualPrompt, load_prompt, save_prompt


def images(size=12, channels=3, rows=2):
    return torch.rand(rows, channels, size, size, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize(("size", "border"), [(12, 3), (28, 2), (9, 4)])
def test_border_frames_the_resized_image(size, border):
    trigger = BorderTrigger(size, border)
    given = images(17)
    found = trigger(given)
    inner = size - 2 * border
    resized = F.interpolate(given, (inner, inner), mode="bilinear", antialias=True)
    assert torch.equal(found[..., border:-border, border:-border], resized)
    assert int(trigger.where.sum()) == size**2 - inner**2
    assert trigger.weight.shape == (3, size**2 - inner**2)
    # row by row, the frame is the weights in the order of reading
    frame = torch.ones(size, size, dtype=torch.bool)
    frame[border:-border, border:-border] = False
    for image in found:
        torch.testing.assert_close(image[:, frame], trigger.weight.tanh())
    assert trigger.weight.abs().max() <= 1.0
    assert trigger.weight.std().item() == pytest.approx(3**-0.5, abs=0.1)


def test_no_gradient_reaches_the_inside():
    trigger = BorderTrigger(10, 2)
    pattern = trigger.pattern
    assert int((pattern != 0).sum()) == 3 * (100 - 36)
    trigger(images(10))[..., 2:-2, 2:-2].square().sum().backward()
    assert trigger.weight.grad.abs().sum() == 0.0


def test_border_of_no_width_changes_nothing():
    trigger = BorderTrigger(12, 0)
    assert torch.equal(trigger(images()), images())
    assert trigger.weight.numel() == 0


@pytest.mark.parametrize(
    ("corner", "rows", "columns"),
    [
        ("tl", range(4), range(4)),
        ("tr", range(4), range(8, 12)),
        ("bl", range(8, 12), range(4)),
        ("br", range(8, 12), range(8, 12)),
    ],
)
def test_patch_touches_its_corner_only(corner, rows, columns):
    trigger = PatchTrigger(12, 4, corner)
    found = trigger(images())
    touched = (found != images()).any(dim=0).any(dim=0)
    assert touched.nonzero().tolist() == [[row, column] for row in rows for column in columns]
    inside = found[:, :, rows.start : rows.stop, columns.start : columns.stop]
    torch.testing.assert_close(inside, trigger.weight.tanh().view(1, 3, 4, 4).expand(2, -1, -1, -1))
    assert sum(parameter.numel() for parameter in trigger.parameters()) == 3 * 16


def test_state_holds_the_learned_pixels_only():
    for trigger in (BorderTrigger(12, 2), PatchTrigger(12, 2)):
        assert list(trigger.state_dict()) == ["weight"]
        twin = type(trigger)(12, 2)
        twin.load_state_dict(trigger.state_dict())
        assert torch.equal(twin(images()), trigger(images()))


@pytest.mark.parametrize("mask", [True, False])
def test_table_is_weighed_and_shifted(mask):
    trigger = ConcatTrigger(3, mask)
    rows = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]])
    assert torch.equal(trigger(rows), rows)
    trigger.offset.data = torch.tensor([0.0, 1.0, 2.0])
    if mask:
        trigger.mask.data = torch.tensor([2.0, 0.0, 1.0])
    scale = torch.tensor([2.0, 0.0, 1.0]) if mask else torch.ones(3)
    assert torch.equal(trigger(rows), rows * scale + torch.tensor([0.0, 1.0, 2.0]))
    assert sum(parameter.numel() for parameter in trigger.parameters()) == (6 if mask else 3)


@pytest.mark.parametrize(
    ("trigger", "network", "inputs"),
    [
        (BorderTrigger(12, 3), nn.Sequential(nn.Flatten(), nn.Linear(432, 2)), images(20)),
        (PatchTrigger(12, 4, "br"), nn.Sequential(nn.Flatten(), nn.Linear(432, 2)), images()),
        (ConcatTrigger(3), nn.Linear(3, 2), torch.ones(2, 3)),
    ],
    ids=lambda each: type(each).__name__,
)
def test_goes_into_two_small_files(tmp_path, trigger, network, inputs):
    for parameter in trigger.parameters():
        parameter.data += 0.3
    save_prompt(tmp_path, VisualPrompt(trigger), network)
    loaded = load_prompt(tmp_path, network)
    assert torch.equal(loaded(inputs), network(trigger(inputs)))
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 1.1 * trigger.num_bytes + 4096


def test_bad_input():
    with pytest.raises(ValueError, match=r"`border` .* less than half of `image_size` \(12\), but got 6"):
        BorderTrigger(12, 6)
    with pytest.raises(ValueError, match="`border` to be at least 0 .* got -1"):
        BorderTrigger(12, -1)
    with pytest.raises(ValueError, match=r"`patch` .* half of `image_size` \(12\), but got 6"):
        PatchTrigger(12, 6)
    with pytest.raises(ValueError, match="`corner` to be 'tl', .* but got 'top'"):
        PatchTrigger(12, 2, "top")
    with pytest.raises(ValueError, match="`channels` to be a positive integer, but got 0"):
        PatchTrigger(12, 2, channels=0)
    with pytest.raises(ValueError, match=r"images of shape \(N, 1, H, W\), but got \(2, 3, 12, 12\)"):
        BorderTrigger(12, 2, channels=1)(images())
    with pytest.raises(ValueError, match="12 by 12 pixels, .* but got 9 by 9"):
        PatchTrigger(12, 2)(images(9))
    with pytest.raises(ValueError, match="`num_features` to be a positive integer, but got 0"):
        ConcatTrigger(0)
    with pytest.raises(ValueError, match=r"shape \(N, 3\), .* but got \(2, 4\)"):
        ConcatTrigger(3)(torch.zeros(2, 4))
