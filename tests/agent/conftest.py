"""What many tests of the daemon start from. Each module has its own `node`."""

import pytest
from wire_http import Conversation


@pytest.fixture
def talk(node):
    """One connection to the module's node."""
    with Conversation(node.socket) as conversation:
        yield conversation
