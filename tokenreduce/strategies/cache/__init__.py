"""Stages that shorten what attention sees, not the hidden states."""
