from tests.conformance import CallbackConformance
from lightning_trust.callbacks import OneShotPruning


class TestConformance(CallbackConformance):
    callback = OneShotPruning
    arguments = {"sparsity": 0.5, "method": "random", "scope": "erk"}
