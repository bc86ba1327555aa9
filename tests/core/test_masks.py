"""Masks against torch.topk, a stable sort, torch's own pruning, and RigL's formula."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lightning_trust.core.masks import (
    ParameterMask,
    WeightHolding,
    WeightZeroing,
    check_sparsity,
    erk_densities,
    select_parameters,
)


def special_scores() -> dict[str, torch.Tensor]:
    """Ties over tensors, negatives, both zeros, denormals, extremes."""
    smallest, largest = torch.finfo(torch.float32).smallest_normal, torch.finfo(torch.float32).max
    return {
        "a": torch.tensor([[1.0, -1.0, 0.0, -0.0], [1.0, 3e-45, -3e-45, 1e-40]]),
        "b": torch.tensor([smallest, -smallest, largest, -largest, 1.0, 1.0000001, 0.0]),
        "c": torch.tensor(-1.0),
        "d": torch.full((2, 2, 2), 0.5),
        "e": torch.empty(0, 3),
    }


def tied_scores() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randint(-3, 3, (7, 5), generator=generator).float(),
        "b": torch.randint(-3, 3, (11,), generator=generator).float(),
    }


def random_scores() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"a": torch.randn(40, 30, generator=generator), "b": torch.randn(3, 4, 5, generator=generator) * 1e-3}


SCORES = {"special": special_scores, "tied": tied_scores, "random": random_scores}


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def by_stable_sort(scores: dict[str, torch.Tensor], keep: int) -> torch.Tensor:
    # Python's sort is stable and takes 0.0 and -0.0 for equal: of equal scores the first stays first
    values = [float(value) for value in flat(scores)]
    order = sorted(range(len(values)), key=lambda place: -values[place])
    expected = torch.zeros(len(values), dtype=torch.bool)
    expected[order[:keep]] = True
    return expected


@pytest.mark.parametrize("kind", SCORES)
def test_from_scores_equals_a_stable_sort_and_topk_and_is_nested(kind):
    scores = SCORES[kind]()
    values = flat(scores)
    before = torch.zeros(len(values), dtype=torch.bool)
    for keep in range(len(values) + 1) if len(values) < 100 else (0, 1, 7, 630, len(values) - 1, len(values)):
        mask = ParameterMask.from_scores(scores, keep)
        found = flat(dict(mask))
        assert mask.kept == keep
        assert torch.equal(found, by_stable_sort(scores, keep))
        # torch.topk breaks ties as it likes, but its values are these
        assert torch.equal(values[found].sort().values, torch.topk(values, keep).values.sort().values)
        assert not (before & ~found).any()
        before = found
    assert all(mask[name].shape == score.shape for name, score in scores.items())


@pytest.mark.parametrize(
    "convert", [torch.Tensor.double, torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.long, torch.Tensor.bool]
)
def test_scores_of_every_type(convert):
    scores = {name: convert(score) for name, score in tied_scores().items()}
    expected = by_stable_sort({name: score.float() for name, score in scores.items()}, 20)
    assert torch.equal(flat(dict(ParameterMask.from_scores(scores, 20))), expected)


def test_scores_of_every_layout():
    score = tied_scores()["a"].repeat(4, 2).view(2, 7, 5, 4)
    for other in (score.to(memory_format=torch.channels_last), score.transpose(0, 3).contiguous().transpose(0, 3)):
        mask = ParameterMask.from_scores({"a": other}, 33)
        assert torch.equal(mask["a"], ParameterMask.from_scores({"a": score}, 33)["a"])


def test_more_scores_than_one_chunk():
    generator = torch.Generator().manual_seed(1)
    score = torch.randn((1 << 20) + 17, generator=generator)
    mask = ParameterMask.from_scores({"a": score, "b": score[:5]}, 300_000)
    assert mask.kept == 300_000
    threshold = torch.topk(torch.cat([score, score[:5]]), 300_000).values[-1]
    assert torch.equal(mask["a"], score >= threshold)


@pytest.mark.parametrize("keep", [-1, 47])
def test_keep_outside(keep):
    with pytest.raises(ValueError, match=rf"Expected argument `keep` to lie in \[0, 46\], but got {keep}\."):
        ParameterMask.from_scores(tied_scores(), keep)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scores_must_be_finite(value):
    scores = tied_scores()
    scores["b"][3] = value
    with pytest.raises(ValueError, match="Expected the scores of 'b' to be finite"):
        ParameterMask.from_scores(scores, 3)


# -- sparsity ----------------------------------------------------------------------------------------------------------
def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 9), nn.Linear(9, 3))


def magnitudes(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().abs() for name, weight in select_parameters(net, ["Conv2d", "Linear"]).items()}


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.73, 0.9, 0.999])
def test_global_sparsity_equals_torch(sparsity):
    net = network()
    mask = ParameterMask.with_sparsity(magnitudes(net), sparsity)
    layers = [net[0], net[3], net[4]]
    prune.global_unstructured([(layer, "weight") for layer in layers], prune.L1Unstructured, amount=sparsity)
    for name, layer in zip(("0", "3", "4"), layers, strict=True):
        expected = layer.weight_mask.bool() if hasattr(layer, "weight_mask") else torch.ones_like(layer.weight).bool()
        assert torch.equal(mask[f"{name}.weight"], expected)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.73, 0.9])
def test_layer_sparsity_equals_torch(sparsity):
    net = network()
    mask = ParameterMask.with_sparsity(magnitudes(net), sparsity, "layer")
    for name in ("0", "3", "4"):
        layer = net[int(name)]
        prune.l1_unstructured(layer, "weight", amount=sparsity)
        assert torch.equal(mask[f"{name}.weight"], layer.weight_mask.bool())


def rigl_densities(shapes: dict[str, tuple[int, ...]], density: float) -> dict[str, float]:
    """Transcribed from Evci et al., Rigging the Lottery (sparse_utils.get_mask_random_or_erk)."""
    dense: set[str] = set()
    while True:
        divisor, right, raw = 0.0, 0.0, {}
        for name, shape in shapes.items():
            count = np.prod(shape)
            if name in dense:
                right -= count * (1 - density)
            else:
                right += count * density
                raw[name] = np.sum(shape) / np.prod(shape)
                divisor += raw[name] * count
        epsilon = right / divisor
        largest = max(raw.values())
        if largest * epsilon <= 1:
            return {name: 1.0 if name in dense else epsilon * raw[name] for name in shapes}
        dense |= {name for name, value in raw.items() if value == largest}


RESNET_LIKE = {"stem": (16, 3, 3, 3), "a": (16, 16, 3, 3), "b": (32, 16, 3, 3), "down": (32, 16, 1, 1), "fc": (10, 32)}


@pytest.mark.parametrize("density", [0.01, 0.1, 0.2, 0.5, 0.8, 0.95])
def test_erk_equals_the_paper(density):
    found = erk_densities(RESNET_LIKE, density)
    expected = rigl_densities(RESNET_LIKE, density)
    assert found == pytest.approx(expected, rel=1e-9)
    sizes = {name: np.prod(shape) for name, shape in RESNET_LIKE.items()}
    total = sum(sizes.values())
    assert sum(found[name] * sizes[name] for name in sizes) == pytest.approx(density * total)
    scores = {name: torch.rand(shape) for name, shape in RESNET_LIKE.items()}
    mask = ParameterMask.with_sparsity(scores, 1.0 - density, "erk")
    assert abs(mask.kept - density * total) <= 0.5 * len(sizes)
    for name in sizes:
        assert int(mask[name].sum()) == sizes[name] - round((1.0 - expected[name]) * sizes[name])


def test_erk_of_a_dense_network():
    assert erk_densities(RESNET_LIKE, 1.0) == pytest.approx(dict.fromkeys(RESNET_LIKE, 1.0))
    assert ParameterMask.with_sparsity({"a": torch.rand(3, 3)}, 0.0, "erk").sparsity == 0.0


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_sparsity_outside(sparsity):
    words = re.escape(f"Expected argument `sparsity` to be a share of zeros in [0, 1), but got {sparsity}.")
    with pytest.raises(ValueError, match=words):
        check_sparsity(sparsity)
    with pytest.raises(ValueError, match=words):
        ParameterMask.with_sparsity({"a": torch.rand(3)}, sparsity)


def test_unknown_scope():
    with pytest.raises(ValueError, match="Expected argument `scope` to be 'global', 'layer' or 'erk', but got 'row'"):
        ParameterMask.with_sparsity({"a": torch.rand(3)}, 0.5, "row")


# -- sets, checks, files -----------------------------------------------------------------------------------------------
def masks() -> tuple[ParameterMask, ParameterMask]:
    first = ParameterMask({"a": torch.tensor([True, True, False, False]), "b": torch.tensor([[True, False]])})
    second = ParameterMask({"a": torch.tensor([True, False, True, False]), "c": torch.tensor(False)})
    return first, second


def test_union_intersection_and_counts():
    first, second = masks()
    assert {name: mask.tolist() for name, mask in first.union(second).items()} == {
        "a": [True, True, True, False],
        "b": [[True, False]],
        "c": False,
    }
    assert first.intersection(second)["a"].tolist() == [True, False, False, False]
    assert list(second.intersection(first)) == ["a", "c", "b"]
    assert (first.size, first.kept, first.density, first.sparsity, len(first)) == (6, 3, 0.5, 0.5, 2)
    assert "sparsity=0.5000" in repr(first)
    with pytest.raises(ValueError, match=r"Expected mask 'a' to be boolean, but got torch.float32\."):
        ParameterMask({"a": torch.ones(3)})


def test_check_names_what_does_not_match():
    net = network()
    good = ParameterMask.with_sparsity(magnitudes(net), 0.5)
    good.check(net)
    bad = ParameterMask({"0.weight": good["0.weight"], "3.wieght": good["3.weight"]})
    with pytest.raises(ValueError, match=r"1 unknown name\(s\): '3.wieght' \(close: '3.weight'"):
        bad.check(net)
    bad = ParameterMask({"4.weight": torch.ones(9, 3, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"Expected the saliency mask to have .* '4.weight': \(9, 3\) instead of"):
        bad.check(net, "saliency mask")


def large_mask() -> ParameterMask:
    mask = ParameterMask.with_sparsity(magnitudes(network()), 0.7)
    return ParameterMask({**mask, "scalar": torch.tensor(True), "empty": torch.empty(0, 2, dtype=torch.bool)})


def same(first: ParameterMask, second: ParameterMask) -> bool:
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def test_state_goes_through_a_checkpoint_at_an_eighth_of_a_byte(tmp_path):
    mask = large_mask()
    torch.save(mask.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert same(ParameterMask.from_state_dict(state), mask)
    assert state["3.weight"]["bits"].numel() == 288 // 8


def test_file_goes_out_and_in(tmp_path):
    mask = large_mask()
    assert mask.save(tmp_path / "deep" / "mask.safetensors").is_file()
    found = ParameterMask.load(tmp_path / "deep" / "mask.safetensors")
    assert {name: mask.tolist() for name, mask in found.items()} == {name: m.tolist() for name, m in mask.items()}


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    whole = large_mask().save(tmp_path / "mask.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in [*range(0, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut.safetensors to be a whole file .* truncated or damaged"):
            ParameterMask.load(path)


def test_a_damaged_file_is_refused_or_is_another_mask(tmp_path):
    mask = large_mask()
    whole = mask.save(tmp_path / "mask.safetensors").read_bytes()
    path = tmp_path / "damaged.safetensors"
    generator = np.random.default_rng(0)
    outcomes = {"refused": 0, "read": 0}
    # the header, and the shapes, which stand among the data
    for place in range(0, len(whole), 5):
        changed = bytearray(whole)
        changed[place] ^= int(generator.integers(1, 256))
        path.write_bytes(changed)
        try:
            ParameterMask.load(path)
            outcomes["read"] += 1
        except ValueError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 100
    assert outcomes["read"] > 10  # safetensors has no checksum: a flipped bit of a mask is a mask


def test_no_file_and_no_mask(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        ParameterMask.load(tmp_path / "none")
    (tmp_path / "text").write_text("no mask at all")
    with pytest.raises(ValueError, match="truncated or damaged"):
        ParameterMask.load(tmp_path / "text")


# -- selection ---------------------------------------------------------------------------------------------------------
class Tied(nn.Module):
    """Input and output embedding are one parameter, as in language models."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.body = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def test_selection_by_glob_and_by_layer():
    net = network()
    select = lambda *args: list(select_parameters(net, *args))  # noqa: E731
    assert select(["*"]) == [name for name, _ in net.named_parameters()]
    assert select(["*.weight"]) == ["0.weight", "1.weight", "3.weight", "4.weight"]
    assert select(["Conv2d", "Linear"]) == ["0.weight", "3.weight", "4.weight"]
    assert select(["Linear", "4.*"], ["4.weight"]) == ["3.weight", "4.bias"]
    assert select(["[03].weight"], ["Conv2d"]) == ["3.weight"]
    assert select_parameters(net, ["4.bias"])["4.bias"] is net[4].bias


def test_selection_of_a_compiled_network():
    net = network()
    net[3] = torch.compile(net[3], backend="eager")
    assert list(select_parameters(net, ["Linear"])) == ["3.weight", "4.weight"]
    assert list(select_parameters(net, ["3.*"])) == ["3.weight", "3.bias"]


def test_selection_of_tied_parameters():
    net = Tied()
    for pattern in ("Embedding", "embedding.weight", "head.weight", "head.*"):
        assert list(select_parameters(net, [pattern])) == ["embedding.weight"], pattern
    assert list(select_parameters(net, ["Linear"])) == ["embedding.weight", "body.weight"]
    assert list(select_parameters(net, ["Linear"], ["Embedding"])) == ["body.weight"]
    assert list(select_parameters(net, ["*.weight"], ["head.weight"])) == ["body.weight"]
    mask = ParameterMask.with_sparsity({"embedding.weight": net.head.weight.detach().abs()}, 0.4)
    WeightZeroing(mask, net).weights()
    assert int((net.head.weight == 0).sum()) == 6


@pytest.mark.parametrize(
    ("include", "exclude", "words"),
    [
        (["*.wieght"], [], "Expected argument `include` to match parameters of Sequential, but got '*.wieght', which"),
        (["0.wieght"], [], "Close names: '0.weight'"),
        (["Conv2D"], [], "Close names: 'Conv2d'"),
        (["*"], ["Linaer"], "Expected argument `exclude` to match parameters of Sequential, but got 'Linaer'"),
        (["Linear"], ["*"], "to leave a parameter of Sequential, but got ['Linear'] without ['*'], which leaves none"),
        ([], [], "which leaves none"),
    ],
)
def test_selection_of_nothing(include, exclude, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are compared below
        select_parameters(network(), include, exclude)
    assert words in str(error.value)


def test_the_argument_is_called_by_its_name():
    with pytest.raises(ValueError, match="Expected argument `layers` to match"):
        select_parameters(network(), ["nothing"], argument="layers")


# -- zero and hold -----------------------------------------------------------------------------------------------------
def moved(net: nn.Module) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter))
            parameter.grad = torch.randn_like(parameter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_zeroing(dtype):
    net = network().to(dtype)
    mask = ParameterMask.with_sparsity(magnitudes(net), 0.6)
    zeroing = WeightZeroing(mask, net)
    moved(net)
    net[4].weight.grad = None
    expected = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    gradient = net[0].weight.grad.clone()
    zeroing.weights()
    zeroing.gradients()
    for name, parameter in net.named_parameters():
        kept = mask[name] if name in mask else torch.ones_like(parameter, dtype=torch.bool)
        assert torch.equal(parameter, torch.where(kept, expected[name], torch.zeros((), dtype=dtype)))
        assert parameter.dtype == dtype
    assert torch.equal(net[0].weight.grad, gradient * mask["0.weight"])
    assert net[4].weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("restored", [False, True])
def test_holding_is_exact(dtype, restored, tmp_path):
    net = network().to(dtype)
    every = {name: torch.rand(parameter.shape) for name, parameter in net.named_parameters()}
    mask = ParameterMask.with_sparsity(every, 0.6)
    whole = dict(mask)
    whole["4.weight"] = torch.ones_like(whole["4.weight"])  # all of it may move
    whole["3.bias"] = torch.zeros_like(whole["3.bias"])  # none of it may
    mask = ParameterMask(whole)
    reference = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    holding = WeightHolding(mask, net)
    if restored:
        torch.save(holding.state_dict(), tmp_path / "held.pt")
        moved(net)
        state = torch.load(tmp_path / "held.pt", weights_only=True)
        assert "4.weight" not in state
        assert sum(value.numel() for value in state.values()) == mask.size - mask.kept
        holding = WeightHolding.from_state_dict(mask, net, state)
    for _ in range(3):
        moved(net)
        free = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
        holding.weights()
        for name, parameter in net.named_parameters():
            assert torch.equal(parameter, torch.where(mask[name], free[name], reference[name])), name
    gradients = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
    holding.gradients()
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter.grad, gradients[name] * mask[name])


def test_holding_at_a_reference_and_where_all_may_move():
    net = network()
    mask = ParameterMask({"4.weight": torch.rand(3, 9) > 0.5})
    reference = {"4.weight": torch.randn(3, 9, dtype=torch.float64)}
    WeightHolding(mask, net, reference).weights()
    assert torch.equal(net[4].weight[~mask["4.weight"]], reference["4.weight"].float()[~mask["4.weight"]])
    free = WeightHolding(ParameterMask({"4.weight": torch.ones(3, 9, dtype=torch.bool)}), net)
    before = net[4].weight.detach().clone()
    free.weights(), free.gradients()
    assert torch.equal(net[4].weight, before)
    assert free.state_dict() == {}


def test_masks_of_a_growing_sparsity_are_nested():
    scores = magnitudes(network())
    for scope in ("global", "layer"):
        found = [ParameterMask.with_sparsity(scores, sparsity, scope) for sparsity in (0.2, 0.5, 0.8)]
        for more, fewer in itertools.pairwise(found):
            assert same(more.intersection(fewer), fewer)
