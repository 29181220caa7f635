"""A framework that is older than what its hooks know runs without acb."""

from __future__ import annotations

import pytest

from acb.hooks import numbers, require


@pytest.mark.parametrize("version", ["2.2.2+cu121", "1.13.1", "2.2.0rc1"])
def test_what_is_too_old_is_named_with_what_to_do(version: str) -> None:
    with pytest.raises(RuntimeError, match=r"is older than 2.3, .* update torch"):
        require("torch", version)


@pytest.mark.parametrize("version", ["2.3.0", "2.13.0+cpu", "3.0", "2.14.0a0+git12"])
def test_what_is_new_enough_is_let_in(version: str) -> None:
    require("torch", version)


def test_numbers_end_where_a_version_is_no_number() -> None:
    assert numbers("2.14.0a0+git12") == (2, 14, 0)
    assert numbers("0.4.30.dev20260101") == (0, 4, 30)
    assert numbers("unknown") == ()
