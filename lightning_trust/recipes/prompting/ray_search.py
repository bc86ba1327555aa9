"""Trials of AutoVP side by side, on a machine or a cluster, by Ray Tune."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import random
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn

from lightning_trust.core.files import read_json, write_json
from lightning_trust.recipes.prompting.vp_trial import Objective, SearchPlan, TrialOutcome

_NAME = "autovp"
_KIND = "lightning_trust.autovp_search"
_VERSION = 1


def search_with_ray(objective: Objective, plan: SearchPlan) -> list[TrialOutcome]:
    """Run the trials of a plan by Ray Tune, and give all that there are.

    Trials run in processes of their own: what ``objective`` holds is sent to them. A cluster that is running is used
    (``RAY_ADDRESS``, or ``ray.init`` before); otherwise one is started on this machine and stopped again.

    Args:
        objective: Choices and where to report -> the metric at the end.
        plan: What to run; ``storage`` is a folder that all machines see.

    Raises:
        ImportError: If Ray Tune is not installed.
        MisconfigurationException: If the folder holds trials of another search.

    """
    ray, tune = _ray()
    names = list(plan.values)
    folder = Path(plan.storage or tempfile.mkdtemp(prefix=f"{_NAME}-")).resolve()
    _same_search(folder, plan)

    def chosen(config: Mapping[str, Any]) -> dict[str, Any]:
        # a choice is a place in the list: lists may hold anything
        return {name: plan.values[name][config[name]] for name in names}

    def flat(config: Mapping[str, Any]) -> dict[str, Any]:
        return dict(zip(names, config["grid"], strict=True)) if "grid" in config else dict(config)

    def run(config: Mapping[str, Any]) -> None:
        done = 0

        def report(epochs: int, value: float) -> bool:
            nonlocal done
            done = epochs
            # Ray ends the trial itself
            tune.report({"value": value, "epochs": epochs})
            return False

        try:
            objective(chosen(flat(config)), report)
        except Exception as error:
            # a trial that ends with an error forgets what was chosen
            tune.report({"value": math.nan, "epochs": done, "error": f"{type(error).__name__}: {error}"})

    places = {name: list(range(len(values))) for name, values in plan.values.items()}
    searcher = None
    if plan.sampler == "grid":
        combinations = [list(combination) for combination in itertools.product(*places.values())]
        random.Random(plan.seed).shuffle(combinations)  # noqa: S311  (an order of trials, no secret)
        space: dict[str, Any] = {"grid": tune.grid_search(combinations[: plan.n_trials])}
    else:
        space = {name: tune.choice(some) for name, some in places.items()}
        searcher = _searcher(plan)
    with _started(ray):
        trainable = tune.with_resources(run, dict(plan.resources or {"cpu": 2}))
        path = str(folder / _NAME)
        if tune.Tuner.can_restore(path):
            tuner = tune.Tuner.restore(path, trainable, resume_unfinished=True, param_space=space)
        else:
            tuner = tune.Tuner(
                trainable,
                param_space=space,
                tune_config=tune.TuneConfig(
                    metric="value",
                    mode=plan.mode,
                    search_alg=searcher,
                    scheduler=_scheduler(plan),
                    num_samples=1 if plan.sampler == "grid" else plan.n_trials,
                ),
                run_config=tune.RunConfig(name=_NAME, storage_path=str(folder), verbose=0),
            )
        results = tuner.fit()
        # a worker that was lost tells nothing, not even what was chosen
        told = [result for result in results if result.config]
        if len(told) < len(results):
            rank_zero_warn(f"AutoVP: {len(results) - len(told)} trials were lost with their workers, the rest counts.")
        return [_outcome(number, result, chosen(flat(result.config)), plan) for number, result in enumerate(told)]


def _ray() -> tuple[Any, Any]:
    try:
        import ray
        from ray import tune
    except ImportError as error:
        raise ImportError(
            "AutoVP with backend='ray' needs Ray Tune. Install it with `pip install lightning_trust[ray]`."
        ) from error
    return ray, tune


@contextmanager
def _started(ray: Any) -> Iterator[None]:
    # trials read the data from where this process stands
    key, running = "RAY_CHDIR_TO_TRIAL_DIR", ray.is_initialized()
    before = os.environ.get(key)
    os.environ[key] = "0"
    # Ray puts handlers of its own in their place and leaves them there
    caught = (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))
    handlers = {number: signal.getsignal(number) for number in caught}
    try:
        if not running:
            ray.init(log_to_driver=False, **({} if "RAY_ADDRESS" in os.environ else {"include_dashboard": False}))
        yield
    finally:
        if not running and ray.is_initialized():
            ray.shutdown()
        os.environ.pop(key)
        if before is not None:
            os.environ[key] = before
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _searcher(plan: SearchPlan) -> Any:
    if plan.sampler == "random":
        from ray.tune.search import BasicVariantGenerator

        return BasicVariantGenerator(random_state=plan.seed)
    from ray.tune.search.optuna import OptunaSearch

    return OptunaSearch(seed=plan.seed)


def _scheduler(plan: SearchPlan) -> Any:
    if plan.pruner is None:
        return None
    from ray.tune.schedulers import ASHAScheduler

    # the metric and its direction come from the TuneConfig
    return ASHAScheduler(
        time_attr="training_iteration", max_t=plan.max_epochs, grace_period=plan.min_epochs, reduction_factor=2
    )


def _same_search(folder: Path, plan: SearchPlan) -> None:
    wanted = hashlib.sha256(f"{plan.n_trials} {plan.fingerprint}".encode()).hexdigest()
    path = folder / f"{_NAME}.json"
    if not path.is_file():
        write_json(path, _KIND, _VERSION, {"fingerprint": wanted})
    elif read_json(path, _KIND, _VERSION)["fingerprint"] != wanted:
        raise MisconfigurationException(
            f"Expected argument `storage` to hold trials of this search, but {folder} holds those of another one:"
            " another space, other backbone weights, another metric or other epochs. Name another folder."
        )


def _outcome(number: int, result: Any, choices: dict[str, Any], plan: SearchPlan) -> TrialOutcome:
    metrics = result.metrics or {}
    value, epochs = metrics.get("value"), int(metrics.get("epochs", 0))
    value = None if value is None or math.isnan(value) else float(value)
    failed = result.error is not None or value is None
    return TrialOutcome(
        number,
        choices,
        "failed" if failed else "complete" if epochs >= plan.max_epochs else "pruned",
        value,
        epochs,
        float(metrics.get("time_total_s", 0.0)),
        metrics.get("error", None if result.error is None else str(result.error).strip().splitlines()[-1]),
    )
