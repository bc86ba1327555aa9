"""Libraries of the extra ``language``, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any


def language_library(name: str, what: str) -> Any:
    """Import ``transformers`` or ``peft``.

    Args:
        name: Name of the library.
        what: What needs it, for the error.

    Raises:
        ModuleNotFoundError: If it is not installed; the error names the extra.

    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ModuleNotFoundError(f'{what} needs {name}: pip install "lightning_trust[language]"', name=name) from error
