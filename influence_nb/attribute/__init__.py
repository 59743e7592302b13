"""The attribution methods: one family a file, one line here for each."""

from .datainf import DataInf
from .influence import CG, Influence
from .iterative import Arnoldi, LiSSA, Nystroem
from .kfac import EKFAC, KFAC
from .similarity import Cosine
from .tracin import GradCos, GradDot, TracIn
from .trak import TRAK

METHODS = (Influence, CG, LiSSA, Arnoldi, Nystroem, EKFAC, KFAC, TRAK, DataInf, GradDot, GradCos, TracIn, Cosine)
