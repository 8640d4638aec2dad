"""Faces for a person to look at before deciding: those about which candidate and champion differ most.

Pictures lie beside a bundle for ever, and a person may ask to be forgotten. So only faces of sources in which nobody is
depicted are shown, and what was answered about others is given only where the ledger lets pictures go to third parties.
"""

from __future__ import annotations

import heapq
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from facemllm.core import digests
from facemllm.core.images import opened
from facemllm.promote.evidence import PREDICTED
from facemllm.scoring.consistency import same
from facemllm.scoring.sheet import Sheet, read_parsed, read_sheet
from facemllm.settings import Settings
from facemllm.tables import CONVERSATIONS, PREDICTIONS, open_table
from facemllm.version import ledger

MOST = 12
PIXELS = 128
DRAWN = "render"
"""Ledger key of the source whose faces are nobody's."""

Answers = Sequence[str | None]


def collect(
    settings: Settings, conversations: Path, split: str, candidate: Path, champion: Path | None
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """At most a dozen faces as data, and small JPEGs by file name.

    `candidate` and `champion` are evaluation folders. The faces are those with the most answers that differ (without a
    champion: the most wrong ones), of sources that the ledger allows; `withheld` counts the faces left out for that.
    """
    table = open_table(conversations, CONVERSATIONS)
    sheet = read_sheet(table, split)
    mine = _parsed(candidate, sheet)
    theirs = None if champion is None else _parsed(champion, sheet)
    rivals: Answers = sheet.answers if theirs is None else theirs
    differing: dict[str, list[dict[str, Any]]] = {}
    for (task, item), rows in sheet.rows.items():
        question = sheet.questions[task, item]
        for row in rows if question.options else ():
            if not same(question, mine[row], rivals[row]) and (mine[row], rivals[row]) != (None, None):
                entry = {"task": task, "item": item, "label": sheet.answers[row], "candidate": mine[row]}
                entry |= {"champion": theirs[row]} if theirs is not None else {}
                differing.setdefault(sheet.images[sheet.faces[row]], []).append(entry)
    rows_of = table.iterate(["image_id", "source"], split)
    sources = {str(face["image_id"]): str(face["source"]) for face in rows_of}
    entries = ledger.entries(settings)
    open_to = {key for key, entry in entries.items() if "third_party" in entry.uses and entry.status == "active"}
    shown = [name for name in differing if sources[name] in open_to]
    chosen = heapq.nsmallest(MOST, shown, key=lambda name: (-len(differing[name]), name))
    pictures = _pictures(table, split, [name for name in chosen if sources[name] == DRAWN])
    files = {f"samples/{place:02d}.jpg": pictures[name] for place, name in enumerate(chosen) if name in pictures}
    by_name = {name: f"samples/{place:02d}.jpg" for place, name in enumerate(chosen) if name in pictures}
    faces = [
        {
            "image_id": name,
            "source": sources[name],
            "file": by_name.get(name),
            "sha256": digests.of_bytes(pictures[name]) if name in pictures else None,
            "differing": len(differing[name]),
            "answers": differing[name][:MOST],
        }
        for name in chosen
    ]
    against = "labels" if theirs is None else "champion"
    return {"against": against, "faces": faces, "withheld": len(differing) - len(shown)}, files


def _parsed(folder: Path, sheet: Sheet) -> Answers:
    return read_parsed(open_table(folder / PREDICTED, PREDICTIONS), sheet)


def _pictures(table: Any, split: str, chosen: Sequence[str]) -> Mapping[str, bytes]:
    found: dict[str, bytes] = {}
    wanted = set(chosen)
    for face in table.iterate(["image_id", "images"], split) if wanted else ():
        if face["image_id"] in wanted:
            picture = opened(face["images"][0]["bytes"]).convert("RGB")
            picture.thumbnail((PIXELS, PIXELS), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=85)
            found[str(face["image_id"])] = buffer.getvalue()
    return found
