"""Read a value of the device without waiting for the device."""

import torch
from torch import Tensor


class AsyncFlag:
    """A flag that the device computes and the host reads later, without stopping the device.

    Args:
        flag: A scalar.

    Example:
        >>> AsyncFlag(torch.tensor(1)).read()
        True
    """

    def __init__(self, flag: Tensor) -> None:
        self._flag = flag.to("cpu", non_blocking=flag.is_cuda)
        self._copied = torch.cuda.current_stream(flag.device).record_event() if flag.is_cuda else None

    def read(self) -> bool:
        """Return the flag, waiting for its copy if necessary."""
        if self._copied is not None:
            self._copied.synchronize()
        return bool(self._flag)
