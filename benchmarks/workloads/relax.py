"""Relaxation of a predicted backbone on the CPU with OpenMM, in AlphaFold's way: minimise, restrained, in rounds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import openmm
from numpy.typing import NDArray

# Ideal geometry of the peptide unit (Engh and Huber, 1991), in ångström and degrees.
_WITHIN = {(0, 1): 1.458, (1, 2): 1.525, (2, 3): 1.231}  # N-CA, CA-C, C-O
_PEPTIDE = 1.329  # C-N of the next residue
_ANGLES_WITHIN = {(0, 1, 2): 111.0, (1, 2, 3): 120.1}  # N-CA-C, CA-C-O
_ANGLES_ACROSS = (((1, 0), (2, 0), (0, 1)), 117.2), (((3, 0), (2, 0), (0, 1)), 122.7), (((2, 0), (0, 1), (1, 1)), 121.7)

# Force constants in kJ/mol and nanometres: stiff covalent geometry, a soft core, restraints that give way.
_BOND = 200_000.0
_ANGLE = 500.0
_OMEGA = 40.0
_CORE = 5_000.0
_CORE_RADIUS = 0.30
_CUTOFF = 0.45
_RESTRAINT = 1_000.0
_MASS = {"N": 14.007, "CA": 12.011, "C": 12.011, "O": 15.999}
_TOLERATED = 0.1  # ångström: a bond further from its ideal length counts as a violation


@dataclass(frozen=True)
class Relaxed:
    """A relaxed backbone [residues, 4, 3] in ångström and what became of it.

    Energies are in kJ/mol, under the restraints of the first round; `violations` counts the bonds that are still
    more than 0.1 Å from ideal, `moved` is the root mean square displacement in ångström.
    """

    backbone: NDArray[np.float64]
    energy_before: float
    energy_after: float
    rounds: int
    violations: int
    moved: float


def relax(
    backbone: NDArray[np.floating],
    confidence: NDArray[np.floating],
    *,
    seed: int = 0,
    steps: int = 1_000,
    max_rounds: int = 3,
    threads: int = 1,
) -> Relaxed:
    """Relax a backbone [residues, 4, 3] in ångström; `confidence` [residues], 0 to 100, weighs the restraints.

    A round is a minimisation, `steps` of Langevin dynamics at 300 K that shake a tangled chain loose, and a second
    minimisation. Further rounds follow, with restraints ten times weaker, while bonds are violated. With one
    thread the same input gives the same bytes.
    """
    start = np.asarray(backbone, dtype=np.float64).reshape(-1, 3) / 10.0  # OpenMM counts in nanometres
    start = _apart(start, seed)
    context, integrator = _context(start, np.asarray(confidence, dtype=np.float64), seed, threads)
    before = _energy(context)
    done, violations = 0, 1
    for done in range(1, max_rounds + 1):
        context.setParameter("restraint", _RESTRAINT / 10 ** (done - 1))
        openmm.LocalEnergyMinimizer.minimize(context, 10.0, 200)
        context.setVelocitiesToTemperature(300.0, seed + done)
        integrator.step(steps)
        openmm.LocalEnergyMinimizer.minimize(context, 1.0, 500)
        violations = _violations(_positions(context))
        if not violations:
            break
    context.setParameter("restraint", _RESTRAINT)
    after = _energy(context)
    final = _positions(context)
    moved = float(np.sqrt(((final - start) ** 2).sum(axis=1).mean()) * 10.0)
    return Relaxed(final.reshape(-1, 4, 3) * 10.0, before, after, done, violations, moved)


def _apart(positions: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Shift every atom by up to 0.001 nm: forces between atoms in one place would have no direction."""
    return positions + np.random.default_rng(seed).uniform(-0.001, 0.001, positions.shape)


def _context(
    positions: NDArray[np.float64], confidence: NDArray[np.float64], seed: int, threads: int
) -> tuple[openmm.Context, openmm.Integrator]:
    residues = len(positions) // 4
    system = openmm.System()
    for _ in range(residues):
        for mass in _MASS.values():
            system.addParticle(mass)
    bonds = openmm.HarmonicBondForce()
    pairs = []
    for first, second, length in _bonds(residues):
        bonds.addBond(first, second, length, _BOND)
        pairs.append((first, second))
    system.addForce(bonds)
    system.addForce(_angles(residues))
    system.addForce(_omega(residues))
    system.addForce(_core(4 * residues, pairs))
    system.addForce(_restraints(positions, confidence))
    integrator = openmm.LangevinMiddleIntegrator(300.0, 10.0, 0.001)
    integrator.setRandomNumberSeed(seed + 1)  # 0 would ask OpenMM for a seed of its own
    platform = openmm.Platform.getPlatformByName("CPU")
    properties = {"Threads": str(threads), "DeterministicForces": "true"}
    context = openmm.Context(system, integrator, platform, properties)
    context.setPositions(positions)
    return context, integrator


def _bonds(residues: int) -> list[tuple[int, int, float]]:
    """List the covalent bonds: two atoms and their ideal distance in nanometres."""
    found = [(4 * r + a, 4 * r + b, length / 10) for r in range(residues) for (a, b), length in _WITHIN.items()]
    return found + [(4 * r + 2, 4 * r + 4, _PEPTIDE / 10) for r in range(residues - 1)]


def _angles(residues: int) -> openmm.Force:
    force = openmm.HarmonicAngleForce()
    for r in range(residues):
        for (a, b, c), degrees in _ANGLES_WITHIN.items():
            force.addAngle(4 * r + a, 4 * r + b, 4 * r + c, np.radians(degrees), _ANGLE)
    for r in range(residues - 1):
        for atoms, degrees in _ANGLES_ACROSS:
            a, b, c = (4 * (r + later) + atom for atom, later in atoms)
            force.addAngle(a, b, c, np.radians(degrees), _ANGLE)
    return force


def _omega(residues: int) -> openmm.Force:
    """Hold every peptide bond planar and trans: CA-C-N-CA at 180 degrees."""
    force = openmm.PeriodicTorsionForce()
    for r in range(residues - 1):
        force.addTorsion(4 * r + 1, 4 * r + 2, 4 * r + 4, 4 * r + 5, 1, 0.0, _OMEGA)
    return force


def _core(atoms: int, bonds: list[tuple[int, int]]) -> openmm.Force:
    """Keep atoms that are not bonded over at most three bonds apart: finite even where two coincide."""
    force = openmm.CustomNonbondedForce(f"{_CORE}*step({_CORE_RADIUS}-r)*({_CORE_RADIUS}-r)^2")
    force.setNonbondedMethod(openmm.CustomNonbondedForce.CutoffNonPeriodic)
    force.setCutoffDistance(_CUTOFF)
    for _ in range(atoms):
        force.addParticle([])
    force.createExclusionsFromBonds(bonds, 3)
    return force


def _restraints(positions: NDArray[np.float64], confidence: NDArray[np.float64]) -> openmm.Force:
    """Tie every CA to where the model put it, the more the surer the model was."""
    force = openmm.CustomExternalForce("restraint*weight*((x-x0)^2+(y-y0)^2+(z-z0)^2)")
    force.addGlobalParameter("restraint", _RESTRAINT)
    for name in ("weight", "x0", "y0", "z0"):
        force.addPerParticleParameter(name)
    for residue, score in enumerate(confidence):
        atom = 4 * residue + 1
        force.addParticle(atom, [float(score) / 100.0, *map(float, positions[atom])])
    return force


def _positions(context: openmm.Context) -> NDArray[np.float64]:
    quantities = context.getState(getPositions=True).getPositions(asNumpy=True)
    return np.array(quantities.value_in_unit(openmm.unit.nanometer), dtype=np.float64)


def _energy(context: openmm.Context) -> float:
    energy = context.getState(getEnergy=True).getPotentialEnergy()
    return float(energy.value_in_unit(openmm.unit.kilojoule_per_mole))


def _violations(positions: NDArray[np.float64]) -> int:
    first, second, ideal = (np.array(column) for column in zip(*_bonds(len(positions) // 4), strict=True))
    length = np.linalg.norm(positions[first] - positions[second], axis=1)
    return int((np.abs(length - ideal) * 10.0 > _TOLERATED).sum())
