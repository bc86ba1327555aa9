"""Learned prompts as pictures, and what their classes stand for."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

import torch
from torch import Tensor

from lightning_trust.nn.prompting.prompts import Prompt
from lightning_trust.report.runs import PromptRun


def prompt_name(run: PromptRun) -> str:
    """The folder of the run that a prompt came from."""
    folder = run.path.parent
    return folder.parent.name if folder.name == "prompt" and folder.parent.name else folder.name


def prompt_line(run: PromptRun) -> str:
    """A prompt in one line, for the terminal."""
    size = sum(path.stat().st_size for path in run.path.parent.iterdir() if path.is_file())
    measured = ", ".join(f"{name} {value:.4g}" for name, value in sorted(run.card["metrics"].items()))
    network = run.card["network"]["name"]
    return f"{prompt_name(run)}: {run.card['prompt']['class']} for {network}, {size:,} bytes" + (
        f"; {measured}" if measured else ""
    )


def prompt_sections(runs: Sequence[PromptRun]) -> list[str]:
    """The prompts as parts of the HTML page."""
    parts = ['<h2 id="prompts">Prompts</h2>']
    for run in runs:
        parts.append(f"<h3>{escape(prompt_name(run))}</h3><p>{escape(prompt_line(run))}.</p>")
        prompt = run.part.prompt
        if isinstance(prompt, Prompt) and prompt.delta.ndim == 3 and prompt.delta.shape[0] in (1, 3):
            pattern = prompt.pattern().cpu()
            name = prompt_name(run)
            parts += [
                _figure(
                    _shown(pattern),
                    f"prompt of {name}",
                    "The learned pattern, scaled to its smallest and largest value; grey where there is none.",
                ),
                _figure(
                    _scaled(spectrum(pattern).log1p()),
                    f"frequencies of the prompt of {name}",
                    "Its frequencies: logarithm of the magnitude, white where it is largest; slow waves in the middle,"
                    " fast ones at the rim.",
                ),
            ]
        parts += _meaning(run)
    return parts


def spectrum(pattern: Tensor) -> Tensor:
    r"""Magnitudes of the two-dimensional Fourier transform of a prompt, as "AutoVP" (ICLR 2024) looks at them.

    .. math:: S_{uv} = \frac{1}{C} \sum_c \left| \sum_{hw} \left(p_{chw} - \bar p_c M_{chw}\right)
        e^{-2 \pi i (u h / H + v w / W)} \right|

    with :math:`M` one where there is a prompt, and :math:`\bar p_c` the mean of the channel there: an untrained frame,
    which is grey all over, has no frequencies, and the hole in it none of its own.

    Args:
        pattern: The prompt as it stands in an input, zero where there is none, shape ``(C, H, W)``.

    Returns:
        The magnitudes, shape ``(H, W)``, the frequency zero at ``(H // 2, W // 2)``.

    Example:
        >>> wave = torch.tensor([1.0, -1.0]).repeat(4).expand(1, 8, 8)
        >>> spectrum(wave).argmax().item() == 4 * 8 + 0, spectrum(wave).max().item()
        (True, 64.0)

    """
    there = pattern != 0.0
    mean = pattern.sum(dim=(1, 2), keepdim=True) / there.sum(dim=(1, 2), keepdim=True).clamp(min=1)
    waves = torch.fft.fftshift(torch.fft.fft2((pattern - mean) * there), dim=(-2, -1))
    return waves.abs().mean(dim=0)


def _meaning(run: PromptRun) -> list[str]:
    meaning = run.card.get("meaning")
    if not meaning:
        return []
    lines = ['<div class="scroll"><table><thead><tr><th scope="col">Class of the task</th>']
    lines.append('<th scope="col" style="text-align: left">Source classes that stand for it</th></tr></thead><tbody>')
    lines += [
        f'<tr><td>{escape(name)}</td><td class="words">{escape(", ".join(sources))}</td></tr>'
        for name, sources in meaning.items()
    ]
    return [*lines, "</tbody></table></div>"]


def _figure(image: Tensor, alt: str, caption: str) -> str:
    """An image in [0, 1], of one channel or three, under a caption."""
    from matplotlib.image import imsave

    file = io.BytesIO()
    imsave(file, image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy(), format="png")
    picture = base64.b64encode(file.getvalue()).decode()
    return (
        f'<figure><figcaption>{caption}</figcaption><img alt="{escape(alt)}" src="data:image/png;base64,{picture}"'
        ' style="image-rendering: pixelated; width: 224px"></figure>'
    )


def _shown(pattern: Tensor) -> Tensor:
    """A pattern, scaled; grey where there is none."""
    there = pattern != 0.0
    return torch.where(there, _scaled(pattern, pattern[there] if bool(there.any()) else pattern), 0.5)


def _scaled(image: Tensor, values: Tensor | None = None) -> Tensor:
    """An image, the smallest of some values at 0 and the largest at 1."""
    values = image if values is None else values
    low, high = float(values.min()), float(values.max())
    return ((image - low) / max(high - low, 1e-12)).clamp(0.0, 1.0)
