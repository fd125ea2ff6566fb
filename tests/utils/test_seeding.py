import pytest

from mlpmatch_pl.utils.seeding import derive_seed


@pytest.mark.parametrize(
    ("parts", "seed"),
    [
        ((0, "labeled", 0), 9137069941047344279),
        ((1, "unlabeled", 10**9), 5444206705903813042),
        ((3, "permutation", 2), 3121179599090329449),
    ],
)
def test_seeds_never_change(parts, seed):
    """Splits and resumed runs depend on them, in every process and on every platform."""
    assert derive_seed(*parts) == seed


def test_different_parts_have_different_seeds():
    parts = [(), (1,), ("1",), (1, 1), (11,), ("1", 1), (1, "1"), ("1\x1f1",), (0, 1), (1, 0)]
    assert len({derive_seed(*part) for part in parts}) == len(parts)
