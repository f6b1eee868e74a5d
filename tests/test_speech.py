"""What is requested once, is heard by all who want it, and is kept."""

import asyncio
import contextlib
from contextlib import AbstractAsyncContextManager

from tests.standins.deepgram import GREETING, Answer, Deepgram, noise
from tests.standins.process import Server
from tests.standins.telephone import Telephone, dial


async def test_shared(server: Server, deepgram: Deepgram) -> None:
    """A text that is being fetched is fetched once; each caller hears it from its beginning."""
    go = asyncio.Event()
    text = deepgram.answer("shared by all", Answer(gate=go))

    async def call() -> None:
        async with dial(server.url, parameters={"text": text}) as phone:
            await phone.until_sound()
            go.set()
            await phone.until_heard(noise(text))
            assert phone.heard == noise(text)

    async with dial(server.url, parameters={"text": text}) as first:
        await first.until_sound()
        await asyncio.gather(*(call() for _ in range(50)))
        await first.until_heard(noise(text))
    assert len(deepgram.asked(text)) == 1


async def test_shared_failure(server: Server, deepgram: Deepgram) -> None:
    """A failure reaches all who wait, and the next caller tries afresh."""
    text = deepgram.answer(
        "shared failure", Answer(status=400, body=b"no", delay_seconds=0.3), Answer()
    )

    async def call() -> None:
        async with dial(server.url, parameters={"text": text}) as phone:
            assert await phone.until_closed() == 1011

    await asyncio.gather(*(call() for _ in range(10)))
    assert len(deepgram.asked(text)) == 1
    async with dial(server.url, parameters={"text": text}) as phone:
        await phone.until_heard(noise(text))


async def test_cached(server: Server, deepgram: Deepgram) -> None:
    """Speech once fetched is not fetched again, unless it is for another voice."""
    text = "cached"
    for model in ("aura-asteria-en", "aura-asteria-en", "aura-luna-en", "aura-asteria-en"):
        async with dial(server.url, parameters={"text": text, "model": model}) as phone:
            await phone.until_heard(noise(text, model))
            assert phone.heard == noise(text, model)
    assert len(deepgram.asked(text)) == 2


async def test_fetched_though_hung_up(server: Server, deepgram: Deepgram) -> None:
    """Speech that was begun is fetched to its end when its caller hangs up, and is cached."""
    go = asyncio.Event()
    text = deepgram.answer("begun", Answer(gate=go))
    async with dial(server.url, parameters={"text": text}) as phone:
        await phone.until_sound()
        phone.drop()
        await server.until_ended(phone.call_sid)
    go.set()
    async with dial(server.url, parameters={"text": text}) as phone:
        await phone.until_heard(noise(text))
    assert len(deepgram.asked(text)) == 1


async def test_least_recently_used(deepgram: Deepgram) -> None:
    """Over CACHE_MB, the speech that was not used for longest is the first to go."""
    sound = noise("large") * 200
    for name in "abc":
        deepgram.answer(f"large {name}", Answer(sound[:500_000], write_sizes=(50_000,)))
    settings = {"DEEPGRAM_URL": deepgram.url, "CACHE_MB": "1"}
    async with Server(settings, MAX_BUFFERED_SECONDS=1e9, MAX_SPEED=1e9) as server:
        for name in "abacbca":
            async with dial(server.url, parameters={"text": f"large {name}"}) as phone:
                await phone.until_mark()
    # Two of three fit: c pushes out b, b pushes out a, and a pushes out b again.
    assert [len(deepgram.asked(f"large {name}")) for name in "abc"] == [2, 2, 1]


async def test_no_cache(deepgram: Deepgram) -> None:
    """With CACHE_MB=0 every call asks afresh, and still shares what is under way."""
    go = asyncio.Event()
    text = deepgram.answer("not cached", Answer(gate=go))
    async with Server({"DEEPGRAM_URL": deepgram.url, "CACHE_MB": "0"}) as server:

        def call() -> AbstractAsyncContextManager[Telephone]:
            return dial(server.url, parameters={"text": text})

        async with call() as one, call() as two:
            await one.until_sound()
            await two.until_sound()
            go.set()
            await one.until_heard(noise(text))
            await two.until_heard(noise(text))
        async with call() as three:
            await three.until_heard(noise(text))
    assert len(deepgram.asked(text)) == 2


async def test_warm_connection() -> None:
    """One connection serves call after call; closed by Deepgram meanwhile, it costs no failure."""
    async with Deepgram() as deepgram, Server({"DEEPGRAM_URL": deepgram.url}) as server:
        async with dial(server.url) as phone:  # so the greeting has been fetched
            await phone.until_heard(noise(GREETING))
        for number in range(5):
            text = f"warm {number}"
            async with dial(server.url, parameters={"text": text}) as phone:
                await phone.until_heard(noise(text))
        assert deepgram.connections == 1
        deepgram.drop_connections()
        async with dial(server.url, parameters={"text": "stale"}) as phone:
            await phone.until_heard(noise("stale"))
        assert deepgram.connections == 2


async def test_connection_closed_at_the_moment_of_use(server: Server, deepgram: Deepgram) -> None:
    """A kept-alive connection that Deepgram closes as it is used costs no failure."""
    before = len(server.log)
    text = deepgram.answer("stale at once", Answer(stop_after=-1), Answer())
    async with dial(server.url, parameters={"text": text}) as phone:
        await phone.until_heard(noise(text))
        await phone.hang_up()
    assert len(deepgram.asked(text)) == 2
    await server.until_ended(phone.call_sid)
    assert " WARNING " not in server.log[before:]


# The queue


async def test_queue(deepgram: Deepgram) -> None:
    """More than DEEPGRAM_CONCURRENCY wait for their turn, which comes though a caller has gone."""
    go = asyncio.Event()
    texts = [f"number {number} of at most two" for number in range(5)]
    for text in texts:
        deepgram.answer(text, Answer(gate=go))
    async with Server({"DEEPGRAM_URL": deepgram.url, "DEEPGRAM_CONCURRENCY": "2"}) as server:
        await server.logged("the greeting is ready")
        deepgram.most_under_way = 0
        async with contextlib.AsyncExitStack() as calls:
            phones = []
            for text in texts:
                call = dial(server.url, parameters={"text": text})
                phones.append(await calls.enter_async_context(call))
            for phone in phones:
                await server.until_started(phone.call_sid)
            await deepgram.until(lambda: deepgram.under_way == 2)
            await phones[4].hang_up()
            await server.until_ended(phones[4].call_sid)
            go.set()
            for phone, text in zip(phones[:4], texts, strict=False):
                await phone.hears(noise(text))
        await deepgram.until_asked(texts[4])
    assert deepgram.most_under_way == 2
    assert [len(deepgram.asked(text)) for text in texts] == [1] * 5


async def test_first_come_first_served(deepgram: Deepgram) -> None:
    """Texts that wait for their turn are asked for in the order in which they were wanted."""
    go = asyncio.Event()
    greeting = deepgram.answer("in front of the queue", Answer(gate=go))
    texts = [f"number {number} in the queue" for number in range(4)]
    settings = {"DEEPGRAM_CONCURRENCY": "1", "GREETING": greeting}
    async with (
        Server({"DEEPGRAM_URL": deepgram.url, **settings}) as server,
        contextlib.AsyncExitStack() as calls,
    ):
        await deepgram.until_asked(greeting)
        phones: list[Telephone] = []
        for text in texts:
            call = dial(server.url, parameters={"text": text})
            phones.append(await calls.enter_async_context(call))
            await server.until_started(phones[-1].call_sid)
        go.set()
        for phone, text in zip(phones, texts, strict=True):
            await phone.hears(noise(text))
    assert [request.text for request in deepgram.requests if request.text in texts] == texts


async def test_queued_together(deepgram: Deepgram) -> None:
    """Who waits for the same text as another hears it, though that other has hung up."""
    go = asyncio.Event()
    greeting = deepgram.answer("in front of the two", Answer(gate=go))
    settings = {"DEEPGRAM_CONCURRENCY": "1", "GREETING": greeting}
    wanted = {"text": "wanted by two"}
    async with (
        Server({"DEEPGRAM_URL": deepgram.url, **settings}) as server,
        dial(server.url, parameters=wanted) as one,
        dial(server.url, parameters=wanted) as two,
    ):
        await deepgram.until_asked(greeting)
        await server.until_started(one.call_sid)
        await server.until_started(two.call_sid)
        await one.hang_up()
        await server.until_ended(one.call_sid)
        go.set()
        await two.hears(noise("wanted by two"))
    assert len(deepgram.asked("wanted by two")) == 1
