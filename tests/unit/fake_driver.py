"""A CUDA driver and an NVML for tests: processes with memory on GPUs, which fail where they are told to."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from acb.devices.checkpoint import Checkpointer
from acb.devices.cuda import CudaError, CudaUnavailable, Result, State, result_name
from acb.devices.nvml import NvmlError

GIB = 1 << 30
A, B = "GPU-aaaaaaaa-0000-0000-0000-000000000000", "GPU-bbbbbbbb-0000-0000-0000-000000000000"


@dataclass
class FakeDriver:
    """`fails`: CUresult by call; `then`: the state in which a failing call leaves the process (else: as it was)."""

    fails: dict[str, int] = field(default_factory=dict)
    then: dict[str, int] = field(default_factory=dict)
    states: dict[int, int] = field(default_factory=dict)
    cuda: int = 13000
    missing: bool = False
    calls: list[tuple[object, ...]] = field(default_factory=list)
    gpus: Sequence[str] = (A, B)
    moved: dict[int, dict[str, str]] = field(default_factory=dict)
    """By process: on which GPU it is instead of another."""
    during_checkpoint: Callable[[], object] = lambda: None

    def version(self) -> int:
        return self.cuda

    def devices(self) -> list[str]:
        return list(self.gpus)

    def state(self, pid: int) -> int:
        self._call("state", pid)
        return self.states.get(pid, State.RUNNING)

    def restore_thread(self, pid: int) -> int:
        return pid

    def lock(self, pid: int, timeout_ms: int) -> None:
        self._call("lock", pid, timeout_ms)
        self._step("Lock", pid, State.RUNNING, State.LOCKED)

    def checkpoint(self, pid: int) -> None:
        self._call("checkpoint", pid)
        self._step("Checkpoint", pid, State.LOCKED, State.CHECKPOINTED)
        self.during_checkpoint()

    def restore(self, pid: int, pairs: Sequence[tuple[str, str]] = ()) -> None:
        self._call("restore", pid, *pairs)
        self._step("Restore", pid, State.CHECKPOINTED, State.LOCKED)
        before = self.moved.get(pid, {})
        self.moved[pid] = {**dict(pairs), **{gpu: dict(pairs).get(now, now) for gpu, now in before.items()}}

    def unlock(self, pid: int) -> None:
        self._call("unlock", pid)
        self._step("Unlock", pid, State.LOCKED, State.RUNNING)

    def made(self) -> list[object]:
        """The calls that change something."""
        return [call[0] for call in self.calls if call[0] != "state"]

    def _call(self, name: str, pid: int, *rest: object) -> None:
        self.calls.append((name, pid, *rest))
        if self.missing:
            raise CudaUnavailable(f"this NVIDIA driver has no {name}; it exists since driver 570")
        code = self.fails.get(name, 0)
        if code:
            self.states[pid] = self.then.get(name, self.states.get(pid, State.RUNNING))
            raise CudaError(name, code, result_name(code))

    def _step(self, name: str, pid: int, before: int, after: int) -> None:
        if self.states.get(pid, State.RUNNING) != before:
            raise CudaError(name, Result.ILLEGAL_STATE, result_name(Result.ILLEGAL_STATE))
        self.states[pid] = after


@dataclass
class FakeMemory:
    """One GPU of 80 GiB after the other; the process's memory is there unless it is checkpointed."""

    driver: FakeDriver
    held: dict[int, dict[str, int]] = field(default_factory=dict)
    overhead: int = 0
    others: dict[str, int] = field(default_factory=dict)
    knows_pids: bool = True
    silent: bool = False

    def free(self, which: str, /) -> int:
        if self.silent:
            raise NvmlError(f"GPU {which} does not answer")
        there = [pid for pid in self.held if self.driver.states.get(pid, State.RUNNING) != State.CHECKPOINTED]
        used = sum(self._sizes(pid).get(which, 0) + self.overhead * (which in self._sizes(pid)) for pid in there)
        return 80 * GIB - used - self.others.get(which, 0)

    def most(self, which: str, /) -> int:
        return 80 * GIB

    def processes(self, which: str, /) -> dict[int, int | None]:
        if self.silent:
            raise NvmlError(f"GPU {which} does not answer")
        found = {pid: self._sizes(pid) for pid in self.held if self.knows_pids}
        return {pid: sizes[which] for pid, sizes in found.items() if which in sizes}

    def _sizes(self, pid: int) -> dict[str, int]:
        places = self.driver.moved.get(pid, {})
        return {places.get(gpu, gpu): size for gpu, size in self.held[pid].items()}


class HangingDriver(FakeDriver):
    """Never comes back from a checkpoint."""

    def checkpoint(self, pid: int) -> None:
        signal.pause()


class CrashingOnceDriver(FakeDriver):
    """Brings a process back and takes its own with it, once; CRASHED is a file that says that it has."""

    def restore(self, pid: int, pairs: Sequence[tuple[str, str]] = ()) -> None:
        super().restore(pid, pairs)
        crashed = os.environ["CRASHED"]
        if not os.path.exists(crashed):
            with open(crashed, "w") as file:
                json.dump(pairs, file)
            os.kill(os.getpid(), signal.SIGKILL)

    def state(self, pid: int) -> int:
        if os.path.exists(os.environ["CRASHED"]):
            self.states.setdefault(pid, State.LOCKED)
        return super().state(pid)


class CrashingDriver(FakeDriver):
    """Takes its process with it."""

    def checkpoint(self, pid: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class LosingDriver(FakeDriver):
    """Takes its process with it, once; then the states are those of "afterwards", one a look, the last for good."""

    def checkpoint(self, pid: int) -> None:
        if os.path.exists(os.environ["CRASHED"]):
            return super().checkpoint(pid)
        with open(os.environ["CRASHED"], "w"):
            os.kill(os.getpid(), signal.SIGKILL)

    def state(self, pid: int) -> int:
        afterwards = json.loads(os.environ["FAKE_DRIVER"])["afterwards"]
        if os.path.exists(os.environ["CRASHED"]):
            with open(os.environ["CRASHED"], "a+") as looks:
                self.states[pid] = afterwards[min(looks.tell(), len(afterwards) - 1)]
                looks.write(".")
        return super().state(pid)


class CrashingAtRestore(FakeDriver):
    """Takes its process with it, always, and the program's memory is where it was."""

    def restore(self, pid: int, pairs: Sequence[tuple[str, str]] = ()) -> None:
        if crashed := os.environ.get("CRASHED"):
            open(crashed, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)

    def state(self, pid: int) -> int:
        self.states.setdefault(pid, State.CHECKPOINTED)
        return super().state(pid)


class SilentAfterRestore(CrashingAtRestore):
    """And from then on it does not tell where that is."""

    def state(self, pid: int) -> int:
        if os.path.exists(os.environ["CRASHED"]):
            self.fails["state"] = Result.UNKNOWN
        return super().state(pid)


class FailingAtRestore(SilentAfterRestore):
    """Its process survives it."""

    def restore(self, pid: int, pairs: Sequence[tuple[str, str]] = ()) -> None:
        open(os.environ["CRASHED"], "w").close()
        raise CudaError("restore", Result.UNKNOWN, result_name(Result.UNKNOWN))


def tier() -> Checkpointer:
    """For the helper's process: what FAKE_DRIVER in the environment describes."""
    scenario = json.loads(os.environ.get("FAKE_DRIVER", "{}"))
    if scenario.get("none"):
        raise CudaUnavailable("there is no CUDA driver here")
    if scenario.get("hangs_at_start"):
        signal.pause()
    kinds = {
        "hangs": HangingDriver,
        "crashes": CrashingDriver,
        "crashes once": CrashingOnceDriver,
        "crashes at restore": CrashingAtRestore,
        "silent after restore": SilentAfterRestore,
        "fails at restore": FailingAtRestore,
        "loses": LosingDriver,
    }
    kind = kinds.get(scenario.get("kind", ""), FakeDriver)
    driver = kind(fails=scenario.get("fails", {}), then=scenario.get("then", {}), cuda=scenario.get("cuda", 13000))
    held = {int(pid): sizes for pid, sizes in scenario.get("held", {}).items()}
    if scenario.get("noise"):
        print("the driver prints this on stdout", flush=True)
    return Checkpointer(
        driver, FakeMemory(driver, held, **{k: scenario[k] for k in ("others", "knows_pids") if k in scenario})
    )


def real_calls() -> Checkpointer:
    """For the helper's process: the real calls of whatever libcuda is found, and a GPU with room for everybody."""
    from acb.devices.cuda import LibCuda

    return Checkpointer(LibCuda(), FakeMemory(FakeDriver()))
