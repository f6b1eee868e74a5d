"""Tests, a demo and a benchmark of twilio_aura, on real sockets.

- test_*.py: the tests, most named after a part of the module; conftest.py has what they share.
- standins/: stand-ins for Deepgram and its voice, and for Twilio's telephone and REST API; and the
  real server, in a process of its own.
- demo.py: a simulated call that can be listened to: `python -m tests.demo`.
- benchmark/: what a caller waits for, and what a call costs: `python -m tests.benchmark`.
- requirements.txt: what all of these need; demo-requirements.txt: what the demo needs.
"""
