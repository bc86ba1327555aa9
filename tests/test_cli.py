"""The command line, in this process, on hosts that know nothing of the package."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_trust import __version__
from lightning_trust.catalog import METHODS
from lightning_trust.cli import main

HOST = '''
import lightning.pytorch as pl
import torch
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel


class Theirs(pl.Callback):
    def __init__(self, value: int = 1):
        self.value = value


class Ours(pl.Callback):
    def __init__(self, value: int = 1):
        self.value = value


class Host(BoringModel):
    def __init__(self, width: int = 3):
        super().__init__()
        self.save_hyperparameters()
        self.width = width


class LateHost(BoringModel):
    """Builds its network when the trainer asks."""

    def __init__(self):
        super().__init__()
        self.layer = None

    def configure_model(self):
        if self.layer is None:
            self.layer = torch.nn.Linear(32, 2)


class Data(BoringDataModule):
    def __init__(self, rows: int = 5):
        super().__init__()
        self.rows = rows


class Rows:
    def __init__(self, first: int = 0):
        self.first = first


class Wrap(pl.LightningDataModule):
    def __init__(self, datamodule: pl.LightningDataModule, rows: Rows, label: int = 0):
        super().__init__()
        self.save_hyperparameters(ignore=["datamodule", "rows"])
        self.datamodule, self.rows, self.label = datamodule, rows, label

    def setup(self, stage):
        self.datamodule.setup(stage)

    def train_dataloader(self):
        return self.datamodule.train_dataloader()


class OtherWrap(Wrap):
    pass
'''
USER = {
    "seed_everything": 3,
    "model": {"class_path": "foreign_host.Host", "init_args": {"width": 7}},
    "data": {"class_path": "foreign_host.Data", "init_args": {"rows": 9}},
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 1,
        "limit_train_batches": 2,
        "limit_val_batches": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [{"class_path": "foreign_host.Theirs", "init_args": {"value": 4}}],
    },
}
OVERLAY = {
    "data_wrapper": {
        "class_path": "foreign_host.Wrap",
        "init_args": {"label": 2, "rows": {"class_path": "foreign_host.Rows", "init_args": {"first": 5}}},
    },
    "trainer": {"callbacks+": [{"class_path": "foreign_host.Ours", "init_args": {"value": 6}}]},
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A user's project: a module of theirs, their configuration, and one of our overlays."""
    (tmp_path / "foreign_host.py").write_text(HOST)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "foreign_host", raising=False)
    monkeypatch.chdir(tmp_path)
    save("user.yaml", USER)
    save("overlay.yaml", OVERLAY)
    yield tmp_path
    sys.modules.pop("foreign_host", None)


def save(name, data):
    Path(name).write_text(yaml.safe_dump(data))


def callbacks(cli):
    return [(type(each).__name__, each.value) for each in cli.trainer.callbacks if hasattr(each, "value")]


@pytest.mark.parametrize(
    "files",
    [
        ["--config", "user.yaml", "--config", "overlay.yaml"],
        ["--config=user.yaml", "-c=overlay.yaml"],
        ["-c", "user.yaml", "-coverlay.yaml"],
    ],
)
def test_overlay_on_a_foreign_config_loses_nothing(files):
    cli = main(["fit", *files])
    assert callbacks(cli) == [("Theirs", 4), ("Ours", 6)]
    assert (type(cli.model).__name__, cli.model.width) == ("Host", 7)
    assert cli.trainer.max_epochs == 1
    assert cli.trainer.global_step == 2
    wrapped = cli.trainer.datamodule
    assert (type(wrapped).__name__, wrapped.label, wrapped.rows.first) == ("Wrap", 2, 5)
    assert (type(wrapped.datamodule).__name__, wrapped.datamodule.rows) == ("Data", 9)
    # not those of the data module that it wraps, which LightningCLI would have put there
    assert dict(wrapped.hparams) == {"label": 2}


def test_appends_on_the_command_line_keep_everything():
    cli = main(["fit", "--config=user.yaml", "--trainer.callbacks+=foreign_host.Ours", "--trainer.callbacks.value=8"])
    assert callbacks(cli) == [("Theirs", 4), ("Ours", 8)]


def test_overlay_without_a_second_file():
    args = [
        "--model=foreign_host.Host",
        "--data=foreign_host.Data",
        "--trainer.fast_dev_run=1",
        "--trainer.accelerator=cpu",
    ]
    cli = main(["fit", "--config=overlay.yaml", *args])
    assert callbacks(cli) == [("Ours", 6)]
    assert type(cli.trainer.datamodule).__name__ == "Wrap"


def test_wrapper_is_written_to_the_saved_configuration(folder):
    main(["fit", "--config=user.yaml", "--config=overlay.yaml", f"--trainer.default_root_dir={folder}"])
    saved = yaml.safe_load(Path("config.yaml").read_text())
    assert saved["data"]["class_path"] == "foreign_host.Data"
    assert saved["data_wrapper"]["init_args"]["label"] == 2
    assert [each["class_path"] for each in saved["trainer"]["callbacks"]] == [
        "foreign_host.Theirs",
        "foreign_host.Ours",
    ]
    # what was saved runs again, into the same folder
    cli = main(["fit", "--config=config.yaml"])
    assert callbacks(cli) == [("Theirs", 4), ("Ours", 6)]


def test_short_names_of_the_rooms_resolve(capsys):
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config=user.yaml", "--data=Digits", "--print_config"])
    assert end.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["data"]["class_path"].startswith("lightning_trust.datamodules.")
    assert printed["data_wrapper"] is None


def test_wrapper_without_data_is_refused():
    save("nodata.yaml", {key: value for key, value in USER.items() if key != "data"})
    with pytest.raises(MisconfigurationException, match="`data_wrapper` wraps .* but there is no `data`"):
        main(["fit", "--config=nodata.yaml", "--config=overlay.yaml"])


def test_optimizer_of_the_configuration_covers_a_network_that_is_built_late():
    save("late.yaml", {**USER, "model": "foreign_host.LateHost"})
    with pytest.warns(UserWarning, match="`LateHost.configure_optimizers` is replaced by the `optimizer`"):
        cli = main(["fit", "--config=late.yaml", "--optimizer=torch.optim.Adam", "--optimizer.lr=0.5"])
    (optimizer,) = cli.trainer.optimizers
    assert type(optimizer) is torch.optim.Adam
    assert optimizer.defaults["lr"] == 0.5
    assert [id(each) for each in optimizer.param_groups[0]["params"]] == [id(each) for each in cli.model.parameters()]


def test_scheduler_of_the_configuration():
    schedule = ["--lr_scheduler=torch.optim.lr_scheduler.StepLR", "--lr_scheduler.step_size=1"]
    with pytest.warns(UserWarning, match="is replaced by the `optimizer`"):
        cli = main(["fit", "--config=user.yaml", "--optimizer=SGD", "--optimizer.lr=1.0", *schedule])
    assert type(cli.trainer.lr_scheduler_configs[0].scheduler) is torch.optim.lr_scheduler.StepLR
    with pytest.raises(MisconfigurationException, match="`lr_scheduler` needs `optimizer` beside it"):
        main(["fit", "--config=user.yaml", *schedule])


def test_host_keeps_its_own_optimizer_where_none_is_named():
    cli = main(["fit", "--config=user.yaml"])
    assert type(cli.trainer.optimizers[0]) is torch.optim.SGD


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--config", "overlay.yaml", "--config", "user.yaml"],
            r"^user.yaml gives `trainer.callbacks` as a plain list after other callbacks, and would lose Ours of"
            r" overlay.yaml. Put user.yaml first, or write `callbacks\+:` in it.$",
        ),
        (["-coverlay.yaml", "-c=user.yaml"], "would lose Ours of overlay.yaml"),
        (["--config=user.yaml", "--config=plain.yaml"], r"^plain.yaml .* would lose Theirs of user.yaml"),
        (
            ["--config=user.yaml", "--config=overlay.yaml", "--config=plain.yaml"],
            "would lose Theirs of user.yaml. Put plain.yaml first",
        ),
        (["--config=user.yaml", "--config=null.yaml"], "^null.yaml .* would lose Theirs of user.yaml"),
        (["--config=user.yaml", "--config=one.yaml"], "^one.yaml .* would lose Theirs of user.yaml"),
        (
            ["--config=user.yaml", "--config=both.yaml"],
            "^both.yaml .* mix up the arguments of Theirs of user.yaml",
        ),
        (["--trainer.callbacks+=foreign_host.Ours", "--config=user.yaml"], "would lose Ours of the command line"),
        (
            ["--config=user.yaml", "--trainer.callbacks=foreign_host.Ours"],
            r"Append with `--trainer.callbacks\+=`",
        ),
        (["--config=user.yaml", "--trainer.callbacks", "foreign_host.Ours"], "would lose Theirs of user.yaml"),
        (["--config=user.yaml", "--trainer=trainer.yaml"], "^trainer.yaml .* would lose Theirs of user.yaml"),
        (
            ["--config=user.yaml", "--config=nested/nested.yaml"],
            "^nested/nested.yaml .* lose Theirs of user.yaml",
        ),
        (["--config=user.yaml", "--config=dotted.yaml"], "^dotted.yaml .* would lose Theirs of user.yaml"),
        (["--config=user.yaml", "--config=trainer: {callbacks: [Ours]}"], "would lose Theirs of user.yaml"),
    ],
)
def test_orders_that_lose_callbacks_are_refused(args, message):
    theirs, ours = USER["trainer"]["callbacks"][0], OVERLAY["trainer"]["callbacks+"][0]
    save("plain.yaml", {"trainer": {"callbacks": [ours]}})
    save("null.yaml", {"trainer": {"callbacks": None}})
    save("one.yaml", {"trainer": {"callbacks": "foreign_host.Ours"}})
    save("both.yaml", {"trainer": {"callbacks": [ours, theirs]}})
    save("trainer.yaml", {"callbacks": [ours]})
    save("dotted.yaml", {"trainer.callbacks": [ours]})
    Path("nested").mkdir()
    save("nested/inner.yaml", {"callbacks": [ours]})
    save("nested/nested.yaml", {"trainer": "inner.yaml"})
    with pytest.raises(MisconfigurationException, match=message):
        main(["fit", *args])


@pytest.mark.parametrize(
    ("args", "kept"),
    [
        (["--config=user.yaml", "--trainer.callbacks=null", "--trainer.callbacks+=foreign_host.Ours"], [("Ours", 1)]),
        (["--config=user.yaml", "--config=more.yaml"], [("Theirs", 4), ("Ours", 6)]),
        (["--config=empty.yaml", "--config=user.yaml", "--config=overlay.yaml"], [("Theirs", 4), ("Ours", 6)]),
        (["--config=user.yaml", "--config=single.yaml"], [("Theirs", 4), ("Ours", 1)]),
    ],
)
def test_orders_that_lose_nothing_or_on_purpose_run(args, kept):
    save("more.yaml", {"trainer": {"callbacks": [*USER["trainer"]["callbacks"], *OVERLAY["trainer"]["callbacks+"]]}})
    save("empty.yaml", {"trainer": {"callbacks": None}})
    save("single.yaml", {"trainer": {"callbacks+": "foreign_host.Ours"}})
    assert callbacks(main(["fit", *args])) == kept


def test_files_before_the_subcommand():
    save("top.yaml", {"fit": USER})
    save("top_overlay.yaml", {"fit": OVERLAY})
    cli = main(["--config", "top.yaml", "fit", "--config", "overlay.yaml"])
    assert callbacks(cli) == [("Theirs", 4), ("Ours", 6)]
    with pytest.raises(MisconfigurationException, match="would lose Theirs of top.yaml. Give it after the subcommand"):
        main(["--config", "top.yaml", "--config=top_overlay.yaml", "fit"])
    with pytest.raises(MisconfigurationException, match="^user.yaml .* would lose Ours of top_overlay.yaml"):
        main(["--config=top_overlay.yaml", "fit", "--config=user.yaml"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"data": {"class_path": "foreign_host.OtherData"}},
            "second.yaml gives `data: OtherData` after user.yaml, and would lose Data with its arguments."
            " Leave `data` out of one of the two files. .* wrap it: `data_wrapper:`",
        ),
        ({"data": "foreign_host.OtherData"}, "would lose Data"),
        ({"data": None}, "gives `data: null` after user.yaml, and would lose Data"),
        ({"model": {"class_path": "foreign_host.LateHost"}}, "gives `model: LateHost` .* would lose Host"),
    ],
)
def test_another_class_for_model_or_data_is_refused(content, message):
    save("second.yaml", content)
    with pytest.raises(MisconfigurationException, match=message):
        main(["fit", "--config=user.yaml", "--config=second.yaml"])


def test_a_second_wrapper_is_refused():
    save("second.yaml", {"data_wrapper": {"class_path": "foreign_host.OtherWrap"}})
    with pytest.raises(MisconfigurationException, match=r"would lose Wrap .* A run has one wrapper\."):
        main(["fit", "--config=user.yaml", "--config=overlay.yaml", "--config=second.yaml"])


def test_more_arguments_for_the_same_class_are_no_replacement():
    save("second.yaml", {"model": {"init_args": {"width": 11}}, "data": {"class_path": "foreign_host.Data"}})
    cli = main(["fit", "--config=user.yaml", "--config=second.yaml"])
    assert (cli.model.width, cli.datamodule.rows) == (11, 9)


def test_unreadable_configuration_is_left_to_the_parser(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--config=user.yaml", "--config=absent.yaml"])
    assert "absent.yaml" in capsys.readouterr().err
    Path("broken.yaml").write_text("a: [")
    with pytest.raises(SystemExit):
        main(["fit", "--config=broken.yaml"])


def test_help_lists_every_command(capsys):
    for args in ([], ["--help"], ["-h"]):
        assert main(args) is None
        text = capsys.readouterr().out
        for command in ("fit", "validate", "test", "predict", "methods", "report", "run"):
            assert f"  {command} " in text
    main(["--version"])
    assert capsys.readouterr().out == f"lightning-trust {__version__}\n"


@pytest.mark.parametrize("command", ["methods", "report", "run", "fit"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"lightning-trust {'[options] ' if command == 'fit' else ''}{command}" in capsys.readouterr().out


def test_unknown_command_is_refused_with_close_names():
    with pytest.raises(ValueError, match=r"but got 'method'. Did you mean 'methods'\?"):
        main(["method"])
    with pytest.raises(ValueError, match=r"but got 'zzz'. There are: fit, validate"):
        main(["zzz"])


def test_methods_lists_the_catalog(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    main(["methods"])
    text = capsys.readouterr().out
    assert [line.strip() for line in text.splitlines()].count("adversarial") == 1
    for entry in METHODS:
        assert f"  {entry.name} " in text
        assert all(path.rpartition(".")[2] in text for path in entry.classes)
    main(["methods", "--family", "pruning"])
    text = capsys.readouterr().out
    assert "one-shot-pruning" in text
    assert "salun" not in text
    main(["methods", "--family", "theory"])
    assert "No method of the family theory yet. There are methods of: pruning, unlearning" in capsys.readouterr().out
    with pytest.raises(ValueError, match="Did you mean 'pruning'"):
        main(["methods", "--family", "prunning"])


def test_methods_shows_one(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    main(["methods", "SalUn"])
    text = capsys.readouterr().out
    for part in (
        "lightning_trust.callbacks.WeightSaliency",
        "arXiv:2310.12508",
        "configs/unlearning/salun.overlay.yaml",
    ):
        assert part in text
    with pytest.raises(ValueError, match="Did you mean 'salun'"):
        main(["methods", "salum"])


def test_as_a_console_script_wrong_arguments_end_in_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lightning-trust", "report", "nowhere"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("lightning-trust: error: Expected argument `paths`")
    monkeypatch.setattr(sys, "argv", ["lightning-trust", "fit", "--config=overlay.yaml", "--config=user.yaml"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "lightning-trust: error: user.yaml gives `trainer.callbacks`" in capsys.readouterr().err


def test_as_a_console_script_a_finished_run_is_no_failure(monkeypatch):
    # sys.exit(main()) takes any object for a failure
    monkeypatch.setattr(sys, "argv", ["lightning-trust", "fit", "--config=user.yaml"])
    assert main() is None


def test_a_recipe_does_not_repeat_lightnings_remarks_in_every_stage():
    save("recipe.yaml", {"stages": [{"name": "a", "command": "fit", "args": {"config": "user.yaml"}}]})
    remarks = []
    handler = logging.Handler()
    handler.emit = lambda record: remarks.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        main(["fit", "--config=user.yaml"])
        assert any("GPU available" in remark for remark in remarks)
        remarks.clear()
        levels = [logger.level for logger in loggers]
        main(["run", "recipe.yaml"])
        assert remarks == []
        assert [logger.level for logger in loggers] == levels
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def test_help_and_methods_import_nothing_heavy():
    code = (
        "import sys; from lightning_trust.cli import main; main(['--help']); main(['methods']);"
        "print('imported:', {'torch', 'lightning', 'matplotlib'} & set(sys.modules))"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("imported: set()\n")


def test_one_batch_stays_one_batch_whatever_was_imported_before(monkeypatch):
    # typing keeps the first of Union[float, int] (as in rich) and Union[int, float] (Lightning) for both
    annotations = inspect.unwrap(pl.Trainer.__init__).__annotations__
    monkeypatch.setitem(annotations, "limit_train_batches", float | int | None)
    cli = main(["fit", "--config=user.yaml", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=0.5"])
    assert cli.trainer.global_step == 1
    assert cli.trainer.limit_val_batches == 0.5
    assert annotations["limit_train_batches"] == float | int | None
