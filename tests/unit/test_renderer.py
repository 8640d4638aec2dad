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
from scipy.spatial.transform import Rotation

from facemllm.heads import render, sampling
from facemllm.heads.materials import CLASS
from facemllm.heads.model import Part, head_rotation, load_head_model
from facemllm.heads.render import draw, render_identity, shape_head, stage, visible_action_units, visible_attributes
from facemllm.heads.sampling import (
    BEARDS,
    EXPRESSION_UNITS,
    EYE_COLORS,
    EYEWEAR,
    HAIR_COLORS,
    HAIR_STYLES,
    action_units,
)
from facemllm.tables.schemas import SEGMENTATION

SIZE = 128
IDENTITIES = 45


def classes(row):
    return np.asarray(Image.open(io.BytesIO(row["segmentation"])))


def drawn_again(row):
    """Identity, look and shape of a row, from its source_id."""
    seed, identity, number = (int(part) for part in row["source_id"].split("-"))
    person = sampling.sample_identity(np.random.default_rng([seed, identity]))
    return (
        person,
        sampling.sample_appearance(np.random.default_rng([seed, identity, number + 1]), person),
        shape_head(person),
    )


def projected(points, positions, look, size):
    """A pinhole camera written anew: pixels (n, 2) and distance (n,) of points (n, 3), for a head at `positions`."""
    head = positions[load_head_model().head].astype(float)
    low, high = head.min(axis=0), head.max(axis=0)
    middle = (low + high) / 2 + (*look.shift, 0)
    focal = size * look.zoom * render.CAMERA_DISTANCE / ((high[1] - low[1]) * 1.02)
    relative = points.astype(float) - middle
    distance = render.CAMERA_DISTANCE - relative[:, 2]
    x, y = focal * relative[:, 0] / distance, focal * relative[:, 1] / distance
    return np.stack([size / 2 + x, size / 2 - y], axis=1), distance


def angles_of(rotation):
    """(yaw, pitch, roll) by scipy: intrinsic turns about x, y, z, each with the sign of 3DDFA's matrices."""
    pitch, yaw, roll = -Rotation.from_matrix(rotation).as_euler("XYZ", degrees=True)
    return yaw, pitch, roll


@pytest.fixture(scope="module")
def rows():
    return [row for identity in range(IDENTITIES) for row in render_identity(3, identity, 2, SIZE)]


@pytest.fixture(scope="module")
def head():
    """A frontal neutral woman without accessories: identity, look, shape."""
    for number in range(100):
        identity = sampling.sample_identity(np.random.default_rng([5, number]))
        if identity.gender == "female" and 20 <= identity.age <= 40:
            break
    look = replace(
        sampling.sample_appearance(np.random.default_rng([5, number, 1]), identity),
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
        "import hashlib\nfrom facemllm.heads.render import render_identity\n"
        f"row = render_identity(3, 5, 1, {SIZE})[0]\n"
        "print(hashlib.sha256(repr(sorted(row.items())).encode()).hexdigest())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "11", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == hashlib.sha256(repr(sorted(rows[10].items())).encode()).hexdigest()


def test_row_is_plain_and_complete(rows):
    keys = {"image", "width", "height", "source", "source_id", "subject", "box", "landmarks", "segmentation"}
    keys |= {"attributes", "expression", "action_units", "age", "gender", "skin_tone", "yaw", "pitch", "roll"}
    for row in rows:
        assert set(row) == keys  # so no ethnicity either
        assert all(type(value) in (bytes, int, float, str, list, dict) for value in row.values())
        assert all(type(value) is bool for value in row["attributes"].values())
        assert not any(word in str(row["attributes"]).lower() for word in ("african", "asian", "caucasian"))
        picture = Image.open(io.BytesIO(row["image"]))
        assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (row["width"], row["height"]))
    assert (rows[15]["source"], rows[15]["source_id"], rows[15]["subject"]) == ("render", "3-000007-1", "3-7")


def test_an_identity_keeps_what_is_its_own(rows):
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        for key in ("subject", "age", "gender", "skin_tone"):
            assert first[key] == second[key]
        for group in (HAIR_COLORS, EYE_COLORS):
            shown = [{name for name in group if row["attributes"].get(name)} for row in (first, second)]
            assert not all(shown) or shown[0] == shown[1]


def test_everything_occurs(rows):
    assert {row["expression"] for row in rows} == set(sampling.EXPRESSIONS)
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
        if group in (BEARDS, EYEWEAR):
            assert values


def test_attributes_agree_with_the_mask(rows):
    for row in rows:
        attributes = row["attributes"]
        pixels = np.bincount(classes(row).ravel(), minlength=len(SEGMENTATION))
        eyes = pixels[CLASS["l_eye"]] + pixels[CLASS["r_eye"]]
        assert attributes.get("Wearing_Hat", True) == (pixels[CLASS["hat"]] > 0)
        assert attributes.get("Wearing_Earrings", False) == (pixels[CLASS["ear_r"]] >= 2)
        assert attributes["No_Eyewear"] == (pixels[CLASS["eye_g"]] == 0)
        assert ("Black_Hair" in attributes) == (pixels[CLASS["hair"]] >= 40)
        assert ("Blue_Eyes" in attributes) == (eyes >= 24 and not attributes["Sunglasses"])
        assert not (attributes["Bangs"] and attributes.get("Wearing_Hat", True))
        if attributes.get("Bald"):
            assert pixels[CLASS["hair"]] == 0
        if row["gender"] == "female" or row["age"] < 18:
            assert attributes["No_Beard"]
        if row["age"] < 18:
            assert not attributes["Wearing_Lipstick"]


def test_hidden_evidence_leaves_the_name_out(head):
    identity, look, _ = head
    look = replace(look, earrings=True, hat=True)
    attributes = visible_attributes(identity, look, np.zeros((SIZE, SIZE), np.uint8))
    assert not {"Wearing_Earrings", "Wearing_Hat", *HAIR_STYLES, *HAIR_COLORS, *EYE_COLORS} & set(attributes)


def test_a_hat_hides_the_hair_style_and_no_other_label(rows, monkeypatch):
    """The person's own hair may show beneath it; the style is not to be told."""
    wearing = [row for row in rows if row["attributes"].get("Wearing_Hat")]
    assert wearing
    for row in wearing:
        person, look, _ = drawn_again(row)
        bare = visible_attributes(person, replace(look, hat=False), classes(row))
        assert bare.keys() - row["attributes"].keys() == set(HAIR_STYLES)
        left = {name: value for name, value in bare.items() if name not in HAIR_STYLES}
        assert row["attributes"] == left | {"Wearing_Hat": True}
    for row in rows:
        if not row["attributes"].get("Wearing_Hat", True):
            assert tuple(row["attributes"])[: len(HAIR_STYLES)] == HAIR_STYLES
    seed, identity, number = map(int, wearing[0]["source_id"].split("-"))
    monkeypatch.setattr(render, "visible_attributes", lambda *_: {})
    again = render_identity(seed, identity, number + 1, SIZE)[number]
    assert again == {**wearing[0], "attributes": {}}


def test_mask_landmarks_and_box_lie_in_the_picture_and_left_is_the_subjects_left(rows):
    """On the face, every l_ class lies to the image's right of its r_ twin."""
    compared = 0
    for row in rows:
        segmentation, landmarks, box = classes(row), np.array(row["landmarks"]), row["box"]
        assert segmentation.shape == (SIZE, SIZE)
        assert segmentation.max() < len(SEGMENTATION) == 19
        assert ((landmarks >= 0) & (landmarks <= SIZE)).all()
        assert ((landmarks >= np.array(box[:2]) - 3) & (landmarks <= np.array(box[2:]) + 3)).all()
        assert (landmarks[[0, 3], 0] < landmarks[[1, 4], 0]).all()
        y, x = np.nonzero(np.isin(segmentation, [CLASS[name] for name in render.FACE_CLASSES]))
        assert box == [x.min(), y.min(), x.max() + 1, y.max() + 1]  # encloses the face and no more
        for part in ("eye", "brow", "ear"):
            left, right = (np.nonzero(segmentation == CLASS[f"{side}_{part}"])[1] for side in "lr")
            if len(left) > 3 and len(right) > 3:
                compared += 1
                assert left.mean() > right.mean()
    assert compared > IDENTITIES


def test_landmarks_lie_on_the_projected_mesh(rows):
    """Each is where a camera of our own puts its vertex: the pupils, the tip of the nose, the corners of the lips."""
    model = load_head_model()
    left_eye, right_eye = model.eye_fronts
    left_corner, right_corner = model.mouth_corners
    vertices = [right_eye, left_eye, model.nose_tip, right_corner, left_corner]
    assert model.lips[[left_corner, right_corner]].min() > 0.5
    assert model.vertices[model.nose_tip, 2] == model.vertices[model.on_body, 2].max()
    for row in rows[:60]:
        _, look, shape = drawn_again(row)
        positions = stage(shape, look).positions
        pixels, _ = projected(positions[vertices], positions, look, SIZE)
        assert np.array(row["landmarks"]) == pytest.approx(pixels, abs=0.02)


OF_PART = {
    **{Part.LEFT_EYE: {"l_eye"}, Part.RIGHT_EYE: {"r_eye"}, Part.LASHES: {"skin"}, Part.HAIR: {"hair"}},
    **{Part.TEETH: {"mouth"}, Part.TONGUE: {"mouth"}, Part.FRAME: {"eye_g"}, Part.DARK_LENS: {"eye_g"}},
    **{Part.HAT: {"hat"}, Part.EARRING: {"ear_r"}},
}
ON_BODY = {*render.FACE_CLASSES, "neck", "cloth", "hair"} - {"l_eye", "r_eye"}  # the scalp under hair counts as hair


def test_mask_shows_the_part_that_is_nearest(rows):
    """Rays through pixels against every triangle, in float64: the nearest one's part has the class of the pixel."""
    wearing = [row for row in rows if row["attributes"].get("Wearing_Hat")][:3]
    wearing += [row for row in rows if row["attributes"].get("Wearing_Earrings")][:3]
    wearing += [row for row in rows if not row["attributes"]["No_Eyewear"]][:3]
    parts, wrong, looked = Counter(), 0, 0
    rng = np.random.default_rng(0)
    for row in wearing:
        _, look, shape = drawn_again(row)
        scene = stage(shape, look)
        pixels, distance = projected(scene.positions, scene.positions, look, SIZE)
        triangles = scene.mesh.triangles[: scene.mesh.opaque]
        corners, nearness = pixels[triangles], 1 / distance[triangles]
        a, b, c = corners[:, 0], corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
        area = b[:, 0] * c[:, 1] - b[:, 1] * c[:, 0]
        area[area == 0] = np.nan  # seen from its edge: never hit
        segmentation = classes(row)
        small = ("hat", "ear_r", "eye_g", "l_eye", "r_eye", "mouth")
        rare = [np.argwhere(segmentation == CLASS[name])[:8] for name in small]
        chosen = np.concatenate([rng.integers(0, SIZE, (40, 2)), *rare])
        for y, x in chosen:
            to = (x + 0.5, y + 0.5) - a
            second = (to[:, 0] * c[:, 1] - to[:, 1] * c[:, 0]) / area
            third = (b[:, 0] * to[:, 1] - b[:, 1] * to[:, 0]) / area
            first = 1 - second - third
            hit = np.flatnonzero((first >= 0) & (second >= 0) & (third >= 0))
            name = SEGMENTATION[segmentation[y, x]]
            looked += 1
            if not len(hit):
                wrong += name != "background"
                continue
            weights = np.stack([first, second, third], axis=1)[hit]
            part = Part(scene.mesh.part[hit[(weights * nearness[hit]).sum(axis=1).argmax()]])
            parts[part] += 1
            wrong += name not in OF_PART.get(part, ON_BODY)
    assert {Part.BODY, Part.HAIR, Part.HAT, Part.FRAME, Part.EARRING, Part.LEFT_EYE, Part.RIGHT_EYE} <= set(parts)
    assert looked > 500
    assert wrong == 0


def test_pose_label_is_the_turn_of_the_skull(rows):
    """The rotation between the skull as it was drawn and the same skull upright, to 0.1 degree of the row's label."""
    model = load_head_model()
    rigid = model.head[model.bend[model.head] >= 1]
    for row in rows[:40]:
        _, look, shape = drawn_again(row)
        upright = stage(shape, replace(look, yaw=0.0, pitch=0.0, roll=0.0)).positions[rigid].astype(float)
        drawn = stage(shape, look).positions[rigid].astype(float)
        found, missed = Rotation.align_vectors(drawn - drawn.mean(axis=0), upright - upright.mean(axis=0))
        assert missed / len(rigid) ** 0.5 < 1e-3  # dm: nothing but turned
        assert angles_of(found.as_matrix()) == pytest.approx((row["yaw"], row["pitch"], row["roll"]), abs=0.1)


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


def test_rotation_is_that_of_300w_lp():
    """Rx(pitch) Ry(yaw) Rz(roll) as 3DDFA writes them, one axis at a time and together."""
    sine = np.sin(np.radians(20))
    assert head_rotation(20, 0, 0) @ (0, 0, 1) == pytest.approx((-sine, 0, np.cos(np.radians(20))))
    assert head_rotation(0, 20, 0) @ (0, 0, 1) == pytest.approx((0, sine, np.cos(np.radians(20))))
    assert head_rotation(0, 0, 20) @ (0, 1, 0) == pytest.approx((sine, np.cos(np.radians(20)), 0))
    both = head_rotation(0, 15, 0) @ head_rotation(40, 0, 0) @ head_rotation(0, 0, -10)
    assert head_rotation(40, 15, -10) == pytest.approx(both)


def test_what_is_worn_appears_in_the_mask(head):
    bare, _ = photograph(head, hair_style="Bald")
    glasses = [({"eyewear": kind}, "eye_g") for kind in ("Eyeglasses", "Sunglasses")]
    others = [({"hat": True}, "hat"), ({"earrings": True}, "ear_r"), ({"hair_style": "Long_Hair"}, "hair")]
    for change, name in glasses + others:
        dressed, look = photograph(head, **({"hair_style": "Bald"} | change))
        assert (bare.segmentation == CLASS[name]).sum() == 0
        assert (dressed.segmentation == CLASS[name]).sum() >= 2
        attributes = visible_attributes(head[0], look, dressed.segmentation)
        assert (attributes["Wearing_Hat"], attributes["Wearing_Earrings"]) == (look.hat, look.earrings)


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


def test_monk_swatches_are_their_own_tone_and_labels_are_ordered_like_the_pictures(rows):
    for colour, tone in (("f6ede4", 1), ("d7bd96", 5), ("a07e56", 6), ("292420", 10)):
        assert render.monk_tone(np.array(list(bytes.fromhex(colour)), np.float32) / 255) == tone
    bright = {}
    for row in rows:
        pixels = np.asarray(Image.open(io.BytesIO(row["image"])), float)
        skin = pixels[classes(row) == CLASS["skin"]] @ (0.2126, 0.7152, 0.0722)
        bright.setdefault(row["skin_tone"], []).append(np.median(skin))
    means = [np.mean(bright[tone]) for tone in sorted(bright) if len(bright[tone]) >= 8]
    assert len(means) >= 3
    assert means == sorted(means, reverse=True)


def sides(unit):
    return [f"units/{unit[:-1]}{side}" for side in ("Left", "Right")] if unit.endswith("*") else [f"units/{unit}"]


def test_expression_is_what_its_units_draw(rows):
    """A row's units are those of its expression, all at one strength, and of nothing else."""
    for row in rows:
        _, look, _ = drawn_again(row)
        assert look.expression == row["expression"]
        wanted = {name: weight for unit, weight in EXPRESSION_UNITS[row["expression"]].items() for name in sides(unit)}
        assert set(look.units) == set(wanted)
        strengths = {round(look.units[name] / weight, 6) for name, weight in wanted.items()}
        assert len(strengths) == (row["expression"] != "neutral")
        assert all(0.7 <= strength <= 1.1 for strength in strengths)


def test_every_unit_in_use_is_mapped_but_one():
    used = {unit for units in EXPRESSION_UNITS.values() for unit in units}
    assert used == set(sampling.UNIT_ACTIONS) | {"eyeLookDown*"}  # it moves the lid alone
    assert len(set(sampling.UNIT_ACTIONS.values())) == len(sampling.UNIT_ACTIONS)
    assert set(action_units({})) == {*sampling.UNIT_ACTIONS.values(), "AU25"}
    assert not any(action_units({}).values())


# Where on the rest head (x of the subject's left half, height, in dm) an action unit pulls the skin, and which way
# (aside, up, out of the face). Brows lie near 7.45, eyes 7.26, the lips 6.66.
PULLS = {
    "AU1": ((0.0, 0.25), (7.3, 7.6), (0, 1, 0)),
    "AU2": ((0.35, 0.65), (7.3, 7.6), (0, 1, 0)),
    "AU4": ((0.05, 0.55), (7.3, 7.6), (0, -1, 0)),
    "AU5": ((0.2, 0.45), (7.28, 7.36), (0, 1, 0)),
    "AU6": ((0.3, 0.6), (6.85, 7.15), (0, 1, 0)),
    "AU7": ((0.25, 0.45), (7.12, 7.24), (0, 1, 0)),
    "AU9": ((0.05, 0.25), (6.9, 7.2), (0, 1, 0)),
    "AU10": ((0.05, 0.25), (6.68, 6.8), (0, 1, 0)),
    "AU12": ((0.25, 0.4), (6.6, 6.72), (1, 1, -1)),
    "AU14": ((0.25, 0.4), (6.6, 6.72), (1, 0, -1)),
    "AU15": ((0.25, 0.4), (6.6, 6.72), (0, -1, 0)),
    "AU17": ((0.0, 0.15), (6.4, 6.6), (0, 1, 1)),
    "AU20": ((0.25, 0.4), (6.6, 6.72), (1, 0, 0)),
    "AU24": ((0.0, 0.2), (6.46, 6.6), (0, 1, 0)),
    "AU26": ((0.0, 0.2), (6.1, 6.4), (0, -1, 0)),
    "AU43": ((0.2, 0.45), (7.28, 7.36), (0, -1, 0)),
}


@pytest.mark.parametrize("unit", sampling.UNIT_ACTIONS)
def test_an_action_unit_moves_the_skin_as_facs_says(unit):
    model = load_head_model()
    (near, far), (low, high), pull = PULLS[sampling.UNIT_ACTIONS[unit]]
    x, y, z = model.vertices.T
    region = model.on_body & (x >= near) & (x <= far) & (y >= low) & (y <= high) & (z > 1.0)
    region &= model.mouth_interior < 0.5
    moved = (model.morph(model.vertices, dict.fromkeys(sides(unit), 1.0)) - model.vertices)[region]
    assert np.abs(moved).max() > 0.02
    for axis, sign in zip(moved.mean(axis=0), pull, strict=True):
        assert sign == 0 or axis * sign > 0.002


def test_the_jaw_opens_the_lips_and_a_press_shuts_them():
    opening = load_head_model().lip_opening
    assert opening["units/jawOpen"] == pytest.approx(0.34, abs=0.02)  # dm: 3.4 cm
    assert opening["units/mouthClose"] == pytest.approx(-opening["units/jawOpen"], abs=0.01)
    assert opening["units/mouthPressLeft"] < 0 < opening["units/mouthUpperUpLeft"]
    assert abs(opening["units/browInnerUp"]) < 1e-6


def test_action_units_are_linear_and_cut_at_five():
    half = action_units({"units/jawOpen": 0.5, "units/mouthSmileLeft": 0.2, "units/mouthSmileRight": 0.3})
    assert half["AU26"] == 2.5
    assert half["AU12"] == pytest.approx(1.5)  # of unequal sides the stronger
    assert action_units({"units/jawOpen": 1.0})["AU25"] == 5.0
    assert 0 < half["AU25"] < action_units({"units/jawOpen": 0.5})["AU25"] == 2.5  # a smile draws the lips together
    assert action_units({"units/browInnerUp": 1.1})["AU1"] == 5.0
    assert action_units({"units/mouthPressLeft": 1.0, "units/mouthPressRight": 1.0})["AU25"] == 0.0


def test_lips_part_as_far_as_the_mouth_is_seen_open(head):
    """AU25 against the picture: rows of mouth between the lips on the middle line of a frontal face."""
    opened, intensity = [], []
    for expression in ("anger", "neutral", "fear", "surprise"):
        units = {name: weight for unit, weight in EXPRESSION_UNITS[expression].items() for name in sides(unit)}
        picture, look = photograph(head, expression=expression, units=units)
        column = round(float(picture.landmarks[2, 0]))
        opened.append(int((picture.segmentation[:, column - 1 : column + 2] == CLASS["mouth"]).sum()))
        intensity.append(visible_action_units(look)["AU25"])
    assert intensity == sorted(intensity)
    assert opened == sorted(opened)
    assert opened[0] == opened[1] == intensity[0] == intensity[1] == 0 < opened[2] < opened[3]


def test_rows_carry_the_action_units_of_their_expression(rows):
    lids = {"AU5", "AU7", "AU43"}
    for row in rows:
        units = row["action_units"]
        assert set(units) | lids == {*sampling.UNIT_ACTIONS.values(), "AU25"}
        assert lids & set(units) == (set() if row["attributes"]["Sunglasses"] else lids)
        assert all(type(value) is float and 0 <= value <= 5 for value in units.values())
        assert any(units.values()) == (row["expression"] != "neutral")
    by_expression = {row["expression"]: row["action_units"] for row in rows}
    assert by_expression["happiness"]["AU12"] > 2 > by_expression["sadness"]["AU12"] == 0
    assert by_expression["sadness"]["AU15"] > 2
    assert by_expression["surprise"]["AU26"] > 1.5
