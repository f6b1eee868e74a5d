"""A script in a folder other than the module's, with a module of its own beside it."""

import sys

import prices  # type: ignore[import-not-found]  # It is beside this file.

import twilio_aura


async def script(call: twilio_aura.Call) -> None:
    """Say a price."""
    await call.say(prices.APPLE)


if __name__ == "__main__":
    print("opening the shop")
    sys.exit(twilio_aura.main(script))
