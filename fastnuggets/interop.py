"""Arrays of other libraries as tensors and back, without copying.

Every function shares memory: what is written on one side is seen on the other. Nothing is ever copied silently; where
sharing is impossible the error says which copy to make. Arrays that cannot be written to are refused, because a tensor
has no way to say so and an in-place op would write through it.

A tensor is itself a DLPack array, so other libraries take it directly, for instance `jax.dlpack.from_dlpack(tensor)`.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

if TYPE_CHECKING:
    import cupy

__all__ = ["from_array", "to_cupy", "to_numpy"]


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype_code", ctypes.c_uint8),
        ("dtype_bits", ctypes.c_uint8),
        ("dtype_lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManagedTensorVersioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _DLTensor),
    )


_READ_ONLY = 1
_UNVERSIONED, _VERSIONED = b"dltensor", b"dltensor_versioned"

_capsule_is = ctypes.pythonapi.PyCapsule_IsValid
_capsule_is.restype, _capsule_is.argtypes = ctypes.c_int, (ctypes.py_object, ctypes.c_char_p)
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


class _Checked:
    """Looks into the capsule on its way to `torch.from_dlpack`.

    torch ignores the read-only flag, and a negative stride aborts the process there.
    """

    def __init__(self, array: Any, name: str) -> None:
        self.array = array
        self.name = name

    def __dlpack_device__(self) -> tuple[int, int]:
        device: tuple[int, int] = self.array.__dlpack_device__()
        return device

    def __dlpack__(self, **options: Any) -> Any:
        capsule = self.array.__dlpack__(**options)
        if _capsule_is(capsule, _VERSIONED):
            managed = _DLManagedTensorVersioned.from_address(_capsule_pointer(capsule, _VERSIONED))
            if managed.flags & _READ_ONLY:
                raise _read_only(self.name)
            tensor = managed.tensor
        else:
            tensor = _DLTensor.from_address(_capsule_pointer(capsule, _UNVERSIONED))
        if tensor.strides and any(tensor.strides[i] < 0 for i in range(tensor.ndim)):
            raise _negative_stride(self.name)
        return capsule


def _read_only(name: str) -> ValueError:
    return ValueError(f"{name}: expected writable memory, got a read-only array; pass a copy of it")


def _negative_stride(name: str) -> ValueError:
    return ValueError(f"{name}: expected strides >= 0, got a reversed view; pass a copy of it")


def _from_numpy(array: np.ndarray[Any, Any], name: str) -> torch.Tensor:
    if not array.flags.writeable:
        raise _read_only(name)
    if any(stride < 0 for stride in array.strides):
        raise _negative_stride(name)
    try:
        return torch.from_numpy(array)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: a {array.dtype} array cannot be shared with torch: {error}") from None


def _from_cuda_interface(array: Any, name: str) -> torch.Tensor:
    interface = array.__cuda_array_interface__
    if interface["data"][1]:
        raise _read_only(name)
    if any(stride < 0 for stride in interface.get("strides") or ()):
        raise _negative_stride(name)
    stream = interface.get("stream")
    if stream is not None:
        torch.cuda.ExternalStream(stream).synchronize()
    return torch.as_tensor(array, device="cuda")


def from_array(array: Any, *, name: str = "array") -> torch.Tensor:
    """A tensor on the memory of `array`: numpy, cupy, or anything with `__dlpack__` or `__cuda_array_interface__`.

    Args:
        array: any shape; any dtype that torch has. A tensor is returned as it is.
        name: what error messages call the argument.

    Returns:
        A tensor of the same shape, strides, dtype and device, which keeps the memory alive. Not differentiable.

    Raises:
        ValueError: the memory is read-only, a stride is negative or no whole number of elements, or bytes are swapped.
        TypeError: `array` is no array, or torch has no such dtype.

    Deterministic. Through DLPack the current CUDA stream waits for the producer's, without synchronising the device; a
    `__cuda_array_interface__` that names a stream is waited for on the host. Not for use in a CUDA graph capture.
    Immutable arrays of a library that does not set DLPack's read-only flag cannot be recognised.
    """
    if isinstance(array, torch.Tensor):
        return array
    if isinstance(array, np.ndarray):
        return _from_numpy(array, name)
    if hasattr(array, "__dlpack__"):
        return from_dlpack(_Checked(array, name))
    if hasattr(array, "__cuda_array_interface__"):
        return _from_cuda_interface(array, name)
    raise TypeError(
        f"{name}: expected a numpy, cupy or DLPack array, got {type(array).__name__}; "
        "torch.tensor() copies lists and numbers"
    )


def to_numpy(tensor: torch.Tensor, *, name: str = "tensor") -> np.ndarray[Any, Any]:
    """A numpy array on the memory of `tensor`.

    Args:
        tensor: any shape; on the CPU, strided, not requiring a gradient, of a dtype that numpy has (not bfloat16).
        name: what error messages call the argument.

    Raises:
        TypeError: `tensor` is no tensor.
        ValueError: the memory cannot be shared; the message says what to pass instead.

    Deterministic; never synchronises.
    """
    _check_tensor(tensor, name)
    if tensor.device.type != "cpu":
        raise ValueError(f"{name}: expected a CPU tensor, got one on {tensor.device}; pass {name}.cpu()")
    if tensor.dtype is torch.bfloat16:
        raise ValueError(f"{name}: expected a dtype that numpy has, got bfloat16; pass {name}.float()")
    return tensor.numpy()


def to_cupy(tensor: torch.Tensor, *, name: str = "tensor") -> cupy.ndarray:
    """A cupy array on the memory of `tensor`; cupy is imported here and nowhere else.

    Args:
        tensor: any shape; on a CUDA device, strided, not requiring a gradient, of a dtype that cupy has (not bfloat16).
        name: what error messages call the argument.

    Raises:
        TypeError: `tensor` is no tensor.
        ValueError: the memory cannot be shared; the message says what to pass instead.
        ImportError: cupy is not installed.

    Deterministic. cupy's current stream waits for torch's; the device is not synchronised.
    """
    _check_tensor(tensor, name)
    if tensor.device.type != "cuda":
        raise ValueError(f"{name}: expected a CUDA tensor, got one on {tensor.device}; pass {name}.cuda()")
    if tensor.dtype is torch.bfloat16:
        raise ValueError(f"{name}: expected a dtype that cupy has, got bfloat16; pass {name}.float()")
    import cupy

    return cupy.from_dlpack(tensor)


def _check_tensor(tensor: object, name: str) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided:
        raise ValueError(f"{name}: expected a strided tensor, got {tensor.layout}; pass {name}.to_dense()")
    if tensor.requires_grad:
        raise ValueError(f"{name}: expected a tensor without gradient; pass {name}.detach()")
