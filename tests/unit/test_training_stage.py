"""A stage is prepared: what its run is made from, what is refused before it starts, and what it leaves behind."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from facemllm import settings
from facemllm.core import digests
from facemllm.core.files import content_of
from facemllm.core.step import Context
from facemllm.core.store import Store
from facemllm.errors import UserError
from facemllm.tables import open_table
from facemllm.tables.schemas import SEGMENTATION
from facemllm.tasks.held_out import withheld_classes
from facemllm.train import launch
from facemllm.train.checkpoint import Checkpoint
from facemllm.train.stage import StageRun, check_order, prepare_run
from facemllm.train.step import many_passes, stage_step
from tests.refusing import refuses
from tests.training_example import stage, stage_run


@pytest.fixture
def table(conversations_table):
    return conversations_table()


def save(run: StageRun) -> None:
    """Give a run a checkpoint of its second step."""
    net = nn.Linear(1, 1)
    run.store().put(2, 1, Checkpoint.of(net, torch.optim.AdamW(net.parameters()), {"step": 2, "key": run.key}).write)


def ask(folder: Path, table: Path, *overrides: str, stage: str = "align", base: Path | None = None) -> StageRun:
    loaded = settings.load("laptop", list(overrides))
    return prepare_run(stage, loaded, table, base, folder / "out", folder / "work", folder / "cache")


def model_of(folder: Path, stage: str | None) -> Path:
    folder.mkdir()
    if stage is not None:
        (folder / "lineage.json").write_text(json.dumps({"stage": stage}))
    return folder


def test_a_stage_goes_on_from_the_one_it_names_and_those_out_of_order_are_refused(table, tmp_path):
    refuses("instruct goes on from the model of stage align; train that first", ask, tmp_path, table, stage="instruct")
    aligned = model_of(tmp_path / "aligned", "align")
    assert ask(tmp_path, table, stage="instruct", base=aligned).base == aligned
    said = "specialize goes on from the model of stage instruct, but .* of stage align"
    refuses(said, ask, tmp_path, table, stage="specialize", base=aligned)
    refuses("stage align comes first", ask, tmp_path, table, stage="align", base=aligned)
    assert ask(tmp_path, table, stage="specialize", base=model_of(tmp_path / "foreign", None)).name == "specialize"
    published = ("model.preset=hub", f"model.base={model_of(tmp_path / 'published', None)}")
    assert ask(tmp_path, table, *published, stage="instruct").base is None
    refuses("no training stage 'polish'", ask, tmp_path, table, stage="polish")
    loaded = settings.load("laptop")
    stages = {name: loaded.stages()[name] for name in ("align", "specialize")}
    shorter = loaded.model_copy(update={"train": loaded.train.model_copy(update={"stages": stages})})
    check_order("specialize", shorter, aligned)
    refuses("specialize goes on from the model of stage instruct", check_order, "specialize", loaded, aligned)


def test_the_step_of_a_stage_reads_a_base_for_its_digest_once(table, tmp_path, monkeypatch):
    base, table = model_of(tmp_path / "aligned", "align"), open_table(table)
    by_hand = ask(tmp_path, table.path, stage="instruct", base=base)
    store = Store(tmp_path / "home")
    (store.home / "store").mkdir(parents=True)
    inputs = {"conversations": table.digest, "model": digests.of_tree(base)}
    for digest, folder in zip(inputs.values(), (table.path, base), strict=True):
        (store.home / "store" / digest).symlink_to(folder)
    read, runs = [], []
    of_tree = digests.of_tree
    monkeypatch.setattr(digests, "of_tree", lambda folder, **how: read.append(folder) or of_tree(folder, **how))

    def launched(run: StageRun, on_log: object) -> None:
        runs.append(run)
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "_train", launched)
    loaded = settings.load("laptop")
    context = Context(loaded, store, inputs, tmp_path / "step", tmp_path / "model", nested=pytest.fail)
    refuses(None, stage_step(loaded, "instruct").work, context, error=KeyboardInterrupt)
    assert [run.key for run in runs] == [by_hand.key]
    assert len(read) == 1


def test_a_worker_without_a_face_is_refused(table, tmp_path):
    with pytest.raises(UserError, match="4 workers share a batch of 3 faces: some would train on nothing"):
        ask(tmp_path, table, "train.workers=4", "train.stages.align.batch_images=3")


def test_work_with_checkpoints_of_other_settings_is_refused(table, tmp_path):
    first = ask(tmp_path, table)
    assert ask(tmp_path, table, "train.stages.align.steps=9").run_name != first.run_name  # nothing was kept so far
    again = ask(tmp_path, table)
    save(again)
    free = ("train.workers=2", "train.threads=3", "train.checkpoint_every=7", "train.max_failures=0")
    assert ask(tmp_path, table, *free).key == first.key
    said = rf"plan\.steps: {first.stage.steps} -> 9, seed: 0 -> 4.*{re.escape(str(again.record))}"
    refuses(said, ask, tmp_path, table, "train.stages.align.steps=9", "seed=4")
    again.record.unlink()
    assert ask(tmp_path, table, "seed=4").run_name != first.run_name


def test_checkpoints_left_at_another_place_are_told(table, tmp_path):
    first = ask(tmp_path, table)
    there = f"train.storage={tmp_path / 'there'}"
    assert ask(tmp_path, table, there).store().place != first.store().place  # nothing was kept so far
    first = ask(tmp_path, table)
    save(first)
    message = refuses(None, ask, tmp_path, table, there)
    for words in (f"are at {first.store().place}", str(tmp_path / "there" / first.run_name), f"remove {first.record}"):
        assert words in message
    shutil.copytree(first.store().place, tmp_path / "there" / first.run_name)
    assert ask(tmp_path, table, there).key == first.key


def test_a_place_that_cannot_be_read_is_forgotten_by_hand(table, tmp_path):
    first = ask(tmp_path, table)
    first.record.write_text(first.record.read_text().replace(first.store().place, "gs://gone/runs"))
    for overrides in ((), ("seed=4",)):
        refuses(rf"gs://gone/runs .* remove {first.record} to forget it", ask, tmp_path, table, *overrides)
    first.record.unlink()
    assert ask(tmp_path, table).key == first.key


def test_what_a_map_cannot_keep_to_itself_is_not_held_out(table, tmp_path):
    shown = [SEGMENTATION.index(name) for name in ("eye_g", "hat")]
    assert withheld_classes(["Eyeglasses", "Wearing_Hat", "No_Eyewear"]) == shown
    bald = "reformat.held_out=[Bald]"
    with pytest.raises(UserError, match=r"reformat\.held_out: Bald shows in a map .*no hair.*mode: none"):
        ask(tmp_path, table, bald, "model.segmentation.mode=append")
    assert ask(tmp_path, table, bald, "model.segmentation.mode=none").name == "align"


@pytest.mark.parametrize("preset", ["hub", "parts"])
def test_a_run_is_named_by_the_content_of_what_it_starts_from(table, tmp_path, preset):
    base = tmp_path / "base"
    base.mkdir()
    names = ("base",) if preset == "hub" else ("tower", "language")
    chosen = [f"model.preset={preset}", *(f"model.{name}={base}" for name in names)]
    keys = []
    for content in ("one", "two", "one"):
        (base / "model.safetensors").write_text(content)
        (base / ".git").mkdir(exist_ok=True)
        (base / ".git" / "head").write_text(str(len(keys)))
        keys.append(ask(tmp_path, table, *chosen).key)
    assert keys[0] == keys[2] != keys[1]


def test_what_the_hub_holds_is_named_by_its_commit(tmp_path: Path):
    commit = tmp_path / "models--some--model" / "snapshots" / "0a1b2c"
    for folder in (commit, tmp_path / "snapshots" / "latest"):
        folder.mkdir(parents=True)
    assert content_of(str(commit), "model.base") == "0a1b2c"
    assert content_of(str(tmp_path / "snapshots" / "latest"), "model.base") != "latest"


@pytest.mark.parametrize(("batch", "world"), [(12, 1), (12, 2), (7, 3), (64, 5), (3, 3)])
def test_slices_of_a_batch_are_disjoint_and_cover_it(batch: int, world: int):
    plan, loaded = stage(batch_images=batch), settings.load()
    runs = [stage_run(plan, loaded, rank=rank, world_size=world) for rank in range(world)]
    parts = [run.rank_slice for run in runs]
    faces = list(range(batch))
    assert [face for part in parts for face in faces[part]] == faces
    assert all(faces[part] for part in parts)


@pytest.mark.parametrize(("faces", "said"), [(192, "align.steps=300 "), (3200, ""), (0, "")])
def test_a_small_set_that_is_gone_over_hundreds_of_times_is_said(faces, said):
    stage = settings.load("own").stages()["align"]
    note = many_passes("align", stage, faces)
    assert said in note
    assert bool(note) == bool(said)
    assert not note or f"go over 192 training faces {stage.steps * stage.batch_images // 192} times" in note
