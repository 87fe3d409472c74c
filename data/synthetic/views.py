"""What a set's images stand for: views of each stored image, alone or blended with views of others.

A target model gives every such image features of its own, which say more than the mixture of two images'
features: 100 images in 50 blended views teach like several hundred images (RESULTS.md).

Source of blends with a teacher's own targets: Beyer et al., "Knowledge distillation: A good teacher is
patient and consistent", arXiv 2106.05237; of storing them: Shen and Xing, "A Fast Knowledge Distillation
Framework for Visual Recognition", arXiv 2112.01528; of one image's low frequencies with another's high ones:
Oliva, Torralba and Schyns, "Hybrid images", SIGGRAPH 2006.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.augment import denormalize, normalize
from data.augment.crop_flip import apply_crop_flip, count_views, default_padding
from data.augment.low_pass import low_pass
from data.specs import Stats
from utils.cli import flag
from utils.device import upload
from utils.errors import UserError

LARGEST_PAD = 5  # of views whose numbers take one byte
BLEND = ("partners", "partner_views", "shares")
BORDERS = ("reflect", "constant")
INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)


def index_type(largest: int) -> torch.dtype:
    """The smallest number type for indices from 0 to `largest`."""
    return next(dtype for dtype in INTEGERS if largest <= torch.iinfo(dtype).max)


@dataclass(frozen=True)
class ViewFlags:
    """What the images of a set stand for."""

    views: int = flag(
        1,
        "crops and flips of each image that the set stands for, the first of them the image itself, "
        "reflected beyond its border; each view has features of its own",
        minimum=1,
    )
    blend: bool = flag(
        False,
        "each view but the first is blended with a view of another image, by a share ~ U(0, 1); its features "
        "are the target model's of the blend",
    )
    hybrid: bool | None = flag(
        None,
        "with --blend: the image's share holds for its low frequencies, and 1 minus it for its high ones, "
        "divided at a random frequency",
    )

    def draw(self, count: int, size: int, hflip: bool, seed: int) -> SetViews | None:
        """Views of `count` images of `size` pixels by a seed from 0; None where there is one of each.

        Of each image the plain view, then others: different ones, or random blends, each with another
        image. A UserError for views that these images do not have.
        """
        if self.hybrid and not self.blend:
            raise UserError("--hybrid says how views are blended; add --blend")
        if self.views == 1:
            if self.blend:
                raise UserError("--blend: the first view of an image is never blended; add --views 2 or more")
            return None
        pad = default_padding(size)
        if self.blend:
            if count < 2:
                raise UserError("--blend: a single image has no other to be blended with")
            return BlendDraw(seed % 2**32, self.views, hflip, bool(self.hybrid)).of(count, pad)
        known, plain = count_views(pad, hflip), _plain_view(pad)
        if self.views > known:
            raise UserError(
                f"--views {self.views}: an image has {known} different views, shifted by up to {pad} "
                "pixels; with --blend there are more"
            )
        generator = torch.Generator().manual_seed(seed)
        others = torch.rand(count, known - 1, generator=generator).argsort(1)[:, : self.views - 1]
        return SetViews(_after(plain, others + (others >= plain)).to(torch.uint8), pad)


@dataclass(frozen=True)
class BlendDraw:
    """A random draw of blended views: these few numbers stand for all that SetViews says of each view."""

    seed: int  # 0 to 2**32 - 1
    views: int  # of each image, at least 2
    hflip: bool
    hybrid: bool

    def of(self, count: int, pad: int) -> SetViews:
        """The views of `count` images, at least 2, shifted by at most `pad` pixels.

        Files rest on this order of 32-bit numbers of the Mersenne Twister, each modulo its limit: own view,
        partner's view, partner, share, cutoff. NumPy has promised that this stream never changes.
        """
        stream, shape = np.random.RandomState(self.seed), (count, self.views - 1)

        def below(limit: int) -> Tensor:
            drawn = stream.randint(0, 2**32, shape, dtype=np.uint32)
            return torch.from_numpy(drawn.astype(np.int64) % limit)

        known, plain = count_views(pad, self.hflip), _plain_view(pad)
        own, theirs, others, shares = below(known), below(known), 1 + below(count - 1), below(256)
        numbers, theirs, shares = (
            _after(first, numbers).to(torch.uint8)
            for first, numbers in ((plain, own), (plain, theirs), (255, shares))
        )
        partners = (torch.arange(count)[:, None] + _after(0, others)) % count
        cutoffs = _after(255, below(256)).to(torch.uint8) if self.hybrid else None
        blends = partners.to(index_type(count - 1)), theirs, shares, cutoffs
        return SetViews(numbers, pad, "reflect", *blends, drawn=self)


@dataclass(frozen=True)
class SetViews:
    """k views of each of n images; image i * k + j of the set is view j of image i. Tensors are (n, k)."""

    numbers: Tensor  # uint8: crop-and-flip views
    pad: int  # pixels by which they are shifted at most
    border: str = "reflect"  # what lies around an image: its reflection, or black ("constant")
    # With what views are blended, if they are.
    partners: Tensor | None = None  # integers: which of the n images
    partner_views: Tensor | None = None  # uint8: in which view
    shares: Tensor | None = None  # uint8: of the image itself, in 255ths
    # uint8: with them `shares` are those of low frequencies, those of high ones the rest to 1
    cutoffs: Tensor | None = None
    drawn: BlendDraw | None = None  # of which these are the first, if they are

    def __len__(self) -> int:
        return self.numbers.numel()

    @property
    def each(self) -> int:
        """How many views there are of each image: k."""
        return self.numbers.shape[1]

    def first(self, count: int) -> SetViews | None:
        """The first views of each image, `count` at most; None for one."""
        if count == 1:
            return None
        fields = {name: getattr(self, name) for name in ("numbers", *BLEND, "cutoffs")}
        return replace(self, **{n: t if t is None else t[:, :count].contiguous() for n, t in fields.items()})

    def images(self, x: Tensor, stats: Stats, rows: Tensor | None = None) -> Tensor:
        """The set's images (n * k, C, H, W) of normalised ones (n, C, H, W); differentiable.

        `rows` are those wanted, all by default.
        """
        if rows is None:  # a part at a time: a view takes several copies
            return torch.cat([self.images(x, stats, part) for part in torch.arange(len(self)).split(2048)])
        k, pixels = self.each, denormalize(x, stats)

        def seen(index: Tensor, numbers: Tensor) -> Tensor:
            # Not by brackets: threads would add up their gradient in any order.
            chosen = pixels.index_select(0, upload(index, x.device))
            return apply_crop_flip(chosen, numbers.flatten()[rows].long(), self.pad, self.border)

        own = seen(rows // k, self.numbers)
        if self.partners is None:
            return normalize(own, stats)
        other = seen(self.partners.flatten()[rows].long(), self.partner_views)
        share = upload(self.shares.flatten()[rows] / 255, x.device).view(-1, 1, 1, 1)
        if self.cutoffs is None:
            return normalize(share * own + (1 - share) * other, stats)
        cutoff = cutoff_frequency(upload(self.cutoffs.flatten()[rows] / 255, x.device), max(x.shape[2:]))
        more = own - other
        return normalize(other + (1 - share) * more + (2 * share - 1) * low_pass(more, cutoff), stats)

    def tensors(self) -> dict[str, Tensor]:
        """As a compact file holds them: where they are drawn only by what, and how many there are."""
        if self.drawn is not None:
            return {"x.drawn": torch.tensor([self.each, *astuple(self.drawn)])}
        found = {"views": self.numbers, **{name: getattr(self, name) for name in (*BLEND, "cutoffs")}}
        return {f"x.{name}": tensor for name, tensor in found.items() if tensor is not None}


def cutoff_frequency(part: Tensor, size: int) -> Tensor:
    """Cutoffs of `low_pass`: from half the lowest frequency of images of `size` pixels (0) to above all (1).

    Equal parts are equal ratios: natural images vary about as much in each octave.
    """
    return 0.5 / size * (3.0 * size) ** part


def _plain_view(pad: int) -> int:
    """The number of the view that is not shifted."""
    return pad * (2 * pad + 1) + pad


def _after(first: int, others: Tensor) -> Tensor:
    """`others` (n, k - 1) with `first` before each row."""
    return F.pad(others, (1, 0), value=first)
