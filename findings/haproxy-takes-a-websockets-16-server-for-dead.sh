#!/usr/bin/env bash
# HAProxy's ordinary health check finds a server made with websockets 16 dead, although the same
# address answers 200 to curl; with websockets 17 it finds it alive.
#
# Seen with HAProxy 2.6.12 of Debian 12, and websockets 16.1.1 and 17.4 on Python 3.11.7.
#
# `option httpchk GET /healthz` asks by HTTP/1.0, without saying so. Up to version 16, websockets closes
# such a connection without sending a byte, and before it calls `process_request`, where one answers
# health checks; so it does for HEAD, which `curl -I` and many monitors send. It logs nothing of it at
# level INFO or above, and HAProxy only says that the response was invalid. One would expect an HTTP
# error, or a line in a log that speaks of the version. Version 17 answers all of them.
#
# Why it matters here: all processes are then down for HAProxy, which answers every call with 503,
# while each process is well and every check by hand succeeds. It is enough that some other package
# makes pip choose websockets 16 for a server that was tested with 17. Either require websockets 17,
# or have HAProxy ask by HTTP/1.1, as the last line does.
#
# What was seen:
#
#                                          websockets 16.1.1   websockets 17.4
#   GET by HTTP/1.1                        200                 200
#   GET by HTTP/1.0                        not a byte          200
#   HEAD by HTTP/1.1                       not a byte          200
#   HAProxy, option httpchk GET /healthz   DOWN, L7RSP         UP, L7OK
#   HAProxy, the same by HTTP/1.1          UP, L7OK            UP, L7OK
set -euo pipefail

PATH=$PATH:/usr/sbin
command -v haproxy >/dev/null || {
    echo "Install Debian's package haproxy first." >&2
    exit 2
}
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
for version in 16.1.1 17.4; do
    python3 -m venv "$dir/$version"
    "$dir/$version/bin/pip" install -qq --disable-pip-version-check "websockets==$version"
done
cat >"$dir/server.py" <<'PYTHON'
import asyncio
import logging
import sys
from http import HTTPStatus

from websockets.asyncio.server import serve

logging.getLogger("websockets").setLevel(logging.CRITICAL)


def health(connection, request):
    if request.path == "/healthz":
        return connection.respond(HTTPStatus.OK, "well\n")
    return None


async def listen(connection):
    async for _ in connection:
        pass


async def main():
    async with serve(listen, "127.0.0.1", int(sys.argv[1]), process_request=health):
        await asyncio.Future()


asyncio.run(main())
PYTHON
cat >"$dir/look.py" <<'PYTHON'
import csv
import socket
import subprocess
import sys
import time
from pathlib import Path

folder = Path(sys.argv[1])
VERSIONS = "16.1.1", "17.4"
REQUESTS = {
    "GET by HTTP/1.1": "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "GET by HTTP/1.0": "GET /healthz HTTP/1.0\r\n\r\n",
    "HEAD by HTTP/1.1": "HEAD /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
}
CHECKS = {
    "HAProxy, option httpchk GET /healthz": "option httpchk GET /healthz",
    "HAProxy, the same by HTTP/1.1": "option httpchk\n"
    "http-check send meth GET uri /healthz ver HTTP/1.1 hdr Host localhost",
}
EXPECTED = {
    "GET by HTTP/1.1": ["200", "200"],
    "GET by HTTP/1.0": ["not a byte", "200"],
    "HEAD by HTTP/1.1": ["not a byte", "200"],
    "HAProxy, option httpchk GET /healthz": ["DOWN, L7RSP", "UP, L7OK"],
    "HAProxy, the same by HTTP/1.1": ["UP, L7OK", "UP, L7OK"],
}


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def until_open(port: int) -> None:
    for _ in range(100):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    sys.exit("Nothing listens.")


def ask(port: int, request: str) -> str:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(request.encode())
        answer = connection.makefile("rb").read()
    return answer.split()[1].decode() if answer else "not a byte"


def states() -> dict[tuple[str, str], str]:
    """Return what HAProxy says of each check of each server."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(folder / "haproxy.sock"))
        connection.sendall(b"show stat\n")
        lines = connection.makefile().read().lstrip("# ").splitlines()
    return {
        (row["pxname"], row["svname"]): f"{row['status']}, {row['check_status'].strip('* ')}"
        for row in csv.DictReader(lines)
    }


ports = dict(zip(VERSIONS, free_ports(2)))
backends = "".join(
    f"backend check-{number}\n{check}\ndefault-server check inter 200ms fall 2 rise 1\n"
    + "".join(f"server {version} 127.0.0.1:{ports[version]}\n" for version in VERSIONS)
    for number, check in enumerate(CHECKS.values())
)
(folder / "haproxy.cfg").write_text(
    f"global\nstats socket {folder}/haproxy.sock\n"
    "defaults\nmode http\ntimeout connect 1s\ntimeout client 5s\ntimeout server 5s\n" + backends
)
processes = [
    subprocess.Popen([folder / version / "bin/python", folder / "server.py", str(port)])
    for version, port in ports.items()
]
try:
    for port in ports.values():
        until_open(port)
    seen = {
        name: [ask(ports[version], request) for version in VERSIONS]
        for name, request in REQUESTS.items()
    }
    processes.append(
        subprocess.Popen(
            ["haproxy", "-db", "-f", folder / "haproxy.cfg"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    )
    time.sleep(3)
    state = states()
    for number, name in enumerate(CHECKS):
        seen[name] = [state[f"check-{number}", version] for version in VERSIONS]
finally:
    for process in processes:
        process.terminate()
        process.wait()
for name, outcomes in {"": [f"websockets {version}" for version in VERSIONS], **seen}.items():
    print(f"{name:38} {outcomes[0]:19} {outcomes[1]}")
if seen != EXPECTED:
    sys.exit("This has changed.")
PYTHON
python3 "$dir/look.py" "$dir"
