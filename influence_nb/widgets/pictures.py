"""Examples as a reader sees them: images as thumbnails of bytes, anything else as text."""

import numpy as np

LARGEST = 64  # pixels a side


def picture_shape(x) -> list:
    """[height, width, channels] of the thumbnails of x, or [] where its examples are no images.

    Images are x [n, height, width] or [n, channels, height, width] with 1 or 3 channels.
    """
    if x.ndim == 3:
        x = x[:, None]
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        return []
    step = -(-max(x.shape[2:]) // LARGEST)
    return [-(-x.shape[2] // step), -(-x.shape[3] // step), x.shape[1]]


def pixel_range(x) -> tuple[float, float]:
    """What is black and what is white: 0..1 or 0..255 where x lies in it, else its least and greatest value."""
    low, high = float(x.min()), float(x.max())
    return (0.0, 1.0 if high <= 1 else 255.0) if 0 <= low and high <= 255 else (low, high)


def thumbnails(x, ids, limits) -> np.ndarray:
    """Thumbnails uint8 [len(ids), height, width, channels] of the images `ids` of x."""
    height, width, channels = picture_shape(x)
    images = x[np.asarray(ids, dtype=np.int64)].detach().cpu().numpy().astype(np.float32)
    images = images.reshape(len(images), channels, *x.shape[-2:])
    step = -(-max(images.shape[2:]) // LARGEST)
    images = images[:, :, ::step, ::step].transpose(0, 2, 3, 1)
    low, high = limits
    return np.clip((images - low) / ((high - low) or 1) * 255 + 0.5, 0, 255).astype(np.uint8)


def texts(split, ids) -> list[str]:
    """What is shown of the examples `ids` besides an image: their text, or a few features of plain rows of numbers."""
    if split.text:
        return [split.text[i] for i in ids]
    if picture_shape(split.x):
        return []
    rows = split.x[np.asarray(ids, dtype=np.int64)].detach().cpu().reshape(len(ids), -1)
    more = ", \u2026" if rows.shape[1] > 8 else ""
    return [", ".join(f"{value:.3g}" for value in row[:8].tolist()) + more for row in rows]
