PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.runtime
STAMP := $(VENV)/.installed
LMMS_EVAL := lmms-eval==0.7.3
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_OFFLINE ?= 1

.PHONY: install demo test test-long gpu lint docs browser npm format schemas clean

install: $(STAMP)

# pip compiles modules one at a time; COMPILE does it on all cores (some packages hold files that are no Python 3), all but
# the half that nearly nobody imports, which Python compiles when it does.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
SELDOM := /tests?/|transformers/models/(?!auto/|clip/|llama/|llava/|__init__)|lmms_eval/(models|tasks)/|torch/(testing|_inductor|onnx)/
COMPILE := $(BIN)/python -m compileall -qq -j 0 -x '$(SELDOM)' $(VENV)/lib >/dev/null 2>&1 || true

# What the demo needs. torch first and alone: from the constraints it takes the CPU build where one is offered. lmms-eval
# goes in last and without its dependencies (a full install breaks torch, transformers and peft on CPU machines); its real
# needs are the `benchmark` extra.
$(RUNTIME): pyproject.toml constraints.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e ".[benchmark]"
	$(PIP) --no-deps $(LMMS_EVAL)
	$(COMPILE)
	touch $(RUNTIME)

# And what the tests need.
$(STAMP): $(RUNTIME)
	$(PIP) -c constraints.txt -e ".[benchmark,dev]"
	$(COMPILE)
	touch $(STAMP)

demo: $(RUNTIME)
	@start=$$(date +%s); $(BIN)/dpaudit demo --out demo; code=$$?; \
	echo "make demo took $$(( $$(date +%s) - start )) s"; exit $$code

# The report's tests need a browser. Where there is none and it can't be installed they are skipped, loudly.
browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	( [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq chromium >/dev/null ) || \
	echo "WARNING: no Chromium and no way to install it: the browser tests of the report will be SKIPPED"

# axe-core (accessibility of the report) and the schema of SARIF come from npm, as archives without their dependencies.
NPM := $(VENV)/npm
NPM_PACKAGES := axe-core@4.14.1 @microsoft/jest-sarif@1.0.0-beta.0

npm: $(NPM)/.installed

$(NPM)/.installed: | install
	@mkdir -p $(NPM); cd $(NPM) && command -v npm >/dev/null && npm pack --silent $(NPM_PACKAGES) >/dev/null && \
	for file in *.tgz; do mkdir -p "$${file%.tgz}" && tar xzf "$$file" -C "$${file%.tgz}" --strip-components 1; done && \
	touch .installed || echo "WARNING: npm can't be used: axe-core and the SARIF schema are SKIPPED in the tests"

# Dealt out by module to as many processes as TESTERS says. LONG is what takes minutes a file: whole commands killed and
# damaged, fuzzing, whole trainings, clusters, contracts on language models. Fault and fuzz tests fork the test process,
# which must not carry threads or the state of other tests: a process each.
TESTERS ?= 2
LONG := tests/faults tests/fuzz tests/examples tests/test_end_to_end.py tests/test_wheel.py \
	tests/dpaudit/test_executors_ray.py tests/reports/sweep tests/attacks/bugs/test_real_trainers.py tests/test_gpu_command.py
test: install browser npm
	@start=$$(date +%s); \
	$(BIN)/python -m pytest $(addprefix --ignore=,$(LONG)) -n $(TESTERS) --dist loadscope; code=$$?; \
	echo "make test took $$(( $$(date +%s) - start )) s"; exit $$code

test-long: install browser npm
	@start=$$(date +%s); code=0; \
	for part in $(LONG); do $(BIN)/python -m pytest $$part -n $(TESTERS) --dist loadscope || code=$$?; done; \
	echo "make test-long took $$(( $$(date +%s) - start )) s"; exit $$code

# On a CUDA machine with torch, transformers, peft, opacus, dp-accounting and pytest in the present environment.
gpu:
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py --out benchmarks/results/gpu.json

lint: install docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/python .ci/dependencies.py constraints.txt

# Into build/site. A link or anchor that leads nowhere is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

schemas: install
	$(BIN)/python -m dpaudit.cli.schemas

clean:
	rm -rf $(VENV) demo build dist *.egg-info
