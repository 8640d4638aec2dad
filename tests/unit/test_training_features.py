"""Features of a frozen tower, kept on disk: the same as asked anew, and of this tower, these pictures alone."""

import copy
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from facemllm.model.families import family_of
from facemllm.train import features
from tests.refusing import refuses
from tests.training_example import stage, trains

PLAN = stage(trains=trains(projector="full", language="full"), augment=False, steps=6)  # as many as show each face


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(features, "_BLOCK", 8)
    monkeypatch.setattr(features, "_BATCH", 4)


def kept(toy, folder, wait=lambda: None, **options):
    run = toy.stage_run(PLAN, **options)
    return features.cached(folder, run, toy.model, toy.family, toy.dataset, wait)


def test_training_on_kept_features_is_training_on_pictures(toy, tmp_path):
    losses = []
    without = toy.run(PLAN, cache=tmp_path, feature_cache=False, log=lambda _, m: losses.append(m["loss"]))
    assert not list(tmp_path.iterdir())
    cached = []
    first = toy.run(PLAN, cache=tmp_path, log=lambda _, m: cached.append(m["loss"]))
    assert cached == pytest.approx(losses, abs=1e-6)
    for name, tensor in without.model.state_dict().items():
        torch.testing.assert_close(first.model.state_dict()[name], tensor, atol=2e-5, rtol=1e-4, msg=name)
    [folder] = tmp_path.iterdir()
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(written) == 4
    run = toy.stage_run(PLAN, cache=tmp_path)
    again = features.with_features(run, toy.fresh()[0], toy.family, toy.dataset)
    assert again.features is not None
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written


@pytest.mark.parametrize(
    "changes",
    [{"augment": True}, {"trains": trains(tower="full")}, {"steps": 5}],  # 5 steps of 6 are fewer than 32 faces
)
def test_features_are_kept_only_where_that_saves_work(toy, tmp_path, changes):
    run = toy.stage_run(stage(**(PLAN.model_dump() | changes)), cache=tmp_path)
    assert features.with_features(run, toy.model, toy.family, toy.dataset) is toy.dataset
    assert not list(tmp_path.iterdir())


def test_another_tower_transform_or_table_has_another_name_and_a_saved_one_the_same(toy, tmp_path):
    model, processor = toy.fresh()
    brighter = copy.deepcopy(processor)
    brighter.image_processor.image_mean = [0.4] * 3

    def name(m=model, p=processor, table="t", rows=toy.corpus.pixel_row, precision="fp32"):
        run = toy.stage_run(PLAN, made_from={"conversations": table}, precision=precision)
        return features.name_of(run, m, family_of(m.config, p), rows)

    changed = copy.deepcopy(model)
    with torch.no_grad():
        next(changed.model.vision_tower.parameters())[0] += 1e-6
    towers = [copy.deepcopy(model) for _ in range(2)]  # the same weights, other numbers
    towers[0].model.vision_tower.config.strides = [2, 2, 2, 1]
    towers[1].model.vision_tower.config._attn_implementation = "sdpa"
    names = [name(), name(changed), name(p=brighter), name(table="u"), name(rows=np.arange(3)), name(precision="bf16")]
    names += map(name, towers)
    assert len(set(names)) == len(names)
    model.save_pretrained(tmp_path)
    assert name(toy.build()[0]) == name(type(model).from_pretrained(tmp_path)) == names[0]


def test_a_killed_build_goes_on_and_ranks_share_the_work(toy, tmp_path):
    whole = kept(toy, tmp_path / "whole")
    blocks = sorted((tmp_path / "whole").iterdir())
    partly = tmp_path / "partly"
    partly.mkdir()
    (partly / blocks[1].name).write_bytes(blocks[1].read_bytes())
    built = {path.name: path.stat().st_mtime_ns for path in partly.iterdir()}
    waited = []
    kept(toy, partly, rank=1, world_size=2, wait=lambda: waited.append(sorted(p.name for p in partly.iterdir())))
    assert waited == [[blocks[1].name, blocks[3].name]]  # its own; the others were nobody's here, so it made them too
    assert (partly / blocks[1].name).stat().st_mtime_ns == built[blocks[1].name]
    assert [p.read_bytes() for p in sorted(partly.iterdir())] == [p.read_bytes() for p in blocks]
    rows = np.array([31, 0, 8, 8])
    assert torch.equal(whole[rows][2], whole[rows][3])
    assert whole[rows].shape == (4, 10, 256)


@pytest.mark.parametrize("harm", ["half", "empty", "zeros", "fewer"])
def test_a_block_that_does_not_load_is_computed_again(toy, tmp_path, harm):
    kept(toy, tmp_path)
    block = sorted(tmp_path.iterdir())[2]
    good = block.read_bytes()
    if harm == "fewer":
        np.save(block, np.load(block)[:-1])
    else:
        block.write_bytes({"half": good[: len(good) // 2], "empty": b"", "zeros": bytes(len(good))}[harm])
    kept(toy, tmp_path)
    assert block.read_bytes() == good


def test_few_blocks_are_open_at_a_time_and_bfloat16_is_kept_bit_by_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "_BLOCK", 1)
    monkeypatch.setattr(features, "_OPEN", 4)
    paths = [tmp_path / f"{number}.npy" for number in range(40)]
    for number, path in enumerate(paths):
        np.save(path, np.full((1, 2, 3), number, np.float32))
    before = len(list(Path("/proc/self/fd").iterdir()))
    read = features.Features(paths)
    assert read[np.arange(40)][:, 0, 0].tolist() == list(range(40))
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 4
    values = torch.randn(3, 2, 5).to(torch.bfloat16)
    np.save(tmp_path / "block.npy", values.view(torch.int16).numpy())
    monkeypatch.setattr(features, "_BLOCK", 8)
    assert torch.equal(features.Features([tmp_path / "block.npy"])[np.array([2, 0])], values[[2, 0]])


def test_bytes_are_on_the_disk_before_the_name(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append((tmp_path / "a.npy").exists()))
    features._write(tmp_path / "a.npy", np.zeros(3))
    assert done == [False, True], "its bytes, then its name"


def test_too_little_room_is_told_before_the_work_and_a_full_disk_is_one_line(toy, tmp_path, monkeypatch):
    file = tmp_path.with_suffix(".file")
    file.write_text("in the way")
    refuses(r"cannot write tower features .* train.feature_cache=false", kept, toy, file / "features")
    monkeypatch.setattr(features.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    refuses(r"tower features need 0.0 GB .* train.feature_cache=false", kept, toy, tmp_path / "features")
    assert not list(tmp_path.iterdir())
