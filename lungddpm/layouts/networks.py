"""Lung segmentation by published networks, from optional packages that fetch their own weights.

    lungmask           U-net R231, slice by slice: Hofmanninger et al., Eur. Radiol. Exp. 4:50, 2020
    totalsegmentator   nnU-Net, five lobes: Wasserthal et al., Radiology: Artificial Intelligence 5:e230024, 2023

Both exclude trachea and main bronchi. Both use a GPU if one is visible; on a CPU a scan takes minutes.
"""

from __future__ import annotations

import functools
import pickle
import zipfile
from typing import Any

import numpy as np

from lungddpm.core.device import log_device
from lungddpm.core.errors import UserError
from lungddpm.core.labels import LEFT, RIGHT
from lungddpm.core.volume import Volume

_LOBES = {
    "lung_upper_lobe_right": RIGHT,
    "lung_middle_lobe_right": RIGHT,
    "lung_lower_lobe_right": RIGHT,
    "lung_upper_lobe_left": LEFT,
    "lung_lower_lobe_left": LEFT,
}
_KEY = "layouts.lungs"


def lungs_by_network(ct: Volume, name: str) -> np.ndarray:
    """Both lungs as segmented by a network, unchecked.

    Args:
        ct: HU, RAS+.
        name: `lungmask` or `totalsegmentator`.

    Returns:
        uint8 of the CT's shape: 0 outside, `RIGHT`, `LEFT`.

    Raises:
        UserError: the package is not installed, or its weights are not available.
    """
    return {"lungmask": _by_lungmask, "totalsegmentator": _by_totalsegmentator}[name](ct)


def _by_lungmask(ct: Volume) -> np.ndarray:
    # It takes arrays as (slice, row, column) in LPS order and returns 1 for the right lung, 2 for the left.
    found = _lungmask_model().apply(_ras_lps(ct.array).transpose(2, 1, 0))
    lungs_lr = np.zeros(ct.shape, np.uint8)
    for label, side in ((1, RIGHT), (2, LEFT)):
        lungs_lr[_ras_lps((found == label).transpose(2, 1, 0))] = side
    return lungs_lr


@functools.cache
def _lungmask_model() -> Any:
    try:
        from lungmask import LMInferer
    except ImportError as error:
        raise _missing("lungmask", error) from None
    try:
        model = LMInferer(modelname="R231", tqdm_disable=True)
    # No network (URLError is an OSError), or a download that was truncated.
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        fetch = 'python -c "from lungmask import LMInferer; LMInferer()"'
        raise _without_weights("lungmask", error, fetch, "TORCH_HOME") from None
    _log_device(model.device.type)
    return model


def _by_totalsegmentator(ct: Volume) -> np.ndarray:
    try:
        from totalsegmentator.map_to_binary import class_map
        from totalsegmentator.python_api import totalsegmentator
    except ImportError as error:
        raise _missing("totalsegmentator", error) from None
    import nibabel
    from requests import RequestException

    try:
        found = totalsegmentator(
            nibabel.Nifti1Image(ct.array, ct.affine),
            output=None,
            ml=True,
            task="total",
            roi_subset=list(_LOBES),
            quiet=True,
            device=_totalsegmentator_device(),
        )
    except (RequestException, zipfile.BadZipFile) as error:
        fetch = "totalseg_download_weights -t total"
        raise _without_weights("totalsegmentator", error, fetch, "TOTALSEG_HOME_DIR") from None
    labels = np.asarray(found.dataobj)
    lungs_lr = np.zeros(ct.shape, np.uint8)
    for label, name in class_map["total"].items():
        if name in _LOBES:
            lungs_lr[labels == label] = _LOBES[name]
    return lungs_lr


@functools.cache
def _totalsegmentator_device() -> str:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    _log_device(device)
    return "gpu" if device == "cuda" else device


def _log_device(device: str) -> None:
    import torch

    from lungddpm.core.torch_device import device_name

    log_device(device, device_name(torch.device(device)))


def _ras_lps(array: np.ndarray) -> np.ndarray:
    """An (x, y, z) array converted from RAS to LPS, or back."""
    return array[::-1, ::-1]


def _missing(package: str, error: ImportError) -> UserError:
    return UserError(
        f"{_KEY} = {package}",
        f"the package cannot be imported ({error})",
        f"Run `pip install 'lungddpm[{package}]'`, or set {_KEY} to classical.",
    )


def _without_weights(package: str, error: Exception, fetch: str, folder: str) -> UserError:
    return UserError(
        f"{_KEY} = {package}",
        f"the network's weights are not available ({' '.join(str(error).split())[:300]})",
        f"Run `{fetch}` with network access (${folder} is where they are kept), or set {_KEY} to classical.",
    )
