#!/usr/bin/env python3
"""dotproxy: DNS in, DNS over TLS out, in one file of the standard library.

The path of a query

    UDP datagrams
      UDPServer.get_request        drain the socket: one request = one batch   [udp]
      UDPServer.process_request    Admission.verdict: REFUSED, TC or nothing for some
        Listener.answer            Proxy.lookup_from: an answer kept ready, byte for
                                   byte; else Proxy.lookup: parse_query, then Cache.get
                                   and Cache.answer, or LocalAnswers -> sendto, done
                                   Metrics.answered_at_once, and the query log
      UDPHandler.handle            Proxy.resolve: which group of upstreams
        UpstreamGroup.ask          join the same question in flight, or a new Exchange
        UpstreamGroup._best, _put  pick a link, which assigns an ID: Link.queue
        UpstreamGroup._again       without one it is parked, and a link is opened
        Plan.__exit__              Link.flush: encrypt and send all that has gathered
      ... that thread is free ...
      Link._read, _match           receive, decrypt, match ID and question [upstream]
      UpstreamGroup.link_answered  hand on, in these steps:
        Proxy.store                RebindingGuard.screen, Cache.put_all
        Proxy.answer               an answer for all who wait: reply -> sendto
        UpstreamGroup._refuse      SERVFAIL, REFUSED and the like: ask once more, at
                                   another upstream if there is one
      UpstreamGroup._check, _act   hedge, ask again, a stale answer (Proxy.serve_stale),
                                   SERVFAIL at the deadline (Proxy.fail)    [timer]

    TCP and DoT clients enter at the same Listener.answer and Proxy.resolve, from
    StreamHandler, with another reply. It waits in place for the client's rate, for room
    and for octets; on --tls-listen it shakes hands first, through a Channel.

    Where to look for other things

    a TTL                 Cache._prepare brings it within its bounds, once, in what is
                          stored and served; Cache.answer and Cache.renew count it down;
                          Cache.stale_answer sets it anew
    a link that ends      Link._run tells UpstreamGroup.link_ended: Upstream.note_end
                          judges health, _lose asks again what was left unanswered, and
                          puts whoever took down several links apart, into a lane
    an option             goes from OPTIONS into a field of the one Config; where it
                          acts is where `config.FIELD` is read: in Daemon.__init__, or
                          in a part that is given all of it
    start and end         run, Daemon.start; what the end does is stacked up in
                          Daemon.__init__, to be done in reverse

Contracts that carry the design

    Proxy.lookup(message)    never blocks, does no I/O, never raises; tells what it
                             answered in a list that its caller alone has.
    Proxy.resolve(queries)   never blocks; every `reply` is called exactly once, by
                             whichever thread has the answer, SERVFAIL at worst, but
                             for what is left when Proxy.drain gives up at the end.
    reply(message, client)   never blocks, never raises; an answer that its client
                             cannot take is dropped.
    Form                     what queries say beside ID and question; immutable, as many
                             queries, of many threads, share one.
    Exchange                 one question in flight. New, overdue, lost and refused all
                             mean "send a copy, wait for a link, or fail it".
    Plan                     what was decided under a group's lock, on memory alone, to
                             be carried out after it is released.

Threads

    main          waits for signals; meanwhile tells systemd how it goes, if it asks
    udp-*         one per listening socket: receives, answers from the cache, sends on
    tcp-*, tls-*  one per listening socket: accepts connections
    stream-*      pool, one per connected TCP or DoT client: shakes hands, reads,
                  answers from the cache, sends on
    upstream-*    one per link: connects, shakes hands, reads, replies
    timer         whatever has to happen later: UpstreamGroup._check and _look,
                  Proxy._refresh, Link._write_rest
    admin-*       accepts HTTP clients, each of which then has a thread of its own
    doctor-*      --doctor alone: pool, one per upstream
    log, querylog write the lines that others have made

    All are started after a process that began as root has become another user: it has
    then bound every port, read every file and imported every module that it needs.

Locks: which guards what, and which may be held while it is taken. None is held over a
callback or a call that waits for anybody else, but Writer's turn at stderr, for which
nobody but writers waits.

    UpstreamGroup.lock      exchanges, upstreams, what links have     Link._sending
                            pending and to send
    Link._sending           the socket, against two writers and a     -
                            close; octets not sent yet
    Channel._lock           the TLS object and its two buffers:       Link._sending,
                            memory alone                              StreamHandler's,
                                                                      TCPServer.turns
    StreamHandler._changed  octets not taken, queries in flight       -
    TCPServer.turns         who computes a step of a handshake        -
    Cache, Metrics, Timer, WorkerPool, RateLimiter, Clients,          -
    AdminServer             their own state, as said there
    LogHandler's own        messages logged of late                   itself
    Writer's                lines that wait                           LogHandler's

    Tables of forms, ready answers and free clients have no lock: only single operations
    of a dict or a set are used, which are atomic on every build. So it is where the
    thread of a link, and nobody else, takes out of Link.pending. Identity's context and
    the readings of AdminPages are replaced as a whole.
"""

from __future__ import annotations

import argparse
import base64
import bisect
import collections
import contextlib
import enum
import errno
import functools
import gc
import glob
import grp
import hashlib
import heapq
import importlib
import ipaddress
import itertools
import json
import logging
import math
import os
import pwd
import random
import re
import resource
import select
import shlex
import signal
import socket
import socketserver
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, NoReturn, TypeVar, Union

__version__ = "0.1.0"

logger = logging.getLogger("dotproxy")

T = TypeVar("T")


# ---- Protocol numbers and errors -----------------------------------------------------
# Names for wire values, and one error tree. Plain ints where they are tested per query:
# an IntEnum member takes 84 ns to compare, an int 31.

QR, AA, TC, RD, RA, AD, CD = 0x8000, 0x0400, 0x0200, 0x0100, 0x0080, 0x0020, 0x0010
OPCODE_MASK, OPCODE_OCTET = 0x7800, 0x78
RCODE_MASK = 0x000F
DO = 0x8000  # in the flags of an OPT record, RFC 3225
NOERROR, NXDOMAIN = 0, 3
TYPE_A, TYPE_NS, TYPE_SOA, TYPE_PTR, TYPE_HINFO, TYPE_AAAA = 1, 2, 6, 12, 13, 28
TYPE_OPT, TYPE_DS, TYPE_SVCB, TYPE_HTTPS = 41, 43, 64, 65
TYPE_IXFR, TYPE_AXFR, TYPE_ANY = 251, 252, 255
CLASS_IN = 1
OPTION_KEEPALIVE, OPTION_PADDING, OPTION_EDE = 11, 12, 15
# Of local use (RFC 6891 section 9): who sends it wants an answer that is not cached.
OPTION_UNCACHED = 65432

HEADER = struct.Struct("!HHHHHH")  # RFC 1035 section 4.1.1
RECORD = struct.Struct("!HHIH")  # behind a record's name: type, class, TTL, length
TTL = struct.Struct("!I")
PAIR = struct.Struct("!HH")  # option code and length, frame length and ID, ID and flags

MAX_NAME = 255  # octets with the root label, RFC 1035 section 2.3.4
MIN_MESSAGE = 12  # octets: a header
MAX_MESSAGE = 65535
MIN_UDP_SIZE = 512  # what every client takes, RFC 1035 section 4.2.1
MAX_UDP_SIZE = 1232  # no fragments on any common path, DNS flag day 2020
MIN_RECORD = 11  # octets: the root as its name, and no data
MAX_KNOWN = 512  # octets of a query whose form is remembered
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
# record is real time. All times are of this clock but those that tell whether the loop
# of a server turns: `time.monotonic` leaves such seconds out, as systemd does.
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
DNS_PORT, DOT_PORT = 53, 853  # RFC 7858 section 3.1
CLOUDFLARE = tuple(
    Endpoint(host, DOT_PORT, "cloudflare-dns.com")
    for host in ("1.1.1.1", "1.0.0.1", "2606:4700:4700::1111", "2606:4700:4700::1001")
)


class Config(NamedTuple):
    """All options, checked."""

    listen: tuple[Address, ...] = (("127.0.0.1", 5353), ("::1", 5353))
    upstream: tuple[Endpoint, ...] = CLOUDFLARE
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
    reuse_port: bool = False
    allow: tuple[Network, ...] = LOCAL_NETWORKS
    rate_limit: float = 50.0  # queries/s: ten times what a busy household asks
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

Transport = tuple[str, str]  # udp, tcp or dot; 1 for IPv4, 2 for IPv6
UDP_TRANSPORT = "udp", "1"
Counts = tuple[int, int, int]  # of answers, authority and additional records
ClientAddress = tuple[str, int]  # with two more numbers for IPv6
NO_CLIENT = "", 0  # the client of a query that none has asked
# What a TCP client is told of the idle timeout, if it asks (RFC 7828).
KEEPALIVE_TOLD = struct.pack("!HHH", OPTION_KEEPALIVE, 2, CLIENT_IDLE_TIMEOUT * 10)
TRANSFERS = TYPE_IXFR.to_bytes(2, "big"), TYPE_AXFR.to_bytes(2, "big")
ANY = TYPE_ANY.to_bytes(2, "big")
# How much EDNS an upstream gets: none, an OPT record, with keepalive, and with padding,
# which hides nothing in clear text (RFC 7830 section 6).
NO_EDNS, NO_OPTIONS, UNPADDED, PADDED = range(4)


def build_opt(edns_flags: int, options: bytes, rcode: int = 0) -> bytes:
    """Build an OPT record, which carries the upper bits of the RCODE."""
    ttl = rcode >> 4 << 24 | edns_flags
    return b"\0" + RECORD.pack(TYPE_OPT, MAX_UDP_SIZE, ttl, len(options)) + options


def split_options(options: bytes) -> dict[int, bytes]:
    """Return EDNS options by code, as on the wire, those of one code together."""
    found: dict[int, bytes] = {}
    offset = 0
    while offset < len(options):
        head = options[offset : offset + 4]
        end = offset + 4 + int.from_bytes(head[2:], "big")
        if end > len(options):
            raise FormatError("EDNS option past the end")
        code = int.from_bytes(head[:2], "big")
        found[code] = found.get(code, b"") + options[offset:end]
        offset = end
    return found


def find_option(options: bytes, wanted: int) -> bytes | None:
    """Return the data of the first option with this code."""
    found = split_options(options).get(wanted)
    return found and found[4 : 4 + (found[2] << 8 | found[3])]


class Form:
    """What queries say beside their ID and their name; immutable, and shared.

    OPT is hop by hop (RFC 6891 section 6.1.1): no option of a client goes on.
    """

    __slots__ = (
        *("answer_flags", "answer_mask", "cachable", "edns_flags", "flags", "key"),
        *("limit", "more_key", "opt", "padded", "refusal", "storable", "transport"),
        "upstream_head",
    )

    def __init__(
        self,
        transport: Transport,
        flags: int = 0,
        kind: bytes = bytes(4),
        opt: tuple[int, int, bytes] | None = None,
    ) -> None:
        """Make one; `kind`: QTYPE and QCLASS; `opt`: class, TTL and data of OPT."""
        size, ttl, options = opt or (0, 0, b"")
        told, proto, self.transport = split_options(options), transport[0], transport
        self.flags, self.edns_flags = flags, ttl & DO
        room = max(MIN_UDP_SIZE, min(size, MAX_UDP_SIZE))
        self.limit = room if proto == "udp" else MAX_MESSAGE  # octets of the answer
        self.padded = proto == "dot" and OPTION_PADDING in told  # the answer
        self.refusal = int(Rcode.REFUSED) if kind[:2] in TRANSFERS else 0  # RCODE
        if ttl & 0xFF0000:
            self.refusal = int(Rcode.BADVERS)
        # May it come from the cache, and go there? What TCP clients get of ANY is not
        # for UDP, and no answer stands for a refusal.
        plain = OPTION_UNCACHED not in told and kind[:2] != ANY
        self.cachable = plain and not self.refusal
        self.storable = self.cachable and flags & RD != 0
        self.key = kind + bytes([flags & CD | self.edns_flags >> 15])  # ends cache keys
        self.more_key = b"" if self.storable else bytes([flags >> 8 & 1])
        # AD is for those who say that they understand it, RFC 6840 section 5.7: we do.
        mine = RD | CD if flags & AD or ttl & DO else RD | CD | AD
        self.answer_mask = ~mine  # of flags that an answer has from the response
        self.answer_flags = flags & (RD | CD) | RA
        self.upstream_head = HEADER.pack(0, flags & (RD | CD) | AD, 1, 0, 0, 1)[2:]
        keepalive = proto != "udp" and OPTION_KEEPALIVE in told
        answer_options = KEEPALIVE_TOLD if keepalive else b""
        self.opt = build_opt(ttl & DO, answer_options) if opt else b""


class Query:
    """A well-formed query: what was asked, by whom, and how."""

    __slots__ = (
        *("cache_key", "client", "form", "id", "key", "question", "received", "size"),
        "stale",
    )

    def __init__(self, ident: int, question: bytes, form: Form, size: int) -> None:
        self.id = ident
        self.question = question  # QNAME, QTYPE and QCLASS as sent, case included
        self.form = form
        self.size = size  # octets of the message
        # AD is in no key: it is asked for always, and taken out for who did not ask.
        # Lengths of labels are below "A": lower() changes letters only.
        key = question[:-4].lower() + form.key
        if form.storable:
            self.key = self.cache_key = key  # equal for what has the same answer
        else:
            self.key = key + form.more_key
            self.cache_key = key if form.cachable else b""
        self.client: ClientAddress = NO_CLIENT
        self.received = 0.0
        self.stale: CacheEntry | None = None  # expired, but it may answer


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
    if offset - 11 > MAX_NAME or offset + 5 > len(message):
        raise FormatError("QNAME longer than 255 octets, or question past the end")
    return offset + 5


def skip_name(message: bytes, offset: int) -> int:
    """Return the offset past a name, which a pointer ends; may raise IndexError."""
    while length := message[offset]:
        if length >= 0xC0:
            return offset + 2
        offset += LABEL_SIZES[length]
    return offset + 1


def parse_form(transport: Transport, frame: bytes) -> Form:
    """Read a query without ID and QNAME; raises FormatError.

    Octets behind the last record mean nothing: some embedded resolvers send them.
    """
    _, flags, questions, answers, authority, extra = HEADER.unpack(b"\0\0" + frame[:10])
    if flags & OPCODE_MASK:
        raise FormatError("opcode other than QUERY", Rcode.NOTIMP)
    if questions != 1:
        raise FormatError(f"QDCOUNT {questions}")
    kind, opt, offset = frame[10:14], None, 14
    if (answers or authority) and kind[:2] not in TRANSFERS:
        raise FormatError("records in the answer or authority section of a query")
    try:
        for _ in range(answers + authority + extra):
            name, offset = frame[offset], skip_name(frame, offset)
            found, size, ttl, length = RECORD.unpack_from(frame, offset)
            offset += 10 + length
            if found == TYPE_OPT:
                if opt or name:
                    raise FormatError("misplaced OPT record")
                opt = size, ttl, frame[offset - length : offset]
    except (IndexError, struct.error):
        raise FormatError("record past the end") from None
    if offset > len(frame):
        raise FormatError("RDLENGTH past the end")
    return Form(transport, flags, kind, opt)


# 1.1 us less for a query that says what others said.
known_form = functools.lru_cache(maxsize=1024)(parse_form)


def parse_query(message: bytes, transport: Transport = UDP_TRANSPORT) -> Query:
    """Parse a header with QR=0 and more; raises FormatError with the RCODE to answer.

    Zone transfers and EDNS versions above 0 parse, with a `refusal`.
    """
    try:
        end = end_of_question(message)
    except FormatError as error:
        if message[2] & OPCODE_OCTET:
            error.rcode = Rcode.NOTIMP
        raise
    size = len(message)
    read = known_form if size <= MAX_KNOWN else parse_form
    form = read(transport, message[2:12] + message[end - 4 :])
    return Query(message[0] << 8 | message[1], message[12:end], form, size)


@functools.lru_cache(maxsize=1024)  # 0.1 us against 0.7 us; few shapes of query recur
def _upstream_opt(length: int, edns_flags: int, edns: int) -> bytes:
    """Build the OPT record behind a question of `length` octets."""
    options = b"" if edns == NO_OPTIONS else PAIR.pack(OPTION_KEEPALIVE, 0)
    if edns == PADDED:
        padding = -(12 + length + 11 + len(options) + 4) % QUERY_BLOCK
        options += PAIR.pack(OPTION_PADDING, padding) + bytes(padding)
    return build_opt(edns_flags, options)


def build_upstream_query(query: Query, edns: int = PADDED) -> bytes:
    """Build what goes upstream, without its ID: RD, CD and DO kept, AD set."""
    form, question = query.form, query.question
    if edns == NO_EDNS:
        return form.upstream_head[:-1] + b"\0" + question
    opt = _upstream_opt(len(question), form.edns_flags, edns)
    return form.upstream_head + question + opt


class Response:
    """A well-formed response, without its OPT record, ready to be served."""

    __slots__ = (
        *("body", "counts", "flags", "message", "negative_ttl", "options", "rcode"),
        *("ttl_offsets", "ttls", "upstream_options"),
    )

    def __init__(
        self,
        flags: int,
        counts: Counts = (0, 0, 0),
        body: bytes = b"",
        ttls: Sequence[int] = (),
        ttl_offsets: Sequence[int] = (),
        negative_ttl: int | None = None,
    ) -> None:
        self.flags = flags
        self.rcode = flags & RCODE_MASK  # with the upper bits of the OPT record
        self.message = b""  # as it came; one of our own has none
        self.counts = counts  # without the OPT record
        self.body = body  # the records, as on the wire
        self.ttls = ttls  # of all records
        self.ttl_offsets = ttl_offsets  # into the body
        self.negative_ttl = negative_ttl  # of an SOA record of the authority
        self.options = b""  # Extended DNS Errors, for clients that speak EDNS
        self.upstream_options = b""  # all, for who owns the connection


@functools.lru_cache(maxsize=1024)  # of MAX_UDP_SIZE octets at most; 0.1 us, not 1
def read_opt(record: bytes) -> tuple[int, bytes, bytes] | tuple[()] | None:
    """Return upper RCODE bits, options and Extended DNS Errors of one OPT record.

    Return an empty tuple if it has none of them, and None for anything else.
    """
    length = (record[9] << 8 | record[10]) if len(record) >= 11 else 0
    if record[:3] != b"\0\0\x29" or len(record) != 11 + length:
        return None
    if length == record[5] == 0:
        return ()
    options = record[11:]
    return record[5] << 4, options, split_options(options).get(OPTION_EDE, b"")


def parse_response(message: bytes, end: int) -> Response:
    """Parse a response whose question ends at `end`; raises FormatError.

    Dropped are what follows the OPT record, as that section is optional (RFC 2181
    section 9), octets behind the last record, and AA: who forwards has none.
    """
    _, flags, questions, answers, authority, extra = HEADER.unpack_from(message)
    if questions != 1:
        raise FormatError(f"QDCOUNT {questions}")
    sure, size, told, denied = answers + authority, len(message), None, None
    # The number of a record that is OPT, mostly.
    lone = sure if extra == 1 and size <= MAX_UDP_SIZE else -1
    ttls: list[int] = []
    offsets: list[int] = []
    offset, behind = end, 0
    try:
        for number in range(sure + extra):
            if number == lone and (told := read_opt(message[offset:])) is not None:
                behind, offset, extra = offset, size, 0
                break
            start, pointed = offset, message[offset] >= 0xC0
            offset = offset + 2 if pointed else skip_name(message, offset)
            rrtype, _, ttl, length = RECORD.unpack_from(message, offset)
            offset += 10 + length
            if rrtype == TYPE_OPT:
                opt = read_opt.__wrapped__(message[start:offset])
                if number < sure or behind or opt is None:
                    raise FormatError("misplaced or malformed OPT record")
                told, behind, extra = opt, start, number - sure
            elif not behind:
                ttls.append(ttl)
                offsets.append(offset - length - 6 - end)
                if rrtype == TYPE_SOA and answers <= number < sure and length >= 20:
                    denied = min(ttl, *TTL.unpack_from(message, offset - 4))
    except (IndexError, struct.error):
        raise FormatError("record past the end") from None
    if offset > size:
        raise FormatError("RDLENGTH past the end")
    counts, body = (answers, authority, extra), message[end : behind or offset]
    response = Response(flags & ~AA, counts, body, ttls, offsets, denied)
    response.message = message if offset == size else message[:offset]
    if told:
        upper, response.upstream_options, response.options = told
        response.rcode |= upper
    return response


def parse_misfit(message: bytes, question: bytes) -> Response:
    """Parse what does not begin with the very question; raises FormatError.

    Letters prove nothing, as connection and ID are ours (RFC 5452 section 9.1). Some
    servers send failures without the question.
    """
    end = 12 + len(question)
    name, kind = message[12 : end - 4], message[end - 4 : end]
    is_response = message[2] >= 0x80
    if is_response and (name.lower(), kind) == (question[:-4].lower(), question[-4:]):
        return parse_response(message, end)
    if is_response and message[4:6] == b"\0\0":
        response = parse_response(message[:5] + b"\1" + message[6:], 12)
        if response.rcode in FAILURE_RCODES and not response.body:
            response.message = b""
            return response
    raise FormatError("no response to the question that was asked")


def _cut(
    response: Response, body: bytes, room: int, secure: int
) -> tuple[int, bytes, Counts]:
    """Return TC or 0, as many whole records as there is room for, and their counts.

    Sections behind the answer go without TC (RFC 2181 section 9), but not an SOA record
    that says no, proofs (`secure`, RFC 4035 section 3.1.3.3) and referrals (RFC 9471).
    """
    answers, authority, extra = response.counts
    ends = [0]
    for offset in response.ttl_offsets[: room // MIN_RECORD + 1]:
        ends.append(offset + 6 + (body[offset + 4] << 8 | body[offset + 5]))
    kept = bisect.bisect_right(ends, room) - 1
    whole = answers, answers + authority, answers + authority + extra
    needed = whole[1]
    if response.negative_ttl is None and not (answers and secure):
        needed = answers or whole[2]
    flags = TC if kept < needed else 0
    if not flags:
        kept = max(number for number in whole if number <= kept)
    answers = min(kept, answers)
    authority = min(kept - answers, authority)
    return flags, body[: ends[kept]], (answers, authority, kept - answers - authority)


def build_answer(
    query: Query,
    response: Response,
    body: bytes | None = None,
    options: bytes | None = None,
) -> bytes:
    """Build the client's answer; of one that does not fit, what does.

    `body` and `options` stand for those of the response, which go first.
    """
    form, question, rcode = query.form, query.question, response.rcode
    flags = response.flags & form.answer_mask | form.answer_flags
    if options is None:
        options = response.options
    if body is None:
        body = response.body
    opt = form.opt  # of a client that sent none there is none
    if opt:
        if options or rcode > 15:
            opt = build_opt(form.edns_flags, options + opt[11:], rcode)
    elif rcode > 15:
        flags = flags & ~RCODE_MASK | Rcode.SERVFAIL
    answers, authority, extra = response.counts
    size = 12 + len(question) + len(body) + len(opt)
    if size > form.limit:
        opt = opt and build_opt(form.edns_flags, form.opt[11:], rcode)
        room = form.limit - 12 - len(question) - len(opt)
        truncated, body, counts = _cut(response, body, room, form.edns_flags)
        flags, (answers, authority, extra) = flags | truncated, counts
        size = 12 + len(question) + len(body) + len(opt)
    if opt:
        extra += 1
        if form.padded and size + 4 <= form.limit:
            # To whole blocks, RFC 8467 section 4.2, but not beyond the limit.
            padding = min(-(size + 4) % ANSWER_BLOCK, form.limit - size - 4)
            told = opt[11:] + PAIR.pack(OPTION_PADDING, padding) + bytes(padding)
            opt = build_opt(form.edns_flags, told, rcode)
    head = HEADER.pack(query.id, flags, 1, answers, authority, extra)
    return head + question + body + opt


def with_ttls(response: Response, change: Callable[[int], int]) -> bytes:
    """Return the records of a response with every TTL changed by `change`."""
    body = bytearray(response.body)
    for offset in response.ttl_offsets:
        (ttl,) = TTL.unpack_from(body, offset)
        TTL.pack_into(body, offset, change(ttl))
    return bytes(body)


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
    flags = QR | RA | (message[2] << 8) & (OPCODE_MASK | RD) | rcode
    return message[:2] + flags.to_bytes(2, "big") + bytes(8)


def build_short_answer(
    message: bytes, rcode: Rcode, *, flags: int = 0, options: Sequence[bytes] = ()
) -> bytes:
    """Build an answer without records, never longer than its query.

    Of `options`, for a client that sent OPT, the first that fit are taken.
    """
    try:
        query = parse_query(message)
    except FormatError as error:
        return build_format_error(message, rcode or error.rcode)
    response = error_response(rcode)
    response.flags |= flags
    answers = (build_answer(query, response, options=each) for each in options)
    short = (answer for answer in answers if len(answer) <= len(message))
    return next(short, build_answer(query, response))


def split_frames(octets: bytes) -> tuple[list[bytes], bytes]:
    """Split a stream into messages (RFC 1035 section 4.2.2) and what is left over."""
    messages, offset, size = [], 0, len(octets)
    while size - offset >= 2:
        end = offset + 2 + (octets[offset] << 8 | octets[offset + 1])
        if end > size:
            break
        messages.append(octets[offset + 2 : end])
        offset = end
    return messages, octets[offset:]


def answerable(message: bytes) -> bool:
    """Tell whether a message deserves an answer: a whole header, no response."""
    return len(message) >= MIN_MESSAGE and message[2] < 0x80


# ---- Metrics -------------------------------------------------------------------------
# One table says what there is. What happens per query is counted here, and goes on to
# the query log, where there is one; the rest is asked for when somebody looks.

CACHE, STALE, UPSTREAM, LOCAL = SOURCES = "cache", "stale", "upstream", "local"
# Why some got no answer, as counted here; Clients counts "connections".
TURNED_AWAY = "acl", "rate-limit", "slip", "overload", "format-error"
# CoreDNS's buckets, in seconds and octets.
LATENCIES = tuple(0.00025 * 2**n for n in range(16))
SIZES = 0, 100, 200, 300, 400, 511, 1023, 2047, 4095, 8291, 16e3, 32e3, 48e3, 64e3


def numbered(text: str) -> dict[int, str]:
    """Read a table of numbers and their names."""
    words = text.split()
    return dict(zip(map(int, words[::2]), words[1::2]))


TYPE_NAMES = numbered(
    "1 A 2 NS 5 CNAME 6 SOA 12 PTR 15 MX 16 TXT 28 AAAA 33 SRV 35 NAPTR 39 DNAME 43 DS "
    "44 SSHFP 46 RRSIG 47 NSEC 48 DNSKEY 50 NSEC3 52 TLSA 64 SVCB 65 HTTPS 251 IXFR "
    "252 AXFR 255 ANY 257 CAA"
)
RCODE_NAMES = numbered(
    "0 NOERROR 1 FORMERR 2 SERVFAIL 3 NXDOMAIN 4 NOTIMP 5 REFUSED 6 YXDOMAIN 7 YXRRSET "
    "8 NXRRSET 9 NOTAUTH 10 NOTZONE 16 BADVERS 23 BADCOOKIE"
)

# A `= heading`, or the name of a metric without `dotproxy_`, labels, which of FORMS the
# dashboard shows, and help. Names that end in _total are those of counters, and `time`
# and `size` are shown of histograms.
TABLE = """
= Overview
build_info | version,python,openssl | now | What runs.
process_start_time_seconds | - | age | When the process started.
queries_in_flight | - | now | Queries of clients that wait for an answer.
= Queries
dns_requests_total | proto,family,type | rate | Queries answered.
dns_responses_total | rcode,source | rate | Responses, by where they came from.
dns_request_duration_seconds | source | time | Time from a query to its answer.
dns_request_size_bytes | - | size | Size of queries.
dns_response_size_bytes | - | size | Size of responses.
dns_do_requests_total | - | rate | Queries that ask for DNSSEC records (DO bit).
turned_away_total | reason | rate | Queries and connections turned away or dropped.
= Cache
cache_hits_total | - | ratio | Queries answered from the cache, without stale answers.
cache_misses_total | - | rate | Queries that the cache could not answer.
cache_served_stale_total | - | rate | Queries with an expired answer (RFC 8767).
cache_entries | - | now | Answers in the cache.
cache_size_bytes | - | bytes | Memory that the cache's answers take.
cache_evictions_total | - | rate | Answers put out to make room.
cache_prefetch_total | - | rate | Cached answers asked for again with nobody waiting.
= Upstreams
upstream_up | upstream | now | Whether the upstream answers, as far as is known.
upstream_requests_total | upstream | rate | Queries sent to it, with those sent again.
upstream_request_duration_seconds | upstream | time | Time the upstream took to answer.
upstream_latency_seconds | upstream | most | Smoothed latency, by which it is chosen.
upstream_failures_total | upstream,cause | rate | Broken connections; `rcode`: answers.
upstream_connections | upstream | now | Open connections.
upstream_conn_cache_hits_total | upstream | ratio | Queries sent over open connections.
upstream_conn_cache_misses_total | upstream | rate | Queries that waited for a new one.
upstream_handshakes_total | upstream,result | rate | `full`, `resumed`, or why not.
upstream_closes_total | upstream,reason | rate | Open connections that ended.
upstream_replays_total | upstream | rate | Queries sent again as their connection broke.
upstream_hedges_total | upstream | rate | Copies of overdue queries sent here.
upstream_hedges_won_total | upstream | rate | Copies of overdue queries answered first.
upstream_idle_life_seconds | upstream | most | How long it keeps idle connections.
upstream_certificate_expiry_timestamp_seconds | upstream | left | Certificate's end.
= Limits
stream_clients | proto | now | Connected clients.
pool_threads_busy | pool | now | Threads of the pool at work.
pool_threads_limit | pool | now | Threads that the pool may have.
process_cpu_seconds_total | - | share | User and system CPU time.
process_resident_memory_bytes | - | bytes | Resident memory.
process_open_fds | - | now | Open file descriptors.
process_max_fds | - | now | File descriptors that may be open.
"""
LINES = re.sub("(?m)^(?=[a-z])(?!process_)", "dotproxy_", TABLE).strip().split("\n")
# Labels, form and help, by the name that Prometheus knows.
FAMILIES = {
    name: (labels.strip("-").split(","), form, text)
    for name, labels, form, text in (line.split(" | ") for line in LINES if "|" in line)
}


class Histogram:
    """Counts of values up to each bound; its owner guards changes, not looks."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.sum = 0.0
        self.counts = [0] * (len(bounds) + 1)  # by bucket

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value so many times."""
        self.counts[bisect.bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def rows(self) -> Iterator[tuple[str, list[str], float]]:
        """Return what Prometheus is told: suffix, label and number each."""
        counts = list(itertools.accumulate(self.counts))
        for bound, count in zip((*map(float, self.bounds), "+Inf"), counts):
            yield "_bucket", [f'le="{bound}"'], count
        yield "_sum", [], self.sum
        yield "_count", [], counts[-1]


# The full name of a metric, the values of its labels, and the value.
Sample = tuple[str, "tuple[str, ...]", "float | Histogram"]
STARTED = time.time()  # in seconds since 1970


def process_samples() -> Iterator[Sample]:
    """Return what is known of this process; what the system does not say is not."""
    versions = __version__, sys.version.split()[0], ssl.OPENSSL_VERSION
    yield "dotproxy_build_info", versions, 1
    yield "process_start_time_seconds", (), STARTED
    yield "process_cpu_seconds_total", (), time.process_time()
    yield "process_max_fds", (), resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    with contextlib.suppress(OSError):
        yield "process_open_fds", (), len(os.listdir("/dev/fd")) - 1  # but for its own
        with open("/proc/self/statm", "rb") as file:
            pages = int(file.read().split()[1])
        yield "process_resident_memory_bytes", (), pages * resource.getpagesize()


# An answer as it is counted: its source, the query's form, QTYPE as two octets, RCODE,
# and the octets of the query and of the answer.
Label = tuple[str, Form, bytes, int, int, int]
formless = functools.lru_cache(16)(Form)  # of messages that could not be parsed
Given = tuple[bytes, bytes, ClientAddress]  # a query, its answer and its client
# Label, answer, client, who gave it, when the query came, seconds until it was answered
Logged = tuple[Label, bytes, ClientAddress, "Endpoint | None", float, float]


def label_answer(query: Query, source: str, rcode: int, size: int) -> Label:
    """Say what is counted of an answer of `size` octets."""
    return source, query.form, query.question[-4:-2], rcode, query.size, size


class Metrics:
    """Is told of every answer and of who gets none; any thread may call, none waits."""

    MAX_LABELS = 1024  # sorts of answer that are counted apart before they are summed

    def __init__(self, query_log: QueryLog | None = None) -> None:
        self.query_log = query_log
        # Are called by whoever looks; added to before any thread is started.
        self.collectors: list[Callable[[], Iterable[Sample]]] = [process_samples]
        self._lock = threading.Lock()  # guards all below
        # To count labels as they come, and sum them up when somebody looks, costs a hit
        # 0.15 us; to add to each number that they stand for, more than 1 us.
        self._labels: collections.Counter[Label] = collections.Counter()
        self._durations = {source: Histogram(LATENCIES) for source in SOURCES}
        self._misses = 0
        self._sizes = {name: Histogram(SIZES) for name in ("request", "response")}
        # By the part of a name between `dotproxy_` and `_total`, and labels.
        self._counts: collections.Counter[tuple[str, tuple[str, ...]]]
        self._counts = collections.Counter()
        # What is usual is there from the start: a rate needs a 0 to begin with.
        for name, *values in (
            ("dns_requests", ("udp", "tcp"), "12", ("A", "AAAA")),
            ("dns_responses", ("NOERROR", "SERVFAIL", "NXDOMAIN"), SOURCES),
            ("turned_away", TURNED_AWAY),
            *(("cache_hits",), ("cache_served_stale",), ("dns_do_requests",)),
        ):
            for labels in itertools.product(*values):
                self._counts[name, labels] = 0

    def answered_at_once(
        self, tally: list[Label], given: Sequence[Given], times: tuple[float, float]
    ) -> None:
        """Count a batch that nobody had to wait for; `times`: when it came, seconds.

        `given`: what each label of `tally` stands for, where there is a query log.
        """
        rest = [label[0] for label in tally if label[0] != CACHE]
        durations, seconds = self._durations, times[1]
        with self._lock:
            self._count_locked(tally)
            durations[CACHE].observe(seconds, len(tally) - len(rest))
            for source in rest:
                durations[source].observe(seconds)
        if self.query_log is not None:
            pairs = zip(tally, given)
            self.query_log.put([(t, g[1], g[2], None, *times) for t, g in pairs])

    def answered(self, answers: Sequence[Answered], origin: Origin, now: float) -> None:
        """Count those who had to wait and were answered together."""
        source, upstream = origin
        tally = [
            (source, query.form, query.question[-4:-2], rcode, query.size, len(answer))
            for query, answer, rcode in answers
        ]
        # Those of a batch came together: 0.1 us an answer less than to count each.
        runs = itertools.groupby([query.received for query, _, _ in answers])
        duration = self._durations[source]
        with self._lock:
            self._count_locked(tally)
            for received, run in runs:
                duration.observe(now - received, len(list(run)))
            if source in (UPSTREAM, LOCAL):
                self._misses += len(answers)
        if self.query_log is not None:
            self.query_log.put(
                [
                    (t, a, q.client, upstream, q.received, now - q.received)
                    for t, (q, a, _) in zip(tally, answers)
                ]
            )

    def turned_away(self, reason: str, number: int = 1) -> None:
        """Count so many queries or connections; `TURNED_AWAY` has the reasons."""
        with self._lock:
            self._counts["turned_away", (reason,)] += number

    def samples(self) -> list[Sample]:
        """Return everything there is to know now; any thread may ask."""
        found: list[Sample] = []
        with self._lock:
            self._sum_up_locked()
            found.append(("dotproxy_cache_misses_total", (), self._misses))
            for (name, labels), number in self._counts.items():
                found.append((f"dotproxy_{name}_total", labels, number))
        for name, size in self._sizes.items():
            found.append((f"dotproxy_dns_{name}_size_bytes", (), size))
        for source, duration in self._durations.items():
            found.append(("dotproxy_dns_request_duration_seconds", (source,), duration))
        found += itertools.chain(*(collect() for collect in self.collectors))
        return found

    def write(self) -> str:
        """Return it in Prometheus's text format 0.0.4, in the table's order."""
        blocks = {}
        for name, (_, form, text) in FAMILIES.items():
            kind = "histogram" if form in ("time", "size") else "gauge"
            kind = "counter" if name.endswith("_total") else kind
            blocks[name] = [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        for name, values, value in self.samples():
            # JSON escapes what Prometheus wants escaped.
            known = [f"{k}={json.dumps(v)}" for k, v in zip(FAMILIES[name][0], values)]
            single = [("", list[str](), value)]
            rows = value.rows() if isinstance(value, Histogram) else single
            for suffix, more, number in rows:
                pairs = ",".join(known + more)
                braced = f"{{{pairs}}}" if pairs else ""
                blocks[name].append(f"{name}{suffix}{braced} {number}")
        return "\n".join([*itertools.chain(*blocks.values()), ""])

    def _count_locked(self, tally: list[Label]) -> None:
        self._labels.update(tally)
        if len(self._labels) > self.MAX_LABELS:
            self._sum_up_locked()

    def _sum_up_locked(self) -> None:
        """Add up what the labels stand for: 1 ms at most, some times a minute."""
        counts = self._counts
        for (source, form, rrtype, rcode, size, answer), number in self._labels.items():
            kind = TYPE_NAMES.get(int.from_bytes(rrtype, "big"), "other")
            counts["dns_requests", (*form.transport, kind)] += number
            counts["dns_responses", (RCODE_NAMES.get(rcode, "other"), source)] += number
            if form.edns_flags & DO:
                counts["dns_do_requests", ()] += number
            if source == CACHE:
                counts["cache_hits", ()] += number
            elif source == STALE:
                counts["cache_served_stale", ()] += number
            elif source == LOCAL and rcode in (Rcode.FORMERR, Rcode.NOTIMP):
                counts["turned_away", ("format-error",)] += number
            self._sizes["request"].observe(size, number)
            self._sizes["response"].observe(answer, number)
        self._labels.clear()


# ---- Dashboard -----------------------------------------------------------------------
# What Grafana imports: a panel for each metric, below the headings of the table.

# NAME stands for a metric of the instances that are chosen, BY for its labels, OTHER
# for the misses to its hits.
CHOSEN = '{instance=~"$instance"}'
RATE = f"sum by (BY) (rate(NAME{CHOSEN}[$__rate_interval]))"
BUCKETS = f"sum by (le,BY) (rate(NAME_bucket{CHOSEN}[$__rate_interval]))"
QUANTILE = f"histogram_quantile(0.SHARE, {BUCKETS})"
FORMS = {  # unit and PromQL
    "rate": ("ops", RATE),
    "share": ("percentunit", RATE),
    "ratio": ("percentunit", f"{RATE} / ({RATE} + {RATE.replace('NAME', 'OTHER')})"),
    "now": ("short", f"sum by (BY) (NAME{CHOSEN})"),
    "bytes": ("bytes", f"sum by (BY) (NAME{CHOSEN})"),
    "most": ("s", f"max by (BY) (NAME{CHOSEN})"),
    "age": ("s", f"time() - min by (BY) (NAME{CHOSEN})"),
    "left": ("s", f"min by (BY) (NAME{CHOSEN}) - time()"),
    "time": ("s", QUANTILE),
    "size": ("bytes", QUANTILE),
}
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def build_panel(name: str) -> dict[str, object]:
    """Build the panel of a metric, but for its place."""
    labels, form, text = FAMILIES[name]
    unit, promql = FORMS[form]
    for word, meant in (
        ("BY", ",".join(labels)),
        ("NAME", name),
        ("OTHER", name.replace("hits", "misses")),
    ):
        promql = promql.replace(word, meant)
    targets = []
    for share in ("50", "95", "99") if "SHARE" in promql else ("",):
        legend = [f"{{{{{label}}}}}" for label in labels if label]
        legend += [f"p{share}"] if share else []
        target = {"refId": f"P{share}", "legendFormat": " ".join(legend) or name}
        targets.append({**target, "expr": promql.replace("SHARE", share)})
    looks = {"fillOpacity": 10, "showPoints": "never"}
    defaults = {"unit": unit, "min": 0, "custom": looks}
    return {
        "type": "timeseries",
        "title": text.rstrip("."),
        "description": name,
        "datasource": DATASOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": defaults, "overrides": []},
    }


def build_dashboard() -> dict[str, object]:
    """Build the dashboard, in a grid that is 24 wide."""
    panels: list[dict[str, object]] = []
    x = y = 0
    for number, line in enumerate(LINES, 1):
        heading = line.startswith("= ")
        if x == 24 or (heading and x):
            x, y = 0, y + 7
        place = {"x": x, "y": y, "w": 24 if heading else 8, "h": 1 if heading else 7}
        row = {"type": "row", "title": line[2:], "collapsed": False, "panels": []}
        panel = row if heading else build_panel(line.split(" ")[0])
        panels.append({"id": number, "gridPos": place, **panel})
        x, y = (0, y + 1) if heading else (x + 8, y)
    query = "label_values(dotproxy_build_info, instance)"
    choice = {"includeAll": True, "multi": True, "refresh": 2}  # when the time changes
    found = {"datasource": DATASOURCE, "query": {"query": query, "refId": "instance"}}
    variables = [
        {"name": "datasource", "type": "datasource", "query": "prometheus"},
        {"name": "instance", "type": "query", **found, **choice},
    ]
    return {
        "uid": "dotproxy",
        "title": "dotproxy",
        "schemaVersion": 41,  # of Grafana 12; it brings older ones up to date itself
        "refresh": "30s",
        "graphTooltip": 1,  # one crosshair for all panels
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": variables},
        "panels": panels,
    }


# ---- Logging (Elastic Common Schema 9.4) ---------------------------------------------
# What happens to the proxy, and each query, as lines of text or of JSON. Who logs never
# waits: a Writer has a thread, and a bound on what waits for it.

ECS_VERSION = "9.4.0"
PRIORITIES = {10: 7, 20: 6, 30: 4, 40: 3, 50: 2}  # of levels for journald, sd-daemon(3)
CONTROLS = {code: f"\\{code:03d}" for code in (*range(32), *range(127, 160))}
# Fields of the schema for facts; other facts are labels.
FACT_FIELDS = {"error": "error.message", "client": "client.address"}
write_json = json.JSONEncoder(separators=(",", ":")).encode


def note(
    level: int, event: str, *, bug: bool = False, asked: bool = False, **facts: object
) -> None:
    """Log an event and its facts, as `event: key=value` or JSON; `bug`: and the error.

    What somebody `asked` for is written at any --log-level, and however often. Any
    thread may call it, with no lock held; it never blocks.
    """
    if asked or logger.isEnabledFor(level):
        known = {k: v for k, v in facts.items() if v is not None and v != ""}
        plain = {k: v if isinstance(v, Endpoint) else str(v) for k, v in known.items()}
        pairs = " ".join(f"{key}={value}" for key, value in plain.items())
        text = f"{event}: {pairs}" if pairs else event
        message = text.translate(CONTROLS), ()
        error = sys.exc_info() if bug else None
        extra = {"event": event, "facts": plain, "asked": asked}
        record = logger.makeRecord("dotproxy", level, "", 0, *message, error, "", extra)
        logger.handle(record)


@functools.lru_cache(maxsize=1024)  # 0.1 us against 2 us; many queries share one
def timestamp(milliseconds: int) -> str:
    """Return a wall clock's time in ISO 8601, UTC."""
    second, rest = divmod(milliseconds, 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(second))}.{rest:03d}Z"


def upstream_fields(upstream: Endpoint) -> dict[str, object]:
    where = {"destination.address": upstream.host, "destination.port": upstream.port}
    return {**where, "destination.domain": upstream.name} if upstream.name else where


def record_as_json(record: logging.LogRecord) -> str:
    """Return a JSON object with dotted ECS names."""
    fields: dict[str, object] = {
        "@timestamp": timestamp(int(record.created * 1000)),
        "log.level": record.levelname.lower(),
        "message": record.getMessage(),
        "ecs.version": ECS_VERSION,
        "event.kind": "event",
        "event.category": ["network"],
        "event.dataset": "dotproxy.log",
        "event.action": vars(record)["event"].replace(" ", "-"),
        "log.logger": record.name,
        "process.pid": record.process,
        "process.thread.name": record.threadName,
        "service.name": "dotproxy",
        "service.version": __version__,
    }
    for key, value in vars(record)["facts"].items():
        if isinstance(value, Endpoint):
            fields.update(upstream_fields(value))
        else:
            fields[FACT_FIELDS.get(key, f"labels.{key}")] = value
    if record.exc_info and record.exc_info[0]:
        fields["error.type"] = record.exc_info[0].__name__
        fields["error.message"] = str(record.exc_info[1])
        trace = logging.Formatter().formatException(record.exc_info)
        fields["error.stack_trace"] = trace
    return write_json(fields)


def is_journal() -> bool:
    """Tell whether stderr is the journal (systemd.exec(5))."""
    status = os.fstat(2)
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def open_log(path: str) -> int:
    """Open a file to append to; raises ConfigError."""
    try:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
    except OSError as error:
        text = f"cannot open {path}: {error.strerror}; mend --query-log"
        raise ConfigError(text) from error


class Writer:
    """Appends lines to a file in a thread of its own; what is lost is counted and told.

    `put` never blocks, and any thread may call it.
    """

    LIMIT = 8 << 20  # octets that may wait or are being written
    GATHER = 0.05  # s in which lines gather: to wake the thread costs more than a line
    REPORT = 60.0  # s between reports of lost lines, at least
    PATIENCE = 2.0  # s that the end waits for a file that takes nothing
    stderr_turn = threading.Lock()  # who writes there, so that lines stay whole

    def __init__(self, name: str, path: str = "-", descriptor: int = 2) -> None:
        """Open a file, or with `-` write to what is open; raises ConfigError."""
        self._path = path
        self._descriptor = descriptor if path == "-" else open_log(path)
        self._turn = self.stderr_turn if path == "-" else threading.Lock()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._changed = threading.Condition()  # guards all below
        self._lines: list[str] = []  # those that are being written come first
        self._octets = 0  # that they have
        self._lost = 0  # lines of which nothing was told yet
        self._error = ""  # the latest
        self._told_at = -math.inf
        self._ended = False

    def start(self) -> None:
        """Start to write, first what was put before."""
        self._thread.start()

    def put(self, lines: Sequence[str]) -> None:
        """Have lines written, or count them as lost."""
        octets = sum(map(len, lines))
        with self._changed:
            if self._octets + octets > self.LIMIT:
                self._lost += len(lines)
                return
            if not self._lines:
                self._changed.notify()
            self._lines += lines
            self._octets += octets

    def reopen(self) -> None:
        """Open the file anew, as it was renamed."""
        if self._path != "-":
            try:
                opened = open_log(self._path)
            except ConfigError as error:
                note(logging.WARNING, "query log not reopened", error=error)
                return
            os.dup2(opened, self._descriptor, inheritable=False)
            os.close(opened)

    def close(self) -> None:
        """Write what is left, within a bound, and close the file."""
        with self._changed:
            if self._ended:
                return
            self._ended, self._told_at = True, -math.inf
            self._changed.notify()
        if self._thread.ident is None:
            self._thread.start()
        self._thread.join(self.PATIENCE)
        if self._thread.is_alive():
            self._tell_lost(len(self._lines), "the file takes nothing")
        elif self._path != "-":
            os.close(self._descriptor)

    def _run(self) -> None:
        while not self._ended:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._ended)
                self._changed.wait_for(lambda: self._ended, self.GATHER)
            self._write_all()
        for _ in range(2):  # what came since, and what that has to tell
            self._write_all()

    def _write_all(self) -> None:
        """Write what waits, and tell what was lost."""
        with self._changed:
            lines = self._lines.copy()
        octets = memoryview("".join(lines).encode("utf-8", "backslashreplace"))
        error = ""
        with self._turn:
            while octets and not error:
                try:
                    octets = octets[os.write(self._descriptor, octets) :]
                except BlockingIOError:  # of stderr: as it was given to us
                    select.select([], [self._descriptor], [])
                except OSError as failure:
                    error = str(failure.strerror)
        with self._changed:
            del self._lines[: len(lines)]
            self._octets -= sum(map(len, lines))
        self._tell_lost(bytes(octets).count(b"\n"), error)

    def _tell_lost(self, lost: int, error: str) -> None:
        """Log how many lines were lost, once in a while."""
        with self._changed:
            self._lost += lost
            self._error = error or self._error
            if not self._lost or elapsed() - self._told_at < self.REPORT:
                return
            number, self._lost = self._lost, 0
            reason, self._error = self._error or "too many at once", ""
            self._told_at = elapsed()
        event = "log lines lost" if self._path == "-" else "queries not logged"
        note(logging.WARNING, event, number=number, error=reason)


# When a message was logged first, how often since, and the event and facts of it.
Seen = tuple[float, int, str, Mapping[str, object]]


class LogHandler(logging.Handler):
    """Has log records written, the same one five times a minute, and counted then.

    Messages are the same if their level and whole text are. How often one came more is
    told with the next message after that minute, or at the end.
    """

    SAME, WINDOW = 5, 60.0  # s from the first time
    MESSAGES = 256  # that are counted at once; the oldest makes room

    def __init__(self, style: str, writer: Writer) -> None:
        super().__init__()
        self.writer = writer
        self._is_json, self._journal = style == "json", is_journal()
        stamp = "" if self._journal else "%(asctime)s %(levelname)s "
        text = f"{stamp}%(message)s"
        self.setFormatter(logging.Formatter(text, "%Y-%m-%dT%H:%M:%S%z"))
        # By level and text, in order of time; guarded by the handler's own lock.
        self._seen: dict[tuple[int, str], Seen] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Have a record written or counted; any thread, never blocks."""
        made = vars(record)
        times = 0
        if not made["asked"]:
            now, key = elapsed(), (record.levelno, record.getMessage())
            self._forget(now - self.WINDOW)
            new = now, 0, made["event"], made["facts"]
            first, times, *rest = self._seen.get(key, new)
            self._seen[key] = first, times + 1, *rest
        if times < self.SAME:
            line = record_as_json(record) if self._is_json else self.format(record)
            if self._journal:
                prefix = f"<{PRIORITIES[record.levelno]}>"
                line = prefix + line.replace("\n", "\n" + prefix)
            self.writer.put([line + "\n"])

    def close(self) -> None:
        self.acquire()
        self._forget(math.inf)
        self.release()
        self.writer.close()
        super().close()

    def _forget(self, before: float) -> None:
        """Tell of messages begun before that, and of the oldest beyond the room."""
        for key, (first, times, event, facts) in list(self._seen.items()):
            if first > before and len(self._seen) < self.MESSAGES:
                return
            del self._seen[key]
            if times > self.SAME:
                more = {**facts, "repeated": times - self.SAME}
                note(key[0], event, asked=True, bug=False, **more)


@contextlib.contextmanager
def logging_to_stderr(level: str, style: str) -> Iterator[LogHandler]:
    """Write the log to stderr, and all of it, within a bound, before the end.

    What is logged before its writer is started waits for that, or for the end.
    """
    log = LogHandler(style, Writer("log"))
    logging.basicConfig(handlers=[log], level=level.upper())
    threading.excepthook = lambda ended: note(
        *(logging.ERROR, "internal error"),
        bug=True,
        thread=getattr(ended.thread, "name", "?"),
    )
    try:
        yield log
    finally:
        log.close()
        logging.getLogger().removeHandler(log)


PRIVACY = ("none", "prefix", "hash", "no-names")
CLASS_NAMES = numbered("1 IN 3 CH 4 HS 254 NONE 255 ANY")
OPCODE_NAMES = numbered("0 QUERY 1 IQUERY 2 STATUS 4 NOTIFY 5 UPDATE")
FLAG_NAMES = {AA: "AA", TC: "TC", RD: "RD", RA: "RA", AD: "AD", CD: "CD"}
ADDRESS_FAMILIES = {(TYPE_A, 4): socket.AF_INET, (TYPE_AAAA, 16): socket.AF_INET6}
# Octets that are not as they are in a label, RFC 1035 section 5.1.
OCTET_TEXTS = {c: f"\\{c:03d}" for c in range(256) if not 33 <= c < 127}
OCTET_TEXTS.update({ord(char): f"\\{char}" for char in '."\\'})
LAST_MEMBERS = (
    f'"ecs.version":"{ECS_VERSION}","event.kind":"event","event.category":["network"],'
    '"event.type":["protocol"],"event.action":"dns-query",'
    '"event.dataset":"dotproxy.query","network.protocol":"dns","dns.type":"answer",'
    '"service.name":"dotproxy"'
)


def resolved_text(answer: bytes, offset: int) -> str:
    """Return a JSON member of the addresses behind the question, which ends there."""
    found = []
    for _ in range(answer[6] << 8 | answer[7]):
        offset = skip_name(answer, offset)
        rrtype, _, _, length = RECORD.unpack_from(answer, offset)
        offset += 10 + length
        family = ADDRESS_FAMILIES.get((rrtype, length))
        if family is not None:
            found.append(socket.inet_ntop(family, answer[offset - length : offset]))
    known = '","'.join(found)
    return f',"dns.resolved_ip":["{known}"]' if found else ""


class QueryLog:
    """Has a line written for each query that was answered; who answers makes it."""

    def __init__(self, config: Config, writer: Writer) -> None:
        self._writer = writer
        self._privacy = config.query_log_privacy
        self._key = os.urandom(16)  # of hashes, which differ with every start
        self._is_json = config.log_format == "json"
        self._prefix = "<6>" if config.query_log == "-" and is_journal() else ""
        # Lines are made of parts that recur: one json.dumps for a whole line would take
        # 15 us, where all of it takes 4.
        self._client = functools.lru_cache(4096)(self._make_client)
        self._question = functools.lru_cache(4096)(self._make_question)
        self._rest = functools.lru_cache(4096)(self._make_rest)

    def put(self, items: Sequence[Logged]) -> None:
        """Have a line of each written; any thread, never blocks."""
        offset = time.time() - elapsed()
        self._writer.put([self._line(item, offset) for item in items])

    def _line(self, item: Logged, offset: float) -> str:
        """Make a line like CoreDNS's common format, or an object with ECS names."""
        label, answer, client, upstream, at, took = item
        source, form, _, rcode, size, octets = label
        flags, ident = answer[2] << 8 | answer[3], answer[0] << 8 | answer[1]
        when, who = timestamp(int((at + offset) * 1000)), self._client(client[0])
        how, outcome, origin = self._rest(flags, rcode, source, form, upstream)
        end = end_of_question(answer) if answer[5] else MIN_MESSAGE  # it was not parsed
        asked = self._question(answer[MIN_MESSAGE:end])
        if not self._is_json:
            start = self._prefix or f"{when} "
            port = f":{client[1]}" if self._privacy == "none" else ""
            return (
                f'{start}{who}{port} - {ident} "{asked} {how} {size} {outcome} '
                f"{octets} {took:.6f}s {origin}\n"
            )
        port = f',"client.port":{client[1]}' if self._privacy == "none" else ""
        found = "" if self._privacy == "no-names" else resolved_text(answer, end)
        return (
            f'{self._prefix}{{"@timestamp":"{when}",{who}{port},"dns.id":"{ident}",'
            f'{asked}{how},"client.bytes":{size},{outcome}{found},'
            f'"server.bytes":{octets},"event.duration":{int(took * 1e9)},{origin}}}\n'
        )

    def _make_client(self, address: str) -> str:
        """Make what the log says of a client, but for its port."""
        ip = ipaddress.ip_address(address.partition("%")[0])
        ip = getattr(ip, "ipv4_mapped", None) or ip  # which IPv6 only carries
        shown, text, field = str(ip), f"[{ip}]" if ip.version == 6 else str(ip), "ip"
        if self._privacy == "hash":
            known = hashlib.blake2b(ip.packed, digest_size=8, key=self._key)
            shown = text = known.hexdigest()
            field = "address"
        elif self._privacy != "none":
            length = 56 if ip.version == 6 else 24
            text = str(ipaddress.ip_network((ip, length), strict=False))
            shown = text.partition("/")[0]
        kind = f'"network.type":"ipv{ip.version}"'
        return f'{kind},"client.{field}":"{shown}"' if self._is_json else text

    def _make_question(self, question: bytes) -> str:
        """Make what the log says of a question, with numbers as in RFC 3597."""
        if not question:
            return "" if self._is_json else "- - -"
        labels, offset = [], 0
        while length := question[offset]:
            label = question[offset + 1 : offset + 1 + length].decode("latin-1")
            labels.append(label.translate(OCTET_TEXTS))
            offset += 1 + length
        rrtype, rrclass = PAIR.unpack(question[offset + 1 :])
        kind = TYPE_NAMES.get(rrtype, f"TYPE{rrtype}")
        group = CLASS_NAMES.get(rrclass, f"CLASS{rrclass}")
        hidden = self._privacy == "no-names"
        name = "-" if hidden else ".".join(labels)
        if not self._is_json:
            return f"{kind} {group} {name}" + "." * (not hidden)
        name = (name or ".").replace("\\", "\\\\").replace('"', '\\"')
        return (
            f'"dns.question.name":"{name}","dns.question.type":"{kind}",'
            f'"dns.question.class":"{group}",'
        )

    def _make_rest(
        self, flags: int, rcode: int, source: str, form: Form, upstream: Endpoint | None
    ) -> tuple[str, str, str]:
        """Make what the log says of transport, outcome and origin."""
        proto, result = form.transport[0], RCODE_NAMES.get(rcode, f"RCODE{rcode}")
        names = [name for bit, name in FLAG_NAMES.items() if flags & bit]
        if not self._is_json:
            shown = ",".join(["qr", *names]).lower()
            do = "true" if form.edns_flags & DO else "false"
            outcome = f'{do} {form.limit}" {result} {shown}'
            return proto, outcome, f"{source} {upstream or '-'}"
        opcode, over = flags >> 11 & 15, "udp" if proto == "udp" else "tcp"
        done = "success" if rcode in (NOERROR, NXDOMAIN) else "failure"
        where = upstream_fields(upstream) if upstream else {}
        return (
            f'"dns.op_code":"{OPCODE_NAMES.get(opcode, f"OPCODE{opcode}")}",'
            f'"network.transport":"{over}","labels.proto":"{proto}"',
            f'"dns.header_flags":{write_json(names)},"dns.response_code":"{result}",'
            f'"event.outcome":"{done}"',
            write_json({"labels.source": source, **where})[1:-1] + "," + LAST_MEMBERS,
        )


# ---- Cache (RFC 2308, RFC 8767, RFC 9520) --------------------------------------------
# Responses by question, bounded by octets. An entry is live, then stale, then gone; it
# never changes but for how it is used. An answer that went out is kept ready beside it,
# as most datagrams repeat. It knows nothing of clients or upstreams.

ALIASES = frozenset((b"\0\5", b"\0\x27", b"\0\x2e"))  # CNAME, DNAME, RRSIG of these


def leads_nowhere(response: Response, rrtype: bytes) -> bool:
    """Tell whether the answer is a chain of aliases without what was asked for."""
    places = response.ttl_offsets[: response.counts[0]]
    types = {response.body[place - 4 : place - 2] for place in places}
    return types <= ALIASES and rrtype not in types


class CacheEntry:
    """A stored response, and how it is used."""

    POPULAR = 2  # hits from which it is asked for again before it expires
    SPARE = 2048  # octets that the answer may lack of the message

    __slots__ = "expires", "hits", "message", "ready", "retry_at", "stored_at"

    def __init__(
        self, message: bytes, now: float, expires: float, retry_at: float
    ) -> None:
        self.message = message  # half the memory of a Response
        self.stored_at = now
        self.expires = expires  # from then on it is stale
        self.hits = 0  # since it was last spared
        # When to ask again; 0 until it is for the first time, below 0 for never.
        self.retry_at = retry_at
        self.ready: tuple[bytes, ...] = ()  # datagrams that a Ready is kept for

    @property
    def failed(self) -> bool:
        """Tell whether it is a failure, or not whole: then it is never served stale."""
        return self.retry_at < 0

    @property
    def settled_until(self) -> float:
        """Return until when it need not be asked for again."""
        tenth = 0 if self.retry_at else (self.expires - self.stored_at) / 10
        return self.expires - tenth

    def worth_refreshing(self, now: float) -> bool:
        """Tell whether to ask for a live one again, before it expires."""
        return self.hits >= self.POPULAR and now >= self.settled_until

    def response(self, query: Query) -> Response:
        """Parse it for a query with the same question."""
        message, limit = self.message, query.form.limit
        if len(message) > limit + self.SPARE:  # to read all of 64 KiB takes 10 ms
            ident, flags, _, answers, _, _ = HEADER.unpack_from(message)
            answers = min(answers, limit // MIN_RECORD)
            message = HEADER.pack(ident, flags | TC, 1, answers, 0, 0) + message[12:]
        return parse_response(message, 12 + len(query.question))


# The same object for equal labels, or places of TTLs: those are used often.
shared = functools.lru_cache(4096)(lambda each: each)


class Ready:
    """An answer without its ID, for a datagram without its ID.

    A hit needs no other object: of 200,000 names each is far away, 0.1 us and more.
    """

    __slots__ = "answer", "label", "places", "settled_until", "until", "used"

    def __init__(
        self, query: Query, answer: bytes, entry: CacheEntry, now: float
    ) -> None:
        age, end = int(now - entry.stored_at), 12 + len(query.question)
        found = parse_response(answer, end)
        self.answer = answer[2:]
        label = label_answer(query, CACHE, answer[3] & RCODE_MASK, len(answer))
        self.label: Label = shared(label)  # what is counted of it
        self.places = shared(tuple(end - 2 + each for each in found.ttl_offsets))
        self.settled_until = entry.settled_until
        self.until = min(entry.stored_at + age + 1, self.settled_until)
        self.used = False  # since somebody looked


class Cache:
    """Responses by cache key; the oldest go first but for those used since.

    Any thread may call any method; none blocks.
    """

    OVERHEAD = 400  # octets of an entry beside its key and message, as measured
    READY_OVERHEAD = 310  # octets of a Ready beside its datagram and answer, likewise
    MAX_READY = 8  # of an entry; then they begin anew
    MAX_READY_QUERY = 512  # octets of a datagram; most have 60
    SLACK = 2048  # this part of the bound is made free at a time: 26 small answers
    SPARED = 1000  # entries at most that are spared at a time; takes 0.3 ms
    NEGATIVE_MAX = 3600  # s that NXDOMAIN and NODATA live, RFC 2308 section 5
    STALE_TTL = 30  # s, RFC 8767 section 4
    STALE_RETRY = 30.0  # s after a failed refresh until the next, RFC 8767 section 5
    STALE_AFTER = 1.8  # s that a client waits for a fresh answer, RFC 8767 section 5

    def __init__(self, config: Config) -> None:
        self._config = config
        self._bounds = config.cache_min_ttl, config.cache_max_ttl
        # Guards all below; only single operations of a dict are done without it.
        self._lock = threading.Lock()
        self._entries = collections.OrderedDict[bytes, CacheEntry]()  # oldest first
        hot: dict[bytes, Ready] = {}
        self.hot = {("udp", "1"): hot, ("udp", "2"): hot.copy()}
        self.size = 0  # octets of memory
        self._evictions = 0

    def __len__(self) -> int:
        return len(self._entries)

    def lacks(self, keys: Iterable[bytes]) -> bool:
        """Tell whether none of the keys is there: a snapshot, without a lock."""
        return self._entries.keys().isdisjoint(keys)

    def samples(self) -> Iterator[Sample]:
        yield "dotproxy_cache_entries", (), len(self._entries)
        yield "dotproxy_cache_size_bytes", (), self.size
        yield "dotproxy_cache_evictions_total", (), self._evictions

    def can_serve(self, now: float) -> bool:
        """Tell whether any of the newest 10,000 could be served, stale perhaps."""
        fresh = now - self._config.cache_stale
        with self._lock:
            latest = itertools.islice(reversed(self._entries.values()), 10_000)
            return any(fresh < entry.expires and not entry.failed for entry in latest)

    def get(self, key: bytes, now: float) -> CacheEntry | None:
        """Return the entry for this key, live or stale."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if now >= entry.expires:
            stale = 0 if entry.failed else self._config.cache_stale
            if now >= entry.expires + stale:
                with self._lock:
                    if self._entries.get(key) is entry:
                        self._count_out_locked(key, self._entries.pop(key))
                return None
        entry.hits += 1
        return entry

    def put(self, key: bytes, response: Response, now: float) -> Response:
        """Store one, as `put_all` does."""
        return self.put_all([(key, response)], now)[0]

    def put_all(
        self, items: Sequence[tuple[bytes, Response]], now: float
    ) -> list[Response]:
        """Store each response that may be, but for one whose key is empty.

        Return them as they are to be served: TTLs of those that are stored are bounded.
        """
        entries, size, grown = self._entries, self._config.cache_size, 0
        prepare, overhead = self._prepare, self.OVERHEAD
        with self._lock:
            for key, response in items if size else ():
                entry = prepare(key, response, now)
                if key in entries:
                    # NOERROR and NXDOMAIN refresh it, stored or not (RFC 8767 section
                    # 4); a failure never takes the place of data, which was used.
                    known = response.rcode in (NOERROR, NXDOMAIN)
                    failed = response.flags & TC or not known
                    if failed and (entry is None or not entries[key].failed):
                        entries.move_to_end(key)
                        continue
                    self._count_out_locked(key, entries.pop(key))
                if entry is not None:
                    entries[key] = entry
                    grown += overhead + len(key) + len(entry.message)
            self.size += grown
            if self.size > size:
                self._shrink_locked()
        return [response for _, response in items]

    def answer(self, entry: CacheEntry, query: Query, now: float) -> bytes:
        """Build an answer whose TTLs have counted down by whole seconds."""
        response = entry.response(query)
        age = int(now - entry.stored_at)
        body = with_ttls(response, lambda ttl: max(0, ttl - age))
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

    def keep_ready(
        self, query: Query, asked: bytes, answer: bytes, entry: CacheEntry, now: float
    ) -> None:
        """Keep an answer that was made now for who sends this datagram again."""
        datagram, hot = asked[2:], self.hot[query.form.transport]
        ready = Ready(query, answer, entry, now)
        with self._lock:
            current = self._entries.get(query.cache_key) is entry
            if not current or len(datagram) > self.MAX_READY_QUERY:
                return
            if datagram not in hot:
                if len(entry.ready) >= self.MAX_READY:
                    self._drop_ready_locked(entry)
                entry.ready += (datagram,)
                self.size += self.READY_OVERHEAD + len(datagram) + len(ready.answer)
            hot[datagram] = ready
            if self.size > self._config.cache_size:
                self._shrink_locked()

    def renew(self, ready: Ready, now: float) -> bool:
        """Count its TTLs down to now; False where the slow way has to be taken."""
        if now >= ready.settled_until:
            return False
        with self._lock:  # each counts on from what another has left
            if now < ready.until:
                return True
            passed = int(now - ready.until) + 1
            answer = bytearray(ready.answer)
            for place in ready.places:
                (ttl,) = TTL.unpack_from(answer, place)
                TTL.pack_into(answer, place, ttl - passed if ttl > passed else 0)
            ready.answer, ready.used = bytes(answer), True
            ready.until = min(ready.until + passed, ready.settled_until)
        return True

    def flush(self) -> int:
        """Forget everything; return how many entries there were."""
        with self._lock:
            number, self.size = len(self._entries), 0
            self._entries.clear()
            for hot in self.hot.values():
                hot.clear()
        return number

    def _prepare(self, key: bytes, response: Response, now: float) -> CacheEntry | None:
        """Make an entry if the response may be stored; bound its TTLs, in place."""
        if not key or response.flags & TC:  # RFC 2181 section 9
            return None
        rcode, ttls, negative_ttl = response.rcode, response.ttls, response.negative_ttl
        shortest = longest = ttls[0] if ttls else 0
        if len(ttls) > 1:
            shortest, longest = min(ttls), max(ttls)
        life: float = shortest if longest < 1 << 31 else 0  # RFC 2181 section 8
        (low, high), retry_at = self._bounds, 0.0
        if rcode == NOERROR and negative_ttl is None:
            if not response.counts[0]:
                return None
            # Mostly the first record is what was asked for.
            if response.body[2:4] != key[-5:-3] and leads_nowhere(response, key[-5:-3]):
                life, retry_at = min(life, self._config.cache_fail_ttl), -1.0
        elif rcode in FAILURE_RCODES:
            life, retry_at = self._config.cache_fail_ttl, -1.0
        elif negative_ttl is None or rcode not in (NOERROR, NXDOMAIN):
            return None
        else:
            life = life if negative_ttl else 0
            high = min(high, max(low, min(negative_ttl, self.NEGATIVE_MAX)))
        if not life:
            return None
        message = response.message
        if longest > high or shortest < low:
            if not retry_at:
                life = min(max(shortest, low), high)
            response.body = with_ttls(response, lambda ttl: min(max(ttl, low), high))
            message = response.message = b""
        if response.upstream_options or not message:  # padding takes 380 octets
            answers, authority, extra = response.counts
            opt = build_opt(0, response.options) if response.options else b""
            extra += opt > b""
            head = HEADER.pack(0, response.flags, 1, answers, authority, extra)
            message = head + key[:-1] + response.body + opt
        return CacheEntry(message, now, now + life, retry_at)

    def _shrink_locked(self) -> None:
        """Make room; who was used is spared and has to be used again for that."""
        goal = self._config.cache_size - self._config.cache_size // self.SLACK
        entries = self._entries
        spare = min(len(entries) // 2, self.SPARED)
        while self.size > goal:
            key, entry = next(iter(entries.items()))
            if (entry.hits or entry.ready) and self._used_locked(entry) and spare:
                entries.move_to_end(key)
                spare -= 1
            else:
                self._count_out_locked(*entries.popitem(False))
                self._evictions += 1

    def _used_locked(self, entry: CacheEntry) -> bool:
        """Tell whether it was used since this was last asked."""
        used, entry.hits = entry.hits > 0, 0
        for datagram, hot in itertools.product(entry.ready, self.hot.values()):
            ready = hot.get(datagram)
            if ready is not None and ready.used:
                used, ready.used = True, False
        return used

    def _count_out_locked(self, key: bytes, entry: CacheEntry) -> None:
        self.size -= self.OVERHEAD + len(key) + len(entry.message)
        if entry.ready:
            self._drop_ready_locked(entry)

    def _drop_ready_locked(self, entry: CacheEntry) -> None:
        for datagram, hot in itertools.product(entry.ready, self.hot.values()):
            ready = hot.pop(datagram, None)
            if ready is not None:
                size = len(datagram) + len(ready.answer)
                self.size -= self.READY_OVERHEAD + size
        entry.ready = ()


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


def soa_data(zone: int, ttl: int) -> bytes:
    """Return the SOA data of RFC 6303 section 3; `zone`: a pointer."""
    names = zone.to_bytes(2, "big") + encode_domain("nobody.invalid")
    return names + SOA_NUMBERS.pack(1, 3600, 1200, 604800, ttl)


def response_of(
    records: Records, ttl: int, rcode: int = NOERROR, zone: int = QNAME
) -> Response:
    """Make a response with these records of the name that was asked for.

    Without any it says no, with the SOA record of `zone`, a pointer (RFC 2308).
    """
    owner, counts, denied = QNAME, (len(records), 0, 0), None
    if not records:
        records, owner = {TYPE_SOA: soa_data(zone, ttl)}, zone
        counts, denied = (0, 1, 0), ttl
    body, offsets = b"", []
    for rrtype, rdata in records.items():
        offsets.append(len(body) + 6)
        head = RECORD.pack(rrtype, CLASS_IN, ttl, len(rdata))
        body += owner.to_bytes(2, "big") + head + rdata
    ttls = [ttl] * len(offsets)
    return Response(QR | RA | rcode, counts, body, ttls, offsets, denied)


SPECIAL_NAMES = (  # RFC 6761, RFC 6762, RFC 7686, RFC 8375, RFC 9462, RFC 9665
    *("localhost", "invalid", "local", "onion"),
    *("home.arpa", "resolver.arpa", "service.arpa"),
)
# RFC 6303 section 4 and RFC 7793, and those above 1.0.0.127, as a client may conclude
# from NXDOMAIN that nothing is below (RFC 8020). Not here: names of which no RFC says
# that a resolver should keep them, such as internal; ipv4only.arpa, which the upstream
# has to answer (RFC 8880); and test, which leads to nothing but an upstream for trials.
PRIVATE_REVERSE = (
    *("0", "10", "127", "0.127", "0.0.127", "254.169", "168.192"),
    *("255.255.255.255", "2.0.192", "100.51.198", "113.0.203"),
    *(f"{number}.172" for number in range(16, 32)),
    *(f"{number}.100" for number in range(64, 128)),
)
PRIVATE_REVERSE_V6 = (
    *("d.f", "8.e.f", "9.e.f", "a.e.f", "b.e.f", "8.b.d.0.1.0.0.2"),
    "0." * 31 + "0",
)
LOOPBACK = {TYPE_A: b"\x7f\0\0\1", TYPE_AAAA: bytes(15) + b"\1"}
LOOPBACK_NAME = {TYPE_PTR: encode_domain("localhost")}
# By apex: what it has beside SOA and NS, and what every name below has, or None where
# there is none.
LOCAL_ZONES: dict[bytes, tuple[Records, Records | None]] = {
    **{encode_domain(name): ({}, None) for name in SPECIAL_NAMES},
    **{encode_domain(f"{name}.in-addr.arpa"): ({}, None) for name in PRIVATE_REVERSE},
    **{encode_domain(f"{name}.ip6.arpa"): ({}, None) for name in PRIVATE_REVERSE_V6},
    encode_domain("1.0.0.127.in-addr.arpa"): (LOOPBACK_NAME, None),
    encode_domain("1." + "0." * 31 + "ip6.arpa"): (LOOPBACK_NAME, None),
    encode_domain("localhost"): (LOOPBACK, LOOPBACK),
    encode_domain("resolver.arpa"): ({}, {}),  # RFC 9462 sections 4 and 6.1
}


class LocalAnswers:
    """Answers that never need an upstream; immutable, any thread may ask.

    Those for special names have AA set, as of any zone (RFC 6303 section 3).
    """

    TAIL = slice(-9, -4)  # the end of a question's name: few have that of a zone
    ANY_IN = PAIR.pack(TYPE_ANY, CLASS_IN)
    # RFC 8482 section 4.2: CPU "RFC8482", OS "".
    MINIMAL_ANY = response_of({TYPE_HINFO: b"\7RFC8482\0"}, ANY_TTL)

    def __init__(self, exempt: Iterable[bytes] = ()) -> None:
        # Domains to be forwarded with all below them, in wire format and lower case.
        self._exempt = frozenset(exempt)
        self._zones = {
            apex: records
            for apex, records in LOCAL_ZONES.items()
            if self._exempt.isdisjoint(lineage(apex))
        }
        self._tails = {(apex + bytes(4))[self.TAIL] for apex in self._zones}

    def respond(self, query: Query) -> Response | None:
        """Return the answer if it is to be given here; for most, 0.1 us, it is not."""
        question, exists = query.question, False
        if question[self.TAIL].lower() not in self._tails and question[-3] != TYPE_ANY:
            return None
        if question[-4:] == self.ANY_IN and query.form.transport[0] == "udp":
            return self.MINIMAL_ANY
        name = query.key[: len(question) - 4]  # the key begins with it, in lower case
        rrtype, rrclass = PAIR.unpack(question[-4:])
        for domain in lineage(name):
            if domain in self._exempt:
                return None
            if domain not in self._zones:
                continue
            if rrclass != CLASS_IN:  # there is no such zone, nor may the name leave
                return error_response(Rcode.REFUSED)
            own, below = self._zones[domain]
            if domain != name:
                records = {} if exists else below
            elif rrtype == TYPE_DS:  # the parent zone's, RFC 4035 section 3.1.4.1
                exists = True
                continue
            else:
                soa = soa_data(QNAME, LOCAL_TTL)
                records = {**own, TYPE_SOA: soa, TYPE_NS: QNAME.to_bytes(2, "big")}
            shown = records or {}
            if rrtype != TYPE_ANY:
                shown = {rrtype: shown[rrtype]} if rrtype in shown else {}
            rcode = NXDOMAIN if records is None else NOERROR
            zone = QNAME + len(name) - len(domain)
            response = response_of(shown, LOCAL_TTL, rcode, zone)
            response.flags |= AA
            return response
        return None


# What cannot be on the Internet: the unspecified and the site-local one (RFC 3879) too.
OTHER_NETWORKS = ipaddress.ip_network("0.0.0.0/8"), ipaddress.ip_network("fec0::/10")
# Behind these 12 octets is an IPv4 address: compatible, with :: and ::1 among them,
# mapped (RFC 4291 section 2.5.5), and translated (RFC 6052 section 2.1).
EMBEDDING = frozenset(
    ipaddress.ip_address(prefix).packed[:12]
    for prefix in ("::", "::ffff:0:0", "64:ff9b::")
)
HINT_SIZES = {4: 4, 6: 16}  # ipv4hint and ipv6hint, RFC 9460 section 7.3


@functools.lru_cache(maxsize=4096)  # 0.1 us against 11 us
def is_private(address: bytes) -> bool:
    """Tell whether an address of 4 or 16 octets is reached from this network only."""
    if address[:12] in EMBEDDING:
        address = address[12:]
    if len(address) not in (4, 16):
        return False
    found = ipaddress.ip_address(address)
    return any(found in network for network in (*LOCAL_NETWORKS, *OTHER_NETWORKS))


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


def answered_addresses(response: Response) -> Iterator[bytes]:
    """Yield the addresses in the answer section, hints included."""
    body = response.body
    for offset in response.ttl_offsets[: response.counts[0]]:
        rrtype, _, _, length = RECORD.unpack_from(body, offset - 4)
        rdata = body[offset + 6 : offset + 6 + length]
        if rrtype in (TYPE_A, TYPE_AAAA):
            yield rdata
        elif rrtype in (TYPE_SVCB, TYPE_HTTPS):
            yield from hinted_addresses(rdata)


class RebindingGuard:
    """Keeps public names, and so web pages, from leading into the private network."""

    def __init__(self, exempt: Iterable[bytes] = ()) -> None:
        self._exempt = frozenset(exempt)  # domains in wire format and lower case

    def screen(self, query: Query, response: Response) -> Response:
        """Return an upstream's response, or NODATA where it has a private address."""
        name = query.question[:-4].lower()
        exempt = not self._exempt.isdisjoint(lineage(name))
        if exempt or not any(map(is_private, answered_addresses(response))):
            return response
        blocked = response_of({}, FILTERED_TTL)
        text = "the answer has a private address; see --allow-private"
        blocked.options = build_option(ExtendedError.FILTERED, text)
        return blocked


# ---- Timer and worker threads --------------------------------------------------------
# What everything with a thread needs; nothing here knows of DNS.


class ProcessorBinding:
    """Keeps all threads on one processor while much is asked upstream.

    Under the GIL only one of them can run at a time, yet each system call may hand it
    to a thread on another processor, and waking that costs more than the call: 47 us of
    CPU and 20 k queries/s for uncached queries on two processors, 35 us and 28 k on
    one. The kernel moves other work away.
    """

    BUSY, QUIET = 4000.0, 1000.0  # queries/s sent upstream that bind and set free

    def __init__(self) -> None:
        gil = getattr(sys, "_is_gil_enabled", lambda: True)()
        able = gil and hasattr(os, "sched_setaffinity")
        self._processors = os.sched_getaffinity(0) if able else {0}
        self._bound = False
        self._rates: dict[object, float] = {}  # by who asks

    def update(self, source: object, rate: float) -> None:
        """Bind or set free as the sum of all rates asks for; any thread may call it."""
        self._rates[source] = rate
        rate = sum(self._rates.copy().values())
        bind = rate > (self.QUIET if self._bound else self.BUSY)
        if len(self._processors) < 2 or bind == self._bound:
            return
        self._bound = bind
        chosen = {random.choice(sorted(self._processors))} if bind else self._processors
        for thread in threading.enumerate():
            with contextlib.suppress(OSError):  # it may have ended
                os.sched_setaffinity(thread.native_id or 0, chosen)


class Timer:
    """One thread that calls functions when they are due, to the next `TICK`."""

    TICK = 0.01  # s; what is due together wakes the thread once

    def __init__(self) -> None:
        self._condition = threading.Condition()  # guards all below
        self._numbers = itertools.count()  # what is due together stays in its order
        self._due: list[tuple[int, int, Callable[[], None]]] = []  # a heap, by tick
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="timer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def at(self, when: float, function: Callable[[], None]) -> None:
        """Have it called at `when` or at most a tick later; it may not block."""
        tick = int(when / self.TICK) + 1
        with self._condition:
            heapq.heappush(self._due, (tick, next(self._numbers), function))
            if self._due[0][2] is function:
                self._condition.notify()

    def close(self) -> None:
        """End the thread; what is not due yet is forgotten."""
        with self._condition:
            self._closed = True
            self._condition.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._condition:
                if self._closed:
                    return
                left = self._due[0][0] * self.TICK - elapsed() if self._due else None
                if left is None or left > 0:
                    self._condition.wait(left)
                    continue
                function = heapq.heappop(self._due)[2]
            try:
                function()
            except Exception:
                note(logging.ERROR, "internal error", bug=True, thread="timer")


class WorkerPool:
    """At most `threads` threads that run at most `backlog` waiting tasks.

    A Condition wakes one thread for a task. A queue.SimpleQueue, up to Python 3.12,
    wakes all that are idle: twice as many switches of context at 200 queries/s.
    """

    IDLE = 20.0  # s after which a thread without work ends

    def __init__(self, name: str, threads: int, backlog: int) -> None:
        self._name, self._limit, self._backlog = name, threads, backlog
        self._numbers = itertools.count(1)
        self._condition = threading.Condition()  # guards all below; told of a task
        self._tasks: collections.deque[Callable[[], None]] = collections.deque()
        self._threads: set[threading.Thread] = set()
        self._idle = 0
        self._closed = False

    def submit(self, task: Callable[[], None]) -> bool:
        """Have a thread run `task`; False when too many tasks wait, or none can run."""
        with self._condition:
            if self._closed or len(self._tasks) >= self._backlog:
                return False
            if len(self._tasks) >= self._idle and len(self._threads) < self._limit:
                name = f"{self._name}-{next(self._numbers)}"
                thread = threading.Thread(target=self._run, name=name, daemon=True)
                with contextlib.suppress(RuntimeError):  # the system gives no more
                    thread.start()
                    self._threads.add(thread)
            if not self._threads:
                return False
            self._tasks.append(task)
            self._condition.notify()
            return True

    def samples(self) -> Iterator[Sample]:
        with self._condition:
            busy = len(self._threads) - self._idle
        yield "dotproxy_pool_threads_busy", (self._name,), busy
        yield "dotproxy_pool_threads_limit", (self._name,), self._limit

    def close(self) -> None:
        """End the threads once the waiting tasks are done."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
            threads = list(self._threads)
        for thread in threads:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._condition:
                self._idle += 1
                self._condition.wait_for(lambda: self._tasks or self._closed, self.IDLE)
                self._idle -= 1
                if not self._tasks:
                    self._threads.discard(threading.current_thread())
                    return
                task = self._tasks.popleft()
            try:
                task()
            except Exception:
                note(logging.ERROR, "internal error", bug=True, thread=self._name)


# ---- Upstream connections (RFC 7858, RFC 7766, RFC 8310) -----------------------------
# An exchange is one question in flight. A link carries many of them, pipelined, to one
# endpoint that has proved its name, or needs none. It knows nothing of other links.

VERSION, SUBJECT_KEY = 0xA0, 0x30  # tags of DER: explicit 0, and a sequence, X.690


def split_der(octets: bytes) -> list[tuple[bytes, bytes]]:
    """Split DER into its elements: the contents of each, and the whole of it."""
    found, offset = [], 0
    while offset < len(octets):
        head = octets[offset : offset + 2]
        start, length = offset + 2, head[-1]
        if length & 0x80:  # of the length itself; 0 would be the indefinite form of BER
            start += length & 0x7F
            length = int.from_bytes(octets[offset + 2 : start], "big")
        end = start + length
        if len(head) < 2 or head[1] == 0x80 or end > len(octets):
            raise FormatError(f"DER element of {length} octets past the end")
        found.append((octets[start:end], octets[offset:end]))
        offset = end
    return found


def public_key_pin(certificate: bytes) -> str:
    """Return the SHA-256 of a DER certificate's public key, in base64 (RFC 7469).

    What is hashed is its SubjectPublicKeyInfo (RFC 5280 section 4.1), which stays the
    same when the certificate is renewed for the same key. Raises FormatError.
    """
    try:
        ((signed, _),) = split_der(certificate)
        fields = split_der(split_der(signed)[0][0])
        # Version (absent in version 1), serial number, algorithm, issuer, validity,
        # subject, key.
        key = fields[5 + (fields[0][1][0] == VERSION)][1]
    except (IndexError, ValueError):
        raise FormatError("no certificate") from None
    if key[0] != SUBJECT_KEY:
        raise FormatError("no public key where a certificate has it")
    return base64.b64encode(hashlib.sha256(key).digest()).decode()


PARTIAL_CHAIN = 0x80000  # X509_V_FLAG_PARTIAL_CHAIN; its name is new in Python 3.10
TLS_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


def names_of(tls: ssl.SSLSocket | ssl.SSLObject) -> list[str]:
    """Return the names in the certificate that a session's server has proved."""
    names = (tls.getpeercert() or {}).get("subjectAltName", ())
    return [str(pair[1]) for pair in names if isinstance(pair, tuple)]


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
        if self.context.cert_store_stats()["x509"]:
            return True
        directory = None if self.ca_file else ssl.get_default_verify_paths().capath
        with contextlib.suppress(OSError):  # who was root may not read it any more
            return directory is not None and bool(os.listdir(directory))
        return False

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
        if self.ca_file is not None:  # who names a CA trusts it, however plain it is
            context.verify_flags &= ~ssl.VERIFY_X509_STRICT
            context.verify_flags |= PARTIAL_CHAIN
        context.set_alpn_protocols(["dot"])
        return context


def describe_network_error(error: OSError, endpoint: Endpoint) -> UpstreamError:
    """Say what an error of the network means, and the likely cure."""
    port = f"TCP port {endpoint.port}"
    firewall = f"no answer to the connection: is {port} blocked by a firewall?"
    for kind, cause, text in (
        (socket.gaierror, "resolve", f"cannot look up the address: {error}"),
        (socket.timeout, "timeout", firewall),
        (ConnectionRefusedError, "refused", f"connection refused: nothing on {port}"),
        (ConnectionResetError, "reset", "connection reset"),
        (BrokenPipeError, "reset", "connection reset"),
    ):
        if isinstance(error, kind):
            return UpstreamError(cause, text)
    if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL):
        text = f"no route to {endpoint.host}: is there a network?"
        return UpstreamError("unreachable", text)
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


WRONG_NAME = 62, 64
# What the alerts of a server (RFC 8446 section 6.2) mean, and what to do about it.
NO_DOT = "check in --upstream that this port is for DNS over TLS"
OLD = "the server does not speak TLS {} or newer: give another --upstream"
CHOOSY = "it takes other ciphers, or wants a certificate: give another --upstream"
STRICT = "it wants to see a certificate of this host: give another --upstream"
BROKEN = "it is broken, or something on the way to it: give another --upstream"
ALERTS = {
    "no application protocol": NO_DOT,
    "unrecognized name": "check the name behind # in --upstream",
    "access denied": "have its operator allow this host, or give another --upstream",
    **dict.fromkeys(("protocol version", "unsupported protocol"), OLD),
    **dict.fromkeys(("handshake failure", "insufficient security"), CHOOSY),
    **dict.fromkeys(("certificate required", "bad certificate", "unknown ca"), STRICT),
    **dict.fromkeys(("internal error", "decode error", "decrypt error"), BROKEN),
    **dict.fromkeys(("illegal parameter", "unexpected message"), BROKEN),
}


def explain_alert(error: ssl.SSLError, tls_min: str = "1.2") -> str:
    """Return what TLS says of an error, and what to do about it.

    From its text: Python gives no `reason` for alerts that it does not know, as 120.
    """
    text = re.sub(r"^\[.*?\] | \(_ssl.*", "", str(error.strerror or error)).lower()
    words = re.sub(r"^(ssl/tls|sslv3|tlsv13?) (alert )?", "", text) or "protocol error"
    return f"{words}: {ALERTS.get(words, NO_DOT).format(tls_min)}"


def describe_tls_error(error: ssl.SSLError, trust: Trust) -> UpstreamError:
    """Say why a TLS handshake failed, and the likely cure."""
    if isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
        return UpstreamError("tls", f"closed during the TLS handshake: {NO_DOT}")
    if not isinstance(error, ssl.SSLCertVerificationError):
        reason = explain_alert(error, trust.tls_min)
        return UpstreamError("tls", f"TLS handshake failed: {reason}")
    number, text = error.verify_code, error.verify_message
    if not trust.has_authorities():
        hint = "there is no CA bundle: install ca-certificates, or give --ca-file PEM"
        return UpstreamError("certificate", f"cannot verify the certificate: {hint}")
    hint = VERIFY_HINTS.get(number, "not accepted")
    now = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    clock = f" (it says {now} UTC)" if number in (9, 10) else ""
    return UpstreamError("certificate", f"certificate {hint}{clock} [{text}]")


def explain_tls_error(
    error: ssl.SSLError, endpoint: Endpoint, trust: Trust, patience: float
) -> UpstreamError:
    """Describe it with the names that a wrong certificate has, which are asked for.

    Blocks, to connect and to shake hands again, for so many seconds each.
    """
    if getattr(error, "verify_code", 0) in WRONG_NAME:
        with contextlib.suppress(OSError, ConfigError):
            with socket.create_connection(endpoint[:2], patience) as raw:
                names = ", ".join(trust.certificate_names(raw)[:8])
            text = f"certificate is for {names}, not for {endpoint.name}"
            return UpstreamError("certificate", f"{text}: give --upstream HOST#NAME")
    return describe_tls_error(error, trust)


Reply = Callable[[bytes, ClientAddress], None]
Waiter = tuple[Query, Reply]
Answered = tuple[Query, bytes, int]  # a query, its answer and the RCODE of that
Origin = tuple[str, "Endpoint | None"]  # of answers: one of SOURCES, and the upstream


class Exchange:
    """One question in flight: who waits for it, and what has been tried.

    All of it belongs to its group's lock; `done` never becomes False again, and may be
    read by everybody.
    """

    SUSPECT = 3  # losses after which it uses a lane; a link that it had alone counts 3
    __slots__ = (
        *("copies", "deadline", "done", "due", "edns", "failure", "lane", "last"),
        *("live", "losses", "parked", "query", "refused_by", "sent_at", "stale"),
        *("started", "waiters", "wire"),
    )

    def __init__(self, query: Query, now: float, patience: float) -> None:
        self.query = query
        self.edns = PADDED
        self.wire = build_upstream_query(query)  # without its ID
        self.started = self.sent_at = now  # when last
        self.due = now + patience  # when to look whether it needs another copy
        self.deadline = self.due  # when its clients are told that there is no answer
        self.waiters: list[Waiter] = []
        self.stale = query.stale  # the expired entry of the cache that may answer it
        self.done = False  # nobody waits for it any more
        self.parked = False  # it waits for a link to open
        self.copies = 0  # times it was sent
        self.live = 0  # copies that may still be answered
        self.losses = 0  # links that died with it
        self.lane = 0  # or the number of the links that it may use: others suffered
        self.last: Link | None = None  # that was used last; a copy takes another
        self.refused_by: tuple[Upstream, ...] = ()  # who answered SERVFAIL or the like
        self.failure: Response | None = None  # the best that another may better

    @property
    def suspect(self) -> bool:
        """Tell whether it may be what links die of: it then uses a lane."""
        return self.losses >= self.SUSPECT

    def use_edns(self, edns: int) -> None:
        """Have it sent with so much of EDNS from now on."""
        self.edns = edns
        self.wire = build_upstream_query(self.query, edns)


# What a link got for an exchange, and the seconds that it took. A plain tuple: a
# NamedTuple costs 0.4 us more per answer.
Answer = tuple[Exchange, Response, float]


class TLSFacts(NamedTuple):
    """What a handshake agreed on."""

    version: str = "none"
    resumed: bool = False
    expires: float = 0.0  # when the certificate does, in s since 1970; 0: not known
    certificate: bytes = b""  # of the server in DER, also where it was resumed


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
        self._tls: ssl.SSLObject | None = None
        if context is not None:
            self._tls = context.wrap_bio(
                *(self._incoming, self._outgoing),
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
            except ssl.SSLError as error:
                text = f"broken TLS: {explain_alert(error)}"
                failure = UpstreamError("garbage", text)
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
        with self._lock:
            return self._tls.session if self._tls else None

    def facts(self) -> TLSFacts:
        if self._tls is None:
            return TLSFacts()
        with self._lock:
            version, resumed = self._tls.version() or "", self._tls.session_reused
            certificate = self._tls.getpeercert(binary_form=True) or b""
            expiry = (self._tls.getpeercert() or {}).get("notAfter")
        seconds = ssl.cert_time_to_seconds(expiry) if isinstance(expiry, str) else 0
        return TLSFacts(version, bool(resumed), seconds, certificate)


def shake_hands(
    raw: socket.socket,
    step: Callable[[bytes], tuple[bytes, bool]],
    deadline: float,
) -> None:
    """Carry octets between a socket and the `step` of a handshake, until it is done.

    Raises OSError (ssl.SSLError is one), as socket.timeout at the deadline, or
    UpstreamError where the peer goes away.
    """
    octets, done = step(b"")
    while True:
        left = deadline - elapsed()
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


def draw_ids() -> Iterator[int]:
    """Return random IDs for ever, with one system call for 512 of them."""
    while True:
        yield from struct.unpack("=512H", os.urandom(1024))


class Link:
    """A way to an upstream, connected whenever it is wanted, for many queries at once.

    Its own thread connects, shakes hands and reads; any thread may send, and none waits
    for another or for the network. `pending` belongs to the group's lock, but the
    link's thread, and nobody else, takes out of it without.
    """

    MAX_PENDING = 16384  # a quarter of the IDs: a random free one is found at once
    FORGOTTEN = 30.0  # s after which a query that was never answered gives up its ID
    STRAYS = 256  # messages in a row that answer nothing: a burst has fewer duplicates
    READ_SIZE = 65536
    IDLE_MARGIN = 0.8  # of an idle life is used: clocks are coarse and packets travel
    IDLE_MIN = 0.25  # s; below it a connection per query would do as well

    def __init__(self, group: UpstreamGroup, home: Upstream, lane: int) -> None:
        self.home = home
        self.lane = lane
        self._group = group
        # Held by whoever writes to the socket, closes it or puts another in its place;
        # guards the next three.
        self._sending = threading.Lock()
        self._socket: socket.socket | None = None
        self._unsent = b""
        self._choked = False  # the timer is to write the rest
        self.channel = Channel()
        self.thread: threading.Thread | None = None
        # All below belongs to the group's lock.
        self.running = False  # from when it is wanted to when its thread has ended
        self.open = False  # queries may be sent
        self.retired = False  # it takes no more queries
        self.end_reason = ""  # why it is closed from here; it is then retired as well
        self.begun_at = self.opened_at = self.answered_at = -math.inf
        self.active_at = 0.0  # when octets came last, or a query went out after quiet
        self.waiting_since: float | None = None  # for the first octets since a query
        self.pending: dict[int, tuple[Exchange, float]] = {}
        # The oldest query that it has not answered: of an upstream that answers in
        # order, the one that all others wait for.
        self.head: tuple[Exchange, float] | None = None
        self._frames: list[bytes] = []
        self._draw = draw_ids().__next__

    def want(self, now: float) -> None:
        """Note that it is to be opened; `start` does that, without the lock."""
        self.running, self.retired, self.end_reason = True, False, ""
        self.begun_at, self.opened_at, self.answered_at = now, -math.inf, -math.inf
        self.waiting_since = self.head = None
        self._frames = []

    def start(self) -> None:
        """Start the thread that opens it."""
        name = f"upstream-{self.home.endpoint.host}"
        thread = threading.Thread(target=self._run, name=name, daemon=True)
        try:
            thread.start()
            self.thread = thread
        except RuntimeError as error:  # no more threads
            self._group.link_ended(self, UpstreamError("internal", str(error)))

    # Under the group's lock.

    def fit(self, now: float) -> bool:
        """Tell whether it may carry more queries."""
        if not self.open or self.retired:
            return False
        if self.waiting_since is None:
            usable_for = max(self.IDLE_MIN, self.home.idle_life * self.IDLE_MARGIN)
            return now - self.active_at < usable_for
        return len(self.pending) < self.MAX_PENDING

    def silent(self, now: float) -> bool:
        """Tell whether an answer is overdue."""
        since = self.waiting_since
        return since is not None and now - since > self.home.overdue_after

    def led_by(self, exchange: Exchange | None) -> bool:
        """Tell whether it is this one that all others wait for."""
        return self.head is not None and self.head[0] is exchange

    def answered(self) -> bool:
        """Tell whether anything was answered since it was opened."""
        return self.answered_at > self.begun_at

    def idle(self) -> bool:
        """Tell whether nobody waits for what is pending."""
        return all(exchange.done for exchange, _ in self.pending.copy().values())

    def queue(self, exchanges: Sequence[Exchange], now: float, patience: float) -> None:
        """Put queries where `flush` finds them, to be looked at after `patience`."""
        if self.waiting_since is None:
            self.waiting_since = self.active_at = now
        if self.head is None:
            self.head = exchanges[0], now
        pending, frames, draw = self.pending, self._frames, self._draw
        due = now + patience
        for exchange in exchanges:
            while (ident := draw()) in pending:
                pass
            pending[ident] = exchange, now
            wire = exchange.wire
            frames.append(PAIR.pack(len(wire) + 2, ident) + wire)
            exchange.last, exchange.sent_at, exchange.due = self, now, due
            exchange.parked = False
            exchange.copies += 1
            exchange.live += 1

    def heard(self, now: float, answered: bool) -> None:
        """Note that octets came, answers or not; its own thread."""
        pending = self.pending
        if answered or pending:  # a ticket, or close_notify, ends no idleness
            self.active_at = now
        while pending:
            ident, (exchange, sent_at) = next(iter(pending.items()))
            if now - sent_at < self.FORGOTTEN or now < exchange.deadline:
                break
            del pending[ident]
        self.waiting_since = now if pending else None
        ident, head = next(iter(pending.items())) if pending else (0, None)
        if answered:
            self.answered_at = now
            if head is not None and head == self.head:
                # An answer that overtakes an older query proves that none waits for
                # another. That one is not waited for again: it may never be answered.
                self.home.in_order, self.home.overtook_at = False, now
                del pending[ident]
                pending[ident] = head
                head = next(iter(pending.values()))
        self.head = head

    # Under no lock.

    def flush(self) -> None:
        """Write all that has gathered as one TLS write; any thread, never waits.

        Whoever finds another at it leaves his frames to that one: he has queued them
        before he looked, and the writer looks again after it has let go. 47-53 k
        queries/s against 23-31 k where each query is a write of its own.
        """
        while (self._frames or self._unsent) and self._sending.acquire(blocking=False):
            planned = self._choked
            try:
                more = self._write()
            finally:
                self._sending.release()
            if self._choked and not planned:
                self._group.timer.at(elapsed() + Timer.TICK, self._write_rest)
            if not more:
                return

    def _write(self) -> bool:
        """Encrypt and send; False where there is no room, or nobody to send it to."""
        raw = self._socket
        if raw is None:
            return False
        with self._group.lock:
            if not self.open:
                return False
            frames, self._frames = self._frames, []
        try:
            self._unsent += self.channel.encrypt(b"".join(frames))
            sent = raw.send(self._unsent, socket.MSG_DONTWAIT)
        except BlockingIOError:
            sent = 0
        except (OSError, ValueError):  # whoever reads finds the same, and reports it
            return False
        self._unsent = self._unsent[sent:]
        self._choked = self._choked or bool(self._unsent)
        return not self._unsent

    def _write_rest(self) -> None:
        with self._sending:
            self._choked = False
        self.flush()

    def close(self) -> None:
        """Wake its thread, which ends it; any thread, never waits for the network."""
        with self._sending:
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    # Of an open one the reading side alone: close_notify is to follow.
                    way = socket.SHUT_RD if self.open else socket.SHUT_RDWR
                    self._socket.shutdown(way)

    # Its own thread.

    def _run(self) -> None:
        try:
            facts = self._open()
            self._group.link_opened(self, facts)
            self._read()
        except UpstreamError as failure:
            error = failure
        except Exception:
            note(logging.ERROR, "internal error", bug=True, thread="upstream")
            error = UpstreamError("internal", "internal error: see the log")
        self._part()
        self._group.link_ended(self, error)

    def _part(self) -> None:
        """Say farewell, and close the socket."""
        with self._sending:
            raw, self._socket, self._unsent = self._socket, None, b""
            if raw is not None:
                with contextlib.suppress(OSError):
                    raw.setblocking(False)  # its time-out counts beside MSG_DONTWAIT
                    raw.send(self.channel.farewell())
                raw.close()

    def _open(self) -> TLSFacts:
        """Connect and shake hands; raises UpstreamError."""
        home, trust = self.home, self._group.trust
        endpoint, patience = home.endpoint, home.patience()
        self.channel = Channel()
        raw = self._connect(elapsed() + patience)
        if endpoint.name:
            # It comes back after the handshake: a session that is refused is not
            # offered again, nor is any whose certificate has ended.
            session, home.session = home.session, None
            if time.time() >= home.certificate_expires:
                session = None
            self.channel = Channel(trust.context, endpoint.name, session)
            try:
                shake_hands(raw, self.channel.shake_hands, elapsed() + patience)
            except ssl.SSLError as error:
                self._part()
                # Another connection, without a query, may tell what names there are.
                where = endpoint, trust, home.PATIENT
                raise explain_tls_error(error, *where) from error
            except socket.timeout as error:
                raise UpstreamError("timeout", "no end of the TLS handshake") from error
            except OSError as error:
                raise describe_network_error(error, endpoint) from error
            home.session = home.session or session
        raw.settimeout(None)
        facts = self.channel.facts()
        trust.check_pin(endpoint.name, facts.certificate)
        return facts

    def _connect(self, deadline: float) -> socket.socket:
        """Connect to an address of the host; the one that worked last comes first."""
        home = self.home
        host, port = home.endpoint.host, home.endpoint.port
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise describe_network_error(error, home.endpoint) from None
        found.sort(key=lambda entry: entry[4] != home.address)
        failure = OSError("no address")
        for number, (family, kind, protocol, _, address) in enumerate(found):
            # Half of what is left: who answers needs a round trip, however many follow.
            share = (deadline - elapsed()) / min(len(found) - number, 2)
            self._part()
            try:
                raw = socket.socket(family, kind, protocol)
                with self._sending:
                    self._socket = raw
                raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                raw.settimeout(max(0.05, share))
                begun = elapsed()
                if not self.end_reason:
                    raw.connect(address)
            except OSError as error:
                failure = error
                continue
            if self.end_reason:  # a connection that `close` ends looks like one
                break
            home.address, home.round_trip = address, elapsed() - begun
            return raw
        raise describe_network_error(failure, home.endpoint) from failure

    def _read(self) -> None:
        """Read and hand on answers until the link ends; raises UpstreamError."""
        raw, rest, strays = self._socket, b"", 0
        assert raw is not None
        buffer = bytearray(self.READ_SIZE)
        view = memoryview(buffer)
        while True:
            try:
                size = raw.recv_into(buffer)
            except OSError as error:
                raise describe_network_error(error, self.home.endpoint) from error
            if not size:
                raise UpstreamError("closed", "closed by the server")
            now = elapsed()
            plaintext, failure, due = self.channel.decrypt(view[:size])
            messages, rest = split_frames(rest + plaintext)
            answers = self._match(messages, now)
            strays = 0 if answers else strays + len(messages)
            self._group.link_answered(self, answers, now)
            if due:  # what TLS has to say of its own goes out with an empty frame
                with self._group.lock:
                    self._frames.append(b"")
                self.flush()
            if failure is not None:
                raise failure
            if strays > self.STRAYS:
                raise UpstreamError("garbage", "messages that answer no question")

    def _match(self, messages: Sequence[bytes], now: float) -> list[Answer]:
        """Pair messages with exchanges; a message ends no other question than its own.

        One with an ID that nobody waits for is passed over: a duplicate, or too late.
        """
        answers: list[Answer] = []
        take = self.pending.pop
        for message in messages:
            if len(message) < MIN_MESSAGE:
                continue
            entry = take(message[0] << 8 | message[1], None)
            if entry is None:
                continue
            exchange, sent_at = entry
            question = exchange.query.question
            try:
                if message[2] >= 0x80 and message.startswith(question, 12):
                    response = parse_response(message, 12 + len(question))
                else:
                    response = parse_misfit(message, question)
            except FormatError as error:
                option = build_option(ExtendedError.NETWORK_ERROR, str(error))
                response = error_response(Rcode.SERVFAIL, option)
            answers.append((exchange, response, now - sent_at))
        return answers


# ---- Upstreams: health, strategy, retries --------------------------------------------
# Which link an exchange goes to, and what happens when no answer comes. A group decides
# under its one lock, on memory alone; what it has decided is collected in a Plan, and
# done after the lock is released.

FAILURES = (
    *("timeout", "refused", "reset", "unreachable", "network", "resolve", "tls"),
    *("certificate", "closed", "garbage", "internal"),
)
BAD_EDNS = Rcode.FORMERR, Rcode.NOTIMP  # of a server that does not know EDNS, perhaps
ENDS = "idle", "spare", "network changed", "ended"  # of ours; others are failures
# What is counted of an upstream, with the label that each has beside it.
UPSTREAM_EVENTS = (
    *(("requests",), ("replays",), ("hedges",), ("hedges_won",)),
    ("conn_cache_misses",),
    *(("failures", cause) for cause in (*FAILURES, "rcode")),
    *(("handshakes", result) for result in ("full", "resumed", *FAILURES)),
    *(("closes", reason) for reason in (*FAILURES, *ENDS)),
)


class Upstream:
    """One endpoint: its links, its health as plain numbers, what is counted of it.

    Memory only; all but what a link's thread leaves here belongs to the group's lock.
    """

    SHARED = 4  # links for everybody: one works, one hedges, others for when those hang
    LANES = 8  # links for queries that killed others, or that hold up those behind them
    ORDER_MEMORY = 5.0  # s after an overtaking before which that is not doubted
    HELD = 3  # queries held up on one link, while another answers: it may be in order
    LANE_PATIENCE = 2.0  # s for which a lane may owe an answer that nobody waits for
    OVERDUE_MIN, OVERDUE_MAX = 0.05, 1.0  # s; bounds of when an answer is overdue
    GRACE = 1.5  # s; one that was reached may be restarting: queries wait so long
    RETRY_GRACE = 0.05  # s until the second attempt at one that was there a moment ago
    RETRY_MIN, RETRY_MAX = 0.5, 30.0  # s between attempts while it is down
    RETRY_SHARE = 0.05  # of the outage so far: back within 5 % of what it lasted
    DOUBT = 0.5  # s for which others are preferred to one that failed
    STUCK = 0.75  # s after which an attempt to connect may be overtaken by another
    QUICK, PATIENT = 1.0, 3.0  # s to connect, and to shake hands, at least and at most
    LONG_LINE = 3  # times the latency: no try takes less, as a handshake may need two
    SAMPLES = 8  # latencies of a batch that count for its health: they are alike
    IDLE_START = 10.0  # s; what the large public resolvers were measured to keep
    IDLE_MAX = 60.0  # s; one that is too old for use is left to the server, to learn
    EDNS_MEMORY = 900.0  # s for which a server that fails at EDNS gets less of it

    def __init__(self, group: UpstreamGroup, endpoint: Endpoint, index: int) -> None:
        self.endpoint = endpoint
        self.index = index
        lanes = (0,) * self.SHARED + tuple(range(1, self.LANES + 1))
        self.links = [Link(group, self, lane) for lane in lanes]
        self.latency: float | None = None  # s, smoothed
        self.overdue_after = self.OVERDUE_MIN  # s; about the 95th percentile
        self.in_order = True  # answers each connection in order, as far as is known
        self.overtook_at = -math.inf  # when an answer came before an older one last
        self.reached = False  # has ever taken a connection, or broken it off
        self.failures = 0  # links that failed, since an answer came
        self.failing_since: float | None = None
        self.retry_after = 0.0  # s between attempts
        self.failed_at: float | None = None
        self.error = UpstreamError("closed", "not connected yet")
        self.reported: set[str] = set()  # causes that the log knows of
        self.heard_at = -math.inf  # when it answered last
        self.doubted_until = -math.inf
        self.idle_life = self.IDLE_START  # s that it keeps idle connections
        self.idle_ages = collections.deque[float](maxlen=5)  # s, when it closed some
        self.edns, self.edns_until = PADDED if endpoint.name else UNPADDED, 0.0
        self.counts = collections.Counter(dict.fromkeys(UPSTREAM_EVENTS, 0))
        self.durations = Histogram(LATENCIES)
        # Left here by the threads of links, each at once.
        self.session: ssl.SSLSession | None = None  # never given to another upstream
        self.certificate_expires = 0.0  # s since 1970; 0: not known
        self.address: object = None  # that of the host which worked last
        self.round_trip = 0.0  # s, of the latest TCP handshake

    @property
    def state(self) -> str:
        """Return how it does, in one word.

        One that failed counts as up again as soon as a connection lasts: nobody may ask
        for an answer of an instance that is not ready.
        """
        resting = any(link.open and link.waiting_since is None for link in self.links)
        if self.failing_since is not None:
            return "doubtful" if resting else "down"
        return "up" if resting or self.reached else "new"

    def down(self, now: float) -> bool:
        """Tell whether to give up on it: failing, and not just for a moment."""
        since = self.failing_since
        return since is not None and not (self.reached and now - since < self.GRACE)

    def usable(self, now: float, exchange: Exchange | None = None) -> Link | None:
        """Return the link for new queries, or for a copy of one that was sent before.

        The first that is not silent, as many queries on one connection cost less than a
        few on each of two; else the one heard of last. But a copy goes behind no query
        that holds up its link: it would wait there as well.
        """
        lane, last = (exchange.lane, exchange.last) if exchange else (0, None)
        ordered = self.in_order and last is not None
        if ordered and not lane and any(link.led_by(exchange) for link in self.links):
            return None  # the same would hold up a second link
        single = self.in_order and lane and exchange and not exchange.suspect
        best: Link | None = None
        for link in self.links:
            if link.lane != lane or link is last or not link.fit(now):
                continue
            if single and (link.pending or link.answered()):
                continue
            if not link.silent(now):
                return link
            since = link.waiting_since or 0.0
            if best is None or since > (best.waiting_since or 0.0):
                best = link
        return None if ordered else best

    def connect(self, plan: Plan, lane: int = 0, *, urgent: bool = True) -> bool:
        """Begin a link if that is due; tell whether one may open soon.

        `urgent`: a query waits for it, and nothing else can serve.
        """
        now, links = plan.now, [link for link in self.links if link.lane == lane]
        if plan.group.closed:
            return False
        # One that answered a moment ago may be well, but for a name that takes its
        # connections down: then all lanes are opened that one decision asks for.
        lively, hope = now - self.heard_at < self.GRACE, not self.down(now)
        for link in links if lively or not self.failures else self.links:
            if link.running and not link.open and now - link.begun_at < self.STUCK:
                return True
        together = lively and any(link.begun_at == now for link in self.links)
        if now < self.retry_at(urgent) and not together:
            return hope
        free = [link for link in links if not link.running]
        if not free:
            for link in links:
                useless = link.answered() if lane else link.waiting_since is None
                if not link.open or not useless or not link.idle():
                    continue
                if lane or not link.fit(now):
                    plan.close(link, "spare" if lane else "idle")
                    break
            return hope
        mute = not free[0].answered() and free[0].begun_at > now - self.RETRY_MIN
        if mute and any(link.open for link in self.links):
            return hope  # it may take no more connections than it has
        free[0].want(now)
        plan.todo[free[0].start] = None
        return True

    def retry_at(self, urgent: bool) -> float:
        """Return when the next attempt to connect may begin."""
        if self.failing_since is None or self.failures < 2:
            return -math.inf
        begun_at = max(link.begun_at for link in self.links)
        wait = self.RETRY_MIN if urgent else self.retry_after
        if self.reached and begun_at - self.failing_since < self.GRACE:
            wait = min(wait, self.RETRY_GRACE * 2 ** min(self.failures - 2, 8))
        return begun_at + wait

    def patience(self) -> float:
        """Return how long the next link may take to connect, and to shake hands.

        Twice as long after each failure: the line may have become a long one.
        """
        line = max(self.QUICK, self.LONG_LINE * (self.latency or 0.0))
        quick = min(line * 2 ** min(self.failures, 2), self.PATIENT)
        return quick if self.heard_at > -math.inf else self.PATIENT

    def note_opened(self, link: Link, facts: TLSFacts, now: float) -> None:
        """Note a link that opened: the TCP handshake tells the first latency."""
        link.open, link.opened_at, link.active_at = True, now, now
        self.counts["handshakes", "resumed" if facts.resumed else "full"] += 1
        self.certificate_expires = facts.expires
        self.reached = True
        if self.latency is None:
            self.latency = self.round_trip
            self._judge(3 * self.round_trip)

    def note_answers(self, answers: Sequence[Answer], now: float) -> bool:
        """Note good answers; True if the log shall say that it is up again.

        Up by 19 % and down by 1 % balances at the 95th percentile. An answer to what
        was answered elsewhere says nothing of that: it was held up by another.
        """
        self.heard_at = now
        latency, overdue = self.latency or 0.0, self.overdue_after
        for exchange, _, seconds in answers[: self.SAMPLES]:
            latency += (seconds - latency) * 0.125
            if not exchange.done:
                overdue *= 1.19 if seconds > overdue else 0.99
        self.latency = latency
        self._judge(overdue)
        for seconds, same in itertools.groupby([each[2] for each in answers]):
            self.durations.observe(seconds, len(list(same)))
        if not self.failures:
            return False
        self.forgive()
        reported, self.reported = bool(self.reported), set()
        return reported

    def _judge(self, overdue: float) -> None:
        self.overdue_after = min(max(overdue, self.OVERDUE_MIN), self.OVERDUE_MAX)

    def forgive(self) -> None:
        """Forget failures: what they were due to is over."""
        self.failures, self.failing_since, self.doubted_until = 0, None, -math.inf

    def note_end(self, link: Link, error: UpstreamError, now: float) -> bool:
        """Note that a link is gone or did not open; True if the log shall say so."""
        opened = link.opened_at > -math.inf
        reason = link.end_reason or error.cause
        if opened:
            self.counts["closes", reason] += 1
        elif reason in FAILURES:
            self.counts["handshakes", reason] += 1
        if reason in ENDS:
            return False
        # While it fails, one that ends at once is a failure, whoever waits for it.
        brief = self.failures and now - link.opened_at < Link.IDLE_MIN
        if opened and reason != "timeout" and link.idle() and not brief:
            # Below the least there is nothing to learn: it is a restart or a bound.
            if not link.pending and now - link.active_at > Link.IDLE_MIN:
                self._learn_life(now - link.active_at)
            return False
        self.counts["failures", reason] += 1
        if any(each.open and each.opened_at > link.begun_at for each in self.links):
            return False  # another one has opened since
        if opened and link.lane and now - self.heard_at < self.GRACE:
            return False  # it carried what had others taken down
        if self.failing_since is None:
            self.failing_since = now if opened else link.begun_at
        self.failures += 1
        self.failed_at, self.error = now, error
        outage = now - self.failing_since
        wait = min(max(self.RETRY_MIN, outage * self.RETRY_SHARE), self.RETRY_MAX)
        self.retry_after = wait * random.uniform(0.75, 1.0)
        self.reached = self.reached or reason == "reset"  # as by one that stops
        self.doubted_until = max(now + self.DOUBT, self.retry_at(urgent=True))
        kind = "ended" if opened else reason
        report = self.down(now) and kind not in self.reported
        if report:
            self.reported.add(kind)
        return report

    def _learn_life(self, age: float) -> None:
        """Note how long it kept a connection: the second shortest counts.

        The shortest may have been a restart.
        """
        self.idle_ages.append(age)
        if len(self.idle_ages) > 1:
            self.idle_life = sorted(self.idle_ages)[1]

    def look(self, plan: Plan, silence: float) -> None:
        """Have links closed that are of no use, or were silent for so many seconds."""
        now, left = plan.now, False
        shared = self.links[: self.SHARED]
        stuck = self.in_order and all(link.open and link.silent(now) for link in shared)
        for link in self.links:
            if not link.open or link.end_reason:
                continue
            since, quiet = link.waiting_since, now - link.active_at
            if since is not None and now - since > silence:
                plan.close(link, "timeout")
            elif link.lane:
                # It is kept for a moment: what it was opened for may be on its way, or
                # the server still at work on what nobody waits for.
                patience = Link.IDLE_MIN if since is None else self.LANE_PATIENCE
                if quiet > patience and link.idle():
                    plan.close(link, "spare")
            elif stuck or link.retired:
                if link.idle():  # free for one that answers, if only its first query
                    plan.close(link, "spare")
            elif since is None and not link.fit(now):
                if quiet >= self.IDLE_MAX:
                    self._learn_life(quiet)
                if left or quiet >= self.IDLE_MAX:
                    plan.close(link, "idle")
                left = True  # one is left to the server, to learn how long it keeps it
        self._doubt_order(now)
        if self.edns_until <= now:
            self.edns = PADDED if self.endpoint.name else UNPADDED

    def _doubt_order(self, now: float) -> None:
        """Unlearn that it answers out of order, where that does not look so any more.

        A server that leaves a query unanswered looks as if it overtook it. But if much
        is held up on one link while another answers, it may be in order after all.
        """
        heard = max(link.answered_at for link in self.links)
        for link in self.links if now - self.overtook_at > self.ORDER_MEMORY else ():
            if link.silent(now) and heard > now - self.overdue_after:
                held = sum(not e.done for e, _ in link.pending.copy().values())
                self.in_order |= held >= self.HELD

    def facts(self) -> dict[str, object]:
        return {
            "name": str(self.endpoint),
            "state": self.state,
            "error": str(self.error),
            "since": self.failing_since,
            "failed_at": self.failed_at,
            "domain": "",
            "latency": self.latency,
            "overdue_after": self.overdue_after,
            "idle_life": self.idle_life,
            "connections": sum(link.open for link in self.links),
        }

    def samples(self) -> Iterator[Sample]:
        """Return its metrics, but for those whose value is not known yet."""
        name, counts = str(self.endpoint), self.counts
        for (event, *label), number in counts.items():
            yield f"dotproxy_upstream_{event}_total", (name, *label), number
        values: dict[str, float | Histogram | None] = {
            "up": int(self.state == "up"),
            "connections": sum(link.open for link in self.links),
            "request_duration_seconds": self.durations,
            "latency_seconds": self.latency,
            "conn_cache_hits_total": counts["requests",] - counts["conn_cache_misses",],
            "idle_life_seconds": self.idle_life,
            "certificate_expiry_timestamp_seconds": self.certificate_expires or None,
        }
        for metric, value in values.items():
            if value is not None:
                yield f"dotproxy_upstream_{metric}", (name,), value


STRATEGIES = ("fastest", "round-robin", "random", "failover")
Finished = tuple["Sequence[Waiter]", "Response | CacheEntry"]  # who gets what
# A question that has failed, who waits for it, and why.
Failed = tuple[Exchange, "Sequence[Waiter]", "Response | UpstreamError"]


class Plan:
    """A decision in the making: holds the group's lock, then carries out what it was.

    What is decided under the lock is done after it is released: links are started,
    written to and closed, and clients get what there is.
    """

    __slots__ = ("failed", "group", "now", "todo")

    def __init__(self, group: UpstreamGroup) -> None:
        self.group = group

    def __enter__(self) -> Plan:
        self.now = elapsed()
        self.todo: dict[Callable[[], None], None] = {}  # each once, in this order
        self.failed: list[Failed] = []
        self.group.lock.acquire()
        return self

    def at(self, when: float, function: Callable[[], None]) -> None:
        """Have the timer call a function."""
        self.todo[functools.partial(self.group.timer.at, when, function)] = None

    def close(self, link: Link, reason: str) -> None:
        """Have a link closed, unless it is; it takes no queries from now on."""
        if not link.end_reason:
            link.end_reason, link.retired = reason, True
            self.todo[link.close] = None

    def __exit__(self, *_: object) -> None:
        self.group.lock.release()
        for function in self.todo:
            function()
        if self.failed:
            self.group.proxy.fail(self.failed, self.now)


class UpstreamGroup:
    """The upstreams of some names, and the questions that are in flight to them.

    Each client that is given to `ask` gets its answer through the Proxy, exactly once,
    from any thread. No method blocks but `close`.
    """

    ACTIVE = 60.0  # s after the last query in which links are kept warm
    ROUND = 0.25  # s between looks at the links while there are clients
    CHECK = 0.02  # s between looks at the exchanges while there are any
    PATCH = 3.0  # s that an answer may come later than its clients wait, for the cache
    CERTAIN = 1.0  # s without any answer after which another copy needs no budget
    SPREAD = 1.5  # each further copy of a query waits so many times longer
    MAX_EARLY = 5  # copies before that of one query; with 3 some answers take 2.3 s
    MAX_COPIES = 128  # of one query, whatever its links die of
    HEDGE_SHARE = 0.1  # early copies, of all queries: a slow resolver is not doubled
    HEDGE_BURST = 32.0  # early copies at once: a handful of clients are all helped
    MAX_LOSSES = 7  # links that one query may take down, but see Exchange.SUSPECT
    WARM = 2  # upstreams that are kept connected while clients are active
    JUMP = 5.0  # s; clocks are corrected by less, and a shorter sleep breaks nothing

    def __init__(
        self,
        config: Config,
        endpoints: Sequence[Endpoint],
        trust: Trust,
        timer: Timer,
        proxy: Proxy,
    ) -> None:
        self.trust, self.timer, self.proxy = trust, timer, proxy
        self._timeout, self._strategy = config.timeout, config.strategy
        self.lock = threading.Lock()  # guards all below, and what it refers to
        self.upstreams = [
            Upstream(self, endpoint, index) for index, endpoint in enumerate(endpoints)
        ]
        self.exchanges: dict[bytes, Exchange] = {}  # by key, the oldest first
        self.waiting = 0  # clients' queries in flight
        self.refreshes = 0  # exchanges that nobody waited for, since the start
        self._checking = False  # the next look at the exchanges is planned
        self._looking = False  # the next look at the links is planned
        self._active_at = -math.inf
        self._asked = 0  # exchanges, since the last look
        self._tokens = self.HEDGE_BURST
        self._turn = 0  # of round-robin
        self._lanes = itertools.count()
        self._clocks_apart = time.time() - time.monotonic()
        self.closed = False

    def start(self) -> None:
        """Open a link to every upstream, before the first client asks."""
        with Plan(self) as plan:
            self._active_at, self._looking = plan.now, True
            plan.at(plan.now + self.ROUND, self._look)
            for upstream in self.upstreams:
                upstream.connect(plan)

    def close(self) -> None:
        """Close all links, and wait for their threads."""
        links = [link for upstream in self.upstreams for link in upstream.links]
        with Plan(self) as plan:
            self.closed = True
            for link in links:
                plan.close(link, "ended")
        for link in links:
            if link.thread is not None:
                link.thread.join(3 * Upstream.PATIENT)

    def ask(self, waiters: Sequence[Waiter]) -> None:
        """Have these questions answered, each asked once for all who wait for it."""
        exchanges, patience, fresh = self.exchanges, self._timeout, []
        with Plan(self) as plan:
            now = plan.now
            for waiter in waiters:
                query = waiter[0]
                exchange = exchanges.get(query.key)
                if exchange is None:
                    exchange = exchanges[query.key] = Exchange(query, now, patience)
                    fresh.append(exchange)
                elif query.stale is not None:
                    exchange.stale = query.stale  # it may have been a refresh until now
                exchange.waiters.append(waiter)
            self.waiting += len(waiters)
            if fresh:
                self._send_first(plan, fresh)

    def refresh(self, query: Query) -> None:
        """Ask with nobody waiting, unless that is in flight."""
        with Plan(self) as plan:
            if query.key not in self.exchanges:
                exchange = Exchange(query, plan.now, self._timeout)
                self.exchanges[query.key] = exchange
                self.refreshes += 1
                self._send_first(plan, [exchange])

    def shed(self, number: int) -> list[Waiter]:
        """Take out so many who wait, of the busiest client first, the oldest first."""
        with self.lock:
            found = [(e, w) for e in self.exchanges.values() for w in e.waiters]
            busy = collections.Counter(waiter[0].client[0] for _, waiter in found)
            found.sort(key=lambda each: -busy[each[1][0].client[0]])
            for exchange, waiter in found[:number]:
                exchange.waiters.remove(waiter)
                self.waiting -= 1
                if not exchange.waiters:
                    self._finish(exchange)
        return [waiter for _, waiter in found[:number]]

    def facts(self) -> list[dict[str, object]]:
        with self.lock:
            return [upstream.facts() for upstream in self.upstreams]

    def samples(self) -> list[Sample]:
        with self.lock:
            return [s for upstream in self.upstreams for s in upstream.samples()]

    def trouble(self) -> str:
        """Say why no upstream answers, or nothing where one does; never blocks.

        Where none does, the one who asks has them tried again when that is due: with no
        other client to do so, it would never be learned that the outage is over.
        """
        with Plan(self) as plan:
            if any(upstream.state in ("up", "doubtful") for upstream in self.upstreams):
                return ""
            for upstream in self.upstreams:
                upstream.connect(plan, urgent=False)
            return "; ".join(f"{u.endpoint}: {u.error}" for u in self.upstreams)

    # Called by the threads of links.

    def link_opened(self, link: Link, facts: TLSFacts) -> None:
        """Give a new link what waits for one."""
        home, tls, resumed = link.home, facts.version, facts.resumed
        where = home.endpoint
        note(logging.DEBUG, "connected", upstream=where, tls=tls, resumed=resumed)
        with Plan(self) as plan:
            if link.end_reason:
                return
            home.note_opened(link, facts, plan.now)
            parked = [e for e in self.exchanges.values() if e.parked]
            waiting = [e for e in parked if e.lane == link.lane]
            waiting = [e for e in waiting if home in self._askable(e)]
            if link.lane and home.in_order:  # each by itself, but for suspects
                waiting = [e for e in waiting if e.suspect or e is waiting[0]]
            if waiting:
                self._put(plan, link, waiting)
                home.counts["conn_cache_misses",] += len(waiting)

    def link_answered(self, link: Link, answers: Sequence[Answer], now: float) -> None:
        """Hand on what has a good answer; ask again about the rest."""
        bad = [a for a in answers if a[1].rcode in FAILURE_RCODES or a[1].flags & TC]
        faults = {id(each) for each in bad}
        good = [each for each in answers if id(each) not in faults] if bad else answers
        # Into the cache first: who finds no exchange to join finds the answer there.
        responses = self.proxy.store(good, now) if good else []
        home, exchanges = link.home, self.exchanges
        first, report = bool(answers) and not link.answered(), False
        if first:
            home.session = link.channel.session() or home.session
        finished: list[Finished] = []
        with self.lock:
            link.heard(now, bool(answers))
            if good:
                report = home.note_answers(good, now)
            for (exchange, _, _), response in zip(good, responses):
                exchange.live -= 1
                if exchange.copies > 1 or exchange.edns < PADDED:
                    self._note_copies(link, exchange, now)
                # Its clients may have been told of a failure, and have asked again.
                current = exchanges.pop(exchange.query.key, None)
                if current is not None:
                    current.done = exchange.done = True
                    waiters, current.waiters = current.waiters, []
                    self.waiting -= len(waiters)
                    finished.append((waiters, response))
        if finished:
            self.proxy.answer(finished, (UPSTREAM, home.endpoint), now)
        if bad or first:
            self._review(link, answers, bad)
        if report:
            note(logging.INFO, "upstream up", name=home.endpoint)

    def _note_copies(self, link: Link, exchange: Exchange, now: float) -> None:
        """Learn from a good answer to what was sent several times, or refused."""
        home = link.home
        if exchange.edns < home.edns and not home.endpoint.name:  # RFC 6891 section 7
            home.edns, home.edns_until = exchange.edns, now + Upstream.EDNS_MEMORY
        if exchange.done:
            return  # the first answer counts
        if exchange.live > 0 and exchange.last is link:
            home.counts["hedges_won",] += 1
        for refuser in exchange.refused_by:
            if refuser is not home:
                refuser.doubted_until = now + Upstream.DOUBT

    def _review(
        self, link: Link, answers: Sequence[Answer], bad: Sequence[Answer]
    ) -> None:
        """Do what only some answers ask for: the first, and those that are none."""
        home = link.home
        told = find_option(answers[0][1].upstream_options, OPTION_KEEPALIVE)
        with Plan(self) as plan:
            if told and len(told) == 2:  # the idle timeout in 0.1 s, RFC 7828
                seconds = int.from_bytes(told, "big") / 10
                link.retired |= not seconds  # to be closed once all is answered
                if seconds:  # then there is nothing to learn from what it closes
                    home.idle_life = seconds
                    home.idle_ages = collections.deque(maxlen=0)
            for answer in bad:
                self._refuse(plan, link, answer)

    def link_ended(self, link: Link, error: UpstreamError) -> None:
        """Learn from the loss, send again what it left, and open another."""
        home = link.home
        note(logging.DEBUG, "disconnected", upstream=home.endpoint, error=error)
        with Plan(self) as plan:
            now, opened = plan.now, link.opened_at
            link.running = link.open = False
            if self.closed:
                return
            if link.end_reason == "timeout":  # its thread saw but our own end of it
                error = UpstreamError("timeout", "no answer on an open connection")
            report = home.note_end(link, error, now)
            orphans = [exchange for exchange, _ in link.pending.values()]
            link.pending.clear()
            link.waiting_since = link.head = None
            # One that was closed from here, or that answered since, says nothing
            # against a query; and the link may be wanted again below.
            innocent_at = math.inf if link.end_reason else link.answered_at
            alone = sum(not exchange.done for exchange in orphans) == 1
            blame = Exchange.SUSPECT if alone else 1
            for exchange in orphans:
                guilty = exchange.sent_at >= innocent_at
                self._lose(plan, link, exchange, error, guilty * blame)
            if error.cause == "unreachable" and home.down(now):
                # This host knows of no way there: nobody waits for what is on one.
                for each in home.links:
                    if each.open and each.silent(now):
                        plan.close(each, "network changed")
            self._reconsider(plan)
            # One that was closed at once would be again: leave it to the next look.
            if now - opened >= self.ROUND and now - self._active_at < self.ACTIVE:
                self._keep_warm(plan)
            if home.retry_at(urgent=True) > now:
                plan.at(home.retry_at(urgent=True), self._reconnect)
        if report:
            note(logging.WARNING, "upstream down", name=home.endpoint, error=error)

    # The rule: where an exchange is sent, again, and when it has failed.

    def _send_first(self, plan: Plan, exchanges: Sequence[Exchange]) -> None:
        now, number = plan.now, len(exchanges)
        self._active_at = now
        self._asked += number
        self._turn += 1
        self._tokens = min(self._tokens + number * self.HEDGE_SHARE, self.HEDGE_BURST)
        if self._slept():
            self._renew_links(plan)
        if not self._checking:
            self._checking = True
            plan.at(now + Upstream.OVERDUE_MIN, self._check)
        if not self._looking:
            self._looking = True
            plan.at(now, self._look)
        link = self._best(now)
        if link is not None:
            self._put(plan, link, exchanges)
            return
        for exchange in exchanges:
            self._again(plan, exchange)

    def _best(self, now: float, exchange: Exchange | None = None) -> Link | None:
        """Return the link that a new query, or a copy of one, is sent on."""
        best, least = None, (True, math.inf)
        for upstream in self._askable(exchange):
            link = upstream.usable(now, exchange)
            if link is None or len(self.upstreams) == 1:
                best = link or best
                continue
            doubts = now < upstream.doubted_until or link.silent(now)
            score = doubts, self._score(link)
            if best is None or score < least:
                best, least = link, score
        return best

    def _askable(self, exchange: Exchange | None) -> Sequence[Upstream]:
        """Return the upstreams that did not refuse it, or all where all have."""
        refused_by = exchange.refused_by if exchange else ()
        if not refused_by:
            return self.upstreams
        return [u for u in self.upstreams if u not in refused_by] or self.upstreams

    def _score(self, link: Link) -> float:
        home = link.home
        if self._strategy == "failover":
            return home.index
        if self._strategy == "round-robin":
            return (home.index - self._turn) % len(self.upstreams)
        if self._strategy == "random":
            return random.random()
        # Until it has answered, one query at a time; then work counts little, as few
        # connections with much traffic cost less than many with little.
        weight = 0.01 if home.heard_at > -math.inf else 1.0
        return (home.latency or 0.0) * (1.0 + weight * len(link.pending))

    def _put(self, plan: Plan, link: Link, exchanges: Sequence[Exchange]) -> None:
        """Send a copy of each on this link."""
        home, copies = link.home, exchanges[0].copies
        if home.edns < PADDED:
            for exchange in exchanges:
                if home.edns < exchange.edns:
                    exchange.use_edns(home.edns)
        patience = home.overdue_after
        if copies:
            patience = min(patience * self.SPREAD**copies, Upstream.OVERDUE_MAX)
        link.queue(exchanges, plan.now, patience)
        home.counts["requests",] += len(exchanges)
        plan.todo[link.flush] = None

    def _again(self, plan: Plan, exchange: Exchange) -> None:
        """Send one more copy as soon as may be; fail it where that is never."""
        best = self._best(plan.now, exchange)
        if best is not None:
            self._put(plan, best, (exchange,))
            return
        exchange.parked, exchange.due = True, exchange.deadline
        hope = exchange.live > 0
        for upstream in self._askable(exchange):
            hope |= upstream.connect(plan, exchange.lane)
        if not hope:
            self._give_up(plan, exchange, "")

    def _act(self, plan: Plan, exchange: Exchange) -> None:
        """Do what is due for an exchange: fail it, or send another copy of it."""
        now, last, copies = plan.now, exchange.last, exchange.copies
        if now >= exchange.deadline:
            self._give_up(plan, exchange, "no answer")
            return
        late = now - exchange.sent_at >= self.CERTAIN
        if last is None or exchange.suspect:  # only another upstream may do better
            exchange.due = exchange.deadline
            if last and late and len(self.upstreams) > 1:
                self._again(plan, exchange)
            elif last and not late:
                exchange.due = exchange.sent_at + self.CERTAIN
            return
        in_order, gap = last.home.in_order and last.open, last.home.overdue_after
        if in_order and not last.led_by(exchange):  # it waits behind another
            exchange.due = (last.waiting_since or now) + gap
            if now < exchange.due:
                return
            exchange.due = now + gap
            # To pass that by, over another link, adds no load where it hurts.
            free = len(last.pending) <= self.HEDGE_BURST
            if not free and not self._may_hedge(exchange, last, now):
                return
        else:
            # To an upstream that answers in order a copy of what holds up a link goes
            # over a lane: on another shared link it would hold up that one as well.
            lane, exchange.lane = exchange.lane, 0
            alone = in_order and self._best(now, exchange) is None
            exchange.due = (now if late else exchange.sent_at) + self.CERTAIN
            # In a lane it waits until another link, or its upstream, is known better.
            if (alone and lane) or not (late or self._may_hedge(exchange, last, now)):
                exchange.lane = lane
                return
            exchange.lane = int(alone)
        self._again(plan, exchange)
        if exchange.parked and late and last.open and not in_order:
            self._put(plan, last, (exchange,))  # no other to be had: the same again
        if exchange.copies > copies and exchange.last is not None:
            exchange.last.home.counts["hedges",] += 1

    def _may_hedge(self, exchange: Exchange, last: Link, now: float) -> bool:
        """Tell whether an early copy may be sent, and count it.

        Free where one upstream has gone silent and another takes over.
        """
        if exchange.copies > self.MAX_EARLY or exchange.parked:
            return False
        best = self._best(now, exchange) if last.silent(now) else None
        if best is not None and best.home is not last.home:
            return True
        enough = self._tokens >= 1.0
        self._tokens -= enough
        return enough

    def _refuse(self, plan: Plan, link: Link, answer: Answer) -> None:
        """Ask again what was answered SERVFAIL and the like; pass it on at last."""
        exchange, response, _ = answer
        home = link.home
        home.counts["failures", "rcode"] += 1
        exchange.live -= 1
        if exchange.done:
            return
        clear, edns = not home.endpoint.name, min(exchange.edns, home.edns)
        if clear and edns > NO_EDNS and response.rcode in BAD_EDNS:
            # It may be EDNS that it does not understand, RFC 6891 section 7.
            exchange.use_edns(NO_EDNS if response.rcode == Rcode.NOTIMP else edns - 1)
        else:
            exchange.refused_by += (home,)
            if exchange.failure is None or response.rcode == Rcode.SERVFAIL:
                exchange.failure = response
            # What was asked elsewhere too may be better, but not much later.
            exchange.deadline = min(exchange.deadline, plan.now + self.CERTAIN)
            if exchange.live > 0:
                return
            # A lone upstream is asked once more.
            if len(exchange.refused_by) >= max(2, len(self.upstreams)):
                self._give_up(plan, exchange, "")
                return
        exchange.last = None
        self._again(plan, exchange)

    def _lose(
        self,
        plan: Plan,
        link: Link,
        exchange: Exchange,
        error: UpstreamError,
        blame: int,
    ) -> None:
        """Send again what a link has left unanswered.

        A query whose links die again and again gets a lane, so that a poisonous name
        takes down no other; each further loss gives the next lane, in turn.
        """
        exchange.live -= 1
        if exchange.done:
            return
        exchange.losses += blame
        if exchange.losses > self.MAX_LOSSES or exchange.copies > self.MAX_COPIES:
            exchange.refused_by += (link.home,)
            exchange.losses = exchange.lane = 0
            if len(exchange.refused_by) >= len(self.upstreams):
                self._give_up(plan, exchange, f"{error} {exchange.copies} times")
                return
        if exchange.suspect:
            # Those of one lane that died go to others than where the rest are still.
            half = Upstream.LANES // 2
            other = half if 0 < link.lane <= half else 0
            exchange.lane = 1 + other + next(self._lanes) % half
        elif link.lane:
            exchange.lane = 0  # it was there only as others should not wait for it
        if exchange.live <= 0:
            link.home.counts["replays",] += 1
            exchange.last = None
            self._again(plan, exchange)

    def _give_up(self, plan: Plan, exchange: Exchange, text: str) -> None:
        """Let an exchange fail: with the refusal in hand, or with what is wrong."""
        failure: Response | UpstreamError | None = exchange.failure
        if failure is None:
            errors = [u.error for u in self.upstreams if u.failures]
            if not errors or (text and exchange.copies):
                errors = [UpstreamError("timeout", text or "not connected")]
            names = ", ".join(str(u.endpoint) for u in self.upstreams[:2])
            failure = UpstreamError(errors[0].cause, f"{names}: {errors[0]}")
        plan.failed.append((exchange, self._finish(exchange), failure))

    def _finish(self, exchange: Exchange) -> Sequence[Waiter]:
        """Take an exchange out of those in flight; return who waits for it."""
        exchange.done = True
        if self.exchanges.get(exchange.query.key) is exchange:
            del self.exchanges[exchange.query.key]
        return self._release(exchange)

    def _release(self, exchange: Exchange) -> Sequence[Waiter]:
        """Take out all who wait for an exchange, to be answered."""
        waiters, exchange.waiters = exchange.waiters, []
        self.waiting -= len(waiters)
        return waiters

    # Called by the timer.

    def _check(self) -> None:
        """Look at the exchanges, the oldest first, while there are any."""
        stale: list[tuple[Sequence[Waiter], CacheEntry]] = []
        with Plan(self) as plan:
            now = plan.now
            self._checking = bool(self.exchanges)
            if self._checking:
                plan.at(now + self.CHECK, self._check)
            for exchange in list(self.exchanges.values()):
                age = now - exchange.started
                if age < Upstream.OVERDUE_MIN:
                    break  # none that is younger can be due
                if now >= exchange.due or now >= exchange.deadline:
                    self._act(plan, exchange)
                if exchange.stale and age >= Cache.STALE_AFTER and exchange.waiters:
                    stale.append((self._release(exchange), exchange.stale))
        if stale:
            self.proxy.serve_stale(stale, now)

    def _look(self) -> None:
        """Keep links in order while clients are active."""
        with Plan(self) as plan:
            now = plan.now
            if self._slept():
                self._renew_links(plan)
            active = now - self._active_at < self.ACTIVE
            running = any(link.running for u in self.upstreams for link in u.links)
            self._looking = (active or running) and not self.closed
            if self._looking:
                plan.at(now + self.ROUND, self._look)
            for upstream in self.upstreams:
                upstream.look(plan, self._timeout + self.PATCH)
            if active:
                self._keep_warm(plan)
            self._reconsider(plan)
            rate, self._asked = self._asked / self.ROUND, 0
        self.proxy.binding.update(self, rate)

    def _reconnect(self) -> None:
        with Plan(self) as plan:
            self._reconsider(plan)

    def _reconsider(self, plan: Plan) -> None:
        """Open links for what is parked; give up where none may open soon."""
        parked = [exchange for exchange in self.exchanges.values() if exchange.parked]
        # Those first that took down the fewest: one may be why all others were lost.
        for exchange in sorted(parked, key=lambda each: each.losses):
            self._again(plan, exchange)

    def _keep_warm(self, plan: Plan) -> None:
        """Begin links so that the best upstreams have one ready."""
        ready = [u for u in self.upstreams if u.usable(plan.now)]
        wanted: Sequence[Upstream] = self.upstreams
        if self._strategy != "failover":
            wanted = sorted(wanted, key=lambda u: (u not in ready, u.latency or 0.0))
        # Those that take turns are all wanted.
        in_turn = self._strategy in ("round-robin", "random")
        number, sure = len(wanted) if in_turn else self.WARM, 0
        for upstream in wanted:
            if upstream not in ready and (upstream.failures or sure < number):
                upstream.connect(plan, urgent=not ready)
            sure += not upstream.failures

    def _slept(self) -> bool:
        """Tell whether the host slept, or was halted with its clocks, since last asked.

        The wall clock gained on the one that stands still meanwhile.
        """
        gained = time.time() - time.monotonic() - self._clocks_apart
        if not 0.0 <= gained <= self.JUMP:  # below: the clock was set back
            self._clocks_apart += gained
        return gained > self.JUMP

    def _renew_links(self, plan: Plan) -> None:
        """Replace all links and forget failures: the network has changed."""
        for upstream in self.upstreams:
            for link in upstream.links:
                if link.running:
                    plan.close(link, "network changed")
            upstream.forgive()
            upstream.connect(plan)


# ---- Proxy ---------------------------------------------------------------------------
# From a question to its answer, whatever the transport: from the cache, from what this
# host knows itself, or from the upstreams that its name is asked of.

# Takes a datagram, the time and a tally; see Proxy.lookup.
Lookup = Callable[[bytes, float, "list[Label]"], "bytes | Query | None"]


def failure_response(error: UpstreamError) -> Response:
    """Make a SERVFAIL response with an Extended DNS Error that says why (RFC 8914)."""
    return error_response(Rcode.SERVFAIL, build_option(error.info, str(error)))


TRUNCATED = UpstreamError("garbage", "the upstream cuts its answers short, in TLS")


class Proxy:
    """Answers what can be answered at once, and has the rest asked for.

    A name at or below a routed domain goes to that domain's upstreams alone, in working
    order or not: it must never be seen by the others. The longest domain counts.
    """

    MOMENT = 0.01  # s between looks at the end whether all is answered
    SHED = 10  # this part of what may be in flight is made free at a time

    def __init__(
        self, config: Config, trust: Trust, timer: Timer, metrics: Metrics
    ) -> None:
        """Prepare; raises ConfigError where the options contradict each other."""
        self.metrics = metrics
        self.cache = Cache(config)
        self.binding = ProcessorBinding()
        self._timer = timer
        self._max_in_flight = config.max_in_flight
        servers: dict[bytes, list[Endpoint]] = {}
        self._domains: dict[bytes, str] = {}  # as they were given, by wire format
        for domain, endpoint in config.route:
            name = encode_domain(domain)
            self._domains[name] = domain
            servers.setdefault(name, []).append(endpoint)
        self._local = LocalAnswers((*config.forward_special, *servers))
        self._guard: RebindingGuard | None = None
        if config.block_private_answers:  # servers of routed domains may give any
            self._guard = RebindingGuard((*config.allow_private, *servers))
        everything = trust, timer, self
        self._default = UpstreamGroup(config, config.upstream, *everything)
        self._routes = {
            name: UpstreamGroup(config, found, *everything)
            for name, found in servers.items()
        }
        self._groups = [self._default, *self._routes.values()]

    def start(self) -> None:
        """Connect to the upstreams; returns at once."""
        for group in self._groups:
            group.start()

    @property
    def in_flight(self) -> int:
        """Return how many clients' queries wait for an answer."""
        return sum(group.waiting for group in self._groups)

    def lookup_from(self, transport: Transport) -> Lookup:
        """Return the lookup for datagrams that come so."""
        hot, renew = self.cache.hot[transport], self.cache.renew
        look_up = self.lookup

        def lookup(
            message: bytes, now: float, tally: list[Label]
        ) -> bytes | Query | None:
            # Most queries repeat byte for byte, but for the ID.
            found = hot.get(message[2:])
            if found is not None and (now < found.until or renew(found, now)):
                tally.append(found.label)
                return message[:2] + found.answer
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
        entry = self.cache.get(query.cache_key, now) if form.cachable else None
        if entry is None:
            response = self._local.respond(query)
            if form.refusal:
                response = error_response(form.refusal)
            if response is None:
                return query
            answer = build_answer(query, response)
            tally.append(label_answer(query, LOCAL, response.rcode, len(answer)))
            return answer
        if now >= entry.expires:
            return self._look_up_stale(query, entry, now, tally)
        if form.flags & RD and entry.worth_refreshing(now):
            self._refresh_soon(query, entry, entry.expires)
        answer = self.cache.answer(entry, query, now)
        label = label_answer(query, CACHE, answer[3] & RCODE_MASK, len(answer))
        tally.append(label)
        if transport[0] == "udp":
            self.cache.keep_ready(query, message, answer, entry, now)
        return answer

    def _look_up_stale(
        self, query: Query, entry: CacheEntry, now: float, tally: list[Label]
    ) -> bytes | Query:
        """Return a stale answer, where it was asked for in vain; else the query."""
        if not query.form.storable:  # RFC 8767 section 4: never with RD=0
            return query
        if entry.retry_at <= entry.expires:  # not asked for again as yet
            query.stale = entry
            return query
        if now >= entry.retry_at:
            self._refresh_soon(query, entry, now + Cache.STALE_RETRY)
        answer = self.cache.stale_answer(entry, query)
        tally.append(label_answer(query, STALE, answer[3] & RCODE_MASK, len(answer)))
        return answer

    def _refresh_soon(self, query: Query, entry: CacheEntry, retry_at: float) -> None:
        """Have the timer ask again, with nobody waiting; not once more till then."""
        entry.retry_at = retry_at
        self._timer.at(elapsed(), functools.partial(self._refresh, query))

    def _refresh(self, query: Query) -> None:
        if self.in_flight < self._max_in_flight:
            self._group_of(query).refresh(query)

    def _group_of(self, query: Query) -> UpstreamGroup:
        """Return the upstreams that this name is asked of."""
        if self._routes:
            for domain in lineage(query.key[: len(query.question) - 4]):
                if domain in self._routes:
                    return self._routes[domain]
        return self._default

    def resolve(self, queries: Sequence[Waiter]) -> None:
        """Have each query answered through its `reply`, exactly once; never blocks."""
        if not self.cache.lacks([query.cache_key for query, _ in queries]):
            queries = self._answer_late(queries)
        if not self._routes:
            self._default.ask(queries)
        else:
            shares: dict[UpstreamGroup, list[Waiter]] = {}
            for waiter in queries:
                shares.setdefault(self._group_of(waiter[0]), []).append(waiter)
            for group, share in shares.items():
                group.ask(share)
        if self.in_flight > self._max_in_flight:
            self._shed()

    def _answer_late(self, queries: Sequence[Waiter]) -> list[Waiter]:
        """Answer what got into the cache since the lookup missed; return the rest."""
        rest, now = [], elapsed()
        for query, reply in queries:
            found = self.cache.get(query.cache_key, now) if query.cache_key else None
            if found is None or now >= found.expires:
                rest.append((query, reply))
            else:
                self.answer([([(query, reply)], found)], (CACHE, None), now)
        return rest

    def _shed(self) -> None:
        """Answer SERVFAIL to the busiest clients' queries, the oldest first.

        Many at a time, so that looking through all of them costs each little.
        """
        group = max(self._groups, key=lambda each: each.waiting)
        spare = self._max_in_flight // self.SHED
        taken = group.shed(self.in_flight - self._max_in_flight + spare)
        error = UpstreamError("overload", "too many queries in flight")
        self.answer([(taken, failure_response(error))], (LOCAL, None), elapsed())
        self.metrics.turned_away("overload", len(taken))

    # Called by the groups of upstreams, in any thread, with no lock held.

    def store(self, answers: Sequence[Answer], now: float) -> list[Response]:
        """Put good answers into the cache; return them as they are to be served."""
        found = [(exchange.query, response) for exchange, response, _ in answers]
        if self._guard is not None:
            found = [(query, self._guard.screen(query, each)) for query, each in found]
        items = [(q.key if q.form.storable else b"", each) for q, each in found]
        return self.cache.put_all(items, now)

    def answer(self, finished: Sequence[Finished], origin: Origin, now: float) -> None:
        """Answer everyone who waits, and count it."""
        answered: list[Answered] = []
        for waiters, found in finished:
            for query, reply in waiters:
                if isinstance(found, Response):
                    response = found
                    if found.flags & TC and query.form.transport[0] != "udp":
                        response = failure_response(TRUNCATED)  # nowhere else to ask
                    message, rcode = build_answer(query, response), response.rcode
                else:
                    if origin[0] == STALE:
                        message = self.cache.stale_answer(found, query)
                    else:
                        message = self.cache.answer(found, query, now)
                    rcode = message[3] & RCODE_MASK
                reply(message, query.client)
                answered.append((query, message, rcode))
        if answered:
            self.metrics.answered(answered, origin, now)

    def fail(self, failed: Sequence[Failed], now: float) -> None:
        """Answer with what there is without an answer: stale, or why there is none."""
        for exchange, waiters, failure in failed:
            query, stale = exchange.query, exchange.stale
            source = UPSTREAM if isinstance(failure, Response) else LOCAL
            dear = source == UPSTREAM
            if isinstance(failure, UpstreamError):
                dear = failure.cause == "timeout"
                failure = failure_response(failure)
            elif self._guard is not None:
                failure = self._guard.screen(query, failure)
            # Those take a while; others happen at once again.
            if dear and exchange.copies and query.form.storable:
                failure = self.cache.put(query.key, failure, now)
            if stale is not None:
                self.serve_stale([(waiters, stale)], now)
            else:
                self.answer([(waiters, failure)], (source, None), now)

    def serve_stale(
        self, waiting: Sequence[tuple[Sequence[Waiter], CacheEntry]], now: float
    ) -> None:
        """Answer from expired entries, which are not asked for again for a while."""
        for _, entry in waiting:
            entry.retry_at = now + Cache.STALE_RETRY
        self.answer(waiting, (STALE, None), now)

    # What others ask.

    def samples(self) -> Iterator[Sample]:
        """Return the metrics of the proxy, its cache and its upstreams, each once."""
        yield "dotproxy_queries_in_flight", (), self.in_flight
        refreshes = sum(group.refreshes for group in self._groups)
        yield "dotproxy_cache_prefetch_total", (), refreshes
        yield from self.cache.samples()
        found: dict[tuple[str, tuple[str, ...]], Sample] = {}
        for group in reversed(self._groups):
            found.update(((s[0], s[1]), s) for s in group.samples())
        yield from found.values()

    def facts(self) -> list[dict[str, object]]:
        """Return how each upstream does; `domain`: the one that is routed to it."""
        found = self._default.facts()
        for name, group in self._routes.items():
            found += [{**each, "domain": self._domains[name]} for each in group.facts()]
        return found

    def trouble(self) -> str:
        """Say why queries cannot be answered now, or nothing where they can."""
        trouble = self._default.trouble()
        if not trouble or self.cache.can_serve(elapsed()):
            return ""
        return f"no upstream answers, and the cache has nothing: {trouble}"

    def flush(self) -> None:
        """Forget every cached answer."""
        note(logging.INFO, "cache flushed", entries=self.cache.flush())

    def drain(self, seconds: float) -> bool:
        """Wait until every query is answered, at most so long; this one blocks."""
        deadline = elapsed() + seconds
        while self.in_flight and elapsed() < deadline:
            time.sleep(self.MOMENT)
        return not self.in_flight

    def close(self) -> None:
        """Close the upstream connections."""
        for group in self._groups:
            group.close()


# ---- Admission (RFC 5358) ------------------------------------------------------------
# Who may ask, and how often. It knows addresses and time; servers ask it, and turn away
# whom it tells them to.


def parse_client(host: str) -> IPAddress:
    """Parse the address of a client, which is IPv4 where IPv6 only carries that."""
    address = ipaddress.ip_address(host)
    return getattr(address, "ipv4_mapped", None) or address


def is_in(address: IPAddress, networks: Iterable[Network]) -> bool:
    return any(address in network for network in networks)


def is_open(network: Network) -> bool:
    """Tell whether a network has far more of the Internet than anybody's own."""
    ends = network.network_address, network.broadcast_address
    wide = network.prefixlen < (8 if network.version == 4 else 16)
    return wide and not all(is_in(end, LOCAL_NETWORKS) for end in ends)


class RateLimiter:
    """Token buckets by prefix, in bounded memory; any thread may ask."""

    MAX_PREFIXES = 100_000  # about 30 MB; the longest unused is forgotten first

    def __init__(self, rate: float, burst: float) -> None:
        """Make buckets of `burst` tokens that get `rate` tokens a second."""
        self._interval = 1 / rate  # s per token
        self._reserve = (burst - 0.5) / rate  # s; half a token makes up for rounding
        self._lock = threading.Lock()  # guards _buckets, the longest unused first
        # When each is full again, which a token puts off.
        self._full_at: collections.OrderedDict[bytes, float] = collections.OrderedDict()

    def take(
        self, prefix: bytes, now: float, count: int = 1, owed: int = 0
    ) -> tuple[int, float]:
        """Take up to so many tokens; return how many, and when the next is due.

        As many as may be `owed` are given also where there are none.
        """
        with self._lock:
            full_at = max(self._full_at.pop(prefix, now), now)
            if len(self._full_at) >= self.MAX_PREFIXES:
                self._full_at.popitem(last=False)
            left = int((self._reserve - full_at + now) // self._interval) + 1
            taken = min(count, max(left, owed))
            full_at += taken * self._interval
            self._full_at[prefix] = full_at
            return taken, full_at - self._reserve


class Verdict(NamedTuple):
    """Why a datagram is turned away, and what makes the short answer that it gets."""

    reason: str  # of TURNED_AWAY; none: it is served
    answer: Callable[[bytes], bytes] | None = None


PROHIBITED = tuple(
    build_option(ExtendedError.PROHIBITED, text)
    for text in ("this resolver does not serve your address", "")
)
ALLOW = Verdict("")
REFUSE = Verdict(  # a stranger's
    "acl",
    functools.partial(build_short_answer, rcode=Rcode.REFUSED, options=PROHIBITED),
)
IGNORE = Verdict("acl")  # a stranger's, where enough were answered
TRUNCATE = Verdict(  # over the rate: to be asked again over TCP
    "slip", functools.partial(build_short_answer, rcode=Rcode.NOERROR, flags=TC)
)
DROP = Verdict("rate-limit")


class Admission:
    """Tells the servers who may ask, and how often; any thread may ask it.

    Streams have buckets of their own, which no forged datagram can empty: a client that
    was told to come over TCP is served there whatever is sent in its name.
    """

    BURST = 2.0  # s of asking at the rate that may come at once
    REFUSALS = 10.0, 20.0  # answers/s to strangers, all together, and at once
    MAX_KNOWN = 10_000  # client addresses to remember, about 2 MB
    PREFIX = 7  # octets: /56, what an IPv6 customer has; an IPv4 address is shorter

    def __init__(self, config: Config) -> None:
        self.free: set[str] = set()  # clients known to be allowed and not limited
        self._config = config
        self._refusals = RateLimiter(*self.REFUSALS)
        rate = config.rate_limit or 1
        self._datagrams = RateLimiter(rate, rate * self.BURST)
        self._streams = RateLimiter(rate, rate * self.BURST)
        # 0.1 us where an address is known, 6 us where it is not.
        self._prefix_of = functools.lru_cache(self.MAX_KNOWN)(self._find_prefix)
        self._slips = itertools.count()  # every second one is truncated

    def admits(self, host: str) -> bool:
        """Tell whether this client may ask at all."""
        return self._prefix_of(host) is not None

    def verdict(self, host: str, now: float) -> Verdict:
        """Decide on a datagram from this client."""
        prefix = self._prefix_of(host)
        if prefix is None:
            return REFUSE if self._refusals.take(b"", now)[0] else IGNORE
        if not prefix:
            if len(self.free) >= self.MAX_KNOWN:
                self.free.clear()
            self.free.add(host)
            return ALLOW
        if self._datagrams.take(prefix, now)[0]:
            return ALLOW
        return DROP if next(self._slips) % 2 else TRUNCATE

    def pace(self, host: str, count: int, now: float) -> tuple[int, float]:
        """Tell how many of a stream's queries to serve now, and when the next."""
        prefix = self._prefix_of(host)
        if not prefix:
            return count, now
        return self._streams.take(prefix, now, count, owed=1)

    def _find_prefix(self, host: str) -> bytes | None:
        """Return whose rate counts: empty for nobody's, None for a stranger."""
        address, config = parse_client(host), self._config
        if not is_in(address, config.allow):
            return None
        local = not config.rate_limit_all and is_in(address, LOCAL_NETWORKS)
        return b"" if local or not config.rate_limit else address.packed[: self.PREFIX]


# ---- Servers (RFC 1035 section 4.2, RFC 7766, RFC 7858, RFC 9210) --------------------
# From sockets to the Proxy and back. They know sizes, addresses and time-outs, nothing
# of names.

# Of a wildcard socket the address has one item more: the way back, for sendmsg.
Datagram = tuple[bytes, ClientAddress]

# Constants that some Python versions lack, with the kernel's number.
DARWIN = sys.platform == "darwin"
IP_PKTINFO = getattr(socket, "IP_PKTINFO", 26 if DARWIN else 8)
IPV6_RECVPKTINFO = getattr(socket, "IPV6_RECVPKTINFO", 61 if DARWIN else 49)
IPV6_PKTINFO = getattr(socket, "IPV6_PKTINFO", 46 if DARWIN else 50)
SO_RCVBUFFORCE = 33  # Linux: beyond net.core.rmem_max, where privileged
SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)  # at accept
SHORTAGE_PAUSE = 0.25  # s until another accept


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
    """Accept a client; raises OSError where there is none, or it has gone again.

    Pauses where there is no descriptor for it: the listener stays readable.
    """
    try:
        request, address = listener.accept()
    except OSError as error:
        if error.errno in SHORTAGES:
            note(logging.WARNING, "cannot accept", error=error.strerror)
            time.sleep(SHORTAGE_PAUSE)
        raise
    if not address:  # so macOS gives one that was reset before
        request.close()
        raise ConnectionAbortedError(errno.ECONNABORTED, "reset by the client")
    return request, address


def is_ready(peer: socket.socket, event: int, seconds: float = 0.0) -> bool:
    """Wait at most so long for an event; tell whether it, or an error, is there."""
    poller = select.poll()  # select itself takes no descriptor above 1023
    poller.register(peer, event)
    return bool(poller.poll(seconds * 1000))


class Services(NamedTuple):
    """What servers need to serve clients."""

    proxy: Proxy
    admission: Admission
    streams: WorkerPool
    clients: Clients
    identity: Identity | None = None
    reuse_port: bool = False


class Listener(socketserver.TCPServer):
    """What a server does whatever its transport: bind, turn, and end without a loss."""

    LAST = 1.0  # s for which it goes on to take, at the end, what has come
    handler: type[socketserver.BaseRequestHandler]
    lookup: Lookup

    def __init__(
        self,
        services: Services,
        address: Address,
        inherited: socket.socket | None = None,
    ) -> None:
        self.services = services
        self.proxy, self.admission = services.proxy, services.admission
        self.turned_at = time.monotonic()  # when its loop last came round, awake
        self._inherited = inherited
        # A link-local address with its interface, which the socket does not tell.
        found = socket.getaddrinfo(*address, flags=socket.AI_NUMERICHOST)
        self.address_family, *_, where = found[0]
        self.version = "2" if self.address_family == socket.AF_INET6 else "1"
        super().__init__(where, self.handler)  # type: ignore[arg-type]
        self.server_address = address[0], self.socket.getsockname()[1]

    def server_bind(self) -> None:
        """Bind the socket, or take the inherited one, which is bound already."""
        if self._inherited is not None:
            self.socket.close()
            self.socket = self._inherited
        else:
            set_v6_only(self.socket)
            if self.services.reuse_port:
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            super().server_bind()
        self.socket.setblocking(False)

    def shutdown(self) -> None:
        """End the loop, then serve whom the kernel has given to this socket by now.

        What has come to an inherited one is for who inherits it next.
        """
        datagrams = self.socket_type == socket.SOCK_DGRAM
        if datagrams and not self._inherited and sys.platform == "linux":
            with contextlib.suppress(OSError):
                # It is given nothing more, where others have its port, and still sends.
                self.socket.connect(self.socket.getsockname())
        super().shutdown()
        end = time.monotonic() + self.LAST
        left = self._inherited is None
        while left and time.monotonic() < end:
            self.handle_request()
            left = is_ready(self.socket, select.POLLIN)
        if not datagrams:
            self.socket.close()

    def service_actions(self) -> None:
        """Note that the loop turns: socketserver calls this twice a second or more."""
        self.turned_at = time.monotonic()

    def handle_error(self, request: object, client_address: object) -> None:
        note(logging.ERROR, "internal error", bug=True, server=type(self).__name__)

    def answer(
        self, batch: Iterable[Datagram], now: float, respond: Reply, reply: Reply
    ) -> list[Waiter]:
        """Answer at once what can be; return the rest, to be answered by `reply`."""
        lookup, metrics = self.lookup, self.proxy.metrics
        misses: list[Waiter] = []
        tally: list[Label] = []
        given: list[Given] = []
        logged = metrics.query_log is not None
        for message, client in batch:
            found = lookup(message, now, tally)
            if isinstance(found, bytes):
                respond(found, client)
                if logged:
                    given.append((message, found, client))
            elif found is not None:
                found.client, found.received = client, now
                misses.append((found, reply))
        if tally:
            metrics.answered_at_once(tally, given, (now, elapsed() - now))
        return misses


class UDPHandler(socketserver.BaseRequestHandler):
    """Handles what could not be answered at once of a batch of datagrams."""

    server: UDPServer
    request: list[Waiter]

    def handle(self) -> None:
        self.server.proxy.resolve(self.request)


class UDPServer(Listener, socketserver.ThreadingUDPServer):
    """Receives datagrams, a batch per wake-up; one request is one batch.

    The thread that receives does all that is to be done with it: the kernel's buffer is
    the queue. A second one gained nothing under the GIL, at up to 1.46 of the CPU.
    """

    BATCH = 64  # datagrams; more gain nothing and make the first ones wait
    RECEIVE_BUFFER = 4 << 20  # octets: a burst of some thousand queries is not lost
    max_packet_size = 4096  # a query is far smaller; recvfrom allocates this each time
    handler = UDPHandler

    def server_activate(self) -> None:
        """Set the bound socket up."""
        self.lookup = self.proxy.lookup_from(("udp", self.version))
        for option in (socket.SO_RCVBUF, SO_RCVBUFFORCE):
            with contextlib.suppress(OSError):
                self.socket.setsockopt(socket.SOL_SOCKET, option, self.RECEIVE_BUFFER)
        self._receive: Callable[[int], Datagram] = self.socket.recvfrom
        host = self.socket.getsockname()[0]
        self._wildcard = ipaddress.ip_address(host).is_unspecified
        if self._wildcard:
            self._receive = self._receive_with_way
            if self.version == "1":
                self.socket.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
            else:
                self.socket.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVPKTINFO, 1)

    def get_request(self) -> tuple[list[Datagram], Address]:  # type: ignore[override]
        """Drain the socket: return a batch of datagrams as one request."""
        batch: list[Datagram] = []
        receive, size = self._receive, self.max_packet_size
        try:  # contextlib.suppress takes 1.5 us more
            for _ in range(self.BATCH):
                batch.append(receive(size))
        except OSError:  # no more are there
            pass
        return batch, ("", 0)

    def process_request(  # type: ignore[override]
        self, request: list[Datagram], client_address: Address
    ) -> None:
        """Answer what the cache can, turn away, and have the rest resolved."""
        now, free = elapsed(), self.admission.free
        admitted = [
            datagram
            for datagram in request
            if datagram[1][0] in free or self._admit(*datagram, now)
        ]
        misses = self.answer(admitted, now, self.reply, self.reply)
        if misses:
            self.finish_request(misses, client_address)  # type: ignore[arg-type]

    def reply(self, message: bytes, client: ClientAddress) -> None:
        """Send a response from the address that was asked; any thread, never blocks."""
        try:
            if self._wildcard:
                way, client = client[-1], client[:-1]  # type: ignore[assignment]
                self.socket.sendmsg([message], way, 0, client)  # type: ignore[arg-type]
            else:
                self.socket.sendto(message, client)
        except OSError as error:  # no room, or the client is gone: it will ask again
            note(logging.DEBUG, "answer dropped", client=client[0], error=error)

    def _admit(self, message: bytes, client: ClientAddress, now: float) -> bool:
        """Tell whether to serve a query; others get a short answer, or none."""
        if not answerable(message):
            return False
        reason, answer = self.admission.verdict(client[0], now)
        if not reason:
            return True
        note(logging.DEBUG, "turned away", client=client[0], reason=reason)
        self.proxy.metrics.turned_away(reason)
        if answer is not None:
            self.reply(answer(message), client)
        return False

    def _receive_with_way(self, size: int) -> Datagram:
        message, ancillary, _, address = self.socket.recvmsg(size, 128)
        way = [
            (level, kind, reply_from(data))
            for level, kind, data in ancillary
            if kind in (IP_PKTINFO, IPV6_PKTINFO)
        ]
        return message, (*address, way)


class StreamHandler(socketserver.BaseRequestHandler):
    """Serves one client over TCP or TLS: many queries in flight, answered as they come.

    It is made as soon as its client is accepted, and run by a thread of the pool. That
    reads, and waits for the client's rate, for room and for octets; whichever thread
    has an answer writes as much as the kernel takes, and leaves the rest to it.
    """

    MAX_IN_FLIGHT = 256  # queries; then it is not read until some are answered
    ROOM = 64  # of those, for which it waits a `BREATH`, so as not to wake for each
    BREATH = 0.005  # s
    MAX_UNSENT = 1 << 18  # octets that a client may leave unread, beside the kernel's
    STALL = 5.0  # s for which it may take nothing
    HANDSHAKE = 5.0  # s that it may take
    READ_SIZE = 16384
    MOMENT = 0.1  # s between looks for octets unsent while answers are awaited

    server: TCPServer

    def __init__(
        self, request: socket.socket, client_address: Address, server: TCPServer
    ) -> None:
        self.request, self.client_address, self.server = request, client_address, server
        request.setblocking(False)  # whoever sends an answer must not wait
        with contextlib.suppress(OSError):  # it may be gone already
            request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.active_at = elapsed()  # when its last query was taken up
        if server.identity is not None:
            # Who connects and says nothing makes room before any client that is served.
            self.active_at -= server.idle_timeout
        self.asked = False  # it has sent a query
        self._channel = Channel()  # until hands are shaken
        self._reading = True  # until the client has sent its last
        self._changed = threading.Condition()  # guards all below; told for `_wait`
        self.in_flight = 0
        self._most = 0  # queries in flight, so many of which are waited for
        self._unsent = b""
        self._ended = False  # then the socket may be closed: nobody touches it

    def handle(self) -> None:
        """Serve until the client is done, idle for too long, or gone."""
        with contextlib.closing(self):
            octets = rest = b""
            if self.server.identity is not None:
                octets = self._shake_hands(self.server.identity.context)
            while octets or self._reading:
                messages, rest = split_frames(rest + octets)
                whole = itertools.takewhile(lambda m: len(m) >= MIN_MESSAGE, messages)
                queries = collections.deque(whole)
                broken = len(queries) < len(messages)  # nothing behind can be trusted
                self._serve(queries)
                if broken:
                    break
                octets = self._receive() if self._reading else b""
            self._wait(0)  # it gets what it asked for

    def finish(self) -> None:
        """End it with a farewell; any thread may: its own finds the socket shut."""
        with self._changed:
            if self._ended:
                return
            self._ended = True
            self._changed.notify()
            farewell = self._channel.farewell()
            with contextlib.suppress(OSError):
                if farewell and not self._unsent:  # behind a part it means nothing
                    self.request.send(farewell)
            with contextlib.suppress(OSError):
                self.request.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End it, forget it and close its socket."""
        self.finish()
        self.server.services.clients.leave(self)
        self.server.shutdown_request(self.request)

    def _shake_hands(self, context: ssl.SSLContext) -> bytes:
        """Shake hands; return the queries that may come with the last of it."""
        channel = Channel(context)

        def step(octets: bytes) -> tuple[bytes, bool]:
            with self.server.turns:
                return channel.shake_hands(octets)

        try:
            shake_hands(self.request, step, elapsed() + self.HANDSHAKE)
        except (OSError, UpstreamError) as error:
            host = self.client_address[0]
            note(logging.DEBUG, "no TLS session", client=host, error=error)
            self._reading = False
        self.request.setblocking(False)
        self._channel = channel
        self.active_at = elapsed()
        return self._open(b"")

    def _receive(self) -> bytes:
        """Wait for octets of queries, at most a moment while answers are awaited."""
        self._wait(self.MAX_IN_FLIGHT - 1)
        left = self.active_at + self.server.idle_timeout - elapsed()
        seconds = self.MOMENT if self.in_flight else left
        if self._ended or seconds <= 0:
            self._reading = False
        elif is_ready(self.request, select.POLLIN, seconds):
            octets = b""
            with contextlib.suppress(OSError):
                octets = self.request.recv(self.READ_SIZE)
            self._reading = bool(octets)
            return self._open(octets)
        return b""

    def _open(self, octets: bytes) -> bytes:
        """Decrypt; note the client's end, and send what TLS itself has to say."""
        plaintext, failure, due = self._channel.decrypt(octets)
        self._reading = self._reading and failure is None
        if due:
            self._push()
        return plaintext

    def _serve(self, queries: collections.deque[bytes]) -> None:
        """Have queries answered as the client's rate and the room for answers allow."""
        client, proxy = self.client_address, self.server.proxy
        pace = functools.partial(self.server.admission.pace, client[0])
        reply = functools.partial(self._push, answers=1)
        paid = 0
        while queries and not self._ended:
            if not paid:
                now = elapsed()
                _, ready_at = pace(0, now)
                if ready_at > now:
                    self._wait(-1, ready_at - now)
                paid, _ = pace(len(queries), elapsed())
            self._wait(self.MAX_IN_FLIGHT - self.ROOM, self.BREATH)
            self._wait(self.MAX_IN_FLIGHT - 1)
            self.asked, self.active_at, before = True, elapsed(), len(queries)
            batch = (
                (queries.popleft(), client)
                for _ in range(min(paid, self.MAX_IN_FLIGHT - self.in_flight))
                if not self._unsent
            )
            misses = self.server.answer(batch, self.active_at, self._push, reply)
            paid -= before - len(queries)
            with self._changed:
                self.in_flight += len(misses)
            if misses:
                proxy.resolve(misses)

    def _wait(self, most: int, seconds: float = 3600.0) -> None:
        """Wait until all is sent and at most `most` are in flight, or time is up."""
        deadline = elapsed() + seconds
        while True:
            with self._changed:
                self._most = most
                self._changed.wait_for(
                    lambda: self._ended or self._unsent or self.in_flight <= most,
                    deadline - elapsed(),
                )
                if self._ended or not self._unsent:
                    return
            if is_ready(self.request, select.POLLOUT, self.STALL):
                self._push()
            else:
                self.finish()

    def _push(
        self, message: bytes = b"", client: object = None, answers: int = 0
    ) -> None:
        """Send what the kernel takes and keep the rest; any thread, never blocks.

        `answers`: how many of the queries in flight it answers.
        """
        octets = len(message).to_bytes(2, "big") + message if message else b""
        with self._changed:
            self.in_flight -= answers
            if self._ended:
                return
            try:
                self._unsent += self._channel.encrypt(octets)
                self._unsent = self._unsent[self.request.send(self._unsent) :]
                hopeless = False
            except BlockingIOError:
                hopeless = len(self._unsent) > self.MAX_UNSENT
            except OSError:
                hopeless = True
            if self._unsent or self.in_flight <= self._most:
                self._changed.notify()
        if hopeless:
            self.finish()


class Clients:
    """The clients of all stream servers, within bounds; any thread may call any method.

    Those that wait for a thread are among them: were they not, idle clients could hold
    all threads and nobody would have to make room.
    """

    FIRST = 1.0  # s for which, at the end, one that has not asked yet may
    LOOK = 0.01  # s

    def __init__(self, limit: int, limit_per_address: int) -> None:
        self._limit = limit
        self._limit_per_address = limit_per_address  # many sit behind one gateway
        self._lock = threading.Lock()  # guards all below
        self._known: set[StreamHandler] = set()
        self._turned_away = 0

    def enter(self, client: StreamHandler) -> None:
        """Count one more in; the longest idle one may have to make room for it."""
        host, victim = client.client_address[0], None
        with self._lock:
            rivals = [each for each in self._known if each.client_address[0] == host]
            if len(rivals) < self._limit_per_address:
                rivals = list(self._known) if len(self._known) >= self._limit else []
            if rivals:
                self._turned_away += 1
                victim = min(rivals, key=lambda c: (c.in_flight > 0, c.active_at))
                self._known.remove(victim)
            self._known.add(client)
        if victim is not None:
            victim.finish()

    def leave(self, client: StreamHandler) -> None:
        """Count one out; called before its socket is closed."""
        with self._lock:
            self._known.discard(client)

    def samples(self) -> Iterator[Sample]:
        with self._lock:
            protos = collections.Counter(c.server.transport[0] for c in self._known)
        yield "dotproxy_turned_away_total", ("connections",), self._turned_away
        for proto in ("tcp", "dot"):
            yield "dotproxy_stream_clients", (proto,), protos[proto]

    def close(self, seconds: float) -> None:
        """Have all that was asked answered, then end all; blocks, hardly longer."""
        begun = elapsed()
        while self._known:
            passed = elapsed() - begun
            with self._lock:  # whose socket is closed is not known any more
                known = list(self._known)
                for client in known:
                    if client.asked or passed > self.FIRST:
                        with contextlib.suppress(OSError):
                            # As if it had ended: what has come is read, and no more.
                            client.request.shutdown(socket.SHUT_RD)
            for client in known if passed > seconds else ():
                client.finish()
            time.sleep(self.LOOK)


class TCPServer(Listener, socketserver.ThreadingTCPServer):
    """Accepts clients over TCP, or TLS, and gives each a thread of the pool."""

    handler = StreamHandler
    allow_reuse_address = True
    request_queue_size = 128
    idle_timeout: float = CLIENT_IDLE_TIMEOUT

    def __init__(
        self,
        services: Services,
        address: Address,
        inherited: socket.socket | None = None,
        encrypted: bool = False,
    ) -> None:
        self.encrypted = encrypted
        self.identity = services.identity if encrypted else None
        # Who computes a step of a handshake, of about 1 ms: OpenSSL does it without the
        # GIL, and all of them at once would take the processors from everybody else.
        self.turns = threading.Lock()
        super().__init__(services, address, inherited)
        self.transport = "dot" if encrypted else "tcp", self.version
        self.lookup = functools.partial(self.proxy.lookup, transport=self.transport)

    def get_request(self) -> tuple[socket.socket, Address]:
        return accept(self.socket)

    def process_request(  # type: ignore[override]
        self, request: socket.socket, client_address: Address
    ) -> None:
        """Give a client a thread; close a stranger's connection."""
        if self.admission.admits(client_address[0]):
            client = StreamHandler(request, client_address, self)
            self.services.clients.enter(client)
            if not self.services.streams.submit(client.handle):
                client.close()
        else:
            note(logging.DEBUG, "turned away", client=client_address[0], over="tcp")
            self.proxy.metrics.turned_away("acl")
            self.shutdown_request(request)


# ---- Encrypted clients (RFC 7858, RFC 8310) ------------------------------------------
# What the clients of TLS are shown: a certificate, and proof that its key is here.


def check_pem(option: str, path: str, kind: str) -> None:
    """Raise ConfigError unless the file can be read and has a block of this kind."""
    try:
        with open(path, "rb") as file:
            found = f"{kind}-----".encode() in file.read()
    except OSError as error:
        cure = f"give {option} PEM"
        if isinstance(error, PermissionError):
            cure = "let the user that this runs as read it, or give another --user"
        text = f"cannot read {path}: {error.strerror}; {cure}"
        raise ConfigError(text) from error
    if not found:
        raise ConfigError(f"no {kind.lower()} in {path}; give one with {option} PEM")


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

    # LibreSSL, which macOS's own Python has, bears no such name, but has the like.
    NO_RENEGOTIATION = getattr(ssl, "OP_NO_RENEGOTIATION", 0x20000)
    context: ssl.SSLContext

    def __init__(self, chain: str, key: str | None = None) -> None:
        """Read them; `key`: the file of the key, if it is not in that of the chain.

        Raises ConfigError where they cannot be used.
        """
        self._chain, self._key = chain, key or chain
        self._load()

    def reload(self) -> None:
        """Read them again, for handshakes from now on; keep the old where they are bad.

        The context is replaced in one step, and with it the keys of session tickets: no
        client resumes a session under a certificate that is no longer shown.
        """
        try:
            self._load()
        except ConfigError as error:
            note(logging.WARNING, "certificate not replaced", error=error)

    def _load(self) -> None:
        check_pem("--tls-cert", self._chain, "CERTIFICATE")
        check_pem("--tls-key", self._key, "PRIVATE KEY")
        loaded = "certificate loaded"
        try:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.options |= self.NO_RENEGOTIATION
            # Who offers none of it is served as well: RFC 7858 has no such token.
            context.set_alpn_protocols(["dot"])
            # With no passphrase at hand, OpenSSL would ask for it on the terminal.
            context.load_cert_chain(self._chain, self._key, password=lambda: b"")
            names, until = self._try(context)
            note(logging.INFO, loaded, file=self._chain, names=names, until=until)
        except ssl.SSLCertVerificationError as error:
            why = f"refused by clients: {error.verify_message}"
            note(logging.WARNING, loaded, file=self._chain, error=why)
        except OSError as error:  # of TLS, or a file that has just been removed
            raise describe_chain_error(error, self._chain, self._key) from error
        self.context = context

    def _try(self, context: ssl.SSLContext) -> tuple[str, object]:
        """Shake hands with ourselves; return the names that are shown, and until when.

        The certificate's own time and purpose are looked at, not who issued it. Raises
        ssl.SSLCertVerificationError where every client would.
        """
        strict = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        strict.check_hostname = False
        strict.verify_flags |= PARTIAL_CHAIN
        strict.load_verify_locations(self._chain)
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = strict.wrap_bio(to_client, to_server)
        server = context.wrap_bio(to_server, to_client, server_side=True)
        for end in (client, server) * 3:  # flights until both are done, at most
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
        return ",".join(names_of(client)), (client.getpeercert() or {}).get("notAfter")


# ---- Admin server --------------------------------------------------------------------
# What an operator may look at over HTTP. It can be read and nothing else.

Pages = Mapping[str, Callable[[], "Page"]]  # by path; any thread may call them


class Page(NamedTuple):
    """What is answered to a request."""

    text: str
    kind: str = "text/plain; charset=utf-8"
    status: int = 200
    policy: str = "default-src 'none'"  # the Content-Security-Policy


def build_admin_handler() -> type[socketserver.BaseRequestHandler]:
    """Make what answers a request, where it is used: http.server takes 10 ms, 2 MiB."""
    import http.server

    class AdminHandler(http.server.BaseHTTPRequestHandler):
        default_request_version = "HTTP/1.0"
        server_version, sys_version = "dotproxy", ""
        error_content_type, error_message_format = Page("").kind, "%(message)s\n"
        server: AdminServer

        def do_GET(self) -> None:
            page = self.server.find_page(self.path, self.headers.get("Host"))
            body = page.text.encode()
            self.send_response(page.status)
            self.send_header("Content-Type", page.kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Security-Policy", page.policy)
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            note(logging.DEBUG, "admin", client=self.client_address[0], text=args[0])

    return AdminHandler


class AdminServer(socketserver.ThreadingTCPServer):
    """Serves pages to a few clients at a time, each for a few seconds at most."""

    MAX_CLIENTS = request_queue_size = 16  # a probe, a scraper and some browsers
    PATIENCE = 5.0  # s for a request and its answer
    # Others can have a name of theirs lead to loopback, but never an address.
    OWN_HOST = r"(?i)(localhost|[0-9.]+|\[[0-9a-f:.]+(%.*)?\])(:[0-9]*)?"
    allow_reuse_address = True

    def __init__(self, address: Address, pages: Pages) -> None:
        """Bind the address, which may have a zone; raises OSError."""
        self.pages = pages
        self._lock = threading.Lock()  # guards _clients, and them against being closed
        self._clients: dict[socket.socket, float] = {}  # and since when
        strict = ipaddress.ip_address(address[0]).is_loopback
        self._own_host = re.compile(self.OWN_HOST if strict else ".*")
        found = socket.getaddrinfo(*address, flags=socket.AI_NUMERICHOST)
        self.address_family, *_, where = found[0]
        super().__init__(where, build_admin_handler())  # type: ignore[arg-type]
        self.server_address = address[0], self.server_address[1]  # with the zone

    def server_bind(self) -> None:
        set_v6_only(self.socket)
        super().server_bind()

    def get_request(self) -> tuple[socket.socket, Address]:
        return accept(self.socket)

    def verify_request(  # type: ignore[override]
        self, request: socket.socket, client_address: Address
    ) -> bool:
        with self._lock:
            if len(self._clients) < self.MAX_CLIENTS:
                self._clients[request] = elapsed()
            return request in self._clients

    def find_page(self, path: str, host: str | None) -> Page:
        """Return a page, if the Host header, where there is one, may mean me."""
        if host is not None and not self._own_host.fullmatch(host):
            return Page("ask by an address, or as localhost\n", status=421)
        build = self.pages.get(path.partition("?")[0])
        return build() if build else Page("no such page; / lists them\n", status=404)

    def service_actions(self, patience: float = PATIENCE) -> None:
        """End who has taken this long: its thread finds the socket shut."""
        with self._lock:
            for request, begun in self._clients.items():
                if elapsed() - begun >= patience:
                    with contextlib.suppress(OSError):
                        request.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        with self._lock:
            self._clients.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # which clients cause
            note(logging.ERROR, "internal error", bug=True, server="admin")

    def server_close(self) -> None:
        self.service_actions(0.0)
        super().server_close()


# ---- Status page ---------------------------------------------------------------------
# What a person sees at "/", made of the samples that /metrics is made of and of an hour
# of readings. All of it is drawn here: the script only asks for the page again.

STYLE = """
:root {
  color-scheme: light dark; --gap: clamp(.75rem, 2vw, 1.25rem);
  --back: light-dark(#f4f5f7, #101418); --card: light-dark(#fff, #181d23);
  --text: light-dark(#1a1f26, #e6e9ed); --quiet: light-dark(#59636f, #9ba7b4);
  --line: light-dark(#e1e5ea, #2b323b); --good: light-dark(#00765a, #45c9a0);
  --warn: light-dark(#b06000, #f0b150); --bad: light-dark(#b3261e, #ff8a80);
}
* { box-sizing: border-box; margin: 0; padding: 0; font-style: normal; }
body {
  max-width: 72rem; margin: auto; padding: var(--gap); background: var(--back);
  color: var(--text); font: 1rem/1.45 system-ui, sans-serif; overflow-wrap: anywhere;
  font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%;
}
main, dl, .row { display: grid; gap: var(--gap); }
dl { grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); }
.row { grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); }
section, dl div { padding: .85rem var(--gap); background: var(--card); }
section, dl div { border: 1px solid var(--line); border-radius: .6rem; }
h1 { font-size: clamp(1.25rem, 3vw, 1.6rem); line-height: 1.25; text-wrap: balance; }
h2 { font-size: .95rem; font-weight: 600; }
small, th, dt, ul, a, header p + p { color: var(--quiet); font-size: .82rem; }
small { display: block; }
small, th { font-weight: 400; }
dd { font-size: clamp(1.6rem, 4vw, 2rem); font-weight: 600; }
i::before { content: "●"; color: var(--good); }
i.warn::before { content: "▲"; color: var(--warn); }
i.bad::before { content: "✕"; color: var(--bad); }
ul { display: flex; justify-content: space-between; list-style: none; }
.legend { flex-wrap: wrap; justify-content: start; gap: 0 1rem; color: var(--text); }
.legend svg { width: 1.1rem; height: .6rem; margin-right: .35rem; }
.plot { position: relative; height: 9rem; margin: .75rem 0 .5rem 3.6rem; }
.plot svg { width: 100%; height: 100%; overflow: visible; }
.plot ul {
  position: absolute; inset: -.6rem auto -.6rem -3.6rem; width: 3.1rem;
  flex-direction: column; text-align: right; line-height: 1.2rem; white-space: nowrap;
}
.plot + ul { margin-left: 3.6rem; }
path { vector-effect: non-scaling-stroke; stroke-width: 2; fill: none; }
.line { stroke: currentColor; stroke-linecap: round; stroke-linejoin: round; }
.grid { stroke: var(--line); stroke-width: 1; } .area { fill: currentColor; }
.legend .area { stroke: currentColor; stroke-width: 10; }
.cache, .p50 { color: #3a88c8; } rect { fill: #3a88c8; }
.upstream { color: #e6a02e; } .stale { color: #bc6ea2; } .local { color: #828c98; }
.p95 { color: var(--warn); stroke-dasharray: 7 4; }
.p99 { color: var(--bad); stroke-dasharray: 2 4; }
table { width: 100%; margin-top: .5rem; border-collapse: collapse; font-size: .88rem; }
th, td { padding: .35rem 0 .35rem .75rem; text-align: right; vertical-align: top; }
td { border-top: 1px solid var(--line); }
td + td, th, .row td { white-space: nowrap; }
tr > :first-child { padding-left: 0; text-align: left; }
.wide tr > :nth-child(2) { text-align: left; }
.row thead { display: none; } .row td:nth-child(2) { width: 22%; }
td svg { width: 100%; height: .4rem; border-radius: .2rem; background: var(--line); }
a { margin-right: var(--gap); line-height: 4; }
#lost { position: fixed; inset: auto 0 0; padding: .75rem; text-align: center; }
#lost { background: var(--bad); color: var(--card); font-weight: 600; }
@media (max-width: 60rem) {
  thead { display: none; }
  .wide tr {
    display: grid; grid-template-columns: repeat(auto-fit, minmax(5.5rem, 1fr));
    gap: .4rem .75rem; padding: .75rem 0; border-top: 1px solid var(--line);
  }
  .wide td { padding: 0; border: 0; text-align: left; }
  .wide td:nth-child(-n + 2) { grid-column: 1 / -1; }
  .wide td + td + td::before { content: attr(data-of); display: block; opacity: .7; }
}
"""

SCRIPT = """
async function update() {
  if (document.hidden || !getSelection().isCollapsed) return;
  const lost = document.getElementById("lost");
  try {
    const answer = await fetch("", {signal: AbortSignal.timeout(4500)});
    if (!answer.ok) throw new Error(answer.statusText);
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    for (const part of ["title", "link", "main"])
      document.querySelector(part).replaceWith(page.querySelector(part));
    lost.hidden = true;
  } catch {
    lost.hidden = false;
  }
}
setInterval(update, 5000);
document.addEventListener("visibilitychange", update);
"""
HASHES = [
    base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    for text in (STYLE, SCRIPT)
]
STATUS_POLICY = (
    "default-src 'none'; style-src 'sha256-{}'; script-src 'sha256-{}'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
).format(*HASHES)

STUCK = "a server's loop has not moved for seconds: restart it"
ICONS = {"good": "%2300a37a", "warn": "%23e09b1f", "bad": "%23d64541"}  # their colours
STATES = {"up": ("good", "up"), "down": ("bad", "down"), "new": ("warn", "connecting")}
STATES["doubtful"] = "warn", "not answering"
PERCENTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
UNITS: dict[str, dict[float, str]] = {  # what is written, and from where on in which
    **{"": {1: ""}, "part": {1: ""}, "%": {0.01: "%"}, "days": {1: "days"}},
    "time": {0.001: "ms", 1: "s", 60: "min", 3600: "h", 86400: "d"},
    "memory": {1: "B", 1 << 10: "KiB", 1 << 20: "MiB", 1 << 30: "GiB"},
}

Known = Union[float, None]
Row = dict[str, str]  # cells by their columns
Lines = dict[str, str]  # shape and name, whose last word is a class of STYLE; value now
Heights = Sequence[Sequence[Known]]  # from 0 to 1: of each change those of all lines
Reading = tuple[float, ...]  # time, CPU time, hits, misses, answers by source, buckets
Upstreams = Sequence[Mapping[str, object]]  # the facts of each, escaped


def write(number: Known, kind: str = "") -> str:
    """Write a number with three digits, or with all those before the point."""
    if number is None or number == math.inf:
        return "\u2013"
    units = UNITS[kind]
    unit = max((unit for unit in units if number >= unit), default=min(units))
    number /= unit
    text = f"{number:,.0f}" if number >= 99.95 else f"{number:.3g}"
    return f"{text}\u202f{units[unit]}" if units[unit] else text


def share_of(part: Known, whole: Known) -> Known:
    """Return which share of the whole a part is, where both are known."""
    return None if part is None or not whole else part / whole


def percentile(buckets: Sequence[float], share: float) -> Known:
    """Return within how many seconds this share was answered, as Prometheus has it."""
    rank, below = share * sum(buckets), 0.0
    bounds: Reading = (LATENCIES[0], *LATENCIES, LATENCIES[-1])  # no finer, no longer
    for lower, upper, number in zip(bounds, bounds[1:], buckets):
        if number and below + number >= rank:
            return lower + (upper - lower) * (rank - below) / number
        below += number
    return None


class Figures:
    """Samples, by their names without `dotproxy_`."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        # By a name and the place of a label: sums by that label. And histograms.
        self.sums: dict[tuple[str, int], dict[str, float]]
        self.sums = collections.defaultdict(dict)
        self.buckets: dict[str, dict[str, list[int]]] = collections.defaultdict(dict)
        for full_name, labels, value in samples:
            name = full_name.removeprefix("dotproxy_")
            for place, label in enumerate(labels or ("",)):
                if isinstance(value, Histogram):
                    self.buckets[name][label] = value.counts
                else:
                    sums = self.sums[name, place]
                    sums[label] = sums.get(label, 0.0) + value

    def get(self, name: str, label: str = "") -> Known:
        """Return a figure, None where it is not known."""
        return self.sums[name, 0].get(label)


class Change:
    """What happened between two readings."""

    def __init__(self, earlier: Reading, later: Reading) -> None:
        passed, cpu, hits, misses, *rest = (b - a for a, b in zip(earlier, later))
        answers, buckets = rest[: len(SOURCES)], rest[len(SOURCES) :]
        self.end = later[0]
        self.busy = share_of(cpu, passed)
        self.hit_ratio = share_of(hits, hits + misses)
        self.rate = share_of(sum(answers), passed)
        self.rates = [number / (passed or 1.0) for number in answers]
        self.delays = [percentile(buckets, share) for share in PERCENTILES.values()]


class Charts:
    """What the readings show over time: a short time while there is no more."""

    PERIOD = 10.0  # s from one reading to the next
    KEPT = 361  # readings: an hour
    LATEST = 7  # readings that count as now: a minute
    SPAN = 600.0  # s of the first chart; a phone could not show more than 60 points

    def __init__(self, readings: Sequence[Reading]) -> None:
        last, age = readings[-1], readings[-1][0] - readings[0][0]
        step = 1 if age <= self.SPAN else 3 if age <= 3 * self.SPAN else 6
        self.span = step * self.SPAN
        # Points are at multiples of the step, so that they stay where they are.
        marks = [r for r in readings[:-1] if r[0] // self.PERIOD % step == 0]
        changes = [Change(*pair) for pair in zip(marks, [*marks[1:], last])]
        self.changes = [c for c in changes if last[0] - c.end < self.span]
        self.places = [1000 * (1 - (last[0] - c.end) / self.span) for c in self.changes]
        self.latest = Change(readings[-self.LATEST :][0], last)

    def draw(self) -> str:
        """Draw queries by source, the time to answer on a log scale, and hits."""
        changes, latest = self.changes, self.latest
        highest = max((sum(change.rates) for change in changes), default=0.0)
        power = 10.0 ** math.floor(math.log10(max(highest, 1.0)))
        top = next(power * n for n in (1, 2, 4, 6, 8, 10) if power * n >= highest)
        stacks = [[y / top for y in itertools.accumulate(c.rates)] for c in changes]
        rates = {f"area {s}": write(rate) for s, rate in zip(SOURCES, latest.rates)}
        levels = [write(level) for level in (top, top / 2, 0)]
        first = self._draw("Queries per second by source", rates, stacks, levels)
        log10 = math.log10
        logs = [log10(y) for c in changes for y in c.delays if y] or [-3.0]
        low = math.floor(min(logs))
        steps = max(math.ceil(max(logs)) - low, 1)
        curves = [[y and (log10(y) - low) / steps for y in c.delays] for c in changes]
        delays = zip(PERCENTILES, latest.delays)
        percentiles = {f"line {name}": write(delay, "time") for name, delay in delays}
        levels = [write(10.0 ** (low + n), "time") for n in range(steps, -1, -1)]
        second = self._draw("Time to answer", percentiles, curves, levels)
        ratios = [[change.hit_ratio] for change in changes]
        hits = {"line answered from the cache": write(latest.hit_ratio, "%")}
        levels = [write(share, "%") for share in (1.0, 0.5, 0.0)]
        third = self._draw("Cache hit ratio", hits, ratios, levels)
        return f'{first}<div class="row">{second}{third}</div>'

    def _draw(self, title: str, lines: Lines, rows: Heights, levels: list[str]) -> str:
        legend, paths, steps = "", "", len(levels) - 1
        for place, (kind, now) in enumerate(lines.items()):
            path, pen = "", "M"
            for x, row in zip(self.places, rows):
                y = row[place]
                if y is not None:  # a point alone is a dot
                    path += f"{pen}{x:.1f} {100 - 100 * y:.1f}{'h0' * (pen == 'M')}"
                pen = "M" if y is None else "L"
            shape, _, name = kind.partition(" ")
            if shape == "area" and path:
                path += f"V100H{self.places[0]:.1f}Z"
            paths = f'<path class="{kind}" d="{path}"/>{paths}'  # the first in front
            key = f'<svg viewBox="0 0 18 10"><path class="{kind}" d="M1 5H17"/></svg>'
            legend += f"<li>{key}{name} {now}</li>"
        grid = "".join(f"M0 {100 * n / steps:.1f}H1000" for n in range(steps + 1))
        ago = [f"{self.span / parts:.0f} min ago" for parts in (60, 120)]
        side, below = ("</li><li>".join(each) for each in (levels, [*ago, "now"]))
        return f"""<section><h2>{title}</h2><ul class="legend">{legend}</ul>
<div class="plot"><svg viewBox="0 0 1000 100" preserveAspectRatio="none" role="img"
 aria-label="{title}: chart; the legend has the figures of the last minute">
<path class="grid" d="{grid}"/>{paths}</svg>
<ul aria-hidden="true"><li>{side}</li></ul></div>
<ul aria-hidden="true"><li>{below}</li></ul></section>"""


def draw_tiles(figures: Figures, latest: Change) -> str:
    """Draw the large figures."""
    hits, misses = (figures.get(f"cache_{n}_total") or 0.0 for n in ("hits", "misses"))
    ever = write(share_of(hits, hits + misses), "%")
    p50, p95, p99 = (write(delay, "time") for delay in latest.delays)
    total = write(sum(figures.sums["dns_responses_total", 0].values()))
    waiting = write(figures.get("queries_in_flight"))
    tiles = (
        ("Queries per second", write(latest.rate), "mean of the last minute"),
        ("From the cache", write(latest.hit_ratio, "%"), f"{ever} since the start"),
        ("Half answered within", p50, f"p95\u00a0{p95}, p99\u00a0{p99}"),
        ("Queries answered", total, f"since the start, {waiting} waiting"),
    )
    tile = "<div><dt>{}</dt><dd>{}<small>{}</small></dd></div>"
    return "".join(tile.format(*each) for each in tiles)


def draw_table(title: str, rows: Sequence[Row]) -> str:
    """Draw a table: of each row the cells by column."""
    body = ""
    for row in rows:
        cells = "".join(f'<td data-of="{key}">{cell}</td>' for key, cell in row.items())
        body += f"<tr>{cells}</tr>\n"
    head = "".join(f'<th scope="col">{name}</th>' for name in rows[0]) if rows else ""
    table = f"<table><thead><tr>{head}</tr></thead>{body}</table>"
    return f"<section><h2>{title}</h2>{table if rows else 'None so far.'}</section>"


def draw_row(name: str, number: Known, whole: Known = None, kind: str = "") -> Row:
    """Draw a figure, with a bar where it is a share of a whole."""
    share, text, bar = share_of(number, whole), write(number, kind), ""
    if share is not None:
        bar = f'<svg><rect width="{min(share, 1):.1%}" height="9"/></svg>'
        text += "" if kind in ("part", "%") else f" of {write(whole, kind)}"
    return {"name": name, "share": bar, "figure": text}


def draw_tables(figures: Figures, latest: Change, cache_limit: int) -> str:
    """Draw who asked for what, and what there is a limit to."""
    get, sums, tables = figures.get, figures.sums, ""
    for title, family, place in (
        ("Answers by RCODE", "dns_responses_total", 0),
        ("Queries by type", "dns_requests_total", 2),
        ("Answers by source", "dns_responses_total", 1),
        ("Turned away, by reason", "turned_away_total", 0),
    ):
        found, total = sums[family, place], sum(sums[family, place].values())
        names = sorted(filter(found.get, found), key=found.__getitem__, reverse=True)
        rows = [draw_row(name, found[name], total, "part") for name in names[:6]]
        tables += draw_table(title, rows)
    cache = [
        draw_row("Memory", get("cache_size_bytes"), cache_limit, "memory"),
        draw_row("Answers", get("cache_entries")),
        draw_row("Put out", get("cache_evictions_total")),
        draw_row("Refreshed", get("cache_prefetch_total")),
    ]
    busy, limits = sums["pool_threads_busy", 0], sums["pool_threads_limit", 0]
    process = [
        draw_row("TCP clients", get("stream_clients", "tcp")),
        draw_row("TLS clients", get("stream_clients", "dot")),
        *(draw_row(f"{n} threads", busy[n], limits.get(n)) for n in busy),
        draw_row("Files", get("process_open_fds"), get("process_max_fds")),
        draw_row("CPU", latest.busy, 1.0, "%"),
        draw_row("Memory", get("process_resident_memory_bytes"), None, "memory"),
    ]
    tables += draw_table("Cache", cache) + draw_table("Clients and process", process)
    return tables


def draw_upstreams(upstreams: Upstreams, figures: Figures, now: float) -> str:
    """Draw the table of upstreams."""
    get, rows = figures.get, []
    sent = figures.sums["upstream_requests_total", 0]
    failures = figures.sums["upstream_failures_total", 0]
    buckets = figures.buckets["upstream_request_duration_seconds"]
    for facts in upstreams:
        name, since, failed_at = str(facts["name"]), facts["since"], facts["failed_at"]
        where, _, notes = name.partition("#")
        notes += f" for {facts['domain']} only" if facts["domain"] else ""
        if isinstance(failed_at, float):
            notes += f"<br/>{write(now - failed_at, 'time')} ago: {facts['error']}"
        kind, state = STATES[str(facts["state"])]
        if isinstance(since, float):
            state += f" for {write(now - since, 'time')}"
        latency = write(get("upstream_latency_seconds", name), "time")
        p95 = write(percentile(buckets.get(name, ()), 0.95), "time")
        share = write(share_of(sent.get(name), sum(sent.values())), "%")
        ends = get("upstream_certificate_expiry_timestamp_seconds", name)
        days = math.inf if ends is None else (ends - time.time()) / 86400
        left = write(days, "days") if days > 0 else "expired"
        mark = f'<i class="{"warn" if days > 0 else "bad"}"></i> ' if days < 14 else ""
        row = {
            "Upstream": f"<strong>{where}</strong><small>{notes}</small>",
            "State": f'<i class="{kind}"></i> {state}',
            "Latency": f"{latency}<small>p95 {p95}</small>",
            "Queries": f"{write(sent.get(name))}<small>{share}</small>",
            "Failures": write(failures.get(name)),
            "Connections": write(get("upstream_connections", name)),
            "Idle life": write(get("upstream_idle_life_seconds", name), "time"),
            "Certificate": mark + left,
        }
        rows.append(row)
    return draw_table("Upstreams", rows)


def describe_service(upstreams: Upstreams, trouble: str, now: float) -> Sequence[str]:
    """Say whether it serves: good, warn or bad; a headline; and why."""
    # Nobody need have asked for a routed domain yet.
    fine = [u for u in upstreams if u["state"] in ("up", u["domain"] and "new")]
    troubled = [u for u in upstreams if u not in fine]
    why = "; ".join(f"{u['name']}: {u['error']}" for u in troubled[:3])
    general = [u for u in upstreams if not u["domain"]]
    states = [u["state"] for u in general]
    if "up" in states:
        served = {u["domain"] for u in fine}
        lost = sorted({str(u["domain"]) for u in troubled} - served)
        headline = f"Serving: {states.count('up')} of {len(states)} upstreams up"
        headline += f", but none for {', '.join(lost)}" if lost else ""
        return "warn" if troubled else "good", headline, why
    if states.count("new") == len(states):
        return "warn", "Starting: no upstream is connected yet", ""
    outage = "no upstream answers"
    since = [u["since"] for u in general if isinstance(u["since"], float)]
    if since and "doubtful" not in states:  # one that answered a moment ago
        outage = f"no upstream has answered for {write(now - max(since), 'time')}"
    if trouble:
        return "bad", f"Not serving: {outage}", why
    return "warn", f"Serving from the cache alone: {outage}", why


class AdminPages:
    """What there is to see, by path."""

    def __init__(
        self,
        metrics: Metrics,
        proxy: Proxy,
        timer: Timer,
        is_turning: Callable[[float], bool],
        listen: str,
        cache_limit: int,
    ) -> None:
        """Take a reading; `is_turning`: whether the servers' loops turned lately."""
        self._metrics, self._proxy, self._timer = metrics, proxy, timer
        self._is_turning = is_turning
        self._listen, self._cache_limit = listen, cache_limit
        # Replaced as a whole and never changed: whoever looks needs no lock.
        self._readings: tuple[Reading, ...] = ()
        kind = "text/plain; version=0.0.4; charset=utf-8"

        def probe(trouble: str) -> Page:
            return Page(f"{trouble}\n", status=503) if trouble else Page("OK\n")

        self.by_path: Pages = {
            "/": self._show_status,
            "/metrics": lambda: Page(metrics.write(), kind),
            "/health": lambda: probe("" if is_turning(time.monotonic()) else STUCK),
            "/ready": lambda: probe(proxy.trouble()),
            "/grafana.json": lambda: Page(
                json.dumps(build_dashboard(), indent=1), "application/json"
            ),
        }
        self.take_reading()

    def take_reading(self) -> None:
        """Read the counters, now and from now on; the timer calls it again."""
        now, figures = elapsed(), Figures(self._metrics.samples())
        names = "process_cpu_seconds_total", "cache_hits_total", "cache_misses_total"
        sources = figures.sums["dns_responses_total", 1]
        durations = figures.buckets["dns_request_duration_seconds"].values()
        reading = (
            *(now, *(figures.get(name) or 0.0 for name in names)),
            *(sources.get(source, 0.0) for source in SOURCES),
            *map(sum, zip(*durations)),
        )
        self._readings = (*self._readings[1 - Charts.KEPT :], reading)
        self._timer.at(now + Charts.PERIOD, self.take_reading)

    def _show_status(self) -> Page:
        import html  # takes 3 ms, as a part of http.server

        figures, charts = Figures(self._metrics.samples()), Charts(self._readings)
        upstreams = [
            {k: html.escape(v) if isinstance(v, str) else v for k, v in facts.items()}
            for facts in self._proxy.facts()
        ]
        now = elapsed()
        kind, headline, why = "bad", "Not serving", STUCK
        if self._is_turning(time.monotonic()):
            trouble = self._proxy.trouble()
            kind, headline, why = describe_service(upstreams, trouble, now)
        age = time.time() - (figures.get("process_start_time_seconds") or time.time())
        stamp = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        text = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{headline} | dotproxy</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<noscript><meta http-equiv="refresh" content="15"></noscript>
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg'
viewBox='0 0 8 8'%3E%3Ccircle cx='4' cy='4' r='4' fill='{ICONS[kind]}'/%3E%3C/svg%3E">
<style>{STYLE}</style></head>
<body><main><header><h1><i class="{kind}"></i> {headline}</h1><p>{why}</p>
<p>dotproxy {__version__} · up for {write(age, "time")} · listening on
{html.escape(self._listen)} · as of {stamp}</p></header>
<dl>{draw_tiles(figures, charts.latest)}</dl>
{charts.draw()}
<div class="wide">{draw_upstreams(upstreams, figures, now)}</div>
<div class="row">{draw_tables(figures, charts.latest, self._cache_limit)}</div>
</main><footer><a href="metrics">/metrics</a> <a href="health">/health</a>
<a href="ready">/ready</a> <a href="grafana.json">/grafana.json</a></footer>
<p id="lost" role="alert" hidden>This page is out of date: dotproxy does not answer.</p>
<script>{SCRIPT}</script></body></html>
"""
        return Page(text, "text/html; charset=utf-8", policy=STATUS_POLICY)


# ---- Host: privileges, descriptors, systemd ------------------------------------------
# What the system lends a process: a user, descriptors, sockets, a supervisor. Nothing
# of DNS.

NOBODY, NOBODY_ID = "nobody", 65534  # the number where there is no such name
PRCTL = ((4, 0), (38, 1))  # PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS of linux/prctl.h
# What some Python imports at the first handshake, look-up or traceback, when who was
# root may not be able to read it any more.
LATE_MODULES = (
    *("_colorize", "_strptime", "ast", "encodings.idna", "linecache", "textwrap"),
    *("tokenize", "traceback", "unicodedata"),
)
OPEN_MAX = 10240  # macOS takes no higher limit, whatever its hard limit says
Passed = tuple[str, socket.socket]  # what systemd calls a socket, and that
FIRST_PASSED = 3  # the first descriptor that systemd passes, sd_listen_fds(3)


def find_number(word: str, look_up: Callable[[str], int]) -> int:
    """Return the number of a user or group; raises ConfigError."""
    with contextlib.suppress(KeyError):
        number = int(word) if word.isdecimal() else look_up(word)
        if number < 1 << 32:
            return number
    if word == NOBODY:
        return NOBODY_ID
    hint = "give --user USER or USER:GROUP, names or numbers"
    raise ConfigError(f"there is no user or group {word!r}: {hint}")


def find_account(text: str) -> tuple[int, int]:
    """Return the numbers of `USER[:GROUP]`; raises ConfigError.

    Without a group it is the user's own, or that of the same number.
    """
    user, colon, group = text.partition(":")
    uid = find_number(user, lambda name: pwd.getpwnam(name).pw_uid)
    if colon:
        return uid, find_number(group, lambda name: grp.getgrnam(name).gr_gid)
    with contextlib.suppress(KeyError):
        return uid, pwd.getpwuid(uid).pw_gid
    return uid, uid


def check_current(wanted: str | None) -> None:
    """Raise ConfigError unless this is the user that is wanted, if any is."""
    if wanted and find_account(wanted) != (os.geteuid(), os.getegid()):
        cure = "start as root, or without --user"
        raise ConfigError(f"only root can become user {wanted}: {cure}", status=1)


def become(uid: int, gid: int) -> None:
    """Give up root for good; raises OSError where the system refuses."""
    for name in LATE_MODULES:
        with contextlib.suppress(ImportError):  # another version's
            importlib.import_module(name)
    with contextlib.ExitStack() as stack:  # to bar once more what no user may do
        with contextlib.suppress(ImportError, OSError, AttributeError):
            import ctypes  # large, and missing from small images

            for option, value in PRCTL:
                words = map(ctypes.c_ulong, (value, 0, 0, 0))
                stack.callback(ctypes.CDLL(None).prctl, option, *words)
        os.setgid(gid)  # first, as EINVAL tells that there is no such number here
        os.setgroups([])
        os.setuid(uid)
    with contextlib.suppress(PermissionError):
        os.setuid(0)
        text = "the user could become root again: start with another --user"
        raise ConfigError(text, status=1)


def has_capabilities() -> bool:
    """Tell whether this process may do more than any user, or that cannot be known."""
    with contextlib.suppress(OSError), open("/proc/self/status", "rb") as file:
        return not re.search(rb"^CapEff:\s*0+$", file.read(), re.M)
    return True


UMASK = 0o077  # what it writes is for its own user


def renounce_root(wanted: str | None) -> str:
    """Give up what this program does not need of the host; return who it runs as.

    To be called once files are read and ports bound, before there are threads: they
    would each have rights of their own. Raises ConfigError.
    """
    os.umask(UMASK)
    with contextlib.suppress(OSError, ValueError):  # a sandbox may forbid it
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # it would have keys in it
    if os.geteuid():
        check_current(wanted)
        return str(os.geteuid())
    user = (wanted or NOBODY).partition(":")[0]
    uid, gid = find_account(wanted or NOBODY)
    hint = "--user says so, but any other user would do"
    try:
        if uid or gid:
            become(uid, gid)
            return user
    except OSError as error:
        cure = "grant CAP_SETUID and CAP_SETGID, or stay root with --user root"
        hint = f"cannot become user {user}: {error.strerror}; {cure}"
        if wanted or (error.errno != errno.EINVAL and has_capabilities()):
            raise ConfigError(hint, status=1) from error
    note(logging.WARNING, "running as root", hint=hint)
    return "root"


def raise_descriptor_limit(wanted: int) -> int:
    """Let this process have so many descriptors; return how many of them it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    for limit in (most, min(most, max(soft, OPEN_MAX))):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            return limit
    return soft


def inherited_sockets(environment: Mapping[str, str]) -> list[Passed]:
    """Take over the sockets that systemd passed, with their names; raises ConfigError.

    They are told as in sd_listen_fds(3).
    """
    if environment.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = environment.get("LISTEN_FDS", "")
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    sockets: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        try:
            for number in range(FIRST_PASSED, FIRST_PASSED + int(count)):
                taken = stack.enter_context(socket.socket(fileno=number))
                listens = taken.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                kind = socket.SOCK_STREAM if listens else socket.SOCK_DGRAM
                families = socket.AF_INET, socket.AF_INET6
                if taken.type != kind or taken.family not in families:
                    raise ValueError(f"descriptor {number} listens on no address")
                sockets.append(taken)
        except (OSError, ValueError) as error:
            cure = "pass sockets as ListenDatagram= and ListenStream= of addresses do"
            text = f"cannot serve on LISTEN_FDS={count}: {error}; {cure}"
            raise ConfigError(text, status=1) from error
        stack.pop_all()
    return list(zip([*names, *[""] * len(sockets)], sockets))


class Supervisor:
    """systemd, where it started this process and wants to hear how it goes.

    Its protocol is that of sd_notify(3): datagrams, to a socket that it names.
    """

    STATUS = 10.0  # s between reports, where no watchdog wants them more often

    def __init__(self, environment: Mapping[str, str]) -> None:
        path = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + path[1:] if path.startswith("@") else path
        # A quarter, so that a loop that hung for a moment can still tell that it turns.
        period = environment.get("WATCHDOG_USEC", "")
        often = int(period) / 4e6 if period.isdecimal() else 0.0
        wait = min(often or self.STATUS, self.STATUS)
        self.interval = wait if path else None  # s between reports

    def tell(self, *lines: str) -> None:
        """Send a notification, or drop it where nobody takes it; never blocks."""
        if self._address:
            kind = socket.AF_UNIX, socket.SOCK_DGRAM
            with contextlib.suppress(OSError), socket.socket(*kind) as channel:
                channel.setblocking(False)
                channel.sendto("\n".join(lines).encode(), self._address)


# ---- Command line --------------------------------------------------------------------
# Options become a Config, checked.

FIRST_PROCESS = "/proc/1/cmdline"  # what a container runs, or a host's init
LABEL = re.compile(r"(?=[-_]*[a-z0-9])[-\w]{1,63}", re.ASCII | re.IGNORECASE)
# [ADDRESS], HOST or a bare IPv6 address, then :PORT, @PORT or nothing.
PLACE = re.compile(
    r"(?:\[(.*)]|([^][:@]*)|([^][@]*:[^][@]*:[^][@]*))(?:[:@]([0-9]{1,5}))?"
)
# What is quoted in a line of options, or the comment at its end.
COMMENT = re.compile(r"""(\\.|'[^']*'|"(?:\\.|[^"\\])*")|(?:^|(?<=\s))#.*""")
FLAGS = {"1": True, "true": True, "yes": True, "on": True}
FLAGS |= {"0": False, "false": False, "no": False, "off": False}


def hinted(hint: str) -> Callable[[Callable[[str], T | None]], Callable[[str], T]]:
    """Make a parser argparse's: the hint is told for ValueError, and for None."""

    def decorate(parse: Callable[[str], T | None]) -> Callable[[str], T]:
        def parse_or_tell(text: str) -> T:
            with contextlib.suppress(ValueError):
                if (value := parse(text)) is not None:
                    return value
            raise argparse.ArgumentTypeError(f"{text!r}: {hint}")

        return parse_or_tell

    return decorate


def is_domain(text: str) -> bool:
    """Tell whether this looks like a domain name: none ends in a number, RFC 3696."""
    labels = text.removesuffix(".").split(".")
    fits = len(".".join(labels)) <= MAX_NAME - 2 and not labels[-1].isdigit()
    return fits and all(map(LABEL.fullmatch, labels))


def is_host(text: str) -> bool:
    """Tell whether this is an IP address or looks like a host name."""
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(text))
    return is_domain(text)


def split_port(text: str, port: int) -> Address:
    """Split `HOST[:PORT]` or `[HOST]:PORT`; raises ValueError."""
    match = PLACE.fullmatch(text)
    host = (match and (match[1] or match[2] or match[3])) or ""
    if match is None or not is_host(host) or int(match[4] or port) > 65535:
        raise ValueError
    return host, int(match[4] or port)


def listen_on(port: int, alone: str = "") -> Callable[[str], Address]:
    """Make the type of an address; without a port it has this one.

    A port without an address is one of `alone`.
    """

    @hinted(f"give an IP address and a port, as in 127.0.0.1:{port} or [::1]:{port}")
    def parse(text: str) -> Address:
        host, chosen = split_port(alone * text.isdigit() + text, port)
        return str(ipaddress.ip_address(host)), chosen  # with the zone, if it has one

    return parse


def parse_server(text: str) -> Endpoint:
    """Parse `[tls://]HOST[:PORT][#NAME]` or `tcp://HOST[:PORT]`; raises ValueError."""
    plain = text.startswith("tcp://")
    address = text[6:] if plain else text.removeprefix("tls://")
    place, sharp, name = address.partition("#")
    host, port = split_port(place, DNS_PORT if plain else DOT_PORT)
    if not port or (sharp and (plain or not is_host(name))):
        raise ValueError
    return Endpoint(host, port, "" if plain else (name or host).removesuffix("."))


@hinted(
    "write HOST[:PORT][#TLS-NAME], such as 9.9.9.9#dns.quad9.net; tcp:// is for --route"
)
def parse_upstream(text: str) -> Endpoint | None:
    return None if text.startswith("tcp://") else parse_server(text)


@hinted(
    "write DOMAIN=HOST#NAME or DOMAIN=tcp://HOST[:PORT], such as lan=tcp://10.0.0.1 or "
    "10.in-addr.arpa=tcp://10.0.0.1; servers of all names are for --upstream"
)
def parse_route(text: str) -> Route | None:
    domain, _, server = text.partition("=")
    found = parse_server(server)
    return (domain.removesuffix(".").lower(), found) if is_domain(domain) else None


@hinted("write TLS-NAME=BASE64, where BASE64 is a SHA-256 of 44 characters")
def parse_pin(text: str) -> tuple[str, str] | None:
    name, _, pin = text.partition("=")
    fits = is_host(name) and len(base64.b64decode(pin, validate=True)) == 32
    return (name.lower().removesuffix("."), pin) if fits else None


@hinted("give a domain name, such as example.com")
def parse_domain(text: str) -> bytes | None:
    return encode_domain(text) if is_domain(text) else None


@hinted(
    f"give all, {', '.join(SPECIAL_NAMES)}, or a private reverse zone, such as "
    "10.in-addr.arpa"
)
def parse_special(text: str) -> bytes | None:
    domain = b"\0" if text.lower() == "all" else parse_domain(text)
    known = any(domain in lineage(z) or z in lineage(domain) for z in LOCAL_ZONES)
    return domain if known else None


@hinted("give octets, such as 32M")
def parse_size(text: str) -> int | None:
    match = re.fullmatch("([0-9]+)([KMG]?)", text.upper())
    return int(match[1]) << 10 * " KMG".index(match[2] or " ") if match else None


def parse_network(text: str) -> Network:
    """Parse `ADDRESS[/BITS]`; raises ValueError."""
    network = ipaddress.ip_network(text, strict=False)  # bits of a host are ignored
    if parse_client(str(network.network_address)).version != network.version:
        raise ValueError
    return network


def number(kind: type[float], low: float, high: float) -> Callable[[str], float]:
    """Make the type of a number within bounds."""
    hint = f"give a number, {low:g} to {high:g}"
    return hinted(hint)(lambda text: v if low <= (v := kind(text)) <= high else None)


FLAG = hinted("give yes or no")(lambda text: FLAGS.get(text.lower()))
NETWORK = hinted(
    "give a network, such as 192.0.2.0/24 (as an IPv4 network) or 2001:db8::/32"
)(parse_network)
PATH = hinted("give the path of a file")(lambda text: text or None)
Parse = Callable[[str], object]
Kind = Union[Parse, "list[Parse]", "tuple[str, ...]"]
# fmt: off
# Option, metavar, kind and help, under headings. A kind in a list may be repeated, a
# tuple is a choice, a metavar in [] may be left out. Defaults are Config's, or words.
OPTIONS: tuple[str | tuple[str, str, Kind, str], ...] = (
    "serving",
    ("--listen", "ADDR[:PORT]", [listen_on(5353)],
     "serve UDP and TCP here; repeatable; port 0 picks one (default: 127.0.0.1:5353 "
     "[::1]:5353)"),
    ("--timeout", "SECONDS", number(float, 0.1, 60),
     "answer SERVFAIL after this long without an answer"),
    ("--max-in-flight", "N", number(int, 1, 30_000),
     "queries waiting for an answer at once; beyond it the busiest client's oldest "
     "ones get SERVFAIL"),
    ("--max-tcp-clients", "N", number(int, 1, 10_000),
     "TCP connections at once; beyond it the longest idle one is closed"),
    ("--max-tcp-per-client", "N", number(int, 1, 10_000),
     "the same for one client address"),
    ("--reuse-port", "[YES]", FLAG,
     "share the addresses with other processes that do so as well, among which the "
     "system spreads clients: for several of them, or a restart that loses nothing"),
    "admission",
    ("--allow", "NETWORK", [NETWORK],
     "answer clients of this network only; repeatable (default: loopback, private, "
     "link-local, shared and unique local addresses)"),
    ("--rate-limit", "QPS", number(int, 0, 1_000_000),
     "queries a second of one public IPv4 address or IPv6 /56, twice that at once; 0 "
     "for any number"),
    ("--rate-limit-all", "[YES]", FLAG, "limit private addresses as well"),
    "encrypted clients",
    ("--tls-listen", "ADDR[:PORT]", [listen_on(DOT_PORT)],
     "serve DNS over TLS here, on port 853 if none is given; repeatable (default: "
     "nowhere)"),
    ("--tls-cert", "PEM", PATH,
     "the certificate to show to clients, with its chain; read again at SIGHUP "
     "(default: none)"),
    ("--tls-key", "PEM", PATH,
     "its private key, without a passphrase (default: the one in the same file)"),
    "upstream",
    ("--upstream", "HOST[:PORT][#NAME]", [parse_upstream],
     "DNS-over-TLS resolver whose certificate is for NAME, or for HOST without one; "
     "repeatable (default: Cloudflare, 1.1.1.1#cloudflare-dns.com and its other three "
     "addresses)"),
    ("--route", "DOMAIN=UPSTREAM", [parse_route],
     "ask this server, and no others, for names at and below DOMAIN; written as for "
     "--upstream, or tcp://HOST[:PORT] for plain DNS; repeatable, also for one "
     "DOMAIN"),
    ("--strategy", "HOW", STRATEGIES,
     "choose among upstreams: fastest, round-robin, random or failover (in the order "
     "given)"),
    "trust",
    ("--ca-file", "PEM", PATH,
     "trust the CA certificates in this file only (default: the system's)"),
    ("--pin", "NAME=BASE64", [parse_pin],
     "of the servers with certificates for NAME, trust only those whose own public "
     "key, not their CA's, has this SHA-256; repeatable, one will do"),
    ("--tls-min", "VERSION", tuple(TLS_VERSIONS),
     "speak this version of TLS or newer with upstreams: 1.2 or 1.3"),
    "cache",
    ("--cache-size", "BYTES", parse_size,
     "memory for answers, with K, M or G if you like; 0 for no cache (default: 32M)"),
    ("--cache-min-ttl", "SECONDS", number(int, 0, 86400),
     "keep answers at least this long"),
    ("--cache-max-ttl", "SECONDS", number(int, 0, 7 * 86400),
     "keep answers at most so long"),
    ("--cache-fail-ttl", "SECONDS", number(int, 0, 30), "keep failures so long"),
    ("--cache-stale", "SECONDS", number(int, 0, 7 * 86400),
     "keep expired answers so long, for when no upstream answers; 0 for not at all"),
    "host",
    ("--user", "USER[:GROUP]", str,
     "if started as root, become this user, by name or number, once ports are bound "
     "and files read; root to stay root (default: nobody)"),
    "names",
    ("--forward-special", "NAME", [parse_special],
     "send this special name upstream, and all below it, instead of answering it "
     "here; repeatable; all for all of them"),
    ("--block-private-answers", "[YES]", FLAG,
     "answer NODATA where an upstream gives a private address, against DNS rebinding"),
    ("--allow-private", "NAME", [parse_domain],
     "let this name and all below it have private addresses nevertheless; "
     "repeatable"),
    "admin",
    ("--admin", "[ADDR:PORT]", listen_on(9153, "127.0.0.1:"),
     "serve a status page, metrics, probes and a Grafana dashboard over HTTP here; a "
     "port alone is one of 127.0.0.1, nothing at all is 127.0.0.1:9153 (default: "
     "off)"),
    "logs",
    ("--log-level", "LEVEL", ("debug", "info", "warning", "error"),
     "debug, info, warning or error"),
    ("--log-format", "FORMAT", ("text", "json"),
     "text, or json for objects of the Elastic Common Schema"),
    ("--query-log", "[FILE]", PATH,
     "log each query to this file, which SIGHUP opens again, or to stderr without one "
     "or with - (default: off)"),
    ("--query-log-privacy", "HOW", PRIVACY,
     "log clients as their /24 or /56 (prefix), under a random name (hash), in full "
     "(none), or as prefix and no names that were asked for (no-names)"),
    "instead of serving",
    ("--doctor", "[idle]", ("quick", "idle"),
     "check the whole set-up without starting it, this host and every upstream, and "
     "tell how to mend what fails (status 1); idle: and how long upstreams keep an "
     "idle connection, which takes a minute"),
    ("--healthcheck", "", FLAG,
     "ask the running proxy, and tell in a line whether it is healthy (status 0), or "
     "which of it and its upstream is down; without other options it takes those of "
     "process 1, where that is dotproxy"),
)
# fmt: on
ERRANDS = {"healthcheck", "doctor"}  # never of the environment, which servers inherit
ALONE = {"--admin": ("127.0.0.1", 9153), "--query-log": "-", "--doctor": "quick"}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose files have comments."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """Split a line of an options file as a shell does."""
        try:
            if "\0" in arg_line:
                raise ValueError("no option has such a character")
            return shlex.split(COMMENT.sub(r"\1", arg_line))
        except ValueError as error:
            self.error(f"{arg_line!r}: {error}")


def field_of(option: str) -> str:
    """Return what Config, and argparse, call an option."""
    return option[2:].replace("-", "_")


def build_parser() -> Parser:
    """Describe the options; what is not given is no attribute of the result."""
    parser = Parser(
        prog="dotproxy",
        usage="%(prog)s [OPTION]... [@FILE]",
        description="Forward DNS (UDP, TCP and TLS) to DNS-over-TLS resolvers.",
        epilog="Settings can also be given as DOTPROXY_OPTION in the environment, "
        "lists with commas or spaces between; the command line wins. @FILE reads "
        "options from a file, one a line, with # comments.",
        fromfile_prefix_chars="@",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    version = f"dotproxy {__version__}"
    parser.add_argument("--version", action="version", version=version)
    group: argparse._ActionsContainer = parser
    for row in OPTIONS:
        if isinstance(row, str):
            group = parser.add_argument_group(row)
            continue
        option, metavar, kind, text = row
        if not metavar:
            group.add_argument(option, action="store_const", const=True, help=text)
            continue
        default = Config._field_defaults[field_of(option)]
        if default not in (None, ()) and "(default: " not in text:
            shown = "no" if default is False else str(default).removesuffix(".0")
            text += f" (default: {shown})"
        alone = metavar.startswith("[")
        one = kind[0] if isinstance(kind, list) else kind
        group.add_argument(
            option,
            metavar=metavar[1:-1] if alone else metavar,
            nargs="?" if alone else None,
            const=ALONE.get(option, True) if alone else None,
            action="append" if isinstance(kind, list) else "store",
            choices=one if isinstance(one, tuple) else None,
            type=str if isinstance(one, tuple) else one,
            help=text,
        )
    return parser


def options_of_first_process() -> list[str]:
    """Return the options of process 1 if that is dotproxy, as it is in a container."""
    with contextlib.suppress(OSError), open(FIRST_PROCESS, "rb") as file:
        words = os.fsdecode(file.read()).split("\0")[:-1]
        for number, word in enumerate(words[:5]):
            if os.path.basename(word) in ("dotproxy", "dotproxy.py", "dotproxy.pyc"):
                return words[number + 1 :]
    return []


def check_options(config: Config) -> None:
    """Raise ConfigError where options contradict each other."""
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
    if config.allow_private and not config.block_private_answers:
        raise ConfigError("--allow-private needs --block-private-answers")
    if config.query_log is None and config.query_log_privacy != "prefix":
        raise ConfigError("--query-log-privacy needs --query-log")


def parse_args(arguments: Sequence[str], environment: Mapping[str, str]) -> Config:
    """Read the options: command line before environment before default.

    Raises ConfigError; --help and --version print and raise SystemExit.
    """
    parser = build_parser()
    try:
        given = vars(parser.parse_args(arguments))
        if list(given) == ["healthcheck"]:
            given |= vars(parser.parse_args(options_of_first_process()))
    except (UnicodeDecodeError, RecursionError) as error:
        parser.error(f"cannot use a file of options: {error}")
    words: list[str] = []
    for option, _, kind, _ in (row for row in OPTIONS if not isinstance(row, str)):
        text = environment.get(f"DOTPROXY_{field_of(option).upper()}", "")
        if text and field_of(option) not in {*ERRANDS, *given}:
            several = isinstance(kind, list)
            found = text.replace(",", " ").split() if several else [text]
            words += [f"{option}={word}" for word in found]
    chosen = {**vars(parser.parse_args(words)), **given}
    for name, value in chosen.items():
        if isinstance(value, list):
            chosen[name] = tuple(dict.fromkeys(value))
    config = Config(**chosen, listen_given="listen" in chosen)
    check_options(config)
    return config


def load_identity(config: Config, passed: bool = False) -> Identity | None:
    """Read what is to be shown to encrypted clients, if there are to be any.

    `passed`: systemd passed a socket for them. Raises ConfigError.
    """
    chain, key = config.tls_cert, config.tls_key
    if not config.tls_listen and not passed:
        if chain or key:
            option = "--tls-cert" if chain else "--tls-key"
            raise ConfigError(f"{option} is for encrypted clients: give --tls-listen")
        return None
    if not chain:
        cure = "give --tls-cert PEM, and --tls-key PEM if its key is in another file"
        raise ConfigError(f"serving TLS needs a certificate: {cure}")
    return Identity(chain, key)


def describe_bind_error(error: OSError, address: Address, option: str) -> str:
    """Say why an address cannot be listened on, and how to mend it."""
    host, port = address
    holders = {53: "systemd-resolved or dnsmasq", 5353: "avahi-daemon or mDNSResponder"}
    spare = write_address(host, port + (1 if port > 1023 else 8000))
    why, cure = str(error.strerror), f"mend {option}"
    if error.errno == errno.EADDRINUSE:
        why = f"port {port} is taken, perhaps by {holders.get(port, 'another server')}"
        cure = f"stop that, or choose another port with {option} {spare}"
    elif error.errno in (errno.EACCES, errno.EPERM):
        why = f"no permission for port {port}"
        cure = f"start as root, or choose a port from 1024 up with {option}"
    elif error.errno == errno.EADDRNOTAVAIL:
        why = "this host has no such address"
    return f"cannot listen on {write_address(host, port)}: {why}; {cure}"


def count_descriptors(config: Config) -> int:
    """Return how many descriptors may be in use at once.

    A TCP client takes two at worst: one that has been accepted may wait for the thread
    of another that is being ended.
    """
    links = (Upstream.SHARED + Upstream.LANES) * len(config.upstream + config.route)
    listeners = 2 * len(config.listen) + len(config.tls_listen)
    admin = 1 + AdminServer.MAX_CLIENTS if config.admin else 0
    others = 16  # standard streams, look-ups of names, files, notifications
    return 2 * config.max_tcp_clients + links + listeners + admin + others


def fit_descriptors(config: Config) -> Config:
    """Raise the limit of descriptors; where it stays too low, allow fewer TCP clients.

    UDP and the upstreams always have theirs.
    """
    wanted = count_descriptors(config)
    limit = raise_descriptor_limit(wanted)
    if limit >= wanted:
        return config
    clients = max(1, config.max_tcp_clients - (wanted - limit + 1) // 2)
    cure = f"start with LimitNOFILE={wanted} in the unit, or ulimit -n {wanted}"
    hint, few = f"for {config.max_tcp_clients} of them, {cure}", "few descriptors"
    note(logging.WARNING, few, limit=limit, max_tcp_clients=clients, hint=hint)
    return config._replace(max_tcp_clients=clients)


# ---- Health check and doctor ---------------------------------------------------------
# Both ask as a client does, over a blocking socket, and build nothing of the proxy: the
# health check as a container runs it every few seconds, the doctor as it looks at what
# may not start. It says of an upstream what the log would say.

HEALTH_GRACE = 1.0  # s beyond the proxy's own time-out that its answer may take
ROOT_QUESTION = b"\0\0\2\0\1"  # . NS IN: every resolver has that at hand
# Past the proxy's cache: what was cached days ago would say nothing of the upstreams.
UNCACHED = build_opt(0, PAIR.pack(OPTION_UNCACHED, 0))
HEALTH_QUERY = HEADER.pack(0, RD | AD, 1, 0, 0, 1)[2:] + ROOT_QUESTION + UNCACHED
REACHED_AT = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # who listens anywhere, here
OK, WARN, FAIL = "ok", "warn", "FAIL"
HOST = "this host"
RELEASED = 1_793_491_200  # 2026-11-01: a clock that is behind this is wrong
EXPIRY_NOTICE = 14 * 86400  # s before the end of a certificate, to warn
EXAMINERS = 32  # upstreams that are examined at once
STEP = 2.5  # s to connect, to shake hands, to answer
SAMPLES, SAMPLE_TIME = 10, 3.0  # queries one after the other, and s to begin them in
SLOW = 0.5  # s for an answer that a resolver has at hand, to warn
BURST = 16  # queries at once, to see whether one overtakes another
IDLE_LIMIT = 65.0  # s to wait for an idle connection to close

Heard = tuple[int, Response, float]  # which query's answer, and its seconds
Told = tuple[str, str]  # what a check found; what to do about it, where it is not well


def ask(link: socket.socket, queries: Sequence[bytes], patience: float) -> list[Heard]:
    """Send queries without their IDs, at once; return the answers as they came.

    Some may be missing when the time is over. Raises OSError or UpstreamError.
    """
    framed, start, rest = link.type == socket.SOCK_STREAM, elapsed(), b""
    asked, heard, sent = {}, [], b""
    first = int.from_bytes(os.urandom(2), "big")
    for place, query in enumerate(queries):
        message = (first + place & 0xFFFF).to_bytes(2, "big") + query
        asked[message[:2]] = place, message[12 : end_of_question(message)]
        sent += len(message).to_bytes(2, "big") * framed + message
    link.sendall(sent)
    while asked and (left := start + patience - elapsed()) > 0:
        link.settimeout(left)
        try:
            octets = link.recv(MAX_MESSAGE)
        except socket.timeout:
            break
        if framed and not octets:
            raise UpstreamError("closed", "closed by the server")
        messages, rest = split_frames(rest + octets) if framed else ([octets], b"")
        for message in messages:
            if message[:2] in asked and len(message) >= MIN_MESSAGE:
                place, question = asked[message[:2]]
                with contextlib.suppress(FormatError):  # then it is no answer
                    response = parse_misfit(message, question)
                    heard.append((place, response, elapsed() - start))
                    del asked[message[:2]]
    if not heard:
        raise UpstreamError("silence", f"no answer within {patience:g} s")
    return heard


def extended_error(response: Response) -> str:
    """Return the text of a response's Extended DNS Error."""
    reason = (find_option(response.options, OPTION_EDE) or b"")[2:]
    return reason.decode("utf-8", "replace").translate(CONTROLS)


def check_health(address: Address, patience: float) -> tuple[bool, str]:
    """Ask the proxy that listens here; return whether it is healthy, and a line."""
    host, port = REACHED_AT.get(address[0], address[0]), address[1]
    where = write_address(host, port)
    try:
        found = socket.getaddrinfo(host, port, flags=socket.AI_NUMERICHOST)
        family, *_, target = found[0]
        with socket.socket(family, socket.SOCK_DGRAM) as link:
            link.connect(target)
            ((_, response, seconds),) = ask(link, [HEALTH_QUERY], patience)
    except UpstreamError:
        return False, f"proxy down: no answer from {where} in {patience:g} s"
    except ConnectionRefusedError:
        return False, f"proxy down: nothing listens on {where}"
    except OSError as error:
        return False, f"proxy down: {where}: {error.strerror or error}"
    text, taken = extended_error(response), f"answered in {seconds * 1000:.1f} ms"
    if response.rcode == Rcode.SERVFAIL:
        return False, f"upstream down: {text or 'SERVFAIL without a reason'}"
    if response.rcode == Rcode.REFUSED:
        text = text or "the proxy's access list, or its upstream, refuses this check"
        return True, f"proxy up, upstream unknown: {text}; {taken}"
    return True, f"healthy: {taken}"


class Finding(NamedTuple):
    """What one check found, and how to mend it if that is not well."""

    subject: str
    check: str
    result: str
    detail: str
    cure: str = ""


def find_holders(port: int) -> str:
    """Name who holds a port, as far as that can be seen."""
    links, holders = set(), set()
    for path in glob.iglob("/proc/net/[tu][cd]p*"):
        with contextlib.suppress(OSError), open(path, encoding="ascii") as table:
            for fields in map(str.split, table):
                listens = fields[3] in ("07", "0A")  # unconnected UDP, TCP LISTEN
                if listens and fields[1].endswith(f":{port:04X}"):
                    links.add(f"socket:[{fields[9]}]")
    for path in glob.iglob("/proc/[0-9]*/fd/*") if links else ():
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            if os.readlink(path) in links:
                pid = path.split("/")[2]
                with open(f"/proc/{pid}/cmdline", errors="replace") as file:
                    words = [os.path.basename(each) for each in file.read().split("\0")]
                ours = any(word.startswith("dotproxy") for word in words[:4])
                name = f"{'dotproxy' if ours else words[0]} (pid {pid})"
                holders.add(name if pid != str(os.getpid()) else "another option")
    return ", ".join(sorted(holders))


def judge_holder(address: Address, plain: bool, cure: str) -> Told:
    """Tell who holds a port, well where it is dotproxy; `plain`: ask it how it does."""
    holder = find_holders(address[1])
    healthy, line = check_health(address, HEALTH_GRACE) if plain else (True, "")
    more = f"; {line}" * plain
    if "dotproxy" in holder:
        ill = "" if healthy else "see what is said of the upstreams"
        return f"held by {holder}, which runs{more}", ill
    taken = f"taken by {holder or 'a program that cannot be seen'}"
    if holder or line.startswith("proxy down"):
        raise ConfigError(f"{taken}; {cure}")
    return taken + more, f"if it is not dotproxy, {cure}"


def check_address(
    config: Config, taken: contextlib.ExitStack, option: str, address: Address
) -> Told:
    """Bind as an option's server does, and keep it: two options may want one port.

    Not with SO_REUSEPORT: it would take queries from the processes that share a port.
    """
    plain = option == "--listen"
    try:
        found = socket.getaddrinfo(*address, flags=socket.AI_NUMERICHOST)
        family, *_, target = found[0]
        with contextlib.ExitStack() as bound:  # and let go where not all of it is free
            bound.enter_context(socket.create_server(target, family=family))
            if plain:
                datagrams = socket.socket(family, socket.SOCK_DGRAM)
                set_v6_only(bound.enter_context(datagrams))
                datagrams.bind(target)
            taken.enter_context(bound.pop_all())
    except OSError as error:
        excused = address[0] in REACHED_AT or (plain and not config.listen_given)
        if excused and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            return "not used: this host has no such address", ""
        text = describe_bind_error(error, address, option).partition(": ")[2]
        if error.errno == errno.EADDRINUSE:
            return judge_holder(address, plain, text.partition("; ")[2])
        raise ConfigError(text) from None
    return "free", ""


def check_parts(config: Config) -> Told:
    load_identity(config)
    path = config.query_log or "-"
    place = path if os.path.exists(path) else os.path.dirname(path) or "."
    if path != "-" and (os.path.isdir(path) or not os.access(place, os.W_OK)):
        raise ConfigError(f"cannot write to {path}; mend --query-log")
    listen, upstream = len(config.listen), len(config.upstream) + len(config.route)
    return f"valid; {listen} to listen on, {upstream} upstream", ""


def check_user(wanted: str | None) -> Told:
    if os.geteuid():
        check_current(wanted)
        return f"{os.geteuid()}, not root", ""
    if uid := find_account(wanted or NOBODY)[0]:
        return f"root becomes {(wanted or NOBODY).partition(':')[0]} ({uid})", ""
    return "root stays root", "leave out --user root: any other user would do"


def check_descriptors(config: Config) -> Told:
    """Compare the limit of open files with what the bounds may come to."""
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)  # hard: the proxy takes that
    needed = count_descriptors(config)
    if limit == resource.RLIM_INFINITY or limit >= needed:
        says = "no limit" if limit == resource.RLIM_INFINITY else limit
        return f"{says}, of which {needed} may be used", ""
    text = f"{limit}, but {needed} may be needed: there will be fewer TCP clients"
    cure = f"ulimit -n {needed}, LimitNOFILE={needed} in a systemd unit, or fewer "
    return text, f"{cure}--max-tcp-clients"


def check_authorities(config: Config, made: list[Trust]) -> Told:
    """Tell which CA certificates are trusted, and add the Trust that has them."""
    trust = Trust(config.ca_file, pins=config.pin, tls_min=config.tls_min)
    made.append(trust)
    paths, number = ssl.get_default_verify_paths(), len(trust.context.get_ca_certs())
    if trust.has_authorities():
        where = trust.ca_file or (paths.cafile if number else paths.capath)
        return f"{number or 'as needed'} from {where}", ""
    where = os.environ.get(paths.openssl_cafile_env, paths.openssl_cafile)
    cure = "install ca-certificates, or give --ca-file PEM"
    raise ConfigError(f"none in {where}; {cure}")


def check_clock(certificates: Sequence[Finding]) -> Told:
    """Judge this host's clock by this program's age, and the certificates' dates."""
    says = time.strftime("it says %Y-%m-%d %H:%M UTC", time.gmtime())
    cure = "set the clock of this host, by NTP if you can"
    if time.time() < RELEASED:
        raise ConfigError(f"{says}, which is before this program was made; {cure}")
    if any(found.result != FAIL for found in certificates):
        return f"{says}, within the dates of an upstream's certificate", ""
    if any(re.search("expired|not valid yet", each.detail) for each in certificates):
        return f"{says}, when no upstream's certificate is valid", cure
    return says, ""


def look(check: str, make: Callable[..., Told], *arguments: object) -> Finding:
    """Make a check of this host."""
    try:
        told = make(*arguments)
        return Finding(HOST, check, WARN if told[1] else OK, *told)
    except (ConfigError, OSError) as error:
        parts = re.split("; |: (?=give|start)", str(error), maxsplit=1)
        return Finding(HOST, check, FAIL, *parts)


def look_at_host(config: Config) -> Iterator[Finding]:
    """Look at this host, but for what the upstreams tell of it."""
    yield look("options", check_parts, config)
    system, _, release, *_ = os.uname()
    python = f"Python {sys.version.split()[0]}, {ssl.OPENSSL_VERSION}"
    program = f"dotproxy {__version__}, {python}, {system} {release}"
    yield Finding(HOST, "program", OK, program)
    wanted = [("--listen", address) for address in config.listen]
    wanted += [("--tls-listen", address) for address in config.tls_listen]
    wanted += [("--admin", config.admin)] if config.admin else []
    with contextlib.ExitStack() as taken:
        for each in wanted:
            yield look(write_address(*each[1]), check_address, config, taken, *each)
    yield look("user", check_user, config.user)
    yield look("descriptors", check_descriptors, config)


# What to do about an upstream, by the cause, where what is said does not end with that.
UPSTREAM_CURES = {
    "timeout": "open TCP port {0.port} in the firewall, or give another --upstream",
    "refused": "check the address and the port in --upstream",
    "unreachable": "check the address in --upstream, and the routes of this host",
    "resolve": "give the address itself: --upstream ADDRESS#{0.name}",
    "silence": "check that it is a DNS resolver, or give another --upstream",
    "unwilling": "have its operator allow this host, or give another --upstream",
}
FORM = Form(UDP_TRANSPORT, RD)  # of what upstreams are asked


class Examination:
    """Looks at an upstream, or a server of a routed domain, up to the first failure."""

    def __init__(self, server: Route, trust: Trust, idle: bool) -> None:
        self.domain, self.endpoint = server
        self.findings: list[Finding] = []
        self._trust, self._idle = trust, idle
        self._links = contextlib.ExitStack()

    def run(self) -> None:
        """Look at all there is, for STEP at most at each step."""
        try:
            with self._links:
                self._look()
        except ssl.SSLError as error:
            self._fail(explain_tls_error(error, self.endpoint, self._trust, STEP))
        except OSError as error:
            self._fail(describe_network_error(error, self.endpoint))
        except Exception as error:
            self._fail(error)

    def _say(self, check: str, detail: str, cure: str = "", result: str = "") -> None:
        """Add a finding, which is well where it needs no cure."""
        domain, endpoint = self.domain, self.endpoint
        subject = f"{endpoint} for {domain}" if domain else str(endpoint)
        cure = cure.replace("--upstream", "--route") if domain else cure
        result = result or (WARN if cure else OK)
        self.findings.append(Finding(subject, check, result, detail, cure))

    def _fail(self, error: Exception) -> None:
        cause = error.cause if isinstance(error, UpstreamError) else "internal"
        detail = repr(error) if cause == "internal" else str(error)
        cure = UPSTREAM_CURES.get(cause, "try again, or give another --upstream")
        if cause in ("certificate", "tls"):
            where = str(self.endpoint).partition("#")[0]
            cure = detail.partition(" [")[0].rpartition(": ")[2]
            cure = cure.replace("HOST#NAME", f"{where}#NAME with such a name")
        check = ("connect", "handshake", "answers")[min(len(self.findings), 2)]
        check = "certificate" if cause == "certificate" else check
        self._say(check, detail, cure.format(self.endpoint), FAIL)

    def _visit(
        self, session: ssl.SSLSession | None = None
    ) -> tuple[socket.socket, float]:
        """Connect as the proxy does; return also how long TLS took on top of that."""
        name, start = self.endpoint.name, elapsed()
        link = socket.create_connection(self.endpoint[:2], STEP)
        self._links.enter_context(link)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected, address = elapsed(), link.getpeername()[0]
        if not self.findings:
            road = f"IPv{6 if ':' in address else 4} {address}"
            self._say("connect", f"{road}: {(connected - start) * 1000:.1f} ms")
        if not name:
            return link, 0.0
        wrap = self._trust.context.wrap_socket
        try:
            tls = wrap(link, server_hostname=name, session=session)
        except socket.timeout:
            raise UpstreamError("timeout", "no end of the TLS handshake") from None
        self._links.enter_context(tls)
        self._trust.check_pin(name, tls.getpeercert(True) or b"")
        return tls, elapsed() - connected

    def _look(self) -> None:
        """Raises UpstreamError and OSError, as ssl.SSLError."""
        link, taken = self._visit()
        edns, question = UNPADDED, ROOT_QUESTION
        if isinstance(link, ssl.SSLSocket):
            edns, cipher = PADDED, (link.cipher() or ("",))[0]
            agreed = f"{link.version()}, {cipher}, in {taken * 1000:.1f} ms"
            self._say("handshake", agreed)
            self._look_at_peer(link)
        else:
            self._say("handshake", "none: plain DNS in clear text")
        if self.domain:
            question = encode_domain(self.domain) + PAIR.pack(TYPE_SOA, CLASS_IN)
        query = build_upstream_query(Query(0, question, FORM, 0), edns)
        end, heard = elapsed() + SAMPLE_TIME, ask(link, [query], STEP)
        while len(heard) < SAMPLES and elapsed() < end:
            heard += ask(link, [query], STEP)
        answered = elapsed()
        self._look_at_answers(heard)
        other, taken = self._visit(getattr(link, "session", None))
        if isinstance(other, ssl.SSLSocket):
            text = f"session {'resumed' if other.session_reused else 'not resumed'}"
            self._say("resumption", f"{text}, handshake in {taken * 1000:.1f} ms")
        # The first has to be looked for elsewhere; the others may overtake it.
        name = encode_domain(f"{os.urandom(8).hex()}.{self.domain or 'example.com'}")
        question = name + PAIR.pack(TYPE_A, CLASS_IN)
        rare = build_upstream_query(Query(0, question, FORM, 0), edns)
        heard = ask(other, [rare, *[query] * (BURST - 1)], STEP)
        kept = [place for place, _, _ in heard] == list(range(len(heard)))
        text = "no answer overtook another" if kept else "answers as they are ready"
        self._say("order", text)
        if self._idle:
            link.settimeout(IDLE_LIMIT)
            with contextlib.suppress(OSError):  # as where it was reset
                while link.recv(MAX_MESSAGE):
                    pass
            seconds = elapsed() - answered
            text = "closed" if seconds < IDLE_LIMIT else "still open"
            self._say("idle", f"{text} after {seconds:.1f} s")

    def _look_at_peer(self, tls: ssl.SSLSocket) -> None:
        self._say("ALPN", tls.selected_alpn_protocol() or "none chosen")
        last = ssl.cert_time_to_seconds(str((tls.getpeercert() or {})["notAfter"]))
        left, names = last - time.time(), ", ".join(names_of(tls)[:8])
        date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(last))
        text = f"for {names}; {int(left // 86400)} days left, to {date}"
        cure = "have its operator renew it, or give another --upstream as well"
        self._say("certificate", text, cure if left < EXPIRY_NOTICE else "")
        self._say("pin", public_key_pin(tls.getpeercert(True) or b""))

    def _look_at_answers(self, heard: Sequence[Heard]) -> None:
        """Tell how long those took that were asked for in turn, and what is in them."""
        times = sorted(seconds for _, _, seconds in heard)
        least, median, most = times[0], times[len(times) // 2], times[-1]
        figures = " / ".join(f"{each * 1000:.1f} ms" for each in (least, median, most))
        cure = "look for what is in the way, or give a nearer --upstream"
        text = f"{figures} (least, median, most of {len(times)})"
        self._say("latency", text, cure if median > SLOW else "")
        response = heard[-1][1]
        options = split_options(response.upstream_options)
        text = "" if OPTION_PADDING in options else "none: "
        sizes = sorted({len(response.message) for _, response, _ in heard})
        self._say("padding", f"{text}answers of {', '.join(map(str, sizes))} octets")
        told = options.get(OPTION_KEEPALIVE, b"")[4:6]
        limit = f"{int.from_bytes(told, 'big') / 10:g} s"
        self._say("keepalive", limit if told else "not told")
        if response.rcode in FAILURE_RCODES:
            text = f"answers {Rcode(response.rcode).name}: {extended_error(response)}"
            raise UpstreamError("unwilling", text.rstrip(": "))


def examine(config: Config) -> list[Finding]:
    """Examine this host and every upstream; blocks for about ten seconds at most."""
    made: list[Trust] = []
    host = [*look_at_host(config)]
    host.append(look("CA certificates", check_authorities, config, made))
    routes = [*(("", endpoint) for endpoint in config.upstream), *config.route]
    idle = config.doctor == "idle"
    servers = [Examination(each, trust, idle) for trust in made for each in routes]
    pool = WorkerPool("doctor", EXAMINERS, len(routes))
    for each in servers:
        pool.submit(each.run)
    pool.close()
    served = {each.domain for each in servers if each.findings[-1].result != FAIL}
    for each in servers:  # IPv6 may be missing where others do without
        last = each.findings[-1]
        absent = last.detail.startswith("no route to") and ":" in each.endpoint.host
        if absent and each.domain in served:
            each.findings[-1] = last._replace(result=WARN, cure="")
    found = [finding for each in servers for finding in each.findings]
    certificates = [each for each in found if each.check == "certificate"]
    return [*host, look("clock", check_clock, certificates), *found]


def text_report(findings: Sequence[Finding]) -> str:
    """Write a table for people, and below it how to mend what fails."""
    width = max(len(finding.check) for finding in findings)
    lines, cures, results = [], [], [finding.result for finding in findings]
    for subject, group in itertools.groupby(findings, lambda finding: finding.subject):
        lines.append(subject)
        for _, check, result, detail, cure in group:
            lines.append(f"  {check:{width}}  {result:4}  {detail}")
            cures += [f"  {subject}, {check}: {cure}"] if cure else []
    failed, noted = results.count(FAIL), results.count(WARN)
    total = f"{len(results)} checks: {failed} failed, {noted} to note"
    return "\n".join(line.translate(CONTROLS) for line in [*lines, "", total, *cures])


def json_report(findings: Sequence[Finding]) -> str:
    """Write an object for machines."""
    results = {finding.result for finding in findings}
    result = next(each for each in (FAIL, WARN, OK) if each in results)
    checks = [finding._asdict() for finding in findings]
    return json.dumps({"version": __version__, "result": result, "checks": checks})


# ---- Running -------------------------------------------------------------------------
# A Config becomes objects, and they run until a signal.

CLIENT_PATIENCE = 5.0  # s after which glibc's resolver gives up
Server = Union[UDPServer, TCPServer]


def kind_of(server: socketserver.TCPServer) -> str:
    """Return what kind of server this is: udp, tcp, tls or admin."""
    if isinstance(server, TCPServer):
        return "tls" if server.encrypted else "tcp"
    return "udp" if isinstance(server, UDPServer) else "admin"


def bind_servers(
    services: Services,
    kinds: Iterable[str],
    address: Address,
    passed: socket.socket | None = None,
    attempts: int = 16,
) -> list[Server]:
    """Bind an address; port 0 becomes one that all kinds have. Raises OSError."""
    host, port = address
    servers: list[Server] = []
    try:
        for kind in kinds:
            if kind == "udp":
                servers.append(UDPServer(services, (host, port), passed))
            else:
                servers.append(TCPServer(services, (host, port), passed, kind == "tls"))
            port = servers[-1].server_address[1]
    except OSError:
        for server in servers:
            server.server_close()
        if address[1] or not attempts:
            raise
        return bind_servers(services, kinds, address, attempts=attempts - 1)
    return servers


def open_servers(
    config: Config, services: Services, passed: Sequence[Passed]
) -> Iterator[Server]:
    """Bind every address, or serve on what systemd passed in place of --listen.

    Raises ConfigError where one that was given cannot be bound. Addresses of a family
    that this host lacks are none: that is no error.
    """
    for name, taken in passed:
        stream = "tls" if name == "tls" else "tcp"
        kind = "udp" if taken.type == socket.SOCK_DGRAM else stream
        yield from bind_servers(services, [kind], taken.getsockname()[:2], taken)
    wanted = [("--listen", address) for address in (() if passed else config.listen)]
    wanted += [("--tls-listen", address) for address in config.tls_listen]
    for option, address in wanted:
        plain = option == "--listen"
        kinds = ("tcp", "udp") if plain else ("tls",)
        try:
            yield from bind_servers(services, kinds, address)
        except OSError as error:
            excused = address[0] in REACHED_AT or (plain and not config.listen_given)
            absent = error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
            if not (absent and excused):
                text = describe_bind_error(error, address, option)
                raise ConfigError(text, status=1) from error


def describe_servers(servers: Iterable[socketserver.TCPServer]) -> str:
    """Return where the servers listen, `ADDR:PORT` each once."""
    places = [server.server_address for server in servers]
    return " ".join(dict.fromkeys(write_address(str(p[0]), p[1]) for p in places))


def scaled(seconds: object, units: float) -> str:
    """Write a time in units, so many a second; nothing where it is not known."""
    return f"{seconds * units:.1f}" if isinstance(seconds, (int, float)) else ""


class Daemon:
    """All objects of a running proxy, started and stopped in order."""

    DRAIN_EXTRA = 0.5  # s beyond the timeout that answers in flight may take at the end
    STUCK = 5.0  # s after which a receiving loop that has not come round hangs

    def __init__(
        self, config: Config, passed: Sequence[Passed] = (), log: Writer | None = None
    ) -> None:
        """Build and bind everything; starts no thread. Raises ConfigError.

        Sockets that were `passed`, with their names, are served on in place of
        --listen, streams named `tls` in TLS. `log`: for the query log without a file.
        """
        self._identity = load_identity(config, "tls" in dict(passed))
        self._metrics, self._timer = Metrics(), Timer()
        self._query_file: Writer | None = None
        self._loops: dict[socketserver.BaseServer, threading.Thread] = {}
        self.servers: list[Server] = []
        with contextlib.ExitStack() as closing:  # what is here first is closed last
            if config.query_log and config.query_log != "-":
                log = self._query_file = Writer("querylog", config.query_log)
                closing.callback(log.close)
            if config.query_log and log:
                self._metrics.query_log = QueryLog(config, log)
            sockets = closing.enter_context(contextlib.ExitStack())
            closing.callback(self._timer.close)
            trust = Trust(config.ca_file, pins=config.pin, tls_min=config.tls_min)
            self._proxy = Proxy(config, trust, self._timer, self._metrics)
            closing.callback(self._proxy.close)
            limit = config.max_tcp_clients
            services = self._services = Services(
                self._proxy,
                Admission(config),
                WorkerPool("stream", limit + 1, limit),
                Clients(limit, config.max_tcp_per_client),
                self._identity,
                config.reuse_port,
            )
            closing.callback(services.streams.close)
            patience = min(config.timeout, CLIENT_PATIENCE) + self.DRAIN_EXTRA
            closing.callback(self._proxy.drain, patience)
            closing.callback(services.clients.close, patience)
            closing.callback(self._stop_loops)
            for server in open_servers(config, services, passed):
                self.servers.append(server)
                sockets.enter_context(server)
            if not self.servers:
                raise ConfigError("no address to listen on; mend --listen", status=1)
            self.admin = self._open_admin(config, sockets)
            self._closing = closing.pop_all()

    def _open_admin(
        self, config: Config, sockets: contextlib.ExitStack
    ) -> AdminServer | None:
        if config.admin is None:
            return None
        pages = AdminPages(
            *(self._metrics, self._proxy, self._timer, self.is_turning),
            listen=describe_servers(self.servers),
            cache_limit=config.cache_size,
        )
        try:
            return sockets.enter_context(AdminServer(config.admin, pages.by_path))
        except OSError as error:
            text = describe_bind_error(error, config.admin, "--admin")
            raise ConfigError(text, status=1) from error

    def start(self) -> None:
        """Start to serve, and connect to the upstreams."""
        for part in (self._proxy, self._services.streams, self._services.clients):
            self._metrics.collectors.append(part.samples)
        if self._query_file is not None:
            self._query_file.start()
        self._timer.start()
        self._proxy.start()
        for server in (*self.servers, *([self.admin] if self.admin else [])):
            name = f"{kind_of(server)}-{server.server_address[0]!s}"
            loop = threading.Thread(target=server.serve_forever, name=name, daemon=True)
            self._loops[server] = loop
            loop.start()

    def reload(self) -> None:
        """Empty the cache; read certificate and key, and open the query log, again."""
        self._proxy.flush()
        if self._identity is not None:
            self._identity.reload()
        if self._query_file is not None:
            self._query_file.reopen()

    def is_turning(self, now: float) -> bool:
        """Tell whether every loop that receives from clients has come round of late.

        `now`: of `time.monotonic`, as none comes round while the host sleeps.
        """
        return all(now - server.turned_at < self.STUCK for server in self.servers)

    def report(self) -> list[str]:
        """Return what systemd is told of how it does, and that it is alive if it is."""
        alive = self.is_turning(time.monotonic())
        proxy, states = self._proxy, [each["state"] for each in self._proxy.facts()]
        up = sum(state not in ("down", "doubtful") for state in states)
        work = f"{proxy.in_flight} queries in flight, {len(proxy.cache)} answers cached"
        status = f"STATUS={up} of {len(states)} upstreams up, {work}"
        return ["WATCHDOG=1", status] if alive else ["STATUS=a receiving loop hangs"]

    def log_state(self) -> None:
        """Write the state of the proxy and of each upstream to the log."""
        state = functools.partial(note, logging.INFO, "state", asked=True)
        proxy, cache = self._proxy, self._proxy.cache
        entries, octets = len(cache), cache.size
        state(in_flight=proxy.in_flight, cache_entries=entries, cache_bytes=octets)
        for facts in proxy.facts():
            state(
                name=facts["name"],
                state=facts["state"],
                error=facts["error"] if facts["state"] != "up" else "",
                latency_ms=scaled(facts["latency"], 1000),
                overdue_ms=scaled(facts["overdue_after"], 1000),
                idle_life_s=scaled(facts["idle_life"], 1),
                connections=facts["connections"],
                domain=facts["domain"],
            )

    def tell_ready(self, config: Config, user: str) -> None:
        """Log where it serves, whom it asks, and who it runs as."""
        note(
            *(logging.INFO, "ready"),
            listen=describe_servers(s for s in self.servers if kind_of(s) != "tls"),
            tls=describe_servers(s for s in self.servers if kind_of(s) == "tls"),
            upstream=" ".join(map(str, config.upstream)),
            route=" ".join(f"{domain}={server}" for domain, server in config.route),
            admin=describe_servers([self.admin] if self.admin else []),
            user=user,
            nofile=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            umask=f"{UMASK:03o}",
        )
        for domain, server in config.route:
            if not server.name:
                note(logging.INFO, "not encrypted", domain=domain, upstream=server)

    def _stop_loops(self) -> None:
        stoppers = [threading.Thread(target=server.shutdown) for server in self._loops]
        for stopper in stoppers:
            stopper.start()
        for thread in (*stoppers, *self._loops.values()):
            thread.join()

    def close(self) -> None:
        """Answer what is in flight, then end every thread and close every socket."""
        self._closing.close()


def warn_of_strangers(config: Config) -> None:
    """Say what it means that strangers may ask, where they may."""
    if wide := ",".join(str(network) for network in config.allow if is_open(network)):
        why = "whoever forges a victim's address has the answers sent there"
        hint = f"{why}; allow only networks of yours"
        event, rate = (logging.WARNING, "open to strangers"), f"{config.rate_limit:g}"
        note(*event, allow=wide, rate_limit=rate, hint=hint)


def serve(received: int, daemon: Daemon, supervisor: Supervisor) -> None:
    """Do what signals ask for, as they come from a pipe, until one asks for the end."""
    number = 0
    while number not in (signal.SIGTERM, signal.SIGINT):
        if number == signal.SIGHUP:
            now = int(time.monotonic() * 1e6)
            supervisor.tell("RELOADING=1", f"MONOTONIC_USEC={now}")
            daemon.reload()
            supervisor.tell("READY=1")
        elif number == signal.SIGUSR1:
            daemon.log_state()
        supervisor.tell(*daemon.report())
        ready, _, _ = select.select([received], [], [], supervisor.interval)
        number = os.read(received, 1)[0] if ready else 0


def run(config: Config, log: LogHandler) -> int:
    """Serve until SIGTERM or SIGINT; return the exit status."""
    # Not a queue that the handlers fill: one that comes just before the main thread
    # waits for the queue's lock would not wake it.
    received, written = os.pipe()
    os.set_blocking(written, False)
    signal.set_wakeup_fd(written)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    supervisor, passed = Supervisor(os.environ), inherited_sockets(os.environ)
    config = fit_descriptors(config)
    daemon = Daemon(config, passed, log.writer)
    user = renounce_root(config.user)
    log.writer.start()
    # The garbage collector looks less often at a cache of long-lived entries: 34 us of
    # CPU per uncached query, not 43. Garbage in cycles is that of connections' errors.
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    warn_of_strangers(config)
    daemon.start()
    daemon.tell_ready(config, user)
    supervisor.tell("READY=1")
    serve(received, daemon, supervisor)
    note(logging.INFO, "stopping")
    supervisor.tell("STOPPING=1", "WATCHDOG=1")  # the end may take as long as an answer
    daemon.close()
    return 0


def run_errand(config: Config) -> int:
    """Print what the health check or the doctor finds; return the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # end without a traceback
    if config.healthcheck:
        healthy, text = check_health(config.listen[0], config.timeout + HEALTH_GRACE)
    else:
        found = examine(config)
        text = (json_report if config.log_format == "json" else text_report)(found)
        healthy = all(finding.result != FAIL for finding in found)
    try:
        print(text.encode("ascii", "backslashreplace").decode(), flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # where Python tries again
        reason = f"cannot write to stdout: {error.strerror}"
        raise ConfigError(reason, status=1) from error
    return 0 if healthy else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status: 0, 1 cannot run, 2 bad option."""
    for descriptor in range(3):  # closed ones become what is opened next otherwise
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free
    try:
        given = sys.argv[1:] if arguments is None else arguments
        config = parse_args(given, os.environ)
        if config.healthcheck:  # no log: not even an import may fail it
            return run_errand(config)
        with logging_to_stderr(config.log_level, config.log_format) as log:
            return run_errand(config) if config.doctor else run(config, log)
    except ConfigError as error:
        print(f"dotproxy: {error}", file=sys.stderr)
        return error.status


if __name__ == "__main__":
    sys.exit(main())
