"""Files of tensors that nobody vouches for: saved updates and checkpoints."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import pathlib
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitguard.errors import InputError, expected
from vitguard.files import parsed_json, write_atomically

__all__ = [
    "UNNAMED",
    "check_plain",
    "is_saved_update",
    "read_checkpoint",
    "read_update",
    "write_update",
]

FACTS = {
    "kind": str, "batch_size": int, "local_steps": int, "learning_rate": float, "optimizer": str,
    "momentum": float, "weight_decay": float,
}  # fmt: skip
_KINDS = frozenset(
    (
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool,
        torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    )
)  # fmt: skip
_HEADER = "vitguard.update"
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"  # how torch's files begin, now and before 1.6
_LARGEST = 2**53  # whole numbers that are exact everywhere


def check_plain(name: str, tensor: object, where: object) -> None:
    """Refuse what is not a dense tensor of values in memory.

    Raises:
        InputError: It is sparse, quantised, without values (meta), or of a type such as float8.
    """
    if type(tensor) not in (Tensor, nn.Parameter):
        raise expected(f"a plain tensor {name}", f"{type(tensor).__name__} in {where}")
    assert isinstance(tensor, Tensor)
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in _KINDS:
        kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
        do = "Convert it with .to_dense() or .float() first."
        raise expected(
            f"{name} as a dense tensor of 16 to 64 bit numbers", f"{kind} in {where}",
            "Load its values first." if tensor.is_meta else do,
        )  # fmt: skip


def write_update(
    path: str | Path,
    facts: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    payloads: Mapping[str, bytes],
) -> None:
    """Write an update as safetensors, its public facts in the header; atomic, for the owner alone.

    Raises:
        InputError: A tensor is not plain, a name is no text, or the path cannot be written.
    """
    from safetensors.torch import save

    _check_names([*tensors, *payloads, *facts["sealed"], *facts["sealed"].values()], path)
    stored = {}
    for name, tensor in tensors.items():
        held = tensor.detach()
        check_plain(name, held, "the update")
        # copies: autograd hands out gradients that share memory, which the format refuses
        stored[f"tensor:{name}"] = held.cpu().clone(memory_format=torch.contiguous_format)
    for name, blob in payloads.items():
        empty = torch.empty(0, dtype=torch.uint8)
        held = torch.frombuffer(bytearray(blob), dtype=torch.uint8) if blob else empty
        stored[f"payload:{name}"] = held
    try:
        header = json.dumps({**facts, "payloads": list(payloads)}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise expected("public facts that JSON can hold", str(error)) from error
    # one client's gradients show its images
    write_atomically(path, save(stored, metadata={_HEADER: header}), private=True)


def read_update(path: str | Path) -> dict[str, Any]:
    """Return the fields of an update that `write_update` wrote.

    Raises:
        InputError: The file is missing, is no safetensors file, or its facts are not sound.
    """
    from safetensors import safe_open

    if not Path(path).is_file():
        raise expected("a saved update", f"no file at {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = (file.metadata() or {}).get(_HEADER)
            stored = {name: file.get_tensor(name) for name in file.keys()} if header else {}  # noqa: SIM118
    except Exception as error:  # the reader raises whatever it likes on types it does not know
        raise expected("a safetensors update", f"{path} ({error})") from error
    if header is None:
        raise expected(
            "an update with its public facts", f"{path} without them", "Write it with Update.save."
        )  # fmt: skip
    try:
        return _fields(parsed_json(header), stored, path)
    except InputError:
        raise
    except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
        raise expected("public facts of an update", f"{path} ({error})") from error


def is_saved_update(path: Path) -> bool:
    """Whether a file is what `write_update` writes."""
    from safetensors import safe_open

    if not _is_safetensors(path):
        return False
    try:
        with safe_open(str(path), framework="pt") as file:
            return _HEADER in (file.metadata() or {})
    except Exception:  # noqa: BLE001 - the reader raises whatever it likes on what it does not know
        return False


def _fields(facts: dict[str, Any], stored: Mapping[str, Tensor], path: object) -> dict[str, Any]:
    sealed, payloads = dict(facts.pop("sealed")), facts.pop("payloads")
    if facts.keys() != FACTS.keys():
        raise KeyError(f"facts {sorted(facts)}")
    for name, kind in FACTS.items():
        facts[name] = _fact(name, facts[name], kind)
    tensors = {k[7:]: v for k, v in stored.items() if k.startswith("tensor:")}
    blobs = {k[8:]: v for k, v in stored.items() if k.startswith("payload:")}
    _check_names([*tensors, *blobs, *sealed, *sealed.values()], path)
    if sorted(blobs) != sorted(payloads) or len(tensors) + len(blobs) != len(stored):
        raise ValueError("other tensors than its facts name")
    for name, tensor in tensors.items():
        check_plain(name, tensor, path)
    if any(b.dtype != torch.uint8 or b.dim() != 1 for b in blobs.values()):
        raise ValueError("a payload that is no sequence of bytes")
    opened = {k: b.numpy().tobytes() for k, b in blobs.items()}
    return {"tensors": tensors, "sealed": sealed, "payloads": opened, **facts}


def _fact(name: str, value: Any, kind: type) -> Any:
    if name == "learning_rate" and value is None:
        return None
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise TypeError(f"{name} of type {type(value).__name__}")
    if kind is int and not value < _LARGEST:
        raise ValueError(f"{name} beyond {_LARGEST}")
    return float(value) if kind is float else value


def _check_names(names: Iterable[object], where: object) -> None:
    for name in names:
        try:
            name.encode()  # type: ignore[attr-defined]
        except (AttributeError, UnicodeEncodeError) as error:
            raise expected(f"names that are text in {where}", repr(name)[:80]) from error


def read_checkpoint(path: Path, notes: list[str] | None = None) -> Mapping[Any, Any]:
    """Return the state dict in a safetensors file, or in a torch file without running its code.

    A NumPy archive is taken as well; arrays without names are called `UNNAMED` and their number.
    What the file holds counts, not its name. Of averaged and last weights the last are taken.

    Args:
        notes: Told which weights were left out.

    Raises:
        InputError: It holds none, or is compressed: 2 MiB could ask for 2 GiB.
    """
    from safetensors.torch import load

    _refuse_stand_ins(path)
    try:
        if _is_safetensors(path):
            state = load(path.read_bytes())
        else:
            state = _archive(path) or _torch_file(path)
    except InputError:
        raise
    except Exception as error:
        if isinstance(error, KeyError) and _is_safetensors(
            path
        ):  # what that library says of a type
            raise expected(
                "weights in 16 to 64 bit numbers", f"{error.args[0]} in {path}",
                "Convert them with .float() first.",
            ) from error  # fmt: skip
        # not in torch's words: of a pickled model they advise to run the code in the file
        foreign = _foreign_objects(path)
        why = f": it holds {', '.join(foreign[:3])}" if foreign else ""
        raise expected(
            "a state dict, as a safetensors or torch file",
            f"{path}, which is none ({type(error).__name__}{why})",
            _how_to_write(path, foreign),
        ) from error  # fmt: skip
    return _state_dict(state, path, [] if notes is None else notes)


# last weights before averaged ones, and these before the names that libraries give their wrappers
_AVERAGED = (
    "state_dict_ema", "model_ema", "ema", "ema_state_dict", "model_ema_state_dict", "params_ema",
)  # fmt: skip
_PLACES = (
    "state_dict", "model", "model_state_dict", "module", "net", "network", "weights", "params",
    *_AVERAGED,
)  # fmt: skip


def _state_dict(state: Any, path: Path, notes: list[str]) -> Mapping[Any, Any]:
    if not isinstance(state, Mapping):
        raise expected("a state dict", f"{type(state).__name__} in {path}")
    inside = {k: v for k, v in state.items() if isinstance(v, Mapping) and _holds_tensors(v)}
    for key in _PLACES:
        if key in inside:
            if averaged := [k for k in _AVERAGED if k in inside and k != key]:
                notes.append(
                    f"averaged weights, under {averaged[0]} in the file, were left out: those "
                    f"under {key} are taken"
                )
            return _state_dict(inside[key], path, notes)
    if any(isinstance(v, Tensor) and v.dim() for v in state.values()) or not inside:
        return state
    if len(inside) == 1:
        return _state_dict(next(iter(inside.values())), path, notes)
    raise expected(
        f"a state dict under one of {', '.join(_PLACES[:3])}, ...",
        f"several in {path}: {', '.join(map(str, inside))}",
        "Save the one you mean: torch.save(checkpoint[KEY], FILE).",
    )  # fmt: skip


def _holds_tensors(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_tensors(v) for v in value.values())
    return isinstance(value, Tensor)


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins as the format does: the length of a header, then its brace."""
    with path.open("rb") as file:
        start = file.read(9)
    torch_file = start.startswith((_ZIP, _PICKLE))
    return start[8:] == b"{" or (path.suffix.lower() == ".safetensors" and not torch_file)


def _refuse_stand_ins(path: Path) -> None:
    """Say what a file is that often lies where the weights should.

    Raises:
        InputError: It is a pointer of Git LFS, a page of a website, or an index of several files.
    """
    with path.open("rb") as file:
        start = file.read(200)
    if start[8:9] == b"{" and b"\0" in start[:8]:
        return  # safetensors: the length of a header may begin with any byte
    start = start.lstrip()
    if start.startswith(b"version https://git-lfs"):
        raise expected("weights", f"a pointer of Git LFS in {path}", "Fetch them: git lfs pull.")
    if start[:1] == b"<":
        raise expected("weights", f"a web page in {path}", "Download the file itself.")
    if start[:1] == b"{" and path.suffix.lower() == ".json":
        raise expected(
            "weights in one file", f"the text {path}, such as an index of several",
            "Write them as one: torch.save(model.state_dict(), FILE).",
        )  # fmt: skip


def _how_to_write(path: Path, foreign: Iterable[str]) -> str:
    """Return how what a file holds is written so that it can be read."""
    content = path.read_bytes()
    if b"nvflare." in content:  # FOBS, or a pickle of its objects
        return (
            "Of NVFlare's objects: torch.save(dxo.data, FILE), torch.save(fl_model.params, FILE)."
        )
    if b"flwr." in content or content.startswith((b"ArrayRecord ", b"RecordDict ")):
        return "Of Flower's arrays: torch.save(arrays.to_torch_state_dict(), FILE)."
    if content.startswith(b"\x93NUMPY") or any(name.startswith("numpy.") for name in foreign):
        return "Of NumPy arrays by name: numpy.savez(FILE, **arrays)."
    return "Write one with torch.save(model.state_dict(), FILE)."


class _LeftOut:
    """Stands where a torch file has a value of NumPy's own, which is of no use here."""

    def __init__(self, *given: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _left_out(module: str, name: str) -> type:
    return type(name, (_LeftOut,), {"__module__": module, "__qualname__": name})


def _harmless() -> list[Any]:
    """Return classes that training scripts store beside weights: they only hold values.

    A metric that is a number of NumPy is not read, since its type could be one of objects.
    """
    return [
        argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath,
        datetime.datetime, datetime.date, datetime.timedelta, datetime.timezone,
        list, dict, int, float, _plain_dict, *_NUMBERS_OF_NUMPY,
    ]  # fmt: skip


def _plain_dict(*_: object) -> dict[Any, Any]:
    """Return what torch's reader can fill in the place of `collections.defaultdict`."""
    return {}


# the name that a file asks for; older releases of torch look at `__name__`
_plain_dict.__module__ = "collections"
_plain_dict.__qualname__ = _plain_dict.__name__ = "defaultdict"

_NUMBERS_OF_NUMPY = [
    _left_out("numpy._core.multiarray", "scalar"),
    _left_out("numpy.core.multiarray", "scalar"),
    _left_out("numpy", "dtype"),
]


def _foreign_objects(path: Path) -> list[str]:
    """Return the classes in a torch file that are not loaded, as far as torch can tell."""
    found: list[str] = []
    # of a file that is none, torch raises whatever it likes
    with contextlib.suppress(Exception), torch.serialization.safe_globals(_harmless()):
        found = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    return found


UNNAMED = "arr_"
"""What NumPy calls arrays that were given no name, with their number behind it."""


def _archive(path: Path) -> dict[str, Tensor]:
    """Return the arrays of a NumPy archive; none where the file is something else."""
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            return {}
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
        if not names or not all(n.endswith(".npy") for n in names):
            return {}
        with np.load(_stored_members(file, path), allow_pickle=False) as arrays:
            return {name: torch.from_numpy(np.array(arrays[name])) for name in arrays.files}


def _torch_file(path: Path) -> Any:
    with path.open("rb") as file:
        if file.read(4) == _ZIP:
            content = _stored_members(file, path)
        else:  # a pickle, as torch wrote before 1.6
            file.seek(0)
            content = io.BytesIO(file.read())
    with torch.serialization.safe_globals(_harmless()):
        return torch.load(content, map_location="cpu", weights_only=True)


def _stored_members(file: Any, path: Path) -> io.BytesIO:
    """Return the archive written again, so that torch sees the members that were checked here."""
    size = file.seek(0, io.SEEK_END)
    content = io.BytesIO()
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(content, "w") as copy:
        members = archive.infolist()
        stored = all(
            m.compress_type == zipfile.ZIP_STORED and m.compress_size == m.file_size
            for m in members
        )
        if not stored or sum(m.file_size for m in members) > size:
            raise expected(
                "a checkpoint without compression", f"{path}, whose members are compressed",
                "Write one with torch.save(model.state_dict(), FILE), or arrays with numpy.savez.",
            )  # fmt: skip
        for member in members:
            copy.writestr(member.filename, archive.read(member))
    content.seek(0)
    return content
