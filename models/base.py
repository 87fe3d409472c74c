"""The contract of every network of both zoos, and the check of the image size."""

import itertools
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from utils.errors import UserError

Size = tuple[int, int]  # (height, width)


class Classifier(nn.Module):
    """`forward(x) == head(dropout(embed(x)))`, for images x (B, C, H, W).

    As in the release, dropout shows in the names: with it the head's keys are `fc.1.*`, without it
    `fc.*`. Either network loads the other's state dict.

    A subclass builds its layers, implements `forward_features` and calls `set_head` last.
    """

    head_name: str = "fc"  # of the last linear layer
    global_pool: bool = False  # `embed` averages the feature map instead of flattening it
    num_features: int  # width of `embed(x)`
    num_pooled: int  # width of `pooled(x)`
    prepare: Callable[[Tensor], Tensor] | None = None  # what happens to images first, such as whitening
    first_order: bool = False  # no gradient is differentiated again: models.fused may compute it

    def set_head(
        self,
        num_classes: int,
        num_pooled: int,
        map_size: Size = (1, 1),
        *,
        head_name: str = "fc",
        dropout: float = 0.0,
    ) -> None:
        """Add the head for a feature map of shape (num_pooled, *map_size)."""
        if not 0 <= dropout < 1:
            raise UserError(f"dropout is {dropout}; expected a probability in [0, 1)")
        if num_classes < 1:
            raise UserError(f"num_classes is {num_classes}; expected 1 or more")
        self.num_pooled, self.head_name = num_pooled, head_name
        self.num_features = num_pooled * (1 if self.global_pool else map_size[0] * map_size[1])
        linear = nn.Linear(self.num_features, num_classes)
        setattr(self, head_name, nn.Sequential(nn.Dropout(dropout), linear) if dropout else linear)

    @property
    def head(self) -> nn.Module:
        """The last linear layer."""
        last = getattr(self, self.head_name)
        return last[1] if isinstance(last, nn.Sequential) else last

    def renamed(self, state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
        """A state dict of this network, with or without dropout, under this one's head keys."""
        own, other = f"{prefix}{self.head_name}.", f"{prefix}{self.head_name}.1."
        if isinstance(getattr(self, self.head_name), nn.Sequential):
            own, other = other, own
        names = {other + leaf: own + leaf for leaf in ("weight", "bias") if own + leaf not in state}
        return {names.get(key, key): value for key, value in state.items()}

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        renamed = self.renamed(state_dict, prefix)
        state_dict.clear()
        state_dict.update(renamed)  # in place: torch passes this very dict on to the children
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map (B, num_pooled, h, w); (B, num_pooled) of MLP and LeNet."""
        raise NotImplementedError

    def _maps(self, x: Tensor) -> Tensor:
        return self.forward_features(x if self.prepare is None else self.prepare(x))

    def pooled(self, x: Tensor) -> Tensor:
        """Features averaged over space (B, num_pooled)."""
        features = self._maps(x)
        return features.mean((2, 3)) if features.dim() == 4 else features

    def embed(self, x: Tensor) -> Tensor:
        """Features before the head (B, num_features)."""
        return self.pooled(x) if self.global_pool else self._maps(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes)."""
        return getattr(self, self.head_name)(self.embed(x))


def map_size(name: str, im_size: Size, side: Callable[[int], int], least: int = 1) -> Size:
    """Size of the last feature map: `side` of each side of the images, and at least `least`.

    A UserError names the smallest images that work.
    """
    height, width = (side(s) if s >= 1 else 0 for s in im_size)
    if min(height, width) < least:
        smallest = next(s for s in itertools.count(1) if side(s) >= least)
        raise UserError(
            f"{name} cannot take images of {im_size[0]}x{im_size[1]}: its last feature map would "
            f"be too small; the smallest that work are {smallest}x{smallest}"
        )
    return height, width
