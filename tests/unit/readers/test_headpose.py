"""The readers of 300W-LP and AFLW2000-3D: radians to degrees, the 99-degree rule, frames, photographs; .mat files."""

import io
import struct
import zlib

import numpy as np
import pytest
from scipy.io import savemat

from facemllm.ingest.reader import Refuse, Refused
from facemllm.ingest.readers import headpose
from facemllm.ingest.readers.headpose import photograph
from tests.refusing import refuses

POINTS = np.stack([np.linspace(20, 40, 68), np.linspace(30, 50, 68)])  # a box of 20x20 pixels


def mat(path, pitch, yaw, roll, points=POINTS, compressed=True, **more):
    """A .mat with pose in degrees and points (2, n)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pose = np.concatenate([np.radians([pitch, yaw, roll]), [61.5, 58.25, -60.0, 0.00085]])
    content = {"Pose_Para": pose[None].astype(np.float32), "pt2d": points, "roi": np.array([[1, 2, 3, 4]], np.int16)}
    savemat(path, content | more, do_compression=compressed)


@pytest.fixture
def tree(tmp_path, picture):
    home = tmp_path / "300W_LP"
    faces = {
        "AFW/AFW_134212_1_0": (10, -20, 5),
        "AFW/AFW_134212_1_7": (-12.5, 60, 0),
        "AFW/AFW_134212_2_0": (0, 98.9, 0),
        "AFW_Flip/AFW_134212_1_0": (10, 20, -5),
        "LFPW/LFPW_image_test_0001_0": (0, -99.5, 0),
        "LFPW/LFPW_image_test_0001_12": (1, 2, 3),
    }
    for seed, (name, angles) in enumerate(faces.items()):
        picture(home / f"{name}.jpg", seed=seed)
        mat(home / f"{name}.mat", *angles, compressed=seed % 2 == 0)
    picture(home / "HELEN" / "HELEN_232194_1_3.jpg", seed=20)  # no .mat
    mat(home / "IBUG" / "IBUG_image_003_1_0.mat", 0, 0, 0)  # no picture
    mat(home / "landmarks" / "AFW" / "AFW_134212_1_0_pts.mat", 0, 0, 0)  # must not be read
    return tmp_path


def test_rows_are_as_written_down(tree, take):
    found = take("300w-lp", tree)
    assert [(row["source_id"], *(round(row[n], 3) for n in ("yaw", "pitch", "roll"))) for row in found.rows] == [
        ("AFW/AFW_134212_1_0", -20, 10, 5),
        ("AFW/AFW_134212_1_7", 60, -12.5, 0),
        ("AFW/AFW_134212_2_0", 98.9, 0, 0),
        ("LFPW/LFPW_image_test_0001_12", 2, 1, 3),
        ("AFW_Flip/AFW_134212_1_0", 20, 10, -5),
    ]
    assert found.refused == [
        Refused("300W_LP/HELEN/HELEN_232194_1_3.jpg", 0, "no label row (HELEN_232194_1_3.mat)"),
        Refused("300W_LP/IBUG/IBUG_image_003_1_0.jpg", 0, "the picture is missing"),
        Refused("300W_LP/LFPW/LFPW_image_test_0001_0.jpg", 0, "yaw is -99.5 degrees, beyond 99"),
    ]


def test_one_photograph_is_one_subject(tree, take):
    subjects = take("300w-lp", tree).column("subject_id")
    assert len({subjects[name] for name in subjects if "AFW" in name}) == 1
    assert len(set(subjects.values())) == 2
    assert photograph("IBUG_image_003_1_0") == "IBUG_image_003"
    assert photograph("HELEN_232194_1_3") == photograph("HELEN_232194_1_Flip_3") == "HELEN_232194"
    assert photograph("LFPW_image_train_0805_11") == "LFPW_image_train_0805"
    assert photograph("LFPW_image_train_0805_11") != photograph("LFPW_image_train_0806_11")


def test_the_frame_is_the_published_one(tree, take):
    row = take("300w-lp", tree).rows[0]
    # x: 20 - 0.4*20 = 12 to 40 + 0.56*20 = 51.2; y: 30 - 0.4*20 = 22 to 50 + 0.168*20 = 53.36; outward to whole pixels
    assert (row["width"], row["height"]) == (52 - 12, 54 - 22)
    assert np.asarray(row["landmarks"]) == pytest.approx(POINTS.T - [12, 22])


def test_splits_follow_the_protocol(tree, take):
    standard = take("300w-lp", tree, ["ingest.test_share=0.5", "ingest.validation_share=0.3"]).column("split")
    assert set(standard.values()) <= {"train", "validation"}
    own = take("300w-lp", tree, ["ingest.test_share=0.98", "ingest.validation_share=0.01"], protocol="own")
    assert set(own.column("split").values()) == {"test"}
    assert not any("Flip" in name for name in take("300w-lp", tree, flipped="without").column("split"))


def test_the_content_may_lie_at_the_root(tree, take):
    assert len(take("300w-lp", tree / "300W_LP").rows) == 5
    refuses("AFW or HELEN or IBUG or LFPW is missing", take, "300w-lp", tree / "300W_LP" / "AFW")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"Pose_Para": np.zeros((1, 2))}, "has no Pose_Para with pitch, yaw and roll"),
        ({"Pose_Para": np.array([[np.nan, 0, 0]])}, "pitch is not a finite number"),
        ({"pt2d": np.full((2, 68), np.inf)}, "has no finite landmarks"),
        ({"pt2d": np.full((2, 21), -1.0)}, "has no finite landmarks"),
        ({"pt2d": np.full((2, 68), 500.0)}, "leaves nothing of a picture"),
        ({"pt2d": np.array([["a", "b"]], object)}, "pt2d is no matrix of real numbers"),
        ({"pt2d": np.ones((2, 68)) * 1j}, "pt2d is no matrix of real numbers"),
    ],
)
def test_unusable_labels_are_refused(tmp_path, picture, take, change, reason):
    picture(tmp_path / "AFW" / "AFW_1_1_0.jpg")
    mat(tmp_path / "AFW" / "AFW_1_1_0.mat", 0, 0, 0)
    savemat(tmp_path / "AFW" / "AFW_1_1_0.mat", {"Pose_Para": np.zeros((1, 7)), "pt2d": POINTS} | change)
    found = take("300w-lp", tmp_path)
    assert not found.rows
    assert len(found.refused) == 1
    assert reason in found.refused[0].reason


def test_a_link_that_leads_out_is_refused(tmp_path, picture, take):
    picture(tmp_path / "data" / "AFW" / "AFW_1_1_0.jpg")
    mat(tmp_path / "secret.mat", 0, 0, 0)
    (tmp_path / "data" / "AFW" / "AFW_1_1_0.mat").symlink_to(tmp_path / "secret.mat")
    assert "leads out" in take("300w-lp", tmp_path / "data").refused[0].reason


class TestMatFile:
    def saved(self, **content):
        buffer = io.BytesIO()
        compressed = content.pop("compressed", False)
        savemat(buffer, content, do_compression=compressed)
        return buffer.getvalue()

    @pytest.mark.parametrize("dtype", ["f8", "f4", "i2", "u1", "i8"])
    @pytest.mark.parametrize("compressed", [False, True])
    def test_numbers_come_back(self, dtype, compressed):
        values = np.arange(12).reshape(3, 4).astype(dtype)
        data = self.saved(other="text", cells=np.array([[1, "x"]], object), a=values, compressed=compressed)
        found = headpose.arrays(data, ("a", "missing"))
        assert list(found) == ["a"]
        assert found["a"].tolist() == values.tolist()

    def test_other_byte_order(self):
        part = struct.pack(">II", 6, 8) + struct.pack(">II", 6, 0)
        part += struct.pack(">IIii", 5, 8, 1, 2) + struct.pack(">HH", 1, 1) + b"a\0\0\0"
        part += struct.pack(">II", 9, 16) + struct.pack(">dd", 1.5, -2)
        data = b"\0" * 124 + b"\x01\x00MI" + struct.pack(">II", 14, len(part)) + part
        assert headpose.arrays(data, ("a",))["a"].tolist() == [[1.5, -2]]

    def test_hostile_files_are_refused(self):
        data = self.saved(a=np.ones((2, 3)))
        bomb = zlib.compress(b"\0" * (headpose.MAX_INFLATED + 1))
        for broken in (
            b"",
            b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM",
            data[:-9],
            data[:200],
            data[:128] + struct.pack("<II", 15, len(bomb)) + bomb,
            data[:128] + struct.pack("<II", 15, 8) + b"no zlib!",
            data[:128] + struct.pack("<II", 14, 2**31),
            data.replace(struct.pack("<ii", 2, 3), struct.pack("<ii", 2, 300000)),
            data.replace(struct.pack("<ii", 2, 3), struct.pack("<ii", -2, -3)),
        ):
            with pytest.raises(Refuse):
                headpose.arrays(broken, ("a",))


FLAT = np.stack([np.linspace(10, 30, 68), np.linspace(20, 40, 68)])
SOLID = np.concatenate([FLAT, np.full((1, 68), 7.0)])
FEW = np.concatenate([FLAT[:, ::4] + 8, np.full((2, 4), -1.0)], axis=1)  # 21 points, some not visible


def pose(pitch, yaw, roll):
    return np.concatenate([np.radians([pitch, yaw, roll]), np.zeros(4)])[None]


@pytest.fixture
def aflw2000(tmp_path, picture):
    home = tmp_path / "AFLW2000"
    content = {
        "image00002": {"Pose_Para": pose(3, -45, 10), "pt2d": FLAT},
        "image00004": {"Pose_Para": pose(-30, 15, -2), "pt2d": FEW, "pt3d_68": SOLID},
        "image00006": {"Pose_Para": pose(0, 0, 150), "pt2d": FLAT},
        "image00008": {"Pose_Para": pose(0, 99, 0), "pt2d": FEW},
        "image00010": {"pt2d": FLAT},
    }
    for seed, (stem, values) in enumerate(content.items()):
        picture(home / f"{stem}.jpg", seed=seed)
        savemat(home / f"{stem}.mat", values)
    picture(home / "image00012.jpg", seed=9)
    picture(home / "image00014.jpg", seed=10)
    (home / "image00014.mat").write_bytes(b"not a mat file")
    (home / "Code").mkdir()
    return tmp_path


def test_aflw2000_rows_are_as_written_down(aflw2000, take):
    found = take("aflw2000", aflw2000)
    rows = {row["source_id"]: row for row in found.rows}
    angles = {name: pytest.approx([row["yaw"], row["pitch"], row["roll"]]) for name, row in rows.items()}
    assert angles == {"image00002": [-45, 3, 10], "image00004": [15, -30, -2], "image00008": [99, 0, 0]}
    assert {(row["split"], row["subject_id"]) for row in found.rows} == {("test", None)}
    assert found.refused == [
        Refused("AFLW2000/image00006.jpg", 0, "roll is 150.0 degrees, beyond 99"),
        Refused("AFLW2000/image00010.jpg", 0, "image00010.mat has no Pose_Para with pitch, yaw and roll"),
        Refused("AFLW2000/image00012.jpg", 0, "no label row (image00012.mat)"),
        Refused("AFLW2000/image00014.jpg", 0, "no MATLAB 5 file"),
    ]


def test_landmarks_and_frame(aflw2000, take):
    rows = {row["source_id"]: row for row in take("aflw2000", aflw2000).rows}
    # 10 - 8 = 2 to 30 + 11.2 = 41.2; 20 - 8 = 12 to 40 + 3.36 = 43.36; outward to whole pixels
    for name in ("image00002", "image00004"):
        assert (rows[name]["width"], rows[name]["height"]) == (42 - 2, 44 - 12)
        assert np.asarray(rows[name]["landmarks"]) == pytest.approx(FLAT.T - [2, 12])
    assert rows["image00008"].get("landmarks") is None


def test_places(aflw2000, take, tmp_path):
    assert len(take("aflw2000", aflw2000 / "AFLW2000").rows) == 3
    refuses(r"neither \.jpg nor \.mat", take, "aflw2000", aflw2000 / "AFLW2000" / "Code")
