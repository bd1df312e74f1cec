#!/usr/bin/env python3
"""dotproxy: DNS in, DNS over TLS out, in one file of the standard library.

The path of a query

    UDP datagrams
      UDPServer.get_request         drain the socket: one request = one batch
      UDPServer.process_request     Admission.verdict: REFUSED, TC or nothing for some
                                    Proxy.lookup: from the cache -> sendto, done   [udp]
                                    (parse_query, or byte for byte as lately;
                                    a special name: LocalAnswers.respond)
                                    WorkerPool.submit(the rest)    full -> drop
                                    (a lone query is handled at once, by this thread)
                                    Witness.at_once: metrics and query log
      UDPHandler.handle             Proxy.resolve                       [worker, or udp]
        Proxy.resolve               join the same question in flight, or a new Exchange
        Routes.send                 the upstreams that the name is asked of
        UpstreamGroup.send          pick an upstream and one of its connections
        Connection.send             assign an ID, put the frame in the Outbox, which is
                                    flushed by whoever finds no flush under way
      ... that thread is free ...
      Connection._read              receive, decrypt, match ID and question   [upstream]
        connection_answered         SERVFAIL or REFUSED: ask another upstream, and where
                                    none is left: Proxy.fail
        Proxy.complete              once: RebindingGuard.screen where it is wanted,
                                    Cache.put_all, and an answer for all who wait
        reply                       sendto; never blocks
        Witness.later               metrics and query log, once for all these answers
      Timer                         hedge, retry, stale answer, SERVFAIL at the deadline

    TCP clients enter at the same lookup and resolve, from StreamHandler, with another
    reply; TCPServer.verify_request closes those of strangers, and one over its rate is
    read no further for a while. lookup parses; what cannot be parsed is answered
    FORMERR or NOTIMP at once.
    DoT clients do so from TLSHandler, which shakes hands first: it decrypts what it
    receives, encrypts what it sends, and is a StreamHandler otherwise.

Contracts that carry the design

    Proxy.lookup(message)    never blocks, does no I/O, never raises; tells what it
                             answered in a list that its caller alone has.
    Proxy.resolve(queries)   never blocks; every `reply` is called exactly once, by
                             whichever thread has the answer, SERVFAIL at worst.
    reply(message, client)   never blocks, never raises; an answer that its client
                             cannot take is dropped.
    Form                     what queries say beside ID and question; immutable, as many
                             queries, of many threads, share one.
    Exchange                 one question in flight. Lost connection, time-out, hedging
                             and giving up all mean "send it again, or fail it".
    Routes                   which UpstreamGroup a name is asked of, and no other: one
                             for each routed domain, one for all other names.
    Observer                 told of a batch of answers at a time, with no lock held;
                             may not block. Whatever is not a matter of each query is
                             asked for by who looks: `samples` of each object.
    Plan                     what was decided under UpstreamGroup's lock, on memory
                             alone, to be carried out after it is released.

Threads

    main          waits for signals; meanwhile tells systemd how it goes, if it asks
    udp-*, tcp-*, tls-*
                  one per listening socket: receive datagrams and send lone queries,
                  accept connections
    worker-*      pool: send a batch of UDP queries
    stream-*      pool: one per connected TCP or DoT client: shakes hands, reads queries
    upstream-*    one per upstream connection: connects, shakes hands, reads, replies
                  (a plain one, to the server of a routed domain, shakes no hands)
    timer         whatever has to happen later
    admin         accepts HTTP clients, ends those that take too long
    admin-*       pool: one per HTTP client, answers one request
    doctor-*      --doctor alone: one per upstream; visit-* reads its connection
    log           writes log lines to stderr; logger calls put them on its list
    querylog      makes and writes the lines of the query log, where there is one

    All are started after a process that began as root has become another user: it has
    then bound every port, read every file and imported every module that it needs.

Locks (none is ever held while another is taken, or over I/O, a callback or a log call,
but for those of Line, StreamHandler and AdminServer, over system calls that do not
wait, that of Output, held by the threads log and querylog while they write, and those
of WorkerPool and Connection, held while a thread is started, and Channel's, which is
taken last of all, over memory alone: under StreamHandler's, so that what is encrypted
in turn is sent in turn, and under TLSServer.turns)

    Metrics._lock        what is counted of answers; copied under it, written without it
    Courier._lock        log lines, or batches for the query log, that wait
    Output._lock         the order of octets in a file, whether its last line is whole
    Repeats._lock        which messages were logged lately, and how often
    Cache._lock          entries, their order and their size, evictions
    Proxy._lock          questions in flight and who waits for them, refreshes
    UpstreamGroup._lock  Fleet, Dispatcher and Quarantine: upstreams, their health and
                         connections, the retry state of exchanges, what is counted
    Connection._lock     pending IDs, whether its thread may start
    Outbox._lock         frames to send, who flushes
    Channel._lock     the TLS object and its two memory buffers
    Line._lock           the socket, against being closed while another thread uses it
    Timer._condition     what is due
    WorkerPool._lock     number of threads, of idle ones and of waiting tasks
    RateLimiter._lock    buckets of client prefixes
    Clients._lock        connected TCP and DoT clients
    StreamHandler._lock  octets that the client has not taken yet, queries in flight
    TLSServer.turns      a semaphore: who computes a step of a handshake
    AdminServer._lock    HTTP clients' sockets and their deadlines

    Shelf, Admission and the tables of forms and extras have no lock: of dicts and a
    set, only single operations are used. Nor has Routes: it does not change.
    Identity neither: its context is replaced as a whole, by the main thread, at SIGHUP.
    Nor History: its readings are a tuple that the timer replaces as a whole.
    ProcessorBinding has none: two updates at once would at worst bind twice.
"""

from __future__ import annotations

import abc
import argparse
import base64
import bisect
import calendar
import collections
import contextlib
import copy
import enum
import errno
import functools
import gc
import glob
import grp
import hashlib
import heapq
import html
import importlib
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import pwd
import queue
import random
import re
import resource
import select
import shlex
import signal
import socket
import socketserver
import ssl
import string
import struct
import sys
import threading
import time
import weakref
from collections.abc import (
    Callable,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from typing import TYPE_CHECKING, Generic, NamedTuple, NoReturn, TypeVar, Union

__version__ = "0.1.0"

logger = logging.getLogger("dotproxy")

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


# ---- Protocol numbers and errors -----------------------------------------------------
# Names for wire values and one error tree. Plain ints where they are tested per query:
# comparing with an IntEnum member costs 84 ns, with an int 31 ns.

QR, TC, RD, RA, Z, AD, CD = 0x8000, 0x0200, 0x0100, 0x0080, 0x0040, 0x0020, 0x0010
AA = 0x0400
OPCODE_MASK, OPCODE_OCTET = 0x7800, 0x78
RCODE_MASK = 0x000F
DO = 0x8000  # in the flags of an OPT record, RFC 3225
NOERROR, NXDOMAIN = 0, 3
TYPE_SOA, TYPE_OPT, TYPE_IXFR, TYPE_AXFR = 6, 41, 251, 252
TYPE_A, TYPE_NS, TYPE_PTR, TYPE_HINFO, TYPE_AAAA, TYPE_DS = 1, 2, 12, 13, 28, 43
TYPE_SVCB, TYPE_HTTPS, TYPE_ANY = 64, 65, 255
CLASS_IN = 1
OPTION_SUBNET, OPTION_COOKIE, OPTION_KEEPALIVE, OPTION_PADDING = 8, 10, 11, 12
OPTION_EDE = 15

HEADER = struct.Struct("!HHHHHH")  # RFC 1035 section 4.1.1
RECORD = struct.Struct("!HHIH")  # behind a record's name: type, class, TTL, length
TTL = struct.Struct("!I")
PAIR = struct.Struct("!HH")  # option code and length, frame length and ID, ID and flags

MAX_NAME = 255  # octets with the root label, RFC 1035 section 2.3.4
MIN_MESSAGE = 12  # octets: a header
MAX_MESSAGE = 65535
MIN_UDP_SIZE = 512  # what every client takes, RFC 1035 section 4.2.1
MAX_UDP_SIZE = 1232  # no fragments on any common path, DNS flag day 2020
MAX_OPTIONS = 4096  # octets of EDNS options to pass on; real ones have a few dozen
MAX_KNOWN_TAIL = 512  # octets behind a question, or behind records, that are remembered
CLIENT_IDLE_TIMEOUT = 10  # seconds a TCP client may be idle, RFC 7766 section 6.2.3
QUERY_BLOCK = 128  # octets that queries are padded to, RFC 8467 section 4.1
ANSWER_BLOCK = 468  # octets that encrypted answers are padded to, likewise


class Rcode(enum.IntEnum):
    """Response codes that dotproxy itself gives (RFC 1035, RFC 6891)."""

    NOERROR = 0
    FORMERR = 1
    SERVFAIL = 2
    NXDOMAIN = 3
    NOTIMP = 4
    REFUSED = 5
    BADVERS = 16


# RCODEs that say more of the upstream than of the name: another one is asked.
FAILURE_RCODES = frozenset((Rcode.FORMERR, Rcode.SERVFAIL, Rcode.NOTIMP, Rcode.REFUSED))


class ExtendedError(enum.IntEnum):
    """Info codes of Extended DNS Errors (RFC 8914 section 4)."""

    STALE_ANSWER = 3
    PROHIBITED = 18
    FILTERED = 17
    STALE_NXDOMAIN_ANSWER = 19
    NO_REACHABLE_AUTHORITY = 22
    NETWORK_ERROR = 23


class DotproxyError(Exception):
    """What dotproxy raises itself; each child has one outcome."""


class FormatError(DotproxyError):
    """A message that breaks the wire format: answered with `rcode`, or distrusted."""

    def __init__(self, text: str, rcode: Rcode = Rcode.FORMERR) -> None:
        super().__init__(text)
        self.rcode = rcode


class UpstreamError(DotproxyError):
    """A connection that could not be made or kept: the next one is tried.

    `cause` is one of a closed set of words, `str()` says what and how to mend it.
    """

    def __init__(self, cause: str, text: str) -> None:
        super().__init__(text)
        self.cause = cause

    @property
    def info(self) -> ExtendedError:
        """Return the info code that comes nearest to the cause."""
        if self.cause in ("timeout", "certificate", "tls", "overload"):
            return ExtendedError.NO_REACHABLE_AUTHORITY
        return ExtendedError.NETWORK_ERROR


class ConfigError(DotproxyError):
    """A set-up that cannot work: one line on stderr and exit status `status`."""

    def __init__(self, text: str, status: int = 2) -> None:
        super().__init__(text)
        self.status = status


# ---- Time ----------------------------------------------------------------------------

# Seconds that never go back, those in which the host slept among them, as the TTL of a
# record is real time; `time.monotonic` leaves them out. It is every `clock` but that of
# the Supervisor, as systemd leaves them out.
ELAPSED = "CLOCK_MONOTONIC_RAW" if sys.platform == "darwin" else "CLOCK_BOOTTIME"
elapsed: Callable[[], float] = functools.partial(
    time.clock_gettime, getattr(time, ELAPSED, time.CLOCK_MONOTONIC)
)


# ---- Addresses and settings ----------------------------------------------------------
# Where clients and upstreams are, and the one Config that all parts are given.

Address = tuple[str, int]
IPAddress = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]
Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]

# Addresses that cannot come from the Internet: loopback, private (RFC 1918), shared
# (RFC 6598), link-local and unique local ones (RFC 4193).
LOCAL_NETWORKS: tuple[Network, ...] = (
    *map(ipaddress.IPv4Network, ("127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12")),
    *map(ipaddress.IPv4Network, ("192.168.0.0/16", "169.254.0.0/16", "100.64.0.0/10")),
    *map(ipaddress.IPv6Network, ("::1/128", "fe80::/10", "fc00::/7")),
)
RATE_LIMIT = 50  # queries/s of one prefix: ten times what a busy household asks


def write_address(host: str, port: int) -> str:
    """Write an address and a port as people do: IPv6 in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Endpoint(NamedTuple):
    """An upstream's address and the name that its certificate has to prove.

    Without a name it is asked in clear text, over TCP.
    """

    host: str
    port: int
    name: str

    def __str__(self) -> str:
        where = write_address(self.host, self.port)
        return f"{where}#{self.name}" if self.name else f"tcp://{where}"


Route = tuple[str, Endpoint]  # a domain in lower case, and one of its servers
DEFAULT_PORT = 5353
DEFAULT_LISTEN = (("127.0.0.1", DEFAULT_PORT), ("::1", DEFAULT_PORT))
DEFAULT_ADMIN = ("127.0.0.1", 9153)  # the port of CoreDNS's metrics
DOT_PORT = 853  # RFC 7858 section 3.1
DEFAULT_UPSTREAMS = tuple(
    Endpoint(host, DOT_PORT, "cloudflare-dns.com")
    for host in ("1.1.1.1", "1.0.0.1", "2606:4700:4700::1111", "2606:4700:4700::1001")
)


class Config(NamedTuple):
    """All options, checked."""

    listen: tuple[Address, ...] = DEFAULT_LISTEN
    upstream: tuple[Endpoint, ...] = DEFAULT_UPSTREAMS
    route: tuple[Route, ...] = ()
    tls_listen: tuple[Address, ...] = ()
    tls_cert: str | None = None
    tls_key: str | None = None
    ca_file: str | None = None
    pin: tuple[tuple[str, str], ...] = ()  # pairs of a TLS name and a public_key_pin
    tls_min: str = "1.2"
    strategy: str = "fastest"
    timeout: float = 4.8
    cache_size: int = 32 << 20
    cache_min_ttl: int = 0
    cache_max_ttl: int = 7 * 86400
    cache_fail_ttl: float = 1.0
    cache_stale: float = 86400.0
    forward_special: tuple[bytes, ...] = ()
    block_private_answers: bool = False
    allow_private: tuple[bytes, ...] = ()
    max_in_flight: int = 10_000
    max_tcp_clients: int = 512
    max_tcp_per_client: int = 256
    allow: tuple[Network, ...] = LOCAL_NETWORKS
    rate_limit: float = RATE_LIMIT
    rate_limit_all: bool = False
    user: str | None = None  # then nobody, where it starts as root
    admin: Address | None = None
    log_level: str = "info"
    log_format: str = "text"
    query_log: str | None = None
    query_log_privacy: str = "prefix"
    listen_given: bool = False
    healthcheck: bool = False
    doctor: str | None = None


# ---- Messages (RFC 1035, RFC 6891, RFC 7830, RFC 8467) -------------------------------
# Pure functions over bytes: no clock, no lock, no socket. A query is parsed once into
# what its answer must look like, a response once into what can be served from it.


KEY_BITS = {bits: bytes([bits]) for bits in (0, 1, CD, CD | 1)}  # CD, and DO as 1
Transport = tuple[str, str]  # udp, tcp or dot; 1 for IPv4, 2 for IPv6
UDP_TRANSPORT = "udp", "1"
ClientAddress = tuple[str, int]  # with two more numbers for IPv6
NO_CLIENT = "", 0  # the client of a query that none has asked
# What a TCP client is told of the idle timeout, if it asks (RFC 7828).
KEEPALIVE_TOLD = PAIR.pack(OPTION_KEEPALIVE, 2) + struct.pack(
    "!H", CLIENT_IDLE_TIMEOUT * 10
)


def build_opt(edns_flags: int, options: bytes, rcode: int = 0) -> bytes:
    """Build an OPT record, which carries the upper bits of the RCODE."""
    ttl = rcode >> 4 << 24 | edns_flags
    return b"\0" + RECORD.pack(TYPE_OPT, MAX_UDP_SIZE, ttl, len(options)) + options


class Form:
    """What queries say beside their ID and their question; immutable, and shared.

    Programs know few ways to ask, so that all this is read once for many queries.
    """

    __slots__ = (
        "answer_flags",  # that an answer has from the query
        "answer_mask",  # of those that an answer has from the response
        "cachable",  # whether the answer may come from the cache
        "edns",  # whether there is an OPT record
        "edns_flags",  # of the OPT record, DO among them
        "flags",  # of the header
        "key",  # ends the cache keys of queries, CD and DO
        "limit",  # octets that the answer may have
        "more_key",  # ends their other keys
        "opt",  # the OPT record of an answer that has nothing more to say
        "opt_options",  # of the OPT record of any answer
        "options",  # EDNS options to pass on, as on the wire
        "padded",  # whether the answer is, RFC 7830 section 4
        "refusal",  # RCODE to refuse it with, or 0
        "storable",  # whether the answer may go into the cache
        "transport",  # how it came
        "upstream_head",  # header of the upstream query, without the ID
    )

    def __init__(self, transport: Transport, flags: int = 0) -> None:
        """Make the form of a query without EDNS."""
        self.transport = transport
        self.flags = flags
        self.limit = MIN_UDP_SIZE if transport[0] == "udp" else MAX_MESSAGE
        self.edns = self.padded = False
        self.edns_flags = self.refusal = 0
        self.options = self.opt = self.opt_options = self.more_key = b""

    def settle(self) -> None:
        """Derive the rest: what the key, the upstream query and the answer are."""
        flags, edns_flags = self.flags, self.edns_flags
        plain = not (flags & Z or self.options or edns_flags & ~DO)
        self.cachable = plain
        self.storable = bool(plain and flags & RD)
        self.key = KEY_BITS[flags & CD | edns_flags >> 15]
        if not self.storable:
            self.more_key = PAIR.pack(flags & (RD | Z), edns_flags) + self.options
        self.answer_flags = flags & (RD | CD)
        # AD is for clients that understand it, RFC 6840 section 5.7.
        wants_ad = flags & AD or edns_flags & DO
        self.answer_mask = ~(RD | CD) if wants_ad else ~(RD | CD | AD)
        self.upstream_head = HEADER.pack(0, flags & (RD | CD | Z) | AD, 1, 0, 0, 1)[2:]
        if self.edns:
            self.opt = build_opt(edns_flags & DO, self.opt_options)


class Query:
    """A well-formed query: what was asked, by whom, and how."""

    __slots__ = (
        "cache_key",  # under which an answer may be in the cache, or empty
        "client",  # the address and port that asked
        "form",
        "id",
        "key",  # equal for queries that one upstream query can answer
        "question",  # QNAME, QTYPE and QCLASS as sent, case included
        "received",  # when
        "size",  # octets of the message
        "stale",  # the expired cache entry that may answer it, set by the proxy
    )

    def __init__(self, ident: int, question: bytes, form: Form, size: int) -> None:
        self.id = ident
        self.question = question
        self.form = form
        self.size = size
        # Most queries have one key for both the cache and what is in flight. AD is not
        # part of it: it is asked for always, and taken out for clients that did not
        # ask. With RD=0 an answer is taken from the cache but not put there.
        # Lengths of labels are below "A", so lower() changes letters only.
        key = question[:-4].lower() + question[-4:] + form.key
        if form.storable:
            self.key = self.cache_key = key
        else:
            self.key = key + form.more_key
            self.cache_key = key if form.cachable else b""
        self.client: ClientAddress = NO_CLIENT
        self.received = 0.0
        self.stale: CacheEntry | None = None


# Octets that a label takes, by its length: 63 at most, RFC 1035 section 2.3.4.
LABEL_SIZES = tuple(range(1, 65))


def end_of_question(message: bytes) -> int:
    """Return the offset past the first question, which may not use compression."""
    offset = 12
    try:
        while length := message[offset]:
            offset += LABEL_SIZES[length]
    except IndexError:
        raise FormatError("question past the end or of unknown label type") from None
    if offset - 11 > MAX_NAME:
        raise FormatError("QNAME longer than 255 octets")
    if offset + 5 > len(message):
        raise FormatError("question past the end")
    return offset + 5


def skip_name(message: bytes, offset: int) -> int:
    """Return the offset past the name at `offset`; a compression pointer ends it."""
    start = offset
    try:
        while length := message[offset]:
            if length >= 0xC0:
                if message[offset + 1] | (length & 0x3F) << 8 >= start:
                    raise FormatError("compression pointer forwards")
                return offset + 2
            if length > 63:
                raise FormatError(f"label type {length:#x}")
            offset += length + 1
    except IndexError:
        raise FormatError("name past the end") from None
    return offset + 1


# OPT is hop-by-hop (RFC 6891 section 6.1.1): these say something of this hop alone, or
# of the client (RFC 7871, RFC 7873, RFC 7828, RFC 7830). Others pass.
OPTIONS_ENDING_HERE = frozenset(
    (OPTION_SUBNET, OPTION_COOKIE, OPTION_KEEPALIVE, OPTION_PADDING)
)


def split_options(options: bytes) -> tuple[bytes, list[int]]:
    """Return the options that pass, and the codes of those that end here."""
    passed, dropped, offset = [], [], 0
    while offset < len(options):
        if offset + 4 > len(options):
            raise FormatError("EDNS option past the end")
        code, length = PAIR.unpack_from(options, offset)
        end = offset + 4 + length
        if end > len(options):
            raise FormatError(f"EDNS option of {length} octets past the end")
        if code in OPTIONS_ENDING_HERE:
            dropped.append(code)
        else:
            passed.append(options[offset:end])
        offset = end
    return b"".join(passed), dropped


def _parse_opt(form: Form, message: bytes, offset: int, records: int) -> None:
    """Read the OPT record among those behind a query's question; skip the others."""
    proto = form.transport[0]
    for _ in range(records):
        root = message[offset : offset + 1] == b"\0"
        offset = offset + 1 if root else skip_name(message, offset)
        if offset + 10 > len(message):
            raise FormatError("record past the end")
        rrtype, size, ttl, length = RECORD.unpack_from(message, offset)
        offset += 10 + length
        if offset > len(message):
            raise FormatError(f"RDLENGTH {length} past the end")
        if rrtype != TYPE_OPT:
            continue
        if form.edns or not root:
            raise FormatError("two OPT records" if form.edns else "OPT with a name")
        form.edns = True
        form.edns_flags = ttl & 0xFFFF
        if ttl & 0x00FF0000:
            form.refusal = Rcode.BADVERS
        if proto == "udp":
            form.limit = max(MIN_UDP_SIZE, min(size, MAX_UDP_SIZE))
        if length:
            options = message[offset - length : offset]
            form.options, dropped = split_options(options)
            if len(form.options) > MAX_OPTIONS:
                raise FormatError("more options than can be passed on")
            if proto != "udp" and OPTION_KEEPALIVE in dropped:
                form.opt_options = KEEPALIVE_TOLD
            # In clear text it hides nothing.
            form.padded = proto == "dot" and OPTION_PADDING in dropped
    if offset != len(message):
        raise FormatError("octets after the last record")


TRANSFERS = TYPE_IXFR, TYPE_AXFR


def check_header(message: bytes) -> None:
    """Check that a query is one, with one question; raises FormatError."""
    if message[2] & OPCODE_OCTET:
        raise FormatError(f"opcode {message[2] >> 3 & 15}", Rcode.NOTIMP)
    if message[4:6] != b"\0\1":
        raise FormatError(f"QDCOUNT {message[4] << 8 | message[5]}")


def parse_form(message: bytes, end: int, transport: Transport) -> Form:
    """Read all of a query but its question, which ends at `end`; raises FormatError."""
    check_header(message)
    _, flags, _, answers, authority, extra = HEADER.unpack_from(message)
    form = Form(transport, flags)
    transfer = message[end - 4] == 0 and message[end - 3] in TRANSFERS
    if (answers or authority) and not transfer:
        raise FormatError("records in the answer or authority section of a query")
    if records := answers + authority + extra:
        _parse_opt(form, message, end, records)
    elif len(message) != end:
        raise FormatError("octets after the question")
    if transfer and not form.refusal:
        form.refusal = Rcode.REFUSED
    form.settle()
    # ANY is never in the cache: the whole answer that TCP clients get is not for UDP.
    if message[end - 4] == 0 and message[end - 3] == TYPE_ANY:
        form.cachable = form.storable = False
    return form


# By transport, by what follows the ID up to the question, and by what follows that: 1.1
# us a query less than to read a form each time. No lock: only single operations of the
# dict are used, and to read a form twice does no harm.
_FORMS: dict[tuple[Transport, bytes, bytes], Form] = {}
MAX_FORMS = 1024  # at most 2 MB; then it begins anew


def _read_form(message: bytes, end: int, transport: Transport) -> Form:
    """Read a form that is not in the table, and put it there for the next query.

    Left out are types that change what the rest means, names behind the question, which
    may refer to it, and tails too long to keep many of them.
    """
    form, tail = parse_form(message, end, transport), message[end:]
    plain = message[end - 3] < TYPE_IXFR and message[10:12] <= b"\0\1"
    if plain and tail[:1] <= b"\0" and len(tail) <= MAX_KNOWN_TAIL:
        if len(_FORMS) >= MAX_FORMS:
            _FORMS.clear()
        _FORMS[transport, message[2:12], tail] = form
    return form


def parse_query(message: bytes, transport: Transport = UDP_TRANSPORT) -> Query:
    """Parse a message of at least 12 octets with QR=0.

    Raises FormatError with the RCODE to answer: FORMERR, or NOTIMP for an opcode other
    than QUERY. Zone transfers and EDNS versions above 0 parse, with a `refusal`.
    """
    try:
        end = end_of_question(message)
    except FormatError:
        check_header(message)  # which may tell more
        raise
    form = _FORMS.get((transport, message[2:12], message[end:]))
    if form is None or message[end - 3] >= TYPE_IXFR:
        form = _read_form(message, end, transport)
    ident = message[0] << 8 | message[1]
    return Query(ident, message[12:end], form, len(message))


def find_option(options: bytes, wanted: int) -> bytes | None:
    """Return the data of the first option with this code in well-formed options."""
    offset = 0
    while offset < len(options):
        code, length = PAIR.unpack_from(options, offset)
        offset += 4 + length
        if code == wanted:
            return options[offset - length : offset]
    return None


@functools.lru_cache(maxsize=1024)  # 0.1 us against 0.7 us; few shapes of query recur
def _upstream_opt(length: int, edns_flags: int, options: bytes) -> bytes:
    """Build the OPT record that pads a message of `length` octets to a whole block.

    With a length of 0 it pads nothing.
    """
    options += PAIR.pack(OPTION_KEEPALIVE, 0)
    if length:
        padding = -(length + 11 + len(options) + 4) % QUERY_BLOCK
        options += PAIR.pack(OPTION_PADDING, padding) + bytes(padding)
    return build_opt(edns_flags, options)


def build_upstream_query(query: Query, padded: bool = True) -> bytes:
    """Build what goes upstream, without its ID: padded, RD and CD carried, AD set.

    AD says that we understand the AD bit of the response (RFC 6840 section 5.7);
    clients that did not say so get the response without it. Padding hides nothing where
    there is no encryption (RFC 7830 section 6).
    """
    form, question = query.form, query.question
    length = 12 + len(question) if padded else 0
    opt = _upstream_opt(length, form.edns_flags, form.options)
    return form.upstream_head + question + opt


class Response:
    """A well-formed response, without its OPT record, ready to be served."""

    __slots__ = (
        "body",  # the records, as on the wire
        "counts",  # ANCOUNT, NSCOUNT, and ARCOUNT without the OPT record
        "flags",
        "longest_ttl",
        "message",  # as it came; empty for one of our own
        "negative_ttl",  # of an SOA record in the authority section, else None
        "options",  # EDNS options to pass on to clients that speak EDNS
        "rcode",  # with the upper bits of the OPT record
        "ttl",  # the shortest; 0 where a TTL has the top bit set; None without records
        "ttl_offsets",  # into the body
        "upstream_options",  # all of them, for who owns the connection
    )

    def __init__(
        self,
        flags: int,
        message: bytes = b"",
        counts: tuple[int, int, int] = (0, 0, 0),
        body: bytes = b"",
        ttls: Sequence[int] = (),
        ttl_offsets: Sequence[int] = (),
    ) -> None:
        self.flags = flags
        self.message = message
        self.counts = counts
        self.body = body
        self.rcode = flags & RCODE_MASK
        self.ttl: int | None
        if len(ttls) == 1:  # as in most: 0.3 us less
            self.ttl = self.longest_ttl = ttls[0]
        else:
            self.longest_ttl = max(ttls) if ttls else 0
            self.ttl = min(ttls) if ttls else None
        if self.longest_ttl >= 1 << 31:  # it means 0, RFC 2181 section 8
            self.ttl = 0
        self.ttl_offsets = ttl_offsets
        self.negative_ttl: int | None = None
        self.options = self.upstream_options = b""


class Extra:
    """What is behind the authority section of a response; immutable, and shared."""

    __slots__ = (
        "kept",  # records, up to the OPT record
        "octets",  # that these have
        "options",  # of the OPT record
        "rcode",  # the upper bits
        "ttl_offsets",  # in these octets
        "ttls",
    )

    def __init__(
        self, kept: int, octets: int, ttls: Sequence[int], ttl_offsets: Sequence[int]
    ) -> None:
        self.kept = kept
        self.octets = octets
        self.ttls = ttls
        self.ttl_offsets = ttl_offsets
        self.rcode = 0
        self.options = b""


def _walk_extra(message: bytes, start: int, records: int) -> Extra:
    """Walk an additional section to the end of the message; raises FormatError.

    Where records follow the OPT record they are dropped with it: the section is
    optional (RFC 2181 section 9), moving names is not safe.
    """
    ttls: list[int] = []
    offsets: list[int] = []
    offset, found = start, None
    for number in range(records):
        begin = offset
        pointed = message[offset] >= 0xC0
        offset = offset + 2 if pointed else skip_name(message, offset)
        rrtype, _, ttl, length = RECORD.unpack_from(message, offset)
        offset += 10 + length
        if rrtype == TYPE_OPT:
            if found or message[begin]:
                raise FormatError("misplaced OPT record")
            found = Extra(number, begin - start, ttls[:], offsets[:])
            found.options = message[offset - length : offset]
            found.rcode = ttl >> 20 & 0xFF0
        ttls.append(ttl)
        offsets.append(offset - length - 6 - start)
    if offset != len(message):
        raise FormatError("message ends inside or after its last record")
    return found or Extra(records, offset - start, ttls, offsets)


# By the octets of an additional section of one record, as an OPT record alone recurs:
# 0.1 us instead of 1.5 us. No lock: only single operations of the dict are used.
_EXTRAS: dict[bytes, Extra] = {}
MAX_EXTRAS = 1024  # of MAX_KNOWN_TAIL octets at most, 1 MB; then it begins anew
NO_EXTRA = Extra(0, 0, (), ())


def read_extra(message: bytes, offset: int, records: int) -> Extra:
    """Read an additional section of so many records; one that recurs is remembered."""
    if not records and offset == len(message):
        return NO_EXTRA
    tail = message[offset:]
    if records != 1 or tail[:1] != b"\0" or len(tail) > MAX_KNOWN_TAIL:
        return _walk_extra(message, offset, records)
    if len(_EXTRAS) >= MAX_EXTRAS:
        _EXTRAS.clear()
    extra = _EXTRAS[tail] = _walk_extra(tail, 0, records)
    return extra


def parse_response(message: bytes, end: int) -> Response:
    """Walk a response whose question, checked by the caller, ends at `end`.

    Raises FormatError.
    """
    _, flags, questions, answers, authority, records = HEADER.unpack_from(message)
    if questions != 1:
        raise FormatError(f"QDCOUNT {questions}")
    ttls: list[int] = []
    offsets: list[int] = []
    offset, negative_ttl = end, None
    try:
        for number in range(answers + authority):
            if message[offset] >= 0xC0:
                offset += 2
            else:
                offset = skip_name(message, offset)
            rrtype, _, ttl, length = RECORD.unpack_from(message, offset)
            ttls.append(ttl)
            offsets.append(offset + 4 - end)
            offset += 10 + length
            if rrtype == TYPE_SOA and number >= answers and length >= 20:
                minimum = int.from_bytes(message[offset - 4 : offset], "big")
                negative_ttl = min(ttl, minimum)
            elif rrtype == TYPE_OPT:
                raise FormatError("misplaced OPT record")
        known = _EXTRAS.get(message[offset:]) if records == 1 else None
        extra = known or read_extra(message, offset, records)
    except (IndexError, struct.error):
        raise FormatError("record past the end") from None
    if extra.ttls:
        ttls += extra.ttls
        offsets += [offset - end + each for each in extra.ttl_offsets]
    counts = answers, authority, extra.kept
    body = message[end : offset + extra.octets]
    response = Response(flags, message, counts, body, ttls, offsets)
    response.negative_ttl = negative_ttl
    if extra.rcode or extra.options:
        response.rcode |= extra.rcode
        response.upstream_options = extra.options
        response.options, _ = split_options(extra.options)
    return response


def parse_misfit(message: bytes) -> Response:
    """Parse what is no response to the question that was asked.

    Only a failure of a bare header passes, as some servers send it; anything else
    raises FormatError (RFC 5452 section 9.1), for a letter in another case too.
    """
    flags = message[2] << 8 | message[3]
    if flags & QR and flags & RCODE_MASK in FAILURE_RCODES and not any(message[4:]):
        return Response(flags)
    raise FormatError("no response to the question that was asked")


def _pad_opt(opt: bytes, size: int, limit: int) -> bytes:
    """Pad the OPT record that ends an answer of `size` octets (RFC 8467 section 4.2).

    To a whole number of blocks; where that is above the limit, up to the limit.
    """
    padding = min(-(size + 4) % ANSWER_BLOCK, limit - size - 4)
    if padding < 0:
        return opt
    option = PAIR.pack(OPTION_PADDING, padding) + bytes(padding)
    length = len(opt) - 11 + len(option)
    return opt[:9] + length.to_bytes(2, "big") + opt[11:] + option


def build_answer(
    query: Query,
    response: Response,
    body: bytes | None = None,
    options: bytes | None = None,
) -> bytes:
    """Build the client's answer; one that does not fit has TC=1 and no records.

    `body` and `options`, where given, stand for those of the response.
    """
    form, question, rcode = query.form, query.question, response.rcode
    flags = response.flags & form.answer_mask | form.answer_flags
    if options is None:
        options = response.options
    if body is None:
        body = response.body
    opt = form.opt  # of a client that sent none there is none
    if rcode > 15 and not opt:
        flags = flags & ~RCODE_MASK | Rcode.SERVFAIL
    elif opt and (options or rcode > 15):
        opt = build_opt(form.edns_flags & DO, options + form.opt_options, rcode)
    answers, authority, extra = response.counts
    if 12 + len(question) + len(body) + len(opt) > form.limit:
        flags, body, answers, authority, extra = flags | TC, b"", 0, 0, 0
        opt = form.opt and build_opt(form.edns_flags & DO, form.opt_options, rcode)
    if opt:
        extra += 1
        if form.padded:
            size = 12 + len(question) + len(body) + len(opt)
            opt = _pad_opt(opt, size, form.limit)
    head = HEADER.pack(query.id, flags, 1, answers, authority, extra)
    return head + question + body + opt


def with_ttls(response: Response, change: Callable[[int], int]) -> bytes:
    """Return the records of a response with every TTL changed by `change`."""
    body = bytearray(response.body)
    for offset in response.ttl_offsets:
        (ttl,) = TTL.unpack_from(body, offset)
        TTL.pack_into(body, offset, change(ttl))
    return bytes(body)


def message_to_keep(response: Response, question: bytes) -> bytes:
    """Build the message that a response can be parsed from again.

    Without an OPT record if that says nothing: padding takes 380 octets. One of our own
    gets the message that an upstream would have sent.
    """
    answers, authority, extra = response.counts
    opt = b""
    if response.options or response.rcode > 15:
        opt = build_opt(0, response.options, response.rcode)
        extra += 1
    head = HEADER.pack(0, response.flags, 1, answers, authority, extra)
    return head + question + response.body + opt


def build_option(info: ExtendedError, text: str) -> bytes:
    """Build an Extended DNS Error option (RFC 8914 section 2)."""
    reason = text.encode("utf-8", "replace")[:200].decode("utf-8", "ignore").encode()
    data = info.to_bytes(2, "big") + reason
    return PAIR.pack(OPTION_EDE, len(data)) + data


def error_response(rcode: int, options: bytes = b"") -> Response:
    """Make a response of our own that has no records."""
    response = Response(QR | RA | rcode & RCODE_MASK)
    response.rcode = rcode
    response.options = options
    return response


def build_format_error(message: bytes, rcode: Rcode) -> bytes:
    """Build the bare header that answers a message which could not be parsed."""
    flags = QR | (message[2] << 8) & (OPCODE_MASK | RD) | rcode
    return message[:2] + flags.to_bytes(2, "big") + bytes(8)


def build_short_answer(
    message: bytes, rcode: Rcode, *, flags: int = 0, options: Sequence[bytes] = ()
) -> bytes:
    """Build an answer that has no records and is never longer than its query.

    `options`: EDNS options for a client that sent OPT; the first that fit are taken.
    """
    try:
        query = parse_query(message)
    except FormatError as error:
        return build_format_error(message, rcode or error.rcode)
    response = error_response(rcode)
    response.flags |= flags
    for each in options:
        answer = build_answer(query, response, options=each)
        if len(answer) <= len(message):
            return answer
    return build_answer(query, response)


def split_frames(octets: bytes) -> tuple[list[bytes], bytes]:
    """Split a stream into messages (RFC 1035 section 4.2.2) and what is left over.

    A length below a header's stays left over: nothing after it can be trusted.
    """
    messages, offset, size = [], 0, len(octets)
    while size - offset >= 2:
        length = octets[offset] << 8 | octets[offset + 1]
        end = offset + 2 + length
        if end > size or length < MIN_MESSAGE:
            break
        messages.append(octets[offset + 2 : end])
        offset = end
    return messages, octets[offset:]


def hopeless(rest: bytes) -> bool:
    """Tell whether what `split_frames` left begins with a length below a header's."""
    return len(rest) >= 2 and rest[0] == 0 and rest[1] < MIN_MESSAGE


def answerable(message: bytes) -> bool:
    """Tell whether a message deserves an answer: a whole header, no response."""
    return len(message) >= MIN_MESSAGE and message[2] < 0x80


# ---- Metrics -------------------------------------------------------------------------
# One table says what there is: /metrics and the dashboard are both made from it. What
# happens per query is counted here, the rest is asked for when somebody looks.

CACHE, STALE, UPSTREAM, LOCAL = SOURCES = "cache", "stale", "upstream", "local"
TURNED_AWAY = (
    *("acl", "rate-limit", "slip", "overload", "backlog"),
    *("connections", "format-error"),  # which others than Metrics count
)
TYPE_NAMES = {
    **{1: "A", 2: "NS", 5: "CNAME", 6: "SOA", 12: "PTR", 15: "MX", 16: "TXT"},
    **{28: "AAAA", 33: "SRV", 35: "NAPTR", 39: "DNAME", 43: "DS", 44: "SSHFP"},
    **{46: "RRSIG", 47: "NSEC", 48: "DNSKEY", 50: "NSEC3", 52: "TLSA", 64: "SVCB"},
    **{65: "HTTPS", 251: "IXFR", 252: "AXFR", 255: "ANY", 257: "CAA"},
}
RCODE_NAMES = {
    **{0: "NOERROR", 1: "FORMERR", 2: "SERVFAIL", 3: "NXDOMAIN", 4: "NOTIMP"},
    **{5: "REFUSED", 6: "YXDOMAIN", 7: "YXRRSET", 8: "NXRRSET", 9: "NOTAUTH"},
    **{10: "NOTZONE", 16: "BADVERS", 23: "BADCOOKIE"},
}
LATENCIES = tuple(0.00025 * 2**n for n in range(16))  # s, CoreDNS's buckets
SIZES = (
    *(0.0, 100.0, 200.0, 300.0, 400.0, 511.0, 1023.0, 2047.0, 4095.0, 8291.0),
    *(16e3, 32e3, 48e3, 64e3),
)


class View(NamedTuple):
    """How a panel of the dashboard shows a family."""

    panel: str
    query: str = "rate"  # a key of QUERIES
    by: str = ""  # the labels that are kept, with commas
    unit: str = ""  # as Grafana calls it, where it is not the query's usual one


class Family:
    """A metric: what /metrics says of it, and which panels show it."""

    def __init__(
        self, name: str, kind: str, labels: str, help_text: str, *views: View
    ) -> None:
        """Describe one; `kind`: counter, gauge or histogram; labels with commas."""
        self.name = name
        self.kind = kind
        self.labels = labels.split(",") if labels else []
        self.help = help_text
        self.views = views


TABLE = {
    "Overview": (
        Family(
            "dotproxy_build_info",
            "gauge",
            "version,python,openssl",
            "What runs: always 1.",
            View("Version", "info", "version,python,openssl"),
        ),
        Family(
            "process_start_time_seconds",
            "gauge",
            "",
            "When the process started, in seconds since 1970.",
            View("Uptime", "age"),
        ),
        Family(
            "dotproxy_queries_in_flight",
            "gauge",
            "",
            "Queries of clients that wait for an answer.",
            View("Queries in flight", "now"),
        ),
    ),
    "Queries": (
        Family(
            "dotproxy_dns_requests_total",
            "counter",
            "proto,family,type",
            "Queries answered.",
            View("Queries by transport", "rate", "proto,family"),
            View("Queries by type", "rate", "type"),
        ),
        Family(
            "dotproxy_dns_responses_total",
            "counter",
            "rcode,source",
            "Responses by RCODE and by where they came from.",
            View("Responses by RCODE", "rate", "rcode"),
            View("Responses by source", "rate", "source"),
        ),
        Family(
            "dotproxy_dns_request_duration_seconds",
            "histogram",
            "source",
            "Time from a query to its answer, by the answer's source.",
            View("Time to answer", "quantiles"),
            View("Time to answer by source, p95", "p95", "source"),
            View("Time to answer, heat map", "heat", "le"),
        ),
        Family(
            "dotproxy_dns_request_size_bytes",
            "histogram",
            "",
            "Size of queries.",
            View("Message size, mean", "mean"),
        ),
        Family(
            "dotproxy_dns_response_size_bytes",
            "histogram",
            "",
            "Size of responses.",
            View("Message size, mean", "mean"),
        ),
        Family(
            "dotproxy_dns_do_requests_total",
            "counter",
            "",
            "Queries that ask for DNSSEC records (DO bit).",
            View("Queries with DO"),
        ),
        Family(
            "dotproxy_turned_away_total",
            "counter",
            "reason",
            "Queries and connections turned away or dropped, by reason.",
            View("Turned away", "rate", "reason"),
        ),
    ),
    "Cache": (
        Family(
            "dotproxy_cache_hits_total",
            "counter",
            "",
            "Queries answered from the cache, without stale answers.",
            View("Cache hit ratio", "ratio"),
        ),
        Family(
            "dotproxy_cache_misses_total",
            "counter",
            "",
            "Queries that the cache could not answer.",
            View("Cache misses"),
        ),
        Family(
            "dotproxy_cache_entries",
            "gauge",
            "",
            "Answers in the cache.",
            View("Cache entries", "now"),
        ),
        Family(
            "dotproxy_cache_size_bytes",
            "gauge",
            "",
            "Memory that the cache's answers take.",
            View("Cache memory", "now", "", "bytes"),
        ),
        Family(
            "dotproxy_cache_evictions_total",
            "counter",
            "",
            "Answers put out to make room.",
            View("Evictions, refreshes, stale answers"),
        ),
        Family(
            "dotproxy_cache_prefetch_total",
            "counter",
            "",
            "Cached answers asked for again with nobody waiting.",
            View("Evictions, refreshes, stale answers"),
        ),
        Family(
            "dotproxy_cache_served_stale_total",
            "counter",
            "",
            "Queries answered with an expired answer (RFC 8767).",
            View("Evictions, refreshes, stale answers"),
        ),
    ),
    "Upstreams": (
        Family(
            "dotproxy_upstream_up",
            "gauge",
            "upstream",
            "Whether the upstream answers, as far as is known.",
            View("Upstream up", "now", "upstream"),
        ),
        Family(
            "dotproxy_upstream_requests_total",
            "counter",
            "upstream",
            "Queries sent to the upstream, with those sent again.",
            View("Queries by upstream", "rate", "upstream"),
        ),
        Family(
            "dotproxy_upstream_request_duration_seconds",
            "histogram",
            "upstream",
            "Time the upstream took to answer.",
            View("Upstream latency, p50", "p50", "upstream"),
            View("Upstream latency, p95", "p95", "upstream"),
        ),
        Family(
            "dotproxy_upstream_latency_seconds",
            "gauge",
            "upstream",
            "Smoothed latency that the choice of upstream goes by.",
            View("Smoothed latency", "most", "upstream"),
        ),
        Family(
            "dotproxy_upstream_failures_total",
            "counter",
            "upstream,cause",
            "Connections that failed or broke with queries unanswered, by cause; "
            "`rcode`: responses such as SERVFAIL.",
            View("Upstream failures", "rate", "upstream,cause"),
        ),
        Family(
            "dotproxy_upstream_connections",
            "gauge",
            "upstream",
            "Open connections.",
            View("Connections", "now", "upstream"),
        ),
        Family(
            "dotproxy_upstream_conn_cache_hits_total",
            "counter",
            "upstream",
            "Queries sent over a connection that was open.",
            View("Connections reused", "ratio", "upstream"),
        ),
        Family(
            "dotproxy_upstream_conn_cache_misses_total",
            "counter",
            "upstream",
            "Queries that waited for a new connection.",
            View("Queries that waited for a connection", "rate", "upstream"),
        ),
        Family(
            "dotproxy_upstream_handshakes_total",
            "counter",
            "upstream,result",
            "Connections begun: `full` or `resumed` TLS, or why there is none.",
            View("Handshakes", "rate", "upstream,result"),
        ),
        Family(
            "dotproxy_upstream_closes_total",
            "counter",
            "upstream,reason",
            "Open connections that ended, by reason.",
            View("Connections ended", "rate", "upstream,reason"),
        ),
        Family(
            "dotproxy_upstream_replays_total",
            "counter",
            "upstream",
            "Queries sent again since their connection broke.",
            View("Replays and hedges", "rate", "upstream"),
        ),
        Family(
            "dotproxy_upstream_hedges_total",
            "counter",
            "upstream",
            "Copies of overdue queries sent here.",
            View("Replays and hedges", "rate", "upstream"),
        ),
        Family(
            "dotproxy_upstream_hedges_won_total",
            "counter",
            "upstream",
            "Copies of overdue queries that were answered first.",
            View("Replays and hedges", "rate", "upstream"),
        ),
        Family(
            "dotproxy_upstream_idle_life_seconds",
            "gauge",
            "upstream",
            "How long the upstream keeps idle connections, as learned.",
            View("Idle life", "most", "upstream"),
        ),
        Family(
            "dotproxy_upstream_certificate_expiry_timestamp_seconds",
            "gauge",
            "upstream",
            "When the upstream's certificate expires, in seconds since 1970.",
            View("Certificate, days left", "days left", "upstream"),
        ),
    ),
    "Limits": (
        Family(
            "dotproxy_stream_clients",
            "gauge",
            "proto",
            "Connected clients, by protocol.",
            View("TCP and DoT clients", "now", "proto"),
        ),
        Family(
            "dotproxy_pool_threads_busy",
            "gauge",
            "pool",
            "Threads of the pool at work.",
            View("Threads busy", "now", "pool"),
        ),
        Family(
            "dotproxy_pool_threads_limit",
            "gauge",
            "pool",
            "Threads that the pool may have.",
            View("Threads allowed", "now", "pool"),
        ),
    ),
    "Process": (
        Family(
            "process_cpu_seconds_total",
            "counter",
            "",
            "User and system CPU time.",
            View("CPU", "rate", "", "percentunit"),
        ),
        Family(
            "process_resident_memory_bytes",
            "gauge",
            "",
            "Resident memory.",
            View("Memory", "now", "", "bytes"),
        ),
        Family(
            "process_open_fds",
            "gauge",
            "",
            "Open file descriptors.",
            View("File descriptors", "now"),
        ),
        Family(
            "process_max_fds",
            "gauge",
            "",
            "File descriptors that may be open.",
            View("File descriptors", "now"),
        ),
        Family(
            "process_threads",
            "gauge",
            "",
            "Threads.",
            View("Threads", "now"),
        ),
    ),
}


def runs(values: Sequence[T]) -> list[tuple[T, int]]:
    """Return the values, each with how many equal ones stand in a row.

    For batches, whose values are mostly alike: half the time of a Counter.
    """
    if not values:
        return []
    found = []
    last, times = values[0], 0
    for value in values:
        if value == last:
            times += 1
        else:
            found.append((last, times))
            last, times = value, 1
    return [*found, (last, times)]


class Histogram:
    """Counts of values up to each bound; guarded by its owner."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.sum = 0.0
        self.counts = [0] * (len(bounds) + 1)  # by bucket

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value so many times."""
        self.counts[bisect.bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def observe_all(self, values: Sequence[float]) -> None:
        """Count each value once; of a batch most are the same."""
        for value, times in runs(values):
            self.observe(value, times)

    def copy(self) -> Histogram:
        """Return a copy that does not change."""
        made = Histogram(self.bounds)
        made.sum, made.counts = self.sum, self.counts.copy()
        return made

    def cumulated(self) -> list[tuple[float, int]]:
        """Return each bound, infinity last, with the number of values up to it."""
        return list(zip((*self.bounds, math.inf), itertools.accumulate(self.counts)))


# The name of a family, the values of its labels, and the value.
Sample = tuple[str, "tuple[str, ...]", "float | Histogram"]


def escape(text: str, quotes: bool = True) -> str:
    """Escape what stands between quotes, or in a line of help."""
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quotes else text


def format_number(value: float) -> str:
    """Write a number as both formats have it."""
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return "NaN" if math.isnan(value) else repr(value)


def format_sample(name: str, labels: Iterable[tuple[str, str]], value: float) -> str:
    """Write one line."""
    pairs = ",".join(f'{label}="{escape(text)}"' for label, text in labels)
    return f"{name}{{{pairs}}} {format_number(value)}".replace("{}", "", 1)


def format_family(
    family: Family,
    samples: Iterable[tuple[tuple[str, ...], float | Histogram]],
    created: float | None,
) -> Iterator[str]:
    """Write a family's lines: OpenMetrics 1.0 if `created` is given, else 0.0.4."""
    total = family.kind == "counter"
    base = family.name[: -len("_total")] if total else family.name
    title = family.name if created is None else base
    yield f"# HELP {title} {escape(family.help, quotes=created is not None)}"
    yield f"# TYPE {title} {family.kind}"
    for values, value in samples:
        labels = list(zip(family.labels, values))
        if isinstance(value, Histogram):
            buckets = value.cumulated()
            for bound, count in buckets:
                pair = ("le", format_number(bound))
                yield format_sample(f"{base}_bucket", [*labels, pair], count)
            yield format_sample(f"{base}_sum", labels, value.sum)
            yield format_sample(f"{base}_count", labels, buckets[-1][1])
        else:
            yield format_sample(family.name, labels, value)
        if created is not None and family.kind != "gauge":
            yield format_sample(f"{base}_created", labels, created)


def wants_openmetrics(accept: str) -> bool:
    """Tell whether an Accept header prefers OpenMetrics 1.0 to the older format."""
    wishes = {"application/openmetrics-text": 0.0, "text/plain": 0.0}
    for choice in accept.lower().split(","):
        kind, *parameters = (part.strip() for part in choice.split(";"))
        given = dict(part.partition("=")[::2] for part in parameters)
        if given.get("version", "1.0.0") not in ("1.0.0", "0.0.4"):
            continue
        with contextlib.suppress(ValueError):
            quality = float(given.get("q", "1"))
            wishes[kind] = max(wishes.get(kind, 0.0), quality)
    return wishes["application/openmetrics-text"] > wishes["text/plain"]


def format_metrics(samples: Iterable[Sample], created: float | None = None) -> str:
    """Write all samples, in the table's order; OpenMetrics if `created` is given."""
    found: dict[str, list[tuple[tuple[str, ...], float | Histogram]]] = {}
    for name, labels, value in samples:
        found.setdefault(name, []).append((labels, value))
    lines = [
        line
        for family in itertools.chain.from_iterable(TABLE.values())
        if family.name in found
        for line in format_family(family, found[family.name], created)
    ]
    return "\n".join([*lines, *([] if created is None else ["# EOF"]), ""])


def process_samples() -> Iterator[Sample]:
    """Return what the system says of this process: what it does not say is left out."""
    yield "process_cpu_seconds_total", (), time.process_time()
    yield "process_threads", (), threading.active_count()
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield "process_max_fds", (), math.inf if limit == resource.RLIM_INFINITY else limit
    with contextlib.suppress(OSError):
        yield "process_open_fds", (), len(os.listdir("/dev/fd")) - 1  # but for its own
    with contextlib.suppress(OSError), open("/proc/self/statm", "rb") as file:
        pages = int(file.read().split()[1])
        yield "process_resident_memory_bytes", (), pages * resource.getpagesize()


# An answer as it is counted: its source, the query's form, QTYPE as two octets, RCODE,
# and the octets of the query and of the answer.
Label = tuple[str, Form, bytes, int, int, int]


def label_answer(query: Query, source: str, rcode: int, size: int) -> Label:
    """Say what is counted of an answer of `size` octets."""
    return source, query.form, query.question[-4:-2], rcode, query.size, size


@functools.lru_cache(maxsize=16)
def formless(transport: Transport) -> Form:
    """Return what is counted as the form of messages that could not be parsed."""
    return Form(transport)


@functools.lru_cache(maxsize=4096)
def one_label(label: Label) -> Label:
    """Return the same object for equal labels: a table finds it 70 ns sooner."""
    return label


class Observer:
    """Is told of every answer and of who gets none; this one does nothing about it.

    Called without locks, by whichever thread answers: it may not block.
    """

    def answered_at_once(self, tally: list[Label], seconds: float) -> None:
        """These queries of one batch were answered by whom they came to."""

    def answered(self, answers: Sequence[Answered], origin: Origin, now: float) -> None:
        """These queries, which had to wait, have been answered together."""

    def turned_away(self, reason: str, number: int = 1) -> None:
        """So many queries or connections were turned away; `TURNED_AWAY` has why."""


class AnswerCounts:
    """What is counted of answers: plain numbers, guarded by their owner."""

    def __init__(self) -> None:
        # What is usual is there from the start: a rate needs a 0 to begin with.
        transports = itertools.product(("udp", "tcp"), "12", ("A", "AAAA"))
        self.requests = collections.Counter(dict.fromkeys(transports, 0))
        rcodes = itertools.product(("NOERROR", "SERVFAIL", "NXDOMAIN"), SOURCES)
        self.responses = collections.Counter(dict.fromkeys(rcodes, 0))
        self.sizes = Histogram(SIZES), Histogram(SIZES)
        self.dnssec = 0

    def add(self, labels: Mapping[Label, int]) -> None:
        """Count answers."""
        for (source, form, rrtype, rcode, size, answer), number in labels.items():
            name = TYPE_NAMES.get(int.from_bytes(rrtype, "big"), "other")
            self.requests[(*form.transport, name)] += number
            self.responses[RCODE_NAMES.get(rcode, "other"), source] += number
            self.sizes[0].observe(size, number)
            self.sizes[1].observe(answer, number)
            self.dnssec += number * (form.edns_flags >= DO)

    def copy(self) -> AnswerCounts:
        """Return a copy that others may add to."""
        made = AnswerCounts()
        made.requests, made.responses = self.requests.copy(), self.responses.copy()
        made.sizes = self.sizes[0].copy(), self.sizes[1].copy()
        made.dnssec = self.dnssec
        return made

    def samples(self) -> Iterator[Sample]:
        """Return the samples."""
        responses = self.responses
        for labels, number in self.requests.items():
            yield "dotproxy_dns_requests_total", labels, number
        for pair, number in responses.items():
            yield "dotproxy_dns_responses_total", pair, number
        for source, name in ((CACHE, "hits"), (STALE, "served_stale")):
            total = sum(n for (_, each), n in responses.items() if each == source)
            yield f"dotproxy_cache_{name}_total", (), total
        yield "dotproxy_dns_do_requests_total", (), self.dnssec
        yield "dotproxy_dns_request_size_bytes", (), self.sizes[0]
        yield "dotproxy_dns_response_size_bytes", (), self.sizes[1]
        broken = responses["FORMERR", LOCAL] + responses["NOTIMP", LOCAL]
        yield "dotproxy_turned_away_total", ("format-error",), broken


class Metrics(Observer):
    """Counts what happens per query, and knows whom to ask for all else."""

    MAX_LABELS = 1024  # sorts of answer that are counted apart before they are summed
    TEXT = "text/plain; version=0.0.4; charset=utf-8"
    OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self._created = wall()
        self._collectors: list[Callable[[], Iterable[Sample]]] = [process_samples]
        self._lock = threading.Lock()  # guards all below
        # To count labels as they come, and sum them up when somebody looks, costs a hit
        # 0.15 us; to add to each number that they stand for, more than 1 us.
        self._labels: collections.Counter[Label] = collections.Counter()
        self._counts = AnswerCounts()
        self._durations = {source: Histogram(LATENCIES) for source in SOURCES}
        self._misses = 0
        self._turned_away = dict.fromkeys(TURNED_AWAY[:-2], 0)

    def add_collector(self, collect: Callable[[], Iterable[Sample]]) -> None:
        """Have `collect` called by whoever looks; before any thread is started."""
        self._collectors.append(collect)

    def answered_at_once(self, tally: list[Label], seconds: float) -> None:
        """Count a batch."""
        rest = [label[0] for label in tally if label[0] != CACHE]
        durations = self._durations
        with self._lock:
            self._count_locked(tally)
            durations[CACHE].observe(seconds, len(tally) - len(rest))
            for source in rest:
                durations[source].observe(seconds)

    def answered(self, answers: Sequence[Answered], origin: Origin, now: float) -> None:
        """Count those who had to wait."""
        source, _ = origin
        tally = [
            (source, query.form, query.question[-4:-2], rcode, query.size, len(answer))
            for query, answer, rcode in answers
        ]
        # Those of a batch came together: 0.1 us an answer less than to count each.
        waits = runs([query.received for query, _, _ in answers])
        with self._lock:
            self._count_locked(tally)
            for received, number in waits:
                self._durations[source].observe(now - received, number)
            if source in (UPSTREAM, LOCAL):
                self._misses += len(answers)

    def turned_away(self, reason: str, number: int = 1) -> None:
        """Count them."""
        with self._lock:
            self._turned_away[reason] += number

    def samples(self) -> list[Sample]:
        """Return everything there is to know now; any thread may ask."""
        return [
            *self._own_samples(),
            *itertools.chain(*(c() for c in self._collectors)),
        ]

    def write(self, accept: str) -> tuple[str, str]:
        """Return the content type, which the Accept header chooses, and the text."""
        if wants_openmetrics(accept):
            return self.OPENMETRICS, format_metrics(self.samples(), self._created)
        return self.TEXT, format_metrics(self.samples())

    def _own_samples(self) -> Iterator[Sample]:
        with self._lock:
            counts = self._counts.copy()
            labels = self._labels.copy()
            durations = {key: each.copy() for key, each in self._durations.items()}
            turned_away, misses = self._turned_away.copy(), self._misses
        counts.add(labels)
        yield from counts.samples()
        for source, duration in durations.items():
            yield "dotproxy_dns_request_duration_seconds", (source,), duration
        for reason, number in turned_away.items():
            yield "dotproxy_turned_away_total", (reason,), number
        yield "dotproxy_cache_misses_total", (), misses
        yield "process_start_time_seconds", (), self._created
        versions = __version__, sys.version.split()[0], ssl.OPENSSL_VERSION
        yield "dotproxy_build_info", versions, 1

    def _count_locked(self, tally: list[Label]) -> None:
        labels = self._labels
        labels.update(tally)
        if len(labels) > self.MAX_LABELS:
            self._counts.add(labels)
            labels.clear()


# ---- Dashboard -----------------------------------------------------------------------
# What Grafana imports: each panel that the table of metrics names, a row per heading.

SELECTED = '{job=~"$job",instance=~"$instance"}'
RATE = "sum by (BY) (rate(NAME[$__rate_interval]))"
MEAN = RATE.replace("NAME", "NAME_sum") + " / " + RATE.replace("NAME", "NAME_count")
BUCKETS = "(rate(NAME_bucket[$__rate_interval]))"
QUANTILES = {
    f"p{n}": f"histogram_quantile({n / 100}, sum by (le,BY) {BUCKETS})"
    for n in (50, 90, 95, 99)
}
# By kind of view: the usual unit, and PromQL by legend, where the labels do not tell.
# NAME stands for the metric, OTHER for the misses to its hits, BY for the labels kept.
QUERIES = {
    "rate": ("ops", {"": RATE}),
    "now": ("short", {"": "sum by (BY) (NAME)"}),
    "most": ("s", {"": "max by (BY) (NAME)"}),
    "info": ("short", {"": "max by (BY) (NAME)"}),
    "age": ("s", {"": "time() - min by (BY) (NAME)"}),
    "days left": ("d", {"": "(min by (BY) (NAME) - time()) / 86400"}),
    "mean": ("bytes", {"": MEAN}),
    "ratio": (
        "percentunit",
        {"": f"{RATE} / ({RATE} + {RATE.replace('NAME', 'OTHER')})"},
    ),
    "heat": ("s", {"": "sum by (BY) (increase(NAME_bucket[$__rate_interval]))"}),
    "p50": ("s", {"": QUANTILES["p50"]}),
    "p95": ("s", {"": QUANTILES["p95"]}),
    "quantiles": ("s", QUANTILES),
}
# Panels that are no curves over time, by kind of view.
PANEL_KINDS = {"info": "stat", "age": "stat", "days left": "stat", "heat": "heatmap"}
PANELS_IN_ROW = 3
PANEL_WIDTH, PANEL_HEIGHT = 24 // PANELS_IN_ROW, 7  # of a grid that is 24 wide
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
Shown = tuple[Family, View]


def write_promql(
    family: Family, view: View, named: bool = False
) -> list[tuple[str, str]]:
    """Return the legend and the PromQL of each line that a view draws.

    `named`: the legend has to tell the family, as the panel shows several.
    """
    kept = [label for label in view.by.split(",") if label]
    labels = [f"{{{{{label}}}}}" for label in kept]
    name = family.name.replace("dotproxy_", "").replace("_total", "")
    found = []
    for legend, text in QUERIES[view.query][1].items():
        other = family.name.replace("hits", "misses")
        text = re.sub(r"NAME(\w*)", rf"{family.name}\1{SELECTED}", text)
        text = text.replace("OTHER", other + SELECTED)
        text = text.replace("le,BY", ",".join(["le", *kept])).replace("BY", view.by)
        words = " ".join([*labels, legend, name if named else ""]).strip()
        found.append((words or name, text))
    return found


def build_targets(shown: Sequence[Shown]) -> list[dict[str, object]]:
    """Build the queries of a panel."""
    lines = [
        (view, *line)
        for family, view in shown
        for line in write_promql(family, view, len(shown) > 1)
    ]
    return [
        {
            "refId": chr(ord("A") + number),
            "datasource": DATASOURCE,
            "expr": text,
            "legendFormat": "{{le}}" if view.query == "heat" else legend,
            "format": "heatmap" if view.query == "heat" else "time_series",
            "instant": view.query == "info",
            "range": view.query != "info",
        }
        for number, (view, legend, text) in enumerate(lines)
    ]


def build_panel(title: str, shown: Sequence[Shown]) -> dict[str, object]:
    """Build a panel, but for its number and place."""
    view = shown[0][1]
    kind = PANEL_KINDS.get(view.query, "timeseries")
    options: dict[str, object] = {
        "timeseries": {
            "legend": {
                "displayMode": "list",
                "placement": "bottom",
                "showLegend": True,
            },
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "stat": {
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "textMode": "name" if view.query == "info" else "auto",
            "colorMode": "none",
        },
        "heatmap": {"calculate": False, "yAxis": {"unit": "s"}},
    }
    defaults: dict[str, object] = {"unit": view.unit or QUERIES[view.query][0]}
    if kind == "timeseries":
        defaults.update(min=0, custom={"fillOpacity": 10, "showPoints": "never"})
    return {
        "type": kind,
        "title": title,
        "description": " ".join(dict.fromkeys(family.help for family, _ in shown)),
        "datasource": DATASOURCE,
        "targets": build_targets(shown),
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options[kind],
    }


def build_panels() -> list[dict[str, object]]:
    """Build all panels, each in its place below the heading of its row."""
    panels: list[dict[str, object]] = []
    numbers, top = itertools.count(1), 0
    for heading, families in TABLE.items():
        shown: dict[str, list[Shown]] = {}
        for family in families:
            for view in family.views:
                shown.setdefault(view.panel, []).append((family, view))
        place = {"x": 0, "y": top, "w": 24, "h": 1}
        row = {"type": "row", "title": heading, "collapsed": False, "panels": []}
        panels.append({"id": next(numbers), "gridPos": place, **row})
        top += 1
        for number, (title, views) in enumerate(shown.items()):
            down, across = divmod(number, PANELS_IN_ROW)
            place = {
                "x": across * PANEL_WIDTH,
                "y": top + down * PANEL_HEIGHT,
                "w": PANEL_WIDTH,
                "h": PANEL_HEIGHT,
            }
            panel = build_panel(title, views)
            panels.append({"id": next(numbers), "gridPos": place, **panel})
        top += -(-len(shown) // PANELS_IN_ROW) * PANEL_HEIGHT
    return panels


def build_variable(name: str, query: str) -> dict[str, object]:
    """Build a variable of the dashboard that chooses among a label's values."""
    return {
        "type": "query",
        "name": name,
        "label": name.capitalize(),
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,  # whenever the time range changes
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def build_dashboard() -> dict[str, object]:
    """Build the dashboard, as Grafana imports it."""
    build = "dotproxy_build_info"
    datasource = {
        "type": "datasource",
        "name": "datasource",
        "label": "Data source",
        "query": "prometheus",
    }
    variables = [
        datasource,
        build_variable("job", f"label_values({build}, job)"),
        build_variable("instance", f'label_values({build}{{job=~"$job"}}, instance)'),
    ]
    return {
        "uid": "dotproxy",
        "title": "dotproxy",
        "description": "Plain DNS in, DNS over TLS out.",
        "tags": ["dns", "dotproxy"],
        "schemaVersion": 41,  # of Grafana 12; it brings older ones up to date itself
        "version": 1,
        "editable": True,
        "graphTooltip": 1,  # one crosshair for all panels
        "timezone": "browser",
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "30s",
        "annotations": {"list": []},
        "links": [],
        "templating": {"list": variables},
        "panels": build_panels(),
    }


# ---- Logging (Elastic Common Schema 9.4) ---------------------------------------------
# What happens to the proxy, and each query, as lines of text or of JSON. Who logs never
# waits: each log has a thread that writes, and a bound on what waits for it.

ECS_VERSION = "9.4.0"
PRIORITIES = {10: 7, 20: 6, 30: 4, 40: 3, 50: 2}  # of levels for journald, sd-daemon(3)


def note(level: int, event: str, *, bug: bool = False, **facts: object) -> None:
    """Log an event and its facts, as `event: key=value` or JSON; `bug`: and the error.

    Any thread may call it, with no lock held; it never blocks.
    """
    if logger.isEnabledFor(level):
        pairs = " ".join(f"{key}={value}" for key, value in facts.items())
        text = f"{event}: {pairs}" if facts else event
        extra = {"event": event, "facts": facts}
        logger.log(level, "%s", text, exc_info=bug, extra=extra)


def is_journal(descriptor: int, environment: Mapping[str, str]) -> bool:
    """Tell whether what is written there goes to the journal (systemd.exec(5))."""
    try:
        status = os.fstat(descriptor)
    except OSError:
        return False
    return environment.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class Output:
    """A file that threads of logs write whole lines to."""

    def __init__(self, descriptor: int, torn: bool = False) -> None:
        self._descriptor = descriptor
        # Guards _torn and the order of octets: it is held over the write, which may
        # wait, by threads that have nothing else to do.
        self._lock = threading.Lock()
        self._torn = torn  # an error cut the last line

    def write(self, octets: bytes) -> tuple[int, str]:
        """Write lines; return how many were lost and why. Blocks."""
        with self._lock:
            rest = b"\n" + octets if self._torn else octets
            error = ""
            while rest and not error:
                try:
                    written = os.write(self._descriptor, rest)
                    self._torn = rest[written - 1] != 10
                    rest = rest[written:]
                except BlockingIOError:
                    poller = select.poll()
                    poller.register(self._descriptor, select.POLLOUT)
                    poller.poll()
                except OSError as failure:
                    error = failure.strerror or str(failure)
        return rest.count(b"\n") - (len(rest) > len(octets)), error

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


STDERR = Output(2)


class Courier(Generic[T]):
    """Carries items from threads that must not wait to a thread of its own."""

    ROUND = 1.0  # s after which `tick` is called where there is nothing to carry
    PATIENCE = 2.0  # s that the end waits for a file that takes nothing

    def __init__(
        self,
        name: str,
        limit: int,
        deliver: Callable[[list[T]], None],
        tick: Callable[[], None],
        *,
        gather: float = 0.0,
    ) -> None:
        """Prepare; `gather`: seconds that a batch may take to fill.

        `limit`: of the lines that may wait, each KiB of an item counting as one more.

        `deliver` and `tick` are called in the thread, and may block.
        """
        self._limit = limit
        self._deliver = deliver
        self._tick = tick
        self._gather = gather
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._ended = threading.Event()
        self._lock = threading.Lock()  # guards all below, but for _carried
        self._changed = threading.Condition(self._lock)  # told of the first item
        self._items: list[T] = []
        self._waiting = 0  # what the items take of the limit
        self._lines = 0  # that they stand for
        self._carried = 0  # the same of those being delivered, by who delivers them
        self._dropped = 0

    @property
    def dropped(self) -> int:
        """Return how many lines found no room, or no end: a snapshot."""
        return self._dropped

    def start(self) -> None:
        """Start the thread; what was put before waits for it."""
        self._thread.start()

    def put(self, item: T, lines: int = 1, octets: int = 0) -> None:
        """Have an item carried, or count it as dropped; any thread, never blocks.

        It stands for so many lines, and holds so many octets.
        """
        size = lines + (octets >> 10)
        with self._lock:
            if self._waiting + size > self._limit:
                self._dropped += lines
                return
            if not self._items:
                self._changed.notify()
            self._items.append(item)
            self._waiting += size
            self._lines += lines

    def wake(self) -> None:
        """Have `tick` called now."""
        with self._lock:
            self._changed.notify()

    def close(self) -> None:
        """Deliver what is there, within the bound, and end the thread."""
        if self._ended.is_set():
            return
        self._ended.set()
        self.wake()
        if self._thread.ident is not None:
            self._thread.join(self.PATIENCE)
        if not self._thread.is_alive():
            self._carry()
            return
        with self._lock:
            self._dropped += self._lines + self._carried

    def _run(self) -> None:
        while not self._ended.is_set():
            with self._lock:
                if not self._items and not self._ended.is_set():
                    self._changed.wait(self.ROUND)
                waiting = bool(self._items)
            if waiting and self._gather:
                self._ended.wait(self._gather)
            self._carry()

    def _carry(self) -> None:
        try:
            self._deliver_all()
            self._tick()
            self._deliver_all()  # what `tick` had to say
        except Exception:
            logger.exception("internal error: thread=%s", self._thread.name)

    def _deliver_all(self) -> None:
        while items := self._take():
            self._deliver(items)
            self._carried = 0

    def _take(self) -> list[T]:
        with self._lock:
            items, self._items, self._waiting = self._items, [], 0
            self._lines, self._carried = 0, self._lines
        return items


CONVERSION = re.compile(r"(?:(\w+)=)?(%[-\d.]*[a-z])")  # as log calls have them
PAIR_IN_TEXT = re.compile(r"(\w+)=(\S+)")
ENDPOINT = re.compile(r"(?:tcp://)?\[?([^]\s#]+?)\]?:(\d+)(?:#(\S+))?")
FACT_FIELDS = {
    "error": "error.message",
    "thread": "process.thread.name",
    "client": "client.address",
}


def values_of(record: logging.LogRecord) -> list[tuple[str, str]]:
    """Return each argument of a log call as text, with its key where it has one."""
    arguments = record.args if isinstance(record.args, tuple) else ()
    found = CONVERSION.findall(str(record.msg))
    return [(k, form % (value,)) for (k, form), value in zip(found, arguments)]


def facts_of(record: logging.LogRecord) -> dict[str, str]:
    """Recover `key=value` facts from a log call: `"down: name=%s", name`."""
    values = values_of(record)
    if any(key for key, _ in values):
        return {key: text for key, text in values if key}
    return dict(PAIR_IN_TEXT.findall(record.getMessage()))


def upstream_fields(text: str) -> dict[str, object]:
    """Return ECS fields for an upstream as str() has it; none for anything else."""
    found = ENDPOINT.fullmatch(text)
    if found is None:
        return {}
    where = {"destination.address": found[1], "destination.port": int(found[2])}
    return {**where, "destination.domain": found[3]} if found[3] else where


def ecs_fact(key: str, text: str) -> dict[str, object]:
    """Return the ECS fields of a fact: `labels` where there is none of that meaning."""
    fields = upstream_fields(text) if key in ("name", "upstream") else {}
    return fields or {FACT_FIELDS.get(key, f"labels.{key}"): text}


@functools.lru_cache(maxsize=1024)  # 0.1 us against 2 us; many queries share one
def timestamp(milliseconds: int) -> str:
    """Return a wall clock's time in ISO 8601, UTC."""
    second, rest = divmod(milliseconds, 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(second))}.{rest:03d}Z"


class ECSFormatter(logging.Formatter):
    """Makes a JSON object with dotted ECS names of a log record."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the object, one line."""
        return json.dumps(self.fields(record), separators=(",", ":"))

    def fields(self, record: logging.LogRecord) -> dict[str, object]:
        """Return the ECS fields of a record."""
        fields: dict[str, object] = {
            "@timestamp": timestamp(int(record.created * 1000)),
            "log.level": record.levelname.lower(),
            "message": record.getMessage(),
            "ecs.version": ECS_VERSION,
            "event.kind": "event",
            "event.category": ["network"],
            "event.dataset": "dotproxy.log",
            "event.action": str(record.msg).partition(":")[0].replace(" ", "-"),
            "log.logger": record.name,
            "process.pid": record.process,
            "process.thread.name": record.threadName,
            "service.name": "dotproxy",
            "service.version": __version__,
        }
        for key, text in facts_of(record).items():
            fields.update(ecs_fact(key, text))
        if record.exc_info and record.exc_info[0]:
            fields["error.type"] = record.exc_info[0].__name__
            fields["error.message"] = str(record.exc_info[1])
            fields["error.stack_trace"] = self.formatException(record.exc_info)
        return fields


CONTROLS = {code: f"\\{code:03d}" for code in (*range(32), *range(127, 160))}


class TextFormatter(logging.Formatter):
    """Makes a line of a log record; what peers say cannot begin another."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line without traceback."""
        return super().formatMessage(record).translate(CONTROLS)


class Repeats(logging.Filter):
    """Lets a message pass a few times in a while, then counts it; any thread.

    Messages are the same if their level and whole text are: another upstream, or
    another error, is another message.
    """

    LIMIT = 5  # times that it passes
    WINDOW = 60.0  # s from the first time
    MESSAGES = 256  # that are counted at once; the oldest makes room

    def __init__(self, clock: Callable[[], float] = elapsed) -> None:
        super().__init__()
        self._clock = clock
        self._lock = threading.Lock()  # guards all below
        self._counts: dict[tuple[int, str], int] = {}
        # When it was first logged, and the record, in order of time.
        self._firsts: dict[tuple[int, str], tuple[float, logging.LogRecord]] = {}
        self._over: collections.deque[logging.LogRecord] = collections.deque(
            maxlen=self.MESSAGES
        )

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether it passes."""
        key, now = (record.levelno, record.getMessage()), self._clock()
        with self._lock:
            self._forget_locked(now, self.MESSAGES - (key not in self._firsts))
            if key not in self._firsts:
                self._firsts[key] = (now, self._without_objects(record))
            self._counts[key] = count = self._counts.get(key, 0) + 1
        return count <= self.LIMIT

    def ended(self, everything: bool = False) -> list[logging.LogRecord]:
        """Return, once each, what to log of messages whose time is over."""
        with self._lock:
            self._forget_locked(self._clock(), 0 if everything else self.MESSAGES)
            records = list(self._over)
            self._over.clear()
        return records

    def _forget_locked(self, now: float, room: int) -> None:
        """Forget messages that are over, and the oldest ones beyond the room."""
        while self._firsts:
            key, (first, record) = next(iter(self._firsts.items()))
            if now - first < self.WINDOW and len(self._firsts) <= room:
                return
            del self._firsts[key]
            more = self._counts.pop(key) - self.LIMIT
            if more > 0:
                record.msg = f"{record.msg} repeated=%s"
                record.args = (*(record.args or ()), str(more))
                record.created = time.time()
                self._over.append(record)

    @staticmethod
    def _without_objects(record: logging.LogRecord) -> logging.LogRecord:
        """Copy a record with its arguments as text: errors hold on to frames."""
        plain = copy.copy(record)
        plain.msg = CONVERSION.sub(
            lambda found: f"{found[1]}=%s" if found[1] else "%s", str(record.msg)
        )
        plain.args = tuple(text for _, text in values_of(record))
        plain.exc_info = plain.exc_text = plain.stack_info = None
        return plain


class OperationalLog(logging.Handler):
    """Writes log records in a thread of its own."""

    BACKLOG = 1000  # lines that may wait, for a reader of stderr that hangs

    def __init__(
        self,
        output: Output,
        formatter: logging.Formatter,
        *,
        journal: bool = False,
        clock: Callable[[], float] = elapsed,
    ) -> None:
        """Prepare; with `journal` lines begin with their priority."""
        super().__init__()
        self.setFormatter(formatter)
        self._output = output
        self._journal = journal
        self._repeats = Repeats(clock)
        self.addFilter(self._repeats)
        self._courier: Courier[str] = Courier(
            "log", self.BACKLOG, self._write, self._tick
        )
        self._told = 0  # dropped lines that were reported

    def start(self) -> None:
        """Start to write, first what was logged before."""
        self._courier.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Have a record written; any thread, never blocks."""
        line = self.format(record)
        if self._journal:
            prefix = f"<{PRIORITIES.get(record.levelno, 6)}>"
            line = prefix + line.replace("\n", "\n" + prefix)
        self._courier.put(line)

    def close(self) -> None:
        """Write what is left, within a bound."""
        self._emit_all(self._repeats.ended(everything=True))
        self._courier.close()
        super().close()

    def _write(self, lines: list[str]) -> None:
        text = "\n".join(lines) + "\n"
        self._output.write(text.encode("utf-8", "backslashreplace"))

    def _tick(self) -> None:
        self._emit_all(self._repeats.ended())
        dropped = self._courier.dropped
        if dropped > self._told:
            logger.warning("log lines lost: number=%d", dropped - self._told)
            self._told = dropped

    def _emit_all(self, records: Iterable[logging.LogRecord]) -> None:
        for record in records:
            self.emit(record)


Given = tuple[bytes, bytes, "tuple[str, int]"]  # a query, its answer and its client


class AnsweredAtOnce(NamedTuple):
    """Queries of a batch that nobody had to wait for, as the query log gets them."""

    given: Sequence[Given]
    labels: Sequence[Label]  # one for each of those given
    times: tuple[float, float]  # when they came, by `elapsed`; seconds it took


class AnsweredLater(NamedTuple):
    """Queries that had to wait and were answered together: so are most of a log.

    They are handed over as they are: a record for each costs 0.4 us of the thread that
    answers.
    """

    answers: Sequence[Answered]
    origin: Origin
    now: float  # by `elapsed`


AnsweredBatch = Union[AnsweredAtOnce, AnsweredLater]

PRIVACY = ("none", "prefix", "hash", "no-names")
CLASS_NAMES = {1: "IN", 3: "CH", 4: "HS", 254: "NONE", 255: "ANY"}
OPCODE_NAMES = {0: "QUERY", 1: "IQUERY", 2: "STATUS", 4: "NOTIFY", 5: "UPDATE"}
FLAG_NAMES = {AA: "AA", TC: "TC", RD: "RD", RA: "RA", AD: "AD", CD: "CD"}
OWN_ADDRESS = b"\xc0\x0c" + PAIR.pack(TYPE_A, CLASS_IN)  # of the name that was asked
ADDRESS_TYPES = {(TYPE_A, 4), (TYPE_AAAA, 16)}  # and the octets of their data
TRANSPORTS = {
    "udp": '"network.transport":"udp","labels.proto":"udp"',
    "tcp": '"network.transport":"tcp","labels.proto":"tcp"',
    "dot": '"network.transport":"tcp","labels.proto":"dot"',
}
PLAIN_OCTETS = b"-_" + string.ascii_letters.encode() + string.digits.encode()
# Octets of labels as zone files have them, RFC 1035 section 5.1.
OCTET_TEXTS = [
    f"\\{chr(c)}" if c in b'."\\' else chr(c) if 33 <= c < 127 else f"\\{c:03d}"
    for c in range(256)
]


def label_text(label: bytes) -> str:
    """Return a label as text."""
    if not label.strip(PLAIN_OCTETS):  # 0.1 us, where a regular expression takes 0.3
        return label.decode("ascii")
    return "".join([OCTET_TEXTS[octet] for octet in label])


@functools.lru_cache(maxsize=4096)  # parents recur, whole names less: 1.0 us, not 2.2
def parent_text(name: bytes) -> str:
    """Return the rest of a name as text, with a dot before it; nothing for the root."""
    labels, offset = [""], 0
    while length := name[offset]:
        labels.append(label_text(name[offset + 1 : offset + 1 + length]))
        offset += 1 + length
    return ".".join(labels) if offset else ""


def kind_text(kind: bytes) -> tuple[str, str]:
    """Return the names of QTYPE and QCLASS; TYPE0 and CLASS0 as in RFC 3597."""
    rrtype, rrclass = PAIR.unpack(kind)
    return (
        TYPE_NAMES.get(rrtype, f"TYPE{rrtype}"),
        CLASS_NAMES.get(rrclass, f"CLASS{rrclass}"),
    )


def mask_client(address: str, privacy: str, key: bytes) -> str:
    """Return what the log says of a client's address."""
    address = address.partition("%")[0]
    if address.startswith("::ffff:") and "." in address:  # IPv6 only carries it
        address = address[7:]
    if privacy == "none":
        return address
    if privacy == "hash":
        octets = ipaddress.ip_address(address).packed
        return hashlib.blake2b(octets, digest_size=8, key=key).hexdigest()
    length = 56 if ":" in address else 24
    return str(ipaddress.ip_network((address, length), strict=False))


def upper_rcode(answer: bytes) -> int:
    """Return the bits of the RCODE in an OPT record that follows the question."""
    if answer[5] and answer[11]:
        end = end_of_question(answer)
        if answer[end : end + 3] == b"\0\0\x29":
            return answer[end + 5] << 4
    return 0


def address_text(octets: bytes) -> str:
    """Return an IPv4 or IPv6 address as text."""
    family = socket.AF_INET if len(octets) == 4 else socket.AF_INET6
    return socket.inet_ntop(family, octets)


def flag_names(flags: int) -> list[str]:
    """List the header flags that are set."""
    return [name for bit, name in FLAG_NAMES.items() if flags & bit]


class Memo(dict[K, V]):
    """Values that are made when they are first asked for; for one thread.

    A look is a dict's own, without a call. When it is full it begins anew.
    """

    def __init__(self, make: Callable[[K], V], limit: int) -> None:
        super().__init__()
        self._make = make
        self._limit = limit

    def __missing__(self, key: K) -> V:
        if len(self) >= self._limit:
            self.clear()
        value = self[key] = self._make(key)
        return value


class QueryLines(abc.ABC):
    """Makes a line of each query, of pieces that are made once where they repeat.

    The pieces are, in this order: time; client; its port; AFTER_CLIENT; ID; what is
    before the name; its first label; the rest of it and more; octets of the query; what
    is behind; outcome; addresses; AFTER_OUTCOME; octets of the answer; seconds, source
    and upstream. A line takes 1.8 us, where to format one took 3.1. That the two loops
    add the same last pieces is part of it: with rows from generators for one loop 4 %
    fewer uncached queries are answered at full load. For one thread.
    """

    CACHED = 4096  # of clients, questions and other things that recur
    AFTER_CLIENT: str
    AFTER_OUTCOME: str
    DOT: str  # at the end of a name
    ADDRESSES = False  # whether those of an answer are told

    def __init__(self, privacy: str, *, key: bytes, prefix: str = "") -> None:
        """Prepare; `key` is for hashes of clients, `prefix` for lines to the journal.

        Text has no time there: the journal gives it one.
        """
        self._privacy = privacy
        self._key = key
        self._prefix = prefix
        self._client = Memo(self._describe_client, self.CACHED)
        self._again = Memo(self._parse, self.CACHED)
        self._outcome = Memo(self._describe_outcome, self.CACHED)
        self._origin = Memo(self._describe_origin, self.CACHED)
        self._around = Memo(self._describe_form, self.CACHED)
        self._number: Memo[int, str] = Memo(str, self.CACHED)

    def render(self, batches: Iterable[AnsweredBatch], offset: float) -> str:
        """Make lines; `offset`: from `elapsed` to wall-clock time."""
        pieces: list[str] = []
        for batch in batches:
            if isinstance(batch, AnsweredLater):
                self._add_later(pieces, batch, offset)
            else:
                self._add_at_once(pieces, batch, offset)
        return "".join(pieces)

    def _add_later(
        self, pieces: list[str], batch: AnsweredLater, offset: float
    ) -> None:
        answers, origin, now = batch
        moment, full = -math.inf, self._privacy == "none"
        labels = self._first_labels([query.question for query, _, _ in answers])
        for (query, answer, _), label in zip(answers, labels):
            question, client = query.question, query.client
            kind = query.form, question[question[0] + 1 :]
            before, between, behind = self._around[kind]
            # Queries that came together begin and end alike.
            if query.received != moment:
                moment = query.received
                start = self._begin(moment + offset)
                end = self._end(now - moment, self._origin[origin])
            flags = answer[2] << 8 | answer[3]
            if not (answer[7] or answer[9]):
                flags |= upper_rcode(answer) << 16
            pieces += (
                start,
                self._client[client[0]],
                self._port(client[1]) if full else "",
                self.AFTER_CLIENT,
                str(answer[0] << 8 | answer[1]),
                before,
                label,
                between,
                self._number[query.size],
                behind,
                self._outcome[flags],
                self._addresses(answer, 12 + len(question)) if self.ADDRESSES else "",
                self.AFTER_OUTCOME,
                self._number[len(answer)],
                end,
            )

    def _add_at_once(
        self, pieces: list[str], batch: AnsweredAtOnce, offset: float
    ) -> None:
        (received, seconds), full = batch.times, self._privacy == "none"
        start = self._begin(received + offset)
        for (asked, answer, client), label in zip(batch.given, batch.labels):
            # Most repeat byte for byte, but for the ID.
            key = asked[2:], label[1].transport[0]
            short = len(asked) <= MAX_KNOWN_TAIL
            what, end_of_asked = self._again[key] if short else self._parse(key)
            flags = answer[2] << 8 | answer[3]
            if not (answer[7] or answer[9]):
                flags |= upper_rcode(answer) << 16
            pieces += (
                start,
                self._client[client[0]],
                self._port(client[1]) if full else "",
                self.AFTER_CLIENT,
                str(answer[0] << 8 | answer[1]),
                what,
                self._outcome[flags],
                self._addresses(answer, end_of_asked) if self.ADDRESSES else "",
                self.AFTER_OUTCOME,
                self._number[len(answer)],
                self._end(seconds, self._origin[label[0], None]),
            )

    def _first_labels(self, questions: Sequence[bytes]) -> list[str]:
        """Return the first label of each question, or what stands for the name."""
        if self._privacy == "no-names":
            return ["-"] * len(questions)
        labels = [question[1 : question[0] + 1] for question in questions]
        if b"".join(labels).strip(PLAIN_OCTETS):
            return [self._escape(label_text(label)) for label in labels]
        return b".".join(labels).decode("ascii").split(".")  # 0.1 us each, not 0.3

    def _parse(self, key: tuple[bytes, str]) -> tuple[str, int]:
        message, proto = b"\0\0" + key[0], key[1]
        try:
            query = parse_query(message, (proto, ""))
        except FormatError:
            return self._describe_misfit(message, proto), 12
        question = query.question
        (label,) = self._first_labels([question])
        kind = query.form, question[question[0] + 1 :]
        before, between, behind = self._around[kind]
        text = f"{before}{label}{between}{query.size}{behind}"
        return text, 12 + len(question)

    def _describe_form(self, key: tuple[Form, bytes]) -> tuple[str, str, str]:
        """Say what is before the first label, between it and the size, and behind.

        The key is the form of the query, and its question without the first label.
        """
        form, rest = key
        if self._privacy == "no-names":
            parent = ""
        elif len(rest) == PAIR.size:
            parent = "."  # of the root, whose label is empty
        else:
            parent = self._escape(parent_text(rest[: -PAIR.size])) + self.DOT
        return self._describe_query(form, parent, *kind_text(rest[-PAIR.size :]))

    @staticmethod
    def _escape(text: str) -> str:
        """Write the text of a label as the line has it."""
        return text

    @abc.abstractmethod
    def _begin(self, received: float) -> str:
        """Begin a line: when the query came, in wall-clock time."""

    @abc.abstractmethod
    def _end(self, seconds: float, origin: str) -> str:
        """End a line: how long it took, and where the answer came from."""

    @abc.abstractmethod
    def _describe_query(
        self, form: Form, parent: str, rrtype: str, rrclass: str
    ) -> tuple[str, str, str]:
        """Say what `_describe_form` says."""

    @abc.abstractmethod
    def _describe_misfit(self, message: bytes, proto: str) -> str: ...

    @abc.abstractmethod
    def _describe_outcome(self, flags: int) -> str:
        """Say what the flags mean, with the upper bits of the RCODE above them."""

    def _addresses(self, answer: bytes, offset: int) -> str:
        raise NotImplementedError  # where ADDRESSES is false

    @abc.abstractmethod
    def _describe_client(self, address: str) -> str: ...

    @abc.abstractmethod
    def _port(self, port: int) -> str: ...

    @abc.abstractmethod
    def _describe_origin(self, key: Origin) -> str:
        """Say what the source and the upstream are."""


class TextQueryLines(QueryLines):
    """Makes lines like CoreDNS's common format."""

    AFTER_CLIENT = " - "
    AFTER_OUTCOME = " "
    DOT = "."

    def _begin(self, received: float) -> str:
        return self._prefix or f"{timestamp(int(received * 1000))} "

    def _end(self, seconds: float, origin: str) -> str:
        return f" {seconds:.6f}s {origin}\n"

    def _describe_query(
        self, form: Form, parent: str, rrtype: str, rrclass: str
    ) -> tuple[str, str, str]:
        do = "true" if form.edns_flags & DO else "false"
        between = f"{parent} {form.transport[0]} "
        return f' "{rrtype} {rrclass} ', between, f' {do} {form.limit}" '

    def _describe_misfit(self, message: bytes, proto: str) -> str:
        return f' "- - - {proto} {len(message)} false {MIN_UDP_SIZE}" '

    def _describe_outcome(self, flags: int) -> str:
        rcode = flags & RCODE_MASK | flags >> 16
        names = ",".join(["qr", *flag_names(flags)]).lower()
        return f"{RCODE_NAMES.get(rcode, f'RCODE{rcode}')} {names}"

    def _describe_client(self, address: str) -> str:
        text = mask_client(address, self._privacy, self._key)
        return f"[{text}]" if ":" in text and self._privacy == "none" else text

    def _port(self, port: int) -> str:
        return f":{port}"

    def _describe_origin(self, key: Origin) -> str:
        return f"{key[0]} {key[1] or '-'}"


def json_members(fields: Mapping[str, object]) -> str:
    """Return the inside of a JSON object."""
    return json.dumps(fields, separators=(",", ":"))[1:-1]


class JSONQueryLines(QueryLines):
    """Makes JSON objects with dotted ECS names."""

    COMMON: Mapping[str, object] = {
        "ecs.version": ECS_VERSION,
        "event.kind": "event",
        "event.category": ["network"],
        "event.type": ["protocol"],
        "event.action": "dns-query",
        "event.dataset": "dotproxy.query",
        "network.protocol": "dns",
        "dns.type": "answer",
        "service.name": "dotproxy",
    }
    AFTER_CLIENT = ',"dns.id":"'
    AFTER_OUTCOME = ',"server.bytes":'
    LAST = json_members(COMMON) + "}\n"
    DOT = ""
    ADDRESSES = True

    def __init__(self, privacy: str, *, key: bytes, prefix: str = "") -> None:
        """Prepare, as the base class does."""
        super().__init__(privacy, key=key, prefix=prefix)
        self._address = Memo(address_text, self.CACHED)
        self._lone = Memo(self._describe_lone, self.CACHED)

    def _begin(self, received: float) -> str:
        return f'{self._prefix}{{"@timestamp":"{timestamp(int(received * 1000))}",'

    def _end(self, seconds: float, origin: str) -> str:
        return f',"event.duration":{int(seconds * 1e9)},{origin},{self.LAST}'

    @staticmethod
    def _escape(text: str) -> str:
        # Not json.dumps, at 5 us: a name in text has nothing else to escape.
        return text.replace("\\", "\\\\").replace('"', '\\"')

    def _describe_query(
        self, form: Form, parent: str, rrtype: str, rrclass: str
    ) -> tuple[str, str, str]:
        between = (
            f'{parent}","dns.question.type":"{rrtype}",'
            f'"dns.question.class":"{rrclass}","dns.op_code":"QUERY",'
            f'{TRANSPORTS[form.transport[0]]},"client.bytes":'
        )
        return '","dns.question.name":"', between, ","

    def _describe_misfit(self, message: bytes, proto: str) -> str:
        opcode = message[2] >> 3 & 15
        name, size = OPCODE_NAMES.get(opcode, f"OPCODE{opcode}"), len(message)
        members = f'"dns.op_code":"{name}",{TRANSPORTS[proto]},"client.bytes":{size}'
        return f'",{members},'

    def _describe_outcome(self, flags: int) -> str:
        rcode = flags & RCODE_MASK | flags >> 16
        done = rcode in (NOERROR, NXDOMAIN)
        return json_members(
            {
                "dns.header_flags": flag_names(flags),
                "dns.response_code": RCODE_NAMES.get(rcode, f"RCODE{rcode}"),
                "event.outcome": "success" if done else "failure",
            }
        )

    def _addresses(self, answer: bytes, offset: int) -> str:
        if self._privacy == "no-names":
            return ""
        if answer[6:8] == b"\0\1" and answer.startswith(OWN_ADDRESS, offset):
            return self._lone[answer[offset + 10 : offset + 16]]  # 0.3 us, not 1.0
        found = []
        for _ in range(answer[6] << 8 | answer[7]):
            compressed = answer[offset] >= 0xC0
            offset = offset + 2 if compressed else skip_name(answer, offset)
            rrtype, _, _, length = RECORD.unpack_from(answer, offset)
            offset += 10 + length
            if (rrtype, length) in ADDRESS_TYPES:
                found.append(self._address[answer[offset - length : offset]])
        return self._list_addresses(found)

    def _describe_lone(self, data: bytes) -> str:
        """Say what the one record of an answer is: RDLENGTH and RDATA of type A."""
        found = [self._address[data[2:]]] if data.startswith(b"\0\4") else []
        return self._list_addresses(found)

    @staticmethod
    def _list_addresses(found: Sequence[str]) -> str:
        known = '","'.join(found)
        return f',"dns.resolved_ip":["{known}"]' if known else ""

    def _describe_client(self, address: str) -> str:
        text = mask_client(address, self._privacy, self._key)
        fields = {"network.type": "ipv6" if ":" in address else "ipv4"}
        if self._privacy == "hash":
            fields["client.address"] = text
        else:
            fields["client.ip"] = text.partition("/")[0]
        return json_members(fields)

    def _port(self, port: int) -> str:
        return f',"client.port":{port}'

    def _describe_origin(self, key: Origin) -> str:
        source, fields = key[0], upstream_fields(str(key[1]))
        return json_members({"labels.source": source, **fields})


def is_torn(path: str) -> bool:
    """Tell whether the last line of a file has no end, as when its disk is full."""
    with contextlib.suppress(OSError):
        if os.path.isfile(path) and os.path.getsize(path):  # else it could block
            with open(path, "rb") as file:
                file.seek(-1, os.SEEK_END)
                return file.read() != b"\n"
    return False


def open_log(path: str) -> Output:
    """Open a file to append to; raises OSError. A new one is for its group as well."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    try:
        opened = os.open(path, flags | os.O_EXCL, 0o640)
        os.fchmod(opened, 0o640)  # whatever the umask is, which changes after the start
    except FileExistsError:
        opened = os.open(path, flags, 0o640)
    return Output(opened, is_torn(path))


class QueryLog:
    """Writes a line for each query, in a thread of its own."""

    BACKLOG = 20_000  # lines that may wait: 0.2 s of the most there are, some 20 MB
    GATHER = 0.05  # s: the write, and waking the thread, cost little per line then
    REPORT = 60.0  # s between reports of lost lines

    def __init__(
        self,
        path: str,
        lines: QueryLines,
        *,
        clock: Callable[[], float] = elapsed,
    ) -> None:
        """Open the file, `-` for stderr; raises ConfigError."""
        self._path = path
        self._lines = lines
        self._clock = clock
        try:
            self._output = STDERR if path == "-" else open_log(path)
        except OSError as error:
            text = f"cannot open {path}: {error.strerror}; mend --query-log"
            raise ConfigError(text) from error
        self._courier: Courier[AnsweredBatch] = Courier(
            "querylog", self.BACKLOG, self._write, self._tick, gather=self.GATHER
        )
        self.start = self._courier.start
        self.put = self._courier.put
        self._reopen = False
        self._unwritten = 0  # lines lost to errors of the file
        self._failing = False
        self._told, self._told_at = 0, -math.inf  # of lost lines

    @property
    def dropped(self) -> int:
        """Return how many lines were lost: a snapshot."""
        return self._courier.dropped + self._unwritten

    def reopen(self) -> None:
        """Have the file opened anew, as it was renamed; returns at once."""
        self._reopen = self._path != "-"
        self._courier.wake()

    def close(self) -> None:
        """Write what is left, within a bound, and close the file."""
        self._courier.close()
        self._told_at = -math.inf
        self._report()
        if self._output is not STDERR:
            self._output.close()

    def _write(self, batches: list[AnsweredBatch]) -> None:
        # In one go: to let others have the GIL in between costs 4 us more per line.
        text = self._lines.render(batches, time.time() - self._clock())
        lost, error = self._output.write(text.encode())
        self._unwritten += lost
        if error and not self._failing:
            logger.warning("query log fails: file=%s error=%s", self._path, error)
        self._failing = bool(error)

    def _tick(self) -> None:
        if self._reopen:
            self._reopen = False
            self._open_again()
        self._report()

    def _open_again(self) -> None:
        try:
            output = open_log(self._path)
        except OSError as error:
            text = "query log not reopened: file=%s error=%s"
            logger.warning(text, self._path, error.strerror)
            return
        self._output.close()
        self._output = output

    def _report(self) -> None:
        dropped, now = self.dropped, self._clock()
        if dropped > self._told and now - self._told_at >= self.REPORT:
            logger.warning("queries not logged: number=%d", dropped - self._told)
            self._told, self._told_at = dropped, now


def query_log_to(path: str, style: str, privacy: str) -> QueryLog:
    """Make a query log; raises ConfigError. Hashes differ with every start."""
    kind = JSONQueryLines if style == "json" else TextQueryLines
    prefix = "<6>" if path == "-" and is_journal(2, os.environ) else ""
    return QueryLog(path, kind(privacy, key=os.urandom(16), prefix=prefix))


def log_uncaught(arguments: threading.ExceptHookArgs) -> None:
    """Log what ended a thread, in place of Python's own report."""
    thread = arguments.thread.name if arguments.thread else "?"
    error = arguments.exc_value or arguments.exc_type()
    logger.error("internal error: thread=%s", thread, exc_info=error)


@contextlib.contextmanager
def logging_to_stderr(level: str, style: str) -> Iterator[OperationalLog]:
    """Write the log to stderr, and all of it, within a bound, before the end.

    What is logged before the log is started waits for that, or for the end.
    """
    journal = is_journal(2, os.environ)
    stamp = "" if journal else "%(asctime)s %(levelname)s "
    form = TextFormatter(f"{stamp}%(message)s", "%Y-%m-%dT%H:%M:%S%z")
    formatter = ECSFormatter() if style == "json" else form
    log = OperationalLog(STDERR, formatter, journal=journal)
    logging.basicConfig(handlers=[log], level=level.upper())
    threading.excepthook = log_uncaught
    try:
        yield log
    finally:
        log.close()
        logging.getLogger().removeHandler(log)


# ---- Cache (RFC 2308, RFC 8767, RFC 9520) --------------------------------------------
# Responses by question, bounded by octets. An entry is live, then stale, then gone; it
# never changes but for how it is used. It knows nothing of clients or upstreams.


class CacheEntry:
    """A stored response, and how it is used."""

    PREFETCH_AFTER = 0.9  # of the life
    SPARE = 2048  # octets of a message that an answer may lack: OPT and padding

    __slots__ = (
        "expires",  # when it becomes stale
        "hits",
        "message",  # of the response
        "retry_at",  # when it may be asked for again; 0 until it is for the first time
        "stored_at",
    )

    def __init__(self, message: bytes, stored_at: float, expires: float) -> None:
        self.message = message
        self.stored_at = stored_at
        self.expires = expires
        self.hits = 0
        self.retry_at = 0.0

    @property
    def failed(self) -> bool:
        """Tell whether it is a failure, which is never served stale."""
        return self.message[3] & RCODE_MASK in FAILURE_RCODES

    @property
    def prefetch_at(self) -> float:
        """Return from when on it is refreshed if it is popular."""
        life = self.expires - self.stored_at
        return self.stored_at + life * self.PREFETCH_AFTER

    def response(self, query: Query) -> Response:
        """Parse it for a query with the same question.

        To keep messages and parse them at a hit takes half the memory of responses, and
        2 us less for an answer that is never asked for again. One that is far too large
        for the client is not parsed, only to have its records dropped: 64 KiB would
        hold up the thread that receives for 10 ms.
        """
        if len(self.message) > query.form.limit + self.SPARE:
            return Response(int.from_bytes(self.message[2:4], "big") & ~AA | TC)
        response = parse_response(self.message, 12 + len(query.question))
        response.flags &= ~AA
        return response


# What a CacheEntry is made of: an entry as it is stored, and as it stays until somebody
# asks for it, as mostly nobody does. That costs an uncached query 0.6 us less.
Unasked = tuple[bytes, float, float]


class Cache:
    """Responses by cache key; the least recently used go first, stale ones before.

    Any thread may call any method; none blocks.
    """

    OVERHEAD = 420  # octets of an entry beside its key and message, as measured
    SECOND = 240  # octets of a second in which entries expire, for the first of them
    SLACK = 2048  # this part of the bound is made free at a time: 26 small answers
    NEGATIVE_MAX = 3600  # s that NXDOMAIN and NODATA live, RFC 2308 section 5
    STALE_TTL = 30  # s, RFC 8767 section 4
    STALE_RETRY = 30.0  # s after a failed refresh until the next, RFC 8767 section 5
    STALE_AFTER = 1.8  # s that a client waits for a fresh answer, RFC 8767 section 5
    POPULAR = 2  # hits from which an entry is prefetched
    LATEST = 64  # entries to look at for one that can be served

    def __init__(
        self,
        max_bytes: int,
        *,
        min_ttl: int = 0,
        max_ttl: int = 7 * 86400,
        fail_ttl: float = 1.0,
        stale: float = 86400.0,
    ) -> None:
        """Prepare a cache; `stale`: seconds that an expired entry is kept."""
        self._max_bytes = max_bytes
        self._min_ttl = min_ttl
        self._max_ttl = max_ttl
        self._fail_ttl = fail_ttl
        self._stale = stale
        self._lock = threading.Lock()  # guards all below
        self._entries: collections.OrderedDict[bytes, Unasked | CacheEntry] = (
            collections.OrderedDict()  # least recently used first
        )
        # Keys by the second in which they expire, and a heap of these seconds, in which
        # some are that have no keys any more.
        self._expiring: dict[int, dict[bytes, None]] = {}
        self._seconds: list[int] = []
        self._size = 0
        self._evictions = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def lacks(self, keys: Iterable[bytes]) -> bool:
        """Tell whether none of the keys is there: a snapshot, without a lock."""
        return self._entries.keys().isdisjoint(keys)

    @property
    def size(self) -> int:
        """Return how many octets of memory the entries take: a snapshot."""
        return self._size

    def samples(self) -> Iterator[Sample]:
        """Return its metrics."""
        yield "dotproxy_cache_entries", (), len(self._entries)
        yield "dotproxy_cache_size_bytes", (), self._size
        yield "dotproxy_cache_evictions_total", (), self._evictions

    def can_serve(self, now: float) -> bool:
        """Tell whether any of the answers used last could be served, stale perhaps."""
        with self._lock:
            latest = list(itertools.islice(reversed(self._entries), self.LATEST))
            return any(
                now < entry.expires + self._stale and not entry.failed
                for entry in map(self._open_locked, latest)
            )

    def get(self, key: bytes, now: float) -> CacheEntry | None:
        """Return the entry for this key, live or stale."""
        if key not in self._entries:  # most misses need no lock
            return None
        with self._lock:
            if key not in self._entries:
                return None
            entry = self._open_locked(key)
            entry.hits += 1
            if now < entry.expires:
                self._entries.move_to_end(key)
                return entry
            if now < entry.expires + self._stale and not entry.failed:
                return entry
            self._remove_locked(key)
        return None

    def put(self, key: bytes, response: Response, now: float) -> Response:
        """Store a response if it may be; return it as it is to be served."""
        (served,) = self.put_all([(key, response)], now)
        return served

    def put_all(
        self, items: Sequence[tuple[bytes, Response]], now: float
    ) -> list[Response]:
        """Store each response that may be; return them as they are to be served.

        One whose key is empty is not stored. A batch of 25 takes 0.4 us less for each
        than one after the other.
        """
        if not self._max_bytes:
            return [response for _, response in items]
        prepared = []
        for key, response in items:
            message = response.message
            if not message or response.upstream_options:
                message = message_to_keep(response, key[:-1])
            ttl = self._life(response) if key else 0
            prepared.append((key, response, message, ttl))
        entries, expiring = self._entries, self._expiring
        with self._lock:
            for key, response, message, ttl in prepared:
                if ttl <= 0:
                    self._forget_locked(key, response)
                elif key not in entries or self._yields_locked(key, response):
                    second = int(now + ttl)
                    entries[key] = message, now, now + ttl
                    self._size += self.OVERHEAD + len(key) + len(message)
                    keys = expiring.get(second) or self._begin_second_locked(second)
                    keys[key] = None
            if self._size > self._max_bytes:
                self._shrink_locked(now)
        return [
            response
            if ttl <= 0 or response.ttl == ttl == response.longest_ttl
            else self._bounded(response)
            for _, response, _, ttl in prepared
        ]

    def answer(self, entry: CacheEntry, query: Query, now: float) -> bytes:
        """Build an answer whose TTLs have counted down by whole seconds."""
        response = entry.response(query)
        age = int(now - entry.stored_at)
        low, high = self._bounds(response)
        body = with_ttls(response, lambda ttl: max(0, min(max(ttl, low), high) - age))
        return build_answer(query, response, body)

    def stale_answer(self, entry: CacheEntry, query: Query) -> bytes:
        """Build an answer from a stale entry that says that it is one."""
        response = entry.response(query)
        body = with_ttls(response, lambda ttl: self.STALE_TTL)
        info = ExtendedError.STALE_ANSWER
        if response.rcode == NXDOMAIN:
            info = ExtendedError.STALE_NXDOMAIN_ANSWER
        options = response.options + build_option(info, "no upstream answers")
        return build_answer(query, response, body, options)

    def flush(self) -> int:
        """Forget everything; return how many entries there were."""
        with self._lock:
            number = len(self._entries)
            self._entries.clear()
            self._expiring.clear()
            self._seconds, self._size = [], 0
        return number

    def _life(self, response: Response) -> float:
        """Return for how many seconds a response may be stored, 0 for not at all."""
        ttl, rcode, negative_ttl = response.ttl, response.rcode, response.negative_ttl
        if response.flags & TC:  # RFC 2181 section 9
            return 0
        if rcode == NOERROR and negative_ttl is None:
            ttl = ttl if response.counts[0] else 0
        elif rcode in FAILURE_RCODES:
            return self._fail_ttl
        elif rcode in (NOERROR, NXDOMAIN) and negative_ttl is not None:
            ttl = min(ttl or 0, negative_ttl, self.NEGATIVE_MAX)
        else:
            return 0
        if not ttl:
            return 0
        if self._min_ttl <= ttl <= self._max_ttl:
            return ttl
        return min(max(ttl, self._min_ttl), self._max_ttl)

    def _bounded(self, response: Response) -> Response:
        """Return the response with the TTLs that are served."""
        low, high = self._bounds(response)
        if low <= (response.ttl or 0) and response.longest_ttl <= high:
            return response
        bounded = copy.copy(response)
        bounded.body = with_ttls(response, lambda ttl: min(max(ttl, low), high))
        return bounded

    def _bounds(self, response: Response) -> tuple[int, int]:
        """Return the bounds of the TTLs that are served."""
        low, high = self._min_ttl, self._max_ttl
        if response.negative_ttl is not None:
            high = min(high, max(low, min(response.negative_ttl, self.NEGATIVE_MAX)))
        return low, high

    def _open_locked(self, key: bytes) -> CacheEntry:
        """Return the entry for a key that is there, in the form that is used."""
        entry = self._entries[key]
        if isinstance(entry, tuple):
            entry = self._entries[key] = CacheEntry(*entry)
        return entry

    def _forget_locked(self, key: bytes, response: Response) -> None:
        """Take an entry out that a response which may not be stored stands for.

        It counts as refreshed, RFC 8767 section 4.
        """
        usable = response.rcode in (NOERROR, NXDOMAIN) and not response.flags & TC
        if usable and key in self._entries:
            self._remove_locked(key)

    def _yields_locked(self, key: bytes, response: Response) -> bool:
        """Take an entry out for a newer response, unless it is worth more than that."""
        if response.rcode in FAILURE_RCODES and not self._open_locked(key).failed:
            self._entries.move_to_end(key)  # it was asked for
            return False  # a failure never takes the place of data
        self._remove_locked(key)
        return True

    def _shrink_locked(self, now: float) -> None:
        """Evict what has expired first, else what was used least."""
        second, goal = int(now), self._max_bytes - self._max_bytes // self.SLACK
        entries, before = self._entries, len(self._entries)
        while self._size > goal:
            if self._seconds[0] < second and (key := self._expired_locked(second)):
                self._remove_locked(key)
            else:
                self._drop_locked(*entries.popitem(False))
        self._evictions += before - len(entries)

    def _begin_second_locked(self, second: int) -> dict[bytes, None]:
        """Return where to note keys that expire in this second, none as yet."""
        keys = self._expiring[second] = {}
        self._size += self.SECOND
        heapq.heappush(self._seconds, second)
        if len(self._seconds) > 2 * len(self._expiring) + 64:
            self._seconds = sorted(self._expiring)  # which is a heap too
        return keys

    def _expired_locked(self, second: int) -> bytes:
        """Return the key of what expired first, before this second; empty for none."""
        while self._seconds and self._seconds[0] < second:
            keys = self._expiring.get(self._seconds[0])
            if keys:
                return next(reversed(keys))
            heapq.heappop(self._seconds)
        return b""

    def _remove_locked(self, key: bytes) -> None:
        self._drop_locked(key, self._entries.pop(key))

    def _drop_locked(self, key: bytes, entry: Unasked | CacheEntry) -> None:
        """Count an entry that was taken out no more, nor when it expires."""
        if isinstance(entry, tuple):
            message, _, expires = entry
        else:
            message, expires = entry.message, entry.expires
        self._size -= self.OVERHEAD + len(key) + len(message)
        second = int(expires)
        keys = self._expiring[second]
        del keys[key]
        if not keys:
            del self._expiring[second]
            self._size -= self.SECOND


# ---- Local answers (RFC 6761, RFC 6303, RFC 8482) ------------------------------------
# What is not for the upstream to say: names that mean something on this host or network
# alone, ANY over UDP, and private addresses under public names. Pure functions of a
# query or a response, without a clock or a lock.

LOCAL_TTL = 10800  # s, RFC 6303 section 3
ANY_TTL = 3600  # s, long enough not to be asked often, RFC 8482 section 4.2
FILTERED_TTL = 60  # s until a client asks again; who exempts the name waits so long
QNAME = 0xC00C  # compression pointer to the name in the question
SOA_NUMBERS = struct.Struct("!IIIII")  # serial, refresh, retry, expire, minimum

Records = Mapping[int, bytes]  # of one name: RDATA by type


def encode_domain(text: str) -> bytes:
    """Return a domain name of ASCII labels in wire format and lower case."""
    labels = filter(None, text.lower().encode().split(b"."))
    return b"".join(bytes([len(label)]) + label for label in labels) + b"\0"


def lineage(name: bytes) -> Iterator[bytes]:
    """Yield a name in wire format, then each domain above it, the root last."""
    offset = 0
    while length := name[offset]:
        yield name[offset:]
        offset += length + 1
    yield b"\0"


def build_record(owner: int, rrtype: int, ttl: int, rdata: bytes) -> bytes:
    """Build a record whose owner is a compression pointer."""
    head = RECORD.pack(rrtype, CLASS_IN, ttl, len(rdata))
    return owner.to_bytes(2, "big") + head + rdata


def soa_data(zone: int, ttl: int) -> bytes:
    """Return the data of the SOA record of RFC 6303 section 3; `zone`: a pointer."""
    names = zone.to_bytes(2, "big") + encode_domain("nobody.invalid")
    return names + SOA_NUMBERS.pack(1, 3600, 1200, 604800, ttl)


def negative_response(rcode: int, zone: int, ttl: int) -> Response:
    """Make a response that says no, to be kept for `ttl` (RFC 2308 section 5).

    `zone`: a pointer to the part of the question's name that has the SOA record.
    """
    body = build_record(zone, TYPE_SOA, ttl, soa_data(zone, ttl))
    response = Response(
        QR | RA | rcode, b"", (0, 1, 0), body, ttls=(ttl,), ttl_offsets=(6,)
    )
    response.negative_ttl = ttl
    return response


def positive_response(rrsets: Records, ttl: int) -> Response:
    """Make a response with these records of the name that was asked for."""
    response = Response(QR | RA)
    response.body = b"".join(
        build_record(QNAME, rrtype, ttl, rdata) for rrtype, rdata in rrsets.items()
    )
    response.counts = (len(rrsets), 0, 0)
    return response


LOOPBACK_ADDRESSES = {TYPE_A: b"\x7f\0\0\1", TYPE_AAAA: bytes(15) + b"\1"}
LOOPBACK_NAME = {TYPE_PTR: encode_domain("localhost")}
SPECIAL_NAMES = (  # RFC 6761, RFC 6762, RFC 7686, RFC 8375, RFC 9462, RFC 9665
    *("localhost", "invalid", "local", "onion"),
    *("home.arpa", "resolver.arpa", "service.arpa"),
)
# RFC 6303 section 4 and RFC 7793, but for the unspecified and the loopback address of
# IPv6. Not here: names of which no RFC says that a resolver should keep them, such as
# internal; ipv4only.arpa, which the upstream has to answer (RFC 8880); and test, which
# leads nowhere but to an upstream that somebody tries things out with (RFC 6761).
PRIVATE_REVERSE = (
    *("0", "10", "127", "254.169", "168.192", "255.255.255.255"),
    *("2.0.192", "100.51.198", "113.0.203"),
    *(f"{number}.172" for number in range(16, 32)),
    *(f"{number}.100" for number in range(64, 128)),
)
PRIVATE_REVERSE_V6 = ("d.f", "8.e.f", "9.e.f", "a.e.f", "b.e.f", "8.b.d.0.1.0.0.2")
LOOPBACK_V6, UNSPECIFIED_V6 = (
    encode_domain(ipaddress.IPv6Address(number).reverse_pointer) for number in (1, 0)
)

# By apex: what every name below has, or None where there is none.
LOCAL_ZONES: dict[bytes, Records | None] = {
    **{encode_domain(name): None for name in SPECIAL_NAMES},
    **{encode_domain(f"{name}.in-addr.arpa"): None for name in PRIVATE_REVERSE},
    **{encode_domain(f"{name}.ip6.arpa"): None for name in PRIVATE_REVERSE_V6},
    **{LOOPBACK_V6: None, UNSPECIFIED_V6: None},
    encode_domain("localhost"): LOOPBACK_ADDRESSES,
    encode_domain("resolver.arpa"): {},  # NODATA for all, RFC 9462 sections 4 and 6.1
}
# Names that differ from others in their zone. Those above 1.0.0.127 have to exist: a
# client may conclude from NXDOMAIN that nothing is below (RFC 8020).
LOCAL_NAMES: dict[bytes, Records] = {
    encode_domain("1.0.0.127.in-addr.arpa"): LOOPBACK_NAME,
    encode_domain("0.0.127.in-addr.arpa"): {},
    encode_domain("0.127.in-addr.arpa"): {},
    LOOPBACK_V6: LOOPBACK_NAME,
}


class LocalAnswers:
    """Answers that never need an upstream; immutable, any thread may ask.

    Those for special names have AA set, as from any zone that a server has itself
    (RFC 6303 section 3), and an SOA record where they say no, for clients to keep.
    """

    # Of a question, the end of its name, by which most others are told apart.
    TAIL = slice(-9, -4)
    ANY_IN = PAIR.pack(TYPE_ANY, CLASS_IN)
    # RFC 8482 section 4.2: CPU "RFC8482", OS "".
    MINIMAL_ANY = positive_response({TYPE_HINFO: b"\7RFC8482\0"}, ANY_TTL)

    def __init__(self, exempt: Iterable[bytes] = ()) -> None:
        """Prepare; `exempt`: domains in wire format and lower case to be forwarded.

        With each goes all that lies below it; the root exempts everything.
        """
        self._exempt = frozenset(exempt)
        self._zones = {
            apex: below
            for apex, below in LOCAL_ZONES.items()
            if self._exempt.isdisjoint(lineage(apex))
        }
        self._tails = {(apex + bytes(4))[self.TAIL] for apex in self._zones}

    def respond(self, query: Query) -> Response | None:
        """Return the answer if it is to be given here.

        Where it is not, as for most, that costs 0.1 us.
        """
        question = query.question
        if question[self.TAIL].lower() not in self._tails and question[-3] != TYPE_ANY:
            return None
        if question[-4:] == self.ANY_IN and query.form.transport[0] == "udp":
            return self.MINIMAL_ANY
        name = query.key[: len(question) - 4]  # the key begins with it, in lower case
        for domain in lineage(name):
            if domain in self._exempt:
                return None
            if domain in self._zones:
                return self._respond_in(domain, name, question)
        return None

    def _respond_in(self, apex: bytes, name: bytes, question: bytes) -> Response | None:
        rrtype, rrclass = PAIR.unpack(question[-4:])
        if rrclass != CLASS_IN:  # there is no such zone, and the name must not leave
            return error_response(Rcode.REFUSED)
        if rrtype == TYPE_DS and name == apex:
            return None  # the parent zone's to answer, RFC 4035 section 3.1.4.1
        zone = QNAME + len(name) - len(apex)
        records = LOCAL_NAMES.get(name, self._zones[apex])
        if name == apex:
            authority = {TYPE_SOA: soa_data(zone, LOCAL_TTL), TYPE_NS: b"\xc0\x0c"}
            records = {**(records or {}), **authority}
        if records is None:
            response = negative_response(NXDOMAIN, zone, LOCAL_TTL)
        elif rrtype == TYPE_ANY and records:
            response = positive_response(records, LOCAL_TTL)
        elif rrtype in records:
            response = positive_response({rrtype: records[rrtype]}, LOCAL_TTL)
        else:
            response = negative_response(NOERROR, zone, LOCAL_TTL)
        response.flags |= AA
        return response


def leading_octets(*networks: str) -> frozenset[bytes]:
    """Return the first two octets of all addresses in networks of at most /16."""
    found = set()
    for network in map(ipaddress.ip_network, networks):
        first = int.from_bytes(network.network_address.packed[:2], "big")
        for number in range(first, first + (1 << 16 - network.prefixlen)):
            found.add(number.to_bytes(2, "big"))
    return frozenset(found)


# Unspecified, private (RFC 1918, RFC 4193, RFC 3879), shared (RFC 6598), loopback and
# link-local. One look into a set costs 60 ns, ipaddress 2 us.
PRIVATE_V4 = leading_octets(
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
    *("172.16.0.0/12", "192.168.0.0/16"),
)
PRIVATE_V6 = leading_octets("fc00::/7", "fe80::/10", "fec0::/10")
# Behind these 12 octets is an IPv4 address: compatible, with :: and ::1 among them,
# mapped (RFC 4291 section 2.5.5), and translated (RFC 6052 section 2.1).
EMBEDDING = frozenset(
    ipaddress.ip_address(prefix).packed[:12]
    for prefix in ("::", "::ffff:0:0", "64:ff9b::")
)
HINT_SIZES = {4: 4, 6: 16}  # ipv4hint and ipv6hint, RFC 9460 section 7.3


def is_private(address: bytes) -> bool:
    """Tell whether an address of 4 or 16 octets is reached from this network only."""
    if len(address) == 4:
        return address[:2] in PRIVATE_V4
    if address[:12] in EMBEDDING:
        return address[12:14] in PRIVATE_V4
    return address[:2] in PRIVATE_V6


def hinted_addresses(rdata: bytes) -> Iterator[bytes]:
    """Yield the addresses in the parameters of an SVCB record (RFC 9460 section 2.2).

    Malformed data ends it early: no client finds more in it.
    """
    offset = 2
    while rdata[offset : offset + 1] > b"\0":
        offset += 1 + rdata[offset]
    offset += 1
    while offset + 4 <= len(rdata):
        key, length = PAIR.unpack_from(rdata, offset)
        offset += 4
        size = HINT_SIZES.get(key, 0)
        for start in range(offset, offset + length, size) if size else ():
            yield rdata[start : start + size]
        offset += length


def has_private_address(response: Response) -> bool:
    """Tell whether a private address is in the answer section, hints included."""
    body = response.body
    for offset in response.ttl_offsets[: response.counts[0]]:
        rrtype, _, _, length = RECORD.unpack_from(body, offset - 4)
        rdata = body[offset + 6 : offset + 6 + length]
        if rrtype in (TYPE_A, TYPE_AAAA):
            found = is_private(rdata)
        else:
            hinting = rrtype in (TYPE_SVCB, TYPE_HTTPS)
            found = hinting and any(map(is_private, hinted_addresses(rdata)))
        if found:
            return True
    return False


class RebindingGuard:
    """Keeps public names from leading into the private network; immutable.

    A web page could otherwise have its own name point there, and the browser would
    let it read what is served.
    """

    def __init__(self, exempt: Iterable[bytes] = ()) -> None:
        """Prepare; `exempt`: domains, in wire format and lower case, that may."""
        self._exempt = frozenset(exempt)

    def screen(self, query: Query, response: Response) -> Response:
        """Return an upstream's response, or NODATA where it has a private address."""
        if not has_private_address(response):
            return response
        name = query.question[:-4].lower()
        if not self._exempt.isdisjoint(lineage(name)):
            return response
        blocked = negative_response(NOERROR, QNAME, FILTERED_TTL)
        text = "the answer has a private address; see --allow-private"
        blocked.options = build_option(ExtendedError.FILTERED, text)
        return blocked


# ---- Timer and worker threads --------------------------------------------------------
# What everything with a thread needs; nothing here knows of DNS.


class ProcessorBinding:
    """Keeps all threads on one processor while much is asked upstream.

    There is one for the process: what counts is the sum of all groups of upstreams.
    Under the GIL only one of them can run at a time, yet each system call may hand it
    to a thread on another processor, and waking that costs more than the call: 47 us of
    CPU and 20 k queries/s for uncached queries on two processors, 35 us and 28 k on
    one. The kernel moves other work away. Answers from the cache gain nothing: one
    thread gives them.
    """

    BUSY, QUIET = 4000.0, 1000.0  # queries/s sent upstream that bind and set free

    def __init__(self) -> None:
        gil = getattr(sys, "_is_gil_enabled", lambda: True)()
        able = gil and hasattr(os, "sched_setaffinity")
        self._processors = os.sched_getaffinity(0) if able else {0}
        self._bound = False
        self._rates: dict[object, float] = {}  # by who asks

    def update(self, source: object, rate: float) -> None:
        """Bind or set free as the sum of all sources' rates asks for; any thread may.

        No lock: two calls at once would at worst bind twice, the last one counts, and
        single operations of a dict are atomic on every build.
        """
        self._rates[source] = rate
        rate = sum(self._rates.copy().values())
        if len(self._processors) < 2 or self.QUIET <= rate <= self.BUSY:
            return
        bind = rate > self.BUSY
        if bind == self._bound:
            return
        self._bound = bind
        chosen = {random.choice(sorted(self._processors))} if bind else self._processors
        for thread in threading.enumerate():
            with contextlib.suppress(OSError):  # it may have ended
                os.sched_setaffinity(thread.native_id or 0, chosen)


class Timer:
    """One thread that calls functions when they are due, to the next `TICK`."""

    TICK = 0.01  # s; what is due together wakes the thread once

    def __init__(self, clock: Callable[[], float] = elapsed) -> None:
        self._clock = clock
        self._condition = threading.Condition()  # guards _due and _closed
        self._due: dict[int, list[Callable[[], None]]] = {}
        self._ticks: list[int] = []  # a heap of the keys of _due
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="timer", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def at(self, when: float, function: Callable[[], None]) -> None:
        """Have `function` called at `when` or at most a tick later; any thread may ask.

        The function may not block: it shares the thread with everything that is due.
        """
        tick = int(when / self.TICK) + 1
        with self._condition:
            functions = self._due.get(tick)
            if functions is not None:
                functions.append(function)
                return
            self._due[tick] = [function]
            heapq.heappush(self._ticks, tick)
            if self._ticks[0] == tick:
                self._condition.notify()

    def close(self) -> None:
        """End the thread; what is not due yet is forgotten."""
        with self._condition:
            self._closed = True
            self._condition.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while (functions := self._wait()) is not None:
            for function in functions:
                try:
                    function()
                except Exception:
                    logger.exception("internal error: thread=timer")

    def _wait(self) -> list[Callable[[], None]] | None:
        with self._condition:
            while not self._closed:
                if not self._ticks:
                    self._condition.wait()
                    continue
                left = self._ticks[0] * self.TICK - self._clock()
                if left <= 0:
                    return self._due.pop(heapq.heappop(self._ticks))
                self._condition.wait(left)
        return None


class WorkerPool:
    """At most `threads` threads that run at most `backlog` waiting tasks.

    A Condition wakes one thread for a task. A queue.SimpleQueue, up to Python 3.12,
    wakes all that are idle: twice as many switches of context at 200 queries/s.
    """

    IDLE = 20.0  # s after which a thread without work ends

    def __init__(self, name: str, threads: int, backlog: int) -> None:
        self._name = name
        self._limit = threads
        self._backlog = backlog
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()  # guards all below
        self._changed = threading.Condition(self._lock)  # told of a task, of the end
        self._tasks: collections.deque[Callable[[], None]] = collections.deque()
        self._threads: set[threading.Thread] = set()
        self._idle = 0
        self._closed = False

    def submit(self, task: Callable[[], None]) -> bool:
        """Have a thread run `task`; False when too many tasks wait, or none can run.

        Never blocks, but for the start of a thread.
        """
        with self._lock:
            if self._closed or len(self._tasks) >= self._backlog:
                return False
            if len(self._tasks) >= self._idle and len(self._threads) < self._limit:
                self._add_thread_locked()
            if not self._threads:
                return False
            self._tasks.append(task)
            self._changed.notify()
        return True

    def _add_thread_locked(self) -> None:
        """Start one more thread, where the system gives one."""
        name = f"{self._name}-{next(self._numbers)}"
        thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._threads.add(thread)
        self._idle += 1
        try:
            thread.start()
        except RuntimeError:
            self._threads.discard(thread)
            self._idle -= 1

    def samples(self) -> Iterator[Sample]:
        """Return its metrics."""
        with self._lock:
            busy = len(self._threads) - self._idle
        yield "dotproxy_pool_threads_busy", (self._name,), busy
        yield "dotproxy_pool_threads_limit", (self._name,), self._limit

    def close(self) -> None:
        """End the threads once the waiting tasks are done."""
        with self._lock:
            self._closed = True
            self._changed.notify_all()
            threads = list(self._threads)
        for thread in threads:
            thread.join()

    def _run(self) -> None:
        while (task := self._next()) is not None:
            try:
                task()
            except Exception:
                logger.exception("internal error: thread=%s", self._name)
            with self._lock:
                self._idle += 1

    def _next(self) -> Callable[[], None] | None:
        """Wait for a task; None where the thread is to end."""
        with self._lock:
            while not self._tasks and not self._closed:
                if not self._changed.wait(self.IDLE):
                    break
            self._idle -= 1
            if self._tasks:
                return self._tasks.popleft()
            self._threads.discard(threading.current_thread())
            return None


# ---- Upstream connections (RFC 7858, RFC 7766, RFC 8310) -----------------------------
# An exchange is one question in flight. A connection carries many of them, pipelined,
# to one endpoint that has proved its name, or needs none. It knows nothing of other
# connections.


SEQUENCE, INTEGER, EXPLICIT_0 = 0x30, 0x02, 0xA0  # tags of DER, X.690


def take_der(octets: bytes, tag: int) -> tuple[bytes, bytes]:
    """Split off the first element of DER, which has this tag: contents and the rest."""
    if octets[:1] != bytes([tag]) or len(octets) < 2:
        raise FormatError(f"no DER element {tag:#x} at {octets[:4].hex()}")
    start, length = 2, octets[1]
    if length & 0x80:  # of the length itself; 0 would be the indefinite form of BER
        start += length & 0x7F
        length = int.from_bytes(octets[2:start], "big")
    end = start + length
    if end > len(octets) or octets[1] == 0x80:
        raise FormatError(f"DER element of {length} octets past the end")
    return octets[start:end], octets[end:]


def certificate_fields(certificate: bytes) -> bytes:
    """Return the fields of a DER certificate from its validity on (RFC 5280 4.1)."""
    signed, _ = take_der(certificate, SEQUENCE)
    fields, _ = take_der(signed, SEQUENCE)
    if fields[:1] == bytes([EXPLICIT_0]):  # version, absent in version 1
        _, fields = take_der(fields, EXPLICIT_0)
    for tag in (INTEGER, SEQUENCE, SEQUENCE):  # serial number, algorithm, issuer
        _, fields = take_der(fields, tag)
    return fields


def public_key_pin(certificate: bytes) -> str:
    """Return the SHA-256 of a DER certificate's public key, in base64 (RFC 7469).

    What is hashed is its SubjectPublicKeyInfo (RFC 5280 section 4.1), which stays the
    same when the certificate is renewed for the same key. Raises FormatError.
    """
    _, fields = take_der(certificate_fields(certificate), SEQUENCE)
    _, fields = take_der(fields, SEQUENCE)  # the subject
    _, rest = take_der(fields, SEQUENCE)
    key = fields[: len(fields) - len(rest)]
    return base64.b64encode(hashlib.sha256(key).digest()).decode()


UTC_TIME, GENERALIZED_TIME = 0x17, 0x18  # tags of DER, X.690
TIME_FORMATS = {UTC_TIME: "%y%m%d%H%M%SZ", GENERALIZED_TIME: "%Y%m%d%H%M%SZ"}


def certificate_dates(certificate: bytes) -> tuple[int, int]:
    """Return from when until when it is valid, in s since 1970; raises FormatError."""
    octets, _ = take_der(certificate_fields(certificate), SEQUENCE)
    times = []
    for _ in range(2):
        tag = UTC_TIME if octets[:1] == bytes([UTC_TIME]) else GENERALIZED_TIME
        text, octets = take_der(octets, tag)
        try:
            parsed = time.strptime(text.decode("latin-1"), TIME_FORMATS[tag])
        except ValueError as error:
            raise FormatError(f"no date: {error}") from error
        times.append(calendar.timegm(parsed))
    return times[0], times[1]


TLS_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


def names_of(tls: ssl.SSLSocket | ssl.SSLObject) -> list[str]:
    """Return the names in the certificate that a session's server has proved."""
    names = (tls.getpeercert() or {}).get("subjectAltName", ())
    return [str(pair[1]) for pair in names if isinstance(pair, tuple)]


class Peer(NamedTuple):
    """What a TLS session has agreed on, and the certificate that the server showed."""

    version: str
    cipher: str
    alpn: str  # empty where the server has chosen none
    resumed: bool
    names: list[str]
    certificate: bytes


class Trust:
    """Which servers are believed: the TLS settings towards upstreams."""

    def __init__(
        self,
        ca_file: str | None = None,
        *,
        pins: Iterable[tuple[str, str]] = (),
        tls_min: str = "1.2",
    ) -> None:
        """Load the CA certificates; raises ConfigError where there are none to load.

        `pins`: pairs of a TLS name and a `public_key_pin` that its server may have.
        """
        self.ca_file = ca_file
        self.tls_min = tls_min
        self._pins: dict[str, list[str]] = {}  # by TLS name
        for name, pin in pins:
            self._pins.setdefault(name, []).append(pin)
        self.context = self._build_context()

    def check_pin(self, name: str, certificate: bytes) -> None:
        """Raise UpstreamError where the name has pins, none of them of this key.

        For a leaf certificate whose chain and name are verified (RFC 7858 section 4.2).
        """
        wanted = self._pins.get(name.lower())
        if wanted is None:
            return
        try:
            pin = public_key_pin(certificate)
        except FormatError as error:
            text = f"cannot read the certificate: {error}"
            raise UpstreamError("certificate", text) from error
        if pin not in wanted:
            text = f"certificate has another key than was pinned: if {name} has a new"
            cure = f"one, and you know it to be right, give --pin {name}={pin}"
            raise UpstreamError("certificate", f"{text} {cure}")

    def certificate_names(self, raw: socket.socket) -> list[str]:
        """Shake hands on a fresh connection and return the names in the certificate.

        The chain is verified, the name is not: for the log line about a wrong name
        only; no query ever goes this way. Blocks as long as the socket's timeout.
        """
        # Not from the file again: who was root may not be able to read it any more.
        authorities = b"".join(self.context.get_ca_certs(binary_form=True))
        context = self._build_context(authorities or None)
        context.check_hostname = False
        with context.wrap_socket(raw) as tls:
            return names_of(tls)

    def has_authorities(self) -> bool:
        """Tell whether there is any CA certificate to verify with."""
        directory = ssl.get_default_verify_paths().capath
        return self.context.cert_store_stats()["x509"] > 0 or (
            self.ca_file is None
            and directory is not None
            and bool(os.listdir(directory))
        )

    def _build_context(self, authorities: bytes | None = None) -> ssl.SSLContext:
        file = None if authorities else self.ca_file
        try:
            context = ssl.create_default_context(cafile=file, cadata=authorities)
        except (OSError, ssl.SSLError) as error:
            reason = getattr(error, "strerror", None) or "no certificate in it"
            text = (
                f"cannot read the CA file {self.ca_file}: {reason}; give --ca-file PEM"
            )
            raise ConfigError(text) from error
        try:
            context.minimum_version = TLS_VERSIONS[self.tls_min]
        except ValueError as error:
            text = f"{ssl.OPENSSL_VERSION} has no TLS {self.tls_min}; mend --tls-min"
            raise ConfigError(text) from error
        context.set_alpn_protocols(["dot"])
        return context


def describe_network_error(error: OSError, endpoint: Endpoint) -> UpstreamError:
    """Say what an error of the network means, and the likely cure."""
    port = endpoint.port
    if isinstance(error, socket.timeout):
        text = f"no answer to the connection: is TCP port {port} blocked by a firewall?"
        return UpstreamError("timeout", text)
    if isinstance(error, ConnectionRefusedError):
        return UpstreamError(
            "refused", f"connection refused: nothing on TCP port {port}"
        )
    if isinstance(error, (ConnectionResetError, BrokenPipeError)):
        return UpstreamError("reset", "connection reset")
    if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL):
        return UpstreamError(
            "unreachable", f"no route to {endpoint.host}: is there a network?"
        )
    return UpstreamError("network", f"{error.strerror or error}")


# Reasons of a failed verification, by OpenSSL's number (x509_vfy.h), and what to do.
VERIFY_HINTS = {
    9: "not valid yet: check the clock of this host",
    10: "expired: renew it there, or check the clock of this host",
    18: "self-signed: give it with --ca-file if it is yours",
    19: "from an unknown CA: give that CA with --ca-file if it is yours",
    20: "from an unknown CA: give that CA with --ca-file if it is yours",
    21: "from an unknown CA: give that CA with --ca-file if it is yours",
    62: "for another name",
    64: "for another address",
}


def describe_tls_error(error: ssl.SSLError, trust: Trust) -> UpstreamError:
    """Say why a TLS handshake failed, and the likely cure."""
    if not isinstance(error, ssl.SSLCertVerificationError):
        reason = (error.reason or "protocol error").replace("_", " ").lower()
        if "version" in reason or "unsupported protocol" in reason:
            reason += f": the server does not speak TLS {trust.tls_min} or newer"
        return UpstreamError("tls", f"TLS handshake failed: {reason}")
    number, text = error.verify_code, error.verify_message
    if not trust.has_authorities():
        hint = "there is no CA bundle: install ca-certificates, or give --ca-file PEM"
        return UpstreamError("certificate", f"cannot verify the certificate: {hint}")
    hint = VERIFY_HINTS.get(number, "not accepted")
    now = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    clock = f" (it says {now} UTC)" if number in (9, 10) else ""
    return UpstreamError("certificate", f"certificate {hint}{clock} [{text}]")


Reply = Callable[[bytes, ClientAddress], None]
Waiter = tuple[Query, Reply]
Answered = tuple[Query, bytes, int]  # a query, its answer and the RCODE of that
Origin = tuple[str, "Endpoint | None"]  # of answers: one of SOURCES, and the upstream


class Exchange:
    """One question in flight: who waits for it, and what has been tried.

    `waiters` belongs to the Proxy's lock, from `copies` on to the UpstreamGroup's;
    `done` is set once by the Proxy and read by everybody: it never becomes False again.
    """

    __slots__ = (
        "__weakref__",
        "avoid",  # the connection that was used last; a copy takes another
        "copies",  # times it was sent
        "deadline",
        "done",
        "failure",  # the best answer so far that another upstream may better
        "hedge",  # the connection that got a copy while another could still answer
        "live",  # copies that may still be answered
        "losses",  # connections that died with it
        "query",
        "refused_by",  # upstreams that answered SERVFAIL or the like
        "sent",  # when last
        "started",
        "suspect",  # of killing connections: it gets one of its own
        "waiters",
        "wire",  # the upstream query without its ID
    )

    def __init__(self, query: Query, now: float, deadline: float) -> None:
        self.query = query
        self.wire = build_upstream_query(query)
        self.started = self.sent = now
        self.deadline = deadline
        self.waiters: list[Waiter] = []
        self.done = self.suspect = False
        self.copies = self.live = self.losses = 0
        self.avoid: Connection | None = None
        self.hedge: Connection | None = None
        self.refused_by: tuple[Upstream, ...] = ()
        self.failure: Response | None = None


# What a connection got for an exchange, and the seconds that it took. A plain tuple: a
# NamedTuple costs 0.4 us more per answer.
Answer = tuple[Exchange, Response, float]


class ConnectionOwner:
    """What a connection tells its owner, from its own thread, with no lock held."""

    def connection_opened(self, connection: Connection) -> None:
        """The upstream has proved its name, if it has one: queries may be sent."""

    def connection_answered(
        self, connection: Connection, answers: list[Answer], now: float
    ) -> None:
        """These exchanges got a well-formed response to their very question."""

    def connection_lost(
        self, connection: Connection, error: UpstreamError, orphans: list[Exchange]
    ) -> None:
        """It could not be opened or is gone; the orphans will get no answer from it."""

    def connection_choked(self, connection: Connection) -> None:
        """The kernel takes no more octets: call `resume` in a moment."""


class TLSFacts(NamedTuple):
    """What a handshake agreed on."""

    version: str = ""
    resumed: bool = False
    expires: float = 0  # when the certificate does, in s since 1970; 0: not known


class Channel:
    """One end of a TLS session, on memory buffers; no socket, no waiting.

    Without a context there is no TLS: octets pass as they are. An OpenSSL object may
    not be used by two threads at once (openssl #18209), and CPython does not see to it.
    Any thread may call any method: each holds the lock, over calls that touch memory.
    """

    RECORD = 16384  # octets of plaintext that a TLS record has at most

    def __init__(
        self,
        context: ssl.SSLContext | None = None,
        name: str | None = None,
        session: ssl.SSLSession | None = None,
    ) -> None:
        """Make a client's end, or the server's where there is no `name` to prove."""
        self._lock = threading.Lock()  # guards the two buffers and the TLS object
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context and context.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=name is None,
            server_hostname=name,
            session=session,
        )

    def shake_hands(self, octets: bytes) -> tuple[bytes, bool]:
        """Take octets of the handshake; return those to send, and whether it is done.

        Raises ssl.SSLError; `farewell` then has the alert that says why.
        """
        if self._tls is None:
            return b"", True
        with self._lock:
            self._incoming.write(octets)
            try:
                self._tls.do_handshake()
                done = True
            except ssl.SSLWantReadError:
                done = False
            return self._outgoing.read(), done

    def encrypt(self, plaintext: bytes) -> bytes:
        """Return the octets to send for this plaintext, and for TLS itself."""
        if self._tls is None:
            return plaintext
        with self._lock:
            if plaintext:
                self._tls.write(plaintext)
            return self._outgoing.read()

    def decrypt(
        self, octets: memoryview | bytes
    ) -> tuple[bytes, UpstreamError | None, bool]:
        """Return the plaintext, why there will be no more, and if `encrypt` is due."""
        if self._tls is None:
            return bytes(octets), None, False
        parts, failure = [], None
        with self._lock:
            self._incoming.write(octets)
            try:
                # Asking only while octets are left saves an exception of 3 us a time.
                while self._incoming.pending and failure is None:
                    parts.append(self._tls.read(self.RECORD))
                    if not parts[-1]:
                        failure = UpstreamError("closed", "closed by the server")
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLZeroReturnError:
                failure = UpstreamError("closed", "closed by the server")
            except ssl.SSLError as error:
                failure = UpstreamError("garbage", f"broken TLS: {error.reason}")
            due = self._outgoing.pending > 0
        return b"".join(parts), failure, due

    def farewell(self) -> bytes:
        """Return the last octets to send: close_notify, or the alert that is due."""
        if self._tls is None:
            return b""
        with self._lock:
            with contextlib.suppress(ssl.SSLError, ValueError):
                self._tls.unwrap()
            return self._outgoing.read()

    def session(self) -> ssl.SSLSession | None:
        """Return the session to resume; complete only after the first answer."""
        if self._tls is None:
            return None
        with self._lock:
            return self._tls.session

    def facts(self) -> TLSFacts:
        """Return what the handshake agreed on."""
        if self._tls is None:
            return TLSFacts("none")
        with self._lock:
            version, resumed = self._tls.version() or "", self._tls.session_reused
            certificate = self._tls.getpeercert() or {}
        expiry = certificate.get("notAfter")
        seconds = ssl.cert_time_to_seconds(expiry) if isinstance(expiry, str) else 0
        return TLSFacts(version, bool(resumed), seconds)

    def certificate(self) -> bytes:
        """Return the server's own certificate in DER, also where it was resumed."""
        return (self._tls and self._tls.getpeercert(binary_form=True)) or b""

    def peer(self) -> Peer | None:
        """Return all there is to know of the other end of an open session."""
        if self._tls is None:
            return None
        with self._lock:
            tls = self._tls
            cipher, alpn = tls.cipher(), tls.selected_alpn_protocol()
            return Peer(
                tls.version() or "",
                cipher[0] if cipher else "",
                alpn or "",
                bool(tls.session_reused),
                names_of(tls),
                tls.getpeercert(True) or b"",
            )


def shake_hands(
    raw: socket.socket,
    step: Callable[[bytes], tuple[bytes, bool]],
    deadline: float,
    clock: Callable[[], float],
) -> None:
    """Carry octets between a socket and the `step` of a handshake, until it is done.

    Blocks, at most until the deadline. Raises OSError (ssl.SSLError is one) or, where
    the peer goes away, UpstreamError.
    """
    octets, done = step(b"")
    while True:
        left = deadline - clock()
        if left <= 0:
            raise socket.timeout
        raw.settimeout(left)
        raw.sendall(octets)
        if done:
            return
        octets = raw.recv(Channel.RECORD)
        if not octets:
            raise UpstreamError("tls", "closed during the TLS handshake")
        octets, done = step(octets)


class Line:
    """The way to an endpoint: a connected socket and a channel over it.

    Its owner's thread opens it and reads from it, blocking; `shut` wakes that thread
    from any other.
    """

    READ_SIZE = 65536

    def __init__(
        self, endpoint: Endpoint, trust: Trust, clock: Callable[[], float]
    ) -> None:
        self._endpoint = endpoint
        self._trust = trust
        self._clock = clock
        self._buffer = bytearray(self.READ_SIZE)
        self._view = memoryview(self._buffer)
        # Guards _socket against being closed while it is used, and _ended.
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._ended = False

    def open(
        self, patience: tuple[float, float], session: ssl.SSLSession | None
    ) -> tuple[Channel, float]:
        """Connect and shake hands, within so many seconds each; raises UpstreamError.

        Returns the channel, to an endpoint that has proved its name if it has one, and
        the seconds that the TCP handshake took, which is a round trip.
        """
        start = self._clock()
        raw = self._connect(start + patience[0])
        round_trip = self._clock() - start
        with contextlib.suppress(OSError):  # of a connection that is broken already
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not self._endpoint.name:
            raw.settimeout(None)
            return Channel(), round_trip
        channel = Channel(self._trust.context, self._endpoint.name, session)
        deadline = self._clock() + patience[1]
        try:
            shake_hands(raw, channel.shake_hands, deadline, self._clock)
        except ssl.SSLError as error:
            self.send(channel.farewell())
            failure = describe_tls_error(error, self._trust)
            raise self._add_names(failure, error, patience) from error
        except OSError as error:
            if isinstance(error, socket.timeout):
                raise UpstreamError("timeout", "no end of the TLS handshake") from error
            raise describe_network_error(error, self._endpoint) from error
        self._trust.check_pin(self._endpoint.name, channel.certificate())
        raw.settimeout(None)
        return channel, round_trip

    def receive(self) -> memoryview:
        """Wait for octets; raises UpstreamError when there will be no more."""
        raw = self._socket
        assert raw is not None
        try:
            size = raw.recv_into(self._buffer)
        except OSError as error:
            raise describe_network_error(error, self._endpoint) from error
        if not size:
            raise UpstreamError("closed", "closed by the server")
        return self._view[:size]

    def send(self, octets: bytes) -> int | None:
        """Send what the kernel takes, without waiting; None when nothing ever will."""
        raw = self._socket
        if raw is None:
            return None
        try:
            return raw.send(octets, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError:
            return None

    def shut(self, farewell: bytes = b"") -> None:
        """End it: whoever connects, shakes hands or receives gets an error at once."""
        with self._lock:
            self._ended = True
            if self._socket is not None:
                if farewell:  # to send nothing would wait for a socket that connects
                    self.send(farewell)
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Free the socket; no other thread may be sending."""
        with self._lock:
            self._ended = True
            if self._socket is not None:
                self._socket.close()
                self._socket = None

    def _connect(self, deadline: float) -> socket.socket:
        try:
            found = socket.getaddrinfo(*self._endpoint[:2], type=socket.SOCK_STREAM)
        except OSError as error:
            raise UpstreamError(
                "resolve", f"cannot look up the address: {error}"
            ) from None
        failure = OSError(errno.EADDRNOTAVAIL, "no address")
        for number, (family, kind, protocol, _, address) in enumerate(found):
            # Half of what is left: who answers needs a round trip, however many follow.
            share = (deadline - self._clock()) / min(len(found) - number, 2)
            try:
                raw = socket.socket(family, kind, protocol)
                self._begin_to_connect(raw, address)
                self._finish_to_connect(raw, max(0.05, share))
                return raw
            except OSError as error:
                failure = error
        raise describe_network_error(failure, self._endpoint) from failure

    def _begin_to_connect(
        self, raw: socket.socket, address: tuple[object, ...]
    ) -> None:
        """Take over a socket; under the lock, as `shut` wakes only who connects."""
        with self._lock:
            if self._socket is not None:
                self._socket.close()
            self._socket = raw
            if self._ended:
                raise UpstreamError("ended", "closed here")
            raw.setblocking(False)
            code = raw.connect_ex(address)
        if code not in (0, errno.EINPROGRESS):
            raise OSError(code, os.strerror(code))

    @staticmethod
    def _finish_to_connect(raw: socket.socket, patience: float) -> None:
        poller = select.poll()
        poller.register(raw, select.POLLOUT)
        if not poller.poll(patience * 1000):
            raise socket.timeout
        code = raw.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))

    def _add_names(
        self, failure: UpstreamError, error: ssl.SSLError, patience: tuple[float, float]
    ) -> UpstreamError:
        """Tell a wrong name's cure: the names that the certificate does have."""
        if getattr(error, "verify_code", 0) not in (62, 64):
            return failure
        with contextlib.suppress(OSError, UpstreamError, ConfigError):
            raw = self._connect(self._clock() + patience[0])
            raw.settimeout(patience[1])
            names = ", ".join(self._trust.certificate_names(raw)[:8])
            text = f"certificate is for {names}, not for {self._endpoint.name}"
            return UpstreamError("certificate", f"{text}: give --upstream HOST#NAME")
        return failure


class Outbox:
    """What is to be sent on a line: any thread puts, none waits for it to be sent.

    Whoever finds no flush under way becomes the flusher and writes all that has
    gathered as one TLS write: 47-53 k queries/s against 23-31 k where each query is a
    write of its own. `choked` is called where the kernel takes no more octets.
    """

    def __init__(self, line: Line, choked: Callable[[], None]) -> None:
        self._line = line
        self._choked = choked
        self._channel: Channel | None = None
        self._unsent = b""  # belongs to the flusher
        self._lock = threading.Lock()  # guards all below
        self._flushed = threading.Condition(self._lock)  # told when a flush ends
        self._frames: list[bytes] = []
        self._reply_due = False  # TLS has something to say of its own
        self._flushing = False  # some thread is in _flush
        self._stalled = True  # none may enter it: not open, no room, or broken
        self._closed = False

    def open(self, channel: Channel) -> None:
        """Begin to send."""
        with self._lock:
            self._channel = channel
            self._stalled = False

    def put(self, frames: Iterable[bytes], reply_due: bool = False) -> None:
        """Send these frames, or what TLS has to say, as soon as may be."""
        with self._lock:
            self._frames.extend(frames)
            self._reply_due |= reply_due
            if self._flushing or self._stalled:
                return
            self._flushing = True
        self._flush()

    def resume(self) -> None:
        """Go on with the flush that the kernel had no room for."""
        with self._lock:
            if self._closed or self._flushing:
                return
            self._stalled = False
            self._flushing = True
        self._flush()

    def close(self) -> None:
        """Send nothing any more; returns when no thread is sending."""
        with self._lock:
            self._closed = self._stalled = True
            while self._flushing:
                self._flushed.wait()

    def _flush(self) -> None:
        """Write all that has gathered; run by the one thread that set _flushing."""
        channel = self._channel
        assert channel is not None
        while (frames := self._take()) is not None:
            try:
                self._unsent += channel.encrypt(b"".join(frames))
            except (ssl.SSLError, ValueError):
                self._stall()  # who reads finds the same, and reports it
                return
            sent = self._line.send(self._unsent)
            self._unsent = self._unsent[sent or 0 :]
            if sent is None or self._unsent:
                self._stall()
                if sent is not None:
                    self._choked()
                return

    def _take(self) -> list[bytes] | None:
        """Take what has gathered; None where that is nothing: the flush is over."""
        with self._lock:
            frames, self._frames = self._frames, []
            if frames or self._unsent or self._reply_due:
                self._reply_due = False
                return frames
            self._flushing = False
            self._flushed.notify()
            return None

    def _stall(self) -> None:
        with self._lock:
            self._stalled = True
            self._flushing = False
            self._flushed.notify()


class Connection:
    """One connection to an upstream, with many queries in flight.

    Its own thread connects, shakes hands and reads; any thread may send, none waits for
    another or for the network.
    """

    MAX_PENDING = 32768  # half of the IDs, so that a random free one is found at once

    def __init__(
        self,
        endpoint: Endpoint,
        trust: Trust,
        owner: ConnectionOwner,
        *,
        label: str,
        patience: tuple[float, float] = (3.0, 3.0),
        session: ssl.SSLSession | None = None,
        clock: Callable[[], float] = elapsed,
    ) -> None:
        """Prepare a connection; `patience`: seconds to connect, and to shake hands."""
        self.endpoint = endpoint
        self.alone: Exchange | None = None  # set by the owner: for this exchange only
        self.retired = False  # set by the owner: takes no more queries
        self.proved = False  # set by the owner: has answered
        self.end_reason = ""  # set by the owner: why it closes it
        self.begun_at = clock()
        self.opened_at = 0.0
        # When octets last came in, or a query went out after quiet.
        self.active_at = 0.0
        self.waiting_since: float | None = None  # for the first octets since a query
        self.round_trip = 0.0  # s, of the TCP handshake
        self._owner = owner
        self._patience = patience
        self._session = session
        self._clock = clock
        self._line = Line(endpoint, trust, clock)
        self._channel: Channel | None = None
        self._outbox = Outbox(self._line, self._choked)
        self._lock = threading.Lock()  # guards all below
        self._pending: dict[int, tuple[Exchange, float]] = {}
        self._ids: list[int] = []
        self._open = False
        self._ended = False
        self._joined = False  # nobody will wait for its thread again
        self._thread = threading.Thread(target=self._run, name=label, daemon=True)

    @property
    def is_open(self) -> bool:
        """Tell whether queries may be sent: a snapshot, it may close at any time."""
        return self._open

    @property
    def pending(self) -> int:
        """Return how many queries have had no answer: a snapshot."""
        return len(self._pending)

    @property
    def is_running(self) -> bool:
        """Tell whether its thread has begun and not ended."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start to connect, unless its end has been waited for."""
        with self._lock:
            if not self._joined:
                self._thread.start()

    def send(self, exchanges: Sequence[Exchange], now: float) -> bool:
        """Send the exchanges' queries; False, and nothing sent, if it is not open."""
        with self._lock:
            pending = self._pending
            if not self._open or len(pending) + len(exchanges) > self.MAX_PENDING:
                return False
            if self.waiting_since is None:
                self.waiting_since = self.active_at = now
            ids, frames = self._ids, []
            for exchange in exchanges:
                ident = ids.pop() if ids else self._more_ids_locked()
                while ident in pending:
                    ident = ids.pop() if ids else self._more_ids_locked()
                pending[ident] = (exchange, now)
                wire = exchange.wire
                frames.append(PAIR.pack(len(wire) + 2, ident) + wire)
        self._outbox.put(frames)
        return True

    def resume(self) -> None:
        """Go on to send where the kernel had no room for more."""
        self._outbox.resume()

    def close(self) -> None:
        """Close it from any thread; its own thread then reports it lost."""
        with self._lock:
            self._ended = True
            channel = self._channel if self._open else None
        self._line.shut(channel.farewell() if channel else b"")

    def join(self) -> None:
        """Wait until its thread has ended: at most as long as its patience."""
        with self._lock:
            self._joined = True
        if self._thread.ident is not None:
            self._thread.join(sum(self._patience) + 1.0)

    def session(self) -> ssl.SSLSession | None:
        """Return the TLS session to resume; complete only after the first answer."""
        return self._channel.session() if self._channel is not None else None

    def facts(self) -> TLSFacts:
        """Return what the handshake agreed on."""
        return self._channel.facts() if self._channel is not None else TLSFacts()

    def peer(self) -> Peer | None:
        """Return what TLS knows of the other end, once it is open."""
        return self._channel.peer() if self._channel is not None else None

    def _run(self) -> None:
        error = UpstreamError("ended", "closed here")
        try:
            channel, self.round_trip = self._line.open(self._patience, self._session)
            self._channel = channel
            self._outbox.open(channel)
            self.active_at = self._clock()
            with self._lock:
                self._open = not self._ended
            self.opened_at = self.active_at  # until it is open, it is connecting
            self._owner.connection_opened(self)
            self._read(channel)
        except UpstreamError as failure:
            error = error if self._ended else failure
        except Exception:
            logger.exception("internal error: thread=%s", self._thread.name)
            error = UpstreamError("internal", "internal error: see the log")
        finally:
            self._owner.connection_lost(self, error, self._shut())

    def _read(self, channel: Channel) -> None:
        """Read and hand on answers until the connection ends; raises UpstreamError."""
        buffer = b""
        while True:
            octets = self._line.receive()
            now = self._clock()
            if self.waiting_since is not None:
                self.waiting_since = now
            plaintext, failure, due = channel.decrypt(octets)
            if due:
                self._outbox.put((), reply_due=True)
            messages, buffer = split_frames(buffer + plaintext)
            if messages:
                answers, misfit = self._match(messages, now)
                self._owner.connection_answered(self, answers, now)
                failure = misfit or failure
            if failure is not None:
                raise failure
            if hopeless(buffer):
                raise UpstreamError("garbage", f"message of {buffer[1]} octets")

    def _match(
        self, messages: list[bytes], now: float
    ) -> tuple[list[Answer], UpstreamError | None]:
        """Pair messages with exchanges, up to the first one that does not fit.

        Exchanges of those behind it stay pending, to be given back as orphans.
        """
        answers: list[Answer] = []
        failure = None
        with self._lock:
            pending = self._pending
            found = [pending.pop(m[0] << 8 | m[1], None) for m in messages]
            self.active_at = now
            self.waiting_since = now if pending else None
        try:
            for entry, message in zip(found, messages):
                if entry is None:
                    raise FormatError("response with an ID that was not asked")
                exchange, sent = entry
                question = exchange.query.question
                if message[2] >= 0x80 and message.startswith(question, 12):
                    response = parse_response(message, 12 + len(question))
                else:
                    response = parse_misfit(message)
                answers.append((exchange, response, now - sent))
        except FormatError as error:
            orphans = [entry for entry in found[len(answers) :] if entry]
            with self._lock:  # under keys that are no IDs: no response finds them
                pending.update(enumerate(orphans, 1 << 16))
            failure = UpstreamError("garbage", str(error))
        return answers, failure

    def _shut(self) -> list[Exchange]:
        """Close the socket, once no other thread can be using it."""
        with self._lock:
            self._open = False
            orphans = [exchange for exchange, _ in self._pending.values()]
            self._pending = {}
        self._outbox.close()
        if self._channel is not None:
            self._line.shut(self._channel.farewell())
        self._line.close()
        return orphans

    def _choked(self) -> None:
        self._owner.connection_choked(self)

    def _more_ids_locked(self) -> int:
        """Draw random IDs: one system call for 512 of them."""
        self._ids.extend(struct.unpack("=512H", os.urandom(1024)))
        return self._ids.pop()


# ---- Upstreams: health, strategy, retries --------------------------------------------
# Which connection an exchange goes to, and what happens when no answer comes. Decisions
# are made under one lock, on memory alone, and collected in a Plan; the plan is carried
# out after the lock is released.


class IdleLife:
    """How long an upstream keeps idle connections, learned from when it closes them."""

    START = 10.0  # s; what the large public resolvers were measured to keep
    MARGIN = 0.8  # of a life is used: their clocks are coarse and packets travel
    SHORTEST = 0.25  # s; below it a connection per query would do as well
    SAMPLES = 5

    def __init__(self) -> None:
        self.told: float | None = None  # by edns-tcp-keepalive, RFC 7828
        self._ages: collections.deque[float] = collections.deque(maxlen=self.SAMPLES)

    def note(self, age: float) -> None:
        """Take note that the server closed a connection that was idle for `age`."""
        if age >= self.SHORTEST:  # else nothing to learn: it is a restart or a bound
            self._ages.append(age)

    @property
    def life(self) -> float:
        """Return the believed life: the second shortest seen; one may be a restart."""
        if self.told is not None:
            return self.told
        return sorted(self._ages)[1] if len(self._ages) > 1 else self.START

    @property
    def usable_for(self) -> float:
        """Return for how many seconds of idleness a connection may be used."""
        return max(self.SHORTEST, self.life * self.MARGIN)


class Health:
    """How an upstream has been doing: plain numbers, guarded by the group's lock."""

    OVERDUE_MIN, OVERDUE_MAX = 0.05, 1.0  # s; bounds of when an answer is overdue
    GRACE = 1.5  # s; one that was reached may be restarting: queries wait so long
    RETRY_MIN, RETRY_MAX = 0.5, 30.0  # s between attempts while it is down
    RETRY_GRACE = 0.05  # s; first retry of one that was there a moment ago
    RETRY_SHARE = 0.05  # of the outage so far: back within 5 % of what it lasted

    def __init__(self) -> None:
        self.latency: float | None = None  # s, smoothed
        self.slow = self.OVERDUE_MIN  # s, about the 95th percentile
        self.reached = False  # has ever taken a connection, or broken it off
        self.worked = False  # has ever answered
        self.doubtful = False  # took queries and has not answered since
        self.failures = 0  # connections in a row that did not open
        self.failing_since: float | None = None
        self.retry_at = 0.0  # when the next attempt may start
        self.urgent_at = 0.0  # the same, where nothing else can serve
        self.probe_at = 0.0  # when a doubtful one may get a copy of a query
        self.failed_at: float | None = None
        self.error = UpstreamError("closed", "not connected yet")

    @property
    def overdue_after(self) -> float:
        """Return after how many seconds an answer is overdue."""
        return min(max(self.slow, self.OVERDUE_MIN), self.OVERDUE_MAX)

    def down(self, now: float) -> bool:
        """Tell whether to give up on it: failing, and not just for a moment."""
        since = self.failing_since
        return since is not None and not (self.reached and now - since < self.GRACE)

    def opened(self, round_trip: float) -> None:
        """Note a connection that opened, and the time of its TCP handshake."""
        doubtful = self.doubtful
        self.forgive()
        self.doubtful = doubtful
        self.reached = True
        if self.latency is None:
            self.latency = round_trip
            self.slow = 3 * round_trip

    def forgive(self) -> None:
        """Forget failures: what they were due to is over."""
        self.failures = 0
        self.failing_since = None
        self.retry_at = self.urgent_at = 0.0
        self.doubtful = False

    def answered(self, latencies: Iterable[float]) -> None:
        """Note answers; up by 19 % and down by 1 % balances at the 95th percentile."""
        self.worked = True
        self.doubtful = False
        self.failing_since = None  # one connection works, whatever another met with
        latency, slow = self.latency or 0.0, self.slow
        for sample in latencies:
            latency += (sample - latency) * 0.125
            slow *= 1.19 if sample > slow else 0.99
        self.latency = latency
        self.slow = min(max(slow, 0.001), 2 * self.OVERDUE_MAX)

    def failed(self, started: float, now: float, error: UpstreamError) -> None:
        """Note a connection that was begun at `started` and did not open."""
        if self.failing_since is None:
            self.failing_since = started
        self.failures += 1
        self.failed_at = now
        self.error = error
        if error.cause == "reset":  # by a server that stops, as from its backlog
            self.reached = True
        jitter = random.uniform(0.75, 1.0)
        outage = now - self.failing_since
        delay = min(max(self.RETRY_MIN, outage * self.RETRY_SHARE), self.RETRY_MAX)
        urgent = self.RETRY_MIN
        if self.reached and outage < self.GRACE:
            urgent = delay = min(
                delay, self.RETRY_GRACE * 2 ** min(self.failures - 1, 8)
            )
        self.retry_at = started + delay * jitter
        self.urgent_at = started + urgent * jitter


# What is counted of an upstream, with the label that each has beside it.
FAILURES = (
    *("timeout", "refused", "reset", "unreachable", "network", "resolve", "tls"),
    *("certificate", "closed", "garbage", "internal"),
)
ENDS = "idle", "spare", "network changed", "ended"  # of ours; others are failures
UPSTREAM_EVENTS = (
    *(("requests",), ("replays",), ("hedges",), ("hedges_won",)),
    ("conn_cache_misses",),
    *(("failures", cause) for cause in (*FAILURES, "rcode")),
    *(("handshakes", result) for result in ("full", "resumed", *FAILURES)),
    *(("closes", reason) for reason in (*FAILURES, *ENDS)),
)


class Standing(NamedTuple):
    """How an upstream does, in words and for people."""

    name: str
    state: str  # up, down, doubtful or new: not connected to yet
    error: str  # why it does not answer, or did not when it failed last
    since: float | None  # when it began to fail, if it still does
    failed_at: float | None  # when it failed last
    domain: str = ""  # the one that is routed to it, if it is not for all


class Upstream:
    """One endpoint and its connections; guarded by the group's lock."""

    MAX_CONNECTIONS = 4  # at once, dying ones included: one works, one hedges
    STUCK = 0.75  # s after which a dial may be overtaken by another
    QUICK = (0.75, 1.25)  # s to connect and to shake hands: a lost SYN is sent again
    SAMPLES = 8  # latencies of a batch that count for its health: they are alike
    PATIENT = (3.0, 3.0)  # s; the first try and every fourth, for very long lines
    LONG_LINE = 3  # times the latency: no try takes less, as a handshake may need two

    def __init__(self, endpoint: Endpoint, index: int) -> None:
        self.endpoint = endpoint
        self.index = index
        self.health = Health()
        self.idle = IdleLife()
        self.connections: list[Connection] = []
        self.session: ssl.SSLSession | None = None  # never given to another upstream
        self.dialed_at = 0.0
        self.reported: set[str] = set()  # causes that the log knows of
        self.counts = collections.Counter(dict.fromkeys(UPSTREAM_EVENTS, 0))
        self.durations = Histogram(LATENCIES)
        self.certificate_expires = 0.0  # s since 1970; 0: not known
        self._numbers = itertools.count(1)

    @property
    def connecting(self) -> bool:
        """Tell whether a connection for everybody's use is on its way."""
        return any(c.opened_at == 0.0 and c.alone is None for c in self.connections)

    def usable(self, now: float, avoid: Connection | None = None) -> Connection | None:
        """Return the connection for the next query.

        The oldest, as many queries on one connection cost less than a few on each of
        two; if all keep queries waiting for long, the one heard of last.
        """
        best, age = None, 0.0
        for connection in self.connections:
            if connection is avoid or not self._fit(connection, now):
                continue
            since = connection.waiting_since
            silence = 0.0 if since is None else now - since
            if silence <= self.health.overdue_after:
                return connection
            if best is None or silence < age:
                best, age = connection, silence
        return best

    def lingering(self, now: float) -> list[Connection]:
        """Return those that have been idle for too long to be used, oldest first."""
        return [
            c
            for c in self.connections
            if c.is_open and c.waiting_since is None and not self._fit(c, now)
        ]

    def silent(self, connection: Connection, now: float) -> bool:
        """Tell whether an answer on this connection is overdue."""
        since = connection.waiting_since
        return since is not None and now - since > self.health.overdue_after

    def label(self) -> str:
        """Return a name for the next connection and its thread."""
        return f"upstream-{self.endpoint.host}-{next(self._numbers)}"

    def patience(self) -> tuple[float, float]:
        """Return how long the next connection may take to open."""
        tries = self.health.failures
        first = tries == 0 and not self.health.worked
        if first or tries % 4 == 3:
            return self.PATIENT
        line = min(self.LONG_LINE * (self.health.latency or 0.0), self.PATIENT[0])
        return max(line, self.QUICK[0]), max(line, self.QUICK[1])

    @property
    def up(self) -> bool:
        """Tell whether it answers, as far as is known."""
        health = self.health
        return health.failing_since is None and (
            any(c.is_open for c in self.connections)
            or (health.reached and not health.doubtful)
        )

    def note_answers(self, latencies: Sequence[float]) -> None:
        """Note good answers and how long they took."""
        self.health.answered(latencies[: self.SAMPLES])
        self.durations.observe_all(latencies)

    def note_opened(self, facts: TLSFacts) -> None:
        """Note a connection that opened."""
        self.counts["handshakes", "resumed" if facts.resumed else "full"] += 1
        self.certificate_expires = facts.expires

    def note_failure(self, error: UpstreamError, begun: float, now: float) -> bool:
        """Note a connection that did not open; True if the log shall say so."""
        self.counts["handshakes", error.cause] += 1
        self.counts["failures", error.cause] += 1
        if any(c.is_open and c.opened_at > begun for c in self.connections):
            return False  # another one has since
        self.health.failed(self.dialed_at, now, error)
        if not self.health.down(now) or error.cause in self.reported:
            return False
        self.reported.add(error.cause)
        return True

    def note_loss(
        self,
        connection: Connection,
        error: UpstreamError,
        orphans: list[Exchange],
        now: float,
    ) -> None:
        """Note that a connection closed idle, or with queries unanswered."""
        reason = connection.end_reason or error.cause
        self.counts["closes", reason] += 1
        if any(not exchange.done for exchange in orphans):
            self.health.doubtful = True
            self.counts["failures", reason] += reason in FAILURES
        elif not orphans and error.cause in ("closed", "reset"):
            self.idle.note(now - connection.active_at)

    def describe_trouble(self) -> str:
        """Say in words why it does not answer."""
        return f"{self.endpoint}: {self.standing().error}"

    def standing(self) -> Standing:
        """Return how it does."""
        health, error = self.health, str(self.health.error)
        state = "down" if health.failing_since is not None else "new"
        if health.doubtful and state == "new":
            state, error = "doubtful", "took queries and has not answered since"
        return Standing(
            str(self.endpoint),
            "up" if self.up else state,
            error,
            health.failing_since,
            health.failed_at,
        )

    def describe(self) -> str:
        """Return a line on how it does, for the log."""
        health = self.health
        latency = "-" if health.latency is None else f"{health.latency * 1000:.1f}"
        state = "doubtful" if health.doubtful else "up"
        if health.failing_since is not None:
            state = "down"
        return (
            f"name={self.endpoint} state={state} latency_ms={latency}"
            f" overdue_ms={health.overdue_after * 1000:.0f}"
            f" idle_life_s={self.idle.life:.1f} connections={len(self.connections)}"
        )

    def samples(self) -> list[Sample]:
        """Return its metrics, but for those whose value is not known yet."""
        name, health = str(self.endpoint), self.health
        requests, waited = self.counts["requests",], self.counts["conn_cache_misses",]
        found: dict[str, float | Histogram | None] = {
            "up": int(self.up),
            "connections": sum(c.is_open for c in self.connections),
            "request_duration_seconds": self.durations.copy(),
            "latency_seconds": health.latency,
            "conn_cache_hits_total": requests - waited,
            "idle_life_seconds": self.idle.life,
            "certificate_expiry_timestamp_seconds": self.certificate_expires or None,
        }
        return [
            *(
                (f"dotproxy_upstream_{event}_total", (name, *label), number)
                for (event, *label), number in self.counts.items()
            ),
            *(
                (f"dotproxy_upstream_{metric}", (name,), value)
                for metric, value in found.items()
                if value is not None
            ),
        ]

    def _fit(self, connection: Connection, now: float) -> bool:
        if not connection.is_open or connection.retired or connection.alone:
            return False
        if connection.waiting_since is None:
            return now - connection.active_at < self.idle.usable_for
        return connection.pending < connection.MAX_PENDING // 2


class HedgeBudget:
    """Early copies allowed: a share of all queries, and a few to begin with."""

    SHARE = 0.1  # so that a slow resolver is not doubled in load
    BURST = 32.0  # a handful of clients on a bad line are all helped

    def __init__(self) -> None:
        self._tokens = self.BURST

    def earn(self, queries: int) -> None:
        """Note queries that were sent for the first time."""
        self._tokens = min(self._tokens + queries * self.SHARE, self.BURST)

    def spend(self) -> bool:
        """Tell whether one early copy may be sent, and count it."""
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True


Failure = tuple[Exchange, "Response | UpstreamError"]  # why it has no better answer


class Plan:
    """What was decided under the lock, to be done without it."""

    __slots__ = ("closes", "failed", "sends", "starts")

    def __init__(self) -> None:
        self.sends: dict[Connection, list[Exchange]] = {}
        self.starts: list[Connection] = []
        self.closes: list[Connection] = []
        self.failed: list[Failure] = []

    def send(self, connection: Connection, exchange: Exchange, now: float) -> None:
        """Have a copy of the exchange sent on this connection."""
        self.send_all(connection, (exchange,), now)

    def close(self, connection: Connection, reason: str) -> None:
        """Have this connection closed."""
        connection.end_reason = connection.end_reason or reason
        self.closes.append(connection)

    def send_all(
        self, connection: Connection, exchanges: Sequence[Exchange], now: float
    ) -> None:
        """Have a copy of each exchange sent on this connection."""
        self.sends.setdefault(connection, []).extend(exchanges)
        for exchange in exchanges:
            exchange.avoid = connection
            exchange.sent = now
            exchange.copies += 1
            exchange.live += 1


STRATEGIES = ("fastest", "round-robin", "random", "failover")


class Fleet:
    """The upstreams and their connections: which there are, which is the best.

    Memory only; guarded by the group's lock. `connect` makes a Connection, not started,
    to an upstream, for everybody or for one exchange alone.
    """

    WARM = 2  # upstreams that are kept connected while clients are active
    LINGER = 60.0  # s; a connection too old to use is left to the server, to learn from
    SILENCE = 2.0  # s without an octet, with queries waiting, that end a connection

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        strategy: str,
        connect: Callable[[Upstream, Exchange | None], Connection],
    ) -> None:
        self.upstreams = [Upstream(e, index) for index, e in enumerate(endpoints)]
        self.homes: dict[Connection, Upstream] = {}
        self._strategy = strategy
        self._connect = connect
        # Those that take turns are all wanted.
        in_turn = strategy in ("round-robin", "random")
        self._warm = len(endpoints) if in_turn else self.WARM
        self._turn = 0  # of round-robin

    def ranking(self, now: float, exchange: Exchange | None = None) -> list[Connection]:
        """Return a connection per upstream that has one, the best first.

        For a copy of an exchange: not the connection that was tried last, nor upstreams
        that refused it.
        """
        avoid = exchange.avoid if exchange else None
        found = []
        for upstream in self.upstreams:
            if exchange and upstream in exchange.refused_by:
                continue
            connection = upstream.usable(now, avoid)
            if connection is not None:
                found.append(connection)
        if len(found) > 1:
            found.sort(key=lambda each: (self.doubts(each, now), self._score(each)))
        return found

    def doubts(self, connection: Connection, now: float) -> bool:
        """Tell whether to prefer any other: it has not answered when it should have."""
        upstream = self.homes[connection]
        return upstream.health.doubtful or upstream.silent(connection, now)

    def spread(self, ranked: list[Connection], now: float) -> list[Connection]:
        """Return those that share new queries: one, or all in turn without doubts."""
        if self._strategy in ("fastest", "failover") or len(ranked) == 1:
            return ranked[:1]
        sure = [c for c in ranked if not self.doubts(c, now)]
        self._turn += 1
        return sure or ranked[:1]

    def dial(self, plan: Plan, upstream: Upstream, now: float, urgent: bool) -> bool:
        """Begin a connection, unless one is on its way or it is too early."""
        retry_at = upstream.health.urgent_at if urgent else upstream.health.retry_at
        # A dial that is stuck does not keep the upstream out once it is back.
        stuck = now - upstream.dialed_at >= upstream.STUCK
        if (upstream.connecting and not stuck) or now < retry_at:
            return False
        shared = [c for c in upstream.connections if c.alone is None]
        if len(shared) >= upstream.MAX_CONNECTIONS:
            spare = upstream.lingering(now)
            if not spare:
                return False
            plan.close(spare[0], "idle")
        self._begin(plan, upstream, None, now)
        return True

    def dial_alone(self, plan: Plan, exchange: Exchange, now: float) -> bool:
        """Begin a connection for this exchange alone, unless it is too early."""
        ready = [
            u
            for u in self.upstreams
            if now >= u.health.urgent_at and u not in exchange.refused_by
        ]
        ready = [u for u in ready if not u.health.failures] or ready
        ready = [u for u in ready if not u.health.doubtful] or ready
        if not ready:
            return False
        self._begin(plan, ready[exchange.losses % len(ready)], exchange, now)
        return True

    def dial_some(self, plan: Plan, now: float, refused_by: Sequence[Upstream]) -> None:
        """Begin connections wherever that may help a query that waits for one."""
        for upstream in self.upstreams:
            if upstream not in refused_by:
                self.dial(plan, upstream, now, urgent=True)

    def hopeful(self, now: float, refused_by: Sequence[Upstream]) -> bool:
        """Tell whether a connection may open soon."""
        return any(
            upstream.connecting or not upstream.health.down(now)
            for upstream in self.upstreams
            if upstream not in refused_by
        )

    def keep_warm(self, plan: Plan, now: float) -> None:
        """Begin connections so that the best upstreams have one ready."""
        ready = [u for u in self.upstreams if u.usable(now)]
        wanted = self.upstreams
        if self._strategy != "failover":
            missing = [u for u in self.upstreams if u not in ready]
            wanted = ready + sorted(missing, key=lambda u: u.health.latency or 0.0)
        sure = 0
        for upstream in wanted:
            if upstream in ready:
                sure += not upstream.health.doubtful
            elif upstream.health.failures:
                self.dial(plan, upstream, now, urgent=not ready)
            elif sure < self._warm:
                self.dial(plan, upstream, now, urgent=not ready)
                sure += 1

    def look(self, plan: Plan, now: float) -> None:
        """End connections that have gone silent or have outlived their use."""
        for upstream in self.upstreams:
            lingering = upstream.lingering(now)
            for connection in upstream.connections:
                since = connection.waiting_since
                if connection in lingering:
                    age = now - connection.active_at
                    # One is left to the server, to learn how long it keeps it.
                    if age < self.LINGER and connection is lingering[0]:
                        if not connection.retired:
                            continue
                    elif age >= self.LINGER:
                        upstream.idle.note(self.LINGER)
                    plan.close(connection, "idle")
                elif since is not None and now - since > self.SILENCE:
                    upstream.health.doubtful = True
                    plan.close(connection, "timeout")

    def flush(self, plan: Plan, now: float) -> None:
        """Replace all connections and forget failures: the network has changed."""
        for connection in self.homes:
            connection.retired = True
            plan.close(connection, "network changed")
        for upstream in self.upstreams:
            upstream.health.forgive()
            self._begin(plan, upstream, None, now)

    def _begin(
        self, plan: Plan, upstream: Upstream, alone: Exchange | None, now: float
    ) -> None:
        upstream.dialed_at = now
        connection = self._connect(upstream, alone)
        connection.alone = alone
        upstream.connections.append(connection)
        self.homes[connection] = upstream
        plan.starts.append(connection)

    def remove(self, connection: Connection) -> Upstream:
        """Forget a connection that is gone."""
        upstream = self.homes.pop(connection)
        upstream.connections.remove(connection)
        return upstream

    def note_answers(self, connection: Connection, good: list[Answer]) -> None:
        """Note good answers, and who had refused to give them."""
        upstream = self.homes[connection]
        upstream.note_answers([latency for _, _, latency in good])
        for exchange in [each for each, _, _ in good if each.copies > 1]:
            if exchange.hedge is not None:
                upstream.counts["hedges_won",] += exchange.hedge is connection
                exchange.hedge = None  # the first answer counts
            for refuser in exchange.refused_by:
                refuser.health.doubtful = refuser is not upstream

    def explain(self, exchange: Exchange, text: str) -> UpstreamError:
        """Say why an exchange fails: `text`, or what is wrong with the upstreams."""
        errors = [u.health.error for u in self.upstreams if u.health.failures]
        worst = errors[0] if errors and not (text and exchange.copies) else None
        names = ", ".join(str(u.endpoint) for u in self.upstreams[:2])
        cause = worst.cause if worst else "timeout"
        return UpstreamError(cause, f"{names}: {worst or text or 'not connected'}")

    def _score(self, connection: Connection) -> float:
        upstream = self.homes[connection]
        if self._strategy == "failover":
            return upstream.index
        if self._strategy == "round-robin":
            return (upstream.index - self._turn) % len(self.upstreams)
        if self._strategy == "random":
            return random.random()
        health = upstream.health
        # Until it has answered, one query at a time; then work counts little, as few
        # connections with much traffic cost less than many with little.
        weight = 0.01 if health.worked else 1.0
        return (health.latency or 0.0) * (1.0 + weight * connection.pending)


class Quarantine:
    """Queries whose connections died again and again: each gets one of its own.

    A poisonous name so takes down nobody else; a name that is merely slow comes back.
    """

    ACQUITTED = 0.2  # s that a suspect is alone without taking its connection down
    MAX_ALONE = 16  # connections for single queries at once

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._waiting: collections.deque[Exchange] = collections.deque()

    def admit(self, exchange: Exchange) -> None:
        """Have the exchange sent alone as soon as there is room."""
        exchange.suspect = True
        self._waiting.append(exchange)

    def serve(self, plan: Plan, now: float) -> list[Exchange]:
        """Begin connections for who waits; return those for whom there is no hope."""
        busy = sum(c.alone is not None for c in self._fleet.homes)
        waiting, self._waiting = self._waiting, collections.deque()
        hopeless = []
        for exchange in waiting:
            if exchange.done:
                continue
            if busy < self.MAX_ALONE and self._fleet.dial_alone(plan, exchange, now):
                busy += 1
            elif self._fleet.hopeful(now, exchange.refused_by):
                self._waiting.append(exchange)
            else:
                hopeless.append(exchange)
        return hopeless

    def review(self, plan: Plan, exchange: Exchange, now: float) -> float:
        """Let a suspect that is merely slow go back; return when to look again.

        It makes room for the next suspect; one that waits its turn gets no copy, as
        that would take its neighbours down with it.
        """
        used = exchange.avoid
        home = self._fleet.homes.get(used) if used else None
        if used and home and used.alone is exchange:
            due = exchange.sent + max(home.health.overdue_after, self.ACQUITTED)
            if now < due:
                return due
            exchange.suspect = False
            plan.close(used, "spare")
        return now + Health.OVERDUE_MIN


class Dispatcher:
    """Which exchange goes where and when: first copies, hedges, replays, giving up.

    Memory only; guarded by the group's lock.
    """

    CERTAIN = 1.0  # s without any answer after which another copy needs no budget
    SPREAD = 1.5  # each further copy of a query waits so many times longer
    MAX_COPIES = 8  # of one query
    EXPLORE = 0.02  # share of batches whose first query tells how another upstream does
    ALONE_AFTER = 3  # connections that died with a query before it gets one of its own
    MAX_LOSSES = 6  # connections that one query may take down

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.parked: dict[Exchange, None] = {}  # wait for a connection, oldest first
        self._quarantine = Quarantine(fleet)
        self._budget = HedgeBudget()

    def first(self, plan: Plan, exchanges: Sequence[Exchange], now: float) -> float:
        """Plan the first copies; return the seconds after which to look again."""
        self._budget.earn(len(exchanges))
        ranked = self.fleet.ranking(now)
        if not ranked:
            for exchange in exchanges:
                self._park(plan, exchange, now)
            return Health.OVERDUE_MIN
        chosen = self.fleet.spread(ranked, now)
        if len(ranked) > 1:
            self._explore(plan, ranked[1:], exchanges[0], now)
        for number, connection in enumerate(chosen):
            plan.send_all(connection, exchanges[number :: len(chosen)], now)
        return min(self.fleet.homes[each].health.overdue_after for each in chosen)

    def overdue(
        self, plan: Plan, exchanges: Sequence[Exchange], now: float
    ) -> tuple[list[Exchange], float]:
        """Plan what is due for these; return those to look at again, and when."""
        left, due = [], now + Health.OVERDUE_MAX
        for exchange in exchanges:
            if exchange.done:
                continue
            if now >= min(exchange.deadline, self._settled_at(exchange)):
                self._give_up(plan, exchange, "no answer")
                continue
            left.append(exchange)
            due = min(due, self._hedge(plan, exchange, now), exchange.deadline)
        return left, due

    def _settled_at(self, exchange: Exchange) -> float:
        """Return when a SERVFAIL in hand is passed on, though others were asked."""
        if exchange.failure is None:
            return exchange.deadline
        return exchange.started + self.CERTAIN * (1 if exchange.live <= 0 else 2)

    def opened(self, plan: Plan, connection: Connection, now: float) -> None:
        """Give a new connection what waits for one."""
        upstream = self.fleet.homes[connection]
        upstream.health.opened(connection.round_trip)
        if connection.alone:
            if connection.alone.done:
                plan.close(connection, "spare")
            else:
                plan.send(connection, connection.alone, now)
        else:
            for exchange in list(self.parked):
                if upstream not in exchange.refused_by:
                    del self.parked[exchange]
                    if not exchange.done:
                        plan.send(connection, exchange, now)
        waited = plan.sends.get(connection, ())
        upstream.counts["conn_cache_misses",] += len(waited)

    def refused(
        self, plan: Plan, connection: Connection, answers: list[Answer], now: float
    ) -> None:
        """Ask another upstream about failures; pass one on where none is left."""
        upstream = self.fleet.homes[connection]
        upstream.counts["failures", "rcode"] += len(answers)
        for exchange, response, _ in answers:
            exchange.live -= 1
            if exchange.done:
                continue
            exchange.refused_by += (upstream,)
            if exchange.failure is None or response.rcode == Rcode.SERVFAIL:
                exchange.failure = response
            if exchange.live <= 0:
                self._again(plan, exchange, now)

    def unsent(self, plan: Plan, exchanges: list[Exchange], now: float) -> None:
        """Plan anew for exchanges whose connection closed before they were sent."""
        for exchange in exchanges:
            exchange.live -= 1
            if not exchange.done and exchange.live <= 0:
                self._again(plan, exchange, now)

    def lost(
        self,
        plan: Plan,
        connection: Connection,
        error: UpstreamError,
        orphans: list[Exchange],
        now: float,
    ) -> int:
        """Send again what a connection left unanswered; return how many those are."""
        alone, replays = connection.alone, 0
        if alone and alone not in orphans and connection.opened_at == 0.0:
            orphans = [*orphans, alone]
            alone.live += 1
        for exchange in orphans:
            exchange.live -= 1
        for exchange in dict.fromkeys(orphans):
            if exchange.done or exchange.live > 0:
                continue
            # A connection that was closed here, or that never opened, says nothing
            # against the query.
            guilty = error.cause != "ended" and connection.opened_at > 0.0
            exchange.losses += guilty
            replays += connection.opened_at > 0.0
            suspect = guilty and exchange.losses >= self.ALONE_AFTER
            if exchange.losses > self.MAX_LOSSES:
                self._give_up(plan, exchange, f"{error} {exchange.losses} times")
            elif suspect or exchange.suspect:
                self.parked.pop(exchange, None)
                self._quarantine.admit(exchange)
            else:
                self._again(plan, exchange, now)
        self.review(plan, now)
        return replays

    def review(self, plan: Plan, now: float) -> None:
        """Give up on parked exchanges for which no connection may open soon."""
        for exchange in self._quarantine.serve(plan, now):
            self._give_up(plan, exchange, "")
        if not self.parked:
            return
        self.fleet.dial_some(plan, now, ())
        for exchange in list(self.parked):
            if exchange.done:
                del self.parked[exchange]
            elif exchange.live <= 0 and not self.fleet.hopeful(
                now, exchange.refused_by
            ):
                self._give_up(plan, exchange, "")

    def _again(self, plan: Plan, exchange: Exchange, now: float) -> None:
        ranked = self.fleet.ranking(now, exchange)
        if ranked:
            plan.send(ranked[0], exchange, now)
        else:
            self._park(plan, exchange, now)

    def _hedge(self, plan: Plan, exchange: Exchange, now: float) -> float:
        """Plan another copy if one is due; return when to look again."""
        used = exchange.avoid
        if exchange.suspect:
            return self._quarantine.review(plan, exchange, now)
        if used is None:  # it may be sent any time now
            return now + Health.OVERDUE_MIN
        if exchange.copies >= self.MAX_COPIES:
            return exchange.deadline
        home = self.fleet.homes.get(used)
        gap = home.health.overdue_after if home else Health.OVERDUE_MIN
        gap = min(gap * self.SPREAD ** (exchange.copies - 1), Health.OVERDUE_MAX)
        since = now - exchange.sent
        if since < gap:
            return exchange.sent + gap
        early = since < self.CERTAIN
        if early and exchange in self.parked:
            return now + Health.OVERDUE_MIN
        if early and not (self._free(exchange, home, now) or self._budget.spend()):
            return exchange.sent + self.CERTAIN
        copies = exchange.copies
        self._again(plan, exchange, now)
        if exchange in self.parked and used.is_open and not early:
            plan.send(used, exchange, now)  # no other to be had: the same once more
        if exchange.copies > copies and exchange.avoid:
            exchange.hedge = exchange.avoid
            self.fleet.homes[exchange.avoid].counts["hedges",] += 1
        return now + gap

    def _free(self, exchange: Exchange, home: Upstream | None, now: float) -> bool:
        """Tell whether a copy adds no load where it hurts, and needs no budget.

        It does not where the one upstream has gone silent, and another takes over.
        """
        used = exchange.avoid
        if used is None or home is None or not home.silent(used, now):
            return False
        ranked = self.fleet.ranking(now, exchange)
        return bool(ranked) and self.fleet.homes[ranked[0]] is not home

    def _park(self, plan: Plan, exchange: Exchange, now: float) -> None:
        self.parked[exchange] = None
        self.fleet.dial_some(plan, now, exchange.refused_by)
        if exchange.live <= 0 and not self.fleet.hopeful(now, exchange.refused_by):
            self._give_up(plan, exchange, "")

    def _explore(
        self, plan: Plan, others: list[Connection], exchange: Exchange, now: float
    ) -> None:
        """Send one query to a second upstream too, to learn how that one does."""
        for connection in others:
            upstream = self.fleet.homes[connection]
            health = upstream.health
            if connection.waiting_since is not None and health.doubtful:
                continue
            if (
                health.doubtful and now >= health.probe_at
            ) or random.random() < self.EXPLORE:
                health.probe_at = now + Health.RETRY_MIN
                plan.send(connection, exchange, now)
                return

    def _give_up(self, plan: Plan, exchange: Exchange, text: str) -> None:
        self.parked.pop(exchange, None)
        if exchange.failure is not None:
            plan.failed.append((exchange, exchange.failure))
            return
        plan.failed.append((exchange, self.fleet.explain(exchange, text)))


def keepalive_told(response: Response) -> float | None:
    """Return the idle timeout in s that a response tells (RFC 7828), if it does."""
    if not response.upstream_options:
        return None
    data = find_option(response.upstream_options, OPTION_KEEPALIVE)
    return int.from_bytes(data, "big") / 10 if data and len(data) == 2 else None


class SleepDetector:
    """Notices that the host slept, or was halted with its clocks.

    The wall clock gained on the one that stands still meanwhile.
    """

    JUMP = 5.0  # s; clocks are corrected by less, and what is shorter breaks nothing

    def __init__(self, wall: Callable[[], float], awake: Callable[[], float]) -> None:
        self._wall = wall
        self._awake = awake
        self._offset = wall() - awake()

    def passed(self) -> bool:
        """Tell whether there was a sleep since it was asked last."""
        gained = self._wall() - self._awake() - self._offset
        if gained < 0.0 or gained > self.JUMP:  # less than 0: the clock was set back
            self._offset += gained
        return gained > self.JUMP


class UpstreamGroup(ConnectionOwner):
    """The upstreams of some names: sends exchanges until each has an answer or is late.

    Every exchange given to `send`, which its owner has to keep until then, comes back
    through `complete`, or through `fail` if all went wrong, at least once, from any
    thread, with no lock held; the first time counts. No method blocks but `close`.
    """

    ACTIVE = 60.0  # s after the last query in which connections are kept warm
    ROUND = 0.25  # s between looks at the connections while there are clients

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        trust: Trust,
        timer: Timer,
        *,
        complete: Callable[[Sequence[Answer], Endpoint], None],
        fail: Callable[[Sequence[Failure]], None],
        strategy: str = "fastest",
        clock: Callable[[], float] = elapsed,
        wall: Callable[[], float] = time.time,
        awake: Callable[[], float] = time.monotonic,
        binding: ProcessorBinding | None = None,
    ) -> None:
        self._trust = trust
        self._timer = timer
        self._complete, self._fail = complete, fail
        self._clock = clock
        # Guards all below, and of an exchange whatever is not `waiters` or `done`.
        self._lock = threading.Lock()
        self._fleet = Fleet(endpoints, strategy, self._new_connection)
        self._dispatcher = Dispatcher(self._fleet)
        self._active_at = 0.0
        self._watching = False  # the next look at the connections is planned
        self._sleep = SleepDetector(wall, awake)
        self._binding = binding or ProcessorBinding()
        self._sent = 0  # exchanges, since the last look
        self._ending: list[Connection] = []  # lost, but their threads may still run
        self._closed = False

    def start(self) -> None:
        """Open a connection to every upstream, before the first client asks."""
        with self._planning() as (plan, now):
            self._active_at = now
            self._watching = True
            for upstream in self._fleet.upstreams:
                self._fleet.dial(plan, upstream, now, urgent=True)
        self._watch()

    def send(self, exchanges: Sequence[Exchange], now: float) -> None:
        """Send new exchanges, to be answered by the deadline that they share."""
        with self._lock:
            plan = Plan()
            self._active_at = now
            self._sent += len(exchanges)
            if self._sleep.passed():
                self._fleet.flush(plan, now)
            patience = self._dispatcher.first(plan, exchanges, now)
            self._note_sends_locked(plan)
            watching, self._watching = self._watching, True
        self._carry_out(plan, now)
        self._check_at(min(now + patience, exchanges[0].deadline), exchanges)
        if not watching:
            self._look()

    def close(self) -> None:
        """Close all connections and wait for their threads."""
        with self._lock:
            self._closed = True
            connections = [*self._fleet.homes, *self._ending]
        for connection in connections:
            connection.close()
        for connection in connections:
            connection.join()

    def describe(self) -> list[str]:
        """Return a line for each upstream on how it does, for the log."""
        with self._lock:
            return [upstream.describe() for upstream in self._fleet.upstreams]

    def count_up(self) -> tuple[int, int]:
        """Return how many upstreams are not failing, and how many there are."""
        with self._lock:
            upstreams = self._fleet.upstreams
            failing = [u for u in upstreams if u.health.failing_since is not None]
            return len(upstreams) - len(failing), len(upstreams)

    def samples(self) -> list[Sample]:
        """Return the metrics of all upstreams."""
        with self._lock:
            return [s for each in self._fleet.upstreams for s in each.samples()]

    def standings(self) -> list[Standing]:
        """Return how each upstream does."""
        with self._lock:
            return [upstream.standing() for upstream in self._fleet.upstreams]

    def trouble(self) -> str:
        """Say why no upstream answers, or nothing where one does; never blocks.

        Where none does, the one who asks has them tried again when that is due: with no
        other client to do so, it would never be learned that the outage is over.
        """
        with self._planning() as (plan, now):
            upstreams = self._fleet.upstreams
            if any(upstream.up for upstream in upstreams):
                return ""
            for upstream in upstreams:
                self._fleet.dial(plan, upstream, now, urgent=False)
            return "; ".join(each.describe_trouble() for each in upstreams)

    def connection_opened(self, connection: Connection) -> None:
        """Give the new connection what waits for one."""
        facts = connection.facts()
        with self._planning() as (plan, now):
            upstream = self._fleet.homes[connection]
            upstream.note_opened(facts)
            reported, upstream.reported = upstream.reported, set()
            self._dispatcher.opened(plan, connection, now)
        logger.debug(
            "connected: upstream=%s tls=%s resumed=%s",
            *(connection.endpoint, facts.version, facts.resumed),
        )
        if reported:
            logger.info("upstream up: name=%s", connection.endpoint)

    def connection_answered(
        self, connection: Connection, answers: list[Answer], now: float
    ) -> None:
        """Complete what has a good answer; ask another upstream about the rest."""
        bad = [a for a in answers if a[1].rcode in FAILURE_RCODES]
        good = [a for a in answers if a not in bad] if bad else answers
        if good:
            self._complete(good, connection.endpoint)
        first = not connection.proved
        session = connection.session() if good and first else None
        with self._lock:
            upstream = self._fleet.homes[connection]
            if good:
                self._fleet.note_answers(connection, good)
            if session is not None:
                upstream.session = session
        if good:
            connection.proved = True
        if bad or first or connection.alone:
            self._review_answers(connection, answers, bad)

    def _review_answers(
        self, connection: Connection, answers: list[Answer], bad: list[Answer]
    ) -> None:
        """Do what only some answers ask for."""
        told = keepalive_told(answers[0][1]) if answers else None
        with self._planning() as (plan, now):
            if told is not None:
                self._fleet.homes[connection].idle.told = told or None
                connection.retired = connection.retired or not told
            if bad:
                self._dispatcher.refused(plan, connection, bad, now)
            if connection.alone and answers:  # else a misfit, which ends it in a moment
                plan.close(connection, "spare")

    def connection_lost(
        self, connection: Connection, error: UpstreamError, orphans: list[Exchange]
    ) -> None:
        """Learn from the loss, send again what it left, and open another."""
        logger.debug("disconnected: upstream=%s error=%s", connection.endpoint, error)
        with self._planning() as (plan, now):
            upstream = self._fleet.remove(connection)
            running = [each for each in self._ending if each.is_running]
            self._ending = [*running, connection]
            report = False
            if self._closed:
                return
            if connection.opened_at:
                upstream.note_loss(connection, error, orphans, now)
            elif error.cause != "ended":
                report = upstream.note_failure(error, connection.begun_at, now)
            replays = self._dispatcher.lost(plan, connection, error, orphans, now)
            upstream.counts["replays",] += replays
            # One that was closed at once would be again: leave it to the next look.
            lived = now - connection.opened_at >= self.ROUND
            if lived and now - self._active_at < self.ACTIVE:
                self._fleet.keep_warm(plan, now)
            retry_at = upstream.health.urgent_at
        if report:
            logger.warning("upstream down: name=%s error=%s", upstream.endpoint, error)
        if retry_at > now:
            self._timer.at(retry_at, self._retry)

    def connection_choked(self, connection: Connection) -> None:
        """Have the rest of its frames written in a moment."""
        self._timer.at(self._clock() + Timer.TICK, connection.resume)

    def _check_at(self, when: float, exchanges: Sequence[Exchange]) -> None:
        """Have those exchanges looked at that are not answered by then.

        The timer keeps none of them alive: with memory that is free to be used again as
        soon as a query is answered, each costs some 0.3 us less.
        """
        watched = [weakref.ref(exchange) for exchange in exchanges]
        self._timer.at(when, functools.partial(self._check, watched))

    def _check(self, watched: Sequence[weakref.ref[Exchange]]) -> None:
        """Look at exchanges that may be overdue; called by the timer."""
        known = [reference() for reference in watched]
        exchanges = [each for each in known if each is not None and not each.done]
        if not exchanges:
            return
        with self._planning() as (plan, now):
            exchanges, due = self._dispatcher.overdue(plan, exchanges, now)
        if exchanges:
            self._check_at(due, exchanges)

    def _watch(self) -> None:
        self._timer.at(self._clock() + self.ROUND, self._look)

    def _look(self) -> None:
        """Keep connections in order while clients are active; called by the timer."""
        with self._planning() as (plan, now):
            if self._sleep.passed():
                self._fleet.flush(plan, now)
            self._fleet.look(plan, now)
            active = now - self._active_at < self.ACTIVE and not self._closed
            if active:
                self._fleet.keep_warm(plan, now)
            self._dispatcher.review(plan, now)
            self._watching = active or len(self._fleet.homes) > 0
            watching = self._watching
            rate, self._sent = self._sent / self.ROUND, 0
        self._binding.update(self, rate)
        if watching and not self._closed:
            self._watch()

    def _retry(self) -> None:
        with self._planning() as (plan, now):
            self._dispatcher.review(plan, now)

    @contextlib.contextmanager
    def _planning(self) -> Iterator[tuple[Plan, float]]:
        """Hold the lock while a plan is made, then carry the plan out."""
        plan, now = Plan(), self._clock()
        with self._lock:
            yield plan, now
            self._note_sends_locked(plan)
        self._carry_out(plan, now)

    def _note_sends_locked(self, plan: Plan) -> None:
        for connection, exchanges in plan.sends.items():
            self._fleet.homes[connection].counts["requests",] += len(exchanges)

    def _carry_out(self, plan: Plan, now: float) -> None:
        for connection in [] if self._closed else plan.starts:
            try:
                connection.start()
            except RuntimeError as error:  # no more threads: as if it could not connect
                failure = UpstreamError("internal", str(error))
                self.connection_lost(connection, failure, [])
        for connection, exchanges in plan.sends.items():
            if not connection.send(exchanges, now):  # it closed in the meantime
                with self._planning() as (again, _):
                    self._dispatcher.unsent(again, exchanges, now)
        for connection in plan.closes:
            connection.close()
        if plan.failed:
            self._fail(plan.failed)

    def _new_connection(self, upstream: Upstream, alone: Exchange | None) -> Connection:
        return Connection(
            upstream.endpoint,
            self._trust,
            self,
            label=upstream.label(),
            patience=upstream.patience(),
            session=upstream.session,
            clock=self._clock,
        )


# ---- Proxy ---------------------------------------------------------------------------
# From a question to its answer, whatever the transport.


def failure_response(error: UpstreamError) -> Response:
    """Make a SERVFAIL response with an Extended DNS Error that says why (RFC 8914)."""
    return error_response(Rcode.SERVFAIL, build_option(error.info, str(error)))


def greediest(
    exchanges: Iterable[Exchange], number: int
) -> list[tuple[Exchange, Waiter]]:
    """Return so many of those who wait: of the busiest client first, the oldest first.

    `exchanges` are in order of age.
    """
    everybody = [
        (exchange, waiter) for exchange in exchanges for waiter in exchange.waiters
    ]
    clients = collections.Counter(waiter[0].client[0] for _, waiter in everybody)
    everybody.sort(key=lambda entry: -clients[entry[1][0].client[0]])
    return everybody[:number]


# Takes a message, the time and a tally; see Shelf.lookup.
Lookup = Callable[[bytes, float, "list[Label]"], "bytes | Query | None"]
# An answer without its ID, the entry that it is from, and what is counted.
Ready = tuple[bytes, CacheEntry, Label]
Hot = dict[bytes, "tuple[float, Ready]"]  # until when, by datagram without its ID


class Shelf:
    """Gives the answers that can be had from the cache or without asking, at once.

    Any thread may call any method: none blocks or does I/O. `refresh` is called by the
    timer for a query whose answer should be asked for again.
    """

    MAX_HOT = 4096  # answers kept ready byte for byte, of IPv4 and IPv6, 2 MiB each
    MAX_HOT_SIZE = 2048  # octets of their whole message, which stays alive with them
    MAX_HOT_QUERY = 512  # octets of a datagram, by which they are kept; most have 60

    def __init__(
        self,
        cache: Cache,
        local: LocalAnswers,
        timer: Timer,
        refresh: Callable[[Query], None],
    ) -> None:
        self._cache = cache
        self._local = local
        self._timer = timer
        self._refresh = refresh
        # No lock: single operations of a dict are atomic on every build.
        self._hot: dict[Transport, Hot] = {("udp", family): {} for family in "12"}

    def lookup_from(self, transport: Transport) -> Lookup:
        """Return the lookup for datagrams that come so."""
        hot, look_up = self._hot[transport], self.lookup

        def lookup(
            message: bytes, now: float, tally: list[Label]
        ) -> bytes | Query | None:
            # Most queries repeat byte for byte, but for the ID. No entry here outlives
            # a second of its TTL.
            found = hot.get(message[2:])
            if found is not None and now < found[0]:
                answer, entry, label = found[1]
                entry.hits += 1
                tally.append(label)
                return message[:2] + answer
            return look_up(message, now, tally, transport)

        return lookup

    def lookup(
        self, message: bytes, now: float, tally: list[Label], transport: Transport
    ) -> bytes | Query | None:
        """Return the answer to a message, or the query that has to be resolved.

        None for what deserves no answer. Never blocks, does no I/O, never raises: the
        receiving thread may call it. What is answered is added to `tally`.
        """
        if not answerable(message):
            return None
        try:
            query = parse_query(message, transport)
        except FormatError as error:
            answer = build_format_error(message, error.rcode)
            sizes = len(message), len(answer)
            tally.append((LOCAL, formless(transport), b"", error.rcode, *sizes))
            return answer
        form = query.form
        if form.refusal:
            refusal = error_response(form.refusal)
            return self._answer_locally(query, refusal, tally)
        entry = self._cache.get(query.cache_key, now) if form.cachable else None
        if entry is None:
            response = self._local.respond(query)
            return self._answer_locally(query, response, tally) if response else query
        if now >= entry.expires:
            return self._look_up_stale(query, entry, now, tally)
        popular = entry.hits >= Cache.POPULAR and form.flags & RD
        wanted = popular and not entry.retry_at and not entry.failed
        if wanted and now >= entry.prefetch_at:
            entry.retry_at = entry.expires
            self._timer.at(now, functools.partial(self._refresh, query))
        answer = self._cache.answer(entry, query, now)
        label = label_answer(query, CACHE, answer[3] & RCODE_MASK, len(answer))
        tally.append(label)
        if transport[0] == "udp":
            ready = answer[2:], entry, one_label(label)
            self._keep_hot(self._hot[transport], message[2:], ready, now)
        return answer

    def flush(self) -> None:
        """Forget every cached answer."""
        number = self._cache.flush()
        for answers in self._hot.values():
            answers.clear()
        logger.info("cache flushed: entries=%d", number)

    @staticmethod
    def _answer_locally(query: Query, response: Response, tally: list[Label]) -> bytes:
        answer = build_answer(query, response)
        tally.append(label_answer(query, LOCAL, response.rcode, len(answer)))
        return answer

    def _look_up_stale(
        self, query: Query, entry: CacheEntry, now: float, tally: list[Label]
    ) -> bytes | Query:
        """Answer at once where that failed before, else have it asked for again."""
        if not query.form.storable:  # RFC 8767 section 4: never with RD=0
            return query
        if entry.retry_at <= entry.expires:
            query.stale = entry
            return query
        if now >= entry.retry_at:
            entry.retry_at = now + Cache.STALE_RETRY
            self._timer.at(now, functools.partial(self._refresh, query))
        answer = self._cache.stale_answer(entry, query)
        tally.append(label_answer(query, STALE, answer[3] & RCODE_MASK, len(answer)))
        return answer

    def _keep_hot(self, hot: Hot, message: bytes, ready: Ready, now: float) -> None:
        """Keep an answer ready until one of its TTLs changes or it may be refreshed."""
        entry = ready[1]
        large = len(entry.message) > self.MAX_HOT_SIZE
        if large or len(message) > self.MAX_HOT_QUERY:
            return
        until = entry.stored_at + int(now - entry.stored_at) + 1
        if now < entry.prefetch_at:
            until = min(until, entry.prefetch_at)
        elif not entry.retry_at:
            return  # the next hit may make it popular
        if len(hot) >= self.MAX_HOT:
            hot.clear()
        hot[message] = min(until, entry.expires), ready


def begins_label(name: bytes, offset: int) -> bool:
    """Tell whether a label of this name in wire format, or its end, is at `offset`."""
    start = 0
    while start < offset:
        start += name[start] + 1
    return start == offset


class Routes:
    """Which upstreams a name is asked of: a group for each routed domain and the rest.

    A name at or below a routed domain goes to that domain's upstreams alone, in working
    order or not: it must never be seen by the others. The longest domain counts.
    Nothing changes after construction; any thread may call any method, only `close`
    blocks.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        routes: Iterable[Route],
        build: Callable[[Sequence[Endpoint]], UpstreamGroup],
    ) -> None:
        """Prepare the groups; `build` makes one of the endpoints that it is given."""
        servers: dict[str, list[Endpoint]] = {}
        for domain, endpoint in routes:
            servers.setdefault(domain, []).append(endpoint)
        self._default = build(endpoints)
        self._groups = {domain: build(found) for domain, found in servers.items()}
        self._by_name = {encode_domain(d): group for d, group in self._groups.items()}
        self._lengths = sorted({len(name) for name in self._by_name}, reverse=True)
        self._plain = {
            self._groups[domain]
            for domain, found in servers.items()
            if not all(endpoint.name for endpoint in found)
        }
        # Where nothing is routed it costs nothing.
        self.send = self._send_by_name if servers else self._default.send

    def start(self) -> None:
        """Connect to all upstreams; returns at once."""
        for group in (self._default, *self._groups.values()):
            group.start()

    def close(self) -> None:
        """Close all connections and wait for their threads."""
        for group in (self._default, *self._groups.values()):
            group.close()

    def describe(self) -> list[str]:
        """Return a line for each upstream on how it does, for the log."""
        routed = [
            f"{line} domain={domain}"
            for domain, group in self._groups.items()
            for line in group.describe()
        ]
        return self._default.describe() + routed

    def count_up(self) -> tuple[int, int]:
        """Return how many upstreams are not failing, and how many there are."""
        groups = self._default, *self._groups.values()
        up, known = zip(*(group.count_up() for group in groups))
        return sum(up), sum(known)

    def samples(self) -> Iterator[Sample]:
        """Return the metrics of all upstreams, each once."""
        found: dict[tuple[str, tuple[str, ...]], Sample] = {}
        for group in (*self._groups.values(), self._default):
            found.update(((s[0], s[1]), s) for s in group.samples())
        yield from found.values()

    def standings(self) -> list[Standing]:
        """Return how each upstream does."""
        routed = [
            standing._replace(domain=domain)
            for domain, group in self._groups.items()
            for standing in group.standings()
        ]
        return self._default.standings() + routed

    def trouble(self) -> str:
        """Say why none of the upstreams answers that most names are asked of."""
        return self._default.trouble()

    def _send_by_name(self, exchanges: Sequence[Exchange], now: float) -> None:
        """Send new exchanges, each to the upstreams of its name."""
        rest: list[Exchange] = []
        routed: dict[UpstreamGroup, list[Exchange]] = {}
        for exchange in exchanges:
            group = self._find(exchange.query)
            if group is None:
                rest.append(exchange)
                continue
            if group in self._plain:
                exchange.wire = build_upstream_query(exchange.query, padded=False)
            routed.setdefault(group, []).append(exchange)
        for group, share in routed.items():
            group.send(share, now)
        if rest:
            self._default.send(rest, now)

    def _find(self, query: Query) -> UpstreamGroup | None:
        """Return the group of the longest routed domain that the name is in."""
        end = len(query.question) - 4
        name = query.key[:end]  # in lower case
        for length in self._lengths:
            group = self._by_name.get(name[-length:])
            if group is not None and begins_label(name, end - length):
                return group
        return None


class Witness:
    """Tells the observer and the query log, where there is one, of answers given.

    Any thread may call any method; none blocks.
    """

    def __init__(
        self, observer: Observer | None = None, query_log: QueryLog | None = None
    ) -> None:
        self.observer = observer or Observer()
        self.query_log = query_log

    def at_once(
        self,
        tally: list[Label],
        given: Sequence[Given],
        times: tuple[float, float],
    ) -> None:
        """Tell the observer and the query log of answers that nobody had to wait for.

        `given` is for the query log: what each label of `tally` stands for. `times`:
        when the queries came, and the seconds that their answers took.
        """
        self.observer.answered_at_once(tally, times[1])
        if self.query_log is not None:
            octets = sum([len(asked) + len(answer) for asked, answer, _ in given])
            batch = AnsweredAtOnce(given, tally, times)
            self.query_log.put(batch, len(given), octets)

    def turned_away(self, reason: str, number: int = 1) -> None:
        """Tell the observer of queries or connections turned away."""
        self.observer.turned_away(reason, number)

    def later(self, answers: Sequence[Answered], origin: Origin, now: float) -> None:
        """Tell the observer and the query log of queries that had to wait."""
        self.observer.answered(answers, origin, now)
        if self.query_log is not None:
            octets = sum([len(answer) for _, answer, _ in answers])
            batch = AnsweredLater(answers, origin, now)
            self.query_log.put(batch, len(answers), octets)


# Who gets an answer, and what it is made from.
Finished = tuple["Sequence[Waiter]", "Response | CacheEntry"]


class Proxy:
    """Has a question asked once for everyone who waits, where the cache cannot help."""

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        trust: Trust,
        timer: Timer,
        cache: Cache,
        *,
        timeout: float = 4.0,
        max_in_flight: int = 10_000,
        strategy: str = "fastest",
        routes: Iterable[Route] = (),
        local: LocalAnswers | None = None,
        guard: RebindingGuard | None = None,
        metrics: Witness | None = None,
        clock: Callable[[], float] = elapsed,
    ) -> None:
        """Prepare a proxy; `timeout`: seconds after which a query gets SERVFAIL."""
        self.metrics = metrics or Witness()
        self._timer, self._clock = timer, clock
        self._cache, self._guard = cache, guard
        self._timeout = timeout
        self._max_in_flight = max_in_flight
        shelf = Shelf(cache, local or LocalAnswers(), timer, self._refresh)
        self.lookup, self.flush = shelf.lookup, shelf.flush
        self.lookup_from = shelf.lookup_from
        build = functools.partial(
            UpstreamGroup,
            trust=trust,
            timer=timer,
            complete=self.complete,
            fail=self.fail,
            strategy=strategy,
            clock=clock,
            binding=ProcessorBinding(),
        )
        self._upstreams = Routes(endpoints, routes, build)
        # Guards _exchanges, _count, _idle, _refreshes, and the waiters of exchanges.
        self._lock = threading.Lock()
        self._exchanges: dict[bytes, Exchange] = {}
        self._count = 0  # clients' queries in flight
        self._refreshes = 0  # exchanges that nobody waited for, since the start
        self._idle = threading.Condition(self._lock)  # told when _count falls to 0

    def start(self) -> None:
        """Connect to the upstreams; returns at once."""
        self._upstreams.start()

    @property
    def in_flight(self) -> int:
        """Return how many clients' queries wait for an answer: a snapshot."""
        return self._count

    def describe(self) -> list[str]:
        """Return lines that tell the state of the proxy, for the log."""
        cache = f"cache_entries={len(self._cache)} cache_bytes={self._cache.size}"
        return [f"in_flight={self._count} {cache}", *self._upstreams.describe()]

    def status(self) -> str:
        """Return a line that tells people how it does."""
        up, known = self._upstreams.count_up()
        cached = len(self._cache)
        work = f"{self._count} queries in flight, {cached} answers cached"
        return f"{up} of {known} upstreams up, {work}"

    def samples(self) -> Iterator[Sample]:
        """Return the metrics of the proxy, its cache and its upstreams."""
        yield "dotproxy_queries_in_flight", (), self._count
        yield "dotproxy_cache_prefetch_total", (), self._refreshes
        yield from self._cache.samples()
        yield from self._upstreams.samples()

    def standings(self) -> list[Standing]:
        """Return how each upstream does."""
        return self._upstreams.standings()

    def trouble(self) -> str:
        """Say why queries cannot be answered now, or nothing where they can."""
        trouble = self._upstreams.trouble()
        if not trouble or self._cache.can_serve(self._clock()):
            return ""
        return f"no upstream answers, and the cache has nothing: {trouble}"

    def drain(self, seconds: float) -> bool:
        """Wait until every query is answered, at most so long; this one blocks."""
        with self._lock:
            return self._idle.wait_for(lambda: not self._count, seconds)

    def close(self) -> None:
        """Close the upstream connections."""
        self._upstreams.close()

    def resolve(self, queries: Sequence[Waiter]) -> None:
        """Have each query answered through its `reply`, exactly once; never blocks."""
        now = self._clock()
        deadline = now + self._timeout
        fresh: list[Exchange] = []
        aging: list[Exchange] = []  # those whose clients get a stale answer in time
        with self._lock:
            exchanges = self._exchanges
            for waiter in queries:
                query = waiter[0]
                exchange = exchanges.get(query.key)
                if exchange is None:
                    exchange = exchanges[query.key] = Exchange(query, now, deadline)
                    fresh.append(exchange)
                    if query.stale is not None:
                        aging.append(exchange)
                elif query.stale is not None and exchange.query.stale is None:
                    exchange.query.stale = query.stale  # it was a refresh until now
                    aging.append(exchange)
                exchange.waiters.append(waiter)
            self._count += len(queries)
            shed = self._shed_locked() if self._count > self._max_in_flight else []
        if shed:
            error = UpstreamError("overload", "too many queries in flight")
            self._answer([(shed, failure_response(error))], (LOCAL, None), now)
            self.metrics.turned_away("overload", len(shed))
        for exchange in aging:
            serve = functools.partial(self._serve_stale, exchange)
            self._timer.at(now + Cache.STALE_AFTER, serve)
        if not self._cache.lacks([exchange.query.cache_key for exchange in fresh]):
            fresh = [each for each in fresh if not self._answered_late(each, now)]
        if fresh:
            self._upstreams.send(fresh, now)

    def complete(self, answers: Sequence[Answer], upstream: Endpoint) -> None:
        """Give everyone who waits for these exchanges the answer of an upstream."""
        now = self._clock()
        exchanges: list[Exchange] = []
        items: list[tuple[bytes, Response]] = []
        for exchange, response, _ in answers:
            if exchange.done:
                continue
            query = exchange.query
            if self._guard is not None:
                response = self._guard.screen(query, response)
            exchanges.append(exchange)
            items.append((query.key if query.form.storable else b"", response))
        # Into the cache first: who finds no exchange to join finds the answer there.
        responses = self._cache.put_all(items, now)
        finished: list[Finished] = []
        with self._lock:
            for exchange, response in zip(exchanges, responses):
                if not exchange.done:
                    finished.append((self._finish_locked(exchange), response))
            self._tell_if_idle_locked()
        self._answer(finished, (UPSTREAM, upstream), now)

    def fail(self, failures: Sequence[Failure]) -> None:
        """Give everyone who waits for these exchanges what there is without an answer.

        A stale one, or one that says why there is none.
        """
        now = self._clock()
        results = [
            (exchange, *self._make_do(exchange, failure, now))
            for exchange, failure in failures
            if not exchange.done
        ]
        finished: dict[str, list[Finished]] = {}  # by source
        found: Response | CacheEntry
        with self._lock:
            for exchange, found, source in results:
                if exchange.done:
                    continue
                waiters, stale = self._finish_locked(exchange), exchange.query.stale
                if stale is not None:
                    stale.retry_at = now + Cache.STALE_RETRY
                    found, source = stale, STALE
                finished.setdefault(source, []).append((waiters, found))
            self._tell_if_idle_locked()
        for source, share in finished.items():
            self._answer(share, (source, None), now)

    def _make_do(
        self, exchange: Exchange, failure: Response | UpstreamError, now: float
    ) -> tuple[Response, str]:
        """Return what to answer where nothing better is known, and its source."""
        query = exchange.query
        if isinstance(failure, Response):
            found, source, dear = failure, UPSTREAM, True
        else:
            found, source = failure_response(failure), LOCAL
            dear = failure.cause == "timeout"
        # Failures of the upstream and time-outs are dear; others happen at once again.
        if dear and exchange.copies and query.form.storable:
            found = self._cache.put(query.key, found, now)
        return found, source

    def _answered_late(self, exchange: Exchange, now: float) -> bool:
        """Answer a new exchange from the cache if it can since the lookup missed."""
        entry = self._cache.get(exchange.query.cache_key, now)
        if entry is None or now >= entry.expires:
            return False
        with self._lock:
            waiters = [] if exchange.done else self._finish_locked(exchange)
            self._tell_if_idle_locked()
        self._answer([(waiters, entry)], (CACHE, None), now)
        return True

    def _answer(self, finished: Sequence[Finished], origin: Origin, now: float) -> None:
        """Answer everyone who waits, and tell the witness."""
        answered: list[Answered] = []
        for waiters, found in finished:
            for query, reply in waiters:
                if isinstance(found, Response):
                    message, rcode = build_answer(query, found), found.rcode
                else:
                    message = self._answer_cached(query, found, origin[0], now)
                    rcode = message[3] & RCODE_MASK
                reply(message, query.client)
                answered.append((query, message, rcode))
        if answered:
            self.metrics.later(answered, origin, now)

    def _answer_cached(
        self, query: Query, entry: CacheEntry, source: str, now: float
    ) -> bytes:
        if source == STALE:
            return self._cache.stale_answer(entry, query)
        return self._cache.answer(entry, query, now)

    def _finish_locked(self, exchange: Exchange) -> Sequence[Waiter]:
        """Take an exchange out of those in flight; return who waits for it.

        A connection may keep it for long, but not those who waited, nor their servers.
        """
        exchange.done = True
        del self._exchanges[exchange.query.key]
        waiters, exchange.waiters = exchange.waiters, []
        self._count -= len(waiters)
        return waiters

    def _tell_if_idle_locked(self) -> None:
        if not self._count:
            self._idle.notify_all()

    def _serve_stale(self, exchange: Exchange) -> None:
        """Answer from the stale entry who has waited long enough; ask on regardless."""
        with self._lock:
            waiters, exchange.waiters = exchange.waiters, []
            self._count -= len(waiters)
            self._tell_if_idle_locked()
        entry, now = exchange.query.stale, self._clock()
        if waiters and entry is not None:
            entry.retry_at = now + Cache.STALE_RETRY
            self._answer([(waiters, entry)], (STALE, None), now)

    def _refresh(self, query: Query) -> None:
        """Ask for a cached answer again, with nobody waiting."""
        now = self._clock()
        with self._lock:
            if query.key in self._exchanges or self._count >= self._max_in_flight:
                return
            exchange = Exchange(query, now, now + self._timeout)
            self._exchanges[query.key] = exchange
            self._refreshes += 1
        self._upstreams.send([exchange], now)

    def _shed_locked(self) -> list[Waiter]:
        """Take out the oldest queries of the clients with the most in flight.

        Several at a time, so that looking through all of them costs each little.
        """
        number = self._count - self._max_in_flight + self._max_in_flight // 100
        shed = greediest(self._exchanges.values(), number)
        for exchange, waiter in shed:
            exchange.waiters.remove(waiter)
            if not exchange.waiters:
                exchange.done = True
                del self._exchanges[exchange.query.key]
        self._count -= len(shed)
        return [waiter for _, waiter in shed]


# ---- Admission (RFC 5358) ------------------------------------------------------------
# Who may ask, and how often. It knows addresses and time, nothing of messages: servers
# ask it, and turn away whom it tells them to.

def parse_client(host: str) -> IPAddress:
    """Parse the address of a client, which is IPv4 where IPv6 only carries that."""
    address = ipaddress.ip_address(host)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


class AccessList:
    """Networks; immutable."""

    def __init__(self, networks: Sequence[Network]) -> None:
        self._networks = tuple(networks)

    def __contains__(self, address: IPAddress) -> bool:
        return any(address in network for network in self._networks)


LOCAL_ADDRESSES = AccessList(LOCAL_NETWORKS)


def is_open(network: Network) -> bool:
    """Tell whether a network has far more of the Internet than anybody's own."""
    ends = network.network_address, network.broadcast_address
    wide = network.prefixlen < (8 if network.version == 4 else 16)
    return wide and not all(end in LOCAL_ADDRESSES for end in ends)


class Bucket:
    """Tokens of one prefix: full at a time that each token taken puts off."""

    __slots__ = ("full_at", "refused")

    def __init__(self) -> None:
        self.full_at = -math.inf
        self.refused = 0  # times in all


class RateLimiter:
    """Token buckets by prefix, in bounded memory; any thread may ask."""

    MAX_PREFIXES = 100_000  # about 30 MB; the longest unused is forgotten first

    def __init__(self, rate: float, burst: float) -> None:
        """Make buckets of `burst` tokens that get `rate` tokens a second."""
        self._interval = 1 / rate  # s per token
        self._reserve = (burst - 0.5) / rate  # s; half a token makes up for rounding
        self._lock = threading.Lock()  # guards _buckets and what is in them
        self._buckets: collections.OrderedDict[bytes, Bucket]
        self._buckets = collections.OrderedDict()

    def refusals(self, prefix: bytes, now: float) -> int:
        """Take a token: return 0, or how often there was none for this prefix."""
        with self._lock:
            bucket = self._find_locked(prefix, now)
            if bucket.full_at - now <= self._reserve:
                bucket.full_at += self._interval
                return 0
            bucket.refused += 1
            return bucket.refused

    def take(self, prefix: bytes, count: int, now: float) -> tuple[int, float]:
        """Take up to so many tokens, one at least; tell when the next is due.

        One may be owed: so each who waits for the next has a time of its own, in turn.
        """
        with self._lock:
            bucket = self._find_locked(prefix, now)
            left = (self._reserve - bucket.full_at + now) // self._interval + 1
            taken = min(count, max(1, int(left)))
            bucket.full_at += taken * self._interval
            return taken, bucket.full_at - self._reserve

    def _find_locked(self, prefix: bytes, now: float) -> Bucket:
        buckets = self._buckets
        bucket = buckets.get(prefix)
        if bucket is None:
            bucket = buckets[prefix] = Bucket()
            if len(buckets) > self.MAX_PREFIXES:
                buckets.popitem(last=False)
        else:
            buckets.move_to_end(prefix)
        bucket.full_at = max(bucket.full_at, now)
        return bucket


class Verdict(enum.Enum):
    """What becomes of a query; all but the first turn it away."""

    ALLOW = "allow"
    REFUSE = "refuse"  # a stranger's, answered
    IGNORE = "ignore"  # a stranger's, where enough were answered
    TRUNCATE = "truncate"  # over the rate: to be asked again over TCP
    DROP = "drop"  # over the rate


REASONS = {  # of TURNED_AWAY
    **{Verdict.REFUSE: "acl", Verdict.IGNORE: "acl"},
    **{Verdict.TRUNCATE: "slip", Verdict.DROP: "rate-limit"},
}


class Admission:
    """Tells the servers who may ask, and how often; any thread may ask it.

    Streams have buckets of their own, which no forged datagram can empty: a client that
    was told to come over TCP is served there whatever is sent in its name.
    """

    BURST = 2.0  # s of asking at the rate that may come at once
    REFUSALS = 10.0, 20.0  # answers/s to strangers, all together, and at once
    MAX_KNOWN = 10_000  # client addresses to remember, about 2 MB
    PREFIX = 7  # octets: /56, what an IPv6 customer has; an IPv4 address is shorter

    def __init__(
        self,
        allow: Sequence[Network] = LOCAL_NETWORKS,
        *,
        rate: float = RATE_LIMIT,
        limit_all: bool = False,
    ) -> None:
        """Admit clients in `allow`; `rate`: queries/s of a prefix, 0 for any."""
        self.free: set[str] = set()  # clients known to be allowed and not limited
        self._allowed = AccessList(allow)
        self._unlimited = AccessList(()) if limit_all else LOCAL_ADDRESSES
        self._rate = rate
        self._refusals = RateLimiter(*self.REFUSALS)
        self._datagrams = RateLimiter(rate or 1, (rate or 1) * self.BURST)
        self._streams = RateLimiter(rate or 1, (rate or 1) * self.BURST)
        # 0.1 us where an address is known, 6 us where it is not.
        self._prefix_of = functools.lru_cache(self.MAX_KNOWN)(self._find_prefix)

    def admits(self, host: str) -> bool:
        """Tell whether this client may ask at all."""
        return self._prefix_of(host) is not None

    def verdict(self, host: str, now: float) -> Verdict:
        """Decide on a datagram from this client."""
        prefix = self._prefix_of(host)
        if prefix is None:
            spent = self._refusals.refusals(b"", now)
            return Verdict.IGNORE if spent else Verdict.REFUSE
        if not prefix:
            if len(self.free) >= self.MAX_KNOWN:
                self.free.clear()
            self.free.add(host)
            return Verdict.ALLOW
        refusals = self._datagrams.refusals(prefix, now)
        if not refusals:
            return Verdict.ALLOW
        return Verdict.TRUNCATE if refusals % 2 else Verdict.DROP

    def pace(self, host: str, count: int, now: float) -> tuple[int, float]:
        """Tell how many of a stream's queries to serve now, and when the next."""
        prefix = self._prefix_of(host)
        return self._streams.take(prefix, count, now) if prefix else (count, now)

    def _find_prefix(self, host: str) -> bytes | None:
        """Return whose rate counts: empty for nobody's, None for a stranger."""
        address = parse_client(host)
        if address not in self._allowed:
            return None
        if not self._rate or address in self._unlimited:
            return b""
        return address.packed[: self.PREFIX]


# ---- Servers (RFC 1035 section 4.2, RFC 7766, RFC 9210) ------------------------------
# From sockets to the Proxy and back. They know sizes, addresses and time-outs, nothing
# of names.

Datagram = tuple[bytes, Address]
Way = Sequence["tuple[int, int, bytes]"]  # back to a client: from which address
Batch = tuple["list[Datagram]", "list[Way]"]  # ways only from a wildcard socket

# Constants that some Python versions lack, with the kernel's number.
IP_PKTINFO = getattr(socket, "IP_PKTINFO", 26 if sys.platform == "darwin" else 8)
IPV6_RECVPKTINFO = getattr(
    socket, "IPV6_RECVPKTINFO", 61 if sys.platform == "darwin" else 49
)
IPV6_PKTINFO = getattr(socket, "IPV6_PKTINFO", 46 if sys.platform == "darwin" else 50)
SO_RCVBUFFORCE = 33  # Linux: beyond net.core.rmem_max, where privileged


def reply_from(data: bytes) -> bytes:
    """Turn the packet information of a query into that of its answer.

    The source address is the one that was asked; the kernel picks the interface, but
    for link-local addresses, which mean nothing without theirs.
    """
    if len(data) == 12:  # in_pktinfo: interface, local address, destination
        local = data[4:8] if any(data[4:8]) else data[8:]  # macOS fills in the latter
        return bytes(4) + local + bytes(4)
    link_local = data[:2] in (b"\xfe\x80", b"\xfe\x90", b"\xfe\xa0", b"\xfe\xb0")
    return data if link_local else data[:16] + bytes(4)


def set_v6_only(listener: socket.socket) -> None:
    """Leave the IPv4 wildcard free for another socket."""
    if listener.family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)


def accept(listener: socket.socket) -> tuple[socket.socket, Address]:
    """Accept a client; raises OSError where there is none, or it has gone again."""
    request, address = listener.accept()
    if not address:  # so macOS gives one that was reset before
        request.close()
        raise ConnectionAbortedError(errno.ECONNABORTED, "reset by the client")
    return request, address


def adopt(server: socketserver.TCPServer, listener: socket.socket) -> None:
    """Have a server use a socket that is bound already, as systemd passes them."""
    server.socket.close()
    server.socket = listener
    listener.setblocking(False)
    server.server_address = listener.getsockname()


class UDPHandler(socketserver.BaseRequestHandler):
    """Handles a batch of datagrams, in a worker thread but for a lone one."""

    server: UDPServer
    request: list[Waiter]

    def handle(self) -> None:
        """Have what the cache did not answer resolved."""
        self.server.proxy.resolve(self.request)


class UDPServer(socketserver.ThreadingUDPServer):
    """Receives datagrams, a batch per wake-up; one request is one batch."""

    BATCH = 64  # datagrams; more gain nothing and make the first ones wait
    RECEIVE_BUFFER = 4 << 20  # octets: a burst of some thousand queries is not lost
    proto = "udp"
    max_packet_size = 4096  # a query is far smaller; recvfrom allocates this each time
    daemon_threads = True
    PROHIBITED = tuple(
        build_option(ExtendedError.PROHIBITED, text)
        for text in ("this resolver does not serve your address", "")
    )

    def __init__(
        self,
        address: Address,
        proxy: Proxy,
        pool: WorkerPool,
        *,
        admission: Admission,
        clock: Callable[[], float] = elapsed,
        inherited: socket.socket | None = None,
    ) -> None:
        """Bind the address, or use an inherited socket that is bound to it."""
        self.proxy = proxy
        self.admission = admission
        self.clock = clock
        self.turned_at = time.monotonic()  # when its loop last came round, awake
        self._pool = pool
        self._inherited = inherited
        host = ipaddress.ip_address(address[0])
        self.address_family = socket.AF_INET6 if host.version == 6 else socket.AF_INET
        self._lookup = proxy.lookup_from(("udp", "2" if host.version == 6 else "1"))
        self._wildcard = host.is_unspecified
        super().__init__(address, UDPHandler)

    def server_bind(self) -> None:
        """Set the socket up and bind it."""
        if self._inherited is not None:
            adopt(self, self._inherited)
        else:
            set_v6_only(self.socket)
            self.socket.setblocking(False)
            super().server_bind()
        try:
            self.socket.setsockopt(
                socket.SOL_SOCKET, SO_RCVBUFFORCE, self.RECEIVE_BUFFER
            )
        except OSError:
            with contextlib.suppress(OSError):
                buffer = self.RECEIVE_BUFFER
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        if self._wildcard and self.address_family == socket.AF_INET:
            self.socket.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
        elif self._wildcard:
            self.socket.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVPKTINFO, 1)

    def service_actions(self) -> None:
        """Note that the loop turns: socketserver calls this twice a second or more."""
        self.turned_at = time.monotonic()

    def get_request(self) -> tuple[Batch, Address]:  # type: ignore[override]
        """Drain the socket: return a batch of datagrams as one request."""
        batch: list[Datagram] = []
        ways: list[Way] = []
        receive, size = self.socket.recvfrom, self.max_packet_size
        try:  # contextlib.suppress takes 1.5 us more
            for _ in range(self.BATCH):
                if self._wildcard:
                    message, way, address = self._receive_with_way()
                    batch.append((message, address))
                    ways.append(way)
                else:
                    batch.append(receive(size))
        except BlockingIOError:
            pass
        return (batch, ways), ("", 0)

    def verify_request(self, request: object, client_address: object) -> bool:
        """Tell whether there is anything in the batch."""
        return request != ([], [])

    def process_request(  # type: ignore[override]
        self, request: Batch, client_address: Address
    ) -> None:
        """Answer what the cache can; turn away, hand to a worker, or drop the rest."""
        now, proxy, free = self.clock(), self.proxy, self.admission.free
        lookup, respond = self._lookup, self.reply
        misses: list[Waiter] = []
        tally: list[Label] = []
        logged = proxy.metrics.query_log is not None
        given: list[Given] = []
        batch, ways = request
        for (message, address), way in zip(batch, ways or itertools.repeat(())):
            if address[0] not in free and not self._admit(message, address, way, now):
                continue
            found = lookup(message, now, tally)
            if isinstance(found, bytes):
                respond(found, address, way)
                if logged:
                    given.append((message, found, address))
            elif found is not None:
                found.client = address
                found.received = now
                reply = functools.partial(respond, way=way) if way else respond
                misses.append((found, reply))
        if misses:
            self._hand_on(misses, client_address)
        if tally:
            proxy.metrics.at_once(tally, given, (now, self.clock() - now))

    def handle_error(self, request: object, client_address: object) -> None:
        """Log an error of ours."""
        logger.exception("internal error: server=udp")

    def reply(self, message: bytes, address: Address, way: Way = ()) -> None:
        """Send a response from the address that was asked; any thread, never blocks."""
        try:
            if way:
                self.socket.sendmsg([message], way, 0, address)
            else:
                self.socket.sendto(message, address)
        except OSError as error:  # no room, or the client is gone: it will ask again
            logger.debug("answer dropped: client=%s error=%s", address[0], error)

    def _admit(self, message: bytes, address: Address, way: Way, now: float) -> bool:
        """Tell whether to serve a query; one that is not is turned away.

        Then it is answered in fewer octets than it has, or not at all.
        """
        if not answerable(message):
            return False
        verdict = self.admission.verdict(address[0], now)
        if verdict is Verdict.ALLOW:
            return True
        logger.debug("turned away: client=%s verdict=%s", address[0], verdict.value)
        self.proxy.metrics.turned_away(REASONS[verdict])
        if verdict is Verdict.REFUSE:
            short = build_short_answer(message, Rcode.REFUSED, options=self.PROHIBITED)
            self.reply(short, address, way)
        elif verdict is Verdict.TRUNCATE:
            short = build_short_answer(message, Rcode.NOERROR, flags=TC)
            self.reply(short, address, way)
        return False

    def _hand_on(self, misses: list[Waiter], client_address: Address) -> None:
        """Have a worker resolve these; a lone one here: waking a worker takes longer.

        At 200 queries/s it is answered 0.1 ms sooner so, for 10 % less CPU.
        """
        handle: Callable[..., None] = self.finish_request
        finish = functools.partial(handle, misses, client_address)
        if len(misses) == 1:
            finish()
        elif not self._pool.submit(finish):
            self.proxy.metrics.turned_away("backlog", len(misses))

    def _receive_with_way(self) -> tuple[bytes, Way, Address]:
        message, ancillary, _, address = self.socket.recvmsg(self.max_packet_size, 128)
        way = [
            (level, kind, reply_from(data))
            for level, kind, data in ancillary
            if kind in (IP_PKTINFO, IPV6_PKTINFO)
        ]
        return message, way, address


class StreamHandler(socketserver.BaseRequestHandler):
    """Serves one TCP client: many queries in flight, answered as answers come.

    Its own thread reads; whichever thread has an answer writes as much as the kernel
    takes, and leaves the rest to the reading thread.
    """

    MAX_IN_FLIGHT = 256  # queries; then it is not read until some are answered
    MAX_UNSENT = 1 << 18  # octets that a client may leave unread, beside the kernel's
    STALL = 5.0  # s for which it may take nothing
    READ_SIZE = 16384
    MOMENT = 0.1  # s between looks while answers are awaited or octets are unsent

    server: TCPServer
    request: socket.socket

    def setup(self) -> None:
        """Prepare; the socket must not block whoever sends an answer."""
        self.request.setblocking(False)
        with contextlib.suppress(OSError):  # it may be gone already
            self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.active_at = self.server.clock()  # when its last query was taken up
        self._waiting: list[bytes] = []  # queries read, to be served later
        self._paid = 0  # how many of those are within the client's rate
        _, self._ready_at = self._pace(0)  # when it may have the next one served
        self.in_flight = 0
        self._lock = threading.Lock()  # guards in_flight, _unsent, _stalled_at, _broken
        self._changed = threading.Condition(self._lock)  # told when in_flight falls
        self._received = b""  # the beginning of a query
        self._reading = True  # until the client has sent its last
        self._unsent = b""
        self._stalled_at = 0.0
        self._broken = False  # then the socket may be closed: nobody touches it
        self.server.clients.enter(self)

    def handle(self) -> None:
        """Read queries until the client is done, idle for too long, or gone."""
        while self._reading or self._waiting or self._owes():
            if not self._wait():
                return
            if self._waiting and self._ready():
                self._resolve(self._waiting)
                continue
            if not self._hungry():
                continue
            try:
                octets = self.receive()
            except BlockingIOError:
                continue
            except OSError:
                return
            if not self._take(octets):
                return

    def finish(self) -> None:
        """Let the server forget it."""
        with self._lock:
            self._part_locked()
            self._broken = True
        self.server.clients.leave(self)

    def drop(self) -> None:
        """End it from another thread: its own finds the socket shut."""
        with self._lock:
            self._part_locked()
            self._break_locked()

    def reply(self, message: bytes, client: object = None) -> None:
        """Send an answer; any thread, never blocks."""
        self._push(len(message).to_bytes(2, "big") + message, answers=1)

    # The three that another transport than TCP does otherwise. None may block.

    def receive(self) -> bytes:
        """Return octets of queries; raises OSError where there are none yet or ever."""
        octets = self.request.recv(self.READ_SIZE)
        self._reading = bool(octets)
        return octets

    def seal(self, octets: bytes) -> bytes:
        """Return what goes out for these octets of answers; called in their order."""
        return octets

    def parting(self) -> bytes:
        """Return what goes out last."""
        return b""

    def _take(self, octets: bytes) -> bool:
        """Resolve the queries that are whole; False where no more can be understood."""
        messages, self._received = split_frames(self._received + octets)
        if messages:
            self._resolve(messages)
        return not hopeless(self._received)

    def _owes(self) -> bool:
        """Tell whether the client has answers to come."""
        with self._lock:
            return bool(self.in_flight or self._unsent)

    def _pace(self, count: int) -> tuple[int, float]:
        host = self.client_address[0]
        return self.server.admission.pace(host, count, self.active_at)

    def _ready(self) -> bool:
        room = self.in_flight < self.MAX_IN_FLIGHT and not self._unsent
        return room and self.server.clock() >= self._ready_at

    def _hungry(self) -> bool:
        return self._reading and not self._waiting and self._ready()

    def _wait(self) -> bool:
        """Wait for something to do, at most a moment; False when it is over."""
        if self._waiting and self._ready():
            return not self._broken
        wait, slowed = self.MOMENT, 0.0
        if not self._owes():
            now = self.server.clock()
            slowed = self._ready_at - now
            idle_since = max(self.active_at, self._ready_at)
            left = idle_since + self.server.idle_timeout - now
            wait = slowed if slowed > 0 else left
        wanted = select.POLLIN if self._hungry() else 0
        wanted |= select.POLLOUT if self._unsent else 0
        if wanted and wait > 0:
            poller = select.poll()
            poller.register(self.request, wanted)
            poller.poll(wait * 1000)
        elif wait > 0:
            with self._lock:
                self._changed.wait_for(
                    lambda: self._broken or not (self.in_flight or slowed > 0), wait
                )
        if self._unsent:
            self._push(b"")
        return wait > 0 and not self._broken

    def _resolve(self, messages: list[bytes]) -> None:
        """Have queries resolved, but for those that are more than the rate.

        Nor those behind one whose answer the client has no room for as yet.
        """
        self.active_at = self.server.clock()
        if not self._paid:
            self._paid, self._ready_at = self._pace(len(messages))
        served = 0
        queries: list[Waiter] = []
        tally: list[Label] = []
        server, now = self.server, self.active_at
        logged, client = server.proxy.metrics.query_log is not None, self.client_address
        given: list[Given] = []
        lookup, transport = server.proxy.lookup, server.transport
        for message in messages[: self._paid]:
            if self._unsent:
                break
            served += 1
            found = lookup(message, now, tally, transport)
            if found is None:
                continue
            with self._lock:
                self.in_flight += 1
            if isinstance(found, bytes):
                self.reply(found)
                if logged:
                    given.append((message, found, client))
            else:
                found.client = client
                found.received = now
                queries.append((found, self.reply))
        self._paid -= served
        self._waiting = messages[served:]
        if queries:
            server.proxy.resolve(queries)
        if tally:
            server.proxy.metrics.at_once(tally, given, (now, server.clock() - now))

    def _push(self, octets: bytes, answers: int = 0) -> None:
        """Send what the kernel takes and keep the rest; break where it is hopeless."""
        with self._lock:
            self.in_flight -= answers
            self._changed.notify()
            if self._broken:
                return
            unsent, sent = self._unsent, 0
            try:
                unsent += self.seal(octets)
                sent = self.request.send(unsent)
            except BlockingIOError:
                pass
            except OSError:
                self._break_locked()
                return
            now = self.server.clock()
            if sent or not self._unsent:
                self._stalled_at = now
            self._unsent = unsent[sent:]
            stalled = now - self._stalled_at > self.STALL
            if stalled or len(self._unsent) > self.MAX_UNSENT:
                self._break_locked()

    def _part_locked(self) -> None:
        """Send the last octets; behind a part of others they would mean nothing."""
        if not (self._broken or self._unsent) and (octets := self.parting()):
            with contextlib.suppress(OSError):
                self.request.send(octets)

    def _break_locked(self) -> None:
        """End the connection, unless that was done: its thread finds it shut."""
        if self._broken:
            return
        self._broken = True
        self._changed.notify()
        with contextlib.suppress(OSError):
            self.request.shutdown(socket.SHUT_RDWR)


class Clients:
    """The connected clients of all stream servers, within bounds."""

    def __init__(self, limit: int, limit_per_address: int) -> None:
        self._limit = limit
        self._limit_per_address = limit_per_address  # many sit behind one gateway
        self._lock = threading.Lock()  # guards all below
        # By address, with those that no thread serves yet: were they not counted, idle
        # clients could hold all threads and nobody would have to make room.
        self._accepted: collections.Counter[str] = collections.Counter()
        self._connected: set[StreamHandler] = set()
        self._turned_away = 0
        self._closed = False

    def enter(self, client: StreamHandler) -> None:
        """Count a client in; its own thread calls this. At the end it is dropped."""
        with self._lock:
            self._connected.add(client)
            closed = self._closed
        if closed:
            client.drop()

    def leave(self, client: StreamHandler) -> None:
        """Count a client out; any thread may."""
        with self._lock:
            self._connected.discard(client)

    def samples(self) -> Iterator[Sample]:
        """Return its metrics."""
        with self._lock:
            protos = collections.Counter(c.server.proto for c in self._connected)
            turned_away = self._turned_away
        yield "dotproxy_turned_away_total", ("connections",), turned_away
        for proto in ("tcp", "dot"):
            yield "dotproxy_stream_clients", (proto,), protos[proto]

    def accept(self, address: str) -> bool:
        """Count one more accepted; the longest idle connection makes room for it.

        False where there is none that could: then it is not counted.
        """
        with self._lock:
            crowded = self._accepted[address] >= self._limit_per_address
            victim = None
            if crowded or sum(self._accepted.values()) >= self._limit:
                self._turned_away += 1
                victim = self._longest_idle_locked(address if crowded else None)
                if victim is None:
                    return False
                self._connected.discard(victim)
            self._accepted[address] += 1
        if victim is not None:
            victim.drop()
        return True

    def _longest_idle_locked(self, address: str | None) -> StreamHandler | None:
        candidates = [
            client
            for client in self._connected
            if address in (None, client.client_address[0])
        ]
        return min(
            candidates, key=lambda c: (c.in_flight > 0, c.active_at), default=None
        )

    def release(self, address: str) -> None:
        """Count one that was accepted as gone; any thread may."""
        with self._lock:
            self._accepted[address] -= 1
            if not self._accepted[address]:
                del self._accepted[address]

    def drop_all(self) -> None:
        """End all connections, those that are only accepted yet among them."""
        with self._lock:
            self._closed = True
            clients = list(self._connected)
        for client in clients:
            client.drop()


SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)  # at accept


class TCPServer(socketserver.ThreadingTCPServer):
    """Accepts connections and gives each a thread of the pool."""

    proto = "tcp"
    address_family: int
    allow_reuse_address = True
    request_queue_size = 128
    daemon_threads = True
    handler: type[StreamHandler] = StreamHandler
    PAUSE = 0.25  # s until it tries again to accept where descriptors have run out
    CALM = 10.0  # s without that, after which it is worth another line in the log

    def __init__(
        self,
        address: Address,
        proxy: Proxy,
        pool: WorkerPool,
        clients: Clients,
        *,
        admission: Admission,
        idle_timeout: float = CLIENT_IDLE_TIMEOUT,
        clock: Callable[[], float] = elapsed,
        inherited: socket.socket | None = None,
    ) -> None:
        """Bind the address, or use an inherited socket that is bound to it."""
        self.proxy = proxy
        self.clients = clients
        self.admission = admission
        self.idle_timeout = idle_timeout
        self.clock = clock
        self.turned_at = time.monotonic()  # when its loop last came round, awake
        self._inherited = inherited
        self._pool = pool
        self._short_at = -math.inf  # when descriptors last ran out
        version = ipaddress.ip_address(address[0]).version
        self.address_family = socket.AF_INET6 if version == 6 else socket.AF_INET
        self.transport = self.proto, "2" if version == 6 else "1"
        super().__init__(address, self.handler)

    def server_bind(self) -> None:
        """Bind the socket."""
        if self._inherited is not None:
            adopt(self, self._inherited)
            return
        set_v6_only(self.socket)
        super().server_bind()

    def service_actions(self) -> None:
        """Note that the loop turns: socketserver calls this twice a second or more."""
        self.turned_at = time.monotonic()

    def get_request(self) -> tuple[socket.socket, Address]:
        """Accept a client; where there is no descriptor for it, pause, do not spin."""
        try:
            return accept(self.socket)
        except OSError as error:
            if error.errno in SHORTAGES:
                if self.clock() - self._short_at > self.CALM:
                    logger.warning("cannot accept: error=%s", error.strerror)
                self._short_at = self.clock()
                time.sleep(self.PAUSE)
            raise

    def verify_request(  # type: ignore[override]
        self, request: socket.socket, client_address: Address
    ) -> bool:
        """Tell whether the client may ask: where not, it is closed at once."""
        admitted = self.admission.admits(client_address[0])
        if not admitted:
            logger.debug("turned away: client=%s over=tcp", client_address[0])
            self.proxy.metrics.turned_away("acl")
        return admitted

    def process_request(  # type: ignore[override]
        self, request: socket.socket, client_address: Address
    ) -> None:
        """Give the client a thread; at a bound the longest idle one makes room."""
        if not self.clients.accept(client_address[0]):
            self.shutdown_request(request)
            return
        serve = functools.partial(self.process_request_thread, request, client_address)
        if not self._pool.submit(serve):
            self.shutdown_request(request)
            self.clients.release(client_address[0])

    def process_request_thread(  # type: ignore[override]
        self, request: socket.socket, client_address: Address
    ) -> None:
        """Serve the client; its thread of the pool calls this."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.clients.release(client_address[0])

    def handle_error(self, request: object, client_address: object) -> None:
        """Log an error of ours."""
        logger.exception("internal error: server=tcp")


# ---- Encrypted clients (RFC 7858, RFC 8310) ------------------------------------------
# The same over TLS: who serves it shakes hands first, then is a stream like any other.


def describe_chain_error(error: OSError, chain: str, key: str) -> ConfigError:
    """Say why a certificate and its key cannot be used together."""
    reason = str(getattr(error, "reason", None) or "")
    if reason in ("KEY_VALUES_MISMATCH", "NO_CERTIFICATE_ASSIGNED"):
        cure = "give the one that it was made with, with --tls-key PEM"
        return ConfigError(f"the key in {key} is not that of {chain}; {cure}")
    if reason:
        reason = reason.replace("_", " ").lower()
        return ConfigError(f"cannot use the certificate in {chain}: {reason}")
    text = f"cannot read the key in {key} or the certificate in {chain}"
    cure = "give PEM files, the key without a passphrase (openssl pkey removes it)"
    return ConfigError(f"{text}; {cure}")


class Identity:
    """What clients are shown: the certificate chain and its key, as last read."""

    PARTIAL_CHAIN = 0x80000  # X509_V_FLAG_PARTIAL_CHAIN; its name is new in Python 3.10
    # LibreSSL, which macOS's own Python has, bears no such name, but has the like.
    NO_RENEGOTIATION = getattr(ssl, "OP_NO_RENEGOTIATION", 0x20000)
    FLIGHTS = 3  # messages each way until both ends of a handshake are done, at most
    context: ssl.SSLContext

    def __init__(self, chain: str, key: str | None = None) -> None:
        """Read them; `key`: the file of the key, if it is not in that of the chain.

        Raises ConfigError where they cannot be used.
        """
        self._chain = chain
        self._key = key or chain
        self._load()

    def reload(self) -> None:
        """Read them again, for handshakes from now on; keep the old where they are bad.

        The context is replaced in one step, and with it the keys of session tickets: no
        client resumes a session under a certificate that is no longer shown.
        """
        try:
            self._load()
        except ConfigError as error:
            logger.warning("certificate not replaced: error=%s", error)

    def _load(self) -> None:
        chain, key = self._chain, self._key
        self._check_pem("--tls-cert", chain, b"-----BEGIN CERTIFICATE-----")
        self._check_pem("--tls-key", key, b"PRIVATE KEY-----")
        try:
            context = self._build_context()
            level, text = logging.INFO, self._try(context)
        except ssl.SSLCertVerificationError as error:
            level, text = logging.WARNING, f"refused by clients: {error.verify_message}"
        except OSError as error:  # of TLS, or a file that has just been removed
            raise describe_chain_error(error, chain, key) from error
        self.context = context
        logger.log(level, "certificate loaded: file=%s %s", chain, text)

    def _build_context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= self.NO_RENEGOTIATION
        # Who offers none of it is served as well: RFC 7858 has no such token.
        context.set_alpn_protocols(["dot"])
        # With no passphrase at hand, OpenSSL would ask for it on the terminal.
        context.load_cert_chain(self._chain, self._key, password=lambda: b"")
        return context

    @staticmethod
    def _check_pem(option: str, path: str, mark: bytes) -> None:
        try:
            with open(path, "rb") as file:
                found = mark in file.read()
        except OSError as error:
            cure = f"give {option} PEM"
            if isinstance(error, PermissionError):
                cure = "let the user that this runs as read it, or give another --user"
            text = f"cannot read {path}: {error.strerror}; {cure}"
            raise ConfigError(text) from error
        if not found:
            kind = "certificate" if b"CERTIFICATE" in mark else "private key"
            raise ConfigError(f"no {kind} in {path}; give one with {option} PEM")

    def _try(self, context: ssl.SSLContext) -> str:
        """Shake hands with ourselves; return what a client that trusts us finds.

        The certificate's own time and purpose are looked at, not who issued it. Raises
        ssl.SSLCertVerificationError where every client would.
        """
        strict = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        strict.check_hostname = False
        strict.verify_flags |= self.PARTIAL_CHAIN
        strict.load_verify_locations(self._chain)
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = strict.wrap_bio(to_client, to_server)
        server = context.wrap_bio(to_server, to_client, server_side=True)
        for end in (client, server) * self.FLIGHTS:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
        found = client.getpeercert() or {}
        names = [str(pair[1]) for pair in found.get("subjectAltName", ())]
        return f"names={','.join(names)} until={found.get('notAfter')}"


class TLSHandler(StreamHandler):
    """Serves one DoT client."""

    HANDSHAKE = 5.0  # s that it may take

    server: TLSServer

    def setup(self) -> None:
        """Prepare, as the idlest of all clients until the handshake is done.

        Whoever connects and says nothing makes room before any client that is served.
        """
        self._channel = Channel(self.server.identity.context)
        self._shaken = False  # the socket does not wait, and the channel may be used
        super().setup()
        self.active_at -= self.server.idle_timeout

    def handle(self) -> None:
        """Shake hands, then serve; queries may have come with the last octets."""
        try:
            self._shake_hands()
        except (OSError, UpstreamError) as error:
            text = "no TLS session: client=%s error=%s"
            logger.debug(text, self.client_address[0], error)
            return
        if self._take(self._open(b"")):
            super().handle()

    def receive(self) -> bytes:
        """Return octets of queries; none for a record that has not come whole."""
        return self._open(super().receive())

    def seal(self, octets: bytes) -> bytes:
        """Return what goes out for these octets of answers, and for TLS itself."""
        return self._channel.encrypt(octets)

    def parting(self) -> bytes:
        """Return close_notify, or the alert that says why there is no session."""
        return self._channel.farewell() if self._shaken else b""

    def _shake_hands(self) -> None:
        clock, channel = self.server.clock, self._channel

        def step(octets: bytes) -> tuple[bytes, bool]:
            with self.server.turns:
                return channel.shake_hands(octets)

        try:
            shake_hands(self.request, step, clock() + self.HANDSHAKE, clock)
        finally:
            self.request.setblocking(False)
            self._shaken = True
            self.active_at = clock()

    def _open(self, octets: bytes) -> bytes:
        """Decrypt; note the client's end, and send what TLS itself has to say."""
        plaintext, failure, due = self._channel.decrypt(octets)
        self._reading = self._reading and failure is None
        if due:
            self._push(b"")
        return plaintext


class TLSServer(TCPServer):
    """Accepts DoT clients: the same bounds, and handshakes in the clients' threads."""

    proto = "dot"
    handler = TLSHandler
    # Steps of handshakes computed at once, about 1 ms each; others wait for their turn.
    # OpenSSL computes without the GIL: all of them at once would take the processors
    # from everybody else.
    COMPUTING = 1

    def __init__(
        self,
        address: Address,
        proxy: Proxy,
        pool: WorkerPool,
        clients: Clients,
        *,
        admission: Admission,
        identity: Identity,
        inherited: socket.socket | None = None,
    ) -> None:
        """Bind the address, or use an inherited socket that is bound to it."""
        self.identity = identity
        self.turns = threading.BoundedSemaphore(self.COMPUTING)
        everything = address, proxy, pool, clients
        super().__init__(*everything, admission=admission, inherited=inherited)


# ---- Admin server --------------------------------------------------------------------
# What an operator may look at over HTTP. It can be read and nothing else.


class Page(NamedTuple):
    """What is answered to a request."""

    text: str
    kind: str = "text/plain; charset=utf-8"
    status: int = 200
    policy: str = "default-src 'none'"  # the Content-Security-Policy


# Imported by the first AdminServer: it is 10 to 20 of the 250 ms of a start, and 2 MiB.
if TYPE_CHECKING:
    from http.server import BaseHTTPRequestHandler
else:
    BaseHTTPRequestHandler = object


class AdminHandler(BaseHTTPRequestHandler):
    """Answers one request, and closes the connection; see `http_handler`."""

    MAX_HEAD = 8192  # octets of request line and headers; browsers send about 1000
    END_OF_HEAD = re.compile(rb"\r?\n\r?\n")

    protocol_version = default_request_version = "HTTP/1.1"
    server: AdminServer

    def handle(self) -> None:
        """Read the head of a request, of bounded size; answer it."""
        self.close_connection = True
        head = b""
        with contextlib.suppress(OSError):  # it is gone, or was too slow
            while not self.END_OF_HEAD.search(head):
                octets = self.request.recv(self.MAX_HEAD - len(head))
                head += octets
                if not octets or len(head) >= self.MAX_HEAD:
                    break
            self._answer(head)

    def do_GET(self) -> None:
        """Answer with a page."""
        path = self.path.partition("?")[0]
        build = self.server.pages.get(path)
        if not self.server.knows_host(self.headers.get("Host")):
            self.send_error(421, "ask by the address that I listen on")
        elif build is None:
            self.send_error(404, "no such page; / lists them")
        else:
            self.send_page(build(self.headers.get("Accept", "")))

    do_HEAD = do_GET

    def send_page(self, page: Page) -> None:
        """Send a page, or its headers alone where those were asked for."""
        body = page.text.encode()
        self.send_response(page.status)
        for name, value in (
            ("Content-Type", page.kind),
            ("Content-Length", str(len(body))),
            ("Content-Security-Policy", page.policy),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            ("Cache-Control", "no-store"),
            ("Connection", "close"),
        ):
            self.send_header(name, value)
        if page.status == 405:
            self.send_header("Allow", "GET, HEAD")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(
        self, code: int, message: str | None = None, explain: str | None = None
    ) -> None:
        """Refuse in one line of plain text."""
        if code == 501:  # what the base class makes of other methods
            code, message = 405, "this can only be read: GET or HEAD"
        self.send_page(Page(f"{message or self.responses[code][0]}\n", status=code))

    def version_string(self) -> str:
        """Return what the Server header tells."""
        return "dotproxy"

    def log_message(self, format: str, *args: object) -> None:
        """Log at debug only: who asks, asks often."""
        logger.debug("admin: client=%s %s", self.client_address[0], format % args)

    def _answer(self, head: bytes) -> None:
        if self.END_OF_HEAD.search(head):
            self.rfile = io.BytesIO(head)
            self.handle_one_request()
            self.close_connection = True
        elif len(head) >= self.MAX_HEAD:
            self.command = self.requestline = ""
            self.request_version = self.default_request_version
            self.send_error(431)


def http_handler() -> type[AdminHandler]:
    """Return an AdminHandler that has its base class."""
    import http.server

    class Handler(AdminHandler, http.server.BaseHTTPRequestHandler):
        pass

    return Handler


class AdminServer(socketserver.ThreadingTCPServer):
    """Serves pages; each is a function of the Accept header that any thread may call.

    Its bounds keep a slow or greedy client from holding more than a few threads, for
    more than a few seconds.
    """

    MAX_CLIENTS = 16  # connections at once; a probe, a scraper and some browsers
    DEADLINE = 5.0  # s for a request and its answer
    request_queue_size = MAX_CLIENTS  # beyond it a client's SYN waits for a second
    allow_reuse_address = True

    def __init__(
        self,
        address: Address,
        pages: Mapping[str, Callable[[str], Page]],
        clock: Callable[[], float] = elapsed,
    ) -> None:
        self.pages = pages
        self._clock = clock
        self._pool = WorkerPool("admin", self.MAX_CLIENTS, self.MAX_CLIENTS)
        # Guards _deadlines, and the sockets in it against being closed while used.
        self._lock = threading.Lock()
        self._deadlines: dict[socket.socket, float] = {}
        host = ipaddress.ip_address(address[0])
        self.address_family = socket.AF_INET6 if host.version == 6 else socket.AF_INET
        own = f"[{host}]" if host.version == 6 else str(host)
        names = {"localhost", "127.0.0.1", "[::1]", own}
        self._names = names if host.is_loopback else None
        super().__init__(address, http_handler())

    def server_bind(self) -> None:
        """Bind, to one version of IP."""
        set_v6_only(self.socket)
        super().server_bind()

    def get_request(self) -> tuple[socket.socket, Address]:
        """Accept a client; where there is no descriptor for it, pause, do not spin."""
        try:
            return accept(self.socket)
        except OSError as error:
            if error.errno in SHORTAGES:
                time.sleep(TCPServer.PAUSE)
            raise

    def knows_host(self, host: str | None) -> bool:
        """Tell whether a Host header names this server; one on loopback is strict.

        A browser that was led here under a name of somebody else's says that name.
        """
        if self._names is None or host is None:
            return True
        return re.sub(r":\d*\Z", "", host.strip().lower()) in self._names

    def process_request(self, request: object, client_address: object) -> None:
        """Give a client a thread; close one too many."""
        assert isinstance(request, socket.socket)
        with self._lock:
            room = len(self._deadlines) < self.MAX_CLIENTS
            if room:
                self._deadlines[request] = self._clock() + self.DEADLINE
        serve = functools.partial(self.process_request_thread, request, client_address)
        if not (room and self._pool.submit(serve)):
            self.shutdown_request(request)

    def service_actions(self) -> None:
        """End what has taken too long; its thread finds the socket shut."""
        self._shut(self._clock())

    def shutdown_request(self, request: object) -> None:
        """Forget a client and close its connection."""
        assert isinstance(request, socket.socket)
        with self._lock:
            self._deadlines.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """Log an error of ours."""
        logger.exception("internal error: server=admin")

    def server_close(self) -> None:
        """Close all sockets and end all threads; `shutdown` comes first."""
        super().server_close()
        self._shut(math.inf)
        self._pool.close()

    def _shut(self, now: float) -> None:
        with self._lock:
            for request, deadline in self._deadlines.items():
                if now >= deadline:
                    with contextlib.suppress(OSError):
                        request.shutdown(socket.SHUT_RDWR)


# ---- Status page ---------------------------------------------------------------------
# What a person sees at "/", made of the samples that /metrics is made of and of an hour
# of readings. All of it is drawn here: the script only asks for the page again.

MOST_ROWS = 6  # of a table that could be long
PERCENTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}

STYLE = """
:root {
  color-scheme: light dark;
  --back: #f4f5f7; --card: #fff; --text: #1a1f26; --quiet: #59636f; --line: #e1e5ea;
  --good: #00765a; --warn: #8f5300; --bad: #b3261e;
  --cache: #2a78b8; --upstream: #eda126; --stale: #b05c94; --local: #8b95a1;
  --p50: #2a78b8; --p95: #c77700; --p99: #b3261e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #101418; --card: #181d23; --text: #e6e9ed; --quiet: #9ba7b4;
    --line: #2b323b; --good: #45c9a0; --warn: #f0b150; --bad: #ff8a80;
    --cache: #4a97d6; --upstream: #e0a03a; --stale: #c87fb0; --local: #78838f;
    --p50: #5aa6e2; --p95: #f0b150; --p99: #ff8a80;
  }
}
* { box-sizing: border-box; margin: 0; }
body {
  max-width: 72rem; margin: 0 auto; padding: 1.5rem 1.25rem 2.5rem;
  background: var(--back); color: var(--text); overflow-wrap: anywhere;
  font: 1rem/1.45 system-ui, sans-serif; font-variant-numeric: tabular-nums;
  -webkit-text-size-adjust: 100%;
}
main { display: grid; gap: 1.25rem; grid-template-columns: repeat(6, minmax(0, 1fr)); }
main > * { grid-column: 1 / -1; }
.card {
  padding: 1rem 1.25rem; border: 1px solid var(--line); border-radius: .6rem;
  background: var(--card);
}
h1 { font-size: 1.6rem; line-height: 1.25; font-weight: 650; text-wrap: balance; }
h2 { font-size: .95rem; font-weight: 600; }
small, .quiet, th, dt, .axis, footer { color: var(--quiet); font-size: .82rem; }
.good .mark { color: var(--good); }
.warn .mark { color: var(--warn); }
.bad .mark { color: var(--bad); }
.mark { font-weight: 600; }
.why { margin-top: .35rem; }
.facts { margin-top: .35rem; }
.tiles { display: grid; gap: 1.25rem; grid-template-columns: repeat(4, 1fr); }
.tiles dd { font-size: 2rem; line-height: 1.3; font-weight: 600; white-space: nowrap; }
.tiles small { display: block; font-weight: 400; white-space: normal; }
.half { grid-column: span 3; }
.third { grid-column: span 2; }
.legend { display: flex; flex-wrap: wrap; gap: 0 1.1rem; padding: 0; }
.legend li { list-style: none; white-space: nowrap; font-size: .82rem; }
.legend svg { width: 1.1rem; height: .6rem; margin-right: .35rem; }
.plot { position: relative; height: 9rem; margin-top: .75rem; padding-left: 3.6rem; }
.plot svg { display: block; width: 100%; height: 100%; overflow: visible; }
.axis { display: flex; justify-content: space-between; padding: 0; list-style: none; }
.side {
  position: absolute; inset: -.6rem auto -.6rem 0; width: 3.1rem;
  flex-direction: column; text-align: right; line-height: 1.2rem; white-space: nowrap;
}
.times { margin-top: .5rem; padding-left: 3.6rem; }
path { vector-effect: non-scaling-stroke; stroke-width: 2; fill: none; }
path.grid { stroke: var(--line); stroke-width: 1; }
path.line { stroke-linecap: round; stroke-linejoin: round; }
.none { color: var(--quiet); margin-top: .5rem; }
.fill-cache { fill: var(--cache); } .fill-upstream { fill: var(--upstream); }
.fill-stale { fill: var(--stale); } .fill-local { fill: var(--local); }
.line-p50 { stroke: var(--p50); }
.line-p95 { stroke: var(--p95); stroke-dasharray: 7 4; }
.line-p99 { stroke: var(--p99); stroke-dasharray: 2 4; }
.line-hits { stroke: var(--cache); }
table { width: 100%; margin-top: .5rem; border-collapse: collapse; font-size: .9rem; }
th { padding: .3rem .5rem; font-weight: 500; text-align: right; white-space: nowrap; }
td { padding: .4rem .5rem; border-top: 1px solid var(--line); text-align: right; }
td { vertical-align: top; }
td small { display: block; }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
th:last-child, td:last-child { padding-right: 0; }
.upstreams td:not(:first-child) { white-space: nowrap; }
.trouble td { padding-top: 0; border: 0; color: var(--quiet); font-size: .82rem; }
.upstreams .trouble td:first-child { grid-column: 1 / -1; white-space: normal; }
.upstreams td:nth-child(2), .upstreams th:nth-child(2) { text-align: left; }
.bars { table-layout: fixed; font-size: .86rem; }
.bars td { padding: .3rem 0; white-space: nowrap; }
.bars td:first-child { width: 38%; }
.bars td:nth-child(2) { padding-right: .75rem; }
.bars td:last-child { width: 41%; }
.bars small { display: inline; }
.bars svg { width: 100%; height: .4rem; border-radius: .2rem; background: var(--line); }
.bars rect { fill: var(--cache); }
footer { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin-top: 1.25rem; }
a { color: inherit; }
a:hover { color: var(--text); }
#lost {
  position: fixed; inset: auto 0 0; padding: .75rem 1.25rem; text-align: center;
  background: var(--bad); color: var(--card); font-weight: 600;
}
@media (max-width: 60rem) {
  .third { grid-column: span 3; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .upstreams thead { position: absolute; clip-path: inset(50%); }
  .upstreams tr {
    display: grid; grid-template-columns: repeat(6, minmax(0, 1fr)); gap: .4rem .75rem;
    padding: .75rem 0; border-top: 1px solid var(--line);
  }
  .upstreams td { padding: 0; border: 0; text-align: left; }
  .upstreams td:first-child { grid-column: span 4; }
  .upstreams td:nth-child(2) { grid-column: span 2; }
  .upstreams td:nth-child(n + 3)::before {
    content: attr(data-label); display: block; color: var(--quiet); font-size: .75rem;
  }
  .upstreams .trouble { margin-top: -.5rem; padding-top: 0; border: 0; }
}
@media (max-width: 44rem) {
  body { padding: 1rem .75rem 2rem; }
  main, .tiles { gap: .75rem; }
  h1 { font-size: 1.25rem; }
  .tiles dd { font-size: 1.6rem; }
  .tiles small { min-height: 2.9em; }
  .half, .third { grid-column: 1 / -1; }
  .card { padding: .85rem 1rem; }
  .upstreams tr { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  .upstreams td:first-child { grid-column: span 2; }
  .upstreams td:nth-child(2) { grid-column: auto; white-space: normal; }
}
"""

SCRIPT = """
"use strict";
const PERIOD = 5000;
let waiting = false;

async function update() {
  if (waiting || document.hidden || !getSelection().isCollapsed) return;
  waiting = true;
  const lost = document.getElementById("lost");
  try {
    const answer = await fetch("", {signal: AbortSignal.timeout(PERIOD)});
    if (!answer.ok) throw new Error(answer.statusText);
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    document.title = page.title;
    for (const part of ["main", "link"]) {
      document.querySelector(part).replaceWith(page.querySelector(part));
    }
    lost.hidden = true;
  } catch {
    lost.hidden = false;
  }
  waiting = false;
}

setInterval(update, PERIOD);
document.addEventListener("visibilitychange", update);
"""

STATUS_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<noscript><meta http-equiv="refresh" content="15"></noscript>
<link rel="icon" href="data:image/svg+xml,{icon}">
<style>{style}</style>
</head>
<body>
<main>
{main}
</main>
<footer>
<a href="metrics">/metrics</a>
<a href="health">/health</a>
<a href="ready">/ready</a>
<a href="grafana.json">/grafana.json</a>
</footer>
<p id="lost" role="alert" hidden>This page is out of date: dotproxy does not answer.</p>
<script>{script}</script>
</body>
</html>
"""


ICON = (
    "%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 8 8'%3E"
    "%3Ccircle cx='4' cy='4' r='4' fill='%23COLOUR'/%3E%3C/svg%3E"
)
ICON_COLOURS = {"good": "00a37a", "warn": "e09b1f", "bad": "d64541"}


def hash_source(text: str) -> str:
    """Return how a Content-Security-Policy allows this inline style or script."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


STATUS_POLICY = (
    f"default-src 'none'; style-src {hash_source(STYLE)}; img-src data:; "
    f"script-src {hash_source(SCRIPT)}; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Figures:
    """Samples, to be looked up by name."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self._numbers: dict[str, dict[tuple[str, ...], float]] = {}
        self._histograms: dict[str, dict[tuple[str, ...], Histogram]] = {}
        for name, labels, value in samples:
            if isinstance(value, Histogram):
                self._histograms.setdefault(name, {})[labels] = value
            else:
                self._numbers.setdefault(name, {})[labels] = value

    def get(self, name: str, *labels: str) -> float | None:
        """Return one figure, None where it is not known."""
        return self._numbers.get(name, {}).get(labels)

    def sums(self, name: str, place: int = 0) -> collections.Counter[str]:
        """Return what a family adds up to by its label at this place."""
        found: collections.Counter[str] = collections.Counter()
        for labels, number in self._numbers.get(name, {}).items():
            found[labels[place]] += int(number)
        return found

    def buckets(self, name: str, *labels: str) -> list[int]:
        """Return how many values are in each bucket of LATENCIES; no labels: in all."""
        counts = [[0] * (len(LATENCIES) + 1)]
        for each, histogram in self._histograms.get(name, {}).items():
            if each[: len(labels)] == labels:
                counts.append(histogram.counts)
        return [sum(column) for column in zip(*counts)]


def percentile(buckets: Sequence[float], share: float) -> float | None:
    """Return the seconds in which this share was answered, as Prometheus has it."""
    rank, below = share * sum(buckets), 0.0
    bounds: list[float] = [0.0, *LATENCIES, LATENCIES[-1]]
    for lower, upper, number in zip(bounds, bounds[1:], buckets):
        if number and below + number >= rank:
            return lower + (upper - lower) * (rank - below) / number
        below += number
    return None


def share_of(part: float | None, whole: float | None) -> float | None:
    """Return which share of the whole a part is, where both are known."""
    return None if part is None or not whole else part / whole


class Reading(NamedTuple):
    """What the counters said at a time."""

    number: int
    at: float
    counts: tuple[float, ...]  # hits, misses, CPU time, answers by source, buckets


class Change:
    """What happened between two readings."""

    def __init__(self, earlier: Reading, later: Reading) -> None:
        counts = [new - old for old, new in zip(earlier.counts, later.counts)]
        self.at = later.at
        self.seconds = later.at - earlier.at
        self.hits, self.misses, self.cpu, *rest = counts
        self.rates = [number / self.seconds for number in rest[: len(SOURCES)]]
        self.buckets = rest[len(SOURCES) :]

    @property
    def hit_ratio(self) -> float | None:
        """Return the share of queries that the cache could answer."""
        return share_of(self.hits, self.hits + self.misses)


Point = tuple[float, "float | None"]  # from 0 to 1 each; None: nothing to draw


class Window(NamedTuple):
    """What the charts show."""

    span: float  # s
    changes: Sequence[Change]
    latest: Change | None  # over the last minute

    def points(self, values: Iterable[float | None]) -> list[Point]:
        """Place a value for the end of each change, and for the start of the first."""
        known = list(values)
        if not known:
            return []
        ends = [change.at for change in self.changes]
        start = max(ends[0] - self.changes[0].seconds, ends[-1] - self.span)
        return [
            (1 - (ends[-1] - at) / self.span, y)
            for at, y in zip([start, *ends], [known[0], *known])
        ]


class History:
    """Readings of the last hour; one thread adds them, any thread may look at them."""

    PERIOD = 10.0  # s from one reading to the next
    PERIODS = 360  # that are kept: an hour
    LATEST = 6  # periods that count as now
    POINTS = 60  # in a chart: a phone could not show more
    STEPS = (1, 3, 6)  # periods to a point: charts of 10, 30 and 60 minutes

    def __init__(self) -> None:
        # Replaced as a whole and never changed: whoever looks needs no lock.
        self._readings: tuple[Reading, ...] = ()

    def add(self, samples: Iterable[Sample], now: float) -> None:
        """Take a reading."""
        figures = Figures(samples)
        sources = figures.sums("dotproxy_dns_responses_total", 1)
        counts = (
            figures.get("dotproxy_cache_hits_total") or 0,
            figures.get("dotproxy_cache_misses_total") or 0,
            figures.get("process_cpu_seconds_total") or 0,
            *(sources[source] for source in SOURCES),
            *figures.buckets("dotproxy_dns_request_duration_seconds"),
        )
        number = self._readings[-1].number + 1 if self._readings else 0
        kept = self._readings[-self.PERIODS :]
        self._readings = (*kept, Reading(number, now, counts))

    def window(self) -> Window:
        """Return what there is to show: a short time while there is no more."""
        readings = self._readings
        spans = [step * self.POINTS * self.PERIOD for step in self.STEPS]
        if len(readings) < 2:
            return Window(spans[0], [], None)
        last = readings[-1]
        age = last.at - readings[0].at
        step, span = next(
            (pair for pair in zip(self.STEPS, spans) if age <= pair[1]),
            (self.STEPS[-1], spans[-1]),
        )
        # Points are at multiples of the step, so that they stay where they are.
        marks = [r for r in readings if r.number % step == 0 or r is last]
        changes = [Change(a, b) for a, b in zip(marks, marks[1:])]
        return Window(
            span,
            [change for change in changes if last.at - change.at < span],
            Change(readings[-self.LATEST - 1 :][0], last),
        )


class Status(NamedTuple):
    """All that the page tells."""

    figures: Figures
    window: Window
    standings: Sequence[Standing]
    turning: bool  # the servers' loops
    trouble: str  # why they have no answer to give, if so
    listen: str
    cache_limit: int  # octets
    now: float
    wall: float


STUCK = "a server's loop has not moved for seconds: restart it"
NONE = "\u2013"  # what is not known, or not yet


def write_digits(number: float) -> str:
    """Write a number with three digits, or with all those before the point."""
    return f"{number:,.0f}" if number >= 99.95 else f"{number:.3g}"


def write_unit(number: float, base: int, units: str) -> str:
    """Write a number in the largest of these units in which it is 1 or more."""
    names = units.split(",")
    place = 0
    while number >= base and place < len(names) - 1:
        number, place = number / base, place + 1
    return f"{write_digits(number)}\u202f{names[place]}"


def write_rate(number: float) -> str:
    """Write a number per second."""
    return write_digits(number) if number < 1e5 else write_unit(number, 1000, ",k,M,G")


def write_count(number: float | None) -> str:
    """Write a number for people, and the exact one for programs."""
    if number is None:
        return NONE
    text = f"{number:,.0f}" if number < 1e7 else write_unit(number, 1000, ",k,M,G,T,P")
    return f'<data value="{number:.0f}">{text}</data>'


def write_size(octets: float | None) -> str:
    """Write an amount of memory."""
    return NONE if octets is None else write_unit(octets, 1024, "B,KiB,MiB,GiB,TiB")


def write_latency(seconds: float | None) -> str:
    """Write how long an answer took, as far as the buckets can tell."""
    if seconds is None:
        return NONE
    if seconds >= LATENCIES[-1]:
        return f"&gt;\u202f{LATENCIES[-1]:.0f}\u202fs"
    if seconds < LATENCIES[0]:
        return f"&lt;\u202f{LATENCIES[0] * 1000:g}\u202fms"
    unit, number = ("ms", seconds * 1000) if seconds < 0.9995 else ("s", seconds)
    return f"{number:{'.0f' if number >= 9.95 else '.2g'}}\u202f{unit}"


def write_share(share: float | None) -> str:
    """Write a share of 1 in percent."""
    return NONE if share is None else f"{write_digits(share * 100)}\u202f%"


def write_age(seconds: float) -> str:
    """Write how long something has lasted."""
    seconds = max(seconds, 0.0)
    minutes, hours, days = (int(seconds // size) for size in (60, 3600, 86400))
    if days:
        return f"{days}\u202fd {hours % 24}\u202fh"
    if hours:
        return f"{hours}\u202fh {minutes % 60}\u202fmin"
    return f"{minutes}\u202fmin" if minutes else f"{int(seconds)}\u202fs"


WIDTH, HEIGHT = 1000, 100  # of a chart, in units of its own


def draw_path(kind: str, path: str) -> str:
    """Return a path of this class, if there is anything to draw."""
    return f'<path class="{kind}" d="{path}"/>' if path else ""


def draw_line(points: Iterable[Point]) -> str:
    """Return the path through points, with gaps where there is nothing."""
    runs = [
        [f"{x * WIDTH:.1f} {(1 - y) * HEIGHT:.1f}" for x, y in run if y is not None]
        for known, run in itertools.groupby(points, lambda point: point[1] is not None)
        if known
    ]
    return "".join(f"M{run[0]}h0L{'L'.join(run)}" for run in runs)


def draw_legend(kinds: Mapping[str, str], key: str) -> str:
    """Return what each line or area stands for and what it is now."""
    items = [
        f'<li><svg viewBox="0 0 18 10" aria-hidden="true">{draw_path(kind, key)}</svg>'
        f"{text}</li>"
        for kind, text in kinds.items()
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def draw_chart(title: str, legend: str, paths: str, labels: Sequence[str]) -> str:
    """Return a chart; labels of its even levels from the top down."""
    levels = [n * HEIGHT / (len(labels) - 1) for n in range(len(labels))]
    grid = "".join(f"M0 {level:.1f}H{WIDTH}" for level in levels)
    side = "".join(f"<li>{label}</li>" for label in labels)
    return f"""<h2>{title}</h2>
{legend}
<div class="plot">
<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img"
 aria-label="{title}: chart; the legend has the figures of the last minute">
{draw_path("grid", grid)}{paths}</svg>
<ul class="axis side" aria-hidden="true">{side}</ul>
</div>"""


def draw_times(span: float) -> str:
    """Return what stands below a chart."""
    texts = [f"{span * share / 60:.0f} min ago" for share in (1, 0.5)]
    items = "".join(f"<li>{text}</li>" for text in (*texts, "now"))
    return f'<ul class="axis times" aria-hidden="true">{items}</ul>'


def even_levels(highest: float) -> list[float]:
    """Return levels from a round number down to 0."""
    power = float(10 ** math.floor(math.log10(max(highest, 1.0))))
    top = next(power * n for n in (1, 2, 4, 6, 8, 10) if power * n >= highest)
    return [top, top / 2, 0.0]


def chart_rates(window: Window) -> str:
    """Draw queries per second, the sources on top of each other."""
    stacks = [list(itertools.accumulate(each.rates)) for each in window.changes]
    levels = even_levels(max((stack[-1] for stack in stacks), default=0.0))
    areas = []
    for source, heights in reversed(list(zip(SOURCES, zip(*stacks)))):
        points = window.points(height / levels[0] for height in heights)
        down = f"V{HEIGHT}H{points[0][0] * WIDTH:.1f}Z"
        areas.append(draw_path(f"fill-{source}", draw_line(points) + down))
    latest = window.latest.rates if window.latest else [0.0] * len(SOURCES)
    texts = {f"fill-{s}": f"{s} {write_rate(n)}" for s, n in zip(SOURCES, latest)}
    return draw_chart(
        "Queries per second by source",
        draw_legend(texts, "M0 0H18V10H0Z"),
        "".join(areas),
        [write_rate(level) for level in levels],
    )


def chart_latencies(window: Window) -> str:
    """Draw percentiles of the time to answer, on a logarithmic scale."""
    lines = {
        name: [percentile(change.buckets, share) for change in window.changes]
        for name, share in PERCENTILES.items()
    }
    logs = [math.log10(y) for y in itertools.chain(*lines.values()) if y] or [-3.0]
    low = math.floor(min(logs))
    high = max(math.ceil(max(logs)), low + 1)
    buckets = window.latest.buckets if window.latest else []
    paths, texts = [], {}
    for name, line in lines.items():
        scaled = [(math.log10(y) - low) / (high - low) if y else None for y in line]
        paths.append(draw_path(f"line line-{name}", draw_line(window.points(scaled))))
        now = percentile(buckets, PERCENTILES[name])
        texts[f"line line-{name}"] = f"{name} {write_latency(now)}"
    decades = [10.0 ** (power + 3) for power in range(high, low - 1, -1)]
    return draw_chart(
        "Time to answer",
        draw_legend(texts, "M1 5H17"),
        "".join(paths),
        [f"{n:g}\u202fms" if n < 1000 else f"{n / 1000:g}\u202fs" for n in decades],
    )


def chart_hits(window: Window) -> str:
    """Draw the share of queries that the cache could answer."""
    points = window.points(change.hit_ratio for change in window.changes)
    now = write_share(window.latest.hit_ratio if window.latest else None)
    return draw_chart(
        "Cache hit ratio",
        draw_legend({"line line-hits": f"answered from the cache {now}"}, "M1 5H17"),
        draw_path("line line-hits", draw_line(points)),
        [write_share(share) for share in (1.0, 0.5, 0.0)],
    )


def describe_service(status: Status) -> tuple[str, str, str]:
    """Say whether it serves: good, warn or bad; a headline; and why, in plain text."""
    general = [each for each in status.standings if not each.domain]
    states = collections.Counter(each.state for each in general)
    up, known = states["up"], len(general)
    troubled = [each for each in status.standings if each.state != "up"]
    why = "; ".join(f"{each.name}: {each.error}" for each in troubled[:2])
    if len(troubled) > 2:
        why += f"; and {len(troubled) - 2} more, see below"
    if not status.turning:
        return "bad", "Not serving", STUCK
    if up:
        kind = "good" if up == known else "warn"
        return kind, f"Serving: {up} of {known} upstreams up", why
    if states["new"] == known:
        return "warn", "Starting: no upstream is connected yet", ""
    since = max((s.since for s in troubled if s.since is not None), default=status.now)
    outage = f"no upstream has answered for {write_age(status.now - since)}"
    if status.trouble:
        return "bad", f"Not serving: {outage}", why
    return "warn", f"Serving from the cache alone: {outage}", why


MARKS = {"good": "●", "warn": "▲", "bad": "✕"}


def draw_mark(kind: str) -> str:
    """Return a mark for good, warn or bad; words say the same beside it."""
    return f'<span class="mark" aria-hidden="true">{MARKS[kind]}</span>'


def draw_service(status: Status) -> str:
    """Return the headline and what goes with it."""
    kind, headline, why = describe_service(status)
    started = status.figures.get("process_start_time_seconds") or status.wall
    stamp = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(status.wall))
    facts = (
        f"dotproxy {__version__}",
        f"up for {write_age(status.wall - started)}",
        f"listening on {html.escape(status.listen)}",
        f"as of {stamp}",
    )
    reason = f'<p class="why">{html.escape(why)}</p>' if why else ""
    return f"""<header class="{kind}">
<h1>{draw_mark(kind)} {html.escape(headline)}</h1>
{reason}
<p class="facts quiet">{" · ".join(facts)}</p>
</header>"""


def draw_tiles(status: Status) -> str:
    """Return the large figures."""
    figures, latest = status.figures, status.window.latest
    hits = figures.get("dotproxy_cache_hits_total") or 0
    misses = figures.get("dotproxy_cache_misses_total") or 0
    buckets = latest.buckets if latest else []
    p50, p95, p99 = (percentile(buckets, share) for share in PERCENTILES.values())
    total = sum(figures.sums("dotproxy_dns_responses_total").values())
    waiting = write_count(figures.get("dotproxy_queries_in_flight"))
    tiles = (
        (
            "Queries per second",
            write_rate(sum(latest.rates)) if latest else NONE,
            "mean of the last minute",
        ),
        (
            "From the cache",
            write_share(latest.hit_ratio if latest else None),
            f"{write_share(share_of(hits, hits + misses))} since the start",
        ),
        (
            "Half answered within",
            write_latency(p50),
            f"p95\u00a0{write_latency(p95)}, p99\u00a0{write_latency(p99)}",
        ),
        ("Queries answered", write_count(total), f"since the start, {waiting} waiting"),
    )
    cards = [
        f'<div class="card"><dt>{name}</dt><dd>{figure}<small>{more}</small></dd></div>'
        for name, figure, more in tiles
    ]
    return f'<dl class="tiles">{"".join(cards)}</dl>'


def describe_standing(standing: Standing, now: float) -> tuple[str, str]:
    """Say how an upstream does: good, warn or bad, and in words."""
    if standing.state == "down" and standing.since is not None:
        return "bad", f"down for {write_age(now - standing.since)}"
    return {
        "up": ("good", "up"),
        "doubtful": ("warn", "not answering"),
    }.get(standing.state, ("warn", "connecting"))


def describe_certificate(expires: float | None, wall: float) -> tuple[str, str]:
    """Say how long a certificate is good for."""
    if expires is None:
        return "good", NONE
    days = (expires - wall) / 86400
    kind = "good" if days >= 14 else "warn" if days > 0 else "bad"
    text = f"{days:.0f} days" if days >= 2 else f"{days * 24:.0f} h"
    return kind, text if days > 0 else "expired"


COLUMNS = (
    *("State", "Latency", "Queries", "Failures", "Connections", "Idle life"),
    "Certificate",
)


def draw_upstream(standing: Standing, status: Status) -> str:
    """Return the row of an upstream."""
    figures, name, prefix = status.figures, standing.name, "dotproxy_upstream_"
    kind, state = describe_standing(standing, status.now)
    requests = figures.sums(f"{prefix}requests_total")
    p95 = percentile(figures.buckets(f"{prefix}request_duration_seconds", name), 0.95)
    share = write_share(share_of(requests[name], sum(requests.values())))
    idle = figures.get(f"{prefix}idle_life_seconds", name)
    expires = figures.get(f"{prefix}certificate_expiry_timestamp_seconds", name)
    validity, days = describe_certificate(expires, status.wall)
    cells = (
        f'<span class="{kind}">{draw_mark(kind)} {state}</span>',
        f"{write_latency(figures.get(f'{prefix}latency_seconds', name))}"
        f"<small>p95 {write_latency(p95)}</small>",
        f"{write_count(requests[name])}<small>{share}</small>",
        write_count(figures.sums(f"{prefix}failures_total")[name]),
        write_count(figures.get(f"{prefix}connections", name)),
        NONE if idle is None else f"{write_digits(idle)}\u202fs",
        days
        if validity == "good"
        else f'<span class="{validity}">{draw_mark(validity)} {days}</span>',
    )
    row = "".join(
        f'<td data-label="{label}">{cell}</td>' for label, cell in zip(COLUMNS, cells)
    )
    where, _, notes = html.escape(name).partition("#")
    if standing.domain:
        comma = ", " if notes else ""
        notes += f"{comma}for {html.escape(standing.domain)} only"
    row = f"<tr><td><strong>{where}</strong><small>{notes}</small></td>{row}</tr>"
    if standing.failed_at is None:
        return row
    trouble = f"{write_age(status.now - standing.failed_at)} ago: {standing.error}"
    cell = f'<td colspan="{len(COLUMNS) + 1}">{html.escape(trouble)}</td>'
    return f'{row}<tr class="trouble">{cell}</tr>'


def draw_upstreams(status: Status) -> str:
    """Return the table of upstreams."""
    names = "".join(f'<th scope="col">{name}</th>' for name in ("Upstream", *COLUMNS))
    rows = [draw_upstream(standing, status) for standing in status.standings]
    return f"""<h2>Upstreams</h2>
<table class="upstreams"><thead><tr>{names}</tr></thead>
<tbody>
{"".join(rows)}
</tbody></table>"""


Row = tuple[str, str, "float | None"]  # a name, its figure, and the share it is


def draw_bar(share: float) -> str:
    """Return a bar of this share of its width."""
    width = f"{min(share, 1.0):.1%}"
    return f'<svg aria-hidden="true"><rect width="{width}" height="100%"/></svg>'


def draw_rows(title: str, rows: Iterable[Row], empty: str = "None so far.") -> str:
    """Return a section with a row for each figure."""
    lines = []
    for name, figure, share in rows:
        bar = "" if share is None else draw_bar(share)
        lines.append(f"<tr><td>{name}</td><td>{bar}</td><td>{figure}</td></tr>")
    table = f'<table class="bars"><tbody>{"".join(lines)}</tbody></table>'
    text = table if lines else f'<p class="none">{empty}</p>'
    return f'<section class="card third"><h2>{title}</h2>{text}</section>'


def rank_rows(sums: collections.Counter[str]) -> list[Row]:
    """Return a row for each of the largest numbers that are not 0."""
    total = sum(sums.values())
    largest = [pair for pair in sums.most_common(MOST_ROWS) if pair[1]]
    return [
        (html.escape(name), write_count(number), number / total)
        for name, number in largest
    ]


def draw_used(name: str, used: str, limit: str, share: float | None) -> Row:
    """Return a row for something that there is a limit to."""
    return name, f"{used} <small>of {limit}</small>", share or 0.0


def draw_cache(status: Status) -> str:
    """Return what is known of the cache."""
    get, limit = status.figures.get, status.cache_limit
    octets = get("dotproxy_cache_size_bytes")
    memory = share_of(octets, limit)
    return draw_rows(
        "Cache",
        [
            draw_used("Memory", write_size(octets), write_size(limit), memory),
            ("Answers", write_count(get("dotproxy_cache_entries")), None),
            ("Put out", write_count(get("dotproxy_cache_evictions_total")), None),
            ("Refreshed", write_count(get("dotproxy_cache_prefetch_total")), None),
        ],
    )


def draw_process(status: Status) -> str:
    """Return who is connected, and what the process uses."""
    figures, latest = status.figures, status.window.latest
    get = figures.get
    busy = share_of(latest.cpu, latest.seconds) if latest else None
    files, allowed = get("process_open_fds"), get("process_max_fds")
    if allowed is not None and math.isinf(allowed):
        allowed = None
    limits = figures.sums("dotproxy_pool_threads_limit")
    threads = [
        draw_used(
            f"{html.escape(pool)} threads",
            *(write_count(number), write_count(limits[pool])),
            share_of(number, limits[pool]),
        )
        for pool, number in figures.sums("dotproxy_pool_threads_busy").items()
    ]
    files_share = share_of(files, allowed)
    return draw_rows(
        "Clients and process",
        [
            ("TCP clients", write_count(get("dotproxy_stream_clients", "tcp")), None),
            ("TLS clients", write_count(get("dotproxy_stream_clients", "dot")), None),
            *threads,
            draw_used("Files", write_count(files), write_count(allowed), files_share),
            ("CPU", write_share(busy), busy or 0.0),
            ("Memory", write_size(get("process_resident_memory_bytes")), None),
        ],
    )


def draw_page(status: Status) -> str:
    """Return the whole page."""
    sums, window = status.figures.sums, status.window
    kind, headline, _ = describe_service(status)
    times = draw_times(window.span)
    responses, away = "dotproxy_dns_responses_total", "dotproxy_turned_away_total"
    parts = (
        draw_service(status),
        draw_tiles(status),
        f'<section class="card">{chart_rates(window)}{times}</section>',
        f'<section class="card half">{chart_latencies(window)}{times}</section>',
        f'<section class="card half">{chart_hits(window)}{times}</section>',
        f'<section class="card">{draw_upstreams(status)}</section>',
        draw_rows("Answers by RCODE", rank_rows(sums(responses))),
        draw_rows("Queries by type", rank_rows(sums("dotproxy_dns_requests_total", 2))),
        draw_rows("Answers by source", rank_rows(sums(responses, 1))),
        draw_rows("Turned away, by reason", rank_rows(sums(away)), "Nobody so far."),
        draw_cache(status),
        draw_process(status),
    )
    return STATUS_PAGE.format(
        title=f"{html.escape(headline)} | dotproxy",
        icon=ICON.replace("COLOUR", ICON_COLOURS[kind]),
        style=STYLE,
        main="\n".join(parts),
        script=SCRIPT,
    )


class AdminPages:
    """What there is to see: each page is a function of the Accept header."""

    HTML = "text/html; charset=utf-8"

    def __init__(
        self,
        metrics: Metrics,
        proxy: Proxy,
        timer: Timer,
        is_turning: Callable[[float], bool],
        *,
        listen: str,
        cache_limit: int,
        clock: Callable[[], float] = elapsed,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Prepare; `is_turning` tells whether the servers' loops have turned lately."""
        self._metrics = metrics
        self._proxy = proxy
        self._timer = timer
        self._is_turning = is_turning
        self._listen = listen
        self._cache_limit = cache_limit
        self._clock = clock
        self._wall = wall
        self._history = History()
        self.by_path: dict[str, Callable[[str], Page]] = {
            "/": self._show_status,
            "/metrics": self._show_metrics,
            "/health": self._show_health,
            "/ready": self._show_ready,
            "/grafana.json": self._show_dashboard,
        }

    def take_reading(self) -> None:
        """Add to the history, now and from now on; the timer calls it again."""
        now = self._clock()
        self._history.add(self._metrics.samples(), now)
        self._timer.at(now + History.PERIOD, self.take_reading)

    def _show_status(self, _: str) -> Page:
        now = self._clock()
        status = Status(
            figures=Figures(self._metrics.samples()),
            window=self._history.window(),
            standings=self._proxy.standings(),
            turning=self._is_turning(time.monotonic()),
            trouble=self._proxy.trouble(),
            listen=self._listen,
            cache_limit=self._cache_limit,
            now=now,
            wall=self._wall(),
        )
        return Page(draw_page(status), self.HTML, policy=STATUS_POLICY)

    def _show_metrics(self, accept: str) -> Page:
        kind, text = self._metrics.write(accept)
        return Page(text, kind)

    def _show_health(self, _: str) -> Page:
        turning = self._is_turning(time.monotonic())
        return Page("OK\n") if turning else Page(f"{STUCK}\n", status=503)

    def _show_ready(self, _: str) -> Page:
        trouble = self._proxy.trouble()
        return Page(f"{trouble}\n", status=503) if trouble else Page("OK\n")

    def _show_dashboard(self, _: str) -> Page:
        return Page(json.dumps(build_dashboard(), indent=1), "application/json")


# ---- Host: privileges, descriptors, systemd ------------------------------------------
# What the system lends a process: a user, descriptors, sockets, a supervisor. Nothing
# of DNS.

UMASK = 0o077
NOBODY = "nobody"
NOBODY_ID = 65534  # where there is no such name
MAX_ID = 0xFFFFFFFE  # one more is -1, which leaves the id as it is
PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 4, 38  # linux/prctl.h
# Modules that Python imports only at the first handshake, look-up or traceback. Who was
# root may not be able to read them by then.
LATE_MODULES = (
    *("_strptime", "ast", "encodings.idna", "linecache", "tokenize", "traceback"),
    "unicodedata",
)
DESCRIPTOR_RESERVE = 16  # for standard streams, look-ups of names, files, notifications
OPEN_MAX = 10240  # macOS takes no higher limit, whatever its hard limit says
FIRST_PASSED = 3  # the first descriptor that systemd passes, sd_listen_fds(3)


class Account(NamedTuple):
    """A user and a group, by number, and what the user was called."""

    uid: int
    gid: int
    name: str


def find_id(text: str, look_up: Callable[[str], int]) -> int:
    """Return the number of a user or group, by name or number; raises ConfigError."""
    if text.isascii() and text.isdigit() and int(text) <= MAX_ID:
        return int(text)
    try:
        return look_up(text)
    except KeyError:
        if text == NOBODY:
            return NOBODY_ID
        hint = "give --user USER or USER:GROUP, names or numbers"
        raise ConfigError(f"there is no user or group {text!r}: {hint}") from None


def find_account(text: str) -> Account:
    """Look up `USER[:GROUP]`; raises ConfigError.

    Without a group it is the user's own, or that of the same number.
    """
    user, colon, group = text.partition(":")
    uid = gid = find_id(user, lambda name: pwd.getpwnam(name).pw_uid)
    if colon:
        gid = find_id(group, lambda name: grp.getgrnam(name).gr_gid)
    else:
        with contextlib.suppress(KeyError):
            gid = pwd.getpwuid(uid).pw_gid
    if colon and not uid:
        raise ConfigError(f"root keeps its group: give --user {user}")
    return Account(uid, gid, user)


def become(account: Account) -> None:
    """Give up root for good; raises ConfigError where that cannot be done."""
    uid, gid, name = account
    try:
        os.setgroups([])
        if sys.platform == "darwin":
            os.setgid(gid)
            os.setuid(uid)
        else:
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
    except OSError as error:
        cure = "grant CAP_SETUID and CAP_SETGID, or stay root with --user root"
        text = f"cannot become user {name}: {error.strerror}; {cure}"
        raise ConfigError(text, status=1) from error
    with contextlib.suppress(PermissionError):
        os.setuid(0)
        text = f"user {name} could become root again: start with another --user"
        raise ConfigError(text, status=1)


def check_current(wanted: str | None) -> None:
    """Raise ConfigError unless this is the user that is wanted, if any is."""
    if not wanted:
        return
    account = find_account(wanted)
    same_group = ":" not in wanted or account.gid == os.getegid()
    if account.uid != os.geteuid() or not same_group:
        cure = "start as root, or without --user"
        raise ConfigError(f"only root can become user {wanted}: {cure}", status=1)


def find_prctl() -> Callable[[int, int], None]:
    """Return prctl(2), or what does nothing where it cannot be had.

    ctypes is large, and missing from small images: imported here and only for root. To
    do without is no danger, as it only bars once more what a user may not do.
    """
    try:
        import ctypes

        call = ctypes.CDLL(None).prctl
    except (ImportError, OSError, AttributeError) as error:
        logger.debug("no prctl: error=%s", error)
        return lambda option, value: None
    zero = ctypes.c_ulong(0)

    def prctl(option: int, value: int) -> None:
        if call(option, ctypes.c_ulong(value), zero, zero, zero):
            logger.debug("prctl failed: option=%d", option)

    return prctl


def renounce_root(wanted: str | None) -> str:
    """Give up what this program does not need of the host; return who it runs as.

    To be called once files are read and ports bound, before there are threads: they
    would each have rights of their own. Raises ConfigError.
    """
    os.umask(UMASK)
    with contextlib.suppress(OSError, ValueError):  # a sandbox may forbid it
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # it would have keys in it
    current = os.geteuid()
    if current:
        check_current(wanted)
        return str(current)
    account = find_account(wanted or NOBODY)
    if not account.uid:
        logger.warning("running as root: --user says so, but any other user would do")
        return account.name
    for name in LATE_MODULES:
        importlib.import_module(name)
    prctl = find_prctl() if sys.platform == "linux" else None
    become(account)
    if prctl:
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        prctl(PR_SET_DUMPABLE, 0)
    return account.name


def raise_descriptor_limit(wanted: int) -> int:
    """Let this process have so many descriptors; return how many of them it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if sys.platform == "darwin":
        limit = min(limit, OPEN_MAX)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))
    except (OSError, ValueError):
        return soft
    return max(soft, limit)


def take_socket(number: int) -> socket.socket:
    """Take over a listening socket by its descriptor; raises ConfigError."""
    hint = "pass sockets of IPv4 or IPv6, as ListenDatagram= and ListenStream= do"
    try:
        taken = socket.socket(fileno=number)
    except OSError as error:
        text = f"descriptor {number} of LISTEN_FDS: {error.strerror}; {hint}"
        raise ConfigError(text, status=1) from error
    taken.set_inheritable(False)
    datagram = taken.type == socket.SOCK_DGRAM
    stream = taken.type == socket.SOCK_STREAM
    if taken.family not in (socket.AF_INET, socket.AF_INET6):
        problem = "is neither IPv4 nor IPv6"
    elif stream and not taken.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        problem = "does not listen (is it Accept=yes?)"
    elif not (datagram or stream):
        problem = "is neither a datagram nor a stream socket"
    else:
        return taken
    taken.close()
    text = f"descriptor {number} of LISTEN_FDS {problem}; {hint}"
    raise ConfigError(text, status=1)


def inherited_sockets(
    environment: MutableMapping[str, str], first: int = FIRST_PASSED
) -> list[tuple[str, socket.socket]]:
    """Take over the sockets that systemd passed, with their names; raises ConfigError.

    The variables are removed: they are for this process alone (sd_listen_fds(3)).
    """
    pid = environment.pop("LISTEN_PID", "")
    count = environment.pop("LISTEN_FDS", "")
    names = environment.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()):
        return []
    if not (count.isascii() and count.isdigit()):
        raise ConfigError(f"LISTEN_FDS={count}: it should be a number", status=1)
    numbers = range(first, first + int(count))
    passed: list[tuple[str, socket.socket]] = []
    try:
        for number, name in itertools.zip_longest(numbers, names[: int(count)]):
            passed.append((name or "", take_socket(number)))
    except ConfigError:
        for _, listener in passed:
            listener.close()
        raise
    return passed


class Supervisor:
    """systemd, where it started this process and wants to hear how it goes.

    Its protocol is that of sd_notify(3): datagrams, to a socket that it names.
    """

    STATUS = 10.0  # s between reports, where no watchdog wants them more often
    AGAIN = 1.0  # s until it looks again whether a loop that hung turns

    def __init__(
        self,
        environment: MutableMapping[str, str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take what systemd says from the environment: it is for this process alone."""
        self._clock = clock
        path = environment.pop("NOTIFY_SOCKET", "")
        self._address = "\0" + path[1:] if path.startswith("@") else path
        mine = environment.pop("WATCHDOG_PID", "") in ("", str(os.getpid()))
        digits = environment.pop("WATCHDOG_USEC", "")
        period = int(digits) / 1e6 if digits.isascii() and digits.isdigit() else 0.0
        self._watched = mine and period > 0
        self._interval = min(period / 2, self.STATUS) if self._watched else self.STATUS
        self._due = clock() + self._interval
        self._hung = False

    def patience(self) -> float | None:
        """Return for how long to wait until the next report; None is for ever."""
        return max(0.0, self._due - self._clock()) if self._address else None

    def tell(self, *lines: str) -> None:
        """Send a notification, or drop it where nobody takes it; never blocks."""
        if not self._address:
            return
        octets = "\n".join(lines).encode()
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
                channel.sendto(octets, socket.MSG_DONTWAIT, self._address)
        except OSError as error:
            logger.debug("not notified: error=%s", error)

    def report(self, status: str, *, alive: bool) -> None:
        """Tell how it goes; without a word for the watchdog where a loop hangs."""
        if self._hung == alive:
            self._hung = not alive
            logger.warning("receiving loops: state=%s", "up" if alive else "hung")
        ping = ["WATCHDOG=1"] if alive and self._watched else []
        self.tell(*ping, f"STATUS={status}")
        self._due = self._clock() + (self._interval if alive else self.AGAIN)

    def reload(self, action: Callable[[], None]) -> None:
        """Do what SIGHUP asks for, and tell when it begins and ends."""
        self.tell("RELOADING=1", f"MONOTONIC_USEC={int(self._clock() * 1e6)}")
        action()
        self.tell("READY=1")


# ---- Health check --------------------------------------------------------------------
# Asks a running proxy as a client does. It builds nothing of the proxy and reads no CA
# certificates, so that a container can afford it every few seconds.


class Checkup(NamedTuple):
    """What a health check found, in a line; `alive`: something answers at all."""

    healthy: bool
    line: str
    alive: bool = True


HEALTH_GRACE = 1.0  # s beyond the proxy's own time-out that its answer may take
ROOT_QUESTION = b"\0\0\2\0\1"  # . NS IN: every resolver has that at hand
# An option of local use (RFC 6891 section 9), which resolvers ignore. The proxy caches
# no answer to it: one that was cached days ago would say nothing of the upstreams.
HEALTH_OPT = b"\0" + RECORD.pack(TYPE_OPT, MAX_UDP_SIZE, 0, 4) + PAIR.pack(65432, 0)


def printable(text: str) -> str:
    """Return a text from elsewhere as it may be written to a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def extended_error(response: Response) -> str:
    """Return the text of a response's Extended DNS Error."""
    reason = (find_option(response.options, OPTION_EDE) or b"")[2:]
    return printable(reason.decode("utf-8", "replace"))


def judge_health(response: Response, seconds: float) -> Checkup:
    """Tell from its answer, and how long that took, how the proxy does."""
    text = extended_error(response)
    if response.rcode == Rcode.SERVFAIL:
        return Checkup(False, f"upstream down: {text or 'SERVFAIL without a reason'}")
    taken = f"answered in {seconds * 1000:.1f} ms"
    if response.rcode == Rcode.REFUSED:
        who = "the proxy's access list, or its upstream, refuses this check"
        return Checkup(True, f"proxy up, upstream unknown: {text or who}; {taken}")
    return Checkup(True, f"healthy: {taken}")


def read_health(
    asker: socket.socket, ident: bytes, deadline: float, clock: Callable[[], float]
) -> Response:
    """Return the first answer to the health check's own question; raises OSError."""
    while True:
        if (left := deadline - clock()) <= 0:
            raise socket.timeout
        asker.settimeout(left)
        message = asker.recv(MAX_MESSAGE)
        if message[:2] != ident or len(message) < MIN_MESSAGE or answerable(message):
            continue
        with contextlib.suppress(FormatError):
            if message.startswith(ROOT_QUESTION, 12):
                return parse_response(message, 12 + len(ROOT_QUESTION))
            return parse_misfit(message)


def check_health(
    address: Address, patience: float, clock: Callable[[], float] = elapsed
) -> Checkup:
    """Ask the proxy that listens here, over UDP; blocks for so many seconds at most."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address[0], address[0])
    where = write_address(host, address[1])
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    ident, start = os.urandom(2), clock()
    query = ident + HEADER.pack(0, RD, 1, 0, 0, 1)[2:] + ROOT_QUESTION + HEALTH_OPT
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as asker:
            asker.connect((host, address[1]))
            asker.send(query)
            response = read_health(asker, ident, start + patience, clock)
    except socket.timeout:
        line = f"no answer from {where} in {patience:g} s"
    except ConnectionRefusedError:
        line = f"nothing listens on {where}"
    except OSError as error:
        line = f"{where}: {error.strerror or error}"
    else:
        return judge_health(response, clock() - start)
    return Checkup(False, f"proxy down: {line}", alive=False)


# ---- Command line --------------------------------------------------------------------
# Options become a Config, checked; addresses to listen on become servers.

WILDCARDS = ("0.0.0.0", "::")
DNS_PORT = 53
WORKERS = 2  # threads that send batches; 4 cost 10 % more CPU, waking each other
BACKLOG = 256  # batches of UDP queries that may wait for a worker: about 0.3 s of work
CLIENT_PATIENCE = 5.0  # s after which glibc's resolver gives up


LISTS = {  # options that may be given repeatedly
    *("allow", "allow_private", "forward_special", "listen", "pin", "route"),
    *("tls_listen", "upstream"),
}
# What is done instead of serving; not for the environment, which a server inherits.
ERRANDS = {"healthcheck", "doctor"}


def split_port(text: str, port: int) -> tuple[str, int]:
    """Split `HOST[:PORT]` or `[HOST]:PORT`; raises ValueError."""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise ValueError(f"{text!r}: write an IPv6 address as [ADDRESS]:PORT")
        digits = rest[1:] if rest else str(port)
    elif text.count(":") > 1:
        host, digits = text, str(port)
    else:
        host, colon, digits = text.partition(":")
        digits = digits if colon else str(port)
    if not (digits.isascii() and digits.isdigit() and int(digits) <= 65535):
        raise ValueError(f"{text!r}: the port must be a number up to 65535")
    return host, int(digits)


def parse_listen(text: str, port: int = DEFAULT_PORT) -> Address:
    """Parse `ADDR[:PORT]`, for argparse."""
    try:
        host, chosen = split_port(text, port)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    try:
        return str(ipaddress.ip_address(host)), chosen
    except ValueError:
        hint = f"give an IP address, such as 127.0.0.1:{port}, or 0.0.0.0 for all"
        raise argparse.ArgumentTypeError(f"{text!r}: {hint}") from None


def is_address(text: str) -> bool:
    """Tell whether this is an IP address."""
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(text)
        return True
    return False


def parse_admin(text: str) -> Address:
    """Parse `ADDR[:PORT]` or `PORT`, for argparse."""
    text = f"{DEFAULT_ADMIN[0]}:{text}" if text.isascii() and text.isdigit() else text
    try:
        host, port = split_port(text, DEFAULT_ADMIN[1])
        return str(ipaddress.ip_address(host)), port
    except ValueError:
        hint = "give an IP address and a port, such as 127.0.0.1:9153"
        raise argparse.ArgumentTypeError(f"{text!r}: {hint}") from None


def is_host(text: str) -> bool:
    """Tell whether this is an IP address or looks like a host name."""
    if is_address(text):
        return True
    labels = text.removesuffix(".").split(".")
    return len(text) <= MAX_NAME and all(
        label.replace("-", "").replace("_", "").isalnum()
        and label.isascii()
        and len(label) < 64
        for label in labels
    )


def parse_endpoint(text: str, port: int = DOT_PORT) -> Endpoint:
    """Parse `[tls://]HOST[:PORT][#TLS-NAME]`, for argparse; `@PORT` does as well."""
    address, sharp, name = text.partition("#")
    if address.startswith("tcp://"):
        hint = "plain DNS is for --route DOMAIN=tcp://HOST only; leave out tcp://"
        raise argparse.ArgumentTypeError(f"{text!r}: {hint}")
    if address.startswith("tls://"):
        address = address[6:]
    if "@" in address:
        host, _, digits = address.rpartition("@")
        address = f"[{host.strip('[]')}]:{digits}"
    try:
        host, port = split_port(address, port)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if (sharp and not is_host(name)) or not is_host(host) or not port:
        hint = "write HOST[:PORT][#TLS-NAME], such as 9.9.9.9#dns.quad9.net"
        raise argparse.ArgumentTypeError(f"{text!r}: {hint}")
    return Endpoint(host, port, (name or host).removesuffix("."))


def parse_route(text: str) -> Route:
    """Parse `DOMAIN=ENDPOINT` or `DOMAIN=tcp://HOST[:PORT]`, for argparse."""
    domain, _, upstream = text.partition("=")
    domain = domain.lower()
    if domain == ".":
        hint = "this is every name: give its servers with --upstream"
        raise argparse.ArgumentTypeError(f"{text!r}: {hint}")
    domain = domain[:-1] if domain.endswith(".") else domain
    if is_address(domain):
        hint = "names of addresses are under a domain such as 10.in-addr.arpa"
        raise argparse.ArgumentTypeError(f"{text!r}: {hint}")
    named = is_host(domain) and not domain.endswith(".") and len(domain) < MAX_NAME - 1
    if not named or not upstream:
        hint = "write DOMAIN=HOST#NAME or DOMAIN=tcp://HOST, such as lan=tcp://10.0.0.1"
        raise argparse.ArgumentTypeError(f"{text!r}: {hint}")
    if not upstream.startswith("tcp://"):
        return domain, parse_endpoint(upstream)
    address = upstream[6:]
    if "#" in address or "://" in address:
        hint = "plain DNS proves no name: write no more than tcp://HOST[:PORT]"
        raise argparse.ArgumentTypeError(f"{text!r}: {hint}")
    return domain, parse_endpoint(address, DNS_PORT)._replace(name="")


def parse_path(text: str) -> str:
    """Parse the path of a file, for argparse: without one nothing would be read."""
    if not text:
        raise argparse.ArgumentTypeError("give the path of a file")
    return text


def parse_pin(text: str) -> tuple[str, str]:
    """Parse `TLS-NAME=BASE64`, for argparse."""
    name, _, pin = text.partition("=")
    try:
        digest = base64.b64decode(pin, validate=True)
    except ValueError:
        digest = b""
    if not is_host(name) or len(digest) != hashlib.sha256().digest_size:
        hint = "write TLS-NAME=BASE64, where BASE64 is a SHA-256 of 44 characters"
        raise argparse.ArgumentTypeError(f"{text!r}: {hint}")
    return name.lower().removesuffix("."), base64.b64encode(digest).decode()


def parse_domain(text: str) -> bytes:
    """Parse a domain name into wire format and lower case, for argparse."""
    name = text.removesuffix(".")
    if is_address(name) or not is_host(text):
        hint = "give a domain name, such as example.com"
        raise argparse.ArgumentTypeError(f"{text!r}: {hint}")
    return encode_domain(name)


def parse_special(text: str) -> bytes:
    """Parse a name that is answered here, or `all` into the root, for argparse."""
    if text.lower() == "all":
        return b"\0"
    domain = parse_domain(text)
    for zone in LOCAL_ZONES:
        if domain in lineage(zone) or zone in lineage(domain):
            return domain
    known = ", ".join(SPECIAL_NAMES)
    hint = f"give all, {known}, or a private reverse zone, such as 10.in-addr.arpa"
    raise argparse.ArgumentTypeError(f"{text!r}: {hint}")


def parse_flag(text: str) -> bool:
    """Parse yes or no, for argparse."""
    for value, words in (True, "1 true yes on"), (False, "0 false no off"):
        if text.lower() in words.split():
            return value
    raise argparse.ArgumentTypeError(f"{text!r}: give yes or no")


def parse_size(text: str) -> int:
    """Parse a number of octets, with an optional K, M or G, for argparse."""
    digits, unit = text.rstrip("KMGkmg"), text[-1:].upper()
    factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(unit, 1)
    if not (digits.isascii() and digits.isdigit()) or len(text) - len(digits) > 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give octets, such as 32M")
    return int(digits) * factor


def parse_network(text: str) -> Network:
    """Parse `ADDRESS[/BITS]`, for argparse; bits of the host are ignored."""
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        hint = "give a network, such as 192.0.2.0/24 or 2001:db8::/32"
        raise argparse.ArgumentTypeError(f"{text!r}: {hint}") from None
    if parse_client(str(network.network_address)).version != network.version:
        raise argparse.ArgumentTypeError(f"{text!r}: write it as an IPv4 network")
    return network


def number(
    kind: Callable[[str], float], low: float, high: float
) -> Callable[[str], float]:
    """Make an argparse type: a number within bounds."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"{text!r}: give a number, {low:g} to {high:g}"
            )
        return value

    return parse


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose files have comments."""

    def error(self, message: str) -> NoReturn:
        """End with status 2 and a line that says what is wrong."""
        raise ConfigError(f"{message}; see --help")

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """Split a line of an options file as a shell does."""
        if "\0" in arg_line:
            self.error(f"{arg_line!r}: no option has such a character")
        try:
            return shlex.split(re.sub(r"(^|\s)#.*", "", arg_line))
        except ValueError as error:
            self.error(f"{arg_line!r}: {error}")


def add_flag(group: argparse._ArgumentGroup, option: str, text: str) -> None:
    """Describe an option that is off, on where it is given, or says yes or no."""
    group.add_argument(
        option, metavar="YES", nargs="?", const=True, type=parse_flag, help=text
    )


def add_serving_options(group: argparse._ArgumentGroup) -> None:
    """Describe what concerns clients."""
    group.add_argument(
        "--listen",
        metavar="ADDR[:PORT]",
        type=parse_listen,
        action="append",
        help="serve UDP and TCP here; repeatable; port 0 picks one (default: "
        "127.0.0.1:5353 and [::1]:5353)",
    )
    group.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=number(float, 0.1, 60),
        help="answer SERVFAIL after this long without an answer (default: 4)",
    )
    group.add_argument(
        "--max-in-flight",
        metavar="N",
        type=number(int, 1, 30_000),
        help="queries waiting for an answer at once; beyond it the busiest client's "
        "oldest ones get SERVFAIL (default: 10000)",
    )
    group.add_argument(
        "--max-tcp-clients",
        metavar="N",
        type=number(int, 1, 10_000),
        help="TCP connections at once; beyond it the longest idle one is closed "
        "(default: 512)",
    )
    group.add_argument(
        "--max-tcp-per-client",
        metavar="N",
        type=number(int, 1, 10_000),
        help="the same for one client address (default: 256)",
    )


def add_admission_options(group: argparse._ArgumentGroup) -> None:
    """Describe who may ask, and how often."""
    group.add_argument(
        "--allow",
        metavar="NETWORK",
        type=parse_network,
        action="append",
        help="answer clients of this network only; repeatable (default: loopback, "
        "private, link-local, shared and unique local addresses)",
    )
    group.add_argument(
        "--rate-limit",
        metavar="QPS",
        type=number(int, 0, 1_000_000),
        help="queries a second of one public IPv4 address or IPv6 /56, twice that at "
        f"once; 0 for any number (default: {RATE_LIMIT})",
    )
    add_flag(group, "--rate-limit-all", "limit private addresses as well (default: no)")


def add_encrypted_options(group: argparse._ArgumentGroup) -> None:
    """Describe what concerns encrypted clients."""
    group.add_argument(
        "--tls-listen",
        metavar="ADDR[:PORT]",
        type=functools.partial(parse_listen, port=DOT_PORT),
        action="append",
        help="serve DNS over TLS here, on port 853 if none is given; repeatable "
        "(default: nowhere)",
    )
    group.add_argument(
        "--tls-cert",
        metavar="PEM",
        help="the certificate to show to clients, with its chain; read again at SIGHUP "
        "(default: none)",
    )
    group.add_argument(
        "--tls-key",
        metavar="PEM",
        help="its private key, without a passphrase (default: the one in the same "
        "file)",
    )


def add_upstream_options(group: argparse._ArgumentGroup) -> None:
    """Describe what concerns resolvers."""
    group.add_argument(
        "--upstream",
        metavar="HOST[:PORT][#NAME]",
        type=parse_endpoint,
        action="append",
        help="DNS-over-TLS resolver whose certificate is for NAME, or for HOST "
        "without one; repeatable (default: Cloudflare, 1.1.1.1#cloudflare-dns.com and "
        "its other three addresses)",
    )
    group.add_argument(
        "--route",
        metavar="DOMAIN=UPSTREAM",
        type=parse_route,
        action="append",
        help="ask this server, and no others, for names at and below DOMAIN; written "
        "as for --upstream, or tcp://HOST[:PORT] for plain DNS; repeatable, also for "
        "one DOMAIN",
    )
    group.add_argument(
        "--strategy",
        choices=STRATEGIES,
        metavar="HOW",
        help="choose among upstreams: fastest, round-robin, random or failover (in the "
        "order given) (default: fastest)",
    )


def add_trust_options(group: argparse._ArgumentGroup) -> None:
    """Describe what resolvers have to prove."""
    group.add_argument(
        "--ca-file",
        metavar="PEM",
        type=parse_path,
        help="trust the CA certificates in this file only (default: the system's)",
    )
    group.add_argument(
        "--pin",
        metavar="NAME=BASE64",
        type=parse_pin,
        action="append",
        help="of the servers with certificates for NAME, trust only those whose own "
        "public key, not their CA's, has this SHA-256; repeatable, one will do",
    )
    group.add_argument(
        "--tls-min",
        metavar="VERSION",
        choices=TLS_VERSIONS,
        help="speak this version of TLS or newer with upstreams: 1.2 or 1.3 (default: "
        "1.2)",
    )


def add_cache_options(group: argparse._ArgumentGroup) -> None:
    """Describe what concerns the cache."""
    group.add_argument(
        "--cache-size",
        metavar="BYTES",
        type=parse_size,
        help="memory for answers, with K, M or G if you like; 0 for no cache (default: "
        "32M)",
    )
    for option, high, text in (
        ("--cache-min-ttl", 86400, "keep answers at least this long (default: 0)"),
        (
            "--cache-max-ttl",
            7 * 86400,
            "keep answers at most so long (default: 604800)",
        ),
        ("--cache-fail-ttl", 30, "keep failures so long (default: 1)"),
        (
            "--cache-stale",
            7 * 86400,
            "keep expired answers so long, for when no upstream answers; 0 for not at "
            "all (default: 86400)",
        ),
    ):
        group.add_argument(
            option, metavar="SECONDS", type=number(int, 0, high), help=text
        )


def add_log_options(group: argparse._ArgumentGroup) -> None:
    """Describe what concerns logs."""
    group.add_argument(
        "--log-level",
        metavar="LEVEL",
        choices=("debug", "info", "warning", "error"),
        help="debug, info, warning or error (default: info)",
    )
    group.add_argument(
        "--log-format",
        metavar="FORMAT",
        choices=("text", "json"),
        help="text, or json for objects of the Elastic Common Schema (default: text)",
    )
    group.add_argument(
        "--query-log",
        metavar="FILE",
        nargs="?",
        const="-",
        help="log each query to this file, which SIGHUP opens again, or to stderr "
        "without one or with - (default: off)",
    )
    group.add_argument(
        "--query-log-privacy",
        metavar="HOW",
        choices=PRIVACY,
        help="log clients as their /24 or /56 (prefix), under a random name (hash), in "
        "full (none), or as prefix and no names that were asked for (no-names) "
        "(default: prefix)",
    )


def add_host_options(group: argparse._ArgumentGroup) -> None:
    """Describe what concerns the process."""
    group.add_argument(
        "--user",
        metavar="USER[:GROUP]",
        help="if started as root, become this user, by name or number, once ports are "
        "bound and files read; root to stay root (default: nobody)",
    )


def add_errand_options(group: argparse._ArgumentGroup) -> None:
    """Describe what can be done instead of serving."""
    group.add_argument(
        "--healthcheck",
        action="store_const",
        const=True,
        help="ask the running proxy, and tell in a line whether it is healthy (status "
        "0), or which of it and its upstream is down",
    )
    group.add_argument(
        "--doctor",
        nargs="?",
        const="quick",
        choices=("quick", "idle"),
        metavar="idle",
        help="check the whole set-up without starting it, this host and every "
        "upstream, and tell how to mend what fails (status 1); idle: and how long "
        "upstreams keep an idle connection, which takes a minute",
    )


def add_name_options(group: argparse._ArgumentGroup) -> None:
    """Describe which names are answered here, and which addresses are not let in."""
    group.add_argument(
        "--forward-special",
        metavar="NAME",
        type=parse_special,
        action="append",
        help="send this special name upstream, and all below it, instead of answering "
        "it here; repeatable; all for all of them",
    )
    add_flag(
        group,
        "--block-private-answers",
        "answer NODATA where an upstream gives a private address, against DNS "
        "rebinding (default: no)",
    )
    group.add_argument(
        "--allow-private",
        metavar="NAME",
        type=parse_domain,
        action="append",
        help="let this name and all below it have private addresses nevertheless; "
        "repeatable",
    )


def add_admin_options(group: argparse._ArgumentGroup) -> None:
    """Describe what concerns operators."""
    group.add_argument(
        "--admin",
        metavar="ADDR:PORT",
        nargs="?",
        const=DEFAULT_ADMIN,
        type=parse_admin,
        help="serve a status page, metrics, probes and a Grafana dashboard over HTTP "
        "here; a port alone is one of 127.0.0.1, nothing at all is 127.0.0.1:9153 "
        "(default: off)",
    )


def build_parser() -> Parser:
    """Describe the options; each stays None where it is not given."""
    parser = Parser(
        prog="dotproxy",
        usage="%(prog)s [OPTION]... [@FILE]",
        description="Forward DNS (UDP, TCP and TLS) to DNS-over-TLS resolvers.",
        epilog="Every option can also be set as DOTPROXY_OPTION in the environment, "
        "lists with commas or spaces between; the command line wins. @FILE reads "
        "options from a file, one a line, with # comments.",
        fromfile_prefix_chars="@",
        allow_abbrev=False,
        formatter_class=functools.partial(
            argparse.HelpFormatter, max_help_position=26, width=80
        ),
    )
    add_serving_options(parser.add_argument_group("serving"))
    add_admission_options(parser.add_argument_group("admission"))
    add_encrypted_options(parser.add_argument_group("encrypted clients"))
    add_upstream_options(parser.add_argument_group("upstream"))
    add_trust_options(parser.add_argument_group("trust"))
    add_cache_options(parser.add_argument_group("cache"))
    add_host_options(parser.add_argument_group("host"))
    add_name_options(parser.add_argument_group("names"))
    add_admin_options(parser.add_argument_group("admin"))
    add_log_options(parser.add_argument_group("logs"))
    group = parser.add_argument_group("about")
    group.add_argument("--version", action="version", version=f"dotproxy {__version__}")
    add_errand_options(parser.add_argument_group("instead of serving"))
    return parser


def check_upstreams(config: Config) -> None:
    """Raise ConfigError where options on upstreams contradict each other."""
    servers = [*config.upstream, *(endpoint for _, endpoint in config.route)]
    names = {endpoint.name.lower() for endpoint in servers} - {""}
    for name, _ in config.pin:
        if name not in names:
            known = ", ".join(sorted(names))
            text = f"no upstream or route has this TLS name; they have {known}"
            raise ConfigError(f"--pin {name}: {text}")
    plain = {domain for domain, endpoint in config.route if not endpoint.name}
    for domain, endpoint in config.route:
        if domain in plain and endpoint.name:
            text = "some of its servers are asked over TLS and some in clear text"
            raise ConfigError(f"--route {domain}: {text}; give one kind")


def parse_args(arguments: Sequence[str], environment: Mapping[str, str]) -> Config:
    """Read the options: command line before environment before default.

    Raises ConfigError; --help and --version print and raise SystemExit.
    """
    parser = build_parser()
    try:
        given = vars(parser.parse_args(arguments))
    except UnicodeDecodeError:
        parser.error("a file of options has to be UTF-8")
    except RecursionError:
        parser.error("a file of options includes itself")
    missing = {name for name, value in given.items() if value is None}
    for name in sorted(missing - ERRANDS):
        text = environment.get(f"DOTPROXY_{name.upper()}", "")
        option = "--" + name.replace("_", "-")
        words = (
            text.replace(",", " ").split() if name in LISTS else [text] if text else []
        )
        if words:
            extra = [f"{option}={word}" for word in words]
            given[name] = getattr(parser.parse_args(extra), name)
    chosen = {name: value for name, value in given.items() if value is not None}
    if "query_log_privacy" in chosen and "query_log" not in chosen:
        parser.error("--query-log-privacy needs --query-log")
    for name in LISTS & set(chosen):
        chosen[name] = tuple(dict.fromkeys(chosen[name]))
    config = Config(**chosen, listen_given="listen" in chosen)
    check_upstreams(config)
    return config


def make_guard(config: Config, routed: Iterable[bytes]) -> RebindingGuard | None:
    """Make what keeps private addresses out, if it is wanted; raises ConfigError.

    Servers for a routed domain may give any address.
    """
    if config.block_private_answers:
        return RebindingGuard((*config.allow_private, *routed))
    if config.allow_private:
        text = "--allow-private has no effect alone; give --block-private-answers too"
        raise ConfigError(text)
    return None


ENCRYPTED_SOCKET = "tls"  # what a socket that is passed for encrypted clients is called


def load_identity(config: Config, passed: bool = False) -> Identity | None:
    """Read what is to be shown to encrypted clients, if there are to be any.

    `passed`: systemd passed a socket for them. Raises ConfigError.
    """
    chain, key = config.tls_cert, config.tls_key
    wanted = bool(config.tls_listen) or passed
    if wanted and chain is not None:
        return Identity(chain, key)
    if wanted:
        what = "--tls-listen" if config.tls_listen else "a socket named tls"
        cure = "give --tls-cert PEM, and --tls-key PEM if its key is in another file"
        raise ConfigError(f"{what} needs a certificate: {cure}")
    if chain is not None or key is not None:
        option = "--tls-key" if chain is None else "--tls-cert"
        cure = "give --tls-listen ADDR, or leave it out"
        raise ConfigError(f"{option} is for encrypted clients: {cure}")
    return None


def describe_bind_error(
    error: OSError, address: Address, option: str = "--listen"
) -> str:
    """Say why an address cannot be listened on, and how to mend it."""
    host, port = address
    where = write_address(host, port)
    if error.errno == errno.EADDRINUSE:
        holder = {
            53: "another DNS server, such as systemd-resolved or dnsmasq",
            853: "another DNS-over-TLS server",
            5353: "a multicast DNS daemon, such as avahi-daemon or mDNSResponder",
        }.get(port, "another program")
        spare = {"--listen": 5354, "--admin": 9154}.get(option, 8853)
        other = write_address(host, spare)
        cure = f"stop it, or choose another port with {option} {other}"
        taken = f"port {port} is taken, probably by {holder}"
        return f"cannot listen on {where}: {taken}; {cure}"
    if error.errno in (errno.EACCES, errno.EPERM):
        cure = f"start as root, or choose a port from 1024 up with {option}"
        return f"cannot listen on {where}: no permission for port {port}; {cure}"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"cannot listen on {where}: this host has no such address; mend {option}"
    return f"cannot listen on {where}: {error.strerror}; mend {option}"


Binder = Callable[[Address], Sequence["UDPServer | TCPServer"]]


def bind_port(address: Address, bind: Binder) -> Sequence[UDPServer | TCPServer]:
    """Bind one address; port 0 becomes a port that is free for all its servers."""
    attempts = 1 if address[1] else 16
    while True:
        attempts -= 1
        try:
            return bind(address)
        except OSError:
            if not attempts:
                raise


def bind_servers(
    addresses: Iterable[Address],
    bind: Binder,
    given: bool,
    option: str = "--listen",
) -> list[UDPServer | TCPServer]:
    """Bind every address; raises ConfigError where one that was `given` cannot be.

    All addresses of a family that this host lacks are none: that is no error.
    """
    servers: list[UDPServer | TCPServer] = []
    for address in addresses:
        try:
            servers += bind_port(address, bind)
        except OSError as error:
            absent = error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
            if absent and (address[0] in WILDCARDS or not given):
                text = "not listening: address=%s error=%s"
                logger.info(text, address[0], error.strerror)
                continue
            for server in servers:
                server.server_close()
            text = describe_bind_error(error, address, option)
            raise ConfigError(text, status=1) from error
    if not servers:
        raise ConfigError("no address to listen on; give --listen ADDR:PORT", status=1)
    return servers


def describe_servers(servers: Iterable[socketserver.TCPServer]) -> str:
    """Return where the servers listen, `ADDR:PORT` each once."""
    found = []
    for server in servers:
        host, port = server.server_address[:2]
        found.append(write_address(str(host), port))
    return " ".join(dict.fromkeys(found))


def count_descriptors(config: Config, listeners: int) -> int:
    """Return how many descriptors may be in use beside those of TCP clients."""
    groups = 1 + len({domain for domain, _ in config.route})
    connections = Upstream.MAX_CONNECTIONS * len(config.upstream + config.route)
    connections += Quarantine.MAX_ALONE * groups
    admin = 1 + AdminServer.MAX_CLIENTS if config.admin else 0
    return connections + listeners + admin + DESCRIPTOR_RESERVE


def fit_descriptors(config: Config, listeners: int) -> Config:
    """Raise the limit of descriptors; where it stays too low, allow fewer TCP clients.

    UDP and the upstreams always have theirs. A TCP client takes two at worst: one that
    has been accepted may wait for the thread of another that is being ended.
    """
    others = count_descriptors(config, listeners)
    wanted = others + 2 * config.max_tcp_clients
    limit = raise_descriptor_limit(wanted)
    if limit >= wanted:
        return config
    clients = max(1, (limit - others) // 2)
    logger.warning(
        "few descriptors: limit=%d max_tcp_clients=%d: for %d of them, start with"
        " LimitNOFILE=%d in the unit, or ulimit -n %d",
        *(limit, clients, config.max_tcp_clients, wanted, wanted),
    )
    return config._replace(max_tcp_clients=clients)


# ---- Doctor --------------------------------------------------------------------------
# Looks at the set-up without starting it: at this host, and at every upstream over
# connections as the proxy makes them, so that it says what the log would say.

OK, WARN, FAIL = "ok", "warn", "FAIL"
RELEASED = 1_793_491_200  # 2026-11-01: a clock that is behind this is wrong
EXPIRY_NOTICE = 14 * 86400  # s before the end of a certificate, to warn
EXAMINERS = 32  # upstreams that are examined at once, a thread or two each


class Finding(NamedTuple):
    """What one check found, and how to mend it if that is not well."""

    check: str
    result: str
    detail: str
    cure: str = ""


class Report(NamedTuple):
    """All that was found out about this host or an upstream."""

    subject: str
    findings: list[Finding]


def when(seconds: float) -> str:
    """Return a time of day, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def socket_inodes(table: Iterable[str], address: Address) -> set[str]:
    """Return the inodes of sockets that bar this address, from a table of /proc/net."""
    wanted, found = ipaddress.ip_address(address[0]), set()
    for line in itertools.islice(table, 1, None):
        fields = line.split()
        digits, _, port = fields[1].partition(":")
        words = [digits[n : n + 8] for n in range(0, len(digits), 8)]
        packed = b"".join(struct.pack("=I", int(word, 16)) for word in words)
        host = ipaddress.ip_address(packed)
        host = getattr(host, "ipv4_mapped", None) or host
        same = host == wanted or host.is_unspecified or wanted.is_unspecified
        listens = fields[3] in ("07", "0A")  # unconnected UDP, TCP LISTEN
        if same and listens and int(port, 16) == address[1]:
            found.add(fields[9])
    return found


def describe_process(pid: str) -> str:
    """Return a process's name and number; raises OSError."""
    with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
        words = [os.path.basename(word) for word in file.read().split("\0")]
    if any(word.startswith("dotproxy") for word in words[:4]):
        return f"dotproxy (pid {pid})"
    with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
        return f"{file.read().strip()} (pid {pid})"


def find_holders(address: Address, protocol: str) -> list[str]:
    """Name who holds a port, "tcp" or "udp"; empty where that cannot be seen."""
    inodes: set[str] = set()
    for path in (f"/proc/net/{protocol}", f"/proc/net/{protocol}6"):
        with contextlib.suppress(OSError), open(path, encoding="ascii") as table:
            inodes |= socket_inodes(table, address)
    links, holders = {f"socket:[{inode}]" for inode in inodes}, set()
    for path in glob.iglob("/proc/[0-9]*/fd/*") if links else ():
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            if os.readlink(path) in links:
                holders.add(describe_process(path.split("/")[2]))
    return sorted(holders)


def try_to_bind(address: Address, kind: socket.SocketKind) -> OSError | None:
    """Return why this address cannot be bound for TCP or UDP, if it cannot."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    try:
        with socket.socket(family, kind) as listener:
            set_v6_only(listener)
            if kind == socket.SOCK_STREAM:  # as TCPServer does
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        return error
    return None


def examine_holder(
    check: str, address: Address, holders: list[str], text: str
) -> Finding:
    """Tell whether it is a running dotproxy that holds the port."""
    _, _, cure = text.partition("; ")
    verdict = check_health(address, HEALTH_GRACE)
    if any(holder.startswith("dotproxy") for holder in holders):
        detail = f"held by {', '.join(holders)}, which runs; {verdict.line}"
        return Finding(check, OK if verdict.healthy else WARN, detail)
    if holders:
        return Finding(check, FAIL, f"taken by {', '.join(holders)}", cure)
    if verdict.alive:
        detail = "taken, and DNS is answered there: by dotproxy, or by another server"
        return Finding(check, WARN, detail, f"if it is not dotproxy, {cure}")
    return Finding(check, FAIL, "taken by a program that cannot be seen", cure)


def examine_address(address: Address, given: bool) -> Finding:
    """Tell whether UDP and TCP can be served on an address."""
    host, port = address
    check = write_address(host, port)
    for protocol, kind in (("udp", socket.SOCK_DGRAM), ("tcp", socket.SOCK_STREAM)):
        error = try_to_bind(address, kind)
        if error is None:
            continue
        if not given and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            return Finding(check, OK, "not used: this host has no such address")
        text = describe_bind_error(error, address)
        if error.errno == errno.EADDRINUSE:
            return examine_holder(check, address, find_holders(address, protocol), text)
        detail, _, cure = text.partition(": ")[2].partition("; ")
        return Finding(check, FAIL, detail, cure)
    return Finding(check, OK, "free for UDP and TCP")


def examine_stream_address(address: Address, use: str, option: str) -> Finding:
    """Tell whether streams can be served on an address that an option names."""
    host, port = address
    check = write_address(host, port)
    error = try_to_bind(address, socket.SOCK_STREAM)
    if error is None:
        return Finding(check, OK, f"free for {use}")
    holders = find_holders(address, "tcp")
    if any(holder.startswith("dotproxy") for holder in holders):
        return Finding(check, OK, f"held by {', '.join(holders)}, which runs")
    text = describe_bind_error(error, address, option)
    detail, _, cure = text.partition(": ")[2].partition("; ")
    if error.errno == errno.EADDRINUSE and not holders:
        detail = "taken by a program that cannot be seen"
        return Finding(check, WARN, detail, f"if it is not dotproxy, {cure}")
    return Finding(check, FAIL, ", ".join([detail, *holders]), cure)


def check_addresses(config: Config) -> None:
    """Check that no two options want the same TCP port; raises ConfigError."""
    wanted = [("--listen", address) for address in config.listen]
    wanted += [("--tls-listen", address) for address in config.tls_listen]
    wanted += [("--admin", config.admin)] if config.admin else []
    for (option, first), (other, second) in itertools.combinations(wanted, 2):
        one, two = (ipaddress.ip_address(host) for host, _ in (first, second))
        wide = one.version == two.version and (one.is_unspecified or two.is_unspecified)
        if first[1] == second[1] != 0 and (one == two or wide):
            text = f"{option} and {other} both want {write_address(*second)}"
            raise ConfigError(f"{text}; give one of them another port")


def check_query_log(path: str | None) -> None:
    """Check that lines can be appended to a file; raises ConfigError. Makes none."""
    if path is None or path == "-":
        return
    there = os.path.exists(path)
    place = path if there else os.path.dirname(path) or "."
    needed = os.W_OK if there else os.W_OK | os.X_OK
    if os.path.isdir(path) or not os.access(place, needed):
        raise ConfigError(f"cannot write to {path}; mend --query-log")


def examine_parts(config: Config) -> list[Finding]:
    """Tell what else the options ask for that the proxy could not start with."""
    findings = []
    for check, wanted, make in (
        ("addresses", None, lambda: check_addresses(config)),
        ("own certificate", config.tls_cert, lambda: load_identity(config)),
        ("private answers", config.allow_private, lambda: make_guard(config, ())),
        ("query log", config.query_log, lambda: check_query_log(config.query_log)),
    ):
        try:
            make()
            findings += [Finding(check, OK, "can be used")] if wanted else []
        except ConfigError as error:
            detail, _, cure = str(error).replace(": give", "; give").partition("; ")
            findings.append(Finding(check, FAIL, detail, cure))
    return findings


def examine_descriptors(config: Config, limit: int) -> Finding:
    """Compare the limit of open files with what the bounds may come to."""
    listeners = 2 * len(config.listen) + len(config.tls_listen)
    needed = count_descriptors(config, listeners)
    needed += 2 * config.max_tcp_clients
    if limit == resource.RLIM_INFINITY:
        return Finding("descriptors", OK, f"no limit; {needed} may be used")
    if limit >= needed:
        return Finding("descriptors", OK, f"{limit}, of which {needed} may be used")
    cure = f"ulimit -n {needed}, LimitNOFILE={needed} in a systemd unit, or fewer "
    detail = f"{limit}, but {needed} may be needed: there will be fewer TCP clients"
    return Finding("descriptors", WARN, detail, f"{cure}--max-tcp-clients")


def examine_user(wanted: str | None) -> Finding:
    """Tell as whom the proxy would run if this user started it."""
    try:
        if os.geteuid():
            check_current(wanted)
            return Finding("user", OK, f"{os.geteuid()}, not root")
        account = find_account(wanted or NOBODY)
    except ConfigError as error:
        detail, _, cure = str(error).partition(": ")
        return Finding("user", FAIL, detail, cure)
    if not account.uid:
        cure = "leave out --user root: any other user would do"
        return Finding("user", WARN, "root stays root", cure)
    return Finding("user", OK, f"root becomes {account.name} ({account.uid})")


def examine_clock(now: float, certificates: Sequence[tuple[int, int]]) -> Finding:
    """Judge this host's clock by this program's age, and the certificates' dates."""
    says, cure = f"it says {when(now)}", "set the clock of this host, by NTP if you can"
    if now < RELEASED:
        detail = f"{says}, which is before this program was made"
        return Finding("clock", FAIL, detail, cure)
    if certificates and not any(first <= now <= last for first, last in certificates):
        first, last = certificates[0]
        detail = f"{says}, when no upstream's certificate is valid; one is from "
        return Finding("clock", WARN, f"{detail}{when(first)} to {when(last)}", cure)
    agreed = ", within the dates of an upstream's certificate" if certificates else ""
    return Finding("clock", OK, says + agreed)


def examine_authorities(trust: Trust) -> Finding:
    """Tell which CA certificates are trusted, and where they are from."""
    paths, check = ssl.get_default_verify_paths(), "CA certificates"
    if not trust.has_authorities():
        file = os.environ.get(paths.openssl_cafile_env, paths.openssl_cafile)
        directory = os.environ.get(paths.openssl_capath_env, paths.openssl_capath)
        where = trust.ca_file or f"{file} or {directory}"
        cure = "install ca-certificates, or give --ca-file PEM"
        return Finding(check, FAIL, f"none in {where}", cure)
    number = trust.context.cert_store_stats()["x509"]
    where = trust.ca_file or (paths.cafile if number else None) or str(paths.capath)
    return Finding(check, OK, f"{number or 'as needed'} from {where}")


def describe_host(config: Config) -> list[Finding]:
    """Tell what runs where, and with what."""
    listen, upstream = len(config.listen), len(config.upstream) + len(config.route)
    options = f"valid; {listen} to listen on, {upstream} upstream"
    system = f"{os.uname().sysname} {os.uname().release}"
    python = f"Python {sys.version.split()[0]}, {ssl.OPENSSL_VERSION}"
    return [
        Finding("options", OK, options),
        Finding("program", OK, f"dotproxy {__version__}, {python}, {system}"),
    ]


class Visit(ConnectionOwner):
    """A connection to an upstream for one thread, which waits for what comes."""

    def __init__(
        self,
        endpoint: Endpoint,
        trust: Trust,
        clock: Callable[[], float],
        *,
        patience: float,
        session: ssl.SSLSession | None = None,
    ) -> None:
        self.handshake = 0.0  # s that TLS took on top of connecting
        self.sent: list[Exchange] = []  # what was asked last
        self.lost_at = 0.0
        self._clock = clock
        # None where it opened. Bounded by what is asked.
        self._arrived: queue.SimpleQueue[Answer | UpstreamError | None]
        self._arrived = queue.SimpleQueue()
        self.connection = Connection(
            endpoint,
            trust,
            self,
            label=f"visit-{endpoint.host}",
            patience=(patience, patience),
            session=session,
            clock=clock,
        )

    def connection_opened(self, connection: Connection) -> None:
        """Wake who waits."""
        self._arrived.put(None)

    def connection_answered(
        self, connection: Connection, answers: list[Answer], now: float
    ) -> None:
        """Wake who waits."""
        for answer in answers:
            self._arrived.put(answer)

    def connection_lost(
        self, connection: Connection, error: UpstreamError, orphans: list[Exchange]
    ) -> None:
        """Wake who waits."""
        self.lost_at = self._clock()
        self._arrived.put(error)

    def open(self) -> None:
        """Connect and shake hands; raises UpstreamError."""
        start = self._clock()
        self.connection.start()
        event = self._arrived.get()  # comes within the connection's patience
        if isinstance(event, UpstreamError):
            raise event
        self.handshake = self._clock() - start - self.connection.round_trip

    def ask(self, questions: Sequence[bytes], patience: float) -> list[Answer]:
        """Send these at once, return the answers as they came; raises UpstreamError.

        Some may be missing where the time is over.
        """
        answers: list[Answer] = []
        start = self._clock()
        form = Form(("tcp", ""), RD)
        form.settle()
        self.sent = [
            Exchange(Query(0, question, form, 0), start, start + patience)
            for question in questions
        ]
        if not self.connection.endpoint.name:  # in clear text, padding hides nothing
            for exchange in self.sent:
                exchange.wire = build_upstream_query(exchange.query, padded=False)
        self.connection.send(self.sent, start)
        with contextlib.suppress(queue.Empty):
            while len(answers) < len(questions):
                answers.append(self._next(start + patience))
        if not answers:
            raise UpstreamError("silence", f"no answer within {patience:.1f} s")
        return answers

    def wait_for_end(self, patience: float) -> float | None:
        """Return after how long idle the server closed it, if it did."""
        deadline = self._clock() + patience
        try:
            while True:
                self._next(deadline)
        except queue.Empty:
            return None
        except UpstreamError:
            return self.lost_at - self.connection.active_at

    def close(self) -> None:
        """Close it; returns when its thread has ended."""
        self.connection.close()
        self.connection.join()

    def _next(self, deadline: float) -> Answer:
        """Wait for an answer; raises queue.Empty or UpstreamError."""
        event = self._arrived.get(timeout=max(0.0, deadline - self._clock()))
        assert event is not None  # it opened before anything was asked
        if isinstance(event, UpstreamError):
            raise event
        return event


# What to do about an upstream that fails, by the cause; certificates have their own.
UPSTREAM_CURES = {
    "timeout": "let TLS on TCP port {port} out through the firewall, or give another "
    "--upstream",
    "refused": "check the address and the port in --upstream",
    "unreachable": "check the address in --upstream, and the routes of this host",
    "resolve": "give the address itself: --upstream ADDRESS#{name}",
    "tls": "check in --upstream that this port is for DNS over TLS",
    "silence": "check that it is a DNS resolver, or give another --upstream",
    "unwilling": "have its operator allow this host, or give another --upstream",
}


def cure_of(error: UpstreamError, endpoint: Endpoint) -> str:
    """Return what to do about an upstream's failure."""
    if error.cause == "certificate":  # its text ends with that
        cure = str(error).rpartition(": ")[2].partition(" [")[0]
        where = str(endpoint).partition("#")[0]
        return cure.replace("HOST#NAME", f"{where}#NAME with such a name")
    cure = UPSTREAM_CURES.get(error.cause, "try again, or give another --upstream")
    return cure.format(port=endpoint.port, name=endpoint.name)


def milliseconds(seconds: float) -> str:
    """Return a time for people to read."""
    return f"{seconds * 1000:.1f} ms"


class Road(NamedTuple):
    """How long it took to connect to an address, or why it could not be done."""

    name: str
    seconds: float
    failure: UpstreamError | None = None

    def __str__(self) -> str:
        return f"{self.name}: {self.failure or milliseconds(self.seconds)}"


def reach(
    endpoint: Endpoint, patience: float, clock: Callable[[], float]
) -> list[Road]:
    """Connect to an address of each family there is; raises UpstreamError."""
    try:
        found = socket.getaddrinfo(*endpoint[:2], type=socket.SOCK_STREAM)
    except OSError as error:
        text = f"cannot look up the address: {error}"
        raise UpstreamError("resolve", text) from None
    roads = []
    for family, address in {entry[0]: entry[4] for entry in reversed(found)}.items():
        version = "IPv6" if family == socket.AF_INET6 else "IPv4"
        failure, start = None, clock()
        try:
            with socket.socket(family, socket.SOCK_STREAM) as raw:
                raw.settimeout(patience)
                raw.connect(address)
        except OSError as error:
            failure = describe_network_error(error, endpoint)
        roads.append(Road(f"{version} {address[0]}", clock() - start, failure))
    return roads


def fetch_certificate(endpoint: Endpoint, patience: float) -> bytes:
    """Return the certificate that is shown, unverified; no query goes this way."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(socket.create_connection(endpoint[:2], patience))
        tls = context.wrap_socket(raw, server_hostname=endpoint.name)
        return stack.enter_context(tls).getpeercert(True) or b""


def examine_peer(
    peer: Peer, last: float, now: float, handshake: float
) -> list[Finding]:
    """Tell what was agreed on, for whom the certificate is, and how long it will do."""
    taken = milliseconds(handshake)
    names = ", ".join(peer.names[:8])
    detail = f"for {names}; {int((last - now) // 86400)} days left, to {when(last)}"
    result, cure = OK, ""
    if last - now < EXPIRY_NOTICE:
        result = WARN
        cure = "have its operator renew it, or give another --upstream as well"
    return [
        Finding("handshake", OK, f"{peer.version}, {peer.cipher}, in {taken}"),
        Finding("ALPN", OK, peer.alpn or "none chosen"),
        Finding("certificate", result, detail, cure),
        Finding("pin", OK, public_key_pin(peer.certificate)),
    ]


def examine_latency(seconds: Sequence[float], slow: float) -> Finding:
    """Summarise how long answers took, one after the other."""
    ordered = sorted(seconds)
    median = ordered[len(ordered) // 2]
    figures = " / ".join(map(milliseconds, (ordered[0], median, ordered[-1])))
    detail = f"{figures} (least, median, most of {len(ordered)})"
    if median > slow:
        cure = "look for what is in the way, or give a nearer --upstream"
        return Finding("latency", WARN, detail, cure)
    return Finding("latency", OK, detail)


def examine_options(responses: Sequence[Response]) -> list[Finding]:
    """Tell what the OPT records of answers say: padding and the idle timeout."""
    sizes = sorted({len(response.message) for response in responses})
    padded = all(
        find_option(response.upstream_options, OPTION_PADDING) is not None
        for response in responses
    )
    told = keepalive_told(responses[-1])
    padding = f"answers of {', '.join(map(str, sizes))} octets"
    return [
        Finding("padding", OK, padding if padded else f"none: {padding}"),
        Finding("keepalive", OK, "not told" if told is None else f"{told:g} s"),
    ]


def as_routed(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings with cures for the server of a routed domain."""
    return [
        finding._replace(cure=finding.cure.replace("--upstream", "--route"))
        for finding in findings
    ]


def examine_order(sent: Sequence[Exchange], answers: Sequence[Answer]) -> Finding:
    """Tell whether answers overtook each other."""
    came = [exchange for exchange, _, _ in answers]
    kept = came == sent[: len(came)]
    text = "no answer overtook another" if kept else "answers as they are ready"
    return Finding("order", OK, text)


def describe_refusal(response: Response, asked: str) -> str:
    """Say how a response refuses to answer."""
    text = f"answers {Rcode(response.rcode).name} to {asked}"
    reason = extended_error(response)
    return f"{text}: {reason}" if reason else text


class Examination:
    """Examines one upstream, or a server of a routed domain, in a thread of its own."""

    TIME_LIMIT = 10.0  # s in all, beside the wait for an idle connection to close
    STEP = 2.5  # s to connect, to shake hands, to answer
    SAMPLES = 10  # queries one after the other, to see how fast it is
    SAMPLE_TIME = 3.0  # s after which there are no more of them
    SLOW = 0.5  # s for an answer that a resolver has at hand, to warn
    BURST = 16  # queries at once, to see whether one overtakes another
    IDLE_LIMIT = 65.0  # s to wait for an idle connection to close

    def __init__(
        self,
        endpoint: Endpoint,
        trust: Trust,
        *,
        domain: str = "",
        idle: bool = False,
        clock: Callable[[], float] = elapsed,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.endpoint = endpoint
        self.domain = domain  # that it is for, or empty
        self.findings: list[Finding] = []
        self.dates: tuple[int, int] | None = None  # of the certificate
        self.failure: UpstreamError | None = None
        self._trust = trust
        self._idle = idle
        self._clock = clock
        self._wall = wall
        self._deadline = math.inf
        self._check = "connect"  # what is being looked at
        soa = encode_domain(domain) + PAIR.pack(TYPE_SOA, 1) if domain else b""
        self._question = soa or ROOT_QUESTION  # what a resolver has at hand
        self._thread = threading.Thread(
            target=self._run, name=f"doctor-{endpoint.host}", daemon=True
        )

    def start(self) -> None:
        """Start to examine it."""
        self._deadline = self._clock() + self.TIME_LIMIT
        self._thread.start()

    @property
    def running(self) -> bool:
        """Tell whether it is under way."""
        return self._thread.is_alive()

    @property
    def lacks_ipv6(self) -> bool:
        """Tell whether it failed for want of an IPv6 network."""
        unreachable = self.failure is not None and self.failure.cause == "unreachable"
        return unreachable and ":" in self.endpoint.host

    def report(self) -> Report:
        """Wait for the end, if it comes in time, and return what was found."""
        limit = self._deadline + (self.IDLE_LIMIT if self._idle else 0.0)
        self._thread.join(max(0.0, limit - self._clock()) + 1.0)
        findings = list(self.findings)
        if self.running:
            text = f"no end within {self.TIME_LIMIT:g} s"
            findings.append(Finding(self._check, FAIL, text, "try again"))
        if not self.domain:
            return Report(str(self.endpoint), findings)
        return Report(f"{self.endpoint} for {self.domain}", as_routed(findings))

    def _run(self) -> None:
        try:
            self._look_at_network()
            with self._visit("handshake") as visit:
                self._look_at_peer(visit)
                self._look_at_answers(visit)
                self._look_at_another(visit.connection.session())
                if self._idle:
                    self._look_at_idle_life(visit)
        except UpstreamError as error:
            self._note_failure(error)
        except Exception:
            logger.exception("internal error: upstream=%s", self.endpoint)
            self._note(self._check, FAIL, "internal error: see the log")

    def _note(self, check: str, result: str, detail: str, *, cure: str = "") -> None:
        self.findings.append(Finding(check, result, detail, cure))

    def _note_failure(self, error: UpstreamError) -> None:
        self.failure = error
        shown = error.cause == "certificate"
        check = "certificate" if shown else self._check
        self._note(check, FAIL, str(error), cure=cure_of(error, self.endpoint))
        if not shown:
            return
        with contextlib.suppress(OSError, FormatError):
            certificate = fetch_certificate(self.endpoint, self._left(self.STEP))
            self.dates = certificate_dates(certificate)
            dates = " to ".join(map(when, self.dates))
            pin = public_key_pin(certificate)
            self._note("shown", WARN, f"valid from {dates}, pin {pin}; not trusted")

    def _left(self, seconds: float) -> float:
        """Return how long a step may take, of at most so many seconds."""
        return max(0.1, min(seconds, self._deadline - self._clock()))

    @contextlib.contextmanager
    def _visit(
        self, check: str, session: ssl.SSLSession | None = None
    ) -> Iterator[Visit]:
        self._check = check
        patience = self._left(self.STEP)
        visit = Visit(
            self.endpoint, self._trust, self._clock, patience=patience, session=session
        )
        try:
            visit.open()
            yield visit
        finally:
            visit.close()

    def _look_at_network(self) -> None:
        roads = reach(self.endpoint, self._left(self.STEP), self._clock)
        failures = [road.failure for road in roads if road.failure is not None]
        if len(failures) == len(roads):
            raise failures[0]
        self._note("connect", WARN if failures else OK, "; ".join(map(str, roads)))

    def _look_at_peer(self, visit: Visit) -> None:
        peer = visit.connection.peer()
        if peer is None:
            self._note("handshake", OK, "none: plain DNS in clear text")
            return
        self.dates = certificate_dates(peer.certificate)
        now = self._wall()
        self.findings += examine_peer(peer, self.dates[1], now, visit.handshake)

    def _look_at_answers(self, visit: Visit) -> None:
        self._check = "answers"
        answers: list[Answer] = []
        end = self._clock() + self.SAMPLE_TIME
        while len(answers) < self.SAMPLES and self._clock() < end:
            answers += visit.ask([self._question], self._left(self.STEP))
        seconds = [seconds for _, _, seconds in answers]
        self.findings.append(examine_latency(seconds, self.SLOW))
        responses = [response for _, response, _ in answers]
        self.findings += examine_options(responses)
        if responses[-1].rcode in FAILURE_RCODES:
            asked = f"{self.domain} SOA" if self.domain else ". NS"
            raise UpstreamError("unwilling", describe_refusal(responses[-1], asked))

    def _look_at_another(self, session: ssl.SSLSession | None) -> None:
        """Make a second connection: to resume the session, and ask much at once."""
        with self._visit("resumption", session) as visit:
            if (peer := visit.connection.peer()) is not None:
                resumed = "resumed" if peer.resumed else "not resumed"
                taken = milliseconds(visit.handshake)
                self._note("resumption", OK, f"session {resumed}, handshake in {taken}")
            self._check = "order"
            # The first has to be looked for elsewhere; the others may overtake it.
            name = f"{os.urandom(8).hex()}.{self.domain or 'example.com'}"
            questions = [self._question] * self.BURST
            questions[0] = encode_domain(name) + PAIR.pack(1, 1)  # A IN
            answers = visit.ask(questions, self._left(self.STEP))
        self.findings.append(examine_order(visit.sent, answers))

    def _look_at_idle_life(self, visit: Visit) -> None:
        self._check = "idle"
        life = visit.wait_for_end(self.IDLE_LIMIT)
        text = f"still open after {self.IDLE_LIMIT:g} s"
        self._note("idle", OK, text if life is None else f"closed after {life:.1f} s")


def examine_upstreams(examinations: Sequence[Examination]) -> list[Report]:
    """Examine servers at once; IPv6 may be missing where others do without."""
    reports: list[Report] = []
    for first in range(0, len(examinations), EXAMINERS):
        batch = examinations[first : first + EXAMINERS]
        for examination in batch:
            examination.start()
        reports += [examination.report() for examination in batch]
    served = {each.domain for each in examinations if each.failure is None}
    for examination, report in zip(examinations, reports):
        if examination.lacks_ipv6 and examination.domain in served:
            last = report.findings.pop()
            report.findings.append(last._replace(result=WARN, cure=""))
    return reports


def examine(
    config: Config,
    clock: Callable[[], float] = elapsed,
    wall: Callable[[], float] = time.time,
) -> list[Report]:
    """Examine this host and every upstream; blocks for about ten seconds at most."""
    host = describe_host(config)
    host += [examine_address(address, config.listen_given) for address in config.listen]
    for address in config.tls_listen:
        host.append(examine_stream_address(address, "TLS", "--tls-listen"))
    if config.admin:
        host.append(examine_stream_address(config.admin, "HTTP", "--admin"))
    host += examine_parts(config)
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)  # hard: it takes that
    host += [examine_user(config.user), examine_descriptors(config, limit)]
    examinations: list[Examination] = []
    try:
        trust = Trust(config.ca_file, pins=config.pin, tls_min=config.tls_min)
        host.append(examine_authorities(trust))
        idle = config.doctor == "idle"
        servers = [("", endpoint) for endpoint in config.upstream]
        examinations = [
            Examination(
                endpoint, trust, domain=domain, idle=idle, clock=clock, wall=wall
            )
            for domain, endpoint in [*servers, *config.route]
        ]
    except ConfigError as error:
        detail, _, cure = str(error).partition("; ")
        detail += ": upstreams are not examined"
        host.append(Finding("CA certificates", FAIL, detail, cure))
    reports = examine_upstreams(examinations)
    dates = [each.dates for each in examinations if each.dates is not None]
    host.append(examine_clock(wall(), dates))
    return [Report("this host", host), *reports]


def count_results(reports: Iterable[Report]) -> collections.Counter[str]:
    """Count the findings by their result."""
    return collections.Counter(
        finding.result for report in reports for finding in report.findings
    )


def text_report(reports: Sequence[Report]) -> str:
    """Write a table for people, and below it how to mend what fails."""
    width = max(len(f.check) for report in reports for f in report.findings)
    lines, cures = [], []
    for subject, findings in reports:
        lines.append(subject)
        for check, result, detail, cure in findings:
            lines.append(f"  {check:{width}}  {result:4}  {detail}")
            if cure:
                cures.append(f"  {subject}, {check}: {cure}")
    counts = count_results(reports)
    total = sum(counts.values())
    summary = f"{total} checks: {counts[FAIL]} failed, {counts[WARN]} to note"
    return "\n".join(map(printable, [*lines, "", summary, *cures]))


def json_report(reports: Sequence[Report]) -> str:
    """Write an object for machines."""
    counts = count_results(reports)
    checks = [
        {"subject": subject, **finding._asdict()}
        for subject, findings in reports
        for finding in findings
    ]
    result = next(each for each in (FAIL, WARN, OK) if counts[each])
    return json.dumps({"version": __version__, "result": result, "checks": checks})


# ---- Running -------------------------------------------------------------------------
# A Config becomes objects, and they run until a signal.


def build_proxy(config: Config, timer: Timer, witness: Witness) -> Proxy:
    """Build the proxy that these options ask for; raises ConfigError."""
    routed = [encode_domain(domain) for domain, _ in config.route]
    return Proxy(
        config.upstream,
        Trust(config.ca_file, pins=config.pin, tls_min=config.tls_min),
        timer,
        Cache(
            config.cache_size,
            min_ttl=config.cache_min_ttl,
            max_ttl=config.cache_max_ttl,
            fail_ttl=config.cache_fail_ttl,
            stale=config.cache_stale,
        ),
        timeout=config.timeout,
        max_in_flight=config.max_in_flight,
        strategy=config.strategy,
        routes=config.route,
        local=LocalAnswers((*config.forward_special, *routed)),
        guard=make_guard(config, routed),
        metrics=witness,
    )


class Daemon:
    """All objects of a running proxy, started and stopped in order."""

    DRAIN_EXTRA = 0.5  # s beyond the timeout that answers in flight may take at the end
    STUCK = 5.0  # s after which a receiving loop that has not come round hangs

    def __init__(
        self, config: Config, inherited: Sequence[tuple[str, socket.socket]] = ()
    ) -> None:
        """Build and bind everything; starts no thread. Raises ConfigError.

        With `inherited` sockets, and their names, those are served on in place of
        --listen; to clients of streams named `tls` in TLS.
        """
        names = [name for name, _ in inherited]
        self._identity = load_identity(config, ENCRYPTED_SOCKET in names)
        self._config = config
        self._metrics = Metrics()
        self._query_log: QueryLog | None = None
        if config.query_log is not None:
            self._query_log = query_log_to(
                config.query_log, config.log_format, config.query_log_privacy
            )
        self._timer = Timer()
        witness = Witness(self._metrics, self._query_log)
        self._proxy = build_proxy(config, self._timer, witness)
        self._workers = WorkerPool("worker", WORKERS, BACKLOG)
        limit = config.max_tcp_clients
        self._streams = WorkerPool("stream", limit + 1, limit)
        self._clients = Clients(limit, config.max_tcp_per_client)
        self._admission = Admission(
            config.allow, rate=config.rate_limit, limit_all=config.rate_limit_all
        )
        self.servers: list[UDPServer | TCPServer] = [
            self._adopt(*each) for each in inherited
        ] or bind_servers(config.listen, self._bind, config.listen_given)
        if config.tls_listen:
            self._bind_encrypted(config.tls_listen)
        self.admin = self._bind_admin(config.admin) if config.admin else None
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start to serve, and connect to the upstreams."""
        for part in (self._proxy, self._workers, self._streams, self._clients):
            self._metrics.add_collector(part.samples)
        if self._query_log is not None:
            self._query_log.start()
        self._timer.start()
        self._proxy.start()
        for server in self.servers:
            kind = "udp" if isinstance(server, UDPServer) else "tcp"
            kind = "tls" if isinstance(server, TLSServer) else kind
            name = f"{kind}-{server.server_address[0]!s}"
            self._start_thread(name, server.serve_forever)
        if self.admin is not None:
            self._start_thread("admin", self.admin.serve_forever)

    def reload(self) -> None:
        """Empty the cache; read certificate and key, and open the query log, again."""
        self._proxy.flush()
        if self._identity is not None:
            self._identity.reload()
        if self._query_log is not None:
            self._query_log.reopen()

    def _start_thread(self, name: str, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _bind_admin(self, address: Address) -> AdminServer:
        pages = AdminPages(
            *(self._metrics, self._proxy, self._timer, self.is_turning),
            listen=describe_servers(self.servers),
            cache_limit=self._config.cache_size,
        )
        self._timer.at(0.0, pages.take_reading)  # as soon as it runs
        try:
            return AdminServer(address, pages.by_path)
        except OSError as error:
            for server in self.servers:
                server.server_close()
            text = describe_bind_error(error, address, "--admin")
            raise ConfigError(text, status=1) from error

    def _bind(self, address: Address) -> tuple[TCPServer, UDPServer]:
        admission, proxy = self._admission, self._proxy
        tcp = TCPServer(
            address, proxy, self._streams, self._clients, admission=admission
        )
        try:
            same = (address[0], tcp.server_address[1])
            return tcp, UDPServer(same, proxy, self._workers, admission=admission)
        except OSError:
            tcp.server_close()
            raise

    def _bind_encrypted(self, addresses: Sequence[Address]) -> None:
        def bind(address: Address) -> tuple[TLSServer]:
            return (self._serve_encrypted(address),)

        try:
            self.servers += bind_servers(addresses, bind, True, "--tls-listen")
        except ConfigError:
            for server in self.servers:
                server.server_close()
            raise

    def _adopt(self, name: str, listener: socket.socket) -> UDPServer | TCPServer:
        address, admission = listener.getsockname()[:2], self._admission
        if listener.type == socket.SOCK_DGRAM:
            return UDPServer(
                *(address, self._proxy, self._workers),
                admission=admission,
                inherited=listener,
            )
        if name == ENCRYPTED_SOCKET:
            return self._serve_encrypted(address, listener)
        everything = address, self._proxy, self._streams, self._clients
        return TCPServer(*everything, admission=admission, inherited=listener)

    def _serve_encrypted(
        self, address: Address, inherited: socket.socket | None = None
    ) -> TLSServer:
        assert self._identity is not None
        everything = address, self._proxy, self._streams, self._clients
        return TLSServer(
            *everything,
            admission=self._admission,
            identity=self._identity,
            inherited=inherited,
        )

    def is_turning(self, now: float) -> bool:
        """Tell whether every loop that receives from clients has come round of late.

        `now`: of `time.monotonic`, as none comes round while the host sleeps.
        """
        return all(now - server.turned_at < self.STUCK for server in self.servers)

    def status(self) -> str:
        """Return a line that tells people how it does."""
        return self._proxy.status()

    def log_state(self) -> None:
        """Write the state of the proxy and of each upstream to the log."""
        for line in self._proxy.describe():
            logger.info("state: %s", line)

    def close(self) -> None:
        """Answer what is in flight, then end every thread and close every socket."""
        admin = [self.admin] if self.admin is not None else []
        stoppers = [
            threading.Thread(target=server.shutdown)
            for server in (*self.servers, *admin)
        ]
        for stopper in stoppers:
            stopper.start()
        for thread in stoppers + self._threads:
            thread.join()
        self._proxy.drain(min(self._config.timeout, CLIENT_PATIENCE) + self.DRAIN_EXTRA)
        self._clients.drop_all()
        self._workers.close()
        self._streams.close()
        self._proxy.close()
        self._timer.close()
        for server in (*self.servers, *admin):
            server.server_close()
        if self._query_log is not None:
            self._query_log.close()


def warn_of_strangers(config: Config) -> None:
    """Say what it means that strangers may ask, where they may."""
    wide = [network for network in config.allow if is_open(network)]
    if wide:
        logger.warning(
            "open to strangers: allow=%s rate_limit=%d; whoever forges a victim's "
            "address has the answers sent there; allow only networks of yours",
            ",".join(map(str, wide)),
            config.rate_limit,
        )


def tune_collector() -> None:
    """Have the garbage collector look less often at a cache of long-lived entries.

    CPU per uncached query 34 us instead of 43, where it was 32 without any collection.
    What makes garbage in cycles are errors of connections, which are few.
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def wait_for_signal(received: int, daemon: Daemon, supervisor: Supervisor) -> int:
    """Wait for a signal at its pipe; meanwhile report to the supervisor."""
    while not select.select([received], [], [], supervisor.patience())[0]:
        alive = daemon.is_turning(time.monotonic())
        supervisor.report(daemon.status(), alive=alive)
    return os.read(received, 1)[0]


def prepare(config: Config) -> tuple[Daemon, str]:
    """Bind and read everything, then give up root; return a line on what it runs as.

    Raises ConfigError.
    """
    inherited = inherited_sockets(os.environ)
    if inherited and config.listen_given:
        logger.warning("--listen is not used: sockets were passed by LISTEN_FDS")
    listeners = len(inherited) or 2 * len(config.listen)
    config = fit_descriptors(config, listeners + len(config.tls_listen))
    daemon = Daemon(config, inherited)
    user = renounce_root(config.user)
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return daemon, f"user={user} nofile={limit} umask={UMASK:03o}"


def run(config: Config, log: OperationalLog) -> int:
    """Serve until SIGTERM or SIGINT; return the exit status."""
    # Not a queue that the handlers fill: one that comes just before the main thread
    # waits for the queue's lock would not wake it.
    received, written = os.pipe()
    os.set_blocking(written, False)
    signal.set_wakeup_fd(written)
    supervisor = Supervisor(os.environ)
    daemon, host = prepare(config)
    log.start()
    actions: dict[int, Callable[[], None]] = {
        signal.SIGHUP: functools.partial(supervisor.reload, daemon.reload),
        signal.SIGUSR1: daemon.log_state,
    }
    for watched in (signal.SIGTERM, signal.SIGINT, *actions):
        signal.signal(watched, lambda *_: None)
    tune_collector()
    warn_of_strangers(config)
    daemon.start()
    encrypted = [each for each in daemon.servers if isinstance(each, TLSServer)]
    logger.info(
        "ready: listen=%s%s upstream=%s%s%s %s",
        describe_servers(each for each in daemon.servers if each not in encrypted),
        f" tls={describe_servers(encrypted)}" if encrypted else "",
        " ".join(str(endpoint) for endpoint in config.upstream),
        "".join(f" route={domain}={endpoint}" for domain, endpoint in config.route),
        f" admin={describe_servers([daemon.admin])}" if daemon.admin else "",
        host,
    )
    for domain, endpoint in config.route:
        if not endpoint.name:
            logger.info("not encrypted: domain=%s upstream=%s", domain, endpoint)
    supervisor.tell("READY=1", f"STATUS={daemon.status()}")
    while action := actions.get(wait_for_signal(received, daemon, supervisor)):
        action()
    logger.info("stopping")
    supervisor.tell("STOPPING=1", "WATCHDOG=1")  # the end may take as long as an answer
    daemon.close()
    return 0


def print_out(text: str) -> None:
    """Print what may have any character; raises ConfigError where nobody takes it."""
    try:
        print(text.encode("ascii", "backslashreplace").decode(), flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # where Python tries again
        reason = f"cannot write to stdout: {error.strerror}"
        raise ConfigError(reason, status=1) from error


def run_health_check(config: Config) -> int:
    """Print how the running proxy does; return the exit status. Raises ConfigError."""
    address = config.listen[0]
    if not address[1]:
        text = "--healthcheck cannot know the port: give --listen ADDR:PORT"
        raise ConfigError(text, status=1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # end without a traceback
    verdict = check_health(address, config.timeout + HEALTH_GRACE)
    print_out(verdict.line)
    return 0 if verdict.healthy else 1


def run_doctor(config: Config) -> int:
    """Print what the doctor finds; return the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # end without a traceback
    reports = examine(config)
    text = json_report if config.log_format == "json" else text_report
    print_out(text(reports))
    return 1 if count_results(reports)[FAIL] else 0


def hold_standard_streams() -> None:
    """Have descriptors 0 to 2 mean something: else what is opened next becomes one."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status: 0, 1 cannot run, 2 bad option."""
    hold_standard_streams()
    try:
        config = parse_args(
            sys.argv[1:] if arguments is None else arguments, os.environ
        )
        if config.healthcheck:
            return run_health_check(config)
        with logging_to_stderr(config.log_level, config.log_format) as log:
            return run_doctor(config) if config.doctor else run(config, log)
    except ConfigError as error:
        print(f"dotproxy: {error}", file=sys.stderr)
        return error.status


if __name__ == "__main__":
    sys.exit(main())
