"""Serving: the engine, its scheduler, adapters in a batch, the HTTP API."""
