"""README and docs say what is so: generated parts are current, links resolve, code and commands run."""

from __future__ import annotations

import configparser
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml

import lightning_trust.attacks
from benchmarks.results import Result, ResultRow
from docs import generate
from lightning_trust.attacks import Attack
from lightning_trust.catalog import METHODS
from lightning_trust.cli import main
from lightning_trust.core.records import RunRecord
from lightning_trust.core.robustness_record import RobustnessRecord

ROOT = Path(__file__).parents[1]
PAGES = generate.pages()
SECTIONS = [
    "When to use it",
    "Formula",
    "YAML",
    "Python",
    "Arguments",
    "What to expect",
    "Traps",
    "Paper and how to cite",
]
PROJECT = """
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset


class MyModel(pl.LightningModule):
    def __init__(self, lr: float = 0.1):
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.Linear(8, 4))

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        return torch.nn.functional.cross_entropy(self.net(inputs), targets)

    def test_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


class MyData(pl.LightningDataModule):
    def _loader(self, rows, shuffle=False):
        generator = torch.Generator().manual_seed(rows)
        data = TensorDataset(torch.rand(rows, 1, 8, 8, generator=generator), torch.arange(rows) % 4)
        return DataLoader(data, batch_size=8, shuffle=shuffle)

    def train_dataloader(self):
        return self._loader(60, shuffle=True)

    def test_dataloader(self):
        return self._loader(30)
"""
MINE = {
    "seed_everything": 1,
    "model": {"class_path": "my_project.MyModel", "init_args": {"lr": 0.1}},
    "data": {"class_path": "my_project.MyData"},
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    },
}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of a user's: module, configuration, and the checkpoint that the pages start from."""
    (tmp_path / "my_project.py").write_text(PROJECT)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(MINE))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_project", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "trained").mkdir(parents=True)
    module = importlib.import_module("my_project")
    torch.save({"state_dict": module.MyModel().state_dict()}, tmp_path / "runs" / "trained" / "last.ckpt")
    yield tmp_path
    sys.modules.pop("my_project", None)


# -- generated parts ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", generate.pages(), ids=name_of)
def test_generated_parts_are_current(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("<!-- generated: ") == text.count("<!-- end -->") == len(generate._BLOCK.findall(text))
    assert generate.filled(text, path) == text, "run: python -m docs.generate"


def test_drawings_are_current():
    for path, content in generate.drawings().items():
        assert path.read_text(encoding="utf-8") == content, f"{path}: python -m docs.generate"


def test_unknown_parts_are_refused():
    with pytest.raises(ValueError, match="one of .*, but got 'nothing' in page.md"):
        generate.filled("<!-- generated: nothing -->\n<!-- end -->", Path("page.md"))


def test_methods_table_has_every_method():
    table = generate._methods(ROOT / "README.md")
    assert len(table.splitlines()) == 2 + len(METHODS)
    for entry in METHODS:
        assert f"[{entry.name}]({entry.docs})" in table


def result(method="salun"):
    runs = {"Original": 3.0, "Retrain": 0.0, "Retrain (another seed)": 0.5, "FineTune": 2.0, "SalUn": 1.0}
    rows = [
        ResultRow(run, seed, "class 1", 50.0 + seed, 90.0, 80.0, 70.0, gap * seed, 2.0, 0.5, gap / 10)
        for seed in (1, 2)
        for run, gap in runs.items()
    ]
    hardware = {"cpu": "A CPU", "cores": 2, "accelerator": None, "memory_gib": 8.0}
    versions = {"torch": "2.9", "lightning": "2.6"}
    return Result(method, "An experiment", "c.yaml", hardware, versions, "2026-11-23T10:00:00+00:00", [1, 2], rows)


def test_tables_of_results_come_from_the_files(tmp_path, monkeypatch):
    for path in ("benchmarks/results/unlearning/salun.json", "benchmarks/results/unlearning/demo.json"):
        result().write(tmp_path / path)
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    monkeypatch.setattr(generate, "RESULTS", tmp_path / "benchmarks" / "results")
    text = generate.filled("<!-- generated: result salun -->\n<!-- end -->", tmp_path / "page.md")
    assert "| SalUn | 51.5 | 90.0 | 80.0 | 70.0 | 1.50 (1.00, 2.00) | 2.5 s | 10 % |" in text
    assert "| Retrain | 51.5 | 90.0 | 80.0 | 70.0 | reference | 2.5 s |" in text
    assert "An experiment; means over seeds 1, 2; A CPU, 2 cores; torch 2.9, lightning 2.6; 2026-11-23." in text
    table = generate._results(tmp_path / "README.md")
    assert "| SalUn | class 1 | 1.50 (1.00, 2.00) | 0.75 | 10 % |" in table
    # what was not measured says so
    assert table.count("not measured yet") == sum(entry.family in ("pruning", "unlearning") for entry in METHODS) - 1
    assert "Forget class 1" in generate.filled("<!-- generated: demo -->\n<!-- end -->", tmp_path / "page.md")
    assert generate._result(tmp_path / "absent.json") == "Not measured yet."


# -- pages -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("entry", METHODS, ids=lambda entry: entry.name)
def test_every_method_has_its_page(entry):
    text = (ROOT / entry.docs).read_text(encoding="utf-8")
    assert text.startswith(f"# {entry.classes[0].rpartition('.')[2]}\n")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == SECTIONS
    assert entry.overlay_config in text
    for path in entry.classes:
        assert f"<!-- generated: arguments {path.rpartition('.')[2]} -->" in text
    for paper in entry.papers:
        assert paper.title in text
        # the words of the title, whatever the line breaks of the entry
        titles = [" ".join(title.split()) for title in re.findall(r"title\s*= \{(.*?)\},\n", text, re.DOTALL)]
        assert paper.title in titles


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_resolve(path):
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target.partition("#")[0]).exists(), target


def test_files_named_in_the_text_exist():
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"configs/[\w/]+(?:\.\w+)*\.yaml", text):
            assert (ROOT / name).is_file(), f"{name} in {path}"


# -- code and commands -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path, "python")], ids=name_of)
def test_python_runs(path, project, capsys):
    for code in blocks(path, "python"):
        assert len([line for line in code.splitlines() if line]) <= 10
        names = {}
        exec(compile(code, str(path), "exec"), names)
        if "Trainer(" not in code:
            continue
        trainer = names["trainer"]
        assert trainer.global_step > 0
        if "UnlearningReport" in code:
            record = RunRecord.read(trainer.default_root_dir)
            assert record.label == " + ".join(re.findall(r"(?:FineTune|RandomLabel|L1Sparse|SalUn)(?=\()", code))
            assert record.before is not None


def commands(path):
    return [
        shlex.split(line, comments=True)
        for block in blocks(path, "bash")
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip()
    ]


@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path, "bash")], ids=name_of)
def test_commands_run(path, project, capsys):
    for words in commands(path):
        program, *arguments = words
        if program == "make":
            assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        elif program == "lightning-trust":
            # script processes are Lightning's affair; forked ranks do the same in this process
            main([word.replace("strategy=ddp", "strategy=ddp_fork") for word in arguments])
        elif words[:2] == ["python", "-m"] and len(words) == 3:
            # minutes on quiet cores; what they run is tested where it stands
            assert callable(importlib.import_module(words[2]).main)
        else:
            assert words[:3] == ["python", "-m", "benchmarks.results"]
            retrain = ["--config=mine.yaml", "--config=configs/unlearning/retrain.overlay.yaml"]
            main(["fit", *retrain, "--trainer.default_root_dir=runs/demo/retrain"])
            importlib.import_module("benchmarks.results").main(arguments[2:])
            assert Result.read("benchmarks/results/unlearning/demo.json").method == "demo"
    if any(words[:2] == ["lightning-trust", "report"] for words in commands(path)):
        assert "<h1>Unlearning report</h1>" in Path("report.html").read_text(encoding="utf-8")
        record = RunRecord.read("runs/salun")
        assert (record.label, record.scenario) == ("SalUn", "random 10 %")


def test_several_devices_take_lightnings_flags_alone():
    one, several = (words for words in commands(ROOT / "README.md") if "configs/unlearning/salun.overlay.yaml" in words)
    assert several == [*one, "--trainer.devices=2", "--trainer.strategy=ddp"]


def test_extras_of_the_readme_exist():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for extra in re.findall(r'pip install -e "\.\[(\w+)\]"', (ROOT / "README.md").read_text(encoding="utf-8")):
        assert extra in setup["options.extras_require"]


def test_promise_is_three_lines():
    _, promise, *_ = (ROOT / "README.md").read_text(encoding="utf-8").split("\n\n")
    assert len(promise.splitlines()) == 3


def test_page_of_attacks_names_them_all():
    text = (ROOT / "docs" / "adversarial" / "attacks.md").read_text(encoding="utf-8")
    kinds = [getattr(lightning_trust.attacks, name) for name in lightning_trust.attacks.__all__]
    attacks = {kind.__name__ for kind in kinds if isinstance(kind, type) and issubclass(kind, Attack)}
    missing = {name for name in attacks if f"`{name}`" not in text}
    assert missing <= {"Attack", "SearchAttack"}


def test_yaml_of_the_robust_guide_runs(project, capsys):
    """One entry turns adversarial training on, another one tells the robust accuracy, with default Trainer flags."""
    (block,) = blocks(ROOT / "docs" / "adversarial" / "guide.md", "yaml")
    Path("robust.yaml").write_text(block)
    files = ["--config=mine.yaml", "--config=robust.yaml", "--trainer.default_root_dir=runs/robust"]
    cli = main(["fit", *files])
    names = [type(callback).__name__ for callback in cli.trainer.callbacks]
    assert {"AdversarialTraining", "RobustEvaluation"} <= set(names)
    main(["test", *files])
    assert "trust/robust_acc/autoattack" in capsys.readouterr().out
    record = RobustnessRecord.read("runs/robust")
    assert (record.label, record.samples) == ("TRADES", 30)
