"""The runs of docs/adversarial/saliency_guided_adversarial_training.md: whole, and at the scale of the paper."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lightning_trust.cli import main
from lightning_trust.cli.training import TrainingCLI

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "adversarial" / "saliency_guided_adversarial_training.yaml"
FEW = {"root": str(ROOT / "data"), "train_rows": 60, "val_rows": 10, "test_rows": 40}


def test_whole_run_is_measured_at_home_and_at_the_new_site(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    content["data"]["init_args"].update(FEW)
    own, sites, robust, _ = content["trainer"]["callbacks"]
    (site,) = sites["init_args"]["sets"].values()
    # the two sites differ in the pattern alone
    site["init_args"].update(FEW)
    assert site["init_args"] == {**content["data"]["init_args"], "shifted": True}
    assert own["init_args"]["attack"]["init_args"]["eps"] > content["data"]["init_args"]["amplitude"]
    robust["init_args"]["attacks"].pop("autoattack")
    Path("run.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    flags = ["--config=run.yaml", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    main(["fit", *flags, "--trainer.max_epochs=1"])
    checkpoint = Path(content["trainer"]["default_root_dir"], "checkpoints", "last.ckpt")
    cli = main(["test", *flags, f"--ckpt_path={checkpoint}"])
    found = cli.trainer.callback_metrics
    assert found["trust/ood_gap/new_site"] == found["trust/id_acc"] - found["trust/ood_acc/new_site"]
    assert found["trust/id_acc"].item() == pytest.approx(found["test/acc"].item())
    assert "trust/robust_acc/pgd50" in found


def test_sites_of_the_papers_run_share_their_findings():
    cli = TrainingCLI(
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        run=False,
        args=[
            f"--config={CONFIG.with_suffix('.paper.yaml')}",
            "--model.init_args.network_args={pretrained: false}",
            "--trainer.accelerator=cpu",
        ],
    )
    assert cli.datamodule.num_classes == cli.model.num_classes == 7
    assert sum(parameter.numel() for parameter in cli.model.parameters()) == 6_954_759
    callbacks = {type(callback).__name__: callback for callback in cli.trainer.callbacks}
    sites, own = callbacks["OODEvaluation"].sets, cli.datamodule.sites()
    assert sites.keys() == own.keys()
    for name, site in sites.items():
        assert site.class_names == cli.datamodule.class_names
        # written out in the file, and what the data module would make of itself
        assert {**vars(site), "targets": set(site.targets)} == {**vars(own[name]), "targets": set(own[name].targets)}
    assert callbacks["SaliencyGuidedAdversarialTraining"].attack.loss.__name__ == "summed_binary_cross_entropy"
