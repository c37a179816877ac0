"""What `skerry repo` says: what came of a command, whose signatures are wanted, how the repository stands.

Rule: every command ends with what has to happen next, as a command line where there is one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent.cli import render

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from agent.cli.session import Session
    from store.repository import Outcome, Repository
    from store.standing import Pending, Standing

SHORT_ID = 12
DAY_S = 86_400


class Names:
    """Key ids as people read them: the beginning, and the label if the repository knows one."""

    def __init__(self, standing: Standing) -> None:
        self._labels = {key.id: key.label for key in standing.keys}

    def __call__(self, keyid: str) -> str:
        """'ab12cd34ef56 (bob)'."""
        label = self._labels.get(keyid)
        return f"{keyid[:SHORT_ID]} ({label})" if label else keyid[:SHORT_ID]

    def list(self, keyids: Iterable[str]) -> str:
        """Several, with commas."""
        return ", ".join(self(keyid) for keyid in keyids)


def tell(session: Session, repository: Repository, outcome: Outcome) -> None:
    """Say what a command came to, and what has to happen next."""
    from store.standing import standing  # noqa: PLC0415 - brings TUF

    found = standing(repository)
    names = Names(found)
    for remark in outcome.remarks:
        session.say("note", remark)
    if outcome.published:
        session.say("published", ", ".join(f"{role} {number}" for role, number in outcome.published.items()))
    for item in found.roles:
        if item.pending is not None:
            session.say("waiting", f"{item.role} {item.pending.version}: {wanted(item.pending, names)}")
    asked = {
        keyid
        for item in found.roles
        if item.pending and not item.pending.complete
        for party in item.pending.parties
        for keyid in party.unsigned
    }
    for keyid, why in outcome.absent.items():
        if keyid in asked:
            session.say("no key", f"{names(keyid)}: {why}")
    for line in next_steps(found, published=bool(outcome.published)):
        session.say("next", line)


def wanted(pending: Pending, names: Names) -> str:
    """Who has to sign a draft, or what it waits for."""
    if pending.complete:
        return "complete, waits for " + (", ".join(pending.after) or "the next command")
    said = []
    for party, who in zip(pending.parties, _whose(pending), strict=True):
        missing = party.needed - len(party.signed)
        if missing > 0:
            of = f" of the {who}" if who else ""
            said.append(
                f"{len(party.signed)} of {party.needed} signatures{of}, wants {names.list(party.unsigned)}"
            )
    return "; ".join(said)


def next_steps(found: Standing, *, published: bool) -> list[str]:
    """What has to happen now."""
    incomplete = [item for item in found.roles if item.pending and not item.pending.complete]
    online = {"snapshot", "timestamp"}
    steps = [
        f"carry {item.pending.file} to who has a key: skerry repo sign FILE --key KEY; then here: skerry repo sign FILE"
        for item in incomplete
        if item.pending and item.role not in online
    ]
    if any(item.role in online for item in incomplete):
        steps.append("where the key of snapshot and timestamp is: skerry repo refresh")
    if published:
        steps.append("bring it to where devices find it: skerry repo publish-dir DIR")
    return steps or ["nothing"]


def print_standing(session: Session, found: Standing) -> None:
    """The tables of `skerry repo status`."""
    names = Names(found)
    facts = [
        ("repository", found.folder),
        ("root", found.root or "not published yet"),
        ("models", str(found.models)),
    ]
    roles = [
        [
            item.role,
            str(item.version) if item.version else render.DASH,
            expiry(item.expires, found.now),
            f"{item.threshold} of {len(item.keys)}",
            ", ".join(item.paths) or render.DASH,
        ]
        for item in found.roles
    ]
    pending = [row for item in found.roles if item.pending for row in _rows(item.role, item.pending, names)]
    keys = [
        [key.id[:SHORT_ID], key.label or render.DASH, key.uri or render.DASH, ", ".join(key.roles)]
        for key in found.keys
    ]
    session.console.print(render.facts(facts))
    for headings, rows in (
        (["ROLE", ">VERSION", "EXPIRES IN", "SIGNERS", "NAMES"], roles),
        (["PENDING", ">VERSION", "WHOSE", "SIGNED", "STILL TO SIGN"], pending),
        (["KEY", "NAME", "SIGNS HERE BY", "SIGNS FOR"], keys),
    ):
        if rows:
            session.console.print()
            session.console.print(render.table(headings, rows))
    for line in next_steps(found, published=False):
        if line != "nothing":
            session.say("next", line)


def _rows(role: str, pending: Pending, names: Names) -> list[list[str]]:
    """A line for each party that has to sign."""
    rows = []
    for party, whose in zip(pending.parties, _whose(pending), strict=True):
        done = len(party.signed) >= party.needed
        left = render.DASH if done else names.list(party.unsigned)
        if pending.complete:
            left = f"nobody; waits for {', '.join(pending.after) or 'the next command'}"
        signed = f"{len(party.signed)} of {party.needed}"
        rows.append([role, str(pending.version), whose or render.DASH, signed, left])
    return rows


def _whose(pending: Pending) -> tuple[str, ...]:
    return ("keys in force", "new keys") if len(pending.parties) > 1 else ("",)


def expiry(expires: datetime | None, now: datetime) -> str:
    """'88d 3h', or 'expired 2d ago'."""
    if expires is None:
        return render.DASH
    left_s = (expires - now).total_seconds()
    if left_s <= 0:
        return f"expired {render.briefly(-left_s)} ago"
    return render.duration(left_s) if left_s < 100 * DAY_S else f"{int(left_s // DAY_S)}d"
