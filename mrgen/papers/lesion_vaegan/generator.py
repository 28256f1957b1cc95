"""EC, EC_R and DC: what the second stage makes of a step's slices, in one forward pass (Qu et al., 2.4 to 2.6)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mrgen.nets.lesion_vaegan import ImageDecoder, ImageEncoder

__all__ = ["Generator", "Made", "Real"]


class Real(NamedTuple):
    """A step's real slices, of C sequences that are not of one place, and what is to be made.

    Attributes:
        image: (C, B, 1, X, Y) in [0, 1].
        label: (C, B, X, Y).
        structure: (B, 1, X, Y), a structure map without the outline of its own lesion.
        mask: (B, 1, X, Y), 1 outside the brain that it is of.
        lesion: (B, X, Y), the label of another slice, that lies within this brain.
    """

    image: Tensor
    label: Tensor
    structure: Tensor
    mask: Tensor
    lesion: Tensor


class Made(NamedTuple):
    """All that the generator makes of them; P = C · (C − 1) pairs of a source and another target, source by source.

    Attributes:
        code: (C, B, F, x, y), EC of real images.
        reconstructed: (C, B, 1, X, Y).
        translated: (P, B, 1, X, Y), of the source as the target.
        recode: (P, B, F, x, y), EC of them.
        cycled: (P, B, 1, X, Y), and back to the source.
        code_g: (B, F, x, y), EC_R of the fused map.
        synthetic: (C, B, 1, X, Y).
        recode_g: (C, B, F, x, y), EC of them.
        translated_g: (P, B, 1, X, Y).
    """

    code: Tensor
    reconstructed: Tensor
    translated: Tensor
    recode: Tensor
    cycled: Tensor
    code_g: Tensor
    synthetic: Tensor
    recode_g: Tensor
    translated_g: Tensor


class Generator(nn.Module):
    """Encoders of images and of maps with labels into one space of codes, and a decoder into any sequence.

    Args:
        sequences: C, how many there are, two or more.
        classes: of labels, no lesion included.
        width: channels of the first layer.
        dropout: of the encoders' input pixels.
        label_share: of a label's one-hot channel in the fused map; the structure map has the rest.
        norm_after_map: of DC, see ``first_norm`` of ``ImageDecoder``.

    Attributes:
        encoder, fusion_encoder, decoder: EC, EC_R and DC.
        pairs: (source, target) of every translation, source by source.
    """

    def __init__(
        self, sequences: int, classes: int, width: int, dropout: float, label_share: float, norm_after_map: bool
    ):
        super().__init__()
        self.sequences, self.classes, self.label_share = sequences, classes, label_share
        self.encoder = ImageEncoder(1, width, dropout)
        self.fusion_encoder = ImageEncoder(classes, width, dropout)
        self.decoder = ImageDecoder(8 * width + sequences, 1, width, norm_after_map)
        self.pairs = [(j, i) for j in range(sequences) for i in range(sequences) if j != i]

    def fuse(self, structure: Tensor, lesion: Tensor) -> Tensor:
        """Map (B, 1, X, Y) and label (B, X, Y) as one, (B, classes, X, Y) (section 2.5). 255 is no lesion."""
        lesion = torch.where(lesion < self.classes, lesion, 0).long()
        one_hot = F.one_hot(lesion, self.classes).permute(0, 3, 1, 2)  # (B, n, X, Y)
        return self.label_share * one_hot + (1 - self.label_share) * structure

    def decode(self, code: Tensor, sequence: Sequence[int]) -> Tensor:
        """DC: codes (n, B, F, x, y) to images (n, B, 1, X, Y), the k-th of sequence ``sequence[k]``."""
        n, size, _, x, y = code.shape
        maps = F.one_hot(torch.as_tensor(sequence, device=code.device), self.sequences).to(code.dtype)
        maps = maps[:, None, :, None, None].expand(n, size, -1, x, y)  # (n, B, C, x, y)
        stacked = torch.cat([code, maps], dim=2).flatten(0, 1)
        return self.decoder(stacked).float().unflatten(0, (n, size))

    def encode(self, images: Tensor) -> Tensor:
        """EC: images (n, B, 1, X, Y) to codes (n, B, F, x, y)."""
        return self.encoder(images.flatten(0, 1)).unflatten(0, images.shape[:2])

    def forward(self, real: Real) -> Made:
        """One forward pass. Networks are called on all that they are needed for at once."""
        sequences, own = self.sequences, list(range(self.sequences))
        sources, targets = [j for j, _ in self.pairs], [i for _, i in self.pairs]
        code = self.encode(real.image)
        code_g = self.fusion_encoder(self.fuse(real.structure, real.lesion))  # (B, F, x, y)
        to_decode = torch.cat([code, code[sources], code_g.expand(sequences, *code_g.shape)])
        images = self.decode(to_decode, [*own, *targets, *own])  # (C + P + C, B, 1, X, Y)
        reconstructed, translated, synthetic = images.split([sequences, len(self.pairs), sequences])
        recode, recode_g = self.encode(torch.cat([translated, synthetic])).split([len(self.pairs), sequences])
        images = self.decode(torch.cat([recode, recode_g[sources]]), [*sources, *targets])  # (2 P, B, 1, X, Y)
        cycled, translated_g = images.split(len(self.pairs))
        return Made(code, reconstructed, translated, recode, cycled, code_g, synthetic, recode_g, translated_g)
