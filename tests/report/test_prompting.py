import base64
import io
import re

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from rich.console import Console
from torch import nn

from lightning_trust.cli import main
from lightning_trust.nn import LabelMapping, PadPrompt, VisualPrompt, save_prompt
from lightning_trust.report import collect, page, print_collection
from lightning_trust.report.prompting import spectrum


def pictures(text):
    """What is drawn, by its alternative text."""
    found = re.findall(r'alt="([^"]+)" src="data:image/png;base64,([^"]+)"', text)
    return {alt: imread(io.BytesIO(base64.b64decode(content))) for alt, content in found}


@pytest.fixture
def run(tmp_path):
    """A run's folder with a saved prompt."""
    torch.manual_seed(0)
    part = VisualPrompt(PadPrompt(4, 8, channels=1, init="randn"), LabelMapping(5, 2, "fixed", indices=[3, 1]))
    save_prompt(
        tmp_path / "runs" / "digits" / "prompt",
        part,
        nn.Linear(2, 5),
        class_names=["<no>", "yes"],
        source_names=["ant", "bee", "cat", "dog", "eel"],
        metrics={"val/acc": 0.875},
    )
    return tmp_path / "runs", part


def test_page_shows_the_pattern_and_what_classes_stand_for(run):
    folder, part = run
    text = page(collect([folder]))
    assert "<h1>Prompting report</h1>" in text
    assert "&lt;no&gt;" in text
    assert '<td class="words">dog</td>' in text
    assert "val/acc 0.875" in text
    picture = pictures(text)["prompt of digits"]
    assert picture.shape[:2] == (8, 8)
    # grey inside, and the frame from its smallest to its largest value
    assert np.allclose(picture[2:6, 2:6, :3], 0.5, atol=0.01)
    pattern = part.prompt.pattern()[0]
    frame = part.prompt.mask[0].bool()
    values = pattern[frame]
    expected = (values - values.min()) / (values.max() - values.min())
    assert np.allclose(picture[..., 0][frame.numpy()], expected.numpy(), atol=0.01)


def test_page_shows_the_frequencies(run):
    folder, part = run
    picture = pictures(page(collect([folder])))["frequencies of the prompt of digits"][..., 0]
    pattern, frame = part.prompt.pattern()[0].numpy(), part.prompt.mask[0].numpy()
    # one term after the other
    places = np.arange(8)
    wave = np.exp(-2j * np.pi * np.outer(places - 4, places) / 8)
    magnitude = np.log1p(np.abs(wave @ (frame * (pattern - pattern[frame > 0].mean())) @ wave.T))
    assert magnitude[4, 4] < 1e-5
    expected = (magnitude - magnitude.min()) / (magnitude.max() - magnitude.min())
    assert np.allclose(picture, expected, atol=0.01)


def test_an_untrained_frame_has_no_frequencies_and_a_wave_has_its_own():
    assert spectrum(PadPrompt(4, 8).pattern()).max() < 1e-5
    height, width = torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij")
    wave = 0.5 + 0.25 * torch.cos(2 * torch.pi * (2 * height - 3 * width) / 12)
    found = spectrum(torch.stack([wave, wave, torch.full_like(wave, 0.3)]))
    expected = torch.zeros(12, 12)
    # half of the amplitude times the pixels on either side of the middle, in two of three channels
    expected[6 + 2, 6 - 3] = expected[6 - 2, 6 + 3] = 0.125 * 144 * 2 / 3
    assert torch.allclose(found, expected, atol=1e-4)


def test_a_prompt_that_is_nowhere_is_drawn(tmp_path):
    part = VisualPrompt(PadPrompt(8, 8, channels=1), LabelMapping(5, 2, "fixed", indices=[3, 1]))
    save_prompt(tmp_path / "prompt", part, nn.Linear(2, 5))
    found = pictures(page(collect([tmp_path])))
    assert [float(image[..., 0].max()) for image in found.values()] == pytest.approx([0.5, 0.0], abs=0.01)


def test_terminal_shows_a_line_a_prompt(run, capsys):
    folder, _ = run
    console = Console(width=200)
    print_collection(collect([folder]), console)
    assert re.search(r"digits: PadPrompt for Linear, [\d,]+ bytes; val/acc 0.875", capsys.readouterr().out)


def test_command(run, tmp_path, capsys):
    folder, _ = run
    main(["report", str(folder), f"--output={tmp_path / 'page.html'}"])
    assert "Prompting report" in (tmp_path / "page.html").read_text()


def test_a_damaged_prompt_costs_its_own_line(run):
    folder, _ = run
    (folder / "broken").mkdir()
    (folder / "broken" / "prompt.json").write_text("{")
    collection = collect([folder])
    assert len(collection.prompts) == 1
    assert "damaged" in next(iter(collection.damaged.values()))
