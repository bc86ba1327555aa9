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
            picture = _png(prompt.pattern())
            parts.append(
                "<figure><figcaption>The learned pattern, scaled to its smallest and largest value; grey where there is"
                f' none.</figcaption><img alt="prompt of {escape(prompt_name(run))}" src="data:image/png;base64,'
                f'{picture}" style="image-rendering: pixelated; width: 224px"></figure>'
            )
        parts += _meaning(run)
    return parts


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


def _png(pattern: Tensor) -> str:
    """A pattern as a PNG in base64."""
    from matplotlib.image import imsave

    there = pattern != 0.0
    values = pattern[there] if bool(there.any()) else pattern.flatten()
    low, high = float(values.min()), float(values.max())
    shown = torch.where(there, (pattern - low) / max(high - low, 1e-12), 0.5).clamp(0.0, 1.0)
    file = io.BytesIO()
    imsave(file, shown.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy(), format="png")
    return base64.b64encode(file.getvalue()).decode()
