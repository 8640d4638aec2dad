"""The renderer: same bytes for the same numbers, and labels that agree with the picture."""

import hashlib
import io
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from facemllm.sources.head_model import head_angles, head_rotation, load_head_model
from facemllm.sources.head_sampling import (
    BEARDS,
    EXPRESSIONS,
    EYE_COLORS,
    EYEWEAR,
    HAIR_COLORS,
    HAIR_STYLES,
    sample_appearance,
    sample_identity,
)
from facemllm.sources.materials import CLASS, SEGMENTATION_CLASSES
from facemllm.sources.render import draw, monk_tone, render_identity, shape_head, stage, visible_attributes

SIZE = 128
IDENTITIES = 90


def classes(row):
    return np.asarray(Image.open(io.BytesIO(row["segmentation"])))


def share_near(segmentation, name, point, reach):
    """Whether a pixel of the class lies within `reach` pixels of a point."""
    y, x = np.nonzero(segmentation == CLASS[name])
    return bool(len(x)) and bool(np.hypot(x + 0.5 - point[0], y + 0.5 - point[1]).min() <= reach)


def digest(row):
    return hashlib.sha256(repr(sorted(row.items())).encode()).hexdigest()


@pytest.fixture(scope="module")
def rows():
    return [row for identity in range(IDENTITIES) for row in render_identity(3, identity, 2, SIZE)]


@pytest.fixture(scope="module")
def head():
    """A frontal neutral woman without accessories: identity, look, shape."""
    for number in range(100):
        identity = sample_identity(np.random.default_rng([5, number]))
        if identity.gender == "female" and 20 <= identity.age <= 40:
            break
    look = replace(
        sample_appearance(np.random.default_rng([5, number, 1]), identity),
        **{"expression": "neutral", "units": {}, "yaw": 0.0, "pitch": 0.0, "roll": 0.0, "gaze": (0.0, 0.0)},
        **{"hair_style": "Short_Hair", "bangs": False, "eyewear": "No_Eyewear", "hat": False, "earrings": False},
        shift=(0.0, 0.0),
    )
    return identity, look, shape_head(identity)


def photograph(head, **changes):
    identity, look, shape = head
    look = replace(look, **changes)
    return draw(stage(shape, look), identity, look, SIZE, np.random.default_rng(0)), look


def test_same_numbers_same_bytes(rows):
    assert render_identity(3, 0, 2, SIZE) == rows[:2]
    assert render_identity(3, 7, 1, SIZE) == rows[14:15]  # neither the number of images nor the order matters
    assert render_identity(3, 7, 3, SIZE)[:2] == rows[14:16]
    assert render_identity(4, 7, 1, SIZE)[0]["image"] != rows[14]["image"]
    assert len({row["image"] for row in rows}) == len(rows)


def test_another_process_gives_the_same_bytes(rows):
    code = (
        "import hashlib\nfrom facemllm.sources.render import render_identity\n"
        f"row = render_identity(3, 5, 1, {SIZE})[0]\n"
        "print(hashlib.sha256(repr(sorted(row.items())).encode()).hexdigest())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "11", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == digest(rows[10])


def test_row_is_plain_and_complete(rows):
    keys = {"image", "width", "height", "source", "source_id", "subject", "box", "landmarks", "segmentation"}
    keys |= {"attributes", "expression", "age", "gender", "skin_tone", "yaw", "pitch", "roll"}
    for row in rows:
        assert set(row) == keys  # so no ethnicity either
        assert all(type(value) in (bytes, int, float, str, list, dict) for value in row.values())
        assert all(type(value) is bool for value in row["attributes"].values())
        assert not any(word in str(row["attributes"]).lower() for word in ("african", "asian", "caucasian"))
        picture = Image.open(io.BytesIO(row["image"]))
        assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (row["width"], row["height"]))
    assert rows[15]["source"] == "render"
    assert (rows[15]["source_id"], rows[15]["subject"]) == ("3-000007-1", "3-7")


def test_an_identity_keeps_what_is_its_own(rows):
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        for key in ("subject", "age", "gender", "skin_tone"):
            assert first[key] == second[key]
        for group in (HAIR_COLORS, EYE_COLORS):
            shown = [{name for name in group if row["attributes"].get(name)} for row in (first, second)]
            assert not all(shown) or shown[0] == shown[1]


def test_everything_occurs(rows):
    assert {row["expression"] for row in rows} == set(EXPRESSIONS)
    assert {row["gender"] for row in rows} == {"female", "male"}
    ages = {row["age"] for row in rows}
    for low, high in ((6, 14), (18, 36), (36, 60), (60, 86)):
        assert any(low <= age < high for age in ages)
    true = Counter(name for row in rows for name, value in row["attributes"].items() if value)
    wanted = {*HAIR_STYLES, *BEARDS, *EYEWEAR, *EYE_COLORS, *HAIR_COLORS[:4], "Gray_Hair"}
    wanted |= {"Bangs", "Wearing_Hat", "Wearing_Earrings", "Wearing_Lipstick"}
    assert wanted <= set(true)
    assert len({row["skin_tone"] for row in rows}) >= 3
    assert all(abs(r["yaw"]) <= 60 and abs(r["pitch"]) <= 25 and abs(r["roll"]) <= 20 for r in rows)


@pytest.mark.parametrize("group", [HAIR_STYLES, HAIR_COLORS, BEARDS, EYEWEAR, EYE_COLORS])
def test_groups_are_whole_and_exclusive(rows, group):
    for row in rows:
        values = [row["attributes"][name] for name in group if name in row["attributes"]]
        assert not values or (len(values) == len(group) and sum(values) == 1)
        if group in (HAIR_STYLES, BEARDS, EYEWEAR):
            assert values


def test_attributes_agree_with_the_mask(rows):
    for row in rows:
        attributes = row["attributes"]
        pixels = np.bincount(classes(row).ravel(), minlength=len(SEGMENTATION_CLASSES))
        eyes = pixels[CLASS["l_eye"]] + pixels[CLASS["r_eye"]]
        assert attributes.get("Wearing_Hat", True) == (pixels[CLASS["hat"]] > 0)
        assert attributes.get("Wearing_Earrings", False) == (pixels[CLASS["ear_r"]] >= 2)
        assert attributes["No_Eyewear"] == (pixels[CLASS["eye_g"]] == 0)
        assert ("Black_Hair" in attributes) == (pixels[CLASS["hair"]] >= 40)
        assert ("Blue_Eyes" in attributes) == (eyes >= 24 and not attributes["Sunglasses"])
        assert not (attributes["Bangs"] and attributes.get("Wearing_Hat", True))
        if attributes["Bald"]:
            assert pixels[CLASS["hair"]] == 0
        if row["gender"] == "female" or row["age"] < 18:
            assert attributes["No_Beard"]
        if row["age"] < 18:
            assert not attributes["Wearing_Lipstick"]


def test_hidden_evidence_leaves_the_name_out(head):
    identity, look, _ = head
    look = replace(look, earrings=True, hat=True)
    attributes = visible_attributes(identity, look, np.zeros((SIZE, SIZE), np.uint8))
    assert not {"Wearing_Earrings", "Wearing_Hat", *HAIR_COLORS, *EYE_COLORS} & set(attributes)


def test_mask_and_landmarks_agree(rows):
    near = 0
    for row in rows:
        segmentation, landmarks, box = classes(row), np.array(row["landmarks"]), row["box"]
        assert segmentation.shape == (SIZE, SIZE)
        assert segmentation.max() < len(SEGMENTATION_CLASSES) == 19
        assert ((landmarks >= 0) & (landmarks <= SIZE)).all()
        assert 0 <= box[0] < box[2] <= SIZE
        assert 0 <= box[1] < box[3] <= SIZE
        assert (landmarks >= np.array(box[:2]) - 3).all()
        assert (landmarks <= np.array(box[2:]) + 3).all()
        assert landmarks[0][0] < landmarks[1][0]
        assert landmarks[3][0] < landmarks[4][0]
        if abs(row["yaw"]) > 35:
            continue
        near += 1
        assert share_near(segmentation, "nose", landmarks[2], 4)
        for corner in landmarks[3:]:
            assert any(share_near(segmentation, name, corner, 5) for name in ("u_lip", "l_lip", "mouth"))
        for name, eye in (("r_eye", landmarks[0]), ("l_eye", landmarks[1])):
            if (segmentation == CLASS[name]).sum() >= 4:
                assert share_near(segmentation, name, eye, 5)
    assert near > IDENTITIES


def test_left_is_the_subjects_left(rows):
    """On the face, every l_ class lies to the image's right of its r_ twin."""
    seen = 0
    for row in rows:
        segmentation = classes(row)
        for part in ("eye", "brow", "ear"):
            left, right = (np.nonzero(segmentation == CLASS[f"{side}_{part}"])[1] for side in "lr")
            if len(left) > 3 and len(right) > 3:
                seen += 1
                assert left.mean() > right.mean()
    assert seen > IDENTITIES


def test_pose_signs(head):
    frontal, _ = photograph(head)
    eyes, nose = frontal.landmarks[:2].mean(axis=0), frontal.landmarks[2]
    assert abs(nose[0] - eyes[0]) < 1.5
    turned, _ = photograph(head, yaw=30.0)
    assert turned.landmarks[2, 0] - turned.landmarks[:2, 0].mean() < -4  # yaw > 0: nose to the image's left
    drop = nose[1] - eyes[1]
    lifted, _ = photograph(head, pitch=20.0)
    assert lifted.landmarks[2, 1] - lifted.landmarks[:2, 1].mean() < drop - 4  # pitch > 0: nose up
    rolled, _ = photograph(head, roll=15.0)
    right_eye, left_eye = rolled.landmarks[:2]
    angle = np.degrees(np.arctan2(left_eye[1] - right_eye[1], left_eye[0] - right_eye[0]))
    assert angle == pytest.approx(15, abs=3)  # roll > 0: clockwise, the eye at image right is the lower one


@pytest.mark.parametrize("pose", [(37.0, -12.0, 9.0), (-55.0, 21.0, -18.0), (3.0, 24.0, 19.0)])
def test_rotation_is_recovered_from_the_vertices(head, pose):
    """The best rotation (Kabsch) from the frontal to the turned skull has exactly the labelled angles."""
    _, look, shape = head
    model = load_head_model()
    rigid = model.head[model.bend[model.head] >= 1]
    frontal = stage(shape, look).positions[rigid].astype(float)
    turned = stage(shape, replace(look, yaw=pose[0], pitch=pose[1], roll=pose[2])).positions[rigid].astype(float)
    frontal, turned = frontal - frontal.mean(axis=0), turned - turned.mean(axis=0)
    u, _, vt = np.linalg.svd(turned.T @ frontal)
    assert np.linalg.det(u @ vt) > 0
    assert head_angles(u @ vt) == pytest.approx(pose, abs=0.1)
    assert np.abs(frontal @ (u @ vt).T - turned).max() < 1e-3


def test_rotation_is_that_of_300w_lp():
    """Rx(pitch) Ry(yaw) Rz(roll) as 3DDFA writes them, one axis at a time and inverted."""
    sine = np.sin(np.radians(20))
    assert head_rotation(20, 0, 0) @ (0, 0, 1) == pytest.approx((-sine, 0, np.cos(np.radians(20))))
    assert head_rotation(0, 20, 0) @ (0, 0, 1) == pytest.approx((0, sine, np.cos(np.radians(20))))
    assert head_rotation(0, 0, 20) @ (0, 1, 0) == pytest.approx((sine, np.cos(np.radians(20)), 0))
    both = head_rotation(0, 15, 0) @ head_rotation(40, 0, 0) @ head_rotation(0, 0, -10)
    assert head_rotation(40, 15, -10) == pytest.approx(both)
    assert head_angles(both) == pytest.approx((40, 15, -10))


def test_what_is_worn_appears_in_the_mask(head):
    for change, name in (
        ({"hat": True}, "hat"),
        ({"eyewear": "Eyeglasses"}, "eye_g"),
        ({"eyewear": "Sunglasses"}, "eye_g"),
        ({"earrings": True}, "ear_r"),
        ({"hair_style": "Long_Hair"}, "hair"),
    ):
        bare, _ = photograph(head, hair_style="Bald")
        dressed, look = photograph(head, **({"hair_style": "Bald"} | change))
        assert (bare.segmentation == CLASS[name]).sum() == 0
        assert (dressed.segmentation == CLASS[name]).sum() >= 2
        attributes = visible_attributes(head[0], look, dressed.segmentation)
        assert attributes["Wearing_Hat"] == look.hat
        assert attributes["Wearing_Earrings"] == look.earrings


def test_larger_pictures_show_the_same_head(rows):
    large = render_identity(3, 2, 1, 256)[0]
    small = rows[4]
    assert (large["width"], large["expression"], large["yaw"]) == (256, small["expression"], small["yaw"])
    assert np.array(large["landmarks"]) / 2 == pytest.approx(np.array(small["landmarks"]), abs=0.1)
    assert (classes(large)[::2, ::2] == classes(small)).mean() > 0.93
    smooth = render_identity(3, 2, 1, SIZE, supersample=2)[0]
    assert smooth["image"] != small["image"]
    assert np.array(smooth["landmarks"]) == pytest.approx(np.array(small["landmarks"]), abs=0.1)
    assert (classes(smooth) == classes(small)).mean() > 0.93


@pytest.mark.parametrize(("colour", "tone"), [("f6ede4", 1), ("d7bd96", 5), ("a07e56", 6), ("292420", 10)])
def test_monk_swatches_are_their_own_tone(colour, tone):
    assert monk_tone(np.array(list(bytes.fromhex(colour)), np.float32) / 255) == tone
