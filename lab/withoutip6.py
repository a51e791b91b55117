"""A kernel without ip6_tables, for one thread and the processes that it starts: seccomp answers for the kernel.

Legacy ip6tables, and whoever asks what its tables hold, does so with socket options of IPPROTO_IPV6 that the kernel
does not know as long as ip6_tables is not there. Those are answered as the kernel would; everything else works.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from errno import ENOPROTOOPT
from typing import TypeVar

T = TypeVar("T")

_GETSOCKOPT_SETSOCKOPT = {"x86_64": (55, 54), "aarch64": (209, 208)}  # asm/unistd.h
_IPPROTO_IPV6 = 41
_OPTIONS = (64, 65)  # IP6T_SO_GET_INFO and _GET_ENTRIES, IP6T_SO_SET_REPLACE and _SET_ADD_COUNTERS
# linux/seccomp.h, linux/bpf_common.h
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_LOAD_WORD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_NUMBER_AT, _LEVEL_AT, _OPTION_AT = 0, 24, 32  # of struct seccomp_data: the call, its second and its third argument
_libc = ctypes.CDLL(None, use_errno=True)


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_ushort), ("yes", ctypes.c_ubyte), ("no", ctypes.c_ubyte), ("k", ctypes.c_uint))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("first", ctypes.POINTER(_Instruction)))


def without_ip6tables(function: Callable[[], T]) -> T:
    """Run `function` where ip6_tables is missing, on a thread that ends with it; return or raise what it does."""

    def work() -> T:
        _filter_this_thread()
        return function()

    with ThreadPoolExecutor(1, "without-ip6") as thread:
        return thread.submit(work).result()


def _filter_this_thread() -> None:
    get, put = _GETSOCKOPT_SETSOCKOPT[platform.machine()]
    instructions = [
        _Instruction(_LOAD_WORD, 0, 0, _NUMBER_AT),
        _Instruction(_JUMP_IF_EQUAL, 1, 0, get),
        _Instruction(_JUMP_IF_EQUAL, 0, 5, put),
        _Instruction(_LOAD_WORD, 0, 0, _LEVEL_AT),
        _Instruction(_JUMP_IF_EQUAL, 0, 3, _IPPROTO_IPV6),
        _Instruction(_LOAD_WORD, 0, 0, _OPTION_AT),
        _Instruction(_JUMP_IF_EQUAL, 2, 0, _OPTIONS[0]),
        _Instruction(_JUMP_IF_EQUAL, 1, 0, _OPTIONS[1]),
        _Instruction(_RETURN, 0, 0, _ALLOW),
        _Instruction(_RETURN, 0, 0, _ERRNO | ENOPROTOOPT),
    ]
    program = _Program(len(instructions), (_Instruction * len(instructions))(*instructions))
    if _libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program), 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp: {os.strerror(number)}")
