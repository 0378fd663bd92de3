// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"strings"
	"time"
)

// Limits of what is asked of a guest agent.
const (
	// MaxExecArgs, MaxExecBytes and MaxExecInput bound a command, its words
	// together and its standard input.
	MaxExecArgs  = 256
	MaxExecBytes = 64 << 10
	MaxExecInput = 512 << 10
	// MaxExecOutput is how much of each of the two outputs is passed on.
	MaxExecOutput = 1 << 20
	// DefaultExecSeconds and MaxExecSeconds are how long the end of a command is
	// waited for.
	DefaultExecSeconds = 30
	MaxExecSeconds     = 300
	// DefaultFreezeSeconds and MaxFreezeSeconds are how long file systems stay
	// frozen unless they are thawed before.
	DefaultFreezeSeconds = 60
	MaxFreezeSeconds     = 600
	// MaxGuestUser and MaxGuestPassword bound a password change.
	MaxGuestUser     = 64
	MaxGuestPassword = 512
)

// VMAgent is what a guest agent said when that changed last. A guest may lie.
type VMAgent struct {
	Version  string `json:"version,omitempty"`
	Hostname string `json:"hostname,omitempty"`
	OS       string `json:"os,omitempty"`
	// Addresses of the guest that others may reach, at most 16.
	Addresses []string `json:"addresses,omitempty"`
}

// GuestAgent is what is known of the agent in a guest. Everything but Connected,
// Answering, Problem and the times is the guest's own word.
type GuestAgent struct {
	VM   string `json:"vm"`
	Node string `json:"node"`
	// Connected is whether a program in the guest holds the agent's channel open.
	Connected bool `json:"connected"`
	// Answering is whether it answered the last time.
	Answering bool `json:"answering"`
	// Problem says why not, or what else is wrong.
	Problem   string     `json:"problem,omitempty"`
	CheckedAt *time.Time `json:"checkedAt,omitempty"`
	Version   string     `json:"version,omitempty"`
	Hostname  string     `json:"hostname,omitempty"`
	OS        *GuestOS   `json:"os,omitempty"`
	// Interfaces of the guest, at most 64.
	Interfaces []GuestInterface `json:"interfaces,omitempty"`
	// Commands that the agent carries out, in order of name.
	Commands []string `json:"commands,omitempty"`
	// Frozen is whether the guest's file systems are frozen; they are thawed at
	// ThawsAt at the latest.
	Frozen  bool       `json:"frozen,omitempty"`
	ThawsAt *time.Time `json:"thawsAt,omitempty"`
}

// GuestOS is guest-get-osinfo.
type GuestOS struct {
	ID      string `json:"id,omitempty"`
	Name    string `json:"name,omitempty"`
	Version string `json:"version,omitempty"`
	Kernel  string `json:"kernel,omitempty"`
	Machine string `json:"machine,omitempty"`
}

// GuestInterface is one of guest-network-get-interfaces.
type GuestInterface struct {
	Name string `json:"name"`
	MAC  string `json:"mac,omitempty"`
	// Addresses with their prefix lengths, at most 32.
	Addresses []string `json:"addresses,omitempty"`
}

// GuestFileSystem is one of guest-get-fsinfo.
type GuestFileSystem struct {
	Device string `json:"device,omitempty"`
	Mount  string `json:"mount"`
	Type   string `json:"type,omitempty"`
	// Used and Total are 0 when the guest does not say.
	Used  Size `json:"used,omitempty"`
	Total Size `json:"total,omitempty"`
}

// GuestFileSystems is the answer to a question for them.
type GuestFileSystems struct {
	VM    string            `json:"vm"`
	Items []GuestFileSystem `json:"items"`
}

// GuestExec asks for a command inside a guest.
type GuestExec struct {
	// Command is the program and its arguments; no shell is involved.
	Command []string `json:"command" doc:"program and arguments; no shell is involved"`
	// Env are NAME=VALUE.
	Env []string `json:"env,omitempty"`
	// Input is its standard input, at most 512 KiB.
	Input []byte `json:"input,omitempty" doc:"standard input, base64, at most 512 KiB"`
	// Seconds to wait for its end, 1-300; default 30. The command goes on after that.
	Seconds int `json:"seconds,omitempty" minimum:"1" maximum:"300"`
}

// Validate checks the bounds and fills in the default.
func (e *GuestExec) Validate() error {
	if len(e.Command) == 0 || e.Command[0] == "" {
		return Invalid("command", "is empty; give the program and its arguments")
	}
	if len(e.Command)+len(e.Env) > MaxExecArgs {
		return Invalid("command", "has more than %d words", MaxExecArgs)
	}
	n := 0
	for _, w := range append(append([]string(nil), e.Command...), e.Env...) {
		n += len(w)
		if strings.ContainsRune(w, 0) {
			return Invalid("command", "holds a NUL character")
		}
	}
	if n > MaxExecBytes {
		return Invalid("command", "has %d bytes; at most %d are taken", n, MaxExecBytes)
	}
	for _, v := range e.Env {
		if name, _, ok := strings.Cut(v, "="); !ok || name == "" {
			return Invalid("env", "%q is not NAME=VALUE", clip(v))
		}
	}
	if len(e.Input) > MaxExecInput {
		return Invalid("input", "has %d bytes; at most %d are taken", len(e.Input), MaxExecInput)
	}
	if e.Seconds == 0 {
		e.Seconds = DefaultExecSeconds
	}
	if e.Seconds < 1 || e.Seconds > MaxExecSeconds {
		return Invalid("seconds", "is %d; give 1 to %d", e.Seconds, MaxExecSeconds)
	}
	return nil
}

// GuestExecResult is how such a command ended.
type GuestExecResult struct {
	// ExitCode is 128 + Signal when a signal ended it.
	ExitCode int    `json:"exitCode"`
	Signal   int    `json:"signal,omitempty"`
	Stdout   []byte `json:"stdout,omitempty"`
	Stderr   []byte `json:"stderr,omitempty"`
	// Truncated is whether there was more output than is passed on.
	Truncated bool `json:"truncated,omitempty"`
}

// GuestPassword asks for the change of a password inside a guest. It has no
// String method that would show it, and is never stored.
type GuestPassword struct {
	User     string `json:"user"`
	Password string `json:"password" doc:"never stored or logged"`
}

// Validate checks the bounds.
func (p *GuestPassword) Validate() error {
	bad := func(r rune) bool { return r < ' ' || r == 0x7f }
	if p.User == "" || len(p.User) > MaxGuestUser || strings.ContainsFunc(p.User, bad) || strings.Contains(p.User, ":") {
		return Invalid("user", "is empty, longer than %d bytes, or holds a colon or control character", MaxGuestUser)
	}
	if p.Password == "" || len(p.Password) > MaxGuestPassword || strings.ContainsFunc(p.Password, bad) {
		return Invalid("password", "is empty, longer than %d bytes, or holds a control character", MaxGuestPassword)
	}
	return nil
}

// GuestFreeze asks to freeze a guest's file systems.
type GuestFreeze struct {
	// Seconds after which they are thawed by themselves, 1-600; default 60.
	Seconds int `json:"seconds,omitempty" minimum:"1" maximum:"600"`
}

// Validate checks the bounds and fills in the default.
func (f *GuestFreeze) Validate() error {
	if f.Seconds == 0 {
		f.Seconds = DefaultFreezeSeconds
	}
	if f.Seconds < 1 || f.Seconds > MaxFreezeSeconds {
		return Invalid("seconds", "is %d; give 1 to %d", f.Seconds, MaxFreezeSeconds)
	}
	return nil
}

// GuestFrozen says how many file systems were frozen or thawed.
type GuestFrozen struct {
	VM          string     `json:"vm"`
	FileSystems int        `json:"fileSystems"`
	Frozen      bool       `json:"frozen"`
	ThawsAt     *time.Time `json:"thawsAt,omitempty"`
}
