// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package storage

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

const (
	// chunkBytes is written at once; a chunk of zeros becomes a hole.
	chunkBytes = 256 << 10
	// lookInterval is how often a running import looks whether it is still
	// wanted.
	lookInterval = time.Second
)

// Upload receives the content of an image that has no path. length is the
// number of bytes announced, or -1 if unknown; sum is a SHA-256 in hexadecimal
// or empty. It returns when the image is ready.
//
// Errors: incomplete (the content ended early; upload again), checksum,
// invalid (the content is refused), storage_full, refused (another upload
// runs, the image is ready already, or this node has not its pool).
func (s *Service) Upload(ctx context.Context, imageID string, r io.Reader, length int64, sum string) (api.Image, error) {
	sum = strings.ToLower(sum)
	if b, err := hex.DecodeString(sum); sum != "" && (err != nil || len(b) != sha256.Size) {
		return api.Image{}, api.Invalid("sha256", "must be 64 hexadecimal digits")
	}
	if !s.claim(imageID) {
		return api.Image{}, api.Errorf(api.CodeRefused, "another upload of this image is running on node %s; wait for it to end", s.cfg.NodeName)
	}
	defer s.release(imageID)
	img, lp, err := s.beginUpload(ctx, imageID, length, sum)
	if err != nil {
		return img, err
	}
	out, err := s.ingest(ctx, lp, ingestion{id: imageID, r: r, length: length, sha256: strings.ToLower(img.Spec.SHA256), also: sum, pool: img.Spec.Pool})
	if err != nil {
		err = s.uploadFailed(ctx, img, err)
	}
	return out, err
}

// beginUpload takes the image for this node, if it may.
func (s *Service) beginUpload(ctx context.Context, id string, length int64, sum string) (img api.Image, lp *localPool, err error) {
	_, err = configdb.Transact(ctx, s.cfg.DB, actor, txnAttempts, func(v *configdb.View, tx *configdb.Txn) error {
		if img, err = configdb.Images.Get(v, id); err != nil {
			return err
		}
		img = img.Clone()
		var pool api.Pool
		if pool, lp, err = s.readyPool(v, img.Spec.Pool); err != nil {
			return err
		}
		if err := s.mayUpload(v, img, pool); err != nil {
			return err
		}
		if sum != "" && img.Spec.SHA256 != "" && !strings.EqualFold(sum, img.Spec.SHA256) {
			return api.Errorf(api.CodeChecksum, "the upload announces another SHA-256 than image %q was created with (%s)", img.Meta.Name, img.Spec.SHA256)
		}
		generation := img.Meta.Generation
		if img.Spec.Node != s.cfg.NodeName {
			img.Spec.Node = s.cfg.NodeName
			if err := configdb.Images.UpdateSpec(v, tx, &img); err != nil {
				return err
			}
			generation = img.Meta.Generation
		} else {
			tx.RequireRevision(configdb.Images.SpecKey(id), img.Meta.Revision)
		}
		img.Status.ObservedGeneration = generation
		img.Status.Phase, img.Status.Progress, img.Status.Message = api.StorageImporting, 0, "receiving its content on node "+s.cfg.NodeName
		return configdb.Images.UpdateStatus(v, tx, &img)
	})
	if err != nil {
		return img, nil, err
	}
	if free, err := s.driverIn(lp).free(ctx); err == nil && free < length {
		return img, nil, s.uploadFailed(ctx, img, fullError(lp))
	}
	return img, lp, nil
}

func (s *Service) mayUpload(v *configdb.View, img api.Image, pool api.Pool) error {
	name := img.Meta.Name
	mine := img.Spec.Node == s.cfg.NodeName || img.Spec.Node == ""
	phase, member := nodePhase(v, img.Spec.Node)
	switch {
	case img.Meta.Deleting():
		return api.Errorf(api.CodeRefused, "image %q is being deleted", name)
	case img.Spec.Path != "":
		return api.Errorf(api.CodeRefused, "image %q is imported from %s on node %s; nothing can be uploaded to it", name, img.Spec.Path, img.Spec.Node)
	case img.Spec.SourceVolume != "":
		return api.Errorf(api.CodeRefused, "image %q is copied from volume %s; nothing can be uploaded to it", name, img.Spec.SourceVolume)
	case img.Status.Phase == api.StorageReady:
		return api.Errorf(api.CodeRefused, "image %q is ready and never changes; create another image", name)
	case pool.Spec.Type == api.PoolDir && !mine:
		return api.Errorf(api.CodeRefused, "image %q is kept on node %s; upload it there", name, img.Spec.Node)
	case img.Status.Phase == api.StorageImporting && !mine && member && phase != api.NodeLost:
		return api.Errorf(api.CodeRefused, "another upload of image %q is running on node %s; wait for it to end", name, img.Spec.Node)
	}
	return nil
}

// uploadFailed records the end of an upload and returns its cause. The image
// can be uploaded again in any case; content that is bad is a failure, content
// that did not arrive is not. The caller's context may be over.
func (s *Service) uploadFailed(ctx context.Context, img api.Image, cause error) error {
	if errors.Is(cause, errNotOurs) || api.CodeOf(cause) == api.CodeNotFound {
		return api.Errorf(api.CodeRefused, "image %q was deleted or taken over by another node during the upload", img.Meta.Name)
	}
	wctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), finishDeadline)
	defer cancel()
	_, err := s.setImage(wctx, img.Meta.ID, func(i *api.Image) error {
		if i.Status.Phase == api.StorageReady {
			return errNotOurs
		}
		i.Status.Phase, i.Status.Progress, i.Status.Message = api.StoragePending, 0, cause.Error()+"; upload the content again"
		if code := api.CodeOf(cause); code == api.CodeChecksum || code == api.CodeInvalid {
			i.Status.Phase = api.StorageFailed
			i.Status.Message = cause.Error()
		}
		i.Status.Conditions = api.SetCondition(i.Status.Conditions, failure(cause), s.cfg.Now())
		return nil
	})
	if ignore(err) != nil {
		// The loop finds an image without an upload and says so then.
		s.log.Warn("end of an upload could not be recorded", "image", img.Meta.Name, "err", err)
	}
	return cause
}

// ingestion is content on its way to become an image.
type ingestion struct {
	id, pool     string
	r            io.Reader
	length       int64  // -1 if unknown
	sha256, also string // expected, in hexadecimal, or empty
}

// ingest writes the content to tmp/, verifies and inspects it, gives it its
// final name and reports the image ready. On any error nothing is left.
func (s *Service) ingest(ctx context.Context, lp *localPool, in ingestion) (api.Image, error) {
	return s.makeImage(ctx, lp, in.id, func(tmp string) (string, error) {
		sum, err := s.receive(ctx, lp, tmp, in)
		if err != nil {
			return "", err
		}
		for _, want := range []string{in.sha256, in.also} {
			if want != "" && !strings.EqualFold(want, sum) {
				return "", api.Errorf(api.CodeChecksum, "the content's SHA-256 is %s, expected was %s", sum, want)
			}
		}
		return sum, nil
	})
}

// tmpFile is a new name for unfinished work on an object.
func (s *Service) tmpFile(lp *localPool, id string) string {
	return filepath.Join(lp.path, "tmp", s.cfg.NodeID+"."+id+"."+rand.Text())
}

// makeImage has a new file filled, whose SHA-256 it is told, inspects it, gives it
// its final name and reports the image ready. On any error nothing is left.
func (s *Service) makeImage(ctx context.Context, lp *localPool, id string, fill func(tmp string) (sum string, err error)) (api.Image, error) {
	tmp := s.tmpFile(lp, id)
	defer s.discard(lp, tmp, tmp+".qcow2")
	sum, err := fill(tmp)
	if err != nil {
		return api.Image{}, diskError(lp, "write the image", err)
	}
	found, err := s.inspect(ctx, lp, tmp)
	if err != nil {
		return api.Image{}, err
	}
	found, size, err := s.driverIn(lp).placeImage(ctx, id, found)
	if err != nil {
		return api.Image{}, diskError(lp, "put the image in place", err)
	}
	// From here on the file is there; only its report is missing.
	wctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), finishDeadline)
	defer cancel()
	img, err := s.setImage(wctx, id, func(i *api.Image) error {
		i.Status.Phase, i.Status.Message, i.Status.Progress = api.StorageReady, "", 100
		i.Status.Format, i.Status.VirtualSize = found.format, api.Size(found.virtualSize)
		i.Status.Size, i.Status.SHA256 = api.Size(size), sum
		i.Status.Conditions = api.SetCondition(i.Status.Conditions, success(), s.cfg.Now())
		return nil
	})
	if api.CodeOf(err) == api.CodeNotFound && err != nil {
		// Deleted meanwhile, by an executor that found no file yet.
		err = errors.Join(err, s.driverIn(lp).removeImage(wctx, id))
	}
	return img, err
}

// discard removes files of tmp/ that may or may not exist, also when the
// context is over.
func (s *Service) discard(lp *localPool, paths ...string) {
	err := lp.work.do(context.Background(), callDeadline, func() error {
		var errs []error
		for _, p := range paths {
			errs = append(errs, remove(p))
		}
		return errors.Join(errs...)
	})
	if err != nil {
		s.log.Warn("unfinished file stays until the next start", "pool", lp.name, "err", err)
	}
}

// receive writes the content to a file and returns its SHA-256.
func (s *Service) receive(ctx context.Context, lp *localPool, tmp string, in ingestion) (string, error) {
	f, err := call(ctx, lp.work, callDeadline, func() (*os.File, error) {
		return os.OpenFile(tmp, os.O_RDWR|os.O_CREATE|os.O_EXCL|syscall.O_NOFOLLOW, 0o600)
	})
	if err != nil {
		return "", err
	}
	defer f.Close()
	sum := sha256.New()
	n, err := s.copyIn(ctx, lp, f, sum, in)
	if err != nil {
		return "", err
	}
	if in.length >= 0 && n != in.length {
		return "", api.Errorf(api.CodeIncomplete, "the content ended early: %d of %d bytes arrived", n, in.length)
	}
	if n == 0 {
		return "", refuse("it is empty")
	}
	err = lp.work.do(ctx, createDeadline, func() error {
		if err := f.Truncate(n); err != nil { // a hole at the end
			return err
		}
		return f.Sync()
	})
	return hex.EncodeToString(sum.Sum(nil)), err
}

// copyIn copies chunk by chunk, reports progress in steps, and stops when the
// image is not wanted any more.
func (s *Service) copyIn(ctx context.Context, lp *localPool, f *os.File, sum hash.Hash, in ingestion) (int64, error) {
	var n int64
	step, looked := 0, time.Now()
	for {
		if err := ctx.Err(); err != nil {
			return n, api.Errorf(api.CodeIncomplete, "the transfer was broken off after %d bytes: %w", n, context.Cause(ctx))
		}
		buf := make([]byte, chunkBytes) // a hung write keeps the old one
		got, err := fill(in.r, buf)
		buf = buf[:got]
		if in.length >= 0 && n+int64(got) > in.length {
			return n, api.Errorf(api.CodeInvalid, "more than the announced %d bytes arrived", in.length)
		}
		if n+int64(got) > maxVirtualSize {
			return n, api.Errorf(api.CodeTooLarge, "the content is over the limit of %s", api.Size(maxVirtualSize))
		}
		_, _ = sum.Write(buf) // a hash never fails
		if werr := s.writeChunk(ctx, lp, f, buf, n); werr != nil {
			return n, werr
		}
		n += int64(got)
		switch {
		case err == io.EOF: //nolint:errorlint // a wrapped EOF is not the clean end
			return n, nil
		case err != nil:
			return n, readError(in, n, err)
		}
		if pct := percent(n, in.length); pct >= step+progressStep || time.Since(looked) > lookInterval {
			if err := s.progress(ctx, in.id, pct-pct%progressStep); err != nil {
				return n, err
			}
			step, looked = pct-pct%progressStep, time.Now()
		}
	}
}

// fill reads until buf is full. io.ReadFull would not do: it says
// ErrUnexpectedEOF both at a clean end and when the sender broke off.
func fill(r io.Reader, buf []byte) (n int, err error) {
	for n < len(buf) && err == nil {
		var m int
		m, err = r.Read(buf[n:])
		n += m
	}
	return n, err
}

func readError(in ingestion, n int64, err error) error {
	if _, local := in.r.(*laneReader); local {
		return fmt.Errorf("read the file to import: %w", err)
	}
	if in.length >= 0 {
		return api.Errorf(api.CodeIncomplete, "the content ended early: %d of %d bytes arrived: %w", n, in.length, err)
	}
	return api.Errorf(api.CodeIncomplete, "the content ended early: %d bytes arrived: %w", n, err)
}

func (s *Service) writeChunk(ctx context.Context, lp *localPool, f *os.File, b []byte, at int64) error {
	if allZero(b) {
		return nil
	}
	return lp.work.do(ctx, callDeadline, func() error {
		_, err := f.WriteAt(b, at)
		return err
	})
}

func allZero(b []byte) bool {
	for len(b) >= 8 {
		if binary.NativeEndian.Uint64(b) != 0 {
			return false
		}
		b = b[8:]
	}
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

func (s *Service) progress(ctx context.Context, id string, pct int) error {
	_, err := s.setImage(ctx, id, func(i *api.Image) error {
		if i.Status.Phase != api.StorageImporting {
			return errNotOurs
		}
		i.Status.Progress = max(pct, i.Status.Progress)
		return nil
	})
	return err
}

// syncFile flushes what another process wrote.
func syncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

func percent(n, length int64) int {
	if length <= 0 {
		return 0
	}
	return int(min(float64(n)/float64(length)*100, 99))
}
