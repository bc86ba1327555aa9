"""The search for a configuration: spaces, configurations as modules and as files, trials, storage."""

import itertools
import logging
import random

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from rich.console import Console

from lightning_trust.callbacks import IterativeLabelMapping, ScaleMonitor, VisualPrompting
from lightning_trust.cli import main
from lightning_trust.core.schedules import Steps
from lightning_trust.core.wrapping import checksum
from lightning_trust.datamodules import Digits
from lightning_trust.modules import ImageClassifier, VisualPromptClassifier
from lightning_trust.nn import (
    Backbone,
    BackboneSpec,
    FramePrompt,
    LabelMapping,
    LearnableScale,
    PadPrompt,
    SmallCNN,
    create_backbone,
    name_similarity,
)
from lightning_trust.recipes import AutoVPTuner, VPConfig, VPSearchSpace

NARROW = {"name": "SmallCNN", "num_classes": 20, "in_channels": 1, "image_size": 12, "network_args": {"widths": [4, 4]}}
QUIET = Console(quiet=True)
CPU = {"accelerator": "cpu"}


def clip_backbone(texts=8, std=(0.5, 0.5, 0.5)):
    """A network that says of itself that it is CLIP; its outputs are two texts of each of four classes."""
    names = tuple(f"text {place}" for place in range(texts))
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, texts))
    spec = BackboneSpec("tiny", "clip", texts, 3, (12, 12), (0.4, 0.5, 0.6), std, names, ("a {}.", "the {}."))
    return Backbone(network, spec)


def narrow_backbone(seed=0):
    """The weights are those of the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Backbone(SmallCNN(1, 20, (4, 4)), BackboneSpec("SmallCNN", "classifier", 20, 1, (12, 12)))


def space(**changes):
    arguments = {
        "backbones": {"narrow": narrow_backbone()},
        "mapping": ("fully", "frequency", "iterative"),
        "num_map": (1, 2),
        "scale": (0.5, 1.0),
        "image_size": 8,
    }
    return VPSearchSpace(**{**arguments, **changes})


def plain(arguments):
    return {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}


def digits():
    return Digits(32, train_rows=64, val_rows=40, test_rows=40)


class Analytic(AutoVPTuner):
    """Scores are known: a curve that rises by the same steps, to the score of the configuration."""

    failing = ()
    killed_after = None

    def __init__(self, *args, **kwargs):
        self.seen, self.pruned = [], []
        super().__init__(*args, console=QUIET, **kwargs)

    @staticmethod
    def score(config):
        mapping = {"fully": 0.3, "frequency": 0.1, "iterative": 0.2}[config.mapping]
        return mapping + 0.05 * config.num_map + 0.1 * config.scale - 0.01 * config.learn_scale - 0.01 * config.lr

    def evaluate(self, config, network, datamodule, report):
        if self.killed_after is not None and len(self.seen) == self.killed_after:
            raise KeyboardInterrupt
        self.seen.append(config)
        if (config.mapping, config.scale) in self.failing:
            raise RuntimeError("out of memory")
        for epoch in range(1, self.max_epochs + 1):
            if report(epoch, self.score(config) * epoch / self.max_epochs):
                self.pruned.append(config)
                return self.score(config) * epoch / self.max_epochs
        return self.score(config)


# -- a known objective -------------------------------------------------------------------------------------------------
def test_a_grid_visits_each_configuration_once_and_gives_the_best():
    tuner = Analytic(space(), pruner=None)
    best = tuner.search(digits())
    every = list(space().grid(10).configs())
    assert len(every) == 20
    assert len(tuner.seen) == 20
    assert all(tuner.seen.count(config) == 1 for config in every)
    assert best == max(every, key=Analytic.score)
    assert [row["value"] for row in tuner.results] == sorted(map(Analytic.score, every), reverse=True)
    assert [row["rank"] for row in tuner.results] == list(range(1, 21))
    assert {row["state"] for row in tuner.results} == {"complete"}


def test_a_loss_is_minimised():
    tuner = Analytic(space(), pruner=None, mode="min")
    assert tuner.search(digits()) == min(space().grid(10).configs(), key=Analytic.score)


@pytest.mark.parametrize("seed", range(5))
def test_the_winner_is_never_pruned(seed):
    tuner = Analytic(space(), min_epochs=1, max_epochs=6, seed=seed)
    best = tuner.search(digits())
    assert best == max(space().grid(10).configs(), key=Analytic.score)
    assert best not in tuner.pruned
    # what is pruned at one or two or four epochs is not among the better half of what was there then
    assert tuner.pruned
    rows = {row["state"]: row for row in reversed(tuner.results)}
    assert rows["pruned"]["epochs"] in (1, 2, 4)
    assert [row["state"] for row in tuner.results] == sorted(row["state"] for row in tuner.results)


def test_successive_halving_of_a_known_order():
    """Replayed by hand: at r_min 2^k epochs a trial goes on if it is among the better half of those that got there."""
    tuner = Analytic(space(), min_epochs=2, max_epochs=5, seed=3)
    tuner.search(digits())
    rungs = {2: [], 4: []}
    expected = []
    for config in tuner.seen:
        for epoch, there in rungs.items():
            value = Analytic.score(config) * epoch / 5
            there.append(value)
            if value < sorted(there, reverse=True)[max(len(there) // 2, 1) - 1]:
                expected.append((config, epoch))
                break
    found = [(row["config"], row["epochs"]) for row in tuner.results if row["state"] == "pruned"]
    assert len(found) == len(expected)
    assert all(each in found for each in expected)


def test_a_failed_trial_does_not_end_the_search():
    tuner = Analytic(space(), pruner=None)
    tuner.failing = (("fully", 1.0), ("iterative", 0.5))
    with pytest.warns(UserWarning, match="trial .* failed, the search goes on. RuntimeError: out of memory"):
        best = tuner.search(digits())
    left = [each for each in space().grid(10).configs() if (each.mapping, each.scale) not in tuner.failing]
    assert best == max(left, key=Analytic.score)
    failed = [row for row in tuner.results if row["state"] == "failed"]
    assert failed == tuner.results[-len(failed) :]
    assert {row["error"] for row in failed} == {"RuntimeError: out of memory"}
    assert len(tuner.results) == 20


def test_when_all_trials_fail_the_first_error_is_told():
    tuner = Analytic(space(mapping=("fully",)), pruner=None)
    tuner.failing = (("fully", 0.5), ("fully", 1.0))
    with (
        pytest.warns(UserWarning, match="failed"),
        pytest.raises(RuntimeError, match="Every one of 4 trials failed.*out of memory"),
    ):
        tuner.search(digits())


@pytest.mark.parametrize("sampler", ["grid", "tpe", "random"])
def test_the_same_seed_finds_the_same(sampler):
    seen = []
    for seed in (1, 1, 2):
        tuner = Analytic(space(lr=(0.1, 0.2, 0.3)), sampler, n_trials=12, seed=seed)
        best = tuner.search(digits())
        seen.append((best, tuner.seen))
        assert len(tuner.results) == 12
    assert seen[0] == seen[1]
    assert seen[0][1] != seen[2][1]


def test_what_is_drawn_again_is_not_trained_again():
    tuner = Analytic(space(mapping=("fully",)), "random", None, n_trials=15)
    tuner.search(digits())
    assert len(tuner.results) == 15
    assert len(tuner.seen) == len({str(config) for config in tuner.seen}) <= 4


@pytest.mark.parametrize("suffix", [".journal", ".db"])
@pytest.mark.parametrize("sampler", ["grid", "tpe"])
def test_a_killed_search_goes_on_at_the_next_trial(sampler, suffix, tmp_path):
    arguments = {"sampler": sampler, "n_trials": 12, "min_epochs": 1, "seed": 4}
    straight = Analytic(space(), **arguments)
    straight.search(digits())
    storage = str(tmp_path / "made" / f"study{suffix}")
    first = Analytic(space(), storage=storage, **arguments)
    first.killed_after = 5
    with pytest.raises(KeyboardInterrupt):
        first.search(digits())
    second = Analytic(space(), storage=storage, **arguments)
    best = second.search(digits())
    assert len(second.results) == 12
    assert len(first.seen) == 5
    seen = [*first.seen, *second.seen]
    assert seen[:5] == straight.seen[:5]
    if sampler == "grid":
        # as in one go, but for the one that was killed: its turn comes at the end of the grid
        assert seen[5:11] == straight.seen[6:12]
        assert len(seen) == len(set(map(str, seen))) == 12
        assert Analytic.score(best) == max(map(Analytic.score, seen))
    else:
        # a trial is drawn for its number and what was found before
        assert seen[5] in space().grid(10).configs()
    # nothing is left to do
    third = Analytic(space(), storage=storage, **arguments)
    assert third.search(digits()) == best
    assert third.seen == []


def test_a_killed_grid_is_finished(tmp_path):
    storage = str(tmp_path / "study.journal")
    first = Analytic(space(), pruner=None, storage=storage)
    first.killed_after = 7
    with pytest.raises(KeyboardInterrupt):
        first.search(digits())
    second = Analytic(space(), pruner=None, storage=storage)
    assert second.search(digits()) == max(space().grid(10).configs(), key=Analytic.score)
    seen = [*first.seen, *second.seen]
    assert sorted(map(str, seen)) == sorted(map(str, space().grid(10).configs()))


def test_more_trials_can_follow(tmp_path):
    storage = str(tmp_path / "study.journal")
    one = Analytic(space(), "tpe", None, n_trials=4, storage=storage)
    one.search(digits())
    more = Analytic(space(), "tpe", None, n_trials=9, storage=storage)
    more.search(digits())
    straight = Analytic(space(), "tpe", None, n_trials=9)
    straight.search(digits())
    assert [*one.seen, *more.seen] == straight.seen


def test_a_study_of_another_search_is_refused(tmp_path):
    storage = str(tmp_path / "study.journal")
    Analytic(space(), storage=storage).search(digits())
    for other in (
        Analytic(space(scale=(0.5,)), storage=storage),
        Analytic(space(), storage=storage, max_epochs=9),
        Analytic(space(backbones={"narrow": narrow_backbone(seed=1)}), storage=storage),
    ):
        with pytest.raises(MisconfigurationException, match=r"`storage` .*study.journal holds 20 of another one"):
            other.search(digits())


# -- spaces ------------------------------------------------------------------------------------------------------------
def test_what_cannot_be_is_left_out_and_said(caplog):
    logging.getLogger("lightning.pytorch.utilities.rank_zero").propagate = True
    with caplog.at_level(logging.INFO):
        grid = space(mapping=("fully", "frequency"), num_map=(1, 2, 3), scale=(1.0,), learn_scale=(True,)).grid(10)
    assert list(grid.families) == ["narrow / fully", "narrow / frequency / 1", "narrow / frequency / 2"]
    assert "leaves out num_map=3 of 'narrow' (frequency): 3 x 10 classes are more than its 20" in caplog.text


def test_every_choice_meets_every_other():
    clip = clip_backbone()
    some = space(backbones={"narrow": NARROW, "clip": clip}, lr=(0.1, None), weight_decay=(0.0, 1e-5), num_map=(1,))
    found = list(some.grid(4).configs())
    assert len(found) == len(set(map(str, found))) == 2 * 3 * 2 * 2 * 2 * 2
    classifier, other = found[0], next(each for each in found if each.kind == "clip" and each.lr != 0.1)
    assert (classifier.mean, classifier.out_size, classifier.channels) == (None, 12, 1)
    assert (other.mean, other.std) == ((0.4, 0.5, 0.6), (0.5, 0.5, 0.5))
    # 40 in normalised space
    assert other.lr == 10.0
    assert other.network is clip


def test_a_step_of_forty_in_normalised_space():
    """A step of SGD on the raw frame is one with 40 on a frame behind the normalisation."""
    clip = clip_backbone(std=(0.25, 0.25, 0.25))
    some = VPSearchSpace({"clip": clip}, ("fully",), scale=(1.0,), learn_scale=(False,), image_size=6)
    config = next(some.grid(4).configs())
    x = torch.rand(3, 3, 6, 6)
    prompt = config.prompt()
    loss = clip(prompt(x)).logsumexp(dim=1).sum()
    loss.backward()
    moved = -config.lr * prompt.delta.grad
    mean = torch.tensor(clip.spec.mean).view(-1, 1, 1)
    behind = torch.zeros(3, 12, 12, requires_grad=True)
    canvas, side = config.scaling()(x)
    clip((canvas - mean) / 0.25 + behind * prompt.frame(side)).logsumexp(dim=1).sum().backward()
    torch.testing.assert_close(moved / 0.25, -40.0 * behind.grad)


def test_a_second_search_around_the_winner():
    config = next(space(mapping=("iterative",)).grid(10).configs())
    around = VPSearchSpace.around(config, lr=(1e-2, 1e-3, 1e-4), weight_decay=(0.0, 1e-5, 1e-10)).grid(10)
    assert len(around) == 9
    assert {each.scale for each in around.configs()} == {config.scale}
    assert next(each for each in around.configs() if each.lr == config.lr and not each.weight_decay) == config


# -- semantic mapping --------------------------------------------------------------------------------------------------
def embedding(names):
    """Distinct directions, of many lengths."""
    rows = [torch.randn(16, generator=torch.Generator().manual_seed(sum(map(ord, name)))) for name in names]
    return torch.stack([row * (1 + place) for place, row in enumerate(rows)])


def test_equal_names_mean_themselves():
    names = ["ant", "bee", "cat", "dog", "eel"]
    mapping = LabelMapping(5, 5, "semantic")
    mapping.fit_similarity(name_similarity(names, names, embedding))
    assert mapping.indices.flatten().tolist() == list(range(5))


def test_cosines_of_names():
    found = name_similarity(["ant", "bee", "cat"], ["cat", "ox"], embedding)
    expected = torch.cosine_similarity(embedding(["cat", "ox"])[:, None], embedding(["ant", "bee", "cat"])[None], dim=2)
    torch.testing.assert_close(found, expected)


def test_two_sources_each_in_turn():
    mapping = LabelMapping(4, 2, "semantic", sources_per_target=2)
    mapping.fit_similarity(torch.tensor([[0.9, 0.8, 0.1, 0.7], [0.95, 0.6, 0.5, 0.2]]))
    # the first takes 0, the second what is left of its liking, 1; the first 3, the second 2
    assert mapping.indices.tolist() == [[0, 3], [1, 2]]


def test_a_space_with_names():
    names = [f"garment {place}" for place in range(20)]
    backbone = {**NARROW, "class_names": names}
    some = space(backbones={"narrow": backbone}, mapping=("semantic",), text_encoder=embedding, target_names=names[10:])
    found = {config.num_map: config for config in some.grid().configs()}
    assert found[1].indices == [[place] for place in range(10, 20)]
    mapping = found[1].build().mapping
    assert bool(mapping.fitted)
    assert mapping.indices.tolist() == found[1].indices
    assert sorted(itertools.chain(*found[2].indices)) == list(range(20))


def test_a_mixed_space_leaves_semantic_to_what_has_names(caplog):
    logging.getLogger("lightning.pytorch.utilities.rank_zero").propagate = True
    named = {**NARROW, "class_names": [str(place) for place in range(20)]}
    some = space(
        backbones={"named": named, "clip": clip_backbone()},
        mapping=("semantic",),
        num_map=(1,),
        text_encoder=embedding,
        target_names=list("abcd"),
    )
    with caplog.at_level(logging.INFO):
        assert list(some.grid().families) == ["named / semantic / 1"]
    assert "leaves out semantic mapping of 'clip'" in caplog.text


# -- one configuration -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mapping", ["fully", "frequency", "iterative"])
@pytest.mark.parametrize("learn", [True, False])
def test_a_configuration_is_built(mapping, learn):
    config = next(space(mapping=(mapping,), num_map=(2,), learn_scale=(learn,)).grid(10).configs())
    model = config.build(max_epochs=100)
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    assert model.schedule == Steps([1.0, 0.1, 0.01], [50.0, 72.0])
    assert config.build().schedule == "cosine"
    kinds = [type(callback) for callback in config.callbacks()]
    assert kinds == ([] if mapping == "fully" else [IterativeLabelMapping]) + [ScaleMonitor]
    trained = {name.rpartition("part.")[2] for name, value in model.named_parameters() if value.requires_grad}
    expected = {"prompt.delta"} | ({"prompt.scale.scale"} if learn else set())
    assert trained == expected | ({"mapping.linear.weight", "mapping.linear.bias"} if mapping == "fully" else set())


def test_clip_begins_at_its_first_template():
    clip = clip_backbone()
    config = next(VPSearchSpace({"clip": clip}, ("fully",), image_size=12).grid(4).configs())
    model = config.build()
    assert (model.prompt.squash, config.schedule(100)) == ("none", "cosine")
    x = torch.rand(5, 3, 12, 12)
    inputs = model.prompt(x)
    assert torch.equal(model(x), clip(inputs)[:, :4])
    groups = config.build().network.part.parameter_groups(1e-3)
    optimizer = model._make_optimizer(groups)
    assert type(optimizer) is torch.optim.SGD
    assert [group["lr"] for group in optimizer.param_groups] == [10.0, 1e-3]
    assert optimizer.defaults["momentum"] == 0.9


@pytest.mark.parametrize("mapping", ["fully", "iterative", "semantic"])
def test_a_written_configuration_runs(mapping, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [f"garment {place}" for place in range(20)]
    some = space(
        backbones={"narrow": {**NARROW, "class_names": names}},
        mapping=(mapping,),
        text_encoder=embedding,
        target_names=names[5:15],
    )
    config = list(some.grid().configs())[-1]
    data = {"class_path": "Digits", "init_args": {"batch_size": 32, "train_rows": 64, "val_rows": 32}}
    path = config.write(
        "best.yaml", max_epochs=2, data=data, trainer={"accelerator": "cpu", "enable_progress_bar": False}
    )
    cli = main(["fit", f"--config={path}", "--trainer.default_root_dir=runs"])
    assert cli.trainer.global_step == 4
    model, own = cli.model, config.build()
    assert isinstance(model, VisualPromptClassifier)
    for found, expected in ((model.prompt, own.prompt), (model.mapping, own.mapping)):
        assert type(found) is type(expected)
        assert plain(found.hparams) == plain(expected.hparams)
    assert plain(model.prompt.scale.hparams) == plain(own.prompt.scale.hparams)
    assert cli.trainer.optimizers[0].defaults["lr"] == config.lr
    assert (tmp_path / "runs" / "prompt" / "prompt.safetensors").is_file()
    assert "trust/vp_scale" in cli.trainer.callback_metrics
    if mapping == "semantic":
        assert torch.equal(model.mapping.indices, own.mapping.indices)
    content = yaml.safe_load(path.read_text())
    assert content["model"]["init_args"]["schedule"]["init_args"] == {
        "values": [1.0, 0.1, 0.01],
        "milestones": [1.0, 1.44],
    }


def test_a_written_configuration_leaves_the_data_to_the_user(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = next(space(backbones={"narrow": NARROW}).grid(10).configs())
    assert "data" not in yaml.safe_load(config.write("best.yaml", max_epochs=1).read_text())
    own = {
        "data": {"class_path": "Digits", "init_args": {"train_rows": 32, "val_rows": 16}},
        "trainer": {"logger": False},
    }
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(own))
    cli = main(["fit", "--config=best.yaml", "--config=data.yaml", "--trainer.accelerator=cpu"])
    assert cli.trainer.global_step == 1


# -- real trials -------------------------------------------------------------------------------------------------------
def real(**changes):
    some = space(num_map=(1,), scale=(1.0,), learn_scale=(True,), lr=(0.1,), mapping_lr=0.05)
    arguments = {"min_epochs": 1, "max_epochs": 2, "trainer_args": CPU, "console": QUIET}
    return AutoVPTuner(changes.pop("space", some), **{**arguments, **changes})


def test_a_search_leaves_the_backbone_and_the_random_state_as_they_were():
    backbone = narrow_backbone()
    before, modules = checksum(backbone), len(list(backbone.modules()))
    torch.manual_seed(5)
    random.seed(5)
    expected = (torch.rand(3), random.random())
    torch.manual_seed(5)
    random.seed(5)
    tuner = real(space=space(backbones={"built": backbone}, num_map=(1,), scale=(1.0,), learn_scale=(True,)))
    best = tuner.search(digits())
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]
    trainer = pl.Trainer(
        max_epochs=1, callbacks=best.callbacks(), logger=False, enable_checkpointing=False, accelerator="cpu"
    )
    trainer.fit(best.build(), digits())
    assert checksum(backbone) == before
    assert len(list(backbone.modules())) == modules
    assert len(tuner.results) == 3
    assert all(0.0 <= row["value"] <= 1.0 for row in tuner.results)


def test_trials_see_the_first_learning_rate_and_both_spellings_of_the_metric():
    rates = []

    class Rates(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    values = {}
    for metric in ("val_acc", "val/acc"):
        tuner = real(metric=metric, trainer_args={**CPU, "callbacks": [Rates()]}, pruner=None)
        tuner.search(digits())
        values[metric] = [(row["trial"], row["value"]) for row in tuner.results]
    assert values["val_acc"] == values["val/acc"]
    # the mapping and the scale have their own
    assert {tuple(each) for each in rates} == {(0.1, 0.05)}


def test_training_accuracy_is_that_of_the_epochs_steps():
    hits = []

    class Watched(VisualPromptClassifier):
        pass

    class Count(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            hits.clear()

        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            pass

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            with torch.no_grad():
                hits.extend((pl_module(batch[0]).argmax(dim=1) == batch[1]).tolist())

    tuner = real(
        space=space(mapping=("fully",), scale=(1.0,), learn_scale=(True,), lr=(0.1,)),
        metric="train_acc",
        trainer_args={**CPU, "callbacks": [Count()]},
    )
    tuner.search(digits())
    assert tuner.results[0]["value"] == pytest.approx(sum(hits) / len(hits))
    assert len(hits) == 64


def test_the_table_is_ranked():
    console = Console(record=True, width=150, file=open("/dev/null", "w"))  # noqa: SIM115
    tuner = real(console=console)
    best = tuner.search(digits())
    text = console.export_text()
    assert "AutoVP: 3 trials by val_acc" in text
    lines = [line for line in text.splitlines() if "narrow / " in line]
    assert len(lines) == 3
    assert best.mapping in lines[0]


def test_the_scale_is_logged_in_a_prompt_of_a_users_run():
    seen = []

    class Read(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(float(part.scale.scale))

    part = FramePrompt(LearnableScale(8, 12, channels=1, init=0.8))
    prompting = VisualPrompting(
        part, LabelMapping(20, 10, "identity"), optimizer=lambda params: torch.optim.SGD(params, 0.1)
    )
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        callbacks=[prompting, ScaleMonitor(), Read()],
    )
    trainer.fit(ImageClassifier(SmallCNN(1, 20, (4, 4)), 10), digits())
    assert float(trainer.callback_metrics["trust/vp_scale"]) == pytest.approx(seen[-1])
    assert seen[-1] != pytest.approx(0.8)


# -- bad input ---------------------------------------------------------------------------------------------------------
def test_a_metric_that_is_not_logged_names_those_that_are():
    with pytest.raises(MisconfigurationException, match=r"'val_f1' and there are: .*val/acc, val/loss"):
        real(metric="val_f1").search(digits())


def test_no_optuna(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(ImportError, match=r"lightning_trust\[tune\]"):
        real().search(digits())


def test_no_ray(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ImportError, match=r"lightning_trust\[ray\]"):
        real(backend="ray").search(digits())


def test_several_processes_of_a_launcher(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(RuntimeError, match="one of several"):
        real().search(digits())


def test_a_built_backbone_cannot_be_written(tmp_path):
    config = next(VPSearchSpace({"clip": clip_backbone()}, ("fully",), image_size=12).grid(4).configs())
    with pytest.raises(MisconfigurationException, match="'clip' was given as a Backbone"):
        config.write(tmp_path / "best.yaml")


def test_a_run_without_a_scale():
    host = VisualPromptClassifier(create_backbone("SmallCNN", num_classes=20, in_channels=1), PadPrompt(8, 12, 1), None)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[ScaleMonitor()]
    )
    with pytest.raises(MisconfigurationException, match="found no LearnableScale"):
        trainer.fit(host, digits())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: space(mapping=()), "`mapping` to hold at least one choice, or the search space is empty"),
        (lambda: space(backbones={}), "`backbones` to hold at least one choice"),
        (lambda: space(scale=(0.5, 0.0)), "`scale` to hold numbers above zero"),
        (lambda: space(scale=(6.0,)).grid(10), "within bounds"),
        (lambda: space(num_map=(0,)), "`num_map` to hold numbers of at least 1"),
        (lambda: space(mapping=("fuly",)), r"`mapping` to hold some of .*, but got \['fuly'\]"),
        (lambda: space(scale=(1.0, 1.0)), "each choice once"),
        (lambda: space(mapping=("frequency",), num_map=(3,)).grid(10), "at least one configuration, but none of"),
        (lambda: space(image_size=13).grid(10), "`image_size` to be in 1, ..., out_size=12, but got 13"),
        (lambda: space(target_names=["a"], num_target=2).grid(), "to hold 2 names, but got 1"),
        (lambda: space(backbones={"a": {"num_classes": 3}}).grid(10), r"backbones\['a'\].* to have a `name`"),
        (lambda: space(backbones={"a": 3}).grid(10), r"backbones\['a'\].* a int"),
        (lambda: space(backbones={"a": "timm:resnet19"}).grid(10), "resnet18"),
        (lambda: VPSearchSpace({"clip": clip_backbone(4)}, ("fully",), image_size=8).grid(5), "num_source=4"),
        (lambda: name_similarity(["a"], ["b"], lambda names: torch.zeros(len(names), 3)), "length 0.0"),
        (lambda: name_similarity([], ["b"], embedding), "`source_names`"),
        (lambda: VPConfig("SmallCNN", 4, 2, mapping="all"), "`mapping` to be one of"),
        (lambda: VPConfig("SmallCNN", 4, 2, kind="vit"), "`kind` to be one of"),
        (lambda: VPConfig("SmallCNN", 4, 2, mapping="frequency", num_map=3), "num_source=4"),
        (lambda: VPConfig("SmallCNN", 4, 2, lr=-1.0), "not to be negative"),
        (lambda: AutoVPTuner(space(), sampler="bayes"), "`sampler` to be one of .*'tpe'.* but got 'bayes'"),
        (lambda: AutoVPTuner(space(), backend="hyperopt"), r"`backend` to be one of \['optuna', 'ray'\]"),
        (lambda: AutoVPTuner(space(), pruner="median"), "`pruner` to be one of"),
        (lambda: AutoVPTuner(space(), min_epochs=4, max_epochs=3), "ascending order and at least 1, but got 4 and 3"),
        (lambda: AutoVPTuner(space(), n_trials=0), "`n_trials` to be at least 1"),
        (lambda: Analytic(space(), storage="trials.txt").search(digits()), "`storage` to be a file ending in"),
    ],
)
def test_bad_values(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: space(mapping=("semantic",), text_encoder=embedding).grid(10), "needs named source classes.*'narrow'"),
        (
            lambda: VPSearchSpace({"clip": clip_backbone()}, ("semantic",), image_size=8).grid(4),
            "needs named source classes, but those of the CLIP model 'clip'",
        ),
        (lambda: VPConfig("a", 4, 2, kind="clip", mapping="semantic"), "needs named source classes, but.* CLIP"),
        (lambda: VPConfig("a", 4, 2, mapping="semantic"), "without `indices`"),
        (
            lambda: space(
                backbones={"a": {**NARROW, "class_names": [str(place) for place in range(20)]}}, mapping=("semantic",)
            ).grid(10, list("abcdefghij")),
            "needs a `text_encoder`",
        ),
        (lambda: space().grid(), "needs the number of classes"),
    ],
)
def test_bad_combinations(call, words):
    with pytest.raises(MisconfigurationException, match=words):
        call()
