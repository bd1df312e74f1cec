#!/usr/bin/env python3
"""Check dotproxy with real programs: DNS clients in front, DNS-over-TLS servers behind.

    .ci/peers.py                   every check, as root, in about two minutes
    .ci/peers.py --list            their names
    .ci/peers.py --only unbound    those whose name matches the regular expression
    .ci/peers.py --bench           queries/s and CPU time per query beside unbound's

A group of checks is a Bed: its methods start servers and proxies, ask, and expect.
What a group's `stage` starts is shared by its checks, in their order. Two jobs run at a
time, then those that measure, one by one. All of this is in a network and a mount
namespace of its own: no port can clash, and nothing leaves the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import socketserver
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
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

LOOPBACK = "127.0.0.1"
TLS_NAME = "dot.test"
CHECKOUT = Path(__file__).resolve().parent.parent
README = CHECKOUT / "README.md"


class CheckError(Exception):
    """What was expected did not happen."""


class Skipped(Exception):
    """This machine cannot run the check."""


def expect(claim: bool, detail: object) -> None:
    if not claim:
        raise CheckError(str(detail))


def expect_match(pattern: str, text: str) -> re.Match[str]:
    found = re.search(pattern, text)
    if found is None:
        raise CheckError(f"no {pattern!r} in: {text}")
    return found


def need(claim: bool, what: str) -> None:
    if not claim:
        raise Skipped(f"needs {what}")


def enter_namespace() -> None:
    """Start again in a network and a mount namespace of our own."""
    if os.environ.setdefault("DOTPROXY_PEERS", str(os.getpid())) == str(os.getpid()):
        again = [sys.executable, __file__, *sys.argv[1:]]
        os.environ["DOTPROXY_PEERS"] = "inside"
        os.execvp("unshare", ["unshare", "--net", "--mount", *again])
    run("ip", "link", "set", "lo", "up")
    Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("32768 60999")


# ---- Processes -----------------------------------------------------------------------
# Programs started here: where they run, when they are ready, and that they end.

READY_SECONDS = 10.0
STOP_SECONDS = 6.0  # a proxy answers what is in flight, until the time-out
CLIENT_SECONDS = 20.0
RUNNING: set[Process] = set()
PORTS = itertools.count(random.randrange(10_000, 30_000))


class Process:
    """A program with its output in a file, ended by its own process id."""

    def __init__(
        self,
        command: Sequence[str],
        directory: Path,
        ready: str | Callable[[], bool] = "",
        fds: Sequence[int] = (),
    ) -> None:
        """It is ready when it says so, or when that is true."""
        self.command, self.fds, self.ready = list(command), fds, ready
        self.directory, self.log = directory, directory / "output.log"
        self.start()

    def start(self) -> None:
        """Return when it is ready; end it if that fails, or is interrupted."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("DOTPROXY_")}
        with self.log.open("ab") as output:
            self._begun = output.tell()
            self.popen = subprocess.Popen(
                self.command,
                cwd=self.directory,
                env=kept,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=self.fds,
            )
        RUNNING.add(self)
        self.pid = self.popen.pid
        try:
            if isinstance(self.ready, str):
                self.wait_until(partial(self.says, self.ready))
            else:
                self.wait_until(self.ready)
        except BaseException:
            self.stop()
            raise

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def says(self, words: str) -> bool:
        """Tell whether it has said this since it was started."""
        return words in self.log.read_bytes()[self._begun :].decode(errors="replace")

    def wait_until(self, claim: Callable[[], bool]) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while not claim():
            running = self.popen.poll() is None and time.monotonic() < deadline
            expect(running, f"{self.command[0]}, not ready: {self.output()[-400:]}")
            time.sleep(0.01)

    def send(self, signal_number: int) -> None:
        if self.popen.poll() is None:
            self.popen.send_signal(signal_number)

    def stop(self, signal_number: int = signal.SIGTERM) -> int:
        """End it, by SIGKILL if it does not obey in time, and return its status."""
        for each in (signal_number, signal.SIGCONT):  # it may have been stopped
            self.send(each)
        try:
            self.popen.communicate(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.communicate(timeout=STOP_SECONDS)
        RUNNING.discard(self)
        return self.popen.returncode

    def cpu_seconds(self) -> float:
        """User and system time so far: fields 14 and 15 of proc(5) stat."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def execute(
    *command: str, timeout: float = CLIENT_SECONDS, given: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a program; its output is what it writes to either stream."""
    pipe, out = subprocess.PIPE, subprocess.STDOUT
    return subprocess.run(
        command, input=given, stdout=pipe, stderr=out, timeout=timeout, text=True
    )


def run(*command: str, timeout: float = CLIENT_SECONDS) -> str:
    """Run a program, which must end well, and return what it said."""
    ended = execute(*command, timeout=timeout)
    expect(ended.returncode == 0, ended)
    return ended.stdout


def works(*command: str) -> bool:
    return bool(shutil.which(command[0])) and execute(*command).returncode == 0


def free_port() -> int:
    """Pick a port that nothing here was given before: the namespace has no others.

    Those of the kernel's range are not used: a client that keeps dialling a dead server
    on loopback can be given the server's own port, and is then connected to itself.
    It is not tried out: a program that is about to start would hold it for a moment.
    """
    return next(PORTS)


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((LOOPBACK, port)) == 0


def fetch(port: int, path: str, **parameters: str) -> str:
    query = "?" + urllib.parse.urlencode(parameters) if parameters else ""
    url = f"http://{LOOPBACK}:{port}{path}{query}"
    with urllib.request.urlopen(url, timeout=5) as response:
        return str(response.read().decode())


# ---- Certificates --------------------------------------------------------------------

SERVERS = "dnsdist", "unbound", "kresd", "named", "dnsmasq"
GOOD_NAMES = f"DNS:{TLS_NAME},IP:{LOOPBACK}"
CERTIFICATES = {  # name: names, CA and days
    "good": (GOOD_NAMES, "ca", 2),
    "wrong-name": ("DNS:other.example.org,DNS:resolver.example.net", "ca", 2),
    "expired": (GOOD_NAMES, "ca", -1),
    "unknown": (GOOD_NAMES, "unknown-ca", 2),
    "renewed": (f"{GOOD_NAMES},DNS:renewed.test", "ca", 2),
    "plain": (GOOD_NAMES, "plain-ca", 2),
}
EXTENSIONS = """subjectAltName={}
basicConstraints=CA:FALSE
subjectKeyIdentifier=hash
authorityKeyIdentifier=keyid
extendedKeyUsage=serverAuth
"""
PIN = (
    "openssl x509 -noout -pubkey | openssl pkey -pubin -outform der"
    " | openssl dgst -sha256 -binary | base64"
)


def openssl(directory: Path, command: str) -> None:
    key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    words = shlex.split(command.replace("NEW-KEY", key))
    subprocess.run(
        ["openssl", *words], cwd=directory, check=True, capture_output=True, timeout=30
    )


class Lab:
    """The directory of a run, the certificates in it, and the proxy to be checked."""

    def __init__(self, directory: Path, proxy: Path) -> None:
        self.directory, self.proxy = directory, proxy
        self.zone_port = 0  # what some servers have behind them
        for name in SERVERS:  # as copies: AppArmor goes by path, and knows none of ours
            found = shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
            expect(found is not None, f"{name} is not installed")
            shutil.copy(str(found), directory)
        directory.chmod(0o711)  # it is nobody that reads a certificate again
        usage = "-addext keyUsage=critical,keyCertSign"
        for name, more in ("ca", usage), ("unknown-ca", usage), ("plain-ca", ""):
            files = f"-keyout {name}.key -out {name}.pem"
            openssl(directory, f"req -x509 NEW-KEY {files} -subj /CN={name} {more}")
        for name, (names, ca, days) in CERTIFICATES.items():
            (directory / f"{name}.ext").write_text(EXTENSIONS.format(names))
            request = f"req -new NEW-KEY -keyout {name}.key -out {name}.csr -subj /CN=x"
            openssl(directory, request)
            files = f"-in {name}.csr -out {name}.pem -extfile {name}.ext"
            authority = f"-CA {ca}.pem -CAkey {ca}.key -CAcreateserial"
            openssl(directory, f"x509 -req {files} -days {days} {authority}")

    def new_directory(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.directory))

    def pin(self, certificate: str) -> str:
        """Return what the README's commands say of a certificate."""
        path = shlex.quote(str(self.directory / f"{certificate}.pem"))
        return run("sh", "-c", f"< {path} {PIN}").strip()


# ---- Servers -------------------------------------------------------------------------
# Programs that answer for the same names over TLS, and others for what is routed. The
# names are under example.com as unbound and Knot Resolver answer for .test themselves.

HOST = "host.example.com"
LIST = [f"list{i}.example.com" for i in range(5)]
MANY = "many.example.com"  # 100 addresses: more than 1232 bytes
LARGE = "large.example.com"  # one TXT record of 1510 bytes
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
ZONE_LINES = [
    f"{name}. 300 IN {rrtype} {rdata}"
    for (name, rrtype), rdatas in RRSETS.items()
    for rdata in rdatas
]
ROUTED = {"corp.example": "10.1.1.1", "cluster.local": "10.96.0.1"}  # of all below it
CORP, CLUSTER = ROUTED


DNSDIST = f"""
setLocal('{LOOPBACK}:PLAIN')
setSecurityPollSuffix('')
setMaxTCPClientThreads(4)
webserver('{LOOPBACK}:WEB')
setWebserverConfig({{statsRequireAuthentication=false}})
addTLSLocal('{LOOPBACK}:PORT', 'CERT.pem', 'CERT.key',
  {{maxInFlight=1000, reusePort=true}})
MORE
newServer({{address='{LOOPBACK}:ZONE', useClientSubnet=false}}):setUp()
addAction('{BENCH}.', SpoofAction('{BENCH_ADDRESS}', {{ttl=300}}))
ours = newSuffixMatchNode()
ours:add('example.com')
addAction(NotRule(SuffixMatchNodeRule(ours)), RCodeAction(DNSRCode.NXDOMAIN))
"""
UNBOUND = f"""
server:
  interface: {LOOPBACK}@PORT
  directory: "DIRECTORY"
  username: ""
  chroot: ""
  pidfile: ""
  do-daemonize: no
  use-syslog: no
  num-threads: 1
  module-config: iterator
"""
UNBOUND_TLS = f"""{UNBOUND}
  tls-port: PORT
  tls-service-pem: CERT.pem
  tls-service-key: CERT.key
  log-queries: yes
"""
UNBOUND_HOSTS = "  local-zone: example.com. static\n"
for line in ZONE_LINES:
    UNBOUND_HOSTS += f"  local-data: '{line}'\n"
UNBOUND_CORP = f"""
  local-zone: {CORP}. redirect
  local-data: '{CORP}. 300 IN A {ROUTED[CORP]}'
"""
KRESD = f"""
net.listen('{LOOPBACK}', PORT, {{ kind = 'tls' }})
net.tls('CERT.pem', 'CERT.key')
for _, name in ipairs({{'priming', 'ta_update', 'ta_signal_query',
  'detect_time_skew', 'detect_time_jump'}}) do pcall(modules.unload, name) end
trust_anchors.remove('.')
modules = {{ 'policy' }}
ours = {{ todname('example.com.') }}
policy.add(policy.suffix(policy.STUB('{LOOPBACK}@ZONE'), ours))
policy.add(policy.all(policy.DENY))
"""
NAMED = f"""
controls {{ }};
tls certificate {{ cert-file "CERT.pem"; key-file "CERT.key"; }};
options {{
  directory "DIRECTORY";
  listen-on port PORT TLS {{ {LOOPBACK}; }};
  listen-on-v6 {{ none; }};
  pid-file none;
  session-keyfile none;
  recursion no;
  notify no;
  querylog yes;
}};
zone "APEX" {{ type primary; file "zone"; }};
"""
ZONE_HEAD = "$TTL 300\n@ SOA ns admin 1 3600 600 86400 300\n@ NS ns\nns A 192.0.2.53\n"
DNSMASQ = f"dnsmasq -k -u root -p PORT -a {LOOPBACK} -z -R -h -c 0 -S MORE"
# Command, configuration and zone file.
NAMED_COMMAND = "named -g -4 -n 1 -c config"
HOSTS = ZONE_HEAD + "\n".join(ZONE_LINES) + "\n"
PROGRAMS = {
    "dnsdist": ("dnsdist --supervised --disable-syslog -C config", DNSDIST, ""),
    "unbound": ("unbound -d -c config", UNBOUND_TLS + UNBOUND_HOSTS, ""),
    "knot-resolver": ("kresd -n -c config", KRESD, ""),
    "bind9": (NAMED_COMMAND, NAMED.replace(" TLS ", " tls certificate "), HOSTS),
}
PLAIN_NAMED = NAMED.replace(" TLS ", " ")
OTHERS = {
    "zone": (NAMED_COMMAND, PLAIN_NAMED, HOSTS),
    CORP: ("unbound -d -c config", UNBOUND_TLS + UNBOUND_CORP, ""),
    CLUSTER: (NAMED_COMMAND, PLAIN_NAMED, f"{ZONE_HEAD}* A {ROUTED[CLUSTER]}\n"),
    "dnsmasq": (f"{DNSMASQ} -x DIRECTORY/pid -C config", "", ""),
}


class Server(Process):
    """A server that can be stopped and started again on the same port."""

    def __init__(self, lab: Lab, name: str, certificate: str, more: str) -> None:
        command, config, zone = {**PROGRAMS, **OTHERS}[name]
        directory = lab.new_directory(name)
        self.port, self.plain_port, self.web_port = (free_port() for _ in range(3))
        for word, value in (
            ("MORE", more),
            ("PORT", self.port),
            ("PLAIN", self.plain_port),
            ("WEB", self.web_port),
            ("ZONE", lab.zone_port),
            ("CERT", lab.directory / certificate),
            ("APEX", name if name == CLUSTER else "example.com"),
            ("DIRECTORY", directory),
        ):
            config = config.replace(word, str(value))
            command = command.replace(word, str(value))
        (directory / "config").write_text(config)
        (directory / "zone").write_text(zone)
        program, *options = command.split()
        copied = str(lab.directory / program)
        super().__init__([copied, *options], directory, lambda: accepts(self.port))

    def queries(self) -> int:
        """Ask dnsdist how many queries it has seen."""
        counted = r"(?m)^dnsdist_queries (\d+)$"
        return int(expect_match(counted, fetch(self.web_port, "/metrics"))[1])


class Scripted(socketserver.ThreadingTCPServer):
    """Does what no program can be made to do: is slow for some names; changes its mind.

    It answers for any name over TCP or TLS, on each connection in order.
    """

    daemon_threads = True
    request_queue_size = 100

    def __init__(self, delay: float = 0, context: ssl.SSLContext | None = None) -> None:
        self.delay, self.context = delay, context
        self.queries = self.resumed = 0
        self.connections: list[socket.socket] = []
        super().__init__((LOOPBACK, free_port()), ScriptedHandler)
        self.port: int = self.server_address[1]
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_: object) -> None:
        """A client that goes is none."""

    def drop(self) -> None:
        """End every connection."""
        while self.connections:
            with contextlib.suppress(OSError):
                self.connections.pop().shutdown(socket.SHUT_RDWR)


class ScriptedHandler(socketserver.BaseRequestHandler):
    server: Scripted

    def handle(self) -> None:
        connection, server = self.request, self.server
        if server.context is not None:
            connection = server.context.wrap_socket(connection, server_side=True)
            server.resumed += bool(connection.session_reused)
        server.connections.append(connection)
        with connection, connection.makefile("rb") as file:
            while size := file.read(2):
                query = file.read(int.from_bytes(size, "big"))
                server.queries += 1
                question = query[12 : query.index(b"\0", 12) + 5]
                time.sleep(server.delay if b"slow" in question else 0)
                head = b"\x81\x80\0\1\0\1\0\0\0\0"
                record = b"\xc0\x0c\0\1\0\1\0\0\1\x2c\0\4"
                address = socket.inet_aton(BENCH_ADDRESS)
                answer = query[:2] + head + question + record + address
                connection.sendall(len(answer).to_bytes(2, "big") + answer)


# ---- Proxies, and the bed of a check -------------------------------------------------

CLIENTS = {  # they ask once: a second try would hide a lost answer
    "dig": f"dig @{LOOPBACK} -p PORT +tries=1 +time=5",
    "kdig": f"kdig @{LOOPBACK} -p PORT +retry=0",
    "tls-kdig": f"kdig @{LOOPBACK} -p TLS +retry=0 +tls-hostname={TLS_NAME} +tls-ca=CA",
    "drill": f"drill -p PORT @{LOOPBACK}",
}
GETADDRINFO = """
import socket, sys
for answer in socket.getaddrinfo(sys.argv[1], 853, type=socket.SOCK_STREAM):
    print(answer[4][0])
"""
RESOLVE = """
mount --bind resolv.conf /etc/resolv.conf
mount --bind nsswitch.conf /etc/nsswitch.conf
exec "$@"
"""
NUMBERS = itertools.count(1)


class Proxy(Process):
    """dotproxy as a user runs it."""

    port: int

    @property
    def tls_port(self) -> int:
        return int(expect_match(rf" tls={LOOPBACK}:(\d+)", self.output())[1])


F = TypeVar("F", bound=Callable[..., None])
P = TypeVar("P", bound=Process)
Row = tuple[str, Callable[..., None], Sequence[object]]


def check(title: str, *given: object) -> Callable[[F], F]:
    """Make a method a check, or several with what each is given."""

    def note(function: F) -> F:
        function.__dict__.setdefault("rows", []).insert(0, (title, given))
        return function

    return note


class Bed:
    """Checks, and where they start programs that end with them; the last is at hand."""

    name = ""
    alone = False
    asks = ""  # a line each: a command, and the patterns of its output, between " ~ "
    python = sys.executable
    resolver: str  # an address where the proxy serves port 53
    server: Server
    proxy: Proxy

    def __init__(self, lab: Lab, name: str = "") -> None:
        self.lab, self.name = lab, name or self.name
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> Bed:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def inner(self) -> Bed:
        """Return a bed with what is at hand here, whose own programs end earlier."""
        bed = copy.copy(self)
        bed.stack = contextlib.ExitStack()
        return bed

    def stage(self) -> None:
        """Start what all checks share."""

    @classmethod
    def rows(cls) -> list[Row]:
        lines = cls.asks.replace("\n  ", "").splitlines()
        asked: list[Row] = [
            (line.partition(" ~ ")[0], cls.expect, line.split(" ~ "))
            for line in filter(None, lines)
        ]
        return asked + [
            (title, function, given)
            for function in vars(cls).values()
            for title, given in getattr(function, "rows", ())
        ]

    def start(self, process: P) -> P:
        self.stack.callback(process.stop)
        return process

    def start_server(
        self, name: str = "dnsdist", certificate: str = "good", more: str = ""
    ) -> Server:
        self.server = self.start(Server(self.lab, name, certificate, more))
        return self.server

    def start_proxy(
        self,
        *options: str,
        upstream: int = 0,
        name: str = f"#{TLS_NAME}",
        port: int = 0,
        prefix: Sequence[str] = (),
        listen: bool = True,
        ready: str = "ready",
        fds: Sequence[int] = (),
    ) -> Proxy:
        """Start it before the last server, or before another port of this machine."""
        port = port or free_port()
        command = [
            *(word.replace("PORT", str(port)) for word in prefix),
            *(self.python, str(self.lab.proxy)),
            *[f"--listen={LOOPBACK}:{port}"] * listen,
            f"--upstream={LOOPBACK}:{upstream or self.server.port}{name}",
            f"--ca-file={self.lab.directory}/ca.pem",
            *options,
        ]
        directory = self.lab.new_directory("dotproxy")
        self.proxy = self.start(Proxy(command, directory, ready, fds))
        self.proxy.port = port
        return self.proxy

    def start_both(self, program: str = "dnsdist", *options: str) -> None:
        self.start_server(program)
        self.resolver = f"127.9.{next(NUMBERS)}.1"
        self.start_proxy(f"--listen={self.resolver}:53", *options)

    def client(self, command: str) -> list[str]:
        """Write out a command of those in CLIENTS, or any that names the port."""
        name, _, rest = command.partition(" ")
        words = f"{CLIENTS.get(name, name)} {rest}"
        words = words.replace("PORT", str(self.proxy.port))
        if "TLS" in words:
            words = words.replace("TLS", str(self.proxy.tls_port))
        return words.replace("CA", str(self.lab.directory / "ca.pem")).split()

    def ask(self, command: str) -> str:
        """Ask the last proxy with a client program; return what that said."""
        return run(*self.client(command))

    def expect(self, command: str, *patterns: str) -> None:
        output = self.ask(command)
        for pattern in patterns:
            expect_match(pattern, output)

    def expect_queries(self, count: int) -> None:
        seen = self.server.queries()
        expect(seen == count, f"queries at the server: {seen}, not {count}")

    def expect_addresses(self, name: str, *addresses: str) -> None:
        """Have glibc look up a name through resolv.conf."""
        etc = self.lab.new_directory("etc")
        (etc / "resolv.conf").write_text(f"nameserver {self.resolver}\n")
        (etc / "nsswitch.conf").write_text("hosts: files dns\n")
        there = ["unshare", "--mount", "sh", "-ec", f"cd {etc}\n{RESOLVE}", "sh"]
        output = run(*there, sys.executable, "-c", GETADDRINFO, name)
        expect(sorted(output.split()) == sorted(addresses), output)

    def expect_refusal(self, cause: str) -> None:
        """Expect SERVFAIL with a reason, over UDP and TCP, and the cause in the log."""
        reason = "status: SERVFAIL", r"EDE: \d+ .*: \(.+\)"
        self.expect(f"dig +notcp {HOST}", *reason)
        self.expect(f"dig +tcp {HOST}", *reason)
        self.expect(f"dig +noedns {HOST}", r"status: SERVFAIL(?![\s\S]*EDE)")
        expect_match(f"(?i){cause}", self.proxy.output())

    def expect_new_handshake(self, name: str) -> None:
        """Restart the server and have a name asked that the cache does not know."""
        self.server.stop()
        self.server.start()
        self.expect(f"dig {name}.{BENCH}", "status: NOERROR")
        expect(self.server.queries() > 0, "the server saw no query")

    def expect_clean_end(self, signal_number: int = signal.SIGTERM) -> None:
        status = self.proxy.stop(signal_number)
        expect(status == 0, f"status {status}")
        expect(not self.proxy.says("Traceback"), "a traceback in the log")

    def errand(
        self, *options: str, before: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Run dotproxy for something else than to serve, perhaps under a command."""
        return execute(*before, sys.executable, str(self.lab.proxy), *options)


# ---- Client programs -----------------------------------------------------------------
# Every one of these is asked through the proxy with each of the servers behind it.

ADDRESS = re.escape(RRSETS[HOST, "A"][0])
ADDRESS_6 = RRSETS[HOST, "AAAA"][0]
A_RECORD = rf"\sA\s+{ADDRESS}\s"
RETRIED = ";; Truncated, retrying in TCP mode"
FIVE = " ".join(LIST)


def only(*rdatas: str) -> str:
    """Match these lines and no others."""
    return r"\A" + r"\s+".join(re.escape(rdata) for rdata in rdatas) + r"\s*\Z"


LIST_ADDRESSES = only(*(RRSETS[name, "A"][0] for name in LIST))


class Clients(Bed):
    asks = rf"""
dig {HOST} A ~ status: NOERROR ~ ANSWER: 1, ~ {A_RECORD} ~ SERVER: .* \(UDP\)
dig +short {HOST} AAAA ~ {only(ADDRESS_6)}
dig +tcp {HOST} A ~ {A_RECORD} ~ SERVER: .* \(TCP\)
dig +tcp +keepopen +short {FIVE} ~ {LIST_ADDRESSES}
dig +bufsize=512 {LARGE} TXT ~ {RETRIED} ~ {" ~ ".join(STRINGS)}
dig +bufsize=4096 +ignore {LARGE} TXT ~ flags: qr[a-z ]* tc ~ ANSWER: 0,
   ~ MSG SIZE  rcvd: \d{{2,3}}\n
dig +noedns {MANY} A ~ {RETRIED} ~ {" ~ ".join(map(re.escape, RRSETS[MANY, "A"]))}
dig +noedns {HOST} A ~ {ADDRESS} ~ \A(?![\s\S]*OPT PSEUDOSECTION)
dig +dnssec {HOST} A ~ EDNS: version: 0, flags: do ~ {ADDRESS}
dig missing.example.com A ~ status: NXDOMAIN
dig {HOST} TYPE65280 ~ status: NOERROR ~ ANSWER: 0,
dig hOsT.eXaMpLe.CoM A ~ ;hOsT\.eXaMpLe\.CoM\. ~ {ADDRESS}
drill {HOST} A ~ rcode: NOERROR ~ {A_RECORD}
drill -t -D {HOST} A ~ rcode: NOERROR ~ flags: do ~ {ADDRESS}
host -R 1 -p PORT {HOST} {LOOPBACK} ~ has address {ADDRESS} ~ IPv6 address {ADDRESS_6}
"""

    def stage(self) -> None:
        self.start_both(self.name)

    @check("getaddrinfo through resolv.conf")
    def getaddrinfo(self) -> None:
        self.expect_addresses(HOST, *RRSETS[HOST, "A"], ADDRESS_6)

    @check("SIGTERM: exit status 0, no traceback in the log")
    def end(self) -> None:
        self.expect_clean_end()


# ---- Load ----------------------------------------------------------------------------
# dnsperf with names that occur once.

PATIENCE = 5  # after which glibc's resolver gives up


class Outcome(NamedTuple):
    """What dnsperf says of a query: when it ended is told by the order alone."""

    rcode: str
    name: str
    seconds: float


class Load(Process):
    """dnsperf, from 10 sockets or connections, with names that occur once."""

    def __init__(
        self,
        bed: Bed,
        count: int,
        *options: str,
        port: int = 0,
        domain: str = BENCH,
        name: Callable[[int], str] = "query{}".format,
    ) -> None:
        self.count, directory = count, bed.lab.new_directory("load")
        names = directory / "names"
        names.write_text("".join(f"{name(i)}.{domain} A\n" for i in range(count)))
        where = f"-s {LOOPBACK} -p {port or bed.proxy.port} -d {names}"
        command = f"dnsperf {where} -v -n 1 -W -c 10 -b 1024 -t {PATIENCE}"
        super().__init__([*command.split(), *options], directory)
        bed.start(self)

    def outcomes(self) -> list[Outcome]:
        """Wait until it ends; what was not answered is missing."""
        self.popen.wait(60)
        lines = re.findall(r"(?m)^> (\S+) (\S+) A ([\d.]+)$", self.output())
        return [Outcome(rcode, name, float(took)) for rcode, name, took in lines]

    def expect_right(self) -> list[Outcome]:
        outcomes = self.outcomes()
        expect(results(outcomes) == {"NOERROR": self.count}, results(outcomes))
        return outcomes


def results(outcomes: list[Outcome]) -> dict[str, int]:
    return Counter(outcome.rcode for outcome in outcomes)


class Loaded(Bed):
    name = "load"
    alone = True

    def stage(self) -> None:
        self.start_server()
        self.start_proxy()

    @check("dnsperf, 100,000 names over UDP", 100_000, "udp", 500)
    @check("dnsperf, 20,000 names over TCP", 20_000, "tcp", 200)
    def load(self, count: int, mode: str, flight: int) -> None:
        Load(self, count, "-m", mode, "-q", str(flight)).expect_right()


# ---- Certificates that must be refused -----------------------------------------------
# The server must not see a query; the client and the log must be told why.

OLD_TLS = r"(protocol.version|unsupported.protocol|TLS ?v?1\.)"


class Certificates(Bed):
    name = "certificate"

    @check("right name", f"#{TLS_NAME}")
    @check("right address, no name given", "")
    @check("pinned key, one of two", f"#{TLS_NAME}", "wrong-name", "good")
    def accepted(self, name: str, *pins: str) -> None:
        """Show that the counter counts, and that the certificate is good otherwise."""
        self.start_server()
        options = [f"--pin={TLS_NAME}={self.lab.pin(each)}" for each in pins]
        self.start_proxy(*options, name=name)
        self.expect(f"dig {HOST}", ADDRESS)
        expect(self.server.queries() > 0, "no query was counted")

    @check("wrong name", "wrong-name", rf"not for {TLS_NAME}: give .*; --doctor tells")
    @check("expired", "expired", "expired")
    @check("unknown CA", "unknown", "(issuer|unknown ca|self.signed)")
    def refused(self, certificate: str, cause: str, *options: str) -> None:
        self.start_server(certificate=certificate)
        self.start_proxy(*options)
        self.expect_refusal(cause)
        self.expect_queries(0)

    @check("another key pinned", "wrong-name")
    @check("the CA's key pinned", "ca")
    def pin_refused(self, pinned: str) -> None:
        pin = f"--pin={TLS_NAME}={self.lab.pin(pinned)}"
        self.refused("good", re.escape(self.lab.pin("good")), pin)

    @check("TLS 1.1", "1_1", OLD_TLS)
    @check("TLS 1.2 where 1.3 is wanted", "1_2", r"not speak TLS 1\.3", "--tls-min=1.3")
    def old_tls(self, version: str, cause: str, *options: str) -> None:
        """`openssl s_server` speaks one version and prints what it is sent."""
        port, path = free_port(), self.lab.directory / "good"
        command = f"openssl s_server -quiet -tls{version} -cipher ALL:@SECLEVEL=0"
        command += f" -accept {LOOPBACK}:{port} -cert {path}.pem -key {path}.key"
        directory = self.lab.new_directory("s_server")
        server = self.start(Process(command.split(), directory, lambda: accepts(port)))
        self.start_proxy(*options, upstream=port)
        self.expect_refusal(cause)
        expect(not server.says("example"), "the server was sent a query")

    @check("CA as plain openssl makes it, Python 3.13 and newer")
    def plain_authority(self) -> None:
        """It has no key usage, and those are strict about that."""
        found = [f"python3.{n}" for n in range(13, 20) if works(f"python3.{n}", "-V")]
        need(bool(found), "Python 3.13 or newer")
        self.start_server(certificate="plain")
        for self.python in found:
            self.start_proxy(f"--ca-file={self.lab.directory}/plain-ca.pem")
            self.expect(f"dig {HOST}", ADDRESS)


# ---- Names ---------------------------------------------------------------------------
# What the proxy answers itself, as clients see it, with a server that counts.

SOA = r"10800\s+IN\s+SOA\s+\S+\s+nobody\.invalid\.\s+1\s+3600\s+1200\s+604800\s+10800"
NOTHING = rf"[Ff]lags: qr aa ~ AUTHORITY: 1[,;] ~ \s{SOA}"


class LocalNames(Bed):
    name = "special names"
    asks = rf"""
dig localhost A ~ flags: qr aa ~ localhost\.\s+10800\s+IN\s+A\s+127\.
dig +short a.localhost AAAA ~ {only("::1")}
dig +short -x 127.0.0.1 ~ {only("localhost.")}
dig +short -x ::1 ~ {only("localhost.")}
drill a.invalid ~ rcode: NXDOMAIN ~ \ninvalid\..*SOA
dig +short 10.in-addr.arpa NS ~ {only("10.in-addr.arpa.")}
dig a.onion CH TXT ~ status: REFUSED
dig +dnssec +cd a.onion ~ status: NXDOMAIN ~ flags: do ~ {NOTHING}
kdig a.local ~ status: NXDOMAIN ~ {NOTHING}
dig a.home.arpa ~ status: NXDOMAIN ~ {NOTHING}
dig _dns.resolver.arpa SVCB ~ status: NOERROR ~ {NOTHING}
dig -x 10.0.0.1 ~ status: NXDOMAIN ~ {NOTHING}
"""

    def stage(self) -> None:
        self.start_both()

    @check("getaddrinfo below localhost")
    def getaddrinfo(self) -> None:
        self.expect_addresses("a.localhost", LOOPBACK, "::1")

    @check("none of them was sent to the server; others are")
    def not_sent(self) -> None:
        self.expect_queries(0)
        for number, name in enumerate(("notlocalhost", "foo.local.example.com"), 1):
            self.ask(f"dig {name}")
            self.expect_queries(number)


BLOCK, EXEMPT = "--block-private-answers", "--allow-private=example.com"


class Names(Bed):
    name = "names"

    @check("special ones are sent where --forward-special says so")
    def forward_special(self) -> None:
        self.start_server()
        names = "--forward-special=corp.local", "--forward-special=in-addr.arpa"
        self.start_proxy(*names)
        for command in "dig a.corp.local", "dig -x 10.0.0.1", "dig a.local":
            self.ask(command)
        self.expect_queries(2)

    @check("ANY: HINFO over UDP, all records over TCP")
    def any_type(self) -> None:
        hinfo = r'\s3600\s+IN\s+HINFO\s+"RFC8482" ""', "ANSWER: 1[,;]", r"\(UDP\)"
        whole = rf"\sA\s+{ADDRESS}", rf"\sAAAA\s+{ADDRESS_6}", "ANSWER: 2,"
        self.start_both("bind9")
        for _ in range(2):  # the second time after the whole one
            self.expect(f"dig +notcp {HOST} ANY", *hinfo)
            self.expect(f"dig +tcp {HOST} ANY", *whole)
        self.expect(f"kdig +notcp {HOST} ANY", *hinfo)

    @check("private addresses pass", False)
    @check("private addresses are blocked", True, BLOCK)
    @check("private ones of an exempt domain", False, BLOCK, EXEMPT)
    def private(self, blocked: bool, *options: str) -> None:
        filtered = "NOERROR", "ANSWER: 0[,;]", r"EDE: 17 \(Filtered\)", r"\sSOA\s"
        self.start_server()
        self.start_proxy(*options)
        for rrtype in ("A", "AAAA"):
            passed = (rf"\s{rrtype}\s+{RRSETS[PRIVATE, rrtype][0]}",)
            for client in ("dig", "dig +tcp", "kdig +edns"):
                command = f"{client} {PRIVATE} {rrtype}"
                self.expect(command, *(filtered if blocked else passed))
        self.expect_queries(2)  # the other answers were cached
        self.expect(f"dig {HOST}", ADDRESS)


# ---- Servers that die, hang, or have ways of their own -------------------------------


def build_query(number: int) -> bytes:
    labels = f"q{number}.{BENCH}".split(".")
    name = b"".join(bytes([len(label)]) + label.encode() for label in labels)
    return struct.pack("!6H", number, 0x0100, 1, 0, 0, 0) + name + b"\0\0\1\0\1"


def connect(port: int, source: str = LOOPBACK) -> socket.socket:
    return socket.create_connection((LOOPBACK, port), 5, (source, 0))


def ask_over_tcp(port: int, number: int) -> float:
    """Ask over a new connection; return how long the right answer took."""
    started, query = time.monotonic(), build_query(number)
    with connect(port) as client, client.makefile("rb") as file:
        client.sendall(len(query).to_bytes(2, "big") + query)
        answer = file.read(int.from_bytes(file.read(2), "big"))
    right = answer[:2] == query[:2] and answer[12 : len(query)] == query[12:]
    expect(right and socket.inet_aton(BENCH_ADDRESS) in answer, f"answer {answer!r}")
    return time.monotonic() - started


OPT = "RecordsTypeCountRule(DNSSection.Additional, DNSQType.OPT, 1, 1)"
OPTION = "EDNSOptionRule(11)"  # ours in clear text: edns-tcp-keepalive


class Outage(Bed):
    name = "outage"

    @check("killed and restarted three times under 200 queries/s")
    def killed(self) -> None:
        self.start_both()
        load = Load(self, 1200, "-Q", "200")
        for _ in range(3):
            time.sleep(1.5)
            self.server.stop(signal.SIGKILL)
            self.server.start()
        load.expect_right()

    @check("stopped for 2 s under 100 queries/s")
    def stopped(self) -> None:
        self.start_both()
        load = Load(self, 600, "-Q", "100")
        for seconds, each in (1, signal.SIGSTOP), (2, signal.SIGCONT), (1, None):
            time.sleep(seconds)
            if each is not None:
                self.server.send(each)
        later = Load(self, 200, "-Q", "100", name="later{}".format).expect_right()
        slowest = max(outcome.seconds for outcome in later)
        expect(slowest < 1, f"1 s after SIGCONT: {slowest:.3f} s")
        outcomes = load.outcomes()
        expect(len(outcomes) == load.count, f"answered: {results(outcomes)}")

    @check("nothing listens: SERVFAIL, and why")
    def absent(self) -> None:
        self.start_proxy(upstream=free_port())
        self.expect_refusal("refused")

    @check("SIGTERM with queries in flight", signal.SIGTERM)
    @check("SIGINT with queries in flight", signal.SIGINT)
    def ended_in_flight(self, signal_number: int) -> None:
        """The signal comes while the server is halted, with ten queries in flight."""
        self.start_both()
        self.expect(f"dig warm.{BENCH}", "status: NOERROR")
        self.server.send(signal.SIGSTOP)
        load = Load(self, 10)
        time.sleep(0.2)
        threading.Timer(0.5, self.server.send, [signal.SIGCONT]).start()
        self.expect_clean_end(signal_number)
        load.expect_right()

    @check("dnsmasq, in order, a name in 40 takes 1 s", 1.0, 1)
    @check("dnsmasq, in order, a name in 40 takes 1.5 s", 1.5, 1)
    @check("dnsmasq, in order, a name in 40 takes 3 s", 3.0, 1)
    @check("two dnsmasq, in order, a name in 40 takes 1.5 s", 1.5, 2)
    @check("two dnsmasq, in order, a name in 40 takes 3 s", 3.0, 2)
    def in_order(self, delay: float, servers: int) -> None:
        scripted = self.stack.enter_context(Scripted(delay))
        source = f"{LOOPBACK}#{scripted.port}"
        masks = [self.start_server("dnsmasq", more=source) for _ in range(servers)]
        routes = [f"--route={BENCH}=tcp://{LOOPBACK}:{mask.port}" for mask in masks]
        self.start_proxy(*routes, upstream=free_port())
        ours = [rf" (\w+:\w+) \w+:{mask.port:04X} 01 " for mask in masks]  # established
        kinds, most = ["slow{}", *["fast{}"] * 39], 0
        load = Load(self, 240, "-Q", "30", name=lambda n: kinds[n % 40].format(n))
        while load.popen.poll() is None:
            table = Path("/proc/net/tcp").read_text()  # which may have some twice
            most = max(most, *(len({*re.findall(each, table)}) for each in ours))
            time.sleep(0.05)
        outcomes = load.outcomes()
        fast = [each for each in outcomes if each.name.startswith("fast")]
        right = sorted(each.seconds for each in fast if each.rcode == "NOERROR")
        expect(len(right) >= 0.98 * 234, f"of 234 not slow: {results(fast)}")
        late = right[int(0.9 * len(right))]
        expect(late <= 0.3 * delay, f"90th percentile {late:.3f} s")
        expect(most <= 6, f"{most} connections at a time")
        share = scripted.queries / load.count
        expect(share <= 1.5, f"{share:.2f} upstream queries per query")

    @check("a TLS 1.2 server refuses to resume sessions from before")
    def refused_session(self) -> None:
        """By an alert of OpenSSL's, as it has ceased to use RFC 7627 in between."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        path = self.lab.directory / "good"
        context.load_cert_chain(f"{path}.pem", f"{path}.key")
        server = self.stack.enter_context(Scripted(context=context))
        self.start_proxy(upstream=server.port)
        for number in range(8):
            if number == 3:
                expect(server.resumed > 0, "no session was resumed")
                context.options |= 1  # SSL_OP_NO_EXTENDED_MASTER_SECRET
            server.drop()
            started = time.monotonic()
            self.expect(f"dig query{number}.{BENCH}", re.escape(BENCH_ADDRESS))
            took = time.monotonic() - started
            expect(took < 2, f"query {number} took {took:.3f} s")

    @check("dnsdist says FORMERR to OPT", OPT, "FORMERR")
    @check("dnsdist says NOTIMP to OPT", OPT, "NOTIMP")
    @check("dnsdist says FORMERR to an option", OPTION, "FORMERR")
    def no_edns(self, rule: str, rcode: str) -> None:
        """It is asked again, without (RFC 6891 section 7), which is remembered."""
        self.start_server(more=f"addAction({rule}, RCodeAction(DNSRCode.{rcode}))")
        self.start_proxy(f"--route={BENCH}=tcp://{LOOPBACK}:{self.server.plain_port}")
        for number in range(5):
            for transport in ("+notcp", "+tcp"):
                command = f"dig {transport} query{number}.{BENCH}"
                self.expect(command, "status: NOERROR", re.escape(BENCH_ADDRESS))
        seen = self.server.queries()
        expect(seen <= 8, f"{seen} queries at the server for five names")


# ---- Split horizon -------------------------------------------------------------------
# dnsdist for all names, unbound over TLS for corp.example, and BIND in clear text for
# cluster.local. dnsdist counts what it is sent.


class Horizon(Bed):
    name = "split horizon"
    routed: dict[str, Server]  # by domain

    def stage(self) -> None:
        self.routed = {domain: self.start_server(domain) for domain in ROUTED}
        self.start_both(
            "dnsdist",
            f"--route={CORP}={LOOPBACK}:{self.routed[CORP].port}#{TLS_NAME}",
            f"--route={CLUSTER}=tcp://{LOOPBACK}:{self.routed[CLUSTER].port}",
        )

    @check("flags are a resolver's before an authoritative server: dig, getaddrinfo")
    def flags(self) -> None:
        for transport in "+notcp", "+tcp", "+notcp":  # then from the cache
            self.expect(f"dig {transport} flags.{CLUSTER}", "flags: qr rd ra;")
        self.expect_addresses(f"glibc.{CLUSTER}", ROUTED[CLUSTER])

    @check("corp.example, answered by its own server", CORP)
    @check("cluster.local, answered by its own server", CLUSTER)
    def own_server(self, domain: str) -> None:
        self.expect(f"dig not{domain} A", "status: NXDOMAIN")
        before = self.server.queries()
        for name in ("one", "TWO", "a.b.c"):
            for transport in ("+notcp", "+tcp"):
                question = f"{transport[1:4]}{name}.{domain}"
                answer = rf"\sA\s+{re.escape(ROUTED[domain])}\s"
                self.expect(f"dig {transport} {question}", answer)
                seen = self.routed[domain].says(question)
                expect(seen, f"{question} is not in the server's log")
        self.expect_queries(before)

    @check("corp.example, 20,000 names", CORP)
    @check("cluster.local, 20,000 names", CLUSTER)
    def load(self, domain: str) -> None:
        before = self.server.queries()
        Load(self, 20_000, domain=domain).expect_right()
        self.expect_queries(before)

    @check("corp.example, server stopped, killed, restarted", CORP)
    @check("cluster.local, server stopped, killed, restarted", CLUSTER)
    def down(self, domain: str) -> None:
        server = self.routed[domain]
        server.send(signal.SIGSTOP)
        try:
            self.expect_outage(domain, "stopped")
        finally:
            server.send(signal.SIGCONT)
        self.expect_recovery(domain, "continued")
        server.stop(signal.SIGKILL)
        time.sleep(2)  # a server that has worked is given 1.5 s to restart
        self.expect_outage(domain, "killed")
        server.start()
        self.expect_recovery(domain, "restarted")

    def expect_outage(self, domain: str, word: str) -> None:
        """Expect SERVFAIL that names its server, and nothing at the public one."""
        before = self.server.queries()
        named = rf"EDE: .*{LOOPBACK}:{self.routed[domain].port}"
        for number in range(2):
            self.expect(f"dig {word}{number}.{domain}", "status: SERVFAIL", named)
        self.expect_queries(before)
        self.expect(f"dig {HOST}", ADDRESS)

    def expect_recovery(self, domain: str, word: str) -> None:
        deadline = time.monotonic() + 3
        for number in itertools.count():
            output = self.ask(f"dig {word}{number}.{domain}")
            if ROUTED[domain] in output:
                return
            expect(time.monotonic() < deadline, f"no recovery: {output}")
            time.sleep(0.05)


# ---- The host ------------------------------------------------------------------------
# What the system does with the process: another user, few descriptors, systemd.

# What is activated by its own socket adds another, and passes on both.
STREAM = ("systemd-socket-activate", "-l", f"{LOOPBACK}:PORT")
DATAGRAM = (*STREAM, "--datagram")
LIMITED = ("prlimit", "--nofile=64:64")
POWERLESS = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")
# Passes two sockets on as systemd does, as descriptors 3 and 4.
PASS_SOCKETS = """
import fcntl, os, sys
ours = [fcntl.fcntl(int(word), fcntl.F_DUPFD, 9) for word in sys.argv[1:3]]
for place, fd in enumerate(ours):
    os.dup2(fd, 3 + place)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="2")
os.execv(sys.argv[3], sys.argv[3:])
"""
FETCH = """
import sys, urllib.request
asked = urllib.request.Request(sys.argv[1], headers={"Host": "[fe80::1]"})
print(urllib.request.urlopen(asked, timeout=5).status)
"""


def link_other_host(bed: Bed, *addresses: tuple[str, str]) -> tuple[str, list[str]]:
    """Link a second network namespace: our interface, and the prefix to run there.

    `addresses`: pairs of an address here and one there, with the length of the prefix.
    """
    here, directory = f"veth{next(NUMBERS)}", bed.lab.new_directory("host")
    holder = bed.start(Process(["unshare", "--net", "sleep", "120"], directory))
    ours = os.readlink("/proc/self/ns/net")
    holder.wait_until(lambda: os.readlink(f"/proc/{holder.pid}/ns/net") != ours)
    there = ["nsenter", "--net", "--target", str(holder.pid)]
    run(*f"ip link add {here} type veth peer name there netns {holder.pid}".split())
    for prefix, interface, own in ([], here, 0), (there, "there", 1):
        for pair in addresses:
            nodad = ["nodad"] if ":" in pair[own] else []
            run(*prefix, "ip", "addr", "add", pair[own], "dev", interface, *nodad)
        run(*prefix, "ip", "link", "set", interface, "up")
    return here, there


class Host(Bed):
    name = "host"

    @check("started as root: nobody, and answers after new handshakes")
    def nobody(self) -> None:
        """The CA file can be read no more, nor perhaps the library of this Python."""
        self.start_both()
        process = Path(f"/proc/{self.proxy.pid}")
        status = (process / "status").read_text()
        for line in ("Uid:(\\s+65534){4}", "Gid:(\\s+65534){4}", "Groups:\\s*"):
            expect_match(f"\n{line}\n", status)
        expect_match(r"\nNoNewPrivs:\s+1\n", status)
        expect_match(r"\nCapPrm:\s+0+\n", status)
        expect_match(r"core file size +0 +0 ", (process / "limits").read_text())
        expect_match(" user=nobody ", self.proxy.output())
        self.expect_new_handshake("dropped")
        self.proxy.send(signal.SIGHUP)
        self.expect_new_handshake("hangup")
        expect_match("cache flushed", self.proxy.output())
        self.expect_clean_end()

    @check("root without capabilities: a warning; with --user an error")
    def powerless_root(self) -> None:
        self.start_server()
        self.start_proxy(prefix=POWERLESS)
        self.expect(f"dig {HOST}", ADDRESS)
        expect_match("WARNING .*root", self.proxy.output())
        options = f"--listen={LOOPBACK}:0", f"--upstream={LOOPBACK}", "--user=nobody"
        said = self.errand(*options, before=POWERLESS)
        expect(said.returncode in (1, 2) and "nobody" in said.stdout, said)
        expect("Traceback" not in said.stdout, said)

    @check("systemd-socket-activate, first query over UDP", DATAGRAM + STREAM, "+notcp")
    @check("systemd-socket-activate, first query over TCP", STREAM + DATAGRAM, "+tcp")
    def activated(self, prefix: Sequence[str], first: str) -> None:
        self.start_server()
        self.start_proxy(prefix=prefix, listen=False, ready="Listening on")
        for transport in (first, "+tcp", "+notcp"):
            self.expect(f"dig {transport} {HOST}", ADDRESS)
        address = f"listen={LOOPBACK}:{self.proxy.port} "
        expect(self.proxy.says(f"ready: {address}"), f"no {address}")
        self.expect_clean_end()

    @check("make install: runs; units valid, exposed at most 1.5")
    def installed(self) -> None:
        directory = self.lab.new_directory("installed")
        where = f"DESTDIR={directory}", "PREFIX=/opt/dotproxy"
        make = ["make", "-s", "-C", str(self.lab.proxy.parent), *where]
        program = "/opt/dotproxy/bin/dotproxy"
        run(*make, "install")
        expect_match(r"\Adotproxy \d", run(f"{directory}{program}", "--version"))
        units = sorted(directory.glob("etc/systemd/system/*"))
        names = ["dotproxy.service", "dotproxy.socket", "dotproxy@.service"]
        expect([unit.name for unit in units] == names, units)
        said = run("systemd-analyze", "verify", *map(str, units))
        expect(not said, said)
        for unit in units[::2]:
            start = rf"\nExecStart=/usr/bin/python3 -I {program}\b"
            expect_match(start, unit.read_text())
            judge = ["systemd-analyze", "security", "--offline=true", "--threshold=15"]
            run(*judge, str(unit))
        run(*make, "uninstall")
        left = [str(path) for path in directory.rglob("*") if not path.is_dir()]
        expect(not left, f"left: {left}")

    @check("link-local addresses with their zone: DNS, TLS and HTTP")
    def zones(self) -> None:
        here, there = link_other_host(self, ("fe80::1/64", "fe80::2/64"))
        address, ports = f"[fe80::1%{here}]", [free_port() for _ in range(3)]
        pair = f"{self.lab.directory}/good"
        self.start_server()
        self.start_proxy(
            *(f"--listen={address}:{ports[0]}", f"--tls-listen={address}:{ports[1]}"),
            *(f"--tls-cert={pair}.pem", f"--tls-key={pair}.key"),
            f"--admin={address}:{ports[2]}",
        )
        expect_match(re.escape(f"{address}:{ports[0]}"), self.proxy.output())
        tls = f"+tls-ca={self.lab.directory}/ca.pem +tls-hostname={TLS_NAME}"
        for command in (
            f"dig -p {ports[0]} @fe80::1%there {HOST}",
            f"dig -p {ports[0]} @fe80::1%there +tcp {HOST}",
            f"kdig -p {ports[1]} @fe80::1%there +tls {tls} {HOST}",
        ):
            expect_match(ADDRESS, run(*there, *command.split()))
        url = f"http://[fe80::1%there]:{ports[2]}/health"
        expect_match("200", run(*there, sys.executable, "-c", FETCH, url))

    @check("strangers: a private address is served, a public one refused")
    def strangers(self) -> None:
        port = free_port()
        private, public = ("10.77.0.1", "10.77.0.2"), ("198.51.100.1", "198.51.100.2")
        pairs = [(f"{near}/24", f"{far}/24") for near, far in (private, public)]
        _, there = link_other_host(self, *pairs)
        self.start_server()
        self.start_proxy(f"--listen=0.0.0.0:{port}")
        dig = [*there, "dig", "-p", str(port), "+tries=1", "+time=2", "+padding=200"]
        for transport in ("+notcp", "+tcp"):
            expect_match(ADDRESS, run(*dig, transport, f"@{private[0]}", HOST))
        refused = run(*dig, f"@{public[0]}", HOST)
        expect_match(r"status: REFUSED[\s\S]*EDE: 18 \(Prohibited\)", refused)
        stream = execute(*dig, "+tcp", f"@{public[0]}", HOST)
        expect(stream.returncode != 0 and not re.search(ADDRESS, stream.stdout), stream)
        expect(not self.proxy.says("Traceback"), self.proxy.output()[-1000:])

    @check("--reuse-port: two processes share the clients")
    def shared_port(self) -> None:
        self.start_server()
        port, admins = free_port(), [free_port(), free_port()]
        for admin in admins:
            self.start_proxy("--reuse-port", f"--admin={admin}", port=port)
        for number in range(60):
            transport = ("+notcp", "+tcp")[number % 2]
            self.expect(f"dig {transport} +short {HOST}", only(*RRSETS[HOST, "A"]))
        for admin in admins:
            for proto in ("udp", "tcp"):
                asked = rf'dotproxy_dns_requests_total{{proto="{proto}".*}}'
                expect(count_samples(admin, asked) > 0, f"{proto} was not shared")

    @check("--reuse-port: three restarts under load lose nothing", False)
    @check("sockets of systemd: three restarts under load lose nothing", True)
    def restarts(self, passed: bool) -> None:
        """A new process says that it is ready, then the old one is told to end.

        Where systemd keeps the sockets, the old one ends first.
        """
        self.start_server()
        port, stop, asked = free_port(), threading.Event(), Counter[str]()
        kinds = (socket.SOCK_DGRAM, socket.SOCK_STREAM) if passed else ()
        sockets = [self.stack.enter_context(socket.socket(type=kind)) for kind in kinds]
        for each in sockets:
            each.bind((LOOPBACK, port))
        for each in sockets[1:]:
            each.listen(128)
        fds = [each.fileno() for each in sockets]
        prefix = [sys.executable, "-c", PASS_SOCKETS, *map(str, fds)] if passed else []
        options = [] if passed else ["--reuse-port"]

        def start() -> Proxy:
            return self.start_proxy(
                *options, port=port, prefix=prefix, listen=not passed, fds=fds
            )

        def ask_on_and_on() -> None:
            for number in itertools.count():
                if stop.wait(0.02):
                    return
                try:
                    ask_over_tcp(port, number % 65536)
                    asked["right"] += 1
                except (OSError, CheckError) as error:
                    asked[repr(error)] += 1

        def restart_thrice(proxy: Proxy) -> None:
            for _ in range(3):
                time.sleep(1.5)
                old, proxy = proxy, proxy if passed else start()
                status = old.stop()
                expect(status == 0, f"status {status}")
                if passed:
                    proxy.start()

        with ThreadPoolExecutor(2) as pool:
            jobs = pool.submit(restart_thrice, start()), pool.submit(ask_on_and_on)
            try:
                Load(self, 3500, "-Q", "500", port=port).expect_right()
                jobs[0].result()
            finally:
                stop.set()
        expect(set(asked) == {"right"} and asked["right"] > 100, asked)


class Crowded(Bed):
    name = "crowd"
    alone = True

    @check("64 descriptors, 100 TCP clients: UDP, upstreams and CPU have theirs")
    def few_descriptors(self) -> None:
        self.start_server()
        proxy = self.start_proxy(prefix=LIMITED)
        load = Load(self, 500, "-Q", "100")
        with contextlib.ExitStack() as stack:
            for _ in range(100):
                stack.enter_context(connect(proxy.port))
            time.sleep(0.5)
            before = proxy.cpu_seconds()
            time.sleep(2)
            spent = proxy.cpu_seconds() - before
            for number in range(3):
                self.expect_new_handshake(f"few{number}")
        time.sleep(0.5)
        took = ask_over_tcp(proxy.port, 1)
        expect(spent < 0.4, f"{spent:.2f} s of CPU in 2 s with nothing to do")
        expect(took < 0.5, f"a TCP client waited {took:.3f} s after the others went")
        expect_match(r"few descriptors: limit=64 max_tcp_clients=\d+", proxy.output())
        expect(not proxy.says("Too many open files"), "descriptors ran out")
        load.expect_right()


# ---- Encrypted clients ---------------------------------------------------------------
# DoT clients ask the proxy itself. Its certificate is a file of its own, which can be
# replaced.


TLS_1_1 = "-tls1_1 -cipher ALL:@SECLEVEL=0"


class Encrypted(Bed):
    name = "encrypted"
    asks = rf"""
tls-kdig +nopadding {HOST} A ~ TLS session ~ status: NOERROR ~ {ADDRESS}
   ~ Received [4-9]\d B
tls-kdig +padding {HOST} A {HOST} A ~ PADDING: \d+ B[\s\S]+Received 468 B[\s\S]+d 468 B
tls-kdig +padding {MANY} A ~ Received 1872 B
tls-kdig +keepopen +short {FIVE} ~ {LIST_ADDRESSES}
tls-kdig +dnssec {LARGE} TXT ~ {" ~ ".join(STRINGS)}
tls-kdig missing.example.com A ~ status: NXDOMAIN
"""
    pair: Path  # the directory of the certificate and its key

    def stage(self) -> None:
        self.pair = self.lab.new_directory("pair")
        self.pair.chmod(0o755)
        self.show("good")
        self.files = (
            f"--tls-cert={self.pair}/chain.pem",
            f"--tls-key={self.pair}/key.pem",
        )
        self.start_server()
        self.start_proxy(f"--tls-listen={LOOPBACK}:0", *self.files)

    def show(self, chain: str | Path, key: str = "") -> None:
        """Put a chain in place of the present one, with its key or with another."""
        sources = f"{chain}.pem", f"{key or chain}.key"
        for source, name in zip(sources, ("chain.pem", "key.pem")):
            shutil.copy(self.lab.directory / source, self.pair / name)
            (self.pair / name).chmod(0o644)

    def reload(self, said: str) -> None:
        """Send SIGHUP and wait until the log says what came of it."""
        before = self.proxy.output().count(said)
        self.proxy.send(signal.SIGHUP)
        self.proxy.wait_until(lambda: self.proxy.output().count(said) > before)

    @check("kdig +tls, wrong name: not asked")
    def wrong_name(self) -> None:
        words = self.client(f"tls-kdig {HOST}")
        ended = execute(*(word.replace(TLS_NAME, "other.test") for word in words))
        expect(not re.search(ADDRESS, ended.stdout), ended)

    @check("dotproxy before dotproxy")
    def behind_another(self) -> None:
        self.start_proxy(upstream=self.proxy.tls_port)
        for transport in ("+notcp", "+tcp"):
            self.expect(f"dig {transport} {HOST} A", ADDRESS)
        Load(self, 1000, "-Q", "500").expect_right()

    @check("dnsperf, 5,000 names over TLS")
    def load(self) -> None:
        Load(self, 5000, "-m", "dot", port=self.proxy.tls_port).expect_right()

    @check("s_client, TLS 1.1: refused", TLS_1_1, "", "alert protocol version")
    @check("s_client, ALPN: dot", "-alpn dot,h2", "", "ALPN protocol: dot")
    @check("s_client, TLS 1.2: a session", "-tls1_2 -sess_out s2", "", "New, TLS")
    @check("s_client, TLS 1.2: resumed", "-tls1_2 -sess_in s2", "", "Reused, TLS")
    @check("s_client, TLS 1.3: a session", "-tls1_3 -sess_out s3", "", "New, TLS")
    @check("s_client, TLS 1.3: resumed", "-tls1_3 -sess_in s3", "", "Reused, TLS")
    @check("s_client, KeyUpdate: answered", "-tls1_3 -msg", "KKK", "<<< .*KeyUpdate")
    @check("s_client, renegotiation: refused", "-tls1_2", "R", "no renegotiation")
    def s_client(self, options: str, typed: str, pattern: str) -> None:
        """`openssl s_client` takes letters for commands."""
        lines = "".join(f"echo {letter}; sleep 0.3; " for letter in typed)
        client = f"openssl s_client -connect {LOOPBACK}:{self.proxy.tls_port} {options}"
        script = f"cd {self.pair}; {{ sleep 0.3; {lines}}} | {client} 2>&1"
        expect_match(pattern, execute("sh", "-c", script).stdout)

    @check("certificate replaced and broken under load")
    def rotation(self) -> None:
        load = Load(self, 600, "-m", "dot", "-Q", "200", port=self.proxy.tls_port)
        for pair, said, renewed in (
            (("renewed",), "certificate loaded", True),
            (("good", "renewed"), "WARNING certificate not replaced", True),
            (("good",), "certificate loaded", False),
        ):
            time.sleep(0.5)
            self.show(*pair)
            self.reload(said)
            client = f"openssl s_client -connect {LOOPBACK}:{self.proxy.tls_port}"
            show = f"{client} < /dev/null | openssl x509 -noout -text"
            shown = run("sh", "-c", show)
            expect(("renewed.test" in shown) == renewed, f"{pair}: {shown}")
        load.expect_right()

    @check("a socket named tls from systemd-socket-activate")
    def activated(self) -> None:
        self.start_proxy(
            *self.files,
            upstream=self.proxy.tls_port,
            prefix=[*STREAM, "--fdname=tls"],
            listen=False,
            ready="Listening on",
        )
        words = CLIENTS["tls-kdig"].replace("TLS", str(self.proxy.port))
        expect_match(ADDRESS, run(*self.client(f"{words} {HOST} A")))

    @check("certificate made as README says: kdig, dotproxy")
    def readme(self) -> None:
        recipe = r"\$ openssl (req [^\\\n]*(?:\\\n[^\\\n]*)*)"
        command = expect_match(recipe, README.read_text())[1]
        directory = self.lab.new_directory("readme")
        openssl(directory, command.replace("\\\n", ""))
        self.show(directory / "dns")
        self.reload("names=dns.home.arpa")
        words = self.client(f"tls-kdig +tls-ca={directory}/dns.pem {HOST} A")
        own = [word.replace(TLS_NAME, "dns.home.arpa") for word in words]
        expect_match(ADDRESS, run(*own))
        upstream, ca = self.proxy.tls_port, f"--ca-file={directory}/dns.pem"
        self.start_proxy(ca, upstream=upstream, name="#dns.home.arpa")
        self.expect(f"dig {HOST} A", ADDRESS)

    @check("SIGTERM: exit status 0, no traceback in the log")
    def end(self) -> None:
        self.expect_clean_end()


# ---- Health check and doctor ---------------------------------------------------------
# What both say of the set-ups that people get wrong.

NO_UPSTREAM = "warn .*no upstream"
BEHIND = f"FAIL .*before this program was made|{NO_UPSTREAM}"
FAKETIME = "env", "FAKETIME_DONT_FAKE_MONOTONIC=1", "faketime", "-f"
NO_CA = "env", "SSL_CERT_FILE=/nonexistent", "SSL_CERT_DIR=/nonexistent"


class Doctor(Bed):
    name = "doctor"

    def expect_findings(
        self, status: int, *options: str, before: Sequence[str] = (), **found: str
    ) -> None:
        """Expect an exit status, and of checks `ok|warn|FAIL`, then their detail."""
        said = self.errand("--doctor", *options, before=before)
        expect(said.returncode == status, said)
        for name, pattern in found.items():
            expect_match(rf"(?m)^  {name.replace('_', ' ')} +({pattern})", said.stdout)

    def upstream(self, port: int = 0) -> list[str]:
        return [
            f"--upstream={LOOPBACK}:{port or self.server.port}#{TLS_NAME}",
            f"--ca-file={self.lab.directory}/ca.pem",
            f"--listen={LOOPBACK}:{free_port()}",
        ]

    @check("health check: healthy, upstream down, proxy down")
    def health(self) -> None:
        self.start_both()
        options = f"--listen={LOOPBACK}:{self.proxy.port}", "--timeout=2"
        for ended, status, pattern in (
            (None, 0, r"\Ahealthy: answered in [\d.]+ ms\n\Z"),
            (self.server, 1, r"\Aupstream down: .*refused.*\n\Z"),
            (self.proxy, 1, r"\Aproxy down: nothing listens.*\n\Z"),
        ):
            if ended is not None:
                ended.stop()
            said = self.errand("--healthcheck", *options)
            expect(said.returncode == status, said)
            expect_match(pattern, said.stdout)

    @check("dnsdist", "dnsdist")
    @check("knot-resolver", "knot-resolver")
    def healthy(self, program: str) -> None:
        """The pin is what openssl says."""
        self.start_server(program)
        self.expect_findings(
            0,
            *self.upstream(),
            handshake=r"ok +TLSv1\.3, ",
            resumption="ok +session resumed",
            certificate=f"warn +for {TLS_NAME}, {LOOPBACK}; 1 days",
            pin=f"ok +{re.escape(self.lab.pin('good'))}$",
        )

    @check("wrong name", "wrong-name", r"other\.example\.org, .*, not for")
    @check("expired", "expired", "expired")
    @check("unknown CA", "unknown", "unknown CA")
    @check("clock a year behind", "good", "not valid", (*FAKETIME, "-365d"), BEHIND)
    @check("clock a year ahead", "good", "expired", (*FAKETIME, "+365d"), NO_UPSTREAM)
    def refuses(
        self, certificate: str, cause: str, before: Sequence[str] = (), clock: str = ""
    ) -> None:
        need(not before or bool(shutil.which(before[2])), "faketime")
        self.start_server(certificate=certificate)
        cause = f"FAIL .*{cause}" + ".*check the clock" * bool(clock)
        options = self.upstream()
        self.expect_findings(1, *options, before=before, clock=clock, certificate=cause)
        self.expect_queries(0)

    @check("no CA certificates")
    def no_authorities(self) -> None:
        self.start_server()
        cause = "FAIL .*cannot be verified: install"
        found = {"CA_certificates": "FAIL +none in /nonexistent", "certificate": cause}
        self.expect_findings(1, *self.upstream()[::2], before=NO_CA, **found)
        self.expect_queries(0)

    @check("who holds the port: dotproxy itself, then another program")
    def port(self) -> None:
        other = self.start_server("unbound")
        self.start_both()
        for port, status, finding in (
            (self.proxy.port, 0, r"ok +held by dotproxy \(pid \d+\), .*; healthy"),
            (other.port, 1, r"FAIL +taken by unbound \(pid \d+"),
        ):
            held = f"{LOOPBACK}:{port}"
            options = *self.upstream()[:2], f"--listen={held}"
            self.expect_findings(status, *options, **{held: finding})


# ---- Prometheus ----------------------------------------------------------------------
# It scrapes the proxy under load; then each query of the dashboard and of the alerts in
# the README has to find something.

PROMETHEUS = """
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: [{directory}/rules.yml]
scrape_configs:
  - job_name: dotproxy
    static_configs: [{{targets: ['127.0.0.1:{port}']}}]
"""
# For 12 s of the browser's time, which need not pass: two updates of the page.
CHROMIUM = (
    "chromium --headless --no-sandbox --disable-gpu --disable-background-networking"
    " --disable-component-update --disable-dev-shm-usage --disable-sync --no-first-run"
    " --enable-logging=stderr --virtual-time-budget=12000 --dump-dom"
)


def count_samples(admin_port: int, pattern: str) -> int:
    """Add up the samples of a proxy whose names and labels match."""
    found = re.findall(rf"(?m)^{pattern} (\d+)$", fetch(admin_port, "/metrics"))
    return sum(map(int, found))


class Monitored(Bed):
    name = "prometheus"
    alone = True
    admin: int  # ports
    prometheus: int
    rules: Path
    asked = ("udp", 6000), ("tcp", 800)  # by dnsperf

    def stage(self) -> None:
        self.admin, self.prometheus = free_port(), free_port()
        directory = self.lab.new_directory("prometheus")
        self.rules, config = directory / "rules.yml", directory / "prometheus.yml"
        rules = expect_match(r"(?s)```yaml\n(groups:.*?)```", README.read_text())
        self.rules.write_text(rules[1])
        config.write_text(PROMETHEUS.format(directory=directory, port=self.admin))
        command = f"prometheus --config.file={config}"
        command += f" --storage.tsdb.path={directory}/data"
        command += f" --web.listen-address={LOOPBACK}:{self.prometheus}"
        process = Process(command.split(), directory, lambda: accepts(self.prometheus))
        self.start(process)
        self.start_server()
        self.start_proxy(f"--admin={self.admin}")
        for mode, count in self.asked:
            Load(self, count, "-m", mode, "-Q", "400").expect_right()

    def query(self, path: str, **parameters: str) -> dict[str, list[dict[str, object]]]:
        answer = json.loads(fetch(self.prometheus, f"/api/v1/{path}", **parameters))
        expect(answer["status"] == "success", answer)
        return dict(answer["data"])

    def expect_found(self, what: object, promql: str) -> None:
        found = self.query("query", query=promql)["result"]
        expect(bool(found), f"{what} finds nothing: {promql}")

    @check("every scrape succeeds")
    def scraped(self) -> None:
        (target,) = self.query("targets")["activeTargets"]
        expect(target["health"] == "up", f"{target['health']}: {target['lastError']}")
        promql = "min_over_time(up[10s]) == 0"
        missed = self.query("query", query=promql)["result"]
        expect(not missed, f"scrapes failed: {missed}")

    @check("as many queries are counted as dnsperf counts")
    def counts(self) -> None:
        for mode, completed in self.asked:
            pattern = rf'dotproxy_dns_requests_total{{proto="{mode}",.*}}'
            counted = count_samples(self.admin, pattern)
            expect(0 < completed == counted, f"{mode}: {counted}, dnsperf {completed}")

    @check("promtool has nothing to say on the metrics")
    def promtool_metrics(self) -> None:
        text = fetch(self.admin, "/metrics")
        said = execute("promtool", "check", "metrics", given=text)
        expect(said.returncode == 0 and not said.stdout, said)

    @check("every query of the dashboard finds something")
    def dashboard(self) -> None:
        panels = json.loads(fetch(self.admin, "/grafana.json"))["panels"]
        queries = [
            (panel["title"], re.sub(r"\$(job|instance)", ".*", target["expr"]))
            for panel in panels
            for target in panel.get("targets", ())
        ]
        expect(len(queries) > 30, f"{len(queries)} queries only")
        for title, promql in queries:
            self.expect_found(title, promql.replace("$__rate_interval", "10s"))

    @check("the status page works in a browser, 390 pixels wide", 390)
    @check("the status page works in a browser, 1280 pixels wide", 1280)
    def status_page(self, width: int) -> None:
        """It shows what /metrics says, has updated itself, and has no complaint."""
        url = f"http://{LOOPBACK}:{self.admin}/"
        profile = self.lab.new_directory("chromium")
        rules = f"--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE {LOOPBACK}"
        own = f"--user-data-dir={profile}", f"--window-size={width},844"
        page = run(*CHROMIUM.split(), *own, rules, url, timeout=60)
        expect_match(r"<h1>.*Serving: 1 of 1 upstreams up", page)
        expect_match(r"Half answered within</small><b>[^<]+\u202fm?s</b><small>", page)
        lines = [line for line in page.splitlines() if "CONSOLE" in line]
        complaints = [line for line in lines if url in line]  # not of its own pages
        expect(not complaints, complaints)
        shown = r"Queries answered</small><b>([\d,]+)</b><small>"
        number = int(expect_match(shown, page)[1].replace(",", ""))
        counted = count_samples(self.admin, r"dotproxy_dns_responses_total{.*}")
        expect(number == counted > 0, f"{number} shown, {counted} counted")

    @check("promtool accepts the alerts of the README")
    def promtool_rules(self) -> None:
        said = run("promtool", "check", "rules", str(self.rules))
        expect_match("SUCCESS: 7 rules", said)

    @check("every alert has something to compare, and none fires")
    def alerts(self) -> None:
        (group,) = json.loads(fetch(self.prometheus, "/api/v1/rules"))["data"]["groups"]
        for rule in group["rules"]:
            expect(rule["health"] == "ok" and rule["state"] != "firing", rule)
            promql = re.sub(r" (==|<|>) [\d.]+\Z", "", rule["query"])
            expect(promql != rule["query"], f"no comparison: {promql}")
            self.expect_found(rule["name"], promql)


# ---- Bench ---------------------------------------------------------------------------
# The proxy and unbound, one after the other, before the same dnsdist.

BENCH_SECONDS = "4"
FORWARD = f"""
  do-not-query-localhost: no
  tls-cert-bundle: "DIRECTORY/../ca.pem"
forward-zone:
  name: "."
  forward-tls-upstream: yes
  forward-addr: {LOOPBACK}@MORE#{TLS_NAME}
"""
OTHERS["forwarder"] = ("unbound -d -c config", UNBOUND + FORWARD, "")


def bench(bed: Bed) -> int:
    """Print queries/s and CPU microseconds per query."""
    bed.start_both()
    unbound = bed.start_server("forwarder", more=str(bed.server.port))
    for kind, count in ("hits", 1000), ("misses", 400_000):
        names = bed.lab.directory / kind
        names.write_text("".join(f"{kind}{i}.{BENCH} A\n" for i in range(count)))
        for name, port, process in (
            ("dotproxy", bed.proxy.port, bed.proxy),
            ("unbound", unbound.port, unbound),
        ):
            command = f"dnsperf -s {LOOPBACK} -p {port} -d {names} -c 10 -b 1024 -q 100"
            for limit in (["-n", "2"] if kind == "hits" else []), ["-l", BENCH_SECONDS]:
                before = process.cpu_seconds()
                report = run(*command.split(), *limit) if limit else ""
            spent = (process.cpu_seconds() - before) * 1e6
            spent /= int(expect_match(r"NOERROR (\d+)", report)[1])
            rate = float(expect_match(r"Queries per second: +([\d.]+)", report)[1])
            print(f"{name:10}{kind:8}{rate:10,.0f}/s{spent:8.1f} us", flush=True)
    return 0


# ---- Running the checks --------------------------------------------------------------

JOBS = 2
GROUPS: list[tuple[type[Bed], str]] = [
    *((Outage, ""), (Horizon, ""), (Encrypted, "")),
    *((Clients, program) for program in PROGRAMS),
    *((Host, ""), (Certificates, ""), (LocalNames, ""), (Names, ""), (Doctor, "")),
    *((Loaded, ""), (Crowded, ""), (Monitored, "")),
]


def jobs_of(lab: Lab, wanted: re.Pattern[str]) -> Iterator[tuple[Bed, list[Row]]]:
    """Find the checks that are wanted; those in one list share a bed."""
    for group, program in GROUPS:
        name = program or group.name
        rows = [row for row in group.rows() if wanted.search(f"{name}: {row[0]}")]
        staged = "stage" in vars(group)
        for part in [rows] * bool(rows) if staged else [[row] for row in rows]:
            yield group(lab, name), part


class Report:
    """Prints what came of each check, and counts."""

    def __init__(self) -> None:
        self.counts = Counter({"passed": 0, "failed": 0})

    def run_job(self, bed: Bed, rows: list[Row]) -> None:
        """Make the checks one after the other, on what the stage starts."""
        with bed, self.told(bed, "start", silent=True):
            bed.stage()
            for title, function, given in rows:
                with bed.inner() as inner, self.told(inner, title):
                    function(inner, *given)

    @contextlib.contextmanager
    def told(self, bed: Bed, title: str, silent: bool = False) -> Iterator[None]:
        """Tell what comes of the block; go on in any case."""
        verdict, line = "passed", f"ok {bed.name}: {title}"
        try:
            yield
        except Skipped as reason:
            verdict, line = "skipped", f"skip {bed.name}: {title}: {reason}"
        except (CheckError, OSError, subprocess.SubprocessError) as error:
            said = " ".join(f"FAIL {bed.name}: {title}: {error}".split())[:1500]
            log = bed.proxy.output() if hasattr(bed, "proxy") else ""
            lines = [said, *log.splitlines()[-12:]]
            verdict, line = "failed", "\n    log: ".join(lines)
        if verdict != "passed" or not silent:
            self.counts[verdict] += 1
            print(f"{line}\n", end="", flush=True)


def run_all(lab: Lab, wanted: re.Pattern[str]) -> int:
    """Run the wanted checks and return the exit status."""
    report, jobs = Report(), list(jobs_of(lab, wanted))
    for alone in (False, True):
        pool = ThreadPoolExecutor(1 if alone else JOBS)
        done = [pool.submit(report.run_job, *j) for j in jobs if j[0].alone == alone]
        try:
            for each in done:
                each.result()
        except BaseException:
            for process in RUNNING.copy():
                process.send(signal.SIGKILL)
            raise
        finally:
            pool.shutdown(cancel_futures=True)
    print(", ".join(f"{count} {verdict}" for verdict, count in report.counts.items()))
    return int(report.counts["failed"] > 0 or not report.counts["passed"])


def main() -> int:
    parser = argparse.ArgumentParser(description="Check dotproxy with real programs.")
    beside = CHECKOUT / "dotproxy.py"
    parser.add_argument("--proxy", type=Path, default=beside, help="file to check")
    parser.add_argument("--only", type=re.compile, default="", metavar="REGEX")
    parser.add_argument("--list", action="store_true", help="print the checks' names")
    parser.add_argument("--bench", action="store_true", help="measure, check nothing")
    args = parser.parse_args()
    if not args.list:
        enter_namespace()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="dotproxy-peers-") as name:
        lab = Lab(Path(name), args.proxy.resolve())
        if args.list:
            for bed, rows in jobs_of(lab, args.only):
                print(*(f"{bed.name}: {row[0]}" for row in rows), sep="\n")
            return 0
        with Bed(lab) as bed:
            lab.zone_port = bed.start_server("zone").port
            return bench(bed) if args.bench else run_all(lab, args.only)


if __name__ == "__main__":
    sys.exit(main())
