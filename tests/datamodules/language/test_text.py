"""Text data: tokens, rows, splits by file, prompts and the words of classes, files of a user's own."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_trust.datamodules import (
    ByteTokenizer,
    CodeCorpus,
    CodeOrProse,
    LabeledText,
    PromptedText,
    make_tokenizer,
)
from lightning_trust.datamodules.language.code_or_prose import code_and_prose, passages
from lightning_trust.datamodules.language.python_sources import files_of, source_files
from lightning_trust.datamodules.language.text_rows import PadRows, TokenRows

SMALL = {"train_rows": 40, "val_rows": 8, "test_rows": 8}


def words(number):
    return " ".join("abcdefghij"[int(digit)] * 3 for digit in str(number))


@pytest.fixture
def sources(tmp_path):
    """Two packages of five files, beside what is not to be read."""
    for package in ("aaa", "bbb"):
        (tmp_path / package / "test").mkdir(parents=True)
        for number in range(5):
            count = 1000 * (1 + (package == "bbb")) + 100 * number
            lines = [
                f'def {package}_{number}{line}():\n    """{words(count + line)}."""\n    9{number}{line}'
                for line in range(20)
            ]
            (tmp_path / package / f"m{number}.py").write_text("\n".join(lines))
        (tmp_path / package / "test" / "m9.py").write_text("left out")
        (tmp_path / package / "data.txt").write_text("left out")
    return tmp_path


def texts(data, part):
    return {data.tokenizer.decode(row["input_ids"].tolist()) for row in getattr(data, f"{part}_dataset")}


# -- tokens ------------------------------------------------------------------------------------------------------------
def test_bytes_come_back():
    tokenizer = make_tokenizer("bytes")
    assert isinstance(tokenizer, ByteTokenizer)
    text = "naïve\n\t日本"
    assert tokenizer.decode([*tokenizer.encode(text), tokenizer.pad_token_id, tokenizer.eos_token_id]) == text
    assert len(tokenizer) == 258


@pytest.fixture
def word_tokenizer(tmp_path):
    """A tokenizer of transformers in a folder: one token a word, one before a text."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<s>", "<pad>", "bad", "fine", "It", "was", "good", "awful", "<unk>"]
    made = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>")
    fast.save_pretrained(tmp_path / "words")
    return str(tmp_path / "words")


def test_a_tokenizer_of_transformers_by_name(word_tokenizer, tmp_path):
    (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + "good\t1\nbad bad\t0\n" * 4)
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\nfine\t1\nbad\t0\n")
    data = LabeledText(
        str(tmp_path),
        words=(" awful", " good"),
        tokenizer=word_tokenizer,
        train_rows=4,
        val_rows=2,
        batch_size=2,
    )
    data.setup()
    assert data.vocabulary == 9
    batch = next(iter(data.test_dataloader()))
    # <s> fine It was good; <s> bad It was awful
    assert batch["input_ids"].tolist() == [[0, 3, 4, 5, 6], [0, 2, 4, 5, 7]]
    assert batch["labels"].tolist() == [[-100] * 4 + [6], [-100] * 4 + [7]]
    assert batch["candidates"].tolist() == [7, 6]


# -- rows --------------------------------------------------------------------------------------------------------------
def test_rows_are_padded_on_the_right_and_masked():
    rows = TokenRows([torch.tensor([1, 2, 3]), torch.tensor([4, 5])], torch.tensor([0, 1]), torch.tensor([3, 5]))
    batch = PadRows(9, rows.candidates)([rows[0], rows[1]])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 3], [-100, 5, -100]]
    assert batch["candidates"].tolist() == [3, 5]
    assert "candidates" not in PadRows(9)([rows[0]])


def test_files_are_sorted_and_split_without_overlap(sources):
    files = source_files(str(sources))
    assert list(files) == sorted(files)
    assert len(files) == 10
    parts = [files_of(part, files, seed=3) for part in ("train", "val", "test")]
    assert sorted(path for part in parts for path in part) == sorted(files.values())
    assert [len(part) for part in parts] == [7, 1, 2]
    assert files_of("test", dict(reversed(files.items())), seed=3) == parts[2]
    assert any(files_of("test", files, seed=seed) != parts[2] for seed in range(4))


def test_the_standard_library_is_that_of_the_interpreter():
    found = source_files(None, "json")
    assert found["json/decoder.py"] == Path(sysconfig.get_paths()["stdlib"], "json", "decoder.py")
    assert not any("site-packages" in name for name in source_files(None))


def test_corpus_is_the_text_of_its_files(sources):
    data = CodeCorpus(sources=str(sources), max_length=16, val_rows=None, test_rows=None, batch_size=4)
    data.setup()
    train = data.train_dataset
    whole = data.tokenizer.decode(train.rows.flatten().tolist())
    expected = "".join(path.read_text() for path in files_of("train", source_files(str(sources)), 0))
    assert expected.startswith(whole)
    assert len(expected) - len(whole) < 16
    # an end between files
    assert (train.rows == 257).sum() in (6, 7)
    batch = next(iter(data.val_dataloader()))
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert batch["attention_mask"].all()


def test_corpus_of_packages():
    data = CodeCorpus(packages=["json", "email"], max_length=32, **SMALL)
    data.setup()
    assert [len(each) for each in (data.train_dataset, data.val_dataset, data.test_dataset)] == [40, 8, 8]
    again = CodeCorpus(packages=["json", "email"], max_length=32, **SMALL)
    again.setup()
    assert torch.equal(data.train_dataset.rows, again.train_dataset.rows)
    fewer = CodeCorpus(packages=["json", "email"], max_length=32, **{**SMALL, "train_rows": 5})
    fewer.setup()
    assert texts(fewer, "train") < texts(data, "train")


# -- classes -----------------------------------------------------------------------------------------------------------
def test_rows_are_code_or_prose(sources):
    data = CodeOrProse(None, 20, sources=str(sources), train_rows=10, val_rows=4, test_rows=None)
    data.setup()
    for part in ("train", "val", "test"):
        dataset = getattr(data, f"{part}_dataset")
        assert dataset.targets.bincount().tolist() == [len(dataset) // 2] * 2
        for place, row in enumerate(dataset):
            text = data.tokenizer.decode(row["input_ids"].tolist())
            label = dataset.targets[place]
            assert text.endswith("\n# This is " + "cp"[label])
            # the code of these sources has numbers, their prose has none
            assert any(character.isdigit() for character in text) == (label == 0)
            assert (row["labels"] == -100).sum() == len(row["labels"]) - 1
            assert row["labels"][-1] == dataset.candidates[label]
    assert not texts(data, "train") & texts(data, "test")


def test_code_and_prose_of_a_source():
    source = '''"""Top
    line."""
import os  # a comment
class A:
    """Only this."""
async def f(x):
    """Inside.

    More.
    """
    return "text"
'''
    code, prose = code_and_prose(source)
    assert code == "import os class A: pass async def f(x): return 'text'"
    assert prose == "Top line. Only this. Inside. More."
    assert code_and_prose("") == ("", "")


def test_passages_begin_with_words():
    assert passages("a bb ccc dddd", 4) == ["a bb", "ccc "]
    assert passages("abcdefgh", 3) == ["abc"]
    assert passages("ab", 3) == []


class Words(PromptedText):
    """Texts of three classes."""

    def __init__(self, words=(" north", " nord", " south"), template="{text}: ", max_length=20):
        super().__init__(template, words, "bytes", max_length, 2, 0, None, None, None, 0)

    def texts(self, part):
        return [(f"{part} {number} " + "x" * 30, number % 3) for number in range(7)]


def test_words_are_told_apart_by_the_token_after_what_they_share():
    # " no" is shared by two of three only: they have the same token
    with pytest.raises(ValueError, match=r"`words` to be told apart .* but got {' north': 110, ' nord': 110"):
        Words().setup()
    data = Words((" east", " west", " south"))
    data.setup()
    assert data.num_classes == 3
    assert data.tokenizer.decode(data.train_dataset.candidates.tolist()) == "ews"
    # as many of each class: two of three, two, two
    assert data.train_dataset.targets.bincount().tolist() == [2, 2, 2]
    for row in data.train_dataset:
        text = data.tokenizer.decode(row["input_ids"].tolist())
        # cut at its end, to the length of a row
        assert len(text) == 20
        assert text.startswith("train ")
        assert text[-5:-1] == "x:  "


def test_labeled_text_splits_its_training_file(tmp_path):
    (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + "".join(f'a "{i}\t{i % 2}\n' for i in range(30)))
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\n" + "".join(f"b {i}\t{i % 2}\n" for i in range(6)))
    data = LabeledText(str(tmp_path), train_rows=None, val_rows=10)
    data.setup()
    assert [len(each) for each in (data.train_dataset, data.val_dataset, data.test_dataset)] == [20, 10, 6]
    assert data.val_dataset.targets.bincount().tolist() == [5, 5]
    assert not texts(data, "train") & texts(data, "val")
    assert "b 0 It was t" in texts(data, "test")


# -- in a run ----------------------------------------------------------------------------------------------------------
def test_workers_and_lightning(tmp_path):
    class Looks(pl.LightningModule):
        def training_step(self, batch, batch_idx):
            assert set(batch) == {"input_ids", "attention_mask", "labels", "candidates"}

        def configure_optimizers(self):
            return None

    data = CodeOrProse(["json", "email"], num_workers=1, batch_size=8, **SMALL)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, fast_dev_run=True
    )
    trainer.fit(Looks(), data)
    assert isinstance(trainer.train_dataloader, DataLoader)


# -- bad input ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        (CodeCorpus, {"batch_size": 0}, "`batch_size` to be an integer of at least 1, but got 0"),
        (CodeCorpus, {"max_length": 1}, "`max_length` to be an integer of at least 2, but got 1"),
        (CodeCorpus, {"train_rows": 0}, "`train_rows` to be an integer of at least 1, but got 0"),
        (CodeCorpus, {"packages": []}, r"`packages` to name one, or to be None, but got \[\]"),
        (CodeOrProse, {"characters": 0}, "`characters` to be an integer of at least 1, but got 0"),
        (CodeOrProse, {"packages": []}, r"`packages` to name one, or to be None, but got \[\]"),
        (CodeOrProse, {"template": "text"}, "`template` to have '{text}' once, but got 'text'"),
        (LabeledText, {"val_rows": 0}, "`val_rows` to be an integer of at least 1, but got 0"),
    ],
)
def test_arguments_out_of_range(kind, arguments, words):
    with pytest.raises(ValueError, match=words):
        kind(**arguments)


def test_what_is_not_there(tmp_path, sources):
    with pytest.raises(ValueError, match="package 'nothing' in .* to hold Python files, but got none"):
        CodeOrProse(["nothing", "aaa"], sources=str(sources)).setup()
    with pytest.raises(ValueError, match="`words` to hold a word for each of two classes, but got"):
        Words((" one",))
    with pytest.raises(ValueError, match="at least 3 files, one a part, but got"):
        files_of("train", {"a.py": tmp_path}, 0)
    with pytest.raises(MisconfigurationException, match="`train_rows` of CodeCorpus to be at most .* but got 100000"):
        CodeCorpus(sources=str(sources), train_rows=100000).setup()
    with pytest.raises(MisconfigurationException, match="`test_rows` of CodeOrProse .*, as many of each class, but"):
        CodeOrProse(None, 20, sources=str(sources), train_rows=4, val_rows=4, test_rows=4000).setup()
    with pytest.raises(ValueError, match="`max_length` to leave room for a text beside the 12 tokens"):
        CodeOrProse(None, sources=str(sources), max_length=12).setup()
    (sources / "aaa" / "m0.py").write_text("no python")
    with pytest.raises(SyntaxError):
        CodeOrProse(None, 20, sources=str(sources), train_rows=4, val_rows=4, test_rows=4).setup()
    with pytest.raises(FileNotFoundError, match=r"train.tsv to be the file of the train rows"):
        LabeledText(str(tmp_path)).setup()
    (tmp_path / "train.tsv").write_text("text\tlabel\nx\t0\n")
    with pytest.raises(ValueError, match=r"columns \['sentence'\], but got \['text', 'label'\]"):
        LabeledText(str(tmp_path)).setup()
    (tmp_path / "train.tsv").write_text("sentence\tlabel\nx\t2\n")
    with pytest.raises(ValueError, match=r"line 2 of .*train.tsv to have a label from 0 to 1, but got '2'"):
        LabeledText(str(tmp_path)).setup()


def test_bytes_need_no_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    make_tokenizer("bytes")
    with pytest.raises(ModuleNotFoundError, match=r"'gpt2' needs transformers: pip install \"lightning_trust\[lang"):
        make_tokenizer("gpt2")
