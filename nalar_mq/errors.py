"""Every error the runtime raises, as one tree.

Errors carry fields, not sentences to parse. Who is at fault is in the type: `ConfigError` is the user's file or command,
`BrokerError` the broker or the way to it, `WireError` bytes that came from elsewhere, `CallError` one call.

    NalarError
    ├── ConfigError
    │   ├── ManifestError            nalar.toml, with file and line
    │   ├── AppError                 the user's module cannot be loaded
    │   ├── DirectiveError           a directive is unknown, wrong or contradicts another
    │   ├── RecordingError           a file of recorded telemetry is none, or cannot be written
    │   │   ├── RecordingDamagedError    its bytes are not those that were written
    │   │   └── RecordingVersionError    it was written in another version of the format
    │   └── EngineError              a model server or its model is missing or does not start
    │       ├── EngineCrashLoopError     it ends again and again
    │       ├── EngineUnreachableError   nobody answers there, or the connection broke off
    │       └── EngineRequestError       it refuses a request; `status`, `retry_after_s`
    ├── WorkerStartError             a worker process ends again and again before it serves
    ├── NotConnectedError            a call was made outside a runtime
    ├── BrokerError
    │   ├── BrokerStartError         the embedded broker cannot start (port in use, no binary)
    │   ├── BrokerUnreachableError   nobody answers at the URL
    │   ├── BrokerTimeoutError       it has not answered in time; what it was asked may have been done
    │   ├── BrokerAuthError          the broker refuses our credentials
    │   ├── BrokerFeatureError       the broker lacks something we need (JetStream)
    │   ├── BrokerFullError          the broker has no room for what it is to keep
    │   ├── ObjectDamagedError       what the object store has does not match its checksum
    │   └── KeyConflictError         a compare-and-set met another revision
    ├── StoreError                   the state of sessions cannot be kept in a folder; `path`
    │   ├── StoreBusyError           another process has it open
    │   ├── StoreDamagedError        its files are not what was written
    │   ├── StoreForeignError        it belongs to another directory of sessions
    │   ├── StoreFullError           there is no room for what it is to keep
    │   ├── StoreLostError           another process has taken it over
    │   └── StoreVersionError        another version of nalar-mq has written it
    ├── PolicyError                  what was decided before stays in force
    │   ├── PolicyLoadError          (also a ConfigError) there is no policy where one was named
    │   ├── PolicyFailedError        it raised
    │   └── PolicyTimeoutError       it had not answered when its time was over
    ├── MigrationError               a session was not moved, and is served where it was
    ├── DrainError                   a worker was not drained; `worker`
    ├── UnknownJobError              there is no such job, or its result is not kept any more; `job_id`
    ├── UnknownCallError             nobody remembers such a call, session or job; `wanted`
    ├── UnknownQuestionError         nobody waits for an answer to that; `question_id`
    ├── QuestionClosedError          it has been answered, or its deadline has passed; `question_id`, `is_late`
    ├── AnswerError                  (also a ValueError) the answer is not what is asked for; `question_id`
    ├── CopyChangedError             what was read from an attribute of an agent is changed, which would change a copy only
    ├── WireError
    │   ├── MalformedMessageError
    │   │   └── UnknownClassError    a value of a class that this process has not loaded; `class_name`
    │   ├── UnsupportedVersionError
    │   └── AddressError             a name that cannot be a subject token
    └── CallError                    one call ended without a value; `call_id`, `actor`
        ├── UnknownActorError        nobody serves that name
        ├── UnknownMethodError
        ├── ArgumentError            (also a TypeError) arguments do not fit the signature
        ├── ValueNotEncodableError   (also a TypeError) an argument or result cannot travel
        ├── ValueTooLargeError       (also a ValueError)
        ├── ValueLostError           a large value that is missing or damaged where it was kept; `name`
        ├── RemoteError              the callee raised something that has no counterpart here
        ├── CallTimeoutError         (also a TimeoutError) the deadline passed
        ├── CallCancelledError       `started` says whether it had begun
        ├── WorkerLostError          its worker died or became unreachable
        ├── OwnerLostError           whoever wanted the result is gone
        ├── CallExpiredError         too old, or a duplicate; never run
        ├── NotAllowedError          a rule names who may call the actor, and the caller is not among them; `reason`
        ├── OverloadedError          shed; `retry_after_s`
        ├── WaitCycleError           calls wait for each other; `cycle`
        ├── StateLostError           the memory of a session went with its worker
        │   └── SessionLostError     its worker was drained, and what it kept in memory cannot move
        ├── StateDamagedError        what was kept of a session is not what was written
        ├── StateNotKeptError        what the call has changed could not be written; nothing of it stays
        ├── StateSchemaError         what was kept of a session does not fit the fields of its agent
        ├── SessionUnavailableError  nobody has the state of a session open; `retry_after_s`
        ├── WorkflowChangedError     a job was begun by other code than is there to go on; `job`, `old_version`, `new_version`
        ├── StateWriteError          managed state is changed where it can only be read
        ├── StateTypeError           (also a TypeError) what a call put into managed state is not of the type of the field
        ├── StateMutatedError        a value in managed state was changed in place and not assigned back
        └── StreamRestartedError     a stream whose chunks were already taken began again
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches


class NalarError(Exception):
    """Root of everything the runtime raises on its own account."""


class ConfigError(NalarError):
    """A setting, a file or a command line is wrong; the message says what to change."""


class ManifestError(ConfigError):
    """`nalar.toml` is wrong at `path`:`line`."""

    def __init__(self, message: str, path: str = "", line: int = 0) -> None:
        where = f"{path}:{line}: " if path and line else f"{path}: " if path else ""
        super().__init__(where + message)
        self.path = path
        self.line = line


class AppError(ConfigError):
    """The user's module cannot be imported or lacks what was named."""


class DirectiveError(ConfigError):
    """A directive is unknown, of the wrong type, or contradicts another one."""


class EngineError(ConfigError):
    """A model server or its model is missing or does not start; the message names the command that installs it."""


class RecordingError(ConfigError):
    """A file of recorded telemetry cannot be written, or is none."""


class RecordingDamagedError(RecordingError):
    """Its bytes are not those that were written."""


class RecordingVersionError(RecordingError):
    """It was written in another version of the format."""


class WorkerStartError(NalarError):
    """A worker process ended again and again, or did not become ready in time; `worker` is its name."""

    def __init__(self, message: str, worker: str = "") -> None:
        super().__init__(message)
        self.worker = worker


class EngineCrashLoopError(EngineError):
    """The model server of this machine ended `failures` times in a row, soon after it began; its supervisor tries on."""

    def __init__(self, message: str, failures: int = 0) -> None:
        super().__init__(message)
        self.failures = failures


class EngineUnreachableError(EngineError):
    """Nobody answers at `url`, or the connection broke off before the answer was complete; trying again may help."""

    def __init__(self, message: str, url: str = "") -> None:
        super().__init__(message)
        self.url = url


class EngineRequestError(EngineError):
    """The model server answered with an error.

    Attributes:
        status: the HTTP status; 200 if the error came in the middle of a stream.
        retry_after_s: seconds after which the server wants to be asked again; None if it did not say.
    """

    def __init__(self, message: str, status: int, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s


class NotConnectedError(NalarError):
    """An actor was called outside a runtime."""

    def __init__(self, actor: str = "") -> None:
        what = f"{actor!r} was called" if actor else "an actor was called"
        super().__init__(
            f"{what} outside a runtime: start the program with `nalar run`, or call it inside "
            "`async with nalar_mq.connect() as client`"
        )
        self.actor = actor


class BrokerError(NalarError):
    """Something is wrong with the broker or the way to it."""


class BrokerStartError(BrokerError):
    """The embedded broker cannot start."""


class BrokerUnreachableError(BrokerError):
    """Nobody answers at `url`."""

    def __init__(self, message: str, url: str = "") -> None:
        super().__init__(message)
        self.url = url


class BrokerTimeoutError(BrokerError):
    """The broker has not answered in time: it may be busy or away, and what it was asked may have been done."""


class BrokerAuthError(BrokerError):
    """The broker refuses the credentials it was given."""


class BrokerFeatureError(BrokerError):
    """The broker lacks something the runtime needs, such as JetStream."""


class BrokerFullError(BrokerError):
    """The broker has no room for what it is to keep; the message says what to change."""


class ObjectDamagedError(BrokerError):
    """What the object store has under a name does not match its checksum."""


class KeyConflictError(BrokerError):
    """A compare-and-set on `key` met another revision than the caller knew."""

    def __init__(self, key: str) -> None:
        super().__init__(f"key {key!r} has another revision")
        self.key = key


class StoreError(NalarError):
    """The state of sessions cannot be kept in the folder `path`; the message says what to do."""

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.path = path


class StoreBusyError(StoreError):
    """Another process has the store open."""


class StoreDamagedError(StoreError):
    """The files of a store are not what was written: it is not opened."""


class StoreForeignError(StoreError):
    """The store belongs to another directory of sessions than that of the broker and the namespace."""


class StoreCopiedError(StoreError):
    """The folder is a copy of that of a store which is open elsewhere, or has gone on elsewhere since."""


class StoreFullError(StoreError):
    """There is no room for what the store is to keep; what it has can be read, and goes on when there is room again."""


class StoreLostError(StoreError):
    """Another process has taken the store over: this one writes nothing any more."""


class StoreVersionError(StoreError):
    """Another version of nalar-mq has written the store."""


class PolicyError(NalarError):
    """Something is wrong with a policy; what was decided before stays in force."""


class PolicyLoadError(PolicyError, ConfigError):
    """There is no policy where one was named."""


class PolicyFailedError(PolicyError):
    """A policy raised; the message says what and where."""


class PolicyTimeoutError(PolicyError):
    """A policy had not answered when its time was over."""


class MigrationError(NalarError):
    """A session was not moved; the message says why. It is served where it was."""


class DrainError(NalarError):
    """Worker `worker` was not drained, or not to the end; the message says why."""

    def __init__(self, message: str, worker: str = "") -> None:
        super().__init__(message)
        self.worker = worker


class UnknownJobError(NalarError):
    """There is no job `job_id`, or its result is not kept any more."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"there is no job {job_id!r}, or its result is not kept any more")
        self.job_id = job_id


class UnknownCallError(NalarError):
    """No worker remembers a call, session or job `wanted`; empty if any call would have done."""

    def __init__(self, wanted: str, hint: str = "") -> None:
        what = f"call, session or job {wanted!r}" if wanted else "call"
        super().__init__(f"no worker remembers a {what}: each remembers its last calls only, and for as long as it lives{hint}")
        self.wanted = wanted


class UnknownQuestionError(NalarError):
    """Nobody waits for an answer to question `question_id`, or not any more."""

    def __init__(self, question_id: str) -> None:
        super().__init__(f"nobody waits for an answer to question {question_id!r}: `nalar ps --waiting` lists what is open")
        self.question_id = question_id


class QuestionClosedError(NalarError):
    """The question has its answer: another one came first, or its deadline has passed, in which case `is_late`."""

    def __init__(self, message: str, question_id: str = "", *, is_late: bool = False) -> None:
        super().__init__(message)
        self.question_id = question_id
        self.is_late = is_late


class AnswerError(NalarError, ValueError):
    """The answer does not fit what is asked for by `question_id`; the message says where."""

    def __init__(self, message: str, question_id: str = "") -> None:
        super().__init__(message)
        self.question_id = question_id


class CopyChangedError(NalarError):
    """What was read from an attribute of an agent is a copy, and refuses to be changed, since the change would be lost."""


class WireError(NalarError):
    """Bytes or names that came from elsewhere and cannot be understood."""


class MalformedMessageError(WireError):
    """Bytes that are not a message of ours."""


class ReportError(WireError):
    """A report of a process to the controllers that is not used."""


class MalformedReportError(ReportError):
    """It is no report, or what stands in it contradicts itself or the reports before it."""


class ForgedReportError(ReportError):
    """It came from another process than it says, or one process says that it is on two nodes."""


class LateReportError(ReportError):
    """It was overtaken: a later one, or one of a later incarnation, has been seen."""


class FutureReportError(ReportError):
    """Its time, or one in it, has not come yet."""


class MissedReportError(ReportError):
    """Reports before it are missing, so that what it changes is not known; everything has to be told anew."""


class UnknownClassError(MalformedMessageError):
    """A value names a class or function that no module loaded in this process has, or that may not travel.

    Attributes:
        class_name: `module:qualname` as it stood in the bytes.
    """

    def __init__(self, class_name: str) -> None:
        super().__init__(
            f"no class or function {class_name!r} that may travel is loaded in this process, which has to import it"
        )
        self.class_name = class_name


class UnsupportedVersionError(WireError):
    """A message of a wire version this process does not speak."""

    def __init__(self, version: int) -> None:
        super().__init__(f"wire version {version} is not supported by this process")
        self.version = version


class AddressError(WireError, ValueError):
    """A name that cannot be a token of a subject."""


class CallError(NalarError):
    """One call ended without a value.

    Attributes:
        call_id: id of the call in hexadecimal, empty where none was made.
        actor: `actor` or `actor.method` as the caller named it, empty where unknown.
    """

    def __init__(self, message: str, *, call_id: str = "", actor: str = "") -> None:
        super().__init__(message)
        self.call_id = call_id
        self.actor = actor


class UnknownActorError(CallError):
    """Nobody serves an actor of that name."""


class UnknownMethodError(CallError):
    """The actor has no such method."""


class ArgumentError(CallError, TypeError):
    """The arguments do not fit the signature of the callee."""


class ValueNotEncodableError(CallError, TypeError):
    """An argument or a result is of a type that cannot travel between processes."""


class ValueTooLargeError(CallError, ValueError):
    """An argument or a result is larger than what may travel.

    Attributes:
        size_bytes: the encoded size.
        limit_bytes: the largest size that is accepted.
    """

    def __init__(self, message: str, *, call_id: str = "", actor: str = "", size_bytes: int = 0, limit_bytes: int = 0) -> None:
        super().__init__(message, call_id=call_id, actor=actor)
        self.size_bytes = size_bytes
        self.limit_bytes = limit_bytes


class ValueLostError(CallError):
    """A large value is missing or damaged where it was kept; making the call again makes it again.

    Attributes:
        name: what it was kept under.
    """

    def __init__(self, message: str, *, call_id: str = "", actor: str = "", name: str = "") -> None:
        super().__init__(message, call_id=call_id, actor=actor)
        self.name = name


class RemoteError(CallError):
    """The callee raised an exception whose type is unknown in this process.

    Attributes:
        type_name: `module:qualname` of the exception at the callee.
        is_of_job: it is how a job has ended, and the message says which.
        where: of a job, the line of the program that raised it, as `file:line`; empty if that is not known.
    """

    def __init__(self, message: str, *, call_id: str = "", actor: str = "", type_name: str = "") -> None:
        super().__init__(message, call_id=call_id, actor=actor)
        self.type_name = type_name
        self.is_of_job = False
        self.where = ""


class RemoteTraceback(Exception):
    """The traceback of an exception as it stood in the callee; the `__cause__` of what a failed call raises.

    Attributes:
        traceback: the text.
        call_id: id of the failed call in hexadecimal.
        actor: who ran it.
        path: the calls that the error has come through, each as `actor` or `actor.method`, from the failed one down to where
            it was raised.
    """

    def __init__(self, traceback: str, call_id: str = "", actor: str = "", path: tuple[str, ...] = ()) -> None:
        who = f"in {' -> '.join(path or (actor,))} (call {call_id})\n" if actor else ""
        super().__init__(who + traceback)
        self.traceback = traceback
        self.call_id = call_id
        self.actor = actor
        self.path = path


def path_of(error: BaseException) -> tuple[str, ...]:
    """The calls that an error of a failed call has come through; empty for an error that was raised here."""
    return error.__cause__.path if isinstance(error.__cause__, RemoteTraceback) else ()


class CallTimeoutError(CallError, TimeoutError):
    """The deadline of the call passed before it ended."""


class CallCancelledError(CallError):
    """The call was cancelled.

    Attributes:
        started: True if it had begun to run, so that side effects may have happened.
    """

    def __init__(self, message: str, *, call_id: str = "", actor: str = "", started: bool = False) -> None:
        super().__init__(message, call_id=call_id, actor=actor)
        self.started = started


class WorkerLostError(CallError):
    """The worker that had the call died or became unreachable; whether the call ran is unknown.

    Attributes:
        worker: `name/incarnation` of the process, empty where unknown.
    """

    worker: str = ""


class OwnerLostError(CallError):
    """Whoever wanted the result is gone, so the call was ended."""


class CallExpiredError(CallError):
    """The call is older than what its session remembers, or a duplicate of one that ran; it was not run."""


class NotAllowedError(CallError):
    """A rule of the global controller names who may call the actor, and whoever made this call is not among them.

    Attributes:
        reason: of the rule; empty if it has none.
    """

    def __init__(self, message: str, *, call_id: str = "", actor: str = "", reason: str = "") -> None:
        super().__init__(message, call_id=call_id, actor=actor)
        self.reason = reason


class OverloadedError(CallError):
    """The call was shed because its worker has more than it can hold.

    Attributes:
        retry_after_s: seconds after which another attempt makes sense.
    """

    def __init__(self, message: str, *, call_id: str = "", actor: str = "", retry_after_s: float = 1.0) -> None:
        super().__init__(message, call_id=call_id, actor=actor)
        self.retry_after_s = retry_after_s


class WaitCycleError(CallError):
    """Calls wait for each other in a circle.

    Attributes:
        cycle: the members of the circle, as `actor[session]`.
    """

    def __init__(self, message: str, *, call_id: str = "", actor: str = "", cycle: tuple[str, ...] = ()) -> None:
        super().__init__(message, call_id=call_id, actor=actor)
        self.cycle = cycle


class StateLostError(CallError):
    """The session's state lived in the memory of a worker that is gone; the next call starts with an empty one."""


class SessionLostError(StateLostError):
    """The session's worker was drained, and what the session kept in memory cannot move: the call was ended, or never begun.

    Whatever keeps its state in managed fields with durability "node" or "replicated" moves instead.
    """


class StateDamagedError(CallError):
    """What was kept of a session is not what was written: it is not served. Other sessions are."""


class StateNotKeptError(CallError):
    """What the call has changed could not be written: nothing of it stays, and the session goes on as it was before."""


class StateSchemaError(CallError):
    """What was kept of a session does not fit the fields of its agent, and nothing says how to bring it there."""


class SessionUnavailableError(CallError):
    """Nobody has the state of a session open: its worker or its machine is gone. It is kept, and is not begun anew.

    Attributes:
        retry_after_s: when to try again.
    """

    def __init__(self, message: str = "", *, call_id: str = "", actor: str = "", retry_after_s: float = 5.0) -> None:
        super().__init__(message, call_id=call_id, actor=actor)
        self.retry_after_s = retry_after_s


class WorkflowChangedError(CallError):
    """A job cannot go on, since its workflow is not, or does not do, what it was when the job was begun.

    Attributes:
        job: id of the job.
        old_version: of the code that began it.
        new_version: of the code that was to go on.
    """

    def __init__(
        self, message: str, *, call_id: str = "", actor: str = "", job: str = "", old_version: str = "", new_version: str = ""
    ) -> None:
        super().__init__(message, call_id=call_id, actor=actor)
        self.job = job
        self.old_version = old_version
        self.new_version = new_version


class StateWriteError(CallError):
    """Managed state was to be changed by code that may only read it: anything but the call that holds the session."""


class StateTypeError(CallError, TypeError):
    """What a call put into managed state is not of the type that the field is annotated with; the field is as it was."""


class StateMutatedError(CallError):
    """A value in managed state was changed in place and not assigned back, so the call failed and its changes are undone."""


class StreamRestartedError(CallError):
    """A stream from which chunks were already taken began again and cannot be continued."""


def nobody_serves(actor: str, known: Sequence[str]) -> str:
    """What to say of a name that nobody serves."""
    close = get_close_matches(actor, known, n=1)
    hint = f"did you mean {close[0]!r}? Served" if close else "served"
    return f"nobody serves {actor!r}; {hint} are: {', '.join(known) or 'nothing'}"
