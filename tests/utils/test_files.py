import pytest

from mlpmatch_pl.utils.files import MAX_YAML_BYTES, load_yaml

ALIASES = "a0: &a0 [x, x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 30))


def test_yaml_is_plain_data_and_references_stay_text(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    path = tmp_path / "config.yaml"
    path.write_text("seed: 3\nlist: [1, '${seed}']\nkey: ${oc.env:SECRET}\nname: Föhr\n", encoding="utf-8")
    assert load_yaml(path) == {"seed": 3, "list": [1, "${seed}"], "key": "${oc.env:SECRET}", "name": "Föhr"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (ALIASES, "aliases"),
        ("a: " + "[" * 10**5, "levels"),
        ("a: " + "x" * MAX_YAML_BYTES, "bytes"),
        ("a: [1", "expected ',' or ']'"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("\0", "special characters"),
    ],
)
def test_yaml_that_is_not_a_configuration_is_refused(content, reason, tmp_path):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match=reason):
        load_yaml(tmp_path / "config.yaml")
