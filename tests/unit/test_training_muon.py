"""Muon beside AdamW: against torch's own of either, what it moves, and that a checkpoint holds all of it."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from facemllm.train import checkpoint, optimizer
from facemllm.train.checkpoint import Checkpoint
from facemllm.train.checkpoint_store import CheckpointStore
from facemllm.train.muon import MuonAdamW, orthogonalised
from tests.training_example import stage


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.filters, self.norm, self.wide = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 20)
        self.tall = nn.Linear(20, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tall(self.wide(self.norm(self.filters(x)).mean((2, 3))).relu())


def built(net: nn.Module) -> MuonAdamW:
    matrices = [p for p in net.parameters() if p.ndim >= 2]
    rest = [p for p in net.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": 0.1, "muon": True},
        {"params": rest, "weight_decay": 0.0, "muon": False},
    ]
    return MuonAdamW(groups, 0.02, torch.bfloat16)


def train(net: nn.Module, optimizers: list[torch.optim.Optimizer], first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        net(x).square().sum().backward()
        for one in optimizers:
            one.step()
        net.zero_grad(set_to_none=True)


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (12, 12)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_singular_values_become_alike_and_directions_stay(shape: tuple[int, int], dtype: torch.dtype):
    least = min(shape)
    draw = torch.Generator().manual_seed(1)
    u, _ = torch.linalg.qr(torch.randn(shape[0], least, generator=draw))
    v, _ = torch.linalg.qr(torch.randn(shape[1], least, generator=draw))
    update = u @ torch.diag(torch.logspace(0, -1, least)) @ v.T
    found = orthogonalised(update, dtype).float()
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.5
    assert values.max() < 1.35
    along = torch.linalg.multi_dot([u.T, found, v])  # diagonal, were the directions the very same
    assert (along - torch.diag(along.diagonal())).abs().max() < 0.1


def test_matrices_move_as_by_torchs_muon_and_the_rest_as_by_its_adamw():
    net, other = Net(), Net()
    train(net, [built(net)], 0, 4)
    # torch's takes matrices alone: the same storage, seen as one
    bank = other.filters.weight
    flat = nn.Parameter(bank.detach().flatten(1))
    bank.register_post_accumulate_grad_hook(lambda p: setattr(flat, "grad", p.grad.flatten(1)))
    matrices = [flat, other.wide.weight, other.tall.weight]
    rest = [p for p in other.parameters() if p.ndim < 2]
    muon = torch.optim.Muon(matrices, 0.02, 0.1, adjust_lr_fn="match_rms_adamw")
    train(other, [muon, torch.optim.AdamW(rest, 0.02, (0.9, 0.98), weight_decay=0.0, fused=True)], 0, 4)
    moved = 0.0
    for (name, one), two, start in zip(net.named_parameters(), other.parameters(), Net().parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5, msg=name)
        moved = max(moved, float((one - start).detach().abs().max()))
    assert moved > 0.02


def test_it_moves_layers_and_neither_embeddings_nor_what_shares_their_weights(toy):
    model, _ = toy.fresh()
    groups = optimizer.parameter_groups(model, stage(optimizer="muon"))
    names = {id(p): n for n, p in model.named_parameters()}
    by_muon = {names[id(p)] for g in groups if g["muon"] for p in g["params"]}
    assert sum(len(g["params"]) for g in groups) == len(names)
    assert by_muon == {n for n, p in model.named_parameters() if p.ndim >= 2 and "embed_tokens" not in n}
    assert any(p.ndim == 4 for n, p in model.named_parameters() if n in by_muon)
    assert not any(g["muon"] for g in optimizer.parameter_groups(model, stage()))


def test_what_is_restored_goes_on_to_the_same_bits(tmp_path: Path):
    whole, net = Net(), Net()
    train(whole, [built(whole)], 0, 6)
    first = built(net)
    train(net, [first], 0, 3)
    store = CheckpointStore(str(tmp_path), tmp_path)
    store.put(3, 1, Checkpoint.of(net, first, {"step": 3, "key": "k"}).write)
    again = Net()
    onward = built(again)
    with store.newest() as (folder, _):
        assert folder is not None
        checkpoint.load(folder, again, onward, "k", {})
    unaware = copy.deepcopy(again)
    train(again, [onward], 3, 6)
    for (name, one), two in zip(again.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, two), name
    train(unaware, [built(unaware)], 3, 6)
    assert not torch.equal(unaware.wide.weight, whole.wide.weight), "the running mean is not part of it"


def test_a_step_without_a_gradient_leaves_all_as_it_is():
    net = Net()
    moving = built(net)
    train(net, [moving], 0, 1)
    before = copy.deepcopy(net.state_dict())
    moving.step()
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name
