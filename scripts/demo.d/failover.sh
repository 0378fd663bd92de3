# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The Muster authors
#
# The power cut: kill the guest's host, then watch, through the survivors only, until the guest counts on elsewhere and all
# who should know have been told; then the host is switched on again. Needs all of demo.d and running guests (NODE, CONSOLE).
# Sets VICTIM and RESULT.

FAILOVER_DEADLINE_SECONDS=240
COUNT_ON_SECONDS=60

now_us() { echo "${EPOCHREALTIME/./}"; }

# since_cut: seconds with one decimal since the power cut.
since_cut() {
	local us=$(($(now_us) - CUT_US))
	printf '%d.%d' $((us / 1000000)) $((us % 1000000 / 100000))
}

event() { printf '  %6s s  %s\n' "$(since_cut)" "$*"; }

# runs_qemu HOST: a QEMU process lives on that host.
runs_qemu() {
	local pid
	for pid in $(host_pids "$1"); do
		! grep -qs '^qemu-system' "/proc/$pid/comm" || return 0
	done
	return 1
}

# recent AT: the counter lines in the recent history of the guest's console, asked of node AT.
recent() {
	timeout --foreground 5 "$BIN/muster" --server "$(url "$1")" vm console "$GUEST" --log </dev/null \
		>"$DEMO/logs/recent.log" 2>/dev/null 9>&- || true
	counter_lines "$DEMO/logs/recent.log"
}

# counted_beyond AT COUNTER: the guest's newest line is later than that.
counted_beyond() {
	local line
	line=$(recent "$1" | tail -n 1)
	[ -n "$line" ] && [ "$(counter_of <<<"$line")" -gt "$2" ]
}

# look AT BOOT: one look at the cluster. Goes through the steps of a failover in order, as far as they have happened:
# STEP is what to look for next; NODE and FIRST are set on the way.
look() {
	local node
	if [ "$STEP" = lost ] && [ "$(node_phase "$1" "$VICTIM")" = lost ]; then
		event "$VICTIM is lost, says $1"
		STEP=bound
	fi
	if [ "$STEP" = bound ]; then
		node=$(ask "$1" .status.node vm show "$GUEST")
		if [[ " ${SURVIVORS[*]} " == *" $node "* && -n $node ]]; then
			NODE=$node
			event "$GUEST is bound to $NODE, says $1"
			STEP=running
		fi
	fi
	if [ "$STEP" = running ] && vm_runs "$1" && runs_qemu "$NODE"; then
		event "QEMU runs on $NODE, says $1"
		STEP=counting
	fi
	if [ "$STEP" = counting ]; then
		FIRST=$(recent "$1" | grep -m 1 "boot=$2 " || true)
		[ -z "$FIRST" ] || STEP=over
	fi
}

# cut_and_watch: the failover, its timeline, and what must be true of it. Sets FACTS for the result.
cut_and_watch() {
	local host before boot after turn=0 deadline seconds
	VICTIM=$NODE SURVIVORS=() STEP=lost FIRST="" HEARD=""
	for host in "${HOSTS[@]}"; do [ "$host" = "$VICTIM" ] || SURVIVORS+=("$host"); done

	say "== power cut on $VICTIM, the host of $GUEST: network gone, then SIGKILL for every process"
	CUT_US=$(now_us)
	cut_power "$VICTIM"
	stop_watching
	before=$(last_line "$CONSOLE" | counter_of)
	boot=$(last_line "$CONSOLE" | boot_of)
	event "the power of $VICTIM is cut; the last line was: $(last_line "$CONSOLE")"

	deadline=$((SECONDS + FAILOVER_DEADLINE_SECONDS))
	until [ "$STEP" = over ]; do
		[ $SECONDS -lt $deadline ] ||
			die "no failover within $FAILOVER_DEADLINE_SECONDS s: still waiting for the step '$STEP'" "read the logs in $DEMO/logs"
		look "${SURVIVORS[turn++ % 2]}" $((boot + 1))
		hear firing Firing
		[ "$STEP" = over ] || sleep "$POLL_SECONDS"
	done
	seconds=$(since_cut)
	event "$GUEST counts on: $FIRST"

	after=$(counter_of <<<"$FIRST")
	[ "$after" -gt "$before" ] || die "the counter fell from $before to $after" "the new node did not start from the same disk"
	! runs_qemu "$VICTIM" || die "QEMU still runs on $VICTIM" "two nodes may have run the same guest"
	wait_until "$GUEST counts beyond $after" "$COUNT_ON_SECONDS" "${SURVIVORS[0]}" counted_beyond "${SURVIVORS[0]}" "$after"
	FACTS="failover_seconds=$seconds restarted_on=$NODE counter_before=$before counter_after=$after"
}

# check_survivors: with one host dead, everything else goes on.
check_survivors() {
	local one=${SURVIVORS[0]} other=${SURVIVORS[1]}
	wait_until "mail and trap say that $VICTIM is lost" "$TOLD_SECONDS" "$one" heard_all firing Firing
	check_told firing Firing
	wait_for_address "$one" "$GUEST"
	[ "$ADDRESS" = "$WEB_ADDRESS" ] || die "$GUEST has the address $ADDRESS now, and had $WEB_ADDRESS" "read the logs in $DEMO/logs"
	event "network: $GUEST says on $NODE: muster-guest name=$GUEST address=$ADDRESS, as before"
	check_pings "$other" event
	check_walk "$one" event
	check_exec event "$one" "$other"
	check_console event "$other"
	show "$other" node ls
	show "$one" vm ls
}

# switch_on_again: the dead host comes back, and whoever was told of its loss is told of that, once.
switch_on_again() {
	say "== $VICTIM is switched on again"
	power_on "$VICTIM"
	event "$VICTIM is ready again"
	wait_until "mail and trap say that $VICTIM is back" "$TOLD_SECONDS" "$VICTIM" heard_all resolved Resolved
	check_exec event "$VICTIM"
	check_session event "$VICTIM"
	show "$VICTIM" alert ls
	check_told_all "$VICTIM"
	# shellcheck disable=SC2034 # printed by demo
	RESULT="$FACTS address=$WEB_ADDRESS ping_over_vxlan=yes ping_from_other_network=no snmp_vms=$WALKED mails_firing=$(mails firing) mails_resolved=$(mails resolved) traps_firing=$(traps Firing) traps_resolved=$(traps Resolved) shell=ok"
}
