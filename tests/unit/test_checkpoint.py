"""Checkpoints: what they hold, when one is whole, and how they are stored."""

import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from facemllm.errors import UserError
from facemllm.train import checkpoint, checkpoint_store
from facemllm.train.checkpoint import Checkpoint, differences
from facemllm.train.checkpoint_store import CheckpointStore, location, saving


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.sometimes, self.frozen = nn.Linear(3, 4), nn.Linear(3, 1), nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(4)
        self.frozen.requires_grad_(False)


def trained(steps: int) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 0.1, fused=True)
    resume(net, optimizer, 0, steps)
    return net, optimizer


def resume(net: Net, optimizer: torch.optim.Optimizer, first: int, steps: int) -> None:
    for step in range(first, steps):
        x = torch.full((2, 3), 0.5 + step) + torch.arange(2.0)[:, None]
        loss = net.norm(net.used(x)).square().sum() + (net.sometimes(x).sum() if step % 2 else 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def state(step: int, **more: object) -> dict[str, object]:
    return {"step": step, "key": "k", **more}


def written(folder: Path, step: int = 3, attempt: int = 1) -> Path:
    """A store's folder with a checkpoint in it."""
    CheckpointStore(str(folder), folder).put(step, attempt, Checkpoint.of(*trained(step), state(step)).write)
    return folder / f"checkpoint-{step:08d}-{attempt:04d}"


def newest(folder: Path) -> tuple[Path | None, int]:
    with CheckpointStore(str(folder), folder).newest() as found:
        return found


def test_what_is_restored_goes_on_to_the_same_bits(tmp_path: Path):
    folder = written(tmp_path, 3)
    net, optimizer = trained(0)
    assert checkpoint.load(folder, net, optimizer, "k", {})["step"] == 3
    resume(net, optimizer, 3, 6)
    expected, _ = trained(6)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, net.state_dict()[name]), name
    assert optimizer.state[net.sometimes.weight]["step"] == 3  # had a gradient in every other step
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}


def test_a_copy_does_not_follow_what_training_changes(tmp_path: Path):
    net, optimizer = trained(2)
    live = Checkpoint.of(net, optimizer, state(2))
    copy = live.clone()
    before = net.used.weight.detach().clone()
    with torch.no_grad():
        net.used.weight += 1
    assert torch.equal(copy.tensors["model.used.weight"], before)
    assert torch.equal(live.tensors["model.used.weight"], net.used.weight)
    assert not any("frozen" in name for name in copy.tensors)


@pytest.mark.parametrize("harm", ["no state", "no tensors", "half a file", "half a state"])
def test_one_that_was_cut_short_is_passed_over(tmp_path: Path, harm: str):
    older, newer = written(tmp_path, 2), written(tmp_path, 4)
    tensors, said = newer / "rank-0-of-1.safetensors", newer / checkpoint.STATE
    if harm == "no state":
        said.unlink()
    elif harm == "no tensors":
        tensors.unlink()
    else:
        broken = tensors if harm == "half a file" else said
        broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    assert newest(tmp_path) == (older, 2)


def test_half_a_checkpoint_of_many_ranks_is_not_whole(tmp_path: Path):
    store = CheckpointStore(str(tmp_path), tmp_path)
    for rank in (0, 1):
        store.put(2, 1, Checkpoint.of(*trained(2), state(2), rank=rank, world_size=2).write)
        assert (newest(tmp_path)[0] is None) == (rank == 0)


def test_what_a_kill_in_the_middle_of_writing_leaves_is_removed(tmp_path: Path):
    whole = written(tmp_path, 2)

    class Killed(BaseException):
        pass

    def half(folder: Path) -> list[Path]:
        (folder / "rank-0-of-1.safetensors").write_bytes(b"half")
        (tmp_path / ".writing-left").mkdir()  # a process that is killed does not clean up
        raise Killed

    with pytest.raises(Killed):
        CheckpointStore(str(tmp_path), tmp_path).put(4, 1, half)
    assert newest(tmp_path)[0] == whole
    assert [path.name for path in tmp_path.iterdir()] == [whole.name]


def test_the_two_newest_are_kept_and_no_attempt_overwrites_another(tmp_path: Path):
    store = CheckpointStore(str(tmp_path), tmp_path)
    for step in (2, 4, 6):
        written(tmp_path, step)
    (written(tmp_path, 8) / checkpoint.STATE).unlink()  # not whole: counts as none
    written(tmp_path, 6, attempt=2)
    store.prune(2)
    assert [name[11:] for name in store.names()] == ["00000008-0001", "00000006-0002", "00000006-0001"]
    store.clear()
    assert store.names() == []


def test_writing_goes_on_beside_training_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    free, put, begun = threading.Event(), [], threading.Event()

    def slow(self: CheckpointStore, step: int, attempt: int, write: object) -> None:
        begun.set()
        assert free.wait(10)
        put.append(step)

    monkeypatch.setattr(CheckpointStore, "put", slow)
    with saving(CheckpointStore(str(tmp_path), tmp_path), 1) as save:
        save(2, Checkpoint.of(*trained(2), state(2)))
        assert begun.wait(10)
        assert put == []  # training went on before it was written
        threading.Timer(0.1, free.set).start()
        save(4, Checkpoint.of(*trained(4), state(4)))
        assert put[0] == 2
    assert put == [2, 4]


def test_a_checkpoint_that_finds_no_room_stops_the_run_with_the_reason(tmp_path: Path):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    class Full(CheckpointStore):
        def put(self, step: int, attempt: int, write: object) -> None:
            super().put(step, attempt, full)  # type: ignore[arg-type]

    no_room = pytest.raises(UserError, match="No space left on device; is there room")
    with no_room, saving(Full(str(tmp_path), tmp_path), 1) as save:
        save(2, Checkpoint.of(*trained(2), state(2)))


def test_a_checkpoint_of_other_settings_is_refused_with_what_differs(tmp_path: Path):
    old, new = {"plan": {"steps": 60, "clip": 1.0}, "seed": 0}, {"plan": {"steps": 80, "clip": 1.0}, "seed": 0}
    store = CheckpointStore(str(tmp_path), tmp_path)
    store.put(2, 1, Checkpoint.of(*trained(2), state(2, made_from=old)).write)
    with store.newest() as (folder, _), pytest.raises(UserError, match=r"plan\.steps: 60 -> 80"):
        checkpoint.load(folder, *trained(0), "other", new)
    assert differences(old, {"plan": old["plan"]}) == "seed: 0 -> nothing"
    assert differences({}, {f"k{n}": n for n in range(9)}).endswith("and 4 more")


def test_places(tmp_path: Path):
    assert location(None, tmp_path, "align-1") == str(tmp_path / "align-1")
    assert location(str(tmp_path / "kept"), tmp_path, "r") == str(tmp_path / "kept" / "r")
    assert location("s3://bucket/prefix/", tmp_path, "r") == "s3://bucket/prefix/r"
    with pytest.raises(UserError, match="neither a folder nor s3"):
        checkpoint_store.filesystem("gs://bucket/x")
