"""Checks of HVDM: crop and resize of its data."""

from tests.parity import (
    adapters_hvdm_diffusion,  # noqa: F401 - registers its checks
    adapters_hvdm_net,  # noqa: F401 - registers its checks
    adapters_hvdm_train,  # noqa: F401 - registers its checks
    adapters_hvdm_unet,  # noqa: F401 - registers its checks
)
from tests.parity.case import Case, adapter
from tests.parity.data_cases import resized


@adapter("hvdm", "resize_crop")
def check_resize_crop(case: Case) -> None:
    for name in case.names("out/"):
        number = name.removeprefix("out/")
        size = (int(case.input(f"{number}_resolution")),) * 2
        case.expect(number, resized(case.input(number), size, "hvdm").transpose(0, 1), 1e-6)
