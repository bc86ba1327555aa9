"""The search over ways of prompting a CLIP model of open_clip: a folder as published ones are, of random weights."""

import io
import json

import lightning.pytorch as pl
import pytest
import torch
from rich.console import Console
from torch.nn import functional as F

from lightning_trust.callbacks import IterativeLabelMapping, ScaleMonitor
from lightning_trust.cli import main
from lightning_trust.core.wrapping import checksum, surrounding
from lightning_trust.datamodules import Digits
from lightning_trust.functional.prompting import frequency_label_mapping
from lightning_trust.nn import CLIP_TEMPLATES_81, VisualPrompt, create_backbone, create_clip, load_prompt, save_clip
from lightning_trust.recipes import AutoVPTuner, VPSearchSpace
from tests.nn.prompting.test_open_clip_models import CONFIG

CPU = {"accelerator": "cpu"}
STD = CONFIG["preprocess_cfg"]["std"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a CLIP model lies as open_clip publishes them."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model, _ = create_clip(config=CONFIG)
    where = tmp_path_factory.mktemp("clip") / "tiny_clip"
    save_clip(where, model, CONFIG)
    return where


def digits():
    return Digits(32, train_rows=64, val_rows=40, test_rows=40)


def space(folder, **changes):
    arguments = {"num_map": (1, 5), "scale": (1.0, 2.0), "learn_scale": (True,), "image_size": 8}
    return VPSearchSpace({"clip": f"open_clip:{folder}"}, **{**arguments, **changes})


def test_a_grid_has_the_texts_of_the_tasks_classes(folder):
    grid = space(folder).grid(target_names=Digits.class_names)
    assert list(grid.families) == [
        *(
            "clip / fully",
            "clip / frequency / 1",
            "clip / frequency / 5",
            "clip / iterative / 1",
            "clip / iterative / 5",
        )
    ]
    config = next(grid.configs())
    assert (config.kind, config.num_source, config.num_target, config.out_size) == ("clip", 810, 10, 28)
    assert config.backbone_args == {"class_names": list(Digits.class_names)}
    # 40 in normalised space
    assert config.lr == pytest.approx(40 * sum(value**2 for value in STD) / 3, rel=5e-3)
    texts = grid.network(config).source_names
    first = [CLIP_TEMPLATES_81[0].format(name) for name in Digits.class_names]
    assert list(texts[:10]) == first


def test_a_full_mapping_begins_at_zero_shot(folder):
    grid = space(folder, mapping=("fully",)).grid(target_names=Digits.class_names)
    for config in grid.configs():
        network = grid.network(config)
        x = torch.rand(4, 1, 8, 8)
        found = config.build(network)(x)
        # by hand: the image enlarged by its scale about the middle of a black canvas, three channels alike
        theta = torch.tensor([[1 / config.scale, 0.0, 0.0], [0.0, 1 / config.scale, 0.0]]).expand(4, 2, 3)
        canvas = F.pad(x.expand(-1, 3, -1, -1), (10, 10, 10, 10))
        placed = F.grid_sample(canvas, F.affine_grid(theta, canvas.shape, align_corners=False), align_corners=False)
        mean, std = (torch.tensor(CONFIG["preprocess_cfg"][name]).view(-1, 1, 1) for name in ("mean", "std"))
        expected = network.network.zero_shot((placed - mean) / std, template=0)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_search_finds_a_configuration_and_leaves_the_model_as_it_was(folder):
    console = Console(file=io.StringIO(), record=True, width=150)
    backbone = create_backbone(f"open_clip:{folder}", class_names=Digits.class_names)
    before = checksum(backbone)
    some = VPSearchSpace({"clip": backbone}, num_map=(1,), scale=(1.5,), learn_scale=(True,), image_size=8, lr=(0.05,))
    tuner = AutoVPTuner(some, min_epochs=1, max_epochs=2, trainer_args=CPU, console=console)
    best = tuner.search(digits())
    assert sorted(row["config"].mapping for row in tuner.results) == ["frequency", "fully", "iterative"]
    assert {row["error"] for row in tuner.results} == {None}
    assert "clip / iterative / 1" in console.export_text()
    host = best.build()
    trainer = pl.Trainer(**CPU, max_epochs=1, callbacks=best.callbacks(), logger=False, enable_checkpointing=False)
    trainer.fit(host, digits())
    assert checksum(backbone) == before
    part, _ = surrounding(trainer, host, VisualPrompt)
    assert float(part.prompt.delta.detach().abs().max()) > 0
    assert float(part.prompt.scale.scale) != 1.5


def test_classes_get_texts_that_answer_to_their_images_most(folder):
    config = next(
        space(folder, mapping=("frequency",), num_map=(1,), scale=(1.0,)).grid(10, Digits.class_names).configs()
    )
    network = create_backbone(f"open_clip:{folder}", class_names=Digits.class_names)
    host = config.build(network)
    assert [type(callback) for callback in config.callbacks()] == [IterativeLabelMapping, ScaleMonitor]
    data = digits()
    trainer = pl.Trainer(**CPU, max_steps=1, callbacks=config.callbacks(), logger=False, enable_checkpointing=False)
    data.setup()
    inputs, targets = map(torch.stack, zip(*[(x, torch.tensor(y)) for x, y in data.train_dataset], strict=True))
    with torch.no_grad():
        answers = network(host.prompt(inputs)).argmax(dim=1)
    counts = torch.zeros(810, 10, dtype=torch.int64).index_put_((answers, targets), torch.tensor(1), accumulate=True)
    trainer.fit(host, data)
    assert torch.equal(host.mapping.indices, frequency_label_mapping(counts))
    assert int(counts.max()) > 1


@pytest.mark.parametrize("mapping", ["fully", "iterative"])
def test_a_written_configuration_runs_and_its_prompt_tells_the_texts(folder, mapping, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = next(space(folder, mapping=(mapping,), lr=(0.05,)).grid(target_names=Digits.class_names).configs())
    data = {"class_path": "Digits", "init_args": {"train_rows": 64, "val_rows": 32}}
    trainer = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False, "default_root_dir": "runs"}
    path = config.write("best.yaml", max_epochs=1, data=data, trainer=trainer)
    cli = main(["fit", f"--config={path}"])
    assert cli.trainer.global_step > 0
    card = json.loads((tmp_path / "runs" / "prompt" / "prompt.json").read_text())
    assert card["network"]["name"] == f"open_clip:{folder}"
    if mapping == "iterative":
        texts = create_backbone(f"open_clip:{folder}", class_names=Digits.class_names).source_names
        indices = cli.model.mapping.indices[:, 0].tolist()
        assert list(card["meaning"].values()) == [[texts[place]] for place in indices]
    # three lines, without a Trainer
    network = create_backbone(f"open_clip:{folder}", class_names=Digits.class_names)
    part = load_prompt(tmp_path / "runs" / "prompt", network)
    x = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(part(x), cli.model.eval()(x))
