"""CelebA from files in its layout."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image

from lightning_trust.datamodules import CelebA

NAMES = ["Bald", "Blond_Hair", "Male", "Young"]
ROWS = 20


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    lines, partition = [], []
    for row in range(ROWS):
        file = f"{row + 1:06}.jpg"
        # the red channel numbers the face
        Image.new("RGB", (18, 22), (10 * row, 0, 100)).save(folder / "img_align_celeba" / file, quality=100)
        lines.append(f"{file} -1 {1 if row % 2 else -1:2} {1 if row % 3 else -1:2}  1")
        partition.append(f"{file} {0 if row < 12 else 1 if row < 16 else 2}")
    (folder / "list_attr_celeba.txt").write_text("\n".join([str(ROWS), " ".join(NAMES), *lines]) + "\n")
    (folder / "list_eval_partition.txt").write_text("\n".join(partition) + "\n")
    return tmp_path


def made(root, **changes):
    data = CelebA(**{"root": str(root), "image_size": 14, "batch_size": 4, "num_workers": 0, **changes})
    data.prepare_data()
    data.setup()
    return data


def numbers(dataset):
    return [round(image[0].mean().item() * 255 / 10) for image, _, _ in dataset]


def test_faces_and_their_attributes(root):
    data = made(root)
    inputs, targets, groups = next(iter(data.test_dataloader()))
    assert inputs.shape == (4, 3, 14, 14)
    assert 0.0 <= inputs.min() <= inputs.max() <= 1.0
    assert numbers(data.test_dataset) == [16, 17, 18, 19]
    assert targets.tolist() == [0, 1, 0, 1]
    assert groups.tolist() == [1, 1, 0, 1]
    assert numbers(data.val_dataset) == [12, 13, 14, 15]
    other = made(root, target="Young", sensitive="Blond_Hair")
    assert next(iter(other.val_dataloader()))[1].tolist() == [1, 1, 1, 1]
    assert next(iter(other.val_dataloader()))[2].tolist() == [0, 1, 0, 1]


def test_parts_share_no_face(root):
    base, tuning = made(root, base_share=0.75), made(root, base_share=0.75, part="tuning")
    assert len(base.train_dataset) == 9
    assert sorted(numbers(base.train_dataset) + numbers(tuning.train_dataset)) == list(range(12))
    few = made(root, part="tuning", base_share=0.75, train_rows=2)
    assert set(numbers(few.train_dataset)) < set(numbers(tuning.train_dataset))
    assert next(iter(few.train_dataloader()))[0].dtype == torch.float32


def test_bad_input(root, tmp_path):
    for arguments, message in (
        ({"part": "all"}, "`part` to be 'base' or 'tuning'"),
        ({"base_share": 1.0}, r"`base_share` to be in \(0, 1\), but got 1.0"),
        ({"image_size": 0}, "`image_size` to be a positive integer, but got 0"),
        ({"target": "Blonde"}, "`target` to be an attribute of CelebA, but got 'Blonde'.* 'Blond_Hair'"),
    ):
        with pytest.raises(ValueError, match=message):
            made(root, **arguments)
    with pytest.raises(MisconfigurationException, match="`train_rows` to be at most 6"):
        made(root, train_rows=7)
    with pytest.raises(FileNotFoundError, match=r"to hold list_attr_celeba\.txt"):
        CelebA(root=str(tmp_path / "nowhere")).setup()
