"""Outside views of W&B: a reader of offline run files (LevelDB log framing over protobuf records) and a loopback server."""

from __future__ import annotations

import base64
import gzip
import json
import re
import struct
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BLOCK = 32768


def records(path: Path) -> Iterator[Any]:
    """Protobuf records of a ``run-*.wandb`` file: 7-byte header, then LevelDB blocks of (crc, length, type, data)."""
    from wandb.proto import wandb_internal_pb2 as pb

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, held = 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        chunk = data[at + 7 : at + 7 + length]
        if kind == 0 or len(chunk) < length:
            return
        at += 7 + length
        held = chunk if kind in (1, 2) else held + chunk
        if kind in (1, 4):
            yield pb.Record.FromString(held)


def read_offline(path: Path) -> dict[str, Any]:
    """Run identity, config, summary, history and exit code of an offline run."""
    out: dict[str, Any] = {"config": {}, "summary": {}, "history": [], "exit": None}

    def pairs(items: Any) -> dict[str, Any]:
        return {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items if i.value_json}

    for r in records(path):
        kind = r.WhichOneof("record_type")
        if kind == "run":
            out |= {
                "id": r.run.run_id,
                "group": r.run.run_group,
                "job_type": r.run.job_type,
                "name": r.run.display_name,
                "project": r.run.project,
            }
            out["config"] |= pairs(r.run.config.update)
        elif kind == "config":
            out["config"] |= pairs(r.config.update)
        elif kind == "summary":
            out["summary"] |= pairs(r.summary.update)
        elif kind == "history":
            out["history"].append(pairs(r.history.item))
        elif kind == "exit":
            out["exit"] = r.exit.exit_code
    return out


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, value: Any, code: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        data = self.rfile.read(int(self.headers.get("content-length") or 0))
        return gzip.decompress(data) if self.headers.get("content-encoding") == "gzip" else data

    def bad(self) -> bool:
        mode = self.server.mode
        if mode == "hang":
            self.server.released.wait(600)
        if mode in ("hang", "500"):
            self.answer({"error": "broken"}, 500)
            return True
        return False

    def do_GET(self) -> None:
        self.body()
        self.bad() or self.answer({})

    def do_PUT(self) -> None:
        data = self.body()
        if not self.bad():
            self.server.files[self.path] = data
            self.answer({})

    def do_POST(self) -> None:
        data = self.body()
        self.server.calls += 1
        if given := self.headers.get("Authorization"):
            self.server.passwords.add(base64.b64decode(given.removeprefix("Basic ")).decode())
        if self.bad():
            return
        if self.path == "/graphql":
            return self.graphql(json.loads(data))
        if match := re.match(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
            stream, run = json.loads(data), self.server.runs.setdefault(match[1], {})
            for name, part in (stream.get("files") or {}).items():
                if name == "wandb-history.jsonl":
                    run.setdefault("history", []).extend(json.loads(line) for line in part["content"])
                elif name == "wandb-summary.json":
                    run["summary"] = json.loads(part["content"][-1])
            if "exitcode" in stream:
                run["exit"] = stream["exitcode"]
        return self.answer({})

    def graphql(self, call: dict[str, Any]) -> None:
        found = re.search(r"(?:query|mutation)\s*(\w*)", call["query"])
        name, given = found.group(1) if found else "", call.get("variables") or {}
        project = {"id": "p", "name": given.get("project") or "p", "entity": {"id": "e", "name": "team"}}
        if name == "Viewer":
            viewer = {
                "id": "u",
                "entity": "team",
                "username": "u",
                "email": "u@example.org",
                "admin": False,
                "flags": "{}",
                "teams": {"edges": []},
            }
            return self.answer({"data": {"viewer": viewer}})
        if name == "ServerFeaturesQuery":
            return self.answer({"data": {"serverInfo": {"features": []}}})
        if name == "UpsertBucket":
            run = given.get("name") or given.get("id")
            new = run not in self.server.runs
            self.server.runs.setdefault(run, {}).update({k: v for k, v in given.items() if v is not None})
            if len(self.server.runs) >= self.server.dies_after:
                self.server.mode = "hang"
            bucket = {
                "id": "id_" + run, "name": run, "displayName": given.get("displayName") or run, "description": "", "config": None,
                "sweepName": None, "historyLineCount": 0, "project": project,
            }  # fmt: skip
            return self.answer({"data": {"upsertBucket": {"inserted": new, "bucket": bucket}}})
        if name == "RunResumeStatus":
            bucket = self.server.runs.get(run := given["name"])
            if bucket is not None:  # resumed: the client goes on from its history and summary
                history = [json.dumps(step) for step in bucket.get("history", [])]
                bucket = {
                    "id": "id_" + run, "name": run, "displayName": bucket.get("displayName"), "config": bucket.get("config") or "{}",
                    "summaryMetrics": json.dumps(bucket.get("summary", {})), "wandbConfig": '{"t": 1}', "tags": [], "notes": None,
                    "historyLineCount": len(history), "historyTail": json.dumps(history[-1:]), "eventsLineCount": 0,
                    "eventsTail": "[]", "logLineCount": 0,
                }  # fmt: skip
            return self.answer({"data": {"model": {**project, "bucket": bucket}}})
        if name == "CreateRunFiles":
            base = f"http://127.0.0.1:{self.server.server_port}/storage/{given['run']}/"
            files = [{"name": f, "uploadUrl": base + f} for f in given["files"]]
            return self.answer({"data": {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}})
        if name == "RunStoppedStatus":
            return self.answer({"data": {"project": {"run": {"stopped": False}}}})
        return self.answer({"data": None, "errors": [{"message": f"unknown call {name}"}]})


class Server(ThreadingHTTPServer):
    """A W&B server on the loopback; ``mode``: ok, hang or 500, may change while it runs."""

    daemon_threads = True

    def __init__(self, mode: str = "ok") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.mode, self.runs, self.files, self.calls = mode, {}, {}, 0
        self.passwords: set[str] = set()  # as "api:KEY"
        self.dies_after = 1_000_000  # runs begun before it stops to answer
        self.released = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __exit__(self, *args: Any) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()
        time.sleep(0)
