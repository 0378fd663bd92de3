// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package guard

import (
	"encoding/json"
	"errors"
	"time"
)

// ProtocolVersion is raised when an old client can no longer talk to the guard.
const ProtocolVersion = 1

// Limits of the protocol and of the guard.
const (
	// MaxRequestBytes bounds one request line, newline included.
	MaxRequestBytes = 1 << 20
	// MaxReplyBytes bounds one answer or event line (list of everything).
	MaxReplyBytes = 16 << 20
	// MaxConnections bounds the open connections of one guard.
	MaxConnections = 64
	// MaxInFlight bounds the waiting start and kill requests of one connection.
	MaxInFlight = 64
	// MaxRunning bounds the VMs that have not exited.
	MaxRunning = 512
	// MaxExited bounds the kept records of exited VMs; the oldest is dropped.
	MaxExited = 1024
	// MaxQueued bounds the messages queued for one connection.
	MaxQueued = 256
	// MaxGroups bounds the supplementary groups of one VM.
	MaxGroups = 16
	// MaxVMLen, MaxPathBytes and MaxExtraBytes bound single request fields.
	MaxVMLen      = 64
	MaxPathBytes  = 1024
	MaxExtraBytes = 4096
	// LogRotateBytes is the size above which a VM's log is rotated at start.
	LogRotateBytes = 1 << 20
)

// Times of the guard.
const (
	// MaxAhead is how far in the future a deadline may lie.
	MaxAhead = 120 * time.Second
	// KillRepeat is the pause between two SIGKILLs to a process not yet reaped.
	KillRepeat = 100 * time.Millisecond
	// KillTime is how long after its deadline a protected VM may go on at most:
	// the cluster counts on it. Who is not dead by then dies with the host, if
	// that has a watchdog.
	KillTime = 2 * time.Second
	// KillWait is how long a kill request waits for the reaping.
	KillWait = 10 * time.Second
	// StopGrace is what VMs get between SIGTERM and SIGKILL when the guard stops.
	StopGrace = 5 * time.Second
	// LeftoverWait is how long a starting guard waits for killed leftovers.
	LeftoverWait = 5 * time.Second
)

// File names inside the run directory.
const (
	SocketName = "guard.sock"
	LockName   = "guard.lock"
)

// Environment variables set for every child, by which a later guard knows it.
const (
	EnvGuardDir = "MUSTER_GUARD_DIR"
	EnvVM       = "MUSTER_VM"
)

// Code is the stable reason of a refusal.
type Code string

// The codes of the protocol.
const (
	CodeBadRequest   Code = "bad_request"   // malformed, unknown op or field, out of range
	CodeStaleSession Code = "stale_session" // not the current session
	CodeLapsed       Code = "lapsed"        // the session's deadline has passed
	CodeKilling      Code = "killing"       // VMs of the lapsed session are not reaped yet
	CodeExists       Code = "exists"        // the VM is present and has not exited
	CodeTooMany      Code = "too_many"      // MaxRunning reached
	CodeStranger     Code = "stranger"      // a process of an earlier life cannot be killed
	CodeStartFailed  Code = "start_failed"  // log, fork or exec failed
	CodeKilled       Code = "killed"        // a kill request overtook the start
	CodeTimeout      Code = "timeout"       // not reaped within KillWait; killing goes on
	CodeNotRunning   Code = "not_running"   // unknown VM, or not in state running
	CodeBusy         Code = "busy"          // VMs are running, or too many requests wait
	CodeStopping     Code = "stopping"      // the guard is going away
	CodeSuperseded   Code = "superseded"    // a later connection has taken control
	CodeInternal     Code = "internal"      // a defect of the guard
)

// Sentinels to compare refusals with errors.Is.
var (
	ErrBadRequest   = errors.New("guard: bad request")
	ErrStaleSession = errors.New("guard: stale session")
	ErrLapsed       = errors.New("guard: session lapsed")
	ErrKilling      = errors.New("guard: still killing the VMs of a lapsed session")
	ErrExists       = errors.New("guard: vm already present")
	ErrTooMany      = errors.New("guard: too many vms")
	ErrStranger     = errors.New("guard: a process of an earlier life still holds the vm")
	ErrStartFailed  = errors.New("guard: start failed")
	ErrKilled       = errors.New("guard: killed while starting")
	ErrTimeout      = errors.New("guard: not reaped in time")
	ErrNotRunning   = errors.New("guard: vm not running")
	ErrBusy         = errors.New("guard: busy")
	ErrStopping     = errors.New("guard: stopping")
	ErrSuperseded   = errors.New("guard: a later connection has control")
	ErrInternal     = errors.New("guard: internal error")

	// ErrLocked means that another guard serves the run directory.
	ErrLocked = errors.New("guard: another guard holds the run directory")
	// ErrClosed means that the connection to the guard has ended.
	ErrClosed = errors.New("guard: connection closed")
)

// sentinel returns the error a code unwraps to.
func (c Code) sentinel() error {
	switch c {
	case CodeBadRequest:
		return ErrBadRequest
	case CodeStaleSession:
		return ErrStaleSession
	case CodeLapsed:
		return ErrLapsed
	case CodeKilling:
		return ErrKilling
	case CodeExists:
		return ErrExists
	case CodeTooMany:
		return ErrTooMany
	case CodeStranger:
		return ErrStranger
	case CodeStartFailed:
		return ErrStartFailed
	case CodeKilled:
		return ErrKilled
	case CodeTimeout:
		return ErrTimeout
	case CodeNotRunning:
		return ErrNotRunning
	case CodeBusy:
		return ErrBusy
	case CodeStopping:
		return ErrStopping
	case CodeSuperseded:
		return ErrSuperseded
	}
	return ErrInternal
}

// Error is a refusal by the guard. It unwraps to the sentinel of its code.
type Error struct {
	Code Code
	Msg  string
}

func (e *Error) Error() string { return "guard: " + string(e.Code) + ": " + e.Msg }

// Refused reports that the guard has answered: the request is over. Of one that
// ended with any other error nobody knows whether it is still under way.
func (e *Error) Refused() bool { return true }

// Unwrap returns the sentinel of the code.
func (e *Error) Unwrap() error { return e.Code.sentinel() }

// Level says what stands behind the promise.
type Level string

// The levels, strongest first.
const (
	LevelHardware Level = "hardware watchdog"
	LevelSoftdog  Level = "softdog"
	LevelProcess  Level = "process only"
)

// Hardening tells how each best-effort measure went: "ok", or why not.
type Hardening struct {
	Mlockall string `json:"mlockall"`
	SchedRR  string `json:"sched_rr"`
	OOMScore string `json:"oom_score_adj"`
	Cgroup   string `json:"cgroup"`
	Watchdog string `json:"watchdog"`
}

// The features of a guard that one of an earlier version lacks. A guard lives as
// long as its VMs, so a new daemon meets old guards.
const (
	// FeatureUser: a start may name the user that the VM runs as.
	FeatureUser = "user"
	// FeatureControl: one connection has control.
	FeatureControl = "control"
)

// Hello is what the guard says about itself. Times are CLOCK_BOOTTIME ns.
type Hello struct {
	Protocol   int       `json:"protocol"`
	PID        int       `json:"pid"`
	Level      Level     `json:"level"`
	Hardening  Hardening `json:"hardening"`
	NowNS      int64     `json:"now_ns"`
	Session    uint64    `json:"session"`     // 0: none yet
	DeadlineNS int64     `json:"deadline_ns"` // 0: none yet
	Lapsed     bool      `json:"lapsed"`
	// Features are what this guard can do beyond the first version.
	Features []string `json:"features,omitempty"`
	// Strangers are VM ids whose earlier processes could not be killed. The
	// empty id stands for a process that names no VM: it blocks every start.
	Strangers []string `json:"strangers,omitempty"`
}

// User is who a VM process runs as. It has these ids only, no capability, and
// can never gain any (PR_SET_NO_NEW_PRIVS).
type User struct {
	// UID, GID and Groups are never 0.
	UID    uint32   `json:"uid"`
	GID    uint32   `json:"gid"`
	Groups []uint32 `json:"groups,omitempty"`
	// MemlockBytes is how much it may lock at least; 0: whatever the host allows.
	MemlockBytes uint64 `json:"memlock_bytes,omitempty"`
}

// StartRequest asks for one VM process.
type StartRequest struct {
	VM        string `json:"vm"` // [a-zA-Z0-9-]{1,64}
	Epoch     uint64 `json:"epoch"`
	Session   uint64 `json:"session"`
	Protected bool   `json:"protected"`
	// Argv[0] is the absolute path of the program.
	Argv []string `json:"argv"`
	// Env is the whole environment besides EnvGuardDir and EnvVM.
	Env []string `json:"env"`
	// Dir is the working directory; "" means "/".
	Dir string `json:"dir"`
	// User is who it runs as; the guard's own user when nil.
	User *User `json:"user,omitempty"`
	// LogPath receives stdout and stderr (0600, appended).
	LogPath string `json:"log_path"`
	// Extra is any JSON value up to MaxExtraBytes, returned in the record.
	Extra json.RawMessage `json:"extra,omitempty"`
}

// Started identifies a started process: a pid is unique with its start time.
type Started struct {
	PID        int    `json:"pid"`
	StartTicks uint64 `json:"start_ticks"` // field 22 of /proc/PID/stat
}

// State of a VM process.
type State string

// The states. A VM in StateStarting has no pid yet.
const (
	StateStarting State = "starting"
	StateRunning  State = "running"
	StateKilling  State = "killing"
	StateExited   State = "exited"
)

// Reason why a VM exited, or is being killed.
type Reason string

// The reasons.
const (
	ReasonExited   Reason = "exited"
	ReasonKill     Reason = "kill request"
	ReasonLease    Reason = "lease expired"
	ReasonStopping Reason = "guard stopping"
)

// Record is what the guard knows of one VM. Times are CLOCK_BOOTTIME ns.
type Record struct {
	VM         string `json:"vm"`
	Epoch      uint64 `json:"epoch"`
	PID        int    `json:"pid"`
	StartTicks uint64 `json:"start_ticks"`
	Protected  bool   `json:"protected"`
	State      State  `json:"state"`
	ExitCode   int    `json:"exit_code"` // -1 when a signal ended it
	Signal     int    `json:"signal"`    // 0 when it exited by itself
	Reason     Reason `json:"reason,omitempty"`
	StartedNS  int64  `json:"started_ns"`
	ExitedNS   int64  `json:"exited_ns"`
	LogPath    string `json:"log_path"`
	// UID is the user it runs as, 0 for the guard's own.
	UID   uint32          `json:"uid,omitempty"`
	Extra json.RawMessage `json:"extra,omitempty"`
}

// Outcome of a kill request.
type Outcome string

// The outcomes.
const (
	OutcomeKilled  Outcome = "killed"  // was present, is reaped now
	OutcomeExited  Outcome = "exited"  // had exited before
	OutcomeUnknown Outcome = "unknown" // never seen, or forgotten
)

// The kinds of events.
const (
	EventExit   = "exit"
	EventLapsed = "lapsed"
)

// Event is pushed on connections that asked to watch.
type Event struct {
	// Kind is EventExit (Record is set) or EventLapsed (Session is set).
	Kind    string `json:"event"`
	Session uint64 `json:"session"`
	Record
}

// lapsedEvent and exitEvent are the two shapes of Event on the wire.
type lapsedEvent struct {
	Kind    string `json:"event"`
	Session uint64 `json:"session"`
}

type exitEvent struct {
	Kind string `json:"event"`
	Record
}
