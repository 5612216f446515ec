"""Pure tensor functions: no model, no config. Each is held against a brute-force oracle in tests/ops/test_ops.py."""
