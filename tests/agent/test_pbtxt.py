"""Protobuf's text format: what protobuf writes is read back, what is wrong is refused with its place."""

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.triton import pbtxt
from agent.triton.pbtxt import Message, parse
from skerry.errors import ConfigError

KINDS = {
    "number": descriptor_pb2.FieldDescriptorProto.TYPE_INT64,
    "real": descriptor_pb2.FieldDescriptorProto.TYPE_DOUBLE,
    "text": descriptor_pb2.FieldDescriptorProto.TYPE_STRING,
    "truth": descriptor_pb2.FieldDescriptorProto.TYPE_BOOL,
    "node": descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE,
}


def node_class():
    """A message that may hold several of everything, itself too; in a pool of its own."""
    file = descriptor_pb2.FileDescriptorProto(name="node.proto", package="t", syntax="proto3")
    message = file.message_type.add(name="Node")
    for number, (name, kind) in enumerate(KINDS.items(), 1):
        field = message.field.add(name=name, number=number, type=kind, label=3)
        if name == "node":
            field.type_name = ".t.Node"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Node"))


NODE = node_class()
LEAF = st.fixed_dictionaries(
    {
        "number": st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3),
        "real": st.lists(st.floats(allow_nan=False), max_size=3),
        "text": st.lists(st.text(max_size=8), max_size=3),
        "truth": st.lists(st.booleans(), max_size=2),
    }
)
TREE = st.recursive(
    LEAF.map(lambda leaf: leaf | {"node": []}),
    lambda inner: st.builds(lambda leaf, nodes: leaf | {"node": nodes}, LEAF, st.lists(inner, max_size=2)),
    max_leaves=6,
)


def plain(message):
    """What was parsed, in the shape of TREE."""
    found = {name: [] for name in KINDS}
    for field in message.fields:
        value = plain(field.value) if isinstance(field.value, Message) else field.value.value
        if field.name == "truth":
            value = {"true": True, "false": False}[value]
        found[field.name].append(value)
    return found


def build(tree):
    node = NODE(**{name: values for name, values in tree.items() if name != "node"})
    for inner in tree["node"]:
        node.node.append(build(inner))
    return node


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(TREE, st.booleans(), st.booleans(), st.booleans())
def test_what_protobuf_writes_is_read_back(tree, one_line, short, utf8):
    text = text_format.MessageToString(
        build(tree), as_one_line=one_line, use_short_repeated_primitives=short, as_utf8=utf8
    )
    assert plain(parse(text.encode(), "x")) == tree


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text("ab\"'\\{}<>[]:;,.-#1eE0x \n\0é", max_size=40))
def test_any_text_is_read_or_refused(text):
    try:
        found = parse(text.encode(), "x")
    except ConfigError as error:
        assert error.message.startswith("x:")  # noqa: PT017 - both outcomes are right
    else:
        assert isinstance(found, Message)


def values(text):
    return [(field.name, field.value.value) for field in parse(text.encode(), "x").fields]


def test_both_braces_separators_comments_and_lists():
    found = parse(
        b"a { x: 1; y: 2, } # c } \n b < x: 3 > c: { } d [ { x: 4 }, < x: 5 > ] e: [6, 7] f: []", "x"
    )
    assert [field.name for field in found.fields] == ["a", "b", "c", "d", "d", "e", "e"]
    assert [[inner.value.value for inner in field.value.fields] for field in found.fields[:5]] == [
        [1, 2],
        [3],
        [],
        [4],
        [5],
    ]


def test_numbers_strings_and_words():
    assert values("a: 0x1F a: -017 a: 1.5e3f a: .5 a: -inf a: KIND_CPU a: 0") == [
        ("a", 31),
        ("a", -15),
        ("a", 1500.0),
        ("a", 0.5),
        ("a", float("-inf")),
        ("a", "KIND_CPU"),
        ("a", 0),
    ]
    assert values(r"""s: "a" 'b\x41\101\n\u00e9\U0001f600\'' "\"" """) == [("s", "abAA\né😀'\"")]


def test_every_value_knows_where_it_stands():
    (first, second) = parse(b'a: 1\n  b {\n\tc: "x"\n}', "x").fields
    assert (first.line, first.column, first.value.column) == (1, 1, 4)
    assert (second.line, second.column) == (2, 3)
    assert (second.value.fields[0].line, second.value.fields[0].column) == (3, 2)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: [1,", "x:1:7: expected a value, got the end of the file"),
        ("a: 1 }", "x:1:6: expected a field's name, got '}'"),
        ("\na {\n b: 1", "x:3:6: expected a field's name or '}', got the end of the file"),
        ("a { b: 1 >", "x:1:10: expected a field's name or '}', got '>'"),
        ("a 1", "x:1:3: expected ':' or '{', got '1'"),
        ("a [1]", "x:1:4: expected ':' or '{', got '1'"),
        ("a: [1 2]", "x:1:7: expected ',' or ']', got '2'"),
        ('a: "b', "x:1:4: expected protobuf text"),
        ('a: "b\nc"', "x:1:4: expected protobuf text"),
        ("a: 08", "x:1:4: expected octal digits after a leading 0, got '08'"),
        ("a: 1x", "x:1:4: expected protobuf text"),
        ("a: -b", "x:1:5: expected a number, got 'b'"),
        (r'a: "\q"', r"x:1:4: expected an escape that protobuf knows, got \q"),
        (r'a: "\777"', r"x:1:4: expected an escape for one byte, got \777"),
        (r'a: "\ud800"', r"x:1:4: expected an escape for a character, got \ud800"),
        (r'a: "\xff"', "x:1:4: expected UTF-8 in a string"),
        ("[x.y]: 3", "x:1:1: expected a field's name, got '['"),
        ("a: \0", "x:1:4: expected protobuf text"),
    ],
)
def test_what_is_wrong_is_refused_with_its_place(text, complaint):
    with pytest.raises(ConfigError) as caught:
        parse(text.encode(), "x")
    assert caught.value.message.startswith(complaint)


def test_text_that_is_no_utf8_is_refused():
    with pytest.raises(ConfigError, match="x:2: expected UTF-8 text, got byte 0xff"):
        parse(b"a: 1\n\xff", "x")


@pytest.mark.parametrize(
    ("text", "ceiling"),
    [
        (b" " * (pbtxt.MAX_BYTES + 1), "bytes"),
        (b"a{" * (pbtxt.MAX_DEPTH + 1), "levels"),
        (b"a:[" + b"1," * pbtxt.MAX_VALUES + b"1]", "values"),
        (b"a:" + b"9" * (pbtxt.MAX_NUMBER_CHARACTERS + 1), "characters"),
    ],
)
def test_every_ceiling_holds(text, ceiling):
    with pytest.raises(ConfigError, match=rf"expected (a number of )?at most \d+ {ceiling}"):
        parse(text, "x")
    assert parse(b"a{" * pbtxt.MAX_DEPTH + b"}" * pbtxt.MAX_DEPTH, "x").fields
