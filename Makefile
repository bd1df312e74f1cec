.DEFAULT_GOAL := help
.PHONY: help run test test-all lint peers bench clean

PYTHONS := python3.9 python3.10 python3.11 python3.12 python3.13 python3.14
TOOLS := ruff==0.17.6 mypy==1.20.2 vermin==1.9.2
SOURCES := dotproxy.py test_dotproxy.py

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: ## run the proxy on port 5353 of this machine
	python3 dotproxy.py

test: ## run the tests
	python3 -X dev -W error test_dotproxy.py

test-all: ## run the tests with every Python from 3.9 to 3.14 that works here
	@for python in $(PYTHONS); do $$python -V 2>/dev/null || continue; \
	$$python -X dev -W error test_dotproxy.py || exit; done

lint: .venv/bin/vermin ## check style, types and that Python 3.9 is enough
	.venv/bin/ruff check . .ci/peers.py
	.venv/bin/mypy --strict --python-version 3.9 $(SOURCES)
	.venv/bin/mypy --strict --python-version 3.9 .ci/peers.py
	.venv/bin/vermin -t=3.9- --no-tips --violations $(SOURCES)

.venv/bin/vermin: Makefile
	python3 -m venv --clear .venv && .venv/bin/pip install -q $(TOOLS)

peers: ## check with real DNS programs on both sides (see .ci/run for what it needs)
	python3 .ci/peers.py

bench: ## measure beside unbound (needs dnsperf, dnsdist and unbound)
	python3 .ci/peers.py --bench

clean: ## remove what the other targets made
	rm -rf .venv .mypy_cache .ruff_cache __pycache__
