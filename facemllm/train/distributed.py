"""Several ranks: a model sharded among them (FSDP2), and what they tell one another over torch.distributed.

Of a sharded model each rank has a share of the rows of every parameter, gradient and moment. Blocks of the language
model and of the tower are gathered one by one as the pass reaches them; what is left (word embeddings, projector,
branches) for the whole step. A frozen tower has neither gradients nor moments and stays whole.
Under bf16 the language model's blocks travel as bf16 and gradients are summed in fp32.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from facemllm.core import cost
from facemllm.model.families import family_class
from facemllm.train.loss import Value


class ShardedModel:
    """A model that is sharded in place, with the peft wrapper around it if there is one. Make it before the optimiser
    and before anything holds parameters: those are replaced."""

    def __init__(self, model: Any, wrapper: Any | None, device: torch.device, *, bf16: bool) -> None:
        # a third of a second that only sharded runs need
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        self._model = model
        self._empty = _without_weights(model, wrapper)
        self._root = _Root(model)
        family = family_class(model.config)
        tower = family.tower(model)
        frozen = not any(parameter.requires_grad for parameter in tower.parameters())
        if frozen:
            tower.to(device)
        whole = set(tower.parameters()) if frozen else set()
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        options: dict[str, Any] = {"mesh": mesh, "ignored_params": whole}
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for block in _blocks(family.language(model)):
            fully_shard(block, mp_policy=policy, **options)
        for block in () if frozen else _blocks(tower):
            fully_shard(block, **options)
        fully_shard(self._root, **options)
        for module in self._root.modules():
            if isinstance(module, FSDPModule):
                # a rank's loss is its share of the global mean, so gradients are summed, and so are those of
                # parameters that only some ranks had a use for
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
                module.set_reduce_scatter_unused_params(True, recurse=False)

    def wrap_loss(self, loss: Callable[[Any], Value]) -> Callable[[Any], Value]:
        """The loss of a batch, with the parameters it needs gathered while it is computed."""
        self._root.loss = loss
        return lambda batch: Value(*self._root(batch))

    @torch.no_grad()
    def gather(self) -> tuple[Any, Any | None]:
        """Model and wrapper with all weights, in the memory of rank 0; on the others they stay without. All ranks must
        call it."""
        first = dist.get_rank() == 0
        found: dict[int, Tensor] = {}  # on every rank, so that none gathers a tied weight once more than the others
        state: dict[str, Tensor] = {}
        for name, tensor in self._model.state_dict(keep_vars=True).items():
            if id(tensor) not in found:  # tied weights stay one
                full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()
                kept = full.cpu() if first else full.to("meta")
                is_parameter = isinstance(tensor, nn.Parameter)
                found[id(tensor)] = nn.Parameter(kept, requires_grad=False) if is_parameter else kept
            if first:
                state[name] = found[id(tensor)]
        model, wrapper = self._empty
        if state:
            model.load_state_dict(state, assign=True)
        return model, wrapper


def total_norm(gradients: Sequence[Tensor]) -> float:
    """Norm of gradients, sharded or not; of sharded ones all ranks must ask."""
    return _number(nn.utils.get_total_norm(gradients))


def clip(parameters: Sequence[Tensor], limit: float) -> float:
    """Scale gradients, sharded or not, to a norm of at most `limit`; their norm before."""
    return _number(nn.utils.clip_grad_norm_(parameters, limit))


class _Root(nn.Module):
    """Gathers what stands in no block for as long as a step's loss is computed: FSDP acts where a module is called."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.loss: Callable[[Any], Value] | None = None

    def forward(self, batch: Any) -> tuple[Any, ...]:
        """The value of a batch as a tuple, in which FSDP finds the loss."""
        assert self.loss is not None
        value = self.loss(batch)
        return tuple(vars(value).values())


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The repeated blocks of a transformer: members of its outermost lists."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child if not isinstance(block, nn.ModuleList))
        else:
            yield from _blocks(child)


def _without_weights(model: nn.Module, wrapper: Any | None) -> tuple[Any, Any | None]:
    """A copy in which every parameter takes no memory."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    copied: tuple[Any, Any | None] = copy.deepcopy((model, wrapper), memo)
    return copied


def _number(norm: Any) -> float:
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def broadcast(value: Any, world_size: int) -> Any:
    """What rank 0 has, on every rank."""
    box = [value]
    if world_size > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


@contextmanager
def patient_barrier(world_size: int) -> Iterator[Callable[[], None]]:
    """A way to wait for all ranks, for days if it must be: decoding takes one machine longer than another, and a
    collective of training gives up after minutes. A rank that dies ends the wait."""
    if world_size == 1:
        yield lambda: None
        return
    group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    yield lambda: dist.barrier(group)
    dist.destroy_process_group(group)


def reduce_gradients(parameters: Sequence[Tensor], report: Tensor, world_size: int) -> Tensor:
    """Sum gradients and reports over the ranks, in one message; returns the global report."""
    if world_size == 1:
        return report
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([report, *(gradient.flatten().float() for gradient in gradients)])
    dist.all_reduce(flat)
    offset = len(report)
    for parameter in parameters:
        piece = flat[offset : offset + parameter.numel()].view_as(parameter)
        parameter.grad = piece.to(parameter.dtype)
        offset += parameter.numel()
    return flat[: len(report)]


def reduce_energy(spent: cost.Spent, world_size: int, device: torch.device) -> cost.Spent:
    """Energy of all ranks together, unknown if one rank's is; each keeps its own seconds."""
    if world_size == 1:
        return spent
    joules = torch.tensor([math.nan if spent[n] is None else spent[n] for n in (cost.CPU, cost.GPU)], device=device)
    dist.all_reduce(joules)
    cpu, gpu = (None if math.isnan(value) else value for value in joules.tolist())
    return {**spent, cost.CPU: cpu, cost.GPU: gpu}


def average_buffers(model: Any, world_size: int) -> None:
    """Average the normalisation statistics that training moves over the ranks, where they are about to be written. A
    sum divided by the ranks is not what all of them had: nothing else is touched."""
    if world_size == 1:
        return
    for module in model.modules():
        if isinstance(module, _NormBase) and module.training:
            for statistic in (module.running_mean, module.running_var):
                if statistic is not None:
                    dist.all_reduce(statistic)
                    statistic /= world_size
