"""Cells small enough for a test: an explorer of digits and one of sentences, with the names that the tests ask for."""

import numpy as np

K, START = 8, 3  # neighbours a side of the digits' explorer, and the test point that a test finds it at

DIGITS = ["""
import numpy as np
import torch
from sklearn.datasets import load_digits
from influence_nb import Scores, Split, Task
from influence_nb.widgets import Explorer
torch.set_num_threads(1)
x, y = load_digits(return_X_y=True)
x, y = torch.tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(y)
names = tuple("zero one two three four five six seven eight nine".split())
train, test = Split(x[:400], y[:400], names), Split(x[1000:1060], y[1000:1060], names)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
for _ in range(60):
    loss = torch.nn.functional.cross_entropy(model(train.x), train.y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
task = Task(model, train, test)
""", """
def parts(split):
    errors = model(split.x).softmax(1) - torch.nn.functional.one_hot(split.y, 10)
    return errors.detach(), split.x.flatten(1)

(e, a), (f, b) = parts(test), parts(train)
everyone = (task.fingerprint(), torch.arange(60), torch.arange(400))
scores = Scores((e @ f.T) * (a @ b.T) / 400, "products of gradients", *everyone)
nearness = Scores(-torch.cdist(a, b), "nearness", *everyone, unit="minus a distance of pixels, ranked only")
axes = torch.linalg.svd(b - b.mean(0), full_matrices=False).Vh[:2].T
train_xy, test_xy = ((part - b.mean(0)) @ axes for part in (b, a))
train_xy, test_xy = train_xy.numpy(), test_xy.numpy()

class Asked:
    def scores(self, split):  # a method that is asked for one test point at a time
        return Scores(-scores.values[split.ids], "the other sign", task.fingerprint(), split.ids, torch.arange(400))
""", """
explorer = Explorer(task, {"influence": scores, "nearness": nearness, "asked": Asked()}, (train_xy, test_xy),
                    test_ids=range(60), k=8)
explorer.select(None)
start = explorer.state.to_json()
explorer.select(0)
explorer
"""]

SENTENCES = ["""
tag = "<img src=x onerror='window.broken = 1'><script>window.broken = 1</script>"
kinds = ("<i>bad</i>", "good")
read = Split(torch.randn(30, 4), torch.arange(30) % 2, kinds, tuple(f"{tag} sentence {i}" for i in range(30)))
asked = Split(torch.randn(6, 4), torch.arange(6) % 2, kinds, tuple(f"{tag} question {i}" for i in range(6)))
talk = Task(torch.nn.Linear(4, 2), read, asked)
opinions = Scores(torch.randn(6, 30), "made up", talk.fingerprint(), torch.arange(6), torch.arange(30))
sentences = Explorer(talk, {"<i>scores</i>": opinions}, (read.x[:, :2], asked.x[:, :2]), k=4)
sentences
"""]


def top(kernel, test_id, scores="scores"):
    """(helpful, harmful) by the kernel's scores, past the explorer."""
    values = np.array(kernel.ask(f"{scores}.row({test_id})"))
    order = np.argsort(-values, kind="stable")
    helpful, harmful = order[:K], np.argsort(values, kind="stable")[:K]
    if scores == "scores":  # removal effects: only those of the right sign are called so
        helpful, harmful = helpful[values[helpful] > 0], harmful[values[harmful] < 0]
    assert kernel.ask(f"{scores}.top({test_id}, {K})")[1::2] == [helpful.tolist(), harmful.tolist()]
    return helpful.tolist(), harmful.tolist()
