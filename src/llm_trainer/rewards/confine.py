"""Taking from a process what code of a model must not have: network, files, other processes. Linux; imports nothing of ours.

Three means, none of which needs privileges, and none of which can be taken back by the process:

- Landlock says which files may be opened (https://docs.kernel.org/userspace-api/landlock.html, Linux 5.13).
- A seccomp filter refuses system calls: sockets, new processes, signals to others, and what Landlock does not see, such as
  the mode of a file (https://docs.kernel.org/userspace-api/seccomp_filter.html).
- Resource limits say how much.
"""

import ctypes
import os
import platform
import resource
import struct
from collections.abc import Sequence
from typing import NamedTuple

_LIBC = ctypes.CDLL(None, use_errno=True)


class Limits(NamedTuple):
    """How much a process may take.

    Attributes:
        seconds: Of processor time.
        memory: Bytes of address space, beyond what the process has already.
        file_bytes: Of one file.
        files: That are open.
    """

    seconds: int
    memory: int
    file_bytes: int = 10_000_000
    files: int = 64


def confine(folder: str, readable: Sequence[str], limits: Limits) -> None:
    """Confine this process, as far as this machine can.

    Args:
        folder: the only one in which it may write.
        readable: files and folders that it may read beside that, such as Python's library.
        limits: how much it may take.

    Raises:
        OSError: something that should work did not.
    """
    _limit(limits)
    _LIBC.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    has_files = landlock_version() > 0
    if has_files:
        _landlock(folder, readable)
    _drop_capabilities()
    if can_filter():
        _seccomp(may_write=has_files)


def _limit(limits: Limits) -> None:
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    for kind, most in (
        (resource.RLIMIT_CPU, limits.seconds),
        (resource.RLIMIT_AS, mapped + limits.memory),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
        (resource.RLIMIT_NOFILE, limits.files),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        if hard != resource.RLIM_INFINITY:
            most = min(most, hard)
        resource.setrlimit(kind, (most, most))


# --- capabilities: root's files are still root's, but nothing beyond

_CAPABILITIES_V3 = 0x20080522  # linux/capability.h


def _drop_capabilities() -> None:
    header = struct.pack("=Ii", _CAPABILITIES_V3, 0)
    _LIBC.capset(header, bytes(24))


# --- Landlock (linux/landlock.h)

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # system calls, the same on all architectures
_PATH_BENEATH = 1
_WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 14
_OF_FILES = 1 << 0 | _WRITE_FILE | _READ_FILE | _TRUNCATE | 1 << 15  # rights that a single file can have
_NUM_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # by version; 16 since 5


def landlock_version() -> int:
    """Of Landlock's interface; 0: this kernel has none, or it is turned off."""
    return max(0, _LIBC.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1))


def _landlock(folder: str, readable: Sequence[str]) -> None:
    # 1. what is forbidden unless a rule allows it: all that this kernel knows
    version = landlock_version()
    rights = (1 << _NUM_RIGHTS.get(version, 16)) - 1
    fields = [rights]
    if version >= 4:
        fields.append(0b11)  # bind and connect, TCP
    if version >= 6:
        fields.append(0b11)  # signals and abstract sockets of others
    attributes = struct.pack(f"={len(fields)}Q", *fields)
    ruleset = _checked(_LIBC.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0))

    # 2. the rules
    _allow(ruleset, folder, rights & ~1)  # all but to execute
    for path in readable:
        _allow(ruleset, path, rights & (_READ_FILE | _READ_DIR))
    _allow(ruleset, os.devnull, rights & (_READ_FILE | _WRITE_FILE))

    # 3. from here on
    _checked(_LIBC.syscall(_RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    if not os.path.isdir(path):
        rights &= _OF_FILES
    rule = struct.pack("=Qi", rights, place)
    _checked(_LIBC.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0))
    os.close(place)


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


# --- seccomp (linux/seccomp.h, linux/filter.h)

_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER_MODE = 38, 22, 2  # linux/prctl.h
_EPERM, _EFAULT, _ENOSYS = 1, 14, 38
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _EQUAL, _ANY_BIT, _AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # places in struct seccomp_data
_CLONE_THREAD = 0x00010000
_OPEN_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

# System calls by number, of x86_64 and of aarch64 (None: it has no such call).
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    # network; io_uring does whatever a filter forbids
    "socket": (41, 198),
    "io_uring_setup": (425, 425),
    # processes
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "kill": (62, 129),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "setpriority": (141, 140),
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    # what stays when the process is gone
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # files, where Landlock does not look
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "setxattrat": (463, 463),
    "removexattrat": (466, 466),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    # the machine
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "quotactl": (179, 60),
    "acct": (163, 89),
}
# Without Landlock nothing may be written at all, not even in the folder: a filter does not see paths.
_WRITES: dict[str, tuple[int | None, int | None]] = {
    "creat": (85, None),
    "truncate": (76, 45),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "rmdir": (84, None),
    "link": (86, None),
    "linkat": (265, 37),
    "symlink": (88, None),
    "symlinkat": (266, 36),
}
# Refused unless an argument says that it is harmless; the libraries fall back where a call is said not to exist.
_CLONE, _CLONE3, _TGKILL, _PRLIMIT = (56, 220), (435, 435), (234, 131), (302, 261)
_OPEN, _OPENAT, _OPENAT2 = (2, None), (257, 56), (437, 437)
_X32 = 0x40000000  # calls of another interface of x86_64, with numbers of their own
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the tables, linux/audit.h


def can_filter() -> bool:
    """Whether this kernel filters system calls, and the tables know its machine."""
    if platform.machine() not in _MACHINES:
        return False
    result = _LIBC.prctl(_SET_SECCOMP, _FILTER_MODE, None, 0, 0)  # there is no filter at None
    return result != 0 and ctypes.get_errno() == _EFAULT


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def _seccomp(may_write: bool) -> None:
    program = seccomp_program(platform.machine(), os.getpid(), may_write)
    whole = _Program(len(program) // 8, program)
    _checked(_LIBC.prctl(_SET_SECCOMP, _FILTER_MODE, ctypes.byref(whole), 0, 0))


def seccomp_program(machine: str, pid: int, may_write: bool) -> bytes:
    """The filter as instructions of the Berkeley Packet Filter, 8 bytes each.

    Args:
        machine: as `platform.machine` says it.
        pid: of the process that it is for, which may send signals to itself.
        may_write: whether something else says which files may be written.
    """
    column, architecture = _MACHINES[machine]
    refuse = _step(_RETURN, _ERRNO | _EPERM)
    allow = _step(_RETURN, _ALLOW)

    def when(call: tuple[int | None, int | None], *then: bytes) -> bytes:
        """The steps `then`, which end the filter, for a system call."""
        number = call[column]
        if number is None:
            return b""
        return _step(_EQUAL, number, 0, len(then)) + b"".join(then)

    def unless(call: tuple[int | None, int | None], argument: int, test: int, value: int) -> bytes:
        """Refuse a call unless a test of one of its arguments holds."""
        load = _step(_LOAD, _ARGUMENTS + 8 * argument)
        return when(call, load, _step(test, value, 1, 0), refuse, allow)

    # 1. the machine that the numbers are of
    steps = [
        _step(_LOAD, _ARCHITECTURE),
        _step(_EQUAL, architecture, 1, 0),
        _step(_RETURN, _KILL),
        _step(_LOAD, _NUMBER),
        _step(_AT_LEAST, _X32, 0, 1),
        refuse,
    ]

    # 2. what is refused
    steps += [when(call, refuse) for call in _REFUSED.values()]
    steps.append(when(_CLONE3, _step(_RETURN, _ERRNO | _ENOSYS)))
    steps.append(unless(_CLONE, 0, _ANY_BIT, _CLONE_THREAD))
    steps.append(unless(_TGKILL, 0, _EQUAL, pid))
    steps.append(unless(_PRLIMIT, 0, _EQUAL, 0))
    if not may_write:
        steps += [when(call, refuse) for call in _WRITES.values()]
        steps.append(when(_OPENAT2, _step(_RETURN, _ERRNO | _ENOSYS)))
        for call, argument in ((_OPEN, 1), (_OPENAT, 2)):
            load = _step(_LOAD, _ARGUMENTS + 8 * argument)
            steps.append(when(call, load, _step(_ANY_BIT, _OPEN_TO_WRITE, 0, 1), refuse, allow))

    # 3. all else
    return b"".join([*steps, allow])


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
