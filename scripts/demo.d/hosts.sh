# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The Muster authors
#
# The machines of the demo: a network namespace each, joined by a bridge that this machine reaches too. m1 to m3 are the
# hosts of the cluster; m0 stands for the administrator's mail server and SNMP manager. Needs lib.sh, ROOT.

HOSTS=(m1 m2 m3)
MACHINES=(m0 "${HOSTS[@]}")
BRIDGE=muster0
NETWORK=10.76.0
PORT=7600
DEMO=$ROOT/build/demo
# Sockets need short paths.
RUN=/run/muster-demo
# What we make carries this alias, so that it is known as ours even when build/demo is lost.
MARK="muster demo $ROOT"
KILL_DEADLINE_SECONDS=30

address() { echo "$NETWORK.1${1#m}"; }
url() { echo "https://$(address "$1"):$PORT"; }

namespace_exists() { [ -e "/run/netns/$1" ]; }
bridge_exists() { [ -e "/sys/class/net/$BRIDGE" ]; }

# is_ours NAME: the bridge or namespace was made by this script in this tree. The list of names covers the moment
# between making a thing and marking it.
is_ours() {
	local shown
	if [ "$1" = "$BRIDGE" ]; then shown=$(ip link show dev "$1"); else shown=$(ip -n "$1" link show dev lo); fi
	[[ $shown == *"alias $MARK" ]] || grep -qsx "$1" "$DEMO/made"
}

# refuse_if_taken: nothing of the demo may exist yet, neither ours nor somebody else's.
refuse_if_taken() {
	local name other
	command -v ip >/dev/null || return 0 # nobody can have made namespaces; the package comes next
	for name in "$BRIDGE" "${MACHINES[@]}"; do
		if [ "$name" = "$BRIDGE" ]; then bridge_exists || continue; else namespace_exists "$name" || continue; fi
		if is_ours "$name"; then
			die "a demo is already up (or was left behind)" "play on with '. $DEMO/env', or remove it with scripts/demo --down"
		fi
		die "'$name' exists on this machine, and this source tree did not make it" \
			"if another tree runs the demo, end it there (scripts/demo --down); else remove it: ip $([ "$name" = "$BRIDGE" ] && echo "link del $name" || echo "netns del $name")"
	done
	other=$(ip -4 -o address show to "$NETWORK.0/24" | awk '{print $2; exit}')
	[ -z "$other" ] || die "the network $NETWORK.0/24 is in use on the interface $other" "free it: the demo needs $NETWORK.1 and $NETWORK.10-13"
}

make_hosts() {
	local machine
	say "== three hosts: ${HOSTS[*]} with $(address m1), $(address m2), $(address m3)"
	mkdir -p "$DEMO/logs" "$DEMO/shared" "$RUN"
	echo "$BRIDGE" >>"$DEMO/made"
	ip link add "$BRIDGE" type bridge
	ip link set dev "$BRIDGE" alias "$MARK"
	ip address add "$NETWORK.1/24" dev "$BRIDGE"
	ip link set dev "$BRIDGE" up
	for machine in "${MACHINES[@]}"; do make_machine "$machine"; done
}

make_machine() { # MACHINE
	mkdir -p "$DEMO/$1"
	echo "$1" >>"$DEMO/made"
	ip netns add "$1"
	ip -n "$1" link set dev lo alias "$MARK"
	ip -n "$1" link set dev lo up
	ip link add "muster-$1" type veth peer name eth0 netns "$1"
	ip -n "$1" address add "$(address "$1")/24" dev eth0
	ip -n "$1" link set dev eth0 up
	ip link set dev "muster-$1" master "$BRIDGE" up
}

# in_host HOST COMMAND...: run a command as on that host.
in_host() { ip netns exec "$@"; }

host_pids() { ip netns pids "$1" 2>/dev/null || true; }

# kill_all HOST: SIGKILL for every process, again and again until none is left: some may be starting others.
kill_all() {
	local pids deadline=$((SECONDS + KILL_DEADLINE_SECONDS))
	while pids=$(host_pids "$1") && [ -n "$pids" ]; do
		# shellcheck disable=SC2086
		kill -KILL $pids 2>/dev/null || true
		[ $SECONDS -lt $deadline ] || die "some processes on $1 do not die: ${pids//$'\n'/ }" "look at them with ps; a hung disk can hold them"
		sleep 0.02
	done
}

# cut_power HOST: the network first, so that no last words get out, then every process. What a machine does not have
# after a power cut goes too: the devices that its kernel made, and what was in /run.
cut_power() {
	ip link set dev "muster-$1" down
	kill_all "$1"
	forget_devices "$1"
	rm -rf "${RUN:?}/$1" "$RUN/$1-ovs"
}

# forget_devices HOST: all but the two that it was built with.
forget_devices() {
	local name
	while read -r name; do
		name=${name%%@*}
		case $name in lo | eth0) ;; *) ip -n "$1" link del dev "$name" || return ;; esac
	done < <(ip -n "$1" -o link show | awk -F ': ' '{ print $2 }')
}

# power_on HOST: the network, Open vSwitch and the daemon come back; the node finds its cluster by itself.
power_on() {
	[ -z "$(host_pids "$1")" ] || die "$1 is up" "cut its power first: scripts/demo --host-kill $1"
	ip link set dev "muster-$1" up
	start_switch "$1"
	start_daemon "$1"
	load_env
	say "$1 is on; waiting until the cluster calls it ready"
	wait_until "$1 is ready again" "$READY_SECONDS" "$1" node_is_ready "$1"
	say "$1 is back"
}

# need_demo HOST: the modes for playing need a demo of this tree.
need_demo() {
	if ! namespace_exists "$1" || ! is_ours "$1" || [ ! -e "$DEMO/env" ]; then
		die "no demo is up" "start one with scripts/demo --up"
	fi
}

# remove_link NAME: gone afterwards. Deleting a namespace takes its links along, a moment later.
remove_link() {
	local deadline=$((SECONDS + KILL_DEADLINE_SECONDS))
	until ip link del dev "$1" 2>/dev/null || [ ! -e "/sys/class/net/$1" ]; do
		[ $SECONDS -lt $deadline ] || return
		sleep 0.02
	done
}

# take_down: remove all that is ours, as far as it exists. What is not ours stays. One failure does not stop the rest.
take_down() {
	local host failed=
	if command -v ip >/dev/null; then
		for host in "${MACHINES[@]}"; do
			namespace_exists "$host" || continue
			if is_ours "$host"; then
				(kill_all "$host") || failed=1
				ip netns del "$host" || failed=1
				remove_link "muster-$host" || failed=1
			else
				warn "the namespace $host is not ours and stays"
			fi
		done
		if bridge_exists; then
			if is_ours "$BRIDGE"; then remove_link "$BRIDGE" || failed=1; else warn "the bridge $BRIDGE is not ours and stays"; fi
		fi
	fi
	[ -z "$failed" ] || die "not everything could be removed" "read the lines above, then run scripts/demo --down again"
	rm -rf "$DEMO" "$RUN"
	say "the demo's hosts and files are gone"
}
