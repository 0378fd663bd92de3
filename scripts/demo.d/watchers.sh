# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The Muster authors
#
# Who is told and who asks: on m0 a mail server and Debian's snmptrapd, and snmpwalk. Needs lib.sh, hosts.sh, cluster.sh.

COMMUNITY=demo
MAILS=$DEMO/mail
MAIL_LOG=$DEMO/logs/mail.log # a line for each mail: number, phase, subject
TRAP_LOG=$DEMO/logs/traps.log
TOLD_SECONDS=60
NEARLY_FULL_PERCENT=85
# The MIB; base has the names that Debian's tools lack.
MIBS=(-M "$ROOT/monitor/snmp/base:$ROOT/monitor/snmp" -m MUSTER-MIB)

# start_watchers: both on m0, as a machine outside the cluster.
start_watchers() {
	local pid
	mkdir -p "$MAILS" "$DEMO/m0/snmp"
	in_host m0 setsid "$MAILSINK" --listen "$(address m0):25" --dir "$MAILS" >"$MAIL_LOG" 2>"$DEMO/logs/mailsink.log" </dev/null 9>&- &
	pid=$!
	wait_for_watcher "the mail server" "$pid" listens_tcp 25
	(umask 077 && echo "authCommunity log $COMMUNITY" >"$DEMO/m0/snmptrapd.conf")
	SNMP_PERSISTENT_DIR=$DEMO/m0/snmp in_host m0 setsid snmptrapd -f -Ob -Lf "$TRAP_LOG" "${MIBS[@]}" -C -c "$DEMO/m0/snmptrapd.conf" \
		-p "$DEMO/m0/snmptrapd.pid" "udp:$(address m0):162" >"$DEMO/logs/snmptrapd.log" 2>&1 </dev/null 9>&- &
	pid=$!
	wait_for_watcher "snmptrapd" "$pid" listens_udp 162
}

listens_tcp() { [ -n "$(in_host m0 ss -Hltn "sport = :$1")" ]; }
listens_udp() { [ -n "$(in_host m0 ss -Hlun "sport = :$1")" ]; }

wait_for_watcher() { # NAME PID COMMAND...
	local deadline=$((SECONDS + SOCKET_SECONDS))
	until "${@:3}"; do
		[ -e "/proc/$2" ] || die "$1 on m0 ended" "read the logs in $DEMO/logs"
		[ $SECONDS -lt $deadline ] || die "waited $SOCKET_SECONDS s in vain for $1 on m0" "read the logs in $DEMO/logs"
		sleep "$POLL_SECONDS"
	done
	disown "$2"
}

# make_receivers: the cluster tells both.
make_receivers() {
	say "== whom to tell: a mail server and snmptrapd, both on $(address m0)"
	show m1 receiver create mail --type smtp --address "$(address m0):25" --tls none --from muster@demo.example --to admin@demo.example
	show m2 receiver create traps --type snmp --address "$(address m0):162" --secret "$COMMUNITY"
	if [ "$(disk_percent)" -ge $NEARLY_FULL_PERCENT ]; then
		say "the disk of this machine is nearly full, which is nothing that the demo should tell of:"
		show m3 rule set pool-full --disabled
	fi
}

disk_percent() { df --block-size=1M --output=size,avail "$DEMO" | awk 'NR == 2 { print int(100 * ($1 - $2) / $1) }'; }

mails() { grep -c "^[0-9]* $1 " "$MAIL_LOG" || true; } # PHASE
mail_subject() { sed -n "s/^[0-9]* $1 //p" "$MAIL_LOG" | tail -n 1; }

# In the log of snmptrapd one line has all variables of a notification, with tabs between them. -Ob: indexes as numbers; as
# text one may hold a space, or a tab.
traps() { grep -a -c "MUSTER-MIB::musterAlert$1\b" "$TRAP_LOG" || true; } # Firing or Resolved
trap_message() {
	grep -a "MUSTER-MIB::musterAlert$1\b" "$TRAP_LOG" | tail -n 1 | tr '\t' '\n' | sed -n 's/^MUSTER-MIB::musterAlertMessage[^ ]* = STRING: //p'
}

# hear MAIL_PHASE TRAP_NAME: say what has come of that phase and was not said yet. HEARD remembers.
hear() {
	if [[ $HEARD != *"mail-$1"* ]] && [ "$(mails "$1")" -gt 0 ]; then
		HEARD+=" mail-$1"
		event "mail: $(mail_subject "$1")"
	fi
	if [[ $HEARD != *"trap-$1"* ]] && [ "$(traps "$2")" -gt 0 ]; then
		HEARD+=" trap-$1"
		event "trap: musterAlert$2: $(trap_message "$2")"
	fi
}

heard_all() { # MAIL_PHASE TRAP_NAME
	hear "$@"
	[[ $HEARD == *"mail-$1"* && $HEARD == *"trap-$1"* ]]
}

# names_all TEXT WORD...: the text names each of them.
names_all() {
	local word
	for word in "${@:2}"; do [[ " $1 " =~ [^a-z0-9]$word[^a-z0-9] ]] || return 1; done
}

# check_told MAIL_PHASE TRAP_NAME: exactly one of each has come, and both name the node and the guest.
check_told() {
	local text
	[ "$(mails "$1")" = 1 ] || die "$(mails "$1") mails say '$1', not one" "read $MAIL_LOG"
	[ "$(traps "$2")" = 1 ] || die "$(traps "$2") traps say musterAlert$2, not one" "read $TRAP_LOG"
	for text in "$(mail_subject "$1")" "$(trap_message "$2")"; do
		names_all "$text" "$VICTIM" "$GUEST" || die "this does not name $VICTIM and $GUEST: $text" "read $MAIL_LOG and $TRAP_LOG"
	done
}

# check_told_all AT: nothing else was sent, and nothing waits to be.
check_told_all() {
	local receiver
	for receiver in mail traps; do
		wait_until "the receiver $receiver is well" "$TOLD_SECONDS" "$1" is_well "$1" "$receiver"
	done
	check_told firing Firing
	check_told resolved Resolved
	[ "$(find "$MAILS" -name '*.eml' | wc -l)" = 2 ] || die "there are not two mails in $MAILS" "read $MAIL_LOG"
	[ "$(grep -a -c 'MUSTER-MIB::musterAlert[A-Z][a-z]*\b.*musterAlertMessage' "$TRAP_LOG")" = 2 ] || die "there are not two traps" "read $TRAP_LOG"
}

# is_well AT RECEIVER: it took all that it was sent, and nothing waits to be.
is_well() { [ "$(ask "$1" '.status.phase + " " + ((.status.queued // 0) | tostring)' receiver show "$2")" = "ok 0" ]; }

# walk AT NAME...: snmpwalk of that node.
walk() { snmpwalk "${MIBS[@]}" -v2c -c "$COMMUNITY" -t 2 -r 2 -O qs "$(address "$1"):161" "MUSTER-MIB::$2"; }

# check_walk AT SAY: the agent of that node lists every guest. Sets WALKED.
check_walk() {
	local names phases
	say "snmpwalk -v2c -c $COMMUNITY $(address "$1") MUSTER-MIB::musterVmName"
	names=$(walk "$1" musterVmName) || die "the SNMP agent of $1 does not answer" "read $DEMO/logs/$1.log"
	phases=$(walk "$1" musterVmPhase)
	names_all "$names" "$GUEST" "$PEER" "$OUTSIDER" || die "the SNMP agent of $1 lists only: $names" "read $DEMO/logs/$1.log"
	WALKED=$(wc -l <<<"$names")
	"$2" "snmpwalk of $1 lists $WALKED guests: $(awk '{ printf "%s ", $NF }' <<<"$names")($(awk '{ print $NF }' <<<"$phases" | sort | uniq -c | awk '{ printf "%s%s %s", (NR > 1 ? ", " : ""), $1, $2 }'))"
}
