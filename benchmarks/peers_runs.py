"""What other influence libraries need for the same scores: one peer, one method, one process, one JSON line.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/peers_runs.py --problem mlp --method kronfluence_ekfac --out scores.npz

Needs an environment of its own with the peers (and this project): pydvl, captum, kronfluence, traker, dattri,
curvlinops-for-pytorch. One thread. CPU and wall seconds are those of the run alone: imports, data, the model and a
first run on 64 images stay outside. peak_mb is what the run adds to the memory that the process held before (Linux).

Every run returns scores [n_test, n_train] that are a positive constant per test point times g_test^T (C + damping)^-1
g_train, with g the gradients of the cross-entropy and C the mean curvature over the training images; no l2 in C or g.
No peer needs a change of sign: all of them return this product, and the last line of a run turns it where a peer puts
training images first. What C is differs: see each docstring.
"""

import argparse
import copy
import json
import logging
import resource
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from own_runs import METHODS as OWN
from peers_problems import PROBLEMS
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset

BATCH = 500  # both divide both training sets: some peers average over batches, not examples
SMALL = 100  # captum and pydvl are faster with it, the others slower or as fast
WARM_UP = 64  # images of the first run, which pays for lazy imports


def loader(x: Tensor, y: Tensor, batch_size: int = BATCH) -> DataLoader:
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def example_loss(model):
    """(weights, (x, y) of one example) -> its cross-entropy."""
    def loss(weights, example):
        x, y = example
        return nn.functional.cross_entropy(functional_call(model, weights, (x[None],)), y[None])
    return loss


# captum: one checkpoint with a learning rate of 1
def load(model, state) -> float:
    model.load_state_dict(state)
    return 1.0


def captum_tracin(model, train_x, train_y, test_x, test_y, damping) -> Tensor:
    """Gradient products: TracInCP over all layers, sample-wise gradients by hooks."""
    from captum.influence import TracInCP

    tracin = TracInCP(model, TensorDataset(train_x, train_y), [model.state_dict()], load,
                      loss_fn=nn.CrossEntropyLoss(reduction="sum"), batch_size=SMALL, sample_wise_grads_per_batch=True)
    return tracin.influence((test_x, test_y))


def captum_tracin_last_layer(model, train_x, train_y, test_x, test_y, damping) -> Tensor:
    """Gradient products of the last layer only: TracInCPFast, from activations and output gradients."""
    from captum.influence import TracInCPFast

    tracin = TracInCPFast(model, list(model.children())[-1], TensorDataset(train_x, train_y), [model.state_dict()],
                          load, loss_fn=nn.CrossEntropyLoss(reduction="sum"), batch_size=SMALL)
    return tracin.influence((test_x, test_y))


# kronfluence: factors averaged over examples, so that its damping is ours
def kronfluence(model, train_x, train_y, test_x, test_y, damping, strategy) -> Tensor:
    """Pairwise scores, C = the Fisher with one sampled label per image, as identity, K-FAC or EK-FAC."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(self, batch, model, sample=False):
            x, y = batch
            logits = model(x)
            if sample:
                y = torch.multinomial(logits.detach().softmax(1), 1)[:, 0]
            return nn.functional.cross_entropy(logits, y, reduction="sum")

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

    task, train, test = Classification(), TensorDataset(train_x, train_y), TensorDataset(test_x, test_y)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("run", prepare_model(model, task), task, cpu=True, disable_tqdm=True, output_dir=folder,
                            log_level=logging.ERROR)
        analyzer.fit_all_factors("factors", train, per_device_batch_size=BATCH,
                                 factor_args=FactorArguments(strategy=strategy))
        analyzer.compute_pairwise_scores("scores", "factors", test, train, per_device_query_batch_size=len(test_x),
                                         per_device_train_batch_size=BATCH,
                                         score_args=ScoreArguments(damping_factor=damping))
        return analyzer.load_pairwise_scores("scores")["all_modules"]


# curvlinops: has the inverse curvature; gradients by vmap
def gradients(model, x, y) -> Tensor:
    """Gradients [b, p] of the loss of each example, flattened in the order of model.parameters()."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    each = vmap(grad(example_loss(model)), in_dims=(None, (0, 0)))(weights, (x, y))
    return torch.cat([g.flatten(1) for g in each.values()], 1)


def products(inverse, model, train_x, train_y, test_x, test_y) -> Tensor:
    """Scores [n_test, n_train] of an inverse curvature operator [p, p]."""
    solved = (inverse @ gradients(model, test_x, test_y).T).T
    return torch.cat([solved @ gradients(model, x, y).T for x, y in loader(train_x, train_y)], 1)


def curvlinops_kfac(model, train_x, train_y, test_x, test_y, damping, corrected=False, fisher="type-2") -> Tensor:
    """(E)KFACLinearOperator and its inverse in the eigenbasis; C = GGN ("type-2") or sampled Fisher ("mc")."""
    from curvlinops import EKFACLinearOperator, KFACInverseLinearOperator, KFACLinearOperator

    operator = EKFACLinearOperator if corrected else KFACLinearOperator
    K = operator(model, nn.CrossEntropyLoss(), list(model.parameters()), list(loader(train_x, train_y)),
                 fisher_type=fisher, check_deterministic=False, separate_weight_and_bias=False,
                 num_data=len(train_x), num_per_example_loss_terms=1)
    inverse = KFACInverseLinearOperator(K, damping=damping, use_exact_damping=True)
    return products(inverse, model, train_x, train_y, test_x, test_y)


def curvlinops_cg(model, train_x, train_y, test_x, test_y, damping, curvature="GGN", tolerance=1e-4) -> Tensor:
    """CGInverseLinearOperator of the GGN or Hessian plus damping times the identity."""
    import curvlinops
    from curvlinops.examples import IdentityLinearOperator

    weights = list(model.parameters())
    C = getattr(curvlinops, f"{curvature}LinearOperator")(
        model, nn.CrossEntropyLoss(), weights, list(loader(train_x, train_y)), check_deterministic=False,
        num_data=len(train_x))
    identity = IdentityLinearOperator([p.shape for p in weights], weights[0].device, weights[0].dtype)
    inverse = curvlinops.CGInverseLinearOperator(C + damping * identity, eps=0, tolerance=tolerance, max_iter=500,
                                                 max_tridiag_iter=0)
    return products(inverse, model, train_x, train_y, test_x, test_y)


# pydvl: mean loss, hessian_regularization and regularization are our damping
def pydvl_products(influence, train_x, train_y, test_x, test_y) -> Tensor:
    """Scores of a fitted influence model: factors of the test points once, then the training set in batches."""
    factors = influence.influence_factors(test_x, test_y)
    batches = loader(train_x, train_y, SMALL)
    return torch.cat([influence.influences_from_factors(factors, x, y) for x, y in batches], 1)


def pydvl_ekfac(model, train_x, train_y, test_x, test_y, damping, corrected) -> Tensor:
    """EkfacInfluence (Linear layers only), C = its pseudo-Fisher, with or without the corrected eigenvalues."""
    from pydvl.influence.torch import EkfacInfluence

    influence = EkfacInfluence(model, update_diagonal=corrected, hessian_regularization=damping)
    influence = influence.fit(loader(train_x, train_y, SMALL))
    return pydvl_products(influence, train_x, train_y, test_x, test_y)


def pydvl_cg(model, train_x, train_y, test_x, test_y, damping, rank=0, block=False, empirical=False, steps=100):
    """CgInfluence, C = Hessian or empirical Fisher. Unless block, float32 never meets its tolerance: `steps` end it."""
    from pydvl.influence.torch import CgInfluence, NystroemPreconditioner
    from pydvl.influence.torch.util import SecondOrderMode

    mode = SecondOrderMode.GAUSS_NEWTON if empirical else SecondOrderMode.HESSIAN
    influence = CgInfluence(model, nn.functional.cross_entropy, regularization=damping, rtol=1e-4, maxiter=steps,
                            preconditioner=NystroemPreconditioner(rank) if rank else None,
                            solve_simultaneously=block, second_order_mode=mode)
    influence = influence.fit(loader(train_x, train_y, SMALL))
    return pydvl_products(influence, train_x, train_y, test_x, test_y)


# dattri: mean loss, regularization and damping are ours; it returns [n_train, n_test]
def dattri_task(model, loss):
    from dattri.task import AttributionTask

    return AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())


def dattri_mean_loss(model):
    """An AttributionTask whose loss is the mean cross-entropy of a batch."""
    def loss(weights, batch):
        x, y = batch
        return nn.functional.cross_entropy(functional_call(model, weights, (x,)), y)
    return dattri_task(model, loss)


def dattri_graddot(model, train_x, train_y, test_x, test_y, damping) -> Tensor:
    """Gradient products: TracInAttributor with one weight of 1 and its default random projection switched off."""
    from dattri.algorithm import TracInAttributor

    tracin = TracInAttributor(dattri_task(model, example_loss(model)), torch.ones(1), normalized_grad=False)
    tracin.projector_kwargs = None
    return tracin.attribute(loader(train_x, train_y), loader(test_x, test_y)).T


def dattri_ekfac(model, train_x, train_y, test_x, test_y, damping) -> Tensor:
    """IFAttributorEKFAC (Linear layers only), C = EK-FAC of the empirical Fisher."""
    from dattri.algorithm.influence_function import IFAttributorEKFAC

    ekfac = IFAttributorEKFAC(dattri_mean_loss(model), damping=damping)
    ekfac.cache(loader(train_x, train_y))
    with torch.no_grad():
        return ekfac.attribute(loader(train_x, train_y), loader(test_x, test_y)).T


def dattri_cg(model, train_x, train_y, test_x, test_y, damping, iterations=100) -> Tensor:
    """IFAttributorCG, C = Hessian; one batch of everything, since it sums one inverse per batch and solves for each."""
    from dattri.algorithm.influence_function import IFAttributorCG

    cg = IFAttributorCG(dattri_mean_loss(model), max_iter=iterations, regularization=damping)
    everything = loader(train_x, train_y, len(train_x))
    cg.cache(everything)
    return cg.attribute(everything, loader(test_x, test_y)).T


# TRAK: C = the mean outer product of projected margin gradients; a random projection multiplies it by k/p or 1/p
def dattri_trak(model, train_x, train_y, test_x, test_y, damping, dimension=2048) -> Tensor:
    """TRAKAttributor with one model; its features are divided by the square root of p, so is our damping by p."""
    from dattri.algorithm.trak import TRAKAttributor

    loss = example_loss(model)

    def probability(weights, example):
        return torch.exp(-loss(weights, example))

    def margin(weights, example):
        nats = loss(weights, example)
        return -nats - torch.log(-torch.expm1(-nats))

    p = sum(weight.numel() for weight in model.parameters())
    trak = TRAKAttributor(dattri_task(model, margin), probability, {"proj_dim": dimension},
                          regularization=damping * len(train_x) / p)
    trak.cache(loader(train_x, train_y, 2 * BATCH))
    return trak.attribute(loader(test_x, test_y)).T


def traker_trak(model, train_x, train_y, test_x, test_y, damping, dimension=2048) -> Tensor:
    """TRAKer with one model, float32, all projection columns drawn once; features are divided by the root of p."""
    from trak import TRAKer
    from trak.projectors import BasicProjector, ProjectionType

    p = sum(weight.numel() for weight in model.parameters())
    project = BasicProjector(p, dimension, seed=0, proj_type=ProjectionType.normal, device="cpu", block_size=dimension)
    with tempfile.TemporaryDirectory() as folder:
        trak = TRAKer(model, "image_classification", len(train_x), save_dir=folder, device="cpu", projector=project,
                      proj_dim=dimension, use_half_precision=False, logging_level=logging.ERROR,
                      lambda_reg=damping * len(train_x) * dimension / p)
        trak.load_checkpoint(model.state_dict(), model_id=0)
        for x, y in loader(train_x, train_y):
            trak.featurize((x, y), num_samples=len(x))
        trak.finalize_features()
        project.generate_sketch_matrix(project.generator_states[0])  # freed above; drawn anew only if in many blocks
        trak.start_scoring_checkpoint("scores", model.state_dict(), model_id=0, num_targets=len(test_x))
        trak.score((test_x, test_y), num_samples=len(test_x))
        return torch.as_tensor(np.array(trak.finalize_scores("scores"))).T


# method -> (peer on PyPI, function, settings, test points or None for all)
METHODS = OWN | {
    "captum_tracin": ("captum", captum_tracin, {}, None),
    "captum_tracin_last_layer": ("captum", captum_tracin_last_layer, {}, None),
    "kronfluence_identity": ("kronfluence", kronfluence, {"strategy": "identity"}, None),
    "kronfluence_kfac": ("kronfluence", kronfluence, {"strategy": "kfac"}, None),
    "kronfluence_ekfac": ("kronfluence", kronfluence, {"strategy": "ekfac"}, None),
    "curvlinops_kfac": ("curvlinops-for-pytorch", curvlinops_kfac, {}, None),
    "curvlinops_kfac_mc": ("curvlinops-for-pytorch", curvlinops_kfac, {"fisher": "mc"}, None),
    "curvlinops_ekfac": ("curvlinops-for-pytorch", curvlinops_kfac, {"corrected": True}, None),
    "curvlinops_ekfac_mc": ("curvlinops-for-pytorch", curvlinops_kfac, {"corrected": True, "fisher": "mc"}, None),
    "curvlinops_cg_ggn": ("curvlinops-for-pytorch", curvlinops_cg, {}, 1),
    "curvlinops_cg_hessian": ("curvlinops-for-pytorch", curvlinops_cg, {"curvature": "Hessian"}, 1),
    "pydvl_kfac": ("pydvl", pydvl_ekfac, {"corrected": False}, None),
    "pydvl_ekfac": ("pydvl", pydvl_ekfac, {"corrected": True}, None),
    "pydvl_cg": ("pydvl", pydvl_cg, {}, 1),
    "pydvl_cg_nystroem": ("pydvl", pydvl_cg, {"rank": 60}, 1),
    "pydvl_cg_block": ("pydvl", pydvl_cg, {"block": True}, 10),
    "pydvl_cg_empirical": ("pydvl", pydvl_cg, {"empirical": True}, 1),
    "dattri_graddot": ("dattri", dattri_graddot, {}, None),
    "dattri_ekfac": ("dattri", dattri_ekfac, {}, None),
    "dattri_cg": ("dattri", dattri_cg, {}, 1),
    "dattri_trak": ("dattri", dattri_trak, {}, None),
    "traker_trak": ("traker", traker_trak, {}, None),
}


def peak() -> float:
    """The largest memory that the process has held, in MB: ever, or since `forget_peak`."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def forget_peak():
    """Let the peak start again from what the process holds now, as training and the first run had theirs."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(problem: str, method: str, damping: float, **sizes) -> tuple[dict, Tensor]:
    """One run of a method after a small one: what it cost, and the scores [n_test, n_train]."""
    peer, run, settings, most = METHODS[method]
    model, train_x, train_y, test_x, test_y = PROBLEMS[problem](**sizes)
    test_x, test_y = test_x[:most], test_y[:most]
    run(copy.deepcopy(model), train_x[:WARM_UP], train_y[:WARM_UP], test_x[:2], test_y[:2], damping, **settings)
    torch.manual_seed(0)
    forget_peak()
    before = peak()
    wall, cpu = time.perf_counter(), time.process_time()
    scores = run(model, train_x, train_y, test_x, test_y, damping, **settings).detach()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return dict(peer=peer, version=version(peer), method=method, cpu_seconds=round(cpu, 3), wall_seconds=round(wall, 3),
                peak_mb=round(peak() - before, 1), n_train=len(train_x), n_test=len(test_x)), scores


def main():
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--problem", choices=PROBLEMS, required=True)
    arguments.add_argument("--method", choices=METHODS, required=True)
    arguments.add_argument("--damping", type=float, default=1e-2)
    arguments.add_argument("--out", type=Path)
    for size in ("n_train", "n_test"):
        arguments.add_argument(f"--{size.replace('_', '-')}", type=int, default=argparse.SUPPRESS)
    asked = arguments.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sizes = {name: value for name, value in vars(asked).items() if name in ("n_train", "n_test")}
    result, scores = measure(asked.problem, asked.method, asked.damping, **sizes)
    if asked.out:
        np.savez(asked.out, scores=scores.numpy())
    print(json.dumps(result))


if __name__ == "__main__":
    main()
