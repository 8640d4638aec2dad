"""Step `ingest`: a source becomes a `faces` table. Here the source is the renderer of synthetic heads.

Identities are spread over processes and written in their order, so neither the number of processes nor their speed
shows in the bytes. The split is a stable hash of the subject: adding identities moves nobody.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from facemllm import digests, progress
from facemllm.errors import UserError
from facemllm.machine import cores, die_with_parent
from facemllm.records import FACES, TableWriter, pairs, subject_id
from facemllm.settings import Settings

CHUNK = 10


def ingest(settings: Settings, out: Path) -> Mapping[str, Any]:
    """Write the `faces` table of the configured source to `out` and return its manifest.

    Raises UserError when the source is unknown.
    """
    if settings.data.source != "render":
        raise UserError(f"data.source: no reader for '{settings.data.source}' yet; 'render' draws synthetic heads")
    return render_faces(settings, out)


def render_faces(settings: Settings, out: Path) -> Mapping[str, Any]:
    """Draw `data.identities` synthetic heads, `data.images_per_identity` pictures of each, as a `faces` table."""
    data = settings.data
    total = data.identities * data.images_per_identity
    about = {"source": "render", "seed": settings.seed}
    with (
        TableWriter(out, FACES, about=about, shard_mb=data.shard_mb) as table,
        progress.bar("rendering heads", total) as bar,
    ):
        done = 0
        for rows in _rendered(settings):
            table.write(face_row(row, settings) for row in rows)
            done += len(rows)
            bar.update(done, f"{done} of {total} heads")
    return table.manifest


def face_row(row: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """A rendered head as a row of `faces`: image named by its bytes, subject hashed, split drawn, provenance noted."""
    values = dict(row)
    subject = subject_id(values["source"], values.pop("subject"))
    image: bytes = values.pop("image")
    labels = ("attributes", "expression", "age", "gender", "skin_tone", "yaw", "pitch", "roll", "segmentation")
    return values | {
        "image_id": digests.of_bytes(image),
        "image": {"bytes": image, "path": None},
        "segmentation": {"bytes": values["segmentation"], "path": None},
        "subject_id": subject,
        "split": split_of(subject, settings.data.validation_share, settings.data.test_share),
        "attributes": pairs(values["attributes"]),
        "provenance": [
            {"field": f, "origin": "renderer", "model_digest": None, "prompt_hash": None, "time": None, "cost": 0.0}
            for f in labels
        ],
    }


def split_of(subject: str, validation_share: float, test_share: float) -> str:
    """The split a subject belongs to: a stable hash against the shares, so that one person is in one split only."""
    point = int.from_bytes(hashlib.sha256(f"split:{subject}".encode()).digest()[:8]) / 2**64
    if point < test_share:
        return "test"
    return "validation" if point < test_share + validation_share else "train"


def _rendered(settings: Settings) -> Iterator[list[dict[str, Any]]]:
    data = settings.data
    jobs = (
        (settings.seed, range(start, min(start + CHUNK, data.identities)), data.images_per_identity, data.image_size)
        for start in range(0, data.identities, CHUNK)
    )
    workers = data.workers or cores()
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=die_with_parent) as pool:
        # a bounded window keeps memory flat: results wait in order, but never more than a few chunks of them
        window = [pool.submit(_render_chunk, *job) for job in islice(jobs, workers * 3)]
        try:
            while window:
                yield window.pop(0).result()
                window += [pool.submit(_render_chunk, *job) for job in islice(jobs, 1)]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _render_chunk(seed: int, identities: range, images: int, size: int) -> list[dict[str, Any]]:
    from facemllm.sources.render import render_identity

    return [row for identity in identities for row in render_identity(seed, identity, images, size)]
