"""OODEvaluation: figures by hand, AUROC, intervals, class names; the planted shortcut does what it says."""

from __future__ import annotations

import math
from typing import ClassVar

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from scipy.stats import bootstrap
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_trust.callbacks import OODEvaluation
from lightning_trust.callbacks.adversarial.ood_evaluation import accuracy, groups_of, mean_auroc
from lightning_trust.datamodules import ShortcutFashionMNIST
from tests.callbacks.adversarial.test_adversarial_training import Images, images
from tests.conformance import CallbackConformance, Data
from tests.two_ranks import QUIET


class Sites(pl.LightningDataModule):
    def __init__(self, seed: int = 0, names: tuple[str, ...] = ("a", "b", "c")) -> None:
        super().__init__()
        self.seed = seed
        self.class_names = names

    def test_dataloader(self):
        return DataLoader(images(20, seed=self.seed), batch_size=7)


class Other(Data):
    """The tester's data under another name."""


class TestOODEvaluation(CallbackConformance):
    callback = OODEvaluation
    arguments: ClassVar = {"sets": {"there": {"class_path": f"{__name__}.Other", "init_args": {"batch_size": 8}}}}


class Tested(Images):
    def test_step(self, batch, batch_idx):
        pass


def test_figures_are_those_of_a_plain_loop():
    host = Tested()
    callback = OODEvaluation({"x": Sites(1), "y": Sites(2)})
    trainer = pl.Trainer(callbacks=[callback], **QUIET)
    (found,) = trainer.test(host, Sites(0), verbose=False)
    shares = []
    for seed in range(3):
        x, y = images(20, seed=seed).tensors
        shares.append((host.net(x).argmax(1) == y).float().mean().item())
    assert found["trust/id_acc"] == pytest.approx(shares[0])
    assert found["trust/ood_acc/x"] == pytest.approx(shares[1])
    assert found["trust/ood_gap/y"] == pytest.approx(shares[0] - shares[2])
    assert found["trust/ood_acc/worst"] == pytest.approx(min(shares[1:]))


def test_auroc_is_scikit_learns_and_skips_labels_of_one_value():
    logits, targets = torch.randn(30, 3), (torch.rand(30, 3) < 0.4).float()
    targets[:, 1] = 1.0
    with pytest.warns(UserWarning, match=r"Labels \[1\] have one value only"):
        found = mean_auroc(logits, targets)
    expected = [roc_auc_score(targets[:, label], logits[:, label]) for label in (0, 2)]
    assert found == pytest.approx(sum(expected) / 2)
    with pytest.raises(ValueError, match=r"multi-hot targets of shape \(N, K\)"):
        mean_auroc(logits, targets[:, 0])
    with pytest.raises(ValueError, match=r"classes of shape \(N,\)"):
        accuracy(logits, targets)


class Patients(Sites):
    """Every image three times, and, if asked for, who it is of."""

    def __init__(self, seed: int = 0, groups: bool = True) -> None:
        super().__init__(seed)
        self.groups = groups

    def test_dataloader(self):
        x, y = images(20, seed=self.seed).tensors
        dataset = TensorDataset(x.repeat(3, 1, 1, 1), y.repeat(3))
        if self.groups:
            dataset.groups = [f"p{number}" for number in range(20)] * 3
        return DataLoader(dataset, batch_size=7)


def test_intervals_are_over_patients_where_the_data_tell_them():
    host = Tested()
    callback = OODEvaluation({"patients": Patients(1), "rows": Patients(1, groups=False)}, resamples=600)
    (found,) = pl.Trainer(callbacks=[callback], **QUIET).test(host, Sites(0), verbose=False)
    for name, seed, keys in (
        ("home", 0, ("trust/id_acc_low", "trust/id_acc_high")),
        ("patients", 1, ("trust/ood_acc_low/patients", "trust/ood_acc_high/patients")),
    ):
        x, y = images(20, seed=seed).tensors
        right = (host.net(x).argmax(1) == y).double().numpy()
        expected = bootstrap((right,), np.mean, n_resamples=4000, method="percentile", rng=0).confidence_interval
        # of 20 patients: steps of 1/20
        assert [found[key] for key in keys] == pytest.approx([expected.low, expected.high], abs=0.051), name
    widths = {
        name: found[f"trust/ood_acc_high/{name}"] - found[f"trust/ood_acc_low/{name}"] for name in ("patients", "rows")
    }
    assert widths["patients"] > 1.3 * widths["rows"] > 0.0
    assert found["trust/ood_acc/patients"] == found["trust/ood_acc/rows"]


def test_groups_of_a_part_and_of_the_wrong_length():
    dataset = Patients().test_dataloader().dataset
    assert groups_of(Subset(dataset, [0, 20, 1])).tolist() == [0, 0, 1]
    assert groups_of(images(3)).tolist() == [0, 1, 2]
    dataset.groups = torch.tensor([4, 4])
    with pytest.raises(ValueError, match="`groups` of TensorDataset to hold the group of each of 60 rows, but got 2"):
        groups_of(dataset)
    with pytest.raises(ValueError, match="`resamples` to be at least 0, but got -1"):
        OODEvaluation({"x": Sites()}, resamples=-1)


class Labels(Sites):
    """Several labels an image; a negative seed has none."""

    def test_dataloader(self):
        x, _ = images(20, seed=abs(self.seed)).tensors
        y = (torch.rand(20, 3, generator=torch.Generator().manual_seed(9)) < 0.5).float()
        return DataLoader(TensorDataset(x, y * (self.seed >= 0)), batch_size=7)


@pytest.mark.parametrize("order", [("full", "empty"), ("empty", "full")])
def test_a_site_without_a_curve_is_not_the_worst(order):
    sites = {"full": Labels(1), "empty": Labels(-1)}
    host = Tested()
    callback = OODEvaluation({name: sites[name] for name in order}, measure="auroc")
    trainer = pl.Trainer(callbacks=[callback], **QUIET)
    with pytest.warns(UserWarning, match=r"Labels \[0, 1, 2\] have one value only"):
        (found,) = trainer.test(host, Labels(0), verbose=False)
    x, y = next(iter(DataLoader(Labels(1).test_dataloader().dataset, batch_size=20)))
    assert found["trust/ood_auroc/full"] == pytest.approx(roc_auc_score(y, host.net(x).detach()))
    assert found["trust/ood_auroc/worst"] == found["trust/ood_auroc/full"]
    assert math.isnan(found["trust/ood_auroc/empty"])
    assert math.isnan(found["trust/ood_gap/empty"])


def test_bad_input():
    with pytest.raises(ValueError, match="`sets`"):
        OODEvaluation({})
    with pytest.raises(ValueError, match="`measure`"):
        OODEvaluation({"x": Sites()}, measure="f1")
    trainer = pl.Trainer(callbacks=[OODEvaluation({"x": Sites(1, ("a", "c", "b"))})], **QUIET)
    with pytest.raises(ValueError, match=r"set 'x' .* \['a', 'b', 'c'\], but got \['a', 'c', 'b'\]"):
        trainer.test(Tested(), Sites(0), verbose=False)


# -- the shortcut ------------------------------------------------------------------------------------------------------
def planted(**arguments):
    data = ShortcutFashionMNIST(train_rows=400, val_rows=50, test_rows=300, **arguments)
    data.prepare_data()
    data.setup()
    return data


def nearest_pattern(data, dataset):
    """The class whose pattern correlates best with what is not the garment."""
    images = dataset.images.float() / 255
    return torch.einsum("nchw,kchw->nk", images, data.patterns).argmax(1)


def test_pattern_tells_the_class_at_home_only():
    home, away = (planted(amplitude=0.5, shifted=shifted) for shifted in (False, True))
    for data, dataset, share in (
        (home, home.train_dataset, 0.95),
        (home, home.test_dataset, 0.95),
        (away, away.test_dataset, 0.1),
    ):
        told = (nearest_pattern(data, dataset) == dataset.targets).float().mean().item()
        assert told == pytest.approx(share, abs=0.08)
    # the same images at both sites, but for the patterns
    assert torch.equal(home.test_dataset.targets, away.test_dataset.targets)
    same = (home.test_dataset.images == away.test_dataset.images).flatten(1).all(1).float().mean().item()
    assert 0.05 < same < 0.2


def test_pattern_is_as_faint_as_asked():
    plain, faint, corner = planted(amplitude=0.0), planted(amplitude=0.08), planted(amplitude=0.5, kind="corner")
    difference = (faint.train_dataset.images.float() - plain.train_dataset.images.float()).abs() / 255
    assert difference.max().item() == pytest.approx(0.08, abs=0.003)
    changed = (corner.train_dataset.images != plain.train_dataset.images).any(dim=0)[0]
    assert not changed[8:].any()
    assert not changed[:, 8:].any()
    noisy = planted(amplitude=0.0, noise=0.1)
    changed = noisy.train_dataset.images != plain.train_dataset.images
    assert not changed[plain.train_dataset.images > 0].any()
    assert changed.float().mean() > 0.2


@pytest.mark.parametrize("name", ["amplitude", "p_train", "p_id", "p_ood", "noise"])
def test_shares_out_of_range(name):
    with pytest.raises(ValueError, match=rf"`{name}` to be in \[0, 1\], but got 1.5"):
        ShortcutFashionMNIST(**{name: 1.5})
    with pytest.raises(ValueError, match="`kind`"):
        ShortcutFashionMNIST(kind="border")
