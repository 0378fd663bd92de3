# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The Muster authors
#
# What the fault campaigns share: hosts as network namespaces, one campaign at a time, and an end that leaves nothing.
# Needs lib.sh, ROOT.

WORK=$ROOT/build/torture
RUN=/run/muster-torture
LOCK=/run/lock/muster-torture.lock
# The campaign's own namespace, and those of the hosts.
HOME_NS=mt0
HOST_NS=(mt1 mt2 mt3 mt4 mt5)
KILL_DEADLINE_SECONDS=10

host_pids() { ip netns pids "$1" 2>/dev/null || true; }

# empty NAMESPACE: SIGKILL for every process in it until none is left, but for this script's own.
empty() {
	local pids deadline=$((SECONDS + KILL_DEADLINE_SECONDS))
	while pids=$(host_pids "$1") && [ -n "$pids" ]; do
		# shellcheck disable=SC2086
		kill -KILL $pids 2>/dev/null || true
		[ $SECONDS -lt $deadline ] || die "some processes in $1 do not die: ${pids//$'\n'/ }" "look at them with ps"
		sleep 0.05
	done
}

# take_down: the namespaces are ours by their names and our lock; mounts and links go with them.
take_down() {
	local ns failed=
	for ns in "$HOME_NS" "${HOST_NS[@]}"; do
		[ -e "/run/netns/$ns" ] || continue
		(empty "$ns") || failed=1
		ip netns del "$ns" || failed=1
	done
	rm -rf "$RUN" "$WORK"/disk
	[ -z "$failed" ] || die "not everything could be removed" "read the lines above, then run scripts/torture configdb --down"
}

CAMPAIGN=
# shellcheck disable=SC2317 # the trap calls it
leave() {
	local status=$?
	trap - EXIT INT TERM
	if [ -n "$CAMPAIGN" ]; then
		kill -TERM "$CAMPAIGN" 2>/dev/null || true
		wait "$CAMPAIGN" 2>/dev/null || true
	fi
	take_down >&2 || status=1
	exit "$status"
}

# torture_lock: the lock is on descriptor 9, which no other program may inherit.
torture_lock() {
	need_root "it makes network namespaces and mounts disks"
	mkdir -p "${LOCK%/*}"
	exec 9>"$LOCK"
	flock --nonblock 9 || die "another scripts/torture is at work" "wait for it, or stop it"
}

# campaign PROGRAM ARGUMENTS...: the hosts, the program in the campaign's own namespace, and the end of all. Exits.
campaign() {
	local ns status=0
	take_down # what a killed campaign left
	rm -rf "$WORK"
	mkdir -p "$WORK" "$RUN"
	trap leave EXIT
	trap 'exit 130' INT TERM
	for ns in "$HOME_NS" "${HOST_NS[@]}"; do ip netns add "$ns"; done
	ip netns exec "$HOME_NS" "$@" -work "$WORK" -run "$RUN" 9>&- &
	CAMPAIGN=$!
	wait "$CAMPAIGN" || status=$?
	CAMPAIGN=
	exit "$status"
}
