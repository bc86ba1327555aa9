"""Language models."""

from __future__ import annotations

from lightning_trust.callbacks.language.save_adapter import SaveAdapter

__all__ = ["SaveAdapter"]
