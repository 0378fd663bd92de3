# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The Muster authors
#
# The configuration database beside etcd and rqlite. To be sourced by scripts/bench; needs lib.sh, ROOT, BENCH.
#   configdb/        the program that starts the servers, makes the load and prints the results (a Go module of its own)
#   peers/NAME/      a Go module that only names a peer's version; the product does not depend on it

PROGRAMS=$BENCH/bin
ARGS=()
PEERS=yes
PROFILE=no

bench_usage() {
	cat <<'TEXT'
  configdb            three musterd beside three etcd (with and without TLS) and three rqlited: writes, linearizable reads,
                      watches, memory; then the write outage after kill -9 of the leader. About 35 minutes
  configdb --quick    one short round of the same; about two minutes when everything is built
  configdb --steady M only Muster: full write load for M minutes; counts elections, p99.9 and the longest gap
  configdb --idle M   only Muster: an idle cluster for M minutes; disk writes, revisions, CPU
  configdb --profile  only Muster: where its daemons spend their time under load, by perf
  configdb --only LIST --rounds N    only some systems (muster, muster-stream, etcd, etcd-plain, rqlite, etcd-50-250), other rounds
TEXT
}

bench_arguments() {
	while [ $# -gt 0 ]; do
		case $1 in
		--quick) ARGS+=(-quick) ;;
		--profile)
			PEERS=no PROFILE=yes
			ARGS+=(-profile)
			;;
		--steady | --idle | --rounds)
			[[ ${2:-} =~ ^[0-9]+(\.[0-9]+)?$ ]] || usage_error "$1 needs a number"
			[ "$1" = --rounds ] || PEERS=no
			ARGS+=("-${1#--}" "$2")
			shift
			;;
		--only)
			[[ ${2:-} =~ ^[a-z0-9,-]+$ ]] || usage_error "--only needs names, separated by commas"
			ARGS+=(-only "$2")
			shift
			;;
		*) usage_error "unknown argument '$1'" ;;
		esac
		shift
	done
}

# build MODULE PACKAGE PROGRAM [FLAG...]
build_peer() {
	local module=$1 package=$2 program=$3
	shift 3
	say "== building $program"
	go -C "$ROOT/scripts/bench.d/$module" build -trimpath "$@" -o "$PROGRAMS/$program" "$package" ||
		die "building $program failed" "read the lines above; the first build needs the Go module proxy"
}

bench_prepare() {
	local flags=()
	need_packages "make:runs the build" "gcc:rqlite has SQLite, which is C" "libc6-dev:rqlite has SQLite, which is C" \
		"ca-certificates:lets Go fetch modules over TLS"
	mkdir -p "$PROGRAMS"
	say "== building muster"
	if [ "$PROFILE" = yes ]; then
		need_packages "linux-perf:takes the profiles"
		flags=(LDFLAGS=) # with symbols
	fi
	make --no-print-directory -C "$ROOT" BIN="$PROGRAMS" ${flags[@]+"${flags[@]}"} build || die "the build failed" "read the lines above"
	build_peer configdb . bench-configdb
	[ "$PEERS" = yes ] || return 0
	build_peer peers/etcd go.etcd.io/etcd/server/v3 etcd
	# The tags are those of rqlite's own releases.
	build_peer peers/rqlite github.com/rqlite/rqlite/v8/cmd/rqlited rqlited -tags osusergo,netgo,sqlite_omit_load_extension
}

# The program takes the place of this one, so that a signal for this one reaches it; it keeps the lock from the servers.
bench_run() {
	exec "$PROGRAMS/bench-configdb" -programs "$PROGRAMS" -data "$BENCH/configdb" "${ARGS[@]}"
}
