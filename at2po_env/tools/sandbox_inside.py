"""Runs one program with limits: the half of the sandbox that is executed inside it.

`sandbox.py` hands the text of this module to a fresh interpreter (`python -c`), which sees nothing of this
package: the standard library only, and few modules of it, because importing them is most of a call's cost.

With a boundary this process is number 1 of its own process namespace: no program can kill it, it inherits
every process that a program leaves behind, and the kernel ends all of them when it ends. It writes the files,
starts the program, watches the memory, kills the rest, reads the files back and reports. Without a boundary
it sets the limits and becomes the program; the caller does the rest.

Everything that comes out of here may be forged by the program, so `sandbox.py` reads it as hostile data.
"""

from __future__ import annotations

import marshal
import os
import resource
import select
import signal
import sys
from typing import Any

Entry = tuple[str, str, bytes]
"""Kind ("file", "run" for an executable file, "link", "folder"), path, and content or target."""

WATCH_S = 0.05
PR_SET_DUMPABLE = 4


class FilesError(Exception):
    """The files of a folder cannot be kept."""


def write_entries(entries: list[Entry], folder: str) -> None:
    """Write entries into an empty folder; their paths were checked before."""
    for kind, path, data in entries:
        place = os.path.join(folder, path)
        os.makedirs(place if kind == "folder" else os.path.dirname(place), exist_ok=True)
        if kind == "link":
            os.symlink(os.fsdecode(data), place)
        elif kind != "folder":
            mode = 0o755 if kind == "run" else 0o644
            with open(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(data)


def read_entries(folder: str, most: int, most_bytes: int) -> list[Entry]:
    """Read everything in a folder, sorted by path, without following a link.

    Sockets, pipes and devices are left out; a folder counts as an entry, and is named only when it is empty.

    Raises:
        FilesError: More entries or bytes than allowed, or something that cannot be read.
    """
    entries: list[Entry] = []
    count, left, pending = 0, most_bytes, [""]
    while pending:
        path = pending.pop()
        try:
            place = os.path.join(folder, path)
            status = os.lstat(place)
            kind, data = "", b""
            if (status.st_mode & 0o170000) == 0o040000:
                names = os.listdir(place)
                pending += [os.path.join(path, name) for name in names[: most + 1]]
                kind = "" if names or not path else "folder"
            elif (status.st_mode & 0o170000) == 0o120000:
                kind, data = "link", os.readlink(place).encode()
            elif (status.st_mode & 0o170000) == 0o100000:
                kind = "run" if status.st_mode & 0o100 else "file"
                if status.st_size <= left:
                    with open(os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
                        data = file.read(left + 1)
                if max(status.st_size, len(data)) > left:
                    raise FilesError(f"the files have more than {most_bytes:,} bytes in all")
            path.encode()
        except UnicodeError:
            raise FilesError(f"the name {os.fsencode(path)[:80]!r} is not UTF-8") from None
        except OSError as error:
            raise FilesError(f"{path[:80]!r} cannot be read ({error.strerror})") from None
        if path:
            count += 1
        if count + len(pending) > most:
            raise FilesError(f"there are more than {most} files and folders")
        left -= len(data)
        if kind:
            entries.append((kind, path, data))
    return sorted(entries)


def run_program(job: dict[str, Any]) -> None:
    """Set the limits, which the program cannot raise again, and run it in this process.

    `preexec_fn` would do this in the caller, but is not safe in a process with threads.
    """
    for name, value in job["limits"]:
        limit = getattr(resource, f"RLIMIT_{name}", None)
        if limit is None:
            continue
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:  # noqa: SIM105 - contextlib would cost a third of the start
            resource.setrlimit(limit, (value, value))
        except (ValueError, OSError):  # macOS refuses RLIMIT_AS
            pass
    if job["shell"]:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        os.execv(job["shell"], [os.path.basename(job["shell"]), "-c", job["code"]])
    code: bytes = job["code"]
    main: Any = type(sys)("__main__")
    sys.modules["__main__"] = main
    sys.argv = ["code.py"]
    sys.path.insert(0, os.getcwd())  # the program may import what it wrote in an earlier call

    def show(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        """Show the program's own lines, which stand in no file, and no frame of this module."""
        import linecache
        import traceback

        text = code.decode("utf-8", "replace")
        linecache.cache["code.py"] = (len(text), None, text.splitlines(keepends=True), "code.py")
        while trace is not None and trace.tb_frame.f_code.co_filename != "code.py":
            trace = trace.tb_next
        traceback.print_exception(kind, error, trace)

    sys.excepthook = show
    exec(compile(code, "code.py", "exec"), main.__dict__)


def memory_used() -> int:
    """Return the bytes of memory that the processes beside this one hold; shared pages count in each."""
    pages = 0
    for name in os.listdir("/proc"):
        if name.isdigit() and name != "1":
            try:
                with open(f"/proc/{name}/statm") as file:
                    pages += int(file.read().split()[1])
            except (OSError, IndexError):  # it has just ended
                pass
    return pages * resource.getpagesize()


def guard(job: dict[str, Any], result: int) -> bool:
    """Be process 1: run the program in a child, and return True there; report to `result` in the parent."""
    if job["uid"]:  # we are root: become a user of whom there is nobody else
        os.setgroups([])
        os.setresgid(job["uid"], job["uid"], job["uid"])
        os.setresuid(job["uid"], job["uid"], job["uid"])
    else:  # the program has our user id; as root, the change of user has done the same
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # so that it cannot write our memory
    write_entries(job["entries"], ".")
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    program = os.fork()
    if program == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        null = os.open("/dev/null", os.O_RDONLY)
        os.dup2(null, 0)
        os.closerange(3, 256)
        return True
    status, why = watch(program, job["memory"])
    end_all()
    entries: list[Entry] = []
    refusal = ""
    if not why:
        try:
            entries = read_entries(".", job["most"], job["most_bytes"])
        except FilesError as error:
            refusal = str(error)
    with open(result, "wb") as report:
        report.write(f"{status} {why or '-'} {len(entries)} {refusal}\n".encode())
        for kind, path, data in entries:
            name = path.encode()
            report.write(b"%s %d %d\n%s%s" % (kind.encode(), len(name), len(data), name, data))
    os._exit(0)


def watch(program: int, most: int) -> tuple[int, str]:
    """Wait for the program's end, and reap whatever it leaves to us; end at once when our caller has ended.

    Args:
        program: Its process id.
        most: Bytes of memory that all processes together may hold.

    Returns:
        Its status (minus the signal), and why it must be stopped: "memory", or "" when it ended by itself.
    """
    lifeline = select.poll()
    lifeline.register(0, 0)  # only the hang-up counts
    while True:
        signal.sigtimedwait({signal.SIGCHLD}, WATCH_S)
        ended = -1
        while ended:
            ended, how = os.waitpid(-1, os.WNOHANG)
            if ended == program:
                return os.waitstatus_to_exitcode(how), ""
        if memory_used() > most:
            return 0, "memory"
        if lifeline.poll(0):
            os._exit(1)


def end_all() -> None:
    """Kill and reap every process of this namespace but this one; the program may be forking meanwhile."""
    while True:
        try:  # noqa: SIM105
            os.kill(-1, signal.SIGKILL)
        except ProcessLookupError:
            pass
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def main() -> None:
    """Read the job and do it; arguments: the descriptors of the job and, with a boundary, of the report."""
    with open(int(sys.argv[1]), "rb") as file:
        job = marshal.load(file)
    result = int(sys.argv[2])
    # The second condition is for safety: `guard` kills every process that it can see.
    if result < 0 or (os.getpid() == 1 and guard(job, result)):
        run_program(job)


if __name__ == "__main__":
    main()
