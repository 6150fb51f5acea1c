"""Pictures from directories, lists and arrays: who they are, and what a model takes in of each.

A picture is known by a digest of its bytes and is decoded when its batch comes, so that a corpus of any size is never
in memory at once. Its bytes are looked at again then: a file that changed in between is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Endings of the files that are taken from a directory, in letters of either case."""

# Pillow goes by a file's content, and opens some formats by starting other programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")

# More than 8 bits a channel, which Pillow would cut off at 255.
_WIDE = ("I", "F")


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture of a corpus.

    Attributes:
        name: Its file, relative to the directory or as it was listed, or "picture 3" of a list in memory.
        source: A file, a PIL image, or float32 [channels, height, width] that is processed already.
        digest: 32 bytes, BLAKE2b of the file's bytes, or of the size and numbers of what lies in memory.
    """

    name: str
    source: Any = field(repr=False)
    digest: bytes = field(repr=False)

    @property
    def processed(self) -> bool:
        """Whether it is what the model takes in, so that no processor is needed."""
        return isinstance(self.source, np.ndarray)

    def pixels(self, processor: Any) -> torch.Tensor:
        """float32 [channels, height, width], what the model takes in.

        Args:
            processor: An image processor of transformers; what is processed already needs none.

        Raises:
            ValueError: The file is damaged, gone, or another one now; one sentence with its name.
        """
        import torch

        if self.processed:
            return torch.from_numpy(self.source)
        image = self.source
        if isinstance(image, Path):
            content = _content(image, self.name)
            if _digest(content) != self.digest:
                raise ValueError(
                    f"picture '{self.name}' is not the file that was there when the corpus was read: read it again."
                )
            image = _decoded(content, self.name)
        # one at a time, so that no picture depends on those beside it; some processors group them by their sizes
        found: torch.Tensor = processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        return found.to(torch.float32)


def load_processor(source: str | os.PathLike[str]) -> Any:
    """The image processor of a checkpoint.

    Args:
        source: Directory or hub name.

    Raises:
        ImportError: A package that it needs is not installed: Pillow, or torchvision, which `AutoImageProcessor` of
            transformers 5.14 cannot do without.
        OSError, ValueError: As transformers raises them.
    """
    from transformers import AutoImageProcessor

    reader: Any = AutoImageProcessor
    try:
        return reader.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        if find_spec("PIL") is None:
            needed = "pillow: pip install 'obce[pictures]'"
        elif isinstance(error, ImportError) and find_spec("torchvision") is None:
            needed = "torchvision: pip install torchvision, or a newer transformers"
        else:
            raise
        raise ImportError(f"the image processor of model '{source}' needs the package {needed}") from error


def check_processor(pictures: Iterable[Picture], processor: Any) -> None:
    """Refuses what is no image processor, where one is needed.

    Raises:
        TypeError: It is not.
    """
    needed = not all(picture.processed for picture in pictures)
    if needed and not (callable(processor) and "pixel_values" in getattr(processor, "model_input_names", ())):
        raise TypeError(
            f"processor is {a_type(processor)}, expected the image processor of the model; make one with "
            "AutoImageProcessor.from_pretrained(...)."
        )


def is_picture_directory(path: str | os.PathLike[str]) -> bool:
    """Whether a directory holds files with an ending of `ENDINGS`, at any depth."""
    return os.path.isdir(path) and any(_ending(file) for file in _files(Path(path)))


def read_pictures(source: Any) -> Iterator[Picture]:
    """Pictures one after another, equal ones included.

    Args:
        source: A directory (files of `ENDINGS` in it and below it, by their names), or an iterable of paths, of PIL
            images, or of arrays or tensors [channels, height, width] that are processed already; or one array or tensor
            [n, channels, height, width] of these.

    Raises:
        TypeError: `source` or an entry is of another type.
        ValueError: A file is missing or no picture, or an array has another shape, other numbers, or one that is not
            finite.
        ImportError: Pillow is not installed.
    """
    if isinstance(source, str | os.PathLike):
        folder = Path(os.path.expanduser(source))
        if not folder.is_dir():
            raise ValueError(
                f"source: '{source}' is not a directory, expected one of picture files, or a list of them."
            )
        for file in _files(folder):
            if _ending(file):
                yield _of_file(file, file.relative_to(folder).as_posix())
        return
    if isinstance(source, bytes | bytearray | Mapping | set | frozenset) or not hasattr(source, "__iter__"):
        raise TypeError(f"source is {a_type(source)}, expected a directory of picture files or a list of pictures.")
    for index, entry in enumerate(source):
        if isinstance(entry, str | os.PathLike):
            yield _of_file(Path(os.path.expanduser(entry)), str(entry))
        elif hasattr(entry, "shape"):
            yield _of_array(entry, f"picture {index}")
        elif hasattr(entry, "convert") and hasattr(entry, "tobytes"):
            _check_mode(entry, f"picture {index}")
            whole = f"{entry.mode}\0{entry.size}\0".encode() + entry.tobytes()
            yield Picture(f"picture {index}", entry, _digest(whole))
        else:
            raise TypeError(
                f"source: entry {index} is {a_type(entry)}, expected a path, a PIL image, or an array or tensor "
                "[channels, height, width]."
            )


def other_files(folder: str | os.PathLike[str]) -> int:
    """Files in a directory and below it that are left out, as their ending is not in `ENDINGS`."""
    return sum(not _ending(file) for file in _files(Path(os.path.expanduser(folder))))


def _files(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Files of a directory in the order of their names, without those whose name begins with a dot."""
    real = folder.resolve()
    if real in above:  # a link to a directory that it lies in
        return
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _files(entry, (*above, real))
        elif entry.is_file():
            yield entry


def _ending(file: Path) -> bool:
    return file.suffix.lower() in ENDINGS


def _of_file(file: Path, name: str) -> Picture:
    content = _content(file, name)
    _check_mode(_decoded(content, name, verify=True), name)
    return Picture(name, file, _digest(content))


def _check_mode(image: Any, name: str) -> None:
    if image.mode.startswith(_WIDE):
        raise ValueError(
            f"picture '{name}' has the mode {image.mode}, expected 8 bits a channel or fewer: convert it, or give it "
            "as an array that is processed already."
        )


def _content(file: Path, name: str) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"picture '{name}' does not exist: check the path.") from None
    except OSError as error:
        raise ValueError(f"picture '{name}' cannot be read ({error.strerror}): check its permissions.") from error


def _decoded(content: bytes, name: str, *, verify: bool = False) -> Any:
    """A PIL image, turned as its file says; with `verify` only its head and the sums of its blocks are looked at."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("picture files need the package pillow: pip install 'obce[pictures]'") from error
    Image.init()
    try:
        # a Pillow may be built without some of them
        image = Image.open(BytesIO(content), formats=[name for name in _FORMATS if name in Image.OPEN])
        if verify:
            image.verify()
            return image
        return ImageOps.exif_transpose(image)  # decodes it
    except Exception as error:  # each format of Pillow has errors of its own
        why = " ".join(str(error).split())[:120] if "BytesIO" not in str(error) else "no format that Pillow knows"
        raise ValueError(f"picture '{name}' is damaged or no picture ({why}): replace it, or leave it out.") from error


def _of_array(given: Any, name: str) -> Picture:
    if hasattr(given, "detach"):
        given = given.detach().cpu()
        given = (given.float() if given.is_floating_point() else given).numpy()
    array: NDArray[Any] = np.asarray(given)
    if array.ndim != 3 or array.dtype.kind != "f":
        raise ValueError(
            f"source: {name} is {array.dtype} of shape {array.shape}, expected floating point [channels, height, "
            "width] that is processed already; give pictures that are not as PIL images."
        )
    array = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"source: {name} holds NaN or infinity, expected finite numbers.")
    return Picture(name, array, _digest(f"{array.shape}\0".encode() + array.tobytes()))


def _digest(content: bytes) -> bytes:
    return blake2b(content, digest_size=32, person=b"obce.picture").digest()


def a_type(value: object) -> str:
    """The type of a value, with its article."""
    kind = type(value).__name__
    return f"an {kind}" if kind[0] in "aeiouAEIOU" else f"a {kind}"
