# Every target sets up what it needs in folders of this one: .venv, and what only one target needs in .venv-openvino,
# .venv-perf, .venv-peers, .venv-fuzz and .conformance.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.runtime
DEV := $(VENV)/.dev
OPENVINO := .venv-openvino
PERF := .venv-perf
PEERS := .venv-peers
FUZZ := .venv-fuzz
SECONDS := 60
CONFORMANCE := .conformance

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow campaign conformance test-openvino test-perf fuzz check bench bench-peers wheel-client clean

help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

$(BIN)/python:
	@PYTHON=$(PYTHON) sh packaging/make-venv.sh $(VENV)

$(RUNTIME): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[cpu]'
	@touch $@

$(DEV): pyproject.toml $(RUNTIME)
	$(BIN)/python -m pip install --quiet --editable '.[cpu,dev]'
	@touch $@

## make demo           classify real files with a real, signed model through the socket
demo: $(RUNTIME)
	@$(BIN)/skerry demo

## make test           the test suite
test: $(DEV)
	$(BIN)/python -m pytest -m 'not slow and not campaign'

## make test-slow      the tests that take minutes
test-slow: $(DEV)
	$(BIN)/python -m pytest -m slow

## make campaign       power cuts, faults of the disk and kills by the thousand; SEED=N repeats one
campaign: $(DEV)
	SEED=$(SEED) $(BIN)/python -m pytest -m campaign

$(CONFORMANCE)/.made: packaging/conformance-suite.sh
	@PYTHON=$(PYTHON) sh packaging/conformance-suite.sh $(CONFORMANCE)

## make conformance    TUF's conformance suite against our client; CONFORMANCE_SUITE=DIR names a clone of it
conformance: $(RUNTIME) $(CONFORMANCE)/.made
	cd $(CONFORMANCE)/suite && ../bin/python -m pytest -q -p no:cacheprovider -c pyproject.toml --rootdir . \
		tuf_conformance --entrypoint '$(CURDIR)/$(BIN)/python $(CURDIR)/tests/conformance/client.py'

$(OPENVINO)/.made: pyproject.toml packaging/second-ep-venv.sh | $(BIN)/python
	@PYTHON=$(PYTHON) sh packaging/second-ep-venv.sh $(OPENVINO)
	@touch $@

## make test-openvino  the tests of a second execution provider, on the OpenVINO core
test-openvino: $(DEV) $(OPENVINO)/.made
	SKERRY_OPENVINO_VENV=$(OPENVINO) $(BIN)/python -m pytest tests/providers/test_second_ep.py

$(PERF)/bin/perf_analyzer: packaging/perf-analyzer.sh | $(BIN)/python
	@PYTHON=$(BIN)/python sh packaging/perf-analyzer.sh $(PERF)

## make test-perf      Triton's perf_analyzer measures the daemon
test-perf: $(DEV) $(PERF)/bin/perf_analyzer
	SKERRY_PERF_ANALYZER=$(PERF)/bin/perf_analyzer $(BIN)/python -m pytest tests/agent/test_perf_analyzer.py

# Only atheris lies there. Where it has no wheel, chance alone makes the inputs.
$(FUZZ)/.made: | $(BIN)/python
	-$(BIN)/python -m pip install --quiet --target $(FUZZ) --no-deps --only-binary :all: atheris==3.0.0
	@mkdir -p $(FUZZ) && touch $@

## make fuzz           damaged files at the parsers of what strangers send; SECONDS=60 for each, PARSERS="tuf tar"
fuzz: $(DEV) $(FUZZ)/.made
	@PYTHONPATH=$(FUZZ) $(BIN)/python tests/fuzz/fuzz.py --seconds $(SECONDS) $(PARSERS)

## make check          lint, types, import rules
check: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

## make bench          measure, side by side with the floor; writes benchmarks/RESULTS.md
bench: $(DEV)
	@$(BIN)/python benchmarks/run.py

$(PEERS)/.made: benchmarks/peers/install.sh | $(BIN)/python
	@PYTHON=$(PYTHON) sh benchmarks/peers/install.sh $(PEERS)
	@touch $@

## make bench-peers    the same, and other servers on the same models
bench-peers: $(DEV) $(PEERS)/.made
	@$(BIN)/python benchmarks/run.py --peers

## make wheel-client   the client alone, as a wheel that needs only numpy, into dist/
wheel-client: $(DEV)
	@PYTHON=$(CURDIR)/$(BIN)/python sh packaging/build-client.sh dist

## make clean          remove what the other targets made
clean:
	rm -rf $(VENV) $(OPENVINO) $(PERF) $(PEERS) $(FUZZ) $(CONFORMANCE) .fuzz .bench .hypothesis build dist
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
