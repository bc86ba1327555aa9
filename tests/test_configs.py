"""Every configuration that ships: small ones run, those of the papers are built, overlays lose nothing of a user's."""

from __future__ import annotations

import importlib
import inspect
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file

import lightning_trust.attacks
import lightning_trust.callbacks
import lightning_trust.datamodules
import lightning_trust.modules
import lightning_trust.nn
import lightning_trust.optim
from lightning_trust.catalog import METHODS
from lightning_trust.cli import main
from lightning_trust.cli.training import TrainingCLI
from lightning_trust.core.records import RunRecord
from lightning_trust.core.robustness_record import RobustnessRecord
from lightning_trust.datamodules import ForgetSplit, RepeatBatches
from lightning_trust.report import collect

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
DEMO = CONFIGS / "unlearning" / "demo.yaml"
MULTI_NORM = CONFIGS / "adversarial" / "multi_norm.yaml"
RECIPES = {DEMO, MULTI_NORM}
ALL = sorted(CONFIGS.rglob("*.yaml"))
PAPER = [path for path in ALL if path.name.endswith(".paper.yaml")]
OVERLAYS = [path for path in ALL if path.name.endswith(".overlay.yaml")]
SMALL = [path for path in ALL if path not in {*PAPER, *OVERLAYS, *RECIPES}]
BASE = CONFIGS / "fashion_mnist.yaml"
#: runs that others start from
PRETRAININGS = (
    CONFIGS / "zeroth_order" / "mezo_pretraining.yaml",
    CONFIGS / "prompting" / "garments.yaml",
    CONFIGS / "prompting" / "biased_garments.yaml",
    CONFIGS / "prompting" / "dp4tl_surrogate.yaml",
    CONFIGS / "prompting" / "dp4tl.yaml",
)
METHOD_OF = {ROOT / getattr(entry, part): entry for entry in METHODS for part in ("config", "overlay_config")}
TINY = {
    "data.init_args.root": str(ROOT / "data"),
    "data.init_args.train_rows": 60,
    "data.init_args.val_rows": 10,
    "data.init_args.test_rows": 20,
    "trainer.accelerator": "cpu",
    "trainer.max_epochs": 1,
    "trainer.enable_progress_bar": False,
}
FLAGS = [f"--{key}={value}" for key, value in TINY.items()]
#: the modules of runs, which state all their arguments
MODULES = {
    "CausalLanguageModel",
    "ContrastivePretraining",
    "ImageClassifier",
    "MultiLabelClassifier",
    "PINNModule",
    "SKSModule",
    "SolverCorrection",
    "TransferClassifier",
    "VisualPromptClassifier",
}
#: what the runs of adversarial robustness have of their own, which the plain run has otherwise
OWN = {
    # large batches are the point of it
    "dat": ("data.batch_size", "model.optimizer", "model.schedule"),
    "advmoe": ("model.network", "model.network_args"),
    "robust_mode_connectivity": ("model.network", "model.network_args", "model.optimizer", "model.schedule"),
    "saliency_guided_adversarial_training": ("data",),
}
#: what the network of a user's own run has to be, where an overlay cannot make it so
MADE = {"advmoe": "moe", "robust_mode_connectivity": "curve", "tensor_bp_free": "small"}
#: what a paper's run would download
OFFLINE = {
    "saliency_guided_adversarial_training": ("--model.init_args.network_args={pretrained: false}",),
    **dict.fromkeys(("autovp", "ilm_vp"), ("--model.init_args.backbone_args={pretrained: false}",)),
    "mezo": (
        "--model.init_args.model=null",
        "--model.init_args.config={model_type: opt, vocab_size: 20, hidden_size: 8, word_embed_proj_dim: 8,"
        " ffn_dim: 8, num_hidden_layers: 1, num_attention_heads: 2, max_position_embeddings: 16}",
    ),
}
#: sizes and classes of the user's own run, where an overlay names some
FITTED = {
    "autovp": (
        ("image_size: 128, out_size: 224, channels: 3", "image_size: 8, out_size: 8, channels: 1"),
        ("num_source: 1000, num_target: 10", "num_source: 3, num_target: 3"),
    ),
    "c_avp": (
        (
            "num_prompts: 10, image_size: 32, channels: 3, size: 8",
            "num_prompts: 3, image_size: 8, channels: 1, size: 2",
        ),
    ),
    "dp4tl": (
        ("network: resnet18, num_classes: 1000, in_channels: 3", "network: SmallCNN, num_classes: 3, in_channels: 1"),
        ("checkpoint: runs/surrogate/last.ckpt", "checkpoint: null"),
        ("my_project.MyTarget", "foreign_run.Data"),
    ),
    "fairness_reprogram": (
        ("image_size: 224, border: 20, channels: 3", "image_size: 8, border: 1, channels: 1"),
        ("num_classes: 2", "num_classes: 3"),
    ),
    "ilm_vp": (
        ("size: 224, pad: 30, channels: 3", "size: 8, pad: 2, channels: 1"),
        ("num_source: 1000, num_target: 10", "num_source: 3, num_target: 3"),
    ),
}
#: sections of a user's own that an overlay takes the place of, and what of theirs cannot be beside it
TAKEN = {
    **dict.fromkeys(("mezo", "tensor_bp_free"), ("optimizer", "--trainer.gradient_clip_val=null")),
    # a prompt has an optimizer of its own
    "autovp": ("optimizer",),
    "ilm_vp": ("optimizer",),
    "c_avp": ("optimizer",),
    "fairness_reprogram": ("optimizer",),
}
#: what the data of a user's own run have to tell
TOLD = {"fairness_reprogram": ("--data.groups=true",)}
SECTIONS = ["seed_everything", "model", "data", "data_wrapper", "trainer", "optimizer", "lr_scheduler"]
ROOMS = (
    lightning_trust.attacks,
    lightning_trust.callbacks,
    lightning_trust.datamodules,
    lightning_trust.modules,
    lightning_trust.nn,
    lightning_trust.optim,
)


def name_of(path):
    return path.relative_to(CONFIGS).as_posix()


def robust(path):
    """Whether a configuration is one of adversarial robustness; the others prune or forget."""
    return "adversarial" in path.parts


def method_of(path):
    """Name of the method in files."""
    return path.name.partition(".")[0]


def of_its_own(path):
    """Whether a configuration has data and a network of its own: trains without back-propagation, or prompts."""
    return "zeroth_order" in path.parts or "prompting" in path.parts


def flags(path):
    """What makes a run tiny, as far as its data take it."""
    takes = read(path)["data"]["init_args"]
    # points of an equation have no rows
    points = {f"data.init_args.{name}": 1 for name in ("steps_per_epoch", "val_points")}
    return [
        f"--{key}={value}"
        for key, value in {**TINY, **points}.items()
        if not key.startswith("data.") or key.rpartition(".")[2] in takes
    ]


def read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def classes(value):
    """Every mapping with a ``class_path``, at any depth."""
    if isinstance(value, dict):
        if "class_path" in value:
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from classes(item)


def ours(node):
    """The class of a node, where it is one of this package's."""
    for room in ROOMS:
        if node["class_path"] in room.__all__:
            return getattr(room, node["class_path"])
    return None


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The checkpoint of the existing run, trained on a few rows."""
    folder = tmp_path_factory.mktemp("trained")
    main(["fit", f"--config={BASE}", *FLAGS, f"--trainer.default_root_dir={folder}"])
    return folder / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """Checkpoints of the networks that others start from, trained on a few rows."""
    found = {}
    folder = tmp_path_factory.mktemp("pretrained")
    # one starts from another
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for path in PRETRAININGS:
            main(["fit", f"--config={path}", *flags(path)])
            found[path] = folder / read(path)["trainer"]["default_root_dir"] / "checkpoints" / "last.ckpt"
    return found


@pytest.fixture
def place(tmp_path, monkeypatch, trained, pretrained):
    """A working directory in which the runs have been run that others start from, or that give a curve its ends."""
    monkeypatch.chdir(tmp_path)
    target = Path(read(BASE)["trainer"]["default_root_dir"], "checkpoints", "last.ckpt")
    target.parent.mkdir(parents=True)
    shutil.copy(trained, target)
    for path, checkpoint in pretrained.items():
        target = Path(read(path)["trainer"]["default_root_dir"], "checkpoints", "last.ckpt")
        target.parent.mkdir(parents=True)
        shutil.copy(checkpoint, target)
    state = torch.load(trained, weights_only=True)["state_dict"]
    for run, shift in (("adversarial_training", 0.0), ("adversarial_training_l1", 0.01)):
        end = Path("runs", "adversarial", run, "checkpoints", "last.ckpt")
        end.parent.mkdir(parents=True)
        torch.save({"state_dict": {name: value + shift for name, value in state.items()}}, end)
    return tmp_path


# -- small runs --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", SMALL, ids=name_of)
def test_small_configuration_runs(path, place, capsys):
    # ranks in one process each are Lightning's affair; tests of the callbacks have two
    cli = main(["fit", f"--config={path}", *flags(path), "--trainer.devices=1", "--trainer.strategy=auto"])
    replays = (read(path).get("data_wrapper") or {}).get("init_args", {}).get("replays", 1)
    rows = TINY["data.init_args.train_rows"]
    batch = read(path)["data"]["init_args"].get("batch_size") or rows
    assert cli.trainer.global_step == replays * math.ceil(rows / batch)
    folder = Path(read(path)["trainer"]["default_root_dir"])
    # the unlearned model is there, under the names of the one that came in
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert state.keys() == cli.model.state_dict().keys()
    if path in METHOD_OF:
        attached = {type(each).__name__ for each in (*cli.trainer.callbacks, *cli.trainer.optimizers, cli.model)}
        names = [kind.rpartition(".")[2] for kind in METHOD_OF[path].classes]
        # a method with a module of its own has a callback for the modules of others
        assert set(names if of_its_own(path) else names[:1]) & attached
    if "data_wrapper" in read(path) and not robust(path):
        record = RunRecord.read(folder)
        assert record.scenario == "random 10 %"
        assert record.forget["forget"] == 6
        assert (record.before is None) == (record.role == "retrain")


@pytest.mark.parametrize("path", SMALL, ids=name_of)
def test_a_second_run_replaces_the_checkpoint(path):
    (checkpoint,) = [node for node in classes(read(path)) if node["class_path"] == "ModelCheckpoint"]
    # else Lightning writes last-v1.ckpt, and what reads last.ckpt goes on with the old model
    assert checkpoint["init_args"] == {"save_top_k": 0, "save_last": True, "enable_version_counter": False}


@pytest.mark.parametrize(
    "path", [path for path in SMALL if path != BASE and not robust(path) and not of_its_own(path)], ids=name_of
)
def test_small_runs_differ_from_the_existing_one_in_what_they_say(path):
    base, content = read(BASE), read(path)
    scratch = "Retrain" in path.read_text(encoding="utf-8").splitlines()[0]
    rates = [each["model"]["init_args"]["optimizer"]["init_args"].pop("lr") for each in (base, content)]
    assert rates[1] == rates[0] if scratch else rates[1] <= rates[0] / 2
    assert content["model"] == base["model"]
    assert content["data"] == base["data"]
    epochs = [each["trainer"]["max_epochs"] for each in (base, content)]
    assert epochs[1] == epochs[0] if scratch else epochs[1] <= epochs[0] / 5


@pytest.mark.parametrize("path", [path for path in SMALL if robust(path)], ids=name_of)
def test_robust_runs_are_the_existing_one_made_robust(path):
    base, content = read(BASE), read(path)
    for each in (base, content):
        for key in OWN.get(method_of(path), ()):
            section, _, argument = key.partition(".")
            each[section]["init_args"].pop(argument) if argument else each.pop(section)
    assert content["model"] == base["model"]
    assert content.get("data") == base.get("data")
    evaluations = [node for node in classes(content) if node["class_path"] == "RobustEvaluation"]
    assert evaluations
    for evaluation in evaluations:
        attacks = evaluation["init_args"]["attacks"]
        norms = MADE.get(method_of(path)) == "curve" or method_of(path).endswith("_l1")
        assert list(attacks) == (["linf", "l2", "l1"] if norms else ["pgd50", "autoattack"])
        assert next(iter(attacks.values()))["init_args"]["eps"] == 0.1
        assert evaluation["init_args"]["max_samples"] == 500


def test_robust_run_is_tested_as_its_header_says(place, capsys):
    path = CONFIGS / "adversarial" / "robust_evaluation.yaml"
    main(["fit", f"--config={path}", *FLAGS])
    checkpoint = Path(read(path)["trainer"]["default_root_dir"], "checkpoints", "last.ckpt")
    # a short AutoAttack on a few rows, without the self-test, of which a network of one step has no use
    content = read(path)
    evaluation = content["trainer"]["callbacks"][0]["init_args"]
    evaluation["self_test"] = False
    evaluation["attacks"]["autoattack"]["init_args"].update(steps=5, n_queries=20)
    Path("short.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    main(["test", "--config=short.yaml", *FLAGS, f"--ckpt_path={checkpoint}"])
    record = RobustnessRecord.read(Path(content["trainer"]["default_root_dir"]))
    assert record.samples == 20
    assert sorted(record.curves) == ["autoattack", "pgd50"]
    assert "trust/robust_acc/union" in capsys.readouterr().out


# -- every hyperparameter ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", [*SMALL, *PAPER], ids=name_of)
def test_every_argument_is_stated_in_its_order(path):
    content = read(path)
    assert list(content) == [section for section in SECTIONS if section in content]
    found = []
    for node in classes(content):
        kind = ours(node)
        if kind is None:
            continue
        found.append(kind.__name__)
        arguments = [name for name in inspect.signature(kind).parameters if name not in ("datamodule", "params")]
        if kind.__name__ == "ImageClassifier" and "optimizer" in content:
            arguments = [name for name in arguments if name not in ("optimizer", "schedule")]
        assert list(node["init_args"]) == arguments, kind.__name__
    assert MODULES & set(found)
    for node in classes(content):
        if node["class_path"] == "torch.optim.SGD":
            assert list(node["init_args"]) == ["lr", "momentum", "weight_decay"]
    network = content["model"]["init_args"].get("network")
    if path in SMALL and isinstance(network, str):
        arguments = inspect.signature(getattr(lightning_trust.nn, network)).parameters
        stated = set(arguments) - {"in_channels", "num_classes"}
        assert content["model"]["init_args"]["network_args"].keys() == stated


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_header_says_what_it_is_and_how_to_run_it(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert f"configs/{name_of(path)}" in text
    assert max(map(len, text.splitlines())) <= 120


# -- the papers' scale -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", PAPER, ids=name_of)
def test_paper_configuration_is_parsed_and_built(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli = TrainingCLI(
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        run=False,
        args=[
            f"--config={path}",
            "--trainer.accelerator=cpu",
            "--trainer.devices=1",
            "--trainer.strategy=auto",
            *OFFLINE.get(method_of(path), ()),
        ],
    )
    assert not list(tmp_path.iterdir())
    if "data" in OWN.get(method_of(path), ()) or of_its_own(path):
        return
    data = getattr(cli.datamodule, "datamodule", cli.datamodule)
    rows = 49000 if robust(path) else 45000
    batch = 128 if robust(path) and "dat" not in path.name else 256
    assert (type(data).__name__, data.batch_size, data.train_rows) == ("CIFAR10", batch, rows)
    if "model.network" not in OWN.get(method_of(path), ()):
        assert sum(parameter.numel() for parameter in cli.model.parameters()) == 11_173_962
    if isinstance(cli.datamodule, ForgetSplit):
        # training rows are augmented, measured rows are not
        assert data.augment
        row = torch.rand(3, 32, 32)
        assert cli.datamodule.eval_transform(row) is row


def test_every_method_has_all_three():
    for entry in METHODS:
        for path in (entry.config, entry.paper_config, entry.overlay_config):
            assert ROOT / path in ALL


# -- overlays on a user's own run --------------------------------------------------------------------------------------
FOREIGN = """
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset


class Theirs(pl.Callback):
    def __init__(self, value: int = 1):
        self.value, self.batches = value, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches += 1


def made(kind, network):
    from lightning_trust.nn import CurveNetwork, convert_to_moe, tensorize

    if kind == "moe":
        return convert_to_moe(network, skip=())
    if kind == "small":
        return tensorize(network, rank=2, min_params=100)
    if kind == "curve":
        curve = CurveNetwork(network)
        curve.load_endpoint({name: value + 0.1 for name, value in network.state_dict().items()}, "end")
        curve.init_linear()
        return curve
    return network


class Model(pl.LightningModule):
    def __init__(self, width: int = 4, rate: float = 0.5, kind: str = "plain"):
        super().__init__()
        self.save_hyperparameters()
        encoder = torch.nn.Sequential(torch.nn.Conv2d(1, width, 3), torch.nn.ReLU(), torch.nn.Flatten())
        head = torch.nn.Linear(width * 36, 3)
        if kind == "plain":
            self.encoder, self.head = encoder, head
        else:
            self.net = made(kind, torch.nn.Sequential(encoder, head))

    def forward(self, x):
        return self.net(x) if hasattr(self, "net") else self.head(self.encoder(x))

    def training_step(self, batch, batch_idx):
        inputs, targets = batch[:2]
        loss = torch.nn.functional.cross_entropy(self(inputs), targets)
        self.log("mine", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.rate)


class Data(pl.LightningDataModule):
    def __init__(self, rows: int = 30, batch: int = 7, groups: bool = False):
        super().__init__()
        self.rows, self.batch, self.groups = rows, batch, groups

    def _loader(self, rows, shuffle=False):
        generator = torch.Generator().manual_seed(0)
        groups = [torch.arange(rows) % 2] if self.groups else []
        data = TensorDataset(torch.rand(rows, 1, 8, 8, generator=generator), torch.arange(rows) % 3, *groups)
        return DataLoader(data, batch_size=self.batch, shuffle=shuffle)

    def train_dataloader(self):
        return self._loader(self.rows, shuffle=True)

    def test_dataloader(self):
        return self._loader(12)
"""
USER = {
    "seed_everything": 11,
    "model": {"class_path": "foreign_run.Model", "init_args": {"width": 6, "rate": 0.03}},
    "data": {"class_path": "foreign_run.Data", "init_args": {"rows": 40, "batch": 9}},
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 2,
        "gradient_clip_val": 0.7,
        "log_every_n_steps": 3,
        "default_root_dir": "runs/theirs",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "logs", "name": "theirs"}},
        "callbacks": [
            {"class_path": "foreign_run.Theirs", "init_args": {"value": 4}},
            {"class_path": "ModelCheckpoint", "init_args": {"dirpath": "kept", "filename": "{epoch}"}},
            {"class_path": "LearningRateMonitor"},
        ],
    },
}


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A user's project, with a checkpoint of theirs where the overlays look for one as they come."""
    (tmp_path / "foreign_run.py").write_text(FOREIGN)
    (tmp_path / "user.yaml").write_text(yaml.safe_dump(USER, sort_keys=False))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "foreign_run", raising=False)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(5)
    state = importlib.import_module("foreign_run").Model(width=6).state_dict()
    (tmp_path / "runs" / "trained").mkdir(parents=True)
    torch.save({"state_dict": state}, tmp_path / "runs" / "trained" / "last.ckpt")
    yield state
    sys.modules.pop("foreign_run", None)


def fitted(path):
    """An overlay as a user would have changed it."""
    text = path.read_text(encoding="utf-8")
    for before, after in FITTED.get(method_of(path), ()):
        assert before in text
        text = text.replace(before, after)
    target = Path("overlays", path.name)
    target.parent.mkdir(exist_ok=True)
    target.write_text(text, encoding="utf-8")
    return target


@pytest.mark.parametrize("path", OVERLAYS, ids=name_of)
def test_overlay_keeps_all_of_a_users_own(path, user, capsys):
    kind = (f"--model.kind={MADE.get(method_of(path), 'plain')}", *TOLD.get(method_of(path), ()))
    taken, *without = TAKEN.get(method_of(path), ("",))
    alone = main(["fit", "--config=user.yaml", *kind, *without])
    cli = main(["fit", "--config=user.yaml", f"--config={fitted(path)}", *kind, *without])

    # every value of theirs, whether they wrote it or it is a default, is what it was
    before, after = (each.config.fit.as_dict() for each in (alone, cli))
    wrapper, callbacks = after.pop("data_wrapper"), after["trainer"].pop("callbacks")
    before.pop("data_wrapper")
    before.pop("config"), after.pop("config")  # the names of the files
    theirs = before["trainer"].pop("callbacks")
    for config in (before, after):
        config.pop(taken, None)
    assert after == before
    assert callbacks[: len(theirs)] == theirs

    # and so it is in the objects that ran
    attached = {type(callback).__name__: callback for callback in cli.trainer.callbacks}
    assert attached["Theirs"].value == 4
    assert attached["ModelCheckpoint"].dirpath == str(Path("kept").resolve())
    assert "LearningRateMonitor" in attached
    assert type(cli.trainer.logger).__name__ == "CSVLogger"
    assert cli.trainer.gradient_clip_val == (None if without else 0.7)
    assert (cli.trainer.optimizers[0].defaults["lr"] == 0.03) == (taken != "optimizer")
    assert cli.trainer.current_epoch == 2
    split = cli.trainer.datamodule
    data = split.datamodule if wrapper else split
    assert (type(data).__name__, data.rows, data.batch) == ("Data", 40, 9)
    if not isinstance(split, RepeatBatches):
        assert cli.trainer.train_dataloader.batch_size in (9, None)
    assert attached["Theirs"].batches == cli.trainer.global_step > 0

    # the method is at work
    if path in METHOD_OF:
        names = [kind.rpartition(".")[2] for kind in METHOD_OF[path].classes]
        # a method with a module of its own has a callback for the modules of others
        optimizers = {type(optimizer).__name__ for optimizer in cli.trainer.optimizers}
        assert set(names if of_its_own(path) else names[:1]) & {*attached, *optimizers}
    if robust(path):
        assert bool(wrapper) == isinstance(split, RepeatBatches)
        assert any(name.startswith("RobustEvaluation") for name in attached)
    elif wrapper:
        assert isinstance(split, ForgetSplit)
        assert len(split.forget_rows) == 4
        assert len(next(iter(split.train_dataloader()))[0]) == 9
        record = RunRecord.read("runs/theirs")
        assert record.role == ("method" if path in METHOD_OF else "retrain")
        assert record.forget["retain"] == 36
    elif not of_its_own(path):
        zeros = torch.cat(
            [(parameter == 0).flatten() for parameter in (cli.model.head.weight, cli.model.encoder[0].weight)]
        )
        assert zeros.float().mean().item() == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("path", [path for path in OVERLAYS if not robust(path) and not of_its_own(path)], ids=name_of)
def test_overlay_starts_from_the_users_checkpoint(path, user, capsys):
    cli = main(["fit", "--config=user.yaml", f"--config={path}", "--trainer.max_epochs=1", "--model.rate=0.0"])
    weight = cli.model.head.weight
    loaded = torch.equal(weight, user["head.weight"])
    kept = weight != 0
    # without a learning rate the weights are those of the checkpoint, and of a new network in Retrain
    assert loaded == (path in METHOD_OF and "pruning" not in path.parts)
    if "pruning" in path.parts:
        assert torch.equal(weight[kept], user["head.weight"][kept])


@pytest.mark.parametrize("path", OVERLAYS, ids=name_of)
def test_overlay_before_the_users_file_is_refused(path, user):
    ours_first = ["fit", f"--config={path}", "--config=user.yaml"]
    with pytest.raises(
        MisconfigurationException, match=r"^user\.yaml gives `trainer.callbacks` as a plain list"
    ) as error:
        main(ours_first)
    assert path.name in str(error.value)
    assert "Put user.yaml first" in str(error.value)


# -- the main job ------------------------------------------------------------------------------------------------------
def test_demo_runs_whole_and_then_only_reports(place, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "150")
    recipe = read(DEMO)
    for stage in recipe["stages"]:
        if stage["command"] == "fit":
            stage["args"].update(TINY)
    Path("demo.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    Path("configs").symlink_to(CONFIGS)
    main(["run", "demo.yaml"])
    text = capsys.readouterr().out
    assert f"{len(recipe['stages'])} of {len(recipe['stages'])} stages ran" in text

    collection = collect(["runs/demo"])
    assert [scenario.name for scenario in collection.scenarios] == ["class 0", "random 10 %"]
    for scenario in collection.scenarios:
        assert sorted(row.label for row in scenario.rows()) == [
            "FineTune",
            "L1Sparse",
            "OneShotPruning + SalUn",
            "Original",
            "RandomLabel",
            "Retrain, seed 1",
            "Retrain, seed 2",
            "SalUn",
        ]
        assert scenario.reference.seed == 1
        assert scenario.spread is not None
        assert {record.forget["hash"] for record in scenario.records} == {scenario.forget["hash"]}
        # all methods start from the one trained model
        assert sum(row.kind == "original" for row in scenario.rows()) == 1
    page = Path("runs/demo/report.html").read_text(encoding="utf-8")
    assert "<h1>Unlearning report</h1>" in page
    assert "not measured" not in page

    main(["run", "demo.yaml"])
    assert f"1 of {len(recipe['stages'])} stages ran" in capsys.readouterr().out


def test_demo_says_only_what_differs():
    """The methods are the shipped small runs, so that a change of one is a change of the demo."""
    stages = {stage["name"]: stage for stage in read(DEMO)["stages"]}
    assert stages["train"]["args"]["config"] == "configs/fashion_mnist.yaml"
    assert read(BASE)["trainer"]["default_root_dir"] == "runs/demo/train"
    for scenario in ("random10", "class0"):
        first, again = (stages[f"{scenario}_retrain{end}"]["args"] for end in ("", "_again"))
        changed = {key: value for key, value in again.items() if first.get(key) != value}
        assert changed == {"seed_everything": 2, "data_wrapper.init_args.seed": 2}
        for method in ("fine_tune", "random_label", "l1_sparse", "salun", "pruned_salun"):
            stage = stages[f"{scenario}_{method}"]
            assert stage["needs"] == ["train"]
            assert stage["args"]["config"] == f"configs/unlearning/{method}.yaml"
            assert stage["args"].keys() <= {"config", "trainer.default_root_dir", "data_wrapper.init_args.forget"}


def test_multi_norm_recipe_runs_whole_and_then_only_reports(place, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "150")
    recipe = read(MULTI_NORM)
    for attack in recipe["variables"]["attacks"].values():
        attack["init_args"]["steps"] = 1
    for stage in recipe["stages"]:
        if stage["command"] != "report":
            stage["args"].update(TINY)
        if stage["name"] == "rmc_second_round":
            # on ten rows all points are as good, and the first of both curves is the same network
            end = "model.init_args.network.init_args.end"
            stage["args"][end] = stage["args"][end].replace("best", "best_3")
    Path("multi_norm.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    shutil.copytree(CONFIGS, "configs")
    for path in Path("configs", "adversarial").glob("*.yaml"):
        path.write_text(
            path.read_text().replace("num_points: 11", "num_points: 3").replace(" steps: 10\n", " steps: 1\n")
        )
    main(["run", "multi_norm.yaml"])
    count = len(recipe["stages"])
    assert f"{count} of {count} stages ran" in capsys.readouterr().out

    tests = [stage["name"] for stage in recipe["stages"] if stage["command"] == "test"]
    records = {name: RobustnessRecord.read(Path("runs", "multi_norm", name)) for name in tests}
    labels = [record.label for record in records.values()]
    assert len(set(labels)) == len(labels)
    assert {tuple(sorted(record.attacks)) for record in records.values()} == {("l1", "l2", "linf")}
    assert {record.samples for record in records.values()} == {20}
    page = Path("runs/multi_norm/report.html").read_text(encoding="utf-8")
    assert all(label in page for label in labels)
    # what the second round starts from are the best points of the first one
    best = load_file("runs/multi_norm/rmc/best.safetensors")
    second = torch.load("runs/multi_norm/rmc_second_round/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(second["network.network.classifier.weight"], best["network.classifier.weight"])

    main(["run", "multi_norm.yaml"])
    assert f"1 of {count} stages ran" in capsys.readouterr().out
