"""Attacks that torchattacks 3.5.1 has as well: equal sample by sample from the same start."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.attacks.golden_cases import CASES, FILE, GivenDraws, Network, samples
from tests.attacks.make_golden import reference


def ours(name: str) -> torch.Tensor:
    images, targets = samples()
    return CASES[name][0](Network(), images, targets, draws=GivenDraws(len(images)))


@pytest.mark.parametrize("name", CASES)
def test_attack_equals_its_golden_tensor(name):
    expected = load_file(FILE)[name]
    assert (expected != samples()[0]).flatten(1).any(dim=1).all()
    torch.testing.assert_close(ours(name), expected, rtol=0.0, atol=1e-6)


def test_golden_attacks_do_something():
    _, targets = samples()
    golden = load_file(FILE)
    assert golden.keys() == CASES.keys()
    for name in ("cw", "deepfool"):
        assert (Network()(golden[name]).argmax(dim=1) != targets).all()


@pytest.mark.parametrize("name", CASES)
def test_attack_equals_torchattacks_where_it_is_installed(name):
    pytest.importorskip("torchattacks")
    torch.testing.assert_close(ours(name), reference(name), rtol=0.0, atol=1e-6)
