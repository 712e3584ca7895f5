"""Checks of PVDM: crop and resize of its data."""

from tests.parity.case import Case, adapter
from tests.parity.data_cases import resized


@adapter("pvdm", "resize_crop")
def check_resize_crop(case: Case) -> None:
    size = (case.config("resolution"),) * 2
    case.expect("video_cthw", resized(case.input("video_tchw").float(), size, "pvdm").transpose(0, 1), 1e-6)
