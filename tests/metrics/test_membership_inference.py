import pickle

import pytest
import torch

from lightning_trust.functional.unlearning import membership_feature, membership_inference
from lightning_trust.metrics import MembershipInference
from tests.two_ranks import run_on_two_ranks

PARTS = ("retain", "test", "forget")


def outputs(count, seed, sharpness):
    generator = torch.Generator().manual_seed(seed)
    probabilities = (sharpness * torch.randn(count, 3, generator=generator)).softmax(1)
    return probabilities, torch.randint(0, 3, (count,), generator=generator)


DATA = {"retain": outputs(40, 1, 3.0), "test": outputs(30, 2, 1.0), "forget": outputs(24, 3, 2.0)}


def filled(metric, rows=slice(None), batch=7):
    for part, (probabilities, targets) in DATA.items():
        for p, t in zip(probabilities[rows].split(batch), targets[rows].split(batch), strict=True):
            metric.update(p, t, part)
    return metric


@pytest.mark.parametrize("feature", ["confidence", "correctness", "entropy", "m_entropy", "probability"])
def test_equals_the_function(feature):
    features = {part: membership_feature(*DATA[part], feature) for part in PARTS}
    expected, _ = membership_inference(**features)
    assert float(filled(MembershipInference(feature)).compute()) == pytest.approx(expected)


def test_arguments_reach_the_attack():
    features = {part: membership_feature(*DATA[part]) for part in PARTS}
    expected = [membership_inference(**features, max_rows=8, seed=seed)[0] for seed in range(6)]
    found = [float(filled(MembershipInference(max_rows=8, seed=seed)).compute()) for seed in range(6)]
    assert found == pytest.approx(expected)
    assert len(set(expected)) > 1


@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
def test_reset():
    metric = filled(MembershipInference())
    metric.reset()
    with pytest.raises(ValueError, match=r"^Expected argument `retain` to hold at least one row, but got none\.$"):
        metric.compute()
    assert torch.isfinite(filled(metric).compute())


def test_pickle():
    metric = filled(MembershipInference())
    assert pickle.loads(pickle.dumps(metric)).compute() == metric.compute()


def test_two_ranks_share_their_rows(tmp_path):
    def function(rank):
        # ranks hold different numbers of rows
        return float(filled(MembershipInference(), slice(None, 16) if rank == 0 else slice(16, None)).compute())

    first, second = run_on_two_ranks(tmp_path, function)
    assert first == second == pytest.approx(float(filled(MembershipInference()).compute()))


def test_a_part_without_rows_on_two_ranks(tmp_path):
    def function(rank):
        metric = MembershipInference()
        for part in ("retain", "test"):
            metric.update(*DATA[part], part)
        with pytest.raises(ValueError, match="`forget` to hold at least one row, but got none"):
            metric.compute()
        return rank

    assert run_on_two_ranks(tmp_path, function) == [0, 1]


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"^Expected argument `max_rows` to be at least 1, but got 0\.$"):
        MembershipInference(max_rows=0)
    with pytest.raises(ValueError, match=r"^Expected argument `feature` to be 'confidence'.* but got 'loss'\.$"):
        MembershipInference(feature="loss")
    with pytest.raises(
        ValueError, match=r"^Expected argument `part` to be 'retain', 'test' or 'forget', but got 'train'\.$"
    ):
        MembershipInference().update(*DATA["test"], "train")
