"""One value for all ranks, rows in their places, and strategies that are refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy

from lightning_trust.core.distributed import (
    check_strategy,
    from_all_ranks,
    from_first_rank,
    gather_rows,
    mean_over_ranks,
    rank,
    sum_over_ranks_,
    world_size,
)
from tests.core.hosts import trainer
from tests.two_ranks import run_on_two_ranks

WHOLE = torch.arange(14).view(7, 2)


def on_a_rank(number: int) -> dict[str, object]:
    assert (rank(), world_size()) == (number, 2)
    image = torch.arange(24.0).view(1, 3, 2, 4).to(memory_format=torch.channels_last)
    sums = [torch.tensor([1.0, 2.0]) * (number + 1), torch.tensor(5) + number, image * (number + 1)]
    sum_over_ranks_(sums)
    value = torch.tensor([1.0, 2.0]) * (number + 1)
    mean = mean_over_ranks(value)
    return {
        "sums": sums,
        "mean": mean,
        "value": value,
        "first": from_first_rank({"rank": number}),
        "all": from_all_ranks(("rank", number)),
        "interleaved": gather_rows(WHOLE[number::2]),
        "followed": gather_rows(WHOLE[: number + 1], interleaved=False),
        "none": gather_rows(torch.empty(0, 2)),
    }


def test_two_ranks(tmp_path):
    for number, found in enumerate(run_on_two_ranks(tmp_path, on_a_rank)):
        assert found["sums"][0].tolist() == [3.0, 6.0]
        assert found["sums"][1].item() == 11
        assert torch.equal(found["sums"][2], 3.0 * torch.arange(24.0).view(1, 3, 2, 4))
        assert found["mean"].tolist() == [1.5, 3.0]
        assert found["value"].tolist() == [1.0 + number, 2.0 + 2 * number]
        assert found["first"] == {"rank": 0}
        assert found["all"] == [("rank", 0), ("rank", 1)]
        assert torch.equal(found["interleaved"], WHOLE)
        assert torch.equal(found["followed"], torch.cat([WHOLE[:1], WHOLE[:2]]))
        assert found["none"].shape == (0, 2)


def test_one_rank():
    value = torch.tensor([1.0, 2.0])
    sum_over_ranks_([value])
    assert (rank(), world_size()) == (0, 1)
    assert value.tolist() == mean_over_ranks(value).tolist() == [1.0, 2.0]
    assert from_first_rank("value") == "value"
    assert from_all_ranks("value") == ["value"]
    assert torch.equal(gather_rows(WHOLE), WHOLE)


class DeepSpeedStrategy(DDPStrategy):
    """A subclass of what is supported is another strategy."""


def test_strategies(tmp_path):
    check_strategy("SalUn", trainer(tmp_path))
    check_strategy("SalUn", trainer(tmp_path, strategy="ddp", devices=2))
    check_strategy("SalUn", SimpleNamespace(strategy=DeepSpeedStrategy()), ["DeepSpeedStrategy"])
    with pytest.raises(MisconfigurationException) as error:
        check_strategy("SalUn", SimpleNamespace(strategy=DeepSpeedStrategy()))
    assert str(error.value) == (
        "SalUn supports the strategies SingleDevice or DDP, but got DeepSpeedStrategy."
        " Use `Trainer(strategy='auto')` on one device or `strategy='ddp'` on several."
    )
