"""What work costs: time, floating-point operations, memory, energy, price. Measured, or null; never guessed.

- Operations: those of matrix products, convolutions and attention, forward and backward, counted by PyTorch's
  `FlopCounterMode` (a multiply-add is two). A stage counts one training step and scales it by tokens:
  `flops = counted / tokens of that step * tokens of the stage`.
- Energy: the processors' own counters (Intel and AMD RAPL, Linux `/sys/class/powercap`, whole machine, readable by the
  administrator alone on most systems) and the GPU's (NVML, Volta and newer, through `nvidia-ml-py`).
- Price: `seconds / 3600 * cost.price_per_hour`.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from facemllm.settings import Settings

POWERCAP = Path("/sys/class/powercap")
CPU, GPU = "energy_cpu_joules", "energy_gpu_joules"
Spent = dict[str, float | None]
# dense bf16 peaks of NVIDIA's data sheets
_PEAKS = {"H200": 989.4e12, "H100": 989.4e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
_SLOWER_H100 = {"PCIE": 756e12, "NVL": 835e12}


class Meter:
    """Seconds and joules since it was made.

    `device` is torch's name of where the work runs: on `cuda` this process's GPU is metered too. Without `machine`, the
    processors are left to another process of this machine, and count as 0 here. Unknown energy is None.
    """

    def __init__(self, device: str = "cpu", machine: bool = True):
        self._zones = _Zones() if machine else None
        self._gpu = _gpu_counter() if device.startswith("cuda") else None
        self._gpu_began = _millijoules(self._gpu)
        self._began = time.perf_counter()

    def sample(self) -> None:
        """Read the processors' counters, which wrap around: call this every minute or so."""
        if self._zones is not None:
            self._zones.read()

    def spent(self) -> Spent:
        """`seconds`, `energy_cpu_joules`, `energy_gpu_joules` until now."""
        self.sample()
        now = _millijoules(self._gpu)
        return {
            "seconds": time.perf_counter() - self._began,
            CPU: self._zones.joules() if self._zones is not None else 0.0,
            GPU: None if now is None or self._gpu_began is None else (now - self._gpu_began) / 1000,
        }


def add(first: Spent, second: Spent) -> Spent:
    """Sums of two spendings; None where either is unknown."""
    both = {name: (value, second[name]) for name, value in first.items()}
    return {name: None if a is None or b is None else a + b for name, (a, b) in both.items()}


class _Zones:
    """Energy counters of the processor packages, summed; each wraps at its own maximum."""

    def __init__(self) -> None:
        self._used = 0
        self._last: dict[Path, int] | None = self._counters()

    def read(self) -> None:
        if self._last is None:
            return
        now = self._counters()
        if now is None or now.keys() != self._last.keys():
            self._last = None
            return
        for zone, value in now.items():
            step = value - self._last[zone]
            self._used += step if step >= 0 else step + int((zone / "max_energy_range_uj").read_text())
        self._last = now

    def joules(self) -> float | None:
        return None if self._last is None else self._used / 1e6

    def _counters(self) -> dict[Path, int] | None:
        # "intel-rapl:0" is a package (on AMD too), "intel-rapl:0:1" a part of it
        zones = [path for path in sorted(POWERCAP.glob("intel-rapl:*")) if path.name.count(":") == 1]
        try:
            return {zone: int((zone / "energy_uj").read_text()) for zone in zones} or None
        except (OSError, ValueError):
            return None


def _gpu_counter() -> tuple[Any, Any] | None:
    """NVML and its handle of this process's GPU; None where either is missing."""
    import torch

    with suppress(Exception):  # no package, no driver, no counter: each with errors of its own
        nvml = import_module("pynvml")
        nvml.nvmlInit()
        name = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
        return nvml, nvml.nvmlDeviceGetHandleByUUID(name)
    return None


def _millijoules(counter: tuple[Any, Any] | None) -> int | None:
    if counter is not None:
        with suppress(Exception):  # a GPU older than Volta has no such counter
            return int(counter[0].nvmlDeviceGetTotalEnergyConsumption(counter[1]))
    return None


@contextmanager
def operations() -> Iterator[Any]:
    """Count the floating-point operations of the block; ask the yielded counter with `get_total_flops()`.

    Counting takes other kernels, so what is computed in the block may differ from an uncounted run in the last bits.
    """
    import torch
    from torch.utils import flop_counter

    # attention on a CPU has kernels of its own, which PyTorch's list leaves out
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    known = {
        attention: lambda q, k, v, *_, **__: flop_counter.sdpa_flop_count(q, k, v),
        backward: lambda grad, q, k, v, *_, **__: flop_counter.sdpa_backward_flop_count(grad, q, k, v),
    }
    with flop_counter.FlopCounterMode(display=False, custom_mapping=known) as counter:
        yield counter


def inference_device(settings: Settings) -> str:
    """Where a step that only asks a model runs: on the GPU, if it is to be used and there is one."""
    import torch

    return "cuda" if settings.train.use_gpu and torch.cuda.is_available() else "cpu"


def device_name(device: str, workers: int = 1) -> str:
    """What the work runs on, in words: the GPU's name, or CPU with its threads."""
    import torch

    name = torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    return name if workers == 1 else f"{workers} × {name}"


def peak_memory_bytes(device: str = "cpu") -> int:
    """Most memory this process has held: on the GPU if it worked there, else resident."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_flops(device: str, precision: str) -> float | None:
    """Dense bf16 operations a second that the GPU's maker states; None for other devices and precisions."""
    if not device.startswith("cuda") or precision != "bf16":
        return None
    words = device_name(device).upper().replace("-", " ").split()
    if "H100" in words and (slower := [peak for kind, peak in _SLOWER_H100.items() if kind in words]):
        return slower[0]
    return next((peak for name, peak in _PEAKS.items() if name in words), None)


def tidy(cost: Mapping[str, Any]) -> dict[str, Any]:
    """Costs as they are kept: seconds and joules to a tenth."""
    return {name: round(value, 1) if isinstance(value, float) else value for name, value in cost.items()}


def priced(cost: Mapping[str, Any], price_per_hour: float | None) -> dict[str, Any]:
    """Costs with `price` added where a rate is set and the seconds are known."""
    if price_per_hour is None or cost.get("seconds") is None:
        return dict(cost)
    return {**cost, "price": round(cost["seconds"] / 3600 * price_per_hour, 4)}
