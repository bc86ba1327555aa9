"""CLIP models of open_clip: by name, from a folder or file, or from a configuration."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from lightning_trust.core.files import write_aside, write_text
from lightning_trust.core.host import close_names

#: Texts -> tokens, int64 ``(N, L)``.
Tokenizer = Callable[[list[str]], Tensor]
#: The names that open_clip gives the two files of a published folder.
CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"
_SCHEMAS = ("local-dir:", "hf-hub:")


def load_open_clip() -> Any:
    """The package open_clip, imported when it is first needed."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    import open_clip  # type: ignore[import-untyped]

    # it sets this for all of the process; a user's environment is not ours to change
    if before is None:
        os.environ.pop("TOKENIZERS_PARALLELISM", None)
    else:
        os.environ["TOKENIZERS_PARALLELISM"] = before
    return open_clip


def create_clip(
    model: str | None = None, config: Mapping[str, Any] | None = None, image_size: int | None = None
) -> tuple[nn.Module, Tokenizer]:
    """A CLIP model of open_clip and its tokenizer.

    A model is named in one of these ways; weights are loaded, and downloaded where they are not here, only if a tag,
    a checkpoint, a folder or the hub is named:

    - ``"ViT-B-32"``: an architecture of ``open_clip.list_models()``, of random weights;
    - ``"ViT-B-32/laion2b_s34b_b79k"``: with the weights of a tag of ``open_clip.list_pretrained()``;
    - ``"ViT-B-32/weights.safetensors"``: with the weights of a file (an absolute path follows a second slash);
    - ``"model.json"``, ``"model.json/weights.pt"``: the architecture of a configuration file of open_clip;
    - ``"local-dir:folder"``, or the folder alone: ``open_clip_config.json`` and weights, as open_clip publishes models
      and :func:`save_clip` writes them;
    - ``"hf-hub:owner/name"``: such a folder on the hub of Hugging Face.

    Args:
        model: Name of the model.
        config: In place of ``model``: the content of a configuration file, ``embed_dim``, ``vision_cfg`` and
            ``text_cfg``; or ``{"model_cfg": {...}, "preprocess_cfg": {...}}``, as in a published folder.
        image_size: Side of the square images; the model's own if None.

    Returns:
        The model in single precision, and its tokenizer.

    Raises:
        ValueError: If not exactly one of ``model`` and ``config`` is given, nobody knows the model, tag or file (close
            names are listed), or a configuration lacks a part.

    Example:
        >>> clip, tokenizer = create_clip(
        ...     config={
        ...         "embed_dim": 8,
        ...         "vision_cfg": {"image_size": 28, "layers": 1, "width": 16, "head_width": 8, "patch_size": 14},
        ...         "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
        ...     }
        ... )
        >>> clip.encode_text(tokenizer(["a photo of a bag."])).shape
        torch.Size([1, 8])
        >>> create_clip("ViT-B-23")
        Traceback (most recent call last):
        ...
        ValueError: Expected argument `model` to begin with a model of open_clip, a folder or a configuration file, but
        got 'ViT-B-23'. Close names: 'ViT-B-32'...

    """
    if (model is None) == (config is None):
        raise ValueError(
            f"Expected one of arguments `model` and `config`, but got model={model!r} and config={config!r}."
        )
    if model is None:
        return _configured(config or {}, None, image_size)
    open_clip = load_open_clip()

    if model.startswith("hf-hub:"):
        return _made(model, image_size)
    folder = Path(model.removeprefix("local-dir:"))
    if model.startswith("local-dir:") or (folder / CONFIG_FILE).is_file():
        if not (folder / CONFIG_FILE).is_file():
            raise ValueError(f"Expected argument `model` to name a folder with {CONFIG_FILE}, but got {model!r}.")
        read_config(folder / CONFIG_FILE)
        return _made(f"local-dir:{folder}", image_size, require_pretrained=True)
    name, weights = split_name(model)
    tag = open_clip.get_pretrained_cfg(name, weights) if weights and not name.endswith(".json") else None
    if weights and not tag and not Path(weights).is_file():
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise ValueError(
            f"Expected {weights!r} in {model!r} to be a file or published weights of {name}, but it is neither."
            f" Close names: {close_names(weights, tags)}."
        )
    if name.endswith(".json"):
        return _configured(read_config(name), weights, image_size)
    # the published weights of some models need the activation that they were trained with
    quick = {"force_quick_gelu": True} if tag and tag.get("quick_gelu") else {}
    return _made(name, image_size, pretrained=weights, **quick)


def split_name(model: str) -> tuple[str, str | None]:
    """The architecture (or configuration file) in a name, and the tag or file of weights behind it.

    Example:
        >>> split_name("ViT-B/32/openai"), split_name("ViT-B-32//runs/clip.pt")
        (('ViT-B-32', 'openai'), ('ViT-B-32', '/runs/clip.pt'))

    """
    open_clip = load_open_clip()

    known = open_clip.list_models()
    parts = model.split("/")
    for count in range(len(parts), 0, -1):
        head, rest = "/".join(parts[:count]), "/".join(parts[count:]) or None
        if head.replace("/", "-") in known:
            return head.replace("/", "-"), rest
        if head.endswith(".json") and Path(head).is_file():
            return head, rest
    raise ValueError(
        "Expected argument `model` to begin with a model of open_clip, a folder or a configuration file,"
        f" but got {model!r}. Close names: {close_names(parts[0], known)}."
    )


def read_config(path: str | Path) -> dict[str, Any]:
    """The configuration in a JSON file of open_clip.

    Raises:
        ValueError: If the file is no JSON, or lacks a part.

    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"Expected {path} to be a configuration of open_clip, but it is damaged: {error}.") from error
    return whole_config(content)


def whole_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as ``{"model_cfg": ..., "preprocess_cfg": ...}``, checked for its parts."""
    if not isinstance(config, Mapping):
        raise ValueError(f"Expected argument `config` to be a mapping, but got {config!r}.")
    model = {name: value for name, value in config.get("model_cfg", config).items() if name != "preprocess_cfg"}
    lacking = [part for part in ("embed_dim", "vision_cfg", "text_cfg") if part not in model]
    if lacking:
        raise ValueError(
            "Expected argument `config` to have `embed_dim`, `vision_cfg` and `text_cfg`, but"
            f" {' and '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} missing among {sorted(model)}."
        )
    return {
        "model_cfg": model,
        "preprocess_cfg": dict(config.get("preprocess_cfg", {}) if "model_cfg" in config else {}),
    }


def config_of(network: nn.Module, model: str | None = None, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The configuration of a model that :func:`create_clip` made of the same arguments, for :func:`save_clip`."""
    open_clip = load_open_clip()

    if model is None:
        found = whole_config(config or {})
    elif (Path(model.removeprefix("local-dir:")) / CONFIG_FILE).is_file():
        found = read_config(Path(model.removeprefix("local-dir:")) / CONFIG_FILE)
    elif model.startswith("hf-hub:"):
        found = whole_config(open_clip.get_model_config(model))
    else:
        name, _ = split_name(model)
        found = read_config(name) if name.endswith(".json") else whole_config(open_clip.get_model_config(name))
    if any(isinstance(module, open_clip.transformer.QuickGELU) for module in network.modules()):
        found["model_cfg"]["quick_gelu"] = True
    found["preprocess_cfg"] = dict(network.visual.preprocess_cfg)  # type: ignore[union-attr, arg-type]
    return found


def save_clip(folder: str | Path, model: nn.Module, config: Mapping[str, Any]) -> Path:
    """Write a model as open_clip publishes models, so that it loads like one of those.

    The folder gets ``open_clip_config.json`` and ``open_clip_model.safetensors``, each written aside and renamed. Of
    the ways to load it: ``create_clip(folder)``; ``open_clip.create_model("local-dir:" + folder)``; and
    ``open_clip.create_model(name, pretrained=folder + "/open_clip_model.safetensors")``, after
    ``open_clip.add_model_config(folder + "/" + name + ".json")``, where ``name`` is the folder's; the last way has
    open_clip's own mean and standard deviation of images and not those of the configuration.

    Args:
        folder: The folder; made if it is missing.
        model: The model.
        config: Its configuration, as for :func:`create_clip`.

    Returns:
        The file of the weights.

    """
    from safetensors.torch import save

    folder = Path(folder)
    content = whole_config(config)
    weights = {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}
    write_text(folder / CONFIG_FILE, json.dumps(content, indent=1) + "\n")
    write_text(folder / f"{folder.resolve().name}.json", json.dumps(content["model_cfg"], indent=1) + "\n")
    payload = save(weights, {"format": "pt"})
    return write_aside(folder / WEIGHTS_FILE, lambda file: file.write(payload))


def preprocessing(model: nn.Module) -> tuple[tuple[int, int], tuple[float, ...], tuple[float, ...]]:
    """Height and width, mean and standard deviation of the images that a model of open_clip takes."""
    found: dict[str, Any] = model.visual.preprocess_cfg  # type: ignore[union-attr, assignment]
    size = found["size"]
    height, width = size if isinstance(size, Sequence) else (size, size)
    return (int(height), int(width)), tuple(map(float, found["mean"])), tuple(map(float, found["std"]))


def _configured(config: Mapping[str, Any], weights: str | None, image_size: int | None) -> tuple[nn.Module, Tokenizer]:
    open_clip = load_open_clip()

    # the way of a published folder, so that open_clip alone decides what a configuration means
    with TemporaryDirectory() as folder:
        (Path(folder) / CONFIG_FILE).write_text(json.dumps(whole_config(config)), encoding="utf-8")
        model, tokenizer = _made(f"local-dir:{folder}", image_size, load_weights=False)
    if weights:
        open_clip.load_checkpoint(model, weights)
    return model, tokenizer


def _made(name: str, image_size: int | None, **arguments: Any) -> tuple[nn.Module, Tokenizer]:
    open_clip = load_open_clip()

    # a text tower of Hugging Face would bring its own weights otherwise
    model = open_clip.create_model(name, force_image_size=image_size, pretrained_text=False, **arguments)
    return model.float(), open_clip.get_tokenizer(name)
