"""The search by Ray Tune: a grid, a trial that fails, and a folder that is taken up again."""

import signal
from dataclasses import replace

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_trust.recipes.prompting.ray_search import search_with_ray
from lightning_trust.recipes.prompting.vp_trial import SearchPlan

ray = pytest.importorskip("ray")
pytest.importorskip("ray.tune")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Workers of this machine; nothing is left at home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        for number, handler in handlers.items():
            signal.signal(number, handler)
        yield
        ray.shutdown()


@pytest.mark.timeout(400)
def test_a_grid_with_a_trial_that_fails_is_searched_and_taken_up_again(cluster, tmp_path):
    plan = SearchPlan(
        values={"mapping": ["fully", "frequency", "iterative"], "lr": [None]},
        sampler="grid",
        pruner=None,
        mode="max",
        min_epochs=1,
        max_epochs=2,
        n_trials=3,
        storage=str(tmp_path),
        seed=0,
        fingerprint="a space",
        resources={"cpu": 1},
    )

    def objective(choices, report):
        assert choices["lr"] is None
        if choices["mapping"] == "frequency":
            raise RuntimeError("out of memory")
        score = {"fully": 0.5, "iterative": 0.2}[choices["mapping"]]
        for epoch in (1, 2):
            report(epoch, score * epoch)
        return score * 2

    found = {outcome.choices["mapping"]: outcome for outcome in search_with_ray(objective, plan)}
    assert {name: outcome.state for name, outcome in found.items()} == {
        "fully": "complete",
        "frequency": "failed",
        "iterative": "complete",
    }
    assert (found["fully"].value, found["iterative"].value) == (1.0, 0.4)
    assert (found["fully"].epochs, found["frequency"].epochs) == (2, 0)
    assert "out of memory" in found["frequency"].error
    # nothing runs anew: what was measured is what stands in the folder
    again = {outcome.choices["mapping"]: outcome for outcome in search_with_ray(objective, plan)}
    assert {name: outcome.seconds for name, outcome in again.items()} == {
        name: outcome.seconds for name, outcome in found.items()
    }
    with pytest.raises(MisconfigurationException, match="holds those of another one"):
        search_with_ray(objective, replace(plan, fingerprint="another space"))
