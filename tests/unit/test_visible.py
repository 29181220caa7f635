"""What CUDA_VISIBLE_DEVICES means: the user's word, acb's own, and a parent's."""

from __future__ import annotations

import pytest

from acb.client import visible

POOL = {"ACB_DEVICES": "4=GPU-aaaa,5=GPU-bbbb,-6=GPU-cccc"}
"""A broker that lends two of three GPUs, which are the machine's fifth to seventh."""


@pytest.mark.parametrize("setting", ["", "-1", " -1,0", "NoDevFiles"])
def test_a_user_may_want_the_cpu(setting: str) -> None:
    assert visible.hidden({"CUDA_VISIBLE_DEVICES": setting})
    assert not visible.hidden({"CUDA_VISIBLE_DEVICES": setting, "ACB_SIMULATED": "/somewhere"})


def test_without_a_setting_nothing_is_hidden_or_chosen() -> None:
    assert not visible.hidden(POOL)
    assert not visible.foreign(POOL)
    assert visible.chosen(1, POOL) == ()


@pytest.mark.parametrize(
    ("setting", "ordinals"),
    [("5", (1,)), ("GPU-bb", (1,)), ("6,5", (1,)), ("5,-1,4", (1,)), ("4,5", ()), ("4,5,6", ())],
)
def test_a_setting_that_leaves_some_of_the_brokers_gpus_chooses_among_them(
    setting: str, ordinals: tuple[int, ...]
) -> None:
    assert visible.chosen(1, {**POOL, "CUDA_VISIBLE_DEVICES": setting}) == ordinals
    assert not visible.foreign({**POOL, "CUDA_VISIBLE_DEVICES": setting})


@pytest.mark.parametrize("setting", ["6", "0", "GPU-x", "7,8"])
def test_a_setting_that_names_only_others_takes_the_program_out_of_acbs_hands(setting: str) -> None:
    assert visible.foreign({**POOL, "CUDA_VISIBLE_DEVICES": setting})


def test_what_acb_wrote_for_a_parent_is_nobodys_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (visible.VARIABLE, visible.BOUND, visible.USERS, "ACB_SIMULATED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(visible.POOL, POOL["ACB_DEVICES"])
    monkeypatch.setenv(visible.VARIABLE, "4,5")
    visible.bind("GPU-bbbb")
    assert visible.users() == "4,5"
    assert visible.chosen(1) == ()
    visible.bind("GPU-aaaa")
    assert visible.users() == "4,5"
    monkeypatch.setenv(visible.VARIABLE, "")
    assert visible.hidden()


def test_a_pool_that_cannot_be_read_leaves_the_choice_to_the_broker() -> None:
    for text in ("", "x", "1", "1=GPU-a,?"):
        assert visible.pool({"ACB_DEVICES": text}) == []
        assert visible.chosen(1, {"ACB_DEVICES": text, "CUDA_VISIBLE_DEVICES": "0"}) == ()
