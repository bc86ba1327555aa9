"""Batches of all shapes: entries are found, replaced in a batch of the same type, and the old batch is left alone."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from lightning_trust.core.batch import BatchSpec

X, Y, INDEX, NEW = torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([7, 9]), torch.tensor([1, 1])


class Named(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


Plain = namedtuple("Plain", ["x", "y"])


class Pair(tuple):
    """A tuple with a name of its own."""


class Rows(list):
    """A list with an attribute."""

    note = ""


@dataclass
class Data:
    x: torch.Tensor
    y: torch.Tensor


class Encoding(UserDict):
    """As the tokenizers of transformers return."""


def attribute_batch() -> SimpleNamespace:
    return SimpleNamespace(x=X, y=Y, other="kept")


CASES = [
    ((X, Y), BatchSpec()),
    ([X, Y], BatchSpec()),
    ((X, Y, "kept"), BatchSpec(0, -2)),
    (Pair((X, Y)), BatchSpec()),
    (Rows([X, Y]), BatchSpec()),
    (Named(X, Y), BatchSpec()),
    (Named(X, Y), BatchSpec("x", "y")),
    (Plain(X, Y), BatchSpec("x", "y")),
    ({"x": X, "y": Y, "other": "kept"}, BatchSpec("x", "y")),
    ({0: X, 1: Y}, BatchSpec()),
    (OrderedDict(x=X, y=Y), BatchSpec("x", "y")),
    (defaultdict(list, x=X, y=Y), BatchSpec("x", "y")),
    (Encoding(x=X, y=Y), BatchSpec("x", "y")),
    (Data(X, Y), BatchSpec("x", "y")),
    (attribute_batch(), BatchSpec("x", "y")),
    (({"image": X}, {"fine": Y, "coarse": "kept"}), BatchSpec("0.image", "1.fine")),
    ({"views": (X, "kept"), "y": [Named("kept", Y)]}, BatchSpec("views.0", "y.0.y")),
    ([X, Y, "kept"], BatchSpec("0", "1")),
]


@pytest.mark.parametrize(("batch", "spec"), CASES, ids=[f"{type(b).__name__}-{s.targets}" for b, s in CASES])
def test_entries_are_found_and_replaced(batch, spec):
    text = str(batch)
    assert spec.inputs_of(batch) is X
    assert spec.targets_of(batch) is Y
    changed = spec.replace(batch, targets=NEW)
    assert type(changed) is type(batch)
    assert changed is not batch
    assert spec.inputs_of(changed) is X
    assert spec.targets_of(changed) is NEW
    # the batch that came in, and what is nested in it, is as it was
    assert spec.targets_of(batch) is Y
    assert str(batch) == text
    assert str(changed).count("kept") == text.count("kept")
    both = spec.replace(batch, inputs=NEW, targets=X)
    assert spec.inputs_of(both) is NEW
    assert spec.targets_of(both) is X


def test_index():
    spec = BatchSpec(index=2)
    assert BatchSpec().index_of((X, Y)) is None
    assert spec.index_of((X, Y, INDEX)) is INDEX
    assert spec.replace((X, Y, INDEX), index=NEW)[2] is NEW
    with pytest.raises(ValueError, match=r"Expected `BatchSpec.index` to name a place in the batch, but got None\."):
        BatchSpec().replace((X, Y), index=NEW)


@pytest.mark.parametrize(
    ("batch", "spec", "words"),
    [
        ((X,), BatchSpec(), "got 1 and the batch is a tuple of 1 entries"),
        ({"image": X, "label": Y}, BatchSpec("image", "y"), "got 'y' and the batch is a dict with keys"),
        ({"image": X, "label": Y}, BatchSpec(), "got 1 and the batch is a dict with keys"),
        (defaultdict(list, image=X), BatchSpec("image", "y"), "got 'y' and the batch is a defaultdict with keys"),
        (Named(X, Y), BatchSpec("x", "z"), "got 'z' and the batch is a Named of 2 entries"),
        (Data(X, Y), BatchSpec("x", "z"), "got 'z' and the batch is a Data"),
        (Data(X, Y), BatchSpec(), "got 1 and the batch is a Data"),
        ((X, Y), BatchSpec(0, "1.fine"), "got '1.fine' and the batch is a tuple"),
        (X, BatchSpec(), "got 1 and the batch is a Tensor"),
        ("text", BatchSpec(), "got 1 and the batch is a str"),
        (None, BatchSpec(), "got 1 and the batch is a NoneType"),
    ],
)
def test_a_place_that_is_not_there_is_named(batch, spec, words):
    with pytest.raises(ValueError, match=r"Expected `BatchSpec.targets` to name a place") as error:
        spec.targets_of(batch)
    assert words in str(error.value)
    with pytest.raises(ValueError, match="Expected `BatchSpec.targets` to name a place") as error:
        spec.replace(batch, targets=NEW)
    assert "Pass `batch_spec=BatchSpec(inputs=..., targets=...)`" in str(error.value)
    if isinstance(batch, defaultdict):
        assert list(batch) == ["image"]
