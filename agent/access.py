"""Who may do what: the rules, and what holds where no rule decides.

Does: parse rules; answer whether a peer may do something with a model, and by which rule.
Leaves out: who the peer is (agent.ipc.peer), refusing it (agent.ipc.gate), where rules stand (agent.settings).

Rules
 * The first rule that matches decides. Where none does: root and the daemon's own user may do everything, the
   daemon's group and the socket's may infer and read, TCP clients may do what `access.tcp` says, nobody else anything.
 * TCP never grants more by default because of a uid: a web page can make its reader's browser ask.
 * A rule that names models says nothing about what concerns no model.
 * The users and groups of this machine are looked up by whoever calls `parse`.
"""

from __future__ import annotations

import enum
import fnmatch
import re
from typing import TYPE_CHECKING, NamedTuple, Protocol

from skerry.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

#: Every request that is not remembered walks the list; longer ones are better said with groups and patterns.
MAX_RULES = 256
MAX_RULE_CHARS = 512
#: What no uid and no gid can be: (uid_t) -1 means "leave as it is" to the kernel.
MAX_ID = 2**32 - 2

_PATTERN = re.compile(r"[A-Za-z0-9_.*?-]{1,128}")
_FORM = "write it as 'allow infer,read uid:ann gid:staff model:face-*'"


class Action(enum.StrEnum):
    """What a peer can want."""

    INFER = "infer"
    READ = "read"
    ADMIN = "admin"


class Asker(Protocol):
    """What a decision needs to know of a peer. A uid or gid that is not known is -1."""

    @property
    def uid(self) -> int:
        """The user."""

    @property
    def groups(self) -> frozenset[int]:
        """The groups, the primary one included."""

    @property
    def over_tcp(self) -> bool:
        """Whether it came over TCP."""


class Rule(NamedTuple):
    """One line. None matches everybody, or whatever model and none."""

    text: str
    allow: bool
    actions: frozenset[Action]
    uid: int | None = None
    gid: int | None = None
    model: str | None = None

    def matches(self, asker: Asker, action: Action, model: str) -> bool:
        """Whether this rule speaks of this; `model` is empty for what concerns none."""
        return (
            action in self.actions
            and (self.uid is None or self.uid == asker.uid)
            and (self.model is None or (model != "" and fnmatch.fnmatchcase(model, self.model)))
            and (self.gid is None or self.gid in asker.groups)
        )


class Verdict(NamedTuple):
    """What was decided, and why: a rule's text, or "default"."""

    allowed: bool
    why: str


class Policy:
    """All rules together with the defaults.

    Args:
        rules: in order; the first that matches decides.
        own_uid: the daemon's user.
        own_gids: the daemon's group and that of the socket.
        tcp: what TCP clients may do by default.
    """

    def __init__(
        self, rules: Iterable[Rule], *, own_uid: int, own_gids: Iterable[int], tcp: Iterable[Action]
    ) -> None:
        self._rules = tuple(rules)
        self._masters = frozenset({0, own_uid})
        self._own_gids = frozenset(own_gids)
        self._tcp = frozenset(tcp)

    def judge(self, asker: Asker, action: Action, model: str) -> Verdict:
        """Whether `asker` may do this with `model`, which is empty for what concerns none."""
        for rule in self._rules:
            if rule.matches(asker, action, model):
                return Verdict(rule.allow, rule.text)
        return Verdict(self._by_default(asker, action), "default")

    def _by_default(self, asker: Asker, action: Action) -> bool:
        if asker.over_tcp:
            return action in self._tcp
        if asker.uid in self._masters:
            return True
        return action is not Action.ADMIN and not self._own_gids.isdisjoint(asker.groups)


def parse(text: str, user_id: Callable[[str], int], group_id: Callable[[str], int]) -> Rule:
    """One rule: `allow|deny ACTION[,ACTION] [uid:USER] [gid:GROUP] [model:PATTERN]`.

    Args:
        text: the rule. `*` stands for every action, user, group or model; a pattern may have `*` and `?`.
        user_id: a user's name -> uid; KeyError if there is none.
        group_id: likewise for groups.

    Raises:
        ConfigError: it is no rule, or names somebody unknown.
    """
    if len(text) > MAX_RULE_CHARS:
        raise ConfigError(f"expected a rule of at most {MAX_RULE_CHARS} characters, got {len(text)}", _FORM)
    words = text.split()
    if len(words) < 2:
        raise ConfigError(f"expected 'allow' or 'deny' and an action, got {text!r:.60}", _FORM)
    verb, actions, *conditions = words
    if verb not in {"allow", "deny"}:
        raise ConfigError(f"expected 'allow' or 'deny' first, got {verb!r:.60}", _FORM)
    wanted = _actions(actions)
    found: dict[str, str] = {}
    for condition in conditions:
        key, colon, value = condition.partition(":")
        if key not in {"uid", "gid", "model"} or not (colon and value) or key in found:
            raise ConfigError(f"expected uid:, gid: and model:, each once, got {condition!r:.60}", _FORM)
        found[key] = value
    return Rule(
        " ".join(words),
        verb == "allow",
        wanted,
        _id(found.get("uid", "*"), "user", user_id),
        _id(found.get("gid", "*"), "group", group_id),
        _pattern(found.get("model")),
    )


def _actions(text: str) -> frozenset[Action]:
    if text == "*":
        return frozenset(Action)
    try:
        return frozenset(Action(name) for name in text.split(","))
    except ValueError:
        raise ConfigError(f"expected some of {', '.join(Action)}, or *, got {text!r:.60}", _FORM) from None


def _id(text: str, what: str, look_up: Callable[[str], int]) -> int | None:
    if text == "*":
        return None
    if text.isascii() and text.isdigit():
        if len(text) > len(str(MAX_ID)) or int(text) > MAX_ID:
            raise ConfigError(f"expected a {what} id of at most {MAX_ID}, got {text:.60}")
        return int(text)
    try:
        return look_up(text)
    except KeyError:
        raise ConfigError(f"expected a {what} of this machine, got {text!r:.60}") from None


def _pattern(text: str | None) -> str | None:
    if text is not None and not _PATTERN.fullmatch(text):
        raise ConfigError(f"expected a model's name, with * and ? for any characters, got {text!r:.60}")
    return text
