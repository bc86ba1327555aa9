"""Trials of AutoVP one after the other, in this process, kept by Optuna."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_trust.recipes.prompting.vp_trial import Objective, SearchPlan, State, TrialOutcome

_STUDY = "autovp"
_FINGERPRINT = "fingerprint"
_ERROR, _EPOCHS = "error", "epochs"


def search_with_optuna(objective: Objective, plan: SearchPlan) -> list[TrialOutcome]:
    """Run the trials that a study does not have yet, and give all that it has.

    Every trial's sampler is seeded by the plan's seed and the trial's number, so that a search that is resumed draws
    what one in a single go would have drawn.

    Args:
        objective: Choices and where to report -> the metric at the end.
        plan: What to run.

    Raises:
        ImportError: If Optuna is not installed.
        MisconfigurationException: If the study in the storage is of another search; or what ``objective`` raises, if
            that is one.
        ValueError: If the storage is no file that can be told by its name.

    """
    optuna = _optuna()
    states = optuna.trial.TrialState
    # a value is a place in the list: lists may hold anything, and None
    places = {name: list(range(len(values))) for name, values in plan.values.items()}
    with _without_hints(optuna):
        study = optuna.create_study(
            storage=_storage(optuna, plan.storage),
            study_name=_STUDY,
            direction="maximize" if plan.mode == "max" else "minimize",
            pruner=_pruner(optuna, plan),
            load_if_exists=True,
        )
    _same_search(study, plan)

    def chosen(params: Mapping[str, int]) -> dict[str, Any]:
        return {name: values[params[name]] for name, values in plan.values.items()}

    def run(trial: Any) -> tuple[float | None, Any]:
        params = {name: trial.suggest_categorical(name, some) for name, some in places.items()}
        same = _same_choices(optuna, study, params)
        if same is not None:
            rank_zero_info(f"AutoVP drew the configuration of trial {same.number} again and takes its result.")
            trial.set_user_attr(_EPOCHS, same.user_attrs.get(_EPOCHS, 0))
            return float(same.value), states.COMPLETE
        pruned = False

        def report(epochs: int, value: float) -> bool:
            nonlocal pruned
            trial.report(value, epochs)
            trial.set_user_attr(_EPOCHS, epochs)
            pruned = pruned or (epochs < plan.max_epochs and bool(trial.should_prune()))
            return pruned

        try:
            value = objective(chosen(params), report)
        except MisconfigurationException:
            # as wrong in every other trial
            raise
        except Exception as error:
            words = f"{type(error).__name__}: {error}"
            trial.set_user_attr(_ERROR, words)
            rank_zero_warn(f"AutoVP: trial {trial.number} failed, the search goes on. {words}")
            return None, states.FAIL
        return (None, states.PRUNED) if pruned else (value, states.COMPLETE)

    while _finished(study) < plan.n_trials:
        study.sampler = _sampler(optuna, plan, places, len(study.trials))
        trial = study.ask()
        # a trial that is interrupted stays running in the storage: it counts for nothing, and a grid comes back to it
        value, state = run(trial)
        # the state of what is not a number is a failure
        study.tell(trial, value, state=states.FAIL if value != value else state)
    return [_outcome(optuna, trial, chosen) for trial in study.trials if trial.state.is_finished()]


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ImportError(
            "AutoVP with backend='optuna' needs Optuna. Install it with `pip install lightning_trust[tune]`."
        ) from error
    return optuna


@contextmanager
def _without_hints(optuna: Any) -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _storage(optuna: Any, path: str | None) -> Any:
    if path is None:
        return None
    file = Path(path)
    if file.suffix not in (".db", ".sqlite", ".sqlite3", ".journal", ".log"):
        raise ValueError(
            "Expected argument `storage` to be a file ending in .journal or .log (a journal), or in .db, .sqlite or"
            f" .sqlite3 (SQLite), but got {str(path)!r}."
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix in (".journal", ".log"):
        return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(file)))
    return optuna.storages.RDBStorage(f"sqlite:///{file.resolve()}")


def _pruner(optuna: Any, plan: SearchPlan) -> Any:
    if plan.pruner is None:
        return optuna.pruners.NopPruner()
    return optuna.pruners.SuccessiveHalvingPruner(min_resource=plan.min_epochs, reduction_factor=2)


def _sampler(optuna: Any, plan: SearchPlan, places: Mapping[str, list[int]], number: int) -> Any:
    if plan.sampler == "grid":

        class Grid(optuna.samplers.GridSampler):  # type: ignore[misc]
            def after_trial(self, *args: Any) -> None:
                """Nothing: the loop knows when the grid is done, and there is no `optimize` to stop."""

        # shuffled once, the same way for all trials
        return Grid(places, seed=plan.seed)
    kinds: dict[str, Callable[..., Any]] = {
        "tpe": optuna.samplers.TPESampler,
        "random": optuna.samplers.RandomSampler,
    }
    return kinds[plan.sampler](seed=plan.seed * 1_000_003 + number)


def _same_search(study: Any, plan: SearchPlan) -> None:
    wanted = hashlib.sha256(plan.fingerprint.encode()).hexdigest()
    found = study.user_attrs.get(_FINGERPRINT)
    if found is None and not study.trials:
        study.set_user_attr(_FINGERPRINT, wanted)
    elif found != wanted:
        raise MisconfigurationException(
            f"Expected argument `storage` to hold trials of this search, but {plan.storage} holds {len(study.trials)}"
            " of another one: another space, other backbone weights, another metric or other epochs. Name another file."
        )


def _same_choices(optuna: Any, study: Any, params: Mapping[str, int]) -> Any:
    complete = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    return next((trial for trial in complete if trial.params == params), None)


def _finished(study: Any) -> int:
    return sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))


def _outcome(optuna: Any, trial: Any, chosen: Callable[[Mapping[str, int]], dict[str, Any]]) -> TrialOutcome:
    states: dict[Any, State] = {
        optuna.trial.TrialState.COMPLETE: "complete",
        optuna.trial.TrialState.PRUNED: "pruned",
    }
    reported = trial.intermediate_values
    value = trial.value if trial.value is not None else (reported[max(reported)] if reported else None)
    return TrialOutcome(
        trial.number,
        chosen(trial.params),
        states.get(trial.state, "failed"),
        None if value is None else float(value),
        int(trial.user_attrs.get(_EPOCHS, 0)),
        trial.duration.total_seconds() if trial.duration else 0.0,
        trial.user_attrs.get(_ERROR),
    )
