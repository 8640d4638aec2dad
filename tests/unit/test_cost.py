"""Costs are measured or unknown, never guessed."""

import sys
import types

import pytest
import torch

from facemllm.core import cost


@pytest.fixture
def zones(tmp_path, monkeypatch):
    """Energy counters of a machine with two processor packages; one has a part of its own, which must not count."""
    monkeypatch.setattr(cost, "POWERCAP", tmp_path)
    for name, value in (("intel-rapl:0", 5_000_000), ("intel-rapl:1", 900_000), ("intel-rapl:0:0", 77)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{value}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("1000000\n")
    return tmp_path


def test_processor_energy_is_summed_over_packages_and_wraps(zones):
    meter = cost.Meter()
    (zones / "intel-rapl:0" / "energy_uj").write_text("7000000")
    meter.sample()
    (zones / "intel-rapl:1" / "energy_uj").write_text("100000")  # 0.2 J on, past its end
    spent = meter.spent()
    assert spent[cost.CPU] == pytest.approx(2.2)
    assert spent[cost.GPU] is None
    assert spent["seconds"] > 0
    assert cost.Meter(machine=False).spent()[cost.CPU] == 0.0  # another process of this machine counts it


@pytest.mark.parametrize("fault", ["absent", "vanished", "garbled"])
def test_energy_that_cannot_be_read_is_unknown(zones, monkeypatch, fault):
    if fault == "absent":
        monkeypatch.setattr(cost, "POWERCAP", zones / "nowhere")
    meter = cost.Meter()
    if fault == "vanished":
        (zones / "intel-rapl:1" / "energy_uj").unlink()
    if fault == "garbled":
        (zones / "intel-rapl:1" / "energy_uj").write_text("?")
    assert meter.spent()[cost.CPU] is None


@pytest.mark.parametrize("old", [False, True])
def test_gpu_energy_is_that_of_its_own_counter(monkeypatch, old):
    readings = iter([1000, 4500])

    def consumption(handle):
        assert handle == "GPU-7"
        if old:
            raise RuntimeError("not supported")
        return next(readings)

    nvml = {"nvmlInit": lambda: None, "nvmlDeviceGetHandleByUUID": lambda name: name}
    nvml |= {"nvmlDeviceGetTotalEnergyConsumption": consumption}
    monkeypatch.setitem(sys.modules, "pynvml", types.SimpleNamespace(**nvml))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="7"))
    assert cost.Meter("cuda").spent()[cost.GPU] == (None if old else 3.5)


def test_operations_are_those_of_matrix_products_and_attention():
    left, right = torch.ones(4, 5, requires_grad=True), torch.ones(5, 6, requires_grad=True)
    with cost.operations() as counter:
        (left @ right).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 4 * 5 * 6  # forward, and one product for each gradient
    query = torch.ones(2, 3, 7, 8, requires_grad=True)
    with cost.operations() as counter:
        torch.nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()
    products = 2 * (2 * 3) * 7 * 7 * 8
    assert counter.get_total_flops() == (2 + 5) * products  # backward computes the scores again


def test_a_price_needs_a_rate_and_seconds_and_sums_with_the_unknown_are_unknown():
    assert cost.add({"seconds": 1.0, "j": None}, {"seconds": 2.0, "j": 3.0}) == {"seconds": 3.0, "j": None}
    assert cost.priced({"seconds": 1800.0}, 2.0) == {"seconds": 1800.0, "price": 1.0}
    assert cost.priced({"seconds": 1800.0}, None) == {"seconds": 1800.0}
    assert cost.priced({"seconds": None}, 2.0) == {"seconds": None}
    tidied = {"seconds": 1.3, "device": "CPU", "flops": 3, "j": None}
    assert cost.tidy({"seconds": 1.26, "device": "CPU", "flops": 3, "j": None}) == tidied
