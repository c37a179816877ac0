"""`skerry status | ps | providers | why`: what the daemon does and why it does it so.

`providers` and `why` also answer where no daemon runs: the one by looking at the hardware now, the other
from what the last daemon wrote down.
"""

from __future__ import annotations

import asyncio
from contextlib import closing
from typing import Annotated, Any
from urllib.parse import quote

import typer

from agent.cli import render
from agent.cli.session import AsJson, Session, print_json, session_of
from agent.clock import wall
from skerry.errors import NotFound


def status(context: typer.Context, *, as_json: AsJson = False) -> None:
    """Say how the daemon is."""
    session = session_of(context)
    page = session.get("/skerry/v1/status")
    if as_json:
        print_json(page)
        return
    registry, models = page["registry"], page["models"]
    session.console.print(
        render.facts(
            [
                ("skerry", f"{page['version']}, pid {page['pid']}, up {render.duration(page['uptime_s'])}"),
                ("ready", "yes" if page["ready"] else "no"),
                ("models", _models_line(models)),
                ("registry", _registry_line(registry)),
                # A daemon that was not restarted since an upgrade says nothing of them.
                *([("files", _files_line(registry))] if "scrub" in registry else []),
                ("cache", _cache_line(page.get("cache"))),
                ("providers", _providers_line(page["providers"])),
                ("memory", f"{render.size(page['rss_bytes'])}; {_node_memory()}"),
                ("gRPC", _grpc_line(page.get("grpc"))),
                ("home", page["home"] or "the platform's places, see `skerry config show`"),
                ("socket", str(page["socket"])),
            ]
        )
    )
    for warning in [*registry["problems"], *page["warnings"]]:
        session.remarks.print(f"warning: {warning}", markup=False)


def _node_memory() -> str:
    import psutil  # noqa: PLC0415 - here only

    memory = psutil.virtual_memory()
    return f"{render.size(memory.available)} of {render.size(memory.total)} are free on this node"


def _models_line(models: dict[str, Any]) -> str:
    asleep = f", {models['asleep']} asleep" if models["asleep"] else ""
    line = f"{models['ready']} of {models['total']} ready{asleep}, {render.size(models['memory_bytes'])}"
    limit = models["memory_limit_bytes"]
    return f"{line} of {render.size(limit)}" if limit else line


def _registry_line(registry: dict[str, Any]) -> str:
    if not registry["revision"]:
        return "empty"
    owner = "signed by this node" if registry["owner"] else "follows another root"
    channel = f", channel {registry['channel']}" if registry["channel"] else ""
    return f"revision {registry['revision']}, {owner}, {_freshness(registry)}{channel}"


def _freshness(registry: dict[str, Any]) -> str:
    """How old the signatures are, and what that means."""
    if registry["freshness"] == "unknown":
        return "freshness unknown: this node's clock is not synchronised"
    expires = render.duration(abs(registry["expires_unix"] - wall()))
    if registry["freshness"] == "stale":
        return f"STALE: expired {expires} ago, so nothing new is admitted"
    return f"fresh for {expires}"


def _files_line(registry: dict[str, Any]) -> str:
    """What is wrong with them, and when they were last read."""
    tampered, missing, scrub = registry["tampered"], registry["missing"], registry["scrub"]
    parts = [f"tampered: {', '.join(tampered)}"] if tampered else []
    parts += [f"{missing} missing"] if missing else []
    parts += [_scrub_words(scrub)]
    return "; ".join(parts)


def _scrub_words(scrub: dict[str, Any]) -> str:
    running, last = scrub["running"], scrub["last"]
    if running:
        return f"being read: {render.size(running['bytes'])} of {render.size(running['of_bytes'])}"
    if last:
        found = sum(last[what] for what in ("tampered", "missing", "unreadable"))
        outcome = f"{found} of {last['files']} not as signed" if found else f"{last['files']} as signed"
        return f"read {render.age(last['finished_unix'])} ago, {outcome}"
    due_s = scrub["next_s"]
    return (
        "never read since the daemon started" if due_s is None else f"to be read in {render.duration(due_s)}"
    )


def _cache_line(cache: dict[str, Any] | None) -> str:
    if cache is None:
        return "off"
    asked = cache["hits"] + cache["misses"]
    rate = f"{100 * cache['hits'] / asked:.0f} % of {asked} hit" if asked else "not asked yet"
    return f"{cache['entries']} answers, {render.size(cache['bytes'])}, {rate}"


def _providers_line(providers: dict[str, Any]) -> str:
    count = providers["devices"]
    return f"onnxruntime {providers['onnxruntime'] or render.DASH}, {count} device{'' if count == 1 else 's'}"


def _grpc_line(grpc: dict[str, Any] | None) -> str:
    if grpc is None:
        return "off, see `grpc.enabled`"
    if grpc["pid"] is None:
        return f"{grpc['state']} on {grpc['socket']}"
    return f"pid {grpc['pid']}, {render.size(grpc['rss_bytes'])}, on {grpc['socket']}"


def ps(context: typer.Context, *, as_json: AsJson = False) -> None:
    """List the models that are served, with what they use."""
    session = session_of(context)
    page = session.get("/skerry/v1/models")
    if as_json:
        print_json(page)
        return
    # What a newer version has replaced is no trouble; --json has it.
    models = [model for model in page["models"] if not model.get("superseded_by")]
    if not models:
        session.remarks.print(
            "no models yet; `skerry model add FILE.onnx --name NAME` adds one", markup=False
        )
        return
    session.console.print(models_table(models))
    for model in models:
        if model.get("reason"):
            session.remarks.print(f"{model['name']}/{model['version']}: {model['reason']}", markup=False)


def models_table(models: list[dict[str, Any]]) -> Any:  # noqa: ANN401 - rich's Table, imported only to print
    """The table of `skerry ps`, from the page /skerry/v1/models."""
    # Short headings: twelve columns have to fit into 80 characters.
    columns = ["MODEL", ">VER", "STATE", "DEVICE", ">MEM", "KEEP", ">REQS", ">FAIL"]
    columns += [">P50", ">P99", ">HITS", ">USED"]
    rows = [_model_row(model) for model in models]
    if any(model.get("group") for model in models):
        at = columns.index(">MEM")
        columns.insert(at, "GROUP")
        for model, row in zip(models, rows, strict=True):
            row.insert(at, model.get("group") or render.DASH)
    return render.table(columns, rows)


def _model_row(model: dict[str, Any]) -> list[str]:
    hits, misses = model.get("cache_hits") or 0, model.get("cache_misses") or 0
    return [
        model["name"],
        model["version"],
        "ASLEEP" if model.get("asleep") else model["state"],
        render.device(model.get("device")),
        render.size(model.get("memory_bytes")),
        _keep(model),
        render.number(model.get("requests")),
        render.number(model.get("failures")),
        render.microseconds(model.get("p50_us")),
        render.microseconds(model.get("p99_us")),
        f"{hits}/{hits + misses}" if hits + misses else render.DASH,
        "now" if model.get("leases") else render.briefly(model.get("unused_s")),
    ]


def _keep(model: dict[str, Any]) -> str:
    """How long it stays in memory unused: a time, "pin" where memory pressure does not move it, or a dash."""
    keep_s = model.get("keep_alive_s")
    words = ["pin"] if model.get("pinned") else []
    return " ".join([*words, render.briefly(keep_s)] if keep_s else words) or render.DASH


def denials(context: typer.Context, *, as_json: AsJson = False) -> None:
    """List the last requests that an access rule refused, the newest last."""
    session = session_of(context)
    page = session.get("/skerry/v1/denials")
    if as_json:
        print_json(page)
        return
    if not page["denials"]:
        session.remarks.print("nobody was refused since the daemon started", markup=False)
        return
    rows = [
        [
            render.age(item["unix"]),
            str(item["uid"]),
            str(item["pid"]),
            item["door"],
            item["action"],
            item["model"] or render.DASH,
            item["rule"],
        ]
        for item in page["denials"]
    ]
    session.console.print(render.table([">AGO", ">UID", ">PID", "SOCKET", "ACTION", "MODEL", "RULE"], rows))


def providers(context: typer.Context, *, as_json: AsJson = False) -> None:
    """List the devices that can run models, best first, and what was left out."""
    session = session_of(context)
    page = session.get_if_running("/skerry/v1/providers") or _discover(session)
    if as_json:
        print_json(page)
        return
    session.remarks.print(f"onnxruntime {page['onnxruntime']}, policy {page['policy']}", markup=False)
    rows = [
        [
            str(rank),
            item["kind"],
            render.device(item["device"]),
            item.get("version") or render.DASH,
            item["route"],
            item["reason"],
        ]
        for rank, item in enumerate(page["candidates"], start=1)
    ]
    session.console.print(render.table([">#", "KIND", "DEVICE", "VERSION", "ROUTE", "REASON"], rows))
    for item in page["excluded"]:
        session.remarks.print(f"left out: {item['what']}: {item['reason']}", markup=False)


def why(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="The model's name.")],
    *,
    version: Annotated[int | None, typer.Option(min=1, help="The newest if not given.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show where a model was placed: what was tried, measured and refused."""
    session = session_of(context)
    query = "" if version is None else f"?version={version}"
    page = session.get_if_running(f"/skerry/v1/models/{quote(model, safe='')}/placement{query}")
    page = page or _recorded_placement(session, model, version)
    if as_json:
        print_json(page)
        return
    if page.get("fault"):
        session.remarks.print(f"its file is {page['fault']}: `skerry status` says what serves", style="red")
    session.console.print(
        render.facts(
            [
                ("model", f"{page['model']}/{page['version']}"),
                ("digest", str(page.get("digest"))),
                ("policy", str(page.get("policy"))),
                ("placed", f"{render.age(page.get('placed_unix'))} ago"),
            ]
        )
    )
    session.console.print()
    session.console.print(placement_table(page["steps"]))
    session.console.print()
    for rank, step in enumerate(page["steps"], start=1):
        session.console.print(f"{rank}  {step['verdict']}: {step['why']}", markup=False, soft_wrap=True)
    if page.get("accepted") is None:
        session.remarks.print("no device took this model", style="red")


def placement_table(steps: list[dict[str, Any]]) -> Any:  # noqa: ANN401 - rich's Table, imported only to print
    """The trail of one placement."""
    columns = [">#", "DEVICE", "ROUTE", "VERDICT", ">NODES", ">CREATED"]
    columns += [">MAX ABS", ">MAX REL", ">MEDIAN", ">P90"]
    return render.table(columns, (_step_row(rank, step) for rank, step in enumerate(steps, start=1)))


def _step_row(rank: int, step: dict[str, Any]) -> list[str]:
    parity = step.get("parity") or {}
    placed, total = step.get("nodes_placed"), step.get("nodes_total")
    return [
        str(rank),
        render.device(step["device"]),
        step["route"],
        step["verdict"],
        render.DASH if total is None else f"{render.number(placed)}/{total}",
        render.number(step.get("created_ms"), "{:.0f} ms"),
        render.number(parity.get("max_abs"), "{:.1e}"),
        render.number(parity.get("max_rel"), "{:.1e}"),
        render.microseconds(step.get("median_us")),
        render.microseconds(step.get("p90_us")),
    ]


def _recorded_placement(session: Session, model: str, version: int | None) -> dict[str, Any]:
    from store.trail import StateStore  # noqa: PLC0415 - only where no daemon runs

    what = model if version is None else f"{model}/{version}"
    with closing(StateStore.read_only(session.paths.state_db)) as state:
        record = state.placement(model, version)
    if record is None:
        raise NotFound(
            f"{what}: never placed on this node", "`skerry model list` shows what the registry holds"
        )
    session.remarks.print("no daemon runs; this is what the last one wrote down")
    return {**record, "version": str(record["version"])}


def _discover(session: Session) -> dict[str, Any]:
    from agent import config  # noqa: PLC0415 - only where no daemon runs
    from providers.discovery import discover  # noqa: PLC0415 - likewise
    from providers.ranking import rank  # noqa: PLC0415 - likewise

    settings = config.load(session.paths.config_file).providers
    found = asyncio.run(discover(settings.discovery_timeout_s, settings.plugins))
    if found.problem:
        session.remarks.print(f"warning: {found.problem}", markup=False)
    return {
        "onnxruntime": found.onnxruntime,
        "policy": settings.policy,
        "candidates": [
            {
                "ep": candidate.device.ep_name,
                "device": candidate.device.label,
                "kind": str(candidate.device.kind),
                "vendor": candidate.device.vendor,
                "version": candidate.device.ep_version,
                "route": candidate.device.route,
                "reason": candidate.reason,
            }
            for candidate in rank(found.devices, settings.policy)
        ],
        "excluded": [{"what": item.what, "reason": item.reason} for item in found.excluded],
    }
