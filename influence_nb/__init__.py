"""influence_nb: explain a model's predictions by its training data, in notebooks.

The public names, by floor (each floor imports only from those above it in this list):

0  records       Split, Task, Scores, cross_entropy, squared_error
1  ground        data, models, fit, fit_many, converge, Hessian, GGN, LeadingGGN, Fisher, EmpiricalFisher,
                 embed, project, pca, tsne, umap, Atlas, DISTANCES, cosine, euclidean, pixel, centroid, own_centroid,
                 mahalanobis, centroid_relationship, centroid_relationship_distance, centroids, neighbours
2  attribution   Influence, Refined, CG, LiSSA, Arnoldi, Nystroem, EKFAC, KFAC, Unrolled, TRAK, DataInf,
                 GradDot, GradCos, TracIn, LastLayer, Cosine, Representer, RepresenterLJE, and what they are made of:
                 given_labels, own_outputs, inner_product, residuals, predicted, labelled; relative_influence,
                 theta_change, loss_change, group_influence, input_influence
3  truth         removal_effects, leave_one_out, leave_group_out, expected_effects, subsets, audit,
                 pearson, spearman, slope, interval, lds, noise_ceiling, check_method, labels, confused, recurring
4  to look at    plots, widgets
"""

from . import data, labels, models, plots, widgets
from .atlas import Atlas
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
    LastLayer,
    LiSSA,
    Nystroem,
    Refined,
    Representer,
    RepresenterLJE,
    TracIn,
    Unrolled,
)
from .attribute.derived import group_influence, input_influence, loss_change, relative_influence, theta_change
from .attribute.representer import given_labels, labelled, own_outputs, predicted, residuals
from .checks import check_method
from .confusions import confused, recurring
from .curvature import GGN, EmpiricalFisher, Fisher, Hessian, LeadingGGN
from .distances import (
    DISTANCES,
    centroid,
    centroid_relationship,
    centroid_relationship_distance,
    centroids,
    cosine,
    euclidean,
    mahalanobis,
    neighbours,
    own_centroid,
    pixel,
)
from .embedding import embed, pca, project, tsne, umap
from .head import inner_product
from .metrics import interval, lds, noise_ceiling, pearson, slope, spearman
from .scores import Scores
from .store import audit
from .task import Split, Task, cross_entropy, squared_error
from .train import converge, fit, fit_many
from .truth import expected_effects, leave_group_out, leave_one_out, removal_effects, subsets

__version__ = "0.1.0"
__all__ = ["Split", "Task", "Scores", "cross_entropy", "squared_error",
           "data", "models", "fit", "fit_many", "converge", "Hessian", "GGN", "LeadingGGN", "Fisher", "EmpiricalFisher",
           "embed", "project", "pca", "tsne", "umap", "Atlas", "DISTANCES", "cosine", "euclidean", "pixel", "centroid",
           "own_centroid", "mahalanobis", "centroid_relationship", "centroid_relationship_distance", "centroids",
           "neighbours",
           "Influence", "Refined", "CG", "LiSSA", "Arnoldi", "Nystroem", "EKFAC", "KFAC", "Unrolled", "TRAK", "DataInf",
           "LastLayer", "GradDot", "GradCos", "TracIn", "Cosine", "Representer", "RepresenterLJE",
           "given_labels", "own_outputs", "inner_product", "residuals", "predicted", "labelled",
           "relative_influence", "theta_change", "loss_change", "group_influence", "input_influence",
           "removal_effects", "leave_one_out", "leave_group_out", "expected_effects", "subsets", "audit",
           "pearson", "spearman", "slope", "interval", "lds", "noise_ceiling", "check_method", "labels",
           "confused", "recurring", "plots", "widgets"]
