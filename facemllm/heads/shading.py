"""Light on surfaces, the tone curve, and the background. K points; colours (K, 3)."""

import numpy as np

from facemllm.heads import raster
from facemllm.heads.materials import Points, Surface
from facemllm.heads.model import Floats, Part, bell
from facemllm.heads.raster import Ints
from facemllm.heads.sampling import Appearance

SHADOW_SIZE = 224  # pixels of the square shadow map
SHADOW_EXTENT = 7.0  # dm it covers
SHADOW_CENTRE = np.array((0, 6.6, 0.3), np.float32)
SHADOW_BIAS = 0.10  # dm
REFERENCE_LIGHT = 0.85
"""Diffuse light on a typical lit patch of skin: at it a colour counts as 'as shown'."""


def dot(vectors: Floats, others: Floats) -> Floats:
    """Scalar products (K,) of vectors (K, 3) with others (K, 3) or (3,), summed in a fixed order."""
    return vectors[:, 0] * others[..., 0] + vectors[:, 1] * others[..., 1] + vectors[:, 2] * others[..., 2]


def unit(vectors: Floats) -> Floats:
    """Vectors (..., 3) scaled to length 1; zero stays zero."""
    x, y, z = vectors[..., 0], vectors[..., 1], vectors[..., 2]
    return vectors * (1 / np.sqrt(np.maximum(x * x + y * y + z * z, np.float32(1e-18))))[..., None]


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


def lit_shares(
    vertices: Floats, triangles: Ints, closed: int, position: Floats, normal: Floats, light: Floats
) -> Floats:
    """Share (K,) of the key light that reaches points at `position` (K, 3) past a mesh (see `raster.rasterise`)."""
    aside = unit(np.cross(np.array((0, 1, 0), np.float32), light))
    above = np.cross(light, aside)

    def from_light(points: Floats) -> Floats:
        scale, middle = np.float32(SHADOW_SIZE / SHADOW_EXTENT), np.float32(SHADOW_SIZE / 2)
        local = points - SHADOW_CENTRE
        x, y = middle + scale * dot(local, aside), middle - scale * dot(local, above)
        return np.stack([x, y, dot(local, light)], axis=1)

    nearest = np.full((SHADOW_SIZE, SHADOW_SIZE), -1e9, np.float32)
    covering = np.full((SHADOW_SIZE, SHADOW_SIZE), -1, np.int32)
    raster.rasterise(from_light(vertices), triangles, closed, nearest, covering)
    return raster.lit_share(from_light(position + normal * np.float32(0.05)), nearest, SHADOW_BIAS)


def shade(points: Points, surface: Surface, view: Floats, lit: Floats, look: Appearance) -> Floats:
    """Display colours (K, 3), not clipped above. `view` (K, 3): unit vectors to the camera; `lit` (K,): see above."""
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
