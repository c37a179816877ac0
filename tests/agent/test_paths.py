"""Layouts, the search for a socket, and the directories that are made."""

import os
import socket
import tempfile
from pathlib import Path

import pytest
from wire_http import effective_user

from agent import paths
from skerry.errors import ConfigError, StorageFailed

USER = {"HOME": "/home/ann"}


def test_home_holds_everything():
    found = paths.resolve("/srv/node", USER, euid=1000)
    assert found.config_file == Path("/srv/node/skerry.yaml")
    assert found.state_db == Path("/srv/node/state.db")
    assert found.cache_db == Path("/srv/node/cache.db")
    assert found.registry == Path("/srv/node/registry")
    assert found.keys == Path("/srv/node/keys")
    assert found.inbox == Path("/srv/node/inbox")
    assert found.compiled == Path("/srv/node/compiled")
    assert found.socket == Path("/srv/node/run/skerry.sock")
    assert found.lock == Path("/srv/node/skerry.lock")


def test_option_wins_over_variable_and_both_say_so():
    env = USER | {"SKERRY_HOME": "/srv/variable"}
    assert paths.resolve("/srv/option", env, 1000).origin == "--home"
    variable = paths.resolve(None, env, 1000)
    assert (variable.home, variable.origin) == (Path("/srv/variable"), "SKERRY_HOME")


def test_relative_home_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert paths.resolve("node", USER, 1000).home == tmp_path / "node"


def test_root_gets_the_systems_places():
    found = paths.resolve(None, {}, euid=0)
    assert found.origin == "system"
    assert found.config_file == Path("/etc/skerry/skerry.yaml")
    assert found.state_db == Path("/var/lib/skerry/state.db")
    assert found.registry == Path("/var/lib/skerry/registry")
    assert found.cache_db == Path("/var/cache/skerry/cache.db")
    assert found.socket == paths.SYSTEM_SOCKET


def test_user_gets_xdg_places():
    found = paths.resolve(
        None, USER | {"XDG_RUNTIME_DIR": "/run/user/1000", "XDG_STATE_HOME": "/data/state"}, 1000
    )
    assert found.config_file == Path("/home/ann/.config/skerry/skerry.yaml")
    assert found.state_db == Path("/data/state/skerry/state.db")
    assert found.keys == Path("/home/ann/.local/share/skerry/keys")
    assert found.cache_db == Path("/home/ann/.cache/skerry/cache.db")
    assert found.socket == Path("/run/user/1000/skerry/skerry.sock")


def test_without_runtime_directory_the_socket_lies_with_the_state():
    assert paths.resolve(None, USER, 1000).socket == Path("/home/ann/.local/state/skerry/run/skerry.sock")


def test_relative_xdg_value_is_ignored():
    assert paths.resolve(None, USER | {"XDG_CACHE_HOME": "cache"}, 1000).cache == Path(
        "/home/ann/.cache/skerry"
    )


def test_user_without_home_is_told():
    with pytest.raises(ConfigError, match="HOME: expected an absolute path, got None"):
        paths.resolve(None, {}, 1000)


def test_systemd_directories_win_for_the_service_user():
    env = USER | {
        "STATE_DIRECTORY": "/var/lib/other:/srv/lib/skerry",
        "CACHE_DIRECTORY": "/srv/cache/skerry",
        "RUNTIME_DIRECTORY": "/srv/run/skerry",
        "CONFIGURATION_DIRECTORY": "/srv/etc/skerry",
    }
    found = paths.resolve(None, env, euid=990)
    assert found.origin == "systemd"
    assert found.state_db == Path("/srv/lib/skerry/state.db")
    assert found.inbox == Path("/srv/lib/skerry/inbox")
    assert found.compiled == Path("/srv/cache/skerry/compiled")
    assert found.socket == Path("/srv/run/skerry/skerry.sock")
    assert found.config_file == Path("/srv/etc/skerry/skerry.yaml")


def test_systemd_directory_that_is_missing_falls_back_to_the_system():
    found = paths.resolve(None, USER | {"STATE_DIRECTORY": "/var/lib/skerry"}, euid=990)
    assert found.socket == paths.SYSTEM_SOCKET


def test_directories_of_another_service_are_not_ours():
    found = paths.resolve(None, USER | {"STATE_DIRECTORY": "/var/lib/camera"}, euid=1000)
    assert found.origin == "XDG"


def test_socket_path_at_the_kernels_limit_is_accepted_and_one_more_is_refused(tmp_path):
    room = paths.MAX_SOCKET_PATH_BYTES - len("/run/skerry.sock") - len(str(tmp_path)) - 1
    fits = tmp_path / ("h" * room)
    found = paths.resolve(str(fits), {}, 0)
    found.run_dir.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(found.socket))
    with pytest.raises(ConfigError, match=r"expected at most 10\d bytes, got 10\d\nhint: .*shorter home"):
        paths.resolve(f"{fits}h", {}, 0)


def test_client_finds_its_own_socket_before_the_systems(tmp_path):
    system = tmp_path / "system.sock"
    found = paths.resolve(None, {"HOME": str(tmp_path)}, 1000)
    assert paths.find_socket(found, system) == found.socket
    system.touch()
    assert paths.find_socket(found, system) == system
    found.run_dir.mkdir(parents=True)
    found.socket.touch()
    assert paths.find_socket(found, system) == found.socket


def test_the_admin_socket_is_taken_where_somebody_answers_on_it():
    with tempfile.TemporaryDirectory(prefix="sk-") as folder, socket.socket(socket.AF_UNIX) as daemon:
        main, admin = Path(folder, "skerry.sock"), Path(folder, "admin.sock")
        assert paths.find_admin_socket(main) == main
        daemon.bind(str(admin))
        assert paths.find_admin_socket(main) == main, "left over from a daemon that was killed"
        daemon.listen()
        assert paths.find_admin_socket(main) == admin
        if os.geteuid() == 0:
            os.chown(folder, 65534, -1)
            with effective_user(65534):
                assert paths.find_admin_socket(main) == main, "it is not for everybody"


def test_named_home_is_never_left(tmp_path):
    system = tmp_path / "system.sock"
    system.touch()
    found = paths.resolve(str(tmp_path / "home"), {}, 1000)
    assert paths.find_socket(found, system) == found.socket


def test_prepare_makes_directories_with_their_modes_whatever_the_umask(tmp_path):
    found = paths.resolve(str(tmp_path / "deep" / "home"), {}, 1000)
    before = os.umask(0o077)
    try:
        paths.prepare(found)
    finally:
        os.umask(before)
    modes = {
        p.name: p.stat().st_mode & 0o777 for p in (found.keys, found.run_dir, found.inbox, found.registry)
    }
    assert modes == {"keys": 0o700, "run": 0o755, "inbox": 0o770, "registry": 0o755}
    paths.prepare(found)


def test_prepare_closes_keys_that_stand_open_and_leaves_other_modes(tmp_path):
    found = paths.resolve(str(tmp_path / "home"), {}, 1000)
    paths.prepare(found)
    found.keys.chmod(0o755)
    found.inbox.chmod(0o1777)
    paths.prepare(found)
    assert found.keys.stat().st_mode & 0o777 == 0o700
    assert found.inbox.stat().st_mode & 0o7777 == 0o1777


def test_prepare_changes_nothing_that_a_link_leads_to(tmp_path):
    found = paths.resolve(str(tmp_path / "home"), {}, 1000)
    found.data.mkdir()
    other = tmp_path / "other"
    other.mkdir()
    other.chmod(0o755)
    found.keys.symlink_to(other)
    with pytest.raises(StorageFailed, match="keys: expected a directory"):
        paths.prepare(found)
    assert other.stat().st_mode & 0o777 == 0o755


def test_file_where_a_directory_should_be_is_an_error(tmp_path):
    found = paths.resolve(str(tmp_path), {}, 1000)
    found.registry.write_text("")
    with pytest.raises(StorageFailed, match="registry: expected a directory"):
        paths.prepare(found)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory to another user")
def test_what_root_makes_belongs_to_the_owner_of_the_tree(tmp_path):
    os.chown(tmp_path, 12345, 12346)
    found = paths.resolve(str(tmp_path), {}, 0)
    paths.prepare(found)
    assert (found.keys.stat().st_uid, found.keys.stat().st_gid) == (12345, 12346)
