"""What a computation is, in words that another process finds again: for fingerprints, and for stores of retrainings.

Numbers count by a digest, settings by their values, what comes from installed packages by its name. Of all other
functions and classes the code itself counts, with its defaults, what it closes over and the globals that it reads: in a
notebook a function is edited and keeps its name. Addresses, line numbers and the hooks of a module do not count.
"""

import copyreg
import dis
import hashlib
import sys
import sysconfig
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

import numpy as np
import torch
from torch import Tensor, nn

PLAIN = type(None), type(...), bool, int, float, complex, str, bytes, torch.dtype, np.generic
HOMES = sysconfig.get_path("stdlib"), str(Path(__file__).parent)
HOUSEKEEPING = set(vars(nn.Module()))  # of every module: its mode and hooks, and the dicts of what is inside it


def digest(*values) -> str:
    """A name for the numbers in tensors or arrays, and for texts."""
    found = hashlib.sha256()
    for value in values:
        value = np.frombuffer(value.encode(), np.uint8) if isinstance(value, str) else value
        found.update(f"{tuple(value.shape)} {value.dtype}".encode())
        if isinstance(value, Tensor):  # as bytes: numpy has no bfloat16
            value = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        found.update(np.ascontiguousarray(value).data)
    return found.hexdigest()[:16]


def described(value, seen: dict | None = None) -> str:
    """A loss, a measure, a model or a retrainer in words that tell it from others.

    Another version of Python compiles the same code to other words.

    Args:
        seen: what was met on the way here, as id -> (how many were met before, the object).

    Raises:
        ValueError: it holds something that no other process can know, such as a lock or an open file.
    """
    seen = {} if seen is None else seen
    words = partial(described, seen=seen)
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, Tensor) or (isinstance(value, np.ndarray) and not value.dtype.hasobject):
        return digest(value)
    if type(value) in (list, tuple):
        return f"[{', '.join(map(words, value))}]"
    if type(value) in (set, frozenset):
        return f"{{{', '.join(sorted(map(words, value)))}}}"
    if type(value) is dict:
        return f"{{{', '.join(f'{words(key)}: {words(item)}' for key, item in value.items())}}}"
    if isinstance(value, partial):
        named = [f"{name}={words(item)}" for name, item in sorted(value.keywords.items()) if name != "progress"]
        return f"{words(value.func)}({', '.join([*map(words, value.args), *named])})"
    if isinstance(value, CodeType):
        return words([value.co_code, value.co_names, value.co_consts])
    if isinstance(value, ModuleType):
        return value.__name__ if installed(value.__name__) else digest(repr(Path(value.__file__).read_bytes()))
    value = getattr(value, "_orig_mod", getattr(value, "_torchdynamo_orig_callable", value))  # what was compiled
    home, name = getattr(value, "__module__", None), getattr(value, "__qualname__", getattr(value, "__name__", None))
    owner = getattr(value, "__self__", None)  # of a bound method: its instance counts
    if name and installed(home) and isinstance(owner, (type(None), type, ModuleType)):
        return f"{home}.{name}"
    if id(value) in seen:
        return f"again {seen[id(value)][0]}"
    seen[id(value)] = len(seen), value
    if isinstance(value, nn.Module):
        return f"{type(value).__name__}:{digest(words(parts_of_model(value, seen)))}"
    if isinstance(value, (FunctionType, type)):
        return f"{home}.{name}:{digest(words(parts_of_code(value, seen)))}"
    return words(parts_of_instance(value))


def parts_of_code(value, seen: dict) -> list:
    """What a function or a class is made of."""
    if isinstance(value, FunctionType):
        known, code = value.__globals__, value.__code__
        read = {name: known[name] for name in sorted(globals_of(code)) if name in known}
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return [code, value.__defaults__, value.__kwdefaults__, cells, read]
    own = {name: getattr(item, "__func__", getattr(item, "fget", item)) for name, item in vars(value).items()}
    return [value.__bases__, {name: told(item, seen) for name, item in sorted(own.items())
                              if isinstance(item, FunctionType) or name[:2] != "__"}]


def parts_of_model(model: nn.Module, seen: dict) -> list:
    """What a module is made of; its attributes without tensors, which may be what it computed last."""
    settings = {name: told(item, seen) for name, item in sorted(vars(model).items())
                if name not in HOUSEKEEPING and item is not None and not isinstance(item, Tensor)}
    return [told(type(model), seen), settings, *map(dict, (model._parameters, model._buffers, model._modules))]


def parts_of_instance(value) -> list:
    """What an object is made of, as pickle would have it: what makes it, from what, and its state."""
    try:
        parts = value.__reduce_ex__(2)
        if isinstance(parts, str):
            raise TypeError("it is known by its name only")
    except Exception as error:
        raise ValueError("expected a loss, measure or retrainer of functions, classes and values, by which another "
                         f"process can know it, got one that holds a {type(value).__name__} ({error}): make that "
                         "inside the function") from error
    parts = [list(part) if hasattr(part, "__next__") else part for part in parts if part is not None]
    return parts[1:] if parts[0] is copyreg.__newobj__ else parts


def told(value, seen: dict) -> str:
    """`described`; for the attributes of classes and models, of which some cannot be: these by their type alone."""
    try:
        return described(value, seen)
    except (ValueError, RecursionError):
        return getattr(value, "__qualname__", type(value).__qualname__)


def installed(module: str | None) -> bool:
    """Whether a module, by its name, is Python's, of an installed package or of this library."""
    if module not in sys.modules or module == "__main__":
        return False
    file = getattr(sys.modules[module], "__file__", None)
    return not file or file.startswith(HOMES) or not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)


def globals_of(code: CodeType) -> set:
    """The names of the globals that code reads, and the functions inside it."""
    own = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return own.union(*(globals_of(inner) for inner in code.co_consts if isinstance(inner, CodeType)))
