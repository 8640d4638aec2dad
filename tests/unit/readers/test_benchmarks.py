"""FaceXBench and Face-Human-Bench as conversations: letters become words, several pictures, nobody is identified."""

import io
import json
import os

import pytest
from PIL import Image
from typer.testing import CliRunner

from facemllm.cli.main import app
from facemllm.core import digests
from facemllm.ingest import benchmarks
from facemllm.ingest.benchmarks import KEYS, read
from facemllm.ingest.reader import Refused
from facemllm.tables import CONVERSATIONS, TableWriter, open_table
from tests.refusing import refuses

IDENTIFYING = "it asks to name or match people, which this project does not do"


def taken(source, root):
    found = list(read(source, root))
    return [x for x in found if not isinstance(x, Refused)], [x for x in found if isinstance(x, Refused)]


def asked(paths, question="Which one?", options=("a", "b", "c", "d"), letter="C", answer="c"):
    said = {"image_paths": paths, "question_text": question, "options": list(options)}
    return said | {"correct_answer_option": letter, "answer": answer}


def write(path, content, start=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(start + json.dumps(content).encode())


def sheet(category, minor, questions, **more):
    head = {"category": category, "sub-category": minor, "dataset": "x", "question_type": "MCQ"}
    return head | {"prepend_text": "P", "postpend_text": "Letter only."} | more | {"questions": questions}


@pytest.fixture
def facexbench(tmp_path, pictures):
    home = tmp_path / "benchmark"
    pictures(home / "images", "one.png", "two.png", "three.png", form="PNG")
    (home / "images/bad.png").write_bytes(b"PK\x03\x04")
    one = ["images/one.png"]
    questions = {
        "1": asked(["images/one.png", "images/two.png"], "Which images?", ("Image 1", "Both", "None"), "B", "Both"),
        "2": asked(one, options=("0", 2, "3"), letter="B", answer=2),
        "3": asked(["images/gone.png"]),
        "4": asked(one, letter="E"),
        "5": asked(one, letter="A"),
        "6": asked(one, options=("a", "a", "c")),
        "7": asked([]),
        "8": asked(["../secret.png"]),
        "9": asked(["images/bad.png"]),
        "10": {"image_paths": one},
        "11": 5,
        "12": asked(one, letter="BC"),
    }
    write(home / "age.json", sheet("bias_fairness", "age", questions), start=b"\xef\xbb\xbf")
    write(home / "imdb.json", sheet("face_recognition", "celebrity_identification", {"1": asked(one, "Who?")}))
    tools = {"1": asked(["images/three.png"])}
    write(home / "tools.json", sheet("tools_use", "tools_retrieval", tools, context="APIs"))
    return tmp_path


def test_facexbench(facexbench):
    rows, refused = taken("facexbench", facexbench)
    assert [row["turns"][0]["template"] for row in rows] == ["age/1", "age/2", "tools/1"]
    first, second, third = rows
    image = {"type": "image", "text": None}
    text = {"type": "text", "text": "Which images?\nOptions:\n- Image 1\n- Both\n- None"}
    assert first["messages"] == [
        {"role": "user", "content": [image, image, text]},
        {"role": "assistant", "content": [{"type": "text", "text": "Both"}]},
    ]
    turn = {name: value for name, value in first["turns"][0].items() if name != "sample_id"}
    assert turn == {
        **{"task": "facexbench_bias_fairness_age", "form": "choice", "template": "age/1"},
        **{"options": ["Image 1", "Both", "None"], "answer": "Both", "follows": False},
    }
    assert (first["split"], first["source"], first["subject_id"]) == ("test", "facexbench", None)
    assert first["image_id"] == digests.of_bytes(first["images"][0]["bytes"]) == second["image_id"]
    assert len(first["images"]) == 2
    assert second["turns"][0]["answer"] == "2"
    assert third["messages"][0]["content"][-1]["text"].startswith("APIs\nWhich one?\nOptions:")
    assert third["turns"][0]["task"] == "facexbench_tools_use_tools_retrieval"
    reasons = (
        *("the picture images/gone.png is missing", "the answer is option 'E', and there are 4"),
        "the answer is option A, 'a', and also 'c'",
        "the options are fewer than two, more than 10, empty or repeated: ['a', 'a', 'c']",
        *("it names no picture", "the path '../secret.png' leads out of the dataset's folder"),
        "not a JPEG, PNG, WEBP, BMP picture, whatever its name says (it looks like a ZIP archive)",
        *["options is missing or no list"] * 2,
        "the answer is option 'BC', and there are 4",
    )
    assert refused == [
        *(Refused("benchmark/age.json", number, reason) for number, reason in enumerate(reasons, start=3)),
        Refused("benchmark/imdb.json", 1, IDENTIFYING),
    ]


def test_rows_make_a_table_with_names_of_their_own(facexbench, tmp_path):
    rows, _ = taken("facexbench", facexbench)
    with TableWriter(tmp_path / "table", CONVERSATIONS) as table:
        table.write(rows)
    back = list(open_table(tmp_path / "table", CONVERSATIONS).iterate())
    assert back == rows
    assert len({row["conversation_id"] for row in rows}) == len({row["turns"][0]["sample_id"] for row in rows}) == 3
    again, _ = taken("facexbench", facexbench)
    assert again == rows


def human(kind, options, answer, **paths):
    found = {"question": "How many?", "options": options, "answer": answer}
    return {"type": kind, "QA": found, "image": {"image_paths": paths, "source": {"labels": [5]}}}


@pytest.fixture
def face_human_bench(tmp_path, picture):
    test = tmp_path / "data/Face-Human-Bench/test"
    picture(test / "output/eval_data/a.jpg", seed=1, size=(1600, 400))
    picture(test / "output/eval_data/b.jpg", seed=2)
    a, b = "eval_data/a.jpg", "eval_data/b.jpg"
    rows = [
        human("face_age_basic_10", ["20", "30", "40", "50"], 0, cropped=b, original=a),
        human("face_age_basic_10", [2, 3, 4, 5], 3, original=b),
        human("face_age_basic_10", ["20", "30"], 2, original=b),
        human("face_age_basic_10", ["20", "30"], True, original=b),
        human("face_age_basic_10", ["20", "30"], 0, original="eval_data/gone.jpg"),
        human("face_age_basic_10", ["20", "30"], 0),
    ]
    write(test / "json/en/face_age_basic_10.json", {"data": rows})
    write(test / "json/en/face_recognition_mask.json", {"data": [human("face_recognition_mask", ["y", "n"], 0, x=b)]})
    write(test / "json/en/human_reid_basic.json", {"data": [human("human_reid_basic", ["y", "n"], 0, x=b)]})
    write(test / "json/zh/face_age_basic_10_zh.json", {"data": "not read"})
    write(tmp_path / "data/Face-Human-Bench/dev/json/en/x.json", {"data": "not read"})
    return tmp_path


def test_face_human_bench(face_human_bench):
    rows, refused = taken("face-human-bench", face_human_bench)
    turns = [row["turns"][0] for row in rows]
    assert [(t["task"], t["template"], t["answer"]) for t in turns] == [
        ("face_human_bench_face_age_basic_10_cropped", "face_age_basic_10_cropped/1", "20"),
        ("face_human_bench_face_age_basic_10_original", "face_age_basic_10_original/1", "20"),
        ("face_human_bench_face_age_basic_10_original", "face_age_basic_10_original/2", "5"),
    ]
    assert turns[0]["options"] == turns[1]["options"]
    doubled = ["20", "30", "40", "50"] * 2
    at = doubled.index(turns[0]["options"][0])
    assert turns[0]["options"] == doubled[at : at + 4]
    assert [Image.open(io.BytesIO(row["images"][0]["bytes"])).size for row in rows] == [(64, 64), (1000, 250), (64, 64)]
    folder = "data/Face-Human-Bench/test/json/en"
    reasons = (
        *("the answer is option 2 (from 0), and there are 2", "answer is missing or no int"),
        *("the picture eval_data/gone.jpg is missing", "it names no picture"),
    )
    assert refused == [
        *(Refused(f"{folder}/face_age_basic_10.json", number, why) for number, why in enumerate(reasons, start=3)),
        *(Refused(f"{folder}/{name}.json", 1, IDENTIFYING) for name in ("face_recognition_mask", "human_reid_basic")),
    ]


def test_the_right_option_does_not_stay_first(tmp_path, picture):
    picture(tmp_path / "eval_data/a.jpg")
    rows = [human("face_attribute_compound", ["a", "b", "c", "d"], 0, cropped="eval_data/a.jpg") for _ in range(60)]
    for number, row in enumerate(rows):
        row["QA"]["question"] = f"How many of {number}?"
    write(tmp_path / "json/en/x.json", {"data": rows})
    places = [row["turns"][0]["options"].index("a") for row in taken("face-human-bench", tmp_path)[0]]
    assert all(places.count(place) >= 6 for place in range(4))


def test_links_that_lead_out_are_refused(facexbench):
    target = facexbench / "outside.png"
    (facexbench / "benchmark/images/one.png").rename(target)
    (facexbench / "benchmark/images/one.png").symlink_to(target)
    rows, refused = taken("facexbench", facexbench)
    assert [row["turns"][0]["template"] for row in rows] == ["tools/1"]
    assert (
        refused[0].reason
        == "the picture images/one.png: a link leads out of the dataset's folder; name where it leads in ingest.links"
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "no sound JSON"),
        (b"\xff\xfe", "no sound JSON"),
        (b"[1]", "no FaceXBench file"),
        (b'{"name": "a package"}', "no FaceXBench file"),
        (b"[" * 100_000, "no sound JSON"),
        (b" " * (benchmarks.MAX_JSON + 1), "more than 67,108,864"),
        ("a pipe", "it: not a regular file"),
        ("a link", "it: a link leads out of the dataset's folder"),
    ],
)
def test_a_file_that_is_none_of_the_benchmark_s_is_refused_and_the_others_are_read(
    facexbench, tmp_path_factory, content, reason
):
    path, before = facexbench / "benchmark/age.json", len(taken("facexbench", facexbench)[0])
    sound = path.rename(tmp_path_factory.mktemp("outside") / "age.json")
    if content == "a pipe":
        os.mkfifo(path)
    elif content == "a link":
        path.symlink_to(sound)
    else:
        path.write_bytes(content)
    rows, refused = taken("facexbench", facexbench)
    assert [row["turns"][0]["template"] for row in rows] == ["tools/1"]
    assert before == 3
    (found,) = [one for one in refused if one.file == "benchmark/age.json"]
    assert (found.row, reason in found.reason) == (0, True), found


def test_a_row_that_cannot_be_used_does_not_end_the_others(facexbench):
    path, one = facexbench / "benchmark/age.json", ["images/one.png"]
    questions = {
        "1": asked(one),
        "2": asked(one, "half a pair \ud800"),
        "3": asked(["images/\ud800.png"]),
        "4": asked(one, options=("\udfff", "b", "c", "d")),
        "5": asked(one, "x" * (benchmarks.MAX_TEXT + 1)),
        "6": asked(one, options=("x" * (benchmarks.MAX_OPTION + 1), "b", "c", "d")),
        "7": asked(one * (benchmarks.MAX_PICTURES + 1)),
        "8": asked(one),
        "9": asked(one, "Which one is the same?"),
        "": asked(one, "Another?"),
        "\ud800": asked(one, "And another?"),
    }
    write(path, sheet("bias_fairness", "age", questions))
    path.write_text(path.read_text().replace('"9":', '"9": {}, "9":'))
    rows, refused = taken("facexbench", facexbench)
    assert [row["turns"][0]["template"] for row in rows] == ["age/1", "age/", "tools/1"]
    half = r"half a surrogate pair (\ud800 and the like) is no text; mend its id, words or picture"
    assert [(one.row, one.reason) for one in refused if one.file == "benchmark/age.json"] == [
        *((number, half) for number in (2, 3, 4)),
        *(
            (5, "32,001 characters of the question, more than 32,000"),
            (6, "2,001 characters of an option, more than 2,000"),
        ),
        *((7, "33 pictures, more than 32"), (8, "the same question about the same pictures stands there before")),
        *((9, "the id '9' stands in the file more than once"), (11, half)),
    ]


def test_the_words_that_serving_refuses_are_not_asked(facexbench, tmp_path):
    path, one = facexbench / "benchmark/age.json", ["images/one.png"]
    words = ["Who is this person?", "Which celebrity is this?", "Which expression is this?", "How many people smile?"]
    write(path, sheet("bias_fairness", "age", {str(n): asked(one, text) for n, text in enumerate(words)}))
    arguments = [
        "import",
        "facexbench",
        str(facexbench),
        str(tmp_path / "table"),
        "--set",
        f"storage.home={tmp_path / 'home'}",
    ]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    table = open_table(tmp_path / "table", CONVERSATIONS)
    assert [row["turns"][0]["template"] for row in table.iterate()] == ["age/2", "age/3", "tools/1"]
    reasons = {row["row"]: row["reason"] for row in table.refused() if row["file"] == "benchmark/age.json"}
    said = "its words ask to name or match people: this service does not say who somebody is"
    assert reasons == {1: said, 2: said}
    write(path, sheet("bias_fairness", "age", {"1": asked(one, words[0])}))
    (facexbench / "benchmark/tools.json").unlink()
    none = CliRunner().invoke(app, [*arguments[:3], str(tmp_path / "none"), *arguments[4:]])
    assert none.exit_code == 1
    assert "nothing could be read from facexbench; benchmark/age.json, row 1: its words ask to name" in str(
        none.exception
    )
    assert not (tmp_path / "none").exists()


def test_folders_in_another_form(tmp_path):
    assert KEYS == ("facexbench", "face-human-bench")
    refuses("no benchmark 'other'", list, read("other", tmp_path))
    refuses("no folder test/json/en", list, read("face-human-bench", tmp_path))
    write(tmp_path / "json/en/x.json", {"data": 1})
    refuses("no folder eval_data", list, read("face-human-bench", tmp_path))
    (tmp_path / "eval_data").mkdir()
    (found,) = read("face-human-bench", tmp_path)
    assert found == Refused("json/en/x.json", 0, "no Face-Human-Bench file: a list under data is expected")
