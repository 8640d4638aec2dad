"""One configuration: what is read, and how what cannot be read is refused."""

import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from facemllm import settings
from facemllm.errors import UserError
from tests.refusing import refuses

PROJECT = Path(__file__).parents[2]
NOWHERE = ("s3://", "s3:///runs", "s3:/faces", "gs://faces", "''")
PROFILES = sorted(path.stem for path in (PROJECT / "profiles").glob("*.yaml"))


@pytest.mark.parametrize("profile", PROFILES)
def test_every_shipped_profile_loads(profile):
    loaded = settings.load(profile)
    assert loaded.profile == profile
    assert loaded.home.is_absolute()
    assert {"laptop", "ci", "own", "faceinsight", "ablation", "small", "paper-7b", "paper-13b"} <= set(PROFILES)


@pytest.mark.parametrize("profile", ["paper-7b", "paper-13b"])
def test_a_recipe_says_of_every_line_where_it_comes_from(profile):
    lines = (PROJECT / "profiles" / f"{profile}.yaml").read_text().splitlines()
    values = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    silent = [line for line in values if not line.endswith(":") and "# paper: " not in line and "# ours" not in line]
    assert not silent


def test_paper_steps_are_one_epoch():
    loaded = settings.load("paper-7b")
    images = 150_000 * (1 - loaded.ingest.validation_share - loaded.ingest.test_share)
    for stage in loaded.stages().values():
        assert stage.steps == int(images // stage.batch_images)


def test_ci_and_laptop_can_stand_side_by_side():
    ci, laptop = settings.load("ci"), settings.load("laptop")
    assert ci.home != laptop.home
    services = [each.services.model_dump() for each in (ci, laptop)]
    ports = [{value for name, value in one.items() if name.endswith("_port")} for one in services]
    assert not ports[0] & ports[1]
    assert set(ci.promote.thresholds) == set(laptop.promote.thresholds), "a limit of params.yaml is not loosened"


def test_an_override_reaches_one_key_and_is_yaml():
    base, changed = settings.load(), settings.load("laptop", ["train.workers=2", "version.remote=s3://b/p"])
    assert changed.train.workers == 2
    assert changed.version.remote == "s3://b/p"
    assert changed.train.stages == base.train.stages
    with pytest.raises(ValidationError):
        changed.seed = 1


def test_at_cluster_stands_for_what_the_profile_says_of_the_cluster():
    chosen = settings.load("small", [settings.ON_CLUSTER, "tracking.uri=http://other:5000"])
    assert (chosen.storage.home, chosen.serve.target) == ("/workspace/.facemllm", "kserve")
    assert chosen.tracking.uri == "http://other:5000"
    refuses("cluster.overrides: is a section", lambda: settings.load("ci", ["cluster.overrides=3", "@cluster"]))


@pytest.mark.parametrize("key", ["head_pose.yaw", '"head_pose.yaw"', '"head_pose.pitch"'])
def test_a_key_with_a_dot_can_be_set(key):
    loaded = settings.load("laptop", [f"promote.thresholds.{key}.max=3"]).promote.thresholds
    assert loaded[key.strip('"')].max == 3
    assert loaded["closed_mean"].min == 0.75


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed: 0\ntrain:\n  workers: 1\n  workers: 2\n", "params.yaml, line 4: .*'workers' .* twice, .* line 3"),
        ("seed: 0\nseed: 1\n", "params.yaml, line 2: .*'seed' stands there twice, first in line 1"),
        ("seed: [1\n", "params.yaml, line 2: not valid YAML"),
        ("seed: \udcff\n", "params.yaml: not UTF-8"),
    ],
    ids=["nested", "at the top", "no YAML", "not UTF-8"],
)
def test_settings_that_say_a_key_twice_are_refused_with_the_line(tmp_path, monkeypatch, text, says):
    (tmp_path / "params.yaml").write_bytes(text.encode(errors="surrogateescape"))
    monkeypatch.chdir(tmp_path)
    refuses(says, settings.load)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.worker=2", ["--set train.worker=2", "train.worker", "did you mean 'workers'"]),
        ("ingest.identities=many", ["ingest.identities", "many"]),
        ("ingest.identities=0", ["ingest.identities", "greater than 0"]),
        ("ingest.test_share=0.99", ["ingest", "leave a training split"]),
        ("validate.caption_share=1.5", ["validate.caption_share"]),
        ("services.mlflow_port=80", ["services.mlflow_port"]),
        ("services.mlflow_port=18080", ["services", "port of its own"]),
        ("model.segmentation.patch=7", ["model.segmentation", "side: 48 is no multiple of patch: 7"]),
        ("model.segmentation.heads=3", ["model.segmentation", "width: 64 is no multiple of heads: 3"]),
        ("model.preset=hub", ["--set model.preset=hub: model:", "base"]),
        ("model.image_size=33", ["--set model.image_size=33: model:", "33 is no multiple of 16, as preset: tiny"]),
        ("model={segmentation: {patch: 7}}", ["--set model={segmentation: {patch: 7}}: model.segmentation: side"]),
        ("model.segmentation=append", ["model.segmentation: is a section; set one of its keys: mode, tokens, drop"]),
        ("promote.thresholds.age=3", ["promote.thresholds.age: is a section; set one of its keys: ", "min"]),
        ("train.stages.align.rates=2", ["train.stages.align.rates: is a section"]),
        ("training.workers=2", ["unknown key; training is now train"]),
        ("promote.above_majority=false", ["unknown key; above_majority is now above_constant"]),
        ("reformat.tasks=[age, caption, age]", ["reformat.tasks", "names age twice"]),
        ("train.stages.polish={steps: 2}", ["train.stages.polish: required and missing: trains, tasks, objective"]),
        ("train.stages.align.rates={eyes: 2}", ["train.stages.align.rates.eyes: Input should be 'tower'"]),
        ("train.stages.align.tasks={}", ["tasks={}: an empty mapping changes nothing; set its keys one by one"]),
        ("train.stages={align: {tasks: {}}}", ["an empty mapping changes nothing; set its keys one by one"]),
        *(
            (f"train.storage={place}", ["train.storage: is neither a folder nor s3://bucket/prefix"])
            for place in NOWHERE
        ),
        ("train.stages.align.trains.tower=lora", ["align.trains", "language model alone"]),
        ("reformat.tasks=[caption]", ["--set reformat.tasks=[caption]: settings:", "absent from reformat.tasks"]),
        ("promote.thresholds.age.min=3", ["promote.thresholds.age", "exactly one"]),
        ("train.workers", ["expected KEY=VALUE"]),
        ("=3", ["expected KEY=VALUE"]),
        ("seed=[1", ["not valid YAML"]),
        ("train.stages.align={steps: 1, steps: 2}", ["not valid YAML; 'steps' stands there twice"]),
        ("promote.thresholds.head_pose.roll.max=3", ["""set as 'promote.thresholds."head_pose.ITEM".max=VALUE'"""]),
        ('train."workers=2', ["expected KEY=VALUE"]),
        ("train..workers=2", ["expected KEY=VALUE"]),
    ],
)
def test_a_bad_override_is_refused_with_its_key(override, words):
    with pytest.raises(UserError) as refused:
        settings.load("laptop", [override])
    message = str(refused.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_tasks_of_the_knowledge_branch_are_known_where_it_is_on():
    assert settings.load("laptop", ["model.knowledge.tasks=[agee]"]).model.knowledge.tasks == ["agee"]
    said = "--set model.knowledge.tasks=[agee, age]: settings: model.knowledge.tasks names ['agee'], absent from"
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        settings.load("laptop", ["model.knowledge.enabled=true", "model.knowledge.tasks=[agee, age]", "seed=3"])


def test_the_last_override_within_a_section_is_named():
    changes = ["model.segmentation.patch=7", "seed=3", "model.segmentation.width=128", "model.segmentation.patch=5"]
    with pytest.raises(UserError, match=r"^--set model\.segmentation\.patch=5: model\.segmentation: side: 48 is no"):
        settings.load("laptop", changes)


@pytest.mark.parametrize("place", ["null", "runs", "/kept", "~/kept", "s3://faces", "s3://faces/", "s3://faces/a/b"])
def test_checkpoints_go_to_a_folder_or_a_bucket_and_an_empty_mapping_may_stay(place):
    empty = ["ingest.sources=[{name: utkface, root: faces, options: {}}]", "reformat.mixture.caps={}"]  # as before
    kept = settings.load("laptop", [f"train.storage={place}", *empty]).train.storage
    assert kept == yaml.safe_load(place)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of its own, whose files a test may break."""
    (tmp_path / "profiles").mkdir()
    (tmp_path / "params.yaml").write_text((PROJECT / "params.yaml").read_text())
    (tmp_path / "profiles" / "laptop.yaml").write_text("")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    return tmp_path


def test_the_project_is_found_from_a_folder_below_and_from_there_alone(project, tmp_path_factory, monkeypatch):
    assert settings.root() == project
    assert settings.load().home == project / ".facemllm"
    monkeypatch.chdir(tmp_path_factory.mktemp("outside"))
    with pytest.raises(UserError, match=r"no params\.yaml"):
        settings.load()


@pytest.mark.parametrize(
    ("profile", "complaint"),
    [
        ("seed: 1\ndata: [", r"laptop\.yaml, line \d+: not valid YAML"),
        ("- seed", "expected a mapping"),
        ("seed: none at all", r"^profiles/laptop\.yaml: seed"),
    ],
)
def test_a_broken_profile_is_named_with_its_file(project, profile, complaint):
    (project / "profiles" / "laptop.yaml").write_text(profile)
    with pytest.raises(UserError, match=complaint):
        settings.load()


def test_a_missing_key_and_an_unknown_profile_are_named(project):
    values = yaml.safe_load((project / "params.yaml").read_text())
    del values["validate"]["min_rows"]
    (project / "params.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"validate\.min_rows: is required and missing"):
        settings.load()
    with pytest.raises(UserError, match=r"no profile 'cloud'.*laptop"):
        settings.load("cloud")


@pytest.mark.parametrize(("tokens", "fits"), [(1, True), (2, True), (7, False), (9, True), (10, True), (11, False)])
def test_maps_become_a_square_of_tokens_or_one_more(tokens, fits):
    refused = pytest.raises(UserError, match=rf"tokens: {tokens} is neither a square nor a square and one")
    with nullcontext() if fits else refused:
        assert settings.load("laptop", [f"model.segmentation.tokens={tokens}"]).model.segmentation.tokens == tokens


def test_a_servers_settings_lie_over_the_defaults_at_every_level():
    usual = settings.plain().serve
    found = settings.serving({"threads": 3, "feedback": {"folder": "/x"}}, "--config")
    assert (found.threads, found.feedback.folder) == (3, "/x")
    assert found.feedback.max_mb == usual.feedback.max_mb
    assert found.guard == usual.guard


def test_a_servers_whole_settings_need_no_file_beside_it(tmp_path, monkeypatch):
    whole = settings.plain().serve.model_dump(mode="json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(settings, "root", lambda: refuses_root())
    assert settings.serving(whole, "--config").threads == whole["threads"]


def refuses_root():
    raise UserError("no params.yaml here")
