"""Scores of source classes and rows against NumPy, scikit-learn, closed forms and autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import NearestCentroid
from torch import nn

from lightning_trust.functional.prompting import (
    feature_mapping_scores,
    grad_norm_scores,
    group_means,
    label_mapping_scores,
    linear_grad_norms,
    moderate_rows,
    rank_groups,
)
from lightning_trust.functional.prompting.source_scores import feature_mapping_evidence, label_mapping_evidence
from tests.two_ranks import run_on_two_ranks


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# -- label mapping -----------------------------------------------------------------------------------------------------
def test_lm_is_the_histogram_of_top_labels():
    logits = drawn(200, 7)
    scores = label_mapping_scores(nn.Identity(), [(part, torch.zeros(len(part))) for part in logits.split(32)], 7)
    assert scores.tolist() == np.bincount(logits.numpy().argmax(axis=1), minlength=7).tolist()
    assert scores.dtype == torch.int64
    assert scores.sum() == 200


def test_lm_sees_neither_order_nor_labels_nor_scale():
    logits = drawn(100, 5)
    scores = label_mapping_scores(nn.Identity(), [logits], 5)
    shuffled = logits[torch.randperm(100, generator=torch.Generator().manual_seed(1))]
    assert torch.equal(label_mapping_scores(nn.Identity(), shuffled.split(17), 5), scores)
    assert torch.equal(label_mapping_scores(lambda x: 0.01 * x, [logits], 5), scores)
    assert torch.equal(label_mapping_scores(nn.Identity(), [(logits, drawn(100))], 5), scores)


def test_lm_counts_half_precision_as_float32():
    half = torch.tensor([[1.0, 1.001], [2.0, 1.0]]).bfloat16()
    assert label_mapping_scores(nn.Identity(), [half], 2).tolist() == [2, 0]


def test_lm_of_a_nearest_mean_classifier_is_fm():
    source, target = drawn(90, 4), drawn(60, 4, seed=1)
    groups = torch.arange(90) % 6
    means = group_means(source, groups, 6)
    # -|x - mu|^2 without what is the same for all classes
    head = nn.Linear(4, 6).double()
    head.weight.data, head.bias.data = 2.0 * means, -means.square().sum(dim=1)
    assert torch.equal(label_mapping_scores(head, [target], 6), feature_mapping_scores(source, groups, target, 6))


# -- feature mapping ---------------------------------------------------------------------------------------------------
def test_fm_is_scikit_learns_nearest_centroid():
    source, target = drawn(300, 8), drawn(150, 8, seed=1)
    groups = torch.arange(300) % 11
    found = NearestCentroid().fit(source.numpy(), groups.numpy()).predict(target.numpy())
    scores = feature_mapping_scores(source, groups, target, 11)
    assert scores.tolist() == np.bincount(found, minlength=11).tolist()
    for row, group in zip(target, found, strict=True):
        assert feature_mapping_scores(source, groups, row[None], 11)[group] == 1


@pytest.mark.parametrize("chunk", [1, 7, 150])
def test_fm_in_chunks_is_fm_at_once(chunk):
    source, target, groups = drawn(40, 3), drawn(150, 3, seed=1), torch.arange(40) % 5
    whole = feature_mapping_scores(source, groups, target, 5)
    assert torch.equal(feature_mapping_scores(source, groups, target, 5, chunk), whole)


def test_fm_sees_neither_rotation_nor_translation():
    source, target, groups = drawn(60, 4), drawn(80, 4, seed=1), torch.arange(60) % 6
    scores = feature_mapping_scores(source, groups, target, 6)
    rotation = torch.linalg.qr(drawn(4, 4, seed=2)).Q
    assert torch.equal(feature_mapping_scores(source @ rotation, groups, target @ rotation, 6), scores)
    # far from the origin, where a product form would have lost the digits
    assert torch.equal(feature_mapping_scores(source + 1e6, groups, target + 1e6, 6), scores)


def test_group_means_are_those_of_numpy():
    features, groups = drawn(50, 3), torch.arange(50) % 4
    means = group_means(features, groups, 4)
    for group in range(4):
        np.testing.assert_allclose(means[group], features[groups == group].numpy().mean(axis=0))


def test_evidence_of_two_ranks_adds_up_to_that_of_one(tmp_path):
    logits, means, target = drawn(101, 5), drawn(6, 3, seed=1), drawn(101, 3, seed=2)

    def shard(rank):
        own = torch.cat(
            [
                label_mapping_evidence(nn.Identity(), [logits[rank::2]], 5).flatten(),
                feature_mapping_evidence(means, target[rank::2]).flatten(),
            ]
        )
        torch.distributed.all_reduce(own)
        return own

    whole = [label_mapping_evidence(nn.Identity(), [logits], 5), feature_mapping_evidence(means, target)]
    first, second = run_on_two_ranks(tmp_path, shard)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, torch.cat([part.flatten() for part in whole]))
    assert torch.equal(first[:5], whole[0][0])
    assert torch.equal(first[10:16], whole[1][0])


# -- order -------------------------------------------------------------------------------------------------------------
def test_ties_go_by_the_second_value_and_then_by_number():
    scores = torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(0))
    ties = torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(1)).double()
    keys = [(-int(score), -float(tie), place) for place, (score, tie) in enumerate(zip(scores, ties, strict=True))]
    assert rank_groups(scores, ties).tolist() == [key[2] for key in sorted(keys)]


# -- rows --------------------------------------------------------------------------------------------------------------
def test_grad_norms_of_a_linear_model_have_a_closed_form():
    torch.manual_seed(0)
    model, inputs, targets = nn.Linear(5, 4).double(), drawn(12, 5), torch.arange(12) % 4
    logits = model(inputs)
    closed = (logits.softmax(1) - F.one_hot(targets, 4)).norm(dim=1) * torch.cat(
        [inputs, torch.ones(12, 1, dtype=torch.float64)], dim=1
    ).norm(dim=1)
    torch.testing.assert_close(grad_norm_scores(model, inputs, targets), closed)
    torch.testing.assert_close(linear_grad_norms(inputs, logits, targets), closed)


def test_grad_norms_are_those_of_autograd_row_by_row():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)).eval()
    inputs, targets = drawn(5, 1, 4, 4, dtype=torch.float32), torch.tensor([0, 1, 2, 0, 1])
    norms = []
    for row, target in zip(inputs, targets, strict=True):
        gradients = torch.autograd.grad(F.cross_entropy(model(row[None]), target[None]), list(model.parameters()))
        norms.append(torch.cat([gradient.flatten() for gradient in gradients]).norm())
    torch.testing.assert_close(grad_norm_scores(model, inputs, targets), torch.stack(norms))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
def test_moderate_is_numpys_band_of_quantiles(ratio):
    features, labels = drawn(303, 6), torch.arange(303) % 3
    expected = []
    for label in range(3):
        rows = np.flatnonzero(labels.numpy() == label)
        own = features.numpy()[rows]
        distances = np.linalg.norm(own - np.median(own, axis=0), axis=1)
        low, high = np.quantile(distances, [0.5 - ratio / 2, 0.5 + ratio / 2])
        expected.extend(rows[(distances >= low) & (distances <= high)])
    found = moderate_rows(features, labels, ratio).tolist()
    # 101 rows a class: the quantiles fall between rows, up to a row at either end
    assert len(set(found) ^ set(expected)) <= 3
    assert len(found) == 3 * round(ratio * 101)
    assert moderate_rows(features, labels, 1.0).tolist() == list(range(303))


# -- bad input ---------------------------------------------------------------------------------------------------------
def test_bad_input_is_named():
    source, groups, target = drawn(6, 2), torch.arange(6) % 3, drawn(4, 2)
    with pytest.raises(ValueError, match=r"`num_source` to be the width of the logits, \(4, 2\), but got 3"):
        label_mapping_scores(nn.Identity(), [target], 3)
    with pytest.raises(ValueError, match="`target_loader` to hold target images, but got none"):
        label_mapping_scores(nn.Identity(), [], 3)
    with pytest.raises(ValueError, match="logits of the surrogate to be finite"):
        label_mapping_scores(nn.Identity(), [target * float("nan")], 2)
    with pytest.raises(ValueError, match="`target_feats` to hold features"):
        feature_mapping_scores(source, groups, target[:0], 3)
    with pytest.raises(ValueError, match=r"target features of shape \(M, 2\), .* got \(4, 1\)"):
        feature_mapping_scores(source, groups, target[:, :1], 3)
    with pytest.raises(ValueError, match="2 of 5 have none: 3, 4"):
        feature_mapping_scores(source, groups, target, 5)
    with pytest.raises(ValueError, match=r"groups to lie in \[0, 2\), but got 0 to 2"):
        feature_mapping_scores(source, groups, target, 2)
    with pytest.raises(ValueError, match="features of the source to be finite"):
        feature_mapping_scores(source / 0.0, groups, target, 3)
    with pytest.raises(ValueError, match="features of the target to be finite"):
        feature_mapping_scores(source, groups, target / 0.0, 3)
    with pytest.raises(ValueError, match="`chunk` to be a positive integer, but got 0"):
        feature_mapping_scores(source, groups, target, 3, chunk=0)
    with pytest.raises(ValueError, match=r"groups of shape \(N,\), but got \(6, 2\) and \(5,\)"):
        group_means(source, groups[:5], 3)
