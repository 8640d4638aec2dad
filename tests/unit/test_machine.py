"""What people's machines are like: paths with signs, CPU quotas, folders that are not there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from facemllm.core import machine
from facemllm.errors import UserError
from facemllm.ingest.importing import require
from facemllm.settings.data import Source

ROOT = Path(__file__).resolve().parents[2]
ODD = (
    "with a blank",
    "Ada's",
    'say "cheese"',
    "100%2F",
    "what?",
    "#1",
    "a; b & c",
    "$HOME",
    "ünïcode ö",
    "back\\slash",
)


@pytest.mark.parametrize("name", ODD)
def test_a_command_starts_anew_by_a_plain_path(name: str, tmp_path: Path) -> None:
    environment = tmp_path / name
    environment.symlink_to(sys.prefix)
    code = "import sys; from facemllm.core.machine import on_plain_path; on_plain_path(); import mlflow.version as m"
    code += "; import json; print(json.dumps([sys.executable, sys.prefix, m.__file__, sys.argv]))"
    python = environment / Path(sys.executable).relative_to(sys.prefix)
    done = subprocess.run([python, "-c", code, name], capture_output=True, text=True, check=True, cwd=ROOT)
    executable, prefix, library, argv = json.loads(done.stdout)
    assert argv == ["-c", name]
    assert all(Path(part).is_relative_to(machine.own_folder()) for part in (executable, prefix, library))
    assert Path(prefix).resolve() == Path(sys.prefix).resolve()
    (machine.own_folder() / machine.short_name(environment)).unlink()


def test_a_plain_path_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", "/home/ada/face-mllm_1.2/.venv")
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("started anew"))
    machine.on_plain_path()


@pytest.mark.parametrize(
    ("own", "files", "quotas"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, [1.5]),
        ("0::/", {"cpu.max": "max 100000"}, []),
        ("0::/kubepods/pod1/c", {"kubepods/cpu.max": "800000 100000", "kubepods/pod1/c/cpu.max": "max 1"}, [8.0]),
        ("0::/a/b", {"a/b/cpu.max": "300000 100000", "a/cpu.max": "50000 100000"}, [3.0, 0.5]),
        ("4:cpu,cpuacct:/x\n3:memory:/y", {"cpu,cpuacct/cpu.cfs_quota_us": "250000"}, [2.5]),
        ("1:cpu:/x", {"cpu/x/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_quota_us": "100000"}, [1.0]),
        ("0::/gone", {}, []),
    ],
)
def test_quotas_of_containers_are_read(own: str, files: dict[str, str], quotas: list[float], tmp_path: Path) -> None:
    for name, text in files.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
        if name.endswith("quota_us"):
            file.with_name("cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / "own").write_text(f"{own}\n")
    assert list(machine._quotas(tmp_path / "cgroup", tmp_path / "own")) == quotas
    assert list(machine._quotas(tmp_path / "cgroup", tmp_path / "absent")) == []


def test_cores_are_the_least_of_affinity_and_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    for affinity, quotas, cores in ((8, [], 8), (8, [3.2], 4), (8, [6.0, 1.5], 2), (2, [16.0], 2), (4, [0.1], 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=affinity: set(range(n)), raising=False)
        monkeypatch.setattr(machine, "_quotas", lambda q=quotas: iter(q))
        assert machine.cores() == cores


def test_taskset_is_heeded() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from facemllm.core.machine import cores"
    code += "; from facemllm.core.servers import ray; from facemllm.settings import load"
    code += "; print(cores(), [flag for flag in ray(load('ci')).command if 'cpus' in flag])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "1 ['--num-cpus=1']\n"


@pytest.mark.parametrize("name", [*ODD, "a: b {c}", "Faces, 2024 #1", "$(touch pwned)", "`id`"])
def test_make_hands_on_a_folder_as_it_was_given(name: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nfor word; do printf "%s\\n" "$word"; done\n')
    python.chmod(0o755)
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "-s", "-o", ".venv/.ready", "run", f"FACES={name}"]
    done = subprocess.run(command, cwd=tmp_path, env=outside, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["pipeline.py", "run", "--profile", "own", "--faces", name]
    assert sorted(os.listdir(tmp_path)) == [".venv", "Makefile"]


@pytest.mark.parametrize(("name", "says"), [("nope", "no such folder"), ("~/nope", "no such folder"), ("", "is empty")])
def test_a_folder_that_is_not_there_is_said_before_anything_starts(name: str, says: str, tmp_path: Path) -> None:
    folder = name if name.startswith("~") else str(tmp_path / "faces" / name)
    (tmp_path / "faces").mkdir()
    command = [sys.executable, "pipeline.py", "run", "--faces", folder]
    command += ["--set", f"storage.home={tmp_path}/home", "--set", f"storage.runs={tmp_path}/runs"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr[:7], done.stderr.count("\n")) == (1, "error: ", 1)
    assert says in done.stderr
    assert os.listdir(tmp_path) == ["faces"]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (Source(name="imagefolder"), "needs root"),
        (Source(name="imagefolder", root="/", options={"colour": "red"}), "has no option 'colour'"),
        (Source(name="imagfolder", root="/"), "imagfolder"),
    ],
)
def test_a_source_that_cannot_be_read_is_said_before_anything_starts(source: Source, says: str) -> None:
    require(Source(name="render"))
    with pytest.raises(UserError, match=says):
        require(source)
