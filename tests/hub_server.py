"""A small server that speaks as much of the Hugging Face Hub's HTTP protocol as the real client needs, and can fail.

What the paths and headers mean is read off huggingface_hub 1.33 (hf_api.py, file_download.py, _commit_api.py); files
with weights or rows are "LFS" files as on the Hub: a redirect to a storage address, and a sha256 instead of a git
blob. Without Xet's headers the client takes plain HTTP. The two listings and the download address of ModelScope
(modelscope_hub 0.5) are served too.

Use:
    folder/models/<owner>/<name>/… and folder/datasets/<owner>/<name>/… are the repositories.

    with HubServer(folder) as hub:
        hub.faults["owner/name/model.safetensors"] = ["cut", "wrong byte"]
        subprocess.run(…, env=os.environ | hub.environment(tmp_path))
"""

import base64
import hashlib
import json
import os
import re
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from ruamel.yaml import YAML

LFS = (".safetensors", ".bin", ".parquet")
LICENCES = ("apache-2.0", "mit", "other", "unknown")


def revision(repo: Path) -> str:
    """The commit of a repository: it changes with any byte."""
    content = hashlib.sha1()
    for file in sorted(file for file in repo.rglob("*") if file.is_file()):
        content.update(str(file.relative_to(repo)).encode() + b"\0" + file.read_bytes())
    return content.hexdigest()


class HubServer:
    """Serves the repositories under `folder` on a free port of this machine while the `with` block runs.

    Attributes:
        url: what HF_ENDPOINT has to be.
        requests: (method, path, headers) of every request so far; the names of the headers in small letters.
        faults: by the end of a request's path, what goes wrong with the GETs to come, one each:
            "cut" half of the bytes, then the connection ends; "reset" the same, but torn down; "hang" the same, and
            then nothing until the client has gone; "wrong byte";
            "429" with a Retry-After of 1 second; "503".
        gated, private: repositories and the tokens that have access.
        readers: tokens that may not write.
        xet: say that the large files lie in Xet storage, which then knows none of them.
        sizes: sizes to claim in the metadata instead of the true ones, by path in the repository.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: dict[str, list[str]] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.gated: dict[str, set[str]] = {}
        self.private: dict[str, set[str]] = {}
        self.readers: set[str] = set()
        self.xet = False
        self.sizes: dict[str, int] = {}
        self.lock = threading.Lock()

    def __enter__(self) -> "HubServer":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.storage = f"http://localhost:{self.server.server_port}/storage"  # another host, as on the Hub
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Variables that send a client here, with a cache and a login of its own in `home`."""
        found = {"HF_ENDPOINT": self.url, "HF_HOME": str(home / "hf"), "NO_PROXY": "127.0.0.1,localhost"}
        found |= {"MODELSCOPE_ENDPOINT": self.url, "MODELSCOPE_HOME": str(home / "ms")}
        found |= {"MODELSCOPE_CACHE": str(home / "ms/cache")}
        return found | ({"HF_TOKEN": token} if token else {})

    def revision(self, repo: str, kind: str = "models") -> str:
        """The commit of `owner/name`, which is what a recipe would pin."""
        return revision(self.folder / kind / repo)

    def served(self, file: str) -> list[tuple[str, str, dict[str, str]]]:
        """The requests so far for the content of a file of that name."""
        return [request for request in self.requests if request[0] == "GET" and request[1].endswith(file)]


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *message: object) -> None:
        """Nothing on stderr; what was asked is in hub.requests."""

    def do_HEAD(self) -> None:
        self.route()

    def do_GET(self) -> None:
        self.route()

    def do_POST(self) -> None:
        self.route()

    def route(self) -> None:
        address = urlsplit(self.path)
        path = unquote(address.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        query = {key: values[0] for key, values in parse_qs(address.query).items()}
        logged = path if "FilePath" not in query else f"{path}/{query['FilePath']}"
        with self.hub.lock:
            headers = {key.lower(): text for key, text in self.headers.items()}
            self.hub.requests.append((self.command, logged, headers))
            fault = self.next_fault(logged) if self.command == "GET" else None
        if fault == "429":
            return self.refuse(429, headers={"Retry-After": "1"})
        if fault == "503":
            return self.refuse(503)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token == "hf_expired":
            return self.refuse(401, message="Invalid credentials in Authorization header")

        if path.startswith("/api/v1/"):
            return self.modelscope(path, query, fault)
        if path == "/api/repos/create" or path == "/api/validate-yaml":
            return self.create(path, json.loads(body), token)
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/([^/]+)(?:/(.*))?)?", path):
            kind, name, action, rest = found.groups()
            return self.api(kind, name, action, rest, token, body)
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve("datasets" if found[1] else "models", *found.groups()[1:], token, fault)
        if path == "/xet-token":
            expiry = str(int(time.time()) + 3600)
            access = {"X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": expiry, "X-Xet-Cas-Url": self.hub.url}
            return self.send(200, b"", access)
        if found := re.fullmatch(r"/storage/(.+)", path):
            return self.content(self.hub.folder / found[1], {}, fault)
        return self.refuse(404)

    def next_fault(self, path: str) -> str | None:
        waiting = next((faults for end, faults in self.hub.faults.items() if path.endswith(end)), [])
        return waiting.pop(0) if waiting else None

    # What the client asks before it downloads

    def may_read(self, name: str, token: str, metadata: bool) -> bool:
        """Whether this token sees the repository; if not, it has been answered. Gated ones show their metadata."""
        if name in self.hub.private and token not in self.hub.private[name]:
            self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
            return False
        if name in self.hub.gated and token not in self.hub.gated[name] and not metadata:
            self.refuse(403 if token else 401, "GatedRepo", f"Access to model {name} is restricted.")
            return False
        return True

    def api(self, kind: str, name: str, action: str | None, rest: str | None, token: str, body: bytes) -> None:
        repo = self.hub.folder / kind / name
        if not repo.is_dir():
            return self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        if not self.may_read(name, token, metadata=action != "auth-check"):
            return None
        if action == "auth-check":
            return self.answer({})
        if action == "preupload":
            modes = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer({"files": modes})
        if action == "commit":
            return self.commit(repo, name, body)
        sha = revision(repo)
        if action in ("revision", "tree") and rest.split("/")[0] not in (sha, "main"):
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {rest}")
        files = self.listing(repo)
        if action == "tree":
            return self.answer([{"type": "file", **facts} for facts in files])
        siblings = [{**facts, "rfilename": facts["path"], "blobId": facts["oid"]} for facts in files]
        return self.answer(
            {
                "id": name,
                "sha": sha,
                "private": name in self.hub.private,
                "gated": "manual" if name in self.hub.gated else False,
                "siblings": siblings,
                "cardData": front_matter((repo / "README.md").read_text()) if (repo / "README.md").is_file() else None,
            }
        )

    def listing(self, repo: Path) -> list[dict[str, Any]]:
        """path, oid, size and, for an LFS file, lfs of every file, as the Hub lists them."""
        found = []
        for file in sorted(file for file in repo.rglob("*") if file.is_file()):
            path, content = str(file.relative_to(repo)), file.read_bytes()
            facts = {"path": path, "oid": git_blob(content), "size": self.hub.sizes.get(path, len(content))}
            if path.endswith(LFS):
                sha256 = hashlib.sha256(content).hexdigest()
                pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n"
                facts["oid"] = git_blob(pointer.encode())
                facts["lfs"] = {"oid": sha256, "sha256": sha256, "size": facts["size"], "pointerSize": len(pointer)}
            found.append(facts)
        return found

    # Files

    def resolve(self, kind: str, name: str, rev: str, path: str, token: str, fault: str | None) -> None:
        repo = self.hub.folder / kind / name
        if not repo.is_dir():
            return self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        if not self.may_read(name, token, metadata=False):
            return None
        sha = revision(repo)
        if rev not in (sha, "main"):
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        if not (repo / path).is_file():
            return self.refuse(404, "EntryNotFound", "Entry not found")
        content = (repo / path).read_bytes()
        if not path.endswith(LFS):
            return self.content(repo / path, {"X-Repo-Commit": sha, "ETag": f'"{git_blob(content)}"'}, fault)
        linked = {"X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Linked-Size": str(len(content))}
        place = f"{self.hub.storage}/{kind}/{name}/{path}"
        if self.hub.xet:
            linked |= {"X-Xet-Hash": "ab" * 32, "X-Xet-Refresh-Route": f"{self.hub.url}/xet-token"}
        return self.send(302, b"", {"X-Repo-Commit": sha, "Location": place, **linked})

    def content(self, file: Path, headers: dict[str, str], fault: str | None) -> None:
        """The bytes of a file, or of the range that was asked for."""
        content = file.read_bytes()
        if fault == "wrong byte":
            content = content[:-1] + bytes([content[-1] ^ 1])
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self.send(200, content, headers, fault)
        start, end = int(asked[1]), int(asked[2] or len(content) - 1)
        headers = {**headers, "Content-Range": f"bytes {start}-{end}/{len(content)}"}
        return self.send(206, content[start : end + 1], headers, fault)

    # Publishing

    def create(self, path: str, body: dict[str, Any], token: str) -> None:
        if path == "/api/validate-yaml":
            licence = front_matter(body["content"]).get("license")
            errors = [] if licence in LICENCES else [{"message": f'"license" must be one of {LICENCES}'}]
            return self.answer({"errors": errors, "warnings": []}, status=400 if errors else 200)
        name = f"{body['organization']}/{body['name']}"
        if not token:
            return self.refuse(401, message="Invalid username or password.")
        if token in self.hub.readers:
            return self.refuse(403, message=f"You don't have the rights to create a model under {name}")
        address = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        repo = self.hub.folder / "models" / name
        if repo.is_dir():
            return self.send(409, json.dumps({"error": "You already created this model repo", **address}).encode())
        repo.mkdir(parents=True)
        if body.get("visibility") == "private" or body.get("private"):
            self.hub.private[name] = {token}
        return self.answer(address)

    def commit(self, repo: Path, name: str, body: bytes) -> None:
        for line in body.splitlines():
            operation = json.loads(line)
            if operation["key"] == "file":
                file = repo / operation["value"]["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(base64.b64decode(operation["value"]["content"]))
        sha = revision(repo)
        self.answer({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})

    # ModelScope

    def modelscope(self, path: str, query: dict[str, str], fault: str | None) -> None:
        found = re.fullmatch(r"/api/v1/(models|datasets)/([^/]+/[^/]+)/repo(/files|/tree)?", path)
        if found is None:
            return self.refuse(404)
        repo = self.hub.folder / found[1] / found[2]
        if not repo.is_dir() or query["Revision"] not in (revision(repo), "master"):
            return self.send(404, json.dumps({"Code": 10010205001, "Message": "not found", "Success": False}).encode())
        if found[3] is None:
            return self.content(repo / query["FilePath"], {}, fault)
        files = [
            {"Path": f["path"], "Type": "blob", "Size": f["size"], "Sha256": sha256(repo / f["path"])}
            for f in self.listing(repo)
        ]
        return self.answer({"Code": 200, "Success": True, "Data": {"Files": files}})

    # Answers

    def answer(self, value: Any, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str = "", message: str = "", headers: dict[str, str] | None = None) -> None:
        said = {"X-Error-Code": code, "X-Error-Message": message}
        self.send(status, b"", {**{name: text for name, text in said.items() if text}, **(headers or {})})

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None, fault: str | None = None) -> None:
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault in ("cut", "reset", "hang"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            if fault == "hang":
                self.connection.recv(1)
            if fault == "reset":  # closing with unsent time 0 sends RST
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                os.close(self.connection.detach())
            return
        self.wfile.write(body)


def git_blob(content: bytes) -> str:
    """The id that git gives a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def front_matter(text: str) -> dict[str, Any]:
    """The YAML at the head of a README.md, which the Hub calls card data."""
    parts = text.split("---\n")
    return dict(YAML(typ="safe").load(parts[1])) if len(parts) > 2 and not parts[0] else {}
