"""The one place that reads and writes tensor files: atomic writes, loading without running code."""

import contextlib
import errno
import hashlib
import os
import pickle
import re
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import nn

from utils.errors import UserError, first_line
from utils.memory import is_out_of_memory

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# Old `res_*.pt` files keep accuracies as NumPy scalars; these only rebuild a number.
_SAFE_GLOBALS = [
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
    np._core.multiarray.scalar,
    np.dtype,
    *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdFD"},
]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A file or folder itself, to lock or sync it, or an OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


@contextlib.contextmanager
def in_use(path: Path) -> Iterator[None]:
    """Mark a temporary file or folder as in use for the block, or until this process dies."""
    with contextlib.ExitStack() as stack:
        if fcntl is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(stack.enter_context(_opened(path)), fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield


def is_left_over(path: Path) -> bool:
    """Whether the process that made a temporary file or folder was killed.

    Never where the file system has no advisory locks.
    """
    if fcntl is not None:
        with contextlib.suppress(OSError), _opened(path) as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    return False


@contextlib.contextmanager
def atomic_path(path: Path | str, then: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the final name only if the block succeeds.

    `then` is called once all is on the disk, before the file takes its name.
    Temporary files of killed processes are removed. A UserError says that the folder cannot be
    written or the disk is full; `path` is then untouched.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_overs(path)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        with in_use(temporary):
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)  # mkstemp makes private files
            then()
            temporary.replace(path)
            with contextlib.suppress(OSError), _opened(path.parent) as folder:
                os.fsync(folder)  # the name outlasts a power cut, where the system can do that
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _remove_left_overs(path: Path) -> None:
    """Remove temporary files of `path`, and theirs, whose process was killed."""
    pattern = re.compile(rf"\.?\.{re.escape(path.name)}(\.[a-z0-9_]{{8}}){{1,2}}")
    for name in os.listdir(path.parent):
        if pattern.fullmatch(name) and is_left_over(path.parent / name):
            (path.parent / name).unlink(missing_ok=True)


@contextlib.contextmanager
def torch_writing() -> Iterator[None]:
    """An OSError where torch cannot write a file: it raises a RuntimeError about its archive then."""
    try:
        yield
    except RuntimeError as error:
        found = error.__context__
        raise found if isinstance(found, OSError) else OSError(first_line(error)) from None


def write_atomic(
    path: Path | str, write: Callable[[BinaryIO], None], then: Callable[[], None] = lambda: None
) -> None:
    """Write a file through `write(file)`, whole or not at all; `then` and errors as for `atomic_path`."""
    with atomic_path(path, then) as temporary, temporary.open("wb") as file, torch_writing():
        write(file)


def write_text(path: Path | str, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all; bytes of file names that are not UTF-8 are escaped."""
    write_atomic(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def save(obj: Any, path: Path | str, then: Callable[[], None] = lambda: None) -> None:
    """`torch.save` to `path`, whole or not at all; `then` as for `atomic_path`."""
    write_atomic(path, lambda file: torch.save(obj, file), then)


def load(path: Path | str, *, what: str = "file", mmap: bool = False) -> Any:
    """Read a file written by `torch.save` onto the CPU without executing code from it.

    Messages call it `what` ("target checkpoint"). `mmap` maps the storage instead of reading it.

    Raises:
        UserError: missing, damaged, not a torch file, too large for the memory, with a global that
            is not allowed, or with tensors that are not plain values.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{what} {path} does not exist")
    if not path.is_file():  # reading a pipe or a device would wait forever
        raise UserError(f"{what} {path} is a {'folder' if path.is_dir() else 'device'}; expected a file")
    if not mmap:
        check_sums(path, what=what)
    try:
        with torch.serialization.safe_globals(_SAFE_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about tensors of kinds that are refused below
            mapped = mmap and _is_zip(path)  # the older torch format cannot be mapped
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)|but got <class '([\w.]+)'", str(error))
        why = "is not a torch file"
        if refused:
            name = refused[1] or refused[2]
            why = f"is refused: loading it would run {name}; expected tensors and plain containers only"
        raise UserError(f"{what} {path} {why}") from None
    except Exception as error:  # the readers below torch.load raise a dozen types on a torn file
        # EINVAL is one of them: a torn file makes a reader seek to an impossible place.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise UserError(f"{what} {path} cannot be read: {os.strerror(error.errno).lower()}") from None
        raise _damaged(f"{what} {path}", "is truncated or not a torch file", error) from None
    if kind := next(filter(None, map(_oddity, tensors_in(value))), None):
        raise UserError(f"{what} {path} holds a {kind} tensor; expected tensors with plain values")
    return value


def _oddity(tensor: torch.Tensor) -> str | None:
    """What keeps a tensor from being plain values, if anything."""
    kinds = {"nested": tensor.is_nested, "quantized": tensor.is_quantized, "meta": tensor.is_meta}
    kinds["sparse"] = tensor.layout != torch.strided
    return next((kind for kind, found in kinds.items() if found), None)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)


def _damaged(file: str, verdict: str, error: Exception) -> UserError:
    if is_out_of_memory(error):
        wanted = re.search(r"(tried to allocate|unable to mmap) (\d+) bytes", str(error))
        shown = f" ({wanted[2]} bytes were asked for)" if wanted else ""
        return UserError(f"{file} does not fit into the memory{shown}, or is damaged")
    return UserError(f"{file} {verdict} ({first_line(error).split('. ')[0]})")


def _is_zip(path: Path | str) -> bool:
    """Whether a file is in PyTorch's zip format, damaged or not, rather than in the older one."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # its end says more than one archive can hold
        return True


def check_sums(path: Path | str, *, what: str = "file") -> None:
    """Raise a UserError if checksums in a torch file are wrong, which torch itself never reads.

    A file of another kind passes.
    """
    if not _is_zip(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [entry for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
            if packed:  # torch never compresses, and a small file could unpack to any size
                raise zipfile.BadZipFile(f"{packed[0].filename} is compressed")
            torn = archive.testzip()
    except Exception as error:  # zipfile raises half a dozen types on a damaged header
        raise _damaged(f"{what} {path}", "is damaged", error) from None
    if torn is not None:
        raise UserError(f"{what} {path} is damaged: the checksum of {torn} is wrong")


def check_files(folder: Path) -> None:
    """Raise a UserError for pipes and devices below a folder that another library is going to read."""
    for place, _, names in os.walk(folder):
        for path in (Path(place, name) for name in names):
            if path.exists() and not path.is_file():  # reading it would wait forever
                raise UserError(f"{path} is not a regular file")


def load_tensor(path: Path | str, *, what: str = "tensor file", mmap: bool = False) -> torch.Tensor:
    """Like `load`, and the content must be one dense tensor."""
    value = load(path, what=what, mmap=mmap)
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        raise UserError(f"{what} {path} holds a {type(value).__name__}; expected one dense tensor")
    return value


def load_state(path: Path | str, *, what: str = "checkpoint") -> dict[str, torch.Tensor]:
    """Like `load`, and the content must be a plain state dict (name -> tensor)."""
    state = load(path, what=what)
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()
    ):
        raise UserError(f"{what} {path} is not a state dict; expected names mapped to tensors")
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{what} {path} holds NaN or infinity in {name}; expected finite weights")
    return dict(state)


def apply_state(
    model: nn.Module, state: dict[str, torch.Tensor], *, origin: Path | str, skip: tuple[str, ...] = ()
) -> None:
    """Load `state` into `model`; keys under the prefixes in `skip` (the head) are left alone.

    A model that has `renamed(state)` brings the names of published variants to its own first. A
    UserError names all keys that are missing, unexpected or of another shape or kind of number.
    """
    state = getattr(model, "renamed", dict)(state)
    own = {k: v for k, v in model.state_dict().items() if not k.startswith(skip)}
    given = {k: v for k, v in state.items() if not k.startswith(skip)}
    problems = [f"missing {k}" for k in own.keys() - given.keys()]
    problems += [f"unexpected {k}" for k in given.keys() - own.keys()]
    for k in own.keys() & given.keys():
        new, old = given[k], own[k]
        if new.shape != old.shape:
            problems.append(f"{k} is {tuple(new.shape)}, expected {tuple(old.shape)}")
        if (new.is_floating_point(), new.is_complex()) != (old.is_floating_point(), old.is_complex()):
            problems.append(f"{k} is {new.dtype}, expected {old.dtype}")
    if problems:
        shown = "; ".join(sorted(problems)[:8])
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError(f"{origin} does not fit the network {type(model).__name__}: {shown}{more}")
    model.load_state_dict(given, strict=False)  # only keys under `skip` can be missing now


def fingerprint(*tensors: torch.Tensor) -> str:
    """A short SHA-256 digest of values, shapes and dtypes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(as_bytes(tensor))
    return digest.hexdigest()[:16]


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    """The values of a tensor as uint8."""
    # With a last axis of its own: the stride of a single value can be anything.
    return tensor.detach().cpu().contiguous()[..., None].view(torch.uint8).flatten().numpy()


def state_fingerprint(state: Mapping[str, torch.Tensor]) -> str:
    """`fingerprint` of the tensors of a state dict, by name: which weights a result belongs to."""
    return fingerprint(*(state[key] for key in sorted(state)))


def files_fingerprint(paths: Iterable[Path]) -> str:
    """A digest of the contents of torch files, by the checksums that they hold: they may be large.

    Files in PyTorch's older format hold none and are read.
    """
    digest = hashlib.sha256()
    for path in paths:
        if not _is_zip(path):
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            continue
        try:
            with zipfile.ZipFile(path) as archive:
                entries = [(e.filename.partition("/")[2], e.file_size, e.CRC) for e in archive.infolist()]
        except Exception as error:  # zipfile raises half a dozen types on a damaged header
            raise _damaged(f"file {path}", "is damaged", error) from None
        digest.update(repr(entries).encode())
    return digest.hexdigest()[:16]
