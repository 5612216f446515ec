"""Stages in the vision tower.

`hooks` lets them act before the tower and before its blocks and makes the tower's output whole again; `frames` takes
frames out and puts them back for towers of each kind. Only `run` calls in here.
"""
