"""The tables of MIMIC-CXR-JPG, CheXpert and ChestX-ray14, as they are published."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

Source = Literal["mimic", "chexpert", "nih"]
UNCERTAIN = -1.0
_VALUES = {"": 0.0, "0": 0.0, "0.0": 0.0, "1": 1.0, "1.0": 1.0, "-1": UNCERTAIN, "-1.0": UNCERTAIN}
_CHEXPERT = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Enlarged Cardiomediastinum",
    "Fracture",
    "Lung Lesion",
    "Lung Opacity",
    "Pleural Effusion",
    "Pleural Other",
    "Pneumonia",
    "Pneumothorax",
    "Support Devices",
)
#: names of ChestX-ray14 -> those of CheXpert where both have the finding
_NIH = {
    **{name: name for name in ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema")},
    "Effusion": "Pleural Effusion",
    **{name: name for name in ("Emphysema", "Fibrosis", "Hernia", "Infiltration", "Mass", "Nodule")},
    "Pleural_Thickening": "Pleural Thickening",
    **{name: name for name in ("Pneumonia", "Pneumothorax")},
}
#: what each site labels
FINDINGS: dict[str, tuple[str, ...]] = {
    "mimic": _CHEXPERT,
    "chexpert": _CHEXPERT,
    "nih": tuple(sorted(_NIH.values())),
}
_PARTS: dict[str, Literal["train", "val", "test"]] = {"train": "train", "validate": "val", "test": "test"}


class XRay(NamedTuple):
    """One image: where it is, whose, what is seen, and the part that its publisher put it in."""

    path: Path
    patient: str
    findings: tuple[float, ...]
    part: Literal["train", "val", "test"]


def common_findings(*sources: str) -> tuple[str, ...]:
    """The findings that all these sites label, in alphabetical order.

    Example:
        >>> common_findings("mimic", "nih")[3:]
        ('Edema', 'Pleural Effusion', 'Pneumonia', 'Pneumothorax')

    """
    first, *others = (FINDINGS[source] for source in sources)
    return tuple(name for name in first if all(name in other for other in others))


def _mimic(folder: Path, findings: Sequence[str], frontal: bool) -> list[XRay]:
    release = "mimic-cxr-2.0.0"
    labels = {
        (row["subject_id"], row["study_id"]): _values(row, findings, folder)
        for row in _table(folder, f"{release}-chexpert.csv", ("subject_id", "study_id", *findings))
    }
    views = {}
    if frontal:
        columns = ("dicom_id", "ViewPosition")
        views = {row["dicom_id"]: row["ViewPosition"] for row in _table(folder, f"{release}-metadata.csv", columns)}
    found = []
    for row in _table(folder, f"{release}-split.csv", ("dicom_id", "study_id", "subject_id", "split")):
        patient, study, image = row["subject_id"], row["study_id"], row["dicom_id"]
        if row["split"] not in _PARTS:
            raise ValueError(f"Expected the split of {image} to be one of {list(_PARTS)}, but got {row['split']!r}.")
        if (patient, study) in labels and (not frontal or views.get(image) in ("AP", "PA")):
            path = folder / "files" / f"p{patient[:2]}" / f"p{patient}" / f"s{study}" / f"{image}.jpg"
            found.append(XRay(path, patient, labels[patient, study], _PARTS[row["split"]]))
    return found


def _chexpert(folder: Path, findings: Sequence[str], frontal: bool) -> list[XRay]:
    found = []
    for file, part in (("train.csv", _PARTS["train"]), ("valid.csv", _PARTS["test"])):
        for row in _table(folder, file, ("Path", "Frontal/Lateral", *findings)):
            if frontal and row["Frontal/Lateral"] != "Frontal":
                continue
            # CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg
            inside = row["Path"].split("/")[-4:]
            found.append(XRay(folder.joinpath(*inside), inside[1], _values(row, findings, folder), part))
    return found


def _nih(folder: Path, findings: Sequence[str], frontal: bool) -> list[XRay]:
    names = {"train": "train_val_list.txt", "test": "test_list.txt"}
    parts: dict[str, Literal["train", "val", "test"]] = {}
    for key, file in names.items():
        parts.update(dict.fromkeys(_existing(folder, file).read_text(encoding="utf-8").split(), _PARTS[key]))
    images = {path.name: path for path in folder.glob("images*/**/*.png")}
    found = []
    revised = folder / "Data_Entry_2017_v2020.csv"
    table = revised.name if revised.is_file() else "Data_Entry_2017.csv"
    for row in _table(folder, table, ("Image Index", "Finding Labels", "Patient ID")):
        image, words = row["Image Index"], row["Finding Labels"].split("|")
        unknown = sorted(set(words) - {*_NIH, "No Finding"})
        if unknown:
            raise ValueError(f"Expected the findings of {image} in {folder / table} to be known, but got {unknown}.")
        if image not in parts:
            raise ValueError(f"Expected {image} to be in one of {list(names.values())} of {folder}, but it is not.")
        if image not in images:
            raise FileNotFoundError(f"Expected {image} to be in {folder}/images*/, but it is not.")
        seen = {_NIH[word] for word in words if word != "No Finding"}
        values = tuple(float(name in seen) for name in findings)
        found.append(XRay(images[image], row["Patient ID"], values, parts[image]))
    return found


#: folder, findings, whether frontal views only -> all images of the site
READERS: dict[str, Callable[[Path, Sequence[str], bool], list[XRay]]] = {
    "mimic": _mimic,
    "chexpert": _chexpert,
    "nih": _nih,
}


def _values(row: dict[str, str], findings: Sequence[str], folder: Path) -> tuple[float, ...]:
    try:
        return tuple(_VALUES[row[name]] for name in findings)
    except KeyError as error:
        raise ValueError(
            f"Expected findings in the tables of {folder} to be 1, 0, -1 or empty, but got {error}."
        ) from error


def _existing(folder: Path, file: str) -> Path:
    for path in (folder / file, folder / f"{file}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"Expected {file} in {folder}, but it is not there.")


def _table(folder: Path, file: str, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    path = _existing(folder, file)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig", newline="") as stream:
        rows = csv.DictReader(stream)
        lacking = [column for column in columns if column not in (rows.fieldnames or ())]
        if lacking:
            raise ValueError(f"Expected {path} to have the columns {list(columns)}, but it lacks {lacking}.")
        yield from rows
