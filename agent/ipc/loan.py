"""When a client's connection is lent to a worker, and as what.

Does: recognise a client that asks for one thing only, and turn what the daemon knows of its request and the answer
into the form that the worker compares with (providers.lending.Form).
Leaves out: the lending itself (providers.lending), the connection's bytes (agent.ipc.http).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent.ipc import replies
from agent.ipc.encodings import MIN_COMPRESSED_BYTES
from providers.lending import WATCH_S, Form
from providers.wire import ELSEWHERE
from skerry.terms import ITEM_SIZES, KIB

if TYPE_CHECKING:
    from agent.infer import Plan
    from agent.ipc.head import Head
    from skerry.terms import TensorView

#: Requests of one form in a row before a connection is lent: a loan costs as much as some five requests.
AFTER = 16
#: The same for a client whose connection keeps coming back.
AFTER_AT_MOST = 4096
#: Larger bodies gain nothing, and are received into shared memory.
MAX_BODY_BYTES = 16 * KIB
MAX_ANSWER_BYTES = 32 * KIB
#: What must be looked at, or has no numpy type.
_NO_INPUT = frozenset({"BYTES", "BOOL", "BF16"})
_NO_OUTPUT = frozenset({"BYTES", "BF16"})
#: What is copied before a run (providers.shared).
_NO_SHARED_INPUT = _NO_INPUT | {"INT32", "INT64"}


def form_of(raw_head: bytes, head: Head, plan: Plan, answer_json: bytes, request_id: str) -> Form | None:
    """The form of a request that was just answered, or None if a worker cannot serve its like.

    Args:
        raw_head: the HTTP head's bytes.
        head: what they say.
        plan: of its JSON.
        answer_json: of its answer, with the id.
        request_id: empty if it had none.
    """
    header, layout = plan.header, plan.answer_layout
    if (
        header is None
        or layout is None
        or plan.timeout_s < WATCH_S  # nobody would look in time
        or not head.keep_alive
        or not head.ordinary
        or head.expects_continue
        or (head.wanted is not None and len(answer_json) + layout.size_bytes >= MIN_COMPRESSED_BYTES)
    ):
        return None
    asked = plan.layout
    lying = asked.regions or (None,) * len(asked.tensors)
    if not (
        plan.binary_bytes <= MAX_BODY_BYTES
        and layout.size_bytes <= MAX_ANSWER_BYTES
        # A header that says where the JSON ends is there if, and only if, something comes behind it.
        and (head.json_bytes > 0) == (plan.binary_bytes > 0)
        and all(registered.region.alive for registered in plan.regions)
        and all(
            _fits(view, _NO_INPUT if region is None else _NO_SHARED_INPUT)
            for view, region in zip(asked.tensors, lying, strict=True)
        )
        and all(_fits(view, _NO_OUTPUT) for view in layout.tensors)
    ):
        return None
    answer = _answer_of(answer_json, layout.size_bytes)
    id_bytes = len(request_id)
    cut = len(answer) - len(answer_json) + len('{"id":"') if id_bytes else len(answer)
    return Form(
        rows=plan.inferences,
        head=raw_head + header.before,
        id_bytes=id_bytes,
        tail=header.after,
        inputs=asked.tensors,
        answer=(answer[:cut], answer[cut + id_bytes :]),
        outputs=layout.tensors,
        regions=asked.regions,
        targets=asked.targets,
        timeout_s=plan.timeout_s,
    )


def _answer_of(json: bytes, size_bytes: int) -> bytes:
    """The answer up to its tensors, as agent.ipc.http writes it."""
    if size_bytes:
        return replies.binary_head(json, len(json) + size_bytes, close=False)
    return replies.page(replies.OK, replies.JSON, json, close=False, head_only=False)


def _fits(view: TensorView, excluded: frozenset[str]) -> bool:
    """Whether arrays can be laid over it where it lies."""
    return (
        view.datatype not in excluded
        and view.size_bytes > 0
        and (view.offset == ELSEWHERE or view.offset % ITEM_SIZES[view.datatype] == 0)
    )
