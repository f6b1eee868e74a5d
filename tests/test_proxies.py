"""The README's nginx and Caddy: a signed call is heard through each, an unsigned one rejected."""

import asyncio
import os
import shutil
import socket
import ssl
from pathlib import Path

import pytest
from twilio.request_validator import RequestValidator
from websockets.exceptions import InvalidStatus

from tests.deepgram import GREETING, Deepgram, noise
from tests.readme import blocks
from tests.server import Server, reserved_ports
from tests.telephone import dial
from tests.waiting import poll

TOKEN = "12345"
# What there is around the README's block. One process each, which writes to tmp_path only.
NGINX = """
daemon off; master_process off; pid nginx.pid; error_log stderr;
events {{}}
http {{
    access_log off; client_body_temp_path body; proxy_temp_path proxy;
    fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
    server {{ listen 127.0.0.1:{port} ssl; ssl_certificate {pem}; ssl_certificate_key {pem};
{block}}} }}
"""
# Without its ports 80 and 2019, and for loopback only.
CADDY = """
{{
    admin off
    auto_https disable_redirects
    default_bind 127.0.0.1
}}
{block}"""
PROXIES = {
    "nginx": (NGINX, "nginx", ["-e", "stderr", "-p", ".", "-c"]),
    "caddy": (CADDY, "caddyfile", ["run", "--adapter", "caddyfile", "--config"]),
}


def is_listening(port: int) -> bool:
    """Return whether somebody accepts connections at `port`."""
    with socket.socket() as trying:
        return trying.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("name", PROXIES)
async def test_signed_call(
    name: str, deepgram: Deepgram, certificate: tuple[Path, ssl.SSLContext], tmp_path: Path
) -> None:
    """PUBLIC_URL is not set: the Host header has to come through unchanged."""
    program = shutil.which(name, path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin")
    if not program:
        pytest.skip(f"{name} is not installed (Debian package: {name})")
    pem, trust = certificate
    around, language, arguments = PROXIES[name]
    (block,) = blocks(language)
    assert block.count("127.0.0.1:5000") == 1
    with reserved_ports(1) as (port,):
        async with Server({"DEEPGRAM_URL": deepgram.url, "TWILIO_AUTH_TOKEN": TOKEN}) as server:
            block = block.replace("127.0.0.1:5000", f"127.0.0.1:{server.port}")
            # The certificate that Caddy would get by itself.
            block = block.replace("example.com {", f"127.0.0.1:{port} {{\n\ttls {pem} {pem}")
            (tmp_path / "conf").write_text(around.format(port=port, pem=pem, block=block))
            home = dict.fromkeys(("HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"), str(tmp_path))
            process = await asyncio.create_subprocess_exec(
                program, *arguments, tmp_path / "conf", cwd=tmp_path, env=os.environ | home
            )
            try:
                await poll(lambda: is_listening(port) or process.returncode is not None)
                assert process.returncode is None
                url = f"wss://127.0.0.1:{port}/twilio"
                signature = RequestValidator(TOKEN).compute_signature(url, {})
                headers = {"X-Twilio-Signature": signature}
                async with dial(url, headers=headers, ssl=trust) as phone:
                    await phone.until_heard(noise(GREETING))
                    assert phone.heard == noise(GREETING)
                with pytest.raises(InvalidStatus) as caught:
                    await dial(url, ssl=trust).__aenter__()
                assert caught.value.response.status_code == 403
            finally:
                if process.returncode is None:
                    process.kill()
                await process.wait()
