"""Features of data, as a network sees them before its head."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from lightning_trust.core.batch import BatchSpec
from lightning_trust.core.distributed import rank, world_size
from lightning_trust.core.host import close_names
from lightning_trust.core.modes import eval_mode
from lightning_trust.core.randomness import untouched_random_state
from lightning_trust.datamodules.wrapped import loader_settings


def extract_features(
    model: nn.Module, loader: Iterable[Any], layer: str | None = None, batch_spec: BatchSpec | None = None
) -> Tensor:
    r"""Features of all rows of a loader, in its order: what goes into the head of a network, or comes out of a layer.

    The network is in eval mode meanwhile; modes and random state are put back.

    Args:
        model: The network.
        loader: Batches; their inputs are moved to the network's device. A bare tensor is a batch of inputs.
        layer: Name of the sub-module whose outputs are the features, such as ``"avgpool"``, flattened to one vector a
            row; ``""`` for the outputs of the network itself. If None, what goes into its last linear layer.
        batch_spec: Where inputs sit in a batch.

    Returns:
        Float32 or float64, as the network gives them, shape ``(N, D)``, on the network's device.

    Raises:
        ValueError: If there is no such layer, it is not called once a batch, or there are no rows.

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> extract_features(network, [torch.zeros(2, 1, 2, 2)]).shape
        torch.Size([2, 3])
        >>> extract_features(network, [torch.zeros(2, 1, 2, 2)], layer="0").tolist()
        [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]

    """
    parts = [features for features, _ in features_by_batch(model, loader, layer, batch_spec or BatchSpec())]
    if not parts:
        raise ValueError("Expected argument `loader` to hold rows, but got none.")
    return torch.cat(parts)


@torch.no_grad()
def features_by_batch(
    model: nn.Module, loader: Iterable[Any], layer: str | None, batch_spec: BatchSpec
) -> Iterator[tuple[Tensor, Any]]:
    """Features of each batch, and the batch."""
    tapped = _tapped(model, layer)
    device = device_of(model)
    seen: list[Tensor] = []
    handle: Any = None
    if layer is None:
        handle = tapped.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    elif layer:
        handle = tapped.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        with untouched_random_state(), eval_mode(model):
            for batch in loader:
                seen.clear()
                output = model(inputs_of(batch, batch_spec).to(device))
                if layer == "":
                    seen.append(output)
                if len(seen) != 1 or not isinstance(seen[0], Tensor):
                    raise ValueError(
                        f"Expected argument `layer` to name a sub-module of {type(model).__name__} that gives one"
                        f" tensor a batch, but got {layer!r}, which was called {len(seen)} times."
                    )
                features = seen[0].flatten(1)
                yield features if features.dtype == torch.float64 else features.float(), batch
    finally:
        if handle is not None:
            handle.remove()


def _tapped(model: nn.Module, layer: str | None) -> nn.Module:
    """The module whose inputs (``layer`` is None) or outputs are the features."""
    if layer == "":
        return model
    if layer is None:
        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise ValueError(
                f"Expected argument `layer` to name a sub-module of {type(model).__name__}, which has no linear layer"
                " that could be its head, but got None. Its own outputs are `layer=''`."
            )
        return linear[-1]
    modules = {name: module for name, module in model.named_modules() if name}
    if layer not in modules:
        raise ValueError(
            f"Expected argument `layer` to name a sub-module of {type(model).__name__}, but got {layer!r}."
            f" Close names: {close_names(layer, modules)}."
        )
    return modules[layer]


def inputs_of(batch: Any, batch_spec: BatchSpec) -> Tensor:
    """Inputs of a batch; a bare tensor is all inputs."""
    inputs: Tensor = batch if isinstance(batch, Tensor) else batch_spec.inputs_of(batch)
    return inputs


def device_of(model: nn.Module) -> torch.device:
    """Where a network computes."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def shard_in_order(data: DataLoader[Any] | Dataset[Any], dataset: Any, batch_size: int) -> DataLoader[Any]:
    """The rows ``r::W`` of rank r of W of a map-style dataset, in order; none is left out, none repeated.

    Args:
        data: Where workers and collation are taken from, where it is a loader.
        dataset: The dataset.
        batch_size: Rows a batch.

    """
    settings = {**loader_settings(data), "persistent_workers": False} if isinstance(data, DataLoader) else {}
    rows = range(rank(), len(dataset), world_size())
    return DataLoader(Subset(dataset, rows), batch_size=batch_size, shuffle=False, **settings)


def dataset_of(data: DataLoader[Any] | Dataset[Any]) -> Dataset[Any]:
    """The dataset of a loader, or the dataset."""
    return data.dataset if isinstance(data, DataLoader) else data


def is_iterable(data: DataLoader[Any] | Dataset[Any]) -> bool:
    """Whether rows have no numbers."""
    return isinstance(dataset_of(data), IterableDataset)
