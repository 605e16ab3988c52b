# SPDX-License-Identifier: Apache-2.0
# make install [DESTDIR=...]: copies files, once manual pages and completion are made. In parts: install-core, and one for
# each builder of an initramfs.
# make uninstall takes them away again; configuration and state stay.

DESTDIR =
INSTALL = install
PYTHON ?= python3
RUN = $(INSTALL) -D -m 0755
DATA = $(INSTALL) -D -m 0644

home = $(DESTDIR)/usr/lib/unlock
sbin = $(DESTDIR)/usr/sbin
tools = $(DESTDIR)/usr/share/initramfs-tools
systemd = $(DESTDIR)/usr/lib/systemd
rules = $(DESTDIR)/usr/lib/udev/rules.d
etc = $(DESTDIR)/etc
dracut = $(DESTDIR)/usr/lib/dracut/modules.d/90unlock
updates = kernel/postinst.d/zzz-unlock kernel/postrm.d/zzz-unlock
stages = init-premount local-top local-block local-bottom panic
units = unlock-cap.service unlock-group@.service unlock-heal@.service unlock-early-boot.service unlock-baseline.service \
	unlock-predict.service unlock-sync.service unlock-sync.timer unlock-resume.service \
	unlock-crash-kernel.service
wanted = unlock-early-boot.service unlock-baseline.service unlock-predict.service unlock-resume.service \
	unlock-crash-kernel.service

pages = $(patsubst man/%.md,build/man/%,$(wildcard man/*.md))
share = $(DESTDIR)/usr/share
shells = build/completion/unlock.bash build/completion/_unlock build/completion/unlock.fish
# Debian's zsh looks in a folder of its own.
zsh = $(share)/zsh/$(if $(wildcard /etc/debian_version),vendor-completions,site-functions)

.DELETE_ON_ERROR:
.PHONY: man completion install install-docs install-core install-initramfs-tools install-dracut uninstall

man: $(pages)

$(pages): build/man/%: man/%.md man/roff.py pyproject.toml
	$(PYTHON) man/roff.py $< build/man

completion: $(shells)

$(shells): completion/generate.py $(shell find unlock/cli -name '*.py')
	mkdir -p build/completion
	$(PYTHON) completion/generate.py $(subst .,,$(or $(suffix $@),.zsh)) >$@

install-docs: man completion
	for page in $(notdir $(pages)); do $(DATA) build/man/$$page $(share)/man/man$${page##*.}/$$page || exit; done
	$(DATA) build/completion/unlock.bash $(share)/bash-completion/completions/unlock
	$(DATA) build/completion/_unlock $(zsh)/_unlock
	$(DATA) build/completion/unlock.fish $(share)/fish/vendor_completions.d/unlock.fish

install: install-core install-initramfs-tools install-dracut

install-core: install-docs
	find unlock -name '*.py' -exec $(DATA) {} $(home)/{} ';'
	$(RUN) system/unlock $(sbin)/unlock
	$(RUN) system/mount.unlock $(sbin)/mount.unlock
	$(RUN) initramfs/cap $(home)/cap
	$(DATA) initramfs/functions $(home)/functions
	$(RUN) system/gate $(home)/gate
	$(RUN) initramfs/collect $(home)/initramfs/collect
	$(DATA) initramfs/manifest $(home)/initramfs/manifest
	$(RUN) system/predict $(home)/predict
	$(RUN) system/dump $(home)/dump
	$(DATA) system/unlock.catalog $(systemd)/catalog/unlock.catalog
	$(RUN) system/crash-init $(home)/crash-init
	$(DATA) system/tmpfiles.conf $(DESTDIR)/usr/lib/tmpfiles.d/unlock.conf
	for hook in $(updates); do $(RUN) system/after-update $(etc)/$$hook || exit; done
	$(DATA) system/dpkg.cfg $(etc)/dpkg/dpkg.cfg.d/unlock
	$(DATA) udev/65-unlock.rules $(rules)/65-unlock.rules
	$(RUN) system/unlock-generator $(systemd)/system-generators/unlock-generator
	for unit in $(units); do $(DATA) system/$$unit $(systemd)/system/$$unit || exit; done
	$(INSTALL) -d -m 0755 $(systemd)/system/multi-user.target.wants $(systemd)/system/timers.target.wants
	ln -sf $(wanted:%=../%) $(systemd)/system/multi-user.target.wants/
	ln -sf ../unlock-sync.timer $(systemd)/system/timers.target.wants/

install-initramfs-tools:
	$(RUN) initramfs/initramfs-tools/hook $(tools)/hooks/unlock
	$(DATA) initramfs/initramfs-tools/functions $(tools)/scripts/unlock-functions
	for stage in $(stages); do $(RUN) initramfs/initramfs-tools/$$stage $(tools)/scripts/$$stage/unlock || exit; done
	$(RUN) initramfs/initramfs-tools/local-premount $(tools)/scripts/local-premount/check-resume
	$(RUN) system/after-update $(etc)/initramfs/post-update.d/zzz-unlock

install-dracut:
	for script in module-setup.sh init early settled.sh; do $(RUN) initramfs/dracut/$$script $(dracut)/$$script || exit; done
	for unit in initramfs/dracut/*.service initramfs/dracut/*.conf; do \
		$(DATA) $$unit $(dracut)/$${unit##*/} || exit; done
	$(RUN) system/after-update $(DESTDIR)/usr/lib/kernel/install.d/99-unlock.install

uninstall:
	rm -rf $(dracut)
	rm -f $(DESTDIR)/usr/lib/kernel/install.d/99-unlock.install
	rm -rf $(home)
	rm -f $(sbin)/unlock $(sbin)/mount.unlock $(tools)/hooks/unlock $(tools)/scripts/unlock-functions
	rm -f $(stages:%=$(tools)/scripts/%/unlock) $(tools)/scripts/local-premount/check-resume
	rm -f $(rules)/65-unlock.rules $(systemd)/system-generators/unlock-generator $(units:%=$(systemd)/system/%)
	rm -f $(updates:%=$(etc)/%) $(etc)/initramfs/post-update.d/zzz-unlock $(etc)/dpkg/dpkg.cfg.d/unlock
	rm -f $(wanted:%=$(systemd)/system/multi-user.target.wants/%)
	rm -f $(systemd)/system/timers.target.wants/unlock-sync.timer
	rm -f $(DESTDIR)/usr/lib/tmpfiles.d/unlock.conf $(systemd)/catalog/unlock.catalog
	rm -f $(share)/bash-completion/completions/unlock $(zsh)/_unlock $(share)/fish/vendor_completions.d/unlock.fish
	rm -f $(foreach page,$(notdir $(pages)),$(share)/man/man$(subst .,,$(suffix $(page)))/$(page))

# Packages for Debian, from the files of this checkout that git would add: build/deb/*.deb.
DEBS = build/deb

.PHONY: deb
deb:
	rm -rf $(DEBS)
	mkdir -p $(DEBS)/unlock
	{ git ls-files -z --cached --others --exclude-standard 2>/dev/null || find . -path ./build -prune -o -path ./.git -prune -o -type f -print0; } | \
		tar --null --files-from - --ignore-failed-read -c | tar -x -m -C $(DEBS)/unlock
	cd $(DEBS)/unlock && dpkg-buildpackage --build=binary --no-sign $(DEB_OPTIONS)
	rm -rf $(DEBS)/unlock

# Development. VENV and the cache of images lie outside the checkout.

CACHE ?= /var/cache/unlock-lab
VENV ?= $(CACHE)/venv
packages = qemu-system-x86 qemu-utils swtpm swtpm-tools ovmf mmdebstrap debian-archive-keyring cryptsetup-bin \
	libcryptsetup12 libtss2-dev libtss2-tcti-swtpm0 tpm2-tools udev btrfs-progs e2fsprogs initramfs-tools-core zstd cpio \
	age gdb makedumpfile systemd clevis-luks grub-emu kmod util-linux fdisk shellcheck strace busybox klibc-utils dosfstools mtools \
	openssl gcc pkg-config libffi-dev python3-venv python3-dev \
	debhelper dh-python dpkg-dev lintian po-debconf systemd-container man-db mandoc groff-base zsh fish \
	make bc bison flex m4 perl xz-utils libc6-dev slirp4netns iproute2

.PHONY: setup test test-all coverage test-long test-fast soak mutate-formats lint demo demo-short bench

# What tests and demo need, from the distribution and from PyPI; quick when it is all there.
setup:
	dpkg-query -W $(packages) >/dev/null 2>&1 || { apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(packages); }
	[ -x $(VENV)/bin/python ] || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check tpm2-pytss cryptography pykmip virt-firmware pytest pytest-xdist pytest-timeout coverage hypothesis mypy ruff
	UNLOCK_CACHE=$(CACHE) $(VENV)/bin/python -m tests.lab.uml.kernel

scripts = system/unlock initramfs/collect system/unlock-generator man/roff.py completion/generate.py
lint:
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	for script in $(scripts); do $(VENV)/bin/mypy --no-error-summary $$script || exit; done

# Of what boots a machine, those that are marked `always`, and a third of the others, by the commit's hash; so of what
# kills an operation at each of its steps, and takes ten seconds or more.
# At the end: the time of each part, and which modules are run by less than nine tenths.
test:
	UNLOCK_CACHE=$(CACHE) VENV=$(VENV) $(VENV)/bin/python -m tests.whole

# All of them, but of the long ones as many as in `make test`.
test-all:
	UNLOCK_CACHE=$(CACHE) VENV=$(VENV) $(VENV)/bin/python -m tests.whole all

# As `make test`, with what the machines of the fast lab run counted in; some minutes longer.
coverage:
	UNLOCK_COVER_MACHINES=1 UNLOCK_CACHE=$(CACHE) VENV=$(VENV) $(VENV)/bin/python -m tests.whole

# The same without a machine.
test-fast:
	UNLOCK_CACHE=$(CACHE) VENV=$(VENV) $(VENV)/bin/python -m tests.whole fast

# All that boot emulated machines, hours: updates by GRUB, by a unified kernel image and by the firmware alone, what check
# says and what they then do, kexec, Plymouth. `make test` takes one or two of them, by turns.
test-long: setup
	UNLOCK_CACHE=$(CACHE) $(VENV)/bin/python -m pytest -n 2 --dist load --durations=15 -m long

# Made-up headers, tokens, records, event logs, GRUB scripts and EFI programs for an hour, or for `make soak SECONDS=60`.
# Then 1,000 random power cuts of each operation that writes to headers or moves data: some hours more.
SECONDS = 3600
soak:
	SECONDS=$(SECONDS) $(VENV)/bin/python -m tests.soak

# Changes each label, derivation and field of docs/formats.md alone: tests/test_formats.py must see each. A minute or two.
mutate-formats:
	UNLOCK_CACHE=$(CACHE) $(VENV)/bin/python -m tests.mutate_formats

demo: setup
	UNLOCK_CACHE=$(CACHE) $(VENV)/bin/python -m tests.demo

# An update, then no key manager, network and power; then an edited command line. By KVM where it runs the machine.
demo-short: setup
	UNLOCK_CACHE=$(CACHE) $(VENV)/bin/python -m tests.demo_short

# Beside systemd-cryptsetup, clevis and cryptsetup reencrypt, whole boots by each builder, by User-Mode Linux, and
# systemd-coredump, in a container; an hour. Some of it: `make bench PARTS=native`.
bench: setup
	UNLOCK_CACHE=$(CACHE) $(VENV)/bin/python -m tests.bench $(PARTS)
