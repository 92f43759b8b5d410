# Everything runs in a virtual environment of its own, made on first use. PYTHON chooses the interpreter (>= 3.11).
PYTHON ?= python3
VENV   ?= .venv
CONSTRAINTS ?= constraints.txt
BIN    := $(VENV)/bin
EXAMPLES ?= $(VENV)-examples
SEED   ?= 0
FUZZ   ?= 15
FUZZ_SEED ?= $(shell date +%s)
# glibc gives freed memory back to the system at once; on a CPU, faulting it in again takes a tenth of a step.
KEEP   := MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184
PART   ?=
SAMPLE ?= 12
JOBS   ?= 2
OUT    ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: demo test api fuzz soak torchrun-soak mutate lint bench docs examples package pretrained tutorial

# One thread: images so small gain little from more, and lose much where another process is busy.
demo: $(VENV)/installed
	OMP_NUM_THREADS=1 $(KEEP) $(BIN)/fastcure finetune --preset digits --seed $(SEED) --out $(OUT)

# As many processes as there are cores, eight at most: each holds a torch of its own, and starts others, which would
# compile all modules again if none wrote them down. Kernels run on the CPU first, in triton's interpreter; then, where
# there is a GPU, on it.
test: lint
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal
	! $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || $(BIN)/python -m pytest -m gpu

# Every script in examples/, with the frameworks that they need; those for several processes on two. The frameworks have
# a virtual environment of their own. A CPU build of torch takes a CPU build of torchvision, which package indexes rarely
# have; where torchvision does not fit, timm's example is left out.
examples: $(EXAMPLES)/installed
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(EXAMPLES)/bin/python -m pytest tests/distributed/test_examples.py \
		tests/fastcure/test_documents.py tests/distributed/test_own_loops.py -k "example or process or it_runs or trainers" -v

# Wheel and sdist into dist/, each then installed alone into a fresh environment and tried.
package: $(VENV)/installed
	rm -rf dist build/try && mkdir -p build
	$(BIN)/python -m pip install --quiet --disable-pip-version-check build
	$(BIN)/python -m build --outdir dist .
	for each in dist/*.whl dist/*.tar.gz; do \
		rm -rf build/try && $(PYTHON) -m venv build/try \
		&& build/try/bin/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) $$each \
		&& (cd build && try/bin/fastcure --version && try/bin/fastcure env && try/bin/python ../tests/try_install.py) \
		|| exit 1; \
	done

# The notebook's outputs and picture, and the page made from it.
tutorial: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check nbconvert nbclient ipykernel
	cd docs && OMP_NUM_THREADS=1 ../$(BIN)/python -c "import nbclient, nbformat; book = nbformat.read('tutorial.ipynb', 4); \
		nbclient.NotebookClient(book, coalesce_streams=True, record_timing=False).execute(); \
		nbformat.write(book, 'tutorial.ipynb')"
	cd docs && ../$(BIN)/python -m nbconvert --to markdown tutorial.ipynb

# The robust network that comes with the library, trained anew and packed with its figures.
pretrained: $(VENV)/installed
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(KEEP) $(BIN)/fastcure finetune --preset digits --seed 0 --out $(OUT)
	$(BIN)/python benchmarks/pack_pretrained.py $(OUT) resnet8-digits

# After a change of the public API: its names and signatures, which a test compares, into tests/fastcure/public_api.txt.
api: $(VENV)/installed
	$(BIN)/python tests/fastcure/public_api.py

# Random cases, other ones each time: FUZZ times as many as in `make test`. FUZZ_SEED repeats them.
fuzz: $(VENV)/installed
	CUDA_VISIBLE_DEVICES= FUZZ=$(FUZZ) OMP_NUM_THREADS=1 $(BIN)/python -m pytest --hypothesis-seed=$(FUZZ_SEED) \
		tests/fastcure/test_properties.py tests/fastcure/test_foreign_code.py \
		tests/fastcure_kernels/test_kernel_properties.py

# Long runs, damaged files, and training runs that are killed and resumed.
soak: $(VENV)/installed
	CUDA_VISIBLE_DEVICES= FUZZ=100 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --hypothesis-seed=$(FUZZ_SEED) \
		tests/fastcure/test_leaks.py tests/fastcure/test_untrusted_files.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/kill_and_resume.py --kills 20

# Runs of two processes beside two busy ones: each must end with status 0, its files whole.
torchrun-soak: $(VENV)/installed
	$(BIN)/python benchmarks/finished_runs.py --runs 50 --busy 2

# Small faults put into the code, one at a time: which do the tests notice? PART=attacks for one part (pyproject.toml has
# them), SAMPLE=all for every fault instead of a sample for each file drawn with SEED, JOBS for the processes at a time.
mutate: $(VENV)/installed
	$(BIN)/python tests/mutation/mutate.py $(PART) --sample $(SAMPLE) --seed $(SEED) --jobs $(JOBS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# ONLY="resnet18 and 128" for the benchmarks whose names hold both: on a GPU there are many, and each compiles.
bench: $(VENV)/installed
	$(BIN)/python benchmarks/cost.py
	$(KEEP) $(BIN)/python -m pytest benchmarks -s -o python_files="bench_*.py" -o timeout=3600 -o faulthandler_timeout=3660 --benchmark-disable-gc -W default -k "$(ONLY)"

# Pages and API reference, as static files in site/. A warning is an error, and nothing is loaded from the network.
docs: $(VENV)/docs-installed
	$(BIN)/zensical build --clean --strict

$(VENV)/docs-installed: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[docs]"
	touch $@

$(EXAMPLES)/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(EXAMPLES)
	$(EXAMPLES)/bin/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[dev,examples]"
	$(EXAMPLES)/bin/python -c "import torchvision" || \
		$(EXAMPLES)/bin/python -m pip uninstall --quiet --yes timm torchvision
	touch $@

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[dev]"
	touch $@
