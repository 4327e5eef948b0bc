"""Python functions on torch's threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
import torch

from shiftadd3d.kernels.ops.matadd import add_attention
from shiftadd3d.kernels.runtime.threads import in_team

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.fixture
def two_threads() -> Iterator[None]:
    add_attention(*codes())  # the first kernel of a process installs what starts a team
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def codes() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 45, 32, generator=generator)
    return q, k, v


def test_members_work_at_the_same_time() -> None:
    met = threading.Barrier(2, timeout=60)
    members: list[int] = []

    def work(member: int) -> None:
        met.wait()
        members.append(member)

    in_team(work)
    assert sorted(members) == [0, 1]


def test_kernels_run_inside_and_afterwards() -> None:
    expected = add_attention(*codes())
    outcomes: list[torch.Tensor] = []
    in_team(lambda member: outcomes.append(add_attention(*codes())))
    outcomes.append(add_attention(*codes()))
    assert len(outcomes) == 3
    for outcome in outcomes:
        torch.testing.assert_close(outcome, expected)


@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_a_member_raises_is_raised_once_all_have_ended(culprit: int, error: type[BaseException]) -> None:
    ended: list[int] = []

    def work(member: int) -> None:
        if member == culprit:
            raise error("of a member")
        ended.append(member)

    with pytest.raises(error, match="of a member"):
        in_team(work)
    assert ended == [1 - culprit]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_is_a_team_of_one() -> None:
    in_team(lambda member: None)
    child = os.fork()
    if child == 0:
        members: list[int] = []
        in_team(members.append)
        os._exit(0 if members == [0] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
