"""LAION-Face: shards read in order whatever is in them, faces by detection, pickles that can only hold numbers."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
import torch

from facemllm.ingest import shards
from facemllm.ingest.reader import Refused
from facemllm.ingest.readers.laion_face import packed
from tests.refusing import refuses
from tests.unit.readers.conftest import encoded

MARKS = [[40, 40], [60, 40], [50, 50], [42, 60], [58, 60]]


def member(archive, name, data, **more):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in more.items():
        setattr(info, key, value)
    archive.addfile(info, io.BytesIO(data) if info.isreg() else None)


def sample(archive, key, number, text="a face", nsfw="UNLIKELY", seed=0, size=(200, 100), **facts):
    member(archive, f"{key}.jpg", encoded(seed, size))
    if text is not None:
        member(archive, f"{key}.txt", text.encode())
    found = {"SAMPLE_ID": number, "NSFW": nsfw, "caption": "from json", "status": "success"} | facts
    member(archive, f"{key}.json", json.dumps(found).encode())


def face(left=20, top=20, right=60, bottom=60, score=0.99):
    return (np.array([left, top, right, bottom], np.float32), np.array(MARKS, np.float32), np.float32(score))


@pytest.fixture
def tree(tmp_path):
    home = tmp_path / "laion_face_data"
    for folder in (home / "split_00000", home / "split_00003", tmp_path / "detection_metadata"):
        folder.mkdir(parents=True)
    with tarfile.open(home / "split_00000/00000.tar", "w") as archive:
        sample(archive, "000000000", 1234567890123.0, "smiling \nwoman", seed=1)
        sample(archive, "000000001", "22.0", None, seed=2)
        sample(archive, "000000002", 33, nsfw="UNSURE", seed=3)
        sample(archive, "000000003", float("nan"), seed=4)
        sample(archive, "000000004", 55, seed=5)
        sample(archive, "000000005", 66, seed=6)
        sample(archive, "000000006", 22, seed=7)
        member(archive, "000000007.jpg", encoded(8))
        member(archive, "000000008.json", b'{"SAMPLE_ID": 88, "NSFW": "UNLIKELY"}')
        member(archive, "000000009.jpg", encoded(9))
        member(archive, "000000009.json", b"{")
        sample(archive, "000000010", 77, seed=10)
    with tarfile.open(home / "split_00003/00000.tar", "w") as archive:
        sample(archive, "000000000", 99, "", seed=11, caption=None)
    (home / "split_00000/00000.parquet").write_bytes(b"")
    found = {
        1234567890123: [face(), face(100, 20, 160, 80, 0.5), face(100, 20, 105, 80), face(100, 20, 100, 80)],
        22: [face(10, 10, 90, 90)],
        33: [face()],
        66: [],
        77: [(np.zeros(3), np.zeros((5, 2)), 0.99)],
    }
    torch.save(found, tmp_path / "detection_metadata/sample2detect_0.pth")
    torch.save({99: [face(score=0.98)]}, tmp_path / "detection_metadata/sample2detect_3.pth")
    return tmp_path


def test_rows_are_as_written_down(tree, take):
    found = take("laion-face", tree, min_side="40")
    assert found.column("alt_text") == {"1234567890123/0": "smiling \nwoman", "22": "from json", "99": None}
    shard = "laion_face_data/split_00000/00000.tar"
    assert found.refused == [
        Refused(f"{shard}/000000000.jpg", 0, "face 1: score 0.500, below 0.98"),
        Refused(f"{shard}/000000000.jpg", 0, "face 2: a box of 5x60 pixels, smaller than 40"),
        Refused(f"{shard}/000000000.jpg", 0, "face 3: the box is empty"),
        Refused(f"{shard}/000000002.jpg", 0, "NSFW is 'UNSURE', not 'UNLIKELY'"),
        Refused(f"{shard}/000000003.jpg", 0, "SAMPLE_ID is nan, not a number"),
        Refused(f"{shard}/000000004.jpg", 0, "no detections for SAMPLE_ID 55"),
        Refused(f"{shard}/000000005.jpg", 0, "the detector found no face"),
        Refused(f"{shard}/000000006.jpg", 0, "SAMPLE_ID 22 was there already"),
        Refused(f"{shard}/000000007.jpg", 0, "no label row (the .json beside it)"),
        Refused(f"{shard}/000000008", 0, "the picture is missing"),
        Refused(f"{shard}/000000009.jpg", 0, "damaged .json or .txt beside it (JSONDecodeError)"),
        Refused(f"{shard}/000000010.jpg", 0, "a damaged detection"),
    ]


def test_faces_are_framed(tree, take):
    rows = {row["source_id"]: row for row in take("laion-face", tree, min_side="40", min_score="0.4").rows}
    # 20 - 10 = 10 to 60 + 10 = 70
    first = rows["1234567890123/0"]
    assert (first["width"], first["height"]) == (60, 60)
    assert first["box"] == pytest.approx([10, 10, 50, 50])
    assert np.asarray(first["landmarks"]) == pytest.approx(np.array(MARKS) - 10)
    # 100 - 15 = 85 to 175; 20 - 15 = 5 to 95
    second = rows["1234567890123/1"]
    assert (second["width"], second["height"]) == (90, 90)
    assert first["subject_id"] == second["subject_id"] is not None
    assert first["split"] == second["split"]
    assert rows["22"]["subject_id"] is None


def test_options(tree, take):
    assert "33" in take("laion-face", tree, nsfw="keep", min_side="40").column("split")
    assert [row["source_id"] for row in take("laion-face", tree).rows] == []
    (tree / "detection_metadata/sample2detect_3.pth").unlink()
    refuses(r"sample2detect_3\.pth is missing.*detections: none", take, "laion-face", tree)
    whole = take("laion-face", tree, detections="none")
    assert whole.column("width") == dict.fromkeys(["1234567890123", "22", "55", "66", "77", "99"], 200)
    for wrong in ("2", "-0.1", "high"):
        refuses("min_score", take, "laion-face", tree, min_score=wrong)
    refuses("no folders split_00000", take, "laion-face", tree / "detection_metadata")


def test_a_pickle_that_runs_code_is_refused(tree, take):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tree / "harm"),)

    path = tree / "detection_metadata/sample2detect_0.pth"
    torch.save({22: Hostile()}, path)
    refuses("holds more than numbers", take, "laion-face", tree)
    assert not (tree / "harm").exists()
    for content in ([1, 2], {22: 5}, {"x": []}):
        torch.save(content, path)
        refuses("no mapping of SAMPLE_ID", take, "laion-face", tree)
    path.write_bytes(b"\x80\x02}")
    refuses("damaged", take, "laion-face", tree)


def test_files_of_older_libraries_are_read(tree, take):
    """What numpy before 2 and PyTorch before 1.6 wrote: other module names, and no zip archive around it."""
    path = tree / "detection_metadata/sample2detect_0.pth"
    old = io.BytesIO()
    torch.save({22: [face(10, 10, 90, 90)]}, old, _use_new_zipfile_serialization=False)
    path.write_bytes(old.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert b"numpy.core.multiarray" in path.read_bytes()
    assert take("laion-face", tree, min_side="40").column("width")["22"] == 110


def test_detections_are_found_by_number():
    found = packed({7: [face()], 3: [], 5.0: [face(0, 0, 1, 1), "broken"], 2**60: [face(score=0.5)]})
    assert found.ids.tolist() == [3, 5, 7, 2**60]
    assert [found.find(number) for number in (3, 5, 7, 2**60, 4, 2**61, -1)] == [0, 1, 2, 3, -1, -1, -1]
    assert (len(found.at(0)), found.at(1)[0, :4].tolist()) == (0, [0, 0, 1, 1])
    assert np.isnan(found.at(1)[1]).all()
    assert found.at(3)[0, 14] == 0.5


class TestShards:
    def read(self, path):
        found = list(shards.samples(path, path.parent))
        return [s.key for s in found if not isinstance(s, Refused)], [s for s in found if isinstance(s, Refused)]

    def test_hostile_members_are_refused_and_the_rest_is_read(self, tmp_path, monkeypatch):
        monkeypatch.setattr(shards, "MAX_TEXT", 100)
        monkeypatch.setattr(shards, "MAX_BYTES", 5000)
        special = {"link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE}
        special |= {"device": tarfile.CHRTYPE, "sparse": tarfile.GNUTYPE_SPARSE}
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            member(archive, "folder", b"", type=tarfile.DIRTYPE)
            member(archive, "../../out.jpg", b"x")
            member(archive, "/root.jpg", b"x")
            for name, kind in special.items():
                member(archive, f"{name}.jpg", b"", type=kind, linkname="/etc/passwd")
            member(archive, "big.txt", b"x" * 101)
            member(archive, "big.jpg", b"x" * 5001)
            for number, key in enumerate(("1", "1/2", "1", "3")):
                sample(archive, key, number, size=(8, 8))
        keys, refused = self.read(tmp_path / "a.tar")
        assert keys == ["1", "1/2", "3"]
        assert [(r.file, r.reason) for r in refused] == [
            ("a.tar/../../out.jpg", "its name leads out of the shard"),
            ("a.tar//root.jpg", "its name leads out of the shard"),
            *((f"a.tar/{name}.jpg", "a link, device or other special member") for name in special),
            ("a.tar/big.txt", "101 bytes, more than 100"),
            ("a.tar/big.jpg", "5,001 bytes, more than 5,000"),
            ("a.tar/1.jpg", "its name stands in the shard already"),
        ]

    def test_a_shard_that_breaks_off_gives_what_came_before(self, tree, take):
        path = tree / "laion_face_data/split_00000/00000.tar"
        whole = path.read_bytes()
        at = whole.index(b"000000002.jpg")
        for cut in (at + 700, at):
            path.write_bytes(whole[:cut])
            found = take("laion-face", tree, min_side="40")
            assert list(found.column("split")) == ["1234567890123/0", "22", "99"]
            assert "cut short" in found.refused[-1].reason
        path.write_bytes(b"no tar file at all" * 100)
        found = take("laion-face", tree, min_side="40")
        assert list(found.column("split")) == ["99"]
        assert [r.file for r in found.refused] == ["laion_face_data/split_00000/00000.tar"]


def dotted(root, take, *members):
    """What is read of a shard whose members have these names; every .json has the next number, every .txt its name."""
    (root / "split_00000").mkdir()
    with tarfile.open(root / "split_00000/00000.tar", "w") as archive:
        for number, name in enumerate(members):
            facts = json.dumps({"SAMPLE_ID": number, "NSFW": "UNLIKELY"}).encode()
            other = encoded(number) if name.endswith(".jpg") else name.encode()
            member(archive, name, facts if name.endswith(".json") else other)
    found = take("laion-face", root, detections="none")
    return found.column("alt_text"), [(row.file.rpartition("/")[2], row.reason) for row in found.refused]


def test_members_of_a_sample_are_named_after_what_stands_before_the_first_dot(tmp_path, take):
    members = ("s0.input.jpg", "s0.output.txt", "s0.json", "s1.input.jpg", "s1.output.txt", "s1.json")
    assert dotted(tmp_path, take, *members) == ({"2": "s0.output.txt", "5": "s1.output.txt"}, [])


def test_keys_with_dots_are_samples_of_their_own(tmp_path, take):
    members = ("a.v1.jpg", "a.v1.json", "a.v1.txt", "a.v2.jpg", "a.v2.json", "a.v2.txt")
    assert dotted(tmp_path, take, *members) == ({"1": "a.v1.txt", "4": "a.v2.txt"}, [])


def test_two_pictures_with_one_label_file_are_refused(tmp_path, take):
    reason = "several pictures of this name and one label file; give each its own, or one picture"
    assert dotted(tmp_path, take, "s0.input.jpg", "s0.output.jpg", "s0.json", "s1.jpg", "s1.json", "s1.jpg") == (
        {"4": None},
        [
            ("s0.input.jpg", "no label row (the .json beside it)"),
            ("s0.output.jpg", reason),
            ("s1.jpg", "its name stands in the shard already"),
        ],
    )
