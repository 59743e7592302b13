"""influence_nb: explain a model's predictions by its training data, in notebooks.

The public names, by floor (each floor imports only from those above it in this list):

0  records       Split, Task, Scores, cross_entropy, squared_error
1  ground        data, models, fit, converge, Hessian, GGN, LeadingGGN, Fisher, EmpiricalFisher,
                 embed, project, pca, tsne, umap, Atlas, distances
2  attribution   Influence, CG, LiSSA, Arnoldi, Nystroem, EKFAC, KFAC, TRAK, DataInf, GradDot,
                 GradCos, TracIn, Cosine; relative_influence, theta_change, loss_change, group_influence,
                 input_influence
3  truth         leave_one_out, check_method
4  to look at    plots, widgets
"""

from . import data, models, plots, widgets
from .attribute import (
    CG,
    EKFAC,
    KFAC,
    TRAK,
    Arnoldi,
    Cosine,
    DataInf,
    GradCos,
    GradDot,
    Influence,
    LiSSA,
    Nystroem,
    TracIn,
)
from .attribute.derived import group_influence, input_influence, loss_change, relative_influence, theta_change
from .checks import check_method
from .curvature import GGN, EmpiricalFisher, Fisher, Hessian, LeadingGGN
from .embedding import Atlas, cosine, embed, euclidean, pca, pixel, project, tsne, umap
from .scores import Scores
from .task import Split, Task, cross_entropy, squared_error
from .train import converge, fit
from .truth import leave_one_out

__version__ = "0.1.0"
__all__ = ["Split", "Task", "Scores", "cross_entropy", "squared_error",
           "data", "models", "fit", "converge", "Hessian", "GGN", "LeadingGGN", "Fisher", "EmpiricalFisher",
           "embed", "project", "pca", "tsne", "umap", "cosine", "euclidean", "pixel", "Atlas",
           "Influence", "CG", "LiSSA", "Arnoldi", "Nystroem", "EKFAC", "KFAC", "TRAK", "DataInf",
           "GradDot", "GradCos", "TracIn", "Cosine",
           "relative_influence", "theta_change", "loss_change", "group_influence", "input_influence",
           "leave_one_out", "check_method", "plots", "widgets"]
