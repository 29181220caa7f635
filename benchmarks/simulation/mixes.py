"""Workload mixes: what programs do, as lists of phases, pseudo-random and the same for the same seed.

Each kind is a function from a random number generator and a length (1.0: as described) to a job. Shapes and figures are
typical ones, from the sources named; where there is none they are assumptions, and say so.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

GiB = 1 << 30

GPU, CPU, WAIT = "gpu", "cpu", "wait"
"""A phase computes on the GPU, on a core, or waits for something outside of the machine."""

GPU_SHARE = 0.345
"""Of an AlphaFold2 job's time alone: Fujitsu's broker made four at once 2.9 times as fast as one after the other, which
is all that four can gain when this share of their time excludes the others (1 / 0.345)."""


class Phase(NamedTuple):
    """`seconds` of one kind of work. A `marked` pause is one that the program's own calls tell acb of."""

    kind: str
    seconds: float
    marked: bool = False


class Job(NamedTuple):
    """One process. `memory`: bytes it has on the GPU at its peak, `kept`: between regions, from its first one on.

    `region`: seconds between two safe points inside a GPU phase. `hint`: what acb-launch --gpu-memory says, 0: nothing.
    """

    kind: str
    phases: tuple[Phase, ...]
    memory: int
    kept: int
    region: float = 0.05
    arrival: float = 0.0
    hint: int = 0
    priority: int = 0
    weight: float = 1.0

    @property
    def gpu_seconds(self) -> float:
        """Seconds of its phases on the GPU."""
        return sum(phase.seconds for phase in self.phases if phase.kind == GPU)

    @property
    def cpu_seconds(self) -> float:
        """Seconds of its phases on a core."""
        return sum(phase.seconds for phase in self.phases if phase.kind == CPU)

    @property
    def alone(self) -> float:
        """Seconds that it takes with a machine to itself."""
        return sum(phase.seconds for phase in self.phases)


def alphafold2(rng: random.Random, length: float = 1.0) -> Job:
    """Six targets, each a database search and then five models, with some preparing and relaxing after each.

    Lengths: log-normal about 350 residues, as proteins' are, less the longest. A model takes 1.1 min at 384 residues
    and 0.6 min at 256, on a V100 without ensembling (Jumper et al., Nature 596, 2021, methods): the power 1.5 of the
    length. 60 to 70 % of the time is the CPU's, 65.5 on average; nine tenths of that are the search, a child process,
    which acb sees. A model is one call and so one region: it cannot be cut. Memory: 10 GiB, so that four run out of a
    V100's 16 or 32.
    """
    phases = []
    longest = 0.0
    for _ in range(max(1, round(6 * length))):
        residues = min(600.0, max(100.0, rng.lognormvariate(5.86, 0.35)))
        model = 66.0 * (residues / 384) ** 1.5
        share = GPU_SHARE + rng.uniform(-0.045, 0.045)
        cpu = 5 * model * (1 - share) / share
        phases.append(Phase(CPU, 0.9 * cpu, marked=True))
        for _ in range(5):
            phases += [Phase(GPU, model), Phase(CPU, 0.02 * cpu)]
        longest = max(longest, model)
    return Job("alphafold2", tuple(phases), 10 * GiB, 10 * GiB, region=longest)


def video(rng: random.Random, length: float = 1.0) -> Job:
    """A detector: 2000 batches of frames; each 20 to 40 ms on the GPU between 40 to 80 ms of decoding and drawing.

    An assumption: a small detector's time for eight frames, and OpenCV's on one core for the same at 1080p. Nothing
    marks the pauses: acb must learn them.
    """
    phases = []
    for _ in range(max(1, round(2000 * length))):
        phases += [Phase(CPU, rng.uniform(0.03, 0.06)), Phase(GPU, rng.uniform(0.02, 0.04))]
        phases.append(Phase(CPU, rng.uniform(0.01, 0.02)))
    return Job("video", tuple(phases), 2 * GiB, int(1.5 * GiB), region=0.01)


def training(rng: random.Random, length: float = 1.0) -> Job:
    """2000 steps of 0.2 to 0.5 s, of one length in a job, with gaps in which data is loaded, and a checkpoint every
    100.

    An assumption: loading takes 5 to 40 % of a step, and every tenth gap thrice that. A step is forward, backward and
    optimizer: several regions. Optimizer state and activations make 14 GiB, of which the allocator keeps all but one.
    """
    step, share = rng.uniform(0.2, 0.5), rng.uniform(0.05, 0.4)
    phases = []
    for number in range(max(1, round(2000 * length))):
        loading = step * share * rng.uniform(0.8, 1.2) * (3 if rng.random() < 0.1 else 1)
        phases += [Phase(CPU, loading), Phase(GPU, step)]
        if number % 100 == 99:
            phases.append(Phase(CPU, rng.uniform(10, 20), marked=True))
    return Job("training", tuple(phases), 14 * GiB, 13 * GiB, region=step / 4)


def serving(rng: random.Random, length: float = 1.0) -> Job:
    """A language model that answers 80 requests, 30 s apart on average: sparse, sporadic, large, and in a hurry.

    An assumption: 14 billion parameters at two bytes make 26 GiB with the cache; 50 to 400 tokens at 30 ms each, a
    region a token; requests come as they come (exponential), the next one only after the answer.
    """
    phases = []
    for _ in range(max(1, round(80 * length))):
        phases += [Phase(WAIT, rng.expovariate(1 / 30)), Phase(GPU, 0.03 * rng.randint(50, 400))]
    return Job("serving", tuple(phases), 28 * GiB, 28 * GiB, region=0.03, priority=1)


def mixed(rng: random.Random, length: float = 1.0) -> Job:
    """One of the others: 40 % alphafold2, 25 % training, 20 % video, 15 % serving (an assumption)."""
    [kind] = rng.choices((alphafold2, training, video, serving), (40, 25, 20, 15))
    return kind(rng, length)


MIXES: dict[str, Callable[[random.Random, float], Job]] = {
    "alphafold2": alphafold2, "video": video, "training": training, "serving": serving, "mixed": mixed,
}  # fmt: skip


def jobs(mix: str, numbers: range, seed: int, length: float = 1.0) -> Iterator[Job]:
    """The jobs of these numbers: a job depends on its number and the seed, not on the others.

    They arrive within the first minute: a batch system starts them, but not all in the same millisecond.
    """
    for number in numbers:
        rng = random.Random(f"{seed} {mix} {number}")
        arrival = rng.uniform(0, 60)
        yield MIXES[mix](rng, length)._replace(arrival=arrival)
