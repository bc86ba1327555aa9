"""Language models."""

from __future__ import annotations

from lightning_trust.nn.language.causal_network import LoRA, create_causal_network, find_adapter, with_lora

__all__ = ["LoRA", "create_causal_network", "find_adapter", "with_lora"]
