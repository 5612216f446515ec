"""The forward of a model that torch.compile traces.

The graph knows from a forecast where stages act and how many tokens they leave (`layer_plans`); opaque operators
stand for the stages (`operators`), and the state (`state`) lets the ordinary forward act when they run. Only `active`
and `run` call in here.
"""
