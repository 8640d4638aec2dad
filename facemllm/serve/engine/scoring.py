"""The language model's pass over closed questions, with what scoring does not need left out.

`Family.packed` computes every token in every layer. The last layer's output is needed at the few tokens that
predict an option alone: there, of all other tokens only keys and values are computed. Rotations are looked up, not
computed, and all rows of a pass are read at once. Answers differ from `Predictor.score_rows` in rounding alone; `of`
makes sure of it.

Shapes: B rows, L tokens of a row, P predicting tokens of a row, K scored positions of all rows, D width, H heads, E
width of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaModel, Qwen2Model

from facemllm.model.forward import PADDING, Layout, row_mask
from facemllm.model.inference import Predictor, Query, Scored, read_scores

_LAYERS = (Qwen2Model, LlamaModel)  # whose layers are computed as `_Pass` does
_ROTATIONS = ("default", "linear", "llama3")  # which depend on a token's position alone
_POSITIONS = 2048
_CLOSE = 1e-4  # of probabilities


class Scoring:
    """Scores rows as `Predictor.score_rows` does. Made by `of`."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor, self._decoder = predictor, predictor.model.model.language_model
        cos, sin = self._decoder.rotary_emb(torch.zeros(1), torch.arange(_POSITIONS)[None])
        self._cos_TE, half = cos[0], sin.shape[-1] // 2
        self._sin_TE = torch.cat((-sin[0, :, :half], sin[0, :, half:]), -1)  # for halves that change places

    @classmethod
    def of(cls, predictor: Predictor, tokens_BND: Tensor, query: Query) -> Scoring | None:
        """The pass for a predictor's model, if it takes it, and answers a question about encoded faces as it should."""
        decoder = getattr(predictor.model.model, "language_model", None)
        config = predictor.model.config.get_text_config()
        rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
        if (
            type(decoder) not in _LAYERS
            or predictor.model.dtype != torch.float32
            or config._attn_implementation != "sdpa"
            or rotation not in _ROTATIONS
            or set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}
        ):
            return None
        made, rows = cls(predictor), predictor.passes([query]) * len(tokens_BND)
        found, expected = made.score_rows(tokens_BND, rows), predictor.score_rows(tokens_BND, rows)
        both = zip(_probabilities(found), _probabilities(expected), strict=True)
        return made if all(abs(one - other) < _CLOSE for one, other in both) else None

    @torch.inference_mode()
    def score_rows(self, tokens_BND: Tensor, layouts: Sequence[Layout]) -> list[list[Scored]]:
        """The queries of rows, each about the face whose tokens stand at its place in `tokens_BND`."""
        lengths = [len(layout.ids) for layout in layouts]
        if max(lengths) > _POSITIONS:
            return self._predictor.score_rows(tokens_BND, layouts)
        read = [np.unique(layout.at, return_inverse=True) for layout in layouts]
        places = [places for places, _ in read]
        states_BPD = self._states(tokens_BND, layouts, lengths, _padded(places))
        most = states_BPD.shape[1]
        logits_PV = self._predictor.family.logits(self._predictor.model, states_BPD.flatten(0, 1))
        row_K = np.concatenate([row * most + place for row, (_, place) in enumerate(read)])
        token_K = np.concatenate([layout.token for layout in layouts])
        index_K = torch.from_numpy(row_K)
        likelihood_K = logits_PV.log_softmax(-1)[index_K, torch.from_numpy(token_K)].double().numpy()
        expected_K = logits_PV.numpy().argmax(-1)[row_K] == token_K
        ends = np.cumsum([len(layout.at) for layout in layouts])[:-1]
        parts = zip(np.split(likelihood_K, ends), np.split(expected_K, ends), layouts, strict=True)
        return [read_scores(likelihood, expected, layout) for likelihood, expected, layout in parts]

    def _states(
        self, tokens_BND: Tensor, layouts: Sequence[Layout], lengths: Sequence[int], place_BP: NDArray[np.int64]
    ) -> Tensor:
        """Last hidden states of the tokens at `place_BP`, (B, P, D)."""
        decoder = self._decoder
        if all(layout is layouts[0] for layout in layouts):  # many ask the same
            layouts = layouts[:1]
        ids_BL, block_BL, branch_BL, position_BL = (
            torch.from_numpy(_padded([getattr(layout, name) for layout in layouts]))
            for name in ("ids", "block", "branch", "position")
        )
        inside = np.arange(ids_BL.shape[1]) < np.array(lengths[: len(layouts)])[:, None]
        mask_BLL = row_mask(torch.from_numpy(np.where(inside, 0, PADDING)), block_BL, branch_BL)
        rotation = self._cos_TE[position_BL][:, :, None], self._sin_TE[position_BL][:, :, None]
        x_BLD = decoder.embed_tokens(ids_BL).expand(len(tokens_BND), -1, -1).clone()
        x_BLD[:, self._predictor.image_places] = tokens_BND
        mask = torch.zeros(mask_BLL.shape).masked_fill_(~mask_BLL, float("-inf"))
        place_BP1 = torch.from_numpy(place_BP)[..., None]
        for layer in decoder.layers[:-1]:
            x_BLD = _layer(layer, x_BLD, x_BLD, rotation, rotation, mask)
        picked = x_BLD.gather(1, place_BP1.expand(-1, -1, x_BLD.shape[-1]))
        own = place_BP1[: len(layouts)]
        turned = tuple(one.gather(1, own[..., None].expand(-1, -1, 1, one.shape[-1])) for one in rotation)
        picked_mask = mask.gather(2, own[:, None].expand(-1, 1, -1, mask.shape[-1]))
        return torch.as_tensor(decoder.norm(_layer(decoder.layers[-1], picked, x_BLD, turned, rotation, picked_mask)))


def _layer(
    layer: Any, own_BPD: Tensor, all_BLD: Tensor, own: Sequence[Tensor], rotation: Sequence[Tensor], mask: Tensor
) -> Tensor:
    """A decoder layer's output at some of its tokens, which see all as the mask lets them."""
    attention = layer.self_attn
    heads = (len(all_BLD), -1, attention.head_dim)

    def projected(by: Any, x_BLD: Tensor) -> Tensor:
        return torch.as_tensor(by(x_BLD)).view(*x_BLD.shape[:2], *heads[1:])

    normed_BLD = layer.input_layernorm(all_BLD)
    query_source = normed_BLD if own_BPD is all_BLD else layer.input_layernorm(own_BPD)
    key = _turned(projected(attention.k_proj, normed_BLD), *rotation).transpose(1, 2)
    value = projected(attention.v_proj, normed_BLD).transpose(1, 2)
    query = _turned(projected(attention.q_proj, query_source), *own).transpose(1, 2)
    grouped = attention.num_key_value_groups > 1
    looked = scaled_dot_product_attention(query, key, value, mask, scale=attention.scaling, enable_gqa=grouped)
    x_BPD = own_BPD + attention.o_proj(looked.transpose(1, 2).flatten(2))
    return x_BPD + layer.mlp(layer.post_attention_layernorm(x_BPD))


def _turned(x_BLHE: Tensor, cos_BL1E: Tensor, sin_BL1E: Tensor) -> Tensor:
    """Rotary position embedding."""
    return torch.addcmul(x_BLHE * cos_BL1E, x_BLHE.roll(x_BLHE.shape[-1] // 2, -1), sin_BL1E)


def _padded(rows: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    padded = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = row
    return padded


def _probabilities(rows: Sequence[Sequence[Scored]]) -> list[float]:
    return [probability for row in rows for scored in row for probability in scored.probabilities]
