"""Chest X-rays from small files in the published layouts: labels, parts, views, images; bad tables."""

from __future__ import annotations

import csv
import gzip

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image

from lightning_trust.attacks import PGD
from lightning_trust.callbacks import OODEvaluation, SaliencyGuidedAdversarialTraining
from lightning_trust.callbacks.adversarial.ood_evaluation import groups_of
from lightning_trust.datamodules import CXRDataModule
from lightning_trust.datamodules.adversarial.chest_xray import grey_image
from lightning_trust.modules import MultiLabelClassifier
from tests.two_ranks import QUIET

MIMIC = [
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Enlarged Cardiomediastinum",
    "Fracture",
    "Lung Lesion",
    "Lung Opacity",
    "No Finding",
    "Pleural Effusion",
    "Pleural Other",
    "Pneumonia",
    "Pneumothorax",
    "Support Devices",
]
CHEXPERT = [
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
]
NIH = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
SHARED = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion", "Pneumonia", "Pneumothorax")


def write(path, head, rows, packed=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(f"{path}.gz", "wt", newline="") if packed else path.open("w", newline="") as stream:
        csv.writer(stream).writerows([head, *rows])


def picture(path, value, size=(20, 12), mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(size[::-1], value, np.uint8)).convert(mode).save(path)


def labels(columns, **values):
    return [values.get(name.replace(" ", "_"), "") for name in columns]


def make_mimic(folder):
    """Six patients with two studies each; the first image of a study is frontal, the second lateral."""
    studies, split, views = [], [], []
    for number in range(6):
        patient = f"1{number}000032"
        for study in (f"5{number}414267", f"5{number}999999"):
            sign = ("1.0", "0.0", "-1.0", "")[number % 4]
            studies.append([patient, study, *labels(MIMIC, Edema=sign, Pleural_Effusion="1.0", Fracture="-1.0")])
            for view in ("PA", "LATERAL"):
                image = f"{patient}-{study}-{view}"
                split.append([image, study, patient, ("train", "train", "train", "validate", "test", "test")[number]])
                views.append([image, patient, study, view])
                place = folder / "files" / f"p{patient[:2]}" / f"p{patient}" / f"s{study}"
                picture(place / f"{image}.jpg", 40)
    write(folder / "mimic-cxr-2.0.0-chexpert.csv", ["subject_id", "study_id", *MIMIC], studies, packed=True)
    write(folder / "mimic-cxr-2.0.0-split.csv", ["dicom_id", "study_id", "subject_id", "split"], split, packed=True)
    write(folder / "mimic-cxr-2.0.0-metadata.csv", ["dicom_id", "subject_id", "study_id", "ViewPosition"], views)


def make_chexpert(folder):
    for file, patients in (("train", range(1, 11)), ("valid", range(64541, 64544))):
        rows = []
        for number in patients:
            for view in ("frontal", "lateral"):
                path = f"{file}/patient{number:05d}/study1/view1_{view}.jpg"
                values = labels(CHEXPERT, Pneumonia="1.0" if number % 2 else "0.0", Edema="-1.0" if number == 3 else "")
                rows.append([f"CheXpert-v1.0-small/{path}", "Female", 68, view.capitalize(), "AP", *values])
                picture(folder / path, number % 200)
        write(folder / f"{file}.csv", ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *CHEXPERT], rows)


def make_nih(folder):
    rows, lists = [], {"train_val": [], "test": []}
    words = ["No Finding", "Effusion|Edema", "Hernia|Pleural_Thickening", "Cardiomegaly|Pneumothorax"]
    for number in range(12):
        image = f"{number // 2:08d}_{number % 2:03d}.png"
        rows.append([image, words[number % 4], number % 2, number // 2, 57, "M", "PA", 2682, 2749, 0.143, 0.143])
        lists["train_val" if number < 8 else "test"].append(image)
        picture(folder / f"images_{1 + number % 2:03d}" / "images" / image, 10 * number, mode=("L", "RGBA")[number % 2])
    write(folder / "Data_Entry_2017.csv", NIH.split(","), rows)
    for name, images in lists.items():
        (folder / f"{name}_list.txt").write_text("\n".join(images))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chest_xray")
    make_mimic(folder / "mimic")
    make_chexpert(folder / "chexpert")
    make_nih(folder / "nih")
    return str(folder)


def made(root, source, **arguments):
    targets = [site for site in ("mimic", "nih", "chexpert") if site != source]
    data = CXRDataModule(source, **{"targets": targets, "root": root, "image_size": 8, "num_workers": 0, **arguments})
    data.setup()
    return data


def column(dataset, data, name):
    return dataset.targets[:, data.class_names.index(name)].tolist()


def test_findings_are_those_that_all_sites_label():
    for source, targets in (("mimic", ["nih", "chexpert"]), ("nih", ["mimic"]), ("chexpert", ["nih"])):
        assert CXRDataModule(source, targets).class_names == SHARED
    assert CXRDataModule("mimic", ["chexpert"]).class_names == tuple(sorted(set(MIMIC) - {"No Finding"}))
    assert CXRDataModule("nih", []).num_classes == 14
    assert CXRDataModule("nih", [], findings=["Hernia", "Edema"]).class_names == ("Hernia", "Edema")


def test_mimic(root):
    data = made(root, "mimic")
    sizes = [len(part) for part in (data.train_dataset, data.val_dataset, data.test_dataset)]
    assert sizes == [6, 2, 4]
    assert column(data.train_dataset, data, "Edema") == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert column(data.train_dataset, data, "Pleural Effusion") == [1.0] * 6
    assert data.train_dataset.targets.sum() == 8
    assert all("PA" in path.name for path in data.train_dataset.paths)
    assert data.train_dataset.paths[0].parts[-4:-1] == ("p10", "p10000032", "s50414267")
    assert len(made(root, "mimic", frontal=False).train_dataset) == 12


def test_uncertain_findings(root):
    ones = made(root, "mimic", uncertain="ones")
    assert column(ones.train_dataset, ones, "Edema") == [1.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    # fractures are uncertain everywhere, but are no finding of this run
    drop = made(root, "mimic", uncertain="drop")
    assert column(drop.train_dataset, drop, "Edema") == [1.0, 1.0, 0.0, 0.0]
    alone = made(root, "mimic", targets=["chexpert"], uncertain="drop")
    assert len(alone.train_dataset) == 0


def test_chexpert(root):
    data = made(root, "chexpert", val_share=0.25)
    train, val = ({path.parts[-3] for path in part.paths} for part in (data.train_dataset, data.val_dataset))
    assert (len(train), len(val)) == (7, 3)
    assert not train & val
    assert [path.parts[-3] for path in data.test_dataset.paths] == ["patient64541", "patient64542", "patient64543"]
    assert column(data.test_dataset, data, "Pneumonia") == [1.0, 0.0, 1.0]
    again, other = made(root, "chexpert", val_share=0.25), made(root, "chexpert", val_share=0.25, seed=1)
    assert again.val_dataset.paths == data.val_dataset.paths != other.val_dataset.paths
    assert made(root, "chexpert", val_share=0.0).val_dataloader() == []


def test_nih(root):
    data = made(root, "nih", val_share=0.3)
    train, val, test = (
        {path.name[:8] for path in part.paths} for part in (data.train_dataset, data.val_dataset, data.test_dataset)
    )
    assert (len(train), len(val), test) == (2, 2, {"00000004", "00000005"})
    assert not train & val
    assert column(data.test_dataset, data, "Pleural Effusion") == [0.0, 1.0, 0.0, 0.0]
    assert groups_of(data.test_dataset).tolist() == [0, 0, 1, 1]  # two images a patient
    assert data.test_dataset.targets[3].tolist() == [float(name in ("Cardiomegaly", "Pneumothorax")) for name in SHARED]
    # byte values, whatever the mode of the file
    images, _ = next(iter(data.test_dataloader()))
    assert images.shape == (4, 1, 8, 8)
    assert (255 * images[:, 0, 0, 0]).round().tolist() == [80, 90, 100, 110]


def test_rows_are_drawn_alike(root):
    whole, some = made(root, "nih", val_share=0.0), made(root, "nih", val_share=0.0, train_rows=3, test_rows=2)
    assert (len(some.train_dataset), len(some.test_dataset)) == (3, 2)
    assert set(some.train_dataset.paths) < set(whole.train_dataset.paths)
    with pytest.raises(ValueError, match="`train_rows` to be at most 8, .*'nih', but got 9"):
        made(root, "nih", val_share=0.0, train_rows=9)


def test_image_is_scaled_on_its_shorter_side_and_cut_in_the_middle(tmp_path):
    ramp = np.tile(np.arange(40, dtype=np.uint8) * 4, (16, 1))
    Image.fromarray(ramp).save(tmp_path / "wide.png")
    Image.fromarray(ramp.T.copy()).save(tmp_path / "high.png")
    wide, high = (grey_image(tmp_path / f"{name}.png", 8) for name in ("wide", "high"))
    # half the size, its columns 6 to 14 of 20: means of two neighbours
    expected = torch.tensor([4.0 * (2 * column + 0.5) for column in range(6, 14)]) / 255
    torch.testing.assert_close(wide, expected.expand(1, 8, 8), atol=1.01 / 255, rtol=0)
    assert torch.equal(high, wide.mT)
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="eight bits a channel, but its mode is 'I;16'"):
        grey_image(tmp_path / "deep.png", 8)


@pytest.mark.filterwarnings(
    "ignore:Labels .* have one value only", "ignore:.*one value only", "ignore:.*resamples are left out"
)
def test_run_trains_at_one_site_and_is_tested_at_all(root):
    data = made(root, "mimic", batch_size=3)
    sga = SaliencyGuidedAdversarialTraining(PGD(eps=4 / 255, step_size=1 / 255, steps=2), loss="bce")
    host = MultiLabelClassifier(num_classes=7, network_args={"widths": [4]}, schedule="constant")
    sites = OODEvaluation(data.sites(), measure="auroc", resamples=40)
    trainer = pl.Trainer(max_epochs=1, callbacks=[sga, sites], num_sanity_val_steps=0, **QUIET)
    trainer.fit(host, data)
    assert trainer.global_step == 2
    (found,) = trainer.test(host, data, verbose=False)
    assert {"trust/id_auroc", "trust/ood_auroc/nih", "trust/ood_gap/chexpert", "test/loss", "test/auroc"} <= set(found)
    assert 0.0 <= found["trust/ood_auroc/chexpert"] <= 1.0
    assert 0.0 <= found["trust/ood_auroc_low/chexpert"] <= found["trust/ood_auroc_high/chexpert"] <= 1.0


# -- bad input ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "padchest"}, r"`source` to be of \['chexpert', 'mimic', 'nih'\], but got 'padchest'"),
        ({"targets": ["padchest"]}, "`targets` to be of .* but got 'padchest'"),
        ({"targets": ["mimic"]}, "`targets` to name other sites than source='mimic', each once"),
        ({"targets": ["nih", "nih"]}, "each once"),
        ({"uncertain": "ignore"}, "`uncertain` .* but got 'ignore'"),
        ({"val_share": 1.0}, r"`val_share` to be in \[0, 1\), but got 1.0"),
        ({"image_size": 0}, "`image_size` to be an integer of at least 1, but got 0"),
        ({"findings": ["Fracture"]}, r"`findings` to name findings that \['mimic', 'nih', 'chexpert'\] label"),
        ({"findings": []}, "`findings`"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        CXRDataModule(**arguments)


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train_val_list.txt in .*nih, but it is not there"):
        made(tmp_path, "nih")
    make_nih(tmp_path / "nih")
    make_chexpert(tmp_path / "chexpert")
    table = tmp_path / "nih" / "Data_Entry_2017.csv"
    good = table.read_text()
    for bad, message in (
        (good.replace("Patient ID", "Person"), r"columns .*'Patient ID'\], but it lacks \['Patient ID'\]"),
        (good.replace("Hernia", "Gout", 1), r"findings of 00000001_000.png .* but got \['Gout'\]"),
        (good.replace("00000002_000.png", "00000099_000.png"), "00000099_000.png to be in one of"),
        # the patient of a training image gets one of the test
        (
            good.replace("00000005_001.png,Cardiomegaly|Pneumothorax,1,5", "00000005_001.png,No Finding,1,0"),
            "patient 0 ",
        ),
    ):
        assert bad != good
        table.write_text(bad)
        with pytest.raises(ValueError, match=message):
            made(tmp_path, "nih")
    table.write_text(good)
    (tmp_path / "nih" / "images_001" / "images" / "00000002_000.png").unlink()
    with pytest.raises(FileNotFoundError, match="00000002_000.png to be in"):
        made(tmp_path, "nih")
    table = tmp_path / "chexpert" / "train.csv"
    table.write_text(table.read_text().replace(",-1.0,", ",2,"))
    with pytest.raises(ValueError, match="to be 1, 0, -1 or empty, but got '2'"):
        made(tmp_path, "chexpert")
