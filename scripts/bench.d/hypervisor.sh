# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The Muster authors
#
# The hypervisor beside bare QEMU and libvirt. To be sourced by scripts/bench; needs lib.sh, ROOT, BENCH.
#   hypervisor/      the program that starts the systems, measures and prints (a Go module of its own)

PROGRAMS=$BENCH/bin
ARGS=()

bench_usage() {
	cat <<'TEXT'
  hypervisor          one musterd beside QEMUs with the same arguments, started by hand, and beside libvirt: starts of one VM, of 20 in a
                      row and 20 at once, the first byte of the serial port, the state, live migrations, what the daemons take, linked clones. 6 minutes
  hypervisor --quick  fewer rounds and clones; about two minutes when everything is built
  hypervisor --rounds N              other rounds
  hypervisor --only NAME             one group of rows: start, 'first serial byte', state, migration, 'twenty in a row and at once', idle, 'linked clones'
TEXT
}

bench_arguments() {
	while [ $# -gt 0 ]; do
		case $1 in
		--quick) ARGS+=(-quick) ;;
		--rounds)
			[[ ${2:-} =~ ^[1-9][0-9]*$ ]] || usage_error "$1 needs a number"
			ARGS+=(-rounds "$2")
			shift
			;;
		--only)
			[ -n "${2:-}" ] || usage_error "$1 needs a name"
			ARGS+=(-only "$2")
			shift
			;;
		*) usage_error "unknown argument '$1'" ;;
		esac
		shift
	done
}

bench_prepare() {
	need_packages "make:runs the build" "ca-certificates:lets Go fetch modules over TLS" "qemu-system-x86:runs the VMs" "qemu-utils:makes the disks" \
		"libvirt-daemon:the peer" "libvirt-daemon-driver-qemu:the peer's driver" "libvirt-clients:the peer's command line" "util-linux:gives the peer directories of its own"
	mkdir -p "$PROGRAMS"
	say "== building muster"
	make --no-print-directory -C "$ROOT" BIN="$PROGRAMS" build || die "the build failed" "read the lines above"
	say "== building the bench"
	go -C "$ROOT/scripts/bench.d/hypervisor" build -trimpath -o "$PROGRAMS/bench-hypervisor" . || die "building the bench failed" "read the lines above"
	say "== the guest"
	"$ROOT/scripts/guest-image" || die "the guest's image could not be made" "read the lines above"
}

# The program takes the place of this one, so that a signal for this one reaches it; it keeps the lock from the servers.
bench_run() {
	exec "$PROGRAMS/bench-hypervisor" -programs "$PROGRAMS" -data "$BENCH/hypervisor" -guest "$ROOT/build/guest/tiny.qcow2" "${ARGS[@]}"
}
