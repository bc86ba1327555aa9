"""Chest X-rays of three sites with the findings that they share, from files that are there already."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_trust.core.space import InputSpace
from lightning_trust.datamodules.adversarial.chest_xray_files import (
    FINDINGS,
    READERS,
    UNCERTAIN,
    Source,
    XRay,
    common_findings,
)
from lightning_trust.datamodules.split_data_module import SplitDataModule

Sample = tuple[Tensor, Tensor]


class XRayRows(Dataset[Sample]):
    """X-rays in files, handed out grey, square and in [0, 1], with multi-hot findings.

    Args:
        paths: The files.
        targets: Findings, 0 or 1, shape ``(N, K)``.
        size: Pixels a side: the shorter side is scaled to it, the longer one cut at both ends.
        groups: The patient of each file, over which intervals are taken; each file is of another if None.

    """

    def __init__(self, paths: Sequence[Path], targets: Tensor, size: int, groups: Sequence[str] | None = None) -> None:
        self.paths = list(paths)
        self.groups = list(groups) if groups is not None else [str(path) for path in self.paths]
        self.targets = targets
        self.size = size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        return grey_image(self.paths[index], self.size), self.targets[index]


class CXRDataModule(SplitDataModule):
    r"""Chest X-rays of one site, labelled with the findings that other sites label too.

    A network is trained at ``source`` and tested there and elsewhere: ``OODEvaluation(data.sites(), measure="auroc")``.
    Nothing is downloaded: the files are those of the publishers, in one folder a site under ``root``, each with the
    names that it is published with (compressed tables, ``.csv.gz``, will do):

    - ``mimic``: MIMIC-CXR-JPG 2.0.0: ``mimic-cxr-2.0.0-chexpert.csv``, ``mimic-cxr-2.0.0-split.csv``,
      ``mimic-cxr-2.0.0-metadata.csv``, ``files/p10/p10000032/s50414267/*.jpg``;
    - ``chexpert``: CheXpert-v1.0 or its small version: ``train.csv``, ``valid.csv``, ``train/``, ``valid/``;
    - ``nih``: ChestX-ray14: ``Data_Entry_2017.csv`` (or ``..._v2020.csv``), ``train_val_list.txt``, ``test_list.txt``,
      and the images in ``images*/``.

    Test rows are those that the publisher set aside (CheXpert's ``valid.csv``). MIMIC has a validation part of its own;
    of the other two a share of the training patients is for validation. No patient is in two parts. A finding that is
    not mentioned is absent, as the labellers of CheXpert have it. Studies without labels are left out.

    "MIMIC-CXR-JPG" (arXiv:1901.07042), "CheXpert" (arXiv:1901.07031), "ChestX-ray8" (arXiv:1705.02315).

    A batch is ``[inputs, targets]``: inputs float32 ``(B, 1, size, size)`` in [0, 1]; targets float32 ``(B, K)`` of 0
    and 1, for losses and measures of several labels.

    Args:
        source: The site of this data: ``"mimic"``, ``"chexpert"`` or ``"nih"``.
        targets: The other sites to be tested.
        root: Folder of the sites' folders.
        findings: What to label, e.g. ``["Edema", "Pneumonia"]``; all that ``source`` and ``targets`` share if None.
        uncertain: What becomes of a finding that the labeller was not sure of (-1): ``"zeros"`` or ``"ones"``, or
            ``"drop"``: images with such a finding are left out. The test of CheXpert and all of NIH have none.
        frontal: Whether lateral views are left out.
        image_size: Pixels a side.
        batch_size: Rows per batch.
        num_workers: Worker processes of each loader, which read and scale the images.
        train_rows: How many training images to keep, drawn at random; None for all.
        val_share: Share of the training patients for validation where the site has no validation part, in [0, 1).
        test_rows: How many test images to keep, drawn at random; None for all.
        seed: Seed of the draws of patients and images.

    Attributes:
        train_dataset: The training rows, after ``setup``.
        val_dataset: The validation rows.
        test_dataset: The test rows.

    Raises:
        ValueError: If an argument is out of its range, or a finding is not labelled everywhere (at once); in ``setup``,
            if a table lacks a column or holds another value, a patient is in two parts, or too many rows are asked for.
        FileNotFoundError: In ``setup``, if a file is not there.

    Example:
        >>> data = CXRDataModule("mimic", targets=["nih", "chexpert"])
        >>> data.class_names[:3], data.num_classes
        (('Atelectasis', 'Cardiomegaly', 'Consolidation'), 7)
        >>> sorted(data.sites())
        ['chexpert', 'nih']

    """

    train_dataset: XRayRows
    val_dataset: XRayRows
    test_dataset: XRayRows

    def __init__(
        self,
        source: Source = "mimic",
        targets: Sequence[Source] = ("nih", "chexpert"),
        root: str = "data/chest_xray",
        findings: Sequence[str] | None = None,
        uncertain: Literal["zeros", "ones", "drop"] = "zeros",
        frontal: bool = True,
        image_size: int = 224,
        batch_size: int = 32,
        num_workers: int = 4,
        train_rows: int | None = None,
        val_share: float = 0.1,
        test_rows: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, sites in (("source", [source]), ("targets", list(targets))):
            for site in sites:
                if site not in FINDINGS:
                    raise ValueError(f"Expected argument `{name}` to be of {sorted(FINDINGS)}, but got {site!r}.")
        if len({source, *targets}) != 1 + len(targets):
            raise ValueError(
                f"Expected argument `targets` to name other sites than source={source!r}, each once, but got"
                f" {list(targets)}."
            )
        if uncertain not in ("zeros", "ones", "drop"):
            raise ValueError(f"Expected argument `uncertain` to be 'zeros', 'ones' or 'drop', but got {uncertain!r}.")
        if not 0.0 <= val_share < 1.0:
            raise ValueError(f"Expected argument `val_share` to be in [0, 1), but got {val_share}.")
        for name, value, least in (
            ("image_size", image_size, 1),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("train_rows", train_rows, 1),
            ("test_rows", test_rows, 1),
            ("seed", seed, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"Expected argument `{name}` to be an integer of at least {least}, but got {value}.")
        shared = common_findings(source, *targets)
        self.class_names = shared if findings is None else tuple(findings)
        if not self.class_names or not set(self.class_names) <= set(shared):
            raise ValueError(
                f"Expected argument `findings` to name findings that {[source, *targets]} label, {list(shared)}, but"
                f" got {list(self.class_names)}."
            )
        self.source: Source = source
        self.targets: tuple[Source, ...] = tuple(targets)
        self.root = root
        self.uncertain: Literal["zeros", "ones", "drop"] = uncertain
        self.frontal = frontal
        self.image_size = image_size
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.train_rows = train_rows
        self.val_share = val_share
        self.test_rows = test_rows
        self.seed = seed

    @property
    def num_classes(self) -> int:
        """Number of findings."""
        return len(self.class_names)

    @property
    def input_space(self) -> InputSpace:
        """Grey values in [0, 1]."""
        return InputSpace(0.0, 1.0)

    def sites(self) -> dict[str, CXRDataModule]:
        """The data at each of ``targets``: same findings, same arguments, but all of its rows."""
        return {
            target: CXRDataModule(
                source=target,
                targets=[site for site in (self.source, *self.targets) if site != target],
                root=self.root,
                findings=self.class_names,
                uncertain=self.uncertain,
                frontal=self.frontal,
                image_size=self.image_size,
                batch_size=self.batch_size,
                num_workers=self.num_workers,
                val_share=self.val_share,
                seed=self.seed,
            )
            for target in self.targets
        }

    def setup(self, stage: str | None = None) -> None:
        """Read the tables and split the images; a second call changes nothing."""
        if hasattr(self, "test_dataset"):
            return
        rays = READERS[self.source](Path(self.root) / self.source, self.class_names, self.frontal)
        if self.uncertain == "drop":
            rays = [ray for ray in rays if UNCERTAIN not in ray.findings]
        parts = self._parts(rays)
        self.train_dataset = self._rows("train", parts["train"], self.train_rows)
        self.val_dataset = self._rows("val", parts["val"], None)
        self.test_dataset = self._rows("test", parts["test"], self.test_rows)

    def _parts(self, rays: list[XRay]) -> dict[str, list[XRay]]:
        parts: dict[str, list[XRay]] = {"train": [], "val": [], "test": []}
        patients = sorted({ray.patient for ray in rays if ray.part == "train"})
        held: set[str] = set()
        if all(ray.part != "val" for ray in rays):
            order = torch.randperm(len(patients), generator=torch.Generator().manual_seed(self.seed)).tolist()
            held = {patients[place] for place in order[: math.ceil(self.val_share * len(patients))]}
        for ray in rays:
            parts["val" if ray.part == "train" and ray.patient in held else ray.part].append(ray)
        seen: dict[str, str] = {}
        for part, own in parts.items():
            for ray in own:
                if seen.setdefault(ray.patient, part) != part:
                    raise ValueError(
                        f"Expected each patient of '{self.source}' to be in one part, but patient {ray.patient} is in"
                        f" {seen[ray.patient]} and {part}."
                    )
        return parts

    def _rows(self, part: str, rays: list[XRay], count: int | None) -> XRayRows:
        if count is not None and count > len(rays):
            raise ValueError(
                f"Expected argument `{part}_rows` to be at most {len(rays)}, the images of that part of"
                f" '{self.source}', but got {count}."
            )
        order = torch.randperm(len(rays), generator=torch.Generator().manual_seed(self.seed))[:count].sort().values
        kept = [rays[place] for place in order.tolist()]
        if kept and not kept[0].path.is_file():
            raise FileNotFoundError(f"Expected the images of '{self.source}', such as {kept[0].path}, to be there.")
        values = torch.tensor([ray.findings for ray in kept]).view(len(kept), self.num_classes)
        values = torch.where(values == UNCERTAIN, float(self.uncertain == "ones"), values)
        return XRayRows([ray.path for ray in kept], values, self.image_size, [ray.patient for ray in kept])


def grey_image(path: Path, size: int) -> Tensor:
    """The grey middle square of an image file, float32 ``(1, size, size)`` in [0, 1].

    Raises:
        ValueError: If the file has more than eight bits a channel.

    """
    from PIL import Image

    with Image.open(path) as image:
        if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
            raise ValueError(f"Expected {path} to have eight bits a channel, but its mode is {image.mode!r}.")
        # a JPEG is read at a fraction of its size where that is still large enough
        image.draft("L", (size, size))
        grey = image.convert("L")
    scale = size / min(grey.size)
    width, height = (max(size, round(scale * side)) for side in grey.size)
    left, top = (width - size) // 2, (height - size) // 2
    grey = grey.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    return torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).view(1, size, size).float() / 255.0
