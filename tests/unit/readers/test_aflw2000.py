"""AFLW2000-3D: radians, the 99-degree rule, both kinds of landmarks, all of it a test set."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.io import savemat

from facemllm.errors import UserError
from facemllm.ingest.reader import Refused

FLAT = np.stack([np.linspace(10, 30, 68), np.linspace(20, 40, 68)])
SOLID = np.concatenate([FLAT, np.full((1, 68), 7.0)])
FEW = np.concatenate([FLAT[:, ::4] + 8, np.full((2, 4), -1.0)], axis=1)  # 21 points, some not visible


def pose(pitch, yaw, roll):
    return np.concatenate([np.radians([pitch, yaw, roll]), np.zeros(4)])[None]


@pytest.fixture
def tree(tmp_path, picture):
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


def test_rows_are_as_written_down(tree, take):
    found = take("aflw2000", tree)
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


def test_landmarks_and_frame(tree, take):
    rows = {row["source_id"]: row for row in take("aflw2000", tree).rows}
    # 10 - 8 = 2 to 30 + 11.2 = 41.2; 20 - 8 = 12 to 40 + 3.36 = 43.36; outward to whole pixels
    for name in ("image00002", "image00004"):
        assert (rows[name]["width"], rows[name]["height"]) == (42 - 2, 44 - 12)
        assert np.asarray(rows[name]["landmarks"]) == pytest.approx(FLAT.T - [2, 12])
    assert rows["image00008"].get("landmarks") is None


def test_places(tree, take, tmp_path):
    assert len(take("aflw2000", tree / "AFLW2000").rows) == 3
    with pytest.raises(UserError, match=r"neither \.jpg nor \.mat"):
        take("aflw2000", tree / "AFLW2000" / "Code")
