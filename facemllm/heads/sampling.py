"""What is drawn by chance: an identity once, and everything that changes from one picture of it to the next.

The vocabulary is that of the `faces` table: attribute names as in CelebA and MAAD where these have one. MakeHuman spans
its heads between three base shapes; a random blend of them is drawn and never leaves this module as a label.
"""

import math
from bisect import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from facemllm.heads.model import load_head_model

EXPRESSIONS = ("neutral", "happiness", "sadness", "surprise", "fear", "disgust", "anger")
HAIR_STYLES = ("Bald", "Buzz_Cut", "Short_Hair", "Medium_Hair", "Long_Hair", "Hair_Bun")
HAIR_COLORS = ("Black_Hair", "Dark_Brown_Hair", "Brown_Hair", "Blond_Hair", "Red_Hair", "Gray_Hair", "White_Hair")
BEARDS = ("No_Beard", "5_o_Clock_Shadow", "Mustache", "Goatee", "Full_Beard")
EYEWEAR = ("No_Eyewear", "Eyeglasses", "Sunglasses")
EYE_COLORS = ("Brown_Eyes", "Dark_Eyes", "Hazel_Eyes", "Green_Eyes", "Blue_Eyes", "Gray_Eyes")

ADULT = 18  # years
AGE_GROUPS = {(6, 14): 0.10, (18, 36): 0.45, (36, 60): 0.25, (60, 86): 0.20}  # [from, to) whole years
AGE_SHAPES = ("baby", "child", "young", "old")
AGE_SHAPE_YEARS = (1, 10, 25, 90)
BASE_SHAPES = ("african", "asian", "caucasian")  # names of MakeHuman's morph targets
BASE_MELANIN = (0.85, 0.30, 0.10)
HEAD_OUTLINES = ("oval", "round", "square", "triangular", "rectangular", "diamond")

# Expression units (names of ARKit's blend shapes) of each expression; a trailing * stands for both Left and Right.
EXPRESSION_UNITS: dict[str, dict[str, float]] = {
    "neutral": {},
    "happiness": {
        "mouthSmile*": 0.85,
        "cheekSquint*": 0.5,
        "mouthUpperUp*": 0.45,
        "mouthDimple*": 0.3,
        "jawOpen": 0.12,
    },
    "sadness": {"mouthFrown*": 0.8, "browInnerUp": 0.8, "mouthShrugLower": 0.5, "eyeBlink*": 0.2, "eyeLookDown*": 0.3},
    "surprise": {"jawOpen": 0.5, "browInnerUp": 0.8, "browOuterUp*": 0.9, "eyeWide*": 0.9},
    "fear": {"eyeWide*": 0.9, "browInnerUp": 1.0, "browDown*": 0.2, "mouthStretch*": 0.8, "jawOpen": 0.2},
    "disgust": {"noseSneer*": 1.0, "mouthUpperUp*": 0.7, "browDown*": 0.5, "mouthFrown*": 0.5, "eyeSquint*": 0.4},
    "anger": {"browDown*": 1.0, "noseSneer*": 0.4, "mouthPress*": 0.7, "eyeSquint*": 0.5, "mouthFrown*": 0.3},
}

# The same units as FACS names the movement they draw (`action_units`), but for eyeLookDown: it moves the lid alone.
UNIT_ACTIONS = {
    "browInnerUp": "AU1",  # inner brow raiser
    "browOuterUp*": "AU2",  # outer brow raiser
    "browDown*": "AU4",  # brow lowerer
    "eyeWide*": "AU5",  # upper lid raiser
    "cheekSquint*": "AU6",  # cheek raiser
    "eyeSquint*": "AU7",  # lid tightener
    "noseSneer*": "AU9",  # nose wrinkler
    "mouthUpperUp*": "AU10",  # upper lip raiser
    "mouthSmile*": "AU12",  # lip corner puller
    "mouthDimple*": "AU14",  # dimpler
    "mouthFrown*": "AU15",  # lip corner depressor
    "mouthShrugLower": "AU17",  # chin raiser
    "mouthStretch*": "AU20",  # lip stretcher
    "mouthPress*": "AU24",  # lip pressor
    "jawOpen": "AU26",  # jaw drop
    "eyeBlink*": "AU43",  # lids droop or close
}
LIPS_PART = "AU25"
FULL_INTENSITY = 5.0  # FACS grade E

HAIR_COLOR_SHARES = dict(zip(HAIR_COLORS, (0.30, 0.25, 0.20, 0.12, 0.06, 0.05, 0.02), strict=True))
HAIR_COLOR_SHARES_OLD = {"Gray_Hair": 0.50, "White_Hair": 0.25, "Dark_Brown_Hair": 0.15, "Brown_Hair": 0.10}
GRAYING_AGE = 50
HAIR_STYLE_SHARES = {
    "man": dict(zip(HAIR_STYLES, (0.12, 0.22, 0.46, 0.15, 0.05, 0.0), strict=True)),
    "female": dict(zip(HAIR_STYLES, (0.0, 0.0, 0.20, 0.30, 0.38, 0.12), strict=True)),
    "boy": {"Short_Hair": 1.0},
}
BEARD_SHARES = dict(zip(BEARDS, (0.45, 0.20, 0.12, 0.10, 0.13), strict=True))
EYEWEAR_SHARES = dict(zip(EYEWEAR, (0.70, 0.24, 0.06), strict=True))
EYE_COLOR_SHARES = dict(zip(EYE_COLORS, (0.35, 0.20, 0.12, 0.10, 0.15, 0.08), strict=True))
EYE_COLOR_SHARES_DARK = {"Brown_Eyes": 0.5, "Dark_Eyes": 0.5}
BANGS_STYLES = ("Short_Hair", "Medium_Hair", "Long_Hair")


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What all pictures of one synthetic person share."""

    gender: str  # female | male
    age: float  # whole years
    melanin: float  # 0 lightest skin .. 1 darkest
    hair_color: str  # of HAIR_COLORS
    eye_color: str  # of EYE_COLORS
    brow_thickness: float  # 1 is average
    skin_seed: int  # of moles, freckles and pores
    freckled: bool
    shape: Mapping[str, float]  # morph target -> weight

    @property
    def adult(self) -> bool:
        """Whether beard, lipstick and the hair styles of adults are possible."""
        return self.age >= ADULT


@dataclass(frozen=True, kw_only=True)
class Appearance:
    """What changes between pictures of one person. Angles in degrees; pose signs as in `model.head_rotation`."""

    expression: str  # of EXPRESSIONS
    units: Mapping[str, float]  # morph target of an expression unit -> weight
    yaw: float
    pitch: float
    roll: float
    gaze: tuple[float, float]  # (to the subject's left, up)
    hair_style: str  # of HAIR_STYLES
    bangs: bool
    beard: str  # of BEARDS
    eyewear: str  # of EYEWEAR
    hat: bool
    earrings: bool
    lipstick: bool
    hair_seed: int
    lipstick_shade: int  # the shades and shapes below count through short lists in `materials` and `accessories`
    frame_shade: int
    hat_shade: int
    cloth_shade: int
    neckline: int
    square_glasses: bool
    brim: bool
    light_azimuth: float  # from the camera's axis towards image right
    light_elevation: float
    light_power: float
    light_warmth: float
    zoom: float  # height of the head as a share of the picture
    shift: tuple[float, float]  # dm of the picture's centre from the head's
    background: tuple[tuple[float, float, float], tuple[float, float, float]]  # top and bottom colour, 0..1


def pick(rng: np.random.Generator, shares: Mapping[str, float]) -> str:
    """One name with a chance proportional to its share."""
    bounds = list(accumulate(shares.values()))
    return list(shares)[min(bisect(bounds, rng.random() * bounds[-1]), len(bounds) - 1)]


def _normal(rng: np.random.Generator, mean: float, deviation: float, low: float, high: float) -> float:
    return min(max(mean + deviation * float(rng.standard_normal()), low), high)


def _age_shares(age: float) -> dict[str, float]:
    """Weights of the age shapes at an age in years: linear between neighbours on MakeHuman's own scale."""
    position = np.interp(age, AGE_SHAPE_YEARS, range(len(AGE_SHAPES)))
    return {shape: max(0.0, 1 - abs(float(position) - i)) for i, shape in enumerate(AGE_SHAPES)}


def _sample_shape(
    rng: np.random.Generator, age: float, masculinity: float, weight: float, blend: Mapping[str, float]
) -> dict[str, float]:
    """Morph weights of a face: sex, age, body weight and base shape, then random details and outline."""
    shape: dict[str, float] = {}
    weights = {
        "minweight": max(0.0, 1 - 2 * weight),
        "averageweight": 1 - abs(2 * weight - 1),
        "maxweight": max(0.0, 2 * weight - 1),
    }
    model = load_head_model()
    for sex, sex_share in (("female", 1 - masculinity), ("male", masculinity)):
        for age_shape, age_share in _age_shares(age).items():
            for base, base_share in blend.items():
                shape[f"macrodetails/{base}-{sex}-{age_shape}"] = base_share * sex_share * age_share
            for level, level_share in weights.items():
                name = f"macrodetails/universal-{sex}-{age_shape}-averagemuscle-{level}"
                if name in model.target_number:
                    shape[name] = sex_share * age_share * level_share
    for axis, (plus, minus) in model.opposed_targets.items():
        amount = _normal(rng, 0, 0.15 if axis.startswith("ears/") else 0.22, -0.6, 0.6)
        for name in plus if amount > 0 else minus:
            shape[name] = abs(amount)
    for outline in HEAD_OUTLINES:
        if rng.random() < 0.25:
            shape[f"head/head-{outline}"] = float(rng.uniform(0.2, 0.8))
    return shape


def sample_identity(rng: np.random.Generator) -> Identity:
    """Draw a person."""
    gender = "male" if rng.random() < 0.5 else "female"
    masculinity = _normal(rng, 0.92 if gender == "male" else 0.08, 0.06, 0, 1)
    first, last = list(AGE_GROUPS)[int(pick(rng, {str(i): s for i, s in enumerate(AGE_GROUPS.values())}))]
    age = float(rng.integers(first, last))
    blend = [float(share) for share in rng.dirichlet([0.5, 0.5, 0.5])]
    melanin = _normal(rng, sum(b * m for b, m in zip(blend, BASE_MELANIN, strict=True)), 0.08, 0, 1)
    weight = _normal(rng, 0.5, 0.2, 0.05, 0.95)
    hair_color = pick(rng, HAIR_COLOR_SHARES if age < GRAYING_AGE else HAIR_COLOR_SHARES_OLD)
    if melanin > 0.5 and hair_color in ("Blond_Hair", "Red_Hair"):
        hair_color = "Black_Hair"
    return Identity(
        gender=gender,
        age=age,
        melanin=melanin,
        hair_color=hair_color,
        eye_color=pick(rng, EYE_COLOR_SHARES if melanin < 0.45 else EYE_COLOR_SHARES_DARK),
        brow_thickness=float(rng.uniform(0.7, 1.25)) * (1.15 if gender == "male" else 0.85),
        skin_seed=int(rng.integers(89)),
        freckled=bool(rng.random() < 0.25),
        shape=_sample_shape(rng, age, masculinity, weight, dict(zip(BASE_SHAPES, blend, strict=True))),
    )


def _sides(unit: str) -> tuple[str, ...]:
    """The morph targets that a unit's name stands for."""
    stem = f"units/{unit.removesuffix('*')}"
    return (f"{stem}Left", f"{stem}Right") if unit.endswith("*") else (stem,)


def _expression_morphs(expression: str, strength: float) -> dict[str, float]:
    units = EXPRESSION_UNITS[expression]
    return {morph: weight * strength for unit, weight in units.items() for morph in _sides(unit)}


def action_units(units: Mapping[str, float]) -> dict[str, float]:
    """FACS action units 0..5 that expression units (morph target -> weight) draw; 0.0 where one rests.

    Intensity = 5 x weight, cut at 5: a unit at full weight is taken for FACS grade E, and the scale is linear in the
    weight, as the mesh's movement is. Of unequal sides the stronger counts, as in FACS. AU25 (lips part) has no unit
    of its own: it is 5 x the gap that the units open between the lips, as a share of the one a fully opened jaw makes.
    Left out are the direction of gaze (AU61 to AU64, which FACS does not grade), AU27 (a jaw is never stretched open)
    and whatever no expression uses.
    """
    intensity = {action: max(units.get(morph, 0.0) for morph in _sides(unit)) for unit, action in UNIT_ACTIONS.items()}
    opening = load_head_model().lip_opening
    intensity[LIPS_PART] = sum(weight * opening[morph] for morph, weight in units.items()) / opening["units/jawOpen"]
    return {name: FULL_INTENSITY * min(max(value, 0.0), 1.0) for name, value in intensity.items()}


def sample_appearance(rng: np.random.Generator, identity: Identity) -> Appearance:
    """Draw a picture of a person. There are no bangs under a hat."""
    adult, woman = identity.adult, identity.gender == "female"
    expression = EXPRESSIONS[int(rng.integers(len(EXPRESSIONS)))]
    strength = float(rng.uniform(0.7, 1.1))
    group = "female" if woman else "man" if adult else "boy"
    hair_style = pick(rng, HAIR_STYLE_SHARES[group])
    bangs = rng.random() < 0.35
    beard = pick(rng, BEARD_SHARES)
    hat = bool(rng.random() < 0.10)
    lipstick = rng.random() < 0.45
    earrings = rng.random() < 0.30
    dim = rng.uniform(0.1, 0.85, (2, 3)) * 0.4 + rng.uniform((0.1, 0.05), (0.55, 0.5))[:, None]
    top, bottom = ((float(r), float(g), float(b)) for r, g, b in dim)
    return Appearance(
        expression=expression,
        units=_expression_morphs(expression, strength),
        yaw=_normal(rng, 0, 22, -60, 60),
        pitch=_normal(rng, 0, 9, -25, 25),
        roll=_normal(rng, 0, 7, -20, 20),
        gaze=(_normal(rng, 0, 8, -math.inf, math.inf), _normal(rng, 0, 5, -math.inf, math.inf)),
        hair_style=hair_style,
        bangs=bool(bangs and hair_style in BANGS_STYLES and not hat),
        beard=beard if adult and not woman else "No_Beard",
        eyewear=pick(rng, EYEWEAR_SHARES),
        hat=hat,
        earrings=bool(earrings and woman),
        lipstick=bool(lipstick and adult and woman),
        hair_seed=int(rng.integers(97)),
        lipstick_shade=int(rng.integers(3)),
        frame_shade=int(rng.integers(4)),
        hat_shade=int(rng.integers(4)),
        cloth_shade=int(rng.integers(6)),
        neckline=int(rng.integers(3)),
        square_glasses=bool(rng.random() < 0.5),
        brim=bool(rng.random() < 2 / 3),
        light_azimuth=float(rng.uniform(-60, 60)),
        light_elevation=float(rng.uniform(15, 60)),
        light_power=float(rng.uniform(0.75, 1.15)),
        light_warmth=float(rng.uniform(0.9, 1.05)),
        zoom=float(rng.uniform(0.62, 0.74)),
        shift=(_normal(rng, 0, 0.06, -1, 1), _normal(rng, -0.12, 0.06, -1, 1)),
        background=(top, bottom),
    )
