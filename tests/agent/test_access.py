"""Who may do what: rules as they are written, the order in which they decide, and what holds without them."""

from typing import NamedTuple

import pytest

from agent import config
from agent.access import MAX_RULES, Action, Policy, parse
from skerry.errors import ConfigError

OWN, OWN_GROUP, CLIENTS = 500, 500, 600
USERS = {"ann": 1001, "bob": 1002}
GROUPS = {"operators": 700}


class Somebody(NamedTuple):
    uid: int
    groups: frozenset[int] = frozenset()
    over_tcp: bool = False


ANN = Somebody(1001, frozenset({1001}))
BOB = Somebody(1002, frozenset({1002, 700}))
CLIENT = Somebody(1003, frozenset({1003, CLIENTS}))
ROOT = Somebody(0, frozenset({0}))
DAEMON = Somebody(OWN, frozenset({OWN_GROUP}))
UNKNOWN = Somebody(-1, over_tcp=True)


def policy(*rules, tcp=("infer", "read")):
    parsed = [parse(rule, USERS.__getitem__, GROUPS.__getitem__) for rule in rules]
    return Policy(parsed, own_uid=OWN, own_gids=[OWN_GROUP, CLIENTS], tcp=[Action(name) for name in tcp])


def allowed(judge, who, model="m"):
    return {action.value for action in Action if judge.judge(who, action, model).allowed}


EVERYTHING = {"infer", "read", "admin"}


@pytest.mark.parametrize(
    ("who", "may"),
    [
        (ROOT, EVERYTHING),
        (DAEMON, EVERYTHING),
        (CLIENT, {"infer", "read"}),
        (Somebody(1004, frozenset({OWN_GROUP})), {"infer", "read"}),
        (ANN, set()),
        (Somebody(-1), set()),
        (UNKNOWN, {"infer", "read"}),
        (Somebody(0, over_tcp=True), {"infer", "read"}),
        (Somebody(OWN, frozenset({OWN_GROUP}), over_tcp=True), {"infer", "read"}),
    ],
)
def test_without_rules_owners_do_everything_their_groups_infer_and_read_and_tcp_what_it_is_told(who, may):
    assert allowed(policy(), who) == may
    assert policy().judge(who, Action.INFER, "m").why == "default"


def test_what_tcp_clients_may_is_configured_and_does_not_touch_the_others():
    assert allowed(policy(tcp=()), UNKNOWN) == set()
    assert allowed(policy(tcp=["admin"]), UNKNOWN) == {"admin"}
    assert allowed(policy(tcp=()), CLIENT) == {"infer", "read"}


def test_the_first_rule_that_matches_decides_and_is_named():
    judge = policy("deny infer uid:ann model:face-*", "allow infer,read uid:ann", "deny * uid:*")
    assert judge.judge(ANN, Action.INFER, "face-1") == (False, "deny infer uid:ann model:face-*")
    assert judge.judge(ANN, Action.READ, "face-1") == (True, "allow infer,read uid:ann")
    assert judge.judge(ANN, Action.INFER, "digits") == (True, "allow infer,read uid:ann")
    assert judge.judge(ROOT, Action.ADMIN, "") == (False, "deny * uid:*")
    assert judge.judge(UNKNOWN, Action.READ, "") == (False, "deny * uid:*")


def test_a_group_matches_whoever_is_in_it_also_as_one_of_several():
    judge = policy("allow admin gid:operators")
    assert allowed(judge, BOB) == {"admin"}
    assert allowed(judge, ANN) == set()


def test_all_conditions_of_a_rule_have_to_hold():
    judge = policy("allow infer uid:bob gid:operators model:m")
    assert allowed(judge, BOB) == {"infer"}
    assert allowed(judge, BOB, "n") == set()
    assert allowed(judge, BOB._replace(groups=frozenset())) == set()
    assert allowed(judge, Somebody(9, frozenset({700}))) == set()


@pytest.mark.parametrize("pattern", ["*", "m*", "?"])
def test_a_rule_for_models_says_nothing_of_what_concerns_none(pattern):
    judge = policy(f"allow read uid:ann model:{pattern}")
    assert judge.judge(ANN, Action.READ, "m").allowed
    assert not judge.judge(ANN, Action.READ, "").allowed


def test_patterns_tell_upper_from_lower_case_and_match_the_whole_name():
    judge = policy("allow infer uid:ann model:Face?")
    assert judge.judge(ANN, Action.INFER, "Face1").allowed
    for name in ("face1", "Face", "Face12", "xFace1"):
        assert not judge.judge(ANN, Action.INFER, name).allowed


def test_spaces_do_not_matter_and_numbers_need_no_name():
    rule = parse("  allow   infer  uid:4000000000 gid:0 ", USERS.__getitem__, GROUPS.__getitem__)
    assert (rule.text, rule.uid, rule.gid) == ("allow infer uid:4000000000 gid:0", 4_000_000_000, 0)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "expected 'allow' or 'deny' and an action, got ''"),
        ("allow", "expected 'allow' or 'deny' and an action, got 'allow'"),
        ("permit infer", "expected 'allow' or 'deny' first, got 'permit'"),
        ("allow uid:1", "expected some of infer, read, admin, or *, got 'uid:1'"),
        ("allow infer, read", "expected some of infer, read, admin, or *, got 'infer,'"),
        ("deny infer user:1", "expected uid:, gid: and model:, each once, got 'user:1'"),
        ("deny infer uid:", "expected uid:, gid: and model:, each once, got 'uid:'"),
        ("deny infer uid:1 uid:2", "expected uid:, gid: and model:, each once, got 'uid:2'"),
        ("deny infer uid:carl", "expected a user of this machine, got 'carl'"),
        ("deny infer gid:-1", "expected a group of this machine, got '-1'"),
        ("deny infer uid:4294967295", "expected a user id of at most 4294967294, got 4294967295"),
        ("deny infer model:a/b", "expected a model's name, with * and ? for any characters, got 'a/b'"),
        ("deny infer model:[ab]", "expected a model's name, with * and ? for any characters, got '[ab]'"),
        ("deny infer model:" + "m" * 600, "expected a rule of at most 512 characters, got 617"),
    ],
)
def test_what_is_no_rule_is_refused_with_the_reason(text, complaint):
    with pytest.raises(ConfigError) as caught:
        parse(text, USERS.__getitem__, GROUPS.__getitem__)
    assert caught.value.message == complaint


def test_a_rule_in_the_file_is_refused_with_its_own_line(tmp_path):
    path = tmp_path / "skerry.yaml"
    path.write_text("access:\n  rules:\n    - allow infer uid:root\n    - deny infer uid:no-such-user\n")
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    assert caught.value.message == (
        f"{path}:4: access.rules: expected a user of this machine, got 'no-such-user'"
    )


def test_names_in_the_file_are_those_of_this_machine(tmp_path):
    path = tmp_path / "skerry.yaml"
    path.write_text("access:\n  rules: ['deny infer uid:root gid:root']\n  tcp: [read]\n")
    loaded = config.load(path)
    (rule,) = config.rules(loaded)
    assert (rule.allow, rule.uid, rule.gid) == (False, 0, 0)
    assert loaded.access.tcp == ("read",)


def test_more_rules_than_anybody_reads_are_refused(tmp_path):
    path = tmp_path / "skerry.yaml"
    path.write_text("access:\n  rules:\n" + "    - deny infer uid:1\n" * (MAX_RULES + 1))
    with pytest.raises(ConfigError, match=f"skerry.yaml:2: access.rules: expected at most {MAX_RULES}"):
        config.load(path)
