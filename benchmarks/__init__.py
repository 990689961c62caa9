"""Benchmark suites and what they recorded, imported as ``rtk.benchmarks``. ``results/`` is not part of the wheel."""
