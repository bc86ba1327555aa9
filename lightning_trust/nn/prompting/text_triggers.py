"""Universal triggers for text: words, or mixtures of words, that a frozen language model reads with every sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_trust.core.wrapping import Surround
from lightning_trust.functional.prompting import project_to_simplex

Parametrisation = Literal["simplex", "free"]
Positions = Literal["after_text", "in_order"]
#: how far the sum of a row on the simplex may be from 1
_TOLERANCE = 1e-5


class TextTrigger(Surround):
    """Base of triggers for text: learned embeddings among those of a sentence, for models of transformers.

    Called with what the model would be called with, it gives what to call it with in its place:
    ``model(**trigger(input_ids, attention_mask))``. The embedding is used and not owned: it is no part of the state.

    Args:
        embedding: The model's embedding of words; that of the host's network if None (:meth:`bind`).
        num_tokens: Number of learned embeddings.
        insert_at: How many tokens of the sentence stand before them: 1 keeps BERT's ``[CLS]`` in front.
        positions: ``"after_text"``: the sentence keeps its positions and the trigger gets those that follow its last
            word, as in the paper's code; it needs a model that takes ``position_ids``, counted from 0, and padding on
            the right. ``"in_order"``: positions as the tokens stand.
        max_length: Longest sequence that the model takes; not checked if None.

    """

    def __init__(
        self,
        embedding: nn.Embedding | None,
        num_tokens: int,
        insert_at: int,
        positions: Positions,
        max_length: int | None,
    ) -> None:
        super().__init__()
        if num_tokens < 1:
            raise ValueError(f"Expected argument `num_tokens` to be at least 1, but got {num_tokens}.")
        if insert_at < 0:
            raise ValueError(f"Expected argument `insert_at` to be at least 0, but got {insert_at}.")
        if positions not in get_args(Positions):
            raise ValueError(f"Expected argument `positions` to be 'after_text' or 'in_order', but got {positions!r}.")
        self.num_tokens = num_tokens
        self.insert_at = insert_at
        self.positions: Positions = positions
        self.max_length = max_length
        # in a tuple, so that it is no sub-module
        self._embedding: tuple[nn.Embedding, ...] = ()
        self.weight: nn.Parameter
        self.register_parameter("weight", None)
        if embedding is not None:
            self.bind(embedding)

    @property
    def embedding(self) -> nn.Embedding:
        """The model's embedding of words."""
        if not self._embedding:
            raise RuntimeError(f"{type(self).__name__} has no embedding yet. Pass `embedding=...`, or call `bind`.")
        return self._embedding[0]

    @property
    def bound(self) -> bool:
        """Whether the embedding is known."""
        return bool(self._embedding)

    def bind(self, embedding: nn.Embedding, max_length: int | None = None) -> None:
        """Use a model's embedding of words; what is learned is drawn anew.

        Args:
            embedding: The embedding.
            max_length: Longest sequence that the model takes, where the trigger was not told.

        """
        self._embedding = (embedding,)
        self.max_length = max_length if self.max_length is None else self.max_length
        initial = self.initial(embedding)
        self.weight = nn.Parameter(initial.to(torch.promote_types(initial.dtype, torch.float32)))

    def initial(self, embedding: nn.Embedding) -> Tensor:
        """What is learned, in the beginning."""
        raise NotImplementedError

    def embeddings(self) -> Tensor:
        """The learned embeddings, shape ``(T, D)``."""
        raise NotImplementedError

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **others: Any) -> dict[str, Any]:
        """What to call the model with in place of ``input_ids``.

        Args:
            input_ids: Shape ``(N, L)``.
            attention_mask: 1 where there is a token, shape ``(N, L)``; all ones if None.
            others: ``token_type_ids`` ``(N, L)`` gets zeros for the trigger; anything else is passed on.

        Returns:
            ``inputs_embeds`` ``(N, L + T, D)``, ``attention_mask`` ``(N, L + T)``, ``position_ids`` where asked for,
            and the others.

        Raises:
            ValueError: If ``input_ids`` are not of two dimensions, or the whole is longer than the model takes.

        """
        if input_ids.ndim != 2:
            raise ValueError(f"Expected `input_ids` of shape (N, L), but got {tuple(input_ids.shape)}.")
        rows, length = input_ids.shape
        self._check_length(length)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        words = self.embedding(input_ids)
        learned = self.embeddings().to(words.dtype).expand(rows, -1, -1)
        result = {"inputs_embeds": self._joined(words, learned)}
        new = mask.new_ones(rows, self.num_tokens)
        result["attention_mask"] = self._joined(mask, new)
        if self.positions == "after_text":
            places = torch.arange(length, device=input_ids.device).expand(rows, -1)
            following = mask.long().sum(dim=1, keepdim=True) + torch.arange(self.num_tokens, device=input_ids.device)
            result["position_ids"] = self._joined(places, following)
        types = others.pop("token_type_ids", None)
        if types is not None:
            result["token_type_ids"] = self._joined(types, torch.zeros_like(new, dtype=types.dtype))
        return {**result, **others}

    def _joined(self, text: Tensor, learned: Tensor) -> Tensor:
        return torch.cat([text[:, : self.insert_at], learned, text[:, self.insert_at :]], dim=1)

    def _check_length(self, length: int) -> None:
        if self.max_length is not None and length + self.num_tokens > self.max_length:
            raise ValueError(
                f"{type(self).__name__} adds {self.num_tokens} tokens to sentences of {length}, but the model takes"
                f" {self.max_length}. Truncate the text to {max(0, self.max_length - self.num_tokens)} tokens."
            )


class SoftTextTrigger(TextTrigger):
    r"""Learned embeddings that are mixtures of words.

    .. math:: e_t = v_t E, \qquad v_t \in \{v : 0 \le v_i \le 1, \textstyle\sum_i v_i = 1\}

    with the model's word embeddings :math:`E`. Rows :math:`v_t` begin as random words and are projected back onto the
    simplex before every use. With ``"free"`` the embeddings themselves are learned, and begin as those of random words.

    Paper: Fairness Reprogramming (NeurIPS 2022).

    Args:
        embedding: The model's embedding of words; that of the host's network if None.
        num_tokens: Number of learned embeddings, at least 1.
        parametrisation: ``"simplex"`` or ``"free"``.
        insert_at: How many tokens of the sentence stand before them: 1 keeps BERT's ``[CLS]`` in front.
        positions: Positions of the trigger: ``"after_text"`` as in the paper's code, or ``"in_order"``; see
            :class:`TextTrigger`.
        max_length: Longest sequence that the model takes; not checked if None.

    Raises:
        ValueError: If an argument is out of its range, or a sentence is too long for the model.

    Example:
        >>> trigger = SoftTextTrigger(nn.Embedding(10, 4), num_tokens=2)
        >>> changed = trigger(torch.tensor([[1, 5, 6]]))
        >>> changed["inputs_embeds"].shape, changed["position_ids"].tolist()
        (torch.Size([1, 5, 4]), [[0, 3, 4, 1, 2]])

    """

    def __init__(
        self,
        embedding: nn.Embedding | None = None,
        num_tokens: int = 5,
        parametrisation: Parametrisation = "simplex",
        insert_at: int = 1,
        positions: Positions = "after_text",
        max_length: int | None = None,
    ) -> None:
        if parametrisation not in get_args(Parametrisation):
            raise ValueError(
                f"Expected argument `parametrisation` to be 'simplex' or 'free', but got {parametrisation!r}."
            )
        self.parametrisation: Parametrisation = parametrisation
        super().__init__(embedding, num_tokens, insert_at, positions, max_length)

    def initial(self, embedding: nn.Embedding) -> Tensor:
        """Random words: one-hot rows ``(T, V)``, or their embeddings ``(T, D)``."""
        words = torch.randint(embedding.num_embeddings, (self.num_tokens,)).to(embedding.weight.device)
        if self.parametrisation == "free":
            return embedding.weight.detach()[words].clone()
        return F.one_hot(words, embedding.num_embeddings).to(embedding.weight.dtype)

    def embeddings(self) -> Tensor:
        """The learned embeddings, shape ``(T, D)``."""
        if self.parametrisation == "free":
            return self.weight
        return _on_simplex(self) @ self.embedding.weight.detach().to(self.weight.dtype)


class HardTextTrigger(TextTrigger):
    r"""Learned words.

    .. math:: e_t = E_{\arg\max_i v_{ti}}, \qquad \frac{\partial}{\partial v_t} := \frac{\partial}{\partial e_t} E^\top

    with rows :math:`v_t` on the simplex as those of :class:`SoftTextTrigger`: forward the word with the largest weight,
    backward the gradient of the mixture (straight through). In evaluation, feeding the words as text gives the same.

    Paper: Fairness Reprogramming (NeurIPS 2022).

    Args:
        embedding: The model's embedding of words; that of the host's network if None.
        num_tokens: Number of learned words, at least 1.
        allowed_token_ids: The words to choose from; all of the vocabulary if None.
        insert_at: How many tokens of the sentence stand before them: 1 keeps BERT's ``[CLS]`` in front.
        positions: Positions of the trigger: ``"after_text"`` as in the paper's code, or ``"in_order"``; see
            :class:`TextTrigger`.
        max_length: Longest sequence that the model takes; not checked if None.

    Raises:
        ValueError: If an argument is out of its range, ``allowed_token_ids`` are empty, repeated or outside of the
            vocabulary, or a sentence is too long for the model.

    Example:
        >>> trigger = HardTextTrigger(nn.Embedding(10, 4), num_tokens=2, allowed_token_ids=[7])
        >>> trigger.token_ids
        tensor([7, 7])

    """

    def __init__(
        self,
        embedding: nn.Embedding | None = None,
        num_tokens: int = 5,
        allowed_token_ids: Sequence[int] | None = None,
        insert_at: int = 1,
        positions: Positions = "after_text",
        max_length: int | None = None,
    ) -> None:
        if allowed_token_ids is not None:
            if not len(allowed_token_ids):
                raise ValueError("Expected argument `allowed_token_ids` to hold at least one token, but got none.")
            if len(set(allowed_token_ids)) != len(allowed_token_ids):
                raise ValueError("Expected argument `allowed_token_ids` to hold every token once, but got some twice.")
        self.allowed_token_ids = allowed_token_ids
        super().__init__(embedding, num_tokens, insert_at, positions, max_length)

    @property
    def token_ids(self) -> Tensor:
        """The words, int64 ``(T,)``."""
        best = _on_simplex(self).detach().argmax(dim=1)
        return best if self.allowed_token_ids is None else self._allowed()[best]

    def _allowed(self) -> Tensor:
        return torch.as_tensor(self.allowed_token_ids, device=self.embedding.weight.device)

    def _words(self) -> Tensor:
        """Embeddings of the words to choose from."""
        matrix = self.embedding.weight.detach()
        return matrix if self.allowed_token_ids is None else matrix[self._allowed()]

    def initial(self, embedding: nn.Embedding) -> Tensor:
        """Random words among the allowed: one-hot rows."""
        if self.allowed_token_ids is None:
            count = embedding.num_embeddings
        else:
            count = len(self.allowed_token_ids)
            outside = [token for token in self.allowed_token_ids if not 0 <= token < embedding.num_embeddings]
            if outside:
                raise ValueError(
                    f"Expected argument `allowed_token_ids` to be in [0, {embedding.num_embeddings}), the vocabulary,"
                    f" but got {outside[:5]}."
                )
        words = torch.randint(count, (self.num_tokens,)).to(embedding.weight.device)
        return F.one_hot(words, count).to(embedding.weight.dtype)

    def embeddings(self) -> Tensor:
        """Embeddings of the words, shape ``(T, D)``, with the gradient of the mixture."""
        weight = _on_simplex(self)
        matrix = self._words().to(weight.dtype)
        chosen = matrix[weight.detach().argmax(dim=1)]
        mixture = weight @ matrix
        # exactly the words in value: the mixture adds a zero that has its gradient
        return chosen + (mixture - mixture.detach())


def _on_simplex(trigger: TextTrigger) -> Tensor:
    """What is learned, on the simplex; while it is trained, it is moved there itself."""
    weight = trigger.weight
    with torch.no_grad():
        off = (weight.sum(dim=1) - 1.0).abs() > _TOLERANCE
        off = (off | (weight.amin(dim=1) < 0.0) | (weight.amax(dim=1) > 1.0))[:, None]
        # rows that are there stay as they are, bit for bit, however often they are used between two steps
        projected = torch.where(off, project_to_simplex(weight), weight)
        if not (trigger.training and weight.requires_grad):
            return projected
        # `.data`: several forward passes may come before a backward pass, and those after the first change nothing
        weight.data.copy_(projected)
    return weight
