"""Who is on the other side, as the kernel tells: users, groups, and owners of TCP connections."""

import os
import socket

import pytest
from wire_http import effective_user

from agent.access import Action
from agent.ipc.gate import Gate
from agent.ipc.peer import Door, Peer, TcpTable
from agent.settings import Access, Ipc
from skerry.errors import Denied, Overloaded

NOBODY = 65534
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")


@pytest.fixture
def connect():
    """Connect to a listener; gives the server's end and the client's."""
    socks = []

    def connect(family=socket.AF_UNIX):
        listener = socket.socket(family)
        socks.append(listener)
        # An empty name is one of the kernel's choosing that no file stands for, so that anybody may connect.
        hosts = {socket.AF_INET: ("127.0.0.1", 0), socket.AF_INET6: ("::1", 0)}
        listener.bind(hosts.get(family, ""))
        listener.listen()
        client = socket.socket(family)
        socks.append(client)
        client.connect(listener.getsockname())
        server, _ = listener.accept()
        socks.append(server)
        return server, client

    yield connect
    for sock in socks:
        sock.close()


def test_a_unix_peer_has_the_ids_of_this_process(connect):
    peer = Peer.of(connect()[0], Door.MAIN, TcpTable())
    assert (peer.uid, peer.gid, peer.pid) == (os.geteuid(), os.getegid(), os.getpid())
    assert peer.groups == {os.getegid(), *os.getgroups()}
    assert peer.scope == f"uid:{os.geteuid()}"
    assert not peer.over_tcp


@only_root
def test_a_peer_keeps_the_groups_with_which_it_connected(connect):
    groups = os.getgroups()
    os.setgroups([0, 4242])
    try:
        server, _ = connect()
    finally:
        os.setgroups(groups)
    assert Peer.of(server, Door.MAIN, TcpTable()).groups == {os.getegid(), 0, 4242}


@only_root
def test_another_user_is_told_apart_over_tcp_too(connect):
    with effective_user(NOBODY):
        unix, tcp = connect()[0], connect(socket.AF_INET)[0]
    table = TcpTable()
    assert Peer.of(unix, Door.MAIN, table).uid == NOBODY
    assert Peer.of(tcp, Door.TCP, table).uid == NOBODY
    assert Peer.of(connect(socket.AF_INET)[0], Door.TCP, TcpTable()).uid == 0


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_the_owner_of_a_tcp_connection_is_found(connect, family):
    try:
        server, _ = connect(family)
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    peer = Peer.of(server, Door.TCP, TcpTable())
    assert (peer.uid, peer.over_tcp) == (os.getuid(), True)


@pytest.mark.parametrize("how", ["close", "half"])
def test_a_tcp_connection_that_its_owner_has_ended_belongs_to_nobody_known(connect, how):
    server, client = connect(socket.AF_INET)
    if how == "close":
        client.close()
    else:
        client.shutdown(socket.SHUT_WR)
    assert TcpTable().uid_of(server) == -1


@pytest.mark.parametrize("text", ["", "  sl  local_address rem_address\n", "garbage 01 \x00"])
def test_a_table_that_says_nothing_gives_nobody(connect, tmp_path, text):
    (tmp_path / "tcp").write_text(text)
    server, _ = connect(socket.AF_INET)
    assert TcpTable(tmp_path).uid_of(server) == -1
    assert TcpTable(tmp_path / "missing").uid_of(server) == -1


def gate_with(ipc=None, access=None, rules=()):
    gate = Gate(lambda: 0.0)
    gate.configure(ipc or Ipc(), access or Access(), rules, [])
    return gate


def test_only_our_own_children_speak_for_others(connect):
    gate = gate_with()
    peer = gate.welcome(connect()[0], Door.MAIN, TcpTable())
    with pytest.raises(Denied, match="expected a process of the daemon's"):
        gate.acting(peer, 4242)
    gate.speakers.add(os.getpid())
    other = gate.acting(peer, 4242)
    assert (other.uid, other.gid, other.scope, other.groups) == (4242, -1, "uid:4242", frozenset())
    assert gate.may(peer, Action.ADMIN)
    assert not gate.may(other, Action.INFER, "m")
    assert other.usage is gate.quotas.of(4242)


def test_somebody_spoken_for_has_the_groups_of_the_user_database(connect):
    gate = gate_with()
    gate.speakers.add(os.getpid())
    peer = gate.welcome(connect()[0], Door.ADMIN, TcpTable())
    root = gate.acting(peer, 0)
    assert root.gid == 0
    assert 0 in root.groups
    assert root.door is Door.MAIN, "the admin socket is open to who opened it, not to whom it speaks for"


def test_the_admin_socket_has_room_when_the_others_have_none(connect):
    gate = gate_with(Ipc(max_connections=1))
    gate.welcome(connect()[0], Door.MAIN, TcpTable())
    with pytest.raises(Overloaded):
        gate.welcome(connect()[0], Door.MAIN, TcpTable())
    peer = gate.welcome(connect()[0], Door.ADMIN, TcpTable())
    assert gate.may(peer, Action.ADMIN)
    gate.leave(peer)
    assert gate.quotas.connections == 1
