"""The driver tier: another process's memory moved off its GPU, and brought back, by the CUDA driver's checkpoint calls.

    running ──lock──▶ locked ──checkpoint──▶ checkpointed ──restore──▶ locked ──unlock──▶ running

Nothing here raises what the driver says: every attempt ends in an Outcome, which names the state that the process is in
*now*. What makes that worth its own module is how it can fail. A lock that times out has changed nothing. A checkpoint
that fails leaves a locked process, which must be unlocked. A restore that fails can leave one that nothing brings back
(NVIDIA/cuda-checkpoint#44), so the room is proved to be free before it is tried.

Call it from a process that is not the target: a thread of the target may block in the driver while it holds the
interpreter's lock. See acb/broker/checkpoint_helper.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from acb.config import format_size
from acb.devices.cuda import MIGRATION_SINCE, CudaError, CudaUnavailable, Driver, Result, State, result_name, state_name
from acb.devices.rooms import Memory, Rooms
from acb.processes import start_time

Problem = Literal[
    "", "gone", "timeout", "unsupported", "forbidden", "foreign", "memory", "state", "room", "map", "driver", "helper"
]
"""Why an attempt was not done.

"gone": there is no such process. "timeout": it did not come to rest. "unsupported": not with this driver, GPU or kind
of memory. "forbidden": this user may not. "foreign": the driver knows no CUDA process of that id. "memory": the host,
or at a restore the GPU, has none left. "state": it is not in a state for it. "room": not proved to be free, so not
tried. "map": the GPUs to restore onto make no sense. "helper": the process that was to do it has died, or hung in the
driver, and was killed; ask for the state. "driver": anything else.
"""

_PROBLEMS: dict[int, Problem] = {
    Result.INVALID_VALUE: "foreign",
    Result.OUT_OF_MEMORY: "memory",
    Result.OPERATING_SYSTEM: "forbidden",
    Result.ILLEGAL_STATE: "state",
    Result.NOT_READY: "timeout",
    Result.NOT_PERMITTED: "forbidden",
    Result.NOT_SUPPORTED: "unsupported",
}

_WORDS: dict[Problem, str] = {
    "foreign": "the driver knows no CUDA process {pid}",
    "memory": "there is not enough memory for process {pid}",
    "forbidden": "the driver, or the operating system, does not let this user act on process {pid}",
    "state": "process {pid} is not in a state for it",
    "timeout": "process {pid} did not come to rest in time",
    "unsupported": "this driver, GPU or kind of memory does not allow it for process {pid}",
    "driver": "the driver failed on process {pid}",
}


@dataclass
class Outcome:
    """What became of an attempt.

    `state`: the process's, as the driver gives it now; "unknown" when it does not. `reason`: a sentence, "" when done.
    `code`: the CUresult of the call that failed, else 0. `moved`: bytes by UUID of the GPU. `seconds`: by call.
    """

    op: str
    pid: int
    done: bool = False
    state: str = "unknown"
    problem: Problem = ""
    reason: str = ""
    code: int = 0
    moved: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For the helper's answers."""
        return asdict(self)

    def fail(self, problem: Problem, reason: str) -> Outcome:
        """This outcome, as one that was not done."""
        self.done, self.problem, self.reason = False, problem, reason
        return self


class Checkpointer:
    """Suspends processes and resumes them. One call at a time."""

    def __init__(self, driver: Driver, memory: Memory | None, clock: Callable[[], float] = time.monotonic) -> None:
        """`memory` None: nothing can be measured, and a resume must be told what it needs and what is free."""
        self._driver = driver
        self._clock = clock
        self._rooms = Rooms(_gpus(driver), memory)
        self._needs: dict[tuple[int, int], dict[str, int]] = {}

    # --- what can be asked for ---------------------------------------------------------------------------------------

    def state(self, pid: int) -> Outcome:
        """Only ask."""
        outcome = Outcome("state", pid)
        if self._present(outcome) and self._ask_state(outcome) is not None:
            outcome.done = True
        return outcome

    def suspend(
        self, pid: int, timeout: float, host_free: int | None = None, claimed: Mapping[str, int] | None = None
    ) -> Outcome:
        """Wait up to `timeout` seconds for the process to come to rest, then move its memory to the host.

        It is stopped at its next CUDA call until resume(). `host_free`: bytes that its host memory can still take; more
        is not begun. `claimed`: bytes by UUID of the GPU that a restore needs at most, which counts where NVML does not
        know the process (None: what has become free does). When it is not done, the process runs on, unless `state`
        says otherwise.
        """
        outcome = Outcome("suspend", pid)
        state = self._begin(outcome)
        if state == State.CHECKPOINTED:
            outcome.done = True
        if state is None or outcome.done:
            return outcome
        if state not in (State.RUNNING, State.LOCKED):
            return outcome.fail("state", _in_state(pid, state))
        held, free = self._rooms.held(pid), self._rooms.free()
        leaving = sum((held or claimed or {}).values())
        if host_free is not None and leaving > host_free:
            words = f"{format_size(leaving)} of process {pid} do not fit into host memory"
            return outcome.fail("memory", f"{words}, of which {format_size(max(0, host_free))} are available")
        if state == State.RUNNING and not self._lock(outcome, timeout):
            return outcome
        if not self._try(outcome, "checkpoint", lambda: self._driver.checkpoint(pid)):
            self._back_out(outcome)
            return outcome
        outcome.done = True
        self._ask_state(outcome)
        outcome.moved = self._rooms.won(held, free, claimed)
        started = start_time(pid)
        if started is not None:
            self._needs[pid, started] = outcome.moved
        return outcome

    def resume(
        self,
        pid: int,
        needs: Mapping[str, int] | None = None,
        free: Callable[[str], int] | None = None,
        gpu_map: Mapping[str, str] | None = None,
        patience: float = 0.0,
    ) -> Outcome:
        """Bring the memory back and let the process go on.

        `needs`: bytes by UUID of the GPU that it was on (None: as suspend() measured); `free(uuid)`: bytes free on a
        GPU (None: NVML's). Nothing is begun before, within `patience` seconds, the room is free. `gpu_map`: on which
        GPU, by UUID, each of its GPUs will be instead.
        """
        outcome = Outcome("resume", pid)
        state = self._begin(outcome)
        if state is None or state == State.RUNNING:
            outcome.done = state is not None
            return outcome
        if state == State.CHECKPOINTED:
            if needs is None:
                needs = self._needs.get((pid, start_time(pid) or 0))
            if not self._map_makes_sense(outcome, gpu_map or {}, needs or {}):
                return outcome
            short = self._rooms.wait(needs or {}, gpu_map or {}, free, self._clock, patience)
            if short:
                return outcome.fail("room", f"process {pid} is not brought back: {short}; it stays checkpointed")
            if not self._restore(outcome, gpu_map):
                return outcome
            outcome.moved = dict(needs or {})
        elif state != State.LOCKED:
            return outcome.fail("state", _in_state(pid, state))
        self._unlock(outcome)
        if outcome.done:
            self._needs.pop((pid, start_time(pid) or 0), None)
        return outcome

    def release(self, pid: int) -> Outcome:
        """Unlock a process that an attempt, or a helper that died, has left locked. Moves no memory."""
        outcome = Outcome("release", pid)
        state = self._begin(outcome)
        if state == State.LOCKED:
            self._unlock(outcome)
        elif state is not None:
            outcome.done = state == State.RUNNING
            if not outcome.done:
                outcome.fail("state", _in_state(pid, state))
        return outcome

    # --- the steps ---------------------------------------------------------------------------------------------------

    def _begin(self, outcome: Outcome) -> int | None:
        """The state that the process is in; None: it cannot be acted on, and the outcome says why."""
        return self._ask_state(outcome) if self._present(outcome) else None

    def _present(self, outcome: Outcome) -> bool:
        if start_time(outcome.pid) is None:
            outcome.fail("gone", f"there is no process {outcome.pid}")
            return False
        return True

    def _ask_state(self, outcome: Outcome) -> int | None:
        """The state now, also noted in the outcome, whose problem is set if there is none yet."""
        found: list[int] = []
        outcome.state = "unknown"
        if not self._try(outcome, "state", lambda: found.append(self._driver.state(outcome.pid))):
            return None
        outcome.state = state_name(found[0])
        return found[0]

    def _lock(self, outcome: Outcome, timeout: float) -> bool:
        milliseconds = max(1, min(round(timeout * 1000), (1 << 32) - 1))  # 0 would wait for ever
        if self._try(outcome, "lock", lambda: self._driver.lock(outcome.pid, milliseconds)):
            return True
        if outcome.problem == "timeout":
            outcome.reason = f"process {outcome.pid} did not come to rest within {timeout:g} s"
        self._back_out(outcome)
        return False

    def _back_out(self, outcome: Outcome) -> None:
        """After a failed lock or checkpoint: let the process run on, and say in which state it is."""
        state = self._ask_state(outcome)
        if state in (State.LOCKED, None):  # where it cannot be asked, an unlock too many does no harm
            self._try(outcome, "unlock", lambda: self._driver.unlock(outcome.pid))
            state = self._ask_state(outcome)
        if state == State.RUNNING:
            outcome.reason += "; it runs on"
        elif state == State.FAILED:
            outcome.reason += "; it cannot go on, end it"
        else:
            outcome.reason += f"; it is left {outcome.state}"

    def _restore(self, outcome: Outcome, gpu_map: Mapping[str, str] | None) -> bool:
        pairs = tuple((gpu_map or {}).items())
        if self._try(outcome, "restore", lambda: self._driver.restore(outcome.pid, pairs)):
            return True
        if self._ask_state(outcome) == State.CHECKPOINTED:
            outcome.reason += "; its memory is safe on the host, and a later attempt may succeed"
        else:
            outcome.reason += f"; it is {outcome.state}, and nothing brings it back: end it"
        return False

    def _unlock(self, outcome: Outcome) -> None:
        if self._try(outcome, "unlock", lambda: self._driver.unlock(outcome.pid)):
            outcome.done = True
            self._ask_state(outcome)
            return
        self._ask_state(outcome)
        if outcome.state == "running":
            outcome.done, outcome.problem, outcome.reason, outcome.code = True, "", "", 0
        else:
            outcome.reason += f"; its memory is on the GPU, but it is still {outcome.state}: try to release it again"

    def _try(self, outcome: Outcome, call: str, function: Callable[[], None]) -> bool:
        """Make one driver call. The first failure is the outcome's; later ones, on the way out, only return False."""
        begun = self._clock()
        try:
            function()
        except CudaUnavailable as error:
            problem: Problem = "unsupported"
            reason, code = str(error), 0
        except CudaError as error:
            problem, code = _PROBLEMS.get(error.code, "driver"), error.code
            reason = f"{_WORDS[problem].format(pid=outcome.pid)} ({error.call}: {error.name or result_name(code)})"
        else:
            return True
        finally:
            outcome.seconds[call] = round(outcome.seconds.get(call, 0.0) + self._clock() - begun, 6)
        if not outcome.problem and not outcome.done:
            outcome.fail(problem, reason)
            outcome.code = code
        return False

    def _map_makes_sense(self, outcome: Outcome, gpu_map: Mapping[str, str], needs: Mapping[str, int]) -> bool:
        if not gpu_map:
            return True
        pid = outcome.pid
        unnamed = [uuid for uuid in needs if uuid not in gpu_map]
        unknown = [uuid for uuid in (*gpu_map, *gpu_map.values()) if uuid not in self._rooms.gpus]
        problem: Problem = "map"
        reason = ""
        if not self._can_migrate():
            problem, reason = "unsupported", "another GPU can be restored onto from NVIDIA driver 580 on only"
        elif unnamed:
            reason = f"every GPU of process {pid} must be named, and {', '.join(unnamed)} is not"
        elif unknown:
            reason = f"there is no GPU {', '.join(unknown)} here to restore process {pid} onto"
        elif len(set(gpu_map.values())) < len(gpu_map):
            reason = f"two GPUs of process {pid} would become one"
        if reason:
            outcome.fail(problem, f"{reason}; nothing has changed")
        return not reason

    def _can_migrate(self) -> bool:
        try:
            return self._driver.version() >= MIGRATION_SINCE
        except (CudaError, CudaUnavailable):
            return False


def _in_state(pid: int, state: int) -> str:
    words = f"process {pid} is {state_name(state)}"
    return f"{words}: it cannot go on, end it" if state == State.FAILED else f"{words}; nothing has changed"


def _gpus(driver: Driver) -> list[str]:
    """UUIDs of the GPUs here; none when the driver does not say."""
    try:
        return driver.devices()
    except (CudaError, CudaUnavailable):
        return []
