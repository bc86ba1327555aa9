from tests.conformance import CallbackConformance
from lightning_trust.callbacks import SalUn
from lightning_trust.datamodules import ForgetRandom, ForgetSplit


class TestConformance(CallbackConformance):
    callback = SalUn
    arguments = {"ratio": 0.5}

    @staticmethod
    def wrap_data(data):
        return ForgetSplit(data, ForgetRandom(fraction=0.25))
