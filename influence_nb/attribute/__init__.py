"""The attribution methods: one family a file, one line here for each."""

from .datainf import DataInf
from .influence import CG, Influence
from .iterative import Arnoldi, LiSSA, Nystroem
from .kfac import EKFAC, KFAC
from .refine import Refined
from .representer import Representer, RepresenterLJE
from .similarity import Cosine, LastLayer
from .tracin import GradCos, GradDot, TracIn
from .trak import TRAK
from .unrolled import Unrolled

METHODS = (Influence, Refined, CG, LiSSA, Arnoldi, Nystroem, EKFAC, KFAC, Unrolled, TRAK, DataInf, GradDot, GradCos,
           TracIn, LastLayer, Cosine, Representer, RepresenterLJE)
