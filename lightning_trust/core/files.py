"""Result, mask and checkpoint files: written aside and renamed, read as data."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor


def write_aside(path: str | Path, write: Callable[[IO[bytes]], object]) -> Path:
    """Write a file beside its place and rename it, so that a reader sees the old file or the whole new one.

    Args:
        path: Where the file shall stand; missing folders are made.
        write: Called with the open binary file.

    Returns:
        The path.

    Raises:
        OSError: If the disk is full or the folder cannot be written; nothing is left behind.

    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; a result is as readable as any file of the user's
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(aside, 0o666 & ~mask)
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    return path


def write_text(path: str | Path, text: str) -> Path:
    """Write a UTF-8 text file aside and rename it."""
    return write_aside(path, lambda file: file.write(text.encode()))


def write_json(path: str | Path, kind: str, version: int, data: Mapping[str, Any]) -> Path:
    """Write ``data`` as JSON with its kind and schema version, aside and renamed.

    Args:
        path: Where the file shall stand.
        kind: What the file is, e.g. ``"lightning_trust.run"``.
        version: Version of its schema.
        data: JSON-able mapping; NaN and infinities are refused because JSON has none.

    """
    text = json.dumps({"kind": kind, "version": version, **data}, indent=1, allow_nan=False)
    return write_text(path, text + "\n")


def read_json(path: str | Path, kind: str, version: int) -> dict[str, Any]:
    """Read a JSON file that :func:`write_json` wrote.

    Raises:
        ValueError: If the file is no JSON, of another kind, or of a newer schema version.

    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"Expected {path} to be a JSON file of kind '{kind}', but it is damaged: {error}.") from error
    if not isinstance(data, dict) or data.get("kind") != kind:
        found = data.get("kind") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"Expected {path} to be a file of kind '{kind}', but got {found!r}.")
    if not isinstance(data.get("version"), int) or data["version"] > version:
        raise ValueError(
            f"Expected {path} to have schema version {version} or older, but got {data.get('version')!r}."
            " Update lightning_trust to read it."
        )
    return data


def write_tensors(path: str | Path, kind: str, version: int, tensors: Mapping[str, Tensor], **meta: str) -> Path:
    """Write named tensors as safetensors with their kind and schema version, aside and renamed."""
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    payload = safetensors_bytes(content, {"kind": kind, "version": str(version), **meta})
    return write_aside(path, lambda file: file.write(payload))


def read_tensors(path: str | Path, kind: str, version: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file that :func:`write_tensors` wrote: its tensors and its metadata.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated or damaged, of another kind, or of a newer schema version.

    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"Expected {path} to be a file of kind '{kind}', but there is no such file.")
    try:
        with safe_open(str(path), framework="pt") as file:
            meta = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(
            f"Expected {path} to be a whole file of kind '{kind}', but it is truncated or damaged: {error}."
        ) from error
    if meta.get("kind") != kind:
        raise ValueError(f"Expected {path} to be a file of kind '{kind}', but got {meta.get('kind')!r}.")
    if not meta.get("version", "").isdigit() or int(meta["version"]) > version:
        raise ValueError(
            f"Expected {path} to have schema version {version} or older, but got {meta.get('version')!r}."
            " Update lightning_trust to read it."
        )
    return tensors, meta


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """Bytes -> the first ``count`` bits as a flat boolean tensor (inverse of :func:`pack_bits`).

    Example:
        >>> unpack_bits(pack_bits(torch.tensor([True, False, True])), 3).tolist()
        [True, False, True]

    """
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(1) >> shifts) & 1).bool().flatten()[:count]


def pack_bits(flags: Tensor) -> Tensor:
    """A boolean tensor -> bytes of eight entries each, lowest bit first, zero-padded."""
    flat = flags.flatten().to(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    shifts = torch.arange(8, dtype=torch.uint8, device=flags.device)
    return (padded << shifts).sum(dim=1, dtype=torch.uint8)
