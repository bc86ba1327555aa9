"""Records that look like a run's."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_trust.core.records import RunRecord


@pytest.fixture
def make_record():
    def make(
        label: str,
        role: str = "method",
        hash: str = "one",
        scenario: str = "random 10 %",
        seed: int | None = 1,
        before: dict[str, float] | None = None,
        **changes: Any,
    ) -> RunRecord:
        metrics = {"UA": 8.0, "RA": 99.0, "TA": 91.0, "MIA": 12.0}
        metrics.update({name: changes.pop(name) for name in metrics if name in changes})
        start = None if role == "retrain" else before or {"UA": 1.0, "RA": 99.5, "TA": 92.0, "MIA": 3.0}
        counts = {"forget": [1, 2, 7], "test": [3, 2, 15]}
        values: dict[str, Any] = {
            "label": label,
            "role": role,
            "scenario": scenario,
            "seed": seed,
            "forget": {"hash": hash, "spec": "ForgetRandom(fraction=0.1)", "forget": 10, "retain": 9000, "test": 20},
            "metrics": metrics,
            "before": start,
            "seconds": {"steps": 4.0, "passes": 0.5, "fit": 6.0},
            "confidence": {
                "edges": [0.0, 0.3, 0.6, 1.0],
                "before": None if start is None else {"forget": [0, 0, 10], "test": [3, 2, 15]},
                "after": counts,
            },
            "membership": {"feature": "confidence", "rows": 20, "note": "RBF SVC"},
            "sparsity": None,
            "parameters": 1234,
            "hardware": {"cpu": "A CPU", "cores": 2, "accelerator": None, "memory_gib": 8.0},
            "versions": {"python": "3.12", "torch": "2.15"},
            "created": "2026-11-23T10:00:00+00:00",
        }
        return RunRecord(**{**values, **changes})

    return make
