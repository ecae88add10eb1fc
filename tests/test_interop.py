import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastnuggets.interop import from_array, to_cupy, to_numpy

DTYPES = ["?", "i1", "u1", "i2", "i4", "i8", "f2", "f4", "f8", "c8", "c16"]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class DLPackArray:
    """A library of which only the protocol is known; `versioned=False` is one from before DLPack 1.0."""

    def __init__(self, array, versioned=True):
        self.array = array
        self.versioned = versioned

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __dlpack__(self, **options):
        if not self.versioned and "max_version" in options:
            raise TypeError("unexpected keyword argument 'max_version'")
        return self.array.__dlpack__(**options)


class CudaInterfaceArray:
    """`__cuda_array_interface__` alone, as numba's device arrays have it."""

    def __init__(self, *, read_only=False, strides=None, data=0, shape=(3,)):
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": "<f4",
            "data": (data, read_only),
            "strides": strides,
            "version": 3,
        }


WRAPPERS = {
    "numpy": lambda array: array,
    "dlpack": DLPackArray,
    "dlpack-unversioned": lambda array: DLPackArray(array, versioned=False),
}


@pytest.fixture(params=WRAPPERS)
def wrap(request):
    return WRAPPERS[request.param]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (2, 3, 4)])
def test_from_array_shares_memory(wrap, dtype, shape):
    array = np.ones(shape, dtype)
    tensor = from_array(wrap(array))
    assert tensor.shape == shape
    if array.size:
        assert tensor.data_ptr() == array.ctypes.data
    tensor.zero_()
    assert not array.any()


def test_from_array_keeps_strides_and_lifetime(wrap):
    array = np.arange(24.0).reshape(4, 6)
    expected = array[1:, ::2].T.copy()
    tensor = from_array(wrap(array[1:, ::2].T))
    assert tensor.stride() == (2, 6)
    del array
    np.testing.assert_array_equal(to_numpy(tensor), expected)


def test_from_array_refuses_read_only(wrap):
    array = np.arange(6.0)
    array.flags.writeable = False
    # numpy itself refuses where the old protocol has no flag to say it with
    with pytest.raises((ValueError, BufferError), match=r"read-?only"):
        from_array(wrap(array), name="coords")


@pytest.mark.parametrize("make", [WRAPPERS["numpy"], WRAPPERS["dlpack"]])
def test_read_only_error_names_the_argument(make):
    array = np.broadcast_to(np.float32(1), (4, 3))
    with pytest.raises(ValueError, match=r"^coords: expected writable memory, got a read-only array"):
        from_array(make(array), name="coords")


def test_from_array_refuses_negative_strides(wrap):
    with pytest.raises(ValueError, match=r"^coords: expected strides >= 0"):
        from_array(wrap(np.arange(6.0)[::-1]), name="coords")


def test_refused_capsule_frees_the_producer():
    array = np.arange(6.0)
    before = sys.getrefcount(array)
    for _ in range(10):
        with pytest.raises(ValueError, match="strides"):
            from_array(DLPackArray(array[::-1]))
    assert sys.getrefcount(array) == before


@pytest.mark.parametrize("array", [np.zeros(3, "U4"), np.zeros(3, object)])
def test_from_array_names_an_unknown_dtype(array):
    with pytest.raises(TypeError, match=r"^grid: a .* array cannot be shared with torch"):
        from_array(array, name="grid")


@pytest.mark.parametrize("array", [np.zeros(3, ">f8"), np.zeros(3, "u1,f4")["f1"]])
def test_from_array_names_swapped_bytes_and_odd_strides(array):
    with pytest.raises(ValueError, match=r"^grid: a .* array cannot be shared with torch"):
        from_array(array, name="grid")


@pytest.mark.parametrize("thing", [[1.0, 2.0], 3.0, "C1CC1", None])
def test_from_array_refuses_what_is_no_array(thing):
    with pytest.raises(
        TypeError, match=rf"^coords: expected a numpy, cupy or DLPack array, got {type(thing).__name__}"
    ):
        from_array(thing, name="coords")


def test_from_array_returns_a_tensor_as_it_is():
    tensor = torch.ones(2, requires_grad=True)
    assert from_array(tensor) is tensor


def test_cuda_interface_is_checked_before_it_is_read():
    with pytest.raises(ValueError, match=r"^array: expected writable memory"):
        from_array(CudaInterfaceArray(read_only=True))
    with pytest.raises(ValueError, match=r"^array: expected strides >= 0"):
        from_array(CudaInterfaceArray(strides=(-4,)))


@needs_cuda
def test_cuda_interface_shares_memory():
    memory = torch.ones(3, device="cuda")
    array = CudaInterfaceArray(data=memory.data_ptr(), shape=(3,))
    array.keeps_alive = memory
    from_array(array).zero_()
    assert not memory.any()


def test_to_numpy_shares_memory():
    tensor = torch.arange(6).reshape(2, 3).T
    array = to_numpy(tensor)
    array[0, 1] = 100
    assert array.strides == (8, 24)
    assert tensor[0, 1] == 100


@pytest.mark.parametrize(
    ("tensor", "advice"),
    [
        (torch.ones(2, requires_grad=True), r"pass grid\.detach\(\)"),
        (torch.ones(2, 2).to_sparse(), r"pass grid\.to_dense\(\)"),
        (torch.ones(2, dtype=torch.bfloat16), r"pass grid\.float\(\)"),
        (torch.ones(2, device="meta"), r"pass grid\.cpu\(\)"),
    ],
)
def test_to_numpy_says_what_to_pass_instead(tensor, advice):
    with pytest.raises(ValueError, match=f"^grid: expected .*{advice}"):
        to_numpy(tensor, name="grid")


@pytest.mark.parametrize("convert", [to_numpy, to_cupy])
def test_to_other_libraries_takes_tensors_only(convert):
    with pytest.raises(TypeError, match=r"^grid: expected a torch\.Tensor, got ndarray"):
        convert(np.ones(2), name="grid")


def test_to_cupy_refuses_host_memory_without_importing_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # importing it would raise ImportError
    with pytest.raises(ValueError, match=r"^grid: expected a CUDA tensor, got one on cpu; pass grid\.cuda\(\)"):
        to_cupy(torch.ones(2), name="grid")


def test_cupy_is_imported_lazily():
    assert "cupy" not in vars(sys.modules["fastnuggets.interop"])


@needs_cuda
def test_to_cupy_hands_the_tensor_over(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(from_dlpack=torch.from_dlpack))
    tensor = torch.ones(3, device="cuda")
    to_cupy(tensor).zero_()
    assert not tensor.any()


@needs_cuda
def test_cupy_round_trip():
    cupy = pytest.importorskip("cupy")
    array = cupy.ones((2, 3), cupy.float32)
    tensor = from_array(array)
    assert tensor.data_ptr() == array.data.ptr
    assert to_cupy(tensor).data.ptr == array.data.ptr
