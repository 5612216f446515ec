"""KV cache layers that hold their own tokens and report logical lengths.

`layers` has the layer that stands in for transformers' own; `adopt` puts it into a user's cache, refuses caches that
it cannot serve, and takes back what a failed forward has put in. Every other room of the engine may call in here;
this room calls none.
"""
