"""The web server of the outside: files with ranges, llama.cpp's git, and faults on demand."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from werkzeug.exceptions import Forbidden, HTTPException, NotFound
from werkzeug.security import safe_join
from werkzeug.utils import send_file
from werkzeug.wrappers import Request, Response

from .access import Access, AccessLog, Server
from .faults import FaultFile
from .hub import MOUNT, Hub
from .llama_source import git_environment

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

_CHUNK = 65536


class Web:
    """A WSGI application that serves two folders: plain files, and bare git repositories."""

    def __init__(
        self,
        files: Path,
        repositories: Path,
        hub: Hub,
        faults: FaultFile,
        log: AccessLog,
        subnet: str,
    ) -> None:
        self._files = files
        self._hub = hub
        self._repositories = repositories
        self._faults = faults
        self._log = log
        self._subnet = subnet

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request."""
        serial = self._log.begin()
        request = Request(environ)
        fault = self._faults.take(request.path)
        if fault is not None and fault.no_ranges:
            environ.pop("HTTP_RANGE", None)
        server: Server = "git" if request.path.partition(".git/")[1] else "web"
        try:
            if fault is not None and fault.status is not None:
                response = Response(status=fault.status)
            else:
                response = self._answer(server, request)
        except HTTPException as error:
            response = Response(f"{error.description}\n", status=error.code, mimetype="text/plain")
        if fault is not None:
            response.headers.update(fault.headers)
            if fault.no_ranges:
                response.headers.pop("Accept-Ranges", None)
            if fault.extra_length and response.content_length is not None:
                response.content_length += fault.extra_length
        body = response(environ, start_response)
        spoilt = fault.spoil(body) if fault is not None else iter(body)
        access = Access(
            server=server,
            client=request.remote_addr or "",
            method=request.method,
            target=request.full_path.rstrip("?"),
            status=response.status_code,
            range=request.headers.get("Range", ""),
            token="Authorization" in request.headers,
            note=str(fault or ""),
        )
        return self._logged(serial, access, response, spoilt)

    def _answer(self, server: Server, request: Request) -> Response:
        if server == "git":
            return self._git(request)
        if request.path.startswith(f"{MOUNT}/"):
            self._check_client(request)
            return self._hub.answer(request)
        return self._file(request)

    def _logged(
        self, serial: int, access: Access, response: Response, body: Iterator[bytes]
    ) -> Iterator[bytes]:
        sent = 0
        try:
            for chunk in body:
                yield chunk
                sent += len(chunk)
        finally:
            response.close()
            self._log.end(serial, replace(access, bytes=sent))

    def _file(self, request: Request) -> Response:
        self._check_client(request)
        if request.method not in ("GET", "HEAD"):
            return Response(status=405, headers={"Allow": "GET, HEAD"})
        path = safe_join(str(self._files), request.path.lstrip("/"))
        kind = "application/octet-stream"
        if path is not None and request.path.endswith("/"):
            path, kind = f"{path}/index.html", "text/html"
        if path is None or not Path(path).is_file():
            raise NotFound(f"no file {request.path}")
        return send_file(path, request.environ, mimetype=kind)

    def _check_client(self, request: Request) -> None:
        # The address of the bridge can be reached from other networks of this machine too.
        if not (request.remote_addr or "").startswith(self._subnet):
            raise Forbidden("for hosts of the lab only")

    def _git(self, request: Request) -> Response:
        """Hand the request to git's own CGI program, and its answer back as it comes."""
        self._check_client(request)
        body = request.get_data(cache=False)
        headers = {
            "CONTENT_TYPE": request.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(body)),
            "HTTP_CONTENT_ENCODING": request.headers.get("Content-Encoding", ""),
            "GIT_PROTOCOL": request.headers.get("Git-Protocol", ""),
        }
        process = subprocess.Popen(
            ["git", "http-backend"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                **git_environment(),
                **headers,
                "GIT_PROJECT_ROOT": str(self._repositories),
                "GIT_HTTP_EXPORT_ALL": "1",
                "PATH_INFO": request.path,
                "QUERY_STRING": request.query_string.decode(),
                "REMOTE_ADDR": request.remote_addr or "",
                "REQUEST_METHOD": request.method,
            },
        )
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("pipes were asked for")
        # Requests for a fetch are small, so this can't wait for the answer to be read.
        process.stdin.write(body)
        process.stdin.close()
        status, answer_headers = read_cgi_headers(process.stdout)
        response = Response(_output(process), status=status, direct_passthrough=True)
        response.headers.clear()
        response.headers.extend(answer_headers)
        return response


def read_cgi_headers(output: BinaryIO | Iterable[bytes]) -> tuple[int, list[tuple[str, str]]]:
    """Return the status and the headers that a CGI program's output begins with."""
    status, headers = 200, []
    for line in output:
        if not line.strip():
            break
        name, _, value = line.decode("latin-1").partition(":")
        if name.lower() == "status":
            status = int(value.split()[0])
        else:
            headers.append((name.strip(), value.strip()))
    return status, headers


def _output(process: subprocess.Popen[bytes]) -> Iterator[bytes]:
    assert process.stdout is not None
    try:
        while chunk := process.stdout.read1(_CHUNK):  # type: ignore[attr-defined]
            yield chunk
    finally:
        process.stdout.close()
        process.kill()
        process.wait()
