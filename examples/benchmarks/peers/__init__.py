"""Parts of ``examples/benchmarks/benchmark_peers.py``: networks to measure, tools that measure them, what comes out."""
