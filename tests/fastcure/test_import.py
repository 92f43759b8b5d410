"""What importing the library costs, and that it needs neither triton nor the extras."""

import subprocess
import sys

CORE = "import fastcure, fastcure.attacks, fastcure.models, fastcure.evaluation.accuracy; "


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_it_loads_little_beside_torch() -> None:
    code = "import torch, sys; before = set(sys.modules); " + CORE + "print(*sorted(set(sys.modules) - before))"
    loaded = run(code).split()
    assert {name.split(".")[0] for name in loaded} <= {"fastcure", "fastcure_kernels", "fractions", "torch"}
    # The torch modules that these add are small; none of the slow ones is among them.
    assert not [name for name in loaded if name.startswith(("torch._dynamo", "torch._inductor", "triton"))]


def test_it_works_without_triton_and_the_extras() -> None:
    blocked = ["triton", "sklearn", "scipy", "datasets", "matplotlib", "PIL", "tqdm", "safetensors"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked}))\n"
        "import torch; from fastcure import CURE; from fastcure.attacks import pgd\n"
        "from fastcure.models import resnet8; import fastcure.data\n"
        "model = resnet8(in_channels=1); x, y = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])\n"
        "CURE(model)(x, y).total.backward(); print(float(pgd(model, x, y).max()) <= 1)"
    )
    assert run(code) == "True"
