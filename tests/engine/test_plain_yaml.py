"""Configurations from files: what they refer to, and what they never get to see."""

import re
from functools import reduce
from operator import getitem

import pytest
from omegaconf import OmegaConf

from mlpmatch_pl.utils.plain_yaml import MOST_BYTES, load_yaml, unresolved

SECRET = "0123456789abcdef"


@pytest.fixture
def read(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_KEY", SECRET)
    monkeypatch.setenv("MLPMATCH_DATA", "/data")
    monkeypatch.delenv("MLPMATCH_NOT_SET", raising=False)

    def write_and_read(text):
        (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
        return load_yaml(tmp_path / "config.yaml")

    return write_and_read


def test_what_a_run_s_own_file_refers_to_is_as_omegaconf_has_it(read):
    text = """
seed: 3
lr: 1e-3
loader: {batch_size: 4, unlabeled_batch_size: '${.batch_size}', none: null, list: [1, '${seed}', {a: '${..2.b}', b: x}]}
dataset: {root: '${oc.env:MLPMATCH_DATA,data}/voc', name: 'x${seed}/${..seed}/${loader.unlabeled_batch_size}'}
other: '${oc.env:MLPMATCH_NOT_SET,data}/voc'
again: '${dataset.name}'
"""
    content, found = OmegaConf.create(text), read(text)
    for place in (
        "seed",
        "lr",
        "loader.unlabeled_batch_size",
        "loader.none",
        "dataset.root",
        "dataset.name",
        "other",
        "again",
    ):
        assert reduce(getitem, place.split("."), found) == OmegaConf.select(content, place), place
    assert found["loader"]["unlabeled_batch_size"] == 4
    assert found["loader"]["list"] == [1, 3, {"a": "${..2.b}", "b": "x"}]  # places in lists stay text
    assert list(unresolved(found)) == ["${..2.b}"]


@pytest.mark.parametrize(
    "value",
    [
        "'${oc.env:SECRET_KEY}'",
        "'${oc.env:SECRET_KEY,none}/x'",
        "'${oc.env:MLPMATCH_NOT_SET,${oc.env:SECRET_KEY}}'",
        "'${oc.env:${name}}'",
        "'${${resolver}:SECRET_KEY}'",
        "'$${rest}'",
        r"'\${oc.env:SECRET_KEY}'",
        '"\\x24{oc.env:SECRET_KEY}"',
        "'${oc.decode:${quoted}}'",
        "'${oc.select:other}'",
        "'${other}'",
        "'${hydra:runtime.cwd}'",
        "'${oc.env:MLPMATCH_NOT_SET}'",
    ],
)
def test_no_resolver_is_called(read, value):
    others = (
        "name: SECRET_KEY\nresolver: oc.env\nrest: '{oc.env:SECRET_KEY}'\nquoted: \"'${oc.env:SECRET_KEY}'\"\n"
        "other: '${oc.env:SECRET_KEY}'\n"
    )
    found = read(f"{others}a: {value}\n")
    assert SECRET not in str(found)
    assert list(unresolved(found["a"])) == [found["a"]]  # it is still said that something is missing


def test_references_in_circles_and_upwards_end(read):
    found = read("a: '${b}'\nb: '${a}'\nc: '${c}${c}'\nd: {e: '${.....e}', f: '${d}'}\n")
    assert {re.sub(r"\w", "", text) for text in unresolved(found)} <= {"${}", "${}${}${}${}", "${.....}"}
    assert len(list(unresolved(found))) == 5


def doubling(first, levels):
    return f"a0: '{first}'\n" + "".join(f'a{n}: "\\x24{{a{n - 1}}}\\x24{{a{n - 1}}}"\n' for n in range(1, levels))


@pytest.mark.parametrize(("text", "reason"), [
    (doubling("", 60), "20 interpolations"),  # written with escapes, and of no length
    (doubling("x" * 200_000, 11), "characters in a value"),
    ("a: " + "x" * MOST_BYTES, "bytes"),
])  # fmt: skip
def test_values_that_grow_are_refused(read, text, reason):
    with pytest.raises(ValueError, match=reason):
        read(text)
