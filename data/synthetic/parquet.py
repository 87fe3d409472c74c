"""The table of a set on the Hugging Face Hub: one parquet file, a row for each image.

image   the de-normalised picture as a PNG, clamped to [0, 1] at 8 bits: to look at
pixels  the image itself: C x H x W float32, normalised
target  its D float32, or instead
label   its class index

`datasets.load_dataset` knows the types by the front matter of README.md; here pixels and targets are read.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.synthetic.compact import LARGEST
from data.untrusted import check_regular
from utils.errors import UserError, first_line

if TYPE_CHECKING:
    from data.synthetic.set import SyntheticSet

PARQUET = Path("data/train-00000-of-00001.parquet")  # in the set's folder, as the Hub names it
_ROWS = 100  # in a group: what the Hub's viewer reads at once


def _arrow() -> Any:
    """Pyarrow with its modules for values and for files; a UserError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError:
        raise UserError("parquet files need a package: pip install datasets (the extra hub)") from None
    return pyarrow


def picture_bytes(synthetic: SyntheticSet) -> list[bytes]:
    """Each image as a PNG file of 8 bits; a UserError without statistics, or with 2 or 4 channels."""
    if synthetic.images.shape[1] not in (1, 3):
        raise UserError(f"PNG needs 1 or 3 channels, the images have {synthetic.images.shape[1]}")
    pixels = synthetic.to_pixels().mul(255).round().byte().cpu()
    files = []
    for image in pixels.permute(0, 2, 3, 1).squeeze(-1).numpy():
        Image.fromarray(image).save(file := io.BytesIO(), "png")
        files.append(file.getvalue())
    return files


def write_parquet(synthetic: SyntheticSet, path: Path) -> None:
    """Write the table; a UserError for a set that has no pictures (see `picture_bytes`)."""
    pa = _arrow()
    if synthetic.images.numel() >= LARGEST:
        raise UserError(f"cannot write {path}: expected less than {LARGEST} values in all images")

    def nested(values: Tensor) -> Any:
        """Lists of lists of ... of the numbers of each row."""
        array = pa.array(values.cpu().contiguous().view(-1).numpy())
        for axis in range(values.dim() - 1, 0, -1):
            count, length = values.shape[:axis].numel(), values.shape[axis]
            array = pa.ListArray.from_arrays(pa.array(length * np.arange(count + 1, dtype=np.int32)), array)
        return array

    names = [f"{number:05d}.png" for number in range(len(synthetic))]
    pictures = pa.StructArray.from_arrays([picture_bytes(synthetic), names], ["bytes", "path"])
    name = "target" if synthetic.soft else "label"
    columns = {"image": pictures, "pixels": nested(synthetic.images), name: nested(synthetic.targets)}
    how = dict(row_group_size=_ROWS, use_dictionary=False, write_page_checksum=True)
    pa.parquet.write_table(pa.table(columns), path, **how)


def read_parquet(path: Path) -> dict[str, Tensor]:
    """`images` and `targets` of a table, whoever wrote it; a UserError for a damaged one or another one."""
    pa = _arrow()
    check_regular(path)
    kinds = {"target": (1, pa.float32()), "label": (0, pa.int64())}
    try:
        with pa.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            labels = [name for name in kinds if name in names]
            if "pixels" not in names or len(labels) != 1:
                raise UserError(f"{path} has the columns {names}, expected pixels and either label or target")
            table = _read_columns(pa, file, ["pixels", *labels], path)
        images = _dense(pa, table["pixels"], 3, pa.float32())
        targets = _dense(pa, table[labels[0]], *kinds[labels[0]])
    except UserError:
        raise
    except Exception as error:  # pyarrow raises many types on damaged files
        raise UserError(f"{path} is damaged or holds no synthetic set ({first_line(error)})") from None
    return {"images": images, "targets": targets}


def _read_columns(pa: Any, file: Any, columns: list[str], path: Path) -> Any:
    """The columns as a table, a few rows at a time: a small file could hold any number of equal values.

    The file's own counts of values are not asked for: pyarrow ends the process where they are damaged.
    """
    batches, held = [], 0
    for batch in file.iter_batches(batch_size=10, columns=columns):
        batches.append(batch)
        held += batch.nbytes
        if held > 4 * LARGEST:
            raise UserError(f"{path} holds more than {4 * LARGEST} bytes of pixels and labels")
    return pa.Table.from_batches(batches, pa.schema([file.schema_arrow.field(name) for name in columns]))


def _dense(pa: Any, column: Any, depth: int, kind: Any) -> Tensor:
    """Lists, nested `depth` deep and equally long at each level, as a tensor of `depth` + 1 axes."""
    array, shape = column.combine_chunks(), [len(column)]
    for _ in range(depth):
        lengths = pa.compute.unique(pa.compute.list_value_length(array)).to_pylist()
        if array.null_count or len(lengths) != 1:
            raise ValueError("its rows differ in shape")
        shape.append(lengths[0])
        array = array.flatten()
    if array.null_count or array.type != kind:
        raise ValueError(f"values of type {array.type}, expected {kind}")
    return torch.from_numpy(array.to_numpy(zero_copy_only=False).reshape(shape).copy())
