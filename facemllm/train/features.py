"""What a frozen tower says of every face, computed once and kept on disk.

One file a block of faces, named by what decides its numbers: the tower's weights, the image processor, the table, the
rows, the precision. Blocks are computed in batches of a fixed size, so their bytes depend on no plan; each appears
whole or not at all, so a killed build goes on where it was. Ranks share the work.
Shapes: B faces, N image tokens, F width of the tower.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from facemllm.core import digests, progress
from facemllm.core.files import atomic_file
from facemllm.errors import UserError
from facemllm.model.families import Family
from facemllm.train.corpus import FaceDataset
from facemllm.train.pixels import kind_of
from facemllm.train.stage import StageRun

_BLOCK, _BATCH = 256, 32
_OPEN = 128  # each open block holds a descriptor, of which a process may have some 1000
_INCIDENTAL = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")


class Features:
    """Features by corpus row: `features[rows]` is a tensor (B, N, F). bfloat16 is kept as int16, its bits."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """`paths` are the blocks' files, in order; a few of them are open at a time."""
        self._paths = tuple(paths)
        self._block = lru_cache(_OPEN)(partial(np.load, mmap_mode="r"))

    def __getitem__(self, rows: NDArray[np.int64]) -> Tensor:
        found = np.stack([self._block(self._paths[row // _BLOCK])[row % _BLOCK] for row in rows.tolist()])
        tensor = torch.from_numpy(found)
        return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor


def with_features(run: StageRun, model: Any, family: Family, dataset: FaceDataset) -> FaceDataset:
    """The dataset with the features of a frozen tower (and of what else `Family.feature_parts` names), where the stage
    shows each face at least once, as it is. Raises UserError when the disk is full."""
    stage, images = run.stage, run.stage.steps * run.stage.batch_images
    frozen = all(getattr(stage.trains, part) == "frozen" for part in family.feature_parts)
    as_it_is = frozen and not stage.augment and images >= len(dataset.corpus)
    if not run.settings.train.feature_cache or run.cache is None or not as_it_is:
        return dataset
    folder = run.cache / name_of(run, model, family, dataset.corpus.pixel_row)
    wait = dist.barrier if run.world_size > 1 else lambda: None
    return replace(dataset, features=cached(folder, run, model, family, dataset, wait))


def name_of(run: StageRun, model: Any, family: Family, pixel_row: NDArray[np.int64]) -> str:
    """Name of the features' folder: a digest of all that decides them."""
    layer, strategy = "vision_feature_layer", "vision_feature_select_strategy"
    chosen = (getattr(model.config, layer, None), getattr(model.config, strategy, None))
    vision = family.tower(model).config
    # what the weights do not show, such as strides and activations; where it was loaded from changes nothing
    tower = {key: value for key, value in vision.to_dict().items() if key not in _INCIDENTAL}
    state = hashlib.sha256()
    module_of = family.module_of(model)
    weights = {key: value for key, value in model.state_dict().items() if module_of(key) in family.feature_parts}
    for key, tensor in sorted(weights.items()):
        state.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    images = family.processor.image_processor
    scale = (images.rescale_factor, images.image_mean, images.image_std)
    rows = digests.of_bytes(pixel_row.tobytes())
    kind = kind_of(family.prepared_by, *scale)
    table, attention = run.made_from.get("conversations", ""), vision._attn_implementation
    parts = [state.hexdigest(), tower, attention, chosen, kind, table, rows, run.precision, *family.processed_by]
    return f"features-{digests.of_json(parts)[:24]}"


def cached(
    folder: Path, run: StageRun, model: Any, family: Family, dataset: FaceDataset, wait: Callable[[], None]
) -> Features:
    """The features of a dataset's faces, from `folder` as far as they are there, computed where not. Each rank computes
    its own blocks, then they `wait` for one another; a block that does not load is computed again."""
    pixel_row = dataset.corpus.pixel_row
    paths = [folder / f"{number:06d}.npy" for number in range(-(-len(pixel_row) // _BLOCK))]
    device, bf16 = torch.device(run.device), run.precision == "bf16"
    family.tower(model).eval()

    def build(numbers: list[int]) -> None:
        with progress.bar("tower features", len(numbers)) as bar:
            for done, number in enumerate(numbers):
                rows = pixel_row[number * _BLOCK : (number + 1) * _BLOCK]
                parts = (dataset.pixels[rows[first : first + _BATCH]] for first in range(0, len(rows), _BATCH))
                block = np.concatenate([_computed(model, family, part, device, bf16) for part in parts])
                if done == 0:
                    _check_room(folder, block.nbytes * len(numbers))
                _write(paths[number], block)
                bar.update(done + 1, f"{min((done + 1) * _BLOCK, len(pixel_row))} faces")

    def missing(numbers: range) -> list[int]:
        return [n for n in numbers if not _whole(paths[n], min(_BLOCK, len(pixel_row) - n * _BLOCK))]

    build(missing(range(run.rank, len(paths), run.world_size)))
    wait()
    build(missing(range(len(paths))))  # of ranks that share no disk with ours
    return Features(paths)


@torch.no_grad()
def _computed(model: Any, family: Family, pixels: NDArray[np.uint8], device: torch.device, bf16: bool) -> NDArray[Any]:
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        features = family.features(model, family.inputs(torch.from_numpy(pixels).to(device))).cpu()
    return np.asarray((features.view(torch.int16) if features.dtype == torch.bfloat16 else features).numpy())


def _check_room(folder: Path, needed: int) -> None:
    """Raise UserError before hours of work that the disk cannot hold."""
    standing = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(standing).free
    if needed > free:
        raise UserError(
            f"tower features need {needed / 1e9:.1f} GB in {folder.parent}, where {free / 1e9:.1f} GB are free; "
            "free some space, or set train.feature_cache=false"
        )


def _whole(path: Path, faces: int) -> bool:
    """Whether a block is there with all its bytes: a machine that lost power may have kept the name and not those."""
    try:
        return len(np.load(path, mmap_mode="r")) == faces
    except (OSError, ValueError, EOFError):
        return False


def _write(path: Path, block: NDArray[Any]) -> None:
    try:
        with atomic_file(path, tidy=True) as unfinished, unfinished.open("wb") as file:
            np.save(file, block)
    except OSError as error:
        raise UserError(
            f"cannot write tower features to {path.parent}: {error.strerror or error}; "
            "free some space, or set train.feature_cache=false"
        ) from error
