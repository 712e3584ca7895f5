"""Checks of VIDM: crop and resize of its data, and the frames that its evaluation keeps."""

from datasets.frames import spread
from tests.parity import (
    adapters_vidm_diffusion,  # noqa: F401 - registers its checks
    adapters_vidm_metrics,  # noqa: F401 - registers its checks
    adapters_vidm_net,  # noqa: F401 - registers its checks
    adapters_vidm_sample,  # noqa: F401 - registers its checks
)
from tests.parity.case import Case, adapter
from tests.parity.data_cases import numbers, resized


@adapter("vidm", "centre crop + bilinear resize")
def check_crop(case: Case) -> None:
    size = (case.config("resolution"),) * 2
    clip = resized(case.input("video_tchw_0_255"), size, "vidm")
    case.expect("video_cthw", clip.transpose(0, 1), 1e-5)
    case.expect("image_chw", clip[0], 1e-5)
    case.expect("image_model_range", clip[0] / 255 * 2 - 1, 1e-5)


@adapter("vidm", "evaluation reader: frame subsampling of a video file")
def check_frames(case: Case) -> None:
    for total, count in case.config("pairs"):
        case.expect(f"kept_{total}_{count}", numbers(spread(total, count)))
