"""nnU-Net's predictor, tuned for CPUs. Importing this loads torch and nnU-Net."""

from __future__ import annotations

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian

_TILES = 4


class CpuPredictor(nnUNetPredictor):
    """nnU-Net's predictor with several tiles per forward pass, and logits summed in float32 instead of float16.

    With a batch of one, torch does not use oneDNN for most of a small network's 3D convolutions (`use_mkldnn` in its
    Convolution.cpp) and takes five times as long.
    """

    def _internal_predict_sliding_window_return_logits(
        self, data: torch.Tensor, slicers: list[tuple[slice, ...]], do_on_device: bool = True
    ) -> torch.Tensor:
        """The mean of all tiles' logits, weighted by a Gaussian over each tile.

        Args:
            data: (channels, z, y, x), at least as large as a tile.
            slicers: one per tile.
            do_on_device: not used; everything is on the CPU.

        Returns:
            (classes, z, y, x) float32.
        """
        tile = tuple(self.configuration_manager.patch_size)
        gaussian = compute_gaussian(tile, 1 / 8, 10, torch.float32, data.device)
        logits = torch.zeros(self.label_manager.num_segmentation_heads, *data.shape[1:])
        weights = torch.zeros(data.shape[1:])
        for start in range(0, len(slicers), _TILES):
            places = slicers[start : start + _TILES]
            # A last single tile is paired with a copy of itself.
            tiles = torch.stack([data[place] for place in (places if len(places) > 1 else places * 2)])
            for place, predicted in zip(places, self._internal_maybe_mirror_and_predict(tiles), strict=False):
                logits[place] += predicted * gaussian
                weights[place[1:]] += gaussian
        return logits / weights
