"""What the tests wait for: the telephone, Deepgram's stand-in and the server tell what changes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Observable:
    """Something whose changes can be waited for."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()

    def changed(self) -> None:
        """Have everyone who waits look again."""
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for `condition`."""
        while not condition():
            self._changed.clear()
            await self._changed.wait()


async def poll(condition: Callable[[], bool]) -> None:
    """Wait for `condition`, of which nobody tells when it becomes true."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.02)
