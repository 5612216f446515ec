"""The layer-schedule engine: it runs a pipeline's stages inside an unmodified transformers decoder.

Callers from outside enter by `attach` (`tr.reduce`) and `streaming` (`tr.stream`); nothing else in here is public.
A walk through one prefill goes down these rooms and never back up:

attach      puts a pipeline on a model and takes it off
run         the attached pipeline: what happens when a forward begins and when it ends
active      the forwards that go on, in whatever thread, and the hooks that are on only while they do
refusals    calls in which the engine could not be exact, refused by name
forward/    one forward: its call, its sequences, its batch, what the stages do to it, its receipt
compiled/   the same forward when torch.compile traces the model
tower/      stages in the vision tower
streaming/  a sequence that comes in chunks
model/      the host model: its facts, the hooks around it, the attention tap
cache/      KV cache layers that hold their own tokens
"""
