"""CelebAMask-HQ: paint order of its part masks, splits through the mapping, poses by the names of their columns."""

import io

import numpy as np
import pytest
from PIL import Image

from facemllm.ingest.reader import Refused
from facemllm.tables import subject_id
from facemllm.tables.schemas import CELEBA as NAMES
from tests.refusing import refuses

MASKS = "CelebAMask-HQ-mask-anno"
ATTRIBUTES = "CelebAMask-HQ-attribute-anno.txt"
POSES = "CelebAMask-HQ-pose-anno.txt"
MAPPING = "CelebA-HQ-to-CelebA-mapping.txt"
PARTITION = "list_eval_partition.txt"


def line(name, *true):
    return f"{name}  " + " ".join("1" if attribute in true else "-1" for attribute in NAMES)


def mask(root, number, part, box, mode="RGB", size=(32, 32)):
    """A part mask: white, or as a palette picture in index 7, inside `box` (left, top, right, bottom)."""
    pixels = np.zeros(size[::-1], np.uint8)
    left, top, right, bottom = box
    pixels[top:bottom, left:right] = 7 if mode == "P" else 255
    picture = Image.fromarray(pixels)
    if mode == "P":
        picture.putpalette([0, 0, 0] * 7 + [0, 0, 9])
    path = root / MASKS / str(number // 2000) / f"{number:05d}_{part}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.convert(mode).save(path)
    return path


@pytest.fixture
def tree(tmp_path, picture):
    """Pictures of 64 x 64 with masks of 32 x 32, in two mask folders; CelebA's own files in a folder beside."""
    root = tmp_path / "CelebAMask-HQ"
    numbers = (0, 1, 2, 3, 4, 5, 6, 2000, 2001)
    for number in numbers:
        picture(root / f"CelebA-HQ-img/{number}.jpg", number)
        mask(root, number, "skin", (0, 8, 32, 32))
    mask(root, 7, "skin", (0, 8, 32, 32))
    mask(root, 0, "neck", (12, 28, 20, 32), "P")
    mask(root, 0, "nose", (14, 16, 18, 22), "L")
    mask(root, 0, "hair", (0, 0, 32, 12))
    rows = [line(f"{number}.jpg", "Male") for number in (0, 1, 2, 2000)]
    rows += [line("7.jpg", "Young"), line("3.jpg").replace("-1", "5", 1), line("3.jpg"), line("4.jpg"), line("x.jpg")]
    text = "\r\n".join(("10", " ".join(NAMES), *rows, line("5.jpg"), line("6.jpg"), ""))
    (root / ATTRIBUTES).write_bytes(b"\xef\xbb\xbf" + text.encode())
    poses = ("4", "Yaw Pitch Raw", "0.jpg 1.5 -2.5 3.5", "1.jpg 0 0 181", "2000.jpg 4 5 6", "9.jpg 1 2")
    (root / POSES).write_text("\n".join(poses))
    mapping = ("0         119613         119614.jpg", "1 99094 099095.jpg", "2 162770 162771.jpg", "3 1 000002.jpg")
    mapping += ("2000 182637 182638.jpg", "5 1 000002.jpg", "6 7 000008.jpg", "7 8 000009.jpg")
    (root / MAPPING).write_text("\n".join(("idx   orig_idx    orig_file", *mapping)))
    own = tmp_path / "CelebA"
    (own / "Eval").mkdir(parents=True)
    parts = ("000002.jpg 0", "000008.jpg 3", "000009.jpg 0", "099095.jpg 0", "119614.jpg 0", "120000.jpg 9")
    (own / "Eval" / PARTITION).write_text("\n".join((*parts, "162770.jpg 0", "162771.jpg 1", "182638.jpg 2", "")))
    (own / "Anno").mkdir()
    (own / "Anno" / "identity_CelebA.txt").write_text("119614.jpg 77\n120000.jpg 1\n182638.jpg 78\n")
    return root


def classes(row):
    return np.asarray(Image.open(io.BytesIO(row["segmentation"]["bytes"])))


def test_splits_labels_poses_and_subjects(tree, take):
    found = take("celebamask-hq", tree, ["ingest.validation_share=0.0", "ingest.test_share=0.0"])
    # counted from 0, orig_idx 162770 and 182637 would put both pictures one split too early
    assert found.column("split") == {"0": "train", "1": "train", "2": "validation", "2000": "test"}
    first, last = (subject_id("celebamask-hq", person) for person in ("77", "78"))
    assert found.column("subject_id") == {"0": first, "1": None, "2": None, "2000": last}
    angles = [[row.get(name) for name in ("yaw", "pitch", "roll")] for row in found.rows]
    assert angles == [[1.5, -2.5, 3.5], [None] * 3, [None] * 3, [4, 5, 6]]
    assert all(row["attributes"] == dict.fromkeys(NAMES, False) | {"Male": True} for row in found.rows)
    assert all(row["gender"] == "male" for row in found.rows)

    assert found.refused == [
        Refused(MAPPING, 7, "000002.jpg is mapped to 3 already"),
        Refused("CelebA/Eval/list_eval_partition.txt", 2, "000008.jpg: partition is '3', not 0, 1 or 2"),
        Refused(POSES, 4, "1.jpg: raw is 181, outside -180 to 180"),
        Refused(POSES, 6, "3 fields where 4 were expected"),
        Refused("CelebA-HQ-img/7.jpg", 7, "the picture is missing"),
        Refused(ATTRIBUTES, 8, "5_o_Clock_Shadow is '5'; 1 and -1, or 1 and 0, were expected"),
        Refused(ATTRIBUTES, 9, "3.jpg has a row already"),
        Refused(ATTRIBUTES, 10, f"4.jpg has no split: no usable row in {MAPPING} or list_eval_partition"),
        Refused(ATTRIBUTES, 11, "x.jpg is no numbered picture, as 0.jpg"),
        Refused(ATTRIBUTES, 12, f"5.jpg has no split: no usable row in {MAPPING} or list_eval_partition"),
        Refused(ATTRIBUTES, 13, f"6.jpg has no split: no usable row in {MAPPING} or list_eval_partition"),
        Refused(ATTRIBUTES, 1, "says 10 rows, 11 follow; the file may be cut off"),
        Refused("CelebA-HQ-img/2001.jpg", 0, "no label row"),
    ]


def test_masks_are_painted_in_the_published_order(tree, take):
    found = take("celebamask-hq", tree)
    segmentation = classes(found.rows[0])
    # masks of 32 cover a picture of 64: every mask pixel is two by two; hair (13) over skin (1), neck (17) over skin
    expected = np.zeros((32, 32), np.uint8)
    expected[8:] = 1
    expected[16:22, 14:18] = 2
    expected[:12] = 13
    expected[28:32, 12:20] = 17
    assert segmentation.shape == (64, 64)
    assert np.array_equal(segmentation, expected.repeat(2, 0).repeat(2, 1))
    assert set(np.unique(classes(found.rows[-1]))) == {0, 1}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("absent", f"none of its masks is in {MASKS}/1"),
        ("size", "mask 02000_hat.png is 16x32, others 32x32"),
        ("text", "mask 02000_skin.png: not a JPEG, PNG, WEBP, BMP picture, whatever its name says"),
        ("cut", "mask 02000_skin.png: damaged: image file is truncated"),
        ("link", "mask 02000_skin.png: a link leads out of the dataset's folder; name where it leads in ingest.links"),
        ("folder", "mask 02000_skin.png cannot be read: "),
    ],
)
def test_a_picture_without_sound_masks_is_refused(tree, take, damage, reason):
    skin = tree / MASKS / "1" / "02000_skin.png"
    content = skin.read_bytes()
    if damage == "size":
        mask(tree, 2000, "hat", (0, 0, 9, 9), size=(16, 32))
    elif damage == "text":
        skin.write_text("sorry")
    elif damage == "cut":
        noise = np.random.default_rng(0).integers(0, 255, (32, 32), np.uint8)
        Image.fromarray(noise).save(skin)
        skin.write_bytes(skin.read_bytes()[:600])
    else:
        skin.unlink()
    if damage == "link":
        (tree.parent / "outside.png").write_bytes(content)
        skin.symlink_to(tree.parent / "outside.png")
    elif damage == "folder":
        skin.mkdir()
    found = take("celebamask-hq", tree)
    assert [row["source_id"] for row in found.rows] == ["0", "1", "2"]
    (refused,) = [row for row in found.refused if row.file == "CelebA-HQ-img/2000.jpg"]
    assert refused.row == 6
    assert refused.reason.startswith(reason)


def test_own_splits_keep_the_subjects_and_need_neither_mapping_nor_partition(tree, take):
    found = take("celebamask-hq", tree, ["ingest.validation_share=0.0", "ingest.test_share=0.0"], splits="own")
    assert found.column("subject_id")["2000"] == subject_id("celebamask-hq", "78")
    assert set(found.column("split").values()) == {"train"}
    (tree / MAPPING).unlink()
    subjects = take("celebamask-hq", tree, splits="own").column("subject_id")
    assert subjects == dict.fromkeys(("0", "1", "2", "2000", "4", "5", "6"))


def test_poses_in_another_order_of_columns(tree, take):
    (tree / POSES).write_text("1\nroll yaw pitch\n0.jpg 3 1 2\n")
    row = take("celebamask-hq", tree).rows[0]
    assert (row["yaw"], row["pitch"], row["roll"]) == (1, 2, 3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (POSES, "1\nYaw Pitch Tilt\n", "line 2: columns Yaw Pitch Tilt; expected Yaw Pitch Raw"),
        (MAPPING, "0 119613 119614.jpg\n", "line 1: '0 119613 119614.jpg'; expected idx orig_idx orig_file"),
        (MAPPING, None, f"{MAPPING} is missing"),
        (ATTRIBUTES, None, f"{ATTRIBUTES} is missing"),
        (f"../CelebA/Eval/{PARTITION}", None, "list_eval_partition.txt of CelebA is missing; put it there, or"),
    ],
)
def test_a_wrong_label_file_is_named(tree, take, name, content, message):
    if content is None:
        (tree / name).unlink()
    else:
        (tree / name).write_text(content)
    refuses(message, take, "celebamask-hq", tree)


def test_partition_in_the_root_comes_first(tree, take):
    (tree / "Eval").mkdir()
    (tree / "Eval" / PARTITION).write_text("119614.jpg 2\r\n")
    assert take("celebamask-hq", tree).column("split") == {"0": "test"}
