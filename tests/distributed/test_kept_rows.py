"""Rows that an objective keeps of each sample are, after every step, the same in two processes as in one."""

from pathlib import Path

import torch
import torch.distributed as dist
from keeping import Keeping
from torch import Tensor, nn
from two_processes import in_two_processes

from fastcure.data import Augment, Loader
from fastcure.schedules import schedule
from fastcure.training.epoch import train_steps
from fastcure.training.optimizer import make_optimizer
from fastcure.training.ranks import Ranks
from fastcure.training.tally import Tally

EPOCHS, BATCH, N = 3, 4, 13


def train(ranks: Ranks) -> list[Tensor]:
    """Train on batches of 4, 4, 4 and 1, so that a process gets an image that does not count; return all buffers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (N, 1, 6, 6), dtype=torch.uint8, generator=generator)
    torch.manual_seed(0)
    objective = Keeping(nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 3)).double(), 0.1)
    objective.allocate(N, x.shape[1:])
    objective.double()
    augment, share = Augment(pad=1, flip=True), (ranks.rank, ranks.size)
    loader = Loader(x, torch.arange(N) % 3, BATCH, augment=augment, generator=generator, share=share)
    optimizer, tally = make_optimizer(objective.model.parameters(), "sgd"), Tally(ranks.device)
    for _ in range(EPOCHS):
        batches = (
            (step, 0.0, ranks.counted(batch._replace(x=batch.x.double()), min(BATCH, N - BATCH * step)))
            for step, batch in enumerate(loader.batches())
        )
        list(train_steps(objective, batches, optimizer, {"lr": schedule("0.1", 1, "lr")}, tally, ranks))
    return [objective.last, objective.uses, *objective.model.parameters()]


def both(rank: int, store: str) -> list[list[list[Tensor]]]:
    """What this process alone finds, and then what each of the two has found in the end."""
    alone = [tensor.detach() for tensor in train(Ranks(torch.device("cpu")))]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    together = [tensor.detach() for tensor in train(Ranks(torch.device("cpu"), rank, 2))]
    every: list[list[Tensor]] = [[], []]
    dist.all_gather_object(every, together)
    signs = torch.tensor([[-0.0, 1.0]]) if rank else torch.tensor([[torch.nan, -0.0], [2.0, 3.0]])
    gathered = Ranks(torch.device("cpu"), rank, 2).gather([signs, signs > 0], 3)
    return [[alone], every, [gathered]]


def test_rows_are_those_of_one_process_and_alike_in_both(tmp_path: Path) -> None:
    (alone,), every, ((rows, positive),) = in_two_processes(both, str(tmp_path / "store"))
    for one, two, wanted in zip(*every, alone, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, wanted, rtol=1e-10, atol=1e-12)
    assert every[0][1].tolist() == [EPOCHS] * N
    assert torch.count_nonzero(every[0][0]) > every[0][0].numel() / 2
    assert rows.nan_to_num(nan=9.0).tolist() == [[9.0, 0.0], [0.0, 1.0], [2.0, 3.0]]
    assert rows.signbit().tolist()[:2] == [[False, True], [True, False]]
    assert positive.tolist() == [[False, False], [False, True], [True, True]]
