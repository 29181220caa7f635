"""The driver tier on a real GPU: the probe, and a PyTorch program suspended from outside, in memory and in contents."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from acb.broker.checkpointing import Helper
from acb.devices.checkpoint import Outcome
from acb.devices.checkpoint_probe import Probe
from acb.devices.cuda import MIGRATION_SINCE
from acb.devices.nvml import Nvml

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
GIB = 1 << 30

TARGET = """
import sys, torch
x = torch.empty({gib} << 28, device="cuda").uniform_()
s = x.double().sum().item(); p = x.data_ptr()
y = torch.zeros(1024, device="cuda"); graph = torch.cuda.CUDAGraph()
side = torch.cuda.Stream(); side.wait_stream(torch.cuda.current_stream())
with torch.cuda.stream(side):
    y.add_(1)
torch.cuda.current_stream().wait_stream(side)
with torch.cuda.graph(graph):
    y.add_(1)
graph.replay(); torch.cuda.synchronize(); n = y[0].item()
print("ready", flush=True)
for line in sys.stdin:
    graph.replay(); torch.cuda.synchronize(); n += 1
    print("same" if (x.double().sum().item(), x.data_ptr(), y[0].item()) == (s, p, n) else "different", flush=True)
"""


@pytest.fixture(scope="module")
def helper() -> Iterator[Helper]:
    with Helper() as helper:
        yield helper


@pytest.fixture(scope="module")
def works(helper: Helper) -> Probe:
    """The probe's result; the tests below need it to be good."""
    result = helper.ask("probe", deadline=180)
    assert isinstance(result, Probe)
    print(f"\nprobe: {json.dumps(result.as_json(), indent=1)}")
    if not result.works:
        pytest.skip(f"the driver tier does not work here: {result.reason}")
    return result


@pytest.fixture
def nvml() -> Iterator[Nvml]:
    with Nvml() as nvml:
        yield nvml


@pytest.fixture
def program() -> Iterator[subprocess.Popen[str]]:
    """A PyTorch program with 4 GiB and a captured CUDA graph, ready."""
    torch: Any = pytest.importorskip("torch")
    if torch.version.cuda is None:
        pytest.skip("PyTorch's CPU build")
    with subprocess.Popen(
        [sys.executable, "-c", TARGET.format(gib=4)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def ask(process: subprocess.Popen[str]) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("?\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def step(helper: Helper, op: str, pid: int, **arguments: Any) -> Outcome:
    begun = time.perf_counter()
    out = helper.ask(op, pid, deadline=120, **arguments)
    assert isinstance(out, Outcome)
    speed = sum(out.moved.values()) / GIB / (time.perf_counter() - begun)
    print(f"\n{op}: {out.state}, {speed:.2f} GiB/s, {out.seconds} {out.reason}")
    return out


def test_the_driver_is_as_nvml_says(nvml: Nvml) -> None:
    code = (
        "import json; from acb.devices.cuda import LibCuda as L; d = L(); print(json.dumps([d.version(), d.devices()]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    version, uuids = json.loads(done.stdout)
    assert nvml.cuda_version() == f"{version // 1000}.{version % 1000 // 10}"
    assert {device.uuid for device in nvml.devices} == set(uuids)
    assert nvml.driver_version()
    settings = nvml.settings(0)
    print(f"\n{nvml.driver_version()} {settings} {nvml.processes(0)} free {nvml.free(0) / GIB:.1f} GiB")


def test_a_query_is_cheap_enough_for_once_a_second(nvml: Nvml) -> None:
    nvml.processes(0)
    begun = time.perf_counter()
    for _ in range(20):
        nvml.processes(0)
        nvml.free(0)
    assert (time.perf_counter() - begun) / 20 < 0.05


def test_the_probe_says_whether_it_works(works: Probe) -> None:
    assert works.moved, "memory was moved, but NVML saw nothing become free"


@pytest.mark.usefixtures("works")
def test_a_program_with_a_captured_graph_leaves_and_comes_back(
    helper: Helper, program: subprocess.Popen[str], nvml: Nvml
) -> None:
    before = nvml.free(0)
    assert ask(program) == "same"
    for _ in range(2):
        out = step(helper, "suspend", program.pid, timeout=10)
        assert out.done, out
        assert sum(out.moved.values()) >= 4 * GIB
        assert nvml.free(0) >= before + 4 * GIB
        back = step(helper, "resume", program.pid, patience=5)
        assert back.done, back
        assert ask(program) == "same"


@pytest.mark.usefixtures("works")
def test_nothing_is_restored_into_too_little_room(helper: Helper, program: subprocess.Popen[str]) -> None:
    out = step(helper, "suspend", program.pid, timeout=10)
    assert out.done, out
    uuid = next(iter(out.moved))
    refused = step(helper, "resume", program.pid, needs={uuid: 1 << 50})
    assert (refused.done, refused.problem, refused.state) == (False, "room", "checkpointed")
    assert step(helper, "resume", program.pid, patience=5).done
    assert ask(program) == "same"


@pytest.mark.usefixtures("works")
def test_a_program_comes_back_on_another_gpu(helper: Helper, program: subprocess.Popen[str], nvml: Nvml) -> None:
    same = [device for device in nvml.devices if device.name == nvml.devices[0].name]
    if len(same) < 2:
        pytest.skip("this needs two GPUs of one kind")
    if int((nvml.cuda_version() or "0").partition(".")[0]) * 1000 < MIGRATION_SINCE:
        pytest.skip("this needs driver 580")
    uuids = [device.uuid for device in nvml.devices]
    swapped = {**dict(zip(uuids, uuids, strict=True)), same[0].uuid: same[1].uuid, same[1].uuid: same[0].uuid}
    assert step(helper, "suspend", program.pid, timeout=10).done
    back = step(helper, "resume", program.pid, gpu_map=swapped, patience=5)
    assert back.done, back
    assert ask(program) == "same"


def test_a_process_that_uses_no_cuda_is_refused_and_named(helper: Helper, works: Probe) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        out = step(helper, "suspend", process.pid, timeout=1)
        process.kill()
    assert not out.done
    assert out.reason


def test_acb_doctor_probes() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "acb.cli.acb", "doctor", "--probe", "--json"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    print(done.stdout)
    report = json.loads(done.stdout)
    assert report["gpus"]
    assert report["probe"]["reason"]
    (driver,) = [tier for tier in report["tiers"] if tier["name"] == "driver"]
    assert driver["available"] is report["probe"]["works"]
