// SPDX-License-Identifier: Apache-2.0

package recstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/recordings"
)

const (
	// answerTimeout is how long a storage may take for a list, or to open a recording.
	answerTimeout = 20 * time.Second
	// pause is how long a storage that has failed is not asked again, so that nobody else
	// waits for it meanwhile.
	pause = 5 * time.Second
	// settled is how long nothing has been written to a recording that is not complete
	// before a storage gets it.
	settled = 30 * time.Minute
)

// Unavailable is the error of a storage that is away, or breaks off. What it was asked may
// succeed later.
type Unavailable struct {
	Storage string
	Err     error
}

// Error implements [error].
func (u *Unavailable) Error() string { return fmt.Sprintf("the storage %s: %v", u.Storage, u.Err) }

// Unwrap returns the cause.
func (u *Unavailable) Unwrap() error { return u.Err }

// Storage returns the store of what a storage has. Of a storage that is away, all errors are
// an [Unavailable]. It is not waited for without a limit.
func Storage(s recordings.Storage) Store { return &storage{of: s} }

type storage struct {
	of recordings.Storage

	mu     sync.Mutex
	failed error
	until  time.Time // when to ask again
}

// List implements [Store].
func (s *storage) List(ctx context.Context, after string, n int) ([]Entry, error) {
	if err := s.paused(); err != nil {
		return nil, err
	}
	limited, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	all, err := s.of.List(limited, after, n)
	if err != nil {
		return nil, s.away(ctx, err)
	}
	// A storage is a module that others may have written.
	if len(all) > n || !slices.IsSortedFunc(all, func(a, b Entry) int { return strings.Compare(a.ID, b.ID) }) {
		return nil, &Unavailable{s.of.String(), errors.New("lists recordings out of order, or more than it was asked for")}
	}
	for i := range all {
		if !ValidID(all[i].ID) || all[i].ID <= after {
			return nil, &Unavailable{s.of.String(), fmt.Errorf("lists %q, which is not the ID of a recording, or not one behind %q", all[i].ID, after)}
		}
		settle(&all[i])
	}
	return all, nil
}

// settle makes a recording that is not complete one whose session has ended, though the
// storage has it only now.
func settle(e *Entry) {
	if !e.Complete {
		e.Modified = e.Modified.Add(-settled)
	}
}

// Open implements [Store].
func (s *storage) Open(ctx context.Context, id string) (io.ReadCloser, Entry, error) {
	if !ValidID(id) {
		return nil, Entry{}, fs.ErrNotExist
	}
	if err := s.paused(); err != nil {
		return nil, Entry{}, err
	}
	// Reading may take as long as the caller likes.
	limited, cancel := context.WithCancelCause(ctx)
	timer := time.AfterFunc(answerTimeout, func() { cancel(context.DeadlineExceeded) })
	r, entry, err := s.of.Open(limited, id)
	timer.Stop()
	if err == nil && limited.Err() != nil {
		_ = r.Close() // it was not read
		err = context.Cause(limited)
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		cancel(nil)
		return nil, Entry{}, fs.ErrNotExist
	case err != nil:
		cancel(nil)
		return nil, Entry{}, s.away(ctx, err)
	}
	entry.ID = id
	settle(&entry)
	return &reading{r, s, cancel}, entry, nil
}

// paused returns an error if the storage is not asked now.
func (s *storage) paused() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if time.Now().Before(s.until) {
		return s.failed
	}
	return nil
}

// away notes that the storage has failed, unless it is ctx that has ended.
func (s *storage) away(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	err = &Unavailable{s.of.String(), err}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failed, s.until = err, time.Now().Add(pause)
	return err
}

// reading is a recording that is read from a storage.
type reading struct {
	io.ReadCloser
	from   *storage
	cancel context.CancelCauseFunc
}

// Read implements [io.Reader].
func (r *reading) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = &Unavailable{r.from.of.String(), err}
	}
	return n, err
}

// Close implements [io.Closer].
func (r *reading) Close() error {
	r.cancel(nil)
	return r.ReadCloser.Close()
}
