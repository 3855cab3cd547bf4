"""A small Hub on loopback: the HTTP protocol that `huggingface_hub` speaks, for the unmodified client.

    with Hub() as hub:
        hub.add_user("ann", token="hf_...", role="write")
        HfApi(endpoint=hub.url, token="hf_...").create_repo("ann/model")

Written from the requests that `huggingface_hub` 2.4 makes: repositories, preupload, LFS batch and transfer (single and
multi-part), commits as ndjson, trees, refs, resolving with ETag and ranges, gated and private repositories. Large files are
served from a second origin (`localhost` beside `127.0.0.1`) as the Hub does from its CDN, and that origin fails a request that
brings a token. Xet is absent: set HF_HUB_DISABLE_XET=1 where `hf_xet` is installed.

Faults: `hub.fail("commit", Fault(status=500))`. Every request is kept in `hub.requests`; a path that this Hub does not know
is answered 404 and kept in `hub.unknown`, which a test should find empty.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".png", ".jpg", ".model", ".pt")
LFS_FROM_BYTES = 10 * 2**20  # a regular file of this size goes to LFS as well
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Fault:
    """What happens to a request instead of, or beside, its answer.

    status: this error. cut: the connection is closed, `before` the request is handled, `after` (the answer is lost), or in the
    `middle` of the answer's body.
    slow: the answer comes in pieces, with pauses of that many seconds. times: how many requests suffer it.
    """

    status: int | None = None
    retry_after: int | None = None
    cut: str | None = None
    slow: float | None = None
    times: int = 1


@dataclass
class Blob:
    """A file in a commit. sha256: of a large file, whose content lies in `Hub.objects`."""

    size: int
    oid: str
    content: bytes | None = None
    sha256: str | None = None


@dataclass
class Commit:
    oid: str
    title: str
    files: dict[str, Blob]


@dataclass
class Repo:
    """kind: `model`, `dataset` or `space`. gated: only for those in `granted`."""

    name: str
    kind: str
    private: bool = False
    gated: bool = False
    granted: set[str] = field(default_factory=set)
    sdk: str | None = None
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.name.split("/")[0]

    def commit(self, revision: str) -> Commit | None:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return next((commit for commit in self.commits if commit.oid == oid), None)

    def add(self, title: str, files: dict[str, Blob], branch: str = "main") -> Commit:
        parent = self.branches.get(branch, "")
        listing = json.dumps({path: blob.oid for path, blob in sorted(files.items())})
        oid = hashlib.sha1(f"{parent}{title}{listing}{len(self.commits)}".encode()).hexdigest()
        self.commits.append(Commit(oid, title, files))
        self.branches[branch] = oid
        return self.commits[-1]


@dataclass(frozen=True)
class Request:
    """One request as it came. step: the name of its route. received: bytes of its body."""

    step: str
    method: str
    path: str
    authorization: str | None
    received: int


class HubError(Exception):
    """An answer with an error status."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class Hub:
    """The server and what it holds. `url` is its endpoint; use it as a context manager.

    shared_names: one name for all kinds of repositories, as on servers where a Space and a model cannot be namesakes.
    multipart_bytes: LFS files above that size are sent in parts of that size.
    """

    def __init__(self, *, shared_names: bool = False, multipart_bytes: int | None = None) -> None:
        self.shared_names, self.multipart_bytes = shared_names, multipart_bytes
        self.users: dict[str, tuple[str, str]] = {}  # token -> (name, role)
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}  # LFS objects by SHA-256
        self.parts: dict[str, dict[int, bytes]] = {}
        self.requests: list[Request] = []
        self.unknown: list[str] = []
        self.uploads: list[str] = []  # SHA-256 of each object that came in whole
        self.faults: dict[str, list[Fault]] = {}
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.storage_url = f"http://localhost:{self.port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[_Handler]:
        return type("Handler", (_Handler,), {"hub": self})

    # ---------------------------------------------------------------------------------------------------- for tests
    def add_user(self, name: str, *, token: str, role: str = "write") -> None:
        self.users[token] = (name, role)

    def fail(self, step: str, fault: Fault) -> None:
        """Let the next `fault.times` requests of a step suffer it."""
        self.faults.setdefault(step, []).extend([fault] * fault.times)

    def heal(self) -> None:
        self.faults.clear()

    def steps(self) -> list[str]:
        return [request.step for request in self.requests]

    def files(self, name: str, kind: str = "model", revision: str = "main") -> dict[str, bytes]:
        """{path: content} of a repository."""
        commit = self.repos[kind, name].commit(revision)
        assert commit is not None
        return {path: self.content(blob) for path, blob in commit.files.items()}

    def content(self, blob: Blob) -> bytes:
        return self.objects[blob.sha256] if blob.sha256 else blob.content or b""

    # ---------------------------------------------------------------------------------------------------- who may what
    def user(self, authorization: str | None) -> tuple[str, str] | None:
        if authorization is None:
            return None
        token = authorization.removeprefix("Bearer ")
        if token not in self.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.users[token]

    def writer(self, authorization: str | None, owner: str) -> str:
        found = self.user(authorization)
        if found is None:
            raise HubError(401, "Invalid username or password.")
        name, role = found
        if role != "write" or name != owner:
            raise HubError(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        return name

    def readable(self, kind: str, name: str, authorization: str | None) -> Repo:
        found = self.user(authorization)
        repo = self.repos.get((kind, name))
        if repo is None or (repo.private and (found is None or found[0] != repo.owner)):
            raise HubError(404 if found else 401, "Repository not found", "RepoNotFound")
        return repo

    def downloadable(self, kind: str, name: str, authorization: str | None) -> Repo:
        repo = self.readable(kind, name, authorization)
        found = self.user(authorization)
        if repo.gated and (found is None or found[0] not in {repo.owner, *repo.granted}):
            raise HubError(
                403 if found else 401,
                f"Access to model {name} is restricted and you are not in the authorized list",
                "GatedRepo",
            )
        return repo


Route = tuple[str, str, re.Pattern[str], str]
_REPO = r"/api/(?P<kind>model|dataset|space)s/(?P<name>[^/]+/[^/]+)"
_GIT = r"/(?:(?P<kinds>datasets|spaces)/)?(?P<name>[^/]+/[^/]+)"


def _route(step: str, method: str, pattern: str) -> Route:
    return step, method, re.compile(pattern), f"on_{step}"


ROUTES = [
    _route("whoami", "GET", "/api/whoami-v2"),
    _route("agents", "GET", "/api/agent-harnesses"),  # asked for the user agent's sake, once a day
    _route("create_repo", "POST", "/api/repos/create"),
    _route("validate_yaml", "POST", "/api/validate-yaml"),
    _route("preupload", "POST", _REPO + r"/preupload/(?P<revision>[^/]+)"),
    _route("commit", "POST", _REPO + r"/commit/(?P<revision>[^/]+)"),
    _route("create_branch", "POST", _REPO + r"/branch/(?P<revision>[^/]+)"),
    _route("create_tag", "POST", _REPO + r"/tag/(?P<revision>[^/]+)"),
    _route("refs", "GET", _REPO + r"/refs"),
    _route("tree", "GET", _REPO + r"/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?"),
    _route("paths_info", "POST", _REPO + r"/paths-info/(?P<revision>[^/]+)"),
    _route("repo_info", "GET", _REPO + r"(?:/revision/(?P<revision>[^/]+))?"),
    _route("lfs_batch", "POST", _GIT + r"\.git/info/lfs/objects/batch"),
    _route("lfs_verify", "POST", _GIT + r"\.git/info/lfs/objects/verify"),
    _route("lfs_complete", "POST", r"/complete/(?P<oid>[0-9a-f]{64})"),
    _route("lfs_put", "PUT", r"/storage/(?P<oid>[0-9a-f]{64})(?:/(?P<part>\d+))?"),
    _route("storage_get", "GET", r"/storage/(?P<oid>[0-9a-f]{64})"),
    _route("resolve", "GET", _GIT + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for the client to acknowledge its head
    slow: float | None = None
    cut_in_the_middle = False

    # ---------------------------------------------------------------------------------------------------- HTTP
    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, TimeoutError):
            pass  # the client hung up

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        method = "GET" if self.command == "HEAD" else self.command
        matches = ((route, route[2].fullmatch(url.path)) for route in ROUTES if route[1] == method)
        route, match = next(((route, match) for route, match in matches if match), (None, None))
        step = route[0] if route else "unknown"
        fault = self._fault(step)
        if fault.cut == "before":
            # In the middle of an upload, if there is one: part of the body has come
            self.rfile.read(min(int(self.headers.get("Content-Length") or 0), 1024))
            return self._hang_up()
        self.body = self._read_body()
        self.authorization = self.headers.get("Authorization")
        with self.hub.lock:
            self.hub.requests.append(Request(step, self.command, self.path, self.authorization, len(self.body)))
        try:
            if fault.status is not None:
                raise HubError(fault.status, "injected")
            if route is None or match is None:
                self.hub.unknown.append(f"{self.command} {self.path}")
                raise HubError(404, "no such route")
            self.slow = fault.slow
            self.fields = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
            with self.hub.lock:
                answer = getattr(self, route[3])()
        except HubError as error:
            headers = {"X-Error-Message": error.message}
            if error.code:
                headers["X-Error-Code"] = error.code
            if fault.retry_after is not None:
                headers["Retry-After"] = str(fault.retry_after)
            return self._answer(error.status, json.dumps({"error": error.message}).encode(), headers)
        if fault.cut == "after":
            return self._hang_up()
        status, content, headers = answer
        self.cut_in_the_middle = fault.cut == "middle"
        self._answer(status, content if isinstance(content, bytes) else json.dumps(content).encode(), headers)

    def _fault(self, step: str) -> Fault:
        with self.hub.lock:
            waiting = self.hub.faults.get(step) or [Fault()]
            return waiting.pop(0)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            return b"".join(self._chunks())
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.cut_in_the_middle:
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            return self._hang_up()
        if not self.slow:
            self.wfile.write(content)
            return
        size = max(1, len(content) // 4)
        for start in range(0, len(content), size):
            time.sleep(self.slow)
            self.wfile.write(content[start : start + size])
            self.wfile.flush()

    # ---------------------------------------------------------------------------------------------------- helpers
    def _json(self) -> Any:
        return json.loads(self.body)

    def _kind(self) -> str:
        return self.fields.get("kind") or self.fields.get("kinds", "models")[:-1]

    def _repo(self, *, write: bool = False, download: bool = False) -> Repo:
        name = self.fields["name"]
        look = self.hub.downloadable if download else self.hub.readable
        repo = look(self._kind(), name, self.authorization)
        if write:
            self.hub.writer(self.authorization, repo.owner)
        return repo

    def _commit(self, repo: Repo, revision: str = "main") -> Commit:
        commit = repo.commit(self.fields.get("revision", revision))
        if commit is None:
            raise HubError(404, "Invalid rev id", "RevisionNotFound")
        return commit

    # ---------------------------------------------------------------------------------------------------- accounts, repos
    def on_whoami(self) -> Any:
        found = self.hub.user(self.authorization)
        if found is None:
            raise HubError(401, "Invalid username or password.")
        token = {"displayName": "a token", "role": found[1]}
        return (
            200,
            {"type": "user", "name": found[0], "orgs": [], "auth": {"type": "access_token", "accessToken": token}},
            {},
        )

    def on_agents(self) -> Any:
        return 200, {"standardEnvVars": [], "harnesses": {}}, {}

    def on_create_repo(self) -> Any:
        asked = self._json()
        user = self.hub.user(self.authorization)
        owner = asked.get("organization") or (user[0] if user else "")
        self.hub.writer(self.authorization, owner)
        name, kind = f"{owner}/{asked['name']}", asked.get("type") or "model"
        prefix = "" if kind == "model" else f"{kind}s/"
        url = {"url": f"{self.hub.url}/{prefix}{name}", "name": name}
        taken = (key for key in self.hub.repos if key[1] == name and (self.hub.shared_names or key[0] == kind))
        if next(taken, None):
            return (
                409,
                {"error": "You already created this repo", **url},
                {"X-Error-Message": "You already created this repo"},
            )
        repo = Repo(name, kind, private=asked.get("visibility") == "private", sdk=asked.get("sdk"))
        repo.add(
            "initial commit", {".gitattributes": Blob(len(GITATTRIBUTES), git_hash(GITATTRIBUTES), GITATTRIBUTES)}
        )
        self.hub.repos[kind, name] = repo
        return 200, url, {}

    def on_repo_info(self) -> Any:
        repo = self._repo()
        commit = self._commit(repo)
        card = commit.files.get("README.md")
        facts: dict[str, Any] = {
            "id": repo.name,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "sha": commit.oid,
            "siblings": [{"rfilename": path} for path in commit.files],
            "tags": [],
        }
        if card and card.content and (block := re.match(rb"---\n(.*?)\n---", card.content, re.DOTALL)):
            with contextlib.suppress(yaml.YAMLError):  # the page shows a warning, and the model has no metadata
                facts["cardData"] = yaml.safe_load(block[1])
        if repo.sdk:
            facts["sdk"] = repo.sdk
        return 200, facts, {}

    def on_create_branch(self) -> Any:
        repo = self._repo(write=True)
        if self.fields["revision"] in repo.branches:
            raise HubError(409, "Reference already exists")
        repo.branches[self.fields["revision"]] = repo.branches["main"]
        return 200, {}, {}

    def on_create_tag(self) -> Any:
        repo = self._repo(write=True)
        commit = self._commit(repo)
        name = self._json()["tag"]
        if name in repo.tags:
            raise HubError(409, "Tag reference exists already")
        repo.tags[name] = commit.oid
        return 200, {}, {}

    def on_refs(self) -> Any:
        repo = self._repo()

        def refs(found: dict[str, str], group: str) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{group}/{n}", "targetCommit": oid} for n, oid in found.items()]

        return 200, {"branches": refs(repo.branches, "heads"), "tags": refs(repo.tags, "tags"), "converts": []}, {}

    # ---------------------------------------------------------------------------------------------------- listing
    def _entry(self, path: str, blob: Blob) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": blob.size, "oid": blob.oid}
        if blob.sha256:
            entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}
        return entry

    def on_tree(self) -> Any:
        commit = self._commit(self._repo())
        folder = self.fields.get("folder", "")
        files = {p: b for p, b in commit.files.items() if not folder or p.startswith(folder + "/")}
        entries = [self._entry(path, blob) for path, blob in sorted(files.items())]
        parents = {p.rsplit("/", 1)[0] for p in files if "/" in p}
        entries += [{"type": "directory", "path": p, "size": 0, "oid": git_hash(p.encode())} for p in sorted(parents)]
        if self.query.get("recursive", "").lower() not in ("1", "true"):
            depth = folder.count("/") + 1 if folder else 0
            entries = [entry for entry in entries if entry["path"].count("/") == depth]
        # In pages of five, so that the client has to follow the link
        start = int(self.query.get("cursor", 0))
        headers = {}
        if start + 5 < len(entries):
            base = self.path.split("&cursor")[0]
            headers["Link"] = f'<{self.hub.url}{base}{"&" if "?" in base else "?"}cursor={start + 5}>; rel="next"'
        return 200, entries[start : start + 5], headers

    def on_paths_info(self) -> Any:
        commit = self._commit(self._repo())
        return 200, [self._entry(p, commit.files[p]) for p in self._json()["paths"] if p in commit.files], {}

    # ---------------------------------------------------------------------------------------------------- pushing
    def on_validate_yaml(self) -> Any:
        asked = self._json()
        block = re.match(r"---\r?\n(.*?)\r?\n---", asked["content"], re.DOTALL)
        errors = []
        try:
            data = yaml.safe_load(block[1]) if block else {}
            if not isinstance(data, dict):
                errors = ["metadata must be a mapping"]
            elif any(not isinstance(tag, str) for tag in data.get("tags") or []):
                errors = ['"tags" must be an array of strings']
        except yaml.YAMLError as error:
            errors = [str(error)]
        status = 400 if errors else 200
        return status, {"errors": [{"message": text} for text in errors], "warnings": []}, {}

    def on_preupload(self) -> Any:
        repo = self._repo(write=True)
        commit = self._commit(repo)
        answers = []
        for file in self._json()["files"]:
            assert len(base64.b64decode(file["sample"])) <= 512
            large = file["path"].endswith(LFS_SUFFIXES) or file["size"] >= LFS_FROM_BYTES
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if there := commit.files.get(file["path"]):
                answer["oid"] = there.sha256 or there.oid
            answers.append(answer)
        return 200, {"files": answers}, {}

    def on_lfs_batch(self) -> Any:
        self._repo(write=True)
        answers = []
        for asked in self._json()["objects"]:
            answer: dict[str, Any] = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.objects:
                answer["actions"] = {
                    "upload": self._upload_action(asked["oid"], asked["size"]),
                    "verify": {"href": self.hub.url + self.path.removesuffix("batch") + "verify"},
                }
            answers.append(answer)
        return 200, {"objects": answers, "transfer": "basic"}, {}

    def _upload_action(self, oid: str, size: int) -> dict[str, Any]:
        chunk = self.hub.multipart_bytes
        if chunk is None or size <= chunk:
            return {"href": f"{self.hub.storage_url}/storage/{oid}"}
        count = -(-size // chunk)
        parts = {f"{number:05d}": f"{self.hub.storage_url}/storage/{oid}/{number}" for number in range(1, count + 1)}
        return {"href": f"{self.hub.url}/complete/{oid}", "header": {"chunk_size": str(chunk), **parts}}

    def _without_token(self) -> None:
        if self.authorization is not None:
            raise HubError(400, "Only one auth mechanism allowed")

    def on_lfs_put(self) -> Any:
        self._without_token()
        oid = self.fields["oid"]
        if "part" in self.fields:
            self.hub.parts.setdefault(oid, {})[int(self.fields["part"])] = self.body
            return 200, b"", {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'}
        self._store(oid, self.body)
        return 200, b"", {}

    def on_lfs_complete(self) -> Any:
        oid, parts = self.fields["oid"], self.hub.parts.pop(self.fields["oid"])
        named = {part["partNumber"]: part["etag"].strip('"') for part in self._json()["parts"]}
        if named != {number: hashlib.md5(part).hexdigest() for number, part in parts.items()}:
            raise HubError(400, "parts do not fit")
        self._store(oid, b"".join(parts[number] for number in sorted(parts)))
        return 200, {}, {}

    def _store(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise HubError(400, "The content does not have the hash that was announced")
        self.hub.objects[oid] = content
        self.hub.uploads.append(oid)

    def on_lfs_verify(self) -> Any:
        asked = self._json()
        if len(self.hub.objects.get(asked["oid"], b"")) != asked["size"]:
            raise HubError(404, "object not found")
        return 200, {}, {}

    def on_commit(self) -> Any:
        repo = self._repo(write=True)
        branch = self.fields["revision"]
        parent = self._commit(repo)
        header, *lines = [json.loads(line) for line in self.body.splitlines() if line]
        assert header["key"] == "header"
        if header["value"].get("parentCommit") not in (None, parent.oid):
            raise HubError(412, "A commit has happened since")
        files = dict(parent.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            elif line["key"] == "file":
                content = base64.b64decode(value["content"])
                files[value["path"]] = Blob(len(content), git_hash(content), content)
            elif line["key"] == "lfsFile":
                files[value["path"]] = self._large(value)
            else:
                raise HubError(400, f"unknown operation {line['key']}")
        commit = repo.add(header["value"]["summary"], files, branch)
        return (
            200,
            {"success": True, "commitOid": commit.oid, "commitUrl": f"{self.hub.url}/{repo.name}/commit/{commit.oid}"},
            {},
        )

    def _large(self, value: dict[str, Any]) -> Blob:
        stored = self.hub.objects.get(value["oid"])
        if stored is None:
            raise HubError(400, f"{value['path']}: the LFS object was never uploaded")
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{value['oid']}\nsize {len(stored)}\n"
        return Blob(len(stored), git_hash(pointer.encode()), sha256=value["oid"])

    # ---------------------------------------------------------------------------------------------------- downloading
    def on_resolve(self) -> Any:
        repo = self._repo(download=True)
        commit = self._commit(repo)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        blob = commit.files.get(self.fields["path"])
        if blob is None:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return 404, b"Entry not found", headers | {"Content-Type": "text/plain"}
        if blob.sha256 is None:
            return self._ranged(blob.content or b"", headers | {"ETag": f'"{blob.oid}"'})
        headers |= {
            "X-Linked-Etag": f'"{blob.sha256}"',
            "X-Linked-Size": str(blob.size),
            "ETag": f'"{blob.oid}"',
            "Location": f"{self.hub.storage_url}/storage/{blob.sha256}",
        }
        return 302, b"", headers

    def on_storage_get(self) -> Any:
        self._without_token()
        content = self.hub.objects.get(self.fields["oid"])
        if content is None:
            raise HubError(404, "no such object")
        return self._ranged(content, {"ETag": f'"{self.fields["oid"]}"', "Accept-Ranges": "bytes"})

    def _ranged(self, content: bytes, headers: dict[str, str]) -> Any:
        headers = {"Content-Type": "application/octet-stream", **headers}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not wanted:
            return 200, content, headers
        start, end = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
        if start >= len(content):
            raise HubError(416, "Requested range not satisfiable")
        return 206, content[start : end + 1], headers | {"Content-Range": f"bytes {start}-{end}/{len(content)}"}
