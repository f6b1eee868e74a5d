"""What the stand-ins that listen on a socket have in common."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from tests.standins import Observable


class Listener(Observable):
    """A server on 127.0.0.1: `async with` it. At its end it breaks off what is going on.

    Attributes:
        port: Where it listens.
        connections: How many there were.

    Args:
        port: 0 picks a free one.
        tls: What it serves TLS with, such as `tls_context`; None is plain TCP.
    """

    def __init__(self, port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        super().__init__()
        self.port = port
        self.connections = 0
        self._tls = tls
        self._serving: dict[asyncio.Task[Any], asyncio.StreamWriter] = {}

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(
            self._accept,
            "127.0.0.1",
            self.port,
            limit=2**20,  # bytes of a request's head
            backlog=1000,
            ssl=self._tls,
            # Else asyncio would close the socket only once a client that does not read has
            # answered the end of TLS, or after half a minute.
            ssl_shutdown_timeout=0.1 if self._tls else None,
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task, writer in self._serving.items():
            writer.transport.abort()
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)
        await self._server.wait_closed()

    def drop_connections(self) -> None:
        """Close every connection there is, as an idle time-out does."""
        for writer in self._serving.values():
            writer.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.changed()
        task: Any = asyncio.current_task()
        self._serving[task] = writer
        task.add_done_callback(self._serving.pop)
        try:
            # asyncio of 3.11 logs a task that is cancelled.
            with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await self.serve(reader, writer)
        finally:
            writer.close()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection, to its end."""
        raise NotImplementedError


def reset(transport: asyncio.WriteTransport) -> None:
    """Close a connection at once, with RST in place of FIN."""
    linger = struct.pack("ii", 1, 0)
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    transport.abort()


def tls_context(pem: Path) -> ssl.SSLContext:
    """Return what serves TLS with the key and the certificate that are in `pem`."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pem)
    return context
