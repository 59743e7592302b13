"""The attribution methods: one family a file, one line here for each."""

from .influence import CG, Influence
from .kfac import EKFAC, KFAC
from .similarity import Cosine
from .tracin import GradDot

METHODS = (Influence, CG, EKFAC, KFAC, GradDot, Cosine)
