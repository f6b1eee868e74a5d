"""A relay that puts a server as far away as a network does, and forgets as a NAT does.

Each byte arrives `delay_seconds` later, in order, and any number may be on their way. On loopback a
system's own handshake takes no time, so what a client sends on a new connection is held for the
round trip that it would have taken: who waits for an answer waits for as long as in a network, but
the connecting itself, and a time-out for that, end at once. Lost packets and slow starts are not
imitated. `python -m tests.standins.relay --target PORT` runs it.
"""

from __future__ import annotations

import argparse
import asyncio
import math
from dataclasses import dataclass

from tests.standins.tcp import Listener, reset


@dataclass(eq=False)
class Link:
    """One connection: a writer to each of its sides, and when a byte last came on it."""

    writers: list[asyncio.StreamWriter]
    used_at: float = 0.0
    closing: asyncio.TimerHandle | None = None


class Relay(Listener):
    """`async with Relay(deepgram.port, delay_seconds=0.04) as relay`, then `relay.port`.

    Attributes:
        links: Those that are open; one that is forgotten stays so.

    Args:
        target: The port on 127.0.0.1 that it passes everything on to.
        delay_seconds: How long a byte takes: half a round trip.
        forgets_after_seconds: Without a byte on a connection; then all that comes on it is dropped
            for ever, and neither side is told.
        closes_after_seconds: Without a byte on a connection; then it is closed, as by a server.
    """

    def __init__(
        self,
        target: int,
        delay_seconds: float = 0.0,
        *,
        forgets_after_seconds: float = math.inf,
        closes_after_seconds: float = math.inf,
    ) -> None:
        super().__init__()
        self.target = target
        self.delay_seconds = delay_seconds
        self.forgets_after_seconds = forgets_after_seconds
        self.closes_after_seconds = closes_after_seconds
        self.links: set[Link] = set()

    def forget(self) -> None:
        """Drop all that comes on the connections there are, and what is on its way."""
        for link in self.links:
            link.used_at = -math.inf

    def drop_connections(self) -> None:
        """Close the connections there are, as a server does; those that are forgotten stay."""
        for link in self.links:
            self._close(link)

    def _is_forgotten(self, link: Link) -> bool:
        # What is dropped is no use, so this will never change.
        return asyncio.get_running_loop().time() - link.used_at >= self.forgets_after_seconds

    def _close(self, link: Link) -> None:
        if not self._is_forgotten(link):
            for writer in link.writers:
                writer.close()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry what comes to the other side, both ways."""
        link = Link([writer])
        self._use(link)
        self.links.add(link)
        try:
            await asyncio.sleep(2 * self.delay_seconds)  # the handshake
            answers, server = await asyncio.open_connection("127.0.0.1", self.target)
            link.writers.append(server)
            await asyncio.gather(
                self._carry(link, reader, server), self._carry(link, answers, writer)
            )
        except OSError:
            self._arrive(link, writer, None)  # nothing listens there
        finally:
            for each in link.writers:
                each.close()
            self.links.discard(link)
            self.changed()

    async def _carry(
        self, link: Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Have what comes from one side arrive on the other, a while later."""
        loop = asyncio.get_running_loop()
        data: bytes | None = b"?"
        while data:
            try:
                data = await reader.read(2**16)
                await writer.drain()
            except ConnectionError:
                data = None
            if not self._is_forgotten(link):
                self._use(link)
            loop.call_later(self.delay_seconds, self._arrive, link, writer, data)
        await asyncio.sleep(self.delay_seconds)

    def _use(self, link: Link) -> None:
        loop = asyncio.get_running_loop()
        link.used_at = loop.time()
        if link.closing:
            link.closing.cancel()
        link.closing = loop.call_later(self.closes_after_seconds, self._close, link)

    def _arrive(self, link: Link, writer: asyncio.StreamWriter, data: bytes | None) -> None:
        """Write `data`; b"" closes the connection, and None resets it."""
        if self._is_forgotten(link) or writer.is_closing():
            return
        if data is None:
            reset(writer.transport)
        elif data:
            writer.write(data)
        else:
            writer.write_eof()


async def main() -> None:
    """Relay until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=int, required=True, help="port on 127.0.0.1")
    parser.add_argument("--delay-seconds", type=float, default=0.0, help="half a round trip")
    parser.add_argument("--forgets-after-seconds", type=float, default=math.inf)
    parser.add_argument("--closes-after-seconds", type=float, default=math.inf)
    arguments = parser.parse_args()
    async with Relay(**vars(arguments)) as relay:
        print(f"tcp://127.0.0.1:{relay.port}", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
