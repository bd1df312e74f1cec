#!/usr/bin/env python3
"""Tests of dotproxy.

    python3 -X dev -W error test_dotproxy.py                            all of them
    python3 -X dev -W error test_dotproxy.py MessageTest                one class
    python3 -X dev -W error test_dotproxy.py MessageTest.test_NAME      one test

The upstream is faked (`FakeUpstream`, a DoT server in this process that does as a
script says), and so is the clock wherever one can be injected. Sockets, TLS and
certificates are real, and so are the processes of `MainTest`. Every wait has a limit: a
broken server fails a test and never hangs it.

The file has the kit first (builders, certificates, clock, clients, fake upstream), then
the test classes in the order of dotproxy.py. The last line on stdout is the result; a
thread, a socket or a warning that is left over at the end is a failure too.
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
import linecache
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
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import types
import unittest
import warnings
import xml.etree.ElementTree
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar, Union
from unittest import mock

import dotproxy
from dotproxy import (
    Cache,
    Endpoint,
    FormatError,
    Proxy,
    Rcode,
    UpstreamError,
)

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
    """A resource record; names inside `rdata` are left as they came."""

    name: str
    type: int
    rrclass: int
    ttl: int
    rdata: bytes


class Opt(NamedTuple):
    """What an OPT record says (RFC 6891); the upper RCODE bits are in the message."""

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
    labels = name.encode("latin-1").rstrip(b".").split(b".") if name != "." else []
    if not all(0 < len(label) < 64 for label in labels):
        raise ValueError(f"bad label in {name!r}")
    return b"".join(bytes([len(label)]) + label for label in labels) + b"\0"


def decode_name(message: bytes, offset: int) -> tuple[str, int]:
    """Return the name at `offset`, its case kept, and the offset behind it."""
    labels: list[bytes] = []
    end = 0  # behind the first pointer, once there was one
    while size := message[offset]:
        if size >= 0xC0:
            target = struct.unpack_from("!H", message, offset)[0] & 0x3FFF
            if target >= offset:
                raise ValueError(f"name at {offset} points forward to {target}")
            end, offset = end or offset + 2, target
            continue
        if size >= 0x40 or offset + 1 + size > len(message):
            raise ValueError(f"bad label at {offset}")
        labels.append(message[offset + 1 : offset + 1 + size])
        offset += 1 + size
        if sum(map(len, labels)) + len(labels) > 254:
            raise ValueError("name over 255 bytes")
    return b".".join(labels).decode("latin-1") or ".", end or offset + 1


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


def soa(name: str = "example.com", ttl: int = 300, minimum: int = 300) -> bytes:
    """Build the SOA record of a negative answer (RFC 2308)."""
    names = encode_name(f"ns.{name}") + encode_name(f"hostmaster.{name}")
    numbers = struct.pack("!5I", 1, 7200, 3600, 86400, minimum)
    return record(name, "SOA", names + numbers, ttl)


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
    """Parse all of a message, or raise ValueError."""
    try:
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
    except (IndexError, struct.error) as error:
        raise ValueError(f"message of {len(message)} bytes ends early") from error
    answers, authority, additional = sections
    opts = [entry for section in sections for entry in section if entry.type == OPT]
    if questions > 1 or offset != len(message) or len(opts) > 1:
        raise ValueError(f"{questions} questions, {len(opts)} OPT, end at {offset}")
    if opts and (opts[0].name != "." or opts[0] not in additional):
        raise ValueError(f"OPT of {opts[0].name}, or outside the additional section")
    rcode = flags & RCODE_MASK | (opts[0].ttl >> 24 << 4 if opts else 0)
    return Message(
        *(message, id, flags, rcode, question, qname, qtype, qclass),
        *(answers, authority, [entry for entry in additional if entry.type != OPT]),
        opt=_parse_opt(opts[0]) if opts else None,
    )


def _parse_record(message: bytes, offset: int) -> tuple[Record, int]:
    name, offset = decode_name(message, offset)
    number, rrclass, ttl, size = struct.unpack_from("!HHIH", message, offset)
    start, end = offset + 10, offset + 10 + size
    if end > len(message):
        raise ValueError(f"RDLENGTH {size} past the end")
    return Record(name, number, rrclass, ttl, message[start:end]), end


def _parse_opt(opt: Record) -> Opt:
    options, rest = [], opt.rdata
    while rest:
        if len(rest) < 4 or len(rest) < (end := 4 + int.from_bytes(rest[2:4], "big")):
            raise ValueError("option past the end")
        options.append((int.from_bytes(rest[:2], "big"), rest[4:end]))
        rest = rest[end:]
    return Opt(opt.rrclass, opt.ttl >> 16 & 0xFF, opt.ttl & 0xFFFF, options)


# ---- Test certificates ---------------------------------------------------------------
# The standard library cannot make them; nothing of these is secret. Made with `openssl
# ca` for keys of prime256v1, valid from 2020 to 2100, `expired` for January 2020 alone.
# The CAs have critical basicConstraints=CA:TRUE and keyUsage=keyCertSign,cRLSign, the
# others a subjectAltName (dot.test; of `good` 127.0.0.1 and ::1 as well), critical
# keyUsage=digitalSignature and extendedKeyUsage=serverAuth. All but `good2` are for the
# same key. In DER, one behind the other, compressed by zlib; then the octets of each.
CERTIFICATES = """
eNozaGKsMWhiVFrAzMTIxCQi8bQ4puIg/8QDZz5lTZiw+VbpRm4pAy42Dq02j3O2LMxMBtKGkgbibMyhLMw8Ain5
JQVF+RWVCiWpxSUKzo4GCuK8RgYGhkAIBlES/EYgJkIAv/ZIA2E2drBNTIxQK5kZ2ZmdGFhWPbB/wMIyrXeiSkUG
202+a/++JTeealw01UotxMLGPaxzcpdY4a9HuzcyPpV/8e1qus3cf/Vip9fec5kjvtLHVDDizGInAwcDfqC9ssKM
jP9ZWA2YgZQBH0iAHyQA9Bkjm4EsiM/HIsYikpbTffObg6C73cu5d1U+JflHHJQSRA4GZg8GA1cmRYZz3roim2PW
cjQViL1/vN1uvtOx8AIdsdL5IVrPxXItFVczKYRci2HazfddwaPxQf/Uh7fnxosk5m7m1wz72n43vdW3oh0Y9ieA
OA8a/pnvxCy+XjSvO926Jz1yNV/74sciGtQMf2FDQXA4ALVzALXrgXTiCffybWm8D2o27Ftp3vRpynY7/giVhUyV
2unFuuvcdGbvbct5GjrzeYFhz6/JvhoPL/cYavU+sJvcuPvPnW3XDW+f+3n+0+LGqQaNkwy0QQEryKJioNQEt7Wd
pZ6BgbFdgAEVMKLGCnsD0G1AvioLDygYtNkYWVnZmRkN5EGCyiwSBmIN2CMLEZcB6ztSIidtyLBK3XFH32JjzfTH
vmsw41IhvGbmttoNGq1S/8RatmulFVZ3aZ3aJ7lyplBHRYacf/hbYGx3GB7NspvIO+/P69bGZz6TFQ/XrLFeMOv0
hcNvOF+JSkidQItLBbbUEq/NZkdlRP4/Lfa62b2ttGXfAMZls7nWK6PkwHmvT64qvbdb91T8Nae5Zzt7ty/Nv1nl
2nCMSW/l+o9C9ZV7nRyZoxv0XtsElbauX88m83u72xvGrFTFxMEQl8URXxavWzlj9lHO/qarDumPxZm5ZLHEZYJl
0UUf1YYF4nMSudIri1s2+ipyW5jctWvjalFz0DzYA4zLtTESPwpkUrXTXWSXd1TlNsdt/ZD88vX/Aj/35Xwdf324
gPF4DIhzoHFZKJHL/EBS/KpWsP19L6c1/d3X0pZRMy5FDYUNBCHaufJLMlKLaJ8zJxo09hmoQ2JTwUCuCcneJoHE
nMzEYj0klwxQrpSPY7TTXMTF1SSXvvrE9GebxLll9me5COteNH9uuEL88GFgTG6//W15sUCr2OQptxpdpB8m3+8x
0Z3PKCnIVFSolbzj0m5gLK4B4iBoTPIqLeP6VbDW5d+tHSob//TeuJ2X/ZD4mJRDi0kw12jgytcagypIVAiCogKR
IwcovhQZtpwUOPBrqu0895A+C5WY8zq86xYnnvA4oMRS6xOyqqB+D5OCzV7fN5E71Z6HT7ZPDDzpkLK/uz1gruPB
wO0NbdO0ry/8A4yrlUDsB42v2ofty/JOsVf/uMi7V2a79d+AE4mbUOILOeuU5mXn5ZfnDc66kHpxZcUeu9uOrYPX
stf77xVDnj3C0fYLSYkrTwYDN2Bc/f1/vHQF25brf+ZNCMkP6JxfccZ7x0Vew+0vNnxI+aQSWgVUcvZ+UV2Gld+h
VU97HFbMmVp4734+Y86qbTGsgV/rX3/yn21QzsTIyKJwbt4jli3dim7TbnwPuHvPbav1i1fnWYumZEzicF+kzD7p
+gIuRFgudKFGaEIt5t2zhPdZLedGrytfWr97xp88s6Jt1suqzWtv/XfmZfUqasC0mNJqEACZCLAg
"""
SIZES = {
    **{"ca": 384, "good": 460, "good2": 460, "wrong_name": 458, "expired": 432},
    **{"unknown_ca": 429, "key": 121, "key2": 121},
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
    octets = zlib.decompress(base64.b64decode(CERTIFICATES))
    text = ssl.DER_cert_to_PEM_cert(octets[start : start + SIZES[name]])
    return text.replace("CERTIFICATE", "EC PRIVATE KEY") if "key" in name else text


def _write_pem(name: str, *blocks: str, marks: str = "") -> str:
    path = os.path.join(_directory.name, f"{name}.pem")
    with open(path, "w", encoding="ascii") as file:
        text = "".join(map(_read_pem, blocks or (name,)))
        file.write(text.replace("-----\n", "-----\n" + marks, 1))
    return path


# Of a key that is encrypted: this one is not, but a passphrase is asked for.
LOCKED = f"Proc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,{'0' * 32}\n\n"


class PKI:
    """Paths of the test certificates; the first ones, but `ca`, with their key."""

    ca = _write_pem("ca")
    good = _write_pem("good_and_key", "good", "key")
    good2 = _write_pem("good2_and_key", "good2", "key2")
    wrong_name = _write_pem("wrong_name_and_key", "wrong_name", "key")
    expired = _write_pem("expired_and_key", "expired", "key")
    unknown_ca = _write_pem("unknown_ca_and_key", "unknown_ca", "key")
    good_alone = _write_pem("good")
    key_alone = _write_pem("key")
    key2_alone = _write_pem("key2")
    locked_key = _write_pem("locked_key", "key", marks=LOCKED)


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
C = TypeVar("C", bound="DNSClient")


def frame(*messages: bytes) -> bytes:
    """Put the two-byte length before each message (RFC 1035 section 4.2.2)."""
    return b"".join(struct.pack("!H", len(each)) + each for each in messages)


class DNSClient:
    """A socket that a `with` block closes."""

    def __init__(self, opened: socket.socket) -> None:
        self.socket = opened

    def __enter__(self: C) -> C:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


class UDPClient(DNSClient):
    """A DNS client over UDP that hears the server's own address only."""

    def __init__(self, server: Address, timeout: float = 5.0) -> None:
        family = socket.AF_INET6 if ":" in server[0] else socket.AF_INET
        super().__init__(socket.socket(family, socket.SOCK_DGRAM))
        self.socket.settimeout(timeout)
        self.socket.connect(server)

    def send(self, *messages: bytes) -> None:
        for message in messages:
            self.socket.send(message)

    def receive(self) -> bytes:
        return self.socket.recv(65535)


class TCPClient(DNSClient):
    """A DNS client over TCP; one deadline for all."""

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
        data = b""
        while len(data) < size:
            self._limit()
            chunk = self.socket.recv(size - len(data))
            if not chunk:
                raise EOFError(f"closed after {len(data)} of {size} bytes")
            data += chunk
        return data

    def _limit(self) -> None:
        self.socket.settimeout(max(0.001, self._deadline - time.monotonic()))


def trusting(alpn: Iterable[str] = ("dot",)) -> ssl.SSLContext:
    """Make the settings of a DoT client that trusts the test CA."""
    context = ssl.create_default_context(cafile=PKI.ca)
    context.set_alpn_protocols(list(alpn))
    return context


class TLSClient(TCPClient):
    """A DNS client over TLS that verifies the server's name."""

    def __init__(
        self,
        server: Address,
        timeout: float = 5.0,
        *,
        source: str = "",
        context: ssl.SSLContext | None = None,
        session: ssl.SSLSession | None = None,
    ) -> None:
        super().__init__(server, timeout, source=source)
        self._context = context or trusting()
        try:
            self.tls = self._context.wrap_socket(
                self.socket,
                server_hostname="dot.test",
                session=session,
                suppress_ragged_eofs=False,
            )
        except BaseException:
            self.socket.close()
            raise
        self.socket = self.tls

    @property
    def certificate(self) -> bytes:
        return self.tls.getpeercert(True) or b""

    def receive(self) -> bytes:
        """Return the next message, or raise EOFError if the server closed."""
        try:
            return super().receive()
        except ssl.SSLZeroReturnError:
            raise EOFError("closed, after close_notify of both ends") from None

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
    alpn: str | None = None
    version: str | None = None
    resumed: bool = False
    closed: bool = False
    busy_until: float = 0.0  # where one answer waits for another
    heard_at: float = 0.0
    queries: list[Message] = dataclasses.field(default_factory=list)
    stream: bytes = b""

    def perform(self, reply: Reply, message: Message) -> None:
        """Do what a script or its result says."""
        if self.closed:
            return
        if isinstance(reply, str):
            self.send(response(message.raw, reply))
        elif isinstance(reply, bytes):
            self.send(reply)
        elif reply is not None:
            self.perform(reply(message, self), message)

    def perform_at(self, when: float, reply: Reply, message: Message) -> None:
        """Do it at this monotonic time; any thread may ask."""
        self.upstream.call(functools.partial(self.perform, reply, message), when)

    def send(self, *messages: bytes) -> None:
        """Send messages, each with its length, in one TLS record."""
        self.send_raw(frame(*messages))

    def send_raw(self, data: bytes) -> None:
        """Send bytes as they are in one TLS record."""
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
                self.alpn = self.socket.selected_alpn_protocol()
                self.resumed = bool(self.socket.session_reused)
                self.version = self.socket.version()
                if self.mode == "leave":
                    self.close()
            while not self.closed and (data := self.socket.recv(65536)):
                self._hear(data)
            if not self.closed:
                self.close()

    def _trickle(self, octets: bytes = b"x") -> None:
        with contextlib.suppress(OSError):
            self.socket.send(octets)
            self.upstream.call(self._trickle, time.monotonic() + 0.05)

    def _hear(self, data: bytes) -> None:
        self.heard_at = time.monotonic()
        if self.upstream.idle_timeout is not None:
            expire = functools.partial(self._expire, self.heard_at)
            self.upstream.call(expire, self.heard_at + self.upstream.idle_timeout)
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

    def _expire(self, heard_at: float) -> None:
        if self.heard_at == heard_at and not self.closed:
            self.close()


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
    idle_timeout: float | None = None
    no_resumption: str = ""  # who offers a session gets an "alert", or the "end"
    refused: int = 0  # handshakes for that
    handshake_delay: float = 0.0
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

    @property
    def address(self) -> Address:
        return self.host, self.port

    @property
    def live(self) -> list[FakeConnection]:
        return [each for each in self.accepted if not each.closed]

    @property
    def connections(self) -> int:
        return len(self.accepted)

    @property
    def handshakes(self) -> int:
        return sum(connection.version is not None for connection in self.accepted)

    @property
    def resumed(self) -> int:
        return sum(connection.resumed for connection in self.accepted)

    def start(self) -> None:
        """Listen: on any free port at first, on the same one ever after."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        self._listener = socket.create_server(self.address, family=family)
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
        name = f"fake-upstream-{self.port}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def stop(self, *, reset: bool = False) -> None:
        """Refuse connections and close those there are; may be started again."""
        if self._thread:
            self.call(functools.partial(self._stop, reset))
            self._thread.join()
            self._thread = None

    def drop_connections(self, *, reset: bool = False) -> None:
        """Close all connections, with close_notify and FIN or with RST."""
        dropped = threading.Event()
        self.call(functools.partial(self._drop, reset))
        self.call(dropped.set)
        dropped.wait(10)

    def call(self, action: Callable[[], None], when: float = 0.0) -> None:
        """Have its thread make a call at this monotonic time; any thread may ask."""
        when = max(when, time.monotonic())
        self._calls.enterabs(when, next(_order), self._attempt, (action,))
        with contextlib.suppress(OSError):
            self._waker.send(b"!")

    def wait_for(
        self, predicate: Callable[[FakeUpstream], bool], timeout: float = 5.0
    ) -> None:
        """Wait until the predicate of the upstream holds, or fail the test."""
        with contextlib.suppress(AssertionError):
            wait_until(lambda: predicate(self), timeout)
        seen = self.connections, self.handshakes, len(self.live), len(self.queries)
        text = f"connections, with handshakes, open ones, queries: {seen}"
        assert predicate(self), text

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
                        self._attempt(key.data.serve, key.data)

    def _attempt(
        self, action: Callable[[], None], connection: FakeConnection | None = None
    ) -> None:
        try:
            if not self._stopping:
                action()
        except Exception as error:
            if not isinstance(error, OSError):  # the client has gone, or dislikes us
                self.failures.append(error)
            if connection:
                connection.end()

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            client, _ = self._listener.accept()
            modes = self.on_accept.split()
            mode = modes[min(len(self.accepted), len(modes) - 1)]
            connection = FakeConnection(self, client, mode)
            self.accepted.append(connection)
            self.peak = max(self.peak, len(self.live))
            begin = functools.partial(self._attempt, connection.begin, connection)
            self.call(begin, time.monotonic() + self.handshake_delay)

    def _drop(self, reset: bool) -> None:
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
        (connection,) = [each for each in self.live if each.socket is tls]
        connection.server_name = name
        if not self.no_resumption or not tls.session_reused:
            return None
        self.refused += 1
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

    def script(message: Message, connection: FakeConnection) -> Reply:
        return replies[min(len(connection.upstream.queries), len(replies)) - 1]

    return script


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
Client = Union[UDPClient, TCPClient]
TRUST = dotproxy.Trust(PKI.ca)
# The options of a proxy that serves encrypted clients as well.
ENCRYPTED = "--tls-listen=127.0.0.1:0", f"--tls-cert={PKI.good}"


class ErrorLog(logging.Handler):
    """Keeps what dotproxy logs as an error of its own, with the traceback."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


ERROR_LOG = ErrorLog()
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
    def streams(self) -> list[dotproxy.TCPServer]:
        return [s for s in self.daemon.servers if isinstance(s, dotproxy.TCPServer)]

    @property
    def tcp(self) -> dotproxy.TCPServer:
        return next(server for server in self.streams if not server.encrypted)

    @property
    def tls(self) -> dotproxy.TCPServer:
        return next(server for server in self.streams if server.encrypted)

    def metrics(self) -> list[dotproxy.Sample]:
        return self.tcp.proxy.metrics.samples()

    def wait_for_in_flight(self, count: int) -> None:
        """Wait until so many queries of clients have no answer yet."""
        wait_until(lambda: self.tcp.proxy.in_flight == count)


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
# Most are tables of messages and of what they have to come to. What a client gets is
# judged by the tests' own parser.

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
    "header only": counted(1, 0, 0, 0),
    "name past the end": counted(1, 0, 0, 0, body=b"\3www"),
    "class past the end": counted(1, 0, 0, 0, body=QUESTION[:-1]),
    "compression in the question": query(b"\xc0\x0c"),
    "compression behind a label": query(b"\3www\xc0\x0c"),
    "label of 64 octets": query(b"\x40" + b"a" * 64 + b"\0"),
    "label of type 10": query(b"\x80a\0"),
    "name of 256 octets": query(TOO_LONG_NAME),
    "two OPT": carrying(OPT_RECORD, OPT_RECORD),
    "OPT with a name": carrying(record("a", OPT, b"")),
    "OPT with a pointer": carrying(record(b"\xc0\x0c", OPT, b"")),
    "ARCOUNT without a record": counted(1, 0, 0, 1, body=QUESTION),
    "record header past the end": query(do=True)[:-1],
    "RDLENGTH past the end": query(do=True)[:-1] + b"\1",
    "option header past the end": query(do=True, options=b"\0\x0a\0"),
    "option past the end": query(do=True, options=option(COOKIE, b"12345678")[:-1]),
    "record in the answer section": carrying(A_RECORD, counts=(1, 0)),
    "record in the authority section": carrying(A_RECORD, counts=(0, 1)),
    "OPT in the answer section": carrying(OPT_RECORD, counts=(1, 0)),
}


def parsed_response(message: bytes, asked: bytes | None = None) -> dotproxy.Response:
    """Parse a response to a query, or to the default one."""
    question = parse(asked or query()).question
    return dotproxy.parse_response(message, 12 + len(question))


def answer_to(
    asked: bytes, message: bytes, transport: dotproxy.Transport = UDP
) -> Message:
    """Return what the client that asked gets of an upstream's response."""
    received = dotproxy.parse_query(asked, transport)
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
    def rcode(self, message: bytes) -> int:
        with self.assertRaises(FormatError) as caught:
            dotproxy.parse_query(message)
        return caught.exception.rcode

    def test_malformed_query_is_a_format_error(self) -> None:
        whole = query(do=True, options=option(UNKNOWN_OPTION, b"abc"))
        cut = {f"{size} octets": whole[:size] for size in range(12, len(whole))}
        for name, message in {**MALFORMED_QUERIES, **cut}.items():
            with self.subTest(name):
                self.assertEqual(self.rcode(message), Rcode.FORMERR)

    def test_opcode_other_than_query_is_not_implemented(self) -> None:
        for opcode in range(1, 16):
            bare = counted(0, 0, 0, 0, flags=opcode << 11)
            for message in (query(opcode=opcode), bare):
                with self.subTest(opcode=opcode):
                    self.assertEqual(self.rcode(message), Rcode.NOTIMP)

    def test_what_is_refused_and_what_the_cache_may_answer_and_keep(self) -> None:
        ixfr = counted(1, 0, 1, 0, body=query(rrtype=251)[12:] + soa())
        version_1 = query(do=True, edns_version=1)
        for name, message, refusal, answers, keeps in (
            ("usual", query(), 0, True, True),
            ("RD=0", query(rd=False), 0, True, False),
            ("past the cache", query(do=True, options=option(UNCACHED)), 0, 0, 0),
            ("ANY", query(rrtype="ANY"), 0, False, False),
            ("type with ANY's low octet", query(rrtype=0x01FF), 0, True, True),
            ("type with AXFR's low octet", query(rrtype=256 + 252), 0, True, True),
            ("AXFR", query(rrtype="AXFR"), Rcode.REFUSED, False, False),
            ("IXFR with the SOA it has", ixfr, Rcode.REFUSED, False, False),
            ("EDNS version 1", version_1, Rcode.BADVERS, False, False),
            ("EDNS 255", query(do=True, edns_version=255), Rcode.BADVERS, 0, 0),
        ):
            with self.subTest(name):
                asked = dotproxy.parse_query(message)
                form = asked.form
                self.assertEqual(form.refusal, refusal)
                self.assertEqual((form.cachable, form.storable), (answers, keeps))
                self.assertEqual(bool(asked.cache_key), answers)

    def test_what_is_unknown_or_of_no_use_passes(self) -> None:
        for name, message in {
            "type": query(rrtype=65280),
            "class CHAOS": query(rrclass=3),
            "class 65535": query(rrclass=65535),
            "EDNS flags": carrying(record(".", OPT, b"", 0x7FFF)),
            "header flags": carrying(flags=0x07FF),
            "record that is no OPT": carrying(record(".", 250, b"signature")),
            "record with a pointer": carrying(record(b"\1a\xc0\x0c", 250, b"")),
            "longest name": query(LONGEST_NAME),
            "root": query(".", "NS"),
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

    def test_random_damage_gives_a_query_or_a_format_error(self) -> None:
        good = [
            query(),
            query("a.example", do=True, options=option(COOKIE, b"12345678")),
            query(do=False, options=option(UNKNOWN_OPTION, b"abc") + option(PADDING)),
        ]
        seeds, accepted = [*good * 20, *MALFORMED_QUERIES.values()], 0
        for message in damaged(seeds, 6000):
            if len(message) >= 12:
                with contextlib.suppress(FormatError):
                    asked = dotproxy.parse_query(message)
                    parse(b"\0\0" + dotproxy.build_upstream_query(asked))
                    error = dotproxy.error_response(Rcode.SERVFAIL)
                    got = parse(dotproxy.build_answer(asked, error))
                    self.assertEqual(got.question, message[12:][: len(got.question)])
                    accepted += 1
        self.assertGreater(accepted, 500)

    def test_queries_that_one_answer_serves_have_the_same_key(self) -> None:
        usual = dotproxy.parse_query(query("www.example.com"))
        for name, message in {
            "ID": query(id=0x4321),
            "case of the name": query("WWW.eXample.COM"),
            "AD": query(ad=True),
            "flags of no meaning": carrying(flags=RD | 0x0640),
            "EDNS, its size and flags": carrying(record(".", OPT, b"", 0x7FFF, 4096)),
            **{
                f"option {code}": query(do=False, options=option(code, bytes(size)))
                for code in (5, 8, 10, 11, 12, 65001, 65073, 65074, 26946)
                for size in (8, 4000)
            },
        }.items():
            with self.subTest(name):
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


class UpstreamQueryTest(DotproxyTestCase):
    def test_rd_cd_and_do_are_carried_and_ad_is_set(self) -> None:
        for rd, cd, do in itertools.product((False, True), repeat=3):
            flags = RD * rd | CD * cd | AA | TC | RA | 0x004F
            asked = carrying(record(".", OPT, b"", 0x7FFF | DO * do), flags=flags)
            with self.subTest(rd=rd, cd=cd, do=do):
                sent = upstream_query(asked)
                assert sent.opt is not None
                self.assertEqual(sent.flags, RD * rd | CD * cd | AD)
                self.assertEqual(sent.opt.flags, DO * do)

    def test_question_is_the_clients_and_opt_is_ours(self) -> None:
        known = [option(code, b"12345678") for code in (5, SUBNET, COOKIE, EDE, 65001)]
        ours = option(KEEPALIVE) + option(PADDING, b"not zero")
        for asked, (edns, codes) in itertools.product(
            (
                *(query("a" * size, do=bool(size % 2)) for size in range(1, 64)),
                query("WwW.eXample.com", "TXT", rrclass=3),
                query(do=False, size=65535),
                query(do=True, size=0, options=b"".join(known) + ours),
            ),
            (
                (dotproxy.PADDED, [KEEPALIVE, PADDING]),
                (dotproxy.UNPADDED, [KEEPALIVE]),
                (dotproxy.NO_OPTIONS, []),
                (dotproxy.NO_EDNS, None),
            ),
        ):
            with self.subTest(asked=asked.hex(), edns=edns):
                sent = upstream_query(asked, edns)
                self.assertEqual(sent.question, parse(asked).question)
                self.assertEqual(sent.flags, RD | AD)
                if codes is None:
                    self.assertIsNone(sent.opt)
                    continue
                assert sent.opt is not None
                self.assertEqual((sent.opt.size, sent.opt.version), (1232, 0))
                self.assertEqual([code for code, _ in sent.opt.options], codes)
                self.assertEqual(any(b"".join(x for _, x in sent.opt.options)), False)
                self.assertEqual(len(sent.raw) % 128 * (PADDING in codes), 0)


class ResponseTest(DotproxyTestCase):
    def test_malformed_response_is_a_format_error(self) -> None:
        no_end = A_RECORD[:-6] + b"\xff\xff" + bytes(4)
        long_label = record(b"\x40" + b"a" * 64 + b"\0", "A", bytes(4))
        for name, counts, body in (
            ("fewer records than counted", (2, 0, 0), A_RECORD),
            ("no record", (0, 1, 0), b""),
            ("no end of its last record", (1, 1, 0), (A_RECORD * 2)[:-1]),
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

    def test_octets_behind_the_last_record_are_cut_off(self) -> None:
        asked = query(do=True)
        for edns, records in itertools.product((True, False), ([], ["192.0.2.1"])):
            whole = response(asked, *records, edns=edns)
            for more in (b"\0", A_RECORD, bytes(2000)):
                with self.subTest(edns=edns, records=records, more=len(more)):
                    found = parsed_response(whole + more, asked)
                    self.assertEqual(found.message, whole)
                    self.assertEqual(found.body, parsed_response(whole, asked).body)

    def test_ttls_are_found_and_what_is_behind_opt_is_dropped_with_it(self) -> None:
        glue = address(b"\xc0\x0c", "2001:db8::1", 104)
        body = ALIAS + address("a.example", "192.0.2.1", 102) + soa(ttl=103) + glue
        for last in (b"", OPT_RECORD, OPT_RECORD + glue):
            extra = 1 + bool(last) + (len(last) > 11)
            message = counted(1, 2, 1, extra, body=QUESTION + body + last, flags=QR)
            with self.subTest(extra=extra):
                found = parsed_response(message)
                self.assertEqual((found.body, found.counts), (body, (2, 1, 1)))
                self.assertEqual(found.ttls, [101, 102, 103, 104])
                ttls = [body[place + 3] for place in found.ttl_offsets]
                self.assertEqual(ttls, found.ttls)
                self.assertEqual(len(answer_to(query(), message).additional), 1)

    def test_negative_ttl_is_the_lesser_of_soa_ttl_and_minimum(self) -> None:
        for name, message, ttl in (
            ("TTL", response(query(), authority=[soa(ttl=60)], rcode=3), 60),
            ("MINIMUM", response(query(), authority=[soa(minimum=30)], rcode=3), 30),
            ("NODATA", response(query(), authority=[soa(minimum=0)]), 0),
            ("no SOA", response(query(), rcode=3), None),
            ("SOA elsewhere", response(query(), soa(), additional=[soa()]), None),
        ):
            with self.subTest(name):
                self.assertEqual(parsed_response(message).negative_ttl, ttl)

    def test_opt_is_taken_out_and_extended_errors_alone_pass(self) -> None:
        passing = option(EDE, b"\0\3") + option(EDE, b"\0\x16x")
        ending = option(SUBNET, bytes(4)) + option(UNKNOWN_OPTION, bytes(16))
        ending += option(KEEPALIVE, b"\0\x64") + option(COOKIE, bytes(8))
        for size in (0, 1600):
            options = ending + passing + option(PADDING, bytes(size))
            message = response(query(do=True), A_RECORD, rcode=22, options=options)
            with self.subTest(size=size):
                found = parsed_response(message)
                self.assertEqual((found.body, found.rcode), (A_RECORD, 22))
                self.assertEqual(found.options, passing)
                self.assertEqual(found.upstream_options, options)
                told = dotproxy.find_option(found.upstream_options, KEEPALIVE)
                self.assertEqual(told, b"\0\x64")

    def test_question_in_another_case_is_answered_in_the_clients_own(self) -> None:
        asked = dotproxy.parse_query(query("wWw.Example.COM"))
        theirs = response(query("www.example.com"), A_RECORD)

        found = dotproxy.parse_misfit(theirs, asked.question)

        got = parse(dotproxy.build_answer(asked, found))
        self.assertEqual((got.qname, got.answers[0].name), ("wWw.Example.COM",) * 2)
        self.assertEqual(got.addresses, ["192.0.2.1"])

    def test_failure_without_the_question_is_one_and_may_say_why(self) -> None:
        why = option(EDE, b"\0\x16no")
        for rcode, options in itertools.product((1, 2, 4, 5), (None, b"", why)):
            opt = b"" if options is None else record(".", OPT, options)
            for more in (b"", b"\0"):
                flags = QR | RD | rcode
                message = counted(0, 0, 0, bool(opt), body=opt + more, flags=flags)
                with self.subTest(rcode=rcode, options=options):
                    found = dotproxy.parse_misfit(message, QUESTION)
                    self.assertEqual((found.rcode, found.body), (rcode, b""))
                    self.assertEqual(found.options, options or b"")
                    cache, asked = make_cache(), dotproxy.parse_query(query())
                    cache.put(asked.key, found, 0.0)
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

    def test_random_damage_gives_a_response_or_a_format_error(self) -> None:
        asked, accepted = query(do=True), 0
        received = dotproxy.parse_query(asked)
        seeds = [
            response(asked, ALIAS, authority=[soa()], options=option(EDE, b"\0\0")),
            response(asked, authority=[soa()], rcode=3),
            response(asked, address("a.example", "2001:db8::1"), additional=[A_RECORD]),
        ]
        for message in damaged(seeds, 6000):
            if len(message) >= 12 + len(received.question):
                with contextlib.suppress(FormatError):
                    found = parsed_response(message, asked)
                    dotproxy.build_answer(received, found)
                    last = max(found.ttl_offsets, default=0)
                    self.assertLessEqual(last, len(found.body))
                    accepted += 1
        self.assertGreater(accepted, 500)


class AnswerTest(DotproxyTestCase):
    def test_answer_is_the_clients_own(self) -> None:
        for name, rd, cd in (("www.example.com", 1, 0), ("WWW.Example.COM", 0, 1)):
            for tc, ra, rcode in ((False, False, 0), (True, True, 3)):
                asked = query(name, id=9, rd=bool(rd), cd=bool(cd))
                theirs = query(id=0x7777, rd=not rd, cd=not cd)
                message = response(theirs, A_RECORD, aa=True, tc=tc, ra=ra, rcode=rcode)
                with self.subTest(name=name, tc=tc):
                    got = answer_to(asked, message)
                    self.assertEqual((got.id, got.qname), (9, name))
                    flags = QR | RA | RD * rd | CD * cd | TC * tc | rcode
                    self.assertEqual(got.flags, flags)
                    self.assertEqual(got.addresses, ["192.0.2.1"])

    def test_ad_is_given_to_those_who_asked_and_never_made_up(self) -> None:
        for name, asked, ad in (
            ("plain", query(), 0),
            ("EDNS", query(do=False), 0),
            ("AD", query(ad=True), AD),
            ("DO", query(do=True), AD),
        ):
            with self.subTest(name):
                got = answer_to(asked, response(asked, "192.0.2.1", ad=True))
                self.assertEqual(got.flags & AD, ad)
                self.assertEqual(answer_to(asked, response(asked)).flags & AD, 0)

    def test_opt_is_given_to_those_who_sent_one_and_keepalive_over_tcp(self) -> None:
        theirs = option(EDE, b"\0\0") + option(PADDING, bytes(20)) + option(COOKIE)
        message = response(query(do=True), "192.0.2.1", options=theirs)
        idle = (KEEPALIVE, b"\0\x64")

        self.assertIsNone(answer_to(query(), message).opt)
        for options, transport, own in (
            (b"", UDP, []),
            (b"", TCP, []),
            (option(KEEPALIVE), UDP, []),
            (option(KEEPALIVE), TCP, [idle]),
        ):
            for do in (False, True):
                with self.subTest(do=do, own=own):
                    got = answer_to(query(do=do, options=options), message, transport)
                    told = Opt(1232, 0, DO * do, [(EDE, b"\0\0"), *own])
                    self.assertEqual(got.opt, told)

    def error_to(self, asked: bytes, rcode: int, options: bytes = b"") -> Message:
        error = dotproxy.error_response(rcode, options)
        return parse(dotproxy.build_answer(dotproxy.parse_query(asked), error))

    def test_extended_rcode_needs_edns(self) -> None:
        message = response(query(do=False), rcode=23)

        self.assertEqual(answer_to(query(do=False), message).rcode, 23)
        self.assertEqual(answer_to(query(), message).rcode, Rcode.SERVFAIL)
        got = self.error_to(query(do=True, edns_version=1), Rcode.BADVERS)
        self.assertEqual((got.rcode, got.opt), (16, Opt(1232, 0, DO, [])))

    def test_error_says_why_to_those_with_edns_in_valid_text(self) -> None:
        for text in ("no route", "x" * 1000, "x" + "é" * 1000):
            info = dotproxy.ExtendedError.NETWORK_ERROR
            reason = dotproxy.build_option(info, text)
            with self.subTest(text=text[:3]):
                plain = self.error_to(query(), Rcode.SERVFAIL, reason)
                self.assertEqual((plain.flags, plain.opt), (QR | RD | RA | 2, None))
                got = self.error_to(query(do=True), Rcode.SERVFAIL, reason)
                assert got.opt is not None
                self.assertIn(got.opt.options[0][1][2:].decode(), text)
                self.assertLessEqual(len(got.raw), 512)

    def test_format_error_is_a_bare_header(self) -> None:
        for flags, expected in (
            (RD, QR | RA | RD | 1),
            (5 << 11 | RD, QR | RA | 5 << 11 | RD | 1),
            (0x06F0, QR | RA | 1),
        ):
            with self.subTest(flags=hex(flags)):
                message = HEADER.pack(0x4321, flags, 9, 9, 9, 9) + b"garbage"
                got = dotproxy.build_format_error(message, Rcode.FORMERR)
                self.assertEqual(got, HEADER.pack(0x4321, expected, 0, 0, 0, 0))


class TruncationTest(DotproxyTestCase):
    """What a client gets of an answer that is too large for it."""

    NS = record("example.com", "NS", encode_name("n" * 60), 300)
    GLUE = address("ns.example.com", "192.0.2.53")

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
                    self.assertEqual(len(got.answers), 1 - more)
                    self.assertEqual(len(got.raw), limit * (1 - more) or empty - 12)

    def test_what_is_left_of_an_answer_that_does_not_fit(self) -> None:
        denial, glue = [soa(), *[self.NS] * 8], [self.GLUE] * 9
        alias = record(b"\xc0\x0c", "CNAME", b"\1a\xc0\x0c")
        two, one = [self.NS] * 2, [self.GLUE]
        cases: list[tuple[str, bool | None, list[Any], Any, Any, Any]] = [
            ("fits", None, [self.text(100)], two, one, (1, 2, 1, False)),
            ("no additional", None, [self.text(280)], two, one, (1, 2, 0, False)),
            ("no authority", None, [self.text(380)], two, one, (1, 0, 0, False)),
            ("answer", None, [A_RECORD] * 40, [self.NS], [], (29, 0, 0, True)),
            ("large", None, [self.text(600), A_RECORD], [], [], (0, 0, 0, True)),
            ("denial", None, [], denial, [], (0, 5, 0, True)),
            ("denial behind an alias", None, [alias], denial, [], (1, 5, 0, True)),
            ("proof", True, ["192.0.2.1"], denial[1:], [], (1, 5, 0, True)),
            ("referral", None, [], denial[1:5], glue, (0, 4, 4, True)),
            ("what is behind a denial", None, [], denial[:1], denial, (0, 1, 0, False)),
        ]
        for name, do, answers, authority, additional, left in cases:
            asked = query(do=do, size=512)
            more = {"authority": authority, "additional": additional}
            with self.subTest(name):
                got = answer_to(asked, response(asked, *answers, **more))
                self.assertEqual(got.opt is None, do is None)
                self.assertLessEqual(len(got.raw), 512)
                sections = got.answers, got.authority, got.additional
                self.assertEqual((*map(len, sections), bool(got.flags & TC)), left)

    def test_extended_error_goes_first(self) -> None:
        asked = query(do=True)
        message = response(asked, self.text(1150), options=option(EDE, bytes(60)))

        got = answer_to(asked, message)

        self.assertEqual((got.flags & TC, len(got.answers)), (0, 1))
        self.assertEqual(got.opt, Opt(1232, 0, DO, []))


class PaddingTest(DotproxyTestCase):
    PADDED = query(do=False, options=option(PADDING, bytes(50)))

    def test_encrypted_answer_is_padded_to_468_octets_but_not_over_65535(self) -> None:
        room = 65535 - len(response(self.PADDED, record("a", "TXT", b"")))
        for size in (*range(1000), *range(room - 500, room + 5)):
            message = response(self.PADDED, record("a", "TXT", bytes(size)), edns=False)
            got = answer_to(self.PADDED, message, DOT)
            self.assertEqual(got.flags & TC, TC * (size > room))
            if len(got.raw) <= 65535 - 19:
                self.assertEqual(len(got.raw) % 468, 0)
            assert got.opt is not None
            for code, data in got.opt.options:
                self.assertEqual((code, data), (PADDING, bytes(len(data))))
                self.assertLess(len(data), 468)

    def test_answer_is_not_padded_unless_asked_for_and_encrypted(self) -> None:
        for asked, transport in (
            (self.PADDED, TCP),
            (query(), DOT),
            (query(do=False, options=option(KEEPALIVE)), DOT),
        ):
            message = response(asked, "192.0.2.1", options=option(PADDING, bytes(9)))
            with self.subTest(asked=asked, transport=transport):
                got = answer_to(asked, message, transport)
                self.assertEqual(got.opt is None, parse(asked).opt is None)
                self.assertNotIn(PADDING, dict(got.opt.options if got.opt else []))

    def test_padding_follows_the_other_options_of_answers_and_errors(self) -> None:
        asked = query(do=False, options=option(PADDING) + option(KEEPALIVE))
        received = dotproxy.parse_query(asked, DOT)
        for rcode in (Rcode.SERVFAIL, Rcode.REFUSED, Rcode.BADVERS):
            error = dotproxy.error_response(rcode, option(EDE, b"\0\0why"))
            got = parse(dotproxy.build_answer(received, error))
            assert got.opt is not None
            with self.subTest(rcode=rcode):
                self.assertEqual((got.rcode, len(got.raw)), (rcode, 468))
                codes = [code for code, _ in got.opt.options]
                self.assertEqual(codes, [EDE, KEEPALIVE, PADDING])


class FramingTest(DotproxyTestCase):
    MESSAGES = (query("a.example"), b"", bytes(11), query("c.example", do=True))

    def test_stream_cut_anywhere_loses_nothing(self) -> None:
        stream = frame(*self.MESSAGES)
        for cut in range(len(stream) + 1):
            with self.subTest(cut=cut):
                first, rest = dotproxy.split_frames(stream[:cut])
                second, rest = dotproxy.split_frames(rest + stream[cut:])
                self.assertEqual((*first, *second), self.MESSAGES)
                self.assertEqual(rest, b"")

    def test_answerable_is_a_whole_header_that_is_no_response(self) -> None:
        for message, answerable in (
            *((b"", False), (bytes(11), False), (bytes(12), True)),
            *((query(), True), (response(query()), False)),
        ):
            with self.subTest(message=message.hex()):
                self.assertEqual(dotproxy.answerable(message), answerable)


# ---- Metrics -------------------------------------------------------------------------


def sample(samples: Iterable[dotproxy.Sample], name: str, *labels: str) -> float:
    """Return the value of one metric; that of a histogram is its count."""
    (value,) = [
        value for each, values, value in samples if (each, values) == (name, labels)
    ]
    return sum(value.counts) if isinstance(value, dotproxy.Histogram) else value


def label(
    source: str = "cache", rrtype: int = 1, rcode: int = 0, do: bool = False
) -> dotproxy.Label:
    form = dotproxy.Form(UDP)
    form.edns_flags = DO * do
    return source, form, rrtype.to_bytes(2, "big"), rcode, 40, 300


class MetricsTest(DotproxyTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.metrics = dotproxy.Metrics()

    def value(self, name: str, *labels: str) -> float:
        return sample(self.metrics.samples(), f"dotproxy_{name}", *labels)

    def count(self, *tally: dotproxy.Label, seconds: float = 0.0) -> None:
        self.metrics.answered_at_once([*tally], (), (0.0, seconds))

    def answered(
        self, rcode: int, received: float = 1000.0, client: str = "192.0.2.1"
    ) -> dotproxy.Answered:
        transport = "tcp", "2" if ":" in client else "1"
        asked = dotproxy.parse_query(query(do=True), transport)
        asked.received, asked.client = received, (client, 5353)
        return asked, bytes(100), rcode

    def test_answers_at_once_are_counted_by_what_they_are(self) -> None:
        local = [label("local", 999, code, do=True) for code in (5, 1, 4)]
        self.count(label(), label(), label("stale", 28), *local)

        for number, name, *labels in (
            (2, "dns_requests_total", "udp", "1", "A"),
            (3, "dns_requests_total", "udp", "1", "other"),
            (2, "dns_responses_total", "NOERROR", "cache"),
            (1, "dns_responses_total", "REFUSED", "local"),
            (2, "dns_request_duration_seconds", "cache"),
            (1, "dns_request_duration_seconds", "stale"),
            (3, "dns_do_requests_total"),
            (6, "dns_response_size_bytes"),
            (2, "cache_hits_total"),
            (1, "cache_served_stale_total"),
            (0, "cache_misses_total"),
            (2, "turned_away_total", "format-error"),
        ):
            for look in range(2):  # to look counts nothing twice
                with self.subTest(name=name, labels=labels, look=look):
                    self.assertEqual(self.value(name, *labels), number)

    def test_answer_that_was_waited_for_counts_with_its_time(self) -> None:
        answered = [self.answered(2, 999.0), self.answered(2, 998.0, "2001:db8::1")]
        self.metrics.answered(answered, ("upstream", UPSTREAM_NAME), 1000.0)
        # Too late to be a hit, but no miss.
        self.metrics.answered([self.answered(0)], ("cache", None), 1000.0)

        text = self.metrics.write()

        seconds = "dotproxy_dns_request_duration_seconds"
        for line in (
            f'{seconds}_sum{{source="upstream"}} 3.0',
            f'{seconds}_count{{source="upstream"}} 2',
            'dotproxy_dns_requests_total{proto="tcp",family="1",type="A"} 2',
            'dotproxy_dns_requests_total{proto="tcp",family="2",type="A"} 1',
            "dotproxy_dns_do_requests_total 3",
            "dotproxy_cache_misses_total 2",
            "dotproxy_cache_hits_total 1",
        ):
            self.assertIn(f"\n{line}\n", text)

    def test_nothing_is_lost_by_many_threads_and_sorts_of_answers(self) -> None:
        many = 3 * dotproxy.Metrics.MAX_LABELS

        def count(first: int) -> None:
            for size in range(first, many, 8):
                self.count(("cache", dotproxy.Form(UDP), b"\0\1", 0, size, 100))
                self.metrics.turned_away("overload", 3)

        threads = [threading.Thread(target=count, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        self.assertEqual(self.value("dns_requests_total", "udp", "1", "A"), many)
        self.assertEqual(self.value("dns_request_size_bytes"), many)
        self.assertEqual(self.value("turned_away_total", "overload"), 3 * many)

    def test_text_is_as_prometheus_reads_it(self) -> None:
        histogram = dotproxy.Histogram(dotproxy.SIZES)
        for size in (50.0, 100.0, 150.0):
            histogram.observe(size)
        name = "dotproxy_upstream_request_duration_seconds"
        samples = ("dotproxy_upstream_up", ('a"b\\c\nd',), 1), (name, ("x",), histogram)
        self.metrics.collectors.append(lambda: samples)

        text = self.metrics.write()

        for lines in (
            "# TYPE dotproxy_cache_hits_total counter\ndotproxy_cache_hits_total 0",
            "# HELP process_open_fds Open file descriptors.",
            "# TYPE dotproxy_upstream_up gauge",
            r'dotproxy_upstream_up{upstream="a\"b\\c\nd"} 1',
            f'# TYPE {name} histogram\n{name}_bucket{{upstream="x",le="0.0"}} 0',
            f'{name}_bucket{{upstream="x",le="100.0"}} 2',
            f'{name}_bucket{{upstream="x",le="+Inf"}} 3',
            f'{name}_sum{{upstream="x"}} 300.0\n{name}_count{{upstream="x"}} 3',
        ):
            self.assertIn(f"\n{lines}\n", text)

    def test_every_sample_is_in_the_table_with_its_labels(self) -> None:
        with serving() as served, UDPClient(served.address) as client:
            client.send(query())
            client.receive()
            samples = served.metrics()

        for name, labels, _ in samples:
            known = [each for each in dotproxy.FAMILIES[name][0] if each]
            self.assertEqual(len(labels), len(known), name)
        self.assertEqual({name for name, _, _ in samples}, set(dotproxy.FAMILIES))


# ---- Dashboard -----------------------------------------------------------------------


class DashboardTest(DotproxyTestCase):
    def setUp(self) -> None:
        super().setUp()
        # As Grafana gets it: through JSON.
        self.board = json.loads(json.dumps(dotproxy.build_dashboard()))
        self.panels = [p for p in self.board["panels"] if p["type"] != "row"]

    def test_every_metric_is_on_a_panel_and_no_other(self) -> None:
        text = " ".join(t["expr"] for p in self.panels for t in p["targets"])
        named = set(re.findall(r"(?:dotproxy|process)_\w+", text))
        named = {re.sub(r"_(bucket|sum|count)\Z", "", name) for name in named}

        self.assertEqual(named, set(dotproxy.FAMILIES))

    def test_panels_have_what_grafana_needs(self) -> None:
        sources = [each["query"] for each in self.board["templating"]["list"]]
        self.assertEqual(sources[0], "prometheus")
        for panel in self.panels:
            self.assertEqual(panel["datasource"]["uid"], "${datasource}")
            for key in ("refId", "legendFormat"):  # lines are told apart
                found = [target[key] for target in panel["targets"]]
                self.assertEqual(len(found), len(set(found)), panel["title"])
            for target in panel["targets"]:
                self.assertNotRegex(target["expr"], r"NAME|OTHER|\bBY\b")
                self.assertIn('{instance=~"$instance"}', target["expr"])
                # Seconds of several instances are not added up.
                if re.search(r"_(latency|life)_seconds\b", target["expr"]):
                    self.assertRegex(target["expr"], r"\Amax by \(upstream\)")

    def test_hits_are_shown_as_a_share(self) -> None:
        shown = {p["description"]: p["targets"][0]["expr"] for p in self.panels}

        ratio = r"\w+_hits_total.* / \(.*\w+_hits_total.* \+ .*\w+_misses_total"
        self.assertRegex(shown["dotproxy_cache_hits_total"], ratio)

    def test_panels_do_not_overlap(self) -> None:
        taken: set[tuple[int, int]] = set()
        for panel in self.board["panels"]:
            x, y, w, h = (panel["gridPos"][key] for key in "xywh")
            cells = {(x + dx, y + dy) for dx in range(w) for dy in range(h)}
            self.assertFalse(taken & cells, panel["title"])
            self.assertLessEqual(x + w, 24)
            taken |= cells
        ids = {panel["id"] for panel in self.board["panels"]}
        self.assertEqual(len(ids), len(self.board["panels"]))


# ---- Logging -------------------------------------------------------------------------

# Of the field list of ECS 9.4.0, those that are used; `labels` takes any name.
ECS_FIELD_NAMES = """
    @timestamp client.address client.bytes client.ip client.port destination.address
    destination.domain destination.port dns.header_flags dns.id dns.op_code
    dns.question.class dns.question.name dns.question.type dns.resolved_ip
    dns.response_code dns.type ecs.version error.message error.stack_trace error.type
    event.action event.category event.dataset event.duration event.kind event.outcome
    event.type log.level log.logger message network.protocol network.transport
    network.type process.pid process.thread.name server.bytes service.name
    service.version
"""
ECS_FIELDS = frozenset(ECS_FIELD_NAMES.split())


def json_line(text: str) -> dict[str, object]:
    """Parse a line of JSON, and check that its names are of the schema."""
    fields: dict[str, object] = json.loads(text)
    unknown = {name for name in set(fields) - ECS_FIELDS if name[:7] != "labels."}
    if unknown:
        raise AssertionError(f"not in the schema: {unknown}")
    return fields


class LogTestCase(DotproxyTestCase):
    """With a log that is written to a file in place of stderr."""

    def setUp(self) -> None:
        super().setUp()
        self.clock = Clock()
        self.lines: list[str] = []  # what was logged, at the end
        patch = mock.patch.object(dotproxy, "elapsed", self.clock)
        patch.start()
        self.addCleanup(patch.stop)

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
        def fail() -> None:
            raise ValueError('a "quoted"\nreason')

        for style in ("text", "json"):
            with self.logging(style, journal=style == "text"):
                thread = threading.Thread(target=fail, name="odd")
                thread.start()
                thread.join()
            if style == "text":
                self.assertEqual(self.lines[0], "<3>internal error: thread=odd")
                self.assertEqual({line[:3] for line in self.lines}, {"<3>"})

        got = json_line(self.lines[0])
        self.assertEqual(got["error.type"], "ValueError")
        self.assertEqual(got["error.message"], 'a "quoted"\nreason')
        self.assertIn("in fail", str(got["error.stack_trace"]))
        self.assertEqual(got["process.thread.name"], "odd")

    def test_text_cannot_begin_another_line_and_is_no_format(self) -> None:
        with self.logging(journal=False):
            dotproxy.note(logging.INFO, "x", error="a\n<0>b\x7f\x9b %s")

        (line,) = self.lines
        self.assertRegex(line, r"\A[-\dT:+]+ INFO x: error=a\\010<0>b\\127\\155 %s\Z")

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


class RepeatsTest(LogTestCase):
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
        self.assertEqual((got[-1]["labels.n"], got[-1]["labels.repeated"]), ("1", "2"))

    def test_oldest_makes_room(self) -> None:
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
        self.reading = os.fdopen(reading, "rb")
        self.addCleanup(self.reading.close)
        self.writer = dotproxy.Writer("log", descriptor=self.writing)
        self.addCleanup(self.writer.close)

    def test_lines_of_two_stay_whole_in_a_pipe_that_is_full(self) -> None:
        os.set_blocking(self.writing, False)
        other = dotproxy.Writer("other", descriptor=self.writing)
        self.addCleanup(other.close)
        for writer, line in ((self.writer, "01234567\n"), (other, "abc\n")):
            writer.put([line] * 50_000)
            writer.start()

        found = collections.Counter(self.reading.readline() for _ in range(100_000))

        self.assertEqual(found, {b"01234567\n": 50_000, b"abc\n": 50_000})

    def test_losses_are_told_once_a_minute(self) -> None:
        full = OSError(errno.ENOSPC, "No space")
        write = mock.Mock(side_effect=[5, full, full, full, 6])
        self.writer.start()
        logs = self.assertLogs("dotproxy")
        with mock.patch.object(os, "write", write), logs as logged:
            for calls, text in (2, "one two six"), (3, "ten"), (4, "ten"), (5, "three"):
                self.writer.put([f"{word}\n" for word in text.split()])
                wait_until(functools.partial(self.is_called, write, calls))
            self.writer.close()

        self.assertEqual(bytes(write.call_args[0][1]), b"three\n")
        told = [each.getMessage() for each in logged.records]
        lost = [f"log lines lost: number={n} error=No space" for n in (2, 2)]
        self.assertEqual(told, lost)  # the second at the end

    @staticmethod
    def is_called(called: mock.Mock, times: int) -> bool:
        return called.call_count == times

    def test_reader_that_hangs_stalls_nobody_and_the_end_is_bounded(self) -> None:
        writer, line = self.writer, "x" * (dotproxy.Writer.LIMIT // 2 - 1) + "\n"
        writer.start()
        logs = self.assertLogs("dotproxy")
        with mock.patch.object(writer, "PATIENCE", 0.01), logs as logged:
            for _ in range(3):
                writer.put([line])
            writer.close()

        self.assertIn("log lines lost: number=3 ", logged.output[-1])
        self.assertEqual(len(self.reading.read(2 * len(line))), 2 * len(line))

    def test_log_that_never_started_is_written_at_its_end(self) -> None:
        with self.logging() as log:
            dotproxy.note(logging.INFO, "first")
            log.writer.put(["x" * log.writer.LIMIT])

        lost = "<4>log lines lost: number=1 error=too many at once"
        self.assertEqual(self.lines, ["<6>first", lost])


ASKED_AT, TO_WALL = 1000.0, 1_699_999_000.25
TOOK = 2.0**-10  # s; sums with it are exact
UPSTREAM_NAME = Endpoint("192.0.2.53", 853, "dot.test")


def query_line(
    asked: bytes,
    answer: bytes,
    *,
    client: tuple[str, int] = ("192.0.2.77", 5000),
    proto: str = "udp",
    source: str = "upstream",
    rcode: int = 0,
    **settings: Any,
) -> str:
    """Return the line of one query, which is answered at once or later."""
    writer = mock.Mock()
    config = dotproxy.Config(query_log="-")._replace(**settings)
    with (
        mock.patch.object(dotproxy, "elapsed", lambda: ASKED_AT),
        mock.patch.object(time, "time", lambda: ASKED_AT + TO_WALL),
        mock.patch.object(os, "urandom", lambda _: b"key"),
    ):
        metrics = dotproxy.Metrics(dotproxy.QueryLog(config, writer))
        if source == "upstream":
            parsed = dotproxy.parse_query(asked, (proto, "1"))
            parsed.client, parsed.received = client, ASKED_AT
            answered = parsed, answer, rcode or answer[3] & 15
            metrics.answered([answered], (source, UPSTREAM_NAME), ASKED_AT + TOOK)
        else:
            form, sizes = dotproxy.Form((proto, "1")), (len(asked), len(answer))
            label = source, form, b"", answer[3] & 15, *sizes
            given = [(asked, answer, client)]
            metrics.answered_at_once([label], given, (ASKED_AT, TOOK))
    ((line,),) = writer.put.call_args[0]
    return str(line)


def query_json(asked: bytes, answer: bytes, **rest: Any) -> dict[str, object]:
    """Return the fields of one query."""
    return json_line(query_line(asked, answer, log_format="json", **rest))


class QueryLinesTest(DotproxyTestCase):
    def test_text_is_one_line_whether_somebody_waited_or_not(self) -> None:
        asked = query("Example.com", id=77)
        answer = response(asked, "192.0.2.1")

        for source, journal, start, end in (
            ("cache", False, "2023-11-14T22:13:20.250Z ", "cache -"),
            ("upstream", True, "<6>", "upstream 192.0.2.53:853#dot.test"),
        ):
            with mock.patch.object(dotproxy, "is_journal", return_value=journal):
                line = query_line(asked, answer, source=source)
            self.assertEqual(
                line,
                f"{start}192.0.2.0/24 - 77 "
                f'"A IN Example.com. udp {len(asked)} false 512" NOERROR qr,rd,ra '
                f"{len(answer)} 0.000977s {end}\n",
            )

    def test_json_has_the_fields_of_the_schema(self) -> None:
        asked = query("example.com", "AAAA", id=77)
        answer = response(asked, "2001:db8::1", "2001:db8::2")
        full: Any = {"log_format": "json", "query_log_privacy": "none"}

        with mock.patch.object(dotproxy, "is_journal", return_value=True):
            line = query_line(asked, answer, proto="dot", **full)

        self.assertEqual(
            line,
            '<6>{"@timestamp":"2023-11-14T22:13:20.250Z","network.type":"ipv4",'
            '"client.ip":"192.0.2.77","client.port":5000,"dns.id":"77",'
            '"dns.question.name":"example.com","dns.question.type":"AAAA",'
            '"dns.question.class":"IN","dns.op_code":"QUERY","network.transport":"tcp",'
            '"labels.proto":"dot","client.bytes":29,"dns.header_flags":["RD","RA"],'
            '"dns.response_code":"NOERROR","event.outcome":"success",'
            '"dns.resolved_ip":["2001:db8::1","2001:db8::2"],"server.bytes":107,'
            '"event.duration":976562,"labels.source":"upstream",'
            '"destination.address":"192.0.2.53","destination.port":853,'
            '"destination.domain":"dot.test","ecs.version":"9.4.0",'
            '"event.kind":"event","event.category":["network"],'
            '"event.type":["protocol"],"event.action":"dns-query",'
            '"event.dataset":"dotproxy.query","network.protocol":"dns",'
            '"dns.type":"answer","service.name":"dotproxy"}\n',
        )

    def test_json_has_addresses_alone(self) -> None:
        asked, both = query("example.com"), ["192.0.2.1", "::1"]
        for answer, found in (
            (response(asked, record(b"\xc0\x0c", "A", b"\1" * 5)), None),
            (response(asked, record(b"\xc0\x0c", "A", b"\1" * 260)), None),
            (response(asked, record("a.test", "TXT", b"\3abc"), *both), both),
            (response(asked), None),
        ):
            got = query_json(asked, answer)
            self.assertEqual(got.get("dns.resolved_ip"), found)

    def test_privacy_of_clients(self) -> None:
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
        secure, secret = query("a.test", do=True), query("secret.example")
        refusal = dotproxy.error_response(Rcode.BADVERS)
        refused = dotproxy.build_answer(dotproxy.parse_query(secure), refusal)
        misfit = counted(0, 0, 0, 0, flags=0x2000)
        notimp = dotproxy.build_format_error(misfit, Rcode.NOTIMP)
        hidden = {"query_log_privacy": "no-names"}
        for asked, answer, settings, text, fields in (
            (odd, response(odd), {}, f'"A IN {escaped}. udp', [escaped, "success"]),
            (query("."), response(query(".")), {}, '"A IN . udp', ["."]),
            (
                *(new, response(new, rcode=11), {}, '"TYPE65281 CLASS7 . udp'),
                ["TYPE65281", "CLASS7", "RCODE11", "failure"],
            ),
            (secure, refused, {"rcode": 16}, '35 true 1232" BADVERS qr', ["BADVERS"]),
            (secret, response(secret, "::1"), hidden, '"A IN - udp', ["-"]),
            (
                *(misfit, notimp, {"source": "local"}),
                *('"- - - udp 12 false 512" NOTIMP qr', ["NOTIFY", "NOTIMP"]),
            ),
        ):
            with self.subTest(text):
                self.assertIn(text, query_line(asked, answer, **settings))
                got = query_json(asked, answer, **settings)
                for value in fields:
                    self.assertIn(value, got.values())
                self.assertNotIn("dns.resolved_ip", got)
                self.assertEqual("dns.question.name" in got, asked != misfit)


class QueryLogTest(DotproxyTestCase):
    def setUp(self) -> None:
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = os.path.join(folder.name, "query.log")

    def lines(self, suffix: str = "") -> int:
        with open(self.path + suffix, encoding="ascii") as file:
            return file.read().count("\n")

    def test_batch_without_room_is_left_out_whole_and_told(self) -> None:
        asked = query("example.com")
        label = dotproxy.label_answer(dotproxy.parse_query(asked), "cache", 0, 100)
        item = label, response(asked), (LOCALHOST, 1), None, 0.0, 0.0
        with (
            mock.patch.object(dotproxy.Writer, "LIMIT", 1000),
            self.assertLogs(dotproxy.logger) as logged,
        ):
            for numbers in ((5, 7, 1), (3,)):  # a file is appended to
                writer = dotproxy.Writer("querylog", self.path)
                log = dotproxy.QueryLog(dotproxy.Config(query_log=self.path), writer)
                for number in numbers:
                    log.put([item] * number)
                writer.close()

        self.assertEqual(self.lines(), 9)
        told = [each.getMessage() for each in logged.records]
        self.assertEqual(told, ["queries not logged: number=7 error=too many at once"])

    def test_reload_leaves_a_renamed_file_for_a_new_one(self) -> None:
        with (
            serving(answer, f"--query-log={self.path}") as served,
            UDPClient(served.address) as client,
        ):
            for number in range(2):
                client.send(query(id=number))
                client.receive()
                wait_until(lambda: self.lines() == 1)
                os.rename(self.path, f"{self.path}.{number}")
                served.daemon.reload()
            client.send(query())
            client.receive()
            with (
                mock.patch.object(os, "open", side_effect=OSError(13, "forbidden")),
                self.assertLogs(dotproxy.logger, "WARNING") as logged,
            ):
                served.daemon.reload()  # what cannot be opened again is kept

        self.assertEqual((self.lines(".0"), self.lines(".1"), self.lines()), (1, 1, 1))
        self.assertIn("not reopened: error=cannot open", logged.output[0])

    def test_dash_is_what_is_open(self) -> None:
        with tempfile.TemporaryFile() as file:
            writer = dotproxy.Writer("querylog", "-", file.fileno())
            writer.put(["a line\n"])
            writer.reopen()
            writer.close()
            file.seek(0)
            self.assertEqual(file.read(), b"a line\n")

    def test_file_that_cannot_be_opened_is_an_error_with_a_cure(self) -> None:
        with self.assertRaisesRegex(dotproxy.ConfigError, "mend --query-log"):
            dotproxy.Writer("querylog", os.path.dirname(self.path))


# ---- Time ----------------------------------------------------------------------------


class ClockTest(DotproxyTestCase):
    @unittest.skipUnless(sys.platform == "linux", "names Linux's clock")
    def test_time_asleep_counts(self) -> None:
        first, now = time.clock_gettime(time.CLOCK_BOOTTIME), dotproxy.elapsed()

        self.assertLessEqual(first, now)
        self.assertLessEqual(now, time.clock_gettime(time.CLOCK_BOOTTIME))


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

    def test_functions_are_called_once_due_and_in_that_order(self) -> None:
        self.plan(self.clock.now + 2, "due only when the clock moves on")
        self.plan(self.clock.now + 1, "later")
        for name in "abcdefgh":
            self.plan(self.clock.now, name)
        self.clock.advance(1.5)

        self.timer.start()

        self.assert_calls(*"abcdefgh", "later")
        for _ in range(2):  # to close twice does no harm
            self.timer.close()
        self.assertTrue(self.calls.empty())

    def test_sooner_function_wakes_a_waiting_timer_and_may_plan_another(self) -> None:
        self.plan(1_000_000, "far away")
        self.timer.start()

        self.timer.at(999, lambda: self.plan(999, "now"))

        self.assert_calls("now")

    def test_error_in_a_function_is_logged_and_the_next_is_called(self) -> None:
        self.timer.at(998, fail)
        self.plan(999, "next")
        with self.assertLogs(dotproxy.logger, "ERROR") as logged:
            self.timer.start()
            self.assert_calls("next")
        self.assertIn("a bug", logged.output[0])


class ProcessorBindingTest(DotproxyTestCase):
    def test_sum_of_all_rates_binds_and_sets_free(self) -> None:
        with (
            mock.patch.object(os, "sched_getaffinity", return_value={0, 1}),
            mock.patch.object(os, "sched_setaffinity") as bind,
            mock.patch.object(sys, "_is_gil_enabled", lambda: True, create=True),
        ):
            binding = dotproxy.ProcessorBinding()
            for source, rate, number in (
                *(("one", 3000.0, None), ("other", 3000.0, 1)),
                *(("other", 0.0, None), ("one", 500.0, 2)),  # the first: not quiet yet
            ):
                bind.reset_mock()
                binding.update(source, rate)
                chosen = {len(call.args[1]) for call in bind.call_args_list}
                with self.subTest(source=source, rate=rate):
                    self.assertEqual(chosen, set() if number is None else {number})


def meet(*others: threading.Barrier | threading.Event) -> None:
    """Wait for one after the other, as a task."""
    for other in others:
        other.wait(5)


class WorkerPoolTest(DotproxyTestCase):
    def pool(self, threads: int, backlog: int = 100) -> dotproxy.WorkerPool:
        pool = dotproxy.WorkerPool("worker", threads, backlog)
        self.addCleanup(pool.close)
        return pool

    def test_tasks_run_at_once_up_to_the_number_of_threads(self) -> None:
        together, pool = threading.Barrier(4), self.pool(3)
        for _ in range(2):  # by new threads, and by idle ones
            for _ in range(3):
                pool.submit(functools.partial(meet, together))
            together.wait(5)

    def test_task_is_refused_while_the_system_gives_no_thread(self) -> None:
        pool, done = self.pool(1), threading.Event()
        with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError):
            self.assertFalse(pool.submit(fail))

        self.assertTrue(pool.submit(done.set))
        self.assertTrue(done.wait(5))

    def test_task_beyond_the_backlog_is_refused_and_those_in_it_are_done(self) -> None:
        started, go_on = threading.Barrier(2), threading.Event()
        done: list[int] = []
        pool = self.pool(1, backlog=2)
        pool.submit(functools.partial(meet, started, go_on))
        started.wait(5)

        taken = [pool.submit(functools.partial(done.append, n)) for n in range(3)]

        go_on.set()
        pool.close()
        self.assertEqual((taken, done), ([True, True, False], [0, 1]))
        self.assertFalse(pool.submit(fail))

    def test_error_in_a_task_is_logged_and_the_next_runs(self) -> None:
        pool, done = self.pool(1), threading.Event()
        with self.assertLogs(dotproxy.logger, "ERROR") as logged:
            pool.submit(fail)
            pool.submit(done.set)
            self.assertTrue(done.wait(5))
        self.assertIn("a bug", logged.output[0])

    def test_idle_thread_ends_and_another_takes_its_place(self) -> None:
        threads: queue.SimpleQueue[threading.Thread] = queue.SimpleQueue()
        pool = self.pool(1)
        pool.IDLE = 0.001
        for _ in range(2):
            pool.submit(lambda: threads.put(threading.current_thread()))
            thread = threads.get(timeout=5)
            thread.join(5)
            self.assertFalse(thread.is_alive())


# ---- Certificates and errors ---------------------------------------------------------


class CertificateTest(DotproxyTestCase):
    def test_named_authority_is_trusted_however_plain_on_every_python(self) -> None:
        strict, partial = ssl.VERIFY_X509_STRICT, dotproxy.PARTIAL_CHAIN
        flags = dotproxy.Trust(PKI.ca).context.verify_flags

        self.assertEqual(flags & (strict | partial), partial)
        usual = ssl.create_default_context().verify_flags  # for the system's store
        self.assertEqual(dotproxy.Trust().context.verify_flags, usual)

    def test_pin_is_what_openssl_says(self) -> None:
        pins = {"ca": CA_PIN, "good": GOOD_PIN, "good2": GOOD2_PIN}
        pins["wrong_name"] = GOOD_PIN  # another certificate for the same key
        for name, pin in pins.items():
            certificate = ssl.PEM_cert_to_DER_cert(_read_pem(name))
            with self.subTest(name):
                self.assertEqual(dotproxy.public_key_pin(certificate), pin)

    def test_damaged_certificate_is_a_format_error_or_has_some_pin(self) -> None:
        certificate = ssl.PEM_cert_to_DER_cert(_read_pem("good"))
        indefinite = b"\x30\x80\0\0"  # a length that DER does not have
        for text in (indefinite, *map(certificate.__getitem__, map(slice, range(460)))):
            with self.subTest(size=len(text)), self.assertRaises(FormatError):
                dotproxy.public_key_pin(text)
        for text in damaged([certificate], 2000):
            with contextlib.suppress(FormatError):
                self.assertEqual(len(dotproxy.public_key_pin(text)), 44)

    def test_only_pinned_names_need_a_key_that_can_be_read(self) -> None:
        trust = dotproxy.Trust(PKI.ca, pins=[("dot.test", GOOD_PIN)])

        trust.check_pin("other.test", b"")
        with self.assertRaisesRegex(UpstreamError, "cannot read") as caught:
            trust.check_pin("dot.test", b"")

        self.assertEqual(caught.exception.cause, "certificate")

    def test_certificate_that_is_no_authority_can_be_trusted_as_well(self) -> None:
        self.assertTrue(dotproxy.Trust(PKI.good_alone).has_authorities())

    def test_authorities_that_cannot_be_read_are_none(self) -> None:
        bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        error = ssl.SSLCertVerificationError("certificate verify failed")
        error.verify_code, error.verify_message = 20, "unable to get local issuer"
        with (
            mock.patch.object(ssl, "create_default_context", return_value=bare),
            mock.patch.object(ssl, "get_default_verify_paths") as where,
        ):
            trust = dotproxy.Trust()
            for directory in (None, "/nonexistent"):
                where.return_value.capath = directory
                found = dotproxy.describe_tls_error(error, trust)
                self.assertIn("install ca-certificates", str(found))

    def test_tls_version_that_the_library_lacks_is_an_error_with_a_cure(self) -> None:
        lacking = mock.PropertyMock(side_effect=ValueError("Unsupported protocol"))
        with (
            mock.patch.object(ssl.SSLContext, "minimum_version", lacking),
            self.assertRaisesRegex(dotproxy.ConfigError, "no TLS 1.3; mend --tls-min"),
        ):
            dotproxy.Trust(PKI.ca, tls_min="1.3")

    def test_errors_of_the_network_have_a_cause_and_a_cure(self) -> None:
        endpoint = Endpoint("192.0.2.1", 853, "dot.test")
        for error, cause, text in (
            (socket.timeout(), "timeout", "TCP port 853 blocked by a firewall"),
            (ConnectionRefusedError(), "refused", "nothing on TCP port 853"),
            (ConnectionResetError(), "reset", "connection reset"),
            (BrokenPipeError(), "reset", "connection reset"),
            (OSError(errno.ENETUNREACH, ""), "unreachable", "is there a network"),
            (OSError(errno.EHOSTUNREACH, ""), "unreachable", "no route to 192.0.2.1"),
            (OSError(errno.EMFILE, "Too many open files"), "network", "Too many open"),
        ):
            with self.subTest(error=error):
                found = dotproxy.describe_network_error(error, endpoint)
                self.assertEqual(found.cause, cause)
                self.assertIn(text, str(found))

    def test_addresses_and_domains_as_text_and_in_wire_format(self) -> None:
        self.assertEqual(dotproxy.write_address("192.0.2.1", 53), "192.0.2.1:53")
        self.assertEqual(dotproxy.write_address("2001:db8::1", 53), "[2001:db8::1]:53")
        self.assertEqual(dotproxy.encode_domain("Corp.example."), b"\4corp\7example\0")
        self.assertEqual(dotproxy.encode_domain("."), b"\0")
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
        _, _, flags, rcode, _, qname, *_ = self.message
        found = rcode, qname, flags & (AA | RA), self.message.addresses
        return found == (0, self.name, RA, ["192.0.2.1"])

    @property
    def reason(self) -> str:
        """The texts of the Extended DNS Errors."""
        options = self.message.opt.options if self.message.opt else []
        return b"".join(data[2:] for code, data in options if code == EDE).decode()


class Asker:
    """A client, that asks a proxy as its servers do."""

    PATIENCE = 8.0
    WINDOW = 64  # queries of a run without an answer; more wait for the machine
    numbers = itertools.count()

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self._results: queue.SimpleQueue[tuple[str, bytes, float]] = queue.SimpleQueue()

    def send(
        self,
        *names: str,
        client: str = "192.0.2.200",
        transport: dotproxy.Transport = UDP,
        options: bytes = b"",
    ) -> None:
        """Send queries in one batch, each with EDNS."""
        batch: list[tuple[dotproxy.Query, dotproxy.Reply]] = []
        now = time.monotonic()
        for name in names:
            message = query(name, do=False, options=options, id=random.getrandbits(16))
            found = self.proxy.lookup(message, dotproxy.elapsed(), [], transport)
            reply = functools.partial(self._reply, name, now)
            if isinstance(found, bytes):
                reply(found)
            elif found is not None:
                found.client = (client, 5353)
                batch.append((found, reply))
        self.proxy.resolve(batch)

    def send_fresh(self, count: int, *first: str) -> None:
        """Send so many queries for names that were not asked yet."""
        self.send(*[self.fresh(*first) for _ in range(count)])

    def collect(self, count: int) -> list[Result]:
        """Wait for so many answers."""
        end = time.monotonic() + self.PATIENCE
        found = [
            self._results.get(timeout=max(0.01, end - time.monotonic()))
            for _ in range(count)
        ]
        return [Result(name, parse(message), took) for name, message, took in found]

    def ask(self, name: str = "", transport: dotproxy.Transport = UDP) -> Result:
        """Ask one question and wait for the answer; a new one without a name."""
        self.send(name or self.fresh(), transport=transport)
        return self.collect(1)[0]

    def fresh(self, *first: str) -> str:
        """Return a name that was not asked yet, with these labels before it."""
        return ".".join((*first, f"n{next(self.numbers)}", "example.com"))

    def run(self, count: int, rate: float, *rare: str) -> list[Result]:
        """Send so many queries, so many a second, and wait for all answers.

        `rare` names are asked besides, evenly spread. A machine too slow for the rate
        sends as fast as it can answer.
        """
        start = time.monotonic()
        pace = threading.Event()
        results: list[Result] = []
        gap = count // (len(rare) + 1)
        for number in range(count):
            pace.wait(max(0.0, start + number / rate - time.monotonic()))
            if number - len(results) - self._results.qsize() >= self.WINDOW:
                results += self.collect(1)
            self.send(self.fresh())
            if (number + 1) % gap == 0 and number // gap < len(rare):
                self.send(rare[number // gap])
        return results + self.collect(count + len(rare) - len(results))

    def counted(self, metric: str, of: FakeUpstream) -> float:
        """Return a metric of this upstream, given with its label."""
        name, *labels = metric.split()
        for found, given, value in self.proxy.samples():
            mine = f":{of.port}" in "".join(given[:1]) and given[1:] == tuple(labels)
            if mine and found == f"dotproxy_upstream_{name}":
                assert isinstance(value, (int, float))
                return value
        raise AssertionError(f"no {metric}")

    def state(self, upstream: FakeUpstream) -> str:
        found = {str(f["name"]): str(f["state"]) for f in self.proxy.facts()}
        return next(found[name] for name in found if f":{upstream.port}" in name)

    def _reply(self, name: str, sent: float, message: bytes, _: object = None) -> None:
        self._results.put((name, message, time.monotonic() - sent))


class Scene(NamedTuple):
    """One upstream, what it is asked, and what has to come of it."""

    script: Reply = answer
    # First labels, or whole names where they have a dot, in batches between semicolons,
    # each sent once the one before is answered. What begins with "bad" has to fail, all
    # else to be right.
    asked: str = "good"
    rcode: int = Rcode.SERVFAIL  # of the failures
    reason: str = ""  # a part of theirs; nothing: they have none
    modes: Sequence[str] = ("tls",)  # that it is played in
    settings: Mapping[str, Any] = {}
    seconds: tuple[float, float] = (0.0, 2.0)  # that each answer takes
    queries: int = 1000  # that the upstream sees at most
    connections: int = 50
    counted: Mapping[str, float | range] = {}  # metrics of it
    state: str = ""  # its state in the end, if that matters


SOME = range(1, 1000)


class ScenarioTestCase(DotproxyTestCase):
    """Has proxies in front of upstreams, without their servers."""

    SERVED = "certificate", "handshake_delay", "maximum_version"

    def have_time_to_skip(self) -> None:
        """Let the proxy's clock be `self.ahead` seconds ahead, until the test ends."""
        self.ahead = 0.0
        self.have(
            mock.patch.object(
                dotproxy, "elapsed", lambda: time.monotonic() + self.ahead
            )
        )

    @contextlib.contextmanager
    def client(
        self,
        *upstreams: FakeUpstream,
        name: str = NAME,
        routes: Sequence[tuple[str, FakeUpstream]] = (),
        **settings: Any,
    ) -> Iterator[Asker]:
        """Run a proxy in front of these upstreams."""
        timer = dotproxy.Timer()
        nobody = Endpoint(LOCALHOST, 9, name)  # where all names are routed
        config = dotproxy.Config(
            upstream=tuple(Endpoint(*each.address, name) for each in upstreams)
            or (nobody,),
            route=tuple(
                (domain, Endpoint(*u.address, "" if u.on_accept == "plain" else name))
                for domain, u in routes
            ),
            **{"ca_file": PKI.ca, **settings},
        )
        trust = dotproxy.Trust(config.ca_file, pins=config.pin, tls_min=config.tls_min)
        proxy = Proxy(config, trust, timer, dotproxy.Metrics())
        timer.start()
        proxy.start()
        try:
            yield Asker(proxy)
            self.assertTrue(proxy.drain(Asker.PATIENCE))
            self.assertEqual(proxy.in_flight, 0)
        finally:
            proxy.close()
            timer.close()

    @contextlib.contextmanager
    def before(
        self, script: Reply = answer, mode: str = "tls", **settings: Any
    ) -> Iterator[tuple[FakeUpstream, Asker]]:
        """Run a proxy before one upstream; a plain one is that of example.com."""
        served = {key: settings.pop(key) for key in self.SERVED if key in settings}
        upstream = FakeUpstream(script, on_accept=mode, **served)
        if mode == "plain":
            upstreams, settings["routes"] = [], [("example.com", upstream)]
        else:
            upstreams = [upstream]
        with upstream, self.client(*upstreams, **settings) as client:
            yield upstream, client

    def check(self, scene: Scene) -> None:
        """Play a scene."""
        for mode in scene.modes:
            run = self.before(scene.script, mode, **scene.settings)
            with run as (upstream, client):
                self.check_once(scene, upstream, client)

    def check_once(self, scene: Scene, upstream: FakeUpstream, client: Asker) -> None:
        results: list[Result] = []
        for labels in map(str.split, scene.asked.split(";")):
            client.send(*[n if "." in n else client.fresh(n) for n in labels])
            results += client.collect(len(labels))

        bad = [r for r in results if r.name.startswith("bad")]
        self.assert_right([r for r in results if r not in bad])
        for result in bad:
            self.assertEqual(result.message.rcode, scene.rcode)
            self.assertIn(scene.reason, result.reason)
            self.assertEqual(bool(scene.reason), bool(result.reason))
        self.assertGreaterEqual(min(r.elapsed for r in results), scene.seconds[0])
        self.assertLessEqual(max(r.elapsed for r in results), scene.seconds[1])
        self.assertLessEqual(len(upstream.queries), scene.queries)
        self.assertLessEqual(upstream.connections, scene.connections)
        for metric, value in scene.counted.items():
            self.expect(client, upstream, metric, value)
        self.assertIn(client.state(upstream), scene.state or client.state(upstream))

    def expect(
        self, client: Asker, of: FakeUpstream, metric: str, value: float | range
    ) -> None:
        """Wait until a metric has this value, or one of these."""
        values = value if isinstance(value, range) else [value]
        with contextlib.suppress(AssertionError):
            wait_until(lambda: client.counted(metric, of) in values, 1.0)
        self.assertIn(client.counted(metric, of), values, metric)

    def run_cases(
        self, workers: int, more: Mapping[str, Scene | Callable[[], None]]
    ) -> None:
        """Run the cases of this class and these side by side; each is a test.

        What fails is run again by itself: beside others it may have lacked time.
        """
        cases: dict[str, Callable[[], None]] = {}
        for name, row in more.items():
            scene = (
                functools.partial(self.check, row) if isinstance(row, Scene) else row
            )
            cases[name] = scene
        cases.update((n, getattr(self, n)) for n in dir(self) if n.startswith("case_"))
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            futures = {name: pool.submit(case) for name, case in cases.items()}
        for name, future in futures.items():
            if (error := future.exception()) is not None:
                print(f"{name}, again by itself: {error}", file=sys.stderr)
                with self.subTest(name):
                    cases[name]()

    def assert_right(self, results: Sequence[Result], count: int | None = None) -> None:
        wrong = [r for r in results if not r.right]
        self.assertEqual([(r.name, r.elapsed, r.reason) for r in wrong], [])
        self.assertEqual(len(results), len(results) if count is None else count)

    def assert_failed(self, result: Result, rcode: int = Rcode.SERVFAIL) -> None:
        self.assertEqual(result.message.rcode, rcode, result.name)


@contextlib.contextmanager
def full_backlog(port: int = 0, host: str = LOCALHOST) -> Iterator[Address]:
    """Listen where no SYN is answered: the backlog is full, nobody accepts."""
    listener = socket.create_server((host, port), backlog=0)
    with listener, socket.socket() as one, socket.socket() as two:
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


def first_alone(_: Message, connection: FakeConnection) -> Reply:
    """Answer the first query of a connection alone."""
    return answer if len(connection.queries) == 1 else silence


def every_second(_: Message, connection: FakeConnection) -> Reply:
    """Answer every second query alone."""
    return answer if len(connection.upstream.queries) % 2 else silence


def less_edns(rcode: int, *, options_alone: bool = False, bare: bool = False) -> Script:
    """Fail at EDNS or its options; if `bare`, with a header and nothing else."""

    def script(message: Message, _: FakeConnection) -> Reply:
        if not message.opt or (options_alone and not message.opt.options):
            return answer
        header = message.raw[:2] + b"\x80\x81" + bytes(8)
        return header if bare else failing(rcode)

    return script


TWO_FAILED = {"failures_total rcode": 2}
BOTH, TENS, TWENTY = ("tls", "plain"), "good " * 10, "good " * 20
PINNED = ((NAME, GOOD_PIN), (NAME, GOOD2_PIN))
OTHERS, LOCAL_NAME = "for other.test, alias.other.test, not for", {"name": LOCALHOST}
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
SOBER_SCENES = {
    **{
        reason: Scene(
            *(answer, "bad", Rcode.SERVFAIL, reason, (mode,), settings),
            queries=0,
            counted={f"handshakes_total {cause}": SOME},
            state="down",
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
            *(rcode or 0, reason, BOTH, {"timeout": 0.3}),
            queries=23,  # it was asked once more
            connections=2,
        )
        for name, (script, rcode, reason) in MISFITS.items()
    },
    **{
        f"{name}, RCODE {rcode}": scene
        for rcode in (Rcode.SERVFAIL, Rcode.REFUSED)
        for fails in (failing(rcode),)
        for name, scene in (
            ("lone upstream, once", Scene(in_turn(fails, answer), queries=2)),
            (
                "lone upstream",
                Scene(fails, "bad", rcode, queries=2, counted=TWO_FAILED),
            ),
            (
                "without its question",
                Scene(failing(rcode, whole=False), "bad", rcode, connections=1),
            ),
            (
                "without its question, with a reason",
                Scene(
                    failing(rcode, whole=False, options=BOGUS),
                    *("bad", rcode, "bogus"),
                    connections=1,
                ),
            ),
        )
    },
    **{
        f"EDNS refused, {number}": Scene(
            script, "good;" * 4, modes=("plain",), queries=6
        )
        for number, script in enumerate(
            (
                *(less_edns(Rcode.FORMERR), less_edns(Rcode.NOTIMP)),
                less_edns(Rcode.FORMERR, options_alone=True),
                less_edns(Rcode.FORMERR, bare=True),
            )
        )
    },
    "FORMERR for another reason": Scene(
        failing(Rcode.FORMERR), "bad", Rcode.FORMERR, modes=("plain",), queries=4
    ),
    "queries that wait for a connection, and those that do not": Scene(
        asked="good;good good",
        settings={"handshake_delay": 0.2},
        counted={
            **{"up": 1, "connections": 1, "requests_total": 3, "hedges_total": 0},
            **{"conn_cache_misses_total": 1, "conn_cache_hits_total": 2},
            "handshakes_total full": 1,
        },
    ),
    "connection lost with a query": Scene(
        in_turn(answer, reset, answer),
        "good;good",
        counted={
            "closes_total reset": 1,
            "failures_total reset": 1,
            "replays_total": 1,
        },
    ),
}
LATE_SCENES = {
    "slow name": Scene(delayed(2.5), seconds=(2.4, 3.2)),
    "slower name": Scene(delayed(4.0), seconds=(3.9, 4.7)),
    "no answer at the deadline": Scene(
        *(silence, "bad.example.com bad.example.com bad", 2, "no answer"),
        *(("tls", "hang"), {"timeout": 0.5}),
        seconds=(0.5, 1.2),
    ),
    "only the first query of a connection is answered": Scene(
        first_alone, "good;" * 8, queries=30
    ),
    "long lines have time to shake hands": Scene(
        settings={"handshake_delay": 1.0}, seconds=(0.9, 3.0)
    ),
}
ANXIOUS_SCENES = {
    **{f"{name} first": Scene(in_turn(each, answer)) for name, each in FAULTS.items()},
    "one query per connection": Scene(
        few, "one " * 60, seconds=(0, 4), connections=100
    ),
    "three queries per connection": Scene(few, "three " * 60, seconds=(0, 4)),
    "every second query dropped": Scene(every_second, TWENTY, seconds=(0, 3)),
    **{
        f"neighbours of a poisonous name {batch.find('bad'), delay}": Scene(
            by_name({"bad": reset}),
            *(batch, Rcode.SERVFAIL, "reset", ("tls",), {"handshake_delay": delay}),
            seconds=(0, 4),
        )
        for batch, delay in (
            *((f"bad {TWENTY}", 0.0), (f"{TWENTY} bad", 0.0)),
            (f"{TENS} bad {TENS}", 0.12),
        )
    },
    "poisonous name alone": Scene(
        by_name({"bad": reset}), "good;bad;good", 2, "reset", connections=20
    ),
    "handshake that never ends, at first": Scene(modes=("hang tls", "trickle tls")),
}


class SceneTest(ScenarioTestCase):
    def test_where_each_query_is_sent_once(self) -> None:
        with patient_with_upstreams():
            self.run_cases(6, SOBER_SCENES)


class ExchangeTest(ScenarioTestCase):
    """What goes over a connection, and what comes back."""

    def setUp(self) -> None:
        super().setUp()
        self.have(patient_with_upstreams())

    def test_server_name_and_alpn_are_sent(self) -> None:
        """But no address, though a certificate may be for one."""
        for name, version in (
            *((NAME, "TLSv1.2"), (NAME, "TLSv1.3")),
            *((LOCALHOST, "TLSv1.3"), (LOCALHOST_V6, "TLSv1.3")),
        ):
            newest = NEWER if version == "TLSv1.2" else None
            host = LOCALHOST if name == NAME else name
            upstream = FakeUpstream(host=host, maximum_version=newest)
            with (
                self.subTest(name),
                upstream,
                self.client(upstream, name=name) as client,
            ):
                self.assert_right([client.ask()])
                seen = upstream.accepted[0]
                self.assertEqual((seen.alpn, seen.version), ("dot", version))
                self.assertEqual(seen.server_name, NAME if name == NAME else None)

    def test_names_are_told_where_the_ca_file_can_be_read_no_more(self) -> None:
        copy = _write_pem("ca_for_a_moment", "ca")
        with self.before(certificate=PKI.wrong_name, ca_file=copy) as (_, client):
            os.remove(copy)
            self.assertIn("for other.test, alias.other.test", client.ask().reason)

    def test_ids_are_unique_and_not_the_clients(self) -> None:
        with self.before(silence, timeout=0.3) as (upstream, client):
            client.ask()  # and a connection is open
            client.send_fresh(2000)
            upstream.wait_for(lambda u: len(u.queries) >= 2001)
            client.collect(2000)

        ids = [message.id for message in upstream.accepted[0].queries]
        self.assertEqual(len(set(ids)), len(ids))
        self.assertGreater(max(ids) - min(ids), 30000)  # and not in a row

    def test_answer_of_the_largest_size_arrives(self) -> None:
        def large(message: Message, _: FakeConnection) -> bytes:
            room = 65535 - len(response(message.raw, record("a", "TXT", b"")))
            return response(message.raw, record("a", "TXT", bytes(room)))

        with self.before(large) as (_, client):
            self.assertGreater(len(client.ask(transport=TCP).message.raw), 65000)

    def test_options_of_clients_stay_here(self) -> None:
        given = [option(code, b"12345678") for code in (65001, 65073, 65074, 26946, 5)]
        with self.before() as (upstream, client):
            for options in (given[0] + given[4], given[1] + given[2], given[3]):
                client.send("a.example.com", options=options)
                self.assert_right(client.collect(1))

            (asked,) = upstream.queries
            sent = {code for code, _ in asked.opt.options} if asked.opt else set()
            self.assertLessEqual(sent, {KEEPALIVE, PADDING})

    def test_nine_of_ten_answers_mutated(self) -> None:
        numbers = random.Random(7)

        def mutated(message: Message, _: FakeConnection) -> Reply:
            whole = bytearray(response(message.raw, "192.0.2.1", "192.0.2.2"))
            if message.qname.startswith("good"):
                return answer
            for _change in range(numbers.randint(1, 8)):
                whole[numbers.randrange(2, len(whole))] = numbers.randrange(256)
            return bytes(
                whole[: numbers.choice((len(whole), numbers.randrange(12, 60)))]
            )

        with self.before(mutated, timeout=1.0) as (upstream, client):
            for _ in range(40):
                client.send_fresh(9, "bad")
                client.send_fresh(1, "good")
                threading.Event().wait(0.01)
            good = [r for r in client.collect(400) if r.name.startswith("good")]

            self.assert_right(good, 40)
            self.assertLessEqual(upstream.connections, 20)

    def test_answer_that_says_it_is_too_large_is_a_fault(self) -> None:
        """Inside TLS there is room for all of it: asked once more, never kept."""
        truncated = MISFITS["truncated"][0]
        with self.before(in_turn(truncated, answer)) as (_, client):
            self.assert_right([client.ask(transport=TCP)])

        with self.before(truncated) as (upstream, client):
            for transport in (UDP, TCP):
                client.ask("large.example.com", transport)
            self.assert_failed(client.ask("large.example.com", TCP))
            self.assertGreaterEqual(len(upstream.queries), 3)
            upstream.script = answer
            self.assert_right([client.ask("large.example.com", TCP)])


class WaitingTest(ScenarioTestCase):
    """One upstream that is slow, out of order or does something wrong."""

    log: list[logging.LogRecord]

    def told(self, event: str, upstream: FakeUpstream) -> int:
        """Count the lines of the log with this event of this upstream."""
        texts = [record.getMessage() for record in self.log]
        where = f"127.0.0.1:{upstream.port}"
        return sum(event in text and where in text for text in texts)

    def check_in_order(self, seconds: float, mode: str, count: int, p90: float) -> None:
        """One name in forty takes so long, and holds up what is behind it."""

        def script(message: Message, connection: FakeConnection) -> None:
            begin = max(time.monotonic(), connection.busy_until)
            slow = message.qname.startswith("slow")
            connection.busy_until = begin + seconds * slow
            connection.perform_at(connection.busy_until, answer, message)

        with contextlib.ExitStack() as stack:
            upstreams = [
                stack.enter_context(FakeUpstream(script, on_accept=mode))
                for _ in range(count)
            ]
            routes = [("example.com", each) for each in upstreams]
            client = stack.enter_context(self.client(routes=routes))
            slow = [client.fresh("slow") for _ in range(3)]
            results = client.run(120, 20 + 10 * seconds, *slow)

            others = [r for r in results if not r.name.startswith("slow")]
            right = [r for r in others if r.right]
            self.assertGreaterEqual(len(right), 0.98 * len(others))
            elapsed = sorted(result.elapsed for result in others)
            self.assertLessEqual(elapsed[int(len(elapsed) * 0.9)], p90)
            asked = sum(len(upstream.queries) for upstream in upstreams)
            self.assertLessEqual(asked, 1.5 * len(results))
            self.assertLessEqual(max(upstream.peak for upstream in upstreams), 6)

    def test_cases(self) -> None:
        rows = ((1.0, "tls", 1, 0.4), (1.0, "plain", 1, 0.4), (1.5, "tls", 1, 9.0))
        more = ((1.5, "tls", 2, 9.0), (3.0, "plain", 1, 9.0), (3.0, "plain", 2, 9.0))
        cases = {
            f"in order {row[:3]}": functools.partial(self.check_in_order, *row)
            for row in (*rows, *more)
        }
        with self.assertLogs(dotproxy.logger, logging.INFO) as watched:
            self.log = watched.records
            self.run_cases(17, {**cases, **LATE_SCENES, **ANXIOUS_SCENES})

    def case_answer_after_the_deadline_is_kept_for_the_next(self) -> None:
        """Though the failure was kept as well, and the connection was silent."""
        with self.before(delayed(3.0), timeout=2.4) as (upstream, client):
            late = client.ask("late.example.com")
            threading.Event().wait(3.4 - late.elapsed)
            asked = len(upstream.queries)
            again = client.ask("late.example.com")

            self.assert_failed(late)
            self.assertAlmostEqual(late.elapsed, 2.45, delta=0.3)
            self.assert_right([again])
            self.assertEqual(len(upstream.queries), asked)
        self.assertLess(dotproxy.Config().timeout, 5.0)  # as long as clients wait

    def case_handshake_then_end(self) -> None:
        with self.before(answer, "leave") as (upstream, client):
            for result in client.run(25, 10):
                self.assert_failed(result)
            self.assertLessEqual(upstream.connections, 9)
            wait_until(lambda: self.told("upstream down", upstream) == 1)

            upstream.on_accept = "tls"
            wait_until(lambda: client.ask().right, 2.0)
            wait_until(lambda: self.told("upstream up", upstream) == 1)

    def case_outage_is_told_once(self) -> None:
        with self.before() as (upstream, client):
            client.ask()
            upstream.stop()
            client.run(25, 10)
            self.assertEqual(self.told("upstream down", upstream), 1)
            upstream.start()
            wait_until(lambda: client.ask().right, 2.0)
            wait_until(lambda: self.told("upstream up", upstream) == 1)

    def case_restarts_under_load_lose_nothing(self) -> None:
        for mode in ("tls", "plain"):
            with self.before(answer, mode) as (upstream, client):
                results = client.run(20, 400)
                for restart in range(4):
                    client.send_fresh(10)
                    upstream.stop(reset=restart % 2 == 0)
                    client.send_fresh(10)
                    upstream.start()
                    results += client.run(40, 200) + client.collect(20)

                self.assert_right(results, 260)

    def case_answers_before_the_end_count(self) -> None:
        def script(message: Message, connection: FakeConnection) -> None:
            if len(connection.queries) == 3:
                connection.send_raw(frame(*map(right, connection.queries))[:-1])
                connection.cut()

        with self.before(script) as (upstream, client):
            wait_until(lambda: client.counted("up", upstream) == 1)
            client.send_fresh(3)
            self.assert_right(client.collect(2), 2)
            upstream.script = answer
            upstream.drop_connections()
            self.assert_right(client.collect(1))

    def case_half_open_connection_costs_no_more_than_the_hedge(self) -> None:
        with self.before() as (upstream, client):
            client.run(20, 400)
            stale = set(upstream.live)
            upstream.script = lambda _, c: silence if c in stale else answer
            results = client.run(60, 100)

            self.assert_right(results, 60)
            self.assertLess(max(r.elapsed for r in results), 1.9)

    def case_early_copies_have_a_budget(self) -> None:
        with self.before(by_name({"slow": delayed(0.3)})) as (upstream, client):
            client.send(client.fresh("slow"), client.fresh())  # answered out of order
            client.collect(2)
            client.send_fresh(300, "slow")
            self.assert_right(client.collect(300), 300)

            self.assertLess(len(upstream.queries), 302 + 32 + 33 + 10)


class SeveralTest(ScenarioTestCase):
    """Several upstreams."""

    @contextlib.contextmanager
    def several(
        self, strategy: str, *scripts: Reply
    ) -> Iterator[tuple[Asker, list[FakeUpstream]]]:
        """Run a proxy before upstreams with these scripts, all connected."""
        with contextlib.ExitStack() as stack:
            upstreams = [stack.enter_context(FakeUpstream(each)) for each in scripts]
            client = stack.enter_context(self.client(*upstreams, strategy=strategy))
            for upstream in upstreams:
                upstream.wait_for(lambda u: u.handshakes > 0)
            yield client, upstreams

    def check_shares(
        self, strategy: str, scripts: Sequence[Reply], bounds: Sequence[range]
    ) -> None:
        """Compare how many of 90 queries each upstream gets."""
        with self.several(strategy, *scripts) as (client, upstreams):
            client.run(20, 200)
            before = [len(upstream.queries) for upstream in upstreams]
            self.assert_right(client.run(90, 200), 90)
            shares = [len(u.queries) - old for u, old in zip(upstreams, before)]
            for share, bound in zip(shares, bounds):
                self.assertIn(share, bound, shares)

    def check_sick(self, script: Reply, on_accept: str, start: bool) -> None:
        """All answers are right and nearly all fast, though one of two is sick."""
        with contextlib.ExitStack() as stack:

            def sicken() -> None:
                sick.script, sick.on_accept = script, on_accept
                if on_accept in ("refusing", "dark", "expired"):
                    sick.stop(reset=True)
                if on_accept == "dark":
                    stack.enter_context(full_backlog(sick.port))
                elif on_accept == "expired":
                    sick.certificate, sick.on_accept = PKI.expired, "tls"
                    sick.start()
                elif on_accept != "refusing":
                    sick.drop_connections()

            well = stack.enter_context(FakeUpstream())
            sick = stack.enter_context(FakeUpstream())
            if start:
                sicken()
            order = (sick, well) if start else (well, sick)
            client = stack.enter_context(self.client(*order))
            results = client.run(10, 50)
            if not start:
                sicken()
            results += client.run(30, 50)

            self.assert_right(results, 40)
            elapsed = sorted(result.elapsed for result in results[10 * (not start) :])
            self.assertLess(elapsed[int(len(elapsed) * 0.8)], 0.7)

    def test_cases(self) -> None:
        slow, cases = delayed(0.02), {}
        for row in (
            ("fastest", (slow, answer, slow), (range(99), range(60, 99))),
            ("failover", (slow, answer, answer), (range(50, 99),)),
            ("round-robin", (answer, answer, answer), [range(20, 99)] * 3),
            ("random", (answer, answer, answer), [range(10, 99)] * 3),
            *((s, (failing(2), answer), (range(45),)) for s in dotproxy.STRATEGIES),
        ):
            share = functools.partial(self.check_shares, *row)
            cases[f"shares of {len(row[1])}, {row[0]}"] = share
        sick = {"silent": silence, "failing": failing(2), "no DNS": GARBAGE}
        modes = "hang", "leave", "garbage", "refusing", "dark", "expired"
        for name, start in itertools.product((*sick, *modes), (True, False)):
            script, mode = sick.get(name, answer), "tls" if name in sick else name
            check = functools.partial(self.check_sick, script, mode, start)
            cases[f"{name} at first" if start else name] = check
        self.run_cases(9, cases)

    def case_failover_goes_back_to_the_first(self) -> None:
        with self.several("failover", answer, answer) as (client, (first, second)):
            first.stop()
            self.assert_right(client.run(20, 200), 20)
            first.start()
            first.queries.clear()

            wait_until(lambda: client.ask().right and len(first.queries) > 5)
            self.assertGreater(len(second.queries), 15)

    def case_best_are_connected_again_while_there_are_clients(self) -> None:
        for strategy, wanted in (("fastest", 2), ("failover", 2), ("random", 3)):
            with self.several(strategy, *[answer] * 3) as (client, upstreams):
                client.run(10, 200)
                threading.Event().wait(0.3)  # one that is closed at once is left alone
                for upstream in upstreams:
                    upstream.drop_connections()

                live = [functools.partial(getattr, u, "live") for u in upstreams]
                wait_until(lambda: sum(bool(of()) for of in live) >= wanted)  # noqa: B023
                self.assertTrue(upstreams[0].live or strategy != "failover")

    def case_answer_of_two_who_do_not_answer_well(self) -> None:
        for first, second, rcode, seconds, queries in (
            (FakeUpstream(failing(5)), FakeUpstream(failing(2)), 2, 0.9, 1),
            (FakeUpstream(failing(2)), FakeUpstream(on_accept="hang"), 2, 2.0, 2),
            (FakeUpstream(silence), FakeUpstream(handshake_delay=0.3), 0, 2.0, 2),
        ):
            with first, second, self.client(first, second) as client:
                first.wait_for(lambda u: u.handshakes > 0)
                result = client.ask()

                self.assert_failed(result, rcode)
                self.assertLess(result.elapsed, seconds, (first.script, rcode))
                self.assertLessEqual(len(first.queries), queries)

    def case_late_answer_has_a_copy_asked_of_another(self) -> None:
        for other, won in ((answer, 1), (delayed(0.8), 0)):
            slow = by_name({"slow": delayed(0.4)}), by_name({"slow": other})
            with self.several("failover", *slow) as (client, (_, second)):
                client.run(20, 200)
                before = int(client.counted("hedges_won_total", second))
                result = client.ask(client.fresh("slow"))

                self.assert_right([result])
                self.assertEqual(result.elapsed < 0.38, bool(won))
                self.expect(client, second, "hedges_won_total", before + won)
                self.assertGreater(client.counted("hedges_total", second), 0)


class BoundsTest(ScenarioTestCase):
    """How much there may be of anything."""

    def test_busiest_client_loses_its_oldest(self) -> None:
        with self.before(silence, timeout=0.4, max_in_flight=10) as (_, client):
            client.send("one.example.com", client="192.0.2.1")
            client.send(*[f"n{number}.example.com" for number in range(9)])
            self.assertEqual(client.proxy.in_flight, 10)

            client.send("two.example.com", client="192.0.2.2")
            shed = client.collect(1)[0]

            self.assert_failed(shed)
            self.assertEqual(shed.name, "n0.example.com")
            client.send(shed.name)  # that can be asked again
            self.assertEqual(len(client.collect(11)), 11)

    def test_bound_holds_with_one_query_per_client(self) -> None:
        with self.before(silence, timeout=0.3, max_in_flight=1000) as (_, client):
            counts = []
            for number in range(40):
                names = [client.fresh() for _ in range(50)]
                client.send(*names, client=f"2001:db8::{number:x}")
                counts.append(client.proxy.in_flight)
            client.collect(2000)

            self.assertLessEqual(max(counts), 1000)
            # A tenth is given up at a time: to find the busiest client takes long.
            self.assertLessEqual(min(counts[20:]), 900)

    def test_names_without_an_answer_do_not_delay_others(self) -> None:
        with self.before(by_name({"never": silence}), timeout=0.4) as (_, client):
            usual = statistics.median(r.elapsed for r in client.run(50, 500))
            threads, descriptors = threading.active_count(), len(os.listdir("/dev/fd"))
            greedy = Asker(client.proxy)
            for _ in range(20):
                greedy.send_fresh(50, "never")

            good = client.run(50, 200)

            self.assert_right(good, 50)
            median = statistics.median(r.elapsed for r in good)
            self.assertLess(median - usual, 0.5)
            self.assertLessEqual(threading.active_count(), threads + 2 * 4)
            self.assertLessEqual(len(os.listdir("/dev/fd")), descriptors + 4 * 4)
            late = max(r.elapsed for r in greedy.collect(1000))
            self.assertLess(late, 3.0)  # 0.4 after which they fail, and a slow machine

    def test_close_does_not_wait_for_who_never_answers(self) -> None:
        with FakeUpstream(on_accept="hang") as hung, full_backlog() as full:
            dark = FakeUpstream(port=full[1])
            start = time.monotonic()
            with self.client(hung, dark):
                hung.wait_for(lambda u: u.connections == 1)

        self.assertLess(time.monotonic() - start, 2.0)

    def test_nothing_is_begun_after_the_end(self) -> None:
        with FakeUpstream(silence) as upstream:
            with self.client(upstream, timeout=0.2) as client:
                client.ask()
            seen = upstream.connections
            client.send_fresh(1)

            self.assertEqual(upstream.connections, seen)

    def test_thread_that_cannot_start_counts_as_a_failed_connection(self) -> None:
        start, scarce = threading.Thread.start, True

        def start_or_not(thread: threading.Thread) -> None:
            if scarce and thread.name.startswith("upstream-"):
                raise RuntimeError("can't start new thread")
            start(thread)

        self.have(mock.patch.object(threading.Thread, "start", start_or_not))
        with self.before() as (_, client):
            self.assert_failed(client.ask())
            scarce = False
            wait_until(lambda: client.ask().right)

    def test_upstream_that_was_not_reached_and_one_that_cannot_be(self) -> None:
        with self.before(answer, "hang", timeout=0.2) as (upstream, client):
            self.assertIn("not connected yet", client.proxy.trouble())
            self.assertEqual(client.state(upstream), "new")
            upstream.stop()

        with self.client(upstream) as client:
            result = client.ask()
            self.assertIn(
                f"refused: nothing on TCP port {upstream.port}", result.reason
            )
            self.assertLess(result.elapsed, 2.0)
            self.assertEqual(client.state(upstream), "down")
            self.expect(client, upstream, "closes_total refused", 0)
            self.expect(client, upstream, "failures_total refused", SOME)

    def test_causes_that_are_counted_are_those_that_there_are(self) -> None:
        with open(dotproxy.__file__, encoding="utf-8") as file:
            causes = set(re.findall(r'UpstreamError\(\s*"([a-z]+)"', file.read()))
        for error in (
            *(socket.gaierror(), socket.timeout(), ConnectionRefusedError()),
            *(ConnectionResetError(), OSError(errno.ENETUNREACH, ""), OSError()),
        ):
            where = Endpoint(LOCALHOST, 853, NAME)
            causes.add(dotproxy.describe_network_error(error, where).cause)

        # One of ours, one that concerns no upstream, and two that the doctor finds.
        others = {"ended", "overload", "silence", "unwilling"}
        self.assertEqual(causes - others, set(dotproxy.FAILURES))


class SessionTest(ScenarioTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.have(patient_with_upstreams())

    def reconnect(self, client: Asker, upstream: FakeUpstream) -> None:
        """Have a question answered over a new connection."""
        upstream.drop_connections()
        result = client.ask()
        self.assert_right([result])
        self.assertLess(result.elapsed, 2.0)

    def test_reconnections_resume_and_the_pin_is_checked(self) -> None:
        for version in (NEWER, None):
            run = self.before(maximum_version=version, pin=PINNED[:1])
            with self.subTest(version), run as (upstream, client):
                client.ask()
                for _ in range(6):
                    self.reconnect(client, upstream)

                self.assertGreaterEqual(upstream.resumed, 5)
                self.expect(client, upstream, "handshakes_total resumed", range(5, 99))

    def test_session_that_is_refused_is_dropped(self) -> None:
        for version, ending in itertools.product((NEWER, None), ("alert", "end")):
            upstream = FakeUpstream(maximum_version=version, no_resumption=ending)
            run = self.client(upstream)
            with self.subTest(version=version, ending=ending), upstream, run as client:
                client.ask()
                for _ in range(3):
                    self.reconnect(client, upstream)

                self.assertGreater(upstream.refused, 0)
                self.assertLessEqual(upstream.refused, 6)

    def test_session_ends_with_its_certificate(self) -> None:
        with self.before() as (upstream, client):
            client.ask()
            seen = upstream.resumed
            century = 100 * 366 * 86400 + time.time()  # the certificate ends in 2100
            with mock.patch.object(time, "time", lambda: century):
                self.reconnect(client, upstream)

            self.assertEqual(upstream.resumed, seen)

    def test_session_is_given_to_no_other_upstream(self) -> None:
        """Not the second of two, nor the server of a domain, though they are one."""
        for number, routed in ((2, False), (1, True)):
            with FakeUpstream() as upstream:
                routes = [("corp.example", upstream)] * routed
                run = self.client(
                    *[upstream] * number, strategy="failover", routes=routes
                )
                with self.subTest(routed), run as client:
                    upstream.wait_for(lambda u: u.handshakes == 2)
                    client.ask()
                    upstream.drop_connections()
                    upstream.wait_for(lambda u: u.handshakes >= 4)

                self.assertEqual(upstream.resumed, 1)

    def test_session_is_kept_where_the_first_answer_is_a_failure(self) -> None:
        failed = failing(Rcode.SERVFAIL)
        with self.before(in_turn(failed, failed, answer)) as (upstream, client):
            self.assert_failed(client.ask())
            self.reconnect(client, upstream)

            self.assertEqual(upstream.resumed, 1)


class AddressTest(ScenarioTestCase):
    """An upstream given by a name that has several addresses."""

    @contextlib.contextmanager
    def named(self, upstream: FakeUpstream, *hosts: str) -> Iterator[Asker]:
        """Run a proxy before dns.test, which is at these hosts."""
        find = socket.getaddrinfo

        def found(host: Any, port: Any, *rest: Any, **named: Any) -> Any:
            hosts_of = hosts if host == "dns.test" else (host,)
            return [e for each in hosts_of for e in find(each, port, *rest, **named)]

        here, upstream.host = upstream.host, "dns.test"
        known = mock.patch.object(socket, "getaddrinfo", found)
        with known, self.client(upstream) as client:
            upstream.host = here
            yield client

    def test_address_that_worked_is_tried_first(self) -> None:
        self.have(mock.patch.object(dotproxy.Upstream, "PATIENT", 0.8))
        for hosts in (("127.0.0.2", LOCALHOST), (LOCALHOST, "127.0.0.2")):
            with (
                FakeUpstream() as upstream,
                full_backlog(upstream.port, "127.0.0.2"),
                self.named(upstream, *hosts) as client,
            ):
                self.assert_right([client.ask()])
                for _ in range(2):
                    upstream.drop_connections()
                    result = client.ask()
                    self.assert_right([result])
                    self.assertLess(result.elapsed, 0.35)

    def test_other_address_takes_over_when_the_one_that_worked_is_gone(self) -> None:
        with FakeUpstream() as first:
            second = FakeUpstream(host="127.0.0.2", port=first.port)
            with second, self.named(first, LOCALHOST, "127.0.0.2") as client:
                self.assert_right([client.ask()])
                first.stop()

                self.assert_right([client.ask()])
                self.assertEqual(len(second.queries), 1)

    def test_host_without_a_network_tells_so_soon(self) -> None:
        """Though a connection is open, over which nothing comes any more."""
        find = socket.getaddrinfo

        def unreachable(host: Any, *rest: Any, **named: Any) -> Any:
            return find("255.255.255.255", *rest, **named)

        with FakeUpstream() as upstream, self.client(upstream) as client:
            self.assert_right([client.ask()])
            upstream.script = silence
            with mock.patch.object(socket, "getaddrinfo", unreachable):
                result = client.ask()

            self.assertIn("no route", result.reason)
            self.assertLess(result.elapsed, 3.5)

    def test_name_that_nobody_knows_is_told(self) -> None:
        with self.named(FakeUpstream()) as client:
            self.assertIn("dns.test", client.ask().reason)


class LifeTest(ScenarioTestCase):
    """What hours do, or seconds in which the host sleeps."""

    def setUp(self) -> None:
        super().setUp()
        self.have_time_to_skip()

    def test_questions_without_an_answer_are_forgotten(self) -> None:
        with self.before(by_name({"never": silence})) as (_, client):
            self.assert_right([client.ask()])
            never = Asker(client.proxy)
            never.send_fresh(500, "never")

            def forgotten() -> bool:
                for _ in range(50):  # others are answered over the same connection
                    self.assert_right([client.ask()])
                    self.ahead += 1.0
                gc.collect()
                known = [o for o in gc.get_objects() if isinstance(o, dotproxy.Query)]
                return sum(b"never" in each.question for each in known) < 50

            wait_until(forgotten)
            self.assertEqual(len(never.collect(500)), 500)

    def test_connection_gone_silent_ends(self) -> None:
        with self.before(silence, timeout=0.3) as (upstream, client):
            self.assert_failed(client.ask())
            self.ahead += 5.0
            self.expect(client, upstream, "closes_total timeout", SOME)

    def test_idle_life_is_learned_and_closes_lose_nothing(self) -> None:
        with self.before() as (upstream, client):
            for closes in range(4):
                self.assert_right([client.ask()])
                self.ahead += 6.0
                upstream.drop_connections()
                self.expect(
                    client, upstream, "closes_total closed", range(closes + 1, 99)
                )
            life = client.counted("idle_life_seconds", upstream)
            self.assertAlmostEqual(life, 6.0, delta=0.5)
            for event in ("failures_total closed", "replays_total"):
                self.expect(client, upstream, event, 0)

    def test_connections_are_let_go_when_clients_are_quiet(self) -> None:
        with self.before() as (upstream, client):
            self.assert_right([client.ask()])
            self.ahead += 130.0

            wait_until(lambda: not upstream.live)
            self.assert_right([client.ask()])

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
            self.assertIn(f"127.0.0.1:{upstream.port}", client.proxy.trouble())
            self.ahead += 120.0
            tried = client.counted(refused, upstream)
            client.proxy.trouble()  # an attempt
            wait_until(lambda: client.counted(refused, upstream) > tried)
            tried = client.counted(refused, upstream)
            for _ in range(10):
                client.proxy.trouble()
                threading.Event().wait(0.01)
            self.assertLessEqual(client.counted(refused, upstream), tried + 1)

            upstream.start()
            self.ahead += 31.0  # the longest wait
            wait_until(lambda: client.proxy.trouble() == "")

    def test_idle_time_that_an_upstream_tells_is_believed(self) -> None:
        for told in (300, 0):  # tenths of a second
            data = option(KEEPALIVE, struct.pack("!H", told))
            script = failing(Rcode.NOERROR, options=data)
            with self.subTest(told), self.before(script) as (upstream, client):
                for _ in range(3):
                    self.assert_failed(client.ask(), Rcode.NOERROR)
                if told:
                    self.expect(client, upstream, "idle_life_seconds", 30)
                else:  # it wants each connection closed
                    upstream.wait_for(lambda u: len(u.live) < u.connections)


class RoutesTest(ScenarioTestCase):
    """One upstream for all names, and others for some domains."""

    def setUp(self) -> None:
        super().setUp()
        self.public = self.have(FakeUpstream())
        self.corp = self.have(FakeUpstream(certificate=PKI.good2))
        self.deep = self.have(FakeUpstream())
        self.lan = self.have(FakeUpstream(on_accept="plain"))
        self.second = self.have(FakeUpstream(on_accept="plain"))
        self.routes = [
            *(("corp.example", self.corp), ("cluster.lan", self.lan)),
            *(("cluster.lan", self.second), ("deep.corp.example", self.deep)),
        ]
        self.asker = self.have(self.client(self.public, routes=self.routes))

    def ask(self, *names: str) -> list[Result]:
        self.asker.send(*names)
        return self.asker.collect(len(names))

    def test_each_name_is_asked_of_its_own_servers(self) -> None:
        found = {
            self.public: ("www.example", "acorp.example", "corp.example.com", "lan"),
            self.corp: ("corp.example", "a.b.CORP.example", "xdeep.corp.example"),
            self.deep: ("deep.corp.example", "x.deep.corp.example"),
            self.lan: ("svc.cluster.LAN", "cluster.lan"),
        }
        names = [name for share in found.values() for name in share]
        # Its first label ends with the octets of the domain.
        label = b"x" + dotproxy.encode_domain("corp.example")[:-1]
        middle = query(bytes([len(label)]) + label + b"\0", do=False)
        asked = self.asker.proxy.lookup(middle, dotproxy.elapsed(), [], UDP)
        assert isinstance(asked, dotproxy.Query)
        answered = threading.Event()

        self.asker.proxy.resolve([(asked, lambda *_: answered.set())])
        self.assert_right(self.ask(*names), len(names))

        self.assertTrue(answered.wait(5))
        for upstream, share in found.items():
            seen = [m.qname for m in upstream.queries if m.qname in names]
            if upstream is self.lan:
                seen += [m.qname for m in self.second.queries]
            self.assertEqual(set(seen), set(share))
        self.assertEqual(len(self.public.queries), len(found[self.public]) + 1)
        # Padded where it is encrypted.
        sizes = {len(m.raw) for u in (self.public, self.corp) for m in u.queries}
        self.assertEqual(sizes, {128})
        plain = (self.lan.queries + self.second.queries)[0]
        self.assertLess(len(plain.raw), 64)

    def test_second_server_of_a_domain_takes_over(self) -> None:
        self.lan.stop()

        self.assert_right(self.ask("a.cluster.lan"), 1)
        self.assertEqual(len(self.second.queries), 1)

    def test_name_of_a_server_that_is_down_is_asked_nowhere_else(self) -> None:
        self.have(mock.patch.object(dotproxy.Upstream, "GRACE", 0.2))
        self.corp.script = failing(Rcode.SERVFAIL)
        self.assert_failed(self.ask("a.corp.example")[0])
        stopped = {
            "a.deep.corp.example": f"127.0.0.1:{self.deep.port}",
            "a.cluster.lan": f"tcp://127.0.0.1:{self.lan.port}",
        }
        for upstream in (self.deep, self.lan, self.second):
            upstream.stop()

        for result in self.ask(*stopped):
            self.assert_failed(result)
            self.assertIn(stopped[result.name], result.reason)

        for upstream in (self.deep, self.lan, self.second):
            upstream.start()
        for name in stopped:
            wait_until(lambda: self.ask(f"n{next(Asker.numbers)}.{name}")[0].right)  # noqa: B023
        self.assertEqual(self.public.queries, [])

    def test_facts_tell_the_domains(self) -> None:
        found = [(f["name"], f["domain"]) for f in self.asker.proxy.facts()]

        wanted = [
            (str(Endpoint(*u.address, "" if u.on_accept == "plain" else NAME)), domain)
            for domain, u in (("", self.public), *self.routes)
        ]
        self.assertEqual(found, wanted)


class Held(threading.local):
    """The locks that this thread holds."""

    def __init__(self) -> None:
        self.locks: list[WatchedLock] = []


class WatchedLock:
    """A lock that notes which others its thread holds when it is taken."""

    held = Held()

    def __init__(self, real: Any, site: str, seen: set[tuple[str, str]]) -> None:
        self._real, self.site, self._seen = real, site, seen

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        given = (timeout,) if blocking and timeout >= 0 else ()
        taken: bool = self._real.acquire(blocking, *given)
        if taken:
            self._seen.update((other.site, self.site) for other in self.held.locks)
            self.held.locks.append(self)
        return taken

    __enter__ = acquire

    def release(self, *_: object) -> None:
        with contextlib.suppress(ValueError):  # a semaphore's may be another's
            self.held.locks.remove(self)
        self._real.release()

    __exit__ = release


def site_of_lock() -> str:
    """Return the attribute of dotproxy that a new lock will be, or nothing."""
    frame = sys._getframe(2)
    if isinstance(frame.f_locals.get("self"), threading.Condition) and frame.f_back:
        frame = frame.f_back
    if frame.f_code.co_filename != dotproxy.__file__:
        return ""  # of an event or a thread, or of another module
    line = linecache.getline(dotproxy.__file__, frame.f_lineno)
    found = re.search(r"(\w+)(: [^=]*)? = ", line)
    owner = frame.f_locals.get("self")
    kind = type(owner).__name__ if owner is not None else frame.f_code.co_name
    return f"{kind}.{found.group(1) if found else line.strip()}"


class LockTest(DotproxyTestCase):
    """The table of locks in the docstring of dotproxy.py is true."""

    # Which locks may be taken while one is held. No other may be held meanwhile.
    ALLOWED: ClassVar[dict[str, tuple[str, ...]]] = {
        "Link._sending": ("UpstreamGroup.lock", "Channel._lock"),
        "StreamHandler._changed": ("Channel._lock",),
        "TCPServer.turns": ("Channel._lock",),
    }

    def setUp(self) -> None:
        super().setUp()
        self.seen: set[tuple[str, str]] = set()
        plain = threading.Lock  # also where one might be taken again by its holder
        for kind in ("Lock", "RLock", "BoundedSemaphore"):
            made = functools.partial(self.make, getattr(threading, kind), plain)
            self.have(mock.patch.object(threading, kind, made))

    def make(self, real: Callable[..., Any], plain: Any, *arguments: int) -> Any:
        site = site_of_lock()
        if not site:
            return real(*arguments)
        lock = real(*arguments) if arguments else plain()
        return WatchedLock(lock, site, self.seen)

    def test_no_lock_is_taken_under_another_but_as_the_table_says(self) -> None:
        misfit, _, _ = MISFITS["cut short"]
        script = by_name({"poison": reset, "never": silence, "bad": misfit})
        options = (
            *ENCRYPTED,
            "--admin=127.0.0.1:0",
            "--timeout=0.5",
            "--max-in-flight=60",
        )
        names = [f"n{number}.example.com" for number in range(40)]
        names += ["poison.example.com", "never.example.com", "bad.example.com"] * 2
        with (
            serving(script, *options) as served,
            TCPClient(served.address) as tcp,
            TLSClient(served.tls_address) as tls,
            UDPClient(served.address) as udp,
        ):
            udp.send(*map(query, names))
            tcp.send(*map(query, names))
            tls.send(*map(query, names[::-1]))
            served.upstream.drop_connections(reset=True)
            clients: list[Client] = [tcp, tls, *[udp] * len(names)]
            for client in clients:
                client.receive()
            served.upstream.stop()
            tls.send(*[query(f"x{name}") for name in names])
            served.upstream.start()
            for _ in range(2 * len(names) - 1):
                tls.receive()
            assert served.daemon.admin is not None
            port = int(served.daemon.admin.server_address[1])
            page = http.client.HTTPConnection(LOCALHOST, port, timeout=5)
            with contextlib.closing(page):
                page.request("GET", "/metrics")
                self.assertEqual(page.getresponse().status, 200)
            served.daemon.reload()

        allowed = {(held, each) for held, of in self.ALLOWED.items() for each in of}
        self.assertEqual(self.seen - allowed, set())
        self.assertIn(("Link._sending", "Channel._lock"), self.seen)  # it does watch


# ---- Cache ---------------------------------------------------------------------------


def cache_key(message: bytes) -> bytes:
    return dotproxy.parse_query(message).cache_key


def read_response(message: bytes) -> dotproxy.Response:
    return dotproxy.parse_response(message, 12 + len(parse(message).question))


def make_cache(size: int = 1 << 20, **settings: Any) -> Cache:
    return Cache(dotproxy.Config(cache_size=size)._replace(**settings))


ASKED = query("www.example.com")
KEY = cache_key(ASKED)
ALIAS_RECORD = record("www.example.com", "CNAME", encode_name("example.com"), 300)
SOME_RESPONSE = read_response(response(ASKED, "192.0.2.1"))


class CacheTest(DotproxyTestCase):
    """What is stored, for how long, and with which TTLs; time starts at 1000."""

    def setUp(self) -> None:
        self.cache = make_cache(cache_stale=0)

    def put(self, *answers: bytes | str, now: float = 1000.0, **what: Any) -> list[int]:
        """Store a response; return the TTLs that are served at once."""
        message = response(ASKED, *answers, **what)
        served = self.cache.put(KEY, read_response(message), now)
        return self.ttls(dotproxy.build_answer(dotproxy.parse_query(ASKED), served))

    def get(self, age: float) -> list[int] | None:
        """Return the TTLs of the live answer at this age of the cache."""
        entry = self.cache.get(KEY, 1000.0 + age)
        if entry is None or 1000.0 + age >= entry.expires:
            return None
        asked = dotproxy.parse_query(ASKED)
        return self.ttls(self.cache.answer(entry, asked, 1000.0 + age))

    def ttls(self, message: bytes) -> list[int]:
        answer = parse(message)
        sections = answer.answers + answer.authority + answer.additional
        return [entry.ttl for entry in sections]

    def test_ttl_counts_down_by_whole_seconds(self) -> None:
        self.assertIsNone(self.get(0.0))
        self.put("192.0.2.1", ttl=10)

        # A batch has one time, taken early: before the answer was stored, perhaps.
        for age, ttl in ((-0.01, 10), (0.0, 10), (0.999, 10), (1.0, 9), (9.99, 1)):
            with self.subTest(age=age):
                self.assertEqual(self.get(age), [ttl])
        self.assertIsNone(self.get(10.0))

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
            *(
                (f"failure {rcode}", 1, [], {"rcode": rcode, "authority": [soa()]})
                for rcode in (1, 2, 4, 5)
            ),
            *((f"RCODE {rcode}", 0, ["::1"], {"rcode": rcode}) for rcode in (6, 9, 15)),
            ("truncated", 0, ["192.0.2.1"], {"tc": True}),
            ("truncated failure", 0, [], {"rcode": 2, "tc": True}),
        ]
        for name, life, answers, what in cases:
            with self.subTest(name):
                self.cache.flush()
                self.put(*answers, **what)
                self.assertEqual(self.get(max(0, life - 0.1)) is not None, life > 0)
                self.assertIsNone(self.get(life))
        for rrtype, life in (("CNAME", 300), ("RRSIG", 300), ("AAAA", 1), (39, 1)):
            asked = query(rrtype=rrtype)
            found = read_response(response(asked, ALIAS_RECORD, rrsig))
            self.cache.put(cache_key(asked), found, 0.0)
            entry = self.cache.get(cache_key(asked), 0.0)
            assert entry is not None
            with self.subTest("alias that was asked for", rrtype=rrtype):
                self.assertEqual((entry.expires, entry.failed), (life, life == 1))

    def test_bounds_reach_every_record_from_the_first_answer_on(self) -> None:
        glue = [address("ns.example.com", "192.0.2.2", ttl) for ttl in (10, 40)]
        bounded = {"cache_min_ttl": 30, "cache_max_ttl": 60}
        for name, settings, answers, what, ttls in (
            ("minimum", {"cache_min_ttl": 60}, ["::1"], {"ttl": 10}, [60]),
            ("maximum", {"cache_max_ttl": 60}, ["::1"], {"ttl": 3600}, [60]),
            ("all", bounded, ["::1"], {"additional": glue}, [60, 30, 40]),
            ("SOA", {}, [], {"rcode": 3, "authority": [soa(ttl=60, minimum=20)]}, [20]),
            ("an hour", {}, [], {"authority": [soa(ttl=9999, minimum=9999)]}, [3600]),
            ("low SOA", bounded, [], {"authority": [soa(minimum=10)]}, [30]),
            ("low", bounded, [], {"authority": [soa(ttl=30, minimum=10)]}, [30]),
            ("high SOA", bounded, [], {"authority": [soa(minimum=300)]}, [60]),
            ("alias", {}, [ALIAS_RECORD], {"authority": [soa(minimum=20)]}, [20, 20]),
        ):
            self.cache = make_cache(**settings, cache_stale=0)
            with self.subTest(name):
                self.assertEqual(self.put(*answers, **what), ttls)
                last = min(ttls) - 1
                self.assertEqual(self.get(last), [ttl - last for ttl in ttls])
                self.assertIsNone(self.get(min(ttls)))

    def test_what_is_not_stored_whatever_the_settings(self) -> None:
        cases: list[tuple[dict[str, Any], list[Any], dict[str, Any], list[int]]] = [
            ({"cache_min_ttl": 60}, ["192.0.2.1"], {"ttl": 0}, [0]),
            ({"cache_min_ttl": 60}, [], {"authority": [soa(minimum=0)]}, [300]),
            ({"cache_fail_ttl": 0}, [], {"rcode": 2}, []),
            ({"cache_fail_ttl": 0}, [ALIAS_RECORD], {}, [300]),
            ({"cache_size": 0}, ["192.0.2.1"], {}, [300]),
        ]
        for settings, answers, what, ttls in cases:
            self.cache = Cache(dotproxy.Config()._replace(**settings))
            with self.subTest(settings=settings):
                self.assertEqual(self.put(*answers, **what), ttls)
                self.assertEqual((len(self.cache), self.cache.size), (0, 0))

    def test_what_takes_the_place_of_what(self) -> None:
        data: tuple[list[Any], int] = ["192.0.2.1"], 0
        failure: tuple[list[Any], int] = [], 2
        bare: tuple[list[Any], int] = [ALIAS_RECORD], 0
        cases: list[tuple[str, Any, Any, bool, list[int] | None]] = [
            ("data, failure", data, failure, False, [295]),
            ("data, truncated", data, ([], 0), True, [295]),
            ("data, other RCODE", data, ([], 9), False, [295]),
            ("data, failure with TC", data, failure, True, [295]),
            ("data, NOERROR that may not be stored", data, ([], 0), False, None),
            ("data, NXDOMAIN that may not be stored", data, ([], 3), False, None),
            ("data, bare alias", data, bare, False, [300]),
            ("failure, data", failure, data, False, [300]),
            ("bare alias, failure", bare, failure, False, []),
        ]
        for name, first, then, tc, found in cases:
            with self.subTest(name):
                self.cache = make_cache(cache_fail_ttl=9, cache_stale=0)
                self.put(*first[0], rcode=first[1])
                self.put(*then[0], rcode=then[1], tc=tc, now=1005.0)
                self.assertEqual(self.get(5.0), found)

    def test_expired_data_is_kept_as_long_as_told_and_failures_are_not(self) -> None:
        self.cache = make_cache(cache_stale=100.0)
        cases: list[tuple[list[Any], int, float]] = [
            (["192.0.2.1"], 0, 1109.9),
            ([], 2, 1000.9),
            ([ALIAS_RECORD], 0, 1000.9),
        ]
        for answers, rcode, last in cases:
            self.cache.flush()
            self.put(*answers, rcode=rcode, ttl=10)
            with self.subTest(answers=answers):
                self.assertIsNotNone(self.cache.get(KEY, last))
                self.assertIsNone(self.cache.get(KEY, last + 0.1))
                self.assertEqual(self.cache.size, 0)

    def test_batch_comes_back_in_order_stored_or_not(self) -> None:
        found = [
            read_response(response(ASKED, f"192.0.2.{ttl}", ttl=ttl))
            for ttl in (1, 0, 3, 4)
        ]
        keys = b"a" * 9, b"b" * 9, b"", b"d" * 9

        served = self.cache.put_all(list(zip(keys, found)), 1000.0)

        self.assertEqual(served, found)
        stored = [not self.cache.lacks([key]) for key in keys]
        self.assertEqual(stored, [True, False, False, True])

    def test_what_explains_is_kept_and_padding_is_not(self) -> None:
        asked = dotproxy.parse_query(query("wWw.example.com", do=True))
        options = option(EDE, b"\0\3stale") + option(PADDING, bytes(400))
        whole = response(query(do=True), "192.0.2.1", options=options)
        late = dotproxy.failure_response(UpstreamError("timeout", "no answer"))
        for found, addresses, errors in (
            (read_response(whole), ["192.0.2.1"], [3]),
            (late, [], [22]),
        ):
            self.cache.put(asked.cache_key, found, 1000.0)
            entry = self.cache.get(asked.cache_key, 1000.5)
            assert entry is not None
            answer = parse(self.cache.answer(entry, asked, 1000.5))
            self.assertEqual(answer.addresses, addresses)
            self.assertEqual(answer.qname, "wWw.example.com")
            self.assertEqual(extended_errors(answer), errors)
            self.assertLess(self.cache.size, 900)
            self.cache.flush()


class ReadyTest(DotproxyTestCase):
    """Answers kept ready for who sends the same datagram again."""

    def setUp(self) -> None:
        self.cache = make_cache()

    def learn(self, *answers: bytes | str, ttl: int = 10, now: float = 0.0) -> None:
        found = read_response(response(ASKED, *(answers or ["192.0.2.1"]), ttl=ttl))
        self.cache.put(KEY, found, now)

    def keep(self, message: bytes = ASKED, now: float = 0.0) -> dotproxy.Ready | None:
        """Ask the slow way, which keeps the answer ready; return it."""
        asked = dotproxy.parse_query(message)
        entry = self.cache.get(KEY, now)
        assert entry is not None
        answer = self.cache.answer(entry, asked, now)
        self.cache.keep_ready(asked, message, answer, entry, now)
        return self.cache.hot[UDP].get(message[2:])

    def read(self, message: bytes = ASKED, now: float = 0.0) -> Message | None:
        """Return what is ready at this time, as a server does."""
        ready = self.cache.hot[UDP].get(message[2:])
        if ready is None or not (now < ready.until or self.cache.renew(ready, now)):
            return None
        return parse(message[:2] + ready.answer)

    def fill(self, first: int, last: int) -> None:
        for number in range(first, last):
            self.cache.put(b"%09d" % number, SOME_RESPONSE, 0.0)

    def test_ttls_count_down_as_the_slow_way_counts(self) -> None:
        glue = [address(b"\2ns\xc0\x10", "192.0.2.53", 60)]
        asked = query("wWw.example.com", do=False, size=512)
        whole = response(ASKED, ALIAS_RECORD, "192.0.2.1", ttl=100, additional=glue)
        self.cache.put(KEY, read_response(whole), 0.25)
        received = dotproxy.parse_query(asked)
        self.keep(asked, 0.5)

        for eighth in (*range(4, 100), *range(200, 400, 3)):
            now = eighth / 8
            entry = self.cache.get(KEY, now)
            assert entry is not None
            with self.subTest(now=now):
                slow = self.cache.answer(entry, received, now)
                self.assertEqual(self.read(asked, now), parse(b"\x12\x34" + slow[2:]))

    def test_cut_answer_counts_down_too(self) -> None:
        self.learn(*[record(b"\xc0\x0c", "TXT", bytes(100), 10)] * 500)
        self.keep()

        answer = self.read(now=3.0)

        assert answer is not None
        self.assertEqual([each.ttl for each in answer.answers], [7] * 4)
        self.assertTrue(answer.flags & TC)

    def test_ready_answer_ends_with_its_entry(self) -> None:
        for name, end, now, left in (
            ("expired", lambda: None, 10.0, 1),
            ("due for a refresh", lambda: None, 9.0, 1),
            ("replaced", lambda: self.cache.put(KEY, SOME_RESPONSE, 1.0), 1.0, 0),
            ("flushed", lambda: self.cache.flush(), 1.0, 0),
            ("evicted", lambda: self.fill(0, 200), 1.0, 0),
        ):
            self.cache = make_cache(40_000)
            self.learn()
            empty = self.cache.size
            ready = self.keep()
            assert ready is not None
            self.assertIsNotNone(self.read())
            self.assertGreater(self.cache.size, empty + len(ready.answer))
            with self.subTest(name):
                end()
                self.assertIsNone(self.read(now=now))
                self.assertEqual(len(self.cache.hot[UDP]), left)

    def test_failure_is_given_no_longer_than_it_is_kept(self) -> None:
        for life in (0.5, 1.5):
            self.cache = make_cache(cache_fail_ttl=life)
            self.cache.put(KEY, read_response(response(ASKED, rcode=2)), 0.0)
            self.keep()
            with self.subTest(life=life):
                self.assertIsNotNone(self.read(now=life - 0.25))
                self.assertIsNone(self.read(now=life))

    def test_use_of_a_ready_answer_is_use_of_its_entry(self) -> None:
        self.cache = make_cache(20_000)
        self.learn(ttl=10_000)
        self.keep()
        for number in range(500):
            self.fill(number, number + 1)
            self.assertIsNotNone(self.read(now=float(number)))
        self.fill(500, 600)
        self.assertIsNone(self.read(now=501.0))

    def test_older_time_never_takes_the_place_of_a_newer_one(self) -> None:
        self.learn()
        ready = self.keep()
        assert ready is not None

        for now, until in ((5.5, 6.0), (3.5, 6.0), (5.9, 6.0), (6.0, 7.0)):
            self.assertTrue(self.cache.renew(ready, now))
            self.assertEqual(ready.until, until)
            answer = parse(ASKED[:2] + ready.answer)
            self.assertEqual(answer.answers[0].ttl, 11 - until)

    def test_refreshed_entry_is_given_until_its_end(self) -> None:
        self.learn()
        self.keep()
        entry = self.cache.get(KEY, 9.0)
        assert entry is not None
        entry.retry_at = entry.expires

        self.keep(now=9.0)

        self.assertIsNotNone(self.read(now=9.9))
        self.assertIsNone(self.read(now=10.0))

    def test_few_and_short_datagrams_are_kept_of_a_name(self) -> None:
        self.learn()
        for letters in itertools.product("wW", "wW", "wW", "eE"):
            message = query("{}{}{}.{}xample.com".format(*letters))
            self.assertIsNotNone(self.keep(message))
            self.assertLessEqual(len(self.cache.hot[UDP]), Cache.MAX_READY)
        for size, kept in ((100, True), (4000, False)):
            long = query(do=False, options=option(PADDING, bytes(size)))
            self.assertEqual(self.keep(long) is not None, kept)
        before = self.cache.size

        self.keep(query(do=False, options=option(PADDING, bytes(100))))  # as is

        self.assertEqual(self.cache.size, before)
        entry, asked = self.cache.get(KEY, 0.0), dotproxy.parse_query(ASKED)
        assert entry is not None
        self.cache.put(KEY, read_response(response(ASKED)), 0.0)
        self.cache.keep_ready(asked, ASKED, response(ASKED), entry, 0.0)  # too late
        self.assertEqual((self.cache.size, self.cache.hot[UDP]), (0, {}))


# Fills a cache in a process of its own; prints by how much both grew. Each name is
# asked for so often: from the second time on its answer is kept ready.
MEMORY_SCRIPT = """\
import gc, os, resource, struct, sys
import dotproxy

def resident():
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def fill(cache, first, last, records, padding, times):
    option = struct.pack("!HH", 12, padding) + bytes(padding)
    opt = b"\\0" + struct.pack("!HHIH", 41, 1232, 0, len(option)) + option
    for number in range(first, last):
        answer = struct.pack("!HHHIH4s", 0xC00C, 1, 1, 300, 4, bytes(4)) * records
        name = b"\\3www\\x0chost-%07d\\7example\\3com\\0" % number
        asked = struct.pack("!6H", 0, 256, 1, 0, 0, 0) + name + b"\\0\\1\\0\\1"
        query = dotproxy.parse_query(asked)
        header = struct.pack("!6H", 0, 0x8180, 1, records, 0, 1)
        message = header + query.question + answer + opt
        found = dotproxy.parse_response(message, 12 + len(query.question))
        now = 1000.0 + number / 1000
        cache.put(query.cache_key, found, now)
        for _ in range(times):
            entry = cache.get(query.cache_key, now)
            sent = cache.answer(entry, query, now)
            cache.keep_ready(query, asked, sent, entry, now)
            ready = cache.hot["udp", "1"].get(asked[2:])
            if ready:
                cache.renew(ready, now)

bound, names, *what = map(int, sys.argv[1:])
cache = dotproxy.Cache(dotproxy.Config(cache_size=bound))
fill(cache, 0, names // 10, *what)  # takes what was free in the process
gc.collect()
size, before = cache.size, resident()
fill(cache, names // 10, names, *what)
print(cache.size - size, resident() - before)
"""


class CacheBoundTest(DotproxyTestCase):
    def put(self, cache: Cache, name: str, *answers: bytes, now: float = 0.0) -> None:
        message = response(query(name), *(answers or ["192.0.2.1"]), ttl=10)
        cache.put(cache_key(query(name)), read_response(message), now)

    def names(self, cache: Cache, *names: str) -> list[str]:
        """List those that are in the cache, which uses them."""
        return [name for name in names if cache.get(cache_key(query(name)), 100.0)]

    def bounded(self, count: int) -> Cache:
        """Return a cache that has room for so many names, and them."""
        large = make_cache()
        for number in range(count):
            self.put(large, f"{number}.test")
        cache = make_cache(large.size)
        for number in range(count):
            self.put(cache, f"{number}.test")
        return cache

    def test_oldest_goes_first_live_or_stale_but_for_those_used_since(self) -> None:
        cache = self.bounded(3)
        self.names(cache, "0.test")

        self.put(cache, "3.test", now=100.0)

        found = self.names(cache, "0.test", "1.test", "2.test", "3.test")
        self.assertEqual(found, ["0.test", "2.test", "3.test"])
        self.put(cache, "4.test", now=100.0)  # as all others were used
        self.assertEqual(self.names(cache, "4.test"), ["4.test"])

    def test_data_that_a_failure_did_not_replace_counts_as_used(self) -> None:
        cache, asked = self.bounded(2), query("0.test")
        cache.put(cache_key(asked), read_response(response(asked, rcode=2)), 0.0)

        self.put(cache, "2.test")

        self.assertEqual(self.names(cache, "0.test", "1.test"), ["0.test"])

    def test_room_is_made_for_several_at_a_time(self) -> None:
        cache, stored = make_cache(1 << 22), 0
        while len(cache) == stored:
            cache.put(b"%09d" % stored, SOME_RESPONSE, 0.0)
            stored += 1

        self.assertIn(stored - len(cache), range(3, 10))
        self.assertTrue(cache.lacks([b"%09d" % 0]))

    def test_size_never_exceeds_the_bound(self) -> None:
        numbers = random.Random(1)
        cache = make_cache(20_000)
        for now in range(1000):
            text = record("x.test", "TXT", bytes(numbers.randrange(1000)), 1)
            self.put(cache, f"{numbers.randrange(50)}.test", text, now=now / 10)
            self.assertLessEqual(cache.size, 20_000)
        self.assertGreater(cache.size, 15_000)
        self.put(cache, "a.test", record("a.test", "TXT", bytes(30_000)))
        self.assertEqual((len(cache), cache.size), (0, 0))

    def test_renewing_one_name_for_ever_takes_no_memory(self) -> None:
        cache = make_cache()
        self.put(cache, "a.test")
        size = cache.size
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)

        for now in range(2000):
            self.put(cache, "a.test", now=float(now))

        self.assertLess(tracemalloc.get_traced_memory()[0], 100_000)
        self.assertEqual(cache.size, size)

    def measure(self, *what: int) -> float:
        """Return the cache's size as a share of what its process grew by.

        It is not compiled there: that would leave memory free for the cache.
        """
        environment = dict(os.environ)
        for name in ("DEVMODE", "MALLOC", "TRACEMALLOC"):
            environment.pop(f"PYTHON{name}", None)
        environment["PYTHONPATH"] = os.path.dirname(compiled_program())
        done = subprocess.run(
            [sys.executable, "-c", MEMORY_SCRIPT, *map(str, what)],
            cwd=_directory.name,
            env=environment,
            stdout=subprocess.PIPE,
            check=True,
            timeout=60,
        )
        size, growth = map(int, done.stdout.split())
        return size / growth

    def test_size_is_honest(self) -> None:
        cases = {
            "100,000 names asked for twice": (1 << 30, 100_000, 1, 380, 1),
            "large answers": (1 << 30, 5_000, 30, 0, 0),
            "names that come and go, asked for twice": (1 << 23, 30_000, 1, 0, 1),
        }
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            shares = pool.map(lambda what: self.measure(*what), cases.values())
        for name, share in zip(cases, shares):
            with self.subTest(name):
                self.assertAlmostEqual(share, 1.0, delta=0.3)


# ---- Local answers -------------------------------------------------------------------
# What was asked is judged from the answer as a client gets it.

SOA_OF_RFC6303 = struct.pack("!5I", 1, 3600, 1200, 604800, 10800)


def local_answer(
    name: str | bytes,
    rrtype: str | int = "A",
    *,
    stream: bool = False,
    exempt: Sequence[str] = (),
    rrclass: int = 1,
    do: bool = False,
) -> Message | None:
    """Return the answer that is given here, or None where the upstream is asked."""
    local = dotproxy.LocalAnswers([dotproxy.encode_domain(text) for text in exempt])
    message = query(name, rrtype, rrclass=rrclass, do=do)
    asked = dotproxy.parse_query(message, TCP if stream else UDP)
    found = local.respond(asked)
    return parse(dotproxy.build_answer(asked, found)) if found else None


def reverse(address: str) -> str:
    """Return the name under which the name of an address is."""
    return ipaddress.ip_address(address).reverse_pointer


class LocalAnswersTest(DotproxyTestCase):
    def answer(
        self, name: str | bytes, rrtype: str | int = "A", stream: bool = False
    ) -> Message:
        answer = local_answer(name, rrtype, stream=stream)
        assert answer is not None, f"{name!r} {rrtype} leaves"
        self.assertEqual(answer.flags & (QR | AA | RA | AD), QR | AA | RA)
        return answer

    def assert_negative(self, answer: Message, rcode: int, zone: str) -> None:
        """Expect an empty answer with the SOA record of the zone."""
        self.assertEqual((answer.rcode, answer.answers), (rcode, []))
        (entry,) = answer.authority
        found = entry.name.lower(), entry.type, entry.rrclass, entry.ttl
        self.assertEqual(found, (zone, RRTYPES["SOA"], 1, 10800))
        start = len(answer.raw) - 11 - len(entry.rdata)  # before the OPT record
        mname, behind = decode_name(answer.raw, start)
        rname, behind = decode_name(answer.raw, behind)
        self.assertEqual((mname.lower(), rname), (zone, "nobody.invalid"))
        self.assertEqual(answer.raw[behind:-11], SOA_OF_RFC6303)

    def test_localhost_and_all_below_are_the_loopback_addresses(self) -> None:
        for name in ("localhost", "LocalHost", "a.localhost", "a.b.localhost"):
            for rrtype, text in (("A", "127.0.0.1"), ("AAAA", "::1")):
                with self.subTest(name=name, rrtype=rrtype):
                    answer = self.answer(name, rrtype)
                    self.assertEqual(answer.addresses, [text])
                    (entry,) = answer.answers
                    self.assertEqual((entry.name, entry.ttl), (name, 10800))
            for rrtype in ("MX", "TXT", "HTTPS", "PTR"):
                with self.subTest(name=name, rrtype=rrtype):
                    self.assert_negative(self.answer(name, rrtype), 0, "localhost")
        every = self.answer("a.localhost", "ANY", stream=True)
        self.assertEqual(every.addresses, ["127.0.0.1", "::1"])
        for text in every.addresses:
            (entry,) = self.answer(reverse(text), "PTR").answers
            self.assertEqual((entry.type, entry.rdata), (12, encode_name("localhost")))

    def test_name_without_what_was_asked_for(self) -> None:
        for rcode, name, rrtype, zone in (
            *((0, zone, "A", zone) for zone in ("invalid", "local", "onion")),
            *((0, zone, "A", zone) for zone in ("home.arpa", "service.arpa")),
            (3, "a.invalid", "A", "invalid"),
            (3, "A.b.LOCAL", "A", "local"),
            (3, "a.home.arpa", "DS", "home.arpa"),
            (0, "_dns.resolver.arpa", "SVCB", "resolver.arpa"),
            (0, "a.b.resolver.arpa", "A", "resolver.arpa"),
            (0, "a.resolver.arpa", "ANY", "resolver.arpa"),
            # A client may conclude from NXDOMAIN that nothing is below, RFC 8020.
            (0, "0.127.in-addr.arpa", "PTR", "0.127.in-addr.arpa"),
            (0, "0.127.in-addr.arpa", "DS", "127.in-addr.arpa"),
            (0, "0.0.127.in-addr.arpa", "PTR", "0.0.127.in-addr.arpa"),
            (0, "1.0.0.127.in-addr.arpa", "DS", "0.0.127.in-addr.arpa"),
            (0, reverse("255.255.255.255"), "PTR", reverse("255.255.255.255")),
            (0, reverse("::"), "PTR", reverse("::")),
            *(
                (3, reverse(text), "PTR", f"{zone}.arpa")
                for text, zone in (
                    *(("127.0.0.2", "0.0.127.in-addr"), ("127.1.0.1", "127.in-addr")),
                    *(("0.1.2.3", "0.in-addr"), ("10.1.2.3", "10.in-addr")),
                    ("100.64.0.1", "64.100.in-addr"),
                    ("100.127.255.255", "127.100.in-addr"),
                    ("169.254.1.1", "254.169.in-addr"),
                    ("172.16.0.1", "16.172.in-addr"),
                    ("172.31.0.1", "31.172.in-addr"),
                    ("192.0.2.1", "2.0.192.in-addr"),
                    ("192.168.1.1", "168.192.in-addr"),
                    ("198.51.100.1", "100.51.198.in-addr"),
                    ("203.0.113.1", "113.0.203.in-addr"),
                    *(("fd12::1", "d.f.ip6"), ("fe80::1", "8.e.f.ip6")),
                    *(("febf::1", "b.e.f.ip6"), ("2001:db8::1", "8.b.d.0.1.0.0.2.ip6")),
                )
            ),
        ):
            with self.subTest(name=name, rrtype=rrtype):
                answer = self.answer(name, rrtype, stream=True)
                self.assert_negative(answer, rcode, zone)

    def test_all_zones_of_the_registry_are_there_with_soa_and_ns(self) -> None:
        # RFC 6303 sections 4.1 to 4.6, RFC 7793, the special names, and those between
        # 127.in-addr.arpa and localhost's.
        zones = 18 + 7 + 2 + 1 + 4 + 1 + 64 + 7 + 3
        self.assertEqual(len(dotproxy.LOCAL_ZONES), zones)
        for zone, rrtype in itertools.product(dotproxy.LOCAL_ZONES, ("SOA", "NS")):
            with self.subTest(zone=zone, rrtype=rrtype):
                (entry,) = self.answer(zone, rrtype).answers
                self.assertEqual(entry.type, RRTYPES[rrtype])

    def test_ordinary_name_leaves(self) -> None:
        for name in (
            *("example.com", "notlocalhost", "xlocal", "foo.local.example.com", "."),
            *("latest", "nonion", "locally", "internal", "example", "a", "ab", "abc"),
            *("arpa", "in-addr.arpa", "172.in-addr.arpa", "15.172.in-addr.arpa"),
            *("32.172.in-addr.arpa", "63.100.in-addr.arpa", "128.100.in-addr.arpa"),
            *("110.in-addr.arpa", "169.192.in-addr.arpa", "ipv4only.arpa"),
            *("7.e.f.ip6.arpa", "e.f.ip6.arpa", "nothome.arpa", "1.ip6.arpa"),
            *(reverse("::2"), reverse("192.0.0.1"), reverse("2606:4700::1111")),
            *(b"\x09foo\5local\0", b"\x06x.test\0"),  # that only look like zones
        ):
            with self.subTest(name):
                self.assertIsNone(local_answer(name, "A"))
        # The parent is to answer it.
        for zone in ("home.arpa", "10.in-addr.arpa", "onion", reverse("::1")):
            with self.subTest(zone):
                self.assertIsNone(local_answer(zone, "DS"))

    def test_special_name_in_another_class_is_refused(self) -> None:
        for rrclass in (3, 255):
            answer = local_answer("a.onion", "TXT", rrclass=rrclass)
            assert answer is not None
            self.assertEqual((answer.rcode, answer.authority), (Rcode.REFUSED, []))
        self.assertIsNone(local_answer("version.bind", "TXT", rrclass=3))

    def test_exempt_domain_and_all_below_leave(self) -> None:
        for exempt, leaves, stays in (
            ("local", ["local", "a.local"], ["a.onion"]),
            ("Corp.Local.", ["corp.local", "a.corp.local"], ["local", "xcorp.local"]),
            ("10.in-addr.arpa", ["1.10.in-addr.arpa"], ["1.127.in-addr.arpa"]),
            ("127.in-addr.arpa", ["1.0.0.127.in-addr.arpa"], ["1.10.in-addr.arpa"]),
            ("172.in-addr.arpa", ["1.16.172.in-addr.arpa"], ["1.10.in-addr.arpa"]),
            ("arpa", ["a.home.arpa", "10.in-addr.arpa"], ["localhost"]),
            (".", ["localhost", "a.onion", "10.in-addr.arpa"], []),
        ):
            for name in leaves + stays:
                with self.subTest(exempt=exempt, name=name):
                    answer = local_answer(name, exempt=[exempt])
                    self.assertEqual(answer is None, name in leaves)

    def test_any_over_udp_is_one_hinfo_record_and_leaves_over_tcp(self) -> None:
        for name in ("example.com", "localhost"):
            answer = local_answer(name, "ANY")
            assert answer is not None
            wanted = Record(name, RRTYPES["HINFO"], 1, 3600, b"\x07RFC8482\0")
            self.assertEqual((answer.rcode, answer.answers), (0, [wanted]))
            self.assertEqual(answer.flags & AA, 0)
        self.assertIsNone(local_answer("example.com", "ANY", stream=True))
        for rrtype, rrclass in ((0x01FF, 1), (254, 1), (255, 3)):
            answer = local_answer("example.com", rrtype, rrclass=rrclass)
            self.assertIsNone(answer)


def svcb(priority: int, target: str, *parameters: tuple[int, bytes]) -> bytes:
    """Build the data of an SVCB or HTTPS record (RFC 9460 section 2.2)."""
    head = priority.to_bytes(2, "big") + encode_name(target)
    return head + b"".join(option(key, value) for key, value in parameters)


def packed(*addresses: str) -> bytes:
    return b"".join(ipaddress.ip_address(address).packed for address in addresses)


class RebindingGuardTest(DotproxyTestCase):
    PRIVATE = (
        *("0.0.0.0", "0.255.1.2", "10.0.0.1", "10.255.255.255", "127.0.0.1"),
        *("100.64.0.1", "100.127.255.255", "169.254.169.254", "172.16.0.1"),
        *("172.31.255.255", "192.168.0.1", "192.168.255.255", "::", "::1"),
        *("fc00::1", "fdff:ffff::1", "fe80::1", "febf::1", "fec0::1", "feff::1"),
        *("::ffff:10.0.0.1", "::ffff:127.0.0.1", "64:ff9b::192.168.0.1", "::10.1.1.1"),
    )
    PUBLIC = (
        *("1.1.1.1", "9.255.255.255", "11.0.0.1", "100.63.255.255", "100.128.0.0"),
        *("126.0.0.1", "128.0.0.1", "169.253.0.1", "169.255.0.1", "172.15.255.255"),
        *("172.32.0.0", "192.167.1.1", "192.169.1.1", "192.0.2.1", "2001:db8::1"),
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

    def test_private_address_is_blocked_and_a_public_one_passes(self) -> None:
        for text in self.PRIVATE + self.PUBLIC:
            with self.subTest(text):
                self.assertEqual(self.blocked(text), text in self.PRIVATE)

    def test_one_private_address_or_hint_blocks_the_whole_answer(self) -> None:
        alias = record("www.example.com", "CNAME", encode_name("a.example.net"))
        private = address("a.example.net", "10.0.0.1")
        for answers in (["192.0.2.1", "10.0.0.1"], ["::1", "::2"], [alias, private]):
            with self.subTest(answers=answers):
                self.assertTrue(self.blocked(*answers))
        v4, v6 = packed("192.0.2.1", "192.168.1.1"), packed("2001:db8::1", "fd00::1")
        other = (1, b"\0" + option(4, packed("10.0.0.1")))
        for blocked, parameters in (
            (True, [(4, v4)]),
            (True, [(1, b"\2h2"), (4, v4[:4]), (6, v6)]),
            (False, [other, (4, v4[:4]), (6, v6[:16])]),
        ):
            data = svcb(1, "a.example.net", *parameters)
            for rrtype in ("HTTPS", "SVCB"):
                with self.subTest(rrtype=rrtype, parameters=parameters):
                    answer = record("www.example.com", rrtype, data)
                    self.assertEqual(self.blocked(answer), blocked)

    def test_malformed_hints_and_addresses_are_passed_over(self) -> None:
        whole = svcb(1, "a.example.net", (4, packed("192.0.2.1", "192.0.2.2")))
        for size in range(len(whole)):
            answer = record("www.example.com", "HTTPS", whole[:size])
            self.assertFalse(self.blocked(answer))
        for size in (0, 3, 5, 15):
            answer = record("www.example.com", "A", b"\x0a" + bytes(size))
            self.assertFalse(self.blocked(answer) and size != 3)
        # Nor are other types and sections.
        for data in (packed("10.0.0.1"), svcb(1, ".", (4, packed("10.0.0.1")))):
            self.assertFalse(self.blocked(record("www.example.com", "TXT", data)))
        glue = address("ns.example.com", "10.0.0.1")
        self.assertFalse(self.blocked("192.0.2.1", additional=[glue]))
        self.assertFalse(self.blocked())

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
# FakeLink      opens at once, and keeps what is sent until the test answers it
# ProxyTestCase a proxy with such links, with a clock and a timer that the test moves


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

    def close(self) -> None:
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
    def test_hit_has_the_right_ttl_at_every_time_and_needs_no_upstream(self) -> None:
        self.learn(ttl=10)

        for eighth in range(80):
            for stream in (False, True):
                (answer,) = self.ask(stream=stream)
                self.assertEqual(answer.answers[0].ttl, 10 - eighth // 8)
            self.clock.advance(1 / 8)
        self.assertEqual(self.pending(), 0)
        self.assertEqual(self.ask(), [])

    def test_refusal_does_not_depend_on_what_is_known(self) -> None:
        self.learn()

        for _ in range(2):
            (answer,) = self.ask(query(do=False, edns_version=1))
            self.assertEqual((answer.rcode, answer.answers), (Rcode.BADVERS, []))

    def test_health_check_asks_past_the_cache(self) -> None:
        self.learn()
        message = query(do=False, options=option(65432))

        for _ in range(2):
            client = self.ask(message)
            self.assertEqual(client, [])
            self.answer("192.0.2.2")
            self.assertEqual(client[0].addresses, ["192.0.2.2"])

        self.assertEqual(self.ask()[0].addresses, ["192.0.2.1"])

    def test_answer_far_too_large_for_the_client_is_read_in_part(self) -> None:
        self.learn(*[record(b"\xc0\x0c", "TXT", bytes(250))] * 200)
        read = dotproxy.parse_response  # all of it may take 10 ms
        with mock.patch.object(dotproxy, "parse_response", side_effect=read) as reader:
            answers = self.ask() + self.ask(query(do=False))
            self.timer.advance(11.0)
            client = self.ask(query(do=False))
            self.answer(rcode=2)

        self.assertEqual([len(each.answers) for each in answers + client], [1, 4, 4])
        counts = [HEADER.unpack_from(each.args[0])[3] for each in reader.mock_calls]
        self.assertLess(max(counts), 120)

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

    def test_cold_name_is_asked_for_once_whatever_options_clients_send(self) -> None:
        clients = [
            self.ask(query(do=False, id=code, options=option(code, bytes(8))))
            for code in range(200)
        ]
        self.assertEqual(self.pending(), 1)

        self.answer("192.0.2.1")

        self.assertEqual([answer.id for (answer,) in clients], list(range(200)))

    def test_client_whose_lookup_came_too_early_does_not_ask_again(self) -> None:
        late = self.proxy.lookup(ASKED, self.clock(), [], UDP)
        assert isinstance(late, dotproxy.Query)
        self.learn()
        answers: list[bytes] = []

        # A worker was busy meanwhile.
        self.proxy.resolve([(late, lambda message, _: answers.append(message))])

        self.assertEqual(self.pending(), 0)
        self.assertEqual([parse(each).addresses for each in answers], [["192.0.2.1"]])

    def test_client_that_comes_in_between_does_not_ask_again(self) -> None:
        late: list[list[Message]] = []
        put_all, flush = Cache.put_all, Cache.flush

        def slow_put_all(*arguments: Any) -> list[dotproxy.Response]:
            late.append(self.ask())
            return put_all(*arguments)

        def slow_flush(cache: Cache) -> int:
            for _ in range(3):  # at last from the ready ones
                self.ask()
            return flush(cache)

        with mock.patch.multiple(Cache, put_all=slow_put_all, flush=slow_flush):
            self.learn()
            self.assertEqual(self.pending(), 0)
            self.assertEqual([len(answers) for answers in late], [1])
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
        for answer, ttl in zip(blocked, (60, 60, 60, 50, 50)):
            self.assertEqual((answer.rcode, answer.answers), (0, []))
            self.assertEqual(extended_errors(answer), [17])
            self.assertEqual([(e.type, e.ttl) for e in answer.authority], [(6, ttl)])
        self.assertEqual(len(blocked), 5)
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

    def test_upstream_that_is_known_to_be_down_keeps_nobody_waiting(self) -> None:
        self.leave()
        self.timer.advance(2.0)

        self.expect_stale(self.ask())

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
    def ask_at(self, *ages: float, ttl: int = 0) -> list[Message]:
        """Ask at these ages of an answer, new with a TTL; let the timer do its work."""
        if ttl:
            self.build()
            self.learn(ttl=ttl)
        answers: list[Message] = []
        for age in ages:
            self.timer.advance(1000.0 + age - self.clock())
            answers = self.ask()
            self.timer.advance(0.1)
        return answers

    def test_popular_entry_is_refreshed_once_near_its_end(self) -> None:
        cases: dict[str, tuple[int, tuple[float, ...], int]] = {
            "popular": (100, (50, 90), 1),
            "again and again": (100, (50, 90, 91, 92, 93), 1),
            "before the last tenth": (100, (10, 50, 89.8), 0),
            "twice in the last tenth": (100, (90.25, 90.5), 1),
            "unpopular": (100, (95,), 0),
            "ready before a last tenth that begins at 4.5 s": (5, (4.25, 4.5), 1),
        }
        for name, (ttl, ages, sent) in cases.items():
            with self.subTest(name):
                (answer,) = self.ask_at(*ages, ttl=ttl)

                self.assertEqual(answer.answers[0].ttl, ttl - int(ages[-1]))
                self.assertEqual(self.pending(), sent)

    def test_query_without_rd_refreshes_nothing(self) -> None:
        self.ask_at(50, ttl=100)
        self.timer.advance(45.0)
        self.ask(query(rd=False))
        self.timer.advance(0.1)

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

    def test_answer_at_once_is_told_with_its_source(self) -> None:
        self.learn()

        messages = ASKED, ASKED, query(opcode=4), query(rrtype="AXFR")
        sizes = [len(self.ask(message)[0].raw) for message in messages]
        self.timer.advance(11.0)
        self.ask()
        self.answer(rcode=2)
        self.ask()

        sources = "cache", "cache", "local", "local", "stale"
        wanted = zip(sources, (0, 0, 4, 5, 0), [len(ASKED)] * 5, (*sizes, sizes[0]))
        self.assertEqual([(each[0], *each[3:]) for each in self.tally], list(wanted))
        self.assertEqual(self.tally[0][2], b"\0\1")

    def test_answer_that_was_waited_for_is_told_with_its_source(self) -> None:
        for _ in range(2):
            self.ask()
        self.answer("192.0.2.1", ttl=10)
        self.ask(query("other.example"))
        self.answer(rcode=5)
        self.timer.advance(11.0)
        self.ask()
        self.answer(rcode=2)
        self.ask(query("other.example"))
        self.timer.advance(5.0)

        for number, *labels in (
            *((2, "NOERROR", "upstream"), (1, "REFUSED", "upstream")),
            *((1, "NOERROR", "stale"), (1, "SERVFAIL", "local")),
        ):
            self.assertEqual(self.count("dns_responses_total", *labels), number)
        self.assertEqual(self.tally, [])

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

    def test_trouble_is_none_while_the_cache_has_an_answer_to_serve(self) -> None:
        self.build(cache_stale=100.0)
        self.ask()
        self.answer(rcode=2)  # a failure is nothing to serve
        self.leave()
        self.timer.advance(5.0)
        self.assertIn("refused", self.proxy.trouble())

        self.trouble = ""
        self.timer.advance(5.0)
        self.assertEqual(self.proxy.trouble(), "")
        self.learn()
        self.leave()
        for seconds, trouble in ((5.0, False), (104.0, False), (2.0, True)):
            self.timer.advance(seconds)
            self.assertEqual(bool(self.proxy.trouble()), trouble)


# ---- Any query, any age: a slow, obvious model ---------------------------------------
# Generator   makes random messages
# Stored      a response, and what follows from it
# Reference   what the cache has to do, from the parsed messages and the written rules
# PropertyTest asks both, and compares what comes out field by field

FAILURES = (1, 2, 4, 5)
NAMES = ("www.example.com", "a.example", "long-label.sub.example.net", "b.a.example")
CUT_SHORT = b"\0\x17the upstream cuts its answers short, in TLS"


class Generator:
    """Makes random messages."""

    TTLS = (1, 2, 9, 10, 30, 60, 300, 300, 3600, 7200, 10**6, 0x7FFFFFFF)

    def __init__(self, seed: int) -> None:
        self.numbers = random.Random(seed)
        self.choose = self.numbers.choice
        self.ends = 0.0  # a chance for TTLs that may not be stored

    def odds(self, chance: float) -> bool:
        return self.numbers.random() < chance

    def query(self) -> bytes:
        """Make a query that is like others but for details."""
        choose, name = self.choose, self.choose(NAMES)
        if self.odds(0.3):
            name = "".join(choose((str.upper, str.lower))(letter) for letter in name)
        some = COOKIE, KEEPALIVE, UNKNOWN_OPTION
        options = [option(code, bytes(8)) for code in some if self.odds(0.2)]
        return query(
            name,
            choose(("A", "A", "TXT")),
            rd=not self.odds(0.1),
            ad=self.odds(0.3),
            cd=self.odds(0.1),
            do=choose((None, None, False, True)),
            size=choose((0, 512, 700, 1232, 4096)),
            options=b"".join(options),
        )

    def ttl(self) -> int:
        ends = self.odds(self.ends)
        return self.choose((0, 1 << 31, (1 << 32) - 1) if ends else self.TTLS)

    def records(self, question: bytes, most: int) -> list[bytes]:
        """Make records whose owner is given in full, or by a pointer."""
        parent, found = 12 + 1 + question[0], []
        for _ in range(self.numbers.randrange(most + 1)):
            pointer = struct.pack("!H", 0xC000 | self.choose((12, parent)))
            owner = self.choose((pointer, b"\3fTp" + pointer, encode_name("N.test")))
            text = bytes(self.numbers.randrange(400))
            kinds = ("A", b"\xc0\0\2\1"), ("CNAME", b"\xc0\x0c"), ("TXT", text)
            found.append(record(owner, *self.choose(kinds), self.ttl()))
        return found

    def response(self, asked: bytes) -> bytes:
        """Make a response to a query."""
        choose, question = self.choose, parse(asked).question
        self.ends = choose((0.0, 0.0, 0.0, 0.3))
        rcode = choose((0,) * 12 + (3,) * 4 + (1, 2, 2, 2, 4, 5, 9, 16, 23))
        answers = self.records(question, 0 if rcode else choose((0, 3)))
        authority = self.records(question, choose((0, 2)))
        if self.odds(0.2 if answers else 0.8):
            authority.append(soa(ttl=self.ttl(), minimum=choose((0, 5, 60, 10**6))))
        additional = self.records(question, choose((0, 2)))
        if self.odds(0.1):
            additional.append(soa())
        if rcode in FAILURES:
            authority = additional = []  # their records, if any, mean nothing
        codes = [code for code in (3, COOKIE, PADDING, EDE) if self.odds(0.2)]
        return response(
            *(asked, *answers),
            rcode=rcode,
            authority=authority,
            additional=additional,
            edns=rcode > 15 or self.odds(0.8),
            options=b"".join(option(code, bytes(10)) for code in codes),
            aa=self.odds(0.5),
            ad=self.odds(0.5),
            ra=self.odds(0.5),
            tc=self.odds(0.03),
        )


class Stored:
    """A response, what follows from it, and how it is used."""

    def __init__(self, message: Message, now: float) -> None:
        self.message = message
        self.at = now
        self.life = 0.0  # 0: not stored, but passed on as it came
        self.hits = 0
        self.refreshed = False
        self.retry_at = 0.0  # once a refresh failed
        self.failed = message.rcode in FAILURES or message.flags & TC != 0
        denials = [each for each in message.authority if each.type == RRTYPES["SOA"]]
        self.negative_ttl: int | None = None
        if denials:
            minimum = int.from_bytes(denials[0].rdata[-4:], "big")
            self.negative_ttl = min(denials[0].ttl, minimum)
        bare = {each.type for each in message.answers} == {RRTYPES["CNAME"]}
        bare = bare and message.rcode == 0 and not denials  # an alias to nowhere
        self.useless = self.failed or bare

    @property
    def expires(self) -> float:
        return self.at + self.life


class Reference:
    """The cache as its rules are written, one after the other."""

    def __init__(self, low: int, high: int, stale: float) -> None:
        self.low, self.high, self.stale = low, high, stale
        self.entries: dict[object, Stored] = {}

    def key(self, asked: Message) -> object:
        """Return what makes a question the same."""
        secure = bool(asked.opt and asked.opt.flags & DO)
        name = asked.qname.lower()
        return name, asked.qtype, asked.qclass, secure, bool(asked.flags & CD)

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
        old = self.entries.get(key)
        if not asked.flags & RD:
            return entry
        entry.life = self.life(entry)
        if entry.life and not (entry.failed and old and not old.failed):
            self.entries[key] = entry
        elif message.rcode in (0, 3) and not entry.failed:
            self.entries.pop(key, None)
        return entry

    def life(self, entry: Stored) -> float:
        message, told = entry.message, entry.negative_ttl
        if entry.failed:
            return 0 if message.flags & TC else 1
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

    def served_ttl(self, entry: Stored, ttl: int, now: float) -> int:
        """Return the TTL of a record that came with this one."""
        told = entry.negative_ttl
        if not entry.life:
            return ttl
        if now >= entry.expires:
            return 30
        high = self.high if told is None else min(told, 3600, self.high)
        bounded = max(min(ttl, high), min(self.low, self.high))
        return max(0, bounded - int(now - entry.at))

    def cut(self, asked: Message, message: Message, room: int) -> Message:
        """Leave out what does not fit, and set TC if it is missed."""
        sections = message.answers, message.authority, message.additional
        records = list(itertools.chain(*sections))
        offset, fits = 12 + len(asked.question), 0
        for _ in records:
            _, offset = _parse_record(message.raw, offset)
            fits += offset <= room
        answers, authority, extra = map(len, sections)
        secure = bool(asked.opt and asked.opt.flags & DO)
        denied = any(each.type == RRTYPES["SOA"] for each in message.authority)
        needed = answers
        if secure or denied or not answers:
            needed += authority
        if not answers and not denied:
            needed += extra
        whole = len(records), answers + authority, needed
        missed = fits < needed
        end = fits if missed else next(number for number in whole if number <= fits)
        left = records[:end]
        return message._replace(
            flags=message.flags | TC * missed,
            answers=left[:answers],
            authority=left[answers : answers + authority],
            additional=left[answers + authority :],
        )

    def serve(self, asked: Message, stream: bool, entry: Stored, now: float) -> Message:
        """Return what a client gets from this entry."""
        raw, end = entry.message.raw, 12 + len(asked.question)
        message = parse(raw[:12] + asked.question + raw[end:])
        passed = message.opt.options if message.opt else []
        size = len(raw) - bool(message.opt) * 11 - sum(4 + len(d) for _, d in passed)
        passed = [each for each in passed if each[0] == EDE]
        if stream and message.flags & TC:  # there is nowhere else to ask
            message = parse(response(asked.raw, rcode=2, edns=False))
            passed = [(EDE, CUT_SHORT)]
        if entry.life and now >= entry.expires:
            info = b"\0\x13" if message.rcode == 3 else b"\0\3"
            passed.append((EDE, info + b"no upstream answers"))
        flags = message.flags & ~(RD | AD | CD | AA) | asked.flags & (RD | CD) | RA
        if asked.flags & AD or (asked.opt and asked.opt.flags & DO):
            flags |= message.flags & AD
        limit, opt = 65535 if stream else 512, None
        own: list[tuple[int, bytes]] = []
        if asked.opt:
            if stream and KEEPALIVE in dict(asked.opt.options):
                own = [(KEEPALIVE, b"\0\x64")]
            room = limit if stream else max(512, min(asked.opt.size, 1232))
            limit = room - 11 - sum(4 + len(data) for _, data in own)
            size += sum(4 + len(data) for _, data in passed)
            opt = Opt(1232, 0, asked.opt.flags & DO, passed + own)
        rcode = message.rcode if opt or message.rcode < 16 else 2  # it cannot be told
        flags = flags & ~RCODE_MASK | rcode & RCODE_MASK
        message = message._replace(id=asked.id, flags=flags, rcode=rcode, opt=opt)
        for section in (message.answers, message.authority, message.additional):
            ttls = [self.served_ttl(entry, each.ttl, now) for each in section]
            section[:] = [e._replace(ttl=ttl) for e, ttl in zip(section, ttls)]
        if size > limit:
            message = self.cut(asked, message, limit)
            message = message._replace(opt=opt and opt._replace(options=own))
        return message._replace(raw=b"")


class PropertyTest(ProxyTestCase):
    """Puts random responses in, asks at random times; compares with the reference."""

    AGES = (0,) * 9 + (0.125, 0.5, 0.875, 1, 2.5, 8, 9.5, 30, 31, 55, 299, 3599, 90000)

    def setUp(self) -> None:
        super().setUp()
        # Who has no clients for a day looks at his connections less often.
        self.have(mock.patch.object(dotproxy.UpstreamGroup, "ROUND", 60.0))

    def begin(self, seed: int) -> None:
        self.seed = f"seed {seed}"
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
        self.stream, now = self.generator.odds(0.2), self.clock()
        self.answers = self.ask(self.asked.raw, stream=self.stream)
        entry = self.reference.find(self.asked, now)
        if entry is None or (now >= entry.expires and not entry.retry_at):
            self.assertEqual(self.answers, [], self.seed)
            self.resolve(entry)
            return "miss"
        self.expect(entry)
        wanted = self.reference.wants_refresh(self.asked, entry, now)
        self.wait(0.125)
        self.assertEqual(self.pending(), int(wanted), self.seed)
        if wanted:
            self.respond()
            return "refresh"
        return "hit" if now < entry.expires else "stale"

    def expect(self, entry: Stored) -> None:
        wanted = self.reference.serve(self.asked, self.stream, entry, self.clock())
        found = [answer._replace(raw=b"") for answer in self.answers]
        self.assertEqual(found, [wanted], self.seed)

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

    def test_whatever_comes_out_is_what_the_rules_say(self) -> None:
        seen: collections.Counter[str] = collections.Counter()
        for seed in range(8):
            self.begin(seed)
            seen.update(self.step() for _ in range(100))

        self.assertGreater(min(seen.values()), 8, seen)
        self.assertEqual(len(seen), 4)


# ---- Outage, with a real upstream ----------------------------------------------------


class OutageTest(ScenarioTestCase):
    """An upstream that goes away and comes back, and a name that has expired."""

    def setUp(self) -> None:
        super().setUp()
        self.have_time_to_skip()
        self.have(mock.patch.multiple(Cache, STALE_AFTER=0.4, STALE_RETRY=0.3))

    def test_known_name_survives_its_upstream(self) -> None:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            list(pool.map(self.survive, ("tls", "plain"), (False, True)))

    def survive(self, mode: str, gone: bool) -> None:
        name = "www.example.com"
        with self.before(mode=mode) as (upstream, client):
            self.assert_right([client.ask(name)])
            self.ahead += 301.0
            upstream.script = silence
            if gone:
                upstream.stop()

            for limit in (1.5, 1.0):  # 2.0 with the usual STALE_AFTER
                known = client.ask(name)
                self.assert_right([known])
                self.assertLess(known.elapsed, limit)

            upstream.script = "192.0.2.2"
            if gone:
                upstream.start()
            wait_until(lambda: client.ask(name).message.addresses == ["192.0.2.2"])


# ---- Admission -----------------------------------------------------------------------

EVERYWHERE = tuple(dotproxy.parse_network(text) for text in ("0.0.0.0/0", "::/0"))
STRANGER = "198.51.100.1"
ALLOW, DROP, TRUNCATE = dotproxy.ALLOW, dotproxy.DROP, dotproxy.TRUNCATE


def admission(
    rate: float = 50.0,
    allow: Sequence[dotproxy.Network] = dotproxy.LOCAL_NETWORKS,
    limit_all: bool = False,
) -> dotproxy.Admission:
    """Make an Admission of these settings."""
    return dotproxy.Admission(
        dotproxy.Config(allow=tuple(allow), rate_limit=rate, rate_limit_all=limit_all)
    )


class AdmissionTest(DotproxyTestCase):
    def test_local_clients_alone_are_admitted_by_default_and_never_limited(
        self,
    ) -> None:
        found = admission(rate=1)

        for host in (
            *("127.0.0.1", "127.255.255.255", "10.9.8.7", "172.16.0.1"),
            *("172.31.255.255", "192.168.1.1", "169.254.1.1", "100.64.0.1"),
            *("100.127.255.255", "::1", "fe80::1", "fe80::1%eth0", "fd00::1"),
            *("::ffff:10.0.0.1", "::ffff:127.0.0.1"),
        ):
            with self.subTest(host):
                self.assertTrue(found.admits(host))
                self.assertEqual({found.verdict(host, 0.0) for _ in range(9)}, {ALLOW})
                self.assertIn(host, found.free)
        found.free.clear()
        for host in (
            *(STRANGER, "8.8.8.8", "172.15.255.255", "172.32.0.0", "192.169.0.0"),
            *("100.63.255.255", "100.128.0.0", "0.0.0.0", "224.0.0.251"),
            *("::", "::2", "2001:db8::1", "fec0::1", "::ffff:198.51.100.1"),
        ):
            with self.subTest(host):
                self.assertFalse(found.admits(host))
                self.assertEqual(found.verdict(host, 0.0).reason, "acl")
        self.assertEqual(found.free, set())

    def test_allow_replaces_the_default_and_is_open_with_much_of_the_internet(
        self,
    ) -> None:
        found = admission(allow=[dotproxy.parse_network("198.51.100.0/24")])

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
        found = admission(5, EVERYWHERE)

        verdicts = [found.verdict(STRANGER, 7.0) for _ in range(14)]

        self.assertEqual(verdicts, [ALLOW] * 10 + [TRUNCATE, DROP] * 2)
        self.assertEqual(found.verdict(STRANGER, 7.2), ALLOW)
        times = [1e6 + n / 1000 for n in range(10_000)]
        taken = sum(found.verdict(STRANGER, now) == ALLOW for now in times)
        self.assertAlmostEqual(taken, 10 + 50, delta=1)

    def test_rate_is_that_of_an_ipv4_address_or_an_ipv6_56(self) -> None:
        found = admission(0.5, EVERYWHERE)
        for host, verdict in (
            *((STRANGER, ALLOW), ("2001:db8:0:1::1", ALLOW), (STRANGER, TRUNCATE)),
            *((f"::ffff:{STRANGER}", DROP), ("198.51.100.2", ALLOW)),
            *(("2001:db8:0:ff::9", TRUNCATE), ("2001:db8:0:100::1", ALLOW)),
        ):
            with self.subTest(host):
                self.assertEqual(found.verdict(host, 0.0), verdict)

    def test_limit_for_all_counts_local_clients_and_rate_0_limits_nobody(self) -> None:
        found = admission(0.5, limit_all=True)
        verdicts = [found.verdict("127.0.0.1", 0.0) for _ in range(2)]
        self.assertEqual(verdicts, [ALLOW, TRUNCATE])

        found = admission(0, EVERYWHERE, limit_all=True)
        self.assertEqual(found.verdict(STRANGER, 0.0), ALLOW)
        self.assertIn(STRANGER, found.free)
        self.assertEqual(found.pace(STRANGER, 1000, 0.0), (1000, 0.0))

    def test_streams_have_their_own_rate_and_one_query_over_it_may_be_owed(
        self,
    ) -> None:
        found = admission(10, EVERYWHERE)
        for _ in range(100):  # forged
            found.verdict(STRANGER, 3.0)

        for count, taken, ready_at in (
            *((19, 19, 2.95), (9, 1, 3.05), (9, 1, 3.15), (0, 0, 3.15)),
            *((9, 1, 3.25), (9, 1, 3.35)),
        ):
            got = found.pace(STRANGER, count, 3.0)
            self.assertEqual(got[0], taken)
            self.assertAlmostEqual(got[1], ready_at)

    def test_what_is_remembered_is_bounded(self) -> None:
        bounds = mock.patch.multiple(dotproxy.RateLimiter, MAX_PREFIXES=2)
        with bounds, mock.patch.object(dotproxy.Admission, "MAX_KNOWN", 10):
            found = admission(0.5, EVERYWHERE)
            for number in range(25):
                found.verdict(f"10.0.0.{number}", 0.0)
            a, b, c = (f"198.51.100.{number}" for number in range(3))
            verdicts = [found.verdict(host, 0.0) for host in (a, b, a, c, a, b)]

        self.assertEqual(len(found.free), 5)
        # The longest unused is forgotten first: that is `b`, when `c` comes.
        self.assertEqual(verdicts, [ALLOW, ALLOW, TRUNCATE, ALLOW, DROP, ALLOW])


class ShortAnswerTest(DotproxyTestCase):
    def short(self, verdict: dotproxy.Verdict, message: bytes) -> Message:
        assert verdict.answer is not None
        got = verdict.answer(message)
        self.assertLessEqual(len(got), len(message))
        return parse(got)

    def test_no_answer_is_longer_than_its_query(self) -> None:
        seeds = [
            *(query(), query(do=True), query(LONGEST_NAME), query(b"\0", 255)),
            query(b"\0", 255, do=False),
            query(do=True, options=option(COOKIE, bytes(8))),
            query(do=True, options=option(PADDING, bytes(400))),
            query("a", "AXFR", do=False, edns_version=1),
        ]
        for message in [*seeds, *filter(dotproxy.answerable, damaged(seeds, 3000))]:
            self.short(dotproxy.REFUSE, message)
            self.short(TRUNCATE, message)

    def test_it_has_the_question_and_the_error_where_that_fits(self) -> None:
        long = dotproxy.PROHIBITED[0][4:]
        for asked, options in (
            (query("wWw.example", id=7), None),
            (query(id=7, do=True), []),
            (query(id=7, do=True, options=option(PADDING, b"12")), [(EDE, long[:2])]),
            (query(id=7, do=True, options=option(PADDING, bytes(50))), [(EDE, long)]),
        ):
            refused, cut = (self.short(v, asked) for v in (dotproxy.REFUSE, TRUNCATE))
            with self.subTest(asked):
                self.assertEqual((refused.id, refused.rcode), (7, Rcode.REFUSED))
                self.assertEqual(refused.opt and refused.opt.options, options)
                self.assertEqual((cut.id, cut.rcode, cut.flags & TC), (7, 0, TC))
                self.assertEqual(cut.question, parse(asked).question)
                self.assertEqual((cut.answers, cut.opt is None), ([], options is None))
        bare = self.short(dotproxy.REFUSE, b"\0\7" + bytes(10))  # it cannot be parsed
        self.assertEqual((bare.id, bare.rcode, len(bare.raw)), (7, Rcode.REFUSED, 12))


# ---- Servers -------------------------------------------------------------------------
# The contract holds whatever the transport: the classes behind it say how to ask.

if TYPE_CHECKING:
    MixIn = DotproxyTestCase
else:
    MixIn = object


class DNSServerContract(MixIn):
    """What every server does, whatever its transport."""

    host = LOCALHOST
    options: tuple[str, ...] = ()

    def connect(self, served: Served) -> Client:
        raise NotImplementedError

    def serve(
        self, script: Reply = answer
    ) -> contextlib.AbstractContextManager[Served]:
        return serving(script, *self.options, host=self.host)

    def clients(self, served: Served, count: int) -> list[Client]:
        found = [self.connect(served) for _ in range(count)]
        for client in found:
            self.addCleanup(client.socket.close)
        return found

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
            if isinstance(client, UDPClient):  # a stream would end
                client.send(*[query()[:size] for size in range(12)])
            for id in (2, 3):
                client.send(query(id=id))
                self.assertEqual(parse(client.receive()).id, id)

    def test_equal_questions_in_flight_go_upstream_once(self) -> None:
        hold = Hold()
        with self.serve(hold) as served:
            clients = self.clients(served, 3)
            for number, client in enumerate(clients):
                client.send(query(id=number))
            served.wait_for_in_flight(3)
            hold.release()
            ids = [parse(client.receive()).id for client in clients]

        self.assertEqual(ids, [0, 1, 2])
        self.assertEqual(len(served.upstream.queries), 1)

    def test_many_questions_in_flight_get_their_own_answers(self) -> None:
        hold = Hold(lambda message, _: f"192.0.2.{message.qname.split('.')[0]}")
        with self.serve(hold) as served, self.connect(served) as client:
            client.send(*[query(f"{n}.example", id=n) for n in range(200)])
            hold.release(200, reverse=True)
            answers = [parse(client.receive()) for _ in range(200)]

        found = sorted((got.id, *got.addresses) for got in answers)
        self.assertEqual(found, [(n, f"192.0.2.{n}") for n in range(200)])

    def test_what_has_come_by_the_end_is_answered(self) -> None:
        gate = threading.Event()
        with self.serve() as served, contextlib.ExitStack() as stack:
            clients = self.clients(served, 1)  # which shakes hands, if any does
            for kind in (dotproxy.UDPServer, dotproxy.TCPServer):
                stack.enter_context(gated(kind, gate))
            clients += self.clients(served, 0 if self.options else 99)
            for client in clients:
                client.send(query("a.example"), query("b.example"))
            closing = threading.Thread(target=served.daemon.close)
            closing.start()
            gate.set()
            for client in clients * 2:
                self.assertEqual(parse(client.receive()).rcode, 0)
            closing.join()


@contextlib.contextmanager
def gated(kind: type[dotproxy.Listener], gate: threading.Event) -> Iterator[None]:
    """Have servers of this kind take nothing from their socket until the gate opens."""
    get_request = kind.get_request

    def wait(server: dotproxy.Listener) -> object:
        gate.wait(5)
        return get_request(server)

    with mock.patch.object(kind, "get_request", wait):
        yield


class UDPv4ContractTest(DNSServerContract, DotproxyTestCase):
    def connect(self, served: Served) -> Client:
        return UDPClient(served.address)


class UDPv6ContractTest(UDPv4ContractTest):
    host = LOCALHOST_V6


class TCPContractTest(DNSServerContract, DotproxyTestCase):
    def connect(self, served: Served) -> Client:
        return TCPClient(served.address)


class DoTContractTest(DNSServerContract, DotproxyTestCase):
    options = ENCRYPTED

    def connect(self, served: Served) -> Client:
        return TLSClient(served.tls_address)


def link_local() -> Iterator[str]:
    """Yield this host's link-local addresses, with their zones."""
    with contextlib.suppress(OSError), open("/proc/net/if_inet6") as file:
        for digits, _, _, _, _, interface in map(str.split, file):
            if digits.startswith("fe80"):
                address = ipaddress.IPv6Address(bytes.fromhex(digits))
                yield f"{address}%{interface}"


class ListenerTest(DotproxyTestCase):
    def test_link_local_address_is_served_and_told_with_its_zone(self) -> None:
        for host in link_local():
            with self.subTest(host), serving(host=f"[{host}]:0") as served:
                self.assertEqual(served.address[0], host)
                with TCPClient(served.address) as client:
                    client.send(query())
                    self.assertEqual(parse(client.receive()).rcode, 0)
                where = socket.getaddrinfo(*served.address)[0][4]  # zone as number
                with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as datagrams:
                    datagrams.connect(where)
                    datagrams.send(query())
                    self.assertTrue(select.select([datagrams], [], [], 5)[0])

    def test_port_is_shared_through_restarts_without_a_loss(self) -> None:
        def ask_all() -> None:
            for number in range(500):
                kind = UDPClient if number % 10 else TCPClient
                with kind(address) as client:
                    client.send(query(f"{number}.example", id=number))
                    ids.append(parse(client.receive()).id)

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
                wait_until(functools.partial(lambda goal: len(ids) > goal, goal))
                closing = threading.Thread(target=old.daemon.close)
                closing.start()
                more = len(ids) + 30
                wait_until(functools.partial(lambda goal: len(ids) > goal, more))
                late.send(query())
                self.assertEqual(parse(late.receive()).rcode, 0)
                closing.join()
                old = new
            asking.join()

        self.assertEqual(ids, list(range(500)))


class UDPServerTest(DotproxyTestCase):
    def test_answer_leaves_from_the_address_in_the_packet_information(self) -> None:
        one, two = (socket.inet_aton(f"192.0.2.{number}") for number in (1, 2))
        for name, local, destination, source in (
            ("Linux", one, one, one),
            ("Linux, of a broadcast", one, two, one),
            ("macOS", bytes(4), two, two),
        ):
            with self.subTest(name):
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

    def ask(self, message: bytes, *options: str, script: Reply = answer) -> Message:
        """Ask a proxy with these options."""
        with serving(script, *options) as served, UDPClient(served.address) as client:
            client.send(message)
            return parse(client.receive())

    def test_names_and_addresses_are_blocked_as_the_options_say(self) -> None:
        flag, exempt = "--block-private-answers", "--allow-private=com"
        with FakeUpstream(lambda *_: "10.0.0.2") as upstream:
            route = f"--route=corp.local={LOCALHOST}:{upstream.port}#dot.test"
            for name, options, addresses in (
                ("a.local", ["--forward-special=local"], ["10.0.0.1"]),
                ("a.local", [route, flag], []),
                ("a.corp.local", [route, flag], ["10.0.0.2"]),
                ("www.example.com", [], ["10.0.0.1"]),
                ("www.example.com", [flag], []),
                ("www.example.com", [flag, exempt], ["10.0.0.1"]),
            ):
                with self.subTest(name, options=options):
                    got = self.ask(query(name), *options, script=lambda *_: "10.0.0.1")
                    self.assertEqual(got.addresses, addresses)

    def test_answer_never_exceeds_1232_octets_and_a_longer_query_is_malformed(
        self,
    ) -> None:
        def sized(message: Message, _: FakeConnection) -> bytes:
            number = int(message.qname.split(".")[0])
            return response(message.raw, record(b"\xc0\x0c", "TXT", bytes(number)))

        sizes = [*range(1100, 1240, 5), 2000, 9000]
        with serving(sized) as served, UDPClient(served.address) as client:
            client.send(*[query(f"{n}.example", do=True, size=65535) for n in sizes])
            answers = [parse(client.receive()) for _ in sizes]
        huge = query(do=True, options=option(UNKNOWN_OPTION, bytes(30_000)))

        self.assertLessEqual(max(len(got.raw) for got in answers), 1232)
        self.assertEqual({bool(got.flags & TC) for got in answers}, {False, True})
        self.assertEqual(self.ask(huge).rcode, Rcode.FORMERR)


class TurningAwayTest(DotproxyTestCase):
    def test_strangers_are_refused_20_times_then_ignored(self) -> None:
        asked = query(do=True, options=option(PADDING, bytes(99)))
        allow = "--allow=192.0.2.0/24", "--route=example.com=tcp://127.0.0.1:1"
        with serving(answer, *allow) as served:
            with UDPClient(served.address) as udp, TCPClient(served.address) as tcp:
                udp.send(*[asked] * 30)
                answers = [parse(udp.receive()) for _ in range(20)]
                self.assertRaises((EOFError, ConnectionError), tcp.receive)
                udp.socket.settimeout(0.05)
                self.assertRaises(socket.timeout, udp.receive)
            names = [thread.name for thread in threading.enumerate()]

        found = {(got.rcode, *extended_errors(got)) for got in answers}
        self.assertEqual(found, {(Rcode.REFUSED, 18)})
        self.assertFalse([name for name in names if name.startswith("stream")])

    def test_client_over_its_rate_is_sent_to_tcp_every_second_time(self) -> None:
        options = "--rate-limit=1", "--rate-limit-all"
        with serving(answer, *options) as served, UDPClient(served.address) as client:
            client.send(*[query(rrtype="AXFR", id=n) for n in range(8)])
            answers = [parse(client.receive()) for _ in range(5)]

        found = sorted((got.id, got.rcode, got.flags & TC) for got in answers)
        allowed = [(id, Rcode.REFUSED, 0) for id in (0, 1)]
        self.assertEqual(found, allowed + [(id, 0, TC) for id in (2, 4, 6)])

    @contextlib.contextmanager
    def slowed(self, excess: int) -> Iterator[tuple[Served, TCPClient, float]]:
        """Have more queries answered than may come at once; yield the time before.

        At 20 queries/s, 40 at once, the next is served when half a token is there: with
        an excess of 2 after 0.125 s.
        """
        options = "--rate-limit=20", "--rate-limit-all"
        with serving(answer, *options) as served, TCPClient(served.address) as client:
            started = time.monotonic()
            client.send(*[query(id=n) for n in range(40 + excess)])
            ids = {parse(client.receive()).id for _ in range(40 + excess)}
            self.assertEqual(ids, set(range(40 + excess)))
            yield served, client, started

    def test_streams_over_their_rate_are_served_later_and_do_not_spin(self) -> None:
        clock = mock.Mock(wraps=time.monotonic)
        patch = mock.patch.object(dotproxy, "elapsed", clock)
        with self.slowed(2) as (served, client, started), patch:
            with TCPClient(served.address) as other:
                other.send(query())
                other.receive()
            self.assertGreater(time.monotonic() - started, 0.124)
            client.send(*[query(id=n) for n in range(5)])
            client.half_close()
            ids = [parse(client.receive()).id for _ in range(5)]
            took = time.monotonic() - started

        self.assertEqual(ids, [0, 1, 2, 3, 4])
        self.assertGreater(took, 0.374)
        self.assertLess(clock.call_count, 500)

    def test_stream_is_not_idle_while_it_is_slowed(self) -> None:
        short = mock.patch.object(dotproxy.TCPServer, "idle_timeout", 0.4)
        with short, self.slowed(16) as (_, client, started):
            self.assertRaises((EOFError, ConnectionError), client.receive)
            self.assertGreater(time.monotonic() - started, 15.5 / 20 + 0.4 - 0.001)

    def test_slowed_stream_does_not_hold_up_the_end(self) -> None:
        options = "--rate-limit=1", "--rate-limit-all"
        with serving(answer, *options) as served, TCPClient(served.address) as client:
            client.send(*[query(id=n) for n in range(99)])
            self.assertEqual([parse(client.receive()).id for _ in range(2)], [0, 1])
            started = time.monotonic()

        self.assertLess(time.monotonic() - started, 10.0)


def slow_name(hold: Hold) -> Script:
    """Hold the answers to slow names, and give all others at once."""
    return lambda message, _: hold if message.qname.startswith("slow") else answer


def large(message: Message, _: FakeConnection) -> bytes:
    """Answer with 60,000 octets."""
    return response(message.raw, record(b"\xc0\x0c", "TXT", bytes(60_000)))


class TCPServerTest(DotproxyTestCase):
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
            for octet in message:
                client.send_raw(bytes([octet]))
            self.assertEqual(parse(client.receive()).rcode, 0)
            for cut in range(1, len(message)):
                with self.subTest(cut=cut):
                    client.send_raw(message[:cut])
                    client.send_raw(message[cut:])
                    self.assertEqual(parse(client.receive()).rcode, 0)

    def test_slow_names_hold_back_none_of_3000_queries(self) -> None:
        for slow in (1, 200):
            hold = Hold()
            running = serving(slow_name(hold), "--timeout=60")
            with self.subTest(slow=slow), running as served:
                client = TCPClient(served.address, 60)
                names = [f"slow{n}.example" for n in range(slow)]
                names += [f"{n}.example" for n in range(3000)]
                asked = [query(name, id=id) for id, name in enumerate(names)]
                with client, mock.patch.object(dotproxy.StreamHandler, "MOMENT", 60.0):
                    client.send(*asked)  # that many fit into the kernel's buffers
                    ids = {parse(client.receive()).id for _ in range(3000)}
                    self.assertEqual(ids, set(range(slow, slow + 3000)))
                    hold.release(slow)
                    ids = {parse(client.receive()).id for _ in range(slow)}
                    self.assertEqual(ids, set(range(slow)))

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
        with serving(large) as served:
            served.tcp.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
            client = self.client(served)
            client.send(*[query(id=n) for n in range(50)])
            ids = [parse(client.receive()).id for _ in range(50)]

        self.assertEqual(ids, list(range(50)))

    def test_client_gone_with_a_query_in_flight_harms_nobody(self) -> None:
        hold = Hold()
        with serving(slow_name(hold)) as served, TCPClient(served.address) as client:
            with TCPClient(served.address) as fleeting:
                fleeting.send(query("slow.example"))
                served.wait_for_in_flight(1)
            hold.release()
            self.assert_served(client)

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

    def test_client_that_says_nothing_is_closed(self) -> None:
        short = mock.patch.object(dotproxy.TCPServer, "idle_timeout", 0.05)
        with short, serving() as served, TCPClient(served.address) as client:
            self.assert_closed(client)

    def test_client_too_many_takes_the_place_of_the_longest_idle(self) -> None:
        hold = Hold()
        with serving(slow_name(hold), "--max-tcp-clients=3") as served:
            busy, first, second = (self.client(served) for _ in range(3))
            busy.send(query("slow.example"))
            served.wait_for_in_flight(1)
            self.assert_served(first)
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
        with (
            mock.patch.object(time, "sleep") as pause,
            self.assertLogs(dotproxy.logger, "WARNING") as logged,
        ):
            self.assertRaises(OSError, dotproxy.accept, listener)
            self.assertRaises(ConnectionAbortedError, dotproxy.accept, listener)

        pause.assert_called_once_with(dotproxy.SHORTAGE_PAUSE)
        self.assertIn("Too many open files", logged.output[0])
        request.close.assert_called_once_with()

    def test_client_that_never_reads_is_dropped_while_another_is_served(self) -> None:
        for stall, unsent in ((0.1, 1 << 30), (60.0, 1 << 18)):  # either is enough
            with (
                self.subTest(stall=stall),
                mock.patch.object(dotproxy.StreamHandler, "STALL", stall),
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

    def test_length_below_a_header_ends_it_once_the_rest_is_answered(self) -> None:
        lasting = mock.patch.object(dotproxy.TCPServer, "idle_timeout", 60.0)
        for length in (0, 1, 11):
            hold = Hold()
            running = serving(slow_name(hold))
            with self.subTest(length=length), lasting, running as served:
                client = self.client(served)
                client.send(query("slow.example"), bytes(length), query("b.example"))
                hold.release()
                self.assertEqual(parse(client.receive()).qname, "slow.example")
                self.assert_closed(client)

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


class Handshake:
    """A client's handshake, message by message, over a socket of its own."""

    def __init__(self, server: Address) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = trusting().wrap_bio(
            self._incoming, self._outgoing, server_hostname="dot.test"
        )
        self.socket = socket.create_connection(server, 5)

    def __enter__(self) -> Handshake:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def step(self, octets: bytes = b"") -> bool:
        """Send the next message, and these octets behind the last; tell if it was."""
        done = False
        with contextlib.suppress(ssl.SSLWantReadError):
            self._tls.do_handshake()
            self._tls.write(octets)
            done = True
        self.socket.sendall(self._outgoing.read())
        return done

    def finish_with(self, octets: bytes) -> None:
        """Shake hands; the last flight is sent with these octets behind it."""
        while not self.step(octets):
            self._incoming.write(self.socket.recv(65536))

    def send(self, octets: bytes) -> None:
        if octets:
            self._tls.write(octets)
        self.socket.sendall(self._outgoing.read())

    def receive(self) -> bytes:
        """Return what comes next."""
        while True:
            try:
                return self._tls.read(65536)
            except ssl.SSLWantReadError:
                self._incoming.write(self.socket.recv(65536))


class ServedOverTLS(Served):
    """A running proxy whose first stream server is the one for encrypted clients."""

    @property
    def tcp(self) -> dotproxy.TCPServer:
        """The server for encrypted clients."""
        return self.tls


class TLSStreamTest(TCPServerTest):
    """All that holds for TCP clients holds for encrypted ones."""

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

    def serve(
        self, script: Reply = answer, *options: str
    ) -> contextlib.AbstractContextManager[Served]:
        return serving(script, *ENCRYPTED, *options)

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

        with self.serve(some) as served, TLSClient(served.tls_address) as client:
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

    def test_one_question_in_flight_is_padded_for_whom_asked_so(self) -> None:
        hold = Hold()
        with (
            self.serve(hold) as served,
            TLSClient(served.tls_address) as one,
            TCPClient(served.address) as other,
        ):
            one.send(self.PADDED)
            other.send(self.PADDED)
            served.wait_for_in_flight(2)
            hold.release()
            self.assertEqual(len(one.receive()), 468)
            self.assertLess(len(other.receive()), 100)

    def test_alpn_dot_is_selected_and_its_absence_is_served(self) -> None:
        with self.serve() as served:
            for offered, selected in (
                *((["dot"], "dot"), (["h2", "dot"], "dot"), ([], None)),
                (["h2", "http/1.1"], None),  # Python cannot refuse it
            ):
                client = TLSClient(served.tls_address, context=trusting(offered))
                with self.subTest(offered=offered), client:
                    self.assertEqual(client.tls.selected_alpn_protocol(), selected)
                    self.assert_served(client)

    def test_session_is_resumed_until_the_certificate_is_read_again(self) -> None:
        with self.serve() as served:
            assert served.tls.identity is not None
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
                        served.tls.identity.reload()

    def test_version_before_1_2_is_refused_with_an_alert(self) -> None:
        context = trusting()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = ssl.TLSVersion.TLSv1
            context.maximum_version = ssl.TLSVersion.TLSv1_1
        context.set_ciphers("ALL:@SECLEVEL=0")
        with self.serve() as served, self.assertRaises(ssl.SSLError) as caught:
            TLSClient(served.tls_address, context=context)

        self.assertIn("PROTOCOL_VERSION", caught.exception.reason)

    def test_what_comes_with_the_handshake_is_served_or_ends_it(self) -> None:
        octets = frame(query())
        with self.serve() as served:
            for size in (len(octets), 9, 1):
                with self.subTest(size), Handshake(served.tls_address) as client:
                    client.finish_with(octets[:size])
                    client.send(octets[size:])
                    self.assertEqual(parse(client.receive()[2:]).rcode, 0)
            with Handshake(served.tls_address) as client:
                client.finish_with(frame(b"too short"))
                self.assertEqual(client.receive(), b"")

    def test_handshake_that_does_not_end_is_cut_off(self) -> None:
        patience = mock.patch.object(dotproxy.StreamHandler, "HANDSHAKE", 0.05)
        with patience, self.serve() as served:
            for octets in (b"", bytes.fromhex("1603010200010001fc0303")):
                client = socket.create_connection(served.tls_address, 5)
                with self.subTest(octets=octets), client:
                    client.sendall(octets)
                    self.assertEqual(client.recv(1), b"")

    def test_garbage_ends_it_and_harms_nobody(self) -> None:
        hold = Hold()
        with self.serve(slow_name(hold)) as served:
            client, broken = (TLSClient(served.tls_address) for _ in range(2))
            with client, broken:
                for octets in (frame(query()), b"GET / HTTP/1.1\r\n\r\n", bytes(3000)):
                    stranger = socket.create_connection(served.tls_address, 5)
                    with self.subTest(octets=octets[:20]), stranger:
                        stranger.sendall(octets)
                        with contextlib.suppress(ConnectionResetError):
                            while stranger.recv(4096):
                                pass
                broken.send(query("slow.example"))
                served.wait_for_in_flight(1)
                os.write(broken.socket.fileno(), b"\x17\x03\x03\0\x20" + bytes(32))
                with self.assertRaises(ssl.SSLError) as caught:
                    broken.receive()
                self.assertIn("BAD_RECORD_MAC", caught.exception.reason)
                hold.release()
                served.wait_for_in_flight(0)
                self.assert_served(client)

    def test_handshakes_wait_for_their_turn_and_clients_do_not(self) -> None:
        with (
            self.serve() as served,
            TLSClient(served.tls_address) as client,
            Handshake(served.tls_address) as other,
        ):
            self.assert_served(client)
            with served.tls.turns:
                other.step()
                other.socket.settimeout(0.05)
                self.assertRaises(socket.timeout, other.socket.recv, 1)
                self.assert_served(client)
            other.socket.settimeout(5)
            self.assertTrue(other.socket.recv(1))

    def test_unfinished_handshake_makes_room_before_any_client(self) -> None:
        with (
            self.serve(answer, "--max-tcp-clients=2") as served,
            TLSClient(served.tls_address) as client,
        ):
            self.assert_served(client)
            with Handshake(served.tls_address) as unfinished:
                unfinished.step()
                unfinished.socket.recv(65536)
                with TLSClient(served.tls_address) as other:
                    self.assertEqual(unfinished.socket.recv(1), b"")
                    self.assert_served(client)
                    self.assert_served(other)

    def test_end_is_told_to_who_makes_room_is_idle_or_is_there_at_the_end(self) -> None:
        for kind in (TLSClient, TCPClient):
            with self.serve(answer, "--max-tcp-clients=1") as served:
                first = TLSClient(served.tls_address)
                with first, self.subTest(kind=kind):
                    self.assert_served(first)
                    tls = kind is TLSClient
                    with kind(served.tls_address if tls else served.address) as second:
                        self.assert_orderly_end(first)
                        self.assert_served(second)
        short = mock.patch.object(dotproxy.TCPServer, "idle_timeout", 0.3)
        with short, self.serve() as served, TLSClient(served.tls_address) as client:
            self.assert_orderly_end(client)
        with self.serve() as served:
            client = self.have(TLSClient(served.tls_address))
            self.assert_served(client)
        self.assert_orderly_end(client)


def rotate(path: str, source: str) -> None:
    """Replace what is in one file by what is in another."""
    with open(source, "rb") as new, open(path, "wb") as file:
        file.write(new.read())


class IdentityTest(DotproxyTestCase):
    def test_what_clients_will_see_is_logged(self) -> None:
        good = ["INFO", "names=dot.test,127.0.0.1", "until=Jan  1 00:00:00 2100 GMT"]
        for chain, key, words in (
            (PKI.good, None, good),
            (PKI.good_alone, PKI.key_alone, good),
            (PKI.expired, None, ["WARNING", "certificate has expired"]),
        ):
            with self.subTest(chain), self.assertLogs(dotproxy.logger) as logged:
                dotproxy.Identity(chain, key)
                self.assertEqual(len(logged.output), 1)
                for word in words:
                    self.assertIn(word, logged.output[0])

    def test_pair_that_cannot_be_used_is_one_line_that_says_why(self) -> None:
        absent = os.path.join(os.path.dirname(PKI.ca), "absent.pem")
        barred = mock.patch("builtins.open", side_effect=PermissionError(13, "Denied"))
        for chain, key, words in (
            (absent, None, [absent, "No such file", "--tls-cert"]),
            (PKI.good, absent, [absent, "No such file", "--tls-key"]),
            (os.path.dirname(absent), None, ["directory", "--tls-cert"]),
            (dotproxy.__file__, None, ["dotproxy.py"]),
            (PKI.key_alone, PKI.key_alone, ["no certificate", PKI.key_alone]),
            (PKI.good_alone, None, ["no private key", PKI.good_alone, "--tls-key"]),
            (PKI.good, PKI.key2_alone, ["is not that of", PKI.key2_alone]),
            (PKI.good_alone, PKI.locked_key, ["passphrase", PKI.locked_key]),
            ("barred", None, ["Denied; let the user that this runs as"]),
        ):
            with (
                self.subTest(chain=chain, key=key),
                barred if chain == "barred" else contextlib.nullcontext(),
                self.assertRaises(dotproxy.ConfigError) as caught,
            ):
                dotproxy.Identity(chain, key)
            for word in words:
                self.assertIn(word, str(caught.exception))
            self.assertNotIn("\n", str(caught.exception))

    def test_reload_replaces_the_pair_by_a_good_one_only(self) -> None:
        gone = mock.patch.object(
            ssl.SSLContext, "load_cert_chain", side_effect=FileNotFoundError
        )
        with tempfile.NamedTemporaryFile(suffix=".pem") as file:
            rotate(file.name, PKI.good)
            identity = dotproxy.Identity(file.name)
            before = identity.context
            for source in (PKI.good_alone, PKI.ca, dotproxy.__file__, PKI.good2):
                rotate(file.name, source)
                with (
                    gone if source == PKI.good2 else contextlib.nullcontext(),
                    self.assertLogs(dotproxy.logger, "WARNING") as logged,
                ):
                    identity.reload()
                with self.subTest(source):
                    self.assertIs(identity.context, before)
                    self.assertEqual(len(logged.output), 1)
                    self.assertIn("certificate not replaced", logged.output[0])
            identity.reload()

        self.assertIsNot(identity.context, before)


# ---- Host ----------------------------------------------------------------------------


class Rights:
    """The rights of a process that began as root, and how it gives them up."""

    def __init__(
        self, refusal: int = 0, *, leaky: bool = False, bare: bool = False, uid: int = 0
    ) -> None:
        self.uid, self.gid, self.groups = uid, uid, [0, 27]
        self.options: list[tuple[int, int]] = []  # of prctl, by who is not root
        self.core: object = None
        self.imported: list[str] = []  # by root
        self._refusal, self._leaky, self._bare = refusal, leaky, bare

    def renounce(self, user: str | None) -> str:
        """Have these given up instead of those of the tests."""
        c_library = types.SimpleNamespace(prctl=self._prctl)
        with contextlib.ExitStack() as stack:
            for target, name, new in (
                (os, "geteuid", lambda: self.uid),
                (os, "getegid", lambda: self.gid),
                (os, "umask", lambda mask: 0o022),
                (os, "setgroups", lambda groups: self._set("groups", groups)),
                (os, "setgid", lambda gid: self._set("gid", gid)),
                (os, "setuid", lambda uid: self._set("uid", uid)),
                (resource, "setrlimit", lambda _, limits: self._set("core", limits)),
                (importlib, "import_module", self._import),
                (ctypes, "CDLL", lambda name: c_library),
                (dotproxy, "has_capabilities", lambda: not self._bare),
            ):
                stack.enter_context(mock.patch.object(target, name, new))
            return dotproxy.renounce_root(user)

    def _set(self, name: str, value: object) -> None:
        guarded = name != "core" and not (name == "uid" and self._leaky)
        if guarded and (self.uid or self._refusal):
            raise OSError(self._refusal or errno.EPERM, "refused")
        setattr(self, name, value)

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
            ("4000000001:4000000002", (4000000001, 4000000002)),
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
        unknown = mock.Mock(side_effect=KeyError)
        rights = Rights()

        with (
            mock.patch.multiple(pwd, getpwnam=unknown, getpwuid=unknown),
            mock.patch.dict(sys.modules, {"ctypes": None}),
        ):
            rights.renounce(None)

        self.assertEqual((rights.uid, rights.gid), (65534, 65534))

    def test_user_that_cannot_be_is_refused_with_the_cure(self) -> None:
        other = Rights(uid=4000000001)
        for rights, user, status, words in (
            (Rights(), "no.such.user", 2, "no user or group 'no.such.user': give --us"),
            (Rights(), "nobody:no.such.group", 2, "no user or group 'no.such.group'"),
            (Rights(), "99999999999", 2, "no user"),
            (Rights(), ":daemon", 2, "no user or group ''"),
            (Rights(leaky=True), None, 1, "root again"),
            (Rights(), "root:daemon", 1, "root again"),
            (Rights(errno.EPERM), None, 1, "CAP_SETUID.*--user root"),
            (Rights(errno.EPERM, bare=True), "daemon", 1, "cannot become user daemon"),
            (Rights(errno.EINVAL), "daemon", 1, "cannot become user daemon"),
            (other, "4000000002", 1, "only root can become"),
            (other, "4000000001:4000000002", 1, "only root can become"),
            (other, "root", 1, "only root can become"),
        ):
            refused = self.assertRaisesRegex(dotproxy.ConfigError, words)
            with self.subTest(user=user, words=words), refused as caught:
                rights.renounce(user)
            self.assertEqual(caught.exception.status, status)

    def test_who_cannot_give_up_root_or_is_not_root_stays(self) -> None:
        other = Rights(uid=4000000001)
        for rights, user, name in (
            (Rights(), "root", "root"),
            (Rights(), "0", "root"),
            (Rights(errno.EPERM, bare=True), None, "root"),  # --cap-drop ALL
            (Rights(errno.EINVAL), None, "root"),  # a user namespace of one number
            (other, None, "4000000001"),
            (other, "4000000001", "4000000001"),
            (other, "4000000001:4000000001", "4000000001"),
        ):
            with self.subTest(user, name=name), contextlib.ExitStack() as stack:
                if name == "root":
                    warned = self.assertLogs(dotproxy.logger, "WARNING")
                    stack.enter_context(warned)
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

        self.assertIn("certificate is for dot.test", output)
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
        client.send(f"GET {path} HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n".encode())
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
    def test_limit_is_raised_as_far_as_it_is_needed_and_may_be(self) -> None:
        unlimited = resource.RLIM_INFINITY
        for wanted, soft, hard, most, limit in (
            (2000, 1024, 4096, 9999, 2000),
            (2000, 1024, unlimited, 9999, 2000),
            (9000, 1024, 4096, 9999, 4096),
            (2000, 4096, 8192, 0, 2000),  # is enough
            (2000, unlimited, unlimited, 0, 2000),
            (2000, 64, 64, 9999, 64),
            (2000, 1024, 4096, 0, 1024),  # in a sandbox
            (20000, 256, unlimited, 10240, 10240),  # on macOS
        ):
            now = [soft, hard]

            def set_limit(
                _: int, limits: list[int], now: list[int] = now, most: int = most
            ) -> None:
                if limits[0] > most:
                    raise ValueError("not allowed to raise maximum limit")
                now[:] = limits

            with (
                self.subTest(wanted=wanted, soft=soft, hard=hard, most=most),
                mock.patch.object(resource, "getrlimit", lambda _, now=now: now),
                mock.patch.object(resource, "setrlimit", set_limit),
            ):
                self.assertEqual(dotproxy.raise_descriptor_limit(wanted), limit)
                self.assertEqual(now, [limit if most else soft, hard])

    def test_too_few_descriptors_mean_fewer_tcp_clients_and_a_warning(self) -> None:
        enough, admin = 1092, 1 + dotproxy.AdminServer.MAX_CLIENTS
        routes = [f"--route=example.com=192.0.2.{n}#dot.test" for n in (1, 2)]
        links = 2 * (dotproxy.Upstream.SHARED + dotproxy.Upstream.LANES)
        for limit, options, clients in (
            (enough, [], 512),
            (enough + admin, ["--admin"], 512),
            (enough - 1, [], 511),
            (20, [], 1),
            (enough, routes, 512 - links // 2),
        ):
            config = configured(*options)
            raised = mock.patch.object(
                dotproxy, "raise_descriptor_limit", lambda _, limit=limit: limit
            )
            with self.subTest(limit=limit), raised, contextlib.ExitStack() as stack:
                if clients < 512:
                    logs = stack.enter_context(self.assertLogs(dotproxy.logger))
                fitted = dotproxy.fit_descriptors(config)
                self.assertEqual(fitted.max_tcp_clients, clients)
        self.assertRegex("\n".join(logs.output), r"limit=1092.*LimitNOFILE=1116")


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
            ({"LISTEN_FDNAMES": ""}, ["", ""]),
            ({}, ["", ""]),
            ({"LISTEN_PID": str(os.getppid())}, []),
            ({"LISTEN_PID": ""}, []),
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
        deaf = socket.socket()
        deaf.bind((LOCALHOST, 0))
        unix = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        for words, sockets, count in (
            (f"descriptor {PASSED + 1} listens on no address", [deaf], "2"),
            (f"descriptor {PASSED + 1} listens on no address", [unix], "2"),
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
        with UDPClient(udp.getsockname()) as early:
            early.send(query())  # before the start
            served = self.have(serving(inherited=[("dns", udp), ("", tcp)]))
            client = self.have(TCPClient(served.address))
            client.send(query())
            for each in (early, client):
                self.assertEqual(parse(each.receive()).addresses, ["192.0.2.1"])
            self.assertEqual([s.socket for s in served.daemon.servers], [udp, tcp])

    @unittest.skipUnless(sys.platform == "linux", "needs all of 127.0.0.0/8")
    def test_inherited_wildcard_socket_answers_from_the_address_asked(self) -> None:
        # The last is so with BindIPv6Only=both.
        pairs = ("0.0.0.0", "127.1.2.3"), ("::", "::1"), ("::", "127.1.2.3")
        for host, asked in pairs:
            udp = listener(socket.SOCK_DGRAM, host)
            port = udp.getsockname()[1]
            served = serving(inherited=[("", udp)])
            client = UDPClient((asked, port))
            with self.subTest(host, asked=asked), served, client:
                client.send(query())
                self.assertEqual(parse(client.receive()).rcode, 0)

    def test_inherited_stream_named_tls_is_for_encrypted_clients(self) -> None:
        tls = listener(socket.SOCK_STREAM)
        inherited = [("tls", tls), ("tls", listener(socket.SOCK_DGRAM))]
        with serving(answer, ENCRYPTED[1], inherited=inherited) as served:
            self.assertIs(served.tls.socket, tls)
            with TLSClient(served.tls_address) as client:
                client.send(query())
                self.assertEqual(parse(client.receive()).rcode, 0)
        with self.assertRaisesRegex(dotproxy.ConfigError, "needs a certificate"):
            dotproxy.load_identity(configured(), passed=True)


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
    @unittest.skipUnless(sys.platform == "linux", "abstract names are Linux's")
    def test_lines_are_one_datagram_to_a_path_or_an_abstract_name(self) -> None:
        for path in ("", f"@dotproxy-test-{os.getpid()}"):
            with Notifications(path) as heard:
                supervisor = dotproxy.Supervisor({"NOTIFY_SOCKET": heard.path})
                supervisor.tell("READY=1", "STATUS=well")
                self.assertEqual(heard.next(), "READY=1\nSTATUS=well")

    def test_reports_are_due_in_time_for_the_watchdog(self) -> None:
        for period, path, interval in (
            ("6000000", "/run/notify", 1.5),
            ("600000000", "/run/notify", 10.0),
            ("", "/run/notify", 10.0),
            ("0", "/run/notify", 10.0),
            ("soon", "/run/notify", 10.0),
            ("6000000", "", None),
        ):
            with self.subTest(period=period, path=path):
                variables = {"NOTIFY_SOCKET": path, "WATCHDOG_USEC": period}
                self.assertEqual(dotproxy.Supervisor(variables).interval, interval)

    def test_socket_that_is_none_full_or_gone_is_no_trouble(self) -> None:
        dotproxy.Supervisor({}).tell("READY=1")
        with Notifications() as heard:
            supervisor = dotproxy.Supervisor({"NOTIFY_SOCKET": heard.path})
            for _ in range(5000):
                supervisor.tell("STATUS=" + "x" * 1000)
        supervisor.tell("READY=1")


# ---- Admin server --------------------------------------------------------------------


class AdminServerTest(DotproxyTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.clock = Clock()
        self.have(mock.patch.object(dotproxy, "elapsed", self.clock))
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

    def test_proxy_without_it_imports_no_http(self) -> None:
        code = "import sys, dotproxy; sys.exit('html' in sys.modules)"
        directory = os.path.dirname(compiled_program())

        done = subprocess.run([sys.executable, "-c", code], cwd=directory, timeout=60)

        self.assertEqual(done.returncode, 0)

    def test_page_is_answered_with_headers_that_allow_nothing(self) -> None:
        for method, text in (("GET", "text"), ("HEAD", "")):
            status, headers, body = self.ask(f"{method} /page?x HTTP/1.1")
            self.assertEqual((status, body), (200, text))
            self.assertEqual(headers["Content-Security-Policy"], "default-src 'none'")
            self.assertEqual(headers["X-Content-Type-Options"], "nosniff")
            self.assertEqual(headers["Cache-Control"], "no-store")
            self.assertEqual(headers["Content-Length"], "4")

    def test_what_is_no_page_is_refused_in_plain_text(self) -> None:
        for head, status in (
            *((f"{method} /page HTTP/1.1", 501) for method in ("POST", "PUT", "X")),
            *((f"GET {path} HTTP/1.1", 404) for path in ("/", "/page/", "http://x/")),
            ("GET /page HTTP/a.b", 400),
            (f"GET /page HTTP/1.1\nX: {'x' * 70_000}", 431),
        ):
            with self.subTest(head[:40]):
                got, headers, body = self.ask(head)
                kind = headers["Content-Type"]
                self.assertEqual((got, kind), (status, "text/plain; charset=utf-8"))
                self.assertNotIn("<", body)

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
        with contextlib.suppress(OSError), open("/proc/net/if_inet6") as file:
            for octets, *_, interface in map(str.split, file):
                address = ipaddress.IPv6Address(bytes.fromhex(octets))
                if address.is_link_local:
                    where = f"{address}%{interface}"
                    with dotproxy.AdminServer((where, 0), {}) as server:
                        self.assertEqual(server.server_address[0], where)
                    return
        self.skipTest("no interface has a link-local address")

    def test_one_client_too_many_or_too_slow_is_closed(self) -> None:
        clients = [self.connect(b"GET /") for _ in range(self.server.MAX_CLIENTS)]
        self.assertEqual(self.connect().recv(100), b"")

        clients[0].sendall(b"page HTTP/1.1\r\n\r\n")
        while clients[0].recv(100):
            pass
        self.assertEqual(self.ask("GET /page HTTP/1.1")[0], 200)

        self.clock.advance(self.server.PATIENCE)
        self.assertEqual(clients[1].recv(100), b"")

    def test_clients_that_come_together_are_let_in_at_once(self) -> None:
        with dotproxy.AdminServer((LOCALHOST, 0), {}) as idle:
            where = LOCALHOST, idle.server_address[1]
            for _ in range(idle.MAX_CLIENTS):  # a dropped SYN comes again after 1 s
                self.have(socket.create_connection(where, 0.5))

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
        admin = served.daemon.admin
        assert admin is not None
        host, port = admin.server_address[:2]
        client = http.client.HTTPConnection(str(host), int(port), timeout=5)
        with contextlib.closing(client):
            client.request("GET", path)
            answer = client.getresponse()
            policy = dotproxy.STATUS_POLICY if path == "/" else "default-src 'none'"
            self.assertEqual(answer.getheader("Content-Security-Policy"), policy)
            kind = answer.getheader("Content-Type") or ""
            return answer.status, kind, answer.read().decode()

    def test_pages_tell_what_happened_but_neither_client_nor_name(self) -> None:
        period = mock.patch.object(dotproxy.Charts, "PERIOD", 0.01)
        with period, serving(answer, "--admin=0") as served:
            for client in (UDPClient(served.address), TCPClient(served.address)):
                with client:
                    client.send(query("secret.example"))
                    client.receive()
            name = f"{LOCALHOST}:{served.upstream.port}#dot.test"
            for path, claim in (
                *(("/", "answered</dt><dd>2<"), ("/", "per second</dt><dd>0<")),
                ("/metrics", 'dns_requests_total{proto="udp",family="1",type="A"} 1'),
                ("/metrics", 'dns_requests_total{proto="tcp",family="1",type="A"} 1'),
                ("/metrics", f'handshakes_total{{upstream="{name}",result="full"}} 1'),
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
            servers, begun = served.daemon.servers, time.monotonic()
            wait_until(lambda: all(each.turned_at > begun for each in servers))
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
    at: float, cache: int = 0, upstream: int = 0, place: int = 0, cpu: float = 0.0
) -> dotproxy.Reading:
    """Make a reading of so many answers, all in one bucket of their duration."""
    buckets = [0] * (len(dotproxy.LATENCIES) + 1)
    buckets[place] = cache + upstream
    answers = {"cache": cache, "upstream": upstream}
    sources = [answers.get(source, 0) for source in dotproxy.SOURCES]
    return (at, cpu, cache, upstream, *sources, *buckets)


class ChartsTest(DotproxyTestCase):
    def test_latest_is_what_happened_in_the_last_minute(self) -> None:
        readings = [reading(10.0 * n, 3 * n, n, 3, 0.25 * n) for n in range(30)]
        latest = dotproxy.Charts(readings).latest
        idle = dotproxy.Charts([reading(0, 9), reading(10, 9)]).latest

        self.assertEqual(latest.rates, [0.3, 0.0, 0.1, 0.0])
        self.assertEqual((latest.hit_ratio, latest.busy), (0.75, 0.025))
        self.assertEqual(latest.delays[0], 0.0015)  # the middle of its bucket
        self.assertEqual((idle.rate, idle.hit_ratio, idle.delays[0]), (0.0, None, None))

    def test_chart_spans_more_as_there_is_more_and_points_stay(self) -> None:
        before: set[float] = set()
        for periods, span in (
            *((0, 600.0), (1, 600.0), (60, 600.0), (61, 1800.0), (180, 1800.0)),
            *((181, 3600.0), (359, 3600.0), (360, 3600.0)),
        ):
            with self.subTest(periods):
                readings = [reading(10.0 * n + 3) for n in range(periods + 1)]
                charts = dotproxy.Charts(readings)
                ends = [change.end for change in charts.changes]
                self.assertEqual((charts.span, len(ends) < 62), (span, True))
                self.assertTrue(all(0 < x <= 1000 for x in charts.places))
                self.assertLessEqual(before if periods == 360 else set(), {*ends})
                before = {*ends[1:-1]}

        after_a_stop = dotproxy.Charts([reading(at) for at in (0, 10, 20, 5000)])
        self.assertEqual([change.end for change in after_a_stop.changes], [5000])

    def test_scale_ends_in_a_round_number(self) -> None:
        for rate, top in ((0, "1"), (1, "1"), (11, "20"), (290, "400"), (999, "1,000")):
            with self.subTest(rate):
                page = dotproxy.Charts([reading(0), reading(10, rate * 10)]).draw()
                self.assertIn(f'<ul aria-hidden="true"><li>{top}</li>', page)

    def test_delays_have_decades_and_gaps_and_sources_are_stacked(self) -> None:
        answers = [0, 10, 10, 20, 30]
        readings = [reading(10.0 * n, a, a, 7) for n, a in enumerate(answers)]
        page = dotproxy.Charts(readings).draw()
        _, path = re.findall(r'"line p50" d="(.*?)"', page)
        tops = re.findall(r'"area (\w+)" d="M[\d.]+ ([\d.]+)', page)

        self.assertEqual(re.sub(r"[\d.]+", "1", path), "M1 1h1M1 1h1L1 1")
        self.assertIn("<li>100\u202fms</li><li>10\u202fms</li></ul>", page)
        wanted = {"cache": "50.0", "stale": "50.0", "upstream": "0.0", "local": "0.0"}
        self.assertEqual(dict(tops), wanted)

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
            ("dotproxy_cache_hits_total", (), cache),
            ("dotproxy_cache_misses_total", (), upstream),
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
        pages = dotproxy.AdminPages(*parts, listen="'<listen>", cache_limit=1 << 20)
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
            ([new, two], "", "warn", "Serving: 1 of 2 upstreams up"),
            ([doubtful, two], "", "warn", "Serving: 1 of 2 upstreams up"),
            ([new], "x", "warn", "Starting: no upstream is connected yet"),
            ([down], "", "warn", f"Serving from the cache alone: {outage}"),
            ([new, down], "x", "bad", f"Not serving: {outage}"),
            ([down, lan_down], "x", "bad", f"Not serving: {outage}"),
            ([down, lan], "x", "bad", f"Not serving: {outage}"),
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
            *("second|400|mean", "cache|75\u202f%|75\u202f% since the start"),
            "within|1.5\u202fms|p95\u00a01.95\u202fms, p99\u00a01.99\u202fms",
            *("answered|4,000|since the start", "|cache|3,000|\n|upstream|1,000|"),
        ):
            self.assertIn(claim, text)

    def test_reading_is_taken_each_period(self) -> None:
        self.assertIn("60 min ago", self.draw(seconds=3000.0))

        self.assertAlmostEqual(self.metrics.samples.call_count, 301, delta=1)

    def test_upstream_is_shown_with_what_is_its_own(self) -> None:
        prefix, names, samples = "dotproxy_upstream_", "abcd", self.samples()
        expires = f"{prefix}certificate_expiry_timestamp_seconds"
        for name, days in zip(names, (60.2, 13.0, 1.5, -1.0)):
            duration = dotproxy.Histogram(dotproxy.LATENCIES)
            duration.observe(0.001 * 4 ** names.index(name), 9)
            samples.append((f"{prefix}request_duration_seconds", (name,), duration))
            samples.append((expires, (name,), time.time() + days * 86400 + 60))
        self.metrics.samples.return_value = samples
        page = self.draw(*map(self.upstream, names))
        ends = re.findall('"Certificate">(?:<i class="(.*?)"></i> )?(.*?)<', page)
        delays = re.findall("<small>p95 (.*?)\u202f", page)

        marks, texts = zip(*ends)
        self.assertEqual(marks, ("", "warn", "warn", "bad"))
        self.assertRegex("".join(texts), r"\A60.2\sdays13\sdays1.5\sdaysexpired\Z")
        self.assertEqual(delays, ["0.975", "3.9", "15.6", "62.4"])

    def test_what_others_say_is_escaped_and_nothing_comes_from_elsewhere(self) -> None:
        evil = "<script src=//x>alert(1)</script>\"'&"
        down = self.upstream(f"1#{evil}", "down", 9, error=evil, domain=evil)
        page = self.draw(self.upstream(self.ONE), down)
        text = self.text(page)

        self.assertEqual(text.count(evil), 6)
        self.assertIn("'<listen>", text)
        for link in re.findall('(?:href|src)="(.*?)"', page, re.S):
            self.assertRegex(link, r"\A(data:image/svg\+xml,|[a-z.]+\Z)")
        self.assertNotRegex(page, " (on[a-z]+|style)=")  # which the policy forbids
        self.assertNotIn("url(", dotproxy.STYLE)

    def test_policy_allows_the_style_and_the_script_and_nothing_else(self) -> None:
        policy = dotproxy.STATUS_POLICY
        for text in re.findall("<(?:style|script)>(.*?)</", self.draw(), re.DOTALL):
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            policy = policy.replace(f"-src 'sha256-{digest}'", "")

        wanted = "default-src 'none'; style; script; img-src data:; connect-src 'self'"
        others = "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        self.assertEqual(policy, f"{wanted}; {others}")

    def test_every_source_and_percentile_has_a_colour(self) -> None:
        for name in (*dotproxy.SOURCES, *dotproxy.PERCENTILES):
            self.assertRegex(dotproxy.STYLE, rf"\.{name}\b[^{{]*{{ color: ")


# ---- Command line --------------------------------------------------------------------


def configured(*arguments: str, **environment: str) -> dotproxy.Config:
    """Parse options, with an environment of these DOTPROXY_ variables."""
    variables = {f"DOTPROXY_{name}": text for name, text in environment.items()}
    return dotproxy.parse_args(arguments, variables)


ROUTE = "10.in-addr.arpa=192.0.2.1"
# An option, what is given, and the value: of the option, or of its only item.
OPTIONS: list[tuple[str, str, object]] = [
    ("listen", "127.0.0.1", ("127.0.0.1", 5353)),
    ("listen", "127.0.0.1:0", ("127.0.0.1", 0)),
    ("listen", "0.0.0.0:53", ("0.0.0.0", 53)),
    ("listen", "::1", ("::1", 5353)),
    ("listen", "[::1]", ("::1", 5353)),
    ("listen", "[::]:65535", ("::", 65535)),
    ("listen", "2001:DB8:0::1", ("2001:db8::1", 5353)),
    ("listen", "[fe80::1%eth0]:5300", ("fe80::1%eth0", 5300)),
    ("reuse_port", "yes", True),
    ("tls_listen", "192.0.2.1", ("192.0.2.1", 853)),
    ("tls_listen", "[::]", ("::", 853)),
    ("tls_listen", "fe80::1%eth0", ("fe80::1%eth0", 853)),
    ("tls_listen", "192.0.2.1:8853", ("192.0.2.1", 8853)),
    ("tls_cert", "/etc/chain.pem", "/etc/chain.pem"),
    ("tls_key", "/etc/key.pem", "/etc/key.pem"),
    ("upstream", "192.0.2.1", ("192.0.2.1", 853, "192.0.2.1")),
    ("upstream", "192.0.2.1:8853", ("192.0.2.1", 8853, "192.0.2.1")),
    ("upstream", "192.0.2.1#dot.test", ("192.0.2.1", 853, "dot.test")),
    ("upstream", "192.0.2.1:8853#dot.test", ("192.0.2.1", 8853, "dot.test")),
    ("upstream", "192.0.2.1@8853#dot.test", ("192.0.2.1", 8853, "dot.test")),
    ("upstream", "tls://192.0.2.1", ("192.0.2.1", 853, "192.0.2.1")),
    ("upstream", "tls://dot.test:8853", ("dot.test", 8853, "dot.test")),
    ("upstream", "dns.example.", ("dns.example.", 853, "dns.example")),
    ("upstream", "1dot.4test#other.test", ("1dot.4test", 853, "other.test")),
    ("upstream", "2001:db8::1", ("2001:db8::1", 853, "2001:db8::1")),
    ("upstream", "[2001:db8::1]:53#dot.test", ("2001:db8::1", 53, "dot.test")),
    ("upstream", "2001:db8::1@8853#dot.test", ("2001:db8::1", 8853, "dot.test")),
    ("upstream", "tls://[2001:db8::1]:53", ("2001:db8::1", 53, "2001:db8::1")),
    ("ca_file", "/etc/ca.pem", "/etc/ca.pem"),
    ("route", ROUTE, ("10.in-addr.arpa", ("192.0.2.1", 853, "192.0.2.1"))),
    ("route", "A.Lan.=192.0.2.1#A.b", ("a.lan", ("192.0.2.1", 853, "A.b"))),
    ("route", "lan=tls://192.0.2.1#a.b", ("lan", ("192.0.2.1", 853, "a.b"))),
    ("route", "lan=tcp://192.0.2.1", ("lan", ("192.0.2.1", 53, ""))),
    ("route", "lan=tcp://dns.test:5353", ("lan", ("dns.test", 5353, ""))),
    ("route", "lan=tcp://[2001:db8::1]", ("lan", ("2001:db8::1", 53, ""))),
    ("route", "_tcp.lan=tcp://192.0.2.1@53", ("_tcp.lan", ("192.0.2.1", 53, ""))),
    ("pin", f"Cloudflare-DNS.com.={GOOD_PIN}", ("cloudflare-dns.com", GOOD_PIN)),
    ("tls_min", "1.3", "1.3"),
    ("strategy", "failover", "failover"),
    ("timeout", "2.5", 2.5),
    ("max_in_flight", "77", 77),
    ("max_tcp_clients", "7", 7),
    ("max_tcp_per_client", "5", 5),
    ("allow", "192.0.2.1", ipaddress.ip_network("192.0.2.1/32")),
    ("allow", "192.0.2.7/24", ipaddress.ip_network("192.0.2.0/24")),
    ("allow", "2001:DB8::1/32", ipaddress.ip_network("2001:db8::/32")),
    ("allow", "::/0", ipaddress.ip_network("::/0")),
    ("rate_limit", "20", 20),
    ("cache_size", "64K", 65536),
    ("cache_size", "1g", 1 << 30),
    ("cache_size", "77", 77),
    ("cache_min_ttl", "30", 30),
    ("cache_max_ttl", "3600", 3600),
    ("cache_fail_ttl", "2", 2),
    ("cache_stale", "0", 0),
    ("user", "www-data", "www-data"),
    ("forward_special", "ALL", b"\0"),
    ("forward_special", "Corp.Local.", b"\4corp\5local\0"),
    ("forward_special", "10.in-addr.arpa", b"\x0210\7in-addr\4arpa\0"),
    ("forward_special", "in-addr.arpa", b"\7in-addr\4arpa\0"),
    ("allow_private", "Example.com", b"\7example\3com\0"),
    ("admin", "127.0.0.1:9999", ("127.0.0.1", 9999)),
    ("admin", "9999", ("127.0.0.1", 9999)),
    ("admin", "192.0.2.1", ("192.0.2.1", 9153)),
    ("admin", "[fe80::1%eth0]:0", ("fe80::1%eth0", 0)),
    ("log_level", "debug", "debug"),
    ("log_format", "json", "json"),
    ("query_log", "a.log", "a.log"),
    ("query_log_privacy", "hash", "hash"),
    *(("rate_limit_all", text, True) for text in ("1", "true", "yes", "on", "YES")),
    *(("rate_limit_all", text, False) for text in ("0", "false", "no", "off", "Off")),
    ("block_private_answers", "on", True),
]
# What an option needs beside it, else it is an error.
NEEDED = {
    "query_log_privacy": ("--query-log",),
    "allow_private": ("--block-private-answers",),
}


LONG = "a." * 127 + "a=192.0.2.1"
# An option, what the error says of how to give it, and what cannot be taken.
BAD: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("--listen", "[::1]:5353", ("localhost", "", "[::1", "[::1]53", "192.0.2.1:65536")),
    ("--listen", "[::1]:5353", ("::1:", "::1%", "192.0.2.1:", "192.0.2.1:-1", "5353")),
    ("--listen", "IP address", ("192.0.2.1:dns", "192.0.2.1:٥٣", "192.0.2.256")),
    ("--tls-listen", "127.0.0.1:853", ("localhost", "192.0.2.1:853000")),
    ("--admin", "127.0.0.1:9153", ("localhost:9153", "99999", "")),
    ("--upstream", "9.9.9.9#", ("192.0.2.1:0", "192.0.2.1#", "192.0.2.1#bad name", "")),
    ("--upstream", "HOST[:PORT]", ("https://dot.test", "bad/host", "dns.example..")),
    ("--upstream", "--route", ("tcp://192.0.2.1", "192.0.2.1#dot.test..", "a_%b")),
    ("--upstream", "HOST[:PORT]", ("1.2.3.4.5", "999.1.1.1", "999.1.1.1#dot.test")),
    ("--upstream", "HOST[:PORT]", ("192.0.2.1#1.2.3", "dot.test.53", "53.", "1.2.3")),
    ("--route", "DOMAIN=", ("lan", "lan=", "=192.0.2.1", "lan..=192.0.2.1", LONG)),
    ("--route", "DOMAIN=", ("a b=192.0.2.1", "ł.example=::1", f"{'a' * 64}=192.0.2.1")),
    ("--route", "--upstream", (".=192.0.2.1", "lan=tcp://", "lan=tcp://192.0.2.1:0")),
    ("--route", "in-addr.arpa", ("2001:db8::1=192.0.2.1", "192.0.2.1=192.0.2.1")),
    ("--route", "tcp://HOST", ("lan=tcp://192.0.2.1#dot.test", "lan=tcp://tls://::1")),
    ("--route", "tcp://HOST", ("lan=tcp://999.1.1.1", "lan=tcp://1.2.3.4.5")),
    ("--route", "HOST[:PORT]", ("lan=999.1.1.1", "lan=1.2.3#dot.test")),
    ("--pin", "TLS-NAME=BASE64", ("dot.test", f"bad name={GOOD_PIN}", "1.2.3=AAAA")),
    ("--pin", "44 characters", (f"dot.test={GOOD_PIN[4:]}", f"a={GOOD_PIN[:-4]}_n8=")),
    ("--tls-min", "1.3", ("1.1",)),
    ("--strategy", "fastest", ("best",)),
    ("--timeout", "0.1 to 60", ("0", "nan", "soon", "")),
    ("--max-in-flight", "1 to 30000", ("0", "1.5", "30001")),
    ("--max-tcp-clients", "1 to 10000", ("x",)),
    ("--allow", "2001:db8::/32", ("192.0.2.0/33", "everybody", "")),
    ("--allow", "as an IPv4 network", ("::ffff:192.0.2.0/120",)),
    ("--rate-limit", "0 to", ("-1",)),
    ("--rate-limit-all", "yes or no", ("perhaps", "")),
    ("--cache-size", "32M", ("-1", "1KM", "M", "", "1.5M")),
    ("--cache-max-ttl", "0 to 604800", ("x", "604801")),
    ("--forward-special", "10.in-addr.arpa", ("example.com", "xlocal")),
    ("--allow-private", "example.com", ("192.0.2.1", "2001:db8::1", "a..b", "x..", "")),
    ("--log-level", "debug", ("loud",)),
    ("--ca-file", "path of a file", ("",)),
)


class ConfigTest(DotproxyTestCase):
    def test_table_here_has_every_option(self) -> None:
        fields = set(dotproxy.Config._fields) - {"listen_given"} - dotproxy.ERRANDS

        self.assertEqual({name for name, _, _ in OPTIONS}, fields)

    def test_option_is_taken_from_command_line_and_environment(self) -> None:
        for name, text, value in OPTIONS:
            flag, needed = "--" + name.replace("_", "-"), NEEDED.get(name, ())
            for arguments, environment in (
                ((flag, text), {}),
                ((f"{flag}={text}",), {}),
                ((), {name.upper(): text}),
            ):
                with self.subTest(arguments=arguments, environment=environment):
                    config = configured(*arguments, *needed, **environment)
                    listed = isinstance(getattr(dotproxy.Config(), name), tuple)
                    wanted = (value,) if listed else value
                    self.assertEqual(getattr(config, name), wanted)

    def test_option_without_a_value(self) -> None:
        for option, value in (
            ("--admin", ("127.0.0.1", 9153)),
            ("--query-log", "-"),
            ("--rate-limit-all", True),
            ("--doctor", "quick"),
            ("--healthcheck", True),
        ):
            with self.subTest(option):
                name = option[2:].replace("-", "_")
                self.assertEqual(getattr(configured(option), name), value)

    def test_command_line_wins_over_the_environment_which_has_no_errands(self) -> None:
        default = dotproxy.Config()
        first, second = (("192.0.2.1", 5353),), (("192.0.2.2", 5353),)
        for arguments, environment, listen in (
            ([], {}, default.listen),
            ([], {"LISTEN": "192.0.2.2"}, second),
            (["--listen=192.0.2.1"], {"LISTEN": "192.0.2.2"}, first),
            ([], {"LISTEN": "192.0.2.1,192.0.2.2"}, first + second),
            ([], {"LISTEN": "192.0.2.1 192.0.2.2"}, first + second),
            ([], {"LISTEN": "192.0.2.1, 192.0.2.2,192.0.2.1"}, first + second),
            ([], {"HEALTHCHECK": "1", "DOCTOR": "idle", "TIMEOUT": ""}, default.listen),
            (["--rate-limit-all=no"], {"RATE_LIMIT_ALL": "1"}, default.listen),
            ([], {"ALLOW": " ", "LISTEN": " , "}, default.listen),
        ):
            with self.subTest(arguments=arguments, environment=environment):
                given = listen is not default.listen
                wanted = default._replace(listen=listen, listen_given=given)
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
            ("", [], 7, 4.8),
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
        pin, texts = "--pin=dot.test=" + GOOD_PIN, "lan=192.0.2.1#Dot.test b=tcp://::1"

        config = configured(pin, ROUTE=texts + " LAN=192.0.2.3")

        self.assertEqual([domain for domain, _ in config.route], ["lan", "b", "lan"])
        self.assertEqual(config.pin, (("dot.test", GOOD_PIN),))

    def error_line(self, *arguments: str) -> str:
        """Run the program with bad options; return the line on stderr."""
        with contextlib.ExitStack() as stack:
            stderr = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            stack.enter_context(mock.patch.dict(os.environ, clear=True))
            stack.enter_context(mock.patch("logging.basicConfig"))
            stack.enter_context(mock.patch.object(dotproxy.Daemon, "start", None))
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
            (["--allow-private=example.com"], ["--block-private-answers"]),
            (["--query-log-privacy=hash"], ["needs --query-log"]),
            (["--timeout"], ["--timeout"]),
            (["--tim=1"], ["--tim"]),
            (["--no-such-option"], ["--no-such-option"]),
            (["word"], ["word"]),
            (["@/no/such/file"], ["/no/such/file"]),
            (["--ca-file=/no/such.pem"], ["/no/such.pem", "--ca-file"]),
            ([f"--ca-file={dotproxy.__file__}"], ["dotproxy.py", "no certificate"]),
            (["--tls-listen=::1"], ["needs a certificate: give --tls-cert PEM"]),
            (["--tls-cert=/a.pem"], ["--tls-cert", "give --tls-listen"]),
            (["--tls-key=/a.pem"], ["--tls-key", "give --tls-listen"]),
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

    def printed(self, option: str) -> str:
        stdout, ends = io.StringIO(), self.assertRaises(SystemExit)
        columns = mock.patch.dict(os.environ, COLUMNS="80")
        with contextlib.redirect_stdout(stdout), columns, ends as caught:
            configured(option)
        self.assertFalse(caught.exception.code)
        return stdout.getvalue()

    def test_help_fits_80_columns_and_has_every_option_and_default(self) -> None:
        text = self.printed("--help")

        self.assertLessEqual(max(map(len, text.splitlines())), 80)
        for name, _, _ in OPTIONS:
            self.assertIn("--" + name.replace("_", "-"), text)
        for option, default, _ in options_in_help():
            name = option.split()[0][2:].replace("-", "_").upper()
            if default.partition(":")[0] in ("127.0.0.1", "32M", "no", "4.8", "10000"):
                config = configured(**{name: default})._replace(listen_given=False)
                self.assertEqual(config, dotproxy.Config())
        said = f"dotproxy {dotproxy.__version__}\n"
        self.assertEqual(self.printed("--version"), said)


class BindTest(DotproxyTestCase):
    def test_error_names_the_port_the_likely_holder_and_the_option(self) -> None:
        for number, option, port, words in (
            (errno.EADDRINUSE, "--listen", 5353, ["avahi-daemon", "[::1]:5354"]),
            (errno.EADDRINUSE, "--listen", 53, ["systemd-resolved", "[::1]:8053"]),
            (errno.EADDRINUSE, "--admin", 9153, ["another server", "[::1]:9154"]),
            (errno.EADDRINUSE, "--tls-listen", 853, ["port 853", "[::1]:8853"]),
            (errno.EACCES, "--listen", 53, ["no permission for port 53", "root"]),
            (errno.EADDRNOTAVAIL, "--listen", 53, ["[::1]:53", "no such address"]),
            (errno.ENOBUFS, "--listen", 53, ["[::1]:53", "No buffer space"]),
        ):
            with self.subTest(number=number, port=port):
                error = OSError(number, os.strerror(number))
                text = dotproxy.describe_bind_error(error, ("::1", port), option)
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
            (absent, ["--listen=127.0.0.1:5300", "--listen=[::1]:5300"], "::1.*not s"),
            (absent, ["--tls-listen=[::1]:5300", cert], "::1.*mend --tls-listen"),
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
            for number in (1, 2, 3):
                healthy, line = check()
                self.assertEqual(len(served.upstream.queries), number)
                self.assertRegex(line, r"\Ahealthy: answered in [\d.]+ ms\Z")
                self.assertTrue(healthy)
            served.upstream.stop()
            healthy, line = check()

        self.assertFalse(healthy)
        self.assertRegex(line, r"\Aupstream down: 127.0.0.1:\d+#dot.test: .+")

    def test_proxy_that_is_down_is_told_with_where_it_should_be(self) -> None:
        with socket.socket(type=socket.SOCK_DGRAM) as silent:
            silent.bind((LOCALHOST, 0))
            silence = dotproxy.check_health(silent.getsockname(), 0.01)

        self.assertRegex(silence[1], r"\Aproxy down: no answer from 127.* in 0.01 s\Z")
        for host, line in (
            ("0.0.0.0", "nothing listens on 127.0.0.1:1"),
            ("::", "nothing listens on [::1]:1"),
            ("255.255.255.255", "255.255.255.255:1: Permission denied"),
        ):
            found = dotproxy.check_health((host, 1), 5.0)
            self.assertEqual(found, (False, f"proxy down: {line}"))

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

    def test_flood_of_other_messages_does_not_outlast_the_patience(self) -> None:
        clock = Clock()

        class Flooded(socket.socket):
            def sendall(self, *_: object) -> None:
                pass

            def recv(self, *_: object) -> bytes:
                clock.advance(1)
                return query()

        ticking = mock.patch.object(dotproxy, "elapsed", clock)
        flooded, end = Flooded(type=socket.SOCK_DGRAM), self.assertRaises(UpstreamError)
        with ticking, flooded as link, end:
            dotproxy.ask(link, [dotproxy.HEALTH_QUERY], 5.0)

    def test_answer_tells_of_proxy_and_upstream(self) -> None:
        for rcode, text, healthy, line in (
            (Rcode.NOERROR, "", True, r"healthy: answered in \d+\.\d ms"),
            (Rcode.NXDOMAIN, "", True, "healthy: .*"),
            (Rcode.NOTIMP, "", True, "healthy: .*"),
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
        found = dotproxy.look_at_host(configured(*options))
        return {finding.check: finding for finding in found}

    def address(
        self, address: Address, option: str = "--listen", given: bool = True
    ) -> dotproxy.Finding:
        """Try an address of an option."""
        with contextlib.ExitStack() as taken:
            config = dotproxy.Config(listen_given=given)
            check = dotproxy.check_address, config, taken, option, address
            return dotproxy.look("address", *check)

    def test_clock_is_judged_by_the_release_and_the_certificates(self) -> None:
        finding = functools.partial(dotproxy.Finding, "upstream", "certificate")
        good, past = finding(OK, "for a.test"), finding(FAIL, "certificate expired")
        early = finding(FAIL, "certificate not valid yet: ...")
        other = finding(FAIL, "certificate is for other.test")
        for seconds, certificates, result in (
            *((-1, [good], FAIL), (1, [], OK), (1, [past, good], OK)),
            *((1, [other], OK), (1, [past], WARN), (1, [early, other], WARN)),
        ):
            moment = dotproxy.RELEASED + seconds
            now = mock.patch.object(time, "time", return_value=moment)
            with self.subTest(certificates=certificates), now:
                found = dotproxy.look("clock", dotproxy.check_clock, certificates)
                self.assertEqual(found.result, result)
                self.assertEqual("set the clock" in found.cure, result != OK)

    def test_host_is_judged_with_the_cure(self) -> None:
        needed = dotproxy.count_descriptors(configured())
        nofile, unlimited = "descriptors", resource.RLIM_INFINITY
        for argument, uid, limit, check, result, text in (
            ("", 0, needed, nofile, OK, f"{needed}, of which {needed} may be used"),
            ("", 0, needed - 1, nofile, WARN, f"but {needed} may be needed"),
            ("", 0, unlimited, nofile, OK, f"no limit, of which {needed} may"),
            ("--route=a=tcp://b", 0, needed, nofile, WARN, f"{needed}, but"),
            ("", 0, needed, "user", OK, "root becomes nobody ("),
            ("--user=4711", 0, needed, "user", OK, "root becomes 4711 (4711)"),
            ("--user=root", 0, needed, "user", WARN, "root stays root"),
            ("--user=no-such", 0, needed, "user", FAIL, "there is no user or group"),
            ("", 4711, needed, "user", OK, "4711, not root"),
            ("--user=4712", 4711, needed, "user", FAIL, "only root can become user"),
            ("--tls-listen=[::1]:0", 0, needed, "options", FAIL, "needs a certificate"),
            ("--tls-cert=/none", 0, needed, "options", FAIL, "is for encrypted"),
            ("--query-log=/none/log", 0, needed, "options", FAIL, "cannot write to"),
            ("--query-log=/", 0, needed, "options", FAIL, "cannot write to /"),
        ):
            user = mock.patch.object(os, "geteuid", return_value=uid)
            limits = mock.patch.object(resource, "getrlimit", return_value=(64, limit))
            with self.subTest(text), user, limits:
                found = self.look(*argument.split())[check]
                self.assertEqual((found.result, not found.cure), (result, result == OK))
                self.assertIn(text, found.detail)

    def test_host_that_is_well_is_described(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "query.log")
            found = self.look(f"--query-log={path}")
            self.assertFalse(os.path.exists(path))

        addresses = ["127.0.0.1:5353", "[::1]:5353"]
        checks = ["options", "program", *addresses, "user", "descriptors"]
        self.assertEqual(list(found), checks)
        self.assertEqual(found["options"].detail, "valid; 2 to listen on, 4 upstream")
        self.assertIn(f"dotproxy {dotproxy.__version__}, Py", found["program"].detail)

    def test_authorities_are_counted_with_where_they_are_from(self) -> None:
        nothing = {"SSL_CERT_FILE": "/nonexistent/a", "SSL_CERT_DIR": "/nonexistent/b"}
        made: list[dotproxy.Trust] = []
        for file, result, text in (
            (PKI.ca, OK, f"1 from {PKI.ca}"),
            ("/nonexistent.pem", FAIL, "cannot read the CA file /nonexistent.pem"),
            (None, FAIL, "none in /nonexistent/a"),
        ):
            check = dotproxy.check_authorities, dotproxy.Config(ca_file=file), made
            with self.subTest(file), mock.patch.dict(os.environ, nothing):
                found = dotproxy.look("CA certificates", *check)
                self.assertEqual(found.result, result)
                self.assertIn(text, found.detail)
                self.assertEqual("give --ca-file PEM" in found.cure, result == FAIL)

    def test_address_that_the_host_does_not_have(self) -> None:
        for host, given, result in (
            *(("192.0.2.1", True, FAIL), ("192.0.2.1", False, OK)),
            ("fe80::1%none", True, FAIL),
        ):
            found = self.address((host, 5353), given=given)
            self.assertEqual(found.result, result)

    def test_address_that_was_closed_a_moment_ago_is_free(self) -> None:
        with socket.create_server((LOCALHOST, 0)) as listener:
            address = listener.getsockname()
            with socket.create_connection(address):
                listener.accept()[0].close()  # this end stays, in TIME_WAIT

        found = self.address(address)
        self.assertEqual((found.result, found.detail), (OK, "free"))

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

    def test_address_is_let_go_where_not_all_of_it_is_free(self) -> None:
        def find_holders(port: int) -> str:
            with self.assertRaises(ConnectionRefusedError):
                socket.create_connection((LOCALHOST, port))
            return "named (pid 8)"

        self.have(mock.patch.object(dotproxy, "HEALTH_GRACE", 0.01))
        self.have(mock.patch.object(dotproxy, "find_holders", find_holders))
        with socket.socket(type=socket.SOCK_DGRAM) as holder:
            holder.bind((LOCALHOST, 0))
            found = self.address(holder.getsockname())

        self.assertEqual(found.detail, "taken by named (pid 8)")

    def test_options_that_want_the_same_port_are_told(self) -> None:
        with socket.create_server((LOCALHOST, 0)) as holder:
            port = holder.getsockname()[1]
        for one, other, clash in (
            (LOCALHOST, f"--admin=0.0.0.0:{port}", True),
            (LOCALHOST, f"--tls-listen={LOCALHOST}:{port}", True),
            (LOCALHOST, f"--admin=[::1]:{port}", False),
            ("0.0.0.0", f"--listen=[::]:{port}", False),
        ):
            with self.subTest(other):
                found = self.look(f"--listen={one}:{port}", other).values()
                told = [finding.detail for finding in found]
                self.assertEqual("taken by another option" in told, clash)

    def test_port_that_is_held_is_judged_by_its_holder(self) -> None:
        ours, runs = "dotproxy (pid 7)", "held by dotproxy (pid 7), which runs"
        well, ill = (True, "healthy: it"), (False, "upstream down: no")
        gone, unseen = (False, "proxy down: no"), "a program that cannot be seen"
        with socket.create_server((LOCALHOST, 0)) as server:
            for option, holder, health, result, text in (
                ("--listen", ours, well, OK, f"{runs}; healthy: it"),
                ("--listen", ours, ill, WARN, f"{runs}; upstream down: no"),
                ("--listen", "named (pid 8)", well, FAIL, "taken by named (pid 8)"),
                ("--listen", "", ill, WARN, f"taken by {unseen}; upstream down: no"),
                ("--listen", "", gone, FAIL, f"taken by {unseen}"),
                ("--admin", ours, ill, OK, runs),
                ("--admin", "nginx (pid 9)", ill, FAIL, "taken by nginx (pid 9)"),
                ("--tls-listen", "", ill, WARN, f"taken by {unseen}"),
            ):
                state = mock.Mock(return_value=holder), mock.Mock(return_value=health)
                names = "find_holders", "check_health"
                held = mock.patch.multiple(dotproxy, **dict(zip(names, state)))
                with self.subTest(option=option, text=text), held:
                    found = self.address(server.getsockname(), option)
                    self.assertEqual((found.result, found.detail), (result, text))
                    self.assertEqual("another port" in found.cure, "taken" in text)


def servfail_with_reason(message: Message, _: FakeConnection) -> Reply:
    """Answer SERVFAIL with an Extended DNS Error."""
    return response(message.raw, rcode=2, options=option(EDE, b"\0\x17for a reason"))


class ExaminationTest(DotproxyTestCase):
    def examine(
        self,
        where: FakeUpstream | Endpoint,
        *,
        trust: dotproxy.Trust = TRUST,
        domain: str = "",
        idle: bool = False,
    ) -> Findings:
        """Examine an upstream."""
        if isinstance(where, FakeUpstream):
            plain = where.on_accept == "plain"
            where = Endpoint(where.host, where.port, "" if plain else "dot.test")
        examination = dotproxy.Examination((domain, where), trust, idle)
        examination.run()
        findings = examination.findings
        subject = f"{where} for {domain}" if domain else str(where)
        self.assertEqual({finding.subject for finding in findings}, {subject})
        return {finding.check: finding for finding in findings}

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
            "padding": "none: answers of 43 octets",
            "keepalive": "not told",
            "resumption": "session resumed, handshake in ",
            "order": "no answer overtook another",
        }.items():
            with self.subTest(check):
                self.assertIn(text, found.pop(check).detail)
        self.assertEqual(found, {})
        self.assertEqual({len(each.raw) % 128 for each in upstream.queries}, {0})

    def test_upstream_that_fails_is_told_with_the_cure(self) -> None:
        self.have(mock.patch.object(dotproxy, "STEP", 0.5))
        trust = dotproxy.Trust(PKI.ca, pins=[("dot.test", GOOD_PIN)])
        port, handshake = "this port is for DNS over TLS", "handshake"
        for upstream, check, text, cure in (
            (FakeUpstream(on_accept="hang"), handshake, "no end of", "open TCP port"),
            (FakeUpstream(on_accept="garbage"), handshake, "wrong version", port),
            (FakeUpstream(on_accept="close"), handshake, "closed during the", port),
            (FakeUpstream(certificate=PKI.wrong_name), "", "for other.test", "#NAME"),
            (FakeUpstream(certificate=PKI.expired), "", "expired", "renew it there"),
            (FakeUpstream(certificate=PKI.unknown_ca), "", "unknown CA", "--ca-file"),
            (FakeUpstream(certificate=PKI.good2), "", "another key", GOOD2_PIN),
            (FakeUpstream(silence), "answers", "no answer", "it is a DNS resolver"),
            (FakeUpstream(close), "answers", "closed by the server", "try again"),
            (FakeUpstream(servfail_with_reason), "answers", "for a reason", "operator"),
        ):
            check = check or "certificate"
            with self.subTest(text), upstream:
                found = self.examine(upstream, trust=trust)
                self.assertEqual((list(found)[-1], found[check].result), (check, FAIL))
                self.assertIn(text, found[check].detail)
                self.assertIn(cure, found[check].cure)
                if check != "answers":
                    self.assertEqual(list(found), ["connect", check])
                    self.assertEqual(upstream.queries, [])

    def test_failure_of_other_kinds_is_told(self) -> None:
        self.have(mock.patch.object(dotproxy, "ask", side_effect=RuntimeError("oh")))
        with FakeUpstream() as upstream:
            found = self.examine(upstream, domain="corp.example")
        self.assertEqual(found["answers"][2:4], (FAIL, "RuntimeError('oh')"))
        self.assertIn("another --route", found["answers"].cure)

        found = self.examine(Endpoint(LOCALHOST, 1, "dns.example"))
        self.assertIn("connection refused", found["connect"].detail)
        self.assertIn("the address and the port in --upstream", found["connect"].cure)

        with mock.patch.object(socket, "getaddrinfo", side_effect=socket.gaierror):
            found = self.examine(Endpoint("dns.example", 853, "dns.example"))
        self.assertIn("cannot look up the address", found["connect"].detail)
        self.assertIn("--upstream ADDRESS#dns.example", found["connect"].cure)

    def test_alert_is_told_with_its_cure(self) -> None:
        for number, words in (
            (40, "handshake failure: it takes other ciphers"),
            (70, "protocol version: the server does not speak TLS 1.2"),
            (80, "internal error: it is broken"),
            (112, "unrecognized name: check the name behind # in --upstream"),
            (116, "certificate required: it wants to see a certificate"),
            (120, "no application protocol: check in --upstream that this port is"),
            (255, ": check in --upstream that this port is for DNS over TLS"),
        ):
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            tls = TRUST.context.wrap_bio(incoming, outgoing, server_hostname="a.test")
            with self.subTest(words), self.assertRaises(ssl.SSLError) as raised:
                with contextlib.suppress(ssl.SSLWantReadError):
                    tls.do_handshake()
                incoming.write(bytes([21, 3, 3, 0, 2, 2, number]))
                tls.do_handshake()
            error = dotproxy.describe_tls_error(raised.exception, TRUST)
            self.assertRegex(str(error), f"TLS handshake failed: .*{words}")

    def test_answers_out_of_order_are_noticed(self) -> None:
        held: list[Message] = []

        def script(message: Message, connection: FakeConnection) -> Reply:
            if message.qname.endswith("example.com"):
                held.append(message)
                return None
            late = [response(each.raw) for each in held if comes]
            connection.send(response(message.raw), *late)
            held.clear()
            return None

        for comes, limit in ((True, 2.5), (False, 0.3)):
            step = mock.patch.object(dotproxy, "STEP", limit)
            with self.subTest(comes=comes), step, FakeUpstream(script) as upstream:
                found = self.examine(upstream)["order"]
                self.assertEqual(found.detail, "answers as they are ready")

    def test_what_can_be_better_and_what_servers_offer_is_told(self) -> None:
        padding = option(PADDING, bytes(468 - 17 - 11 - 6 - 4))
        options = option(KEEPALIVE, b"\0\x64") + padding
        self.have(mock.patch.multiple(dotproxy, SLOW=0.0, SAMPLE_TIME=0.0001))
        self.have(mock.patch.object(dotproxy, "EXPIRY_NOTICE", math.inf))
        self.have(mock.patch.object(ssl.SSLSocket, "session", None))
        with FakeUpstream(lambda it, _: response(it.raw, options=options)) as upstream:
            found = self.examine(upstream)

        for check, result, text, cure in (
            ("keepalive", OK, "^10 s", ""),
            ("padding", OK, "^answers of 468 octets", ""),
            ("latency", WARN, r"most of 1\)", "look for what is in the way"),
            ("certificate", WARN, "days left", "have its operator renew it"),
            ("resumption", OK, "session not resumed", ""),
        ):
            self.assertEqual(found[check].result, result)
            self.assertRegex(found[check].detail, text)
            self.assertIn(cure, found[check].cure)

    def test_idle_life_is_measured(self) -> None:
        for timeout, limit, text in (
            (0.3, 5.0, r"closed after 0\.[3-9] s"),
            (None, 0.1, r"still open after 0\.\d s"),
        ):
            self.have(mock.patch.object(dotproxy, "IDLE_LIMIT", limit))
            with self.subTest(text), FakeUpstream(idle_timeout=timeout) as upstream:
                self.assertRegex(self.examine(upstream, idle=True)["idle"].detail, text)

    def test_plain_server_of_a_domain_is_asked_for_that_alone(self) -> None:
        with FakeUpstream(on_accept="plain") as server:
            found = self.examine(server, domain="corp.example")

        self.assertEqual({finding.result for finding in found.values()}, {OK})
        self.assertEqual(found["handshake"].detail, "none: plain DNS in clear text")
        self.assertFalse({"resumption", "pin", "certificate"} & set(found))
        names = {message.qname for message in server.queries}
        self.assertEqual({name[-12:] for name in names}, {"corp.example"})
        sizes = {len(message.raw) for message in server.queries}
        self.assertEqual(max(sizes), 12 + 17 + 18 + 11 + 4)  # nothing is padded


class DoctorReportTest(DotproxyTestCase):
    def test_report_has_each_check_and_cure_for_people_and_machines(self) -> None:
        report = [
            dotproxy.Finding("this host", "clock", OK, "it ticks"),
            dotproxy.Finding("192.0.2.1:853", "connect", OK, "1.0 ms"),
            dotproxy.Finding("192.0.2.1:853", "certificate", FAIL, "\x1b[31m", "mend"),
        ]
        lines = [
            "this host",
            "  clock        ok    it ticks",
            "192.0.2.1:853",
            "  connect      ok    1.0 ms",
            "  certificate  FAIL  \\027[31m",
            "",
            "3 checks: 1 failed, 0 to note",
            "  192.0.2.1:853, certificate: mend",
        ]
        first = {"subject": "this host", "check": "clock", "result": OK}
        first |= {"detail": "it ticks", "cure": ""}

        self.assertEqual(dotproxy.text_report(report).splitlines(), lines)
        for findings, result in ((report, FAIL), (report[:1], OK)):
            found = json.loads(dotproxy.json_report(findings))
            self.assertEqual((found["result"], found["checks"][0]), (result, first))
            self.assertEqual(len(found["checks"]), len(findings))

    def test_host_comes_first_then_each_upstream(self) -> None:
        for certificate, result in ((PKI.good, OK), (PKI.expired, WARN)):
            with FakeUpstream(certificate=certificate) as upstream:
                found = dotproxy.examine(configure(upstream, host=LOCALHOST_V6))
            subjects = list(dict.fromkeys(finding.subject for finding in found))
            host = {f.check: f for f in found if f.subject == subjects[0]}

            where = f"127.0.0.1:{upstream.port}#dot.test"
            self.assertEqual(subjects, ["this host", where])
            checks = ["options", "program", "[::1]:0", "user", "descriptors"]
            self.assertEqual(list(host), [*checks, "CA certificates", "clock"])
            self.assertEqual(host["clock"].result, result)
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
                ([f"--upstream={v6}"], [FAIL]),
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

    def line_with(self, word: str, timeout: float = 10.0) -> str:
        """Wait for a line of output with this word."""
        deadline = time.monotonic() + timeout
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

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def wait(self, number: int = 0) -> int:
        """Send it a signal, if one is given, and return the exit status at its end."""
        if number:
            self.signal(number)
        octets, _ = self._process.communicate(timeout=10)
        self.output += octets.decode()
        return self._process.returncode


class LivenessTest(DotproxyTestCase):
    def test_loops_note_that_they_turn(self) -> None:
        with serving() as served:
            for server in served.daemon.servers:
                server.turned_at = -math.inf
            wait_until(lambda: served.daemon.is_turning(time.monotonic()))

    def test_watchdog_hears_nothing_while_a_loop_hangs(self) -> None:
        with contextlib.ExitStack() as stack:
            for kind in (dotproxy.UDPServer, dotproxy.TCPServer):
                stack.enter_context(mock.patch.object(kind, "service_actions"))
            daemon = stack.enter_context(serving()).daemon
            for server in daemon.servers:
                server.turned_at = time.monotonic() + 60.0
            well = daemon.report()
            daemon.servers[0].turned_at = time.monotonic() - daemon.STUCK

            self.assertEqual(daemon.report(), ["STATUS=a receiving loop hangs"])
        self.assertEqual(well[0], "WATCHDOG=1")
        self.assertRegex(well[1], r"\ASTATUS=1 of 1 upstreams up, 0 queries in flight")


class DaemonTest(DotproxyTestCase):
    def test_end_comes_in_an_order_that_loses_no_answer(self) -> None:
        ends: list[str] = []
        with contextlib.ExitStack() as stack:
            for kind, name in (
                (dotproxy.AdminServer, "shutdown"),
                (dotproxy.Clients, "close"),
                (dotproxy.Proxy, "drain"),
                (dotproxy.WorkerPool, "close"),
                (dotproxy.Proxy, "close"),
                (dotproxy.Timer, "close"),
                (dotproxy.UDPServer, "server_close"),
            ):
                real, label = getattr(kind, name), f"{kind.__name__}.{name}"

                def end(*each: object, real: Any = real, label: str = label) -> object:
                    ends.append(label)
                    return real(*each)

                stack.enter_context(mock.patch.object(kind, name, end))
            with serving(answer, "--admin=0", *ENCRYPTED):
                pass

        pool = "WorkerPool.close"
        first = ["AdminServer.shutdown", "Clients.close", "Proxy.drain", pool]
        last = ["Proxy.close", "Timer.close", "UDPServer.server_close"]
        self.assertEqual([end for end, _ in itertools.groupby(ends)], first + last)

    def test_start_that_fails_leaves_nothing_open(self) -> None:
        with (
            socket.create_server((LOCALHOST, 0)) as holder,
            FakeUpstream() as upstream,
            tempfile.TemporaryDirectory() as directory,
        ):
            log = f"--query-log={directory}/query.log"
            config = configure(upstream, log, f"--admin={holder.getsockname()[1]}")
            before = len(os.listdir("/dev/fd"))
            self.assertRaises(dotproxy.ConfigError, dotproxy.Daemon, config)

            self.assertEqual(len(os.listdir("/dev/fd")), before)


class MainTest(DotproxyTestCase):
    @unittest.skipUnless(sys.platform == "linux", "needs /proc")
    def test_socket_of_systemd_no_standard_streams_and_few_descriptors(self) -> None:
        udp = listener(socket.SOCK_DGRAM)
        shell = 'ulimit -Sn 256; LISTEN_PID=$$ exec "$0" "$@" 3<&0 <&- >&- 2>&-'
        command = ["sh", "-c", shell, sys.executable, compiled_program()]
        with udp, Notifications() as heard, FakeUpstream() as upstream:
            where = f"--upstream={LOCALHOST}:{upstream.port}#dot.test"
            options = where, f"--ca-file={PKI.ca}"
            variables = {"NOTIFY_SOCKET": heard.path, "LISTEN_FDS": "1"}
            process = subprocess.Popen(
                [*command, *options],
                env={**os.environ, **variables},
                stdin=udp.fileno(),
            )
            self.assertEqual(heard.next(), "READY=1")
            self.check_answered(UDPClient(udp.getsockname()))
            found = {os.readlink(f"/proc/{process.pid}/fd/{n}") for n in range(3)}
            with open(f"/proc/{process.pid}/limits", encoding="ascii") as file:
                limits = file.read()
            process.terminate()
            self.assertEqual(process.wait(10), 0)

        self.assertEqual(found, {os.devnull})
        self.assertNotRegex(limits, r"Max open files +256 ")

    def check_answered(self, client: Client) -> None:
        with client:
            client.send(query())
            self.assertEqual(parse(client.receive()).addresses, ["192.0.2.1"])

    def test_port_0_is_told_and_all_transports_answer(self) -> None:
        with FakeUpstream() as upstream:
            options = "--listen=[::1]:0", "--admin=0", *ENCRYPTED
            with Program.before(upstream, *options) as program:
                for address in program.addresses():
                    self.check_answered(UDPClient(address))
                    self.check_answered(TCPClient(address))
                self.check_answered(TLSClient(program.addresses("tls")[0]))
                socket.create_connection(program.addresses("admin")[0]).close()
                self.assertEqual(program.wait(signal.SIGTERM), 0)

        words = " INFO certificate loaded: ", " INFO ready: ", " INFO stopping"
        for line, word in zip(program.output.splitlines(), words):
            self.assertIn(word, line)
        self.assertEqual(program.output.count("\n"), len(words))

    def test_port_taken_is_one_line_and_status_1(self) -> None:
        for option, kind in (
            ("--listen", socket.SOCK_DGRAM),
            ("--listen", socket.SOCK_STREAM),
            ("--admin", socket.SOCK_STREAM),
        ):
            with self.subTest(option, kind=kind), listener(kind) as holder:
                port = holder.getsockname()[1]
                options = [f"--listen={LOCALHOST}:0", f"{option}={LOCALHOST}:{port}"]
                with Program(f"--ca-file={PKI.ca}", *options) as program:
                    self.assertEqual(program.wait(), 1)
                said = rf"\Adotproxy: .*port {port} is taken.* {option} "
                self.assertRegex(program.output, said)
                self.assertEqual(program.output.count("\n"), 1)

    def test_signal_ends_it_once_queries_in_flight_are_answered(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            hold = Hold()
            with (
                self.subTest(number=number),
                FakeUpstream(hold) as upstream,
                Program.before(upstream) as program,
                UDPClient(program.addresses()[0]) as udp,
                TCPClient(program.addresses()[0]) as tcp,
            ):
                udp.send(query("udp.test"))
                tcp.send(query("tcp.test"))
                upstream.wait_for(lambda u: len(u.queries) == 2)
                program.signal(number)
                program.line_with("stopping")
                hold.release(2)
                for client in (udp, tcp):
                    self.assertEqual(parse(client.receive()).addresses, ["192.0.2.1"])
                self.assertEqual(program.wait(), 0)

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
                self.assertEqual(program.wait(signal.SIGTERM), 0)

        user = os.geteuid() or "nobody"
        self.assertEqual((len(public.queries), len(private.queries)), (0, 2))
        for pattern in (
            rf" upstream=\S+ route=example.com={where} user={user} nofile=\d+ um",
            rf" not encrypted: domain=example.com upstream={where}\n",
            r" state: in_flight=0 cache_entries=1 cache_bytes=\d+\n",
            rf" state: name={where} state=up latency_ms=\d+\.\d overdue_ms=\d+\.\d "
            r"idle_life_s=\d+\.\d connections=1 domain=example.com\n",
        ):
            self.assertEqual(len(re.findall(pattern, program.output)), 1, pattern)

    def test_every_line_of_json_is_of_the_schema(self) -> None:
        with FakeUpstream() as upstream:
            options = ["--log-format=json", "--query-log", "--log-level=debug"]
            with Program.before(upstream, *options) as program:
                ready = json.loads(program.line_with("ready:"))
                port = int(ready["labels.listen"].rpartition(":")[2])
                with UDPClient((LOCALHOST, port)) as client:
                    for _ in range(3):
                        client.send(query())
                        client.receive()
                program.signal(signal.SIGUSR1)
                program.line_with("state: name=")
                self.assertEqual(program.wait(signal.SIGTERM), 0)

        lines = [json_line(line) for line in program.output.splitlines()]
        asked = [line for line in lines if line["event.dataset"] == "dotproxy.query"]
        sources = [line["labels.source"] for line in asked]
        ports = [line.get("destination.port") for line in asked]
        self.assertCountEqual(sources, ["upstream", "cache", "cache"])
        self.assertIn(upstream.port, ports)
        self.assertIn("stopping", [line.get("message") for line in lines])

    def test_supervisor_hears_of_the_start_a_reload_and_the_end(self) -> None:
        status = r"\AWATCHDOG=1\nSTATUS=1 of 1 upstreams up"
        with FakeUpstream() as upstream, Notifications() as heard:
            variables = {"NOTIFY_SOCKET": heard.path}
            with Program.before(upstream, **variables) as program:
                self.assertEqual(heard.next(), "READY=1")
                self.assertRegex(heard.next(), status)
                program.signal(signal.SIGHUP)
                self.assertRegex(heard.next(), r"\ARELOADING=1\nMONOTONIC_USEC=\d+\Z")
                self.assertEqual(heard.next(), "READY=1")
                self.assertRegex(heard.next(), status)
                program.signal(signal.SIGTERM)
                self.assertEqual(heard.next(), "STOPPING=1\nWATCHDOG=1")
                self.assertEqual(program.wait(), 0)

    def test_sighup_reads_the_certificate_again_and_keeps_connections(self) -> None:
        with tempfile.NamedTemporaryFile(suffix=".pem") as file, FakeUpstream() as up:
            os.chmod(file.name, 0o644)  # root is nobody by the time it is read again
            rotate(file.name, PKI.good)
            options = "--tls-listen=127.0.0.1:0", f"--tls-cert={file.name}"
            with Program.before(up, *options) as program:
                (address,) = program.addresses("tls")
                with TLSClient(address) as client:
                    rotate(file.name, PKI.good2)
                    program.output = ""
                    program.signal(signal.SIGHUP)
                    program.line_with("certificate loaded")
                    with TLSClient(address) as other:
                        self.assertNotEqual(other.certificate, client.certificate)
                    self.check_answered(client)

    def test_health_check_from_the_environment_alone(self) -> None:
        with FakeUpstream() as upstream, Program.before(upstream) as program:
            ((_, port),) = program.addresses()
            for listen, status in ((f"127.0.0.1:{port}", 0), ("127.0.0.1:0", 1)):
                with Program("--healthcheck", DOTPROXY_LISTEN=listen) as check:
                    self.assertEqual(check.wait(), status)
                self.assertEqual(check.output.count("\n"), 1)

    def test_doctor_prints_a_report_and_its_status(self) -> None:
        with FakeUpstream() as upstream, Program.before(upstream, "--doctor") as good:
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


class Source:
    """dotproxy.py as lines, and as a tree."""

    def __init__(self) -> None:
        text = read_beside("dotproxy.py")
        self.lines, self.tree = text.splitlines(), ast.parse(text)

    def longer_than(self, limit: int, kind: type[ast.stmt]) -> set[str]:
        """Return the names of the definitions of this kind above the limit."""
        nodes = [node for node in ast.walk(self.tree) if isinstance(node, kind)]
        return {getattr(n, "name", "") for n in nodes if self.length(n) > limit}

    def length(self, node: ast.stmt) -> int:
        """Count the lines with code: no comments, no docstrings, no blank ones."""
        numbers = set(range(node.lineno, (node.end_lineno or 0) + 1))
        for each in ast.walk(node):
            if isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant):
                numbers -= set(range(each.lineno, (each.end_lineno or 0) + 1))
        lines = [self.lines[number - 1].strip() for number in numbers]
        return sum(bool(line) and not line.startswith("#") for line in lines)


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
    LONG_CLASSES = frozenset(
        ("Cache", "Link", "Proxy", "StreamHandler", "Upstream", "UpstreamGroup")
    )
    BUDGETS: ClassVar[dict[str, int]] = {  # lines; of a directory: of all in it
        "dotproxy.py": 7000,
        "test_dotproxy.py": 9000,
        ".ci": 2200,
        "README.md": 750,
    }
    source: Source

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.source = Source()

    def test_definitions_use_only_what_is_above_them(self) -> None:
        known: set[str] = set()
        found: dict[str, int] = {}  # where each name was used too early first
        for node in self.source.tree.body:
            defined, used = names_of(node)
            early = {name: line for name, line in found.items() if name in defined}
            self.assertEqual(early, {}, "used above their definition, in lines")
            known |= defined
            found.update(dict.fromkeys(used - known, node.lineno))

    def test_what_the_docstring_names_is_there(self) -> None:
        text = ast.get_docstring(self.source.tree) or ""
        known: dict[str, str] = {}  # by class, with what it inherits
        for node in self.source.tree.body:
            if isinstance(node, ast.ClassDef):
                lines = self.source.lines[node.lineno - 1 : node.end_lineno]
                bases = [known.get(getattr(b, "id", ""), "") for b in node.bases]
                known[node.name] = "\n".join([*lines, *bases])
        for owner, more in re.findall(r"\b([A-Z]\w+)\.(\w+(?:(?:,| and) _\w+)*)", text):
            for name in re.findall(r"\w+", more.replace(" and ", " ")):
                with self.subTest(f"{owner}.{name}"):
                    self.assertRegex(known[owner], rf"(def |self\.){name}\b")

    def test_whatever_is_logged_is_noted(self) -> None:
        every = map(names_of, self.source.tree.body)
        users = [defined for defined, used in every if "logger" in used]

        self.assertEqual(users, [{"note"}])

    def test_no_function_is_longer_than_40_lines_of_code(self) -> None:
        self.assertEqual(self.source.longer_than(40, ast.FunctionDef), set())

    def test_no_class_is_longer_than_150_lines_of_code(self) -> None:
        # One that is listed and is no more so long fails the test as well.
        self.assertEqual(self.source.longer_than(150, ast.ClassDef), self.LONG_CLASSES)

    def test_no_line_is_longer_than_88_columns(self) -> None:
        found = [
            number
            for number, line in enumerate(self.source.lines, 1)
            if len(line.partition("  # type: ignore")[0]) > 88
        ]

        self.assertEqual(found, [])

    def test_no_file_outgrows_its_budget(self) -> None:
        for name, most in self.BUDGETS.items():
            path = pathlib.Path(dotproxy.__file__).parent / name
            files = [each for each in (path, *path.glob("*")) if each.is_file()]
            with self.subTest(name):
                lines = sum(each.read_bytes().count(b"\n") for each in files)
                self.assertLessEqual(lines, most)

    def test_readme_table_is_what_help_says(self) -> None:
        rows = re.findall(r"^\| `(--.*)\|$", read_beside("README.md"), re.M)
        table = [
            tuple(cell.replace("`", "").strip() for cell in f"`{row}".split("|"))
            for row in rows
        ]

        found = [row for row in table if row[0] != "--version"]

        self.assertEqual(found, options_in_help())


def options_in_help() -> list[tuple[str, ...]]:
    """Return the options as --help has them: name, default and meaning."""
    found: list[tuple[str, ...]] = []
    for action in dotproxy.build_parser()._actions:
        if action.dest not in ("help", "version"):
            value = f"[{action.metavar}]" if action.nargs == "?" else action.metavar
            name = f"{action.option_strings[-1]} {value or ''}".rstrip()
            meaning, _, default = str(action.help).rstrip(")").partition(" (default: ")
            found.append((name, default, meaning))
    return found


# ---- Deployment ----------------------------------------------------------------------


class ImageTest(DotproxyTestCase):
    dockerfile: str
    lists: dict[str, list[str]]

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.dockerfile = read_beside("Dockerfile").replace("\\\n", "")
        found = re.findall(r'^ARG (\w+)="(.*)"$', cls.dockerfile, re.M)
        cls.lists = {name: words.split() for name, words in found}

    def test_every_module_that_is_imported_is_in_it(self) -> None:
        wanted = {name.partition(".")[0] for name in dotproxy.LATE_MODULES}
        for node in ast.walk(Source().tree):
            if isinstance(node, ast.Import):
                wanted.update(alias.name.partition(".")[0] for alias in node.names)
            if isinstance(node, ast.ImportFrom):
                wanted.add(str(node.module).partition(".")[0])

        wanted -= {"ctypes", "encodings"}  # for root alone; a list of its own
        held = {*self.lists["MODULES"], *self.lists["EXTENSIONS"]}
        self.assertEqual(wanted - held - set(sys.builtin_module_names), set())

    def test_lists_are_sorted_and_have_each_name_once(self) -> None:
        self.assertEqual(set(self.lists), {"MODULES", "CODECS", "EXTENSIONS"})
        for name, words in self.lists.items():
            self.assertEqual(words, sorted(set(words)), name)

    def test_has_the_version_and_listens_on_the_ports_exposed(self) -> None:
        self.assertIn(f'image.version="{dotproxy.__version__}"', self.dockerfile)
        (text,) = re.findall(r'^ENV DOTPROXY_LISTEN="(.*)"$', self.dockerfile, re.M)

        listen = configured(LISTEN=text).listen
        self.assertEqual(listen, (("0.0.0.0", 5353), ("::", 5353)))
        self.assertIn("\nEXPOSE 5353/udp 5353/tcp\n", self.dockerfile)

    def test_health_check_is_the_entry_point_with_its_option(self) -> None:
        found = re.findall(r'^(?:.* CMD|ENTRYPOINT) \["(.*)"\]$', self.dockerfile, re.M)

        check, entry = (text.split('", "') for text in found)
        self.assertEqual(check, [*entry, "--healthcheck"])
        self.assertIn("--healthcheck", dotproxy.build_parser().format_help())


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
        found: list[tuple[str, str]] = []
        for pattern in (
            r"\bDOTPROXY_(\w+): (.+)",
            r"name: DOTPROXY_(\w+)\n +value: (.+)",
            r"Environment=DOTPROXY_(\w+)=(.+)",
        ):
            found += re.findall(pattern, "\n".join(self.blocks.values()))

        self.assertGreaterEqual(len(found), 6)
        for name, text in found:
            with self.subTest(name=name, text=text):
                self.assertIn(name.lower(), dotproxy.Config._fields)
                configured(**{name: text})

    def test_commands_have_options_that_exist(self) -> None:
        lines = self.readme.replace("\\\n", "")
        commands = re.findall(r"^    [$#] .*dotproxy\.py( .*)", lines, re.M)
        used = re.findall(r" (--[a-z-]+)", "".join(commands))
        actions = dotproxy.build_parser()._actions
        own = {name for action in actions for name in action.option_strings}

        self.assertGreater(len(used), 5)
        self.assertEqual(set(used) - own, set())

    def test_manifests_fit_the_image(self) -> None:
        dockerfile = read_beside("Dockerfile")
        (user,) = re.findall(r"^USER (\d+):\d+$", dockerfile, re.M)
        (ports,) = re.findall(r"^EXPOSE (.*)$", dockerfile, re.M)

        published = re.findall(r'"53:(\d+/\w+)"', self.blocks["compose.yaml"])
        self.assertEqual(published, ports.split())
        manifest = self.blocks["dotproxy.yaml"]
        numbers = re.findall(r"runAs(?:User|Group): (\d+)", manifest)
        self.assertEqual(numbers, [user, user])
        dns = r"name: dns(?:-tcp)?, containerPort: (\d+), protocol: (\w+)"
        opened = ["/".join(each).lower() for each in re.findall(dns, manifest)]
        self.assertEqual(opened, ports.split())
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
