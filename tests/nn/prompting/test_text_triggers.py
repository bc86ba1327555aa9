"""Text triggers on a small BERT: against the same words as text, their gradients, limits and bad input."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_trust.functional.prompting import project_to_simplex
from lightning_trust.nn import HardTextTrigger, SoftTextTrigger

transformers = pytest.importorskip("transformers")
VOCABULARY = 30


def bert(**changes):
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 20,
        "num_labels": 2,
        # far apart, so that every word counts
        "initializer_range": 0.4,
    }
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**{**settings, **changes}))
    return model.eval().requires_grad_(False)


def sentences():
    ids = torch.randint(3, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    mask[2, 6:] = 0
    return ids, mask


def as_text(trigger, ids, mask, insert_at):
    """The trigger's words in the text itself."""
    words = trigger.token_ids.expand(len(ids), -1)
    return (
        torch.cat([ids[:, :insert_at], words, ids[:, insert_at:]], dim=1),
        torch.cat([mask[:, :insert_at], torch.ones_like(words), mask[:, insert_at:]], dim=1),
    )


@pytest.mark.parametrize("insert_at", [0, 1, 3])
@pytest.mark.parametrize("positions", ["after_text", "in_order"])
def test_hard_trigger_is_its_words_as_text(insert_at, positions):
    model, (ids, mask) = bert(), sentences()
    trigger = HardTextTrigger(model.get_input_embeddings(), 4, insert_at=insert_at, positions=positions).eval()
    # weights that have moved since they were words
    trigger.weight.data += 0.2 * torch.randn(trigger.weight.shape)
    words, attended = as_text(trigger, ids, mask, insert_at)
    places = None
    if positions == "after_text":
        rows = []
        for length in mask.sum(dim=1).tolist():
            text = list(range(7))
            rows.append([*text[:insert_at], *range(length, length + 4), *text[insert_at:]])
        places = torch.tensor(rows)
    expected = model(input_ids=words, attention_mask=attended, position_ids=places).logits
    found = model(**trigger(ids, mask)).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, model(input_ids=ids, attention_mask=mask).logits, atol=1e-2)


def test_soft_trigger_of_words_is_the_hard_one():
    model, (ids, mask) = bert(), sentences()
    soft = SoftTextTrigger(model.get_input_embeddings(), 3)
    hard = HardTextTrigger(model.get_input_embeddings(), 3)
    hard.load_state_dict(soft.state_dict())
    assert torch.equal(model(**soft(ids, mask)).logits, model(**hard(ids, mask)).logits)
    assert soft.weight.sum(dim=1).tolist() == [1.0] * 3


def test_gradient_is_that_of_the_mixture():
    model, (ids, mask) = bert(), sentences()
    matrix = model.get_input_embeddings().weight
    for kind in (SoftTextTrigger, HardTextTrigger):
        trigger = kind(model.get_input_embeddings(), 2)
        embeddings = trigger.embeddings()
        embeddings.retain_grad()
        replaced = {**trigger(ids, mask)}
        replaced["inputs_embeds"] = torch.cat(
            [replaced["inputs_embeds"][:, :1], embeddings.expand(3, -1, -1), replaced["inputs_embeds"][:, 3:]], dim=1
        )
        model(**replaced).logits[:, 0].sum().backward()
        torch.testing.assert_close(trigger.weight.grad, embeddings.grad @ matrix.T)
        assert trigger.weight.grad.abs().sum() > 0.0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_weights_are_put_back_onto_the_simplex_before_use():
    embedding = nn.Embedding(12, 4)
    moved = torch.randn(3, 12)
    trigger = SoftTextTrigger(embedding, 3)
    trigger.weight.data.copy_(moved)
    expected = project_to_simplex(moved)
    torch.testing.assert_close(trigger.embeddings(), expected @ embedding.weight.detach())
    torch.testing.assert_close(trigger.weight.data, expected)
    once = trigger.weight.detach().clone()
    # a graph made before a second use is as good after it
    loss = trigger.embeddings().square().sum()
    trigger.embeddings()
    loss.backward()
    assert torch.equal(trigger.weight, once)
    # evaluation uses the projection, and writes nothing
    trigger.eval().weight.data.copy_(moved)
    torch.testing.assert_close(trigger.embeddings(), expected @ embedding.weight.detach())
    assert torch.equal(trigger.weight.detach(), moved)


def test_free_embeddings_begin_as_words_and_move_anywhere():
    embedding = nn.Embedding(12, 4)
    trigger = SoftTextTrigger(embedding, 3, "free")
    assert all((embedding.weight == row).all(dim=1).any() for row in trigger.weight)
    trigger.weight.data += 5.0
    assert torch.equal(trigger.embeddings(), trigger.weight)


def test_allowed_words_alone_are_chosen():
    embedding = nn.Embedding(12, 4)
    trigger = HardTextTrigger(embedding, 50, [2, 5, 11])
    assert set(trigger.token_ids.tolist()) == {2, 5, 11}
    assert trigger.weight.shape == (50, 3)
    assert torch.equal(trigger.embeddings(), embedding(trigger.token_ids))


def test_the_embedding_is_no_part_of_the_state():
    model = bert()
    trigger = SoftTextTrigger(num_tokens=2)
    assert not trigger.bound
    assert list(trigger.state_dict()) == []
    with pytest.raises(RuntimeError, match="SoftTextTrigger has no embedding yet"):
        trigger(torch.zeros(1, 3, dtype=torch.int64))
    trigger.bind(model.get_input_embeddings(), max_length=20)
    assert list(trigger.state_dict()) == ["weight"]
    assert [name for name, _ in trigger.named_parameters()] == ["weight"]
    twin = copy.deepcopy(trigger)
    assert torch.equal(twin.embeddings(), trigger.embeddings())


def test_other_arguments_of_the_model():
    trigger = SoftTextTrigger(nn.Embedding(12, 4), 2)
    ids = torch.tensor([[1, 2, 3]])
    changed = trigger(ids, token_type_ids=torch.tensor([[0, 1, 1]]), labels=torch.tensor([1]))
    assert changed["token_type_ids"].tolist() == [[0, 0, 0, 1, 1]]
    assert changed["labels"].tolist() == [1]
    assert changed["attention_mask"].tolist() == [[1] * 5]
    assert "position_ids" not in SoftTextTrigger(nn.Embedding(12, 4), 2, positions="in_order")(ids)


def test_bad_input():
    embedding = nn.Embedding(12, 4)
    with pytest.raises(ValueError, match="`num_tokens` to be at least 1, but got 0"):
        SoftTextTrigger(embedding, 0)
    with pytest.raises(ValueError, match="`parametrisation` to be 'simplex' or 'free', but got 'hard'"):
        SoftTextTrigger(embedding, 2, "hard")
    with pytest.raises(ValueError, match="`positions` to be 'after_text' or 'in_order', but got 'first'"):
        SoftTextTrigger(embedding, 2, positions="first")
    with pytest.raises(ValueError, match="`insert_at` to be at least 0, but got -1"):
        SoftTextTrigger(embedding, 2, insert_at=-1)
    with pytest.raises(ValueError, match="`allowed_token_ids` to hold at least one token, but got none"):
        HardTextTrigger(embedding, 2, [])
    with pytest.raises(ValueError, match="every token once"):
        HardTextTrigger(embedding, 2, [1, 1])
    with pytest.raises(ValueError, match=r"in \[0, 12\), the vocabulary, but got \[12, -1\]"):
        HardTextTrigger(embedding, 2, [3, 12, -1])
    with pytest.raises(ValueError, match=r"adds 2 tokens to sentences of 3, but the model takes 4\. Truncate .* to 2"):
        SoftTextTrigger(embedding, 2, max_length=4)(torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"`input_ids` of shape \(N, L\), but got \(3,\)"):
        SoftTextTrigger(embedding, 2)(torch.zeros(3, dtype=torch.int64))
