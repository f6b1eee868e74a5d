"""Tests and a demo of twilio_aura, on real sockets."""
