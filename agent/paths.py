"""Where everything of one node lies on disk.

Does: choose the layout (one home folder, systemd's directories, the system's, XDG's), make the directories,
find the socket of a daemon that runs.
Leaves out: what stands in the files; every room gets its own path handed in.

Rules
 * A home folder, if there is one, holds everything: deleting it deletes the node.
 * Paths are absolute, so that nothing changes meaning with the working directory.
 * A socket path that the kernel would refuse is refused here, before anything is made.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from skerry.errors import ConfigError, StorageFailed
from store.places import Places

if TYPE_CHECKING:
    from collections.abc import Mapping

#: sun_path has 108 bytes on Linux and 104 elsewhere, the closing NUL included.
MAX_SOCKET_PATH_BYTES = 107 if sys.platform == "linux" else 103

ADMIN_SOCKET = "admin.sock"
SYSTEM_SOCKET = Path("/run/skerry/skerry.sock")


@dataclasses.dataclass(frozen=True, slots=True)
class Paths:
    """The places of one node.

    Attributes:
        home: the one folder that holds everything, or None where the platform's places are used.
        origin: what chose this layout: "--home", "SKERRY_HOME", "systemd", "system" or "XDG".
        config_file: the YAML file; it need not exist.
        state: directory of what must survive a power cut.
        data: directory of the registry, the keys and the inbox.
        cache: directory of what may be deleted at any time.
        run_dir: sockets; gone after a reboot.
    """

    home: Path | None
    origin: str
    config_file: Path
    state: Path
    data: Path
    cache: Path
    run_dir: Path

    @property
    def registry(self) -> Path:
        """Trusted metadata and blobs."""
        return self.data / "registry"

    @property
    def keys(self) -> Path:
        """Private keys, readable by the owner alone."""
        return self.data / "keys"

    @property
    def trusted_root(self) -> Path:
        """The pinned root, beside the configuration: what an administrator decides."""
        return self.config_file.parent / "root.json"

    @property
    def trust(self) -> Places:
        """What the registry needs."""
        return Places(self.registry, self.keys, self.state_db, self.trusted_root)

    @property
    def inbox(self) -> Path:
        """Bundles dropped here are imported."""
        return self.data / "inbox"

    @property
    def state_db(self) -> Path:
        """Registry index, placement trail, outbox."""
        return self.state / "state.db"

    @property
    def traces(self) -> Path:
        """Traces of requests, where somebody asked for them."""
        return self.state / "traces"

    @property
    def cache_db(self) -> Path:
        """Remembered answers."""
        return self.cache / "cache.db"

    @property
    def compiled(self) -> Path:
        """Optimised models and compiled contexts."""
        return self.cache / "compiled"

    @property
    def lock(self) -> Path:
        """Held by the one daemon that uses this state; it lies beside what it protects."""
        return self.state / "skerry.lock"

    @property
    def socket(self) -> Path:
        """Where the daemon answers HTTP."""
        return self.run_dir / "skerry.sock"

    @property
    def grpc_socket(self) -> Path:
        """Where clients find gRPC."""
        return self.run_dir / "grpc.sock"

    @property
    def grpc_inner_socket(self) -> Path:
        """Where the gRPC gateway reaches its own server; the directory is for the daemon's user alone."""
        return self.run_dir / "grpc" / "inner"

    @property
    def admin_socket(self) -> Path:
        """Where it does so for root and its own user, whatever happens on the other."""
        return self.run_dir / ADMIN_SOCKET


def resolve(home: str | None, env: Mapping[str, str], euid: int) -> Paths:
    """Choose the layout.

    Args:
        home: the value of `--home`, or None.
        env: the environment.
        euid: effective user id; 0 gets the system's places.

    Raises:
        ConfigError: no home directory is known, or the socket path is longer than the kernel takes.
    """
    if home is not None:
        paths = _below(home, "--home")
    elif env.get("SKERRY_HOME"):
        paths = _below(env["SKERRY_HOME"], "SKERRY_HOME")
    elif _systemd_directory(env, "STATE_DIRECTORY") is not None:
        paths = _systemd(env)
    elif euid == 0:
        paths = _system()
    else:
        paths = _xdg(env)
    _check_socket_path(paths)
    return paths


def find_socket(paths: Paths, system_socket: Path = SYSTEM_SOCKET) -> Path:
    """The socket a client should try: this layout's own, else the system daemon's if it is there.

    A home that was asked for by name is never left: its daemon answers, or nobody does.
    """
    if paths.home is None and not paths.socket.exists() and system_socket.exists():
        return system_socket
    return paths.socket


def find_admin_socket(main: Path) -> Path:
    """The admin socket beside `main` if this user may open it and a daemon answers there, else `main`."""
    admin = main.with_name(ADMIN_SOCKET)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # noqa: FBT003 - positional only
        return main if probe.connect_ex(os.fsencode(admin)) else admin


def prepare(paths: Paths) -> None:
    """Make the directories that are missing. Existing ones keep their mode, except that keys/ is closed.

    Root's commands work on the same tree as the service's own user, so a directory made by root belongs to
    the owner of the directory it is made in.

    Raises:
        StorageFailed: a directory cannot be made, or something else has its name.
    """
    directories = (
        (paths.state, 0o750),
        (paths.cache, 0o750),
        (paths.run_dir, 0o755),
        (paths.registry, 0o755),
        (paths.keys, 0o700),
        (paths.inbox, 0o770),
        (paths.compiled, 0o750),
    )
    directory = paths.state
    try:
        for directory, mode in directories:
            _make(directory, mode)
        directory = paths.keys
        if directory.stat().st_mode & 0o077:
            _give(directory, 0o700)
    except OSError as error:
        raise StorageFailed(
            f"{directory}: expected a directory that can be made or used, got {error.strerror}",
            "start with another --home, or give this user the directory",
        ) from error


def _make(directory: Path, mode: int) -> None:
    if directory.is_dir():
        return
    parent = directory.parent
    if not parent.exists():
        _make(parent, 0o755)
    directory.mkdir(exist_ok=True)
    _give(directory, mode, parent.stat())  # mkdir's mode is cut by the umask


def _give(directory: Path, mode: int, owner: os.stat_result | None = None) -> None:
    """Set mode and, as root, owner; never of what a link leads to, which the tree's owner could choose."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fchmod(fd, mode)
        if owner is not None and os.geteuid() == 0:
            os.fchown(fd, owner.st_uid, owner.st_gid)
    finally:
        os.close(fd)


def _below(text: str, origin: str) -> Paths:
    home = Path(os.path.abspath(text))  # noqa: PTH100 - Path.resolve would follow links: the name given is kept
    return Paths(
        home=home,
        origin=origin,
        config_file=home / "skerry.yaml",
        state=home,
        data=home,
        cache=home,
        run_dir=home / "run",
    )


def _system() -> Paths:
    state = Path("/var/lib/skerry")
    return Paths(
        home=None,
        origin="system",
        config_file=Path("/etc/skerry/skerry.yaml"),
        state=state,
        data=state,
        cache=Path("/var/cache/skerry"),
        run_dir=SYSTEM_SOCKET.parent,
    )


def _systemd(env: Mapping[str, str]) -> Paths:
    system = _system()
    state = _systemd_directory(env, "STATE_DIRECTORY") or system.state
    config = _systemd_directory(env, "CONFIGURATION_DIRECTORY") or system.config_file.parent
    return Paths(
        home=None,
        origin="systemd",
        config_file=config / "skerry.yaml",
        state=state,
        data=state,
        cache=_systemd_directory(env, "CACHE_DIRECTORY") or system.cache,
        run_dir=_systemd_directory(env, "RUNTIME_DIRECTORY") or system.run_dir,
    )


def _systemd_directory(env: Mapping[str, str], variable: str) -> Path | None:
    """The directory that systemd made for us.

    Another service that calls `skerry infer` has STATE_DIRECTORY too, and it is not ours: only a directory
    named skerry counts. The variable is a list with colons where a unit names several.
    """
    candidates = [Path(part) for part in env.get(variable, "").split(":") if part]
    return next((path for path in candidates if path.name == "skerry" and path.is_absolute()), None)


def _xdg(env: Mapping[str, str]) -> Paths:
    user = Path(env.get("HOME", ""))
    if not user.is_absolute():
        raise ConfigError(
            f"HOME: expected an absolute path, got {env.get('HOME')!r}",
            "set HOME, or choose a folder with --home DIR",
        )
    state = _xdg_directory(env, "XDG_STATE_HOME") or user / ".local/state/skerry"
    # Without XDG_RUNTIME_DIR nothing below /tmp is safe from other users, so the socket lies with the state.
    run_dir = _xdg_directory(env, "XDG_RUNTIME_DIR") or state / "run"
    config = _xdg_directory(env, "XDG_CONFIG_HOME") or user / ".config/skerry"
    return Paths(
        home=None,
        origin="XDG",
        config_file=config / "skerry.yaml",
        state=state,
        data=_xdg_directory(env, "XDG_DATA_HOME") or user / ".local/share/skerry",
        cache=_xdg_directory(env, "XDG_CACHE_HOME") or user / ".cache/skerry",
        run_dir=run_dir,
    )


def _xdg_directory(env: Mapping[str, str], variable: str) -> Path | None:
    """Ours below `variable`; the XDG specification has relative values ignored."""
    base = Path(env.get(variable, ""))
    return base / "skerry" if base.is_absolute() else None


def _check_socket_path(paths: Paths) -> None:
    size = len(os.fsencode(paths.socket))
    if size > MAX_SOCKET_PATH_BYTES:
        raise ConfigError(
            f"socket path {paths.socket}: expected at most {MAX_SOCKET_PATH_BYTES} bytes, got {size}",
            "the kernel takes no longer path for a Unix socket; choose a shorter home directory",
        )
