"""What Twilio knows, beside the telephone."""

TOKEN = "a-token-that-signs"
