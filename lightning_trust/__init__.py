"""Trustworthy machine learning on an unchanged LightningModule.

The rooms are imported at first access (PEP 562), so that ``import lightning_trust`` costs next to nothing:

>>> import lightning_trust
>>> lightning_trust.nn.SmallCNN.__name__
'SmallCNN'

"""

from __future__ import annotations

import importlib
from types import ModuleType

__version__ = "0.1.0"
__all__ = ["__version__"]


def __getattr__(name: str) -> ModuleType:
    # importlib and doctest probe for private names; none of them is a room
    if not name.startswith("_"):
        path = f"{__name__}.{name}"
        try:
            return importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name != path:  # the room is there, but something that it imports is not
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    import pkgutil

    return sorted({*globals(), *(room.name for room in pkgutil.iter_modules(__path__))})
