// SPDX-License-Identifier: Apache-2.0

package recordings

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recstore"
)

// archive is a storage in a directory that can be away.
type archive struct {
	recstore.Store
	listing, reading atomic.Bool // whether that fails
}

func (*archive) String() string { return "archive" }

func (*archive) Put(context.Context, string, *io.SectionReader) error { return errors.ErrUnsupported }

var errAway = errors.New("out of order")

func (a *archive) List(ctx context.Context, after string, n int) ([]recstore.Entry, error) {
	if a.listing.Load() {
		return nil, errAway
	}
	return a.Store.List(ctx, after, n)
}

func (a *archive) Open(ctx context.Context, id string) (io.ReadCloser, recstore.Entry, error) {
	if a.reading.Load() {
		return nil, recstore.Entry{}, errAway
	}
	return a.Store.Open(ctx, id)
}

// eventually waits until what holds.
func eventually(t *testing.T, message string, what func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !what(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal(message)
		}
	}
}

// endless is a store with more recordings than an index keeps. None can be opened.
type endless struct {
	recstore.Store
	n int
}

func (e *endless) List(_ context.Context, after string, n int) (entries []recstore.Entry, err error) {
	first := 0
	if after != "" {
		if first, err = strconv.Atoi(after[2:8]); err != nil {
			return nil, err
		}
		first++
	}
	for i := first; i < min(e.n, first+n); i++ {
		entries = append(entries, recstore.Entry{ID: e.id(i), Size: 1, Complete: true})
	}
	return entries, nil
}

func (*endless) id(n int) string { return fmt.Sprintf("20%06d", n) }

func (*endless) Open(context.Context, string) (io.ReadCloser, recstore.Entry, error) {
	return nil, recstore.Entry{}, fs.ErrNotExist
}

// Of a store with more recordings than the index keeps, it has the newest, and knows how many
// it leaves out, also of those that it knew.
func TestIndex_KeepsNewest(t *testing.T) {
	const more = 3*listed + 5
	store := &endless{n: 10}
	x := NewIndex(store, t.TempDir(), zap.NewNop())
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	if _, err := x.refresh(ctx, true); err != nil {
		t.Fatal(err)
	}
	store.n = maxRecordings + more
	// Reading them all takes long, and has nothing to do with the list.
	cancel()
	for range 2 {
		if _, err := x.refresh(ctx, true); !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		x.mu.RLock()
		all, left := x.all, x.left
		x.mu.RUnlock()
		if len(all) != maxRecordings || left != more || all[0].ID != store.id(more) || all[len(all)-1].ID != store.id(store.n-1) {
			t.Errorf("the list has %d recordings from %s to %s, and leaves out %d; want the newest %d and %d", len(all), all[0].ID, all[len(all)-1].ID, left, maxRecordings, more)
		}
	}
}

// While a storage is away, the list has what is known of it, and what is recorded here. What
// could not be read is read when it is back.
func TestIndex_StorageIsAway(t *testing.T) {
	dir, elsewhere := t.TempDir(), t.TempDir()
	from := &archive{Store: recstore.Dir(elsewhere)}
	// What is older than a day is listed less often.
	began := time.Now().UTC()
	id := func(n int) string {
		return began.Add(time.Duration(n)*time.Second).Format("20060102T150405Z") + "-abcdefghijklmnopqrstuvwxyz"
	}
	record := func(dir string, n int, text string) {
		if err := os.WriteFile(filepath.Join(dir, id(n)+".cast"), []byte(session("alice", "prod", "web", text)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	record(elsewhere, 1, "before")
	record(dir, 2, "here")
	// Each storage is asked again after a pause, which this test does not wait for.
	store := func() recstore.Store { return recstore.Union(recstore.Dir(dir), recstore.Storage(from)) }
	var all Indexes
	x, release := all.Use(dir, store(), zap.NewNop())
	defer release()
	wait(t, x)
	ids := func(f Filter) (ids []string, state State) {
		page, err := x.Page(t.Context(), f, "")
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range page.Found {
			ids = append(ids, r.ID)
		}
		return ids, page.State
	}

	from.listing.Store(true)
	record(elsewhere, 3, "unseen")
	record(dir, 4, "here as well")
	eventually(t, "the recordings are not listed while the storage is away", func() bool {
		got, state := ids(Filter{})
		return state.Away && slices.Equal(got, []string{id(4), id(2), id(1)})
	})
	if got, _ := ids(Filter{Text: "before"}); !slices.Equal(got, []string{id(1)}) {
		t.Errorf("what is known of the storage is not found, but %v", got)
	}

	// It lists, but cannot be read.
	from.reading.Store(true)
	from.listing.Store(false)
	x.setStore(store())
	eventually(t, "the storage is not listed again", func() bool {
		got, state := ids(Filter{})
		return !state.Away && slices.Equal(got, []string{id(4), id(3), id(2), id(1)})
	})
	if r, ok := x.Lookup(id(3)); !ok || r.Unreadable || r.Text {
		t.Errorf("what cannot be read now is %+v", r)
	}

	from.reading.Store(false)
	x.setStore(store())
	eventually(t, "the recording is not read again", func() bool {
		got, _ := ids(Filter{Text: "unseen"})
		return slices.Equal(got, []string{id(3)})
	})
}
