"""Images in folders."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image

from lightning_trust.datamodules import ImageFolders, LabelMappingPruner, PrunedDataModule


@pytest.fixture
def root(tmp_path):
    """Two classes of black and of white images, wider than high."""
    for part, rows in (("train", 4), ("val", 2)):
        for place, name in enumerate(("black", "white")):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for row in range(rows):
                Image.new("RGB", (20, 12), (255 * place,) * 3).save(folder / f"{row}.png")
    return tmp_path


@pytest.mark.parametrize("resize", [None, 10])
@pytest.mark.parametrize("augment", [True, False])
def test_batches(root, resize, augment):
    data = ImageFolders(str(root), image_size=8, resize=resize, batch_size=8, num_workers=0, augment=augment)
    data.setup("fit")
    for loader, rows in ((data.train_dataloader(), 8), (data.val_dataloader(), 4), (data.test_dataloader(), 4)):
        ((inputs, targets),) = loader
        assert inputs.shape == (rows, 3, 8, 8)
        raw = data.input_space.to_raw(inputs)
        torch.testing.assert_close(raw, targets.float().view(-1, 1, 1, 1).expand_as(raw), rtol=0.0, atol=1e-6)


def test_without_normalisation_and_validation(root):
    data = ImageFolders(str(root), 8, None, normalise=False, val=None, test="val", num_workers=0)
    data.setup("fit")
    assert data.val_dataloader() == []
    assert data.test_dataloader().dataset[2][0].max() == 1.0
    assert data.input_space.mean is None


def test_a_pruned_one(root):
    """Only file names and labels are asked for; measured rows are not augmented."""
    data = ImageFolders(str(root), 8, None, batch_size=4, num_workers=0, normalise=False)
    data.setup("fit")

    class Bright(torch.nn.Module):
        def forward(self, x):
            level = x.mean(dim=(1, 2, 3))
            return torch.stack([1.0 - level, level], dim=1)

    white = torch.utils.data.TensorDataset(torch.ones(3, 3, 8, 8))
    result = LabelMappingPruner(2, 0.5, eval_transform=data.eval_transform).fit(Bright(), data.train_dataset, white)
    pruned = PrunedDataModule(data, result)
    assert result.kept_classes.tolist() == [1]
    assert torch.cat([targets for _, targets in pruned.val_dataloader()]).tolist() == [1, 1]


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="`image_size` to be an integer of at least 1, but got 0"):
        ImageFolders(image_size=0)
    with pytest.raises(ValueError, match=r"`resize` to be at least `image_size` \(224\), but got 100"):
        ImageFolders(resize=100)
    with pytest.raises(MisconfigurationException, match="`train` of ImageFolders to name a folder"):
        ImageFolders(str(tmp_path)).setup("fit")
