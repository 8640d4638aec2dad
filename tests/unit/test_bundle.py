"""What a decision stands on: the bundle of a version, its card, its bill of materials, its faces."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from huggingface_hub import ModelCard

from facemllm import tasks
from facemllm.core import digests
from facemllm.core.store import Store
from facemllm.evaluate.run import score
from facemllm.promote import bundle, samples
from facemllm.promote.registry import Version
from facemllm.promote.sbom import installed, sbom
from facemllm.settings import load
from facemllm.tables import CONVERSATIONS, PREDICTIONS, TableWriter, open_table, pairs
from facemllm.version import ledger
from tests.conftest import picture
from tests.refusing import refuses
from tests.scored import template

PEOPLE, CLOSED = 60, ("expression", "gender")
HOSTILE = "a|b\n# <script>x</script> [y](javascript:z) ![p](http://127.0.0.1/q)"


def conversations(out, source):
    """Two closed questions and the age of so many people, half of them for training."""
    draw = np.random.default_rng(0)
    with TableWriter(out, CONVERSATIONS) as table:
        for person in range(2 * PEOPLE):
            turns = []
            for task in (*CLOSED, "age"):
                (question,) = tasks.get(task).questions()
                options = [option.value for option in question.options]
                answer = str(draw.integers(5, 80)) if task == "age" else str(draw.choice(options))
                turn = {"sample_id": f"{person}-{task}", "task": task, "template": template(question.item)}
                turns.append({**turn, "options": options, "answer": answer, "follows": False})
            face = {"image_id": digests.of_bytes(picture(person)), "images": [{"bytes": picture(person), "path": None}]}
            face |= {"conversation_id": f"c{person}", "subject_id": f"p{person}", "source": source, "turns": turns}
            groups = {"gender": ("female", "male")[person % 2], "age_band": HOSTILE if person % 3 else "old"}
            table.write([face | {"split": ("train", "test")[person % 2], "groups": pairs(groups)}])
    return open_table(out)


class Home:
    """A store as a run leaves it: conversations, two models with their stages behind them, two evaluations."""

    def __init__(self, folder: Path, source: str):
        self.settings = load(
            "laptop",
            [
                f"storage.home={folder}",
                "evaluate.bootstrap=200",
                "cost.price_per_hour=2",
                "promote.thresholds.age.max=1000",
                "promote.above_constant=false",
            ],
        )
        self.store = Store(folder)
        (folder / "store").mkdir(parents=True)
        table = conversations(folder / "new", source)
        self.table = self.keep(folder / "new", table.digest, step="reformat", inputs={})
        self.model, self.champion = self.trained("one", source), self.trained("two", source)
        self.evaluation, self.others = self.evaluated(self.model, 0.8), self.evaluated(self.champion, 0.7)
        self.version = Version("face-mllm", 3, self.model, "passed", self.evaluation, "", "", "", "")
        self.rival = Version("face-mllm", 2, self.champion, "passed", self.others, "", "", "", "")

    def keep(self, folder, digest, **facts):
        self.store.keep(digests.of_json([digest, *facts]), folder, digest, {"output": digest, **facts})
        return digest

    def trained(self, weights, source):
        folder = self.settings.home / weights
        (folder / "adapter").mkdir(parents=True)
        (folder / "model.safetensors").write_text(weights)
        (folder / "adapter" / "a.json").write_text("{}")
        (folder / "lineage.json").write_text(json.dumps({"sources": [source]}))
        cost = {"seconds": 90.5, "flops": 10**20, "device": "CPU, 2 threads", "samples": 1200}
        made = {"step": "specialize", "inputs": {"conversations": self.table}, "cost": cost, "code": "c0" * 32}
        return self.keep(folder, digests.of_tree(folder), **made, commit=f"{'ab' * 20}+changes")

    def evaluated(self, model, skill):
        folder, draw = self.settings.home / "new", np.random.default_rng(len(model))
        table = open_table(self.store.path(self.table))
        with TableWriter(folder / "predictions", PREDICTIONS, about={"split": "test"}) as writer:
            for face in table.iterate(split="test"):
                for turn in face["turns"]:
                    said = turn["answer"] if draw.random() < skill else turn["options"][0]
                    row = {"sample_id": turn["sample_id"], "image_id": face["image_id"], "task": turn["task"]}
                    writer.write([{**row, "raw": said, "parsed": said, "model_digest": model}])
        score(self.settings, self.store.path(self.table), folder, folder / "metrics.json")
        inputs = {"model": model, "conversations": self.table}
        return self.keep(folder, digests.of_tree(folder), step="evaluate", inputs=inputs)

    def collect(self, champion=True, version=None):
        return bundle.of_version(self.settings, version or self.version, self.rival if champion else None)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return Home(tmp_path_factory.mktemp("bundle") / "home", "render")


@pytest.fixture(scope="module")
def made(home):
    return home.collect()


def test_the_same_facts_give_the_same_bytes_and_the_digest_covers_every_file(home, made):
    again = home.collect()
    assert again.files == made.files
    assert made.digest == digests.of_bytes(made.files["bundle.json"])
    facts = json.loads(made.files["bundle.json"])
    assert facts == made.facts
    assert bundle.canonical(facts) == made.files["bundle.json"]
    named = {"card.md": facts["card"], "sbom.json": facts["sbom"]}
    named |= {face["file"]: face["sha256"] for face in facts["samples"]["faces"]}
    assert {name: digests.of_bytes(data) for name, data in made.files.items() if name != "bundle.json"} == named


def test_what_the_bundle_says_is_what_lies_in_the_store(home, made):
    facts, metrics = made.facts, json.loads((home.store.path(home.evaluation) / "metrics.json").read_text())
    assert digests.of_listing(facts["model"]["files"]) == facts["model"]["digest"] == home.model
    assert digests.of_listing(facts["evaluation"]["files"]) == facts["evaluation"]["digest"] == home.evaluation
    place = home.store.path(home.model)
    assert facts["model"]["bytes"] == sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    assert (facts["evaluation"]["people"], facts["evaluation"]["pictures"]) == (PEOPLE, PEOPLE)
    other = json.loads((home.store.path(home.others) / "metrics.json").read_text())
    for name, entry in facts["tasks"].items():
        for whole, body in ((metrics, entry), (other, entry["champion"])):
            stated = whole["closed_mean"] if name == "closed_mean" else whole["tasks"][name]
            assert {end: stated[end] for end in ("value", "low", "high")}.items() <= body.items()
    assert facts["code"] == {
        "commit": "ab" * 20,
        "dirty": True,
        "package": "facemllm 0.1.0",
        "steps": {"specialize": "c0" * 32},
    }
    assert facts["cost"]["seconds"] == 90.5
    assert facts["cost"]["price"] == pytest.approx(90.5 / 3600 * 2, abs=1e-4)
    assert facts["data"]["conversations"] == facts["lineage"]["conversations"] == home.table
    assert facts["champion"]["evaluation"] == home.others
    assert (facts["champion"]["version"], facts["champion"]["digest"]) == (2, home.champion)
    assert [row["key"] for row in facts["sources"]] == ["render"]
    assert facts["settings"]["changed"]["promote.thresholds.age.max"] == {"value": 1000, "default": 12}
    assert {one["key"] for one in facts["loosened"]} == {"promote.thresholds.age", "promote.above_constant"}
    assert facts["gate"]["passed"] is False  # most tasks were never asked
    assert {check["kind"] for check in facts["gate"]["checks"] if check["passed"]} >= {"digest", "identity", "uses"}


def test_a_bundle_stands_on_bytes_that_are_still_there(home, tmp_path):
    folder = shutil.copytree(home.settings.home, tmp_path / "home")
    storage = home.settings.storage.model_copy(update={"home": str(folder)})
    settings = home.settings.model_copy(update={"storage": storage})
    (folder / "store" / home.model / "model.safetensors").write_text("another")
    refuses("the bytes of the model are not those of its digest", bundle.of_version, settings, home.version, None)
    (folder / "store" / home.evaluation / "metrics.json").write_text("{}")
    refuses("metrics.json", bundle.of_version, settings, home.version, None)
    shutil.rmtree(folder / "store" / home.evaluation)
    refuses("the store has no result", bundle.of_version, settings, home.version, None)


def test_faces_are_those_that_differ_and_a_dozen_at_most(home, made):
    shown = made.facts["samples"]
    assert shown["against"] == "champion"
    assert len(shown["faces"]) == samples.MOST
    counts = [face["differing"] for face in shown["faces"]]
    assert counts == sorted(counts, reverse=True)
    for face in shown["faces"]:
        assert face["answers"]
        assert all(answer["candidate"] != answer["champion"] for answer in face["answers"])
        assert made.files[face["file"]][:2] == b"\xff\xd8"
    alone = home.collect(champion=False).facts
    assert (alone["champion"], alone["samples"]["against"]) == (None, "labels")
    assert all(a["candidate"] != a["label"] for face in alone["samples"]["faces"] for a in face["answers"])


@pytest.mark.parametrize(("source", "shown"), [("fairface", True), ("celeba", False)])
def test_pictures_of_people_never_lie_beside_a_decision(tmp_path, source, shown):
    facts = (made := Home(tmp_path / "home", source).collect()).facts
    assert set(made.files) == {"bundle.json", "card.md", "sbom.json"}
    assert bool(facts["samples"]["faces"]) is shown
    assert all(face["file"] is None for face in facts["samples"]["faces"])
    assert (facts["samples"]["withheld"] > 0) is not shown


def test_hubs_read_the_card_and_words_from_data_are_words(made):
    text = made.files["card.md"].decode()
    read = ModelCard(text)
    assert read.data.license == "cc0-1.0"
    assert (read.data.pipeline_tag, read.data.library_name) == ("image-text-to-text", "transformers")
    values = {(one.dataset_config, one.metric_type): one.metric_value for one in read.data.eval_results}
    for task, entry in made.facts["tasks"].items():
        assert values[task, entry["metric"]] == entry["value"]
    assert "<script>" not in text
    assert not re.search(r"(?<!\\)\[[^\]]*\]\(", text)
    assert "**Loosened** against `params.yaml`" in text
    assert "with changes that are in no commit" in text
    for one in made.facts["champion"]["worse"]:
        assert f"| {one['task']} | " in text.split("## Gate")[1]


def valid(document):
    return JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(document)) is None


def test_the_bill_of_materials_is_cyclonedx_and_an_unknown_key_fails_it(home, made):
    document = json.loads(made.files["sbom.json"])
    assert valid(document)
    model = document["metadata"]["component"]
    assert model["type"] == "machine-learning-model"
    assert {part["name"]: part["hashes"][0]["content"] for part in model["components"]} == made.facts["model"]["files"]
    measured = {
        one["slice"]: float(one["value"]) for one in model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    }
    assert measured["test: age"] == made.facts["tasks"]["age"]["value"]
    kinds = {part["type"] for part in document["components"]}
    assert kinds == {"data", "library"}
    (source,) = [part for part in document["components"] if part["bom-ref"] == "source:render"]
    assert source["licenses"][0]["license"]["name"].startswith("CC0-1.0")
    for place in (document, model, model["modelCard"], document["components"][0]):
        place["surprise"] = 1
        assert not valid(document)
        del place["surprise"]
    assert valid(document)


def test_words_from_data_cannot_break_the_bill_of_materials():
    row = ledger.entries(load())["render"].model_copy(update={"name": HOSTILE, "licence": HOSTILE, "terms": HOSTILE})
    metrics = {"split": "test", "tasks": {}, "fairness": {HOSTILE: {HOSTILE: {"largest": None}}}}
    document = sbom(
        name=HOSTILE,
        version="1",
        digest="ab" * 32,
        files={"weird name ü.bin": "cd" * 32},
        sources=[row],
        tables={},
        metrics=metrics,
        origin=HOSTILE,
        packages={"a": ("1.0+local", None), "b": ("2", HOSTILE)},
    )
    assert valid(document)


def test_packages_are_those_that_are_installed_and_needed():
    found = installed()
    assert {"facemllm", "torch", "transformers", "jinja2", "markupsafe"} <= set(found)
    assert "pytest" not in found  # of an extra that nothing here asks for
    assert found["facemllm"] == ("0.1.0", "Apache-2.0")
    assert installed("no-such-package") == {}


def test_whole_numbers_that_not_every_reader_keeps_become_text():
    value = {"b": 10**20, "c": 1e20, "d": 0.1, "a": [2**53 - 1, True, None]}
    text = b'{"a":[9007199254740991,true,null],"b":"100000000000000000000","c":"100000000000000000000","d":0.1}'
    assert bundle.canonical(value) == text
    assert bundle.canonical(json.loads(text)) == text


def test_the_champions_evaluation_is_the_newest_that_is_still_there(home):
    found = bundle.evaluation_of(home.store, home.champion, home.table)
    assert found is not None
    assert found.name == home.others
    assert bundle.evaluation_of(home.store, home.champion, "ff" * 32) is None
    lost = SimpleNamespace(records=home.store.records, home=home.settings.home / "elsewhere")
    assert bundle.evaluation_of(lost, home.champion, home.table) is None


def test_a_bundle_is_kept_in_the_decisions_repository_as_it_is(home, made):
    from facemllm.signing.decisions import Decisions

    decisions = Decisions.open(home.settings)
    assert decisions.append_bundle(made.files) == made.digest
    assert decisions.bundle(made.digest) == made.facts
    assert all(decisions.bundle_file(made.digest, name) == data for name, data in made.files.items())
