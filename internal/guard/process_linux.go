// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package guard

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// childFiles is the soft limit of open files of a VM: disks with their chains,
// consoles, multi-queue network cards.
const childFiles = 16384

// process is a forked child that has not been reaped. Until then its pid cannot
// be given to anybody else, so signals by pid are safe.
type process struct {
	pid        int
	startTicks uint64
	cg         *cgroup // nil without cgroup v2
}

// exitStatus is how a process ended.
type exitStatus struct {
	code   int // -1 when a signal ended it
	signal int
}

// processes is what the Server needs of the operating system; unit tests put a
// fake here.
type processes interface {
	// start forks and execs; it may block on storage and is never called under
	// the Server's lock. check is asked right before the fork.
	start(req StartRequest, check func() error) (*process, error)
	// signal sends sig to the process (SIGKILL: to its group and cgroup too).
	// It never blocks.
	signal(p *process, sig unix.Signal)
	// reap collects the process if it has ended. It never blocks.
	reap(p *process) (exitStatus, bool)
	// exiting tells whether no thread of the process will run its program again,
	// though it is not reaped yet. It never blocks.
	exiting(p *process) bool
	// close ends the helpers. Children still alive get SIGKILL from the kernel.
	close()
}

// forker is the real processes.
type forker struct {
	guardDir string
	cgroups  *cgroupTree // nil without cgroup v2
	jobs     chan forkJob
	quit     chan struct{}
	once     sync.Once
	janitor  *janitor
	// noNewPrivs is why children could gain privileges; of run only.
	noNewPrivs error
}

type forkJob struct {
	req    StartRequest
	files  []uintptr
	cg     *cgroup
	check  func() error
	result chan<- forkResult
}

type forkResult struct {
	pid int
	err error
}

func newForker(guardDir string, cgroups *cgroupTree) *forker {
	f := &forker{
		guardDir: guardDir, cgroups: cgroups,
		jobs: make(chan forkJob), quit: make(chan struct{}),
		janitor: newJanitor(cgroups),
	}
	go f.run()
	return f
}

// run forks for everybody. PDEATHSIG fires when the forking *thread* dies, so
// one goroutine keeps one OS thread; when it returns, the runtime ends the
// thread and the kernel kills the children that are left.
func (f *forker) run() {
	runtime.LockOSThread()
	// A child inherits it from this thread; the rest of the guard is not touched.
	f.noNewPrivs = unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
	for {
		select {
		case <-f.quit:
			return
		case job := <-f.jobs:
			job.result <- f.fork(job)
		}
	}
}

func (f *forker) fork(job forkJob) forkResult {
	if err := job.check(); err != nil {
		return forkResult{err: err}
	}
	env := make([]string, 0, len(job.req.Env)+2)
	env = append(env, job.req.Env...)
	env = append(env, EnvGuardDir+"="+f.guardDir, EnvVM+"="+job.req.VM)
	dir := job.req.Dir
	if dir == "" {
		dir = "/"
	}
	attr := &syscall.ProcAttr{
		Dir: dir, Env: env, Files: job.files,
		Sys: &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL},
	}
	if u := job.req.User; u != nil {
		// The order in the child: ids, then chdir, then PDEATHSIG, which a change
		// of ids would clear.
		attr.Sys.Credential = &syscall.Credential{Uid: u.UID, Gid: u.GID, Groups: u.Groups}
		if f.noNewPrivs != nil {
			return forkResult{err: fmt.Errorf("forbid new privileges: %w", f.noNewPrivs)}
		}
	}
	if err := limitChildren(job.req.User); err != nil {
		return forkResult{err: err}
	}
	if job.cg != nil {
		attr.Sys.UseCgroupFD = true
		attr.Sys.CgroupFD = int(job.cg.dir.Fd())
	}
	pid, err := syscall.ForkExec(job.req.Argv[0], job.req.Argv, attr)
	return forkResult{pid: pid, err: err}
}

// limitChildren sets the limits that the next child begins with. They are the
// guard's own, too, which writes no core and needs few files; the limit of locked
// memory is only ever raised, because the guard's own memory is locked. One child
// is forked at a time.
func limitChildren(u *User) error {
	var files, locked unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		return fmt.Errorf("limit of open files: %w", err)
	}
	// Through the syscall package, which otherwise gives children the limit that
	// the guard itself was started with.
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: min(files.Max, childFiles), Max: files.Max}); err != nil {
		return fmt.Errorf("limit of open files: %w", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("limit of core files: %w", err)
	}
	if u == nil || u.MemlockBytes == 0 {
		return nil
	}
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &locked); err != nil {
		return fmt.Errorf("limit of locked memory: %w", err)
	}
	if locked.Cur >= u.MemlockBytes {
		return nil
	}
	locked = unix.Rlimit{Cur: u.MemlockBytes, Max: max(locked.Max, u.MemlockBytes)}
	if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &locked); err != nil {
		return fmt.Errorf("let the child lock %d bytes of memory: %w", u.MemlockBytes, err)
	}
	return nil
}

func (f *forker) start(req StartRequest, check func() error) (*process, error) {
	logFile, err := openLog(req.LogPath)
	if err != nil {
		return nil, err
	}
	defer func() { _ = logFile.Close() }()
	null, err := os.OpenFile(os.DevNull, os.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	defer func() { _ = null.Close() }()

	var cg *cgroup
	if f.cgroups != nil {
		if cg, err = f.cgroups.create(req.VM); errors.Is(err, errCgroupBusy) {
			return nil, refuse(CodeStranger, "%v", err)
		}
		// Any other failure leaves cg nil: the VM runs without a cgroup.
	}
	job := forkJob{req: req, cg: cg, check: check, files: []uintptr{null.Fd(), logFile.Fd(), logFile.Fd()}}
	pid, err := f.submit(job)
	var refusal *Error
	if err != nil && cg != nil && !errors.As(err, &refusal) {
		// Perhaps the kernel or a sandbox refuses to clone into a cgroup; if
		// the program itself is at fault, the second attempt fails the same.
		f.janitor.remove(cg)
		cg, job.cg = nil, nil
		pid, err = f.submit(job)
	}
	if err != nil {
		if cg != nil {
			f.janitor.remove(cg)
		}
		return nil, fmt.Errorf("run %s: %w", req.Argv[0], err)
	}
	// Not reaped before it is registered, so /proc/PID is there even if it died.
	_ = setOOMScore(pid, 0) // best effort, as for the guard itself
	p := &process{pid: pid, cg: cg}
	if st, err := readProcStat(pid); err == nil {
		p.startTicks = st.startTicks
	}
	return p, nil
}

func (f *forker) submit(job forkJob) (int, error) {
	result := make(chan forkResult, 1)
	job.result = result
	select {
	case f.jobs <- job:
	case <-f.quit:
		return 0, refuse(CodeStopping, "the guard is stopping")
	}
	r := <-result
	return r.pid, r.err
}

func (f *forker) signal(p *process, sig unix.Signal) {
	if sig == unix.SIGKILL {
		_ = unix.Kill(-p.pid, sig) // the child leads its own process group
	}
	_ = unix.Kill(p.pid, sig)
	if sig == unix.SIGKILL && p.cg != nil {
		f.janitor.kill(p.cg)
	}
}

func (f *forker) reap(p *process) (exitStatus, bool) {
	var ws unix.WaitStatus
	pid, err := unix.Wait4(p.pid, &ws, unix.WNOHANG, nil)
	var st exitStatus
	switch {
	case errors.Is(err, unix.ECHILD):
		st = exitStatus{code: -1} // somebody else collected it; it is gone
	case err != nil || pid != p.pid:
		return exitStatus{}, false
	case ws.Signaled():
		st = exitStatus{code: -1, signal: int(ws.Signal())}
	default:
		st = exitStatus{code: ws.ExitStatus()}
	}
	if p.cg != nil {
		f.janitor.remove(p.cg)
	}
	return st, true
}

func (f *forker) exiting(p *process) bool {
	tasks, err := os.ReadDir(filepath.Join("/proc", strconv.Itoa(p.pid), "task"))
	if err != nil {
		return false
	}
	for _, task := range tasks {
		data, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(p.pid), "task", task.Name(), "stat"))
		if errors.Is(err, os.ErrNotExist) {
			continue // gone since the folder was read; what is exiting makes no new one
		}
		if err != nil {
			return false
		}
		if st, err := parseProcStat(string(data)); err != nil || st.flags&taskExiting == 0 {
			return false
		}
	}
	return true
}

func (f *forker) close() {
	f.once.Do(func() {
		f.janitor.close()
		close(f.quit)
	})
}

// openLog opens a VM's log for appending, after rotating a large one away.
func openLog(path string) (*os.File, error) {
	if fi, err := os.Lstat(path); err == nil && fi.Mode().IsRegular() && fi.Size() > LogRotateBytes {
		if err := os.Rename(path, path+".1"); err != nil {
			return nil, fmt.Errorf("rotate log: %w", err)
		}
	}
	// O_NONBLOCK: opening a FIFO must not hang. It means nothing on files.
	flags := os.O_WRONLY | os.O_APPEND | os.O_CREATE | unix.O_NOFOLLOW | unix.O_NONBLOCK
	f, err := os.OpenFile(path, flags, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", path)
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("open log: %w", err)
	}
	return f, nil
}

// procStat is what the guard reads from /proc/PID/stat (proc_pid_stat(5)).
type procStat struct {
	state      byte   // field 3
	flags      uint64 // field 9, PF_* of include/linux/sched.h
	threads    int    // field 20
	startTicks uint64 // field 22
}

// taskExiting is PF_EXITING: the thread is in do_exit, from which it does not
// return to its program.
const taskExiting = 0x4

// gone tells that no thread of the process can run any more. A zombie leader
// alone is not enough: another thread may still sit in the kernel.
func (s procStat) gone() bool {
	return s.state == 'X' || s.state == 'x' || s.state == 'Z' && s.threads <= 1
}

func readProcStat(pid int) (procStat, error) {
	data, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return procStat{}, err
	}
	return parseProcStat(string(data))
}

// parseProcStat parses one line; the command name may have spaces and ')'.
func parseProcStat(line string) (procStat, error) {
	i := strings.LastIndexByte(line, ')')
	if i < 0 {
		return procStat{}, fmt.Errorf("stat line without a command name")
	}
	f := strings.Fields(line[i+1:]) // f[0] is field 3
	if len(f) < 20 || len(f[0]) != 1 {
		return procStat{}, fmt.Errorf("stat line with %d fields", len(f)+2)
	}
	flags, err := strconv.ParseUint(f[6], 10, 64)
	if err != nil {
		return procStat{}, fmt.Errorf("flags: %w", err)
	}
	threads, err := strconv.Atoi(f[17])
	if err != nil {
		return procStat{}, fmt.Errorf("thread count: %w", err)
	}
	ticks, err := strconv.ParseUint(f[19], 10, 64)
	if err != nil {
		return procStat{}, fmt.Errorf("start time: %w", err)
	}
	return procStat{state: f[0][0], flags: flags, threads: threads, startTicks: ticks}, nil
}
