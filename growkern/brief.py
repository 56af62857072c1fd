"""What a person sees of objects that hold large tensors."""

from __future__ import annotations

import dataclasses

from torch import Tensor


class Brief:
    """A dataclass whose representation gives tensors by their shapes, and nothing for what is None."""

    def __repr__(self) -> str:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        shown = {k: tuple(v.shape) if isinstance(v, Tensor) else repr(v) for k, v in values.items() if v is not None}
        return f"{type(self).__name__}({', '.join(f'{name}={text}' for name, text in shown.items())})"
