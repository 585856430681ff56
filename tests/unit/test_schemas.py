"""The shipped JSON Schemas are the ones the typed models generate, and they accept what raygard writes."""

import json

import jsonschema
import pytest
from torch import nn

from raygard import schemas
from raygard.errors import RaygardError
from raygard.mask import FreezeMask


@pytest.mark.parametrize("name", schemas.NAMES)
def test_shipped_equals_generated(name):
    assert schemas.load(name) == json.loads(json.dumps(schemas.generate()[name]))


@pytest.mark.parametrize("name", schemas.NAMES)
def test_is_a_valid_schema(name):
    jsonschema.Draft202012Validator.check_schema(schemas.load(name))


def test_regenerate_writes_every_schema(tmp_path):
    assert {path.name for path in schemas.write(tmp_path)} == {f"{name}.schema.json" for name in schemas.NAMES}


def test_saved_mask_follows_its_schema(tmp_path):
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    FreezeMask.create(module, ["0.weight"]).save(tmp_path / "mask")
    manifest = json.loads((tmp_path / "mask" / "mask.json").read_text())
    jsonschema.validate(manifest, schemas.load("mask"))
    manifest["tensors"][0]["frozen"] = "yes"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, schemas.load("mask"))


def test_unknown_schema_is_refused():
    with pytest.raises(RaygardError, match="did you mean 'outcome'"):
        schemas.load("outcomes")
