"""What many tests of the daemon start from. Each module has its own `node`."""

import pytest
from table import Stage
from wire_http import Conversation


@pytest.fixture
def talk(node):
    """One connection to the module's node."""
    with Conversation(node.socket) as conversation:
        yield conversation


@pytest.fixture(scope="module")
def stage():
    """Where stories about a table of models are played."""
    stage = Stage()
    yield stage
    stage.close()


@pytest.fixture
def played(stage, tmp_path):
    """Plays a story: a coroutine function of a bench."""
    return lambda story: stage.play(tmp_path, story)
