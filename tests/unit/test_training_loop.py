"""The training loop: what a stage changes, how it resumes, when it stops, what it tells."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlavaConfig

from facemllm import settings
from facemllm.core import cost
from facemllm.errors import UserError
from facemllm.model.inference import Predictor, Query
from facemllm.train import distributed, monitor, optimizer
from facemllm.train.dataloader import prefetch
from facemllm.train.monitor import LossMonitor, ParameterMonitor, Throughput, out_of_memory_explained
from tests.refusing import refuses
from tests.training_example import COLORS, MODES, SIDES, assert_same_gradients, face, stage, stage_run, trains


@pytest.mark.parametrize("name", MODES)
def test_a_stage_changes_what_it_declares_and_nothing_else(toy, name):
    trains, objective = MODES[name]
    before = {n: t.clone() for n, t in toy.fresh()[0].state_dict().items()}
    plan = stage(trains=trains, objective=objective, steps=2, tasks={"caption": 1.0, "attributes": 1.0})
    model = toy.run(plan, name).model
    after = model.state_dict()
    assert set(after) == set(before)
    untouched = {n for n in before if "num_batches" not in n and torch.equal(before[n], after[n])}
    for tensor in before:
        if "num_batches" in tensor:
            assert (after[tensor] > 0) == (trains["tower"] != "frozen")
            continue
        mode = trains[toy.family.module_of(model)(tensor)]
        adapted = mode == "lora" and "_proj.weight" in tensor
        assert (tensor not in untouched) == (mode == "full" or adapted), tensor


@pytest.mark.parametrize("objective", ["caption_words", "answers"])
def test_a_resumed_run_ends_with_the_same_bytes(toy, tmp_path, objective):
    mode = {"caption_words": "align", "answers": "specialize"}[objective]
    plan = stage(objective=objective, trains=MODES[mode][0], steps=5, batch_images=4)
    saved, logged, again = [], {}, {}

    def save(step, checkpoint):
        saved.append(step)
        if step == 2:
            checkpoint.write(tmp_path)

    whole = toy.run(plan, save=save, checkpoint_every=2, log=logged.__setitem__)
    assert saved == [2, 4]
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}
    resumed = toy.run(plan, resume=tmp_path, log=again.__setitem__)
    assert (whole.resumed_from, resumed.resumed_from) == (0, 2)
    assert (resumed.tokens, resumed.final_loss) == (whole.tokens, whole.final_loss)
    assert list(again) == [3, 4, 5]
    assert all(again[step]["grad_norm"] == logged[step]["grad_norm"] for step in again)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_a_resumed_run_logs_and_stops_as_the_undisturbed_one(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(monitor, "_WINDOW", 5)
    plan, logs, states = stage(steps=8, batch_images=3), [{}, {}], []
    kept = {"save": lambda step, checkpoint: step == 3 and checkpoint.write(tmp_path)}
    toy.run(plan, log=logs[0].__setitem__, log_every=4, **kept)
    kept = {"resume": tmp_path, "save": lambda _, checkpoint: states.append(checkpoint.state)}
    toy.run(plan, log=logs[1].__setitem__, log_every=4, **kept)
    assert list(logs[0]) == list(logs[1]) == [4, 8]
    for step, metrics in logs[0].items():
        timed = {n for n in metrics if n.endswith("_per_second")} | {"seconds_left", "memory_bytes"}
        again = logs[1][step]
        assert {n: v for n, v in metrics.items() if n not in timed} == {n: again[n] for n in again.keys() - timed}
    ratio = logs[1][4]["images_per_second"] / logs[1][4]["steps_per_second"]
    assert ratio == pytest.approx(plan.batch_images)  # speed is of this attempt's steps alone
    [undisturbed] = [state for state in states if state["step"] == 6]
    assert len(undisturbed["watch"]["recent"]) == 5


def test_a_resumed_watch_stops_where_the_first_would():
    first, resumed = (LossMonitor("toy", 20.0) for _ in range(2))
    for step in range(60):
        first.check(step, 1.0, 1.0, list)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    stops = []
    for one in (first, resumed):
        with pytest.raises(FloatingPointError) as error:
            [one.check(step, 30.0, 1.0, list) for step in range(60, 120)]
        stops.append(str(error.value))
    assert stops[0] == stops[1]
    first = LossMonitor("toy", 20.0)
    first.load_state_dict(json.loads(json.dumps(LossMonitor("toy", 20.0).state_dict())))
    first.check(1, 5.0, 1.0, list)


def test_ranks_of_a_sharded_model_make_the_same_number_of_batches(toy):
    def counts(batch, world, micro, sharded=True):
        facts = {"sharding": "full" if sharded else "replicate", "world_size": world, "micro_images": micro}
        made = [toy.batches(stage(batch_images=batch), rank=rank, **facts) for rank in range(world)]
        assert sum(b.faces for batches in made for b in batches) == batch
        return [len(batches) for batches in made]

    assert counts(5, 2, 2, sharded=False) == [1, 2]
    assert counts(5, 2, 2) == [2, 2]
    assert counts(5, 3, 1) == [1, 1, 1]  # one rank has a single face
    assert counts(6, 2, 2) == [2, 2]
    assert counts(6, 2, 0) == [1, 1]


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_gathers_a_tied_weight_once(monkeypatch, rank):
    net = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    net["head"].weight = net["embed"].weight
    wanted, gathered = net["head"].weight.detach().clone(), []
    net["head"].weight.full_tensor = lambda: gathered.append(rank) or wanted
    sharded = object.__new__(distributed.ShardedModel)
    empty = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, False)})
    sharded._model, sharded._empty = net, (empty, 0)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    whole, _ = sharded.gather()
    assert gathered == [rank]
    if rank == 0:
        assert whole["embed"].weight is whole["head"].weight
        assert torch.equal(whole["head"].weight, wanted)


def test_only_statistics_that_training_moves_are_shared(monkeypatch):
    """Of a third rank of three, whose sum is thrice what it has, in floats not quite: 0.1 / 3 * 3 != 0.1."""
    net = nn.ModuleDict({"moved": nn.BatchNorm2d(2), "frozen": nn.BatchNorm2d(2), "other": nn.LayerNorm(2)})
    net["frozen"].eval()
    net["other"].register_buffer("rotary", torch.rand(7))
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(3).add_(0.3))
    distributed.average_buffers(net, 3)
    changed = {name for name, buffer in net.named_buffers() if not torch.equal(buffer, before[name])}
    assert changed == {"moved.running_mean", "moved.running_var"}
    torch.testing.assert_close(net["moved"].running_mean, before["moved.running_mean"] + 0.1)


def test_what_one_rank_sees_change_has_changed_for_all(monkeypatch):
    """Of a rank that holds no row of the only parameter."""
    net = nn.Module()
    net.config, net.model = LlavaConfig(), nn.Module()
    net.model.language_model = nn.Linear(4, 0, bias=False)
    changed = ParameterMonitor(stage_run(stage(), settings.load(), world_size=2), net)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.add_(1))
    changed.check_gradients()
    changed.check_changed()
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    refuses("does not reach the language", changed.check_gradients)
    refuses("changed no parameter", changed.check_changed)


def test_a_checkpoint_of_another_run_is_refused(toy, tmp_path):
    plan = stage(steps=2)
    toy.run(plan, save=lambda step, checkpoint: checkpoint.write(tmp_path), checkpoint_every=1)
    state = json.loads((tmp_path / "training.json").read_text())
    (tmp_path / "training.json").write_text(json.dumps(state | {"key": "other"}))
    refuses("other settings or data", toy.run, plan, resume=tmp_path, error=Exception)


def test_it_learns_and_answers_new_faces(toy):
    questions = [Query("Which hair?", tuple(COLORS)), Query("How is the head turned?", SIDES)]
    rows = [n for n in range(40) if n % 5 == 4]
    words = {"objective": "caption_words", "trains": MODES["align"][0], "tasks": {"caption": 1.0}}
    words = stage(**words, steps=30, batch_images=12, learning_rate=4e-3)
    aligned = toy.run(words, "align", precision="bf16").model
    plan = stage(steps=30, batch_images=8, learning_rate=3e-3)
    losses = []
    model = toy.run(plan, model=aligned, precision="bf16", log=lambda _, m: losses.append(m["loss"])).model
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    answers = Predictor(model, toy.processor).score([face(n)[0] for n in rows], [questions] * len(rows))
    right = [answer[0].best == n % 3 for answer, n in zip(answers, rows, strict=True)]
    assert np.mean(right) > 0.8


def test_the_branches_learn_and_tell_every_term(full_toy):
    logs = []
    plan = stage(steps=14, batch_images=8, rates={}, learning_rate=2e-3)
    model = full_toy.run(plan, log=lambda _, metrics: logs.append(metrics), row_tokens=200).model
    for name in ("loss", "loss/answers", "loss/characteristics"):
        assert np.mean([log[name] for log in logs[-4:]]) < 0.98 * np.mean([log[name] for log in logs[:4]]), name
    parts = sum(logs[0][f"loss/{name}"] for name in ("answers", "characteristics", "logic"))
    assert logs[0]["loss"] == pytest.approx(parts, rel=1e-5)
    assert not torch.equal(model.model.segmentation.absent, full_toy.fresh()[0].model.segmentation.absent)


def test_logs_tell_losses_by_task_speeds_and_what_is_left(toy):
    logs = {}
    modes = trains(tower="full", projector="full", embeddings="full", language="full")
    plan = stage(steps=4, trains=modes, rates={"tower": 0.5, "knowledge": 0.5})
    outcome = toy.run(plan, log=logs.__setitem__)
    assert outcome.final_loss == logs[max(logs)]["loss"], "the terminal, lineage and MLflow say one loss"
    assert list(logs) == [1, 2, 3, 4]
    norms = {"grad_norm", *(f"grad_norm/{m}" for m in ("tower", "projector", "embeddings", "language"))}
    expected = {f"{name}_per_second" for name in ("steps", "images", "questions", "tokens")} | norms
    expected |= {"learning_rate", "learning_rate/tower", "loss", "padding", "seconds_left", "memory_bytes"}
    assert expected <= set(logs[3])
    assert "mfu" not in logs[3]  # nothing is known of a CPU's peak
    assert "learning_rate/knowledge" not in logs[3], "frozen"
    assert logs[3]["learning_rate/tower"] == 0.5 * logs[3]["learning_rate"]
    squares = sum(logs[3][name] ** 2 for name in norms - {"grad_norm"})
    assert squares == pytest.approx(logs[3]["grad_norm"] ** 2, rel=1e-4)
    assert logs[4]["seconds_left"] == 0 < logs[1]["seconds_left"]
    assert {f"loss/task/{task}" for task in ("attributes", "head_pose")} <= set().union(*logs.values())


def test_speeds_are_smoothed_and_a_known_peak_gives_the_share_used(monkeypatch):
    monkeypatch.setattr(cost, "peak_flops", lambda device, precision: 1e6)
    clock = iter([0.0, 1.0, 2.0])
    monkeypatch.setattr("facemllm.train.monitor.time.perf_counter", lambda: next(clock))
    run = stage_run(stage(steps=100), settings.load(), world_size=2, precision="bf16")
    throughput = Throughput(run, 0, flops_per_token=500.0)
    first = throughput.measure(10, {"tokens": 1000})
    assert (first["tokens_per_second"], first["mfu"], first["seconds_left"]) == (1000, 0.25, 9)
    second = throughput.measure(30, {"tokens": 2000})
    assert second["tokens_per_second"] == pytest.approx(1300)
    assert second["seconds_left"] == pytest.approx(70 / 13)


def test_peaks_are_of_known_devices_only(monkeypatch):
    known = {"H100 80GB HBM3": 989.4e12, "H100 PCIe": 756e12, "A100-SXM4-80GB": 312e12, "L4": 121e12}
    for name, peak in (known | {"GeForce RTX 4090": None}).items():
        monkeypatch.setattr(cost, "device_name", lambda device, name=name: f"NVIDIA {name}")
        assert cost.peak_flops("cuda", "bf16") == peak
        assert cost.peak_flops("cuda", "fp32") is cost.peak_flops("cpu", "bf16") is None


def test_a_loss_that_is_not_finite_stops_with_step_images_and_checkpoint(toy):
    model, _ = toy.fresh()
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.weight[0, 0] = math.nan
    stop = r"stage toy: the loss is nan .* at step 1 \(images i\d+, i\d+, i\d+ and 3 more; no checkpoint yet\)"
    refuses(stop, toy.run, stage(), model=model, error=FloatingPointError)


def test_a_loss_that_rises_and_stays_stops_the_stage():
    watch = LossMonitor("toy", 20.0)
    for step in range(100):
        watch.check(step, 1.0 if step % 10 else 900.0, 1.0, list)  # single peaks are nothing
    watch.checkpoint = 80
    stop = r"risen from 1 to 30 by step \d+ \(images a; last checkpoint: step 80\)"
    with pytest.raises(FloatingPointError, match=stop):
        [watch.check(step, 30.0, 1.0, lambda: ["a"]) for step in range(100, 150)]
    patient = LossMonitor("toy", 0.0)
    for step in range(200):
        patient.check(step, 1.0 + step**3, 1.0, list)


def test_a_stage_that_would_train_nothing_or_changes_nothing_is_refused(toy):
    absent = stage(trains=trains(segmentation="full", knowledge="full"))
    refuses("trains nothing: this model has no segmentation, knowledge", toy.run, absent)
    unreached = stage(trains=trains(projector="full", language="full"), objective="caption_words")
    refuses(r"caption_words does not reach the language; set .*trains.language=frozen", toy.run, unreached)
    model = toy.fresh()[0].to(torch.bfloat16)
    plan = stage(trains=trains(projector="full"), learning_rate=1e-12, weight_decay=0.0, steps=2, augment=False)
    refuses("changed no parameter", toy.run, plan, model=model, precision="bf16")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 80 bytes"),
    ],
)
def test_a_lack_of_memory_is_one_line_with_what_to_lower(error):
    said = r"stage toy ran out of memory: set train.micro_images .*recompute"
    with pytest.raises(UserError, match=said), out_of_memory_explained("toy"):
        raise error
    with pytest.raises(RuntimeError, match="shapes differ"), out_of_memory_explained("toy"):
        raise RuntimeError("shapes differ")  # which is no lack of memory


def test_recomputed_activations_give_the_same_gradients(toy):
    plan = stage(trains=trains(projector="full", language="lora"))
    model, _ = toy.fresh()
    optimizer.set_trainable(model, plan.trains, toy.settings.train.lora, 0)
    optimizer.set_modes(model, plan.trains)
    one, gradients = toy.gradients(model, plan, toy.batches(plan))
    with optimizer.memory_savings(model, plan.trains, recompute=True, compiled=False):
        assert model.model.language_model.is_gradient_checkpointing
        other, again = toy.gradients(model, plan, toy.batches(plan))
    assert not model.model.language_model.is_gradient_checkpointing
    assert torch.equal(one, other)
    assert_same_gradients(gradients, again, atol=1e-6)
    toy.run(stage(steps=1), recompute=True)


def test_micro_batches_give_the_same_model_and_a_module_without_a_number_trains(full_toy):
    model, _ = full_toy.fresh()
    model.model.knowledge.empty = nn.Parameter(torch.empty(0, 4))
    assert full_toy.run(stage(steps=1), model=model).steps == 1
    plan = stage(trains=trains(projector="full", segmentation="full", knowledge="full"), steps=1)
    one, other = (full_toy.run(plan, micro_images=count).model for count in (0, 2))
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, atol=2e-5, rtol=1e-4, msg=name)


def test_batches_are_made_ahead_in_order_and_errors_arrive():
    made = Counter()

    def make(step):
        made[step] += 1
        if step == 4:
            raise ValueError("step 4")
        return [step]

    steps = prefetch(make, 2, 9)
    assert [next(steps), next(steps)] == [[2], [3]]
    refuses("step 4", next, steps, error=ValueError)
    assert made == {2: 1, 3: 1, 4: 1}
    assert list(prefetch(make, 5, 5)) == []
