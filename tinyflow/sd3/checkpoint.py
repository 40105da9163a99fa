"""Reading other people's safetensors files: one file or many shards, each tensor by name and mapped.

A tensor whose dtype already fits is a view of the mapped file and costs no memory until it is used. Other
tensors are cast one by one, so loading never needs much more than the file's size. A file that cannot be used
(a web page, a Git LFS pointer, half a download, another model) is recognised here, and one line says what it
is and what to do. Read next: layouts.py.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from tinyflow.errors import InputError, listing

FLOATS = ("F64", "F32", "F16", "BF16")
NOT_SAFETENSORS = {                              # how a file begins -> what it is, and what to do
    b"<": "a web page, not weights: the repository is gated; log in there, accept the licence, and download "
          "the file again",
    b"version https://git-lfs": "a Git LFS pointer, not weights: run `git lfs pull` in its folder, or "
                                "download the file itself",
    b"PK\x03\x04": "a pickled torch file, which is never opened here: download the .safetensors file instead"}


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of a safetensors file: name -> dtype, shape. Raises InputError that says what is wrong."""
    if not path.is_file():
        raise InputError(f"{path}: there is no such file")
    try:
        with safe_open(path, framework="pt") as file:    # it checks everything: sizes, offsets, JSON
            names = file.keys()
            slices = [file.get_slice(name) for name in names]
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in zip(names, slices)}
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
    with open(path, "rb") as file:
        start = file.read(64).lstrip()
    for beginning, what in NOT_SAFETENSORS.items():
        if start.startswith(beginning):
            raise InputError(f"{path}: this is {what}")
    raise InputError(f"{path}: not a whole safetensors file ({path.stat().st_size} bytes; {reason}); "
                     "the download was cut short or damaged, download it again")


class Checkpoint:
    """The tensors of one or more files, by name.

    Raises: InputError if a file cannot be used, or holds tensors of a dtype that this code does not read.
    """

    def __init__(self, paths: list[Path]):
        self.where, self.stored, other = ", ".join(map(str, paths)), {}, []
        for path in paths:
            for name, (dtype, shape) in read_header(path).items():
                if name.endswith("position_ids"):        # 0, 1, 2, ...: some CLIP files hold it
                    continue
                if dtype not in FLOATS:
                    other.append(f"{name} is {dtype}")
                self.stored[name] = (path, shape)
        if other:
            raise InputError(f"{self.where}: {listing(other)}; this code reads bf16, fp16 and fp32 files, "
                             "download one of those")

    @classmethod
    def find(cls, folder: Path, stem: str) -> "Checkpoint | None":
        """Opens folder/stem.safetensors, or its shards, or the fp16 variant of either.

        Returns None if there is none of these. Raises InputError if some shards are missing.
        """
        for name in (stem, f"{stem}.fp16"):
            if (folder / f"{name}.safetensors").exists():
                return cls([folder / f"{name}.safetensors"])
            shards = sorted(folder.glob(f"{name}-?????-of-?????.safetensors"))
            if shards and not shards[-1].stem.endswith(f"-of-{len(shards):05d}"):
                raise InputError(f"{folder}: only {len(shards)} of the shards {name}-...-of-"
                                 f"{shards[-1].stem[-5:]}.safetensors; download all of them")
            if shards:
                return cls(shards)
        return None

    def under(self, prefix: str) -> dict[str, tuple[int, ...]]:
        """Name without the prefix -> shape, for the tensors whose names begin with it."""
        return {name.removeprefix(prefix): shape
                for name, (_, shape) in self.stored.items() if name.startswith(prefix)}

    def tensor(self, name: str) -> Tensor:
        """A view of the file, which is mapped anew for each tensor.

        The mapping is released with the tensor, so what was only read to be cast does not stay in memory.
        """
        with safe_open(self.stored[name][0], framework="pt") as file:
            return file.get_tensor(name)


def take(tensor: Tensor, how: str) -> Tensor:
    """The part of a tensor that the brackets in the rename table (layouts.py) name.

    "2/3" is the second third of the rows, "swap" exchanges the two halves, "1x1" turns the weight of a 1 x 1
    convolution into that of a linear layer, and "" is the whole tensor.
    """
    if how == "swap":
        return torch.cat(tensor.chunk(2)[::-1])
    if how == "1x1":
        return tensor.flatten(1) if tensor.ndim == 4 else tensor
    if how:
        part, parts = map(int, how.split("/"))
        return tensor.chunk(parts)[part - 1]
    return tensor


def load(module: nn.Module, checkpoint: Checkpoint, prefix: str, names: dict[str, str],
         dtype: torch.dtype | None, device, extra: tuple[str, ...] = ()) -> None:
    """Fills a module that was built on the meta device. Nothing is read before all names and shapes fit.

    Args:
        names: the module's layer -> the checkpoint's layer behind `prefix`, with "[how]" for `take`.
            Weight and bias have these names in both.
        dtype: None keeps the file's own dtype, and then nothing is copied on a CPU.
        extra: names behind the prefix that this module does not need.
    Raises: InputError that lists every missing, unexpected and mis-shaped tensor, or names one whose numbers
        are not finite.
    """
    shapes, own, sources = checkpoint.under(prefix), module.state_dict(), {}
    for name in own:
        layer, _, last = name.rpartition(".")
        source, _, how = names[layer].removesuffix("]").partition("[")
        sources[name] = (f"{source}.{last}", how)
    used = {source for source, _ in sources.values()}
    wrong = [f"missing {prefix}{source}" for source in used - shapes.keys()]
    wrong += [f"unexpected {prefix}{name}" for name in shapes.keys() - used - set(extra)]
    for name, (source, how) in sources.items():
        if source in shapes:
            shape, needed = take(torch.empty(shapes[source], device="meta"), how).shape, own[name].shape
            if shape != needed:
                wrong.append(f"{prefix}{source} is {shapes[source]}, which gives {tuple(shape)} "
                             f"where {tuple(needed)} is needed")
    if wrong:
        raise InputError(f"{checkpoint.where}: the tensors do not fit this model: {listing(wrong)}")
    tensors = {}
    for name, (source, how) in tqdm(sources.items(), f"loading {type(module).__name__}", unit="tensor",
                                    delay=1, leave=False):
        tensor = take(checkpoint.tensor(prefix + source), how)
        tensors[name] = tensor.to(device, dtype or tensor.dtype)
        is_copy = tensors[name].data_ptr() != tensor.data_ptr()  # what stays in the file is not read for this
        if is_copy and not tensors[name].isfinite().all():
            raise InputError(f"{checkpoint.where}: {prefix}{source} holds numbers that are not finite in "
                             f"{str(tensors[name].dtype).removeprefix('torch.')}; download it again")
    module.load_state_dict(tensors, assign=True)
