"""Known limits, and 170 random cases (under SAM each feature occurs); ``run.py`` runs more, and every feature alone."""

from __future__ import annotations

import pytest

from fuzz.base import KINDS, Case, covering_cases
from fuzz.checks import check
from fuzz.features import FEATURES, draw_case, known_limits

NUM_CASES = {"monitor": 60, "sam0": 20, "sam": 50, "sam_monitor": 20, "sam_previous": 20}


@pytest.mark.parametrize("name", known_limits())
def test_known_limit_warns_by_name(name):
    assert not check("monitor", Case((FEATURES[name],)))


@pytest.mark.parametrize(("kind", "seed"), [(kind, seed) for kind in KINDS for seed in range(NUM_CASES[kind])])
def test_random_case(kind, seed):
    case = covering_cases(kind, NUM_CASES[kind])[seed] if kind == "sam" else draw_case(seed, kind)
    problem = check(kind, case)
    names = " ".join(f.name for f in case.features)
    assert not problem, (
        f"{problem}\nagain: python tests/fuzz/run.py --kind {kind} --first {case.seed} --features {names}"
    )


def test_a_case_that_is_not_the_same_twice_is_found():
    """The fingerprint sees a single changed weight, number, count and record."""
    from fuzz.checks import train
    from fuzz.fingerprint import difference

    case = Case((FEATURES["adam"], FEATURES["list_attribute"]), 0)
    first, other = train(case, list)[0], train(Case(case.features, 1), list)[0]
    assert not difference(first, train(case, list)[0])
    for item in ("module", "optimizers", "rng/torch", "logged"):
        assert difference(first[item], other[item]), item
    longer = train(Case((*case.features, FEATURES["three_epochs"])), list)[0]
    for item in ("module", "trainer/global_step", "callbacks"):
        assert difference(first[item], longer[item], counts_only=True), item
