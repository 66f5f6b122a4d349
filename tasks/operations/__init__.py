"""Idempotent building blocks that pyinfra lacks."""
