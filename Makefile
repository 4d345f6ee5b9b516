# Every target does its own set-up: a virtual environment in .venv, installed with the tested
# versions (constraints.txt). Without the constraints pip would take the newest torch there is.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := build/demo
# A ResNet-20 trained on CIFAR-10, and its stages.
RESNET := examples/resnet20-cifar10
RESNET_MODEL := $(RESNET).pt --arch examples.cifar_models:resnet20

# The first interpreter that torch has wheels for; override with `make PYTHON=/path/to/python`.
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$python" -c '$(SUPPORTED)' 2>/dev/null && { command -v "$$python"; break; }; done)

# One test process per core, and one thread in each: the tests mostly trace graphs in Python.
PYTEST_FLAGS ?= -n auto --maxprocesses 8

.PHONY: help venv lint test fuzz mutants zoo zoo-table errors-page tutorial calibration cifar10 compile-time timing faults demo clean
.DELETE_ON_ERROR:

help: ## List the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/make \1	\2/p' $(MAKEFILE_LIST)

venv: $(STAMP) ## Create .venv and install this project with the tested versions

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { \
		echo "No Python 3.11 to 3.14 found; name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev,examples]' --constraint constraints.txt
	@touch $@

lint: $(STAMP) ## Style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint ## Everything that a change must pass
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS)

mutants: $(STAMP) ## Verification against thousands of changed networks (make test tries a few hundred)
	S2D_MUTANTS=10 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s -q tests/test_network_mutations.py

fuzz: $(STAMP) ## Files and plans damaged at random, an hour and a half; findings in fuzzing-*.log
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzzing files --minutes 60
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzzing operators --minutes 15
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzzing plans --minutes 15

zoo: $(STAMP) ## Every classification model of torchvision (make test tries an eighth, by the day)
	S2D_ZOO=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS) tests/test_zoo.py tests/test_interfaces.py tests/test_masking.py

zoo-table: $(STAMP) ## docs/zoo.md: torchvision and timm compiled and proven (hours; goes on where it stopped)
	$(BIN)/python -m benchmarks.zoo torchvision
	$(BIN)/python -m benchmarks.zoo segmentation
	$(BIN)/python -m benchmarks.zoo timm
	$(BIN)/python -m benchmarks.zoo --write docs/zoo.md

errors-page: $(STAMP) ## docs/errors.md, from the docstrings of the errors
	$(BIN)/python -m docs.errors_page

tutorial: $(STAMP) ## Run the commands of docs/tutorial.md, and fill in what they print
	OMP_NUM_THREADS=1 $(BIN)/python -m docs.tutorial_page --write

calibration: $(STAMP) ## The figures of docs/calibration.md: brute force, time, broken promises (half an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.calibration solve
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.calibration promises

cifar10: $(STAMP) ## docs/cifar10.md: train every row (hours; goes on where it stopped): make cifar10 DATA=cifar10:/data
	@test -n "$(DATA)" || { echo "Name the images: make cifar10 DATA=cifar10:/data" >&2; exit 1; }
	$(BIN)/python -m benchmarks.cifar10 --data $(DATA)

compile-time: $(STAMP) ## docs/compile-time.md: the compiler's own time and memory, beside Torch-Pruning
	$(BIN)/python -m pip install --quiet --editable '.[benchmarks]' --constraint constraints.txt
	$(BIN)/python -m benchmarks.compile_time --write docs/compile-time.md

timing: $(STAMP) ## docs/early-exit-time.md, docs/against-earlyon.md, figures of docs/running.md (an hour, quiet machine)
	$(BIN)/python -m pip install --quiet --editable '.[benchmarks]' --constraint constraints.txt
	$(BIN)/python -m benchmarks.early_exit
	$(BIN)/python -m benchmarks.against_earlyon --write docs/against-earlyon.md
	$(BIN)/python -m benchmarks.running overhead
	$(BIN)/python -m benchmarks.running memory
	$(BIN)/python -m benchmarks.running deadline

faults: $(STAMP) ## Interruptions at every line of the writing and at hundreds of random moments
	S2D_FAULTS=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS) \
		tests/test_faults.py tests/test_interruptions.py tests/test_determinism.py \
		tests/test_training_faults.py

demo: $(STAMP) ## Train, compile, train stages, calibrate, evaluate: digits; then a trained ResNet-20 (three minutes)
	@mkdir -p $(DEMO)
	$(BIN)/python -m examples.digits train --output $(DEMO)/model.pt
	$(BIN)/s2d-compile $(DEMO)/model.pt --arch examples.digits:build \
		--splits examples/digits.json -o $(DEMO)/dyn.pt
	$(BIN)/s2d train $(DEMO)/dyn.pt --data examples.digits:dataset --split train --epochs 60 \
		--batch-size 64 --optimizer adamw --lr 0.005 --schedule one-cycle --crop-padding 1 \
		--teacher $(DEMO)/model.pt --arch examples.digits:build --temperature 2 \
		--resume never -o $(DEMO)/dyn-trained.pt
	$(BIN)/python -m examples.digits eval $(DEMO)/model.pt $(DEMO)/dyn.pt $(DEMO)/dyn-trained.pt
	$(BIN)/s2d calibrate $(DEMO)/dyn-trained.pt --data examples.digits:dataset \
		--split 'test[:225]' --target drop=3% --confidence 0.95 -o $(DEMO)/dyn-calibrated.pt
	$(BIN)/s2d eval $(DEMO)/dyn-calibrated.pt --data examples.digits:dataset \
		--split 'test[225:]' --plot $(DEMO)/trade-off.png
	$(BIN)/s2d-compile $(RESNET_MODEL) --splits $(RESNET).json -o $(DEMO)/resnet20.pt
	$(BIN)/s2d verify $(RESNET_MODEL) $(RESNET)-dyn.pt --trained
	$(BIN)/s2d calibrate $(RESNET)-dyn.pt --records $(RESNET)-held-out.npz --split '[:2500]' \
		--target drop=1% --confidence 0.95 -o $(DEMO)/resnet20-calibrated.pt
	$(BIN)/s2d eval $(DEMO)/resnet20-calibrated.pt --records $(RESNET)-held-out.npz \
		--split '[2500:]' --plot $(DEMO)/resnet20-trade-off.png
	$(BIN)/s2d bench $(DEMO)/resnet20-calibrated.pt --static $(RESNET_MODEL) --batch 32 \
		--backends eager --backends onednn --distribution 75/4/21

clean: ## Remove what the targets made, the virtual environment included
	rm -rf $(VENV) build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
