"""A file with a script, which nobody has told `main` of."""

import twilio_aura


async def script(call: twilio_aura.Call) -> None:
    """Say what will never be heard."""
    await call.say("Never.")
