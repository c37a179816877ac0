"""`skerry model add DIRECTORY`: directories of Triton model repositories, with real files and a real registry."""

import json
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zoo
from typer.testing import CliRunner

from agent.cli import exits
from agent.cli.app import app
from agent.triton import keys, warmup
from agent.triton.repository import read
from skerry.errors import ConfigError, InvalidRequest, SkerryError, Unsupported
from skerry.terms import TensorSpec

PAGE = Path(__file__).parents[2] / "docs" / "triton.md"


@pytest.fixture
def skerry(tmp_path):
    def run(*arguments):
        home = ["--home", str(tmp_path / "home")]
        return CliRunner(env={"COLUMNS": "200"}).invoke(
            app, [*home, *map(str, arguments)], prog_name="skerry"
        )

    return run


@pytest.fixture
def repository(tmp_path):
    """repository("name", {version: model}, config) -> the model's directory in a repository."""

    def make(name, versions, config=None):
        directory = tmp_path / "repository" / name
        for version, model in versions.items():
            (directory / str(version)).mkdir(parents=True)
            (directory / str(version) / "model.onnx").write_bytes(model)
        if config is not None:
            (directory / "config.pbtxt").write_text(config)
        return directory

    return make


@pytest.fixture
def added(skerry, repository):
    """added(config) -> (the signed manifest, what was said): zoo.add, whose tensors are FP32 [-1, -1]."""

    def add(config, *options, prepare=lambda _: None):
        directory = repository("m", {1: zoo.add(1)}, config)
        prepare(directory)
        result = skerry("model", "add", directory, *options)
        assert result.exit_code == exits.OK, result.stderr
        (model,) = json.loads(skerry("model", "show", "m", "--json").stdout)["models"]
        return said_of(model["manifest"]), result.stderr

    return add


@pytest.fixture
def refused(skerry, repository):
    """refused(config) -> what was complained; nothing was signed."""

    def add(config, prepare=lambda _: None, model=None):
        directory = repository("m", {1: model or zoo.add(1)}, config)
        prepare(directory)
        result = skerry("model", "add", directory)
        assert result.exit_code in {exits.USAGE, exits.NOT_FOUND}, result.stderr
        assert listed(skerry) == []
        return result.stderr

    return add


def said_of(manifest):
    """What a manifest says beyond the name, the version and what holds anyway."""
    return {key: value for key, value in manifest.items() if key not in {"name", "version"} and value != {}}


def listed(skerry):
    return [
        (entry["name"], entry["version"])
        for entry in json.loads(skerry("model", "list", "--json").stdout)["models"]
    ]


def told(stderr):
    """Key -> what became of it, out of the table."""
    lines = stderr.split("\nsealed ")[0].splitlines()
    column = lines[0].index("BECOMES")
    return {line.split()[0]: line[column:].strip() for line in lines[1:]}


# --- versions and names -----------------------------------------------------------------------------------


def test_the_highest_version_is_added_under_its_number_and_the_directorys_name(skerry, repository):
    directory = repository("alpha", {1: zoo.add(1), 3: zoo.add(3), 10: zoo.add(10)})
    (directory / "0").mkdir()
    (directory / "007").mkdir()
    (directory / "drafts").mkdir()
    result = skerry("model", "add", directory)
    assert result.exit_code == exits.OK, result.stderr
    assert listed(skerry) == [("alpha", 10)]
    assert "has no config.pbtxt" in result.stderr


def test_one_version_or_all_of_them_on_request(skerry, repository):
    directory = repository("alpha", {1: zoo.add(1), 3: zoo.add(3), 10: zoo.add(10)})
    other = repository("beta", {2: zoo.scale(2), 5: zoo.scale(5)})
    assert skerry("model", "add", directory, "--version", "3").exit_code == exits.OK
    assert skerry("model", "add", other, "--all-versions").exit_code == exits.OK
    assert listed(skerry) == [("alpha", 3), ("beta", 2), ("beta", 5)]
    missing = skerry("model", "add", directory, "--version", "4")
    assert missing.exit_code == exits.NOT_FOUND
    assert "expected version 4, got 1, 3, 10" in missing.stderr


def test_options_that_contradict_each_other_are_refused(skerry, repository):
    directory = repository("alpha", {1: zoo.add(1)})
    both = skerry("model", "add", directory, "--all-versions", "--version", "1")
    file = skerry("model", "add", directory / "1" / "model.onnx", "--all-versions", "--name", "alpha")
    assert both.exit_code == file.exit_code == exits.USAGE
    assert listed(skerry) == []


def test_versions_before_one_that_fails_stay_and_the_command_can_be_repeated(skerry, repository):
    directory = repository("alpha", {1: zoo.add(1), 2: zoo.garbage()})
    assert skerry("model", "add", directory, "--all-versions").exit_code == exits.USAGE
    assert listed(skerry) == [("alpha", 1)]
    (directory / "2" / "model.onnx").write_bytes(zoo.add(2))
    assert skerry("model", "add", directory, "--all-versions").exit_code == exits.OK
    assert listed(skerry) == [("alpha", 1), ("alpha", 2)]


def test_a_configuration_of_another_name_needs_a_decision(skerry, repository):
    directory = repository("alpha", {1: zoo.add(1)}, 'name: "beta"')
    result = skerry("model", "add", directory)
    assert result.exit_code == exits.USAGE
    assert "name: expected 'alpha', the directory's, got 'beta'" in result.stderr
    assert "--name beta" in result.stderr
    assert skerry("model", "add", directory, "--name", "beta").exit_code == exits.OK
    assert listed(skerry) == [("beta", 1)]


def test_links_lead_to_models_and_carry_the_name(skerry, repository, tmp_path):
    directory = repository("alpha", {1: zoo.add(1)})
    (directory / "2").symlink_to(directory / "1")
    (tmp_path / "beta").symlink_to(directory)
    assert skerry("model", "add", tmp_path / "beta").exit_code == exits.OK
    assert listed(skerry) == [("beta", 2)]


def test_the_directory_one_stands_in_has_its_name(skerry, repository, monkeypatch):
    monkeypatch.chdir(repository("alpha", {1: zoo.add(1)}))
    assert skerry("model", "add", ".").exit_code == exits.OK
    assert listed(skerry) == [("alpha", 1)]


def test_a_directory_that_is_no_model_says_what_one_is(skerry, repository, tmp_path):
    directory = repository("alpha", {1: zoo.add(1)}, "")
    (tmp_path / "empty").mkdir()
    for path, hint in ((tmp_path / "empty", "empty/1/model.onnx"), (directory.parent, str(directory))):
        result = skerry("model", "add", path)
        assert result.exit_code == exits.USAGE
        assert "expected numbered folders" in result.stderr
        assert hint in result.stderr


def test_a_version_without_its_file_says_what_is_there(skerry, repository):
    directory = repository("alpha", {1: zoo.add(1)})
    (directory / "1" / "model.onnx").rename(directory / "1" / "net.onnx")
    result = skerry("model", "add", directory)
    assert result.exit_code == exits.NOT_FOUND
    assert "the folder has net.onnx" in result.stderr
    (directory / "config.pbtxt").write_text('default_model_filename: "net.onnx"')
    assert skerry("model", "add", directory).exit_code == exits.OK
    (directory / "config.pbtxt").write_text('default_model_filename: "../1/net.onnx"')
    assert "expected a file's name" in skerry("model", "add", directory).stderr


def test_external_data_is_taken_from_beside_the_file_and_from_a_folder(skerry, repository):
    model, files = zoo.split(zoo.mlp(), weights=["w1", "w2"])
    beside, folder = repository("beside", {1: model}), repository("folder", {1: model})
    (beside / "1" / "weights.bin").write_bytes(files["weights.bin"])
    inner = folder / "2" / "model.onnx"
    inner.mkdir(parents=True)
    (inner / "model.onnx").write_bytes(model)
    (inner / "weights.bin").write_bytes(files["weights.bin"])
    for directory in (beside, folder):
        result = skerry("model", "add", directory)
        assert result.exit_code == exits.OK, result.stderr
    assert listed(skerry) == [("beside", 1), ("folder", 2)]


def test_a_folder_without_a_model_and_a_file_without_its_values_are_refused(skerry, repository):
    folder = repository("folder", {1: zoo.add(1)})
    (folder / "2" / "model.onnx").mkdir(parents=True)
    alone = repository("alone", {1: zoo.external_data("weights.bin")})
    result = skerry("model", "add", folder)
    assert result.exit_code == exits.USAGE
    assert "expected a file, or a folder with model.onnx" in result.stderr
    result = skerry("model", "add", alone)
    assert result.exit_code == exits.NOT_FOUND
    assert "weights.bin: no such file" in result.stderr
    assert listed(skerry) == []


# --- what keys become -------------------------------------------------------------------------------------


def test_a_whole_configuration_becomes_a_manifest_and_every_key_is_told(added):
    def prepare(directory):
        (directory / "labels.txt").write_text("cat\ndog\n")
        (directory / "warmup").mkdir()
        (directory / "warmup" / "x.bin").write_bytes(np.array([[1.5], [2]], np.float32).tobytes())

    manifest, said = added(
        """
        # every kind of key
        name: "m" platform: "onnxruntime_onnx" backend: "onnxruntime"
        max_batch_size: 8
        input [ { name: "input" data_type: TYPE_FP32 dims: [ 1 ] format: FORMAT_NONE } ]
        output { name: "output" data_type: TYPE_FP32 dims: 1 label_filename: "labels.txt" }
        dynamic_batching { preferred_batch_size: [ 4, 8 ] max_queue_delay_microseconds: 100 }
        instance_group [ { count: 2 kind: KIND_CPU }, { count: 1 kind: KIND_CPU name: "b" } ]
        version_policy: { specific { versions: [ 3, 1 ] } }
        model_warmup [
          { name: "a" batch_size: 2
            inputs { key: "input" value: { data_type: TYPE_FP32 dims: 1 input_data_file: "x.bin" } } },
          { name: "b"
            inputs { key: "input" value: { data_type: TYPE_FP32 dims: [ 1, 2 ] zero_data: true } } },
          { name: "c" batch_size: 99999
            inputs { key: "input" value: { data_type: TYPE_FP32 dims: 1 random_data: true } } }
        ]
        response_cache { enable: true }
        parameters { key: "intra_op_thread_count" value: { string_value: "2" } }
        parameters { key: "execution_mode" value: { string_value: "1" } }
        metric_tags { key: "team" value: "vision" }
        optimization { graph { level: 1 } input_pinned_memory { enable: false } }
        """,
        prepare=prepare,
    )
    assert manifest == {
        "batching": {"max_batch_size": 8, "max_queue_delay_us": 100},
        "cache": {"policy": "exact"},
        "policy": "prefer_cpu",
        "threads": 2,
        "instances": 3,
        "warmup": [{"inputs": {"input": [[1.5], [2.0]]}}, {"inputs": {"input": [[0, 0]]}}],
        "versions": "1,3",
        "classes": {"output": ["cat", "dog"]},
        "labels": {"team": "vision"},
    }
    table = told(said)
    assert table["max_batch_size"] == "batching.max_batch_size: 8"
    assert table["instance_group.count"] == "instances: 3"
    assert table["output.label_filename"] == "classes.output: 2 labels"
    assert table["parameters"] == "threads: 2; execution_mode not used"
    assert table["model_warmup.inputs"].startswith("warmup: 2 samples; sample 3 left out: ")
    assert {key for key, became in table.items() if became.startswith("not used")} == {
        "input.format",
        "dynamic_batching.preferred_batch_size",
        "instance_group.name",
        "model_warmup.name",
        "optimization",
    }


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("", {}),
        ("max_batch_size: 0", {"batching": {"max_batch_size": 1}}),
        ("max_batch_size: 9999", {"batching": {"max_batch_size": 4096}}),
        ("dynamic_batching { }", {}),
        (
            "dynamic_batching { max_queue_delay_microseconds: 99000000 }",
            {"batching": {"max_queue_delay_us": 10_000_000}},
        ),
        ("version_policy { latest { num_versions: 2 } }", {"versions": "latest:2"}),
        ("version_policy { latest { } }", {}),
        ("version_policy { all { } }", {"versions": "all"}),
        ("instance_group { kind: KIND_GPU }", {"policy": "prefer_gpu"}),
        ("instance_group [ { kind: KIND_GPU }, { kind: KIND_CPU } ]", {}),
        ("instance_group [ { count: 2 }, { count: 3 passive: true } ]", {"instances": 2}),
        ("instance_group { count: 9999 }", {"instances": 256}),
        ("instance_group [ { count: 0 }, { name: 'b' } ]", {"instances": 2}),
        ("response_cache { enable: false }", {}),
        ("model_transaction_policy { decoupled: false }", {}),
    ],
)
def test_what_means_the_same_is_taken_over(repository, config, expected):
    manifest = read(repository("m", {1: b""}, config)).manifest
    assert said_of(msgspec.to_builtins(manifest)) == expected


def test_what_a_manifest_says_goes_over_the_configuration(added, tmp_path):
    file = tmp_path / "m.yaml"
    file.write_text("cache: {policy: 'off'}\nthreads: 0\nlicence: MIT\n")
    config = (
        "max_batch_size: 4 response_cache { enable: true }"
        ' parameters { key: "intra_op_thread_count" value { string_value: "3" } }'
    )
    manifest, said = added(config, "--manifest", file)
    assert manifest == {"batching": {"max_batch_size": 4}, "licence": "MIT"}
    assert "cache.policy: exact" in said  # the table is about config.pbtxt, whoever has the last word


def test_warmup_data_keeps_its_datatype_and_is_the_same_every_time(added, skerry):
    strings = b"".join(len(text).to_bytes(4, "little") + text for text in ("grün".encode(), b""))

    def prepare(directory):
        (directory / "warmup").mkdir()
        (directory / "warmup" / "s").write_bytes(strings)
        (directory / "warmup" / "b").write_bytes(b"\x80\x3f\x00\xc0")
        (directory / "warmup" / "nan").write_bytes(np.array([np.nan], np.float32).tobytes())

    def entry(datatype, source):
        inputs = f"data_type: TYPE_{datatype} dims: 2 {source}"
        return f'model_warmup {{ inputs {{ key: "input" value {{ {inputs} }} }} }}'

    sources = [
        ("STRING", 'input_data_file: "s"'),
        ("BF16", 'input_data_file: "b"'),
        ("BOOL", "zero_data: true"),
        ("INT64", "random_data: true"),
        ("STRING", "zero_data: true"),
        ("FP32", 'input_data_file: "nan"'),
        ("FP32", 'input_data_file: "s"'),
    ]
    config = "\n".join(entry(*source) for source in sources)
    manifest, said = added(config, "--no-wait", prepare=prepare)
    found = [sample["inputs"]["input"] for sample in manifest["warmup"]]
    assert found[:3] == [["grün", ""], [1.0, -2.0], [False, False]]
    assert set(found[3]) <= {0, 1}
    assert found[4] == ["", ""]
    became = told(said)["model_warmup.inputs"]
    assert became.startswith("warmup: 5 samples; sample 6 left out: ")
    assert "expected 8 bytes of FP32[2], got 4" in became


def test_numbers_that_json_cannot_carry_and_samples_beyond_the_ceiling_are_left_out(added):
    def prepare(directory):
        (directory / "warmup").mkdir()
        (directory / "warmup" / "inf").write_bytes(np.array([np.inf], np.float32).tobytes())

    huge = 'model_warmup { inputs { key: "input" value { data_type: TYPE_FP32 dims: [0, 999999999999] } } }\n'
    one = 'model_warmup { inputs { key: "input" value { data_type: TYPE_FP32 dims: 1 %s } } }\n'
    config = huge + one % 'input_data_file: "inf"' + (one % "zero_data: true") * (warmup.MAX_SAMPLES + 1)
    manifest, said = added(config, prepare=prepare)
    assert len(manifest["warmup"]) == warmup.MAX_SAMPLES
    assert "sizes up to 16384, got [0, 999999999999]" in told(said)["model_warmup.inputs"]
    assert "finite numbers" in told(said)["model_warmup.inputs"]


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "complaint", "hint"),
    [
        (
            '\nplatform: "tensorflow_savedmodel"',
            "config.pbtxt:2: platform: expected onnxruntime_onnx",
            "ONNX",
        ),
        ('platform: "ensemble"', "platform: expected onnxruntime_onnx, got 'ensemble'", "add the models"),
        ('backend: "python"', "backend: expected onnxruntime, got 'python'", "export"),
        ("ensemble_scheduling { step [ ] }", "1: ensemble_scheduling: refused", ""),
        ("sequence_batching { direct { } }", "sequence_batching: refused: the model keeps state", ""),
        ("batch_input [ { kind: BATCH_ITEM_SHAPE } ]", "batch_input: refused", ""),
        ("batch_output [ { target_name: [ 'y' ] } ]", "batch_output: refused", ""),
        ("model_operations { op_library_filename: ['a.so'] }", "native code that nobody signed", ""),
        ("model_transaction_policy { decoupled: True }", "decoupled: refused if true", ""),
        ("input { name: 'input' allow_ragged_batch: 1 }", "allow_ragged_batch: refused if true", ""),
        ("max_batchsize: 8", "config.pbtxt:1:1: unknown key 'max_batchsize'", "did you mean max_batch_size?"),
        ("input { nam: 'x' }", "unknown key 'input.nam'", "did you mean name?"),
        ("max_batch_size: 'x'", 'max_batch_size: expected an integer of 64 bits, got "x"', ""),
        ("max_batch_size: -1", "max_batch_size: expected 0 or more, got -1", ""),
        ("max_batch_size: 1 max_batch_size: 2", "1:35: max_batch_size: expected one value", ""),
        ("max_batch_size { }", "expected an integer of 64 bits, got a message", ""),
        ("dynamic_batching: 1", "dynamic_batching: expected a message in braces, got 1", ""),
        ("response_cache { enable: maybe }", "enable: expected true or false, got maybe", ""),
        ("instance_group { kind: KIND_TPU }", "expected one of KIND_AUTO, KIND_GPU", ""),
        ("instance_group { count: -1 }", "instance_group.count: expected 0 or more", ""),
        ("input { data_type: TYPE_FP8 }", "input.data_type: expected one of TYPE_BOOL", ""),
        ("version_policy { all { } latest { } }", "expected one of latest, all and specific", ""),
        ("version_policy { specific { versions: 0 } }", "expected versions from 1 to 9007199254740991", ""),
        ("version_policy { specific { versions: 9007199254740992 } }", "expected versions from 1 to", ""),
        ("version_policy { latest { num_versions: 0 } }", "expected at least 1, got 0", ""),
        ("parameters { key: 'a' }", "parameters['a']: expected a value, got none", ""),
        ("parameters { key: 'a' velue { } }", "unknown key 'parameters.velue'", "did you mean value?"),
        (
            "parameters { key: 'intra_op_thread_count' value { string_value: 'x' } }",
            "intra_op_thread_count: expected a whole number, got 'x'",
            "",
        ),
        ("input [ {", "config.pbtxt:1:10: expected a field's name or '}'", ""),
        ("\x00\x01", "expected protobuf text", ""),
    ],
)
def test_what_has_no_counterpart_or_is_wrong_is_refused(repository, config, complaint, hint):
    with pytest.raises((ConfigError, Unsupported)) as caught:
        read(repository("m", {1: b""}, config))
    assert complaint in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ("input { name: 'x' }", "input 'x': expected one of the file's inputs input"),
        ("output { name: 'y' }", "output 'y': expected one of the file's outputs output"),
        ("input { name: 'input' data_type: TYPE_INT8 }", "expected FP32, which the file has, got TYPE_INT8"),
        ("input { name: 'input' dims: [1, 2, 3] }", "expected [-1, -1], which the file has, got [1, 2, 3]"),
        ("max_batch_size: 4 input { name: 'input' dims: [1, 2] }", "got [-1, 1, 2]"),
        ("output { name: 'output' dims: 1 reshape { shape: [ ] } }", "got []"),
    ],
)
def test_inputs_and_outputs_have_to_be_the_files(repository, config, complaint):
    model = read(repository("m", {1: b""}, config))
    tensors = [TensorSpec(name, "FP32", (-1, -1)) for name in ("input", "output")]
    with pytest.raises(InvalidRequest, match=re.escape(complaint)):
        model.check_file(tensors[:1], tensors[1:], ())
    if "dims" in config and "output" not in config:
        model.check_file(tensors[:1], tensors[1:], ("input",))


def test_a_batch_needs_a_file_that_takes_any_number(refused):
    said = refused("max_batch_size: 4 input { name: 'x' dims: [3] }", model=zoo.fixed_shape())
    assert "max_batch_size is over 0" in said


def test_reshape_and_optional_inputs_are_compared_as_the_file_has_them(added):
    added(
        "max_batch_size: 2 input [ { name: 'input' dims: [1, 1] reshape { shape: 1 } },"
        " { name: 'gone' data_type: TYPE_FP32 dims: 1 optional: true } ]"
    )


def test_files_that_the_configuration_names_have_to_lie_in_the_directory(refused, tmp_path):
    (tmp_path / "secret").write_text("key\n")

    def link(directory):
        (directory / "labels").symlink_to(tmp_path / "secret")

    for name in ("../../secret", str(tmp_path / "secret"), "labels"):
        said = refused(f"output {{ name: 'output' label_filename: '{name}' }}", prepare=link)
        assert f"expected a file in {tmp_path / 'repository' / 'm'}" in said
        (tmp_path / "repository" / "m" / "labels").unlink()
        (tmp_path / "repository" / "m" / "1" / "model.onnx").unlink()
        (tmp_path / "repository" / "m" / "1").rmdir()


@pytest.mark.parametrize("target", ["nowhere", "config.pbtxt"])
def test_a_configuration_that_is_a_link_to_nothing_is_no_missing_one(repository, target):
    directory = repository("m", {1: b""})
    (directory / "config.pbtxt").symlink_to(target)
    with pytest.raises(SkerryError, match=r"config.pbtxt: (no such file|cannot follow)"):
        read(directory)


@pytest.mark.parametrize("missing", ["output { name: 'output' label_filename: 'no' }", "WARMUP"])
def test_a_file_that_is_named_and_not_there_is_a_mistake(refused, missing):
    inputs = '{ key: "input" value { data_type: TYPE_FP32 dims: 1 input_data_file: "no" } }'
    said = refused(missing.replace("WARMUP", f"model_warmup {{ inputs {inputs} }}"))
    assert "no such file, and config.pbtxt names it" in said


def test_a_name_that_no_file_can_have_is_refused(refused):
    said = refused(r"output { name: 'output' label_filename: 'a\0b' }")
    assert "expected the name of a file, got none" in said


def test_labels_that_are_no_text_are_refused(refused):
    said = refused(
        "output { name: 'output' label_filename: 'l' }", prepare=lambda at: (at / "l").write_bytes(b"\xff")
    )
    assert "expected labels in UTF-8" in said


def test_a_damaged_configuration_is_read_or_refused_and_nothing_else(repository):
    directory = repository("m", {1: b""}, "")
    random = np.random.default_rng(7)
    whole = (
        b'name: "m" max_batch_size: 8 input [ { name: "x" data_type: TYPE_FP32 dims: [ -1, 3 ] } ] instance_group'
        b' [ { count: 2 kind: KIND_CPU } ] version_policy { specific { versions: [1, 2] } } parameters { key: "a"'
        b' value { string_value: "b" } } model_warmup { batch_size: 1 inputs { key: "x" value { data_type: TYPE_INT8'
        b" dims: 3 random_data: true } } } response_cache { enable: true } optimization { graph { level: -1 } }"
    )
    outcomes = {True: 0, False: 0}
    for _ in range(400):
        octets = bytearray(whole)
        for _ in range(random.integers(1, 3)):
            octets[random.integers(len(octets))] = random.choice(list(b'{}[]<>:,"-0129eE_x \xff'))
        (directory / "config.pbtxt").write_bytes(octets)
        try:
            read(directory)
        except SkerryError:
            outcomes[False] += 1
        else:
            outcomes[True] += 1
    assert all(outcomes.values())


def test_a_configuration_at_its_ceiling_is_read_in_no_time(repository):
    many = "dims: [" + ",".join(["1"] * 19_000) + "]"
    assert len(read(repository("m", {1: b""}, f"input {{ {many} }}")).config.input[0].dims) == 19_000
    tags = "".join(f'metric_tags {{key:"{n}"value:"1"}}' for n in range(6_000))
    assert len(read(repository("n", {1: b""}, tags)).manifest.labels) == 6_000


# --- the schema -------------------------------------------------------------------------------------------


def test_the_page_says_of_every_key_what_becomes_of_it():
    rows = [f"| `{key}` | {sentence} |" for key, sentence in keys.sentences().items()]
    assert "\n".join(rows) in PAGE.read_text(), "\n".join(rows)


def test_the_keys_are_tritons():
    proto = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="tritonclient brings the schema")

    def compare(ours, theirs, path):
        known = {field.name: keys.value_type(field.type) for field in msgspec.structs.fields(ours)}
        assert set(known) == set(theirs.fields_by_name), path
        for name, kind in known.items():
            if keys.is_message(kind):
                compare(kind, theirs.fields_by_name[name].message_type, f"{path}.{name}")

    compare(keys.ModelConfig, proto.ModelConfig.DESCRIPTOR, "ModelConfig")
