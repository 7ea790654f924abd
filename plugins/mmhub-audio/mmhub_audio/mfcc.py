"""Mel-frequency cepstral coefficients of log-mel frames. Davis and Mermelstein 1980."""

from __future__ import annotations

import torch
import torchaudio
from torch import Tensor, nn


class MFCC(nn.Module):
    """The first coefficients of an orthonormal DCT-II over the bands: (N, T, M), (N, T) -> (N, T, n_mfcc).

    Each has zero mean and unit variance over a clip. With natural logarithms of mel power + 1e-6 as frames,
    `coefficients` equals torchaudio's `transforms.MFCC(log_mels=True)`. Normalised frames give the same in the end:
    the normalisation of each coefficient undoes any scale and offset. A clip of one frame becomes zero.
    """

    matrix: Tensor

    def __init__(self, n_mfcc: int, n_mels: int) -> None:
        super().__init__()
        self.register_buffer("matrix", torchaudio.functional.create_dct(n_mfcc, n_mels, "ortho"), persistent=False)

    def coefficients(self, frames: Tensor) -> Tensor:
        """Transform log-mel frames: (N, T, M) -> (N, T, n_mfcc)."""
        return torch.matmul(frames.float(), self.matrix.float())

    def forward(self, frames: Tensor, mask: Tensor) -> Tensor:
        with torch.autocast(frames.device.type, enabled=False):
            weights = mask.unsqueeze(-1).to(torch.float32)
            count = weights.sum(1, keepdim=True).clamp(min=1)
            found = self.coefficients(frames)
            centred = (found - (found * weights).sum(1, keepdim=True) / count) * weights
            return centred / torch.sqrt(centred.square().sum(1, keepdim=True) / count + 1e-5)
