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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import peers
from peers import LOOPBACK, TLS_NAME, Lab, Process, Server, expect, run

CHECKOUT = Path(__file__).resolve().parent.parent
BASE = "localhost/base:check"
IMAGE = "localhost/dotproxy:check"
AGAIN = "localhost/dotproxy:again"
BASE_PACKAGES = "python3,ca-certificates"
BUILD_SECONDS = 600.0
MAX_MEBIBYTES = 40.0
MAX_START_SECONDS = 0.5
STARTS = 5
PORT = 5353  # the image's own: nothing else is in its namespace


def use_store(directory: Path) -> None:
    """Have buildah and podman keep everything below the directory."""
    configuration = directory / "storage.conf"
    configuration.write_text(
        '[storage]\ndriver = "vfs"\n'
        f'graphroot = "{directory}/graph"\nrunroot = "{directory}/run"\n'
    )
    os.environ["CONTAINERS_STORAGE_CONF"] = str(configuration)
    os.environ["STORAGE_DRIVER"] = "vfs"
    os.environ["BUILDAH_ISOLATION"] = "chroot"


def build_base(directory: Path) -> None:
    """Make a small Debian with Python, as the image's base."""
    root = directory / "base"
    options = ["--variant=minbase", f"--include={BASE_PACKAGES}"]
    run("debootstrap", *options, "stable", str(root), timeout=BUILD_SECONDS)
    container = run("buildah", "from", "scratch").strip()
    archive = directory / "base.tar"
    run("tar", "-C", str(root), "-cf", str(archive), ".", timeout=BUILD_SECONDS)
    run("buildah", "add", container, str(archive), "/", timeout=BUILD_SECONDS)
    run("buildah", "commit", container, BASE, timeout=BUILD_SECONDS)
    run("buildah", "rm", container)
    archive.unlink()
    shutil.rmtree(root)


def build_image(name: str) -> None:
    """Build the Dockerfile; OCI's own format knows no HEALTHCHECK."""
    options = ["--pull-never", "--format", "docker", "--build-arg", f"BASE={BASE}"]
    run("buildah", "bud", *options, "-t", name, str(CHECKOUT), timeout=BUILD_SECONDS)


@contextmanager
def mounted(name: str = IMAGE) -> Iterator[Path]:
    """Mount a container of the image that does not run."""
    container = run("buildah", "from", "--pull-never", name).strip()
    try:
        yield Path(run("buildah", "mount", container).strip())
    finally:
        run("buildah", "rm", container)


def check_content(root: Path) -> str:
    """Expect no program but the interpreter; return the size in words."""
    files = [path for path in root.rglob("*") if path.is_file()]
    programs = [
        path.name
        for path in files
        if os.access(path, os.X_OK) and ".so" not in path.name
    ]
    expect(programs == ["python3"], f"programs in the image: {programs}")
    size = sum(path.lstat().st_size for path in files) / (1 << 20)
    expect(size < MAX_MEBIBYTES, f"{size:.1f} MiB")
    return f"{size:.1f} MiB in {len(files)} files"


def digests(root: Path) -> dict[str, tuple[int, int, str]]:
    """Return mode, owner and content of each file."""
    return {
        str(path.relative_to(root)): (
            path.lstat().st_mode,
            path.lstat().st_uid,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in root.rglob("*")
        if path.is_file()
    }


def check_reproducible() -> None:
    build_image(AGAIN)
    with mounted() as first, mounted(AGAIN) as second:
        one, two = digests(first), digests(second)
    names = one.keys() | two.keys()
    differ = [name for name in names if one.get(name) != two.get(name)]
    expect(not differ, f"another build has other files: {sorted(differ)}")


def dig(*options: str) -> str:
    command = ["dig", f"@{LOOPBACK}", "-p", str(PORT), "+time=1", "+tries=1", "+short"]
    asked = subprocess.run(
        [*command, *options, peers.HOST, "A"], capture_output=True, text=True
    )
    return asked.stdout


def answers() -> bool:
    return sorted(dig().split()) == sorted(peers.RRSETS[peers.HOST, "A"])


def environment(lab: Lab, server: Server) -> dict[str, str]:
    return {
        "DOTPROXY_UPSTREAM": f"{LOOPBACK}:{server.port}#{TLS_NAME}",
        "DOTPROXY_CA_FILE": str(lab.directory / "ca.pem"),
    }


def start_container(lab: Lab, server: Server) -> Process:
    """Run the image as the README says, and hardened further."""
    certificate = str(lab.directory / "ca.pem")
    variables = environment(lab, server)
    command = [
        *("podman", "--runtime", "runc", "--cgroup-manager", "cgroupfs"),
        *("run", "--rm", "--name", "dotproxy", "--network", "host"),
        *("--read-only", "--cap-drop", "all", "--security-opt", "no-new-privileges"),
        *("--ulimit", "nofile=4096:4096", "--ulimit", "nproc=4096:4096"),
        *("--health-interval", "disable", "-v", f"{certificate}:{certificate}:ro"),
        *(f"--env={name}={value}" for name, value in variables.items()),
        IMAGE,
    ]
    process = Process(command, lab.new_directory("container"))
    process.wait_until(answers)
    return process


def health() -> tuple[int, str]:
    checked = subprocess.run(
        ["podman", "--runtime", "runc", "healthcheck", "run", "dotproxy"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    return checked.returncode, checked.stdout + checked.stderr


def check_container(lab: Lab) -> None:
    """Ask the running image, by UDP, by TCP and by its own health check."""
    server = Server(lab, "dnsdist")
    with server, start_container(lab, server) as container:
        expect(dig("+tcp") == dig(), "another answer over TCP")
        status, text = health()
        expect(status == 0, f"health check: {status} {text}")
        pid = run("podman", "inspect", "-f", "{{.State.Pid}}", "dotproxy").strip()
        facts = Path(f"/proc/{pid}/status").read_text()
        for line in ("Uid:\t65532", "CapEff:\t0000000000000000", "NoNewPrivs:\t1"):
            expect(line in facts, f"no {line!r} in {facts}")
        server.process.stop()
        status, text = health()
        expect(status == 1, f"health check without an upstream: {status} {text}")
        status = container.stop()  # podman passes the signal on
        expect(status == 0, f"exit status {status}")


def measure_start(root: Path, lab: Lab) -> float:
    """Return the least of the seconds from exec to the first answer."""
    inspected = json.loads(run("buildah", "inspect", "--type", "image", IMAGE))
    command = inspected["Docker"]["config"]["Entrypoint"]
    inside = root / "tmp"
    inside.mkdir()
    shutil.copy(lab.directory / "ca.pem", inside)

    def become_user() -> None:
        os.chroot(root)
        os.chdir("/")
        os.setgroups([])
        os.setgid(65532)
        os.setuid(65532)

    taken = []
    with Server(lab, "dnsdist") as server:
        variables = {**environment(lab, server), "DOTPROXY_CA_FILE": "/tmp/ca.pem"}
        variables["DOTPROXY_LISTEN"] = f"{LOOPBACK}:{PORT}"
        for _ in range(STARTS):
            taken.append(time_start(command, variables, become_user))
    return min(taken)  # the others tell of what else this machine does


def time_start(
    command: list[str], variables: dict[str, str], prepare: Callable[[], None]
) -> float:
    started = time.monotonic()
    process = subprocess.Popen(
        command, preexec_fn=prepare, env=variables, stderr=subprocess.DEVNULL
    )
    try:
        while not answers():
            expect(time.monotonic() - started < 10, "no answer")
        return time.monotonic() - started
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(10)


def check_image(directory: Path) -> None:
    """Check what was built; runs in a network namespace."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True, timeout=10)
    lab = Lab(directory, CHECKOUT / "dotproxy.py")
    (lab.directory / "ca.pem").chmod(0o644)
    check_container(lab)
    with mounted() as root:
        size = check_content(root)
        start = measure_start(root, lab)
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
