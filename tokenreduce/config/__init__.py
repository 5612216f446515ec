"""YAML as a user wrote it: `yaml_source` knows the line of every value, `problems` says what is wrong and what to do.

Nothing is known here of models or strategies. Whoever reads a user's file (pipeline, compare) calls it.
"""
