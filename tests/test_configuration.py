import runpy
from pathlib import Path

import pytest

from configs.default import get_config
from drivenmorph_jax.errors import InputError
from drivenmorph_jax.network.networks import make_network
from drivenmorph_jax.runtime import configuration

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_loads_and_makes_its_network(path):
    config = configuration.load(path)
    assert make_network(config.model).config.name == config.model.name  # raises where levels do not fit together
    assert set(config) == set(get_config())
    assert "python train.py --config" in runpy.run_path(str(path))["__doc__"]


def test_settings_are_read_in_the_type_that_they_replace():
    config = configuration.override(get_config(), [
        "--config.steps=7", "--config.learning_rate=1", "--config.model.updates=[1, 1, 1, 1]",
        "--config.model.dtype=bfloat16", "--config.model.remat=True"])
    assert config.steps == 7 and config.model.updates == (1, 1, 1, 1) and config.model.dtype == "bfloat16"
    assert config.learning_rate == 1.0 and isinstance(config.learning_rate, float) and config.model.remat is True


def test_the_argument_of_override_stays_as_it_was():
    config = configuration.load("malf")
    before = config.to_dict()
    changed = configuration.override(config, ["--config.steps=7", "--config.data.atlas=mean", "--config.init=other",
                                              "--config.loss.window=3"])
    assert config.to_dict() == before and config.data.atlas is None
    assert changed.to_dict() == before | {"steps": 7, "init": "other", "data": before["data"] | {"atlas": "mean"},
                                          "loss": before["loss"] | {"window": 3}}


def test_a_shipped_configuration_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in CONFIGS:
        assert configuration.load(path.stem).to_dict() == configuration.load(path).to_dict()
    with pytest.raises(InputError, match="defolt does not exist.*default"):
        configuration.load("defolt")


@pytest.mark.parametrize(("argument", "said"), [
    ("--config.stepps=3", "did you mean --config.steps"),
    ("--config.model.nothing.more=1", "not a setting"),
    ("--config.model=1", "not a setting"),
    ("--steps=3", "--config.KEY=VALUE"),
    ("--config.steps", "--config.KEY=VALUE"),
    ("--config.steps=many", "int"),
    ("--config.steps=1.5", "int"),
    ("--config.model.remat=1", "bool"),
])
def test_a_setting_that_does_not_fit_is_refused(argument, said):
    with pytest.raises(InputError, match=said):
        configuration.override(get_config(), [argument])


def test_a_file_that_is_no_configuration_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        configuration.load(tmp_path / "no.py")
    for text in ("x = 1", "get_config = (", "import no_such_package"):
        (tmp_path / "bad.py").write_text(text)
        with pytest.raises(InputError, match="bad.py"):
            configuration.load(tmp_path / "bad.py")


def test_a_configuration_survives_json():
    import json
    config = get_config()
    assert configuration.from_dict(json.loads(config.to_json())).to_dict() == config.to_dict()
