"""Parallel kernels run on torch's own threads.

TVM has its own thread pool. It would compete with torch's OpenMP threads, which keep spinning for a while after each
operation, for the same cores. It also pins its threads, never changes their number, and hangs in a forked child. So the
function through which compiled code starts parallel work is replaced by one that uses the OpenMP runtime that torch has
loaded. `torch.set_num_threads` then applies to kernels too, and every Python thread may call them. A forked child, in
which the OpenMP team of its parent no longer exists, runs alone. `in_team` starts Python functions in the same way.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from tvm_ffi import Module

# What TVM's compiled code calls is ``int launch(int (*task)(int id, Group*, void* data), void* data, int tasks)``, and
# ``Group`` is {void* barrier, int size}. Each member of the team calls the task with its number; the task takes its
# share of the loop from that and the team's size. GOMP_parallel is OpenMP's entry in GCC's runtime, in LLVM's and in
# Intel's; where it is missing, everything runs in the calling thread. The two ``__tvm_ffi_`` functions are for Python:
# the address to register, and the switch for forked children.
LAUNCHER_NAME = "parallel_launch"

LAUNCHER_LLVM = r"""
%group = type { ptr, i32 }
%job = type { ptr, ptr, i32 }
%any = type { i32, i32, i64 }

@alone = internal global i32 0

declare extern_weak void @GOMP_parallel(ptr, ptr, i32, i32)
declare extern_weak i32 @omp_get_thread_num()
declare extern_weak i32 @omp_get_num_threads()

define internal void @member(ptr %job) {
  %group = alloca %group
  %id = call i32 @omp_get_thread_num()
  %size = call i32 @omp_get_num_threads()
  store ptr null, ptr %group
  %size.in.group = getelementptr %group, ptr %group, i32 0, i32 1
  store i32 %size, ptr %size.in.group
  %task = load ptr, ptr %job
  %data.in.job = getelementptr %job, ptr %job, i32 0, i32 1
  %data = load ptr, ptr %data.in.job
  %status = call i32 %task(i32 %id, ptr %group, ptr %data)
  %failed = icmp ne i32 %status, 0
  br i1 %failed, label %tell, label %done
tell:
  %status.in.job = getelementptr %job, ptr %job, i32 0, i32 2
  store atomic i32 %status, ptr %status.in.job monotonic, align 4
  br label %done
done:
  ret void
}

define internal i32 @launch(ptr %task, ptr %data, i32 %tasks) {
  %flag = load i32, ptr @alone
  %forked = icmp ne i32 %flag, 0
  %no.openmp = icmp eq ptr @GOMP_parallel, null
  %one = icmp eq i32 %tasks, 1
  %either = or i1 %forked, %no.openmp
  %any = or i1 %either, %one
  br i1 %any, label %inline, label %team
inline:
  %group = alloca %group
  store ptr null, ptr %group
  %size.in.group = getelementptr %group, ptr %group, i32 0, i32 1
  store i32 1, ptr %size.in.group
  %inline.status = call i32 %task(i32 0, ptr %group, ptr %data)
  ret i32 %inline.status
team:
  %job = alloca %job
  store ptr %task, ptr %job
  %data.in.job = getelementptr %job, ptr %job, i32 0, i32 1
  store ptr %data, ptr %data.in.job
  %status.in.job = getelementptr %job, ptr %job, i32 0, i32 2
  store i32 0, ptr %status.in.job
  call void @GOMP_parallel(ptr @member, ptr %job, i32 0, i32 0)
  %status = load i32, ptr %status.in.job
  ret i32 %status
}

define i32 @__tvm_ffi_launch_address(ptr %self, ptr %args, i32 %count, ptr %result) {
  %value = getelementptr %any, ptr %result, i32 0, i32 2
  store i64 ptrtoint (ptr @launch to i64), ptr %value
  store i32 1, ptr %result
  ret i32 0
}

define i32 @__tvm_ffi_run_alone(ptr %self, ptr %args, i32 %count, ptr %result) {
  store i32 1, ptr @alone
  ret i32 0
}
"""


_Task = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_Launch = ctypes.CFUNCTYPE(ctypes.c_int, _Task, ctypes.c_void_p, ctypes.c_int)
_installed: list[Callable[..., int]] = []  # the launcher, once there is one


def install(launcher: Module) -> None:
    """Let all kernels that are loaded from now on start parallel work through `launcher`, the compiled module of the
    above.

    Call it after TVM's runtime library is loaded, because that registers its own launcher.
    """
    import tvm_ffi.libinfo

    library = ctypes.CDLL(tvm_ffi.libinfo.find_libtvm_ffi())
    address: int = launcher["launch_address"]()
    if library.TVMFFIEnvModRegisterContextSymbol(b"__TVMBackendParallelLaunch", ctypes.c_void_p(address)) != 0:
        raise RuntimeError("TVM's runtime refused the parallel launcher")
    os.register_at_fork(after_in_child=launcher["run_alone"])
    _installed[:] = [_Launch(address)]


def follow_torch() -> None:
    """Let OpenMP in the calling thread use as many threads as torch. Call it before a kernel.

    torch sets the number for a thread when that thread first asks. In a new Python thread, this may not have happened
    yet.
    """
    torch.get_num_threads()


def in_team(work: Callable[[int], None]) -> None:
    """Call ``work(member)`` on each of torch's threads at the same time. Kernels that it calls use that thread alone.

    So threads wait for each other once, not behind each parallel loop of each kernel. Where kernels run in one thread,
    as in a forked child, there is one member.

    Args:
        work: takes the number of the member: 0, 1, ... There are at most as many as torch has threads.

    Raises:
        BaseException: the first one that a member raised, once all have ended.
    """
    raised: list[BaseException] = []

    def task(member: int, _group: int | None, _data: int | None) -> int:
        try:
            work(member)
        except BaseException as error:  # C would drop it
            raised.append(error)
        return 0

    follow_torch()
    if _installed:
        _installed[0](_Task(task), None, 0)
    else:
        task(0, None, None)
    if raised:
        raise raised[0]
