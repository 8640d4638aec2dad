"""The readers of LFWA (MATLAB v7.3 as MATLAB writes it) and MAAD-Face: names, codes, splits, contradictions."""

import h5py
import numpy as np
import pytest

from facemllm.ingest.labels import Names
from facemllm.ingest.reader import Refused
from facemllm.ingest.readers.attribute_tables import lfwa_labels
from facemllm.tables import subject_id
from facemllm.tables.schemas import CELEBA as NAMES
from tests.refusing import refuses

PICTURES = (
    *("Aaron_Eckhart\\Aaron_Eckhart_0001.jpg", "Aaron_Eckhart\\Aaron_Eckhart_0002.jpg"),
    *("Zoë_Núñez\\Zoë_Núñez_0001.jpg", "Aaron_Eckhart\\Aaron_Eckhart_0001.jpg", "Aaron_Eckhart\\Zoë_Núñez_0001.jpg"),
    *("..\\..\\secret_0001.jpg", "Bad_Value\\Bad_Value_0001.jpg", "No_Number\\No_Number_0001.jpg"),
    *("Both_Splits\\Both_Splits_0001.jpg", "No_Split\\No_Split_0001.jpg", "Not_There\\Not_There_0001.jpg", ""),
)
TRAIN, TEST = (1, 2, 4, 5, 6, 7, 8, 9, 99, 2.5), (3, 9, 11, 12, 0)


def cells(file, key, texts, column=True):
    """A cell array of texts: references to (length, 1) arrays of UTF-16, an empty text as MATLAB's empty array."""
    made = file.require_group("#refs#")
    references = []
    for text in texts:
        units = np.frombuffer(text.encode("utf-16-le"), np.uint16)[:, None]
        cell = made.create_dataset(f"{key}{len(made)}", data=units if text else np.zeros(2, np.uint64))
        cell.attrs["MATLAB_class"] = np.bytes_("char")
        references.append(cell.ref)
    shape = (1, len(references)) if column else (len(references), 1)
    whole = file.create_dataset(key, shape, dtype=h5py.ref_dtype)
    whole[...] = np.array(references, dtype=object).reshape(shape)
    whole.attrs["MATLAB_class"] = np.bytes_("cell")


def attribute_file(path, names, pictures, values, column=True):
    """`values` as MATLAB has them, pictures x attributes; on disk they lie transposed, behind MATLAB's 512 bytes."""
    with h5py.File(path, "w", userblock_size=512) as file:
        cells(file, "AttrName", names, column=False)
        cells(file, "name", pictures, column)
        file["label"] = np.asarray(values, float).T
    with path.open("r+b") as raw:
        raw.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM")


def index_file(path, train=TRAIN, test=TEST):
    with h5py.File(path, "w", userblock_size=512) as file:
        file["indices_img_train"] = np.array([train], float)
        file["indices_img_test"] = np.array([test], float).T
        file["indices_identity_train"] = np.array([[1.0]])


@pytest.fixture
def values():
    made = np.zeros((len(PICTURES), len(NAMES)))
    made[0, NAMES.index("Smiling")] = 1
    made[1, NAMES.index("Male")] = 1
    made[6, NAMES.index("Bald")] = 3
    made[7, NAMES.index("Bangs")] = np.nan
    return made


@pytest.fixture
def tree(tmp_path, pictures, values):
    attribute_file(tmp_path / "lfw_att_40.mat", NAMES, PICTURES, values)
    index_file(tmp_path / "indices_train_test.mat")
    there = [name.replace("\\", "/") for name in PICTURES[:10] if not name.startswith("..")]
    unlabelled = ("Unlabelled/Unlabelled_0001.jpg", "Unlabelled/\udcff.jpg")
    pictures(tmp_path / "lfw", *there, *unlabelled, size=(250, 250))
    return tmp_path


def test_rows_splits_and_subjects_and_refused_rows_with_their_place_from_1(tree, take):
    found = take("lfwa", tree, ["ingest.validation_share=0.0"])
    none = dict.fromkeys(NAMES, False)
    aaron, zoe = (subject_id("lfwa", name) for name in ("Aaron_Eckhart", "Zoë_Núñez"))
    columns = ("source_id", "split", "attributes", "gender", "subject_id", "width", "height")
    assert [tuple(row[name] for name in columns) for row in found.rows] == [
        ("Aaron_Eckhart_0001", "train", none | {"Smiling": True}, "female", aaron, 250, 250),
        ("Aaron_Eckhart_0002", "train", none | {"Male": True}, "male", aaron, 250, 250),
        ("Zoë_Núñez_0001", "test", none, "female", zoe, 250, 250),
    ]
    expected = "is no picture of a person, as Aaron_Eckhart\\Aaron_Eckhart_0001.jpg"
    assert found.refused == [
        Refused("indices_train_test.mat", 9, "indices_img_train has 99; 1 to 12 were expected"),
        Refused("indices_train_test.mat", 10, "indices_img_train has 2.5; 1 to 12 were expected"),
        Refused("indices_train_test.mat", 5, "indices_img_test has 0; 1 to 12 were expected"),
        Refused("lfw_att_40.mat", 4, "Aaron_Eckhart_0001.jpg has a row already"),
        Refused("lfw_att_40.mat", 5, f"Aaron_Eckhart\\Zoë_Núñez_0001.jpg {expected}"),
        Refused("lfw_att_40.mat", 6, "the path '..\\\\..\\\\secret_0001.jpg' leads out of the dataset's folder"),
        Refused("lfw_att_40.mat", 7, "Bald is '3.0'; 1 and -1, or 1 and 0, were expected"),
        Refused("lfw_att_40.mat", 8, "Bangs is 'nan'; 1 and -1, or 1 and 0, were expected"),
        Refused("lfw_att_40.mat", 9, "Both_Splits_0001.jpg is in train and test of indices_train_test.mat"),
        Refused("lfw_att_40.mat", 10, "No_Split_0001.jpg is in neither split of indices_train_test.mat"),
        Refused("lfw/Not_There/Not_There_0001.jpg", 11, "the picture is missing"),
        Refused("lfw_att_40.mat", 12, "its name is no text"),
        Refused("lfw/Unlabelled/Unlabelled_0001.jpg", 0, "no label row"),
        Refused("lfw/Unlabelled/\\udcff.jpg", 0, "no label row"),
    ]


def test_labels_of_1_and_minus_1_and_names_in_a_row(tree, take, values):
    attribute_file(tree / "lfw_att_40.mat", NAMES, PICTURES[:3], values[:3] * 2 - 1, column=False)
    index_file(tree / "indices_train_test.mat", (1, 2), (3,))
    found = take("lfwa", tree)
    assert found.column("attributes")["Aaron_Eckhart_0002"] == dict.fromkeys(NAMES, False) | {"Male": True}
    assert len(found.rows) == 3


def test_seventy_three_attributes_are_spelled_as_in_celeba_where_it_has_them(tree, take):
    names = ["Male", "Wearing Hat", "5 o' Clock Shadow", "Strong Nose-Mouth Lines", "Teeth Not Visible", "middle aged"]
    names += [f"Other {number}" for number in range(67)]
    values = np.zeros((1, 73))
    values[0, [1, 3]] = 1
    attribute_file(tree / "lfw_att_73.mat", names, PICTURES[:1], values)
    index_file(tree / "indices_train_test.mat", (1,), ())
    (row,) = take("lfwa", tree, attributes="73").rows
    spelled = {name: value for name, value in row["attributes"].items() if not name.startswith("Other")}
    truths = {"Male": False, "Wearing_Hat": True, "5_o_Clock_Shadow": False, "Strong_Nose_Mouth_Lines": True}
    assert spelled == truths | {"Teeth_Not_Visible": False, "Middle_Aged": False}
    attribute_file(tree / "lfw_att_73.mat", names[:-1], PICTURES[:1], values[:, :-1])
    refuses("AttrName has 72 different names; 73 were expected", take, "lfwa", tree, attributes="73")


def test_funneled_pictures_nested_in_themselves(tree, take, pictures):
    (tree / "lfw").rename(tree / "old")
    pictures(tree / "lfw-deepfunneled/lfw-deepfunneled", *(name.replace("\\", "/") for name in PICTURES[:3]))
    assert len(take("lfwa", tree).rows) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lfw_att_40.mat", "lfw_att_40.mat is missing"),
        ("indices_train_test.mat", "indices_train_test.mat is missing"),
        ("lfw", "lfw-deepfunneled or lfw_deepfunneled is missing"),
    ],
)
def test_what_is_missing_is_named(tree, take, name, message):
    (tree / name).rename(tree / "elsewhere")
    refuses(message, take, "lfwa", tree)


def test_other_files_than_v7_3_are_named(tree, take):
    (tree / "lfw_att_40.mat").write_bytes(b"MATLAB 5.0 MAT-file" + bytes(600))
    refuses(r"no MATLAB v7\.3 file .HDF5.", take, "lfwa", tree)


def replaced(name, *shape, **options):
    """An edit that puts another data set in the place of a variable."""

    def edit(file):
        del file[name]
        file.create_dataset(name, *shape, **options)

    return edit


def linked(file):
    del file["label"]
    file["label"] = h5py.ExternalLink("x", "y")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda f: f.__delitem__("name"), "variable name is missing; found AttrName, label"),
        (lambda f: f.move("AttrName", "Names"), "variable AttrName is missing"),
        (replaced("label", data=np.zeros((12, 40))), "label is 12 x 40 on"),
        (replaced("name", data=np.zeros(12)), "name .float64, 12 entries. is"),
        (linked, "label is missing"),
        (replaced("label", (40, 10**9), "u1", chunks=True), "label .uint8"),
        (
            replaced("label", (40, 12), "u1", external=[("elsewhere.bin", 0, 480)]),
            "label .uint8, 480 entries. is not what LFWA has there",
        ),
    ],
)
def test_variables_that_are_not_what_they_should_be(tree, take, edit, message):
    with h5py.File(tree / "lfw_att_40.mat", "r+") as file:
        edit(file)
    refuses(message, take, "lfwa", tree)


def test_a_dangling_reference_is_no_text(tree):
    with h5py.File(tree / "lfw_att_40.mat", "r+") as file:
        file["name"][0, 0] = h5py.Reference()
        file["name"][0, 1] = file["#refs#"].ref
    texts = lfwa_labels(tree / "lfw_att_40.mat", 40)[1]
    assert texts[:3] == [None, None, PICTURES[2]]


def test_an_unknown_attribute_is_named(tree, take, values):
    attribute_file(tree / "lfw_att_40.mat", [*NAMES[:-1], "Tall"], PICTURES, values)
    refuses(r"lfw_att_40\.mat: column Tall is unknown", take, "lfwa", tree)


HEADER = (
    "Male Young Middle_Aged Senior Asian White Black Rosy_Cheeks Shiny_Skin Bald Wavy_Hair Receding_Hairline Bangs "
    "Sideburns Black_Hair Blond_Hair Brown_Hair Gray_Hair No_Beard Mustache 5_o_Clock_Shadow Goatee Oval_Face "
    "Square_Face Round_Face Double_Chin High_Cheekbones Chubby Obstructed_Forehead Fully_Visible_Forehead Brown_Eyes "
    "Bags_Under_Eyes Bushy_Eyebrows Arched_Eyebrows Mouth_Closed Smiling Big_Lips Big_Nose Pointy_Nose Heavy_Makeup "
    "Wearing_Hat Wearing_Earrings Wearing_Necktie Wearing_Lipstick No_Eyewear Eyeglasses Attractive"
)
NAMES_MAAD_FACE = HEADER.split()
FILE = "MAAD_Face.csv"
KEEP = ["ingest.validation_share=0.0", "ingest.test_share=0.0"]


def line(name, identity, **values):
    return ",".join((name, str(identity), *(str(values.get(attribute, 0)) for attribute in NAMES_MAAD_FACE)))


def write(root, *rows, header=("Filename", "Identity", *NAMES_MAAD_FACE), end="\r\n", mark=b"\xef\xbb\xbf"):
    text = end.join((",".join(header), *rows, ""))
    (root / FILE).write_bytes(mark + text.encode())


@pytest.fixture
def maad_face(tmp_path, pictures):
    good = ("train/n000002/0001_01.jpg", "train/n000002/0002_01.jpg", "test/n000001/0001_01.jpg")
    odd = ("train/n000713/0437_101.jpg", "test/n000005/0001_01.jpg", "train/n000005/0002_02.jpg")
    pictures(tmp_path, *good, *odd, "train/n000002/0009_01.jpg")
    write(
        tmp_path,
        line("n000002/0001_01.jpg", 2, Male=1, Smiling=-1, Bald=-1),
        line("n000002/0002_01.jpg", "n000002", Male=-1, Attractive=1),
        line("n000001/0001_01.jpg", 1, Young=1, White=1, Asian=-1),
        line("n000713/0437_101.jpg", "713\\"),
        line("n000002/0001_01.jpg", 2, Male=1),
        line("n000002/0003_01.jpg", 2, Male=1),
        line("n000002/0004_01.jpg", 2, Male=2),
        line("n000002/0005_01.jpg", 2) + ",1",
        line("n000002/0006_01.jpg", 3),
        line("n000005/0001_01.jpg", 5),
        line("../n000002/0001_01.jpg", 2),
        line("train/n000002/0001_01.jpg", 2),
        line("n000009/0001_01.jpg", 9, Male=1),
    )
    return tmp_path


def test_undefined_is_left_out_splits_are_the_folders_and_what_cannot_be_used_is_refused(maad_face, take):
    found = take("maad-face", maad_face, KEEP)
    two, one = (subject_id("maad-face", person) for person in ("n000002", "n000001"))
    columns = ("source_id", "attributes", "gender", "split", "subject_id")
    assert [tuple(row.get(name) for name in columns) for row in found.rows] == [
        ("n000002/0001_01", {"Male": True, "Smiling": False, "Bald": False}, "male", "train", two),
        ("n000002/0002_01", {"Male": False, "Attractive": True}, "female", "train", two),
        ("n000001/0001_01", {"Young": True, "White": True, "Asian": False}, None, "test", one),
    ]
    assert found.refused == [
        Refused(FILE, 5, "Identity '713\\\\' contradicts the n000713 of Filename"),
        Refused(FILE, 6, "n000002/0001_01.jpg has a row already"),
        Refused("train/n000002/0003_01.jpg", 7, "the picture is missing"),
        Refused(FILE, 8, "Male is '2'; 1, -1 or 0 was expected"),
        Refused(FILE, 9, "50 fields where the header has 49"),
        Refused(FILE, 10, "Identity '3' contradicts the n000002 of Filename"),
        Refused(FILE, 11, "n000005 lies in train and test; a person is in one split only"),
        Refused(FILE, 12, "the path '../n000002/0001_01.jpg' leads out of the dataset's folder"),
        Refused(FILE, 13, "Filename 'train/n000002/0001_01.jpg' is no person's picture, as n000002/0001_01.jpg"),
        Refused("n000009/0001_01.jpg", 14, "the picture is missing"),
        Refused("train/n000002/0009_01.jpg", 0, "no label row"),
        Refused("train/n000005/0002_02.jpg", 0, "no label row"),
        Refused("train/n000713/0437_101.jpg", 0, "no label row"),
    ]


def test_another_spelling_of_the_header_and_a_saved_index(tmp_path, pictures, take):
    pictures(tmp_path / "data", "val/n000003/0001_01.jpg", "train/n000004/0001_01.jpg")
    header = ("", "filename", "IDENTITY", *(name.replace("_", " ").lower() for name in NAMES_MAAD_FACE))
    rows = ("0," + line("n000003\\0001_01.jpg", 3, Wearing_Hat=1), "1," + line("n000004/0001_01.jpg", 4, Male=-1))
    write(tmp_path, *rows, header=header, end="\n", mark=b"")
    found = take("maad-face", tmp_path, KEEP)
    assert found.column("attributes") == {"n000003/0001_01": {"Wearing_Hat": True}, "n000004/0001_01": {"Male": False}}
    assert found.column("split") == {"n000003/0001_01": "validation", "n000004/0001_01": "train"}
    assert found.refused == []


def test_a_row_with_every_label_unknown_is_refused(tmp_path, pictures, take):
    pictures(tmp_path, "n000003/0001_01.jpg")
    write(tmp_path, line("n000003/0001_01.jpg", 3))
    assert take("maad-face", tmp_path).refused == [Refused("n000003/0001_01.jpg", 2, "every label is unknown")]


def test_persons_right_in_the_root_are_split_by_person(tmp_path, pictures, take):
    names = [f"n{person:06d}/{number:04d}_01.jpg" for person in range(12) for number in (1, 2)]
    pictures(tmp_path, *names)
    write(tmp_path, *(line(name, int(name[1:7]), Male=1) for name in names))
    found = take("maad-face", tmp_path, ["ingest.validation_share=0.3", "ingest.test_share=0.3"])
    splits = [row["split"] for row in found.rows]
    assert set(splits) == {"train", "validation", "test"}
    assert splits[::2] == splits[1::2]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (("Identity", *NAMES_MAAD_FACE), "line 1: column Filename is missing or there twice"),
        (("Filename", *NAMES_MAAD_FACE), "line 1: column Identity is missing or there twice"),
        (("Filename", "Identity", *NAMES_MAAD_FACE[1:]), "line 1: column Male is missing; these were expected: "),
        (("Filename", "Identity", "Tall", *NAMES_MAAD_FACE), "line 1: column Tall is unknown"),
        (("Filename", "Identity", "male", *NAMES_MAAD_FACE), "line 1: column Male is there twice"),
    ],
)
def test_a_wrong_header_is_named(maad_face, take, header, message):
    write(maad_face, header=header)
    refuses(message, take, "maad-face", maad_face)


def test_missing_or_empty_files_are_named(maad_face, take):
    (maad_face / FILE).write_bytes(b"")
    refuses("column Filename, Identity is missing", take, "maad-face", maad_face)
    (maad_face / FILE).unlink()
    refuses(r"MAAD_Face\.csv or .* is missing", take, "maad-face", maad_face)


def test_missing_persons_are_named(tmp_path, take):
    write(tmp_path, line("n000002/0001_01.jpg", 2))
    refuses(r"no person's folder .as n000002. here, in train/ or in test/", take, "maad-face", tmp_path)


def test_a_set_of_names_is_exact_and_small():
    names = Names()
    assert all(names.add(f"n{number // 360:06d}/{number:04d}_01.jpg") for number in range(20_000))
    assert not any(names.add(f"n{number // 360:06d}/{number:04d}_01.jpg") for number in range(0, 20_000, 7))
    assert "n000000/0000_01.jpg" in names
    assert "n000000/0000_02.jpg" not in names
