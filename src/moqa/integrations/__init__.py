"""Integrations: how other libraries meet moqa's checkpoints."""
