"""What the daemon logs, and how that is changed while it runs."""

import io
import logging
import re

import pytest

from agent.logs import LogSettings
from skerry.errors import InternalError

LEVELS = ("debug", "info", "warning", "error", "critical")


@pytest.fixture
def root():
    logger = logging.getLogger()
    level = logger.level
    yield logger
    logger.setLevel(level)


@pytest.fixture
def written(root):
    """settings -> which severities are written with them, and the last line."""

    def try_all(settings):
        out = settings._handler.stream = io.StringIO()
        settings.install()
        for level in LEVELS:
            getattr(logging.getLogger("some"), level)("as %s", level)
        root.removeHandler(settings._handler)
        lines = out.getvalue().splitlines()
        return [line.rpartition(" ")[2] for line in lines], lines[-1] if lines else ""

    return try_all


@pytest.mark.parametrize("least", LEVELS[:4])
def test_the_configured_level_decides_at_first(written, root, least):
    assert written(LogSettings(least))[0] == list(LEVELS[LEVELS.index(least) :])
    assert logging.getLevelName(root.level) == least.upper()


def test_each_severity_is_switched_by_itself(written, root):
    settings = LogSettings("info")
    settings.change(info=False)
    assert written(settings)[0] == ["warning", "error", "critical"]
    assert root.level == logging.WARNING
    settings.change(verbose=1)
    assert written(settings)[0] == ["debug", "warning", "error", "critical"]
    settings.change(warning=False, error=False, verbose=0)
    assert written(settings)[0] == ["critical"]
    settings.change(info=True, error=True)
    assert written(settings)[0] == ["info", "error", "critical"]


def test_time_is_written_in_either_form(written):
    settings = LogSettings("info")
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} CRITICAL some: ", written(settings)[1])
    settings.change(format="ISO8601")
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ CRITICAL some: ", written(settings)[1])
    settings.change(format="default")
    assert "T" not in written(settings)[1].partition(" ")[0]


def test_a_reload_with_the_same_level_keeps_what_was_changed(written):
    settings = LogSettings("info")
    settings.change(info=False, format="ISO8601")
    settings.follow("info")
    assert written(settings)[0] == ["warning", "error", "critical"]
    settings.follow("debug")
    assert written(settings)[0] == list(LEVELS)
    assert settings.format == "ISO8601"


def test_a_level_that_is_none_is_a_bug_of_ours(root):
    with pytest.raises(InternalError, match="expected one of debug, info, warning, error, got 'loud'"):
        LogSettings("loud")
