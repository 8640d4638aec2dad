"""The tasks beside the default six: labels by hand, their vocabularies, and where they stay silent."""

import re
from dataclasses import replace

import pytest

from facemllm import tasks
from facemllm.scoring.summary import CELEBA_TASKS
from facemllm.tables.schemas import CELEBA, LFWA_ONLY, MAAD_ONLY, SEGMENTATION
from facemllm.tasks import action_units, base, expression_135
from facemllm.tasks.base import fault_of
from facemllm.tasks.items import Several, Thing
from tests.refusing import refuses
from tests.unit.test_tasks_asking import ROWS, segmentation


def label(task, item, **row):
    return tasks.get(task).item(item).label(row)


def test_the_lists_of_attributes_are_asked_whole():
    owners = {i.name: n for n in CELEBA_TASKS for i in tasks.get(n).items if i.form == "boolean"}
    assert (len(CELEBA), len(MAAD_ONLY), len(LFWA_ONLY)) == (40, 13, 22)
    assert {*CELEBA, *MAAD_ONLY, *LFWA_ONLY} <= owners.keys()
    assert {name for name in CELEBA if owners[name] == "presence_of_persons"} == {"Male", "Attractive"}


def test_zero_shot_knows_each_attribute_once_and_nothing_of_persons_which_is_sensitive():
    items = tasks.get("zero_shot").items
    assert [item.name for item in items[:4]] == ["Bangs", "Wearing_Hat", "Wearing_Earrings", "Wearing_Lipstick"]
    assert len({item.name for item in items}) == len(items) == 67
    assert not {item.name for item in tasks.get("presence_of_persons").items} & {item.name for item in items}
    sensitive = {name for name in tasks.all_names() if tasks.get(name).sensitive}
    assert sensitive == {"gender", "ethnicity", "presence_of_persons"}


def test_ethnicity_is_asked_in_the_categories_of_its_source():
    assert label("ethnicity", "ethnicity_fairface", source="fairface", ethnicity="east_asian") == "east_asian"
    assert label("ethnicity", "ethnicity_utkface", source="fairface", ethnicity="indian") is None
    assert label("ethnicity", "ethnicity_raf_db", source="raf-db", ethnicity="asian") == "asian"
    assert label("ethnicity", "ethnicity_fairface", source="imagefolder", ethnicity="white") is None


def test_tasks_and_readers_share_their_vocabularies():
    from facemllm.ingest.readers import action_units as coded
    from facemllm.ingest.readers import ages, expressions
    from facemllm.tasks import ethnicity, expression_compound

    assert expression_compound.ELEVEN == expressions.RAF_DB_COMPOUND
    assert {str(n) for n in action_units.BP4D} == set(coded.BP4D_UNITS)
    assert coded.DISFA_UNITS["benchmark"] == action_units.DISFA
    units = (1, 2, 4, 6, 7, 9, 10, 12, 14, 15, 17, 23, 24, 25, 26)
    assert [item.name for item in tasks.get("action_units").items] == [f"AU{n}" for n in units]
    assert set(ethnicity.SCHEMES["fairface"][1]) == set(ages.FAIRFACE_RACES.values())
    assert ethnicity.SCHEMES["utkface"][1] == ages.UTKFACE_RACES
    assert ethnicity.SCHEMES["raf-db"][1] == expressions.RAF_DB_RACES
    assert set(ethnicity.SCHEMES["morph2"][1]) == set(ages.MORPH2_RACES.values())
    assert len(set(expression_135.NAMES)) == len(expression_135.NAMES) == 135


@pytest.mark.parametrize(
    ("task", "row", "found"),
    [
        ("expression_8", {"expression": "contempt"}, "contempt"),
        ("expression_compound", {"expression": "sadly_angry"}, "sadly_angry"),
        ("expression_compound", {"expression": "happiness"}, None),
        ("expression_135", {"source": "emo135", "expression": "grief"}, "grief"),
        ("expression_135", {"source": "emo135", "expression": "moon"}, None),
        ("expression_135", {"source": "raf-db", "expression": "fear"}, None),
        ("age_range", {"age_range": "20-29"}, "20-29"),
        ("age_range", {"age_range": "20-29", "age": 70.0}, "20-29"),
        ("age_range", {"age_range": "4-19", "age": 12.0}, "10-19"),
        ("age_range", {"age_range": "4-19"}, None),
        ("age_range", {"age": 2.9}, "0-2"),
        ("age_range", {"age": 3.0}, "3-9"),
        ("age_range", {"age": 69.99}, "60-69"),
        ("age_range", {"age": 70.0}, "70+"),
        ("age_range", {"age": -1.0}, None),
        ("age_range", {"age": float("nan")}, None),
        ("age_range", {}, None),
    ],
)
def test_labels_of_expressions_and_age_ranges(task, row, found):
    assert label(task, task, **row) == found


@pytest.mark.parametrize(
    ("row", "present", "intensity"),
    [
        ({"source": "disfa", "action_units": {"AU12": 1.0}}, "no", "1"),
        ({"source": "disfa", "action_units": {"AU12": 2.0}}, "yes", "2"),
        ({"source": "bp4d", "action_units": {"AU12": 1.0}}, "yes", None),
        ({"source": "bp4d", "action_units": {"AU12": 0.0}}, "no", None),
        ({"source": "imagefolder", "action_units": {"AU12": 1.0, "AU1": 0.0}}, "yes", None),
        ({"source": "imagefolder", "action_units": {"AU12": 1.0, "AU1": 3.0}}, "no", "1"),
        ({"source": "render", "action_units": [{"name": "AU12", "value": 2.5}]}, "yes", "2.5"),
        ({"source": "disfa", "action_units": {"AU12": None}}, None, None),
        ({"source": "disfa", "action_units": None}, None, None),
    ],
)
def test_action_units_are_there_from_intensity_two(row, present, intensity):
    assert label("action_units", "AU12", **row) == present
    assert label("action_unit_intensity", "AU12_intensity", **row) == intensity


@pytest.mark.parametrize(
    ("yaw", "value", "text"),
    [
        (10.0, "10_20", "turned 10 to 20 degrees left"),
        (-10.0, "-10_0", "turned 0 to 10 degrees right"),
        (-10.1, "-20_-10", "turned 10 to 20 degrees right"),
        (0.0, "0_10", "turned 0 to 10 degrees left"),
        (-100.0, "-100_-90", "turned 90 to 100 degrees right"),
        (100.0, None, None),
        (float("nan"), None, None),
        (None, None, None),
    ],
)
def test_bins_of_the_head_pose(yaw, value, text):
    task = tasks.get("head_pose_bins")
    assert task.item("yaw_bin").label({"yaw": yaw}) == value
    assert text is None or task.item("yaw_bin").option_for(value).text == text
    assert len(task.item("yaw_bin").options) == 20


FIVE = [[30.0, 40.0], [90.0, 40.0], [60.0, 64.0], [45.0, 100.0], [75.0, 100.0]]


def test_regions_of_five_landmarks():
    row = {"landmarks": FIVE, "width": 120, "height": 120}
    found = {item.name: item.label(row) for item in tasks.get("landmarks").items}
    eyes = {"left_eye_region": "middle_left", "right_eye_region": "middle_right"}
    unknown = dict.fromkeys(("left_eyebrow_region", "right_eyebrow_region", "chin_region"))
    assert found == eyes | {"nose_region": "middle_center", "mouth_region": "lower_center"} | unknown


def test_left_is_the_picture_s_left_whatever_the_order_of_the_points():
    swapped = [FIVE[1], FIVE[0], *FIVE[2:]]
    assert label("landmarks", "left_eye_region", landmarks=swapped, width=120, height=120) == "middle_left"
    close = [[60.0, 40.0], [61.0, 50.0], *FIVE[2:]]
    assert label("landmarks", "left_eye_region", landmarks=close, width=120, height=120) is None
    assert label("landmarks", "nose_region", landmarks=close, width=120, height=120) == "middle_center"


def test_regions_of_68_landmarks_and_points_outside():
    points = [[60.0, 60.0]] * 68
    points[8] = [60.0, 119.0]
    points[17:22], points[22:27] = [[20.0, 20.0]] * 5, [[100.0, 20.0]] * 5
    row = {"landmarks": points, "width": 120, "height": 120}
    assert label("landmarks", "chin_region", **row) == "lower_center"
    assert label("landmarks", "left_eyebrow_region", **row) == "upper_left"
    assert label("landmarks", "right_eyebrow_region", **row) == "upper_right"
    points[30] = [121.0, 60.0]
    assert label("landmarks", "nose_region", **row) is None
    assert label("landmarks", "nose_region", landmarks=points[:10], width=120, height=120) is None
    assert label("landmarks", "nose_region", landmarks=FIVE, width=None, height=120) is None


def test_parsing_tells_seen_from_hidden():
    number = {name: place for place, name in enumerate(SEGMENTATION)}
    shown = [number[name] for name in ("skin", "nose", "l_eye", "u_lip", "l_lip", "hair", "l_ear", "eye_g", "cloth")]
    row = {"segmentation": segmentation(shown)}
    found = {item.name: item.label(row) for item in tasks.get("parsing").items}
    sets = {"visible_parts": "ears;eyes;hair;lips;nose", "hidden_parts": "eyebrows;neck"}
    sets |= {"things_worn": "clothes;glasses", "ear_hidden": "yes", "eyebrow_hidden": "yes"}
    assert found == sets | {"neck_visible": "no", "mouth_inside": "no"}
    empty = {"segmentation": segmentation(range(1, 19))}
    assert label("parsing", "hidden_parts", **empty) == "none"
    assert label("parsing", "ear_hidden", **empty) == "no"


@pytest.mark.parametrize("mask", [None, {"bytes": None}, {"bytes": b"no picture"}, segmentation([40])])
def test_a_segmentation_that_is_none_says_nothing(mask):
    assert all(item.label({"segmentation": mask}) is None for item in tasks.get("parsing").items)
    assert not base.hidden_from({"segmentation": mask}, "hair")


def test_a_part_of_a_few_pixels_is_neither_seen_nor_hidden():
    found = [base.shown({"hair": share}, ("hair",)) for share in (0.0, 1 / 10_000, 1 / 1000)]
    assert found == [False, None, True]


SET = Several(
    **{"name": "fruit", "templates": ("Which fruit is there?",), "around": "fruit"},
    things=(
        Thing(value="apple", text="an apple", patterns=("(?:an )?apples?",)),
        Thing(value="pear", text="a pear", patterns=("(?:a )?pears?",)),
    ),
    source=lambda row: row.get("fruit"),
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("an apple and a pear", "apple;pear"),
        ("Pears, apples.", "apple;pear"),
        ("a pear, but not an apple", "pear"),
        ("none", "none"),
        ("no apple", None),
        ("an apple and a plum", None),
        ("an apple or a pear", None),
        ("an apple, no apple", None),
        ("", None),
    ],
)
def test_sets_are_read_whole_or_not_at_all(text, found):
    assert SET.parse(text) == found


def test_sets_are_said_in_words_that_are_read_back():
    assert (SET.label({"fruit": ["pear", "apple"]}), SET.label({"fruit": []})) == ("apple;pear", "none")
    assert SET.label({}) is None
    said = [SET.reply({}, value) for value in ("apple;pear", "pear", "none")]
    assert said == ["an apple and a pear", "a pear", "none"]
    refuses("no options", SET.option_for, "apple", error=ValueError)


def test_descriptions_state_their_facts_and_are_read_back():
    item = tasks.get("description").items[0]
    for row in ROWS:
        facts = item.label(row)
        assert facts is not None
        assert item.parse(item.reply(row, facts)) == facts


def test_a_description_by_hand():
    known = {"Blond_Hair": True, "Black_Hair": False, "No_Beard": True, "Big_Nose": True, "Oval_Face": False}
    row = {"attributes": known, "gender": "female", "age": 24.0}
    item = tasks.get("description").items[0]
    assert item.reply(row, item.label(row)) == (
        "The picture shows a woman. The person is 20 to 29 years old. On the head is blond hair. "
        "In the middle is a big nose. The person has no beard."
    )
    assert item.label(row) == "Big_Nose=yes;age_range=20-29;beard=No_Beard;gender=female;hair_color=Blond_Hair"
    assert item.label({"attributes": {"Big_Nose": True, "Smiling": True}}) is None


def mirrored(text):
    swap = {"left": "right", "right": "left"}
    return re.sub(r"\b(left|right)\b", lambda side: swap[side[0]], text)


def test_a_mirrored_picture_swaps_the_words_for_its_sides_and_no_others():
    regions_task, bins = tasks.get("landmarks"), tasks.get("head_pose_bins")
    turned = [[120.0 - x, y] for x, y in FIVE]
    row, other = ({"landmarks": p, "width": 120, "height": 120} for p in (FIVE, turned))
    for side in ("left", "right"):
        item, mirror = (regions_task.item(f"{s}_eye_region") for s in (side, mirrored(side)))
        assert [mirrored(text) for text in item.templates] == list(mirror.templates)
        assert mirrored(item.option_for(item.label(row)).text) == mirror.option_for(mirror.label(other)).text
    for item in (bins.item("yaw_bin"), bins.item("roll_bin")):
        for angle in (-33.0, -3.0, 3.0, 47.0):
            name = item.name.removesuffix("_bin")
            said, swapped = (item.option_for(item.label({name: a})).text for a in (angle, -angle))
            assert mirrored(said) == swapped


GENDER = tasks.get("gender").items[0]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"metric": "acuracy"}, "unknown metric 'acuracy'"),
        ({"items": (GENDER, GENDER)}, "names that differ"),
        ({"items": (replace(GENDER, name="a/b:c"),)}, "letters, digits"),
        ({"items": (replace(GENDER, templates=()),)}, "needs wordings"),
        ({"items": (replace(GENDER, unseen=GENDER.templates[:1]),)}, "unseen ones that are not among them"),
        ({"items": (replace(GENDER, options=GENDER.options * 2),)}, "the same value"),
        ({"items": (replace(GENDER, options=GENDER.options[:1]),)}, "needs options"),
    ],
)
def test_a_task_that_cannot_work_is_told_what_is_wrong(changes, fault):
    assert fault_of(tasks.get("gender")) is None
    assert fault in fault_of(replace(tasks.get("gender"), **changes))
