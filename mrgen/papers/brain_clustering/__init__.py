"""Paper 5, the clustering half: BrainClustering and the baselines it is measured by (Baldini et al., BraTS 2019).

    model.py          BrainClustering: fit, query, Train&Test and Search
    tables.py         a training pair -> clusters -> matching -> tables f_t
    kmeans.py         optimal 1D k-means over distinct intensities
    preprocessing.py  outlier step, min–max; the median filter at the end
    search.py         Search: distance to a training subject's source
    baselines.py      Complementary, Random, Constant, Nothing
    estimator.py      what they share: arrays, tensors and artefacts

Numbers marked [P] are printed in the paper, those marked [C] are in the authors' code alone.
"""

from mrgen.papers.brain_clustering.baselines import Complementary, Constant, Nothing, Random
from mrgen.papers.brain_clustering.estimator import Pair
from mrgen.papers.brain_clustering.model import Answer, BrainClustering
from mrgen.papers.brain_clustering.search import Location

__all__ = ["Answer", "BrainClustering", "Complementary", "Constant", "Location", "Nothing", "Pair", "Random"]
