"""A script that looks for a variable of .env while its file is imported."""

import os
import sys

import twilio_aura

SHOP = os.environ["SHOP"]


async def script(call: twilio_aura.Call) -> None:
    """Say what will never be heard."""
    await call.say(SHOP)


if __name__ == "__main__":
    sys.exit(twilio_aura.main(script))
