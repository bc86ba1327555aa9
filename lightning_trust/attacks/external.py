"""Attacks of torchattacks and foolbox, under the rules of the attacks here."""

from __future__ import annotations

import copy
import importlib
import inspect
import random
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_trust.attacks.attack import Attack, Problem
from lightning_trust.core.randomness import derived_seed, untouched_random_state
from lightning_trust.core.space import InputSpace
from lightning_trust.functional.adversarial.projections import Norm, norm_of

Protocol = Literal["torchattacks", "foolbox"]


class ExternalAttack(Attack):
    r"""An attack of ``torchattacks`` or ``foolbox``, run as the attacks of this package are.

    The attack sees a module in eval mode, on the device of the inputs, that takes float32 and gives float32 whatever
    the precision of the run; it cannot reach modes, flags or ``.grad`` of the network behind. Inputs are handed over
    as the library wants them: in [0, 1] for torchattacks, in raw units with their bounds for foolbox, and ``eps`` with
    them. Its random numbers come from the global generators, which are seeded from the draws of the call and put back.
    What comes back is checked: its shape, that it is finite and in the box, and, where ``eps`` is given, its norm.

    Neither library is a dependency; a class path is imported when the attack is first called.

    Args:
        attack: Class path, such as ``"torchattacks.PGD"`` or ``"foolbox.attacks.LinfPGD"``, a class, or an attack that
            was made: of torchattacks with any model, which is replaced in a copy.
        arguments: Arguments of the class, in the library's own units (steps of torchattacks in a box of width one).
        eps: Radius in raw units. For torchattacks it becomes the argument ``eps``, for foolbox ``epsilons``; None for
            attacks that look for the smallest perturbation, or where ``arguments`` say it.
        norm: Norm in which ``eps`` is checked.
        targeted: Whether to reach the classes given as ``target``.
        space: Box and normalisation of the inputs.
        batch_size: Size of the parts in which a batch is attacked.

    Raises:
        ValueError: If an argument is out of its range, or what comes back breaks a rule.
        MisconfigurationException: If the attack cannot be imported, or follows neither protocol.

    Example:
        >>> attack = ExternalAttack("torchattacks.PGD", {"steps": 20, "alpha": 0.01}, eps=0.1)
        >>> attack.eps, attack.norm
        (0.1, 'linf')

    """

    def __init__(
        self,
        attack: str | Callable[..., Any],
        arguments: Mapping[str, Any] | None = None,
        eps: float | None = None,
        norm: Norm = "linf",
        targeted: bool = False,
        space: InputSpace | None = None,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(eps, norm, targeted, "ce", "eval", space, batch_size)
        if not callable(attack) and not (isinstance(attack, str) and "." in attack):
            raise ValueError(
                "Expected argument `attack` to be a class path such as 'torchattacks.PGD', a class or an attack, but"
                f" got {attack!r}."
            )
        made = not isinstance(attack, (str, type))
        if made and arguments:
            raise ValueError(
                "Expected argument `arguments` only with a class or its path, but got an attack that is made already"
                f" and {dict(arguments)}."
            )
        if eps is not None and "eps" in (arguments or {}):
            raise ValueError(
                f"Expected the radius either as `eps`, in raw units, or in `arguments`, but got both: {eps} and"
                f" {(arguments or {})['eps']}."
            )
        self.attack = attack
        self.arguments = dict(arguments or {})

    def _perturb(self, problem: Problem) -> Tensor:
        made = load(self.attack) if isinstance(self.attack, str) else self.attack
        run = {"torchattacks": self._torchattacks, "foolbox": self._foolbox}[protocol_of(made)]
        seed = derived_seed("external", problem.draws.seed, *problem.draws.keys[:1].tolist())
        with untouched_random_state():
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            found = run(made, problem)
        return self._checked(problem, found)

    def _torchattacks(self, made: Any, problem: Problem) -> Tensor:
        low, width = problem.low, problem.high - problem.low
        inputs = ((problem.inputs - low) / width).float().clamp(0.0, 1.0)
        network = _Seen(lambda unit: problem.model(low + width * unit.to(problem.inputs.dtype)), inputs)
        radius = None if self.eps is None else self.eps / width
        if isinstance(made, type):
            arguments = self.arguments if radius is None else {**self.arguments, "eps": radius}
            attack = made(network, **arguments)
        else:
            attack = copy.deepcopy(made, {id(made.model): network}) if hasattr(made, "model") else copy.copy(made)
            attack.set_model(network)
            if radius is not None:
                if not hasattr(attack, "eps"):
                    raise ValueError(f"{type(made).__name__} has no `eps`: expected `eps=None`, but got {self.eps}.")
                if any(hasattr(type(part), "set_model") for part in vars(attack).values()):
                    raise ValueError(
                        f"{type(made).__name__} is made of attacks that have their radii already: expected `eps=None`"
                        f" or the class instead of an attack that is made, but got eps={self.eps}."
                    )
                attack.eps = radius
        if hasattr(attack, "set_device"):
            attack.set_device(inputs.device)
        labels = problem.targets
        if problem.goal is not None:
            attack.set_mode_targeted_by_label(quiet=True)
            labels = problem.goal
        found = attack(inputs, labels)
        if not isinstance(found, Tensor) or found.shape != inputs.shape:
            return self._refuse(found, inputs)
        return low + width * found.detach().to(problem.inputs.dtype)

    def _foolbox(self, made: Any, problem: Problem) -> Tensor:
        inputs = problem.inputs.float()
        network = _Seen(lambda raw: problem.model(raw.to(problem.inputs.dtype)), inputs)
        seen = load("foolbox.PyTorchModel")(network, bounds=(problem.low, problem.high), device=inputs.device)
        attack = made(**self.arguments) if isinstance(made, type) else made
        criterion: Any = problem.targets
        if problem.goal is not None:
            criterion = load("foolbox.criteria.TargetedMisclassification")(problem.goal)
        _, found, _ = attack(seen, inputs, criterion, epsilons=self.eps)
        if not isinstance(found, Tensor) or found.shape != inputs.shape:
            return self._refuse(found, inputs)
        return found.detach().to(problem.inputs.dtype)

    def _refuse(self, found: Any, inputs: Tensor) -> Tensor:
        got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"Expected {self.attack!r} to return inputs of shape {tuple(inputs.shape)}, but got {got}.")

    def _checked(self, problem: Problem, found: Tensor) -> Tensor:
        if not bool(torch.isfinite(found).all()):
            raise ValueError(f"Expected {self.attack!r} to return finite inputs, but got NaN or infinite values.")
        width = problem.high - problem.low
        inside = problem.clip(found)
        outside = (found - inside).abs().max().item() if found.numel() else 0.0
        if outside > 1e-4 * width:
            raise ValueError(
                f"Expected {self.attack!r} to return inputs in [{problem.low:g}, {problem.high:g}], but some lie"
                f" {outside:.3g} outside."
            )
        if self.eps is not None and len(found):
            largest = norm_of(inside - problem.inputs, self.norm).max().item()
            if largest > self.eps * (1.0 + 1e-3) + 1e-6 * width:
                raise ValueError(
                    f"Expected {self.attack!r} to stay within eps={self.eps:g} in {self.norm}, but it went"
                    f" {largest:.4g} far. Is `norm` that of the attack?"
                )
        return inside


class _Seen(nn.Module):
    """What an attack of another library sees of a network: a module of one parameter, in eval mode, in float32."""

    def __init__(self, model: Callable[[Tensor], Tensor], like: Tensor) -> None:
        super().__init__()
        # no sub-module: whoever calls train() or zero_grad() on this does not reach the network
        self._model = model
        # libraries ask the first parameter for the device
        self.place = nn.Parameter(torch.zeros(1, device=like.device), requires_grad=False)
        self.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs in float32."""
        return self._model(inputs).float()


def load(path: str) -> Any:
    """The class at a path.

    Raises:
        MisconfigurationException: If it cannot be imported.

    """
    module, name = path.rsplit(".", 1)
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise MisconfigurationException(
            f"Expected argument `attack` to be the path of a class that can be imported, but got {path!r}: {error}."
            f" Is {module.split('.')[0]} installed?"
        ) from error


def protocol_of(attack: Any) -> Protocol:
    """How an attack is called: by its model and then (inputs, labels), or by (model, inputs, criterion, epsilons).

    Raises:
        MisconfigurationException: If it is neither.

    """
    kind = attack if isinstance(attack, type) else type(attack)
    if hasattr(kind, "set_model"):
        return "torchattacks"
    if "epsilons" in inspect.signature(kind.__call__).parameters:
        return "foolbox"
    raise MisconfigurationException(
        f"Expected an attack that is called as those of torchattacks (it has `set_model`) or foolbox (its call takes"
        f" `epsilons`), but got {kind.__module__}.{kind.__qualname__}."
    )
