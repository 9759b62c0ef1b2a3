"""What of the Hub's protocol an upload and a download need, on this machine, and faults on demand."""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


TOKEN = "hf_of_the_tests"
USER = "tester"


class Fault(Exception):
    """A request that is answered with an error."""

    def __init__(self, status, message="", code=""):
        super().__init__(message)
        self.status, self.code, self.url = status, code, None


class Repo:
    """Branches as lists of commits; a commit maps paths to contents."""

    def __init__(self, private):
        self.private = private
        self.branches = {"main": [{".gitattributes": b"*.safetensors filter=lfs\n"}]}

    def files(self, revision="main"):
        for name, commits in self.branches.items():
            for index, files in enumerate(commits):
                if revision == self.sha(name, index) or (revision == name and index == len(commits) - 1):
                    return files
        raise Fault(404, f"no revision {revision}", "RevisionNotFound")

    def sha(self, branch, index=-1):
        index %= len(self.branches[branch])
        content = [sorted((name, sha1(data)) for name, data in files.items()) for files in self.branches[branch]]
        return hashlib.sha1(repr(content[: index + 1]).encode()).hexdigest()

    def sha_of(self, revision):
        return self.sha(revision) if revision in self.branches else revision


class FakeHub:
    """
    A context manager; `url` is the endpoint. `repos`, `stored` (LFS objects) and `log` (method and path of every
    request) are there to be looked at. `breaks` maps a pattern of "METHOD path" to a list of faults, one for each
    request: a status, or "cut" for a connection that is cut while the request is read, or "lost" for one that is
    cut after the work was done.
    """

    def __init__(self):
        self.repos, self.stored, self.log, self.breaks = {}, {}, [], {}
        self.lock = threading.RLock()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def handle_request(self):
                hub.handle(self)

            do_GET = do_POST = do_PUT = do_HEAD = handle_request

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args):
        self.server.shutdown()
        self.server.server_close()

    def uploads(self):
        return [line for line in self.log if line.startswith("PUT /lfs/")]

    # ---- Requests

    def handle(self, request):
        path = unquote(urlsplit(request.path).path)
        line = f"{request.command} {path}"
        with self.lock:
            self.log.append(line)
            fault = next(
                (faults.pop(0) for key, faults in self.breaks.items() if faults and re.search(key, line)), None
            )
        if fault == "cut":
            request.rfile.read(min(100, int(request.headers.get("Content-Length") or 0)))
            return self.cut(request)
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        try:
            if isinstance(fault, int):
                raise Fault(fault, "broken on purpose")
            with self.lock:
                content, headers = self.answer(request, path, body)
        except Fault as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": str(error)}
            return self.send(
                request, error.status, json.dumps({"error": str(error), "url": error.url}).encode(), headers
            )
        if fault == "lost":
            return self.cut(request)
        self.send(request, 200, content if isinstance(content, bytes) else json.dumps(content).encode(), headers)

    def cut(self, request):
        """Resets the connection, without a word."""
        request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.connection.close()
        request.close_connection = True

    def send(self, request, status, content, headers):
        request.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)

    def answer(self, request, path, body):
        known = request.headers.get("Authorization") == f"Bearer {TOKEN}"
        if request.command in ("POST", "PUT") and not known and not path.startswith("/lfs/"):
            raise Fault(401, "Invalid username or password.")
        for pattern, method, function in self.ROUTES:
            found = re.fullmatch(pattern, path)
            if found and request.command in method:
                parts = found.groupdict()
                if "repo" in parts:
                    parts["repo"] = self.find(parts["repo"], known)
                result = function(self, body, **parts)
                return result if isinstance(result, tuple) else (result, {})
        raise Fault(404, f"the fake Hub does not know {request.command} {path}")

    def find(self, name, known):
        if name not in self.repos or (self.repos[name].private and not known):
            raise Fault(404 if known else 401, "Repository not found", "RepoNotFound")
        self.repos[name].name = name
        return self.repos[name]

    # ---- Routes

    def whoami(self, body):
        return {"name": USER, "orgs": []}

    def create(self, body):
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        if name.startswith("forbidden/"):
            raise Fault(403, "You don't have the rights to create a model under the namespace forbidden")
        if name in self.repos:
            raise Conflict(f"{self.url}/{name}")
        self.repos[name] = Repo(wanted.get("visibility") == "private")
        return {"url": f"{self.url}/{name}"}

    def info(self, body, repo, revision="main"):
        files = repo.files(revision)
        siblings = [{"rfilename": name} for name in sorted(files)]
        return {"id": repo.name, "sha": repo.sha_of(revision), "private": repo.private, "siblings": siblings}

    def branch(self, body, repo, revision):
        if revision in repo.branches:
            raise Fault(409, "Reference already exists")
        repo.branches[revision] = list(repo.branches["main"])
        return {}

    def tree(self, body, repo, revision):
        return [
            {"type": "file", "path": name, "size": len(data), "oid": sha1(data), **lfs(name, data)}
            for name, data in sorted(repo.files(revision).items())
        ]

    def preupload(self, body, repo, revision):
        files = repo.files(revision)
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_lfs(file["path"]) else "regular",
                    "shouldIgnore": False,
                    "oid": oid(file["path"], files[file["path"]]) if file["path"] in files else None,
                }
                for file in json.loads(body)["files"]
            ]
        }

    def batch(self, body, repo):
        objects = [{"oid": entry["oid"], "size": entry["size"]} for entry in json.loads(body)["objects"]]
        for entry in objects:
            if entry["oid"] not in self.stored:
                entry["actions"] = {"upload": {"href": f"{self.url}/lfs/{entry['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def store(self, body, digest):
        if hashlib.sha256(body).hexdigest() != digest:
            raise Fault(400, "the content is not what was announced")
        self.stored[digest] = body
        return {}

    def validate(self, body):
        content = json.loads(body)["content"]
        if not content.startswith("---\n"):
            return {"warnings": [{"message": "empty or missing yaml metadata in repo card"}], "errors": []}
        return {"warnings": [], "errors": []}

    def commit(self, body, repo, revision):
        files = dict(repo.files(revision))
        for line in body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.stored:
                    raise Fault(400, f"{value['path']} was not uploaded")
                files[value["path"]] = self.stored[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        repo.branches[revision].append(files)
        sha = repo.sha(revision)
        return {"commitUrl": f"{self.url}/{repo.name}/commit/{sha}", "commitOid": sha}

    def resolve(self, body, repo, revision, file):
        files = repo.files(revision)
        if file not in files:
            raise Fault(404, f"{file} is not there", "EntryNotFound")
        headers = {"X-Repo-Commit": repo.sha_of(revision), "ETag": f'"{oid(file, files[file])}"'}
        return files[file], headers

    REPO = r"(?P<repo>[^/]+/[^/]+?)"
    ROUTES = (
        (r"/api/whoami-v2", "GET", whoami),
        (r"/api/repos/create", "POST", create),
        (r"/api/validate-yaml", "POST", validate),
        (rf"/api/models/{REPO}", "GET", info),
        (rf"/api/models/{REPO}/revision/(?P<revision>.+)", "GET", info),
        (rf"/api/models/{REPO}/branch/(?P<revision>.+)", "POST", branch),
        (rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)", "GET", tree),
        (rf"/api/models/{REPO}/preupload/(?P<revision>.+)", "POST", preupload),
        (rf"/api/models/{REPO}/commit/(?P<revision>.+)", "POST", commit),
        (rf"/{REPO}\.git/info/lfs/objects/batch", "POST", batch),
        (r"/lfs/(?P<digest>\w+)", "PUT", store),
        (rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", "GET HEAD", resolve),
    )


class Conflict(Fault):
    def __init__(self, url):
        super().__init__(409, "You already created this model repo")
        self.url = url


def is_lfs(path):
    return path.endswith((".safetensors", ".png", ".bin"))


def sha1(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def oid(path, data):
    return hashlib.sha256(data).hexdigest() if is_lfs(path) else sha1(data)


def lfs(path, data):
    digest = hashlib.sha256(data).hexdigest()
    return {"lfs": {"oid": digest, "size": len(data), "pointerSize": 130}} if is_lfs(path) else {}
