import pytest
import torch
from torch import nn

from lightning_trust.core.wrapping import checksum
from lightning_trust.nn import (
    AdditivePrompt,
    LabelMapping,
    PadPrompt,
    PatchPrompt,
    VisualPrompt,
    WatermarkPrompt,
    load_prompt,
    save_prompt,
)


def images(size, channels=1):
    return torch.rand(3, channels, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", range(1, 12))
def test_the_image_lies_untouched_in_the_middle_of_the_canvas(size):
    prompt, x = PadPrompt(size, 11, channels=1, init="randn"), images(size)
    out = prompt(x)
    before = (11 - size + 1) // 2
    inside = (slice(None), slice(None), slice(before, before + size), slice(before, before + size))
    assert out.shape == (3, 1, 11, 11)
    assert torch.equal(out[inside], x)
    frame = torch.ones(1, 11, 11, dtype=torch.bool)
    frame[inside[1:]] = False
    assert torch.equal(out[:, frame], prompt.delta.sigmoid()[frame].expand(3, -1))
    assert prompt.num_bytes == 4 * (121 - size**2)
    out.square().sum().backward()
    assert torch.equal(prompt.delta.grad != 0, frame)


def test_an_image_as_large_as_the_canvas_has_no_frame():
    x = images(5)
    assert torch.equal(PadPrompt(5, 5, channels=1)(x), x)


def test_normalisation_comes_after_the_prompt():
    x = images(4, channels=2)
    plain = PadPrompt(4, 6, channels=2)(x)
    out = PadPrompt(4, 6, channels=2, mean=(0.5, 0.25), std=(0.5, 2.0))(x)
    torch.testing.assert_close(out[:, 0], (plain[:, 0] - 0.5) / 0.5)
    torch.testing.assert_close(out[:, 1], (plain[:, 1] - 0.25) / 2.0)


@pytest.mark.parametrize("corner", ["tl", "tr", "bl", "br"])
def test_a_patch_touches_its_corner_and_nothing_else(corner):
    prompt, x = PatchPrompt(size=7, patch=3, corner=corner, channels=1, init="randn"), images(7)
    changed = (prompt(x) != x).all(dim=0)[0]
    rows = slice(0, 3) if corner[0] == "t" else slice(4, 7)
    columns = slice(0, 3) if corner[1] == "l" else slice(4, 7)
    expected = torch.zeros(7, 7, dtype=torch.bool)
    expected[rows, columns] = True
    assert torch.equal(changed, expected)


def test_a_watermark_is_added_on_the_rim_and_the_batch_is_left_as_it_was():
    prompt, x = WatermarkPrompt(size=6, pad=2, channels=1, init="randn"), images(6)
    kept = x.clone()
    out = prompt(x)
    assert torch.equal(x, kept)
    assert torch.equal((out != x).all(dim=0)[0].sum(), torch.tensor(36 - 4))
    torch.testing.assert_close((out - x)[0] * prompt.mask, prompt.delta * prompt.mask)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: PadPrompt(225), r"`image_size` to be in 1, \.\.\., out_size=224, but got 225"),
        (lambda: WatermarkPrompt(60, 30), "2 \\* pad below size=60, but got pad=30"),
        (lambda: PatchPrompt(8, 9), r"`patch` to be in 1, \.\.\., size=8, but got 9"),
        (lambda: PatchPrompt(8, 2, "top"), "`corner` to be 'tl', 'tr', 'bl' or 'br', but got 'top'"),
        (lambda: PadPrompt(4, 8, init="ones"), "`init` to be 'zero' or 'randn', but got 'ones'"),
        (lambda: PadPrompt(4, 8, mean=(0.5,)), r"`mean` to have 3 values, one a channel, but got \[0.5\]"),
        (lambda: PadPrompt(4, 8)(images(4)), r"shape \(B, 3, 4, 4\) for this PadPrompt, but got \(3, 1, 4, 4\)"),
        (lambda: LabelMapping(3, 2, "fixed"), "`indices` with method='fixed'"),
        (lambda: LabelMapping(3, 2, "fixed", indices=[1, 1]), r"2 different source classes, but got \[1, 1\]"),
        (lambda: LabelMapping(3, 2, "fixed", indices=[1, 3]), r"classes in \[0, 3\), but got \[1, 3\]"),
        (lambda: LabelMapping(3, 2, "best"), "`method` to be one of .*, but got 'best'"),
        (lambda: LabelMapping(3, 4), "at least sources_per_target"),
        (lambda: LabelMapping(3, 2)(torch.zeros(1, 4)), r"\(B, num_source=3\), but got \(1, 4\)"),
        (lambda: LabelMapping(3, 2).fit_counts(torch.ones(2, 3)), r"\(3, 2\), but got \(2, 3\)"),
        (lambda: LabelMapping(3, 2).explain(["a"], ["b", "c"]), "`source_names` to hold 3 names, but got 1"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# -- mappings ----------------------------------------------------------------------------------------------------------
def test_several_sources_are_averaged():
    mapping = LabelMapping(6, 2, "fixed", sources_per_target=2, indices=[[5, 0], [1, 2]])
    logits = torch.randn(4, 6)
    expected = torch.stack([(logits[:, 5] + logits[:, 0]) / 2, (logits[:, 1] + logits[:, 2]) / 2], dim=1)
    torch.testing.assert_close(mapping(logits), expected)


def test_a_random_mapping_depends_on_its_seed_alone():
    first, second, other = (LabelMapping(50, 10, "random", seed=seed).indices for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert len(first.unique()) == 10


def test_counts_change_a_mapping_and_say_how_much():
    mapping = LabelMapping(3, 2, "iterative")
    assert not mapping.fitted
    assert mapping.fit_counts(torch.tensor([[5, 0], [0, 0], [0, 4]])) == 0.5
    assert mapping.indices.tolist() == [[0], [2]]
    assert mapping.fit_counts(torch.tensor([[5, 0], [0, 0], [0, 4]])) == 0.0
    assert mapping.fitted


# -- files -------------------------------------------------------------------------------------------------------------
def trained():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12))
    part = VisualPrompt(PadPrompt(4, 8, channels=1, init="randn"), LabelMapping(12, 3, "iterative"))
    part.mapping.fit_counts(torch.randint(9, (12, 3)))
    return network, part


def test_a_saved_prompt_computes_the_same(tmp_path):
    network, part = trained()
    expected = part.after(network.eval()(part.before(images(4))))
    before = checksum(network)
    save_prompt(tmp_path / "prompt", part, network, class_names=["a", "b", "c"], source_names=[*"ABCDEFGHIJKL"])
    loaded = load_prompt(tmp_path / "prompt", network)
    assert torch.equal(loaded(images(4)), expected)
    assert checksum(network) == before
    meaning = {
        name: ["ABCDEFGHIJKL"[place] for place in some]
        for name, some in zip("abc", part.mapping.indices.tolist(), strict=True)
    }
    assert loaded.card["meaning"] == meaning


def test_files_are_hardly_larger_than_the_prompt(tmp_path):
    network = nn.Linear(2, 1000)
    part = VisualPrompt(PadPrompt(128, 224), LabelMapping(1000, 10, "identity"))
    save_prompt(tmp_path, part, network, class_names=[str(each) for each in range(10)])
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert part.prompt.num_bytes == 4 * 101_376
    assert size <= 1.1 * part.prompt.num_bytes + 4096


def test_a_prompt_for_other_weights_is_refused(tmp_path):
    network, part = trained()
    save_prompt(tmp_path, part, network)
    network[1].weight.data[0, 0] += 1e-3
    with pytest.raises(ValueError, match="to be the Sequential .* trained for, with weights"):
        load_prompt(tmp_path, network)


def test_a_prompt_that_does_not_tell_its_arguments_is_refused(tmp_path):
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    with pytest.raises(MisconfigurationException, match="how the prompt is built, but ZeroPad2d does not tell"):
        save_prompt(tmp_path, VisualPrompt(nn.ZeroPad2d(1)), nn.Linear(2, 2))


def test_an_additive_prompt_takes_any_shape(tmp_path):
    network = nn.Linear(4, 3)
    part = VisualPrompt(AdditivePrompt((4,), init="randn"))
    save_prompt(tmp_path, part, network)
    x = torch.randn(2, 4)
    assert torch.equal(load_prompt(tmp_path, network)(x), network(x + part.prompt.delta))
