"""Batches to the messages that are sent, and back: pure code, without sockets and event loop."""
