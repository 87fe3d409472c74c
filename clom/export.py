"""Synthetic sets of this family for the KRR-ST tables."""

from __future__ import annotations

from pathlib import Path

from data.augment import denormalize, normalize
from data.specs import DC_SPECS, KRR_SPECS
from data.synthetic import SyntheticSet


def export(path: Path, place: str, method: str) -> Path:
    """Write the first experiment of a res file as the KRR-ST pair, in that family's normalisation.

    Args:
        path: the res file with its description beside it.
        place: folder; {source} and {method} in it stand for the names the KRR-ST tables use.
        method: DC, DSA or DM.

    Returns:
        The folder.
    """
    source, converted = to_krr_space(SyntheticSet.load(path))
    folder = Path(place.replace("{source}", source).replace("{method}", method.lower()))
    converted.save(folder, "pair")
    print(f"exported: {folder}/x_syn.pt, y_syn.pt")
    return folder


def to_krr_space(synthetic: SyntheticSet) -> tuple[str, SyntheticSet]:
    """The KRR-ST name of the set's source, and the set in that family's statistics.

    Unchanged where that family has no statistics for the source at this size.
    """
    dc = DC_SPECS.get(synthetic.data_name)
    source = dc.folder if dc is not None else str(synthetic.data_name)
    krr = KRR_SPECS.get(source)
    stats = krr.stats.get(synthetic.images.shape[-1]) if krr is not None else None
    if stats is None or stats == synthetic.stats:
        return source, synthetic
    images = normalize(denormalize(synthetic.images, synthetic.stats), stats)
    return source, SyntheticSet(images, synthetic.targets, stats, source, synthetic.info)
