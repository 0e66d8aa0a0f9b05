// SPDX-License-Identifier: Apache-2.0

package recstore_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"path/filepath"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recstore"
)

// archive is a storage whose answers a test writes.
type archive struct {
	list func(ctx context.Context) ([]recstore.Entry, error)
	open func(ctx context.Context) (io.ReadCloser, recstore.Entry, error)
}

func (archive) String() string { return "archive" }

func (archive) Put(context.Context, string, *io.SectionReader) error { return nil }

func (a archive) List(ctx context.Context, _ string, _ int) ([]recstore.Entry, error) {
	return a.list(ctx)
}

func (a archive) Open(ctx context.Context, _ string) (io.ReadCloser, recstore.Entry, error) {
	return a.open(ctx)
}

// isUnavailable reports whether err says that a storage is away.
func isUnavailable(err error) bool {
	unavailable := (*recstore.Unavailable)(nil)
	return errors.As(err, &unavailable)
}

// What a storage that others have written says does not end up in a path or a page.
func TestStorage_WrongListsAreErrors(t *testing.T) {
	for name, ids := range map[string][]string{
		"no ID":         {"../../etc/passwd"},
		"out of order":  {id(3), id(2)},
		"too many":      {id(2), id(3), id(4), id(5)},
		"one from afar": {id(1)},
	} {
		s := recstore.Storage(archive{list: func(context.Context) (all []recstore.Entry, err error) {
			for _, id := range ids {
				all = append(all, recstore.Entry{ID: id})
			}
			return all, nil
		}})
		if got, err := s.List(t.Context(), id(1), 3); !isUnavailable(err) {
			t.Errorf("%s: got %v, %v", name, got, err)
		}
	}
}

// A storage that does not answer is waited for, but not for long, and then not again for a
// while.
func TestStorage_ThatHangsIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		asked := 0
		s := recstore.Storage(archive{
			list: func(ctx context.Context) ([]recstore.Entry, error) {
				asked++
				<-ctx.Done()
				return nil, ctx.Err()
			},
			open: func(ctx context.Context) (io.ReadCloser, recstore.Entry, error) {
				asked++
				<-ctx.Done()
				return nil, recstore.Entry{}, ctx.Err()
			},
		})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := s.List(ctx, "", 1); !errors.Is(err, context.DeadlineExceeded) || isUnavailable(err) {
			t.Errorf("a reader who leaves gets %v", err)
		}
		began := time.Now()
		if _, err := s.List(t.Context(), "", 1); !isUnavailable(err) {
			t.Errorf("got %v", err)
		}
		if _, _, err := s.Open(t.Context(), id(1)); !isUnavailable(err) || asked != 2 {
			t.Errorf("asked %d times, got %v; want it left alone for a while", asked, err)
		}
		time.Sleep(6 * time.Second)
		if _, _, err := s.Open(t.Context(), id(1)); !isUnavailable(err) || asked != 3 {
			t.Errorf("asked %d times, got %v; want it asked again", asked, err)
		}
		if took := time.Since(began); took > time.Minute {
			t.Errorf("it took %v", took)
		}
	})
}

// What breaks while it is read can be read again later, and a recording that there is not
// does not make the storage one that is away.
func TestStorage_ErrorsOfReading(t *testing.T) {
	broken := errors.New("connection reset")
	var r io.Reader
	var err error
	s := recstore.Storage(archive{open: func(context.Context) (io.ReadCloser, recstore.Entry, error) {
		return io.NopCloser(r), recstore.Entry{}, err
	}})
	err = fs.ErrNotExist
	for range 2 {
		if _, _, err := s.Open(t.Context(), id(1)); !errors.Is(err, fs.ErrNotExist) || isUnavailable(err) {
			t.Errorf("got %v", err)
		}
	}
	r, err = io.MultiReader(bytes.NewReader([]byte("start")), iotest.ErrReader(broken)), nil
	body, entry, err := s.Open(t.Context(), id(1))
	if err != nil || entry.ID != id(1) {
		t.Fatalf("got %+v, %v", entry, err)
	}
	defer body.Close()
	if b, err := io.ReadAll(body); string(b) != "start" || !errors.Is(err, broken) || !isUnavailable(err) {
		t.Errorf("got %q, %v", b, err)
	}
}

// Of a recording that was cut off, the storage has the time at which it got it. Nobody
// writes to it any more.
func TestStorage_NothingGoesOnInIt(t *testing.T) {
	s := recstore.Storage(archive{
		list: func(context.Context) ([]recstore.Entry, error) {
			return []recstore.Entry{{ID: id(1), Modified: time.Now()}, {ID: id(2), Modified: time.Now(), Complete: true}}, nil
		},
		open: func(context.Context) (io.ReadCloser, recstore.Entry, error) {
			return io.NopCloser(new(bytes.Buffer)), recstore.Entry{Modified: time.Now()}, nil
		},
	})
	all, err := s.List(t.Context(), "", 2)
	if err != nil || time.Since(all[0].Modified) < 29*time.Minute || time.Since(all[1].Modified) > time.Minute {
		t.Errorf("got %+v, %v", all, err)
	}
	r, entry, err := s.Open(t.Context(), id(1))
	if err != nil || time.Since(entry.Modified) < 29*time.Minute {
		t.Errorf("got %+v, %v", entry, err)
	} else {
		r.Close()
	}
}

// While a storage is away, what is elsewhere is listed and opened.
func TestUnion_WithoutAStorageThatIsAway(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, id(1)+".cast"), "here")
	away := errors.New("out of order")
	u := recstore.Union(recstore.Dir(dir), recstore.Storage(archive{
		list: func(context.Context) ([]recstore.Entry, error) { return nil, away },
		open: func(context.Context) (io.ReadCloser, recstore.Entry, error) {
			return nil, recstore.Entry{}, away
		},
	}))
	all, err := u.List(t.Context(), "", 10)
	if !isUnavailable(err) || !errors.Is(err, away) || len(all) != 1 {
		t.Errorf("got %+v, %v", all, err)
	}
	r, _, err := u.Open(t.Context(), id(1))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if b, err := io.ReadAll(r); err != nil || cmp.Diff("here", string(b)) != "" {
		t.Errorf("got %q, %v", b, err)
	}
	if _, _, err := u.Open(t.Context(), id(2)); !isUnavailable(err) {
		t.Errorf("got %v; want that it may be in the storage", err)
	}
}
