"""What the gateway is measured against: the plainest FastAPI application that answers the same requests.

    python -m tests.benchmarks.traffic.stock PORT

It keeps pictures without looking at them, asks for no key, checks no limit, tells no state from another and promises
nothing after a crash. `DREAMSERVE_REDIS_URL` and `DREAMSERVE_STATE_DIR` say where to.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import uuid
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel
from redis.asyncio import Redis

from service.schemas import JobBody

app = FastAPI()
redis = Redis.from_url(os.environ.get("DREAMSERVE_REDIS_URL", "redis://localhost"))
folder = Path(os.environ.get("DREAMSERVE_STATE_DIR", "."))


class Reference(BaseModel):
    image: str
    role: str


class Customize(BaseModel):
    prompt: str
    references: list[Reference]


class Accepted(BaseModel):
    id: str


@app.post("/v1/customize", status_code=202)
async def customize(body: Customize) -> Accepted:
    names: list[str] = []
    for reference in body.references:
        data = base64.b64decode(reference.image.partition(",")[2])
        names.append(uuid.uuid4().hex)
        (folder / names[-1]).write_bytes(data)
    job_id = uuid.uuid4().hex
    await redis.lpush("stock:jobs", json.dumps({"id": job_id, "prompt": body.prompt, "references": names}))  # pyright: ignore[reportGeneralTypeIssues]  # redis' annotations
    return Accepted(id=job_id)


@app.get("/v1/jobs/{id}")
async def get_job(id: str) -> JobBody:
    fields: Any = await redis.hgetall(f"stock:job:{id}")  # pyright: ignore[reportGeneralTypeIssues]  # as above
    if not fields:
        raise HTTPException(404)
    return JobBody(**{name.decode(): json.loads(value) for name, value in fields.items()})


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", access_log=False)
