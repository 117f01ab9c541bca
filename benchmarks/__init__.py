"""One script per claim, each a ratio against a named peer in the same run: `python -m benchmarks.input`, …"""
