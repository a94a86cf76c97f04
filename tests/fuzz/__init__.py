"""Random Lightning runs, with and without the callbacks of this package, compared bit for bit.

A *feature* is one thing that a module, a data pipeline, a Trainer, an optimizer or another callback does. A *case*
combines one to four of them, drawn from a seed. Each *kind* of check trains a case twice or more and compares
fingerprints of everything that the run left. ``run.py`` runs many cases, ``test_fuzz.py`` some of them in CI.

Known limits, each a feature of its own that may change the run but then warns by name: those of ``known_limits()``.
"""
