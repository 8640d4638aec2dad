"""What a stage trains: adapters and their merge, parameter groups, the schedule of the learning rate."""

import warnings

import pytest
import torch
from torch import nn

from facemllm.errors import UserError
from facemllm.settings.train import Trainable
from facemllm.train import optimizer
from tests.training_example import MODES, stage

ADAPTERS = Trainable.model_validate(MODES["adapters"][0])


def test_adapters_never_reach_the_tower_and_start_from_the_seed_alone(toy):
    """Not from torch's own, which differs between processes: a killed run or a second worker would start elsewhere."""
    starts = []
    for seed, state in ((3, 1), (3, 2), (4, 2)):
        torch.manual_seed(state)
        model, _ = toy.fresh()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            optimizer.set_trainable(model, ADAPTERS, toy.settings.train.lora, seed)
        assert not [str(one.message) for one in said if issubclass(one.category, FutureWarning)]
        assert torch.initial_seed() == state
        adapted = {n.split(".lora_")[0] for n, _ in model.named_parameters() if ".lora_" in n}
        assert len(adapted) == 3 * 7  # layers x linear maps
        assert all("language_model" in n for n in adapted)
        starts.append(torch.cat([p.detach().flatten() for n, p in model.named_parameters() if ".lora_A" in n]))
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[1], starts[2])


def test_a_bad_merge_is_noticed(toy):
    model, _ = toy.fresh()
    wrapper = optimizer.set_trainable(model, ADAPTERS, toy.settings.train.lora, 0)

    class Careless:
        def merge_and_unload(self):
            merged = wrapper.merge_and_unload()
            merged.get_input_embeddings().weight.data += 0.1
            return merged

    ids = torch.tensor([[7, 8, 9]])
    with pytest.raises(RuntimeError, match="merging the adapters changed"):
        optimizer.merge(model, Careless(), (ids, torch.ones_like(ids)))


def test_without_a_compiler_nothing_is_compiled_and_one_line_says_why(toy, monkeypatch):
    model, _ = toy.fresh()
    plan = stage()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with (
        pytest.raises(UserError, match=r"needs the C\+\+ compiler no-such-compiler.* set train.compile: false"),
        optimizer.memory_savings(model, plan.trains, recompute=False, compiled=True),
    ):
        raise AssertionError("it was let through")


def test_schedules():
    cosine = stage(schedule="cosine", steps=100, warmup=0.1, decay=0.9)
    rates = [optimizer.schedule(cosine, step) for step in range(101)]
    half = optimizer.FLOOR + (1 - optimizer.FLOOR) / 2
    assert [rates[step] for step in (0, 10, 55, 100)] == pytest.approx([1 / 11, 1.0, half, optimizer.FLOOR])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    stable = stage(schedule="warmup_stable_decay", steps=100, warmup=0.0, decay=0.4)
    rates = [optimizer.schedule(stable, step) for step in range(101)]
    assert rates[:61] == [1.0] * 61
    assert rates[80] == pytest.approx(half)
    assert optimizer.schedule(stage(warmup=0.0, decay=0.0), 7) == 1.0


def test_the_tower_has_a_rate_of_its_own_and_norms_no_decay(toy):
    model, _ = toy.fresh()
    groups = optimizer.parameter_groups(model, stage(rates={"tower": 0.2}))
    names = {id(p): n for n, p in model.named_parameters()}
    held = {(g["factor"], g["weight_decay"]): {names[id(p)] for p in g["params"]} for g in groups}
    assert sum(map(len, held.values())) == len(names)
    assert all("vision_tower" in n for key, group in held.items() if key[0] == 0.2 for n in group)
    undecayed = {n for key, group in held.items() if key[1] == 0 for n in group}
    assert undecayed == {n for n, p in model.named_parameters() if p.ndim < 2 or "embed_tokens" in n}


def test_what_the_loss_has_never_reached_stays_as_it_is():
    net = nn.ModuleDict({"used": nn.Linear(3, 4), "sometimes": nn.Linear(3, 1)})
    adam = torch.optim.AdamW(net.parameters(), 0.1)
    net["used"](torch.ones(1, 3)).sum().backward()
    net["sometimes"].weight.grad = torch.zeros_like(net["sometimes"].weight)  # as another rank's share makes it
    parameters = list(net.parameters())
    before = net["sometimes"].weight.detach().clone()
    optimizer.skip_unreached(adam, parameters, 1)
    adam.step()
    assert torch.equal(net["sometimes"].weight, before)
    assert set(adam.state) == {net["used"].weight, net["used"].bias}
    net["used"].weight.grad.zero_()
    optimizer.skip_unreached(adam, parameters, 1)
    assert net["used"].weight.grad is not None, "once reached, it decays as ever"
