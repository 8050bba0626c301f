"""A local Hub for tests: repos, commits and tags behind the routes that the real client calls.

Takes a folder for its files; gives a URL for HF_ENDPOINT. Contents are stored under their sha256 and commits under
their sha1, so tests can inspect in the folder what was pushed. It cuts connections and answers with errors where a test
asks for it. It implements the protocol observed with huggingface_hub 2.4, without Xet.
"""

import base64
import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

LARGE = (".safetensors", ".png")
"""Endings of files that the Hub stores as large files (LFS) by default."""
REPO = r"(?P<repo>[^/]+/[^/]+)"


@dataclass
class Account:
    """The user of a token, and the namespaces that it may write to."""

    name: str
    writes_to: tuple[str, ...] = ()


ACCOUNTS = {"hf_of_ada": Account("ada", ("ada", "org")), "hf_reads_only": Account("bob")}


@dataclass
class Fault:
    """A fault that occurs `times` times, at requests whose "METHOD path" matches the pattern anywhere."""

    pattern: str
    what: str
    """"during": the connection is cut when half of the body has arrived; "after": it is cut when the work is done but
    before the answer; or a status, such as 503."""
    times: int = 1


@dataclass
class Refusal(Exception):
    """An error answer, with the code by which the client recognises it."""

    status: int
    code: str
    message: str


@dataclass
class LoopbackHub:
    """`with LoopbackHub(folder) as hub:` serves at `hub.url` until the block ends."""

    folder: Path
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    """"METHOD path -> status" of every request, answered or cut, in order."""

    def __enter__(self) -> "LoopbackHub":
        for name in ("objects", "commits", "repos"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.lock = threading.Lock()
        handler = type("Bound", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path, token: str | None = "hf_of_ada") -> dict[str, str]:
        """Environment of a client process: only this Hub, its own cache, no proxy, plain LFS."""
        mine = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
        mine |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        return mine | ({"HF_TOKEN": token} if token else {})

    # ---- storage

    def store(self, content: bytes) -> str:
        name = hashlib.sha256(content).hexdigest()
        (self.folder / "objects" / name).write_bytes(content)
        return name

    def has(self, name: str) -> bool:
        return (self.folder / "objects" / name).exists()

    def content(self, name: str) -> bytes:
        return (self.folder / "objects" / name).read_bytes()

    def repo(self, name: str) -> dict[str, Any] | None:
        """{"private", "branches": {name: commit}, "tags": {name: commit}}"""
        file = self._file_of(name)
        return json.loads(file.read_text()) if file.exists() else None

    def save_repo(self, name: str, repo: dict[str, Any]) -> None:
        file = self._file_of(name)
        file.with_suffix(".new").write_text(json.dumps(repo))
        file.with_suffix(".new").rename(file)

    def commit(self, name: str) -> dict[str, Any]:
        """{"parent", "saw" (the client's idea of the parent), "title", "files": {path: {"object", "size", "lfs"}}}"""
        return json.loads((self.folder / "commits" / name).read_text())

    def save_commit(self, commit: dict[str, Any]) -> str:
        text = json.dumps(commit)
        name = hashlib.sha1(text.encode()).hexdigest()
        (self.folder / "commits" / name).write_text(text)
        return name

    def history(self, name: str) -> list[dict[str, Any]]:
        """The commits of main, newest first."""
        repo = self.repo(name)
        found, at = [], repo and repo["branches"]["main"]
        while at:
            found.append(self.commit(at))
            at = found[-1]["parent"]
        return found

    def files(self, name: str, tag: str) -> dict[str, bytes]:
        """Path -> contents of the files of a tag."""
        repo = self.repo(name)
        assert repo is not None
        return {path: self.content(f["object"]) for path, f in self.commit(repo["tags"][tag])["files"].items()}

    def _file_of(self, name: str) -> Path:
        return self.folder / "repos" / (name.replace("/", "~") + ".json")

    # ---- faults

    def fault_at(self, request: str) -> str | None:
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.pattern, request):
                fault.times -= 1
                return fault.what
        return None


def git_id(content: bytes) -> str:
    """git's object id of a small file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def wrong_in(front: dict[str, Any]) -> list[str]:
    """What the Hub would reject in a card's front matter. Licences are checked by their form only, because the Hub's
    list is long."""
    licence, errors = str(front.get("license", "other")), []
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence):
        errors.append(f'"license" must be one of [apache-2.0, mit, ..., other], not "{licence}"')
    for i, name in enumerate(front.get("datasets", [])):
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            errors.append(f'"datasets[{i}]" with value "{name}" is not valid. Use a dataset id')
    return errors


class Handler(BaseHTTPRequestHandler):
    """Handles one request: authenticates, finds the route, answers."""

    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def answer_request(self) -> None:
        self.path, self.query = urlsplit(self.path)[2:4]
        request = f"{self.command} {unquote(self.path)}"
        fault = self.hub.fault_at(request)
        self.status = 0
        if fault == "during":
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self._cut(request)
        else:
            self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            try:
                if fault is not None and fault.isdigit():
                    raise Refusal(int(fault), "Broken", "out of order")
                answer = self._route(request)
            except Refusal as refusal:
                headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
                answer = refusal.status, headers, json.dumps({"error": refusal.message}).encode()
            if fault == "after":
                self._cut(request)
            else:
                self._send(request, *answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer_request

    def _cut(self, request: str) -> None:
        self.hub.requests.append(f"{request} -> cut")
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, request: str, status: int, headers: dict[str, str], body: bytes) -> None:
        self.hub.requests.append(f"{request} -> {status}")
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _route(self, request: str) -> tuple[int, dict[str, str], bytes]:
        for pattern, route in ROUTES.items():
            if match := re.fullmatch(pattern, request):
                answer = route(self, **match.groupdict())
                return answer if isinstance(answer, tuple) else (200, {}, json.dumps(answer).encode())
        raise Refusal(404, "NotFound", "no such route")

    # ---- authentication

    def _account(self) -> Account | None:
        """The account of the request; None without a token. Raises Refusal for an unknown token."""
        header = self.headers.get("Authorization")
        if header is None:
            return None
        account = ACCOUNTS.get(header.removeprefix("Bearer "))
        if account is None:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        return account

    def _readable(self, name: str) -> dict[str, Any]:
        repo, account = self.hub.repo(name), self._account()
        if repo is None or (repo["private"] and account is None):
            raise Refusal(404 if account else 401, "RepoNotFound", "Repository not found")
        return repo

    def _may_write(self, namespace: str) -> None:
        account = self._account()
        if account is None:
            raise Refusal(401, "", "Invalid username or password.")
        if namespace not in account.writes_to:
            raise Refusal(403, "", f"You don't have the rights to write to the namespace {namespace}")

    def _writable(self, name: str) -> dict[str, Any]:
        repo = self._readable(name)
        self._may_write(name.split("/")[0])
        return repo

    def _commit_of(self, repo: dict[str, Any], revision: str) -> str:
        found = repo["branches"].get(revision) or repo["tags"].get(revision)
        if found is None and (self.hub.folder / "commits" / revision).is_file():
            found = revision
        if found is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    # ---- routes: repos

    def create(self) -> Any:
        asked = json.loads(self.body)
        account = self._account()
        namespace = asked.get("organization") or (account.name if account else "")
        self._may_write(namespace)
        name = f"{namespace}/{asked['name']}"
        if self.hub.repo(name) is not None:
            raise Refusal(409, "", "You already created this model repo")
        attributes = self.hub.store("".join(f"*{s} filter=lfs diff=lfs merge=lfs -text\n" for s in LARGE).encode())
        files = {".gitattributes": {"object": attributes, "size": len(self.hub.content(attributes)), "lfs": False}}
        first = self.hub.save_commit({"parent": None, "title": "initial commit", "repo": name, "files": files})
        private = asked.get("visibility") == "private" or asked.get("private", False)
        self.hub.save_repo(name, {"private": private, "branches": {"main": first}, "tags": {}})
        return {"url": f"{self.hub.url}/{name}", "name": name, "id": name}

    def settings(self, repo: str) -> Any:
        self.hub.save_repo(
            repo, self._writable(repo) | {"private": json.loads(self.body).get("visibility") == "private"}
        )
        return {}

    def info(self, repo: str, revision: str | None = None) -> Any:
        found = self._readable(repo)
        commit = self._commit_of(found, revision or "main")
        paths = self.hub.commit(commit)["files"]
        return {"id": repo, "sha": commit, "private": found["private"], "siblings": [{"rfilename": p} for p in paths]}

    def refs(self, repo: str) -> Any:
        found = self._readable(repo)
        return {"converts": []} | {
            kind: [{"name": n, "ref": f"refs/{ref}/{n}", "targetCommit": c} for n, c in found[kind].items()]
            for kind, ref in (("branches", "heads"), ("tags", "tags"))
        }

    def commits(self, repo: str, revision: str) -> Any:
        found, at = [], self._commit_of(self._readable(repo), revision)
        while at:
            commit = self.hub.commit(at)
            date = "2026-01-01T00:00:00.000Z"
            found.append({"id": at, "title": commit["title"], "message": "", "authors": [], "date": date})
            at = commit["parent"]
        return found

    def tree(self, repo: str, revision: str, path: str | None = None) -> Any:
        files = self.hub.commit(self._commit_of(self._readable(repo), revision))["files"]
        inside = {p: f for p, f in files.items() if not path or p.startswith(f"{path}/")}
        if path and not inside:
            raise Refusal(404, "EntryNotFound", f"{path} does not exist")
        return [self._entry(p, f) for p, f in inside.items()]

    def _entry(self, path: str, file: dict[str, Any]) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": file["size"], "oid": git_id(self.hub.content(file["object"]))}
        return entry | (
            {"lfs": {"oid": file["object"], "size": file["size"], "pointerSize": 134}} if file["lfs"] else {}
        )

    def tag(self, repo: str, revision: str) -> Any:
        asked = json.loads(self.body)
        with self.hub.lock:
            found = self._writable(repo)
            if asked["tag"] in found["tags"]:
                raise Refusal(409, "", "Tag already exists")
            found["tags"][asked["tag"]] = self._commit_of(found, revision)
            self.hub.save_repo(repo, found)
        return {}

    # ---- routes: up

    def validate(self) -> Any:
        front = re.match(r"---\n(.*?)\n---", json.loads(self.body)["content"], re.S)
        try:
            fields = yaml.safe_load(front[1]) if front else None
            errors = wrong_in(fields) if isinstance(fields, dict) else ["no metadata"]
        except yaml.YAMLError as error:
            errors = [str(error)]
        told = {"errors": [{"message": error} for error in errors], "warnings": []}
        return (400 if errors else 200), {}, json.dumps(told).encode()

    def preupload(self, repo: str, revision: str) -> Any:
        files = self.hub.commit(self._commit_of(self._writable(repo), revision))["files"]

        def mode(path: str) -> dict[str, Any]:
            large = path.endswith(LARGE)
            there = files.get(path)
            oid = there and (there["object"] if there["lfs"] else git_id(self.hub.content(there["object"])))
            return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

        return {"files": [mode(file["path"]) for file in json.loads(self.body)["files"]]}

    def batch(self, repo: str) -> Any:
        self._writable(repo)
        objects = [{"oid": o["oid"], "size": o["size"]} for o in json.loads(self.body)["objects"]]
        for each in objects:
            if not self.hub.has(each["oid"]):
                hrefs = {"upload": f"/large/{each['oid']}", "verify": "/large/verify"}
                each["actions"] = {name: {"href": self.hub.url + path} for name, path in hrefs.items()}
        return {"transfer": "basic", "objects": objects}

    def large(self, oid: str) -> Any:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "", "not what its name says")
        self.hub.store(self.body)
        return {}

    def verify(self) -> Any:
        asked = json.loads(self.body)
        if not self.hub.has(asked["oid"]) or len(self.hub.content(asked["oid"])) != asked["size"]:
            raise Refusal(400, "", "not here")
        return {}

    def take_commit(self, repo: str, branch: str) -> Any:
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        with self.hub.lock:
            found = self._writable(repo)
            parent = self._commit_of(found, branch)
            if header.get("parentCommit") not in (None, parent):
                raise Refusal(412, "", "A commit has happened since. Please refresh and try again.")
            files = dict(self.hub.commit(parent)["files"])
            for line in lines:
                self._apply(line["key"], line["value"], files)
            saw = header.get("parentCommit")
            commit = {"parent": parent, "saw": saw, "title": header["summary"], "repo": repo, "files": files}
            found["branches"][branch] = made = self.hub.save_commit(commit)
            self.hub.save_repo(repo, found)
        return {"commitOid": made, "commitUrl": f"{self.hub.url}/{repo}/commit/{made}"}

    def _apply(self, key: str, value: dict[str, Any], files: dict[str, Any]) -> None:
        if key == "file":
            content = base64.b64decode(value["content"])
            files[value["path"]] = {"object": self.hub.store(content), "size": len(content), "lfs": False}
        elif key == "lfsFile":
            if not self.hub.has(value["oid"]):
                raise Refusal(400, "", f"{value['path']} was not uploaded")
            files[value["path"]] = {
                "object": value["oid"], "size": len(self.hub.content(value["oid"])), "lfs": True
            }  # fmt: skip
        elif key == "deletedFile":
            del files[value["path"]]

    # ---- routes: down

    def resolve(self, repo: str, revision: str, path: str) -> Any:
        commit = self._commit_of(self._readable(repo), revision)
        file = self.hub.commit(commit)["files"].get(path)
        if file is None:
            raise Refusal(404, "EntryNotFound", f"{path} does not exist")
        content = self.hub.content(file["object"])
        name = file["object"] if file["lfs"] else git_id(content)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{name}"', "Accept-Ranges": "bytes"}
        if file["lfs"]:
            headers |= {"X-Linked-Etag": f'"{name}"', "X-Linked-Size": str(len(content))}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(asked[1]), int(asked[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return 206, headers, content[first : last + 1]
        return 200, headers, content


API = f"/api/models/{REPO}"
ROUTES: dict[str, Callable[..., Any]] = {
    "POST /api/repos/create": Handler.create,
    "POST /api/validate-yaml": Handler.validate,
    f"PUT {API}/settings": Handler.settings,
    f"GET {API}": Handler.info,
    f"GET {API}/revision/(?P<revision>[^/]+)": Handler.info,
    f"GET {API}/refs": Handler.refs,
    f"GET {API}/commits/(?P<revision>[^/]+)": Handler.commits,
    rf"GET {API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?": Handler.tree,
    f"POST {API}/tag/(?P<revision>[^/]+)": Handler.tag,
    f"POST {API}/preupload/(?P<revision>[^/]+)": Handler.preupload,
    f"POST {API}/commit/(?P<branch>[^/]+)": Handler.take_commit,
    f"POST /{REPO}[.]git/info/lfs/objects/batch": Handler.batch,
    "PUT /large/(?P<oid>[0-9a-f]{64})": Handler.large,
    "POST /large/verify": Handler.verify,
    f"(?:GET|HEAD) /{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)": Handler.resolve,
}
