"""MediaPipe's face detector and face mesh, run by LiteRT: from a picture to 468 points, five landmarks and head pose.

    detector, mesh = Network(folder / DETECTOR), Network(folder / MESH)
    points = face_points(opened(data), box, detector, mesh)      # (468, 3) or None
    landmarks(points), head_pose(points)

Two networks of 0.2 and 1.2 MB, about 6 ms a face on one core. Shapes, scales and thresholds are those of MediaPipe's
graphs face_detection_short_range, face_detection_front_detection_to_roi and face_landmark (Apache-2.0).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from facemllm.core import digests
from facemllm.errors import UserError, one_line

DETECTOR = "face_detection_short_range.tflite"
MESH = "face_landmark.tflite"
NOT_INSTALLED = "faces are found by LiteRT, which is not installed; get it with: pip install 'facemllm[experts]'"

RELEASE = "mediapipe==0.10.21"
"""The last release on PyPI whose wheel carries the files below; they are the same in 0.10.14."""

# File of the expert: its place in the wheel, its size in bytes, its SHA-256.
WEIGHTS = {
    DETECTOR: (
        "mediapipe/modules/face_detection/face_detection_short_range.tflite",
        229_714,
        "bbff11cebd1eb27a1e004cae0b0e63ec8c551cbf34a4451148b4908b8db3eca8",
    ),
    MESH: (
        "mediapipe/modules/face_landmark/face_landmark.tflite",
        1_242_398,
        "1055cb9d4a9ca8b8c688902a3a5194311138ba256bcc94e336d8373a5f30c814",
    ),
}
FETCH = "python -m facemllm.annotate.experts"

Floats = NDArray[np.float64]

DETECTOR_SIDE = 128  # pixels of its square input
DETECTOR_GRIDS = ((16, 2), (8, 6))  # cells a side, and anchors in each
MESH_SIDE = 192
MESH_POINTS = 468
_LOGIT = 0.0  # answers below it, a probability of one half, are no faces; for either network
OVERLAP = 0.3
CROP_MARGIN = 1.5  # side of the mesh's input over that of a detected face, or of the mesh itself
BOX_MARGIN = 1.25  # the same over a label's box, which encloses more of the head than a detection
LOOK_MARGIN = 2.0  # side of the part of the picture that is searched, over that of a label's box

RIGHT_EYE, LEFT_EYE = (33, 133, 159, 145), (263, 362, 386, 374)  # corners and lids; the subject's right and left
NOSE_TIP = 1
RIGHT_MOUTH_CORNER, LEFT_MOUTH_CORNER = 61, 291

# Where points that no expression moves far lie on a face that looks straight ahead: x to image right, y up, z to the
# camera, mean distance from their middle about 1. One row a pair (the point of the subject's right side, then its twin
# with x mirrored) or a point of the middle line. Not MediaPipe's own table: the mean of the mesh's answers to 200 drawn
# heads (`render_identity`, seed 100), each turned back by its true pose and made symmetric; a test makes it again.
RESTING: dict[tuple[int, ...], tuple[float, float, float]] = {
    (109, 338): (-0.256, 1.069, 0.332),
    (67, 297): (-0.476, 1.034, 0.245),
    (103, 332): (-0.68, 0.953, 0.096),
    (54, 284): (-0.815, 0.83, -0.072),
    (21, 251): (-0.9, 0.673, -0.233),
    (162, 389): (-0.942, 0.508, -0.397),
    (127, 356): (-0.951, 0.305, -0.526),
    (234, 454): (-0.935, 0.114, -0.582),
    (93, 323): (-0.919, -0.08, -0.584),
    (132, 361): (-0.887, -0.287, -0.55),
    (58, 288): (-0.824, -0.504, -0.471),
    (172, 397): (-0.735, -0.676, -0.34),
    (136, 365): (-0.633, -0.8, -0.192),
    (150, 379): (-0.506, -0.903, -0.073),
    (149, 378): (-0.4, -0.974, 0.019),
    (176, 400): (-0.291, -1.038, 0.115),
    (148, 377): (-0.163, -1.085, 0.179),
    (33, 263): (-0.613, 0.362, 0.136),
    (133, 362): (-0.236, 0.335, 0.217),
    (98, 327): (-0.212, -0.227, 0.401),
    (10,): (0.0, 1.076, 0.354),
    (168,): (0.0, 0.431, 0.421),
    (6,): (0.0, 0.314, 0.48),
    (197,): (0.0, 0.218, 0.549),
    (195,): (0.0, 0.132, 0.621),
    (5,): (0.0, 0.039, 0.696),
    (4,): (0.0, -0.074, 0.731),
    (2,): (0.0, -0.25, 0.506),
    (152,): (0.0, -1.102, 0.203),
}


def verified(path: Path, sha256: str, setting: str) -> None:
    """Raises UserError when a file of weights, whose folder `setting` names, is missing or another one."""
    if not path.is_file():
        raise UserError(f"{setting}: {path} is missing; get it with: {FETCH} {path.parent}")
    if digests.of_file(path) != sha256:
        raise UserError(f"{path}: not the file of {RELEASE}; remove it and run: {FETCH} {path.parent}")


@dataclass(frozen=True)
class Crop:
    """A square of a picture: its centre and side in pixels, turned clockwise in the image by `angle` (radians)."""

    x: float
    y: float
    side: float
    angle: float = 0.0

    def taken(self, picture: Image.Image, side: int) -> NDArray[np.float32]:
        """Its pixels (side, side, 3), values 0..255; black outside the picture."""
        along, across = self._axes(side)
        middle = side / 2
        x, y = self.x - (along - across) * middle, self.y - (across + along) * middle
        affine = (along, -across, x, across, along, y)
        turned = picture.transform((side, side), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
        return np.asarray(turned, np.float32)

    def placed(self, points: Floats, side: int) -> Floats:
        """Points (n, 2 or 3), in pixels of `taken`, in pixels of the picture; a depth is scaled alike."""
        along, across = self._axes(side)
        x, y = points[:, 0] - side / 2, points[:, 1] - side / 2
        columns = [self.x + along * x - across * y, self.y + across * x + along * y]
        columns += [points[:, 2] * (self.side / side)] if points.shape[1] == 3 else []
        return np.stack(columns, axis=1)

    def _axes(self, side: int) -> tuple[float, float]:
        """Cosine and sine of the angle, times pixels of the picture a pixel of `taken`."""
        scale = self.side / side
        return math.cos(self.angle) * scale, math.sin(self.angle) * scale


class Network:
    """A .tflite file, one picture at a time, on one thread."""

    def __init__(self, path: Path) -> None:
        """Raises UserError when LiteRT is not installed or refuses the file."""
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError:
            raise UserError(NOT_INSTALLED) from None
        try:
            self._interpreter = Interpreter(model_path=str(path), num_threads=1)
            self._interpreter.allocate_tensors()
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{path}: LiteRT cannot run it: {one_line(error)}") from None
        self._input = self._interpreter.get_input_details()[0]["index"]
        self._outputs = [output["index"] for output in self._interpreter.get_output_details()]

    def __call__(self, pixels: NDArray[np.float32]) -> list[Floats]:
        """All outputs, without the batch axis, for one input (height, width, 3)."""
        self._interpreter.set_tensor(self._input, pixels[None])
        self._interpreter.invoke()
        return [self._interpreter.get_tensor(output)[0].astype(np.float64) for output in self._outputs]


def face_points(
    picture: Image.Image, box: Sequence[float] | None, detector: Network, mesh: Network
) -> NDArray[np.float64] | None:
    """The mesh (468, 3) of the face in an RGB picture, or None when there is none. In pixels: x to the right, y down, z
    away from the camera in the same unit, 0 near the middle of the head. `box` [x0, y0, x1, y1] says which face is
    meant and stands in where the detector finds nothing."""
    crop = _detected(picture, box, detector)
    if crop is None and box is not None:
        crop = Crop(*_middle(box), BOX_MARGIN * _side(box))
    if crop is None or crop.side < 1:
        return None
    points, _ = _meshed(picture, crop, mesh)
    if not np.isfinite(points).all():
        return None
    # once more on a crop around the points themselves, upright: the answer hangs less on where the first one lay
    points, is_face = _meshed(picture, _around(points), mesh)
    return points if is_face else None


def found_faces(picture: Image.Image, detector: Network) -> list[tuple[float, float, float, float, float]]:
    """Faces in an RGB picture, the surest first: left, top, right, bottom as shares of the longer side, and the logit.
    Of answers that overlap by more than `OVERLAP` (intersection over union) the surest is kept."""
    width, height = picture.size
    whole = Crop(width / 2, height / 2, max(width, height))
    regressed, logits = detector(whole.taken(picture, DETECTOR_SIDE) / np.float32(127.5) - 1)
    anchors, kept = _anchors(), list[tuple[float, float, float, float, float]]()
    for n in np.argsort(-logits[:, 0]):
        if (logit := float(logits[n, 0])) < _LOGIT:
            break
        (x, y), (w, h) = (regressed[n, :2] + anchors[n]) / DETECTOR_SIDE, regressed[n, 2:4] / DETECTOR_SIDE
        box = (float(x - w / 2), float(y - h / 2), float(x + w / 2), float(y + h / 2), logit)
        if all(_overlap(box, one) <= OVERLAP for one in kept):
            kept.append(box)
    return kept


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes."""
    across, down = (min(one[n + 2], other[n + 2]) - max(one[n], other[n]) for n in (0, 1))
    both = max(0.0, across) * max(0.0, down)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return both / (areas - both) if areas > both else 0.0


def _detected(picture: Image.Image, box: Sequence[float] | None, detector: Network) -> Crop | None:
    """A crop for the mesh around the surest face, of those whose middle lies in the box if there is one."""
    width, height = picture.size
    look = Crop(width / 2, height / 2, max(width, height))
    if box is not None and _side(box) * LOOK_MARGIN < look.side:
        look = Crop(*_middle(box), _side(box) * LOOK_MARGIN)
    regressed, logits = detector(look.taken(picture, DETECTOR_SIDE) / np.float32(127.5) - 1)
    anchors = _anchors()
    centres = look.placed(regressed[:, :2] + anchors, DETECTOR_SIDE)
    sure = logits[:, 0] >= _LOGIT
    if box is not None:
        sure &= (centres >= box[:2]).all(axis=1) & (centres <= box[2:]).all(axis=1)
    if not sure.any():
        return None
    best = int(np.where(sure, logits[:, 0], -np.inf).argmax())
    # of each answer: centre, size, then six keypoints of which the first are the right and the left eye
    _, size, right_eye, left_eye, *_ = regressed[best].reshape(-1, 2)
    right_eye, left_eye = look.placed(np.stack([right_eye, left_eye]) + anchors[best], DETECTOR_SIDE)
    x, y = centres[best]
    side = float(size.max()) * look.side / DETECTOR_SIDE
    return Crop(float(x), float(y), CROP_MARGIN * side, _slope(right_eye, left_eye))


def _meshed(picture: Image.Image, crop: Crop, mesh: Network) -> tuple[Floats, bool]:
    """The mesh (468, 3) in the picture's pixels, and whether the network takes it for a face."""
    points, logit = mesh(crop.taken(picture, MESH_SIDE) / np.float32(255))
    return crop.placed(points.reshape(MESH_POINTS, 3), MESH_SIDE), bool(logit.ravel()[0] >= _LOGIT)


def _around(points: Floats) -> Crop:
    """A crop for the mesh around its own points, turned with the eyes."""
    angle = _slope(points[RIGHT_EYE[0]], points[LEFT_EYE[0]])
    cosine, sine = math.cos(angle), math.sin(angle)
    along = np.array([[cosine, sine], [-sine, cosine]])
    upright = points[:, :2] @ along.T
    low, high = upright.min(axis=0), upright.max(axis=0)
    x, y = ((low + high) / 2) @ along
    return Crop(float(x), float(y), CROP_MARGIN * float((high - low).max()), angle)


def landmarks(points: Floats) -> list[list[float]]:
    """Five landmarks in pixels, as the `faces` table has them: eye at image left, eye at image right, nose tip, mouth
    corner at image left, at image right (on a face that is not upside down)."""
    eyes = [points[list(eye), :2].mean(axis=0) for eye in (RIGHT_EYE, LEFT_EYE)]
    others = [points[number, :2] for number in (NOSE_TIP, RIGHT_MOUTH_CORNER, LEFT_MOUTH_CORNER)]
    return [[round(float(x), 2), round(float(y), 2)] for x, y in (*eyes, *others)]


def head_pose(points: Floats) -> tuple[float, float, float]:
    """(yaw, pitch, roll) in degrees of a mesh (468, 3), with the signs of 300W-LP's Pose_Para. The rotation that takes
    the resting face to the points best (Kabsch 1976), written as Rx(pitch) Ry(yaw) Rz(roll) of 3DDFA: yaw > 0 turns the
    nose to the image's left, pitch > 0 raises it, roll > 0 leans the head clockwise."""
    numbers, resting = resting_face()
    turned = points[numbers] * (1, -1, -1)
    left, _, right = np.linalg.svd((turned - turned.mean(axis=0)).T @ (resting - resting.mean(axis=0)))
    rotation = left @ np.diag([1, 1, np.sign(np.linalg.det(left @ right))]) @ right
    yaw = math.asin(min(max(-rotation[0, 2], -1), 1))
    pitch = math.atan2(rotation[1, 2], rotation[2, 2])
    roll = math.atan2(rotation[0, 1], rotation[0, 0])
    return round(math.degrees(yaw), 2), round(math.degrees(pitch), 2), round(math.degrees(roll), 2)


def resting_face() -> tuple[list[int], Floats]:
    """Numbers of the points in `RESTING`, and where they lie (n, 3) on a face that looks straight ahead."""
    numbers: list[int] = []
    places: list[tuple[float, float, float]] = []
    for names, (x, y, z) in RESTING.items():
        numbers += names
        places += [(x, y, z), (-x, y, z)][: len(names)]
    return numbers, np.array(places)


def _anchors() -> Floats:
    """Corners (896, 2), in pixels of the detector's input, from which its answers are counted: middles of the cells."""
    grids = []
    for cells, count in DETECTOR_GRIDS:
        row, column = np.mgrid[0:cells, 0:cells]
        middles = np.stack([column, row], axis=-1).reshape(-1, 2) + 0.5
        grids.append(np.repeat(middles * (DETECTOR_SIDE / cells), count, axis=0))
    return np.concatenate(grids)


def _middle(box: Sequence[float]) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def _side(box: Sequence[float]) -> float:
    return max(box[2] - box[0], box[3] - box[1])


def _slope(start: Any, end: Any) -> float:
    return math.atan2(end[1] - start[1], end[0] - start[0])
