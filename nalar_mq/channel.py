"""Channels: between two living processes every message arrives once and in order, or both sides learn that the other is lost.

A channel joins two *incarnations* (lives of processes). It is opened by its first frame, needs no handshake, carries both
directions, and ends for good when one of the two ends or is held to have ended: a pair of incarnations that is lost stays
lost, and whoever comes back comes as a higher incarnation. The transport underneath may lose, double, delay and reorder.

Frames
    Messages to one process made in one turn of the event loop travel together, in frames of up to 256 messages or 64 KiB; a
    larger message travels alone. A full frame leaves at once, so that a program which makes many calls in one turn has
    others working on the first of them while it makes the last. A message in no hurry may linger a little, so as to travel
    with the next one that is. Frames of one direction are numbered from 1. A frame is
    encoded once, kept as bytes until it is acknowledged, and sent again as the same bytes. The receiver hands frames on in
    order, keeps a bounded number of those that came too early, and drops those it had.

Acknowledgement
    `ack` is the highest frame received in order. Every frame out carries it; if none goes out, a bare acknowledgement (a frame
    numbered 0) follows after `ack_delay_s`, or in the next turn once 8 frames or half a window of messages wait for it, or
    when a frame was seen before (its acknowledgement was lost).

Sending again
    When the oldest frame is not acknowledged within `resend_after_s` (doubling up to `resend_limit_s` while nothing moves), the
    oldest 32 frames are sent again; a little later if this process itself stood still meanwhile. If that moves the
    acknowledgement but leaves older frames than the latest one of that moment, the next 32 follow at once. After a reconnect
    of the transport this starts immediately; while it is away nothing is sent at all.

Window
    At most `window_calls` calls, and with them about 8 MiB, are in frames that are not acknowledged; further calls wait in
    order and can be withdrawn. The window is as wide as a burst: who makes many calls in one turn hears of no acknowledgement
    before its end, and what waits until then is worked on by nobody.
    Everything else passes outside the window and may overtake calls that wait there. Since receiving never waits for sending,
    and acknowledgements need no window, two processes that flood each other through windows of one go on.

Incarnations
    The sender's name is the last token of the subject, which the broker guards; its incarnation stands in the frame. What the
    broker passes on for somebody else, and so without a look at the sender, is dropped (`transport.is_direct`).

    from a higher incarnation than the channel's    the old channel is lost, another begins with this frame
    from a lower one, or from one held to be lost   answered with `Gone(source=mine, target=mine, answered=theirs)`
    for a lower incarnation than mine               answered with `Gone(source=mine, target=meant, answered=theirs)`
    for a higher incarnation than mine              ignored: a successor of mine is meant, which answers for itself

    `Gone` ends the channel to `target` if `source` is higher, or if `answered` is me. `Bye` ends the channel to its source, and
    says which frames that has taken: those after it were read by nobody, like those that never left; and whether all that it
    had sent to anybody was read, so that what it has passed on for others is where they were told. Between taking its leave
    and closing, a process answers every frame with a `Bye`. A first frame (one that opens a channel) acknowledges nothing; one
    that does, or any frame that acknowledges what was never sent, is malformed.

Loss
    When a channel ends, `on_lost` gets every message that the other side did not acknowledge, once: those that never left or
    were read by nobody, and those of which it is unknown whether they arrived. Messages to an incarnation held to be lost come
    back in the next turn.

State of one direction:  sent >= acked;  unacked = frames acked+1 .. sent;  then sealed frames, the open frame, waiting calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import msgspec

from nalar_mq.address import Address, Subjects, is_token
from nalar_mq.errors import BrokerError, UnsupportedVersionError, ValueTooLargeError, WireError
from nalar_mq.logs import logger
from nalar_mq.messages import (
    WIRE_VERSION,
    Arrived,
    Bye,
    Call,
    Crossing,
    Forward,
    Frame,
    Gone,
    Locate,
    Located,
    Message,
    Release,
    Returned,
    decode_packet,
    encode_frame,
    encode_message,
    encode_packet,
    salvage_frame,
)
from nalar_mq.transport import Delivered, Subscription, Transport, is_direct

_log = logger(__name__)

_FRAME_MESSAGES = 256
_FRAME_BYTES = 64 * 1024
_HEADROOM_BYTES = 1024
_ACK_FRAMES = 8
_BURST_FRAMES = 32
_WINDOW_BYTES = 8 * 1024 * 1024
_EARLY_FRAMES = 256
_EARLY_BYTES = 16 * 1024 * 1024
_REMEMBERED_NAMES = 100_000
_GONE_EVERY_S = 0.1

_WITHOUT_ID = Locate | Located | Release | Forward | Crossing | Arrived | Returned

OnMessages = Callable[[Address, Sequence[Message]], None]
OnLost = Callable[[Address, list[Message], list[Message], bool], None]


class ChannelStats(msgspec.Struct):
    """What an endpoint has seen since it was made.

    Attributes:
        frames_sent: with messages, each counted once.
        frames_resent: times a frame was sent again.
        frames_received: with messages, in order and for the first time.
        messages_sent: in `frames_sent`.
        messages_received: in `frames_received`.
        acks_sent: bare acknowledgements.
        duplicates: frames that had been received before.
        early: frames that came before their turn and were kept.
        overflowed: frames that came before their turn and were dropped.
        indirect: packets that JetStream passed on for somebody: their sender is not who the subject says.
        malformed: packets that made no sense, and unreadable messages in frames that otherwise did.
        unsupported: packets of another wire version.
        stray: packets that were not for this incarnation or for no open channel.
        gone_sent: answers to stray frames.
        lost: channels that ended by loss.
    """

    frames_sent: int = 0
    frames_resent: int = 0
    frames_received: int = 0
    messages_sent: int = 0
    messages_received: int = 0
    acks_sent: int = 0
    duplicates: int = 0
    early: int = 0
    overflowed: int = 0
    indirect: int = 0
    malformed: int = 0
    unsupported: int = 0
    stray: int = 0
    gone_sent: int = 0
    lost: int = 0


class _Channel:
    """Both directions between this process and one incarnation of another."""

    __slots__ = (
        "acked",
        "address",
        "bytes_out",
        "calls_out",
        "early",
        "early_bytes",
        "incarnation",
        "is_dirty",
        "is_lost",
        "open_bytes",
        "open_calls",
        "open_parts",
        "owed_frames",
        "owed_messages",
        "owes_now",
        "read",
        "received",
        "recover",
        "resend_after_s",
        "resend_at_s",
        "resent",
        "sealed",
        "sent",
        "subject",
        "unacked",
        "waiting",
    )

    def __init__(self, address: Address, subject: str, resend_after_s: float) -> None:
        self.address = address
        self.incarnation = address.incarnation
        self.subject = subject
        self.is_dirty = False
        self.is_lost = False
        self.sent = 0
        self.acked = 0
        self.unacked: deque[tuple[bytes, int, int]] = deque()  # a frame, its calls, the bytes of its messages
        self.sealed: deque[tuple[list[bytes], int, int]] = deque()
        self.open_parts: list[bytes] = []
        self.open_bytes = 0
        self.open_calls = 0
        self.waiting: OrderedDict[bytes, bytes] = OrderedDict()
        self.calls_out = 0
        self.bytes_out = 0
        self.resend_after_s = resend_after_s
        self.resend_at_s = 0.0
        self.resent = 0
        self.recover = 0
        self.read = sys.maxsize  # of our frames by the other side, once that has said so
        self.received = 0
        self.early: dict[int, tuple[Sequence[Message], int]] = {}
        self.early_bytes = 0
        self.owed_frames = 0
        self.owed_messages = 0
        self.owes_now = False

    def add(self, data: bytes, *, is_call: bool) -> int:
        """Puts an encoded message into the open frame, and counts a call against the window; returns how many it holds."""
        size_bytes = self.open_bytes + len(data)
        if size_bytes > _FRAME_BYTES and self.open_parts:
            self.seal()
            size_bytes = len(data)
        self.open_bytes = size_bytes
        self.bytes_out += len(data)
        if is_call:
            self.calls_out += 1
            self.open_calls += 1
        parts = self.open_parts
        parts.append(data)
        return len(parts)

    def seal(self) -> None:
        """Ends the open frame."""
        if self.open_parts:
            self.sealed.append((self.open_parts, self.open_calls, self.open_bytes))
            self.open_parts = []
            self.open_bytes = 0
            self.open_calls = 0

    def admit(self, window_calls: int) -> bool:
        """Moves waiting calls into frames as far as the window allows; True if any."""
        before = len(self.waiting)
        while self.waiting and self.has_room(window_calls):
            if self.add(self.waiting.popitem(last=False)[1], is_call=True) >= _FRAME_MESSAGES:
                self.seal()
        return len(self.waiting) < before

    def has_room(self, window_calls: int) -> bool:
        """True if the window lets another call out."""
        return self.calls_out < window_calls and self.bytes_out < _WINDOW_BYTES

    def acknowledge(self, ack: int) -> None:
        """Forgets the frames up to `ack`."""
        for _ in range(ack - self.acked):
            _, calls, size_bytes = self.unacked.popleft()
            self.calls_out -= calls
            self.bytes_out -= size_bytes
        self.acked = ack

    def is_settled(self) -> bool:
        """True if the other side has acknowledged everything."""
        return not (self.unacked or self.sealed or self.open_parts or self.waiting)

    def unsent(self) -> Iterable[bytes]:
        """Encoded messages that never left, in order."""
        for parts, _, _ in self.sealed:
            yield from parts
        yield from self.open_parts
        yield from self.waiting.values()


class Endpoint:
    """The channels of one incarnation of a process.

    All methods are called on the event loop the endpoint was started on. `on_messages` gets the messages of one frame, in
    order; `on_lost` gets the messages that never left and those of unknown fate, and whether all that the lost process had
    sent to anybody was read. Both may call the endpoint; what they raise
    is logged and changes nothing.

    Args:
        transport: connection of this process; stays the caller's.
        subjects: of the namespace.
        me: name and incarnation of this process.
        on_messages: called with the sender and its messages.
        on_lost: called with an incarnation that is lost, the messages that never left, those of unknown fate, and True if it
            took its leave when all it had sent had been read.
        window_calls: calls that may be on the way to one process without being acknowledged.
        ack_delay_s: longest time that a received frame stays unacknowledged.
        resend_after_s: time after which a frame that is not acknowledged is sent again, at first.
        resend_limit_s: the same after many attempts.
        linger_s: how long a message that may linger waits for others to travel with.
    """

    # Of an object with more than 30 attributes Python finds each method, and each attribute, anew.
    __slots__ = (
        "_ack_delay_s",
        "_ack_messages",
        "_ack_timer",
        "_awaiting",
        "_box",
        "_channels",
        "_connected_at",
        "_dirty",
        "_flushing",
        "_gone_at_s",
        "_is_closed",
        "_is_deaf",
        "_limit_bytes",
        "_linger_s",
        "_linger_timer",
        "_lingering",
        "_loop",
        "_lost",
        "_on_lost",
        "_on_messages",
        "_owing",
        "_read",
        "_resend_after_s",
        "_resend_limit_s",
        "_resend_timer",
        "_settled",
        "_subjects",
        "_subscription",
        "_transport",
        "_was_late",
        "_was_settled",
        "_window_calls",
        "me",
        "stats",
    )

    def __init__(
        self,
        transport: Transport,
        subjects: Subjects,
        me: Address,
        *,
        on_messages: OnMessages,
        on_lost: OnLost,
        window_calls: int = 65_536,
        ack_delay_s: float = 0.02,
        resend_after_s: float = 0.25,
        resend_limit_s: float = 2.0,
        linger_s: float = 0.005,
    ) -> None:
        if window_calls < 1:
            raise ValueError(f"window_calls is {window_calls}: at least one call must be able to leave")
        self.me = me
        self.stats = ChannelStats()
        self._transport = transport
        self._subjects = subjects
        self._box = subjects.box(me.name, "")
        self._on_messages = on_messages
        self._on_lost = on_lost
        self._was_settled = False
        self._connected_at = -math.inf
        self._window_calls = window_calls
        self._ack_messages = window_calls // 2
        self._ack_delay_s = ack_delay_s
        self._resend_after_s = resend_after_s
        self._resend_limit_s = resend_limit_s
        self._linger_s = linger_s
        self._limit_bytes = transport.max_payload - _HEADROOM_BYTES
        self._channels: dict[str, _Channel] = {}
        self._lost: dict[str, int] = {}
        self._gone_at_s: dict[str, float] = {}
        self._dirty: list[_Channel] = []
        self._lingering: dict[_Channel, None] = {}
        self._owing: dict[_Channel, None] = {}
        self._awaiting: dict[_Channel, None] = {}
        self._settled: list[asyncio.Future[None]] = []
        self._loop = asyncio.get_running_loop()
        self._flushing: asyncio.Handle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None
        self._ack_timer: asyncio.TimerHandle | None = None
        self._resend_timer: asyncio.TimerHandle | None = None
        self._was_late = False
        self._subscription: Subscription | None = None
        self._is_closed = False
        self._is_deaf = False
        self._read: dict[Address, int] = {}

    async def start(self) -> None:
        """Subscribes; when it returns, other processes can reach this one."""
        self._transport.on_connection(self._on_connection)
        self._subscription = await self._transport.subscribe(self._subjects.box_filter(self.me.name), self._on_delivered)

    def send(self, to: Address, message: Message, *, linger: bool = False) -> None:
        """Sends `message`; it leaves at the end of this turn of the loop or in a full frame before, a `Call` not before the
        window has room. With `linger` it leaves with whatever follows it to the same process, after `linger_s` at the latest.

        To an incarnation that is lost it comes back through `on_lost` in the next turn. To one that is higher than the last
        one known, that one's channel is lost first. A call sent again under its id while it waits replaces the one that
        waits. After `aclose` it does nothing.

        Raises:
            ValueTooLargeError: it is larger than one message of the transport holds.
        """
        data = encode_message(message)
        if len(data) > self._limit_bytes:
            raise _too_large(message, len(data), self._limit_bytes)
        channel = self._channels.get(to.name)
        if channel is None or channel.incarnation != to.incarnation:
            channel = self._open(to)
            if channel is None:
                self._refuse(to, message)
                return
        if type(message) is Call and not channel.has_room(self._window_calls):
            channel.waiting[message.id] = data
            return
        if channel.add(data, is_call=type(message) is Call) >= _FRAME_MESSAGES:
            channel.seal()
            if self._transport.is_connected and not self._is_closed:
                self._send_frames(channel)
        elif not channel.is_dirty:
            if linger:
                self._let_linger(channel)
            else:
                self._soil(channel)

    def flush(self) -> None:
        """Sends what this turn has made so far, for who knows that little more will come of it."""
        if self._flushing is not None:
            self._flushing.cancel()
            self._flush()

    def withdraw(self, to: Address, call_id: bytes) -> bool:
        """Takes a call back that still waits for the window; True if it did, and so never leaves."""
        channel = self._channel(to)
        if channel is None or channel.waiting.pop(call_id, None) is None:
            return False
        self._note_progress()
        return True

    def connected_for_s(self) -> float:
        """For how long the broker has been reached; 0 while it is not, and nothing is heard of others either."""
        return self._loop.time() - self._connected_at if self._transport.is_connected else 0.0

    def pending_calls(self, to: Address) -> int:
        """Calls to `to` that wait for the window or are not acknowledged."""
        channel = self._channel(to)
        return channel.calls_out + len(channel.waiting) if channel is not None else 0

    def lose(self, address: Address, *, was_settled: bool = False) -> None:
        """Holds `address`, and every earlier incarnation of that name, to be lost; `on_lost` is called before it returns.

        With `was_settled`, it has said that all it had sent was read.
        """
        channel = self._channels.get(address.name)
        was_lost = self._lost.get(address.name, -1) >= address.incarnation
        self._remember_lost(address)
        if channel is not None and channel.incarnation <= address.incarnation:
            self._lose(channel, was_settled=was_settled)
        elif not was_lost:
            self._give_back(address, [], [], was_settled)  # what others have sent there for us is lost, too

    async def drain(self, timeout_s: float) -> bool:
        """Waits until everything sent is acknowledged or lost; False if `timeout_s` pass first."""
        deadline_s = self._loop.time() + timeout_s
        while not all(channel.is_settled() for channel in self._channels.values()):
            remaining_s = deadline_s - self._loop.time()
            if remaining_s <= 0 or self._is_closed:
                return False
            progress: asyncio.Future[None] = self._loop.create_future()
            self._settled.append(progress)
            await asyncio.wait([progress], timeout=remaining_s)
        return True

    def stop_reading(self) -> None:
        """Reads no messages from now on, only what others say of ours; `leave` tells them what has not been read."""
        self._is_deaf = True

    def leave(self) -> None:
        """Sends what this turn made and takes leave of everybody: nothing is sent or read from now on; idempotent.

        What is not acknowledged is not given back: `drain` first if it matters. Others are told what has not been read.
        """
        if self._is_closed:
            return
        self._end_lingering()
        self._flush()
        self._was_settled = all(channel.is_settled() for channel in self._channels.values())
        self._is_closed = True
        for timer in (self._flushing, self._linger_timer, self._ack_timer, self._resend_timer):
            if timer is not None:
                timer.cancel()
        for channel in self._channels.values():
            channel.is_lost = True
            self._read[channel.address] = channel.received
            self._say_bye(channel.subject, channel.received)
        self._channels.clear()
        self._note_progress()

    def _say_bye(self, subject: str, received: int) -> None:
        self._publish(subject, encode_packet(Bye(WIRE_VERSION, self.me.incarnation, received, self._was_settled)))

    async def aclose(self) -> None:
        """Takes leave of everybody, and stops listening; idempotent."""
        self.leave()
        subscription, self._subscription = self._subscription, None
        if subscription is None:
            return
        await subscription.unsubscribe()
        if not self._transport.is_connected:
            return
        try:
            await self._transport.flush()
        except BrokerError:
            _log.debug("channel.bye_unsent", process=self.me.name)

    def _channel(self, address: Address) -> _Channel | None:
        channel = self._channels.get(address.name)
        return channel if channel is not None and channel.incarnation == address.incarnation else None

    def _open(self, address: Address) -> _Channel | None:
        """The channel to `address`, opened if need be; None if that incarnation is lost or superseded."""
        name, incarnation = address
        old = self._channels.get(name)
        if old is not None and old.incarnation < incarnation:
            self._remember_lost(old.address)
            self._lose(old)
            old = self._channels.get(name)
        if old is not None:
            return old if old.incarnation == incarnation else None
        if self._is_closed or incarnation <= self._lost.get(name, -1):
            return None
        channel = _Channel(Address(name, incarnation), self._subjects.box(name, self.me.name), self._resend_after_s)
        self._channels[name] = channel
        return channel

    def _refuse(self, to: Address, message: Message) -> None:
        nothing: list[Message] = []
        if not self._is_closed:
            self._loop.call_soon(self._give_back, to, [message], nothing)

    def _give_back(self, address: Address, unsent: list[Message], unknown: list[Message], was_settled: bool = False) -> None:
        try:
            self._on_lost(address, unsent, unknown, was_settled)
        except Exception:
            _log.exception("channel.handler_failed", process=address.name)

    def _remember_lost(self, address: Address) -> None:
        known = self._lost.pop(address.name, -1)
        self._lost[address.name] = max(known, address.incarnation)
        if len(self._lost) > _REMEMBERED_NAMES:
            del self._lost[next(iter(self._lost))]

    def _lose(self, channel: _Channel, *, was_settled: bool = False) -> None:
        if channel.is_lost:
            return
        channel.is_lost = True
        del self._channels[channel.address.name]
        self._awaiting.pop(channel, None)
        self._owing.pop(channel, None)
        self.stats.lost += 1
        frames = [salvage_frame(data)[0] for data, _, _ in channel.unacked]
        unknown = [message for frame in frames if frame.seq <= channel.read for message in frame.messages]
        unread = [message for frame in frames if frame.seq > channel.read for message in frame.messages]
        wrapped = encode_frame(0, 0, 0, 0, list(channel.unsent()))
        self._give_back(channel.address, [*unread, *salvage_frame(wrapped)[0].messages], unknown, was_settled)
        self._note_progress()

    def _note_progress(self) -> None:
        for waiter in self._settled:
            if not waiter.done():
                waiter.set_result(None)
        self._settled.clear()

    # Sending

    def _soil(self, channel: _Channel) -> None:
        """Has `channel` looked at when this turn of the loop ends."""
        channel.is_dirty = True
        self._dirty.append(channel)
        if self._flushing is None and not self._is_closed:
            self._flushing = self._loop.call_soon(self._flush)

    def _let_linger(self, channel: _Channel) -> None:
        self._lingering[channel] = None
        if self._linger_timer is None and not self._is_closed:
            self._linger_timer = self._loop.call_later(self._linger_s, self._on_linger_timer)

    def _on_linger_timer(self) -> None:
        self._linger_timer = None
        self._end_lingering()
        self.flush()

    def _end_lingering(self) -> None:
        for channel in self._lingering:
            if channel.open_parts and not channel.is_dirty and not channel.is_lost:
                self._soil(channel)
        self._lingering.clear()

    def _flush(self) -> None:
        self._flushing = None
        if not self._transport.is_connected:
            return
        dirty, self._dirty = self._dirty, []
        for channel in dirty:
            channel.is_dirty = False
            if channel.is_lost:
                continue
            channel.seal()
            if channel.sealed:
                self._send_frames(channel)
            elif channel.owes_now:
                self._send_ack(channel)

    def _send_frames(self, channel: _Channel) -> None:
        self._settle_ack(channel)
        stats = self.stats
        while channel.sealed:
            parts, calls, size_bytes = channel.sealed.popleft()
            channel.sent += 1
            data = encode_frame(self.me.incarnation, channel.incarnation, channel.sent, channel.received, parts)
            channel.unacked.append((data, calls, size_bytes))
            stats.frames_sent += 1
            stats.messages_sent += len(parts)
            self._publish(channel.subject, data)
        if channel not in self._awaiting:
            channel.resend_after_s = self._resend_after_s
            channel.resend_at_s = self._loop.time() + self._resend_after_s
            self._awaiting[channel] = None
            if self._resend_timer is None:
                self._resend_timer = self._loop.call_at(channel.resend_at_s, self._on_resend_timer)

    def _send_ack(self, channel: _Channel) -> None:
        self._settle_ack(channel)
        self.stats.acks_sent += 1
        frame = Frame(WIRE_VERSION, self.me.incarnation, channel.incarnation, 0, channel.received)
        self._publish(channel.subject, encode_packet(frame))

    def _settle_ack(self, channel: _Channel) -> None:
        channel.owes_now = False
        channel.owed_frames = 0
        channel.owed_messages = 0
        self._owing.pop(channel, None)

    def _publish(self, subject: str, data: bytes) -> None:
        try:
            self._transport.publish(subject, data)
        except ValueTooLargeError:
            # The broker now accepts less than when the message was sent; the channel stands until one side gives it up.
            _log.error("channel.frame_too_large", subject=subject, size_bytes=len(data))

    def _on_resend_timer(self) -> None:
        now_s = self._loop.time()
        due_s = self._resend_timer.when() if self._resend_timer is not None else now_s
        self._resend_timer = None
        # A loop that stood still has acknowledgements lying unread: it looks at them first, but not twice in a row.
        self._was_late = not self._was_late and now_s - due_s > self._resend_after_s / 2
        if self._transport.is_connected and not self._was_late:
            for channel in self._awaiting:
                if channel.resend_at_s <= now_s:
                    self._start_recovery(channel, now_s)
        if self._awaiting:
            earliest_s = min(channel.resend_at_s for channel in self._awaiting)
            # Not later than the first time-out of a channel that begins to wait meanwhile, and not in a busy loop.
            next_s = min(max(earliest_s, now_s + self._resend_after_s / 4), now_s + self._resend_after_s)
            self._resend_timer = self._loop.call_at(next_s, self._on_resend_timer)

    def _start_recovery(self, channel: _Channel, now_s: float) -> None:
        channel.resend_after_s = min(channel.resend_after_s * 2, self._resend_limit_s)
        channel.resend_at_s = now_s + channel.resend_after_s
        channel.recover = channel.sent
        self._resend(channel)

    def _resend(self, channel: _Channel) -> None:
        count = min(_BURST_FRAMES, channel.recover - channel.acked)
        for data, _, _ in islice(channel.unacked, count):
            self._publish(channel.subject, data)
        channel.resent = channel.acked + count
        self.stats.frames_resent += count

    def _on_ack_timer(self) -> None:
        self._ack_timer = None
        if self._transport.is_connected:
            for channel in list(self._owing):
                self._send_ack(channel)

    def _on_connection(self, connected: bool) -> None:
        if not connected or self._is_closed:
            return
        now_s = self._connected_at = self._loop.time()
        for channel in self._awaiting:
            channel.resend_after_s = self._resend_after_s
            self._start_recovery(channel, now_s)
        for channel in self._owing:
            channel.owes_now = True
            if not channel.is_dirty:
                self._soil(channel)
        if self._dirty and self._flushing is None:
            self._flushing = self._loop.call_soon(self._flush)

    # Receiving

    def _on_delivered(self, delivered: Delivered) -> None:
        if self._is_closed:
            self._answer_bye(delivered)
            return
        if not is_direct(delivered, self._box):
            self.stats.indirect += 1
            return
        try:
            packet = decode_packet(delivered.data)
        except UnsupportedVersionError:
            self.stats.unsupported += 1
            return
        except WireError:
            self.stats.malformed += 1
            salvaged = _salvaged(delivered.data)
            if salvaged is None:
                return
            packet = salvaged
        sender = self._subjects.box_sender(delivered.subject)
        if type(packet) is Frame:
            self._on_frame(sender, packet, len(delivered.data))
        elif type(packet) is Gone:
            self._on_gone(sender, packet)
        elif type(packet) is Bye:
            self._on_bye(sender, packet)

    def _answer_bye(self, delivered: Delivered) -> None:
        with contextlib.suppress(WireError):
            frame, _ = salvage_frame(delivered.data)
            sender = self._subjects.box_sender(delivered.subject)
            if frame.seq > 0 and frame.target == self.me.incarnation and is_token(sender):
                self._say_bye(self._subjects.box(sender, self.me.name), self._read.get(Address(sender, frame.source), 0))

    def _on_frame(self, sender: str, frame: Frame, size_bytes: int) -> None:
        if frame.target != self.me.incarnation:
            self.stats.stray += 1
            if frame.target < self.me.incarnation:
                self._answer_gone(sender, frame)
            return
        channel = self._channels.get(sender)
        if channel is None or channel.incarnation != frame.source:
            channel = self._meet(sender, frame)
            if channel is None:
                return
        if not 0 <= frame.ack <= channel.sent or frame.seq < 0:
            self.stats.malformed += 1
            return
        if frame.ack > channel.acked:
            self._on_ack(channel, frame.ack)
        if self._is_deaf:
            return
        if frame.seq == channel.received + 1:
            self._accept(channel, frame.messages)
            while channel.early and not channel.is_lost and (early := channel.early.pop(channel.received + 1, None)):
                channel.early_bytes -= early[1]
                self._accept(channel, early[0])
        elif frame.seq:
            self._on_unexpected(channel, frame, size_bytes)

    def _meet(self, sender: str, frame: Frame) -> _Channel | None:
        """The channel that begins with `frame`, if one may."""
        if frame.seq <= 0 or frame.ack != 0 or frame.source < 0 or not is_token(sender):
            self.stats.stray += 1
            return None
        channel = self._open(Address(sender, frame.source))
        if channel is None:
            self.stats.stray += 1
            self._answer_gone(sender, frame)
        return channel

    def _accept(self, channel: _Channel, messages: Sequence[Message]) -> None:
        channel.received += 1
        channel.owed_frames += 1
        channel.owed_messages += len(messages)
        self.stats.frames_received += 1
        self.stats.messages_received += len(messages)
        self._owe(channel, channel.owed_frames >= _ACK_FRAMES or channel.owed_messages >= self._ack_messages)
        if not messages:
            return
        try:
            self._on_messages(channel.address, messages)
        except Exception:
            _log.exception("channel.handler_failed", process=channel.address.name)

    def _owe(self, channel: _Channel, at_once: bool) -> None:
        """Makes sure that `channel` acknowledges, with a frame that goes out anyway or alone."""
        if at_once:
            channel.owes_now = True
            if not channel.is_dirty:
                self._soil(channel)
        elif channel not in self._owing:
            self._owing[channel] = None
            if self._ack_timer is None:
                self._ack_timer = self._loop.call_later(self._ack_delay_s, self._on_ack_timer)

    def _on_unexpected(self, channel: _Channel, frame: Frame, size_bytes: int) -> None:
        if frame.seq <= channel.received or frame.seq in channel.early:
            self.stats.duplicates += 1
            self._owe(channel, at_once=True)
        elif frame.seq - channel.received <= _EARLY_FRAMES and channel.early_bytes + size_bytes <= _EARLY_BYTES:
            self.stats.early += 1
            channel.early[frame.seq] = (frame.messages, size_bytes)
            channel.early_bytes += size_bytes
        else:
            self.stats.overflowed += 1

    def _on_ack(self, channel: _Channel, ack: int) -> None:
        channel.acknowledge(ack)
        if channel.unacked:
            channel.resend_after_s = self._resend_after_s
            channel.resend_at_s = self._loop.time() + self._resend_after_s
            if channel.resent <= ack < channel.recover:
                self._resend(channel)
        else:
            self._awaiting.pop(channel, None)
        if channel.waiting and channel.admit(self._window_calls) and not channel.is_dirty:
            self._soil(channel)
        if self._settled:
            self._note_progress()

    def _answer_gone(self, sender: str, frame: Frame) -> None:
        now_s = self._loop.time()
        if now_s < self._gone_at_s.get(sender, now_s) or not is_token(sender):
            return
        if len(self._gone_at_s) >= _REMEMBERED_NAMES:
            self._gone_at_s.clear()
        self._gone_at_s[sender] = now_s + _GONE_EVERY_S
        self.stats.gone_sent += 1
        gone = Gone(WIRE_VERSION, self.me.incarnation, frame.target, frame.source)
        self._publish(self._subjects.box(sender, self.me.name), encode_packet(gone))

    def _on_gone(self, sender: str, gone: Gone) -> None:
        channel = self._channels.get(sender)
        is_about_me = gone.source == gone.target and gone.answered == self.me.incarnation
        if channel is None or channel.incarnation != gone.target or not (gone.source > gone.target or is_about_me):
            self.stats.stray += 1
            return
        self._remember_lost(channel.address)
        self._lose(channel)

    def _on_bye(self, sender: str, bye: Bye) -> None:
        if bye.source < 0 or not is_token(sender):
            self.stats.malformed += 1
            return
        channel = self._channels.get(sender)
        if channel is not None and channel.incarnation == bye.source and bye.received is not None:
            channel.read = bye.received
        self.lose(Address(sender, bye.source), was_settled=bye.was_settled)


def _salvaged(data: bytes) -> Frame | None:
    try:
        return salvage_frame(data)[0]
    except WireError:
        return None


def _too_large(message: Message, size_bytes: int, limit_bytes: int) -> ValueTooLargeError:
    kind = type(message).__name__.lower()
    actor = message.actor if isinstance(message, Call) else ""
    call_id = "" if isinstance(message, _WITHOUT_ID) else message.id.hex()
    text = f"a {kind} of {size_bytes} bytes is larger than the {limit_bytes} that one message carries"
    return ValueTooLargeError(text, call_id=call_id, actor=actor, size_bytes=size_bytes, limit_bytes=limit_bytes)
