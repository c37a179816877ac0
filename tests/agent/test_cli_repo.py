"""`skerry repo …` as people type it: one owner; three people and a team, each in a folder of their own."""

import json
import shutil
from contextlib import chdir

import pytest
import zoo
from people import fetched, memory_folder
from typer.testing import CliRunner

from agent.cli import exits
from agent.cli.app import app
from store import keyfiles, published


@pytest.fixture
def place():
    with memory_folder() as folder, chdir(folder):
        (folder / "det.onnx").write_bytes(zoo.add(1))
        (folder / "kws.onnx").write_bytes(zoo.scale(2))
        yield folder


@pytest.fixture
def repo(place):
    """repo(arguments) runs `skerry repo --repo repo …` in the place."""

    def run(*arguments, at="repo", code=exits.OK):
        result = CliRunner().invoke(app, ["repo", "--repo", at, *map(str, arguments)], prog_name="skerry")
        assert result.exit_code == code, result.stderr
        return result

    return run


def said(result):
    """The remarks on stderr by their first word; the last of each."""
    return {line[:10].strip(): line[10:].strip() for line in result.stderr.splitlines()}


def roles_of(repo):
    return {role["role"]: role for role in json.loads(repo("status", "--json").stdout)["roles"]}


def person(place, name):
    keyfiles.make(place / name / f"{name}.pem")
    return f"{name}/{name}.pem.pub"


def carry(place, repo, name, file):
    """Somebody takes a copy of a pending file, signs it where there is no repository, and brings it back."""
    shutil.copy(place / "repo/pending" / file, place / name / file)
    with chdir(place / name):
        result = CliRunner().invoke(app, ["repo", "sign", file, "--key", f"{name}.pem"], prog_name="skerry")
        assert result.exit_code == exits.OK, result.stderr
    return result, repo("sign", f"{name}/{file}")


def test_one_owner_makes_fills_publishes_and_keeps_a_repository_with_one_line_each(repo, place):
    made = said(repo("init"))
    assert made["published"] == "root 1, targets 1, models 1, channels 1, snapshot 1, timestamp 1"
    assert made["next"] == "bring it to where devices find it: skerry repo publish-dir DIR"
    added = repo("add", "det.onnx", "--name", "det")
    assert [line.split()[0] for line in added.stderr.splitlines()] == [
        "sealed",
        "checked",
        "loaded",
        "signed",
        "published",
        "next",
    ]
    repo("add", "kws.onnx", "--name", "det")
    repo("channel", "set", "shop", "det=1,2")
    assert json.loads(repo("channel", "show", "--json").stdout) == {"channels": {"shop": {"det": [1, 2]}}}
    models = json.loads(repo("list", "--json").stdout)["models"]
    assert [(one["name"], one["version"], one["release"], one["role"]) for one in models] == [
        ("det", 1, 1, "models"),
        ("det", 2, 2, "models"),
    ]
    out = said(repo("publish-dir", "public"))["published"]
    assert out.startswith("public: 9 new files,")
    assert out.endswith("0 removed")
    assert said(repo("refresh"))["published"] == "timestamp 5"
    assert "1 new file," in said(repo("publish-dir", "public"))["published"]
    found = fetched(
        place / "public", place / "cache", place / "repo/metadata/1.root.json", "channels/shop.json"
    )
    assert found == {"channels/shop.json": '{"format":1,"models":{"det":[1,2]}}'}


def test_revoking_says_what_went_and_what_was_kept(repo):
    repo("init")
    repo("add", "det.onnx", "--name", "det")
    repo("add", "kws.onnx", "--name", "det")
    repo("channel", "set", "shop", "det=2")
    revoked = repo("remove", "det", "--version", "2", "--revoke")
    lines = said(revoked)
    assert lines["revoked"].startswith("det/2, sha256:")
    assert lines["kept"] == "det/1, as a new release"
    assert lines["note"] == "the channel shop still names det/2"
    repo("remove", "det", "--version", "7", code=exits.NOT_FOUND)


def test_what_does_not_load_is_not_signed(repo, place):
    repo("init")
    (place / "bad.onnx").write_bytes(b"no model")
    before = sorted(path.name for path in (place / "repo").rglob("*"))
    repo("add", "bad.onnx", "--name", "bad", code=exits.USAGE)
    assert sorted(path.name for path in (place / "repo").rglob("*")) == before


def test_three_people_and_a_team_sign_what_is_theirs_in_turn(repo, place):
    root = [word for name in ("ann", "bob", "cleo") for word in ("--root-key", person(place, name))]
    made = said(repo("init", *root, "--root-threshold", 2))
    assert "published" not in made
    assert made["next"].startswith(
        "carry repo/pending/root.json to who has a key: skerry repo sign FILE --key KEY"
    )
    there, back = carry(place, repo, "ann", "root.json")
    assert said(there)["document"].startswith("root 1, valid until ")
    assert said(there)["next"] == "carry root.json back: skerry repo sign root.json"
    assert said(back)["took over"] == "1 new signature from ann/root.json"
    assert "published" not in said(back)
    _, back = carry(place, repo, "bob", "root.json")
    assert said(back)["published"].startswith("root 1, targets 1,")

    held = said(repo("delegate", "vision", "--models", "vision-*", "--key", person(place, "eve")))
    assert held["waiting"].startswith("models-vision 1: 0 of 1 signatures, wants ")
    assert held["waiting"].endswith("(eve)")
    carry(place, repo, "eve", "models-vision.json")
    waits = said(repo("add", "det.onnx", "--name", "vision-a"))
    assert waits["waits"].startswith("vision-a/1 in models-vision")
    _, back = carry(place, repo, "eve", "models-vision.json")
    assert said(back)["published"] == "models-vision 2, snapshot 3, timestamp 3"

    repo("rotate", "root", "--add", person(place, "dora"), "--drop", "ann/ann.pem.pub")
    text = repo("status").stdout
    assert "keys in force" in text
    assert "new keys" in text
    for name in ("bob", "cleo"):
        _, back = carry(place, repo, name, "root.json")
    assert said(back)["published"] == "root 2"
    assert roles_of(repo)["root"]["version"] == 2
    repo("publish-dir", "public")
    found = fetched(
        place / "public", place / "cache", place / "repo/metadata/1.root.json", "models/vision-a/1.onnx"
    )
    assert found["models/vision-a/1.onnx"] is not None


def test_a_key_given_for_a_command_signs_and_is_not_remembered(repo, place):
    repo("init", "--models-key", person(place, "ann"))
    assert roles_of(repo)["models"]["version"] == 0
    repo("sign", "--key", "ann/ann.pem")
    assert roles_of(repo)["models"]["version"] == 1
    assert said(repo("add", "det.onnx", "--name", "det", "--key", "file:ann/ann.pem"))[
        "published"
    ].startswith("models 2")
    assert "waits" in said(repo("add", "kws.onnx", "--name", "det"))


@pytest.mark.parametrize("role", ["root", "targets", "online", "models", "channels"])
def test_roles_rotate_and_the_old_key_can_be_named_by_its_label(repo, place, role):
    repo("init")
    keyfiles.make(place / "new.pem")
    repo("rotate", role, "--add", "new.pem", "--drop", "owner")
    found = roles_of(repo)
    for one in {"online": ["snapshot", "timestamp"]}.get(role, [role]):
        assert found[one]["version"] > 1
        assert found[one]["pending"] is None
        assert len(found[one]["keys"]) == 1
    assert "waiting" not in said(repo("add", "det.onnx", "--name", "det"))


def test_teams_change_order_and_go(repo):
    repo("init")
    repo("delegate", "vision", "--models", "vision-*", "--models", "eye", "--key", "repo/keys/owner.pem")
    repo("delegate", "lite", "--models", "*-lite", "--key", "repo/keys/owner.pem", code=exits.USAGE)
    repo("delegate", "lite", "--models", "*-lite", "--key", "repo/keys/owner.pem", "--before", "vision")
    assert [name for name in roles_of(repo) if name.startswith("models")] == [
        "models-lite",
        "models-vision",
        "models",
    ]
    repo("add", "det.onnx", "--name", "vision-lite")
    repo("delegate", "lite", "--remove", code=exits.USAGE)
    assert (
        said(repo("delegate", "lite", "--remove", "--with-models"))["removed"] == "models/vision-lite/1.onnx"
    )
    repo("delegate", "lite", "--remove", "--key", "x", code=exits.USAGE)
    repo("delegate", "lite", "--remove", code=exits.NOT_FOUND)


def test_what_is_wrong_ends_with_a_reason_and_its_code(repo, place):
    assert "skerry repo init" in repo("status", code=exits.NOT_FOUND).stderr
    repo("add", "det.onnx", "--name", "det", code=exits.NOT_FOUND)
    repo("init")
    repo("init", code=exits.USAGE)
    repo("rotate", "models", code=exits.USAGE)
    repo("rotate", "nobody", "--drop", "ffff", code=exits.NOT_FOUND)
    repo("channel", "set", "shop", "det", code=exits.USAGE)
    repo("channel", "set", "shop", "det=1", code=exits.NOT_FOUND)
    repo("channel", "show", "shop", code=exits.NOT_FOUND)
    repo("publish-dir", "repo", code=exits.USAGE)
    repo("add", "det.onnx", "--name", "det", "--key", "awskms:1", code=exits.USAGE)
    (place / "repo/keys/owner.pem").chmod(0o644)
    assert "chmod 600" in repo("refresh", code=exits.DENIED).stderr
    (place / "repo/keys/owner.pem").chmod(0o600)
    (place / "repo/metadata/timestamp.json").write_bytes(b"{}")
    repo("status", code=exits.UNTRUSTED)


def test_a_missing_key_is_named_and_nothing_is_lost(repo, place):
    repo("init")
    (place / "repo/keys/owner.pem").rename(place / "away.pem")
    waits = said(repo("add", "det.onnx", "--name", "det"))
    assert "expected a key file, found none" in waits["no key"]
    (place / "away.pem").rename(place / "repo/keys/owner.pem")
    assert said(repo("sign"))["published"] == "models 2, snapshot 2, timestamp 2"


def test_where_there_is_no_repository_a_file_needs_a_key(repo, place):
    repo("init", "--root-key", person(place, "ann"))
    with chdir(place / "ann"):
        result = CliRunner().invoke(app, ["repo", "sign", "../repo/pending/root.json"], prog_name="skerry")
    assert result.exit_code == exits.USAGE
    assert "give --key KEY" in result.stderr
    keyfiles.make(place / "eve.pem")
    with chdir(place / "ann"):
        result = CliRunner().invoke(
            app, ["repo", "sign", "../repo/pending/root.json", "--key", "../eve.pem"], prog_name="skerry"
        )
    assert result.exit_code == exits.USAGE
    assert "this document is not for this key to sign" in result.stderr


def test_a_pin_comes_from_the_environment_or_the_terminal(monkeypatch):
    from agent.cli.repo import place as place_module

    monkeypatch.setenv("SKERRY_HSM_PIN", "1234")
    assert place_module.ask("pin") == "1234"
    monkeypatch.delenv("SKERRY_HSM_PIN")
    monkeypatch.setattr(
        place_module.typer, "prompt", lambda text, **options: f"{text} {options['hide_input']}"
    )
    assert place_module.ask("pin") == "PIN of the token True"


def test_a_made_key_prints_what_others_need_and_one_that_is_there_stays(repo, place):
    made = repo("key", "keys/ann.pem")
    assert made.stdout == (place / "keys/ann.pem.pub").read_text()
    secret = (place / "keys/ann.pem").read_bytes()
    for same in ("keys/ann.pem", "file:keys/ann.pem", "keys/ann.pem.pub"):
        shown = repo("key", same)
        assert shown.stdout == made.stdout
        assert said(shown) == {"id": said(made)["id"]}
    (place / "ann.json").write_text(repo("key", "keys/ann.pem", "--json").stdout)
    assert repo("key", "ann.json").stdout == made.stdout
    assert (place / "keys/ann.pem").read_bytes() == secret
    repo("key", "awskms:1", code=exits.USAGE)


def test_the_repository_can_be_named_by_the_environment(repo, place, monkeypatch):
    repo("init")
    monkeypatch.setenv("SKERRY_REPO", str(place / "repo"))
    assert CliRunner().invoke(app, ["repo", "status"], prog_name="skerry").exit_code == exits.OK
    assert published.load(place / "repo/metadata") is not None
