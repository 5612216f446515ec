"""Stages at the decoder's input or inside it that drop tokens."""
