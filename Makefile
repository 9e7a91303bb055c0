# Every way in. `make` alone explains itself.

PYTHON  ?= /usr/bin/python3
PREFIX  ?= /usr/local
DESTDIR ?=
VENV    := .venv
CACHE   := .cache
BIN     := $(CURDIR)/$(VENV)/bin
COMMANDS := $(notdir $(wildcard bin/vm-*))
PAGES   := $(wildcard man/*.[1-8])
TESTS   ?= tests
PYTEST   = $(BIN)/pytest --numprocesses 2 --dist worksteal
FUZZ_TIME ?= 60
# Where the commands and everything else that make needs are found first.
export PATH := $(BIN):$(PATH):/usr/sbin:/sbin

.PHONY: help env demo quick check check-rest check-all check-qemu10 check-gpg24 check-long lint test fuzz bench man \
    install uninstall clean apt

help:
	@echo 'make demo          save a running guest, encrypted, end it, bring it back (sets everything up first)'
	@echo 'make quick         lint, types and the tests without a guest; some minutes'
	@echo 'make check         the same, and with real guests what each command does (sets everything up first)'
	@echo 'make check-all     every test, with both QEMUs; an hour'
	@echo 'make check-qemu10  the guest tests with the QEMU of Debian 13'
	@echo 'make check-gpg24   the tests of vm-encrypt with the GnuPG of Debian 13'
	@echo 'make check-long    hundreds of moves that die at every moment; an hour'
	@echo 'make env           only the set-up: system packages, $(VENV), the test guest'
	@echo 'make lint          ruff, mypy, man pages'
	@echo 'make test          the tests alone; TESTS=tests/unit for some of them'
	@echo 'make fuzz          any bytes as a state, for FUZZ_TIME (now $(FUZZ_TIME)) seconds; goes on in $(CACHE)/fuzz'
	@echo 'make bench         figures beside what one would pick instead; writes bench/out/'
	@echo 'make man           the man pages as text, in build/man'
	@echo 'make install       into PREFIX (now $(PREFIX)), below DESTDIR'
	@echo 'make clean         remove what was made; the downloaded guest stays in $(CACHE)'

env: apt $(VENV)/.stamp
	@tests/image/build $(CACHE)/guest

apt:
	@tests/apt tests/apt.txt tests/image/apt.txt

$(VENV)/.stamp: setup.cfg pyproject.toml $(wildcard bin/vm-*) Makefile
	@echo 'env: the toolkit and its development packages into $(VENV)'
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --use-pep517 --editable '.[dev]'
	@touch $@

demo: env
	@tests/demo

quick: $(VENV)/.stamp apt lint
	@tests/tier quick 6 $(PYTEST) tests/unit tests/cli

check: env lint
	@tests/tier check 22 $(PYTEST) $(TESTS)

# What of all tests `check` leaves out, and those with real guests once more with the other QEMU.
check-rest: env
	@tests/tier rest 40 $(PYTEST) $(TESTS)

check-all: check check-rest check-qemu10 check-gpg24

test:
	@$(PYTEST) $(TESTS)

check-qemu10: env
	@tests/qemu10 $(CACHE)/qemu10
	@VM_QEMU="$(CURDIR)/$(CACHE)/qemu10.sh" tests/tier qemu10 40 $(PYTEST) tests/guest \
	    --ignore tests/guest/test_examples.py --ignore tests/guest/test_bench.py

check-gpg24: env
	@tests/qemu10 $(CACHE)/qemu10
	@PATH="$(CURDIR)/$(CACHE)/qemu10.bin:$$PATH" $(PYTEST) tests/cli/test_encrypt.py tests/cli/test_keys.py tests/unit/encrypt

check-long: env
	@$(PYTEST) tests/long/check_link.py

fuzz: $(VENV)/.stamp
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check atheris
	@$(BIN)/python tests/fuzz/fuzz_stream.py $(CACHE)/fuzz -max_total_time=$(FUZZ_TIME)

lint:
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@mandoc -T lint -W warning $(PAGES)

# On QEMU 10.0: the one of Debian 12 loses pages under TCG, so that live rows would measure a pause.
# The commands as they are installed: those in $(VENV) are found by a slower start.
bench: env
	@tests/qemu10 $(CACHE)/qemu10
	@$(MAKE) --no-print-directory install PREFIX='$(CURDIR)/$(CACHE)/installed'
	@VM_BIN='$(CURDIR)/$(CACHE)/installed/bin' VM_QEMU="$${VM_QEMU:-$(CURDIR)/$(CACHE)/qemu10.sh}" $(BIN)/python bench/run

man:
	@mkdir -p build/man
	@for page in $(PAGES); do mandoc -T utf8 $$page | col -b > build/man/$$(basename $$page).txt; done
	@ls build/man

install:
	@PYTHON='$(PYTHON)' PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' ./install $(COMMANDS)

uninstall:
	rm -rf '$(DESTDIR)$(PREFIX)/lib/vmstate'
	cd '$(DESTDIR)$(PREFIX)' && rm -f $(COMMANDS:%=bin/%) $(COMMANDS:%=share/bash-completion/completions/%) \
	    $(foreach page,$(PAGES),share/man/man$(subst .,,$(suffix $(page)))/$(notdir $(page)))

clean:
	rm -rf build $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis bench/out lib/*.egg-info
	find . -name __pycache__ -not -path './.cache/*' -prune -exec rm -rf {} +
