"""Reads the pickles in .pth files as the lists they are: nothing that they name is called.

torch.load(weights_only=True) calls what a file names, if only from a list of its own: a few bytes
make it allocate bytearray(2**40) or torch.FloatTensor(2**33), and the list differs from version to
version. Here tensors become descriptions, whose numbers are checked before anything is allocated.
"""

import io
import pickletools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import FunctionType

import torch

from .error import CheckpointError, damaged, shown

# A training file of a 14B model with its optimizer has 2e5 opcodes; each may cost 100 bytes.
MOST_OPCODES = 2**19
LARGEST_KEY = 2**31  # of dicts with numbers as keys; larger ones can be made to collide


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of `numel` elements, `start` elements into what the file has under `key`."""

    dtype: torch.dtype
    key: str
    numel: int
    start: int = 0


@dataclass(frozen=True, slots=True)
class ListedTensor:
    """A dense tensor as a pickle describes it, in elements, unchecked."""

    storage: Storage
    offset: int
    shape: tuple
    stride: tuple
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Other:
    """Something that torch.save may write beside dense tensors; only what it is, is kept."""

    what: str


class Unpickler:
    """Reads one pickle of protocol 2 after the other from a file in memory.

    Attributes:
        storages: every storage that a pickle mentioned, by its key.
    """

    def __init__(self, file: io.BytesIO):
        self.file = file
        self.storages: dict[str, Storage] = {}

    def load(self) -> object:
        """The next pickle's value: dict, list, tuple, str, numbers, ListedTensor and Other.

        Raises:
            CheckpointError: damaged, too long, or it names what torch.save of tensors does not.
        """
        self.stack, self.outer, self.memo = [], [], {}
        for count, (opcode, arg, _) in enumerate(_opcodes(self.file)):
            if count == MOST_OPCODES:
                raise CheckpointError(
                    f"lists more than a model has ({MOST_OPCODES} pickle opcodes): save the "
                    "model's state dict alone"
                )
            self._step(opcode.name, arg)
        return self._pop(1)[0]

    def _step(self, opcode: str, arg: object) -> None:
        match opcode:
            case "BINGET" | "LONG_BINGET":
                if arg not in self.memo:
                    raise damaged(f"pickle memo {arg} is not set")
                self._push(self.memo[arg])
            case "BINPUT" | "LONG_BINPUT":
                self.memo[arg] = self._top()
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                self._push(arg)
            case "BINUNICODE" | "SHORT_BINSTRING":
                self._push(arg)
            case "NONE":
                self._push(None)
            case "NEWTRUE" | "NEWFALSE":
                self._push(opcode == "NEWTRUE")
            case "EMPTY_DICT":
                self._push({})
            case "EMPTY_LIST":
                self._push([])
            case "EMPTY_TUPLE":
                self._push(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self._push(tuple(self._pop(int(opcode[-1]))))
            case "TUPLE":
                self._push(tuple(self._pop_to_mark()))
            case "MARK":
                self.outer.append(self.stack)
                self.stack = []
            case "SETITEM" | "SETITEMS":
                self._set(self._pop(2) if opcode == "SETITEM" else self._pop_to_mark())
            case "APPEND" | "APPENDS":
                self._extend(self._pop(1) if opcode == "APPEND" else self._pop_to_mark())
            case "GLOBAL":
                self._push(_named(arg))
            case "REDUCE" | "NEWOBJ":
                self._push(_called(*self._pop(2)))
            case "BINPERSID":
                self._push(self._storage(*self._pop(1)))
            case "BUILD":  # attributes of what is on top, such as a state dict's _metadata
                self._pop(1)
            case "PROTO" | "STOP":
                pass
            case _:
                raise CheckpointError(
                    f"is a pickle that torch.save does not write (opcode {opcode}): save the state "
                    "dict with torch.save"
                )

    def _push(self, value: object) -> None:
        self.stack.append(value)

    def _pop(self, count: int) -> list:
        if len(self.stack) < count:
            raise damaged("a pickle without the values it works on")
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def _top(self) -> object:
        if not self.stack:
            raise damaged("a pickle without the values it works on")
        return self.stack[-1]

    def _pop_to_mark(self) -> list:
        if not self.outer:
            raise damaged("a pickle without the mark it goes back to")
        values, self.stack = self.stack, self.outer.pop()
        return values

    def _set(self, items: list) -> None:
        target = self._top()
        if not isinstance(target, dict) or len(items) % 2:
            raise damaged("a pickle that sets no pairs in a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str) and not (isinstance(key, int) and abs(key) < LARGEST_KEY):
                raise CheckpointError(
                    f"does not hold named tensors only, got a {type(key).__name__} as a name: save "
                    "the model's state dict alone"
                )
            target[key] = value

    def _extend(self, items: list) -> None:
        target = self._top()
        if not isinstance(target, list):
            raise damaged("a pickle that appends to no list")
        target.extend(items)

    def _storage(self, identity: object) -> Storage:
        """What torch.save puts in a storage's place; the old format adds a view of it."""
        match identity:
            case ("storage", torch.dtype() as dtype, str() as key, _, int() as numel):
                storage = Storage(dtype, key, numel)
            case ("storage", torch.dtype() as dtype, str() as key, _, int() as numel, None):
                storage = Storage(dtype, key, numel)
            case ("storage", torch.dtype() as dtype, str() as key, _, int() as whole, view):
                self.storages.setdefault(key, Storage(dtype, key, whole))
                return _view(dtype, key, whole, view)
            case _:
                raise damaged("a pickle with something else than storages outside of it")
        return self.storages.setdefault(key, storage)


def _view(dtype: torch.dtype, key: str, whole: int, view: object) -> Storage:
    match view:
        case (_, int() as start, int() as numel) if 0 <= start <= start + numel <= whole:
            return Storage(dtype, key, numel, start)
    raise damaged(f"a view that is not inside its storage {shown(key, 40)}")


def _opcodes(file: io.BytesIO) -> Iterator[tuple]:
    try:
        yield from pickletools.genops(file)
    except ValueError as error:  # what it raises on bytes that are no pickle
        raise damaged(error) from error


def _named(name: str) -> object:
    """What stands for a global of this name, "module name", until it is called."""
    name = name.replace(" ", ".", 1)
    if name not in GLOBALS:
        raise CheckpointError(
            f"contains code or Python objects ({shown(name)}), which were not run. Only tensors "
            "are loaded: take the file from its official source, or save its state dict alone"
        )
    return GLOBALS[name]


def _called(function: object, args: object) -> object:
    if isinstance(function, Other):
        return function
    if not isinstance(function, FunctionType) or not isinstance(args, tuple):
        raise damaged("a pickle that calls what is no function")
    return function(args)


# What stands for the functions that torch.save names; each takes the arguments as one tuple.


def _dict(args: tuple) -> object:
    return Other("a collections.OrderedDict with values") if args else {}


def _tensor(args: tuple) -> object:
    """torch._utils._rebuild_tensor_v2: storage, offset, size, stride, requires_grad, hooks,
    metadata; the first version had the first four."""
    match args:
        case (Storage() as storage, int() as offset, tuple() as shape, tuple() as stride, *rest):
            if rest[2:] and rest[2]:
                return Other("a negated or conjugated view")
            return ListedTensor(storage, offset, shape, stride, storage.dtype)
    raise damaged("a tensor without its storage, offset, size and stride")


def _tensor_of_dtype(args: tuple) -> object:
    """torch._utils._rebuild_tensor_v3: as _v2, with the dtype before the metadata."""
    if len(args) < 7 or not isinstance(args[6], torch.dtype):
        raise damaged("a tensor without its dtype")
    tensor = _tensor((*args[:6], *args[7:]))
    return replace(tensor, dtype=args[6]) if isinstance(tensor, ListedTensor) else tensor


def _parameter(args: tuple) -> object:
    """torch._utils._rebuild_parameter(data, requires_grad, hooks), with attributes behind them."""
    if args and isinstance(args[0], ListedTensor | Other):
        return args[0]
    raise damaged("a parameter without its tensor")


def _tensor_with_attributes(args: tuple) -> object:
    """torch._tensor._rebuild_from_type_v2(function, type, args, attributes)."""
    match args:
        case (Other() as another, *_):
            return another
        case (function, Other() as kind, tuple() as inner, _):
            plain = kind in PLAIN_TENSORS and function in (_tensor, _tensor_of_dtype)
            return function(inner) if plain else kind  # nothing that calls further
    raise damaged("a tensor of a type that is none")


PLAIN_TENSORS = (Other("a torch.Tensor"), Other("a torch.nn.parameter.Parameter"))

DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
    "UntypedStorage": torch.uint8,
}
OTHER_TENSORS = {
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_meta_tensor_no_storage": "a meta tensor, which has no values",
    "_rebuild_qtensor": "a quantized tensor",
    "_rebuild_wrapper_subclass": "a tensor subclass",
    "_rebuild_device_tensor_from_numpy": "a tensor of another device",
    "_rebuild_device_tensor_from_cpu_tensor": "a tensor of another device",
}
OTHERS = (
    "builtins.bytearray",
    "builtins.complex",
    "builtins.set",
    "collections.Counter",
    "torch.Size",
    "torch.Tensor",
    "torch.device",
    "torch.nn.parameter.Parameter",
    "torch.per_channel_affine",
    "torch.per_channel_affine_float_qparams",
    "torch.per_tensor_affine",
    "torch.serialization._get_layout",
)
GLOBALS = {
    "collections.OrderedDict": _dict,
    "torch._tensor._rebuild_from_type_v2": _tensor_with_attributes,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "_codecs.encode": Other("a bytes"),
    **{f"torch._utils.{name}": Other(what) for name, what in OTHER_TENSORS.items()},
    **{name: Other(f"a {name}") for name in OTHERS},
    # Protocol 2 has Python 2's name for the builtins.
    **{n.replace("builtins", "__builtin__"): Other(f"a {n}") for n in OTHERS if "builtins" in n},
    **{f"{m}.{n}": d for m in ("torch", "torch.storage") for n, d in STORAGES.items()},
    **{f"torch.cuda.{name}": dtype for name, dtype in STORAGES.items()},
    **DTYPES,
}
