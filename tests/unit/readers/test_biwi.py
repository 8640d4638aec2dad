"""BIWI: signs held against the renderer's rotations, the head framed through the colour camera, people by sequence."""

import numpy as np
import pytest

from facemllm.heads.model import head_rotation
from facemllm.ingest.reader import Refuse, Refused
from facemllm.ingest.readers.headpose import TWICE, rotation_degrees
from tests.refusing import refuses

FLIP = np.diag([1.0, -1.0, -1.0])  # the renderer's axes (y up, z towards the camera) to the camera's
ROWS = "not 3 rows of a rotation and 1 of the head's centre"
CAL = "50 0 32 \n0 50 24 \n0 0 1 \n\n0 0 0 0 \n\n1 0 0 \n0 1 0 \n0 0 1 \n\n-400 0 0 \n"


def rotation(yaw, pitch, roll):
    """The matrix of a head with these angles in the signs of 300W-LP, as BIWI writes it."""
    return FLIP @ head_rotation(yaw, pitch, roll) @ FLIP


def pose(path, rotation, centre=(400, 0, 1000), end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [" ".join(f"{v:.6f}" for v in row) + " " for row in rotation]
    path.write_bytes((end.join([*rows, "", " ".join(map(str, centre)) + " ", ""])).encode())


def test_signs_are_those_of_300w_lp():
    for angles in ((20, 0, 0), (0, 20, 0), (0, 0, 20), (-33, 12, -8)):
        expected = dict(zip(("yaw", "pitch", "roll"), angles, strict=True))
        assert rotation_degrees(rotation(*angles)) == pytest.approx(expected)


def test_signs_by_geometry():
    """The nose looks along -z of the head, its top along -y; x is image right, y down."""
    nose, top = np.array([0, 0, -1.0]), np.array([0, -1.0, 0])
    c, s = np.cos(np.radians(20)), np.sin(np.radians(20))
    about_y, about_x = np.array([[[c, 0, s], [0, 1, 0], [-s, 0, c]], [[1, 0, 0], [0, c, s], [0, -s, c]]])
    about_z = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    assert (about_y @ nose)[0] < 0  # to image left
    assert (about_x @ nose)[1] < 0  # up
    assert (about_z @ top)[0] > 0  # clockwise
    for name, rotation in (("yaw", about_y), ("pitch", about_x), ("roll", about_z)):
        assert rotation_degrees(rotation)[name] == pytest.approx(20)


def test_no_rotation_is_refused():
    for matrix in (np.zeros((3, 3)), np.diag([1.0, 1, -1]), np.eye(3) * 1.1):
        refuses("no rotation", rotation_degrees, matrix, error=Refuse)
    refuses(r"pitch is 120\.0 degrees, beyond 99", rotation_degrees, rotation(0, 120, 0), error=Refuse)


@pytest.fixture
def tree(tmp_path, picture):
    home = tmp_path / "hpdb"
    for seed, name in enumerate(("01/frame_00003", "01/frame_00004", "02/frame_00003", "21/frame_00010")):
        folder, stem = name.split("/")
        picture(home / folder / f"{stem}_rgb.png", seed=seed, size=(64, 48), form="PNG")
        pose(home / folder / f"{stem}_pose.txt", rotation(5 + seed, -seed, 2), end="\r\n" if seed else "\n")
        (home / folder / "rgb.cal").write_text(CAL)
    picture(home / "01" / "frame_00005_rgb.png", seed=8, form="PNG")
    pose(home / "01" / "frame_00006_pose.txt", rotation(0, 0, 0))
    picture(home / "02" / "frame_00004_rgb.png", seed=9, form="PNG")
    (home / "02" / "frame_00004_pose.txt").write_text("1 0 0\n0 1 nan\n0 0 1\n\n0 0 1000\n")
    picture(home / "02" / "frame_00005_rgb.png", seed=10, form="PNG")
    (home / "02" / "frame_00005_pose.txt").write_text("1 0 0\n0 1 0\n\n0 0 1000\n")
    (home / "01" / "frame_00003_depth.bin").write_bytes(b"\0")
    (home / "masks").mkdir()
    (home / "01.obj").write_text("v 0 0 0\n")
    return tmp_path


def test_rows_are_as_written_down(tree, take):
    found = take("biwi", tree)
    angles = {row["source_id"]: [row["yaw"], row["pitch"], row["roll"]] for row in found.rows}
    assert list(angles) == ["01/frame_00003", "01/frame_00004", "02/frame_00003", "21/frame_00010"]
    for seed, values in enumerate(angles.values()):
        assert values == pytest.approx([5 + seed, -seed, 2], abs=1e-3)
    assert set(found.column("split").values()) == {"test"}
    assert found.refused == [
        Refused("hpdb/01/frame_00005_rgb.png", 0, "no label row (frame_00005_pose.txt)"),
        Refused("hpdb/01/frame_00006_rgb.png", 0, "the picture is missing"),
        Refused("hpdb/02/frame_00004_rgb.png", 0, "frame_00004_pose.txt is nan, outside -inf to inf"),
        Refused("hpdb/02/frame_00005_rgb.png", 0, f"frame_00005_pose.txt: {ROWS}"),
        Refused("hpdb/masks", 0, "none of the sequences 01 to 24"),
    ]


def test_people_who_were_recorded_twice_are_one(tree, take):
    subjects = take("biwi", tree).column("subject_id")
    assert subjects["02/frame_00003"] == subjects["21/frame_00010"] != subjects["01/frame_00003"]
    assert TWICE == {"15": "03", "18": "05", "21": "02", "22": "07"}
    own = take("biwi", tree, ["ingest.test_share=0", "ingest.validation_share=0"], protocol="own").column("split")
    assert set(own.values()) == {"train"}


def test_the_head_is_framed_by_the_colour_camera(tree, take):
    # the centre (400, 0, 1000) is at (0, 0, 1000) of the colour camera: pixel (32, 24); 320 mm are 16 pixels
    row = take("biwi", tree).rows[0]
    assert (row["width"], row["height"]) == (16, 16)
    assert take("biwi", tree, crop="none").rows[0]["width"] == 64


def test_the_crop_needs_the_calibration(tree, take):
    (tree / "hpdb/02/rgb.cal").write_text("1 0 0\n")
    refuses(r"02/rgb\.cal: not a camera matrix", take, "biwi", tree)
    (tree / "hpdb/02/rgb.cal").unlink()
    refuses("crop: none", take, "biwi", tree)
    assert len(take("biwi", tree, crop="none").rows) == 4


def test_frames_can_be_thinned_out(tree, take):
    names = [row["source_id"] for row in take("biwi", tree, every="2").rows]
    assert names == ["01/frame_00003", "02/frame_00003", "21/frame_00010"]
    refuses("option every is 'x'", take, "biwi", tree, every="x")
    refuses("none of the folders 01 to 24", take, "biwi", tree / "hpdb" / "masks")
