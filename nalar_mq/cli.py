"""The command `nalar`: its options, what it prints, and how it ends.

Data goes to stdout, everything else to stderr. What a user did wrong is answered by one line that says what to do, never by
a traceback. The runtime is imported inside the commands, so that `nalar --help` answers at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import sys
import traceback
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, TextIO, cast

import click

from nalar_mq.address import LONGEST_TOKEN
from nalar_mq.errors import ConfigError
from nalar_mq.exits import EXIT_BROKER, EXIT_CALL_FAILED, EXIT_CONFIG, EXIT_INTERRUPTED, EXIT_OK, explain

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from nalar_mq.actions import Decided
    from nalar_mq.commands import BrokerChoice, CallWish, Seen
    from nalar_mq.control_commands import Trial
    from nalar_mq.controllers.overview import Overview
    from nalar_mq.installation import Finding
    from nalar_mq.job_commands import Tally
    from nalar_mq.messages import Drainage
    from nalar_mq.state_commands import SessionRow
    from nalar_mq.traces import Trace

_EPILOG: Final = """\b
Exit codes:
  0    done
  1    the call failed
  2    the command line, a setting or a file of yours is wrong
  3    the broker or a worker cannot be started or reached
  70   a fault of nalar itself
  130  interrupted

\b
Every option can be set by the environment: --workers of `nalar up` is
NALAR_UP_WORKERS. The broker is found by, in this order: --nats or --context,
NALAR_NATS_URL, NATS_URL, NATS_CONTEXT, .nalar/runtime.json beside the app,
the selected context of the nats command.

\b
Completion in bash, for this shell: eval "$(_NALAR_COMPLETE=bash_source nalar)"
(zsh_source and fish_source write that of zsh and fish).
"""


def main() -> NoReturn:
    """Entry point of the command; leaves with one of the documented exit codes."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit code."""
    options, stdout = _Options(), sys.stdout
    try:
        ended = cli.main(list(arguments), prog_name="nalar", standalone_mode=False, auto_envvar_prefix="NALAR", obj=options)
        sys.stdout.flush()
        return ended if isinstance(ended, int) else EXIT_OK
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except SystemExit:
        if sys.stdout is not stdout:  # click replaces it and wants to end when nobody reads it any more
            return EXIT_OK
        raise
    except (KeyboardInterrupt, asyncio.CancelledError, click.Abort):
        click.echo("nalar: interrupted", err=True)
        return EXIT_INTERRUPTED
    except Exception as error:
        if options.debug:
            traceback.print_exception(error)
        code, text = _explain_usage(error) if isinstance(error, click.ClickException) else explain(error)
        click.echo(text, err=True)
        return code


def _explain_usage(error: click.ClickException) -> tuple[int, str]:
    context = error.ctx if isinstance(error, click.UsageError) else None
    hint = f"\n       see `{context.command_path} --help`" if context is not None else ""
    if isinstance(error, click.NoSuchOption) and any(error.option_name in option.opts for option in cli.params):
        hint = f"\n       it goes before the command: `nalar {error.option_name} ...`"
    return EXIT_CONFIG, f"nalar: error: {error.format_message()}{hint}"


class _Options:
    """Options of the command itself, for all of its subcommands."""

    def __init__(self) -> None:
        self.debug = False
        self.log_level = "info"


_with_options = click.make_pass_decorator(_Options)


@click.group(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show tracebacks and debug logs.")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    help="What is logged on stderr.  [default: info for up, worker and controller, else warning]",
)
@click.version_option(package_name="nalar-mq", message="%(version)s", help="Print the version.")
@click.pass_context
def cli(context: click.Context, debug: bool, log_level: str | None) -> None:
    """Serve LLM agent workflows written in plain Python over NATS."""
    options = cast(_Options, context.obj)
    serves = context.invoked_subcommand in ("up", "worker", "controller")
    options.debug = debug
    options.log_level = log_level or ("debug" if debug else "info" if serves else "warning")


_Command = Callable[..., int | None]


def _broker_options(command: _Command) -> _Command:
    for option in (
        click.option("--namespace", metavar="NAME", help="First word of all subjects.  [default: nalar]"),
        click.option("--context", metavar="NAME", help="Use the broker of a context of the nats command."),
        click.option("--nats", metavar="URL", help="Use the broker at URL."),
    ):
        command = option(command)
    return command


def _call_options(command: _Command) -> _Command:
    for option in (
        click.argument("arguments", nargs=-1),
        click.option("--json-output", is_flag=True, help="Print the result as JSON even if it is text."),
        click.option("--json", metavar="JSON", help="All arguments, as one JSON object or array."),
        click.option("--stream", is_flag=True, help="Print the pieces of the result as they come."),
        click.option("--session", metavar="ID", help="The session that the call belongs to."),
        click.option("--priority", type=int, default=0, help="Higher runs earlier."),
        click.option("--timeout", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="Deadline of the call."),
    ):
        command = option(command)
    return command


_app_argument = click.argument("app", type=click.Path(path_type=Path))
_app_option = click.option("--app", type=click.Path(path_type=Path), help="The app whose runtime is meant.")
_trust_option = click.option(
    "--trust-broker", is_flag=True, help="Accept jobs although the broker acknowledges what is not on its disk yet."
)
_workers_option = click.option(
    "--workers", type=click.IntRange(min=1), help="Worker processes of a node.  [default: as the manifest says, else 2]"
)


def _capacities(context: click.Context, option: click.Parameter, text: str | None) -> dict[str, float]:
    """Amounts by name, of `NAME=AMOUNT,...`."""
    found: dict[str, float] = {}
    for part in text.split(",") if text else ():
        name, _, amount = part.partition("=")
        try:
            found[name.strip()] = float(amount)
        except ValueError:
            raise click.BadParameter(f"{part!r} is not NAME=AMOUNT") from None
        if not name.strip() or not 0 <= found[name.strip()] < math.inf:
            raise click.BadParameter(f"{part!r} is not NAME=AMOUNT, with an amount of 0 or more")
        if len(name.strip()) > LONGEST_TOKEN:
            raise click.BadParameter(f"{name.strip()[:40]!r}... is a name of more than {LONGEST_TOKEN} characters")
    from nalar_mq.directives import MOST_RESOURCES  # only here: `nalar doctor` also runs where a package is missing

    if len(found) > MOST_RESOURCES:
        raise click.BadParameter(f"a node has at most {MOST_RESOURCES} resources, not {len(found)}")
    return found


_resources_option = click.option(
    "--resources",
    "capacities",
    metavar="NAME=AMOUNT,...",
    callback=_capacities,
    help="What actors with `resources` share on a node, as gpu=2,slot=8; else every worker serves the whole app.",
)
_policy_option = click.option(
    "--policy", metavar="FILE.py:NAME", help="Policy of the global controller, loaded again when the file changes."
)
_state_option = click.option(
    "--state",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder for the managed state of sessions.  [default: NALAR_STATE, else .nalar/state beside APP]",
)
_json_option = click.option("--json", is_flag=True, help="Print JSON.")


@cli.command()
@_app_argument
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Take this machine for so many nodes.")
@_workers_option
@_resources_option
@click.option("--port", type=click.IntRange(1, 65535), help="Port of the broker.  [default: 4222 if free, else any]")
@_policy_option
@click.option("--no-controller", is_flag=True, help="Run no global controller.")
@_state_option
@_trust_option
@_broker_options
@_with_options
def up(
    options: _Options,
    /,
    app: Path,
    nodes: int,
    workers: int | None,
    capacities: dict[str, float],
    port: int | None,
    policy: str | None,
    no_controller: bool,
    state: Path | None,
    **broker: Any,
) -> None:
    """Run APP on this machine: broker, workers and controllers.

    APP is a nalar.toml, a folder that holds one, or a Python file with decorated actors. The URL of the broker is printed
    on stdout. Ctrl-C or SIGTERM lets the workers finish what has begun, and move the sessions they keep to other nodes if
    there are any; a second one ends them at once.

    With --nodes each node has workers and a local controller of its own, as if it were a machine; they stop together. There
    is one global controller, which decides by its policy; it stands by if that of another command leads already.
    """
    from nalar_mq import commands

    if policy is not None and no_controller:
        raise ConfigError("--policy is for the global controller, and --no-controller says that there is none: leave out one")
    _run(
        options,
        commands.up(
            commands.app_file(app),
            _choice(broker),
            nodes=nodes,
            workers=workers,
            capacities=capacities,
            port=port,
            policy=policy,
            controls=not no_controller,
            log_level=options.log_level,
            show=_show,
            tell=_tell,
            state=state,
        ),
    )


@cli.command()
@_app_argument
@_workers_option
@_resources_option
@click.option("--node", metavar="NAME", help="Name of this node.  [default: the host's, with a random end]")
@click.option(
    "--outlive",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long workers outlive this process if it is killed; 0: they end with it.",
)
@_state_option
@_trust_option
@_broker_options
@_with_options
def worker(
    options: _Options,
    /,
    app: Path,
    workers: int | None,
    capacities: dict[str, float],
    node: str | None,
    outlive: float,
    state: Path | None,
    **broker: Any,
) -> None:
    """Serve APP as a node of a runtime whose broker is there already.

    If this process is killed, its workers go on. The next `nalar worker` of the same APP takes them over, without a restart;
    if none comes in time, they finish what they have begun and end. Ctrl-C and SIGTERM end them in any case.
    """
    from nalar_mq import commands

    _run(
        options,
        commands.worker(
            commands.app_file(app),
            _choice(broker),
            workers=workers,
            capacities=capacities,
            node=node,
            orphan_s=outlive,
            log_level=options.log_level,
            show=_show,
            tell=_tell,
            state=state,
        ),
    )


@cli.command()
@_policy_option
@_app_option
@_broker_options
@_with_options
def controller(options: _Options, /, policy: str | None, app: Path | None, **broker: str | None) -> None:
    """Run a global controller of a runtime whose broker is there already.

    It sees all calls and decides by its policy. If another one leads, it stands by, and takes over when that is gone. Calls
    go on without any of them, by what was decided last.
    """
    from nalar_mq import commands

    file = _app(app)
    _run(options, commands.controller(_choice(broker), app=file, policy=policy, tell=_tell))


@cli.command()
@_app_argument
@click.argument("workflow")
@_call_options
@click.option("--trace", is_flag=True, help="Then show on stderr which calls were made, where each ran, and for how long.")
@_workers_option
@_broker_options
@_with_options
def run(
    options: _Options,
    /,
    app: Path,
    workflow: str,
    trace: bool,
    workers: int | None,
    nats: str | None,
    context: str | None,
    namespace: str | None,
    **call: Any,
) -> None:
    """Call WORKFLOW of APP and print its result; starts and stops what that needs.

    \b
    ARGUMENTS:
      name=value   taken as text where the parameter is annotated str,
                   else as JSON, else as text
      name:=json   taken as JSON
      value        by position, taken like name=value

    What `nalar up` runs beside APP is used if it is there; else broker and workers live as long as the call. A result that
    is text is printed as it is, any other as JSON.
    """
    from nalar_mq import commands

    choice = _choice({"nats": nats, "context": context, "namespace": namespace})
    _run(
        options,
        commands.run(
            commands.app_file(app),
            choice,
            _wish(workflow, call),
            workers=workers,
            log_level=options.log_level,
            stream=call["stream"],
            take=_printer(call["stream"], call["json_output"]),
            take_trace=_tell_trace if trace else None,
        ),
    )


@cli.command()
@click.argument("name")
@_call_options
@_app_option
@_broker_options
@_with_options
def call(
    options: _Options,
    /,
    name: str,
    app: Path | None,
    nats: str | None,
    context: str | None,
    namespace: str | None,
    **call: Any,
) -> None:
    """Call NAME, a workflow, a tool or agent.method, of a runtime that is there.

    ARGUMENTS are written as for `nalar run`. With --app the app's modules are loaded, so that its own classes can be read;
    those of the app that is up in this folder are when they are needed, except for --stream.
    """
    from nalar_mq import commands

    choice = _choice({"nats": nats, "context": context, "namespace": namespace})
    _run(
        options,
        commands.call(
            choice,
            _wish(name, call),
            app=_app(app),
            stream=call["stream"],
            take=_printer(call["stream"], call["json_output"]),
        ),
    )


@cli.command()
@click.option("--waiting", is_flag=True, help="The questions that wait for somebody's answer, instead.")
@click.option(
    "--wait",
    type=click.FloatRange(min=0),
    default=0.0,
    metavar="SECONDS",
    help="First wait until a worker serves, for so long at most: for scripts that begin with `nalar up APP &`.",
)
@_json_option
@_app_option
@_broker_options
@_with_options
def ps(options: _Options, /, waiting: bool, wait: float, json: bool, app: Path | None, **broker: str | None) -> None:
    """List the processes of a runtime, what they serve, and the calls they have in hand.

    \b
    ACTORS   what a process serves; analyst(3+1): 3 calls queued, 1 running
    CALLS    calls that it has run to their end
    FUTURES  calls that it has made and that have not ended

    Workers that have ended lately though nobody wanted it, and the embedded model server, if one runs on this machine, are
    told of, too.
    """
    from nalar_mq import commands
    from nalar_mq.engines import local_engine_state

    if waiting:
        _show_questions(options, _choice(broker), app, json)
        return
    file = _app(app)
    settings, seen, crashes = _run(options, commands.processes(_choice(broker), app=file, wait_s=wait))
    rows = [_process_row(process) for process in seen]
    engine = local_engine_state()
    if json:
        urls = list(settings.broker.urls)
        told = {"engine": engine} if engine is not None else {}
        _show_json({"broker": urls, "namespace": settings.namespace, "members": rows, "crashes": crashes, **told})
        return
    _tell(f"broker {settings.broker.urls[0]}, namespace {settings.namespace}, {len(rows)} processes")
    for node, workers in sorted(crashes.items()):
        for name, row in sorted(workers.items()):
            _tell(f"worker {name} of node {node} {row.describe()}")
    if engine is not None:
        _tell(f"engine of this machine: {engine.describe()}")
    columns = ("name", "role", "node", "pid", "state", "ended", "futures")
    table = [[*("?" if row[column] is None else str(row[column]) for column in columns), _actors_of(row)] for row in rows]
    _show_table(["NAME", "ROLE", "NODE", "PID", "STATE", "CALLS", "FUTURES", "ACTORS"], table)


def _show_questions(options: _Options, choice: BrokerChoice, app: Path | None, json: bool) -> None:
    from nalar_mq import job_commands

    found = _run(options, job_commands.questions(choice, _app(app)))
    if json:
        _show_json(found)
        return
    rows = [[q.id, q.text, q.asker, q.job or q.session, _moment(q.asked_at), _moment(q.deadline_at)] for q in found]
    _show_table(["ID", "QUESTION", "ASKER", "JOB OR SESSION", "ASKED", "UNTIL"], rows)


def _moment(at_s: float | None) -> str:
    return "" if at_s is None else datetime.fromtimestamp(at_s).isoformat(" ", "seconds")


@cli.command()
@click.argument("id")
@click.argument("answer")
@_app_option
@_broker_options
@_with_options
def answer(options: _Options, /, id: str, answer: str, app: Path | None, **broker: str | None) -> None:
    """Answer the question ID, as listed by `nalar ps --waiting`, with ANSWER in JSON."""
    from nalar_mq import job_commands

    _run(options, job_commands.answer(_choice(broker), _app(app), id, answer))
    _tell(f"question {id} is answered")


@cli.command()
@click.argument("id", required=False)
@click.option("--last", is_flag=True, help="The run that began last, instead of ID.")
@_json_option
@_app_option
@_broker_options
@_with_options
def trace(options: _Options, /, id: str | None, last: bool, json: bool, app: Path | None, **broker: str | None) -> None:
    """Show the run that ID belongs to: which call made which, where each ran, and for how long.

    ID is the id of a call in hexadecimal, a session, or a job. Times are in seconds: from the arrival of the first call to
    that of each, from there to its beginning, and from there to its end or until now. Workers remember the last 10,000
    calls each, for as long as they live.
    """
    from nalar_mq import commands

    if last == bool(id):
        raise ConfigError("name a call, a session or a job by its ID, or the last run by --last")
    file = _app(app)
    found = _run(options, commands.trace(_choice(broker), id or "", app=file))
    if json:
        _show_json(found.calls)
    else:
        _show(str(found))


@cli.command()
@click.argument("worker")
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="How long what cannot move may go on.",
)
@_json_option
@_app_option
@_broker_options
@_with_options
def drain(options: _Options, /, worker: str, grace: float, json: bool, app: Path | None, **broker: str | None) -> None:
    """Let WORKER finish what it has begun, move its sessions to other workers, and end.

    It takes nothing new from now on; what waits there goes elsewhere. Sessions that keep their state in `self` cannot move:
    when they are still in use after the grace period, their calls end with SessionLostError. The worker is not started again.
    """
    from nalar_mq import commands

    file = _app(app)
    shown: list[str] = []

    def take(progress: Drainage) -> None:
        text = (
            f"{worker}: {progress.calls} calls and {progress.jobs} jobs to end, {progress.sessions} sessions on their way, "
            f"{progress.moved} moved"
        )
        if not progress.is_over and shown[-1:] != [text]:
            shown.append(text)
            _tell(text)

    ended = _run(options, commands.drain(_choice(broker), worker, grace_s=grace, app=file, take=take))
    if json:
        told = {"moved": ended.moved, "stores": ended.stores, "lost": ended.lost, "stayed": ended.stayed}
        _show_json({"worker": worker, **told, "silent": ended.silent})
        return
    if ended.silent:
        _tell(f"{', '.join(ended.silent)} did not answer {worker}: lost, or not able to")
    _show(
        f"{worker} is drained: {ended.stores} stores handed over, {ended.moved} sessions moved, {ended.lost} in memory ended, "
        f"{ended.stayed} left on its disk"
    )


@cli.command()
@click.argument("session")
@click.option("--agent", required=True, metavar="NAME", help="Whose session it is.")
@click.option("--to", "target", required=True, metavar="WORKER", help="Where it goes.")
@click.option("--instance", default="", metavar="ID", help="Which instance within the session, if a workflow has made several.")
@_json_option
@_app_option
@_broker_options
@_with_options
def migrate(
    options: _Options,
    /,
    session: str,
    agent: str,
    target: str,
    instance: str,
    json: bool,
    app: Path | None,
    **broker: str | None,
) -> None:
    """Move SESSION of an agent to another worker, while it is used.

    Its managed state goes with it, the calls that wait, and the results of its former ones. If it cannot move, it is served
    where it was, and the reason is told.
    """
    from nalar_mq import commands

    file = _app(app)
    moved = _run(options, commands.migrate(_choice(broker), agent, session, target, instance=instance, app=file))
    if json:
        _show_json(
            {"agent": agent, "session": session, "worker": target, "frozen_s": moved.frozen_s, "bytes": moved.size_bytes}
        )
    else:
        _show(f"{agent}[{session}] is in {target}: {moved.size_bytes:,} bytes, {moved.frozen_s * 1e3:.1f} ms without a call")


@cli.command()
@_app_argument
@_json_option
@_with_options
def check(options: _Options, /, app: Path, json: bool) -> None:
    """Load APP, check it, and list its actors."""
    from nalar_mq import commands

    _configure_logs(options)
    specs = commands.load_quietly(commands.app_file(app)).actors.values()
    methods = [
        (spec, f"{spec.name}.{method.name}" if method.name else spec.name, method)
        for spec in specs
        for method in spec.methods.values()
    ]
    if json:
        _show_json(
            [
                {
                    "name": name,
                    "kind": spec.kind,
                    "signature": str(method.signature),
                    "stateful": spec.stateful,
                    "doc": spec.doc,
                }
                for spec, name, method in methods
            ]
        )
        return
    rows = [[name, spec.kind, str(method.signature), spec.doc] for spec, name, method in methods]
    _show_table(["NAME", "KIND", "SIGNATURE", "DOC"], rows)


@cli.command()
@_app_argument
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write to this file, not to stdout.")
@_with_options
def stubs(options: _Options, /, app: Path, output: Path | None) -> None:
    """Write a typed client module for APP, for programs that cannot import it."""
    from nalar_mq import commands
    from nalar_mq.client_module import client_module

    _configure_logs(options)
    text = client_module(commands.load_quietly(commands.app_file(app)))
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        output.write_text(text, "utf-8")
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {error.strerror}") from None


_wait_option = click.option("--wait", is_flag=True, help="Wait for the end and print the result.")


@cli.command()
@click.argument("workflow")
@click.argument("arguments", nargs=-1)
@click.option("--json", metavar="JSON", help="All arguments, as one JSON object or array.")
@click.option("--file", type=click.File("r", encoding="utf-8"), help="A job of every line of JSON in this file; - is stdin.")
@click.option("--id", metavar="ID", default="", help="Id of the job; with --file the ids are ID-<number of the line>.")
@click.option("--tenant", default="", metavar="NAME", help="On whose behalf; all calls of the job bear it.")
@_wait_option
@click.option("--progress", is_flag=True, help="With --file: show on stderr how many are accepted, ended and failed.")
@_trust_option
@_app_option
@_broker_options
@_with_options
def submit(
    options: _Options,
    /,
    workflow: str,
    arguments: tuple[str, ...],
    json: str | None,
    file: TextIO | None,
    id: str,
    tenant: str,
    wait: bool,
    progress: bool,
    app: Path | None,
    **broker: Any,
) -> int:
    """Make a durable call of WORKFLOW and print the job's id.

    A job is kept by the broker until it has ended, whatever happens to workers and clients. The same ID again is the same
    job. ARGUMENTS are written as for `nalar run`. With --file and --wait, one line of JSON is printed for each job, and the
    exit code is 1 if one has failed or was cancelled.
    """
    from nalar_mq import job_commands

    choice = _choice(broker)
    if file is None:
        wish = job_commands.JobWish(workflow=workflow, words=arguments, json_text=json, id=id, tenant=tenant)
        made, remark = _run(options, job_commands.submit(choice, _app(app), wish))
        if remark:
            _tell(remark)
        if not wait:
            _show(made)
            return EXIT_OK
        _tell(f"job {made}")
        with _going_on(f"job {made} goes on: `nalar result {made} --wait` waits for it"):
            _printer(False, False)(_run(options, job_commands.result(choice, _app(app), made, wait=True)))
        return EXIT_OK
    if arguments or json:
        raise ConfigError("arguments are given by --file and by words or --json: choose one of them")
    lines = job_commands.submit_lines(
        choice,
        _app(app),
        workflow,
        file,
        prefix=id,
        tenant=tenant,
        wait=wait,
        take=_show,
        take_result=_show_line,
        on_progress=_progress_line if progress else _no_progress,
    )
    with _going_on("jobs that were accepted go on: `nalar jobs` lists them, `nalar result ID --wait` waits for one"):
        tally = _run(options, lines)
    if progress:
        click.echo(err=True)
    elif tally.failed:
        _tell(str(tally))
    return EXIT_CALL_FAILED if tally.failed else EXIT_OK


@contextlib.contextmanager
def _going_on(what: str) -> Generator[None]:
    """Says what goes on if somebody does not want to wait for it any more."""
    from nalar_mq.exits import Interrupted

    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        _tell(what)
        raise


@cli.command()
@click.argument("id")
@click.option("--json-output", is_flag=True, help="Print the result as JSON even if it is text.")
@_wait_option
@_app_option
@_broker_options
@_with_options
def result(options: _Options, /, id: str, json_output: bool, wait: bool, app: Path | None, **broker: str | None) -> None:
    """Print the result of job ID."""
    from nalar_mq import job_commands

    with _going_on(f"job {id} goes on: `nalar result {id} --wait` waits for it"):
        value = _run(options, job_commands.result(_choice(broker), _app(app), id, wait=wait))
    _printer(False, json_output)(value)


@cli.command()
@click.argument("id")
@_json_option
@_app_option
@_broker_options
@_with_options
def status(options: _Options, /, id: str, json: bool, app: Path | None, **broker: str | None) -> None:
    """Print where job ID stands: queued, running, done, failed or cancelled."""
    from nalar_mq import job_commands

    found = _run(options, job_commands.status(_choice(broker), _app(app), id))
    if json:
        _show_json(found)
    else:
        _show(found.state)


@cli.command()
@click.argument("id")
@_app_option
@_broker_options
@_with_options
def cancel(options: _Options, /, id: str, app: Path | None, **broker: str | None) -> None:
    """End job ID without a result, whether it runs or not."""
    from nalar_mq import job_commands

    ended = _run(options, job_commands.cancel(_choice(broker), _app(app), id))
    _tell(f"job {id} is cancelled" if ended else f"job {id} had ended already")


@cli.command()
@click.option("--limit", type=click.IntRange(min=0), default=20, show_default=True, help="How many ended jobs to list.")
@_json_option
@_app_option
@_broker_options
@_with_options
def jobs(options: _Options, /, limit: int, json: bool, app: Path | None, **broker: str | None) -> None:
    """List jobs: how many are queued, which run, and the last ones that ended."""
    from nalar_mq import job_commands

    found = _run(options, job_commands.overview(_choice(broker), _app(app), limit))
    if json:
        _show_json(found)
        return
    queued = ", ".join(f"{count} of {workflow}" for workflow, count in found.queued.items()) or "none"
    _tell(f"not ended: {queued}")
    rows = [[job.id, job.workflow, job.state, job.worker] for job in found.running]
    rows += [[job.id, job.workflow, job.state, job.timings.finished_at] for job in found.ended]
    _show_table(["ID", "WORKFLOW", "STATE", "WORKER OR END"], rows)


@cli.group(name="dead-letters")
def dead_letters() -> None:
    """Jobs that could not be done, with their cause."""


@dead_letters.command()
@_json_option
@_app_option
@_broker_options
@_with_options
def ls(options: _Options, /, json: bool, app: Path | None, **broker: str | None) -> None:
    """List the dead letters."""
    from nalar_mq import job_commands

    letters = _run(options, job_commands.dead_letters(_choice(broker), _app(app)))
    if json:
        _show_json(letters)
        return
    rows = [[letter.key, letter.workflow, letter.failed_at, letter.cause] for letter in letters]
    _show_table(["KEY", "WORKFLOW", "FAILED", "CAUSE"], rows)


@dead_letters.command()
@click.argument("keys", nargs=-1)
@click.option("--all", "every", is_flag=True, help="All of them.")
@_app_option
@_broker_options
@_with_options
def retry(options: _Options, /, keys: tuple[str, ...], every: bool, app: Path | None, **broker: str | None) -> None:
    """Publish the dead letters KEYS again."""
    from nalar_mq import job_commands

    _check_chosen(keys, every)
    published, removed = _run(options, job_commands.retry(_choice(broker), _app(app), keys))
    _tell(f"{published} published again")
    if removed:
        _tell(f"{removed} removed only: what failed there had been published again before, and the job has ended")


@dead_letters.command()
@click.argument("keys", nargs=-1)
@click.option("--all", "every", is_flag=True, help="All of them.")
@_app_option
@_broker_options
@_with_options
def drop(options: _Options, /, keys: tuple[str, ...], every: bool, app: Path | None, **broker: str | None) -> None:
    """Remove the dead letters KEYS for good."""
    from nalar_mq import job_commands

    _check_chosen(keys, every)
    count = _run(options, job_commands.drop(_choice(broker), _app(app), keys))
    _tell(f"{count} removed")


def _check_chosen(keys: tuple[str, ...], every: bool) -> None:
    if bool(keys) == every:
        raise ConfigError("name the dead letters by their keys, or all of them by --all")


def _show_line(value: object) -> None:
    import msgspec

    _show(msgspec.json.encode(value).decode())


def _progress_line(tally: Tally) -> None:
    if tally.accepted == tally.ended or (tally.accepted + tally.ended) % 100 == 0:
        click.echo(f"\r{tally}", nl=False, err=True)


def _no_progress(_tally: Tally) -> None:
    """Nobody wants to know."""


@cli.group()
def state() -> None:
    """What agents keep of their sessions, in the stores of workers on this machine.

    Reading works while workers run; what writes wants their stores for itself.
    """


def _state_options(command: _Command) -> _Command:
    for option in (
        click.option(
            "--state",
            "folder",
            type=click.Path(path_type=Path),
            metavar="DIR",
            help="Folder of the stores.  [default: NALAR_STATE, else .nalar/state beside the app or here]",
        ),
        _app_option,
    ):
        command = option(command)
    return command


def _state_folder(folder: Path | None, app: Path | None, *, load: bool = False) -> Path:
    from nalar_mq import commands
    from nalar_mq.config import find_state

    file = _app(app)
    if file is not None and load:
        commands.load_quietly(file)
    return find_state(str(folder) if folder else "", file.parent if file else Path.cwd())


@state.command(name="ls")
@click.argument("agent", required=False)
@_json_option
@_state_options
@_with_options
def ls_state(options: _Options, /, agent: str | None, json: bool, folder: Path | None, app: Path | None) -> None:
    """List the stores, or the sessions of AGENT."""
    from nalar_mq import state_commands

    _configure_logs(options)
    where = _state_folder(folder, app)
    if agent is not None:
        _show_sessions(list(state_commands.sessions(where, agent)), json)
        return
    rows = state_commands.stores(where)
    if json:
        _show_json(rows)
        return
    head = ["STORE", "ID", "BYTES", "SESSIONS", "OPEN IN"]
    _show_table(
        head, [[row.store, row.id, str(row.size_bytes), str(row.sessions), _opener(row.open_in, row.pid)] for row in rows]
    )
    for row in rows:
        if row.problem:
            _tell(row.problem)


def _opener(name: str, pid: int | None) -> str:
    return f"{name} ({pid})" if pid is not None else ""


def _show_sessions(rows: Sequence[SessionRow], json: bool) -> None:
    import datetime as dt

    if json:
        _show_json(rows)
        return

    def used(row: SessionRow) -> str:
        return dt.datetime.fromtimestamp(row.used_s).astimezone().isoformat(" ", "seconds") if row.used_s else ""

    head = ["SESSION", "STORE", "ENTRIES", "BYTES", "LAST USED", ""]
    table = [
        [row.session, row.store, str(row.entries), str(row.size_bytes), used(row), "damaged" if row.problem else row.standing]
        for row in rows
    ]
    _show_table(head, table)
    for row in rows:
        if row.problem:
            _tell(row.problem)


@state.command(name="show")
@click.argument("agent")
@click.argument("session")
@_state_options
@_with_options
def show_state(options: _Options, /, agent: str, session: str, folder: Path | None, app: Path | None) -> None:
    """Print what AGENT keeps of SESSION, as JSON.

    With --app the app's modules are loaded, so that values of its own classes can be read.
    """
    import msgspec

    from nalar_mq import state_commands
    from nalar_mq.annotations import to_json

    _configure_logs(options)
    found = state_commands.show(_state_folder(folder, app, load=True), agent, session)
    _show(msgspec.json.format(to_json(found), indent=2).decode())


@state.command(name="export")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--agent", "agents", multiple=True, metavar="NAME", help="Only the sessions of this agent; can be repeated.")
@click.option("--skip-damaged", is_flag=True, help="Leave damaged sessions out, and name them.")
@_state_options
@_with_options
def export_state(
    options: _Options,
    /,
    file: Path,
    agents: tuple[str, ...],
    skip_damaged: bool,
    folder: Path | None,
    app: Path | None,
) -> None:
    """Write all sessions into FILE, each as it is at one moment."""
    from nalar_mq import state_commands

    _configure_logs(options)
    done = state_commands.export(_state_folder(folder, app), file, agents=agents, skip_damaged=skip_damaged)
    for problem in done.skipped:
        _tell(problem)
    _tell(f"{done.sessions:,} sessions exported" + (f", {len(done.skipped):,} left out" if done.skipped else ""))


@state.command(name="import")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--replace", is_flag=True, help="Replace sessions that are there already.")
@_state_options
@_with_options
def import_state(options: _Options, /, file: Path, replace: bool, folder: Path | None, app: Path | None) -> None:
    """Put the sessions of FILE, which `export` has written, into the stores.

    FILE is read whole before anything is written. A broker that belongs to the app takes the sessions over when its
    workers start; for any other, say `nalar state adopt` then.
    """
    from nalar_mq import state_commands

    _configure_logs(options)
    count = state_commands.restore(_state_folder(folder, app), file, replace=replace)
    _tell(f"{count:,} sessions imported")


@state.command(name="verify")
@_state_options
@_with_options
def verify_state(options: _Options, /, folder: Path | None, app: Path | None) -> int:
    """Read all stores whole and check all there is; print what is not as it was written."""
    from nalar_mq import state_commands

    _configure_logs(options)
    count = 0
    for finding in state_commands.verify(_state_folder(folder, app)):
        _show(finding)
        count += 1
    _tell(f"{count:,} findings" if count else "all is as it was written")
    return EXIT_CALL_FAILED if count else EXIT_OK


@state.command(name="compact")
@_state_options
@_with_options
def compact_state(options: _Options, /, folder: Path | None, app: Path | None) -> None:
    """Write the stores anew without the room that nothing uses."""
    from nalar_mq import state_commands

    _configure_logs(options)
    for store, before, after in state_commands.compact(_state_folder(folder, app)):
        _tell(f"store {store}: {before:,} bytes before, {after:,} now")


@state.command(name="drop")
@click.argument("agent")
@click.argument("session")
@_state_options
@_with_options
def drop_state(options: _Options, /, agent: str, session: str, folder: Path | None, app: Path | None) -> None:
    """Remove what AGENT keeps of SESSION for good, damaged or not."""
    from nalar_mq import state_commands

    _configure_logs(options)
    state_commands.drop(_state_folder(folder, app), agent, session)
    _tell(f"session {session!r} of {agent!r} is removed")


@state.command(name="adopt")
@_state_options
@_broker_options
@_with_options
def adopt_state(options: _Options, /, folder: Path | None, app: Path | None, **broker: str | None) -> None:
    """Enter the sessions of the stores in the directory of a broker, so that its workers may serve them.

    For stores that were written under another broker, or into which sessions were imported; and for a copy of a store that is
    to go on in place of it.
    """
    from nalar_mq import state_commands

    file = _app(app)
    for store, count, left_out in _run(options, state_commands.adopt(_choice(broker), file, _state_folder(folder, app))):
        _tell(f"store {store}: {count:,} sessions" + (f", {left_out:,} of them are held elsewhere" if left_out else ""))


@cli.command(name="explain")
@click.argument("future")
@_json_option
@_app_option
@_broker_options
@_with_options
def explain_call(options: _Options, /, future: str, json: bool, app: Path | None, **broker: str | None) -> None:
    """Tell what happened to FUTURE, the id of a call in hexadecimal, and why.

    When it came, where it was sent, which priorities it got, where its session moved, and what the controller had decided
    about it meanwhile. Workers remember the last 10,000 calls each, for as long as they live.
    """
    from nalar_mq import control_commands

    file = _app(app)
    found = _run(options, control_commands.explain(_choice(broker), app=file, call=future))
    if json:
        _show_json(found)
        return
    _tell(f"{found.call}, session {found.session}, made by {found.owner}: {found.state}")
    for step in found.steps:
        clock = datetime.fromtimestamp(step.at_s).isoformat(" ", "milliseconds")
        _show(f"{clock}  {step.where}  {_with_reason(step.what, step.reason)}")


@cli.command()
@click.option("--once", is_flag=True, help="Show it once, not again and again.")
@click.option("--every", type=click.FloatRange(min=0.1), default=1.0, show_default=True, metavar="SECONDS", help="How often.")
@_json_option
@_app_option
@_broker_options
@_with_options
def top(options: _Options, /, once: bool, every: float, json: bool, app: Path | None, **broker: str | None) -> int | None:
    """Show what the global controller sees: nodes, agents, queues, the longest waits, the last decisions and why.

    \b
    LOAD     calls in hand for each that can run at once
    SKEW     the most loaded instance as a multiple of their mean
    WORK     mean seconds that a call runs; WAIT: that it waits before
    """
    from nalar_mq import control_commands

    file = _app(app)
    take = (_show_json if once else _show_line) if json else _show_overview if once else None
    seen = control_commands.overviews(_choice(broker), app=file, every_s=every)
    return cast("int | None", _run(options, _shown_once(seen, take) if take and once else _shown_live(seen, take)))


async def _shown_once(seen: AsyncGenerator[Overview | None], take: Callable[[Any], None]) -> int:
    async with contextlib.aclosing(seen) as overviews:
        found = await anext(overviews)
    if found is None:
        _tell(_NOBODY_LEADS)
        return EXIT_BROKER
    take(found)
    return EXIT_OK


async def _shown_live(seen: AsyncGenerator[Overview | None], take: Callable[[Any], None] | None) -> None:
    """Shows again and again, in place on a terminal, until somebody interrupts."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    async with contextlib.aclosing(seen) as overviews:
        if take is not None or not sys.stdout.isatty():
            async for found in overviews:
                if found is None:
                    _tell(_NOBODY_LEADS)
                else:
                    (take or _show_overview)(found)
            return
        with Live(screen=True, auto_refresh=False) as live:
            async for found in overviews:
                shown = Text(_NOBODY_LEADS) if found is None else Group(*_overview_parts(found))
                live.update(shown, refresh=True)


_FAILING: Final = "the policy fails, and what was decided before holds on"
_NOBODY_LEADS: Final = "no global controller answers: start one with `nalar controller`"


def _show_overview(overview: Overview) -> None:
    _print(_overview_parts(overview))


def _overview_parts(overview: Overview) -> list[RenderableType]:
    from rich.text import Text

    unused = sum(overview.unused.values())
    head = (
        f"{overview.controller} leads, policy {overview.policy}, round {overview.rounds} took {overview.round_s * 1e3:.1f} ms\n"
        f"{overview.processes} processes, {overview.futures} calls in hand, {overview.sessions} sessions"
        + (f", {unused} reports that could not be used" if unused else "")
        + (f"\n{_FAILING}: {overview.error}" if overview.error else "")
    )
    nodes = [
        [row.name, str(row.count), str(row.queued), str(row.running), _resources_of(row.resources)] for row in overview.nodes
    ]
    agents = [
        [
            row.name,
            row.kind,
            str(row.instances),
            str(row.queued),
            str(row.running),
            f"{row.load:.2f}",
            f"{row.imbalance:.2f}",
            f"{row.work_s:.3f}",
            f"{row.wait_s:.3f}",
        ]
        for row in overview.agents
    ]
    waits = [
        [row.future, row.call, row.session, row.worker, row.state, f"{row.waited_s:.1f}", str(row.priority)]
        for row in overview.waits
    ]
    engines = [
        [
            row.name,
            str(row.workers),
            str(row.running),
            "-" if row.waiting is None else str(row.waiting),
            "-" if row.cache_used is None else f"{row.cache_used:.0%}",
            f"{row.tokens_per_s:.1f}",
            str(row.requests),
            str(row.errors),
        ]
        for row in overview.engines
    ]
    spent = [[row.scope, row.name, f"{row.amount:g}", row.unit] for row in overview.spent]
    parts: list[RenderableType] = [Text(head)]
    for columns, rows in (
        (["NODE", "WORKERS", "QUEUED", "RUNNING", "RESOURCES"], nodes),
        (["AGENT", "KIND", "INSTANCES", "QUEUED", "RUNNING", "LOAD", "SKEW", "WORK", "WAIT"], agents),
        (["ENGINE", "WORKERS", "RUNNING", "WAITING", "CACHE", "TOKENS/S", "REQUESTS", "ERRORS"], engines),
        (["SPENT BY", "NAME", "AMOUNT", "UNIT"], spent),
        (["WAITING CALL", "OF", "SESSION", "AT", "STATE", "SECONDS", "PRIORITY"], waits),
    ):
        if rows:
            parts += [Text(), _table(columns, rows)]
    lines = [line for entry in overview.decisions for line in _decided_lines(entry)]
    return [*parts, Text("\n" + "\n".join(lines[-20:]))] if lines else parts


def _resources_of(resources: Mapping[str, tuple[float, float]]) -> str:
    return ", ".join(f"{name} {used:g}/{whole:g}" for name, (used, whole) in resources.items())


@cli.group()
def policy() -> None:
    """What the global controller decides, and why."""


@policy.command(name="show")
@_json_option
@_app_option
@_broker_options
@_with_options
def show_policy(options: _Options, /, json: bool, app: Path | None, **broker: str | None) -> None:
    """Show what holds now: routes, priorities, limits, permissions; who decides, and by which policy.

    What was decided last holds on when nobody leads.
    """
    from nalar_mq import control_commands
    from nalar_mq.actions import describe

    file = _app(app)
    found = _run(options, control_commands.in_force(_choice(broker), app=file))
    if json:
        _show_json(found)
        return
    _tell(f"{found.leader} leads" if found.leader else "nobody leads, and what was decided last holds on")
    _tell(
        f"policy {found.policy or 'unknown'}, record {found.number} of term {found.term}"
        if found.term
        else "nothing is decided"
    )
    if found.error:
        _tell(f"{_FAILING}: {found.error}")
    for state in found.states:
        _show(_with_reason(describe(state), state.reason))
    if found.ranked and found.ranked.sessions:
        _show(_with_reason(f"{found.ranked.sessions} sessions have priorities", found.ranked.reason))


@policy.command(name="history")
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True, help="How many entries, the last ones.")
@_json_option
@_app_option
@_broker_options
@_with_options
def policy_history(options: _Options, /, limit: int, json: bool, app: Path | None, **broker: str | None) -> None:
    """Show what was decided, what was refused, and why; the broker keeps the last 1,000 entries for a week.

    Reports of processes that could not be used are among what was refused.
    """
    from nalar_mq import control_commands

    file = _app(app)
    found = _run(options, control_commands.history(_choice(broker), app=file, limit=limit))
    if json:
        _show_json(found)
        return
    for entry in found:
        for line in _decided_lines(entry):
            _show(line)


@policy.command(name="explain-access")
@click.argument("caller")
@click.argument("target")
@click.option("--tenant", default="", metavar="NAME", help="On whose behalf.")
@_json_option
@_app_option
@_broker_options
@_with_options
def explain_access(
    options: _Options, /, caller: str, target: str, tenant: str, json: bool, app: Path | None, **broker: str | None
) -> int:
    """Say whether CALLER, an agent, tool, workflow or client, may call TARGET, and by which rule.

    The exit code is 0 if it may, 1 if it may not, and 2 if nobody serves TARGET and there is no rule about it.
    """
    from nalar_mq import control_commands
    from nalar_mq.actions import describe

    file = _app(app)
    asked = control_commands.access(_choice(broker), app=file, caller=caller, target=target, tenant=tenant)
    found = _run(options, asked)
    if json:
        _show_json(found)
    else:
        rule = _with_reason(describe(found.rule), found.rule.reason) if found.rule else f"there is no rule about {target}"
        _show(f"{caller} {'may' if found.is_allowed else 'may not'} call {target}: {rule}")
    if not found.is_known:
        _tell(f"nobody serves {caller!r} now, and no process has that name")
    return EXIT_OK if found.is_allowed else EXIT_CALL_FAILED


@policy.command(name="test")
@click.argument("policy", metavar="FILE.py:NAME")
@click.option("--seconds", type=click.FloatRange(min=0), default=3.0, show_default=True, help="For how long it is asked.")
@_json_option
@_app_option
@_broker_options
@_with_options
def try_policy(options: _Options, /, policy: str, seconds: float, json: bool, app: Path | None, **broker: str | None) -> int:
    """Ask a policy about what is there now, and show what it would decide and what would be refused. Nothing takes effect.

    The exit code is 1 if it gave no answer.
    """
    from nalar_mq import control_commands

    file = _app(app)
    take = _trial_printer(json)
    trial = _run(options, control_commands.test(_choice(broker), app=file, policy=policy, seconds=seconds, take=take))
    return _tell_trial(trial)


@policy.command()
@click.argument("trace", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--seconds", type=click.FloatRange(min=0), help="For how long.  [default: until Ctrl-C]")
@_app_option
@_broker_options
@_with_options
def record(options: _Options, /, trace: Path, seconds: float | None, app: Path | None, **broker: str | None) -> None:
    """Write what all processes report into the file TRACE, for `nalar policy replay`."""
    from nalar_mq import control_commands

    file = _app(app)
    done = _run(options, control_commands.record(_choice(broker), app=file, file=trace, seconds=seconds))
    _tell(f"{done.reports:,} reports, {done.size_bytes:,} bytes")


@policy.command()
@click.argument("policy", metavar="FILE.py:NAME")
@click.argument("trace", type=click.Path(dir_okay=False, path_type=Path))
@_json_option
@_with_options
def replay(options: _Options, /, policy: str, trace: Path, json: bool) -> int:
    """Ask a policy about what was recorded in TRACE, and show what it would have decided; times are those of the recording.

    The exit code is 1 if it gave no answer.
    """
    from nalar_mq import control_commands

    return _tell_trial(_run(options, control_commands.replay(trace, policy, _trial_printer(json))))


def _trial_printer(json: bool) -> Callable[[Decided], None]:
    def show(entry: Decided) -> None:
        if json:
            _show_line(entry)
            return
        for line in _decided_lines(entry, clock=f"{entry.at_s:8.2f} s"):
            _show(line)

    return show


def _tell_trial(trial: Trial) -> int:
    _tell(
        f"asked {trial.rounds} times, {trial.failures} times without an answer; {trial.refused} actions refused; "
        f"{trial.processes} processes and {trial.futures} calls in hand in the end"
    )
    if not trial.processes:
        _tell("no process has reported anything: is this the runtime that is meant?")
    return EXIT_CALL_FAILED if trial.failures else EXIT_OK


def _decided_lines(entry: Decided, clock: str = "") -> list[str]:
    """An entry of the history, a line for each thing."""
    from nalar_mq.actions import describe

    clock = clock or _moment(entry.at_s)
    lines = [f"{clock}  {entry.controller} leads, term {entry.term}, policy {entry.policy}"] if entry.took_lead else []
    lines += [f"{clock}  {_with_reason(describe(state), state.reason)}" for state in entry.began]
    lines += [f"{clock}  no more: {describe(state)}" for state in entry.ended]
    if entry.ranked:
        lines.append(f"{clock}  {_with_reason(f'{entry.ranked.sessions} sessions get priorities', entry.ranked.reason)}")
    lines += [f"{clock}  {_with_reason(describe(act), act.reason)}" for act in entry.acts]
    lines += [f"{clock}  refused: {_with_reason(refused.action, refused.reason)}" for refused in entry.refused]
    lines += [
        f"{clock}  {unused.count} reports of {unused.process} not used: {unused.error}: {unused.reason}"
        for unused in entry.reports
    ]
    lines += [f"{clock}  no answer, all stays as it was: {entry.error}"] if entry.error else []
    lines += [f"{clock}  and {entry.left_out} more"] if entry.left_out else []
    return lines


def _with_reason(what: str, reason: str) -> str:
    return ": ".join(filter(None, (what, reason)))


@cli.group()
def model() -> None:
    """The embedded model, for laptops and demonstrations."""


@model.command()
def install() -> None:
    """Install the embedded model; does nothing if it is there."""
    from nalar_mq.engines import install_model

    click.echo(install_model())


@model.command()
def path() -> None:
    """Print where the embedded model lies."""
    from nalar_mq.engines import model_path

    click.echo(model_path())


@cli.command()
@_json_option
@_app_option
@_broker_options
@_with_options
def doctor(options: _Options, /, json: bool, app: Path | None, **broker: str | None) -> int:
    """Look for what would keep a runtime from working on this machine.

    Each finding is one line: ok, warning (something does not work) or wrong (nothing does), what is there, and what to do.
    A broker of our own is started for a moment, and the one that is named is asked. Nothing is left behind.
    """
    from nalar_mq.installation import examine_installation, exit_code

    findings: list[Finding] = []

    def take(finding: Finding) -> None:
        findings.append(finding)
        if not json:
            _show(str(finding))

    for finding in examine_installation():
        take(finding)
    if exit_code(findings) == EXIT_OK:  # else the rest cannot even be imported
        from nalar_mq import commands

        file = _app(app)
        _run(options, commands.doctor(_choice(broker), app=file, take=take))
    if json:
        _show_findings(findings)
    return exit_code(findings)


@cli.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option(
    "--role", type=click.Choice(["worker", "client", "controller", "visitor"]), default="worker", help="[default: worker]"
)
@click.option("--namespace", metavar="NAME", help="First word of all subjects.  [default: nalar]")
@click.option("--tenant", default="", metavar="NAME", help="Of a visitor: on whose behalf its jobs run, and no others.")
def permissions(names: tuple[str, ...], role: str, namespace: str | None, tenant: str) -> None:
    """Print what processes may do at a broker of yours, as a block for their user in its configuration.

    NAME is that of a process: the workers of `nalar worker --node N` are N-1, N-2 and so on, the name of a client begins with
    client-. A visitor is any other NATS client, whose name does not matter. With these permissions nobody can speak in the name
    of somebody else. They create no streams: `nalar prepare` does, with credentials that may do all.
    """
    from nalar_mq.address import Subjects
    from nalar_mq.config import find_namespace
    from nalar_mq.permissions import Role, as_configuration, permissions_of

    if tenant and role != "visitor":
        raise ConfigError("--tenant is for visitors: other processes say themselves on whose behalf they call")
    subjects = Subjects(find_namespace(namespace))
    click.echo(as_configuration(permissions_of(subjects, name, Role(role), tenant) for name in names), nl=False)


@cli.command()
@_app_option
@_broker_options
@_with_options
def prepare(options: _Options, /, app: Path | None, **broker: str | None) -> None:
    """Create the streams and buckets of a runtime at a broker, for processes that may not.

    What exists stays as it is.
    """
    from nalar_mq import commands

    _run(options, commands.prepare(_choice(broker), app=_app(app)))


@cli.command()
def version() -> None:
    """Print the version, and whether the hot modules are compiled."""
    from importlib.metadata import version as installed

    from nalar_mq.installation import is_compiled

    click.echo(f"{installed('nalar-mq')} (compiled)" if is_compiled() else installed("nalar-mq"))


def _run(options: _Options, command: Coroutine[Any, Any, Any]) -> Any:
    from nalar_mq import event_loop
    from nalar_mq.commands import interruptible

    _configure_logs(options)
    return event_loop.run(interruptible(command))


def _configure_logs(options: _Options) -> None:
    from nalar_mq.logs import Level, configure_logs

    configure_logs(cast("Level", options.log_level))


def _choice(values: Mapping[str, Any]) -> BrokerChoice:
    from nalar_mq.commands import BrokerChoice

    return BrokerChoice(**values)


def _app(path: Path | None) -> Path | None:
    """The file of the app that is meant; None for what is up in this folder."""
    from nalar_mq.commands import app_file

    return app_file(path) if path else None


def _wish(name: str, values: dict[str, Any]) -> CallWish:
    from nalar_mq.commands import CallWish

    return CallWish(
        name=name,
        words=values["arguments"],
        json_text=values["json"],
        session=values["session"],
        timeout_s=values["timeout"],
        priority=values["priority"],
    )


def _show(text: str) -> None:
    click.echo(text)
    sys.stdout.flush()


def _tell(text: str) -> None:
    click.echo(f"nalar: {text}", err=True)


def _printer(stream: bool, json_output: bool) -> Callable[[Any], None]:
    from nalar_mq import values

    def show_value(value: object) -> None:
        is_text = isinstance(value, str) and not json_output
        click.echo(value if is_text else values.to_json(value), nl=not (stream and is_text))
        sys.stdout.flush()

    return show_value


def _show_json(value: object) -> None:
    import msgspec

    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2))


def _show_findings(findings: Sequence[Finding]) -> None:
    import json  # msgspec may be what is missing

    rows = [{"check": each.check, "state": each.state.value, "found": each.found, "advice": each.advice} for each in findings]
    _show(json.dumps(rows, indent=2, ensure_ascii=False))


def _show_table(head: list[str], rows: list[list[str]]) -> None:
    _print([_table(head, rows)])


def _print(parts: Sequence[RenderableType]) -> None:
    """Through `click`: where nobody reads any more, rich would end the process in its own way."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 1000, highlight=False, markup=False)
    with console.capture() as printed:
        for part in parts:
            console.print(part)
    _show(printed.get().removesuffix("\n"))


def _table(head: list[str], rows: list[list[str]]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    on_terminal = sys.stdout.isatty()
    table = Table(*head, box=SIMPLE_HEAD if on_terminal else None, padding=(0, 1, 0, 0), pad_edge=False)
    table.columns[0].no_wrap = True  # the others give way where the terminal is narrow
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _process_row(process: Seen) -> dict[str, Any]:
    member, glance = process.member, process.glance
    return {
        "name": process.name,
        "role": member.role,
        "node": member.node,
        "pid": member.pid,
        "state": "silent" if glance is None else "draining" if member.draining else "serving",
        "ended": glance and glance.ended,
        "futures": glance and glance.futures,
        "actors": {
            actor: {
                "kind": info.kind,
                "methods": info.methods,
                "stateful": info.stateful,
                "doc": info.doc,
                "queued": glance and glance.actors.get(actor, (0, 0))[0],
                "running": glance and glance.actors.get(actor, (0, 0))[1],
            }
            for actor, info in member.actors.items()
        },
    }


def _actors_of(row: dict[str, Any]) -> str:
    def shown(name: str, actor: dict[str, Any]) -> str:
        busy = actor["queued"] or actor["running"]
        return f"{name}({actor['queued']}+{actor['running']})" if busy else name

    return ", ".join(shown(name, actor) for name, actor in row["actors"].items())


def _tell_trace(trace: Trace) -> None:
    click.echo(f"\n{trace}", err=True)
