"""Fixtures of the tests of training: a tiny backbone, and a training of it that nothing disturbs."""

from pathlib import Path

import pytest
from distilling import prepare
from helpers import tiny_backbone

from pipeline.runs.folder import RunDir
from pipeline.stages import distill


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    return tiny_backbone(tmp_path_factory.mktemp("backbone"), sharpness=4.0)


@pytest.fixture(scope="module")
def undisturbed(request, tmp_path_factory, backbone) -> RunDir:
    """A run that was trained to its end, with the key=value words in UNDISTURBED of the test module."""
    run = prepare(tmp_path_factory.mktemp("undisturbed"), backbone, *request.module.UNDISTURBED)
    distill.run(run)
    return run
