// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

const greeting = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "capabilities": ["oob"]}}` + "\r\n"

// peer is the QEMU end of a connection, moved by the test.
type peer struct {
	t *testing.T
	net.Conn
	r *bufio.Reader
}

type seen struct {
	Execute   string
	Arguments json.RawMessage
	ID        uint64
}

func (p *peer) say(format string, args ...any) {
	p.t.Helper()
	if _, err := fmt.Fprintf(p.Conn, format, args...); err != nil {
		p.t.Errorf("peer: %v", err)
	}
}

func (p *peer) hear() seen {
	p.t.Helper()
	line, err := p.r.ReadBytes('\n')
	if err != nil {
		p.t.Errorf("peer: %v", err)
		return seen{}
	}
	var s seen
	if err := json.Unmarshal(line, &s); err != nil {
		p.t.Errorf("peer: %q: %v", line, err)
	}
	return s
}

// pair returns a negotiated connection and its other end, over a unix socket,
// whose buffers behave as QEMU's do.
func pair(t *testing.T) (*Conn, *peer) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "q")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	got := make(chan *peer, 1)
	go func() {
		s, err := l.Accept()
		if err != nil {
			t.Error(err)
			close(got)
			return
		}
		p := &peer{t: t, Conn: s, r: bufio.NewReader(s)}
		p.say(greeting)
		p.say(`{"return": {}, "id": %d}`+"\r\n", p.hear().ID)
		got <- p
	}()
	c, err := Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	p := <-got
	t.Cleanup(func() { c.Disconnect(); p.Close() })
	return c, p
}

func TestGreetingGivesTheVersion(t *testing.T) {
	c, _ := pair(t)
	if v := c.Version().String(); v != "7.2.22" {
		t.Fatal(v)
	}
}

func TestRepliesGoToTheirCommandsInAnyOrder(t *testing.T) {
	c, p := pair(t)
	const n = 20
	go func() {
		var all []seen
		for range n {
			all = append(all, p.hear())
		}
		for i := len(all) - 1; i >= 0; i-- {
			p.say(`{"event":"NOISE","data":{},"timestamp":{"seconds":1,"microseconds":2}}` + "\n")
			p.say(`{"return": %q, "id": %d}`+"\n", all[i].Execute, all[i].ID)
		}
	}()
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			cmd, got := fmt.Sprintf("cmd-%d", i), ""
			if err := c.Execute(t.Context(), cmd, nil, &got); err != nil || got != cmd {
				t.Errorf("%s: got %q, %v", cmd, got, err)
			}
		})
	}
	wg.Wait()
}

func TestLargeReplyIsReadWhole(t *testing.T) {
	c, p := pair(t)
	big := strings.Repeat("x", 3<<20)
	go func() { p.say(`{"return": {"big": %q}, "id": %d}`+"\r\n", big, p.hear().ID) }()
	var got struct{ Big string }
	if err := c.Execute(t.Context(), "query-big", map[string]int{"a": 1}, &got); err != nil || got.Big != big {
		t.Fatalf("%d bytes, %v", len(got.Big), err)
	}
}

func TestReplyOverTheLimitEndsTheConnection(t *testing.T) {
	c, p := pair(t)
	go func() {
		fmt.Fprintf(p, `{"id": %d, "return": "`, p.hear().ID)
		chunk := []byte(strings.Repeat("x", 1<<20))
		for range MaxMessageBytes>>20 + 1 {
			if _, err := p.Write(chunk); err != nil {
				return // closed by the other side, as it should be
			}
		}
	}()
	if err := c.Execute(t.Context(), "query-huge", nil, nil); !errors.Is(err, ErrProtocol) {
		t.Fatal(err)
	}
	<-c.Done()
}

func TestRefusalIsTyped(t *testing.T) {
	c, p := pair(t)
	go func() {
		p.say(`{"id": %d, "error": {"class": "CommandNotFound", "desc": "no such command"}}`+"\n", p.hear().ID)
		p.say(`{"id": %d, "return": {"status": 5}}`+"\n", p.hear().ID)
	}()
	err := c.Execute(t.Context(), "nonsense", nil, nil)
	var ce *CommandError
	if !errors.As(err, &ce) || ce.Class != "CommandNotFound" || ce.Command != "nonsense" || ce.Desc != "no such command" {
		t.Fatal(err)
	}
	var wrong struct{ Status string }
	if err := c.Execute(t.Context(), "query-status", nil, &wrong); err == nil {
		t.Fatal("a number was read into a string")
	}
	if c.Err() != nil {
		t.Fatal("a refusal ended the connection:", c.Err())
	}
}

// expiring is a context whose deadline has passed when the test closes over.
type expiring struct {
	context.Context //nolint:containedctx // it is one
	over            chan struct{}
}

func (e expiring) Done() <-chan struct{} { return e.over }

func (e expiring) Err() error {
	select {
	case <-e.over:
		return context.DeadlineExceeded
	default:
		return nil
	}
}

func TestReplyAfterTheDeadlineIsDropped(t *testing.T) {
	c, p := pair(t)
	ctx := expiring{t.Context(), make(chan struct{})}
	var late seen
	go func() {
		late = p.hear()
		close(ctx.over)
	}()
	if err := c.Execute(ctx, "slow", nil, nil); !errors.Is(err, ErrTimeout) {
		t.Fatal(err)
	}
	p.say(`{"return": "late", "id": %d}`+"\n", late.ID)
	go func() { p.say(`{"return": "fresh", "id": %d}`+"\n", p.hear().ID) }()
	var got string
	if err := c.Execute(t.Context(), "next", nil, &got); err != nil || got != "fresh" {
		t.Fatalf("%q, %v", got, err)
	}
	if c.LateReplies() != 1 {
		t.Fatalf("%d late replies counted", c.LateReplies())
	}
}

func TestCancelledCommandReturnsAtOnce(t *testing.T) {
	c, _ := pair(t)
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(10*time.Millisecond, cancel)
	if err := c.Execute(ctx, "hang", nil, nil); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
}

func TestTooManyWaitingCommandsAreRefused(t *testing.T) {
	c, p := pair(t)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range MaxPending {
		wg.Go(func() { _ = c.Execute(ctx, "hang", nil, nil) })
	}
	for range MaxPending {
		p.hear()
	}
	if err := c.Execute(t.Context(), "one-more", nil, nil); !errors.Is(err, ErrBusy) {
		t.Error(err)
	}
	cancel()
	wg.Wait()
}

// A peer that reads no more: the socket's buffer fills up.
func TestStuckPeerHoldsNobodyPastTheDeadline(t *testing.T) {
	c, p := pair(t)
	big := json.RawMessage(`"` + strings.Repeat("x", 1<<20) + `"`)
	ctx := expiring{t.Context(), make(chan struct{})}
	go func() {
		_, _ = p.r.Peek(1) // the command has begun to be written
		close(ctx.over)
	}()
	if err := c.Execute(ctx, "big", map[string]any{"a": big}, nil); !errors.Is(err, ErrTimeout) {
		t.Fatal(err)
	}
	<-c.Done() // half a command was written: the stream cannot be used any more
	if err := c.Execute(t.Context(), "next", nil, nil); err == nil {
		t.Fatal("a broken stream was used")
	}
}

func TestEndOfQEMUEndsEverything(t *testing.T) {
	for name, last := range map[string]string{
		"between messages": "", "inside a reply": `{"return": {"a`, "after blank lines": "\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			c, p := pair(t)
			sub := c.Subscribe()
			defer sub.Close()
			go func() {
				p.hear()
				p.say("%s", last)
				p.Close()
			}()
			err := c.Execute(t.Context(), "query-status", nil, nil)
			if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Fatal(err)
			}
			<-c.Done()
			if _, _, err := sub.Next(t.Context()); err == nil || err != c.Err() {
				t.Fatal(err)
			}
		})
	}
}

func TestLastWordsAreHeardAlthoughAWriteFailed(t *testing.T) {
	a, b := net.Pipe()
	stream := &brokenWrites{Conn: a}
	c := New(func(context.Context) (net.Conn, error) { return stream, nil })
	p := &peer{t: t, Conn: b, r: bufio.NewReader(b)}
	go func() {
		p.say(greeting)
		p.say(`{"return": {}, "id": %d}`+"\n", p.hear().ID)
	}()
	if err := c.ConnectContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	sub := c.Subscribe()
	defer sub.Close()
	stream.broken.Store(true)
	if err := c.Execute(t.Context(), "query-status", nil, nil); !errors.Is(err, io.ErrClosedPipe) {
		t.Fatal(err)
	}
	p.say(`{"event": "SHUTDOWN", "data": {"guest": true}}` + "\n")
	p.Close()
	if e, _, err := sub.Next(t.Context()); err != nil || e.Event != "SHUTDOWN" {
		t.Fatal(e, err)
	}
	<-c.Done()
}

// brokenWrites is the stream to a peer that reads no more.
type brokenWrites struct {
	net.Conn
	broken atomic.Bool
}

func (b *brokenWrites) Write(p []byte) (int, error) {
	if b.broken.Load() {
		return 0, io.ErrClosedPipe
	}
	return b.Conn.Write(p)
}

func TestGarbageEndsTheConnection(t *testing.T) {
	for _, junk := range []string{"garbage\n", "{}\n", "[]\n", `{"return": 1}` + "\n", `{"event": ""}` + "\n", `{"event": 5}` + "\n",
		`{"id": "x", "return": 1}` + "\n", `{"error": {"class": "GenericError", "desc": "JSON parse error"}}` + "\n", greeting, "\x00\xff\n", "null\n"} {
		c, p := pair(t)
		p.say("%s", junk)
		<-c.Done()
		if !errors.Is(c.Err(), ErrProtocol) {
			t.Errorf("%q: %v", junk, c.Err())
		}
	}
}

func TestReplyNobodyAskedForIsHarmless(t *testing.T) {
	c, p := pair(t)
	p.say(`{"return": {}, "id": 4711}` + "\n")
	go func() { p.say(`{"return": null, "id": %d}`+"\n", p.hear().ID) }()
	if err := c.Execute(t.Context(), "x", nil, nil); err != nil {
		t.Fatal(err)
	}
}

func TestBurstOfEventsBlocksNobodyAndIsReported(t *testing.T) {
	c, p := pair(t)
	deaf, quick := c.Subscribe(), c.Subscribe()
	defer deaf.Close()
	defer quick.Close()
	const burst = 5 * MaxQueuedEvents
	go func() {
		for i := range burst {
			p.say(`{"timestamp":{"seconds":1,"microseconds":%d},"event":"JOB_STATUS_CHANGE","data":{"n":%d}}`+"\r\n", i, i)
		}
		p.say(`{"return": true, "id": %d}`+"\n", p.hear().ID)
	}()
	var ok bool
	if err := c.Execute(t.Context(), "query", nil, &ok); err != nil || !ok {
		t.Fatal(err)
	}
	e, lost, err := deaf.Next(t.Context())
	if err != nil || lost != burst-MaxQueuedEvents || e.Data["n"] != float64(lost) || deaf.Dropped() != lost {
		t.Fatalf("event %v, lost %d, %v", e, lost, err)
	}
	var sum, last uint64
	for n := range uint64(burst) { // the other queue lost the same, on its own
		e, lost, err := quick.Next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if sum += lost; n+sum == burst-1 {
			last = uint64(e.Data["n"].(float64))
			break
		}
	}
	if last != burst-1 {
		t.Fatalf("the newest event was dropped; last %d", last)
	}
}

func TestEventsChannelMarksWhatWasLostAndEnds(t *testing.T) {
	c, p := pair(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ch, err := c.Events(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 * MaxQueuedEvents {
		p.say(`{"event":"STOP","data":{"n":%d},"timestamp":{"seconds":1,"microseconds":0}}`+"\n", i)
	}
	go func() { p.say(`{"return": 0, "id": %d}`+"\n", p.hear().ID) }()
	if err := c.Execute(t.Context(), "sync", nil, nil); err != nil {
		t.Fatal(err)
	}
	p.Close()
	var marks int
	for e := range ch { // ends because the connection did
		if e.Event == EventsLost {
			marks++
		}
	}
	if marks == 0 {
		t.Fatal("no mark in place of the lost events")
	}
}

func TestMonitorOfGoQEMU(t *testing.T) {
	c, p := pair(t)
	go func() {
		s := p.hear()
		if s.Execute != "query-x" || string(s.Arguments) != `{"a":1}` {
			t.Errorf("%+v", s)
		}
		p.say(`{"return": {"b":2}, "id": %d}`+"\n", s.ID)
	}()
	out, err := c.Run([]byte(`{"execute":"query-x","arguments":{"a":1}}`))
	if err != nil || !strings.Contains(string(out), `"return": {"b":2}`) {
		t.Fatalf("%s, %v", out, err)
	}
	for _, bad := range []string{"", "{}", `{"execute":5}`} {
		if _, err := c.Run([]byte(bad)); err == nil {
			t.Errorf("%q was sent", bad)
		}
	}
	if err := c.Disconnect(); err != nil {
		t.Fatal(err)
	}
	if err := c.Connect(); !errors.Is(err, ErrClosed) {
		t.Fatal(err)
	}
	if err := c.Execute(t.Context(), "x", nil, nil); !errors.Is(err, ErrClosed) {
		t.Fatal(err)
	}
}

func TestConnectFailsClearly(t *testing.T) {
	pipe := func(say string, hang bool) Dialer {
		return func(context.Context) (net.Conn, error) {
			a, b := net.Pipe()
			go func() {
				fmt.Fprint(b, say)
				if !hang {
					b.Close()
				}
			}()
			return a, nil
		}
	}
	for name, c := range map[string]struct {
		dial Dialer
		want error
	}{
		"end before the greeting":  {pipe("", false), io.EOF},
		"no greeting":              {pipe("", true), ErrTimeout},
		"half a greeting":          {pipe(greeting[:30], true), ErrTimeout},
		"something else":           {pipe("SSH-2.0-x\n", true), ErrProtocol},
		"an event first":           {pipe(`{"event":"STOP"}`+"\n", true), ErrProtocol},
		"no answer to negotiation": {pipe(greeting, true), ErrTimeout},
		"nobody listens":           {func(context.Context) (net.Conn, error) { return nil, io.ErrClosedPipe }, io.ErrClosedPipe},
	} {
		t.Run(name, func(t *testing.T) {
			patience := time.Minute
			if errors.Is(c.want, ErrTimeout) {
				patience = 50 * time.Millisecond
			}
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			q := New(c.dial)
			if err := q.ConnectContext(ctx); !errors.Is(err, c.want) {
				t.Fatalf("got %v, want %v", err, c.want)
			}
			<-q.Done()
		})
	}
}

func FuzzDecode(f *testing.F) {
	for _, s := range []string{greeting, `{"return":{},"id":1}`, `{"event":"STOP","timestamp":{"seconds":1,"microseconds":2}}`, `{"error":{"class":"a","desc":"b"},"id":2}`, "{", "\xff"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		r := bufio.NewReaderSize(strings.NewReader(string(in)), 16)
		for {
			line, err := readLine(r, 1024)
			if err != nil {
				return
			}
			if len(line) == 0 || len(line) > 1024 {
				t.Fatalf("line of %d bytes", len(line))
			}
			m, err := decode(line)
			if err != nil {
				if !errors.Is(err, ErrProtocol) {
					t.Fatal(err)
				}
				continue
			}
			n := 0
			for _, set := range []bool{m.greeting != nil, m.event != nil, m.reply != nil} {
				if set {
					n++
				}
			}
			if n != 1 {
				t.Fatalf("%q decoded to %d kinds", line, n)
			}
		}
	})
}
