"""The user's LightningModule: finding its network, wrapping its methods, and taking back all that was set on it."""

from __future__ import annotations

import difflib
import enum
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn


class _Missing(enum.Enum):
    # a member of an enumeration stays itself in copies and pickles
    MISSING = enum.auto()


# where a host carries what is attached to it; core/step.py fills it
ATTACHMENT = "_lightning_trust"


def overrides(host: nn.Module, method: str) -> bool:
    """Whether the user's class, or the user's instance, brings a method of its own in place of LightningModule's."""
    # by name, so that hosts of the `pytorch_lightning` package are understood as well; the last, for users have classes
    # of that name too
    base = next((cls for cls in reversed(type(host).__mro__) if cls.__name__ == "LightningModule"), object)
    own = getattr(type(host), method, None) is not getattr(base, method, None)
    return own or method in host.__dict__


def close_names(name: str, known: Mapping[str, Any] | list[str], count: int = 5) -> str:
    """Words for an error: the known names nearest to one that was not found."""
    near = difflib.get_close_matches(name, list(known), n=count, cutoff=0.4) or list(known)[:count]
    return ", ".join(f"'{other}'" for other in near) if near else "none"


def plain_name(name: str) -> str:
    """Name of a parameter or sub-module without what ``torch.compile`` puts in between."""
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")


def named_parameters(host: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a host by plain name, each once where it is tied."""
    return {plain_name(name): parameter for name, parameter in host.named_parameters()}


def find_network(host: nn.Module, name: str | None = None) -> nn.Module:
    """The network of a host: the named sub-module, else the one child that holds all parameters, else the host.

    Args:
        host: The user's LightningModule.
        name: Dotted name of the sub-module; ``""`` for the host itself; None to find it.

    Raises:
        ValueError: If no sub-module has the name, or the host itself is meant but has no ``forward``.

    """
    if name:
        modules = {plain_name(key): module for key, module in host.named_modules() if key}
        if name not in modules:
            raise ValueError(
                f"Expected argument `network` to name a sub-module of {type(host).__name__}, but got '{name}'."
                f" Close names: {close_names(name, modules)}."
            )
        return modules[name]
    if name is None:
        # what a callback put beside the network is no part of it
        added = getattr(host.__dict__.get(ATTACHMENT), "parts", {})
        children = {key: child for key, child in host.named_children() if key not in added}
        held = [{id(parameter) for parameter in child.parameters()} for child in children.values()]
        others = [parameter for part in added for parameter in host.get_submodule(part).parameters()]
        every = {id(parameter) for parameter in host.parameters()} - {id(parameter) for parameter in others}
        for child, own in zip(children.values(), held, strict=True):
            if every and own == every:
                return child
    if not overrides(host, "forward"):
        raise ValueError(
            f"Expected {type(host).__name__} to have one child that holds all parameters, or a `forward`, but got"
            f" neither. Pass `network='<name>'` with one of {close_names('network', dict(host.named_children()))}."
        )
    return host


class WrappedMethod:
    """One method of a host, with a list of wrappers around it.

    Wrappers can be taken away in any order; when the last one goes, the host's instance attribute of that name is what
    it was before (absent, or the user's own patch). The wrapped method is bound to the host that holds it, so that a
    deep copy of the host calls itself.
    """

    def __init__(self, host: nn.Module, name: str) -> None:
        self.name = name
        self.instance: Any = host.__dict__.get(name, _Missing.MISSING)
        original = getattr(host, name)
        if isinstance(original, types.MethodType) and original.__self__ is host:
            self.target: Callable[..., Any] = original.__func__
            template: Any = original.__func__
        else:
            # a patch of the user's that is no bound method: it is called as it is
            self.target = functools.partial(_without_self, original)
            template = original
        self.wrappers: list[tuple[int, Callable[..., Any]]] = []

        @functools.wraps(template)
        def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            attachment = self.__dict__[ATTACHMENT]
            wrapped = attachment.methods[name]
            return (wrapped if attachment.live else wrapped.target)(self, *args, **kwargs)

        # Lightning looks at the signature (through __wrapped__) and at the name
        method.__name__ = name
        object.__setattr__(host, name, types.MethodType(method, host))

    def __call__(self, host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Call the wrappers, outermost first, around the original method."""
        call = functools.partial(self.target, host)
        for _, wrapper in reversed(self.wrappers):
            call = functools.partial(wrapper, host, call)
        return call(*args, **kwargs)

    def add(self, wrapper: Callable[..., Any], order: int = 0) -> None:
        """Add ``wrapper(host, call, *args)``; of two, the one with the lower order is outside."""
        self.wrappers.append((order, wrapper))
        self.wrappers.sort(key=lambda entry: entry[0])

    def bare(self) -> WrappedMethod:
        """The same method without wrappers, for a copy of the host."""
        twin = object.__new__(WrappedMethod)
        twin.__dict__.update(self.__dict__, wrappers=[])
        return twin

    def restore(self, host: nn.Module) -> None:
        """Give the host back the instance attribute that it had."""
        if self.instance is _Missing.MISSING:
            host.__dict__.pop(self.name, None)
        else:
            object.__setattr__(host, self.name, self.instance)


def _without_self(function: Callable[..., Any], _host: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)
