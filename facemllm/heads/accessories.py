"""Geometry that is put on a head: hair, hat, glasses, earrings; and the whole mesh of one picture.

Every builder takes the shaped head (vertices, normals) and returns `Piece`s in the head's own axes (see `model`),
before the head is turned. Lengths in decimetres.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from facemllm.heads import raster
from facemllm.heads.model import HEAD_AXIS_Z, HeadModel, Indices, Part, load_head_model, smoothstep
from facemllm.heads.raster import Floats, Ints
from facemllm.heads.sampling import Appearance

BANGS_DROP = 0.42
"""How far (dm) bangs lower the hairline in the middle of the forehead."""

# Thickness (dm) of the hair on the crown and at the sides.
HAIR_THICKNESS = {
    "Buzz_Cut": (0.03, 0.02),
    "Short_Hair": (0.26, 0.10),
    "Medium_Hair": (0.30, 0.20),
    "Long_Hair": (0.28, 0.16),
    "Hair_Bun": (0.12, 0.07),
}
HAIR_END = {"Medium_Hair": 6.0, "Long_Hair": 4.6}  # height (dm) where falling hair ends
CLOTH_TOP = 5.3  # height (dm) below which the torso is swollen a little: clothes
CLOTH_THICKNESS = 0.05
CROWN = 8.0  # height (dm) above which vertices follow the skull's size


@dataclass(frozen=True)
class Piece:
    """Some triangles of one part."""

    part: Part
    vertices: Floats  # (n, 3)
    triangles: Ints  # (t, 3), counted from the piece's first vertex
    rest: Floats | None = None  # (n, 3) where the texture is looked up; the vertices themselves when None
    bend: Floats | None = None  # (n,) how far a vertex follows the head, 0..1; entirely when None


@dataclass(frozen=True)
class Mesh:
    """A head with all it wears, facing the camera.

    The first vertices and triangles are those of the head model, in its order; see-through triangles come last.
    """

    vertices: Floats  # (N, 3)
    rest: Floats  # (N, 3)
    bend: Floats  # (N,)
    triangles: Ints  # (T, 3)
    part: NDArray[np.int8]  # (T,)
    opaque: int  # how many of the triangles, from the first, hide what is behind them


@lru_cache(maxsize=16)
def _grid_triangles(rows: int, columns: int, closed: bool = False) -> Ints:
    """Two triangles a cell of a grid of vertices; `closed` joins the last column to the first."""
    number = np.arange(rows * columns, dtype=np.int32).reshape(rows, columns)
    if closed:
        number = np.concatenate([number, number[:, :1]], axis=1)
    a, b, c, d = (x.ravel() for x in (number[:-1, :-1], number[:-1, 1:], number[1:, :-1], number[1:, 1:]))
    return np.concatenate([np.stack([a, c, b], axis=1), np.stack([b, c, d], axis=1)])


def _tube(part: Part, path: ArrayLike, radius: float, sides: int = 6, closed: bool = False) -> Piece:
    """A round tube along a path (n, 3)."""
    points = np.asarray(path, np.float32)
    along = np.roll(points, -1, axis=0) - np.roll(points, 1, axis=0)
    if not closed:
        along[0], along[-1] = points[1] - points[0], points[-1] - points[-2]
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    aside = np.stack([along[:, 1], -along[:, 0], np.zeros(len(points))], axis=1)  # along x z
    level = np.linalg.norm(aside, axis=1) < 0.1
    aside[level] = np.stack([-along[level, 2], np.zeros(level.sum()), along[level, 0]], axis=1)  # along x y
    aside /= np.linalg.norm(aside, axis=1, keepdims=True)
    across = np.cross(along, aside)
    angle = np.linspace(0, 2 * np.pi, sides, endpoint=False)[:, None]
    rings = points[:, None] + radius * (np.cos(angle) * aside[:, None] + np.sin(angle) * across[:, None])
    if closed:
        rings = np.concatenate([rings, rings[:1]])
    triangles = _grid_triangles(len(rings), sides, closed=True)
    return Piece(part, rings.reshape(-1, 3).astype(np.float32), triangles)


@lru_cache(maxsize=4)
def _unit_sphere(rings: int) -> Floats:
    tilt, turn = np.meshgrid(
        np.linspace(0, np.pi, rings), np.linspace(0, 2 * np.pi, 2 * rings, endpoint=False), indexing="ij"
    )
    points = np.stack([np.sin(tilt) * np.cos(turn), np.cos(tilt), np.sin(tilt) * np.sin(turn)], axis=-1)
    return points.reshape(-1, 3).astype(np.float32)


def _sphere(part: Part, centre: Floats, radius: float, rings: int = 10) -> Piece:
    vertices = _unit_sphere(rings) * np.float32(radius) + centre.astype(np.float32)
    return Piece(part, vertices, _grid_triangles(rings, 2 * rings, closed=True))


def _submesh(model: HeadModel, wanted: NDArray[np.bool_]) -> tuple[Indices, Ints]:
    """Vertex numbers and renumbered triangles of the body between wanted vertices (N,)."""
    inside = wanted[model.body_triangles].all(axis=1)
    kept = model.body_triangles[inside]
    used = np.zeros(len(wanted), bool)
    used[kept] = True
    return np.flatnonzero(used), (np.cumsum(used, dtype=np.int32) - 1)[kept]


@lru_cache(maxsize=2)
def _scalp(bangs: bool) -> tuple[Indices, Ints, Floats]:
    """Vertices and triangles that carry hair, and each vertex's height above the hairline."""
    model = load_head_model()
    above = model.above_hairline + BANGS_DROP * model.frontness * bangs
    grown = (above > -0.08) & model.on_body & (model.ears < 0.3) & (model.vertices[:, 1] > 6.3)
    numbers, triangles = _submesh(model, grown)
    return numbers, triangles, above[numbers]


@lru_cache(maxsize=1)
def _hat_shell() -> tuple[Indices, Ints]:
    model = load_head_model()
    edge = 7.85 - 0.3 * smoothstep(model.vertices[:, 2], 0.6, -0.5)
    return _submesh(model, model.on_body & (model.vertices[:, 1] > edge))


def _skull_lift(vertices: Floats) -> float:
    """How much higher (dm) the crown of this head is than at rest."""
    model = load_head_model()
    crown = model.on_body & (model.vertices[:, 1] > CROWN)
    return float(vertices[crown, 1].mean()) - float(model.vertices[crown, 1].mean())


def hair_cap(vertices: Floats, normals: Floats, look: Appearance) -> Piece:
    """The hair on the scalp: the scalp itself, moved out along its normals."""
    model = load_head_model()
    numbers, triangles, above = _scalp(look.bangs)
    rest = model.vertices[numbers]
    crown, sides = HAIR_THICKNESS[look.hair_style]
    thickness = sides + (crown - sides) * smoothstep(rest[:, 1], 7.4, 8.3)
    thickness = thickness * (0.35 + 0.65 * smoothstep(above, 0, 0.25))
    locks = raster.noise(rest, 5.0, look.hair_seed) + raster.noise(rest * (3.0, 0.6, 3.0), 4.0, look.hair_seed % 31)
    thickness = thickness * (1 + 0.11 * locks) + 0.012
    if look.bangs:
        thickness = np.maximum(thickness, 0.09 * (model.above_hairline[numbers] < 0))
    if look.hat:
        thickness = np.minimum(thickness, 0.08)
    thickness = thickness - 0.03 * (above < 0)
    out = vertices[numbers] + normals[numbers] * thickness[:, None].astype(np.float32)
    return Piece(Part.HAIR, out, triangles, rest)


def falling_hair(vertices: Floats, look: Appearance) -> Piece:
    """A curtain of hair around sides and back, down to the style's length."""
    model = load_head_model()
    lift = _skull_lift(vertices)
    skull = vertices[model.on_body & (model.vertices[:, 1] > 6.9) & (model.ears < 0.2)]
    half_width, back = float(np.abs(skull[:, 0]).max()), float(skull[:, 2].min())
    angles = np.radians(np.linspace(74, 286, 64)).astype(np.float32)
    top = 7.7 if look.hat else 8.05
    heights = np.linspace(top, HAIR_END[look.hair_style], 36).astype(np.float32)
    angle, height = np.meshgrid(angles, heights)
    bulge = smoothstep(height, 8.3, 7.3)
    spread = smoothstep(height, 7.0, 5.0)
    radius_x = (half_width + 0.13) * (0.72 + 0.28 * bulge) + 0.18 * spread
    radius_z = (HEAD_AXIS_Z - back + 0.14) * (0.8 + 0.2 * bulge) + 0.1 * spread
    depth = np.cos(angle) * np.where(np.cos(angle) < 0, 1, 0.55)
    zero = np.zeros_like(angle)
    waves = raster.noise(np.stack([angle * 3, height * 0.35, zero], -1).reshape(-1, 3), 4.0, look.hair_seed % 53)
    waves = waves.reshape(angle.shape)
    x = radius_x * np.sin(angle) * (1 + 0.05 * waves)
    z = HEAD_AXIS_Z + radius_z * depth + 0.06 * waves
    y = height + lift * smoothstep(height, 5.0, 7.5)
    y[-1] += 0.12 * raster.noise(np.stack([angles * 9, zero[0], zero[0]], axis=1), 1.0, 3)
    sheet = np.stack([x, y, z], axis=-1).reshape(-1, 3).astype(np.float32)
    return Piece(
        Part.HAIR, sheet, _grid_triangles(len(heights), len(angles)), bend=smoothstep(height.ravel(), 4.6, 6.3)
    )


def bun(vertices: Floats) -> Piece:
    """A ball of hair behind the crown."""
    model = load_head_model()
    top = vertices[model.on_body & (model.vertices[:, 1] > 8.35)].mean(axis=0)
    return _sphere(Part.HAIR, top + np.array((0, 0.1, -0.45), np.float32), 0.34)


def _ear(vertices: Floats, side: int) -> Floats:
    """The vertices (n, 3) of the ear on side +1 (subject's left) or -1."""
    model = load_head_model()
    return vertices[model.on_body & (model.ears > 0.5) & (np.sign(model.vertices[:, 0]) == side)]


def glasses(vertices: Floats, look: Appearance) -> Iterable[Piece]:
    """Two rims with lenses, temples to the ears, and a bridge."""
    model = load_head_model()
    rest = model.vertices
    width, height = 0.25, 0.19  # half the size of a rim
    centres = [vertices[eye].mean(axis=0) for eye in model.eyes]
    level = float(centres[0][1] + centres[1][1]) / 2
    brow = model.on_body & (np.abs(rest[:, 0]) < 0.55) & (rest[:, 1] > 7.05) & (rest[:, 1] < 7.5)
    front = float(vertices[brow, 2].max()) + 0.03
    roundness = 0.75 if look.square_glasses else 1.0  # exponent of a superellipse
    turn = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    cos = np.sign(np.cos(turn)) * np.abs(np.cos(turn)) ** roundness
    sin = np.sign(np.sin(turn)) * np.abs(np.sin(turn)) ** roundness
    lens = Part.DARK_LENS if look.eyewear == "Sunglasses" else Part.CLEAR_LENS
    for centre, side in zip(centres, (1, -1), strict=True):
        x = float(centre[0]) * 1.02
        curve = front - 0.25 * (x + width * np.cos(turn)) ** 2
        rim = np.stack([x + width * cos, level - 0.03 + height * sin, curve], axis=1).astype(np.float32)
        yield _tube(Part.FRAME, rim, 0.022, closed=True)
        fan = np.stack([np.arange(28), (np.arange(28) + 1) % 28, np.full(28, 28)], axis=1).astype(np.int32)
        yield Piece(lens, np.concatenate([rim, rim.mean(axis=0, keepdims=True)]), fan)
        ear = _ear(vertices, side)
        hinge = (x + side * width, level + 0.03, front - 0.25 * (abs(x) + width) ** 2)
        ear_x, ear_y, ear_z = (float(value) for value in ear[ear[:, 1].argmax()])
        outward = side * (abs(ear_x) + 0.01)
        knee = (outward, level + 0.05, hinge[2] - 0.5)
        yield _tube(Part.FRAME, [hinge, knee, (side * abs(ear_x), ear_y - 0.05, ear_z)], 0.02, 5)
    inner = abs(float(centres[0][0])) * 1.02 - width
    bridge = [(inner, level + 0.02, front), (0, level + 0.05, front + 0.02), (-inner, level + 0.02, front)]
    yield _tube(Part.FRAME, bridge, 0.02, 5)


def hat(vertices: Floats, normals: Floats, look: Appearance) -> Iterable[Piece]:
    """A dome over the skull and, sometimes, a peak in front."""
    rest = load_head_model().vertices
    numbers, triangles = _hat_shell()
    dome = vertices[numbers] + normals[numbers] * np.float32(0.17)
    yield Piece(Part.HAT, dome, triangles, rest[numbers])
    if look.brim:
        forehead = np.flatnonzero((np.abs(rest[numbers, 0]) < 0.15) & (rest[numbers, 2] > 0.8))
        _, edge_y, edge_z = dome[forehead[rest[numbers[forehead], 1].argmin()]]
        angle, reach = np.meshgrid(np.linspace(-1, 1, 24) * np.pi / 2 * 0.85, np.linspace(0.8, 1.55, 8))
        x = np.sin(angle) * 0.78 * np.minimum(reach, 1.05)
        y = edge_y + 0.03 - 0.14 * (reach - 0.8) - 0.1 * np.sin(angle) ** 2
        z = edge_z - 0.85 + np.cos(angle) * reach
        sheet = np.stack([x, y, z], axis=-1).reshape(-1, 3).astype(np.float32)
        yield Piece(Part.HAT, sheet, _grid_triangles(8, 24))


def earrings(vertices: Floats) -> Iterable[Piece]:
    """A bead under each ear lobe."""
    for side in (1, -1):
        ear = _ear(vertices, side)
        lobe = ear[ear[:, 1].argmin()]
        yield _sphere(Part.EARRING, lobe + np.array((side * 0.03, -0.05, 0.05), np.float32), 0.055, 8)


def _worn(vertices: Floats, normals: Floats, look: Appearance) -> Iterable[Piece]:
    if look.hair_style != "Bald":
        yield hair_cap(vertices, normals, look)
    if look.hair_style in HAIR_END:
        yield falling_hair(vertices, look)
    if look.hair_style == "Hair_Bun":
        yield bun(vertices)
    if look.eyewear != "No_Eyewear":
        yield from glasses(vertices, look)
    if look.hat:
        yield from hat(vertices, normals, look)
    if look.earrings:
        yield from earrings(vertices)


def dress(vertices: Floats, look: Appearance) -> Mesh:
    """The whole mesh of a picture: the shaped head (N, 3) with expression and gaze, and all it wears."""
    model = load_head_model()
    normals = raster.vertex_normals(vertices, model.triangles)
    pieces = sorted(_worn(vertices, normals, look), key=lambda piece: piece.part == Part.CLEAR_LENS)
    clothed = model.on_body & (model.vertices[:, 1] < CLOTH_TOP)
    head = vertices + normals * np.where(clothed, CLOTH_THICKNESS, 0).astype(np.float32)[:, None]
    first = np.cumsum([len(head), *(len(piece.vertices) for piece in pieces)])
    return Mesh(
        vertices=np.concatenate([head, *(piece.vertices for piece in pieces)]),
        rest=np.concatenate([model.vertices, *(p.vertices if p.rest is None else p.rest for p in pieces)]),
        bend=np.concatenate(
            [model.bend, *(np.ones(len(p.vertices), np.float32) if p.bend is None else p.bend for p in pieces)]
        ),
        triangles=np.concatenate(
            [model.triangles, *(p.triangles + np.int32(n) for p, n in zip(pieces, first, strict=False))]
        ),
        part=np.concatenate([model.part, *(np.full(len(p.triangles), p.part, np.int8) for p in pieces)]),
        opaque=len(model.triangles) + sum(len(p.triangles) for p in pieces if p.part != Part.CLEAR_LENS),
    )
