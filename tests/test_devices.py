"""What is known of devices, and the report of `falqon doctor`."""

from __future__ import annotations

import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch

from falqon.cli import main
from falqon.errors import InputError
from falqon.kernels import backend, devices, wide
from falqon.kernels.native import build as native
from falqon.kernels.native import products

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Pretend that there is one: its name, and capability or architecture."""
    name, capability = request.param
    is_amd = isinstance(capability, str)
    properties = SimpleNamespace(
        name=name, total_memory=24 * 2**30, multi_processor_count=128, gcnArchName=f"{capability}:x"
    )
    monkeypatch.setattr(torch.version, "hip", "6.4" if is_amd else None)
    monkeypatch.setattr(torch.version, "cuda", None if is_amd else "13.0")
    for function, value in {
        "device_count": 1,
        "current_device": 0,
        "get_device_name": name,
        "get_device_capability": (9, 4) if is_amd else capability,
        "get_device_properties": properties,
    }.items():
        monkeypatch.setattr(torch.cuda, function, lambda *_, value=value: value)
    caches = (
        devices._capability,
        devices._architecture,
        devices._processors,
        backend.cache_file,
        backend.choices,
    )
    for cache in caches:
        cache.cache_clear()
    yield  # type: ignore[misc]
    for cache in caches:
        cache.cache_clear()


KNOWN = [
    (("NVIDIA GeForce RTX 4090", (8, 9)), 89, True),
    (("NVIDIA H100", (9, 0)), 90, True),
    (("NVIDIA B200", (10, 0)), 100, True),
    (("NVIDIA GeForce RTX 5090", (12, 0)), 120, True),
    (("NVIDIA A100", (8, 0)), 80, False),
    (("AMD Instinct MI350X", "gfx950"), 0, True),
    (("AMD Radeon RX 9070", "gfx1201"), 0, True),
    (("AMD Instinct MI300X", "gfx942"), 0, False),
]


@pytest.mark.parametrize(("gpu", "capability", "units"), KNOWN, indirect=["gpu"])
def test_fp8_units(gpu: None, capability: int, units: bool) -> None:
    assert devices.capability(CUDA) == capability
    assert devices.has_fp8_units(CUDA) is units
    devices.check(CUDA)
    assert ("float16" in devices.describe(CUDA)) is not units
    assert devices.processors(CUDA) == 128


@pytest.mark.parametrize("gpu", [("Tesla V100", (7, 0))], indirect=True)
def test_a_gpu_that_is_too_old_is_refused(gpu: None) -> None:
    with pytest.raises(InputError, match=r"Tesla V100 has compute capability 7.0.*8.0.*cpu"):
        devices.check(CUDA)


@pytest.mark.parametrize("gpu", [("NVIDIA H100", (9, 0))], indirect=True)
def test_a_gpu_without_triton_is_refused(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="triton, which is not installed"):
        devices.check(CUDA)


def test_other_devices_pass() -> None:
    for device in ("cpu", "meta"):
        devices.check(torch.device(device))
        assert not devices.has_fp8_units(torch.device(device))
    assert "decoded to bfloat16" in devices.describe(torch.device("cpu"))


def test_doctor_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"torch {torch.__version__}" in text
    assert "cpu: " in text and "FP8 codes are decoded to bfloat16" in text
    assert native.describe() in text
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["cpu"]["threads"] == torch.get_num_threads()
    assert len(report["gpus"]) == torch.cuda.device_count()


@pytest.mark.parametrize("unit", [None, "AVX512-BF16"])
@pytest.mark.parametrize("widens", [True, False])
def test_doctor_says_how_a_cpu_multiplies(
    unit: str | None,
    widens: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(products, "unit", lambda: unit)
    monkeypatch.setattr(wide, "WIDENS", widens)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert ("their products by AVX512-BF16" in text) == (unit is not None)
    assert ("computed in float32" in text) == widens


@pytest.mark.parametrize(
    "gpu", [("NVIDIA H100", (9, 0)), ("Tesla V100", (7, 0)), ("MI300X", "gfx942")], indirect=True
)
def test_doctor_on_machines_with_gpus(gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    if "V100" in text:
        assert "cannot be used: Tesla V100 has compute capability 7.0" in text
    elif "H100" in text:
        assert "cuda:0: NVIDIA H100, sm_90, 24 GiB, 128 processors" in text
        assert "multiply FP8" in text and "choices are kept in" in text
    else:
        assert "gfx942" in text and "fnuz" in text


def test_doctor_tells_a_wrong_setting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FALQON_MATMUL", "fast")
    assert main(["doctor"]) == 2
    assert "FALQON_MATMUL is 'fast'" in capsys.readouterr().err
