"""What many tests of workers start from."""

import pytest
from workshop import workshop


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    with workshop(tmp_path_factory.mktemp("empty")) as shop:
        yield shop


@pytest.fixture
def start(shop):
    made = []

    def start(*arguments, **options):
        made.append(shop.start(*arguments, **options))
        return made[-1]

    yield start
    for worker in made:
        worker.close()
