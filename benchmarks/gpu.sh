#!/usr/bin/env bash
# gpu.sh OUT [PARTS]: what one GPU can tell in nine minutes, the most important first, from a source tree; nothing is
# installed. Every part has a limit of its own and writes its CSV into OUT as it goes; OUT/summary.txt says how each
# ended, and OUT/log.txt has their output. PYTHON chooses the interpreter (python3), which must have torch, triton,
# numpy and pytest with pytest-benchmark; BENCH_COMMIT names the commit where there is no git history.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
[ $# -ge 1 ] || { sed -n '2,5s/^# //p' "$0"; exit 2; }
mkdir -p "$1" && OUT=$(cd "$1" && pwd) && shift || exit
PYTHON=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=$PWD:$PWD/kernels:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}
export BENCH_RESULTS=$OUT BENCH_SECONDS=${BENCH_SECONDS:-4} TMPDIR=${TMPDIR:-/tmp}
parts=${*:-tests host step kernels double_backward vit attacks large autotune resnet50 precision measures finetune}

has() { "$PYTHON" -c "import sys, importlib.util as u; sys.exit(not u.find_spec('$1'))"; }
bench() { "$PYTHON" -m pytest -s -q -p no:cacheprovider -o python_files='bench_*.py' -o timeout=0 --benchmark-disable-gc -W default "$@"; }

tests() {
  local options=() files=(tests/fastcure/test_gpu.py tests/fastcure/test_cuda_graph.py tests/fastcure/test_auto.py
    tests/fastcure/test_auto_fallback.py tests/fastcure/test_attacks_gpu.py tests/fastcure/test_pending_norm.py
    tests/fastcure/test_data_loader.py tests/fastcure/test_random_start.py tests/fastcure_kernels)
  ! has xdist || options+=(-n 8 --maxprocesses 8 --dist worksteal)
  has hypothesis || options+=(--ignore=tests/fastcure_kernels/test_kernel_properties.py)
  has pyautoattack || options+=(--deselect=tests/fastcure/test_attacks_gpu.py::test_autoattack_and_the_checklist_run)
  "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider -p no:benchmark -o addopts="-ra --strict-markers --import-mode=importlib" \
    "${options[@]}" "${files[@]}"
}
host() { "$PYTHON" benchmarks/host_cost.py; }
autotune() { "$PYTHON" benchmarks/host_cost.py --autotune --only "(frozen|train|preset), auto|pgd"; }
step() { bench benchmarks/bench_step.py -k "resnet18 and batch and 128"; }
kernels() { BENCH_SECONDS=1 bench benchmarks/bench_kernels.py; }
double_backward() { bench benchmarks/bench_double_backward.py; }
vit() { BENCH_ENGINES="eager auto" bench benchmarks/bench_step.py -k "vit and 128"; }
large() { BENCH_ENGINES="eager auto" bench benchmarks/bench_step.py -k "resnet18 and 512"; }
resnet50() { bench benchmarks/bench_large_images.py; }
attacks() { bench benchmarks/bench_attacks.py -k "128 or 512"; }
precision() { bench benchmarks/bench_precision.py; }
measures() { bench benchmarks/bench_measures.py -k "128"; }
finetune() { "$PYTHON" -m fastcure finetune --preset digits --device cuda --out "$(mktemp -d)/run"; }

declare -A limits=([tests]=150 [host]=120 [step]=120 [kernels]=90 [double_backward]=60 [vit]=60 [attacks]=30 [large]=90
  [autotune]=80 [resnet50]=90 [precision]=150 [measures]=60 [finetune]=60)
export PYTHON
export -f has bench $(compgen -A function | grep -E "^(tests|host|step|kernels|double_backward|vit|large|autotune|resnet50|attacks|precision|measures|finetune)$")
end=$((SECONDS + ${LIMIT:-540}))
for part in $parts; do
  began=$SECONDS left=$((end - SECONDS)) limit=${limits[$part]:-60}
  [ "$left" -ge 10 ] || { echo "$part: left out, no time" | tee -a "$OUT/summary.txt"; continue; }
  [ "$limit" -le "$left" ] || limit=$left
  echo "== $part" >>"$OUT/log.txt"
  timeout -k 5 "$limit" bash -c "$part" >>"$OUT/log.txt" 2>&1
  status=$?
  case $status in 0) word=done ;; 124 | 137) word="stopped at its limit" ;; *) word="failed with $status" ;; esac
  echo "$part: $word, $((SECONDS - began)) of $limit s" | tee -a "$OUT/summary.txt"
done
