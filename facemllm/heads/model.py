"""The parametric head: the baked asset, morphs to a mesh, landmarks, pose.

Axes of a head: x to the subject's left (image right on a frontal face), y up, z out of the face; lengths in MakeHuman
decimetres. N vertices, T triangles.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property, lru_cache
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facemllm.heads import raster
from facemllm.heads.raster import Floats, Ints

Indices = NDArray[np.int64]

HEAD_FLOOR = 6.2
"""Rest height (dm) above which the body counts as head when a picture is framed."""

SKULL_FLOOR = 6.6
"""Rest height (dm) above which a head's vertices place it on its neck."""

# The hairline's rest height (dm) by angle (degrees) around the head, from the middle of the forehead to the nape.
HAIRLINE_ANGLE = (0, 28, 42, 55, 68, 80, 95, 120, 150, 180)
HAIRLINE_HEIGHT = (8.02, 7.99, 7.86, 7.55, 7.25, 6.98, 7.02, 6.85, 6.66, 6.6)
HEAD_AXIS_Z = 0.38  # z (dm) of the vertical axis those angles turn around


class Part(IntEnum):
    """What a triangle belongs to. The first six come from the asset, the others are built by `accessories`."""

    BODY = 0
    LEFT_EYE = 1
    RIGHT_EYE = 2
    LASHES = 3
    TEETH = 4
    TONGUE = 5
    HAIR = 6
    FRAME = 7
    DARK_LENS = 8
    CLEAR_LENS = 9
    HAT = 10
    EARRING = 11


def smoothstep(x: NDArray[Any], start: float, end: float) -> NDArray[Any]:
    """0 at `start`, 1 at `end`, smooth between and constant beyond; `start` may lie above `end`."""
    t = np.clip((x - start) * (1 / (end - start)), 0, 1)
    return t * t * (3 - 2 * t)


def bell(x: NDArray[Any], width: float) -> NDArray[Any]:
    """Gaussian bump of height 1 at 0 with standard deviation `width`."""
    return np.exp(x * x * (-0.5 / width**2))


@dataclass(frozen=True)
class HeadModel:
    """The baked arrays (see `tools/bake_head.py`) and what follows from the rest shape alone."""

    vertices: Floats  # (N, 3) rest positions; also the coordinates in which skin is painted
    triangles: Ints  # (T, 3)
    part: NDArray[np.int8]  # (T,) of `Part`
    lips: Floats  # (N,) 0..1
    ears: Floats  # (N,) 0..1
    mouth_interior: Floats  # (N,) 0..1
    target_names: tuple[str, ...]
    target_start: Ints  # (targets + 1,)
    target_vertex: NDArray[np.uint16]
    target_delta: Floats  # (.., 3)

    @cached_property
    def target_number(self) -> dict[str, int]:
        """Morph target name to its row."""
        return {name: number for number, name in enumerate(self.target_names)}

    @cached_property
    def body_triangles(self) -> Ints:
        """The triangles of skin and torso (T', 3)."""
        return np.ascontiguousarray(self.triangles[self.part == Part.BODY])

    @cached_property
    def on_body(self) -> NDArray[np.bool_]:
        """Vertices (N,) of skin and torso."""
        return self._used_by(Part.BODY)

    @cached_property
    def eyes(self) -> tuple[Indices, Indices]:
        """Vertex numbers of the subject's left and right eyeball."""
        return (np.flatnonzero(self._used_by(Part.LEFT_EYE)), np.flatnonzero(self._used_by(Part.RIGHT_EYE)))

    @cached_property
    def eye_fronts(self) -> tuple[int, int]:
        """The foremost vertex of the left and right eyeball at rest: the pupil of a straight gaze."""
        left, right = (int(eye[self.vertices[eye, 2].argmax()]) for eye in self.eyes)
        return left, right

    @cached_property
    def head(self) -> Indices:
        """Vertex numbers of the head without the neck."""
        return np.flatnonzero(self.on_body & (self.vertices[:, 1] > HEAD_FLOOR))

    @cached_property
    def skull(self) -> Indices:
        """Vertex numbers of the head from the lips upward."""
        return self.head[self.vertices[self.head, 1] > SKULL_FLOOR]

    @cached_property
    def skull_centre(self) -> Floats:
        """Mean (3,) of the skull's vertices at rest."""
        return self.vertices[self.skull].mean(axis=0)

    @cached_property
    def nose_tip(self) -> int:
        """The foremost vertex on the middle line of the face."""
        middle = self.head[np.abs(self.vertices[self.head, 0]) < 0.02]
        return int(middle[self.vertices[middle, 2].argmax()])

    @cached_property
    def mouth_corners(self) -> tuple[int, int]:
        """The outermost lip vertices on the subject's left and right."""
        lips = np.flatnonzero(self.lips > 0.5)
        return int(lips[self.vertices[lips, 0].argmax()]), int(lips[self.vertices[lips, 0].argmin()])

    @cached_property
    def lip_opening(self) -> dict[str, float]:
        """How far (dm) each expression unit at weight 1 opens the lips in their middle; negative where it shuts them.

        Measured between the two lip vertices that face each other at rest: the lowest that an opening jaw leaves behind
        and the highest that it takes along.
        """
        units = [name for name in self.target_names if name.startswith("units/")]
        rise = {name: (self.morph(self.vertices, {name: 1.0}) - self.vertices)[:, 1] for name in units}
        middle = np.flatnonzero((self.lips > 0.5) & (np.abs(self.vertices[:, 0]) < 0.02))
        taken = rise["units/jawOpen"][middle] < rise["units/jawOpen"][middle].min() / 2
        above, below = middle[~taken], middle[taken]
        upper, lower = above[self.vertices[above, 1].argmin()], below[self.vertices[below, 1].argmax()]
        return {name: float(values[upper] - values[lower]) for name, values in rise.items()}

    @cached_property
    def above_hairline(self) -> Floats:
        """Rest height (N,) of each vertex above the hairline (negative below)."""
        angle = np.degrees(np.arctan2(np.abs(self.vertices[:, 0]), self.vertices[:, 2] - HEAD_AXIS_Z))
        hairline = np.interp(angle, HAIRLINE_ANGLE, HAIRLINE_HEIGHT)
        return (self.vertices[:, 1] - hairline).astype(np.float32)

    @cached_property
    def frontness(self) -> Floats:
        """1 in the middle of the face falling to 0 at its sides (N,): where bangs lower the hairline."""
        angle = np.arctan2(np.abs(self.vertices[:, 0]), self.vertices[:, 2] - HEAD_AXIS_Z)
        return bell(angle, 0.55)

    @cached_property
    def bend(self) -> Floats:
        """How far each vertex (N,) follows the head's rotation: 1 on the head, 0 on the shoulders."""
        return smoothstep(self.vertices[:, 1], 5.0, 6.5)

    @cached_property
    def opposed_targets(self) -> dict[str, tuple[list[str], list[str]]]:
        """Shape details as an axis: name to the targets of its plus and its minus end (left and right together)."""
        ends = (
            *(("incr", "decr"), ("up", "down"), ("out", "in"), ("forward", "backward")),
            *(("convex", "concave"), ("uncompress", "compress")),
        )
        axes: dict[str, tuple[list[str], list[str]]] = {}
        for name in self.target_names:
            folder, detail = name.split("/")
            if folder in ("macrodetails", "units") or (folder == "head" and "trans" in detail):
                continue
            detail = detail.removeprefix("l-").removeprefix("r-")
            for plus, minus in ends:
                for side, suffix in enumerate((f"-{plus}", f"-{minus}")):
                    if detail.endswith(suffix):
                        axis = f"{folder}/{detail.removesuffix(suffix)}"
                        axes.setdefault(axis, ([], []))[side].append(name)
        return {axis: both for axis, both in axes.items() if both[0] and both[1]}

    def _used_by(self, part: Part) -> NDArray[np.bool_]:
        used = np.zeros(len(self.vertices), bool)
        used[self.triangles[self.part == part]] = True
        return used

    def morph(self, vertices: Floats, weights: Mapping[str, float]) -> Floats:
        """A copy of `vertices` (N, 3) with the named morph targets added."""
        used = {name: weight for name, weight in weights.items() if weight}
        moved = vertices.copy()
        raster.add_targets(
            moved,
            np.array([self.target_number[name] for name in used], np.int32),
            np.array(list(used.values()), np.float32),
            self.target_start,
            self.target_vertex,
            self.target_delta,
        )
        return moved


@lru_cache(maxsize=1)
def load_head_model() -> HeadModel:
    """The head model in `assets/head.npz`, read once a process."""
    with (files("facemllm.heads") / "assets" / "head.npz").open("rb") as file, np.load(file) as arrays:
        found: dict[str, Any] = dict(arrays)
    found["target_names"] = tuple(map(str, found["target_names"]))
    found["target_delta"] = found["target_delta"].astype(np.float32)
    return HeadModel(**found)


def rotate(points: Floats, rotation: NDArray[np.float64], pivot: Floats) -> Floats:
    """Points (N, 3) turned by a 3x3 rotation around `pivot` (3,)."""
    return raster.transform(points, rotation.astype(np.float32), pivot)


def head_rotation(yaw: float, pitch: float, roll: float) -> NDArray[np.float64]:
    """Rotation (3, 3) of a head with the given angles in degrees, in the convention of 300W-LP's Pose_Para.

    R = Rx(pitch) Ry(yaw) Rz(roll) with the sign of 3DDFA's matrices, acting on columns with x to image right, y up and
    z towards the camera. So yaw > 0 points the nose to the image's left, pitch > 0 points it up, and roll > 0 turns the
    head clockwise in the image.
    """
    y, p, r = np.radians([yaw, pitch, roll])
    about_x = np.array([[1, 0, 0], [0, np.cos(p), np.sin(p)], [0, -np.sin(p), np.cos(p)]])
    about_y = np.array([[np.cos(y), 0, -np.sin(y)], [0, 1, 0], [np.sin(y), 0, np.cos(y)]])
    about_z = np.array([[np.cos(r), np.sin(r), 0], [-np.sin(r), np.cos(r), 0], [0, 0, 1]])
    return about_x @ about_y @ about_z
