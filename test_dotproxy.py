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
import contextlib
import errno
import functools
import gc
import grp
import hashlib
import heapq
import html.parser
import http.client
import importlib
import inspect
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import pwd
import py_compile
import queue
import random
import re
import resource
import select
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
import tokenize
import tracemalloc
import types
import unittest
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar, Union
from unittest import mock

import dotproxy
from dotproxy import (
    Cache,
    Connection,
    Dispatcher,
    Endpoint,
    Exchange,
    Fleet,
    FormatError,
    Health,
    HedgeBudget,
    IdleLife,
    Plan,
    Proxy,
    Rcode,
    SleepDetector,
    Upstream,
    UpstreamError,
    UpstreamGroup,
    Verdict,
)

if TYPE_CHECKING:
    from _typeshed import TraceFunction

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
        """List the A and AAAA answers as text."""
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
    name: str | bytes,
    rrtype: str | int,
    rdata: bytes,
    ttl: int = 300,
    rrclass: int = 1,
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
    owner = name if isinstance(name, bytes) else encode_name(name)
    number = rrtype if isinstance(rrtype, int) else RRTYPES[rrtype]
    header = HEADER.pack(id, flags, 1, 0, 0, do is not None)
    message = header + owner + struct.pack("!HH", number, rrclass)
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
        return _parse(message)
    except (IndexError, struct.error) as error:
        raise ValueError(f"message of {len(message)} bytes ends early") from error


def _parse(message: bytes) -> Message:
    id, flags, questions, *counts = HEADER.unpack_from(message)
    qname, qtype, qclass, offset = "", 0, 0, HEADER.size
    if questions:
        qname, offset = decode_name(message, offset)
        qtype, qclass = struct.unpack_from("!HH", message, offset)
        offset += 4
    question = message[HEADER.size : offset]
    sections: list[list[Record]] = []
    for count in counts:
        sections.append([])
        for _ in range(count):
            entry, offset = _parse_record(message, offset)
            sections[-1].append(entry)
    answers, authority, additional = sections
    opts = [entry for entry in additional if entry.type == OPT]
    if questions > 1 or offset != len(message) or len(opts) > 1:
        raise ValueError(f"{questions} questions, {len(opts)} OPT, end at {offset}")
    if any(entry.type == OPT for entry in answers + authority):
        raise ValueError("OPT outside the additional section")
    if opts and opts[0].name != ".":
        raise ValueError(f"OPT of {opts[0].name}")
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
    options, offset = [], 0
    while offset < len(opt.rdata):
        code, size = struct.unpack_from("!HH", opt.rdata, offset)
        data = opt.rdata[offset + 4 : offset + 4 + size]
        if len(data) < size:
            raise ValueError(f"option {code} past the end")
        options.append((code, data))
        offset += 4 + size
    return Opt(opt.rrclass, opt.ttl >> 16 & 0xFF, opt.ttl & 0xFFFF, options)


# ---- Test certificates ---------------------------------------------------------------
# The standard library cannot make certificates, so these are embedded: nothing of them
# is secret. Made with OpenSSL 3.0, in an empty directory, in bash:
#
#   cat > ca.cnf <<'END'
#   [ca]
#   default_ca = test
#   [test]
#   database = index.txt
#   new_certs_dir = .
#   rand_serial = yes
#   unique_subject = no
#   default_md = sha256
#   policy = any
#   [any]
#   commonName = supplied
#   [root]
#   basicConstraints = critical,CA:TRUE
#   keyUsage = critical,keyCertSign,cRLSign
#   subjectKeyIdentifier = hash
#   [leaf]
#   subjectAltName = $ENV::SAN
#   keyUsage = critical,digitalSignature
#   extendedKeyUsage = serverAuth
#   authorityKeyIdentifier = keyid
#   END
#   touch index.txt
#   export SAN=DNS:dot.test
#   for key in ca ca2 leaf leaf2; do
#     openssl ecparam -name prime256v1 -genkey -noout -out $key.key
#   done
#   sign() {  # KEY CN CERTIFICATE START END OPTION...
#     openssl req -new -key $1.key -subj "/CN=$2" -out request.pem
#     openssl ca -batch -notext -config ca.cnf -in request.pem -out $3.pem \
#       -startdate $4 -enddate $5 "${@:6}"
#   }
#   from=20200101000000Z to=21000101000000Z
#   by_ca="-cert ca.pem -keyfile ca.key -extensions leaf"
#   by_ca2="-cert ca2.pem -keyfile ca2.key -extensions leaf"
#   sign ca "dotproxy test CA" ca $from $to -selfsign -keyfile ca.key -extensions root
#   sign ca2 "unknown CA" ca2 $from $to -selfsign -keyfile ca2.key -extensions root
#   sign leaf dot.test expired $from 20200201000000Z $by_ca
#   sign leaf dot.test unknown_ca $from $to $by_ca2
#   SAN=DNS:other.test,DNS:alias.other.test
#   sign leaf other.test wrong_name $from $to $by_ca
#   SAN=DNS:dot.test,IP:127.0.0.1,IP:::1
#   sign leaf dot.test good $from $to $by_ca
#   sign leaf2 dot.test good2 $from $to $by_ca

CA_PEM = """\
-----BEGIN CERTIFICATE-----
MIIBfDCCASKgAwIBAgIUGOVzXHjBD5HAzPJqkJCz2nWxCxowCgYIKoZIzj0EAwIw
GzEZMBcGA1UEAwwQZG90cHJveHkgdGVzdCBDQTAgFw0yMDAxMDEwMDAwMDBaGA8y
MTAwMDEwMTAwMDAwMFowGzEZMBcGA1UEAwwQZG90cHJveHkgdGVzdCBDQTBZMBMG
ByqGSM49AgEGCCqGSM49AwEHA0IABKrgP+AEBJaNkSR4aAbZDtb+9mOByoGilTom
VDg8R1aJk4oWcfriu7EB5R/o9tVnPJ3+fxbLrd5EnBepTDURWMyjQjBAMA8GA1Ud
EwEB/wQFMAMBAf8wDgYDVR0PAQH/BAQDAgEGMB0GA1UdDgQWBBRmbIvZ9kARRz7p
nd0k8mJPWMEaETAKBggqhkjOPQQDAgNIADBFAiEAzkstFLNcrQiCcBbv47c+n0LG
V3AsFnWfVCrnFm05IasCIFTWXAK7DvcgSIHgj5Xh251fFGFtsw8pVvWH3WeFTXiH
-----END CERTIFICATE-----
"""
GOOD_PEM = """\
-----BEGIN CERTIFICATE-----
MIIByDCCAW6gAwIBAgIUae4WOPXRN37LhbxnWasOh6PjFCgwCgYIKoZIzj0EAwIw
GzEZMBcGA1UEAwwQZG90cHJveHkgdGVzdCBDQTAgFw0yMDAxMDEwMDAwMDBaGA8y
MTAwMDEwMTAwMDAwMFowEzERMA8GA1UEAwwIZG90LnRlc3QwWTATBgcqhkjOPQIB
BggqhkjOPQMBBwNCAAR3tmYN4Hywvqk3gvKUtz4PWCShAnkrZ3MtrkYsm72GbOVV
medwMYz6k00o4dOMMSqN4D6Tgbv83LbXMdvO+c/yo4GVMIGSMCsGA1UdEQQkMCKC
CGRvdC50ZXN0hwR/AAABhxAAAAAAAAAAAAAAAAAAAAABMA4GA1UdDwEB/wQEAwIH
gDATBgNVHSUEDDAKBggrBgEFBQcDATAfBgNVHSMEGDAWgBRmbIvZ9kARRz7pnd0k
8mJPWMEaETAdBgNVHQ4EFgQUUK+IZFmSsGg6ZbjcLzixfJfjTawwCgYIKoZIzj0E
AwIDSAAwRQIgV3yZtn2wKIUa/haEtypmcXuKKsq+GamZEoh4aB5PV+0CIQCIMcVq
PpENnvzrhYHmTJMhw3ysO6Cay9DD7AnqFRgayA==
-----END CERTIFICATE-----
"""
GOOD2_PEM = """\
-----BEGIN CERTIFICATE-----
MIIByDCCAW6gAwIBAgIUIAZldEqzNsUcFP/lc0rZi7Z1hL4wCgYIKoZIzj0EAwIw
GzEZMBcGA1UEAwwQZG90cHJveHkgdGVzdCBDQTAgFw0yMDAxMDEwMDAwMDBaGA8y
MTAwMDEwMTAwMDAwMFowEzERMA8GA1UEAwwIZG90LnRlc3QwWTATBgcqhkjOPQIB
BggqhkjOPQMBBwNCAASDNyrqMmNRnuvJqnXeuy3KX9ZCnc2Jjbelb9l6RYDGAi6p
r/ESf3m9QkEDW4Au6zxSdYWvrwYc+7dG7AFqZSFho4GVMIGSMCsGA1UdEQQkMCKC
CGRvdC50ZXN0hwR/AAABhxAAAAAAAAAAAAAAAAAAAAABMA4GA1UdDwEB/wQEAwIH
gDATBgNVHSUEDDAKBggrBgEFBQcDATAfBgNVHSMEGDAWgBRmbIvZ9kARRz7pnd0k
8mJPWMEaETAdBgNVHQ4EFgQUc1j0o66pmJvFCY+C1UBn4xcDCh0wCgYIKoZIzj0E
AwIDSAAwRQIgYDly0UwlgKAXnGEKZ3lzhLFNIQs4NN0+hgqEJkApwYwCIQCtXBj4
cBxlK2dEHaeIem2DXrXwY+nr/3BOR6cOiP1MCg==
-----END CERTIFICATE-----
"""
WRONG_NAME_PEM = """\
-----BEGIN CERTIFICATE-----
MIIBxjCCAWygAwIBAgIUcRhtA+AZF9UqUz/fSkKsj4vWZqYwCgYIKoZIzj0EAwIw
GzEZMBcGA1UEAwwQZG90cHJveHkgdGVzdCBDQTAgFw0yMDAxMDEwMDAwMDBaGA8y
MTAwMDEwMTAwMDAwMFowFTETMBEGA1UEAwwKb3RoZXIudGVzdDBZMBMGByqGSM49
AgEGCCqGSM49AwEHA0IABHe2Zg3gfLC+qTeC8pS3Pg9YJKECeStncy2uRiybvYZs
5VWZ53AxjPqTTSjh04wxKo3gPpOBu/zcttcx2875z/KjgZEwgY4wJwYDVR0RBCAw
HoIKb3RoZXIudGVzdIIQYWxpYXMub3RoZXIudGVzdDAOBgNVHQ8BAf8EBAMCB4Aw
EwYDVR0lBAwwCgYIKwYBBQUHAwEwHwYDVR0jBBgwFoAUZmyL2fZAEUc+6Z3dJPJi
T1jBGhEwHQYDVR0OBBYEFFCviGRZkrBoOmW43C84sXyX402sMAoGCCqGSM49BAMC
A0gAMEUCIB9eAT4pogoKgh5nq8iX5rIXCxy/akQTLdE35zGoF8PDAiEAt9v2p3MQ
hRaTlNqBRBvhY9+MNC2fARkRAnJxKmO40rs=
-----END CERTIFICATE-----
"""
EXPIRED_PEM = """\
-----BEGIN CERTIFICATE-----
MIIBrDCCAVKgAwIBAgIUDSKmCvpwrUT+2rgksfyN2Ntua+EwCgYIKoZIzj0EAwIw
GzEZMBcGA1UEAwwQZG90cHJveHkgdGVzdCBDQTAeFw0yMDAxMDEwMDAwMDBaFw0y
MDAyMDEwMDAwMDBaMBMxETAPBgNVBAMMCGRvdC50ZXN0MFkwEwYHKoZIzj0CAQYI
KoZIzj0DAQcDQgAEd7ZmDeB8sL6pN4LylLc+D1gkoQJ5K2dzLa5GLJu9hmzlVZnn
cDGM+pNNKOHTjDEqjeA+k4G7/Ny21zHbzvnP8qN8MHowEwYDVR0RBAwwCoIIZG90
LnRlc3QwDgYDVR0PAQH/BAQDAgeAMBMGA1UdJQQMMAoGCCsGAQUFBwMBMB8GA1Ud
IwQYMBaAFGZsi9n2QBFHPumd3STyYk9YwRoRMB0GA1UdDgQWBBRQr4hkWZKwaDpl
uNwvOLF8l+NNrDAKBggqhkjOPQQDAgNIADBFAiEAtMkQwPqVPZ5HVI44JFzPLA2u
o2HISMAiBH1MVKpwf7wCIDy9TexZuSbnV5M/YVHJQGS/i4dQnUHBUbeAhpYr16H8
-----END CERTIFICATE-----
"""
UNKNOWN_CA_PEM = """\
-----BEGIN CERTIFICATE-----
MIIBqTCCAU6gAwIBAgIUfeGHpm7KB3v40Q29HLc7/VDIYbIwCgYIKoZIzj0EAwIw
FTETMBEGA1UEAwwKdW5rbm93biBDQTAgFw0yMDAxMDEwMDAwMDBaGA8yMTAwMDEw
MTAwMDAwMFowEzERMA8GA1UEAwwIZG90LnRlc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAAR3tmYN4Hywvqk3gvKUtz4PWCShAnkrZ3MtrkYsm72GbOVVmedwMYz6
k00o4dOMMSqN4D6Tgbv83LbXMdvO+c/yo3wwejATBgNVHREEDDAKgghkb3QudGVz
dDAOBgNVHQ8BAf8EBAMCB4AwEwYDVR0lBAwwCgYIKwYBBQUHAwEwHwYDVR0jBBgw
FoAUOgdduz4GiA05jUv91DEMvBNbP6EwHQYDVR0OBBYEFFCviGRZkrBoOmW43C84
sXyX402sMAoGCCqGSM49BAMCA0kAMEYCIQD9/8d1qAa01/yekFRvUImfeMxLuNEN
MbfosPBk8iRVegIhAM3fcn5oOk7CquWMQKiclXHe328BbKq2XAVR9X/r8k+b
-----END CERTIFICATE-----
"""
KEY_PEM = """\
-----BEGIN EC PRIVATE KEY-----
MHcCAQEEIM6e4gS0iyFGltj3UN3eRrU76OrPBXKUaJIIR6IjB5LXoAoGCCqGSM49
AwEHoUQDQgAEd7ZmDeB8sL6pN4LylLc+D1gkoQJ5K2dzLa5GLJu9hmzlVZnncDGM
+pNNKOHTjDEqjeA+k4G7/Ny21zHbzvnP8g==
-----END EC PRIVATE KEY-----
"""
KEY2_PEM = """\
-----BEGIN EC PRIVATE KEY-----
MHcCAQEEIA28pA3mfQmxStT0hfdJX8nMqIaa6Xqzrdr/Qw0FSnKAoAoGCCqGSM49
AwEHoUQDQgAEgzcq6jJjUZ7ryap13rstyl/WQp3NiY23pW/ZekWAxgIuqa/xEn95
vUJBA1uALus8UnWFr68GHPu3RuwBamUhYQ==
-----END EC PRIVATE KEY-----
"""

# KEY_PEM, by "openssl ec -aes128 -passout pass:secret".
LOCKED_KEY_PEM = """\
-----BEGIN EC PRIVATE KEY-----
Proc-Type: 4,ENCRYPTED
DEK-Info: AES-128-CBC,DE024510EE4856D8245CF4BB34C40283

2MKcYRVt6w1r0V3WWPC4oS4nPxubwyjwgxiwKm78N5/f/cDw5uXkHkgz3YZwXzKJ
VY/zPewMP/iwFtHr8mykDhui8G+XETV4tT2vwNu3tsoHNkxHiSYlMycBcTW7OKsN
FRgt8UXql/Vw+tJTDwkFolZk7VDKv+BDFKefyktoEhc=
-----END EC PRIVATE KEY-----
"""


# What `openssl x509 -in CERTIFICATE -noout -pubkey | openssl pkey -pubin -outform der |
# openssl dgst -sha256 -binary | base64` says of them.
GOOD_PIN = "mF8wdp+yevnQ3G2qcaAd9lGoIK7AdTOlg3zVlNYfBn8="
GOOD2_PIN = "gg0bWKruO4CpkuOaTZrVjAgZf5HExQcX367Jwdnueuw="
CA_PIN = "k9TcbEld9MuT+GHIaNR0/Ye8THBBMsxsHCyivyoNIys="


def _write_pem(name: str, *blocks: str) -> str:
    path = os.path.join(_directory.name, f"{name}.pem")
    with open(path, "w", encoding="ascii") as file:
        file.writelines(blocks)
    return path


_directory = tempfile.TemporaryDirectory(prefix="dotproxy-test-")
atexit.register(_directory.cleanup)


class PKI:
    """Paths of the test certificates; the first ones, but `ca`, with their key."""

    ca = _write_pem("ca", CA_PEM)
    good = _write_pem("good", GOOD_PEM, KEY_PEM)
    good2 = _write_pem("good2", GOOD2_PEM, KEY2_PEM)
    wrong_name = _write_pem("wrong_name", WRONG_NAME_PEM, KEY_PEM)
    expired = _write_pem("expired", EXPIRED_PEM, KEY_PEM)
    unknown_ca = _write_pem("unknown_ca", UNKNOWN_CA_PEM, KEY_PEM)
    good_alone = _write_pem("good_alone", GOOD_PEM)
    key_alone = _write_pem("key_alone", KEY_PEM)
    key2_alone = _write_pem("key2_alone", KEY2_PEM)
    locked_key = _write_pem("locked_key", LOCKED_KEY_PEM)


# ---- Clock ---------------------------------------------------------------------------


class Clock:
    """A monotonic clock that stands still until told to advance."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


# ---- Clients -------------------------------------------------------------------------
# A wait that ends at its timeout raises socket.timeout (TimeoutError since 3.10).

Address = tuple[str, int]


def frame(*messages: bytes) -> bytes:
    """Put the two-byte length before each message (RFC 1035 section 4.2.2)."""
    return b"".join(struct.pack("!H", len(each)) + each for each in messages)


class UDPClient:
    """A DNS client over UDP that hears the server's own address only."""

    def __init__(self, server: Address, timeout: float = 5.0) -> None:
        family = socket.AF_INET6 if ":" in server[0] else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_DGRAM)
        self.socket.settimeout(timeout)
        self.socket.connect(server)

    def __enter__(self) -> UDPClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, *messages: bytes) -> None:
        """Send messages, each in a datagram."""
        for message in messages:
            self.socket.send(message)

    def receive(self) -> bytes:
        """Return the next datagram."""
        return self.socket.recv(65535)


class TCPClient:
    """A DNS client over TCP; one deadline for all."""

    def __init__(
        self, server: Address, timeout: float = 5.0, *, source: str = ""
    ) -> None:
        self._deadline = time.monotonic() + timeout
        self.socket = socket.create_connection(
            server[:2], timeout, (source, 0) if source else None
        )
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> TCPClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, *messages: bytes) -> None:
        """Send messages, each with its length, in one write."""
        self.send_raw(frame(*messages))

    def send_raw(self, data: bytes) -> None:
        """Send bytes as they are."""
        self._limit()
        self.socket.sendall(data)

    def receive(self) -> bytes:
        """Return the next message, or raise EOFError if the server closed."""
        return self._read(int.from_bytes(self._read(2), "big"))

    def half_close(self) -> None:
        """Tell the server that nothing more will be sent."""
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

    def __enter__(self) -> TLSClient:
        return self

    @property
    def certificate(self) -> bytes:
        """The certificate that the server has shown."""
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
# FakeUpstream          a DoT server whose answers a script gives; one accept thread
#   FakeConnection      one client of it; its thread alone touches its socket
#     Mailbox           how other threads have that thread do something
# Script                called as script(message, connection) for each query, returns:
#   str                 an address: answer with it
#   bytes               a message: answer with it
#   None                no answer, or the script has done it with the connection's means
#   another script      to be called in turn
# Wherever a script is expected, what it returns may stand instead: FakeUpstream("::1").

T = TypeVar("T")
Reply = Union[str, bytes, "Script", None]
Script = Callable[[Message, "FakeConnection"], Reply]


class Mailbox:
    """Let one thread wait for its socket and for calls that other threads post."""

    def __init__(self, watched: socket.socket) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._reader, self._writer = socket.socketpair()
        self._poll = select.poll()
        self._poll.register(watched, select.POLLIN)
        self._poll.register(self._reader, select.POLLIN)

    def post(self, call: Callable[[], None]) -> None:
        """Have the waiting thread make a call; nothing happens once it is closed."""
        self._calls.put(call)
        with contextlib.suppress(OSError):
            self._writer.send(b"!")

    def wait(self, timeout: float | None) -> bool:
        """Wait for the socket or make one posted call; False if the time is over."""
        ready = dict(self._poll.poll(None if timeout is None else timeout * 1000))
        if self._reader.fileno() in ready:
            self._reader.recv(1)
            self._calls.get()()
        return bool(ready)

    def close(self) -> None:
        """Close both ends."""
        self._reader.close()
        self._writer.close()


class FakeConnection:
    """One client of a fake upstream.

    Scripts run in its thread and may call anything here; others only `call`.
    """

    def __init__(
        self, upstream: FakeUpstream, client: socket.socket, context: ssl.SSLContext
    ) -> None:
        self.upstream = upstream
        self.queries: list[Message] = []
        self.server_name: str | None = None
        self.alpn: str | None = None
        self.version: str | None = None
        self.resumed = False
        self.closed = False
        self.thread = threading.Thread(
            target=self._run,
            name=f"fake-connection-{len(upstream.accepted) + 1}",
            daemon=True,
        )
        self._socket = client
        self._context = context
        self._mailbox = Mailbox(client)

    def call(self, action: Callable[[], None]) -> None:
        """Have the connection's thread make a call; any thread may ask for it."""
        self._mailbox.post(action)

    def perform(self, reply: Reply, message: Message) -> None:
        """Do what a script or its result says."""
        if isinstance(reply, str):
            self.send(response(message.raw, reply))
        elif isinstance(reply, bytes):
            self.send(reply)
        elif reply is not None:
            self.perform(reply(message, self), message)

    def send(self, *messages: bytes) -> None:
        """Send messages, each with its length, in one TLS record."""
        self.send_raw(frame(*messages))

    def send_raw(self, data: bytes) -> None:
        """Send bytes as they are in one TLS record."""
        self._socket.settimeout(5)
        self._socket.sendall(data)
        self._socket.settimeout(0)

    def close(self) -> None:
        """Close with a TLS close_notify and FIN, as a good server does."""
        if isinstance(self._socket, ssl.SSLSocket):
            with contextlib.suppress(OSError, ValueError):
                self._socket.unwrap()  # does not wait for the client's close_notify
        self.cut()

    def cut(self) -> None:
        """Close with FIN alone."""
        self.closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
            while self._socket.recv(65536):
                pass  # data left unread would turn the close into a reset
        self._socket.close()

    def reset(self) -> None:
        """Close with RST."""
        self.closed = True
        linger = struct.pack("ii", 1, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._socket.close()

    def _run(self) -> None:
        try:
            self._serve()
        except OSError:
            pass  # the client has gone, or does not like our TLS
        except Exception as error:  # of a script, or a malformed query: fails the test
            self.upstream.failures.append(error)
        finally:
            self.closed = True
            self._socket.close()
            self._mailbox.close()
            self.upstream.changed()

    def _serve(self) -> None:
        self._socket.settimeout(0)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.upstream.on_accept == "tls":
            self._handshake()
            self._read_queries()
        elif self.upstream.on_accept == "plain":
            self._read_queries()
        elif self.upstream.on_accept == "close":
            self.cut()
        else:
            if self.upstream.on_accept == "garbage":
                self._socket.send(b"220 mail.example.com ESMTP\r\n")
            while self._receive():
                pass  # the ClientHello falls on deaf ears

    def _handshake(self) -> None:
        self.upstream.local.connection = self  # for the server name callback
        self._socket.getpeername()  # raises if gone; wrap_socket would leak the socket
        tls = self._socket = self._context.wrap_socket(
            self._socket, server_side=True, do_handshake_on_connect=False
        )
        while not self.closed:
            with contextlib.suppress(ssl.SSLWantReadError):
                tls.do_handshake()
                break
            self._wait()
        self.alpn = tls.selected_alpn_protocol()
        self.resumed = bool(tls.session_reused)
        self.version = tls.version()
        self.upstream.changed()

    def _read_queries(self) -> None:
        stream = b""
        while data := self._receive():
            stream += data
            while len(stream) >= 2 + (size := int.from_bytes(stream[:2], "big")):
                self._take(parse(stream[2 : 2 + size]))
                stream = stream[2 + size :]
        if not self.closed:
            self.close()

    def _take(self, message: Message) -> None:
        if self.closed:
            return
        self.queries.append(message)
        self.upstream.queries.append(message)
        self.upstream.changed()
        self.perform(self.upstream.script, message)

    def _receive(self) -> bytes:
        """Wait for bytes: none at the end of the stream and after a close."""
        while self._wait():
            with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError):
                return self._socket.recv(65536)
        return b""

    def _wait(self) -> bool:
        """Wait until there may be something to read: False if closed."""
        if self.closed:
            return False
        if isinstance(self._socket, ssl.SSLSocket) and self._socket.pending():
            return True
        if not self._mailbox.wait(self.upstream.idle_timeout):
            self.close()
        return not self.closed


answer: Reply = "192.0.2.1"
silence: Reply = None
empty_frame: Reply = b""


def close(message: Message, connection: FakeConnection) -> None:
    """Close instead of answering, with close_notify."""
    connection.close()


def cut(message: Message, connection: FakeConnection) -> None:
    """Close instead of answering, without close_notify."""
    connection.cut()


def reset(message: Message, connection: FakeConnection) -> None:
    """Reset the connection instead of answering."""
    connection.reset()


def short_frame(message: Message, connection: FakeConnection) -> None:
    """Send the first half of the answer, then close."""
    whole = frame(response(message.raw, "192.0.2.1"))
    connection.send_raw(whole[: len(whole) // 2])
    connection.close()


def garbage(message: Message, connection: FakeConnection) -> None:
    """Send what is no DNS at all."""
    connection.send_raw(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 1000)


def trickle(message: Message, connection: FakeConnection) -> None:
    """Answer byte by byte, each in a TLS record of its own."""
    for byte in frame(response(message.raw, "192.0.2.1")):
        connection.send_raw(bytes([byte]))


def wrong_id(message: Message, connection: FakeConnection) -> Reply:
    """Answer with an ID that was not asked with (unless 65535 others were)."""
    answered = response(message.raw, "192.0.2.1")
    return struct.pack("!H", message.id ^ 0xFFFF) + answered[2:]


def wrong_question(message: Message, connection: FakeConnection) -> Reply:
    """Answer another question under the ID of this one."""
    other = query("wrong.example.net", message.qtype, id=message.id)
    return response(other, "192.0.2.66")


def other_case(message: Message, connection: FakeConnection) -> Reply:
    """Answer with the letters of the question swapped in case."""
    swapped = query(message.qname.swapcase(), message.qtype, id=message.id)
    return response(swapped, "192.0.2.1")


def not_a_response(message: Message, connection: FakeConnection) -> Reply:
    """Send the query back: QR is 0."""
    return message.raw


def in_turn(*replies: Reply) -> Script:
    """Give the first reply to the first query and so on; the last one stays."""
    left = list(replies)
    lock = threading.Lock()  # guards left: connections share the script

    def script(message: Message, connection: FakeConnection) -> Reply:
        with lock:
            return left.pop(0) if len(left) > 1 else left[0]

    return script


def by_name(replies: dict[str, Reply], default: Reply = answer) -> Script:
    """Choose the reply by the lower-case name of the question."""
    return lambda message, _: replies.get(message.qname.lower(), default)


def together(count: int) -> Script:
    """Answer every `count` queries of a connection at once, in one TLS record."""

    def script(message: Message, connection: FakeConnection) -> None:
        if len(connection.queries) % count == 0:
            asked = connection.queries[-count:]
            connection.send(*[response(each.raw, "192.0.2.1") for each in asked])

    return script


class Hold:
    """Hold queries until told to release: a script for late and reordered answers."""

    def __init__(self, reply: Reply = answer) -> None:
        self._reply = reply
        # Guards _held; notified when a query is added.
        self._condition = threading.Condition()
        self._held: list[tuple[Message, FakeConnection]] = []

    def __call__(self, message: Message, connection: FakeConnection) -> None:
        with self._condition:
            self._held.append((message, connection))
            self._condition.notify_all()

    def release(
        self, count: int = 1, *, reverse: bool = False, timeout: float = 5.0
    ) -> None:
        """Wait until at least `count` are held, then reply to all that are."""
        with self._condition:
            if not self._condition.wait_for(lambda: len(self._held) >= count, timeout):
                raise AssertionError(f"{len(self._held)} queries held, not {count}")
            held, self._held = self._held, []
        for message, connection in reversed(held) if reverse else held:
            connection.call(functools.partial(connection.perform, self._reply, message))


class FakeUpstream:
    """A DoT server in this process that does as its script says.

    Its attributes may be changed at any time: `script` counts from the next query,
    `on_accept` from the next connection, the certificate from the next start. A failure
    in a script, or a malformed query, is raised at the end of the `with` block.
    """

    def __init__(
        self,
        script: Reply = answer,
        *,
        certificate: str = PKI.good,
        host: str = "127.0.0.1",
        port: int = 0,
        on_accept: str = "tls",
        maximum_version: ssl.TLSVersion | None = None,
        idle_timeout: float | None = None,
    ) -> None:
        self.script = script
        self.certificate = certificate
        self.host, self.port = host, port
        self.on_accept = on_accept  # or "plain", "hang", "close", "garbage"
        self.maximum_version = maximum_version
        self.idle_timeout = idle_timeout
        self.queries: list[Message] = []
        self.accepted: list[FakeConnection] = []
        self.failures: list[Exception] = []
        self.local = threading.local()
        self._condition = threading.Condition()  # notified on every change
        self._thread: threading.Thread | None = None

    def __enter__(self) -> FakeUpstream:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stop()
        if kind is None and self.failures:
            raise self.failures[0]

    @property
    def address(self) -> Address:
        """Where it listens."""
        return self.host, self.port

    @property
    def live(self) -> list[FakeConnection]:
        """List the connections that are open."""
        return [each for each in self.accepted if not each.closed]

    @property
    def connections(self) -> int:
        """Count the accepted connections."""
        return len(self.accepted)

    @property
    def handshakes(self) -> int:
        """Count the connections that completed the TLS handshake."""
        return sum(connection.version is not None for connection in self.accepted)

    @property
    def resumed(self) -> int:
        """Count the handshakes that resumed a session."""
        return sum(connection.resumed for connection in self.accepted)

    def start(self) -> None:
        """Listen: on any free port at first, on the same one ever after."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        self._listener = socket.create_server(self.address, family=family)
        self._listener.settimeout(0)
        self.port = self._listener.getsockname()[1]
        self._mailbox = Mailbox(self._listener)
        self._stopping = False
        self._context = self._build_context()
        self._thread = threading.Thread(
            target=self._accept, name=f"fake-upstream-{self.port}", daemon=True
        )
        self._thread.start()

    def stop(self, *, reset: bool = False) -> None:
        """Refuse connections and close those there are; may be started again."""
        if self._thread:
            self._mailbox.post(self._stop)
            self._thread.join()
            self._thread = None
        self.drop_connections(reset=reset)

    def drop_connections(self, *, reset: bool = False) -> None:
        """Close all connections, with close_notify and FIN or with RST."""
        with self._condition:
            connections = self.accepted.copy()
        for connection in connections:
            connection.call(connection.reset if reset else connection.close)
        for connection in connections:
            connection.thread.join(10)

    def wait_for(
        self, predicate: Callable[[FakeUpstream], bool], timeout: float = 5.0
    ) -> None:
        """Wait until the predicate of the upstream holds, or fail the test."""
        with self._condition:
            if not self._condition.wait_for(lambda: predicate(self), timeout):
                raise AssertionError(
                    f"upstream saw {self.connections} connections ({len(self.live)} "
                    f"open), {self.handshakes} handshakes, {len(self.queries)} queries"
                )

    def changed(self) -> None:
        """Wake those who wait: for the connections' use."""
        with self._condition:
            self._condition.notify_all()

    def _accept(self) -> None:
        with self._listener, contextlib.closing(self._mailbox):
            while not self._stopping:
                self._mailbox.wait(None)
                with contextlib.suppress(BlockingIOError, ConnectionError):
                    self._welcome(self._listener.accept()[0])

    def _welcome(self, client: socket.socket) -> None:
        connection = FakeConnection(self, client, self._context)
        with self._condition:
            self.accepted.append(connection)
            connection.thread.start()
            self._condition.notify_all()

    def _stop(self) -> None:
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
    ) -> None:
        self.local.connection.server_name = name


# ---- Harness -------------------------------------------------------------------------
# A whole proxy before a fake upstream, as `Daemon` builds it from options.

LOCALHOST, LOCALHOST_V6 = "127.0.0.1", "::1"
EDE, SUBNET, COOKIE, KEEPALIVE, PADDING, UNKNOWN_OPTION = 15, 8, 10, 11, 12, 65001
Client = Union[UDPClient, TCPClient]


class ErrorLog(logging.Handler):
    """Keeps what dotproxy logs as an error of its own."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the line, with the traceback."""
        self.lines.append(self.format(record))


ERROR_LOG = ErrorLog()
dotproxy.logger.addHandler(ERROR_LOG)
dotproxy.logger.propagate = False


class DotproxyTestCase(unittest.TestCase):
    """Fails where a test leaves a thread, or has dotproxy log an error of its own."""

    def setUp(self) -> None:
        ERROR_LOG.lines.clear()
        self.addCleanup(self._check, set(threading.enumerate()))

    def _check(self, before: set[threading.Thread]) -> None:
        self.assertEqual(set(threading.enumerate()) - before, set(), "threads left")
        self.assertEqual(ERROR_LOG.lines, [], "errors logged")


def wait_until(claim: Callable[[], bool], timeout: float = 5.0) -> None:
    """Wait for something that tells nobody when it happens, or fail the test."""
    deadline = time.monotonic() + timeout
    while not claim():
        if time.monotonic() > deadline:
            raise AssertionError(f"not so within {timeout} s")
        time.sleep(0.001)


class Served(NamedTuple):
    """A running proxy and the upstream behind it."""

    upstream: FakeUpstream
    daemon: dotproxy.Daemon

    @property
    def address(self) -> Address:
        """Where the proxy listens."""
        host, port = self.tcp.server_address[:2]
        return str(host), int(port)

    @property
    def tcp(self) -> dotproxy.TCPServer:
        """The first TCP server."""
        servers = self.daemon.servers
        return next(s for s in servers if isinstance(s, dotproxy.TCPServer))

    @property
    def tls(self) -> dotproxy.TLSServer:
        """The first server for encrypted clients."""
        servers = self.daemon.servers
        return next(s for s in servers if isinstance(s, dotproxy.TLSServer))

    @property
    def tls_address(self) -> Address:
        """Where the proxy listens for encrypted clients."""
        host, port = self.tls.server_address[:2]
        return str(host), int(port)

    def metrics(self) -> list[dotproxy.Sample]:
        """Return everything that is counted."""
        observer = self.tcp.proxy.metrics.observer
        assert isinstance(observer, dotproxy.Metrics)
        return observer.samples()

    def wait_for_in_flight(self, count: int) -> None:
        """Wait until so many queries of clients have no answer yet."""
        proxy = self.tcp.proxy
        wait_until(lambda: f"in_flight={count}" in proxy.describe()[0].split())


@contextlib.contextmanager
def serving(
    script: Reply = answer,
    *options: str,
    host: str = LOCALHOST,
    inherited: Sequence[tuple[str, socket.socket]] = (),
) -> Iterator[Served]:
    """Run a proxy that never sends a query twice, and stops without delay."""
    with contextlib.ExitStack() as stack:
        health = mock.patch.multiple(
            dotproxy.Health, OVERDUE_MIN=60.0, OVERDUE_MAX=60.0
        )
        stack.enter_context(health)
        stack.enter_context(mock.patch.object(dotproxy.Fleet, "SILENCE", 60.0))
        loop = socketserver.BaseServer.serve_forever
        stack.enter_context(mock.patch.object(loop, "__defaults__", (0.01,)))
        upstream = stack.enter_context(FakeUpstream(script))
        config = configure(upstream, *options, host=host)
        daemon = dotproxy.Daemon(config, inherited)
        stack.callback(daemon.close)
        daemon.start()
        yield Served(upstream, daemon)


# The options of a proxy that serves encrypted clients as well.
ENCRYPTED = "--tls-listen=127.0.0.1:0", f"--tls-cert={PKI.good}"


def configure(
    upstream: FakeUpstream, *options: str, host: str = LOCALHOST
) -> dotproxy.Config:
    """Make the configuration of a proxy before this upstream."""
    listen = f"--listen={host}" if "]" in host else f"--listen=[{host}]:0"
    where = f"--upstream={LOCALHOST}:{upstream.port}#dot.test"
    given = [listen, where, f"--ca-file={PKI.ca}", *options]
    return dotproxy.parse_args(given, {})


# ---- Messages ------------------------------------------------------------------------

QUESTION = query()[12:]
LONGEST_NAME = (b"\x3f" + b"a" * 63) * 3 + b"\x3d" + b"a" * 61 + b"\0"
TOO_LONG_NAME = (b"\x3f" + b"a" * 63) * 3 + b"\x3e" + b"a" * 62 + b"\0"
A_RECORD = record(b"\xc0\x0c", "A", b"\xc0\0\2\1")
OPT_RECORD = record(".", OPT, b"", 0, 1232)


def counted(*counts: int, body: bytes = b"", flags: int = RD) -> bytes:
    """Build a message of these section counts."""
    return HEADER.pack(0x1234, flags, *counts) + body


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
    "octets after the question": query() + b"\0",
    "octets after OPT": query(do=True) + b"\0",
    "two OPT": counted(1, 0, 0, 2, body=QUESTION + OPT_RECORD * 2),
    "OPT with a name": counted(1, 0, 0, 1, body=QUESTION + record("a", OPT, b"")),
    "OPT with a pointer": counted(
        1, 0, 0, 1, body=QUESTION + record(b"\xc0\x0c", OPT, b"")
    ),
    "ARCOUNT without a record": counted(1, 0, 0, 1, body=QUESTION),
    "record header past the end": query(do=True)[:-1],
    "RDLENGTH past the end": query(do=True)[:-1] + b"\1",
    "option header past the end": query(do=True, options=b"\0\x0a\0"),
    "option past the end": query(do=True, options=option(COOKIE, b"12345678")[:-1]),
    "pointer forwards": counted(
        1, 0, 0, 1, body=QUESTION + record(b"\xc0\xff", "TXT", b"\0")
    ),
    "record in the answer section": counted(1, 1, 0, 0, body=QUESTION + A_RECORD),
    "record in the authority section": counted(1, 0, 1, 0, body=QUESTION + A_RECORD),
    "OPT in the answer section": counted(1, 1, 0, 0, body=QUESTION + OPT_RECORD),
}


def parsed_response(message: bytes, asked: bytes | None = None) -> dotproxy.Response:
    """Parse a response to a query, or to the default one."""
    question = parse(asked or query()).question
    return dotproxy.parse_response(message, 12 + len(question))


def answer_to(asked: bytes, message: bytes, stream: bool = False) -> Message:
    """Return what the client that asked gets of an upstream's response."""
    received = dotproxy.parse_query(asked, TCP if stream else UDP)
    return parse(dotproxy.build_answer(received, parsed_response(message, asked)))


def error_to(asked: bytes, rcode: int, options: bytes = b"") -> Message:
    """Return an answer of dotproxy's own to the client that asked."""
    received = dotproxy.parse_query(asked)
    return parse(
        dotproxy.build_answer(received, dotproxy.error_response(rcode, options))
    )


def upstream_query(asked: bytes) -> Message:
    """Return what is sent upstream for a client's query."""
    return parse(b"\0\0" + dotproxy.build_upstream_query(dotproxy.parse_query(asked)))


class QueryParsingTest(DotproxyTestCase):
    def rcode(self, message: bytes) -> int:
        with self.assertRaises(FormatError) as caught:
            dotproxy.parse_query(message)
        return caught.exception.rcode

    def test_malformed_query_is_a_format_error(self) -> None:
        for name, message in MALFORMED_QUERIES.items():
            with self.subTest(name):
                self.assertEqual(self.rcode(message), Rcode.FORMERR)

    def test_query_cut_anywhere_is_a_format_error(self) -> None:
        whole = query(do=True, options=option(UNKNOWN_OPTION, b"abc"))

        for size in range(12, len(whole)):
            with self.subTest(size=size):
                self.assertEqual(self.rcode(whole[:size]), Rcode.FORMERR)

    def test_opcode_other_than_query_is_not_implemented(self) -> None:
        for opcode in range(1, 16):
            with self.subTest(opcode=opcode):
                self.assertEqual(self.rcode(query(opcode=opcode)), Rcode.NOTIMP)

    def test_opcode_is_looked_at_before_the_question(self) -> None:
        message = counted(0, 0, 0, 0, flags=5 << 11)

        self.assertEqual(self.rcode(message), Rcode.NOTIMP)

    def test_query_that_is_not_for_us_parses_with_a_refusal(self) -> None:
        ixfr = counted(1, 0, 1, 0, body=query(rrtype=251)[12:] + soa())
        for name, message, refusal in (
            ("AXFR", query(rrtype="AXFR"), Rcode.REFUSED),
            ("IXFR with the SOA it has", ixfr, Rcode.REFUSED),
            ("EDNS version 1", query(do=True, edns_version=1), Rcode.BADVERS),
            ("EDNS version 255", query(do=True, edns_version=255), Rcode.BADVERS),
            ("plain", query(), Rcode.NOERROR),
        ):
            with self.subTest(name):
                self.assertEqual(dotproxy.parse_query(message).form.refusal, refusal)

    def test_unknown_things_pass(self) -> None:
        for name, message in {
            "type": query(rrtype=65280),
            "type ANY": query(rrtype="ANY"),
            "type whose low octet is AXFR's": query(rrtype=256 + 252),
            "class CHAOS": query(rrclass=3),
            "class 65535": query(rrclass=65535),
            "option": query(do=True, options=option(UNKNOWN_OPTION, b"x")),
            "EDNS flags": counted(
                1, 0, 0, 1, body=QUESTION + record(".", OPT, b"", 0x7FFF)
            ),
            "header flags": counted(1, 0, 0, 0, body=QUESTION, flags=0x07FF),
            "record that is no OPT": counted(
                1, 0, 0, 1, body=QUESTION + record(".", 250, b"signature")
            ),
            "longest name": query(LONGEST_NAME),
            "root": query(".", "NS"),
            "any octet in a name": query(b"\5\0\xff.A\x80\0"),
        }.items():
            with self.subTest(name):
                asked = dotproxy.parse_query(message)
                self.assertEqual(asked.form.refusal, 0)
                self.assertEqual(asked.question, parse(message).question)

    def test_limit_is_what_the_client_takes_within_bounds(self) -> None:
        for size, stream, limit in (
            (None, False, 512),
            (0, False, 512),
            (511, False, 512),
            (1000, False, 1000),
            (1232, False, 1232),
            (65535, False, 1232),
            (None, True, 65535),
            (512, True, 65535),
        ):
            with self.subTest(size=size, stream=stream):
                message = query() if size is None else query(do=False, size=size)
                asked = dotproxy.parse_query(message, TCP if stream else UDP)
                self.assertEqual(asked.form.limit, limit)

    def test_queries_that_say_the_same_share_their_form(self) -> None:
        first = dotproxy.parse_query(query("a.example", do=True, id=1))
        other = dotproxy.parse_query(query("longer.b.example", "MX", do=True, id=2))

        self.assertIs(first.form, other.form)

    def test_form_is_not_shared_by_what_differs_in_it(self) -> None:
        usual = query(do=True)
        for name, message, transport in (
            ("transport", usual, TCP),
            ("IPv6", usual, ("udp", "2")),
            ("DO", query(do=False), UDP),
            ("RD", query(do=True, rd=False), UDP),
            ("size", query(do=True, size=4096), UDP),
            ("option", query(do=True, options=option(COOKIE, bytes(8))), UDP),
            ("no EDNS", query(), UDP),
        ):
            with self.subTest(name):
                other = dotproxy.parse_query(message, transport).form
                self.assertIsNot(dotproxy.parse_query(usual).form, other)

    def test_types_that_change_the_meaning_do_so_in_any_order(self) -> None:
        for _ in range(2):
            for rrtype, refusal, cachable in (
                ("A", 0, True),
                ("AXFR", Rcode.REFUSED, True),
                ("ANY", 0, False),
                ("AAAA", 0, True),
            ):
                form = dotproxy.parse_query(query(rrtype=rrtype)).form
                with self.subTest(rrtype=rrtype):
                    self.assertEqual((form.refusal, form.cachable), (refusal, cachable))

    def test_pointer_behind_the_question_is_checked_in_each_query(self) -> None:
        tail = b"\xc0\x20" + record(".", 250, b"")[1:]
        good = counted(1, 0, 0, 1, body=query("a" * 40)[12:] + tail)
        bad = counted(1, 0, 0, 1, body=query("a")[12:] + tail)

        dotproxy.parse_query(good)

        self.assertEqual(self.rcode(bad), Rcode.FORMERR)

    def test_forms_that_are_kept_are_few_and_short(self) -> None:
        with mock.patch.dict(dotproxy._FORMS, clear=True):
            for size in range(2 * dotproxy.MAX_FORMS):
                dotproxy.parse_query(query(do=False, size=size))
                self.assertLessEqual(len(dotproxy._FORMS), dotproxy.MAX_FORMS)
            for size in (10, 4000):
                long = option(COOKIE, bytes(size))
                dotproxy.parse_query(query(do=False, options=long))
            tails = [len(tail) for _, _, tail in dotproxy._FORMS]

        self.assertGreater(max(tails), 20)
        self.assertLessEqual(max(tails), dotproxy.MAX_KNOWN_TAIL)

    def test_random_damage_gives_a_query_or_a_format_error(self) -> None:
        good = [
            query(),
            query("a.example", do=True, options=option(COOKIE, b"12345678")),
            query(do=False, options=option(UNKNOWN_OPTION, b"abc") + option(PADDING)),
        ]
        seeds = [*good * 20, *MALFORMED_QUERIES.values()]
        accepted = 0
        for message in damaged(seeds, 6000):
            if len(message) < 12:
                continue
            with contextlib.suppress(FormatError):
                asked = dotproxy.parse_query(message)
                accepted += self.check_accepted(message, asked)
        self.assertGreater(accepted, 500)

    def check_accepted(self, message: bytes, asked: dotproxy.Query) -> bool:
        """Check against the tests' own parser, but for records that are not used."""
        if not asked.form.refusal and message[11] <= asked.form.edns:
            theirs = parse(message)
            self.assertEqual(asked.question, theirs.question, message.hex())
            self.assertEqual(asked.form.edns, theirs.opt is not None, message.hex())
        parse(b"\0\0" + dotproxy.build_upstream_query(asked))
        error = dotproxy.error_response(Rcode.SERVFAIL)
        parse(dotproxy.build_answer(asked, error))
        return True


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


class QueryKeyTest(DotproxyTestCase):
    BASE = query("www.example.com", do=False)

    def key(self, message: bytes) -> bytes:
        return dotproxy.parse_query(message).key

    def test_queries_that_one_answer_serves_have_the_same_key(self) -> None:
        for name, message in {
            "ID": query(do=False, id=0x4321),
            "case of the name": query("WWW.eXample.COM", do=False),
            "AD": query(do=False, ad=True),
            "no EDNS": query(),
            "UDP size": query(do=False, size=4096),
            "client subnet": query(do=False, options=option(SUBNET, bytes(7))),
            "cookie": query(do=False, options=option(COOKIE, b"12345678")),
            "keepalive": query(do=False, options=option(KEEPALIVE)),
            "padding": query(do=False, options=option(PADDING, bytes(9))),
        }.items():
            with self.subTest(name):
                self.assertEqual(self.key(message), self.key(self.BASE))

    def test_queries_that_need_their_own_answer_differ_in_key(self) -> None:
        for name, message in {
            "name": query("ww2.example.com", do=False),
            "label boundary": query(b"\3www\x0bexample\3com\0", do=False),
            "type": query(rrtype="AAAA", do=False),
            "type in another case": query(rrtype=0x41, do=False),
            "class": query(rrclass=3, do=False),
            "DO": query(do=True),
            "CD": query(do=False, cd=True),
            "RD": query(do=False, rd=False),
            "unknown option": query(do=False, options=option(UNKNOWN_OPTION)),
        }.items():
            with self.subTest(name):
                self.assertNotEqual(self.key(message), self.key(self.BASE))

    def test_any_is_never_in_the_cache(self) -> None:
        for rrtype, cached in (("ANY", False), (0x01FF, True), (254, True)):
            with self.subTest(rrtype=rrtype):
                asked = dotproxy.parse_query(query(rrtype=rrtype))
                self.assertEqual(bool(asked.cache_key), cached)

    def test_type_numbers_that_are_letters_differ_in_key(self) -> None:
        upper, lower = query(rrtype=0x4141), query(rrtype=0x6161)

        self.assertNotEqual(self.key(upper), self.key(lower))


class UpstreamQueryTest(DotproxyTestCase):
    def test_query_is_padded_to_whole_blocks(self) -> None:
        for size in range(1, 64):
            for options in (b"", option(UNKNOWN_OPTION, bytes(size))):
                with self.subTest(size=size, options=len(options)):
                    asked = query("a" * size, do=bool(size % 2), options=options)
                    self.assertEqual(len(upstream_query(asked).raw) % 128, 0)

    def test_question_is_sent_as_it_came(self) -> None:
        asked = query("WwW.eXample.com", "TXT", rrclass=3)

        self.assertEqual(upstream_query(asked).question, parse(asked).question)

    def test_flags_are_carried_and_ad_is_set(self) -> None:
        for rd, cd, do in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)):
            with self.subTest(rd=rd, cd=cd, do=do):
                sent = upstream_query(query(rd=bool(rd), cd=bool(cd), do=bool(do)))
                assert sent.opt is not None
                self.assertEqual(sent.flags, RD * rd | CD * cd | AD)
                self.assertEqual(sent.opt.flags, DO * do)

    def test_flags_of_no_meaning_in_queries_are_not_carried(self) -> None:
        asked = counted(1, 0, 0, 0, body=QUESTION, flags=AA | TC | RA | 0x000F)

        self.assertEqual(upstream_query(asked).flags, AD)

    def test_opt_is_ours_whatever_the_client_sent(self) -> None:
        for asked in (query(), query(do=False, size=65535), query(do=True, size=0)):
            with self.subTest(asked=asked.hex()):
                sent = upstream_query(asked).opt
                assert sent is not None
                self.assertEqual((sent.size, sent.version), (1232, 0))
                self.assertEqual(
                    [code for code, _ in sent.options], [KEEPALIVE, PADDING]
                )

    def test_options_of_the_client_alone_are_removed_and_others_pass(self) -> None:
        first, last = option(UNKNOWN_OPTION, b"first"), option(3, b"last")
        private = option(SUBNET, b"\0\1\x18\0\xc0\0\2") + option(COOKIE, b"12345678")
        ours = option(KEEPALIVE) + option(PADDING, b"not zero")

        sent = upstream_query(query(do=False, options=first + private + ours + last))

        assert sent.opt is not None
        self.assertEqual(
            sent.opt.options[:-1],
            [(UNKNOWN_OPTION, b"first"), (3, b"last"), (KEEPALIVE, b"")],
        )
        self.assertEqual(sent.opt.options[-1][1].strip(b"\0"), b"")

    def test_query_in_clear_text_is_not_padded(self) -> None:
        asked = dotproxy.parse_query(query(do=True, options=option(UNKNOWN_OPTION)))

        sent = parse(b"\0\0" + dotproxy.build_upstream_query(asked, padded=False)).opt

        assert sent is not None
        codes = [code for code, _ in sent.options]
        self.assertEqual((codes, sent.flags), ([UNKNOWN_OPTION, KEEPALIVE], DO))

    def test_record_that_is_no_opt_is_not_sent_on(self) -> None:
        body = QUESTION + record(".", 250, b"signature") + OPT_RECORD

        sent = upstream_query(counted(1, 0, 0, 2, body=body))

        self.assertEqual(sent.additional, [])

    def test_query_of_any_size_fits_a_frame_or_is_refused(self) -> None:
        room = 65535 - len(query(do=True, options=option(UNKNOWN_OPTION)))
        for size in (0, 512, 32000, room - 200, room - 100, room):
            message = query(do=True, options=option(UNKNOWN_OPTION, bytes(size)))
            with self.subTest(size=size), contextlib.suppress(FormatError):
                asked = dotproxy.parse_query(message, TCP)
                if not asked.form.refusal:
                    sent = dotproxy.build_upstream_query(asked)
                    self.assertLessEqual(2 + len(sent), 65535)


class ResponseParsingTest(DotproxyTestCase):
    def test_malformed_response_is_a_format_error(self) -> None:
        def responded(*counts: int, body: bytes) -> bytes:
            return counted(1, *counts, body=QUESTION + body, flags=QR | RD | RA)

        for name, message in {
            "octets after the question": responded(0, 0, 0, body=b"\0"),
            "octets after the last record": responded(1, 0, 0, body=A_RECORD + b"\0"),
            "fewer records than counted": responded(2, 0, 0, body=A_RECORD),
            "more records than counted": responded(1, 0, 0, body=A_RECORD * 2),
            "no record": responded(0, 0, 1, body=b""),
            "no end of its only record": responded(1, 0, 0, body=A_RECORD[:-1]),
            "no end of its last record": responded(1, 1, 0, body=A_RECORD * 2)[:-1],
            "RDLENGTH past the end": responded(
                1, 0, 0, body=A_RECORD[:-6] + b"\xff\xff" + bytes(4)
            ),
            "label of 64 octets": responded(
                1, 0, 0, body=record(b"\x40" + b"a" * 64 + b"\0", "A", bytes(4))
            ),
            "pointer forwards": responded(
                1, 0, 0, body=record(b"\1a\xc0\xff", "A", bytes(4))
            ),
            "two OPT": responded(0, 0, 2, body=OPT_RECORD * 2),
            "OPT in the answer section": responded(1, 0, 0, body=OPT_RECORD),
            "OPT in the authority section": responded(0, 1, 0, body=OPT_RECORD),
            "OPT with a name": responded(0, 0, 1, body=record("a", OPT, b"")),
            "OPT with a pointer": responded(
                0, 0, 1, body=record(b"\xc0\x0c", OPT, b"")
            ),
            "option past the end": responded(
                0, 0, 1, body=record(".", OPT, b"\0\x0a\0\5abcd")
            ),
        }.items():
            with self.subTest(name), self.assertRaises(FormatError):
                parsed_response(message)

    def test_response_cut_anywhere_is_a_format_error(self) -> None:
        asked = query(do=True)
        for edns in (True, False):
            whole = response(asked, "192.0.2.1", authority=[soa()], edns=edns)
            for size in range(len(asked) - len(OPT_RECORD), len(whole)):
                with self.subTest(size=size), self.assertRaises(FormatError):
                    parsed_response(whole[:size], asked)

    def test_pointers_of_owners_are_not_followed_in_any_section(self) -> None:
        forwards = record(b"\xc0\xff", "A", bytes(4))
        for counts in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
            message = counted(1, *counts, body=QUESTION + forwards, flags=QR)
            with self.subTest(counts=counts):
                self.assertEqual(parsed_response(message).counts, counts)

    def test_ttl_offsets_point_at_the_ttls(self) -> None:
        message = response(
            query(do=True),
            record(b"\xc0\x0c", "CNAME", encode_name("a.example"), ttl=101),
            address("a.example", "192.0.2.1", 102),
            authority=[soa(ttl=103)],
            additional=[address("ns.example.com", "2001:db8::1", 104)],
        )

        found = parsed_response(message)

        ttls = [found.body[offset : offset + 4] for offset in found.ttl_offsets]
        self.assertEqual([int.from_bytes(x, "big") for x in ttls], [101, 102, 103, 104])

    def test_ttl_is_the_shortest_and_zero_with_the_top_bit(self) -> None:
        for ttls, shortest in (
            ([], None),
            ([0], 0),
            ([300], 300),
            ([300, 60, 200], 60),
            ([0x7FFFFFFF], 0x7FFFFFFF),
            ([0x80000000], 0),
            ([60, 0x80000000], 0),
            ([0x80000000, 60], 0),
            ([0xFFFFFFFF, 60, 0xFFFFFFFF], 0),
        ):
            with self.subTest(ttls=ttls):
                records = [address("a.example", "192.0.2.1", ttl) for ttl in ttls]
                found = parsed_response(response(query(), *records))
                self.assertEqual(found.ttl, shortest)

    def test_opt_does_not_count_for_the_ttl(self) -> None:
        found = parsed_response(response(query(do=False), "192.0.2.1", ttl=300))

        self.assertEqual((found.ttl, len(found.ttl_offsets)), (300, 1))

    def test_negative_ttl_is_the_lesser_of_soa_ttl_and_minimum(self) -> None:
        for name, message, ttl in (
            ("TTL", response(query(), authority=[soa(ttl=60)], rcode=3), 60),
            ("MINIMUM", response(query(), authority=[soa(minimum=30)], rcode=3), 30),
            ("NODATA", response(query(), authority=[soa(minimum=0)]), 0),
            ("no SOA", response(query(), rcode=3), None),
        ):
            with self.subTest(name):
                self.assertEqual(parsed_response(message).negative_ttl, ttl)

    def test_negative_response_with_the_top_bit_lives_not_at_all(self) -> None:
        message = response(query(), authority=[soa(ttl=0x80000001)], rcode=3)

        found = parsed_response(message)

        self.assertEqual(min(found.ttl or 0, found.negative_ttl or 0), 0)

    def test_opt_is_taken_out(self) -> None:
        passing = option(EDE, b"\0\3") + option(UNKNOWN_OPTION, b"x")
        ending = option(SUBNET, bytes(4)) + option(COOKIE, bytes(16))
        ending += option(KEEPALIVE, b"\0\x64") + option(PADDING, bytes(300))
        message = response(query(do=True), A_RECORD, rcode=22, options=ending + passing)

        found = parsed_response(message)

        self.assertEqual(found.body, A_RECORD)
        self.assertEqual(found.rcode, 22)
        self.assertEqual(found.options, passing)
        self.assertEqual(found.upstream_options, ending + passing)

    def test_records_behind_opt_are_dropped_with_it(self) -> None:
        glue = address("ns.example.com", "192.0.2.53")
        body = QUESTION + A_RECORD + glue + OPT_RECORD + glue
        message = counted(1, 1, 0, 3, body=body, flags=QR | RD | RA)

        found = parsed_response(message)

        self.assertEqual(found.body, A_RECORD + glue)
        self.assertEqual(len(found.ttl_offsets), 2)
        self.assertEqual(len(answer_to(query(), message).additional), 1)

    def test_random_damage_gives_a_response_or_a_format_error(self) -> None:
        asked = query(do=True)
        seeds = [
            response(
                asked, "192.0.2.1", authority=[soa()], options=option(EDE, b"\0\0")
            ),
            response(asked, authority=[soa()], rcode=3),
            response(asked, address("a.example", "2001:db8::1"), additional=[A_RECORD]),
        ]
        accepted, received = 0, dotproxy.parse_query(asked)
        for message in damaged(seeds, 6000):
            if len(message) < 12 + len(received.question):
                continue
            with contextlib.suppress(FormatError):
                found = parsed_response(message, asked)
                dotproxy.build_answer(received, found)
                self.assertLessEqual(
                    max(found.ttl_offsets, default=0) + 10, 10 + len(found.body)
                )
                accepted += 1
        self.assertGreater(accepted, 500)


class AnswerTest(DotproxyTestCase):
    def test_answer_is_the_clients_own(self) -> None:
        for id, name, rd in (
            (1, "www.example.com", True),
            (2, "WWW.Example.COM", False),
        ):
            with self.subTest(name):
                asked = query(name, id=id, rd=rd)
                theirs = response(query(id=0x7777, rd=not rd), "192.0.2.1")
                got = answer_to(asked, theirs)
                self.assertEqual((got.id, got.qname), (id, name))
                self.assertEqual(got.flags & (QR | RD), QR | RD * rd)
                self.assertEqual(got.addresses, ["192.0.2.1"])

    def test_rcode_and_flags_of_the_response_pass(self) -> None:
        message = response(query(), rcode=3, aa=True, tc=True, ra=False)

        got = answer_to(query(), message)

        self.assertEqual(got.flags, QR | AA | TC | RD | 3)

    def test_ad_is_given_to_those_who_asked_only(self) -> None:
        for name, asked, ad in (
            ("plain", query(), 0),
            ("EDNS", query(do=False), 0),
            ("AD", query(ad=True), AD),
            ("DO", query(do=True), AD),
        ):
            with self.subTest(name):
                got = answer_to(asked, response(asked, "192.0.2.1", ad=True))
                self.assertEqual(got.flags & AD, ad)

    def test_ad_is_never_made_up(self) -> None:
        asked = query(ad=True, do=True)

        got = answer_to(asked, response(asked, "192.0.2.1"))

        self.assertEqual(got.flags & AD, 0)

    def test_opt_is_given_to_those_who_sent_one_only(self) -> None:
        message = response(query(do=True), "192.0.2.1", options=option(EDE, b"\0\0"))

        self.assertIsNone(answer_to(query(), message).opt)
        for do in (False, True):
            with self.subTest(do=do):
                got = answer_to(query(do=do), message)
                options = [(EDE, b"\0\0")]
                self.assertEqual(got.opt, Opt(1232, 0, DO * do, options))

    def test_options_between_us_and_the_upstream_are_not_given(self) -> None:
        options = option(PADDING, bytes(200)) + option(COOKIE, bytes(16))
        options += option(SUBNET, bytes(4)) + option(KEEPALIVE, b"\0\x64")
        asked = query(do=True)

        got = answer_to(asked, response(asked, "192.0.2.1", options=options))

        self.assertEqual(got.opt, Opt(1232, 0, DO, []))

    def test_extended_rcode_needs_edns(self) -> None:
        message = response(query(do=False), rcode=23)

        self.assertEqual(answer_to(query(do=False), message).rcode, 23)
        self.assertEqual(answer_to(query(), message).rcode, Rcode.SERVFAIL)

    def test_answer_is_cut_whole_above_the_clients_limit(self) -> None:
        for asked, stream, limit in (
            (query(), False, 512),
            (query(do=False, size=100), False, 512),
            (query(do=False, size=800), False, 800),
            (query(do=True, size=4096), False, 1232),
            (query(), True, 65535),
            (query(do=True, size=512), True, 65535),
        ):
            with self.subTest(limit=limit, stream=stream):
                self.check_cut(asked, stream, limit)

    def check_cut(self, asked: bytes, stream: bool, limit: int) -> None:
        def answered(size: int) -> Message:
            text = record(b"\xc0\x0c", "TXT", bytes(size))
            return answer_to(asked, response(asked, text), stream)

        room = limit - len(answered(0).raw)
        whole, cut = answered(room), answered(room + 1)
        self.assertEqual((len(whole.raw), whole.flags & TC), (limit, 0))
        self.assertEqual(cut.flags & TC, TC)
        self.assertEqual((cut.answers, cut.authority, cut.additional), ([], [], []))
        self.assertEqual(cut.opt is None, parse(asked).opt is None)

    def test_cut_answer_has_no_options(self) -> None:
        asked = query(do=True)
        message = response(
            asked,
            record(b"\xc0\x0c", "TXT", bytes(1200)),
            options=option(EDE, b"\0\0"),
        )

        self.assertEqual(answer_to(asked, message).opt, Opt(1232, 0, DO, []))

    def test_keepalive_is_answered_over_tcp_only(self) -> None:
        asked = query(do=False, options=option(KEEPALIVE))
        message = response(asked, "192.0.2.1")

        for stream, options in ((False, []), (True, [(KEEPALIVE, b"\0\x64")])):
            with self.subTest(stream=stream):
                got = answer_to(asked, message, stream)
                self.assertEqual(got.opt, Opt(1232, 0, 0, options))

    def test_keepalive_is_not_given_unasked(self) -> None:
        asked = query(do=False)

        got = answer_to(asked, response(asked, "192.0.2.1"), stream=True)

        self.assertEqual(got.opt, Opt(1232, 0, 0, []))

    def test_error_says_why_to_those_with_edns(self) -> None:
        info = dotproxy.ExtendedError.NETWORK_ERROR
        reason = dotproxy.build_option(info, "no route")
        for asked, options in (
            (query(), None),
            (query(do=True), [(EDE, b"\0\x17no route")]),
        ):
            with self.subTest(options=options):
                got = error_to(asked, Rcode.SERVFAIL, reason)
                self.assertEqual((got.id, got.rcode), (0x1234, Rcode.SERVFAIL))
                self.assertEqual(got.flags & ~RCODE_MASK, QR | RD | RA)
                self.assertEqual(got.opt.options if got.opt else None, options)

    def test_error_with_a_long_reason_is_cut_to_valid_text(self) -> None:
        info = dotproxy.ExtendedError.NETWORK_ERROR
        for text in ("x" * 1000, "x" + "é" * 1000):
            with self.subTest(text=text[:3]):
                reason = dotproxy.build_option(info, text)
                got = error_to(query(do=True), Rcode.SERVFAIL, reason)
                assert got.opt is not None
                self.assertIn(got.opt.options[0][1][2:].decode(), text)
                self.assertLessEqual(len(got.raw), 512)

    def test_error_with_an_extended_rcode_fits_edns(self) -> None:
        got = error_to(query(do=True, edns_version=1), Rcode.BADVERS)

        self.assertEqual((got.rcode, got.opt), (16, Opt(1232, 0, DO, [])))

    def test_cd_is_the_clients_own(self) -> None:
        for cd in (False, True):
            with self.subTest(cd=cd):
                asked = query(cd=cd)
                got = answer_to(asked, response(query(cd=not cd), "192.0.2.1"))
                self.assertEqual(got.flags & CD, CD * cd)

    def test_format_error_is_a_bare_header(self) -> None:
        for flags, expected in (
            (RD, QR | RD | 1),
            (0, QR | 1),
            (5 << 11 | RD, QR | 5 << 11 | RD | 1),
            (0x07F0 | TC, QR | RD | 1),
        ):
            with self.subTest(flags=hex(flags)):
                message = HEADER.pack(0x4321, flags, 9, 9, 9, 9) + b"garbage"
                got = dotproxy.build_format_error(message, Rcode.FORMERR)
                self.assertEqual(got, HEADER.pack(0x4321, expected, 0, 0, 0, 0))


class PaddingTest(DotproxyTestCase):
    PADDED = query(do=False, options=option(PADDING, bytes(50)))

    def answer(
        self, asked: bytes, message: bytes, *, encrypted: bool = True
    ) -> Message:
        received = dotproxy.parse_query(asked, DOT if encrypted else TCP)
        return parse(dotproxy.build_answer(received, parsed_response(message, asked)))

    def padding(self, got: Message) -> int | None:
        """Return the size of the padding, which must be of zeros, or None."""
        options = got.opt.options if got.opt else []
        found = [value for code, value in options if code == PADDING]
        self.assertEqual(found, [bytes(len(each)) for each in found][:1])
        return len(found[0]) if found else None

    def test_encrypted_answer_is_a_multiple_of_468_octets(self) -> None:
        for size in range(1000):
            message = response(self.PADDED, record("a", "TXT", bytes(size)))
            got = self.answer(self.PADDED, message)
            self.assertEqual(len(got.raw) % 468, 0)
            self.assertIn(self.padding(got), range(468))

    def test_answer_is_not_padded_unless_asked_for_and_encrypted(self) -> None:
        for asked, encrypted in (
            (self.PADDED, False),
            (query(do=False), True),
            (query(do=False, options=option(KEEPALIVE)), True),
        ):
            message = response(asked, "192.0.2.1", options=option(PADDING, bytes(9)))
            with self.subTest(encrypted=encrypted):
                got = self.answer(asked, message, encrypted=encrypted)
                self.assertIsNone(self.padding(got))

    def test_query_without_opt_gets_an_answer_without_it(self) -> None:
        asked = query()

        self.assertIsNone(self.answer(asked, response(asked, "192.0.2.1")).opt)

    def test_padded_answer_never_exceeds_65535_octets(self) -> None:
        room = 65535 - len(response(self.PADDED, record("a", "TXT", b"")))
        for size in range(room - 500, room + 5):
            message = response(self.PADDED, record("a", "TXT", bytes(size)), edns=False)
            received = dotproxy.parse_query(self.PADDED, DOT)
            answer = dotproxy.build_answer(
                received, parsed_response(message, self.PADDED)
            )
            with self.subTest(size=size):
                self.assertLessEqual(len(answer), 65535)
                got = parse(answer)
                whole = len(answer) % 468 == 0 or len(answer) > 65535 - 19
                self.assertTrue(whole, len(answer))
                self.assertEqual(got.flags & TC, TC * (size > room))

    def test_padding_follows_the_other_options(self) -> None:
        asked = query(do=False, options=option(PADDING) + option(KEEPALIVE))
        message = response(asked, options=option(EDE, b"\0\3"))

        got = self.answer(asked, message)

        assert got.opt is not None
        codes = [code for code, _ in got.opt.options]
        self.assertEqual((codes, len(got.raw)), ([EDE, KEEPALIVE, PADDING], 468))

    def test_error_of_our_own_is_padded(self) -> None:
        received = dotproxy.parse_query(self.PADDED, DOT)
        for rcode in (Rcode.SERVFAIL, Rcode.REFUSED, Rcode.BADVERS):
            error = dotproxy.error_response(rcode, option(EDE, b"\0\0why"))
            got = parse(dotproxy.build_answer(received, error))
            with self.subTest(rcode=rcode):
                self.assertEqual((got.rcode, len(got.raw)), (rcode, 468))

    def test_keys_are_those_of_a_query_without_padding(self) -> None:
        padded = dotproxy.parse_query(self.PADDED, DOT)
        plain = dotproxy.parse_query(query(do=False))

        self.assertTrue(padded.form.padded)
        self.assertEqual((padded.key, padded.cache_key), (plain.key, plain.cache_key))
        self.assertEqual(
            dotproxy.build_upstream_query(padded), dotproxy.build_upstream_query(plain)
        )


class FramingTest(DotproxyTestCase):
    MESSAGES = (query("a.example"), query("b.example", do=True), query("c.example"))

    def test_stream_cut_anywhere_loses_nothing(self) -> None:
        stream = frame(*self.MESSAGES)

        for cut in range(len(stream) + 1):
            with self.subTest(cut=cut):
                first, rest = dotproxy.split_frames(stream[:cut])
                second, rest = dotproxy.split_frames(rest + stream[cut:])
                self.assertEqual((*first, *second), self.MESSAGES)
                self.assertEqual(rest, b"")

    def test_message_is_not_given_before_its_last_octet(self) -> None:
        stream = frame(self.MESSAGES[0])

        self.assertEqual(dotproxy.split_frames(stream[:-1]), ([], stream[:-1]))

    def test_nothing_is_taken_behind_a_length_below_a_header(self) -> None:
        for length in range(12):
            with self.subTest(length=length):
                bad = frame(bytes(length)) + frame(self.MESSAGES[1])
                messages, rest = dotproxy.split_frames(frame(self.MESSAGES[0]) + bad)
                self.assertEqual((messages, rest), ([self.MESSAGES[0]], bad))

    def test_answerable_is_a_whole_header_that_is_no_response(self) -> None:
        for message, answerable in (
            (b"", False),
            (bytes(11), False),
            (bytes(12), True),
            (query(), True),
            (response(query()), False),
        ):
            with self.subTest(message=message.hex()):
                self.assertEqual(dotproxy.answerable(message), answerable)


# ---- Metrics -------------------------------------------------------------------------


def sample(samples: Iterable[dotproxy.Sample], name: str, *labels: str) -> float:
    """Return the value of one metric; that of a histogram is its count."""
    (value,) = [
        value for each, values, value in samples if (each, values) == (name, labels)
    ]
    return value.cumulated()[-1][1] if isinstance(value, dotproxy.Histogram) else value


def label(
    source: str = "cache", rrtype: int = 1, rcode: int = 0, do: bool = False
) -> dotproxy.Label:
    form = dotproxy.Form(UDP)
    form.edns_flags = DO * do
    return source, form, rrtype.to_bytes(2, "big"), rcode, 40, 300


FAMILIES = {family.name: family for each in dotproxy.TABLE.values() for family in each}


class HistogramTest(DotproxyTestCase):
    def test_value_at_a_bound_is_below_it(self) -> None:
        histogram = dotproxy.Histogram((1.0, 2.0))

        histogram.observe_all([0.5, 1.0, 1.5])
        histogram.observe(9.0, 2)

        counts = [(1.0, 2), (2.0, 3), (float("inf"), 5)]
        self.assertEqual(histogram.cumulated(), counts)
        self.assertEqual(histogram.sum, 21.0)

    def test_copy_does_not_change(self) -> None:
        histogram = dotproxy.Histogram((1.0,))
        made = histogram.copy()

        histogram.observe(0.5)

        self.assertEqual((made.sum, made.cumulated()[-1][1]), (0.0, 0))


class FormatTest(DotproxyTestCase):
    SAMPLES: ClassVar[list[dotproxy.Sample]] = [
        ("dotproxy_cache_hits_total", (), 7),
        ("dotproxy_upstream_up", ('a"b\\c\nd',), 1),
    ]

    def write(self, *samples: dotproxy.Sample, created: float | None = None) -> str:
        return dotproxy.format_metrics(samples or self.SAMPLES, created)

    def test_older_format_names_a_counter_with_its_suffix(self) -> None:
        lines = self.write().splitlines()

        self.assertIn("# TYPE dotproxy_cache_hits_total counter", lines)
        self.assertIn("dotproxy_cache_hits_total 7", lines)
        self.assertNotIn("# EOF", lines)

    def test_openmetrics_names_a_counter_without_and_ends_in_eof(self) -> None:
        lines = self.write(created=1234.5).splitlines()

        self.assertIn("# TYPE dotproxy_cache_hits counter", lines)
        self.assertIn("dotproxy_cache_hits_total 7", lines)
        self.assertIn("dotproxy_cache_hits_created 1234.5", lines)
        self.assertEqual(lines[-1], "# EOF")

    def test_label_is_escaped(self) -> None:
        line = r'dotproxy_upstream_up{upstream="a\"b\\c\nd"} 1'

        self.assertIn(line, self.write().splitlines())

    def test_help_is_escaped_as_each_format_wants_it(self) -> None:
        self.assertEqual(dotproxy.escape('a"\\\n', quotes=False), r'a"\\\n')
        self.assertEqual(dotproxy.escape('a"\\\n'), r"a\"\\\n")

    def test_histogram_is_cumulated_up_to_infinity(self) -> None:
        histogram = dotproxy.Histogram(dotproxy.SIZES)
        histogram.observe_all([50.0, 150.0])

        text = self.write(("dotproxy_dns_request_size_bytes", (), histogram))

        for line in ('_bucket{le="100.0"} 1', '_bucket{le="+Inf"} 2', "_sum 200.0"):
            self.assertIn(f"dotproxy_dns_request_size_bytes{line}\n", text)

    def test_number_that_is_none_is_written_as_the_formats_have_it(self) -> None:
        texts = [dotproxy.format_number(float(n)) for n in ("inf", "-inf", "nan")]

        self.assertEqual(texts, ["+Inf", "-Inf", "NaN"])

    def test_accept_header_chooses_the_format(self) -> None:
        openmetrics = "application/openmetrics-text;version=1.0.0"
        for accept, wanted in (
            ("", False),
            ("*/*", False),
            ("text/plain", False),
            (openmetrics, True),
            (f"{openmetrics},text/plain;version=0.0.4;q=0.5,*/*;q=0.1", True),
            (f"{openmetrics};q=0.2,text/plain;q=0.5", False),
            ("application/openmetrics-text;version=0.0.1", False),
            (f"{openmetrics};q=often", False),
            ("application/openmetrics-text", True),
        ):
            with self.subTest(accept):
                self.assertEqual(dotproxy.wants_openmetrics(accept), wanted)


class MetricsTest(DotproxyTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.metrics = dotproxy.Metrics(wall=lambda: 1234.5)

    def value(self, name: str, *labels: str) -> float:
        return sample(self.metrics.samples(), name, *labels)

    def answered(
        self, rcode: int, received: float = 1000.0, client: str = "192.0.2.1"
    ) -> dotproxy.Answered:
        transport = "tcp", "2" if ":" in client else "1"
        asked = dotproxy.parse_query(query(do=True), transport)
        asked.received, asked.client = received, (client, 5353)
        return asked, bytes(100), rcode

    def test_answers_at_once_are_counted_by_what_they_are(self) -> None:
        tally = [label(), label(), label("stale", 28), label("local", 999, 5, True)]

        self.metrics.answered_at_once(tally, 0.001)

        for number, name, *labels in (
            (2, "dotproxy_dns_requests_total", "udp", "1", "A"),
            (1, "dotproxy_dns_requests_total", "udp", "1", "AAAA"),
            (1, "dotproxy_dns_requests_total", "udp", "1", "other"),
            (2, "dotproxy_dns_responses_total", "NOERROR", "cache"),
            (1, "dotproxy_dns_responses_total", "REFUSED", "local"),
            (2, "dotproxy_dns_request_duration_seconds", "cache"),
            (1, "dotproxy_dns_request_duration_seconds", "stale"),
            (1, "dotproxy_dns_do_requests_total"),
            (4, "dotproxy_dns_response_size_bytes"),
            (2, "dotproxy_cache_hits_total"),
            (1, "dotproxy_cache_served_stale_total"),
            (0, "dotproxy_cache_misses_total"),
        ):
            with self.subTest(name=name, labels=labels):
                self.assertEqual(self.value(name, *labels), number)

    def test_answer_that_was_waited_for_counts_with_its_time(self) -> None:
        answered = [self.answered(2, 999.0), self.answered(2, 998.0, "2001:db8::1")]

        self.metrics.answered(answered, ("upstream", UPSTREAM_NAME), 1000.0)

        found = {
            name: value
            for name, labels, value in self.metrics.samples()
            if labels == ("upstream",)
        }["dotproxy_dns_request_duration_seconds"]
        assert isinstance(found, dotproxy.Histogram)
        self.assertEqual((found.sum, found.cumulated()[-1][1]), (3.0, 2))
        for family in "12":
            counted = self.value("dotproxy_dns_requests_total", "tcp", family, "A")
            self.assertEqual(counted, 1)
        self.assertEqual(self.value("dotproxy_cache_misses_total"), 2)
        self.assertEqual(self.value("dotproxy_dns_do_requests_total"), 2)

    def test_answer_that_came_too_late_to_be_a_hit_is_no_miss(self) -> None:
        self.metrics.answered([self.answered(0)], ("cache", None), 1000.0)

        self.assertEqual(self.value("dotproxy_cache_misses_total"), 0)
        self.assertEqual(self.value("dotproxy_cache_hits_total"), 1)

    def test_many_sorts_of_answer_take_no_more_room_and_none_is_lost(self) -> None:
        many = [
            ("cache", dotproxy.Form(UDP), b"\0\1", 0, size, 100)
            for size in range(3 * dotproxy.Metrics.MAX_LABELS)
        ]

        for each in many:
            self.metrics.answered_at_once([each], 0.0)

        counted = self.value("dotproxy_dns_requests_total", "udp", "1", "A")
        self.assertEqual(counted, len(many))
        self.assertEqual(self.value("dotproxy_dns_request_size_bytes"), len(many))

    def test_looking_twice_counts_nothing_twice(self) -> None:
        self.metrics.answered_at_once([label()], 0.0)
        self.metrics.samples()

        self.assertEqual(self.value("dotproxy_cache_hits_total"), 1)

    def test_what_is_turned_away_is_counted_by_reason(self) -> None:
        for reason in dotproxy.TURNED_AWAY[:-2]:
            self.metrics.turned_away(reason, 3)
            with self.subTest(reason):
                counted = self.value("dotproxy_turned_away_total", reason)
                self.assertEqual(counted, 3)

    def test_query_that_could_not_be_parsed_was_turned_away(self) -> None:
        tally = [label("local", 0, 1), label("local", 0, 4), label("local", 0, 5)]
        self.metrics.answered_at_once(tally, 0.0)

        self.assertEqual(self.value("dotproxy_turned_away_total", "format-error"), 2)

    def test_counts_by_many_threads_add_up(self) -> None:
        def count() -> None:
            for _ in range(500):
                self.metrics.answered_at_once([label(), label()], 0.0)
                self.metrics.turned_away("backlog")

        threads = [threading.Thread(target=count) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        self.assertEqual(self.value("dotproxy_cache_hits_total"), 8000)
        self.assertEqual(self.value("dotproxy_turned_away_total", "backlog"), 4000)

    def test_process_tells_what_prometheus_libraries_tell(self) -> None:
        names = {name for name, _, _ in self.metrics.samples()}

        self.assertLessEqual({n for n in FAMILIES if n.startswith("process_")}, names)

    def test_every_sample_is_in_the_table_with_its_labels(self) -> None:
        with serving() as served, UDPClient(served.address) as client:
            client.send(query())
            client.receive()
            samples = served.metrics()

        for name, labels, _ in samples:
            self.assertEqual(len(labels), len(FAMILIES[name].labels), name)
        self.assertEqual({name for name, _, _ in samples}, set(FAMILIES))

    def test_help_and_kind_are_as_conventions_want_them(self) -> None:
        for family in FAMILIES.values():
            with self.subTest(family.name):
                self.assertRegex(family.help, r"\A[A-Z].*\.\Z")
                counter = family.kind == "counter"
                self.assertEqual(family.name.endswith("_total"), counter)
                self.assertTrue(family.views, "on no panel")


# ---- Dashboard -----------------------------------------------------------------------


class DashboardTest(DotproxyTestCase):
    def setUp(self) -> None:
        super().setUp()
        # As Grafana gets it: through JSON.
        self.board = json.loads(json.dumps(dotproxy.build_dashboard()))
        self.panels = [p for p in self.board["panels"] if p["type"] != "row"]

    def test_fields_that_grafana_needs_are_there(self) -> None:
        for name, kind in (
            ("uid", str),
            ("title", str),
            ("schemaVersion", int),
            ("version", int),
            ("panels", list),
            ("templating", dict),
            ("annotations", dict),
            ("time", dict),
            ("refresh", str),
        ):
            with self.subTest(name):
                self.assertIsInstance(self.board[name], kind)
        self.assertEqual(set(self.board["time"]), {"from", "to"})
        for panel in self.panels:
            with self.subTest(panel["title"]):
                self.assertIn(panel["type"], ("timeseries", "stat", "heatmap"))
                self.assertLessEqual(
                    {"defaults", "overrides"}, set(panel["fieldConfig"])
                )
                self.assertTrue(panel["targets"] and panel["options"])
                self.assertTrue(panel["fieldConfig"]["defaults"]["unit"])
                for target in panel["targets"]:
                    self.assertLessEqual({"refId", "expr", "legendFormat"}, set(target))
                    self.assertEqual(target["datasource"], panel["datasource"])

    def test_panels_and_their_queries_are_told_apart(self) -> None:
        ids = [panel["id"] for panel in self.board["panels"]]
        self.assertEqual(len(ids), len(set(ids)))
        for panel in self.panels:
            refs = [target["refId"] for target in panel["targets"]]
            self.assertEqual(len(refs), len(set(refs)), panel["title"])

    def test_lines_of_a_panel_are_told_apart_by_their_legends(self) -> None:
        for panel in self.panels:
            legends = [target["legendFormat"] for target in panel["targets"]]
            self.assertEqual(len(legends), len(set(legends)), panel["title"])

    def test_seconds_of_several_instances_are_not_added_up(self) -> None:
        for panel in self.panels:
            for target in panel["targets"]:
                if re.search(r"_(latency|life)_seconds\b", target["expr"]):
                    self.assertRegex(target["expr"], r"\Amax by \(upstream\)")

    def test_panels_do_not_overlap(self) -> None:
        taken: set[tuple[int, int]] = set()
        for panel in self.board["panels"]:
            place = panel["gridPos"]
            cells = {
                (place["x"] + dx, place["y"] + dy)
                for dx in range(place["w"])
                for dy in range(place["h"])
            }
            self.assertFalse(taken & cells, panel["title"])
            self.assertLessEqual(place["x"] + place["w"], 24)
            taken |= cells

    def test_data_source_is_a_variable(self) -> None:
        variables = {each["name"]: each for each in self.board["templating"]["list"]}

        self.assertEqual(variables["datasource"]["query"], "prometheus")
        for panel in self.panels:
            self.assertEqual(panel["datasource"]["uid"], "${datasource}")

    def test_every_metric_is_on_a_panel_and_no_other(self) -> None:
        text = " ".join(t["expr"] for p in self.panels for t in p["targets"])
        named = set(re.findall(r"(?:dotproxy|process)_\w+", text))
        named = {re.sub(r"_(bucket|sum|count)\Z", "", name) for name in named}

        self.assertEqual(named, set(FAMILIES))

    def test_no_word_of_a_template_is_left(self) -> None:
        for panel in self.panels:
            for target in panel["targets"]:
                self.assertNotRegex(target["expr"], r"NAME|OTHER|\bBY\b")
                self.assertIn('{job=~"$job",instance=~"$instance"}', target["expr"])


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


def log_record(
    level: int, template: str, *values: object, error: BaseException | None = None
) -> logging.LogRecord:
    """Make what a log call makes."""
    info = (type(error), error, error.__traceback__) if error else None
    made = logging.LogRecord("dotproxy", level, "", 0, template, values, info)
    made.created = 1_700_000_000.25
    return made


def json_line(text: str) -> dict[str, object]:
    """Parse a line of JSON, and check that its names are of the schema."""
    fields: dict[str, object] = json.loads(text)
    unknown = {name for name in set(fields) - ECS_FIELDS if name[:7] != "labels."}
    if unknown:
        raise AssertionError(f"not in the schema: {unknown}")
    return fields


class LogFormatTest(DotproxyTestCase):
    def fields(
        self, template: str, *values: object, error: BaseException | None = None
    ) -> dict[str, object]:
        made = log_record(logging.WARNING, template, *values, error=error)
        return json_line(dotproxy.ECSFormatter().format(made))

    def test_facts_of_a_message_are_fields(self) -> None:
        name = Endpoint("2001:db8::1", 853, "dot.test")

        got = self.fields("upstream down: name=%s error=%s n=%d", name, "no route", 3)

        self.assertEqual(
            got["message"],
            "upstream down: name=[2001:db8::1]:853#dot.test error=no route n=3",
        )
        self.assertEqual(got["@timestamp"], "2023-11-14T22:13:20.250Z")
        self.assertEqual(got["log.level"], "warning")
        self.assertEqual(got["event.action"], "upstream-down")
        self.assertEqual(got["destination.address"], "2001:db8::1")
        self.assertEqual(got["destination.port"], 853)
        self.assertEqual(got["destination.domain"], "dot.test")
        self.assertEqual(got["error.message"], "no route")
        self.assertEqual(got["labels.n"], "3")

    def test_upstream_in_clear_text_has_no_domain(self) -> None:
        got = self.fields("upstream up: name=%s", Endpoint("192.0.2.1", 53, ""))

        self.assertEqual(got["destination.address"], "192.0.2.1")
        self.assertNotIn("destination.domain", got)

    def test_several_upstreams_are_a_label(self) -> None:
        got = self.fields("ready: upstream=%s", "192.0.2.1:853#a 192.0.2.2:853#b")

        self.assertEqual(got["labels.upstream"], "192.0.2.1:853#a 192.0.2.2:853#b")

    def test_facts_inside_one_argument_are_fields(self) -> None:
        got = self.fields("state: %s", "name=192.0.2.1:853#dot.test state=up")

        self.assertEqual(got["destination.address"], "192.0.2.1")
        self.assertEqual(got["labels.state"], "up")

    def test_exception_has_type_text_and_traceback(self) -> None:
        try:
            raise ValueError('a "quoted"\nreason')
        except ValueError as error:
            got = self.fields("internal error: thread=%s", "timer", error=error)

        self.assertEqual(got["error.type"], "ValueError")
        self.assertEqual(got["error.message"], 'a "quoted"\nreason')
        self.assertIn("test_exception_has", str(got["error.stack_trace"]))
        self.assertEqual(got["process.thread.name"], "timer")

    def test_text_cannot_begin_another_line(self) -> None:
        form = dotproxy.TextFormatter("%(levelname)s %(message)s")

        text = form.format(log_record(logging.INFO, "x: error=%s", "a\n<0>b\x7f\x9b"))

        self.assertEqual(text, r"INFO x: error=a\010<0>b\127\155")

    def test_journal_is_known_by_its_device_and_inode(self) -> None:
        with tempfile.TemporaryFile() as file:
            status = os.fstat(file.fileno())
            stream = f"{status.st_dev}:{status.st_ino}"
            for text, claim in ((stream, True), (stream + "0", False), ("", False)):
                got = dotproxy.is_journal(file.fileno(), {"JOURNAL_STREAM": text})
                self.assertEqual(got, claim)


class RepeatsTest(DotproxyTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.clock = Clock()
        self.repeats = dotproxy.Repeats(self.clock)

    def passed(self, count: int, template: str = "x: n=%d", *values: object) -> int:
        made = log_record(logging.WARNING, template, *(values or (1,)))
        return sum(bool(self.repeats.filter(made)) for _ in range(count))

    def ended(self, everything: bool = False) -> list[str]:
        return [made.getMessage() for made in self.repeats.ended(everything)]

    def test_sixth_in_a_minute_is_counted_instead(self) -> None:
        self.assertEqual(self.passed(22), 5)
        self.assertEqual(self.ended(), [])

        self.clock.advance(60)

        self.assertEqual(self.ended(), ["x: n=1 repeated=17"])
        self.assertEqual(self.ended(), [])
        self.assertEqual(self.passed(1), 1)

    def test_next_one_after_a_minute_passes_and_the_count_is_kept(self) -> None:
        self.passed(6)
        self.clock.advance(60)

        self.assertEqual(self.passed(6), 5)
        self.assertEqual(self.ended(), ["x: n=1 repeated=1"])

    def test_five_are_not_reported(self) -> None:
        self.passed(5)

        self.assertEqual(self.ended(everything=True), [])

    def test_other_arguments_are_another_message(self) -> None:
        self.passed(9)

        self.assertEqual(self.passed(1, "x: n=%d", 2), 1)

    def test_count_is_told_before_the_end_if_asked(self) -> None:
        self.passed(7)

        self.assertEqual(self.ended(everything=True), ["x: n=1 repeated=2"])

    def test_oldest_makes_room(self) -> None:
        self.passed(6)
        for number in range(dotproxy.Repeats.MESSAGES):
            self.passed(1, "y: n=%d", number)

        self.assertEqual(self.ended(), ["x: n=1 repeated=1"])
        self.assertEqual(self.passed(1), 1)

    def test_nothing_holds_on_to_an_error(self) -> None:
        error = UpstreamError("reset", "100% gone")
        alive = weakref.ref(error)
        self.passed(6, "down: error=%s", error)

        del error
        gc.collect()

        self.assertIsNone(alive())
        self.assertEqual(self.ended(True), ["down: error=100% gone repeated=1"])


class Pipe:
    """A pipe whose writing end is an Output, and a thread that can read it."""

    def __init__(self) -> None:
        self._reading, self.writing = os.pipe()
        self.output = dotproxy.Output(self.writing)
        self._octets = b""
        self._reader = threading.Thread(target=self._read)

    def fill(self) -> int:
        """Leave no room in it; return how many octets that took."""
        os.set_blocking(self.writing, False)
        filled = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                filled += os.write(self.writing, bytes(4096))
        os.set_blocking(self.writing, True)
        return filled

    def read_on(self) -> None:
        """Begin to read."""
        self._reader.start()

    def close(self) -> str:
        """Close the writing end, and return what was read."""
        self.output.close()
        if self._reader.ident is None:
            self.read_on()
        self._reader.join()
        return self._octets.decode()

    def _read(self) -> None:
        with open(self._reading, "rb") as file:
            self._octets = file.read()


class OutputTest(DotproxyTestCase):
    def test_more_than_fits_into_a_pipe_that_does_not_block_is_written(self) -> None:
        pipe, lines = Pipe(), b"0123456789\n" * 50_000
        os.set_blocking(pipe.writing, False)
        pipe.read_on()

        self.assertEqual(pipe.output.write(lines), (0, ""))

        self.assertEqual(pipe.close(), lines.decode())

    def test_lines_after_an_error_begin_anew(self) -> None:
        full = OSError(errno.ENOSPC, "No space")
        writes: list[int | OSError] = [5, full, full, 7]
        taken: list[bytes] = []

        def write(_: int, octets: bytes) -> int:
            result = writes.pop(0)
            if isinstance(result, OSError):
                raise result
            taken.append(octets[:result])
            return result

        output = dotproxy.Output(-1)
        with mock.patch.object(os, "write", write):
            self.assertEqual(output.write(b"one\ntwo\nsix\n"), (2, "No space"))
            self.assertEqual(output.write(b"ten\n"), (1, "No space"))
            self.assertEqual(output.write(b"three\n"), (0, ""))

        self.assertEqual(b"".join(taken), b"one\nt\nthree\n")


class OperationalLogTest(DotproxyTestCase):
    def open(self, *, journal: bool = False) -> tuple[dotproxy.OperationalLog, Pipe]:
        pipe, form = Pipe(), dotproxy.TextFormatter("%(message)s")
        return dotproxy.OperationalLog(pipe.output, form, journal=journal), pipe

    def test_lines_before_the_start_and_at_the_end_are_written(self) -> None:
        log, pipe = self.open()
        log.handle(log_record(logging.INFO, "first"))
        log.start()
        for _ in range(7):
            log.handle(log_record(logging.INFO, "again: n=%d", 1))

        log.close()

        lines = pipe.close().splitlines()
        again = ["again: n=1"] * 5
        self.assertEqual(lines, ["first", *again, "again: n=1 repeated=2"])

    def test_log_that_never_started_writes_at_its_end(self) -> None:
        log, pipe = self.open()
        log.handle(log_record(logging.INFO, "first"))

        log.close()

        self.assertEqual(pipe.close(), "first\n")

    def test_every_line_of_a_traceback_has_its_priority_in_the_journal(self) -> None:
        log, pipe = self.open(journal=True)
        log.handle(log_record(logging.ERROR, "bad", error=ValueError("no")))
        log.handle(log_record(logging.DEBUG, "small"))

        log.close()

        self.assertEqual(pipe.close(), "<3>bad\n<3>ValueError: no\n<7>small\n")

    def test_reader_that_hangs_stalls_nobody_and_the_end_is_bounded(self) -> None:
        log, pipe = self.open()
        filled = pipe.fill()
        log.start()
        for number in range(2 * log.BACKLOG):
            log.handle(log_record(logging.INFO, "line: n=%d", number))
        with mock.patch.object(dotproxy.Courier, "PATIENCE", 0.01):
            log.close()

        (writer,) = [each for each in threading.enumerate() if each.name == "log"]
        pipe.read_on()
        writer.join()
        lines = pipe.close()[filled:].splitlines()
        self.assertIn("line: n=999", lines)
        self.assertLess(len(lines), 2 * log.BACKLOG)
        self.assertEqual(log._courier.dropped, 2 * log.BACKLOG)

    def test_lost_lines_are_counted_in_the_log(self) -> None:
        log, pipe = self.open()
        with self.assertLogs(dotproxy.logger) as logged:
            for number in range(log.BACKLOG + 7):
                log.handle(log_record(logging.INFO, "line: n=%d", number))
            log.close()

        pipe.close()
        told = [each.getMessage() for each in logged.records]
        self.assertEqual(told, ["log lines lost: number=7"])


ASKED_AT, TO_WALL = 1000.0, 1_699_999_000.25
TOOK = 2.0**-10  # s; sums with it are exact
UPSTREAM_NAME = Endpoint("192.0.2.53", 853, "dot.test")


def query_batch(
    asked: bytes,
    answer: bytes,
    *,
    client: tuple[str, int] = ("192.0.2.77", 5000),
    proto: str = "udp",
    source: str = "upstream",
    upstream: Endpoint | None = UPSTREAM_NAME,
) -> dotproxy.AnsweredBatch:
    """Make what the query log gets of one query."""
    if source != "upstream":
        form = dotproxy.Form((proto, "1"))
        label = (source, form, b"", 0, len(asked), len(answer))
        times = ASKED_AT, TOOK
        return dotproxy.AnsweredAtOnce([(asked, answer, client)], [label], times)
    parsed = dotproxy.parse_query(asked, (proto, "1"))
    parsed.client, parsed.received = client, ASKED_AT
    answers = [(parsed, answer, answer[3] & 15)]
    return dotproxy.AnsweredLater(answers, (source, upstream), ASKED_AT + TOOK)


def query_line(
    style: type[dotproxy.QueryLines],
    asked: bytes,
    answer: bytes,
    *,
    privacy: str = "prefix",
    **rest: Any,
) -> str:
    """Render one query."""
    lines = style(privacy, key=b"key")
    return lines.render([query_batch(asked, answer, **rest)], TO_WALL)


query_text = functools.partial(query_line, dotproxy.TextQueryLines)


def query_json(asked: bytes, answer: bytes, **rest: Any) -> dict[str, object]:
    """Render one query as JSON, and parse that."""
    return json_line(query_line(dotproxy.JSONQueryLines, asked, answer, **rest))


class QueryLinesTest(DotproxyTestCase):
    def test_long_query_is_not_kept(self) -> None:
        lines = dotproxy.TextQueryLines("none", key=b"")
        for padding, kept in ((10, 1), (4000, 0)):
            asked = query(do=True, options=option(PADDING, bytes(padding)))
            batch = query_batch(asked, response(asked), source="cache", proto="tcp")
            with self.subTest(padding=padding):
                lines._again.clear()
                self.assertIn(f"tcp {len(asked)} ", lines.render([batch], 0.0))
                self.assertEqual(len(lines._again), kept)

    def test_text_is_one_line_whether_somebody_waited_or_not(self) -> None:
        asked = query("Example.com", id=77, do=True)
        answer = response(asked, "192.0.2.1")

        for source, where in (
            ("cache", "cache -"),
            ("upstream", "upstream 192.0.2.53:853#dot.test"),
        ):
            self.assertEqual(
                query_text(asked, answer, source=source),
                "2023-11-14T22:13:20.250Z 192.0.2.0/24 - 77 "
                f'"A IN Example.com. udp {len(asked)} true 1232" NOERROR qr,rd,ra '
                f"{len(answer)} 0.000977s {where}\n",
            )

    def test_line_to_the_journal_has_a_priority_and_no_time(self) -> None:
        asked = query("example.com")
        batch = query_batch(asked, response(asked))
        for style, start in (
            (dotproxy.TextQueryLines, "<6>192.0.2.0/24 - 4660 "),
            (dotproxy.JSONQueryLines, '<6>{"@timestamp":"1970-'),
        ):
            line = style("prefix", key=b"", prefix="<6>").render([batch], 0.0)
            self.assertEqual(line[: len(start)], start)

    def test_json_has_the_fields_of_the_schema(self) -> None:
        asked = query("example.com", "AAAA", id=77)
        answer = response(asked, "2001:db8::1", "2001:db8::2", rcode=0)

        got = query_json(asked, answer, proto="dot", privacy="none")

        for name, value in {
            "@timestamp": "2023-11-14T22:13:20.250Z",
            "dns.id": "77",
            "dns.question.name": "example.com",
            "dns.question.type": "AAAA",
            "dns.question.class": "IN",
            "dns.op_code": "QUERY",
            "dns.header_flags": ["RD", "RA"],
            "dns.response_code": "NOERROR",
            "dns.resolved_ip": ["2001:db8::1", "2001:db8::2"],
            "event.outcome": "success",
            "event.duration": 976_562,
            "network.transport": "tcp",
            "network.type": "ipv4",
            "labels.proto": "dot",
            "labels.source": "upstream",
            "client.ip": "192.0.2.77",
            "client.port": 5000,
            "client.bytes": len(asked),
            "server.bytes": len(answer),
            "destination.address": "192.0.2.53",
            "destination.port": 853,
        }.items():
            self.assertEqual(got[name], value, name)

    def test_json_has_addresses_alone(self) -> None:
        asked = query("example.com")
        for answer, found in (
            (response(asked, "192.0.2.1"), ["192.0.2.1"]),
            (response(asked, "192.0.2.1", "192.0.2.2"), ["192.0.2.1", "192.0.2.2"]),
            (response(asked, record(b"\xc0\x0c", "A", b"\1" * 5)), None),
            (response(asked, record(b"\xc0\x0c", "A", b"\1" * 260)), None),
            (response(asked, record(b"\xc0\x0c", "TXT", b"\3abc")), None),
            (response(asked), None),
        ):
            got = query_json(asked, answer)
            self.assertEqual(got.get("dns.resolved_ip"), found)

    def test_privacy_of_clients(self) -> None:
        asked = query("example.com")
        answer = response(asked, "192.0.2.1")
        v4, v6 = ("192.0.2.77", 5000), ("2001:db8:1:2ff::7%lo", 5000)
        for privacy, client, text in (
            ("none", v4, "192.0.2.77:5000"),
            ("none", v6, "[2001:db8:1:2ff::7]:5000"),
            ("prefix", v4, "192.0.2.0/24"),
            ("prefix", v6, "2001:db8:1:200::/56"),
            ("no-names", v4, "192.0.2.0/24"),
        ):
            with self.subTest(privacy=privacy, client=client):
                line = query_text(asked, answer, privacy=privacy, client=client)
                self.assertEqual(line.split()[1], text)

    def test_hash_tells_clients_apart_and_nothing_more(self) -> None:
        asked = query("example.com")
        answer = response(asked, "192.0.2.1")
        names = set()
        for host in ("192.0.2.77", "192.0.2.78", "192.0.2.77"):
            got = query_json(asked, answer, privacy="hash", client=(host, 1))
            self.assertNotIn("client.ip", got)
            names.add(got["client.address"])

        self.assertEqual(len(names), 2)
        mask = dotproxy.mask_client
        self.assertEqual(mask("::ffff:192.0.2.77", "prefix", b""), "192.0.2.0/24")
        self.assertNotEqual(
            mask("192.0.2.77", "hash", b"1"), mask("192.0.2.77", "hash", b"2")
        )

    def test_no_names_has_neither_name_nor_addresses(self) -> None:
        asked = query("secret.example")
        answer = response(asked, "198.51.100.1")

        got = query_json(asked, answer, privacy="no-names")
        text = query_text(asked, answer, privacy="no-names")

        self.assertEqual(got["dns.question.name"], "-")
        self.assertNotIn("dns.resolved_ip", got)
        self.assertIn('"A IN - udp', text)

    def test_any_octet_in_a_name_is_escaped(self) -> None:
        name = b'\x05a.b\\"\x03\n\xff \0'
        asked = counted(1, 0, 0, 0, body=name + b"\0\1\0\1")
        answer = response(asked, rcode=3)

        text = r"a\.b\\\".\010\255\032"
        self.assertEqual(query_json(asked, answer)["dns.question.name"], text)
        self.assertIn(f'"A IN {text}. udp', query_text(asked, answer))

    def test_root_is_a_dot(self) -> None:
        asked = query(".")
        answer = response(asked)

        self.assertEqual(query_json(asked, answer)["dns.question.name"], ".")
        self.assertIn('"A IN . udp', query_text(asked, answer))

    def test_unknown_type_class_and_rcode_are_numbers(self) -> None:
        asked = counted(1, 0, 0, 0, body=b"\0\xff\x01\0\x07")
        answer = response(asked, rcode=11)

        got = query_json(asked, answer)

        self.assertEqual(got["dns.question.type"], "TYPE65281")
        self.assertEqual(got["dns.question.class"], "CLASS7")
        self.assertEqual(got["dns.response_code"], "RCODE11")
        self.assertEqual(got["event.outcome"], "failure")

    def test_what_cannot_be_parsed_has_a_line(self) -> None:
        asked = counted(0, 0, 0, 0, flags=0x2000)
        answer = dotproxy.build_format_error(asked, Rcode.NOTIMP)

        got = query_json(asked, answer, source="local")
        text = query_text(asked, answer, source="local")

        self.assertEqual(got["dns.op_code"], "NOTIFY")
        self.assertEqual(got["dns.response_code"], "NOTIMP")
        self.assertNotIn("dns.question.name", got)
        self.assertIn('"- - - udp 12 false 512" NOTIMP qr', text)
        self.assertTrue(text.endswith(" local -\n"))

    def test_rcode_has_its_upper_bits(self) -> None:
        asked = query("example.com", do=True)
        parsed = dotproxy.parse_query(asked)
        refusal = dotproxy.error_response(Rcode.BADVERS)
        answer = dotproxy.build_answer(parsed, refusal)

        for source in ("upstream", "local"):
            got = query_json(asked, answer, source=source)
            self.assertEqual(got["dns.response_code"], "BADVERS")


class QueryLogTest(DotproxyTestCase):
    def setUp(self) -> None:
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = os.path.join(folder.name, "query.log")
        self.clock = Clock()
        small = mock.patch.object(dotproxy.QueryLog, "BACKLOG", 100)
        small.start()
        self.addCleanup(small.stop)
        asked = query("example.com")
        self.batch = query_batch(asked, response(asked, "192.0.2.1"))

    def put(self, log: dotproxy.QueryLog, number: int = 1) -> None:
        """Have so many lines written."""
        for _ in range(number):
            log.put(self.batch)

    def open(self) -> dotproxy.QueryLog:
        lines = dotproxy.TextQueryLines("prefix", key=b"")
        return dotproxy.QueryLog(self.path, lines, clock=self.clock)

    def lines(self, suffix: str = "") -> int:
        with open(self.path + suffix, encoding="ascii") as file:
            return file.read().count("\n")

    def test_file_is_appended_to_and_others_may_not_read_it(self) -> None:
        for _ in range(2):
            log = self.open()
            log.start()
            self.put(log, 3)
            log.close()

        self.assertEqual(self.lines(), 6)
        self.assertEqual(os.stat(self.path).st_mode & 0o137, 0)

    def test_new_file_is_for_its_group_whatever_the_umask(self) -> None:
        self.addCleanup(os.umask, os.umask(0o077))

        self.open().close()

        self.assertEqual(os.stat(self.path).st_mode & 0o777, 0o640)

    def test_what_finds_no_room_is_counted_and_told_once_a_minute(self) -> None:
        log = self.open()
        with self.assertLogs(dotproxy.logger) as logged:
            for lost in (7, 1):
                self.put(log, log.BACKLOG + lost)
                log._courier._carry()
            log.close()

        self.assertEqual((self.lines(), log.dropped), (2 * log.BACKLOG, 8))
        told = [each.getMessage()[-8:] for each in logged.records]
        self.assertEqual(told, ["number=7", "number=1"])  # the second at the end

    def test_batch_without_room_is_left_out_whole_and_counted(self) -> None:
        log = self.open()
        witness = dotproxy.Witness(query_log=log)
        asked = query("example.com")
        later = query_batch(asked, response(asked))
        at_once = query_batch(asked, response(asked), source="cache")
        assert isinstance(later, dotproxy.AnsweredLater)
        assert isinstance(at_once, dotproxy.AnsweredAtOnce)
        self.put(log, log.BACKLOG - 2)

        witness.later([*later.answers] * 3, later.origin, later.now)
        witness.at_once([*at_once.labels] * 4, [*at_once.given] * 4, at_once.times)
        witness.later([*later.answers] * 2, later.origin, later.now)

        with self.assertLogs(dotproxy.logger):
            log.close()
        self.assertEqual((self.lines(), log.dropped), (log.BACKLOG, 7))

    def test_losses_are_told_once_a_minute(self) -> None:
        log = self.open()
        with self.assertLogs(dotproxy.logger) as logged:
            for seconds in (0, 59, 1):
                self.clock.advance(seconds)
                self.put(log, log.BACKLOG + 1)
                log._courier._carry()

            self.assertEqual(len(logged.records), 2)
            log.close()

    def test_large_messages_take_more_of_the_room(self) -> None:
        log = self.open()
        witness = dotproxy.Witness(query_log=log)
        asked = query("example.com")
        large = response(asked, record("a", "TXT", bytes(50_000)))
        for source in ("upstream", "cache"):
            batch = query_batch(asked, large, source=source)
            for _ in range(2):
                if isinstance(batch, dotproxy.AnsweredLater):
                    witness.later(*batch)
                else:
                    witness.at_once([*batch.labels], batch.given, batch.times)

        with self.assertLogs(dotproxy.logger):
            log.close()
        self.assertEqual((self.lines(), log.dropped), (2, 2))

    def test_line_after_one_that_was_cut_begins_anew(self) -> None:
        with open(self.path, "wb") as file:
            file.write(b"a whole line\nhalf a li")
        log = self.open()
        self.put(log)
        log.close()

        self.assertEqual(self.lines(), 3)

    def test_renamed_file_is_left_for_a_new_one(self) -> None:
        log = self.open()
        log.start()
        self.put(log)
        wait_until(lambda: self.lines() == 1)
        os.rename(self.path, self.path + ".1")
        log.reopen()
        wait_until(lambda: os.path.exists(self.path))
        self.put(log, 2)
        log.close()

        self.assertEqual((self.lines(".1"), self.lines()), (1, 2))

    def test_reload_opens_the_file_again(self) -> None:
        with serving(answer, f"--query-log={self.path}") as served:
            os.rename(self.path, f"{self.path}.1")
            served.daemon.reload()
            wait_until(lambda: os.path.exists(self.path))

    def test_file_that_cannot_be_reopened_is_kept(self) -> None:
        log = self.open()
        fails = mock.patch.object(
            dotproxy, "open_log", side_effect=PermissionError(13, "no permission")
        )
        with fails, self.assertLogs(dotproxy.logger) as logged:
            log.reopen()
            self.put(log)
            log.close()

        self.assertEqual(self.lines(), 1)
        self.assertIn("error=no permission", logged.records[0].getMessage())

    def test_full_disk_is_told_once_and_does_not_end_the_log(self) -> None:
        log = self.open()
        results = [(1, "disk full"), (1, "disk full"), (0, "")]
        write = mock.Mock(side_effect=results)
        patch = mock.patch.object(dotproxy.Output, "write", write)
        with patch, self.assertLogs(dotproxy.logger) as logged:
            for done in range(1, 4):
                self.put(log)
                log._courier._carry()
                self.assertEqual(write.call_count, done)
            log.close()

        told = [m.getMessage().partition(":")[0] for m in logged.records]
        self.assertEqual(told.count("query log fails"), 1)
        self.assertEqual(log.dropped, 2)

    def test_file_that_cannot_be_opened_is_an_error_with_a_cure(self) -> None:
        self.path = os.path.dirname(self.path)

        with self.assertRaisesRegex(dotproxy.ConfigError, "mend --query-log"):
            self.open()


# ---- Time ----------------------------------------------------------------------------


class ClockTest(DotproxyTestCase):
    @unittest.skipUnless(sys.platform == "linux", "names Linux's clock")
    def test_time_asleep_counts(self) -> None:
        first, now = time.clock_gettime(time.CLOCK_BOOTTIME), dotproxy.elapsed()

        self.assertLessEqual(first, now)
        self.assertLessEqual(now, time.clock_gettime(time.CLOCK_BOOTTIME))

    def test_every_clock_is_the_same(self) -> None:
        others = []
        for name, each in vars(dotproxy).items():
            if getattr(each, "__module__", "") == "dotproxy" and callable(each):
                with contextlib.suppress(ValueError):
                    clock = inspect.signature(each).parameters.get("clock")
                    if clock and clock.default not in (clock.empty, dotproxy.elapsed):
                        others.append(name)

        self.assertEqual(others, ["Supervisor"])


# ---- Timer and worker threads --------------------------------------------------------


class TimerTest(DotproxyTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.clock = Clock()
        self.timer = dotproxy.Timer(self.clock)
        self.calls: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.addCleanup(self.timer.close)

    def plan(self, when: float, name: str) -> None:
        self.timer.at(when, lambda: self.calls.put(name))

    def test_functions_are_called_in_the_order_they_are_due(self) -> None:
        self.plan(1002, "later")
        self.plan(1001, "sooner")
        self.plan(1001, "sooner too")
        self.clock.advance(3)

        self.timer.start()

        names = [self.calls.get(timeout=5) for _ in range(3)]
        self.assertEqual(names, ["sooner", "sooner too", "later"])

    def test_function_is_not_called_before_it_is_due(self) -> None:
        self.plan(self.clock.now, "due only when the clock moves")
        self.plan(self.clock.now - 1, "due")

        self.timer.start()

        self.assertEqual(self.calls.get(timeout=5), "due")
        self.timer.close()
        self.assertTrue(self.calls.empty())

    def test_sooner_function_wakes_a_waiting_timer(self) -> None:
        self.plan(1_000_000, "far away")
        self.timer.start()

        self.plan(999, "now")

        self.assertEqual(self.calls.get(timeout=5), "now")

    def test_function_may_plan_another(self) -> None:
        self.timer.at(999, lambda: self.plan(999, "second"))

        self.timer.start()

        self.assertEqual(self.calls.get(timeout=5), "second")

    def test_error_in_a_function_is_logged_and_the_next_is_called(self) -> None:
        def fail() -> None:
            raise ValueError("a bug")

        self.timer.at(998, fail)
        self.plan(999, "next")
        with self.assertLogs(dotproxy.logger, "ERROR") as logged:
            self.timer.start()
            self.assertEqual(self.calls.get(timeout=5), "next")
        self.assertIn("a bug", logged.output[0])

    def test_close_forgets_what_is_not_due(self) -> None:
        self.plan(1_000_000, "never")
        self.timer.start()

        self.timer.close()
        self.timer.close()

        self.assertTrue(self.calls.empty())

    def test_close_before_start_does_nothing(self) -> None:
        self.timer.close()


class ProcessorBindingTest(DotproxyTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.processors = {0, 1}
        for module, name, function in (
            (os, "sched_getaffinity", lambda _: self.processors),
            (os, "sched_setaffinity", self.bind),
            (sys, "_is_gil_enabled", lambda: True),
        ):
            patch = mock.patch.object(module, name, function, create=True)
            patch.start()
            self.addCleanup(patch.stop)
        self.binding = dotproxy.ProcessorBinding()

    def bind(self, thread: int, processors: set[int]) -> None:
        self.processors = processors

    def test_sum_of_all_rates_binds_and_sets_free(self) -> None:
        for source, rate, number in (
            ("one", 3000.0, 2),
            ("other", 3000.0, 1),
            ("other", 0.0, 1),  # neither busy nor quiet
            ("one", 500.0, 2),
        ):
            self.binding.update(source, rate)
            with self.subTest(source=source, rate=rate):
                self.assertEqual(len(self.processors), number)

    def test_quiet_group_does_not_set_a_busy_one_free(self) -> None:
        self.binding.update("busy", 5000.0)
        self.binding.update("quiet", 0.0)

        self.assertEqual(len(self.processors), 1)


def join(barrier: threading.Barrier) -> None:
    """Wait at a barrier, as a task."""
    barrier.wait(5)


def occupy(started: threading.Event, go_on: threading.Event) -> None:
    """Keep a thread busy, as a task."""
    started.set()
    go_on.wait(5)


class WorkerPoolTest(DotproxyTestCase):
    def pool(self, threads: int, backlog: int = 100) -> dotproxy.WorkerPool:
        pool = dotproxy.WorkerPool("worker", threads, backlog)
        self.addCleanup(pool.close)
        return pool

    def test_tasks_run_at_once_up_to_the_number_of_threads(self) -> None:
        together = threading.Barrier(4)
        pool = self.pool(3)

        for _ in range(3):
            pool.submit(functools.partial(join, together))

        together.wait(5)

    def test_tasks_beyond_the_threads_wait_for_one(self) -> None:
        names: queue.SimpleQueue[str] = queue.SimpleQueue()
        pool = self.pool(1)

        for _ in range(20):
            pool.submit(lambda: names.put(threading.current_thread().name))

        self.assertEqual({names.get(timeout=5) for _ in range(20)}, {"worker-1"})

    def test_task_is_refused_while_the_system_gives_no_thread(self) -> None:
        pool, done = self.pool(1), threading.Event()

        none = mock.patch.object(threading.Thread, "start", side_effect=RuntimeError)
        with none:
            taken = [pool.submit(done.set) for _ in range(3)]

        self.assertEqual(taken, [False] * 3)
        self.assertFalse(done.is_set())
        self.assertTrue(pool.submit(done.set))
        self.assertTrue(done.wait(5))

    def test_task_beyond_the_backlog_is_refused(self) -> None:
        started, go_on = threading.Event(), threading.Event()
        pool = self.pool(1, backlog=2)
        pool.submit(lambda: occupy(started, go_on))
        started.wait(5)

        taken = [pool.submit(lambda: None) for _ in range(3)]

        go_on.set()
        self.assertEqual(taken, [True, True, False])

    def test_close_finishes_what_waits_and_takes_no_more(self) -> None:
        done: list[int] = []
        pool = self.pool(2)
        for number in range(50):
            pool.submit(functools.partial(done.append, number))

        pool.close()

        self.assertEqual(sorted(done), list(range(50)))
        self.assertFalse(pool.submit(lambda: None))

    def test_close_does_not_wait_for_the_idle_time(self) -> None:
        pool = self.pool(2)
        together = threading.Barrier(3)
        for _ in range(2):
            pool.submit(functools.partial(join, together))
        join(together)
        wait_until(lambda: pool._idle == 2)
        closing = threading.Thread(target=pool.close)

        closing.start()

        closing.join(pool.IDLE / 2)
        self.assertFalse(closing.is_alive())

    def test_error_in_a_task_is_logged_and_the_next_runs(self) -> None:
        def fail() -> None:
            raise ValueError("a bug")

        done = threading.Event()
        pool = self.pool(1)
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


# ---- Upstream connections ------------------------------------------------------------


class PinTest(DotproxyTestCase):
    def test_pin_is_what_openssl_says(self) -> None:
        for text, pin in (
            (CA_PEM, CA_PIN),
            (GOOD_PEM, GOOD_PIN),
            (GOOD2_PEM, GOOD2_PIN),
            (WRONG_NAME_PEM, GOOD_PIN),  # another certificate for the same key
        ):
            with self.subTest(pin):
                certificate = ssl.PEM_cert_to_DER_cert(text)
                self.assertEqual(dotproxy.public_key_pin(certificate), pin)

    def test_certificate_cut_short_is_a_format_error(self) -> None:
        certificate = ssl.PEM_cert_to_DER_cert(GOOD_PEM)
        for size in range(len(certificate)):
            with self.subTest(size=size), self.assertRaises(FormatError):
                dotproxy.public_key_pin(certificate[:size])

    def test_garbage_is_a_format_error_or_some_pin(self) -> None:
        for text in damaged([ssl.PEM_cert_to_DER_cert(GOOD_PEM)], 2000):
            with contextlib.suppress(FormatError):
                self.assertEqual(len(dotproxy.public_key_pin(text)), 44)

    def test_field_of_another_type_is_a_format_error(self) -> None:
        fields = b"\x02\x01\1" + b"\x30\0" * 5
        signed = b"\x30\x0d" + fields
        self.assertEqual(len(dotproxy.public_key_pin(b"\x30\x0f" + signed)), 44)
        for offset in (0, 2, 5, 7, 9, 11, 13):
            wrong = signed[:offset] + b"\x31" + signed[offset + 1 :]
            with self.subTest(offset=offset), self.assertRaises(FormatError):
                dotproxy.public_key_pin(b"\x30\x0f" + wrong)

    def test_length_of_the_indefinite_form_is_a_format_error(self) -> None:
        with self.assertRaises(FormatError):
            dotproxy.take_der(b"\x30\x80\0\0", dotproxy.SEQUENCE)

    def test_name_without_a_pin_may_have_any_key(self) -> None:
        trust = dotproxy.Trust(PKI.ca, pins=[("other.test", CA_PIN)])

        trust.check_pin("dot.test", b"")

    def test_certificate_that_cannot_be_read_is_refused(self) -> None:
        trust = dotproxy.Trust(PKI.ca, pins=[("dot.test", GOOD_PIN)])

        with self.assertRaisesRegex(UpstreamError, "cannot read") as caught:
            trust.check_pin("dot.test", b"")

        self.assertEqual(caught.exception.cause, "certificate")


class Owner(dotproxy.ConnectionOwner):
    """Keeps what a connection tells."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.lost = threading.Event()
        self.arrived = threading.Semaphore(0)
        self.answers: list[dotproxy.Answer] = []
        self.orphans: list[dotproxy.Exchange] = []
        self.error = dotproxy.UpstreamError("none", "not lost")

    def connection_opened(self, connection: dotproxy.Connection) -> None:
        self.opened.set()

    def connection_answered(
        self,
        connection: dotproxy.Connection,
        answers: list[dotproxy.Answer],
        now: float,
    ) -> None:
        self.answers += answers
        for _ in answers:
            self.arrived.release()

    def connection_lost(
        self,
        connection: dotproxy.Connection,
        error: dotproxy.UpstreamError,
        orphans: list[dotproxy.Exchange],
    ) -> None:
        self.error, self.orphans = error, orphans
        self.lost.set()

    @property
    def bodies(self) -> list[bytes]:
        return [response.body for _, response, _ in self.answers]

    @property
    def answered(self) -> list[dotproxy.Exchange]:
        return [exchange for exchange, _, _ in self.answers]


def der(pem_path: str) -> bytes:
    """Return the first certificate of a file."""
    with open(pem_path, encoding="ascii") as file:
        text, end, _ = file.read().partition("-----END CERTIFICATE-----")
    return ssl.PEM_cert_to_DER_cert(text + end)


class CertificateTest(DotproxyTestCase):
    def test_dates_in_both_notations(self) -> None:
        for path, days in ((PKI.good, 29220), (PKI.expired, 31)):  # 80 years, a month
            with self.subTest(path):
                first, last = dotproxy.certificate_dates(der(path))
                self.assertEqual(first, 1577836800)  # 2020-01-01
                self.assertEqual(last - first, days * 86400)

    def test_dates_that_cannot_be_read_are_a_format_error(self) -> None:
        certificate = der(PKI.good)
        for size in range(150):
            with self.subTest(size=size), self.assertRaises(FormatError):
                dotproxy.certificate_dates(certificate[:size])
        with self.assertRaises(FormatError):
            dotproxy.certificate_dates(certificate.replace(b"200101", b"209901"))

    def test_peer_of_an_open_connection_is_told(self) -> None:
        owner = Owner()
        with FakeUpstream() as upstream:
            endpoint = Endpoint(upstream.host, upstream.port, "dot.test")
            trust = dotproxy.Trust(PKI.ca)
            connection = Connection(endpoint, trust, owner, label="upstream")
            connection.start()
            self.assertTrue(owner.opened.wait(5))
            peer = connection.peer()
            connection.close()
            connection.join()

        assert peer is not None
        self.assertEqual((peer.version, peer.alpn), ("TLSv1.3", "dot"))
        self.assertEqual(peer.names, ["dot.test", "127.0.0.1", "0:0:0:0:0:0:0:1"])
        self.assertEqual(peer.certificate, der(PKI.good))
        self.assertFalse(peer.resumed)


def asking(message: bytes) -> dotproxy.Exchange:
    """Make an exchange of a client's query."""
    return dotproxy.Exchange(dotproxy.parse_query(message), 0.0, 4.0)


class ConnectionTest(DotproxyTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.owner = Owner()
        self.trust = dotproxy.Trust(PKI.ca)

    @contextlib.contextmanager
    def connecting(
        self, upstream: FakeUpstream, name: str = "dot.test"
    ) -> Iterator[dotproxy.Connection]:
        """Have a connection to the upstream while in the block."""
        endpoint = Endpoint(upstream.host, upstream.port, name)
        connection = dotproxy.Connection(
            endpoint, self.trust, self.owner, label="upstream"
        )
        connection.start()
        try:
            yield connection
        finally:
            connection.close()
            connection.join()

    @contextlib.contextmanager
    def connected(
        self, upstream: FakeUpstream, name: str = "dot.test"
    ) -> Iterator[dotproxy.Connection]:
        """The same, and it is open."""
        with self.connecting(upstream, name) as connection:
            self.assertTrue(self.owner.opened.wait(5), self.owner.error)
            yield connection

    def refused(self, upstream: FakeUpstream, name: str = "dot.test") -> str:
        """Return why a connection does not open; no query may get through."""
        with self.connecting(upstream, name) as connection:
            self.assertTrue(self.owner.lost.wait(5))
            self.assertFalse(connection.send([asking(query())], 0.0))
        self.assertFalse(self.owner.opened.is_set())
        self.assertEqual(upstream.queries, [])
        return str(self.owner.error)

    def wait_for_answers(self, count: int) -> None:
        for _ in range(count):
            self.assertTrue(self.owner.arrived.acquire(timeout=5), self.owner.error)

    def test_server_name_and_alpn_are_sent(self) -> None:
        with FakeUpstream() as upstream, self.connected(upstream):
            upstream.wait_for(lambda u: u.handshakes == 1)

            client = upstream.accepted[0]
            self.assertEqual((client.server_name, client.alpn), ("dot.test", "dot"))
            self.assertIn(client.version, ("TLSv1.2", "TLSv1.3"))

    def test_tls_1_2_is_accepted(self) -> None:
        version = ssl.TLSVersion.TLSv1_2
        upstream = FakeUpstream(maximum_version=version)
        with upstream, self.connected(upstream) as connection:
            self.assertEqual(connection.facts()[0], "TLSv1.2")

    def test_address_in_the_certificate_needs_no_name(self) -> None:
        for host in (LOCALHOST, LOCALHOST_V6):
            self.owner = Owner()
            with self.subTest(host), FakeUpstream(host=host) as upstream:
                with self.connected(upstream, name=host) as connection:
                    connection.send([asking(query())], 0.0)
                    self.wait_for_answers(1)
                self.assertIsNone(upstream.accepted[0].server_name)

    def test_old_tls_gets_no_query_and_the_error_says_so(self) -> None:
        with FakeUpstream(maximum_version=ssl.TLSVersion.TLSv1_1) as upstream:
            self.assertIn("TLS 1.2 or newer", self.refused(upstream))

    def test_version_below_the_lowest_wanted_gets_no_query(self) -> None:
        self.trust = dotproxy.Trust(PKI.ca, tls_min="1.3")
        with FakeUpstream(maximum_version=ssl.TLSVersion.TLSv1_2) as upstream:
            self.assertIn("TLS 1.3 or newer", self.refused(upstream))

    def test_pinned_key_is_accepted(self) -> None:
        pins = [("dot.test", GOOD_PIN), ("dot.test", GOOD2_PIN)]
        self.trust = dotproxy.Trust(PKI.ca, pins=pins)
        for certificate in (PKI.good, PKI.good2):
            self.owner = Owner()
            upstream = FakeUpstream(certificate=certificate)
            with upstream, self.connected(upstream, name="DOT.test") as connection:
                connection.send([asking(query())], 0.0)
                self.wait_for_answers(1)

    def test_other_key_gets_no_query_and_the_error_tells_its_pin(self) -> None:
        # A CA's key is no pin of the server's own.
        for pin in (GOOD2_PIN, CA_PIN):
            self.owner = Owner()
            self.trust = dotproxy.Trust(PKI.ca, pins=[("dot.test", pin)])
            with self.subTest(pin), FakeUpstream() as upstream:
                error = self.refused(upstream, name="DOT.test")
                self.assertIn(f"--pin DOT.test={GOOD_PIN}", error)
                self.assertEqual(self.owner.error.cause, "certificate")

    def test_pinned_key_does_not_make_up_for_a_bad_certificate(self) -> None:
        self.trust = dotproxy.Trust(PKI.ca, pins=[("dot.test", GOOD_PIN)])
        for certificate in (PKI.wrong_name, PKI.expired, PKI.unknown_ca):
            self.owner = Owner()
            with FakeUpstream(certificate=certificate) as upstream:
                self.assertNotIn("--pin", self.refused(upstream))

    def test_handshake_octet_by_octet_ends_at_its_deadline(self) -> None:
        clock, raw = Clock(), mock.Mock()

        def receive(_: int) -> bytes:
            clock.advance(1.0)
            return b"x"

        raw.recv.side_effect = receive
        with self.assertRaises(socket.timeout):
            dotproxy.shake_hands(raw, lambda _: (b"", False), clock() + 5.0, clock)

        self.assertEqual(raw.recv.call_count, 5)

    def test_tls_version_that_the_library_lacks_is_an_error_with_a_cure(self) -> None:
        def refuse(_: object, version: object) -> None:
            raise ValueError(f"Unsupported protocol version {version}")

        lacking = property(None, refuse)
        with (
            mock.patch.object(ssl.SSLContext, "minimum_version", lacking),
            self.assertRaisesRegex(dotproxy.ConfigError, "no TLS 1.3; mend --tls-min"),
        ):
            dotproxy.Trust(PKI.ca, tls_min="1.3")

    def test_certificate_that_is_no_authority_can_be_trusted_as_well(self) -> None:
        self.assertTrue(dotproxy.Trust(PKI.good_alone).has_authorities())

    def test_wrong_name_gets_no_query_and_the_error_tells_the_right_ones(self) -> None:
        with FakeUpstream(certificate=PKI.wrong_name) as upstream:
            error = self.refused(upstream)

        self.assertIn("for other.test, alias.other.test, not for dot.test", error)

    def test_names_are_told_where_the_ca_file_can_be_read_no_more(self) -> None:
        build = ssl.create_default_context

        def unreadable(
            cafile: str | None = None, cadata: bytes | None = None
        ) -> ssl.SSLContext:
            if cafile:
                raise PermissionError(errno.EACCES, "Permission denied")
            return build(cadata=cadata)

        dropped = mock.patch.object(ssl, "create_default_context", unreadable)
        with FakeUpstream(certificate=PKI.wrong_name) as upstream, dropped:
            error = self.refused(upstream)

        self.assertIn("for other.test, alias.other.test, not for dot.test", error)

    def test_wrong_address_gets_no_query_and_the_error_tells_the_names(self) -> None:
        with FakeUpstream(certificate=PKI.wrong_name) as upstream:
            error = self.refused(upstream, name=LOCALHOST)

        self.assertIn("for other.test, alias.other.test, not for 127.0.0.1", error)

    def test_bad_certificate_gets_no_query_and_the_error_says_why(self) -> None:
        for certificate, reason in (
            (PKI.expired, "expired"),
            (PKI.unknown_ca, "from an unknown CA"),
        ):
            self.owner = Owner()
            with (
                self.subTest(reason),
                FakeUpstream(certificate=certificate) as upstream,
            ):
                self.assertIn(reason, self.refused(upstream))
                self.assertEqual(self.owner.error.cause, "certificate")

    def test_server_that_does_not_speak_tls_is_an_error(self) -> None:
        for mode, cause in (("close", "tls"), ("garbage", "tls")):
            self.owner = Owner()
            with self.subTest(mode), FakeUpstream(on_accept=mode) as upstream:
                self.assertIn("TLS handshake", self.refused(upstream))
                self.assertEqual(self.owner.error.cause, cause)

    def test_close_ends_a_handshake_that_hangs(self) -> None:
        upstream = FakeUpstream(on_accept="hang")
        with upstream, self.connecting(upstream):
            upstream.wait_for(lambda u: u.connections == 1)

        self.assertEqual(self.owner.error.cause, "ended")

    def test_each_address_of_a_name_has_its_share_of_the_time(self) -> None:
        clock, shares = Clock(), []
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 853))] * 3

        def give_up(_: object, patience: float) -> None:
            shares.append(patience)
            clock.advance(patience)
            raise socket.timeout

        endpoint = Endpoint("dns.example", 853, "dot.test")
        line = dotproxy.Line(endpoint, self.trust, clock)
        with (
            mock.patch.object(socket, "getaddrinfo", return_value=found),
            mock.patch.multiple(
                line,
                _begin_to_connect=lambda raw, _: raw.close(),
                _finish_to_connect=give_up,
            ),
            self.assertRaises(UpstreamError),
        ):
            line.open((3.0, 3.0), None)

        self.assertEqual(shares, [1.5, 0.75, 0.75])

    def test_plain_endpoint_is_asked_without_tls(self) -> None:
        many = [asking(query(f"{n}.example")) for n in range(100)]
        upstream = FakeUpstream(on_accept="plain")
        with upstream, self.connected(upstream, name="") as connection:
            connection.send(many, 0.0)
            self.wait_for_answers(100)

            self.assertEqual(connection.facts()[:2], ("none", False))
            self.assertIsNone(connection.session())
        self.assertEqual(self.owner.error.cause, "ended")

    def test_misfit_ends_a_plain_connection(self) -> None:
        for script, cause in (
            (wrong_id, "garbage"),
            (other_case, "garbage"),
            (garbage, "garbage"),
            (short_frame, "closed"),
            (cut, "closed"),
            (reset, "reset"),
        ):
            self.owner = Owner()
            upstream = FakeUpstream(script, on_accept="plain")
            with self.subTest(str(script)), upstream:
                self.check_misfit(upstream, cause, name="")

    def test_nothing_listening_is_an_error_that_tells_the_port(self) -> None:
        upstream = FakeUpstream()
        with upstream:
            pass

        error = self.refused(upstream)

        self.assertIn(f"connection refused: nothing on TCP port {upstream.port}", error)

    def test_ids_are_unique_and_not_the_clients(self) -> None:
        exchanges = [asking(query(f"{n}.example", id=7)) for n in range(2000)]
        with FakeUpstream(silence) as upstream, self.connected(upstream) as connection:
            connection.send(exchanges, 0.0)
            upstream.wait_for(lambda u: len(u.queries) == 2000)

        ids = {message.id for message in upstream.queries}
        self.assertEqual(len(ids), 2000)
        self.assertGreater(max(ids) - min(ids), 30000)  # and not in a row

    def test_answers_reach_their_exchanges_in_any_order(self) -> None:
        hold = Hold(lambda message, _: f"192.0.2.{message.qname.split('.')[0]}")
        exchanges = [asking(query(f"{n}.example")) for n in range(100)]
        with FakeUpstream(hold) as upstream, self.connected(upstream) as connection:
            connection.send(exchanges, 0.0)
            hold.release(100, reverse=True)
            self.wait_for_answers(100)

        for exchange, body in zip(self.owner.answered, self.owner.bodies):
            number = int(exchange.query.question[1:].split(b"\7")[0])
            self.assertEqual(body[-1], number)

    def test_answers_in_one_record_or_octet_by_octet_arrive(self) -> None:
        for name, script in {"one record": together(3), "octets": trickle}.items():
            self.owner = Owner()
            exchanges = [asking(query(f"{n}.example")) for n in range(3)]
            with self.subTest(name), FakeUpstream(script) as upstream:
                with self.connected(upstream) as connection:
                    connection.send(exchanges, 0.0)
                    self.wait_for_answers(3)
                self.assertEqual(set(self.owner.answered), set(exchanges))

    def test_answer_of_the_largest_size_arrives(self) -> None:
        def large(message: Message, _: FakeConnection) -> bytes:
            room = 65535 - len(response(message.raw, record("a", "TXT", b"")))
            return response(message.raw, record("a", "TXT", bytes(room)))

        with FakeUpstream(large) as upstream, self.connected(upstream) as connection:
            connection.send([asking(query())], 0.0)
            self.wait_for_answers(1)

        self.assertGreater(len(self.owner.bodies[0]), 65000)

    def test_misfit_ends_the_connection_and_gives_the_question_back(self) -> None:
        for script, cause in (
            (wrong_id, "garbage"),
            (wrong_question, "garbage"),
            (other_case, "garbage"),
            (not_a_response, "garbage"),
            (garbage, "garbage"),
            (empty_frame, "garbage"),
            (b"\0" * 12, "garbage"),
            (short_frame, "closed"),
            (close, "closed"),
            (reset, "reset"),
        ):
            self.owner = Owner()
            with self.subTest(str(script)), FakeUpstream(script) as upstream:
                self.check_misfit(upstream, cause)

    def check_misfit(
        self, upstream: FakeUpstream, cause: str, name: str = "dot.test"
    ) -> None:
        asked = asking(query())
        with self.connected(upstream, name) as connection:
            connection.send([asked], 0.0)
            self.assertTrue(self.owner.lost.wait(5))
            self.assertFalse(connection.send([asking(query())], 0.0))
        self.assertEqual(self.owner.error.cause, cause)
        self.assertEqual((self.owner.answers, self.owner.orphans), ([], [asked]))

    def test_malformed_response_ends_the_connection(self) -> None:
        def cut_short(message: Message, _: FakeConnection) -> bytes:
            return response(message.raw, "192.0.2.1")[:-1]

        with FakeUpstream(cut_short) as upstream:
            self.check_misfit(upstream, "garbage")

    def test_answers_before_a_misfit_count_and_those_behind_do_not(self) -> None:
        def script(message: Message, connection: FakeConnection) -> None:
            if len(connection.queries) == 3:
                good, bad, behind = (
                    response(each.raw, "192.0.2.1") for each in connection.queries
                )
                connection.send(good, bad[:-1], behind)

        exchanges = [asking(query(f"{n}.example")) for n in range(3)]
        with FakeUpstream(script) as upstream, self.connected(upstream) as connection:
            connection.send(exchanges, 0.0)
            self.assertTrue(self.owner.lost.wait(5))

        self.assertEqual(self.owner.answered, exchanges[:1])
        self.assertEqual(set(self.owner.orphans), set(exchanges[1:]))

    def test_answers_behind_an_id_that_nobody_asked_with_do_not_count(self) -> None:
        def script(message: Message, connection: FakeConnection) -> None:
            if len(connection.queries) == 2:
                good, behind = (
                    response(each.raw, "192.0.2.1") for each in connection.queries
                )
                taken = {each.id for each in connection.queries}
                free = next(number for number in range(3) if number not in taken)
                connection.send(good, struct.pack("!H", free) + good[2:], behind)

        exchanges = [asking(query(f"{n}.example")) for n in range(2)]
        with FakeUpstream(script) as upstream, self.connected(upstream) as connection:
            connection.send(exchanges, 0.0)
            self.assertTrue(self.owner.lost.wait(5))

        self.assertEqual(self.owner.answered, exchanges[:1])
        self.assertEqual(self.owner.orphans, exchanges[1:])
        self.assertIn("ID", str(self.owner.error))

    def test_second_answer_to_one_query_ends_the_connection(self) -> None:
        def twice(message: Message, connection: FakeConnection) -> None:
            connection.send(*[response(message.raw, "192.0.2.1")] * 2)

        with FakeUpstream(twice) as upstream, self.connected(upstream) as connection:
            connection.send([asking(query())], 0.0)
            self.assertTrue(self.owner.lost.wait(5))

        self.assertEqual(len(self.owner.answers), 1)
        self.assertEqual(self.owner.error.cause, "garbage")

    def test_close_gives_back_what_is_unanswered(self) -> None:
        asked = asking(query())
        with FakeUpstream(silence) as upstream, self.connected(upstream) as connection:
            connection.send([asked], 0.0)
            upstream.wait_for(lambda u: len(u.queries) == 1)

        self.assertEqual(self.owner.orphans, [asked])
        self.assertEqual(self.owner.error.cause, "ended")

    def test_connection_is_open_before_it_counts_as_opened(self) -> None:
        """Between the two it would be neither: another would be dialed."""
        states: list[bool] = []

        class Watched(Connection):
            def __setattr__(self, name: str, value: object) -> None:
                if name == "opened_at" and value:
                    states.append(self.is_open)
                super().__setattr__(name, value)

        with (
            FakeUpstream() as upstream,
            mock.patch.object(dotproxy, "Connection", Watched),
            self.connected(upstream),
        ):
            self.assertEqual(states, [True])

    def test_connection_that_was_waited_for_starts_no_more(self) -> None:
        endpoint = Endpoint("192.0.2.1", 853, "dot.test")
        late = Connection(endpoint, self.trust, self.owner, label="upstream")
        late.close()
        late.join()

        with mock.patch.object(threading.Thread, "start") as start:
            late.start()

        start.assert_not_called()

    def test_more_than_fits_in_flight_is_not_sent(self) -> None:
        with FakeUpstream(silence) as upstream, self.connected(upstream) as connection:
            many = [asking(query())] * (connection.MAX_PENDING + 1)

            self.assertFalse(connection.send(many, 0.0))
            self.assertEqual(connection.pending, 0)


TRUST = dotproxy.Trust(PKI.ca)

# ---- Upstreams without sockets -------------------------------------------------------
# StubConnection  does what the test says: opens, answers, is lost
#   StubNetwork   makes them, in place of dotproxy.Connection
# ManualTimer     calls what is due when the test lets time pass


class StubConnection(Connection):
    """A connection that opens, answers and ends when the test says so."""

    def __init__(
        self,
        endpoint: Endpoint,
        trust: dotproxy.Trust = TRUST,
        owner: dotproxy.ConnectionOwner | None = None,
        *,
        label: str = "stub",
        patience: tuple[float, float] = (3.0, 3.0),
        session: ssl.SSLSession | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.owner = owner or dotproxy.ConnectionOwner()
        super().__init__(endpoint, trust, self.owner, label=label, clock=clock)
        self.clock = clock
        self.waiting: list[tuple[Exchange, float]] = []
        self.started = self.closed = self.up = False
        self.may_start = True

    @property
    def is_open(self) -> bool:
        return self.up

    @property
    def pending(self) -> int:
        return len(self.waiting)

    @property
    def names(self) -> list[str]:
        """List the first label of each query that waits."""
        questions = [exchange.query.question for exchange, _ in self.waiting]
        return [question[1 : 1 + question[0]].decode() for question in questions]

    def start(self) -> None:
        if not self.may_start:
            raise RuntimeError("can't start new thread")
        self.started = True

    def close(self) -> None:
        self.closed = True

    def send(self, exchanges: Sequence[Exchange], now: float) -> bool:
        if self.up:
            self.waiting += [(exchange, now) for exchange in exchanges]
            if self.waiting_since is None:
                self.waiting_since = self.active_at = now
        return self.up

    def open(self, round_trip: float = 0.01) -> StubConnection:
        """Succeed to connect."""
        self.opened_at = self.active_at = self.clock()
        self.round_trip = round_trip
        self.up = True
        self.owner.connection_opened(self)
        return self

    def answer(self, rcode: int = 0) -> None:
        """Answer all that waits."""
        now = self.clock()
        waiting, self.waiting = self.waiting, []
        self.waiting_since, self.active_at = None, now
        answers = [
            (exchange, respond(exchange, rcode), now - sent)
            for exchange, sent in waiting
        ]
        self.owner.connection_answered(self, answers, now)

    def lose(self, cause: str = "reset") -> None:
        """Be gone."""
        self.up = False
        orphans = [exchange for exchange, _ in self.waiting]
        self.waiting = []
        error = UpstreamError("ended" if self.closed else cause, cause)
        self.owner.connection_lost(self, error, orphans)


def respond(exchange: Exchange, rcode: int = 0) -> dotproxy.Response:
    message = response(
        b"\0\0" + exchange.wire, *[] if rcode else ["192.0.2.1"], rcode=rcode
    )
    return dotproxy.parse_response(message, 12 + len(exchange.query.question))


class ManualTimer(dotproxy.Timer):
    """A timer without a thread, whose clock the test moves."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self._now = clock
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def start(self) -> None:
        pass

    def at(self, when: float, function: Callable[[], None]) -> None:
        entry = (when + self.TICK, next(self._numbers), function)
        heapq.heappush(self._heap, entry)

    def advance(self, seconds: float) -> None:
        """Let time pass and call what falls due."""
        end = self._now() + seconds
        while self._heap and self._heap[0][0] <= end:
            when, _, function = heapq.heappop(self._heap)
            self._now.advance(max(0.0, when - self._now()))
            function()
        self._now.advance(end - self._now())


def endpoints(count: int) -> list[Endpoint]:
    return [Endpoint(f"192.0.2.{n}", 853, "dot.test") for n in range(1, count + 1)]


def exchanges(count: int, now: float = 1000.0) -> list[Exchange]:
    return [
        Exchange(dotproxy.parse_query(query(f"q{number}.example")), now, now + 4.0)
        for number in range(count)
    ]


class MemoryTestCase(DotproxyTestCase):
    """Has a clock, and randomness that explores nothing."""

    def setUp(self) -> None:
        super().setUp()
        self.clock = Clock()
        patch = mock.patch.object(random, "random", return_value=1.0)
        patch.start()
        self.addCleanup(patch.stop)

    @property
    def now(self) -> float:
        return self.clock()


# ---- Health, idle life, budget -------------------------------------------------------


class IdleLifeTest(DotproxyTestCase):
    def test_unknown_life_is_the_common_one(self) -> None:
        self.assertEqual(IdleLife().usable_for, 8.0)

    def test_one_early_close_may_be_a_restart(self) -> None:
        idle = IdleLife()

        idle.note(2.0)

        self.assertEqual(idle.life, IdleLife.START)

    def test_second_close_teaches_with_a_margin(self) -> None:
        idle = IdleLife()

        idle.note(2.0)
        idle.note(2.1)

        self.assertEqual(idle.life, 2.1)
        self.assertAlmostEqual(idle.usable_for, 1.68)

    def test_longer_lives_displace_shorter_ones(self) -> None:
        idle = IdleLife()

        for age in (0.5, 0.5, 9.0, 9.0, 9.0, 9.0):
            idle.note(age)

        self.assertEqual(idle.life, 9.0)

    def test_told_life_wins_over_seen_ones(self) -> None:
        idle = IdleLife()
        idle.note(2.0)
        idle.note(2.0)

        idle.told = 30.0

        self.assertEqual(idle.usable_for, 24.0)

    def test_restarts_under_load_teach_nothing(self) -> None:
        idle = IdleLife()

        for _ in range(10):
            idle.note(0.01)

        self.assertEqual(idle.life, IdleLife.START)


class HealthTest(DotproxyTestCase):
    def failing(self, outage: float, *, reached: bool) -> list[float]:
        """Return the delays from the last of some failures to the next attempt."""
        delays = []
        for _ in range(200):
            health = Health()
            health.reached = reached
            health.failed(1000.0, 1000.0, UpstreamError("refused", ""))
            health.failed(1000.0 + outage, 1000.0 + outage, health.error)
            delays.append(health.retry_at - 1000.0 - outage)
        return delays

    def test_overdue_has_bounds(self) -> None:
        for latency, bound in ((0.0001, 0.05), (30.0, 1.0)):
            health = Health()

            health.answered([latency] * 500)

            self.assertEqual(health.overdue_after, bound)

    def test_overdue_is_about_the_95th_percentile(self) -> None:
        numbers = random.Random(7)
        latencies = [numbers.uniform(0.1, 0.3) for _ in range(20_000)]
        health = Health()
        estimates = []
        for latency in latencies:
            health.answered([latency])
            estimates.append(health.overdue_after)

        typical = statistics.mean(estimates[1000:])

        self.assertAlmostEqual(typical, 0.29, delta=0.03)

    def test_latency_is_smoothed(self) -> None:
        health = Health()
        health.opened(0.1)

        health.answered([0.9])

        self.assertAlmostEqual(health.latency or 0.0, 0.2)

    def test_first_retry_of_a_new_upstream_waits_half_a_second(self) -> None:
        delays = self.failing(0.0, reached=False)

        self.assertGreaterEqual(min(delays), 0.75 * Health.RETRY_MIN)
        self.assertLessEqual(max(delays), Health.RETRY_MIN)

    def test_retries_have_jitter(self) -> None:
        self.assertGreater(len(set(self.failing(0.0, reached=False))), 100)

    def test_first_retry_of_one_that_was_reached_is_at_once(self) -> None:
        self.assertLessEqual(max(self.failing(0.0, reached=True)), 0.1)

    def test_back_off_is_a_share_of_the_outage(self) -> None:
        delays = self.failing(100.0, reached=True)

        self.assertGreaterEqual(min(delays), 0.75 * 5.0)
        self.assertLessEqual(max(delays), 5.0)

    def test_back_off_has_a_limit(self) -> None:
        self.assertLessEqual(max(self.failing(1e6, reached=True)), Health.RETRY_MAX)

    def test_urgent_retry_stays_at_half_a_second(self) -> None:
        health = Health()
        health.failed(1000.0, 1000.0, UpstreamError("refused", ""))

        health.failed(9000.0, 9000.0, health.error)

        self.assertLessEqual(health.urgent_at, 9000.0 + Health.RETRY_MIN)

    def test_one_that_was_reached_is_down_after_a_grace(self) -> None:
        health = Health()
        health.reached = True

        health.failed(1000.0, 1000.0, UpstreamError("refused", ""))

        self.assertFalse(health.down(1000.0 + Health.GRACE - 0.1))
        self.assertTrue(health.down(1000.0 + Health.GRACE))

    def test_one_that_resets_all_connections_is_down_after_a_grace(self) -> None:
        health = Health()

        for now in (1000.0, 1000.0 + Health.GRACE):
            self.assertFalse(health.down(now - 0.1))
            health.failed(now, now, UpstreamError("reset", ""))

        self.assertTrue(health.down(now))

    def test_one_that_was_never_reached_is_down_at_once(self) -> None:
        health = Health()

        health.failed(1000.0, 1000.0, UpstreamError("refused", ""))

        self.assertTrue(health.down(1000.0))

    def test_open_connection_ends_the_outage_but_not_the_doubt(self) -> None:
        health = Health()
        health.failed(1000.0, 1000.0, UpstreamError("refused", ""))
        health.doubtful = True

        health.opened(0.01)

        self.assertEqual((health.failures, health.retry_at), (0, 0.0))
        self.assertTrue(health.doubtful)

    def test_answer_on_another_connection_ends_the_outage(self) -> None:
        health = Health()
        health.failed(1000.0, 1000.0, UpstreamError("refused", ""))

        health.answered([0.01])

        self.assertFalse(health.down(2000.0))


class HedgeBudgetTest(DotproxyTestCase):
    def spend_all(self, budget: HedgeBudget) -> int:
        return sum(1 for _ in itertools.takewhile(bool, iter(budget.spend, None)))

    def test_starts_with_a_few(self) -> None:
        self.assertEqual(self.spend_all(HedgeBudget()), 32)

    def test_earns_a_tenth_of_the_queries(self) -> None:
        budget = HedgeBudget()
        self.spend_all(budget)

        for _ in range(201):
            budget.earn(1)

        self.assertEqual(self.spend_all(budget), 20)

    def test_saves_up_to_a_limit(self) -> None:
        budget = HedgeBudget()

        budget.earn(10_000)

        self.assertEqual(self.spend_all(budget), 32)


class UpstreamTest(DotproxyTestCase):
    def test_outage_is_reported_once_for_each_cause(self) -> None:
        upstream = Upstream(Endpoint("192.0.2.1", 853, "dot.test"), 0)
        errors = [
            UpstreamError(cause, f"attempt {number}")
            for number, cause in enumerate(("timeout", "unreachable") * 2)
        ]

        reported = [upstream.note_failure(error, 999.0, 1000.0) for error in errors]

        self.assertEqual(reported, [True, True, False, False])

    def test_next_connection_may_take_as_long_as_the_line_asks_for(self) -> None:
        upstream = Upstream(Endpoint("192.0.2.1", 853, "dot.test"), 0)
        upstream.health.worked = True
        for latency, patience in (
            (None, (0.75, 1.25)),
            (0.1, (0.75, 1.25)),
            (0.3, (0.9, 1.25)),
            (0.8, (2.4, 2.4)),
            (5.0, (3.0, 3.0)),
        ):
            with self.subTest(latency=latency):
                upstream.health.latency = latency
                for got, wanted in zip(upstream.patience(), patience):
                    self.assertAlmostEqual(got, wanted)


# ---- Fleet and Dispatcher ------------------------------------------------------------


class FleetTestCase(MemoryTestCase):
    """Has a fleet of stub connections."""

    def setUp(self) -> None:
        super().setUp()
        self.build()

    def build(self, count: int = 2, strategy: str = "fastest") -> None:
        self.fleet = Fleet(endpoints(count), strategy, self.connect)
        self.upstreams = self.fleet.upstreams

    def connect(self, upstream: Upstream, alone: Exchange | None) -> StubConnection:
        return StubConnection(upstream.endpoint, clock=self.clock)

    def dial(self, upstream: Upstream, *, urgent: bool = True) -> bool:
        return self.fleet.dial(Plan(), upstream, self.now, urgent)

    def last(self, upstream: Upstream) -> StubConnection:
        connection = upstream.connections[-1]
        assert isinstance(connection, StubConnection)
        return connection

    def open(self, upstream: Upstream, latency: float = 0.01) -> StubConnection:
        """Have another open connection."""
        self.dial(upstream)
        connection = self.last(upstream).open(latency)
        upstream.health.opened(latency)
        upstream.health.worked = True
        return connection

    def open_all(self, *latencies: float) -> list[StubConnection]:
        return [self.open(u, each) for u, each in zip(self.upstreams, latencies)]

    def ranked(self, exchange: Exchange | None = None) -> list[int]:
        """List the numbers of the upstreams, the best first."""
        found = self.fleet.ranking(self.now, exchange)
        return [self.fleet.homes[connection].index for connection in found]

    def dialed(self, plan: Plan) -> list[int]:
        return [self.fleet.homes[connection].index for connection in plan.starts]

    def refuse_dial(self, upstream: Upstream) -> None:
        """Have the connection that is on its way refused."""
        self.fleet.remove(self.last(upstream))
        error = UpstreamError("refused", "refused")
        upstream.health.failed(upstream.dialed_at, self.now, error)


class StrategyTest(FleetTestCase):
    def test_fastest_is_ranked_by_latency(self) -> None:
        self.build(3)

        self.open_all(0.03, 0.01, 0.02)

        self.assertEqual(self.ranked(), [1, 2, 0])

    def test_fastest_that_never_answered_gets_one_query_at_a_time(self) -> None:
        first, _ = self.open_all(0.010, 0.011)
        self.upstreams[0].health.worked = False

        first.send(exchanges(1), self.now)

        self.assertEqual(self.ranked(), [1, 0])

    def test_failover_keeps_the_order_given(self) -> None:
        self.build(3, "failover")

        self.open_all(0.03, 0.02, 0.01)

        self.assertEqual(self.ranked(), [0, 1, 2])

    def test_round_robin_takes_turns(self) -> None:
        self.build(3, "round-robin")
        self.open_all(0.01, 0.02, 0.03)
        firsts = []
        for _ in range(6):
            ranked = self.fleet.ranking(self.now)
            shared = self.fleet.spread(ranked, self.now)
            firsts.append(self.fleet.homes[shared[0]].index)

        self.assertEqual(collections.Counter(firsts), {0: 2, 1: 2, 2: 2})

    def test_random_uses_all(self) -> None:
        self.build(3, "random")
        self.open_all(0.01, 0.02, 0.03)

        with mock.patch.object(random, "random", random.Random(7).random):
            firsts = [self.ranked()[0] for _ in range(100)]

        self.assertEqual(set(firsts), {0, 1, 2})

    def test_doubtful_is_last_with_every_strategy(self) -> None:
        for strategy in dotproxy.STRATEGIES:
            with self.subTest(strategy):
                self.build(2, strategy)
                self.open_all(0.01, 0.02)

                self.upstreams[0].health.doubtful = True

                self.assertEqual(self.ranked(), [1, 0])

    def test_silent_is_last(self) -> None:
        first, _ = self.open_all(0.01, 0.02)
        first.send(exchanges(1), self.now)

        self.clock.advance(0.06)

        self.assertEqual(self.ranked(), [1, 0])

    def test_doubtful_gets_no_turn(self) -> None:
        self.build(3, "round-robin")
        self.open_all(0.01, 0.02, 0.03)
        self.upstreams[0].health.doubtful = True

        shared = self.fleet.spread(self.fleet.ranking(self.now), self.now)

        self.assertEqual(len(shared), 2)

    def test_copy_goes_to_another_connection_and_not_to_who_refused(self) -> None:
        self.build(3)
        connections = self.open_all(0.01, 0.02, 0.03)
        exchange = exchanges(1)[0]

        exchange.avoid = connections[0]
        exchange.refused_by = (self.upstreams[1],)

        self.assertEqual(self.ranked(exchange), [2])


class DialTest(FleetTestCase):
    def test_one_dial_at_a_time(self) -> None:
        self.assertTrue(self.dial(self.upstreams[0]))
        self.assertFalse(self.dial(self.upstreams[0]))

    def test_stuck_dial_is_overtaken(self) -> None:
        self.dial(self.upstreams[0])

        self.clock.advance(0.8)

        self.assertTrue(self.dial(self.upstreams[0]))

    def test_no_dial_before_the_back_off_ends(self) -> None:
        upstream = self.upstreams[0]
        self.dial(upstream)
        self.refuse_dial(upstream)

        self.assertFalse(self.dial(upstream))
        self.clock.advance(Health.RETRY_MIN)
        self.assertTrue(self.dial(upstream))

    def test_connections_have_a_limit(self) -> None:
        upstream = self.upstreams[0]
        for _ in range(Upstream.MAX_CONNECTIONS):
            self.open(upstream)

        self.assertFalse(self.dial(upstream))

    def test_lingering_one_makes_room(self) -> None:
        upstream = self.upstreams[0]
        opened = [self.open(upstream) for _ in range(Upstream.MAX_CONNECTIONS)]
        self.clock.advance(9.0)
        plan = Plan()

        self.assertTrue(self.fleet.dial(plan, upstream, self.now, urgent=True))
        self.assertEqual(plan.closes, [opened[0]])

    def test_connection_for_one_query_is_not_for_others(self) -> None:
        self.fleet.dial_alone(Plan(), exchanges(1)[0], self.now)

        self.last(self.upstreams[0]).open()

        self.assertEqual(self.ranked(), [])

    def test_failure_of_a_later_dial_counts_from_then(self) -> None:
        upstream = self.upstreams[0]
        self.open(upstream)
        self.clock.advance(3600.0)
        for dial in (
            lambda plan: self.fleet.dial_alone(plan, exchanges(1)[0], self.now),
            lambda plan: self.fleet.flush(plan, self.now),
        ):
            dial(Plan())
            upstream.health.failing_since = None

            self.refuse_dial(upstream)

            self.assertFalse(upstream.health.down(self.now))


class WarmTest(FleetTestCase):
    def warm(self) -> list[int]:
        plan = Plan()
        self.fleet.keep_warm(plan, self.now)
        return self.dialed(plan)

    def test_two_best_are_kept_warm(self) -> None:
        self.build(3)
        self.open_all(0.03, 0.01, 0.02)

        self.clock.advance(9.0)

        self.assertEqual(self.warm(), [1, 2])

    def test_enough_ready_ones_need_no_more(self) -> None:
        self.build(3)

        self.open_all(0.03, 0.01)

        self.assertEqual(self.warm(), [])

    def test_doubtful_one_does_not_count(self) -> None:
        self.build(3)
        self.open_all(0.03, 0.01)

        self.upstreams[0].health.doubtful = True

        self.assertEqual(self.warm(), [2])

    def test_one_that_is_down_is_tried_again(self) -> None:
        self.build(3)
        self.open_all(0.01, 0.01)
        self.dial(self.upstreams[2])
        self.refuse_dial(self.upstreams[2])

        self.clock.advance(1.0)

        self.assertEqual(self.warm(), [2])

    def test_failover_keeps_the_first_warm_even_if_slow(self) -> None:
        self.build(3, "failover")
        self.open_all(0.03, 0.02, 0.01)

        self.clock.advance(9.0)

        self.assertEqual(self.warm(), [0, 1])

    def test_failover_goes_back_to_the_first(self) -> None:
        self.build(3, "failover")
        self.open_all(0.03)
        self.clock.advance(9.0)

        for upstream in self.upstreams[1:]:
            self.open(upstream)

        self.assertEqual(self.warm(), [0])

    def test_all_that_take_turns_are_kept_warm(self) -> None:
        for strategy in ("round-robin", "random"):
            self.build(3, strategy)
            self.open_all(0.03, 0.02, 0.01)

            self.clock.advance(9.0)

            self.assertEqual(sorted(self.warm()), [0, 1, 2])


class LookTest(FleetTestCase):
    def closes(self) -> list[Connection]:
        plan = Plan()
        self.fleet.look(plan, self.now)
        return plan.closes

    def test_one_idle_connection_is_left_to_the_server(self) -> None:
        first, second = (self.open(self.upstreams[0]) for _ in range(2))

        self.clock.advance(9.0)

        self.assertFalse(self.fleet.ranking(self.now))
        self.assertEqual(self.closes(), [second])
        self.assertTrue(first.is_open)

    def test_lingering_ends_and_teaches(self) -> None:
        connection = self.open(self.upstreams[0])
        self.upstreams[0].idle.note(Fleet.LINGER)

        self.clock.advance(Fleet.LINGER)

        self.assertEqual(self.closes(), [connection])
        self.assertEqual(self.upstreams[0].idle.life, Fleet.LINGER)

    def test_silence_ends_a_connection_and_raises_doubt(self) -> None:
        connection = self.open(self.upstreams[0])
        connection.send(exchanges(1), self.now)

        self.clock.advance(Fleet.SILENCE + 0.1)

        self.assertEqual(self.closes(), [connection])
        self.assertTrue(self.upstreams[0].health.doubtful)

    def test_retired_one_ends_when_it_has_answered(self) -> None:
        connection = self.open(self.upstreams[0])
        connection.send(exchanges(1), self.now)
        connection.retired = True

        self.assertEqual(self.closes(), [])
        connection.answer()
        self.assertEqual(self.closes(), [connection])

    def test_flush_replaces_all_and_forgives(self) -> None:
        opened = self.open_all(0.01, 0.02)
        self.upstreams[1].health.failed(0.0, self.now, UpstreamError("network", ""))
        plan = Plan()

        self.fleet.flush(plan, self.now)

        self.assertEqual(plan.closes, opened)
        self.assertEqual(self.dialed(plan), [0, 1])
        self.assertEqual(self.upstreams[1].health.failures, 0)


class DispatcherTest(FleetTestCase):
    def build(self, count: int = 2, strategy: str = "fastest") -> None:
        super().build(count, strategy)
        self.dispatcher = Dispatcher(self.fleet)

    def first(self, count: int = 1) -> tuple[list[Exchange], Plan]:
        """Send new exchanges."""
        asked = exchanges(count, self.now)
        plan = Plan()
        self.dispatcher.first(plan, asked, self.now)
        return asked, self.carry_out(plan)

    def carry_out(self, plan: Plan) -> Plan:
        for connection, sent in plan.sends.items():
            connection.send(sent, self.now)
        for exchange, _ in plan.failed:
            exchange.done = True
        return plan

    def look(self, asked: Sequence[Exchange], after: float) -> Plan:
        """Look at what may be overdue, so many seconds later."""
        self.clock.advance(after)
        plan = Plan()
        self.dispatcher.overdue(plan, asked, self.now)
        return self.carry_out(plan)

    def lose(self, connection: StubConnection, cause: str = "reset") -> Plan:
        upstream = self.fleet.remove(connection)
        connection.up = False
        orphans = [exchange for exchange, _ in connection.waiting]
        connection.waiting = []
        error = UpstreamError(cause, cause)
        if connection.opened_at == 0.0:
            upstream.health.failed(upstream.dialed_at, self.now, error)
        plan = Plan()
        self.dispatcher.lost(plan, connection, error, orphans, self.now)
        return self.carry_out(plan)

    def refuse(self, connection: StubConnection, asked: Exchange, rcode: int) -> Plan:
        answer = (asked, respond(asked, rcode), 0.01)
        plan = Plan()
        self.dispatcher.refused(plan, connection, [answer], self.now)
        return self.carry_out(plan)

    def opened(self, connection: StubConnection) -> Plan:
        plan = Plan()
        connection.open()
        self.dispatcher.opened(plan, connection, self.now)
        return self.carry_out(plan)

    def test_copy_is_sent_when_overdue_and_not_before(self) -> None:
        _, second = self.open_all(0.01, 0.02)
        asked, _ = self.first()

        self.assertFalse(self.look(asked, 0.049).sends)
        self.assertEqual(self.look(asked, 0.002).sends, {second: asked})

    def test_batch_is_looked_at_when_the_first_of_its_upstreams_is_late(self) -> None:
        self.build(2, "round-robin")
        self.open_all(0.01, 0.01)
        self.upstreams[0].health.slow = 1.0

        patiences = {
            self.dispatcher.first(Plan(), exchanges(2, self.now), self.now)
            for _ in range(2)
        }

        self.assertEqual(patiences, {0.05})

    def test_further_copies_come_slower(self) -> None:
        self.open_all(0.01, 0.01)
        asked, _ = self.first()
        self.look(asked, 0.051)

        self.assertFalse(self.look(asked, 0.074).sends)
        self.assertTrue(self.look(asked, 0.002).sends)

    def test_early_copies_have_a_budget(self) -> None:
        slow, _ = self.open_all(0.01, 0.02)
        asked, _ = self.first(200)
        self.clock.advance(0.05)
        slow.waiting_since = self.now  # octets come in: it is slow, not silent
        self.clock.advance(-0.05)

        plan = self.look(asked, 0.06)

        self.assertEqual(sum(map(len, plan.sends.values())), 32)

    def test_early_copies_of_a_silent_upstream_need_no_budget(self) -> None:
        self.open_all(0.01, 0.02)
        asked, _ = self.first(200)

        plan = self.look(asked, 0.06)

        self.assertEqual(sum(map(len, plan.sends.values())), 200)

    def test_copy_after_a_second_needs_no_budget(self) -> None:
        self.open_all(0.01, 0.02)
        asked, _ = self.first(200)
        self.look(asked, 0.06)

        plan = self.look(asked, 0.95)

        self.assertGreaterEqual(sum(map(len, plan.sends.values())), 168)

    def test_lone_upstream_gets_the_copy_on_another_connection(self) -> None:
        self.build(1)
        self.open(self.upstreams[0])
        asked, _ = self.first()
        self.look(asked, 0.06)

        plan = self.opened(self.last(self.upstreams[0]))

        self.assertEqual(list(plan.sends.values()), [asked])

    def test_exchange_ends_at_its_deadline(self) -> None:
        self.open_all(0.01, 0.02)
        asked, _ = self.first()

        plan = self.look(asked, 4.0)

        self.assertEqual([exchange for exchange, _ in plan.failed], asked)

    def test_servfail_asks_another(self) -> None:
        first, second = self.open_all(0.01, 0.02)
        asked, _ = self.first()

        plan = self.refuse(first, asked[0], Rcode.SERVFAIL)

        self.assertEqual(plan.sends, {second: asked})

    def test_last_servfail_is_passed_on(self) -> None:
        first, second = self.open_all(0.01, 0.02)
        asked, _ = self.first()
        self.refuse(first, asked[0], Rcode.SERVFAIL)

        plan = self.refuse(second, asked[0], Rcode.REFUSED)

        outcome = plan.failed[0][1]
        assert isinstance(outcome, dotproxy.Response)
        self.assertEqual(outcome.rcode, Rcode.SERVFAIL)

    def test_servfail_waits_for_the_copy(self) -> None:
        first, _ = self.open_all(0.01, 0.02)
        asked, _ = self.first()
        self.look(asked, 0.06)

        plan = self.refuse(first, asked[0], Rcode.SERVFAIL)

        self.assertFalse(plan.failed or plan.sends)

    def test_servfail_does_not_wait_long_for_who_connects(self) -> None:
        first = self.open(self.upstreams[0])
        asked, _ = self.first()
        self.refuse(first, asked[0], Rcode.SERVFAIL)

        self.assertFalse(self.look(asked, 0.9).failed)
        self.assertTrue(self.look(asked, 0.2).failed)

    def test_lost_query_goes_out_again(self) -> None:
        first, second = self.open_all(0.01, 0.02)
        asked, _ = self.first(3)

        plan = self.lose(first)

        self.assertEqual(plan.sends, {second: asked})

    def test_lost_copy_leaves_the_other_alone(self) -> None:
        first, _ = self.open_all(0.01, 0.02)
        asked, _ = self.first()
        self.look(asked, 0.06)

        self.assertFalse(self.lose(first).sends)

    def lose_three(self) -> list[Exchange]:
        self.build(1)
        upstream = self.upstreams[0]
        self.open(upstream)
        asked, _ = self.first(2)
        for _ in range(Dispatcher.ALONE_AFTER - 1):
            self.lose(self.last(upstream))
            self.opened(self.last(upstream))
        self.lose(self.last(upstream))
        return asked

    def alone(self) -> list[StubConnection]:
        return [
            connection
            for connection in self.upstreams[0].connections
            if isinstance(connection, StubConnection) and connection.alone
        ]

    def test_repeated_losses_are_retried_alone(self) -> None:
        asked = self.lose_three()

        plans = [self.opened(connection) for connection in self.alone()]

        sent = [
            exchange
            for plan in plans
            for each in plan.sends.values()
            for exchange in each
        ]
        self.assertEqual(sent, asked)

    def test_suspect_is_never_sent_beside_others_while_it_waits(self) -> None:
        asked = self.lose_three()
        self.open(self.upstreams[0])

        for _ in range(20):
            self.assertFalse(self.look(asked, 0.05).sends)

    def test_slow_suspect_makes_room(self) -> None:
        asked = self.lose_three()
        connection = self.alone()[0]
        self.opened(connection)

        plan = self.look(asked, 0.21)

        self.assertEqual(plan.closes, [connection])

    def test_killer_is_given_up_after_a_number_of_losses(self) -> None:
        asked = self.lose_three()
        done: list[Exchange] = []
        for _ in range(Dispatcher.MAX_LOSSES + 1 - Dispatcher.ALONE_AFTER):
            self.assertFalse(done)
            for connection in self.alone():
                self.opened(connection)
                done += [exchange for exchange, _ in self.lose(connection).failed]

        self.assertEqual(done, asked)

    def test_failing_dial_is_no_fault_of_the_suspect(self) -> None:
        asked = self.lose_three()

        for _ in range(20):
            for connection in self.alone():
                self.assertFalse(self.lose(connection, "refused").failed)

        self.assertEqual(asked[0].losses, Dispatcher.ALONE_AFTER)

    def test_suspects_wait_for_the_back_off(self) -> None:
        self.lose_three()
        for connection in self.alone():
            self.lose(connection, "refused")

        self.assertFalse(self.alone())
        self.clock.advance(0.1)
        self.dispatcher.review(Plan(), self.now)
        self.assertTrue(self.alone())

    def test_parked_query_goes_out_when_a_connection_opens(self) -> None:
        asked, _ = self.first()

        plan = self.opened(self.last(self.upstreams[1]))

        self.assertEqual(list(plan.sends.values()), [asked])
        self.assertFalse(self.dispatcher.parked)

    def test_parked_query_waits_while_there_is_hope(self) -> None:
        self.first()

        plan = self.lose(self.last(self.upstreams[0]), "refused")

        self.assertFalse(plan.failed)

    def test_parked_query_is_given_up_without_hope(self) -> None:
        asked, _ = self.first()
        self.lose(self.last(self.upstreams[0]), "refused")

        plan = self.lose(self.last(self.upstreams[1]), "refused")

        self.assertEqual([exchange for exchange, _ in plan.failed], asked)

    def test_query_fails_at_once_while_all_are_down(self) -> None:
        self.first()
        for upstream in self.upstreams:
            self.lose(self.last(upstream), "refused")

        asked, plan = self.first()

        self.assertEqual([exchange for exchange, _ in plan.failed], asked)

    def test_doubtful_upstream_is_probed_with_copies(self) -> None:
        first, second = self.open_all(0.01, 0.02)
        self.upstreams[0].health.doubtful = True

        asked, plan = self.first()

        self.assertEqual(plan.sends, {first: asked, second: asked})


# ---- UpstreamGroup and Proxy without sockets -----------------------------------------


class StubProxyTestCase(MemoryTestCase):
    """Has a proxy whose connections, clocks and timer the test moves."""

    def setUp(self) -> None:
        super().setUp()
        self.connections: list[StubConnection] = []
        self.may_start = True
        patch = mock.patch.object(dotproxy, "Connection", self.connect)
        patch.start()
        self.addCleanup(patch.stop)
        quiet = mock.patch.object(dotproxy.logger, "disabled", True)
        quiet.start()
        self.addCleanup(quiet.stop)
        self.wall, self.awake = Clock(), Clock()
        self.answers: list[Message] = []
        self.build()

    def build(
        self,
        count: int = 1,
        max_in_flight: int = 10_000,
        routes: Sequence[dotproxy.Route] = (),
    ) -> None:
        self.connections.clear()
        self.timer = ManualTimer(self.clock)
        group = functools.partial(UpstreamGroup, wall=self.wall, awake=self.awake)
        with mock.patch.object(dotproxy, "UpstreamGroup", group):
            self.proxy = Proxy(
                endpoints(count),
                TRUST,
                self.timer,
                dotproxy.Cache(0),
                clock=self.clock,
                max_in_flight=max_in_flight,
                routes=routes,
            )

    def connect(
        self,
        endpoint: Endpoint,
        trust: dotproxy.Trust,
        owner: dotproxy.ConnectionOwner,
        *,
        label: str,
        patience: tuple[float, float],
        session: ssl.SSLSession | None,
        clock: Callable[[], float],
    ) -> StubConnection:
        made = StubConnection(
            endpoint, trust, owner, label=label, patience=patience, clock=clock
        )
        made.may_start = self.may_start
        self.connections.append(made)
        return made

    def ask(self, *names: str, client: str = "192.0.2.200") -> None:
        batch: list[tuple[dotproxy.Query, dotproxy.Reply]] = []
        for name in names:
            asked = dotproxy.parse_query(query(name, do=False))
            asked.client = (client, 5353)
            batch.append((asked, self.reply))
        self.proxy.resolve(batch)

    def reply(self, message: bytes, client: object) -> None:
        self.answers.append(parse(message))

    @property
    def in_flight(self) -> str:
        return self.proxy.describe()[0]

    def advance(self, seconds: float) -> None:
        self.wall.advance(seconds)
        self.awake.advance(seconds)
        self.timer.advance(seconds)

    def sleep(self) -> None:
        """Have the host sleep for as long as it takes to matter."""
        self.wall.advance(SleepDetector.JUMP + 1.0)
        self.clock.advance(SleepDetector.JUMP + 1.0)


class ProxyTest(StubProxyTestCase):
    def test_dial_that_fails_after_a_later_one_opened_is_no_outage(self) -> None:
        self.proxy.start()
        stuck = self.connections[0]
        self.ask("a.example")
        self.advance(0.8)
        self.ask("b.example")
        later = self.connections[1].open()
        later.answer()
        self.advance(2.0)

        stuck.lose("timeout")

        self.assertEqual(self.proxy.trouble(), "")
        self.assertTrue(self.proxy.status().startswith("1 of 1 upstreams up"))

    def test_failed_dial_beside_one_that_answers_is_no_outage(self) -> None:
        self.proxy.start()
        connection = self.connections[0].open()
        self.ask("a.example")
        self.advance(0.3)
        self.connections[1].lose("refused")
        connection.answer()

        self.assertTrue(self.proxy.status().startswith("1 of 1 upstreams up"))
        self.assertIn("state=up", self.proxy.describe()[1])

    def test_upstream_that_nobody_has_asked_yet_is_no_outage(self) -> None:
        self.proxy.start()
        connection = self.connections[0].open()

        self.advance(UpstreamGroup.ACTIVE + 1)
        connection.lose("closed")

        self.assertEqual(self.proxy.trouble(), "")

    def test_deadline_is_kept_where_answers_are_not_overdue_before(self) -> None:
        self.proxy.start()
        self.connections[0].open(1.0)
        self.proxy._timeout = 0.2

        self.ask("a.example")
        self.advance(0.22)

        self.assertEqual([got.rcode for got in self.answers], [2])

    def test_equal_questions_go_upstream_once(self) -> None:
        self.proxy.start()
        connection = self.connections[0].open()

        self.ask("a.example", "A.example")
        self.ask("a.example", client="192.0.2.201")

        self.assertEqual(connection.pending, 1)
        connection.answer()
        self.assertEqual(len(self.answers), 3)

    def test_second_answer_is_dropped(self) -> None:
        self.proxy.start()
        connection = self.connections[0].open()
        self.ask("a.example")
        again = connection.waiting[0]

        connection.answer()
        connection.waiting = [again]
        connection.answer()

        self.assertEqual(len(self.answers), 1)
        self.assertEqual(self.proxy.in_flight, 0)

    def test_question_can_be_asked_again(self) -> None:
        self.proxy.start()
        connection = self.connections[0].open()
        for _ in range(3):
            self.ask("a.example")
            connection.answer()

        self.assertEqual(len(self.answers), 3)

    def test_everybody_gets_servfail_at_the_deadline(self) -> None:
        self.proxy.start()
        self.connections[0].open()
        self.ask("a.example", "a.example", "b.example")

        self.advance(4.1)

        self.assertEqual([m.rcode for m in self.answers], [Rcode.SERVFAIL] * 3)

    def test_connecting_for_ever_ends_at_the_deadline(self) -> None:
        self.ask("a.example")

        self.advance(4.1)

        self.assertEqual([m.rcode for m in self.answers], [Rcode.SERVFAIL])

    def test_busiest_client_loses_its_oldest(self) -> None:
        self.build(max_in_flight=10)
        self.ask("one.example", client="192.0.2.1")
        self.ask(*[f"n{number}.example" for number in range(9)])

        self.ask("two.example", client="192.0.2.2")

        self.assertEqual([m.qname for m in self.answers], ["n0.example"])
        self.assertEqual(self.answers[0].rcode, Rcode.SERVFAIL)

    def test_bound_holds_with_one_query_per_client(self) -> None:
        self.build(max_in_flight=100)
        batch: list[tuple[dotproxy.Query, dotproxy.Reply]] = []
        for number in range(300):
            asked = dotproxy.parse_query(query(f"n{number}.example"))
            asked.client = (f"2001:db8::{number}", 5353)
            batch.append((asked, self.reply))

        for start in range(0, 300, 50):
            self.proxy.resolve(batch[start : start + 50])

        self.assertEqual(len(self.answers), 201)
        self.assertEqual(self.proxy.in_flight, 99)

    def test_question_is_forgotten_once_it_is_answered(self) -> None:
        self.proxy.start()
        self.connections[0].open()
        self.ask("a.example")
        (exchange,) = self.proxy._exchanges.values()
        watched = weakref.ref(exchange)
        del exchange

        self.connections[0].answer()

        self.assertIsNone(watched())

    def test_question_without_an_answer_keeps_nobody_who_waited(self) -> None:
        self.proxy.start()
        self.connections[0].open()
        self.ask("a.example")
        (exchange,) = self.proxy._exchanges.values()

        self.advance(4.1)

        self.assertEqual([answer.rcode for answer in self.answers], [Rcode.SERVFAIL])
        self.assertEqual(exchange.waiters, [])

    def test_shed_question_can_be_asked_again(self) -> None:
        self.build(max_in_flight=1)
        self.ask("a.example", "b.example")

        self.ask("a.example")

        self.advance(4.1)
        self.assertEqual(len(self.answers), 3)
        self.assertEqual(self.proxy.in_flight, 0)

    def test_refuser_is_doubted_until_it_answers(self) -> None:
        self.build(2)
        self.proxy.start()
        first, second = (connection.open() for connection in self.connections)
        self.ask("a.example")
        first.answer(Rcode.SERVFAIL)

        second.answer()

        self.assertEqual(self.answers[0].rcode, 0)
        self.assertIn("state=doubtful", self.proxy.describe()[1])
        self.ask("b.example")
        first.answer()
        self.assertIn("state=up", self.proxy.describe()[1])

    def test_loss_with_queries_prefers_the_other(self) -> None:
        self.build(2)
        self.proxy.start()
        first, second = (connection.open() for connection in self.connections)
        self.ask("a.example")
        first.answer()
        self.ask("b.example")

        first.lose()

        self.assertEqual(second.names, ["b"])
        self.assertIn("state=doubtful", self.proxy.describe()[1])

    def test_upstream_that_restarts_before_its_first_answer_is_waited_for(self) -> None:
        self.proxy.start()
        self.connections[0].open()
        self.ask("a.example")

        self.connections[0].lose("reset")
        self.connections[1].lose("refused")
        self.advance(0.1)
        self.connections[2].open().answer()

        self.assertEqual([m.addresses for m in self.answers], [["192.0.2.1"]])

    def test_upstream_that_resets_the_first_connection_is_waited_for(self) -> None:
        self.proxy.start()
        self.ask("a.example")

        self.connections[0].lose("reset")
        self.advance(0.1)
        self.connections[1].open().answer()

        self.assertEqual([m.addresses for m in self.answers], [["192.0.2.1"]])

    def test_sleep_flushes_with_the_next_query(self) -> None:
        self.proxy.start()
        stale = self.connections[0].open()

        self.sleep()
        self.ask("a.example")

        self.assertTrue(stale.closed)
        self.assertEqual(stale.names, [])
        self.assertEqual(self.connections[1].open().names, ["a"])

    def test_sleep_flushes_without_a_query(self) -> None:
        self.proxy.start()
        stale = self.connections[0].open()

        self.sleep()
        self.advance(0.3)

        self.assertTrue(stale.closed)

    def test_sleep_replays_what_was_in_flight(self) -> None:
        self.proxy.start()
        stale = self.connections[0].open()
        self.ask("a.example")

        self.sleep()
        self.ask("b.example")
        self.connections[1].open()
        stale.lose()

        self.assertEqual(sorted(self.connections[1].names), ["a", "b"])

    def test_sleep_of_all_clocks_but_the_walls_is_seen(self) -> None:
        self.proxy.start()
        stale = self.connections[0].open()
        self.wall.advance(-100.0)
        self.advance(0.3)
        self.assertFalse(stale.closed)

        self.wall.advance(SleepDetector.JUMP + 1.0)
        self.advance(0.3)

        self.assertTrue(stale.closed)

    def test_upstream_that_closes_at_once_is_not_stormed(self) -> None:
        self.proxy.start()
        self.advance(1.0)

        for _ in range(100):
            for connection in self.connections[-1:]:
                if not connection.opened_at:
                    connection.open().lose("closed")
            self.advance(0.01)

        self.assertLess(len(self.connections), 10)

    def test_thread_that_cannot_start_counts_as_a_failed_dial(self) -> None:
        self.may_start = False
        self.proxy.start()
        self.ask("a.example")
        self.assertEqual(self.answers[0].rcode, Rcode.SERVFAIL)

        self.may_start = True
        self.advance(1.0)
        self.ask("b.example")
        self.connections[-1].open().answer()

        self.assertEqual(self.answers[-1].addresses, ["192.0.2.1"])

    def test_nothing_is_dialed_after_close(self) -> None:
        self.ask("a.example")
        self.proxy.close()
        self.connections[0].lose("ended")
        before = len(self.connections)

        self.advance(1.0)
        self.ask("b.example")

        self.assertFalse([c for c in self.connections[before:] if c.started])

    def test_close_waits_for_a_connection_that_is_ending(self) -> None:
        self.proxy.start()
        ending = self.connections[0].open()
        ending.lose("closed")

        with mock.patch.object(StubConnection, "join", autospec=True) as join:
            self.proxy.close()

        self.assertIn(mock.call(ending), join.mock_calls)

    def test_connections_are_let_go_when_clients_are_quiet(self) -> None:
        self.proxy.start()
        self.connections[0].open()
        for _ in range(400):
            self.advance(0.5)
            for connection in list(self.connections):
                if connection.closed and connection.up:
                    connection.lose("ended")
                elif connection.started and not connection.opened_at:
                    connection.open()

        self.assertFalse([c for c in self.connections if c.up])


class UpstreamMetricsTest(StubProxyTestCase):
    def count(self, name: str, *labels: str, number: int = 1) -> float:
        """Return a metric of the upstream with this number."""
        upstream = f"192.0.2.{number}:853#dot.test"
        metric = f"dotproxy_upstream_{name}"
        return sample(self.proxy.samples(), metric, upstream, *labels)

    def test_upstream_is_up_from_when_it_is_connected_to_when_it_fails(self) -> None:
        self.proxy.start()
        seen = [self.count("up")]
        connection = self.connections[0].open()
        seen.append(self.count("up"))
        self.ask("a.example")
        connection.lose()
        seen.append(self.count("up"))

        self.assertEqual(seen, [0, 1, 0])

    def test_queries_and_answers_are_counted(self) -> None:
        self.proxy.start()
        connection = self.connections[0].open()
        self.ask("a.example", "b.example")
        connection.answer()

        self.assertEqual(self.count("requests_total"), 2)
        self.assertEqual(self.count("request_duration_seconds"), 2)
        self.assertEqual(self.count("conn_cache_hits_total"), 2)
        self.assertEqual(self.count("conn_cache_misses_total"), 0)
        self.assertEqual(self.count("connections"), 1)

    def test_query_that_waits_for_a_connection_is_no_reuse(self) -> None:
        self.ask("a.example")
        self.connections[0].open().answer()
        self.ask("b.example")

        self.assertEqual(self.count("conn_cache_misses_total"), 1)
        self.assertEqual(self.count("conn_cache_hits_total"), 1)

    def test_connection_that_does_not_open_is_a_handshake_with_a_cause(self) -> None:
        self.proxy.start()
        self.connections[0].lose("refused")

        self.assertEqual(self.count("handshakes_total", "refused"), 1)
        self.assertEqual(self.count("failures_total", "refused"), 1)
        self.assertEqual(self.count("closes_total", "refused"), 0)

    def test_loss_with_queries_is_a_failure_and_they_are_replayed(self) -> None:
        self.proxy.start()
        connection = self.connections[0].open()
        self.ask("a.example", "b.example")
        connection.lose("reset")

        self.assertEqual(self.count("handshakes_total", "full"), 1)
        self.assertEqual(self.count("closes_total", "reset"), 1)
        self.assertEqual(self.count("failures_total", "reset"), 1)
        self.assertEqual(self.count("replays_total"), 2)

    def test_idle_close_is_no_failure(self) -> None:
        self.proxy.start()
        self.connections[0].open().lose("closed")

        self.assertEqual(self.count("closes_total", "closed"), 1)
        self.assertEqual(self.count("failures_total", "closed"), 0)

    def test_idle_closes_are_not_noticed(self) -> None:
        self.proxy.start()
        connection = self.connections[-1].open()
        for _ in range(6):
            self.ask("a.example")
            connection.answer()
            self.advance(1.0)
            connection.lose("closed")
            connection = self.connections[-1].open()

        self.assertEqual(self.count("conn_cache_hits_total"), 6)
        self.assertEqual(self.count("conn_cache_misses_total"), 0)
        self.assertEqual(self.count("replays_total"), 0)

    def test_connection_gone_silent_is_a_timeout(self) -> None:
        self.proxy.start()
        connection = self.connections[0].open()
        self.ask("a.example")
        self.advance(Fleet.SILENCE + 0.5)
        self.assertTrue(connection.closed)
        connection.lose()

        self.assertEqual(self.count("closes_total", "timeout"), 1)
        self.assertEqual(self.count("failures_total", "timeout"), 1)

    def test_servfail_is_a_failure_by_rcode(self) -> None:
        self.proxy.start()
        connection = self.connections[0].open()
        self.ask("a.example")
        connection.answer(Rcode.SERVFAIL)

        self.assertEqual(self.count("failures_total", "rcode"), 1)

    def hedge(self) -> tuple[StubConnection, StubConnection]:
        """Have a query overdue at the first upstream, and copied to the second."""
        self.build(2)
        self.proxy.start()
        first, second = self.connections[0].open(0.001), self.connections[1].open(0.01)
        self.ask("a.example")
        self.advance(0.08)
        self.assertEqual((first.names, second.names), (["a"], ["a"]))
        return first, second

    def test_hedge_that_is_answered_first_has_won(self) -> None:
        first, second = self.hedge()

        second.answer()
        first.answer()

        self.assertEqual(self.count("hedges_total", number=2), 1)
        self.assertEqual(self.count("hedges_won_total", number=2), 1)
        self.assertEqual(self.count("hedges_total", number=1), 0)

    def test_hedge_that_is_answered_second_has_not_won(self) -> None:
        first, second = self.hedge()

        first.answer()
        second.answer()

        self.assertEqual(self.count("hedges_total", number=2), 1)
        self.assertEqual(self.count("hedges_won_total", number=2), 0)

    def test_causes_that_are_counted_are_those_that_there_are(self) -> None:
        with open(dotproxy.__file__, encoding="utf-8") as file:
            causes = set(re.findall(r'UpstreamError\(\s*"([a-z]+)"', file.read()))

        # One of ours, one that concerns no upstream, and two that the doctor finds.
        others = {"ended", "overload", "silence", "unwilling"}
        self.assertEqual(causes - others, set(dotproxy.FAILURES))

    def test_trouble_is_told_until_an_upstream_answers(self) -> None:
        self.proxy.start()
        self.assertIn("not connected yet", self.proxy.trouble())
        self.connections[0].lose("refused")
        self.assertIn("192.0.2.1:853#dot.test: refused", self.proxy.trouble())
        self.advance(1.0)
        self.proxy.trouble()
        self.connections[-1].open()

        self.assertEqual(self.proxy.trouble(), "")

    def test_who_asks_for_trouble_has_an_upstream_tried_again_when_due(self) -> None:
        self.proxy.start()
        self.connections[0].lose("refused")
        self.advance(UpstreamGroup.ACTIVE + 60.0)
        self.connections[-1].lose("refused")
        before = len(self.connections)

        for _ in range(10):
            self.proxy.trouble()

        self.assertLessEqual(len(self.connections) - before, 1)
        self.advance(Health.RETRY_MAX)
        self.proxy.trouble()
        self.assertGreater(len(self.connections), before)


# ---- Scenarios: a real Proxy, a real Timer, TLS on loopback --------------------------


class RoutesTest(StubProxyTestCase):
    """Two upstreams for all names, and others for some domains."""

    TLS = Endpoint("203.0.113.1", 853, "dns.corp.example")
    PLAIN = Endpoint("203.0.113.2", 53, "")
    DEEP = Endpoint("203.0.113.3", 853, "deep.corp.example")
    ROUTES = (
        ("corp.example", TLS),
        ("cluster.local", PLAIN),
        ("deep.corp.example", DEEP),
        ("corp.example", TLS._replace(host="203.0.113.4")),
    )

    def setUp(self) -> None:
        super().setUp()
        self.build(routes=self.ROUTES)
        self.proxy.start()

    def at(self, host: str) -> StubConnection:
        """Return the last connection to this host."""
        return [c for c in self.connections if c.endpoint.host == host][-1]

    def asked(self) -> dict[str, list[str]]:
        """List by host which queries wait there."""
        return {c.endpoint.host: c.names for c in self.connections if c.names}

    def open_all(self) -> None:
        for connection in self.connections:
            connection.open(connection.opened_at or 0.01)

    def test_each_name_is_asked_of_its_own_servers(self) -> None:
        for name, host in {
            "www.example": "192.0.2.1",
            "corp.example": "203.0.113.1",
            "a.b.CORP.example": "203.0.113.1",
            "acorp.example": "192.0.2.1",
            "corp.example.com": "192.0.2.1",
            "example": "192.0.2.1",
            ".": "192.0.2.1",
            "deep.corp.example": "203.0.113.3",
            "x.deep.corp.example": "203.0.113.3",
            "xdeep.corp.example": "203.0.113.1",
            "svc.cluster.LOCAL": "203.0.113.2",
            "local": "192.0.2.1",
        }.items():
            self.build(routes=self.ROUTES)
            self.proxy.start()
            self.open_all()
            with self.subTest(name):
                self.ask(name)
                self.assertEqual(list(self.asked()), [host])

    def test_domain_in_the_middle_of_a_label_is_not_below_it(self) -> None:
        self.open_all()
        label = b"x" + dotproxy.encode_domain("corp.example")[:-1]
        question = bytes([len(label)]) + label + b"\0" + b"\0\1\0\1"
        asked = dotproxy.parse_query(counted(1, 0, 0, 0, body=question))

        self.proxy.resolve([(asked, self.reply)])

        self.assertEqual(list(self.asked()), ["192.0.2.1"])

    def test_batch_is_shared_out(self) -> None:
        self.open_all()

        self.ask("a.example", "b.corp.example", "c.cluster.local", "d.example")

        self.assertEqual(
            self.asked(),
            {"192.0.2.1": ["a", "d"], "203.0.113.1": ["b"], "203.0.113.2": ["c"]},
        )

    def test_second_server_of_a_domain_takes_over(self) -> None:
        self.at("203.0.113.4").open()
        self.at("192.0.2.1").open()

        self.ask("a.corp.example")

        self.assertEqual(self.asked(), {"203.0.113.4": ["a"]})

    def test_name_of_a_server_that_is_down_is_asked_nowhere_else(self) -> None:
        self.open_all()
        self.at("203.0.113.2").lose()
        known = len(self.connections) - 1

        self.ask("a.cluster.local")
        while not self.answers:
            self.assertEqual(self.asked(), {})
            new, known = self.connections[known:], len(self.connections)
            for connection in new:
                connection.lose("refused")
            self.advance(0.5)

        (answer,) = self.answers
        assert answer.opt is not None
        self.assertEqual(answer.rcode, Rcode.SERVFAIL)
        self.assertIn(b"tcp://203.0.113.2:53: refused", answer.opt.options[0][1])

    def test_query_is_padded_where_it_is_encrypted(self) -> None:
        self.open_all()

        self.ask("a.example", "b.corp.example", "c.cluster.local")

        sizes = {
            host: len(self.at(host).waiting[0][0].wire) + 2 for host in self.asked()
        }
        self.assertEqual((sizes["192.0.2.1"], sizes["203.0.113.1"]), (128, 128))
        self.assertLess(sizes["203.0.113.2"], 64)

    def test_all_groups_share_one_binding(self) -> None:
        with mock.patch.object(dotproxy, "ProcessorBinding") as made:
            self.build(routes=self.ROUTES)

        self.assertEqual(made.call_count, 1)

    def test_state_tells_the_domains(self) -> None:
        lines = self.proxy.describe()[1:]

        found = [(line.split()[0], line.partition("domain=")[2]) for line in lines]
        self.assertEqual(
            found,
            [
                ("name=192.0.2.1:853#dot.test", ""),
                ("name=203.0.113.1:853#dns.corp.example", "corp.example"),
                ("name=203.0.113.4:853#dns.corp.example", "corp.example"),
                ("name=tcp://203.0.113.2:53", "cluster.local"),
                ("name=203.0.113.3:853#deep.corp.example", "deep.corp.example"),
            ],
        )

    def test_end_closes_every_connection(self) -> None:
        self.open_all()

        self.proxy.close()

        self.assertEqual({c.closed for c in self.connections}, {True})


class Result(NamedTuple):
    """An answer, and the seconds that it took."""

    name: str
    message: Message
    elapsed: float

    @property
    def right(self) -> bool:
        return self.message.rcode == 0 and self.message.addresses == ["192.0.2.1"]

    @property
    def reason(self) -> str:
        """The text of the Extended DNS Error."""
        options = self.message.opt.options if self.message.opt else []
        return b"".join(data[2:] for code, data in options if code == 15).decode()


class Asker:
    """Asks a proxy directly, and collects its answers."""

    PATIENCE = 5.0
    WINDOW = 64  # queries of a run without an answer; more wait for the machine

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self._results: queue.SimpleQueue[Result] = queue.SimpleQueue()
        self._numbers = itertools.count()

    def send(self, *names: str, client: str = "192.0.2.200") -> None:
        """Send queries in one batch, each with EDNS."""
        batch: list[tuple[dotproxy.Query, dotproxy.Reply]] = []
        now = time.monotonic()
        for name in names:
            asked = dotproxy.parse_query(query(name, do=False))
            asked.client = (client, 5353)
            batch.append((asked, functools.partial(self._reply, name, now)))
        self.proxy.resolve(batch)

    def collect(self, count: int) -> list[Result]:
        """Wait for so many answers."""
        end = time.monotonic() + self.PATIENCE
        return [
            self._results.get(timeout=max(0.01, end - time.monotonic()))
            for _ in range(count)
        ]

    def ask(self, name: str = "") -> Result:
        """Ask one question and wait for the answer; a new one without a name."""
        self.send(name or self.fresh())
        return self.collect(1)[0]

    def fresh(self) -> str:
        """Return a name that was not asked yet."""
        return f"n{next(self._numbers)}.example"

    def run(self, count: int, rate: float) -> list[Result]:
        """Send so many queries, so many a second, and wait for all answers.

        A machine too slow for the rate sends as fast as it can answer.
        """
        start = time.monotonic()
        pace = threading.Event()
        results: list[Result] = []
        for number in range(count):
            pace.wait(max(0.0, start + number / rate - time.monotonic()))
            if number - len(results) - self._results.qsize() >= self.WINDOW:
                results += self.collect(1)
            self.send(self.fresh())
        return results + self.collect(count - len(results))

    def _reply(self, name: str, sent: float, message: bytes, client: object) -> None:
        elapsed = time.monotonic() - sent
        self._results.put(Result(name, parse(message), elapsed))


class ScenarioTestCase(DotproxyTestCase):
    """Has a proxy in front of upstreams, without its servers."""

    @contextlib.contextmanager
    def client(
        self,
        *upstreams: FakeUpstream,
        timeout: float = 4.0,
        strategy: str = "fastest",
        name: str = "dot.test",
        trust: dotproxy.Trust = TRUST,
        routes: Sequence[dotproxy.Route] = (),
    ) -> Iterator[Asker]:
        """Run a proxy in front of these upstreams."""
        timer = dotproxy.Timer()
        addresses = [Endpoint(u.host, u.port, name) for u in upstreams]
        proxy = Proxy(
            addresses,
            trust,
            timer,
            dotproxy.Cache(0),
            timeout=timeout,
            strategy=strategy,
            routes=routes,
        )
        timer.start()
        proxy.start()
        try:
            yield Asker(proxy)
            self.assertTrue(proxy.drain(Asker.PATIENCE))
            self.assertEqual(proxy.in_flight, 0)
        finally:
            proxy.close()
            timer.close()

    def assert_right(self, results: Sequence[Result], count: int) -> None:
        wrong = [r for r in results if not r.right]
        self.assertEqual([(r.name, r.elapsed, r.reason) for r in wrong], [])
        self.assertEqual(len(results), count)

    def assert_fast(self, results: Sequence[Result]) -> None:
        elapsed = sorted(result.elapsed for result in results)
        self.assertLess(elapsed[int(len(elapsed) * 0.95)], 0.7)
        self.assertLess(elapsed[int(len(elapsed) * 0.99)], 1.5)


class FullBacklog:
    """A listener that answers no SYN: its backlog is full, nobody accepts."""

    def __init__(self, port: int = 0) -> None:
        self.listener = socket.create_server(("127.0.0.1", port), backlog=0)
        self.host, self.port = self.listener.getsockname()
        self.fillers = []
        for _ in range(2):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex((self.host, self.port))
            self.fillers.append(filler)

    def __enter__(self) -> FullBacklog:
        return self

    def __exit__(self, *_: object) -> None:
        for each in (self.listener, *self.fillers):
            each.close()


class FaultTest(ScenarioTestCase):
    """One upstream that does something wrong."""

    def test_client_sees_nothing_of_a_fault_on_the_first_try(self) -> None:
        for fault in (
            *(close, cut, reset, short_frame, garbage),
            *(wrong_id, wrong_question, not_a_response),
            *(silence, empty_frame, b"\0" * 11, b"\0" * 12),
        ):
            with (
                self.subTest(fault),
                FakeUpstream(in_turn(fault, answer)) as upstream,
                self.client(upstream) as client,
            ):
                result = client.ask()

                self.assert_right([result], 1)
                self.assertLess(result.elapsed, 1.0)

    def test_restarts_under_load_lose_nothing(self) -> None:
        with FakeUpstream() as upstream, self.client(upstream) as client:
            results = client.run(20, 400)
            for restart in range(10):
                client.send(*[client.fresh() for _ in range(10)])
                upstream.stop(reset=restart % 2 == 0)
                client.send(*[client.fresh() for _ in range(10)])
                upstream.start()
                results += client.run(20, 400) + client.collect(20)

            self.assert_right(results, 420)

    def test_close_after_every_third_query_loses_nothing(self) -> None:
        def script(message: Message, connection: FakeConnection) -> Reply:
            return answer if len(connection.queries) % 3 else close

        with FakeUpstream(script) as upstream, self.client(upstream) as client:
            client.send(*[client.fresh() for _ in range(60)])

            self.assert_right(client.collect(60), 60)

    def test_every_second_query_dropped(self) -> None:
        numbers = itertools.count()

        def script(message: Message, connection: FakeConnection) -> Reply:
            return answer if next(numbers) % 2 else silence

        with FakeUpstream(script) as upstream, self.client(upstream) as client:
            client.send(*[client.fresh() for _ in range(20)])
            results = client.collect(20)

            self.assert_right(results, 20)
            self.assertLess(max(result.elapsed for result in results), 1.5)

    def test_neighbours_of_a_poisonous_name_are_answered(self) -> None:
        script = by_name({"poison.example": reset})
        names = [f"n{number}.example" for number in range(20)]
        for place in (0, 10, 20):
            with (
                self.subTest(place=place),
                FakeUpstream(script) as upstream,
                self.client(upstream) as client,
            ):
                client.send(*names[:place], "poison.example", *names[place:])
                results = client.collect(21)

                good = [r for r in results if r.name != "poison.example"]
                self.assert_right(good, 20)
                self.assertLess(upstream.connections, 50)

    def test_slow_handshakes_do_not_let_a_poisonous_name_back(self) -> None:
        class SlowUpstream(FakeUpstream):
            def _note_server_name(self, *arguments: object) -> None:
                threading.Event().wait(0.12)

        script = by_name({"poison.example": reset})
        with SlowUpstream(script) as upstream, self.client(upstream) as client:
            client.send("poison.example")
            results = client.run(200, 200)

            self.assert_right([r for r in results if "poison" not in r.name][:199], 199)

    def test_names_without_an_answer_do_not_delay_others(self) -> None:
        def script(message: Message, connection: FakeConnection) -> Reply:
            return silence if message.qname.startswith("never") else answer

        with (
            FakeUpstream(script) as upstream,
            self.client(upstream, timeout=1.0) as client,
        ):
            usual = statistics.median(r.elapsed for r in client.run(50, 500))
            threads, descriptors = threading.active_count(), len(os.listdir("/dev/fd"))
            greedy = Asker(client.proxy)
            for _ in range(40):
                greedy.send(*[f"never-{greedy.fresh()}" for _ in range(50)])

            good = client.run(100, 200)

            self.assert_right(good, 100)
            median = statistics.median(r.elapsed for r in good)
            self.assertLess(median - usual, 0.5)
            self.assertLessEqual(threading.active_count(), threads + 2 * 4)
            self.assertLessEqual(len(os.listdir("/dev/fd")), descriptors + 4 * 4)
            late = max(r.elapsed for r in greedy.collect(2000))
            self.assertLess(late, 2.5)  # 1.0 after which they fail, and a slow machine

    def test_outage_of_a_second(self) -> None:
        with FakeUpstream() as upstream, self.client(upstream) as client:
            client.ask()
            upstream.stop()
            during = Asker(client.proxy).run(10, 10)
            upstream.start()
            start = time.monotonic()
            results = [client.ask()]
            while not results[-1].right:
                results.append(client.run(1, 100)[0])
                self.assertLess(time.monotonic() - start, 2.0)

            self.assertLess(max(r.elapsed for r in during + results), 4.5)

    def test_stuck_dial_does_not_outlast_the_outage(self) -> None:
        with (
            FakeUpstream(on_accept="hang") as upstream,
            self.client(upstream) as client,
        ):
            client.send(client.fresh())
            upstream.wait_for(lambda u: u.connections == 1)
            upstream.on_accept = "tls"

            results = client.collect(1)

            self.assert_right(results, 1)
            self.assertLess(results[0].elapsed, 2.0)

    def test_half_open_connection_costs_no_more_than_the_hedge(self) -> None:
        with FakeUpstream() as upstream, self.client(upstream) as client:
            client.run(20, 400)
            stale = set(upstream.live)

            def script(message: Message, connection: FakeConnection) -> Reply:
                return silence if connection in stale else answer

            upstream.script = script
            results = client.run(100, 200)

            self.assert_right(results, 100)
            self.assertLess(max(r.elapsed for r in results), 1.9)  # below SILENCE

    @staticmethod
    def wait_until_replaced(
        upstream: FakeUpstream, used: FakeConnection, seen: int
    ) -> None:
        """Wait until a connection is closed and another one is ready."""
        upstream.wait_for(lambda _: used.closed)
        upstream.wait_for(
            lambda u: (
                u.connections > seen
                and any(c.version and not c.queries for c in u.live)
            )
        )

    def test_idle_closes_lose_nothing(self) -> None:
        with (
            FakeUpstream(idle_timeout=0.3) as upstream,
            self.client(upstream) as client,
        ):
            results = []
            for _ in range(3):
                results.append(client.ask())
                seen, used = upstream.connections, upstream.accepted[-1]
                self.wait_until_replaced(upstream, used, seen)

            self.assert_right(results, 3)

    def test_certificate_trouble_is_explained(self) -> None:
        for certificate, reason in (
            (PKI.expired, "expired"),
            (PKI.unknown_ca, "unknown CA"),
            (PKI.wrong_name, "certificate is for other.test, alias.other.test"),
        ):
            with (
                self.subTest(reason),
                FakeUpstream(certificate=certificate) as upstream,
                self.client(upstream) as client,
            ):
                result = client.ask()

                self.assertEqual(result.message.rcode, Rcode.SERVFAIL)
                self.assertIn(reason, result.reason)
                self.assertEqual(upstream.queries, [])

    def test_refused_connection_is_explained(self) -> None:
        with FakeUpstream() as upstream:
            upstream.stop()
            with self.client(upstream) as client:
                result = client.ask()

        self.assertIn("connection refused", result.reason)
        self.assertLess(result.elapsed, 1.0)

    def test_close_does_not_wait_for_who_never_answers(self) -> None:
        with FakeUpstream(on_accept="hang") as hung, self.full() as full:
            start = time.monotonic()
            with self.client(hung, full):
                hung.wait_for(lambda u: u.connections == 1)

        self.assertLess(time.monotonic() - start, 1.0)

    @contextlib.contextmanager
    def full(self) -> Iterator[FakeUpstream]:
        """Stand for an upstream whose packets are dropped."""
        with FullBacklog() as listener:
            yield FakeUpstream(port=listener.port)


class SessionTest(ScenarioTestCase):
    def setUp(self) -> None:
        super().setUp()
        quiet = mock.patch.multiple(dotproxy.Health, OVERDUE_MIN=60, OVERDUE_MAX=60)
        quiet.start()
        self.addCleanup(quiet.stop)
        still = mock.patch.object(Dispatcher, "EXPLORE", 0.0)
        still.start()
        self.addCleanup(still.stop)

    def test_resumed_session_is_checked_for_the_pin(self) -> None:
        trust = dotproxy.Trust(PKI.ca, pins=[("dot.test", GOOD_PIN)])
        with FakeUpstream() as upstream, self.client(upstream, trust=trust) as client:
            client.ask()
            upstream.drop_connections()

            self.assert_right([client.ask()], 1)
            upstream.wait_for(lambda u: u.resumed > 0)

    def test_session_is_not_given_to_another_upstream(self) -> None:
        with FakeUpstream() as upstream:
            same_twice = self.client(upstream, upstream, strategy="failover")
            with same_twice as client:
                upstream.wait_for(lambda u: u.handshakes == 2)
                client.ask()
                upstream.drop_connections()
                upstream.wait_for(lambda u: u.handshakes == 4)

            self.assertEqual(upstream.resumed, 1)

    def test_session_is_not_given_to_the_server_of_a_domain(self) -> None:
        with FakeUpstream() as upstream:
            endpoint = Endpoint(*upstream.address, "dot.test")
            routes = [("corp.example", endpoint)]
            with self.client(upstream, routes=routes) as client:
                upstream.wait_for(lambda u: u.handshakes == 2)
                client.ask()
                upstream.drop_connections()
                upstream.wait_for(lambda u: u.handshakes == 4)

            self.assertEqual(upstream.resumed, 1)


class SplitHorizonTest(ScenarioTestCase):
    """One upstream for all names, one for corp.example, and a plain one for lan."""

    def setUp(self) -> None:
        super().setUp()
        public = FakeUpstream()
        corp = FakeUpstream(certificate=PKI.good2)
        lan = FakeUpstream(on_accept="plain")
        for upstream in (public, corp, lan):
            self.enter(upstream)
        self.public, self.corp, self.lan = public, corp, lan
        routes = [
            ("corp.example", Endpoint(*corp.address, "dot.test")),
            ("lan", Endpoint(*lan.address, "")),
        ]
        self.asker = self.enter(self.client(public, routes=routes))

    def enter(self, manager: contextlib.AbstractContextManager[T]) -> T:
        """Have a context until the test has ended."""
        entered = manager.__enter__()
        self.addCleanup(manager.__exit__, None, None, None)
        return entered

    def assert_public_saw_nothing(self) -> None:
        names = {message.qname for message in self.public.queries}
        private = [n for n in names if n.endswith(("corp.example", "lan"))]
        self.assertEqual(private, [])

    def test_each_server_sees_its_own_names(self) -> None:
        self.asker.send(*["a.example", "b.corp.example", "c.lan", "lan"])

        self.assert_right(self.asker.collect(4), 4)
        for upstream, names in (
            (self.public, ["a.example"]),
            (self.corp, ["b.corp.example"]),
            (self.lan, ["c.lan", "lan"]),
        ):
            found = sorted({message.qname.rstrip(".") for message in upstream.queries})
            self.assertEqual(found, names)

    def test_servfail_of_a_domains_server_is_passed_on(self) -> None:
        self.corp.script = lambda message, _: response(message.raw, rcode=2)

        result = self.asker.ask("a.corp.example")

        self.assertEqual(result.message.rcode, Rcode.SERVFAIL)
        self.assert_public_saw_nothing()

    def recovered(self, name: str) -> bool:
        return self.asker.ask(name).right

    def test_domain_whose_servers_are_gone_gets_servfail_and_comes_back(self) -> None:
        self.enter(mock.patch.object(Health, "GRACE", 0.1))
        for upstream, domain in ((self.corp, "corp.example"), (self.lan, "lan")):
            self.assert_right([self.asker.ask(f"a.{domain}")], 1)
            upstream.stop()

            lost = self.asker.ask(f"b.{domain}")
            self.assertEqual(lost.message.rcode, Rcode.SERVFAIL)
            self.assertIn(f"127.0.0.1:{upstream.port}", lost.reason)
            self.assert_right([self.asker.ask(f"{domain}.example")], 1)

            upstream.start()
            wait_until(functools.partial(self.recovered, f"c.{domain}"))
        self.assert_public_saw_nothing()

    def test_restarts_of_a_plain_server_lose_nothing(self) -> None:
        self.lan.wait_for(lambda u: u.connections == 1)

        for restart in range(5):
            self.asker.send(*[f"a{restart}-{n}.lan" for n in range(10)])
            self.lan.stop(reset=restart % 2 == 0)
            self.asker.send(*[f"b{restart}-{n}.lan" for n in range(10)])
            self.lan.start()
            self.assert_right(self.asker.collect(20), 20)

        self.assert_public_saw_nothing()


class SickUpstreamTest(ScenarioTestCase):
    """Two upstreams, one of them sick: all answers are right, nearly all are fast."""

    COUNT = 200

    def check(
        self, sicken: Callable[[FakeUpstream], None], rate: float = 1000.0
    ) -> None:
        for start, order in itertools.product((True, False), (1, -1)):
            with (
                self.subTest(start=start, order=order),
                FakeUpstream() as well,
                FakeUpstream() as sick,
            ):
                if start:
                    sicken(sick)
                with self.client(*[sick, well][::order]) as client:
                    results = client.run(20, rate)
                    if not start:
                        sicken(sick)
                    results += client.run(self.COUNT - 20, rate)

                self.assert_right(results, self.COUNT)
                self.assert_fast(results if start else results[20:])

    def test_refusing(self) -> None:
        self.check(FakeUpstream.stop)

    def test_black_holed(self) -> None:
        def sicken(upstream: FakeUpstream) -> None:
            upstream.stop(reset=True)
            self.addCleanup(FullBacklog(upstream.port).__exit__)

        self.check(sicken)

    def test_silent_after_the_handshake(self) -> None:
        def sicken(upstream: FakeUpstream) -> None:
            upstream.script = silence

        self.check(sicken, rate=400.0)  # more at once would exceed the hedge budget

    def test_never_finishing_the_handshake(self) -> None:
        def sicken(upstream: FakeUpstream) -> None:
            upstream.on_accept = "hang"
            upstream.drop_connections()

        self.check(sicken)

    def test_bad_certificate(self) -> None:
        def sicken(upstream: FakeUpstream) -> None:
            upstream.stop()
            upstream.certificate = PKI.expired
            upstream.start()

        self.check(sicken)

    def test_servfail(self) -> None:
        def sicken(upstream: FakeUpstream) -> None:
            upstream.script = lambda message, _: response(message.raw, rcode=2)

        self.check(sicken)

    def test_garbage(self) -> None:
        def sicken(upstream: FakeUpstream) -> None:
            upstream.script = garbage

        self.check(sicken)

    def test_not_tls_at_all(self) -> None:
        def sicken(upstream: FakeUpstream) -> None:
            upstream.on_accept = "garbage"
            upstream.drop_connections()

        self.check(sicken)


# ---- Cache ---------------------------------------------------------------------------


def cache_key(message: bytes) -> bytes:
    return dotproxy.parse_query(message).cache_key


def read_response(message: bytes) -> dotproxy.Response:
    return dotproxy.parse_response(message, 12 + len(parse(message).question))


class CacheKeyTest(DotproxyTestCase):
    def test_same_question_has_the_same_key(self) -> None:
        usual = cache_key(query("www.example.com"))

        for text, other in (
            ("case", query("WWW.eXample.Com")),
            ("ID", query(id=7)),
            ("AD", query(ad=True)),
            ("RD=0", query(rd=False)),
            ("EDNS without DO", query(do=False, size=4096)),
            ("cookie", query(do=False, options=option(10, bytes(8)))),
            ("client subnet", query(do=False, options=option(8, b"\0\1\0\0"))),
        ):
            with self.subTest(text):
                self.assertEqual(cache_key(other), usual)

    def test_other_question_has_another_key(self) -> None:
        keys = [
            cache_key(message)
            for message in (
                query("www.example.com"),
                query("ftp.example.com"),
                query("www.example.com", "AAAA"),
                query("www.example.com", rrclass=3),
                query("www.example.com", do=True),
                query("www.example.com", cd=True),
                query("www.example.com", do=True, cd=True),
            )
        ]

        self.assertEqual(len(set(keys)), len(keys))

    def test_letters_outside_ascii_keep_their_case(self) -> None:
        upper, lower = query(b"\1\xc0\0"), query(b"\1\xe0\0")

        self.assertNotEqual(cache_key(upper), cache_key(lower))

    def test_options_that_pass_bypass_the_cache(self) -> None:
        message = query(do=False, options=option(65001, b"data"))

        self.assertEqual(cache_key(message), b"")


ASKED = query("www.example.com")
KEY = cache_key(ASKED)


class CacheTest(DotproxyTestCase):
    """What is stored, for how long, and with which TTLs; time starts at 1000."""

    def setUp(self) -> None:
        self.cache = Cache(1 << 20, stale=0)

    def put(
        self,
        *answers: bytes | str,
        now: float = 1000.0,
        ttl: int = 300,
        rcode: int = 0,
        authority: Sequence[bytes] = (),
        additional: Sequence[bytes] = (),
        tc: bool = False,
    ) -> list[int]:
        """Store a response; return the TTLs that are served at once."""
        build = functools.partial(response, ASKED, *answers, ttl=ttl, rcode=rcode)
        message = build(authority=authority, additional=additional, tc=tc)
        asked = dotproxy.parse_query(ASKED)
        served = self.cache.put(KEY, read_response(message), now)
        return self.list_ttls(dotproxy.build_answer(asked, served))

    def get(self, age: float) -> list[int] | None:
        """Return the TTLs of the live answer at this age of the cache."""
        entry = self.cache.get(KEY, 1000.0 + age)
        if entry is None or 1000.0 + age >= entry.expires:
            return None
        asked = dotproxy.parse_query(ASKED)
        answer = self.cache.answer(entry, asked, 1000.0 + age)
        return self.list_ttls(answer)

    def list_ttls(self, message: bytes) -> list[int]:
        answer = parse(message)
        sections = answer.answers + answer.authority + answer.additional
        return [entry.ttl for entry in sections]

    def test_unknown_question_is_a_miss(self) -> None:
        self.assertIsNone(self.get(0.0))

    def test_ttl_counts_down_by_whole_seconds(self) -> None:
        self.put("192.0.2.1", ttl=10)

        for age, ttl in ((0.0, 10), (0.999, 10), (1.0, 9), (1.5, 9), (9.99, 1)):
            with self.subTest(age=age):
                self.assertEqual(self.get(age), [ttl])

    def test_entry_is_a_miss_when_its_ttl_is_over(self) -> None:
        self.put("192.0.2.1", ttl=10)

        self.assertIsNone(self.get(10.0))

    def test_answer_from_before_it_was_stored_has_the_whole_ttl(self) -> None:
        self.put("192.0.2.1", ttl=10)

        self.assertEqual(self.get(-0.01), [10])  # a batch has one time, taken early

    def test_ttl_0_is_not_stored(self) -> None:
        self.assertEqual(self.put("192.0.2.1", ttl=0), [0])

        self.assertIsNone(self.get(0.0))

    def test_top_bit_ttl_is_not_stored(self) -> None:
        for ttl in (1 << 31, (1 << 32) - 1):
            with self.subTest(ttl=ttl):
                self.put("192.0.2.1", ttl=ttl)

                self.assertIsNone(self.get(0.0))

    def test_one_ttl_of_0_is_enough(self) -> None:
        self.put("192.0.2.1", additional=[address("ns.example.com", "192.0.2.2", 0)])

        self.assertIsNone(self.get(0.0))

    def test_one_top_bit_ttl_is_enough(self) -> None:
        self.put("192.0.2.1", authority=[record("example.com", "NS", b"\0", 1 << 31)])

        self.assertIsNone(self.get(0.0))

    def test_shortest_ttl_decides(self) -> None:
        glue = address("ns.example.com", "192.0.2.2", 5)
        self.put("192.0.2.1", ttl=10, additional=[glue])

        self.assertEqual(self.get(4.9), [6, 1])
        self.assertIsNone(self.get(5.0))

    def test_nxdomain_lives_as_long_as_the_soa_says(self) -> None:
        for ttl, minimum in ((20, 60), (60, 20)):
            with self.subTest(ttl=ttl, minimum=minimum):
                self.put(rcode=3, authority=[soa(ttl=ttl, minimum=minimum)])

                self.assertIsNotNone(self.get(19.9))
                self.assertIsNone(self.get(20.0))

    def test_nodata_lives_as_long_as_the_soa_says(self) -> None:
        self.put(authority=[soa(ttl=60, minimum=20)])

        self.assertIsNotNone(self.get(19.9))
        self.assertIsNone(self.get(20.0))

    def test_soa_ttl_counts_down_from_what_it_says(self) -> None:
        self.assertEqual(self.put(rcode=3, authority=[soa(ttl=60, minimum=20)]), [20])

        self.assertEqual(self.get(5.0), [15])

    def test_negative_answer_lives_an_hour_at_most(self) -> None:
        soa_of_a_week = soa(ttl=604800, minimum=604800)

        self.assertEqual(self.put(rcode=3, authority=[soa_of_a_week]), [3600])
        self.assertIsNone(self.get(3600.0))

    def test_negative_answer_without_soa_is_not_stored(self) -> None:
        for rcode in (0, 3):
            with self.subTest(rcode=rcode):
                nameserver = record("example.com", "NS", b"\0")
                self.put(rcode=rcode, authority=[nameserver])

                self.assertIsNone(self.get(0.0))

    def test_soa_outside_the_authority_section_says_nothing(self) -> None:
        self.put(rcode=3, additional=[soa()])

        self.assertIsNone(self.get(0.0))

    def test_negative_answer_of_minimum_0_is_not_stored(self) -> None:
        self.put(rcode=3, authority=[soa(ttl=60, minimum=0)])

        self.assertIsNone(self.get(0.0))

    def test_nodata_behind_an_alias_is_stored_by_its_soa(self) -> None:
        alias = record("www.example.com", "CNAME", encode_name("example.com"), 300)
        self.put(alias, authority=[soa(ttl=60, minimum=20)])

        self.assertEqual(self.get(19.0), [1, 1])
        self.assertIsNone(self.get(20.0))

    def test_soa_that_was_asked_for_is_an_answer(self) -> None:
        self.put(soa("www.example.com", ttl=60, minimum=20))

        self.assertEqual(self.get(30.0), [30])

    def test_failure_lives_for_its_own_time(self) -> None:
        for rcode in (1, 2, 4, 5):
            with self.subTest(rcode=rcode):
                self.put(rcode=rcode, authority=[soa()])

                self.assertIsNotNone(self.get(0.9))
                self.assertIsNone(self.get(1.0))

    def test_failure_is_not_stored_if_so_configured(self) -> None:
        self.cache = Cache(1 << 20, fail_ttl=0)

        self.put(rcode=2)

        self.assertIsNone(self.get(0.0))

    def test_failure_does_not_take_the_place_of_data(self) -> None:
        self.put("192.0.2.1", ttl=10)

        self.put(rcode=2, now=1005.0)

        self.assertEqual(self.get(5.0), [5])

    def test_data_that_a_failure_did_not_replace_counts_as_used(self) -> None:
        found = read_response(response(ASKED, "192.0.2.1"))
        error = read_response(response(ASKED, rcode=2))
        self.cache.put_all([(b"a", found), (b"b", found)], 1000.0)
        cache = Cache(self.cache.size)
        cache.put_all([(b"a", found), (b"b", found), (b"a", error)], 1000.0)

        cache.put(b"c", found, 1000.0)

        self.assertEqual([key in cache for key in (b"a", b"b")], [True, False])

    def test_data_takes_the_place_of_a_failure(self) -> None:
        self.put(rcode=2)

        self.put("192.0.2.1")

        self.assertEqual(self.get(0.5), [300])

    def test_truncated_answer_is_not_stored(self) -> None:
        self.put("192.0.2.1", tc=True)

        self.assertIsNone(self.get(0.0))

    def test_other_rcodes_are_not_stored(self) -> None:
        for rcode in (6, 9, 11, 15):
            with self.subTest(rcode=rcode):
                self.put("192.0.2.1", rcode=rcode)

                self.assertIsNone(self.get(0.0))

    def test_min_ttl_counts_from_the_first_answer_on(self) -> None:
        self.cache = Cache(1 << 20, min_ttl=60, stale=0)

        self.assertEqual(self.put("192.0.2.1", ttl=10), [60])
        self.assertEqual(self.get(59.0), [1])
        self.assertIsNone(self.get(60.0))

    def test_max_ttl_counts_from_the_first_answer_on(self) -> None:
        self.cache = Cache(1 << 20, max_ttl=60, stale=0)

        self.assertEqual(self.put("192.0.2.1", ttl=3600), [60])
        self.assertEqual(self.get(59.0), [1])
        self.assertIsNone(self.get(60.0))

    def test_bounds_reach_every_record(self) -> None:
        self.cache = Cache(1 << 20, min_ttl=30, max_ttl=60)
        glue = [address("ns.example.com", "192.0.2.2", ttl) for ttl in (10, 40)]

        self.assertEqual(self.put("192.0.2.1", additional=glue), [60, 30, 40])

    def test_bounds_reach_negative_answers(self) -> None:
        self.cache = Cache(1 << 20, min_ttl=30, max_ttl=60)

        for minimum, ttl in ((10, 30), (40, 40), (300, 60)):
            with self.subTest(minimum=minimum):
                served = self.put(rcode=3, authority=[soa(minimum=minimum)])

                self.assertEqual(served, [ttl])

    def test_ttl_0_stays_0_whatever_the_minimum(self) -> None:
        self.cache = Cache(1 << 20, min_ttl=60)

        self.assertEqual(self.put("192.0.2.1", ttl=0), [0])
        self.assertIsNone(self.get(0.0))

    def test_expired_entry_is_kept_for_as_long_as_told(self) -> None:
        self.cache = Cache(1 << 20, stale=100.0)
        self.put("192.0.2.1", ttl=10)

        self.assertIsNotNone(self.cache.get(KEY, 1109.9))
        self.assertIsNone(self.cache.get(KEY, 1110.0))

    def test_expired_failure_is_gone(self) -> None:
        self.cache = Cache(1 << 20, stale=100.0)
        self.put(rcode=2)

        self.assertIsNone(self.cache.get(KEY, 1001.0))

    def test_answer_that_may_not_be_stored_ends_the_older_one(self) -> None:
        self.cache = Cache(1 << 20)  # RFC 8767 section 4: NOERROR and NXDOMAIN refresh
        for rcode in (0, 3):
            with self.subTest(rcode=rcode):
                self.put("192.0.2.1", ttl=10)

                self.put(rcode=rcode, now=1020.0)

                self.assertIsNone(self.cache.get(KEY, 1020.0))

    def test_batch_comes_back_in_order_stored_or_not(self) -> None:
        found = [
            read_response(response(ASKED, f"192.0.2.{ttl}", ttl=ttl))
            for ttl in (1, 0, 3, 4)
        ]
        keys = b"a", b"b", b"", b"d"

        served = self.cache.put_all(list(zip(keys, found)), 1000.0)

        self.assertEqual(served, found)
        self.assertEqual(
            [key in self.cache for key in keys], [True, False, False, True]
        )

    def answer_again(self, message: bytes, found: dotproxy.Response) -> Message:
        """Have a response to this query stored; return what is served of it."""
        asked = dotproxy.parse_query(message)
        self.cache.put(asked.cache_key, found, 1000.0)
        entry = self.cache.get(asked.cache_key, 1000.5)
        assert entry is not None
        return parse(self.cache.answer(entry, asked, 1000.5))

    def test_failure_of_our_own_keeps_its_reason(self) -> None:
        found = dotproxy.failure_response(UpstreamError("timeout", "no answer"))

        answer = self.answer_again(query(do=True), found)

        self.assertEqual((answer.rcode, extended_errors(answer)), (2, [22]))

    def test_options_that_pass_are_kept_without_the_padding(self) -> None:
        options = option(EDE, b"\0\3stale") + option(PADDING, bytes(400))
        message = response(query(do=True), "192.0.2.1", options=options)

        answer = self.answer_again(query(do=True), read_response(message))

        self.assertEqual(answer.addresses, ["192.0.2.1"])
        self.assertEqual(extended_errors(answer), [3])
        self.assertLess(self.cache.size, 900)

    def test_no_room_at_all_stores_nothing(self) -> None:
        self.cache = Cache(0)

        self.put("192.0.2.1")

        self.assertEqual((len(self.cache), self.cache.size), (0, 0))

    def test_flush_forgets_everything(self) -> None:
        self.put("192.0.2.1")

        self.assertEqual(self.cache.flush(), 1)
        self.assertIsNone(self.get(0.0))
        self.assertEqual((len(self.cache), self.cache.size), (0, 0))


# Fills a cache in a process of its own; prints by how much both grew.
MEMORY_SCRIPT = """\
import gc, os, resource, struct, sys
import dotproxy

def resident():
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def fill(cache, first, last, records, padding, seconds):
    option = struct.pack("!HH", 12, padding) + bytes(padding)
    opt = b"\\0" + struct.pack("!HHIH", 41, 1232, 0, len(option)) + option
    for number in range(first, last):
        ttl = 300 + number * 7919 % seconds
        answer = struct.pack("!HHHIH4s", 0xC00C, 1, 1, ttl, 4, bytes(4)) * records
        name = b"\\3www\\x0chost-%07d\\7example\\3com\\0" % number
        asked = struct.pack("!6H", 0, 256, 1, 0, 0, 0) + name + b"\\0\\1\\0\\1"
        query = dotproxy.parse_query(asked)
        header = struct.pack("!6H", 0, 0x8180, 1, records, 0, 1)
        message = header + query.question + answer + opt
        found = dotproxy.parse_response(message, 12 + len(query.question))
        cache.put(query.cache_key, found, 1000.0 + number / 1000)

bound, names, *what = map(int, sys.argv[1:])
cache = dotproxy.Cache(bound)
fill(cache, 0, names // 10, *what)  # takes what was free in the process
gc.collect()
size, before = cache.size, resident()
fill(cache, names // 10, names, *what)
print(cache.size - size, resident() - before)
"""


class CacheBoundTest(DotproxyTestCase):
    def put(
        self, cache: Cache, name: str, *answers: bytes, ttl: int = 300, now: float = 0.0
    ) -> None:
        asked = query(name)
        message = response(asked, *(answers or ["192.0.2.1"]), ttl=ttl)
        cache.put(cache_key(asked), read_response(message), now)

    def names(self, cache: Cache, *names: str, now: float = 0.0) -> list[str]:
        """List those that are in the cache."""
        return [name for name in names if cache.get(cache_key(query(name)), now)]

    def room_for(self, count: int, seconds: int = 1) -> int:
        """Return the size of so many names that expire in so many seconds."""
        cache = Cache(1 << 30)
        for number in range(count):
            self.put(cache, f"{number}.test")
        return cache.size + (seconds - 1) * Cache.SECOND

    def test_least_recently_used_goes_first(self) -> None:
        cache = Cache(self.room_for(3))
        for name in ("a.test", "b.test", "c.test"):
            self.put(cache, name)
        self.names(cache, "a.test")

        self.put(cache, "d.test")

        everybody = self.names(cache, "a.test", "b.test", "c.test", "d.test")
        self.assertEqual(everybody, ["a.test", "c.test", "d.test"])

    def test_room_is_made_for_several_at_a_time(self) -> None:
        found = read_response(response(ASKED, "192.0.2.1"))
        cache, stored = Cache(1 << 22), 0
        while len(cache) == stored:
            cache.put(b"%d" % stored, found, 0.0)
            stored += 1

        self.assertIn(stored - len(cache), range(3, 10))
        self.assertFalse(b"0" in cache)

    def test_expired_goes_before_live(self) -> None:
        cache = Cache(self.room_for(3, seconds=3))
        self.put(cache, "a.test")
        self.put(cache, "b.test", ttl=20)
        self.put(cache, "c.test", ttl=10)

        for name in ("d.test", "e.test"):
            self.put(cache, name, now=30.0)

        everybody = self.names(cache, "a.test", "b.test", "c.test", "d.test", now=30.0)
        self.assertEqual(everybody, ["a.test", "d.test"])

    def test_renewed_entry_is_not_taken_for_an_expired_one(self) -> None:
        cache = Cache(self.room_for(2, seconds=2))
        self.put(cache, "a.test", ttl=10)
        self.put(cache, "a.test", now=20.0)
        self.put(cache, "b.test", ttl=10, now=20.0)

        self.put(cache, "c.test", now=40.0)

        everybody = self.names(cache, "a.test", "b.test", "c.test", now=40.0)
        self.assertEqual(everybody, ["a.test", "c.test"])

    def test_size_never_exceeds_the_bound(self) -> None:
        numbers = random.Random(1)
        cache = Cache(20_000)
        for now in range(2000):
            text = record("x.test", "TXT", bytes(numbers.randrange(1000)), 1)
            self.put(cache, f"{numbers.randrange(50)}.test", text, now=now / 10)

            self.assertLessEqual(cache.size, 20_000)
        self.assertGreater(cache.size, 15_000)

    def test_answer_larger_than_the_cache_is_not_kept(self) -> None:
        cache = Cache(2000)

        self.put(cache, "a.test", record("a.test", "TXT", bytes(3000)))

        self.assertEqual((len(cache), cache.size), (0, 0))

    def test_replaced_and_removed_entries_are_counted_out(self) -> None:
        cache = Cache(1 << 20, stale=0)
        for _ in range(3):
            self.put(cache, "a.test", ttl=10)
        self.assertEqual(cache.size, self.room_for(1))

        self.names(cache, "a.test", now=10.0)

        self.assertEqual((len(cache), cache.size), (0, 0))

    def test_renewing_one_name_for_ever_takes_no_memory(self) -> None:
        asked = query()
        found = read_response(response(asked, "192.0.2.1", ttl=1))
        cache = Cache(1 << 20)
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)

        for now in range(5000):
            cache.put(KEY, found, float(now))

        self.assertLess(tracemalloc.get_traced_memory()[0], 50_000)

    def lines_run(self, cache: Cache, name: str, now: float) -> int:
        """Return how many lines of code storing this name takes."""
        asked, lines = query(name), 0
        found = read_response(response(asked, "192.0.2.1", ttl=300))

        def count(frame: types.FrameType, event: str, told: object) -> TraceFunction:
            nonlocal lines
            lines += 1
            return count

        sys.settrace(count)
        try:
            cache.put(cache_key(asked), found, now)
        finally:
            sys.settrace(None)
        return lines

    def test_no_answer_is_stored_at_the_cost_of_a_look_at_all(self) -> None:
        cache = Cache(self.room_for(1000))

        costs = [self.lines_run(cache, f"{n}.test", n / 100) for n in range(2000)]
        late = [self.lines_run(cache, f"{n}.late", 9000.0) for n in range(500)]

        self.assertLess(max(costs + late), 500)

    def measure(
        self, bound: int, names: int, records: int, padding: int, seconds: int = 1
    ) -> float:
        """Return the cache's size as a share of what its process grew by.

        It is not compiled there: that would leave memory free for the cache.
        """
        environment = dict(os.environ)
        for name in ("DEVMODE", "MALLOC", "TRACEMALLOC"):
            environment.pop(f"PYTHON{name}", None)
        environment["PYTHONPATH"] = os.path.dirname(compiled_program())
        what = bound, names, records, padding, seconds
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

    def test_size_of_100_000_names_is_honest(self) -> None:
        self.assertAlmostEqual(self.measure(1 << 30, 100_000, 1, 380), 1.0, delta=0.3)

    def test_size_is_honest_where_all_expire_at_another_time(self) -> None:
        size = self.measure(1 << 30, 30_000, 1, 0, 86400)

        self.assertAlmostEqual(size, 1.0, delta=0.2)

    def test_size_of_large_answers_is_honest(self) -> None:
        self.assertAlmostEqual(self.measure(1 << 30, 20_000, 30, 0), 1.0, delta=0.3)

    def test_size_stays_honest_as_names_come_and_go(self) -> None:
        self.assertAlmostEqual(self.measure(1 << 23, 50_000, 1, 0), 1.0, delta=0.3)


# ---- Local answers -------------------------------------------------------------------
# What was asked is judged from the answer as a client gets it.

SOA_OF_RFC6303 = struct.pack("!5I", 1, 3600, 1200, 604800, 10800)


def local_answer(
    name: str,
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
        self, name: str, rrtype: str | int = "A", *, stream: bool = False
    ) -> Message:
        answer = local_answer(name, rrtype, stream=stream)
        assert answer is not None, f"{name} {rrtype} leaves"
        return answer

    def assert_negative(self, answer: Message, rcode: int, zone: str) -> None:
        """Expect an empty answer with the SOA record of the zone."""
        self.assertEqual((answer.rcode, answer.answers), (rcode, []))
        (entry,) = answer.authority
        self.assertEqual(
            (entry.name.lower(), entry.type, entry.rrclass, entry.ttl),
            (zone, RRTYPES["SOA"], 1, 10800),
        )
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
                    self.assertEqual([each.name for each in answer.answers], [name])
                    self.assertEqual(answer.answers[0].ttl, 10800)

    def test_localhost_has_no_other_types(self) -> None:
        for name in ("localhost", "a.localhost"):
            for rrtype in ("MX", "TXT", "HTTPS", "PTR"):
                with self.subTest(name=name, rrtype=rrtype):
                    answer = self.answer(name, rrtype)
                    self.assert_negative(answer, 0, "localhost")

    def test_loopback_address_is_named_localhost(self) -> None:
        for address in ("127.0.0.1", "::1"):
            with self.subTest(address):
                (entry,) = self.answer(reverse(address), "PTR").answers
                found = entry.type, entry.rdata
                self.assertEqual(found, (12, encode_name("localhost")))

    def test_other_loopback_addresses_have_no_name(self) -> None:
        for address in ("127.0.0.2", "127.1.0.1", "127.255.255.255"):
            with self.subTest(address):
                answer = self.answer(reverse(address), "PTR")
                self.assert_negative(answer, Rcode.NXDOMAIN, "127.in-addr.arpa")

    def test_name_above_one_that_exists_exists(self) -> None:
        for name in ("0.127.in-addr.arpa", "0.0.127.in-addr.arpa"):
            with self.subTest(name):
                self.assert_negative(self.answer(name, "PTR"), 0, "127.in-addr.arpa")

    def test_any_of_a_name_with_no_records_says_so(self) -> None:
        for name, zone in (
            ("0.127.in-addr.arpa", "127.in-addr.arpa"),
            ("_dns.resolver.arpa", "resolver.arpa"),
        ):
            with self.subTest(name):
                self.assert_negative(self.answer(name, "ANY", stream=True), 0, zone)

    def test_special_name_exists_and_nothing_below_it(self) -> None:
        for zone in ("invalid", "local", "onion", "home.arpa", "service.arpa"):
            with self.subTest(zone):
                self.assert_negative(self.answer(zone), 0, zone)
                for name in (f"a.{zone}", f"A.b.{zone.upper()}"):
                    self.assert_negative(self.answer(name), Rcode.NXDOMAIN, zone)

    def test_private_address_has_no_name(self) -> None:
        for address, zone in {
            "0.1.2.3": "0.in-addr.arpa",
            "10.1.2.3": "10.in-addr.arpa",
            "100.64.0.1": "64.100.in-addr.arpa",
            "100.127.255.255": "127.100.in-addr.arpa",
            "169.254.1.1": "254.169.in-addr.arpa",
            "172.16.0.1": "16.172.in-addr.arpa",
            "172.31.0.1": "31.172.in-addr.arpa",
            "192.0.2.1": "2.0.192.in-addr.arpa",
            "192.168.1.1": "168.192.in-addr.arpa",
            "198.51.100.1": "100.51.198.in-addr.arpa",
            "203.0.113.1": "113.0.203.in-addr.arpa",
            "fd12::1": "d.f.ip6.arpa",
            "fe80::1": "8.e.f.ip6.arpa",
            "febf::1": "b.e.f.ip6.arpa",
            "2001:db8::1": "8.b.d.0.1.0.0.2.ip6.arpa",
        }.items():
            with self.subTest(address):
                answer = self.answer(reverse(address), "PTR")
                self.assert_negative(answer, Rcode.NXDOMAIN, zone)

    def test_address_that_is_a_zone_has_no_data(self) -> None:
        for address in ("255.255.255.255", "::"):
            with self.subTest(address):
                name = reverse(address)
                self.assert_negative(self.answer(name, "PTR"), 0, name)

    def test_all_zones_of_the_registry_are_there(self) -> None:
        # RFC 6303 sections 4.1 to 4.6, RFC 7793, and the special names.
        self.assertEqual(len(dotproxy.LOCAL_ZONES), 18 + 7 + 2 + 1 + 4 + 1 + 64 + 7)

    def test_zone_has_soa_and_ns_records(self) -> None:
        for rrtype in ("SOA", "NS"):
            for zone in ("localhost", "10.in-addr.arpa", "resolver.arpa"):
                with self.subTest(zone=zone, rrtype=rrtype):
                    (entry,) = self.answer(zone, rrtype).answers
                    self.assertEqual(entry.type, RRTYPES[rrtype])

    def test_designated_resolver_is_none(self) -> None:
        for name in ("_dns.resolver.arpa", "a.b.resolver.arpa"):
            for rrtype in ("SVCB", "A"):
                with self.subTest(name=name, rrtype=rrtype):
                    self.assert_negative(self.answer(name, rrtype), 0, "resolver.arpa")

    def test_ordinary_name_leaves(self) -> None:
        for name in (
            *("example.com", "notlocalhost", "xlocal", "foo.local.example.com", "."),
            *("latest", "nonion", "locally", "internal", "example", "a", "ab", "abc"),
            *("arpa", "in-addr.arpa", "172.in-addr.arpa", "15.172.in-addr.arpa"),
            *("32.172.in-addr.arpa", "63.100.in-addr.arpa", "128.100.in-addr.arpa"),
            *("110.in-addr.arpa", "169.192.in-addr.arpa", "ipv4only.arpa"),
            *("7.e.f.ip6.arpa", "e.f.ip6.arpa", "nothome.arpa", "1.ip6.arpa"),
            *(reverse("::2"), reverse("192.0.0.1"), reverse("2606:4700::1111")),
        ):
            with self.subTest(name):
                self.assertIsNone(local_answer(name, "A"))

    def test_label_that_only_looks_like_a_zone_leaves(self) -> None:
        for name in (b"\x09foo\5local\0", b"\x06x.test\0"):
            with self.subTest(name):
                asked = dotproxy.parse_query(query(name))
                self.assertIsNone(dotproxy.LocalAnswers().respond(asked))

    def test_ds_of_a_zone_is_the_parents_to_answer(self) -> None:
        for zone in ("home.arpa", "10.in-addr.arpa", "onion"):
            with self.subTest(zone):
                self.assertIsNone(local_answer(zone, "DS"))
                answer = self.answer(f"a.{zone}", "DS")
                self.assert_negative(answer, Rcode.NXDOMAIN, zone)

    def test_answer_is_authoritative_and_never_authenticated(self) -> None:
        for name in ("localhost", "a.onion"):
            answer = local_answer(name, do=True)
            assert answer is not None
            self.assertEqual(answer.flags & (QR | AA | RA | AD), QR | AA | RA)

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
            ("172.in-addr.arpa", ["1.16.172.in-addr.arpa"], ["1.10.in-addr.arpa"]),
            ("arpa", ["a.home.arpa", "10.in-addr.arpa"], ["localhost"]),
            (".", ["localhost", "a.onion", "10.in-addr.arpa"], []),
        ):
            for name in leaves:
                with self.subTest(exempt=exempt, name=name):
                    self.assertIsNone(local_answer(name, exempt=[exempt]))
            for name in stays:
                with self.subTest(exempt=exempt, name=name):
                    self.assertIsNotNone(local_answer(name, exempt=[exempt]))

    def test_any_over_udp_is_one_hinfo_record(self) -> None:
        for name in ("example.com", "localhost"):
            with self.subTest(name):
                answer = self.answer(name, "ANY")
                wanted = Record(name, RRTYPES["HINFO"], 1, 3600, b"\x07RFC8482\0")
                self.assertEqual((answer.rcode, answer.answers), (0, [wanted]))
                self.assertEqual(answer.flags & AA, 0)

    def test_any_over_tcp_leaves(self) -> None:
        self.assertIsNone(local_answer("example.com", "ANY", stream=True))

    def test_any_over_tcp_of_a_special_name_is_all_it_has(self) -> None:
        answer = self.answer("a.localhost", "ANY", stream=True)

        self.assertEqual(answer.addresses, ["127.0.0.1", "::1"])

    def test_type_or_class_that_looks_like_any_leaves(self) -> None:
        for rrtype, rrclass in ((0x01FF, 1), (254, 1), (255, 3)):
            with self.subTest(rrtype=rrtype, rrclass=rrclass):
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
        *("64:ff9c::10.0.0.1", "2001:db8::10.0.0.1", "::1:0:10.0.0.1"),
    )

    def screen(
        self,
        *answers: bytes | str,
        name: str = "www.example.com",
        exempt: Sequence[str] = (),
        rrtype: str = "A",
        additional: Sequence[bytes] = (),
    ) -> Message:
        """Return what a client gets of an upstream's answer."""
        guard = dotproxy.RebindingGuard(map(dotproxy.encode_domain, exempt))
        asked = query(name, rrtype, do=False)
        given = read_response(response(asked, *answers, additional=additional))
        parsed = dotproxy.parse_query(asked)
        return parse(dotproxy.build_answer(parsed, guard.screen(parsed, given)))

    def blocked(self, answer: Message) -> bool:
        """Tell whether it is NODATA that says why; it must be that, or whole."""
        filtered = not answer.answers
        self.assertEqual(extended_errors(answer), [17] if filtered else [])
        self.assertEqual([each.ttl for each in answer.authority], [60] * filtered)
        return filtered

    def test_private_address_is_blocked(self) -> None:
        for address in self.PRIVATE:
            with self.subTest(address):
                self.assertTrue(self.blocked(self.screen(address)))

    def test_public_address_passes(self) -> None:
        for address in self.PUBLIC:
            with self.subTest(address):
                self.assertEqual(self.screen(address).addresses, [address_of(address)])

    def test_one_private_address_blocks_the_whole_answer(self) -> None:
        alias = record("www.example.com", "CNAME", encode_name("a.example.net"))
        private = address("a.example.net", "10.0.0.1")
        for answers in (
            ["192.0.2.1", "10.0.0.1"],
            ["10.0.0.1", "192.0.2.1"],
            [alias, private],
        ):
            with self.subTest(answers=answers):
                self.assertTrue(self.blocked(self.screen(*answers)))

    def test_private_hint_is_blocked(self) -> None:
        v4, v6 = packed("192.0.2.1", "192.168.1.1"), packed("2001:db8::1", "fd00::1")
        for rrtype in ("HTTPS", "SVCB"):
            for parameters in ([(4, v4)], [(1, b"\2h2"), (4, v4[:4]), (6, v6)]):
                with self.subTest(rrtype=rrtype, parameters=parameters):
                    data = svcb(1, "a.example.net", *parameters)
                    answer = record("www.example.com", rrtype, data)
                    self.assertTrue(self.blocked(self.screen(answer, rrtype=rrtype)))

    def test_public_hint_passes(self) -> None:
        no_hint = (1, b"\0" + option(4, packed("10.0.0.1")))
        data = svcb(1, ".", no_hint, (4, packed("192.0.2.1")))
        answer = record("www.example.com", "HTTPS", data)

        self.assertFalse(self.blocked(self.screen(answer, rrtype="HTTPS")))

    def test_malformed_hints_are_passed_over(self) -> None:
        whole = svcb(1, "a.example.net", (4, packed("192.0.2.1", "192.0.2.2")))
        for data in [whole[:size] for size in range(len(whole))]:
            answer = record("www.example.com", "HTTPS", data)
            self.assertFalse(self.blocked(self.screen(answer, rrtype="HTTPS")))

    def test_other_types_and_sections_are_not_looked_at(self) -> None:
        for data in (packed("10.0.0.1"), svcb(1, ".", (4, packed("10.0.0.1")))):
            text = record("www.example.com", "TXT", data)
            self.assertFalse(self.blocked(self.screen(text, rrtype="TXT")))
        glue = address("ns.example.com", "10.0.0.1")
        self.assertFalse(self.blocked(self.screen("192.0.2.1", additional=[glue])))

    def test_exempt_domain_and_all_below_may_have_private_addresses(self) -> None:
        for name, exempt, blocked in (
            ("example.com", "example.com", False),
            ("a.b.Example.Com", "example.com", False),
            ("notexample.com", "example.com", True),
            ("example.com", "a.example.com", True),
        ):
            with self.subTest(name=name, exempt=exempt):
                answer = self.screen("10.0.0.1", name=name, exempt=[exempt])
                self.assertEqual(self.blocked(answer), blocked)

    def test_negative_answer_passes(self) -> None:
        asked = dotproxy.parse_query(query())
        given = read_response(response(query(), rcode=3, authority=[soa()]))

        self.assertIs(dotproxy.RebindingGuard().screen(asked, given), given)


def address_of(text: str) -> str:
    """Return an address as `Message.addresses` writes it."""
    return str(ipaddress.ip_address(text))


# ---- Proxy and cache -----------------------------------------------------------------
# FakeGroup     keeps what is sent until the test says how it ends
# ProxyTestCase a proxy with one, with a clock and a timer that the test moves


class FakeGroup:
    """Stands for all upstreams: keeps exchanges until the test completes them."""

    def __init__(self) -> None:
        self.sent: list[Exchange] = []
        self.waiting: list[Exchange] = []
        self._complete: Callable[[list[dotproxy.Answer], Endpoint], None]
        self._fail: Callable[[list[dotproxy.Failure]], None]

    def join(
        self,
        endpoints: object,
        trust: object,
        timer: object,
        complete: Callable[[list[dotproxy.Answer], Endpoint], None],
        fail: Callable[[list[dotproxy.Failure]], None],
        **_: object,
    ) -> FakeGroup:
        """Be constructed: stands for the class UpstreamGroup."""
        self._complete, self._fail = complete, fail
        return self

    def send(self, exchanges: Sequence[Exchange], now: float) -> None:
        for exchange in exchanges:
            exchange.copies = 1
        self.sent += exchanges
        self.waiting += exchanges

    def samples(self) -> list[dotproxy.Sample]:
        """Have nothing to tell."""
        return []

    def finish(self, build: Callable[[bytes], bytes] | UpstreamError) -> None:
        """Complete all that waits: with a response to its wire query, or an error."""
        waiting, self.waiting = self.waiting, []
        for exchange in waiting:
            if isinstance(build, UpstreamError):
                self._fail([(exchange, build)])
                continue
            answer = read_response(build(b"\0\0" + exchange.wire))
            if answer.rcode in dotproxy.FAILURE_RCODES:
                self._fail([(exchange, answer)])
            else:
                self._complete([(exchange, answer, 0.0)], UPSTREAM_NAME)

    def answer(
        self,
        *answers: bytes | str,
        ttl: int = 300,
        rcode: int = 0,
        authority: Sequence[bytes] = (),
    ) -> None:
        """Answer all that waits."""
        self.finish(
            lambda message: response(
                message, *answers, ttl=ttl, rcode=rcode, authority=authority
            )
        )

    def fail(self, cause: str = "reset") -> None:
        """Fail all that waits."""
        self.finish(UpstreamError(cause, cause))


class ProxyTestCase(DotproxyTestCase):
    """Asks a proxy without sockets, whose cache knows nothing yet."""

    def setUp(self) -> None:
        self.build(Cache(1 << 20))

    def build(self, cache: Cache, guard: dotproxy.RebindingGuard | None = None) -> None:
        """Make the proxy around this cache."""
        self.clock = Clock()
        self.timer = ManualTimer(self.clock)
        self.group = FakeGroup()
        self.tally: list[dotproxy.Label] = []
        with mock.patch.object(dotproxy, "UpstreamGroup", self.group.join):
            self.proxy = Proxy(
                [], TRUST, self.timer, cache, guard=guard, clock=self.clock
            )

    def ask(self, message: bytes = ASKED, *, stream: bool = False) -> list[Message]:
        """Ask as a server does; return where the answer is, or will be."""
        answers: list[Message] = []
        if stream:
            found = self.proxy.lookup(message, self.clock(), self.tally, TCP)
        else:
            found = self.proxy.lookup_from(UDP)(message, self.clock(), self.tally)
        if isinstance(found, bytes):
            answers.append(parse(found))
        elif found is not None:
            reply = functools.partial(self.take, answers)
            self.proxy.resolve([(found, reply)])
        return answers

    @staticmethod
    def take(answers: list[Message], message: bytes, client: object) -> None:
        answers.append(parse(message))

    def learn(self, *answers: bytes | str, ttl: int = 10) -> None:
        """Have an answer to the usual question stored."""
        self.ask()
        self.group.answer(*(answers or ["192.0.2.1"]), ttl=ttl)
        self.group.sent.clear()

    def ttls(self, message: bytes = ASKED) -> list[int]:
        (answer,) = self.ask(message)
        return [entry.ttl for entry in answer.answers]

    def addresses(self, message: bytes = ASKED) -> list[str]:
        return [text for answer in self.ask(message) for text in answer.addresses]


def extended_errors(message: Message) -> list[int]:
    """List the info codes of the Extended DNS Errors."""
    options = message.opt.options if message.opt else []
    return [int.from_bytes(data[:2], "big") for code, data in options if code == EDE]


def not_reading() -> contextlib.AbstractContextManager[object]:
    """Have it fail to read a response, which takes 10 ms for the largest."""
    return mock.patch.object(dotproxy, "parse_response", side_effect=AssertionError)


class ProxyCacheTest(ProxyTestCase):
    def test_hit_needs_no_upstream(self) -> None:
        self.learn()

        self.assertEqual(self.addresses(), ["192.0.2.1"])
        self.assertEqual(self.group.sent, [])

    def test_hit_over_tcp_needs_no_upstream(self) -> None:
        self.learn()

        (answer,) = self.ask(stream=True)

        self.assertEqual(answer.addresses, ["192.0.2.1"])

    def test_repeated_datagram_has_the_right_ttl_at_every_time(self) -> None:
        self.learn(ttl=10)

        for eighth in range(80):
            with self.subTest(age=eighth / 8):
                self.assertEqual(self.ttls(), [10 - eighth // 8])
            self.clock.advance(1 / 8)

    def test_repeated_datagram_does_not_outlive_its_entry(self) -> None:
        self.build(Cache(1 << 20, fail_ttl=0.5))
        self.ask()
        self.group.answer(rcode=2)
        self.ask()
        self.clock.advance(0.4)
        self.assertEqual(len(self.ask()), 1)

        self.clock.advance(0.1)

        self.assertEqual(self.ask(), [])

    def test_repeated_datagram_follows_a_late_first_hit(self) -> None:
        self.learn(ttl=10)
        self.clock.advance(0.75)
        self.assertEqual(self.ttls(), [10])

        self.clock.advance(0.25)

        self.assertEqual(self.ttls(), [9])

    def test_answer_is_the_clients_own(self) -> None:
        self.learn()
        for message in (
            query("wWw.Example.COM", id=7),
            query("www.EXAMPLE.com", id=8, rd=False),
            query("www.example.com", id=9, do=False, size=4096),
        ):
            for _ in range(2):  # the second time from the hot ones
                (answer,) = self.ask(message)
                asked = parse(message)

                self.assertEqual(answer.id, asked.id)
                self.assertEqual(answer.question, asked.question)
                self.assertEqual(answer.flags & RD, asked.flags & RD)
                self.assertEqual(answer.opt is None, asked.opt is None)

    def test_ad_is_for_those_who_ask(self) -> None:
        self.ask()
        self.group.finish(lambda message: response(message, "192.0.2.1", ad=True))

        flags = [self.ask(query(ad=ad))[0].flags & AD for ad in (False, True)]

        self.assertEqual(flags, [0, AD])

    def test_do_and_cd_are_asked_for_apart(self) -> None:
        self.learn()

        for message in (query(do=True), query(cd=True)):
            self.assertEqual(self.ask(message), [])

    def test_option_that_passes_is_asked_for_apart(self) -> None:
        self.learn()
        message = query(do=False, options=option(65001))

        for _ in range(2):
            self.assertEqual(self.ask(message), [])
            self.group.answer("192.0.2.2")

        self.assertEqual(self.addresses(), ["192.0.2.1"])

    def test_udp_size_counts_for_cached_answers(self) -> None:
        text = [record(b"\xc0\x0c", "TXT", bytes(200)) for _ in range(4)]
        self.learn(*text)
        for size, fits in ((512, False), (1232, True)):
            for _ in range(2):
                with self.subTest(size=size):
                    (answer,) = self.ask(query(do=False, size=size))

                    self.assertEqual(bool(answer.flags & TC), not fits)
                    self.assertEqual(len(answer.answers), 4 if fits else 0)
                    self.assertLessEqual(len(answer.raw), size)

    def test_tcp_gets_the_whole_of_a_cached_answer(self) -> None:
        self.learn(record(b"\xc0\x0c", "TXT", bytes(5000)))
        self.ask()

        (answer,) = self.ask(stream=True)

        self.assertEqual(len(answer.answers[0].rdata), 5000)

    def test_answer_far_too_large_for_the_client_is_not_even_read(self) -> None:
        self.learn(*[record(b"\xc0\x0c", "TXT", bytes(250))] * 200)

        for size in (None, 1232):
            asked = query() if size is None else query(do=False, size=size)
            with self.subTest(size=size), not_reading():
                (answer,) = self.ask(asked)
                self.assertTrue(answer.flags & TC)
                self.assertEqual(answer.answers, [])

    def test_cached_answer_is_not_authoritative(self) -> None:
        first = self.ask()
        self.group.finish(lambda message: response(message, "192.0.2.1", aa=True))

        self.assertTrue(first[0].flags & AA)
        self.assertFalse(self.ask()[0].flags & AA)

    def test_long_datagram_is_not_kept_byte_for_byte(self) -> None:
        self.learn()
        for padding, parsed in ((100, 1), (4000, 2)):
            asked = query(do=False, options=option(PADDING, bytes(padding)))
            with (
                self.subTest(padding=padding),
                mock.patch.object(
                    dotproxy, "parse_query", wraps=dotproxy.parse_query
                ) as parse_query,
            ):
                for _ in range(2):
                    self.assertEqual(self.addresses(asked), ["192.0.2.1"])
                self.assertEqual(parse_query.call_count, parsed)

    def test_query_without_rd_is_answered_from_the_cache(self) -> None:
        self.learn()

        self.assertEqual(self.addresses(query(rd=False)), ["192.0.2.1"])

    def test_answer_to_a_query_without_rd_is_not_stored(self) -> None:
        self.ask(query(rd=False))
        self.group.answer("192.0.2.1")

        self.assertEqual(self.ask(), [])

    def test_bounded_ttl_is_what_the_first_client_gets(self) -> None:
        self.build(Cache(1 << 20, min_ttl=60))
        first = self.ask()

        self.group.answer("192.0.2.1", ttl=5)

        self.assertEqual(first[0].answers[0].ttl, 60)
        self.assertEqual(self.ttls(), [60])

    def test_failure_storm_is_absorbed_for_a_second(self) -> None:
        for rcode in (2, 5):
            with self.subTest(rcode=rcode):
                self.ask()
                self.group.answer(rcode=rcode)
                sent = len(self.group.sent)

                answers = [answer for _ in range(100) for answer in self.ask()]

                self.assertEqual([answer.rcode for answer in answers], [rcode] * 100)
                self.assertEqual(len(self.group.sent), sent)
                self.clock.advance(1.0)

    def test_time_out_is_absorbed_for_a_second(self) -> None:
        self.ask()
        self.group.fail("timeout")

        self.assertEqual(self.ask()[0].rcode, 2)
        self.clock.advance(1.0)
        self.assertEqual(self.ask(), [])

    def test_recovery_is_not_delayed_by_a_lost_connection(self) -> None:
        self.ask()

        self.group.fail("refused")

        self.assertEqual(self.ask(), [])

    def test_cold_name_is_asked_for_once_for_200_clients(self) -> None:
        clients = [self.ask(query(id=number)) for number in range(200)]

        self.group.answer("192.0.2.1")

        self.assertEqual(len(self.group.sent), 1)
        self.assertEqual([answer.id for (answer,) in clients], list(range(200)))

    def test_client_whose_lookup_came_too_early_does_not_ask_again(self) -> None:
        late = self.proxy.lookup(ASKED, self.clock(), [], UDP)
        assert isinstance(late, dotproxy.Query)
        self.learn()
        answers: list[bytes] = []

        # A worker was busy meanwhile.
        self.proxy.resolve([(late, lambda message, _: answers.append(message))])

        self.assertEqual(self.group.sent, [])
        self.assertEqual([parse(each).addresses for each in answers], [["192.0.2.1"]])

    def test_client_that_comes_while_an_answer_is_stored_does_not_ask_again(
        self,
    ) -> None:
        self.ask()
        late: list[list[Message]] = []
        put_all = Cache.put_all

        def slow_put(
            cache: Cache, items: list[tuple[bytes, dotproxy.Response]], now: float
        ) -> list[dotproxy.Response]:
            late.append(self.ask())
            return put_all(cache, items, now)

        with mock.patch.object(Cache, "put_all", slow_put):
            self.group.answer("192.0.2.1")

        self.assertEqual(len(self.group.sent), 1)
        self.assertEqual([len(answers) for answers in late], [1])

    def test_flush_forgets_ready_answers_as_well(self) -> None:
        self.learn()
        for _ in range(3):
            self.ask()

        with self.assertLogs("dotproxy", logging.INFO) as logs:
            self.proxy.flush()

        self.assertEqual(self.ask(), [])
        self.assertIn("cache flushed: entries=1", logs.output[0])

    def test_client_that_asks_during_a_flush_leaves_nothing_behind(self) -> None:
        self.learn()
        flush = Cache.flush

        def slow_flush(cache: Cache) -> int:
            self.ask()
            return flush(cache)

        with mock.patch.object(Cache, "flush", slow_flush), self.assertLogs("dotproxy"):
            self.proxy.flush()

        self.assertEqual(self.ask(), [])

    def test_ready_answers_keep_no_large_ones_alive(self) -> None:
        self.build(Cache(100_000))
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)

        for number in range(50):
            message = query(f"{number}.example")
            self.ask(message)
            self.group.answer(record(b"\xc0\x0c", "TXT", bytes(50_000)))
            self.group.sent.clear()
            self.ask(message)

        self.assertLess(tracemalloc.get_traced_memory()[0], 500_000)


class ProxyLocalTest(ProxyTestCase):
    def test_special_name_is_answered_at_once_and_never_asked_for(self) -> None:
        for message in (
            query("localhost"),
            query("a.onion", do=True),
            query("a.local", rd=False),
            query("a.invalid", do=False, options=option(65001)),
            query(reverse("10.0.0.1"), "PTR", cd=True),
        ):
            for stream in (False, True, False):
                (answer,) = self.ask(message, stream=stream)
                self.assertTrue(answer.flags & AA)
        self.assertEqual(self.group.sent, [])

    def test_any_over_udp_is_small_even_after_one_over_tcp(self) -> None:
        message = query("www.example.com", "ANY")
        whole = self.ask(message, stream=True)
        self.group.answer("192.0.2.1", "192.0.2.2")

        (small,) = self.ask(message)

        self.assertEqual(whole[0].addresses, ["192.0.2.1", "192.0.2.2"])
        self.assertEqual([each.type for each in small.answers], [RRTYPES["HINFO"]])
        self.assertEqual(self.ask(message, stream=True), [])
        self.assertEqual(len(self.group.sent), 2)

    def test_private_address_passes_unless_it_is_to_be_blocked(self) -> None:
        answers = self.ask()

        self.group.answer("10.0.0.1")

        self.assertEqual(answers[0].addresses, ["10.0.0.1"])


class ProxyGuardTest(ProxyTestCase):
    def setUp(self) -> None:
        self.build(Cache(1 << 20), dotproxy.RebindingGuard())

    def assert_filtered(self, answer: Message, ttl: int) -> None:
        self.assertEqual((answer.rcode, answer.answers), (0, []))
        self.assertEqual(extended_errors(answer), [17])
        self.assertEqual([(e.type, e.ttl) for e in answer.authority], [(6, ttl)])

    def test_blocked_answer_is_given_and_cached_as_no_data(self) -> None:
        first = self.ask(query(do=False))
        self.group.answer("10.0.0.1")
        self.clock.advance(10)

        (second,) = self.ask(query(do=False))

        self.assert_filtered(first[0], 60)
        self.assert_filtered(second, 50)
        self.assertEqual(len(self.group.sent), 1)

    def test_blocked_answer_is_not_given_where_none_is_cached(self) -> None:
        answers = self.ask(query(do=False, rd=False))

        self.group.answer("10.0.0.1")

        self.assert_filtered(answers[0], 60)

    def test_refreshed_answer_is_blocked(self) -> None:
        self.learn("192.0.2.1", ttl=10)
        self.clock.advance(20)
        answers = self.ask(query(do=False))

        self.group.answer("10.0.0.1")

        self.assert_filtered(answers[0], 60)
        self.assert_filtered(self.ask(query(do=False))[0], 60)


class ProxyStaleTest(ProxyTestCase):
    """A proxy that knows an answer of 10 s, which is over."""

    def setUp(self) -> None:
        super().setUp()
        self.learn()
        self.clock.advance(11.0)

    def expect_stale(self, answers: list[Message]) -> None:
        self.assertEqual([answer.addresses for answer in answers], [["192.0.2.1"]])
        self.assertEqual(answers[0].answers[0].ttl, 30)

    def test_upstream_is_asked_first(self) -> None:
        client = self.ask()
        self.assertEqual(client, [])

        self.group.answer("192.0.2.2")

        self.assertEqual(client[0].addresses, ["192.0.2.2"])
        self.assertEqual(self.addresses(), ["192.0.2.2"])

    def test_stale_answer_comes_after_1_8_seconds(self) -> None:
        client = self.ask()
        self.timer.advance(1.79)
        self.assertEqual(client, [])

        self.timer.advance(0.03)

        self.expect_stale(client)

    def test_stale_answer_comes_at_once_when_the_upstreams_fail(self) -> None:
        for cause in ("refused", "timeout"):
            with self.subTest(cause):
                self.setUp()
                client = self.ask()

                self.group.fail(cause)

                self.expect_stale(client)

    def test_failure_from_the_upstream_does_not_replace_stale_data(self) -> None:
        for rcode in (1, 2, 4, 5):
            with self.subTest(rcode=rcode):
                self.setUp()
                client = self.ask()

                self.group.answer(rcode=rcode)

                self.expect_stale(client)
                self.expect_stale(self.ask())

    def test_everybody_who_waits_gets_the_stale_answer(self) -> None:
        clients = [self.ask(query(id=number)) for number in range(10)]

        self.group.fail()

        for client in clients:
            self.expect_stale(client)
        self.assertEqual(len(self.group.sent), 1)

    def test_only_edns_clients_are_told_why(self) -> None:
        plain, edns = self.ask(), self.ask(query(do=False))

        self.group.fail()

        self.assertIsNone(plain[0].opt)
        self.assertEqual(extended_errors(edns[0]), [3])

    def test_fresh_answer_has_no_extended_error(self) -> None:
        client = self.ask(query(do=False))

        self.group.answer("192.0.2.2")

        self.assertEqual(extended_errors(client[0]), [])

    def test_later_clients_do_not_wait(self) -> None:
        self.ask()
        self.timer.advance(2.0)

        self.expect_stale(self.ask())
        self.assertEqual(len(self.group.sent), 1)

    def test_refresh_goes_on_behind_the_stale_answer(self) -> None:
        client = self.ask()
        self.timer.advance(2.0)

        self.group.answer("192.0.2.2")

        self.assertEqual(len(client), 1)
        self.assertEqual(self.addresses(), ["192.0.2.2"])

    def test_name_is_refreshed_every_30_seconds_at_most(self) -> None:
        self.ask()
        self.group.fail()
        for _ in range(298):
            self.timer.advance(0.1)
            self.expect_stale(self.ask())
        self.assertEqual(len(self.group.sent), 1)

        for _ in range(298):
            self.timer.advance(0.1)
            self.expect_stale(self.ask())
            self.group.fail("timeout")

        self.assertEqual(len(self.group.sent), 2)

    def test_recovered_upstream_gives_fresh_answers_after_30_seconds(self) -> None:
        self.ask()
        self.group.fail()
        self.timer.advance(30.0)
        self.expect_stale(self.ask())  # nobody waits for the refresh
        self.timer.advance(0.1)

        self.group.answer("192.0.2.2")

        self.assertEqual(self.addresses(), ["192.0.2.2"])

    def test_recovery_with_an_answer_that_may_not_be_stored_counts(self) -> None:
        self.ask()
        self.group.fail()
        self.timer.advance(30.0)
        self.ask()
        self.timer.advance(0.1)

        self.group.answer("192.0.2.2", ttl=0)

        self.assertEqual(self.ask(), [])  # it is asked for, not answered from old data

    def test_stale_answer_has_an_end(self) -> None:
        self.ask()
        self.group.fail()

        self.clock.advance(86400.0)

        self.assertEqual(self.ask(), [])
        self.group.fail()
        self.assertEqual(len(self.group.sent), 2)

    def test_stale_answers_can_be_turned_off(self) -> None:
        self.build(Cache(1 << 20, stale=0))
        self.learn()
        self.clock.advance(10.0)
        client = self.ask()
        self.timer.advance(2.0)
        self.assertEqual(client, [])

        self.group.fail()

        self.assertEqual(client[0].rcode, 2)

    def test_expired_nxdomain_is_served_too(self) -> None:
        other = query("none.example.com", do=False)
        self.ask(other)
        self.group.answer(rcode=3, authority=[soa(minimum=10)])
        self.clock.advance(11.0)
        client = self.ask(other)

        self.group.fail()

        self.assertEqual(client[0].rcode, 3)
        self.assertEqual([entry.ttl for entry in client[0].authority], [30])
        self.assertEqual(extended_errors(client[0]), [19])

    def test_query_without_rd_gets_no_stale_answer(self) -> None:
        client = self.ask(query(rd=False))
        self.timer.advance(2.0)
        self.assertEqual(client, [])

        self.group.fail()

        self.assertEqual(client[0].rcode, 2)

    def test_query_without_rd_does_not_end_the_stale_answer(self) -> None:
        self.ask(query(rd=False))
        self.group.answer("192.0.2.2", ttl=0)
        client = self.ask()

        self.group.fail()

        self.expect_stale(client)

    def test_stale_answer_respects_the_udp_size(self) -> None:
        self.learn_large()
        client, other = self.ask(), self.ask(stream=True)

        self.group.fail()

        self.assertTrue(client[0].flags & TC)
        self.assertEqual(len(other[0].answers), 4)

    def test_stale_answer_far_too_large_for_the_client_is_not_even_read(self) -> None:
        self.build(Cache(1 << 20))
        self.learn(*[record(b"\xc0\x0c", "TXT", bytes(250), 10)] * 200)
        self.clock.advance(11.0)
        client = self.ask(query(do=False))

        with not_reading():
            self.group.fail()

        self.assertTrue(client[0].flags & TC)

    def learn_large(self) -> None:
        self.build(Cache(1 << 20))
        self.learn(*[record(b"\xc0\x0c", "TXT", bytes(200), 10) for _ in range(4)])
        self.clock.advance(11.0)


class ProxyPrefetchTest(ProxyTestCase):
    """A proxy that knows an answer of 100 s."""

    def setUp(self) -> None:
        super().setUp()
        self.learn(ttl=100)

    def ask_at(self, age: float, message: bytes = ASKED) -> list[Message]:
        """Ask at this age of the answer; then let the timer do what is due."""
        self.timer.advance(1000.0 + age - self.clock())
        answers = self.ask(message)
        self.timer.advance(0.1)
        return answers

    def test_popular_entry_is_refreshed_near_its_end(self) -> None:
        self.ask_at(50)

        client = self.ask_at(90)

        self.assertEqual([answer.answers[0].ttl for answer in client], [10])
        self.assertEqual(len(self.group.sent), 1)

    def test_new_answer_takes_the_place_of_the_old(self) -> None:
        self.ask_at(50)
        self.ask_at(90)

        self.group.answer("192.0.2.2", ttl=100)

        self.assertEqual(self.ask_at(91)[0].addresses, ["192.0.2.2"])
        self.assertEqual(self.ask_at(180)[0].answers[0].ttl, 11)

    def test_refresh_is_sent_once(self) -> None:
        for age in (50, 90, 91, 92, 99):
            self.ask_at(age)

        self.assertEqual(len(self.group.sent), 1)

    def test_failed_refresh_is_not_repeated(self) -> None:
        self.ask_at(50)
        self.ask_at(90)
        self.group.answer(rcode=2)

        client = self.ask_at(95)

        self.assertEqual(client[0].addresses, ["192.0.2.1"])
        self.assertEqual(len(self.group.sent), 1)

    def test_hit_before_the_last_tenth_refreshes_nothing(self) -> None:
        for age in (10, 50, 89.8):
            self.ask_at(age)

        self.assertEqual(self.group.sent, [])

    def test_ready_answer_does_not_hide_the_last_tenth(self) -> None:
        self.build(Cache(1 << 20))
        self.learn(ttl=5)  # its last tenth begins within a second
        self.ask_at(4.25)

        self.ask_at(4.5)

        self.assertEqual(len(self.group.sent), 1)

    def test_second_hit_in_the_last_tenth_counts_at_once(self) -> None:
        for age in (90.25, 90.5):
            self.ask_at(age)

        self.assertEqual(len(self.group.sent), 1)

    def test_unpopular_entry_is_not_refreshed(self) -> None:
        self.ask_at(95)

        self.assertEqual(self.group.sent, [])

    def test_repeated_datagrams_make_an_entry_popular(self) -> None:
        for _ in range(2):
            self.ask_at(89.5)  # the second time from the ready ones

        self.ask_at(91)

        self.assertEqual(len(self.group.sent), 1)

    def test_query_without_rd_refreshes_nothing(self) -> None:
        self.ask_at(50)
        self.ask_at(95, query(rd=False))
        self.assertEqual(self.group.sent, [])

        self.ask_at(96)

        self.assertEqual(len(self.group.sent), 1)

    def test_client_that_joins_a_refresh_gets_a_stale_answer_in_time(self) -> None:
        self.ask_at(50)
        self.ask_at(99)

        client = self.ask_at(100.5)
        self.assertEqual(client, [])
        self.timer.advance(1.8)

        self.assertEqual(client[0].addresses, ["192.0.2.1"])
        self.assertEqual(client[0].answers[0].ttl, 30)

    def test_client_that_joins_a_refresh_gets_a_stale_answer_on_failure(self) -> None:
        self.ask_at(50)
        self.ask_at(99)
        client = self.ask_at(100.5)

        self.group.fail()

        self.assertEqual(client[0].addresses, ["192.0.2.1"])
        self.assertEqual(len(self.group.sent), 1)

    def test_client_that_joins_a_failing_refresh_gets_a_stale_answer(self) -> None:
        self.ask_at(50)
        self.ask_at(99)
        self.clock.advance(1.5)
        clients: list[list[Message]] = []
        make_do = self.proxy._make_do

        def join(*failed: Any) -> Any:
            made = make_do(*failed)
            clients.append(self.ask())
            return made

        with mock.patch.object(self.proxy, "_make_do", join):
            self.group.fail("timeout")

        ((answer,),) = clients
        self.assertEqual(answer.addresses, ["192.0.2.1"])


class ProxyMetricsTest(ProxyTestCase):
    def build(self, cache: Cache, guard: dotproxy.RebindingGuard | None = None) -> None:
        super().build(cache, guard)
        self.metrics = dotproxy.Metrics()
        self.proxy.metrics.observer = self.metrics

    def responses(self, *labels: str) -> float:
        name = "dotproxy_dns_responses_total"
        return sample(self.metrics.samples(), name, *labels)

    def sources(self) -> list[str]:
        return [each[0] for each in self.tally]

    def test_answer_at_once_is_told_with_its_source(self) -> None:
        self.learn()

        self.ask()
        self.ask()
        self.ask(query(opcode=4))
        self.ask(query(rrtype="AXFR"))

        self.assertEqual(self.sources(), ["cache", "cache", "local", "local"])
        self.assertEqual([each[3] for each in self.tally], [0, 0, 4, 5])

    def test_size_and_type_are_told_the_same_for_every_hit(self) -> None:
        self.learn()

        sizes = [len(self.ask()[0].raw) for _ in range(3)]

        self.assertEqual([each[5] for each in self.tally], sizes)
        self.assertEqual({each[4] for each in self.tally}, {len(ASKED)})
        self.assertEqual({each[2] for each in self.tally}, {b"\0\1"})

    def test_answer_that_was_waited_for_is_told_with_its_source(self) -> None:
        self.ask()
        self.ask()
        self.group.answer("192.0.2.1")
        self.ask(query("other.example"))
        self.group.fail()

        self.assertEqual(self.responses("NOERROR", "upstream"), 2)
        self.assertEqual(self.responses("SERVFAIL", "local"), 1)
        self.assertEqual(self.tally, [])

    def test_stale_answer_is_told_as_one(self) -> None:
        self.learn(ttl=10)
        self.clock.advance(11)
        self.ask()
        self.group.fail()
        self.ask()

        self.assertEqual(self.responses("NOERROR", "stale"), 1)
        self.assertEqual(self.sources(), ["stale"])

    def test_eviction_and_refresh_are_counted(self) -> None:
        cache = Cache(3000)
        self.build(cache)
        for number in range(10):
            self.ask(query(f"{number}.example"))
            self.group.answer("192.0.2.1")
        evictions = sample(self.proxy.samples(), "dotproxy_cache_evictions_total")

        self.assertEqual(evictions, 10 - len(cache))
        self.assertEqual(
            sample(self.proxy.samples(), "dotproxy_cache_entries"), len(cache)
        )

    def test_prefetch_is_counted(self) -> None:
        self.learn(ttl=100)
        for _ in range(3):
            self.ask()
        self.clock.advance(95)
        self.ask()
        self.timer.advance(0.1)

        prefetched = sample(self.proxy.samples(), "dotproxy_cache_prefetch_total")
        self.assertEqual(prefetched, 1)

    def test_query_of_the_greediest_client_is_turned_away_as_overload(self) -> None:
        with mock.patch.object(self.proxy, "_max_in_flight", 10):
            for number in range(11):
                self.ask(query(f"{number}.example"))

        reason = "dotproxy_turned_away_total", "overload"
        self.assertEqual(sample(self.metrics.samples(), *reason), 1)

    def test_cache_can_serve_while_it_has_an_answer_that_is_no_failure(self) -> None:
        cache = Cache(1 << 20, stale=100.0)
        seen = [cache.can_serve(0.0)]
        message = response(ASKED, rcode=2)
        cache.put(cache_key(ASKED), read_response(message), 0.0)
        seen.append(cache.can_serve(0.0))
        cache.put(cache_key(ASKED), read_response(response(ASKED, "192.0.2.1")), 0.0)
        seen += [cache.can_serve(now) for now in (0.0, 350.0, 401.0)]

        self.assertEqual(seen, [False, False, True, True, False])


# ---- Any query, any age: a slow, obvious model ---------------------------------------
# Sample      a random response, and what a client may see of it
# Reference   what the cache has to do, from the parsed messages and the written rules
# PropertyTest asks both, and compares what comes out field by field

FAILURES = (1, 2, 4, 5)
NAMES = ("www.example.com", "a.example", "long-label.sub.example.net", "b.a.example")
HOP_BY_HOP = (8, 10, 11, 12)
Fields = tuple[int, int, int, bytes, list[Record], list[Record], list[Record], object]


def fields(message: Message) -> Fields:
    """Return all that a client can see in a message."""
    return (
        *(message.id, message.flags, message.rcode, message.question),
        *(message.answers, message.authority, message.additional, message.opt),
    )


class Sample(NamedTuple):
    """A random response."""

    wire: bytes
    shown: bytes  # without OPT and what follows it
    rcode: int
    options: list[tuple[int, bytes]]  # those that pass


class Generator:
    """Makes random messages."""

    TTLS = (1, 2, 9, 10, 30, 60, 300, 300, 3600, 7200, 10**6, 0x7FFFFFFF)

    def __init__(self, numbers: random.Random) -> None:
        self.numbers = numbers
        self.ends = 0.0  # a chance for TTLs that may not be stored

    def odds(self, chance: float) -> bool:
        return self.numbers.random() < chance

    def query(self) -> bytes:
        """Make a query that is like others but for details."""
        choose = self.numbers.choice
        name = choose(NAMES)
        if self.odds(0.3):
            name = "".join(choose((str.upper, str.lower))(letter) for letter in name)
        options = choose((b"", b"", b"", option(10, bytes(8)), option(11)))
        if self.odds(0.05):
            options += option(65001, b"data")
        return query(
            name,
            choose(("A", "A", "TXT")),
            id=self.numbers.randrange(65536),
            rd=not self.odds(0.1),
            ad=self.odds(0.3),
            cd=self.odds(0.1),
            do=choose((None, None, False, True)),
            size=choose((0, 512, 700, 1232, 4096)),
            options=options,
        )

    def ttl(self) -> int:
        if self.odds(self.ends):
            return self.numbers.choice((0, 1 << 31, (1 << 32) - 1))
        return self.numbers.choice(self.TTLS)

    def owner(self, question: bytes) -> bytes:
        """Make an owner name: in full, or by a pointer into the question."""
        parent = 12 + 1 + question[0]
        pointer = struct.pack("!H", 0xC000 | self.numbers.choice((12, parent)))
        return self.numbers.choice((pointer, b"\3fTp" + pointer, encode_name("N.test")))

    def record(self, question: bytes) -> bytes:
        rrtype, rdata = self.numbers.choice(
            (
                ("A", b"\xc0\0\2\1"),
                ("CNAME", b"\xc0\x0c"),
                ("TXT", bytes(self.numbers.randrange(400))),
            )
        )
        return record(self.owner(question), rrtype, rdata, self.ttl())

    def records(self, question: bytes, most: int) -> list[bytes]:
        count = self.numbers.randrange(most + 1)
        return [self.record(question) for _ in range(count)]

    def response(self, asked: bytes) -> Sample:
        """Make a response to a query."""
        choose, question = self.numbers.choice, parse(asked).question
        self.ends = choose((0.0, 0.0, 0.0, 0.3))
        rcode = choose((0,) * 12 + (3,) * 4 + (1, 2, 2, 2, 4, 5, 9, 16, 23))
        answers = self.records(question, 0 if rcode else choose((0, 3)))
        authority = self.records(question, choose((0, 2)))
        if self.odds(0.2 if answers else 0.8):
            minimum = choose((0, 5, 60, 10**6))
            authority.append(soa(ttl=self.ttl(), minimum=minimum))
        additional = self.records(question, choose((0, 2)))
        if self.odds(0.1):
            additional.append(soa())
        if rcode in FAILURES:
            authority = additional = []  # their records, if any, mean nothing
        codes = [code for code in (3, 10, 11, 12, 15) if self.odds(0.2)]
        options = [(code, bytes(10)) for code in codes]
        opt: list[bytes] = []
        if rcode > 15 or self.odds(0.8):
            packed = b"".join(option(*each) for each in options)
            opt = [record(".", OPT, packed, rcode >> 4 << 24, 1232)]
            opt += self.records(question, choose((0, 0, 0, 1)))
        else:
            options = []
        build = functools.partial(
            response,
            asked,
            *answers,
            rcode=rcode & 15,
            authority=authority,
            edns=False,
            aa=self.odds(0.5),
            ad=self.odds(0.5),
            tc=self.odds(0.03),
        )
        passed = [each for each in options if each[0] not in HOP_BY_HOP]
        wire = build(additional=additional + opt)
        return Sample(wire, build(additional=additional), rcode, passed)


class Stored:
    """What the reference keeps of a response."""

    def __init__(self, sample: Sample, now: float, life: float) -> None:
        self.sample = sample
        self.at = now
        self.life = life
        self.expires = now + life
        self.hits = 0
        self.refreshed = False
        self.retry_at = 0.0  # once a refresh failed
        self.waited_for = False  # it goes to the one who waits for it


class Reference:
    """The cache as its rules are written, one after the other."""

    def __init__(
        self, low: int, high: int, *, stale: float, fail_ttl: float = 1.0
    ) -> None:
        self.low, self.high, self.stale, self.fail_ttl = low, high, stale, fail_ttl
        self.entries: dict[object, Stored] = {}

    def key(self, asked: Message) -> object:
        """Return what makes a question the same, or None if it bypasses the cache."""
        options = asked.opt.options if asked.opt else []
        if any(code not in HOP_BY_HOP for code, _ in options):
            return None
        secure = bool(asked.opt and asked.opt.flags & DO)
        name = asked.qname.lower()
        return name, asked.qtype, asked.qclass, secure, bool(asked.flags & CD)

    def live(self, asked: Message, now: float) -> Stored | None:
        """Return what answers a query at once; count the hit."""
        entry = self.entries.get(self.key(asked))
        if entry is None or now >= entry.expires:
            return None
        entry.hits += 1
        return entry

    def expired(self, asked: Message, now: float) -> Stored | None:
        """Return what may answer a query if no upstream does."""
        entry = self.entries.get(self.key(asked))
        if entry is None or now < entry.expires or not asked.flags & RD:
            return None
        if now >= entry.expires + self.stale or entry.sample.rcode in FAILURES:
            del self.entries[self.key(asked)]
            return None
        return entry

    def wants_refresh(self, asked: Message, entry: Stored, now: float) -> bool:
        """Tell whether a hit starts a refresh in the background, and note that."""
        if now >= entry.expires:
            wanted = now >= entry.retry_at
            if wanted:
                entry.retry_at = now + 30
            return wanted
        popular = entry.hits >= 2 and entry.sample.rcode not in FAILURES
        late = now >= entry.at + entry.life * 0.9
        if not (popular and late and asked.flags & RD) or entry.refreshed:
            return False
        entry.refreshed = True
        return True

    def learn(self, asked: Message, sample: Sample, now: float) -> Stored:
        """Take in a response; return it as it is to be served."""
        key, life = self.key(asked), self.life(sample)
        entry = Stored(sample, now, life)
        if key is None or not asked.flags & RD:
            entry.life = 0
        elif sample.rcode in FAILURES:
            old = self.entries.get(key)
            if old is None or old.sample.rcode in FAILURES:
                self.entries[key] = entry
        elif life:
            self.entries[key] = entry
        elif sample.rcode in (0, 3) and not parse(sample.shown).flags & TC:
            self.entries.pop(key, None)
        return entry

    def life(self, sample: Sample) -> float:
        message = parse(sample.shown)
        if message.flags & TC:
            return 0
        if sample.rcode in FAILURES:
            return self.fail_ttl
        records = message.answers + message.authority + message.additional
        ttls = [0 if entry.ttl >> 31 else entry.ttl for entry in records]
        told = self.negative_ttl(message)
        if told is not None:
            ttls += [told, 3600]
        elif sample.rcode == 3 or not message.answers:
            return 0
        if sample.rcode not in (0, 3) or min(ttls) == 0:
            return 0
        return min(max(min(ttls), self.low), self.high)

    @staticmethod
    def negative_ttl(message: Message) -> int | None:
        for entry in message.authority:
            if entry.type == 6:
                return min(entry.ttl, int.from_bytes(entry.rdata[-4:], "big"))
        return None

    def served_ttl(self, entry: Stored, ttl: int, now: float) -> int:
        """Return the TTL of a record that came with this one."""
        if not entry.life:
            return ttl  # not stored, and passed on as it came
        if now >= entry.expires:
            return 30
        told = self.negative_ttl(parse(entry.sample.shown))
        high = self.high if told is None else min(told, 3600, self.high)
        bounded = max(min(ttl, high), min(self.low, self.high))
        return max(0, bounded - int(now - entry.at))

    def answer(self, asked: Message, stream: bool, entry: Stored, now: float) -> Fields:
        """Return what a client gets from this entry."""
        sample = entry.sample
        shown = sample.shown
        end = 12 + len(asked.question)
        message = parse(shown[:12] + asked.question + shown[end:])
        stale = bool(entry.life) and now >= entry.expires
        flags = message.flags & ~(RD | AD | CD) | asked.flags & (RD | CD)
        if asked.flags & AD or (asked.opt and asked.opt.flags & DO):
            flags |= message.flags & AD
        if not entry.waited_for:
            flags &= ~AA
        sections = [
            [
                each._replace(ttl=self.served_ttl(entry, each.ttl, now))
                for each in section
            ]
            for section in (message.answers, message.authority, message.additional)
        ]
        own: list[tuple[int, bytes]] = []
        if stream and asked.opt and any(code == 11 for code, _ in asked.opt.options):
            own = [(11, (100).to_bytes(2, "big"))]
        passed = list(sample.options)
        if stale:
            info = 19 if sample.rcode == 3 else 3
            passed.append((EDE, info.to_bytes(2, "big") + b"no upstream answers"))
        size = len(shown)
        if asked.opt:
            size += 11 + sum(4 + len(data) for _, data in passed + own)
        limit = 65535 if stream else 512
        if asked.opt and not stream:
            limit = max(512, min(asked.opt.size, 1232))
        if size > limit:
            flags, sections, passed = flags | TC, [[], [], []], []
        rcode, opt = sample.rcode, None
        if asked.opt:
            opt = Opt(1232, 0, asked.opt.flags & DO, passed + own)
        elif rcode > 15:  # it cannot be told
            rcode = 2
            flags = flags & ~RCODE_MASK | rcode
        answers, authority, additional = sections
        return (
            *(asked.id, flags, rcode, asked.question),
            *(answers, authority, additional, opt),
        )


class PropertyTest(ProxyTestCase):
    """Puts random responses in, asks at random times; compares with the reference."""

    AGES = (0, 0, 0, 0.125, 0.5, 0.875, 1, 2.5, 8, 9.5, 30, 55, 299, 3599, 90000.0)

    def start(self, seed: int) -> None:
        self.seed = seed
        self.generator = Generator(random.Random(seed))
        self.seen = {"hit": 0, "stale": 0, "miss": 0, "refresh": 0}
        odds = self.generator.odds
        low, high = 20 if odds(0.3) else 0, 3000 if odds(0.3) else 604800
        stale = 0.0 if odds(0.2) else 86400.0
        self.build(Cache(1 << 20, min_ttl=low, max_ttl=high, stale=stale))
        self.reference = Reference(low, high, stale=stale)
        self.pool = [self.generator.query() for _ in range(12)]

    def step(self) -> None:
        """Ask one question, answer what goes upstream, compare what comes out."""
        self.wait(self.generator.numbers.choice(self.AGES))
        message = self.generator.numbers.choice(self.pool)
        message = self.generator.numbers.randbytes(2) + message[2:]
        stream = self.generator.odds(0.2)
        asked, now = parse(message), self.clock()
        answers = self.ask(message, stream=stream)
        entry = self.reference.live(asked, now)
        old = None if entry else self.reference.expired(asked, now)
        if entry or (old and old.retry_at):
            self.expect(answers, asked, stream, entry or old, now)
            self.seen["hit" if entry else "stale"] += 1
            self.refresh(asked, entry or old, now)
        else:
            self.assertEqual(answers, [], f"seed {self.seed}")
            self.seen["miss"] += 1
            self.resolve(answers, asked, stream, old)

    def expect(
        self,
        answers: list[Message],
        asked: Message,
        stream: bool,
        entry: Stored | None,
        now: float,
    ) -> None:
        assert entry is not None
        wanted = self.reference.answer(asked, stream, entry, now)
        found = [fields(answer) for answer in answers]
        self.assertEqual(found, [wanted], f"seed {self.seed}")

    def refresh(self, asked: Message, entry: Stored | None, now: float) -> None:
        """Answer the refresh that this hit started, if it did."""
        assert entry is not None
        wanted = self.reference.wants_refresh(asked, entry, now)
        self.wait(0.125)
        self.assertEqual(len(self.group.waiting), int(wanted), f"seed {self.seed}")
        if wanted:
            self.seen["refresh"] += 1
            self.reference.learn(asked, self.finish(), self.clock())
            self.wait(1.0)  # an answer kept ready may stay for a second

    def resolve(
        self, answers: list[Message], asked: Message, stream: bool, old: Stored | None
    ) -> None:
        """Answer the question of a client that waits."""
        self.assertEqual(len(self.group.waiting), 1)
        patience = self.clock() + Cache.STALE_AFTER
        self.wait(self.generator.numbers.choice((0, 0, 0.125, 2.0)))
        late = old is not None and self.clock() > patience
        if late:
            self.expect(answers, asked, stream, old, self.clock())
        sample = self.finish()
        now = self.clock()
        entry = self.reference.learn(asked, sample, now)
        if old and late:
            old.retry_at = patience + 30
        if old and sample.rcode in FAILURES:
            old.retry_at = now + 30
            entry = old
        if not late:
            entry.waited_for = entry is not old
            self.expect(answers, asked, stream, entry, now)
            entry.waited_for = False

    def finish(self) -> Sample:
        """Answer what waits with a random response; return that."""
        (exchange,) = self.group.waiting
        sample = self.generator.response(b"\0\0" + exchange.wire)
        self.group.finish(lambda _: sample.wire)
        return sample

    def wait(self, seconds: float) -> None:
        """Let time pass, in eighths of a second: sums of them are exact."""
        self.timer.advance(seconds)
        self.clock.now = round(self.clock.now * 8) / 8

    def test_whatever_comes_out_is_what_the_rules_say(self) -> None:
        seen: collections.Counter[str] = collections.Counter()
        for seed in range(25):
            self.start(seed)
            for _ in range(100):
                self.step()
            seen.update(self.seen)

        self.assertGreater(min(seen.values()), 30, seen)


# ---- Outage, with a real upstream ----------------------------------------------------


class SkippingClock:
    """The monotonic clock, but for the time that a test skips."""

    def __init__(self) -> None:
        self._skipped = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self._skipped

    def skip(self, seconds: float) -> None:
        self._skipped += seconds


class OutageTest(DotproxyTestCase):
    """A proxy over TLS whose upstream goes away and comes back."""

    def setUp(self) -> None:
        super().setUp()
        self.clock = SkippingClock()
        for name, seconds in (("STALE_AFTER", 0.4), ("STALE_RETRY", 0.3)):
            patch = mock.patch.object(Cache, name, seconds)
            patch.start()
            self.addCleanup(patch.stop)

    @contextlib.contextmanager
    def running(
        self, upstream: FakeUpstream, routes: Sequence[dotproxy.Route] = ()
    ) -> Iterator[None]:
        """Have a proxy for this upstream, with its threads."""
        timer = dotproxy.Timer(self.clock)
        endpoint = dotproxy.Endpoint(*upstream.address, "dot.test")
        self.proxy = Proxy(
            *([endpoint], TRUST, timer, Cache(1 << 20)),
            clock=self.clock,
            timeout=3.0,
            routes=routes,
        )
        timer.start()
        self.proxy.start()
        try:
            yield
        finally:
            self.proxy.drain(5.0)
            self.proxy.close()
            timer.close()

    def ask(self) -> tuple[list[str], float]:
        """Return the addresses of the usual name, and how long that took."""
        start = time.monotonic()
        answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        found = self.proxy.lookup(ASKED, self.clock(), [], UDP)
        if isinstance(found, bytes):
            answers.put(found)
        else:
            assert found is not None
            self.proxy.resolve([(found, lambda message, _: answers.put(message))])
        addresses = parse(answers.get(timeout=5.0)).addresses
        return addresses, time.monotonic() - start

    def expect_known_answer(self) -> None:
        addresses, first = self.ask()
        again, later = self.ask()

        self.assertEqual((addresses, again), (["192.0.2.1"], ["192.0.2.1"]))
        self.assertLess(first, 1.5)  # 2.0 with the usual STALE_AFTER
        self.assertLess(later, 1.0)

    def expect_fresh_answer(self) -> None:
        """Ask on until the answer is the new one: that may not take long."""
        deadline = time.monotonic() + 4.0
        while self.ask()[0] != ["192.0.2.2"]:
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.02)

    def test_known_name_survives_an_upstream_that_is_gone(self) -> None:
        with FakeUpstream() as upstream, self.running(upstream):
            self.ask()
            self.clock.skip(301.0)
            upstream.stop()

            self.expect_known_answer()
            upstream.script = "192.0.2.2"
            upstream.start()

            self.expect_fresh_answer()

    def test_known_name_survives_an_upstream_that_is_silent(self) -> None:
        with FakeUpstream() as upstream, self.running(upstream):
            self.ask()
            self.clock.skip(301.0)
            upstream.script = silence

            self.expect_known_answer()
            upstream.script = "192.0.2.2"

            self.expect_fresh_answer()

    def test_known_name_of_a_domain_survives_its_server(self) -> None:
        with FakeUpstream() as public, FakeUpstream(on_accept="plain") as private:
            routes = [("example.com", Endpoint(*private.address, ""))]
            with self.running(public, routes):
                self.ask()
                self.clock.skip(301.0)
                private.stop()

                self.expect_known_answer()
                private.script = "192.0.2.2"
                private.start()

                self.expect_fresh_answer()

            self.assertEqual(public.queries, [])


# ---- Admission -----------------------------------------------------------------------

EVERYWHERE = [dotproxy.parse_network(text) for text in ("0.0.0.0/0", "::/0")]
STRANGER = "198.51.100.1"


class AdmissionTest(DotproxyTestCase):
    def test_local_addresses_are_admitted_and_never_limited(self) -> None:
        admission = dotproxy.Admission(rate=1)

        for host in (
            *("127.0.0.1", "127.255.255.255", "10.9.8.7", "172.16.0.1"),
            *("172.31.255.255", "192.168.1.1", "169.254.1.1", "100.64.0.1"),
            *("100.127.255.255", "::1", "fe80::1", "fe80::1%eth0", "fd00::1"),
            *("::ffff:10.0.0.1", "::ffff:127.0.0.1"),
        ):
            with self.subTest(host):
                self.assertTrue(admission.admits(host))
                verdicts = {admission.verdict(host, 0.0) for _ in range(9)}
                self.assertEqual(verdicts, {Verdict.ALLOW})
                self.assertIn(host, admission.free)

    def test_public_addresses_are_strangers_by_default(self) -> None:
        admission = dotproxy.Admission()

        for host in (
            *(STRANGER, "8.8.8.8", "172.15.255.255", "172.32.0.0", "192.169.0.0"),
            *("100.63.255.255", "100.128.0.0", "0.0.0.0", "224.0.0.251"),
            *("::", "::2", "2001:db8::1", "fec0::1", "::ffff:198.51.100.1"),
        ):
            with self.subTest(host):
                self.assertFalse(admission.admits(host))
        self.assertEqual(admission.free, set())

    def test_allow_replaces_the_default(self) -> None:
        admission = dotproxy.Admission([dotproxy.parse_network("198.51.100.0/24")])

        self.assertTrue(admission.admits(STRANGER))
        self.assertTrue(admission.admits(f"::ffff:{STRANGER}"))
        self.assertFalse(admission.admits("10.0.0.1"))

    def test_strangers_share_20_refusals_then_10_a_second(self) -> None:
        admission = dotproxy.Admission()

        def refused(now: float) -> int:
            hosts = [f"198.51.100.{n}" for n in range(100)]
            verdicts = [admission.verdict(host, now) for host in hosts]
            self.assertLessEqual(set(verdicts), {Verdict.REFUSE, Verdict.IGNORE})
            return verdicts.count(Verdict.REFUSE)

        counts = [refused(now) for now in (5.0, 5.0, 5.5, 99.0)]
        self.assertEqual(counts, [20, 0, 5, 20])

    def test_public_client_over_its_rate_slips_every_second_query(self) -> None:
        admission = dotproxy.Admission(EVERYWHERE, rate=5)

        verdicts = [admission.verdict(STRANGER, 7.0) for _ in range(14)]

        self.assertEqual(verdicts[:10], [Verdict.ALLOW] * 10)
        self.assertEqual(verdicts[10:], [Verdict.TRUNCATE, Verdict.DROP] * 2)
        self.assertEqual(admission.verdict(STRANGER, 7.2), Verdict.ALLOW)

    def test_rate_is_that_of_an_ipv4_address_or_an_ipv6_56(self) -> None:
        admission = dotproxy.Admission(EVERYWHERE, rate=0.5)
        admission.verdict(STRANGER, 0.0)
        admission.verdict("2001:db8:0:1::1", 0.0)

        for host, allowed in (
            (STRANGER, False),
            (f"::ffff:{STRANGER}", False),
            ("198.51.100.2", True),
            ("2001:db8:0:ff::9", False),
            ("2001:db8:0:100::1", True),
        ):
            with self.subTest(host):
                verdict = admission.verdict(host, 0.0)
                self.assertEqual(verdict is Verdict.ALLOW, allowed)

    def test_limit_for_all_counts_local_clients(self) -> None:
        admission = dotproxy.Admission(rate=0.5, limit_all=True)

        verdicts = [admission.verdict("127.0.0.1", 0.0) for _ in range(2)]

        self.assertEqual(verdicts, [Verdict.ALLOW, Verdict.TRUNCATE])

    def test_rate_0_limits_nobody(self) -> None:
        admission = dotproxy.Admission(EVERYWHERE, rate=0, limit_all=True)

        self.assertEqual(admission.verdict(STRANGER, 0.0), Verdict.ALLOW)
        self.assertIn(STRANGER, admission.free)
        self.assertEqual(admission.pace(STRANGER, 1000, 0.0), (1000, 0.0))

    def test_streams_over_the_rate_take_turns(self) -> None:
        admission = dotproxy.Admission(EVERYWHERE, rate=10)

        taken, ready_at = admission.pace(STRANGER, 19, 3.0)
        self.assertEqual(taken, 19)
        self.assertLess(ready_at, 3.0)
        for count, taken, expected in (
            *((9, 1, 3.05), (9, 1, 3.15), (9, 1, 3.25)),
            *((0, 0, 3.25), (9, 1, 3.35)),
        ):
            got, ready_at = admission.pace(STRANGER, count, 3.0)
            self.assertEqual(got, taken)
            self.assertAlmostEqual(ready_at, expected)

    def test_forged_datagrams_leave_a_clients_streams_alone(self) -> None:
        admission = dotproxy.Admission(EVERYWHERE, rate=1)
        for _ in range(100):
            admission.verdict(STRANGER, 0.0)

        self.assertLess(admission.pace(STRANGER, 1, 0.0)[1], 0.0)

    def test_known_clients_are_bounded(self) -> None:
        admission = dotproxy.Admission()
        with mock.patch.object(dotproxy.Admission, "MAX_KNOWN", 10):
            for number in range(25):
                admission.verdict(f"10.0.0.{number}", 0.0)

        self.assertEqual(len(admission.free), 5)


class RateLimiterTest(DotproxyTestCase):
    def test_rate_holds_over_a_long_time(self) -> None:
        limiter = dotproxy.RateLimiter(50, 100)

        times = [1e6 + n / 1000 for n in range(10_000)]
        taken = sum(limiter.refusals(b"a", now) == 0 for now in times)

        self.assertAlmostEqual(taken, 100 + 500, delta=1)

    def test_refusals_are_counted_by_prefix(self) -> None:
        limiter = dotproxy.RateLimiter(1, 1)

        counts = [limiter.refusals(prefix, 0.0) for prefix in (b"a", b"b") * 3]

        self.assertEqual(counts, [0, 0, 1, 1, 2, 2])

    def test_longest_unused_prefix_is_forgotten_first(self) -> None:
        limiter = dotproxy.RateLimiter(1, 1)
        with mock.patch.object(dotproxy.RateLimiter, "MAX_PREFIXES", 2):
            counts = [limiter.refusals(prefix, 0.0) for prefix in (b"a", b"b", b"a")]
            counts += [limiter.refusals(prefix, 0.0) for prefix in (b"c", b"a", b"b")]

        self.assertEqual(counts, [0, 0, 1, 0, 2, 0])


class ShortAnswerTest(DotproxyTestCase):
    EDE = dotproxy.UDPServer.PROHIBITED

    def refusal(self, message: bytes) -> Message:
        got = dotproxy.build_short_answer(message, Rcode.REFUSED, options=self.EDE)
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
            self.refusal(message)
            got = dotproxy.build_short_answer(message, Rcode.NOERROR, flags=TC)
            self.assertLessEqual(len(got), len(message))

    def test_refusal_has_the_error_and_its_text_where_they_fit(self) -> None:
        for size, error in ((0, None), (2, b""), (50, self.EDE[0][6:])):
            padding = option(PADDING, bytes(size)) if size else b""
            got = self.refusal(query(do=True, options=padding))
            with self.subTest(size=size):
                assert got.opt is not None
                self.assertEqual(got.rcode, Rcode.REFUSED)
                found = [(code, octets[2:]) for code, octets in got.opt.options]
                self.assertEqual(found, [] if error is None else [(EDE, error)])

    def test_refusal_for_a_client_without_opt_has_none(self) -> None:
        got = self.refusal(query(id=7))

        self.assertEqual((got.id, got.rcode, got.opt), (7, Rcode.REFUSED, None))

    def test_refusal_of_what_cannot_be_parsed_is_a_header(self) -> None:
        got = self.refusal(b"\x12\x34" + bytes(10))

        self.assertEqual((got.id, got.rcode, len(got.raw)), (0x1234, 5, 12))

    def test_truncated_answer_has_the_question_alone(self) -> None:
        for do in (None, True):
            asked = query("wWw.example", id=9, do=do)
            got = parse(dotproxy.build_short_answer(asked, Rcode.NOERROR, flags=TC))
            with self.subTest(do=do):
                self.assertEqual((got.id, got.rcode, got.flags & TC), (9, 0, TC))
                self.assertEqual(got.question, parse(asked).question)
                self.assertEqual((got.answers, got.opt is None), ([], do is None))


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

    def ask(self, *messages: bytes, script: Reply = answer) -> list[Message]:
        """Return as many answers as there are messages."""
        with self.serve(script) as served, self.connect(served) as client:
            client.send(*messages)
            return [parse(client.receive()) for _ in messages]

    def test_name_that_exists_is_answered(self) -> None:
        (got,) = self.ask(query("www.example.com", id=0x4321))

        self.assertEqual((got.id, got.rcode, got.qname), (0x4321, 0, "www.example.com"))
        self.assertEqual(got.addresses, ["192.0.2.1"])

    def test_name_that_does_not_exist_is_nxdomain(self) -> None:
        def nxdomain(message: Message, _: FakeConnection) -> bytes:
            return response(message.raw, rcode=3, authority=[soa()])

        (got,) = self.ask(query(), script=nxdomain)

        self.assertEqual((got.rcode, got.answers), (Rcode.NXDOMAIN, []))
        self.assertEqual([each.type for each in got.authority], [6])

    def test_special_name_is_answered_and_never_sent_upstream(self) -> None:
        running = serving(answer, *self.options, host=self.host)
        with running as served, self.connect(served) as client:
            client.send(query("a.LocalHost", id=1), query("a.onion", id=2))
            answers = [parse(client.receive()) for _ in range(2)]
            sent = len(served.upstream.queries)

        by_id = {got.id: got for got in answers}
        self.assertEqual(by_id[1].addresses, ["127.0.0.1"])
        self.assertEqual(by_id[2].rcode, Rcode.NXDOMAIN)
        self.assertEqual(sent, 0)

    def test_question_comes_back_in_the_case_it_was_asked(self) -> None:
        asked = query("wWw.ExAmPlE.cOm")

        self.assertEqual(self.ask(asked)[0].question, parse(asked).question)

    def test_malformed_query_gets_formerr(self) -> None:
        messages = list(MALFORMED_QUERIES.values())

        answers = self.ask(*messages)

        self.assertEqual({got.rcode for got in answers}, {Rcode.FORMERR})
        self.assertEqual({got.id for got in answers}, {0x1234})

    def test_message_that_deserves_no_answer_gets_none(self) -> None:
        with self.serve() as served, self.connect(served) as client:
            client.send(response(query(id=1), "192.0.2.1"))
            self.send_short(client)
            ids = []
            for id in (2, 3):
                client.send(query(id=id))
                ids.append(parse(client.receive()).id)

        self.assertEqual(ids, [2, 3])

    def send_short(self, client: Client) -> None:
        """Send messages of fewer than 12 octets, where that leaves the client."""

    def test_message_that_is_no_plain_query_is_refused(self) -> None:
        ixfr = query(rrtype=251)[12:] + soa() + record(".", OPT, b"")
        for name, message, rcode in (
            ("opcode NOTIFY", query(opcode=4), Rcode.NOTIMP),
            ("EDNS version 1", query(do=False, edns_version=1), Rcode.BADVERS),
            ("AXFR", query(rrtype="AXFR"), Rcode.REFUSED),
            ("AXFR with EDNS", query(rrtype="AXFR", do=True), Rcode.REFUSED),
            ("AXFR, version 1", query("a", "AXFR", do=True, edns_version=1), 16),
            ("IXFR", query(rrtype=251), Rcode.REFUSED),
            ("IXFR with EDNS", counted(1, 0, 1, 1, body=ixfr), Rcode.REFUSED),
        ):
            with self.subTest(name):
                (got,) = self.ask(message)
                self.assertEqual(got.rcode, rcode)
                self.assertEqual(got.opt is None, parse(message).opt is None)

    def test_client_without_opt_gets_none(self) -> None:
        for do in (None, False, True):
            with self.subTest(do=do):
                (got,) = self.ask(query(do=do))
                self.assertEqual(got.opt is None, do is None)

    def test_equal_questions_in_flight_go_upstream_once(self) -> None:
        hold = Hold()
        with self.serve(hold) as served, contextlib.ExitStack() as stack:
            clients = [self.connect(served) for _ in range(3)]
            for number, client in enumerate(clients):
                stack.enter_context(client)
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

        self.assertEqual(sorted(got.id for got in answers), list(range(200)))
        for got in answers:
            self.assertEqual(got.addresses, [f"192.0.2.{got.id}"])


class UDPv4ContractTest(DNSServerContract, DotproxyTestCase):
    def connect(self, served: Served) -> Client:
        return UDPClient(served.address)

    def send_short(self, client: Client) -> None:
        client.send(*[query()[:size] for size in range(12)])


class UDPv6ContractTest(UDPv4ContractTest):
    host = LOCALHOST_V6


class TCPContractTest(DNSServerContract, DotproxyTestCase):
    def connect(self, served: Served) -> Client:
        return TCPClient(served.address)


class DoTContractTest(DNSServerContract, DotproxyTestCase):
    options = ENCRYPTED

    def connect(self, served: Served) -> Client:
        return TLSClient(served.tls_address)


class BatchTest(DotproxyTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.proxy, self.pool = mock.Mock(), mock.Mock()
        self.proxy.lookup_from.return_value = lambda asked, *_: dotproxy.parse_query(
            asked
        )

    def receive(self, misses: int, *ways: dotproxy.Way) -> None:
        """Have a server receive so many queries at once, none of them cached."""
        server = dotproxy.UDPServer(
            *((LOCALHOST, 0), self.proxy, self.pool),
            admission=dotproxy.Admission(),
            clock=Clock(),
        )
        self.addCleanup(server.server_close)
        batch = [(query(), (LOCALHOST, 5353))] * misses
        server.process_request((batch, list(ways)), ("", 0))

    def test_each_answer_goes_back_its_own_way(self) -> None:
        ways: list[dotproxy.Way] = [[(0, 8, b"one")], [], [(0, 8, b"two")]]
        with mock.patch.object(dotproxy.UDPServer, "reply") as reply:
            self.receive(3, *ways)
            ((finish,), _) = self.pool.submit.call_args
            for _, answer in finish.args[0]:
                answer(b"", (LOCALHOST, 5353))

        taken = [call.kwargs.get("way", []) for call in reply.call_args_list]
        self.assertEqual(taken, ways)

    def test_lone_query_is_resolved_by_the_thread_that_received_it(self) -> None:
        self.receive(1)

        self.assertEqual(len(self.proxy.resolve.call_args.args[0]), 1)
        self.pool.submit.assert_not_called()

    def test_several_queries_are_left_to_a_worker(self) -> None:
        self.receive(2)

        self.proxy.resolve.assert_not_called()
        self.pool.submit.call_args.args[0]()
        self.assertEqual(len(self.proxy.resolve.call_args.args[0]), 2)

    def test_what_no_worker_can_take_is_counted_as_turned_away(self) -> None:
        self.pool.submit.return_value = False

        self.receive(3)

        turned_away = self.proxy.metrics.turned_away
        turned_away.assert_called_once_with("backlog", 3)


class UDPServerTest(DotproxyTestCase):
    def test_answer_that_does_not_fit_its_question_is_asked_for_a_few_times(
        self,
    ) -> None:
        with serving(other_case) as served, UDPClient(served.address) as client:
            client.send(query("Poison.example", do=True))
            got = parse(client.receive())

        self.assertEqual(got.rcode, 2)
        self.assertIn(b"no response to the question", got.raw)
        self.assertLess(served.upstream.connections, 10)

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
    def test_wildcard_socket_answers_from_the_address_asked(self) -> None:
        with serving(host="[0.0.0.0]:0") as served:
            for host in ("127.0.0.1", "127.0.0.2", "127.1.2.3"):
                with self.subTest(host), UDPClient((host, served.address[1])) as client:
                    client.send(query())
                    self.assertEqual(parse(client.receive()).rcode, 0)

    def test_wildcard_socket_of_ipv6_answers_and_leaves_ipv4_free(self) -> None:
        with serving(host="[::]:0") as served:
            port = served.address[1]
            with UDPClient((LOCALHOST_V6, port)) as client:
                client.send(query())
                self.assertEqual(parse(client.receive()).rcode, 0)
            for server in served.daemon.servers:
                v6_only = socket.IPPROTO_IPV6, socket.IPV6_V6ONLY
                self.assertEqual(server.socket.getsockopt(*v6_only), 1)

    def test_burst_of_2000_queries_is_answered_to_the_last(self) -> None:
        with serving(answer, "--timeout=60") as served, contextlib.ExitStack() as stack:
            served.upstream.wait_for(lambda u: u.handshakes == 1)
            clients = [
                stack.enter_context(UDPClient(served.address, 30)) for _ in range(20)
            ]
            for number in range(100):
                for index, client in enumerate(clients):
                    client.send(query(f"{number}-{index}.example", id=number))
            for client in clients:
                ids = sorted(parse(client.receive()).id for _ in range(100))
                self.assertEqual(ids, list(range(100)))

    def test_answer_too_large_is_truncated(self) -> None:
        def large(message: Message, _: FakeConnection) -> bytes:
            return response(message.raw, record("a", "TXT", bytes(2000)))

        with serving(large) as served, UDPClient(served.address) as client:
            client.send(query(do=True, size=4096))
            got = parse(client.receive())

        self.assertEqual((got.flags & TC, got.answers), (TC, []))

    def ask(self, message: bytes, *options: str, script: Reply = answer) -> Message:
        """Ask a proxy with these options."""
        with serving(script, *options) as served, UDPClient(served.address) as client:
            client.send(message)
            return parse(client.receive())

    def test_special_name_is_sent_upstream_where_that_is_told(self) -> None:
        answer = self.ask(query("a.local"), "--forward-special=local")

        self.assertEqual(answer.addresses, ["192.0.2.1"])

    def test_routed_domain_is_neither_answered_here_nor_blocked(self) -> None:
        with FakeUpstream(lambda *_: "10.0.0.1") as upstream:
            where = f"{LOCALHOST}:{upstream.port}#dot.test"
            options = f"--route=corp.local={where}", "--block-private-answers"
            for name in ("a.corp.local", "corp.local"):
                with self.subTest(name):
                    answer = self.ask(query(name), *options)
                    self.assertEqual(answer.addresses, ["10.0.0.1"])
            self.assertEqual(self.ask(query("a.local"), *options).rcode, 3)

    def test_private_address_is_blocked_where_that_is_told(self) -> None:
        flag, exempt = "--block-private-answers", "--allow-private=com"
        for options, addresses in (
            ([], ["10.0.0.1"]),
            ([flag], []),
            ([flag, exempt], ["10.0.0.1"]),
        ):
            with self.subTest(options=options):
                answer = self.ask(query(), *options, script=lambda *_: "10.0.0.1")
                self.assertEqual(answer.addresses, addresses)

    def test_answer_never_exceeds_1232_octets(self) -> None:
        def sized(message: Message, _: FakeConnection) -> bytes:
            number = int(message.qname.split(".")[0])
            return response(message.raw, record(b"\xc0\x0c", "TXT", bytes(number)))

        sizes = [*range(1100, 1240, 5), 2000, 9000]
        with serving(sized) as served, UDPClient(served.address) as client:
            client.send(*[query(f"{n}.example", do=True, size=65535) for n in sizes])
            answers = [parse(client.receive()) for _ in sizes]

        self.assertLessEqual(max(len(got.raw) for got in answers), 1232)
        self.assertEqual({bool(got.flags & TC) for got in answers}, {False, True})

    def test_datagram_larger_than_any_query_is_a_format_error(self) -> None:
        with serving() as served, UDPClient(served.address) as client:
            client.send(query() + bytes(30000))

            self.assertEqual(parse(client.receive()).rcode, Rcode.FORMERR)


class TurningAwayTest(DotproxyTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.proxy = mock.Mock()
        self.proxy.lookup_from.return_value = self.lookup = mock.Mock()
        self.lookup.return_value = b"answer"
        self.sent: list[bytes] = []

    def ask(self, admission: dotproxy.Admission, host: str, count: int = 1) -> None:
        """Hand the server so many queries from a client, in one batch."""
        server = dotproxy.UDPServer(
            (LOCALHOST, 0), self.proxy, mock.Mock(), admission=admission, clock=Clock()
        )
        self.addCleanup(server.server_close)
        batch: list[dotproxy.Datagram] = [(query(do=True), (host, 1))] * count
        reply = mock.patch.object(server, "reply", lambda *a: self.sent.append(a[0]))
        with reply:
            server.process_request((batch, []), ("", 0))

    def test_stranger_is_refused_20_times_then_ignored(self) -> None:
        self.ask(dotproxy.Admission(), STRANGER, 30)

        self.assertEqual([parse(got).rcode for got in self.sent], [Rcode.REFUSED] * 20)
        self.lookup.assert_not_called()

    def test_local_client_among_strangers_is_answered(self) -> None:
        self.ask(dotproxy.Admission(), "10.0.0.1", 3)

        self.assertEqual(self.sent, [b"answer"] * 3)

    def test_client_over_its_rate_is_sent_to_tcp_every_second_time(self) -> None:
        self.ask(dotproxy.Admission(EVERYWHERE, rate=2), STRANGER, 8)

        self.assertEqual(self.sent[:4], [b"answer"] * 4)
        flags = [(parse(got).rcode, parse(got).flags & TC) for got in self.sent[4:]]
        self.assertEqual(flags, [(0, TC)] * 2)

    def test_stranger_is_refused_over_udp_and_closed_over_tcp(self) -> None:
        with serving(answer, "--allow=192.0.2.0/24") as served:
            with UDPClient(served.address) as udp, TCPClient(served.address) as tcp:
                udp.send(query(do=True, options=option(PADDING, bytes(99))))
                got = parse(udp.receive())
                self.assertEqual(got.rcode, Rcode.REFUSED)
                self.assertEqual(extended_errors(got), [18])
                self.assertRaises((EOFError, ConnectionError), tcp.receive)
            names = [thread.name for thread in threading.enumerate()]

        self.assertFalse([name for name in names if name.startswith("stream")])

    def exceed(self, client: TCPClient, excess: int = 2) -> float:
        """Have more queries answered than may come at once; return the time before.

        At 20 queries/s, 40 at once, the next is read when half a token is there: with
        an excess of 2 after 0.125 s.
        """
        started = time.monotonic()
        client.send(*[query(id=n) for n in range(40 + excess)])
        ids = {parse(client.receive()).id for _ in range(40 + excess)}
        self.assertEqual(ids, set(range(40 + excess)))
        return started

    def test_slowed_stream_does_not_spin(self) -> None:
        options = "--rate-limit=20", "--rate-limit-all"
        with serving(answer, *options) as served:
            clock = served.tcp.clock = mock.Mock(wraps=time.monotonic)
            with TCPClient(served.address) as client:
                self.exceed(client, excess=1)
                before = clock.call_count
                client.send(*[query(id=n) for n in range(5)])
                for _ in range(5):
                    client.receive()

        self.assertLess(clock.call_count - before, 200)

    def test_stream_over_its_rate_is_read_later(self) -> None:
        options = "--rate-limit=20", "--rate-limit-all"
        with serving(answer, *options) as served, TCPClient(served.address) as client:
            started = self.exceed(client)
            client.send(query(id=42))
            self.assertEqual(parse(client.receive()).id, 42)
            took = time.monotonic() - started

        self.assertGreater(took, 0.124)

    def test_half_closed_stream_over_its_rate_gets_its_answers(self) -> None:
        options = "--rate-limit=20", "--rate-limit-all"
        with serving(answer, *options) as served, TCPClient(served.address) as client:
            client.send(*[query(id=n) for n in range(43)])
            client.half_close()
            ids = {parse(client.receive()).id for _ in range(43)}

        self.assertEqual(ids, set(range(43)))

    def test_queries_read_are_served_before_more_is_read(self) -> None:
        one = mock.patch.object(dotproxy.Admission, "pace", lambda *a: (a[2] > 0, 0.0))
        with one, serving() as served, TCPClient(served.address) as client:
            client.send(*[query(id=n) for n in range(9)])
            ids = {parse(client.receive()).id for _ in range(9)}

        self.assertEqual(ids, set(range(9)))

    def test_new_stream_of_a_client_over_its_rate_waits_as_well(self) -> None:
        options = "--rate-limit=20", "--rate-limit-all"
        with serving(answer, *options) as served:
            with TCPClient(served.address) as client:
                started = self.exceed(client)
            with TCPClient(served.address) as client:
                client.send(query())
                client.receive()
            took = time.monotonic() - started

        self.assertGreater(took, 0.124)

    def test_stream_is_not_idle_while_it_is_slowed(self) -> None:
        options = "--rate-limit=20", "--rate-limit-all"
        with serving(answer, *options) as served:
            served.tcp.idle_timeout = 0.4
            with TCPClient(served.address) as client:
                started = self.exceed(client, excess=16)
                self.assertRaises((EOFError, ConnectionError), client.receive)
                took = time.monotonic() - started

        self.assertGreater(took, 16.5 / 20 + 0.4 - 0.001)

    def test_slowed_stream_does_not_hold_up_the_end(self) -> None:
        options = "--rate-limit=1", "--rate-limit-all"
        with serving(answer, *options) as served, TCPClient(served.address) as client:
            client.send(*[query(id=n) for n in range(99)])
            self.assertEqual([parse(client.receive()).id for _ in range(2)], [0, 1])
            started = time.monotonic()

        self.assertLess(time.monotonic() - started, 10.0)

    def test_networks_with_much_of_the_internet_are_warned_of_once(self) -> None:
        for text, told in (
            *(("0.0.0.0/0", True), ("::/0", True), ("128.0.0.0/1", True)),
            *(("2000::/3", True), ("8.0.0.0/7", True), ("10.0.0.0/7", True)),
            *(("8.0.0.0/8", False), ("fc00::/7", False), ("fd00::/8", False)),
            *(("192.0.2.0/24", False), ("2001:db8::/32", False)),
        ):
            with (
                self.subTest(text),
                mock.patch.object(dotproxy.logger, "warning") as warning,
            ):
                dotproxy.warn_of_strangers(configured("--allow", text))
                self.assertEqual(warning.call_count, told)


class ClientsTest(DotproxyTestCase):
    def handler(self, host: str, active_at: float, in_flight: int = 0) -> mock.Mock:
        """Return a client as far as its place among others goes."""
        address = (host, 1)
        return mock.Mock(
            client_address=address, active_at=active_at, in_flight=in_flight
        )

    def test_clients_that_wait_for_a_thread_count(self) -> None:
        clients = dotproxy.Clients(3, 2)

        accepted = [clients.accept(host) for host in ("a", "a", "a", "b", "c")]
        self.assertEqual(accepted, [True, True, False, True, False])
        clients.release("a")
        self.assertTrue(clients.accept("c"))

    def test_longest_idle_client_of_the_address_or_of_all_makes_room(self) -> None:
        for host, victim in (("a", 1), ("b", 2), ("c", 2)):
            clients = dotproxy.Clients(4, 3)
            handlers = [
                self.handler("a", 1.0, in_flight=1),
                *(self.handler("a", 3.0), self.handler("b", 2.0)),
                self.handler("a", 4.0),
            ]
            for handler in handlers:
                clients.accept(handler.client_address[0])
                clients.enter(handler)
            with self.subTest(host):
                self.assertTrue(clients.accept(host))
                dropped = [h.drop.called for h in handlers]
                self.assertEqual(dropped, [index == victim for index in range(4)])

    def test_client_that_no_thread_can_serve_is_closed_and_not_counted(self) -> None:
        clients, pool = dotproxy.Clients(9, 1), dotproxy.WorkerPool("stream", 1, 0)
        server = dotproxy.TCPServer(
            (LOCALHOST, 0), mock.Mock(), pool, clients, admission=dotproxy.Admission()
        )
        self.addCleanup(server.server_close)
        near, far = socket.socketpair()
        with near, far:
            server.process_request(near, ("192.0.2.1", 1))
            self.assertEqual(far.recv(1), b"")

        self.assertTrue(clients.accept("192.0.2.1"))

    def test_client_that_comes_when_all_are_ended_is_ended_too(self) -> None:
        clients, late = dotproxy.Clients(9, 9), self.handler("a", 1.0)
        clients.drop_all()

        clients.enter(late)

        late.drop.assert_called_once_with()

    def test_addresses_without_clients_are_forgotten(self) -> None:
        clients = dotproxy.Clients(2, 1)
        for number in range(9):
            clients.accept(f"192.0.2.{number}")
            clients.release(f"192.0.2.{number}")

        self.assertEqual(clients._accepted, {})

    def test_client_that_is_gone_is_counted_no_more(self) -> None:
        with serving(answer, "--max-tcp-per-client=1") as served:
            with TCPClient(served.address) as client:
                client.send(query())
                client.receive()
            wait_until(lambda: served.tcp.clients.accept(LOCALHOST))


def slow_name(hold: Hold) -> Script:
    """Hold the answers to slow.example, and give all others at once."""
    return by_name({"slow.example": hold})


class TCPServerTest(DotproxyTestCase):
    def assert_served(self, client: TCPClient, name: str = "www.example.com") -> None:
        client.send(query(name))
        self.assertEqual(parse(client.receive()).qname, name)

    def assert_closed(self, client: TCPClient) -> None:
        with self.assertRaises((EOFError, ConnectionResetError)):
            client.receive()

    def test_message_split_anywhere_is_answered(self) -> None:
        message = frame(query())
        with serving() as served, TCPClient(served.address, 20) as client:
            for cut in range(1, len(message)):
                with self.subTest(cut=cut):
                    client.send_raw(message[:cut])
                    client.send_raw(message[cut:])
                    self.assertEqual(parse(client.receive()).rcode, 0)

    def test_message_octet_by_octet_is_answered(self) -> None:
        with serving() as served, TCPClient(served.address) as client:
            for octet in frame(query()):
                client.send_raw(bytes([octet]))

            self.assertEqual(parse(client.receive()).rcode, 0)

    def test_many_messages_in_one_segment_are_answered(self) -> None:
        with serving() as served, TCPClient(served.address, 10) as client:
            client.send(*[query(f"{n}.example", id=n) for n in range(500)])
            ids = sorted(parse(client.receive()).id for _ in range(500))

        self.assertEqual(ids, list(range(500)))

    def test_slow_answer_does_not_hold_back_the_next(self) -> None:
        hold = Hold()
        with serving(slow_name(hold)) as served, TCPClient(served.address) as client:
            client.send(query("slow.example", id=1), query("fast.example", id=2))
            first = parse(client.receive()).id
            hold.release()
            second = parse(client.receive()).id

        self.assertEqual([first, second], [2, 1])

    def test_half_closed_client_still_gets_its_answers(self) -> None:
        hold = Hold()
        with serving(hold) as served, TCPClient(served.address) as client:
            client.send(query("a.example", id=1), query("b.example", id=2))
            client.half_close()
            hold.release(2)
            ids = {parse(client.receive()).id for _ in range(2)}
            self.assert_closed(client)

        self.assertEqual(ids, {1, 2})

    def test_end_of_the_last_answer_reaches_a_half_closed_client(self) -> None:
        left = threading.Event()
        finish = dotproxy.StreamHandler.finish

        def leave(handler: dotproxy.StreamHandler) -> None:
            left.set()
            finish(handler)

        def hesitate(_: object, octets: bytes) -> bytes:
            if octets:
                client.half_close()
                left.wait(0.1)  # for the reading thread to find that all is done
            return octets

        def large(message: Message, _: FakeConnection) -> bytes:
            return response(message.raw, record(b"\xc0\x0c", "TXT", bytes(60_000)))

        racing = mock.patch.multiple(
            dotproxy.StreamHandler, finish=leave, seal=hesitate
        )
        with serving(large) as served, racing:
            served.tcp.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
            with TCPClient(served.address) as client:
                client.send(query())
                self.assertGreater(len(client.receive()), 60_000)

    def test_answers_beyond_what_the_client_may_leave_unread_all_come(self) -> None:
        def large(message: Message, _: FakeConnection) -> bytes:
            return response(message.raw, record(b"\xc0\x0c", "TXT", bytes(4000)))

        with serving(large) as served:
            served.tcp.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
            with TCPClient(served.address, 20) as client:
                self.assert_served(client)
                client.send(*[query(id=n) for n in range(400)])
                ids = [parse(client.receive()).id for _ in range(400)]

        self.assertEqual(ids, list(range(400)))

    def test_client_gone_with_a_query_in_flight_harms_nobody(self) -> None:
        hold = Hold()
        with serving(slow_name(hold)) as served, TCPClient(served.address) as client:
            with TCPClient(served.address) as fleeting:
                fleeting.send(query("slow.example"))
                served.wait_for_in_flight(1)
            hold.release()
            self.assert_served(client)

    def test_idle_client_is_closed(self) -> None:
        with serving() as served:
            served.tcp.idle_timeout = 0.05
            with TCPClient(served.address) as client:
                self.assert_closed(client)

    def test_whole_message_resets_the_idle_time(self) -> None:
        with serving() as served:
            clock = served.tcp.clock = Clock()
            with TCPClient(served.address) as client:
                for _ in range(3):
                    self.assert_served(client)
                    clock.advance(9)
                self.assert_served(client)

    def test_part_of_a_message_does_not_reset_the_idle_time(self) -> None:
        with serving() as served:
            clock = served.tcp.clock = Clock()
            with TCPClient(served.address) as client:
                self.assert_served(client)
                clock.advance(9)
                client.send_raw(b"\0")
                clock.advance(2)
                client.send_raw(b"\x20")
                self.assert_closed(client)

    def test_client_that_waits_for_an_answer_is_not_idle(self) -> None:
        hold = Hold()
        with serving(slow_name(hold)) as served:
            clock = served.tcp.clock = Clock()
            with TCPClient(served.address) as client:
                client.send(query("slow.example"))
                served.wait_for_in_flight(1)
                clock.advance(11)
                client.send(query("fast.example"))
                self.assertEqual(parse(client.receive()).qname, "fast.example")
                hold.release()
                self.assertEqual(parse(client.receive()).qname, "slow.example")

    def test_client_too_many_takes_the_place_of_the_longest_idle(self) -> None:
        with serving(answer, "--max-tcp-clients=2") as served:
            first, second = self.client(served), self.client(served)
            self.assert_served(first)
            third = self.client(served)

            self.assert_closed(second)
            self.assert_served(first)
            self.assert_served(third)

    def test_client_with_a_query_in_flight_keeps_its_place(self) -> None:
        hold = Hold()
        with serving(slow_name(hold), "--max-tcp-clients=2") as served:
            busy = self.client(served)
            busy.send(query("slow.example"))
            served.wait_for_in_flight(1)
            idle = self.client(served)
            third = self.client(served)

            self.assert_closed(idle)
            self.assert_served(third)
            hold.release()
            self.assertEqual(parse(busy.receive()).qname, "slow.example")

    def test_lack_of_descriptors_pauses_and_is_logged_once(self) -> None:
        full = OSError(errno.EMFILE, "Too many open files")
        accept = mock.patch.object(dotproxy, "accept", side_effect=full)
        with (
            serving() as served,
            accept,
            mock.patch.object(time, "sleep") as pause,
            self.assertLogs(dotproxy.logger, "WARNING") as logged,
        ):
            for _ in range(3):
                self.assertRaises(OSError, served.tcp.get_request)

        self.assertEqual(pause.call_args_list, [mock.call(served.tcp.PAUSE)] * 3)
        self.assertEqual(len(logged.output), 1)

    def test_client_that_was_reset_before_it_was_accepted_is_dropped(self) -> None:
        listener, request = mock.Mock(), mock.Mock()
        listener.accept.return_value = request, None  # as macOS has it

        self.assertRaises(ConnectionAbortedError, dotproxy.accept, listener)

        request.close.assert_called_once_with()

    def test_admin_server_pauses_as_well(self) -> None:
        full = OSError(errno.EMFILE, "Too many open files")
        server = dotproxy.AdminServer((LOCALHOST, 0), {})
        self.addCleanup(server.server_close)
        accept = mock.patch.object(dotproxy, "accept", side_effect=full)
        with accept, mock.patch.object(time, "sleep") as pause:
            self.assertRaises(OSError, server.get_request)

        pause.assert_called_once_with(dotproxy.TCPServer.PAUSE)

    @unittest.skipUnless(sys.platform == "linux", "needs all of 127.0.0.0/8")
    def test_bound_per_address_spares_the_other_addresses(self) -> None:
        with serving(answer, "--max-tcp-per-client=1") as served:
            other = self.client(served, source="127.0.0.2")
            first = self.client(served)
            second = self.client(served)

            self.assert_closed(first)
            self.assert_served(other)
            self.assert_served(second)

    def client(self, served: Served, source: str = "") -> TCPClient:
        """Return a client that the server has answered once; closed after the test."""
        client = TCPClient(served.address, source=source)
        self.addCleanup(client.socket.close)
        self.assert_served(client)
        return client

    def test_client_that_never_reads_is_dropped_while_another_is_served(self) -> None:
        def large(message: Message, _: FakeConnection) -> bytes:
            return response(message.raw, record("a", "TXT", bytes(60000)))

        def dropped() -> bool:
            with contextlib.suppress(BlockingIOError):
                try:
                    deaf.socket.send(frame(query()), socket.MSG_DONTWAIT)
                except ConnectionError:
                    return True
            return False

        self.enter(mock.patch.object(dotproxy.StreamHandler, "STALL", 0.1))
        with serving(by_name({"large.example": large})) as served:
            deaf, other = self.client(served), self.client(served)
            deaf.send(*[query("large.example", id=n) for n in range(200)])
            self.assert_served(other)
            wait_until(dropped)
            self.assert_served(other)

    def enter(self, patch: mock._patch[float]) -> None:
        patch.start()
        self.addCleanup(patch.stop)

    def test_length_below_a_header_closes(self) -> None:
        for length in (0, 1, 11):
            with self.subTest(length=length), serving() as served:
                client = self.client(served)
                client.send(bytes(length), query())
                self.assert_closed(client)

    def test_query_too_large_to_send_on_harms_no_other(self) -> None:
        room = 65535 - len(query(do=True, options=option(UNKNOWN_OPTION)))
        for size in (room, room - 100):
            large = query(do=True, options=option(UNKNOWN_OPTION, bytes(size)))
            with self.subTest(size=size), serving() as served:
                self.check_harmless(served, large)

    def check_harmless(self, served: Served, message: bytes) -> None:
        """Check that one client is answered or closed, and that others are served."""
        with TCPClient(served.address) as client:
            client.send(message)
            with contextlib.suppress(EOFError, ConnectionError):
                client.receive()
        with TCPClient(served.address) as client:
            self.assert_served(client)
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

    def hello(self) -> None:
        """Send the first message."""
        self._step()

    def begin(self) -> None:
        """Say hello and wait for the server's part; the client's end is left out."""
        self.hello()
        self._incoming.write(self.socket.recv(65536))

    def finish_with(self, octets: bytes) -> None:
        """Shake hands; the last flight is sent with these octets behind it."""
        self.begin()
        while not self._step(octets):
            self._incoming.write(self.socket.recv(65536))

    def send(self, octets: bytes) -> None:
        """Send as much of these octets as there is room for."""
        self._tls.write(octets)
        with contextlib.suppress(BlockingIOError):
            self.socket.send(self._outgoing.read(), socket.MSG_DONTWAIT)

    def receive(self) -> bytes:
        """Return what comes next."""
        while True:
            try:
                return self._tls.read(65536)
            except ssl.SSLWantReadError:
                self._incoming.write(self.socket.recv(65536))

    def _step(self, octets: bytes = b"") -> bool:
        done = False
        with contextlib.suppress(ssl.SSLWantReadError):
            self._tls.do_handshake()
            self._tls.write(octets)
            done = True
        self.socket.sendall(self._outgoing.read())
        return done


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
        for name, other in (
            ("TCPClient", TLSClient),
            ("serving", self.serving_over_tls),
        ):
            patch = mock.patch.object(here, name, other)
            patch.start()
            self.addCleanup(patch.stop)

    @contextlib.contextmanager
    def serving_over_tls(
        self, script: Reply = answer, *options: str
    ) -> Iterator[Served]:
        with self.serving(script, *ENCRYPTED, *options) as served:
            yield ServedOverTLS(*served)

    def test_client_that_never_reads_is_dropped_while_another_is_served(self) -> None:
        def large(message: Message, _: FakeConnection) -> bytes:
            return response(message.raw, record("a", "TXT", bytes(60000)))

        def dropped() -> bool:
            try:
                deaf.send(frame(query()))
            except ConnectionError:
                return True
            return False

        with (
            mock.patch.object(dotproxy.StreamHandler, "STALL", 0.1),
            serving(by_name({"large.example": large})) as served,
            Handshake(served.address) as deaf,
            TLSClient(served.address) as other,
        ):
            names = [query("large.example", id=n) for n in range(200)]
            deaf.finish_with(frame(*names))
            self.assert_served(other)
            wait_until(dropped)
            self.assert_served(other)


class TLSServerTest(DotproxyTestCase):
    PADDED = PaddingTest.PADDED

    def serve(
        self, script: Reply = answer, *options: str
    ) -> contextlib.AbstractContextManager[Served]:
        return serving(script, *ENCRYPTED, *options)

    def ask(self, client: Client, *messages: bytes) -> list[Message]:
        client.send(*messages)
        return [parse(client.receive()) for _ in messages]

    def assert_served(self, client: Client, name: str = "www.example.com") -> None:
        (got,) = self.ask(client, query(name))
        self.assertEqual((got.rcode, got.qname), (0, name))

    def assert_orderly_end(self, client: TLSClient) -> None:
        """Check that close_notify comes before the end of the stream."""
        client.socket.settimeout(5)
        self.assertEqual(client.socket.recv(1), b"")

    def test_answer_is_padded_on_request_whether_cached_or_not(self) -> None:
        with self.serve() as served, TLSClient(served.tls_address) as client:
            for _ in range(2):
                (got,) = self.ask(client, self.PADDED)
                self.assertEqual(len(got.raw), 468)
            (got,) = self.ask(client, query(do=False))

        self.assertLess(len(got.raw), 100)
        self.assertEqual(len(served.upstream.queries), 1)

    def test_answer_in_clear_text_is_never_padded(self) -> None:
        with self.serve() as served:
            for kind in (TCPClient, UDPClient):
                with kind(served.address) as client:
                    for _ in range(2):
                        (got,) = self.ask(client, self.PADDED)
                        self.assertLess(len(got.raw), 100)

    def test_one_question_in_flight_is_padded_for_whom_asked_so(self) -> None:
        hold = Hold()
        with self.serve(hold) as served, contextlib.ExitStack() as stack:
            clients = [
                stack.enter_context(client)
                for client in (TLSClient(served.tls_address), TCPClient(served.address))
            ]
            for client in clients:
                client.send(self.PADDED)
            served.wait_for_in_flight(2)
            hold.release()
            sizes = [len(client.receive()) for client in clients]

        self.assertEqual((sizes[0], sizes[1] < 100), (468, True))

    def test_error_of_our_own_is_padded_on_request(self) -> None:
        def refused(message: Message, _: FakeConnection) -> bytes:
            return response(message.raw, rcode=5)

        with self.serve(refused) as served, TLSClient(served.tls_address) as client:
            (got,) = self.ask(client, self.PADDED)

        self.assertEqual((got.rcode, len(got.raw)), (5, 468))

    def test_idle_timeout_is_told_as_over_tcp(self) -> None:
        asked = query(do=False, options=option(KEEPALIVE))
        with self.serve() as served, TLSClient(served.tls_address) as client:
            (got,) = self.ask(client, asked)

        assert got.opt is not None
        self.assertEqual(got.opt.options, [(KEEPALIVE, b"\0\x64")])

    def test_large_answer_is_whole(self) -> None:
        def large(message: Message, _: FakeConnection) -> bytes:
            return response(message.raw, record("a", "TXT", bytes(60000)))

        with self.serve(large) as served, TLSClient(served.tls_address) as client:
            (got,) = self.ask(client, self.PADDED)

        self.assertEqual((len(got.raw) % 468, len(got.answers[0].rdata)), (0, 60000))

    def test_alpn_dot_is_selected_and_its_absence_is_served(self) -> None:
        with self.serve() as served:
            for offered, selected in (
                (["dot"], "dot"),
                (["h2", "dot"], "dot"),
                ([], None),
                (["h2", "http/1.1"], None),  # Python cannot refuse it
            ):
                context = trusting(offered)
                with self.subTest(offered=offered):
                    client = TLSClient(served.tls_address, context=context)
                    with client:
                        self.assertEqual(client.tls.selected_alpn_protocol(), selected)
                        self.assert_served(client)

    def test_both_versions_are_served_and_resume_a_session(self) -> None:
        with self.serve() as served:
            for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
                context = trusting()
                context.minimum_version = context.maximum_version = version
                client = TLSClient(served.tls_address, context=context)
                with self.subTest(version=version), client:
                    self.assert_served(client)
                    with client.again() as other:
                        self.assertTrue(other.tls.session_reused)
                        self.assert_served(other)

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

    def test_query_that_comes_with_the_handshake_is_answered(self) -> None:
        with self.serve() as served, Handshake(served.tls_address) as client:
            client.finish_with(frame(query()))

            self.assertEqual(parse(client.receive()[2:]).rcode, 0)

    def test_half_of_a_query_that_comes_with_the_handshake_is_kept(self) -> None:
        octets = frame(query())
        with self.serve() as served, Handshake(served.tls_address) as client:
            client.finish_with(octets[:9])
            client.send(octets[9:])

            self.assertEqual(parse(client.receive()[2:]).rcode, 0)

    def test_handshake_that_does_not_end_is_cut_off(self) -> None:
        patience = mock.patch.object(dotproxy.TLSHandler, "HANDSHAKE", 0.05)
        with patience, self.serve() as served:
            for octets in (b"", bytes.fromhex("1603010200010001fc0303")):
                client = socket.create_connection(served.tls_address, 5)
                with self.subTest(octets=octets), client:
                    client.sendall(octets)
                    self.assertEqual(client.recv(1), b"")

    def test_garbage_for_a_hello_ends_it_and_harms_nobody(self) -> None:
        with self.serve() as served, TLSClient(served.tls_address) as client:
            for octets in (frame(query()), b"GET / HTTP/1.1\r\n\r\n", bytes(3000)):
                stranger = socket.create_connection(served.tls_address, 5)
                with self.subTest(octets=octets[:20]), stranger:
                    stranger.sendall(octets)
                    with contextlib.suppress(ConnectionResetError):
                        while stranger.recv(4096):
                            pass
                    self.assert_served(client)
            served.wait_for_in_flight(0)

    def test_broken_record_ends_it_at_once_with_an_alert(self) -> None:
        hold = Hold()
        with self.serve(hold) as served, TLSClient(served.tls_address) as client:
            client.send(query())
            served.wait_for_in_flight(1)
            os.write(client.socket.fileno(), b"\x17\x03\x03\0\x20" + bytes(32))
            with self.assertRaises(ssl.SSLError) as caught:
                client.receive()
            hold.release()
            served.wait_for_in_flight(0)

        self.assertIn("BAD_RECORD_MAC", caught.exception.reason)

    def test_nonsense_that_comes_with_the_handshake_ends_it(self) -> None:
        with self.serve() as served, Handshake(served.tls_address) as client:
            client.finish_with(frame(b"too short"))

            self.assertEqual(client.receive(), b"")

    def test_handshakes_wait_for_their_turn_and_clients_do_not(self) -> None:
        with (
            self.serve() as served,
            TLSClient(served.tls_address) as client,
            Handshake(served.tls_address) as other,
        ):
            self.assert_served(client)
            with served.tls.turns:
                other.hello()
                other.socket.settimeout(0.05)
                self.assertRaises(socket.timeout, other.socket.recv, 1)
                self.assert_served(client)
            other.socket.settimeout(5)
            other.finish_with(frame(query()))
            self.assertEqual(parse(other.receive()[2:]).rcode, 0)

    def test_unfinished_handshake_makes_room_before_any_client(self) -> None:
        with (
            self.serve(answer, "--max-tcp-clients=2") as served,
            TLSClient(served.tls_address) as client,
            Handshake(served.tls_address) as unfinished,
        ):
            self.assert_served(client)
            unfinished.begin()
            with TLSClient(served.tls_address) as other:
                self.assertEqual(unfinished.socket.recv(1), b"")
                self.assert_served(client)
                self.assert_served(other)

    def test_client_counts_beside_those_over_tcp(self) -> None:
        with (
            self.serve(answer, "--max-tcp-clients=1") as served,
            TCPClient(served.address) as first,
        ):
            self.assert_served(first)
            with TLSClient(served.tls_address) as second:
                self.assertRaises(EOFError, first.receive)
                self.assert_served(second)

    def test_end_is_told_to_an_idle_client(self) -> None:
        with self.serve() as served:
            served.tls.idle_timeout = 0.3
            with TLSClient(served.tls_address) as client:
                self.assert_orderly_end(client)

    def test_end_is_told_to_a_client_that_makes_room(self) -> None:
        with (
            self.serve(answer, "--max-tcp-clients=1") as served,
            TLSClient(served.tls_address) as client,
        ):
            self.assert_served(client)
            with TLSClient(served.tls_address):
                self.assert_orderly_end(client)

    def test_end_of_the_proxy_is_told(self) -> None:
        with contextlib.ExitStack() as stack:
            with self.serve() as served:
                client = stack.enter_context(TLSClient(served.tls_address))
                self.assert_served(client)

            self.assert_orderly_end(client)

    def test_session_of_the_old_certificate_is_not_resumed(self) -> None:
        with self.serve() as served, TLSClient(served.tls_address) as client:
            self.assert_served(client)
            served.tls.identity.reload()
            with client.again() as other:
                self.assertFalse(other.tls.session_reused)
                self.assert_served(other)
            self.assert_served(client)


def rotate(path: str, source: str) -> None:
    """Replace what is in one file by what is in another."""
    with open(source, "rb") as new, open(path, "wb") as file:
        file.write(new.read())


class IdentityTest(DotproxyTestCase):
    def refusal(self, chain: str, key: str | None = None) -> str:
        with self.assertRaises(dotproxy.ConfigError) as caught:
            dotproxy.Identity(chain, key)
        self.assertNotIn("\n", str(caught.exception))
        return str(caught.exception)

    def test_key_is_in_the_file_of_the_chain_or_in_its_own(self) -> None:
        for chain, key in ((PKI.good, None), (PKI.good_alone, PKI.key_alone)):
            with self.subTest(key=key), self.assertLogs(dotproxy.logger) as logged:
                dotproxy.Identity(chain, key)
                self.assertIn("names=dot.test,127.0.0.1", logged.output[0])
                self.assertIn("until=Jan  1 00:00:00 2100 GMT", logged.output[0])

    def test_pair_that_cannot_be_used_is_one_line_that_says_why(self) -> None:
        absent = os.path.join(os.path.dirname(PKI.ca), "absent.pem")
        for chain, key, words in (
            (absent, None, [absent, "No such file", "--tls-cert"]),
            (PKI.good, absent, [absent, "No such file", "--tls-key"]),
            (os.path.dirname(absent), None, ["directory", "--tls-cert"]),
            (dotproxy.__file__, None, ["dotproxy.py"]),
            (PKI.key_alone, PKI.key_alone, ["no certificate", PKI.key_alone]),
            (PKI.good_alone, None, ["no private key", PKI.good_alone, "--tls-key"]),
            (PKI.good, PKI.key2_alone, ["is not that of", PKI.key2_alone]),
            (PKI.good_alone, PKI.locked_key, ["passphrase", PKI.locked_key]),
        ):
            with self.subTest(chain=chain, key=key):
                text = self.refusal(chain, key)
                for word in words:
                    self.assertIn(word, text)

    def test_expired_certificate_is_a_warning(self) -> None:
        with self.assertLogs(dotproxy.logger, "WARNING") as logged:
            dotproxy.Identity(PKI.expired)

        self.assertEqual(len(logged.output), 1)
        self.assertIn("certificate has expired", logged.output[0])

    def test_file_that_the_user_may_not_read_is_told_so(self) -> None:
        barred = PermissionError(errno.EACCES, "Permission denied")
        with mock.patch("builtins.open", side_effect=barred):
            text = self.refusal(PKI.good)

        self.assertIn("Permission denied; let the user that this runs as", text)

    def test_reload_replaces_the_pair_in_one_step(self) -> None:
        with tempfile.NamedTemporaryFile(suffix=".pem") as file:
            rotate(file.name, PKI.good)
            identity = dotproxy.Identity(file.name)
            before = identity.context
            rotate(file.name, PKI.good2)
            identity.reload()

        self.assertIsNot(identity.context, before)

    def test_file_that_goes_while_it_is_read_is_a_warning(self) -> None:
        identity = dotproxy.Identity(PKI.good)
        gone = mock.patch.object(
            ssl.SSLContext, "load_cert_chain", side_effect=FileNotFoundError
        )
        with gone, self.assertLogs(dotproxy.logger, "WARNING") as logged:
            identity.reload()

        self.assertIn("cannot read the key", logged.output[0])

    def test_bad_pair_is_a_warning_and_the_old_one_stays(self) -> None:
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


# ---- Host ----------------------------------------------------------------------------


class Rights:
    """The rights of a process that began as root, and how it gives them up."""

    def __init__(self, *, leaky: bool = False, barred: bool = False) -> None:
        self.uid, self.gid, self.groups = 0, 0, [0, 27]
        self.options: list[tuple[int, int]] = []  # of prctl, by who is not root
        self.core: object = None
        self.imported: list[str] = []  # by root
        self._leaky, self._barred = leaky, barred

    def renounce(self, user: str | None) -> str:
        """Have these given up instead of those of the tests."""
        functions = {
            "geteuid": lambda: self.uid,
            "umask": lambda mask: 0o022,
            **{name: getattr(self, f"_{name}") for name in ("setgroups", "setuid")},
            **dict.fromkeys(("setgid", "setresgid"), self._setgid),
            "setresuid": self._setuid,
        }
        with contextlib.ExitStack() as stack:
            for target, name, new in (
                (resource, "setrlimit", self._setrlimit),
                (dotproxy, "find_prctl", lambda: self._prctl),
                (importlib, "import_module", self._import),
                *((os, name, new) for name, new in functions.items()),
            ):
                patch = mock.patch.object(target, name, new, create=True)
                stack.enter_context(patch)
            return dotproxy.renounce_root(user)

    def _setgroups(self, groups: Sequence[int]) -> None:
        self._check()
        self.groups = list(groups)

    def _setgid(self, *ids: int) -> None:
        self._check()
        (self.gid,) = set(ids)

    def _setuid(self, *ids: int) -> None:
        if not self._leaky:
            self._check()
        (self.uid,) = set(ids)

    def _setrlimit(self, kind: int, limits: tuple[int, int]) -> None:
        self.core = limits if kind == resource.RLIMIT_CORE else None

    def _import(self, name: str) -> None:
        if not self.uid:
            self.imported.append(name)

    def _prctl(self, option: int, value: int) -> None:
        if self.uid:
            self.options.append((option, value))

    def _check(self) -> None:
        if self.uid or self._barred:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


class PrivilegeTest(DotproxyTestCase):
    def assert_refused(self, user: str, status: int, words: str) -> None:
        with self.assertRaisesRegex(dotproxy.ConfigError, words) as caught:
            Rights().renounce(user)
        self.assertEqual(caught.exception.status, status)

    def test_root_becomes_nobody_for_good(self) -> None:
        rights = Rights()

        name = rights.renounce(None)

        entry = pwd.getpwnam("nobody")
        self.assertEqual((rights.uid, rights.gid), (entry.pw_uid, entry.pw_gid))
        self.assertEqual((name, rights.groups, rights.core), ("nobody", [], (0, 0)))

    def test_modules_are_imported_while_root_can_read_them(self) -> None:
        rights = Rights()

        rights.renounce(None)

        self.assertEqual(rights.imported, list(dotproxy.LATE_MODULES))

    @unittest.skipUnless(sys.platform == "linux", "prctl is Linux's")
    def test_no_new_privileges_and_no_dump_are_asked_for_after_the_change(self) -> None:
        rights = Rights()

        rights.renounce(None)

        self.assertEqual(rights.options, [(38, 1), (4, 0)])

    def test_user_and_group_are_taken_by_name_and_number(self) -> None:
        entry, group = pwd.getpwnam("daemon"), grp.getgrnam("daemon").gr_gid
        for text, ids in (
            ("daemon", (entry.pw_uid, entry.pw_gid)),
            (str(entry.pw_uid), (entry.pw_uid, entry.pw_gid)),
            ("4000000001", (4000000001, 4000000001)),
            ("4000000001:4000000002", (4000000001, 4000000002)),
            ("4000000001:daemon", (4000000001, group)),
        ):
            with self.subTest(text):
                rights = Rights()
                rights.renounce(text)
                self.assertEqual((rights.uid, rights.gid), ids)

    def test_nobody_has_a_number_where_the_name_is_not_known(self) -> None:
        unknown = mock.Mock(side_effect=KeyError)
        rights = Rights()

        with mock.patch.multiple(pwd, getpwnam=unknown, getpwuid=unknown):
            rights.renounce(None)

        self.assertEqual((rights.uid, rights.gid), (65534, 65534))

    def test_user_that_cannot_be_is_refused_with_the_cure(self) -> None:
        for text, words in (
            ("no.such.user", "no user or group 'no.such.user': give --user"),
            ("nobody:no.such.group", "no user or group 'no.such.group'"),
            ("4294967295", "no user or group '4294967295'"),  # -1: leaves it as it is
            ("root:daemon", "give --user root"),
            (":daemon", "no user or group ''"),
        ):
            with self.subTest(text):
                self.assert_refused(text, 2, words)

    def test_root_that_may_not_change_is_status_1_with_the_cure(self) -> None:
        words = "CAP_SETUID.*--user root"
        with self.assertRaisesRegex(dotproxy.ConfigError, words) as caught:
            Rights(barred=True).renounce(None)

        self.assertEqual(caught.exception.status, 1)

    def test_root_that_could_be_regained_is_status_1(self) -> None:
        with self.assertRaisesRegex(dotproxy.ConfigError, "root again") as caught:
            Rights(leaky=True).renounce(None)

        self.assertEqual(caught.exception.status, 1)

    def test_root_that_is_asked_for_stays_with_a_warning(self) -> None:
        for text in ("root", "0"):
            rights = Rights()
            with self.subTest(text), self.assertLogs(dotproxy.logger) as logs:
                self.assertEqual(rights.renounce(text), text)
                self.assertEqual((rights.uid, rights.groups), (0, [0, 27]))
                self.assertIn("running as root", logs.output[0])

    def test_other_user_stays_and_may_be_named(self) -> None:
        for text in (None, "4000000001", f"4000000001:{os.getegid()}"):
            rights = Rights()
            rights.uid = 4000000001
            with self.subTest(text):
                self.assertEqual(rights.renounce(text), "4000000001")
                self.assertEqual((rights.groups, rights.core), ([0, 27], (0, 0)))

    def test_other_user_cannot_become_a_third_or_change_group(self) -> None:
        for text in ("4000000002", f"4000000001:{os.getegid() + 1}", "root"):
            rights = Rights()
            rights.uid = 4000000001
            refused = self.assertRaisesRegex(dotproxy.ConfigError, "only root can")
            with self.subTest(text), refused as caught:
                rights.renounce(text)
            self.assertEqual(caught.exception.status, 1)

    def test_python_without_ctypes_goes_on(self) -> None:
        with mock.patch.dict(sys.modules, {"ctypes": None}):
            dotproxy.find_prctl()(38, 1)

    @unittest.skipUnless(sys.platform == "linux", "prctl is Linux's")
    def test_prctl_is_the_system_call(self) -> None:
        script = "import dotproxy; dotproxy.find_prctl()(38, 1)"
        status = "print(open('/proc/self/status').read())"
        directory = os.path.dirname(dotproxy.__file__)

        output = subprocess.check_output(
            [sys.executable, "-c", f"{script}; {status}"], cwd=directory, text=True
        )

        self.assertRegex(output, r"NoNewPrivs:\s+1\n")

    def test_no_module_is_imported_once_root_is_given_up(self) -> None:
        directory = os.path.dirname(dotproxy.__file__)
        with FakeUpstream() as upstream:
            names = ("dot.test", "other.test")
            where = [f"--upstream={LOCALHOST}:{upstream.port}#{name}" for name in names]
            options = ["--listen=127.0.0.1:0", f"--ca-file={PKI.ca}", *where]
            command = [sys.executable, "-c", AT_WORK, *options]
            output = subprocess.check_output(
                command, cwd=directory, text=True, stderr=subprocess.STDOUT, timeout=30
            )

        self.assertIn("certificate is for dot.test", output)
        self.assertIn("ZeroDivisionError", output)
        self.assertEqual(output.splitlines()[-1], "imported: []")


AT_WORK = """
import importlib, logging, os, socket, sys, time, dotproxy
logging.basicConfig()
daemon = dotproxy.Daemon(dotproxy.parse_args(sys.argv[1:], {}))
for name in dotproxy.LATE_MODULES:
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
try:
    1 / 0
except ZeroDivisionError:
    dotproxy.logger.exception("expected")
while not daemon.status().startswith("1 of 2 upstreams up"):
    time.sleep(0.01)
daemon.log_state()
daemon.reload()
daemon.close()
print("imported:", sorted(set(sys.modules) - before))
"""


class DescriptorTest(DotproxyTestCase):
    def raise_limit(
        self, wanted: int, soft: int, hard: int, refused: bool = False
    ) -> tuple[int, list[object]]:
        """Return what the limit is then, and what the system was asked for."""
        asked: list[object] = []

        def setrlimit(_: int, limits: tuple[int, int]) -> None:
            if refused:
                raise ValueError("not allowed to raise maximum limit")
            asked.append(limits)

        get = mock.patch.object(resource, "getrlimit", lambda _: (soft, hard))
        with get, mock.patch.object(resource, "setrlimit", setrlimit):
            return dotproxy.raise_descriptor_limit(wanted), asked

    def test_admin_server_and_its_clients_count(self) -> None:
        plain = dotproxy.count_descriptors(configured(), 4)
        more = dotproxy.count_descriptors(configured("--admin=127.0.0.1:9153"), 4)

        self.assertEqual(more - plain, 1 + dotproxy.AdminServer.MAX_CLIENTS)

    def test_limit_is_raised_as_far_as_it_is_needed_and_may_be(self) -> None:
        unlimited = resource.RLIM_INFINITY
        for wanted, soft, hard, limit, asked in (
            (2000, 1024, 4096, 2000, [(2000, 4096)]),
            (2000, 1024, unlimited, 2000, [(2000, unlimited)]),
            (9000, 1024, 4096, 4096, [(4096, 4096)]),
            (2000, 4096, 8192, 2000, []),
            (2000, unlimited, unlimited, 2000, []),
            (2000, 64, 64, 64, [(64, 64)]),
        ):
            with self.subTest(wanted=wanted, soft=soft, hard=hard):
                found = self.raise_limit(wanted, soft, hard)
                self.assertEqual(found, (limit, asked))

    def test_macos_takes_no_limit_above_its_own(self) -> None:
        with mock.patch.object(sys, "platform", "darwin"):
            _, asked = self.raise_limit(20000, 256, resource.RLIM_INFINITY)

        self.assertEqual(asked, [(10240, resource.RLIM_INFINITY)])

    def test_limit_that_cannot_be_raised_stays(self) -> None:
        self.assertEqual(self.raise_limit(2000, 1024, 4096, refused=True)[0], 1024)

    def fit(self, limit: int, *options: str) -> int:
        """Return how many TCP clients are allowed with so many descriptors."""
        raised = mock.patch.object(dotproxy, "raise_descriptor_limit", lambda _: limit)
        with raised:
            return dotproxy.fit_descriptors(configured(*options), 4).max_tcp_clients

    def test_enough_descriptors_leave_all_as_it_is(self) -> None:
        # 4 to each of 4 upstreams, 16 for suspects, 4 listeners, 16 in reserve.
        self.assertEqual(self.fit(52 + 2 * 512), 512)

    def test_routed_domain_has_descriptors_of_its_own(self) -> None:
        routes = [f"--route=example.com=192.0.2.{n}#dot.test" for n in (1, 2)]

        # 4 to each of the 2, and 16 for suspects, which are 12 clients fewer.
        with self.assertLogs(dotproxy.logger, "WARNING"):
            self.assertEqual(self.fit(52 + 2 * 512, *routes), 500)

    def test_too_few_descriptors_mean_fewer_tcp_clients_and_a_warning(self) -> None:
        for limit, clients in ((51 + 2 * 512, 511), (64, 6), (20, 1)):
            with self.subTest(limit=limit), self.assertLogs(dotproxy.logger) as logs:
                self.assertEqual(self.fit(limit), clients)
            self.assertEqual(len(logs.output), 1)
            self.assertIn("LimitNOFILE=1076", logs.output[0])


@contextlib.contextmanager
def passed(*sockets: socket.socket, **variables: str) -> Iterator[dict[str, str]]:
    """Pass sockets as systemd does, from PASSED up: yield the environment."""
    numbers = range(PASSED, PASSED + len(sockets))
    for number, each in zip(numbers, sockets):
        os.dup2(each.fileno(), number, inheritable=False)
        each.close()
    try:
        pid = str(os.getpid())
        yield {"LISTEN_PID": pid, "LISTEN_FDS": str(len(sockets)), **variables}
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
    def test_sockets_are_taken_with_their_names(self) -> None:
        sockets = listener(socket.SOCK_DGRAM), listener(socket.SOCK_STREAM)
        with passed(*sockets, LISTEN_FDNAMES="dns:tls") as environment:
            found = dotproxy.inherited_sockets(environment, PASSED)
            for _, each in found:
                each.close()

        self.assertEqual([name for name, _ in found], ["dns", "tls"])
        self.assertEqual([each.type for _, each in found], [2, 1])
        self.assertEqual(environment, {})

    def test_socket_without_a_name_has_an_empty_one(self) -> None:
        for names in ({}, {"LISTEN_FDNAMES": ""}):
            with passed(listener(socket.SOCK_DGRAM), **names) as environment:
                ((name, taken),) = dotproxy.inherited_sockets(environment, PASSED)
                taken.close()
            self.assertEqual(name, "")

    def test_sockets_for_another_process_are_left_alone(self) -> None:
        for pid in (str(os.getppid()), ""):
            with passed(listener(socket.SOCK_DGRAM), LISTEN_PID=pid) as environment:
                self.assertEqual(dotproxy.inherited_sockets(environment, PASSED), [])
                self.assertEqual(environment, {})
                os.fstat(PASSED)

    def assert_refused(self, words: str, *sockets: socket.socket, **given: str) -> None:
        refused = self.assertRaisesRegex(dotproxy.ConfigError, words)
        with passed(*sockets, **given) as environment, refused as caught:
            dotproxy.inherited_sockets(environment, PASSED)
        self.assertEqual(caught.exception.status, 1)

    def test_what_cannot_be_served_on_is_refused(self) -> None:
        deaf = socket.socket()
        deaf.bind((LOCALHOST, 0))
        unix = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

        self.assert_refused("does not listen .is it Accept=yes", deaf)
        self.assert_refused("neither IPv4 nor IPv6", unix)
        self.assert_refused(f"descriptor {PASSED} of LISTEN_FDS: Bad", LISTEN_FDS="1")
        self.assert_refused("LISTEN_FDS=x", LISTEN_FDS="x")

    def test_socket_before_one_that_is_refused_is_closed(self) -> None:
        good = listener(socket.SOCK_DGRAM)
        address = good.getsockname()
        self.assert_refused("Bad file", good, LISTEN_FDS="2")

        with socket.socket(type=socket.SOCK_DGRAM) as again:
            again.bind(address)

    def test_inherited_sockets_are_served_on_and_no_others(self) -> None:
        udp, tcp = listener(socket.SOCK_DGRAM), listener(socket.SOCK_STREAM)
        address = udp.getsockname()
        inherited = [("dns", udp), ("", tcp)]
        with serving(inherited=inherited) as served, contextlib.ExitStack() as stack:
            clients: list[Client] = [UDPClient(address), TCPClient(served.address)]
            for client in clients:
                stack.enter_context(client)
                client.send(query())
                self.assertEqual(parse(client.receive()).addresses, ["192.0.2.1"])
            self.assertEqual(len(served.daemon.servers), 2)
            described = dotproxy.describe_servers(served.daemon.servers)

        self.assertEqual(described.split()[0], f"127.0.0.1:{address[1]}")

    @unittest.skipUnless(sys.platform == "linux", "needs all of 127.0.0.0/8")
    def test_inherited_wildcard_socket_answers_from_the_address_asked(self) -> None:
        for host, asked in (
            ("0.0.0.0", "127.1.2.3"),
            ("::", "::1"),
            ("::", "127.1.2.3"),  # BindIPv6Only=both
        ):
            udp = listener(socket.SOCK_DGRAM, host)
            with self.subTest(host=host, asked=asked), self.serving(udp) as served:
                port = served.daemon.servers[0].server_address[1]
                with UDPClient((asked, int(port))) as client:
                    client.send(query())
                    self.assertEqual(parse(client.receive()).rcode, 0)

    def serving(
        self, inherited: socket.socket
    ) -> contextlib.AbstractContextManager[Served]:
        """Serve on this socket alone."""
        return serving(inherited=[("", inherited)])

    def test_inherited_stream_named_tls_is_for_encrypted_clients(self) -> None:
        tls = listener(socket.SOCK_STREAM)
        inherited = [("tls", tls), ("tls", listener(socket.SOCK_DGRAM))]
        with serving(answer, ENCRYPTED[1], inherited=inherited) as served:
            self.assertIs(served.tls.socket, tls)
            with TLSClient(served.tls_address) as client:
                client.send(query())
                self.assertEqual(parse(client.receive()).rcode, 0)

    def test_inherited_stream_named_tls_needs_a_certificate(self) -> None:
        with self.assertRaises(dotproxy.ConfigError) as caught:
            dotproxy.load_identity(configured(), passed=True)

        self.assertIn("a socket named tls needs", str(caught.exception))

    def test_query_that_came_before_the_start_is_answered(self) -> None:
        udp = listener(socket.SOCK_DGRAM)
        with UDPClient(udp.getsockname()) as client:
            client.send(query())
            with self.serving(udp):
                self.assertEqual(parse(client.receive()).rcode, 0)


class PreparationTest(DotproxyTestCase):
    def test_sockets_that_are_passed_win_over_listen_with_a_warning(self) -> None:
        inherited = [("", listener(socket.SOCK_DGRAM))]
        with contextlib.ExitStack() as stack:
            for name, new in (
                ("inherited_sockets", lambda environment: inherited),
                ("renounce_root", lambda user: f"<{user}>"),
                ("raise_descriptor_limit", lambda wanted: wanted),
            ):
                stack.enter_context(mock.patch.object(dotproxy, name, new))
            logs = stack.enter_context(self.assertLogs(dotproxy.logger, "WARNING"))
            options = "--listen=127.0.0.1:0", f"--ca-file={PKI.ca}", "--user=someone"
            daemon, host = dotproxy.prepare(configured(*options))

        (server,) = daemon.servers
        self.assertIs(server.socket, inherited[0][1])
        server.server_close()
        self.assertIn("--listen is not used", logs.output[0])
        self.assertRegex(host, r"\Auser=<someone> nofile=\d+ umask=077\Z")


class Notifications:
    """A socket as systemd has one, and what was said to it."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="dotproxy-")
        os.chmod(self._directory.name, 0o755)
        self.path = os.path.join(self._directory.name, "notify")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)
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
    def setUp(self) -> None:
        super().setUp()
        self.clock = Clock()
        self.heard = Notifications()
        self.addCleanup(self.heard.__exit__)

    def supervisor(self, **variables: str) -> dotproxy.Supervisor:
        environment = {"NOTIFY_SOCKET": self.heard.path, **variables}
        made = dotproxy.Supervisor(environment, self.clock)
        self.assertEqual(environment, {})
        return made

    def test_without_a_socket_nothing_is_ever_due(self) -> None:
        supervisor = dotproxy.Supervisor({"WATCHDOG_USEC": "1000000"}, self.clock)

        supervisor.tell("READY=1")

        self.assertIsNone(supervisor.patience())

    def test_lines_are_one_datagram(self) -> None:
        self.supervisor().tell("READY=1", "STATUS=well")

        self.assertEqual(self.heard.next(), "READY=1\nSTATUS=well")

    @unittest.skipUnless(sys.platform == "linux", "abstract names are Linux's")
    def test_abstract_socket_is_found(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as abstract:
            abstract.bind(f"\0dotproxy-test-{os.getpid()}")
            abstract.settimeout(5)
            name = f"@dotproxy-test-{os.getpid()}"
            self.supervisor(NOTIFY_SOCKET=name).tell("READY=1")

            self.assertEqual(abstract.recv(64), b"READY=1")

    def test_watchdog_is_told_at_half_of_its_interval(self) -> None:
        supervisor = self.supervisor(WATCHDOG_USEC="6000000", WATCHDOG_PID="")
        self.assertEqual(supervisor.patience(), 3.0)
        self.clock.advance(2.0)
        self.assertEqual(supervisor.patience(), 1.0)
        self.clock.advance(1.0)

        supervisor.report("well", alive=True)

        self.assertEqual(self.heard.next(), "WATCHDOG=1\nSTATUS=well")
        self.assertEqual(supervisor.patience(), 3.0)

    def test_watchdog_of_another_process_or_of_none_is_not_told(self) -> None:
        pid = str(os.getpid())
        for variables in (
            {},
            {"WATCHDOG_USEC": "0", "WATCHDOG_PID": pid},
            {"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": str(os.getppid())},
            {"WATCHDOG_USEC": "soon", "WATCHDOG_PID": pid},
        ):
            with self.subTest(variables):
                supervisor = self.supervisor(**variables)
                self.assertEqual(supervisor.patience(), 10.0)
                supervisor.report("well", alive=True)
                self.assertEqual(self.heard.next(), "STATUS=well")

    def test_loop_that_hangs_stops_the_watchdog_until_it_turns(self) -> None:
        supervisor = self.supervisor(WATCHDOG_USEC="20000000")

        with self.assertLogs(dotproxy.logger, "WARNING") as logs:
            for alive in (False, False, True):
                supervisor.report("well", alive=alive)

        heard = [self.heard.next() for _ in range(3)]
        self.assertEqual(heard, ["STATUS=well"] * 2 + ["WATCHDOG=1\nSTATUS=well"])
        self.assertEqual(len(logs.output), 2)

    def test_loop_that_hangs_is_looked_at_again_soon(self) -> None:
        supervisor = self.supervisor(WATCHDOG_USEC="20000000")

        with self.assertLogs(dotproxy.logger, "WARNING"):
            supervisor.report("well", alive=False)

        self.assertEqual(supervisor.patience(), 1.0)

    def test_socket_that_is_gone_or_full_is_no_trouble(self) -> None:
        supervisor = self.supervisor()
        for _ in range(5000):
            supervisor.tell("STATUS=" + "x" * 1000)
        self.heard.socket.close()
        os.unlink(self.heard.path)

        supervisor.tell("READY=1")

    def test_reload_is_told_before_and_after(self) -> None:
        said: list[str] = []
        self.supervisor().reload(lambda: said.append(self.heard.next()))

        self.assertEqual(said, ["RELOADING=1\nMONOTONIC_USEC=1000000000"])
        self.assertEqual(self.heard.next(), "READY=1")


class LivenessTest(DotproxyTestCase):
    def test_loops_note_that_they_turn(self) -> None:
        with serving() as served:
            for server in served.daemon.servers:
                server.turned_at = 0.0
                wait_until(functools.partial(self.turned, server))

    def turned(self, server: dotproxy.UDPServer | dotproxy.TCPServer) -> bool:
        return server.turned_at > 0

    @contextlib.contextmanager
    def standing(self) -> Iterator[dotproxy.Daemon]:
        """Serve, with loops that note nothing: `turned_at` stays as it is set."""
        with contextlib.ExitStack() as stack:
            for kind in (dotproxy.UDPServer, dotproxy.TCPServer):
                patch = mock.patch.object(kind, "service_actions")
                stack.enter_context(patch)
            yield stack.enter_context(serving()).daemon

    def test_one_loop_that_has_not_turned_for_5_seconds_hangs(self) -> None:
        with self.standing() as daemon:
            for hung in daemon.servers:
                for server in daemon.servers:
                    server.turned_at = 1000.0 if server is hung else 1004.0
                self.assertTrue(daemon.is_turning(1004.9))
                self.assertFalse(daemon.is_turning(1005.1))

    def test_watchdog_hears_nothing_while_a_loop_hangs(self) -> None:
        received, written = os.pipe()
        again = mock.patch.object(dotproxy.Supervisor, "AGAIN", 0.01)
        with self.standing() as daemon, Notifications() as heard, again:
            variables = {"NOTIFY_SOCKET": heard.path, "WATCHDOG_USEC": "20000"}
            arguments = received, daemon, dotproxy.Supervisor(variables)
            waiter = threading.Thread(target=dotproxy.wait_for_signal, args=arguments)
            daemon.servers[0].turned_at = -math.inf
            with self.assertLogs(dotproxy.logger, "WARNING"):
                waiter.start()
                hung = [heard.next() for _ in range(3)]
                daemon.servers[0].turned_at = time.monotonic()
                wait_until(lambda: heard.next().startswith("WATCHDOG=1\n"))
                os.write(written, bytes([signal.SIGTERM]))
                waiter.join()
        os.close(received)
        os.close(written)

        for each in hung:
            self.assertRegex(each, r"\ASTATUS=1 of 1 upstreams up, 0 queries in flight")


# ---- Health check --------------------------------------------------------------------


class Responder:
    """A UDP server that answers its one query with what `reply` makes of it."""

    def __init__(self, reply: Callable[[bytes], Iterable[bytes]]) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((LOCALHOST, 0))
        self._socket.settimeout(5)
        self._reply = reply
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.address: Address = self._socket.getsockname()
        self.asked = b""

    def __enter__(self) -> Responder:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        self.asked, client = self._socket.recvfrom(4096)
        for message in self._reply(self.asked):
            self._socket.sendto(message, client)


def servfail(text: str) -> dotproxy.Response:
    """Make a SERVFAIL response whose Extended DNS Error has this text."""
    info = dotproxy.ExtendedError.NETWORK_ERROR
    return dotproxy.error_response(Rcode.SERVFAIL, dotproxy.build_option(info, text))


class HealthCheckTest(DotproxyTestCase):
    def test_proxy_whose_upstream_answers_is_healthy(self) -> None:
        with serving(answer) as served:
            verdict = dotproxy.check_health(served.address, 5.0)

        self.assertTrue(verdict.healthy)
        self.assertRegex(verdict.line, r"\Ahealthy: answered in [\d.]+ ms\Z")

    def test_answer_is_never_from_the_cache(self) -> None:
        with serving(answer) as served:
            for _ in range(3):
                dotproxy.check_health(served.address, 5.0)

            self.assertEqual(len(served.upstream.queries), 3)

    def test_upstream_that_is_down_is_told_with_the_reason(self) -> None:
        patient = mock.patch.object(Health, "GRACE", 0.1)
        with patient, serving(answer) as served:
            served.upstream.stop()
            verdict = dotproxy.check_health(served.address, 5.0)

        reason = rf"\Aupstream down: 127.0.0.1:{served.upstream.port}#dot.test: .+"
        self.assertFalse(verdict.healthy)
        self.assertRegex(verdict.line, reason)

    def test_port_without_a_proxy_is_a_proxy_that_is_down(self) -> None:
        with socket.socket(type=socket.SOCK_DGRAM) as unused:
            unused.bind((LOCALHOST, 0))
            address = unused.getsockname()
        verdict = dotproxy.check_health(address, 5.0)

        where = f"127.0.0.1:{address[1]}"
        line = f"proxy down: nothing listens on {where}"
        self.assertEqual(verdict, (False, line, False))

    def test_silence_is_a_proxy_that_is_down(self) -> None:
        with socket.socket(type=socket.SOCK_DGRAM) as silent:
            silent.bind((LOCALHOST, 0))
            verdict = dotproxy.check_health(silent.getsockname(), 0.01)

        self.assertFalse(verdict.healthy)
        self.assertRegex(verdict.line, r"\Aproxy down: no answer from .* in 0.01 s")

    def test_address_that_cannot_be_asked_is_a_proxy_that_is_down(self) -> None:
        verdict = dotproxy.check_health(("255.255.255.255", 53), 5.0)

        line = "proxy down: 255.255.255.255:53: Permission denied"
        self.assertEqual(verdict, (False, line, False))

    def test_wildcard_address_is_asked_on_loopback(self) -> None:
        for wildcard, host in (("0.0.0.0", "127.0.0.1:"), ("::", "[::1]:")):
            with self.subTest(wildcard):
                line = dotproxy.check_health((wildcard, 1), 5.0).line
                self.assertIn(f" {host}1", line)

    def test_answers_to_something_else_are_passed_over(self) -> None:
        def reply(asked: bytes) -> list[bytes]:
            good = asked[:2] + b"\x81\x80" + asked[4:]
            other_id = bytes([asked[0] ^ 1]) + good[1:]
            other_question = good[:12] + b"\1a\0\0\2\0\1" + good[17:]
            return [b"", asked, other_id, other_question, good[:20], good]

        with Responder(reply) as responder:
            verdict = dotproxy.check_health(responder.address, 5.0)

        self.assertTrue(verdict.healthy)

    def test_query_is_well_formed_and_not_cachable(self) -> None:
        def reply(asked: bytes) -> list[bytes]:
            return [asked[:2] + b"\x81\x80" + asked[4:]]

        with Responder(reply) as responder:
            dotproxy.check_health(responder.address, 5.0)

        asked = dotproxy.parse_query(responder.asked)
        self.assertEqual((asked.question, asked.form.edns), (b"\0\0\2\0\1", True))
        self.assertEqual(asked.cache_key, b"")

    def test_flood_of_other_messages_does_not_outlast_the_patience(self) -> None:
        clock = Clock()

        class Flooded:
            def settimeout(self, seconds: float) -> None:
                clock.advance(1)

            def recv(self, size: int) -> bytes:
                return query()

        with self.assertRaises(socket.timeout):
            dotproxy.read_health(Flooded(), b"ab", clock() + 5, clock)  # type: ignore

    def test_any_answer_but_servfail_is_healthy(self) -> None:
        for rcode in (Rcode.NOERROR, Rcode.NXDOMAIN, Rcode.FORMERR, Rcode.NOTIMP):
            with self.subTest(rcode=rcode):
                verdict = dotproxy.judge_health(dotproxy.error_response(rcode), 0.0021)
                self.assertEqual(verdict, (True, "healthy: answered in 2.1 ms", True))

    def test_refusal_says_that_nothing_is_known_of_the_upstream(self) -> None:
        response = dotproxy.error_response(Rcode.REFUSED)
        verdict = dotproxy.judge_health(response, 0.0)

        self.assertTrue(verdict.healthy)
        self.assertIn("upstream unknown: the proxy's access list", verdict.line)

    def test_text_of_an_answer_cannot_drive_a_terminal(self) -> None:
        verdict = dotproxy.judge_health(servfail("red \x1b[31m\nx"), 0.0)

        self.assertEqual(verdict.line, "upstream down: red ?[31m?x")

    def test_servfail_without_a_reason_is_told_as_such(self) -> None:
        response = dotproxy.error_response(Rcode.SERVFAIL)
        verdict = dotproxy.judge_health(response, 0.0)

        self.assertFalse(verdict.healthy)
        self.assertEqual(verdict.line, "upstream down: SERVFAIL without a reason")


# ---- Admin server --------------------------------------------------------------------


class AdminServerTest(DotproxyTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.clock = Clock()
        self.server = self.serve({"/page": lambda accept: dotproxy.Page(accept)})

    def serve(
        self, pages: dict[str, Callable[[str], dotproxy.Page]]
    ) -> dotproxy.AdminServer:
        server = dotproxy.AdminServer((LOCALHOST, 0), pages, self.clock)
        loop = functools.partial(server.serve_forever, 0.01)
        thread = threading.Thread(target=loop)
        for each in (server.server_close, thread.join, server.shutdown):
            self.addCleanup(each)
        thread.start()
        return server

    def connect(self) -> socket.socket:
        where = LOCALHOST, self.server.server_address[1]
        client = socket.create_connection(where, timeout=5)
        self.addCleanup(client.close)
        return client

    def ask(self, head: str) -> tuple[int, dict[str, str], str]:
        """Send the head of a request; return status, headers and body."""
        client = self.connect()
        client.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n")
        text = b"".join(iter(lambda: client.recv(65536), b"")).decode()
        start, _, body = text.partition("\r\n\r\n")
        first, *lines = start.split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        return int(first.split()[1]), headers, body

    def test_proxy_without_it_imports_no_http(self) -> None:
        code = "import sys, dotproxy; sys.exit('http.server' in sys.modules)"
        directory = os.path.dirname(compiled_program())

        done = subprocess.run([sys.executable, "-c", code], cwd=directory, timeout=60)

        self.assertEqual(done.returncode, 0)

    def test_page_is_answered_with_headers_that_allow_nothing(self) -> None:
        status, headers, body = self.ask("GET /page?x HTTP/1.1\nAccept: text/x")

        self.assertEqual((status, body), (200, "text/x"))
        self.assertEqual(headers["Content-Security-Policy"], "default-src 'none'")
        self.assertEqual(headers["X-Content-Type-Options"], "nosniff")
        self.assertEqual(headers["Cache-Control"], "no-store")
        self.assertEqual(headers["Connection"], "close")
        self.assertEqual(headers["Content-Length"], "6")

    def test_head_is_answered_without_a_body(self) -> None:
        status, headers, body = self.ask("HEAD /page HTTP/1.1\nAccept: text/x")

        self.assertEqual((status, headers["Content-Length"], body), (200, "6", ""))

    def test_other_methods_are_not_allowed(self) -> None:
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE", "X"):
            with self.subTest(method):
                status, headers, _ = self.ask(f"{method} /page HTTP/1.1")
                self.assertEqual((status, headers["Allow"]), (405, "GET, HEAD"))

    def test_other_paths_are_not_found(self) -> None:
        for path in ("/", "/page/", "/../page", "http://x/page"):
            with self.subTest(path):
                self.assertEqual(self.ask(f"GET {path} HTTP/1.1")[0], 404)

    def test_host_of_somebody_else_is_misdirected(self) -> None:
        for host, status in (
            ("localhost", 200),
            ("LOCALHOST:9153", 200),
            ("127.0.0.1:80", 200),
            ("[::1]:9153", 200),
            ("evil.example", 421),
            ("localhost.evil.example:9153", 421),
            ("127.0.0.1.evil.example", 421),
            ("127.0.0.1:80:80", 421),
            ("", 421),
        ):
            with self.subTest(host):
                got, _, _ = self.ask(f"GET /page HTTP/1.1\nHost: {host}")
                self.assertEqual(got, status)

    def test_host_is_anything_where_it_is_not_on_loopback(self) -> None:
        server = dotproxy.AdminServer(("0.0.0.0", 0), {})
        self.addCleanup(server.server_close)

        self.assertTrue(server.knows_host("dns.example.com:9153"))

    def test_head_that_is_too_large_is_refused(self) -> None:
        size = dotproxy.AdminHandler.MAX_HEAD

        self.assertEqual(self.ask(f"GET /page HTTP/1.1\nX: {'x' * size}")[0], 431)

    def test_head_that_is_no_http_is_a_bad_request(self) -> None:
        self.assertEqual(self.ask("GET /page HTTP/a.b")[0], 400)

    def test_head_may_come_in_pieces(self) -> None:
        client = self.connect()
        for piece in (b"GET /pa", b"ge HTTP/1.1\r\nHost: local", b"host\r\n", b"\r\n"):
            client.sendall(piece)

        self.assertTrue(client.recv(100).startswith(b"HTTP/1.1 200"))

    def test_client_that_is_too_slow_is_closed(self) -> None:
        client = self.connect()
        client.sendall(b"GET /page HTTP/1.1\r\n")
        wait_until(lambda: len(self.server._deadlines) == 1)
        self.clock.advance(self.server.DEADLINE)

        self.assertEqual(client.recv(100), b"")

    def test_one_client_too_many_is_closed_and_the_next_gets_its_turn(self) -> None:
        clients = [self.connect() for _ in range(self.server.MAX_CLIENTS)]
        self.assertEqual(self.connect().recv(100), b"")

        clients[0].close()

        wait_until(lambda: len(self.server._deadlines) < self.server.MAX_CLIENTS)
        self.assertEqual(self.ask("GET /page HTTP/1.1")[0], 200)

    def test_clients_that_come_together_are_let_in_at_once(self) -> None:
        idle = dotproxy.AdminServer((LOCALHOST, 0), {})
        self.addCleanup(idle.server_close)
        for _ in range(idle.MAX_CLIENTS):  # a SYN that is dropped comes again after 1 s
            where = LOCALHOST, idle.server_address[1]
            client = socket.create_connection(where, 0.5)
            self.addCleanup(client.close)

    def test_client_that_goes_away_leaves_nothing(self) -> None:
        client = self.connect()
        client.sendall(b"GET /page HTTP/1.1\r\n")
        client.close()

        wait_until(lambda: not self.server._deadlines)

    def test_error_of_a_page_is_logged_and_the_next_is_answered(self) -> None:
        def fail(accept: str) -> dotproxy.Page:
            raise ValueError(accept)

        self.server.pages = {**self.server.pages, "/fail": fail}
        client = self.connect()
        client.sendall(b"GET /fail HTTP/1.1\r\n\r\n")
        self.assertEqual(client.recv(100), b"")
        (line,) = ERROR_LOG.lines
        ERROR_LOG.lines.clear()

        self.assertIn("server=admin", line)
        self.assertEqual(self.ask("GET /page HTTP/1.1")[0], 200)


class AdminPageTest(DotproxyTestCase):
    def get(self, served: Served, path: str, accept: str = "") -> tuple[int, str, str]:
        """Return status, content type and body."""
        admin = served.daemon.admin
        assert admin is not None
        host, port = admin.server_address[:2]
        client = http.client.HTTPConnection(str(host), int(port), timeout=5)
        with contextlib.closing(client):
            client.request("GET", path, headers={"Accept": accept})
            answer = client.getresponse()
            kind = answer.getheader("Content-Type") or ""
            return answer.status, kind, answer.read().decode()

    def test_root_links_to_pages_that_there_are(self) -> None:
        with serving(answer, "--admin=0") as served:
            served.upstream.wait_for(lambda u: u.handshakes == 1)
            wait_until(lambda: self.get(served, "/ready")[0] == 200)
            _, kind, page = self.get(served, "/")
            links = set(re.findall(r'<a href="(.*?)">', page))
            statuses = [self.get(served, f"/{link}")[0] for link in links]

        self.assertEqual(kind, "text/html; charset=utf-8")
        self.assertEqual(links, {"metrics", "health", "ready", "grafana.json"})
        self.assertEqual(statuses, [200] * 4)

    def test_status_page_has_neither_client_nor_name(self) -> None:
        options = answer, "--admin=0"
        with serving(*options) as served, UDPClient(served.address) as client:
            client.send(query("secret.example"))
            client.receive()
            claim = '<dd><data value="1">1</data>'
            wait_until(lambda: claim in self.get(served, "/")[2])
            page = self.get(served, "/")[2]
            host, port = served.address
        page = page.replace(f"{host}:{port}", "").replace(
            f"{host}:{served.upstream.port}", ""
        )

        self.assertNotIn("secret", page)
        self.assertNotIn(host, page)

    def test_readings_are_taken_while_it_runs(self) -> None:
        with (
            mock.patch.object(dotproxy.History, "PERIOD", 0.01),
            serving(answer, "--admin=0") as served,
        ):
            claim = "<dt>Queries per second</dt><dd>0<"  # known from the second on
            wait_until(lambda: claim in self.get(served, "/")[2])

    def test_head_of_the_status_page_has_its_policy(self) -> None:
        with serving(answer, "--admin=0") as served:
            admin = served.daemon.admin
            assert admin is not None
            port = admin.server_address[1]
            client = http.client.HTTPConnection(LOCALHOST, port, timeout=5)
            with contextlib.closing(client):
                client.request("HEAD", "/")
                head = client.getresponse()
                body = head.read()

        self.assertEqual((head.status, body), (200, b""))
        self.assertGreater(int(head.headers["Content-Length"]), 10_000)
        policy = head.headers["Content-Security-Policy"]
        self.assertEqual(policy, dotproxy.STATUS_POLICY)

    def test_metrics_come_in_the_format_that_was_asked_for(self) -> None:
        with serving(answer, "--admin=0") as served:
            for accept, kind, end in (
                (
                    "",
                    "text/plain; version=0.0.4; charset=utf-8",
                    r"process_threads \d+",
                ),
                (
                    "application/openmetrics-text",
                    "application/openmetrics-text; version=1.0.0; charset=utf-8",
                    "# EOF",
                ),
            ):
                with self.subTest(accept):
                    status, got, body = self.get(served, "/metrics", accept)
                    self.assertEqual((status, got), (200, kind))
                    self.assertRegex(body, rf"{end}\n\Z")

    def test_udp_and_tcp_queries_are_counted(self) -> None:
        with serving() as served:
            for client in (UDPClient(served.address), TCPClient(served.address)):
                with client:
                    for _ in range(2):
                        client.send(query())
                        client.receive()
            name, counted = "dotproxy_dns_requests_total", []
            for proto in ("udp", "tcp"):
                claim = functools.partial(
                    self.counted, served, 2, name, proto, "1", "A"
                )
                wait_until(claim)
                counted.append(claim())

        self.assertEqual(counted, [True, True])

    def counted(self, served: Served, number: int, name: str, *labels: str) -> bool:
        """Tell whether a metric has this value."""
        return (name, labels, number) in served.metrics()

    def test_certificate_and_handshakes_are_told(self) -> None:
        with serving() as served, UDPClient(served.address) as client:
            client.send(query())
            client.receive()
            samples = served.metrics()
        name = f"{LOCALHOST}:{served.upstream.port}#dot.test"

        expiry = "dotproxy_upstream_certificate_expiry_timestamp_seconds"
        self.assertGreater(sample(samples, expiry, name), time.time())
        handshakes = "dotproxy_upstream_handshakes_total"
        self.assertEqual(sample(samples, handshakes, name, "full"), 1)

    def test_health_is_bad_once_a_loop_does_not_turn(self) -> None:
        with serving(answer, "--admin=0") as served:
            self.assertEqual(self.get(served, "/health")[::2], (200, "OK\n"))
            with mock.patch.object(dotproxy.Daemon, "STUCK", -1.0):
                status, _, text = self.get(served, "/health")

        self.assertEqual(status, 503)
        self.assertIn("not moved", text)

    def test_loop_tells_that_it_turns(self) -> None:
        with serving() as served:
            for server in served.daemon.servers:
                wait_until(functools.partial(self.turned, server, server.turned_at))
            turning = served.daemon.is_turning(time.monotonic())
            late = served.daemon.is_turning(time.monotonic() + 60.0)

        self.assertEqual((turning, late), (True, False))

    def turned(
        self, server: dotproxy.UDPServer | dotproxy.TCPServer, since: float
    ) -> bool:
        return server.turned_at > since

    def test_proxy_without_upstream_is_not_ready_and_says_why(self) -> None:
        with serving(answer, "--admin=0") as served:
            served.upstream.wait_for(lambda u: u.handshakes == 1)
            wait_until(lambda: self.get(served, "/ready")[0] == 200)
            trouble = "192.0.2.1: refused"
            with mock.patch.object(UpstreamGroup, "trouble", return_value=trouble):
                status, _, text = self.get(served, "/ready")

        self.assertEqual(status, 503)
        self.assertIn(trouble, text)


# ---- Status page ---------------------------------------------------------------------


def counts(
    cache: int = 0, upstream: int = 0, place: int = 0, cpu: float = 0.0
) -> list[dotproxy.Sample]:
    """Make samples of so many answers, all in one bucket of their duration."""
    duration = dotproxy.Histogram(dotproxy.LATENCIES)
    duration.counts[place] += cache + upstream
    return [
        ("dotproxy_dns_responses_total", ("NOERROR", "cache"), cache),
        ("dotproxy_dns_responses_total", ("NOERROR", "upstream"), upstream),
        ("dotproxy_cache_hits_total", (), cache),
        ("dotproxy_cache_misses_total", (), upstream),
        ("dotproxy_dns_request_duration_seconds", ("cache",), duration),
        ("process_cpu_seconds_total", (), cpu),
    ]


def history(readings: Iterable[list[dotproxy.Sample]]) -> dotproxy.History:
    """Make a history of one reading each period."""
    made = dotproxy.History()
    for number, samples in enumerate(readings):
        made.add(samples, number * made.PERIOD)
    return made


class HistoryTest(DotproxyTestCase):
    def test_nothing_is_shown_before_the_second_reading(self) -> None:
        for readings in ([], [counts()]):
            window = history(readings).window()
            self.assertEqual((window.span, window.changes), (600.0, []))
            self.assertIsNone(window.latest)

    def test_change_is_what_happened_between_two_readings(self) -> None:
        window = history([counts(100, 50), counts(130, 60, cpu=2.5)]).window()
        (change,) = window.changes

        self.assertEqual(change.rates, [3.0, 0.0, 1.0, 0.0])
        self.assertEqual((change.hit_ratio, change.seconds), (0.75, 10.0))
        self.assertEqual(change.cpu, 2.5)

    def test_change_has_the_percentiles_of_its_own_time(self) -> None:
        slow, fast = counts(100, place=9), counts(300, place=3)
        both = [
            (name, ("upstream",), value)
            for name, _, value in slow
            if isinstance(value, dotproxy.Histogram)
        ]
        (change,) = history([slow, [*fast, *both]]).window().changes

        self.assertEqual(change.buckets, [0, 0, 0, 300] + [0] * 13)
        self.assertEqual(dotproxy.percentile(change.buckets, 0.5), 0.0015)

    def test_idle_time_has_neither_ratio_nor_percentile(self) -> None:
        (change,) = history([counts(100), counts(100)]).window().changes

        self.assertEqual((sum(change.rates), change.hit_ratio), (0.0, None))
        self.assertIsNone(dotproxy.percentile(change.buckets, 0.5))

    def test_rate_is_by_the_time_that_has_passed(self) -> None:
        made = dotproxy.History()
        made.add(counts(), 0.0)
        made.add(counts(600), 60.0)  # the process was stopped for a while

        self.assertEqual(made.window().changes[0].rates[0], 10.0)

    def test_latest_is_of_the_last_minute(self) -> None:
        window = history([counts(n * n) for n in range(11)]).window()

        assert window.latest is not None
        self.assertEqual(window.latest.seconds, 60.0)
        self.assertEqual(window.latest.rates[0], (100 - 16) / 60)

    def test_an_hour_is_kept(self) -> None:
        made = history(counts(n) for n in range(1000))

        self.assertEqual(len(made._readings), made.PERIODS + 1)
        self.assertEqual(made._readings[-1].number, 999)

    def test_chart_spans_more_as_there_is_more(self) -> None:
        for periods, span in (
            *((1, 600.0), (60, 600.0), (61, 1800.0), (180, 1800.0)),
            *((181, 3600.0), (360, 3600.0), (999, 3600.0)),
        ):
            with self.subTest(periods):
                window = history(counts(n) for n in range(periods + 1)).window()
                self.assertEqual(window.span, span)
                self.assertLessEqual(len(window.changes), dotproxy.History.POINTS + 1)

    def test_what_is_older_than_the_chart_is_not_shown(self) -> None:
        made = dotproxy.History()
        for now in (*range(0, 120, 10), 5000):  # stopped for more than an hour
            made.add(counts(), now)
        window = made.window()

        self.assertEqual([change.at for change in window.changes], [5000])
        self.assertEqual(window.points([1.0]), [(0.0, 1.0), (1.0, 1.0)])

    def test_points_stay_where_they_are(self) -> None:
        made = history(counts(n) for n in range(400))
        before = {change.at for change in made.window().changes[1:-1]}

        made.add(counts(400), 4000.0)

        after = {change.at for change in made.window().changes}
        self.assertLessEqual(before, after)

    def test_points_are_within_the_chart(self) -> None:
        for periods in (5, 100, 800):
            window = history(counts(n) for n in range(periods)).window()
            places = [x for x, _ in window.points([None] * len(window.changes))]
            self.assertEqual((places, places[-1]), (sorted(places), 1.0))
            self.assertGreaterEqual(places[0], 0.0)

    def test_first_change_is_drawn_from_its_start(self) -> None:
        window = history([counts(), counts(60)]).window()

        self.assertEqual(window.points([0.5]), [(1 - 10 / 600, 0.5), (1.0, 0.5)])
        self.assertEqual(window.points([]), [])

    def test_percentile_lies_within_its_bucket(self) -> None:
        buckets = [0] * (len(dotproxy.LATENCIES) + 1)
        buckets[0], buckets[3], buckets[-1] = 50, 40, 10

        self.assertEqual(dotproxy.percentile(buckets, 0.5), dotproxy.LATENCIES[0])
        self.assertEqual(dotproxy.percentile(buckets, 0.7), 0.0015)
        self.assertEqual(dotproxy.percentile(buckets, 0.99), dotproxy.LATENCIES[-1])


class WritingTest(DotproxyTestCase):
    def test_count_is_exact_for_programs(self) -> None:
        for number, text in (
            (0, "0"),
            (9_999_999, "9,999,999"),
            (12_345_678, "12.3\u202fM"),
            (999_999_999_999, "1,000\u202fG"),
            (10**21, "1,000,000\u202fP"),
        ):
            with self.subTest(number):
                wanted = f'<data value="{number}">{text}</data>'
                self.assertEqual(dotproxy.write_count(number), wanted)

    def test_latency_is_no_more_exact_than_the_buckets(self) -> None:
        for seconds, text in (
            (None, dotproxy.NONE),
            (0.0001, "&lt;\u202f0.25\u202fms"),
            (0.00068, "0.68\u202fms"),
            (0.0123, "12\u202fms"),
            (0.9994, "999\u202fms"),
            (0.9999, "1\u202fs"),
            (9.0, "&gt;\u202f8\u202fs"),
        ):
            with self.subTest(seconds):
                self.assertEqual(dotproxy.write_latency(seconds), text)

    def test_rest_is_written_for_people(self) -> None:
        for written, text in (
            (dotproxy.write_size(None), dotproxy.NONE),
            (dotproxy.write_size(32 << 20), "32\u202fMiB"),
            (dotproxy.write_share(None), dotproxy.NONE),
            (dotproxy.write_share(0.9876), "98.8\u202f%"),
            (dotproxy.write_rate(0.05), "0.05"),
            (dotproxy.write_rate(54321.0), "54,321"),
            (dotproxy.write_rate(2e5), "200\u202fk"),
            (dotproxy.write_age(-0.1), "0\u202fs"),
            (dotproxy.write_age(59.9), "59\u202fs"),
            (dotproxy.write_age(3599), "59\u202fmin"),
            (dotproxy.write_age(7260), "2\u202fh 1\u202fmin"),
            (dotproxy.write_age(90000), "1\u202fd 1\u202fh"),
        ):
            self.assertEqual(written, text)

    def test_scale_ends_in_a_round_number(self) -> None:
        for highest, top in (
            *((0.0, 1.0), (0.2, 1.0), (1.0, 1.0), (1.1, 2.0), (29.0, 40.0)),
            *((99.0, 100.0), (100.0, 100.0), (7e9, 8e9)),
        ):
            with self.subTest(highest):
                self.assertEqual(dotproxy.even_levels(highest), [top, top / 2, 0.0])

    def test_line_has_a_gap_where_nothing_is_known(self) -> None:
        points = [(0.0, 0.0), (0.25, 1.0), (0.5, None), (1.0, 0.5)]

        path = dotproxy.draw_line(points)

        first = "M0.0 100.0h0L0.0 100.0L250.0 0.0"
        self.assertEqual(path, f"{first}M1000.0 50.0h0L1000.0 50.0")


class Outline(html.parser.HTMLParser):
    """What a page consists of: its tags, attributes and text; all tags are closed."""

    VOID = frozenset(("meta", "link", "path", "rect"))

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: collections.Counter[str] = collections.Counter()
        self.attributes: list[tuple[str, str]] = []
        self.text: dict[str, str] = collections.defaultdict(str)
        self._open: list[str] = []
        self.feed(page)
        self.close()
        if self._open:
            raise ValueError(f"never closed: {self._open}")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID and self._open.pop() != tag:
            raise ValueError(f"closed out of order: {tag}")

    def handle_data(self, data: str) -> None:
        for tag in {*self._open, "everything"}:
            self.text[tag] += data


class StatusPageTest(DotproxyTestCase):
    NAMES = "192.0.2.1:853#dot.test", "192.0.2.2:853#dot.test"

    def status(
        self,
        *states: str,
        error: str = "timeout",
        turning: bool = True,
        trouble: str = "",
    ) -> dotproxy.Status:
        """Make the status of upstreams in these states, all up if none is given."""
        standings = [
            dotproxy.Standing(
                name,
                state,
                error,
                since=880.0 if state == "down" else None,
                failed_at=990.0 if state == "down" else None,
            )
            for name, state in zip(self.NAMES, states or ("up", "up"))
        ]
        return dotproxy.Status(
            figures=dotproxy.Figures(counts(30, 10)),
            window=history([counts(), counts(30, 10)]).window(),
            standings=standings,
            turning=turning,
            trouble=trouble,
            listen="127.0.0.1:5353",
            cache_limit=1 << 20,
            now=1000.0,
            wall=1_800_000_000.0,
        )

    def outline(self, status: dotproxy.Status) -> Outline:
        return Outline(dotproxy.draw_page(status))

    def test_upstream_of_a_routed_domain_alone_is_not_serving(self) -> None:
        status = self.status("down", "up", trouble="x")
        down, up = status.standings
        routed = up._replace(name="tcp://192.0.2.2:53", domain="lan")
        status = status._replace(standings=[down, routed])

        page = dotproxy.draw_page(status)

        self.assertEqual(dotproxy.describe_service(status)[0], "bad")
        self.assertIn("<small>for lan only</small>", page)

    def test_headline_says_whether_it_serves(self) -> None:
        outage = "no upstream has answered for 2\u202fmin"
        for states, trouble, kind, headline in (
            (("up", "up"), "", "good", "Serving: 2 of 2 upstreams up"),
            (("up", "down"), "", "warn", "Serving: 1 of 2 upstreams up"),
            (("up", "doubtful"), "", "warn", "Serving: 1 of 2 upstreams up"),
            (("new", "new"), "x", "warn", "Starting: no upstream is"),
            (("down", "down"), "", "warn", f"Serving from the cache alone: {outage}"),
            (("down", "new"), "x", "bad", f"Not serving: {outage}"),
        ):
            with self.subTest(headline, states=states):
                status = self.status(*states, trouble=trouble)
                self.assertEqual(dotproxy.describe_service(status)[0], kind)
                found = self.outline(status).text
                self.assertIn(headline, found["h1"])
                self.assertIn(headline, found["title"])

    def test_server_that_hangs_is_worse_than_any_upstream(self) -> None:
        kind, headline, why = dotproxy.describe_service(self.status(turning=False))

        self.assertEqual((kind, headline), ("bad", "Not serving"))
        self.assertIn("has not moved", why)

    def test_trouble_is_told_with_its_reason(self) -> None:
        text = self.outline(self.status("up", "down", error="refused")).text["main"]

        self.assertIn("192.0.2.2:853#dot.test: refused", text)
        self.assertIn("down for 2\u202fmin", text)
        self.assertIn("10\u202fs ago: refused", text)

    def test_figures_are_those_of_the_samples(self) -> None:
        outline = self.outline(self.status())

        for value in ("40", "30", "10"):
            self.assertIn(("value", value), outline.attributes)
        self.assertIn("75\u202f%", outline.text["dd"])

    def test_latencies_of_an_upstream_are_its_own(self) -> None:
        name = "dotproxy_upstream_request_duration_seconds"
        durations = [dotproxy.Histogram(dotproxy.LATENCIES) for _ in self.NAMES]
        durations[0].observe_all([0.003] * 9)
        durations[1].observe_all([0.3] * 9)
        samples = [(name, (who,), d) for who, d in zip(self.NAMES, durations)]
        status = self.status()._replace(figures=dotproxy.Figures(samples))

        page = dotproxy.draw_page(status)

        self.assertEqual(re.findall("<small>p95 (.*?)\u202f", page), ["3.9", "499"])

    def test_certificate_that_ends_soon_is_marked(self) -> None:
        for days, kind, text in (
            (60.2, "good", "60 days"),
            (13.0, "warn", "13 days"),
            (1.5, "warn", "36 h"),
            (-1.0, "bad", "expired"),
        ):
            with self.subTest(days):
                found = dotproxy.describe_certificate(1e9 + days * 86400, 1e9)
                self.assertEqual(found, (kind, text))

    def test_what_others_say_is_escaped(self) -> None:
        evil = "<script>alert(1)</script>\"'&"
        plain = self.outline(self.status("up", "down"))
        status = self.status("up", "down", error=evil)
        status = status._replace(
            listen=evil,
            standings=[
                each._replace(name=f"{number}#{evil}", domain=domain)
                for number, (each, domain) in enumerate(
                    zip(status.standings, (evil, ""))
                )
            ],
            figures=dotproxy.Figures(
                [
                    *counts(30, 10),
                    ("dotproxy_dns_responses_total", (evil, "cache"), 5),
                    ("dotproxy_pool_threads_busy", (evil,), 5),
                ]
            ),
        )
        found = self.outline(status)

        self.assertEqual(found.tags["script"], plain.tags["script"])
        self.assertEqual(set(found.attributes) & {("value", evil)}, set())
        self.assertEqual(found.text["main"].count(evil), 9)

    def test_nothing_comes_from_elsewhere(self) -> None:
        outline = self.outline(self.status())
        links = [v for name, v in outline.attributes if name in ("href", "src")]

        self.assertEqual(outline.tags["img"] + outline.tags["iframe"], 0)
        for link in links:
            self.assertRegex(link, r"\A(data:image/svg\+xml,|[a-z.]+\Z)")
        self.assertEqual([n for n, _ in outline.attributes if n.startswith("on")], [])
        self.assertNotIn("style", dict(outline.attributes))  # the policy forbids it
        self.assertNotIn("url(", dotproxy.STYLE)

    def test_policy_allows_the_style_and_the_script_and_nothing_else(self) -> None:
        text = self.outline(self.status()).text
        policy = dict(
            part.strip().split(" ", 1) for part in dotproxy.STATUS_POLICY.split(";")
        )

        for name in ("style", "script"):
            digest = hashlib.sha256(text[name].encode()).digest()
            wanted = f"'sha256-{base64.b64encode(digest).decode()}'"
            self.assertEqual(policy.pop(f"{name}-src"), wanted)
        self.assertEqual(policy.pop("connect-src"), "'self'")
        self.assertEqual(policy.pop("img-src"), "data:")
        self.assertEqual(set(policy.values()), {"'none'"})
        self.assertLessEqual(
            {"default-src", "base-uri", "form-action", "frame-ancestors"}, set(policy)
        )

    def test_reading_is_taken_each_period(self) -> None:
        clock, proxy = Clock(), mock.Mock()
        timer = ManualTimer(clock)
        pages = dotproxy.AdminPages(
            *(dotproxy.Metrics(), proxy, timer, lambda now: True),
            listen="",
            cache_limit=1,
            clock=clock,
        )
        pages.take_reading()
        timer.advance(30.1)

        self.assertEqual(len(pages._history._readings), 4)

    def test_every_source_has_a_colour(self) -> None:
        for name in (*dotproxy.SOURCES, *dotproxy.PERCENTILES):
            self.assertGreaterEqual(dotproxy.STYLE.count(f"--{name}: #"), 2, name)
            self.assertRegex(dotproxy.STYLE, rf"\.(fill|line)-{name} {{")


# ---- Command line --------------------------------------------------------------------


def configured(*arguments: str, **environment: str) -> dotproxy.Config:
    """Parse options, with an environment of these DOTPROXY_ variables."""
    variables = {f"DOTPROXY_{name}": text for name, text in environment.items()}
    return dotproxy.parse_args(arguments, variables)


OPTIONS: list[tuple[str, str, object]] = [
    ("listen", "127.0.0.1:5300", (("127.0.0.1", 5300),)),
    ("tls_listen", "127.0.0.1:8853", (("127.0.0.1", 8853),)),
    ("tls_cert", "/etc/chain.pem", "/etc/chain.pem"),
    ("tls_key", "/etc/key.pem", "/etc/key.pem"),
    ("upstream", "192.0.2.1#dot.test", (Endpoint("192.0.2.1", 853, "dot.test"),)),
    ("ca_file", "/etc/ca.pem", "/etc/ca.pem"),
    (
        "route",
        "corp.example=192.0.2.1#dot.test",
        (("corp.example", Endpoint("192.0.2.1", 853, "dot.test")),),
    ),
    ("pin", f"Cloudflare-DNS.com={GOOD_PIN}", (("cloudflare-dns.com", GOOD_PIN),)),
    ("tls_min", "1.3", "1.3"),
    ("strategy", "failover", "failover"),
    ("timeout", "2.5", 2.5),
    ("max_in_flight", "77", 77),
    ("max_tcp_clients", "7", 7),
    ("max_tcp_per_client", "5", 5),
    ("allow", "192.0.2.0/24", (ipaddress.ip_network("192.0.2.0/24"),)),
    ("rate_limit", "20", 20),
    ("rate_limit_all", "yes", True),
    ("cache_size", "64K", 65536),
    ("cache_min_ttl", "30", 30),
    ("cache_max_ttl", "3600", 3600),
    ("cache_fail_ttl", "2", 2),
    ("cache_stale", "0", 0),
    ("user", "www-data", "www-data"),
    ("forward_special", "Corp.Local.", (b"\4corp\5local\0",)),
    ("block_private_answers", "yes", True),
    ("allow_private", "Example.com", (b"\7example\3com\0",)),
    ("admin", "127.0.0.1:9999", ("127.0.0.1", 9999)),
    ("log_level", "debug", "debug"),
    ("log_format", "json", "json"),
    ("log_format", "json", "json"),
    ("query_log", "a.log", "a.log"),
    ("query_log_privacy", "hash", "hash"),
]
NEEDED = {"query_log_privacy": ("--query-log",)}  # with an option, else it is an error


class ConfigTest(DotproxyTestCase):
    def test_table_here_has_every_option(self) -> None:
        fields = set(dotproxy.Config._fields) - {"listen_given"} - dotproxy.ERRANDS

        self.assertEqual({name for name, _, _ in OPTIONS}, fields)

    def test_option_is_taken_from_the_command_line(self) -> None:
        for name, text, value in OPTIONS:
            flag = "--" + name.replace("_", "-")
            for arguments in ([flag, text], [f"{flag}={text}"]):
                with self.subTest(arguments=arguments):
                    config = configured(*arguments, *NEEDED.get(name, ()))
                    self.assertEqual(getattr(config, name), value)

    def test_option_is_taken_from_the_environment(self) -> None:
        for name, text, value in OPTIONS:
            with self.subTest(name):
                needed = NEEDED.get(name, ())
                config = configured(*needed, **{name.upper(): text})
                self.assertEqual(getattr(config, name), value)

    def test_errand_is_taken_from_the_command_line_alone(self) -> None:
        self.assertTrue(configured("--healthcheck").healthcheck)
        self.assertFalse(configured(HEALTHCHECK="1").healthcheck)

    def test_query_log_without_a_file_is_stderr(self) -> None:
        self.assertEqual(configured("--query-log").query_log, "-")
        self.assertEqual(configured(QUERY_LOG="-").query_log, "-")

    def test_privacy_without_a_query_log_is_an_error(self) -> None:
        with self.assertRaisesRegex(dotproxy.ConfigError, "needs --query-log"):
            configured(QUERY_LOG_PRIVACY="hash")

    def test_command_line_wins_over_the_environment(self) -> None:
        config = configured(
            "--timeout=1", "--listen=192.0.2.1", TIMEOUT="2", LISTEN="192.0.2.2"
        )

        self.assertEqual(config.timeout, 1)
        self.assertEqual(config.listen, (("192.0.2.1", 5353),))

    def test_admin_address_may_be_left_out_in_part_or_whole(self) -> None:
        for arguments, address in (
            ([], None),
            (["--admin"], ("127.0.0.1", 9153)),
            (["--admin", "9999"], ("127.0.0.1", 9999)),
            (["--admin", "192.0.2.1"], ("192.0.2.1", 9153)),
            (["--admin", "[::1]:0"], ("::1", 0)),
        ):
            with self.subTest(arguments=arguments):
                self.assertEqual(configured(*arguments).admin, address)

    def test_empty_variable_is_the_default(self) -> None:
        self.assertEqual(configured(TIMEOUT="", UPSTREAM=" "), dotproxy.Config())

    def test_list_in_the_environment_is_split_at_commas_and_spaces(self) -> None:
        for text in (
            "192.0.2.1,192.0.2.2",
            "192.0.2.1 192.0.2.2",
            "192.0.2.1, 192.0.2.2",
        ):
            with self.subTest(text):
                hosts = [host for host, _ in configured(LISTEN=text).listen]
                self.assertEqual(hosts, ["192.0.2.1", "192.0.2.2"])

    def test_option_given_twice_is_a_list_without_repetition(self) -> None:
        config = configured(
            "--upstream=192.0.2.1", "--upstream=192.0.2.2", "--upstream=192.0.2.1"
        )

        hosts = [endpoint.host for endpoint in config.upstream]
        self.assertEqual(hosts, ["192.0.2.1", "192.0.2.2"])

    def test_flag_is_on_where_it_is_given_or_says_so(self) -> None:
        self.assertTrue(configured("--block-private-answers").block_private_answers)
        for words, value in (
            (("1", "true", "yes", "on", "YES"), True),
            (("0", "false", "no", "off", "Off", ""), False),
        ):
            for text in words:
                with self.subTest(text):
                    config = configured(BLOCK_PRIVATE_ANSWERS=text)
                    self.assertEqual(config.block_private_answers, value)

    def test_flag_in_the_environment_can_be_taken_back(self) -> None:
        option = "--block-private-answers=no"
        config = configured(option, BLOCK_PRIVATE_ANSWERS="1")

        self.assertFalse(config.block_private_answers)

    def test_special_names_to_forward_syntax(self) -> None:
        for text, domain in {
            "all": b"\0",
            "ALL": b"\0",
            "localhost": b"\x09localhost\0",
            "10.in-addr.arpa": b"\x0210\7in-addr\4arpa\0",
            "in-addr.arpa": b"\7in-addr\4arpa\0",
            "a.b.onion": b"\1a\1b\5onion\0",
        }.items():
            with self.subTest(text):
                found = configured("--forward-special", text).forward_special
                self.assertEqual(found, (domain,))

    def test_listen_given_or_not_is_told(self) -> None:
        for config, given in (
            (configured(), False),
            (configured("--listen=192.0.2.1"), True),
            (configured(LISTEN="192.0.2.1"), True),
        ):
            with self.subTest(listen=config.listen):
                self.assertEqual(config.listen_given, given)

    def test_file_has_options_and_comments(self) -> None:
        with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
            file.write("# a comment\n\n--timeout 3 # another\n  --ca-file 'a b.pem'\n")
            file.write("--upstream=192.0.2.1#dot.test\n--upstream=192.0.2.2\n")
            file.flush()
            config = configured(f"@{file.name}", "--log-level=error", TIMEOUT="9")

        self.assertEqual((config.timeout, config.ca_file), (3, "a b.pem"))
        self.assertEqual([e.name for e in config.upstream], ["dot.test", "192.0.2.2"])
        self.assertEqual(config.log_level, "error")

    def test_listen_syntax(self) -> None:
        for text, address in {
            "127.0.0.1": ("127.0.0.1", 5353),
            "127.0.0.1:0": ("127.0.0.1", 0),
            "0.0.0.0:53": ("0.0.0.0", 53),
            "::1": ("::1", 5353),
            "[::1]": ("::1", 5353),
            "[::]:65535": ("::", 65535),
            "2001:DB8:0::1": ("2001:db8::1", 5353),
        }.items():
            with self.subTest(text):
                self.assertEqual(configured("--listen", text).listen, (address,))

    def test_tls_listen_is_on_port_853_by_default(self) -> None:
        for text, address in {
            "192.0.2.1": ("192.0.2.1", 853),
            "[::]": ("::", 853),
            "192.0.2.1:8853": ("192.0.2.1", 8853),
        }.items():
            with self.subTest(text):
                config = configured("--tls-listen", text)
                self.assertEqual(config.tls_listen, (address,))

    def test_list_of_encrypted_addresses_is_split_in_the_environment(self) -> None:
        config = configured(TLS_LISTEN="192.0.2.1,192.0.2.2 192.0.2.1")

        hosts = [host for host, _ in config.tls_listen]
        self.assertEqual(hosts, ["192.0.2.1", "192.0.2.2"])

    def test_upstream_syntax(self) -> None:
        for text, endpoint in {
            "192.0.2.1": ("192.0.2.1", 853, "192.0.2.1"),
            "192.0.2.1:8853": ("192.0.2.1", 8853, "192.0.2.1"),
            "192.0.2.1#dot.test": ("192.0.2.1", 853, "dot.test"),
            "192.0.2.1:8853#dot.test": ("192.0.2.1", 8853, "dot.test"),
            "192.0.2.1@8853#dot.test": ("192.0.2.1", 8853, "dot.test"),
            "tls://192.0.2.1": ("192.0.2.1", 853, "192.0.2.1"),
            "tls://dot.test:8853": ("dot.test", 8853, "dot.test"),
            "dot.test": ("dot.test", 853, "dot.test"),
            "dot.test#other.test": ("dot.test", 853, "other.test"),
            "2001:db8::1": ("2001:db8::1", 853, "2001:db8::1"),
            "[2001:db8::1]": ("2001:db8::1", 853, "2001:db8::1"),
            "[2001:db8::1]:8853#dot.test": ("2001:db8::1", 8853, "dot.test"),
            "2001:db8::1@8853#dot.test": ("2001:db8::1", 8853, "dot.test"),
            "tls://[2001:db8::1]:8853": ("2001:db8::1", 8853, "2001:db8::1"),
        }.items():
            with self.subTest(text):
                (found,) = configured("--upstream", text).upstream
                self.assertEqual(found, Endpoint(*endpoint))

    def test_endpoint_as_text_is_what_it_was_parsed_from(self) -> None:
        for text in (
            *("192.0.2.1:853#dot.test", "[2001:db8::1]:8853#dot.test"),
            *("tcp://192.0.2.1:53", "tcp://[2001:db8::1]:5353"),
        ):
            with self.subTest(text):
                _, endpoint = dotproxy.parse_route(f"corp.example={text}")
                self.assertEqual(str(endpoint), text)

    def test_route_syntax(self) -> None:
        for text, route in {
            "corp.example=192.0.2.1": ("corp.example", "192.0.2.1", 853, "192.0.2.1"),
            "Corp.Example.=192.0.2.1#a.b": ("corp.example", "192.0.2.1", 853, "a.b"),
            "lan=tls://192.0.2.1#a.b": ("lan", "192.0.2.1", 853, "a.b"),
            "lan=tcp://192.0.2.1": ("lan", "192.0.2.1", 53, ""),
            "lan=tcp://dns.test:5353": ("lan", "dns.test", 5353, ""),
            "lan=tcp://[2001:db8::1]": ("lan", "2001:db8::1", 53, ""),
            "_tcp.lan=tcp://192.0.2.1@53": ("_tcp.lan", "192.0.2.1", 53, ""),
            "10.in-addr.arpa=192.0.2.1": (
                *("10.in-addr.arpa", "192.0.2.1"),
                *(853, "192.0.2.1"),
            ),
        }.items():
            with self.subTest(text):
                ((domain, endpoint),) = configured("--route", text).route
                self.assertEqual((domain, *endpoint), route)

    def test_domain_may_have_several_servers_of_one_kind(self) -> None:
        texts = ["lan=tcp://192.0.2.1", "corp.example=192.0.2.2", "LAN=tcp://192.0.2.3"]

        domains = [domain for domain, _ in configured(ROUTE=" ".join(texts)).route]

        self.assertEqual(domains, ["lan", "corp.example", "lan"])

    def test_pin_may_be_for_the_server_of_a_domain(self) -> None:
        config = configured(
            "--route=lan=192.0.2.1#Dot.test", f"--pin=dot.test={GOOD_PIN}"
        )

        self.assertEqual(config.pin, (("dot.test", GOOD_PIN),))

    def test_flag_needs_no_value_on_the_command_line(self) -> None:
        config = configured("--rate-limit-all", "--rate-limit=7")

        self.assertEqual((config.rate_limit_all, config.rate_limit), (True, 7))

    def test_flag_in_the_environment(self) -> None:
        for text, value in {"1": True, "true": True, "Yes": True, "no": False}.items():
            with self.subTest(text):
                config = configured(RATE_LIMIT_ALL=text)
                self.assertIs(config.rate_limit_all, value)

    def test_allow_syntax(self) -> None:
        for text, network in {
            "192.0.2.1": "192.0.2.1/32",
            "192.0.2.7/24": "192.0.2.0/24",
            "2001:DB8::1/32": "2001:db8::/32",
            "0.0.0.0/0": "0.0.0.0/0",
            "::/0": "::/0",
        }.items():
            with self.subTest(text):
                (found,) = configured("--allow", text).allow
                self.assertEqual(str(found), network)

    def test_defaults_are_as_documented(self) -> None:
        config = configured()

        self.assertEqual(config.listen, (("127.0.0.1", 5353), ("::1", 5353)))
        names = {(endpoint.port, endpoint.name) for endpoint in config.upstream}
        self.assertEqual(names, {(853, "cloudflare-dns.com")})
        self.assertEqual(len(config.upstream), 4)

    def error_line(self, *arguments: str) -> str:
        """Run the program with bad options; return the line on stderr."""
        with contextlib.ExitStack() as stack:
            stderr = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            stack.enter_context(mock.patch.dict(os.environ, clear=True))
            stack.enter_context(mock.patch("logging.basicConfig"))
            stack.enter_context(mock.patch.object(dotproxy, "bind_servers", None))
            status = dotproxy.main(arguments)
        text = stderr.getvalue()
        self.assertEqual(status, 2)
        self.assertEqual((text.count("\n"), text[-1:]), (1, "\n"), text)
        return text

    def test_bad_option_is_one_line_that_names_it_and_status_2(self) -> None:
        for arguments, words in (
            (["--listen=localhost"], ["'localhost'", "IP address"]),
            (["--listen=192.0.2.1:65536"], ["'192.0.2.1:65536'", "port"]),
            (["--listen=192.0.2.1:-1"], ["'192.0.2.1:-1'", "port"]),
            (["--listen=192.0.2.1:"], ["'192.0.2.1:'", "port"]),
            (["--listen=192.0.2.1:dns"], ["'192.0.2.1:dns'", "port"]),
            (["--listen=192.0.2.1:٥٣"], ["port"]),
            (["--listen=[::1"], ["'[::1'", "[ADDRESS]:PORT"]),
            (["--listen=[::1]53"], ["'[::1]53'", "[ADDRESS]:PORT"]),
            (["--listen="], ["''"]),
            (["--upstream=192.0.2.1:0"], ["'192.0.2.1:0'"]),
            (["--upstream=192.0.2.1#"], ["'192.0.2.1#'"]),
            (["--upstream=192.0.2.1#bad name"], ["bad name"]),
            (["--upstream=https://dot.test"], ["https://dot.test"]),
            (["--upstream=bad/host"], ["'bad/host'"]),
            (["--upstream="], ["''"]),
            (["--upstream=tcp://192.0.2.1"], ["tcp://192.0.2.1", "--route"]),
            (["--route=lan"], ["'lan'", "DOMAIN="]),
            (["--route=lan="], ["'lan='", "DOMAIN="]),
            (["--route==192.0.2.1"], ["'=192.0.2.1'", "DOMAIN="]),
            (["--route=.=192.0.2.1"], ["'.=192.0.2.1'", "--upstream"]),
            (["--route=lan..=192.0.2.1"], ["'lan..=192.0.2.1'"]),
            (["--route=a b=192.0.2.1"], ["'a b=192.0.2.1'"]),
            (["--route=ł.example=192.0.2.1"], ["DOMAIN="]),
            ([f"--route={'a' * 64}=192.0.2.1"], ["DOMAIN="]),
            ([f"--route={'a.' * 127}a=192.0.2.1"], ["DOMAIN="]),
            (["--route=2001:db8::1=192.0.2.1"], ["in-addr.arpa"]),
            (["--route=192.0.2.1=192.0.2.1"], ["in-addr.arpa"]),
            (["--route=lan=tcp://"], ["''"]),
            (["--route=lan=tcp://192.0.2.1:0"], ["'192.0.2.1:0'"]),
            (["--route=lan=tcp://192.0.2.1#dot.test"], ["proves no name"]),
            (["--route=lan=tcp://tls://192.0.2.1"], ["tcp://HOST[:PORT]"]),
            (["--route=lan=tcp://tcp://192.0.2.1"], ["tcp://192.0.2.1"]),
            (
                ["--route=lan=tcp://192.0.2.1", "--route=lan=192.0.2.2"],
                ["--route lan", "clear text"],
            ),
            (["--pin=dot.test"], ["'dot.test'", "NAME=BASE64"]),
            ([f"--pin=dot.test={GOOD_PIN[:-1]}"], [GOOD_PIN[:-1], "NAME=BASE64"]),
            ([f"--pin=dot.test={GOOD_PIN[4:]}"], [GOOD_PIN[4:], "44 characters"]),
            ([f"--pin=dot.test={GOOD_PIN[:-4]}_n8="], ["_n8="]),
            ([f"--pin=bad name={GOOD_PIN}"], ["bad name"]),
            ([f"--pin=dot.test={GOOD_PIN}"], ["--pin dot.test", "cloudflare-dns.com"]),
            (
                ["--route=lan=tcp://192.0.2.1", f"--pin=dot.test={GOOD_PIN}"],
                ["they have cloudflare-dns.com\n"],
            ),
            (["--tls-min=1.1"], ["'1.1'", "1.2", "1.3"]),
            (["--strategy=best"], ["'best'", "fastest"]),
            (["--timeout=0"], ["'0'", "0.1 to 60"]),
            (["--timeout=nan"], ["'nan'"]),
            (["--timeout=soon"], ["'soon'"]),
            (["--max-in-flight=0"], ["'0'", "1 to 30000"]),
            (["--max-in-flight=1.5"], ["'1.5'"]),
            (["--max-tcp-clients=x"], ["'x'", "1 to 10000"]),
            (["--allow=192.0.2.0/33"], ["'192.0.2.0/33'", "192.0.2.0/24"]),
            (["--allow=everybody"], ["'everybody'", "2001:db8::/32"]),
            (["--allow=::ffff:192.0.2.0/120"], ["IPv4 network"]),
            (["--allow="], ["''"]),
            (["--rate-limit=-1"], ["'-1'", "0 to"]),
            (["--rate-limit-all=perhaps"], ["'perhaps'", "yes or no"]),
            (["--cache-size=-1"], ["'-1'", "32M"]),
            (["--cache-size=1KM"], ["'1KM'"]),
            (["--cache-size=M"], ["'M'"]),
            (["--cache-size="], ["''"]),
            (["--cache-max-ttl=x"], ["'x'", "0 to 604800"]),
            (["--forward-special=example.com"], ["'example.com'", "local", "all"]),
            (["--forward-special=xlocal"], ["'xlocal'", "10.in-addr.arpa"]),
            (["--forward-special="], ["''", "domain name"]),
            (["--block-private-answers=maybe"], ["'maybe'", "yes or no"]),
            (["--allow-private=192.0.2.1"], ["'192.0.2.1'", "domain name"]),
            (["--allow-private=2001:db8::1"], ["domain name"]),
            (["--allow-private=a..b"], ["'a..b'", "example.com"]),
            (["--allow-private=example.com"], ["--block-private-answers"]),
            (["--log-level=loud"], ["'loud'"]),
            (["--timeout"], ["--timeout"]),
            (["--tim=1"], ["--tim"]),
            (["--no-such-option"], ["--no-such-option"]),
            (["word"], ["word"]),
            (["@/no/such/file"], ["/no/such/file"]),
            (["--ca-file=/no/such.pem"], ["/no/such.pem", "--ca-file"]),
            ([f"--ca-file={dotproxy.__file__}"], ["dotproxy.py", "no certificate"]),
            (["--ca-file="], ["--ca-file", "path of a file"]),
            (["--upstream=dns.example.."], ["'dns.example..'"]),
            (["--upstream=192.0.2.1#dot.test.."], ["dot.test..", "TLS-NAME"]),
            (["--allow-private=example.."], ["'example..'"]),
            (["--tls-listen=localhost"], ["'localhost'", "127.0.0.1:853"]),
            (["--tls-listen=::1"], ["--tls-listen needs", "--tls-cert PEM"]),
            (["--tls-cert=/a.pem"], ["--tls-cert", "give --tls-listen"]),
            (["--tls-key=/a.pem"], ["--tls-key", "give --tls-listen"]),
            (["--tls-listen=::1", "--tls-key=/a.pem"], ["--tls-cert PEM"]),
            (["--tls-listen=::1", "--tls-cert=/no.pem"], ["/no.pem", "--tls-cert"]),
        ):
            with self.subTest(arguments=arguments):
                line = self.error_line(*arguments)
                for word in words:
                    self.assertIn(word, line)

    def test_bad_variable_is_named(self) -> None:
        with self.assertRaises(dotproxy.ConfigError) as caught:
            configured(TIMEOUT="soon")

        self.assertIn("timeout", str(caught.exception).lower())

    def test_what_is_bad_in_a_file_is_told_in_one_line(self) -> None:
        for octets in (
            b"--ca-file 'no end\n",
            b"--timeout=\xfc\n",
            b"--ca-file=a\0b\n",
            b"@PATH\n",
        ):
            with tempfile.NamedTemporaryFile(suffix=".conf") as file:
                file.write(octets.replace(b"PATH", file.name.encode()))
                file.flush()
                with self.subTest(octets):
                    self.assertIn("dotproxy: ", self.error_line(f"@{file.name}"))

    def test_dot_at_the_end_of_a_name_is_not_in_certificates(self) -> None:
        pin = f"--pin=DNS.example.={GOOD_PIN}"
        config = configured("--upstream=dns.example.", pin)

        self.assertEqual(
            config.upstream, (Endpoint("dns.example.", 853, "dns.example"),)
        )
        self.assertEqual(config.pin, (("dns.example", GOOD_PIN),))

    def printed(self, option: str) -> str:
        stdout = io.StringIO()
        with (
            contextlib.redirect_stdout(stdout),
            self.assertRaises(SystemExit) as caught,
        ):
            configured(option)
        self.assertFalse(caught.exception.code)
        return stdout.getvalue()

    def test_version_is_printed(self) -> None:
        self.assertEqual(
            self.printed("--version"), f"dotproxy {dotproxy.__version__}\n"
        )

    def test_help_fits_80_columns_and_names_every_option(self) -> None:
        text = self.printed("--help")

        self.assertLessEqual(max(map(len, text.splitlines())), 80)
        for name, _, _ in OPTIONS:
            self.assertIn("--" + name.replace("_", "-"), text)

    def test_bind_error_names_the_port_and_the_likely_holder(self) -> None:
        for number, port, words in (
            (errno.EADDRINUSE, 5353, ["port 5353", "multicast DNS", "avahi-daemon"]),
            (errno.EADDRINUSE, 53, ["port 53", "systemd-resolved"]),
            (errno.EADDRINUSE, 8053, ["port 8053", "another program"]),
            (errno.EACCES, 53, ["port 53", "no permission", "root"]),
            (errno.EADDRNOTAVAIL, 53, ["192.0.2.1:53", "no such address"]),
            (errno.ENOBUFS, 53, ["192.0.2.1:53", "No buffer space"]),
        ):
            with self.subTest(number=number, port=port):
                error = OSError(number, os.strerror(number))
                text = dotproxy.describe_bind_error(error, ("192.0.2.1", port))
                for word in (*words, "--listen"):
                    self.assertIn(word, text)

    def test_bind_error_of_ipv6_proposes_an_address_that_parses(self) -> None:
        error = OSError(errno.EADDRINUSE, "taken")

        text = dotproxy.describe_bind_error(error, ("::1", 53))

        proposed = text.rpartition(" ")[2]
        self.assertEqual(dotproxy.parse_listen(proposed), ("::1", 5354))

    def test_bind_error_of_encrypted_clients_names_their_option(self) -> None:
        for number, words in (
            (errno.EADDRINUSE, ["port 853", "DNS-over-TLS server", "192.0.2.1:8853"]),
            (errno.EACCES, ["no permission for port 853", "root"]),
            (errno.EADDRNOTAVAIL, ["no such address"]),
        ):
            error = OSError(number, os.strerror(number))
            text = dotproxy.describe_bind_error(
                error, ("192.0.2.1", 853), "--tls-listen"
            )
            for word in (*words, "--tls-listen"):
                with self.subTest(number=number):
                    self.assertIn(word, text)

    def test_encrypted_port_taken_frees_the_others(self) -> None:
        with socket.create_server((LOCALHOST, 0)) as holder, FakeUpstream() as upstream:
            port = holder.getsockname()[1]
            config = configure(
                upstream, f"--tls-listen={LOCALHOST}:{port}", ENCRYPTED[1]
            )
            with self.assertRaises(dotproxy.ConfigError) as caught:
                dotproxy.Daemon(config)

        self.assertEqual(caught.exception.status, 1)
        self.assertIn(f"port {port} is taken", str(caught.exception))

    def test_default_address_that_the_host_lacks_is_skipped(self) -> None:
        def lacking(*_: object) -> None:
            raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")

        bind = mock.patch.object(dotproxy, "bind_port", lacking)
        logs = self.assertLogs(dotproxy.logger, "INFO")
        fails = self.assertRaises(dotproxy.ConfigError)
        with bind, logs as logged, fails as caught:
            dotproxy.Daemon(configured(f"--ca-file={PKI.ca}"))

        self.assertEqual(len(logged.output), 2)
        self.assertEqual(caught.exception.status, 1)

    def test_wildcard_of_a_family_that_the_host_lacks_is_skipped(self) -> None:
        server = mock.Mock()

        def without_v6(address: Address, bind: object) -> tuple[mock.Mock]:
            if ":" in address[0]:
                raise OSError(errno.EAFNOSUPPORT, "Address family not supported")
            return (server,)

        def bind(*hosts: str) -> list[object]:
            addresses = [(host, 53) for host in hosts]
            return [*dotproxy.bind_servers(addresses, mock.Mock(), True)]

        with (
            mock.patch.object(dotproxy, "bind_port", without_v6),
            self.assertLogs(dotproxy.logger, "INFO") as logged,
        ):
            self.assertEqual(bind("0.0.0.0", "::"), [server])
            for hosts in (("::",), ("0.0.0.0", "2001:db8::1")):
                self.assertRaises(dotproxy.ConfigError, bind, *hosts)

        self.assertIn("not listening: address=:: error=", logged.output[0])


# ---- Doctor --------------------------------------------------------------------------

OK, WARN, FAIL = dotproxy.OK, dotproxy.WARN, dotproxy.FAIL
DAY = 86400
HOST_TABLE = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt uid inode
   0: {0}:14E9 00000000:0000 {1} 00000000:00000000 00:00000000 00000000 0 0 77 1 0
"""


class HostExaminationTest(DotproxyTestCase):
    def test_clock_before_the_release_fails(self) -> None:
        finding = dotproxy.examine_clock(dotproxy.RELEASED - 1, [])

        self.assertEqual(finding.result, FAIL)
        self.assertIn("2026-10-31 23:59 UTC, which is before", finding.detail)
        self.assertIn("set the clock", finding.cure)

    def test_clock_is_judged_by_the_certificates(self) -> None:
        now = dotproxy.RELEASED + 30 * DAY
        current, past = (now - DAY, now + DAY), (now - 9 * DAY, now - DAY)
        for dates, result in (
            ([], OK),
            ([current], OK),
            ([past, current], OK),
            ([past], WARN),
            ([(now + DAY, now + 9 * DAY), past], WARN),
        ):
            with self.subTest(dates=dates):
                self.assertEqual(dotproxy.examine_clock(now, dates).result, result)

    def test_few_descriptors_are_noted_with_the_number_needed(self) -> None:
        options = ("--max-tcp-clients=100", "--upstream=192.0.2.1")
        plain, routed = configured(*options), configured(*options, "--route=a=tcp://b")
        # 100 clients twice, 4 connections, 16 of single queries, 2 addresses twice, 16
        unlimited = resource.RLIM_INFINITY
        for config, limit, needed, result in (
            (plain, 240, 240, OK),
            (plain, 239, 240, WARN),
            (plain, unlimited, 240, OK),
            (routed, 240, 260, WARN),
        ):
            with self.subTest(limit=limit, needed=needed):
                finding = dotproxy.examine_descriptors(config, limit)
                self.assertEqual(finding.result, result)
                self.assertIn(f"{needed} ", finding.detail)

    def test_user_that_the_proxy_would_run_as_is_told(self) -> None:
        for uid, wanted, result, text in (
            (0, None, OK, "root becomes nobody ("),
            (0, "4711", OK, "root becomes 4711 (4711)"),
            (0, "root", WARN, "root stays root"),
            (0, "no-such-user", FAIL, "there is no user or group 'no-such-user'"),
            (4711, None, OK, "4711, not root"),
            (4711, "4712", FAIL, "only root can become user 4712"),
        ):
            with self.subTest(uid=uid, wanted=wanted):
                with mock.patch.object(os, "geteuid", return_value=uid):
                    finding = dotproxy.examine_user(wanted)
                self.assertEqual(finding.result, result)
                self.assertIn(text, finding.detail)
                self.assertEqual(bool(finding.cure), result != OK)

    def test_parts_that_cannot_be_made_fail_with_their_cure(self) -> None:
        for arguments, check, cure in (
            (["--tls-listen=127.0.0.1:0"], "own certificate", "give --tls-cert"),
            (["--tls-cert=/nonexistent"], "own certificate", "give --tls-listen"),
            (["--allow-private=lan"], "private answers", "give --block-private"),
        ):
            with self.subTest(arguments):
                (found,) = dotproxy.examine_parts(configured(*arguments))
                self.assertEqual((found.check, found.result), (check, FAIL))
                self.assertIn(cure, found.cure)
        self.assertEqual(dotproxy.examine_parts(configured()), [])

    def test_authorities_are_counted_with_where_they_are_from(self) -> None:
        finding = dotproxy.examine_authorities(dotproxy.Trust(PKI.ca))

        self.assertEqual(finding[1:3], (OK, f"1 from {PKI.ca}"))

    def test_missing_authorities_fail(self) -> None:
        nothing = {"SSL_CERT_FILE": "/nonexistent/a", "SSL_CERT_DIR": "/nonexistent/b"}
        with mock.patch.dict(os.environ, nothing):
            finding = dotproxy.examine_authorities(dotproxy.Trust())

        self.assertEqual(finding.result, FAIL)
        self.assertIn("none in /nonexistent/a or /nonexistent/b", finding.detail)
        self.assertIn("install ca-certificates", finding.cure)

    def test_free_address_is_free(self) -> None:
        finding = dotproxy.examine_address((LOCALHOST, 0), given=True)

        self.assertEqual(finding[1:3], (OK, "free for UDP and TCP"))

    def test_address_that_the_host_does_not_have(self) -> None:
        for given, result in ((True, FAIL), (False, OK)):
            with self.subTest(given=given):
                finding = dotproxy.examine_address(("192.0.2.1", 5353), given)
                self.assertEqual(finding.result, result)
                self.assertIn("this host has no such address", finding.detail)

    @unittest.skipUnless(sys.platform == "linux", "needs /proc")
    def test_holder_of_a_port_is_named(self) -> None:
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            with self.subTest(kind=kind), socket.socket(type=kind) as holder:
                holder.bind((LOCALHOST, 0))
                if kind == socket.SOCK_STREAM:
                    holder.listen()
                finding = dotproxy.examine_address(holder.getsockname(), given=True)
                self.assertEqual(finding.result, FAIL)
                self.assertIn(f"(pid {os.getpid()})", finding.detail)
                self.assertIn("choose another port with --listen", finding.cure)

    def test_port_of_somebody_who_cannot_be_seen_is_noted(self) -> None:
        unseen = mock.patch.object(dotproxy, "find_holders", return_value=[])
        with socket.create_server((LOCALHOST, 0)) as holder, unseen:
            address = holder.getsockname()
            finding = dotproxy.examine_stream_address(address, "HTTP", "--admin")

        self.assertEqual(finding.result, dotproxy.WARN)
        self.assertIn("if it is not dotproxy, ", finding.cure)

    def test_options_that_want_the_same_port_are_told(self) -> None:
        for arguments, text in (
            (["--listen=127.0.0.1:53", "--admin=53"], "--listen and --admin"),
            (["--listen=0.0.0.0:53", "--listen=127.0.0.1:53"], "127.0.0.1:53"),
            (["--listen=[::1]:53", "--tls-listen=[::]:53"], "[::]:53"),
        ):
            with (
                self.subTest(text),
                self.assertRaisesRegex(dotproxy.ConfigError, re.escape(text)),
            ):
                dotproxy.check_addresses(configured(*arguments))
        for arguments in (
            ["--listen=0.0.0.0:53", "--listen=[::]:53"],
            ["--listen=127.0.0.1:53", "--listen=127.0.0.2:53"],
            ["--listen=127.0.0.1:0", "--admin=0"],
        ):
            with self.subTest(arguments):
                dotproxy.check_addresses(configured(*arguments))

    def test_query_log_that_cannot_be_written_is_told(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name in ("", "absent/query.log"):
                with self.assertRaisesRegex(dotproxy.ConfigError, "mend --query-log"):
                    dotproxy.check_query_log(os.path.join(folder, name))
            path = os.path.join(folder, "query.log")
            dotproxy.check_query_log(path)
            self.assertFalse(os.path.exists(path))
        dotproxy.check_query_log("-")

    def test_address_for_encrypted_clients_is_examined(self) -> None:
        with socket.create_server((LOCALHOST, 0)) as holder:
            address = holder.getsockname()
            taken = dotproxy.examine_stream_address(address, "TLS", "--tls-listen")
            ours = mock.patch.object(dotproxy, "find_holders", lambda *_: ["dotproxy"])
            with ours:
                running = dotproxy.examine_stream_address(
                    address, "TLS", "--tls-listen"
                )
        free = dotproxy.examine_stream_address(address, "TLS", "--tls-listen")

        results = [finding.result for finding in (taken, running, free)]
        self.assertEqual(results, [FAIL, OK, OK])
        self.assertIn("--tls-listen", taken.cure)

    def test_port_that_a_running_dotproxy_holds_is_well(self) -> None:
        with serving(answer) as served:
            finding = dotproxy.examine_holder(
                "port", served.address, ["dotproxy (pid 7)"], "taken; stop it"
            )

        self.assertEqual((finding.result, finding.cure), (OK, ""))
        self.assertIn("held by dotproxy (pid 7), which runs; healthy", finding.detail)

    def test_running_dotproxy_that_is_not_healthy_is_noted(self) -> None:
        sick = dotproxy.Checkup(False, "upstream down: no answer")
        with mock.patch.object(dotproxy, "check_health", return_value=sick):
            finding = dotproxy.examine_holder(
                "port", (LOCALHOST, 1), ["dotproxy (pid 7)"], "taken; stop it"
            )

        self.assertEqual(finding.result, WARN)
        self.assertIn("which runs; upstream down: no answer", finding.detail)

    def test_port_with_closed_connections_is_free(self) -> None:
        with socket.create_server((LOCALHOST, 0)) as listener:
            address = listener.getsockname()
            with socket.create_connection(address):
                listener.accept()[0].close()  # this end stays, in TIME_WAIT

        self.assertEqual(dotproxy.examine_address(address, given=True).result, OK)

    def test_options_and_program_are_told(self) -> None:
        options, program = dotproxy.describe_host(configured("--route=a=tcp://b"))

        self.assertEqual(options[1:], (OK, "valid; 2 to listen on, 5 upstream", ""))
        self.assertEqual(program.result, OK)
        self.assertIn(f"dotproxy {dotproxy.__version__}, Python 3.", program.detail)

    def test_holder_that_cannot_be_seen_is_asked_for_dns(self) -> None:
        with serving(answer) as served:
            here = dotproxy.examine_holder("port", served.address, [], "taken; stop it")
        gone = dotproxy.examine_holder("port", served.address, [], "taken; stop it")

        self.assertEqual((here.result, gone.result), (WARN, FAIL))
        self.assertEqual(here.cure, "if it is not dotproxy, stop it")

    def test_sockets_that_bar_an_address_are_found(self) -> None:
        def hexadecimal(address: str) -> str:
            packed = ipaddress.ip_address(address).packed
            words = struct.unpack(f"={len(packed) // 4}I", packed)
            return "".join(f"{word:08X}" for word in words)

        wanted = "192.0.2.1"
        for host, state, bars in (
            ("192.0.2.1", "07", True),
            ("192.0.2.1", "0A", True),
            ("192.0.2.1", "01", False),
            ("192.0.2.2", "07", False),
            ("0.0.0.0", "07", True),
            ("::", "07", True),
            ("::ffff:192.0.2.1", "07", True),
            ("2001:db8::1", "07", False),
        ):
            with self.subTest(host=host, state=state):
                table = HOST_TABLE.format(hexadecimal(host), state).splitlines()
                found = dotproxy.socket_inodes(table, (wanted, 5353))
                self.assertEqual(found, {"77"} if bars else set())
                self.assertFalse(dotproxy.socket_inodes(table, (wanted, 5354)))


def servfail_with_reason(message: Message, _: FakeConnection) -> Reply:
    """Answer SERVFAIL with an Extended DNS Error."""
    return response(message.raw, rcode=2, options=option(EDE, b"\0\x17for a reason"))


class ExaminationTest(DotproxyTestCase):
    def examine(
        self, where: FakeUpstream | Endpoint, *, idle: bool = False
    ) -> dict[str, dotproxy.Finding]:
        """Examine an upstream; return the findings by their check."""
        if isinstance(where, FakeUpstream):
            where = Endpoint(where.host, where.port, "dot.test")
        trust = dotproxy.Trust(PKI.ca)
        self.examination = dotproxy.Examination(where, trust, idle=idle)
        (report,) = dotproxy.examine_upstreams([self.examination])
        self.assertEqual(report.subject, str(where))
        return {finding.check: finding for finding in report.findings}

    def impatient(self, **limits: float) -> None:
        """Set limits of examinations for this test."""
        for name, seconds in limits.items():
            patch = mock.patch.object(dotproxy.Examination, name, seconds)
            patch.start()
            self.addCleanup(patch.stop)

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

    def test_unverified_upstream_fails_and_sees_no_query(self) -> None:
        for certificate, text, cure in (
            (PKI.wrong_name, "for other.test, alias.other.test, not for", "#NAME with"),
            (PKI.expired, "certificate expired", "renew it there"),
            (PKI.unknown_ca, "from an unknown CA", "--ca-file"),
        ):
            with self.subTest(text), FakeUpstream(certificate=certificate) as upstream:
                found = self.examine(upstream)
                self.assertEqual(list(found), ["connect", "certificate", "shown"])
                self.assertEqual(found["certificate"].result, FAIL)
                self.assertIn(text, found["certificate"].detail)
                self.assertIn(cure, found["certificate"].cure)
                self.assertEqual(found["shown"].result, WARN)
                self.assertIn("valid from 2020-01-01 00:00", found["shown"].detail)
                self.assertIn(GOOD_PIN, found["shown"].detail)
                self.assertEqual(upstream.queries, [])
                self.assertIsNotNone(self.examination.dates)

    def test_refused_connection_fails(self) -> None:
        with FakeUpstream() as upstream:
            pass
        found = self.examine(upstream)

        self.assertEqual(list(found), ["connect"])
        self.assertIn("connection refused", found["connect"].detail)
        self.assertIn("the port in --upstream", found["connect"].cure)

    def test_server_that_does_not_shake_hands_fails(self) -> None:
        self.impatient(STEP=0.1)
        for behaviour, text in (("hang", "no end of"), ("garbage", "TLS handshake")):
            with self.subTest(behaviour), FakeUpstream(on_accept=behaviour) as upstream:
                finding = self.examine(upstream)["handshake"]
                self.assertEqual(finding.result, FAIL)
                self.assertIn(text, finding.detail)
                self.assertTrue(finding.cure)

    def test_upstream_without_answers_fails(self) -> None:
        self.impatient(STEP=0.2)
        for script, text in (
            (silence, "no answer within 0.2 s"),
            (close, "closed by the server"),
            (servfail_with_reason, "answers SERVFAIL to . NS: for a reason"),
        ):
            with self.subTest(text), FakeUpstream(script) as upstream:
                finding = self.examine(upstream)["answers"]
                self.assertEqual((finding.result, finding.detail), (FAIL, text))
                self.assertTrue(finding.cure)

    def test_session_that_is_not_resumed_is_told(self) -> None:
        forget = mock.patch.object(Connection, "session", return_value=None)
        with FakeUpstream() as upstream, forget:
            found = self.examine(upstream)

        self.assertEqual(found["resumption"].result, OK)
        self.assertIn("session not resumed", found["resumption"].detail)

    def test_error_of_ours_is_a_failure(self) -> None:
        broken = mock.patch.object(dotproxy, "reach", side_effect=RuntimeError)
        with broken, self.assertLogs(dotproxy.logger, "ERROR"):
            found = self.examine(Endpoint("192.0.2.1", 853, "dot.test"))

        self.assertEqual(found["connect"].result, FAIL)
        self.assertIn("internal error", found["connect"].detail)

    def test_answers_out_of_order_are_noticed(self) -> None:
        late: list[Message] = []

        def script(message: Message, connection: FakeConnection) -> Reply:
            if message.qname.endswith("example.com"):
                late.append(message)
                return None
            own = response(message.raw)
            connection.send(own, *[response(each.raw) for each in late])
            late.clear()
            return None

        with FakeUpstream(script) as upstream:
            found = self.examine(upstream)

        self.assertEqual(found["order"].detail, "answers as they are ready")

    def test_answer_that_never_comes_was_overtaken(self) -> None:
        self.impatient(STEP=0.3)

        def script(message: Message, connection: FakeConnection) -> Reply:
            late = message.qname.endswith("example.com")
            return None if late else response(message.raw)

        with FakeUpstream(script) as upstream:
            found = self.examine(upstream)

        self.assertEqual(found["order"][1:3], (OK, "answers as they are ready"))

    def test_padding_and_keepalive_are_told(self) -> None:
        padding = option(PADDING, bytes(468 - 17 - 11 - 6 - 4))
        options = option(KEEPALIVE, b"\0\x64") + padding

        def script(message: Message, connection: FakeConnection) -> Reply:
            return response(message.raw, options=options)

        with FakeUpstream(script) as upstream:
            found = self.examine(upstream)

        self.assertEqual(found["keepalive"].detail, "10 s")
        self.assertIn("answers of 468 octets", found["padding"].detail)
        self.assertNotIn("none", found["padding"].detail)

    def test_idle_life_is_measured(self) -> None:
        self.impatient(IDLE_LIMIT=5.0)
        with FakeUpstream(idle_timeout=0.3) as upstream:
            found = self.examine(upstream, idle=True)

        self.assertEqual(found["idle"].result, OK)
        self.assertRegex(found["idle"].detail, r"\Aclosed after \d\.\d s\Z")

    def test_connection_that_stays_open_is_told(self) -> None:
        self.impatient(IDLE_LIMIT=0.1)
        with FakeUpstream() as upstream:
            found = self.examine(upstream, idle=True)

        self.assertEqual(found["idle"].detail, "still open after 0.1 s")

    def test_other_key_than_was_pinned_fails(self) -> None:
        trust = dotproxy.Trust(PKI.ca, pins=[("dot.test", GOOD2_PIN)])
        with FakeUpstream() as upstream:
            endpoint = Endpoint(upstream.host, upstream.port, "dot.test")
            patient = dotproxy.Examination(endpoint, trust)
            (report,) = dotproxy.examine_upstreams([patient])

        _, failed, shown = report.findings
        self.assertEqual((failed.check, failed.result), ("certificate", FAIL))
        self.assertIn(f"give --pin dot.test={GOOD_PIN}", failed.cure)
        self.assertIn(f"pin {GOOD_PIN}; not trusted", shown.detail)
        self.assertEqual(upstream.queries, [])

    def test_plain_server_of_a_domain_is_asked_for_that_alone(self) -> None:
        with FakeUpstream(on_accept="plain") as server:
            endpoint = Endpoint(server.host, server.port, "")
            patient = dotproxy.Examination(
                endpoint, dotproxy.Trust(PKI.ca), domain="corp.example"
            )
            (report,) = dotproxy.examine_upstreams([patient])

        self.assertEqual(report.subject, f"{endpoint} for corp.example")
        self.assertEqual({finding.result for finding in report.findings}, {OK})
        found = {finding.check: finding.detail for finding in report.findings}
        self.assertEqual(found["handshake"], "none: plain DNS in clear text")
        self.assertFalse({"resumption", "pin", "certificate"} & set(found))
        names = {message.qname for message in server.queries}
        self.assertEqual({name[-12:] for name in names}, {"corp.example"})
        sizes = {len(message.raw) for message in server.queries}
        self.assertEqual(max(sizes), 12 + 17 + 18 + 11 + 4)  # nothing is padded

    def test_cure_for_a_server_of_a_domain_is_another_route(self) -> None:
        with FakeUpstream() as server:
            endpoint = Endpoint(server.host, server.port, "dot.test")
        patient = dotproxy.Examination(
            endpoint, dotproxy.Trust(PKI.ca), domain="corp.example"
        )
        (report,) = dotproxy.examine_upstreams([patient])

        cure = "check the address and the port in --route"
        self.assertEqual(report.findings[-1].cure, cure)

    def test_samples_end_with_their_time(self) -> None:
        self.impatient(SAMPLE_TIME=0.0001)
        with FakeUpstream() as upstream:
            found = self.examine(upstream)

        self.assertIn("most of 1)", found["latency"].detail)

    def test_name_without_an_address_fails(self) -> None:
        lookup = mock.patch.object(socket, "getaddrinfo", side_effect=socket.gaierror)
        with lookup:
            found = self.examine(Endpoint("dns.example", 853, "dns.example"))

        self.assertIn("cannot look up the address", found["connect"].detail)
        self.assertIn("--upstream ADDRESS#dns.example", found["connect"].cure)

    def test_one_family_out_of_reach_is_noted(self) -> None:
        error = UpstreamError("unreachable", "no route")
        roads = [
            dotproxy.Road("IPv4 127.0.0.1", 0.001),
            dotproxy.Road("IPv6 2001:db8::1", 0.0, error),
        ]
        reach = mock.patch.object(dotproxy, "reach", return_value=roads)
        with FakeUpstream() as upstream, reach:
            finding = self.examine(upstream)["connect"]

        text = "IPv4 127.0.0.1: 1.0 ms; IPv6 2001:db8::1: no route"
        self.assertEqual(finding[1:3], (WARN, text))

    def test_each_family_is_connected_to(self) -> None:
        with FakeUpstream() as upstream:
            for host in (LOCALHOST, LOCALHOST_V6):
                endpoint = Endpoint(host, upstream.port, "dot.test")
                (road,) = dotproxy.reach(endpoint, 1.0, time.monotonic)
                self.assertIn(host, road.name)
                failed = road.failure.cause if road.failure else None
                self.assertEqual(failed, None if host == LOCALHOST else "refused")

    def test_missing_ipv6_is_excused_where_another_upstream_answers(self) -> None:
        def reach(endpoint: Endpoint, *_: object) -> list[dotproxy.Road]:
            error = UpstreamError("unreachable", f"no route to {endpoint.host}")
            local = endpoint.host == LOCALHOST
            return [dotproxy.Road(endpoint.host, 0.0, None if local else error)]

        trust = dotproxy.Trust(PKI.ca)
        with FakeUpstream() as upstream, mock.patch.object(dotproxy, "reach", reach):
            v4 = Endpoint(LOCALHOST, upstream.port, "dot.test")
            hosts = ("2001:db8::1", "192.0.2.1")
            others = [Endpoint(host, 853, "dot.test") for host in hosts]
            for endpoints, results in (
                ([v4, *others], [OK, WARN, FAIL]),
                (others, [FAIL, FAIL]),
            ):
                patients = [dotproxy.Examination(each, trust) for each in endpoints]
                reports = dotproxy.examine_upstreams(patients)
                found = [report.findings[-1].result for report in reports]
                self.assertEqual(found, results)
            routed = dotproxy.Examination(others[0], trust, domain="corp.example")
            reports = dotproxy.examine_upstreams(
                [dotproxy.Examination(v4, trust), routed]
            )
            self.assertEqual(reports[1].findings[-1].result, FAIL)

    def test_examination_that_hangs_is_given_up(self) -> None:
        self.impatient(TIME_LIMIT=-0.9)  # a second more is allowed for
        go_on = threading.Event()

        def reach(*_: object) -> list[dotproxy.Road]:
            go_on.wait(5)
            raise UpstreamError("resolve", "too late")

        with mock.patch.object(dotproxy, "reach", reach):
            found = self.examine(Endpoint("192.0.2.1", 853, "dot.test"))
            go_on.set()
            wait_until(lambda: not self.examination.running)

        self.assertEqual(found["connect"].result, FAIL)
        self.assertIn("no end within", found["connect"].detail)

    def test_upstreams_beyond_the_bound_take_their_turn(self) -> None:
        trust = dotproxy.Trust(PKI.ca)
        running: list[int] = []
        patients: list[dotproxy.Examination] = []

        def reach(*_: object) -> list[dotproxy.Road]:
            running.append(sum(patient.running for patient in patients))
            raise UpstreamError("refused", "no")

        for number in range(5):
            endpoint = Endpoint(f"192.0.2.{number}", 853, "dot.test")
            patients.append(dotproxy.Examination(endpoint, trust))
        with mock.patch.multiple(dotproxy, reach=reach, EXAMINERS=2):
            reports = dotproxy.examine_upstreams(patients)

        self.assertEqual(len(reports), 5)
        self.assertLessEqual(max(running), 2)

    def test_certificate_near_its_end_is_noted(self) -> None:
        for days, result in ((13, WARN), (14, OK)):
            with self.subTest(days=days):
                peer = dotproxy.Peer(
                    *("TLSv1.3", "", "", False), ["a.example"], der(PKI.good)
                )
                found = dotproxy.examine_peer(peer, days * DAY, 0.0, 0.0)
                (finding,) = [each for each in found if each.check == "certificate"]
                self.assertEqual(finding.result, result)
                self.assertIn(f"for a.example; {days} days left", finding.detail)

    def test_slow_answers_are_noted(self) -> None:
        slow = dotproxy.examine_latency([0.9, 0.6, 0.1], 0.5)
        fast = dotproxy.examine_latency([0.9, 0.002, 0.001], 0.5)

        self.assertEqual((slow.result, fast.result), (WARN, OK))
        self.assertIn("1.0 ms / 2.0 ms / 900.0 ms", fast.detail)


REPORTS = [
    dotproxy.Report("this host", [dotproxy.Finding("clock", OK, "it ticks")]),
    dotproxy.Report(
        "192.0.2.1:853#dot.test",
        [
            dotproxy.Finding("connect", OK, "1.0 ms"),
            dotproxy.Finding("certificate", FAIL, "bad \x1b[31m", "renew it"),
        ],
    ),
]


class DoctorReportTest(DotproxyTestCase):
    def test_table_has_a_line_for_each_check_and_cure(self) -> None:
        self.assertEqual(
            dotproxy.text_report(REPORTS).splitlines(),
            [
                "this host",
                "  clock        ok    it ticks",
                "192.0.2.1:853#dot.test",
                "  connect      ok    1.0 ms",
                "  certificate  FAIL  bad ?[31m",
                "",
                "3 checks: 1 failed, 0 to note",
                "  192.0.2.1:853#dot.test, certificate: renew it",
            ],
        )

    def test_object_has_the_worst_result_and_every_check(self) -> None:
        found = json.loads(dotproxy.json_report(REPORTS))

        self.assertEqual((found["result"], len(found["checks"])), (FAIL, 3))
        self.assertEqual(
            found["checks"][0],
            {
                **{"subject": "this host", "check": "clock", "result": OK},
                **{"detail": "it ticks", "cure": ""},
            },
        )
        self.assertEqual(json.loads(dotproxy.json_report(REPORTS[:1]))["result"], OK)

    def test_host_comes_first_then_each_upstream(self) -> None:
        with FakeUpstream() as upstream:
            config = configure(upstream, host=LOCALHOST_V6)
            reports = dotproxy.examine(config, wall=lambda: dotproxy.RELEASED + DAY)

        self.assertEqual(
            [report.subject for report in reports],
            ["this host", f"127.0.0.1:{upstream.port}#dot.test"],
        )
        found = [finding.check for finding in reports[0].findings]
        checks = ["options", "program", "[::1]:0", "user", "descriptors"]
        self.assertEqual(found, [*checks, "CA certificates", "clock"])
        self.assertIn("within the dates", reports[0].findings[-1].detail)

    def test_clock_off_by_a_year_is_found(self) -> None:
        with FakeUpstream(certificate=PKI.expired) as upstream:
            config = configure(upstream, host=LOCALHOST_V6)
            reports = dotproxy.examine(config, wall=lambda: dotproxy.RELEASED + DAY)

        clock = reports[0].findings[-1]
        self.assertEqual((clock.check, clock.result), ("clock", WARN))
        self.assertIn("2020-01-01 00:00 UTC to 2020-02-01 00:00 UTC", clock.detail)

    def test_unreadable_ca_file_leaves_the_host_to_examine(self) -> None:
        config = configured("--ca-file=/nonexistent.pem", "--listen=127.0.0.1:0")
        (report,) = dotproxy.examine(config)

        finding = next(f for f in report.findings if f.check == "CA certificates")
        self.assertEqual(finding.result, FAIL)
        self.assertIn("upstreams are not examined", finding.detail)
        self.assertEqual(finding.cure, "give --ca-file PEM")


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
        environment = {
            name: text
            for name, text in os.environ.items()
            if not name.startswith("DOTPROXY_")
        }
        self._process = subprocess.Popen(
            [*command, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**environment, **variables},
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

    def addresses(self) -> list[Address]:
        """Wait until it is ready, and return where it listens."""
        found = re.search(r"listen=(.*) upstream=", self.line_with("ready"))
        assert found is not None
        pairs = [text.rpartition(":") for text in found[1].split()]
        return [(host.strip("[]"), int(port)) for host, _, port in pairs]

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def wait(self) -> int:
        """Wait for its end and return the exit status."""
        octets, _ = self._process.communicate(timeout=10)
        self.output += octets.decode()
        return self._process.returncode


class MainTest(DotproxyTestCase):
    def test_closed_standard_streams_are_taken_by_nothing_else(self) -> None:
        null = "os.stat(os.devnull).st_rdev"
        script = (
            "import os, dotproxy; dotproxy.hold_standard_streams(); "
            f"os._exit(sum(os.fstat(n).st_rdev != {null} for n in range(3)))"
        )
        shell = 'exec "$0" -c "$1" <&- >&- 2>&-'
        directory = os.path.dirname(compiled_program())

        done = subprocess.run(
            ["sh", "-c", shell, sys.executable, script], cwd=directory, timeout=60
        )

        self.assertEqual(done.returncode, 0)

    def test_what_the_end_has_to_say_is_in_the_log(self) -> None:
        pipe = Pipe()
        pipe.read_on()
        with (
            mock.patch.object(dotproxy, "STDERR", pipe.output),
            mock.patch.object(dotproxy.logger, "propagate", True),
            mock.patch.multiple(logging.getLogger(), handlers=[], level=0),
            mock.patch.object(threading, "excepthook"),
            dotproxy.logging_to_stderr("info", "json") as log,
        ):
            for number in range(log.BACKLOG + 7):
                dotproxy.logger.info("line: n=%d", number)

        *_, last = pipe.close().splitlines()
        self.assertIn('"message":"log lines lost: number=7"', last)

    tls_port = 0

    def assert_no_surprise(self, program: Program, *words: str) -> None:
        """Check that each line of output has one of these words."""
        for line in program.output.splitlines():
            self.assertRegex(line, "|".join(words))

    def test_port_0_is_told_and_both_transports_answer(self) -> None:
        with FakeUpstream() as upstream, contextlib.ExitStack() as stack:
            program = Program.before(upstream, "--listen=[::1]:0")
            stack.enter_context(program)
            for address in program.addresses():
                self.assertNotEqual(address[1], 0)
                self.check_answered(UDPClient(address))
                self.check_answered(TCPClient(address))
            program.signal(signal.SIGTERM)
            self.assertEqual(program.wait(), 0)

        self.assert_no_surprise(program, " INFO ready: ", " INFO stopping")

    def check_answered(self, client: Client) -> None:
        with client:
            client.send(query())
            self.assertEqual(parse(client.receive()).addresses, ["192.0.2.1"])

    def test_signal_ends_it_once_queries_in_flight_are_answered(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            with self.subTest(number=number):
                self.check_end(number)

    def check_end(self, number: int) -> None:
        hold = Hold()
        with FakeUpstream(hold) as upstream, Program.before(upstream) as program:
            with UDPClient(program.addresses()[0]) as client:
                client.send(query())
                upstream.wait_for(lambda u: bool(u.queries))
                program.signal(number)
                program.line_with("stopping")
                hold.release()
                self.assertEqual(parse(client.receive()).addresses, ["192.0.2.1"])
            self.assertEqual(program.wait(), 0)
        self.assert_no_surprise(program, " INFO ready: ", " INFO stopping")

    def test_tcp_client_in_flight_is_answered_before_the_end(self) -> None:
        hold = Hold()
        with FakeUpstream(hold) as upstream, Program.before(upstream) as program:
            with TCPClient(program.addresses()[0]) as client:
                client.send(query())
                upstream.wait_for(lambda u: bool(u.queries))
                program.signal(signal.SIGTERM)
                program.line_with("stopping")
                hold.release()
                self.assertEqual(parse(client.receive()).addresses, ["192.0.2.1"])
            self.assertEqual(program.wait(), 0)

    def test_admin_port_is_told_and_one_that_is_taken_is_status_1(self) -> None:
        with FakeUpstream() as up, Program.before(up, "--admin=0") as program:
            line = program.line_with("ready")
            found = re.search(r" admin=127\.0\.0\.1:(\d+) ", line.strip())
            assert found is not None
            with Program.before(up, f"--admin={found[1]}") as second:
                self.assertEqual(second.wait(), 1)
            program.signal(signal.SIGTERM)
            self.assertEqual(program.wait(), 0)

        self.assertRegex(second.output, rf"\Adotproxy: .*{found[1]} is taken.*--admin")
        self.assertEqual(second.output.count("\n"), 1)

    def test_state_is_logged_on_request(self) -> None:
        with FakeUpstream() as upstream, Program.before(upstream) as program:
            program.addresses()
            program.signal(signal.SIGUSR1)

            self.assertIn(f":{upstream.port}#", program.line_with("state: name="))

    def test_route_is_told_and_where_it_is_not_encrypted(self) -> None:
        with FakeUpstream() as public, FakeUpstream(on_accept="plain") as private:
            where = f"tcp://{LOCALHOST}:{private.port}"
            route = f"--route=example.com={where}"
            with Program.before(public, route) as program:
                self.check_answered(UDPClient(program.addresses()[0]))
                program.signal(signal.SIGTERM)
                self.assertEqual(program.wait(), 0)

        self.assertEqual((len(public.queries), len(private.queries)), (0, 1))
        self.assertIn(f" route=example.com={where} ", program.output)
        said = f"not encrypted: domain=example.com upstream={where}\n"
        self.assertEqual(program.output.count(said), 1)

    def test_sighup_empties_the_cache_and_says_so(self) -> None:
        with FakeUpstream() as upstream, Program.before(upstream) as program:
            with UDPClient(program.addresses()[0]) as client:
                client.send(query())
                client.receive()
                program.signal(signal.SIGHUP)
                said = program.line_with("cache flushed")
                client.send(query())
                client.receive()

            self.assertIn("entries=1", said)
            self.assertEqual(len(upstream.queries), 2)

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
                program.signal(signal.SIGTERM)
                self.assertEqual(program.wait(), 0)

        lines = [json_line(line) for line in program.output.splitlines()]
        asked = [line for line in lines if line["event.dataset"] == "dotproxy.query"]
        sources = [line["labels.source"] for line in asked]
        ports = [line.get("destination.port") for line in asked]
        self.assertCountEqual(sources, ["upstream", "cache", "cache"])
        self.assertIn(upstream.port, ports)
        self.assertIn("stopping", [line.get("message") for line in lines])

    def test_supervisor_hears_of_the_start_a_reload_and_the_end(self) -> None:
        with FakeUpstream() as upstream, Notifications() as heard:
            variables = {"NOTIFY_SOCKET": heard.path}
            with Program.before(upstream, **variables) as program:
                self.assertRegex(heard.next(), r"\AREADY=1\nSTATUS=1 of 1 upstreams up")
                program.signal(signal.SIGHUP)
                self.assertRegex(heard.next(), r"\ARELOADING=1\nMONOTONIC_USEC=\d+\Z")
                self.assertEqual(heard.next(), "READY=1")
                program.signal(signal.SIGTERM)
                self.assertEqual(heard.next(), "STOPPING=1\nWATCHDOG=1")
                self.assertEqual(program.wait(), 0)

    def test_ready_line_tells_the_user_and_the_limits(self) -> None:
        with FakeUpstream() as upstream, Program.before(upstream) as program:
            line = program.line_with("ready")

        self.assertRegex(line, r" user=\w+ nofile=\d+ umask=077\n")

    def test_sighup_reads_the_certificate_again_and_keeps_connections(self) -> None:
        with tempfile.NamedTemporaryFile(suffix=".pem") as file:
            os.chmod(file.name, 0o644)  # root is nobody by the time it is read again
            rotate(file.name, PKI.good)
            options = "--tls-listen=127.0.0.1:0", f"--tls-cert={file.name}"
            with (
                FakeUpstream() as upstream,
                Program.before(upstream, *options) as program,
                TLSClient(self.tls_address(program)) as client,
            ):
                self.assert_shown(client, PKI.good)
                for source, said, shown in (
                    (PKI.good2, "certificate loaded", PKI.good2),
                    (PKI.ca, "certificate not replaced", PKI.good2),
                ):
                    rotate(file.name, source)
                    program.output = ""
                    program.signal(signal.SIGHUP)
                    program.line_with(said)
                    with TLSClient(self.tls_address(program)) as other:
                        self.assert_shown(other, shown)
                    self.assert_shown(client, PKI.good)

    def tls_address(self, program: Program) -> Address:
        """Wait until it is ready, and return where it serves encrypted clients."""
        if not self.tls_port:
            found = re.search(r" tls=127.0.0.1:(\d+) up", program.line_with("ready"))
            assert found is not None
            self.tls_port = int(found[1])
        return LOCALHOST, self.tls_port

    def assert_shown(self, client: TLSClient, source: str) -> None:
        """Check the certificate of a connection, and that it is answered."""
        with open(source, encoding="ascii") as file:
            pem = file.read().partition("-----BEGIN EC")[0]
        self.assertEqual(client.certificate, ssl.PEM_cert_to_DER_cert(pem))
        client.send(query())
        self.assertEqual(parse(client.receive()).rcode, 0)

    def test_health_check_from_the_environment_alone(self) -> None:
        with FakeUpstream() as upstream, Program.before(upstream) as program:
            port = program.addresses()[0][1]
            for listen, status in ((f"127.0.0.1:{port}", 0), ("127.0.0.1:0", 1)):
                with self.subTest(listen=listen):
                    environment = {**os.environ, "DOTPROXY_LISTEN": listen}
                    command = [sys.executable, dotproxy.__file__, "--healthcheck"]
                    result = subprocess.run(
                        command, env=environment, capture_output=True, timeout=10
                    )
                    self.assertEqual(result.returncode, status)
                    said = result.stdout + result.stderr
                    self.assertEqual(said.count(b"\n"), 1)

    def test_doctor_prints_a_report_and_its_status(self) -> None:
        with FakeUpstream() as upstream, Program.before(upstream, "--doctor") as good:
            self.assertEqual(good.wait(), 0)
        with Program.before(upstream, "--doctor", "--log-format=json") as bad:
            self.assertEqual(bad.wait(), 1)

        self.assertIn(f"\n127.0.0.1:{upstream.port}#dot.test\n", good.output)
        self.assertRegex(good.output, r"checks: 0 failed, \d to note\n\Z")
        self.assertEqual(json.loads(bad.output)["result"], FAIL)

    def test_port_taken_is_one_line_and_status_1(self) -> None:
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            with self.subTest(kind=kind), socket.socket(type=kind) as holder:
                holder.bind((LOCALHOST, 0))
                if kind == socket.SOCK_STREAM:
                    holder.listen()
                port = holder.getsockname()[1]
                with Program(f"--listen=127.0.0.1:{port}") as program:
                    self.assertEqual(program.wait(), 1)
                self.assertRegex(program.output, rf"\Adotproxy: .*port {port} is taken")
                self.assertEqual(program.output.count("\n"), 1)

    def test_upstream_out_of_reach_is_a_warning_and_servfail_that_says_why(
        self,
    ) -> None:
        with FakeUpstream() as upstream:
            pass
        with Program.before(upstream) as program:
            (address,) = program.addresses()
            warning = program.line_with("WARNING")
            with UDPClient(address) as client:
                client.send(query(do=True))
                got = parse(client.receive())
            program.signal(signal.SIGTERM)
            self.assertEqual(program.wait(), 0)

        reason = f"connection refused: nothing on TCP port {upstream.port}"
        self.assertIn(reason, warning)
        self.assertEqual(program.output.count("WARNING"), 1)
        assert got.opt is not None
        self.assertEqual((got.rcode, got.opt.options[0][0]), (Rcode.SERVFAIL, EDE))
        self.assertIn(reason, got.opt.options[0][1][2:].decode())


# ---- House style ---------------------------------------------------------------------


class Source:
    """dotproxy.py as text, as a tree, and as the lines that have code."""

    def __init__(self, path: str) -> None:
        with open(path, encoding="utf-8") as file:
            self.text = file.read()
        self.tree = ast.parse(self.text)
        self.code = self._code_lines()

    def length(self, node: ast.stmt) -> int:
        """Count the lines with code: no comments, no docstrings, no blank ones."""
        return len(self.code & set(range(node.lineno, (node.end_lineno or 0) + 1)))

    def longer_than(
        self, limit: int, kind: type[ast.FunctionDef] | type[ast.ClassDef]
    ) -> set[str]:
        """Return the names of the definitions of this kind above the limit."""
        nodes = [node for node in ast.walk(self.tree) if isinstance(node, kind)]
        return {node.name for node in nodes if self.length(node) > limit}

    def _code_lines(self) -> set[int]:
        blank = {
            *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT),
            *(tokenize.DEDENT, tokenize.ENDMARKER),
        }
        lines: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type not in blank:
                lines.update(range(token.start[0], token.end[0] + 1))
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                lines -= set(range(node.lineno, (node.end_lineno or 0) + 1))
        return lines


class LoadedNames(ast.NodeVisitor):
    """The names that a definition uses, without locals and those in annotations."""

    def __init__(self, node: ast.stmt) -> None:
        self._loaded: set[str] = set()
        self._stored: set[str] = set()
        self.visit(node)

    @property
    def names(self) -> set[str]:
        return self._loaded - self._stored

    def visit_Name(self, node: ast.Name) -> None:
        found = self._loaded if isinstance(node.ctx, ast.Load) else self._stored
        found.add(node.id)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        for part in (node.target, node.value):
            if part is not None:
                self.visit(part)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        self._stored.update(argument.arg for argument in arguments)
        inside = [*node.decorator_list, *node.args.defaults, *node.body]
        for part in [*inside, *filter(None, node.args.kw_defaults)]:
            self.visit(part)


def names_defined(node: ast.stmt) -> list[str]:
    """Return the names that a statement at the top level defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
    return [
        each.id
        for target in targets
        for each in ast.walk(target)
        if isinstance(each, ast.Name)
    ]


class HouseStyleTest(DotproxyTestCase):
    source: Source

    # What still breaks a rule; the tests fail where one that is listed does no more.
    LONG_FUNCTIONS: frozenset[str] = frozenset()
    # State that one lock guards, or that is decided together, stays in one place.
    LONG_CLASSES = frozenset(
        (
            *("Cache", "Connection", "Dispatcher", "Proxy", "StreamHandler"),
            "UpstreamGroup",
        )
    )
    FORWARD_REFERENCES: frozenset[str] = frozenset()

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.source = Source(dotproxy.__file__)

    def test_definitions_use_only_what_is_above_them(self) -> None:
        lines: dict[str, int] = {}
        for node in self.source.tree.body:
            for name in names_defined(node):
                lines.setdefault(name, node.lineno)
        found = {
            f"{', '.join(names_defined(node))} uses {name}"
            for node in self.source.tree.body
            for name in LoadedNames(node).names & set(lines)
            if lines[name] > (node.end_lineno or 0)
        }

        self.assertEqual(found, self.FORWARD_REFERENCES)

    def test_no_function_is_longer_than_40_lines_of_code(self) -> None:
        found = self.source.longer_than(40, ast.FunctionDef)

        self.assertEqual(found, self.LONG_FUNCTIONS)

    def test_no_class_is_longer_than_150_lines_of_code(self) -> None:
        found = self.source.longer_than(150, ast.ClassDef)

        self.assertEqual(found, self.LONG_CLASSES)

    def test_no_line_is_longer_than_88_columns(self) -> None:
        lines = enumerate(self.source.text.splitlines(), 1)
        found = [
            number
            for number, line in lines
            if len(line.partition("  # type: ignore")[0]) > 88
        ]

        self.assertEqual(found, [])

    def test_readme_table_is_what_help_says(self) -> None:
        path = os.path.join(os.path.dirname(dotproxy.__file__), "README.md")
        with open(path, encoding="utf-8") as file:
            rows = re.findall(r"^\| `(--.*)\|$", file.read(), re.M)
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


def read_beside(name: str) -> str:
    """Return a file of the directory that dotproxy.py is in."""
    path = os.path.join(os.path.dirname(dotproxy.__file__), name)
    with open(path, encoding="utf-8") as file:
        return file.read()


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
        for node in ast.walk(Source(dotproxy.__file__).tree):
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

    def test_label_has_the_version(self) -> None:
        self.assertIn(f'image.version="{dotproxy.__version__}"', self.dockerfile)

    def test_listens_on_all_addresses_and_the_ports_exposed(self) -> None:
        found = re.search(r'^ENV DOTPROXY_LISTEN="(.*)"$', self.dockerfile, re.M)

        assert found is not None
        listen = configured(LISTEN=found[1]).listen
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

    def test_blocks_that_make_files_are_found(self) -> None:
        manifests = ["compose.yaml", "dotproxy.yaml", "dotproxy-node.yaml"]
        units = ["dotproxy.socket", "dotproxy.service"]

        self.assertLessEqual({*manifests, *units}, set(self.blocks))

    def test_variables_are_options_with_good_values(self) -> None:
        found: list[tuple[str, str]] = []
        for pattern in (
            r"\bDOTPROXY_(\w+): (.+)",
            r"name: DOTPROXY_(\w+)\n +value: (.+)",
            r"Environment=DOTPROXY_(\w+)=(.+)",
        ):
            found += re.findall(pattern, "\n".join(self.blocks.values()))

        self.assertGreaterEqual(len(found), 8)
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
        for name in ("dotproxy.yaml", "dotproxy-node.yaml"):
            text = self.blocks[name]
            numbers = re.findall(r"runAs(?:User|Group): (\d+)", text)
            self.assertEqual(numbers, [user, user], name)
            dns = r"name: dns(?:-tcp)?, containerPort: (\d+), protocol: (\w+)"
            opened = ["/".join(each).lower() for each in re.findall(dns, text)]
            self.assertEqual(opened, ports.split(), name)
            tags = re.findall(r"image: dotproxy:(\S+)", text)
            self.assertEqual(tags, [dotproxy.__version__], name)


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
