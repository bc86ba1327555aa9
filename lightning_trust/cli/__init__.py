"""The command line ``lightning-trust``."""

from __future__ import annotations

from lightning_trust.cli.commands import main

__all__ = ["main"]
