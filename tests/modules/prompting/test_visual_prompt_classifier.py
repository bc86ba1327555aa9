import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_trust.callbacks import IterativeLabelMapping, SavePrompt
from lightning_trust.core.wrapping import checksum
from lightning_trust.datamodules import Digits
from lightning_trust.modules import ImageClassifier, VisualPromptClassifier
from lightning_trust.nn import LabelMapping, PadPrompt, SmallCNN, load_prompt
from tests.callbacks.prompting.test_ilm_vp import trainer


def classifier(method="iterative", **kwargs):
    torch.manual_seed(0)
    network = SmallCNN(num_classes=40, widths=(4, 8))
    mapping = LabelMapping(40, 10, method)
    return VisualPromptClassifier(network, PadPrompt(16, 28, channels=1), mapping, **kwargs)


def digits(**kwargs):
    return Digits(train_rows=128, val_rows=32, test_rows=64, image_size=16, **kwargs)


def test_a_run_from_data_to_file(tmp_path):
    model = classifier()
    backbone = model.network.network
    before = checksum(backbone)
    run = trainer(IterativeLabelMapping(), SavePrompt(), max_epochs=2, default_root_dir=tmp_path)
    run.fit(model, digits())
    accuracy = run.test(model, digits(), verbose=False)[0]["test/acc"]
    assert checksum(backbone) == before
    assert not backbone.training
    held = [parameter for group in run.optimizers[0].param_groups for parameter in group["params"]]
    assert [id(parameter) for parameter in held] == [id(model.prompt.delta)]

    loaded = load_prompt(tmp_path / "prompt", backbone)
    data = digits()
    data.setup()
    x, y = (torch.cat(parts) for parts in zip(*data.test_dataloader(), strict=True))
    assert float((loaded(x).argmax(dim=1) == y).float().mean()) == pytest.approx(accuracy)
    assert loaded.card["class_names"] == [*"0123456789"]


def test_a_checkpoint_loads_again(tmp_path):
    model = classifier("identity")
    run = trainer(max_epochs=1, default_root_dir=tmp_path)
    run.fit(model, digits())
    run.save_checkpoint(tmp_path / "model.ckpt")
    again = VisualPromptClassifier.load_from_checkpoint(
        tmp_path / "model.ckpt",
        backbone=SmallCNN(num_classes=40, widths=(4, 8)),
        prompt=PadPrompt(16, 28, channels=1),
        mapping=LabelMapping(40, 10, "identity"),
    )
    x = torch.rand(2, 1, 16, 16)
    assert torch.equal(again.eval()(x), model.eval()(x))


def test_bad_input():
    with pytest.raises(MisconfigurationException, match="VisualPromptClassifier does not find them. Add the callback"):
        trainer(max_epochs=1).fit(classifier("frequency"), digits())
    plain = ImageClassifier("MLP", network_args={"image_size": 16})
    with pytest.raises(MisconfigurationException, match="`backbone_args` is for a network given by name"):
        classifier(backbone_args={"num_classes": 40})
    with pytest.raises(MisconfigurationException, match="SavePrompt found no visual prompt"):
        trainer(SavePrompt(), max_epochs=1).fit(plain, digits())
