"""What every visible point is made of: colour, gloss and segmentation class, painted in rest coordinates.

Skin detail (brows, lips, beard, blush, wrinkles, scalp, clothes) is a function of where a point lies on the rest head,
so it follows every morph. K points; colours (K, 3) are albedo in 0..1; rest coordinates as in `model`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facemllm.heads.accessories import BANGS_DROP
from facemllm.heads.model import Floats, Indices, Part, bell, load_head_model, smoothstep
from facemllm.heads.raster import noise
from facemllm.heads.sampling import Appearance, Identity
from facemllm.tables.schemas import SEGMENTATION

CLASS = {name: number for number, name in enumerate(SEGMENTATION)}
"""Class numbers of CelebAMask-HQ; `l_` is the subject's left: image right on a frontal face."""

SKIN_RAMP = np.array(
    [(0.93, 0.78, 0.70), (0.86, 0.67, 0.55), (0.74, 0.53, 0.39), (0.56, 0.37, 0.25), (0.36, 0.22, 0.15)], np.float32
)
HAIR = {
    "Black_Hair": (0.05, 0.045, 0.045),
    "Dark_Brown_Hair": (0.14, 0.085, 0.055),
    "Brown_Hair": (0.27, 0.16, 0.09),
    "Blond_Hair": (0.62, 0.47, 0.26),
    "Red_Hair": (0.42, 0.17, 0.07),
    "Gray_Hair": (0.5, 0.5, 0.5),
    "White_Hair": (0.82, 0.81, 0.78),
}
IRIS = {
    "Brown_Eyes": (0.26, 0.14, 0.07),
    "Dark_Eyes": (0.12, 0.07, 0.05),
    "Hazel_Eyes": (0.38, 0.29, 0.13),
    "Green_Eyes": (0.28, 0.40, 0.24),
    "Blue_Eyes": (0.27, 0.42, 0.58),
    "Gray_Eyes": (0.45, 0.5, 0.52),
}
LIPSTICK = ((0.62, 0.07, 0.12), (0.70, 0.25, 0.30), (0.45, 0.06, 0.16))
FRAME = ((0.03, 0.03, 0.03), (0.25, 0.14, 0.07), (0.5, 0.45, 0.4), (0.2, 0.04, 0.05))
HAT = ((0.1, 0.12, 0.2), (0.55, 0.1, 0.1), (0.2, 0.22, 0.2), (0.7, 0.68, 0.62))
CLOTH = (
    *((0.12, 0.18, 0.35), (0.75, 0.74, 0.72), (0.45, 0.10, 0.12)),
    *((0.14, 0.14, 0.15), (0.20, 0.35, 0.28), (0.60, 0.50, 0.35)),
)
# Of plain surfaces: albedo, strength and sharpness of the highlight, class.
PLAIN = {
    Part.LASHES: ((0.03, 0.03, 0.03), 0.12, 18.0, "skin"),
    Part.TEETH: ((0.86, 0.84, 0.77), 0.4, 40.0, "mouth"),
    Part.TONGUE: ((0.55, 0.2, 0.2), 0.12, 18.0, "mouth"),
    Part.DARK_LENS: ((0.03, 0.03, 0.03), 0.8, 80.0, "eye_g"),
    Part.EARRING: ((0.85, 0.75, 0.4), 1.0, 50.0, "ear_r"),
}
LIP_LINE = 6.66  # rest height (dm) between upper and lower lip


@dataclass(frozen=True)
class Points:
    """The visible points of a picture, in row order of its pixels."""

    part: NDArray[np.int8]  # (K,)
    rest: Floats  # (K, 3)
    normal: Floats  # (K, 3) unit, towards the camera; `paint` roughens those of hair in place
    lips: Floats  # (K,) 0..1
    ears: Floats  # (K,)
    mouth_interior: Floats  # (K,)
    above_hairline: Floats  # (K,) dm
    frontness: Floats  # (K,) 0..1


@dataclass(frozen=True)
class Surface:
    """What `paint` found out about the points."""

    albedo: Floats  # (K, 3)
    highlight: Floats  # (K,) strength
    sharpness: Floats  # (K,) exponent of the highlight
    label: NDArray[np.uint8]  # (K,) class numbers


def skin_albedo(melanin: float) -> Floats:
    """Base colour (3,) of skin between lightest (0) and darkest (1)."""
    position = melanin * (len(SKIN_RAMP) - 1)
    below = min(int(position), len(SKIN_RAMP) - 2)
    share = position - below
    return SKIN_RAMP[below] * np.float32(1 - share) + SKIN_RAMP[below + 1] * np.float32(share)


def _mix(colour: NDArray[Any], other: NDArray[Any], share: Floats) -> None:
    """Blend `other` (3,) or (K, 3) into `colour` (K, 3) in place, by share (K,)."""
    colour += (other - colour) * share[:, None]


class _Skin:
    """The body's points while they are painted. `x` is the distance from the middle line; `front` 1 on the face."""

    def __init__(self, points: Points, chosen: Indices, identity: Identity, look: Appearance) -> None:
        self.identity, self.look = identity, look
        self.rest = points.rest[chosen]
        self.x, self.y, self.z = np.abs(self.rest[:, 0]), self.rest[:, 1], self.rest[:, 2]
        self.left = self.rest[:, 0] > 0
        self.front = self.z > 0.9
        self.lips = smoothstep(points.lips[chosen], 0.25, 0.75)
        self.ears = points.ears[chosen]
        self.inside_mouth = points.mouth_interior[chosen] > 0.5
        drop = np.float32(BANGS_DROP if look.bangs else 0)
        self.above_hairline = points.above_hairline[chosen] + drop * points.frontness[chosen]
        seed = identity.skin_seed
        self.coarse, self.medium, self.fine = (noise(self.rest, f, seed) for f in (3, 14, 40))
        mottled = 1 + 0.035 * self.coarse + 0.03 * self.medium + 0.035 * self.fine
        self.base = skin_albedo(identity.melanin)
        self.colour = self.base * mottled[:, None]
        self.label = np.full(len(chosen), CLASS["skin"], np.uint8)
        self.hair = np.array(HAIR[identity.hair_color], np.float32)
        pale = identity.hair_color in ("Blond_Hair", "White_Hair", "Gray_Hair")
        self.facial_hair = self.hair * np.float32(0.62 if pale else 0.8)

    def paint(self) -> None:
        """Layer after layer, in the order in which later ones cover earlier ones."""
        self._blush()
        self._age()
        self._regions()
        self._brows()
        self._mouth()
        if self.look.beard != "No_Beard":
            self._beard()
        if self.look.hair_style != "Bald":
            self._scalp()
        self._clothes()

    def _cover(self, chosen: Indices, colour: NDArray[Any], share: NDArray[Any]) -> None:
        """Blend a colour into some of the points, by share."""
        under = self.colour[chosen]
        self.colour[chosen] = under + (colour - under) * share[:, None]

    def _blush(self) -> None:
        x, y = self.x, self.y
        cheeks = 0.5 * bell(x - 0.42, 0.16) * bell(y - 6.93, 0.17) * self.front
        nose = 0.45 * bell(x, 0.12) * bell(y - 6.98, 0.12) * (self.z > 1.4)
        chin = 0.2 * bell(y - 6.35, 0.12) * bell(x, 0.2) * self.front
        red = (cheeks + nose + chin + 0.25 * self.ears) * np.float32((1 - self.identity.melanin * 0.75) * 0.48)
        self.colour *= 1 + red[:, None] * np.array((0.25, -0.35, -0.35), np.float32)
        under_eyes = bell(x - 0.3, 0.17) * bell(y - 7.1, 0.06) * self.front
        self.colour *= 1 - (0.20 * (0.5 + self.identity.age / 90)) * under_eyes[:, None]

    def _age(self) -> None:
        x, y, seed = self.x, self.y, self.identity.skin_seed
        old = min(max((self.identity.age - 38) / 40, 0), 1)
        if old > 0:
            waves = np.maximum(0, np.sin((y + 0.04 * self.coarse + 0.03 * x**2) * 62)) ** 6
            forehead = waves * smoothstep(y, 7.55, 7.65) * smoothstep(y, 8.0, 7.85) * self.front
            rays = np.maximum(0, np.sin(np.arctan2(y - 7.26, x - 0.42) * 14)) ** 6
            crows_feet = rays * bell(np.hypot(x - 0.58, y - 7.26), 0.1) * self.front
            depth = (forehead + 0.8 * crows_feet) * np.clip(0.7 + self.coarse * 0.4, 0, 1)
            self.colour *= 1 - (0.22 * old) * depth[:, None]
            spots = noise(self.rest, 9, seed + 3) > 1.35
            self.colour *= 1 - np.float32(0.18 * old) * spots[:, None]
        if self.identity.freckled and self.identity.melanin < 0.25:
            freckles = (noise(self.rest, 26, seed + 5) > 1.5) * bell(y - 6.98, 0.2) * self.front
            self.colour *= 1 - 0.2 * freckles[:, None]

    def _regions(self) -> None:
        x, y, z = self.x, self.y, self.z
        self.label[(y < 6.12 - 0.28 * (z - 1.0)) | ((y < 6.45) & (z < 0.5))] = CLASS["neck"]
        nose = (x < 0.25 - 0.22 * smoothstep(y, 6.9, 7.3)) & (y > 6.83) & (y < 7.32) & (z > 1.35)
        self.label[nose] = CLASS["nose"]
        ear = self.ears > 0.5
        self.label[ear & self.left] = CLASS["l_ear"]
        self.label[ear & ~self.left] = CLASS["r_ear"]

    def _brows(self) -> None:
        near = np.flatnonzero(self.front & (self.x < 0.63) & (self.x > 0.06) & (np.abs(self.y - 7.45) < 0.18))
        x, y = self.x[near], self.y[near]
        along = np.clip((x - 0.09) * (1 / 0.51), 0, 1)
        middle = 7.475 + 0.045 * np.sin(np.float32(np.pi) * np.minimum(along * 1.02, 1))
        middle += 0.012 * along - 0.055 * smoothstep(along, 0.60, 1)
        half = (0.042 * self.identity.brow_thickness) * (1 - 0.72 * along**2.2) * smoothstep(x, 0.07, 0.1018)
        off = np.abs(y - middle) / np.maximum(half, 1e-3)
        ragged = noise(self.rest[near] * np.array((18, 6, 1), np.float32), 3, self.identity.skin_seed + 1)
        share = 0.88 * smoothstep(off + 0.28 * ragged, 1.25, 0.55)
        self._cover(near, self.facial_hair * (1 + 0.2 * self.fine[near])[:, None], share)
        brow = near[(off < 1.05) & (x < 0.62) & (x > 0.07)]
        self.label[brow] = np.where(self.left[brow], CLASS["l_brow"], CLASS["r_brow"])

    def _mouth(self) -> None:
        if self.look.lipstick:
            lip = np.array(LIPSTICK[self.look.lipstick_shade], np.float32)
        else:
            lip = self.base * np.array((0.92, 0.60, 0.60), np.float32) * np.float32(1 - 0.1 * self.identity.melanin)
            lip = lip + np.array((0.05, 0, 0.01), np.float32)
        near = np.flatnonzero(self.lips > 0)
        self._cover(near, lip * (1 + 0.06 * self.medium[near])[:, None], self.lips[near])
        on_lips = near[self.lips[near] > 0.5]
        self.label[on_lips] = np.where(self.y[on_lips] > LIP_LINE, CLASS["u_lip"], CLASS["l_lip"])
        self.colour[self.inside_mouth] = (0.30, 0.07, 0.07)
        self.label[self.inside_mouth] = CLASS["mouth"]
        if self.look.lipstick:
            shadow = bell(self.x - 0.31, 0.13) * bell(self.y - 7.40, 0.045) * self.front
            self.colour *= 1 - 0.35 * shadow[:, None]

    def _beard(self) -> None:
        near = np.flatnonzero((self.y < 6.9) & (self.y > 5.95) & (self.z > 0.42))
        x, y, z = self.x[near], self.y[near], self.z[near]
        mustache = smoothstep(x, 0.30, 0.22) * smoothstep(y, 6.70, 6.73) * smoothstep(y, 6.88, 6.82) * (z > 1.3)
        chin = smoothstep(x, 0.24, 0.16) * smoothstep(y, 6.56, 6.50) * (z > 1.0)
        if self.look.beard == "Mustache":
            grown = mustache
        elif self.look.beard == "Goatee":
            grown = np.maximum(mustache * 0.95, chin)
        else:
            low_jaw = 0.55 * smoothstep(x, 0.75, 0.2)
            jaw = smoothstep(y + low_jaw, 6.9, 6.75) * smoothstep(y, 5.95, 6.15) * (1 - self.ears[near])
            corners = smoothstep(x, 0.40, 0.32) * smoothstep(x, 0.2, 0.25) * smoothstep(y, 6.82, 6.75) * (z > 1.0)
            grown = np.maximum(np.maximum(mustache, chin), np.maximum(jaw, corners))
        grown = grown * (1 - self.lips[near]) * ~self.inside_mouth[near]
        stubble = 0.35 * noise(self.rest[near], 45, self.identity.skin_seed) + 0.25 * self.fine[near]
        cover = np.float32(0.42 if self.look.beard == "5_o_Clock_Shadow" else 0.93)
        colour = self.facial_hair * (1 + 0.25 * self.fine[near])[:, None]
        self._cover(near, colour, grown * np.clip(0.75 + stubble, 0, 1) * cover)

    def _scalp(self) -> None:
        grown = smoothstep(self.above_hairline + 0.03 * self.medium, -0.03, 0.06)
        grown = grown * ((self.ears < 0.4) & (self.y > 6.4))
        near = np.flatnonzero(grown)
        self._cover(near, self.hair * np.float32(0.7), 0.85 * grown[near])
        self.label[grown > 0.5] = CLASS["hair"]

    def _clothes(self) -> None:
        x, z = self.x, self.z
        collar = (
            5.62 - 0.28 * smoothstep(x, 0.9, 0) * (z > 0),
            5.50 - 0.22 * smoothstep(x, 0.8, 0) * (z > 0),
            5.60 - 0.95 * smoothstep(x, 0.62, 0) * (z > 0),
        )[self.look.neckline]
        self.clothed = self.y < collar - 0.06 * (z < 0)
        weave = noise(self.rest[self.clothed], 30, 1)
        self.colour[self.clothed] = np.array(CLOTH[self.look.cloth_shade], np.float32) * (1 + 0.05 * weave)[:, None]
        self.label[self.clothed] = CLASS["cloth"]


def _eye_albedo(offset: Floats, colour: str) -> NDArray[Any]:
    """Sclera, iris and pupil (K, 3) at offsets (K, 3) from the centre of an eyeball that looks along z."""
    angle = np.degrees(np.arctan2(np.hypot(offset[:, 0], offset[:, 1]), offset[:, 2]))  # from the axis of sight
    turn = np.arctan2(offset[:, 1], offset[:, 0])
    fibres = (
        1 + 0.18 * np.sin(turn * 23 + noise(offset, 9, 2)) + 0.25 * bell(angle - 15, 4) - 0.45 * bell(angle - 29, 3)
    )
    white = np.array((0.86, 0.8274, 0.7995), np.float32) * (1 - 0.10 * bell(angle - 55, 18))[:, None]
    _mix(white, np.array(IRIS[colour], np.float32) * fibres[:, None], smoothstep(angle, 31, 28.5))
    _mix(white, np.full(3, 0.02, np.float32), smoothstep(angle, 12.5, 11))
    return white


def paint(points: Points, identity: Identity, look: Appearance) -> Surface:
    """Colour, gloss and class of every visible point."""
    model = load_head_model()
    count = len(points.part)
    surface = Surface(
        albedo=np.zeros((count, 3), np.float32),
        highlight=np.zeros(count, np.float32),
        sharpness=np.zeros(count, np.float32),
        label=np.zeros(count, np.uint8),
    )

    def put(chosen: Indices, albedo: Floats, highlight: float | Floats, sharpness: float | Floats, name: str) -> None:
        surface.albedo[chosen] = albedo
        surface.highlight[chosen] = highlight
        surface.sharpness[chosen] = sharpness
        surface.label[chosen] = CLASS[name]

    present = np.bincount(points.part, minlength=len(Part)) > 0
    where = {part: np.flatnonzero(points.part == part) for part in Part if present[part]}

    if (chosen := where.get(Part.BODY)) is not None:
        skin = _Skin(points, chosen, identity, look)
        skin.paint()
        highlight = np.where(skin.clothed, np.float32(0.02), 0.16 + 0.25 * skin.lips)
        put(chosen, skin.colour, highlight, np.where(skin.clothed, np.float32(6), 16 + 30 * skin.lips), "skin")
        surface.label[chosen] = skin.label
    for part, eye, name in zip((Part.LEFT_EYE, Part.RIGHT_EYE), model.eyes, ("l_eye", "r_eye"), strict=True):
        if (chosen := where.get(part)) is not None:
            offset = points.rest[chosen] - model.vertices[eye].mean(axis=0)
            put(chosen, _eye_albedo(offset, identity.eye_color), 0.9, 160.0, name)
    if (chosen := where.get(Part.HAIR)) is not None:
        rest = points.rest[chosen]
        angle = np.arctan2(rest[:, 0], rest[:, 2] - 0.3)
        flat = np.zeros_like(angle)
        wide = noise(np.stack([angle * 16, rest[:, 1] * 0.8, flat], axis=1), 3, identity.skin_seed)
        narrow = noise(np.stack([angle * 50, rest[:, 1] * 1.2, flat], axis=1), 3, identity.skin_seed + 2)
        strands = 0.5 * (wide + narrow)
        colour = np.array(HAIR[identity.hair_color], np.float32) * np.float32(1.15)
        put(chosen, colour * np.clip(1 + 0.38 * strands, 0.3, 2)[:, None], 0.22, 14.0, "hair")
        normal = points.normal[chosen] + (0.22 * strands)[:, None] * np.array((1, 0, 0.3), np.float32)
        points.normal[chosen] = normal / np.sqrt((normal * normal).sum(axis=1, keepdims=True))
    frame, hat = (FRAME[look.frame_shade], 0.6, 60.0, "eye_g"), (HAT[look.hat_shade], 0.03, 18.0, "hat")
    for part, (albedo, strength, sharpness, name) in (PLAIN | {Part.FRAME: frame, Part.HAT: hat}).items():
        if (chosen := where.get(part)) is not None:
            put(chosen, np.array(albedo, np.float32), strength, sharpness, name)
    return surface
