"""Any mesh gives the losses, gradient norms and greedy tokens of one device."""

import pathlib

from tests.devices import run_on_devices


def test_eight_devices_train_as_one_does(tmp_path):
    run_on_devices(8, pathlib.Path(__file__).with_name("meshes.py"), tmp_path)
