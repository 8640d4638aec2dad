"""One synthetic head to a picture, its segmentation and its exact labels.

    rows = render_identity(seed=0, identity=7, images=2, size=128)

Everything follows from (seed, identity, number of the image): not from the process, the order or how many others are
drawn. Costs 8 to 10 ms a picture of 128 pixels on one core; no network, no GPU. No real person is depicted
and no label of ancestry is made.
"""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from facemllm.heads import raster, sampling
from facemllm.heads.accessories import Mesh, dress
from facemllm.heads.materials import CLASS, Points, Surface, paint, skin_albedo
from facemllm.heads.model import Floats, Part, bell, head_rotation, load_head_model, rotate
from facemllm.heads.raster import dot, unit
from facemllm.heads.sampling import BEARDS, EYE_COLORS, EYEWEAR, HAIR_COLORS, HAIR_STYLES, Appearance, Identity

CAMERA_DISTANCE = 13.0  # dm from the head
JPEG_QUALITY = 92
PAINTED = ("lips", "ears", "mouth_interior", "above_hairline", "frontness")  # of the model's vertices, as of `Points`
GRAIN = 0.028  # range of the uniform noise on colours in 0..1
SHOULDER_TURN = 0.25  # share of the head's yaw that the shoulders follow
NECK = np.array((0, 6.75, 0.25), np.float32)  # where the head turns on the neck, at rest (dm)

REFERENCE_LIGHT = 0.85
"""Diffuse light on a typical lit patch of skin: at it a colour counts as 'as shown'."""

# Visible pixels, of a 128 x 128 picture, from which a label is given.
HAIR_PIXELS = 40
HAT_PIXELS = 30
EYE_PIXELS = 24
EARRING_PIXELS = 2

LID_ACTIONS = ("AU5", "AU7", "AU43")
"""Action units that dark glasses hide."""

FACE_CLASSES = ("skin", "nose", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear", "mouth", "u_lip", "l_lip")

# The ten swatches of the Monk Skin Tone scale (skintone.google), sRGB.
MONK_SWATCHES = ("f6ede4", "f3e7db", "f7ead0", "eadaba", "d7bd96", "a07e56", "825c43", "604134", "3a312a", "292420")


@dataclass(frozen=True)
class Scene:
    """A head as it stands before the camera: x to image right, y up, z to the camera; dm."""

    mesh: Mesh
    positions: Floats  # (N, 3) of the mesh's vertices after turning
    landmarks: Floats  # (5, 3) in the order of the faces table


@dataclass(frozen=True)
class Picture:
    """What was rendered. Pixel (x, y) covers [x, x + 1) x [y, y + 1)."""

    image: NDArray[np.uint8]  # (size, size, 3) RGB
    segmentation: NDArray[np.uint8]  # (size, size) of `tables.schemas.SEGMENTATION`
    landmarks: Floats  # (5, 2) pixels


def shape_head(identity: Identity) -> Floats:
    """The person's head (N, 3) with a neutral expression: the same in all its pictures.

    MakeHuman's targets also change the body's height; the head is brought back to where it is at rest.
    """
    model = load_head_model()
    shape = model.morph(model.vertices, identity.shape)
    return shape - (shape[model.head] - model.vertices[model.head]).mean(axis=0)


def stage(shape: Floats, look: Appearance) -> Scene:
    """Expression, gaze, hair and clothes on a shaped head (N, 3), then turned by the look's pose."""
    model = load_head_model()
    head = model.morph(shape, look.units)
    left_eye, right_eye = (head[front] for front in model.eye_fronts)
    gaze = head_rotation(-look.gaze[0], look.gaze[1], 0)
    for eye in model.eyes:
        head[eye] = rotate(head[eye], gaze, head[eye].mean(axis=0))
    left_corner, right_corner = (head[corner] for corner in model.mouth_corners)
    landmarks = np.stack([right_eye, left_eye, head[model.nose_tip], right_corner, left_corner])

    mesh = dress(head, look)
    pivot = NECK + (head[model.skull].mean(axis=0) - model.skull_centre)
    turn = head_rotation(look.yaw, look.pitch, look.roll)
    shoulders = rotate(mesh.vertices, head_rotation(look.yaw * SHOULDER_TURN, 0, 0), pivot)
    turned = rotate(mesh.vertices, turn, pivot)
    positions = shoulders + (turned - shoulders) * mesh.bend[:, None]
    return Scene(mesh, positions, rotate(landmarks, turn, pivot))


def light_direction(look: Appearance) -> Floats:
    """Unit vector (3,) towards the key light."""
    azimuth, elevation = np.radians([look.light_azimuth, look.light_elevation])
    x, y, z = np.sin(azimuth) * np.cos(elevation), np.sin(elevation), np.cos(azimuth) * np.cos(elevation)
    return np.array((x, y, z), np.float32)


def tone(radiance: Floats) -> Floats:
    """Linear light to display values 0..1 (not clipped above)."""
    return np.power(radiance / (1 + np.float32(0.18) * radiance), np.float32(1 / 2.1))


def reflect(albedo: Floats) -> Floats:
    """Linear light that a surface of this albedo (..., 3) returns under light 1."""
    return np.float32(1.25) * np.power(albedo, np.float32(1.9))


def shown_colour(albedo: Floats) -> Floats:
    """Display colour 0..1 of an albedo (..., 3) in the reference light."""
    return np.minimum(tone(reflect(albedo) * np.float32(REFERENCE_LIGHT)), 1)


def shade(points: Points, surface: Surface, view: Floats, lit: Floats, look: Appearance) -> Floats:
    """Display colours (K, 3), not clipped above. `view` (K, 3) points to the camera; `lit` is that of `lit_shares`."""
    normal, light, power = points.normal, light_direction(look), np.float32(look.light_power)
    facing = dot(normal, light)
    skin = points.part == Part.BODY
    wrap = np.where(skin, np.float32(0.22), np.float32(0))
    key = np.clip((facing + wrap) / (1 + wrap), 0, 1) * lit * power
    key_colour = np.array((1, 0.95, 0.88), np.float32) * np.float32(look.light_warmth)
    sky = 0.30 + 0.16 * normal[:, 1] + 0.12 * normal[:, 2]
    fill = np.maximum(dot(normal, unit(np.array((-light[0], 0.2, 0.8), np.float32))), 0) * np.float32(0.22)
    seam = np.clip(0.10 - np.abs(facing), 0, 1) * lit * skin  # light bleeding through skin at the shadow's edge
    diffuse = np.empty_like(normal)
    sky_colour, seam_colour = (0.92, 0.97, 1.05), (0.5, 0.08, 0.04)
    for channel in range(3):
        diffuse[:, channel] = key * key_colour[channel] + sky * np.float32(sky_colour[channel]) + fill
        diffuse[:, channel] += seam * np.float32(seam_colour[channel])
    glint = np.clip(dot(normal, unit(view + light)), 0, 1) ** surface.sharpness
    glint = glint * surface.highlight * lit * (np.float32(0.55) * power)
    return tone(np.maximum(reflect(surface.albedo) * diffuse + glint[:, None], 0))


def background(look: Appearance, width: int, rng: np.random.Generator) -> Floats:
    """A cloudy gradient (width, width, 3) from the look's top to its bottom colour."""
    place = (np.arange(width, dtype=np.float32) + 0.5) / width
    knots = np.linspace(-0.1, 1.1, 12, dtype=np.float32)
    weights = bell(place[:, None] - knots, 1 / 9)
    weights /= np.sqrt((weights * weights).sum(axis=1, keepdims=True))
    field = rng.standard_normal((len(knots), len(knots)), dtype=np.float32)
    clouds = np.einsum("yi,ix->yx", weights, np.einsum("ij,xj->ix", field, weights))
    share = np.clip(place[:, None] + np.float32(0.045) * clouds, 0, 1)[:, :, None]
    top, bottom = np.array(look.background, np.float32)
    return top + (bottom - top) * share


def draw(
    scene: Scene, identity: Identity, look: Appearance, size: int, rng: np.random.Generator, supersample: int = 1
) -> Picture:
    """Photograph a scene, `size` pixels square.

    `rng` makes the clouds of the background and the grain. With `supersample` n the picture is the mean of n x n
    points a pixel (n = 2 costs about twice the time and smooths edges).
    """
    model = load_head_model()
    mesh, positions = scene.mesh, scene.positions
    head = np.ascontiguousarray(positions[model.head].T)  # numpy finds extremes much faster along rows
    low, high = head.min(axis=1), head.max(axis=1)
    target = (low + high) / 2 + np.array((*look.shift, 0), np.float32)
    width = size * supersample
    focal = width * look.zoom * CAMERA_DISTANCE / (float(high[1] - low[1]) * 1.02)  # pixels

    def project(points: Floats) -> Floats:
        nearness = 1 / (np.float32(CAMERA_DISTANCE) - (points[:, 2] - target[2]))
        scale = np.float32(focal) * nearness
        x, y = (points[:, 0] - target[0]) * scale, (points[:, 1] - target[1]) * scale
        return np.stack([np.float32(width / 2) + x, np.float32(width / 2) - y, nearness], axis=1)

    screen = project(positions)
    solid, see_through = mesh.triangles[: mesh.opaque], mesh.triangles[mesh.opaque :]
    closed = len(model.body_triangles)  # they come first
    nearest = np.zeros((width, width), np.float32)
    covering = np.full((width, width), -1, np.int32)
    raster.rasterise(screen, solid, closed, nearest, covering)
    pixels = np.flatnonzero(covering.ravel() >= 0)

    values = np.zeros((len(positions), 14), np.float32)
    values[:, 0:3] = positions
    values[:, 3:6] = raster.vertex_normals(positions, mesh.triangles)
    values[:, 6:9] = mesh.rest
    for column, name in enumerate(PAINTED, 9):
        value = getattr(model, name)
        values[: len(value), column] = value
    values = raster.interpolate(screen, solid, covering, pixels, values)
    position, normal = values[:, 0:3], unit(values[:, 3:6])
    view = unit(np.array((target[0], target[1], target[2] + CAMERA_DISTANCE), np.float32) - position)
    normal *= np.where(dot(normal, view) < 0, np.float32(-1), np.float32(1))[:, None]

    points = Points(
        part=mesh.part[covering.ravel()[pixels]],
        rest=values[:, 6:9],
        normal=normal,
        **{name: values[:, column] for column, name in enumerate(PAINTED, 9)},
    )
    lit = raster.lit_shares(positions, solid, closed, position, normal, light_direction(look))
    surface = paint(points, identity, look)
    canvas = background(look, width, rng)
    canvas.reshape(-1, 3)[pixels] = shade(points, surface, view, lit, look)
    segmentation = np.zeros((width, width), np.uint8)
    segmentation.reshape(-1)[pixels] = surface.label
    if len(see_through):
        lens = np.full((width, width), -1, np.int32)
        raster.rasterise(screen, see_through, 0, nearest, lens)
        canvas[lens >= 0] = canvas[lens >= 0] * np.float32(0.93) + np.float32(0.045)
    if supersample > 1:
        canvas = canvas.reshape(size, supersample, size, supersample, 3).mean(axis=(1, 3))
        segmentation = np.ascontiguousarray(
            segmentation[supersample // 2 :: supersample, supersample // 2 :: supersample]
        )
    canvas += (rng.random(canvas.shape, dtype=np.float32) - np.float32(0.5)) * np.float32(GRAIN)
    image = (np.clip(canvas, 0, 1) * 255).astype(np.uint8)
    return Picture(image, segmentation, project(scene.landmarks)[:, :2] / np.float32(supersample))


def _lab(srgb: NDArray[Any]) -> NDArray[np.float64]:
    """CIELAB (..., 3), white D65, of sRGB values 0..1."""
    value = np.asarray(srgb, np.float64)
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    to_xyz = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))
    white = (0.95047, 1.0, 1.08883)
    xyz = np.stack([(linear * row).sum(axis=-1) / w for row, w in zip(to_xyz, white, strict=True)], axis=-1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def monk_tone(srgb: Floats) -> int:
    """The nearest swatch, 1..10, of the Monk Skin Tone scale to an sRGB colour (3,) in 0..1."""
    swatches = np.array([list(bytes.fromhex(code)) for code in MONK_SWATCHES]) / 255
    return 1 + int(((_lab(swatches) - _lab(srgb)) ** 2).sum(axis=1).argmin())


def _exactly(names: tuple[str, ...], true: str) -> dict[str, bool]:
    return {name: name == true for name in names}


def visible_attributes(identity: Identity, look: Appearance, segmentation: NDArray[np.uint8]) -> dict[str, bool]:
    """Attribute name to value; a name whose evidence cannot be seen in the picture is left out."""
    scale = segmentation.size / 128**2
    pixels = np.bincount(segmentation.ravel(), minlength=len(CLASS)) / scale
    attributes = {
        **({} if look.hat else _exactly(HAIR_STYLES, look.hair_style)),
        "Bangs": look.bangs,
        **_exactly(BEARDS, look.beard),
        **_exactly(EYEWEAR, look.eyewear),
        "Wearing_Lipstick": look.lipstick,
    }
    if pixels[CLASS["hair"]] >= HAIR_PIXELS:
        attributes |= _exactly(HAIR_COLORS, identity.hair_color)
    if not look.hat or pixels[CLASS["hat"]] >= HAT_PIXELS:
        attributes["Wearing_Hat"] = look.hat
    if not look.earrings or pixels[CLASS["ear_r"]] >= EARRING_PIXELS:
        attributes["Wearing_Earrings"] = look.earrings
    if pixels[CLASS["l_eye"]] + pixels[CLASS["r_eye"]] >= EYE_PIXELS and look.eyewear != "Sunglasses":
        attributes |= _exactly(EYE_COLORS, identity.eye_color)
    return attributes


def visible_action_units(look: Appearance) -> dict[str, float]:
    """Action unit to intensity 0..5, as `action_units` has it; those of lids behind sunglasses are left out."""
    intensity = sampling.action_units(look.units)
    hidden = LID_ACTIONS if look.eyewear == "Sunglasses" else ()
    return {name: value for name, value in intensity.items() if name not in hidden}


def _face_box(segmentation: NDArray[np.uint8]) -> list[float]:
    """[x0, y0, x1, y1] in pixels around skin, features and ears; x1 and y1 lie just outside."""
    is_face = np.zeros(len(CLASS), bool)
    is_face[[CLASS[name] for name in FACE_CLASSES]] = True
    face = is_face[segmentation]
    columns, rows = np.flatnonzero(face.any(axis=0)), np.flatnonzero(face.any(axis=1))
    return [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)]


def _encoded(pixels: NDArray[np.uint8], **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **options)
    return buffer.getvalue()


def render_identity(seed: int, identity: int, images: int, size: int, supersample: int = 1) -> list[dict[str, Any]]:
    """Draw one synthetic person `images` times, `size` pixels square: a dict a face row, plain values only.

    Keys: image (JPEG), width, height, source, source_id, subject, box, landmarks (eye at image left, eye at image
    right, nose tip, mouth corner at image left, at image right), segmentation (PNG of class numbers), attributes,
    expression, action_units (intensity 0..5), age, gender, skin_tone, yaw, pitch, roll (degrees; signs as in
    `model.head_rotation`).
    """
    person = sampling.sample_identity(np.random.default_rng([seed, identity]))
    shape = shape_head(person)
    tone = monk_tone(shown_colour(skin_albedo(person.melanin)))
    rows = []
    for k in range(images):
        rng = np.random.default_rng([seed, identity, k + 1])  # a trailing 0 would repeat the person's own numbers
        look = sampling.sample_appearance(rng, person)
        picture = draw(stage(shape, look), person, look, size, rng, supersample)
        rows.append(
            {
                "image": _encoded(picture.image, format="JPEG", quality=JPEG_QUALITY),
                "width": size,
                "height": size,
                "source": "render",
                "source_id": f"{seed}-{identity:06d}-{k}",
                "subject": f"{seed}-{identity}",
                "box": _face_box(picture.segmentation),
                "landmarks": picture.landmarks.astype(float).tolist(),
                "segmentation": _encoded(picture.segmentation, format="PNG"),
                "attributes": visible_attributes(person, look, picture.segmentation),
                "expression": look.expression,
                "action_units": visible_action_units(look),
                "age": person.age,
                "gender": person.gender,
                "skin_tone": tone,
                "yaw": look.yaw,
                "pitch": look.pitch,
                "roll": look.roll,
            }
        )
    return rows
