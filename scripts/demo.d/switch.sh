# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The Muster authors
#
# Networks: an Open vSwitch in every host, two networks over them with the same addresses, and guests that ping. Needs
# lib.sh, hosts.sh, cluster.sh, terminal.sh.

OVS_SCHEMA=/usr/share/openvswitch/vswitch.ovsschema
OVS_SECONDS=60
FRONT_VNI=100
BACK_VNI=200
PING_COUNT=3
ADDRESS_SECONDS=180
PEER=web2     # on the network of $GUEST, on another host
OUTSIDER=lab1 # on another network

# ovs_dir HOST: its sockets. The database is elsewhere: unlike these, it outlives a power cut.
ovs_dir() { echo "$RUN/$1-ovs"; }
ovsdb() { echo "unix:$(ovs_dir "$1")/db.sock"; }

# in_ovs HOST COMMAND...: one of Open vSwitch's programs on that host, which must end within OVS_SECONDS. Daemons detach.
in_ovs() {
	local dir
	dir=$(ovs_dir "$1")
	OVS_RUNDIR=$dir OVS_LOGDIR=$DEMO/logs OVS_DBDIR=$DEMO/ovs \
		in_host "$1" timeout "$OVS_SECONDS" "${@:2}" >>"$DEMO/logs/$1-ovs.log" 2>&1 </dev/null 9>&-
}

# ovs_daemon HOST PROGRAM ARGUMENTS...: returns when it serves.
ovs_daemon() {
	local host=$1 program=$2 dir
	dir=$(ovs_dir "$host")
	in_ovs "$host" setsid "$program" "${@:3}" --detach --no-chdir --pidfile="$dir/$program.pid" --unixctl="$dir/$program.ctl" \
		--log-file="$DEMO/logs/$host-$program.log" -vconsole:off ||
		die "$program does not start on $host" "read $DEMO/logs/$host-ovs.log and $DEMO/logs/$host-$program.log"
}

# start_switch HOST: ovsdb-server and ovs-vswitchd, as Debian's openvswitch-switch would start them.
start_switch() {
	local db=$DEMO/ovs/$1.db
	mkdir -p "$DEMO/ovs" "$(ovs_dir "$1")"
	[ -e "$db" ] || in_ovs "$1" ovsdb-tool create "$db" "$OVS_SCHEMA" || die "cannot create Open vSwitch's database of $1" "read $DEMO/logs/$1-ovs.log"
	ovs_daemon "$1" ovsdb-server "$db" --remote="p$(ovsdb "$1")"
	in_ovs "$1" ovs-vsctl --db="$(ovsdb "$1")" --no-wait init || die "Open vSwitch's database of $1 does not answer" "read $DEMO/logs/$1-ovs.log"
	ovs_daemon "$1" ovs-vswitchd "$(ovsdb "$1")"
}

# make_networks: two networks with the same addresses, so that nothing but the network keeps them apart.
make_networks() {
	say "== two networks, on every host, with the same addresses"
	show m2 network create front --type vxlan --vni "$FRONT_VNI"
	show m3 ippool create front --network front --cidr 10.20.0.0/24 --start 10.20.0.10
	show m1 network create back --type vxlan --vni "$BACK_VNI"
	show m2 ippool create back --network back --cidr 10.20.0.0/24 --start 10.20.0.50
	show m3 network ls
}

# make_neighbours: two guests on one host that is not $NODE. The third host stays free for $GUEST to move to, so that its
# neighbour is always on another one.
make_neighbours() {
	local host others=()
	for host in "${HOSTS[@]}"; do
		if [ "$host" != "$NODE" ] && [ -z "${PEER_NODE:-}" ]; then PEER_NODE=$host; else others+=("$host"); fi
	done
	say "== $PEER on the same network and $OUTSIDER on the other one, both on $PEER_NODE"
	show m1 node maintenance on "${others[@]}"
	show m2 vm create "$PEER" --memory 96M --image tiny --network front --start
	show m3 vm create "$OUTSIDER" --memory 96M --image tiny --network back --start
	show m1 node maintenance off "${others[@]}"
	show m2 vm ls
}

# guest_address AT GUEST: the newest address that the guest has printed on its console.
guest_address() {
	timeout --foreground 5 "$BIN/muster" --server "$(url "$1")" vm console "$2" --log --bytes 65536 </dev/null 2>/dev/null 9>&- |
		plain_text | sed -n "s/^muster-guest name=$2 address=\([0-9.]*\)\$/\1/p" | tail -n 1
}
has_address() { ADDRESS=$(guest_address "$1" "$2") && [ -n "$ADDRESS" ]; }

# wait_for_address AT GUEST: sets ADDRESS.
wait_for_address() { wait_until "$2 has printed its address" "$ADDRESS_SECONDS" "$1" has_address "$1" "$2"; }

# tunnel_frames HOST: what the tunnels of the network front on that host have sent.
tunnel_frames() {
	local device
	device=$(printf 'vx%06x' "$FRONT_VNI")
	ip -n "$1" -s -j link show dev "$device" | jq -r '.[0].stats64.tx.packets'
}

# ping_from AT GUEST ADDRESS SECONDS: ping in that guest's own shell, and wait so long for answers; sets PING to its
# summary. The status is ping's own.
ping_from() {
	local status=0
	in_guest "$1" "$2" "ping -c $PING_COUNT -W $4 $3" || status=$?
	PING=$(grep -m 1 'packets transmitted' <<<"$SAID") || die "ping in $2 said: $SAID" "look at its console: muster vm console $2"
	return "$status"
}

# check_pings AT SAY: $PEER reaches $GUEST through the tunnel, $OUTSIDER does not. Each line goes to SAY.
check_pings() {
	local frames
	[ "$NODE" != "$PEER_NODE" ] || die "$GUEST is on $NODE, where $PEER is: no tunnel is needed" "the demo wants them apart; see make_neighbours"
	frames=$(tunnel_frames "$PEER_NODE")
	ping_from "$1" "$PEER" "$WEB_ADDRESS" 10 || die "$PEER on $PEER_NODE does not reach $GUEST on $NODE: $PING" "read the logs in $DEMO/logs"
	frames=$(($(tunnel_frames "$PEER_NODE") - frames))
	[ "$frames" -ge $PING_COUNT ] || die "the ping did not go through the tunnel of $PEER_NODE, which sent $frames frames" "see docs/networking.md"
	"$2" "network: $PEER on $PEER_NODE pings $GUEST on $NODE at $WEB_ADDRESS: $PING; the tunnel of $PEER_NODE sent $frames frames"
	! ping_from "$1" "$OUTSIDER" "$WEB_ADDRESS" 3 || die "$OUTSIDER reaches $WEB_ADDRESS from another network: $PING" "the networks are not apart"
	"$2" "network: $OUTSIDER, on the network back, pings $WEB_ADDRESS: $PING"
}

# start_neighbours: the rest of the guests, and what the networks do for them.
start_neighbours() {
	make_neighbours
	wait_for_address m3 "$GUEST"
	WEB_ADDRESS=$ADDRESS
	say "$GUEST says on its console: muster-guest name=$GUEST address=$WEB_ADDRESS"
	wait_for_address m1 "$PEER"
	wait_for_address m2 "$OUTSIDER"
	check_pings m1 say
}
