"""A simulator of Twilio that others wrote calls the server, and holds it to the protocol."""

from collections.abc import Awaitable, Callable

import pytest
from streamdouble.api import CallReport
from streamdouble.audio import silence_frame
from streamdouble.scenario import Dtmf, Expect, Hangup, Scenario, Wait, WaitFor
from streamdouble.session import SessionConfig

from tests.standins.deepgram import GREETING, Answer, Deepgram, noise
from tests.standins.process import Server

SimulatedCall = Callable[..., Awaitable[CallReport]]
A_MINUTE = noise("a minute") * 120


@pytest.fixture
def streamdouble_config() -> SessionConfig:
    """Override the plugin's defaults: the call ends soon after the last sound."""
    return SessionConfig(quiet_period_s=0.2)


async def test_greeting(simulated_call: SimulatedCall, server: Server) -> None:
    """The greeting is heard byte for byte, its mark returns, and the call stays open."""
    report = await simulated_call(server.url, frames=[silence_frame()] * 5)
    assert report.passed
    assert report.violations == []
    assert report.audio_received == noise(GREETING)
    result = report.result
    assert len(result.marks_received) == 1
    assert result.marks_echoed == result.marks_received
    assert (result.unknown_events, result.warnings, result.closed_by) == ([], [], None)
    ended = await server.logged(f"{result.identity.call_sid} ended: hung up")
    seconds = f"{len(report.audio_received) / 8000:.1f} s"
    assert f"sent {seconds}, heard {seconds}" in ended


async def test_parameters(simulated_call: SimulatedCall, server: Server) -> None:
    """The TwiML's <Parameter>s choose the text and the voice."""
    parameters = {"text": "Good morning.", "model": "aura-luna-en"}
    config = SessionConfig(quiet_period_s=0.2, custom_parameters=parameters)
    report = await simulated_call(server.url, frames=[silence_frame()], config=config)
    assert report.passed
    assert report.audio_received == noise("Good morning.", "aura-luna-en")


async def test_key_interrupts(
    simulated_call: SimulatedCall, server: Server, deepgram: Deepgram
) -> None:
    """A key pressed while something is said clears what was not yet played."""
    text = deepgram.answer("interrupted", Answer(audio=A_MINUTE))
    config = SessionConfig(quiet_period_s=0.2, custom_parameters={"text": text})
    steps = [WaitFor("audio"), Dtmf("5"), WaitFor("clear"), Expect("clear"), Wait(0.1)]
    report = await simulated_call(server.url, scenario=Scenario("key", steps), config=config)
    assert report.passed
    assert report.violations == []
    assert report.result.clears_received == 1
    assert A_MINUTE.startswith(report.audio_received)
    ended = await server.logged(f"{report.result.identity.call_sid} ended: hung up")
    assert "heard 0." in ended


async def test_caller_who_drops(
    simulated_call: SimulatedCall, server: Server, deepgram: Deepgram
) -> None:
    """A call that closes in mid-speech, without `stop`, ends quietly."""
    text = deepgram.answer("dropped", Answer(audio=A_MINUTE))
    config = SessionConfig(quiet_period_s=0.2, custom_parameters={"text": text})
    steps = [WaitFor("audio"), Hangup()]
    report = await simulated_call(server.url, scenario=Scenario("drop", steps), config=config)
    assert report.result.closed_by == "caller"
    await server.logged(f"{report.result.identity.call_sid} ended: hung up")
