"""Greedy decoding of many chats side by side, which may begin and end at different times.

Every step writes a token of each chat; between two steps new ones join and ended ones leave. A face's prefix (its image
tokens) is computed once for all the chats about it that begin together. What is written is what `Predictor.generate`
writes. Shapes: R chats, F faces, P tokens of the prefix, S of a prompt behind it, T columns of the cache, D width, N
image tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from facemllm.model.families import Llava, family_class
from facemllm.model.forward import as_taken
from facemllm.model.inference import Predictor

MASK_CELLS = 2**24
"""Most cells of an attention mask: prompts are taken in groups of at most so many, or one by one."""

_NEUTRAL: dict[str, Any] = {"num_beams": 1, "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0}
_NEUTRAL |= {"no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "min_length": 0, "guidance_scale": 1.0}
_STEERING = (*_NEUTRAL, "bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens", "stop_strings")
_STEERING += ("forced_bos_token_id", "forced_eos_token_id", "min_new_tokens", "exponential_decay_length_penalty")
_STEERING += ("penalty_alpha", "dola_layers", "watermarking_config", "max_time", "token_healing")


def steering(generation_config: Any) -> dict[str, Any]:
    """The generation settings that ask for more than the likeliest token."""
    chosen = {name: getattr(generation_config, name, None) for name in _STEERING}
    return {name: value for name, value in chosen.items() if value not in (None, False, _NEUTRAL.get(name))}


def is_plain(model: Any) -> bool:
    """Whether a model is of LLaVA's layout and its generation settings ask for nothing but the likeliest token, so that
    `Decoding` writes what `generate` does."""
    return issubclass(family_class(model.config), Llava) and not steering(model.generation_config)


@dataclass(eq=False)
class Row:
    """A chat that is being answered: what it asks (token ids behind the prefix), and what is written so far."""

    prompt: Sequence[int]
    face_ND: Tensor = field(repr=False)
    written: list[int] = field(default_factory=list)
    ended: bool = False


class _Batch:
    """Chats and the keys and values of what each has seen: columns (T) of the cache, true in `mask_RT` where they are
    the chat's. The cache knows no order, since positions are in its keys: padding may stand anywhere."""

    def __init__(self, rows: list[Row], cache: DynamicCache, mask_RT: Tensor) -> None:
        self.rows, self.cache, self.mask_RT = rows, cache, mask_RT
        self.layers: Sequence[Any] = cache.layers

    def drop(self, left: Callable[[Row], bool]) -> None:
        """Let chats leave, and columns that nobody sees then."""
        places = [place for place, row in enumerate(self.rows) if not left(row)]
        if len(places) == len(self.rows):
            return
        mask_RT = self.mask_RT[places]
        columns = mask_RT.any(0).nonzero().flatten()
        for layer in self.layers:
            layer.keys = layer.keys[places].index_select(2, columns)
            layer.values = layer.values[places].index_select(2, columns)
        self.rows, self.mask_RT = [self.rows[place] for place in places], mask_RT[:, columns]

    def join(self, other: _Batch) -> None:
        """Put the chats of another beside these; both have some."""
        longest = max(self.mask_RT.shape[1], other.mask_RT.shape[1])

        def both(own: Tensor, others: Tensor, dim: int) -> Tensor:
            behind = (0, 0) * (-1 - dim)
            return torch.cat([pad(one, (*behind, 0, longest - one.shape[dim])) for one in (own, others)])

        for own, new in zip(self.layers, other.layers, strict=True):
            own.keys, own.values = both(own.keys, new.keys, -2), both(own.values, new.values, -2)
        self.mask_RT = both(self.mask_RT, other.mask_RT, -1)
        self.rows = self.rows + other.rows


class Decoding:
    """The chats that are being answered. `longest` is the most tokens of an answer."""

    def __init__(self, predictor: Predictor, longest: int) -> None:
        self._model, self._device, self._longest = predictor.model, predictor.device, longest
        self._family = predictor.family
        ends = self._model.generation_config.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [ends])
        self._prefix = torch.tensor(predictor.frame.prefix_ids, device=self._device)
        self._image_P = self._prefix == predictor.frame.image_token_id
        self._batch: _Batch | None = None

    @property
    def rows(self) -> list[Row]:
        """Those that have not ended."""
        return self._batch.rows if self._batch else []

    def drop(self, left: Callable[[Row], bool]) -> None:
        """Let chats leave before their end."""
        if self._batch:
            self._batch.drop(left)
            if not self._batch.rows:
                self._batch = None

    @torch.inference_mode()
    def begin(self, rows: Sequence[Row]) -> None:
        """Let chats join; their first token is written."""
        waiting = sorted(rows, key=lambda row: len(row.prompt))
        while waiting:
            size = 1
            while size < len(waiting) and (size + 1) * self._cells(waiting[size]) <= MASK_CELLS:
                size += 1
            batch = self._prefilled(waiting[:size])
            waiting = waiting[size:]
            if not batch.rows:
                continue
            if self._batch:
                self._batch.join(batch)
            else:
                self._batch = batch

    @torch.inference_mode()
    def step(self) -> None:
        """Write one more token of every chat; ended ones leave."""
        batch = self._batch
        if batch is None:
            return
        position_R1 = batch.mask_RT.sum(1, keepdim=True)
        batch.mask_RT = pad(batch.mask_RT, (0, 1), value=True)
        last_R1 = torch.tensor([[row.written[-1]] for row in batch.rows], device=self._device)
        states_R1D = self._states(self._embedded(last_R1), batch.mask_RT[:, None], position_R1, batch.cache)
        self._write(batch.rows, states_R1D[:, 0])
        self.drop(lambda row: row.ended)

    def _cells(self, row: Row) -> int:
        return len(row.prompt) * (len(self._prefix) + len(row.prompt))

    def _prefilled(self, rows: list[Row]) -> _Batch:
        """Compute prefixes and prompts, and write each chat's first token; those that have not ended by it."""
        faces = {id(row.face_ND): row.face_ND for row in rows}
        places = {key: place for place, key in enumerate(faces)}
        cache = self._prefill_faces(torch.stack(list(faces.values())))
        own = [places[id(row.face_ND)] for row in rows]
        layers: Sequence[Any] = cache.layers
        for layer in layers:
            layer.keys, layer.values = layer.keys[own], layer.values[own]
        prefix, longest = len(self._prefix), max(len(row.prompt) for row in rows)
        padding = [longest - len(row.prompt) for row in rows]
        ids_RS = torch.tensor([[0] * left + list(row.prompt) for left, row in zip(padding, rows, strict=True)])
        real_RS = torch.arange(longest) >= torch.tensor(padding)[:, None]
        ids_RS, real_RS = ids_RS.to(self._device), real_RS.to(self._device)
        mask_RST = pad(real_RS[:, None] & self._causal(longest), (prefix, 0), value=True)
        position_RS = prefix + (real_RS.cumsum(1) - 1).clamp(min=0)
        states_RSD = self._states(self._embedded(ids_RS), mask_RST, position_RS, cache)
        self._write(rows, states_RSD[:, -1])
        batch = _Batch(rows, cache, pad(real_RS, (prefix, 0), value=True))
        batch.drop(lambda row: row.ended)
        return batch

    def _prefill_faces(self, tokens_FND: Tensor) -> DynamicCache:
        """The cache of the faces' prefixes."""
        faces, length = len(tokens_FND), len(self._prefix)
        embedded_FPD = self._embedded(self._prefix.expand(faces, length)).clone()
        embedded_FPD[:, self._image_P] = tokens_FND.to(embedded_FPD.dtype)
        cache = DynamicCache()
        position_FP = torch.arange(length, device=self._device).expand(faces, length)
        self._states(embedded_FPD, self._causal(length).expand(faces, length, length), position_FP, cache)
        return cache

    def _causal(self, length: int) -> Tensor:
        return torch.ones(length, length, dtype=torch.bool, device=self._device).tril()

    def _embedded(self, ids: Tensor) -> Tensor:
        return torch.as_tensor(self._model.get_input_embeddings()(ids))

    def _states(self, embedded: Tensor, mask_RST: Tensor, position_RS: Tensor, cache: DynamicCache) -> Tensor:
        """Last hidden states (R, S, D); the cache grows by S columns. `mask_RST`: the columns that a token sees."""
        found = self._model.model.language_model(
            inputs_embeds=embedded,
            attention_mask=as_taken(self._model, mask_RST[:, None], embedded.dtype),
            position_ids=position_RS,
            past_key_values=cache,
            use_cache=True,
        )
        return torch.as_tensor(found.last_hidden_state)

    def _write(self, rows: Sequence[Row], states_RD: Tensor) -> None:
        tokens = self._family.logits(self._model, states_RD).argmax(-1).tolist()
        for row, token in zip(rows, tokens, strict=True):
            row.written.append(token)
            row.ended = token in self._ends or len(row.written) >= self._longest
