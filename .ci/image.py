#!/usr/bin/env python3
"""Build the image from the Dockerfile as it stands, run it hardened, and ask it.

    .ci/image.py    in about two minutes, as root, with the network of the packages

buildah builds, twice for the same files, on a base image made here of Debian's own
packages. podman runs the result with a read-only file system, as the image's user and
without capabilities, in a network namespace where nothing else is. What is printed at
the end is its size and how long it takes to start.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from peers import (
    CHECKOUT,
    HOST,
    LOOPBACK,
    RRSETS,
    TLS_NAME,
    Bed,
    Lab,
    Process,
    execute,
    expect,
    run,
)

BASE = "localhost/base:check"
IMAGE = "localhost/dotproxy:check"
AGAIN = "localhost/dotproxy:again"
MAX_MEBIBYTES = 40.0
MAX_START_SECONDS = 0.5
STARTS = 5
PORT = 5353  # the image's own: nothing else is in its namespace
PODMAN = ("podman", "--runtime", "runc")

build = partial(run, timeout=600)


def use_store(directory: Path) -> None:
    """Have buildah and podman keep everything below the directory."""
    configuration = directory / "storage.conf"
    store = f'graphroot = "{directory}/graph"\nrunroot = "{directory}/run"\n'
    configuration.write_text(f'[storage]\ndriver = "vfs"\n{store}')
    os.environ["CONTAINERS_STORAGE_CONF"] = str(configuration)
    os.environ["STORAGE_DRIVER"] = "vfs"
    os.environ["BUILDAH_ISOLATION"] = "chroot"


def build_base(directory: Path) -> None:
    """Make a small Debian with Python, as the image's base."""
    root, archive = directory / "base", directory / "base.tar"
    options = "--variant=minbase", "--include=python3,ca-certificates"
    build("debootstrap", *options, "stable", str(root))
    container = run("buildah", "from", "scratch").strip()
    build("tar", "-C", str(root), "-cf", str(archive), ".")
    build("buildah", "add", container, str(archive), "/")
    build("buildah", "commit", container, BASE)
    run("buildah", "rm", container)
    archive.unlink()
    shutil.rmtree(root)


def build_image(name: str) -> None:
    """Build the Dockerfile; OCI's own format knows no HEALTHCHECK."""
    options = ["--pull-never", "--format", "docker", "--build-arg", f"BASE={BASE}"]
    build("buildah", "bud", *options, "-t", name, str(CHECKOUT))


@contextmanager
def mounted(name: str = IMAGE) -> Iterator[Path]:
    """Mount a container of the image that does not run."""
    container = run("buildah", "from", "--pull-never", name).strip()
    try:
        yield Path(run("buildah", "mount", container).strip())
    finally:
        run("buildah", "rm", container)


def files_of(root: Path) -> dict[str, Path]:
    return {str(p.relative_to(root)): p for p in root.rglob("*") if p.is_file()}


def check_reproducible() -> None:
    """Expect the same files, modes and owners of two builds."""

    def digests(root: Path) -> set[tuple[object, ...]]:
        return {
            (name, path.lstat().st_mode, path.lstat().st_uid, digest(path))
            for name, path in files_of(root).items()
        }

    def digest(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    build_image(AGAIN)
    with mounted() as first, mounted(AGAIN) as second:
        differ = digests(first) ^ digests(second)
    expect(not differ, f"another build has other files: {sorted(map(str, differ))}")


def check_content(root: Path) -> str:
    """Expect no program but the interpreter; return the size in words."""
    files = files_of(root).values()
    programs = [p.name for p in files if os.access(p, os.X_OK) and ".so" not in p.name]
    expect(programs == ["python3"], f"programs in the image: {programs}")
    size = sum(path.lstat().st_size for path in files) / (1 << 20)
    expect(size < MAX_MEBIBYTES, f"{size:.1f} MiB")
    return f"{size:.1f} MiB in {len(files)} files"


def answers(port: int = PORT, *options: str) -> bool:
    command = ["dig", f"@{LOOPBACK}", "-p", str(port), "+time=1", "+tries=1", "+short"]
    said = execute(*command, *options, HOST, "A").stdout
    return said.split() == RRSETS[HOST, "A"]


def expect_health(status: int) -> None:
    checked = execute(*PODMAN, "healthcheck", "run", "dotproxy", timeout=30)
    expect(checked.returncode == status, f"health check: {checked}")


def check_container(bed: Bed, options: Sequence[str], port: int = PORT) -> None:
    """Ask the running image, by UDP, by TCP and by its own health check.

    It is told its options as the README says: in the environment, or, where the port is
    another than the image's, as arguments.
    """
    certificate = str(bed.lab.directory / "ca.pem")
    pairs = [option[2:].split("=", 1) for option in options]
    names = [name.replace("-", "_").upper() for name, _ in pairs]
    variables = [f"--env=DOTPROXY_{n}={v}" for n, (_, v) in zip(names, pairs)]
    command = [
        *(*PODMAN, "--cgroup-manager", "cgroupfs"),
        *("run", "--rm", "--name", "dotproxy", "--network", "host"),
        *("--read-only", "--cap-drop", "all", "--security-opt", "no-new-privileges"),
        *("--ulimit", "nofile=4096:4096", "--ulimit", "nproc=4096:4096"),
        *("--health-interval", "disable", "-v", f"{certificate}:{certificate}:ro"),
        *((*variables, IMAGE) if port == PORT else (IMAGE, *options)),
    ]
    directory, ready = bed.lab.new_directory("podman"), partial(answers, port)
    container = bed.start(Process(command, directory, ready))
    expect(answers(port, "+tcp"), "no answer over TCP")
    expect_health(0)
    pid = run("podman", "inspect", "-f", "{{.State.Pid}}", "dotproxy").strip()
    facts = Path(f"/proc/{pid}/status").read_text()
    for line in ("Uid:\t65532", "CapEff:\t0000000000000000", "NoNewPrivs:\t1"):
        expect(line in facts, f"no {line!r} in {facts}")
    bed.server.stop()
    expect_health(1)
    bed.server.start()
    status = container.stop()  # podman passes the signal on
    expect(status == 0, f"exit status {status}")


def measure_start(root: Path, options: Sequence[str]) -> float:
    """Return the least of the seconds from exec to the first answer."""
    inspected = json.loads(run("buildah", "inspect", "--type", "image", IMAGE))
    user = ["--userspec=65532:65532", "--groups="]
    command = [str(shutil.which("chroot")), *user, str(root)]
    command += [*inspected["Docker"]["config"]["Entrypoint"], *options]
    taken = []
    for _ in range(STARTS):
        started = time.monotonic()
        process = subprocess.Popen(command, env={}, stderr=subprocess.DEVNULL)
        try:
            while not answers():
                expect(time.monotonic() - started < 10, "no answer")
            taken.append(time.monotonic() - started)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(10)
    return min(taken)  # the others tell of what else this machine does


def check_image(directory: Path) -> None:
    """Check what was built; runs in a network namespace."""
    run("ip", "link", "set", "lo", "up")
    lab = Lab(directory, CHECKOUT / "dotproxy.py")
    (lab.directory / "ca.pem").chmod(0o644)
    with Bed(lab) as bed, mounted() as root:
        lab.zone_port = bed.start_server("zone").port
        upstream = f"--upstream={LOOPBACK}:{bed.start_server().port}#{TLS_NAME}"
        own = upstream, f"--ca-file={lab.directory}/ca.pem"
        check_container(bed, own)
        check_container(bed, (f"--listen={LOOPBACK}:{PORT + 1}", *own), PORT + 1)
        size = check_content(root)
        shutil.copy(lab.directory / "ca.pem", root)
        listen = f"--listen={LOOPBACK}:{PORT}"
        start = measure_start(root, (upstream, listen, "--ca-file=/ca.pem"))
    print(f"image: {size}, {start * 1000:.0f} ms from exec to the first answer")
    expect(start < MAX_START_SECONDS, f"{start:.3f} s to start")


def main() -> int:
    if len(sys.argv) > 1:
        use_store(Path(sys.argv[1]))
        check_image(Path(sys.argv[1]))
        return 0
    with tempfile.TemporaryDirectory(prefix="dotproxy-image-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        use_store(directory)
        build_base(directory)
        build_image(IMAGE)
        check_reproducible()
        again = [sys.executable, __file__, name]
        return subprocess.run(["unshare", "--net", "--mount", *again]).returncode


if __name__ == "__main__":
    sys.exit(main())
