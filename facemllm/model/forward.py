"""The forward pass in two halves: image tokens once, then the language model over packed rows.

Shapes: B rows, N prefix tokens, T tokens after it, L = N + T, D width, F tower's width, V vocabulary, K picked
positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from facemllm.model.face_mllm import FaceMllmModel, VisualTokens
from facemllm.model.masks import as_taken, tree_mask, with_prefix


def tower_features(model: Any, pixel_values: Tensor) -> Tensor:
    """What the tower says of normalised pixels (B, 3, S, S): its selected layers, (B, N, F), before the projector."""
    outputs = model.model.vision_tower(pixel_values, output_hidden_states=True, return_dict=True)
    chosen = model.config.vision_feature_layer
    layers = [outputs.hidden_states[layer] for layer in ([chosen] if isinstance(chosen, int) else chosen)]
    if model.config.vision_feature_select_strategy == "default":
        layers = [layer[:, 1:] for layer in layers]
    return torch.cat(layers, dim=-1)


def visual_tokens(model: Any, features_BNF: Tensor, segmentation_BSS: Tensor | None = None) -> VisualTokens:
    """From tower features, and maps of face parts where the model takes them, to what the language model sees."""
    image_BND = model.model.multi_modal_projector(features_BNF)
    if isinstance(model.model, FaceMllmModel):
        return model.model.join(image_BND, segmentation_BSS)
    return VisualTokens(image_BND, (image_BND,), None)


def image_tokens(model: Any, pixel_values: Tensor, segmentation: Tensor | None = None) -> Tensor:
    """Normalised pixels (B, 3, S, S), and maps (B, S, S) where the model takes them, to a face's tokens (B, N, D)."""
    options = {"segmentation": segmentation} if isinstance(model.model, FaceMllmModel) else {}
    features = model.get_image_features(pixel_values=pixel_values, return_dict=True, **options).pooler_output
    return features if isinstance(features, Tensor) else torch.stack(list(features))


def prefix_embeddings(model: Any, image_BND: Tensor, prefix_ids: Sequence[int]) -> Tensor:
    """Embeddings of the prefix (B, N, D): its text, with the image tokens in their places."""
    ids_N = torch.tensor(prefix_ids, device=image_BND.device)
    place_N = ids_N == model.config.image_token_id
    if bool(place_N.all()):
        return image_BND
    text_ND = model.get_input_embeddings()(ids_N).to(image_BND.dtype)
    rows_BND = text_ND.repeat(len(image_BND), 1, 1)
    rows_BND[:, place_N] = image_BND
    return rows_BND


def hidden_states(
    model: Any, prefix_BND: Tensor, ids_BT: Tensor, block_BT: Tensor, branch_BT: Tensor | None, position_BT: Tensor
) -> Tensor:
    """Last hidden states of the tokens after the prefix (B, T, D), under the tree mask."""
    prefix = prefix_BND.shape[1]
    text_BTD = model.get_input_embeddings()(ids_BT).to(prefix_BND.dtype)
    states_BLD = model.model.language_model(
        inputs_embeds=torch.cat([prefix_BND, text_BTD], dim=1),
        attention_mask=as_taken(model, tree_mask(block_BT, branch_BT, prefix), text_BTD.dtype),
        position_ids=with_prefix(position_BT, prefix),
        use_cache=False,
    ).last_hidden_state
    return states_BLD[:, prefix:]


def word_logits(model: Any, states_KD: Tensor) -> Tensor:
    """Logits over the vocabulary (K, V), float32, for the picked states only."""
    return model.get_output_embeddings()(states_KD).float()
