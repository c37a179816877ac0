"""`skerry audit`: what happened to this node's trust, and whether anybody edited that.

Leaves out: the chain itself (store.audit), and what is put into it (whoever does it).

Rules
 * Reads state.db by itself, so that it works without a daemon and does not have to believe one.
 * What was recorded is shown as it is; only --verify says whether it may be believed.
"""

from __future__ import annotations

from contextlib import closing
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from agent.cli import render
from agent.cli.session import AsJson, Session, print_json, session_of
from agent.clock import wall
from skerry.errors import ConfigError, InvalidRequest, Untrusted

if TYPE_CHECKING:
    from store.audit import Record, Report
    from store.trail import StateView

MAX_SHOWN = 100_000


def audit(  # noqa: PLR0913 - one parameter per option
    context: typer.Context,
    *,
    kind: Annotated[
        str | None,
        typer.Option(
            help="Only these: denied, registry.tamper, or daemon for all daemon.…", show_default=False
        ),
    ] = None,
    since: Annotated[
        str | None, typer.Option(metavar="AGE", help="Only the last 30m, 2h, 7d.", show_default=False)
    ] = None,
    number: Annotated[
        int, typer.Option("--number", "-n", min=1, max=MAX_SHOWN, help="At most so many, the newest.")
    ] = 50,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check that nobody edited the chain, and print its last hash.")
    ] = False,
    expect: Annotated[
        str | None,
        typer.Option(metavar="HASH", help="Check that this hash is still in the chain.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what happened to this node's models and keys, the newest first; works without a daemon."""
    session = session_of(context)
    since_unix = None if since is None else wall() - _age_s(since)
    with closing(_open(session)) as state:
        if verify or expect is not None:
            _verify(session, state.verify_events(expect), expect, as_json=as_json)
            return
        records = state.events(kind=kind, since_unix=since_unix, limit=number)
    if as_json:
        print_json({"events": [record._asdict() for record in records]})
        return
    if not records:
        session.remarks.print("no such event was recorded", markup=False)
        return
    rows = [[_time(record.at_unix), record.kind, record.subject, _what(record)] for record in records]
    session.console.print(render.table(["TIME", "KIND", "SUBJECT", "WHAT"], rows))


def _open(session: Session) -> StateView:
    from store.trail import StateStore  # noqa: PLC0415 - not for `skerry version`

    return StateStore.read_only(session.paths.state_db)


def _verify(session: Session, report: Report, expected: str | None, *, as_json: bool) -> None:
    if as_json:
        print_json(report._asdict())
    elif report.broken_seq is None:
        session.console.print(
            render.facts(
                [
                    ("events", f"{report.events}, {report.first_seq} to {report.last_seq}"),
                    ("last hash", report.last_hash or render.DASH),
                ]
            )
        )
    if report.broken_seq is not None:
        raise Untrusted(
            f"audit: event {report.broken_seq}: {report.problem}",
            "what is recorded from there on may not be believed; compare with a backup of state.db",
        )
    if report.found is False:
        raise Untrusted(
            f"audit: expected an event with the hash {expected}, got none",
            "the chain was cut off or made anew, unless the event is so old that it went (kind audit.pruned)",
        )
    if not as_json:
        session.remarks.print(
            "the chain holds; keep the last hash elsewhere: `skerry audit --expect HASH` looks for it",
            markup=False,
        )


def _age_s(text: str) -> float:
    from skerry import manifest  # noqa: PLC0415 - brings msgspec

    try:
        return manifest.seconds(text)
    except ConfigError as error:
        raise InvalidRequest(f"--since: {error}") from None


def _time(at_unix: float) -> str:
    return datetime.fromtimestamp(at_unix, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _what(record: Record) -> str:
    """The detail as words: `device=CPU count=3`."""
    return " ".join(f"{key}={_plain(value)}" for key, value in record.detail.items())


def _plain(value: object) -> str:
    if isinstance(value, str):
        return value
    import msgspec  # noqa: PLC0415 - not for `skerry version`

    return msgspec.json.encode(value).decode()
