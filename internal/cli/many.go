// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

const (
	// maxAtOnce is how many objects one command works on at a time.
	maxAtOnce = 16
	// maxCount bounds --count.
	maxCount = 1000
)

// many does the same to every name, several at a time, and prints what each says
// in the order of the names. One failure does not keep the others from their turn.
func (a *app) many(names []string, do func(a *app, name string) error) (failed []error) {
	errs := make([]error, len(names))
	said := make([]bytes.Buffer, len(names))
	done := make([]chan struct{}, len(names))
	var stop atomic.Bool
	var work sync.WaitGroup
	slots := make(chan struct{}, maxAtOnce)
	for i := range names {
		done[i] = make(chan struct{})
	}
	work.Go(func() {
		for i, name := range names {
			slots <- struct{}{}
			work.Go(func() {
				defer func() { <-slots; close(done[i]) }()
				if stop.Load() {
					return // it would end the same way
				}
				one := *a
				one.Out, one.ErrTTY = &said[i], false
				one.flags.quiet = a.flags.quiet
				one.still = true
				errs[i] = do(&one, name)
				if errors.Is(errs[i], context.Canceled) || errs[i] != nil && exitCode(errs[i]) == ExitUnavailable {
					stop.Store(true)
				}
			})
		}
	})
	for i := range names {
		<-done[i]
		_, _ = a.Out.Write(said[i].Bytes())
		if errs[i] != nil {
			failed = append(failed, errs[i])
		}
	}
	work.Wait()
	return failed
}

// eachAtOnce is each with several at a time.
func (a *app) eachAtOnce(names []string, do func(a *app, c *client.Client, name string) error) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	if len(names) == 1 {
		return do(a, c, names[0])
	}
	failed := a.many(names, func(a *app, name string) error { return do(a, c, name) })
	if len(failed) == 0 {
		return nil
	}
	for _, err := range failed[1:] {
		a.report(err)
	}
	return failed[0]
}

// numbered returns NAME-1 to NAME-count, with as many digits as the last one has.
func numbered(name string, count int) []string {
	digits := len(strconv.Itoa(count))
	out := make([]string, count)
	for i := range out {
		out[i] = fmt.Sprintf("%s-%0*d", name, digits, i+1)
	}
	return out
}

// createMany makes count VMs of one wish and ends with one line.
func (a *app) createMany(ctx context.Context, name string, count int, labels, spec map[string]any) error {
	names := numbered(name, count)
	if err := api.ValidName("meta.name", names[count-1]); err != nil {
		return err
	}
	c, err := a.connect()
	if err != nil {
		return err
	}
	began := a.Now()
	failed := a.many(names, func(a *app, name string) error {
		meta, err := a.metaFor(api.KindVM, name, labels)
		if err != nil {
			return err
		}
		r, err := c.Create(ctx, api.KindVM, a.project, map[string]any{"meta": meta, "spec": spec})
		if err == nil {
			err = a.finish(ctx, c, mustView(api.KindVM), name, "created", r)
		}
		if err != nil {
			return fmt.Errorf("vm %s: %w", name, err)
		}
		return nil
	})
	return a.toldMany(failed, count, "created", began)
}

// toldMany says how many VMs were made and why the others were not.
func (a *app) toldMany(failed []error, count int, verb string, began time.Time) error {
	if made := count - len(failed); !a.structured() && a.flags.output != "name" {
		if !a.flags.wait {
			verb = "asked for"
		}
		a.say("%d of %d VMs %s in %s", made, count, verb, took(a.Now().Sub(began)))
	}
	if len(failed) == 0 {
		return nil
	}
	slices.Reverse(failed) // the first decides the exit code and comes last
	for _, err := range failed[:len(failed)-1] {
		a.report(err)
	}
	return failed[len(failed)-1]
}
