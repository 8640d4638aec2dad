"""One stage in several processes, killed and gone on with: the same bytes, however the model is sharded."""

import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from facemllm.core import digests
from facemllm.tables import CONVERSATIONS, TableWriter
from facemllm.train.stage import StageRun, TrainResult
from tests import ranks
from tests.conftest import conversation, face
from tests.ports import free_port
from tests.training_example import BRANCHES, Toy, stage, trains

pytestmark = pytest.mark.integration

STAGE = ("trains.tower=frozen", "objective=answers", "tasks={gender: 1, caption: 1}", "steps=6", "optimizer=muon")
ANSWERS = ("train.precision=fp32", *(f"train.stages.align.{override}" for override in STAGE))
ANSWERS += ("train.checkpoint_every=3", *ranks.BRANCHES)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small conversations table, its faces with their maps."""
    folder = tmp_path_factory.mktemp("table") / "conversations"
    faces = [face(number) for number in range(40)]
    with TableWriter(folder, CONVERSATIONS) as writer:
        writer.write({**conversation(row), "segmentation": row["segmentation"]} for row in faces)
    return folder


@pytest.fixture(scope="module")
def alone(table: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[StageRun, TrainResult]:
    """A finished run of one process, its checkpoint of step 3 still there, and its result."""
    given = ranks.prepare(table, tmp_path_factory.mktemp("alone"), *ANSWERS)
    return given, ranks.train(given)


def arguments(table: Path, out: Path, stage: str, base: Path | None, overrides: tuple[str, ...]) -> list[str]:
    sets = [word for override in (*ranks.SMALL, *overrides) for word in ("--set", override)]
    return [stage, str(table), str(out), *(["--base", str(base)] if base else []), *sets]


@pytest.mark.parametrize(
    ("overrides", "stages"),
    [((), ["align"]), (ranks.BRANCHES, ["align", "instruct", "specialize"])],
    ids=["plain", "branches"],
)
def test_killed_anywhere_twice_a_stage_ends_with_the_same_bytes(
    table: Path, tmp_path: Path, overrides: tuple[str, ...], stages: list[str]
):
    draw = random.Random(str(overrides))
    base, kills = None, 0
    for name in stages:
        quiet, disturbed = tmp_path / f"{name}-quiet", tmp_path / f"{name}-disturbed"
        process = ranks.torchrun(arguments(table, quiet, name, base, overrides))
        process.join(120)
        assert process.exitcode == 0
        work = disturbed.with_name(f"{disturbed.name}.work")
        for most in (0, 2):
            (work / ".model.0.partial").mkdir(parents=True, exist_ok=True)  # what a kill during saving leaves
            process = ranks.torchrun(arguments(table, disturbed, name, base, overrides))
            kills += ranks.kill_somewhere(process.pid, work, draw, most, process.is_alive)
            process.join(120)
        if not disturbed.exists():
            process = ranks.torchrun(arguments(table, disturbed, name, base, overrides))
            process.join(120)
        assert digests.of_tree(quiet) == digests.of_tree(disturbed), name
        if process.exitcode == 0:  # one that was killed when its model was in place had no time to tidy up
            assert [path.name for path in work.glob("*/")] in ([], ["cache"])
        base = quiet
    assert kills >= len(stages)


def test_a_killed_torchrun_goes_on_and_ends_as_any_two_ranks_do(table: Path, tmp_path: Path):
    given = ranks.prepare(table, tmp_path, *ranks.BRANCHES)
    ranks.train(given, 2)
    out = tmp_path / "by-torchrun"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    command += ["--master-port", str(free_port()), "-m", "facemllm.train.torchrun"]
    command += arguments(table, out, "align", None, ranks.BRANCHES)
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    running = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    work = out.with_name("by-torchrun.work")
    try:
        ranks.kill_somewhere(running.pid, work, random.Random(5), 2, lambda: running.poll() is None)
    finally:
        running.kill()
        running.wait(60)
    assert not out.exists()
    end = time.monotonic() + 20
    while [p for p in psutil.process_iter(["cmdline"]) if str(out) in (p.info["cmdline"] or [])]:
        assert time.monotonic() < end, "the ranks outlive torchrun"
        time.sleep(0.1)
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert said.returncode == 0, said.stderr
    assert digests.of_file(out / "model.safetensors") == digests.of_file(given.out / "model.safetensors")


def test_a_sharded_model_learns_what_copies_and_one_process_learn(table: Path, tmp_path: Path, alone):
    models = {"one": load_file(alone[0].out / "model.safetensors")}
    for name, overrides in {"copies": (), "sharded": ("train.sharding=full",)}.items():
        given = ranks.prepare(table, tmp_path / name, *ANSWERS, *overrides)
        assert ranks.train(given, 2).final_loss == pytest.approx(alone[1].final_loss, abs=1e-5)
        models[name] = load_file(given.out / "model.safetensors")
    assert models["sharded"].keys() == models["one"].keys()
    for name, tensor in models["sharded"].items():
        torch.testing.assert_close(tensor, models["copies"][name], atol=3e-5, rtol=1e-4, msg=name)


PLAN = stage(
    trains=trains(projector="full", segmentation="full", knowledge="full", embeddings="full", language="full"), steps=2
)


def one_of_two(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    toy = Toy(folder / f"rank{rank}", *BRANCHES)
    logs: list[dict[str, float]] = []
    facts: dict[str, Any] = {"rank": rank, "world_size": 2, "row_tokens": 200, "micro_images": 2}
    outcome = toy.run(PLAN, log=lambda _, metrics: logs.append(metrics), **facts)
    torch.save((outcome.model.state_dict(), outcome.tokens, logs), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_learn_what_one_does_with_packed_rows_and_micro_batches(tmp_path: Path, full_toy: Toy) -> None:
    both = [ranks.FORKS.Process(target=one_of_two, args=(rank, tmp_path)) for rank in (0, 1)]
    for process in both:
        process.start()
    logs: list[dict[str, float]] = []
    single = full_toy.run(PLAN, log=lambda _, metrics: logs.append(metrics))
    for process in both:
        process.join(timeout=120)
    assert [process.exitcode for process in both] == [0, 0]
    (first, tokens, reports), (second, again, silent) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    assert tokens == again == single.tokens
    assert silent == []
    for one, two in zip(logs, reports, strict=True):
        for term in ("loss", "loss/answers", "loss/characteristics", "loss/logic"):
            assert two[term] == pytest.approx(one[term], rel=2e-4, abs=1e-6), term
    start = full_toy.fresh()[0].state_dict()
    moved = 0.0
    for name, tensor in single.model.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        if tensor.is_floating_point():
            torch.testing.assert_close(first[name], tensor, atol=4e-4, rtol=1e-3, msg=name)
            moved = max(moved, float((tensor - start[name]).abs().max()))
    assert moved > 1e-3  # the tolerance is far below what was learnt


@pytest.mark.parametrize(("worlds", "sharding"), [((2, 1), "full"), ((2, 1), "replicate"), ((1, 2), "full")])
def test_another_number_of_workers_goes_on_from_the_checkpoint(
    table: Path, tmp_path: Path, alone, worlds: tuple[int, int], sharding: str
):
    expected = alone[1]
    given = ranks.prepare(table, tmp_path, *ANSWERS, f"train.sharding={sharding}")
    ranks.train(given, worlds[0])
    [name] = given.store().names()  # the run is over, its checkpoint of step 3 still there
    written = {path.name for path in (given.work / given.run_name / name).iterdir()}
    assert len(written) == 1 + (worlds[0] if sharding == "full" else 1)
    resumed = ranks.train(replace(given, out=tmp_path / "resumed"), worlds[1])
    assert resumed.resumed_from == 3
    assert resumed.final_loss == pytest.approx(expected.final_loss, abs=1e-5)
    assert resumed.cost["tokens"] == expected.cost["tokens"]


def test_what_an_interrupted_run_left_of_a_finished_stage_does_not_train_nothing(tmp_path: Path, alone):
    given, first = alone
    again = replace(given, out=tmp_path / "again")
    second = ranks.train(again)
    assert (second.resumed_from, second.steps) == (3, 6)
    assert second.final_loss == first.final_loss
    assert digests.of_tree(again.out) == digests.of_tree(given.out)


def test_checkpoints_on_s3(table: Path, tmp_path: Path, bucket):
    overrides = (*ANSWERS, "train.checkpoint_every=2", "train.storage=s3://faces/runs")
    given = ranks.prepare(table, tmp_path, *overrides)
    first = ranks.train(given)
    names = given.store().names()
    assert [name[:19] for name in names] == ["checkpoint-00000004", "checkpoint-00000002"]
    assert not list(given.work.glob("*/checkpoint-*"))
    key = f"runs/{given.run_name}/{names[0]}/rank-0-of-1.safetensors"
    body = bucket.get_object(Bucket="faces", Key=key)["Body"].read()
    bucket.put_object(Bucket="faces", Key=key, Body=body[: len(body) // 2])
    second = ranks.train(replace(given, out=tmp_path / "again"))
    assert second.resumed_from == 2, "the newest is cut short: the one before it is taken"
    assert digests.of_tree(tmp_path / "again") == digests.of_tree(given.out)
    assert second.final_loss == first.final_loss
    given.store().clear()
    assert not given.store().names()
    left = bucket.list_objects_v2(Bucket="faces").get("Contents", [])
    assert not [entry["Key"] for entry in left if not entry["Key"].endswith("/")]
