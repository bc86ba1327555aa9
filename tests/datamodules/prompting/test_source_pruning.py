"""Pruners against closed forms, scikit-learn and each other; results as files; on two ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from sklearn.neighbors import NearestCentroid
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_trust.core.batch import BatchSpec
from lightning_trust.datamodules import (
    ClassMeanPruner,
    FeatureMappingPruner,
    GradNormPruner,
    LabelMappingPruner,
    ModeratePruner,
    PruneResult,
    RandomClassPruner,
    extract_features,
)
from lightning_trust.functional.prompting import grad_norm_scores, group_means, moderate_rows
from lightning_trust.nn import SmallCNN
from tests.two_ranks import run_on_two_ranks

CLASSES, ROWS = 10, 120


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def source():
    """Ten classes around corners that are far apart."""
    labels = torch.arange(ROWS) % CLASSES
    return TensorDataset(20.0 * torch.eye(CLASSES)[labels] + drawn(ROWS, CLASSES), labels)


@pytest.fixture
def target():
    """A task of its own labels, with most images like classes 7, 2, 4 and 0, in this order."""
    classes = torch.tensor([7] * 13 + [2] * 9 + [4] * 5 + [0] * 2 + [1] * 1)
    return TensorDataset(20.0 * torch.eye(CLASSES)[classes] + drawn(30, CLASSES, seed=1), torch.arange(30) % 2)


PRUNERS = {
    "lm": lambda ratio, **kwargs: LabelMappingPruner(CLASSES, ratio, **kwargs),
    "fm": lambda ratio, **kwargs: FeatureMappingPruner(ratio, layer="", **kwargs),
    "means": lambda ratio: ClassMeanPruner(ratio, layer=""),
    "middle": lambda ratio: FeatureMappingPruner(ratio, layer="", middle=0.6),
    "random": lambda ratio: RandomClassPruner(ratio, seed=3),
    "moderate": lambda ratio: ModeratePruner(ratio, layer=""),
    "grand": lambda ratio: GradNormPruner(ratio, batch_size=7),
}


def network():
    torch.manual_seed(5)
    return nn.Linear(CLASSES, CLASSES)


def fitted(name, ratio, source, target, surrogate=None, **kwargs):
    # identity: inputs are the logits, and the features
    surrogate = surrogate or (network() if name == "grand" else nn.Identity())
    return PRUNERS[name](ratio, **kwargs).fit(surrogate, source, target)


# -- what is chosen ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["lm", "fm"])
def test_scores_count_the_targets_images(name, source, target):
    with pytest.warns(UserWarning, match="keeps 1 of 6 classes to which no target image was mapped"):
        result = fitted(name, 0.6, source, target)
    assert result.class_scores.tolist() == [2, 1, 9, 0, 5, 0, 0, 13, 0, 0]
    assert result.zero_scores_kept == 1
    assert result.kept_classes[torch.isin(result.kept_classes, torch.tensor([0, 1, 2, 4, 7]))].tolist() == [
        0,
        1,
        2,
        4,
        7,
    ]


@pytest.mark.parametrize("name", ["lm", "fm"])
def test_a_target_of_source_classes_keeps_exactly_them(name, source):
    """A surrogate that is always right, and images of classes 1, 5 and 6 alone."""
    own = torch.isin(source.tensors[1], torch.tensor([1, 5, 6]))
    target = TensorDataset(source.tensors[0][own])
    result = fitted(name, 0.3, source, target)
    assert result.kept_classes.tolist() == [1, 5, 6]
    assert result.class_scores.nonzero().flatten().tolist() == [1, 5, 6]
    assert result.kept_indices.tolist() == own.nonzero().flatten().tolist()
    assert result.unit == "class"


def test_lm_breaks_ties_by_probability_and_then_by_number(source):
    logits = torch.zeros(1, CLASSES)
    logits[0, 3], logits[0, [8, 5]] = 5.0, 1.0
    target = TensorDataset(logits)
    assert fitted("lm", 0.2, source, target).kept_classes.tolist() == [3, 5]
    assert fitted("lm", 0.3, source, target).kept_classes.tolist() == [3, 5, 8]
    assert fitted("lm", 0.5, source, target).kept_classes.tolist() == [0, 1, 3, 5, 8]


def test_fm_breaks_ties_by_distance(source):
    point = 20.0 * torch.eye(CLASSES)[3] + 5.0 * torch.eye(CLASSES)[6] + 3.0 * torch.eye(CLASSES)[9]
    assert fitted("fm", 0.3, source, TensorDataset(point[None])).kept_classes.tolist() == [3, 6, 9]


def test_lm_and_fm_agree_where_the_surrogate_is_a_nearest_mean_classifier():
    """Overlapping classes, so that there is something to disagree on."""
    labels = torch.arange(300) % 8
    source = TensorDataset(drawn(300, 5).double() + 0.5 * drawn(8, 5, seed=2)[labels], labels)
    target = TensorDataset(drawn(99, 5, seed=1).double())
    means = group_means(source.tensors[0], labels, 8)
    head = nn.Linear(5, 8).double()
    head.weight.data, head.bias.data = 2.0 * means, -means.square().sum(dim=1)
    lm = LabelMappingPruner(8, 0.5).fit(head, source, target)
    # features are what goes into the last linear layer
    fm = FeatureMappingPruner(0.5).fit(head, source, target)
    assert torch.equal(lm.class_scores, fm.class_scores)
    found = NearestCentroid().fit(source.tensors[0].numpy(), labels.numpy()).predict(target.tensors[0].numpy())
    assert fm.class_scores.tolist() == np.bincount(found, minlength=8).tolist()


def test_fm_of_clusters_finds_the_classes_without_labels(source, target):
    unlabelled = TensorDataset(source.tensors[0])
    result = FeatureMappingPruner(0.4, "kmeans", n_clusters=CLASSES, layer="", seed=1).fit(
        nn.Identity(), unlabelled, target
    )
    by_label = fitted("fm", 0.4, source, target)
    assert result.unit == "cluster"
    assert result.kept_indices.tolist() == by_label.kept_indices.tolist()
    assert sorted(result.class_scores.tolist()) == sorted(by_label.class_scores.tolist())
    with pytest.raises(MisconfigurationException, match="this result keeps clusters"):
        _ = result.label_map


def test_fm_with_means_of_the_middle_is_not_led_astray(source):
    """An outlier moves the mean of its class; without it the class is where its other rows are."""
    inputs, labels = source.tensors
    inputs = inputs.clone()
    inputs[3] += 900.0
    moved, target = TensorDataset(inputs, labels), TensorDataset(inputs[labels == 3][1:])
    assert fitted("fm", 0.1, moved, target).kept_classes.tolist() != [3]
    result = fitted("fm", 0.1, moved, target, middle=0.5)
    assert result.kept_classes.tolist() == [3]
    means = group_means(inputs[moderate_rows(inputs, labels, 0.5)], labels[moderate_rows(inputs, labels, 0.5)], CLASSES)
    found = torch.cdist(target.tensors[0].double(), means).argmin(dim=1)
    assert result.class_scores.tolist() == found.bincount(minlength=CLASSES).tolist()


def test_class_means_are_compared_as_numpy_does(source):
    inputs, labels = source.tensors
    theirs = torch.tensor([5] * 20 + [9] * 10)
    target = TensorDataset(drawn(30, CLASSES, seed=4) + 3.0, theirs)
    result = ClassMeanPruner(0.4, layer="").fit(nn.Identity(), source, DataLoader(target, batch_size=7, shuffle=True))
    ours = [inputs[labels == label].numpy().mean(axis=0) for label in range(CLASSES)]
    other = [target.tensors[0][theirs == label].numpy().mean(axis=0) for label in (5, 9)]
    scores = [-np.mean([np.linalg.norm(mean - theirs) for theirs in other]) for mean in ours]
    np.testing.assert_allclose(result.class_scores, scores, rtol=1e-6)
    assert result.kept_classes.tolist() == sorted(np.argsort(scores)[-4:].tolist())
    with pytest.raises(ValueError, match="for ClassMeanPruner to choose among classes, but got none"):
        ClassMeanPruner(layer="").fit(nn.Identity(), source, TensorDataset(target.tensors[0]))
    with pytest.raises(MisconfigurationException, match="reads the labels of the target by number"):
        ClassMeanPruner(layer="").fit(nn.Identity(), source, Stream(target))


@pytest.mark.parametrize(("classes", "count"), [(None, 11), (["a", "b", "c"], 3)])
def test_number_of_clusters_by_itself(source, target, classes, count):
    unlabelled = TensorDataset(source.tensors[0])
    if classes:
        unlabelled.classes = classes
    result = FeatureMappingPruner(1.0, "kmeans", layer="").fit(nn.Identity(), unlabelled, target)
    assert len(result.class_scores) == count


@pytest.mark.parametrize("name", PRUNERS)
def test_all_is_kept_at_one_and_less_is_part_of_more(name, source, target):
    rows = [set(fitted(name, ratio, source, target).kept_indices.tolist()) for ratio in (0.3, 0.5, 1.0)]
    assert rows[2] == set(range(ROWS))
    assert rows[0] < rows[1] < rows[2]
    # 12 rows a class, of which Moderate keeps 3.6
    assert (len(rows[0]), len(rows[1])) == (40 if name == "moderate" else 36, 60)


@pytest.mark.parametrize("name", ["lm", "fm"])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.6])
def test_reverse_is_the_complement(name, ratio, source, target):
    best = fitted(name, ratio, source, target)
    worst = fitted(name, 1.0 - ratio, source, target, reverse=True)
    assert sorted([*best.kept_indices.tolist(), *worst.kept_indices.tolist()]) == list(range(ROWS))


@pytest.mark.parametrize("name", ["lm", "fm", "random"])
def test_kept_rows_are_all_rows_of_kept_classes(name, source, target):
    result = fitted(name, 0.4, source, target)
    expected = [row for row, label in enumerate(source.tensors[1].tolist()) if label in result.kept_classes.tolist()]
    assert result.kept_indices.tolist() == expected
    assert result.label_map == {old: new for new, old in enumerate(sorted(set(result.kept_classes.tolist())))}


def test_random_classes_depend_on_the_seed_alone(source):
    first, again, other = (RandomClassPruner(0.5, seed=seed).fit(None, source) for seed in (1, 1, 2))
    torch.rand(3)
    assert first.kept_classes.tolist() == again.kept_classes.tolist() != other.kept_classes.tolist()
    assert first.zero_scores_kept == 0


def test_grad_norm_is_the_mean_over_networks(source):
    networks = [nn.Linear(CLASSES, CLASSES) for _ in range(3)]
    norms = torch.stack([grad_norm_scores(each, *source.tensors) for each in networks]).mean(dim=0)
    result = GradNormPruner(0.25, batch_size=7).fit(networks, source)
    assert result.kept_indices.tolist() == norms.topk(30).indices.sort().values.tolist()
    assert result.class_scores.sum() == 30
    assert result.unit == "row"


def test_surrogate_and_random_state_are_left_as_they_were(source, target):
    surrogate = nn.Sequential(nn.BatchNorm1d(CLASSES), nn.Dropout(0.5), nn.Linear(CLASSES, CLASSES))
    surrogate[1].eval()
    state = {name: value.clone() for name, value in surrogate.state_dict().items()}
    random = torch.get_rng_state()
    loader = DataLoader(target, batch_size=4, shuffle=True, drop_last=True)
    for name in PRUNERS:
        PRUNERS[name](0.5).fit(surrogate, DataLoader(source, batch_size=5, shuffle=True), loader) if name != "fm" else (
            FeatureMappingPruner(0.5).fit(surrogate, source, loader)
        )
    assert torch.equal(torch.get_rng_state(), random)
    assert [layer.training for layer in surrogate] == [True, False, True]
    assert all(torch.equal(value, state[name]) for name, value in surrogate.state_dict().items())


def test_loaders_give_what_their_data_sets_give(source, target):
    """Shuffling and dropping of the user's loaders do not touch the counts."""
    loader = DataLoader(target, batch_size=8, shuffle=True, drop_last=True)
    plain = fitted("lm", 0.4, source, target)
    assert torch.equal(fitted("lm", 0.4, DataLoader(source, 16, shuffle=True), loader).class_scores, plain.class_scores)
    assert LabelMappingPruner(None, 0.4).fit(nn.Identity(), source, target).hash == plain.hash


def test_augmentation_is_left_out_where_rows_are_measured(source, target):
    class Augmented(TensorDataset):
        transform = staticmethod(lambda x: x.flip(0))

        def __getitem__(self, row):
            inputs, label = super().__getitem__(row)
            return self.transform(inputs), label

    augmented = Augmented(*source.tensors)
    plain = fitted("fm", 0.4, source, target)
    assert fitted("fm", 0.4, augmented, target).hash != plain.hash
    assert fitted("fm", 0.4, augmented, target, eval_transform=lambda x: x).hash == plain.hash
    assert augmented[0][0].tolist() == source[0][0].flip(0).tolist()


# -- features ----------------------------------------------------------------------------------------------------------
def test_features_are_those_before_the_head():
    torch.manual_seed(0)
    net, images = SmallCNN(1, 3, widths=(4, 6)), drawn(10, 1, 8, 8)
    expected = net.eval().pool(net.features(images)).flatten(1).detach()
    net.train()
    loader = DataLoader(TensorDataset(images, torch.zeros(10)), batch_size=4)
    for layer in (None, "pool"):
        torch.testing.assert_close(extract_features(net, loader, layer), expected)
    torch.testing.assert_close(extract_features(net, [images], ""), net.classifier(expected).detach())
    assert net.training
    assert not net.pool._forward_hooks
    assert not net.classifier._forward_pre_hooks


def test_bad_layers_are_named():
    net, images = SmallCNN(1, 3, widths=(4, 6)), torch.zeros(2, 1, 8, 8)
    with pytest.raises(ValueError, match="`layer` to name a sub-module of SmallCNN, but got 'pol'.* 'pool'"):
        extract_features(net, [images], "pol")
    with pytest.raises(ValueError, match="no linear layer that could be its head, but got None"):
        extract_features(nn.ReLU(), [images])
    twice = nn.Sequential(shared := nn.Linear(2, 2), shared)
    with pytest.raises(ValueError, match="which was called 2 times"):
        extract_features(twice, [torch.zeros(1, 2)])
    with pytest.raises(ValueError, match="`loader` to hold rows, but got none"):
        extract_features(net, [])


# -- files -------------------------------------------------------------------------------------------------------------
def test_file_round_trip(tmp_path, source, target):
    result = fitted("lm", 0.4, source, target)
    loaded = PruneResult.load(result.save(tmp_path / "a" / "coreset.safetensors"))
    for name in ("class_scores", "kept_classes", "kept_indices"):
        assert torch.equal(getattr(loaded, name), getattr(result, name))
    plain = ("pruner", "unit", "source_rows", "source_hash", "seconds", "hash")
    assert all(getattr(loaded, name) == getattr(result, name) for name in plain)
    loaded.check_source(source, BatchSpec())


def test_what_is_no_result_is_refused(tmp_path, source, target):
    path = fitted("lm", 0.4, source, target).save(tmp_path / "coreset.safetensors")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="truncated or damaged"):
        PruneResult.load(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        PruneResult.load(tmp_path / "none")
    rows = torch.tensor([3, 1])
    with pytest.raises(ValueError, match=r"ascending numbers in \[0, 5\)"):
        PruneResult("P", "class", rows, rows, rows, 5, "")
    with pytest.raises(ValueError, match="P to keep rows of the source, but it keeps none of 5"):
        PruneResult("P", "class", rows, rows, rows[:0], 5, "")


def test_another_source_is_refused(source, target):
    result = fitted("lm", 0.4, source, target)
    inputs, labels = source.tensors
    for other in (TensorDataset(inputs[1:], labels[1:]), TensorDataset(inputs, labels.flip(0)), TensorDataset(inputs)):
        with pytest.raises(MisconfigurationException, match=f"Expected the source .*120 rows, {result.source_hash}"):
            result.check_source(other, BatchSpec())


def test_samples_of_data_sets_that_list_no_labels_are_read_once(source, target):
    class Counting(torch.utils.data.Dataset):
        reads = 0

        def __len__(self):
            return len(source)

        def __getitem__(self, row):
            self.reads += 1
            return source[row]

    counting = Counting()
    result = fitted("lm", 0.4, counting, target)
    assert counting.reads == ROWS
    assert result.hash == fitted("lm", 0.4, source, target).hash


# -- ranks -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [*PRUNERS, "kmeans"])
def test_two_ranks_choose_what_one_chooses(tmp_path, name, source, target):
    def choose(rank=0):
        if name == "kmeans":
            result = FeatureMappingPruner(0.4, "kmeans", n_clusters=9, layer="").fit(nn.Identity(), source, target)
        else:
            result = fitted(name, 0.4, source, target)
        return result.class_scores, result.kept_classes, result.kept_indices

    whole = choose()
    for found in run_on_two_ranks(tmp_path, choose):
        assert all(torch.equal(mine, other) for mine, other in zip(found, whole, strict=True))


def test_a_rank_may_have_no_target_image(tmp_path, source):
    target = TensorDataset(20.0 * torch.eye(CLASSES)[[4]])

    def choose(rank):
        return [fitted(name, 0.1, source, target).kept_classes.tolist() for name in ("lm", "fm")]

    assert run_on_two_ranks(tmp_path, choose) == [[[4], [4]]] * 2


# -- bad input ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.5, float("nan")])
def test_ratios_out_of_range(ratio):
    with pytest.raises(ValueError, match=r"`keep_ratio` to lie in \(0, 1\], but got"):
        LabelMappingPruner(3, ratio)


def test_bad_arguments():
    with pytest.raises(ValueError, match="`num_source` to be a positive integer, but got 0"):
        LabelMappingPruner(0)
    with pytest.raises(ValueError, match="`groups` to be 'labels' or 'kmeans', but got 'means'"):
        FeatureMappingPruner(groups="means")
    with pytest.raises(ValueError, match="but got 3 and groups='labels'"):
        FeatureMappingPruner(n_clusters=3)
    with pytest.raises(ValueError, match=r"`middle` to lie in \(0, 1\], but got 0.0"):
        FeatureMappingPruner(middle=0.0)
    with pytest.raises(ValueError, match="`batch_size` to be a positive integer, but got 0"):
        ModeratePruner(batch_size=0)


class Stream(IterableDataset):
    def __init__(self, dataset):
        self.rows = list(dataset)

    def __iter__(self):
        return iter(self.rows)


def test_streams(tmp_path, source, target):
    for stream in (Stream(source), DataLoader(Stream(source))):
        with pytest.raises(MisconfigurationException, match="LabelMappingPruner chooses rows by number"):
            fitted("lm", 0.4, stream, target)
    # a target is only counted
    assert fitted("lm", 0.4, source, Stream(target)).hash == fitted("lm", 0.4, source, target).hash

    def refuse(rank):
        with pytest.raises(MisconfigurationException, match="cannot be counted once on several ranks"):
            fitted("lm", 0.4, source, Stream(target))

    run_on_two_ranks(tmp_path, refuse)


def test_bad_data(source, target):
    inputs, labels = source.tensors
    with pytest.raises(MisconfigurationException, match="LabelMappingPruner needs argument `target`, but got None"):
        fitted("lm", 0.4, source, None)
    with pytest.raises(MisconfigurationException, match="ModeratePruner needs argument `surrogate`, but got None"):
        ModeratePruner().fit(None, source)
    with pytest.raises(ValueError, match="`surrogate` to be one network, but got 2"):
        LabelMappingPruner().fit([nn.Identity(), nn.Identity()], source, target)
    for name in ("lm", "fm"):
        with pytest.raises(ValueError, match=r"(`num_source` to be the width|`target` to hold images)"):
            fitted(name, 0.4, source, TensorDataset(target.tensors[0][:0]))
        with pytest.raises(ValueError, match="0.04 of 10 are none"):
            fitted(name, 0.04, source, target)
        with pytest.raises(ValueError, match="to be finite"):
            fitted(name, 0.4, source, TensorDataset(target.tensors[0] / 0.0))
        with pytest.raises(ValueError, match="kmeans needs no labels"):
            fitted(name, 0.4, TensorDataset(inputs), target)
    with pytest.raises(ValueError, match="float32 of shape"):
        fitted("lm", 0.4, TensorDataset(inputs, labels.float()), target)
    with pytest.raises(ValueError, match=r"lie in \[0, 10\), the classes of the surrogate, but got 11"):
        fitted("lm", 0.4, TensorDataset(inputs, labels + 2), target)
    with pytest.raises(ValueError, match=r"`num_source` to be the width of the logits, \(30, 10\), but got 12"):
        LabelMappingPruner(12).fit(nn.Identity(), source, target)
    with pytest.raises(ValueError, match=r"target features of shape \(M, 10\)"):
        fitted("fm", 0.4, source, TensorDataset(target.tensors[0][:, :4]))
    with pytest.raises(ValueError, match="2 of 12 have none: 0, 1"):
        fitted("fm", 0.4, TensorDataset(inputs, labels + 2), target)
    with pytest.raises(ValueError, match="`n_clusters` to be at most the 120 rows, but got 121"):
        FeatureMappingPruner(0.5, "kmeans", 121, layer="").fit(nn.Identity(), source, target)
    with pytest.raises(ValueError, match="keeps none of 10"):
        # the class that the target is like has no rows
        fitted("lm", 0.1, TensorDataset(inputs[:10], labels[:10] * 0), target)
