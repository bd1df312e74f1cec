#!/usr/bin/env python3
"""dotproxy: DNS in, DNS over TLS out, in one file of the standard library.

The path of a query

    UDP datagrams
      UDPServer.get_request        drain the socket: one request = one batch   [udp]
      UDPServer.process_request    Admission.verdict: REFUSED, TC or nothing for some
        Listener.answer            Proxy.lookup_from: an answer kept ready, byte for
                                   byte; else Proxy.lookup: parse_query, then Cache.get
                                   and CacheEntry.answer, or LocalAnswers: sendto, done
                                   Metrics.answered_at_once, and the query log
      UDPHandler.handle            Proxy.resolve: which group of upstreams
        UpstreamGroup.ask          join the same question in flight, or a new Exchange
        UpstreamGroup._best, _put  pick a link, which assigns an ID: Link.queue
        UpstreamGroup._again       without one it is parked, and a link is opened
        Plan.__exit__              Link.flush: encrypt and send all that has gathered
      ... that thread is free ...
      Link._read, _match           receive, decrypt, match ID and question [upstream]
      UpstreamGroup.link_answered  Proxy.store: RebindingGuard.screen, Cache.put_all;
                                   Proxy.answer: reply -> sendto, for all who wait;
                                   UpstreamGroup._refuse: SERVFAIL, REFUSED and the
                                   like are asked again, of another upstream if any
      UpstreamGroup._check, _act   hedge, ask again, a stale answer (Proxy.serve_stale),
                                   SERVFAIL at the deadline (Proxy.fail)    [timer]

    TCP and DoT clients enter at the same Listener.answer and Proxy.resolve, from
    StreamHandler, with another reply. It waits in place for the client's rate, for room
    and for octets; on --tls-listen it shakes hands first, through a Channel.

    Where to look for other things

    a TTL                 Cache._prepare brings it within its bounds, once, in what is
                          stored, before that is served; CacheEntry.answer and
                          Cache.renew count it down; where it is stale it is set anew
    a lost connection     to an upstream: UpstreamGroup.link_ended; Upstream.note_end
                          judges health, UpstreamGroup._lose asks again what was left
                          unanswered. To a client: StreamHandler.finish
    an option             is described where it is a field of the one Config, and acts
                          where `config.FIELD` is read, mostly when objects are made
    start and end         run, Daemon.start; Daemon.__init__ stacks up what the end does

Contracts that carry the design

    Proxy.lookup(message)    never blocks, does no I/O, never raises.
    Proxy.resolve(queries)   never blocks; every `reply` is called exactly once, by
                             whichever thread has the answer, SERVFAIL at worst, but
                             for what is left when Proxy.drain gives up at the end.
    reply(message, client)   never blocks, never raises.
    Form                     what queries say beside ID and QNAME; immutable, shared.
    Exchange                 one question in flight. New, overdue, lost and refused all
                             mean "send a copy, wait for a link, or fail it".
    Link                     one connection to an upstream, and again one when wanted.
    Plan                     what was decided under a group's lock, on memory alone, to
                             be carried out after it is released.

Threads; those that serve are started once a process that began as root has given it up

    main          waits for signals; meanwhile tells systemd how it goes, if it asks
    udp-*         one per listening socket: receives, answers from the cache, sends on
    tcp-*         one per listening socket: accepts connections, those of TLS too
    stream        pool, one per connected TCP or DoT client: shakes hands, reads,
                  answers from the cache, sends on
    upstream-*    one per open link, up to 12 a server of a group: connects, reads,
                  replies
    timer         hedges, time-outs, stale answers, refreshes: whatever is for later
    admin-*       accepts HTTP clients, each of which then has a thread of its own
    doctor        --doctor alone: pool, one per upstream
    log, querylog write the lines that others have made

Locks: which guards what, and which may be held while it is taken. None is held over a
callback or a call that waits for anybody else, but for the start of a pool's thread.

    UpstreamGroup.lock      exchanges, upstreams, what links have     Link._sending
                            pending and to send
    Link._sending           the socket, against two writers and a     -
                            close; octets not sent yet
    Channel._lock           the TLS object and its two buffers        Link._sending,
                                                                      StreamHandler's,
                                                                      TCPServer.turns
    StreamHandler._changed  octets not taken, queries in flight       -
    TCPServer.turns         who computes a step of a handshake        -
    Cache, Metrics, Timer, WorkerPool, RateLimiter, Clients:          -
                            their own state, as said there
    LogHandler's own        messages logged of late                   itself
    Writer's                lines that wait                           LogHandler's

    Tables of forms and free clients, AdminServer's clients and who looks into the cache
    have no lock: single operations of a dict or a set are atomic on every build. So it
    is where the thread of a link takes out of Link.pending; nobody else may without.
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
# Names for wire values, and the errors. Plain ints where they are tested per query: an
# IntEnum member takes 84 ns to compare, an int 31.

QR, AA, TC, RD, RA, AD, CD = 0x8000, 0x0400, 0x0200, 0x0100, 0x0080, 0x0020, 0x0010
OPCODE_MASK, RCODE_MASK = 0x7800, 0x000F
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
PAIR = struct.Struct("!HH")  # option code and length, frame length and ID

MAX_NAME = 255  # octets with the root label, RFC 1035 section 2.3.4
MIN_MESSAGE = 12  # octets: a header
MAX_MESSAGE = 65535
MIN_UDP_SIZE = 512  # what every client takes, RFC 1035 section 4.2.1
MAX_UDP_SIZE = 1232  # no fragments on any common path, DNS flag day 2020
MAX_TTL = (1 << 31) - 1  # s; what is above counts as 0, RFC 2181 section 8
MIN_RECORD = 11  # octets: the root as its name, and no data
MAX_KNOWN = 512  # octets of a query whose form, and of options that are remembered
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
    FILTERED = 17
    PROHIBITED = 18
    STALE_NXDOMAIN_ANSWER = 19
    NO_REACHABLE_AUTHORITY = 22
    NETWORK_ERROR = 23


class FormatError(Exception):
    """A message that breaks the wire format."""


class UpstreamError(Exception):
    """Why there is no answer: mostly a connection that could not be made or kept.

    `cause` is one of a closed set of words, `str()` says what and how to mend it.
    """

    def __init__(self, cause: str, text: str) -> None:
        super().__init__(text)
        self.cause = cause


class ConfigError(Exception):
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


# ---- Addresses -----------------------------------------------------------------------
# Where clients and upstreams are, and which of them are near.

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


def parse_client(host: str) -> IPAddress:
    """Parse the address of a client, which is IPv4 where IPv6 only carries that."""
    address = ipaddress.ip_address(host)
    return getattr(address, "ipv4_mapped", None) or address


def is_in(address: IPAddress, networks: Iterable[Network]) -> bool:
    return any(address in network for network in networks)


def write_address(host: str, port: int) -> str:
    """Write an address and a port as people do: IPv6 in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Endpoint(NamedTuple):
    """An upstream's address, and its certificate's name; in clear text without one."""

    host: str
    port: int
    name: str

    def __str__(self) -> str:
        where = write_address(self.host, self.port)
        return f"{where}#{self.name}" if self.name else f"tcp://{where}"


Route = tuple[str, Endpoint]  # a domain in lower case, and one of its servers


# ---- Messages (RFC 1035, RFC 6891, RFC 7830, RFC 8467) -------------------------------
# Pure functions over bytes: no clock, no lock, no socket. A query is parsed once into
# what its answer must look like, a response once into what can be served from it.

Transport = tuple[str, str]  # udp, tcp or dot; 1 for IPv4, 2 for IPv6
UDP_TRANSPORT = "udp", "1"
ClientAddress = tuple[str, int]  # with two more numbers for IPv6
# What a TCP client is told of the idle timeout, if it asks (RFC 7828).
KEEPALIVE_TOLD = struct.pack("!HHH", OPTION_KEEPALIVE, 2, CLIENT_IDLE_TIMEOUT * 10)
TRANSFERS = TYPE_IXFR, TYPE_AXFR
# How much EDNS an upstream gets: none, an OPT record, with keepalive, and with padding,
# which hides nothing in clear text (RFC 7830 section 6).
NO_EDNS, NO_OPTIONS, UNPADDED, PADDED = range(4)
# Octets that a label takes, by its length; above 63 there is none, but an IndexError.
LABEL_SIZES = tuple(range(1, 65))


def build_opt(edns_flags: int, options: bytes, rcode: int = 0) -> bytes:
    """Build an OPT record, which carries the upper bits of the RCODE."""
    ttl = rcode >> 4 << 24 | edns_flags
    return b"\0" + RECORD.pack(TYPE_OPT, MAX_UDP_SIZE, ttl, len(options)) + options


def split_options(octets: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the code and all octets of each EDNS option; raises FormatError."""
    offset = 0
    while offset < len(octets):
        end = offset + 4 + int.from_bytes(octets[offset + 2 : offset + 4], "big")
        if end > len(octets):
            raise FormatError("option past the end")
        yield octets[offset] << 8 | octets[offset + 1], octets[offset:end]
        offset = end


class Form:
    """What queries say beside their ID and their name; immutable, and shared.

    OPT is hop by hop (RFC 6891 section 6.1.1): no option of a client goes on.
    """

    def __init__(
        self,
        transport: Transport,
        flags: int = 0,
        kind: bytes = bytes(4),
        opt: tuple[int, int, bytes] | None = None,
    ) -> None:
        """Make one; `kind`: QTYPE and QCLASS; `opt`: class, TTL and data of OPT."""
        size, ttl, options = opt or (0, 0, b"")
        rrtype, told = PAIR.unpack(kind)[0], dict(split_options(options))
        proto, self.transport, self.rrtype = transport[0], transport, rrtype
        self.flags, self.edns_flags = flags, ttl & DO
        room = max(MIN_UDP_SIZE, min(size, MAX_UDP_SIZE))
        self.limit = room if proto == "udp" else MAX_MESSAGE  # octets of the answer
        self.padded = proto == "dot" and OPTION_PADDING in told  # the answer
        self.refusal = int(Rcode.REFUSED) if rrtype in TRANSFERS else 0  # RCODE
        if ttl & 0xFF0000:
            self.refusal = int(Rcode.BADVERS)
        # May it come from the cache, and go there? What TCP clients get of ANY is not
        # for UDP, and no answer stands for a refusal.
        plain = OPTION_UNCACHED not in told and rrtype != TYPE_ANY
        self.cacheable = plain and not self.refusal
        self.storable = self.cacheable and flags & RD != 0
        self.key = kind + bytes([flags & CD | self.edns_flags >> 15])  # ends cache keys
        self.more_key = bytes([flags >> 8 & 1])  # of what may not be stored
        # AD is for those who say that they understand it, RFC 6840 section 5.7: we do.
        mine = RD | CD if flags & AD or ttl & DO else RD | CD | AD
        self.answer_mask = ~mine  # of flags that an answer has from the response
        self.answer_flags = flags & (RD | CD) | RA
        self.upstream_head = HEADER.pack(0, flags & (RD | CD) | AD, 1, 0, 0, 1)[2:]
        idle = KEEPALIVE_TOLD if proto != "udp" and OPTION_KEEPALIVE in told else b""
        self.opt = build_opt(ttl & DO, idle) if opt else b""


class Query:
    """A well-formed query: what was asked, by whom, and how; see `parse_query`."""

    id: int  # without `__init__` one is made in 0.1 us less
    form: Form
    size: int  # octets of the message
    question: bytes  # QNAME, QTYPE and QCLASS as sent, case included
    name: bytes  # QNAME in lower case
    key: bytes  # equal for what has the same answer
    cache_key: bytes  # of the entry that may answer it; empty where none may
    stale: CacheEntry | None  # expired, but it may answer
    client: ClientAddress = "", 0  # nobody as yet
    received = 0.0


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
    kind, opt, offset = frame[10:14], None, 14
    if flags & (QR | OPCODE_MASK) or questions != 1:
        raise FormatError(f"no query, or QDCOUNT {questions}")
    if (answers or authority) and PAIR.unpack(kind)[0] not in TRANSFERS:
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
    """Parse a query, also one that its form has a `refusal` for; or FormatError."""
    end, size = end_of_question(message), len(message)
    read = known_form if size <= MAX_KNOWN else parse_form
    query = Query()
    query.form = form = read(transport, message[2:12] + message[end - 4 :])
    query.id, query.size = message[0] << 8 | message[1], size
    query.question = question = message[12:end]
    # AD is in no key: it is asked for always, and taken out for who did not ask.
    # Lengths of labels are below "A": lower() changes letters only.
    query.name = name = question[:-4].lower()
    query.key = query.cache_key = key = name + form.key
    if not form.storable:
        query.cache_key = key if form.cacheable else b""
        query.key = key + form.more_key
    query.stale = None  # set, as it is read each time: reading a default takes longer
    return query


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

    # Without `__init__` and slots one is made in 0.1 us less.
    flags, rcode = QR | RA, 0  # with the upper bits of the OPT record
    message = b""  # as it came; one without a question has none
    counts = 0, 0, 0  # of answers, authority and additional records
    body = b""  # the records, as on the wire
    ttls: Sequence[int] = ()  # of all records
    ttl_offsets: Sequence[int] = ()  # into the body
    negative_ttl: int | None = None  # of an SOA record of the authority
    options = b""  # Extended DNS Errors, for clients that speak EDNS
    upstream_options = b""  # all, for who owns the connection


def extended_errors(options: bytes) -> bytes:
    """Return the Extended DNS Errors among EDNS options; raises FormatError."""
    found = split_options(options)
    return b"".join(octets for code, octets in found if code == OPTION_EDE)


known_errors = functools.lru_cache(maxsize=1024)(extended_errors)  # 0.1 us, not 1


def parse_response(message: bytes, end: int) -> Response:
    """Parse a response whose question ends at `end`; raises FormatError.

    Dropped are what follows the OPT record, as that section is optional (RFC 2181
    section 9), octets behind the last record, and AA: who forwards has none.
    """
    _, flags, questions, answers, authority, extra = HEADER.unpack_from(message)
    if questions != 1:
        raise FormatError(f"QDCOUNT {questions}")
    sure, options, denied = answers + authority, b"", None
    ttls: list[int] = []
    offsets: list[int] = []
    offset, behind, upper = end, 0, 0
    try:
        for number in range(sure + extra):
            first = message[offset]
            place = offset + 2  # a pointer is the rule
            if first < 0xC0:
                place = skip_name(message, offset) if first else offset + 1
            rrtype, _, ttl, length = RECORD.unpack_from(message, place)
            if rrtype == TYPE_OPT:
                if number < sure or behind or first:
                    raise FormatError("misplaced OPT record")
                behind, extra, upper = offset, number - sure, ttl >> 24 << 4
                options = message[place + 10 : place + 10 + length]
            elif not behind:
                ttls.append(ttl)
                offsets.append(place + 4 - end)
                if rrtype == TYPE_SOA and answers <= number < sure and length >= 20:
                    denied = min(ttl, *TTL.unpack_from(message, place + 6 + length))
            offset = place + 10 + length
    except (IndexError, struct.error):
        raise FormatError("record past the end") from None
    if offset > len(message):
        raise FormatError("RDLENGTH past the end")
    response = Response()
    response.flags, response.rcode = flags & ~AA, flags & RCODE_MASK | upper
    response.counts, response.negative_ttl = (answers, authority, extra), denied
    response.body = message[end : behind or offset]
    response.ttls, response.ttl_offsets = ttls, offsets
    if end > 12:
        response.message = message if offset == len(message) else message[:offset]
    find = known_errors if len(options) <= MAX_KNOWN else extended_errors
    response.upstream_options, response.options = options, options and find(options)
    return response


def parse_misfit(message: bytes, question: bytes) -> Response:
    """Parse what does not begin with the very question; raises FormatError.

    Letters prove nothing, as connection and ID are ours (RFC 5452 section 9.1). Some
    servers send failures without the question.
    """
    end = 12 + len(question)
    name, kind = message[12 : end - 4], message[end - 4 : end]
    if message[2] >= 0x80:
        if (name.lower(), kind) == (question[:-4].lower(), question[-4:]):
            return parse_response(message, end)
        if message[4:6] == b"\0\0":
            response = parse_response(message[:5] + b"\1" + message[6:], 12)
            if response.rcode in FAILURE_RCODES and not response.body:
                return response
    raise FormatError("no response to the question that was asked")


def _cut(
    response: Response, body: bytes, room: int, secure: int
) -> tuple[int, bytes, tuple[int, int, int]]:
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
    options = response.options if options is None else options
    body = response.body if body is None else body
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


def with_ttls(
    octets: bytes, places: Sequence[int], low: int, high: int, age: int = 0
) -> bytes:
    """Return records with the TTLs at these places `age` less and within bounds."""
    changed = bytearray(octets)
    for place in places:
        (ttl,) = TTL.unpack_from(changed, place)
        TTL.pack_into(changed, place, min(max(ttl - age, low), high))
    return bytes(changed)


def build_option(info: ExtendedError, text: str) -> bytes:
    """Build an Extended DNS Error option (RFC 8914 section 2)."""
    reason = text.encode("utf-8", "replace")[:400].decode("utf-8", "ignore").encode()
    return struct.pack("!HHH", OPTION_EDE, 2 + len(reason), info) + reason


def error_response(rcode: int, options: bytes = b"") -> Response:
    """Make a response of our own that has no records."""
    response = Response()
    response.flags |= rcode & RCODE_MASK
    response.rcode, response.options = rcode, options
    return response


def build_format_error(message: bytes, rcode: int = 0) -> bytes:
    """Build the bare header that answers a message which could not be parsed."""
    flags = QR | RA | (message[2] << 8) & (OPCODE_MASK | RD)
    flags |= rcode or (Rcode.NOTIMP if flags & OPCODE_MASK else Rcode.FORMERR)
    return message[:2] + flags.to_bytes(2, "big") + bytes(8)


def build_short_answer(
    message: bytes, rcode: Rcode, *, flags: int = 0, options: Sequence[bytes] = ()
) -> bytes:
    """Build an answer without records, never longer than its query.

    Of `options`, for a client that sent OPT, the first that fit are taken.
    """
    try:
        query = parse_query(message)
    except FormatError:
        return build_format_error(message, rcode)
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
# Why some were not served, as counted here; Clients counts "connections".
TURNED_AWAY = "acl", "rate-limit", "slip", "overload", "format-error"
LATENCIES = tuple(0.00025 * 2**n for n in range(16))  # CoreDNS's buckets, in seconds
TYPES = """
1 A 2 NS 5 CNAME 6 SOA 12 PTR 15 MX 16 TXT 28 AAAA 33 SRV 35 NAPTR 39 DNAME 43 DS
44 SSHFP 46 RRSIG 47 NSEC 48 DNSKEY 50 NSEC3 52 TLSA 64 SVCB 65 HTTPS 251 IXFR
252 AXFR 255 ANY 257 CAA
"""
TYPE_NAMES = {int(number): name for number, name in re.findall(r"(\d+) (\w+)", TYPES)}
RCODE_NAMES = {int(code): code.name for code in Rcode}

# The name of a metric without `dotproxy_`, labels, which of FORMS the dashboard shows,
# and help. Names that end in _total are those of counters; `time` is of histograms.
TABLE = """
build_info | version,python,openssl | now | What runs.
process_start_time_seconds | - | age | When the process started.
queries_in_flight | - | now | Queries of clients that wait for an answer.
dns_requests_total | proto,family,type | rate | Queries answered.
dns_responses_total | rcode,source | rate | Responses, by where they came from.
dns_request_duration_seconds | source | time | Time from a query to its answer.
dns_do_requests_total | - | rate | Queries that ask for DNSSEC records (DO bit).
turned_away_total | reason | rate | Queries and connections turned away or dropped.
cache_hits_total | - | ratio | Queries answered from the cache, without stale answers.
cache_misses_total | - | rate | Queries that the cache could not answer.
cache_served_stale_total | - | rate | Queries with an expired answer (RFC 8767).
cache_entries | - | now | Answers in the cache.
cache_size_bytes | - | bytes | Memory that the cache's answers take.
cache_evictions_total | - | rate | Answers put out to make room.
cache_prefetch_total | - | rate | Cached answers asked for again with nobody waiting.
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
upstream_idle_life_seconds | upstream | most | How long it keeps idle connections.
upstream_certificate_expiry_timestamp_seconds | upstream | left | Certificate's end.
stream_clients | proto | now | Connected clients.
pool_threads_busy | pool | now | Threads of the pool at work.
pool_threads_limit | pool | now | Threads that the pool may have.
process_cpu_seconds_total | - | share | User and system CPU time.
process_resident_memory_bytes | - | bytes | Resident memory.
process_open_fds | - | now | Open file descriptors.
process_max_fds | - | now | File descriptors that may be open.
"""
LINES = re.sub("(?m)^(?!process_)", "dotproxy_", TABLE.strip()).split("\n")
# Labels, form and help, by the name that Prometheus knows.
FAMILIES = {
    name: (labels.strip("-").split(","), form, text)
    for name, labels, form, text in (line.split(" | ") for line in LINES)
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

    def observe_all(self, values: Iterable[float]) -> None:
        """Count values, of which those that came together are equal."""
        for value, same in itertools.groupby(values):
            self.observe(value, len(list(same)))

    def rows(self) -> Iterable[tuple[str, str, float]]:
        """Return what Prometheus is told: suffix, label and number each."""
        counts = list(itertools.accumulate(self.counts))
        for bound, count in zip((*map(float, self.bounds), "+Inf"), counts):
            yield "_bucket", f'le="{bound}"', count
        yield from (("_sum", "", self.sum), ("_count", "", counts[-1]))


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


Label = tuple[str, Form, int]  # an answer as it is counted: source, form, RCODE
formless = functools.lru_cache(16)(Form)  # of messages that could not be parsed
Given = tuple[bytes, bytes, ClientAddress]  # a query, its answer and its client
# Octets of a query, its answer and client, when it came, seconds until it was answered
Logged = tuple[int, bytes, ClientAddress, float, float]


class Metrics:
    """Is told of every answer and of who gets none; any thread may call, none waits."""

    MAX_LABELS = 1024  # sorts of answer that are counted apart before they are summed

    def __init__(self) -> None:
        self.query_log: QueryLog | None = None
        # Are called by whoever looks; added to before any thread is started.
        self.collectors: list[Callable[[], Iterable[Sample]]] = [process_samples]
        self._lock = threading.Lock()  # guards all below
        self._durations = {source: Histogram(LATENCIES) for source in SOURCES}
        # By the part of a name between `dotproxy_` and `_total`, and labels. What is
        # usual is there from the start: a rate needs a 0 to begin with.
        self._counts = collections.Counter[tuple[str, tuple[str, ...]]]()
        self._counts.update({("turned_away", (reason,)): 0 for reason in TURNED_AWAY})
        self._counts["cache_misses", ()] = 0
        # To count labels as they come, and sum them up when somebody looks, costs a hit
        # 0.15 us; to add to each number that they stand for, more than 1 us.
        kinds = PAIR.pack(TYPE_A, CLASS_IN), PAIR.pack(TYPE_AAAA, CLASS_IN)
        parts = itertools.product(("udp", "tcp"), "12", kinds)
        forms = [Form((proto, family), 0, kind) for proto, family, kind in parts]
        usual = itertools.product(SOURCES, forms, (0, 2, 3))
        self._labels = collections.Counter[Label](dict.fromkeys(usual, 0))

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
            items = [(len(asked), a, client, *times) for asked, a, client in given]
            self.query_log.put(tally, items)

    def answered(self, answers: Sequence[Answered], origin: Origin, now: float) -> None:
        """Count those who had to wait and were answered together."""
        source, server = origin
        tally = [(source, query.form, rcode) for query, _, rcode in answers]
        waits = [now - query.received for query, _, _ in answers]
        with self._lock:
            self._count_locked(tally)
            self._durations[source].observe_all(waits)
            if source in (UPSTREAM, LOCAL):
                self._counts["cache_misses", ()] += len(answers)
        if self.query_log is not None:
            rows = zip(answers, waits)
            items = [(q.size, a, q.client, q.received, s) for (q, a, _), s in rows]
            self.query_log.put(tally, items, server)

    def turned_away(self, reason: str, number: int = 1) -> None:
        """Count so many queries or connections; `TURNED_AWAY` has the reasons."""
        with self._lock:
            self._counts["turned_away", (reason,)] += number

    def samples(self) -> list[Sample]:
        """Return everything there is to know now; any thread may ask."""
        with self._lock:
            self._sum_up_locked()
            counts = list(self._counts.items())
        found: list[Sample] = [(f"dotproxy_{k[0]}_total", k[1], n) for k, n in counts]
        for source, duration in self._durations.items():
            found.append(("dotproxy_dns_request_duration_seconds", (source,), duration))
        return found + [each for collect in self.collectors for each in collect()]

    def write(self) -> str:
        """Return it in Prometheus's text format 0.0.4, in the table's order."""
        blocks = {}
        for name, (_, form, text) in FAMILIES.items():
            kind = "histogram" if form == "time" else "gauge"
            kind = "counter" if name.endswith("_total") else kind
            blocks[name] = [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        for name, values, value in self.samples():
            # JSON escapes what Prometheus wants escaped.
            known = [f"{k}={json.dumps(v)}" for k, v in zip(FAMILIES[name][0], values)]
            rows = value.rows() if isinstance(value, Histogram) else [("", "", value)]
            for suffix, bound, number in rows:
                pairs = ",".join(filter(None, (*known, bound)))
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
        for (source, form, rcode), number in self._labels.items():
            kind = TYPE_NAMES.get(form.rrtype, "other")
            counts["dns_requests", (*form.transport, kind)] += number
            counts["dns_responses", (RCODE_NAMES.get(rcode, "other"), source)] += number
            counts["dns_do_requests", ()] += number if form.edns_flags & DO else 0
            if name := {CACHE: "cache_hits", STALE: "cache_served_stale"}.get(source):
                counts[name, ()] += number
            if source == LOCAL and rcode in (Rcode.FORMERR, Rcode.NOTIMP):
                counts["turned_away", ("format-error",)] += number
        self._labels.clear()


# ---- Dashboard -----------------------------------------------------------------------
# What Grafana imports: a panel for each metric, in the order of the table.

# NAME stands for a metric of the instances that are chosen, BY for its labels, OTHER
# for the misses to its hits.
CHOSEN = '{instance=~"$instance"}'
RATE = f"sum by (BY) (rate(NAME{CHOSEN}[$__rate_interval]))"
BUCKETS = f"sum by (le,BY) (rate(NAME_bucket{CHOSEN}[$__rate_interval]))"
FORMS = {  # unit and PromQL
    "rate": ("ops", RATE),
    "share": ("percentunit", RATE),
    "ratio": ("percentunit", f"{RATE} / ({RATE} + {RATE.replace('NAME', 'OTHER')})"),
    "now": ("short", f"sum by (BY) (NAME{CHOSEN})"),
    "bytes": ("bytes", f"sum by (BY) (NAME{CHOSEN})"),
    "most": ("s", f"max by (BY) (NAME{CHOSEN})"),
    "age": ("s", f"time() - min by (BY) (NAME{CHOSEN})"),
    "left": ("s", f"min by (BY) (NAME{CHOSEN}) - time()"),
    "time": ("s", f"histogram_quantile(0.SHARE, {BUCKETS})"),
}
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def build_panel(number: int, name: str) -> dict[str, object]:
    """Build the panel of a metric, three in a row."""
    labels, form, text = FAMILIES[name]
    unit, promql = FORMS[form]
    promql = promql.replace("BY", ",".join(labels)).replace("NAME", name)
    promql = promql.replace("OTHER", name.replace("hits", "misses"))
    targets = []
    for share in ("50", "95", "99") if form == "time" else ("",):
        legend = [f"{{{{{label}}}}}" for label in labels if label]
        legend += [f"p{share}"] if share else []
        target = {"refId": f"P{share}", "legendFormat": " ".join(legend) or name}
        targets.append({**target, "expr": promql.replace("SHARE", share)})
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": text.rstrip("."),
        "description": name,
        "datasource": DATASOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "gridPos": {"x": number % 3 * 8, "y": number // 3 * 7, "w": 8, "h": 7},
    }


def build_dashboard() -> dict[str, object]:
    """Build the dashboard."""
    query = {"query": "label_values(dotproxy_build_info,instance)", "refId": "instance"}
    choice = {"includeAll": True, "multi": True, "refresh": 2}  # when the time changes
    instances = {"datasource": DATASOURCE, "query": query, **choice}
    variables = [
        {"name": "datasource", "type": "datasource", "query": "prometheus"},
        {"name": "instance", "type": "query", **instances},
    ]
    return {
        "uid": "dotproxy",
        "title": "dotproxy",
        "schemaVersion": 41,  # of Grafana 12; it brings older ones up to date itself
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": variables},
        "panels": list(itertools.starmap(build_panel, enumerate(FAMILIES))),
    }


# ---- Logging (Elastic Common Schema 9.4) ---------------------------------------------
# What happens to the proxy, and each query, as lines of text or of JSON. Who logs never
# waits: a Writer has a thread, and a bound on what waits for it.

PRIORITIES = {10: 7, 20: 6, 30: 4, 40: 3, 50: 2}  # of levels for journald, sd-daemon(3)
CONTROLS = {code: f"\\{code:03d}" for code in (*range(32), *range(127, 160))}
# Fields of the schema for facts; other facts are labels.
FACT_FIELDS = {"error": "error.message", "client": "client.address"}
Facts = tuple[tuple[str, object], ...]
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
        text = (f"{event}: {pairs}" if pairs else event).translate(CONTROLS)
        where, error = ("dotproxy", level, "", 0), sys.exc_info() if bug else None
        record = logger.makeRecord(*where, text, (), error)
        vars(record)["told"] = event, plain, asked
        logger.handle(record)


@functools.lru_cache(maxsize=1024)  # 0.1 us against 2 us; many queries share one
def timestamp(milliseconds: int) -> str:
    """Return a wall clock's time in ISO 8601, UTC."""
    second, rest = divmod(milliseconds, 1000)
    return f"{time.strftime('%FT%T', time.gmtime(second))}.{rest:03d}Z"


def upstream_fields(upstream: Endpoint) -> dict[str, object]:
    where = {"destination.address": upstream.host, "destination.port": upstream.port}
    return {**where, "destination.domain": upstream.name} if upstream.name else where


def record_as_json(record: logging.LogRecord) -> str:
    """Return a JSON object with dotted ECS names."""
    event, facts, _ = vars(record)["told"]
    fields: dict[str, object] = {
        "@timestamp": timestamp(int(record.created * 1000)),
        "log.level": record.levelname.lower(),
        "message": record.getMessage(),
        "ecs.version": "9.4.0",
        "event.dataset": "dotproxy.log",
        "event.action": event.replace(" ", "-"),
        "process.thread.name": record.threadName,
        "service.name": "dotproxy",
        "service.version": __version__,
    }
    for key, value in facts.items():
        known = {FACT_FIELDS.get(key, f"labels.{key}"): value}
        fields |= upstream_fields(value) if isinstance(value, Endpoint) else known
    if (error := record.exc_info) and error[0]:
        fields["error.type"] = error[0].__name__
        fields["error.message"] = str(error[1])
        fields["error.stack_trace"] = logging.Formatter().formatException(error)
    return write_json(fields)


def is_journal() -> bool:
    """Tell whether stderr is the journal (systemd.exec(5))."""
    status = os.fstat(2)
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def open_log(path: str) -> int:
    """Open a file to append to; raises ConfigError, also for a pipe nobody reads."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK
    try:
        return os.open(path, flags, 0o640)
    except OSError as error:
        text = f"cannot open {path}: {error.strerror}; mend --query-log"
        raise ConfigError(text) from error


def is_ready(peer: socket.socket | int, event: int, seconds: float = 0.0) -> bool:
    """Wait at most so long for an event; tell whether it, or an error, is there."""
    poller = select.poll()  # select itself takes no descriptor above 1023
    poller.register(peer, event)
    return bool(poller.poll(seconds * 1000))


class Writer:
    """Appends lines to a file in a thread of its own, and tells how many it lost."""

    LIMIT = 8 << 20  # octets that may wait or are being written
    GATHER = 0.05  # s in which lines gather: to wake the thread costs more than a line
    REPORT = 60.0  # s between reports of lost lines, at least
    PATIENCE = 2.0  # s to wait for a file that takes nothing, each time and at the end

    def __init__(self, name: str, path: str = "-", descriptor: int = 2) -> None:
        """Open a file, or with `-` write to what is open; raises ConfigError."""
        self._path = path
        self._descriptor = descriptor if path == "-" else open_log(path)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._changed = threading.Condition()  # guards all below
        self._lines: list[str] = []  # those that are being written come first
        self._octets = 0  # that they have
        self._lost = collections.Counter[str]()  # lines, by why they were; till told
        self._ended = False

    def start(self) -> None:
        """Start to write, first what was put before."""
        self._thread.start()

    def put(self, lines: Sequence[str]) -> None:
        """Have lines written, or count them as lost; any thread, never blocks."""
        octets = sum(map(len, lines))
        with self._changed:
            if self._octets + octets > self.LIMIT:
                self._lost["too many at once"] += len(lines)
                return
            if not self._lines:
                self._changed.notify()
            self._lines += lines
            self._octets += octets

    def reopen(self) -> None:
        """Open the file anew, as it was renamed."""
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
            self._ended = True
            self._changed.notify()
        if self._thread.ident is None:
            self._thread.start()
        self._thread.join(self.PATIENCE)
        if self._thread.is_alive():
            self._lost["the file takes nothing"] = len(self._lines)
            self._tell_lost()
        elif self._path != "-":
            os.close(self._descriptor)

    def _run(self) -> None:
        ended, tell_at = False, 0.0
        while not ended:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._ended)
                ended = self._changed.wait_for(lambda: self._ended, self.GATHER)
            self._write_all()
            if self._lost and (ended or elapsed() >= tell_at):
                tell_at = elapsed() + self.REPORT
                self._tell_lost()
        self._write_all()  # what that told

    def _write_all(self) -> None:
        with self._changed:
            lines = self._lines.copy()
        octets = memoryview("".join(lines).encode("utf-8", "backslashreplace"))
        try:
            while octets:
                # Else `write` may wait or fail: stderr is as it was given.
                is_ready(self._descriptor, select.POLLOUT, self.PATIENCE)
                with contextlib.suppress(BlockingIOError):
                    octets = octets[os.write(self._descriptor, octets) :]
        except OSError as error:
            with self._changed:
                self._lost[str(error.strerror)] += bytes(octets).count(b"\n")
        with self._changed:
            del self._lines[: len(lines)]
            self._octets -= sum(map(len, lines))

    def _tell_lost(self) -> None:
        with self._changed:
            lost, self._lost = self._lost, collections.Counter()
        for reason, number in lost.items():
            event = f"{self._thread.name} lines lost"
            note(logging.WARNING, event, number=number, error=reason)


class LogHandler(logging.Handler):
    """Has log records written; the same one, with its facts, five times a minute.

    How often one came more is told with the next after that minute, or at the end.
    """

    SAME, WINDOW = 5, 60.0  # s
    MESSAGES = 256  # that are counted at once

    def __init__(self, style: str, writer: Writer) -> None:
        super().__init__()
        self.writer = writer
        self._is_json, self._journal = style == "json", is_journal()
        stamp = "" if self._journal else "%(asctime)s %(levelname)s "
        self.setFormatter(logging.Formatter(f"{stamp}%(message)s", "%FT%T%z"))
        # What came until then; guarded by the handler's own lock.
        self._seen = collections.Counter[tuple[int, str, Facts]]()
        self._until = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        """Have a record written or counted; any thread, never blocks."""
        event, facts, asked = vars(record)["told"]
        said = record.levelno, event, tuple(facts.items())
        if not asked:
            if elapsed() >= self._until or len(self._seen) >= self.MESSAGES:
                self._tell_repeated()
            self._seen[said] += 1
        if self._seen[said] <= self.SAME:
            line = record_as_json(record) if self._is_json else self.format(record)
            start = f"<{PRIORITIES[record.levelno]}>" if self._journal else ""
            self.writer.put([re.sub("(?m)^", start, line) + "\n"])

    def close(self) -> None:
        self._tell_repeated()
        self.writer.close()
        logging.getLogger().removeHandler(self)
        super().close()

    def _tell_repeated(self) -> None:
        """Tell what came more often than that, and count anew."""
        seen, self._seen = self._seen, collections.Counter()
        self._until = elapsed() + self.WINDOW
        for (level, event, facts), times in list(seen.items()):
            if times > self.SAME:
                more = {**dict(facts), "repeated": times - self.SAME}
                note(level, event, asked=True, bug=False, **more)


@contextlib.contextmanager
def logging_to_stderr(level: str, style: str) -> Iterator[LogHandler]:
    """Write the log to stderr, once its writer is started, and the rest at the end."""
    log = LogHandler(style, Writer("log"))
    logging.basicConfig(handlers=[log], level=level.upper())
    failed = functools.partial(note, logging.ERROR, "internal error", bug=True)
    threading.excepthook = lambda end: failed(thread=getattr(end.thread, "name", "?"))
    with contextlib.closing(log):
        yield log


PRIVACY = ("none", "prefix", "hash", "no-names")
FLAG_NAMES = {AA: "AA", TC: "TC", RD: "RD", RA: "RA", AD: "AD", CD: "CD"}
ADDRESS_FAMILIES = {(TYPE_A, 4): socket.AF_INET, (TYPE_AAAA, 16): socket.AF_INET6}
# Octets that are not as they are in a label, RFC 1035 section 5.1.
OCTET_TEXTS = {c: f"\\{c:03d}" for c in range(256) if not 33 <= c < 127}
OCTET_TEXTS.update({ord(char): f"\\{char}" for char in '."\\'})
END_OF_LINE = (
    '"ecs.version":"9.4.0","event.kind":"event","event.category":["network"],'
    '"event.type":["protocol"],"event.action":"dns-query",'
    '"event.dataset":"dotproxy.query","network.protocol":"dns","dns.type":"answer",'
    '"service.name":"dotproxy"}\n'
)


def resolved_text(answer: bytes, offset: int) -> str:
    """Return a JSON member of the addresses behind the question, which ends there."""
    found = []
    for _ in range(answer[6] << 8 | answer[7]):
        offset = skip_name(answer, offset)
        rrtype, _, _, length = RECORD.unpack_from(answer, offset)
        offset += 10 + length
        if family := ADDRESS_FAMILIES.get((rrtype, length)):
            found.append(socket.inet_ntop(family, answer[offset - length : offset]))
    known = '","'.join(found)
    return f',"dns.resolved_ip":["{known}"]' if found else ""


class QueryLog:
    """Has a line written for each query that was answered; who answers makes it."""

    def __init__(self, config: Config, writer: Writer) -> None:
        self._writer = writer
        self._privacy = config.query_log_privacy
        self._hides_names = self._privacy == "no-names"
        self._key = os.urandom(16)  # of hashes, which differ with every start
        self._is_json = config.log_format == "json"
        self._prefix = "<6>" if config.query_log == "-" and is_journal() else ""
        # Parts that recur: json.dumps of a whole line takes 15 us, and all of it so 4.
        self._client = functools.lru_cache(4096)(self._make_client)
        self._question = functools.lru_cache(4096)(self._make_question)
        self._rest = functools.lru_cache(4096)(self._make_rest)

    def put(
        self, tally: list[Label], items: list[Logged], upstream: Endpoint | None = None
    ) -> None:
        """Have a line of each written; any thread, never blocks."""
        offset, lines = time.time() - elapsed(), []
        for (source, form, rcode), item in zip(tally, items):
            size, answer, client, at, took = item
            sent = len(answer)
            flags, ident = answer[2] << 8 | answer[3], answer[0] << 8 | answer[1]
            end = end_of_question(answer) if answer[5] else MIN_MESSAGE  # not parsed
            when, who = timestamp(int((at + offset) * 1000)), self._client(client[0])
            port = client[1] if self._privacy == "none" else ""
            how, outcome, origin = self._rest(flags, rcode, source, form, upstream)
            asked = self._question(answer[MIN_MESSAGE:end])
            if self._is_json:
                found = "" if self._hides_names else resolved_text(answer, end)
                lines.append(
                    f'{self._prefix}{{"@timestamp":"{when}",{who}{port},"dns.id":'
                    f'"{ident}",{asked}{how},"client.bytes":{size},{outcome}{found},'
                    f'"server.bytes":{sent},"event.duration":{int(took * 1e9)},{origin}'
                )
            else:
                lines.append(
                    f'{self._prefix or when + " "}{who}{port} - {ident} "{asked} {how} '
                    f"{size} {outcome} {sent} {took:.6f}s {origin}\n"
                )
        self._writer.put(lines)

    def _make_client(self, address: str) -> str:
        """Make what the log says of a client, but for its port."""
        ip = parse_client(address.partition("%")[0])
        field, text = "ip", str(ip)
        if self._privacy == "hash":
            known = hashlib.blake2b(ip.packed, digest_size=8, key=self._key)
            field, text = "address", known.hexdigest()
        elif self._privacy != "none":
            network = ip, 56 if ip.version == 6 else 24
            text = str(ipaddress.ip_network(network, strict=False))
        shown, port = text.partition("/")[0], ""
        if self._privacy == "none":
            text, port = write_address(text, 0)[:-1], ',"client.port":'
        fields = f'"network.type":"ipv{ip.version}","client.{field}":"{shown}"{port}'
        return fields if self._is_json else text

    def _make_question(self, question: bytes) -> str:
        """Make what the log says of a question, with numbers as in RFC 3597."""
        if not question:
            return "" if self._is_json else "- - -"
        labels, offset = [], 0
        while length := question[offset]:
            label, offset = question[offset + 1 :][:length], offset + 1 + length
            labels.append(label.decode("latin-1").translate(OCTET_TEXTS))
        rrtype, rrclass = PAIR.unpack(question[offset + 1 :])
        kind = TYPE_NAMES.get(rrtype, f"TYPE{rrtype}")
        group = "IN" if rrclass == CLASS_IN else f"CLASS{rrclass}"
        name = "-" if self._hides_names else ".".join(labels) or "."
        if not self._is_json:
            return f"{kind} {group} {name}" + "." * (name not in ("-", "."))
        types = f'"dns.question.type":"{kind}","dns.question.class":"{group}",'
        return f'"dns.question.name":{write_json(name)},{types}'

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
        where = write_json(upstream_fields(upstream))[1:-1] + "," if upstream else ""
        return (
            f'"dns.op_code":"{f"OPCODE{opcode}" if opcode else "QUERY"}",'
            f'"network.transport":"{over}","labels.proto":"{proto}"',
            f'"dns.header_flags":{write_json(names)},"dns.response_code":"{result}",'
            f'"event.outcome":"{done}"',
            f'"labels.source":"{source}",{where}{END_OF_LINE}',
        )


# ---- Cache (RFC 2308, RFC 8767, RFC 9520) --------------------------------------------
# Responses by question, bounded by octets. An entry is live, then stale, then gone; it
# never changes but for how it is used. An answer that went out is kept ready beside it,
# as most datagrams repeat. It knows nothing of clients or upstreams.

ALIASES = frozenset((b"\0\5", b"\0\x27", b"\0\x2e"))  # CNAME, DNAME, RRSIG of these
ALIAS_OCTETS = b"".join(ALIASES)  # of their types


def leads_nowhere(response: Response, rrtype: bytes) -> bool:
    """Tell whether the answer is a chain of aliases without what was asked for."""
    places = response.ttl_offsets[: response.counts[0]]
    types = {response.body[place - 4 : place - 2] for place in places}
    return types <= ALIASES and rrtype not in types


class CacheEntry:
    """A stored response, and how it is used."""

    STALE_TTL = 30  # s, RFC 8767 section 4

    __slots__ = "ask_at", "expires", "hits", "message", "ready", "stale", "stored_at"
    # Without `__init__` one is made in 0.1 us less.
    message: bytes  # half the memory of a Response
    stored_at: float
    expires: float  # from then on it is stale
    ask_at: float  # when to ask again
    stale: float  # seconds that it may be served once it has expired
    hits: int  # since it was last spared
    ready: tuple[bytes, ...]  # datagrams that a Ready is kept for

    def answer(self, query: Query, now: float) -> bytes:
        """Build an answer: TTLs have counted down; a stale one says that it is."""
        response = parse_response(self.message, 12 + len(query.question))
        records = response.body, response.ttl_offsets
        if now < self.expires:
            body = with_ttls(*records, 0, MAX_TTL, int(now - self.stored_at))
            return build_answer(query, response, body)
        body = with_ttls(*records, self.STALE_TTL, self.STALE_TTL)
        info = ExtendedError.STALE_ANSWER
        if response.rcode == NXDOMAIN:
            info = ExtendedError.STALE_NXDOMAIN_ANSWER
        options = response.options + build_option(info, "no upstream answers")
        return build_answer(query, response, body, options)


# The same object for equal labels, or places of TTLs: those are used often.
shared = functools.lru_cache(4096)(lambda each: each)


class Ready:
    """An answer without its ID, for a datagram without its ID.

    A hit needs no other object: with 200,000 names none of them is in the processor's
    cache, so that each takes 0.1 us and more.
    """

    __slots__ = "answer", "entry", "label", "places", "settled_until", "until"

    def __init__(
        self, query: Query, answer: bytes, entry: CacheEntry, now: float
    ) -> None:
        age, end = int(now - entry.stored_at), 12 + len(query.question)
        found = parse_response(answer, end)
        self.answer = answer[2:]
        self.entry = entry
        label = CACHE, query.form, answer[3] & RCODE_MASK
        self.label: Label = shared(label)  # what is counted of it
        self.places = shared(tuple(end - 2 + each for each in found.ttl_offsets))
        self.settled_until = min(entry.ask_at, entry.expires)
        self.until = min(entry.stored_at + age + 1, self.settled_until)


class Cache:
    """Responses by cache key; the oldest go first but for those used since.

    Any thread may call any method; none blocks.
    """

    OVERHEAD = 400  # octets of an entry beside its key and message, as measured
    READY_OVERHEAD = 310  # octets of a Ready beside its datagram and answer, likewise
    MAX_READY = 8  # of an entry; then they begin anew
    POPULAR = 2  # hits from which an entry is refreshed before its end
    SPARED = 1000  # entries at most that are spared at a time; takes 0.3 ms
    NEGATIVE_MAX = 3600  # s that NXDOMAIN and NODATA live, RFC 2308 section 5
    STALE_RETRY = 30.0  # s after a failed refresh until the next, RFC 8767 section 5
    STALE_AFTER = 1.8  # s that a client waits for a fresh answer, RFC 8767 section 5

    def __init__(self, config: Config) -> None:
        self._config = config
        self._bounds = config.cache_min_ttl, config.cache_max_ttl, config.cache_stale
        # Guards all below; only single operations of a dict are done without it.
        self._lock = threading.Lock()
        self._entries = collections.OrderedDict[bytes, CacheEntry]()  # oldest first
        self.hot: dict[Transport, dict[bytes, Ready]] = {("udp", v): {} for v in "12"}
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
        with self._lock:
            latest = itertools.islice(reversed(self._entries.values()), 10_000)
            found = [each for each in latest if now < each.expires + each.stale]
        return any(e.message[3] & RCODE_MASK not in FAILURE_RCODES for e in found)

    def get(self, key: bytes, now: float) -> CacheEntry | None:
        """Return the entry for this key, live or stale."""
        entry = self._entries.get(key)
        if entry is None or now >= entry.expires + entry.stale:
            return None
        entry.hits += 1
        return entry

    def put_all(self, items: Iterable[tuple[bytes, Response]], now: float) -> None:
        """Store each response that has a key and may be; bound its TTLs, in place."""
        entries, grown, overhead = self._entries, 0, self.OVERHEAD
        with self._lock:
            for key, response in items if self._config.cache_size else ():
                entry, old = self._prepare(key, response, now), entries.get(key)
                if old is not None:
                    # NOERROR and NXDOMAIN refresh it, stored or not (RFC 8767 section
                    # 4); a failure never takes the place of what can be served.
                    known = response.rcode in (NOERROR, NXDOMAIN)
                    failed = response.flags & TC or not known
                    if failed and now < old.expires + old.stale:
                        continue
                    self._forget_locked(key, entries.pop(key))
                if entry is not None:
                    entries[key] = entry
                    grown += overhead + len(key) + len(entry.message)
            self.size += grown
            self._make_room_locked()

    def keep_ready(
        self, query: Query, asked: bytes, answer: bytes, entry: CacheEntry, now: float
    ) -> None:
        """Keep an answer that was made now for who sends this datagram again."""
        datagram, hot = asked[2:], self.hot[query.form.transport]
        ready = Ready(query, answer, entry, now)
        with self._lock:
            current = self._entries.get(query.cache_key) is entry
            if not current or len(datagram) > MAX_KNOWN:
                return
            if datagram not in hot:
                if len(entry.ready) >= self.MAX_READY:
                    self._drop_ready_locked(entry)
                entry.ready += (datagram,)
                self.size += self.READY_OVERHEAD + len(datagram) + len(ready.answer)
            hot[datagram] = ready
            self._make_room_locked()

    def renew(self, ready: Ready, now: float) -> bool:
        """Count its TTLs down to now; False where the slow way has to be taken."""
        if now >= ready.settled_until:
            return False
        with self._lock:  # each counts on from what another has left
            if now < ready.until:
                return True
            passed = int(now - ready.until) + 1
            ready.answer = with_ttls(ready.answer, ready.places, 0, MAX_TTL, passed)
            ready.until = min(ready.until + passed, ready.settled_until)
            ready.entry.hits += 1
        return True

    def flush(self) -> None:
        with self._lock:
            self._entries.clear()
            for hot in self.hot.values():
                hot.clear()
            self.size = 0

    def _prepare(self, key: bytes, response: Response, now: float) -> CacheEntry | None:
        """Make an entry if the response may be stored; bound its TTLs, in place."""
        if not key or response.flags & TC:  # RFC 2181 section 9
            return None
        rcode, ttls, denied = response.rcode, response.ttls, response.negative_ttl
        message, failed = response.message, False
        low, high, stale = self._bounds
        shortest = longest = ttls[0] if ttls else 0
        if len(ttls) > 1:
            shortest, longest = min(ttls), max(ttls)
        life: float = shortest if longest <= MAX_TTL else 0
        if denied is not None and rcode in (NOERROR, NXDOMAIN):
            life = life if denied else 0
            high = min(high, max(low, min(denied, self.NEGATIVE_MAX)))
        elif rcode == NOERROR and response.counts[0]:
            # For most it is enough to look at the first record.
            low_octet = response.body[response.ttl_offsets[0] - 3]
            if low_octet in ALIAS_OCTETS and leads_nowhere(response, key[-5:-3]):
                life, failed = min(life, self._config.cache_fail_ttl), True
        elif rcode in FAILURE_RCODES:
            life, failed = self._config.cache_fail_ttl, True
        else:
            return None
        if not life:
            return None
        if longest > high or shortest < low:
            life = life if failed else min(max(life, low), high)
            response.body = with_ttls(response.body, response.ttl_offsets, low, high)
            message = b""
        if response.upstream_options or not message:  # padding takes 380 octets
            answers, authority, extra = response.counts
            opt = build_opt(0, response.options) if response.options else b""
            extra += opt > b""
            head = HEADER.pack(0, response.flags, 1, answers, authority, extra)
            message = head + key[:-1] + response.body + opt
        entry = CacheEntry()
        entry.message, entry.stored_at, entry.expires = message, now, now + life
        entry.ask_at = now + life * (1.0 if failed else 0.9)
        entry.stale, entry.hits, entry.ready = 0.0 if failed else stale, 0, ()
        return entry

    def _make_room_locked(self) -> None:
        """Let the oldest go; one that was used is spared, and counts as unused."""
        entries, limit, spared, gone = self._entries, self._config.cache_size, 0, 0
        while self.size > limit:
            key, entry = entries.popitem(False)
            if entry.hits and spared < min(len(entries) // 2, self.SPARED):
                entry.hits = 0
                entries[key] = entry
                spared += 1
            else:
                self._forget_locked(key, entry)
                gone += 1
        self._evictions += gone

    def _forget_locked(self, key: bytes, entry: CacheEntry) -> None:
        self.size -= self.OVERHEAD + len(key) + len(entry.message)
        if entry.ready:
            self._drop_ready_locked(entry)

    def _drop_ready_locked(self, entry: CacheEntry) -> None:
        for datagram, hot in itertools.product(entry.ready, self.hot.values()):
            if (ready := hot.pop(datagram, None)) is not None:
                self.size -= self.READY_OVERHEAD + len(datagram) + len(ready.answer)
        entry.ready = ()


# ---- Local answers (RFC 6761, RFC 6303, RFC 8482) ------------------------------------
# What is not for the upstream to say: names that mean something on this host or network
# alone, ANY over UDP, and private addresses under public names. Pure functions of a
# query or a response, without a clock or a lock.

LOCAL_TTL = 10800  # s, RFC 6303 section 3
ANY_TTL = 3600  # s, long enough not to be asked often, RFC 8482 section 4.2
FILTERED_TTL = 60  # s until a client asks again; who exempts the name waits so long
QNAME = 0xC00C  # compression pointer to the name in the question
TAIL = slice(-5, None)  # of a name: few have that of a local zone

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
    return names + struct.pack("!5I", 1, 3600, 1200, 604800, ttl)


def response_of(
    records: Records, ttl: int, rcode: int = NOERROR, zone: int = QNAME
) -> Response:
    """Make a response with these records of the name that was asked for.

    Without any it says no, with the SOA record of `zone`, a pointer (RFC 2308).
    """
    head = HEADER.pack(0, QR | RA | rcode, 1, len(records), not records, 0)
    owner = (QNAME if records else zone).to_bytes(2, "big")
    for rrtype, rdata in (records or {TYPE_SOA: soa_data(zone, ttl)}).items():
        head += owner + RECORD.pack(rrtype, CLASS_IN, ttl, len(rdata)) + rdata
    return parse_response(head, 12)


SPECIAL_NAMES = (  # RFC 6761, RFC 6762, RFC 7686, RFC 8375, RFC 9462, RFC 9665
    *("localhost", "invalid", "local", "onion"),
    *("home.arpa", "resolver.arpa", "service.arpa"),
)
# RFC 6303 section 4 and RFC 7793, and those above 1.0.0.127, as a client may conclude
# from NXDOMAIN that nothing is below (RFC 8020). Not here: names that no RFC has a
# resolver keep, such as internal, and ipv4only.arpa, the upstream's (RFC 8880).
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

    # RFC 8482 section 4.2: CPU "RFC8482", OS "".
    MINIMAL_ANY = response_of({TYPE_HINFO: b"\7RFC8482\0"}, ANY_TTL)

    def __init__(self, exempt: Iterable[bytes]) -> None:
        """Make all but those at or below domains that are exempt, in lower case."""
        leaving = frozenset(exempt)
        below = [apex for apex in LOCAL_ZONES if leaving & {*lineage(apex)}]
        self._zones = {**LOCAL_ZONES, **dict.fromkeys((*leaving, *below))}
        self._tails = {apex[TAIL] for apex in self._zones}

    def respond(self, query: Query) -> Response | None:
        """Return the answer if it is to be given here; for most, 0.1 us, it is not."""
        question, name = query.question, query.name
        if name[TAIL] not in self._tails and question[-3] != TYPE_ANY:
            return None
        rrtype, rrclass = kind = PAIR.unpack(question[-4:])
        if kind == (TYPE_ANY, CLASS_IN) and query.form.transport[0] == "udp":
            return self.MINIMAL_ANY
        apex = next(filter(self._zones.__contains__, lineage(name)), b"")
        zone = self._zones.get(apex)
        if zone is None:
            return None
        if rrclass != CLASS_IN:  # there is no such zone, nor may the name leave
            return error_response(Rcode.REFUSED)
        own, records = zone
        if apex == name:
            if rrtype == TYPE_DS:  # the parent zone's, RFC 4035 section 3.1.4.1
                return None
            soa, here = soa_data(QNAME, LOCAL_TTL), QNAME.to_bytes(2, "big")
            records = {**own, TYPE_SOA: soa, TYPE_NS: here}
        rcode = NXDOMAIN if records is None else NOERROR
        shown = {t: d for t, d in (records or {}).items() if rrtype in (t, TYPE_ANY)}
        place = QNAME + len(name) - len(apex)
        response = response_of(shown, LOCAL_TTL, rcode, place)
        response.flags |= AA
        return response


# What cannot be on the Internet: the unspecified and the site-local one (RFC 3879) too.
OTHER_NETWORKS = ipaddress.ip_network("0.0.0.0/8"), ipaddress.ip_network("fec0::/10")
# Behind these 12 octets is an IPv4 address: compatible, with :: and ::1 among them,
# mapped (RFC 4291 section 2.5.5), and translated (RFC 6052 section 2.1).
EMBEDDING = bytes(12), bytes(10) + b"\xff\xff", b"\0\x64\xff\x9b" + bytes(8)
HINT_SIZES = {4: 4, 6: 16}  # ipv4hint and ipv6hint, RFC 9460 section 7.3


@functools.lru_cache(maxsize=4096)  # 0.1 us against 11 us
def is_private(address: bytes) -> bool:
    """Tell whether an address of 4 or 16 octets is reached from this network only."""
    if address[:12] in EMBEDDING:
        address = address[12:]
    if len(address) not in (4, 16):
        return False
    return is_in(ipaddress.ip_address(address), (*LOCAL_NETWORKS, *OTHER_NETWORKS))


def hinted_addresses(rdata: bytes) -> Iterator[bytes]:
    """Yield the hints of an SVCB record (RFC 9460 section 7.3) before any fault."""
    with contextlib.suppress(IndexError, FormatError):
        for key, value in split_options(rdata[skip_name(rdata, 2) :]):
            if size := HINT_SIZES.get(key):
                for start in range(4, len(value), size):
                    yield value[start : start + size]


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

    def __init__(self, exempt: Iterable[bytes]) -> None:
        self._exempt = frozenset(exempt)  # domains in wire format and lower case

    def screen(self, query: Query, response: Response) -> Response:
        """Return an upstream's response, or NODATA where it has a private address."""
        exempt = not self._exempt.isdisjoint(lineage(query.name))
        if exempt or not any(map(is_private, answered_addresses(response))):
            return response
        blocked = response_of({}, FILTERED_TTL)
        text = "the answer has a private address; see --allow-private"
        blocked.options = build_option(ExtendedError.FILTERED, text)
        return blocked


# ---- Timer and worker threads --------------------------------------------------------
# What runs when, how many at once, and on which processor; nothing here knows of DNS.


class ProcessorBinding:
    """Keeps all threads on one processor while much is asked upstream.

    Under the GIL one runs at a time, yet each system call may wake one elsewhere, which
    costs more than the call: uncached queries take 47 us on two processors, 35 on one.
    Nor does one that wakes interrupt another (SCHED_BATCH): twice as much is read at
    once, which takes off a further twelfth.
    """

    BUSY, QUIET = 4000.0, 1000.0  # queries/s sent upstream that bind and set free

    def __init__(self) -> None:
        gil = getattr(sys, "_is_gil_enabled", lambda: True)()
        self._able = gil and hasattr(os, "SCHED_BATCH")  # on Linux
        self._processors: set[int] = set()  # those that it had before it was bound
        self._bound = False
        self._rates: dict[object, float] = {}  # by who asks

    def update(self, source: object, rate: float) -> None:
        """Bind or set free as the sum of all rates asks for; any thread may call it."""
        self._rates[source] = rate
        bind = sum(self._rates.copy().values()) > (self.BUSY, self.QUIET)[self._bound]
        if not self._able or bind == self._bound:
            return
        self._bound = bind
        chosen, policies = self._processors, (os.SCHED_BATCH, os.SCHED_OTHER)
        if bind:
            self._processors, policies = os.sched_getaffinity(0), policies[::-1]
            chosen = {random.choice(sorted(self._processors))}
        for thread in threading.enumerate():
            number = thread.native_id or 0  # 0: this one; the other just begins
            with contextlib.suppress(OSError):  # it may have ended, or may not do that
                os.sched_setaffinity(number, chosen)
                if os.sched_getscheduler(number) == policies[0]:  # no other is ours
                    os.sched_setscheduler(number, policies[1], os.sched_param(0))


class Timer(threading.Thread):
    """One thread that calls functions when they are due, to the next `TICK`."""

    TICK = 0.01  # s; what is due together wakes the thread once

    def __init__(self) -> None:
        super().__init__(name="timer", daemon=True)
        self._condition = threading.Condition()  # guards all below
        self._numbers = itertools.count()  # what is due together stays in its order
        self._due: list[tuple[int, int, Callable[[], None]]] = []  # a heap, by tick
        self._closed = False

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
        if self.ident is not None:
            self.join()

    def run(self) -> None:
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
    """At most `threads` threads that run at most `backlog` waiting tasks."""

    IDLE = 20.0  # s after which a thread without work ends

    def __init__(self, name: str, threads: int, backlog: int) -> None:
        self._name, self._limit, self._backlog = name, threads, backlog
        self._condition = threading.Condition()  # guards all below; told of a task
        self._tasks: collections.deque[Callable[[], object]] = collections.deque()
        self._threads: set[threading.Thread] = set()
        self._idle = 0
        self._closed = False

    def submit(self, task: Callable[[], object]) -> bool:
        """Have a thread run `task`; False when too many tasks wait, or none can run."""
        with self._condition:
            if self._closed or len(self._tasks) >= self._backlog:
                return False
            if len(self._tasks) >= self._idle and len(self._threads) < self._limit:
                thread = threading.Thread(None, self._run, self._name, daemon=True)
                with contextlib.suppress(RuntimeError):  # the system gives no more
                    thread.start()
                    self._threads.add(thread)
            if self._threads:
                self._tasks.append(task)
                self._condition.notify()
            return bool(self._threads)

    def samples(self) -> Iterator[Sample]:
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
                    self._threads.remove(threading.current_thread())
                    return
                task = self._tasks.popleft()
            try:
                task()
            except Exception:
                note(logging.ERROR, "internal error", bug=True, thread=self._name)


# ---- Upstream connections (RFC 7858, RFC 7766, RFC 8310) -----------------------------
# An exchange is one question in flight. A link carries many of them, pipelined, to one
# endpoint that has proved its name, or needs none. It knows nothing of other links.


def locate(octets: bytes, offset: int) -> tuple[int, int]:
    """Return where the contents of the DER element here begin and end (X.690)."""
    start, length = offset + 2, octets[offset + 1]
    if length & 0x80:  # of the length itself
        start += length & 0x7F
        length = int.from_bytes(octets[offset + 2 : start], "big")
    if octets[offset + 1] == 0x80 or start + length > len(octets):  # 0x80: as in BER
        raise ValueError("no DER")
    return start, start + length


def public_key_pin(certificate: bytes) -> str:
    """Return the SHA-256 of a DER certificate's public key, in base64 (RFC 7469).

    Of its SubjectPublicKeyInfo (RFC 5280), which may outlive it. Raises UpstreamError.
    """
    try:
        signed, _ = locate(certificate, 0)
        offset, _ = locate(certificate, signed)
        # Version (its tag is 0xA0), number, algorithm, issuer, validity, subject, key.
        for _ in range(5 + (certificate[offset] == 0xA0)):
            _, offset = locate(certificate, offset)
        key = certificate[offset : locate(certificate, offset)[1]]
    except (IndexError, ValueError):
        raise UpstreamError("certificate", "certificate cannot be read") from None
    return base64.b64encode(hashlib.sha256(key).digest()).decode()


PARTIAL_CHAIN = 0x80000  # X509_V_FLAG_PARTIAL_CHAIN; its name is new in Python 3.10
TLS_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
EXPIRY_NOTICE = 14 * 86400  # s before the end of a certificate, to warn


def names_of(tls: ssl.SSLSocket | ssl.SSLObject) -> list[str]:
    """Return the names in the certificate that a session's server has proved."""
    names = (tls.getpeercert() or {}).get("subjectAltName", ())
    return [str(pair[1]) for pair in names if isinstance(pair, tuple)]


class Trust:
    """Which servers are believed: the TLS settings towards upstreams."""

    def __init__(self, config: Config) -> None:
        """Load the CA certificates; raises ConfigError where there are none to load."""
        self.ca_file, self.tls_min = config.ca_file, config.tls_min
        self._pins = config.pin
        try:
            self.context = ssl.create_default_context(cafile=self.ca_file)
            self.context.minimum_version = TLS_VERSIONS[self.tls_min]
        except OSError as error:
            text = f"cannot read the CA file {self.ca_file}: {error.strerror}"
            raise ConfigError(f"{text}; give --ca-file PEM") from error
        except ValueError as error:
            text = f"{ssl.OPENSSL_VERSION} has no TLS {self.tls_min}; mend --tls-min"
            raise ConfigError(text) from error
        if self.ca_file is not None:  # who names a CA trusts it, however plain it is
            self.context.verify_flags &= ~ssl.VERIFY_X509_STRICT
            self.context.verify_flags |= PARTIAL_CHAIN
        self.context.set_alpn_protocols(["dot"])

    def check_pin(self, name: str, certificate: bytes) -> None:
        """Raise UpstreamError where a proved name has pins, but none of this key."""
        wanted = [pin for pinned, pin in self._pins if pinned == name.lower()]
        if wanted and (pin := public_key_pin(certificate)) not in wanted:
            text = f"certificate has another key than was pinned: if {name} has a new"
            cure = f"one, and you know it to be right, give --pin {name}={pin}"
            raise UpstreamError("certificate", f"{text} {cure}")

    def has_authorities(self) -> bool:
        """Tell whether there is any CA certificate to verify with."""
        known = self.context.cert_store_stats()["x509"]
        path = None if self.ca_file else ssl.get_default_verify_paths().capath
        return bool(known or (path and glob.glob(f"{path}/*")))


def describe_network_error(error: OSError, endpoint: Endpoint) -> UpstreamError:
    """Say what an error of the network means, and the likely cure."""
    port = f"TCP port {endpoint.port}"
    if isinstance(error, socket.gaierror):
        return UpstreamError("resolve", f"cannot look up the address: {error}")
    if isinstance(error, socket.timeout) and not error.errno:  # the kernel's has one
        text = f"no answer to the connection: is {port} blocked by a firewall?"
        return UpstreamError("timeout", text)
    if isinstance(error, ConnectionRefusedError):
        return UpstreamError("refused", f"connection refused: nothing on {port}")
    if isinstance(error, (ConnectionResetError, BrokenPipeError)):
        return UpstreamError("reset", "connection reset")
    if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL):
        text = f"no route to {endpoint.host}: is there a network?"
        return UpstreamError("unreachable", text)
    return UpstreamError("network", f"{error.strerror or error}")


# What is wrong with a certificate, by OpenSSL's number (x509_vfy.h), and what to do.
ISSUER = "from an unknown CA: give that CA with --ca-file if it is yours"
OTHER = "for another name, not for {1}: give --upstream HOST#NAME; --doctor tells which"
VERIFY_HINTS = {
    9: "not valid yet: check the clock of this host (it says {0} UTC)",
    10: "expired: renew it there, or check the clock of this host (it says {0} UTC)",
    18: "self-signed: give it with --ca-file if it is yours",
    **dict.fromkeys((19, 20, 21), ISSUER),
    **dict.fromkeys((62, 64), OTHER),
}
# What the alerts of a server (RFC 8446 section 6.2) mean, and what to do about it.
NO_DOT = "check in --upstream that this port is for DNS over TLS"
ELSE = "give another --upstream"
OLD = f"the server does not speak TLS {{}} or newer: {ELSE}"
ALERTS = (
    ("unrecognized name", "check the name behind # in --upstream"),
    ("access denied", f"have its operator allow this host, or {ELSE}"),
    ("protocol version|unsupported protocol", OLD),
    ("handshake|security", f"it takes other ciphers, or wants a certificate: {ELSE}"),
    ("certificate|unknown ca", f"it wants to see a certificate of this host: {ELSE}"),
    ("internal|decode|decrypt|illegal|unexpected", f"it is broken: {ELSE}"),
)


def explain_alert(error: ssl.SSLError, tls_min: str = "1.2") -> str:
    """Return what TLS says of an error, and what to do about it."""
    # From its text: Python gives no `reason` for alerts that it does not know, as 120.
    text = str(error.strerror or error).lower()
    text = re.sub(r"\[.*?\] |(ssl/tls|sslv3|tlsv13?) (alert )?| \(_ssl.*", "", text)
    cure = next((cure for words, cure in ALERTS if re.search(words, text)), NO_DOT)
    return f"{text or 'protocol error'}: {cure.format(tls_min)}"


def describe_tls_error(
    error: ssl.SSLError, endpoint: Endpoint, trust: Trust
) -> UpstreamError:
    """Say why a TLS handshake failed, and the likely cure."""
    if isinstance(error, ssl.SSLCertVerificationError):
        hint = VERIFY_HINTS.get(error.verify_code, "not accepted")
        now = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
        text = f"is {hint.format(now, endpoint.name)} [{error.verify_message}]"
        if not trust.has_authorities():
            text = "cannot be verified: install ca-certificates, or give --ca-file PEM"
        return UpstreamError("certificate", f"certificate {text}")
    text = f"TLS handshake failed: {explain_alert(error, trust.tls_min)}"
    if isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
        text = f"closed during the TLS handshake: {NO_DOT}"
    return UpstreamError("tls", text)


Reply = Callable[[bytes, ClientAddress], None]
Waiter = tuple[Query, Reply]
Answered = tuple[Query, bytes, int]  # a query, its answer and the RCODE of that
Origin = tuple[str, "Endpoint | None"]  # of answers: one of SOURCES, and the upstream


class Exchange:
    """One question in flight. All of it belongs to its group's lock."""

    SUSPECT = 3  # losses after which it uses a lane; a link that it had alone counts 3
    __slots__ = (
        *("copies", "deadline", "done", "due", "edns", "failure", "lane", "last"),
        *("live", "losses", "misread_by", "parked", "query", "refused_by", "sent_at"),
        *("stale", "started", "waiters", "wire"),
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
        self.done = False  # nobody waits for it any more; who has no lock may look
        self.parked = False  # it waits for a link to open
        self.copies = 0  # times it was sent
        self.live = 0  # copies that may still be answered
        self.losses = 0  # links that died with it
        self.lane = 0  # or the number of the links that it may use: others suffered
        self.last: Link | None = None  # that was used last; a copy takes another
        self.refused_by: tuple[Upstream, ...] = ()  # who answered SERVFAIL or the like
        self.misread_by: Upstream | None = None  # who is to get less EDNS with it
        self.failure: Response | None = None  # the best that another may better

    @property
    def suspect(self) -> bool:
        """Tell whether it may be what links die of: it then uses a lane."""
        return self.losses >= self.SUSPECT

    def use_edns(self, edns: int) -> None:
        """Have it sent with so much of EDNS from now on."""
        self.edns = edns
        self.wire = build_upstream_query(self.query, edns)


# What a link got for it, in so many s. A NamedTuple would cost 0.4 us more.
Answer = tuple[Exchange, Response, float]


class TLSFacts(NamedTuple):
    """What a handshake agreed on."""

    version: str = "none"
    resumed: bool = False
    expires: float = 0.0  # when the certificate does, in s since 1970; 0: not known
    certificate: bytes = b""  # of the server in DER, also where it was resumed


class Channel:
    """One end of a TLS session, on memory buffers. Without a context octets pass as is.

    Any thread may call any method: an OpenSSL object may not be used by two at once
    (openssl #18209), and CPython does not see to it, but the lock does.
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
        self._incoming, self._outgoing = ends = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls: ssl.SSLObject | None = None
        if context is not None:
            self._tls = context.wrap_bio(*ends, name is None, name, session)

    def shake_hands(
        self, raw: socket.socket, deadline: float, turn: threading.Lock | None = None
    ) -> None:
        """Shake hands over a socket, with `turn` held while it computes.

        Raises UpstreamError or OSError; after ssl.SSLError `farewell` has the alert.
        """
        octets, done = b"", False
        try:
            while not done:
                with turn or contextlib.nullcontext(), self._lock:
                    assert self._tls is not None
                    self._incoming.write(octets)
                    with contextlib.suppress(ssl.SSLWantReadError):
                        self._tls.do_handshake()
                        done = True
                    octets = self._outgoing.read()
                left = deadline - elapsed()
                if left <= 0:
                    raise socket.timeout
                raw.settimeout(left)
                raw.sendall(octets)
                octets = b"" if done else raw.recv(self.RECORD)
                if not done and not octets:
                    raise ssl.SSLEOFError("closed during the TLS handshake")
        except socket.timeout:
            raise UpstreamError("timeout", "no end of the TLS handshake") from None

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
            version, resumed = str(self._tls.version()), bool(self._tls.session_reused)
            certificate = self._tls.getpeercert(binary_form=True) or b""
            try:
                fields = self._tls.getpeercert() or {}
            except ValueError:
                why = "the certificate has a name that is no text"
                raise UpstreamError("certificate", why) from None
        expires = ssl.cert_time_to_seconds(str(fields["notAfter"]))
        return TLSFacts(version, resumed, expires, certificate)


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
    CROWDED = MAX_PENDING // 2  # from which on it does as soon as nobody waits for it
    STRAYS = 256  # messages in a row that answer nothing: a burst has fewer duplicates
    READ_SIZE = 65536
    IDLE_MARGIN = 0.8  # of an idle life is used: clocks are coarse and packets travel
    IDLE_MIN = 0.25  # s; below it a connection per query would do as well

    def __init__(self, group: UpstreamGroup, home: Upstream, lane: int) -> None:
        self.home, self.lane, self._group = home, lane, group
        # Held by whoever writes to the socket, closes it or puts another in its place;
        # guards the next two.
        self._sending = threading.Lock()
        self._socket: socket.socket | None = None
        self._unsent = b""
        self._retry_at = 0.0  # when the timer is to write the rest; twice is no harm
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
        # The oldest that is unanswered: where answers keep their order all wait for it.
        self.head: tuple[Exchange, float] | None = None
        self._before: dict[int, tuple[Exchange, float]] = {}  # its thread's: see _match
        self._frames: list[bytes] = []  # that `flush` is to send
        self._draw = draw_ids().__next__

    def want(self, now: float) -> None:
        """Note that it is to be opened; `start` does that, without the lock."""
        self.running, self.retired, self.end_reason = True, False, ""
        self.begun_at, self.opened_at, self.answered_at = now, -math.inf, -math.inf
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

    # Up to `heard`: under the group's lock.

    def fit(self, now: float) -> bool:
        """Tell whether it may carry more queries."""
        if not self.open or self.retired:
            return False
        if self.waiting_since is None:
            usable_for = max(self.IDLE_MIN, self.home.idle_life * self.IDLE_MARGIN)
            return now - self.active_at < usable_for
        return len(self.pending) < self.MAX_PENDING

    def silent(self, now: float) -> bool:
        since = self.waiting_since
        return since is not None and now - since > self.home.overdue_after

    def led_by(self, exchange: Exchange | None) -> bool:
        """Tell whether it is this one that all others wait for."""
        return self.head is not None and self.head[0] is exchange

    def answered(self) -> bool:
        return self.answered_at > self.begun_at

    def idle(self) -> bool:
        """Tell whether nobody waits for what is pending."""
        return all(exchange.done for exchange, _ in self.pending.copy().values())

    def forget(self, now: float) -> int:
        """Give up old IDs that nobody waits for; tell how many somebody waits for."""
        kept, awaited = self.FORGOTTEN if len(self.pending) < self.CROWDED else 0.0, 0
        for ident, (exchange, sent_at) in self.pending.copy().items():
            awaited += not exchange.done
            if exchange.done and now - sent_at >= kept:
                self.pending.pop(ident, None)
        return awaited

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

    def heard(self, now: float, answered: int) -> None:
        """Note that octets came, with so many answers; its own thread."""
        pending = self.pending
        if answered or pending:  # a ticket, or close_notify, ends no idleness
            self.active_at = now
        self.waiting_since = now if pending else None
        ident, head = next(iter(pending.items()), (0, None))
        if answered:
            self.answered_at = now
            passed = ident in itertools.islice(self._before, answered)
            if head is not None and (passed or head == self.head):
                # An answer that overtakes an older query proves that none waits for
                # another. That one is not waited for again: it may never be answered.
                if not head[0].done:
                    self.home.in_order, self.home.overtook_at = False, now
                del pending[ident]
                pending[ident] = head
                head = next(iter(pending.values()))
        self.head = head

    def flush(self) -> None:
        """Write all that has gathered as one TLS write; any thread, never waits.

        Whoever finds another at it leaves his frames to that one: he has queued them
        before he looked, and the writer looks again after it has let go. 47-53 k
        queries/s against 23-31 k where each query is a write of its own.
        """
        while (self._frames or self._unsent) and self._sending.acquire(blocking=False):
            try:
                with self._group.lock:
                    frames, self._frames = self._frames, []
                    raw = self._socket if self.open else None
                if raw is not None:
                    self._unsent += self.channel.encrypt(b"".join(frames))
                    sent = raw.send(self._unsent, socket.MSG_DONTWAIT)
                    self._unsent = self._unsent[sent:]
            except (OSError, ValueError):  # no room, or whoever reads finds it too
                pass
            finally:
                self._sending.release()
            if self._unsent:
                if elapsed() >= self._retry_at:
                    self._retry_at = elapsed() + Timer.TICK
                    self._group.timer.at(self._retry_at, self.flush)
                return

    def close(self, begun_at: float) -> None:
        """Wake the thread, begun then, which ends it; never waits for the network."""
        with self._sending, contextlib.suppress(OSError):
            # Of an open one the reading side alone: close_notify is to follow.
            way = socket.SHUT_RD if self.open else socket.SHUT_RDWR
            if self._socket is not None and self.begun_at == begun_at:
                self._socket.shutdown(way)

    def _run(self) -> None:
        endpoint = self.home.endpoint
        try:
            self._read(self._open())
        except UpstreamError as failure:
            error = failure
        except ssl.SSLError as failure:
            error = describe_tls_error(failure, endpoint, self._group.trust)
        except OSError as failure:
            error = describe_network_error(failure, endpoint)
        except Exception:
            note(logging.ERROR, "internal error", bug=True, thread="upstream")
            error = UpstreamError("internal", "internal error: see the log")
        self._part()
        self._group.link_ended(self, error)

    def _part(self) -> None:
        """Say farewell, and close the socket."""
        with self._sending, contextlib.suppress(OSError):
            raw, self._socket, self._unsent = self._socket, None, b""
            if raw is not None:
                with raw:
                    raw.setblocking(False)  # its time-out counts beside MSG_DONTWAIT
                    raw.send(self.channel.farewell())

    def _open(self) -> socket.socket:
        """Connect, shake hands, and have the group know; raises OSError as well."""
        home, trust = self.home, self._group.trust
        name, patience = home.endpoint.name, home.patience()
        raw = self._connect(elapsed() + patience)
        if name:
            # It comes back after the handshake: a session that is refused is not
            # offered again, nor is any whose certificate has ended.
            session, home.session = home.session, None
            if time.time() >= home.certificate_expires:
                session = None
            self.channel = Channel(trust.context, name, session)
            self.channel.shake_hands(raw, elapsed() + patience)
            home.session = home.session or session
        raw.settimeout(None)
        facts = self.channel.facts()
        trust.check_pin(name, facts.certificate)
        self._group.link_opened(self, facts)
        return raw

    def _connect(self, deadline: float) -> socket.socket:
        """Connect to an address of the host; the one that worked last comes first."""
        home = self.home
        host, port, _ = home.endpoint
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        found.sort(key=lambda entry: entry[4] != home.address)
        failure = OSError()
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
                if not self.end_reason:  # what `close` ends looks like a connection
                    home.address, home.round_trip = address, elapsed() - begun
                    return raw
            except OSError as error:
                failure = error
        raise failure

    def _read(self, raw: socket.socket) -> NoReturn:
        """Read and hand on answers until the link ends; raises OSError as well."""
        rest, strays = b"", 0
        buffer = memoryview(bytearray(self.READ_SIZE))
        while True:
            size = raw.recv_into(buffer)
            if not size:
                raise UpstreamError("closed", "closed by the server")
            now = elapsed()
            plaintext, failure, due = self.channel.decrypt(buffer[:size])
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
        self._before = self.pending.copy() if self.home.in_order else {}
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
    *(("requests",), ("replays",), ("hedges",), ("conn_cache_misses",)),
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
    HELD = 3  # queries held up on one link, from which on it may be in order
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
    IDLE_LIFE = 10.0  # s; what the large public resolvers were measured to keep
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
        self.failed_at: float | None = None
        self.error = UpstreamError("closed", "not connected yet")
        self.reported: set[str] = set()  # causes that the log knows of
        self.heard_at = -math.inf  # when it answered last
        self.doubted_until = -math.inf
        self.idle_life = self.IDLE_LIFE  # s that it keeps idle connections, or as told
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
        if ordered and not lane:
            held = [link for link in self.links if link.led_by(exchange)]
            if len(held) > self.SHARED - 2 or any(link.answered() for link in held):
                return None  # else that link may be mute, not held up
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
        free = next((link for link in links if not link.running), None)
        if free is None or (now < self.retry_at(urgent) and not together):
            return hope
        mute = not free.answered() and free.begun_at > now - self.RETRY_MIN
        if mute and any(link.open for link in self.links):
            return hope  # it may take no more connections than it has
        free.want(now)
        plan.todo[free.start] = None
        return True

    def retry_at(self, urgent: bool) -> float:
        """Return when the next attempt to connect may begin."""
        if self.failing_since is None or self.failures < 2:
            return -math.inf
        begun_at = max(link.begun_at for link in self.links)
        outage = begun_at - self.failing_since
        share = 0.0 if urgent else outage * self.RETRY_SHARE
        wait = min(max(self.RETRY_MIN, share), self.RETRY_MAX)
        if self.reached and outage < self.GRACE:
            wait = min(wait, self.RETRY_GRACE * 2 ** min(self.failures - 2, 8))
        return begun_at + wait

    def patience(self) -> float:
        """Return how long the next link may take to connect, and to shake hands."""
        if self.failures or self.heard_at == -math.inf:
            return self.PATIENT
        return min(max(self.QUICK, self.LONG_LINE * (self.latency or 0)), self.PATIENT)

    def note_opened(self, link: Link, facts: TLSFacts, now: float) -> None:
        """Note a link that opened: the TCP handshake tells the first latency."""
        link.open, link.opened_at, link.active_at = True, now, now
        self.counts["handshakes", "resumed" if facts.resumed else "full"] += 1
        self.certificate_expires = facts.expires
        self.reached = True
        if self.latency is None:
            self.latency = self.round_trip
            self.overdue_after = min(3 * self.round_trip, self.OVERDUE_MAX)

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
        self.overdue_after = min(max(overdue, self.OVERDUE_MIN), self.OVERDUE_MAX)
        self.durations.observe_all([each[2] for each in answers])
        if not self.failures:
            return False
        self.forgive()
        reported, self.reported = bool(self.reported), set()
        return reported

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
        # While it fails, one that ends at once is a failure, whoever waits for it.
        brief = self.failures and now - link.opened_at < Link.IDLE_MIN
        unused = opened and reason != "timeout" and link.idle() and not brief
        if unused or reason in ENDS:
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
        self.reached = self.reached or reason == "reset"  # as by one that stops
        self.doubted_until = max(now + self.DOUBT, self.retry_at(urgent=True))
        kind = "ended" if opened else reason
        report = self.down(now) and kind not in self.reported
        if report:
            self.reported.add(kind)
        return report

    def look(self, plan: Plan, silence: float) -> None:
        """Have links closed that are of no use, or were silent for so many seconds.

        Unlearn as well that it answers out of order. A server that leaves a query
        unanswered looks as if it overtook it. But if much is held up on one link, and
        nothing overtook of late, it may be in order.
        """
        now, shared = plan.now, self.links[: self.SHARED]
        stuck = self.in_order and all(link.open and link.silent(now) for link in shared)
        for link in filter(lambda each: each.open, self.links):
            since, quiet = link.waiting_since, now - link.active_at
            # A lane is kept for a moment: what it was opened for may be on its way, or
            # the server still at work on what nobody waits for.
            patience = Link.IDLE_MIN if since is None else self.LANE_PATIENCE
            useless = quiet > patience if link.lane else stuck or link.retired
            awaited = link.forget(now)
            if since is not None and now - since > silence:
                plan.close(link, "timeout")
            elif useless and not awaited:  # free for another that answers
                plan.close(link, "spare")
            elif since is None and not link.fit(now):
                plan.close(link, "idle")
            if awaited >= self.HELD and link.silent(now):
                self.in_order |= now - self.overtook_at > self.ORDER_MEMORY
        if self.edns_until <= now:
            self.edns = PADDED if self.endpoint.name else UNPADDED

    def facts(self) -> dict[str, object]:
        return {
            "name": str(self.endpoint),
            "state": self.state,
            "error": str(self.error),
            "since": self.failing_since,
            "failed_at": self.failed_at,
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

    Links are started, written to and closed, and clients told, after its release.
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
            self.todo[functools.partial(link.close, link.begun_at)] = None

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
    SECOND_OPINION = 2.0  # s for others to answer better than SERVFAIL or the like
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
        places = enumerate(endpoints)
        self.upstreams = [Upstream(self, each, index) for index, each in places]
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
        end = elapsed() + 3 * Upstream.PATIENT
        while any(link.running for link in links) and elapsed() < end:
            time.sleep(self.CHECK)  # another thread may be about to start one
        for link in links:
            if link.thread is not None:
                link.thread.join(max(0.0, end - elapsed()))

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

        It has them tried again: without clients nothing else ends an outage.
        """
        with Plan(self) as plan:
            if any(upstream.state in ("up", "doubtful") for upstream in self.upstreams):
                return ""
            for upstream in self.upstreams:
                upstream.connect(plan, urgent=False)
            return "; ".join(f"{u.endpoint}: {u.error}" for u in self.upstreams)

    # Called by the threads of links, and by who could not start one.

    def link_opened(self, link: Link, facts: TLSFacts) -> None:
        """Give a new link what waits for one."""
        home, tls, resumed = link.home, facts.version, facts.resumed
        name = home.endpoint
        note(logging.DEBUG, "connected", upstream=name, tls=tls, resumed=resumed)
        with Plan(self) as plan:
            if link.end_reason:
                return
            home.note_opened(link, facts, plan.now)
            parked = [e for e in self.exchanges.values() if e.parked]
            waiting = [e for e in parked if e.lane == link.lane]
            waiting = [e for e in waiting if home in self._askable(e)]
            if link.lane and home.in_order:  # each by itself, but for suspects
                waiting = [e for e in waiting if e.suspect or e is waiting[0]]
            waiting = waiting[: Link.MAX_PENDING]  # the others at the next look
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
            link.heard(now, len(answers))
            if good:
                report = home.note_answers(good, now)
            for (exchange, _, _), response in zip(good, responses):
                exchange.live -= 1
                if exchange.refused_by or exchange.edns < home.edns:
                    self._learn(home, exchange, now)
                # Its clients may have been told of a failure, and have asked again.
                current = exchanges.pop(exchange.query.key, None)
                if current is not None:
                    current.done = exchange.done = True
                    finished.append((current.waiters, response))
            self.waiting -= sum(len(waiters) for waiters, _ in finished)
        if finished:
            self.proxy.answer(finished, (UPSTREAM, home.endpoint), now)
        if bad or first:
            self._review(link, answers, bad)
        if report:
            note(logging.INFO, "upstream up", name=home.endpoint)

    def _learn(self, home: Upstream, exchange: Exchange, now: float) -> None:
        """Learn from a good answer to what was refused, elsewhere or with more EDNS."""
        if exchange.edns < home.edns and exchange.misread_by is home:
            home.edns, home.edns_until = exchange.edns, now + Upstream.EDNS_MEMORY
        for refuser in () if exchange.done else exchange.refused_by:
            if refuser is not home:
                refuser.doubted_until = now + Upstream.DOUBT

    def _review(
        self, link: Link, answers: Sequence[Answer], bad: Sequence[Answer]
    ) -> None:
        """Do what only some answers ask for: the first, and those that are none."""
        home = link.home
        options = dict(split_options(answers[0][1].upstream_options))
        told = options.get(OPTION_KEEPALIVE, b"")[4:]
        with Plan(self) as plan:
            if len(told) == 2:  # the idle timeout in 0.1 s, RFC 7828
                seconds = int.from_bytes(told, "big") / 10
                link.retired |= not seconds  # to be closed once all is answered
                home.idle_life = seconds or home.idle_life
            if link.lane and home.in_order and link.idle():
                plan.close(link, "spare")  # of use but once
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
                self._lose(plan, link, exchange, str(error), guilty * blame)
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
        if home.edns < PADDED:  # what another did not understand tells nothing of it
            for exchange in exchanges:
                own = exchange.edns if exchange.misread_by is home else home.edns
                if exchange.edns != min(own, home.edns):
                    exchange.use_edns(min(own, home.edns))
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
        exchange.parked, hope = True, exchange.live > 0
        if not hope:
            exchange.due = exchange.deadline
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
            if last and not late:
                exchange.due = exchange.sent_at + self.CERTAIN
            elif last and len(self.upstreams) > 1:
                self._again(plan, exchange)
            return
        in_order, gap = last.home.in_order and last.open, last.home.overdue_after
        since = None if last.led_by(exchange) else last.waiting_since
        behind = in_order and since is not None  # it waits for another
        if behind:
            exchange.due = (since or now) + gap
            if now < exchange.due:
                return
            exchange.due = now + (self.CERTAIN if late else gap)
            # To pass that by, over another link, adds no load where it hurts.
            free = len(last.pending) <= self.HEDGE_BURST
            if not (free or late or self._may_hedge(exchange, last, now)):
                return
        else:
            # To an upstream that answers in order a copy of what holds up a link goes
            # over a lane: on another shared link it would hold up that one as well.
            lane, exchange.lane = exchange.lane, 0
            alone = in_order and self._best(now, exchange) is None
            exchange.due = (now if late else exchange.sent_at) + self.CERTAIN
            # In a lane it waits until another link, or its upstream, is known better.
            ways = (link for link in last.home.links if link.lane == lane)
            stays = alone and lane and any(link.open for link in ways)
            if stays or not (late or self._may_hedge(exchange, last, now)):
                exchange.lane = lane
                return
            exchange.lane = int(alone)
        self._again(plan, exchange)
        if exchange.parked and late and last.fit(now) and not behind:
            self._put(plan, last, (exchange,))  # no other to be had: the same again
            exchange.parked = True
        if exchange.copies > copies and exchange.last is not None:
            exchange.last.home.counts["hedges",] += 1

    def _may_hedge(self, exchange: Exchange, last: Link, now: float) -> bool:
        """Tell whether an early copy may be sent, and count it.

        Free where one upstream has gone silent and another takes over.
        """
        if exchange.copies > self.MAX_EARLY or exchange.parked:
            return False
        if len(self.upstreams) > 1 and last.silent(now):
            best = self._best(now, exchange) or last
            if best.home is not last.home:
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
            exchange.misread_by = home
            exchange.use_edns(NO_EDNS if response.rcode == Rcode.NOTIMP else edns - 1)
        else:
            exchange.refused_by += (home,)
            if exchange.failure is None or response.rcode == Rcode.SERVFAIL:
                exchange.failure = response
            # What was asked elsewhere too may be better, but not much later.
            exchange.deadline = min(exchange.deadline, plan.now + self.SECOND_OPINION)
            if exchange.live > 0:
                return
            # A lone upstream is asked once more.
            refused_by = exchange.refused_by
            if len(refused_by) > 1 and {*refused_by} >= {*self.upstreams}:
                self._give_up(plan, exchange, "")
                return
        exchange.last = None
        self._again(plan, exchange)

    def _lose(
        self, plan: Plan, link: Link, exchange: Exchange, why: str, blame: int
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
            if {*exchange.refused_by} >= {*self.upstreams}:
                self._give_up(plan, exchange, f"{why} {exchange.copies} times")
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
        rate = self._asked / self.ROUND
        if rate > ProcessorBinding.BUSY:  # sure before `_look` comes to it
            self.proxy.binding.update(self, rate)

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
        # First who took down the fewest: one may be why all others were lost.
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

Found = Union[bytes, Query, None]  # the answer, what to resolve, or no answer is due
# Takes a message, the time and a tally; see Proxy.lookup.
Lookup = Callable[[bytes, float, "list[Label]"], Found]


def failure_response(error: UpstreamError) -> Response:
    """Make a SERVFAIL response with an Extended DNS Error that says why (RFC 8914)."""
    unreached = error.cause in ("timeout", "certificate", "tls", "overload")
    reason = "NO_REACHABLE_AUTHORITY" if unreached else "NETWORK_ERROR"
    option = build_option(ExtendedError[reason], str(error))
    return error_response(Rcode.SERVFAIL, option)


TRUNCATED = UpstreamError("garbage", "the upstream cuts its answers short, in TLS")
OVERLOADED = UpstreamError("overload", "too many queries in flight")


class Proxy:
    """Answers what can be answered at once, and has the rest asked for.

    A name at or below a routed domain goes to that domain's upstreams alone, in working
    order or not: it must never be seen by the others. The longest domain counts.
    """

    MOMENT = 0.01  # s between looks at the end whether all is answered

    def __init__(
        self, config: Config, trust: Trust, timer: Timer, metrics: Metrics
    ) -> None:
        self.metrics, self._timer = metrics, timer
        self.cache = Cache(config)
        self.binding = ProcessorBinding()
        self._max_in_flight = config.max_in_flight
        servers: dict[str, tuple[Endpoint, ...]] = {"": config.upstream}
        for domain, endpoint in config.route:
            servers[domain] = (*servers.get(domain, ()), endpoint)
        self._domains = {encode_domain(domain): domain for domain in servers}
        self._group_by_name: dict[bytes, UpstreamGroup] = {}
        self._groups: dict[tuple[Endpoint, ...], UpstreamGroup] = {}  # by servers
        for name, found in zip(self._domains, servers.values()):
            if found not in self._groups:
                self._groups[found] = UpstreamGroup(config, found, trust, timer, self)
            self._group_by_name[name] = self._groups[found]
        root, *routed = self._domains
        self._default = self._group_by_name[root]
        self._local = LocalAnswers((*config.forward_special, *routed))
        self._guard: RebindingGuard | None = None
        if config.block_private_answers:  # servers of routed domains may give any
            self._guard = RebindingGuard((*config.allow_private, *routed))

    def start(self) -> None:
        """Connect to the upstreams; returns at once."""
        for group in self._groups.values():
            group.start()

    @property
    def in_flight(self) -> int:
        """Return how many clients' queries wait for an answer."""
        return sum(group.waiting for group in self._groups.values())

    def lookup_from(self, transport: Transport) -> Lookup:
        """Return the lookup for datagrams that come so."""
        hot, renew = self.cache.hot[transport], self.cache.renew
        look_up = self.lookup

        def lookup(message: bytes, now: float, tally: list[Label]) -> Found:
            # Most queries repeat byte for byte, but for the ID.
            found = hot.get(message[2:])
            if found is not None and (now < found.until or renew(found, now)):
                tally.append(found.label)
                return message[:2] + found.answer
            return look_up(message, now, tally, transport)

        return lookup

    def lookup(
        self, message: bytes, now: float, tally: list[Label], transport: Transport
    ) -> Found:
        """Return the answer to a message, or the query that has to be resolved.

        None for what deserves no answer. Never blocks, does no I/O, never raises: the
        receiving thread may call it. What is answered is added to `tally`.
        """
        try:
            query = parse_query(message, transport)
        except FormatError:
            if not answerable(message):
                return None
            answer = build_format_error(message)
            tally.append((LOCAL, formless(transport), answer[3] & RCODE_MASK))
            return answer
        form, source = query.form, CACHE
        entry = self.cache.get(query.cache_key, now)
        if entry is None:
            response = self._local.respond(query)
            if form.refusal:
                response = error_response(form.refusal)
            if response is None:
                return query
            answer = build_answer(query, response)
            tally.append((LOCAL, form, response.rcode))
            return answer
        live, popular = now < entry.expires, entry.hits >= Cache.POPULAR
        if not live:
            # Never with RD=0, RFC 8767 section 4, nor before it was asked for in vain.
            if not form.storable or entry.ask_at <= entry.expires:
                query.stale = entry if form.storable else None
                return query
            source = STALE
        if now >= entry.ask_at and form.storable and (popular or not live):
            # Not once more until then, and with nobody waiting.
            entry.ask_at = entry.expires if live else now + Cache.STALE_RETRY
            refresh = functools.partial(self._group_of(query).refresh, query)
            self._timer.at(elapsed(), refresh)
        answer = entry.answer(query, now)
        tally.append((source, form, answer[3] & RCODE_MASK))
        if live and transport[0] == "udp":
            self.cache.keep_ready(query, message, answer, entry, now)
        return answer

    def _group_of(self, query: Query) -> UpstreamGroup:
        """Return the upstreams that this name is asked of."""
        known = self._group_by_name
        return next(known[name] for name in lineage(query.name) if name in known)

    def resolve(self, queries: Sequence[Waiter]) -> None:
        """Have each query answered through its `reply`, exactly once; never blocks."""
        cache = self.cache
        if not cache.lacks([query.cache_key for query, _ in queries]):
            # Some may have got there since the lookup missed.
            now = elapsed()
            found = [(each, cache.get(each[0].cache_key, now)) for each in queries]
            late = [([w], entry) for w, entry in found if entry and now < entry.expires]
            self.answer(late, (CACHE, None), now)
            queries = [w for w, entry in found if not entry or now >= entry.expires]
        if len(self._groups) == 1:
            self._default.ask(queries)
        else:
            shares: dict[UpstreamGroup, list[Waiter]] = {}
            for waiter in queries:
                shares.setdefault(self._group_of(waiter[0]), []).append(waiter)
            for group, share in shares.items():
                group.ask(share)
        excess = self.in_flight - self._max_in_flight
        if excess > 0:
            # A tenth of all at once, so that to look through them costs each little.
            group = max(self._groups.values(), key=lambda each: each.waiting)
            taken = group.shed(excess + self._max_in_flight // 10)
            response = failure_response(OVERLOADED)
            self.answer([(taken, response)], (LOCAL, None), elapsed())
            self.metrics.turned_away("overload", len(taken))

    # Called by the groups of upstreams, in any thread, with no lock held.

    def store(self, answers: Sequence[Answer], now: float) -> list[Response]:
        """Put answers into the cache; return them as they are to be served."""
        found = [response for _, response, _ in answers]
        keys = [e.query.key if e.query.form.storable else b"" for e, _, _ in answers]
        if guard := self._guard:
            found = [guard.screen(e.query, response) for e, response, _ in answers]
        self.cache.put_all(zip(keys, found), now)
        return found

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
                    message = found.answer(query, now)
                    rcode = message[3] & RCODE_MASK
                reply(message, query.client)
                answered.append((query, message, rcode))
        if answered:
            self.metrics.answered(answered, origin, now)

    def fail(self, failed: Sequence[Failed], now: float) -> None:
        """Answer with what there is without an answer: stale, or why there is none."""
        for exchange, waiters, failure in failed:
            source, kept = UPSTREAM, True
            if isinstance(failure, UpstreamError):
                # A time-out takes a while; others happen at once again.
                source, kept = LOCAL, failure.cause == "timeout" and exchange.copies > 0
                failure = failure_response(failure)
            if kept:
                (failure,) = self.store([(exchange, failure, 0.0)], now)
            if exchange.stale is not None:
                self.serve_stale([(waiters, exchange.stale)], now)
            else:
                self.answer([(waiters, failure)], (source, None), now)

    def serve_stale(
        self, waiting: Sequence[tuple[Sequence[Waiter], CacheEntry]], now: float
    ) -> None:
        """Answer from expired entries, which are not asked for again for a while."""
        for _, entry in waiting:
            entry.ask_at = now + Cache.STALE_RETRY
        self.answer(waiting, (STALE, None), now)

    def samples(self) -> Iterator[Sample]:
        """Return the metrics of the proxy, its cache and its upstreams, each once."""
        groups = self._groups.values()
        yield "dotproxy_queries_in_flight", (), self.in_flight
        yield "dotproxy_cache_prefetch_total", (), sum(g.refreshes for g in groups)
        yield from self.cache.samples()
        found = [each for group in groups for each in group.samples()]
        yield from {each[:2]: each for each in reversed(found)}.values()

    def facts(self) -> list[dict[str, object]]:
        """Return how each upstream does; `domain`: what is routed to it alone."""
        found = []
        for group in self._groups.values():
            names = [n for n, each in self._group_by_name.items() if each is group]
            domains = [self._domains[name] for name in names]
            domain = ", ".join(domains) if all(domains) else ""  # of all names
            found += [{**facts, "domain": domain} for facts in group.facts()]
        return found

    def trouble(self) -> str:
        """Say why queries cannot be answered now, or nothing where they can."""
        trouble = self._default.trouble()
        if not trouble or self.cache.can_serve(elapsed()):
            return ""
        return f"no upstream answers, and the cache has nothing: {trouble}"

    def flush(self) -> None:
        """Forget every cached answer."""
        note(logging.INFO, "cache flushed", entries=len(self.cache))
        self.cache.flush()

    def drain(self, seconds: float) -> bool:
        """Wait until every query is answered, at most so long; this one blocks."""
        deadline = elapsed() + seconds
        while self.in_flight and elapsed() < deadline:
            time.sleep(self.MOMENT)
        return not self.in_flight

    def close(self) -> None:
        """Close the upstream connections."""
        for group in self._groups.values():
            group.close()


# ---- Admission (RFC 5358) ------------------------------------------------------------
# Who may ask, and how often. It knows addresses and time, nothing of sockets.


def is_open(network: Network) -> bool:
    """Tell whether a network has far more of the Internet than anybody's own."""
    ends = network.network_address, network.broadcast_address
    wide = network.prefixlen < (8 if network.version == 4 else 16)
    return wide and not all(is_in(end, LOCAL_NETWORKS) for end in ends)


class RateLimiter:
    """Token buckets by prefix, in bounded memory; any thread may ask."""

    MAX_PREFIXES = 100_000  # about 20 MB; the longest unused is forgotten first

    def __init__(self, rate: float, burst: float) -> None:
        """Make buckets of `burst` tokens that get `rate` tokens a second."""
        self._interval = 1 / rate  # s per token
        self._reserve = (burst - 0.5) / rate  # s; half a token makes up for rounding
        # When each is full again, the longest unused first; guarded by the lock.
        self._lock = threading.Lock()
        self._full_at: collections.OrderedDict[bytes, float] = collections.OrderedDict()

    def take(
        self, prefix: bytes, now: float, count: int = 1, least: int = 0
    ) -> tuple[int, float]:
        """Take up to so many tokens; return how many, and from when on they count.

        The `least` are taken in advance where there are not so many.
        """
        with self._lock:
            full_at = max(self._full_at.pop(prefix, now), now)
            if len(self._full_at) >= self.MAX_PREFIXES:
                self._full_at.popitem(last=False)
            ready_at = full_at - self._reserve
            left = int((now - ready_at) // self._interval) + 1
            taken = min(count, max(left, least))
            self._full_at[prefix] = full_at + taken * self._interval
            return taken, ready_at


class Admission:
    """Tells the servers who may ask, and how often; any thread may ask it.

    Streams have buckets of their own, which no forged datagram can empty.
    """

    BURST = 2.0  # s of asking at the rate that may come at once
    REFUSALS = 10.0, 20.0  # answers/s to strangers, all together, and at once
    MAX_KNOWN = 10_000  # client addresses to remember, about 2 MB
    PREFIX = 7  # octets: /56, what an IPv6 customer has; an IPv4 address is shorter
    PROHIBITED = (build_option(ExtendedError.PROHIBITED, ""),)

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

    def verdict(self, message: bytes, host: str, now: float) -> tuple[str, bytes]:
        """Tell why a datagram is turned away, if so, and its short answer, if any."""
        prefix = self._prefix_of(host)
        if prefix is None:
            if not self._refusals.take(b"", now)[0]:
                return "acl", b""
            options = self.PROHIBITED
            return "acl", build_short_answer(message, Rcode.REFUSED, options=options)
        if not prefix:
            if len(self.free) >= self.MAX_KNOWN:
                self.free.clear()
            self.free.add(host)
        elif not self._datagrams.take(prefix, now)[0]:
            if next(self._slips) % 2:
                return "rate-limit", b""
            return "slip", build_short_answer(message, Rcode.NOERROR, flags=TC)
        return "", b""

    def pace(self, host: str, count: int, now: float) -> tuple[int, float]:
        """Tell how many of a stream's queries to serve next, and from when on."""
        prefix = self._prefix_of(host)
        return self._streams.take(prefix, now, count, 1) if prefix else (count, now)

    def _find_prefix(self, host: str) -> bytes | None:
        """Return whose rate counts: empty for nobody's, None for a stranger."""
        address, config = parse_client(host), self._config
        if not is_in(address, config.allow):
            return None
        local = not config.rate_limit_all and is_in(address, LOCAL_NETWORKS)
        return b"" if local or not config.rate_limit else address.packed[: self.PREFIX]


# ---- Servers (RFC 1035 section 4.2, RFC 7766, RFC 7858, RFC 9210) --------------------
# From sockets to the Proxy and back. They know addresses and time-outs, not names.

# Of a wildcard socket the address has one item more: the way back, for sendmsg.
Datagram = tuple[bytes, ClientAddress]

# Constants that some Python versions lack, with the kernel's number.
DARWIN = sys.platform == "darwin"
IP_PKTINFO = getattr(socket, "IP_PKTINFO", 26 if DARWIN else 8)
IPV6_RECVPKTINFO = getattr(socket, "IPV6_RECVPKTINFO", 61 if DARWIN else 49)
SO_RCVBUFFORCE = 33  # Linux: beyond net.core.rmem_max, where privileged
SHORTAGE_PAUSE = 0.25  # s until another accept


def reply_from(data: bytes) -> bytes:
    """Turn a query's packet information into its answer's: the source was asked."""
    if len(data) == 12:  # in_pktinfo: interface, local address, destination
        local = data[4:8] if any(data[4:8]) else data[8:]  # macOS fills in the latter
        return bytes(4) + local + bytes(4)
    link_local = data[0] == 0xFE and data[1] & 0xC0 == 0x80
    return data if link_local else data[:16] + bytes(4)  # by any interface


def set_v6_only(listener: socket.socket) -> None:
    """Leave the IPv4 wildcard free for another socket."""
    if listener.family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)


def accept(listener: socket.socket) -> tuple[socket.socket, Address]:
    """Accept a client; raises OSError, for want of descriptors after a pause."""
    try:
        request, address = listener.accept()
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
            note(logging.WARNING, "cannot accept", error=error.strerror)
            time.sleep(SHORTAGE_PAUSE)
        raise
    if not address:  # so macOS gives one that was reset before
        request.close()
        raise ConnectionAbortedError(errno.ECONNABORTED, "reset by the client")
    return request, address


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
        encrypted: bool = False,
    ) -> None:
        self.services, self.encrypted = services, encrypted
        self.proxy, self.admission = services.proxy, services.admission
        self.turned_at = time.monotonic()  # when its loop last came round, awake
        self._inherited = inherited
        # A link-local address with its interface, which the socket does not tell.
        found = socket.getaddrinfo(*address, flags=socket.AI_NUMERICHOST)
        self.address_family, *_, where = found[0]
        self.family = "2" if self.address_family == socket.AF_INET6 else "1"
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
        """End the loop, then serve whom the kernel has given to this socket by now."""
        datagrams = self.socket_type == socket.SOCK_DGRAM
        if datagrams and not self._inherited and not DARWIN:
            with contextlib.suppress(OSError):
                # It is given nothing more, where others have its port, and still sends.
                self.socket.connect(self.socket.getsockname())
        super().shutdown()
        # What has come to an inherited one is for who inherits it next.
        end = 0 if self._inherited else time.monotonic() + self.LAST
        while time.monotonic() < end and is_ready(self.socket, select.POLLIN):
            self.handle_request()
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
        self.lookup = self.proxy.lookup_from(("udp", self.family))
        for option in (socket.SO_RCVBUF, SO_RCVBUFFORCE):
            with contextlib.suppress(OSError):
                self.socket.setsockopt(socket.SOL_SOCKET, option, self.RECEIVE_BUFFER)
        self._receive: Callable[[int], Datagram] = self.socket.recvfrom
        host = self.socket.getsockname()[0]
        self._wildcard = ipaddress.ip_address(host).is_unspecified
        if self._wildcard:
            self._receive = self._receive_with_way
            if self.address_family == socket.AF_INET:
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
        reason, answer = self.admission.verdict(message, client[0], now)
        if reason:
            note(logging.DEBUG, "turned away", client=client[0], reason=reason)
            self.proxy.metrics.turned_away(reason)
        if answer:
            self.reply(answer, client)
        return not reason

    def _receive_with_way(self, size: int) -> Datagram:
        message, ancillary, _, address = self.socket.recvmsg(size, 128)
        way = [(level, kind, reply_from(data)) for level, kind, data in ancillary]
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
    PATIENCE = 5.0  # s that a handshake may take, or a client may take nothing
    MOMENT = 0.1  # s between looks for octets unsent while answers are awaited

    server: TCPServer

    def __init__(
        self, request: socket.socket, client_address: Address, server: TCPServer
    ) -> None:
        self.request, self.client_address, self.server = request, client_address, server
        request.setblocking(False)  # whoever sends an answer must not wait
        with contextlib.suppress(OSError):  # it may be gone already
            request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        identity = server.services.identity if server.encrypted else None
        self._channel = Channel(identity.context if identity else None)
        # When its last query was taken up. Who connects to TLS and says nothing makes
        # room before any client that is served.
        self.active_at = elapsed() - (server.idle_timeout if identity else 0)
        self.asked = False  # it has sent a query
        self._changed = threading.Condition()  # guards all below; told for `_wait`
        self.in_flight = 0  # queries
        self._most = 0  # of them, for which `_wait` waits
        self._unsent = b""
        self._ended = False  # then the socket may be closed: nobody touches it

    def handle(self) -> None:
        """Serve until the client is done, idle for too long, or gone."""
        rest = b""
        with contextlib.closing(self):
            if self.server.encrypted and not self._shake_hands():
                return
            for octets in self._receive():
                queries, rest = split_frames(rest + octets)
                self._serve(queries)
                if any(len(each) < MIN_MESSAGE for each in queries):
                    break  # that is no DNS
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

    def _shake_hands(self) -> bool:
        deadline = elapsed() + self.PATIENCE
        try:
            self._channel.shake_hands(self.request, deadline, self.server.turns)
        except (OSError, UpstreamError) as error:
            host = self.client_address[0]
            note(logging.DEBUG, "no TLS session", client=host, error=error)
            return False
        self.request.setblocking(False)
        self.active_at = elapsed()
        return True

    def _receive(self) -> Iterator[bytes]:
        """Yield octets of queries, or none, until the client has sent its last."""
        octets = b""  # some may have come with the last of the handshake
        while True:
            plaintext, failure, due = self._channel.decrypt(octets)
            if due:
                self._push()  # what TLS itself has to say; it must not pile up
            yield plaintext
            self._wait(self.MAX_IN_FLIGHT - 1)
            left = self.active_at + self.server.idle_timeout - elapsed()
            seconds = self.MOMENT if self.in_flight else left
            if failure or self._ended or seconds <= 0:
                return
            octets = b""
            if is_ready(self.request, select.POLLIN, seconds):
                with contextlib.suppress(OSError):
                    octets = self.request.recv(Channel.RECORD)
                if not octets:
                    return

    def _serve(self, queries: list[bytes]) -> None:
        """Have queries answered as the client's rate and the room for answers allow."""
        client, server = self.client_address, self.server
        reply = functools.partial(self._push, answers=1)
        while queries and not self._ended:
            self._wait(self.MAX_IN_FLIGHT - self.ROOM, self.BREATH)
            self._wait(self.MAX_IN_FLIGHT - 1)
            now, room = elapsed(), self.MAX_IN_FLIGHT - self.in_flight
            wanted = min(room, len(queries))
            count, ready_at = server.admission.pace(client[0], wanted, now)
            self._wait(-1, ready_at - now)
            self.asked, self.active_at = True, elapsed()
            batch = [(each, client) for each in queries[:count]]
            misses = server.answer(batch, self.active_at, self._respond, reply)
            if misses:
                with self._changed:
                    self.in_flight += len(misses)
                server.proxy.resolve(misses)
            queries = queries[count:]

    def _respond(self, message: bytes, client: ClientAddress) -> None:
        """Send an answer that is there at once, and wait until it is taken."""
        self._push(message)
        if self._unsent:
            self._wait(self.MAX_IN_FLIGHT)

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
            if is_ready(self.request, select.POLLOUT, self.PATIENCE):
                self._push()
            else:
                self.finish()

    def _push(
        self, message: bytes = b"", client: object = None, answers: int = 0
    ) -> None:
        """Send what the kernel takes and keep the rest; any thread, never blocks."""
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

    Were those that wait for a thread not among them, idle ones could hold all threads.
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

    def server_activate(self) -> None:
        self.transport = "dot" if self.encrypted else "tcp", self.family
        self.lookup = functools.partial(self.proxy.lookup, transport=self.transport)
        # Who computes a step of a handshake, of about 1 ms: OpenSSL does it without the
        # GIL, and all of them at once would take the processors from everybody else.
        self.turns = threading.Lock()
        super().server_activate()

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
    reason = f"no {kind.lower()} in it"
    try:
        with open(path, "rb") as file:
            if f"{kind}-----".encode() in file.read():
                return
    except OSError as error:
        reason = str(error.strerror)
    cure = f"give {option} PEM, which the user that this runs as may read"
    raise ConfigError(f"cannot use {path}: {reason}; {cure}")


class Identity:
    """What clients are shown: the certificate chain and its key, as last read."""

    # LibreSSL, which macOS's own Python has, bears no such name, but has the like.
    NO_RENEGOTIATION = getattr(ssl, "OP_NO_RENEGOTIATION", 0x20000)
    context: ssl.SSLContext

    def __init__(self, chain: str, key: str | None = None) -> None:
        """Read the two files, which may be one; raises ConfigError."""
        self._chain, self._key = chain, key or chain
        self._load()

    def reload(self) -> None:
        """Read them again, unless they are bad; no session from before is resumed."""
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
            # Hands are shaken with ourselves, to be refused where all clients would.
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
            names = ",".join(names_of(client))
            until = (client.getpeercert() or {}).get("notAfter")
            note(logging.INFO, loaded, file=self._chain, names=names, until=until)
        except ssl.SSLCertVerificationError as error:
            why = f"refused by clients: {error.verify_message}"
            note(logging.WARNING, loaded, file=self._chain, error=why)
        except (OSError, ValueError) as error:  # TLS; no such file; a name is no text
            reason = str(getattr(error, "reason", None) or "cannot be read")
            if not isinstance(error, OSError):
                reason = "a name in the certificate is no text"
            reason = reason.replace("_", " ").lower()
            text = f"cannot use {self._chain} with the key in {self._key}: {reason}"
            cure = "give the one that it was made with, with --tls-key PEM, and without"
            text += f"; {cure} a passphrase (openssl pkey removes it)"
            raise ConfigError(text) from error
        self.context = context


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
        timeout = 5.0  # s that a client may keep it waiting
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
    """Serves pages to a few clients at a time."""

    MAX_CLIENTS = request_queue_size = 16  # a probe, a scraper and some browsers
    # Others can have a name of theirs lead to loopback, but never an address.
    OWN_HOST = r"(?i)(localhost|[0-9.]+|\[[0-9a-f:.]+(%.*)?\])(:[0-9]*)?"
    allow_reuse_address = True

    def __init__(self, address: Address, pages: Pages) -> None:
        """Bind the address, which may have a zone; raises OSError."""
        self.pages = pages
        self._clients: dict[socket.socket, None] = {}  # in the order they came
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
        """Take everyone in; who came first, and may be slow for ever, makes room."""
        self._clients[request] = None
        for first in list(self._clients)[: -self.MAX_CLIENTS]:
            self._clients.pop(first, None)
            with contextlib.suppress(OSError):  # its thread finds it shut, and ends
                first.shutdown(socket.SHUT_RDWR)
        return True

    def find_page(self, path: str, host: str | None) -> Page:
        """Return a page, if the Host header, where there is one, may mean me."""
        if host is not None and not self._own_host.fullmatch(host):
            return Page("ask by an address, or as localhost\n", status=421)
        build = self.pages.get(path.partition("?")[0])
        return build() if build else Page("no such page; / lists them\n", status=404)

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        self._clients.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # which clients cause
            note(logging.ERROR, "internal error", bug=True, server="admin")

    def server_close(self) -> None:
        for request in list(self._clients):
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)
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
main, .row { display: grid; gap: var(--gap); }
.row { grid-template-columns: repeat(auto-fit, minmax(min(100%, var(--least)), 1fr)); }
.tiles { --least: 9.5rem; } .charts { --least: 20rem; } .lists { --least: 15rem; }
section {
  padding: .85rem var(--gap); background: var(--card);
  border: 1px solid var(--line); border-radius: .6rem;
}
h1 { font-size: clamp(1.25rem, 3vw, 1.6rem); line-height: 1.25; }
h2 { font-size: .95rem; }
small, th, ul, a { color: var(--quiet); font-size: .82rem; font-weight: 400; }
small, b { display: block; }
b { font-size: clamp(1.6rem, 4vw, 2rem); }
i::before { content: "●"; color: var(--good); }
i.warn::before { content: "▲"; color: var(--warn); }
i.bad::before { content: "✕"; color: var(--bad); }
ul { display: flex; justify-content: space-between; list-style: none; }
.legend { flex-wrap: wrap; justify-content: start; gap: 0 1rem; color: var(--text); }
.legend svg { width: 1.1rem; height: .6rem; margin-right: .35rem; }
.plot { display: grid; grid: 9rem auto / 3.1rem 1fr; gap: .5rem; margin-top: .75rem; }
.plot svg { width: 100%; height: 100%; overflow: visible; }
.levels { flex-direction: column; margin: -.6rem 0; line-height: 1.2rem; }
.levels, th, td { text-align: right; }
.levels ~ ul { grid-column: 2; }
path { vector-effect: non-scaling-stroke; stroke-width: 2; fill: none; }
.line { stroke: currentColor; stroke-linecap: round; stroke-linejoin: round; }
.grid { stroke: var(--line); stroke-width: 1; } .area { fill: currentColor; }
.legend .area { stroke: currentColor; stroke-width: 10; }
.cache, .p50 { color: #3a88c8; } rect { fill: #3a88c8; }
.upstream { color: #e6a02e; } .stale { color: #bc6ea2; } .local { color: #828c98; }
.p95 { color: var(--warn); stroke-dasharray: 7 4; }
.p99 { color: var(--bad); stroke-dasharray: 2 4; }
table { width: 100%; margin-top: .5rem; border-collapse: collapse; font-size: .88rem; }
th, td { padding: .35rem 0 .35rem .75rem; vertical-align: top; }
td { border-top: 1px solid var(--line); }
td + td, th { white-space: nowrap; }
tr > :first-child { padding-left: 0; text-align: left; }
.wide tr > :nth-child(2) { text-align: left; }
td svg { width: 3.5rem; height: .4rem; border-radius: .2rem; background: var(--line); }
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
    for (const part of ["title", "main"])
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
    "default-src 'none'; style-src 'sha256-{}'; script-src 'sha256-{}'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
).format(*HASHES)

STUCK = "a server's loop has not moved for seconds: restart it"
KINDS = {"up": "good", "down": "bad"}  # of states; others are to be warned of
PERCENTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
UNITS: dict[str, dict[float, str]] = {  # what is written, and from where on in which
    **{"": {1: ""}, "%": {0.01: "%"}},
    "time": {0.001: "ms", 1: "s", 60: "min", 3600: "h", 86400: "d"},
    "memory": {1: "B", 1 << 10: "KiB", 1 << 20: "MiB", 1 << 30: "GiB"},
}
PERIOD = 10.0  # s from one reading to the next
SPAN = 3600.0  # s that the charts show at most
LATEST = 7  # readings that count as now: a minute
POINTS = 60  # of a chart, or some more; a phone could not show them

Known = Union[float, None]
Reading = Sequence[float]  # the time, answers by source, and by how long they took
# By a name, without `dotproxy_`, and the place of a label, -1 for buckets: by label.
Figures = Mapping[tuple[str, int], Mapping[str, float]]
Lines = Mapping[str, str]  # shape and name, which is a class of STYLE; value now
Heights = Sequence[Sequence[Known]]  # from 0 to 1: of each part those of all lines
Judge = Callable[[float], bool]
Upstreams = Sequence[Mapping[str, object]]  # the facts of each, escaped


def write(number: Known, kind: str = "") -> str:
    """Write a number with three digits, or with all those before the point."""
    if number is None:
        return "\u2013"
    units = UNITS[kind]
    unit = max((unit for unit in units if number >= unit), default=min(units))
    number /= unit
    text = f"{number:,.0f}" if number >= 99.95 else f"{number:.3g}"
    return f"{text}\u202f{units[unit]}" if units[unit] else text


def percentile(buckets: Sequence[float], share: float) -> Known:
    """Return within how many seconds this share was answered, as Prometheus has it."""
    rank, below = share * sum(buckets), 0.0
    bounds: Reading = LATENCIES[0], *LATENCIES, LATENCIES[-1]  # no finer, no longer
    for lower, upper, number in zip(bounds, bounds[1:], buckets):
        if number and below + number >= rank:
            return lower + (upper - lower) * (rank - below) / number
        below += number
    return None


def sum_up(samples: Iterable[Sample]) -> Figures:
    sums: dict[tuple[str, int], dict[str, float]]
    sums = collections.defaultdict(lambda: collections.defaultdict(float))
    for full_name, labels, value in samples:
        name = full_name.removeprefix("dotproxy_")
        if isinstance(value, Histogram):
            for bucket, count in enumerate(value.counts):
                sums[name, -1][str(bucket)] += count
        else:
            for place, label in enumerate(labels or ("",)):
                sums[name, place][label] += value
    return sums


class Change:
    """What happened between two readings."""

    def __init__(self, earlier: Reading, later: Reading) -> None:
        passed, *counts = (b - a for a, b in zip(earlier, later))
        answers, buckets = counts[: len(SOURCES)], counts[len(SOURCES) :]
        self.end = later[0]
        self.rates = [number / (passed or 1.0) for number in answers]
        asked = sum(answers) - answers[SOURCES.index(LOCAL)]
        self.hit_ratio = answers[SOURCES.index(CACHE)] / asked if asked else None
        self.delays = [percentile(buckets, share) for share in PERCENTILES.values()]


def draw_chart(
    ends: Sequence[float], title: str, lines: Lines, rows: Heights, levels: list[str]
) -> str:
    """Draw lines that end now; `ends`: of their parts, in seconds."""
    legend, paths, begun, steps = "", "", min(*ends, -PERIOD, 0), len(levels) - 1
    for place, (kind, now) in enumerate(lines.items()):
        path, pen = "", "M"
        for x, row in zip(ends, rows):
            y = row[place]
            if y is not None:  # a point alone is a dot
                path += f"{pen}{x:.0f} {-y:.3f}{'h0' * (pen == 'M')}"
            pen = "M" if y is None else "L"
        shape, _, name = kind.partition(" ")
        path += f"V0H{ends[0]:.0f}Z" if shape == "area" and path else ""
        paths = f'<path class="{kind}" d="{path}"/>{paths}'  # the first in front
        key = f'<svg viewBox="0 0 18 10"><path class="{kind}" d="M1 5H17"/></svg>'
        legend += f"<li>{key}{name} {now}</li>"
    grid = "".join(f"M{begun:.0f} {-n / steps:.3f}H0" for n in range(steps + 1))
    ago = [f"{write(-begun / parts, 'time')} ago" for parts in (1, 2)]
    side, below = ("</li><li>".join(each) for each in (levels, [*ago, "now"]))
    return f"""<section><h2>{title}</h2><ul class="legend">{legend}</ul>
<div class="plot"><ul class="levels" aria-hidden="true"><li>{side}</li></ul>
<svg viewBox="{begun:.0f} -1 {-begun:.0f} 1" preserveAspectRatio="none" role="img"
 aria-label="{title}"><path class="grid" d="{grid}"/>{paths}</svg>
<ul aria-hidden="true"><li>{below}</li></ul></div></section>"""


def draw_charts(readings: Sequence[Reading], latest: Change) -> str:
    """Draw queries by source, the time to answer on a log scale, and hits."""
    # Points are at multiples of a step, so that they stay where they are.
    step = len(readings) // POINTS + 1
    marks = [r for r in readings[:-1] if r[0] // PERIOD % step == 0]
    changes = [Change(*pair) for pair in zip(marks, [*marks[1:], readings[-1]])]
    draw = functools.partial(draw_chart, [c.end - latest.end for c in changes])
    highest = max((sum(change.rates) for change in changes), default=0.0)
    power = 10.0 ** math.floor(math.log10(max(highest, 1.0)))
    top = next(power * n for n in (1, 2, 4, 6, 8, 10) if power * n >= highest)
    stacks = [[y / top for y in itertools.accumulate(c.rates)] for c in changes]
    rates = {f"area {s}": write(rate) for s, rate in zip(SOURCES, latest.rates)}
    levels = [write(level) for level in (top, top / 2, 0)]
    first = draw("Queries per second by source", rates, stacks, levels)
    log10 = math.log10
    logs = [log10(y) for c in changes for y in c.delays if y] or [-3.0]
    low = math.floor(min(logs))
    steps = max(math.ceil(max(logs)) - low, 1)
    curves = [[y and (log10(y) - low) / steps for y in c.delays] for c in changes]
    delays = zip(PERCENTILES, latest.delays)
    percentiles = {f"line {name}": write(delay, "time") for name, delay in delays}
    levels = [write(10.0 ** (low + n), "time") for n in range(steps, -1, -1)]
    second = draw("Time to answer", percentiles, curves, levels)
    ratio = {"line answered from the cache": write(latest.hit_ratio, "%")}
    levels = [write(share, "%") for share in (1.0, 0.5, 0.0)]
    third = draw("Cache hit ratio", ratio, [[c.hit_ratio] for c in changes], levels)
    return f'{first}<div class="row charts">{second}{third}</div>'


def draw_tiles(figures: Figures, latest: Change) -> str:
    """Draw the large figures."""
    p50, p95, p99 = (write(delay, "time") for delay in latest.delays)
    total = write(sum(figures["dns_responses_total", 0].values()))
    waiting = write(figures["queries_in_flight", 0].get(""))
    tiles = (
        ("Queries per second", write(sum(latest.rates)), "mean of the last minute"),
        ("From the cache", write(latest.hit_ratio, "%"), "in the last minute"),
        ("Half answered within", p50, f"p95\u00a0{p95}, p99\u00a0{p99}"),
        ("Queries answered", total, f"since the start, {waiting} waiting"),
    )
    tile = "<section><small>{}</small><b>{}</b><small>{}</small></section>"
    return "".join(tile.format(*each) for each in tiles)


def draw_table(title: str, columns: str, rows: Iterable[Sequence[str]]) -> str:
    """Draw a table of columns with these names, if they have any."""
    names, body = columns.split(), ""
    for row in rows:
        cells = itertools.zip_longest(names, row, fillvalue="")
        drawn = (f'<td data-of="{name}">{cell}</td>' for name, cell in cells)
        body += f"<tr>{''.join(drawn)}</tr>\n"
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    table = f"<table><thead><tr>{head}</tr></thead>{body}</table>"
    return f"<section><h2>{title}</h2>{table if body else 'None so far.'}</section>"


def draw_lists(figures: Figures) -> str:
    """Draw who asked for what, and what that takes."""
    lists = ""
    for title, family, place in (
        ("Answers by RCODE", "dns_responses_total", 0),
        ("Queries by type", "dns_requests_total", 2),
        ("Turned away, by reason", "turned_away_total", 0),
    ):
        found, rows = figures[family, place], []
        for name in sorted(found, key=found.__getitem__, reverse=True)[:6]:
            share = found[name] / (sum(found.values()) or 1.0)
            bar = f'<svg><rect width="{share:.1%}" height="9"/></svg>'
            rows.append((name, bar, write(found[name])))
        lists += draw_table(title, "", rows)
    rows = []
    for name, family, label, kind in (
        ("CPU time", "process_cpu_seconds_total", "", "time"),
        ("Memory", "process_resident_memory_bytes", "", "memory"),
        ("Memory of the cache", "cache_size_bytes", "", "memory"),
        ("Answers in the cache", "cache_entries", "", ""),
        ("Open files", "process_open_fds", "", ""),
        ("TCP clients", "stream_clients", "tcp", ""),
        ("TLS clients", "stream_clients", "dot", ""),
    ):
        rows.append((name, "", write(figures[family, 0].get(label), kind)))
    return lists + draw_table("Process", "", rows)


def draw_upstreams(upstreams: Upstreams, figures: Figures, now: float) -> str:
    """Draw the table of upstreams."""
    rows = []
    families = "requests_total", "failures_total", "connections"
    for facts in upstreams:
        name, since, failed_at = str(facts["name"]), facts["since"], facts["failed_at"]
        where, _, notes = name.partition("#")
        notes += f" for {facts['domain']} only" if facts["domain"] else ""
        if isinstance(failed_at, float):
            notes += f"<br/>{write(now - failed_at, 'time')} ago: {facts['error']}"
        state = str(facts["state"])
        kind = KINDS.get(state, "warn")
        if isinstance(since, float):
            state += f" for {write(now - since, 'time')}"
        ends = figures["upstream_certificate_expiry_timestamp_seconds", 0].get(name)
        seconds = math.inf if ends is None else ends - time.time()
        left = f"{write(seconds / 86400)}\u202fdays" if seconds > 0 else "expired"
        if seconds < EXPIRY_NOTICE:
            left = f'<i class="{"warn" if seconds > 0 else "bad"}"></i> {left}'
        row = [
            f"<strong>{where}</strong><small>{notes}</small>",
            f'<i class="{kind}"></i> {state}',
            write(figures["upstream_latency_seconds", 0].get(name), "time"),
            *(write(figures[f"upstream_{each}", 0].get(name)) for each in families),
            left if ends else write(None),
        ]
        rows.append(row)
    columns = "Upstream State Latency Queries Failures Connections Certificate"
    return draw_table("Upstreams", columns, rows)


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
        self, metrics: Metrics, proxy: Proxy, timer: Timer, turning: Judge, listen: str
    ) -> None:
        """Take a reading; `turning`: whether the servers' loops turned lately."""
        self._metrics, self._proxy, self._timer = metrics, proxy, timer
        self._turning, self._listen = turning, listen
        # Replaced as a whole and never changed: whoever looks needs no lock.
        self._readings: tuple[Reading, ...] = ()
        text, js = "text/plain; version=0.0.4; charset=utf-8", "application/json"

        def probe(trouble: str) -> Page:
            return Page(f"{trouble}\n", status=503) if trouble else Page("OK\n")

        self.by_path: Pages = {
            "/": self._show_status,
            "/metrics": lambda: Page(metrics.write(), text),
            "/health": lambda: probe("" if turning(time.monotonic()) else STUCK),
            "/ready": lambda: probe(proxy.trouble()),
            "/grafana.json": lambda: Page(json.dumps(build_dashboard()), js),
        }
        self.take_reading()

    def take_reading(self) -> None:
        """Read the counters, now and from now on; the timer calls it again."""
        now, figures = elapsed(), sum_up(self._metrics.samples())
        answers = figures["dns_responses_total", 1]
        durations = figures["dns_request_duration_seconds", -1].values()
        reading = (now, *(answers.get(each, 0.0) for each in SOURCES), *durations)
        kept = (each for each in self._readings if now - each[0] <= SPAN)
        self._readings = (*kept, reading)
        self._timer.at(now + PERIOD, self.take_reading)

    def _show_status(self) -> Page:
        import html  # takes 3 ms, as a part of http.server

        figures, readings = sum_up(self._metrics.samples()), self._readings
        latest, now = Change(readings[-LATEST:][0], readings[-1]), elapsed()
        upstreams = [
            {k: html.escape(v) if isinstance(v, str) else v for k, v in facts.items()}
            for facts in self._proxy.facts()
        ]
        kind, headline, why = "bad", "Not serving", STUCK
        if self._turning(time.monotonic()):
            trouble = self._proxy.trouble()
            kind, headline, why = describe_service(upstreams, trouble, now)
        age = time.time() - STARTED
        stamp = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        text = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{headline} | dotproxy</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<noscript><meta http-equiv="refresh" content="15"></noscript>
<style>{STYLE}</style></head>
<body><main><header><h1><i class="{kind}"></i> {headline}</h1><p>{why}</p>
<small>dotproxy {__version__} · up for {write(age, "time")} · listening on
{html.escape(self._listen)} · as of {stamp}</small></header>
<div class="row tiles">{draw_tiles(figures, latest)}</div>
{draw_charts(readings, latest)}
<div class="wide">{draw_upstreams(upstreams, figures, now)}</div>
<div class="row lists">{draw_lists(figures)}</div>
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
UMASK = 0o077  # what it writes is for its own user
OPEN_MAX = 10240  # macOS takes no higher limit, whatever its hard limit says
Passed = tuple[str, socket.socket]  # what systemd calls a socket, and that
FIRST_PASSED = 3  # the first descriptor that systemd passes, sd_listen_fds(3)


def find_account(text: str) -> tuple[int, int]:
    """Return the numbers of `USER[:GROUP]`, without a group of the user's own."""
    user, colon, group = text.partition(":")
    with contextlib.suppress(KeyError):
        uid = gid = int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid
        with contextlib.suppress(KeyError):
            gid = pwd.getpwuid(uid).pw_gid
        if colon:
            gid = int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
        if max(uid, gid) < 1 << 32:
            return uid, gid
    if text == NOBODY:
        return NOBODY_ID, NOBODY_ID
    raise ConfigError(f"there is no user or group {text!r}: give --user USER[:GROUP]")


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
        os.setgid(gid)
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


def renounce_root(wanted: str | None) -> str:
    """Give up what is not needed of the host any more; return who it runs as.

    Before there are threads, which would each have rights of their own.
    """
    os.umask(UMASK)
    with contextlib.suppress(OSError, ValueError):  # a sandbox may forbid it
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # it would have keys in it
    own = os.geteuid(), os.getegid()
    if own[0]:
        if wanted and find_account(wanted) != own:
            cure = "start as root, or without --user"
            raise ConfigError(f"only root can become user {wanted}: {cure}", status=1)
        return str(own[0])
    uid, gid = find_account(wanted or NOBODY)
    user = (wanted or NOBODY).partition(":")[0]
    hint = "--user says so, but any other user would do"
    try:
        if uid:
            become(uid, gid)
            return user
    except OSError as error:
        cure = "grant CAP_SETUID and CAP_SETGID, or stay root with --user root"
        hint = f"cannot become user {user}: {error.strerror}; {cure}"
        if wanted or (error.errno != errno.EINVAL and has_capabilities()):
            raise ConfigError(hint, status=1) from error
    note(logging.WARNING, "running as root", hint=hint)
    return "root"


def inherited_sockets(environment: Mapping[str, str]) -> list[Passed]:
    """Take over the sockets that systemd passed, sd_listen_fds(3), with their names.

    Raises ConfigError.
    """
    if environment.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = environment.get("LISTEN_FDS", "")
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    with contextlib.ExitStack() as stack:
        try:
            numbers = range(FIRST_PASSED, FIRST_PASSED + int(count))
            taken = [stack.enter_context(socket.socket(fileno=n)) for n in numbers]
            for each in taken:
                listens = each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                stream = each.type == socket.SOCK_STREAM
                if listens != stream or each.family == socket.AF_UNIX:
                    raise ValueError(f"descriptor {each.fileno()} serves no address")
        except (OSError, ValueError) as error:
            cure = "pass sockets as ListenDatagram= and ListenStream= of addresses do"
            text = f"cannot serve on LISTEN_FDS={count}: {error}; {cure}"
            raise ConfigError(text, status=1) from error
        stack.pop_all()
    return list(zip([*names, *[""] * len(taken)], taken))


class Supervisor:
    """systemd, if it wants to hear how it goes: in datagrams, sd_notify(3)."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        path = environment.get("NOTIFY_SOCKET", "")
        self._address = re.sub("^@", "\0", path)
        # A quarter, so that a loop that hung for a moment can still tell that it turns.
        given = environment.get("WATCHDOG_USEC", "")
        often = int(given if given.isdecimal() else 0) / 4e6 or 10.0
        self.interval = min(often, 10.0) if path else None  # s between reports

    def tell(self, *lines: str) -> None:
        """Send a notification, or drop it where nobody takes it; never blocks."""
        if self._address:
            kind = socket.AF_UNIX, socket.SOCK_DGRAM
            with contextlib.suppress(OSError), socket.socket(*kind) as channel:
                channel.setblocking(False)
                channel.sendto("\n".join(lines).encode(), self._address)


# ---- Command line --------------------------------------------------------------------
# Options become the one Config that all parts are given. What the host or a file does
# not allow is told with the option to mend.

FIRST_PROCESS = "/proc/1/cmdline"  # what a container runs, or a host's init
DNS_PORT, DOT_PORT = 53, 853  # RFC 7858 section 3.1
CLOUDFLARE = tuple(
    Endpoint(host, DOT_PORT, "cloudflare-dns.com")
    for host in ("1.1.1.1", "1.0.0.1", "2606:4700:4700::1111", "2606:4700:4700::1001")
)
DOMAIN = re.compile(
    r"(?=.{1,253}\.?$)(?:[-\w]{1,63}\.)*(?![0-9]+\.?$)[-\w]{1,63}\.?", re.ASCII
)
# [ADDRESS], HOST or a bare IPv6 address, then :PORT, @PORT or nothing.
PLACE = re.compile(r"(\[[^][]*]|[^][:@]*|[^][@]*:[^][@]*:[^][@]*)(?:[:@]([0-9]{1,5}))?")
# What is quoted in a line of options, or the comment at its end.
COMMENT = re.compile(r"""(\\.|'[^']*'|"(?:\\.|[^"\\])*")|(?:^|(?<=\s))#.*""")
FLAGS = {**dict.fromkeys(("yes", "true", "on", "1"), True), "no": False, "false": False}
FLAGS |= {"off": False, "0": False}


def hinted(hint: str, parse: Callable[[str], T]) -> Callable[[str], T]:
    """Make a parser argparse's, which tells the hint for ValueError and KeyError."""

    def parse_or_tell(text: str) -> T:
        try:
            return parse(text)
        except (KeyError, ValueError):
            raise argparse.ArgumentTypeError(f"{text!r}: {hint}") from None

    return parse_or_tell


def checked(value: T, fits: object) -> T:
    """Return a value; raise ValueError, as all parsers below do, unless it fits."""
    if not fits:
        raise ValueError
    return value


def parse_name(text: str) -> str:
    """Return a domain name without the root's dot: none ends in a number, RFC 3696."""
    return checked(text.removesuffix("."), DOMAIN.fullmatch(text))


def parse_host(text: str) -> str:
    """Return a domain name, or an IP address."""
    name = DOMAIN.fullmatch(text)
    return parse_name(text) if name else checked(text, ipaddress.ip_address(text))


def split_port(text: str, port: int) -> Address:
    """Split `HOST[:PORT]` or `[HOST]:PORT`."""
    match = PLACE.fullmatch(text)
    if match is None or int(match[2] or 0) > 65535:
        raise ValueError
    parse_host(match[1].strip("[]"))
    return match[1].strip("[]"), int(match[2] or port)


def listen_on(port: int, alone: str = "") -> Callable[[str], Address]:
    """Make the type of an address; a port without one is one of `alone`."""

    def parse(text: str) -> Address:
        host, chosen = split_port(alone * text.isdigit() + text, port)
        return str(ipaddress.ip_address(host)), chosen  # with the zone, if it has one

    example = f"127.0.0.1:{port} or [::1]:{port}"
    return hinted(f"give an IP address and a port, as in {example}", parse)


def parse_server(text: str) -> Endpoint:
    """Parse `[tls://]HOST[:PORT][#NAME]` or `tcp://HOST[:PORT]`."""
    plain = text.startswith("tcp://")
    address = text.removeprefix("tcp://" if plain else "tls://")
    place, sharp, name = address.partition("#")
    host, port = split_port(place, DNS_PORT if plain else DOT_PORT)
    server = Endpoint(host, port, "" if plain else parse_host(name if sharp else host))
    return checked(server, port and not (plain and sharp))


def parse_route(text: str) -> Route:
    domain, _, server = text.partition("=")
    return parse_name(domain).lower(), parse_server(server)


def parse_pin(text: str) -> tuple[str, str]:
    name, _, pin = text.partition("=")
    length = len(base64.b64decode(pin, validate=True))
    return parse_host(name).lower(), checked(pin, length == 32)


def parse_special(text: str) -> bytes:
    domain = b"\0" if text.lower() == "all" else encode_domain(parse_name(text))
    known = any(domain in lineage(z) or z in lineage(domain) for z in LOCAL_ZONES)
    return checked(domain, known)


def parse_size(text: str) -> int:
    shift = {"K": 10, "M": 20, "G": 30}.get(text[-1:].upper(), 0)
    octets = int(text[:-1] if shift else text) << shift
    return checked(octets, octets >= 0)


def parse_network(text: str) -> Network:
    network = ipaddress.ip_network(text, strict=False)  # bits of a host are ignored
    version = parse_client(str(network.network_address)).version
    return checked(network, network.version == version)


def number(kind: type[float], low: float, high: float) -> Callable[[str], float]:
    """Make the type of a number within bounds."""
    hint = f"give a number, {low:g} to {high:g}"
    return hinted(hint, lambda text: checked(n := kind(text), low <= n <= high))


FLAG = hinted("give yes or no", lambda text: FLAGS[text.lower()])
NAME = hinted(
    "give a domain name, as example.com", lambda text: encode_domain(parse_name(text))
)
NETWORK = hinted("give a network, as 192.0.2.0/24 or 2001:db8::/32", parse_network)
PATH = hinted("give the path of a file", lambda text: checked(text, text))
PIN = hinted("write TLS-NAME=BASE64, a SHA-256 in 44 characters", parse_pin)
ROUTE = hinted("write DOMAIN=HOST#NAME or DOMAIN=tcp://HOST[:PORT]", parse_route)
SERVER = hinted("write HOST[:PORT][#NAME], as 9.9.9.9#dns.quad9.net", parse_server)
SIZE = hinted("give octets, such as 32M", parse_size)
SPECIAL = hinted("give all, local, 10.in-addr.arpa or the like", parse_special)
Parse = Callable[[str], object]
Kind = Union[Parse, "list[Parse]", "tuple[str, ...]"]
DESCRIBED: list[tuple[str, Kind, str]] = []  # of each field of Config


def option(metavar: str, kind: Kind, default: T, text: str) -> T:
    """Describe how a field of Config is given; return its default.

    A kind in a list may be repeated, a tuple is a choice, a metavar in [] may be left
    out. The help tells the default, in words where those stand in the `text`.
    """
    DESCRIBED.append((metavar, kind, text))
    return default


# fmt: off
class Config(NamedTuple):
    """All options, checked: what is called `--cache-size` is `cache_size` here."""

    listen: tuple[Address, ...] = option("ADDR[:PORT]", [listen_on(5353)],
        (("127.0.0.1", 5353), ("::1", 5353)),
        "serve UDP and TCP here; repeatable (default: 127.0.0.1:5353 [::1]:5353)")
    timeout: float = option("SECONDS", number(float, 0.1, 60), 4.8,
        "answer SERVFAIL after this long without an answer")
    max_in_flight: int = option("N", number(int, 1, 30_000), 10_000,
        "queries in flight; beyond it the busiest client's oldest ones get SERVFAIL")
    max_tcp_clients: int = option("N", number(int, 1, 10_000), 512,
        "TCP connections at once; beyond it the longest idle one is closed")
    max_tcp_per_client: int = option("N", number(int, 1, 10_000), 256,
        "the same for one client address")
    reuse_port: bool = option("[YES]", FLAG, False,
        "let several processes serve the same addresses, or a new one take over")
    allow: tuple[Network, ...] = option("NETWORK", [NETWORK], LOCAL_NETWORKS,
        "answer clients of this network only; repeatable (default: private addresses)")
    rate_limit: float = option("QPS", number(int, 0, 1_000_000), 50,
        "queries a second of a public IPv4 address or IPv6 /56; 0 for any number")
    rate_limit_all: bool = option("[YES]", FLAG, False, "limit private addresses too")
    tls_listen: tuple[Address, ...] = option("ADDR[:PORT]", [listen_on(DOT_PORT)], (),
        "serve DNS over TLS here, on port 853 if none is given; repeatable")
    tls_cert: str | None = option("PEM", PATH, None,
        "the certificate to show there, with its chain; read again at SIGHUP")
    tls_key: str | None = option("PEM", PATH, None,
        "its private key, without a passphrase (default: the one in the same file)")
    upstream: tuple[Endpoint, ...] = option("HOST[:PORT][#NAME]", [SERVER], CLOUDFLARE,
        "DNS-over-TLS resolver whose certificate is for NAME, or for HOST without one; "
        "repeatable (default: 1.1.1.1#cloudflare-dns.com and its other addresses)")
    route: tuple[Route, ...] = option("DOMAIN=UPSTREAM", [ROUTE], (),
        "ask this server, and no others, for names at and below DOMAIN; as --upstream "
        "or tcp://HOST[:PORT] for plain DNS; repeatable, also for one DOMAIN")
    strategy: str = option("HOW", STRATEGIES, "fastest",
        "choose upstreams: fastest, round-robin, random, or failover in order given")
    ca_file: str | None = option("PEM", PATH, None,
        "trust the CA certificates in this file only (default: the system's)")
    pin: tuple[tuple[str, str], ...] = option("NAME=BASE64", [PIN], (),
        "of the servers with certificates for NAME, trust only those whose own public "
        "key, not their CA's, has this SHA-256; repeatable, one will do")
    tls_min: str = option("VERSION", tuple(TLS_VERSIONS), "1.2",
        "speak this version of TLS or newer with upstreams: 1.2 or 1.3")
    cache_size: int = option("BYTES", SIZE, 32 << 20,
        "memory for answers, with K, M or G if you like; 0 for no cache (default: 32M)")
    cache_min_ttl: int = option("SECONDS", number(int, 0, 86400), 0,
        "keep answers at least this long, but for those with a TTL of 0")
    cache_max_ttl: int = option("SECONDS", number(int, 0, 7 * 86400), 7 * 86400,
        "keep answers at most so long")
    cache_fail_ttl: float = option("SECONDS", number(int, 0, 30), 1,
        "keep failures so long")
    cache_stale: float = option("SECONDS", number(int, 0, 7 * 86400), 86400,
        "keep expired answers so long, for when no upstream answers; 0 for not at all")
    forward_special: tuple[bytes, ...] = option("NAME", [SPECIAL], (),
        "send this special name and all below upstream; all for every one; repeatable")
    block_private_answers: bool = option("[YES]", FLAG, False,
        "answer NODATA for private addresses of upstreams, against DNS rebinding")
    allow_private: tuple[bytes, ...] = option("NAME", [NAME], (),
        "let this name and all below it have private addresses; repeatable")
    user: str | None = option("USER[:GROUP]", str, None,
        "become this user, if started as root; root to stay that (default: nobody)")
    admin: Address | None = option("[ADDR:PORT]", listen_on(9153, "127.0.0.1:"), None,
        "serve a status page, metrics, probes and a Grafana dashboard over HTTP here; "
        "a port alone is one of 127.0.0.1, nothing is 127.0.0.1:9153 (default: off)")
    log_level: str = option("LEVEL", ("debug", "info", "warning", "error"), "info",
        "debug, info, warning or error")
    log_format: str = option("FORMAT", ("text", "json"), "text",
        "text, or json for objects of the Elastic Common Schema")
    query_log: str | None = option("[FILE]", PATH, None,
        "log queries to this file, or to stderr without one or with - (default: off)")
    query_log_privacy: str = option("HOW", PRIVACY, "prefix",
        "what it hides of clients and names: prefix, hash, no-names or none")
    doctor: str | None = option("[idle]", ("quick", "idle"), None,
        "check this host and every upstream without starting, and tell how to mend "
        "what fails (status 1); idle: also how long upstreams keep an idle connection")
    healthcheck: bool = option("[YES]", FLAG, False,
        "ask the running proxy, and tell in a line whether it is healthy (status 0); "
        "without other options it takes those of process 1, where that is dotproxy")
# fmt: on


OPTIONS = dict(zip(Config._fields, DESCRIBED))
# The headings of the help, by the first option below each.
HEADINGS = {"listen": "clients", "upstream": "upstreams", "cache_size": "cache"}
HEADINGS |= {"forward_special": "names", "user": "host", "doctor": "instead of serving"}
ERRANDS = {"healthcheck", "doctor"}  # never of the environment, which servers inherit
ALONE = {"admin": ("127.0.0.1", 9153), "query_log": "-", "doctor": "quick"}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose files have comments."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """Split a line of an options file as a shell does."""
        try:
            checked(arg_line, "\0" not in arg_line)
            return shlex.split(COMMENT.sub(r"\1", arg_line))
        except ValueError as error:
            self.error(f"{arg_line!r}: {error}")


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
    for name, (metavar, kind, text) in OPTIONS.items():
        if name in HEADINGS:
            group = parser.add_argument_group(HEADINGS[name])
        add = functools.partial(group.add_argument, "--" + name.replace("_", "-"))
        default = Config._field_defaults[name]
        if default and "(default: " not in text:
            text += f" (default: {default})"
        alone = metavar.startswith("[")
        one = kind[0] if isinstance(kind, list) else kind
        add(
            metavar=metavar[1:-1] if alone else metavar,
            nargs="?" if alone else None,
            const=ALONE.get(name, True) if alone else None,
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
        for place, word in enumerate(words[:5], 1):
            if os.path.basename(word) in ("dotproxy", "dotproxy.py", "dotproxy.pyc"):
                return words[place:]
    return []


def check_options(config: Config) -> None:
    """Raise ConfigError where options contradict each other."""
    servers = [*config.upstream, *(endpoint for _, endpoint in config.route)]
    names = {endpoint.name.lower() for endpoint in servers} - {""}
    if not all(endpoint.name for endpoint in config.upstream):
        raise ConfigError("--upstream: tcp:// is for --route alone")
    for name, _ in config.pin:
        if name not in names:
            known = ", ".join(sorted(names))
            raise ConfigError(f"--pin {name}: no server's TLS name; they have {known}")
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
    for name in OPTIONS.keys() - ERRANDS - given.keys():
        text = environment.get(f"DOTPROXY_{name.upper()}", "")
        several = isinstance(OPTIONS[name][1], list)
        found = text.replace(",", " ").split() if several else [text]
        words += [f"--{name.replace('_', '-')}={word}" for word in found if word]
    chosen = {**vars(parser.parse_args(words)), **given}
    for name, value in chosen.items():
        if isinstance(value, list):
            chosen[name] = tuple(dict.fromkeys(value))
    config = Config(**chosen)
    check_options(config)
    return config


def load_identity(config: Config, passed: bool = False) -> Identity | None:
    """Read what encrypted clients are shown; `passed`: there is a socket for them."""
    if config.tls_listen or passed:
        if config.tls_cert:
            return Identity(config.tls_cert, config.tls_key)
        cure = "give --tls-cert PEM, and --tls-key PEM if its key is in another file"
        raise ConfigError(f"serving TLS needs a certificate: {cure}")
    if config.tls_cert or config.tls_key:
        raise ConfigError("--tls-cert is for encrypted clients: give --tls-listen")
    return None


def describe_bind_error(
    config: Config, option: str, address: Address, error: OSError
) -> str:
    """Say why an address cannot be listened on, and how to mend it.

    Nothing, where it is of a family that this host lacks and nobody asked for just it.
    """
    host, port = address
    why, cure = str(error.strerror), f"mend {option}"
    if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
        anywhere = host in ("0.0.0.0", "::") and option != "--admin"
        if anywhere or (option == "--listen" and config.listen == Config().listen):
            return ""
        why = "this host has no such address"
    holders = {53: "systemd-resolved or dnsmasq", 5353: "avahi-daemon or mDNSResponder"}
    if error.errno == errno.EADDRINUSE:
        why = f"port {port} is taken, perhaps by {holders.get(port, 'another server')}"
        spare = write_address(host, port + (1 if port > 1023 else 8000))
        cure = f"stop that, or choose another port with {option} {spare}"
    elif error.errno in (errno.EACCES, errno.EPERM):
        why = f"no permission for port {port}"
        cure = f"start as root, or choose a port from 1024 up with {option}"
    return f"cannot listen on {write_address(host, port)}: {why}; {cure}"


def count_descriptors(config: Config) -> int:
    """Return how many may be in use: clients that end, and a margin, among them."""
    servers = {*config.upstream, *(server for _, server in config.route)}
    links = (Upstream.SHARED + Upstream.LANES) * len(servers)
    return 2 * config.max_tcp_clients + links + 64


def fit_descriptors(config: Config) -> Config:
    """Raise the limit of descriptors; where it stays too low, have fewer clients."""
    wanted = count_descriptors(config)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= wanted or soft == resource.RLIM_INFINITY:
        return config
    for limit in (wanted, hard, max(soft, OPEN_MAX), soft):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            break
    if limit >= wanted:
        return config
    clients = max(1, config.max_tcp_clients - (wanted - limit + 1) // 2)
    hint = f"to have all, LimitNOFILE={wanted} in the unit, or ulimit -n {wanted}"
    few = logging.WARNING, "few descriptors"
    note(*few, limit=limit, max_tcp_clients=clients, hint=hint)
    return config._replace(max_tcp_clients=clients)


# ---- Health check and doctor ---------------------------------------------------------
# Both ask as a client does, over a blocking socket: the health check as it is run every
# few seconds, the doctor as it looks at what may not start. It says of an upstream what
# the log would say.

HEALTH_GRACE = 1.0  # s beyond the proxy's own time-out that its answer may take
ROOT_QUESTION = b"\0\0\2\0\1"  # . NS IN: every resolver has that at hand
# Past the proxy's cache: what was cached days ago would say nothing of the upstreams.
HEALTH_QUERY = HEADER.pack(0, RD | AD, 1, 0, 0, 1)[2:] + ROOT_QUESTION
HEALTH_QUERY += build_opt(0, PAIR.pack(OPTION_UNCACHED, 0))
REACHED_AT = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # who listens anywhere, here
OK, WARN, FAIL = "ok", "warn", "FAIL"
SAMPLES = 10  # queries to an upstream, one after the other
STEP = 2.5  # s to connect, to shake hands, to answer
IDLE_LIMIT = 65.0  # s to wait for an idle connection to close
UNSEEN = "a program that cannot be seen"
AGAIN = "check address and port, and firewalls in between, or give another upstream"

Session = Union[ssl.SSLSession, None]
# A response, the text of its Extended DNS Error, and the seconds that it took.
Heard = tuple[Response, str, float]


def ask(link: socket.socket, query: bytes, patience: float) -> Heard:
    """Send a query without its ID. Raises OSError or UpstreamError."""
    framed, begun, rest = link.type == socket.SOCK_STREAM, elapsed(), b""
    message = os.urandom(2) + query
    question = message[12 : end_of_question(message)]
    link.sendall(len(message).to_bytes(2, "big") * framed + message)
    while (left := begun + patience - elapsed()) > 0:
        link.settimeout(left)
        try:
            octets = link.recv(MAX_MESSAGE)
        except socket.timeout:
            break
        if framed and not octets:
            raise UpstreamError("closed", "closed by the server")
        answers, rest = split_frames(rest + octets) if framed else ([octets], b"")
        for answer in answers:
            if answer[:2] == message[:2] and len(answer) >= MIN_MESSAGE:
                with contextlib.suppress(FormatError):  # then it is none
                    response = parse_misfit(answer, question)
                    end = 4 + int.from_bytes(response.options[2:4], "big")
                    text = response.options[6:end].decode("utf-8", "replace")
                    return response, text.translate(CONTROLS), elapsed() - begun
    raise UpstreamError("silence", f"no answer within {patience:g} s")


def check_health(address: Address, patience: float) -> tuple[bool, str]:
    """Ask the proxy that listens here; return whether it is healthy, and a line."""
    host, port = REACHED_AT.get(address[0], address[0]), address[1]
    where = write_address(host, port)
    try:
        found = socket.getaddrinfo(host, port, flags=socket.AI_NUMERICHOST)
        family, *_, target = found[0]
        with socket.socket(family, socket.SOCK_DGRAM) as link:
            link.connect(target)
            response, text, seconds = ask(link, HEALTH_QUERY, patience)
    except ConnectionRefusedError:
        return False, f"proxy down: nothing listens on {where}"
    except (OSError, UpstreamError) as error:
        return False, f"proxy down: {where}: {error}"
    taken = f"answered in {seconds * 1000:.1f} ms"
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


class Report:
    """What was found out about this host, or about a server."""

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self.findings: list[Finding] = []

    def say(self, check: str, detail: str, cure: str = "", result: str = "") -> None:
        """Add a finding, which is well where it needs no cure."""
        result = result or (WARN if cure else OK)
        self.findings.append(Finding(self._subject, check, result, detail, cure))

    @contextlib.contextmanager
    def check(self, name: str) -> Iterator[Callable[..., None]]:
        """Give a `say` of this name; what is raised, `detail; cure`, is said too."""
        try:
            yield functools.partial(self.say, name)
        except (ConfigError, OSError) as error:
            detail, *cure = re.split("; |: (?=give|start)", str(error), maxsplit=1)
            self.say(name, detail, "".join(cure), FAIL)


def find_holders(port: int) -> str:
    """Name who holds a port, as far as that can be seen."""
    # Unconnected UDP or TCP LISTEN, then five more columns, then the inode.
    pattern = rf":{port:04X} \S+ (?:07|0A)(?: +\S+){{5}} +(\d+)"
    links, holders = set(), set()
    for path in glob.iglob("/proc/net/[tu][cd]p*"):
        with contextlib.suppress(OSError), open(path, encoding="ascii") as table:
            links |= {f"socket:[{each}]" for each in re.findall(pattern, table.read())}
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


def try_address(
    config: Config, taken: contextlib.ExitStack, option: str, address: Address
) -> tuple[str, str]:
    """Bind and keep it, as two options may want one port; return what to say of it."""
    # An AdminServer, which never has SO_REUSEPORT: that would take others' queries.
    plain = option == "--listen"
    try:
        with contextlib.ExitStack() as bound:  # and let go where not all of it is free
            server = bound.enter_context(AdminServer(address, {}))
            if plain:
                datagrams = socket.socket(server.address_family, socket.SOCK_DGRAM)
                set_v6_only(bound.enter_context(datagrams))
                datagrams.bind(server.socket.getsockname())
            taken.enter_context(bound.pop_all())
    except OSError as error:
        text = describe_bind_error(config, option, address, error).partition(": ")[2]
        if not text:
            return "not used: this host has no such address", ""
        if error.errno != errno.EADDRINUSE:
            raise ConfigError(text) from None
        cure, holder = text.partition("; ")[2], find_holders(address[1])
        line = f"; {check_health(address, HEALTH_GRACE)[1]}" if plain else ""
        if "dotproxy" in holder:
            return f"held by {holder}, which runs{line}", ""
        if holder or line.startswith("; proxy down"):
            raise ConfigError(f"taken by {holder or UNSEEN}; {cure}") from None
        return f"taken by {UNSEEN}{line}", f"if it is not dotproxy, {cure}"
    return "free", ""


def look_at_host(config: Config) -> Report:
    """Look at this host, but for what the upstreams tell of it."""
    report = Report("this host")
    with report.check("options") as say:
        load_identity(config)
        path = config.query_log or "-"
        place = path if os.path.exists(path) else os.path.dirname(path) or "."
        if path != "-" and (os.path.isdir(path) or not os.access(place, os.W_OK)):
            raise ConfigError(f"cannot write to {path}; mend --query-log")
        listen, upstream = len(config.listen), len(config.upstream + config.route)
        say(f"valid; {listen} to listen on, {upstream} upstream")
    system, _, release, *_ = os.uname()
    python = f"Python {sys.version.split()[0]}, {ssl.OPENSSL_VERSION}"
    report.say("program", f"dotproxy {__version__}, {python}, {system} {release}")
    wanted = [("--listen", address) for address in config.listen]
    wanted += [("--tls-listen", address) for address in config.tls_listen]
    wanted += [("--admin", config.admin)] if config.admin else []
    with contextlib.ExitStack() as taken:
        for option, address in wanted:
            with report.check(write_address(*address)) as say:
                say(*try_address(config, taken, option, address))
    with report.check("user") as say:
        uid = os.geteuid() or find_account(config.user or NOBODY)[0]
        say(f"it runs as user {uid}", "" if uid else "any user but root would do")
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)  # hard: the proxy takes that
    needed, unlimited = count_descriptors(config), limit == resource.RLIM_INFINITY
    cure = f"ulimit -n {needed}, or LimitNOFILE={needed} in a systemd unit"
    text = f"{'no limit' if unlimited else limit}; {needed} may be needed"
    report.say("descriptors", text, cure if not unlimited and limit < needed else "")
    with report.check("CA certificates") as say:
        trust, paths = Trust(config), ssl.get_default_verify_paths()
        number = len(trust.context.get_ca_certs())
        where = trust.ca_file or (paths.cafile if number else paths.capath)
        if not trust.has_authorities():
            where = os.environ.get(paths.openssl_cafile_env, paths.openssl_cafile)
            raise ConfigError(f"none in {where}; install them, or give --ca-file PEM")
        say(f"{number or 'as needed'} from {where}")
    return report


class Examination(Report):
    """Looks at an upstream, or a server of a routed domain, up to the first failure."""

    def __init__(self, server: Route, config: Config) -> None:
        """Raises ConfigError where there is nothing to trust it by."""
        self.domain, self.endpoint = server
        super().__init__(str(self.endpoint) + f" for {self.domain}" * bool(self.domain))
        self._trust, self._idle = Trust(config), config.doctor == "idle"
        self._links = contextlib.ExitStack()

    def run(self) -> None:
        """Look at all there is, for STEP at most at each step."""
        failure: Exception
        try:
            with self._links:
                return self._look()
        except ssl.SSLError as error:
            failure = describe_tls_error(error, self.endpoint, self._trust)
        except OSError as error:
            failure = describe_network_error(error, self.endpoint)
        except Exception as error:
            failure = error
        detail, cause = str(failure) or repr(failure), getattr(failure, "cause", "")
        # What has been said until now tells how far it came.
        check, cure = ("connect", "handshake", "answers")[len(self.findings[:2])], AGAIN
        check = "certificate" if cause == "certificate" else check
        if cause in ("certificate", "tls"):
            cure = detail.partition(" [")[0].rpartition(": ")[2]
        self.say(check, detail, cure, FAIL)

    def _connect(self) -> socket.socket:
        link = socket.create_connection(self.endpoint[:2], STEP)
        return self._links.enter_context(link)

    def _encrypt(self, link: socket.socket, session: Session = None) -> ssl.SSLSocket:
        context, name = self._trust.context, self.endpoint.name
        try:
            tls = context.wrap_socket(link, server_hostname=name, session=session)
        except socket.timeout:
            raise UpstreamError("timeout", "no end of the TLS handshake") from None
        except ssl.SSLCertVerificationError as error:
            if error.verify_code not in (62, 64):  # it is for another name or address
                raise
            context.check_hostname = False  # to see for which: nothing is asked there
            names = ", ".join(names_of(self._encrypt(self._connect()))[:8])
            text = f"certificate is for {names}, not for {name}"
            hint = "give --upstream HOST#NAME"
            raise UpstreamError("certificate", f"{text}: {hint}") from None
        return self._links.enter_context(tls)

    def _look(self) -> None:
        """Raises UpstreamError and OSError, as ssl.SSLError."""
        begun = elapsed()
        link = self._connect()
        taken, host = (elapsed() - begun) * 1000, link.getpeername()[0]
        self.say("connect", f"IPv{6 if ':' in host else 4} {host}: {taken:.1f} ms")
        if not self.endpoint.name:
            self.say("handshake", "none: plain DNS in clear text")
            self._look_at_answers(link, NO_EDNS)  # which it need not know
            return
        begun = elapsed()
        tls = self._encrypt(link)
        taken, certificate = (elapsed() - begun) * 1000, tls.getpeercert(True) or b""
        self._trust.check_pin(self.endpoint.name, certificate)
        cipher = (tls.cipher() or ("",))[0]
        self.say("handshake", f"{tls.version()}, {cipher}, in {taken:.1f} ms")
        self.say("ALPN", tls.selected_alpn_protocol() or "none chosen")
        last = ssl.cert_time_to_seconds(str((tls.getpeercert() or {})["notAfter"]))
        left, names = last - time.time(), ", ".join(names_of(tls)[:8])
        date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(last))
        text = f"for {names}; {int(left // 86400)} days left, to {date}"
        cure = "have its operator renew it, or give another upstream as well"
        self.say("certificate", text, cure if left < EXPIRY_NOTICE else "")
        self.say("pin", public_key_pin(certificate))
        self._look_at_answers(tls, PADDED)

    def _look_at_answers(self, link: socket.socket, edns: int) -> None:
        question = ROOT_QUESTION
        if self.domain:
            question = encode_domain(self.domain) + PAIR.pack(TYPE_SOA, CLASS_IN)
        query = parse_query(HEADER.pack(0, RD, 1, 0, 0, 0) + question)
        wire = build_upstream_query(query, edns)
        answers = [ask(link, wire, STEP) for _ in range(SAMPLES)]
        answered, (response, text, _) = elapsed(), answers[-1]
        if response.rcode in FAILURE_RCODES:
            text = f"{Rcode(response.rcode).name}: {text}".rstrip(": ")
            cure = "have its operator allow this host, or give another upstream"
            return self.say("answers", text, cure, FAIL)
        times = sorted(seconds * 1000 for *_, seconds in answers)
        text = " / ".join(f"{times[at]:.1f} ms" for at in (0, SAMPLES // 2, -1))
        self.say("latency", f"{text} (least, median, most of {SAMPLES})")
        if isinstance(link, ssl.SSLSocket):
            resumed = self._encrypt(self._connect(), link.session).session_reused
            self.say("resumption", f"session {'resumed' if resumed else 'not resumed'}")
        if self._idle:
            link.settimeout(IDLE_LIMIT)
            with contextlib.suppress(OSError):  # as where it was reset
                while link.recv(MAX_MESSAGE):
                    pass
            seconds = elapsed() - answered
            text = "closed" if seconds < IDLE_LIMIT else "still open"
            self.say("idle", f"{text} after {seconds:.1f} s")


def examine(config: Config) -> list[Finding]:
    """Examine this host and every upstream; blocks for seconds, a minute if idle."""
    host, servers = look_at_host(config), list[Examination]()
    routes = [*(("", endpoint) for endpoint in config.upstream), *config.route]
    with contextlib.suppress(ConfigError):  # which is among the findings
        servers = [Examination(each, config) for each in routes]
    pool = WorkerPool("doctor", 32, len(routes))
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
    says = time.strftime("it says %Y-%m-%d %H:%M UTC", time.gmtime())
    if any(each.result != FAIL for each in certificates):
        host.say("clock", f"{says}, within the dates of an upstream's certificate")
    elif any(re.search("expired|not valid yet", each.detail) for each in certificates):
        says += ", when no upstream's certificate is valid"
        host.say("clock", says, "set the clock of this host, by NTP if you can")
    else:
        host.say("clock", says)
    return [*host.findings, *found]


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
    result = min((each.result for each in findings), key=(FAIL, WARN, OK).index)
    checks = [finding._asdict() for finding in findings]
    return json.dumps({"version": __version__, "result": result, "checks": checks})


# ---- Running -------------------------------------------------------------------------
# A Config becomes objects, and they run until a signal.

Server = Union[UDPServer, TCPServer]
SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1}


def bind_servers(services: Services, option: str, address: Address) -> list[Server]:
    """Bind an address; port 0 becomes one that all servers have. Raises OSError."""
    stream = TCPServer(services, address, encrypted=option == "--tls-listen")
    if stream.encrypted:
        return [stream]
    try:
        return [stream, UDPServer(services, (address[0], stream.server_address[1]))]
    except OSError as error:
        stream.server_close()
        if address[1] or error.errno != errno.EADDRINUSE:
            raise
        return bind_servers(services, option, address)  # another port


def open_servers(
    config: Config, services: Services, passed: Sequence[Passed]
) -> Iterator[Server]:
    """Bind every address, or serve on what systemd passed in place of --listen."""
    for name, taken in passed:
        where = taken.getsockname()[:2]
        if taken.type == socket.SOCK_DGRAM:
            yield UDPServer(services, where, taken)
        else:
            yield TCPServer(services, where, taken, encrypted=name == "tls")
    wanted = [("--listen", address) for address in (() if passed else config.listen)]
    wanted += [("--tls-listen", address) for address in config.tls_listen]
    for option, address in wanted:
        try:
            yield from bind_servers(services, option, address)
        except OSError as error:
            if text := describe_bind_error(config, option, address, error):
                raise ConfigError(text, status=1) from error


def describe_servers(servers: Iterable[socketserver.TCPServer]) -> str:
    """Return where the servers listen, `ADDR:PORT` each once."""
    places = [server.server_address for server in servers]
    return " ".join(dict.fromkeys(write_address(str(p[0]), p[1]) for p in places))


class Daemon:
    """All objects of a running proxy, started and stopped in order."""

    STUCK = 5.0  # s after which a receiving loop that has not come round hangs

    def __init__(
        self, config: Config, passed: Sequence[Passed] = (), log: Writer | None = None
    ) -> None:
        """Build and bind everything; starts no thread. Raises ConfigError.

        `passed`: streams named `tls` are for TLS; `log`: for queries without a file.
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
            self._proxy = Proxy(config, Trust(config), self._timer, self._metrics)
            closing.callback(self._proxy.close)
            limit = config.max_tcp_clients
            pool = WorkerPool("stream", limit + 1, limit)
            clients = Clients(limit, config.max_tcp_per_client)
            shared = pool, clients, self._identity, config.reuse_port
            self._services = Services(self._proxy, Admission(config), *shared)
            closing.callback(pool.close)
            patience = min(config.timeout + 0.5, 5.5)  # glibc's resolver gives up at 5
            closing.callback(self._answer_rest, clients, patience)
            for server in open_servers(config, self._services, passed):
                self.servers.append(server)
                sockets.enter_context(server)
            if not self.servers:
                raise ConfigError("no address to listen on; mend --listen", status=1)
            self.admin = self._open_admin(config, sockets)
            self.close = closing.pop_all().close  # answers what is in flight first

    def _open_admin(
        self, config: Config, sockets: contextlib.ExitStack
    ) -> AdminServer | None:
        if config.admin is None:
            return None
        parts = self._metrics, self._proxy, self._timer, self.is_turning
        pages = AdminPages(*parts, listen=describe_servers(self.servers))
        try:
            return sockets.enter_context(AdminServer(config.admin, pages.by_path))
        except OSError as error:
            text = describe_bind_error(config, "--admin", config.admin, error)
            raise ConfigError(text, status=1) from error

    def start(self) -> None:
        """Start to serve, and connect to the upstreams."""
        parts = self._proxy, self._services.streams, self._services.clients
        self._metrics.collectors += [part.samples for part in parts]
        if self._query_file:
            self._query_file.start()
        self._timer.start()
        self._proxy.start()
        for server in (*self.servers, *([self.admin] if self.admin else [])):
            kind = type(server).__name__.removesuffix("Server").lower()
            name = f"{kind}-{server.server_address[0]!s}"
            loop = threading.Thread(target=server.serve_forever, name=name, daemon=True)
            self._loops[server] = loop
            loop.start()

    def reload(self) -> None:
        """Empty the cache; read certificate and key, and open the query log, again."""
        self._proxy.flush()
        if self._identity:
            self._identity.reload()
        if self._query_file:
            self._query_file.reopen()

    def is_turning(self, now: float) -> bool:
        """Tell whether all servers' loops turned of late; `now`: of time.monotonic."""
        return all(now - server.turned_at < self.STUCK for server in self.servers)

    def report(self) -> list[str]:
        """Return what systemd is told of how it does, and that it is alive if it is."""
        if not self.is_turning(time.monotonic()):
            return ["STATUS=a receiving loop hangs"]
        proxy, states = self._proxy, [each["state"] for each in self._proxy.facts()]
        up = f"{states.count('up')} of {len(states)} upstreams up"
        work = f"{proxy.in_flight} queries in flight, {len(proxy.cache)} answers cached"
        return ["WATCHDOG=1", f"STATUS={up}, {work}"]

    def log_state(self) -> None:
        """Write the state of the proxy and of each upstream to the log, in seconds."""
        proxy, cache = self._proxy, self._proxy.cache
        state = functools.partial(note, logging.INFO, "state", asked=True)
        octets = cache.size
        state(in_flight=proxy.in_flight, cache_entries=len(cache), cache_bytes=octets)
        for facts in proxy.facts():
            hidden = ["since", "failed_at", *["error"] * (facts["state"] == "up")]
            seconds = {k: f"{v:.3f}" for k, v in facts.items() if isinstance(v, float)}
            facts.update(seconds, **dict.fromkeys(hidden, ""))
            state(**facts)  # type: ignore[arg-type]

    def tell_ready(self, config: Config, user: str) -> None:
        """Log where it serves, whom it asks, and who it runs as."""
        encrypted = [each for each in self.servers if each.encrypted]
        note(
            *(logging.INFO, "ready"),
            listen=describe_servers(s for s in self.servers if s not in encrypted),
            tls=describe_servers(encrypted),
            upstream=" ".join(map(str, config.upstream)),
            route=" ".join(f"{domain}={server}" for domain, server in config.route),
            admin=describe_servers([self.admin] if self.admin else []),
            user=user,
            nofile=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            umask=f"{UMASK:03o}",
        )

    def _answer_rest(self, clients: Clients, seconds: float) -> None:
        """Take in no more, and have all that was asked answered in time."""
        stoppers = [threading.Thread(target=server.shutdown) for server in self._loops]
        for stopper in stoppers:
            stopper.start()
        for thread in (*stoppers, *self._loops.values()):
            thread.join()
        deadline = elapsed() + seconds
        clients.close(seconds)
        self._proxy.drain(deadline - elapsed())


def warn_of_strangers(config: Config) -> None:
    """Say what it means that strangers may ask, where they may."""
    if wide := ",".join(str(network) for network in config.allow if is_open(network)):
        why = "whoever forges a victim's address has the answers sent there"
        hint, rate = f"{why}; allow only networks of yours", f"{config.rate_limit:g}"
        event = logging.WARNING, "open to strangers"
        note(*event, allow=wide, rate_limit=rate, hint=hint)


def serve(daemon: Daemon, supervisor: Supervisor) -> None:
    """Do what signals ask for, which are blocked, until one asks for the end."""
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
        if supervisor.interval is None:
            number = signal.sigwait(SIGNALS)
        else:
            sent = signal.sigtimedwait(SIGNALS, supervisor.interval)
            number = sent.si_signo if sent else 0


def run(config: Config, log: LogHandler) -> int:
    """Serve until SIGTERM or SIGINT; return the exit status."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # in all threads, started later
    supervisor, passed = Supervisor(os.environ), inherited_sockets(os.environ)
    daemon = Daemon(fit_descriptors(config), passed, log.writer)
    user = renounce_root(config.user)
    log.writer.start()
    gc.freeze()  # 34 us of CPU per uncached query, not 43: a cache is no garbage
    gc.set_threshold(50_000, 20, 100)
    warn_of_strangers(config)
    daemon.start()
    daemon.tell_ready(config, user)
    supervisor.tell("READY=1")
    serve(daemon, supervisor)
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
        os.write(1, f"{text}\n".encode("ascii", "backslashreplace"))
    except OSError as error:
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
        print(f"dotproxy: {error}".translate(CONTROLS), file=sys.stderr)
        return error.status


if __name__ == "__main__":
    sys.exit(main())
