# Everything runs from .venv, which is made here and holds exactly the versions of .lock.txt.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PYTHON ?= python3 python3.14 python3.13 python3.12 python3.11
BIN := .venv/bin
DEMO := model/nano/demo

.PHONY: help demo check test nano exam gpu compiler broker soundcard browsers lock clean
help:
	@echo 'make demo    a spoken question about a picture, answered in this terminal; then the page, at http://localhost:8765 (SERVE=no: without)'
	@echo 'make check   lint, types and the quick tests, in under three minutes'
	@echo 'make test    lint, types and all tests (ARGS="tests/test_turns.py": these tests)'
	@echo 'make nano    train the embedded checkpoint, or go on training it (ARGS="--minutes 60"); with KOKORO=FOLDER it makes'
	@echo '             a bank of neural voices first, and without it hears espeak-ng and flite alone (model/nano/CARD.md)'
	@echo 'make exam    examine the embedded checkpoint (ARGS="--seed 7")'
	@echo 'make gpu     measure what only a CUDA device can tell, in 400 seconds, into build/gpu.json'
	@echo 'make lock    resolve the versions of .lock.txt anew'
	@echo 'make clean   remove what was made here, but not the progress of a training in build/nano'

demo: .venv/demo
	@mkdir -p build
	$(BIN)/attend ask --model nano --audio $(DEMO)/question.wav --image $(DEMO)/picture.jpg --mark-image build/answer.png
	@$(WATCHED) || exit 0; echo; echo 'now the page: open it, and press Ctrl-C here to end it'; exec $(BIN)/attend serve --model nano

# Who watches gets the page too; a script or CI gets the answer alone. SERVE=yes or no decides.
SERVE ?=
WATCHED = case "$(SERVE)" in yes) true;; no) false;; *) test -t 0 -a -t 1 -a -z "$${CI:-}";; esac

# What needs more of the system than the demo, or more than a few seconds, is marked slow.
check: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -m 'not slow' $(ARGS)

test: .venv/test compiler broker soundcard browsers build/node/stamp build/homeassistant/stamp
	@$(call need,openssl version,openssl)
	@$(call need,ldconfig -p | grep libflite_cmu_us_slt,flite)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest $(ARGS)

# glibc gives freed tensors back to the system, and a quarter of a training step then goes into page faults.
nano: export MALLOC_MMAP_MAX_ := 0
nano: export MALLOC_TRIM_THRESHOLD_ := 100000000000
nano: export MALLOC_TOP_PAD_ := 536870912
nano: SENTENCES ?= 10000
nano: .venv/demo compiler
	$(if $(KOKORO),$(BIN)/python -m model.nano.kokoro $(KOKORO) --sentences $(SENTENCES))
	$(BIN)/python -m model.nano.train $(ARGS)

# What torch.compile needs.
compiler: | $(BIN)/pip
	@$(call need,c++ --version,g++)
	@$(call need,$(BIN)/python -c '$(HEADERS)',python3-dev)

# Stock clients of the server, and what the page is tested with. npm brings nodejs along.
NODE := @openai/agents-realtime@0.20.0 zod@4.6.7 typescript@7.0.2 axe-core@4.14.1
build/node/stamp: Makefile
	@$(call need,node --version && npm --version,npm)
	@$(call need,command -v chromium,chromium)
	npm install --prefix build/node --no-save --no-audit --no-fund $(NODE)
	@touch $@

# Its schemas judge what it is told: the newest release for this Python, in an environment of its own, as it pins what we pin too.
build/homeassistant/stamp: Makefile | $(BIN)/pip
	$(BIN)/python -m venv --clear build/homeassistant
	build/homeassistant/bin/pip install --no-compile homeassistant
	@touch $@

# A virtual sound card, which the tests of attend talk speak into and hear.
soundcard:
	@$(call need,ldconfig -p | grep libportaudio.so.2,libportaudio2)
	@$(call need,ls /usr/lib/*/alsa-lib/libasound_module_pcm_pulse.so,libasound2-plugins)
	@$(call need,pulseaudio --version,pulseaudio)
	@$(call need,parec --version,pulseaudio-utils)

# What the page is tested in besides Chromium; WebKit's draws on a screen that is not there.
browsers:
	@$(call need,command -v firefox-esr,firefox-esr)
	@$(call need,command -v WebKitWebDriver,webkit2gtk-driver)
	@$(call need,command -v Xvfb,xvfb)

# What the tests of attend watch talk to: a broker with its clients, and an RTSP camera, which runs in the system's own Python.
broker:
	@$(call need,PATH=$$PATH:/usr/sbin command -v mosquitto,mosquitto)
	@$(call need,command -v mosquitto_rr,mosquitto-clients)
	@$(call need,test -e /usr/lib/*/gstreamer-1.0/libgstjpeg.so,gstreamer1.0-plugins-good)
	@$(call need,test -e /usr/lib/*/gstreamer-1.0/libgstvideotestsrc.so,gstreamer1.0-plugins-base)
	@$(call need,/usr/bin/python3 -c '$(RTSP)',python3-gi gir1.2-gst-rtsp-server-1.0)

exam: .venv/demo
	$(BIN)/python -m model.nano.exam $(ARGS)

# With the machine's own python3 and torch where there is no .venv: a borrowed one may have no network.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,python3) -m agent.bench.gpu $(ARGS)

lock: .venv/test
	@mkdir -p build
	$(BIN)/python -m pip install --dry-run --ignore-installed --quiet --report build/lock.json '.[espeak,test]'
	{ sed -n '/^#/p' .lock.txt; $(BIN)/python -c '$(PINS)' < build/lock.json; } > build/lock.txt
	mv build/lock.txt .lock.txt

clean:
	rm -rf .venv .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info build/answer.png build/node build/homeassistant artifacts
	find agent model streams tests web -name __pycache__ -prune -exec rm -rf {} +

# These stamps are as new as the last installation, so that the second run of a target installs nothing.
.venv/demo: extras := espeak
.venv/test: extras := espeak,test
.venv/demo .venv/test: pyproject.toml .lock.txt | $(BIN)/pip
	$(BIN)/python -m pip install -c .lock.txt -e '.[$(extras)]'
	@touch .venv/demo $@

$(BIN)/pip:
	@$(call need,command -v python3,python3)
	@$(FIND); test -n "$$python" || { \
		echo "attend needs Python 3.11 to 3.14, and $(firstword $(PYTHON)) is $$($(firstword $(PYTHON)) --version); name another: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(FIND); $(call need,$$python -c "import ensurepip",python3-venv)
	@$(FIND); echo "making .venv with $$($$python --version)"; $$python -m venv --clear .venv

FIND = python=$$(for p in $(PYTHON); do if $$p -c '$(FITS)' 2>/dev/null; then echo $$p; break; fi; done)
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))
HEADERS := import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))
RTSP := import gi; gi.require_version("GstRtspServer", "1.0")
PINS := import json, sys; of = [p["metadata"] for p in json.load(sys.stdin)["install"]]; \
	print(*sorted(m["name"].lower() + "==" + m["version"].split("+")[0] for m in of if m["name"] != "attend"), sep="\n")

# $(call need,COMMAND,PACKAGE): where the command fails, root gets the system package and everybody else is told its name.
need = { $(1); } >/dev/null 2>&1 || { if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	echo "installing the system package $(2)"; apt-get update -q; DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends $(2); \
	else echo "the system package $(2) is missing; on Debian and Ubuntu: sudo apt-get install $(2)" >&2; exit 1; fi; }
