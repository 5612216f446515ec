"""Stages inside the vision tower."""
