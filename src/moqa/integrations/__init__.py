"""Integrations: moqa's checkpoints in other libraries."""
