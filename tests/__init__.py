"""Tests, a demo and a benchmark of twilio_aura, on real sockets.

- test_*.py: the tests, each named after a part of the module; conftest.py has what they share.
- standins/: who stands in for others: Deepgram and its voice, Twilio's telephone, the server's
  process.
- demo.py: a simulated call that can be listened to: `python -m tests.demo`.
- benchmark/: what a caller waits for, and what a call costs: `python -m tests.benchmark`.
- requirements.txt: what these need beside the module's own requirements.
"""
