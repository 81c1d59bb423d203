"""The patches of a picture, as features."""

import numpy as np

from kerasfactory._arguments import positive_integer


def patches(height: int, width: int, size: int | tuple[int, int]) -> np.ndarray:
    """Numbers the patches of a picture: makes a `feature_mask` for `faithfulness` and `audit`.

    Patches are numbered row by row, from the top left, as in vision transformers. A mask may lack the last axes of a
    sample, so that it fits pictures (sample, height, width, channel) as it is: all channels of a pixel belong to one
    patch. For pictures with the channels first it is `np.broadcast_to(mask, (channels, height, width))`.

    Args:
        height: The height of a picture, in pixels.
        width: The width of a picture, in pixels.
        size: The size of a patch, in pixels: one number, or (rows, columns). It must divide the picture.

    Returns:
        np.ndarray: Integers (height, width), from 0.

    Raises:
        ValueError: If an argument is not a positive integer, or patches of this size do not fill the picture.

    Example:
        ```python
        from kerasfactory import explain

        print(explain.patches(2, 6, (1, 3)).tolist())
        #> [[0, 0, 0, 1, 1, 1], [2, 2, 2, 3, 3, 3]]
        ```
    """
    picture = np.array([positive_integer("height", height), positive_integer("width", width)])
    sizes = tuple(size) if isinstance(size, tuple | list | np.ndarray) and np.ndim(size) else (size, size)
    if len(sizes) != 2:
        raise ValueError(f"`size` must be one number, or (rows, columns). Received: size={size!r}")
    patch = np.array([positive_integer("size", part) for part in sizes])
    if (picture % patch).any():
        divisors = [[part for part in range(1, whole + 1) if whole % part == 0] for whole in picture]
        raise ValueError(
            f"Patches of {patch[0]} x {patch[1]} pixels do not fill a picture of {height} x {width}. The size must "
            f"divide the height, as {divisors[0]} do, and the width, as {divisors[1]} do. For other patches make the "
            f"mask yourself: integers (height, width), -1 for pixels in no patch. Received: size={size!r}"
        )
    rows, columns = (np.arange(whole) // part for whole, part in zip(picture, patch, strict=True))
    return rows[:, np.newaxis] * (width // int(patch[1])) + columns
