#!/usr/bin/env python3
"""Check dotproxy with real programs: DNS clients in front, DNS-over-TLS servers behind.

    .ci/peers.py                   every check, in about a minute
    .ci/peers.py --list            their names
    .ci/peers.py --only unbound    those whose name matches the regular expression
    .ci/peers.py --bench           queries/s and CPU time per query beside unbound's

Each DoT server program stands behind the proxy in turn, with a certificate made for
the run, and every client program asks through it. Then come load over a slow link,
certificates that must be refused, servers that die or hang, domains with servers of
their own, what the host does with the process (another user, few descriptors, systemd),
what the health check and the doctor say of all that, hostile clients, and a Prometheus
that scrapes the proxy.

Where the system allows it, all of this happens in a network and a mount namespace of
its own: no port can clash, nothing leaves the machine, and the system's resolver can
be pointed at the proxy.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

LOOPBACK = "127.0.0.1"
TLS_NAME = "dot.test"


class CheckError(Exception):
    """What was expected did not happen."""


class Skipped(Exception):
    """This machine cannot run the check."""


def expect(claim: bool, detail: str) -> None:
    """Raise CheckError with the detail unless the claim holds."""
    if not claim:
        raise CheckError(detail)


# ---- Namespaces ----------------------------------------------------------------------

INSIDE = "DOTPROXY_PEERS_NAMESPACE"  # set once we are in namespaces of our own


def in_namespace() -> bool:
    return INSIDE in os.environ


def enter_namespace() -> None:
    """Start again in a network and a mount namespace, if that is allowed here."""
    command = ["unshare", "--net", "--mount"]
    if os.geteuid() != 0:
        command.append("--map-root-user")
    if in_namespace() or not shutil.which(command[0]):
        return
    if subprocess.run([*command, "true"], capture_output=True).returncode == 0:
        os.environ[INSIDE] = "1"
        os.execvp(command[0], [*command, sys.executable, __file__, *sys.argv[1:]])


def arrange_namespace(directory: Path) -> None:
    """Bring up loopback and point the system's resolver at the proxy on port 53."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True, timeout=10)
    files = {
        "/etc/resolv.conf": f"nameserver {LOOPBACK}\n",
        "/etc/nsswitch.conf": "hosts: files dns\n",
    }
    for path, text in files.items():
        ours = directory / Path(path).name
        ours.write_text(text)
        if Path(path).exists():
            command = ["mount", "--bind", str(ours), path]
            subprocess.run(command, check=True, timeout=10)


# ---- Processes -----------------------------------------------------------------------
# Programs started here: where they run, when they are ready, and that they end.

READY_SECONDS = 10.0
STOP_SECONDS = 5.0
CLIENT_SECONDS = 20.0
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class Process:
    """A program with its output in a file, ended by its own process id."""

    def __init__(self, command: list[str], directory: Path, **variables: str) -> None:
        self.output_file = directory / "output.log"
        own = {k: v for k, v in os.environ.items() if not k.startswith("DOTPROXY_")}
        own.update(variables)
        with self.output_file.open("ab") as output:
            self._popen = subprocess.Popen(
                command,
                cwd=directory,
                env=own,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
            )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self._popen.pid

    def output(self) -> str:
        return self.output_file.read_text(errors="replace")

    def wait_until(self, is_ready: Callable[[], bool]) -> None:
        """Return when it is ready; end it if that fails, or is interrupted."""
        deadline = time.monotonic() + READY_SECONDS
        try:
            while not is_ready():
                running = self._popen.poll() is None and time.monotonic() < deadline
                expect(running, f"did not start: {self.output()[-400:]}")
                time.sleep(0.01)
        except BaseException:
            self.stop()
            raise

    def send(self, signal_number: int) -> None:
        if self._popen.poll() is None:
            self._popen.send_signal(signal_number)

    def stop(self, signal_number: int = signal.SIGTERM) -> int:
        """End it, by SIGKILL if it does not obey in time, and return its status."""
        self.send(signal_number)
        try:
            self._popen.communicate(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.communicate(timeout=STOP_SECONDS)
        return self._popen.returncode

    def cpu_seconds(self) -> float:
        """User and system time so far: fields 14 and 15 of proc(5) stat."""
        stat = Path(f"/proc/{self._popen.pid}/stat").read_text()
        fields = stat.rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND


def run(*command: str, timeout: float = CLIENT_SECONDS) -> str:
    """Run a client program, which must end well, and return what it said."""
    result = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout,
        text=True,
    )
    expect(result.returncode == 0, f"status {result.returncode}: {result.stdout}")
    return result.stdout


def free_port() -> int:
    """Pick a port free for UDP and TCP, below those that the kernel gives to clients.

    A client that keeps dialling a dead server on loopback can otherwise be given the
    server's own port, and is then connected to itself.
    """
    while True:
        port = random.randrange(10_000, 32_000)
        tcp, udp = socket.socket(), socket.socket(type=socket.SOCK_DGRAM)
        with tcp, udp, contextlib.suppress(OSError):
            tcp.bind((LOOPBACK, port))
            udp.bind((LOOPBACK, port))
            return port


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((LOOPBACK, port)) == 0


# ---- Certificates --------------------------------------------------------------------
# Made anew for each run. Python 3.13 verifies strictly: keyUsage and key identifiers
# must be there.

GOOD_NAMES = f"DNS:{TLS_NAME},IP:{LOOPBACK}"
WRONG_NAMES = "DNS:other.example.org,DNS:resolver.example.net"


def openssl(directory: Path, command: str) -> None:
    key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    words = shlex.split(command.replace("NEW-KEY", key))
    subprocess.run(
        ["openssl", *words], cwd=directory, check=True, capture_output=True, timeout=30
    )


def make_authority(directory: Path, name: str) -> None:
    openssl(
        directory,
        f"req -x509 NEW-KEY -keyout {name}.key -out {name}.pem -days 2"
        f" -subj '/CN={name}' -addext basicConstraints=critical,CA:TRUE"
        " -addext keyUsage=critical,keyCertSign",
    )


def make_certificate(
    directory: Path,
    name: str,
    *,
    names: str = GOOD_NAMES,
    ca: str = "ca",
    days: int = 2,
) -> None:
    extensions = (
        f"subjectAltName={names}\nbasicConstraints=CA:FALSE\n"
        "subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"
        "extendedKeyUsage=serverAuth\n"
    )
    (directory / f"{name}.ext").write_text(extensions)
    openssl(
        directory, f"req -new NEW-KEY -keyout {name}.key -out {name}.csr -subj '/CN=x'"
    )
    openssl(
        directory,
        f"x509 -req -in {name}.csr -out {name}.pem -extfile {name}.ext -days {days}"
        f" -CA {ca}.pem -CAkey {ca}.key -CAcreateserial",
    )


class Lab:
    """The directory of a run, the certificates in it, and the proxy to be checked."""

    def __init__(self, directory: Path, proxy: Path) -> None:
        self.directory = directory
        self.proxy = proxy
        self.last_proxy: Process | None = None
        make_authority(directory, "ca")
        make_authority(directory, "unknown-ca")
        make_certificate(directory, "good")
        make_certificate(directory, "wrong-name", names=WRONG_NAMES)
        make_certificate(directory, "expired", days=-1)
        make_certificate(directory, "unknown", ca="unknown-ca")

    def new_directory(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.directory))


# ---- DoT servers ---------------------------------------------------------------------
# Four programs that answer for the same names. The names are under example.com since
# unbound and Knot Resolver answer for .test themselves.

TTL = 300
HOST = "host.example.com"
LIST = [f"list{i}.example.com" for i in range(5)]
MANY = "many.example.com"  # 100 addresses: more than 1232 bytes
LARGE = "large.example.com"  # one TXT record of 1510 bytes
MISSING = "missing.example.com"
PRIVATE = "private.example.com"
BENCH = "bench.example.com"  # dnsdist answers for every name under it
BENCH_ADDRESS = "192.0.2.99"
STRINGS = [f"{i:0150d}" for i in range(10)]
RRSETS = {
    (HOST, "A"): ["192.0.2.1"],
    (HOST, "AAAA"): ["2001:db8::1"],
    (PRIVATE, "A"): ["192.168.1.1"],
    (PRIVATE, "AAAA"): ["fd00::1"],
    (MANY, "A"): [f"198.51.100.{i}" for i in range(1, 101)],
    (LARGE, "TXT"): [" ".join(f'"{string}"' for string in STRINGS)],
    **{(name, "A"): [f"192.0.2.{10 + i}"] for i, name in enumerate(LIST)},
}
NAMES = sorted({name for name, _ in RRSETS})
ZONE_LINES = [
    f"{name}. {TTL} IN {rrtype} {rdata}"
    for (name, rrtype), rdatas in RRSETS.items()
    for rdata in rdatas
]


def lua_rdata(rrtype: str, rdata: str) -> str:
    """Write a record's data, in wire format, as a Lua string."""
    if rrtype == "A":
        wire = socket.inet_pton(socket.AF_INET, rdata)
    elif rrtype == "AAAA":
        wire = socket.inet_pton(socket.AF_INET6, rdata)
    else:
        wire = b"".join(bytes([len(s)]) + s.encode() for s in shlex.split(rdata))
    return '"' + "".join(f"\\{byte:03d}" for byte in wire) + '"'


def lua_rdatas(name: str, rrtype: str) -> str:
    rdatas = RRSETS[name, rrtype]
    return "{" + ", ".join(lua_rdata(rrtype, rdata) for rdata in rdatas) + "}"


class Setup(NamedTuple):
    """What a server's configuration is written from."""

    port: int
    web_port: int  # dnsdist only, for its counters
    certificate: str  # path without the suffix: .pem is the chain, .key its key
    directory: Path


def configure_dnsdist(setup: Setup) -> dict[str, str]:
    lines = [
        f"setLocal('{LOOPBACK}:{free_port()}')",
        "setSecurityPollSuffix('')",
        "setMaxTCPClientThreads(4)",
        f"webserver('{LOOPBACK}:{setup.web_port}')",
        "setWebserverConfig({statsRequireAuthentication=false})",
        f"addTLSLocal('{LOOPBACK}:{setup.port}', '{setup.certificate}.pem',"
        f" '{setup.certificate}.key', {{maxInFlight=1000, reusePort=true}})",
        f"addAction('{BENCH}.', SpoofAction('{BENCH_ADDRESS}', {{ttl={TTL}}}))",
    ]
    for name, rrtype in RRSETS:
        rule = f"AndRule({{QNameRule('{name}'), QTypeRule(DNSQType.{rrtype})}})"
        action = f"SpoofRawAction({lua_rdatas(name, rrtype)}, {{ttl={TTL}}})"
        lines.append(f"addAction({rule}, {action})")
    for name in NAMES:
        lines.append(f"addAction(QNameRule('{name}'), RCodeAction(DNSRCode.NOERROR))")
    lines.append("addAction(AllRule(), RCodeAction(DNSRCode.NXDOMAIN))")
    return {"config": "\n".join(lines) + "\n"}


UNBOUND = """
server:
  interface: {address}@{port}
  directory: "{directory}"
  username: ""
  chroot: ""
  pidfile: ""
  do-daemonize: no
  use-syslog: no
  num-threads: 1
  module-config: iterator
"""


def configure_unbound(setup: Setup) -> dict[str, str]:
    config = UNBOUND.format(
        address=LOOPBACK, port=setup.port, directory=setup.directory
    )
    lines = [
        f"  tls-port: {setup.port}",
        f"  tls-service-pem: {setup.certificate}.pem",
        f"  tls-service-key: {setup.certificate}.key",
        "  local-zone: example.com. static",
        *(f"  local-data: '{line}'" for line in ZONE_LINES),
    ]
    return {"config": config + "\n".join(lines) + "\n"}


def configure_kresd(setup: Setup) -> dict[str, str]:
    lines = [
        f"net.listen('{LOOPBACK}', {setup.port}, {{ kind = 'tls' }})",
        f"net.tls('{setup.certificate}.pem', '{setup.certificate}.key')",
        "for _, name in ipairs({'priming', 'ta_update', 'ta_signal_query',"
        " 'detect_time_skew', 'detect_time_jump'}) do pcall(modules.unload, name) end",
        "trust_anchors.remove('.')",
        "modules = { 'policy' }",
    ]
    for name in NAMES:
        answers = ", ".join(
            f"[kres.type.{rrtype}]={{rdata={lua_rdatas(name, rrtype)}, ttl={TTL}}}"
            for owner, rrtype in RRSETS
            if owner == name
        )
        action = f"policy.ANSWER({{ {answers} }}, true)"
        lines.append(f"policy.add(policy.suffix({action}, {{ todname('{name}.') }}))")
    lines.append("policy.add(policy.all(policy.DENY))")
    return {"config": "\n".join(lines) + "\n"}


NAMED = """
controls {{ }};
tls certificate {{ cert-file "{certificate}.pem"; key-file "{certificate}.key"; }};
options {{
  directory "{directory}";
  listen-on port {port} tls certificate {{ {address}; }};
  listen-on-v6 {{ none; }};
  pid-file none;
  session-keyfile none;
  recursion no;
  notify no;
}};
zone "example.com" {{ type primary; file "zone"; }};
"""


def configure_named(setup: Setup) -> dict[str, str]:
    config = NAMED.format(address=LOOPBACK, **setup._asdict())
    zone = [
        f"$TTL {TTL}",
        "@ SOA ns.example.com. admin.example.com. 1 3600 600 86400 300",
        "@ NS ns.example.com.",
        "ns.example.com. A 192.0.2.53",
        *ZONE_LINES,
    ]
    return {"config": config, "zone": "\n".join(zone) + "\n"}


CORP_HOST, CORP_ADDRESS = "host.corp.example", "10.1.1.1"
CLUSTER_HOST, CLUSTER_ADDRESS = "host.cluster.local", "10.96.0.1"


def configure_corp(setup: Setup) -> dict[str, str]:
    """Have unbound answer over TLS for names under corp.example, and count queries."""
    (config,) = configure_unbound(setup).values()
    lines = [
        "  log-queries: yes",
        "  local-zone: corp.example. redirect",
        f"  local-data: 'corp.example. {TTL} IN A {CORP_ADDRESS}'",
    ]
    return {"config": config + "\n".join(lines) + "\n"}


CLUSTER_NAMED = """
controls {{ }};
options {{
  directory "{directory}";
  listen-on port {port} {{ {address}; }};
  listen-on-v6 {{ none; }};
  pid-file none;
  session-keyfile none;
  recursion no;
  querylog yes;
}};
zone "cluster.local" {{ type primary; file "zone"; }};
"""


def configure_cluster(setup: Setup) -> dict[str, str]:
    """Have BIND answer in clear text for names under cluster.local."""
    config = CLUSTER_NAMED.format(address=LOOPBACK, **setup._asdict())
    zone = [
        f"$TTL {TTL}",
        "@ SOA ns admin 1 3600 600 86400 300",
        "@ NS ns",
        "ns A 10.96.0.10",
        f"* A {CLUSTER_ADDRESS}",
    ]
    return {"config": config, "zone": "\n".join(zone) + "\n"}


class Program(NamedTuple):
    """How a DoT server is started, with the path of its configuration to follow."""

    command: list[str]
    configure: Callable[[Setup], dict[str, str]]


PROGRAMS = {
    "dnsdist": Program(
        ["dnsdist", "--supervised", "--disable-syslog", "-C"], configure_dnsdist
    ),
    "unbound": Program(["unbound", "-d", "-c"], configure_unbound),
    "knot-resolver": Program(["kresd", "-n", "-c"], configure_kresd),
    "bind9": Program(["named", "-g", "-4", "-n", "1", "-c"], configure_named),
}
PRIVATE_PROGRAMS = {
    "unbound, corp.example": Program(["unbound", "-d", "-c"], configure_corp),
    "bind9, cluster.local": Program(
        ["named", "-g", "-4", "-n", "1", "-c"], configure_cluster
    ),
}


def copy_program(name: str, directory: Path) -> str:
    """Copy an installed program: AppArmor goes by path, and knows no place of ours."""
    path = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin"
    found = shutil.which(name, path=path)
    expect(found is not None, f"{name} is not installed")
    return str(shutil.copy(str(found), directory))


class Server:
    """One DoT server that can be stopped and started again on the same port."""

    def __init__(self, lab: Lab, program: str, certificate: str = "good") -> None:
        self.directory = lab.new_directory(program.partition(",")[0])
        self.port = free_port()
        self.web_port = free_port()
        path = str(lab.directory / certificate)
        setup = Setup(self.port, self.web_port, path, self.directory)
        (name, *options), configure = {**PROGRAMS, **PRIVATE_PROGRAMS}[program]
        for file, text in configure(setup).items():
            (self.directory / file).write_text(text)
        copy = copy_program(name, self.directory)
        self._command = [copy, *options, str(self.directory / "config")]
        self.start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send(signal.SIGCONT)
        self.process.stop()

    def start(self) -> None:
        self.process = Process(self._command, self.directory)
        self.process.wait_until(lambda: accepts(self.port))

    def queries(self) -> int:
        """Ask dnsdist how many queries it has seen."""
        url = f"http://{LOOPBACK}:{self.web_port}/metrics"
        with urllib.request.urlopen(url, timeout=5) as response:
            text = response.read().decode()
        count = re.search(r"^dnsdist_queries (\d+)$", text, re.MULTILINE)
        expect(count is not None, "dnsdist has no counter of queries")
        return int(count[1]) if count else 0


# ---- The proxy and a slow link -------------------------------------------------------


def can_become_nobody() -> bool:
    """Tell whether nobody exists: a user namespace may know root alone."""
    users = Path("/proc/self/uid_map").read_text().split()
    return os.geteuid() != 0 or int(users[2]) > 1


class Proxy:
    """dotproxy as a user runs it."""

    def __init__(
        self,
        lab: Lab,
        upstream_port: int,
        *,
        name: str = f"#{TLS_NAME}",
        listen: str = "",
        options: Sequence[str] = (),
        prefix: Sequence[str] = (),
        activated: bool = False,
        variables: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.lab = lab
        self.port = free_port()
        self.upstream_port = upstream_port
        listen_options = ["--listen", f"{LOOPBACK}:{self.port}"]
        if listen:
            listen_options += ["--listen", listen]
        command = [
            *(word.replace("PORT", str(self.port)) for word in prefix),
            *(sys.executable, str(lab.proxy)),
            *([] if activated else listen_options),
            *("--upstream", f"{LOOPBACK}:{upstream_port}{name}"),
            *("--ca-file", str(lab.directory / "ca.pem")),
            *options,
            *([] if can_become_nobody() else ["--user", "root"]),
        ]
        directory = lab.new_directory("dotproxy")
        self.process = Process(command, directory, **dict(variables))
        lab.last_proxy = self.process
        if activated:  # it starts when the first query comes
            self.process.wait_until(lambda: "Listening on" in self.process.output())
        else:
            self.process.wait_until(lambda: "ready" in self.process.output())

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stop()


async def delay_direction(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float
) -> None:
    """Copy bytes in order, each `delay` seconds after it came; then the end as well."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def deliver() -> None:
        while True:
            due, chunk = await queue.get()
            await asyncio.sleep(due - loop.time())
            if not chunk:
                return
            writer.write(chunk)

    delivery = asyncio.ensure_future(deliver())
    while not delivery.done():
        try:
            chunk = await reader.read(65536)
        except ConnectionError:
            chunk = b""
        queue.put_nowait((loop.time() + delay, chunk))
        if not chunk:
            await delivery
    writer.close()


async def relay(listen_port: int, target_port: int, round_trip: float) -> None:
    """Relay TCP connections with half of the round trip's delay in each direction."""

    async def accept(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        far_reader, far_writer = await asyncio.open_connection(LOOPBACK, target_port)
        await asyncio.gather(
            delay_direction(reader, far_writer, round_trip / 2),
            delay_direction(far_reader, writer, round_trip / 2),
        )

    server = await asyncio.start_server(accept, LOOPBACK, listen_port)
    async with server:
        await server.serve_forever()


@contextlib.contextmanager
def slow_link(lab: Lab, target_port: int, round_trip: float) -> Iterator[int]:
    """Run a relay in a process of its own; yield the port that it listens on."""
    port = free_port()
    words = [str(port), str(target_port), str(round_trip)]
    command = [sys.executable, __file__, "--relay", *words]
    with Process(command, lab.new_directory("relay")) as process:
        process.wait_until(lambda: accepts(port))
        yield port


# ---- Client programs -----------------------------------------------------------------
# Every one of these is asked through the proxy with each of the servers behind it. They
# ask once: a second try would hide a lost answer.

DIG = f"dig @{LOOPBACK} -p PORT +tries=1 +time=5"
KDIG = f"kdig @{LOOPBACK} -p PORT +retry=0"
IPV4 = re.escape(RRSETS[HOST, "A"][0])
IPV6 = RRSETS[HOST, "AAAA"][0]
MIXED_CASE = "hOsT.eXaMpLe.CoM"


class Ask(NamedTuple):
    """A client's command, and the regular expressions that its output must match."""

    command: str
    patterns: list[str]


def only(rdatas: list[str]) -> str:
    """Match these lines and no others."""
    return r"\A" + r"\s+".join(re.escape(rdata) for rdata in rdatas) + r"\s*\Z"


LIST_ADDRESSES = only([RRSETS[name, "A"][0] for name in LIST])
RETRIED = ";; Truncated, retrying in TCP mode"

ASKS = {
    "dig A": Ask(
        f"{DIG} {HOST} A",
        ["status: NOERROR", "ANSWER: 1,", rf"\sA\s+{IPV4}\s", r"SERVER: .* \(UDP\)"],
    ),
    "dig AAAA": Ask(f"{DIG} +short {HOST} AAAA", [only([IPV6])]),
    "dig +tcp": Ask(
        f"{DIG} +tcp {HOST} A", [rf"\sA\s+{IPV4}\s", r"SERVER: .* \(TCP\)"]
    ),
    "dig +tcp +keepopen, five names": Ask(
        f"{DIG} +tcp +keepopen +short {' '.join(LIST)}", [LIST_ADDRESSES]
    ),
    "dig +bufsize=512, large TXT: cut, then whole over TCP": Ask(
        f"{DIG} +bufsize=512 {LARGE} TXT", [RETRIED, *STRINGS]
    ),
    "dig +bufsize=4096 +ignore, large TXT: TC, no sections": Ask(
        f"{DIG} +bufsize=4096 +ignore {LARGE} TXT",
        ["flags: qr[a-z ]* tc", "ANSWER: 0,", r"MSG SIZE  rcvd: \d{2,3}\n"],
    ),
    "dig +noedns, 100 addresses: cut, then whole over TCP": Ask(
        f"{DIG} +noedns {MANY} A", [RETRIED, *map(re.escape, RRSETS[MANY, "A"])]
    ),
    "dig +noedns: no OPT in the answer": Ask(
        f"{DIG} +noedns {HOST} A", [IPV4, r"\A(?![\s\S]*OPT PSEUDOSECTION)"]
    ),
    "dig +dnssec: DO in the answer's OPT": Ask(
        f"{DIG} +dnssec {HOST} A", ["EDNS: version: 0, flags: do", IPV4]
    ),
    "dig NXDOMAIN": Ask(f"{DIG} {MISSING} A", ["status: NXDOMAIN"]),
    "dig TYPE65280": Ask(f"{DIG} {HOST} TYPE65280", ["status: NOERROR", "ANSWER: 0,"]),
    "dig mIxEd case: echoed": Ask(f"{DIG} {MIXED_CASE} A", [f";{MIXED_CASE}.", IPV4]),
    "kdig": Ask(f"{KDIG} {HOST} A", ["status: NOERROR", IPV4, r"\(UDP\)"]),
    "kdig +tcp +keepopen, five names": Ask(
        f"{KDIG} +tcp +keepopen +short {' '.join(LIST)}", [LIST_ADDRESSES]
    ),
    "drill": Ask(
        f"drill -p PORT {HOST} @{LOOPBACK} A", ["rcode: NOERROR", rf"\sA\s+{IPV4}\s"]
    ),
    "drill -t -D": Ask(
        f"drill -t -D -p PORT {HOST} @{LOOPBACK} A",
        ["rcode: NOERROR", "flags: do", IPV4],
    ),
    "host": Ask(
        f"host -R 1 -p PORT {HOST} {LOOPBACK}",
        [f"has address {IPV4}", f"has IPv6 address {IPV6}"],
    ),
}

GETADDRINFO = f"""
import socket
for answer in socket.getaddrinfo({HOST!r}, 853, type=socket.SOCK_STREAM):
    print(answer[4][0])
"""


def expect_match(pattern: str, text: str) -> None:
    expect(bool(re.search(pattern, text)), f"no {pattern!r} in: {text}")


def ask(proxy: Proxy, command: str) -> str:
    return run(*command.replace("PORT", str(proxy.port)).split())


def check_ask(question: Ask, proxy: Proxy) -> None:
    output = ask(proxy, question.command)
    for pattern in question.patterns:
        expect_match(pattern, output)


def check_getaddrinfo(_: Proxy) -> None:
    if not in_namespace():
        raise Skipped("needs the right to make network and mount namespaces")
    output = run(sys.executable, "-c", GETADDRINFO)
    expect(sorted(output.split()) == sorted([*RRSETS[HOST, "A"], IPV6]), output)


def check_clean_end(proxy: Proxy) -> None:
    status = proxy.process.stop()
    expect(status == 0, f"status {status}")
    expect("Traceback" not in proxy.process.output(), "a traceback in the log")


CLIENT_CHECKS: dict[str, Callable[[Proxy], None]] = {
    **{title: partial(check_ask, question) for title, question in ASKS.items()},
    "getaddrinfo through resolv.conf": check_getaddrinfo,
    "SIGTERM: exit status 0, no traceback in the log": check_clean_end,
}


@contextlib.contextmanager
def proxy_before(program: str, lab: Lab) -> Iterator[Proxy]:
    also = f"{LOOPBACK}:53" if in_namespace() else ""
    with Server(lab, program) as server, Proxy(lab, server.port, listen=also) as proxy:
        yield proxy


# ---- Load ----------------------------------------------------------------------------
# dnsperf with names that occur once, and a DoT server 20 ms away.


def write_names(lab: Lab, count: int, prefix: str) -> Path:
    path = lab.new_directory("names") / "names"
    with path.open("w") as file:
        file.writelines(f"{prefix}{i}.{BENCH} A\n" for i in range(count))
    return path


def dnsperf(port: int, names: Path, *options: str, outstanding: int) -> str:
    """Load the server, from 10 sockets, and return dnsperf's report."""
    command = ["dnsperf", "-s", LOOPBACK, "-p", str(port), "-d", str(names)]
    load = ["-W", "-c", "10", "-b", "1024", "-q", str(outstanding)]
    return run(*command, *load, *options, timeout=60)


@contextlib.contextmanager
def proxy_far_from_server(lab: Lab, round_trip: float = 0.020) -> Iterator[Proxy]:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Server(lab, "dnsdist"))
        port = stack.enter_context(slow_link(lab, server.port, round_trip))
        yield stack.enter_context(Proxy(lab, port))


def check_load(mode: str, count: int, outstanding: int, proxy: Proxy) -> None:
    names = write_names(proxy.lab, count, mode)
    report = dnsperf(proxy.port, names, "-n", "1", "-m", mode, outstanding=outstanding)
    statistics = report[report.find("Statistics:") :]
    expect_match(r"Queries lost: +0 ", statistics)
    expect_match(rf"Response codes: +NOERROR {count} \(100.00%\)\n", statistics)
    expect("Warning" not in report, report)


LOAD_CHECKS: dict[str, Callable[[Proxy], None]] = {
    "dnsperf, 100,000 names over UDP": partial(check_load, "udp", 100_000, 500),
    "dnsperf, 20,000 names over TCP": partial(check_load, "tcp", 20_000, 200),
}


# ---- Certificates that must be refused -----------------------------------------------
# The server must not see a query; the client and the log must be told why.

WRONG_NAMES_IN_LOG = r"other\.example\.org.*resolver\.example\.net"


def check_accepted(name: str, lab: Lab) -> None:
    """Show that the counter counts, and that the certificate is good otherwise."""
    with Server(lab, "dnsdist") as server, Proxy(lab, server.port, name=name) as proxy:
        expect_match(IPV4, ask(proxy, f"{DIG} {HOST}"))
        count = server.queries()
        expect(count > 0, f"{count} queries counted")


def expect_refusal(proxy: Proxy, cause: str) -> None:
    """Expect SERVFAIL with a reason, over UDP and TCP, and the cause in the log."""
    for transport in ("+notcp", "+tcp"):
        output = ask(proxy, f"{DIG} {transport} {HOST}")
        expect_match("status: SERVFAIL", output)
        expect_match(r"EDE: \d+ .*: \(.+\)", output)
    expect_match(r"status: SERVFAIL(?![\s\S]*EDE)", ask(proxy, f"{DIG} +noedns {HOST}"))
    expect_match(f"(?i){cause}", proxy.process.output())


def check_refused(certificate: str, cause: str, lab: Lab) -> None:
    server = Server(lab, "dnsdist", certificate)
    with server, Proxy(lab, server.port) as proxy:
        expect_refusal(proxy, cause)
        count = server.queries()
        expect(count == 0, f"the server was sent {count} queries")


def openssl_pin(lab: Lab, certificate: str) -> str:
    """Return what the README's commands say of a certificate."""
    path = lab.directory / f"{certificate}.pem"
    command = f"openssl x509 -in {path} -noout -pubkey"
    command += " | openssl pkey -pubin -outform der"
    command += " | openssl dgst -sha256 -binary | base64"
    return run("sh", "-c", command).strip()


def check_pinned(lab: Lab) -> None:
    """Show that one of several pins is enough."""
    pins = [openssl_pin(lab, certificate) for certificate in ("wrong-name", "good")]
    options = tuple(f"--pin={TLS_NAME}={pin}" for pin in pins)
    server = Server(lab, "dnsdist")
    with server, Proxy(lab, server.port, options=options) as proxy:
        expect_match(IPV4, ask(proxy, f"{DIG} {HOST}"))


def check_other_pin_refused(certificate: str, lab: Lab) -> None:
    options = (f"--pin={TLS_NAME}={openssl_pin(lab, certificate)}",)
    server = Server(lab, "dnsdist")
    with server, Proxy(lab, server.port, options=options) as proxy:
        expect_refusal(proxy, re.escape(openssl_pin(lab, "good")))
        count = server.queries()
        expect(count == 0, f"the server was sent {count} queries")


def start_old_tls(lab: Lab, port: int, version: str = "1_1") -> Process:
    """Start a server that speaks one version and prints what it is sent through it."""
    certificate = lab.directory / "good"
    options = f"-quiet -tls{version} -cipher ALL:@SECLEVEL=0 -accept {LOOPBACK}:{port}"
    files = ["-cert", f"{certificate}.pem", "-key", f"{certificate}.key"]
    command = ["openssl", "s_server", *options.split(), *files]
    return Process(command, lab.new_directory("s_server"))


def check_old_tls_refused(lab: Lab) -> None:
    port = free_port()
    with start_old_tls(lab, port) as server:
        server.wait_until(lambda: accepts(port))
        with Proxy(lab, port) as proxy:
            expect_refusal(proxy, r"(protocol.version|unsupported.protocol|TLS ?v?1\.)")
        expect("example" not in server.output(), "the server was sent a query")


def check_tls_1_2_refused(lab: Lab) -> None:
    port = free_port()
    with start_old_tls(lab, port, "1_2") as server:
        server.wait_until(lambda: accepts(port))
        with Proxy(lab, port, options=("--tls-min=1.3",)) as proxy:
            expect_refusal(proxy, r"does not speak TLS 1\.3 or newer")
        expect("example" not in server.output(), "the server was sent a query")


CERTIFICATE_CHECKS: dict[str, Callable[[Lab], None]] = {
    "right name": partial(check_accepted, f"#{TLS_NAME}"),
    "right address, no name given": partial(check_accepted, ""),
    "wrong name": partial(check_refused, "wrong-name", WRONG_NAMES_IN_LOG),
    "expired": partial(check_refused, "expired", "expired"),
    "unknown CA": partial(check_refused, "unknown", "(issuer|unknown ca|self.signed)"),
    "TLS 1.1": check_old_tls_refused,
    "TLS 1.2 where 1.3 is wanted": check_tls_1_2_refused,
    "pinned key": check_pinned,
    "another key pinned": partial(check_other_pin_refused, "wrong-name"),
    "the CA's key pinned": partial(check_other_pin_refused, "ca"),
}


# ---- Names ---------------------------------------------------------------------------
# What the proxy answers itself, as clients see it, with a server that counts.

NO_ANSWER = r"ANSWER: 0, AUTHORITY: 1,"
AUTHORITATIVE = r"flags: qr aa[a-z ]*;"


def soa_of(zone: str) -> str:
    """Match the SOA record of a zone that the proxy serves."""
    numbers = r"1\s+3600\s+1200\s+604800\s+10800"
    names = rf"{re.escape(zone)}\.\s+nobody\.invalid\."
    return rf"\n{re.escape(zone)}\.\s+10800\s+IN\s+SOA\s+{names}\s+{numbers}"


def absent(name: str, zone: str, rrtype: str = "A") -> Ask:
    """Ask for a name that does not exist in a zone that the proxy serves."""
    patterns = ["status: NXDOMAIN", NO_ANSWER, AUTHORITATIVE, soa_of(zone)]
    return Ask(f"{DIG} {name} {rrtype}", patterns)


def no_data(name: str, zone: str, rrtype: str = "A") -> Ask:
    """Ask for a name there that exists and has no such record."""
    patterns = ["status: NOERROR", NO_ANSWER, AUTHORITATIVE, soa_of(zone)]
    return Ask(f"{DIG} {name} {rrtype}", patterns)


LOCAL_ASKS = [
    Ask(f"{DIG} localhost A", [AUTHORITATIVE, r"localhost\.\s+10800\s+IN\s+A\s+127\."]),
    Ask(f"{DIG} +short a.localhost AAAA", [only(["::1"])]),
    Ask(f"{DIG} +tcp +short LocalHost A", [only(["127.0.0.1"])]),
    Ask(f"{DIG} +short -x 127.0.0.1", [only(["localhost."])]),
    Ask(f"{DIG} +short -x ::1", [only(["localhost."])]),
    Ask(f"{DIG} +dnssec +cd a.onion", ["NXDOMAIN", "flags: do", soa_of("onion")]),
    Ask(f"{KDIG} a.local", ["status: NXDOMAIN", "Flags: qr aa", soa_of("local")]),
    Ask(f"drill -p PORT a.invalid @{LOOPBACK}", ["rcode: NXDOMAIN", soa_of("invalid")]),
    Ask(f"{DIG} +short 10.in-addr.arpa NS", [only(["10.in-addr.arpa."])]),
    Ask(f"{DIG} a.onion CH TXT", ["status: REFUSED"]),
    no_data("localhost", "localhost", "MX"),
    no_data("0.0.127.in-addr.arpa", "127.in-addr.arpa", "PTR"),
    no_data("home.arpa", "home.arpa"),
    no_data("_dns.resolver.arpa", "resolver.arpa", "SVCB"),
    absent("2.0.0.127.in-addr.arpa", "127.in-addr.arpa", "PTR"),
    *(absent(f"a.{zone}", zone) for zone in ("invalid", "home.arpa", "service.arpa")),
    *(
        absent(f"1.{zone}.in-addr.arpa", f"{zone}.in-addr.arpa", "PTR")
        for zone in ("10", "16.172", "31.172", "168.192", "254.169", "2.0.192")
    ),
    absent("1.64.100.in-addr.arpa", "64.100.in-addr.arpa", "PTR"),
    absent("0.d.f.ip6.arpa", "d.f.ip6.arpa", "PTR"),
    absent("0.8.e.f.ip6.arpa", "8.e.f.ip6.arpa", "PTR"),
]
LOCAL_GETADDRINFO = GETADDRINFO.replace(HOST, "a.localhost")


def check_local(lab: Lab) -> None:
    with Server(lab, "dnsdist") as server, Proxy(lab, server.port) as proxy:
        for question in LOCAL_ASKS:
            check_ask(question, proxy)
            expect(server.queries() == 0, f"sent to the server: {question.command}")
        for number, name in enumerate(("notlocalhost", "foo.local.example.com"), 1):
            ask(proxy, f"{DIG} {name}")
            expect(server.queries() == number, f"{name} was not sent to the server")


def check_local_getaddrinfo(lab: Lab) -> None:
    if not in_namespace():
        raise Skipped("needs the right to make network and mount namespaces")
    with Server(lab, "dnsdist") as server:
        with Proxy(lab, server.port, listen=f"{LOOPBACK}:53"):
            output = run(sys.executable, "-c", LOCAL_GETADDRINFO)
        expect(sorted(output.split()) == [LOOPBACK, "::1"], output)
        expect(server.queries() == 0, "the server was sent a query")


def check_forward_special(lab: Lab) -> None:
    options = "--forward-special corp.local --forward-special in-addr.arpa"
    server = Server(lab, "dnsdist")
    with server, Proxy(lab, server.port, options=tuple(options.split())) as proxy:
        ask(proxy, f"{DIG} a.corp.local")
        ask(proxy, f"{DIG} -x 10.0.0.1")
        expect(server.queries() == 2, "the server was not sent both queries")
        check_ask(absent("a.local", "local"), proxy)
        expect(server.queries() == 2, "the server was sent another query")


def check_any(lab: Lab) -> None:
    hinfo = [r'\s3600\s+IN\s+HINFO\s+"RFC8482" ""', "ANSWER: 1[,;]", r"\(UDP\)"]
    with Server(lab, "bind9") as server, Proxy(lab, server.port) as proxy:
        for _ in range(2):  # the second time after the whole one
            check_ask(Ask(f"{DIG} +notcp {HOST} ANY", hinfo), proxy)
            whole = [rf"\sA\s+{IPV4}", rf"\sAAAA\s+{IPV6}", "ANSWER: 2,"]
            check_ask(Ask(f"{DIG} +tcp {HOST} ANY", whole), proxy)
        check_ask(Ask(f"{KDIG} +notcp {HOST} ANY", hinfo), proxy)


def check_private(options: str, blocked: bool, lab: Lab) -> None:
    filtered = ["NOERROR", "ANSWER: 0[,;]", r"EDE: 17 \(Filtered\)", r"\sSOA\s"]
    server = Server(lab, "dnsdist")
    with server, Proxy(lab, server.port, options=tuple(options.split())) as proxy:
        for rrtype in ("A", "AAAA"):
            (address,) = RRSETS[PRIVATE, rrtype]
            patterns = filtered if blocked else [rf"\s{rrtype}\s+{address}"]
            for client in (DIG, f"{DIG} +tcp", f"{KDIG} +edns"):
                check_ask(Ask(f"{client} {PRIVATE} {rrtype}", patterns), proxy)
        expect(server.queries() == 2, "the answers were not cached")
        check_ask(Ask(f"{DIG} {HOST}", [IPV4]), proxy)


BLOCK = "--block-private-answers"
NAME_CHECKS: dict[str, Callable[[Lab], None]] = {
    "special ones get the right answer and are never sent": check_local,
    "getaddrinfo below localhost": check_local_getaddrinfo,
    "special ones are sent where --forward-special says so": check_forward_special,
    "ANY: HINFO over UDP, all records over TCP": check_any,
    "private addresses pass": partial(check_private, "", False),
    "private addresses are blocked": partial(check_private, BLOCK, True),
    "private addresses pass for an exempt domain": partial(
        check_private, f"{BLOCK} --allow-private example.com", False
    ),
}


# ---- Servers that die or hang --------------------------------------------------------
# A client of our own that sends each query once and notes what became of it.

PATIENCE = 4.5  # glibc's resolver gives up after 5 seconds
ADDRESS = socket.inet_aton(BENCH_ADDRESS)


class Outcome(NamedTuple):
    """One query: when it was sent, how long it took and how it ended."""

    sent: float
    seconds: float
    result: str


def build_query(number: int) -> bytes:
    name = f"query{number}.{BENCH}"
    labels = b"".join(bytes([len(x)]) + x.encode() for x in name.split("."))
    return struct.pack("!6H", number, 0x0100, 1, 0, 0, 0) + labels + b"\0\0\1\0\1"


def result_of(query: bytes, message: bytes) -> str:
    """Name the outcome: "right", or what is wrong with the message."""
    if message[3] & 15:
        return f"rcode {message[3] & 15}"
    same_question = message[12 : len(query)] == query[12:]
    return "right" if same_question and ADDRESS in message else "wrong"


class Load:
    """Queries at a steady rate, from a thread of its own while it is a context."""

    def __init__(self, port: int, *, rate: int, seconds: float) -> None:
        self._port = port
        self._interval = 1 / rate
        self._count = int(rate * seconds)
        self._sent: list[float] = []
        self._answers: dict[int, tuple[float, bytes]] = {}
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(self._count * self._interval + PATIENCE + 5)

    def finish(self) -> None:
        """Run it, if it is not run as a context."""
        if self._thread.ident is None:
            self._thread.start()
        self.__exit__()

    def _run(self) -> None:
        start = time.monotonic()
        with socket.socket(type=socket.SOCK_DGRAM) as client:
            client.connect((LOOPBACK, self._port))
            for number in range(self._count):
                self._receive(client, start + number * self._interval)
                self._sent.append(time.monotonic())
                client.send(build_query(number))
            self._receive(client, time.monotonic() + PATIENCE)

    def _receive(self, client: socket.socket, deadline: float) -> None:
        """Note answers until the deadline, or until every query has its own."""
        while (left := deadline - time.monotonic()) > 0:
            if len(self._answers) == self._count:
                return
            client.settimeout(left)
            with contextlib.suppress(socket.timeout):
                message = client.recv(4096)
                number = int.from_bytes(message[:2], "big")
                self._answers.setdefault(number, (time.monotonic(), message))

    def outcomes(self) -> list[Outcome]:
        expect(len(self._sent) == self._count, "the load generator did not finish")
        found = []
        for number, sent in enumerate(self._sent):
            answer = self._answers.get(number)
            if answer is None or answer[0] - sent > PATIENCE:
                found.append(Outcome(sent, PATIENCE, "no answer"))
                continue
            result = result_of(build_query(number), answer[1])
            found.append(Outcome(sent, answer[0] - sent, result))
        return found


def summary(outcomes: list[Outcome]) -> str:
    results = Counter(outcome.result for outcome in outcomes)
    slowest = max(outcome.seconds for outcome in outcomes)
    return f"{dict(results)}, slowest {slowest:.3f} s"


def check_killed(lab: Lab) -> None:
    with Server(lab, "dnsdist") as server, Proxy(lab, server.port) as proxy:
        with Load(proxy.port, rate=200, seconds=6) as load:
            for _ in range(3):
                time.sleep(1.5)
                server.process.stop(signal.SIGKILL)
                server.start()

        outcomes = load.outcomes()
        expect(all(o.result == "right" for o in outcomes), summary(outcomes))


def check_stopped(lab: Lab) -> None:
    with Server(lab, "dnsdist") as server, Proxy(lab, server.port) as proxy:
        with Load(proxy.port, rate=100, seconds=6) as load:
            time.sleep(1)
            server.process.send(signal.SIGSTOP)
            time.sleep(2)
            server.process.send(signal.SIGCONT)
            resumed = time.monotonic()

        outcomes = load.outcomes()
        expect(all(o.result != "no answer" for o in outcomes), summary(outcomes))
        later = [o for o in outcomes if o.sent > resumed + 1]
        recovered = all(o.result == "right" and o.seconds < 1 for o in later)
        expect(recovered, f"1 s after SIGCONT: {summary(later)}")


def check_absent(lab: Lab) -> None:
    with Proxy(lab, free_port()) as proxy:
        expect_refusal(proxy, "refused")


def check_ended_in_flight(signal_number: int, lab: Lab) -> None:
    """A signal comes while ten queries are on their way to a distant server."""
    with proxy_far_from_server(lab, round_trip=0.4) as proxy:
        expect_match("status: NOERROR", ask(proxy, f"{DIG} warm.{BENCH}"))
        with Load(proxy.port, rate=1000, seconds=0.010) as load:
            time.sleep(0.2)
            status = proxy.process.stop(signal_number)

        expect(status == 0, f"status {status}")
        outcomes = load.outcomes()
        expect(all(o.result == "right" for o in outcomes), summary(outcomes))


OUTAGE_CHECKS: dict[str, Callable[[Lab], None]] = {
    "killed and restarted three times under 200 queries/s": check_killed,
    "stopped for 2 s under 100 queries/s": check_stopped,
    "nothing listens: SERVFAIL, and why": check_absent,
    "SIGTERM with queries in flight": partial(check_ended_in_flight, signal.SIGTERM),
    "SIGINT with queries in flight": partial(check_ended_in_flight, signal.SIGINT),
}


# ---- Split horizon -------------------------------------------------------------------
# dnsdist for all names, unbound over TLS for corp.example, and BIND in clear text for
# cluster.local. dnsdist counts what it is sent.


class Horizon(NamedTuple):
    """A proxy and the servers behind it."""

    proxy: Proxy
    public: Server
    servers: dict[str, Server]  # by domain


@contextlib.contextmanager
def split_horizon(lab: Lab) -> Iterator[Horizon]:
    with contextlib.ExitStack() as stack:
        public = stack.enter_context(Server(lab, "dnsdist"))
        corp = stack.enter_context(Server(lab, "unbound, corp.example"))
        cluster = stack.enter_context(Server(lab, "bind9, cluster.local"))
        routes = (
            f"--route=corp.example={LOOPBACK}:{corp.port}#{TLS_NAME}",
            f"--route=cluster.local=tcp://{LOOPBACK}:{cluster.port}",
        )
        proxy = stack.enter_context(Proxy(lab, public.port, options=routes))
        servers = {"corp.example": corp, "cluster.local": cluster}
        yield Horizon(proxy, public, servers)


PRIVATE_ADDRESSES = {"corp.example": CORP_ADDRESS, "cluster.local": CLUSTER_ADDRESS}


def check_own_server(domain: str, horizon: Horizon) -> None:
    expect_match("status: NXDOMAIN", ask(horizon.proxy, f"{DIG} not{domain} A"))
    before = horizon.public.queries()
    for name in ("one", "TWO", "a.b.c"):
        for transport in ("+notcp", "+tcp"):
            question = f"{transport[1:4]}{name}.{domain}"
            output = ask(horizon.proxy, f"{DIG} {transport} {question}")
            expect_match(rf"\sA\s+{re.escape(PRIVATE_ADDRESSES[domain])}\s", output)
            seen = horizon.servers[domain].process.output()
            expect(question in seen, f"{question} is not in the server's log")
    count = horizon.public.queries() - before
    expect(count == 0, f"the public server was sent {count} queries")


def check_load_on_domain(domain: str, horizon: Horizon) -> None:
    before = horizon.public.queries()
    names = horizon.proxy.lab.new_directory("names") / "names"
    names.write_text("".join(f"load{i}.{domain} A\n" for i in range(20_000)))
    report = dnsperf(horizon.proxy.port, names, "-n", "1", outstanding=200)
    statistics = report[report.find("Statistics:") :]
    expect_match(r"Response codes: +NOERROR 20000 \(100.00%\)\n", statistics)
    count = horizon.public.queries() - before
    expect(count == 0, f"the public server was sent {count} queries")


def expect_outage(domain: str, word: str, horizon: Horizon) -> None:
    """Expect SERVFAIL that names the domain's server, and nothing at the public one."""
    before = horizon.public.queries()
    for number in range(3):
        output = ask(horizon.proxy, f"{DIG} {word}{number}.{domain}")
        expect_match("status: SERVFAIL", output)
        expect_match(rf"EDE: .*{LOOPBACK}:{horizon.servers[domain].port}", output)
    count = horizon.public.queries() - before
    expect(count == 0, f"the public server was sent {count} queries")
    expect_match(IPV4, ask(horizon.proxy, f"{DIG} {HOST}"))


def expect_recovery(domain: str, word: str, horizon: Horizon) -> None:
    deadline = time.monotonic() + 3
    address, number = PRIVATE_ADDRESSES[domain], 0
    while address not in (
        output := ask(horizon.proxy, f"{DIG} {word}{number}.{domain}")
    ):
        expect(time.monotonic() < deadline, f"no recovery: {output}")
        time.sleep(0.05)
        number += 1


def check_domain_down(domain: str, horizon: Horizon) -> None:
    """Its server hangs, then goes on; then it is killed, and started again."""
    server = horizon.servers[domain]
    server.process.send(signal.SIGSTOP)
    try:
        expect_outage(domain, "stopped", horizon)
    finally:
        server.process.send(signal.SIGCONT)
    expect_recovery(domain, "continued", horizon)
    server.process.stop(signal.SIGKILL)
    time.sleep(2)  # a server that has worked is given 1.5 s to restart
    expect_outage(domain, "killed", horizon)
    server.start()
    expect_recovery(domain, "restarted", horizon)


def check_clear_text_told(horizon: Horizon) -> None:
    said = re.findall("not encrypted: .*", horizon.proxy.process.output())
    where = f"tcp://{LOOPBACK}:{horizon.servers['cluster.local'].port}"
    expect(said == [f"not encrypted: domain=cluster.local upstream={where}"], str(said))


HORIZON_CHECKS: dict[str, Callable[[Horizon], None]] = {
    "clear text is told": check_clear_text_told,
    **{
        f"{domain}, {what}": partial(check, domain)
        for domain in PRIVATE_ADDRESSES
        for what, check in {
            "answered by its own server": check_own_server,
            "20,000 names": check_load_on_domain,
            "server stopped, killed, restarted": check_domain_down,
        }.items()
    },
}


# ---- The host ------------------------------------------------------------------------
# What the system does with the process: another user, few descriptors, systemd.

# What is activated by its own socket adds another, and passes on both.
LISTEN_STREAM = ["systemd-socket-activate", "-l", f"{LOOPBACK}:PORT"]
LISTEN_DATAGRAM = [*LISTEN_STREAM, "--datagram"]
# As MemoryDenyWriteExecute= and NoNewPrivileges= of a unit do it: PR_SET_MDWE (65) and
# PR_SET_NO_NEW_PRIVS (38) of prctl(2), which both outlast execve.
DENY = """
import ctypes, os, sys
prctl = ctypes.CDLL(None).prctl
if prctl(38, 1, 0, 0, 0) or prctl(65, 1, 0, 0, 0):
    sys.exit("no PR_SET_MDWE")
os.execv(sys.argv[1], sys.argv[1:])
"""


UNITS = "/etc/systemd/system/dotproxy.socket", "/etc/systemd/system/dotproxy.service"


def expect_new_handshake(server: Server, proxy: Proxy, name: str) -> None:
    """Restart the server and have a name asked that the cache does not know."""
    server.process.stop()
    server.start()
    expect_match("status: NOERROR", ask(proxy, f"{DIG} {name}.{BENCH}"))
    expect(server.queries() > 0, "the server saw no query")


def check_nobody(lab: Lab) -> None:
    """The CA file can be read no more, nor perhaps the library of this Python."""
    if os.geteuid() != 0 or not can_become_nobody():
        raise Skipped("needs root, and a user to become")
    with Server(lab, "dnsdist") as server, Proxy(lab, server.port) as proxy:
        process = Path(f"/proc/{proxy.process.pid}")
        status = (process / "status").read_text()
        for line in ("Uid", "Gid"):
            expect_match(rf"\n{line}:(\s+65534){{4}}\n", status)
        for line in (r"Groups:\s*", r"NoNewPrivs:\s+1", r"CapPrm:\s+0+"):
            expect_match(rf"\n{line}\n", status)
        expect_match(r"core file size +0 +0 ", (process / "limits").read_text())
        expect_match(" user=nobody ", proxy.process.output())
        expect_new_handshake(server, proxy, "dropped")
        proxy.process.send(signal.SIGHUP)
        expect_new_handshake(server, proxy, "hangup")
        expect_match("cache flushed", proxy.process.output())
        check_clean_end(proxy)


def check_few_descriptors(lab: Lab) -> None:
    limited = ["prlimit", "--nofile=64:64"]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Server(lab, "dnsdist"))
        proxy = stack.enter_context(Proxy(lab, server.port, prefix=limited))
        for _ in range(100):
            address = LOOPBACK, proxy.port
            stack.enter_context(socket.create_connection(address, 5))
        for number in range(3):
            expect_new_handshake(server, proxy, f"few{number}")
        log = proxy.process.output()
        expect_match(r"few descriptors: limit=64 max_tcp_clients=\d+:", log)
        expect("Too many open files" not in log, "descriptors ran out")


def check_activated(prefix: Sequence[str], first: str, lab: Lab) -> None:
    server = Server(lab, "dnsdist")
    with server, Proxy(lab, server.port, prefix=prefix, activated=True) as proxy:
        for transport in (first, "+tcp", "+notcp"):
            expect_match(IPV4, ask(proxy, f"{DIG} {transport} {HOST}"))
        log = proxy.process.output()
        expect_match(rf"ready: listen={LOOPBACK}:{proxy.port} ", log)
        check_clean_end(proxy)


def check_notifications(lab: Lab) -> None:
    name = f"dotproxy-peers-{os.getpid()}"
    with contextlib.ExitStack() as stack:
        manager = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        manager.bind(f"\0{name}")
        manager.settimeout(5)
        server = stack.enter_context(Server(lab, "dnsdist"))
        variables = ("NOTIFY_SOCKET", f"@{name}"), ("WATCHDOG_USEC", "200000")
        proxy = stack.enter_context(Proxy(lab, server.port, variables=variables))
        start = time.monotonic()
        heard = [manager.recv(4096).decode() for _ in range(6)]
        expect(0.3 < time.monotonic() - start < 2, "not a ping in each 100 ms")
        expect_match(r"\AREADY=1\nSTATUS=1 of 1 upstreams up, ", heard[0])
        expect(all(h.startswith("WATCHDOG=1\nSTATUS=") for h in heard[1:]), str(heard))
        proxy.process.send(signal.SIGHUP)
        proxy.process.stop()
        rest = ""
        with contextlib.suppress(socket.timeout):
            manager.settimeout(0.2)
            while True:
                rest += manager.recv(4096).decode() + "\n"
        expect_match(r"\nRELOADING=1\nMONOTONIC_USEC=\d+\nREADY=1\n", "\n" + rest)
        expect_match(r"\nSTOPPING=1\n", rest)


def check_installed(lab: Lab) -> None:
    """Run what `make install` installs, and have systemd judge the units."""
    directory = lab.new_directory("installed")
    where = f"DESTDIR={directory}", "PREFIX=/opt/dotproxy"
    make = ["make", "-s", "-C", str(lab.proxy.parent), *where]
    program = "/opt/dotproxy/bin/dotproxy"
    socket_unit, service = (str(directory) + unit for unit in UNITS)
    run(*make, "install")
    expect_match(r"\Adotproxy \d", run(f"{directory}{program}", "--version"))
    text = Path(service).read_text()
    expect_match(rf"\nExecStart=/usr/bin/python3 -I {program}\n", text)
    said = run("systemd-analyze", "verify", socket_unit, service)
    expect(not said, said)
    judge = ["systemd-analyze", "security", "--offline=true", "--threshold=14"]
    run(*judge, service)
    run(*make, "uninstall")
    left = [str(path) for path in directory.rglob("*") if not path.is_dir()]
    expect(not left, f"left: {left}")


def check_denied(lab: Lab) -> None:
    prefix = [sys.executable, "-c", DENY]
    try:
        run(*prefix, shutil.which("true") or "/bin/true")
    except CheckError as error:
        raise Skipped("needs Linux 6.3") from error
    server = Server(lab, "dnsdist")
    with server, Proxy(lab, server.port, prefix=prefix) as proxy:
        expect_new_handshake(server, proxy, "denied")


HOST_CHECKS: dict[str, Callable[[Lab], None]] = {
    "started as root: nobody, and answers after new handshakes": check_nobody,
    "64 descriptors, 100 TCP clients: UDP and upstreams have theirs": (
        check_few_descriptors
    ),
    "sockets from systemd-socket-activate, first query over UDP": partial(
        check_activated, LISTEN_DATAGRAM + LISTEN_STREAM, "+notcp"
    ),
    "sockets from systemd-socket-activate, first query over TCP": partial(
        check_activated, LISTEN_STREAM + LISTEN_DATAGRAM, "+tcp"
    ),
    "sd_notify: ready, watchdog, reload, stop": check_notifications,
    "make install: runs; units valid, exposed at most 1.4": check_installed,
    "no memory both writable and executable": check_denied,
}


# ---- Encrypted clients ---------------------------------------------------------------
# DoT clients ask the proxy itself. Its certificate is a file of its own for each stage,
# which can be replaced.

SERVED_TLS_PORT = re.compile(rf" tls={re.escape(LOOPBACK)}:(\d+) ")
TLS_KDIG = (
    f"kdig @{LOOPBACK} -p PORT +retry=0 +tls +tls-ca=DIRECTORY/ca.pem"
    f" +tls-hostname={TLS_NAME}"
)


class EncryptedProxy(Proxy):
    """dotproxy with a certificate, and where it serves DoT."""

    def __init__(self, lab: Lab, upstream_port: int) -> None:
        self.pair = lab.new_directory("pair")
        lab.directory.chmod(0o711)  # where it starts as root, it is nobody that reloads
        self.pair.chmod(0o755)
        self.show("good")
        chain, key = str(self.pair / "chain.pem"), str(self.pair / "key.pem")
        options = ("--tls-listen", f"{LOOPBACK}:0", "--tls-cert", chain)
        super().__init__(lab, upstream_port, options=(*options, "--tls-key", key))
        found = SERVED_TLS_PORT.search(self.process.output())
        expect(found is not None, "no port for DoT in the log")
        self.tls_port = int(found[1]) if found else 0

    def __enter__(self) -> EncryptedProxy:
        return self

    def show(self, name: str, key: str = "") -> None:
        """Put a certificate of the lab in place, with its key or with another."""
        directory = self.pair.parent
        self.put(directory / f"{name}.pem", directory / f"{key or name}.key")

    def put(self, *sources: Path) -> None:
        """Copy a chain and a key to where the proxy reads them."""
        for source, name in zip(sources, ("chain.pem", "key.pem")):
            shutil.copy(source, self.pair / name)
            (self.pair / name).chmod(0o644)

    def reload(self, said: str) -> None:
        """Send SIGHUP and wait until the log says what came of it."""
        before = self.process.output().count(said)
        self.process.send(signal.SIGHUP)
        self.process.wait_until(lambda: self.process.output().count(said) > before)


@contextlib.contextmanager
def encrypted_proxy(lab: Lab) -> Iterator[EncryptedProxy]:
    make_certificate(lab.directory, "renewed", names=f"{GOOD_NAMES},DNS:renewed.test")
    with Server(lab, "dnsdist") as server, EncryptedProxy(lab, server.port) as proxy:
        yield proxy


def ask_encrypted(proxy: EncryptedProxy, command: str) -> str:
    words = command.replace("PORT", str(proxy.tls_port))
    return run(*words.replace("DIRECTORY", str(proxy.lab.directory)).split())


def check_encrypted(question: Ask, proxy: EncryptedProxy) -> None:
    output = ask_encrypted(proxy, question.command)
    for pattern in question.patterns:
        expect_match(pattern, output)


ENCRYPTED_ASKS = {
    "kdig +tls": Ask(
        f"{TLS_KDIG} +nopadding {HOST} A",
        ["TLS session", "status: NOERROR", IPV4, r"Received [4-9]\d B"],
    ),
    "kdig +tls +padding: 468 octets, twice": Ask(
        f"{TLS_KDIG} +padding {HOST} A {HOST} A",
        [r"PADDING: \d+ B[\s\S]+Received 468 B[\s\S]+Received 468 B"],
    ),
    "kdig +tls +padding, 100 addresses: a multiple of 468": Ask(
        f"{TLS_KDIG} +padding {MANY} A", [r"Received 1872 B"]
    ),
    "kdig +tls +keepopen, five names": Ask(
        f"{TLS_KDIG} +keepopen +short {' '.join(LIST)}", [LIST_ADDRESSES]
    ),
    "kdig +tls +dnssec, large TXT": Ask(f"{TLS_KDIG} +dnssec {LARGE} TXT", STRINGS),
    "kdig +tls NXDOMAIN": Ask(f"{TLS_KDIG} {MISSING} A", ["status: NXDOMAIN"]),
}


class StrictClient:
    """What a phone does: verified TLS, many queries on it, a session to resume."""

    def __init__(
        self, proxy: EncryptedProxy, version: ssl.TLSVersion | None = None
    ) -> None:
        self._address = LOOPBACK, proxy.tls_port
        authority = str(proxy.lab.directory / "ca.pem")
        self._context = ssl.create_default_context(cafile=authority)
        self._context.set_alpn_protocols(["dot"])
        if version is not None:
            self._context.minimum_version = self._context.maximum_version = version
        self.connect()

    def __enter__(self) -> StrictClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.tls.close()

    def connect(self, session: ssl.SSLSession | None = None) -> None:
        raw = socket.create_connection(self._address, PATIENCE)
        self.tls = self._context.wrap_socket(
            raw, server_hostname=TLS_NAME, session=session
        )

    def reconnect(self) -> None:
        """Close, connect again, and expect the session to be resumed."""
        session = self.tls.session
        self.tls.close()
        self.connect(session)
        expect(bool(self.tls.session_reused), "the session was not resumed")

    def names(self) -> list[str]:
        certificate = self.tls.getpeercert() or {}
        return [str(pair[1]) for pair in certificate.get("subjectAltName", ())]

    def ask(self, *numbers: int) -> None:
        """Send queries in one write, and expect an answer to each."""
        queries = {number: build_query(number) for number in numbers}
        self.tls.sendall(
            b"".join(struct.pack("!H", len(q)) + q for q in queries.values())
        )
        for _ in numbers:
            message = self._read(int.from_bytes(self._read(2), "big"))
            query = queries.pop(int.from_bytes(message[:2], "big"))
            result = result_of(query, message)
            expect(result == "right", result)

    def _read(self, size: int) -> bytes:
        octets = b""
        while len(octets) < size:
            chunk = self.tls.recv(size - len(octets))
            expect(bool(chunk), "the proxy closed")
            octets += chunk
        return octets


def check_phone(version: ssl.TLSVersion, proxy: EncryptedProxy) -> None:
    with StrictClient(proxy, version) as client:
        expect(client.tls.selected_alpn_protocol() == "dot", "no ALPN")
        for start in range(0, 2000, 200):
            client.ask(*range(start, start + 200))
        time.sleep(3)
        client.ask(1, 2, 3)
        for number in range(5):
            client.reconnect()
            client.ask(number)


def check_wrong_name_by_client(proxy: EncryptedProxy) -> None:
    command = TLS_KDIG.replace(TLS_NAME, "other.test").replace("PORT", "%d")
    words = (command % proxy.tls_port).replace("DIRECTORY", str(proxy.lab.directory))
    result = subprocess.run(
        [*words.split(), HOST], capture_output=True, text=True, timeout=CLIENT_SECONDS
    )
    expect(IPV4 not in result.stdout, result.stdout)


def check_behind_another(proxy: EncryptedProxy) -> None:
    with Proxy(proxy.lab, proxy.tls_port) as other:
        for question in (f"{DIG} {HOST} A", f"{DIG} +tcp {HOST} A"):
            expect_match(IPV4, ask(other, question))
        with Load(other.port, rate=500, seconds=2) as load:
            pass
        outcomes = load.outcomes()
        expect(all(o.result == "right" for o in outcomes), summary(outcomes))


def check_encrypted_load(proxy: EncryptedProxy) -> None:
    names = write_names(proxy.lab, 5000, "dot")
    report = dnsperf(proxy.tls_port, names, "-n", "1", "-m", "dot", outstanding=100)
    expect_match(r"Queries lost: +0 ", report)
    expect_match(r"Response codes: +NOERROR 5000 \(100.00%\)\n", report)


def s_client(proxy: EncryptedProxy, options: str, said: str = "") -> str:
    """Run `openssl s_client`, type what is to be said, and return its output."""
    command = f"openssl s_client -connect {LOOPBACK}:{proxy.tls_port} {options}"
    process = subprocess.Popen(
        command.split(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdin is not None
    for line in ["", *said.splitlines()]:
        process.stdin.write(f"{line}\n" if line else "")
        process.stdin.flush()
        time.sleep(0.3)
    return process.communicate(timeout=CLIENT_SECONDS)[0]


def check_old_client(proxy: EncryptedProxy) -> None:
    output = s_client(proxy, "-tls1_1 -cipher ALL:@SECLEVEL=0")
    expect_match("alert protocol version", output)


def check_key_update(proxy: EncryptedProxy) -> None:
    output = s_client(proxy, "-tls1_3 -msg", "K\nK\nK")
    expect_match(r"<<< TLS 1.3, Handshake .*KeyUpdate", output)


def check_renegotiation(proxy: EncryptedProxy) -> None:
    expect_match("no renegotiation", s_client(proxy, "-tls1_2", "R"))


def check_resumption(version: str, proxy: EncryptedProxy) -> None:
    session = proxy.pair / f"session{version}"
    s_client(proxy, f"{version} -sess_out {session}")
    expect_match("Reused, TLS", s_client(proxy, f"{version} -sess_in {session}"))


def check_garbage(proxy: EncryptedProxy) -> None:
    """Strangers send 500 broken hellos, or none; clients notice nothing."""
    noise = random.Random(1)
    with contextlib.ExitStack() as stack, StrictClient(proxy) as client:
        for number in range(500):
            stranger = stack.enter_context(socket.socket())
            stranger.connect((LOOPBACK, proxy.tls_port))
            with contextlib.suppress(OSError):
                stranger.sendall(noise.randbytes(noise.randrange(3000)))
            client.ask(number)
            if number % 10 == 0:
                with StrictClient(proxy) as other:
                    other.ask(number)


def check_rotation(proxy: EncryptedProxy) -> None:
    """The pair is replaced, then broken, while clients ask and connect."""
    stop, troubles = threading.Event(), []

    def go_on_asking(connect: bool) -> None:
        try:
            with StrictClient(proxy) as client:
                for number in range(1 << 16):
                    if stop.is_set():
                        return
                    if connect:
                        client.tls.close()
                        client.connect()
                    client.ask(number)
        except (OSError, CheckError) as error:
            troubles.append(error)

    threads = [threading.Thread(target=go_on_asking, args=(c,)) for c in (False, True)]
    for thread in threads:
        thread.start()
    try:
        for pair, said, renewed in (
            (("renewed",), "certificate loaded", True),
            (("good", "renewed"), "WARNING certificate not replaced", True),
            (("good",), "certificate loaded", False),
        ):
            time.sleep(0.5)
            proxy.show(*pair)
            proxy.reload(said)
            with StrictClient(proxy) as client:
                client.ask(1)
                shown = client.names()
            expect(("renewed.test" in shown) == renewed, f"{pair}: {shown}")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    expect(not troubles, f"{troubles}")


def check_activated_encrypted(proxy: EncryptedProxy) -> None:
    """A socket named tls that systemd passes is for DoT clients."""
    prefix = ["systemd-socket-activate", "-l", f"{LOOPBACK}:PORT", "--fdname=tls"]
    if not shutil.which(prefix[0]):
        raise Skipped(f"{prefix[0]} is not installed")
    files = [str(proxy.pair / name) for name in ("chain.pem", "key.pem")]
    other = Proxy(
        *(proxy.lab, proxy.tls_port),
        options=("--tls-cert", files[0], "--tls-key", files[1]),
        prefix=prefix,
        activated=True,
    )
    kdig = TLS_KDIG.replace("PORT", str(other.port))
    with other:
        output = ask_encrypted(proxy, f"{kdig} {HOST} A")
        expect_match(IPV4, output)


README_CERTIFICATE = re.compile(r"\$ openssl (req [^\\\n]*(?:\\\n[^\\\n]*)*)")


def check_readme(proxy: EncryptedProxy) -> None:
    """The certificate that README tells how to make is good for every client here."""
    found = README_CERTIFICATE.search(
        (proxy.lab.proxy.parent / "README.md").read_text()
    )
    expect(found is not None, "no recipe in README.md")
    directory = proxy.lab.new_directory("readme")
    openssl(directory, found[1].replace("\\\n", "") if found else "")
    proxy.put(directory / "dns.pem", directory / "dns.key")
    proxy.reload("names=dns.home.arpa")
    kdig = TLS_KDIG.replace("DIRECTORY/ca.pem", str(directory / "dns.pem"))
    kdig = kdig.replace(TLS_NAME, "dns.home.arpa")
    expect_match(IPV4, ask_encrypted(proxy, f"{kdig} {HOST} A"))
    name, options = "#dns.home.arpa", ("--ca-file", str(directory / "dns.pem"))
    with Proxy(proxy.lab, proxy.tls_port, name=name, options=options) as other:
        expect_match(IPV4, ask(other, f"{DIG} {HOST} A"))


ENCRYPTED_CHECKS: dict[str, Callable[[EncryptedProxy], None]] = {
    **{name: partial(check_encrypted, each) for name, each in ENCRYPTED_ASKS.items()},
    "kdig +tls, wrong name: not asked": check_wrong_name_by_client,
    "phone, TLS 1.2": partial(check_phone, ssl.TLSVersion.TLSv1_2),
    "phone, TLS 1.3": partial(check_phone, ssl.TLSVersion.TLSv1_3),
    "dotproxy before dotproxy": check_behind_another,
    "dnsperf, 5,000 names over TLS": check_encrypted_load,
    "openssl s_client, TLS 1.1: refused": check_old_client,
    "openssl s_client, TLS 1.2: resumed": partial(check_resumption, "-tls1_2"),
    "openssl s_client, TLS 1.3: resumed": partial(check_resumption, "-tls1_3"),
    "openssl s_client, KeyUpdate: answered": check_key_update,
    "openssl s_client, renegotiation: refused": check_renegotiation,
    "500 broken hellos beside clients": check_garbage,
    "certificate replaced and broken under load": check_rotation,
    "socket from systemd-socket-activate": check_activated_encrypted,
    "certificate made as README says": check_readme,
    "SIGTERM: exit status 0, no traceback in the log": check_clean_end,
}


# ---- Health check and doctor ---------------------------------------------------------
# What both say of the set-ups that people get wrong.


class Said(NamedTuple):
    """A program's exit status and output."""

    status: int
    text: str


def errand(lab: Lab, *options: str, before: tuple[str, ...] = ()) -> Said:
    """Run dotproxy for something else than to serve, perhaps under another command."""
    command = [*before, sys.executable, str(lab.proxy), *options]
    result = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=CLIENT_SECONDS,
        text=True,
    )
    return Said(result.returncode, result.stdout)


def doctor(
    lab: Lab, port: int, *more: str, ca: str = "ca", before: tuple[str, ...] = ()
) -> Said:
    upstream = f"{LOOPBACK}:{port}#{TLS_NAME}"
    trust = ["--ca-file", str(lab.directory / f"{ca}.pem")] if ca else []
    listen = f"--listen={LOOPBACK}:{free_port()}"
    options = ("--doctor", listen, f"--upstream={upstream}", *trust, *more)
    return errand(lab, *options, before=before)


def expect_finding(said: Said, status: int, check: str, pattern: str) -> None:
    """Expect this exit status, and this of a check: `ok|warn|FAIL`, then its detail."""
    expect(said.status == status, f"status {said.status}: {said.text}")
    expect_match(rf"(?m)^  {check} +({pattern})", said.text)


def check_health(lab: Lab) -> None:
    """Healthy; then the upstream is ended; then the proxy."""
    with Server(lab, "dnsdist") as server, Proxy(lab, server.port) as proxy:
        options = ("--healthcheck", f"--listen={LOOPBACK}:{proxy.port}", "--timeout=2")
        for ended, status, pattern in (
            (None, 0, r"\Ahealthy: answered in [\d.]+ ms\n\Z"),
            (server, 1, r"\Aupstream down: .*refused.*\n\Z"),
            (proxy, 1, r"\Aproxy down: nothing listens.*\n\Z"),
        ):
            if ended is not None:
                ended.process.stop()
            said = errand(lab, *options)
            expect(said.status == status, f"status {said.status}: {said.text}")
            expect_match(pattern, said.text)


def check_doctor_healthy(program: str, padding: str, lab: Lab) -> None:
    with Server(lab, program) as server:
        said = doctor(lab, server.port)
    expect_finding(said, 0, "handshake", r"ok +TLSv1\.3, ")
    expect_finding(said, 0, "resumption", "ok +session resumed")
    expect_finding(said, 0, "padding", padding)
    expect_finding(said, 0, "certificate", f"warn +for {TLS_NAME}, {LOOPBACK}; 1 days")


def check_doctor_refuses(certificate: str, cause: str, lab: Lab) -> None:
    with Server(lab, "dnsdist", certificate) as server:
        said = doctor(lab, server.port)
        count = server.queries()
    expect_finding(said, 1, "certificate", f"FAIL .*{cause}")
    expect_finding(said, 1, "shown", "warn +valid from .* not trusted")
    expect(count == 0, f"the server was sent {count} queries")


def check_doctor_pin(lab: Lab) -> None:
    """Compare the pin with what openssl says."""
    command = "openssl x509 -pubkey -noout | openssl pkey -pubin -outform der"
    script = f"{command} | openssl dgst -sha256 -binary | base64"
    path = lab.directory / "good.pem"
    pin = run("sh", "-c", f"< {shlex.quote(str(path))} {script}").strip()
    with Server(lab, "dnsdist") as server:
        expect_finding(doctor(lab, server.port), 0, "pin", f"ok +{re.escape(pin)}$")


def check_doctor_refused(lab: Lab) -> None:
    expect_finding(doctor(lab, free_port()), 1, "connect", "FAIL +connection refused")


def check_doctor_black_hole(lab: Lab) -> None:
    """A server that accepts no more connections: what is sent to it is dropped."""
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind((LOOPBACK, 0))
        full.listen(0)
        for _ in range(3):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        start = time.monotonic()
        said = doctor(lab, full.getsockname()[1])
    expect_finding(said, 1, "connect", "FAIL +no answer to the connection.*firewall")
    expect(time.monotonic() - start < 11, f"{time.monotonic() - start:.1f} s")


def check_doctor_slow(lab: Lab) -> None:
    with Server(lab, "dnsdist") as server, slow_link(lab, server.port, 0.6) as port:
        said = doctor(lab, port)
    expect_finding(said, 0, "latency", r"warn +6\d\d\.\d ms")


def check_doctor_no_authorities(lab: Lab) -> None:
    before = ("env", "SSL_CERT_FILE=/nonexistent", "SSL_CERT_DIR=/nonexistent")
    with Server(lab, "dnsdist") as server:
        said = doctor(lab, server.port, ca="", before=before)
        expect(server.queries() == 0, "the server was sent queries")
    expect_finding(said, 1, "CA certificates", "FAIL +none in /nonexistent")
    expect_finding(said, 1, "certificate", "FAIL .*no CA bundle: install")


def check_doctor_clock(offset: str, pattern: str, cause: str, lab: Lab) -> None:
    if not shutil.which("faketime"):
        raise Skipped("needs faketime")
    before = ("env", "FAKETIME_DONT_FAKE_MONOTONIC=1", "faketime", "-f", offset)
    with Server(lab, "dnsdist") as server:
        said = doctor(lab, server.port, before=before)
        expect(server.queries() == 0, "the server was sent queries")
    expect_finding(said, 1, "clock", pattern)
    expect_finding(said, 1, "certificate", f"FAIL .*{cause}.*check the clock")


def check_doctor_port(lab: Lab) -> None:
    """The port is held by the proxy itself, then by another program."""
    with Server(lab, "unbound") as other, Server(lab, "dnsdist") as server:
        with Proxy(lab, server.port) as proxy:
            held = f"{LOOPBACK}:{proxy.port}"
            said = doctor(lab, server.port, f"--listen={held}")
            pattern = r"ok +held by dotproxy \(pid \d+\), which runs; healthy"
            expect_finding(said, 0, re.escape(held), pattern)
        taken = f"{LOOPBACK}:{other.port}"
        said = doctor(lab, server.port, f"--listen={taken}")
        expect_finding(said, 1, re.escape(taken), r"FAIL +taken by unbound \(pid \d+")


BEFORE_RELEASE = "FAIL .*before this program was made"
DOCTOR_CHECKS: dict[str, Callable[[Lab], None]] = {
    "health check: healthy, upstream down, proxy down": check_health,
    "dnsdist": partial(check_doctor_healthy, "dnsdist", "ok +none"),
    "knot-resolver": partial(check_doctor_healthy, "knot-resolver", "ok +answers of"),
    "pin is openssl's": check_doctor_pin,
    "wrong name": partial(check_doctor_refuses, "wrong-name", WRONG_NAMES_IN_LOG),
    "expired": partial(check_doctor_refuses, "expired", "expired"),
    "unknown CA": partial(check_doctor_refuses, "unknown", "unknown CA"),
    "refused": check_doctor_refused,
    "black hole": check_doctor_black_hole,
    "slow": check_doctor_slow,
    "no CA certificates": check_doctor_no_authorities,
    "clock a year behind": partial(
        check_doctor_clock, "-365d", f"{BEFORE_RELEASE}|warn .*no upstream", "not valid"
    ),
    "clock a year ahead": partial(
        check_doctor_clock, "+365d", "warn .*no upstream's certificate", "expired"
    ),
    "who holds the port": check_doctor_port,
}


# ---- Hostile clients -----------------------------------------------------------------
# One proxy for crowds and garbage, which must be as it was when all that is over.

POOL_SECONDS = 20.0  # after which a thread of the proxy that has no work ends
CROWD_SECONDS = 6.0
FUZZ_DATAGRAMS = 20_000
FUZZ_STREAMS = 2_000


class Resources(NamedTuple):
    """What a process holds."""

    threads: int
    descriptors: int
    megabytes: float

    @classmethod
    def of(cls, process: Process) -> Resources:
        directory = Path(f"/proc/{process.pid}")
        fields = dict(
            line.split(":", 1) for line in (directory / "status").open() if ":" in line
        )
        kilobytes = int(fields["VmRSS"].split()[0])
        descriptors = len(list((directory / "fd").iterdir()))
        return cls(int(fields["Threads"]), descriptors, kilobytes / 1024)


class Target(NamedTuple):
    """A proxy, and what it held before it was attacked."""

    proxy: Proxy
    before: Resources


@contextlib.contextmanager
def target(lab: Lab) -> Iterator[Target]:
    """Run a proxy that has answered some queries."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    with Server(lab, "dnsdist") as server, Proxy(lab, server.port) as proxy:
        expect_undisturbed(Load(proxy.port, rate=200, seconds=0.5))
        yield Target(proxy, Resources.of(proxy.process))


def expect_undisturbed(load: Load, worst: float = PATIENCE) -> None:
    """Expect right answers to a load that has run or runs now, 99 % of them soon.

    The calmest third of the time counts: others may use the machine as well.
    """
    load.finish()
    outcomes = load.outcomes()
    expect(all(o.result == "right" for o in outcomes), summary(outcomes))
    size = len(outcomes) // 3
    thirds = [outcomes[start : start + size] for start in range(0, 3 * size, size)]
    late = min(sorted(o.seconds for o in third)[-size // 100] for third in thirds)
    expect(late < worst, f"99th percentile {late:.4f} s, {summary(outcomes)}")


def expect_no_error(process: Process) -> None:
    process.send(signal.SIGUSR1)  # an error here: it has died
    output = process.output()
    expect(not re.search("Traceback| ERROR ", output), output[-1000:])


def connect(port: int, source: str = LOOPBACK) -> socket.socket:
    return socket.create_connection((LOOPBACK, port), 5, (source, 0))


def ask_over_tcp(port: int, number: int) -> float:
    """Ask over a new connection; return how long the right answer took."""
    query, started = build_query(number), time.monotonic()
    with connect(port) as client, client.makefile("rb") as file:
        client.sendall(len(query).to_bytes(2, "big") + query)
        message = file.read(int.from_bytes(file.read(2), "big"))
    result = result_of(query, message) if len(message) > 12 else "no answer"
    expect(result == "right", f"over TCP: {result}")
    return time.monotonic() - started


def check_crowd(target: Target) -> None:
    """Many hold connections, some send an octet a second, one never reads."""
    port = target.proxy.port
    with contextlib.ExitStack() as stack:
        crowd = [
            stack.enter_context(connect(port, f"127.0.0.{10 + number % 8}"))
            for number in range(1000)
        ]
        drips = [
            stack.enter_context(connect(port, f"127.0.0.{20 + number % 2}"))
            for number in range(200)
        ]
        deaf = stack.enter_context(connect(port, "127.0.0.30"))
        deaf.setblocking(False)
        octets, times = build_query(1), []
        questions = (len(octets).to_bytes(2, "big") + octets) * 300
        with Load(port, rate=200, seconds=CROWD_SECONDS) as load:
            for second in range(int(CROWD_SECONDS)):
                for client in drips:
                    with contextlib.suppress(OSError):  # it was made room of
                        client.send(octets[second : second + 1])
                for part in range(5):
                    with contextlib.suppress(OSError):
                        deaf.send(questions)
                    times.append(ask_over_tcp(port, second * 5 + part))
                    time.sleep(0.18)
        expect(len(crowd) == 1000, "fewer clients than meant")
    expect(max(times) < 0.2, f"a new TCP client waited {max(times):.3f} s")
    expect_undisturbed(load, worst=0.020)
    expect_no_error(target.proxy.process)


def mutate(message: bytes, dice: random.Random) -> bytes:
    """Damage a message, or make up another."""
    kind = dice.randrange(4)
    if kind == 0:
        return bytes(dice.randrange(256) for _ in range(dice.randrange(100)))
    place = dice.randrange(len(message))
    if kind == 1:
        return message[:place]
    if kind == 2:
        return message + message[place:]
    octets = bytearray(message)
    for _ in range(dice.randrange(1, 4)):
        octets[dice.randrange(len(octets))] = dice.randrange(256)
    return bytes(octets)


def hostile_seeds() -> list[bytes]:
    """Build queries worth damaging: plain ones, and with OPT and several options."""
    opt = b"\0\0\x29\x04\xd0\0\0\x80\0"
    options = b"\0\x0a\0\x08cookie..\0\x0c\0\x04pad.", b"\0\x08\0\x04\0\x01\0\0"
    plain = [build_query(number) for number in range(50)]
    return plain + [
        message[:11] + b"\1" + message[12:] + opt + bytes([0, len(each)]) + each
        for message in plain
        for each in (b"", *options)
    ]


def send_garbage(port: int, seeds: list[bytes], dice: random.Random) -> None:
    """Send damaged datagrams, and damaged streams of which 20 are open at a time."""
    streams: list[socket.socket] = []
    with socket.socket(type=socket.SOCK_DGRAM) as client:
        for number in range(FUZZ_DATAGRAMS):
            client.sendto(mutate(dice.choice(seeds), dice), (LOOPBACK, port))
            if number % (FUZZ_DATAGRAMS // FUZZ_STREAMS) == 0:
                streams.append(garbage_stream(port, seeds, dice))
                time.sleep(0.001)
            if len(streams) > 20:
                streams.pop(0).close()
    for stream in streams:
        stream.close()


def garbage_stream(port: int, seeds: list[bytes], dice: random.Random) -> socket.socket:
    stream = connect(port)
    messages = [dice.choice(seeds) for _ in range(dice.randrange(1, 4))]
    octets = b"".join(len(each).to_bytes(2, "big") + each for each in messages)
    if dice.randrange(3) == 0:  # closing it is a reset
        linger = struct.pack("ii", 1, 0)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    with contextlib.suppress(OSError):
        stream.sendall(mutate(octets, dice))
    return stream


def check_fuzz(target: Target) -> None:
    port, process = target.proxy.port, target.proxy.process
    seed = random.randrange(1 << 32)
    with Load(port, rate=100, seconds=5) as load:
        send_garbage(port, hostile_seeds(), random.Random(seed))
    try:
        expect_undisturbed(load)
        expect_no_error(process)
        ask_over_tcp(port, 1)
    except CheckError as error:
        raise CheckError(f"{error} (seed {seed})") from None


def check_clients_beyond_descriptors(target: Target) -> None:
    """More TCP clients come than the proxy has descriptors for."""
    lab, upstream_port = target.proxy.lab, target.proxy.upstream_port
    limited = ["prlimit", "--nofile=64:64"]
    with Proxy(lab, upstream_port, prefix=limited) as proxy:
        with Load(proxy.port, rate=100, seconds=4) as load:
            with contextlib.ExitStack() as stack:
                for _ in range(100):
                    stack.enter_context(connect(proxy.port))
                time.sleep(0.5)
                before = proxy.process.cpu_seconds()
                time.sleep(2)
                spent = proxy.process.cpu_seconds() - before
            time.sleep(0.5)
            took = ask_over_tcp(proxy.port, 1)
        expect_undisturbed(load)
        expect(spent < 0.4, f"{spent:.2f} s of CPU in 2 s with nothing to do")
        expect(took < 0.5, f"a TCP client waited {took:.3f} s after the others went")
        expect_no_error(proxy.process)


def check_rate(target: Target) -> None:
    """A client over its rate is sent to TCP, and gets its answers there, later."""
    options = "--rate-limit=20", "--rate-limit-all"
    lab, upstream_port = target.proxy.lab, target.proxy.upstream_port
    with Proxy(lab, upstream_port, options=options) as proxy:
        with socket.socket(type=socket.SOCK_DGRAM) as client:
            client.settimeout(1)
            client.connect((LOOPBACK, proxy.port))
            for number in range(60):
                client.send(build_query(number))
            flags = [client.recv(4096)[2] for _ in range(50)]  # 40 and half of 20
        truncated = sum(flag & 2 > 0 for flag in flags)
        expect(8 <= truncated <= 10, f"{truncated} truncated answers")
        names = " ".join(f"name{number}.{BENCH}" for number in range(60))
        started, before = time.monotonic(), proxy.process.cpu_seconds()
        output = ask(proxy, f"{DIG} +tcp +keepopen +short {names}")
        took, spent = time.monotonic() - started, proxy.process.cpu_seconds() - before
        expect(output.split() == [BENCH_ADDRESS] * 60, output)
        expect(0.9 < took < 3, f"60 queries over TCP took {took:.2f} s")
        expect(spent < 0.3, f"{spent:.2f} s of CPU for 60 queries")


# Asks from an address, prints the octets sent and received, and how TCP ended. What is
# asked: A and ANY, with and without OPT, cookie and padding, and what is no query.
STRANGER = """
import socket, struct, sys, time
source, server, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
opt = b"\\0\\0\\x29\\x10\\0\\0\\0\\x80\\0"
tails = [b"", opt + b"\\0\\0", opt + b"\\0\\x0c\\0\\x0a\\0\\x08" + bytes(8)]
tails.append(opt + b"\\x01\\x04\\0\\x0c\\x01\\0" + bytes(256))
question = b"\\4many\\7example\\3com\\0"
bodies = [
    struct.pack("!5H", 0x0100, 1, 0, 0, bool(t)) + question + q + b"\\0\\1" + t
    for t in tails for q in (b"\\0\\1", b"\\0\\xff")
]
bodies.append(bytes(10))
udp = socket.socket(type=socket.SOCK_DGRAM)
udp.bind((source, 0))
udp.settimeout(1)
sizes, came = {}, {}
def receive():
    message = udp.recv(65535)
    came[message[:2]] = len(message)
for number in range(1000):
    ident = number.to_bytes(2, "big")
    sizes[ident] = udp.sendto(ident + bodies[number % len(bodies)], (server, port))
    time.sleep(0.001)
try:
    while True:
        receive()
except socket.timeout:
    pass
tcp = socket.create_connection((server, port), 5, (source, 0))
try:
    end = tcp.recv(1)
except ConnectionError:
    end = b""
longer = sum(size > sizes[ident] for ident, size in came.items())
print("in", sum(sizes.values()), "out", sum(came.values()), "answers", len(came))
print("longer", longer, "tcp", "closed" if end == b"" else "open")
"""


@contextlib.contextmanager
def other_host(addresses: Sequence[tuple[str, str]]) -> Iterator[list[str]]:
    """Link a second network namespace; yield the command prefix to run there.

    `addresses`: pairs of an address here and one there, of the same /24.
    """
    holder = subprocess.Popen(["unshare", "--net", "sleep", "60"])
    try:
        ours = os.readlink("/proc/self/ns/net")
        while os.readlink(f"/proc/{holder.pid}/ns/net") == ours:
            time.sleep(0.01)
        there = ["nsenter", "--net", "--target", str(holder.pid)]
        peer = f"peer name there netns {holder.pid}"
        run(*f"ip link add here type veth {peer}".split())
        for near, far in addresses:
            run(*f"ip addr add {near}/24 dev here".split())
            run(*there, *f"ip addr add {far}/24 dev there".split())
        run("ip", "link", "set", "here", "up")
        run(*there, "ip", "link", "set", "there", "up")
        yield there
    finally:
        holder.kill()
        holder.wait()


def check_strangers(target: Target) -> None:
    """By default a private address is served, a public one is refused."""
    if not in_namespace():
        raise Skipped("needs the right to make network namespaces")
    lab, upstream_port, port = target.proxy.lab, target.proxy.upstream_port, free_port()
    private, public = ("10.77.0.1", "10.77.0.2"), ("198.51.100.1", "198.51.100.2")
    listening = Proxy(lab, upstream_port, listen=f"0.0.0.0:{port}")
    with other_host([private, public]) as there, listening as proxy:
        dig = [*there, "dig", "-p", str(port), "+tries=1", "+time=2", "+padding=200"]
        for transport in ("+notcp", "+tcp"):
            output = run(*dig, transport, f"@{private[0]}", HOST)
            expect_match(IPV4, output)
        output = run(*dig, f"@{public[0]}", HOST)
        expect_match(r"status: REFUSED", output)
        expect_match(r"EDE: 18 \(Prohibited\)", output)
        script = [*there, sys.executable, "-c", STRANGER, public[1], public[0]]
        output = run(*script, str(port))
        numbers = re.search(r"in (\d+) out (\d+) answers (\d+)", output)
        sent, received, answers = map(int, numbers.groups() if numbers else (0, 1, 0))
        expect(received <= sent and 10 <= answers <= 50, output)
        expect_match("longer 0 tcp closed", output)
        expect_no_error(proxy.process)


def check_as_before(target: Target) -> None:
    """Compare, once threads without work have had time to end."""
    deadline = time.monotonic() + POOL_SECONDS + 3
    while True:
        now = Resources.of(target.proxy.process)
        threads, descriptors, megabytes = (a - b for a, b in zip(now, target.before))
        if threads <= 1 and descriptors <= 1:  # an upstream connection comes and goes
            break
        expect(time.monotonic() < deadline, f"{target.before} before, {now} after")
        time.sleep(0.2)
    expect(megabytes < 40, f"{target.before} before, {now} after")  # a cache of 32 MiB


HOSTILE_CHECKS: dict[str, Callable[[Target], None]] = {
    f"{FUZZ_DATAGRAMS:,} datagrams and {FUZZ_STREAMS:,} streams": check_fuzz,
    "1,000 idle TCP clients, 200 slow ones, one that never reads": check_crowd,
    "64 descriptors, 100 TCP clients: UDP and CPU": check_clients_beyond_descriptors,
    "over the rate: TC over UDP, slower over TCP": check_rate,
    "strangers": check_strangers,
    "threads, descriptors and memory as before": check_as_before,
}


# ---- Prometheus ----------------------------------------------------------------------
# It scrapes the proxy under load; then each query of the dashboard and of the alerts in
# the README has to find something.

README = Path(__file__).resolve().parent.parent / "README.md"
SCRAPE_SECONDS = 1
BROWSED_MS = 12_000  # of the browser's time, which need not pass: two updates
WATCHED_SECONDS = 15
PROMETHEUS = """
global: {{scrape_interval: {seconds}s, evaluation_interval: {seconds}s}}
rule_files: [{rules}]
scrape_configs:
  - job_name: dotproxy
    static_configs: [{{targets: ['{target}']}}]
"""


def fetch(port: int, path: str, **parameters: str) -> str:
    query = "?" + urllib.parse.urlencode(parameters) if parameters else ""
    url = f"http://{LOOPBACK}:{port}{path}{query}"
    with urllib.request.urlopen(url, timeout=5) as response:
        return str(response.read().decode())


def write_rules(directory: Path) -> Path:
    """Write the rules that the README has."""
    found = re.search(r"```yaml\n(groups:.*?)```", README.read_text(), re.DOTALL)
    expect(found is not None, "no rules in the README")
    path = directory / "rules.yml"
    path.write_text(found[1] if found else "")
    return path


class Monitored:
    """A proxy that has been under load, and the Prometheus that has watched it."""

    def __init__(self, admin_port: int, directory: Path) -> None:
        self.admin_port = admin_port
        self.port = free_port()
        self.completed: dict[str, int] = {}  # queries by transport, as dnsperf says
        self.rules = write_rules(directory)
        config = directory / "prometheus.yml"
        config.write_text(
            PROMETHEUS.format(
                seconds=SCRAPE_SECONDS,
                rules=self.rules,
                target=f"{LOOPBACK}:{admin_port}",
            )
        )
        command = [
            "prometheus",
            f"--config.file={config}",
            f"--storage.tsdb.path={directory / 'data'}",
            f"--web.listen-address={LOOPBACK}:{self.port}",
        ]
        self.process = Process(command, directory)
        self.process.wait_until(lambda: accepts(self.port))

    def ask(self, path: str, **parameters: str) -> dict[str, object]:
        answer = json.loads(fetch(self.port, f"/api/v1/{path}", **parameters))
        expect(answer["status"] == "success", str(answer))
        return dict(answer["data"])

    def expect_found(self, what: str, promql: str) -> None:
        found = self.ask("query", query=promql)["result"]
        expect(bool(found), f"{what} finds nothing: {promql}")


@contextlib.contextmanager
def monitored_proxy(lab: Lab) -> Iterator[Monitored]:
    expect(bool(shutil.which("prometheus")), "prometheus is not installed")
    admin = free_port()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Server(lab, "dnsdist"))
        options = "--admin", f"{LOOPBACK}:{admin}"
        proxy = stack.enter_context(Proxy(lab, server.port, options=options))
        watcher = Monitored(admin, lab.new_directory("prometheus"))
        stack.callback(watcher.process.stop)
        names = write_names(lab, 2000, "watched")
        for mode, seconds in (("udp", WATCHED_SECONDS), ("tcp", 2)):
            load = "-m", mode, "-Q", "400", "-l", str(seconds)
            report = dnsperf(proxy.port, names, *load, outstanding=20)
            count = re.search(r"Queries completed: +(\d+)", report)
            watcher.completed[mode] = int(count[1]) if count else 0
        yield watcher


def check_scraped(watcher: Monitored) -> None:
    targets = watcher.ask("targets")["activeTargets"]
    assert isinstance(targets, list)
    target = targets[0]
    expect(target["health"] == "up", f"{target['health']}: {target['lastError']}")
    missed = watcher.ask("query", query="min_over_time(up[10s]) == 0")["result"]
    expect(not missed, f"scrapes failed: {missed}")


def check_counts(watcher: Monitored) -> None:
    text = fetch(watcher.admin_port, "/metrics")
    for mode, completed in watcher.completed.items():
        pattern = rf'^dotproxy_dns_requests_total{{proto="{mode}",.*}} (\d+)$'
        counted = sum(map(int, re.findall(pattern, text, re.MULTILINE)))
        expect(0 < completed == counted, f"{mode}: {counted}, dnsperf {completed}")


def check_promtool_metrics(watcher: Monitored) -> None:
    result = subprocess.run(
        ["promtool", "check", "metrics"],
        input=fetch(watcher.admin_port, "/metrics"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=10,
    )
    expect(result.returncode == 0 and not result.stdout, result.stdout)


def check_dashboard(watcher: Monitored) -> None:
    board = json.loads(fetch(watcher.admin_port, "/grafana.json"))
    queries = [
        (panel["title"], target["expr"])
        for panel in board["panels"]
        for target in panel.get("targets", ())
    ]
    expect(len(queries) > 30, f"{len(queries)} queries only")
    for title, promql in queries:
        for name, value in (
            ("$__rate_interval", "10s"),
            ("$job", ".*"),
            ("$instance", ".*"),
        ):
            promql = promql.replace(name, value)
        watcher.expect_found(title, promql)


def check_promtool_rules(watcher: Monitored) -> None:
    expect_match(
        "SUCCESS: 7 rules", run("promtool", "check", "rules", str(watcher.rules))
    )


def check_alerts(watcher: Monitored) -> None:
    """Each finds something to compare, and fires for none of it."""
    groups = watcher.ask("rules")["groups"]
    assert isinstance(groups, list)
    for rule in groups[0]["rules"]:
        found = (rule["name"], rule["health"], rule["state"])
        fine = rule["health"] == "ok" and rule["state"] != "firing"
        expect(fine, f"{found}: {rule.get('lastError')}")
        promql = re.sub(r" (==|<|>) [\d.]+\Z", "", rule["query"])
        expect(promql != rule["query"], f"no comparison: {promql}")
        watcher.expect_found(rule["name"], promql)


def browse(url: str, *, width: int) -> tuple[str, str]:
    """Open a page in a browser for a while; return what became of it, and its log."""
    expect(bool(shutil.which("chromium")), "chromium is not installed")
    with tempfile.TemporaryDirectory() as profile:
        command = [
            *("chromium", "--headless", "--no-sandbox", "--disable-gpu"),
            *("--disable-background-networking", "--disable-component-update"),
            *("--disable-dev-shm-usage", "--disable-sync", "--no-first-run"),
            f"--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE {LOOPBACK}",
            *(f"--user-data-dir={profile}", f"--window-size={width},844"),
            *("--enable-logging=stderr", f"--virtual-time-budget={BROWSED_MS}"),
            *("--dump-dom", url),
        ]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    expect(result.returncode == 0, result.stderr[-400:])
    return result.stdout, result.stderr


def check_status_page(watcher: Monitored) -> None:
    """A browser shows what /metrics says, has updated it, and has no complaint."""
    url = f"http://{LOOPBACK}:{watcher.admin_port}/"
    for width in (390, 1280):
        page, log = browse(url, width=width)
        expect_match(r"<h1>.*Serving: 1 of 1 upstreams up", page)
        expect_match(r"Half answered within</dt><dd>[^<]+\u202fm?s<small>", page)
        lines = [line for line in log.splitlines() if "CONSOLE" in line]
        complaints = [line for line in lines if url in line]  # not of its own pages
        expect(not complaints, "; ".join(complaints))
        shown = re.search(r'Queries answered</dt><dd><data value="(\d+)"', page)
        pattern = r"^dotproxy_dns_responses_total{.*} (\d+)$"
        text = fetch(watcher.admin_port, "/metrics")
        counted = sum(map(int, re.findall(pattern, text, re.MULTILINE)))
        number = int(shown[1]) if shown else 0
        expect(number == counted > 0, f"{number} shown, {counted} counted")


MONITOR_CHECKS: dict[str, Callable[[Monitored], None]] = {
    "every scrape succeeds": check_scraped,
    "as many queries are counted as dnsperf counts": check_counts,
    "promtool has nothing to say on the metrics": check_promtool_metrics,
    "every query of the dashboard finds something": check_dashboard,
    "the status page works in a browser": check_status_page,
    "promtool accepts the alerts of the README": check_promtool_rules,
    "every alert has something to compare, and none fires": check_alerts,
}


# ---- Bench ---------------------------------------------------------------------------
# The proxy and unbound, one after the other, before the same dnsdist.

BENCH_SECONDS = 4
HIT_NAMES = 1000
MISS_NAMES = 400_000
FORWARD = """  do-not-query-localhost: no
  tls-cert-bundle: "{directory}/ca.pem"
forward-zone:
  name: "."
  forward-tls-upstream: yes
  forward-addr: {address}@{port}#{name}
"""


@contextlib.contextmanager
def dotproxy_forwarder(lab: Lab, upstream_port: int) -> Iterator[tuple[int, Process]]:
    with Proxy(lab, upstream_port) as proxy:
        yield proxy.port, proxy.process


@contextlib.contextmanager
def unbound_forwarder(lab: Lab, upstream_port: int) -> Iterator[tuple[int, Process]]:
    port, directory = free_port(), lab.new_directory("unbound")
    config = UNBOUND.format(address=LOOPBACK, port=port, directory=directory)
    config += FORWARD.format(
        directory=lab.directory, address=LOOPBACK, port=upstream_port, name=TLS_NAME
    )
    (directory / "config").write_text(config)
    command = [copy_program("unbound", directory), "-d", "-c", "config"]
    with Process(command, directory) as process:
        process.wait_until(lambda: accepts(port))
        yield port, process


def measure(port: int, process: Process, names: Path) -> str:
    """Load for a few seconds; write queries/s and CPU microseconds per query."""
    before = process.cpu_seconds()
    report = dnsperf(port, names, "-l", str(BENCH_SECONDS), outstanding=100)
    spent = process.cpu_seconds() - before
    completed = re.search(r"NOERROR (\d+)", report)
    count = int(completed[1]) if completed else 1
    return f"{count / BENCH_SECONDS:12,.0f}{spent / count * 1e6:12.1f}"


def bench(lab: Lab) -> None:
    print(f"{'':10}{'hit/s':>12}{'CPU us':>12}{'miss/s':>12}{'CPU us':>12}", flush=True)
    forwarders = {"dotproxy": dotproxy_forwarder, "unbound": unbound_forwarder}
    with Server(lab, "dnsdist") as server:
        for name, forwarder in forwarders.items():
            with forwarder(lab, server.port) as (port, process):
                hits = write_names(lab, HIT_NAMES, "hit")
                dnsperf(port, hits, "-n", "2", outstanding=20)
                hit = measure(port, process, hits)
                miss = measure(port, process, write_names(lab, MISS_NAMES, "miss"))
                print(f"{name:10}{hit}{miss}", flush=True)


# ---- Running the checks --------------------------------------------------------------

T = TypeVar("T")


class Report:
    """Prints a line for each check, and counts them."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self.counts = Counter({"passed": 0, "failed": 0})

    @contextlib.contextmanager
    def check(self, title: str) -> Iterator[None]:
        """Report whether the block passed; go on in either case."""
        try:
            yield
        except Skipped as reason:
            self._add("skipped", f"skip {title}: {reason}")
        except (CheckError, OSError, subprocess.SubprocessError) as error:
            self._add("failed", f"FAIL {title}: {error}")
            self._print_log()
        else:
            self._add("passed", f"ok {title}")

    def _add(self, verdict: str, line: str) -> None:
        self.counts[verdict] += 1
        print(" ".join(line.split())[:1500], flush=True)

    def _print_log(self) -> None:
        if self._lab.last_proxy is not None:
            for line in self._lab.last_proxy.output().splitlines()[-12:]:
                print("    log:", line, flush=True)


@dataclass
class Group(Generic[T]):
    """Checks that share what `stage` starts for them."""

    name: str
    stage: Callable[[Lab], AbstractContextManager[T]]
    checks: dict[str, Callable[[T], None]]

    def titles(self, wanted: re.Pattern[str]) -> dict[str, str]:
        """Return the title of each wanted check by the check's name."""
        titles = {name: f"{self.name}: {name}" for name in self.checks}
        return {name: title for name, title in titles.items() if wanted.search(title)}

    def run(self, lab: Lab, wanted: re.Pattern[str], report: Report) -> None:
        titles = self.titles(wanted)
        if not titles:
            return
        lab.last_proxy = None
        shared = report.check(f"{self.name}: start and end")
        with shared, self.stage(lab) as subject:
            for name, title in titles.items():
                with report.check(title):
                    self.checks[name](subject)


GROUPS: list[
    Group[Proxy]
    | Group[EncryptedProxy]
    | Group[Lab]
    | Group[Horizon]
    | Group[Target]
    | Group[Monitored]
] = [
    *(Group(name, partial(proxy_before, name), CLIENT_CHECKS) for name in PROGRAMS),
    Group("load", proxy_far_from_server, LOAD_CHECKS),
    Group("encrypted", encrypted_proxy, ENCRYPTED_CHECKS),
    Group("certificate", contextlib.nullcontext, CERTIFICATE_CHECKS),
    Group("names", contextlib.nullcontext, NAME_CHECKS),
    Group("outage", contextlib.nullcontext, OUTAGE_CHECKS),
    Group("split horizon", split_horizon, HORIZON_CHECKS),
    Group("host", contextlib.nullcontext, HOST_CHECKS),
    Group("doctor", contextlib.nullcontext, DOCTOR_CHECKS),
    Group("hostile", target, HOSTILE_CHECKS),
    Group("prometheus", monitored_proxy, MONITOR_CHECKS),
]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check dotproxy with real programs.")
    beside = Path(__file__).resolve().parent.parent / "dotproxy.py"
    parser.add_argument("--proxy", type=Path, default=beside, help="file to check")
    parser.add_argument("--only", type=re.compile, default="", metavar="REGEX")
    parser.add_argument("--list", action="store_true", help="print the checks' names")
    parser.add_argument("--bench", action="store_true", help="measure, check nothing")
    parser.add_argument("--relay", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def end(*_: object) -> None:
    """Leave by an exception, once: what was started is ended on the way out."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(1)


def run_all(lab: Lab, wanted: re.Pattern[str]) -> int:
    """Run the wanted checks and return the exit status."""
    report = Report(lab)
    for group in GROUPS:
        group.run(lab, wanted, report)
    print(", ".join(f"{count} {verdict}" for verdict, count in report.counts.items()))
    return 1 if report.counts["failed"] or not report.counts["passed"] else 0


def main() -> int:
    args = parse_args()
    if args.relay:
        listen_port, target_port, round_trip = args.relay
        asyncio.run(relay(int(listen_port), int(target_port), float(round_trip)))
        return 0
    if args.list:
        for group in GROUPS:
            print(*group.titles(args.only).values(), sep="\n")
        return 0
    enter_namespace()
    signal.signal(signal.SIGTERM, end)
    with tempfile.TemporaryDirectory(prefix="dotproxy-peers-") as name:
        directory = Path(name)
        if in_namespace():
            arrange_namespace(directory)
        lab = Lab(directory, args.proxy.resolve())
        if args.bench:
            bench(lab)
            return 0
        return run_all(lab, args.only)


if __name__ == "__main__":
    sys.exit(main())
