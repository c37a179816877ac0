"""When a client's connection is lent to a worker, and as what.

Does: recognise a client that asks for one thing only, and turn what the daemon knows of its request and the answer
into the form that the worker compares with (providers.lending.Form).
Leaves out: the lending itself (providers.lending), the connection's bytes (agent.ipc.http).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent.ipc import replies
from providers.lending import Form
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
_NO_INPUT = {"BYTES", "BOOL", "BF16"}
_NO_OUTPUT = {"BYTES", "BF16"}


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
        or not head.keep_alive
        or head.expects_continue
        or head.json_bytes <= 0
    ):
        return None
    inputs, outputs = plan.layout.tensors, layout.tensors
    if not (
        0 < plan.binary_bytes <= MAX_BODY_BYTES
        and 0 < layout.size_bytes <= MAX_ANSWER_BYTES
        and all(_fits(view, _NO_INPUT) for view in inputs)
        and all(_fits(view, _NO_OUTPUT) for view in outputs)
    ):
        return None
    id_bytes = len(request_id)
    answer_head = replies.binary_head(answer_json, len(answer_json) + layout.size_bytes, close=False)
    cut = len(answer_head) - len(answer_json) + len('{"id":"') if id_bytes else len(answer_head)
    return Form(
        plan.inferences,
        raw_head + header.before,
        id_bytes,
        header.after,
        inputs,
        (answer_head[:cut], answer_head[cut + id_bytes :]),
        outputs,
        plan.timeout_s,
    )


def _fits(view: TensorView, excluded: set[str]) -> bool:
    """Whether arrays can be laid over it where it lies."""
    return (
        view.datatype not in excluded and view.size_bytes > 0 and view.offset % ITEM_SIZES[view.datatype] == 0
    )
