"""Stages at the decoder's input or inside it that average tokens."""
