import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from threadpoolctl import threadpool_limits

from facemllm import tasks
from facemllm.core.digests import of_tree
from facemllm.errors import UserError
from facemllm.evaluate import baselines as room
from facemllm.evaluate.predict import Likelihood, Written, _unread, predict, question_texts
from facemllm.evaluate.run import evaluate, score
from facemllm.scoring.sheet import read_parsed, read_sheet
from facemllm.settings import load
from facemllm.tables import CONVERSATIONS, PREDICTIONS, TableWriter, mapping, open_table
from facemllm.tasks.answers import refuses
from tests.conftest import messages_of
from tests.pictures import encode

pytestmark = pytest.mark.usefixtures("no_torch")

ASKED = [
    ("caption", "caption"),
    ("attributes", "Bangs"),
    ("expression", "expression"),
    ("age", "age"),
    ("gender", "gender"),
    ("head_pose", "yaw"),
]
FEELINGS = ["fear", "anger", "neutral"]
WHOLE = ("bootstrap=100", "batch_images=7", "baseline_pixels=8", "generated_faces=3", "disturbed_faces=5")
OVERRIDES = [f"evaluate.{word}" for word in WHOLE]


@pytest.fixture(scope="module")
def plain():
    """Predictions and their figures alone."""
    return load("laptop", [*OVERRIDES, "evaluate.generated_faces=0", "evaluate.disturbed_faces=0"])


def truth_of(pixel):
    """What the colour of a face means: red its sex, green its age, blue its expression and bangs."""
    red, green, blue = (int(v) for v in pixel)
    return {
        "gender": "female" if red > 127 else "male",
        "age": str(float(green // 3)),
        "yaw": str(float(green // 5 - 25)),
        "expression": FEELINGS[blue % 3],
        "Bangs": "yes" if blue > 127 else "no",
        "caption": f"gender={'female' if red > 127 else 'male'}" + (";Bangs=yes" if blue > 127 else ""),
    }


def conversation(split, person, pixel, answers=None, follows=False):
    image_id = hashlib.sha256(f"{split}{person}{pixel}".encode()).hexdigest()
    turns, asked = [], []
    for task, item in ASKED:
        question = next(q for q in tasks.get(task).questions() if q.item == item)
        turn = {"sample_id": hashlib.sha256(f"{image_id}{item}".encode()).hexdigest(), "task": task}
        turn |= {"form": question.form, "template": f"{item}/0", "follows": follows and item == "yaw"}
        options = [option.text for option in question.options]
        turns.append(turn | {"options": options, "answer": (answers or truth_of(pixel))[item]})
        asked.append((question.templates[0], "-"))
    picture = {"bytes": encode(np.full((32, 32, 3), pixel, np.uint8)), "path": None}
    about = {"conversation_id": image_id, "image_id": image_id, "images": [picture], "split": split, "source": "render"}
    about |= {"subject_id": f"{split}{person}", "groups": [{"name": "gender", "value": truth_of(pixel)["gender"]}]}
    return about | {"messages": messages_of(asked), "turns": turns}


def make_table(out, train=60, test=20, random_labels=False, follows=False):
    draw = np.random.default_rng(7)
    with TableWriter(out, CONVERSATIONS) as table:
        for split, people in (("train", train), ("test", test)):
            for person in range(people):
                for _ in range(2):
                    pixel = tuple(draw.integers(0, 256, 3).tolist())
                    other = tuple(draw.integers(0, 256, 3).tolist())
                    answers = truth_of(other) if random_labels else None
                    table.write([conversation(split, person, pixel, answers, follows)])
    return out


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return make_table(tmp_path_factory.mktemp("data") / "conversations")


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A table of sixteen training and eight test faces; yaw is asked for after another question."""
    return make_table(tmp_path_factory.mktemp("few") / "conversations", train=8, test=4, follows=True)


@pytest.fixture(scope="module")
def perfect(settings, table, tmp_path_factory):
    """The evaluation of a reader that is always right."""
    folder = tmp_path_factory.mktemp("perfect")
    fake = Fake()
    evaluate(settings, folder, "m" * 64, table, folder / "out", predictor=fake)
    # forty faces, all questions of a batch in one call; then five in each of five disturbances
    assert fake.calls == [7, 7, 7, 7, 7, 5, *[5] * 5]
    return folder / "out"


@pytest.fixture(scope="module")
def poor(settings, table, tmp_path_factory):
    """The evaluation of one that does not understand the questions for gender and yaw, and answers wrongly on bangs."""
    folder = tmp_path_factory.mktemp("poor") / "out"
    fake = Fake(silent=("gender", "yaw"), wrong=("Bangs",))
    evaluate(settings, folder, "m" * 64, table, folder, predictor=fake)
    return folder


def written(folder, rows, schema=CONVERSATIONS, **parts):
    with TableWriter(folder, schema, **parts) as writer:
        writer.write(rows)
    return open_table(folder, schema)


def predicted(table, folder, fake):
    """The predictions of a reader."""
    with TableWriter(folder, PREDICTIONS, about={"split": "test"}) as writer:
        predict(Likelihood(fake, 96), open_table(table, CONVERSATIONS), "test", writer, "m", batch_images=7)
    return folder


def rows_of(folder, task):
    return [row for row in open_table(folder).iterate() if row["task"] == task]


def asked_in(words):
    """The question of these words."""
    return next(q for t in tasks.all_names() for q in tasks.get(t).questions() if words in q.templates)


class Fake:
    """Reads a face's colour and answers rightly, except what it is told to get wrong or not to understand."""

    takes_maps = False
    characteristic_names = ()

    def __init__(self, wrong=(), silent=(), broken=False):
        self.wrong, self.silent, self.broken, self.calls = wrong, silent, broken, []

    def score_faces(self, images, questions, maps):
        self.calls.append(len(images))
        return [
            SimpleNamespace(answers=[self._answer(image, query) for query in asked], characteristics={})
            for image, asked in zip(images, questions, strict=True)
        ]

    def _answer(self, image, query):
        question = asked_in(query.question)
        truth = truth_of(image.getpixel((0, 0)))[question.item]
        best = question.options.index(tasks.get(question.task).item(question.item).option_for(truth))
        if question.item in self.wrong:
            best = (best + 1) % len(query.options)
        probabilities = np.full(len(query.options), 0.1 / (len(query.options) - 1))
        probabilities[best] = 0.9
        if self.broken:
            probabilities[:] = np.nan
        greedy = None if question.item in self.silent else best
        return SimpleNamespace(probabilities=tuple(probabilities), greedy=greedy)

    def generate_batch(self, images, questions, max_new_tokens, maps):
        said = []
        for image, text in zip(images, questions, strict=True):
            truth = truth_of(image.getpixel((0, 0)))
            if text == "Describe the face.":
                bangs = " with bangs" if truth["Bangs"] == "yes" else ""
                said.append(f"a {'woman' if truth['gender'] == 'female' else 'man'}{bangs}")
                continue
            question = asked_in(text)
            option = tasks.get(question.task).item(question.item).option_for(truth[question.item])
            said.append("I cannot help with that." if question.item in self.silent else option.text)
        return said


def test_a_perfect_reader_scores_perfectly_and_everything_is_kept(settings, table, perfect, tmp_path):
    metrics = json.loads((perfect / "metrics.json").read_text())
    assert (metrics["n_images"], metrics["n_subjects"]) == (40, 20)
    assert metrics["closed_mean"]["value"] == 1.0
    for name in ("gender", "expression", "attributes", "caption"):
        assert metrics["tasks"][name]["value"] == 1.0, name
        assert metrics["tasks"][name]["baselines"]["constant"] < 0.8
    assert metrics["tasks"]["age"]["value"] < 6  # a tenth of its weight lies elsewhere on the grid
    assert metrics["tasks"]["age"]["baselines"]["constant"] > 10
    assert metrics == score(settings, table, perfect / "predictions", tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (perfect / "metrics.json").read_bytes()
    assert [p.name for p in perfect.parent.iterdir()] == ["out"]


def test_rows_follow_the_contract(poor):
    predictions = open_table(poor / "predictions", PREDICTIONS)
    rows = [row for row in predictions.iterate() if row["image_id"] == next(predictions.iterate())["image_id"]]
    assert [row["task"] for row in rows] == [task for task, _ in ASKED]
    assert predictions.rows == 40 * len(ASKED)
    by_task = {row["task"]: row for row in rows}
    assert by_task["age"]["question"] == "How old is the person?"
    grid = dict(sorted((float(age), share) for age, share in mapping(by_task["age"]["scores"]).items()))
    assert sum(grid.values()) == pytest.approx(1)
    ends, shares = [2.5, *(age + 2.5 for age in grid)], [0.0, *np.cumsum(list(grid.values()))]  # steps of five
    assert float(by_task["age"]["parsed"]) == pytest.approx(np.interp(0.5, shares, ends), abs=0.005)
    assert by_task["expression"]["parsed"] == by_task["expression"]["answer"]
    assert by_task["head_pose"]["parsed"] is None  # greedy decoding gave no option: not understood
    assert by_task["head_pose"]["raw"]
    assert by_task["caption"]["scores"] is None
    assert all(row["model_digest"] == "m" * 64 and mapping(row["groups"]) for row in rows)


def test_what_is_kept_of_a_question_that_was_not_understood(table, poor, tmp_path, monkeypatch):
    """What the model writes when few fail; the likeliest option in words when many do, or the text can be read."""

    class Knows(Fake):
        def generate_batch(self, images, questions, max_new_tokens, maps):
            return ["She is a woman." for _ in questions]

    words = {"(none of the options; likeliest perhaps a woman)", "(none of the options; likeliest perhaps a man)"}
    many = rows_of(poor / "predictions", "gender")  # and yaw: two of five
    monkeypatch.setattr("facemllm.evaluate.predict.REWRITTEN", 0.2)
    few = rows_of(predicted(table, tmp_path / "few", Fake(silent=("gender",))), "gender")
    odd = rows_of(predicted(table, tmp_path / "odd", Knows(silent=("gender",))), "gender")
    broken = rows_of(predicted(table, tmp_path / "broken", Fake(broken=True)), "gender")
    assert {row["raw"] for row in many} == {row["raw"] for row in odd} == words
    assert {row["raw"] for row in few} == {"I cannot help with that."}
    assert {(row["raw"], row["scores"]) for row in broken} == {("(no probabilities)", None)}
    assert {row["parsed"] for row in [*many, *few, *odd, *broken]} == {None}


def test_words_for_what_is_none_of_the_options_read_as_no_answer():
    row = {"image_id": "a" * 64, "gender": "female", "age": 30.0}
    kept = 0
    for task in map(tasks.get, tasks.all_names()):
        asked = [
            found.question
            for item in task.items
            for way in ("statement", "lettered")
            if (found := tasks.asking.ask(task, item, way, row)) is not None
        ]
        for question in (*task.questions(), *asked):
            for option in question.options:
                for likeliest in (option.text, option.value, ""):
                    said = _unread(question, option.text, likeliest)
                    kept += bool(likeliest)
                    assert said.startswith("(no"), (question.task, question.item, option.text)
                    assert tasks.read(question, said) is None
                    assert not refuses(said)
    assert kept > 1000


def test_what_is_not_understood_counts_as_wrong(plain, table, poor, tmp_path):
    found = json.loads((poor / "metrics.json").read_text())["tasks"]
    assert (found["gender"]["value"], found["gender"]["unreadable"]) == (0.0, 1.0)
    assert found["head_pose"]["value"] > 60  # worst error on a grid from -60 to 60
    assert found["expression"]["unreadable"] == 0.0
    broken = score(plain, table, predicted(table, tmp_path / "broken", Fake(broken=True)))
    assert broken["closed_mean"]["value"] == 0.0
    assert broken["tasks"]["age"]["unreadable"] == 1.0


def test_the_same_model_gives_the_same_bytes_and_one_changed_answer_others(settings, table, perfect, tmp_path):
    evaluate(settings, tmp_path / "elsewhere", "m" * 64, table, tmp_path / "b", predictor=Fake())
    assert of_tree(perfect) == of_tree(tmp_path / "b")
    first = open_table(perfect / "predictions", PREDICTIONS)
    rows = list(first.iterate())
    rows[11]["parsed"] = "something else"
    parts = {name: first.manifest[name] for name in ("parents", "about")}
    assert written(tmp_path / "d", rows, PREDICTIONS, **parts).digest != first.digest
    changed = score(settings, table, tmp_path / "d")
    assert changed["tasks"]["gender"] == json.loads((perfect / "metrics.json").read_text())["tasks"]["gender"]
    assert {changed["tasks"][name]["value"] for name in ("gender", "expression", "attributes", "caption")} == {1.0}
    assert changed["tasks"]["head_pose"]["unreadable"] == 1 / 40


def test_predictions_must_answer_every_question_once(table, perfect, tmp_path):
    rows = list(open_table(perfect / "predictions").iterate())
    sheet = read_sheet(open_table(table, CONVERSATIONS), "test")

    for some, match in (
        (rows[:-3], "3 of 240 questions have no prediction"),
        (rows + rows[:1], "occurs twice"),
        ([*rows, {**rows[0], "sample_id": "unasked"}], "1 predictions answer no question"),
    ):
        with pytest.raises(UserError, match=match):
            read_parsed(written(tmp_path / match, some, PREDICTIONS, about={"split": "test"}), sheet)


def test_truth_comes_from_the_conversations_not_from_the_predictions(plain, table, poor, tmp_path):
    rows = [{**row, "answer": row["parsed"]} for row in open_table(poor / "predictions").iterate()]
    written(tmp_path / "liar", rows, PREDICTIONS, about={"split": "test"})
    assert score(plain, table, tmp_path / "liar")["tasks"]["attributes"]["value"] == 0.0


def test_samples_show_faces_with_their_marks(poor):
    samples = json.loads((poor / "samples" / "samples.json").read_text())
    assert len({sample["image_id"] for sample in samples}) == len(samples) == 12
    for sample in samples:
        assert [question["item"] for question in sample["questions"]] == [item for _, item in ASKED]
        marks = {question["task"]: (question["metric"], question["score"]) for question in sample["questions"]}
        assert marks["attributes"] == marks["gender"] == ("accuracy", 0.0)
        assert marks["expression"] == ("accuracy", 1.0)
        assert marks["caption"] == ("fact_f1", 1.0)
        assert marks["head_pose"] == ("mae", None)
        assert 0 < marks["age"][1] < 6
        # the picture is the one the answers are about
        with Image.open(poor / "samples" / sample["image"]) as image:
            assert image.format == "JPEG"
            said = next(q["answer"] for q in sample["questions"] if q["task"] == "gender")
            red = image.getpixel((4, 4))[0]
            assert abs(red - 127) < 6 or truth_of((red, 0, 0))["gender"] == said


def test_samples_are_of_questions_in_their_own_form(plain, asked_otherwise, tmp_path):
    table, face = asked_otherwise
    evaluate(plain, tmp_path, "m", table, tmp_path / "a", predictor=Reader(face))
    (sample,) = json.loads((tmp_path / "a" / "samples" / "samples.json").read_text())
    assert [(question["item"], question["sample_id"]) for question in sample["questions"]] == [
        (item, f"{item} native") for item in ("gender", "Bangs", "age", "eyewear")
    ]


def test_an_evaluation_is_finished_before_it_is_in_its_place(plain, few, tmp_path):
    states = []

    def finish(folder, metrics):
        states.append((folder != tmp_path / "a", (tmp_path / "a").exists(), metrics["n_images"]))
        (folder / "report.html").write_text("whole")

    def dies(*_):
        raise RuntimeError("out of memory")

    evaluate(plain, tmp_path, "m", few, tmp_path / "a", predictor=Fake(), finish=finish)
    assert states == [(True, False, 8)]
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"metrics.json", "predictions", "report.html", "samples"}
    assert (tmp_path / "a" / "report.html").read_text() == "whole"
    fake = Fake()
    fake.generate_batch = dies
    for predictor, last in ((Fake(), dies), (fake, finish)):
        with pytest.raises(RuntimeError):
            evaluate(plain, tmp_path, "m", few, tmp_path / "b", predictor=predictor, finish=last)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]  # failure leaves nothing behind
    with pytest.raises(UserError, match="exists already"):
        evaluate(plain, tmp_path, "m", few, tmp_path / "a", predictor=Fake())


def test_an_empty_split_and_odd_messages_are_refused(table, few, tmp_path):
    nothing = load("laptop", ["evaluate.split=validation"])
    with pytest.raises(UserError, match="no questions in split 'validation'"):
        evaluate(nothing, tmp_path, "m", table, tmp_path / "a", predictor=Fake())
    face = conversation("test", 0, (1, 2, 3))
    with pytest.raises(UserError, match="5 questions in messages, 6 turns"):
        question_texts({**face, "messages": face["messages"][:-2]})
    # questions that follow from others are not asked alone
    asked = {row["task"] for row in open_table(predicted(few, tmp_path / "a", Fake())).iterate()}
    assert asked == {task for task, _ in ASKED} - {"head_pose"}


def test_baselines_read_colours_where_there_is_something_to_read(perfect):
    metrics = json.loads((perfect / "metrics.json").read_text())
    found = metrics["tasks"]
    assert found["gender"]["baselines"]["pixels"] > 0.9
    assert found["gender"]["baselines"]["constant"] == 0.5
    assert found["attributes"]["baselines"]["pixels"] > 0.9
    assert found["caption"]["baselines"]["pixels"] > found["caption"]["baselines"]["constant"]
    assert found["expression"]["baselines"]["pixels"] < 0.6  # no linear reading of blue % 3
    assert metrics["closed_mean"]["baselines"]["constant"] == pytest.approx((0.5 + 0.5 + 1 / 3) / 3, abs=1e-5)


def test_baselines_read_nothing_from_random_labels(plain, tmp_path):
    table = make_table(tmp_path / "conversations", train=80, test=60, random_labels=True)
    metrics = score(plain, table, predicted(table, tmp_path / "a", Fake()))
    for name, chance in (("gender", 0.5), ("attributes", 0.5), ("expression", 1 / 3)):
        entry = metrics["tasks"][name]
        assert entry["baselines"]["pixels"] == pytest.approx(chance, abs=0.14), name
        assert entry["low"] <= chance + 0.05, name  # nor does a model that reads the picture
    age = metrics["tasks"]["age"]["baselines"]
    assert age["pixels"] > 0.93 * age["constant"]


def test_baselines_of_tiny_and_one_sided_data(settings, tmp_path):
    def read(name, *faces):
        table = written(tmp_path / name, [conversation(*face) for face in faces])
        return room.baselines(settings, table, read_sheet(table, "test"), room.training_sheet(table))

    found = read("one", ("train", 0, (200, 90, 3)), ("test", 1, (20, 30, 200)))
    assert found["pixels"] == found["constant"]
    assert dict(zip([item for _, item in ASKED], found["constant"], strict=True))["gender"] == "female"
    alike = read("alike", *[("train", n, (9, 9, 9)) for n in range(5)], ("test", 9, (9, 9, 9)))
    assert alike["pixels"][4] == "male"
    assert read("untrained", *[("test", n, (n, 9, 9)) for n in range(3)]) == {}


def test_baselines_do_not_depend_on_the_number_of_threads(tmp_path, monkeypatch):
    draw = np.random.default_rng(1)
    with TableWriter(tmp_path / "noise", CONVERSATIONS) as writer:
        for number in range(360):
            face = conversation("train" if number < 320 else "test", number, draw.integers(0, 256, 3).tolist())
            noise = encode(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8))
            writer.write([{**face, "images": [{"bytes": noise, "path": None}]}])
    table = open_table(tmp_path / "noise", CONVERSATIONS)
    spaces, fit = [], room._Space.fit
    monkeypatch.setattr(room._Space, "fit", lambda *given: spaces.append(fit(*given)) or spaces[-1])
    said = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            found = room.baselines(load("laptop"), table, read_sheet(table, "test"), room.training_sheet(table))
        said.append((found, spaces[-1].train_ND.tobytes(), spaces[-1].test_ND.tobytes()))
    assert said[0] == said[1]


def test_a_few_faces_are_answered_again_in_free_text(perfect, poor):
    again = open_table(perfect / "generated", PREDICTIONS)
    assert again.manifest["about"] == {"split": "test", "model_digest": "m" * 64}
    rows = list(again.iterate())
    names = sorted({row["image_id"] for row in open_table(perfect / "predictions").iterate(["image_id"])})
    assert {row["image_id"] for row in rows} == set(names[:3])
    assert [row["task"] for row in rows] == [task for task, _ in ASKED if task != "caption"] * 3
    assert all(row["scores"] is None for row in rows)
    by_task = {row["task"]: row for row in rows}
    assert by_task["gender"]["raw"] in ("a woman", "a man")
    assert by_task["gender"]["parsed"] == by_task["gender"]["answer"]
    said = rows_of(poor / "generated", "gender")
    assert {(row["raw"], row["parsed"]) for row in said} == {("I cannot help with that.", None)}


def test_a_few_faces_are_asked_again_in_worse_pictures(perfect):
    folders = sorted((perfect / "disturbed").iterdir())
    assert [folder.name for folder in folders] == ["blur", "dark", "jpeg", "noise", "occlusion"]
    names = sorted({row["image_id"] for row in open_table(perfect / "predictions").iterate(["image_id"])})
    for folder in folders:
        found = open_table(folder, PREDICTIONS)
        assert found.manifest["about"] == {"split": "test", "model_digest": "m" * 64, "kind": folder.name}
        rows = list(found.iterate())
        assert [row["task"] for row in rows] == [task for task, _ in ASKED] * 5
        assert {row["image_id"] for row in rows} == set(names[:5])
    dark = {row["sample_id"]: row["parsed"] for row in open_table(folders[1]).iterate() if row["task"] == "gender"}
    assert set(dark.values()) == {"male"}  # nothing red is left in the dark


@pytest.fixture(scope="module")
def asked_otherwise(tmp_path_factory):
    """A conversation that asks the gender, bangs and age of a face natively, as statements, and behind letters."""
    attributes = {"Bangs": True, "No_Eyewear": False, "Eyeglasses": True, "Sunglasses": False}
    row = {"image_id": "a" * 64, "gender": "female", "age": 30.0, "attributes": attributes}
    turns, said = [], []
    for task, item in (("gender", "gender"), ("attributes", "Bangs"), ("age", "age"), ("attributes", "eyewear")):
        for way in ("native", "statement", "lettered"):
            found = tasks.asking.ask(tasks.get(task), tasks.get(task).item(item), way, row)
            if found is None:
                continue
            options = [option.value for option in found.question.options]
            turn = {"sample_id": f"{item} {way}", "task": task, "form": found.question.form, "follows": False}
            turns.append(turn | {"template": found.template, "options": options, "answer": found.answer})
            said.append((found.text, found.reply))
    about = {"image_id": "a" * 64, "turns": turns, "messages": messages_of(said)}
    face = conversation("test", 0, (200, 60, 200)) | about
    out = tmp_path_factory.mktemp("otherwise") / "conversations"
    written(out, [face])
    return out, face


class Reader:
    """Takes the option that is written in the true reply; writes it, too."""

    takes_maps = False
    characteristic_names = ()

    def __init__(self, face):
        replies = [m["content"][0]["text"] for m in face["messages"] if m["role"] == "assistant"]
        self.replies = dict(zip(question_texts(face), replies, strict=True))

    def score_faces(self, images, questions, maps):
        answers = [[self._one(query) for query in asked] for asked in questions]
        return [SimpleNamespace(answers=own, characteristics={}) for own in answers]

    def _one(self, query):
        best = query.options.index(self.replies[query.question])
        return SimpleNamespace(probabilities=tuple(np.eye(len(query.options))[best]), greedy=best)

    def generate_batch(self, images, questions, max_new_tokens, maps):
        return [self.replies[question] for question in questions]


@pytest.mark.parametrize("answerer", [Likelihood, Written])
def test_questions_are_answered_in_the_way_they_are_asked(asked_otherwise, tmp_path, answerer):
    table, face = asked_otherwise
    with TableWriter(tmp_path / "a", PREDICTIONS) as writer:
        conversations = open_table(table, CONVERSATIONS)
        predict(answerer(Reader(face), 96), conversations, "test", writer, "m", batch_images=4)
    rows = {row["sample_id"]: row for row in open_table(tmp_path / "a").iterate()}
    assert set(rows) == {turn["sample_id"] for turn in face["turns"]}
    assert {"gender statement", "gender lettered", "eyewear lettered", "Bangs native"} <= set(rows)
    assert float(rows.pop("age native")["parsed"]) == 30
    assert all(row["parsed"] == row["answer"] for row in rows.values())
    assert len(rows["eyewear lettered"]["raw"]) == 1  # a letter, read as the option behind it
    assert rows["eyewear lettered"]["parsed"] == "Eyeglasses"
    assert rows["gender statement"]["raw"] in ("true", "false")
