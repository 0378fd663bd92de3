# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The Muster authors
#
# From the source tree to a cluster with a guest that counts. Needs lib.sh and hosts.sh.

BIN=$ROOT/build/bin
MAILSINK=$ROOT/build/tools/mailsink
LOCK=/run/lock/muster-demo.lock
IMAGE=$ROOT/build/guest/tiny.qcow2
GUEST=web1
SOCKET_SECONDS=30
READY_SECONDS=120
GUEST_SECONDS=180
CALL_SECONDS=120
# How long to wait between two looks at something.
POLL_SECONDS=0.1

# prepare: all that can fail or take long before the first host exists.
prepare() {
	refuse_if_taken
	mkdir -p "${LOCK%/*}"
	exec 9>"$LOCK"
	flock --nonblock 9 || die "another scripts/demo is at work" "wait for it, or stop it"
	need_packages "iproute2:makes the hosts: network namespaces, bridge, links" \
		"qemu-system-x86:runs the guest" \
		"qemu-utils:qemu-img makes the guest's disk" \
		"make:runs the build" \
		"ca-certificates:lets Go fetch its modules over TLS" \
		"jq:reads the answers of the muster command" \
		"openvswitch-switch:the virtual switch of each host" \
		"openssh-client:logs in to the shell of each node" \
		"bsdutils:script gives ssh a terminal" \
		"snmp:snmpwalk asks the SNMP agent of each node" \
		"snmptrapd:receives SNMP notifications" 9>&-
	need_go
	say "== building muster"
	make --no-print-directory -C "$ROOT" build 9>&- || die "the build failed" "read the lines above"
	mkdir -p "${MAILSINK%/*}"
	(cd "$ROOT" && CGO_ENABLED=0 go build -trimpath -o "$MAILSINK" ./internal/demo/mailsink 9>&-) || die "the mail server was not built" "read the lines above"
	say "== the guest's disk image"
	"$ROOT/scripts/guest-image" --output "$IMAGE" 9>&-
	rm -rf "$DEMO" "$RUN"
}

# start_daemon HOST
start_daemon() {
	(
		umask 077
		cat >"$DEMO/$1.yaml" <<-TEXT
			ovsdb: $(ovsdb "$1")
			snmpListen: $(address "$1"):161
			snmpCommunity: $COMMUNITY
		TEXT
	)
	in_host "$1" setsid "$BIN/musterd" --config "$DEMO/$1.yaml" --data-dir "$DEMO/$1" --listen "$(address "$1"):$PORT" --node-name "$1" --run-dir "$RUN/$1" \
		>>"$DEMO/logs/$1.log" 2>&1 </dev/null 9>&- &
	echo "$1 $!" >>"$DEMO/hosts.pids"
	disown $!
}

# alive HOST: the daemon that was started last on HOST has not ended.
alive() {
	local pid
	pid=$(awk -v host="$1" '$1 == host { pid = $2 } END { print pid }' "$DEMO/hosts.pids")
	[ -e "/proc/$pid/stat" ] && ! grep -q '^State:[[:space:]]*Z' "/proc/$pid/status" 2>/dev/null
}

# wait_until WHAT SECONDS HOST COMMAND...: ask until COMMAND succeeds; fail when the time is over or HOST's daemon ended.
wait_until() {
	local what=$1 limit=$2 host=$3 deadline=$((SECONDS + $2))
	shift 3
	until "$@"; do
		alive "$host" || die "musterd on $host ended while waiting until $what" "read $DEMO/logs/$host.log"
		[ $SECONDS -lt $deadline ] || die "waited $limit s in vain until $what" "read the logs in $DEMO/logs"
		sleep "$POLL_SECONDS"
	done
}

# at HOST ARGUMENTS...: the muster command, asking this node.
at() {
	local host=$1
	shift
	timeout --foreground "$CALL_SECONDS" "$BIN/muster" --server "$(url "$host")" "$@" </dev/null 9>&-
}

# show HOST ARGUMENTS...: the same, and say so.
show() {
	say "[$1] muster --server $(url "$1") ${*:2}"
	at "$@" || die "that call to $1 failed" "read the lines above and $DEMO/logs/$1.log"
}

# ask HOST FILTER ARGUMENTS...: a quiet question with a short patience; prints what the jq filter finds in the answer.
ask() {
	local host=$1 filter=$2
	shift 2
	timeout --foreground 5 "$BIN/muster" --server "$(url "$host")" "$@" -o json </dev/null 2>/dev/null 9>&- |
		jq -r "def all: if type == \"array\" then .[] else .items[] end; $filter" 2>/dev/null || true
}

# node_phase AT HOST: the phase of HOST as node AT sees it.
node_phase() { ask "$1" "all | select(.meta.name == \"$2\") | .status.phase" node ls; }

# node_is_ready HOST: any other node says so.
node_is_ready() {
	local other
	# shellcheck disable=SC2153
	for other in "${HOSTS[@]}"; do
		[ "$other" != "$1" ] || continue
		[ "$(node_phase "$other" "$1")" != ready ] || return 0
	done
	return 1
}

# all_ready AT
all_ready() { [ "$(ask "$1" '[all | select(.status.phase == "ready")] | length' node ls)" = ${#HOSTS[@]} ]; }

# all_vote AT: each of the three may be lost.
all_vote() { [ "$(ask "$1" '[.members[] | select(.voter)] | length' cluster status)" = ${#HOSTS[@]} ]; }

write_env() { # TOKEN
	local servers hosts
	servers=$(url m1),$(url m2),$(url m3)
	hosts=$(address m1),$(address m2),$(address m3)
	(
		umask 077
		printf '%s\n' "$1" >"$DEMO/token"
		{
			printf 'export MUSTER_SERVER=%s\n' "$servers"
			printf 'export MUSTER_TOKEN=%q\n' "$1"
			printf 'export MUSTER_CACERT=%q\n' "$DEMO/ca.crt"
			# shellcheck disable=SC2016 # expanded by the shell that reads the file
			printf 'export PATH=%q:"$PATH"\n' "$BIN"
			# shellcheck disable=SC2016
			printf 'export NO_PROXY=%s${NO_PROXY:+,$NO_PROXY} no_proxy=%s${no_proxy:+,$no_proxy}\n' "$hosts" "$hosts"
		} >"$DEMO/env"
	)
}

load_env() {
	# shellcheck source=/dev/null
	. "$DEMO/env"
}

# join HOST AT: HOST joins with a token that node AT makes.
join() {
	local token
	say "[$2] muster --server $(url "$2") cluster token create; then on $1: muster cluster join TOKEN --data-dir $DEMO/$1"
	token=$(at "$2" cluster token create -o name) || die "$2 gave no join token" "read $DEMO/logs/$2.log"
	in_host "$1" timeout "$CALL_SECONDS" "$BIN/muster" cluster join "$token" --data-dir "$DEMO/$1" </dev/null 9>&- ||
		die "$1 could not join" "read $DEMO/logs/$1.log and $DEMO/logs/$2.log"
}

# start_cluster: three daemons, one cluster.
start_cluster() {
	local host answer token
	for host in "${HOSTS[@]}"; do
		start_switch "$host"
		start_daemon "$host"
	done
	for host in "${HOSTS[@]}"; do
		wait_until "musterd on $host opens $DEMO/$host/muster.sock" "$SOCKET_SECONDS" "$host" test -S "$DEMO/$host/muster.sock"
	done
	say "== one cluster: m1 begins it, m2 and m3 join"
	say "on m1: muster cluster init --name demo --data-dir $DEMO/m1"
	answer=$(in_host m1 timeout "$CALL_SECONDS" "$BIN/muster" cluster init --name demo --data-dir "$DEMO/m1" -o json </dev/null 9>&-) ||
		die "cluster init failed" "read $DEMO/logs/m1.log"
	token=$(jq -er .token <<<"$answer") || die "cluster init gave no token" "read $DEMO/logs/m1.log"
	jq -er .caCert <<<"$answer" >"$DEMO/ca.crt" || die "cluster init gave no CA certificate" "read $DEMO/logs/m1.log"
	write_env "$token"
	load_env
	join m2 m1
	join m3 m2
	wait_until "m3 sees three ready nodes" "$READY_SECONDS" m3 all_ready m3
	wait_until "all three vote" "$READY_SECONDS" m3 all_vote m3
	show m3 node ls
}

# knows_node AT: sets NODE.
knows_node() {
	NODE=$(ask "$1" .status.node vm show "$GUEST")
	[[ -n $NODE && " ${HOSTS[*]} " == *" $NODE "* ]]
}

vm_runs() { [ "$(ask "$1" .status.phase vm show "$GUEST")" = running ]; }

# start_guest: pool, image, virtual machine; every call goes to another node.
start_guest() {
	say "== a guest: every call goes to a different node"
	show m1 pool create shared --type shared --path "$DEMO/shared"
	show m2 image create tiny --pool shared --file "$IMAGE"
	show m3 vm create "$GUEST" --cpu 1 --memory 128M --image tiny --pool shared --network front --ha restart --start
	wait_until "m1 says that $GUEST runs" "$GUEST_SECONDS" m1 vm_runs m1
	show m1 vm ls
	show m2 node ls
	wait_until "m3 says on which node $GUEST runs" "$READY_SECONDS" m3 knows_node m3
	watch_guest
}

# watch_guest: its console, read through a node that it does not run on, goes to a file; show that it counts.
watch_guest() {
	local host via="" count
	for host in "${HOSTS[@]}"; do [ "$host" = "$NODE" ] || via=$host; done
	say "[$via] muster --server $(url "$via") vm console $GUEST     (it runs on $NODE)"
	CONSOLE=$DEMO/logs/console.log
	: >"$CONSOLE"
	"$BIN/muster" --server "$(url "$via")" vm console "$GUEST" >"$CONSOLE" 2>"$CONSOLE.err" </dev/null 9>&- &
	CONSOLE_PID=$!
	wait_until "$GUEST counts on its console" "$GUEST_SECONDS" "$via" counts 5
	count=$(last_line "$CONSOLE" | counter_of)
	counter_lines "$CONSOLE" | tail -n 5 | sed 's/^/    /'
	wait_until "$GUEST counts beyond $count" "$GUEST_SECONDS" "$via" counts_beyond "$count"
}

stop_watching() {
	[ -n "${CONSOLE_PID:-}" ] || return 0
	kill "$CONSOLE_PID" 2>/dev/null || true
	wait "$CONSOLE_PID" 2>/dev/null || true
	CONSOLE_PID=
}

# plain_text: of what a terminal would be sent, the text. A carriage return begins a line, as it does where a prompt is
# drawn anew; the boot loader's escape sequences would otherwise stand before the guest's first words.
plain_text() { tr '\r' '\n' | sed -e 's/\x1bc//g' -e 's/\x1b\[[0-9;?]*[A-Za-z]//g'; }

# The console's counter lines. What follows the last newline is cut off: a number that is only half there would be wrong.
counter_lines() { { cat "$1" && echo end; } | plain_text | sed '$d' | grep -a -x "muster-guest name=$GUEST boot=[0-9]* counter=[0-9]*" || true; }
last_line() { counter_lines "$1" | tail -n 1; }
counter_of() { sed 's/.*counter=//'; }
boot_of() { sed 's/.*boot=\([0-9]*\) .*/\1/'; }
counts() { [ "$(counter_lines "$CONSOLE" | wc -l)" -ge "$1" ]; }
counts_beyond() { [ "$(last_line "$CONSOLE" | counter_of)" -gt "$1" ]; }

# save_consoles: what the guests have said, among the logs.
save_consoles() {
	local guest host
	for guest in "$GUEST" "$PEER" "$OUTSIDER"; do
		for host in "${HOSTS[@]}"; do
			[ -e "$DEMO/env" ] || break
			! timeout --foreground 5 "$BIN/muster" --server "$(url "$host")" vm console "$guest" --log --bytes 65536 \
				</dev/null >"$DEMO/logs/guest-$guest.log" 2>/dev/null 9>&- || break
		done
	done
}

show_logs() {
	local log
	save_consoles
	for log in "$DEMO"/logs/*; do
		[ -s "$log" ] || continue
		say "---- the end of $log"
		tail -n 40 "$log"
	done
}
