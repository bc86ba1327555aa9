import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from safetensors.torch import save_file
from torch import nn

from lightning_trust.callbacks import ExactResume, LoadWeights, OneShotPruning
from lightning_trust.core.step import BuildPhase, HostCallback
from tests.conformance import CallbackConformance, Data, Host, Kill
from tests.two_ranks import QUIET, fit_on_two_ranks


def trained():
    host = Host()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in host.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return host


class TestConformance(CallbackConformance):
    callback = LoadWeights

    def arguments_in(self, folder):
        torch.save(trained().state_dict(), folder / "trained.pt")
        return {"checkpoint": str(folder / "trained.pt")}


class Start(Callback):
    """The weights with which training starts."""

    def on_train_start(self, trainer, pl_module):
        self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}


def start_of(checkpoint, host=None, *others, **kwargs):
    start = Start()
    callbacks = [LoadWeights(str(checkpoint)), *others, start]
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 1, "callbacks": callbacks, **kwargs})
    trainer.fit(Host() if host is None else host, datamodule=Data())
    return start.weights


def assert_trained(weights):
    for name, value in trained().state_dict().items():
        assert torch.equal(weights[name], value), name


def saved(folder, kind):
    path, host = folder / "run.ckpt", trained()
    if kind == "lightning":
        trainer = pl.Trainer(**{**QUIET, "max_epochs": 0})
        trainer.fit(host, datamodule=Data())
        trainer.save_checkpoint(path)
    elif kind == "state dict":
        torch.save(host.state_dict(), path)
    elif kind == "safetensors":
        path = folder / "run.safetensors"
        save_file(host.state_dict(), path)
    elif kind == "compiled":
        host.net = torch.compile(host.net, backend="eager")
        torch.save(host.state_dict(), path)
    return path


@pytest.mark.parametrize("kind", ["lightning", "state dict", "safetensors", "compiled"])
def test_kinds_of_files(tmp_path, kind):
    assert_trained(start_of(saved(tmp_path, kind)))


class InSetup(Host):
    def __init__(self):
        super().__init__()
        del self.net

    def setup(self, stage):
        self.build()

    def build(self):
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.0), nn.Linear(16, 3))


class InConfigureModel(InSetup):
    def setup(self, stage):
        return

    def configure_model(self):
        if not hasattr(self, "net"):
            self.build()


@pytest.mark.parametrize("host", [InSetup, InConfigureModel])
def test_hosts_that_build_their_network_late(tmp_path, host):
    assert_trained(start_of(saved(tmp_path, "lightning"), host()))


def test_compiled_hosts(tmp_path):
    path = saved(tmp_path, "lightning")
    host = Host()
    host.net = torch.compile(host.net, backend="eager")
    weights = start_of(path, host)
    assert_trained({name.replace("_orig_mod.", ""): value for name, value in weights.items()})
    assert_trained(start_of(path, torch.compile(Host(), backend="eager")))


def test_buffers_and_other_types_are_loaded(tmp_path):
    class WithBuffer(Host):
        def __init__(self, value):
            super().__init__()
            self.register_buffer("mean", torch.full((3,), value))

    torch.save({name: value.half() for name, value in WithBuffer(2.0).state_dict().items()}, tmp_path / "half.pt")
    weights = start_of(tmp_path / "half.pt", WithBuffer(1.0))
    assert weights["mean"].tolist() == [2.0] * 3
    assert weights["net.0.weight"].dtype == torch.float32


def test_it_comes_before_passes_that_read_weights(tmp_path):
    path = saved(tmp_path, "lightning")
    pruning = OneShotPruning(0.5, include=["net.0.weight"])
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 0, "callbacks": [pruning, LoadWeights(str(path))]})
    trainer.fit(Host(), datamodule=Data())
    weight = trained().net[0].weight.detach().abs()
    assert weight[pruning.mask["net.0.weight"]].min() >= weight[~pruning.mask["net.0.weight"]].max()


class Wraps(HostCallback):
    """Puts the network into another one, which gives its weights other names."""

    def attach(self, trainer, host, attachment):
        attachment.when_built(self, host, BuildPhase.WRAP, self._wrap)

    def _wrap(self, host):
        host.net = nn.Sequential(host.net)


def test_it_comes_before_callbacks_that_wrap_the_network(tmp_path):
    path, start = saved(tmp_path, "lightning"), Start()
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 1, "callbacks": [Wraps(), LoadWeights(str(path)), start]})
    trainer.fit(Host(), datamodule=Data())
    assert_trained({name.replace("net.0.", "net.", 1): value for name, value in start.weights.items()})


def test_a_checkpoint_that_the_run_is_resumed_from_wins(tmp_path):
    path = saved(tmp_path, "lightning")
    saver = ModelCheckpoint(dirpath=tmp_path / "run", every_n_train_steps=1, save_last=True, save_top_k=0)
    with pytest.raises(RuntimeError, match="killed"):
        start_of(path, None, saver, Kill(3), enable_checkpointing=True)
    start, last = Start(), tmp_path / "run" / "last.ckpt"
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 1, "callbacks": [LoadWeights(str(path)), ExactResume(), start]})
    trainer.fit(Host(), datamodule=Data(), ckpt_path=last)
    for name, value in torch.load(last, weights_only=True)["state_dict"].items():
        assert torch.equal(start.weights[name], value)
        assert not torch.equal(start.weights[name], trained().state_dict()[name])


def test_optimizer_and_progress_are_fresh(tmp_path):
    host = trained()
    long = pl.Trainer(**{**QUIET, "max_epochs": 2})
    long.fit(host, datamodule=Data())
    long.save_checkpoint(tmp_path / "long.ckpt")
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 1, "callbacks": [LoadWeights(str(tmp_path / "long.ckpt"))]})
    trainer.fit(Host(), datamodule=Data())
    assert trainer.global_step == trainer.num_training_batches


def test_two_ranks(tmp_path):
    start = Start()
    ranks = fit_on_two_ranks(
        tmp_path / "ranks",
        Host(),
        Data(batch_size=4),
        [LoadWeights(str(saved(tmp_path, "lightning"))), start],
        lambda *_: start.weights,
        max_epochs=1,
    )
    for weights in ranks:
        assert_trained(weights)


# -- bad input ---------------------------------------------------------------------------------------------------------
def refused(path, folder, error=ValueError, host=None):
    host = host or Host()
    before = {name: value.clone() for name, value in host.state_dict().items()}
    with pytest.raises(error) as caught:
        start_of(path, host)
    # nothing of it was loaded
    assert all(torch.equal(value, before[name]) for name, value in host.state_dict().items())
    return str(caught.value).replace(str(folder), "FOLDER")


def test_no_file(tmp_path):
    assert refused(tmp_path / "none.ckpt", tmp_path, FileNotFoundError) == (
        "Expected argument `checkpoint` of LoadWeights to be a file, but got 'FOLDER/none.ckpt', which does not exist."
    )


def test_another_architecture_lists_missing_unexpected_and_shapes(tmp_path):
    other = Host()
    other.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    torch.save(other.state_dict(), tmp_path / "other.pt")
    assert refused(tmp_path / "other.pt", tmp_path) == (
        "Expected FOLDER/other.pt to hold the weights of Host, but got another architecture: 2 missing: net.3.weight,"
        " net.3.bias; 2 unexpected: net.2.weight, net.2.bias; 2 of another shape: net.0.weight ((8, 6) instead of"
        " (16, 6)), net.0.bias ((8,) instead of (16,))."
    )


def test_long_lists_are_cut(tmp_path):
    torch.save({f"layer{place}.weight": torch.zeros(1) for place in range(9)}, tmp_path / "other.pt")
    message = refused(tmp_path / "other.pt", tmp_path)
    assert "; 9 unexpected: layer0.weight, layer1.weight, layer2.weight, layer3.weight, ..." in message
    assert "layer4" not in message


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
@pytest.mark.parametrize("keep", [0, 20, 0.5])
def test_truncated_files(tmp_path, suffix, keep):
    path = saved(tmp_path, "safetensors" if suffix == "safetensors" else "lightning")
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    kind = "a whole safetensors file" if suffix == "safetensors" else "a checkpoint that loads as weights only"
    assert refused(path, tmp_path).startswith(f"Expected FOLDER/{path.name} to be {kind}, but got: ")


class Pickled:
    """Runs code of the file's when it is loaded as more than data."""

    def __reduce__(self):
        return (print, ("loaded",))


def test_a_file_that_is_no_data(tmp_path, capsys):
    torch.save({"state_dict": {"net.0.weight": Pickled()}}, tmp_path / "code.pt")
    assert refused(tmp_path / "code.pt", tmp_path).startswith(
        "Expected FOLDER/code.pt to be a checkpoint that loads as weights only, but got: "
    )
    assert "loaded" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "found"),
    [([1, 2], "a list"), ({}, "an empty dict"), ({"epoch": 3}, "a dict with entries that are no tensors: epoch")],
)
def test_a_file_without_a_state_dict(tmp_path, content, found):
    torch.save(content, tmp_path / "other.pt")
    assert refused(tmp_path / "other.pt", tmp_path) == (
        f"Expected FOLDER/other.pt to hold a state dict of tensors, but got {found}."
    )
