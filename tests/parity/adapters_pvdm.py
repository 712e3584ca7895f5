"""Checks of PVDM. Its parts have files of their own; here crop and resize of its data."""

from tests.parity import (
    adapters_pvdm_batch,  # noqa: F401 - registers its checks
    adapters_pvdm_diffusion,  # noqa: F401 - registers its checks
    adapters_pvdm_engine,  # noqa: F401 - registers its checks
    adapters_pvdm_metrics,  # noqa: F401 - registers its checks
    adapters_pvdm_net,  # noqa: F401 - registers its checks
    adapters_pvdm_train,  # noqa: F401 - registers its checks
    adapters_pvdm_unet,  # noqa: F401 - registers its checks
)
from tests.parity.case import Case, adapter
from tests.parity.data_cases import resized


@adapter("pvdm", "resize_crop")
def check_resize_crop(case: Case) -> None:
    size = (case.config("resolution"),) * 2
    case.expect("video_cthw", resized(case.input("video_tchw").float(), size, "pvdm").transpose(0, 1), 1e-5)
