#!/usr/bin/env bash
# nginx's proxy_read_timeout does not end a websocket whose server has fallen silent, not even one
# whose process is stopped, as long as the client keeps sending.
#
# Seen with nginx 1.22.1 of Debian 12, and websockets 17.4 on Python 3.11.7.
#
# By nginx's documentation, this time-out runs between two reads from the proxied server: a websocket
# is closed if that server transmits nothing for so long, and its pings are what prevents it. One
# would expect that a server that says nothing is found out, whatever the client does. But once a
# connection is upgraded, nginx starts this timer anew after each transfer in either direction, so
# that what it measures is a silence of both sides.
#
# Why it matters here: Twilio sends 50 messages of the caller's audio a second, all through a call. So
# behind nginx this time-out ends no call, and a short one does no harm; but neither does it find a
# server that hangs: its callers stay on a dead line for minutes, until they hang up or their audio
# has filled all buffers on the way. That is left to a health check, or to what supervises the
# process. A test in which both sides are silent suggests the contrary.
#
# What was seen, with "proxy_read_timeout 2s; proxy_send_timeout 2s;" and a server that never sends:
#
#   the caller is silent: closed after 2 s
#   the caller speaks: open after 8 s
#   the caller speaks, the server's process is stopped: open after 8 s
set -euo pipefail

PATH=$PATH:/usr/sbin
command -v nginx >/dev/null || {
    echo "Install Debian's package nginx first." >&2
    exit 2
}
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --disable-pip-version-check websockets==17.4
cat >"$dir/server.py" <<'PYTHON'
import asyncio
import logging
import sys

from websockets.asyncio.server import serve

logging.getLogger("websockets").setLevel(logging.CRITICAL)


async def listen(connection):
    async for _ in connection:
        pass


async def main():
    async with serve(listen, "127.0.0.1", int(sys.argv[1]), ping_interval=None):
        await asyncio.Future()


asyncio.run(main())
PYTHON
"$dir/venv/bin/python" - "$dir" <<'PYTHON'
import asyncio
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

folder = Path(sys.argv[1])
SPEECH = '{"event": "media", "media": {"payload": "' + "/" * 216 + '"}}'


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


async def until_open(port: int) -> None:
    for _ in range(100):
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.1)
        else:
            writer.close()
            return
    sys.exit("Nothing listens.")


async def call(port: int, speaks: bool, server: subprocess.Popen | None = None) -> str:
    """Stay for eight seconds; return what became of the call."""
    client = await connect(f"ws://127.0.0.1:{port}/", compression=None, ping_interval=None)
    if server:
        server.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    try:
        while time.monotonic() < started + 8:
            if speaks:
                await client.send(SPEECH)
                await asyncio.sleep(0.02)
            else:
                try:
                    await asyncio.wait_for(client.recv(), 0.1)
                except TimeoutError:
                    pass
        return "open after 8 s"
    except ConnectionClosed:
        return f"closed after {time.monotonic() - started:.0f} s"
    finally:
        client.transport.abort()


async def main() -> None:
    server_port, nginx_port = free_ports(2)
    temporary = "".join(
        f"{name}_temp_path {folder}/{name};\n"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(f"""
        daemon off;
        pid {folder}/pid;
        error_log {folder}/error.log;
        events {{}}
        http {{
            access_log off;
            {temporary}
            server {{
                listen 127.0.0.1:{nginx_port};
                location / {{
                    proxy_pass http://127.0.0.1:{server_port};
                    proxy_http_version 1.1;
                    proxy_set_header Upgrade $http_upgrade;
                    proxy_set_header Connection upgrade;
                    proxy_read_timeout 2s;
                    proxy_send_timeout 2s;
                }}
            }}
        }}
    """)
    server = subprocess.Popen([sys.executable, folder / "server.py", str(server_port)])
    nginx = subprocess.Popen(
        ["nginx", "-p", folder, "-c", folder / "nginx.conf"], stderr=subprocess.DEVNULL
    )
    try:
        await until_open(server_port)
        await until_open(nginx_port)
        seen = {
            "the caller is silent": await call(nginx_port, speaks=False),
            "the caller speaks": await call(nginx_port, speaks=True),
            "the caller speaks, the server's process is stopped": await call(
                nginx_port, speaks=True, server=server
            ),
        }
    finally:
        server.kill()
        nginx.terminate()
        server.wait()
        nginx.wait()
    for name, outcome in seen.items():
        print(f"{name}: {outcome}")
    if list(seen.values()) != ["closed after 2 s", "open after 8 s", "open after 8 s"]:
        sys.exit("This has changed.")


asyncio.run(main())
PYTHON
