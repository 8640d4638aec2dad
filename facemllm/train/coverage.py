"""What a table leaves the branches without: a branch that learns nothing is refused, one that learns little is told."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from facemllm.errors import UserError
from facemllm.knowledge.graph import UNKNOWN
from facemllm.model.segmentation import NO_MAP
from facemllm.settings import Stage
from facemllm.train.batches import Faces

FEW = 0.01
"""A smaller share of faces with a map is told."""


def shortfalls(name: str, stage: Stage, faces: Faces, pixel_row: NDArray[np.integer[Any]]) -> dict[str, float]:
    """What there is too little of in the training faces, the rows `pixel_row` of the pixels; empty if nothing is.

    `faces_with_map`: their share, below `FEW`; `characteristics_untold`: how many characteristics of the model no face
    is known to have or to lack. Raises UserError when a branch that the stage `name` trains would learn nothing.
    """
    found: dict[str, float] = {}
    if faces.maps is not None:
        share = float((faces.maps[pixel_row, 0, 0] != NO_MAP).mean())
        if share == 0 and stage.trains.segmentation == "full":
            raise UserError(
                f"model.segmentation would learn nothing in stage {name}: no training face has a map of its parts "
                f"(column segmentation); set model.segmentation.mode: none, take a source that has maps, or go on from "
                f"a trained one with train.stages.{name}.trains.segmentation: frozen"
            )
        if share < FEW:
            found["faces_with_map"] = share
    if faces.labels is not None:
        untold = int((faces.labels == UNKNOWN).all(0).sum())
        if untold == faces.labels.shape[1] and stage.trains.knowledge == "full":
            raise UserError(
                f"model.knowledge would learn nothing in stage {name}: the training split tells none of the model's "
                f"{untold} characteristics; name the tasks it was first trained with in model.knowledge.tasks and "
                f"reformat.tasks, or set train.stages.{name}.trains.knowledge: frozen"
            )
        if untold:
            found["characteristics_untold"] = float(untold)
    return found


def in_words(found: dict[str, float]) -> str:
    """The shortfalls as a note behind the loss; nothing if there is none."""
    words = ""
    if "faces_with_map" in found:
        words += f", maps of {found['faces_with_map']:.2%} of the faces only"
    if "characteristics_untold" in found:
        words += f", {found['characteristics_untold']:.0f} characteristics untold"
    return words
