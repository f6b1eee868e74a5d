"""Tests, a demo and a benchmark of twilio_aura.

What needs no socket is tested in the process, over a stand-in for a websocket; servers and
processes are started where they are the point. conftest.py has what the tests share.

- test_call.py: `Call`: what a script may use, what Twilio sends, keys, marks, drains, its end.
- test_call_streamdouble.py: calls by a simulator of Twilio that others wrote.
- test_script.py: the default script; what becomes of a script that returns, fails or goes on.
- test_mistakes.py: what beginners write, and what they are told.
- test_playback.py: `Playback`: how far ahead of what plays, and the figures in the log.
- test_twilio_api.py: `redirect` and `hang_up`, and what is kept of a foreign answer.
- test_speech.py: `Speech`: audio that grows while it is listened to.
- test_utterance.py: `Utterance`: a text that is spoken while it is written.
- test_text_to_speech.py: `TextToSpeech`: requests, tries, connections, queue and cache.
- test_models.py: texts that the real clients of language models write.
- test_pieces.py: `length_of_piece`; the texts that it cuts are in test_pieces.txt.
- test_settings.py: `Settings`, `.env` and `.env.example`.
- test_server.py: `Server`: who is let in, plain HTTP, and code that blocks.
- test_server_drain.py: how a server ends.
- test_start.py: what is printed, ngrok, TLS, and what a server cannot have.
- test_throttle.py: `Throttle`: nobody fills the log.
- test_demo.py, test_voice.py: the demo, and the offline voice that it has without an account.
- test_readme.py, test_readme_proxies.py: what the README says, and its proxies.

- standins/: Deepgram and its voice, ngrok, Twilio's telephone and REST API, language models, a
  network; and the real server, in a process of its own.
- scripts/: scripts in files of their own, for the tests of the demo and of mistakes.
- demo.py: a simulated call that can be listened to: `python -m tests.demo`.
- benchmark/: what a caller waits for, and what a call costs: `python -m tests.benchmark`.
- requirements.txt: what all of these need; demo-requirements.txt: what the demo needs.
"""
