"""What a process does for test_distributed while another dies or hangs."""

import os
import time
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

from fastcure.training import ranks as ranks_module
from fastcure.training.ranks import join


def left_alone(rank: int, folder: Path, ports: list[int]) -> list[str]:
    """The second process dies within a job, then hangs: what the first raises, and that it did not wait longer."""
    found = []
    for name, port in zip(("hangs", "dies"), ports, strict=True):
        os.environ |= {"TORCHELASTIC_RUN_ID": name, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        deadline = timedelta(seconds=2) if name == "hangs" else timedelta(hours=1)
        try:
            with patch.object(ranks_module, "DEADLINE", deadline), join(torch.device("cpu")) as ranks:
                ranks.all_reduce_max(0)
                if rank == 1 and name == "dies":
                    os._exit(0)  # a SIGKILL closes its connections likewise
                while rank == 1 and not (folder / name).exists():
                    time.sleep(0.05)
                ranks.all_reduce_max(0)
        except (ConnectionError, TimeoutError) as error:
            found.append(f"{type(error).__name__}: {error}")
        (folder / name).touch()
        dist.destroy_process_group()
    return found
