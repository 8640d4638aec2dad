"""Checkpoints: what they hold, when one is whole, how they are kept, and what is refused before a stage starts."""

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from facemllm import settings
from facemllm.errors import UserError
from facemllm.train import checkpoint, keeping, order
from facemllm.train.differences import differences
from facemllm.train.keeping import Keeper, Shelf, place_of
from facemllm.train.launch import _in_words
from facemllm.train.loop import Job, _spare_unreached


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
    """A shelf's folder with a checkpoint in it."""
    Shelf(str(folder), folder).put(step, attempt, checkpoint.draft(*trained(step), state(step)))
    return folder / f"checkpoint-{step:08d}-{attempt:04d}"


def test_what_is_restored_goes_on_to_the_same_bits(tmp_path: Path):
    folder = written(tmp_path, 3)
    net, optimizer = trained(0)
    assert checkpoint.read(folder, net, optimizer, "k")["step"] == 3
    resume(net, optimizer, 3, 6)
    expected, _ = trained(6)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, net.state_dict()[name]), name
    assert optimizer.state[net.sometimes.weight]["step"] == 3  # had a gradient in every other step
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}


def test_a_copy_does_not_follow_what_training_changes(tmp_path: Path):
    net, optimizer = trained(2)
    live = checkpoint.draft(net, optimizer, state(2))
    copy = live.copied()
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
    with Shelf(str(tmp_path), tmp_path).newest() as (folder, attempt):
        assert (folder, attempt) == (older, 2)


def test_half_a_checkpoint_of_many_ranks_is_not_whole(tmp_path: Path):
    shelf = Shelf(str(tmp_path), tmp_path)
    shelf.put(2, 1, checkpoint.draft(*trained(2), state(2), rank=0, world=2))
    with shelf.newest() as (folder, _):
        assert folder is None
    shelf.put(2, 1, checkpoint.draft(*trained(2), state(2), rank=1, world=2))
    with shelf.newest() as (folder, _):
        assert folder is not None


def test_what_a_kill_in_the_middle_of_writing_leaves_is_removed(tmp_path: Path):
    whole = written(tmp_path, 2)

    class Killed(BaseException):
        pass

    def half(folder: Path) -> list[Path]:
        (folder / "rank-0-of-1.safetensors").write_bytes(b"half")
        (tmp_path / ".writing-left").mkdir()  # a process that is killed does not clean up
        raise Killed

    with pytest.raises(Killed):
        Shelf(str(tmp_path), tmp_path).put(4, 1, half)
    with Shelf(str(tmp_path), tmp_path).newest() as (folder, _):
        assert folder == whole
    assert [path.name for path in tmp_path.iterdir()] == [whole.name]


def test_the_two_newest_are_kept_and_no_attempt_overwrites_another(tmp_path: Path):
    shelf = Shelf(str(tmp_path), tmp_path)
    for step in (2, 4, 6):
        written(tmp_path, step)
    (written(tmp_path, 8) / checkpoint.STATE).unlink()  # not whole: counts as none
    written(tmp_path, 6, attempt=2)
    shelf.prune(2)
    assert [name[11:] for name in shelf.names()] == ["00000008-0001", "00000006-0002", "00000006-0001"]
    shelf.clear()
    assert shelf.names() == []


def test_writing_goes_on_beside_training_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    free, put, begun = threading.Event(), [], threading.Event()

    def slow(self: Shelf, step: int, attempt: int, write: object) -> None:
        begun.set()
        assert free.wait(10)
        put.append(step)

    monkeypatch.setattr(Shelf, "put", slow)
    with Keeper(Shelf(str(tmp_path), tmp_path), 1) as keep:
        keep(2, checkpoint.draft(*trained(2), state(2)))
        assert begun.wait(10)
        assert put == []  # training went on before it was written
        threading.Timer(0.1, free.set).start()
        keep(4, checkpoint.draft(*trained(4), state(4)))
        assert put[0] == 2
    assert put == [2, 4]


def test_a_checkpoint_that_finds_no_room_stops_the_run_with_the_reason(tmp_path: Path):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    class Full(Shelf):
        def put(self, step: int, attempt: int, write: object) -> None:
            super().put(step, attempt, full)  # type: ignore[arg-type]

    with (
        pytest.raises(UserError, match="No space left on device; is there room"),
        Keeper(Full(str(tmp_path), tmp_path), 1) as keep,
    ):
        keep(2, checkpoint.draft(*trained(2), state(2)))


def test_a_checkpoint_of_other_settings_is_refused_with_what_differs(tmp_path: Path):
    old, new = {"plan": {"steps": 60, "clip": 1.0}, "seed": 0}, {"plan": {"steps": 80, "clip": 1.0}, "seed": 0}
    shelf = Shelf(str(tmp_path), tmp_path)
    shelf.put(2, 1, checkpoint.draft(*trained(2), state(2, made_from=old)))
    with shelf.newest() as (folder, _), pytest.raises(UserError, match=r"plan\.steps: 60 -> 80"):
        checkpoint.read(folder, *trained(0), "other", new)
    assert differences(old, {"plan": old["plan"]}) == "seed: 0 -> nothing"
    many = differences({}, {f"k{n}": n for n in range(9)})
    assert many.endswith("and 4 more")


def test_places(tmp_path: Path):
    assert place_of(None, tmp_path, "align-1") == str(tmp_path / "align-1")
    assert place_of(str(tmp_path / "kept"), tmp_path, "r") == str(tmp_path / "kept" / "r")
    assert place_of("s3://bucket/prefix/", tmp_path, "r") == "s3://bucket/prefix/r"
    with pytest.raises(UserError, match="neither a folder nor s3"):
        keeping.filesystem("gs://bucket/x")


@pytest.mark.parametrize(("batch", "world"), [(12, 1), (12, 2), (7, 3), (64, 5), (3, 3)])
def test_slices_of_a_batch_are_disjoint_and_cover_it(batch: int, world: int):
    loaded = settings.load("laptop", [f"train.stages.align.batch_images={batch}"])
    plan, lora = loaded.train.stages.align, loaded.train.lora
    parts = [
        Job("align", plan, lora, seed=0, key="k", model=loaded.model, rank=rank, world=world).part
        for rank in range(world)
    ]
    faces = list(range(batch))
    assert [face for part in parts for face in faces[part]] == faces
    assert all(faces[part] for part in parts)


def test_what_the_loss_has_never_reached_stays_as_it_is():
    net, optimizer = trained(0)
    net.used(torch.ones(1, 3)).sum().backward()
    net.sometimes.weight.grad = torch.zeros_like(net.sometimes.weight)  # as another rank's share makes it
    parameters = [p for p in net.parameters() if p.requires_grad]
    before = net.sometimes.weight.detach().clone()
    _spare_unreached(optimizer, parameters, 1)
    optimizer.step()
    assert torch.equal(net.sometimes.weight, before)
    assert set(optimizer.state) == {net.used.weight, net.used.bias}
    net.used.weight.grad.zero_()
    _spare_unreached(optimizer, parameters, 1)
    assert net.used.weight.grad is not None, "once reached, it decays as ever"


def ask(folder: Path, table: Path, *overrides: str, stage: str = "align", base: Path | None = None) -> order.Order:
    loaded = settings.load("laptop", list(overrides))
    return order.place_order(stage, loaded, table, base, folder / "out", folder / "work", folder / "cache")


def model_of(folder: Path, stage: str | None) -> Path:
    folder.mkdir()
    if stage is not None:
        (folder / "lineage.json").write_text(json.dumps({"stage": stage}))
    return folder


def test_stages_out_of_order_are_refused(conversations_table, tmp_path: Path):
    table = conversations_table()
    with pytest.raises(UserError, match="stage instruct goes on from the model of stage align; train that first"):
        ask(tmp_path, table, stage="instruct")
    aligned = model_of(tmp_path / "aligned", "align")
    assert ask(tmp_path, table, stage="instruct", base=aligned).base == aligned
    with pytest.raises(UserError, match=r"specialize goes on from the model of stage instruct, but .* of stage align"):
        ask(tmp_path, table, stage="specialize", base=aligned)
    with pytest.raises(UserError, match="stage align comes first"):
        ask(tmp_path, table, stage="align", base=aligned)
    assert ask(tmp_path, table, stage="specialize", base=model_of(tmp_path / "foreign", None)).stage == "specialize"
    published = ("model.preset=hub", f"model.base={model_of(tmp_path / 'published', None)}")
    assert ask(tmp_path, table, *published, stage="instruct").base is None
    with pytest.raises(UserError, match="no training stage 'polish'"):
        ask(tmp_path, table, stage="polish")


def test_a_worker_without_a_face_is_refused(conversations_table, tmp_path: Path):
    with pytest.raises(UserError, match="4 workers share a batch of 3 faces: some would train on nothing"):
        ask(tmp_path, conversations_table(), "train.workers=4", "train.stages.align.batch_images=3")


def test_work_with_checkpoints_of_other_settings_is_refused(conversations_table, tmp_path: Path):
    table = conversations_table()
    first = ask(tmp_path, table)
    assert ask(tmp_path, table, "train.stages.align.steps=9").run != first.run  # nothing was kept so far
    again = ask(tmp_path, table)
    written(Path(again.shelf().place), 2)
    free = ("train.workers=2", "train.threads=3", "train.checkpoint_every=7", "train.max_failures=0")
    assert ask(tmp_path, table, *free).key == first.key
    with pytest.raises(UserError) as refused:
        ask(tmp_path, table, "train.stages.align.steps=9", "seed=4")
    assert "plan.steps: 1300 -> 9, seed: 0 -> 4" in str(refused.value)
    assert str(again.note) in str(refused.value)
    again.note.unlink()
    assert ask(tmp_path, table, "seed=4").run != first.run


def test_checkpoints_left_at_another_place_are_told(conversations_table, tmp_path: Path):
    table = conversations_table()
    first = ask(tmp_path, table)
    there = f"train.storage={tmp_path / 'there'}"
    assert ask(tmp_path, table, there).shelf().place != first.shelf().place  # nothing was kept so far
    first = ask(tmp_path, table)
    written(Path(first.shelf().place), 2)
    with pytest.raises(UserError) as refused:
        ask(tmp_path, table, there)
    for words in (f"are at {first.shelf().place}", str(tmp_path / "there" / first.run), f"remove {first.note}"):
        assert words in str(refused.value)
    shutil.copytree(first.shelf().place, tmp_path / "there" / first.run)
    assert ask(tmp_path, table, there).key == first.key


def test_a_place_that_cannot_be_read_is_forgotten_by_hand(conversations_table, tmp_path: Path):
    table = conversations_table()
    first = ask(tmp_path, table)
    first.note.write_text(first.note.read_text().replace(first.shelf().place, "gs://gone/runs"))
    for overrides in ((), ("seed=4",)):
        with pytest.raises(UserError, match=rf"gs://gone/runs .* remove {first.note} to forget it"):
            ask(tmp_path, table, *overrides)
    first.note.unlink()
    assert ask(tmp_path, table).key == first.key


def test_how_workers_end_is_said_in_one_line():
    from ray.exceptions import ActorDiedError, OutOfMemoryError

    assert "memory was full; lower train.workers" in _in_words(OutOfMemoryError("Task was killed"))
    assert "more often than train.max_failures allows" in _in_words(ActorDiedError())
    assert _in_words(ValueError("first\nthe last line")) == "the last line"
