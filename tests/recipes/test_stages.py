"""A recipe runs what is not finished, and nothing else."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from lightning_trust.cli import main
from lightning_trust.recipes import Recipe, Stage


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("a: 1")
    Path("b.yaml").write_text("b: 1")
    return tmp_path


class Calls(list):
    """Stands for the command line: notes its arguments, and fails where it is told to."""

    fail: str | None = None

    def __call__(self, args):
        if self.fail is not None and any(self.fail in arg for arg in args):
            raise SystemExit(2)
        self.append(args)


STAGES = [
    {"name": "train", "command": "fit", "args": {"config": ["a.yaml"], "trainer.max_epochs": "${epochs}"}},
    {"name": "forget", "command": "fit", "needs": ["train"], "args": {"config": ["a.yaml", "b.yaml"]}},
    {"name": "other", "command": "validate", "args": {"config": "b.yaml", "trainer.logger": None}},
    {"name": "report", "command": "report", "args": {"paths": ["${folder}"], "output": "${stage}/report.html"}},
]


def recipe(stages=None, **changes):
    data = {"folder": "runs/demo", "variables": {"epochs": 3}, "stages": stages or STAGES, **changes}
    Path("recipe.yaml").write_text(yaml.safe_dump(data))
    return Recipe.read("recipe.yaml")


def run(made, calls):
    console = Console(file=io.StringIO(), width=200)
    try:
        return made.run(calls, console), console.file.getvalue()
    except SystemExit:
        return None, console.file.getvalue()


def test_stages_become_command_lines_in_order(place):
    calls = Calls()
    ran, text = run(recipe(), calls)
    assert calls == [
        ["fit", "--config=a.yaml", "--trainer.max_epochs=3"],
        ["fit", "--config=a.yaml", "--config=b.yaml"],
        ["validate", "--config=b.yaml", "--trainer.logger=null"],
        ["report", "runs/demo", "--output=runs/demo/report/report.html"],
    ]
    assert ran == ["train", "forget", "other", "report"]
    assert "[1/4] train (fit)" in text
    assert "4 of 4 stages ran" in text
    record = json.loads(Path("runs/demo/train/stage.json").read_text())
    assert record["kind"] == "lightning_trust.stage"
    assert record["seconds"] >= 0


def test_finished_stages_are_skipped_with_a_word_and_the_report_is_shown_again(place):
    run(recipe(), Calls())
    calls = Calls()
    ran, text = run(recipe(), calls)
    assert ran == ["report"]
    assert [call[0] for call in calls] == ["report"]
    assert text.count("unchanged, skipped") == 3
    assert "1 of 4 stages ran" in text


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (lambda: Path("a.yaml").write_text("a: 2"), ["train", "forget", "report"]),
        (lambda: Path("b.yaml").write_text("b: 2"), ["forget", "other", "report"]),
        (lambda: Path("a.yaml").touch(), ["report"]),
        (lambda: Path("runs/demo/train/stage.json").unlink(), ["train", "forget", "report"]),
        (lambda: Path("runs/demo/train/stage.json").write_text('{"kin'), ["train", "forget", "report"]),
        (lambda: Path("runs/demo/report/stage.json").unlink(), ["report"]),
    ],
)
def test_a_change_reruns_its_stage_and_what_needs_it(place, change, again):
    run(recipe(), Calls())
    change()
    ran, _ = run(recipe(), Calls())
    assert ran == again
    assert run(recipe(), Calls())[0] == ["report"]


def test_a_changed_variable_reruns_the_stages_that_use_it(place):
    run(recipe(), Calls())
    ran, _ = run(recipe(variables={"epochs": 4}), Calls())
    assert ran == ["train", "forget", "report"]


def test_a_file_named_by_an_override_counts(place):
    Path("trainer.yaml").write_text("max_epochs: 1")
    stages = [{"name": "a", "command": "fit", "args": {"config": "a.yaml", "trainer": "trainer.yaml"}}]
    run(recipe(stages), Calls())
    assert run(recipe(stages), Calls())[0] == []
    Path("trainer.yaml").write_text("max_epochs: 2")
    assert run(recipe(stages), Calls())[0] == ["a"]


def test_a_failed_stage_leaves_no_record_and_the_next_call_goes_on_there(place):
    calls = Calls()
    calls.fail = "b.yaml"
    ran, text = run(recipe(), calls)
    assert ran is None
    assert "[2/4] forget failed" in text
    assert len(calls) == 1
    assert not Path("runs/demo/forget").exists()
    assert run(recipe(), Calls())[0] == ["forget", "other", "report"]


def test_a_failure_takes_back_the_record_of_an_older_run(place):
    run(recipe(), Calls())
    old = Path("a.yaml").read_text()
    Path("a.yaml").write_text("a: 2")
    calls = Calls()
    calls.fail = "a.yaml"
    run(recipe(), calls)
    # the old configuration comes back, but its outputs may be half overwritten
    Path("a.yaml").write_text(old)
    assert run(recipe(), Calls())[0] == ["train", "forget", "report"]


def test_overrides_of_every_type():
    args = {"config": [], "a": True, "b": [1, 2], "c+": {"class_path": "K"}, "d": "text", "e": 0.5}
    assert Stage("s", "test", args).command_line() == [
        "test",
        "--a=true",
        "--b=[1, 2]",
        '--c+={"class_path": "K"}',
        "--d=text",
        "--e=0.5",
    ]


def test_variables_keep_their_type_and_a_doubled_sign_is_plain(place):
    stages = [{"name": "a", "command": "fit", "args": {"x": "${list}", "y": "n=${n}", "z": "$${n}", "w": "${stage}"}}]
    made = recipe(stages, variables={"list": [1, 2], "n": 3})
    assert made.stages[0].args == {"x": [1, 2], "y": "n=3", "z": "${n}", "w": "runs/demo/a"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"stage": []}, r"keys \['folder', 'variables', 'stages'\], but got \['stage'\]. Did you mean 'stages'\?"),
        ({}, "Expected `stages` to be a list of mappings, but got None"),
        ({"stages": []}, "at least one stage"),
        ({"stages": [3]}, "list of mappings"),
        (
            {"stages": [{"name": "a", "command": "fit", "arg": {}}]},
            r"stage 'a' .* got \['arg'\]. Did you mean 'args'\?",
        ),
        ({"stages": [{"name": "a"}]}, r"stage 'a' to have \['command'\]"),
        ({"stages": [{"name": "a/b", "command": "fit"}]}, "letters, digits, .* but got 'a/b'"),
        ({"stages": [{"name": "a", "command": "train"}]}, "`command` of stage 'a' to be one of .* but got 'train'"),
        ({"stages": [{"name": "a", "command": "fit", "args": [1]}]}, "`args` of stage 'a' to be a mapping"),
        ({"stages": [{"name": "a", "command": "fit", "needs": "b"}]}, "`needs` of stage 'a' to be a list of names"),
        ({"stages": [{"name": "a", "command": "fit", "needs": ["b"]}]}, r"before it \(there are none\), but got 'b'"),
        ({"stages": [{"name": "a", "command": "fit"}] * 2}, "a name of its own, but got 'a' twice"),
        ({"stages": [{"name": "a", "command": "report"}]}, "to have `paths` and `output`"),
        (
            {"stages": [{"name": "a", "command": "report", "args": {"path": 1}}]},
            r"got \['path'\]. Did you mean 'paths'\?",
        ),
        (
            {"variables": {"rows": 1}, "stages": [{"name": "a", "command": "fit", "args": {"x": "${row}"}}]},
            r"`\$\{row\}` to be one of the variables.*Did you mean 'rows'\?",
        ),
        ({"variables": {"stage": 1}, "stages": []}, r"leave `folder` and `stage` to the recipe, but got \['stage'\]"),
        ({"variables": [1], "stages": []}, "`variables` to be a mapping"),
        ({"folder": 3, "stages": []}, "`folder` to be a path, but got 3"),
    ],
)
def test_bad_recipes_are_refused_in_words(place, data, message):
    Path("recipe.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(ValueError, match=message) as error:
        Recipe.read("recipe.yaml")
    assert str(error.value).startswith("recipe.yaml: ")


def test_files_that_are_no_recipe_are_refused(place):
    with pytest.raises(FileNotFoundError, match=r"there is no absent\.yaml"):
        Recipe.read("absent.yaml")
    Path("recipe.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match=r"recipe\.yaml to be a YAML file, but it is damaged"):
        Recipe.read("recipe.yaml")
    Path("recipe.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="a mapping with `stages`, but got list"):
        Recipe.read("recipe.yaml")


def test_a_missing_configuration_is_named(place):
    made = recipe([{"name": "a", "command": "fit", "args": {"config": "absent.yaml"}}])
    with pytest.raises(FileNotFoundError, match=r"`config` of stage 'a' to name files, but there is no absent\.yaml"):
        made.run(Calls(), Console(file=io.StringIO()))


def test_one_of_several_processes_is_refused(place, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(RuntimeError, match="ddp_fork"):
        recipe().run(Calls())


def test_real_runs_through_the_command_line(place, monkeypatch, capsys):
    config = {
        "seed_everything": 1,
        "model": "lightning.pytorch.demos.boring_classes.BoringModel",
        "data": "lightning.pytorch.demos.boring_classes.BoringDataModule",
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 1,
            "limit_train_batches": 1,
            "limit_val_batches": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    }
    Path("fit.yaml").write_text(yaml.safe_dump(config))
    stages = [
        {"name": "train", "command": "fit", "args": {"config": "fit.yaml", "trainer.default_root_dir": "${stage}"}},
        {"name": "check", "command": "validate", "needs": ["train"], "args": {"config": "fit.yaml"}},
    ]
    assert recipe(stages).run(main) == ["train", "check"]
    assert recipe(stages).run(main) == []
    assert main(["run", "recipe.yaml"]) is None
    assert "[2/2] check: finished" in capsys.readouterr().out
