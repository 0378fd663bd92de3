// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/internal/client"
)

type imageFlags struct {
	file, path   string
	pool, sha256 string
	node         string
	// volume to copy, as snapshot has it
	volume, snapshot string
}

func (a *app) imageCmd() *cobra.Command {
	return group("image", "Disk images that volumes are cloned from",
		a.imageCreate(), a.imageUpload(), a.lsCmd(api.KindImage), a.showCmd(api.KindImage),
		a.rmCmd(api.KindImage, "Removes images. An image that volumes are clones of is not removed."))
}

func (a *app) imageCreate() *cobra.Command {
	var f imageFlags
	cmd := &cobra.Command{
		Use: "create NAME", Short: "Create an image from a local file, a file on a node or a volume", Args: args("NAME"),
		Long: `Creates an image. With --file the content is uploaded from here ("-" reads
stdin); its SHA-256 is computed and the cluster verifies it. With --path a node
imports a file that it has already. With --from-volume the image is a copy of a volume,
independent of the image that this may be a clone of: a template of a VM. The VM may run;
what is copied is the snapshot of --snapshot, or a temporary one that is taken now. What
the guest keeps on the disk is copied, too (host name, SSH host keys): see docs/storage.md.`,
		Example: `  muster image create tiny --file tiny.qcow2
  muster image create debian --path /srv/images/debian.qcow2 --pool shared
  muster image create web-template --from-volume web1-disk0
  curl -L https://example.org/disk.raw | muster image create disk --file -`,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, names []string) error {
			if given(f.file, f.path, f.volume) != 1 {
				return usagef("image create: give one of --file, --path and --from-volume")
			}
			if f.volume == "" && f.snapshot != "" {
				return usagef("image create: --snapshot goes with --from-volume")
			}
			if f.volume != "" {
				if f.sha256 != "" {
					return usagef("image create: --sha256 is of content that is uploaded or imported, not of a volume")
				}
				spec := map[string]any{"sourceVolume": f.volume}
				set(spec, "sourceSnapshot", f.snapshot)
				set(spec, "pool", f.pool)
				set(spec, "node", f.node)
				return a.create(cmd.Context(), api.KindImage, names[0], nil, spec)
			}
			if f.path != "" {
				spec := map[string]any{"path": f.path}
				set(spec, "pool", f.pool)
				set(spec, "sha256", f.sha256)
				set(spec, "node", f.node)
				return a.create(cmd.Context(), api.KindImage, names[0], nil, spec)
			}
			return a.createFromFile(cmd.Context(), names[0], &f)
		},
	}
	cmd.Flags().StringVar(&f.file, "file", "", "local file to upload, - for stdin")
	cmd.Flags().StringVar(&f.path, "path", "", "absolute path of a file on the node")
	cmd.Flags().StringVar(&f.node, "node", "", "node that imports and, in a dir pool, keeps the image (default: the node that takes the call)")
	cmd.Flags().StringVar(&f.volume, "from-volume", "", "volume to copy")
	cmd.Flags().StringVar(&f.snapshot, "snapshot", "", "copy this snapshot of the VM that has the volume (default: a temporary one of now)")
	cmd.Flags().StringVar(&f.pool, "pool", "", "pool (default \"local\", that of the volume with --from-volume)")
	a.completeFlag(cmd, "from-volume", a.completeNames(api.KindVolume))
	cmd.Flags().StringVar(&f.sha256, "sha256", "", "expected SHA-256 of the content, 64 hexadecimal digits")
	return cmd
}

// given counts the values that are not empty.
func given(values ...string) (n int) {
	for _, v := range values {
		if v != "" {
			n++
		}
	}
	return n
}

func (a *app) imageUpload() *cobra.Command {
	var f imageFlags
	cmd := &cobra.Command{
		Use: "upload NAME", Short: "Upload the content of an image that has none yet", Args: args("NAME"),
		Long:              "Delivers the content of an image whose upload was cut off, or that was created\nwithout content.",
		Example:           "  muster image upload tiny --file tiny.qcow2",
		ValidArgsFunction: a.completeNames(api.KindImage),
		RunE: func(cmd *cobra.Command, names []string) error {
			if f.file == "" {
				return usagef("image upload: --file is missing")
			}
			c, err := a.connect()
			if err != nil {
				return err
			}
			src, err := a.openSource(cmd.Context(), &f)
			if err != nil {
				return err
			}
			return a.upload(cmd.Context(), c, names[0], src, "uploaded")
		},
	}
	cmd.Flags().StringVar(&f.file, "file", "", "local file to upload, - for stdin")
	cmd.Flags().StringVar(&f.sha256, "sha256", "", "expected SHA-256 of the content, 64 hexadecimal digits")
	return cmd
}

// source is the content of an upload.
type source struct {
	path   string // "-" for stdin
	size   int64
	sha256 string // empty when it is known only at the end
	in     io.Reader
	last   *meter // the latest reading
	show   *progress
}

// openSource hashes a file before anything is sent, so that the cluster can
// verify what arrives and a wrong file makes no image.
func (a *app) openSource(ctx context.Context, f *imageFlags) (*source, error) {
	want := strings.ToLower(f.sha256)
	if b, err := hex.DecodeString(want); want != "" && (err != nil || len(b) != sha256.Size) {
		return nil, usagef("--sha256: must be 64 hexadecimal digits")
	}
	s := &source{path: f.file, size: -1, sha256: want, in: a.In}
	if f.file == "-" {
		return s, nil
	}
	if err := a.noLocalFile("--file"); err != nil {
		return nil, err
	}
	info, err := os.Stat(f.file)
	if err != nil {
		return nil, usagef("--file: %v", err)
	}
	if !info.Mode().IsRegular() {
		return nil, usagef("--file: %s is not a regular file; to upload from a device or pipe use --file - and redirect", f.file)
	}
	if info.Size() == 0 {
		return nil, usagef("--file: %s is empty", f.file)
	}
	s.size = info.Size()
	s.show = a.newProgress("checksum of " + f.file)
	defer s.show.clear()
	body, err := s.open(ctx, false)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	if _, err := io.Copy(io.Discard, body); err != nil {
		return nil, fmt.Errorf("read %s: %w", f.file, err)
	}
	s.sha256 = s.sum()
	if want != "" && want != s.sha256 {
		return nil, api.Errorf(api.CodeChecksum, "%s has SHA-256 %s, expected %s; nothing was uploaded", f.file, s.sha256, want)
	}
	return s, nil
}

// sum is the SHA-256 of what the latest reading has read.
func (s *source) sum() string {
	s.last.mu.Lock()
	defer s.last.mu.Unlock()
	return hex.EncodeToString(s.last.hash.Sum(nil))
}

// open returns the content from its beginning; each reading has a hash of its
// own. A context error ends it.
func (s *source) open(ctx context.Context, tell bool) (io.ReadCloser, error) {
	var in io.ReadCloser = io.NopCloser(s.in)
	if s.path != "-" {
		f, err := os.Open(s.path)
		if err != nil {
			return nil, err
		}
		in = f
	}
	s.last = &meter{ctx: ctx, in: in, hash: sha256.New(), size: s.size, show: s.show, tell: tell}
	return s.last, nil
}

// meter counts and hashes what passes, and shows it.
type meter struct {
	ctx  context.Context // a reader has no other way to hear of its end
	in   io.ReadCloser
	hash hash.Hash
	size int64
	show *progress
	tell bool

	mu   sync.Mutex
	done int64
	next time.Time
}

const redraw = 200 * time.Millisecond

func (m *meter) Read(p []byte) (int, error) {
	if err := m.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := m.in.Read(p)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.hash.Write(p[:n])
	m.done += int64(n)
	if now := time.Now(); now.After(m.next) {
		m.next = now.Add(redraw)
		if m.size > 0 {
			m.show.update(int(100*m.done/m.size), m.text())
		} else {
			m.show.update(-1, m.text())
		}
	}
	return n, err
}

func (m *meter) text() string {
	if !m.tell || m.show == nil || !m.show.a.ErrTTY {
		return ""
	}
	return api.Size(m.done).String()
}

func (m *meter) Close() error { return m.in.Close() }

func (a *app) createFromFile(ctx context.Context, name string, f *imageFlags) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	meta, err := a.metaFor(api.KindImage, name, nil)
	if err != nil {
		return err
	}
	src, err := a.openSource(ctx, f)
	if err != nil {
		return err
	}
	spec := map[string]any{}
	set(spec, "pool", f.pool)
	set(spec, "sha256", src.sha256)
	set(spec, "node", f.node)
	made, err := c.Create(ctx, api.KindImage, a.project, map[string]any{"meta": meta, "spec": spec})
	if err != nil {
		if api.CodeOf(err) == api.CodeExists {
			a.notice("if its upload was cut off before: muster image upload %s --file %s", name, f.file)
		}
		return err
	}
	err = a.upload(ctx, c, name, src, "created")
	switch {
	case err == nil:
	case refusedContent(err):
		return a.takeBack(ctx, c, name, made, err)
	case !arrived(err):
		a.notice("image %s exists without content; upload it again with: muster image upload %s --file %s, or remove it with: muster image rm %s", name, name, f.file, name)
	}
	return err
}

// refusedContent reports whether the server will not have this content: to
// send it once more would end in the same way.
func refusedContent(err error) bool {
	var p *client.Problem
	if !errors.As(err, &p) {
		return false
	}
	switch p.Code {
	case api.CodeInvalid, api.CodeChecksum, api.CodeStorageFull:
		return true
	}
	return false
}

// arrived reports an error that was found after the server had taken the
// content: there is nothing to upload again.
func arrived(err error) bool {
	var task *taskError
	var p *client.Problem
	return errors.As(err, &task) || api.CodeOf(err) == api.CodeChecksum && !errors.As(err, &p)
}

// removalTimeout is how long the removal of a refused image may take.
const removalTimeout = 30 * time.Second

// takeBack removes the image that this command has created, by its ID so that
// it cannot be another one, and returns why: the server's reason comes first.
func (a *app) takeBack(ctx context.Context, c *client.Client, name string, made *client.Result, reason error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), removalTimeout)
	defer cancel()
	id := client.MetaOf(made.Object).ID
	if id == "" {
		return fmt.Errorf("%w; image %s is left without content, remove it with: muster image rm %s", reason, name, name)
	}
	r, err := c.Delete(ctx, api.KindImage, a.project, id, false)
	if err == nil && r.Task != nil {
		_, err = a.follow(ctx, c, r.Task, a.newProgress("remove "+name))
	}
	if err != nil && api.CodeOf(err) != api.CodeNotFound {
		return fmt.Errorf("%w; image %s is left without content, remove it with: muster image rm %s (%w)", reason, name, name, err)
	}
	return reason
}

// upload delivers the content and checks what the cluster says it got.
func (a *app) upload(ctx context.Context, c *client.Client, name string, s *source, done string) error {
	began := time.Now()
	s.show = a.newProgress("upload " + name)
	defer s.show.clear()
	raw, err := c.Upload(ctx, a.project, name, s.sha256, &client.Stream{
		Open: func() (io.ReadCloser, error) { return s.open(ctx, true) },
		Size: s.size,
		Once: s.path == "-",
	})
	if err != nil {
		return err
	}
	s.show.clear()
	image, err := client.As[api.ImageSpec, api.ImageStatus](raw)
	if err != nil {
		return err
	}
	if got := image.Status.SHA256; got != "" && !strings.EqualFold(got, s.sum()) {
		return api.Errorf(api.CodeChecksum, "image %s: the cluster stored SHA-256 %s, but %s was sent; remove the image and upload it again", name, got, s.sum())
	}
	if image.Status.Phase == api.StorageFailed {
		return &taskError{message: fmt.Sprintf("image %s: %s", name, first(image.Status.Message, "the import failed"))}
	}
	return a.finished(mustView(api.KindImage), name, done, raw, image.Spec.Node, time.Since(began))
}
