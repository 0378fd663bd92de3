// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// patience bounds every wait; nothing waits that long when it works.
const patience = time.Minute

// served is a qemu-nbd with a file.
type served struct {
	path string
	cmd  *exec.Cmd
	conn *Conn
}

func serve(t *testing.T, size int64, more ...string) *served {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbd") // t.TempDir may be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	s := &served{path: filepath.Join(dir, "disk")}
	if err := errors.Join(os.WriteFile(s.path, nil, 0o600), os.Truncate(s.path, size)); err != nil {
		t.Fatal(err)
	}
	sock := filepath.Join(dir, "sock")
	s.cmd = exec.Command("qemu-nbd", append([]string{"--socket", sock, "--format", "raw", s.path}, more...)...)
	s.cmd.Stderr = os.Stderr
	if err := s.cmd.Start(); err != nil {
		t.Fatalf("start qemu-nbd: %v; install qemu-utils", err)
	}
	t.Cleanup(func() {
		_ = s.cmd.Process.Kill()
		_ = s.cmd.Wait()
	})
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var c net.Conn
	for c == nil {
		if c, err = net.Dial("unix", sock); err != nil && ctx.Err() != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Millisecond)
	}
	s.conn, err = Open(ctx, c, "")
	if err != nil {
		if len(more) == 0 {
			t.Fatal(err)
		}
		return s
	}
	t.Cleanup(s.conn.Close)
	return s
}

func TestWhatIsWrittenIsReadAndInTheFile(t *testing.T) {
	s := serve(t, 8<<20)
	if s.conn.Size() != 8<<20 {
		t.Fatalf("it has %d bytes", s.conn.Size())
	}
	var wg sync.WaitGroup
	for i := range 32 {
		wg.Go(func() {
			data := bytes.Repeat([]byte{byte(i + 1)}, 16<<10)
			at := uint64(i) * 16 << 10
			if err := s.conn.Write(t.Context(), at, data); err != nil {
				t.Error(err)
			}
			if got, err := s.conn.Read(t.Context(), at, len(data)); err != nil || !bytes.Equal(got, data) {
				t.Errorf("at %d: %v, %x", at, err, got[:min(8, len(got))])
			}
		})
	}
	wg.Wait()
	disk, err := os.ReadFile(s.path)
	if err != nil || disk[5*16<<10] != 6 || disk[32*16<<10] != 0 {
		t.Errorf("the file has other content (%v)", err)
	}
	for name, f := range map[string]func() error{
		"beyond the end":  func() error { _, err := s.conn.Read(t.Context(), 8<<20-1, 2); return err },
		"behind the end":  func() error { return s.conn.Write(t.Context(), 1<<63, []byte{1}) },
		"nothing":         func() error { return s.conn.Write(t.Context(), 0, nil) },
		"more than a lot": func() error { _, err := s.conn.Read(t.Context(), 0, MaxBytes+1); return err },
	} {
		if err := f(); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if _, err := s.conn.Read(t.Context(), 0, 512); err != nil {
		t.Errorf("after those: %v", err)
	}
}

func TestTheServerEndsWhenTheConnectionDoes(t *testing.T) {
	s := serve(t, 1<<20)
	s.conn.Close()
	if err := s.cmd.Wait(); err != nil {
		t.Errorf("qemu-nbd: %v", err)
	}
	if _, err := s.conn.Read(t.Context(), 0, 512); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

func TestAServerThatIsKilledFailsWhatWaits(t *testing.T) {
	s := serve(t, 1<<20)
	if err := s.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := s.conn.Write(ctx, 0, []byte{1}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("of a server that stands still: %v", err)
	}
	waits := make(chan error, 1)
	go func() { waits <- s.conn.Write(t.Context(), 0, []byte{2}) }()
	if err := s.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-waits:
		if err == nil {
			t.Error("a killed server has written")
		}
	case <-time.After(patience):
		t.Fatal("the caller was not answered")
	}
}

func TestAnExportThatCannotBeWrittenIsRefused(t *testing.T) {
	if s := serve(t, 1<<20, "--read-only"); s.conn != nil {
		t.Error("it was opened")
	}
}

// greeting is what a server says, up to the transmission.
func greeting(size uint64, flags uint16) []byte {
	b := binary.BigEndian.AppendUint64(nil, magicInit)
	b = binary.BigEndian.AppendUint64(b, magicOption)
	b = binary.BigEndian.AppendUint16(b, flagFixedNewstyle|flagNoZeroes)
	info := binary.BigEndian.AppendUint16(nil, infoExport)
	info = binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint64(info, size), flags)
	b = append(b, optionReply(replyInfo, info)...)
	return append(b, optionReply(replyAck, nil)...)
}

func optionReply(kind uint32, data []byte) []byte {
	b := binary.BigEndian.AppendUint64(nil, magicReply)
	b = binary.BigEndian.AppendUint32(b, optGo)
	b = binary.BigEndian.AppendUint32(b, kind)
	return append(binary.BigEndian.AppendUint32(b, uint32(len(data))), data...)
}

func simple(code uint32, cookie uint64, data []byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, magicSimple)
	b = binary.BigEndian.AppendUint32(b, code)
	return append(binary.BigEndian.AppendUint64(b, cookie), data...)
}

const writable = exportHasFlags | exportSendFUA

// script is a server that says what it is told to, whatever it is asked.
type script struct {
	net.Conn
	says io.Reader
}

func (s *script) Read(b []byte) (int, error)       { return s.says.Read(b) }
func (s *script) Write(b []byte) (int, error)      { return len(b), nil }
func (s *script) Close() error                     { return nil }
func (s *script) SetDeadline(time.Time) error      { return nil }
func (s *script) SetWriteDeadline(time.Time) error { return nil }

func TestServersThatSayOtherThings(t *testing.T) {
	good := greeting(1<<20, writable)
	unknown := append(slicesTo(good, 18), optionReply(replyInfo, []byte{0, 9, 1})...)
	unknown = append(unknown, good[18:]...)
	for name, c := range map[string]struct {
		says []byte
		want string // "": it is opened
	}{
		"as it should be":                {good, ""},
		"information that is not known":  {unknown, ""},
		"nothing":                        {nil, "EOF"},
		"something else":                 {[]byte("SSH-2.0-OpenSSH_9.2p1 Debian"), "no NBD server"},
		"oldstyle":                       {append(slicesTo(good, 16), 0, 0), "fixed newstyle is missing"},
		"an error":                       {append(slicesTo(good, 18), optionReply(replyErrorBit|6, []byte("no such export"))...), "no such export"},
		"an acknowledgement of nothing":  {append(slicesTo(good, 18), optionReply(replyAck, nil)...), "reply 0x1"},
		"a reply that is very long":      {append(slicesTo(good, 18), optionReply(replyInfo, make([]byte, maxReplyBytes+1))...), "no reply"},
		"replies without end":            {append(slicesTo(good, 18), bytes.Repeat(optionReply(replyInfo, []byte{0, 9}), maxReplies)...), "more than"},
		"read-only":                      {greeting(1, writable|exportReadOnly), "must be writable"},
		"no FUA":                         {greeting(1, exportHasFlags), "must be writable and know FUA"},
		"a size that no file has":        {greeting(1<<63, writable), "must be writable"},
		"an export in too few bytes":     {append(slicesTo(good, 18), optionReply(replyInfo, []byte{0, 0, 1})...), "NBD_INFO_EXPORT with 3"},
		"cut off in the acknowledgement": {good[:len(good)-1], "EOF"},
	} {
		n, err := Open(t.Context(), &script{says: bytes.NewReader(c.says)}, "")
		switch {
		case err == nil && c.want != "":
			t.Errorf("%s: it was opened", name)
		case err != nil && (c.want == "" || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
		if n != nil {
			n.Close()
		}
	}
	for name, c := range map[string]struct{ says, want string }{
		"an answer to nobody":  {string(simple(0, 77, nil)), "not asked"},
		"an error of Linux":    {string(simple(uint32(syscall.ESHUTDOWN), 1, nil)), syscall.ESHUTDOWN.Error()},
		"an error of its own":  {string(simple(4711, 1, nil)), syscall.EINVAL.Error()},
		"another magic":        {string(bytes.Repeat([]byte{7}, 16)), "begins with 0x7070707"},
		"half of what is read": {string(simple(0, 1, make([]byte, 100))), "EOF"},
	} {
		here, there := net.Pipe()
		n := newConn(here, 1<<20)
		go func() {
			_, _ = io.ReadFull(there, make([]byte, requestHead))
			_, _ = there.Write([]byte(c.says))
			_ = there.Close()
		}()
		if _, err := n.Read(t.Context(), 0, 512); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
		n.Close()
	}
}

func slicesTo(b []byte, n int) []byte { return append([]byte{}, b[:n]...) }

// A server that never ends its greeting is left at the end of the context.
func TestOpenEndsWithItsContext(t *testing.T) {
	here, there := net.Pipe()
	defer there.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := Open(ctx, here, ""); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
}

// Whatever the server says, callers are answered and the goroutine ends.
func FuzzServer(f *testing.F) {
	f.Add(append(greeting(1<<20, writable), simple(0, 1, make([]byte, 512))...))
	f.Add(append(greeting(1<<20, writable), simple(5, 2, nil)...))
	f.Add(append(slicesTo(greeting(1, 0), 18), optionReply(replyErrorBit|1, []byte("no"))...))
	f.Fuzz(func(t *testing.T, said []byte) {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		n, err := Open(ctx, &script{says: bytes.NewReader(said)}, "x")
		if err != nil {
			return
		}
		if n.Size() >= 512 {
			if got, err := n.Read(ctx, 0, 512); err == nil && len(got) != 512 {
				t.Fatalf("%d bytes", len(got))
			}
			_ = n.Write(ctx, 0, make([]byte, 512))
		}
		n.Close()
		if ctx.Err() != nil {
			t.Fatal("a caller was not answered")
		}
	})
}
