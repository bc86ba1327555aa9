"""The valid box of raw inputs, and the normalisation that the data arrive in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class InputSpace:
    r"""The box of valid raw inputs and the affine map that the data module applies to them.

    A raw input :math:`r \in [\mathrm{low}, \mathrm{high}]` reaches the network as
    :math:`x_c = (r_c - \mathrm{mean}_c) / \mathrm{std}_c` for every channel :math:`c`. Budgets such as ``eps`` are
    always in raw units; this class converts between the two.

    Args:
        low: Smallest raw value.
        high: Largest raw value; must be greater than ``low``.
        mean: Mean per channel that was subtracted, in raw units; one value serves all channels.
        std: Standard deviation per channel that was divided by, in raw units; every value must be positive.
        channel_dim: Dimension of the channels in a batch.

    Raises:
        ValueError: If ``high <= low``, a standard deviation is not positive, or only one of ``mean`` and ``std`` is
            given, or their lengths differ.

    Example:
        >>> import torch
        >>> space = InputSpace(0.0, 1.0, mean=(0.5,), std=(0.25,))
        >>> space.from_raw(torch.tensor([[[[0.0, 1.0]]]])).flatten().tolist()
        [-2.0, 2.0]
        >>> space.to_raw(torch.tensor([[[[-2.0, 2.0]]]])).flatten().tolist()
        [0.0, 1.0]

    """

    low: float = 0.0
    high: float = 1.0
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    channel_dim: int = 1

    def __post_init__(self) -> None:
        if not self.high > self.low:
            raise ValueError(f"Expected argument `high` to be greater than `low` ({self.low}), but got {self.high}.")
        if (self.mean is None) != (self.std is None):
            raise ValueError(
                "Expected arguments `mean` and `std` to be given together,"
                f" but got mean={self.mean} and std={self.std}."
            )
        if self.mean is not None and self.std is not None:
            if len(self.mean) != len(self.std):
                raise ValueError(
                    "Expected arguments `mean` and `std` to have the same length,"
                    f" but got {len(self.mean)} and {len(self.std)} values."
                )
            if not all(value > 0 for value in self.std):
                raise ValueError(f"Expected every value of argument `std` to be positive, but got {list(self.std)}.")

    @property
    def normalised(self) -> bool:
        """Whether the data arrive normalised."""
        return self.mean is not None

    def _affine(self, x: Tensor) -> tuple[Tensor, Tensor]:
        channels = len(self.mean or ())
        if channels not in (1, x.shape[self.channel_dim]):
            raise ValueError(
                f"Expected inputs with {channels} channels in dimension {self.channel_dim}, as many as arguments"
                f" `mean` and `std` have values, but got inputs of shape {tuple(x.shape)}."
            )
        shape = [1] * x.ndim
        shape[self.channel_dim] = -1
        mean = torch.as_tensor(self.mean, dtype=torch.float32, device=x.device).view(shape)
        std = torch.as_tensor(self.std, dtype=torch.float32, device=x.device).view(shape)
        return mean, std

    def to_raw(self, x: Tensor) -> Tensor:
        """Inputs as the network gets them, shape ``(N, C, ...)`` -> raw inputs of the same shape."""
        if not self.normalised:
            return x
        mean, std = self._affine(x)
        return x * std + mean

    def from_raw(self, raw: Tensor) -> Tensor:
        """Raw inputs, shape ``(N, C, ...)`` -> inputs as the network gets them, same shape."""
        if not self.normalised:
            return raw
        mean, std = self._affine(raw)
        return (raw - mean) / std

    def scale(self, x: Tensor) -> Tensor:
        """Factor, broadcastable to ``x``, that turns a raw distance into a distance of network inputs."""
        if not self.normalised:
            return torch.ones([1] * x.ndim, device=x.device)
        return 1.0 / self._affine(x)[1]

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest valid network input, each broadcastable to ``x``."""
        low = torch.full([1] * x.ndim, self.low, device=x.device)
        high = torch.full([1] * x.ndim, self.high, device=x.device)
        if not self.normalised:
            return low, high
        mean, std = self._affine(x)
        return (low - mean) / std, (high - mean) / std

    def clamp(self, x: Tensor) -> Tensor:
        """Network inputs moved to the nearest point of the valid box."""
        low, high = self.bounds(x)
        return torch.minimum(torch.maximum(x, low), high)

    def check(self, x: Tensor, name: str = "inputs", tolerance: float = 1e-4) -> None:
        """Raise where a network input lies outside the valid box.

        Args:
            x: Network inputs.
            name: What the error calls them.
            tolerance: How far outside a raw value may lie (rounding of a normalised input).

        Raises:
            ValueError: If a value is not finite or, back in raw units, outside ``[low, high]``.

        """
        if not torch.isfinite(x).all():
            raise ValueError(f"Expected `{name}` to be finite, but got NaN or infinite values.")
        raw = self.to_raw(x.float())
        smallest, largest = raw.min().item(), raw.max().item()
        if smallest < self.low - tolerance or largest > self.high + tolerance:
            raise ValueError(
                f"Expected `{name}` to lie in [{self.low}, {self.high}] in raw units, but got values in"
                f" [{smallest:.4g}, {largest:.4g}]. {_hint(smallest, largest)}"
            )


def _hint(smallest: float, largest: float) -> str:
    """What the user may have to say, from the range of the values."""
    if smallest >= 0.0 and 2.0 < largest <= 255.0:
        words, space = "Are they bytes? Divide them by 255, or", "InputSpace(low=0.0, high=255.0)"
    else:
        words, space = "Are the data normalised? Then", "InputSpace(low, high, mean, std)"
    return f"{words} state `{space}` as the `input_space` of the data module."
