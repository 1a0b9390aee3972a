"""The HTTP API: OpenAI's shapes, text to tokens and back, access, metrics, the page."""
