"""Tests, a demo and a benchmark of twilio_aura, on real sockets."""
