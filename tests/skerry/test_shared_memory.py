"""The client's shared memory mode against a stand-in that really maps the regions."""

import asyncio
import threading

import numpy as np
import pytest
from fakedaemon import SharingDaemon

from skerry import AsyncClient, Client
from skerry.errors import InvalidRequest, NotFound, Unavailable
from skerry.regions import SHM

pytestmark = pytest.mark.skipif(
    not SHM.is_dir(), reason="no /dev/shm: POSIX shared memory lies elsewhere here"
)

LARGE = (100, 1000)


def double(inputs):
    return {"y": inputs["x"] * 2}


@pytest.fixture
def daemon(tmp_path):
    with SharingDaemon(tmp_path / "s", double) as running:
        yield running
    assert not any((SHM / name).exists() for name in running.ever)


@pytest.fixture
def client(daemon):
    with Client(daemon.server_address, shared_memory=True) as made:
        yield made
    assert not daemon.regions


def large(value):
    return np.full(LARGE, value, np.float32)


def test_large_inputs_and_from_the_second_time_on_outputs_stay_out_of_the_socket(daemon, client):
    for value in (1, 2, 3):
        assert (client.infer("m", {"x": large(value)}).outputs["y"] == 2 * value).all()
    asked = [header for header, _ in daemon.infers]
    assert [size for _, size in daemon.infers] == [0, 0, 0]
    assert "outputs" not in asked[0]
    assert asked[1]["outputs"][0]["parameters"]["shared_memory_byte_size"] == large(1).nbytes
    assert client.shared_memory_active


def test_small_tensors_go_through_the_socket(daemon, client):
    for _ in range(2):
        client.infer("m", {"x": np.ones(10, np.float32)})
    assert [size for _, size in daemon.infers] == [40, 40]
    assert not daemon.regions


def test_large_and_small_tensors_mix(daemon, client):
    daemon.model = lambda inputs: {"s": inputs["b"] + 1, "l": inputs["a"] * 2, "t": inputs["b"] - 1}
    for value in (1, 2, 3):
        given = {"b": np.full(3, value, np.float32), "a": large(value)}
        outputs = client.infer("m", given).outputs
        assert outputs["s"].tolist() == [value + 1] * 3
        assert outputs["t"].tolist() == [value - 1] * 3
        assert (outputs["l"] == 2 * value).all()
    assert [size for _, size in daemon.infers] == [12, 12, 12]


def test_an_array_born_in_shared_memory_is_used_where_it_lies(daemon, client):
    born = client.array(LARGE, np.float32)
    assert not born.any()
    born[:] = 4
    first = client.infer("m", {"x": born}).outputs["y"]
    region = daemon.infers[0][0]["inputs"][0]["parameters"]["shared_memory_region"]
    assert client._sharing.regions.find(born)[0].name == region
    part = client.infer("m", {"x": born[50:]}).outputs["y"]
    where = daemon.infers[1][0]["inputs"][0]["parameters"]
    assert (where["shared_memory_region"], where["shared_memory_offset"]) == (region, born[:50].nbytes)
    assert (first == 8).all()
    assert (part == 8).all()


def test_an_answer_is_the_next_question_without_a_copy(daemon, client):
    values = client.infer("m", {"x": large(1)}).outputs["y"]
    for _ in range(3):
        values = client.infer("m", {"x": values}).outputs["y"]
    assert (values == 16).all()
    assert daemon.infers[-1][1] == 0
    asked = daemon.infers[-1][0]
    assert (
        asked["inputs"][0]["parameters"]["shared_memory_region"]
        == daemon.infers[-2][0]["outputs"][0]["parameters"]["shared_memory_region"]
    )


def test_answers_that_are_kept_never_change(daemon, client):
    kept = [client.infer("m", {"x": large(value)}).outputs["y"] for value in range(10)]
    for value, array in enumerate(kept):
        assert (array == 2 * value).all()
        assert array.flags.writeable


def test_regions_are_reused_when_answers_are_dropped(daemon, client):
    for value in range(20):
        client.infer("m", {"x": large(value)})
    assert len(daemon.regions) <= 3


def test_without_room_the_socket_is_used(daemon, client, monkeypatch):
    monkeypatch.setattr("skerry.regions.MAX_SHARED_BYTES", 0)
    born = client.array(LARGE, np.float32)
    born[:] = 1
    assert (client.infer("m", {"x": born}).outputs["y"] == 2).all()
    assert daemon.infers[0][1] == born.nbytes


def test_a_restarted_daemon_learns_the_regions_again(daemon, client):
    born = client.array(LARGE, np.float32)
    for value in (1, 2, 3):
        born[:] = value
        assert (client.infer("m", {"x": born}).outputs["y"] == 2 * value).all()
        daemon.forget()


def test_outputs_that_outgrow_their_room_come_through_the_socket_from_then_on(daemon, client):
    rows = iter([100, 100, 200, 50])
    daemon.model = lambda inputs: {
        "y": np.ones((count, 1000), np.float32) if (count := next(rows, 7)) else inputs
    }
    shapes = [client.infer("m", {"x": large(1)}).outputs["y"].shape[0] for _ in range(4)]
    assert shapes == [100, 100, 50, 7]  # the third run was refused for its size and put again
    assert len(daemon.infers) == 5
    assert "outputs" not in daemon.infers[-1][0]


def test_a_wrong_request_is_refused_as_without_shared_memory(daemon, client):
    client.infer("m", {"x": large(1)})

    def refuse(inputs):
        raise AssertionError(inputs)

    daemon.model = refuse
    daemon.pages["POST /v2/models/m/infer"] = 400, {"error": "no such input"}
    with pytest.raises(InvalidRequest, match="no such input"):
        client.infer("m", {"x": large(1)})


@pytest.mark.parametrize("status", [400, 403, 404, 501])
def test_a_daemon_that_takes_no_regions_is_served_through_the_socket(tmp_path, status):
    refusing = SharingDaemon(tmp_path / "s", double, takes_none=(status, "no regions here"))
    with refusing as daemon, Client(tmp_path / "s", shared_memory=True) as client:
        born = client.array(LARGE, np.float32)
        born[:] = 1
        for _ in range(2):
            assert (client.infer("m", {"x": born}).outputs["y"] == 2).all()
        assert not client.shared_memory_active
        assert client.shared_memory_refusal == "no regions here"
        assert [size for _, size in daemon.infers] == [born.nbytes] * 2
        assert client.array(3, np.float32).base is None


def test_memory_lent_for_an_answer_that_never_came_is_not_lent_again(daemon, client):
    client.infer("m", {"x": large(1)})
    client.infer("m", {"x": large(1)})
    lent = daemon.infers[-1][0]["outputs"][0]["parameters"]["shared_memory_region"]
    daemon.pages["POST /v2/models/m/infer"] = 503, {"error": "out of time"}
    with pytest.raises(Unavailable):
        client.infer("m", {"x": large(1)})
    del daemon.pages["POST /v2/models/m/infer"]
    client.infer("m", {"x": large(1)})
    assert daemon.infers[-1][0]["outputs"][0]["parameters"]["shared_memory_region"] != lent
    assert lent not in daemon.regions


def test_an_answer_in_memory_that_was_not_offered_is_refused(daemon, client):
    lie = {"name": "y", "datatype": "FP32", "shape": [5], "parameters": {"shared_memory_region": "other"}}
    daemon.pages["POST /v2/models/m/infer"] = {"model_name": "m", "outputs": [lie]}
    with pytest.raises(Exception, match="offered"):
        client.infer("m", {"x": large(1)})


def test_bytes_and_odd_layouts_travel_all_the_same(daemon, client):
    daemon.model = lambda inputs: {"y": inputs["x"] * 1}
    matrix = np.arange(200_000, dtype=np.float32).reshape(400, 500)
    for array in (matrix.T, matrix[::2], matrix.astype(">f4")):
        assert (client.infer("m", {"x": array}).outputs["y"] == array).all()


def test_threads_share_regions_without_sharing_memory(daemon, client):
    wrong = []

    def work(value):
        wrong.extend(
            value
            for _ in range(15)
            if not (client.infer("m", {"x": large(value)}).outputs["y"] == 2 * value).all()
        )

    threads = [threading.Thread(target=work, args=(value,)) for value in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_registration_whose_answer_was_lost_is_made_again(daemon, client):
    born = client.array(LARGE, np.float32)
    born[:] = 1
    daemon.loses_answers = True
    with pytest.raises(Unavailable):
        client.infer("m", {"x": born})
    daemon.loses_answers = False
    assert len(daemon.regions) == 1
    assert (client.infer("m", {"x": born}).outputs["y"] == 2).all()
    assert client.shared_memory_active


def test_an_array_of_objects_cannot_be_born_in_shared_memory(client):
    with pytest.raises(InvalidRequest, match="fixed size"):
        client.array(3, object)


def test_the_asyncio_client_shares_as_well(daemon):
    async def main():
        async with AsyncClient(daemon.server_address, shared_memory=True) as client:
            born = client.array(LARGE, np.float32)
            born[:] = 3
            for _ in range(3):
                assert ((await client.infer("m", {"x": born})).outputs["y"] == 6).all()
            daemon.forget()
            same = await asyncio.gather(*(client.infer("m", {"x": born}) for _ in range(8)))
            assert all((result.outputs["y"] == 6).all() for result in same)
            assert daemon.infers[-1][0]["outputs"]
            daemon.forget()
            many = await asyncio.gather(*(client.infer("m", {"x": large(v)}) for v in range(10)))
            assert all((result.outputs["y"] == 2 * v).all() for v, result in enumerate(many))
            daemon.pages["POST /v2/models/m/infer"] = 404, {"error": "no such model"}
            with pytest.raises(NotFound):
                await client.infer("m", {"x": born})
            assert client.shared_memory_active
        assert not daemon.regions

    asyncio.run(main())
    assert [size for _, size in daemon.infers] == [0] * len(daemon.infers)
