"""Attacks on the network of a stage: in what space they search, and what accuracy is left."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sparsepipe.artefact import Artefact, find
from sparsepipe.benchmark.statistics import wilson
from sparsepipe.formats.tensors import read_tensors
from sparsepipe.progress import track
from sparsepipe.runtime.inputs import rename
from sparsepipe.runtime.network import OnnxNetwork
from sparsepipe.runtime.samples import Samples
from sparsepipe.sparsity.attacks import pgd
from sparsepipe.sparsity.modifiers.bort import BRANCH
from sparsepipe.spec import Preprocessing
from sparsepipe.stages.input_space import input_space
from sparsepipe.stages.reference import Network, TorchNetwork

if TYPE_CHECKING:
    from sparsepipe.stages.validate import Attack

NOTE = "The attack was made on the PyTorch network, with its gradients; the files got the same inputs (transferred)."


def branches(source: Artefact, network: TorchNetwork) -> list[torch.nn.Module]:
    """The other branches of the training that a network comes from, where it was trained in branches.

    Args:
        source: the folder of the network, beside that of its training.
        network: one of the branches.

    Raises:
        ArtefactError: a file is missing or damaged, or the network was made from another training.
    """
    trained = find(source.folder.absolute().parent, "train")
    found = []
    for name in trained.manifest.outputs if trained else ():
        if trained and name.startswith(BRANCH):
            branch = deepcopy(network.module)
            state = read_tensors(trained.file(name)).tensors
            branch.load_state_dict({key: torch.from_numpy(np.array(value)) for key, value in state.items()})
            found.append(branch)
    return found


def robustness(
    attack: Attack,
    network: TorchNetwork,
    files: Sequence[OnnxNetwork],
    samples: Samples,
    preprocessing: Preprocessing,
    seed: int,
    branches: Sequence[torch.nn.Module] = (),
) -> dict[str, Any]:
    """Accuracy on inputs that PGD made against `network`, of the network (white-box) and of files (transferred).

    Args:
        attack: radius and steps.
        network: whose gradients are followed.
        files: that get the same inputs.
        samples: with labels; all are attacked.
        preprocessing: of these samples.
        seed: of the random starts.
        branches: that are attacked together with the network in a second attack, of which the result is `joint`.

    Raises:
        ModelError: the network fails.
    """
    step_size = attack.step_size or 2.5 * attack.epsilon / attack.steps

    def survivors(targets: Sequence[torch.nn.Module], networks: Sequence[Network]) -> list[dict[str, Any]]:
        """The accuracy of each network on inputs made against all targets together."""
        correct = [0] * len(networks)
        torch.manual_seed(seed)
        for batch in track(samples, "Attacking", len(samples)):
            ((name, values),) = batch.inputs.items()
            assert batch.labels is not None
            labels = np.pad(batch.labels, (0, len(values) - batch.count), mode="edge")
            found = pgd(
                targets,
                torch.from_numpy(np.ascontiguousarray(values)),
                torch.from_numpy(labels.astype(np.int64)),
                epsilon=attack.epsilon,
                step_size=step_size,
                steps=attack.steps,
                space=input_space(preprocessing, values.shape[1:]),
            )
            attacked = {name: found.numpy()}
            for index, each in enumerate(networks):
                logits = batch.outputs(each.run(rename(attacked, samples.inputs, each.inputs)))[0]
                correct[index] += int((logits.argmax(1) == batch.labels).sum())
        total = samples.count
        return [{**asdict(wilson(each, total)), "correct": each, "samples": total} for each in correct]

    with torch.random.fork_rng([]):
        own, *others = survivors([network.module], [network, *files])
        joint = survivors([network.module, *branches], [network])[0] if branches else None
    return {
        "name": attack.name,
        "epsilon": attack.epsilon,
        "steps": attack.steps,
        "step_size": step_size,
        "network": own,
        "joint": joint,
        "branches": len(branches) + 1,
        "files": [{"file": file.name, "accuracy": accuracy} for file, accuracy in zip(files, others, strict=True)],
        "note": NOTE,
    }
