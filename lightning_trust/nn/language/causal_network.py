"""Causal language models of transformers, with adapters of peft."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_trust.nn.language.libraries import language_library

Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class LoRA:
    r"""A low-rank adapter of the linear layers of a network: :math:`W x + \frac{\alpha}{r} B A x`.

    Only :math:`A` (random) and :math:`B` (zero at first) are trained.

    Paper: LoRA: Low-Rank Adaptation of Large Language Models (ICLR 2022, arXiv:2106.09685).

    Args:
        r: Rank of :math:`B A`.
        alpha: The scale :math:`\alpha`.
        dropout: Share of the inputs of :math:`A` that are dropped in training, in [0, 1).
        target_modules: Names of the layers, or their last parts, such as ``["q_proj", "v_proj"]``; those that peft
            knows for the architecture if None.

    Raises:
        ValueError: If an argument is out of its range.

    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"Expected argument `r` to be an integer of at least 1, but got {self.r!r}.")
        if not self.alpha > 0.0:
            raise ValueError(f"Expected argument `alpha` to be positive, but got {self.alpha}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"Expected argument `dropout` to be in [0, 1), but got {self.dropout}.")
        if self.target_modules is not None and not self.target_modules:
            raise ValueError("Expected argument `target_modules` to name a layer, or to be None, but got [].")


def create_causal_network(
    model: str | None = None,
    config: Mapping[str, Any] | None = None,
    lora: LoRA | None = None,
    dtype: Precision = "float32",
    gradient_checkpointing: bool = False,
) -> nn.Module:
    """A causal language model of transformers.

    Args:
        model: Name on the hub of Hugging Face, a folder, or a checkpoint (``.ckpt``) of a ``CausalLanguageModel``
            without an adapter; its weights are loaded.
        config: In place of ``model``: what makes a network of random weights, ``model_type`` and the arguments of its
            configuration, such as ``{"model_type": "llama", "vocab_size": 258, "hidden_size": 64}``.
        lora: An adapter; all other weights are frozen then. None for none.
        dtype: What the weights are kept in.
        gradient_checkpointing: Whether the backward pass computes activations anew rather than keeping them.

    Returns:
        ``network(input_ids, attention_mask=...).logits``; a ``peft.PeftModel`` where there is an adapter.

    Raises:
        ModuleNotFoundError: If transformers, or peft, is missing; the error names the extra.
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If ``config`` has no ``model_type``, a checkpoint is none of a ``CausalLanguageModel`` or has an
            adapter, or peft finds no layer of ``lora.target_modules``.
        MisconfigurationException: If not exactly one of ``model`` and ``config`` is given.

    Example:
        >>> network = create_causal_network(config=dict(model_type="gpt2", vocab_size=9, n_embd=8, n_layer=1, n_head=2))
        >>> network(torch.zeros(2, 5, dtype=torch.long)).logits.shape
        torch.Size([2, 5, 9])

    """
    if (model is None) == (config is None):
        raise MisconfigurationException(
            "Expected one of the arguments `model`, a name or a folder, and `config`, a network of random weights,"
            f" but got model={model!r} and config={config!r}."
        )
    if dtype not in get_args(Precision):
        raise ValueError(f"Expected argument `dtype` to be one of {list(get_args(Precision))}, but got {dtype!r}.")
    transformers = language_library("transformers", "A causal language model")
    kind = getattr(torch, dtype)
    network: nn.Module
    if model is not None and model.endswith(".ckpt"):
        network = _from_checkpoint(model, dtype)
    elif model is not None:
        network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=kind)
    else:
        arguments = dict(config or {})
        if "model_type" not in arguments:
            raise ValueError(f"Expected argument `config` to have the key 'model_type', but got {sorted(arguments)}.")
        made = transformers.AutoConfig.for_model(arguments.pop("model_type"), **arguments)
        network = transformers.AutoModelForCausalLM.from_config(made, dtype=kind)
    if gradient_checkpointing:
        # reentrant checkpoints want inputs that require a gradient, which frozen embeddings do not give
        settings = {"use_reentrant": False}
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)  # type: ignore[operator]
    # transformers hands out networks in eval mode
    return (network if lora is None else with_lora(network, lora)).train()


def _from_checkpoint(path: str, dtype: Precision) -> nn.Module:
    if not Path(path).is_file():
        raise FileNotFoundError(f"Expected argument `model` to be a checkpoint, but '{path}' does not exist.")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    arguments = saved.get("hyper_parameters", {})
    if not arguments.get("config") or arguments.get("lora"):
        found = "one with an adapter" if arguments.get("lora") else f"the arguments {sorted(arguments)}"
        raise ValueError(
            f"Expected argument `model` to be a checkpoint of a CausalLanguageModel without an adapter, but got {found}"
            f" in '{path}'."
        )
    network = create_causal_network(config=arguments["config"], dtype=dtype)
    prefix = "network."
    state = saved["state_dict"].items()
    network.load_state_dict({name[len(prefix) :]: value for name, value in state if name.startswith(prefix)})
    return network


def with_lora(network: nn.Module, lora: LoRA) -> nn.Module:
    """A network with an adapter, which alone requires a gradient; the layers are replaced in place.

    Args:
        network: The network.
        lora: The adapter.

    Raises:
        ModuleNotFoundError: If peft is missing; the error names the extra.
        ValueError: If peft finds no layer of the names.

    """
    peft = language_library("peft", "LoRA")
    settings = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM" if hasattr(network, "prepare_inputs_for_generation") else None,
    )
    return peft.get_peft_model(network, settings)


def find_adapter(host: nn.Module) -> nn.Module | None:
    """The outermost ``peft.PeftModel`` inside a module, or None; peft is not imported for it."""
    import sys

    peft: Any = sys.modules.get("peft")
    # a network cannot be one where nobody has imported the library
    if peft is None:
        return None
    return next((module for module in host.modules() if isinstance(module, peft.PeftModel)), None)
