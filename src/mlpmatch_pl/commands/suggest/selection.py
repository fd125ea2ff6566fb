"""Choose a few images that represent all the others."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 1024  # compared with all images at once


def representatives(
    features_ND: Tensor, count: int, chosen: Sequence[int] = (), weights_N: Tensor | None = None
) -> list[int]:
    """Choose images so that each image is similar to a chosen one, one after the other (facility location).

    The next image is the one that raises ``sum_i weight_i * max_j similarity(i, j)`` over the chosen j most. As gains
    only fall with further choices (the sum is submodular), most of them need not be computed again.

    Args:
        features_ND: A feature vector of each image, float32. Similarity is the cosine of two, less their common mean.
        count: How many images to choose.
        chosen: Images that are chosen already.
        weights_N: How much each image counts, at least 0; equally if omitted.

    Returns:
        The chosen images, without those given, the best one first.

    Example:
        >>> features = torch.tensor([[0.0, 1.0], [0.1, 1.0], [1.0, 0.0], [0.9, 0.0], [1.1, 0.1]])
        >>> representatives(features, 2)
        [2, 0]
        >>> representatives(features, 1, chosen=[4])
        [0]
    """
    features_ND = F.normalize(features_ND - features_ND.mean(dim=0))
    weights_N = features_ND.new_ones(len(features_ND)) if weights_N is None else weights_N
    similarity_NN = features_ND @ features_ND.T
    covered_N = similarity_NN.new_full((len(features_ND),), -1.0)
    for index in chosen:
        covered_N = torch.maximum(covered_N, similarity_NN[index])

    def gains(rows: slice) -> Tensor:
        return (similarity_NN[rows] - covered_N).clamp_min_(0) @ weights_N

    upper = torch.cat([gains(slice(row, row + ROWS)) for row in range(0, len(features_ND), ROWS)]).tolist()
    taken = set(chosen)
    queue = [(-gain, index) for index, gain in enumerate(upper) if index not in taken]
    heapq.heapify(queue)
    order: list[int] = []
    while queue and len(order) < count:
        _, index = heapq.heappop(queue)
        gain = float(gains(slice(index, index + 1)))
        if queue and (-gain, index) > queue[0]:
            heapq.heappush(queue, (-gain, index))
            continue
        order.append(index)
        covered_N = torch.maximum(covered_N, similarity_NN[index])
    return order
