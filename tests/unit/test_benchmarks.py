"""FaceXBench and Face-Human-Bench answered and marked: whole trees, a model of ours, and a peer."""

import json
from collections import Counter
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest

from facemllm import settings
from facemllm.asking.requests import Reply, too_long
from facemllm.asking.store import Replies
from facemllm.evaluate import benchmarks
from facemllm.evaluate.leaderboard import figures
from facemllm.evaluate.peers import Peer
from facemllm.evaluate.run import score
from facemllm.scoring import benchmarks as scoring
from facemllm.tables import CONVERSATIONS, PREDICTIONS, TableWriter, open_table
from tests import benchmark_trees as trees
from tests.conftest import conversation, face
from tests.refusing import refuses

pytestmark = pytest.mark.usefixtures("no_torch")


@pytest.fixture(scope="module")
def chosen():
    return settings.load("laptop", ["evaluate.bootstrap=100", "evaluate.min_group=2", "evaluate.batch_images=7"])


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trees")
    made = {"facexbench": trees.facexbench(folder / "fxb"), "face-human-bench": trees.face_human_bench(folder / "fhb")}
    for key, root in made.items():
        trees.imported(key, root, folder / key, folder / "home")
    return {key: folder / key for key in made}


@dataclass
class Says:
    """A solver that gives what it is told to each problem."""

    answer: object
    one_picture: str = ""

    def solve(self, posed):
        for one in posed:
            text = self.answer(one.problem)
            options = one.problem.options
            yield {"raw": text, "parsed": None if text is None else benchmarks._option(options, text)}


def evaluated(chosen, table, out, answer):
    return benchmarks.answered(chosen, lambda: Says(answer), {"model_digest": "m" * 64}, table, out)


def test_facexbench_by_task_by_both_rules(chosen, tables, tmp_path):
    """What a model says that describes before it answers: its own rule takes the article for a letter."""

    def describes(problem):
        if problem.task.endswith(("fas", "deepfakes")):
            return "A picture of sadness"  # right, in words
        if problem.task.endswith("age"):
            return "I cannot help with that."
        return "(B)"

    metrics = evaluated(chosen, tables["facexbench"], tmp_path / "out", describes)
    figures = metrics["figures"]
    asked = {f"{category}/{minor}" for category, minors in trees.FACEXBENCH.items() for minor in minors}
    asked = {place for place in asked if not place.startswith("face_recognition")}
    assert {place for place in figures if "/" in place} == asked
    assert len(asked) == 11, "the three tasks that name or match people are not imported"
    assert {place: figures[f"fas_deepfakes/{place}"]["own"]["value"] for place in ("fas", "deepfakes")} == {
        **{"fas": 0.0, "deepfakes": 0.0}
    }
    assert figures["fas_deepfakes"]["ours"]["value"] == 1.0
    assert figures["face_localization"]["own"]["value"] == figures["face_localization"]["ours"]["value"] == 1.0
    age = figures["bias_fairness/age"]
    assert (age["ours"]["value"], age["unreadable"], age["own_unreadable"], age["refused"]) == (0.0, 1.0, 1.0, 1.0)
    assert figures["bias_fairness"]["own"]["value"] == pytest.approx(2 / 3)
    whole = figures[""]
    assert (whole["n"], whole["several_pictures"], whole["chance"]) == (33, 11, 0.25)
    assert whole["own"]["value"] == pytest.approx(24 / 33), "over all questions, as aggregate_results.py does"
    assert whole["ours"]["value"] == pytest.approx(30 / 33)
    assert whole["ours"]["low"] < whole["ours"]["value"] <= whole["ours"]["high"]
    assert age["gap"]["value"] == pytest.approx(0 - 10 / 11)
    assert "likelihood" not in whole
    assert score(chosen, tables["facexbench"], tmp_path / "out") == json.loads(
        (tmp_path / "out" / "metrics.json").read_text()
    )


def test_face_human_bench_is_a_mean_over_its_levels(chosen, tables, tmp_path):
    """Answers by the option's letter; its judge is not asked."""

    def says(problem):
        letter = "ABCD"[problem.options.index(trees.ANSWER)]
        if problem.task.startswith("face_age"):
            return "I think it shows sadness"  # its judge's matter
        if problem.task.startswith("human"):
            return f"{'ABCD'[('ABCD'.index(letter) + 1) % 4]}. wrong"
        return f"{letter}."

    metrics = evaluated(chosen, tables["face-human-bench"], tmp_path / "out", says)
    figures = metrics["figures"]
    assert metrics["left_out"] == 3, "face_expression_compound in its original version"
    age = figures["face/age"]
    assert (age["own"]["value"], age["own_answered"]["value"], age["ours"]["value"]) == (0.0, None, 1.0)
    assert figures["face"]["own"]["value"] == pytest.approx((1 + 0 + 1 + 1) / 4), "abilities weigh the same"
    assert figures["human"]["own"]["value"] == 0.0
    assert figures[""]["own"]["value"] == pytest.approx((3 / 4 + 0) / 2)
    assert figures[""]["ours"]["value"] == pytest.approx((1 + 0) / 2)
    assert figures["face"]["own_answered"]["value"] == 1.0
    assert figures["face/attribute"]["clusters"] == 3, "two versions of a picture are one cluster"


@dataclass
class Predictor:
    """One picture at a time: writes the letter B, and prefers the option `sadness`."""

    said: list = field(default_factory=list)
    model: object = None
    processor: object = None
    family: object = field(default_factory=lambda: SimpleNamespace(longest=100))

    def tokens_of(self, query):
        return 200 if "headpose" in query.question else 100

    def chat(self, turns):
        return [0] * 10

    def generate_batch(self, images, questions, longest):
        self.said += questions
        return ["(B)" for _ in images]

    def score(self, images, questions):
        likely = [tuple(0.7 if text == trees.ANSWER else 0.1 for text in query.options) for (query,) in questions]
        return [[SimpleNamespace(probabilities=probabilities, greedy=None)] for probabilities in likely]


def test_a_model_of_one_picture_is_not_asked_about_several_and_says_so(chosen, tables, tmp_path, capsys):
    own = benchmarks.Own(Predictor(), 8)
    metrics = benchmarks.answered(chosen, lambda: own, {"model_digest": "m" * 64}, tables["facexbench"], tmp_path / "o")
    lines = capsys.readouterr().err.splitlines()
    (line,) = [one for one in lines if "several pictures" in one]
    assert line.startswith("11 of 33 questions show several pictures and are not asked")
    rows = list(open_table(tmp_path / "o" / "predictions", PREDICTIONS).iterate())
    assert Counter(row["raw"] for row in rows) == {"(B)": 20, None: 13}
    whole = metrics["figures"][""]
    assert whole["not_answered"] == pytest.approx(13 / 33)
    assert whole["ours"]["value"] == whole["own"]["value"] == pytest.approx(20 / 33)
    assert metrics["not_asked"] == {"more than the 100 tokens that the model reads (max_position_embeddings)": 2}
    assert whole["likelihood"]["value"] == 1.0, "of questions with one picture"
    assert whole["unreadable"] == 0.0
    assert any(one.startswith("2 of 33 questions are not asked, and wrong: more than the 100 tokens") for one in lines)
    assert own.predictor.said[0].splitlines()[-4:] == ["(A) happiness", "(B) sadness", "(C) a man", "(D) woman"]


@dataclass
class Sender:
    """Keeps what it is asked, and says C; what is about `longer` is too long."""

    home: object
    longer: str = "nothing"
    asked: list = field(default_factory=list)

    def send(self, requests):
        found = []
        for request in [make() for make in requests]:
            self.asked.append(request)
            if self.longer in request.messages[0]["text"]:
                found.append(too_long(10))
                continue
            usage = {"prompt_tokens": 10, "completion_tokens": 1, "seconds": 0.5, "cost": 0.25}
            reply = Reply(key=request.key, image_id=request.image_id, model="m", prompt_hash="", text="C", **usage)
            Replies(self.home).write(reply)
            found.append(reply)
        return found


def test_a_peer_is_shown_all_pictures_and_asked_once(chosen, tables, tmp_path):
    sender = Sender(tmp_path / "home")
    peer = Peer(name="m", identity={"name": "m"}, image_side=24, sender=sender, home=tmp_path / "home")
    table = tables["facexbench"]
    assert benchmarks.to_ask(chosen, peer, open_table(table))[:2] == (33, 33)
    about = {"model_digest": peer.digest}
    metrics = benchmarks.answered(chosen, lambda: benchmarks.Other(peer), about, table, tmp_path / "o")
    assert Counter(len(request.pictures) for request in sender.asked) == {1: 22, 2: 11}
    several = next(request for request in sender.asked if request.others)
    assert several.picture != several.others[0]
    assert metrics["figures"][""]["own"]["value"] == 0.0
    assert (peer.used.replies, peer.used.tokens_in, peer.used.cost) == (33, 330, 8.25)
    assert benchmarks.to_ask(chosen, peer, open_table(table))[:2] == (33, 0)
    again = replace(peer, used=type(peer.used)())
    benchmarks.answered(chosen, lambda: benchmarks.Other(again), about, table, tmp_path / "again")
    assert (len(sender.asked), again.used.replies) == (33, 33)


def test_a_question_that_is_too_long_for_a_peer_does_not_end_the_others(chosen, tables, tmp_path):
    sender = Sender(tmp_path / "home", longer="headpose")
    peer = Peer(name="m", identity={"name": "m"}, image_side=24, sender=sender, home=tmp_path / "home")
    about = {"model_digest": peer.digest}
    metrics = benchmarks.answered(chosen, lambda: benchmarks.Other(peer), about, tables["facexbench"], tmp_path / "o")
    assert metrics["not_asked"] == {"more than the 10 tokens that the model reads (max_position_embeddings)": 3}
    assert metrics["figures"]["face_localization/headpose"]["not_answered"] == 1.0
    assert metrics["figures"][""]["not_answered"] == pytest.approx(3 / 33)
    assert (peer.used.replies, peer.outcomes.total()) == (30, 30), "the bill counts the others as not asked"


def test_one_task_alone_is_a_task_of_the_leaderboard(chosen, tmp_path):
    root = trees.facexbench(tmp_path / "tree", each=1)
    for file in (root / "benchmark").glob("*.json"):
        if file.name != "fas_mcq.json":
            file.unlink()
    trees.imported("facexbench", root, tmp_path / "table", tmp_path / "home")
    metrics = evaluated(chosen, tmp_path / "table", tmp_path / "out", lambda problem: "B")
    assert list(figures(metrics)) == ["overall, own rules", "overall", "fas_deepfakes/fas"]


def test_a_difference_of_two_models_is_paired_over_clusters(chosen, tables, tmp_path):
    table = tables["facexbench"]
    evaluated(chosen, table, tmp_path / "a", lambda problem: "B" if "age" in problem.task else "A")
    evaluated(chosen, table, tmp_path / "b", lambda problem: "B")
    paper = scoring.read_paper(open_table(table, CONVERSATIONS), "test")
    marked = [scoring.mark(paper, open_table(tmp_path / name / "predictions", PREDICTIONS)) for name in "ab"]
    found = scoring.compare(chosen, paper, *marked)
    assert found[""]["difference"]["value"] == pytest.approx(30 / 33)
    assert found[""]["verdict"] == "better"
    assert found["bias_fairness/age"]["difference"]["value"] == 0.0
    assert found["bias_fairness/age"]["verdict"] == "no difference shown"
    refuses(
        "does not answer each",
        scoring.mark,
        replace(paper, sample_ids=paper.sample_ids[1:]),
        marked and open_table(tmp_path / "a" / "predictions", PREDICTIONS),
    )


def test_tables_that_mix_or_are_none(chosen, tables, tmp_path):
    rows = [next(open_table(tables[key]).iterate()) for key in tables]
    mixed, plain = tmp_path / "mixed", tmp_path / "plain"
    with TableWriter(mixed, CONVERSATIONS) as table:
        table.write(rows)
    refuses("mixes face-human-bench, facexbench; a benchmark", scoring.benchmark_of, open_table(mixed))
    with TableWriter(plain, CONVERSATIONS) as table:
        table.write([conversation(face(0))])
    assert scoring.benchmark_of(open_table(plain)) is None
    refuses("is no question of facexbench or face-human-bench", list, benchmarks.posed(open_table(plain), "train"))
