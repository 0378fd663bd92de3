# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The Muster authors
#
# The shell on every node: ssh with a key that is made here, without and with a terminal. Needs lib.sh, hosts.sh, cluster.sh,
# terminal.sh.

SSH=$DEMO/ssh
SSH_SECONDS=30
DETACH_KEY='\x1d' # Ctrl-]

# make_user: a key, a user who has it, and a configuration of ssh that knows both. With accept-new the first host key is
# learnt and any other one refused: all nodes are one to ssh.
make_user() {
	mkdir -p -m 700 "$SSH"
	ssh-keygen -q -t ed25519 -N '' -C admin@demo -f "$SSH/key"
	cat >"$SSH/config" <<-TEXT
		Host $NETWORK.1?
		  Port $PORT
		  User admin
		  IdentityFile "$SSH/key"
		  IdentitiesOnly yes
		  HostKeyAlias muster-demo
		  UserKnownHostsFile "$SSH/known_hosts"
		  GlobalKnownHostsFile none
		  StrictHostKeyChecking accept-new
		  BatchMode yes
		  ServerAliveInterval 5
		  ServerAliveCountMax 3
		  LogLevel ERROR
	TEXT
	say "== a person with a key"
	show m3 user create admin --role administrator --ssh-key-file "$SSH/key.pub"
}

# by_ssh HOST COMMAND...: without a terminal.
by_ssh() { timeout --foreground "$SSH_SECONDS" ssh -F "$SSH/config" -p "$PORT" "admin@$(address "$1")" "${@:2}" </dev/null 9>&-; }

# on_terminal HOST [COMMAND...]: the command line of ssh with a terminal.
on_terminal() { printf '%q ' ssh -F "$SSH/config" -t -p "$PORT" "admin@$(address "$1")" "${@:2}"; }

# check_exec SAY HOST...: each node answers a command in JSON; they all have one host key.
check_exec() {
	local say=$1 host answer
	for host in "${@:2}"; do
		answer=$(by_ssh "$host" vm ls -o json) || die "ssh to $host failed" "read $DEMO/logs/$host.log"
		answer=$(jq -er '.items | map(.meta.name + " " + .status.phase + " on " + .status.node) | join(", ")' <<<"$answer") ||
			die "ssh to $host did not answer in JSON: $answer" "read $DEMO/logs/$host.log"
		"$say" "shell: ssh -p $PORT admin@$(address "$host") vm ls -o json: $answer"
	done
	[ "$(wc -l <"$SSH/known_hosts")" = 1 ] || die "the nodes have more than one host key" "read $SSH/known_hosts"
}

# check_console SAY HOST: the guest's serial console on a terminal, left with the detach key.
check_console() {
	attach_terminal console "$(on_terminal "$2" vm console "$GUEST")"
	wait_screen "^muster-guest name=$GUEST .*counter=[0-9]+\$"
	type_keys "$DETACH_KEY"
	wait_screen "detached from $GUEST"
	wait_end || die "ssh -t $2 vm console $GUEST ended with an error" "read $SCREEN"
	"$1" "shell: ssh -t -p $PORT admin@$(address "$2") vm console $GUEST: $(counter_lines "$SCREEN" | tail -n 1), then Ctrl-]: detached"
}

# check_session SAY HOST: log in, type half a name, press Tab and Enter, leave.
check_session() {
	attach_terminal session "$(on_terminal "$2")"
	wait_screen "^admin@demo:$2> *\$"
	type_keys 'network show fr\t'
	wait_screen "^admin@demo:$2> network show front *\$"
	type_keys '\n'
	wait_screen "^VNI: +$FRONT_VNI\$"
	wait_screen "^ +$2 +yes\$"
	type_keys 'exit\n'
	wait_end || die "the session on $2 ended with an error" "read $SCREEN"
	"$1" "shell: ssh -t -p $PORT admin@$(address "$2"), network show fr<TAB> becomes: $(screen_text | grep -a -m 1 -o 'network show front'), answered by $2"
}
