# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The Muster authors
#
# Small helpers for the scripts in this folder. To be sourced by bash scripts that run with `set -euo pipefail`.

# The system's tools, also for a user, or a root shell made by plain su.
export PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

# say MESSAGE...: one line for the person who watches.
say() { printf '%s\n' "$*"; }

# warn MESSAGE...: something is not as expected, and the work goes on.
warn() { printf '%s: warning: %s\n' "${0##*/}" "$*" >&2; }

# die WHAT [DO]: what failed and what to do about it, then exit 1.
die() {
	printf '%s: %s\n' "${0##*/}" "$1" >&2
	[ $# -lt 2 ] || printf '%s: what to do: %s\n' "${0##*/}" "$2" >&2
	exit 1
}

# usage_error MESSAGE: a wrong command line, exit 2.
usage_error() {
	printf '%s: %s\n%s: try --help\n' "${0##*/}" "$1" "${0##*/}" >&2
	exit 2
}

# repo_root: the absolute path of the source tree, wherever the script is called from.
repo_root() { (cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P); }

# need_root REASON: refuse early instead of failing half-way.
need_root() { [ "$(id -u)" = 0 ] || die "this needs root: $1" "run it again as root, for example with sudo"; }

# need_command NAME DO: a program that no package of ours provides.
need_command() { command -v "$1" >/dev/null || die "the program '$1' was not found in PATH" "$2"; }

# need_go: the Go tool chain is the one thing (besides git) that a person installs by hand.
GO_MINIMUM=1.26
need_go() {
	local have
	need_command go "install Go $GO_MINIMUM or newer (see the Go project's download page) and put its bin folder into PATH"
	have=$(go env GOVERSION) || die "'go env GOVERSION' failed" "repair the Go installation"
	have=${have#go}
	[ "$(printf '%s\n%s\n' "$GO_MINIMUM" "${have%%[!0-9.]*}" | sort -V | head -n 1)" = "$GO_MINIMUM" ] ||
		die "Go $have is too old: Muster needs Go $GO_MINIMUM or newer" "install a newer Go and put its bin folder first in PATH"
}

# Only one of our scripts talks to apt at a time, and a package database that somebody else holds is waited for.
APT_LOCK=/run/lock/muster-apt.lock
APT_LOCK_WAIT_SECONDS=600

apt_quiet() {
	mkdir -p "${APT_LOCK%/*}"
	DEBIAN_FRONTEND=noninteractive flock --timeout "$APT_LOCK_WAIT_SECONDS" "$APT_LOCK" \
		apt-get --quiet --quiet -o "DPkg::Lock::Timeout=$APT_LOCK_WAIT_SECONDS" -o APT::Sandbox::User=root "$@" </dev/null
}

# apt_update_once: refresh the package lists, once for a script and all the scripts that it calls.
apt_update_once() {
	[ -z "${MUSTER_APT_UPDATED:-}" ] || return 0
	need_root "refreshing the package lists"
	apt_quiet update >/dev/null || warn "apt-get update failed; going on with the package lists that are here"
	export MUSTER_APT_UPDATED=1
}

package_installed() {
	[ "$(dpkg-query --show --showformat='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

# need_packages "PACKAGE:why" ...: install the Debian packages that are missing. Silent when all are there.
need_packages() {
	local entry missing=() log
	need_command dpkg-query "these scripts install packages with apt; they are made for Debian 12"
	for entry in "$@"; do
		package_installed "${entry%%:*}" || missing+=("$entry")
	done
	[ ${#missing[@]} -gt 0 ] || return 0
	need_root "installing ${missing[*]%%:*}"
	say "installing ${#missing[@]} Debian package(s):"
	for entry in "${missing[@]}"; do printf '  %-24s %s\n' "${entry%%:*}" "${entry#*:}"; done
	apt_update_once
	log=$(mktemp)
	if ! apt_quiet install --yes --no-install-recommends "${missing[@]%%:*}" >"$log" 2>&1; then
		tail -n 20 "$log" >&2
		rm -f "$log"
		die "apt-get could not install ${missing[*]%%:*}" "read the lines above; check the network and the Debian sources of apt"
	fi
	rm -f "$log"
}
