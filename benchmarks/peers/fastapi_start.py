"""FastAPI under uvicorn, at its quickest: raw bytes in and out.

Arguments: a folder (not used), the HTTP port, another port (not used), how many runs at once. A tiny model runs on the
event loop, as it would wait longer for a thread than it runs; a heavier one in the pool of threads, so that all cores
work.
"""

from __future__ import annotations

import sys

import model
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool

app = FastAPI()
_IN_POOL = int(sys.argv[4]) > 1


@app.post("/raw")
async def raw(request: Request) -> Response:
    """One row in, one row out."""
    feeds = model.from_raw(await request.body())
    output = await run_in_threadpool(model.run, feeds) if _IN_POOL else model.run(feeds)
    return Response(output.tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    model.session()
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), access_log=False, log_level="warning")
