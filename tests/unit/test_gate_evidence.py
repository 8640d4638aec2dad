"""What the gate judges are the bytes that evaluation left: whatever was changed since is named, in one line."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from facemllm.core import digests
from facemllm.core.step import Context
from facemllm.core.store import Store
from facemllm.errors import UserError
from facemllm.promote import registry, step
from facemllm.promote.evidence import verified
from facemllm.promote.gates import verdict
from facemllm.tables import PREDICTIONS, TableWriter, open_table
from tests.approved import flip
from tests.refusing import refuses
from tests.scored import write_conversations, write_predictions
from tests.unit.test_gates import ASKED, GROUPS, evaluation, load

WORSE = {"skill": 0.7, "error": 5.8}


class Home:
    """A store with conversations, two models and their evaluations, as the steps leave them."""

    def __init__(self, folder: Path):
        self.settings = load(f"storage.home={folder}", "promote.champion_margin=0.5")
        self.store = Store(self.settings.home)
        (folder / "store").mkdir(parents=True)
        made = write_conversations(folder / "table", ASKED, GROUPS)
        self.conversations = open_table(made).digest
        made.rename(folder / "store" / self.conversations)
        self.model, self.other = self.new_model("one"), self.new_model("two")
        self.evaluation = self.keep(self.new_evaluation(self.model, seed=1), self.model)
        self.others = self.keep(self.new_evaluation(self.other, **WORSE), self.other)

    def new_model(self, weights):
        folder = self.settings.home / weights
        folder.mkdir()
        (folder / "weights.bin").write_text(weights)
        (folder / "lineage.json").write_text(json.dumps({"sources": ["render"]}))
        digest = digests.of_tree(folder)
        folder.rename(self.settings.home / "store" / digest)
        return digest

    def new_evaluation(self, model, **how):
        folder = evaluation(self.settings.home / "new", self.store.path(self.conversations), model, **how)
        for part in ("generated", "disturbed/blur"):
            write_predictions(folder / part, {0: "happiness", 2: "male"}, model=model)
        (folder / "samples").mkdir()
        (folder / "samples" / "00.jpg").write_bytes(b"\xff\xd8 a face")
        return folder

    def keep(self, folder, model):
        """Put an evaluation into the store under its digest, and remember it as the step does."""
        files = digests.of_each(folder, fresh=True)
        digest = digests.of_listing(files)
        self.store.keep(
            f"evaluate-{digest[:8]}",
            folder,
            digest,
            {
                "step": "evaluate",
                "inputs": {"model": model, "conversations": self.conversations},
                "output": digest,
                "files": files,
            },
        )
        return digest

    def judge(self, **options):
        champion = options.pop("champion", "")
        answered = options.pop("answered", lambda _: self.store.path(self.others))
        return verdict(
            self.settings, options.pop("evaluation", self.evaluation), champion=champion, answered=answered, **options
        )


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    return Home(tmp_path_factory.mktemp("home") / "home")


@pytest.fixture
def home(untouched, tmp_path):
    """A copy of the store, to be tampered with."""
    copied = SimpleNamespace(**vars(untouched))
    folder = shutil.copytree(untouched.settings.home, tmp_path / "home", symlinks=True)
    storage = untouched.settings.storage.model_copy(update={"home": str(folder)})
    made = Home.__new__(Home)
    vars(made).update(vars(copied))
    made.settings = untouched.settings.model_copy(update={"storage": storage})
    made.store = Store(folder)
    return made


def edit_figure(folder, task="age", value=1.0):
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["tasks"][task]["value"] = value
    (folder / "metrics.json").write_text(json.dumps(metrics))


def rewrite(folder):
    """Right answers for all questions, in a table that is sound in itself."""
    rows = list(open_table(folder, PREDICTIONS).iterate())
    about = json.loads((folder / "manifest.json").read_text())["about"]
    shutil.rmtree(folder)
    with TableWriter(folder, PREDICTIONS, about=about) as table:
        table.write({**row, "parsed": "40"} for row in rows)


def test_an_evaluation_as_it_was_left_is_judged(home):
    found = home.judge(champion=home.other, model=home.model)
    assert found.decision.passed, found.decision.reasons
    assert found.files["evaluation"] == digests.of_each(home.store.path(home.evaluation))
    assert found.files["model"] == digests.of_each(home.store.path(home.model))
    kinds = [check["kind"] for check in found.decision.checks]
    assert (kinds.count("digest"), kinds.count("identity")) == (3, 2)
    assert found.champion["model_digest"] == home.other


TAMPERED = {
    "metrics": (lambda f: edit_figure(f), "metrics.json was changed after evaluation"),
    "predictions": (
        lambda f: flip(f / "predictions" / "part-00000.parquet"),
        "predictions/part-00000.parquet was changed",
    ),
    "rewritten predictions": (lambda f: rewrite(f / "predictions"), "predictions/manifest.json was changed"),
    "their manifest": (lambda f: flip(f / "predictions" / "manifest.json"), "predictions/manifest.json was changed"),
    "generated": (lambda f: flip(f / "generated" / "part-00000.parquet"), "generated/part-00000.parquet was changed"),
    "rewritten generated": (lambda f: rewrite(f / "generated"), "generated/manifest.json was changed"),
    "disturbed": (
        lambda f: flip(f / "disturbed/blur/part-00000.parquet"),
        "disturbed/blur/part-00000.parquet was changed",
    ),
    "rewritten disturbed": (lambda f: rewrite(f / "disturbed/blur"), "disturbed/blur/manifest.json was changed"),
    "a sample": (lambda f: (f / "samples" / "00.jpg").write_bytes(b"another"), "samples/00.jpg was changed"),
    "removed": (lambda f: shutil.rmtree(f / "disturbed"), "disturbed/blur/manifest.json is missing"),
    "added": (lambda f: (f / "notes.txt").write_text("fine"), "notes.txt was added"),
    "renamed": (lambda f: (f / "generated").rename(f / "written"), "generated/manifest.json is missing"),
    "a link": (lambda f: os.symlink("metrics.json", f / "link"), "link is neither a file nor a folder"),
    "a link to a folder": (lambda f: os.symlink("generated", f / "more"), "more is neither a file nor a folder"),
    "a FIFO": (lambda f: os.mkfifo(f / "pipe"), "pipe is neither a file nor a folder"),
    "no UTF-8": (lambda f: Path(os.fsdecode(os.fsencode(f) + b"/\xff")).write_text("x"), "is not UTF-8"),
}


@pytest.mark.parametrize("change", TAMPERED)
def test_a_changed_evaluation_is_not_judged(home, change):
    act, match = TAMPERED[change]
    act(home.store.path(home.evaluation))
    assert "\n" not in refuses(match, home.judge)
    # without a list of files the tables still tell which of them it is
    for key in (home.settings.home / "keys").glob("*.json"):
        key.unlink()
    refuses(None, home.judge)


def test_the_list_of_files_is_believed_only_if_it_has_the_digest(home):
    folder = home.store.path(home.evaluation)
    flip(folder / "generated" / "part-00000.parquet")
    checked = verified(folder, home.evaluation, digests.of_each(folder))
    with pytest.raises(UserError, match=r"generated/part-00000.parquet: bytes do not match"), checked:
        pass


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (edit_figure, r"metrics\.json: age is 1\.0, but the answers beside it give"),
        (lambda f: edit_figure(f, "expression", None), r"metrics\.json: expression is None"),
    ],
)
def test_figures_that_do_not_follow_from_the_answers_are_refused_under_a_new_digest_too(home, change, match):
    folder = shutil.copytree(home.store.path(home.evaluation), home.settings.home / "forged")
    change(folder)
    refuses(match, home.judge, evaluation=home.keep(folder, home.model))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        '{"tasks": 1}',
        '{"tasks": {"age": 1}}',
        '{"tasks": {"age": []}}',
        '{"tasks": {"age": {"value": "x"}}}',
        '{"tasks": {"age": {"value": null}}}',
        '{"tasks": {"<b>": {"value": 1}}}',
        '{"tasks": {}, "disturbed": [1]}',
        '{"tasks": {}, "fairness": 3}',
    ],
)
def test_figures_of_no_shape_are_refused_in_a_line(home, text):
    folder = shutil.copytree(home.store.path(home.evaluation), home.settings.home / "forged")
    if text.startswith('{"tasks'):
        text = json.dumps(json.loads((folder / "metrics.json").read_text()) | json.loads(text))
    (folder / "metrics.json").write_text(text)
    assert "\n" not in refuses("metrics.json", home.judge, evaluation=home.keep(folder, home.model))


def test_figures_of_another_model_are_refused(home):
    refuses(r"candidate's figures are those of model .*, not of", home.judge, evaluation=home.others, model=home.model)
    own = lambda _: home.store.path(home.evaluation)  # noqa: E731
    refuses("champion's figures are those of model", home.judge, champion=home.other, answered=own)
    flip(home.store.path(home.others) / "predictions" / "part-00000.parquet")
    refuses("predictions/part-00000.parquet was changed", home.judge, champion=home.other)
    flip(home.store.path(home.model) / "weights.bin")
    refuses("the bytes of the model are not those of its digest", home.judge)


def test_answers_of_another_model_under_the_models_name_are_refused(home):
    folder = shutil.copytree(home.store.path(home.others), home.settings.home / "forged")
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({**metrics, "model_digest": home.model}))
    refuses("holds answers of model", home.judge, evaluation=home.keep(folder, home.model))
    folder = shutil.copytree(home.store.path(home.evaluation), home.settings.home / "forged")
    shutil.rmtree(folder / "generated")
    shutil.copytree(home.store.path(home.others) / "generated", folder / "generated")
    refuses("generated holds answers of model", home.judge, evaluation=home.keep(folder, home.model))


def context(home, inputs, nested, tmp_path):
    return Context(home.settings, home.store, inputs, tmp_path, tmp_path / "out", nested)


@pytest.fixture
def mlflow(home, monkeypatch):
    """The registry as the steps see it: who is champion, what was registered, what lost its standing."""
    fake = SimpleNamespace(champion=None, registered=[], withdrawn=[])

    def register(settings, **given):
        if not given["gate"]["passed"]:
            raise UserError(f"the gate refused: {given['gate']['reasons'][0]}")
        fake.registered.append(given)
        return SimpleNamespace(name="m", version=1)

    monkeypatch.setattr(registry, "champion", lambda _: fake.champion)
    monkeypatch.setattr(registry, "find_version", lambda *_: fake.champion)
    monkeypatch.setattr(registry, "register", register)
    monkeypatch.setattr(registry, "withdraw", lambda _, model, reasons: fake.withdrawn.append((model, reasons)))
    return fake


def test_registering_judges_again_whatever_a_stored_record_of_the_gate_says(home, mlflow, tmp_path):
    strict = home.settings.promote.model_copy(update={"unreadable": 0.0, "thresholds": {}, "champion_margin": 0.0})
    home.settings = home.settings.model_copy(update={"promote": strict})
    mlflow.champion = SimpleNamespace(digest=home.model, version=1)

    def forged(name, **inputs):
        if name == "gate":
            return {"output": "passed", "gate": {"passed": True, "reasons": ["all is well"]}}
        assert (name, inputs) == ("evaluate", {"model": home.model, "conversations": home.conversations})
        return {"output": home.evaluation}

    inputs = {"model": home.other, "evaluation": home.others, "gate": "passed"}
    reason = refuses(
        "the gate refused: .* is worse than the champion's", step._register, context(home, inputs, forged, tmp_path)
    )
    judged = step._gate(context(home, {"evaluation": home.others, "champion": home.model}, forged, tmp_path))
    assert judged.output == "refused"
    assert json.loads((tmp_path / "out" / "gate.json").read_text())["reasons"][0] in reason
    assert mlflow.withdrawn[0][0] == home.other
    # the champion's figures taken from the challenger
    taken = context(home, inputs, lambda name, **_: {"output": home.others}, tmp_path)
    refuses("the champion's figures are those of model", step._register, taken)
    assert mlflow.registered == []


def test_what_was_changed_between_evaluation_and_registration_is_not_registered(home, mlflow, tmp_path):
    inputs = {"model": home.model, "evaluation": home.evaluation, "gate": "passed"}
    there = context(home, inputs, None, tmp_path)
    assert step._register(there).output == "1"
    assert mlflow.registered.pop()["evaluation"]["model_digest"] == home.model
    refuses("are those of model", step._register, replace(there, inputs={**inputs, "evaluation": home.others}))
    flip(home.store.path(home.evaluation) / "generated" / "part-00000.parquet")
    refuses("generated/part-00000.parquet was changed", step._register, there)
    refuses("generated/part-00000.parquet was changed", step._gate, replace(there, inputs={**inputs, "champion": ""}))
    assert mlflow.registered == mlflow.withdrawn == []
