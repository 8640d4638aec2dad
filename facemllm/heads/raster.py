"""The loops that numpy is slow at, compiled by numba: rasterising, morphing, normals, noise, shadows; and vectors.

Everything is single-threaded and without fast-math, so the same arguments give the same bytes in any process. The
first call in a fresh clone compiles for a few seconds; the result is cached on disk beside this file.

Arrays are C-contiguous; floats are float32 unless said, vertex numbers int32. N vertices, T triangles, K pixels.
"""

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

NOISE_PERIOD = 64
"""The noise repeats after this many cells along each axis; a power of two."""

NOISE_CELLS: Floats = np.random.default_rng(7).standard_normal((NOISE_PERIOD,) * 3).astype(np.float32)

SHADOW_SIZE = 224  # pixels of the square shadow map
SHADOW_EXTENT = 7.0  # dm it covers
SHADOW_CENTRE = np.array((0, 6.6, 0.3), np.float32)
SHADOW_BIAS = 0.10  # dm


@njit(cache=True, error_model="numpy")
def rasterise(screen: Floats, triangles: Ints, closed: int, nearest: Floats, covering: Ints) -> None:
    """Draw triangles into a z-buffer, in place.

    `screen` (N, 3): x and y in pixels (a pixel's centre is at .5) and a nearness that grows towards the viewer and is
    linear in the picture: 1/distance in perspective, any height in an orthographic view. `nearest` (H, W) holds the
    greatest nearness seen, `covering` (H, W) the number of the triangle it came from. The first `closed` triangles
    bound a solid, counter-clockwise from outside: those that turn their back are skipped.
    """
    height, width = nearest.shape
    for t in range(triangles.shape[0]):
        a, b, c = triangles[t, 0], triangles[t, 1], triangles[t, 2]
        x0, y0 = np.float64(screen[a, 0]), np.float64(screen[a, 1])
        x1, y1 = np.float64(screen[b, 0]), np.float64(screen[b, 1])
        x2, y2 = np.float64(screen[c, 0]), np.float64(screen[c, 1])
        area = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)
        if abs(area) < 1e-9 or (t < closed and area > 0.0):
            continue
        top = max(0, math.ceil(min(y0, y1, y2) - 0.5))
        bottom = min(height - 1, math.floor(max(y0, y1, y2) - 0.5))
        if top > bottom:
            continue
        left = max(0, math.ceil(min(x0, x1, x2) - 0.5))
        right = min(width - 1, math.floor(max(x0, x1, x2) - 0.5))
        if left > right:
            continue
        n0, n1, n2 = screen[a, 2], screen[b, 2], screen[c, 2]
        w1_dx, w1_dy = (y2 - y0) / area, -(x2 - x0) / area
        w2_dx, w2_dy = -(y1 - y0) / area, (x1 - x0) / area
        for y in range(top, bottom + 1):
            row1 = (y + 0.5 - y0) * w1_dy - x0 * w1_dx
            row2 = (y + 0.5 - y0) * w2_dy - x0 * w2_dx
            for x in range(left, right + 1):
                w1 = row1 + (x + 0.5) * w1_dx
                w2 = row2 + (x + 0.5) * w2_dx
                w0 = 1.0 - w1 - w2
                if w0 < 0.0 or w1 < 0.0 or w2 < 0.0:
                    continue
                near = np.float32(w0 * n0 + w1 * n1 + w2 * n2)
                if near > nearest[y, x]:
                    nearest[y, x] = near
                    covering[y, x] = t


@njit(cache=True, error_model="numpy")
def interpolate(screen: Floats, triangles: Ints, covering: Ints, pixels: NDArray[np.int64], values: Floats) -> Floats:
    """Perspective-correct values (K, C) of per-vertex `values` (N, C) at flat pixel numbers `pixels` (K,).

    `screen` and `covering` are those of `rasterise`, with nearness 1/distance.
    """
    width = covering.shape[1]
    channels = values.shape[1]
    out = np.empty((pixels.size, channels), np.float32)
    for k in range(pixels.size):
        y, x = pixels[k] // width, pixels[k] % width
        t = covering[y, x]
        a, b, c = triangles[t, 0], triangles[t, 1], triangles[t, 2]
        x0, y0 = np.float64(screen[a, 0]), np.float64(screen[a, 1])
        x1, y1 = screen[b, 0] - x0, screen[b, 1] - y0
        x2, y2 = screen[c, 0] - x0, screen[c, 1] - y0
        dx, dy = x + 0.5 - x0, y + 0.5 - y0
        area = x1 * y2 - x2 * y1
        w1 = (dx * y2 - x2 * dy) / area
        w2 = (x1 * dy - dx * y1) / area
        w0 = (1.0 - w1 - w2) * screen[a, 2]
        w1 *= screen[b, 2]
        w2 *= screen[c, 2]
        total = w0 + w1 + w2
        w0, w1, w2 = w0 / total, w1 / total, w2 / total
        for channel in range(channels):
            out[k, channel] = w0 * values[a, channel] + w1 * values[b, channel] + w2 * values[c, channel]
    return out


@njit(cache=True, error_model="numpy")
def vertex_normals(vertices: Floats, triangles: Ints) -> Floats:
    """Unit normals (N, 3), each the area-weighted mean of its triangles'; zero where a vertex has none."""
    normals = np.zeros_like(vertices)
    for t in range(triangles.shape[0]):
        a, b, c = triangles[t, 0], triangles[t, 1], triangles[t, 2]
        ux, uy, uz = (vertices[b, 0] - vertices[a, 0], vertices[b, 1] - vertices[a, 1], vertices[b, 2] - vertices[a, 2])
        vx, vy, vz = (vertices[c, 0] - vertices[a, 0], vertices[c, 1] - vertices[a, 1], vertices[c, 2] - vertices[a, 2])
        nx, ny, nz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
        for corner in (a, b, c):
            normals[corner, 0] += nx
            normals[corner, 1] += ny
            normals[corner, 2] += nz
    for n in range(normals.shape[0]):
        x, y, z = normals[n, 0], normals[n, 1], normals[n, 2]
        scale = np.float32(1.0) / max(np.float32(math.sqrt(x * x + y * y + z * z)), np.float32(1e-9))
        normals[n, 0], normals[n, 1], normals[n, 2] = x * scale, y * scale, z * scale
    return normals


@njit(cache=True, error_model="numpy")
def transform(points: Floats, matrix: Floats, pivot: Floats) -> Floats:
    """`matrix` (3, 3) applied to points (N, 3) about a pivot (3,)."""
    out = np.empty_like(points)
    for n in range(points.shape[0]):
        x, y, z = points[n, 0] - pivot[0], points[n, 1] - pivot[1], points[n, 2] - pivot[2]
        for axis in range(3):
            out[n, axis] = matrix[axis, 0] * x + matrix[axis, 1] * y + matrix[axis, 2] * z + pivot[axis]
    return out


@njit(cache=True, error_model="numpy")
def add_targets(
    vertices: Floats, targets: Ints, weights: Floats, start: Ints, moved: NDArray[np.uint16], delta: Floats
) -> None:
    """Add weighted morph targets to `vertices` (N, 3) in place.

    Target i moves vertex `moved[j]` by `delta[j]` (3,) for j in `start[i]` .. `start[i + 1]`.
    """
    for k in range(targets.size):
        weight = weights[k]
        for j in range(start[targets[k]], start[targets[k] + 1]):
            for axis in range(3):
                vertices[moved[j], axis] += weight * delta[j, axis]


@njit(cache=True, error_model="numpy")
def _noise(points: Floats, frequency: float, offset: float, cells: Floats) -> Floats:
    last = cells.shape[0] - 1
    out = np.empty(points.shape[0], np.float32)
    for k in range(points.shape[0]):
        x = points[k, 0] * frequency + offset
        y = points[k, 1] * frequency + offset
        z = points[k, 2] * frequency + offset
        fx, fy, fz = math.floor(x), math.floor(y), math.floor(z)
        x, y, z = x - fx, y - fy, z - fz
        i0, j0, k0 = int(fx) & last, int(fy) & last, int(fz) & last
        i1, j1, k1 = (i0 + 1) & last, (j0 + 1) & last, (k0 + 1) & last
        near = (cells[i0, j0, k0] * (1 - z) + cells[i0, j0, k1] * z) * (1 - y) + (
            cells[i0, j1, k0] * (1 - z) + cells[i0, j1, k1] * z
        ) * y
        far = (cells[i1, j0, k0] * (1 - z) + cells[i1, j0, k1] * z) * (1 - y) + (
            cells[i1, j1, k0] * (1 - z) + cells[i1, j1, k1] * z
        ) * y
        out[k] = near * (1 - x) + far * x
    return out


def noise(points: Floats, frequency: float, seed: int = 0) -> Floats:
    """Smooth noise (K,) with mean 0 and deviation at most 1 at points (K, 3); `frequency` in cells a unit of length."""
    return _noise(np.ascontiguousarray(points, np.float32), float(frequency), seed * 7.31, NOISE_CELLS)


@njit(cache=True, error_model="numpy")
def lit_share(shadow_points: Floats, nearest: Floats, bias: float) -> Floats:
    """Share 0..1 (K,) of light that reaches each point, softened over five taps of a shadow map.

    `shadow_points` (K, 3) and `nearest` (H, W) are as in `rasterise`, seen orthographically from the light; a point
    is in shadow where something is nearer to the light by more than `bias`.
    """
    height, width = nearest.shape
    out = np.empty(shadow_points.shape[0], np.float32)
    for k in range(shadow_points.shape[0]):
        reached = 0
        for dx, dy in ((0.0, 0.0), (1.2, 0.6), (-0.7, 1.2), (-1.1, -0.6), (0.6, -1.2)):
            x = min(max(int(shadow_points[k, 0] + dx), 0), width - 1)
            y = min(max(int(shadow_points[k, 1] + dy), 0), height - 1)
            if shadow_points[k, 2] + bias > nearest[y, x]:
                reached += 1
        out[k] = reached / 5.0
    return out


def dot(vectors: Floats, others: Floats) -> Floats:
    """Scalar products (K,) of vectors (K, 3) with others (K, 3) or (3,), summed in a fixed order."""
    return vectors[:, 0] * others[..., 0] + vectors[:, 1] * others[..., 1] + vectors[:, 2] * others[..., 2]


def unit(vectors: Floats) -> Floats:
    """Vectors (..., 3) scaled to length 1; zero stays zero."""
    x, y, z = vectors[..., 0], vectors[..., 1], vectors[..., 2]
    return vectors * (1 / np.sqrt(np.maximum(x * x + y * y + z * z, np.float32(1e-18))))[..., None]


def lit_shares(
    vertices: Floats, triangles: Ints, closed: int, position: Floats, normal: Floats, light: Floats
) -> Floats:
    """Share (K,) of the key light that reaches points at `position` (K, 3) past a mesh (see `rasterise`)."""
    aside = unit(np.cross(np.array((0, 1, 0), np.float32), light))
    above = np.cross(light, aside)

    def from_light(points: Floats) -> Floats:
        scale, middle = np.float32(SHADOW_SIZE / SHADOW_EXTENT), np.float32(SHADOW_SIZE / 2)
        local = points - SHADOW_CENTRE
        x, y = middle + scale * dot(local, aside), middle - scale * dot(local, above)
        return np.stack([x, y, dot(local, light)], axis=1)

    nearest = np.full((SHADOW_SIZE, SHADOW_SIZE), -1e9, np.float32)
    covering = np.full((SHADOW_SIZE, SHADOW_SIZE), -1, np.int32)
    rasterise(from_light(vertices), triangles, closed, nearest, covering)
    return lit_share(from_light(position + normal * np.float32(0.05)), nearest, SHADOW_BIAS)
