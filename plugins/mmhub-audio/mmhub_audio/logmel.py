"""The front end of the encoders trained from scratch: log-mel frames that padding cannot change, and SpecAugment.

Frame k is centred on sample k * hop and the signal is taken as zero outside itself, so a clip of S samples has
1 + S // hop frames whether or not zeros follow it. Normalisation looks at real frames alone.
"""

from __future__ import annotations

import warnings

import torch
import torchaudio
from torch import Tensor, nn

from mmhub.errors import UsageError

_FLOOR = 1e-6  # about the power of one 16-bit quantisation step in a frame


class LogMel(nn.Module):
    """Log-mel frames with zero mean and unit variance over each clip: (N, S), (N, S) -> (N, T, M), (N, T)."""

    window: Tensor
    filters: Tensor

    def __init__(self, sample_rate: int, n_mels: int, window_ms: float, hop_ms: float) -> None:
        super().__init__()
        self.length = round(sample_rate * window_ms / 1000)
        self.hop = max(1, round(sample_rate * hop_ms / 1000))
        self.n_fft = 2 << (self.length - 1).bit_length()  # at least twice the window, so that low filters have a bin
        self.register_buffer("window", torch.hann_window(self.length), persistent=False)
        self.register_buffer("filters", _mel_filters(self.n_fft, sample_rate, n_mels), persistent=False)

    def power(self, waveform: Tensor) -> Tensor:
        """Mel power, (N, S) -> (N, T, M); equals torchaudio's MelSpectrogram with constant padding."""
        spectrum = torch.stft(
            waveform.float(),
            self.n_fft,
            self.hop,
            self.length,
            self.window.float(),
            center=True,
            pad_mode="constant",
            return_complex=True,
        )
        energy = spectrum.real.square() + spectrum.imag.square()  # abs() would take a root to square it again
        return torch.matmul(energy.transpose(1, 2), self.filters.float())

    def forward(self, waveform: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        lengths = mask.sum(1)
        with torch.autocast(waveform.device.type, enabled=False):  # 16-bit spectra lose quiet sounds
            power = self.power(waveform * mask)
            # The same up to a constant, which standardising takes away: 0 in silence, where others' sums round -13.8.
            frames = (power / _FLOOR + 1 if torch.compiler.is_exporting() else power + _FLOOR).log()
            positions = torch.arange(frames.shape[1], device=mask.device)
            real = positions[None] < (1 + lengths // self.hop)[:, None]
            return _standardize(frames, real), real


def _mel_filters(n_fft: int, sample_rate: int, n_mels: int) -> Tensor:
    filters: Tensor
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchaudio warns where we raise
        filters = torchaudio.functional.melscale_fbanks(n_fft // 2 + 1, 0.0, sample_rate / 2, n_mels, sample_rate)
    if bool((filters.sum(0) == 0).any()):
        raise UsageError(
            f"{n_mels} mel bands at {sample_rate} Hz leave some band without a frequency",
            "lower n_mels or raise window_ms",
        )
    return filters


def _standardize(frames: Tensor, mask: Tensor) -> Tensor:
    """Zero mean and unit variance over the real frames and all bands of each clip; padded frames become zero."""
    weights = mask.unsqueeze(-1).to(frames.dtype)
    count = weights.sum((1, 2), keepdim=True).clamp(min=1) * frames.shape[2]
    centred = (frames - (frames * weights).sum((1, 2), keepdim=True) / count) * weights
    variance = centred.square().sum((1, 2), keepdim=True) / count
    return centred / torch.sqrt(variance + 1e-5)


def spec_augment(frames: Tensor, mask: Tensor, bands: int, time: float, count: int = 2) -> Tensor:
    """Zero `count` random spans of up to `bands` mel bands and of up to `time` of the frames: (N, T, M) -> (N, T, M).

    SpecAugment without warping, Park et al. 2019 (arXiv:1904.08779); zero is the mean of a normalised clip.
    """
    n, t, m = frames.shape
    shape = (n, count)
    width = (torch.rand(shape, device=frames.device) * (min(bands, m) + 1)).floor()
    keep = ~_spans(width, torch.full(shape, m, device=frames.device), m)[:, None, :]
    lengths = mask.sum(1, keepdim=True).expand(shape)
    width = (torch.rand(shape, device=frames.device) * (lengths * time)).floor()
    keep = keep & ~_spans(width, lengths, t)[:, :, None]
    return frames * keep.to(frames.dtype)


def _spans(width: Tensor, length: Tensor, size: int) -> Tensor:
    """Place spans of (N, K) `width` at random inside (N, K) `length`; True inside any of them, (N, size)."""
    start = (torch.rand(width.shape, device=width.device) * (length - width + 1)).floor()
    at = torch.arange(size, device=width.device)
    return ((at >= start[..., None]) & (at < (start + width)[..., None])).any(1)
