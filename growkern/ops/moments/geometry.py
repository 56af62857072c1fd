"""Where the kernel of a convolution reads."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, init=False)
class ConvGeometry:
    """Kernel size, stride, padding and dilation of a 2-d convolution over zero-padded maps.

    At output position l, kernel tap t reads input position ``stride·l + dilation·t − padding``, separately
    for rows and columns. `padding` counts the zeros before the first row and column. After the last there are
    as many, or one more, which the sizes of the maps tell: ``padding="same"`` puts the odd zero of an even
    kernel there.

    Parameters
    ----------
    kernel_size, stride, padding, dilation : int or pair of int
        For rows and columns, as in `torch.nn.Conv2d`; kept as pairs.

    Raises
    ------
    TypeError
        If one of them is neither an int nor a pair of ints.
    ValueError
        If a kernel size, stride or dilation is below 1 or a padding below 0.
    """

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def __init__(
        self,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
    ) -> None:
        given = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
        for name, value in given.items():
            object.__setattr__(self, name, _pair(name, value, least=0 if name == "padding" else 1))

    @classmethod
    def unpack(cls, flat: Sequence[int]) -> "ConvGeometry":
        """Rebuild a geometry from the eight numbers of `pack`.

        Parameters
        ----------
        flat : sequence of int
            Eight numbers.

        Returns
        -------
        ConvGeometry
            The geometry.
        """
        return _unpacked(tuple(flat))

    def pack(self) -> list[int]:
        """Write the geometry as the ``int[]`` of an op's schema.

        Returns
        -------
        list of int
            kernel size, stride, padding and dilation, each for rows, then columns.
        """
        return [*self.kernel_size, *self.stride, *self.padding, *self.dilation]

    @property
    def taps(self) -> int:
        """Number of positions that the kernel reads at once."""
        return self.kernel_size[0] * self.kernel_size[1]

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Size of the output map where as many zeros follow as go before.

        Parameters
        ----------
        height, width : int
            Size of the input map.

        Returns
        -------
        tuple of int
            Rows and columns of the output map; below 1 where the kernel does not fit.
        """
        return self.output_length(0, height), self.output_length(1, width)

    def output_length(self, axis: int, length: int, extra: int = 0) -> int:
        """Size of the output along one axis.

        Parameters
        ----------
        axis : int
            0 for rows, 1 for columns.
        length : int
            Size of the input along this axis.
        extra : int
            How many more zeros follow than go before.

        Returns
        -------
        int
            Number of output positions; below 1 where the kernel does not fit.
        """
        return (length + 2 * self.padding[axis] + extra - self.span(axis)) // self.stride[axis] + 1

    def span(self, axis: int) -> int:
        """Distance from the first to the last position read at once, both included.

        Parameters
        ----------
        axis : int
            0 for rows, 1 for columns.

        Returns
        -------
        int
            ``dilation·(kernel − 1) + 1``.
        """
        return self.dilation[axis] * (self.kernel_size[axis] - 1) + 1


@functools.lru_cache(maxsize=1024)
def _unpacked(flat: tuple[int, ...]) -> ConvGeometry:
    return ConvGeometry(flat[0:2], flat[2:4], flat[4:6], flat[6:8])


def _pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else value
    if not isinstance(pair, Sequence) or len(pair) != 2 or not all(isinstance(number, int) for number in pair):
        raise TypeError(f"{name}: expected an int or a pair of ints, got {value!r}")
    if min(pair) < least:
        raise ValueError(f"{name}: expected at least {least}, got {value!r}")
    return (pair[0], pair[1])
