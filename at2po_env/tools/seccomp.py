"""Builds the filter of system calls that the sandbox loads: a list of refusals, everything else is allowed.

The namespaces already keep a program from files, processes and networks. The filter refuses the calls that
could leave them and those that a small program never needs: new namespaces, mounts, tracing, kernel modules,
keys, BPF, io_uring; memory that no process's limit counts (memfd, System V); and sockets other than Unix and
Internet ones, of which some (vsock) reach the host in spite of a network namespace.

A filter is a program of the classic BPF machine; see Linux's Documentation/userspace-api/seccomp_filter.rst.
"""

from __future__ import annotations

import errno
import platform
import struct
import sys

_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # AUDIT_ARCH, column in the table

_REFUSED = {
    **{"ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271)},
    **{"kcmp": (312, 272), "pidfd_getfd": (438, 438), "perf_event_open": (298, 241), "bpf": (321, 280)},
    **{"mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51)},
    **{"open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431)},
    **{"fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442)},
    **{"unshare": (272, 97), "setns": (308, 268), "open_by_handle_at": (304, 265)},
    **{"memfd_create": (319, 279), "memfd_secret": (447, 447), "userfaultfd": (323, 282)},
    **{"shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180)},
    **{"add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219)},
    **{"io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427)},
    **{"init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106)},
    **{"kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142)},
    **{"swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89), "quotactl": (179, 60)},
    **{"syslog": (103, 116), "settimeofday": (164, 170), "clock_settime": (227, 112)},
    **{"sethostname": (170, 161), "setdomainname": (171, 162), "fanotify_init": (300, 262)},
}
"""Name -> number on x86-64, number on ARM64."""
_CLONE, _CLONE3, _SOCKET = (56, 220), (435, 435), (41, 198)
_NEW_NAMESPACE = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET
_AF_UNIX, _AF_INET, _AF_INET6 = 1, 2, 10
_X32 = 0x40000000  # the second table of system calls of x86-64

_LOAD, _EQUALS, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCHITECTURE, _ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data; the low half of argument 0


def seccomp_filter() -> bytes | None:
    """Return the filter for this machine, or None on one whose system calls are not in the table."""
    if sys.platform != "linux" or platform.machine() not in _ARCHITECTURES or sys.maxsize < 2**32:
        return None
    architecture, column = _ARCHITECTURES[platform.machine()]
    code: list[bytes] = []

    def add(operation: int, value: int, if_true: int = 0, if_false: int = 0) -> None:
        """Append an instruction; the last two say how many instructions a comparison skips."""
        code.append(struct.pack("=HBBI", operation, if_true, if_false, value))

    add(_LOAD, _ARCHITECTURE)
    add(_EQUALS, architecture, 1, 0)  # 32-bit calls have other numbers: none is served
    add(_RETURN, _KILL)
    add(_LOAD, _NUMBER)
    add(_AT_LEAST, _X32, 0, 1)
    add(_RETURN, _FAIL | errno.ENOSYS)
    for numbers in _REFUSED.values():
        add(_EQUALS, numbers[column], 0, 1)
        add(_RETURN, _FAIL | errno.EPERM)
    # The flags of clone3 lie in memory, where a filter cannot read them; the C library then takes clone.
    add(_EQUALS, _CLONE3[column], 0, 1)
    add(_RETURN, _FAIL | errno.ENOSYS)
    # The last eleven instructions, by their distance from the end, where everything else is allowed.
    add(_EQUALS, _CLONE[column], 0, 3)  # 10: else go to 6
    add(_LOAD, _ARGUMENT)
    add(_ANY_BIT, _NEW_NAMESPACE, 0, 7)  # 8: else go to 0
    add(_RETURN, _FAIL | errno.EPERM)
    add(_EQUALS, _SOCKET[column], 0, 5)  # 6: else go to 0
    add(_LOAD, _ARGUMENT)
    add(_EQUALS, _AF_UNIX, 3, 0)  # 4: go to 0
    add(_EQUALS, _AF_INET, 2, 0)
    add(_EQUALS, _AF_INET6, 1, 0)
    add(_RETURN, _FAIL | errno.EAFNOSUPPORT)
    add(_RETURN, _ALLOW)  # 0
    return b"".join(code)
