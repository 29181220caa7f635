"""The machine's GPUs behind a fake NVML: what a job may use, and what becomes of a driver that does not answer."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from acb.broker import migration
from acb.cli.acb.doctor import gpus as doctor
from acb.cli.gpu_assigner import pool
from acb.config import ConfigError, parse_pool
from acb.devices import nvml
from acb.devices.nvml import Device, NvmlError, visible

UUIDS = ["GPU-aaaa1111", "GPU-aaaa2222", "GPU-bbbb3333", "GPU-cccc4444"]
FOUR = [Device(n, uuid, "H200", 1 << 37) for n, uuid in enumerate(UUIDS)]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (None, [0, 1, 2, 3]),
        ("", []),
        ("0", [0]),
        ("2,0", [2, 0]),
        (" 1 , 3 ", [1, 3]),
        ("GPU-bbbb3333", [2]),
        ("GPU-b", [2]),
        ("GPU-cccc4444,0,GPU-b", [3, 0, 2]),
        ("GPU-a", []),  # two begin so
        ("GPU-a,1", []),
        ("1,GPU-zzz,2", [1]),  # what names nothing ends the list, as in CUDA
        ("0,9,1", [0]),
        ("-1", []),
        ("0,-1,1", [0]),
        ("0,0", [0]),
        ("0,GPU-aaaa1", [0]),
        ("MIG-17", []),
        ("NoDevFiles", []),
        ("bbbb", []),
        ("1,", [1]),
        (",1", []),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_does(setting: str | None, expected: list[int]) -> None:
    seen = visible(FOUR, setting)
    assert [device.uuid for device in seen] == [UUIDS[n] for n in expected]
    assert [device.ordinal for device in seen] == list(range(len(expected)))  # as the job sees them


class FakeNvml(ModuleType):
    """As much of pynvml as is used."""

    class NVMLError(Exception):
        pass

    def __init__(self, names: list[object], *, fails: str = "", lost: tuple[int, ...] = ()) -> None:
        super().__init__("pynvml")
        self.names, self.fails, self.lost = names, fails, lost
        self.open = 0
        self.nvmlMemory_v2 = 0x2000028
        self.knows_reserved = True
        self.reserved = [0] * len(names)

    def _maybe_fail(self, what: str) -> None:
        if self.fails == what:
            raise self.NVMLError(what)

    def nvmlInit(self) -> None:
        self._maybe_fail("init")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        self._maybe_fail("count")
        return len(self.names)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index in self.lost:
            raise self.NVMLError("GPU is lost")
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> object:
        return UUIDS[handle].encode() if isinstance(self.names[handle], bytes) else UUIDS[handle]

    def nvmlDeviceGetName(self, handle: int) -> object:
        return self.names[handle]

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int | None = None) -> SimpleNamespace:
        if version is not None and self.knows_reserved:
            return SimpleNamespace(total=(handle + 1) << 30, reserved=self.reserved[handle], free=handle << 20)
        if handle in self.lost:
            raise self.NVMLError("GPU is lost")
        return SimpleNamespace(total=(handle + 1) << 30, free=handle << 20)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> type[FakeNvml]:
    """Put one in the place of pynvml by making it."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    class Installed(FakeNvml):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)  # type: ignore[arg-type]
            monkeypatch.setitem(sys.modules, "pynvml", self)

    return Installed


def test_devices_are_found(driver: type[FakeNvml], monkeypatch: pytest.MonkeyPatch) -> None:
    fake = driver([b"Tesla V100", "H200"])
    found = nvml.devices()
    assert found == [Device(0, UUIDS[0], "Tesla V100", 1 << 30), Device(1, UUIDS[1], "H200", 2 << 30)]
    assert fake.open == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert nvml.devices() == [Device(0, UUIDS[1], "H200", 2 << 30)]


def test_a_lost_gpu_costs_the_others_nothing(driver: type[FakeNvml]) -> None:
    fake = driver(["a", "b", "c"], lost=(1,))
    assert [device.ordinal for device in nvml.devices()] == [0, 2]
    fake.lost = (0, 1, 2)
    with pytest.raises(NvmlError, match="GPU is lost"):
        nvml.devices()
    assert fake.open == 0


@pytest.mark.parametrize(("fails", "words"), [("init", "no NVIDIA GPU can be used"), ("count", "does not answer")])
def test_a_driver_that_fails_is_named(driver: type[FakeNvml], fails: str, words: str) -> None:
    fake = driver([], fails=fails)
    with pytest.raises(NvmlError, match=words):
        nvml.devices()
    assert fake.open == 0


def test_without_its_python_module_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(NvmlError, match="nvidia-ml-py is not installed"):
        nvml.devices()


# --- asking again and again -------------------------------------------------------------------------------------------


def process(pid: int, nbytes: int | None) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, usedGpuMemory=nbytes)


def test_one_session_answers_many_questions_and_ends_once(driver: type[FakeNvml]) -> None:
    fake = driver(["a", "b"])
    fake.nvmlDeviceGetComputeRunningProcesses = lambda handle: [process(7, handle << 20), process(8, None)]  # type: ignore[attr-defined]
    fake.nvmlDeviceGetGraphicsRunningProcesses = lambda handle: [process(7, handle << 20), process(9, 5)]  # type: ignore[attr-defined]
    with nvml.Nvml() as session:
        for _ in range(3):
            assert session.processes(1) == {7: 1 << 20, 8: None, 9: 5}
            assert session.processes(UUIDS[0]) == {7: 0, 8: None, 9: 5}
            assert session.free(1) == 1 << 20
        assert fake.open == 1
        session.close()
    assert fake.open == 0


def test_ordinals_are_the_jobs_and_uuids_reach_every_gpu(
    driver: type[FakeNvml], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver(["a", "b", "c"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,1")
    with nvml.Nvml() as session:
        assert [device.uuid for device in session.devices] == [UUIDS[2], UUIDS[1]]
        assert [device.ordinal for device in session.all] == [0, 1, 2]
        assert session.free(0) == 2 << 20
        assert session.free(UUIDS[0]) == 0
        for unknown in (2, "GPU-none"):
            with pytest.raises(NvmlError, match="there is no GPU"):
                session.free(unknown)


def test_what_the_driver_keeps_for_itself_is_never_free(driver: type[FakeNvml]) -> None:
    fake = driver(["a", "b"], lost=())
    fake.reserved[1] = 1 << 20
    with nvml.Nvml() as session:
        assert session.most(1) == (2 << 30) - (1 << 20)
        fake.knows_reserved = False
        assert session.most(1) == 2 << 30
        fake.lost = (1,)
        with pytest.raises(NvmlError):
            session.most(1)


def test_what_the_driver_does_not_know_is_none(driver: type[FakeNvml]) -> None:
    fake = driver(["a"])  # it knows none of these
    with nvml.Nvml() as session:
        assert (session.driver_version(), session.cuda_version()) == (None, None)
        assert session.settings(0) == nvml.Settings(None, None, None)
        with pytest.raises(NvmlError, match="does not list its processes"):
            session.processes(0)

        def refuse(handle: int) -> list[SimpleNamespace]:
            raise fake.NVMLError("Insufficient Permissions")

        fake.nvmlDeviceGetComputeRunningProcesses = refuse  # type: ignore[attr-defined]
        fake.nvmlDeviceGetGraphicsRunningProcesses = lambda handle: [process(7, (1 << 64) - 1)]  # type: ignore[attr-defined]
        fake.nvmlDeviceGetMigMode = refuse  # type: ignore[attr-defined]
        assert session.processes(0) == {7: None}
        assert session.settings(0).mig is None


def test_the_machine_and_the_settings_of_a_gpu(driver: type[FakeNvml]) -> None:
    fake = driver(["a"])
    fake.nvmlSystemGetDriverVersion = lambda: b"580.95.05"  # type: ignore[attr-defined]
    fake.nvmlSystemGetCudaDriverVersion = lambda: 13000  # type: ignore[attr-defined]
    fake.nvmlDeviceGetMigMode = lambda handle: [0, 1]  # type: ignore[attr-defined]
    fake.nvmlDeviceGetPersistenceMode = lambda handle: 1  # type: ignore[attr-defined]
    fake.nvmlDeviceGetComputeMode = lambda handle: 0  # type: ignore[attr-defined]
    with nvml.Nvml() as session:
        assert (session.driver_version(), session.cuda_version()) == ("580.95.05", "13.0")
        assert session.settings(0) == nvml.Settings(mig=False, persistence=True, compute_mode=0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (nvml.Settings(), None),
        (nvml.Settings(mig=False, persistence=False, compute_mode=0), None),
        (nvml.Settings(mig=True), "divided by MIG"),
        (nvml.Settings(compute_mode=2), "closed to computing"),
        (nvml.Settings(compute_mode=3), "one process at a time"),
    ],
)
def test_a_set_up_that_cannot_be_lent_is_named_with_its_remedy(settings: nvml.Settings, words: str | None) -> None:
    obstacle = settings.obstacle(FOUR[1])
    assert (obstacle is None) if words is None else (obstacle is not None and words in obstacle)
    if obstacle is not None:
        assert "GPU 1" in obstacle
        assert f"nvidia-smi -i {UUIDS[1]}" in obstacle


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        (None, None),
        ("", None),
        ("0,GPU-aaaa", None),
        ("MIG-5c2e5a2b", "MIG-5c2e5a2b"),
        ("MIG-GPU-aaaa1111/1/0,MIG-GPU-aaaa1111/2/0", "MIG-GPU-aaaa1111/1/0"),
        ("0, MIG-17 ,1", "MIG-17"),
        ("0,9,MIG-17", None),  # CUDA does not come so far
    ],
)
def test_a_part_of_a_gpu_is_named_as_such(setting: str | None, named: str | None) -> None:
    obstacle = nvml.mig_obstacle(FOUR, setting)
    if named is None:
        assert obstacle is None
    else:
        assert obstacle is not None
        assert obstacle.startswith(f"{named} is a part of a GPU that MIG divides, and acb lends whole GPUs; ")


def test_a_gpu_lost_later_is_said_so(driver: type[FakeNvml]) -> None:
    fake = driver(["a", "b"])
    with nvml.Nvml() as session:
        fake.lost = (1,)
        with pytest.raises(NvmlError, match="GPU 1 does not answer"):
            session.free(1)
        assert session.free(0) == 0


# --- the broker's GPUs ------------------------------------------------------------------------------------------------


def test_a_pool_of_all_or_of_those_chosen(driver: type[FakeNvml]) -> None:
    driver(["a", "b", "c"])
    everything = pool.real(None)
    assert [(g.ordinal, g.capacity, g.visible) for g in everything.gpus] == [
        (n, (n + 1) << 30, UUIDS[n]) for n in range(3)
    ]
    assert everything.description == "a (1GiB), b (2GiB), c (3GiB)"
    assert [gpu.visible for gpu in pool.real(["all"]).gpus] == UUIDS[:3]
    assert [gpu.ordinal for gpu in pool.real(["2", UUIDS[0]]).gpus] == [2, 0]
    entries = [f"{n}={uuid}" for n, uuid in enumerate(UUIDS[:3])]
    assert everything.environment == {"ACB_DEVICES": ",".join(entries)}
    assert pool.real(["1"]).environment == {"ACB_DEVICES": f"-{entries[0]},{entries[1]},-{entries[2]}"}


def test_what_the_driver_keeps_for_itself_is_not_lent_nor_shown(driver: type[FakeNvml]) -> None:
    fake = driver(["a", "b"])
    fake.reserved = [480 << 20, 512 << 20]
    lent = pool.real(None)
    assert [gpu.capacity for gpu in lent.gpus] == [544 << 20, 1536 << 20]
    assert lent.description == "a (544MiB), b (1.5GiB)"
    assert parse_pool(lent.variables()["ACB_POOL"]) == [544 << 20, 1536 << 20]
    assert [device.capacity for device in doctor.look().devices] == [544 << 20, 1536 << 20]
    fake.knows_reserved = False
    assert [gpu.capacity for gpu in pool.real(None).gpus] == [1 << 30, 2 << 30]


def test_gpus_of_one_kind_count_alike_although_their_drivers_keep_a_little_more_or_less(driver: type[FakeNvml]) -> None:
    fake = driver(["H100", "H100", "other"])
    fake.reserved = [480 << 20, (480 << 20) + (1 << 30) + 4096, 0]  # the fake's GPUs are of 1, 2 and 3 GiB
    first, second, other = pool.real(None).gpus
    assert first.capacity == second.capacity == (544 << 20) - 4096
    assert migration.alike(first, second)
    assert other.capacity == 3 << 30


@pytest.mark.parametrize("chosen", [["3"], ["0", "GPU-x"], ["-1"], ["GPU-a"]])
def test_unknown_gpus_are_refused_with_those_there_are(driver: type[FakeNvml], chosen: list[str]) -> None:
    driver(["a", "b"])
    with pytest.raises(ConfigError) as caught:
        pool.real(chosen)
    assert caught.value.status == 65
    assert chosen[-1] in str(caught.value)
    assert UUIDS[1] in str(caught.value)


def test_no_gpu_at_all_is_a_status_of_its_own(driver: type[FakeNvml], monkeypatch: pytest.MonkeyPatch) -> None:
    driver(["a"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match="simulate one") as caught:
        pool.real(None)
    assert caught.value.status == 69
    driver([], fails="init")
    with pytest.raises(ConfigError, match="simulate one") as caught:
        pool.real(["0"])
    assert caught.value.status == 69


def test_a_job_with_a_part_of_a_gpu_is_told_of_mig(driver: type[FakeNvml], monkeypatch: pytest.MonkeyPatch) -> None:
    driver(["a"])
    with pytest.raises(ConfigError, match=r"MIG-17 is a part of a GPU .* whole GPU") as caught:
        pool.real(["MIG-17"])
    assert caught.value.status == 69
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-5c2e5a2b")
    with pytest.raises(ConfigError, match=r"MIG-5c2e5a2b is a part of a GPU .* whole GPU.* simulate one") as caught:
        pool.real(None)
    assert caught.value.status == 69
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,MIG-5c2e5a2b")
    assert [gpu.visible for gpu in pool.real(None).gpus] == UUIDS[:1]


def test_a_gpu_that_cannot_be_lent_is_left_out_or_refused(driver: type[FakeNvml]) -> None:
    fake = driver(["a", "b"])
    fake.nvmlDeviceGetMigMode = lambda handle: [1 - handle, 0]  # type: ignore[attr-defined]
    assert [gpu.ordinal for gpu in pool.real(None).gpus] == [1]
    assert [gpu.ordinal for gpu in pool.real(["1"]).gpus] == [1]
    with pytest.raises(ConfigError, match="divided by MIG") as caught:
        pool.real(["1", "0"])
    assert caught.value.status == 69
    fake.nvmlDeviceGetMigMode = lambda handle: [1, 1]  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"GPU 0 .* divided by MIG"):
        pool.real(None)
