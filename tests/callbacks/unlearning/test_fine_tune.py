import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_trust.callbacks import FineTune, L1Sparse, RandomLabel
from lightning_trust.datamodules import ForgetRandom, ForgetSplit
from tests.conformance import CallbackConformance, Data, Host, forget_random


class TestConformance(CallbackConformance):
    callback = FineTune
    wrap_data = staticmethod(forget_random)

    def test_is_plain_training_on_the_retain_set(self, tmp_path):
        """By hand, in the order of the split: nothing of the forget set, and nothing else changed."""
        found, _, _ = self.fitted(tmp_path)
        host = Host()
        (optimizer,), (scheduler,) = host.configure_optimizers()
        split = self.data()
        split.setup("fit")
        loader = split.train_dataloader()
        for epoch in range(self.epochs):
            loader.sampler.set_epoch(epoch)
            for inputs, targets in loader:
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(host(inputs), targets).backward()
                optimizer.step()
            scheduler.step()
        assert all(torch.equal(value, found.state_dict()[name]) for name, value in host.state_dict().items())

    def test_needs_a_split(self, tmp_path):
        with pytest.raises(
            MisconfigurationException,
            match=(
                r"^FineTune needs to know what is to be forgotten, but the run has Data\. Pass"
                r" `datamodule=ForgetSplit\(.*`data_wrapper: \{class_path: ForgetSplit, \.\.\.\}` in YAML\.$"
            ),
        ):
            self.trainer(tmp_path, [FineTune()]).fit(Host(), Data())
        with pytest.raises(MisconfigurationException, match="but the run has no data module"):
            self.trainer(tmp_path, [FineTune()]).fit(Host(), Data().train_dataloader())

    def test_contradicting_feed(self, tmp_path):
        split = ForgetSplit(Data(), ForgetRandom(fraction=0.25), feed="mixed")
        with pytest.raises(MisconfigurationException, match=r"^FineTune trains on feed='retain', but ForgetSplit got"):
            self.trainer(tmp_path, [FineTune()]).fit(Host(), split)

    @pytest.mark.parametrize("other", [RandomLabel, L1Sparse])
    def test_two_unlearners(self, tmp_path, other):
        name = other.__name__
        with pytest.raises(
            MisconfigurationException,
            match=(
                rf"^FineTune and {name} both want to be the unlearning method of the run; a run can have one\."
                rf"|^FineTune and {name} both want to decide the order of the data; a run can have one\."
            ),
        ):
            self.fitted(tmp_path, other())

    def test_a_failed_run_leaves_no_feed(self, tmp_path):
        split = self.data()
        with pytest.raises(MisconfigurationException):
            self.trainer(tmp_path, [RandomLabel(), FineTune()]).fit(Host(), split)
        self.trainer(tmp_path, []).fit(Host(), split)
        assert split.current_feed == "retain"
