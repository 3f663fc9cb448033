"""Owns tokens and tensors: one thread runs the model for all requests, in steps that they share.
Knows no HTTP, no OpenAI wire format and none of the bundle's settings; an EngineConfig says what it needs."""
