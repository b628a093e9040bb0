"""A hub of a few files on this machine, which speaks as much of the hub's protocol as is asked."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

# Content by (repository, commit, name of the file).
Files = Mapping[tuple[str, str, str], bytes]


class Mirror(ThreadingHTTPServer):
    """asked: every request so far, as METHOD path."""

    def __init__(self, files: Files) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.files = files
        self.asked: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def names(self, repo: str, commit: str) -> list[str]:
        return [name for where, when, name in self.files if (where, when) == (repo, commit)]


class Answers(BaseHTTPRequestHandler):
    server: Mirror

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/api/datasets/(.+)/revision/([0-9a-f]{40})", path):
            repo, commit = found.groups()
            siblings = [{"rfilename": name} for name in self.server.names(repo, commit)]
            about = {"id": repo, "sha": commit, "private": False, "tags": [], "siblings": siblings}
            self._send(json.dumps(about).encode(), exists=bool(siblings))
        elif found := re.fullmatch(r"/datasets/(.+)/resolve/([0-9a-f]{40})/(.+)", path):
            repo, commit, name = found.groups()
            content = self.server.files.get((repo, commit, name))
            headers = {
                "X-Repo-Commit": commit,
                "ETag": f'"{hashlib.sha256(content or b"").hexdigest()}"',
            }
            self._send(content or b"", exists=content is not None, **headers)
        else:
            self._send(b"", exists=False)

    do_HEAD = do_GET  # noqa: N815

    def _send(self, content: bytes, *, exists: bool, **headers: str) -> None:
        self.send_response(200 if exists else 404)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing on the screen."""


@contextmanager
def hub_mirror(files: Files) -> Iterator[Mirror]:
    with Mirror(files) as mirror:
        thread = Thread(target=mirror.serve_forever, daemon=True)
        thread.start()
        try:
            yield mirror
        finally:
            mirror.shutdown()
            thread.join()
