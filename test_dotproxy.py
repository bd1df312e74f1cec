#!/usr/bin/env python3
"""Tests of dotproxy.

    python3 -X dev -W error test_dotproxy.py [CLASS | CLASS.test_NAME] ...

First comes the kit (builders, certificates, clock, clients, fake upstream), then the
test classes in the order of dotproxy.py. The upstream is faked, and so is the clock
wherever it can be replaced; sockets, TLS, certificates and the processes of `MainTest`
are real. Every wait has a limit: a broken server fails a test and never hangs it. The
last line on stdout is the result; a thread, a socket or a warning that is left over at
the end is a failure too.
"""

from __future__ import annotations

import ast
import atexit
import base64
import collections
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import dis
import errno
import functools
import gc
import grp
import hashlib
import http.client
import importlib
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import pathlib
import pwd
import py_compile
import queue
import random
import re
import resource
import sched
import select
import selectors
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
import types
import unittest
import warnings
import xml.etree.ElementTree
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar, Union
from unittest import mock

import dotproxy
from dotproxy import Cache, Endpoint, FormatError, Proxy, Rcode, UpstreamError

# ---- Builders ------------------------------------------------------------------------
# Messages from Python values, and back. The parser is the tests' own: it shares no code
# with dotproxy, accepts nothing malformed, and is simple rather than fast.

HEADER = struct.Struct("!6H")
QR, AA, TC, RD, RA, AD, CD = 0x8000, 0x0400, 0x0200, 0x0100, 0x0080, 0x0020, 0x0010
OPCODE_MASK, RCODE_MASK = 0x7800, 0x000F
DO = 0x8000  # in the flags of the OPT record
OPT = 41
UDP, TCP, DOT = ("udp", "1"), ("tcp", "1"), ("dot", "1")  # transports over IPv4
RRTYPES = {
    **{"A": 1, "NS": 2, "CNAME": 5, "SOA": 6, "PTR": 12, "MX": 15, "TXT": 16},
    **{"AAAA": 28, "SRV": 33, "DS": 43, "RRSIG": 46, "NSEC": 47, "DNSKEY": 48},
    **{"HINFO": 13, "SVCB": 64, "HTTPS": 65, "AXFR": 252, "ANY": 255},
}


class Record(NamedTuple):
    name: str
    type: int
    rrclass: int
    ttl: int
    rdata: bytes  # names inside are left as they came


class Opt(NamedTuple):
    size: int
    version: int
    flags: int
    options: list[tuple[int, bytes]]


class Message(NamedTuple):
    """A parsed message: OPT is not in `additional`, its RCODE bits are in `rcode`."""

    raw: bytes
    id: int
    flags: int
    rcode: int
    question: bytes
    qname: str
    qtype: int
    qclass: int
    answers: list[Record]
    authority: list[Record]
    additional: list[Record]
    opt: Opt | None

    @property
    def addresses(self) -> list[str]:
        found = [entry.rdata for entry in self.answers if entry.type in (1, 28)]
        return [str(ipaddress.ip_address(rdata)) for rdata in found]


def encode_name(name: str) -> bytes:
    """Encode without compression; "." is the root."""
    labels = filter(None, name.encode("latin-1").split(b"."))
    return b"".join(bytes([len(label)]) + label for label in labels) + b"\0"


def decode_name(message: bytes, offset: int) -> tuple[str, int]:
    """Return the name at `offset`, its case kept, and the offset behind it."""
    size, start = message[offset], offset + 1
    if size >= 0xC0:
        target = (size & 0x3F) << 8 | message[start]
        if target >= offset:
            raise ValueError(f"name at {offset} points forward to {target}")
        return decode_name(message, target)[0], start + 1
    if size >= 0x40:
        raise ValueError(f"bad label at {offset}")
    if not size:
        return ".", start
    rest, end = decode_name(message, start + size)
    label = message[start : start + size].decode("latin-1")
    return label if rest == "." else f"{label}.{rest}", end


def option(code: int, data: bytes = b"") -> bytes:
    """Build one EDNS option."""
    return struct.pack("!HH", code, len(data)) + data


def record(
    name: str | bytes, rrtype: str | int, rdata: bytes, ttl: int = 300, rrclass: int = 1
) -> bytes:
    """Build a resource record; a name in bytes is taken as it is."""
    owner = name if isinstance(name, bytes) else encode_name(name)
    number = rrtype if isinstance(rrtype, int) else RRTYPES[rrtype]
    return owner + struct.pack("!HHIH", number, rrclass, ttl, len(rdata)) + rdata


def address(name: str | bytes, text: str, ttl: int = 300) -> bytes:
    """Build an A or AAAA record."""
    rdata = ipaddress.ip_address(text).packed
    return record(name, "A" if len(rdata) == 4 else "AAAA", rdata, ttl)


def soa(ttl: int = 300, minimum: int = 300) -> bytes:
    """Build the SOA record of a negative answer from example.com (RFC 2308)."""
    names = encode_name("ns.example.com") + encode_name("hostmaster.example.com")
    numbers = struct.pack("!5I", 1, 7200, 3600, 86400, minimum)
    return record("example.com", "SOA", names + numbers, ttl)


def query(
    name: str | bytes = "www.example.com",
    rrtype: str | int = "A",
    *,
    id: int = 0x1234,
    rd: bool = True,
    ad: bool = False,
    cd: bool = False,
    do: bool | None = None,
    size: int = 1232,
    options: bytes = b"",
    edns_version: int = 0,
    opcode: int = 0,
    rrclass: int = 1,
) -> bytes:
    """Build a query: without EDNS if `do` is None, else with the DO bit so."""
    flags = opcode << 11 | RD * rd | AD * ad | CD * cd
    question = record(name, rrtype, b"", 0, rrclass)[:-6]
    message = HEADER.pack(id, flags, 1, 0, 0, do is not None) + question
    if do is None:
        return message
    return message + record(".", OPT, options, edns_version << 16 | DO * do, size)


def response(
    query_message: bytes,
    *answers: bytes | str,
    ttl: int = 300,
    rcode: int = 0,
    authority: Iterable[bytes] = (),
    additional: Iterable[bytes] = (),
    aa: bool = False,
    ad: bool = False,
    tc: bool = False,
    ra: bool = True,
    edns: bool = True,
    options: bytes = b"",
) -> bytes:
    """Build the response to a query; an answer in text is an address of its name.

    OPT is added if the query had one and `edns` is true; only then fits an RCODE > 15.
    """
    asked = parse(query_message)
    owner = asked.question[:-4]
    records = [
        answer if isinstance(answer, bytes) else address(owner, answer, ttl)
        for answer in answers
    ]
    authority, additional = list(authority), list(additional)
    if edns and asked.opt:
        extended = (rcode >> 4) << 24 | asked.opt.flags & DO
        additional.append(record(".", OPT, options, extended, 1232))
    flags = QR | asked.flags & (OPCODE_MASK | RD | CD) | rcode & RCODE_MASK
    flags |= AA * aa | AD * ad | TC * tc | RA * ra
    counts = 1, len(records), len(authority), len(additional)
    header = HEADER.pack(asked.id, flags, *counts)
    return header + asked.question + b"".join([*records, *authority, *additional])


def parse(message: bytes) -> Message:
    """Parse all of a message; fails where anything is malformed."""
    id, flags, questions, *counts = HEADER.unpack_from(message)
    qname, qtype, qclass, offset = "", 0, 0, HEADER.size
    if questions:
        qname, offset = decode_name(message, offset)
        qtype, qclass = struct.unpack_from("!HH", message, offset)
        offset += 4
    question = message[HEADER.size : offset]
    sections: list[list[Record]] = [[], [], []]
    for section, count in zip(sections, counts):
        for _ in range(count):
            entry, offset = _parse_record(message, offset)
            section.append(entry)
    answers, authority, additional = sections
    misplaced = OPT in [entry.type for entry in answers + authority]
    if misplaced or questions > 1 or offset != len(message):
        raise ValueError(f"OPT misplaced, {questions} questions, or end at {offset}")
    opts = [entry for entry in additional if entry.type == OPT]
    rcode = flags & RCODE_MASK | (opts[0].ttl >> 24 << 4 if opts else 0)
    return Message(
        *(message, id, flags, rcode, question, qname, qtype, qclass),
        *(answers, authority, [entry for entry in additional if entry.type != OPT]),
        opt=_parse_opt(*opts) if opts else None,
    )


def _parse_record(message: bytes, offset: int) -> tuple[Record, int]:
    name, start = decode_name(message, offset)
    number, rrclass, ttl, size = struct.unpack_from("!HHIH", message, start)
    start, end = start + 10, start + 10 + size
    return Record(name, number, rrclass, ttl, message[start:end]), end


def _parse_opt(opt: Record) -> Opt:
    options, rest = [], opt.rdata
    while rest:
        code, length = struct.unpack_from("!HH", rest)
        if opt.name != "." or len(rest) < 4 + length:
            raise ValueError("OPT with a name, or option past the end")
        options.append((code, rest[4 : 4 + length]))
        rest = rest[4 + length :]
    return Opt(opt.rrclass, opt.ttl >> 16 & 0xFF, opt.ttl & 0xFFFF, options)


# ---- Test certificates ---------------------------------------------------------------
# The standard library cannot make them; nothing of these is secret. Made with `openssl
# ca` for keys of prime256v1, valid from 2020 to 2100, `expired` for January 2020 alone.
# The CAs have critical basicConstraints=CA:TRUE and keyUsage=keyCertSign,cRLSign, the
# others a subjectAltName (dot.test; of `good` 127.0.0.1 and ::1 as well), critical
# keyUsage=digitalSignature and extendedKeyUsage=serverAuth. All but `good2` are for the
# same key. In DER, one behind the other, compressed by zlib; then the octets of each.
CERTIFICATES = """
c-k{4XJTYzQ8+j65zCftMYm};z6adB=eE`Q#jEqIMN={+akwv1W}kF@0T&yGR-4B;TV_V~g)Yoa3@qi_(s&=#Y}m
Kbyy?@F?RNYTDhrt^wbP4r*SYD;-rJV*G<4?k0>hqPlYKQFUhXl}>V050xpDWOJKL@s-ahy9{3ip5#k_l#@II^M+
~{@XOY3*f_>*T=w9R^1wR!EW|IWOuUPTR<7B`z~y)sG;ocH?Vs?vMAbx*}#bDDd$vv>Q_{F_y-4ab=DR<8djRA0H
*$&op_LGQIqP-*M>^=vY~x4XSz%t}>EG-zU61H?fKn3))vm_&G$mT~<mSnKld)((}8e|m4+&dYvi0JD^ZnaM!fP|
`r0jX9KsnMWWczoeijzoJs1B(=Ci!P(J3PMp`sz`zg)!5|9EHG*>ugbf7^_#v7(fSUC{`V1lsgxT1^<})!Od`FEy
U0h>O1vH#FR929M$AGH|VJ9C*ke`w9KMT-L><th_svt#d9NKJ*tgP(Jj0W-`L1h*R1F;5?w4Cmn-y8(p?Ox8ktMV
zyKjNU2pn)t%0UwJPi%7uwj+Dqr8#1g?cihpp*jO|DvF{q>U}N@RFmPp3WY}_2;J~k`w)5OW`Ycpp&g<~5Tby{p<
A4%Ntxw3Rg8Ds73O0Lv-$d?IdmcX7J~8m5L(2Z{_JFyL2Lrb^v`y2#zVHt)u2urEA2hydAGR;cJH=l8<09`~neEn
p15PAvLWwU?Ltz6!NRV@t=4I#Qm*;_EN&zjVB>0U$OvB+2S61w?yY1LIcrAOq|6VcV*&`fnzmSx;@?<b@1IE?g|H
n&Lux+{iXWoR6{D98+6=%G6T;w&}{$j(2lus(5RX`<Y?-$i&Sos}V^|Z%f#hj^y_wMI2=B(Nl!y5Rt{`DvS*}#Z8
0mOOG$jW>tX7Tl+dEM#OJ?W9F`Pvsh7SSL+a}B;IYn*D(ILSa85@{+1N{C2nXQ^jkU~Cs)Kn08gl<^e8Yi4e%-Js
Db^-rv2yH;9Zb(hwueUd9@3UyRu$oYrA1;%BE;n6I+iM;dvyl!oL<}+FGaLpR)1+z|HIQ)k5m8gUiC?1aiaSk*t3
ng-yA4rN{)e5%1@8z_nzx!I+GHS*pa=y(k$w)1teQZuNXzVjkhs36Wfm{=ky-fm%Ihl#YdPpuApqP}8W3<y;#KqM
lm%jSM^k<vIxn=fexd`iCG=FZmLj3SyU`%em{cU-%K&#l~DYqJ3q#q{V?=jJx&nPL#R8**yyyMbtv|OpcmRjPq+3
cu{$p5FsUN^h9mA32~z+6dbg+3T^WpTup#p_nin0=J9zv-$&`eSisE?F#bnP6FT(MPpmf%u$6uJp>{mW{rO+!iKx
?b^6n)EqPq_5kB@ZH&Z^0-03pbQjs>9aXu_aa%tmzkL0_z|Va-U&mh`E?_*?0I?D@E+w88$5b5TpLpQRr>qGRHs3
1U$Sp<9xWua+cbu+zVE=%HWm@k<m5L0un|#;)eM@dU)wpP?m0E~}jeA(<<SwzoUypWgWPB?B;@j19o4Nn$#ZIri=
Q2lprH`p##F@oT1`gmfBr6PxBvu1vAcY!hjBH5Zk2QL*G)K;P>xyiSS<BH>Aol+8cDwmb$HEJA#7gIfXgwFpwNzZ
qq!4l~hG{q7cLk5e2mMnY-kuvTl9;=hUo-4$``z?b-->nsGO(~9
"""
SIZES = {
    **{"key": 121, "key2": 121, "expired": 432, "unknown_ca": 429},
    **{"good": 460, "wrong_name": 458, "good2": 460, "ca": 384},
}

# What `openssl x509 -in CERTIFICATE -noout -pubkey | openssl pkey -pubin -outform der |
# openssl dgst -sha256 -binary | base64` says of them.
GOOD_PIN = "mF8wdp+yevnQ3G2qcaAd9lGoIK7AdTOlg3zVlNYfBn8="
GOOD2_PIN = "gg0bWKruO4CpkuOaTZrVjAgZf5HExQcX367Jwdnueuw="
CA_PIN = "k9TcbEld9MuT+GHIaNR0/Ye8THBBMsxsHCyivyoNIys="

_directory = tempfile.TemporaryDirectory(prefix="dotproxy-test-")
atexit.register(_directory.cleanup)


def _read_pem(name: str) -> str:
    start = sum(list(SIZES.values())[: list(SIZES).index(name)])
    octets = zlib.decompress(base64.b85decode(CERTIFICATES.replace("\n", "")))
    text = ssl.DER_cert_to_PEM_cert(octets[start : start + SIZES[name]])
    return text.replace("CERTIFICATE", "EC PRIVATE KEY") if "key" in name else text


def _write_pem(*names: str, marks: str = "") -> str:
    """Write these into one file and return its path; `marks` follow the first line."""
    text = "".join(map(_read_pem, names)).replace("-----\n", "-----\n" + marks, 1)
    handle, path = tempfile.mkstemp(".pem", dir=_directory.name)
    with open(handle, "w", encoding="ascii") as file:
        file.write(text)
    return path


class PKI:
    """Paths of the test certificates; the first ones, but `ca`, with their key."""

    ca = _write_pem("ca")
    good, good2 = _write_pem("good", "key"), _write_pem("good2", "key2")
    wrong_name, expired = _write_pem("wrong_name", "key"), _write_pem("expired", "key")
    unknown_ca = _write_pem("unknown_ca", "key")
    good_alone, key_alone, key2_alone = map(_write_pem, ("good", "key", "key2"))
    # It is not encrypted, but a passphrase is asked for.
    locked_key = _write_pem(
        "key", marks=f"Proc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,{'0' * 32}\n\n"
    )


# ---- Clock ---------------------------------------------------------------------------


class Clock:
    """A monotonic clock that stands still until told to advance."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


_order = itertools.count()  # priorities: Python 3.9 leaves ties unordered


class ManualTimer(dotproxy.Timer):
    """A timer without a thread, whose clock the test moves."""

    def __init__(self, clock: Clock) -> None:
        self._clock_moved = clock
        self._planned = sched.scheduler(clock)

    def start(self) -> None:
        pass

    def at(self, when: float, function: Callable[[], None]) -> None:
        self._planned.enterabs(when + self.TICK, next(_order), function)

    def advance(self, seconds: float) -> None:
        """Let time pass and call what falls due."""
        clock = self._clock_moved
        end = clock() + seconds
        while (delay := self._planned.run(blocking=False)) is not None:
            if clock() + delay > end + 1e-9:
                break
            clock.advance(delay)
        clock.advance(max(0.0, end - clock()))


def wait_until(claim: Callable[[], bool], timeout: float = 5.0) -> None:
    """Wait for something that tells nobody when it happens, or fail the test."""
    deadline = time.monotonic() + timeout
    while not claim():
        if time.monotonic() > deadline:
            raise AssertionError(f"not so within {timeout} s")
        time.sleep(0.001)


# ---- Clients -------------------------------------------------------------------------
# A wait that ends at its timeout raises socket.timeout (TimeoutError since 3.10).

Address = tuple[str, int]
C = TypeVar("C", bound="Client")


def frame(*messages: bytes) -> bytes:
    """Put the two-byte length before each message (RFC 1035 section 4.2.2)."""
    return b"".join(struct.pack("!H", len(each)) + each for each in messages)


class Client:
    """A DNS client, that a `with` block closes."""

    def __init__(self, opened: socket.socket) -> None:
        self.socket = opened

    def __enter__(self: C) -> C:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, *messages: bytes) -> None:
        for message in messages:
            self.socket.send(message)

    def receive(self) -> bytes:
        return self.socket.recv(65535)


class UDPClient(Client):
    """A client over UDP that hears the server's own address only."""

    def __init__(self, server: Address, timeout: float = 5.0) -> None:
        family = socket.AF_INET6 if ":" in server[0] else socket.AF_INET
        super().__init__(socket.socket(family, socket.SOCK_DGRAM))
        self.socket.settimeout(timeout)
        self.socket.connect(server)


class TCPClient(Client):
    """A client over TCP; one deadline for all."""

    def __init__(
        self, server: Address, timeout: float = 5.0, *, source: str = ""
    ) -> None:
        self._deadline = time.monotonic() + timeout
        here = (source, 0) if source else None
        super().__init__(socket.create_connection(server[:2], timeout, here))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, *messages: bytes) -> None:
        """Send messages, each with its length, in one write."""
        self.send_raw(frame(*messages))

    def send_raw(self, data: bytes) -> None:
        self._limit()
        self.socket.sendall(data)

    def receive(self) -> bytes:
        """Return the next message, or raise EOFError if the server closed."""
        return self._read(int.from_bytes(self._read(2), "big"))

    def half_close(self) -> None:
        self.socket.shutdown(socket.SHUT_WR)

    def _read(self, size: int) -> bytes:
        data = chunk = b""
        while len(data) < size:
            self._limit()
            with contextlib.suppress(ssl.SSLZeroReturnError):  # after close_notify
                chunk = self.socket.recv(size - len(data))
            if not chunk:
                raise EOFError(f"closed after {len(data)} of {size} bytes")
            data, chunk = data + chunk, b""
        return data

    def _limit(self) -> None:
        self.socket.settimeout(max(0.001, self._deadline - time.monotonic()))


def trusting(alpn: Iterable[str] = ("dot",)) -> ssl.SSLContext:
    """Make the settings of a DoT client that trusts the test CA."""
    context = ssl.create_default_context(cafile=PKI.ca)
    context.set_alpn_protocols(list(alpn))
    return context


class TLSClient(TCPClient):
    """A client over TLS that verifies the server's name."""

    def __init__(
        self,
        server: Address,
        *given: float,
        context: ssl.SSLContext | None = None,
        session: ssl.SSLSession | None = None,
        **named: Any,
    ) -> None:
        super().__init__(server, *given, **named)
        self._context = context or trusting()
        self.socket = self.tls = self._context.wrap_socket(
            self.socket,
            server_hostname="dot.test",
            session=session,
            suppress_ragged_eofs=False,
        )

    def again(self) -> TLSClient:
        """Connect once more, and offer to resume the session."""
        server = self.socket.getpeername()
        return TLSClient(server, context=self._context, session=self.tls.session)

    def half_close(self) -> None:
        """Send close_notify; what the server still has to say can be read."""
        self.socket.settimeout(0)
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.unwrap()


# ---- Fake upstream -------------------------------------------------------------------
# FakeUpstream          a DoT server whose answers a script gives; it has one thread
#   FakeConnection      one client of it
# Script                called as script(message, connection) for each query; returns an
#                       address or a message to answer with, None (no answer, or it has
#                       done that by itself), or another script, to be called in turn
# Wherever a script is expected, what it returns may stand instead: FakeUpstream("::1").

T = TypeVar("T")
Reply = Union[str, bytes, "Script", None]
Script = Callable[[Message, "FakeConnection"], Reply]


@dataclasses.dataclass(eq=False)
class FakeConnection:
    """One client of a fake upstream, for its thread alone: scripts run in that."""

    upstream: FakeUpstream
    socket: Any  # a socket.socket, or the ssl.SSLSocket around it
    mode: str
    server_name: str | None = None
    version: str | None = None  # once the handshake is done
    closed: bool = False
    busy_until: float = 0.0  # where one answer waits for another
    queries: list[Message] = dataclasses.field(default_factory=list)
    stream: bytes = b""

    def perform(self, reply: Reply, message: Message) -> None:
        """Do what a script or its result says."""
        if isinstance(reply, str):
            reply = response(message.raw, reply)
        if isinstance(reply, bytes):
            self.send(reply)
        elif reply is not None and not self.closed:
            self.perform(reply(message, self), message)

    def perform_at(self, when: float, reply: Reply, message: Message) -> None:
        """Do it at this monotonic time; any thread may ask."""
        self.upstream.call(self.perform, reply, message, when=when)

    def send(self, *messages: bytes) -> None:
        """Send messages, each with its length, in one TLS record."""
        self.send_raw(frame(*messages))

    def send_raw(self, data: bytes) -> None:
        """Send bytes as they are in one TLS record."""
        if not self.closed:
            self.socket.settimeout(5)
            self.socket.sendall(data)
            self.socket.settimeout(0)

    def close(self) -> None:
        """Close with a TLS close_notify and FIN, as a good server does."""
        if isinstance(self.socket, ssl.SSLSocket):
            with contextlib.suppress(OSError, ValueError):
                self.socket.unwrap()  # does not wait for the client's close_notify
        self.cut()

    def cut(self) -> None:
        """Close with FIN alone."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
            while self.socket.recv(65536):
                pass  # data left unread would turn the close into a reset
        self.end()

    def reset(self) -> None:
        """Close with RST."""
        with contextlib.suppress(OSError):
            linger = struct.pack("ii", 1, 0)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.end()

    def end(self) -> None:
        """Close the socket as it is."""
        if not self.closed:
            self.closed = True
            with contextlib.suppress(KeyError):  # it was not yet listened to
                self.upstream.selector.unregister(self.socket)
            self.socket.close()

    def begin(self) -> None:
        """Do what is done before the client has said anything."""
        self.socket.settimeout(0)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.mode in ("tls", "leave"):
            self.socket.getpeername()  # raises if gone; wrap_socket would leak it
            self.socket = self.upstream.context.wrap_socket(
                self.socket, server_side=True, do_handshake_on_connect=False
            )
        elif self.mode == "close":
            self.cut()
        elif self.mode == "garbage":
            self.socket.send(b"220 mail.example.com ESMTP\r\n")
        elif self.mode == "trickle":
            self._trickle(b"\x16\3\3\x40\0\2\0\x3f\xfc")
        if not self.closed:
            self.upstream.selector.register(self.socket, selectors.EVENT_READ, self)

    def serve(self) -> None:
        """Do what the octets ask for that have arrived."""
        with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError):
            if isinstance(self.socket, ssl.SSLSocket) and self.version is None:
                self.socket.do_handshake()
                self.version = self.socket.version()
                self.upstream.resumed += bool(self.socket.session_reused)
                self.upstream.handshakes += 1
                if self.mode == "leave":
                    self.close()
            while not self.closed and (data := self.socket.recv(65536)):
                self._hear(data)
            if not self.closed:
                self.close()

    def _trickle(self, octets: bytes = b"x") -> None:
        with contextlib.suppress(OSError):
            self.socket.send(octets)
            self.upstream.call(self._trickle, when=time.monotonic() + 0.05)

    def _hear(self, data: bytes) -> None:
        if self.mode not in ("tls", "plain"):
            return  # the ClientHello falls on deaf ears
        self.stream += data
        while len(stream := self.stream) >= 2:
            end = 2 + int.from_bytes(stream[:2], "big")
            if self.closed or len(stream) < end:
                return
            self.stream = stream[end:]
            message = parse(stream[2:end])
            self.queries.append(message)
            self.upstream.queries.append(message)
            self.perform(self.upstream.script, message)
            if self.upstream.life is not None:
                self.perform(delayed(self.upstream.life, close), message)


@dataclasses.dataclass(eq=False)
class FakeUpstream:
    """A DoT server in this process that does as its script says.

    Its attributes may be changed at any time: `script` counts from the next query,
    `on_accept` from the next connection, the certificate from the next start. A failure
    in a script, or a malformed query, is raised at the end of the `with` block.
    """

    script: Reply = "192.0.2.1"
    certificate: str = PKI.good
    host: str = "127.0.0.1"
    port: int = 0
    # Or "plain", "hang", "close", "garbage", "trickle": a handshake octet by octet,
    # "leave": close when it is done. Several words: each for the next connection.
    on_accept: str = "tls"
    maximum_version: ssl.TLSVersion | None = None
    life: float | None = None  # s from a query to the end of its connection
    no_resumption: str = ""  # who offers a session gets an "alert", or the "end"
    handshake_delay: float = 0.0
    handshakes: int = 0  # that were done
    resumed: int = 0  # of these
    peak: int = 0  # connections open at once
    queries: list[Message] = dataclasses.field(default_factory=list)
    accepted: list[FakeConnection] = dataclasses.field(default_factory=list)
    failures: list[Exception] = dataclasses.field(default_factory=list)
    _thread: threading.Thread | None = None

    def __enter__(self) -> FakeUpstream:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stop()
        if kind is None and self.failures:
            raise self.failures[0]

    def endpoint(self, name: str = "dot.test") -> Endpoint:
        return Endpoint(self.host, self.port, "" if self.on_accept == "plain" else name)

    @property
    def live(self) -> list[FakeConnection]:
        return [each for each in self.accepted if not each.closed]

    def start(self) -> None:
        """Listen: on any free port at first, on the same one ever after."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        self._listener = socket.create_server((self.host, self.port), family=family)
        self._listener.settimeout(0)
        self.port = self._listener.getsockname()[1]
        self.context = self._build_context()
        self._calls = sched.scheduler(time.monotonic)
        self._waker, self._waiter = socket.socketpair()
        self._waker.setblocking(False)  # one octet that waits is enough
        self.selector = selectors.DefaultSelector()
        self.selector.register(self._waiter, selectors.EVENT_READ)
        self.selector.register(self._listener, selectors.EVENT_READ)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self, *, reset: bool = False) -> None:
        """Refuse connections and close those there are; may be started again."""
        if self._thread:
            self.call(self._stop, reset)
            self._thread.join()
            self._thread = None

    def drop_connections(self) -> None:
        """Close all connections, with close_notify and FIN."""
        dropped = threading.Event()
        self.call(self._drop)
        self.call(dropped.set)
        dropped.wait(10)

    def call(
        self, action: Callable[..., None], *arguments: Any, when: float = 0.0
    ) -> None:
        """Have its thread make a call at this monotonic time; any thread may ask."""
        when = max(when, time.monotonic())
        self._calls.enterabs(when, next(_order), self._attempt, (action, *arguments))
        with contextlib.suppress(OSError):
            self._waker.send(b"!")

    def wait_for(self, predicate: Callable[[FakeUpstream], bool]) -> None:
        """Wait until the predicate of the upstream holds, or fail the test."""
        wait_until(lambda: predicate(self))

    def _run(self) -> None:
        with self.selector, self._listener, self._waker, self._waiter:
            while True:
                patience = self._calls.run(blocking=False)
                if self._stopping:
                    return
                for key, _ in self.selector.select(patience):
                    if key.fileobj is self._waiter:
                        self._waiter.recv(4096)
                    elif key.fileobj is self._listener:
                        self._accept()
                    elif not key.data.closed:
                        self._attempt(key.data.serve)

    def _attempt(self, action: Callable[..., None], *arguments: Any) -> None:
        try:
            if not self._stopping:
                action(*arguments)
        except Exception as error:
            if not isinstance(error, OSError):  # the client has gone, or dislikes us
                self.failures.append(error)
            connection = getattr(action, "__self__", None)
            if isinstance(connection, FakeConnection):
                connection.end()

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            client, _ = self._listener.accept()
            modes = self.on_accept.split()
            mode = modes[min(len(self.accepted), len(modes) - 1)]
            connection = FakeConnection(self, client, mode)
            self.accepted.append(connection)
            self.peak = max(self.peak, len(self.live))
            self.call(connection.begin, when=time.monotonic() + self.handshake_delay)

    def _drop(self, reset: bool = False) -> None:
        for connection in self.live:
            connection.reset() if reset else connection.close()

    def _stop(self, reset: bool) -> None:
        self._listener.close()
        self._drop(reset)
        self._stopping = True

    def _build_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate)
        context.set_alpn_protocols(["dot"])
        context.sni_callback = self._note_server_name
        if self.maximum_version:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                context.minimum_version = ssl.TLSVersion.TLSv1
                context.maximum_version = self.maximum_version
            context.set_ciphers("ALL:@SECLEVEL=0")
        return context

    def _note_server_name(
        self, tls: ssl.SSLObject, name: str | None, context: ssl.SSLContext
    ) -> int | None:
        connection = next(each for each in self.live if each.socket is tls)
        connection.server_name = name
        if not self.no_resumption or not tls.session_reused:
            return None
        if self.no_resumption == "end":
            socket.socket.shutdown(connection.socket, socket.SHUT_RDWR)
        return ssl.ALERT_DESCRIPTION_HANDSHAKE_FAILURE


# ---- Scripts -------------------------------------------------------------------------

answer: Reply = "192.0.2.1"
silence: Reply = None


def right(message: Message) -> bytes:
    """Return the right answer."""
    return response(message.raw, "192.0.2.1")


def sending(build: Callable[[Message], bytes], *, last: bool = False) -> Script:
    """Send octets that are built of the query, and close if they are the last."""

    def script(message: Message, connection: FakeConnection) -> None:
        connection.send_raw(build(message))
        if last:
            connection.close()

    return script


def close(message: Message, connection: FakeConnection) -> None:
    """Close instead of answering, with close_notify."""
    connection.close()


def reset(message: Message, connection: FakeConnection) -> None:
    """Reset the connection instead of answering."""
    connection.reset()


def failing(rcode: int, *, whole: bool = True, options: bytes = b"") -> Script:
    """Fail with this RCODE; if not `whole`, without the question (QDCOUNT 0)."""

    def script(message: Message, connection: FakeConnection) -> Reply:
        failure = response(message.raw, rcode=rcode, options=options)
        rest = failure[12 + len(message.question) :]
        return failure if whole else failure[:4] + bytes(6) + failure[10:12] + rest

    return script


def in_turn(*replies: Reply) -> Script:
    """Give the first reply to the first query and so on; the last one stays."""
    return lambda message, connection: replies[
        min(len(connection.upstream.queries), len(replies)) - 1
    ]


def by_name(replies: Mapping[str, Reply], default: Reply = answer) -> Script:
    """Choose the reply by the name of the question, its case or first label."""

    def script(message: Message, connection: FakeConnection) -> Reply:
        name = message.qname.lower()
        return replies.get(name, replies.get(name.split(".")[0], default))

    return script


def delayed(seconds: float, reply: Reply = answer) -> Script:
    """Reply so many seconds later; others may be answered meanwhile."""
    return lambda message, connection: connection.perform_at(
        time.monotonic() + seconds, reply, message
    )


class Hold:
    """Hold queries until told to release: a script for late and reordered answers."""

    def __init__(self, reply: Reply = answer) -> None:
        self._reply = reply
        self._held: list[tuple[Message, FakeConnection]] = []

    def __call__(self, message: Message, connection: FakeConnection) -> None:
        self._held.append((message, connection))

    def release(
        self, count: int = 1, *, reverse: bool = False, timeout: float = 5.0
    ) -> None:
        """Wait until at least `count` are held, then reply to all that are."""
        wait_until(lambda: len(self._held) >= count, timeout)
        held, self._held = self._held, []
        for message, connection in reversed(held) if reverse else held:
            connection.perform_at(0.0, self._reply, message)


# ---- Harness -------------------------------------------------------------------------
# A whole proxy before a fake upstream, as `Daemon` builds it from options.

LOCALHOST, LOCALHOST_V6 = "127.0.0.1", "::1"
EDE, SUBNET, COOKIE, KEEPALIVE, PADDING, UNKNOWN_OPTION = 15, 8, 10, 11, 12, 65001
TRUST = dotproxy.Trust(dotproxy.Config(ca_file=PKI.ca))
# The options of a proxy that serves encrypted clients as well.
ENCRYPTED = "--tls-listen=127.0.0.1:0", f"--tls-cert={PKI.good}"


class ErrorLog(logging.Handler):
    """Keeps what dotproxy logs as an error of its own, with the traceback."""

    lines: ClassVar[list[str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


ERROR_LOG = ErrorLog(logging.ERROR)
dotproxy.logger.addHandler(ERROR_LOG)
dotproxy.logger.propagate = False


class DotproxyTestCase(unittest.TestCase):
    """Fails where a test leaves a thread, or has dotproxy log an error of its own."""

    def setUp(self) -> None:
        ERROR_LOG.lines.clear()
        self.addCleanup(self._check, set(threading.enumerate()))

    def have(self, manager: contextlib.AbstractContextManager[T]) -> T:
        """Have a context until the test has ended."""
        entered = manager.__enter__()
        self.addCleanup(manager.__exit__, None, None, None)
        return entered

    def _check(self, before: set[threading.Thread]) -> None:
        self.assertEqual(set(threading.enumerate()) - before, set(), "threads left")
        self.assertEqual(ERROR_LOG.lines, [], "errors logged")


@contextlib.contextmanager
def patient_with_upstreams() -> Iterator[None]:
    """Have no query sent twice because its answer takes long."""
    never = property(lambda upstream: 60.0, lambda upstream, seconds: None)
    with (
        mock.patch.object(dotproxy.Upstream, "overdue_after", never, create=True),
        mock.patch.object(dotproxy.UpstreamGroup, "CERTAIN", 60.0),
    ):
        yield


class Served(NamedTuple):
    """A running proxy and the upstream behind it."""

    upstream: FakeUpstream
    daemon: dotproxy.Daemon

    @property
    def address(self) -> Address:
        host, port = self.tcp.server_address[:2]
        return str(host), int(port)

    @property
    def tls_address(self) -> Address:
        host, port = self.tls.server_address[:2]
        return str(host), int(port)

    @property
    def tcp(self) -> dotproxy.TCPServer:
        return self._stream(encrypted=False)

    @property
    def tls(self) -> dotproxy.TCPServer:
        return self._stream(encrypted=True)

    def wait_for_in_flight(self, count: int) -> None:
        """Wait until so many queries of clients have no answer yet."""
        wait_until(lambda: self.tcp.proxy.in_flight == count)

    def _stream(self, encrypted: bool) -> dotproxy.TCPServer:
        streams = [s for s in self.daemon.servers if isinstance(s, dotproxy.TCPServer)]
        return next(server for server in streams if server.encrypted == encrypted)


@contextlib.contextmanager
def serving(
    script: Reply = answer,
    *options: str,
    host: str = LOCALHOST,
    inherited: Sequence[tuple[str, socket.socket]] = (),
) -> Iterator[Served]:
    """Run a proxy that never sends a query twice, and stops without delay."""
    loop = socketserver.BaseServer.serve_forever
    with (
        patient_with_upstreams(),
        mock.patch.object(loop, "__defaults__", (0.01,)),
        FakeUpstream(script) as upstream,
    ):
        daemon = dotproxy.Daemon(configure(upstream, *options, host=host), inherited)
        with contextlib.closing(daemon):
            daemon.start()
            yield Served(upstream, daemon)


def configure(
    upstream: FakeUpstream, *options: str, host: str = LOCALHOST
) -> dotproxy.Config:
    """Make the configuration of a proxy before this upstream."""
    listen = f"--listen={host}" if "]" in host else f"--listen=[{host}]:0"
    where = f"--upstream={LOCALHOST}:{upstream.port}#dot.test"
    given = [listen, where, f"--ca-file={PKI.ca}", *options]
    return dotproxy.parse_args(given, {})


# ---- Messages ------------------------------------------------------------------------
# Tables of messages and of what they have to come to, judged by the tests' own parser.
# What clients get of any response is in `PropertyTest` too.

QUESTION = query()[12:]
LONGEST_NAME = (b"\x3f" + b"a" * 63) * 3 + b"\x3d" + b"a" * 61 + b"\0"
TOO_LONG_NAME = (b"\x3f" + b"a" * 63) * 3 + b"\x3e" + b"a" * 62 + b"\0"
A_RECORD = record(b"\xc0\x0c", "A", b"\xc0\0\2\1")
OPT_RECORD = record(".", OPT, b"", 0, 1232)
ALIAS = record(b"\xc0\x0c", "CNAME", encode_name("a.example"), 101)
UNCACHED = 65432


def counted(*counts: int, body: bytes = b"", flags: int = RD) -> bytes:
    """Build a message of these section counts."""
    return HEADER.pack(0x1234, flags, *counts) + body


def carrying(*records: bytes, counts: Sequence[int] = (0, 0), flags: int = RD) -> bytes:
    """Build a query for the usual question that has these additional records."""
    extra = len(records) - sum(counts)
    body = QUESTION + b"".join(records)
    return counted(1, *counts, extra, body=body, flags=flags)


MALFORMED_QUERIES = {
    "QDCOUNT 0": counted(0, 0, 0, 0),
    "QDCOUNT 0 with a question": counted(0, 0, 0, 0, body=QUESTION),
    "QDCOUNT 2": counted(2, 0, 0, 0, body=QUESTION * 2),
    "compression behind a label": query(b"\3www\xc0\x0c"),
    "label of 64 octets": query(b"\x40" + b"a" * 64 + b"\0"),
    "label of type 10": query(b"\x80a\0"),
    "name of 256 octets": query(TOO_LONG_NAME),
    "two OPT": carrying(OPT_RECORD, OPT_RECORD),
    "OPT with a name": carrying(record("a", OPT, b"")),
    "OPT with a pointer": carrying(record(b"\xc0\x0c", OPT, b"")),
    "RDLENGTH past the end": query(do=True)[:-1] + b"\1",
    "option header past the end": query(do=True, options=b"\0\x0a\0"),
    "option past the end": query(do=True, options=option(COOKIE, b"12345678")[:-1]),
    "record in the answer section": carrying(A_RECORD, counts=(1, 0)),
    "record in the authority section": carrying(A_RECORD, counts=(0, 1)),
}


def parsed_response(message: bytes, asked: bytes | None = None) -> dotproxy.Response:
    """Parse a response to a query, or to the default one."""
    question = parse(asked or query()).question
    return dotproxy.parse_response(message, 12 + len(question))


def answer_to(asked: bytes, message: bytes, over: dotproxy.Transport = UDP) -> Message:
    """Return what the client that asked gets of an upstream's response."""
    received = dotproxy.parse_query(asked, over)
    return parse(dotproxy.build_answer(received, parsed_response(message, asked)))


def upstream_query(asked: bytes, edns: int = dotproxy.PADDED) -> Message:
    """Return what is sent upstream for a client's query."""
    received = dotproxy.parse_query(asked)
    return parse(b"\0\0" + dotproxy.build_upstream_query(received, edns))


def damaged(seeds: Sequence[bytes], count: int) -> Iterator[bytes]:
    """Yield messages with one to three faults, the same ones in each run."""
    dice = random.Random(1035)
    for _ in range(count):
        message = bytearray(dice.choice(seeds))
        for _ in range(dice.randint(1, 3)):
            place = dice.randrange(len(message) + 1)
            fault = dice.randrange(5)
            if fault == 0 and message:
                message[place - 1] = dice.choice((0, 1, 12, 41, 63, 64, 192, 255))
            elif fault == 1 and message:
                message[place - 1] ^= 1 << dice.randrange(8)
            elif fault == 2:
                del message[place : place + dice.randint(1, 4)]
            elif fault == 3:
                message[place:place] = bytes([dice.randrange(256)])
            else:
                message += message[place : place + dice.randint(1, 40)]
        yield bytes(message)


class QueryTest(DotproxyTestCase):
    def test_malformed_query_gets_a_bare_header(self) -> None:
        whole = query(do=True, options=option(UNKNOWN_OPTION, b"abc"))
        cut = {f"{size} octets": whole[:size] for size in range(12, len(whole))}
        cut.update({f"opcode {n}": query(opcode=n) for n in range(1, 16)})
        for name, message in {**MALFORMED_QUERIES, **cut}.items():
            with self.subTest(name), self.assertRaises(FormatError):
                dotproxy.parse_query(message)
        for flags, expected in (
            (RD, QR | RA | RD | Rcode.FORMERR),
            (5 << 11 | RD, QR | RA | 5 << 11 | RD | Rcode.NOTIMP),
            (0x06F0, QR | RA | Rcode.FORMERR),
        ):
            message = HEADER.pack(0x4321, flags, 9, 9, 9, 9) + b"garbage"
            got = dotproxy.build_format_error(message)
            self.assertEqual(got, HEADER.pack(0x4321, expected, 0, 0, 0, 0))

    def test_what_is_refused_and_what_the_cache_may_answer_and_keep(self) -> None:
        ixfr = counted(1, 0, 1, 0, body=query(rrtype=251)[12:] + soa())
        for name, message, refusal, answers, keeps in (
            ("usual", query(), 0, True, True),
            ("RD=0", query(rd=False), 0, True, False),
            ("past the cache", query(do=True, options=option(UNCACHED)), 0, 0, 0),
            ("ANY", query(rrtype="ANY"), 0, False, False),
            ("type with ANY's low octet", query(rrtype=0x01FF), 0, True, True),
            ("type with AXFR's low octet", query(rrtype=256 + 252), 0, True, True),
            ("AXFR", query(rrtype="AXFR"), Rcode.REFUSED, False, False),
            ("IXFR with the SOA it has", ixfr, Rcode.REFUSED, False, False),
            ("EDNS 1", query(do=True, edns_version=1), Rcode.BADVERS, 0, 0),
        ):
            with self.subTest(name):
                asked = dotproxy.parse_query(message)
                form, answered = asked.form, bool(asked.cache_key)
                found = form.refusal, form.cacheable, answered, form.storable
                self.assertEqual(found, (refusal, answers, answers, keeps))

    def test_what_is_unknown_or_of_no_use_passes(self) -> None:
        for name, message in {
            "type": query(rrtype=65280),
            "class 65535": query(rrclass=65535),
            "EDNS flags": carrying(record(".", OPT, b"", 0x7FFF)),
            "header flags": carrying(flags=0x07FF),
            "record that is no OPT": carrying(record(".", 250, b"signature")),
            "record with a pointer": carrying(record(b"\1a\xc0\x0c", 250, b"")),
            "longest name": query(LONGEST_NAME),
            "any octet in a name": query(b"\5\0\xff.A\x80\0"),
            "octets after the question": query() + bytes(20),
            "octets after OPT": query(do=True) + bytes(20),
            "many octets after OPT": query(do=True) + bytes(2000),
        }.items():
            with self.subTest(name):
                asked = dotproxy.parse_query(message)
                self.assertEqual(asked.form.refusal, 0)
                self.assertEqual(asked.question, message[12:][: len(asked.question)])
                sent = parse(b"\0\0" + dotproxy.build_upstream_query(asked))
                self.assertEqual((sent.question, sent.additional), (asked.question, []))

    def test_queries_that_one_answer_serves_have_the_same_key(self) -> None:
        usual = dotproxy.parse_query(query("www.example.com"))
        options = [
            query(do=False, options=option(code, bytes(size)))
            for code in (5, 8, 10, 11, 12, 65001, 65073, 65074, 26946)
            for size in (8, 4000)
        ]
        for message in (
            *(query(id=0x4321), query("WWW.eXample.COM"), query(ad=True), *options),
            carrying(flags=RD | 0x0640),  # flags of no meaning
            carrying(record(".", OPT, b"", 0x7FFF, 4096)),
        ):
            with self.subTest(message):
                asked = dotproxy.parse_query(message)
                self.assertEqual((asked.key, asked.cache_key), (usual.key,) * 2)

    def test_queries_that_need_their_own_answer_differ_in_key(self) -> None:
        messages = (
            *(query(), query("ww2.example.com"), query(b"\3www\x0bexample\3com\0")),
            *(query(b"\1\xc0\0"), query(b"\1\xe0\0")),  # no letters of ASCII
            *(query(rrtype="AAAA"), query(rrtype=0x4141), query(rrtype=0x6161)),
            *(query(rrclass=3), query(rd=False), query(do=True), query(cd=True)),
            *(query(cd=True, do=True), query(do=False, options=option(UNCACHED))),
        )
        keys = {dotproxy.parse_query(message).key for message in messages}
        self.assertEqual(len(keys), len(messages))

    def test_query_upstream_is_ours_but_for_its_question_rd_cd_and_do(self) -> None:
        known = [option(code, b"12345678") for code in (5, SUBNET, COOKIE, EDE, 65001)]
        known += option(KEEPALIVE), option(PADDING, b"not zero")
        mute = AA | TC | RA | 0x004F  # flags that mean nothing in a query
        odd = record(".", OPT, b"", 0x7FFF)
        for asked, (edns, codes) in itertools.product(
            (
                *(query("a" * size, do=bool(size % 2)) for size in range(1, 64)),
                query("WwW.eXample.com", "TXT", rrclass=3, rd=False, cd=True),
                query(do=True, size=0, options=b"".join(known)),
                *(carrying(odd, flags=mute | flags) for flags in (RD, CD)),
            ),
            (
                (dotproxy.PADDED, [KEEPALIVE, PADDING]),
                (dotproxy.UNPADDED, [KEEPALIVE]),
                (dotproxy.NO_OPTIONS, []),
                (dotproxy.NO_EDNS, []),
            ),
        ):
            with self.subTest(asked=asked.hex(), edns=edns):
                given, sent = parse(asked), upstream_query(asked, edns)
                self.assertEqual(sent.question, given.question)
                self.assertEqual(sent.flags, given.flags & (RD | CD) | AD)
                self.assertEqual(len(sent.raw) % 128 * (PADDING in codes), 0)
                self.assertEqual(sent.opt is None, edns == dotproxy.NO_EDNS)
                if sent.opt:
                    do = given.opt.flags & DO if given.opt else 0
                    self.assertEqual(sent.opt[:3], (1232, 0, do))
                    self.assertEqual([code for code, _ in sent.opt.options], codes)
                    self.assertFalse(any(b"".join(x for _, x in sent.opt.options)))


class ResponseTest(DotproxyTestCase):
    def test_malformed_response_is_a_format_error(self) -> None:
        no_end = A_RECORD[:-6] + b"\xff\xff" + bytes(4)
        long_label = record(b"\x40" + b"a" * 64 + b"\0", "A", bytes(4))
        for name, counts, body in (
            ("fewer records than counted", (2, 0, 0), A_RECORD),
            ("RDLENGTH past the end", (1, 0, 0), no_end),
            ("label of 64 octets", (1, 0, 0), long_label),
            ("two OPT", (0, 0, 2), OPT_RECORD * 2),
            ("OPT in the answer section", (1, 0, 0), OPT_RECORD),
            ("OPT in the authority section", (0, 1, 0), OPT_RECORD),
            ("OPT with a name", (0, 0, 1), record("a", OPT, b"")),
            ("OPT with a pointer", (0, 0, 1), record(b"\xc0\x0c", OPT, b"")),
            ("option past the end", (0, 0, 1), record(".", OPT, b"\0\x0a\0\5abcd")),
        ):
            message = counted(1, *counts, body=QUESTION + body, flags=QR | RD | RA)
            with self.subTest(name), self.assertRaises(FormatError):
                parsed_response(message)
        asked = query(do=True)
        for edns in (True, False):
            whole = response(asked, "192.0.2.1", authority=[soa()], edns=edns)
            for size in range(len(asked) - len(OPT_RECORD), len(whole)):
                with self.subTest(size=size), self.assertRaises(FormatError):
                    parsed_response(whole[:size], asked)

    def test_random_damage_is_a_format_error_or_harmless(self) -> None:
        asked, accepted = query(do=True, options=option(COOKIE, b"12345678")), [0, 0]
        usual = dotproxy.parse_query(asked)
        queries = [query(), asked, query(do=False, options=option(PADDING) * 2)]
        responses = [
            response(asked, ALIAS, authority=[soa()], options=option(EDE, b"\0\0")),
            response(asked, authority=[soa()], rcode=3),
            response(asked, address("a.example", "2001:db8::1"), additional=[A_RECORD]),
        ]
        seeds = [*queries * 20, *MALFORMED_QUERIES.values(), *responses * 26]
        for message in damaged(seeds, 12_000):
            kind = len(message) > 2 and message[2] >> 7
            with contextlib.suppress(FormatError):
                if kind and len(message) >= 12 + len(usual.question):
                    found = parsed_response(message, asked)
                    dotproxy.build_answer(usual, found)
                    last = max(found.ttl_offsets, default=0)
                    self.assertLessEqual(last, len(found.body))
                    accepted[1] += 1
                elif not kind and len(message) >= 12:
                    other = dotproxy.parse_query(message)
                    parse(b"\0\0" + dotproxy.build_upstream_query(other))
                    error = dotproxy.error_response(Rcode.SERVFAIL)
                    got = parse(dotproxy.build_answer(other, error))
                    self.assertEqual(got.question, message[12:][: len(got.question)])
                    accepted[0] += 1
        self.assertGreater(min(accepted), 500)

    def test_what_is_kept_of_a_response(self) -> None:
        glue = address(b"\xc0\x0c", "2001:db8::1", 104)
        body = ALIAS + address("a.example", "192.0.2.1", 102) + soa(ttl=103) + glue
        for last, more in itertools.product(
            (b"", OPT_RECORD, OPT_RECORD + glue), (b"", b"\0", A_RECORD, bytes(2000))
        ):
            extra = 1 + bool(last) + (len(last) > 11)
            message = counted(1, 2, 1, extra, body=QUESTION + body + last, flags=QR)
            with self.subTest(extra=extra, more=len(more)):
                found = parsed_response(message + more)
                self.assertEqual((found.body, found.counts), (body, (2, 1, 1)))
                self.assertEqual(found.message, message)
                self.assertEqual(found.ttls, [101, 102, 103, 104])
                ttls = [body[place + 3] for place in found.ttl_offsets]
                self.assertEqual(ttls, found.ttls)

    def test_opt_is_taken_out_and_extended_errors_alone_pass(self) -> None:
        passing = option(EDE, b"\0\3") + option(EDE, b"\0\x16x")
        ending = option(SUBNET, bytes(4)) + option(KEEPALIVE, b"\0\x64")
        for size in (0, 1600):
            options = ending + passing + option(PADDING, bytes(size))
            message = response(query(do=True), A_RECORD, rcode=22, options=options)
            with self.subTest(size=size):
                found = parsed_response(message)
                self.assertEqual((found.body, found.rcode), (A_RECORD, 22))
                self.assertEqual(found.options, passing)
                self.assertEqual(found.upstream_options, options)

    def test_failure_without_the_question_is_one_and_may_say_why(self) -> None:
        why = option(EDE, b"\0\x16no")
        for rcode, options, more in itertools.product(
            (1, 2, 4, 5), (None, b"", why), (b"", b"\0")
        ):
            opt = b"" if options is None else record(".", OPT, options)
            flags = QR | RD | rcode
            message = counted(0, 0, 0, bool(opt), body=opt + more, flags=flags)
            with self.subTest(rcode=rcode, options=options):
                found = dotproxy.parse_misfit(message, QUESTION)
                self.assertEqual((found.rcode, found.body), (rcode, b""))
                self.assertEqual(found.options, options or b"")
                cache, asked = make_cache(), dotproxy.parse_query(query())
                cache.put_all([(asked.key, found)], 0.0)
                entry = cache.get(asked.key, 0.0)
                assert entry is not None
                self.assertEqual(parse(entry.message).rcode, rcode)

    def test_anything_else_is_no_response(self) -> None:
        half = OPT_RECORD[:9]
        for name, message in {
            "other name": response(query("ww2.example.com"), rcode=2),
            "other type": response(query(rrtype="AAAA"), rcode=2),
            "type in another case": response(query(rrtype=0x61), rcode=2),
            "query": query("WWW.example.com"),
            "query without a question": counted(0, 0, 0, 0, flags=RD | 2),
            "no failure": counted(0, 0, 0, 0, flags=QR | RD),
            "NXDOMAIN": counted(0, 0, 0, 0, flags=QR | RD | 3),
            "records": counted(0, 1, 0, 0, body=A_RECORD, flags=QR | RD | 2),
            "two questions": counted(2, 0, 0, 0, body=QUESTION * 2, flags=QR | 2),
            "half an OPT record": counted(0, 0, 0, 1, body=half, flags=QR | 2),
        }.items():
            asked = query(rrtype=0x41)[12:] if name.startswith("type") else QUESTION
            with self.subTest(name), self.assertRaises(FormatError):
                dotproxy.parse_misfit(message, asked)


class AnswerTest(DotproxyTestCase):
    NS = record("example.com", "NS", encode_name("n" * 60), 300)

    def text(self, size: int) -> bytes:
        return record(b"\xc0\x0c", "TXT", bytes(size))

    def test_limit_is_what_the_client_takes_within_bounds(self) -> None:
        for size, transport, limit in (
            *((None, UDP, 512), (0, UDP, 512), (511, UDP, 512), (1000, UDP, 1000)),
            *((1232, UDP, 1232), (65535, UDP, 1232)),
            *((None, TCP, 65535), (512, TCP, 65535), (512, DOT, 65535)),
        ):
            asked = query() if size is None else query(do=True, size=size)
            empty = len(answer_to(asked, response(asked, self.text(0))).raw)
            for more, truncated in ((0, 0), (1, TC)):
                message = response(asked, self.text(limit - empty + more))
                with self.subTest(size=size, limit=limit, more=more):
                    got = answer_to(asked, message, transport)
                    self.assertEqual(got.flags & TC, truncated)
                    self.assertEqual(len(got.raw), limit * (1 - more) or empty - 12)

    def test_what_is_left_of_an_answer_that_does_not_fit(self) -> None:
        denial, glue = [soa(), *[self.NS] * 8], [address("ns.a.example", "::1")] * 9
        alias = record(b"\xc0\x0c", "CNAME", b"\1a\xc0\x0c")
        two, one = [self.NS] * 2, glue[:1]
        cases: list[tuple[str, bool | None, list[Any], Any, Any, Any]] = [
            ("fits", None, [self.text(100)], two, one, (1, 2, 1, False)),
            ("no additional", None, [self.text(280)], two, one, (1, 2, 0, False)),
            ("no authority", None, [self.text(380)], two, one, (1, 0, 0, False)),
            ("answer", None, [A_RECORD] * 40, [self.NS], [], (29, 0, 0, True)),
            ("large", None, [self.text(600), A_RECORD], [], [], (0, 0, 0, True)),
            ("denial", None, [], denial, [], (0, 5, 0, True)),
            ("denial behind an alias", None, [alias], denial, [], (1, 5, 0, True)),
            ("proof", True, ["192.0.2.1"], denial[1:], [], (1, 5, 0, True)),
            ("referral", None, [], denial[1:5], glue, (0, 4, 3, True)),
            ("what is behind a denial", None, [], denial[:1], denial, (0, 1, 0, False)),
        ]
        for name, do, answers, authority, additional, left in cases:
            asked = query(do=do, size=512)
            more = {"authority": authority, "additional": additional}
            with self.subTest(name):
                got = answer_to(asked, response(asked, *answers, **more))
                self.assertLessEqual(len(got.raw), 512)
                sections = got.answers, got.authority, got.additional
                self.assertEqual((*map(len, sections), bool(got.flags & TC)), left)

    def test_error_says_why_to_those_with_edns_in_valid_text(self) -> None:
        for text in ("no route", "x" * 1000, "x" + "é" * 1000):
            reason = dotproxy.build_option(dotproxy.ExtendedError.NETWORK_ERROR, text)
            error = dotproxy.error_response(Rcode.SERVFAIL, reason)
            for asked in (query(), query(do=True)):
                received = dotproxy.parse_query(asked)
                got = parse(dotproxy.build_answer(received, error))
                with self.subTest(asked=asked, text=text[:3]):
                    self.assertEqual(got.flags, QR | RD | RA | 2)
                    self.assertLessEqual(len(got.raw), 512)
                    if got.opt:
                        self.assertIn(got.opt.options[0][1][2:].decode(), text)


class PaddingTest(DotproxyTestCase):
    PADDED = query(do=False, options=option(PADDING, bytes(50)))

    def test_encrypted_answer_is_padded_to_468_octets_but_not_over_65535(self) -> None:
        room = 65535 - len(response(self.PADDED, record("a", "TXT", b"")))
        for size in (*range(1000), *range(room - 500, room + 5)):
            message = response(self.PADDED, record("a", "TXT", bytes(size)), edns=False)
            got = answer_to(self.PADDED, message, DOT)
            self.assertEqual(got.flags & TC, TC * (size > room))
            self.assertLessEqual(len(got.raw), 65535)
            if len(got.raw) <= 65535 - 19:
                self.assertEqual(len(got.raw) % 468, 0)
            assert got.opt is not None
            for code, data in got.opt.options:
                self.assertEqual((code, data), (PADDING, bytes(len(data))))
                self.assertLess(len(data), 468)

    def test_options_of_the_answer_are_those_that_were_asked_for(self) -> None:
        both = query(do=False, options=option(PADDING) + option(KEEPALIVE))
        for asked, transport, codes in (
            *((query(), DOT, []), (query(do=True), DOT, [EDE]), (both, UDP, [EDE])),
            *((both, TCP, [EDE, KEEPALIVE]), (both, DOT, [EDE, KEEPALIVE, PADDING])),
        ):
            received = dotproxy.parse_query(asked, transport)
            for rcode in (0, Rcode.SERVFAIL, Rcode.BADVERS):
                error = dotproxy.error_response(rcode, option(EDE, b"\0\0why"))
                with self.subTest(asked=asked, transport=transport, rcode=rcode):
                    got = parse(dotproxy.build_answer(received, error))
                    self.assertEqual(got.rcode, rcode if codes else min(rcode, 2))
                    options = got.opt.options if got.opt else []
                    self.assertEqual([code for code, _ in options], codes)
                    self.assertEqual(len(got.raw) == 468, PADDING in codes)


class FramingTest(DotproxyTestCase):
    MESSAGES = (query("a.example"), b"", bytes(11), query("c.example", do=True))

    def test_stream_cut_anywhere_loses_nothing(self) -> None:
        stream = frame(*self.MESSAGES)
        for cut in range(len(stream) + 1):
            with self.subTest(cut=cut):
                first, rest = dotproxy.split_frames(stream[:cut])
                second, rest = dotproxy.split_frames(rest + stream[cut:])
                self.assertEqual((*first, *second, rest), (*self.MESSAGES, b""))

    def test_answerable_is_a_whole_header_that_is_no_response(self) -> None:
        for message in (b"", bytes(11), response(query())):
            self.assertFalse(dotproxy.answerable(message), message)
        self.assertTrue(dotproxy.answerable(bytes(12)))


# ---- Metrics -------------------------------------------------------------------------


def sample(samples: Iterable[dotproxy.Sample], name: str, *labels: str) -> float:
    """Return the value of one metric; that of a histogram is its count."""
    (value,) = [
        value for each, values, value in samples if (each, values) == (name, labels)
    ]
    return sum(value.counts) if isinstance(value, dotproxy.Histogram) else value


class MetricsTest(DotproxyTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.metrics = dotproxy.Metrics()

    def count(self, source: str, rrtype: int = 1, rcode: int = 0) -> None:
        """Count an answer that nobody had to wait for, with DO unless it is cached."""
        form = dotproxy.Form(UDP, 0, struct.pack("!HH", rrtype, 1))
        form.edns_flags = DO * (source != "cache")
        label = source, form, rcode
        given = [(bytes(40), bytes(300), ("", 0))]
        self.metrics.answered_at_once([label], given, (7.0, 0.5))

    def answered(self, source: str, received: float, family: str) -> None:
        """Count an answer that came at 1000.0 for who had to wait for it, over TCP."""
        asked = dotproxy.parse_query(query(do=True), ("tcp", family))
        asked.received = received
        self.metrics.answered([(asked, bytes(100), 2)], (source, None), 1000.0)

    def test_text_is_as_prometheus_reads_it(self) -> None:
        for source, rrtype, rcode in (
            *(("cache", 1, 0), ("cache", 1, 0), ("stale", 28, 0)),
            *(("local", 1, 5), ("local", 999, 1), ("local", 999, 4)),
        ):
            self.count(source, rrtype, rcode)
        self.answered("upstream", 997.0, "1")
        self.answered("upstream", 998.0, "2")
        self.answered("cache", 997.0, "2")  # late, but no miss
        histogram = dotproxy.Histogram((50, 100))
        for size in (50.0, 100.0, 150.0):
            histogram.observe(size)
        took = "upstream_request_duration_seconds"
        state = "dotproxy_upstream_up", ('a"b\\c\nd',), 1
        times = f"dotproxy_{took}", ("x",), histogram
        self.metrics.collectors.append(lambda: (state, times))

        seconds, asked = "dns_request_duration_seconds", "dns_requests_total"
        for look in range(2):  # to look counts nothing twice
            text = self.metrics.write().replace("dotproxy_", "")
            for lines in (
                f'{asked}{{proto="udp",family="1",type="A"}} 3',
                f'{asked}{{proto="udp",family="1",type="other"}} 2',
                f'{seconds}_count{{source="stale"}} 1',
                f'{asked}{{proto="tcp",family="2",type="A"}} 2',
                'dns_responses_total{rcode="NOERROR",source="cache"} 2',
                'dns_responses_total{rcode="REFUSED",source="local"} 1',
                f'{seconds}_sum{{source="cache"}} 4.0',  # 2 * 0.5 s and 3 s
                f'{seconds}_sum{{source="upstream"}} 5.0',
                f'{seconds}_count{{source="upstream"}} 2',
                "dns_do_requests_total 7",
                "# TYPE cache_hits_total counter\ncache_hits_total 3",
                "cache_served_stale_total 1",
                "cache_misses_total 2",
                'turned_away_total{reason="format-error"} 2',
                'turned_away_total{reason="acl"} 0',  # a rate needs one to begin with
                "# HELP process_open_fds Open file descriptors.",
                "# TYPE upstream_up gauge",
                r'upstream_up{upstream="a\"b\\c\nd"} 1',
                f'# TYPE {took} histogram\n{took}_bucket{{upstream="x",le="50.0"}} 1',
                f'{took}_bucket{{upstream="x",le="+Inf"}} 3',
                f'{took}_sum{{upstream="x"}} 300.0\n{took}_count{{upstream="x"}} 3',
            ):
                with self.subTest(lines, look=look):
                    self.assertIn(f"\n{lines}\n", text)

    def test_query_log_is_told_of_all(self) -> None:
        self.metrics.query_log = log = mock.Mock()
        self.count("cache")
        self.answered("upstream", 997.0, "1")

        told = [call[0][1] for call in log.put.call_args_list]
        at_once, later = (40, bytes(300), 7.0, 0.5), (44, bytes(100), 997.0, 3.0)
        items = [(size, a, *times) for ((size, a, _, *times),) in told]
        self.assertEqual(items, [at_once, later])

    def test_nothing_is_lost_by_many_threads_and_sorts_of_answers(self) -> None:
        many = 3 * dotproxy.Metrics.MAX_LABELS

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(self.count, ["cache"] * many))  # each of a form of its own

        samples = self.metrics.samples()
        found = sample(samples, "dotproxy_dns_requests_total", "udp", "1", "A")
        self.assertEqual(found, many)

    def test_every_sample_is_in_the_table_with_its_labels(self) -> None:
        with serving() as served, UDPClient(served.address) as client:
            client.send(query())
            client.receive()
            samples = served.tcp.proxy.metrics.samples()

        found = {name: len(labels) for name, labels, _ in samples}
        known = {n: sum(map(bool, row[0])) for n, row in dotproxy.FAMILIES.items()}
        self.assertEqual(found, known)


# ---- Dashboard -----------------------------------------------------------------------


class DashboardTest(DotproxyTestCase):
    def test_every_metric_is_on_a_panel_as_grafana_needs_it(self) -> None:
        board = json.loads(json.dumps(dotproxy.build_dashboard()))
        self.assertEqual(board["templating"]["list"][0]["query"], "prometheus")
        panels = {panel["description"]: panel for panel in board["panels"]}
        self.assertEqual(panels.keys(), dotproxy.FAMILIES.keys())
        self.assertEqual(len({panel["id"] for panel in board["panels"]}), len(panels))
        taken: set[tuple[int, int]] = set()
        for name, panel in panels.items():
            with self.subTest(name):
                x, y, w, h = (panel["gridPos"][key] for key in "xywh")
                cells = {(x + dx, y + dy) for dx in range(w) for dy in range(h)}
                self.assertFalse(taken & cells)
                self.assertLessEqual(x + w, 24)
                taken |= cells
                self.assertEqual(panel["datasource"]["uid"], "${datasource}")
                for key in ("refId", "legendFormat"):  # lines are told apart
                    found = [target[key] for target in panel["targets"]]
                    self.assertEqual(len(found), len(set(found)))
                for target in panel["targets"]:
                    self.assertNotRegex(target["expr"], r"NAME|OTHER|SHARE|\bBY\b")
                    chosen = rf'\b{name}(_bucket)?{{instance=~"\$instance"}}'
                    self.assertRegex(target["expr"], chosen)

        for name, form in (
            ("upstream_latency_seconds", r"\Amax by \(upstream\)"),  # no sum
            ("cache_hits_total", r"\w+_hits_total.* / \(.*_hits_.* \+ .*_misses_total"),
        ):
            target = panels[f"dotproxy_{name}"]["targets"][0]
            self.assertRegex(target["expr"], form)


# ---- Logging -------------------------------------------------------------------------

# Of the field list of ECS 9.4.0, those that are used; `labels` takes any name.
ECS_FIELDS = """
    @timestamp client.address client.bytes client.ip client.port destination.address
    destination.domain destination.port dns.header_flags dns.id dns.op_code
    dns.question.class dns.question.name dns.question.type dns.resolved_ip
    dns.response_code dns.type ecs.version error.message error.stack_trace error.type
    event.action event.category event.dataset event.duration event.kind event.outcome
    event.type log.level message network.protocol network.transport network.type
    process.thread.name server.bytes service.name service.version
"""


def json_line(text: str) -> dict[str, object]:
    """Parse a line of JSON, and check that its names are of the schema."""
    fields: dict[str, object] = json.loads(text)
    names = {name for name in fields if not name.startswith("labels.")}
    assert names <= set(ECS_FIELDS.split()), names
    return fields


class LogTestCase(DotproxyTestCase):
    """With a log that is written to a file in place of stderr."""

    def setUp(self) -> None:
        super().setUp()
        self.clock = Clock()
        self.lines: list[str] = []  # what was logged, at the end
        self.have(mock.patch.object(dotproxy, "elapsed", self.clock))

    @contextlib.contextmanager
    def logging(
        self, style: str = "text", level: str = "info", journal: bool = True
    ) -> Iterator[dotproxy.LogHandler]:
        """Log as if to the journal, as that has no time."""
        with tempfile.TemporaryFile() as file:
            writer = dotproxy.Writer("log", descriptor=file.fileno())
            with (
                mock.patch.object(dotproxy, "Writer", return_value=writer),
                mock.patch.object(dotproxy, "is_journal", return_value=journal),
                mock.patch.multiple(logging.getLogger(), handlers=[], level=0),
                mock.patch.multiple(dotproxy.logger, handlers=[], propagate=True),
                mock.patch.object(threading, "excepthook"),
                dotproxy.logging_to_stderr(level, style) as log,
            ):
                yield log
            file.seek(0)
            self.lines = file.read().decode().splitlines()


class NoteTest(LogTestCase):
    def test_facts_are_text_and_fields(self) -> None:
        name = Endpoint("2001:db8::1", 853, "dot.test")
        with self.logging("json", journal=False):
            error = UpstreamError("reset", "gone")
            dotproxy.note(logging.WARNING, "upstream down", name=name, error=error, n=3)
            dotproxy.note(logging.INFO, "up", name=Endpoint("192.0.2.1", 53, ""))

        got, clear = map(json_line, self.lines)
        for field, value in {
            "message": "upstream down: name=[2001:db8::1]:853#dot.test error=gone n=3",
            "log.level": "warning",
            "event.action": "upstream-down",
            "destination.address": "2001:db8::1",
            "destination.port": 853,
            "destination.domain": "dot.test",
            "error.message": "gone",
            "labels.n": "3",
        }.items():
            self.assertEqual(got[field], value, field)
        self.assertNotIn("destination.domain", clear)
        self.assertRegex(str(got["@timestamp"]), r"\A[-\d]{10}T[\d:]{8}\.\d{3}Z\Z")

    def test_error_that_ends_a_thread_is_logged_with_its_traceback(self) -> None:
        for style, start in ("text", "<3>internal error: thread=odd"), ("json", "<3>{"):
            with self.logging(style):
                thread = threading.Thread(target=int, args=('a "\n',), name="odd")
                thread.start()
                thread.join()
            self.assertEqual({line[:3] for line in self.lines}, {"<3>"})
            self.assertTrue(self.lines[0].startswith(start))
            self.assertIn("ValueError: ", self.lines[-1])

        got = json_line(self.lines[0][3:])
        self.assertEqual(got["error.type"], "ValueError")
        self.assertIn("""'a "\\n'""", str(got["error.message"]))
        self.assertIn("Traceback", str(got["error.stack_trace"]))
        self.assertEqual(got["process.thread.name"], "odd")

    def test_text_cannot_begin_another_line_and_is_no_format(self) -> None:
        with self.logging(journal=False):
            dotproxy.note(logging.INFO, "x", error="a\n<0>b\x7f\x9b %s")

        stamp = r"\A\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[-+]\d{4} INFO "
        self.assertRegex(self.lines[0], stamp + r"x: error=a\\010<0>b\\127\\155 %s\Z")

    def test_what_is_asked_for_is_written_at_any_level_and_every_time(self) -> None:
        with self.logging(level="error"):
            for _ in range(7):
                dotproxy.note(logging.WARNING, "state", n=1)
                dotproxy.note(logging.INFO, "state", asked=True, n=1)

        self.assertEqual(self.lines, ["<6>state: n=1"] * 7)

    def test_journal_is_known_by_its_device_and_inode(self) -> None:
        status = os.fstat(2)
        stream = f"{status.st_dev}:{status.st_ino}"
        for text, claim in ((stream, True), (stream + "0", False), ("", False)):
            with mock.patch.dict(os.environ, JOURNAL_STREAM=text):
                self.assertEqual(dotproxy.is_journal(), claim)

    def say(self, times: int, n: int = 1) -> None:
        for _ in range(times):
            dotproxy.note(logging.WARNING, "x", n=n)

    def test_sixth_in_a_minute_is_counted_and_told_with_the_next_line(self) -> None:
        with self.logging("json", journal=False):
            self.say(22)
            self.clock.advance(59)
            self.say(1, n=2)
            self.clock.advance(1)
            self.say(1, n=3)
            self.say(7)

        got = list(map(json_line, self.lines))
        told = [str(line["message"])[3:] for line in got]
        others = ["n=2", "n=1 repeated=17", "n=3", *["n=1"] * 5, "n=1 repeated=2"]
        self.assertEqual(told, ["n=1"] * 5 + others)

    def test_so_many_messages_are_counted_at_once(self) -> None:
        with self.logging():
            self.say(6)
            for number in range(dotproxy.LogHandler.MESSAGES):
                self.say(1, n=-number)
            self.say(1)

        self.assertEqual(self.lines.count("<4>x: n=1 repeated=1"), 1)
        self.assertEqual(self.lines[-1], "<4>x: n=1")


class WriterTest(LogTestCase):
    def setUp(self) -> None:
        super().setUp()
        reading, self.writing = os.pipe()
        self.addCleanup(os.close, self.writing)
        self.reading = self.have(os.fdopen(reading, "rb"))
        self.writer = dotproxy.Writer("log", descriptor=self.writing)
        self.addCleanup(self.writer.close)

    def test_nothing_is_lost_in_a_pipe_that_is_full_and_does_not_block(self) -> None:
        os.set_blocking(self.writing, False)
        self.writer.put(["01234567\n"] * 50_000)
        self.writer.start()

        for _ in range(50_000):
            self.assertEqual(self.reading.readline(), b"01234567\n")
        wait_until(lambda: not self.writer._octets)  # there is room again

    def test_pipe_that_nobody_reads_is_refused_and_not_waited_for(self) -> None:
        path = os.path.join(_directory.name, "pipe")
        os.mkfifo(path)
        late = threading.Timer(2, open, (path, "rb"))  # it would end the wait
        late.start()
        with self.assertRaisesRegex(dotproxy.ConfigError, "mend --query-log"):
            dotproxy.Writer("log", path)
        late.cancel()
        late.join()

    def test_losses_are_told_once_a_minute(self) -> None:
        def put(calls: int, text: str) -> None:
            self.writer.put([f"{word}\n" for word in text.split()])
            wait_until(lambda: write.call_count == calls)

        full = OSError(errno.ENOSPC, "No space")
        write = mock.Mock(side_effect=[5, full, full, full, 6])
        self.writer.start()
        logs = self.assertLogs("dotproxy")
        with mock.patch.object(os, "write", write), logs as logged:
            for calls, text in (2, "one two six"), (3, "ten"), (4, "ten"), (5, "three"):
                put(calls, text)
            self.writer.close()

        self.assertEqual(bytes(write.call_args[0][1]), b"three\n")
        told = [each.getMessage() for each in logged.records]
        lost = [f"log lines lost: number={n} error=No space" for n in (2, 2)]
        self.assertEqual(told, lost)  # the second at the end

    def test_reader_that_hangs_stalls_nobody_and_the_end_is_bounded(self) -> None:
        writer, line = self.writer, "x" * (dotproxy.Writer.LIMIT // 2 - 1) + "\n"
        writer.start()
        logs = self.assertLogs("dotproxy")
        with mock.patch.object(writer, "PATIENCE", 0.01), logs as logged:
            for _ in range(3):
                writer.put([line])
            writer.close()

        lost = [each.getMessage() for each in logged.records]
        for number, why in (1, "too many at once"), (2, "the file takes nothing"):
            self.assertIn(f"log lines lost: number={number} error={why}", lost)
        self.assertEqual(len(self.reading.read(2 * len(line))), 2 * len(line))

    def test_log_that_never_started_is_written_at_its_end(self) -> None:
        with self.logging() as log:
            dotproxy.note(logging.INFO, "first")
            log.writer.put(["x" * log.writer.LIMIT])

        lost = "<4>log lines lost: number=1 error=too many at once"
        self.assertEqual(self.lines, ["<6>first", lost])


ASKED_AT, TO_WALL = 1000.0, 1_699_999_000.25
UPSTREAM_NAME = Endpoint("192.0.2.53", 853, "dot.test")


def query_line(
    asked: bytes,
    answer: bytes,
    *,
    client: tuple[str, int] = ("192.0.2.77", 5000),
    proto: str = "udp",
    rcode: int = 0,
    upstream: Endpoint | None = UPSTREAM_NAME,
    **settings: Any,
) -> str:
    """Return the line of one query."""
    source, transport = "upstream" if upstream else "cache", (proto, "1")
    form, rcode = dotproxy.Form(transport), rcode or answer[3] & 15
    with contextlib.suppress(dotproxy.FormatError):
        form = dotproxy.parse_query(asked, transport).form
    label, writer = (source, form, rcode), mock.Mock()
    with (
        mock.patch.object(dotproxy, "elapsed", lambda: ASKED_AT),
        mock.patch.object(time, "time", lambda: ASKED_AT + TO_WALL),
        mock.patch.object(os, "urandom", lambda _: b"key"),
    ):
        config = dotproxy.Config(query_log="-")._replace(**settings)
        log = dotproxy.QueryLog(config, writer)
        item = len(asked), answer, client, ASKED_AT, 2.0**-10
        log.put([label], [item], upstream)
    ((line,),) = writer.put.call_args[0]
    return str(line)


def query_json(asked: bytes, answer: bytes, **rest: Any) -> dict[str, object]:
    """Return the fields of one query."""
    return json_line(query_line(asked, answer, log_format="json", **rest))


class QueryLinesTest(DotproxyTestCase):
    def test_lines_are_as_documented(self) -> None:
        asked = query("Example.com", "AAAA", id=77)
        odd = record(b"\xc0\x0c", "A", b"\1" * 5), record("a.test", "TXT", b"\3abc")
        answer = response(asked, *odd, "2001:db8::1", "192.0.2.1")
        full: Any = {"log_format": "json", "query_log_privacy": "none"}
        origin = "upstream 192.0.2.53:853#dot.test"
        for journal, start in (False, "2023-11-14T22:13:20.250Z "), (True, "<6>"):
            with mock.patch.object(dotproxy, "is_journal", return_value=journal):
                line = query_line(asked, answer)
                shown = query_line(asked, answer, proto="dot", **full)
            self.assertEqual(
                line,
                f'{start}192.0.2.0/24 - 77 "AAAA IN Example.com. udp 29 false 512" '
                f"NOERROR qr,rd,ra {len(answer)} 0.000977s {origin}\n",
            )
        self.assertIn("7s cache -\n", query_line(asked, answer, upstream=None))
        self.assertEqual(
            shown,
            '<6>{"@timestamp":"2023-11-14T22:13:20.250Z","network.type":"ipv4",'
            '"client.ip":"192.0.2.77","client.port":5000,"dns.id":"77",'
            '"dns.question.name":"Example.com","dns.question.type":"AAAA",'
            '"dns.question.class":"IN","dns.op_code":"QUERY","network.transport":"tcp",'
            '"labels.proto":"dot","client.bytes":29,"dns.header_flags":["RD","RA"],'
            '"dns.response_code":"NOERROR","event.outcome":"success","dns.resolved_ip":'
            f'["2001:db8::1","192.0.2.1"],"server.bytes":{len(answer)},'
            '"event.duration":976562,"labels.source":"upstream",'
            '"destination.address":"192.0.2.53","destination.port":853,'
            '"destination.domain":"dot.test","ecs.version":"9.4.0",'
            '"event.kind":"event","event.category":["network"],'
            '"event.type":["protocol"],"event.action":"dns-query",'
            '"event.dataset":"dotproxy.query","network.protocol":"dns",'
            '"dns.type":"answer","service.name":"dotproxy"}\n',
        )

    def test_client_is_shown_as_far_as_privacy_allows(self) -> None:
        asked = query("example.com")
        v4, v6 = ("192.0.2.77", 5000), ("2001:db8:1:2ff::7%lo", 5000)
        mapped, hashed = ("::ffff:192.0.2.77", 1), "381a8b0e1a330545"
        for privacy, client, text, kind, field in (
            ("none", v4, "192.0.2.77:5000", "ipv4", "192.0.2.77"),
            ("none", v6, "[2001:db8:1:2ff::7]:5000", "ipv6", "2001:db8:1:2ff::7"),
            ("prefix", v4, "192.0.2.0/24", "ipv4", "192.0.2.0"),
            ("prefix", v6, "2001:db8:1:200::/56", "ipv6", "2001:db8:1:200::"),
            ("prefix", mapped, "192.0.2.0/24", "ipv4", "192.0.2.0"),
            ("no-names", v4, "192.0.2.0/24", "ipv4", "192.0.2.0"),
            ("hash", v4, hashed, "ipv4", hashed),  # keyed with what is random
        ):
            with self.subTest(privacy=privacy, client=client):
                how: Any = {"query_log_privacy": privacy, "client": client}
                line = query_line(asked, response(asked), **how)
                self.assertEqual(line.split()[1], text)
                got = query_json(asked, response(asked), **how)
                name = "client.address" if privacy == "hash" else "client.ip"
                found = {key: got[key] for key in got if key.startswith("client.")}
                port = {"client.port": 5000} if privacy == "none" else {}
                known = {"client.bytes": len(asked), name: field, **port}
                self.assertEqual((found, got["network.type"]), (known, kind))

    def test_what_was_asked_and_what_came_of_it(self) -> None:
        odd = counted(1, 0, 0, 0, body=b'\x05a.b\\"\x03\n\xff \0\0\1\0\1')
        escaped = r"a\.b\\\".\010\255\032"
        new = counted(1, 0, 0, 0, body=b"\0\xff\x01\0\x07")
        numbers = ["TYPE65281", "CLASS7", "RCODE11", "failure"]
        secure, secret = query("a.test", do=True), query("secret.example")
        misfit = counted(0, 0, 0, 0, flags=0x2000)
        notimp = dotproxy.build_format_error(misfit, Rcode.NOTIMP)
        hidden, vers = {"query_log_privacy": "no-names"}, {"rcode": 16}
        for asked, answer, settings, text, fields in (
            (odd, response(odd), {}, f'"A IN {escaped}. udp', [escaped, "success"]),
            (query("."), response(query(".")), {}, '"A IN . udp', ["."]),
            (new, response(new, rcode=11), {}, '"TYPE65281 CLASS7 . udp', numbers),
            (secure, response(secure), vers, '35 true 1232" BADVERS', ["BADVERS"]),
            (secret, response(secret, "::1"), hidden, '"A IN - udp', ["-"]),
            (misfit, notimp, {}, '"- - - udp 12 false 512" NOTIMP', ["OPCODE4"]),
        ):
            with self.subTest(text):
                self.assertIn(text, query_line(asked, answer, **settings))
                got = query_json(asked, answer, **settings)
                for value in fields:
                    self.assertIn(value, got.values())
                self.assertNotIn("dns.resolved_ip", got)
                self.assertEqual("dns.question.name" in got, asked != misfit)


class QueryLogTest(DotproxyTestCase):
    def test_reload_leaves_a_renamed_file_for_a_new_one(self) -> None:
        path = os.path.join(self.have(tempfile.TemporaryDirectory()), "query.log")

        def lines(suffix: str = "") -> int:
            return pathlib.Path(path + suffix).read_text(encoding="ascii").count("\n")

        pathlib.Path(path).write_text("is appended to: ", encoding="ascii")
        with (
            serving(answer, f"--query-log={path}") as served,
            UDPClient(served.address) as client,
        ):
            for number in range(2):
                client.send(query(id=number))
                client.receive()
                wait_until(lambda: lines() == 1)
                os.rename(path, f"{path}.{number}")
                served.daemon.reload()
            client.send(query())
            client.receive()
            with (
                mock.patch.object(os, "open", side_effect=OSError(13, "forbidden")),
                self.assertLogs(dotproxy.logger, "WARNING") as logged,
            ):
                served.daemon.reload()  # what cannot be opened again is kept

        self.assertEqual((lines(".0"), lines(".1"), lines()), (1, 1, 1))
        first = pathlib.Path(path + ".0").read_text(encoding="ascii")
        self.assertRegex(first, r"\Ais appended to: \d")
        self.assertIn("not reopened: error=cannot open", logged.output[0])
        with self.assertRaisesRegex(dotproxy.ConfigError, "mend --query-log"):
            dotproxy.Writer("querylog", os.curdir)


# ---- Time ----------------------------------------------------------------------------


class ClockTest(DotproxyTestCase):
    @unittest.skipUnless(sys.platform == "linux", "names Linux's clock")
    def test_time_asleep_counts(self) -> None:
        now = functools.partial(time.clock_gettime, time.CLOCK_BOOTTIME)
        self.assertTrue(now() <= dotproxy.elapsed() <= now())


# ---- Timer and worker threads --------------------------------------------------------


def fail() -> None:
    """Break, as a task."""
    raise ValueError("a bug")


class TimerTest(DotproxyTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.clock = Clock()
        self.have(mock.patch.object(dotproxy, "elapsed", self.clock))
        self.timer = dotproxy.Timer()
        self.addCleanup(self.timer.close)
        self.calls: queue.SimpleQueue[str] = queue.SimpleQueue()

    def plan(self, when: float, name: str) -> None:
        self.timer.at(when, lambda: self.calls.put(name))

    def assert_calls(self, *names: str) -> None:
        self.assertEqual([self.calls.get(timeout=5) for _ in names], list(names))

    def test_functions_are_called_once_due_and_in_that_order_bugs_or_not(self) -> None:
        self.plan(self.clock.now + 2, "due only when the clock moves on")
        self.plan(self.clock.now + 1, "later")
        self.timer.at(self.clock.now, fail)
        for name in "abcdefgh":
            self.plan(self.clock.now, name)
        self.clock.advance(1.5)

        with self.assertLogs(dotproxy.logger, "ERROR") as logged:
            self.timer.start()
            self.assert_calls(*"abcdefgh", "later")

        self.assertIn("a bug", logged.output[0])
        self.timer.close()  # and at the end once more, which does no harm
        self.assertTrue(self.calls.empty())

    def test_sooner_function_wakes_a_waiting_timer_and_may_plan_another(self) -> None:
        self.plan(1_000_000, "far away")
        self.timer.start()

        self.timer.at(999, lambda: self.plan(999, "now"))

        self.assert_calls("now")


@unittest.skipUnless(hasattr(os, "SCHED_BATCH"), "what Linux has")
class ProcessorBindingTest(DotproxyTestCase):
    def look(self, usual: int, busy: int) -> None:
        """Check that the sum of all rates binds threads, and sets them free."""
        os.sched_setscheduler(0, usual, os.sched_param(0))
        number, binding = len(os.sched_getaffinity(0)), dotproxy.ProcessorBinding()
        for source, rate, wanted in (
            *(("one", 3000.0, (number, usual)), ("other", 3000.0, (1, busy))),
            *(("other", 0.0, (1, busy)), ("one", 500.0, (number, usual))),
        ):
            binding.update(source, rate)
            found = len(os.sched_getaffinity(0)), os.sched_getscheduler(0)
            self.assertEqual(found, wanted, (source, rate))

    def test_threads_are_bound_while_busy_and_interrupt_none(self) -> None:
        self.have(mock.patch.object(sys, "_is_gil_enabled", lambda: True, create=True))
        for usual, busy in (
            (os.SCHED_OTHER, os.SCHED_BATCH),
            (os.SCHED_IDLE, os.SCHED_IDLE),  # the operator's choice
        ):
            with self.subTest(usual), concurrent.futures.ThreadPoolExecutor(1) as pool:
                pool.submit(self.look, usual, busy).result()


class WorkerPoolTest(DotproxyTestCase):
    def pool(self, threads: int, backlog: int = 100) -> dotproxy.WorkerPool:
        pool = dotproxy.WorkerPool("worker", threads, backlog)
        self.addCleanup(pool.close)
        return pool

    def test_tasks_run_at_once_up_to_the_number_of_threads(self) -> None:
        together, pool = threading.Barrier(4), self.pool(3)
        for _ in range(2):  # by new threads, and by idle ones
            for _ in range(3):
                pool.submit(functools.partial(together.wait, 5))
            together.wait(5)

    def test_task_beyond_the_backlog_is_refused_and_those_in_it_are_done(self) -> None:
        barrier, pool, done = threading.Barrier(2), self.pool(1, backlog=3), list[int]()
        wait = functools.partial(barrier.wait, 5)
        pool.submit(lambda: [wait(), wait()])
        wait()

        tasks: list[Callable[[], object]] = [fail]
        tasks += [functools.partial(done.append, n) for n in range(3)]
        with self.assertLogs(dotproxy.logger, "ERROR") as logged:
            taken = [pool.submit(task) for task in tasks]
            wait()
            pool.close()

        self.assertEqual((taken, done), ([True, True, True, False], [0, 1]))
        self.assertIn("a bug", logged.output[0])
        self.assertFalse(pool.submit(fail))

    def test_thread_that_cannot_start_or_has_been_idle_is_replaced(self) -> None:
        threads: queue.SimpleQueue[threading.Thread] = queue.SimpleQueue()
        pool = self.pool(1)
        pool.IDLE = 0.001
        with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError):
            self.assertFalse(pool.submit(fail))
        for _ in range(2):
            pool.submit(lambda: threads.put(threading.current_thread()))
            thread = threads.get(timeout=5)
            thread.join(5)
            self.assertFalse(thread.is_alive())


# ---- Certificates and errors ---------------------------------------------------------


class CertificateTest(DotproxyTestCase):
    ENDPOINT = Endpoint("192.0.2.1", 853, "dot.test")

    def trust(self, **settings: Any) -> dotproxy.Trust:
        return dotproxy.Trust(dotproxy.Config(**settings))

    def test_named_authority_is_trusted_however_plain_on_every_python(self) -> None:
        strict, partial = ssl.VERIFY_X509_STRICT, dotproxy.PARTIAL_CHAIN
        self.assertEqual(TRUST.context.verify_flags & (strict | partial), partial)
        usual = ssl.create_default_context().verify_flags  # for the system's store
        self.assertEqual(self.trust().context.verify_flags, usual)
        self.assertTrue(self.trust(ca_file=PKI.good_alone).has_authorities())

    def test_pin_is_what_openssl_says_and_damaged_certificates_have_none(self) -> None:
        pins = {"ca": CA_PIN, "good": GOOD_PIN, "good2": GOOD2_PIN}
        pins["wrong_name"] = GOOD_PIN  # another certificate for the same key
        for name, pin in pins.items():
            certificate = ssl.PEM_cert_to_DER_cert(_read_pem(name))
            with self.subTest(name):
                self.assertEqual(dotproxy.public_key_pin(certificate), pin)
        indefinite = b"\x30\x80" + certificate[4:]  # a length that DER does not have
        for text in (indefinite, *(certificate[:n] for n in range(len(certificate)))):
            with self.subTest(size=len(text)), self.assertRaises(UpstreamError):
                dotproxy.public_key_pin(text)
        for text in damaged([certificate], 2000):
            with contextlib.suppress(UpstreamError):
                self.assertEqual(len(dotproxy.public_key_pin(text)), 44)
        trust = self.trust(pin=(("dot.test", GOOD_PIN),))
        trust.check_pin("other.test", b"")
        with self.assertRaisesRegex(UpstreamError, "cannot be read"):
            trust.check_pin("Dot.Test", b"")

    def test_authorities_that_cannot_be_read_are_none(self) -> None:
        bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        error = ssl.SSLCertVerificationError("certificate verify failed")
        error.verify_code, error.verify_message = 20, "unable to get local issuer"
        with (
            mock.patch.object(ssl, "create_default_context", return_value=bare),
            mock.patch.object(ssl, "get_default_verify_paths") as where,
        ):
            for where.return_value.capath in (None, "/nonexistent"):
                found = dotproxy.describe_tls_error(error, self.ENDPOINT, self.trust())
                self.assertIn("install ca-certificates", str(found))

    def test_tls_version_that_the_library_lacks_is_an_error_with_a_cure(self) -> None:
        lacking = mock.PropertyMock(side_effect=ValueError("Unsupported protocol"))
        with (
            mock.patch.object(ssl.SSLContext, "minimum_version", lacking),
            self.assertRaisesRegex(dotproxy.ConfigError, "no TLS 1.3; mend --tls-min"),
        ):
            self.trust(tls_min="1.3")

    def test_errors_of_the_network_have_a_cause_and_a_cure(self) -> None:
        for error, cause, text in (
            (socket.timeout(), "timeout", "TCP port 853 blocked by a firewall"),
            (OSError(errno.ETIMEDOUT, "timed out"), "network", "timed out"),
            (ConnectionRefusedError(), "refused", "nothing on TCP port 853"),
            (ConnectionResetError(), "reset", "connection reset"),
            (BrokenPipeError(), "reset", "connection reset"),
            (OSError(errno.ENETUNREACH, ""), "unreachable", "is there a network"),
            (OSError(errno.EHOSTUNREACH, ""), "unreachable", "no route to 192.0.2.1"),
            (OSError(errno.EMFILE, "Too many open files"), "network", "Too many open"),
        ):
            with self.subTest(error=error):
                found = dotproxy.describe_network_error(error, self.ENDPOINT)
                self.assertEqual(found.cause, cause)
                self.assertIn(text, str(found))

    def test_servers_as_text(self) -> None:
        self.assertEqual(str(Endpoint("::1", 853, "a.test")), "[::1]:853#a.test")
        self.assertEqual(str(Endpoint("192.0.2.1", 53, "")), "tcp://192.0.2.1:53")


# ---- Scenarios -----------------------------------------------------------------------
# A real Proxy and Timer before scripted upstreams over real sockets. They know nothing
# of the parts of a proxy: only answers, what upstreams see, samples, facts and the log.
# What mostly waits is a row of a table, or a `case_`: those run side by side.

NAME = "dot.test"
OLD, NEWER = ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2
BOGUS = option(EDE, b"\0\6bogus")
GARBAGE = sending(lambda _: b"HTTP/1.1 400 Bad Request\r\n\r\n" * 1000)


def strange(message: Message) -> bytes:
    """Return the right answer with an ID that nobody asked with."""
    return struct.pack("!H", message.id ^ 0xFFFF) + right(message)[2:]


# What ends its own question alone: the RCODE that comes of it, None for a right answer,
# and the reason.
MISFITS: dict[str, tuple[Reply, int | None, str]] = {
    "another question": (
        lambda m, _: response(query("wrong.example.net", id=m.id), "192.0.2.66"),
        *(Rcode.SERVFAIL, "no response to the question"),
    ),
    "no response": (lambda m, _: m.raw, Rcode.SERVFAIL, "no response"),
    "octets behind it": (lambda m, _: right(m) + bytes(20), None, ""),
    "cut short": (lambda m, _: right(m)[:-1], Rcode.SERVFAIL, "past the end"),
    "truncated": (lambda m, _: response(m.raw, tc=True), 0, ""),
    "twice": (sending(lambda m: frame(right(m), right(m))), None, ""),
    "strange ID first": (sending(lambda m: frame(strange(m), right(m))), None, ""),
    "empty": (b"", Rcode.SERVFAIL, "no answer"),
    "11 octets": (bytes(11), Rcode.SERVFAIL, "no answer"),
    "REFUSED": (failing(Rcode.REFUSED), Rcode.REFUSED, ""),
}
FAULTS: dict[str, Reply] = {  # so that the question has to be asked again
    **{name: MISFITS[name][0] for name in ("another question", "no response", "empty")},
    "strange ID": lambda m, _: strange(m),
    "SERVFAIL": failing(Rcode.SERVFAIL),
    "silence": silence,
    "garbage": GARBAGE,
    "close": close,
    "cut": lambda _, connection: connection.cut(),
    "reset": reset,
    "half an answer": sending(lambda m: frame(right(m))[:30], last=True),
}


class Result(NamedTuple):
    """An answer, and the seconds that it took."""

    name: str
    message: Message
    elapsed: float

    @property
    def right(self) -> bool:
        """Tell if it is what was asked for, from a server that offers recursion."""
        it = self.message
        found = it.rcode, it.qname, it.flags & (AA | RA), it.addresses
        return found == (0, self.name, RA, ["192.0.2.1"])

    @property
    def reason(self) -> str:
        """The texts of the Extended DNS Errors."""
        options = self.message.opt.options if self.message.opt else []
        return b"".join(data[2:] for code, data in options if code == EDE).decode()


class Asker:
    """A client, that asks a proxy as its servers do."""

    PATIENCE = 15.0
    numbers = itertools.count()

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self._results: queue.SimpleQueue[tuple[str, bytes, float]] = queue.SimpleQueue()

    def send(
        self,
        *names: str,
        client: str = "192.0.2.200",
        transport: dotproxy.Transport = UDP,
    ) -> None:
        """Send queries in one batch, each with EDNS."""
        batch: list[tuple[dotproxy.Query, dotproxy.Reply]] = []
        now = time.monotonic()
        for name in names:
            message = query(name, do=False, id=random.getrandbits(16))
            found = self.proxy.lookup(message, dotproxy.elapsed(), [], transport)
            reply = functools.partial(self._reply, name, now)
            if isinstance(found, bytes):
                reply(found)
            elif found is not None:
                found.client = (client, 5353)
                batch.append((found, reply))
        self.proxy.resolve(batch)

    def send_fresh(self, labels: str) -> None:
        """Send queries for names that were not asked yet, with these first labels."""
        self.send(*map(self.fresh, labels.split()))

    def collect(self, count: int) -> list[Result]:
        """Wait for so many answers."""
        results: list[Result] = []
        for _ in range(count):
            name, message, took = self._results.get(timeout=self.PATIENCE)
            try:
                results.append(Result(name, parse(message), took))
            except (ValueError, IndexError, struct.error):  # as an upstream made it
                results.append(Result(name, parse(message[:4] + bytes(8)), took))
        return results

    def ask(self, name: str = "", transport: dotproxy.Transport = UDP) -> Result:
        """Ask one question and wait for the answer; a new one without a name."""
        self.send(name or self.fresh(), transport=transport)
        return self.collect(1)[0]

    def fresh(self, label: str = "good") -> str:
        """Return a name that was not asked yet, with this first label."""
        return f"{label}.n{next(self.numbers)}.example.com"

    def run(self, labels: str, rate: float) -> list[Result]:
        """Send queries as `send_fresh` does, so many a second; wait for all answers."""
        start = time.monotonic()
        for number, label in enumerate(labels.split()):
            time.sleep(max(0.0, start + number / rate - time.monotonic()))
            self.send_fresh(label)
        return self.collect(len(labels.split()))

    def counted(self, metric: str, of: FakeUpstream) -> float:
        """Return a metric of this upstream, given with its label."""
        found = {
            " ".join((name, *labels[1:])): value
            for name, labels, value in self.proxy.samples()
            if f":{of.port}" in "".join(labels[:1])
        }
        value = found[f"dotproxy_upstream_{metric}"]
        assert isinstance(value, (int, float))
        return value

    def expect(self, of: FakeUpstream, metric: str, value: float | range) -> None:
        """Wait until a metric of this upstream has this value, or one of these."""
        values = value if isinstance(value, range) else [value]
        wait_until(lambda: self.counted(metric, of) in values)

    def _reply(self, name: str, sent: float, message: bytes, _: object = None) -> None:
        self._results.put((name, message, time.monotonic() - sent))


class Scene(NamedTuple):
    """One upstream, what it is asked, and what has to come of it."""

    script: Reply = answer
    # First labels, or whole names where they have a dot, in batches between semicolons,
    # each sent once the one before is answered. What begins with "bad" has to fail, all
    # else but "odd" to be right.
    asked: str = "good"
    rcode: int = Rcode.SERVFAIL  # of the failures
    reason: str = ""  # a part of theirs; nothing: they have none
    modes: Sequence[str] = ("tls",)  # that it is played in
    settings: Mapping[str, Any] = {}
    seconds: tuple[float, float] = (0.0, 8.0)  # that each answer takes
    queries: int = 1000  # that the upstream sees at most
    connections: int = 50
    counted: Mapping[str, float | range] = {}  # metrics of it


SOME, NOBODY = range(1, 1000), FakeUpstream(port=9)
Cases = dict[str, Callable[[], None]]


class ScenarioTestCase(DotproxyTestCase):
    """Has proxies in front of upstreams, without their servers."""

    SERVED = "certificate", "handshake_delay", "maximum_version", "no_resumption"

    @contextlib.contextmanager
    def client(
        self,
        *upstreams: FakeUpstream,
        name: str = NAME,
        routes: Sequence[tuple[str, FakeUpstream]] = (),
        **settings: Any,
    ) -> Iterator[Asker]:
        """Run a proxy in front of these upstreams; those without a port are started."""
        stack = contextlib.ExitStack()
        for upstream in {*upstreams, *[upstream for _, upstream in routes]}:
            if not upstream.port:
                stack.enter_context(upstream)
        config = dotproxy.Config(
            upstream=tuple(u.endpoint(name) for u in upstreams or (NOBODY,)),
            route=tuple((domain, u.endpoint(name)) for domain, u in routes),
            **{"ca_file": PKI.ca, "timeout": 12.0, **settings},  # for slow machines
        )
        trust = dotproxy.Trust(config)
        timer = dotproxy.Timer()
        proxy = Proxy(config, trust, timer, dotproxy.Metrics())
        with stack, contextlib.closing(timer), contextlib.closing(proxy):
            timer.start()
            proxy.start()
            yield Asker(proxy)
            self.assertTrue(proxy.drain(Asker.PATIENCE))
            self.assertEqual(proxy.in_flight, 0)

    @contextlib.contextmanager
    def before(
        self, script: Reply = answer, mode: str = "tls", **settings: Any
    ) -> Iterator[tuple[FakeUpstream, Asker]]:
        """Run a proxy before one upstream, a plain one for example.com."""
        served = {key: settings.pop(key) for key in self.SERVED if key in settings}
        with FakeUpstream(script, on_accept=mode, **served) as upstream:
            if mode == "gone":
                upstream.stop()
            upstreams = [upstream] * (mode != "plain")
            routes = [("example.com", upstream)] * (mode == "plain")
            with self.client(*upstreams, routes=routes, **settings) as client:
                yield upstream, client

    @contextlib.contextmanager
    def several(
        self, strategy: str, *scripts: Reply
    ) -> Iterator[tuple[Asker, list[FakeUpstream]]]:
        """Run a proxy before upstreams with these scripts, all connected."""
        upstreams = list(map(FakeUpstream, scripts))
        with self.client(*upstreams, strategy=strategy) as client:
            for upstream in upstreams:
                upstream.wait_for(lambda u: u.handshakes > 0)
            yield client, upstreams

    def play(self, scene: Scene) -> None:
        """Play a scene in all its modes."""
        for mode in scene.modes:
            run = self.before(scene.script, mode, **scene.settings)
            with run as (upstream, client):
                results: list[Result] = []
                for labels in map(str.split, scene.asked.split(";")):
                    client.send(*[n if "." in n else client.fresh(n) for n in labels])
                    results += client.collect(len(labels))
                for metric, value in scene.counted.items():
                    client.expect(upstream, metric, value)
            self.assertLessEqual(len(upstream.queries), scene.queries)
            self.assertLessEqual(len(upstream.accepted), scene.connections)
            self.assertGreaterEqual(min(r.elapsed for r in results), scene.seconds[0])
            self.assertLessEqual(max(r.elapsed for r in results), scene.seconds[1])
            self.assert_right(r for r in results if r.name[:3] not in ("bad", "odd"))
            for result in [r for r in results if r.name.startswith("bad")]:
                self.assert_failed(result, scene.rcode)
                self.assertIn(scene.reason, result.reason)
                self.assertEqual(bool(scene.reason), bool(result.reason))

    def run_cases(self, workers: int, scenes: Mapping[str, Scene], more: Cases) -> None:
        """Run these and the cases of this class side by side; each is a test.

        What fails is run again by itself: beside others it may have lacked time.
        """
        cases = {n: getattr(self, n) for n in dir(self) if n.startswith("case_")}
        cases.update((n, functools.partial(self.play, s)) for n, s in scenes.items())
        cases = {**more, **cases}  # the longest first
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            futures = {name: pool.submit(case) for name, case in cases.items()}
        for name, future in futures.items():
            if (error := future.exception()) is not None:
                print(f"{name}, again by itself: {error}", file=sys.stderr)
                with self.subTest(name):
                    cases[name]()

    def assert_right(self, results: Iterable[Result]) -> None:
        wrong = [(r.name, r.elapsed, r.reason) for r in results if not r.right]
        self.assertEqual(wrong, [])

    def assert_failed(self, result: Result, rcode: int = Rcode.SERVFAIL) -> None:
        self.assertEqual(result.message.rcode, rcode, result.name)


def in_order(seconds: float) -> Script:
    """Answer each connection in order: slow names take so long, others no time."""

    def script(message: Message, connection: FakeConnection) -> Reply:
        begin = max(time.monotonic(), connection.busy_until)
        slow = message.qname.startswith("slow")
        connection.busy_until = begin + seconds * slow
        if message.qname.startswith("never"):
            return silence
        connection.perform_at(connection.busy_until, answer, message)
        return None

    return script


@contextlib.contextmanager
def full_backlog(port: int = 0, host: str = LOCALHOST) -> Iterator[Address]:
    """Listen where no SYN is answered: the backlog is full, nobody accepts."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=0)
    with listener, socket.socket(family) as one, socket.socket(family) as two:
        for filler in (one, two):
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()


def other_case(message: Message, _: FakeConnection) -> Reply:
    """Answer with the letters of the question swapped in case."""
    return right(parse(query(message.qname.swapcase(), id=message.id)))


def trickle(message: Message, connection: FakeConnection) -> None:
    """Answer byte by byte, each in a TLS record of its own."""
    for byte in frame(right(message)):
        connection.send_raw(bytes([byte]))


def together(message: Message, connection: FakeConnection) -> None:
    """Answer every three queries of a connection at once, in one TLS record."""
    if len(connection.queries) % 3 == 0:
        connection.send(*map(right, connection.queries[-3:]))


def few(message: Message, connection: FakeConnection) -> None:
    """Answer one query of a connection, or three, and close it."""
    connection.perform(answer, message)
    if len(connection.queries) == 1 + 2 * message.qname.startswith("three"):
        connection.close()


def half_at_first(_: Message, connection: FakeConnection) -> Reply:
    """Answer half of the first 20 in one TLS record, and others after a while."""
    first = connection.upstream.accepted[0]
    if len(connection.upstream.queries) == 20:
        first.busy_until = time.monotonic() + 0.9
        first.send(*map(right, first.queries[::2]))
    return answer if 0.0 < first.busy_until < time.monotonic() else silence


def less_edns(rcode: int, *, options_alone: bool = False, bare: bool = False) -> Script:
    """Fail at EDNS or its options; if `bare`, with a header and nothing else."""

    def script(message: Message, _: FakeConnection) -> Reply:
        if not message.opt or (options_alone and not message.opt.options):
            return answer
        header = message.raw[:2] + b"\x80\x81" + bytes(8)
        return header if bare else failing(rcode)

    return script


def keeping(tenths: int) -> Script:
    """Answer, and tell how long a connection is kept (RFC 7828)."""
    told = option(KEEPALIVE, struct.pack("!H", tenths))
    return lambda message, _: response(message.raw, "192.0.2.1", options=told)


def dead_after(queries: int, *, connections: int | None = None) -> Script:
    """Answer so many queries of each of the first connections, or of all."""
    return lambda _, connection: (
        silence
        if connection in connection.upstream.accepted[:connections]
        and len(connection.queries) > queries
        else answer
    )


def mutated(message: Message, _: FakeConnection) -> Reply:
    """Answer with some octets changed, and perhaps without the last ones."""
    whole = bytearray(response(message.raw, "192.0.2.1", "192.0.2.2"))
    for _change in range(random.randint(1, 8)):
        whole[random.randrange(2, len(whole))] = random.randrange(256)
    return bytes(whole[: random.choice((len(whole), random.randrange(12, 60)))])


TWO_FAILED = {"failures_total rcode": 2}
BOTH, TENS, TWENTY = ("tls", "plain"), "good " * 10, "good " * 20
PINNED = ((NAME, GOOD_PIN), (NAME, GOOD2_PIN))
OTHERS, LOCAL_NAME = "for another name, not for", {"name": LOCALHOST}
WRONG_NAME = {"certificate": PKI.wrong_name}
# Who gets no query: as what it is counted, what clients are told of it.
DISBELIEVED: Sequence[tuple[str, str, str, dict[str, Any]]] = (
    ("tls", "tls", "TLS 1.2 or newer", {"maximum_version": OLD}),
    ("tls", "tls", "TLS 1.3 or newer", {"maximum_version": NEWER, "tls_min": "1.3"}),
    ("tls", "close", "closed during the TLS handshake", {}),
    ("tls", "garbage", "TLS handshake failed", {}),
    ("certificate", "tls", f"--pin {NAME}={GOOD_PIN}", {"pin": PINNED[1:]}),
    ("certificate", "tls", f"give --pin {NAME}={GOOD_PIN}", {"pin": ((NAME, CA_PIN),)}),
    ("certificate", "tls", "expired", {"certificate": PKI.expired, "pin": PINNED}),
    ("certificate", "tls", "CA", {"certificate": PKI.unknown_ca, "pin": PINNED}),
    ("certificate", "tls", f"{OTHERS} {NAME}", WRONG_NAME),
    ("certificate", "tls", f"{OTHERS} {LOCALHOST}", {**WRONG_NAME, **LOCAL_NAME}),
)
EDNS_REFUSED = (
    *(less_edns(Rcode.FORMERR), less_edns(Rcode.NOTIMP)),
    less_edns(Rcode.FORMERR, options_alone=True),
    less_edns(Rcode.FORMERR, bare=True),
)
SOBER_SCENES = {
    **{
        reason: Scene(
            *(answer, "bad", Rcode.SERVFAIL, reason, (mode,), settings),
            queries=0,
            counted={f"handshakes_total {cause}": SOME, "up": 0},
        )
        for cause, mode, reason, settings in DISBELIEVED
    },
    **{
        f"pinned key of {key}": Scene(
            settings={"certificate": key, "name": "DOT.test", "pin": PINNED}
        )
        for key in (PKI.good, PKI.good2)
    },
    "answers in one record": Scene(together, "good good good", modes=BOTH),
    "answers octet by octet": Scene(trickle, "good good good", modes=BOTH),
    "letters in another case": Scene(other_case, "ExAmple", modes=BOTH, queries=1),
    "equal questions are one": Scene(
        delayed(0.1), "a.example.com A.example.com a.example.com", queries=1
    ),
    "authoritative server, then cached": Scene(
        lambda m, _: response(m.raw, "192.0.2.1", aa=True, ra=False),
        *("www.example.com;www.example.com", 0, "", ("plain",)),
        queries=1,
    ),
    **{
        f"{name} harms no neighbour": Scene(
            by_name({"bad": script}, script if rcode is None else answer),
            f"good; {TENS} {'' if rcode is None else 'bad'} {TENS}",
            *(rcode or 0, reason, BOTH, {"timeout": 1.0 if "no a" in reason else 12.0}),
            queries=23,  # it was asked once more
            connections=2,
        )
        for name, (script, rcode, reason) in MISFITS.items()
    },
    **{
        f"RCODE {rcode} of a lone upstream {number}": scene
        for rcode in (Rcode.SERVFAIL, Rcode.REFUSED)
        for number, scene in enumerate(
            (
                Scene(in_turn(failing(rcode), answer), queries=2),
                Scene(failing(rcode), "bad", rcode, queries=2, counted=TWO_FAILED),
                Scene(failing(rcode, whole=False), "bad", rcode, connections=2),
                Scene(
                    failing(rcode, whole=False, options=BOGUS),
                    *("bad", rcode, "bogus"),
                    connections=2,
                ),
            )
        )
    },
    **{
        f"less EDNS, {number}": Scene(script, "good;" * 4, modes=("plain",), queries=6)
        for number, script in enumerate(EDNS_REFUSED)
    },
    "FORMERR for another reason": Scene(
        failing(Rcode.FORMERR), "bad", Rcode.FORMERR, modes=("plain",), queries=4
    ),
    **{
        f"sessions {ending, version}": Scene(
            *(few, "one;" * 7, 0, "", ("tls",)),
            {"maximum_version": version, "no_resumption": ending, "pin": PINNED[:1]},
            counted={f"handshakes_total {result}": range(least, 8)},
        )
        for version in (NEWER, None)
        for ending, result, least in (
            *(("", "resumed", 5), ("alert", "tls", 1), ("end", "tls", 1)),
        )
    },
    "queries that wait for a connection, and those that do not": Scene(
        asked="good;good good",
        settings={"handshake_delay": 0.1},
        counted={
            **{"up": 1, "connections": 1, "requests_total": 3, "hedges_total": 0},
            **{"conn_cache_misses_total": 1, "conn_cache_hits_total": 2},
            "handshakes_total full": 1,
        },
    ),
    "nine of ten answers mutated": Scene(
        *(by_name({"odd": mutated}), ("odd " * 9 + "good ") * 40, 0, "", BOTH),
        *({}, (0, 14), 1000, 20),
    ),
    "nobody listens": Scene(
        *(answer, "bad", Rcode.SERVFAIL, "refused: nothing on TCP port", ("gone",)),
        counted={"closes_total refused": 0, "failures_total refused": SOME, "up": 0},
    ),
    "idle time that is told": Scene(keeping(300), counted={"idle_life_seconds": 30}),
    "each connection to be closed": Scene(
        keeping(0), "good;good", counted={"closes_total spare": SOME}
    ),
    "connection lost with a query": Scene(
        in_turn(answer, reset, answer),
        "good;good",
        counted=dict.fromkeys(
            ("closes_total reset", "failures_total reset", "replays_total"), 1
        ),
    ),
}
RESTLESS_SCENES = {
    "slow name": Scene(delayed(2.5), seconds=(2.4, 5.0)),
    "slower name": Scene(delayed(4.0), seconds=(3.9, 6.0)),
    "no answer at the deadline": Scene(
        *(silence, "bad.example.com bad.example.com bad", 2, "no answer"),
        *(("tls", "hang"), {"timeout": 0.5}),
        seconds=(0.5, 4.0),
    ),
    "one answer per connection": Scene(dead_after(1), "good;" * 8, queries=30),
    "long line": Scene(settings={"handshake_delay": 1.0}, seconds=(0.9, 8.0)),
    **{f"{name} first": Scene(in_turn(each, answer)) for name, each in FAULTS.items()},
    "one query per connection": Scene(few, "one " * 60, connections=100),
    "three queries per connection": Scene(few, "three " * 60),
    "half of a burst dropped": Scene(half_at_first, TWENTY),
    "half-open connection": Scene(dead_after(1, connections=1), f"good; {TWENTY}"),
    "early copies have a budget": Scene(
        by_name({"slow": delayed(0.3)}), f"slow good;{'slow ' * 100}", queries=302
    ),
    "no connection but the first, a query dropped": Scene(
        in_turn(answer, silence, answer), "good; good", modes=("tls hang",)
    ),
    "two connections are dead": Scene(dead_after(0, connections=2), TWENTY),
    **{
        f"neighbours of a poisonous name {batch.find('bad'), delay}": Scene(
            by_name({"bad": reset}),
            *(batch, Rcode.SERVFAIL, "reset", ("tls",), {"handshake_delay": delay}),
        )
        for batch, delay in (
            *((f"bad {TWENTY}", 0.0), (f"{TWENTY} bad", 0.0)),
            (f"{TENS} bad {TENS}", 0.12),
        )
    },
    "poison": Scene(by_name({"bad": reset}), "bad;good", 2, "reset", connections=20),
    "handshake that never ends, at first": Scene(modes=("hang tls", "trickle tls")),
}


class OnceTest(ScenarioTestCase):
    """Upstreams to which no query is sent again as it takes long."""

    def test_cases(self) -> None:
        shares: Cases = {}
        slow = delayed(0.6)
        # Who failed is doubted for as long as any machine takes for 60 queries.
        self.have(mock.patch.object(dotproxy.Upstream, "DOUBT", 30.0))
        for row in (
            ("fastest", (slow, answer, slow), (range(31), range(30, 61))),
            ("failover", (slow, answer, answer), (range(60, 61),)),
            ("round-robin", (answer, answer, answer), [range(15, 26)] * 3),
            ("random", (answer, answer, answer), [range(5, 50)] * 3),
            *((s, (failing(2), answer), (range(30),)) for s in dotproxy.STRATEGIES),
        ):
            share = functools.partial(self.check_shares, *row)
            shares[f"shares of {len(row[1])}, {row[0]}"] = share
        with patient_with_upstreams():
            self.run_cases(14, SOBER_SCENES, shares)

    def check_shares(
        self, strategy: str, scripts: Sequence[Reply], bounds: Sequence[range]
    ) -> None:
        """Compare how many of 60 queries, sent at once, each upstream gets."""
        with self.several(strategy, *scripts) as (client, upstreams):
            for count in (20, 60):
                for upstream in upstreams:
                    upstream.queries.clear()
                for _ in range(count):
                    client.send_fresh("good")
                self.assert_right(client.collect(count))
            shares = [len(upstream.queries) for upstream in upstreams]
            for share, bound in zip(shares, bounds):
                self.assertIn(share, bound, shares)

            for upstream in upstreams:
                upstream.drop_connections()
            wait_until(lambda: sum(bool(u.live) for u in upstreams) >= 2)  # kept warm

    def case_server_name_and_alpn_are_sent(self) -> None:
        """But no address, though a certificate may be for one."""
        for name, host, newest in (
            *((NAME, LOCALHOST, NEWER), (NAME, LOCALHOST, None)),
            *((LOCALHOST, LOCALHOST, None), (LOCALHOST_V6, LOCALHOST_V6, None)),
        ):
            upstream = FakeUpstream(host=host, maximum_version=newest)
            with self.client(upstream, name=name) as client:
                self.assert_right([client.ask()])
                seen = upstream.accepted[0]
                self.assertEqual(seen.socket.selected_alpn_protocol(), "dot")
                self.assertEqual(seen.version, "TLSv1.2" if newest else "TLSv1.3")
                self.assertEqual(seen.server_name, NAME if name == NAME else None)

    def case_ids_are_unique_and_not_the_clients(self) -> None:
        with self.before(silence, timeout=0.3) as (upstream, client):
            client.ask()  # and a connection is open
            client.send_fresh("good " * 1000)
            client.collect(1000)
            upstream.wait_for(lambda u: len(u.queries) >= 1001)

        ids = [message.id for message in upstream.accepted[0].queries]
        self.assertEqual(len(set(ids)), len(ids))
        self.assertGreater(max(ids) - min(ids), 30000)  # and not in a row

    def case_answer_that_says_it_is_too_large_is_a_fault(self) -> None:
        """Inside TLS there is room for all of it: asked once more, never kept."""
        with self.before(MISFITS["truncated"][0]) as (upstream, client):
            for transport in (UDP, TCP):
                client.ask("large.example.com", transport)
            self.assert_failed(client.ask("large.example.com", TCP))
            self.assertGreaterEqual(len(upstream.queries), 3)
            upstream.script = answer
            self.assert_right([client.ask("large.example.com", TCP)])

    def case_session_is_given_to_no_other_upstream(self) -> None:
        same = FakeUpstream()
        with self.client(same, same) as client:
            same.wait_for(lambda u: u.handshakes == 2)
            self.assert_right([client.ask()])
            same.drop_connections()
            same.wait_for(lambda u: u.handshakes >= 4)

        self.assertEqual(same.resumed, 1)

    def case_bound_holds_at_the_cost_of_the_busiest(self) -> None:
        with self.before(silence, timeout=0.7, max_in_flight=100) as (_, client):
            client.send("one.example.com", client="192.0.2.1")
            client.send(*[f"n{number}.example.com" for number in range(99)])
            self.assertEqual(client.proxy.in_flight, 100)
            client.send("two.example.com", client="192.0.2.2")

            # Its oldest, and a tenth more: to find the busiest client takes long.
            shed = [f"n{number}.example.com" for number in range(11)]
            self.assertEqual([result.name for result in client.collect(11)], shed)
            self.assertEqual(client.proxy.in_flight, 90)
            client.send(*shed)  # which can be asked again
            for number in range(200):
                client.send(client.fresh(), client=f"2001:db8::{number:x}")
                self.assertLessEqual(client.proxy.in_flight, 100)
            for result in client.collect(301):
                self.assert_failed(result)

    def case_nothing_is_waited_for_or_begun_at_the_end(self) -> None:
        with FakeUpstream(silence, on_accept="hang") as hung, full_backlog() as full:
            start = time.monotonic()
            with self.client(hung, FakeUpstream(port=full[1]), timeout=0.2) as client:
                hung.wait_for(lambda u: len(u.accepted) == 1)
                client.ask()
            self.assertLess(time.monotonic() - start, 2.5)  # 3 s to connect
            self.assert_failed(client.ask())  # and at once: nothing else tells it


class OneUpstream(ScenarioTestCase):
    """One upstream that is slow, out of order or does something wrong."""

    log: list[str]

    def told(self, event: str, upstream: FakeUpstream) -> int:
        """Count the lines of the log with this event of this upstream."""
        where = f"127.0.0.1:{upstream.port}"
        return sum(event in line and where in line for line in self.log)

    def check_in_order(self, seconds: float, mode: str, count: int) -> None:
        """One name in forty takes so long, and holds up what is behind it."""
        script = in_order(seconds)
        upstreams = [FakeUpstream(script, on_accept=mode) for _ in range(count)]
        routes = [("example.com", upstream) for upstream in upstreams]
        with self.client(routes=routes) as client:
            results = client.run(f"{TENS * 3} slow {TENS} " * 2, 20 + 10 * seconds)

            others = [r for r in results if not r.name.startswith("slow")]
            self.assertGreaterEqual(sum(r.right for r in others), 0.98 * len(others))
            # With nothing else to do: 1.2 copies each, and 5 connections.
            asked = sum(len(upstream.queries) for upstream in upstreams)
            self.assertLessEqual(asked, 2.5 * len(results))
            self.assertLessEqual(max(upstream.peak for upstream in upstreams), 8)

    def case_answer_after_the_deadline_is_kept_for_the_next(self) -> None:
        """Though the failure was kept as well, and the connection was silent."""
        hold, name = Hold(), "late.example.com"
        with self.before(hold, timeout=0.5) as (upstream, client):
            self.assert_failed(client.ask(name))
            asked = len(upstream.queries)
            hold.release()
            wait_until(lambda: client.ask(name).right)

            self.assertEqual(len(upstream.queries), asked)
        self.assertLess(dotproxy.Config().timeout, 5.0)  # as long as clients wait

    def check_outage(self, mode: str) -> None:
        """It is told once that the server leaves after the handshake, or is gone."""
        with self.before(answer, mode) as (upstream, client):
            for result in client.run("good " * 25, 10):
                self.assert_failed(result)
            self.assertLessEqual(len(upstream.accepted), 9)
            wait_until(lambda: self.told("upstream down", upstream) == 1)

            upstream.on_accept = "tls"
            if mode == "gone":
                upstream.start()
            wait_until(lambda: client.ask().right, 3.0)
            wait_until(lambda: self.told("upstream up", upstream) == 1)

    def case_restarts_under_load_lose_nothing(self) -> None:
        for mode in ("tls", "plain"):
            with self.before(answer, mode) as (upstream, client):
                results = client.run("good " * 20, 400)
                for restart in range(4):
                    client.send_fresh("good " * 10)
                    upstream.stop(reset=restart % 2 == 0)
                    client.send_fresh("good " * 10)
                    upstream.start()
                    results += client.run("good " * 20, 200) + client.collect(20)

                self.assert_right(results)

    def case_names_without_an_answer_do_not_delay_others(self) -> None:
        with self.before(by_name({"never": silence}), timeout=2.0) as (up, client):
            client.run("good " * 20, 500)
            greedy = Asker(client.proxy)
            for _ in range(20):
                greedy.send_fresh("never " * 20)

            good = client.run("good " * 50, 200)

            self.assert_right(good)
            self.assertLess(sorted(r.elapsed for r in good)[25], 1.0)
            self.assertLessEqual(up.peak, 8)
            self.assertLess(max(r.elapsed for r in greedy.collect(400)), 6.0)


class SeveralUpstreams(ScenarioTestCase):
    """Several upstreams, or one that is at several addresses."""

    hosts: dict[str, list[str]]  # the addresses of names

    def setUp(self) -> None:
        super().setUp()
        find, self.hosts = socket.getaddrinfo, {}

        def found(host: Any, *rest: Any, **named: Any) -> Any:
            hosts = self.hosts.get(host, [host])
            return [entry for each in hosts for entry in find(each, *rest, **named)]

        self.have(mock.patch.object(socket, "getaddrinfo", found))

    @contextlib.contextmanager
    def named(self, name: str, upstream: FakeUpstream, *hosts: str) -> Iterator[Asker]:
        """Run a proxy before the upstream of this name, which is at these hosts."""
        self.hosts[name] = list(hosts)
        with self.client(FakeUpstream(host=name, port=upstream.port)) as client:
            yield client

    def check_sick(self, script: Reply, on_accept: str, start: bool) -> None:
        """All answers are right and nearly all fast, though one of two is sick."""
        well, sick = FakeUpstream(), FakeUpstream()
        order = (sick, well) if start else (well, sick)
        with contextlib.ExitStack() as stack:

            def sicken() -> None:
                sick.script, sick.on_accept = script, on_accept
                if on_accept in ("gone", "dark", "expired"):
                    sick.stop(reset=True)
                if on_accept == "dark":
                    stack.enter_context(full_backlog(sick.port))
                elif on_accept == "expired":
                    sick.certificate, sick.on_accept = PKI.expired, "tls"
                    sick.start()
                elif on_accept != "gone":
                    sick.drop_connections()

            if start:
                stack.enter_context(sick)
                sicken()
            client = stack.enter_context(self.client(*order))
            results = client.run("good " * 6, 50)
            if not start:
                sicken()
            results += client.run("good " * 24, 50)

            self.assert_right(results)
            elapsed = sorted(result.elapsed for result in results[6 * (not start) :])
            self.assertLess(elapsed[int(len(elapsed) * 0.8)], 1.9)

    def case_failover_goes_back_to_the_first(self) -> None:
        with self.several("failover", answer, answer) as (client, (first, second)):
            first.stop()
            self.assert_right(client.run("good " * 20, 200))
            first.start()
            first.queries.clear()

            wait_until(lambda: client.ask().right and len(first.queries) > 5)
            self.assertGreater(len(second.queries), 15)

    def case_answer_of_two_who_do_not_answer_well(self) -> None:
        for first, second, rcode, seconds, queries in (
            (FakeUpstream(failing(5)), FakeUpstream(failing(2)), 2, 1.9, 2),
            (FakeUpstream(failing(2)), FakeUpstream(on_accept="hang"), 2, 4.0, 2),
            (FakeUpstream(silence), FakeUpstream(handshake_delay=0.3), 0, 3.0, 2),
            (
                FakeUpstream(delayed(0.2, failing(2))),
                *(FakeUpstream(handshake_delay=0.6), 0, 3.0, 9),
            ),
        ):
            with self.client(first, second) as client:
                first.wait_for(lambda u: u.handshakes > 0)
                result = client.ask()

                self.assert_failed(result, rcode)
                self.assertLess(result.elapsed, seconds, (first.script, rcode))
                self.assertLessEqual(len(first.queries), queries)

    def case_slow_answer_is_better_than_a_failure(self) -> None:
        with self.several("failover", failing(2), delayed(1.5)) as (client, _):
            self.assert_right([client.ask()])

    def case_third_is_asked_where_one_is_silent_and_one_fails(self) -> None:
        scripts = by_name({"odd": silence}), by_name({"odd": failing(2)}), answer
        with self.several("failover", *scripts) as (client, _):
            self.assert_right(client.run("good " * 5, 50))
            self.assert_right([client.ask("odd.example.com")])

    def case_edns_is_not_kept_from_who_knows_it(self) -> None:
        """By what another server of the same domain does not understand."""
        pair = [FakeUpstream(each, on_accept="plain") for each in (failing(1), answer)]
        with self.client(routes=[("example.com", each) for each in pair]) as client:
            self.assert_right(client.run("good " * 5, 50))

            self.assertTrue(pair[1].queries)
            self.assertTrue(all(query.opt for query in pair[1].queries))

    def case_late_answer_has_a_copy_asked_of_another(self) -> None:
        for late, other, won in ((1.5, answer, 1), (0.4, delayed(0.8), 0)):
            slow = by_name({"slow": delayed(late)}), by_name({"slow": other})
            with self.several("failover", *slow) as (client, (_, second)):
                client.run("good " * 20, 200)
                result = client.ask(client.fresh("slow"))

                self.assert_right([result])
                self.assertEqual(result.elapsed < 0.95 * late, bool(won))
                self.assertGreater(client.counted("hedges_total", second), 0)

    def case_address_that_worked_is_tried_first(self) -> None:
        with (
            FakeUpstream() as upstream,
            full_backlog(upstream.port, LOCALHOST_V6),
            self.named("one.test", upstream, LOCALHOST_V6, LOCALHOST) as client,
        ):
            results = [client.ask()]
            for _ in range(2):
                upstream.drop_connections()
                results.append(client.ask())
            self.assert_right(results)
            # The other address would take half a second each time that it is tried.
            self.assertLess(sum(result.elapsed for result in results[1:]), 0.6)

    def case_other_address_takes_over_when_the_one_that_worked_is_gone(self) -> None:
        with FakeUpstream() as first:
            second = FakeUpstream(host=LOCALHOST_V6, port=first.port)
            hosts = LOCALHOST, LOCALHOST_V6
            with second, self.named("two.test", first, *hosts) as client:
                self.assert_right([client.ask()])
                first.stop()
                self.assert_right([client.ask()])
                self.assertEqual(len(second.queries), 1)

                # A host without a network tells so soon, though a connection is open.
                second.script = silence
                self.hosts["two.test"] = ["255.255.255.255"]
                alone = len(second.live) == 1  # a copy may wait on another, if not
                result = client.ask()
                self.assertIn("no route" if alone else "no ", result.reason)
                self.assertLess(result.elapsed, 4.0 if alone else 13.0)


class WaitingTest(OneUpstream, SeveralUpstreams):
    def test_cases(self) -> None:
        cases: Cases = {
            f"outage, {mode}": functools.partial(self.check_outage, mode)
            for mode in ("leave", "gone")
        }
        for seconds, mode, count in (
            *((1.0, "plain", 1), (1.5, "tls", 1), (1.5, "tls", 2)),
            *((3.0, "plain", 1), (3.0, "plain", 2)),
        ):
            order = functools.partial(self.check_in_order, seconds, mode, count)
            cases[f"in order, {count} {mode} {seconds}"] = order
        sick = {"silent": silence, "failing": failing(2), "no DNS": GARBAGE}
        modes = "hang", "leave", "garbage", "gone", "dark", "expired"
        for name, start in itertools.product((*sick, *modes), (True, False)):
            script, mode = sick.get(name, answer), "tls" if name in sick else name
            check = functools.partial(self.check_sick, script, mode, start)
            cases[f"{name} at first" if start else name] = check
        with self.assertLogs(dotproxy.logger, logging.INFO) as watched:
            self.log = watched.output
            self.run_cases(20, RESTLESS_SCENES, cases)


def no_text(binary_form: bool = False) -> bytes:
    """Do as getpeercert where a name in the certificate is no text."""
    if not binary_form:
        raise UnicodeDecodeError("utf-8", b"\xfc", 0, 1, "invalid start byte")
    return b""


class LifeTest(ScenarioTestCase):
    """What hours do, or seconds in which the host sleeps."""

    def setUp(self) -> None:
        super().setUp()
        self.ahead = 0.0  # seconds that the proxy's clock is ahead
        now = time.monotonic
        self.have(mock.patch.object(dotproxy, "elapsed", lambda: now() + self.ahead))

    def test_known_name_survives_its_upstream(self) -> None:
        """Though it has expired, and the upstream says nothing or is gone."""
        self.have(mock.patch.multiple(Cache, STALE_AFTER=0.3, STALE_RETRY=0.2))
        name = "www.example.com"
        for mode, gone in (("tls", False), ("plain", True)):
            with self.before(mode=mode, timeout=0.6) as (upstream, client):
                self.assert_right([client.ask(name)])
                self.ahead += 301.0
                upstream.script = silence
                if gone:
                    upstream.stop()

                for _ in range(2):
                    known = client.ask(name)
                    self.assert_right([known])
                    self.assertLess(known.elapsed, 0.9)

                upstream.script = "192.0.2.2"
                if gone:
                    upstream.start()
                wait_until(lambda: client.ask(name).message.addresses == ["192.0.2.2"])

    def test_session_ends_with_its_certificate(self) -> None:
        with self.before() as (upstream, client):
            self.assert_right([client.ask()])
            century = 100 * 366 * 86400 + time.time()  # the certificate ends in 2100
            with mock.patch.object(time, "time", lambda: century):
                upstream.drop_connections()
                self.assert_right([client.ask()])

            self.assertEqual(upstream.resumed, 0)

    def test_questions_without_an_answer_are_forgotten(self) -> None:
        with self.before(by_name({"never": silence})) as (_, client):
            self.assert_right([client.ask()])
            never = Asker(client.proxy)
            never.send_fresh("never " * 300)

            def forgotten() -> bool:
                for _ in range(50):  # others are answered over the same connection
                    self.assert_right([client.ask()])
                    self.ahead += 1.0
                gc.collect()
                known = [o for o in gc.get_objects() if isinstance(o, dotproxy.Query)]
                return sum(b"never" in each.question for each in known) < 50

            wait_until(forgotten)
            self.assertEqual(len(never.collect(300)), 300)

    def test_names_given_up_on_make_room_for_others(self) -> None:
        self.have(mock.patch.multiple(dotproxy.Link, MAX_PENDING=100, CROWDED=50))
        with self.before(by_name({"never": silence}), timeout=0.5) as (_, client):
            client.run("never good", 1000)  # so it does not answer in order
            for _ in range(6):
                client.send_fresh("never " * 100)
            client.collect(600)
            wait_until(lambda: client.ask().right, 1.5)  # before a link counts as dead

            self.assert_right(client.run("good " * 20, 100))

    def test_close_of_an_earlier_connection_ends_no_later_one(self) -> None:
        with self.before() as (upstream, client):
            self.assert_right([client.ask()])
            links = [o for o in gc.get_objects() if isinstance(o, dotproxy.Link)]
            (link,) = [
                each
                for each in links
                if each.open and each.home.endpoint.port == upstream.port
            ]
            link.close(link.begun_at - 1.0)  # what was decided of the one before
            self.assert_right([client.ask()])
            self.assertEqual(len(upstream.accepted), 1)

            link.close(link.begun_at)
            wait_until(lambda: not link.open)
            self.assert_right([client.ask()])
            self.assertEqual(len(upstream.accepted), 2)

    def test_certificate_with_a_name_that_is_no_text_is_told(self) -> None:
        self.have(mock.patch.object(ssl.SSLObject, "getpeercert", side_effect=no_text))
        with self.before(timeout=0.5) as (_, client):
            result = client.ask()
            self.assert_failed(result)
            self.assertIn(b"a name that is no text", result.message.raw)

    def test_thread_that_cannot_start_counts_as_a_failed_connection(self) -> None:
        with self.before(timeout=0.3) as (upstream, client):
            self.assert_right([client.ask()])
            with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError):
                upstream.drop_connections()
                self.assert_failed(client.ask())
            client.expect(upstream, "handshakes_total internal", SOME)
            wait_until(lambda: client.ask().right)

    def test_connection_gone_silent_ends(self) -> None:
        with self.before(silence, timeout=0.3) as (upstream, client):
            self.assert_failed(client.ask())
            self.ahead += 5.0
            client.expect(upstream, "closes_total timeout", SOME)

    def test_closes_of_idle_connections_lose_nothing(self) -> None:
        with self.before() as (upstream, client):
            for closes in range(1, 5):
                self.assert_right([client.ask()])
                self.ahead += 6.0
                upstream.drop_connections()
                client.expect(upstream, "closes_total closed", range(closes, 99))
            for event in ("failures_total closed", "replays_total"):
                client.expect(upstream, event, 0)

            self.assert_right([client.ask()])
            self.ahead += 9.0  # nobody knows how much longer the server keeps it
            client.expect(upstream, "closes_total idle", range(1, 99))
            client.expect(upstream, "connections", 1)  # it is replaced
            self.ahead += 130.0  # and none is kept where clients are quiet
            wait_until(lambda: not upstream.live)
            self.assert_right([client.ask()])

    def test_order_is_learned_again_where_a_lost_query_looked_overtaken(self) -> None:
        with self.before(in_order(3.0), "plain", timeout=1.5) as (_, client):
            client.run("never good", 1000)
            self.ahead += 6.0
            results = client.run(f"good good slow {TENS * 6}", 50)

            right = sum(result.right for result in results)
            self.assertGreater(right, 0.9 * len(results))

    def test_sleep_of_the_host_has_all_connections_replaced(self) -> None:
        with self.before() as (upstream, client):
            self.assert_right([client.ask()])
            stale = upstream.live
            wall = time.time
            self.ahead += 10.0
            with mock.patch.object(time, "time", lambda: wall() + 10.0):
                wait_until(lambda: all(connection.closed for connection in stale))
                self.assert_right([client.ask()])

    def test_who_asks_for_trouble_has_an_upstream_tried_again_when_due(self) -> None:
        refused = "handshakes_total refused"
        with self.before() as (upstream, client):
            upstream.stop()
            wait_until(lambda: "refused" in client.proxy.trouble())
            self.ahead += 120.0
            tried = client.counted(refused, upstream)
            client.proxy.trouble()  # an attempt, beside one that may be under way
            wait_until(lambda: client.counted(refused, upstream) > tried)
            for _ in range(99):
                client.proxy.trouble()  # not yet again
            self.assertLessEqual(client.counted(refused, upstream), tried + 2)

            upstream.start()
            self.ahead += 31.0  # the longest wait
            wait_until(lambda: client.proxy.trouble() == "")


class RoutesTest(ScenarioTestCase):
    def test_each_name_is_asked_of_the_servers_of_its_domain_alone(self) -> None:
        self.have(mock.patch.object(dotproxy.Upstream, "GRACE", 0.2))
        public, deep = FakeUpstream(), FakeUpstream()
        corp = FakeUpstream(certificate=PKI.good2)
        lan, second = FakeUpstream(on_accept="plain"), FakeUpstream(on_accept="plain")
        routes = [
            *(("corp.example", corp), ("cluster.lan", lan), ("cluster.lan", second)),
            ("deep.corp.example", deep),
        ]
        client = self.have(self.client(public, routes=routes))
        found = {
            public: {"acorp.example", "corp.example.com", "x\4corp\7example"},
            corp: {"corp.example", "a.b.CORP.example", "xdeep.corp.example"},
            deep: {"deep.corp.example", "x.deep.corp.example"},
            lan: {"svc.cluster.LAN", "cluster.lan"},
        }
        for names in found.values():
            self.assert_right(map(client.ask, names))

        lan.queries += second.queries
        for upstream, names in found.items():
            self.assertEqual({m.qname for m in upstream.queries}, names)
        # Padded where it is encrypted.
        sizes = {len(m.raw) for u in (public, corp, deep) for m in u.queries}
        self.assertEqual(sizes, {128})
        self.assertLess(max(len(m.raw) for m in lan.queries), 64)
        domains = [fact["domain"] for fact in client.proxy.facts()]
        self.assertEqual(domains, ["", *[domain for domain, _ in routes]])

        lan.stop()
        self.assert_right([client.ask("b.cluster.lan")])
        stopped = {"b.deep.corp.example": deep, "c.cluster.lan": lan}
        second.stop()
        deep.stop()
        for name, upstream in stopped.items():
            result = client.ask(name)
            self.assert_failed(result)
            self.assertIn(f"127.0.0.1:{upstream.port}", result.reason)

        for name, upstream in stopped.items():
            upstream.start()
            wait_until(lambda: client.ask(f"n{next(Asker.numbers)}.{name}").right)  # noqa: B023
        self.assertEqual({m.qname for m in public.queries}, found[public])


class WatchedLock:
    """A lock that notes which others its thread holds when it is taken."""

    held: ClassVar[dict[int, list[str]]] = collections.defaultdict(list)  # by thread

    def __init__(self, lock: Any, owner: str, seen: set[tuple[str, str]]) -> None:
        self._lock, self._owner, self._seen = lock, owner, seen

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        taken: bool = self._lock.acquire(blocking, timeout)
        if taken:
            owners = self.held[threading.get_ident()]
            self._seen.update((other, self._owner) for other in owners)
            owners.append(self._owner)
        return taken

    def release(self, *_: object) -> None:
        self.held[threading.get_ident()].remove(self._owner)
        self._lock.release()

    __enter__, __exit__ = acquire, release


class LockTest(DotproxyTestCase):
    """The table of locks in the docstring of dotproxy.py is true."""

    # Whose lock may be held while whose is taken; no other pair is allowed.
    ALLOWED: ClassVar[set[tuple[str, str]]] = {
        *(("Link", "UpstreamGroup"), ("Link", "Channel")),
        *(("StreamHandler", "Channel"), ("TCPServer", "Channel")),
    }

    def setUp(self) -> None:
        super().setUp()
        self.seen: set[tuple[str, str]] = set()
        for kind in ("RLock", "Lock"):  # a plain one also where it might be taken again
            kinds = getattr(threading, kind), threading.Lock
            made = functools.partial(self.make, *kinds)
            self.have(mock.patch.object(threading, kind, made))

    def make(self, real: Callable[[], Any], plain: Callable[[], Any]) -> Any:
        frame = sys._getframe(1)
        if isinstance(frame.f_locals.get("self"), threading.Condition) and frame.f_back:
            frame = frame.f_back
        if frame.f_code.co_filename != dotproxy.__file__:
            return real()  # of an event or a thread, or of another module
        owner = type(frame.f_locals.get("self")).__name__
        return WatchedLock(plain(), owner, self.seen)

    def test_no_lock_is_taken_under_another_but_as_the_table_says(self) -> None:
        script = by_name({"poison": reset, "slow": delayed(0.3), "bad": bytes(11)})
        options = "--max-in-flight=60", "--timeout=0.6"
        names = [f"n{number}.example.com" for number in range(40)]
        names += ["poison.example.com", "slow.example.com", "bad.example.com"] * 2
        with (
            serving(script, *ENCRYPTED, *options) as served,
            TCPClient(served.address) as tcp,
            TLSClient(served.tls_address) as tls,
            UDPClient(served.address) as udp,
        ):
            for client in (udp, tcp, tls):
                client.send(*map(query, names))
            served.upstream.drop_connections()
            for client in (udp, tcp, tls):
                for _ in names:
                    client.receive()
            served.daemon.reload()

        self.assertEqual(self.seen - self.ALLOWED, set())
        self.assertIn(("Link", "Channel"), self.seen)  # it does watch


# ---- Cache ---------------------------------------------------------------------------


def cache_key(message: bytes) -> bytes:
    return dotproxy.parse_query(message).cache_key


def read_response(message: bytes) -> dotproxy.Response:
    return parsed_response(message, message)


def make_cache(size: int = 1 << 20, **settings: Any) -> Cache:
    return Cache(dotproxy.Config(cache_size=size)._replace(**settings))


ASKED = query("www.example.com")
KEY = cache_key(ASKED)
ALIAS_RECORD = record("www.example.com", "CNAME", encode_name("example.com"), 300)
SOME_RESPONSE = read_response(response(ASKED, "192.0.2.1"))


class CacheTestCase(DotproxyTestCase):
    """Has a cache, mostly asked for one name; time starts at 1000."""

    def setUp(self) -> None:
        super().setUp()
        self.cache = make_cache(cache_stale=0)

    def put(self, *answers: bytes | str, now: float = 1000.0, **what: Any) -> list[int]:
        """Store a response; return the TTLs that are served at once."""
        found = read_response(response(ASKED, *answers, **what))
        self.cache.put_all([(KEY, found)], now)
        return self.ttls(dotproxy.build_answer(dotproxy.parse_query(ASKED), found))

    def get(self, age: float, asked: bytes = ASKED) -> bytes:
        """Return the live answer at this age of the cache."""
        entry = self.cache.get(KEY, 1000.0 + age)
        if entry is None or 1000.0 + age >= entry.expires:
            return b""
        return entry.answer(dotproxy.parse_query(asked), 1000.0 + age)

    def ttls(self, message: bytes) -> list[int]:
        answer = parse(message)
        sections = answer.answers + answer.authority + answer.additional
        return [entry.ttl for entry in sections]

    def fill(self, first: int, last: int) -> None:
        """Store other answers, of less than 500 octets each."""
        for number in range(first, last):
            self.cache.put_all([(b"%09d" % number, SOME_RESPONSE)], 1000.0)


class CacheTest(CacheTestCase):
    """What is stored, for how long, and with which TTLs."""

    def test_life_of_an_answer(self) -> None:
        ns = record("example.com", "NS", b"\0", 300)
        long_soa = soa(ttl=604800, minimum=604800)
        rrsig = record("www.example.com", "RRSIG", bytes(20), 300)
        dname = record("example.com", 39, encode_name("example.net"), 300)
        fast, slow = address("a", "::1", 0), address("a", "::1", 5)
        top_bit = [soa(), soa(ttl=1 << 31)]
        cases: list[tuple[str, float, list[Any], dict[str, Any]]] = [
            ("address", 20, ["192.0.2.1"], {"ttl": 20}),
            ("TTL 0", 0, ["192.0.2.1"], {"ttl": 0}),
            ("top bit", 0, ["192.0.2.1"], {"ttl": 1 << 31}),
            ("all bits", 0, ["192.0.2.1"], {"ttl": (1 << 32) - 1}),
            ("one TTL 0", 0, ["192.0.2.1"], {"additional": [fast]}),
            ("one top bit", 0, [], {"authority": top_bit, "rcode": 3}),
            ("shortest", 5, ["192.0.2.1"], {"additional": [slow]}),
            ("NXDOMAIN, TTL", 20, [], {"authority": [soa(ttl=20)], "rcode": 3}),
            ("NXDOMAIN, MINIMUM", 20, [], {"authority": [soa(minimum=20)], "rcode": 3}),
            ("NODATA", 20, [], {"authority": [soa(minimum=20)]}),
            ("MINIMUM 0", 0, [], {"authority": [soa(minimum=0)], "rcode": 3}),
            ("an hour at most", 3600, [], {"authority": [long_soa], "rcode": 3}),
            ("NODATA without SOA", 0, [], {"authority": [ns]}),
            ("NXDOMAIN without SOA", 0, [], {"authority": [ns], "rcode": 3}),
            ("SOA elsewhere", 0, [], {"additional": [soa()], "rcode": 3}),
            ("NODATA of an alias", 20, [ALIAS_RECORD], {"authority": [soa(ttl=20)]}),
            ("alias without its target", 1, [ALIAS_RECORD], {}),
            ("signed alias without it", 1, [ALIAS_RECORD, rrsig], {}),
            ("synthesized alias without it", 1, [dname, ALIAS_RECORD], {}),
            ("short alias without it", 0, [record("a", "CNAME", b"\0", 0)], {}),
            ("alias with its target", 300, [ALIAS_RECORD, "192.0.2.1"], {}),
            ("SOA as the answer", 60, [soa(ttl=60, minimum=20)], {}),
            *((f"RCODE {rcode}", 1, [], {"rcode": rcode}) for rcode in (1, 2, 4, 5)),
            *((f"RCODE {rcode}", 0, ["::1"], {"rcode": rcode}) for rcode in (6, 9, 15)),
            ("truncated", 0, ["192.0.2.1"], {"tc": True}),
            ("truncated failure", 0, [], {"rcode": 2, "tc": True}),
        ]
        for name, life, answers, what in cases:
            with self.subTest(name):
                self.cache.flush()
                self.put(*answers, **what)
                self.assertEqual(bool(self.get(max(0, life - 0.1))), life > 0)
                self.assertFalse(self.get(life))
        for rrtype, life in (("CNAME", 300), ("RRSIG", 300), ("AAAA", 1), (39, 1)):
            asked = query(rrtype=rrtype)
            found = read_response(response(asked, ALIAS_RECORD, rrsig))
            self.cache.put_all([(cache_key(asked), found)], 0.0)
            entry = self.cache.get(cache_key(asked), 0.0)
            with self.subTest("alias that was asked for", rrtype=rrtype):
                self.assertEqual(entry and entry.expires, life)

    def test_bounds_reach_every_record_from_the_first_answer_on(self) -> None:
        glue = [address("ns.example.com", "192.0.2.2", ttl) for ttl in (10, 40)]
        low, bounded = {"cache_min_ttl": 60}, {"cache_min_ttl": 30, "cache_max_ttl": 60}
        no_failures = {"cache_fail_ttl": 0}
        for name, settings, answers, what, ttls in (
            ("minimum", low, ["::1"], {"ttl": 10}, [60]),
            ("maximum", {"cache_max_ttl": 60}, ["::1"], {"ttl": 3600}, [60]),
            ("all", bounded, ["::1"], {"additional": glue}, [60, 30, 40]),
            ("SOA", {}, [], {"rcode": 3, "authority": [soa(ttl=60, minimum=20)]}, [20]),
            ("an hour", {}, [], {"authority": [soa(ttl=9999, minimum=9999)]}, [3600]),
            ("low SOA", bounded, [], {"authority": [soa(minimum=10)]}, [30]),
            ("low", bounded, [], {"authority": [soa(ttl=30, minimum=10)]}, [30]),
            ("high SOA", bounded, [], {"authority": [soa(minimum=300)]}, [60]),
            ("alias", {}, [ALIAS_RECORD], {"authority": [soa(minimum=20)]}, [20, 20]),
            ("not stored: TTL 0", low, ["192.0.2.1"], {"ttl": 0}, [0]),
            ("not stored: no", low, [], {"authority": [soa(minimum=0)]}, [300]),
            ("not stored: failure", no_failures, [], {"rcode": 2}, []),
            ("not stored: bare alias", no_failures, [ALIAS_RECORD], {}, [300]),
            ("not stored: no cache", {"cache_size": 0}, ["192.0.2.1"], {}, [300]),
        ):
            self.cache = make_cache(cache_stale=0, **settings)
            with self.subTest(name):
                self.assertEqual(self.put(*answers, **what), ttls)
                if name.startswith("not"):
                    self.assertEqual((len(self.cache), self.cache.size), (0, 0))
                    continue
                # A batch has one time, taken before the answer was stored, perhaps.
                for age in (-0.01, 0, 0.999, 1, min(ttls) - 1):
                    left = [ttl - int(age) for ttl in ttls]
                    self.assertEqual(self.ttls(self.get(age)), left)
                self.assertFalse(self.get(min(ttls)))

    def test_what_takes_the_place_of_what(self) -> None:
        data, failure, bare = ["192.0.2.1"], {"rcode": 2}, [ALIAS_RECORD]
        cases: list[tuple[str, list[Any], Any, list[Any], Any, list[int] | None]] = [
            ("data, failure", data, {}, [], failure, [295]),
            ("data, truncated", data, {}, [], {"tc": True}, [295]),
            ("data, other RCODE", data, {}, [], {"rcode": 9}, [295]),
            ("data, failure with TC", data, {}, [], {"tc": True, **failure}, [295]),
            ("data, NOERROR that may not be stored", data, {}, [], {}, None),
            ("data, NXDOMAIN that may not be stored", data, {}, [], {"rcode": 3}, None),
            ("data, bare alias", data, {}, bare, {}, [300]),
            ("data that is gone, failure", data, {"ttl": 4}, [], failure, []),
            ("failure, data", [], failure, data, {}, [300]),
        ]
        for name, first, what, then, then_what, found in cases:
            with self.subTest(name):
                self.cache = make_cache(cache_fail_ttl=9, cache_stale=0)
                self.put(*first, **what)
                self.put(*then, **then_what, now=1005.0)
                answer = self.get(5.0)
                self.assertEqual(self.ttls(answer) if answer else None, found)

    def test_what_explains_is_kept_and_padding_is_not(self) -> None:
        asked = query("wWw.example.com", do=True)
        options = option(EDE, b"\0\3stale") + option(PADDING, bytes(400))
        whole = response(query(do=True), "192.0.2.1", options=options)
        late = dotproxy.failure_response(UpstreamError("timeout", "no answer"))
        for found, addresses, errors in (
            (read_response(whole), ["192.0.2.1"], [3]),
            (late, [], [22]),
        ):
            self.cache.flush()
            self.cache.put_all([(KEY, found)], 1000.0)
            answer = parse(self.get(0.5, asked))
            self.assertEqual(answer.addresses, addresses)
            self.assertEqual(answer.qname, "wWw.example.com")
            self.assertEqual(extended_errors(answer), errors)
            self.assertLess(self.cache.size, 900)


class ReadyTest(CacheTestCase):
    """Answers kept ready for who sends the same datagram again."""

    def keep(self, message: bytes = ASKED, age: float = 0.0) -> dotproxy.Ready | None:
        """Ask the slow way, which keeps the answer ready; return it."""
        asked, answer = dotproxy.parse_query(message), self.get(age, message)
        entry = self.cache.get(KEY, 1000.0 + age)
        assert entry is not None
        self.cache.keep_ready(asked, message, answer, entry, 1000.0 + age)
        return self.cache.hot[UDP].get(message[2:])

    def read(self, message: bytes = ASKED, age: float = 0.0) -> bytes:
        """Return what is ready at this age, as a server does."""
        ready, now = self.cache.hot[UDP].get(message[2:]), 1000.0 + age
        if ready is None or not (now < ready.until or self.cache.renew(ready, now)):
            return b""
        return message[:2] + ready.answer

    def test_ttls_count_down_as_the_slow_way_counts(self) -> None:
        glue = [address(b"\2ns\xc0\x10", "192.0.2.53", 60)]
        asked = query("wWw.example.com", do=False, size=512)
        text = record(b"\xc0\x0c", "TXT", bytes(100), 100)
        for name, answers, more in (
            ("with an alias and glue", [ALIAS_RECORD, "192.0.2.1"], glue),
            ("cut", [text] * 500, []),
        ):
            self.put(*answers, ttl=100, additional=more, now=1000.25)
            self.keep(asked, 0.5)
            for eighth in (*range(4, 100), *range(200, 400, 3)):
                age = eighth / 8
                with self.subTest(name, age=age):
                    self.assertEqual(self.read(asked, age), self.get(age, asked))
        self.assertTrue(parse(self.read(asked)).flags & TC)

    def test_ready_answer_ends_with_its_entry(self) -> None:
        for name, end, age, left in (
            ("expired", lambda: None, 10.0, 1),
            ("due for a refresh", lambda: None, 9.0, 1),
            ("replaced", lambda: self.put("::1", now=1001.0), 1.0, 0),
            ("flushed", lambda: self.cache.flush(), 1.0, 0),
            ("evicted", lambda: self.fill(0, 200), 1.0, 0),
        ):
            self.cache = make_cache(40_000)
            self.put("192.0.2.1", ttl=10)
            empty, ready = self.cache.size, self.keep()
            assert ready is not None
            self.assertTrue(self.read())
            self.assertGreater(self.cache.size, empty + len(ready.answer))
            with self.subTest(name):
                end()
                self.assertFalse(self.read(age=age))
                self.assertEqual(len(self.cache.hot[UDP]), left)

    def test_use_of_a_ready_answer_is_use_of_its_entry(self) -> None:
        self.cache = make_cache(20_000)
        self.put("192.0.2.1", ttl=10_000)
        self.keep()
        for number in range(500):
            self.fill(number, number + 1)
            self.assertTrue(self.read(age=number))
        self.fill(500, 600)
        self.assertFalse(self.read(age=501))

    def test_older_time_never_takes_the_place_of_a_newer_one(self) -> None:
        self.put("192.0.2.1", ttl=10)
        ready = self.keep()
        assert ready is not None

        for age, until in ((5.5, 6), (3.5, 6), (5.9, 6), (6.0, 7)):
            self.assertTrue(self.cache.renew(ready, 1000.0 + age))
            self.assertEqual(ready.until, 1000.0 + until)
            self.assertEqual(self.ttls(ASKED[:2] + ready.answer), [11 - until])

    def test_few_and_short_datagrams_are_kept_of_a_name(self) -> None:
        self.put("192.0.2.1")
        for letters in itertools.product("wW", "wW", "wW", "eE"):
            message = query("{}{}{}.{}xample.com".format(*letters))
            self.assertIsNotNone(self.keep(message))
            self.assertLessEqual(len(self.cache.hot[UDP]), Cache.MAX_READY)
        before = self.cache.size
        for long in (message, query(do=False, options=option(PADDING, bytes(4000)))):
            self.keep(long)
            self.assertEqual(self.cache.size, before)
        entry, asked = self.cache.get(KEY, 1000.0), dotproxy.parse_query(ASKED)
        assert entry is not None
        self.cache.flush()
        self.cache.keep_ready(asked, ASKED, response(ASKED), entry, 1000.0)  # too late
        self.assertEqual((self.cache.size, self.cache.hot[UDP]), (0, {}))


# Fills a cache in a process of its own, each name asked for so that its answer is kept
# ready. Prints its size as a share of what the process grew by, first when it is almost
# full, and again when names have come and gone.
MEMORY_SCRIPT = """\
import gc, os, resource, struct, sys
sys.path[0] = sys.argv[1]
import dotproxy

def resident():
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

padding = b"\\0" + struct.pack("!HHIHHH", 41, 1232, 0, 384, 12, 380) + bytes(380)
def fill(first, last):
    for number in range(first, last):
        name = b"\\3www\\x0chost-%07d\\7example\\3com\\0" % number
        asked = struct.pack("!6H", 0, 256, 1, 0, 0, 0) + name + b"\\0\\1\\0\\1"
        query, now = dotproxy.parse_query(asked), 1000.0 + number / 1000
        answer = struct.pack("!HHHIH4s", 0xC00C, 1, 1, 300, 4, bytes(4))
        head = struct.pack("!6H", 0, 0x8180, 1, 1, 0, 1)
        message = head + query.question + answer + padding
        found = dotproxy.parse_response(message, 12 + len(query.question))
        cache.put_all([(query.cache_key, found)], now)
        entry = cache.get(query.cache_key, now)
        cache.keep_ready(query, asked, entry.answer(query, now), entry, now)
        cache.renew(cache.hot["udp", "1"][asked[2:]], now + 1)

cache = dotproxy.Cache(dotproxy.Config(cache_size=12 << 20))
fill(0, 2000)  # takes what was free in the process
gc.collect()
size, before = cache.size, resident()
for first, last in ((2000, 12000), (12000, 20000)):
    fill(first, last)
    print((cache.size - size) / (resident() - before))
"""


class CacheBoundTest(CacheTestCase):
    def found(self, *numbers: int) -> list[int]:
        """List those that are in the cache, which uses them."""
        return [each for each in numbers if self.cache.get(b"%09d" % each, 2000.0)]

    def test_oldest_goes_first_live_or_stale_but_for_those_used_since(self) -> None:
        self.fill(0, 3)
        self.cache = make_cache(self.cache.size)
        self.fill(0, 3)
        self.found(0)

        self.fill(3, 4)

        self.assertEqual(self.found(0, 1, 2, 3), [0, 2, 3])
        self.fill(4, 5)  # as all others were used
        self.assertEqual(self.found(4), [4])

    def test_size_never_exceeds_the_bound(self) -> None:
        numbers = random.Random(1)
        self.cache = make_cache(20_000)
        for size in (*(numbers.randrange(1000) for _ in range(1000)), 30_000):
            found = response(ASKED, record("x.test", "TXT", bytes(size)))
            key = b"%09d" % numbers.randrange(50)
            before = self.cache.size
            self.cache.put_all([(key, read_response(found))], 1000.0)
            self.assertLessEqual(self.cache.size, 20_000)
        self.assertGreater(before, 15_000)
        self.assertEqual((len(self.cache), self.cache.size), (0, 0))

    def test_size_is_honest(self) -> None:
        # Not compiled there: that would leave memory free for the cache.
        directory = os.path.dirname(compiled_program())
        command = [sys.executable, "-E", "-c", MEMORY_SCRIPT, directory]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=60)
        for name, share in zip(("full", "names come and go"), done.stdout.split()):
            with self.subTest(name):
                self.assertAlmostEqual(float(share), 1.0, delta=0.3)


# ---- Local answers -------------------------------------------------------------------
# What was asked is judged from the answer as a client gets it.

SOA_OF_RFC6303 = encode_name("nobody.invalid")
SOA_OF_RFC6303 += struct.pack("!5I", 1, 3600, 1200, 604800, 10800)
# Addresses, and under which zone of in-addr.arpa or ip6.arpa each has its name.
REVERSE_ZONES = {
    **{"127.0.0.2": "0.0.127", "127.1.0.1": "127", "0.1.2.3": "0", "10.1.2.3": "10"},
    **{"100.64.0.1": "64.100", "100.127.255.255": "127.100", "172.16.0.1": "16.172"},
    **{"172.31.0.1": "31.172", "169.254.1.1": "254.169", "192.168.1.1": "168.192"},
    **{"192.0.2.1": "2.0.192", "198.51.100.1": "100.51.198", "fd12::1": "d.f"},
    **{"203.0.113.1": "113.0.203", "fe80::1": "8.e.f", "febf::1": "b.e.f"},
    "2001:db8::1": "8.b.d.0.1.0.0.2",
}


def local_answer(
    name: str | bytes,
    rrtype: str | int = "A",
    *,
    stream: bool = True,
    exempt: Sequence[str] = (),
    rrclass: int = 1,
) -> Message | None:
    """Return the answer that is given here, or None where the upstream is asked."""
    local = dotproxy.LocalAnswers(map(dotproxy.encode_domain, exempt))
    message = query(name, rrtype, rrclass=rrclass)
    asked = dotproxy.parse_query(message, TCP if stream else UDP)
    found = local.respond(asked)
    return parse(dotproxy.build_answer(asked, found)) if found else None


def reverse(address: str) -> str:
    """Return the name under which the name of an address is."""
    return ipaddress.ip_address(address).reverse_pointer


class LocalAnswersTest(DotproxyTestCase):
    def answer(self, name: str | bytes, rrtype: str | int = "A") -> Message:
        answer = local_answer(name, rrtype)
        assert answer is not None, f"{name!r} {rrtype} leaves"
        self.assertEqual(answer.flags & (QR | AA | RA | AD), QR | AA | RA)
        return answer

    def assert_negative(self, answer: Message, rcode: int, zone: str) -> None:
        """Expect an empty answer with the SOA record of the zone."""
        self.assertEqual((answer.rcode, answer.answers), (rcode, []))
        (entry,) = answer.authority
        self.assertEqual((entry.name.lower(), *entry[1:4]), (zone, 6, 1, 10800))
        mname, _ = decode_name(answer.raw, len(answer.raw) - len(entry.rdata))
        self.assertEqual((mname.lower(), entry.rdata[2:]), (zone, SOA_OF_RFC6303))

    def test_localhost_and_all_below_are_the_loopback_addresses(self) -> None:
        for name in ("localhost", "LocalHost", "a.localhost", "a.b.localhost"):
            for rrtype, text in (("A", "127.0.0.1"), ("AAAA", "::1")):
                with self.subTest(name=name, rrtype=rrtype):
                    rdata = ipaddress.ip_address(text).packed
                    wanted = Record(name, RRTYPES[rrtype], 1, 10800, rdata)
                    self.assertEqual(self.answer(name, rrtype).answers, [wanted])
            for rrtype in ("MX", "HTTPS", "PTR"):
                with self.subTest(name=name, rrtype=rrtype):
                    self.assert_negative(self.answer(name, rrtype), 0, "localhost")
        every = self.answer("a.localhost", "ANY")
        self.assertEqual(every.addresses, ["127.0.0.1", "::1"])
        for text in every.addresses:
            (entry,) = self.answer(reverse(text), "PTR").answers
            self.assertEqual((entry.type, entry.rdata), (12, encode_name("localhost")))

    def test_name_without_what_was_asked_for_has_the_soa_of_its_zone(self) -> None:
        for rcode, name, rrtype, zone in (
            *((0, zone, "A", zone) for zone in ("invalid", "local", "service.arpa")),
            (3, "a.invalid", "A", "invalid"),
            (3, "A.b.LOCAL", "A", "local"),
            (3, "a.home.arpa", "DS", "home.arpa"),
            (0, "_dns.resolver.arpa", "SVCB", "resolver.arpa"),
            (0, "a.resolver.arpa", "ANY", "resolver.arpa"),
            # A client may conclude from NXDOMAIN that nothing is below, RFC 8020.
            (0, "0.127.in-addr.arpa", "PTR", "0.127.in-addr.arpa"),
            (0, "0.0.127.in-addr.arpa", "PTR", "0.0.127.in-addr.arpa"),
            (0, reverse("255.255.255.255"), "PTR", reverse("255.255.255.255")),
            (0, reverse("::"), "PTR", reverse("::")),
        ):
            with self.subTest(name=name, rrtype=rrtype):
                self.assert_negative(self.answer(name, rrtype), rcode, zone)
        for text, zone in REVERSE_ZONES.items():
            tree = "ip6" if ":" in text else "in-addr"
            answer = self.answer(reverse(text), "PTR")
            self.assert_negative(answer, 3, f"{zone}.{tree}.arpa")

    def test_zones_of_the_registry_have_soa_and_ns_and_no_ds(self) -> None:
        # RFC 6303 sections 4.1 to 4.6, RFC 7793, the special names, and those between
        # 127.in-addr.arpa and localhost's.
        zones = 18 + 7 + 2 + 1 + 4 + 1 + 64 + 7 + 3
        self.assertEqual(len(dotproxy.LOCAL_ZONES), zones)
        for zone in dotproxy.LOCAL_ZONES:
            for rrtype in ("SOA", "NS"):
                with self.subTest(zone=zone, rrtype=rrtype):
                    (entry,) = self.answer(zone, rrtype).answers
                    self.assertEqual(entry.type, RRTYPES[rrtype])
            self.assertIsNone(local_answer(zone, "DS"), zone)

    def test_ordinary_name_leaves(self) -> None:
        for name in (
            *("example.com", "notlocalhost", "xlocal", "foo.local.example.com", "."),
            *("nonion", "internal", "example", "a", "ab", "nothome.arpa"),
            *("arpa", "in-addr.arpa", "172.in-addr.arpa", "15.172.in-addr.arpa"),
            *("32.172.in-addr.arpa", "63.100.in-addr.arpa", "128.100.in-addr.arpa"),
            *("110.in-addr.arpa", "169.192.in-addr.arpa", "ipv4only.arpa"),
            *("7.e.f.ip6.arpa", "e.f.ip6.arpa", "1.ip6.arpa", reverse("::2")),
            *(b"\x09foo\5local\0", b"\x06x.test\0"),  # that only look like zones
        ):
            with self.subTest(name):
                self.assertIsNone(local_answer(name))

    def test_exempt_domain_and_all_below_leave(self) -> None:
        for exempt, leaves, stays in (
            ("local", ["local", "a.local"], ["a.onion"]),
            ("Corp.Local.", ["corp.local", "a.corp.local"], ["local", "xcorp.local"]),
            ("127.in-addr.arpa", ["1.0.0.127.in-addr.arpa"], ["1.10.in-addr.arpa"]),
            ("arpa", ["a.home.arpa", "10.in-addr.arpa"], ["localhost"]),
            (".", ["localhost", "a.onion", "10.in-addr.arpa"], []),
        ):
            for name in leaves + stays:
                with self.subTest(exempt=exempt, name=name):
                    answer = local_answer(name, exempt=[exempt])
                    self.assertEqual(answer is None, name in leaves)

    def test_any_over_udp_is_minimal_and_special_names_have_one_class(self) -> None:
        for name in ("example.com", "localhost"):
            answer = local_answer(name, "ANY", stream=False)
            assert answer is not None
            wanted = Record(name, RRTYPES["HINFO"], 1, 3600, b"\x07RFC8482\0")
            self.assertEqual((answer.rcode, answer.answers), (0, [wanted]))
            self.assertEqual(answer.flags & AA, 0)
        self.assertIsNone(local_answer("example.com", "ANY"))
        for rrtype, rrclass in ((0x01FF, 1), (254, 1), (255, 3)):
            leaves = local_answer("a.test", rrtype, rrclass=rrclass, stream=False)
            self.assertIsNone(leaves)
        refused = local_answer("a.onion", "TXT", rrclass=3)
        self.assertEqual(refused and refused.rcode, Rcode.REFUSED)


def svcb(*parameters: tuple[int, bytes]) -> bytes:
    """Build the data of an SVCB or HTTPS record (RFC 9460 section 2.2)."""
    options = (option(key, value) for key, value in parameters)
    return b"".join((b"\0\1", encode_name("a.example.net"), *options))


def packed(*addresses: str) -> bytes:
    return b"".join(ipaddress.ip_address(address).packed for address in addresses)


class RebindingGuardTest(DotproxyTestCase):
    PRIVATE = (
        *("0.0.0.0", "0.255.1.2", "10.255.255.255", "127.0.0.1", "100.127.255.255"),
        *("169.254.169.254", "172.16.0.1", "172.31.255.255", "192.168.0.1", "::"),
        *("::1", "fc00::1", "fdff:ffff::1", "fe80::1", "febf::1", "fec0::1", "feff::1"),
        *("::ffff:10.0.0.1", "::ffff:127.0.0.1", "64:ff9b::192.168.0.1", "::10.1.1.1"),
    )
    PUBLIC = (
        *("1.1.1.1", "9.255.255.255", "11.0.0.1", "100.63.255.255", "100.128.0.0"),
        *("126.0.0.1", "128.0.0.1", "169.253.0.1", "172.15.255.255", "172.32.0.0"),
        *("192.167.1.1", "192.169.1.1", "192.0.2.1", "2001:db8::1"),
        *("fbff::1", "fe7f::1", "ff02::1", "::ffff:192.0.2.1", "64:ff9b::192.0.2.1"),
        *("64:ff9c::10.0.0.1", "2001:db8::10.0.0.1", "::1:0:10.0.0.1", "a00::1"),
    )

    def blocked(
        self,
        *answers: bytes | str,
        name: str = "www.example.com",
        exempt: Sequence[str] = (),
        additional: Sequence[bytes] = (),
    ) -> bool:
        """Tell whether an answer becomes NODATA that says why; it is whole if not."""
        guard = dotproxy.RebindingGuard(map(dotproxy.encode_domain, exempt))
        asked = query(name, do=False)
        given = read_response(response(asked, *answers, additional=additional))
        parsed = dotproxy.parse_query(asked)
        screened = guard.screen(parsed, given)
        if screened is given:
            return False
        answer = parse(dotproxy.build_answer(parsed, screened))
        self.assertEqual((answer.answers, extended_errors(answer)), ([], [17]))
        self.assertEqual([each.ttl for each in answer.authority], [60])
        return True

    def test_private_addresses_and_hints_block_the_whole_answer(self) -> None:
        alias = record("www.example.com", "CNAME", encode_name("a.example.net"))
        private = address("a.example.net", "10.0.0.1")
        v4, v6 = packed("192.0.2.1", "192.168.1.1"), packed("2001:db8::1", "fd00::1")
        other = (1, b"\0" + option(4, packed("10.0.0.1"))), (5, packed("10.0.0.1"))
        whole = svcb((1, b"\2h2"), (4, v4[:4]), (6, v6))
        bad: list[Sequence[bytes | str]] = [
            *([text] for text in self.PRIVATE),
            *(["192.0.2.1", "10.0.0.1"], [alias, private]),
            [record("a", "SVCB", svcb((4, v4)))],
            [record("a", "HTTPS", whole)],
        ]
        good: list[Sequence[bytes | str]] = [
            *([text] for text in self.PUBLIC),
            *([], [alias], [record("a", "TXT", whole)]),
            [record("a", "HTTPS", svcb(*other, (4, v4[:4]), (6, v6[:16])))],
            # Malformed ones.
            *([record("a", "HTTPS", whole[:size])] for size in range(len(whole))),
            *([record("a", "A", b"\x0a" + bytes(size))] for size in (0, 2, 4, 15)),
        ]
        for answers in bad + good:
            with self.subTest(answers=answers):
                self.assertEqual(self.blocked(*answers), answers in bad)
        self.assertFalse(self.blocked("192.0.2.1", additional=[private]))

    def test_exempt_domain_and_all_below_may_have_private_addresses(self) -> None:
        for name, exempt, blocked in (
            ("example.com", "example.com", False),
            ("a.b.Example.Com", "example.com", False),
            ("notexample.com", "example.com", True),
            ("example.com", "a.example.com", True),
        ):
            with self.subTest(name=name, exempt=exempt):
                found = self.blocked("10.0.0.1", name=name, exempt=[exempt])
                self.assertEqual(found, blocked)


# ---- Proxy and cache -----------------------------------------------------------------


class FakeLink(dotproxy.Link):
    """A link without a thread or a socket: the test is the server behind it."""

    def __init__(self, test: ProxyTestCase, *home: Any) -> None:
        super().__init__(*home)
        self.group: dotproxy.UpstreamGroup = home[0]
        self.test = test
        test.links.append(self)

    def start(self) -> None:
        if self.test.trouble:
            self.test.timer.at(self.test.clock() + self.test.delay, self.close)
        else:
            self.group.link_opened(self, dotproxy.TLSFacts())

    def flush(self) -> None:
        pass

    def close(self, begun_at: float = 0.0) -> None:
        error = UpstreamError(self.test.trouble or "closed", self.test.trouble)
        self.group.link_ended(self, error)


class ProxyTestCase(DotproxyTestCase):
    """Asks a proxy without sockets, whose cache knows nothing yet."""

    def setUp(self) -> None:
        super().setUp()
        self.have(patient_with_upstreams())
        self.have(mock.patch.object(dotproxy, "elapsed", lambda: self.clock()))
        self.build()

    def build(self, **settings: Any) -> None:
        """Make a new proxy with these settings."""
        self.clock = Clock()
        self.timer = ManualTimer(self.clock)
        self.links: list[FakeLink] = []
        self.trouble, self.delay = "", 0.0  # why links do not open, and after how long
        self.tally: list[dotproxy.Label] = []
        config = dotproxy.Config(upstream=(UPSTREAM_NAME,), **settings)
        link = functools.partial(FakeLink, self)
        with mock.patch.object(dotproxy, "Link", link):
            self.proxy = Proxy(config, TRUST, self.timer, dotproxy.Metrics())

    def ask(self, message: bytes = ASKED, *, stream: bool = False) -> list[Message]:
        """Ask as a server does; return where the answer is, or will be."""
        answers: list[Message] = []

        def reply(answer: bytes, _: object = None) -> None:
            answers.append(parse(answer))

        if stream:
            found = self.proxy.lookup(message, self.clock(), self.tally, TCP)
        else:
            found = self.proxy.lookup_from(UDP)(message, self.clock(), self.tally)
        if isinstance(found, bytes):
            reply(found)
        elif found is not None:
            self.proxy.resolve([(found, reply)])
        return answers

    def pending(self) -> int:
        """Count the questions that the upstream has not answered."""
        return sum(len(link.pending) for link in self.links)

    def finish(self, build: Callable[[bytes], bytes]) -> None:
        """Have the upstream answer all, with a response to each of its queries."""
        while self.pending():  # what fails is asked once more
            link = next(each for each in self.links if each.pending)
            asked = [exchange for exchange, _ in link.pending.values()]
            link.pending.clear()
            found = [read_response(build(b"\0\0" + each.wire)) for each in asked]
            answers = list(zip(asked, found, itertools.repeat(0.0)))
            link.group.link_answered(link, answers, self.clock())

    def answer(self, *answers: bytes | str, **what: Any) -> None:
        """Have the upstream answer all that it was asked."""
        self.finish(lambda message: response(message, *answers, **what))

    def leave(self, trouble: str = "refused", delay: float = 0.0) -> None:
        """Have the upstream go away, which who connects learns after a delay."""
        self.trouble, self.delay = trouble, delay
        for link in self.links:
            if link.open:
                link.close()

    def learn(self, *answers: bytes | str, ttl: int = 10) -> None:
        """Have an answer to the usual question stored."""
        self.ask()
        self.answer(*(answers or ["192.0.2.1"]), ttl=ttl)

    def expect_stale(self, *clients: list[Message]) -> None:
        for client in clients:
            self.assertEqual([answer.addresses for answer in client], [["192.0.2.1"]])
            self.assertEqual(client[0].answers[0].ttl, 30)


def extended_errors(message: Message) -> list[int]:
    """List the info codes of the Extended DNS Errors."""
    options = message.opt.options if message.opt else []
    return [int.from_bytes(data[:2], "big") for code, data in options if code == EDE]


class ProxyCacheTest(ProxyTestCase):
    def test_what_is_known_answers_neither_a_refusal_nor_the_health_check(self) -> None:
        self.learn()
        past_the_cache = query(do=False, options=option(UNCACHED))

        for _ in range(2):
            (answer,) = self.ask(query(do=False, edns_version=1))
            self.assertEqual((answer.rcode, answer.answers), (Rcode.BADVERS, []))
            client = self.ask(past_the_cache)
            self.assertEqual(client, [])
            self.answer("192.0.2.2")
            self.assertEqual(client[0].addresses, ["192.0.2.2"])

        self.assertEqual(self.ask()[0].addresses, ["192.0.2.1"])

    def test_failure_storm_is_absorbed_for_a_second(self) -> None:
        failures: dict[str, Callable[[], None]] = {
            "SERVFAIL": lambda: self.answer(rcode=2),
            "REFUSED": lambda: self.answer(rcode=5),
            "timeout": lambda: self.timer.advance(5.0),
        }
        for name, fail in failures.items():
            with self.subTest(name):
                self.build()
                client = self.ask()
                fail()
                rcode = client[0].rcode
                self.assertIn(rcode, dotproxy.FAILURE_RCODES)

                answers = [answer for _ in range(100) for answer in self.ask()]

                self.assertEqual([answer.rcode for answer in answers], [rcode] * 100)
                self.clock.advance(1.0)
                self.assertEqual(self.ask(), [])

    def test_recovery_is_not_delayed_by_what_failed_with_a_connection(self) -> None:
        for trouble, delay, sent in (
            ("refused", 0.0, False),
            ("refused", 0.0, True),
            ("timeout", 6.0, False),
        ):
            with self.subTest(trouble, sent=sent):
                self.build()
                failed = self.ask() if sent else []
                self.leave(trouble, delay)
                failed = failed if sent else self.ask()
                while not failed:
                    self.timer.advance(0.1)
                self.assertEqual(failed[0].rcode, 2)
                self.trouble = ""
                self.timer.advance(0.6)  # sooner than a failure that was stored

                client = self.ask()
                self.timer.advance(2.0)
                self.answer("192.0.2.1")

                self.assertEqual(client[0].addresses, ["192.0.2.1"])

    def test_link_that_opens_late_takes_no_more_than_it_may(self) -> None:
        def start(link: FakeLink) -> None:
            opened = functools.partial(
                link.group.link_opened, link, dotproxy.TLSFacts()
            )
            self.timer.at(self.clock() + 1.0, opened)

        self.have(mock.patch.object(FakeLink, "start", start))
        self.have(mock.patch.object(dotproxy.Link, "MAX_PENDING", 10))
        clients = [self.ask(query(f"{n}.example")) for n in range(95)]

        for _ in range(20):
            self.timer.advance(0.25)
            self.assertLessEqual(max(len(each.pending) for each in self.links), 10)
            self.answer("192.0.2.1")

        self.assertEqual([each[0].rcode for each in clients], [0] * 95)

    def test_cold_name_is_asked_for_once_whatever_options_clients_send(self) -> None:
        clients = [
            self.ask(query(do=False, id=code, options=option(code, bytes(8))))
            for code in range(200)
        ]
        self.assertEqual(self.pending(), 1)

        self.answer("192.0.2.1")

        self.assertEqual([answer.id for (answer,) in clients], list(range(200)))

    def test_client_that_comes_in_between_does_not_ask_again(self) -> None:
        put_all, late = Cache.put_all, self.proxy.lookup(ASKED, self.clock(), [], UDP)
        assert isinstance(late, dotproxy.Query)
        between: list[list[Message]] = []
        answers: list[bytes] = []

        def slow_put_all(*arguments: Any) -> None:
            between.append(self.ask())
            put_all(*arguments)

        with mock.patch.object(Cache, "put_all", slow_put_all):
            self.learn()
        self.proxy.resolve([(late, lambda message, _: answers.append(message))])

        self.assertEqual(self.pending(), 0)
        self.assertEqual([len(each) for each in between], [1])
        self.assertEqual([parse(each).addresses for each in answers], [["192.0.2.1"]])

    def test_flushed_answer_is_asked_for_again(self) -> None:
        self.learn()
        for _ in range(2):  # at last it is kept ready
            self.assertEqual(len(self.ask()), 1)
            self.assertEqual(len(self.proxy.cache.hot[UDP]), 1)
        with self.assertLogs("dotproxy", logging.INFO) as logs:
            self.proxy.flush()

        self.assertIn("cache flushed: entries=1", logs.output[0])
        self.assertEqual(self.ask(), [])


class ProxyLocalTest(ProxyTestCase):
    def test_special_name_is_answered_here_unless_forwarded_or_routed(self) -> None:
        for message in (
            query("localhost"),
            query("a.local", rd=False),
            query("a.onion", do=True, options=option(UNKNOWN_OPTION)),
            query(reverse("10.0.0.1"), "PTR", cd=True),
        ):
            for stream in (False, True, False):
                (answer,) = self.ask(message, stream=stream)
                self.assertTrue(answer.flags & AA)
        exempt = (dotproxy.encode_domain("home.arpa"),)
        self.build(forward_special=exempt, route=(("corp.local", UPSTREAM_NAME),))
        for name in ("a.home.arpa", "a.corp.local"):
            self.assertEqual(self.ask(query(name)), [])
        self.assertEqual(self.ask(query("a.local"))[0].rcode, 3)

    def test_any_over_udp_is_small_even_after_one_over_tcp(self) -> None:
        message = query("www.example.com", "ANY")
        whole = self.ask(message, stream=True)
        self.answer("192.0.2.1", "192.0.2.2")

        (small,) = self.ask(message)

        self.assertEqual(whole[0].addresses, ["192.0.2.1", "192.0.2.2"])
        self.assertEqual([each.type for each in small.answers], [RRTYPES["HINFO"]])
        self.assertEqual(self.ask(message, stream=True), [])

    def test_private_address_is_blocked_if_so_configured(self) -> None:
        lan = dotproxy.encode_domain("lan.example")
        routes = (("corp.example", UPSTREAM_NAME),)
        self.build(block_private_answers=True, allow_private=(lan,), route=routes)
        self.learn("192.0.2.1", ttl=10)
        self.timer.advance(20.0)
        names = "a.lan.example", "a.corp.example", "www.example.org", "www.example.com"

        clients = [self.ask(query(name, do=False)) for name in names]
        clients.append(self.ask(query(do=False, rd=False)))  # not to be stored
        self.answer("10.0.0.1")
        self.clock.advance(10.0)
        clients += [self.ask(query(name, do=False)) for name in names[2:]]

        answers = [answer for client in clients for answer in client]
        allowed, blocked = answers[:2], answers[2:]
        self.assertEqual([each.addresses for each in allowed], [["10.0.0.1"]] * 2)
        found = [[(e.type, e.ttl) for e in each.authority] for each in blocked]
        self.assertEqual(found, [[(6, ttl)] for ttl in (60, 60, 60, 50, 50)])
        for answer in blocked:
            self.assertEqual((answer.rcode, answer.answers), (0, []))
            self.assertEqual(extended_errors(answer), [17])
        for name, rcode in (("cut.example", 0), ("failed.example", 2)):
            client = self.ask(query(name))
            self.answer("10.0.0.1", rcode=rcode, tc=not rcode)
            self.assertEqual(client[0].addresses, [], name)


class ProxyStaleTest(ProxyTestCase):
    """A proxy that knows an answer of 10 s, which is over."""

    def build(self, **settings: Any) -> None:
        super().build(**settings)
        self.learn()
        self.timer.advance(11.0)

    def test_stale_answer_comes_after_1_8_seconds_and_the_new_one_later(self) -> None:
        client = self.ask()
        self.timer.advance(1.79)
        self.assertEqual(client, [])

        self.timer.advance(0.05)

        self.expect_stale(client, self.ask())  # who comes now does not wait
        self.assertEqual(self.pending(), 1)
        self.answer("192.0.2.2")
        self.assertEqual(len(client), 1)
        self.assertEqual(self.ask()[0].addresses, ["192.0.2.2"])

    def test_everybody_gets_the_stale_answer_when_the_upstreams_fail(self) -> None:
        for rcode in (1, 2, 4, 5):
            with self.subTest(rcode=rcode):
                self.build()
                clients = [self.ask(query(id=number)) for number in range(9)]
                told = self.ask(query(do=False))
                self.assertEqual(self.pending(), 1)

                self.answer(rcode=rcode)

                self.expect_stale(*clients, told, self.ask())
                self.assertEqual(extended_errors(told[0]), [3])
                self.assertIsNone(clients[0][0].opt)
        self.build()
        self.leave()
        self.timer.advance(2.0)

        self.expect_stale(self.ask())  # as the upstream is known to be down

    def test_name_is_refreshed_every_30_seconds_at_most(self) -> None:
        self.ask()
        self.answer(rcode=2)
        refreshes = []
        for tenth in range(610):
            self.timer.advance(0.1)
            self.expect_stale(self.ask())  # nobody waits for the refresh
            if self.pending():
                refreshes.append(tenth)
                self.answer(rcode=2)

        self.assertEqual([round(tenth / 10) for tenth in refreshes], [30, 60])


class ProxyPrefetchTest(ProxyTestCase):
    def ask_at(
        self, *ages: float, ttl: int = 0, message: bytes = ASKED
    ) -> list[Message]:
        """Ask at these ages of an answer, new with a TTL; let the timer do its work."""
        if ttl:
            self.build()
            self.learn(ttl=ttl)
        answers: list[Message] = []
        for age in ages:
            self.timer.advance(1000.0 + age - self.clock())
            answers = self.ask(message)
            self.timer.advance(0.1)
        return answers

    def test_popular_entry_is_refreshed_once_near_its_end(self) -> None:
        cases: dict[str, tuple[int, tuple[float, ...], int]] = {
            "popular": (100, (50, 90), 1),
            "again and again": (100, (50, 95.25, 95.5, 97, 98, 99.75), 1),
            "before the last tenth": (100, (10, 50, 89.8), 0),
            "twice in the last tenth": (100, (90.25, 90.5), 1),
            "unpopular": (100, (95,), 0),
            "ready before a last tenth that begins at 4.5 s": (5, (4, 4.25, 4.5), 1),
        }
        for name, (ttl, ages, sent) in cases.items():
            with self.subTest(name):
                (answer,) = self.ask_at(*ages, ttl=ttl)

                self.assertEqual(answer.answers[0].ttl, ttl - int(ages[-1]))
                self.assertEqual(self.pending(), sent)
        self.ask_at(50, ttl=100)
        self.ask_at(95, message=query(rd=False))
        self.assertEqual(self.pending(), 0)

    def test_late_refresh_does_not_take_the_place_of_a_question(self) -> None:
        self.ask_at(50, ttl=100)
        self.clock.now = 1099.995
        self.ask()
        self.clock.now = 1100.0
        client = self.ask()
        self.timer.advance(0.1)

        self.answer("192.0.2.2")

        self.assertEqual(client[0].addresses, ["192.0.2.2"])

    def test_client_that_joins_a_refresh_gets_a_stale_answer(self) -> None:
        ends: dict[str, Callable[[], None]] = {
            "in time": lambda: self.timer.advance(1.8),
            "on failure": lambda: self.answer(rcode=2),
        }
        for name, end in ends.items():
            with self.subTest(name):
                self.ask_at(50, 99, ttl=100)
                client = self.ask_at(100.5)
                self.assertEqual((client, self.pending()), ([], 1))

                end()

                self.expect_stale(client)


class ProxyMetricsTest(ProxyTestCase):
    def count(self, name: str, *labels: str) -> float:
        samples = [*self.proxy.samples(), *self.proxy.metrics.samples()]
        return sample(samples, f"dotproxy_{name}", *labels)

    def test_every_answer_is_told_with_its_source(self) -> None:
        for _ in range(2):
            self.ask()
        self.answer("192.0.2.1", ttl=10)
        messages = ASKED, ASKED, ASKED, query(opcode=4), query(rrtype="AXFR")
        for message in messages:
            self.ask(message)
        self.ask(query("other.example"))
        self.answer(rcode=5)
        self.timer.advance(11.0)
        self.ask()
        self.answer(rcode=2)
        self.ask()
        self.ask(query("other.example"))
        self.timer.advance(5.0)

        sources = *(["cache"] * 3), "local", "local", "stale"
        rrtypes = 1, 1, 1, 0, 252, 1  # none of what could not be parsed
        wanted = zip(sources, rrtypes, (0, 0, 0, 4, 5, 0))
        told = [(source, form.rrtype, rcode) for source, form, rcode in self.tally]
        self.assertEqual(told, list(wanted))
        for number, *labels in (
            *((2, "NOERROR", "upstream"), (1, "REFUSED", "upstream")),
            *((1, "NOERROR", "stale"), (1, "SERVFAIL", "local")),
        ):
            self.assertEqual(self.count("dns_responses_total", *labels), number)

    def test_cache_and_refreshes_and_overload_are_counted(self) -> None:
        self.build(cache_size=3000, max_in_flight=10)
        for number in range(10):
            for _ in range(3):
                self.ask(query(f"{number}.example"))
                self.answer("192.0.2.1", ttl=100)
        entries = len(self.proxy.cache)
        self.clock.advance(95.0)
        self.ask(query("9.example"))
        self.timer.advance(0.1)
        for number in range(11):
            self.ask(query(f"{number}.example.com"))

        self.assertEqual(self.count("cache_entries"), entries)
        self.assertEqual(self.count("cache_evictions_total"), 10 - entries)
        self.assertEqual(self.count("cache_size_bytes"), self.proxy.cache.size)
        self.assertEqual(self.count("cache_prefetch_total"), 1)
        # A tenth of what there may be, and what is too much.
        self.assertEqual(self.count("turned_away_total", "overload"), 2)
        self.assertEqual(self.count("queries_in_flight"), 9)

    def test_upstream_of_several_domains_is_counted_once_for_all(self) -> None:
        self.build(route=[(name, UPSTREAM_NAME) for name in ("a.test", "b.test")])
        for name in ("a.test", "a.b.test", "b.test", "c.test"):
            self.ask(query(name))
            self.answer("192.0.2.1")

        for metric, number in (
            *(("requests_total", 4), ("request_duration_seconds", 4)),
            *(("connections", 1), ("up", 1), ("idle_life_seconds", 10.0)),
        ):
            found = self.count(f"upstream_{metric}", str(UPSTREAM_NAME))
            self.assertEqual(found, number, metric)

    def test_trouble_is_none_while_the_cache_has_an_answer_to_serve(self) -> None:
        self.build(cache_stale=100.0, cache_fail_ttl=30.0)
        self.ask()
        self.answer(rcode=2)  # a failure is nothing to serve
        self.leave()
        self.timer.advance(5.0)
        self.assertIn("refused", self.proxy.trouble())

        self.trouble = ""
        self.timer.advance(30.0)
        self.assertEqual(self.proxy.trouble(), "")
        self.learn()
        self.leave()
        for seconds, trouble in ((5.0, False), (104.0, False), (2.0, True)):
            self.timer.advance(seconds)
            self.assertEqual(bool(self.proxy.trouble()), trouble)


# ---- Any query, any age: a slow, obvious model ---------------------------------------

FAILURES = (1, 2, 4, 5)
NAMES = ("www.example.com", "a.example", "long-label.sub.example.net", "b.a.example")


class Generator:
    """Makes random messages, none of which is too large for any client."""

    TTLS = (1, 2, 9, 10, 30, 60, 300, 300, 3600, 7200, 10**6, 0x7FFFFFFF)

    def __init__(self, seed: int) -> None:
        self.numbers = random.Random(seed)
        self.choose = self.numbers.choice
        self.ends = 0.0  # a chance for TTLs that may not be stored

    def odds(self, chance: float) -> bool:
        return self.numbers.random() < chance

    def query(self) -> bytes:
        """Make a query that is like others but for details."""
        choose, odds, name = self.choose, self.odds, self.choose(NAMES)
        if odds(0.3):
            name = "".join(choose((str.upper, str.lower))(letter) for letter in name)
        flags = {"rd": not odds(0.1), "ad": odds(0.3), "cd": odds(0.1)}
        do, options = choose((None, None, False, True)), option(COOKIE, bytes(8))
        options = options if odds(0.3) else b""
        return query(name, choose(("A", "A", "TXT")), do=do, options=options, **flags)

    def ttl(self) -> int:
        ends = self.odds(self.ends)
        return self.choose((0, 1 << 31, (1 << 32) - 1) if ends else self.TTLS)

    def records(self, question: bytes, most: int) -> list[bytes]:
        """Make records whose owner is given in full, or by a pointer."""
        parent, found = 12 + 1 + question[0], []
        for _ in range(self.numbers.randrange(most + 1)):
            pointer = struct.pack("!H", 0xC000 | self.choose((12, parent)))
            owner = self.choose((pointer, b"\3fTp" + pointer, encode_name("N.test")))
            kinds = ("A", b"\xc0\0\2\1"), ("CNAME", b"\xc0\x0c"), ("TXT", bytes(9))
            found.append(record(owner, *self.choose(kinds), self.ttl()))
        return found

    def response(self, asked: bytes) -> bytes:
        """Make a response to a query."""
        choose, odds, question = self.choose, self.odds, parse(asked).question
        self.ends = choose((0.0, 0.0, 0.0, 0.3))
        rcode = choose((0,) * 12 + (3,) * 4 + (1, 2, 2, 2, 4, 5, 9))
        answers = self.records(question, 0 if rcode else choose((0, 3)))
        authority = self.records(question, choose((0, 2)))
        if odds(0.2 if answers else 0.8):
            authority.append(soa(ttl=self.ttl(), minimum=choose((0, 5, 60, 10**6))))
        additional = self.records(question, choose((0, 2)))
        if odds(0.1):
            additional.append(soa())
        if rcode in FAILURES:
            authority = additional = []  # their records, if any, mean nothing
        codes = [code for code in (COOKIE, PADDING, EDE) if odds(0.2)]
        return response(
            *(asked, *answers),
            rcode=rcode,
            authority=authority,
            additional=additional,
            edns=odds(0.8),
            options=b"".join(option(code, bytes(10)) for code in codes),
            aa=odds(0.5),
            ad=odds(0.5),
            ra=odds(0.5),
        )


class Stored:
    """A response, what follows from it, and how it is used."""

    def __init__(self, message: Message, now: float) -> None:
        self.message = message
        self.at = now
        self.life = 0.0  # 0: not stored, but passed on as it came
        self.expires = now
        self.hits = 0
        self.refreshed = False
        self.retry_at = 0.0  # once a refresh failed
        self.failed = message.rcode in FAILURES
        denials = [each for each in message.authority if each.type == RRTYPES["SOA"]]
        self.negative_ttl: int | None = None
        if denials:
            minimum = int.from_bytes(denials[0].rdata[-4:], "big")
            self.negative_ttl = min(denials[0].ttl, minimum)
        bare = {each.type for each in message.answers} == {RRTYPES["CNAME"]}
        # An alias to nowhere is no better than a failure.
        self.useless = self.failed or (bare and not message.rcode and not denials)


class Reference:
    """The cache as its rules are written, one after the other."""

    def __init__(self, low: int, high: int, stale: float) -> None:
        self.low, self.high, self.stale = low, high, stale
        self.entries: dict[object, Stored] = {}

    def key(self, asked: Message) -> object:
        """Return what makes a question the same."""
        secure = bool(asked.opt and asked.opt.flags & DO)
        return asked.qname.lower(), asked.qtype, secure, bool(asked.flags & CD)

    def find(self, asked: Message, now: float) -> Stored | None:
        """Return what answers a query, or may do so if no upstream does."""
        entry = self.entries.get(self.key(asked))
        if entry is None:
            return None
        if now < entry.expires:
            entry.hits += 1
            return entry
        if now >= entry.expires + self.stale or entry.useless:
            del self.entries[self.key(asked)]
            return None
        return entry if asked.flags & RD else None

    def wants_refresh(self, asked: Message, entry: Stored, now: float) -> bool:
        """Tell whether a hit starts a refresh in the background, and note that."""
        if now >= entry.expires:
            wanted = now >= entry.retry_at
            entry.retry_at = now + 30 if wanted else entry.retry_at
        else:
            popular = entry.hits >= 2 and asked.flags & RD and not entry.useless
            late = now >= entry.at + entry.life * 0.9
            wanted = bool(popular) and late and not entry.refreshed
            entry.refreshed |= wanted
        return wanted

    def learn(self, asked: Message, message: Message, now: float) -> Stored:
        """Take in a response; return it as it is to be served."""
        key, entry = self.key(asked), Stored(message, now)
        if not asked.flags & RD:
            return entry
        entry.life = self.life(entry)
        entry.expires += entry.life
        if entry.life and not (entry.failed and key in self.entries):
            self.entries[key] = entry
        elif message.rcode in (0, 3):
            self.entries.pop(key, None)
        return entry

    def life(self, entry: Stored) -> float:
        message, told = entry.message, entry.negative_ttl
        if entry.failed:
            return 1
        records = message.answers + message.authority + message.additional
        ttls = [0 if each.ttl >> 31 else each.ttl for each in records]
        if told is not None:
            ttls += [told, 3600]
        elif message.rcode == 3 or not message.answers:
            return 0
        if message.rcode not in (0, 3) or min(ttls) == 0:
            return 0
        if entry.useless:
            return min(*ttls, 1)
        return min(max(min(ttls), self.low), self.high)

    def ttl(self, entry: Stored, ttl: int, now: float) -> int:
        """Return the TTL of a record that came with this one."""
        told = entry.negative_ttl
        if not entry.life:
            return ttl
        if now >= entry.expires:
            return 30
        high = self.high if told is None else min(told, 3600, self.high)
        bounded = max(min(ttl, high), min(self.low, self.high))
        return max(0, bounded - int(now - entry.at))

    def serve(self, asked: Message, entry: Stored, now: float) -> Message:
        """Return what a client gets from this entry."""
        raw, end = entry.message.raw, 12 + len(asked.question)
        message = parse(raw[:12] + asked.question + raw[end:])  # its case kept
        passed = message.opt.options if message.opt else []
        passed = [each for each in passed if each[0] == EDE]
        if entry.life and now >= entry.expires:
            info = b"\0\x13" if message.rcode == 3 else b"\0\3"
            passed.append((EDE, info + b"no upstream answers"))
        flags = message.flags & ~(RD | AD | CD | AA) | asked.flags & (RD | CD) | RA
        if asked.flags & AD or (asked.opt and asked.opt.flags & DO):
            flags |= message.flags & AD
        opt = asked.opt and Opt(1232, 0, asked.opt.flags & DO, passed)
        for section in (message.answers, message.authority, message.additional):
            section[:] = [e._replace(ttl=self.ttl(entry, e.ttl, now)) for e in section]
        return message._replace(raw=b"", id=asked.id, flags=flags, opt=opt)


class PropertyTest(ProxyTestCase):
    """Puts random responses in, asks at random times; compares with the reference."""

    AGES = (0,) * 9 + (0.125, 0.5, 0.875, 1, 2.5, 8, 9.5, 30, 31, 55, 299, 3599, 90000)

    def begin(self, seed: int) -> None:
        self.generator = Generator(seed)
        odds = self.generator.odds
        low, high = 20 if odds(0.3) else 0, 3000 if odds(0.3) else 604800
        stale = 0.0 if odds(0.2) else 86400.0
        self.build(cache_min_ttl=low, cache_max_ttl=high, cache_stale=stale)
        self.reference = Reference(low, high, stale)
        self.pool = [self.generator.query() for _ in range(6)]

    def step(self) -> str:
        """Ask one question, compare what comes out; return how it was answered."""
        self.wait(*self.AGES)
        ident = self.generator.numbers.getrandbits(16).to_bytes(2, "big")
        self.asked = parse(ident + self.generator.choose(self.pool)[2:])
        now, stream = self.clock(), self.generator.odds(0.2)
        self.answers = self.ask(self.asked.raw, stream=stream)
        entry = self.reference.find(self.asked, now)
        if entry is None or (now >= entry.expires and not entry.retry_at):
            self.assertEqual(self.answers, [])
            self.resolve(entry)
            return "miss"
        self.expect(entry)
        wanted = self.reference.wants_refresh(self.asked, entry, now)
        self.wait(0.125)
        self.assertEqual(self.pending(), int(wanted))
        if wanted:
            self.respond()
            return "refresh"
        return "hit" if now < entry.expires else "stale"

    def expect(self, entry: Stored) -> None:
        wanted = self.reference.serve(self.asked, entry, self.clock())
        found = [answer._replace(raw=b"") for answer in self.answers]
        self.assertEqual(found, [wanted])

    def resolve(self, old: Stored | None) -> None:
        """Answer the question of a client that waits."""
        self.assertEqual(self.pending(), 1)
        patience = self.clock() + Cache.STALE_AFTER
        self.wait(0, 0, 0.125, 2.0)
        late = old if self.clock() > patience else None
        if late:
            self.expect(late)
            late.retry_at = patience + 30
        entry = self.respond()
        if old and entry.failed:
            old.retry_at = self.clock() + 30
            entry = old
        if not late:
            self.expect(entry)

    def respond(self) -> Stored:
        """Answer what waits with a random response; return what is to be served."""
        found: list[bytes] = []

        def build(asked: bytes) -> bytes:
            found.append(found[-1] if found else self.generator.response(asked))
            return found[-1]

        self.finish(build)
        return self.reference.learn(self.asked, parse(found[-1]), self.clock())

    def wait(self, *seconds: float) -> None:
        """Let time pass, in eighths of a second: sums of them are exact."""
        self.timer.advance(self.generator.choose(seconds))
        self.clock.now = round(self.clock.now * 8) / 8

    @mock.patch.object(dotproxy.UpstreamGroup, "ROUND", 2.0)  # a quarter takes long
    def test_whatever_comes_out_is_what_the_rules_say(self) -> None:
        seen: collections.Counter[str] = collections.Counter()
        for seed in range(8):
            with self.subTest(seed=seed):
                self.begin(seed)
                seen.update(self.step() for _ in range(100))

        self.assertGreater(min(seen.values()), 8, seen)
        self.assertEqual(len(seen), 4)


# ---- Admission -----------------------------------------------------------------------

EVERYWHERE = tuple(dotproxy.parse_network(text) for text in ("0.0.0.0/0", "::/0"))
STRANGER = "198.51.100.1"
SERVED, STRANGE, SLIPPED, LIMITED = "", "acl", "slip", "rate-limit"


class AdmissionTest(DotproxyTestCase):
    def admission(self, rate: float = 50.0, **settings: Any) -> dotproxy.Admission:
        return dotproxy.Admission(dotproxy.Config(rate_limit=rate, **settings))

    def judge(self, host: str, now: float = 0.0) -> str:
        return self.found.verdict(query(), host, now)[0]

    def test_local_clients_alone_are_admitted_and_never_limited(self) -> None:
        self.found = self.admission(1)
        local = (
            "127.0.0.1 127.255.255.255 10.9.8.7 172.16.0.1 172.31.255.255 192.168.1.1 "
            "169.254.1.1 100.64.0.1 100.127.255.255 ::1 fe80::1 fe80::1%eth0 fd00::1 "
            "::ffff:10.0.0.1 ::ffff:127.0.0.1"
        )
        strange = (
            "198.51.100.1 172.15.255.255 172.32.0.0 192.169.0.0 100.63.255.255 "
            "100.128.0.0 0.0.0.0 224.0.0.251 :: ::2 2001:db8::1 fec0::1 ::ffff:8.8.8.8"
        )
        known = set(local.split())
        for host in (*known, *strange.split()):
            with self.subTest(host):
                verdicts = {self.judge(host) for _ in range(9)}
                self.assertEqual(verdicts, {SERVED if host in known else STRANGE})
                self.assertEqual(self.found.admits(host), host in known)
        self.assertEqual(self.found.free, known)

    def test_allow_replaces_the_default_and_may_be_open_to_strangers(self) -> None:
        found = self.admission(allow=(dotproxy.parse_network("198.51.100.0/24"),))

        hosts = STRANGER, f"::ffff:{STRANGER}", "10.0.0.1"
        self.assertEqual([found.admits(host) for host in hosts], [True, True, False])
        for texts, expected in (
            ("0.0.0.0/0 ::/0 128.0.0.0/1 2000::/3 8.0.0.0/7 10.0.0.0/7", True),
            ("8.0.0.0/8 fc00::/7 fd00::/8 192.0.2.0/24 2001:db8::/32", False),
        ):
            for network in map(dotproxy.parse_network, texts.split()):
                with self.subTest(network):
                    self.assertEqual(dotproxy.is_open(network), expected)
        with self.assertLogs(dotproxy.logger, "WARNING") as logged:
            dotproxy.warn_of_strangers(configured("--allow", "2000::/3"))
        self.assertIn("open to strangers", logged.output[0])

    def test_public_client_over_its_rate_slips_every_second_query(self) -> None:
        self.found = self.admission(5, allow=EVERYWHERE)

        verdicts = [self.judge(STRANGER, 7.0) for _ in range(14)]

        self.assertEqual(verdicts, [SERVED] * 10 + [SLIPPED, LIMITED] * 2)
        self.assertEqual(self.judge(STRANGER, 7.2), SERVED)
        times = [1e6 + n / 200 for n in range(2000)]
        taken = sum(self.judge(STRANGER, now) == SERVED for now in times)
        self.assertAlmostEqual(taken, 10 + 50, delta=1)

    def test_rate_is_that_of_an_ipv4_address_or_an_ipv6_56(self) -> None:
        everybody = {"allow": EVERYWHERE, "rate_limit_all": True}
        self.found = self.admission(0.5, **everybody)
        for host, verdict in (
            *((STRANGER, SERVED), ("2001:db8:0:1::1", SERVED), (STRANGER, SLIPPED)),
            *((f"::ffff:{STRANGER}", LIMITED), ("198.51.100.2", SERVED)),
            *(("2001:db8:0:ff::9", SLIPPED), ("2001:db8:0:100::1", SERVED)),
            *(("127.0.0.1", SERVED), ("127.0.0.1", LIMITED)),
        ):
            with self.subTest(host):
                self.assertEqual(self.judge(host), verdict)

        self.found = self.admission(0, **everybody)  # nobody's
        self.assertEqual(self.judge(STRANGER), SERVED)
        self.assertIn(STRANGER, self.found.free)
        self.assertEqual(self.found.pace(STRANGER, 1000, 0.0), (1000, 0.0))

    def test_streams_have_their_own_rate_and_take_a_query_in_advance(self) -> None:
        self.found = self.admission(10, allow=EVERYWHERE)
        for _ in range(100):  # forged
            self.judge(STRANGER, 3.0)

        for count, taken, ready_at in ((19, 19, 1.05), (9, 1, 2.95), (9, 1, 3.05)):
            got = self.found.pace(STRANGER, count, 3.0)
            self.assertEqual(got[0], taken)
            self.assertAlmostEqual(got[1], ready_at)

    def test_what_is_remembered_is_bounded(self) -> None:
        bounds = mock.patch.multiple(dotproxy.RateLimiter, MAX_PREFIXES=2)
        with bounds, mock.patch.object(dotproxy.Admission, "MAX_KNOWN", 10):
            self.found = self.admission(0.5, allow=EVERYWHERE)
            for number in range(25):
                self.judge(f"10.0.0.{number}")
            a, b, c = (f"198.51.100.{number}" for number in range(3))
            verdicts = [self.judge(host) for host in (a, b, a, c, a, b)]

        self.assertEqual(len(self.found.free), 5)
        # The longest unused is forgotten first: that is `b`, when `c` comes.
        self.assertEqual(verdicts, [SERVED, SERVED, SLIPPED, SERVED, LIMITED, SERVED])

    def test_short_answers_fit_their_query_and_say_why(self) -> None:
        def short(rate: float, message: bytes) -> Message:
            self.found = self.admission(rate, allow=EVERYWHERE if rate < 1 else ())
            verdict = ""
            while not verdict:
                verdict, got = self.found.verdict(message, STRANGER, 0.0)
            self.assertLessEqual(len(got), len(message))
            return parse(got)

        for asked, options in (
            (query("wWw.example", id=7), None),
            (query(id=7, do=True), []),
            (query(id=7, do=True, options=option(PADDING, b"1")), []),
            (query(id=7, do=True, options=option(PADDING, b"12")), [(EDE, b"\0\x12")]),
        ):
            refused, cut = short(50, asked), short(0.5, asked)
            with self.subTest(asked):
                self.assertEqual((refused.id, refused.rcode), (7, Rcode.REFUSED))
                self.assertEqual(refused.opt and refused.opt.options, options)
                self.assertEqual((cut.id, cut.rcode, cut.flags & TC), (7, 0, TC))
                self.assertEqual(cut.question, parse(asked).question)
                self.assertEqual((cut.answers, cut.opt is None), ([], options is None))
        bare = short(50, b"\0\7" + bytes(10))  # it cannot be parsed
        self.assertEqual((bare.id, bare.rcode, len(bare.raw)), (7, Rcode.REFUSED, 12))
        seeds = [
            *(query(), query(LONGEST_NAME), query(b"\0", 255)),
            query(do=True, options=option(COOKIE, bytes(8))),
            query("a", "AXFR", do=False, edns_version=1),
        ]
        for message in filter(dotproxy.answerable, damaged(seeds, 500)):
            short(50, message)
            short(0.5, message)


# ---- Servers -------------------------------------------------------------------------
# The contract holds whatever the transport: the classes behind it say how to ask.


class UDPv4ContractTest(DotproxyTestCase):
    """What every server does, whatever its transport."""

    host = LOCALHOST
    options: tuple[str, ...] = ()

    def connect(self, served: Served) -> Client:
        return UDPClient(served.address)

    def serve(self, script: Reply = answer) -> Any:
        return serving(script, *self.options, host=self.host)

    def test_answer_is_to_the_question_as_it_was_asked(self) -> None:
        def some(message: Message, _: FakeConnection) -> Reply:
            absent = message.qname.startswith("no")
            negative = response(message.raw, rcode=3, authority=[soa()])
            return negative if absent else "192.0.2.1"

        with self.serve(some) as served, self.connect(served) as client:
            for name, do, rcode in (
                *(("wWw.ExAmPlE.cOm", None, 0), ("www.example.com", False, 0)),
                *(("WWW.example.com", True, 0), ("no.example.com", None, 3)),
            ):
                client.send(query(name, do=do))
                got = parse(client.receive())
                with self.subTest(name):
                    self.assertEqual((got.rcode, got.qname), (rcode, name))
                    self.assertEqual(got.addresses, [] if rcode else ["192.0.2.1"])
                    self.assertEqual([r.type for r in got.authority], [6] * bool(rcode))
                    self.assertEqual(got.opt is None, do is None)

    def test_what_is_not_for_the_upstream_is_answered_at_once(self) -> None:
        ixfr = query(rrtype=251)[12:] + soa() + record(".", OPT, b"")
        plain = (
            (query("a.LocalHost"), Rcode.NOERROR),
            (query("a.onion", do=True), Rcode.NXDOMAIN),
            (query(opcode=4), Rcode.NOTIMP),
            (query(do=False, edns_version=1), Rcode.BADVERS),
            (query(rrtype="AXFR"), Rcode.REFUSED),
            (query(rrtype="AXFR", do=True), Rcode.REFUSED),
            (query("a", "AXFR", do=True, edns_version=1), Rcode.BADVERS),
            (query(rrtype=251), Rcode.REFUSED),
            (counted(1, 0, 1, 1, body=ixfr), Rcode.REFUSED),
        )
        malformed = ((each, Rcode.FORMERR) for each in MALFORMED_QUERIES.values())
        with self.serve() as served, self.connect(served) as client:
            for message, rcode in (*plain, *malformed):
                client.send(message)
                got = parse(client.receive())
                with self.subTest(message):
                    self.assertEqual(got.raw[:2], message[:2])
                    self.assertEqual(got.rcode, rcode)
                    if rcode != Rcode.FORMERR:
                        self.assertEqual(got.opt is None, parse(message).opt is None)

        self.assertEqual(served.upstream.queries, [])

    def test_message_that_deserves_no_answer_gets_none(self) -> None:
        with self.serve() as served, self.connect(served) as client:
            client.send(response(query(id=1), "192.0.2.1"))
            client.send(*[query()[:size] for size in range(12)], query(id=2))
            self.assertEqual(parse(client.receive()).id, 2)

    def test_many_questions_in_flight_are_asked_once_and_get_their_answers(
        self,
    ) -> None:
        hold = Hold(lambda message, _: f"192.0.2.{message.qname.split('.')[0]}")
        with self.serve(hold) as served, self.connect(served) as client:
            client.send(*[query(f"{n % 100}.example", id=n) for n in range(200)])
            served.wait_for_in_flight(200)
            hold.release(100, reverse=True)
            answers = [parse(client.receive()) for _ in range(200)]

        found = sorted((got.id, *got.addresses) for got in answers)
        self.assertEqual(found, [(n, f"192.0.2.{n % 100}") for n in range(200)])
        self.assertEqual(len(served.upstream.queries), 100)

    def test_what_has_come_by_the_end_is_answered(self) -> None:
        gate = threading.Event()  # until it opens, the loops come round once more
        wait = functools.partial(gate.wait, 5)
        held = mock.patch.object(dotproxy.Listener, "service_actions", lambda _: wait())
        with self.serve() as served:
            clients = [self.connect(served)]  # which shakes hands, if any does
            with held:
                more = 0 if self.options else 99
                clients += [self.connect(served) for _ in range(more)]
                for client in clients:
                    self.addCleanup(client.socket.close)
                    client.send(query("a.example"), query("b.example"))
                closing = threading.Thread(target=served.daemon.close)
                closing.start()
                gate.set()
                for client in clients * 2:
                    self.assertEqual(parse(client.receive()).rcode, 0)
                closing.join()


class UDPv6ContractTest(UDPv4ContractTest):
    host = LOCALHOST_V6


class TCPContractTest(UDPv4ContractTest):
    def connect(self, served: Served) -> Client:
        return TCPClient(served.address)


class DoTContractTest(UDPv4ContractTest):
    options = ENCRYPTED

    def connect(self, served: Served) -> Client:
        return TLSClient(served.tls_address)


def link_local_addresses() -> list[str]:
    """Return those of this host, each with its zone, or skip the test."""
    table, found = pathlib.Path("/proc/net/if_inet6"), []
    for line in table.read_text().splitlines() if table.exists() else ():
        digits, *_, zone = line.split()
        if digits.startswith("fe80"):
            found.append(f"{ipaddress.IPv6Address(bytes.fromhex(digits))}%{zone}")
    if not found:
        raise unittest.SkipTest("no interface has a link-local address")
    return found


class ListenerTest(DotproxyTestCase):
    def test_link_local_address_is_served_and_told_with_its_zone(self) -> None:
        for host in link_local_addresses():
            with self.subTest(host), serving(host=f"[{host}]:0") as served:
                self.assertEqual(served.address[0], host)
                where = socket.getaddrinfo(*served.address)[0][4]  # zone as number
                udp = self.have(UDPClient(where))  # type: ignore[arg-type]
                for client in (udp, self.have(TCPClient(served.address))):
                    client.send(query())
                    self.assertEqual(parse(client.receive()).rcode, 0)

    def test_port_is_shared_through_restarts_without_a_loss(self) -> None:
        def ask_all() -> None:
            for number in range(500):
                kind = UDPClient if number % 10 else TCPClient
                with kind(address) as client:
                    client.send(query(f"{number}.example", id=number))
                    ids.append(parse(client.receive()).id)

        def wait_for(count: int) -> None:
            wait_until(lambda: len(ids) > count)

        ids: list[int] = []
        asking = threading.Thread(target=ask_all)
        patient = mock.patch.object(dotproxy.Clients, "FIRST", 5.0)
        with patient, contextlib.ExitStack() as stack:
            old = stack.enter_context(serving(answer, "--reuse-port"))
            address = old.address
            asking.start()
            for goal in (50, 200, 350):
                late = stack.enter_context(TCPClient(address, 30))
                same = f"[{address[0]}]:{address[1]}"
                new = stack.enter_context(serving(answer, "--reuse-port", host=same))
                wait_for(goal)
                closing = threading.Thread(target=old.daemon.close)
                closing.start()
                wait_for(len(ids) + 30)
                late.send(query())
                self.assertEqual(parse(late.receive()).rcode, 0)
                closing.join()
                old = new
            asking.join()

        self.assertEqual(ids, list(range(500)))


class UDPServerTest(DotproxyTestCase):
    def test_answer_leaves_from_the_address_in_the_packet_information(self) -> None:
        one, two = (socket.inet_aton(f"192.0.2.{number}") for number in (1, 2))
        for local, destination, source in (
            *((one, one, one), (one, two, one)),  # Linux, the latter of a broadcast
            (bytes(4), two, two),  # macOS
        ):
            found = dotproxy.reply_from(b"\4\0\0\0" + local + destination)
            self.assertEqual(found, bytes(4) + source + bytes(4))

    @unittest.skipUnless(sys.platform == "linux", "needs all of 127.0.0.0/8")
    def test_wildcard_socket_answers_a_batch_from_the_addresses_asked(self) -> None:
        for wildcard, hosts in (
            ("0.0.0.0", ("127.0.0.1", "127.0.0.2", "127.1.2.3")),
            ("::", (LOCALHOST_V6,)),
        ):
            running = serving(host=f"[{wildcard}]:0")
            with self.subTest(wildcard), running as served:
                port = served.address[1]
                for number, host in enumerate(hosts * 9):
                    client = self.have(UDPClient((host, port)))
                    client.send(query(f"{number}.example"), query("same.example"))
                    for _ in range(2):
                        self.assertEqual(parse(client.receive()).rcode, 0)
                if wildcard == "::":  # IPv4 is left to others
                    socket.create_server(("0.0.0.0", port)).close()

    def test_burst_of_2000_queries_is_answered_to_the_last(self) -> None:
        with serving(answer, "--timeout=60") as served:
            served.upstream.wait_for(lambda u: u.handshakes == 1)
            clients = [self.have(UDPClient(served.address, 30)) for _ in range(20)]
            for number in range(100):
                for index, client in enumerate(clients):
                    client.send(query(f"{number}-{index}.example", id=number))
            for client in clients:
                ids = sorted(parse(client.receive()).id for _ in range(100))
                self.assertEqual(ids, list(range(100)))


class TurningAwayTest(DotproxyTestCase):
    def test_strangers_are_refused_20_times_then_ignored(self) -> None:
        asked = query(do=True, options=option(PADDING, bytes(99)))
        allow = "--allow=192.0.2.0/24", "--route=example.com=tcp://127.0.0.1:1"
        with serving(answer, *allow) as served:
            with UDPClient(served.address) as udp, TCPClient(served.address) as tcp:
                udp.send(response(query(id=1), "192.0.2.1"), *[asked] * 30)
                answers = [parse(udp.receive()) for _ in range(20)]
                self.assertRaises((EOFError, ConnectionError), tcp.receive)
                udp.socket.settimeout(0.05)
                self.assertRaises(socket.timeout, udp.receive)
            names = [thread.name for thread in threading.enumerate()]
            counted = "dotproxy_turned_away_total", ("acl",), 31
            self.assertIn(counted, served.tcp.proxy.metrics.samples())

        found = {(got.id, got.rcode, *extended_errors(got)) for got in answers}
        self.assertEqual(found, {(parse(asked).id, Rcode.REFUSED, 18)})
        self.assertFalse([name for name in names if name.startswith("stream")])

    def test_stream_over_its_rate_is_served_later_and_neither_idle_nor_busy(
        self,
    ) -> None:
        # At 100 queries/s, 200 at once, the next is served when half a token is there.
        clock = mock.Mock(wraps=time.monotonic)
        with (
            mock.patch.object(dotproxy, "elapsed", clock),
            mock.patch.object(dotproxy.TCPServer, "idle_timeout", 0.1),
            serving(answer, "--rate-limit=100", "--rate-limit-all") as served,
            TCPClient(served.address) as client,
        ):
            started = time.monotonic()
            client.send(*[query(id=n) for n in range(216)])
            ids = {parse(client.receive()).id for _ in range(216)}
            self.assertGreater(time.monotonic() - started, 0.154)
            other = self.have(TCPClient(served.address))
            other.send(*[query(id=n) for n in range(5)])
            other.half_close()
            ids |= {1000 + parse(other.receive()).id for _ in range(5)}
            self.assertGreater(time.monotonic() - started, 0.204)
            self.assertRaises((EOFError, ConnectionError), client.receive)
            self.assertGreater(time.monotonic() - started, 0.254)

        self.assertEqual(ids, {*range(216), *range(1000, 1005)})
        self.assertLess(clock.call_count, 1000)

    def test_slowed_stream_does_not_hold_up_the_end(self) -> None:
        options = "--rate-limit=1", "--rate-limit-all", "--timeout=0.1"
        with serving(answer, *options) as served:
            client = self.have(TCPClient(served.address))
            client.send(*[query(id=n) for n in range(99)])
            self.assertEqual([parse(client.receive()).id for _ in range(2)], [0, 1])
            started = time.monotonic()
            served.daemon.close()

        self.assertLess(time.monotonic() - started, 5.0)


def slow_name(hold: Hold) -> Script:
    """Hold the answers to slow names, and give all others at once."""
    return lambda message, _: hold if message.qname.startswith("slow") else answer


def large(message: Message, _: FakeConnection) -> bytes:
    """Answer with 60,000 octets."""
    return response(message.raw, record(b"\xc0\x0c", "TXT", bytes(60_000)))


class TCPServerTest(DotproxyTestCase):
    many = 3000  # queries at once

    def assert_served(self, client: Client, name: str = "www.example.com") -> None:
        client.send(query(name))
        self.assertEqual(parse(client.receive()).qname, name)

    def assert_closed(self, client: TCPClient) -> None:
        with self.assertRaises((EOFError, ConnectionResetError)):
            client.receive()

    def is_alone(self, served: Served) -> bool:
        """Tell whether one client is connected, and none had to make room."""
        return [s[2] for s in served.tcp.services.clients.samples() if s[2]] == [1]

    def client(self, served: Served, source: str = "") -> TCPClient:
        """Return a client that the server has answered once; closed after the test."""
        client = self.have(TCPClient(served.address, 20, source=source))
        self.assert_served(client)
        return client

    def test_message_split_anywhere_is_answered(self) -> None:
        message = frame(query())
        with serving() as served:
            client = self.client(served)
            for cut in range(1, len(message)):
                with self.subTest(cut=cut):
                    client.send_raw(message[:cut])
                    client.send_raw(message[cut:])
                    self.assertEqual(parse(client.receive()).rcode, 0)

    def test_slow_names_hold_back_no_other_query(self) -> None:
        for slow, count in ((1, self.many), (200, 600)):
            hold = Hold()
            running = serving(slow_name(hold), "--timeout=60")
            with self.subTest(slow=slow), running as served:
                client = TCPClient(served.address, 60)
                names = [f"slow{n}.example" for n in range(slow)]
                names += [f"{n}.example" for n in range(count)]
                asked = [query(name, id=id) for id, name in enumerate(names)]
                with client, mock.patch.object(dotproxy.StreamHandler, "MOMENT", 60.0):
                    client.send(*asked)  # that many fit into the kernel's buffers
                    ids = {parse(client.receive()).id for _ in range(count)}
                    self.assertEqual(ids, set(range(slow, slow + count)))
                    hold.release(slow)
                    ids = {parse(client.receive()).id for _ in range(slow)}
                    self.assertEqual(ids, set(range(slow)))

    def test_client_that_sends_less_than_a_header_is_parted_with(self) -> None:
        with serving() as served:
            for size in (0, 1, 11):
                client = self.have(TCPClient(served.address, 5))  # at once, that is
                client.send_raw(frame(bytes(size)))
                with self.subTest(size):
                    self.assert_closed(client)

    def test_half_closed_client_still_gets_its_answers(self) -> None:
        hold = Hold()
        with serving(hold) as served, TCPClient(served.address) as client:
            client.send(query("a.example", id=1), query("b.example", id=2))
            client.half_close()
            hold.release(2)
            self.assertEqual({parse(client.receive()).id for _ in range(2)}, {1, 2})
            self.assert_closed(client)

    def test_end_of_the_last_answer_reaches_a_half_closed_client(self) -> None:
        left = threading.Event()
        finish = dotproxy.StreamHandler.finish

        def leave(handler: dotproxy.StreamHandler) -> None:
            left.set()
            finish(handler)

        def hesitate(channel: dotproxy.Channel, octets: bytes) -> bytes:
            if len(octets) > 60_000:  # in TLS as well: its lock is the reader's
                socket.socket.shutdown(client.socket, socket.SHUT_WR)
                left.wait(0.1)  # for the reading thread to find that all is done
            return encrypt(channel, octets)

        encrypt = dotproxy.Channel.encrypt
        with (
            serving(large) as served,
            mock.patch.object(dotproxy.StreamHandler, "finish", leave),
            mock.patch.object(dotproxy.Channel, "encrypt", hesitate),
        ):
            served.tcp.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
            with TCPClient(served.address) as client:
                client.send(query())
                self.assertGreater(len(client.receive()), 60_000)

    def test_answers_beyond_what_the_client_may_leave_unread_all_come(self) -> None:
        lasting = mock.patch.object(dotproxy.TCPServer, "idle_timeout", 60.0)
        with lasting, serving(large) as served:
            served.tcp.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
            client = self.client(served)
            for names in (["www.example.com"] * 50, ["a.test", "b.test", "c.test"]):
                client.send(*[query(name, id=id) for id, name in enumerate(names)])
                ids = sorted(parse(client.receive()).id for _ in names)
                self.assertEqual(ids, list(range(len(names))))

    def test_idle_client_is_closed_unless_it_waits_for_an_answer(self) -> None:
        hold, clock = Hold(), Clock()
        running = serving(slow_name(hold))
        with running as served, mock.patch.object(dotproxy, "elapsed", clock):
            client, waiting = self.client(served), self.client(served)
            waiting.send(query("slow.example"))
            served.wait_for_in_flight(1)
            for _ in range(3):
                clock.advance(9)
                self.assert_served(client)
            clock.advance(9)
            client.send_raw(b"\0")  # part of a query does not help
            clock.advance(2)
            with contextlib.suppress(ConnectionError):  # it may be closed by now
                client.send_raw(b"\x20")
            self.assert_closed(client)
            hold.release()
            self.assertEqual(parse(waiting.receive()).qname, "slow.example")

    def test_client_too_many_takes_the_place_of_the_longest_idle(self) -> None:
        hold = Hold()
        with serving(slow_name(hold), "--max-tcp-clients=3") as served:
            busy, first, second = (self.client(served) for _ in range(3))
            busy.send(query("slow.example"))
            served.wait_for_in_flight(1)
            for client in (second, first):
                self.assert_served(client)
            third = self.client(served)

            self.assert_closed(second)
            self.assert_served(first)
            self.assert_served(third)
            hold.release()
            self.assertEqual(parse(busy.receive()).qname, "slow.example")

    @unittest.skipUnless(sys.platform == "linux", "needs all of 127.0.0.0/8")
    def test_bound_per_address_spares_the_other_addresses(self) -> None:
        with serving(answer, "--max-tcp-per-client=1") as served:
            other = self.client(served, source="127.0.0.2")
            first = self.client(served)
            second = self.client(served)

            self.assert_closed(first)
            self.assert_served(other)
            self.assert_served(second)

    def test_client_that_waits_for_a_thread_counts_and_makes_room(self) -> None:
        submit = mock.Mock(return_value=True)
        with serving(answer, "--max-tcp-per-client=1") as served:
            with (
                mock.patch.object(dotproxy.WorkerPool, "submit", submit),
                socket.create_connection(served.address, 5) as first,
                socket.create_connection(served.address, 5),
            ):
                self.assertEqual(first.recv(1), b"")
            for call in submit.call_args_list:
                call.args[0]()

    def test_client_that_no_thread_can_serve_is_closed_and_not_counted(self) -> None:
        no_thread = mock.patch.object(dotproxy.WorkerPool, "submit", return_value=False)
        with serving(answer, "--max-tcp-per-client=1") as served:
            with no_thread, socket.create_connection(served.address, 5) as client:
                self.assertEqual(client.recv(1), b"")
            self.client(served)
            _, _, turned_away = next(served.tcp.services.clients.samples())
            self.assertEqual(turned_away, 0)

    def test_lack_of_descriptors_pauses_and_who_was_reset_is_dropped(self) -> None:
        listener, request = mock.Mock(), mock.Mock()
        full = OSError(errno.EMFILE, "Too many open files")
        listener.accept.side_effect = full, (request, None)  # the latter: as macOS does
        pause = self.have(mock.patch.object(time, "sleep"))
        with self.assertLogs(dotproxy.logger, "WARNING") as logged:
            self.assertRaises(OSError, dotproxy.accept, listener)
            self.assertRaises(ConnectionAbortedError, dotproxy.accept, listener)

        pause.assert_called_once_with(dotproxy.SHORTAGE_PAUSE)
        self.assertIn("Too many open files", logged.output[0])
        request.close.assert_called_once_with()

    def test_client_that_never_reads_is_dropped_while_another_is_served(self) -> None:
        for stall, unsent in ((0.1, 1 << 30), (60.0, 1 << 18)):  # either is enough
            with (
                self.subTest(stall=stall),
                mock.patch.object(dotproxy.StreamHandler, "PATIENCE", stall),
                mock.patch.object(dotproxy.StreamHandler, "MAX_UNSENT", unsent),
                serving(by_name({"large.example": large})) as served,
            ):
                deaf, other = self.client(served), self.client(served)
                names = [query("large.example", id=n) for n in range(200)]
                deaf.send(*names)
                self.assert_served(other)
                served.wait_for_in_flight(0)
                wait_until(functools.partial(self.is_alone, served))
                self.assert_served(other)

    def test_query_too_large_to_send_on_harms_no_other(self) -> None:
        room = 65535 - len(query(do=True, options=option(UNKNOWN_OPTION)))
        for size in (room, room - 100):
            huge = query(do=True, options=option(UNKNOWN_OPTION, bytes(size)))
            with self.subTest(size=size), serving() as served:
                with TCPClient(served.address) as client:
                    client.send(huge)
                    with contextlib.suppress(EOFError, ConnectionError):
                        client.receive()
                self.client(served)
                served.wait_for_in_flight(0)


# ---- Encrypted clients ---------------------------------------------------------------


class ServedOverTLS(Served):
    """A running proxy whose first stream server is the one for encrypted clients."""

    @property
    def tcp(self) -> dotproxy.TCPServer:
        """The server for encrypted clients."""
        return self.tls


class TLSStreamTest(TCPServerTest):
    """All that holds for TCP clients holds for encrypted ones."""

    many = 1000

    def setUp(self) -> None:
        super().setUp()
        self.serving = serving
        here = sys.modules[__name__]
        self.have(mock.patch.object(here, "TCPClient", TLSClient))
        self.have(mock.patch.object(here, "serving", self.serving_over_tls))

    @contextlib.contextmanager
    def serving_over_tls(
        self, script: Reply = answer, *options: str
    ) -> Iterator[Served]:
        with self.serving(script, *ENCRYPTED, *options) as served:
            yield ServedOverTLS(*served)


class TLSServerTest(DotproxyTestCase):
    PADDED = PaddingTest.PADDED

    def ask(self, client: Client, message: bytes) -> Message:
        client.send(message)
        return parse(client.receive())

    def assert_served(self, client: Client) -> None:
        self.assertEqual(self.ask(client, query()).rcode, 0)

    def assert_orderly_end(self, client: TLSClient) -> None:
        """Check that close_notify comes before the end of the stream."""
        client.socket.settimeout(5)
        self.assertEqual(client.socket.recv(1), b"")

    def test_answer_is_padded_on_request_over_tls_alone(self) -> None:
        def some(message: Message, _: FakeConnection) -> Reply:
            refused = message.qname.startswith("refused")
            return response(message.raw, rcode=5) if refused else large

        padded = query("refused.example", do=False, options=option(PADDING))
        asked = query(do=False, options=option(KEEPALIVE))

        with serving(some, *ENCRYPTED) as served:
            client = self.have(TLSClient(served.tls_address))
            sizes = [len(self.ask(client, each).raw) for each in (self.PADDED, padded)]
            self.assertEqual(sizes, [60_000 // 468 * 468 + 468, 468])
            got = self.ask(client, asked)
            self.assertGreater(len(got.raw) % 468, 0)
            assert got.opt is not None
            self.assertEqual(got.opt.options, [(KEEPALIVE, b"\0\x64")])
            for kind in (TCPClient, UDPClient):
                with kind(served.address) as other:
                    for asked in (self.PADDED, padded):
                        self.assertGreater(len(self.ask(other, asked).raw) % 468, 0)

    def test_alpn_dot_is_selected_and_its_absence_is_served(self) -> None:
        with serving(answer, *ENCRYPTED) as served:
            for offered, selected in (
                *((["dot"], "dot"), (["h2", "dot"], "dot"), ([], None)),
                (["h2", "http/1.1"], None),  # Python cannot refuse it
            ):
                client = TLSClient(served.tls_address, context=trusting(offered))
                with self.subTest(offered=offered), client:
                    self.assertEqual(client.tls.selected_alpn_protocol(), selected)
                    self.assert_served(client)

    def test_session_is_resumed_until_the_certificate_is_read_again(self) -> None:
        with serving(answer, *ENCRYPTED) as served:
            identity = served.tls.services.identity
            assert identity is not None
            for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
                context = trusting()
                context.minimum_version = context.maximum_version = version
                client = TLSClient(served.tls_address, context=context)
                with self.subTest(version=version), client:
                    for resumed in (True, False):
                        self.assert_served(client)
                        with client.again() as other:
                            self.assertEqual(other.tls.session_reused, resumed)
                            self.assert_served(other)
                        identity.reload()

    def test_version_before_1_2_is_refused_with_an_alert(self) -> None:
        context = trusting()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = ssl.TLSVersion.TLSv1
            context.maximum_version = ssl.TLSVersion.TLSv1_1
        context.set_ciphers("ALL:@SECLEVEL=0")
        refused = self.assertRaisesRegex(ssl.SSLError, "PROTOCOL_VERSION")
        with serving(answer, *ENCRYPTED) as served, refused:
            TLSClient(served.tls_address, context=context)

    def answer_to(self, octets: bytes, server: Address, early: int) -> Message:
        """Send octets, so many `early`, with the last ones of the handshake."""
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = trusting().wrap_bio(incoming, outgoing, False, "dot.test")
        with socket.create_connection(server, 5) as raw:

            def take(step: Callable[[], T]) -> T:
                while True:
                    try:
                        return step()
                    except ssl.SSLWantReadError:
                        raw.sendall(outgoing.read())
                        incoming.write(raw.recv(65536))

            take(tls.do_handshake)
            tls.write(octets[:early])
            raw.sendall(outgoing.read())
            tls.write(octets[early:])
            return parse(take(lambda: tls.read(65536))[2:])

    def test_what_comes_with_the_handshake_is_served(self) -> None:
        octets = frame(query())
        with serving(answer, *ENCRYPTED) as served:
            for early in (len(octets), 9, 1):
                with self.subTest(early):
                    got = self.answer_to(octets * 2, served.tls_address, early)
                    self.assertEqual(got.rcode, 0)

    def test_handshake_that_does_not_end_is_cut_off(self) -> None:
        patience = mock.patch.object(dotproxy.StreamHandler, "PATIENCE", 0.05)
        with patience, serving(answer, *ENCRYPTED) as served:
            for octets in (b"", bytes.fromhex("1603010200010001fc0303")):
                client = socket.create_connection(served.tls_address, 5)
                with self.subTest(octets=octets), client:
                    client.sendall(octets)
                    self.assertEqual(client.recv(1), b"")

    def test_garbage_ends_it_and_harms_nobody(self) -> None:
        hold = Hold()
        with serving(slow_name(hold), *ENCRYPTED) as served:
            client, broken = (
                self.have(TLSClient(served.tls_address)) for _ in range(2)
            )
            for octets in (frame(query()), b"GET / HTTP/1.1\r\n\r\n", bytes(3000)):
                stranger = self.have(TCPClient(served.tls_address))
                stranger.send_raw(octets)
                with self.subTest(octets[:20]):
                    self.assertRaises((EOFError, ConnectionError), stranger.receive)
            broken.send(query("slow.example"))
            served.wait_for_in_flight(1)
            os.write(broken.socket.fileno(), b"\x17\x03\x03\0\x20" + bytes(32))
            self.assertRaisesRegex(ssl.SSLError, "BAD_RECORD_MAC", broken.receive)
            hold.release()
            served.wait_for_in_flight(0)
            self.assert_served(client)

    def test_handshakes_wait_for_their_turn_and_clients_do_not(self) -> None:
        with serving(answer, *ENCRYPTED) as served:
            client = self.have(TLSClient(served.tls_address))
            self.assert_served(client)
            with served.tls.turns:
                self.assertRaises(socket.timeout, TLSClient, served.tls_address, 0.05)
                self.assert_served(client)

    def test_unfinished_handshake_makes_room_before_any_client(self) -> None:
        with serving(answer, *ENCRYPTED, "--max-tcp-clients=2") as served:
            client = self.have(TLSClient(served.tls_address))
            self.assert_served(client)
            unfinished = self.have(TCPClient(served.tls_address))
            other = self.have(TLSClient(served.tls_address))

            self.assertEqual(unfinished.socket.recv(1), b"")
            self.assert_served(client)
            self.assert_served(other)

    def test_end_is_told_to_who_makes_room_is_idle_or_is_there_at_the_end(self) -> None:
        with serving(answer, *ENCRYPTED, "--max-tcp-clients=1") as served:
            client = self.have(TLSClient(served.tls_address))
            self.assert_served(client)
            other = self.have(TCPClient(served.address))
            self.assert_orderly_end(client)
            self.assert_served(other)
        short = mock.patch.object(dotproxy.TCPServer, "idle_timeout", 0.1)
        with short, serving(answer, *ENCRYPTED) as served:
            self.assert_orderly_end(self.have(TLSClient(served.tls_address)))
        with serving(answer, *ENCRYPTED) as served:
            client = self.have(TLSClient(served.tls_address))
            self.assert_served(client)
        self.assert_orderly_end(client)


def rotate(path: str, source: str) -> None:
    """Replace what is in one file by what is in another."""
    with open(source, "rb") as new, open(path, "wb") as file:
        file.write(new.read())


class IdentityTest(DotproxyTestCase):
    def test_what_clients_will_see_is_logged(self) -> None:
        good = "INFO", "names=dot.test,127.0.0.1", "until=Jan  1 00:00:00 2100 GMT"
        for chain, key, words in (
            *((PKI.good, None, good), (PKI.good_alone, PKI.key_alone, good)),
            (PKI.expired, None, ("WARNING", "certificate has expired")),
        ):
            with self.subTest(chain), self.assertLogs(dotproxy.logger) as logged:
                dotproxy.Identity(chain, key)
                (line,) = logged.output
                self.assertEqual([word for word in words if word not in line], [])

    def test_pair_that_cannot_be_used_is_one_line_that_says_why(self) -> None:
        absent = os.path.join(os.path.dirname(PKI.ca), "absent.pem")
        for chain, key, words in (
            (absent, None, [absent, "No such file", "--tls-cert"]),
            (PKI.good, absent, [absent, "No such file", "--tls-key"]),
            (os.path.dirname(absent), None, ["directory", "--tls-cert"]),
            (PKI.key_alone, PKI.key_alone, ["no certificate", PKI.key_alone]),
            (PKI.good_alone, None, ["no private key", PKI.good_alone, "--tls-key"]),
            (PKI.good, PKI.key2_alone, ["key values mismatch", PKI.key2_alone]),
            (PKI.good_alone, PKI.locked_key, ["passphrase", PKI.locked_key]),
        ):
            with self.subTest(chain=chain, key=key):
                with self.assertRaises(dotproxy.ConfigError) as caught:
                    dotproxy.Identity(chain, key)
                line = str(caught.exception)
                self.assertEqual([w for w in [*words, "; give"] if w not in line], [])
                self.assertNotIn("\n", line)

    def test_reload_survives_a_name_that_is_no_text(self) -> None:
        identity = dotproxy.Identity(PKI.good)
        with (
            mock.patch.object(ssl.SSLObject, "getpeercert", side_effect=no_text),
            self.assertLogs(dotproxy.logger, "WARNING") as logged,
        ):
            identity.reload()
        self.assertRegex(logged.output[0], "not replaced.*name .* is no text")

    def test_reload_replaces_the_pair_by_a_good_one_only(self) -> None:
        with tempfile.NamedTemporaryFile(suffix=".pem") as file:
            rotate(file.name, PKI.good)
            identity = dotproxy.Identity(file.name)
            before = identity.context
            for source in (PKI.good_alone, PKI.ca, dotproxy.__file__):
                rotate(file.name, source)
                with self.assertLogs(dotproxy.logger, "WARNING") as logged:
                    identity.reload()
                with self.subTest(source):
                    self.assertIs(identity.context, before)
                    self.assertEqual(len(logged.output), 1)
                    self.assertIn("certificate not replaced", logged.output[0])
            rotate(file.name, PKI.good2)
            identity.reload()

        self.assertIsNot(identity.context, before)


# ---- Host ----------------------------------------------------------------------------


class Rights:
    """The rights of a process that began as root, and how it gives them up."""

    def __init__(
        self, refusal: int = 0, *, uid: int = 0, able: bool = False, firm: bool = True
    ) -> None:
        self.uid, self.gid, self.groups = uid, uid, [0, 27]
        self.options: list[tuple[int, int]] = []  # of prctl, by who is not root
        self.core: object = None
        self.imported: list[str] = []  # by root
        self._refusal, self._able, self._firm = refusal, able, firm

    def renounce(self, user: str | None) -> str:
        """Have these given up instead of those of the tests."""
        c_library = types.SimpleNamespace(prctl=self._prctl)
        with contextlib.ExitStack() as stack:
            for target, name, new in (
                (os, "geteuid", lambda: self.uid),
                (os, "getegid", lambda: self.gid),
                (dotproxy, "has_capabilities", lambda: self._able),
                (os, "umask", lambda mask: 0o022),
                (os, "setgroups", lambda groups: self._set("groups", groups)),
                (os, "setgid", lambda gid: self._set("gid", gid)),
                (os, "setuid", lambda uid: self._set("uid", uid)),
                (resource, "setrlimit", self._set_limit),
                (importlib, "import_module", self._import),
                (ctypes, "CDLL", lambda name: c_library),
            ):
                stack.enter_context(mock.patch.object(target, name, new))
            return dotproxy.renounce_root(user)

    def _set(self, name: str, value: object) -> None:
        if (self.uid and self._firm) or self._refusal:
            raise OSError(self._refusal or errno.EPERM, "refused")
        setattr(self, name, value)

    def _set_limit(self, _: int, limits: object) -> None:
        self.core = limits

    def _import(self, name: str) -> None:
        if not self.uid:
            self.imported.append(name)
        raise ImportError("as another version's module would")

    def _prctl(self, option: int, *words: ctypes.c_ulong) -> None:
        if self.uid:
            self.options.append((option, words[0].value))


class PrivilegeTest(DotproxyTestCase):
    def test_root_becomes_who_is_wanted_for_good(self) -> None:
        nobody, entry = pwd.getpwnam("nobody"), pwd.getpwnam("daemon")
        group = grp.getgrnam("daemon").gr_gid
        for text, ids in (
            (None, (nobody.pw_uid, nobody.pw_gid)),
            ("daemon", (entry.pw_uid, entry.pw_gid)),
            (str(entry.pw_uid), (entry.pw_uid, entry.pw_gid)),
            ("4000000001", (4000000001, 4000000001)),
            ("4000000001:daemon", (4000000001, group)),
        ):
            with self.subTest(text):
                rights = Rights()
                name = rights.renounce(text)
                self.assertEqual(name, (text or "nobody").partition(":")[0])
                self.assertEqual((rights.uid, rights.gid), ids)
                self.assertEqual((rights.groups, rights.core), ([], (0, 0)))
                self.assertEqual(rights.imported, list(dotproxy.LATE_MODULES))
                self.assertEqual(sorted(rights.options), [(4, 0), (38, 1)])

    @unittest.skipUnless(
        sys.platform == "linux" and not os.geteuid(), "needs root, and /proc"
    )
    def test_process_that_was_root_has_no_rights_left(self) -> None:
        code = "import dotproxy; dotproxy.renounce_root('4000000001')"
        code += "; print(open('/proc/self/status').read())"
        command = [sys.executable, "-c", code]
        directory = os.path.dirname(dotproxy.__file__)

        status = subprocess.check_output(command, cwd=directory, text=True)

        for pattern in (
            *(r"Uid:(\s+4000000001){4}\n", r"Gid:(\s+4000000001){4}\n"),
            *(r"Groups:\s*\n", r"CapPrm:\s+0+\n", r"NoNewPrivs:\s+1\n"),
            r"Umask:\s+0077\n",
        ):
            self.assertRegex(status, pattern)

    def test_host_without_nobody_and_python_without_ctypes(self) -> None:
        rights, users = Rights(), mock.patch("pwd.getpwnam", side_effect=KeyError)
        with users, mock.patch.dict(sys.modules, {"ctypes": None}):
            rights.renounce(None)

        self.assertEqual((rights.uid, rights.gid), (65534, 65534))

    def test_user_that_cannot_be_is_refused_with_the_cure(self) -> None:
        able = Rights(errno.EPERM, able=True)
        for rights, user, status, words in (
            (Rights(), "no.such.user", 2, "no user or group 'no.such.user': give"),
            (Rights(), "nobody:no.such.group", 2, "no user or .*:no.such.group'"),
            (Rights(), "99999999999", 2, "no user"),
            (Rights(), ":daemon", 2, "no user or group ':daemon'"),
            (Rights(errno.EPERM), "daemon", 1, "user daemon.*CAP_SETUID.*--user root"),
            (able, None, 1, "user nobody.*CAP_SETUID.*--user root"),
            (Rights(uid=7), "daemon", 1, "only root can become user daemon: start as"),
            (Rights(firm=False), None, 1, "become root again"),
        ):
            refused = self.assertRaisesRegex(dotproxy.ConfigError, words)
            with self.subTest(user=user, words=words), refused as caught:
                rights.renounce(user)
            self.assertEqual(caught.exception.status, status)

    def test_who_cannot_give_up_root_or_is_not_root_stays(self) -> None:
        for rights, user, name in (
            (Rights(), "root", "root"),
            (Rights(), "0", "root"),
            (Rights(errno.EPERM), None, "root"),  # --cap-drop ALL
            (Rights(errno.EINVAL), None, "root"),  # a user namespace of one number
            (Rights(uid=4000000001), None, "4000000001"),
            (Rights(uid=4000000001), "4000000001:4000000001", "4000000001"),
        ):
            with self.subTest(user, name=name), contextlib.ExitStack() as stack:
                if name == "root":
                    stack.enter_context(self.assertLogs(dotproxy.logger, "WARNING"))
                ids = rights.uid, rights.gid
                self.assertEqual(rights.renounce(user), name)
                self.assertEqual((rights.uid, rights.gid), ids)
                self.assertEqual((rights.groups, rights.core), ([0, 27], (0, 0)))

    def test_no_module_is_imported_once_root_is_given_up(self) -> None:
        directory = os.path.dirname(dotproxy.__file__)
        with FakeUpstream() as upstream:
            names = ("dot.test", "other.test")
            where = [f"--upstream={LOCALHOST}:{upstream.port}#{name}" for name in names]
            options = ["--listen=127.0.0.1:0", "--admin=0", f"--ca-file={PKI.ca}"]
            command = [sys.executable, "-c", AT_WORK, *options, *where]
            output = subprocess.check_output(
                command, cwd=directory, text=True, stderr=subprocess.STDOUT, timeout=30
            )

        self.assertIn("certificate is for another name", output)
        self.assertIn("ZeroDivisionError", output)
        self.assertEqual(output.splitlines()[-1], "imported: []")


AT_WORK = """
import contextlib, importlib, logging, os, socket, sys, time, urllib.request, dotproxy
logging.basicConfig()
daemon = dotproxy.Daemon(dotproxy.parse_args(sys.argv[1:], {}))
for name in dotproxy.LATE_MODULES:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
before = set(sys.modules)
daemon.start()
query = bytes.fromhex("1234010000010000000000000161076578616d706c6503636f6d0000010001")
for server in daemon.servers:
    with socket.socket(type=server.socket_type) as client:
        client.settimeout(10)
        client.connect(server.server_address)
        stream = server.socket_type == socket.SOCK_STREAM
        client.send(len(query).to_bytes(2, "big") * stream + query)
        assert client.recv(512)
for path in ("/", "/metrics", "/grafana.json", "/nowhere"):
    with socket.create_connection(daemon.admin.server_address) as client:
        client.send(f"GET {path} HTTP/1.0\\r\\n\\r\\n".encode())
        assert client.recv(512)
try:
    1 / 0
except ZeroDivisionError:
    dotproxy.logger.exception("expected")
while "STATUS=1 of 2" not in daemon.report()[-1]:
    time.sleep(0.01)
daemon.log_state()
daemon.reload()
daemon.close()
print("imported:", sorted(set(sys.modules) - before))
"""


class DescriptorTest(DotproxyTestCase):
    def test_limit_is_raised_or_there_are_fewer_clients_and_a_warning(self) -> None:
        config = dotproxy.Config(listen=(("127.0.0.1", 53),))
        wanted, unlimited = dotproxy.count_descriptors(config), resource.RLIM_INFINITY
        domains = [(f"{n}.test", config.upstream[0]) for n in range(9)]
        routed = config._replace(route=tuple(domains))  # servers that it has already
        self.assertEqual(dotproxy.count_descriptors(routed), wanted)
        for soft, hard, most, clients in (
            (256, unlimited, wanted, 512),
            (wanted, 8192, 0, 512),
            (unlimited, unlimited, 0, 512),
            (256, wanted - 3, wanted - 3, 510),
            (256, 4096, 0, 512 - (wanted - 256 + 1) // 2),  # in a sandbox
        ):

            def limit(_: int, limits: Sequence[int], most: int = most) -> None:
                if limits[0] > most:
                    raise ValueError("not allowed to raise maximum limit")

            with (
                self.subTest(soft=soft, hard=hard, most=most),
                mock.patch.object(resource, "getrlimit", return_value=(soft, hard)),
                mock.patch.object(resource, "setrlimit", limit),
                contextlib.ExitStack() as stack,
            ):
                if clients < 512:
                    logs = stack.enter_context(self.assertLogs(dotproxy.logger))
                fitted = dotproxy.fit_descriptors(config)
                self.assertEqual(fitted.max_tcp_clients, clients)
        self.assertRegex(logs.output[-1], rf"limit=256 .*LimitNOFILE={wanted}")


@contextlib.contextmanager
def passed(*sockets: socket.socket, **variables: str) -> Iterator[dict[str, str]]:
    """Pass sockets as systemd does, but from PASSED up: yield the environment."""
    numbers = range(PASSED, PASSED + len(sockets))
    for number, each in zip(numbers, sockets):
        os.dup2(each.fileno(), number, inheritable=False)
        each.close()
    try:
        pid, count = str(os.getpid()), str(len(sockets))
        with mock.patch.object(dotproxy, "FIRST_PASSED", PASSED):
            yield {"LISTEN_PID": pid, "LISTEN_FDS": count, **variables}
    finally:
        for number in numbers:
            with contextlib.suppress(OSError):
                os.close(number)


PASSED = 900


def listener(kind: int, host: str = LOCALHOST) -> socket.socket:
    """Make a socket as systemd does for ListenDatagram= or ListenStream=."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, kind)
    made.bind((host, 0))
    if kind == socket.SOCK_STREAM:
        made.listen(1)
    return made


class InheritedSocketTest(DotproxyTestCase):
    def test_sockets_for_this_process_are_taken_with_their_names(self) -> None:
        for given, names in (
            ({"LISTEN_FDNAMES": "dns:tls"}, ["dns", "tls"]),
            ({}, ["", ""]),
            ({"LISTEN_PID": str(os.getppid())}, []),
        ):
            sockets = listener(socket.SOCK_DGRAM), listener(socket.SOCK_STREAM)
            with self.subTest(given), passed(*sockets, **given) as environment:
                found = dotproxy.inherited_sockets(environment)
                self.assertEqual([name for name, _ in found], names)
                self.assertEqual([s.type for _, s in found], [2, 1][: len(names)])
                os.fstat(PASSED)  # open as before
                for _, each in found:
                    each.close()

    def test_what_cannot_be_served_on_is_refused_and_the_others_closed(self) -> None:
        deaf, unix = socket.socket(), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        deaf.bind((LOCALHOST, 0))
        for words, sockets, count in (
            (f"descriptor {PASSED + 1} serves no address", [deaf], "2"),
            (f"descriptor {PASSED + 1} serves no address", [unix], "2"),
            ("LISTEN_FDS=2: .*Bad file descriptor; pass", [], "2"),
            ("LISTEN_FDS=x", [], "x"),
        ):
            good = listener(socket.SOCK_DGRAM)
            address = good.getsockname()
            refused = self.assertRaisesRegex(dotproxy.ConfigError, words)
            given = passed(good, *sockets, LISTEN_FDS=count)
            with self.subTest(words), given as environment, refused as caught:
                dotproxy.inherited_sockets(environment)
            self.assertEqual(caught.exception.status, 1)
            with socket.socket(type=socket.SOCK_DGRAM) as again:
                again.bind(address)

    def test_inherited_sockets_are_served_on_and_no_others(self) -> None:
        udp, tcp = listener(socket.SOCK_DGRAM), listener(socket.SOCK_STREAM)
        tls, more = listener(socket.SOCK_STREAM), listener(socket.SOCK_DGRAM)
        inherited = [("dns", udp), ("", tcp), ("tls", tls), ("tls", more)]
        with UDPClient(udp.getsockname()) as early:
            early.send(query())  # before the start
            served = self.have(serving(answer, ENCRYPTED[1], inherited=inherited))
            sockets = [server.socket for server in served.daemon.servers]
            self.assertEqual(sockets, [udp, tcp, tls, more])
            self.assertEqual(parse(early.receive()).addresses, ["192.0.2.1"])
        for kind, where in (TCPClient, tcp), (TLSClient, tls), (UDPClient, more):
            with kind(where.getsockname()) as client:
                client.send(query())
                self.assertEqual(parse(client.receive()).addresses, ["192.0.2.1"])
        with self.assertRaisesRegex(dotproxy.ConfigError, "needs a certificate"):
            dotproxy.load_identity(configured(), passed=True)

    @unittest.skipUnless(sys.platform == "linux", "needs all of 127.0.0.0/8")
    def test_inherited_wildcard_socket_answers_from_the_address_asked(self) -> None:
        udp = listener(socket.SOCK_DGRAM, "::")  # as with BindIPv6Only=both
        port = udp.getsockname()[1]
        with serving(inherited=[("", udp)]):
            for asked in ("::1", "127.1.2.3"):
                with self.subTest(asked), UDPClient((asked, port)) as client:
                    client.send(query())
                    self.assertEqual(parse(client.receive()).rcode, 0)


class Notifications:
    """A socket as systemd has one, and what was said to it."""

    def __init__(self, path: str = "") -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="dotproxy-")
        os.chmod(self._directory.name, 0o755)
        self.path = path or os.path.join(self._directory.name, "notify")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path.replace("@", "\0"))
        if not path:
            os.chmod(self.path, 0o777)
        self.socket.settimeout(10)

    def __enter__(self) -> Notifications:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        self._directory.cleanup()

    def next(self) -> str:
        """Wait for the next notification."""
        return self.socket.recv(4096).decode()


class SupervisorTest(DotproxyTestCase):
    def test_notification_is_one_datagram_and_nobody_there_is_no_trouble(self) -> None:
        abstract = [f"@dotproxy-test-{os.getpid()}"] * (sys.platform == "linux")
        for path in ("", *abstract):
            with self.subTest(path), Notifications(path) as heard:
                supervisor = dotproxy.Supervisor({"NOTIFY_SOCKET": heard.path})
                supervisor.tell("READY=1", "STATUS=well")
                self.assertEqual(heard.next(), "READY=1\nSTATUS=well")
                for _ in range(5000):  # until it is full
                    supervisor.tell("STATUS=" + "x" * 1000)
            supervisor.tell("READY=1")

    def test_reports_are_due_in_time_for_the_watchdog(self) -> None:
        told = [{"NOTIFY_SOCKET": "/run/notify", "WATCHDOG_USEC": "6000000"}]
        told += [{"NOTIFY_SOCKET": "/run/notify", "WATCHDOG_USEC": "-1s"}]
        told += [{"NOTIFY_SOCKET": "/run/notify"}, {"WATCHDOG_USEC": "6000000"}]

        found = [dotproxy.Supervisor(variables).interval for variables in told]
        self.assertEqual(found, [1.5, 10.0, 10.0, None])


# ---- Admin server --------------------------------------------------------------------


class AdminServerTest(DotproxyTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.page = mock.Mock(return_value=dotproxy.Page("text"))
        self.server = dotproxy.AdminServer((LOCALHOST, 0), {"/page": self.page})
        loop = functools.partial(self.server.serve_forever, 0.01)
        thread = threading.Thread(target=loop)
        for each in (self.server.server_close, thread.join, self.server.shutdown):
            self.addCleanup(each)
        thread.start()

    def connect(self, text: bytes = b"") -> socket.socket:
        """Connect, and send so much of a request."""
        where = LOCALHOST, self.server.server_address[1]
        client = self.have(socket.create_connection(where, timeout=5))
        client.sendall(text)
        return client

    def ask(self, head: str) -> tuple[int, dict[str, str], str]:
        """Send the head of a request; return status, headers and body."""
        client = self.connect(head.replace("\n", "\r\n").encode() + b"\r\n\r\n")
        text = b"".join(iter(lambda: client.recv(65536), b"")).decode()
        start, _, body = text.partition("\r\n\r\n")
        first, *lines = start.split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        return int(first.split()[1]), headers, body

    def test_program_imports_no_http_until_there_are_pages_to_serve(self) -> None:
        code = "import sys, dotproxy; sys.exit('html' in sys.modules)"
        directory = os.path.dirname(compiled_program())

        done = subprocess.run([sys.executable, "-c", code], cwd=directory, timeout=60)

        self.assertEqual(done.returncode, 0)

    def test_page_or_what_is_none_is_answered_in_plain_text(self) -> None:
        policy = "default-src 'none'"
        for head, status, body in (
            *(("GET /page?x HTTP/1.1", 200, "text"), ("HEAD /page HTTP/1.1", 200, "")),
            *(("POST /page HTTP/1.1", 501, ""), ("GET /page HTTP/a.b", 400, "")),
            *((f"GET {path} HTTP/1.1", 404, "") for path in ("/", "/page/", "x")),
            (f"GET /page HTTP/1.1\nX: {'x' * 70_000}", 431, ""),
        ):
            with self.subTest(head[:40]):
                got, headers, text = self.ask(head)
                kind = headers["Content-Type"]
                self.assertEqual((got, kind), (status, "text/plain; charset=utf-8"))
                self.assertNotIn("<", text)
                if status == 200:  # which allows nothing
                    self.assertEqual(text, body)
                    self.assertEqual(headers["Content-Security-Policy"], policy)
                    self.assertEqual(headers["X-Content-Type-Options"], "nosniff")
                    self.assertEqual(headers["Cache-Control"], "no-store")
                    self.assertEqual(headers["Content-Length"], "4")

    def test_host_is_an_address_or_localhost_where_it_is_on_loopback(self) -> None:
        for host, status in (
            *(("localhost", 200), ("LOCALHOST:9153", 200), ("127.0.0.1:80", 200)),
            *(("[::1]:9153", 200), ("192.168.1.10:9153", 200), ("10.0.0.1", 200)),
            *(("[2001:db8::1]", 200), ("[fe80::1%eth0]:80", 200)),
            *(("evil.example", 421), ("localhost.evil.example:9153", 421)),
            *(("127.0.0.1.evil.example", 421), ("127.0.0.1:80:80", 421), ("", 421)),
            *(("evil.example:[::1]", 421), ("[evil.example]", 421), ("dead.beef", 421)),
        ):
            with self.subTest(host):
                got, _, _ = self.ask(f"GET /page HTTP/1.1\nHost: {host}")
                self.assertEqual(got, status)
        with dotproxy.AdminServer(("0.0.0.0", 0), self.server.pages) as everywhere:
            page = everywhere.find_page("/page", "dns.example.com:9153")
        self.assertEqual(page.status, 200)

    def test_link_local_address_is_served_on_with_its_zone(self) -> None:
        for where in link_local_addresses():
            with self.subTest(where), dotproxy.AdminServer((where, 0), {}) as server:
                self.assertEqual(server.server_address[0], where)

    def test_clients_too_many_or_too_slow_make_room(self) -> None:
        handler = self.server.RequestHandlerClass
        first, second, *_ = [
            self.connect(b"GET /") for _ in range(self.server.MAX_CLIENTS)
        ]
        self.assertEqual(self.ask("GET /page HTTP/1.1")[0], 200)

        self.assertEqual(first.recv(100), b"")
        second.sendall(b"page HTTP/1.1\r\n\r\n")
        self.assertIn(b" 200 ", second.recv(100))
        with mock.patch.object(handler, "timeout", 0.05):
            self.assertEqual(self.connect(b"GET /page").recv(100), b"")

    def test_error_of_a_page_is_logged_and_the_next_is_answered(self) -> None:
        self.page.side_effect = ValueError
        client = self.connect(b"GET /page HTTP/1.1\r\n\r\n")
        self.assertEqual(client.recv(100), b"")
        (line,) = ERROR_LOG.lines
        ERROR_LOG.lines.clear()
        self.page.side_effect = None

        self.assertIn("server=admin", line)
        self.assertEqual(self.ask("GET /page HTTP/1.1")[0], 200)


class AdminPageTest(DotproxyTestCase):
    def get(self, served: Served, path: str) -> tuple[int, str, str]:
        """Return status, content type and body."""
        assert served.daemon.admin is not None
        where = str(served.daemon.admin.server_address[1])
        client = http.client.HTTPConnection(f"{LOCALHOST}:{where}", timeout=5)
        with contextlib.closing(client):
            client.request("GET", path)
            answer = client.getresponse()
            kind = answer.getheader("Content-Type") or ""
            return answer.status, kind, answer.read().decode()

    def test_pages_tell_what_happened_but_neither_client_nor_name(self) -> None:
        period = mock.patch.object(dotproxy, "PERIOD", 0.01)
        with period, serving(answer, "--admin=0") as served:
            for client in (UDPClient(served.address), TCPClient(served.address)):
                with client:
                    client.send(query("secret.example"))
                    client.receive()
            name = f"{LOCALHOST}:{served.upstream.port}#dot.test"
            for path, claim in (
                *(("/", "answered</small><b>2<"), ("/", "per second</small><b>0<")),
                ("/metrics", 'dns_requests_total{proto="udp",family="1",type="A"} 1'),
                ("/metrics", 'dns_requests_total{proto="tcp",family="1",type="A"} 1'),
                ("/metrics", f'_expiry_timestamp_seconds{{upstream="{name}"}} 4'),
            ):
                wait_until(lambda: claim in self.get(served, path)[2])  # noqa: B023
            page, kind = self.get(served, "/")[2], self.get(served, "/metrics")[1]
            for port in (served.address[1], served.upstream.port):
                page = page.replace(f"{LOCALHOST}:{port}", "")
            links = set(re.findall(r'<a href="(.*?)">', page))
            statuses = [self.get(served, f"/{link}")[0] for link in links]

        self.assertEqual(kind, "text/plain; version=0.0.4; charset=utf-8")
        self.assertEqual(links, {"metrics", "health", "ready", "grafana.json"})
        self.assertEqual(statuses, [200] * 4)
        self.assertNotIn("secret", page)
        self.assertNotIn(LOCALHOST, page)

    def test_probes_say_what_is_wrong(self) -> None:
        stuck = mock.patch.object(dotproxy.Daemon, "STUCK", -1.0)
        outage = mock.patch.object(dotproxy.Proxy, "trouble", return_value="refused")
        with serving(answer, "--admin=0") as served:
            self.assertEqual(self.get(served, "/health")[::2], (200, "OK\n"))
            with stuck, outage:
                page = self.get(served, "/")[2]
                health, ready = self.get(served, "/health"), self.get(served, "/ready")

        self.assertEqual(health[::2], (503, f"{dotproxy.STUCK}\n"))
        self.assertEqual(ready[::2], (503, "refused\n"))
        self.assertRegex(page, "<h1>.*Not serving</h1><p>.*not moved")


# ---- Status page ---------------------------------------------------------------------

Facts = dict[str, object]


def reading(
    at: float, cache: int = 0, upstream: int = 0, place: int = 0
) -> list[float]:
    """Make a reading of so many answers, all in one bucket of their duration."""
    buckets = [0] * (len(dotproxy.LATENCIES) + 1)
    buckets[place] = cache + upstream
    answers = {"cache": cache, "upstream": upstream}
    return [at, *(answers.get(source, 0) for source in dotproxy.SOURCES), *buckets]


class ChartsTest(DotproxyTestCase):
    def draw(self, readings: list[list[float]]) -> str:
        return dotproxy.draw_charts(
            readings, dotproxy.Change(readings[0], readings[-1])
        )

    def test_change_is_what_happened_between_two_readings(self) -> None:
        change = dotproxy.Change(reading(5, 3, 1, 3), reading(65, 21, 7, 3))
        idle = dotproxy.Change(reading(0, 9), reading(10, 9))

        self.assertEqual(change.rates, [0.3, 0.0, 0.1, 0.0])
        self.assertEqual(change.hit_ratio, 0.75)
        self.assertEqual(change.delays[0], 0.0015)  # the middle
        self.assertEqual((sum(idle.rates), idle.hit_ratio), (0.0, None))
        self.assertEqual(idle.delays, [None] * 3)

    def test_chart_shows_what_there_is_in_points_that_stay(self) -> None:
        found: list[set[int]] = []
        for first, last, begun in ((0, 0, 10), (0, 1, 10), (0, 360, 3530), (1, 361, 0)):
            page = self.draw([reading(10 * n + 3) for n in range(first, last + 1)])
            (path,) = re.findall('"area cache" d="(.*?)"', page)[1:]
            points = re.findall(r"[ML](-?\d+) ", path)
            found.append({10 * last + int(x) for x in points})
            self.assertTrue(not begun or f'viewBox="-{begun} -1 {begun} 1"' in page)

        self.assertEqual([len(points) for points in found[:3]], [0, 1, 52])
        self.assertGreater(len(found[2] & found[3]), 45)

    def test_scales_are_round_lines_have_gaps_and_sources_are_stacked(self) -> None:
        for rate, top in ((0, "1"), (1, "1"), (11, "20"), (290, "400"), (999, "1,000")):
            page = self.draw([reading(0), reading(10, rate * 10)])
            self.assertIn(f'aria-hidden="true"><li>{top}</li>', page)
        answers = [0, 10, 10, 20, 30]
        page = self.draw([reading(10.0 * n, a, a, 7) for n, a in enumerate(answers)])
        _, path = re.findall(r'"line p50" d="(.*?)"', page)
        tops = re.findall(r'"area (\w+)" d="M[-\d]+ ([-\d.]+).*?V0H-\d+Z"', page)

        self.assertEqual(re.sub(r"[-\d.]+", "1", path), "M1 1h1M1 1h1L1 1")
        self.assertIn("<li>100\u202fms</li><li>10\u202fms</li></ul>", page)
        wanted = {"cache": "-0.500", "stale": "-0.500", "upstream": "-1.000"}
        self.assertEqual(dict(tops), {**wanted, "local": "-1.000"})

    def test_numbers_are_written_for_people(self) -> None:
        for number, kind, text in (
            *((None, "", "\u2013"), (0, "", "0"), (54321.0, "", "54,321")),
            *((0.9876, "%", "98.8\u202f%"), (32 << 20, "memory", "32\u202fMiB")),
            *((0.00068, "time", "0.68\u202fms"), (90000, "time", "1.04\u202fd")),
        ):
            self.assertEqual(dotproxy.write(number, kind), text)
        buckets = [50, 0, 0, 40, *[0] * 12, 10]
        for share, seconds in ((0.5, 0.00025), (0.7, 0.0015), (0.99, 8.192)):
            self.assertEqual(dotproxy.percentile(buckets, share), seconds)


class StatusPageTest(DotproxyTestCase):
    ONE, TWO, LAN = "192.0.2.1:853#dot.test", "192.0.2.2:853#x.test", "tcp://192.0.2.3"

    def setUp(self) -> None:
        super().setUp()
        clock = Clock()
        self.have(mock.patch.object(dotproxy, "elapsed", clock))
        self.proxy, self.metrics = mock.Mock(), mock.Mock()
        self.timer = ManualTimer(clock)
        self.metrics.samples.return_value = self.samples()

    def samples(self, cache: int = 0, upstream: int = 0) -> list[dotproxy.Sample]:
        """Make what is counted of so many answers."""
        duration = dotproxy.Histogram(dotproxy.LATENCIES)
        duration.counts[3] = cache + upstream
        return [
            ("dotproxy_dns_responses_total", ("NOERROR", "cache"), cache),
            ("dotproxy_dns_responses_total", ("NOERROR", "upstream"), upstream),
            ("dotproxy_dns_request_duration_seconds", ("cache",), duration),
        ]

    def upstream(
        self, name: str, state: str = "up", since: float | None = None, **more: str
    ) -> Facts:
        """Make the facts of an upstream, which has been failing for so long."""
        at = None if since is None else 1000.0 - since
        base = {"name": name, "state": state, "error": "refused", "domain": ""}
        return {**base, "since": at, "failed_at": at, **more}

    def draw(self, *upstreams: Facts, trouble: str = "", seconds: float = 0.0) -> str:
        """Draw the page of a proxy with these upstreams."""
        self.proxy.facts.return_value = upstreams or [self.upstream(self.ONE)]
        self.proxy.trouble.return_value = trouble
        parts = self.metrics, self.proxy, self.timer, lambda now: True
        pages = dotproxy.AdminPages(*parts, listen="'<listen>")
        self.metrics.samples.return_value += self.samples(3000, 1000)
        self.timer.advance(seconds)
        return pages.by_path["/"]().text

    def text(self, page: str) -> str:
        """Return the text of what is renewed of a page, which is well-formed."""
        (part,) = re.findall("<main>.*</main>", page, re.DOTALL)
        return "|".join(xml.etree.ElementTree.fromstring(part).itertext())

    def test_headline_says_whether_it_serves(self) -> None:
        up, two = self.upstream(self.ONE), self.upstream(self.TWO)
        new, doubtful = (self.upstream(self.ONE, each) for each in ("new", "doubtful"))
        down = self.upstream(self.TWO, "down", 600)
        lan = self.upstream(self.LAN, domain="lan")
        lan_new = {**lan, "state": "new"}
        lan_down = {**lan, "state": "down", "since": 995.0}
        one = "Serving: 1 of 1 upstreams up"
        outage = "no upstream has answered for 10\u202fmin"
        for upstreams, trouble, kind, headline in (
            ([up, two], "", "good", "Serving: 2 of 2 upstreams up"),
            ([up, down], "", "warn", "Serving: 1 of 2 upstreams up"),
            ([doubtful, two], "", "warn", "Serving: 1 of 2 upstreams up"),
            ([new], "x", "warn", "Starting: no upstream is connected yet"),
            ([down], "", "warn", f"Serving from the cache alone: {outage}"),
            ([new, down], "x", "bad", f"Not serving: {outage}"),
            ([down, lan_down], "x", "bad", f"Not serving: {outage}"),
            ([doubtful], "x", "bad", "Not serving: no upstream answers"),
            ([doubtful, down], "x", "bad", "Not serving: no upstream answers"),
            ([up, lan_new], "", "good", one),
            ([up, lan, lan_down], "", "warn", one),
            ([up, lan_down], "", "warn", f"{one}, but none for lan"),
        ):
            with self.subTest(headline, upstreams=upstreams):
                page = self.draw(*upstreams, trouble=trouble)
                self.assertIn(f'<h1><i class="{kind}"></i> {headline}</h1>', page)
                self.assertIn(f"<title>{headline} |", page)

    def test_trouble_and_figures_are_those_of_facts_and_samples(self) -> None:
        down = self.upstream(self.TWO, "down", 120)
        text = self.text(self.draw(self.upstream(self.ONE), down, seconds=10.1))

        for claim in (
            *(f"|{self.TWO}: refused|", " down for 2.17\u202fmin|", "ago: refused|"),
            *("second|400|mean", "cache|75\u202f%|in the last minute"),
            "within|1.5\u202fms|p95\u00a01.95\u202fms, p99\u00a01.99\u202fms",
            *("answered|4,000|since the start", "|NOERROR|4,000|\n"),
        ):
            self.assertIn(claim, text)
        self.assertRegex(self.draw(seconds=9000.0), "<li>5[89][.0-9]*\u202fmin ago")

    def test_upstream_is_shown_with_what_is_its_own(self) -> None:
        now, ends = time.time() + 60, "certificate_expiry_timestamp_seconds"
        for name, days in zip("abcd", (60.2, 13.0, 1.5, -1.0)):
            figures = (ends, now + days * 86400), ("latency_seconds", 0.0123)
            for metric, value in (*figures, ("failures_total", 7)):
                sample = f"dotproxy_upstream_{metric}", (name,), value
                self.metrics.samples.return_value.append(sample)
        page = self.draw(*map(self.upstream, "abcd"))
        found = re.findall('"Certificate">(?:<i class="(.*?)"></i> )?(.*?)<', page)

        marks, texts = zip(*found)
        self.assertEqual(marks, ("", "warn", "warn", "bad"))
        self.assertRegex("".join(texts), r"\A60.2\sdays13\sdays1.5\sdaysexpired\Z")
        self.assertEqual(page.count('"Latency">12.3\u202fms<'), 4)
        self.assertEqual(page.count('"Failures">7<'), 4)

    def test_what_others_say_is_escaped_and_nothing_comes_from_elsewhere(self) -> None:
        evil = "<script src=//x>alert(1)</script>\"'&"
        down = self.upstream(f"1#{evil}", "down", 9, error=evil, domain=evil)
        page = self.draw(self.upstream(self.ONE), down)
        text = self.text(page)

        self.assertEqual(text.count(evil), 6)
        self.assertIn("'<listen>", text)
        for link in re.findall('(?:href|src)="(.*?)"', page, re.S):
            self.assertRegex(link, r"\A[a-z.]+\Z")
        self.assertNotRegex(page, " (on[a-z]+|style)=")  # which the policy forbids
        self.assertNotIn("url(", dotproxy.STYLE)

    def test_policy_allows_the_style_and_the_script_and_nothing_else(self) -> None:
        policy = dotproxy.STATUS_POLICY
        for text in re.findall("<(?:style|script)>(.*?)</", self.draw(), re.DOTALL):
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            policy = policy.replace(f"-src 'sha256-{digest}'", "")

        wanted = "default-src 'none'; style; script; connect-src 'self'"
        others = "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        self.assertEqual(policy, f"{wanted}; {others}")
        for name in (*dotproxy.SOURCES, *dotproxy.PERCENTILES):
            self.assertRegex(dotproxy.STYLE, rf"\.{name}\b[^{{]*{{ color: ")


# ---- Command line --------------------------------------------------------------------


def configured(*arguments: str, **environment: str) -> dotproxy.Config:
    """Parse options, with an environment of these DOTPROXY_ variables."""
    variables = {f"DOTPROXY_{name}": text for name, text in environment.items()}
    return dotproxy.parse_args(arguments, variables)


CONFIG = dotproxy.Config()
NEEDED = {  # by another option
    "allow_private": ["--block-private-answers"],
    "query_log_privacy": ["--query-log"],
}
# An option, what is given, and the value: of the option, or of its only item.
OPTIONS: list[tuple[str, str, object]] = [
    ("listen", "0.0.0.0:0", ("0.0.0.0", 0)),
    ("listen", "[::1]", ("::1", 5353)),
    ("listen", "2001:DB8:0::1", ("2001:db8::1", 5353)),
    ("listen", "[fe80::1%eth0]:5300", ("fe80::1%eth0", 5300)),
    ("reuse_port", "yes", True),
    ("tls_listen", "fe80::1%eth0", ("fe80::1%eth0", 853)),
    ("tls_listen", "192.0.2.1:8853", ("192.0.2.1", 8853)),
    ("upstream", "192.0.2.1", ("192.0.2.1", 853, "192.0.2.1")),
    ("upstream", "tls://dot.test:8853", ("dot.test", 8853, "dot.test")),
    ("upstream", "dns.example.", ("dns.example.", 853, "dns.example")),
    ("upstream", "1dot.4test#other.test", ("1dot.4test", 853, "other.test")),
    ("upstream", "[2001:db8::1]:53#dot.test", ("2001:db8::1", 53, "dot.test")),
    ("upstream", "2001:db8::1@8853#dot.test", ("2001:db8::1", 8853, "dot.test")),
    ("route", "A.Lan.=192.0.2.1#A.b", ("a.lan", ("192.0.2.1", 853, "A.b"))),
    ("route", "lan=tcp://dns.test:5353", ("lan", ("dns.test", 5353, ""))),
    ("route", "_tcp.lan=tcp://192.0.2.1@53", ("_tcp.lan", ("192.0.2.1", 53, ""))),
    ("pin", f"Cloudflare-DNS.com.={GOOD_PIN}", ("cloudflare-dns.com", GOOD_PIN)),
    ("timeout", "2.5", 2.5),
    ("allow", "192.0.2.7/24", ipaddress.ip_network("192.0.2.0/24")),
    ("allow", "2001:DB8::1/32", ipaddress.ip_network("2001:db8::/32")),
    ("cache_size", "64K", 65536),
    ("cache_size", "1g", 1 << 30),
    ("forward_special", "ALL", b"\0"),
    ("forward_special", "Corp.Local.", b"\4corp\5local\0"),
    ("forward_special", "in-addr.arpa", b"\7in-addr\4arpa\0"),
    ("allow_private", "Example.com", b"\7example\3com\0"),
    ("admin", "9999", ("127.0.0.1", 9999)),
    ("admin", "192.0.2.1", ("192.0.2.1", 9153)),
    *(("rate_limit_all", text, True) for text in ("1", "true", "YES")),
    *(("rate_limit_all", text, False) for text in ("0", "false", "No")),
    ("block_private_answers", "yes", True),
    *((name, "7", 7) for name in ("max_in_flight", "max_tcp_clients", "rate_limit")),
    *((f"cache_{name}_ttl", "7", 7) for name in ("min", "max", "fail")),
    *((name, "a", "a") for name in ("tls_cert", "tls_key", "ca_file", "query_log")),
    *(("max_tcp_per_client", "7", 7), ("cache_stale", "0", 0)),
    *(("strategy", "failover", "failover"), ("tls_min", "1.3", "1.3")),
    *(("log_level", "debug", "debug"), ("log_format", "json", "json")),
    *(("query_log_privacy", "hash", "hash"), ("user", "a:b", "a:b")),
]
LONG = "a." * 127 + "a=192.0.2.1"
# An option, what the error says of how to give it, and what cannot be taken.
BAD: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("--listen", "[::1]:5353", ("localhost", "", "[::1", "[::1]53", "192.0.2.1:65536")),
    ("--listen", "[::1]:5353", ("::1:", "::1%", "192.0.2.1:", "192.0.2.1:-1", "5353")),
    ("--listen", "IP address", ("192.0.2.1:dns", "192.0.2.1:٥٣", "192.0.2.256")),
    ("--admin", "127.0.0.1:9153", ("localhost:9153", "99999", "")),
    ("--upstream", "9.9.9.9#", ("192.0.2.1:0", "192.0.2.1#", "192.0.2.1#bad name", "")),
    ("--upstream", "HOST[:PORT]", ("https://dot.test", "bad/host", "dns.example..")),
    ("--upstream", "HOST[:PORT]", ("192.0.2.1#1.2.3", "dot.test.53", "999.1.1.1")),
    ("--route", "DOMAIN=", ("lan", "lan=", "=192.0.2.1", "lan..=192.0.2.1", LONG)),
    ("--route", "DOMAIN=", ("a b=192.0.2.1", "ł.example=::1", f"{'a' * 64}=::1")),
    ("--route", "DOMAIN=", (".=192.0.2.1", "192.0.2.1=::1", "lan=tcp://192.0.2.1:0")),
    ("--route", "tcp://HOST", ("lan=tcp://192.0.2.1#dot.test", "lan=tcp://tls://::1")),
    ("--route", "tcp://HOST", ("lan=tcp://999.1.1.1", "lan=1.2.3#dot.test")),
    ("--pin", "TLS-NAME=BASE64", ("dot.test", f"bad name={GOOD_PIN}", "1.2.3=AAAA")),
    ("--pin", "44 characters", (f"dot.test={GOOD_PIN[4:]}", f"a={GOOD_PIN[:-4]}_n8=")),
    ("--tls-min", "1.3", ("1.1",)),
    ("--timeout", "0.1 to 60", ("0", "nan", "soon", "")),
    ("--max-in-flight", "1 to 30000", ("1.5", "30001")),
    ("--allow", "2001:db8::/32", ("192.0.2.0/33", "everybody", "::ffff:192.0.2.0/120")),
    ("--rate-limit-all", "yes or no", ("perhaps", "")),
    ("--cache-size", "32M", ("-1", "1KM", "M", "", "1.5M")),
    ("--forward-special", "10.in-addr.arpa", ("example.com", "xlocal", "a..b")),
    ("--allow-private", "example.com", ("192.0.2.1", "2001:db8::1", "a..b", "x..", "")),
    ("--ca-file", "path of a file", ("",)),
)


class ConfigTest(DotproxyTestCase):
    def test_option_is_taken_from_command_line_and_environment(self) -> None:
        tried = {name for name, _, _ in OPTIONS} | dotproxy.ERRANDS
        self.assertEqual(tried, set(dotproxy.Config._fields))
        for name, text, value in OPTIONS:
            flag = "--" + name.replace("_", "-")
            for arguments, environment in (
                ((flag, text), {}),
                ((f"{flag}={text}",), {}),
                ((), {name.upper(): text}),
            ):
                with self.subTest(arguments=arguments, environment=environment):
                    needed = NEEDED.get(name, ())
                    config = configured(*arguments, *needed, **environment)
                    listed = isinstance(getattr(CONFIG, name), tuple)
                    wanted = (value,) if listed else value
                    self.assertEqual(getattr(config, name), wanted)

    def test_option_without_a_value_has_the_usual_one(self) -> None:
        config = configured("--admin", "--query-log", "--doctor", "--reuse-port")
        found = config.admin, config.query_log, config.doctor, config.reuse_port
        self.assertEqual(found, (("127.0.0.1", 9153), "-", "quick", True))

    def test_command_line_wins_over_the_environment_which_has_no_errands(self) -> None:
        first, second = (("192.0.2.1", 5353),), (("192.0.2.2", 5353),)
        for arguments, environment, listen in (
            ([], {}, CONFIG.listen),
            (["--listen=192.0.2.1"], {"LISTEN": "192.0.2.2"}, first),
            ([], {"LISTEN": "192.0.2.1\n192.0.2.2"}, first + second),
            ([], {"LISTEN": "192.0.2.1, 192.0.2.2,192.0.2.1"}, first + second),
            ([], {"HEALTHCHECK": "1", "DOCTOR": "idle", "TIMEOUT": ""}, CONFIG.listen),
            (["--rate-limit-all=no"], {"RATE_LIMIT_ALL": "1"}, CONFIG.listen),
            ([], {"ALLOW": " ", "LISTEN": " , "}, CONFIG.listen),
        ):
            with self.subTest(arguments=arguments, environment=environment):
                wanted = CONFIG._replace(listen=listen)
                self.assertEqual(configured(*arguments, **environment), wanted)

    def test_file_has_options_and_comments(self) -> None:
        lines = (
            "# it's a comment",
            "",
            "--timeout 3 # another's",
            '  --ca-file "/etc/my #1/ca.pem"  # "quoted" \'#\'',
            "--upstream 9.9.9.9#dns.quad9.net #--upstream=192.0.2.9",
            "--upstream=192.0.2.2\t# after a tab",
            "--query-log 'a # b' --user \\#1",
        )
        with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
            file.write("\n".join(lines))
            file.flush()
            config = configured(f"@{file.name}", "--log-level=error", TIMEOUT="9")

        self.assertEqual((config.timeout, config.log_level), (3, "error"))
        self.assertEqual(config.ca_file, "/etc/my #1/ca.pem")
        self.assertEqual((config.query_log, config.user), ("a # b", "#1"))
        names = [endpoint.name for endpoint in config.upstream]
        self.assertEqual(names, ["dns.quad9.net", "192.0.2.2"])

    def test_health_check_alone_has_the_options_of_process_1(self) -> None:
        python = "/usr/local/bin/python3\0-IS\0"
        for line, given, port, seconds in (
            (f"{python}/dotproxy.pyc\0--listen\0::1\0--timeout=2\0", [], 5353, 2),
            ("/usr/bin/dotproxy\0--listen=[::1]:53\0", [], 53, 4.8),
            (f"{python}/dotproxy.pyc\0--healthcheck\0", [], 7, 4.8),
            ("/usr/bin/dotproxy\0--listen=[::1]:53\0", ["--timeout=9"], 7, 9),
            ("/sbin/init\0--listen=[::1]:53\0", [], 7, 4.8),
        ):
            with tempfile.NamedTemporaryFile("w") as file:
                file.write(line)
                file.flush()
                first = mock.patch.object(dotproxy, "FIRST_PROCESS", file.name)
                with self.subTest(line), first:
                    config = configured("--healthcheck", *given, LISTEN="[::1]:7")
            self.assertTrue(config.healthcheck)
            self.assertEqual(config.listen, (("::1", port),))
            self.assertEqual(config.timeout, seconds)
        with mock.patch.object(dotproxy, "FIRST_PROCESS", "/no/such/file"):
            self.assertTrue(configured("--healthcheck").healthcheck)

    def test_domain_may_have_several_servers_of_one_kind_and_a_pin(self) -> None:
        texts = "lan=192.0.2.1#Dot.test b=tcp://::1 LAN=192.0.2.3"
        config = configured("--pin=dot.test=" + GOOD_PIN, ROUTE=texts)
        self.assertEqual([domain for domain, _ in config.route], ["lan", "b", "lan"])

    def error_line(self, *arguments: str) -> str:
        """Run the program with bad options; return the line on stderr."""
        with contextlib.ExitStack() as stack:
            stderr = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            stack.enter_context(mock.patch.dict(os.environ, clear=True))
            stack.enter_context(mock.patch("logging.basicConfig"))
            stack.enter_context(mock.patch.object(signal, "pthread_sigmask"))
            serves = mock.patch("dotproxy.renounce_root", side_effect=AssertionError)
            stack.enter_context(serves)
            status = dotproxy.main(arguments)
        text = stderr.getvalue()
        self.assertEqual(status, 2)
        self.assertEqual((text.count("\n"), text[-1:]), (1, "\n"), text)
        return text

    def test_bad_option_is_one_line_that_names_it_and_status_2(self) -> None:
        for option, hint, texts in BAD:
            for text in texts:
                with self.subTest(option, text=text):
                    line = self.error_line(f"{option}={text}")
                    for word in (option, repr(text.rpartition("=")[2])[1:], hint):
                        self.assertIn(word, line)

    def test_options_that_do_not_fit_are_one_line_and_status_2(self) -> None:
        lan, pin = "--route=lan=tcp://192.0.2.1", f"--pin=dot.test={GOOD_PIN}"
        for arguments, words in (
            ([pin], ["--pin dot.test", "cloudflare-dns.com"]),
            ([lan, pin], ["they have cloudflare-dns.com\n"]),
            ([lan, "--route=lan=192.0.2.2"], ["--route lan", "clear text"]),
            (["--upstream=tcp://192.0.2.1"], ["--upstream", "--route"]),
            (["--allow-private=lan"], ["--allow-private needs --block"]),
            (["--query-log-privacy=hash"], ["--query-log-privacy needs"]),
            (["--timeout"], ["--timeout"]),
            (["--tim=1"], ["--tim"]),
            (["two\nlines"], ["two\\010lines"]),
            (["@/no/such/file"], ["/no/such/file"]),
            (["--ca-file=/no/such.pem"], ["/no/such.pem", "--ca-file"]),
            ([f"--ca-file={dotproxy.__file__}"], ["dotproxy.py", "no certificate"]),
            (["--tls-listen=::1"], ["needs a certificate: give --tls-cert PEM"]),
            (["--tls-key=/a.pem"], ["--tls-cert", "give --tls-listen"]),
            (["--tls-listen=::1", "--tls-key=/a.pem"], ["--tls-cert PEM"]),
            (["--tls-listen=::1", "--tls-cert=/no.pem"], ["/no.pem", "--tls-cert"]),
        ):
            with self.subTest(arguments=arguments):
                line = self.error_line(*arguments)
                for word in words:
                    self.assertIn(word, line)

    def test_what_is_bad_in_a_variable_or_file_is_told_in_one_line(self) -> None:
        with self.assertRaisesRegex(dotproxy.ConfigError, "--timeout: 'soon'"):
            configured(TIMEOUT="soon")
        for octets in (b"--user 'no", b"--timeout=\xfc", b"--ca-file=a\0b", b"@PATH"):
            with tempfile.NamedTemporaryFile(suffix=".conf") as file:
                file.write(octets.replace(b"PATH", file.name.encode()))
                file.flush()
                with self.subTest(octets):
                    self.assertIn("dotproxy: ", self.error_line(f"@{file.name}"))

    def test_help_fits_80_columns_and_has_every_option_and_default(self) -> None:
        printed = []
        for option in ("--help", "--version"):
            stdout, ends = io.StringIO(), self.assertRaises(SystemExit)
            columns = mock.patch.dict(os.environ, COLUMNS="80")
            with contextlib.redirect_stdout(stdout), columns, ends as caught:
                configured(option)
            self.assertFalse(caught.exception.code)
            printed.append(stdout.getvalue())

        self.assertLessEqual(max(map(len, printed[0].splitlines())), 80)
        for name in dotproxy.Config._fields:
            self.assertIn("\n  --" + name.replace("_", "-"), printed[0])
        self.assertEqual(printed[1], f"dotproxy {dotproxy.__version__}\n")

        for option, default, _ in options_in_help():
            name = option.split()[0][2:].replace("-", "_").upper()
            if default.partition(":")[0] in ("127.0.0.1", "32M", "4.8", "10000", "1.2"):
                self.assertEqual(configured(**{name: default}), CONFIG)


class BindTest(DotproxyTestCase):
    def test_error_names_the_port_the_likely_holder_and_the_option(self) -> None:
        for number, option, port, words in (
            (errno.EADDRINUSE, "--listen", 5353, ["avahi", "[::1]:5354"]),
            (errno.EADDRINUSE, "--listen", 53, ["systemd-resolved", "[::1]:8053"]),
            (errno.EACCES, "--listen", 53, ["no permission for port 53", "root"]),
            (errno.EADDRNOTAVAIL, "--admin", 53, ["[::1]:53", "no such address"]),
        ):
            with self.subTest(number=number, port=port):
                error = OSError(number, os.strerror(number))
                given = CONFIG, option, ("::1", port), error
                text = dotproxy.describe_bind_error(*given)
                for word in (*words, option):
                    self.assertIn(word, text)

    def test_port_0_becomes_one_that_is_free_for_both_transports(self) -> None:
        real, taken = socket.socket.bind, set[int]()

        def bind(listener: socket.socket, address: Address) -> None:
            if listener.type == socket.SOCK_DGRAM and not taken:
                taken.add(address[1])
                raise OSError(errno.EADDRINUSE, "Address already in use")
            real(listener, address)

        with mock.patch.object(socket.socket, "bind", bind), serving() as served:
            ports = {int(s.server_address[1]) for s in served.daemon.servers}

        self.assertEqual((len(taken), len(ports), len(ports - taken)), (1, 1, 1))

    def test_address_of_a_family_that_the_host_lacks_is_skipped(self) -> None:
        real = socket.socket.bind
        absent, cert = errno.EAFNOSUPPORT, ENCRYPTED[1]
        for number, options, refusal in (
            (absent, [], None),
            (errno.EADDRINUSE, [], "port 5353 is taken"),
            (absent, ["--listen=0.0.0.0:5300", "--listen=[::]:5300"], None),
            (absent, ["--listen=[::]:5300"], "no address to listen on; mend"),
            (absent, ["--listen=127.0.0.1:5300", "--listen=[::1]:5300"], "::1.*no s"),
            (absent, ["--tls-listen=[::1]:5300", cert], "::1.*mend --tls-listen"),
            (absent, ["--admin=[::]:5300"], "::.*mend --admin"),
        ):
            config = configured(f"--ca-file={PKI.ca}", *options)

            def bind(
                listener: socket.socket, address: Address, number: int = number
            ) -> None:
                if ":" in address[0]:
                    raise OSError(number, os.strerror(number))
                real(listener, (LOCALHOST, 0))

            with self.subTest(options), contextlib.ExitStack() as stack:
                stack.enter_context(mock.patch.object(socket.socket, "bind", bind))
                if refusal:
                    refused = self.assertRaisesRegex(dotproxy.ConfigError, refusal)
                    stack.enter_context(refused)
                daemon = dotproxy.Daemon(config)
                daemon.close()
                self.assertEqual(len(daemon.servers), 2)


# ---- Health check and doctor ---------------------------------------------------------

OK, WARN, FAIL = dotproxy.OK, dotproxy.WARN, dotproxy.FAIL
Findings = dict[str, dotproxy.Finding]  # by their check


class HealthCheckTest(DotproxyTestCase):
    def check(self, *replies: Callable[[bytes], bytes]) -> tuple[bool, str]:
        """Check the health of what gives these replies to a query."""
        with socket.socket(type=socket.SOCK_DGRAM) as server:
            server.bind((LOCALHOST, 0))
            server.settimeout(5)

            def serve() -> None:
                asked, client = server.recvfrom(4096)
                self.assertEqual(dotproxy.parse_query(asked).question, b"\0\0\2\0\1")
                for reply in replies:
                    server.sendto(reply(asked), client)

            thread = threading.Thread(target=serve, daemon=True)
            thread.start()
            found = dotproxy.check_health(server.getsockname(), 5.0)
            thread.join()
        return found

    def test_upstream_is_asked_each_time_and_told_of_where_it_is_down(self) -> None:
        self.have(mock.patch.object(dotproxy.Upstream, "GRACE", 0.1))
        with serving(answer) as served:
            check = functools.partial(dotproxy.check_health, served.address, 5.0)
            self.assertEqual([check()[0] for _ in range(3)], [True] * 3)
            self.assertEqual(len(served.upstream.queries), 3)
            served.upstream.stop()
            healthy, line = check()

        self.assertFalse(healthy)
        self.assertRegex(line, r"\Aupstream down: 127.0.0.1:\d+#dot.test: .+")

    def test_proxy_that_is_down_is_told_with_where_it_should_be(self) -> None:
        with socket.socket(type=socket.SOCK_DGRAM) as silent:
            silent.bind((LOCALHOST, 0))
            healthy, line = dotproxy.check_health(silent.getsockname(), 0.01)

        self.assertFalse(healthy)
        self.assertRegex(line, r"\Aproxy down: 127.*: no answer within 0.01 s\Z")
        for host, here in (("0.0.0.0", "127.0.0.1:1"), ("::", "[::1]:1")):
            found = dotproxy.check_health((host, 1), 5.0)
            self.assertEqual(found, (False, f"proxy down: nothing listens on {here}"))

    def test_answers_to_something_else_are_passed_over(self) -> None:
        _, line = self.check(
            lambda _: b"",
            lambda asked: asked[:2],
            lambda asked: asked,
            lambda asked: bytes([asked[0] ^ 1]) + response(asked)[1:],
            lambda asked: response(asked)[:12] + b"\1a\0\0\2\0\1",
            lambda asked: response(asked)[:14],
            lambda asked: response(asked, rcode=Rcode.REFUSED),
        )

        self.assertIn("refuses this check", line)

    def test_answer_tells_of_proxy_and_upstream(self) -> None:
        for rcode, text, healthy, line in (
            (Rcode.NOERROR, "", True, r"healthy: answered in \d+\.\d ms"),
            (Rcode.REFUSED, "", True, ".*upstream unknown: the proxy's access list.*"),
            (Rcode.REFUSED, "no", True, "proxy up, upstream unknown: no; answered .*"),
            (Rcode.SERVFAIL, "", False, "upstream down: SERVFAIL without a reason"),
            (Rcode.SERVFAIL, "e \x1b[1m\n", False, r"upstream down: e \\027\[1m\\010"),
        ):
            with self.subTest(line):
                reason = option(EDE, b"\0\x17" + text.encode()) if text else b""
                reply = functools.partial(response, rcode=rcode, options=reason)
                found = self.check(reply)
                self.assertEqual(found[0], healthy)
                self.assertRegex(found[1], rf"\A{line}\Z")


class HostExaminationTest(DotproxyTestCase):
    def look(self, *options: str) -> Findings:
        """Look at this host with these options."""
        report = dotproxy.look_at_host(configured(*options))
        return {finding.check: finding for finding in report.findings}

    def address(
        self, address: Address, option: str = "--listen", given: bool = True
    ) -> dotproxy.Finding:
        config, report = dotproxy.Config(), dotproxy.Report("host")
        config = config._replace(listen=(address,)) if given else config
        with contextlib.ExitStack() as taken, report.check("address") as say:
            say(*dotproxy.try_address(config, taken, option, address))
        return report.findings[0]

    def test_host_is_judged_with_the_cure(self) -> None:
        needed = dotproxy.count_descriptors(configured())
        nofile, unlimited = "descriptors", resource.RLIM_INFINITY
        for argument, uid, limit, check, result, text in (
            ("", 0, needed, nofile, OK, f"{needed}; {needed} may be needed"),
            ("", 0, needed - 1, nofile, WARN, f"; {needed} may be needed"),
            ("", 0, unlimited, nofile, OK, f"no limit; {needed} may"),
            ("--route=a=tcp://b", 0, needed, nofile, WARN, f"{needed}; "),
            ("--user=4711", 0, needed, "user", OK, "runs as user 4711"),
            ("--user=root", 0, needed, "user", WARN, "runs as user 0"),
            ("--user=no-such", 0, needed, "user", FAIL, "there is no user or group"),
            ("", 4711, needed, "user", OK, "runs as user 4711"),
            ("--tls-listen=[::1]:0", 0, needed, "options", FAIL, "needs a certificate"),
            ("--tls-cert=/none", 0, needed, "options", FAIL, "is for encrypted"),
            ("", 0, needed, "options", OK, "valid; 2 to listen on, 4 upstream"),
            ("", 0, needed, "program", OK, f"dotproxy {dotproxy.__version__}, Pyth"),
            ("--query-log=/none/log", 0, needed, "options", FAIL, "cannot write to"),
            ("--query-log=/", 0, needed, "options", FAIL, "cannot write to /"),
            (f"--ca-file={PKI.ca}", 0, needed, "CA certificates", OK, "1 from "),
            ("--ca-file=/none", 0, needed, "CA certificates", FAIL, "cannot read the"),
            ("", 0, needed, "CA certificates", FAIL, "none in /none/a"),
        ):
            user = mock.patch.object(os, "geteuid", return_value=uid)
            limits = mock.patch.object(resource, "getrlimit", return_value=(64, limit))
            nothing = {"SSL_CERT_FILE": "/none/a", "SSL_CERT_DIR": "/none/b"}
            empty = mock.patch.dict(os.environ, nothing)
            with self.subTest(text), user, limits, empty:
                found = self.look(*argument.split())[check]
                self.assertEqual((found.result, not found.cure), (result, result == OK))
                self.assertIn(text, found.detail)

    def test_address_is_free_or_not_there(self) -> None:
        with socket.create_server((LOCALHOST, 0)) as listener:
            address = listener.getsockname()
            with socket.create_connection(address):
                listener.accept()[0].close()  # this end stays, in TIME_WAIT
        for where, given, result, text in (
            (address, True, OK, "free"),
            (("192.0.2.1", 5353), True, FAIL, "this host has no such address"),
            (("192.0.2.1", 5353), False, OK, "not used: this host has no such address"),
            (("fe80::1%none", 5353), True, FAIL, ""),
        ):
            found = self.address(where, given=given)
            self.assertEqual(found.result, result)
            self.assertIn(text, found.detail)

    @unittest.skipUnless(sys.platform == "linux", "needs /proc")
    def test_holder_of_a_port_is_named(self) -> None:
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            with self.subTest(kind=kind), socket.socket(type=kind) as holder:
                holder.bind((LOCALHOST, 0))
                if kind == socket.SOCK_STREAM:
                    holder.listen()
                quick = mock.patch.object(dotproxy, "HEALTH_GRACE", 0.01)
                with quick, mock.patch.object(os, "getpid", return_value=1):
                    found = self.address(holder.getsockname())
                self.assertEqual(found.result, FAIL)
                self.assertRegex(found.detail, rf"\Ataken by .+ \(pid {os.getpid()}\)")
                self.assertIn("choose another port with --listen", found.cure)

    def test_options_that_want_the_same_port_are_told(self) -> None:
        with socket.create_server((LOCALHOST, 0)) as holder:
            port = holder.getsockname()[1]
        for one, other, clash in (
            (LOCALHOST, f"--admin=0.0.0.0:{port}", True),
            (LOCALHOST, f"--admin=[::1]:{port}", False),
            ("0.0.0.0", f"--listen=[::]:{port}", False),
        ):
            with self.subTest(other):
                found = self.look(f"--listen={one}:{port}", other).values()
                told = "taken by another option" in [each.detail for each in found]
                self.assertEqual(told, clash)

    def test_port_that_is_held_is_judged_by_its_holder(self) -> None:
        ours, runs = "dotproxy (pid 7)", "held by dotproxy (pid 7), which runs"
        well, ill = (True, "healthy: it"), (False, "upstream down: no")
        gone, unseen = (False, "proxy down: no"), f"taken by {dotproxy.UNSEEN}"
        with socket.create_server((LOCALHOST, 0)) as server:
            for option, holder, health, result, text in (
                ("--listen", ours, well, OK, f"{runs}; healthy: it"),
                ("--listen", ours, ill, OK, f"{runs}; upstream down: no"),
                ("--listen", "named (pid 8)", well, FAIL, "taken by named (pid 8)"),
                ("--listen", "", ill, WARN, f"{unseen}; upstream down: no"),
                ("--listen", "", gone, FAIL, unseen),
                ("--admin", "nginx (pid 9)", ill, FAIL, "taken by nginx (pid 9)"),
                ("--tls-listen", "", ill, WARN, unseen),
            ):
                state = mock.Mock(return_value=holder), mock.Mock(return_value=health)
                names = "find_holders", "check_health"
                held = mock.patch.multiple(dotproxy, **dict(zip(names, state)))
                with self.subTest(option=option, text=text), held:
                    found = self.address(server.getsockname(), option)
                    self.assertEqual((found.result, found.detail), (result, text))
                    self.assertEqual("another port" in found.cure, "taken" in text)


class ExaminationTest(DotproxyTestCase):
    def examine(
        self,
        where: FakeUpstream | Endpoint,
        domain: str = "",
        doctor: str = "",
    ) -> Findings:
        """Examine an upstream, whose key is pinned."""
        if isinstance(where, FakeUpstream):
            plain = where.on_accept == "plain"
            where = Endpoint(where.host, where.port, "" if plain else "dot.test")
        pins = (("dot.test", GOOD_PIN),)
        config = dotproxy.Config(ca_file=PKI.ca, pin=pins, doctor=doctor)
        examination = dotproxy.Examination((domain, where), config)
        examination.run()
        subject = f"{where} for {domain}" if domain else str(where)
        self.assertEqual({each.subject for each in examination.findings}, {subject})
        return {finding.check: finding for finding in examination.findings}

    def test_good_upstream_is_described(self) -> None:
        with FakeUpstream() as upstream:
            found = self.examine(upstream)

        self.assertEqual({f.result for f in found.values()}, {OK})
        for check, text in {
            "connect": "IPv4 127.0.0.1: ",
            "handshake": "TLSv1.3, TLS_AES_",
            "ALPN": "dot",
            "certificate": "for dot.test, 127.0.0.1, 0:0:0:0:0:0:0:1; ",
            "pin": GOOD_PIN,
            "latency": "(least, median, most of 10)",
            "resumption": "session resumed",
        }.items():
            self.assertIn(text, found.pop(check).detail)
        self.assertEqual(found, {})
        self.assertEqual({len(each.raw) % 128 for each in upstream.queries}, {0})

    def test_upstream_that_fails_is_told_with_the_cure(self) -> None:
        self.have(mock.patch.object(dotproxy, "STEP", 0.5))
        port, handshake = "this port is for DNS over TLS", "handshake"
        reason = option(EDE, b"\0\x17for a reason")
        refusal = functools.partial(response, rcode=2, options=reason)
        wrong, name = "alias.other.test, not for dot.test", "HOST#NAME"
        for upstream, check, text, cure in (
            (FakeUpstream(on_accept="hang"), handshake, "no end of", "firewall"),
            (FakeUpstream(on_accept="garbage"), handshake, "wrong version", port),
            (FakeUpstream(on_accept="close"), handshake, "closed during the", port),
            (FakeUpstream(certificate=PKI.wrong_name), "", wrong, name),
            (FakeUpstream(certificate=PKI.expired), "", "expired", "renew it there"),
            (FakeUpstream(certificate=PKI.unknown_ca), "", "unknown CA", "--ca-file"),
            (FakeUpstream(certificate=PKI.good2), "", "another key", GOOD2_PIN),
            (FakeUpstream(silence), "answers", "no answer", "check address"),
            (FakeUpstream(close), "answers", "closed by the server", "check address"),
            (FakeUpstream(lambda it, _: refusal(it.raw)), "answers", "for a", "allow"),
        ):
            check = check or "certificate"
            with self.subTest(text), upstream:
                found = self.examine(upstream)
                self.assertEqual((list(found)[-1], found[check].result), (check, FAIL))
                self.assertIn(text, found[check].detail)
                self.assertIn(cure, found[check].cure)
                if check != "answers":
                    self.assertEqual(list(found), ["connect", check])
                    self.assertEqual(upstream.queries, [])

    def test_failure_of_other_kinds_is_told(self) -> None:
        nowhere = Endpoint(LOCALHOST, 1, "dns.example")
        bug = mock.patch.object(dotproxy, "ask", side_effect=RuntimeError("oh"))
        with FakeUpstream() as upstream, bug:
            for where, check, text in (
                *((upstream, "answers", "oh"), (nowhere, "connect", "refused")),
            ):
                found = self.examine(where, domain="corp.example")[check]
                self.assertEqual(found.result, FAIL)
                self.assertIn(text, found.detail)
                self.assertIn("check address and port", found.cure)

    def test_alert_is_told_with_its_cure(self) -> None:
        where = Endpoint("192.0.2.1", 853, "a.test")
        for number, words in (
            (40, "handshake failure: it takes other ciphers"),
            (70, "protocol version: the server does not speak TLS 1.2"),
            (112, "unrecognized name: check the name behind # in --upstream"),
            (116, "certificate required: it wants to see a certificate"),
            (255, ": check in --upstream that this port is for DNS over TLS"),
        ):
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            tls = TRUST.context.wrap_bio(incoming, outgoing, server_hostname="a.test")
            with self.subTest(words), self.assertRaises(ssl.SSLError) as raised:
                with contextlib.suppress(ssl.SSLWantReadError):
                    tls.do_handshake()
                incoming.write(bytes([21, 3, 3, 0, 2, 2, number]))
                tls.do_handshake()
            error = dotproxy.describe_tls_error(raised.exception, where, TRUST)
            self.assertRegex(str(error), f"TLS handshake failed: .*{words}")

    def test_what_is_worth_a_note_and_idle_life_are_told(self) -> None:
        self.have(mock.patch.object(dotproxy, "EXPIRY_NOTICE", math.inf))
        self.have(mock.patch.object(ssl.SSLSocket, "session", None))
        for timeout, limit, text in (
            (0.3, 5.0, r"closed after 0\.[3-9] s"),
            (None, 0.1, r"still open after 0\.\d s"),
        ):
            self.have(mock.patch.object(dotproxy, "IDLE_LIMIT", limit))
            with self.subTest(text), FakeUpstream(life=timeout) as upstream:
                found = self.examine(upstream, doctor="idle")
                self.assertRegex(found["idle"].detail, text)
                self.assertEqual(found["resumption"].detail, "session not resumed")
                self.assertEqual(found["certificate"].result, WARN)
                self.assertIn("have its operator", found["certificate"].cure)

    def test_plain_server_of_a_domain_is_asked_for_that_alone(self) -> None:
        with FakeUpstream(on_accept="plain") as server:
            found = self.examine(server, domain="corp.example")

        self.assertEqual({finding.result for finding in found.values()}, {OK})
        self.assertEqual(found["handshake"].detail, "none: plain DNS in clear text")
        self.assertFalse({"resumption", "pin", "certificate"} & set(found))
        asked = {(message.qname, len(message.raw)) for message in server.queries}
        self.assertEqual(asked, {("corp.example", 12 + 18)})  # without EDNS


class DoctorReportTest(DotproxyTestCase):
    def test_report_has_each_check_and_cure_for_people_and_machines(self) -> None:
        report = [
            dotproxy.Finding("this host", "clock", OK, "it ticks"),
            dotproxy.Finding("192.0.2.1:853", "certificate", FAIL, "\x1b[31m", "mend"),
        ]
        lines = [
            *("this host", "  clock        ok    it ticks"),
            *("192.0.2.1:853", "  certificate  FAIL  \\027[31m", ""),
            *("2 checks: 1 failed, 0 to note", "  192.0.2.1:853, certificate: mend"),
        ]
        first = {"subject": "this host", "check": "clock", "result": OK}
        first |= {"detail": "it ticks", "cure": ""}

        self.assertEqual(dotproxy.text_report(report).splitlines(), lines)
        for findings, result in ((report, FAIL), (report[:1], OK)):
            found = json.loads(dotproxy.json_report(findings))
            self.assertEqual((found["result"], found["checks"][0]), (result, first))

    def test_host_comes_first_then_each_upstream(self) -> None:
        results = {PKI.good: OK, PKI.wrong_name: OK, PKI.expired: WARN}
        for certificate, result in results.items():
            with FakeUpstream(certificate=certificate) as upstream:
                found = dotproxy.examine(configure(upstream, host=LOCALHOST_V6))
            subjects = list(dict.fromkeys(finding.subject for finding in found))
            host = {f.check: f for f in found if f.subject == subjects[0]}

            where = f"127.0.0.1:{upstream.port}#dot.test"
            self.assertEqual(subjects, ["this host", where])
            checks = ["options", "program", "[::1]:0", "user", "descriptors"]
            self.assertEqual(list(host), [*checks, "CA certificates", "clock"])
            self.assertEqual(host["clock"].result, result)
            self.assertEqual("set the clock" in host["clock"].cure, result == WARN)
        config = configured("--ca-file=/nonexistent.pem", "--listen=127.0.0.1:0")
        *_, authorities, clock = dotproxy.examine(config)
        self.assertEqual((authorities.result, clock.check), (FAIL, "clock"))

    def test_missing_ipv6_is_excused_where_another_upstream_answers(self) -> None:
        def connect(where: Address, _: float) -> socket.socket:
            if where[0] == LOCALHOST:
                return dial(where, 5)
            raise OSError(errno.ENETUNREACH, "unreachable")

        dial, v6, v4 = socket.create_connection, "[2001:db8::1]#dot.test", "192.0.2.1#a"
        self.have(mock.patch.object(socket, "create_connection", connect))
        with FakeUpstream() as upstream:
            here, more = f"{LOCALHOST}:{upstream.port}#dot.test", f"--route=a={v6}"
            options = f"--ca-file={PKI.ca}", "--listen=127.0.0.1:0"
            for ends, results in (
                ([f"--upstream={each}" for each in (here, v6, v4)], [OK, WARN, FAIL]),
                ([f"--upstream={here}", more], [OK, FAIL]),
            ):
                found = dotproxy.examine(configured(*ends, *options))
                lasts = {finding.subject: finding.result for finding in found}
                self.assertEqual(list(lasts.values())[1:], results)


# ---- Running -------------------------------------------------------------------------


@functools.cache
def compiled_program() -> str:
    """Return a file with the program's bytecode: it starts in half the time."""
    path = os.path.join(_directory.name, "dotproxy.pyc")
    return py_compile.compile(dotproxy.__file__, path, doraise=True) or path


class Program:
    """The program in a process of its own, as `python -X dev -W error` runs it."""

    def __init__(self, *options: str, **variables: str) -> None:
        command = [sys.executable, "-X", "dev", "-W", "error", compiled_program()]
        clean = {k: v for k, v in os.environ.items() if not k.startswith("DOTPROXY_")}
        self._process = subprocess.Popen(
            [*command, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**clean, **variables},
        )
        self.signal = self._process.send_signal
        self.output = ""

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    @classmethod
    def before(cls, upstream: FakeUpstream, *options: str, **variables: str) -> Program:
        """Run it on a free port before this upstream."""
        where = f"--upstream={LOCALHOST}:{upstream.port}#dot.test"
        given = ["--listen=127.0.0.1:0", where, f"--ca-file={PKI.ca}", *options]
        return cls(*given, **variables)

    def line_with(self, word: str) -> str:
        """Wait for a line of output with this word."""
        deadline = time.monotonic() + 10.0
        assert self._process.stdout is not None
        while True:
            for line in self.output.splitlines(keepends=True):
                if word in line and line.endswith("\n"):
                    return line
            left = max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([self._process.stdout], [], [], left)
            octets = os.read(self._process.stdout.fileno(), 65536) if ready else b""
            if not octets:
                raise AssertionError(f"no {word!r} in the output: {self.output}")
            self.output += octets.decode()

    def addresses(self, fact: str = "listen") -> list[Address]:
        """Wait until it is ready, and return where it listens."""
        found = re.search(rf" {fact}=(.*?) \w+=", self.line_with("ready"))
        assert found is not None
        pairs = [text.rpartition(":") for text in found[1].split()]
        return [(host.strip("[]"), int(port)) for host, _, port in pairs]

    def wait(self, number: int = 0) -> int:
        """Send it a signal, if one is given, and return the exit status at its end."""
        if number:
            self.signal(number)
        octets, _ = self._process.communicate(timeout=10)
        self.output += octets.decode()
        return self._process.returncode


class DaemonTest(DotproxyTestCase):
    def test_watchdog_hears_nothing_while_a_loop_hangs(self) -> None:
        with serving() as served:
            daemon = served.daemon
            for server in daemon.servers:
                server.turned_at = -math.inf
            self.assertEqual(daemon.report(), ["STATUS=a receiving loop hangs"])
            wait_until(lambda: daemon.is_turning(time.monotonic()))
            alive, status = daemon.report()

        self.assertEqual(alive, "WATCHDOG=1")
        self.assertRegex(status, r"\ASTATUS=1 of 1 upstreams up, 0 queries in flight")

    def test_end_comes_in_an_order_that_loses_no_answer(self) -> None:
        ends = mock.Mock()
        wanted = (
            *("AdminServer.shutdown", "Clients.close", "Proxy.drain"),
            *("WorkerPool.close", "Proxy.close", "Timer.close"),
            "UDPServer.server_close",
        )
        with contextlib.ExitStack() as stack:
            for name in wanted:
                kind, method = getattr(dotproxy, name.split(".")[0]), name.split(".")[1]
                real = {"autospec": True, "side_effect": getattr(kind, method)}
                spy = stack.enter_context(mock.patch.object(kind, method, **real))
                ends.attach_mock(spy, name.replace(".", "_"))
            with serving(answer, "--admin=0", *ENCRYPTED):
                pass

        order = [name.replace("_", ".", 1) for name, _, _ in ends.mock_calls]
        self.assertEqual(tuple(each for each, _ in itertools.groupby(order)), wanted)

    def test_end_takes_as_long_with_clients_of_streams_as_without(self) -> None:
        clock, close = Clock(), mock.patch.object(dotproxy.Clients, "close")
        drain = mock.patch.object(dotproxy.Proxy, "drain")
        with mock.patch("dotproxy.elapsed", clock), close as closed, drain as drained:
            closed.side_effect = clock.advance
            dotproxy.Daemon(dotproxy.Config(listen=((LOCALHOST, 0),))).close()

        self.assertEqual(drained.call_args[0], (0.0,))


class MainTest(DotproxyTestCase):
    def check_answered(self, client: Client) -> None:
        with client:
            client.send(query())
            self.assertEqual(parse(client.receive()).addresses, ["192.0.2.1"])

    @unittest.skipUnless(sys.platform == "linux", "needs /proc")
    def test_service_of_systemd_without_streams_and_with_few_descriptors(self) -> None:
        udp = listener(socket.SOCK_DGRAM)
        shell = 'ulimit -Sn 256; LISTEN_PID=$$ exec "$0" "$@" 3<&0 <&- >&- 2>&-'
        command = ["sh", "-c", shell, sys.executable, compiled_program()]
        with udp, Notifications() as heard, FakeUpstream() as upstream:
            where = f"--upstream={LOCALHOST}:{upstream.port}#dot.test"
            variables = {"NOTIFY_SOCKET": heard.path, "LISTEN_FDS": "1"}
            process = subprocess.Popen(
                [*command, where, f"--ca-file={PKI.ca}"],
                env={**os.environ, **variables},
                stdin=udp.fileno(),
            )
            told = [heard.next(), heard.next()]
            self.check_answered(UDPClient(udp.getsockname()))
            found = {os.readlink(f"/proc/{process.pid}/fd/{n}") for n in range(3)}
            with open(f"/proc/{process.pid}/limits", encoding="ascii") as file:
                limits = file.read()
            process.send_signal(signal.SIGHUP)
            told += [heard.next(), heard.next(), heard.next()]
            process.terminate()
            told.append(heard.next())
            self.assertEqual(process.wait(10), 0)

        first = r"WATCHDOG=1\nSTATUS=[01] of 1 upstreams up, .*"  # it just connects
        status = r"WATCHDOG=1\nSTATUS=1 of 1 upstreams up, .*"
        reload = r"RELOADING=1\nMONOTONIC_USEC=\d+"
        end = r"STOPPING=1\nWATCHDOG=1"
        wanted = ("READY=1", first, reload, "READY=1", status, end)
        self.assertRegex("|".join(told), rf"\A{r'[|]'.join(wanted)}\Z")
        self.assertEqual(found, {os.devnull})
        self.assertNotRegex(limits, r"Max open files +256 ")

    def test_port_0_is_told_and_all_transports_answer(self) -> None:
        with tempfile.NamedTemporaryFile(suffix=".pem") as file, FakeUpstream() as up:
            os.chmod(file.name, 0o644)  # root is nobody by the time it is read again
            rotate(file.name, PKI.good)
            pair = "--tls-listen=127.0.0.1:0", f"--tls-cert={file.name}"
            options = "--listen=[::1]:0", "--admin=0", *pair
            with Program.before(up, *options) as program:
                for address in program.addresses():
                    self.check_answered(UDPClient(address))
                    self.check_answered(TCPClient(address))
                socket.create_connection(program.addresses("admin")[0]).close()
                (address,) = program.addresses("tls")
                with TLSClient(address) as client:
                    rotate(file.name, PKI.good2)
                    first, program.output = program.output, ""
                    program.signal(signal.SIGHUP)
                    program.line_with("certificate loaded")
                    with TLSClient(address) as other:
                        shown = [each.tls.getpeercert(True) for each in (client, other)]
                        self.assertNotEqual(*shown)
                    self.check_answered(client)
                self.assertEqual(program.wait(signal.SIGTERM), 0)

        said = r"\A.* INFO certificate loaded: .*\n.* INFO ready: .*\n\Z"
        self.assertRegex(first, said)
        self.assertRegex(program.output, r" INFO stopping\n\Z")

    def test_port_taken_is_one_line_and_status_1(self) -> None:
        for option, kind in (
            ("--listen", socket.SOCK_DGRAM),
            ("--admin", socket.SOCK_STREAM),
        ):
            with self.subTest(option, kind=kind), listener(kind) as holder:
                port = holder.getsockname()[1]
                options = [f"--listen={LOCALHOST}:0", f"{option}={LOCALHOST}:{port}"]
                with Program(f"--ca-file={PKI.ca}", *options) as program:
                    self.assertEqual(program.wait(), 1)
                said = rf"\Adotproxy: .*port {port} is taken.* {option} .*\n\Z"
                self.assertRegex(program.output, said)

    def test_end_answers_what_is_in_flight_and_every_line_of_json_is_of_the_schema(
        self,
    ) -> None:
        hold = Hold()
        options = "--log-format=json", "--query-log", "--log-level=debug"
        with (
            FakeUpstream(hold) as upstream,
            Program.before(upstream, *options) as program,
            UDPClient(program.addresses()[0]) as udp,
            TCPClient(program.addresses()[0]) as tcp,
        ):
            udp.send(query("udp.test"))
            tcp.send(query("tcp.test"))
            upstream.wait_for(lambda u: len(u.queries) == 2)
            program.signal(signal.SIGTERM)
            program.line_with("stopping")
            hold.release(2)
            for client in (udp, tcp):
                self.assertEqual(parse(client.receive()).addresses, ["192.0.2.1"])
            self.assertEqual(program.wait(), 0)

        lines = [json_line(line) for line in program.output.splitlines()]
        sources = [line["labels.source"] for line in lines if "labels.source" in line]
        self.assertEqual(sources, ["upstream"] * 2)
        self.assertEqual(sum(line.get("labels.umask") == "077" for line in lines), 1)

    def test_signals_tell_the_state_and_empty_the_cache(self) -> None:
        with FakeUpstream() as public, FakeUpstream(on_accept="plain") as private:
            where = f"tcp://{LOCALHOST}:{private.port}"
            with Program.before(public, f"--route=example.com={where}") as program:
                self.check_answered(UDPClient(program.addresses()[0]))
                program.signal(signal.SIGUSR1)
                program.line_with(f"state: name={where} ")
                program.signal(signal.SIGHUP)
                program.line_with("cache flushed: entries=1")
                self.check_answered(UDPClient(program.addresses()[0]))
                self.assertEqual(program.wait(signal.SIGINT), 0)

        user, number = os.geteuid() or "nobody", r"\d+\.\d{3}"
        self.assertEqual((len(public.queries), len(private.queries)), (0, 2))
        for pattern in (
            rf" ready: .* route=example.com={where} user={user} nofile=\d+ umask=077\n",
            r" state: in_flight=0 cache_entries=1 cache_bytes=\d+\n",
            rf" state: name={where} state=up latency={number} overdue_after={number} "
            rf"idle_life={number} connections=1 domain=example.com\n",
        ):
            self.assertEqual(len(re.findall(pattern, program.output)), 1, pattern)

    def test_health_check_and_doctor_print_a_report_and_have_a_status(self) -> None:
        with FakeUpstream() as upstream, Program.before(upstream) as program:
            ((_, port),) = program.addresses()
            for listen, status in ((f"127.0.0.1:{port}", 0), ("127.0.0.1:0", 1)):
                with Program("--healthcheck", DOTPROXY_LISTEN=listen) as check:
                    self.assertEqual(check.wait(), status)
                self.assertEqual(check.output.count("\n"), 1)
            with Program.before(upstream, "--doctor") as good:
                self.assertEqual(good.wait(), 0)
        with Program.before(upstream, "--doctor", "--log-format=json") as bad:
            self.assertEqual(bad.wait(), 1)

        self.assertIn(f"\n127.0.0.1:{upstream.port}#dot.test\n", good.output)
        self.assertRegex(good.output, r"checks: 0 failed, \d to note\n\Z")
        self.assertEqual(json.loads(bad.output)["result"], FAIL)


# ---- House style ---------------------------------------------------------------------


def read_beside(name: str) -> str:
    """Return a file of the directory that dotproxy.py is in, or skip the test."""
    path = pathlib.Path(dotproxy.__file__).parent / name
    if not path.exists():
        raise unittest.SkipTest(f"{name} is not here")
    return path.read_text(encoding="utf-8")


def names_of(statement: ast.stmt) -> tuple[set[str], set[str]]:
    """Return the names that a statement of a module defines, and those that it uses.

    Python itself tells, which knows locals and does not evaluate annotations.
    """
    codes = [compile(ast.Module([statement], []), "dotproxy.py", "exec")]
    stored: list[set[str]] = []
    used: set[str] = set()
    for code in codes:  # which grows
        codes += [each for each in code.co_consts if isinstance(each, types.CodeType)]
        steps = [(each.opname, each.argval) for each in dis.get_instructions(code)]
        stored.append({name for kind, name in steps if kind == "STORE_NAME"})
        used |= {name for kind, name in steps if kind == "LOAD_GLOBAL"}
        used |= {name for kind, name in steps if kind == "LOAD_NAME"} - stored[-1]
    return stored[0], used


class HouseStyleTest(DotproxyTestCase):
    # State that one lock guards, or that is decided together, stays in one place.
    LONG_CLASSES = frozenset(("Link", "Proxy", "Upstream", "UpstreamGroup"))
    BUDGETS: ClassVar[dict[str, int]] = {  # lines; of a directory: of all in it
        "dotproxy.py": 6000,
        "test_dotproxy.py": 7500,
        ".ci": 2200,
        "README.md": 750,
    }
    lines: list[str]
    tree: ast.Module

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        text = read_beside("dotproxy.py")
        cls.lines, cls.tree = text.splitlines(), ast.parse(text)

    def test_definitions_use_only_what_is_above_them(self) -> None:
        known: set[str] = set()
        found: dict[str, int] = {}  # where each name was used too early first
        for node in self.tree.body:
            defined, used = names_of(node)
            early = {name: line for name, line in found.items() if name in defined}
            self.assertEqual(early, {}, "used above their definition, in lines")
            known |= defined
            found.update(dict.fromkeys(used - known, node.lineno))

    def test_what_the_docstring_names_is_there(self) -> None:
        text = ast.get_docstring(self.tree) or ""
        known: dict[str, str] = {}  # by class, with what it inherits
        for node in self.tree.body:
            if isinstance(node, ast.ClassDef):
                bases = [known.get(getattr(b, "id", ""), "") for b in node.bases]
                known[node.name] = "\n".join([ast.unparse(node), *bases])
        for owner, more in re.findall(r"\b([A-Z]\w+)\.(\w+(?:(?:,| and) _\w+)*)", text):
            for name in re.findall(r"\w+", more.replace(" and ", " ")):
                with self.subTest(f"{owner}.{name}"):
                    self.assertTrue(re.search(rf"(def |self\.){name}\b", known[owner]))

    def test_whatever_is_logged_is_noted(self) -> None:
        every = map(names_of, self.tree.body)
        users = [defined for defined, used in every if "logger" in used]

        self.assertEqual(users, [{"note"}])

    def test_definitions_and_lines_are_not_too_long(self) -> None:
        for kind, limit, wanted in (
            (ast.FunctionDef, 40, set()),
            (ast.ClassDef, 150, self.LONG_CLASSES),  # no more and no fewer
        ):
            nodes = [node for node in ast.walk(self.tree) if isinstance(node, kind)]
            long = {node.name for node in nodes if self.count_code(node) > limit}
            self.assertEqual(long, wanted)
        texts = [line.partition("  # type: ignore")[0] for line in self.lines]
        self.assertEqual([text for text in texts if len(text) > 88], [])

    def count_code(self, node: ast.stmt) -> int:
        """Count the lines of code: no comments, no docstrings, no blank ones."""
        numbers = set(range(node.lineno, (node.end_lineno or 0) + 1))
        for each in ast.walk(node):
            if isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant):
                numbers -= set(range(each.lineno, (each.end_lineno or 0) + 1))
        lines = [self.lines[number - 1].strip() for number in numbers]
        return sum(bool(line) and not line.startswith("#") for line in lines)

    def test_no_file_outgrows_its_budget(self) -> None:
        for name, most in self.BUDGETS.items():
            path = pathlib.Path(dotproxy.__file__).parent / name
            files = [each for each in (path, *path.glob("*")) if each.is_file()]
            with self.subTest(name):
                lines = sum(each.read_bytes().count(b"\n") for each in files)
                self.assertLessEqual(lines, most)

    def test_readme_table_is_what_help_says(self) -> None:
        rows = re.findall(r"^\| (`--.*) \|$", read_beside("README.md"), re.M)
        table = [tuple(re.split(r" *\| *", row.replace("`", ""))) for row in rows]
        wanted = [row for row in table if row[0] != "--version"]

        self.assertEqual(wanted, options_in_help())


def options_in_help() -> list[tuple[str, ...]]:
    """Return the options as --help has them: name, default and meaning."""
    found: list[tuple[str, ...]] = []
    for action in dotproxy.build_parser()._actions:
        if action.dest not in ("help", "version"):
            value = f"[{action.metavar}]" if action.nargs == "?" else action.metavar
            meaning, _, default = str(action.help).rstrip(")").partition(" (default: ")
            found.append((f"{action.option_strings[-1]} {value}", default, meaning))
    return found


# ---- Deployment ----------------------------------------------------------------------


class ImageTest(DotproxyTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.dockerfile = read_beside("Dockerfile").replace("\\\n", "")

    def test_every_module_that_is_imported_is_in_it(self) -> None:
        lists = dict(re.findall(r'^ARG (\w+)="(.*)"$', self.dockerfile, re.M))
        wanted = {name.partition(".")[0] for name in dotproxy.LATE_MODULES}
        for node in ast.walk(ast.parse(read_beside("dotproxy.py"))):
            if isinstance(node, ast.Import):
                wanted.update(alias.name.partition(".")[0] for alias in node.names)
            if isinstance(node, ast.ImportFrom):
                wanted.add(str(node.module).partition(".")[0])

        wanted -= {"ctypes", "encodings"}  # for root alone; a list of its own
        held = {*lists["MODULES"].split(), *lists["EXTENSIONS"].split()}
        self.assertEqual(wanted - held - set(sys.builtin_module_names), set())

    def test_has_the_version_the_ports_and_the_health_check(self) -> None:
        self.assertIn(f'image.version="{dotproxy.__version__}"', self.dockerfile)
        (text,) = re.findall(r'^ENV DOTPROXY_LISTEN="(.*)"$', self.dockerfile, re.M)
        found = re.findall(r'^(?:.* CMD|ENTRYPOINT) \["(.*)"\]$', self.dockerfile, re.M)

        listen = configured(LISTEN=text).listen
        self.assertEqual(listen, (("0.0.0.0", 5353), ("::", 5353)))
        self.assertIn("\nEXPOSE 5353/udp 5353/tcp\n", self.dockerfile)
        check, entry = (text.split('", "') for text in found)
        self.assertEqual(check, [*entry, "--healthcheck"])


class ReadmeTest(DotproxyTestCase):
    blocks: dict[str, str]
    readme: str

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.readme = read_beside("README.md")
        named = r"^`([\w.-]+)`:\n\n```\w+\n(.*?)^```$"
        cls.blocks = dict(re.findall(named, cls.readme, re.M | re.S))

    def test_variables_are_options_with_good_values(self) -> None:
        blocks = "\n".join(self.blocks.values())
        found = re.findall(r"\bDOTPROXY_(\w+)(?:=|: |\n +value: )(.+)", blocks)

        self.assertGreaterEqual(len(found), 6)
        for name, text in found:
            with self.subTest(name=name, text=text):
                self.assertIn(name.lower(), dotproxy.Config._fields)
                configured(**{name: text})

    def test_commands_have_options_that_exist(self) -> None:
        lines = self.readme.replace("\\\n", "")
        commands = re.findall(r"^    [$#] .*dotproxy\.py( .*)", lines, re.M)
        used = re.findall(r" --([a-z-]+)", "".join(commands))

        self.assertGreater(len(used), 5)
        fields = {name.replace("-", "_") for name in used}
        self.assertEqual(fields - set(dotproxy.Config._fields), set())

    def test_manifests_fit_the_image(self) -> None:
        dockerfile = read_beside("Dockerfile")
        (user,) = re.findall(r"^USER (\d+):\d+$", dockerfile, re.M)
        (ports,) = re.findall(r"^EXPOSE (.*)$", dockerfile, re.M)

        published = re.findall(r'"53:(\d+/\w+)"', self.blocks["compose.yaml"])
        manifest = self.blocks["dotproxy.yaml"]
        numbers = re.findall(r"runAs(?:User|Group): (\d+)", manifest)
        self.assertEqual(numbers, [user, user])
        dns = r"name: dns(?:-tcp)?, containerPort: (\d+), protocol: (\w+)"
        opened = ["/".join(each).lower() for each in re.findall(dns, manifest)]
        self.assertEqual([published, opened], [ports.split()] * 2)
        tags = re.findall(r"image: dotproxy:(\S+)", manifest)
        self.assertEqual(tags, [dotproxy.__version__])


# ---- Running the tests ---------------------------------------------------------------


def leftovers(troubles: Iterable[str]) -> list[str]:
    """Return what nobody has cleaned up: threads, sockets, errors that went unseen."""
    gc.collect()
    threads = [
        t.name for t in threading.enumerate() if t is not threading.main_thread()
    ]
    sockets = [
        repr(each)
        for each in gc.get_objects()
        if isinstance(each, socket.socket) and each.fileno() >= 0
    ]
    return [*threads, *sockets, *troubles]


def main() -> int:
    """Run the tests; the last line on stdout has the numbers."""
    troubles: list[str] = []

    def report(unraisable: sys.UnraisableHookArgs) -> None:
        troubles.append(f"{unraisable.exc_value!r} in {unraisable.object!r}")

    sys.unraisablehook = report
    result = unittest.main(exit=False).result
    bad = {
        str(getattr(test, "test_case", test))
        for test, _ in (*result.failures, *result.errors)
    } | {str(test) for test in result.unexpectedSuccesses}
    left = leftovers(troubles)
    for each in left:
        print("left over:", each, file=sys.stderr)
    skipped, failed = len(result.skipped), len(bad) + bool(left)
    passed = max(0, result.testsRun - len(bad) - skipped)
    sys.stderr.flush()
    print(f"{passed} passed, {failed} failed, {skipped} skipped", flush=True)
    return 1 if failed or not result.testsRun else 0


if __name__ == "__main__":
    sys.exit(main())
