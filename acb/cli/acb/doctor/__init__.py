"""Say what acb can do on this machine, what it cannot, why not, and what to do about it.

It looks at the driver and the GPUs, at this environment's frameworks, at settings that do not go together with acb,
at the host and at the broker. It changes nothing (whether files can be written is tried with one that is gone at
once) and, but for --probe, does not touch a GPU. The exit status is 0 when acb can be used, if only with simulated
GPUs, and 1 when something must be mended first.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from acb._version import __version__
from acb.cli.acb.doctor.check import Check
from acb.cli.command import argument
from acb.cli.output import page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``acb doctor``."""
    from acb.cli.acb.doctor.frameworks import is_file

    parser.add_argument("--json", action="store_true", help="print everything, as one JSON object")
    parser.add_argument(
        "--probe",
        action="store_true",
        help="try on a throw-away process whether the driver can move memory off a GPU (takes seconds)",
    )
    parser.add_argument(
        "--python", metavar="FILE", type=argument(is_file),
        help="look for frameworks in the environment of this Python (default: the one that acb is in)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Look, and print."""
    from acb.cli.acb.doctor import broker, environment, frameworks, gpus, host

    machine = gpus.look()
    usable_gpus = machine.usable()
    found = frameworks.look(options.python)
    probe = gpus.probe(usable_gpus[0]) if options.probe and usable_gpus else None
    tiers = gpus.tiers(machine, frameworks.movable(found), probe)
    report, broker_checks = broker.look()
    checks: list[Check] = [
        *gpus.checks(machine, os.environ),
        *gpus.tier_checks(tiers, machine, probe),
        *frameworks.checks(found, bool(usable_gpus)),
        *environment.checks(os.environ),
        environment.injection(os.environ),
        *host.checks(max((device.capacity for device in usable_gpus), default=0)),
        *broker_checks,
        broker.learning(),
        *broker.lends_simulated(report, len(usable_gpus)),
    ]
    usable = all(check.mark != "fail" for check in checks)
    said = verdict(checks, len(usable_gpus))
    if options.json:
        answer: dict[str, Any] = {
            "acb": __version__,
            "usable": usable,
            "verdict": said,
            **machine.as_json(),
            "tiers": [tier.as_json() for tier in tiers],
            "probe": None if probe is None else probe.as_json(),
            "environment": found,
            "host": host.facts(),
            "broker": None if report is None else broker.facts(report),
            "checks": [check.as_json() for check in checks],
        }
        with page():
            print(json.dumps(answer, indent=2))
    else:
        from acb.cli.acb.doctor.show import show

        with page():
            show(checks, said, usable)
    return 0 if usable else 1


def verdict(checks: list[Check], gpus: int) -> str:
    """The last line: whether acb can be used here, and with what."""
    broken = [check.subject for check in checks if check.mark == "fail"]
    if broken:
        return f"acb cannot be used here before this is mended: {', '.join(dict.fromkeys(broken))}."
    if not gpus:
        return "acb can be used here, with simulated GPUs only."
    return f"acb can be used here, with {'one GPU' if gpus == 1 else f'{gpus} GPUs'}."
