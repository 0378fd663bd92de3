# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The Muster authors
#
# Programs that somebody types into: a guest's serial console, and ssh on a terminal. One at a time. Needs lib.sh, hosts.sh,
# cluster.sh.

TYPE_SECONDS=120
TERMINAL_ROWS=24
TERMINAL_COLUMNS=100
TYPED_PID=

# attach NAME COMMAND...: start a program; `type_keys` types into it, what it says goes to $SCREEN.
attach() {
	local keys=$DEMO/keys
	SCREEN=$DEMO/logs/screen-$1.log
	rm -f "$keys"
	mkfifo "$keys"
	"${@:2}" <"$keys" >"$SCREEN" 2>&1 9>&- &
	TYPED_PID=$!
	exec 8>"$keys"
	rm -f "$keys"
}

# attach_terminal NAME COMMAND: the same with a shell command on a terminal of its own.
attach_terminal() {
	attach "$1" script --quiet --return --flush --command "stty rows $TERMINAL_ROWS cols $TERMINAL_COLUMNS; exec $2" /dev/null
}

# type_keys TEXT: with the escapes of printf. If the program has ended, what is waited for next does not come.
type_keys() { (trap '' PIPE && printf '%b' "$1" >&8) 2>/dev/null || true; }

# wait_screen PATTERN: until a line of the screen matches the extended regular expression.
wait_screen() {
	local deadline=$((SECONDS + TYPE_SECONDS))
	until has_line "$1"; do
		[ $SECONDS -lt $deadline ] || die "waited $TYPE_SECONDS s in vain for '$1' on a terminal" "read $SCREEN"
		sleep "$POLL_SECONDS"
	done
}

# has_line PATTERN: grep must not end before it has read all: who writes to it would fail.
has_line() { [ "$(screen_text | grep -a -c -E -- "$1")" -gt 0 ]; }

screen_text() { plain_text <"$SCREEN"; }

# detach: no more keys; end the program if it has not ended.
detach() {
	[ -n "$TYPED_PID" ] || return 0
	exec 8>&-
	kill "$TYPED_PID" 2>/dev/null || true
	wait "$TYPED_PID" 2>/dev/null || true
	TYPED_PID=
}

has_ended() { [ ! -e "/proc/$TYPED_PID/stat" ] || grep -q '^State:[[:space:]]*Z' "/proc/$TYPED_PID/status" 2>/dev/null; }

# wait_end: until the program has ended by itself; the status is its own.
wait_end() {
	local deadline=$((SECONDS + TYPE_SECONDS)) status=0
	until has_ended; do
		[ $SECONDS -lt $deadline ] || die "waited $TYPE_SECONDS s in vain until a program on a terminal ended" "read $SCREEN"
		sleep "$POLL_SECONDS"
	done
	wait "$TYPED_PID" || status=$?
	TYPED_PID=
	exec 8>&-
	return "$status"
}

# in_guest AT GUEST COMMAND: carry out a command in the root shell on the guest's serial console, reached through node AT.
# SAID is what it printed, without what else the guest says there; the status is the command's.
in_guest() {
	local mark=$RANDOM$RANDOM status
	attach "$2" "$BIN/muster" --server "$(url "$1")" vm console "$2"
	type_keys '\n' # the guest starts a shell at Enter
	wait_screen '^muster-guest shell'
	type_keys "echo begin-$mark; $3; echo end-$mark=\$?\n"
	wait_screen "^end-$mark=[0-9]+\$"
	SAID=$(screen_text | awk -v begin="begin-$mark" -v end="end-$mark=" \
		'index($0, end) == 1 { on = 0 } on && !/^muster-guest / { print } $0 == begin { on = 1 }')
	status=$(screen_text | sed -n "s/^end-$mark=\([0-9]*\)\$/\1/p")
	detach
	return "$status"
}
