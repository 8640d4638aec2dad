import json

import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests

from facemllm.evaluate.run import score
from facemllm.scoring.paired import compare
from facemllm.scoring.summary import slices
from facemllm.tables import open_table
from tests.scored import sheet_of, write_conversations, write_predictions

PEOPLE = 90
OVERRIDES = ["evaluate.bootstrap=300"]


@pytest.fixture(scope="module")
def asked():
    draw = np.random.default_rng(0)
    rows = []
    for person in range(PEOPLE):
        rows.append((person, person, "gender", "gender", ("female", "male")[person % 2]))
        rows.append((person, person, "expression", "expression", str(draw.choice(["anger", "fear"]))))
        rows.append((person, person, "age", "age", str(draw.integers(10, 80))))
        for item in ("Bangs", "Wearing_Hat"):
            rows.append((person, person, "attributes", item, str(draw.choice(["yes", "no"]))))
    groups = {person: {"gender": ("female", "male")[person % 2], "skin_tone": "light"} for person in range(PEOPLE)}
    return rows, groups


def both(settings, home, rows, groups, *said):
    """A table, and the evaluations of two models that said this of it."""
    folders = [write_conversations(home / "conversations", rows, groups), home / "first", home / "second"]
    for folder, parsed in zip(folders[1:], said, strict=True):
        write_predictions(folder / "predictions", parsed)
        score(settings, folders[0], folder, folder / "metrics.json")
    return folders


@pytest.fixture(scope="module")
def folders(settings, asked, tmp_path_factory):
    """A model, and one that is worse at expressions, of men most of all."""
    rows, groups = asked
    draw = np.random.default_rng(1)
    first, second = [], []
    for row in rows:
        right = row[4] if draw.random() < 0.9 else "other"
        first.append(right if row[2] != "age" else str(float(row[4]) + 4))
        worse = row[2] == "expression" and draw.random() < (0.6 if groups[row[0]]["gender"] == "male" else 0.1)
        second.append("other" if worse else first[-1])
    return both(settings, tmp_path_factory.mktemp("pair"), rows, groups, first, second)


def test_differences_are_paired_corrected_and_plain(settings, folders):
    found = compare(settings, *folders)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in folders[1:]]
    items = {"gender.gender", "expression.expression", "expression.balanced_accuracy", "age.age"}
    items |= {"attributes.Bangs", "attributes.Wearing_Hat"}
    assert set(found["figures"]) == {"closed_mean", "gender", "expression", "age", "attributes"} | items
    for name, entry in found["figures"].items():
        assert entry["difference"]["value"] == pytest.approx(entry["second"] - entry["first"], abs=1e-11)
        if name in metrics[0]["tasks"]:
            one, other = (each["tasks"][name] for each in metrics)
            assert (entry["first"], entry["second"], entry["n"]) == (one["value"], other["value"], one["n"])
            assert entry["p"] <= entry["p_holm"] <= 1
    worse = found["figures"]["expression"]
    assert worse["difference"]["high"] < 0
    assert worse["p_holm"] == pytest.approx(4 * worse["p"])  # the smallest of four tasks
    assert worse["p_holm"] < 0.001
    assert -worse["difference"]["value"] > worse["minimum_detectable_difference"] > 0
    same = found["figures"]["gender"]
    assert same["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert same["p"] == same["p_holm"] == 1.0
    assert (found["figures"]["age"]["higher_is_better"], found["figures"]["age"]["unit"]) == (False, "years")
    assert found["figures"]["closed_mean"]["n"] == 4 * PEOPLE
    men, women = (found["groups"]["expression"]["gender"][sex] for sex in ("male", "female"))
    assert men["difference"]["value"] < women["difference"]["value"] <= 0
    assert men["people"] == PEOPLE // 2
    assert open_table(folders[0]).digest == found["conversations_digest"]
    # all groups of all tasks are one family
    groups = [entry for kinds in found["groups"].values() for names in kinds.values() for entry in names.values()]
    assert len(groups) > 12
    expected = multipletests([entry["p"] for entry in groups], method="holm")[1]
    assert [entry["p_holm"] for entry in groups] == pytest.approx(expected, abs=1e-9)


def test_few_people_show_nothing_and_people_who_change_alike_are_counted(settings, tmp_path):
    rows = [(p, p, "age", "age", "30") for p in range(30)]
    rows += [(p, p, "attributes", "Bangs", "yes") for p in range(10)]
    rows += [(p, p, "gender", "gender", "male") for p in range(30)]
    first = ["32"] * 30 + ["no"] * 10 + ["male"] * 30
    second = ["39"] * 30 + ["yes"] * 10 + ["male"] * 30
    figures = compare(settings, *both(settings, tmp_path, rows, None, first, second))["figures"]
    assert figures["age"]["difference"] == {"value": 7.0, "low": 7.0, "high": 7.0}
    assert figures["age"]["p"] == pytest.approx(2 * 0.5**30)  # thirty of thirty worse, by a sign test
    assert figures["gender"]["p"] == 1.0
    assert figures["attributes"]["difference"]["value"] == 1.0
    assert figures["attributes"]["p"] is figures["attributes"]["p_holm"] is None  # ten people
    rows = [(p, p, "caption", "caption", "gender=male;age=30") for p in range(25)]
    folders = both(settings, tmp_path / "captions", rows, None, ["gender=male"] * 25, ["gender=male;age=30"] * 25)
    found = compare(settings, *folders)
    assert found["figures"]["caption"]["p"] == pytest.approx(2 * 0.5**25)


def test_slices_follow_the_labels_asked_about(settings):
    rows, parsed = [], []
    for person in range(100):
        yaw = (0, 30, -50, 15)[person % 4]
        hat = "yes" if person % 2 else "no"
        rows += [
            (person, person, "head_pose", "yaw", str(yaw)),
            (person, person, "attributes", "Wearing_Hat", hat),
            (person, person, "gender", "gender", "male" if person % 8 < 4 else "female"),
        ]
        parsed += [str(yaw), hat, rows[-1][4] if abs(yaw) < 45 else None]
    found = slices(settings, sheet_of(rows), parsed)
    people = {"frontal": 50, "turned": 25, "profile": 25, "occluded": 50, "unoccluded": 50}
    assert {name: entry["people"] for name, entry in found.items()} == people
    assert found["profile"]["tasks"]["gender"]["value"] == 0.0
    assert [found[name]["closed_mean"]["value"] for name in ("profile", "frontal")] == [0.5, 1.0]
    assert found["frontal"]["n"] == 150
    few = slices(settings, sheet_of(rows[:60]), parsed[:60])["profile"]
    nothing = {"value": None, "low": None, "high": None}
    assert few == {"people": 5, "n": 15, "too_few": True, "closed_mean": nothing, "tasks": {}}
    assert slices(settings, sheet_of([rows[2]]), ["male"]) == {}
