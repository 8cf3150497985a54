"""Runs foreign programs: in bubblewrap, which is a boundary, or in a plain subprocess, which is none.

In bubblewrap a program has no network. Of the host's files it sees only the system's programs and libraries,
read-only. It has a private folder, processes of its own that end with the call, no rights, and limits on
time, memory, processes, files and output. Where we are root it runs as another user, drawn for the call. It
still talks to the kernel, so a fault of the kernel is a way out; `seccomp.py` makes that way narrower.

In the plain subprocess the limits are set and its process group is killed at the end, and that is all: the
code runs as the same user, sees the file system and can reach the network.

The files that a program leaves in its folder come back as a frozen JSON value and are written again before
the next call. They are the state of a tool, and so part of an episode: forks and snapshots have their own.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import marshal
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from at2po_env.errors import ConfigError, ToolError
from at2po_env.forking.frozen import FrozenDict
from at2po_env.tools import sandbox_inside
from at2po_env.tools.sandbox_inside import Entry, FilesError, read_entries, write_entries
from at2po_env.tools.seccomp import seccomp_filter

Choice = Literal["auto", "bubblewrap", "none"]

MAX_READ = 16 << 20
"""Bytes of output after which a program is stopped."""
SCRATCH_BYTES = 64 << 20
"""Size of /tmp, and of the private folder; files beyond what is kept may be used during a call."""
MAX_PROCESSES = 64
"""Processes and threads in the sandbox."""
END_CHARS = 400
_POLL_S = 0.05
_HOME = "/sandbox"
_NOBODY = 65534
_GIVE = "--perms 0644 --ro-bind-data {}"
_INSIDE = Path(sandbox_inside.__file__).read_text(encoding="utf-8")


class Limits(NamedTuple):
    """The bounds of a call.

    Attributes:
        timeout_s: Seconds of wall-clock time, start included.
        memory_mb: Address space of a process; in bubblewrap also the memory of all processes together.
        max_output: Characters of output that are kept.
        max_files: Files and folders that are kept for the next call.
        max_bytes: Bytes of their contents in all, and of a single file at any time.
    """

    timeout_s: float
    memory_mb: int
    max_output: int
    max_files: int
    max_bytes: int


class Finished(NamedTuple):
    """A call of a program.

    Attributes:
        output: The beginning of what it printed.
        ending: The end of it.
        status: The exit status, or minus the signal.
        stopped: Why the program was stopped; "" when it ended by itself.
        files: The files it left; None when it was stopped or they cannot be kept.
        refusal: Why its files cannot be kept, else "".
    """

    output: str
    ending: str
    status: int
    stopped: str = ""
    files: Mapping[str, Any] | None = None
    refusal: str = ""


class Sandbox:
    """Runs programs under one choice of boundary.

    Args:
        choice: "bubblewrap"; "none"; or "auto": bubblewrap where it works, else none with a warning.
        limits: The bounds of every call.

    Attributes:
        kind: The boundary in use: "bubblewrap" or "none".
        info: `kind` and whether system calls are filtered, for an environment's info.

    Raises:
        ConfigError: Another choice, "bubblewrap" where it does not work (with the reason), or a system
            without process groups (Windows).
    """

    def __init__(self, choice: Choice, limits: Limits) -> None:
        if os.name != "posix":
            raise ConfigError("running programs needs process groups and resource limits: a POSIX system")
        if choice not in ("auto", "bubblewrap", "none"):
            raise ConfigError(f"sandbox={choice!r}: expected 'auto', 'bubblewrap' or 'none'")
        missing = "" if choice == "none" else why_no_bubblewrap()
        if missing and choice == "bubblewrap":
            raise ConfigError(f"sandbox='bubblewrap' does not work here: {missing}")
        if missing:
            _warn_once(missing)
        self.kind = "none" if missing or choice == "none" else "bubblewrap"
        self.limits = limits
        filtered = self.kind == "bubblewrap" and seccomp_filter() is not None
        self.info = FrozenDict({"sandbox": self.kind, "seccomp": filtered})

    def run(self, code: str, files: Any = None, *, shell: bool = False) -> Finished:
        """Run a program over the files of an earlier call; all its processes are gone when this returns.

        Args:
            code: A Python program, or with `shell` a command for the shell.
            files: The `files` of an earlier call; None = an empty folder.
            shell: Whether it is a command.

        Raises:
            ToolError: `files` has another form: it did not come from an earlier call.
        """
        timeout_s, memory_mb, _, most, most_bytes = self.limits
        entries = _load_files(files, self.limits)
        limits = [
            *(("CPU", int(timeout_s) + 1), ("AS", memory_mb << 20), ("FSIZE", most_bytes)),
            *(("NOFILE", 64), ("CORE", 0)),
        ]
        job: dict[str, Any] = {
            "code": code.encode("utf-8", "replace"),
            "shell": _shell() if shell else "",
            "limits": limits,
            "memory": memory_mb << 20,
            "entries": entries,
            "most": most,
            "most_bytes": most_bytes,
            "uid": _free_user() if os.geteuid() == 0 else 0,
        }
        if shell and "\0" in code:
            raise ToolError("a command cannot contain a null character")
        if self.kind == "bubblewrap":
            limits += [("NPROC", MAX_PROCESSES), ("MSGQUEUE", 0)]
            return self._run_inside(job)
        return self._run_plain(job)

    def _run_plain(self, job: dict[str, Any]) -> Finished:
        """Run a program in a process group of its own and a temporary folder."""
        folder = tempfile.mkdtemp(prefix="at2po-sandbox-")
        try:
            write_entries(job["entries"], folder)
            with tempfile.TemporaryFile() as work:
                marshal.dump(job, work)
                work.seek(0)
                command = [*_interpreter(), str(work.fileno()), "-1"]
                with subprocess.Popen(
                    command,
                    cwd=folder,
                    env=_environment(folder),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    pass_fds=[work.fileno()],
                    start_new_session=True,
                ) as process:
                    try:
                        heard = _listen(process, self.limits, None)
                    finally:
                        with contextlib.suppress(ProcessLookupError, PermissionError):
                            os.killpg(process.pid, signal.SIGKILL)
                    status = process.wait()
            done = heard.finished._replace(status=status)
            if done.stopped:
                return done
            try:
                entries = read_entries(folder, job["most"], job["most_bytes"])
                return done._replace(files=_dump_files(entries))
            except FilesError as error:
                return done._replace(refusal=str(error))
        finally:
            _remove(folder)

    def _run_inside(self, job: dict[str, Any]) -> Finished:
        """Run a program in bubblewrap, and read its report."""
        with contextlib.ExitStack() as stack:
            work = stack.enter_context(tempfile.TemporaryFile())
            marshal.dump(job, work)
            work.seek(0)
            report, report_end = _open_pipe(stack)
            born, born_end = _open_pipe(stack)
            command = [*_bubblewrap(os.geteuid() == 0), "--info-fd", str(born_end.fileno())]
            passed = [work, report_end, born_end]
            user = job["uid"] or _NOBODY
            given = {
                f"{_GIVE} /etc/passwd": f"agent:x:{user}:{user}::{_HOME}:/bin/sh\n".encode(),
                f"{_GIVE} /etc/group": f"agent:x:{user}:\n".encode(),
                "--seccomp {}": seccomp_filter(),
            }
            for option, data in given.items():
                if data is not None:
                    source, end = _open_pipe(stack)
                    end.write(data)  # it fits into the pipe's buffer
                    end.close()
                    command += option.format(source.fileno()).split()
                    passed.append(source)
            command += [
                "--remount-ro",
                "/",
                "--",
                *_interpreter(),
                str(work.fileno()),
                str(report_end.fileno()),
            ]
            process = stack.enter_context(
                subprocess.Popen(
                    command,
                    env=_environment(_HOME),
                    stdin=subprocess.PIPE,  # its end tells process 1 that we are gone
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    pass_fds=[file.fileno() for file in passed],
                )
            )
            try:
                report_end.close()
                born_end.close()
                heard = _listen(process, self.limits, report.fileno())
            finally:
                _end_inside(process, born.fileno())
            status = process.wait()
        done = heard.finished._replace(status=status)
        return done if done.stopped else _read_report(heard.report, done, self.limits)


def why_no_bubblewrap() -> str:
    """Return why bubblewrap cannot be used here, with the way to mend it; "" where it can."""
    if sys.platform != "linux":
        return "bubblewrap needs Linux"
    program = shutil.which("bwrap")
    return "bwrap is not installed (apt-get install bubblewrap)" if program is None else _try(program)


@functools.cache
def _try(program: str) -> str:
    """Run a small program in the sandbox, with every option and limit of a real one."""
    del program  # the key of the cache
    trial = object.__new__(Sandbox)
    trial.kind, trial.limits = "bubblewrap", Limits(20.0, 512, 1000, 8, 1 << 20)
    done = trial.run("import os\nif os.fork() == 0: os._exit(0)\nos.wait()\nopen('a', 'w').write('b')")
    if done.status == 0 and done.files == {"a": {"text": "b"}}:
        return ""
    why = done.stopped or done.ending.strip() or done.refusal or f"exit status {done.status}"
    return f"bwrap is installed and failed: {why[-300:]}"


_warned: set[str] = set()


def _warn_once(reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"Programs run in a plain subprocess, which is no security boundary: {reason}. "
            "sandbox='none' accepts this without a warning",
            UserWarning,
            stacklevel=4,
        )


@functools.cache
def _bubblewrap(root: bool) -> tuple[str, ...]:
    """Return the command up to the descriptors, which differ from call to call."""
    program = shutil.which("bwrap")
    assert program is not None
    size = str(SCRATCH_BYTES)
    command = [
        *(
            program,
            "--unshare-ipc",
            "--unshare-pid",
            "--unshare-net",
            "--unshare-uts",
            "--unshare-cgroup-try",
        ),
        *("--die-with-parent", "--new-session", "--as-pid-1", "--hostname", "sandbox", "--cap-drop", "ALL"),
    ]
    if root:  # a real other user instead of a user namespace; the sandbox gives these two rights up at once
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user", "--uid", str(_NOBODY), "--gid", str(_NOBODY)]
    command += ["--size", size, "--perms", "1777", "--tmpfs", "/tmp", "--proc", "/proc", "--dir", "/dev"]
    for name in ("null", "zero", "full", "random", "urandom"):
        command += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    command += ["--symlink", "/proc/self/fd", "/dev/fd", "--symlink", "/tmp", "/dev/shm"]
    # The system's programs and libraries, never the whole of /usr: people keep projects in /usr/src. Packages
    # of Python are covered: they may hold this very project with its golden answers.
    prefixes = list(dict.fromkeys(["/usr", "/usr/local", os.path.realpath(sys.base_prefix)]))
    shown = [Path(p, name) for p in ["/", *prefixes] for name in ("bin", "sbin", "lib", "lib32", "lib64")]
    shown += [Path(p, name) for p in prefixes for name in ("libexec", "share")]
    shown += [Path("/etc/ld.so.cache"), Path("/etc/alternatives")]
    shown = [place for place in shown if place.exists()]
    # Bubblewrap makes the folders above a mount for its own user alone.
    for above in sorted({folder for place in shown for folder in place.parents} - {Path("/")}):
        command += ["--dir", str(above)]
    for place in shown:
        link = place.is_symlink()
        command += ["--symlink", os.readlink(place), str(place)] if link else ["--ro-bind", *[str(place)] * 2]
    for prefix in prefixes:
        for packages in sorted(Path(prefix).glob("lib*/python*/*-packages")):
            if packages.is_dir() and not any(part.is_symlink() for part in (packages, *packages.parents)):
                command += ["--tmpfs", str(packages), "--remount-ro", str(packages)]
    command += ["--size", size, "--perms", "1777", "--tmpfs", _HOME, "--chdir", _HOME]
    return tuple(command)


def _interpreter() -> list[str]:
    # no site-packages, no user site, no bytecode; not isolated (-I), which would ignore PYTHONHASHSEED
    return [os.path.realpath(sys.executable), "-P", "-s", "-S", "-B", "-c", _INSIDE]


def _environment(home: str) -> dict[str, str]:
    places = [os.path.dirname(os.path.realpath(sys.executable)), "/usr/local/bin", "/usr/bin", "/bin"]
    return {
        "PATH": ":".join(dict.fromkeys(places)),
        "LANG": "C.UTF-8",
        "HOME": home,
        "PWD": home,
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }


@functools.cache
def _shell() -> str:
    return "/bin/bash" if os.access("/bin/bash", os.X_OK) else "/bin/sh"


@functools.cache
def _highest_user() -> int:
    """Return the highest user id that exists here: a container may have 65,536 of them."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        first, _, count = map(int, Path("/proc/self/uid_map").read_text().splitlines()[0].split())
        return min(first + count, 1 << 31) - 1
    return 65533


def _free_user() -> int:
    """Draw a user id for one call, so that the limit on processes counts this call's alone."""
    return _highest_user() - secrets.randbelow(20_000)


def _open_pipe(stack: contextlib.ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    """Return the reading and the writing end of a pipe; both are closed with the stack."""
    reads, writes = os.pipe()
    return (
        stack.enter_context(open(reads, "rb", buffering=0)),
        stack.enter_context(open(writes, "wb", buffering=0)),
    )


class _Heard(NamedTuple):
    finished: Finished
    report: bytes


def _listen(process: subprocess.Popen[bytes], limits: Limits, report: int | None) -> _Heard:
    """Read output and report until both end, a bound is reached, or the program is gone and all is read."""
    deadline = time.monotonic() + limits.timeout_s
    keep = limits.max_output * 4 + 1  # a character has at most four bytes
    most_report = limits.max_bytes + limits.max_files * 8192 + 4096
    head, end, size, stopped = bytearray(), b"", 0, ""
    told = bytearray()
    assert process.stdout is not None
    output = process.stdout.fileno()
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        if report is not None:
            selector.register(report, selectors.EVENT_READ)
        while selector.get_map() and not stopped:
            gone = process.poll() is not None
            left = deadline - time.monotonic()
            if left <= 0 and not gone:
                stopped = f"timed out after {limits.timeout_s:g} s"
                break
            ready = selector.select(0.0 if gone else min(_POLL_S, left))
            if gone and not ready:  # a process it left behind holds the pipe open
                break
            for key, _ in ready:
                part = os.read(key.fd, 65536)
                if not part:
                    selector.unregister(key.fd)
                elif key.fd == output:
                    head += part[: keep - len(head)]
                    end = (end + part)[-4 * END_CHARS :]
                    size += len(part)
                    if size >= MAX_READ:
                        stopped = f"stopped after {MAX_READ >> 20} MiB of output"
                else:
                    told += part
                    if len(told) > most_report:
                        stopped = "stopped: its report is too long"
    if not stopped:  # it may have closed its output and gone on
        try:
            process.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            stopped = f"timed out after {limits.timeout_s:g} s"
    return _Heard(Finished(*_decode(bytes(head), end, limits.max_output), 0, stopped), bytes(told))


def _decode(head: bytes, end: bytes, most: int) -> tuple[str, str]:
    """Return the beginning and the end of the output as text."""
    shown = head.decode("utf-8", "replace")
    if len(shown) > most:
        shown = shown[:most].rstrip() + "\n[output cut]"
    return shown.rstrip(), end.decode("utf-8", "replace").rstrip()[-END_CHARS:]


def _end_inside(process: subprocess.Popen[bytes], born: int) -> None:
    """End a sandbox that still runs: kill its process 1, with which the kernel ends the others, and wait."""
    if process.poll() is not None:
        return
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        os.set_blocking(born, False)
        first = json.loads(os.read(born, 4096))["child-pid"]
        handle = os.pidfd_open(first)
        try:  # the number may belong to another process by now, unless bubblewrap is its parent
            stat = Path(f"/proc/{first}/stat").read_text(errors="replace")
            if int(stat.rpartition(")")[2].split()[1]) == process.pid:
                signal.pidfd_send_signal(handle, signal.SIGKILL)
                process.wait(10.0)
        except subprocess.TimeoutExpired:
            pass
        finally:
            os.close(handle)
    process.kill()  # --die-with-parent takes along what is left


def _read_report(report: bytes, done: Finished, limits: Limits) -> Finished:
    """Add what process 1 reports; nothing in it is trusted."""
    try:
        head, _, rest = report.partition(b"\n")
        status, why, count, refusal = head.decode().split(" ", 3)
        if why == "memory":
            return done._replace(stopped=f"stopped: its processes held more than {limits.memory_mb} MB")
        if int(count) > limits.max_files:
            raise ValueError("it has too many entries")
        entries: list[Entry] = []
        for _ in range(int(count)):
            line, _, rest = rest.partition(b"\n")
            kind, name_bytes, data_bytes = line.decode().split(" ")
            path, end = int(name_bytes), int(name_bytes) + int(data_bytes)
            if not 0 < path <= end <= len(rest):
                raise ValueError("a length is wrong")
            entries.append((kind, rest[:path].decode(), rest[path:end]))
            rest = rest[end:]
        files = _dump_files(entries)
        _load_files(files, limits)
    except (ValueError, ToolError):
        why = "the sandbox failed" if not report else "the sandbox gave a damaged report"
        return done._replace(stopped=why)
    if refusal:
        return done._replace(status=int(status), refusal=refusal[:200])
    return done._replace(status=int(status), files=files)


def _dump_files(entries: list[Entry]) -> FrozenDict:
    """Return entries as the JSON value that a tool keeps: path -> content."""
    files: dict[str, FrozenDict] = {}
    for kind, path, data in entries:
        item: dict[str, Any]
        if kind == "folder":
            item = {"folder": True}
        else:
            try:
                item = {"link" if kind == "link" else "text": data.decode()}
            except UnicodeDecodeError:
                item = {"base64": base64.b64encode(data).decode()}
            if kind == "run":
                item["run"] = True
        files[path] = FrozenDict(item)
    return FrozenDict(sorted(files.items()))


def _load_files(files: Any, limits: Limits) -> list[Entry]:
    """Return the entries that `_dump_files` wrote.

    The value may come from a snapshot of anybody: no path leaves the folder, directly or through a link.

    Raises:
        ToolError: It has another form or leaves the limits.
    """
    entries: list[Entry] = []
    places = set[str]()
    try:
        for path, item in sorted(({} if files is None else files).items()):
            parts = path.split("/")
            if len(path.encode()) > 4000 or "\0" in path or any(part in ("", ".", "..") for part in parts):
                raise ValueError(f"the path {path[:80]!r} is not one inside the folder")
            if len(parts) + len(places) > 2 * limits.max_files:
                raise ValueError(f"there are more than {limits.max_files} files and folders")
            places |= {"/".join(parts[: n + 1]) for n in range(len(parts))}
            match dict(item):
                case {"folder": True, **more} if not more:
                    entries.append(("folder", path, b""))
                case {"link": str(target), **more} if target and "\0" not in target and not more:
                    entries.append(("link", path, target.encode()))
                case {"text": str(text), **more} if more in ({}, {"run": True}):
                    entries.append(("run" if more else "file", path, text.encode()))
                case {"base64": str(text), **more} if more in ({}, {"run": True}):
                    entries.append(("run" if more else "file", path, base64.b64decode(text, validate=True)))
                case _:
                    raise ValueError(f"the entry of {path[:80]!r} is unknown")
        leaves = {path for kind, path, _ in entries if kind != "folder"}
        inner = {os.path.dirname(place) for place in places} - {""}
        if leaves & inner:
            raise ValueError("a file or link is used as a folder")
        size = sum(len(data) for _, _, data in entries)
        if len(places) > limits.max_files or size > limits.max_bytes:
            raise ValueError(f"there are {len(places)} files and folders of {size:,} bytes")
    except (AttributeError, TypeError, ValueError) as error:
        raise ToolError(f"the files of the episode cannot be written: {error}") from None
    return entries


def _remove(folder: str) -> None:
    """Remove a folder, however deep it is and whatever permissions stand in it."""
    try:
        shutil.rmtree(folder)
    except (OSError, RecursionError):
        script = 'chmod -R u+rwX "$1"; rm -rf "$1"'
        command = ["/bin/sh", "-c", script, "sh", folder]
        subprocess.run(command, env={"PATH": "/usr/bin:/bin"}, capture_output=True, check=False)
