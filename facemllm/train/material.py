"""What a rank trains from: model and processor, the turns of the training split, pixels, maps and labels.

The same for every launcher. Decoded pictures are cached on disk by the rank that comes first, the others read them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facemllm.errors import UserError
from facemllm.knowledge.graph import (
    UNKNOWN,
    Characteristics,
    characteristics,
    cooccurrence,
    correlation_matrix,
    relations_of,
)
from facemllm.knowledge.penalties import audit, enforced
from facemllm.knowledge.relations import Relation
from facemllm.model.branches import Graph, asked, branches_of, extend
from facemllm.model.face_mllm import FaceMllmForConditionalGeneration
from facemllm.model.loading import load_model
from facemllm.model.parts import load_base
from facemllm.model.prompts import Frame
from facemllm.model.tiny import build_tiny
from facemllm.settings import Settings
from facemllm.tables import Table
from facemllm.tasks.held_out import withheld_of
from facemllm.train.batches import Faces
from facemllm.train.data import Corpus, map_cache, pixel_cache, read_turns, tokenise, vocabulary_texts
from facemllm.train.differences import differences


@dataclass(frozen=True)
class Material:
    """Model, processor, and what a stage shows them."""

    model: Any
    processor: Any
    corpus: Corpus
    faces: Faces


def prepare(
    settings: Settings,
    table: Table,
    base: Path | None,
    cache: Path,
    wait: Callable[[], None] = lambda: None,
) -> Material:
    """Load or build the model and read the training split of a conversations table.

    `base` is the previous stage's model directory, None for the first stage: the preset or checkpoint of the settings.
    `wait` is called when this rank has its caches. Raises UserError, also when a model that has branches, or comes of
    an earlier stage, has others than the settings ask for.
    """
    turns = read_turns(table, "train")
    knows = settings.model.knowledge
    known = characteristics(knows.tasks, turns) if knows.enabled else None
    withheld = withheld_of(settings)
    if base is not None:
        model, processor = load_model(base)
    elif settings.model.preset == "tiny":
        model, processor = build_tiny(settings.model, *vocabulary_texts(turns), settings.seed)
    else:
        model, processor = load_base(settings.model, settings.seed)
    if base is not None or isinstance(model, FaceMllmForConditionalGeneration):
        _check_branches(model, processor, settings, withheld, str(base or settings.model.base))
    else:
        model, processor = extend(model, processor, settings.model, _graph(known, settings), withheld, settings.seed)
    readers = [lambda: pixel_cache(table, processor.image_processor, cache, settings.ingest.workers)]
    if getattr(model.config, "segmentation_config", None) is not None:
        readers.append(lambda: map_cache(table, processor, cache, settings.ingest.workers))
    pixels, *maps = (read() for read in readers)
    wait()
    labels: NDArray[np.int8] | None = None
    relations: tuple[Relation, ...] = ()
    if known is not None and getattr(model.config, "knowledge_config", None) is not None:
        labels = _in_order(known, model.model.knowledge.names)
        relations = tuple(enforced(audit(relations_of(knows.tasks, known.nodes), known), knows.audit))
    faces = Faces(pixels, maps[0] if maps else None, labels, relations)
    return Material(model, processor, tokenise(turns, Frame.of(model, processor)), faces)


def _check_branches(model: Any, processor: Any, settings: Settings, withheld: Sequence[int], name: str) -> None:
    """Raise UserError unless a model has the branches that the settings ask for."""
    has, wanted = branches_of(model, processor), asked(settings.model, withheld)
    both = has.keys() & wanted.keys()  # what a branch is like is no difference where there is none
    if any(has[key] != wanted[key] for key in both):
        told = differences({key: has[key] for key in both}, {key: wanted[key] for key in both})
        raise UserError(
            f"the model {name} has other branches than the settings ask for ({told}); set them as the model has them, "
            "or train from the first stage with these (a checkpoint without branches gets them as model.base)"
        )


def _graph(known: Characteristics | None, settings: Settings) -> Graph | None:
    if known is None:
        return None
    knows = settings.model.knowledge
    matrix_AA = correlation_matrix(*cooccurrence(known.labels_RN), knows.tau, knows.omega)
    return Graph(known.names, tuple(node.words for node in known.nodes), matrix_AA)


def _in_order(known: Characteristics, names: Sequence[str]) -> NDArray[np.int8]:
    """Labels in the order of the model's names; one that this table does not tell is unknown."""
    labels_RA = np.full((len(known.labels_RN), len(names)), UNKNOWN, np.int8)
    for place, name in enumerate(names):
        if name in known.names:
            labels_RA[:, place] = known.labels_RN[:, known.names.index(name)]
    return labels_RA
