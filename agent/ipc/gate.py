"""What stands between a client and a page: who came, what it may do, and how much of it.

Does: make a Peer of every client, hold the policy and the quotas in force, refuse with the rule that denied,
remember refusals.
Leaves out: the rules (agent.access), the counting (agent.ipc.quotas), connections (agent.ipc.http).

Rules
 * What was decided about a peer is remembered with it, so that a request costs one look-up. New rules make every
   peer forget.
 * The admin socket is open to whoever may open its file, for everything, beyond every quota.
 * A refusal is logged, but nobody can fill the log: one line per user and action in LOG_EVERY_S. What is allowed
   costs nothing more for that.
"""

from __future__ import annotations

import collections
import logging
import os
import weakref
from typing import TYPE_CHECKING, Any

from agent.access import Action, Policy, Verdict
from agent.clock import wall
from agent.ipc import quotas
from agent.ipc.peer import Door, Peer
from agent.ipc.routes import ADMINISTRATION, LISTS, OPEN_PAGES, Page
from skerry.errors import Denied, Overloaded

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterable

    from agent.access import Rule
    from agent.ipc.head import Head
    from agent.ipc.peer import TcpTable
    from agent.settings import Access, Ipc

log = logging.getLogger(__name__)

MAX_DENIALS = 100
#: Decisions remembered per peer: names of models come from outside.
MAX_VERDICTS = 1024
MAX_ADMIN_CONNECTIONS = 32
#: People that our own children speak for and that are remembered.
MAX_SPOKEN_FOR = 256
LOG_EVERY_S = 10.0
#: Users and actions whose last line is remembered.
_MAX_LOGGED = 1024


class Gate:
    """One for all listeners of a daemon.

    Args:
        monotonic: seconds of a clock that never jumps.

    Attributes:
        quotas: who uses how much.
        denied: action -> how often it was refused.
        denials: the last refusals, oldest first, as their page shows them.
        speakers: pids of our own children that may speak for others.
        on_denied: told of each refusal: the peer, the action, the model or an empty name, the rule.
    """

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self.quotas = quotas.Quotas(quotas.Limits())
        self.denied: dict[str, int] = dict.fromkeys(Action, 0)
        self.denials: collections.deque[dict[str, Any]] = collections.deque(maxlen=MAX_DENIALS)
        self.speakers: set[int] = set()
        self.on_denied: Callable[[Peer, str, str, str], None] = lambda *_: None
        self._monotonic = monotonic
        self._own_uid = os.geteuid()
        self._policy = Policy((), own_uid=self._own_uid, own_gids=(), tcp=())
        self._peers: weakref.WeakSet[Peer] = weakref.WeakSet()
        self._spoken_for: dict[tuple[int, int], Peer] = {}
        self._admins = 0
        self._logged: dict[tuple[int, Action], tuple[float, int]] = {}

    def configure(self, ipc: Ipc, access: Access, rules: Iterable[Rule], own_gids: Iterable[int]) -> None:
        """Put limits and rules in force, also for the connections that are open."""
        self.quotas.limits = quotas.Limits(
            connections=ipc.max_connections,
            connections_per_uid=ipc.connections_per_uid,
            requests_per_uid=ipc.requests_per_uid,
            bytes_per_uid=ipc.memory_per_uid_bytes,
            rate_per_uid=ipc.rate_per_uid,
        )
        self._policy = Policy(
            rules, own_uid=self._own_uid, own_gids=own_gids, tcp=[Action(name) for name in access.tcp]
        )
        self._spoken_for.clear()  # their groups are read anew, too
        for peer in self._peers:
            peer.models.clear()
            peer.verdicts.clear()

    # -- coming and going

    def welcome(self, sock: socket.socket, door: Door, tcp: TcpTable) -> Peer:
        """Count a client in; `leave` counts it out.

        Raises:
            Overloaded: there are enough of them.
        """
        peer = Peer.of(sock, door, tcp)
        if door is Door.ADMIN:
            if self._admins >= MAX_ADMIN_CONNECTIONS:
                raise Overloaded(
                    f"connections to the admin socket: expected at most {MAX_ADMIN_CONNECTIONS}, got one more"
                )
            self._admins += 1
        else:
            peer.usage = self.quotas.of(peer.uid)
            self.quotas.connect(peer.usage)
        self._peers.add(peer)
        return peer

    def leave(self, peer: Peer) -> None:
        """A client that was welcome is gone."""
        if peer.door is Door.ADMIN:
            self._admins -= 1
        else:
            self.quotas.disconnect(peer.usage)

    def acting(self, peer: Peer, uid: int) -> Peer:
        """Whom `peer` speaks for. No connection is counted: `leave` is for the one who came in.

        Raises:
            Denied: it is no child of ours that may.
        """
        if peer.pid not in self.speakers or peer.uid != self._own_uid:
            raise Denied(f"speaking for uid {uid}: expected a process of the daemon's, got pid {peer.pid}")
        other = self._spoken_for.get((peer.pid, uid))
        if other is None:
            if len(self._spoken_for) >= MAX_SPOKEN_FOR:
                self._spoken_for.clear()
            other = self._spoken_for[peer.pid, uid] = peer.acting_for(uid)
            other.usage = self.quotas.of(uid)
            self._peers.add(other)
        return other

    # -- deciding

    def may(self, peer: Peer, action: Action, model: str = "") -> bool:
        """Whether `peer` may do this with `model`, which is empty for what concerns none."""
        return self._verdict(peer, action, model).allowed

    def require(self, peer: Peer, action: Action, model: str = "") -> None:
        """As `may`, but a refusal is an error, counted and remembered.

        Raises:
            Denied: the message has the rule that says so.
        """
        verdict = self._verdict(peer, action, model)
        if verdict.allowed:
            if action is Action.INFER:
                if len(peer.models) >= MAX_VERDICTS:
                    peer.models.clear()
                peer.models.add(model)
            return
        self._record(peer, action, model, verdict)
        what = f"{action} on model {model}" if model else f"{action} on this node"
        raise Denied(
            f"{what}: expected a user who may, got uid {peer.uid} (rule: {verdict.why})", _hint(action, peer)
        )

    def require_page(self, peer: Peer, head: Head) -> None:
        """Whether `peer` may have this page, which is not inference. Lists show everybody what they may read.

        Raises:
            Denied: as `require`.
        """
        page = head.page
        if page in OPEN_PAGES or (page in LISTS and not head.model):
            return
        if page not in ADMINISTRATION:
            self.require(peer, Action.READ, head.model)
            return
        self.require(peer, Action.ADMIN, head.model)
        if page is not Page.DENIALS:
            what = f"{page.name} {head.model}".rstrip()
            log.info("administration: uid %d, pid %d: %s", peer.uid, peer.pid, what)

    def _verdict(self, peer: Peer, action: Action, model: str) -> Verdict:
        if peer.door is Door.ADMIN:
            return Verdict(allowed=True, why="admin socket")
        verdict = peer.verdicts.get((action, model))
        if verdict is None:
            if len(peer.verdicts) >= MAX_VERDICTS:
                peer.verdicts.clear()
            verdict = peer.verdicts[action, model] = self._policy.judge(peer, action, model)
        return verdict

    def _record(self, peer: Peer, action: Action, model: str, verdict: Verdict) -> None:
        self.denied[action] += 1
        self.on_denied(peer, action, model, verdict.why)
        self.denials.append(
            {
                "unix": wall(),
                "uid": peer.uid,
                "pid": peer.pid,
                "door": peer.door.name.lower(),
                "action": action,
                "model": model or None,
                "rule": verdict.why,
            }
        )
        now, key = self._monotonic(), (peer.uid, action)
        last, unsaid = self._logged.get(key, (-LOG_EVERY_S, 0))
        if now - last < LOG_EVERY_S:
            self._logged[key] = last, unsaid + 1
            return
        if len(self._logged) >= _MAX_LOGGED:
            self._logged.clear()
        self._logged[key] = now, 0
        more = f", and {unsaid} times before" if unsaid else ""
        what = model or "on this node"
        log.warning(
            "denied: uid %d, pid %d: %s %s (%s)%s", peer.uid, peer.pid, action, what, verdict.why, more
        )


def _hint(action: Action, peer: Peer) -> str:
    if action is Action.ADMIN:
        return "run the command with sudo, or as the daemon's user"
    who = "" if peer.uid < 0 else f" uid:{peer.uid}"
    return f"an administrator can allow it in the configuration: access.rules: ['allow {action}{who}']"
