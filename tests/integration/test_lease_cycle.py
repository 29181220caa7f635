"""Real programs take turns on one GPU: grants, evacuation, restoring, preemption, more room, refusals."""

from __future__ import annotations

from broker_harness import MIB, Site


def test_two_programs_that_do_not_fit_together_take_turns(site: Site) -> None:
    site.start("1x64MiB", "--quantum", "0")
    first, second, third = (site.program() for _ in range(3))
    for program in (first, second, third):
        program.begin("take_turns", 15, 40 * MIB)
    for program in (first, second, third):
        program.end("take_turns")
    report = site.report()
    assert report is not None
    assert report["totals"]["evacuations"] >= 2
    assert report["totals"]["evacuated_bytes"] >= 2 * 40 * MIB
    assert site.violations() == []
    for program in (first, second, third):
        assert program.finish() == 0
        assert program.errors == ""
