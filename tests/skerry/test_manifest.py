"""What an owner says about a model: what is understood, and what is refused."""

from __future__ import annotations

import pytest

from skerry.errors import ConfigError, InvalidRequest
from skerry.manifest import EVERY, Limits, Manifest, Served, served


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("latest", Served(1)),
        ("latest:3", Served(3)),
        ("all", Served(EVERY)),
        ("2", Served(0, frozenset({2}))),
        ("1, 3", Served(0, frozenset({1, 3}))),
    ],
)
def test_which_versions_are_served_is_read(text, meaning):
    assert served(text) == meaning


@pytest.mark.parametrize("text", ["", "newest", "latest:0", "latest:", "0", "1,", "1;2", "-1"])
def test_a_choice_of_versions_that_means_nothing_is_refused(text):
    with pytest.raises(ConfigError, match="expected latest, latest:N, all, or versions"):
        served(text)


@pytest.mark.parametrize(("value", "seconds"), [("", None), (0, 0.0), ("90s", 90.0), ("2m", 120.0)])
def test_keep_alive_is_a_duration_or_left_to_the_node(value, seconds):
    assert Manifest(keep_alive=value).keep_alive_s == seconds


@pytest.mark.parametrize(
    ("manifest", "kind"),
    [
        (Manifest(keep_alive="soon"), ConfigError),
        (Manifest(versions="some"), ConfigError),
        (Manifest(limits=Limits(timeout=0)), ConfigError),
        (Manifest(limits=Limits(memory="9" * 400)), ConfigError),
        (Manifest(limits=Limits(memory="999999999GiB")), ConfigError),
        (Manifest(limits=Limits(timeout="9" * 400 + "h")), ConfigError),
        (Manifest(keep_alive="99999999d"), ConfigError),
        (Manifest(fallback="../other"), InvalidRequest),
        (Manifest(group="a b"), InvalidRequest),
    ],
)
def test_check_refuses_what_no_node_accepts(manifest, kind):
    Manifest(fallback="other", group="small", keep_alive="5m", versions="latest:2").check()
    with pytest.raises(kind):
        manifest.check()
