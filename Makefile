# `make demo` and `make test` set themselves up in .venv; Python 3.11 or newer.
PYTHON ?= python3
SCALE ?=
RUNS ?= runs$(subst :,/,$(SCALE))
VENV := .venv
BIN := $(VENV)/bin
# One test process more than cores, because some tests wait for others.
TESTERS := $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)
PYTEST := $(BIN)/python -m pytest -q -n $(TESTERS) --dist worksteal --durations=10

.PHONY: demo test test-all test-every test-tpu test-gpu test-extras check docs \
  clean

$(VENV)/installed: requirements.txt setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Python 3.11 or newer is needed: make PYTHON=python3.12 ...'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[docs,test]'
	touch $@

# ResIST on four workers, then local SGD on the same budget, then both at once;
# tested before and after each round, for curves that begin at round 0.
DEMO := $(BIN)/python -m resist_jax --config=experiments/configs/digits.py$(SCALE) \
  --config.evaluation.at_start=True --config.eval_every=1
demo: $(VENV)/installed
	$(DEMO) --workdir=$(RUNS)/resist --config.protocol=resist
	$(DEMO) --workdir=$(RUNS)/local_sgd --config.protocol=local_sgd
	$(BIN)/python -m resist_jax.report $(RUNS)/resist $(RUNS)/local_sgd \
	  --out=$(RUNS)/report
	@echo 'both side by side: $(RUNS)/report/report.html'

# Every theorem, each by the cheapest cases that cover it.
test: $(VENV)/installed
	$(PYTEST) -m 'not (slow or faults or notebooks or experiments)'

# And processes that die, notebooks and experiments.
test-all: $(VENV)/installed
	$(PYTEST) -m 'not slow'

# Every case of every product.
test-every: $(VENV)/installed
	$(PYTEST)

# The compilers of accelerators, each in an environment of its own, which sees the
# packages of the first one: no device is needed, and nothing runs.
SITE := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
EXTRAS = $*
$(VENV)/%/installed: $(VENV)/installed
	$(BIN)/python -m venv $(VENV)/$*
	echo "import site; site.addsitedir('$$($(BIN)/python $(SITE))')" \
	  > "$$($(VENV)/$*/bin/python $(SITE))/outer.pth"
	$(VENV)/$*/bin/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	touch $@

test-tpu: $(VENV)/tpu/installed
	$(VENV)/tpu/bin/python -m pytest -q -k 'v5e or devices' tests/experiments/test_compile.py

test-gpu: $(VENV)/cuda/installed
	$(VENV)/cuda/bin/python -m pytest -q -k 'h100 or devices' \
	  tests/experiments/test_compile.py

# Those that are skipped without a library that few need. It takes gigabytes.
NEED_EXTRAS := $(addprefix tests/run/, test_formats.py test_from_torch.py \
  test_callbacks.py test_module_task.py test_elastic.py) \
  tests/data/test_hugging_face_source.py
$(VENV)/extras/installed: EXTRAS = export,huggingface,wandb,elastic,test
test-extras: $(VENV)/extras/installed
	$(subst $(BIN)/,$(VENV)/extras/bin/,$(PYTEST)) $(NEED_EXTRAS)

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

# Any warning is an error; nothing is fetched from the network.
docs: $(VENV)/installed
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --fresh-env --quiet \
	  docs build/docs
	@echo 'build/docs/index.html'

clean:
	rm -rf $(VENV) $(addprefix $(RUNS)/, resist local_sgd report) build *.egg-info
