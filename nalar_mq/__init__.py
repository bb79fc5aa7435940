"""Actors for LLM agent workflows over NATS."""
