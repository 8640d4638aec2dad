"""One configuration: what is read, and how what cannot be read is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from facemllm import settings
from facemllm.errors import UserError

PROJECT = Path(__file__).parents[2]
PROFILES = sorted(path.stem for path in (PROJECT / "profiles").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch):
    monkeypatch.chdir(PROJECT)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_shipped_profile_loads(profile):
    loaded = settings.load(profile)
    assert loaded.profile == profile
    assert loaded.home.is_absolute()


def test_the_expected_profiles_are_shipped():
    assert {"laptop", "ci", "own", "faceinsight", "ablation", "small", "paper-7b", "paper-13b"} <= set(PROFILES)


@pytest.mark.parametrize("profile", ["paper-7b", "paper-13b"])
def test_a_recipe_says_of_every_line_where_it_comes_from(profile):
    lines = (PROJECT / "profiles" / f"{profile}.yaml").read_text().splitlines()
    values = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    silent = [line for line in values if not line.endswith(":") and "# paper: " not in line and "# ours" not in line]
    assert not silent


def test_paper_steps_are_one_epoch():
    loaded = settings.load("paper-7b")
    images = 150_000 * (1 - loaded.data.validation_share - loaded.data.test_share)
    for stage in loaded.stages().values():
        assert stage.steps == int(images // stage.batch_images)


def test_ci_and_laptop_can_stand_side_by_side():
    ci, laptop = settings.load("ci"), settings.load("laptop")
    assert ci.home != laptop.home
    ports = [
        {value for name, value in loaded.services.model_dump().items() if name.endswith("_port")}
        for loaded in (ci, laptop)
    ]
    assert not ports[0] & ports[1]
    assert set(ci.promotion.thresholds) == set(laptop.promotion.thresholds), "a limit of params.yaml is not loosened"


def test_an_override_reaches_one_key_and_is_yaml():
    base, changed = settings.load(), settings.load("laptop", ["training.workers=2", "versioning.remote=s3://b/p"])
    assert changed.training.workers == 2
    assert changed.versioning.remote == "s3://b/p"
    assert changed.training.stages == base.training.stages


def test_settings_are_frozen():
    loaded = settings.load()
    with pytest.raises(ValidationError):
        loaded.seed = 1


def test_digest_text_does_not_depend_on_order():
    assert settings.digest_text({"b": 1, "a": 2}) == settings.digest_text({"a": 2, "b": 1}) == '{"a":2,"b":1}'


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.worker=2", ["--set training.worker=2", "training.worker", "did you mean 'workers'"]),
        ("data.identities=many", ["data.identities", "many"]),
        ("data.identities=0", ["data.identities", "greater than 0"]),
        ("data.test_share=0.99", ["data", "leave a training split"]),
        ("quality.caption_share=1.5", ["quality.caption_share"]),
        ("services.mlflow_port=80", ["services.mlflow_port"]),
        ("services.mlflow_port=18080", ["services", "port of its own"]),
        ("model.segmentation.patch=7", ["model.segmentation", "side: 32 is no multiple of patch: 7"]),
        ("model.segmentation.heads=3", ["model.segmentation", "width: 64 is no multiple of heads: 3"]),
        ("model.preset=hub", ["model", "base"]),
        ("training.stages.align.trains.tower=lora", ["align.trains", "language model alone"]),
        ("qa.tasks=[caption]", ["absent from qa.tasks"]),
        ("promotion.thresholds.age.min=3", ["promotion.thresholds.age", "exactly one"]),
        ("training.workers", ["expected KEY=VALUE"]),
        ("=3", ["expected KEY=VALUE"]),
        ("seed=[1", ["not valid YAML"]),
    ],
)
def test_a_bad_override_is_refused_with_its_key(override, words):
    with pytest.raises(UserError) as refused:
        settings.load("laptop", [override])
    message = str(refused.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_an_unknown_profile_lists_the_known_ones():
    with pytest.raises(UserError, match=r"no profile 'cloud'.*laptop"):
        settings.load("cloud")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of its own, whose files a test may break."""
    (tmp_path / "profiles").mkdir()
    (tmp_path / "params.yaml").write_text((PROJECT / "params.yaml").read_text())
    (tmp_path / "profiles" / "laptop.yaml").write_text("")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    return tmp_path


def test_the_project_is_found_from_a_folder_below(project):
    assert settings.root() == project
    assert settings.load().home == project / ".facemllm"


def test_outside_a_project_there_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no params\.yaml"):
        settings.load()


def test_broken_yaml_is_named_with_its_line(project):
    (project / "profiles" / "laptop.yaml").write_text("seed: 1\ndata: [")
    with pytest.raises(UserError, match=r"laptop\.yaml, line \d+: not valid YAML"):
        settings.load()


def test_a_profile_that_is_no_mapping_is_refused(project):
    (project / "profiles" / "laptop.yaml").write_text("- seed")
    with pytest.raises(UserError, match="expected a mapping"):
        settings.load()


def test_the_file_that_set_a_key_is_named(project):
    (project / "profiles" / "laptop.yaml").write_text("seed: none at all")
    with pytest.raises(UserError, match=r"^profiles/laptop\.yaml: seed"):
        settings.load()


def test_a_missing_key_is_named(project):
    values = yaml.safe_load((project / "params.yaml").read_text())
    del values["quality"]["min_rows"]
    (project / "params.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"quality\.min_rows: is required and missing"):
        settings.load()
