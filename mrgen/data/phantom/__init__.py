"""The phantom: subjects grown from the MNI152 maps that the nilearn wheel ships, so that everything runs without data.

Lesions, contrasts and scanners differ from subject to subject, and what a sequence can and cannot show is true to
life: enhancement shows in t1ce alone, edema in t2 and flair, white matter hyperintensities are bright in flair and
faint in t1, tumour metabolism shows in apt. `grow_cohort` writes a cohort in a challenge's own layout, to be read
like any other.
"""

from mrgen.data.phantom.cohort import grow_cohort
from mrgen.data.phantom.subject import PhantomSubject, grow_subject

__all__ = ["PhantomSubject", "grow_cohort", "grow_subject"]
