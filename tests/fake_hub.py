"""A Hugging Face hub on this machine: as much of its protocol as uploading and downloading small files needs."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

TOKEN = "hf_write"


class FakeHub:
    """What it holds.

    Attributes:
        repos: by id and branch, files by name.
        requested: what was downloaded, paths as they were asked for.
        private: repositories that were made private.
    """

    def __init__(self):
        self.repos, self.requested, self.private = {}, [], set()

    def commit(self, repo_id, branch):
        """A commit hash that belongs to the files."""
        files = self.repos[repo_id][branch]
        return hashlib.sha1(repr(sorted((name, data) for name, data in files.items())).encode()).hexdigest()

    def files(self, repo_id, revision):
        """The files of a branch or commit."""
        branches = self.repos.get(repo_id, {})
        return next((u for name, u in branches.items() if revision in (name, self.commit(repo_id, name))), None)


@contextmanager
def fake_hub(monkeypatch, folder):
    """Within this context, huggingface_hub speaks with a hub of this machine, and keeps its cache in a folder."""
    from huggingface_hub import constants

    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, status, body=b"", **headers):
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def do_POST(self):
            path = unquote(self.path).split("?")[0].strip("/").split("/")
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.answer(401, {"error": "Invalid username or password."})
            if path[:3] == ["api", "repos", "create"]:
                asked = json.loads(data)
                repo_id = "/".join(u for u in (asked.get("organization", "somebody"), asked["name"]) if u)
                if repo_id in hub.repos:
                    return self.answer(409, {"error": "exists"})
                hub.repos[repo_id] = {"main": {}}
                if asked.get("private") or asked.get("visibility") == "private":  # by version of huggingface_hub
                    hub.private.add(repo_id)
                return self.answer(200, {"url": f"{constants.ENDPOINT}/{repo_id}"})
            if path[1] == "validate-yaml":
                return self.answer(200, {"errors": [], "warnings": []})
            repo_id, kind, branch = "/".join(path[2:4]), path[4], path[5]
            if kind == "branch":
                hub.repos[repo_id][branch] = dict(hub.repos[repo_id]["main"])
                return self.answer(200)
            if kind == "preupload":
                asked = json.loads(data)["files"]
                files = [{"path": u["path"], "uploadMode": "regular", "shouldIgnore": False} for u in asked]
                return self.answer(200, {"files": files})
            for line in data.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    hub.repos[repo_id][branch][entry["value"]["path"]] = content
            oid = hub.commit(repo_id, branch)
            url = f"{constants.ENDPOINT}/{repo_id}/commit/{oid}"
            return self.answer(200, {"success": True, "commitOid": oid, "commitUrl": url})

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = unquote(self.path).split("?")[0].strip("/").split("/")
            if path[:2] == ["api", "models"]:
                repo_id, revision = "/".join(path[2:4]), path[5] if len(path) > 5 else "main"
                files = hub.files(repo_id, revision)
                if files is None:
                    code = "RevisionNotFound" if repo_id in hub.repos else "RepoNotFound"
                    return self.answer(404, {"error": "not found"}, X_Error_Code=code)
                branch = next(u for u in hub.repos[repo_id] if hub.repos[repo_id][u] is files)
                if path[4:5] == ["tree"]:
                    listed = [
                        {"type": "file", "path": u, "size": len(v), "oid": hashlib.sha1(v).hexdigest()}
                        for u, v in files.items()
                    ]
                    return self.answer(200, listed)
                siblings = [{"rfilename": u} for u in files]
                return self.answer(200, {"id": repo_id, "sha": hub.commit(repo_id, branch), "siblings": siblings})
            if len(path) < 5:
                return self.answer(404)
            repo_id, revision, name = "/".join(path[:2]), path[3], "/".join(path[4:])
            files = hub.files(repo_id, revision)
            if files is None or name not in files:
                return self.answer(404, X_Error_Code="EntryNotFound")
            if self.command == "GET":
                hub.requested.append(name)
            branch = next(u for u in hub.repos[repo_id] if hub.repos[repo_id][u] is files)
            etag = hashlib.sha1(files[name]).hexdigest()
            return self.answer(200, files[name], ETag=f'"{etag}"', X_Repo_Commit=hub.commit(repo_id, branch))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    for name, value in {
        "ENDPOINT": url, "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(folder / "hub"),
        "HF_TOKEN_PATH": str(folder / "token"),
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_STORED_TOKENS_PATH": str(folder / "ts"), "HF_HUB_DISABLE_PROGRESS_BARS": True,
    }.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
