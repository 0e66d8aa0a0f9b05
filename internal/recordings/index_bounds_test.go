// SPDX-License-Identifier: Apache-2.0

package recordings

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recstore"
)

// place is an archive with a name.
type place struct {
	*archive
	name string
}

func (p place) String() string { return p.name }

// watched is a store that tells when it is used.
type watched struct {
	recstore.Store
	list, open func()
}

func (s watched) List(ctx context.Context, after string, n int) ([]recstore.Entry, error) {
	s.list()
	return s.Store.List(ctx, after, n)
}

func (s watched) Open(ctx context.Context, id string) (io.ReadCloser, recstore.Entry, error) {
	s.open()
	return s.Store.Open(ctx, id)
}

func nothing() {}

// known returns the IDs that x knows now.
func known(x *Index) (ids []string) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	for _, r := range x.all {
		ids = append(ids, r.ID)
	}
	return ids
}

// The recordings of a storage are not shown to those who read another one, as they may be
// others.
func TestIndex_OtherStorageStartsAnew(t *testing.T) {
	dir, first, second := t.TempDir(), t.TempDir(), t.TempDir()
	here := put(t, dir, 1, session("alice@example.com", "default", "web", "here"))
	hidden := put(t, first, 2, session("bob@example.com", "default", "web", "hidden"))
	shown := put(t, second, 3, session("bob@example.com", "default", "web", "shown"))
	in := func(name, elsewhere string) recstore.Store {
		return recstore.Union(recstore.Dir(dir), recstore.Storage(place{&archive{Store: recstore.Dir(elsewhere)}, name}))
	}
	var all Indexes
	x, releaseFirst := all.Use(dir, in("first", first), zap.NewNop())
	defer releaseFirst()
	wait(t, x)
	if got, _ := found(t, x, Filter{Text: "hidden"}, ""); !slices.Equal(got, []string{hidden}) {
		t.Fatalf("got %q", got)
	}
	// The same place, such as after a reload, keeps what is known.
	x.setStore(in("first", first))
	if got := known(x); len(got) != 2 {
		t.Errorf("the same storage starts anew: %q", got)
	}
	_, releaseSecond := all.Use(dir, in("second", second), zap.NewNop())
	defer releaseSecond()
	if got := known(x); slices.Contains(got, hidden) {
		t.Errorf("another storage's recordings are still listed: %q", got)
	}
	eventually(t, "the other storage is not read", func() bool {
		got, _ := found(t, x, Filter{Text: "shown"}, "")
		return slices.Equal(got, []string{shown})
	})
	eventually(t, "the directory is not read again", func() bool {
		got, _ := found(t, x, Filter{Text: "here"}, "")
		return slices.Equal(got, []string{here})
	})
	if _, err := x.textOf(hidden); err == nil {
		t.Error("another storage's text is still in the file")
	}
	if got := known(x); !slices.Equal(got, []string{here, shown}) {
		t.Errorf("got %q", got)
	}
	releaseFirst()
	releaseSecond()
	checkOpened(t, dir, in("second", second), 2)
	checkOpened(t, dir, recstore.Dir(dir), 0)
}

// checkOpened checks how many recordings an index of store knows when it is opened.
func checkOpened(t *testing.T, dir string, store recstore.Store, want int) {
	t.Helper()
	x := NewIndex(store, dir, zap.NewNop())
	x.open()
	defer x.close()
	if got := known(x); len(got) != want {
		t.Errorf("an index of %q knows %q when it is opened; want %d", recstore.Place(store), got, want)
	}
}

// A list that has begun in another storage is not shown.
func TestIndex_StorageChangesDuringList(t *testing.T) {
	dir, elsewhere := t.TempDir(), t.TempDir()
	put(t, dir, 1, header)
	var x *Index
	x = NewIndex(watched{recstore.Dir(dir), func() {
		x.setStore(recstore.Storage(place{&archive{Store: recstore.Dir(elsewhere)}, "other"}))
	}, nothing}, dir, zap.NewNop())
	x.open()
	defer x.close()
	if more, err := x.refresh(t.Context(), true); !more || err != nil || len(known(x)) > 0 {
		t.Errorf("got %v, %v, and %q", more, err, known(x))
	}
	// Nor is the file of the first one used for the other.
	if more, err := x.refresh(t.Context(), true); !more || err != nil || len(known(x)) > 0 {
		t.Errorf("got %v, %v, and %q", more, err, known(x))
	}
	x.move()
	if more, err := x.refresh(t.Context(), true); more || err != nil {
		t.Errorf("got %v, %v", more, err)
	}
}

// Sessions that print much do not fill the disk. Those whose text has no room are counted.
func TestIndex_FileIsBounded(t *testing.T) {
	dir := t.TempDir()
	const n = 300
	for i := range n {
		put(t, dir, i, session("bob@example.com", "default", "web", words(i)))
	}
	x := NewIndex(recstore.Dir(dir), dir, zap.NewNop())
	x.maxFile = 200 << 10
	x.open()
	defer x.close()
	if _, err := x.refresh(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	x.listedAt = time.Now().Add(time.Hour)
	unsearched := func() int {
		_, p := found(t, x, Filter{Text: "nowhere"}, "")
		return p.Unsearched
	}
	if got := unsearched(); got == 0 || got >= n {
		t.Errorf("%d of %d recordings are not searched", got, n)
	}
	in := 0
	for i := range n {
		if _, err := x.textOf(testID(i)); err == nil {
			in++
		}
	}
	if in+unsearched() != n {
		t.Errorf("%d texts are in the index, and %d recordings are not searched", in, unsearched())
	}
	x.close()
	if got := unsearched(); got != n {
		t.Errorf("without a file, %d of %d recordings are not searched", got, n)
	}
}

// A list of all that lacks a storage is made again soon.
func TestIndex_ListWithoutStorageIsNotWhole(t *testing.T) {
	dir := t.TempDir()
	from := &archive{Store: recstore.Dir(t.TempDir())}
	from.listing.Store(true)
	x := NewIndex(recstore.Union(recstore.Dir(dir), recstore.Storage(from)), dir, zap.NewNop())
	x.open()
	defer x.close()
	if _, err := x.refresh(t.Context(), true); !isAway(err) || !x.wholeAt.IsZero() {
		t.Errorf("got %v; all is listed again at %v", err, x.wholeAt)
	}
}

// A running session, of which there is always more to read, does not count as one that has
// not been read.
func TestIndex_RunningSessionDoesNotWait(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, testID(1)+".cast.partial")
	if err := os.WriteFile(path, []byte(header), 0o600); err != nil {
		t.Fatal(err)
	}
	var waiting []int
	var x *Index
	x = NewIndex(watched{recstore.Dir(dir), nothing, func() { waiting = append(waiting, x.waiting) }}, dir, zap.NewNop())
	x.open()
	defer x.close()
	for _, more := range []string{"", printed(1, "x")} {
		if err := os.WriteFile(path, []byte(header+more), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := x.refresh(t.Context(), true); err != nil || x.waiting != 0 {
			t.Fatalf("got %v, and %d that are waiting", err, x.waiting)
		}
	}
	if !slices.Equal(waiting, []int{1, 0}) {
		t.Errorf("got %v that are waiting", waiting)
	}
}

// What has ended without a header is not read again and again.
func TestIndex_SessionWithoutHeaderIsReadOnce(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, 1, header[:20])
	opened := 0
	x := NewIndex(watched{recstore.Dir(dir), nothing, func() { opened++ }}, dir, zap.NewNop())
	x.open()
	defer x.close()
	for range 2 {
		if _, err := x.refresh(t.Context(), true); err != nil {
			t.Fatal(err)
		}
	}
	if r, ok := x.Lookup(testID(1)); !ok || !r.Unreadable || opened != 1 {
		t.Errorf("got %+v, read %d times", r, opened)
	}
}

// An index that is closed while somebody searches it waits for that, and keeps nobody from
// ending. A file that was made anew is not blamed for the damage of the one before.
func TestIndex_ClosedDuringSearch(t *testing.T) {
	dir := t.TempDir()
	x := NewIndex(recstore.Dir(dir), dir, zap.NewNop())
	x.open()
	s, err := x.newSearch("x")
	if err != nil {
		t.Fatal(err)
	}
	closed, ended := make(chan struct{}), make(chan struct{})
	go func() { x.close(); close(closed) }()
	go func() {
		defer close(ended)
		eventually(t, "it is not closed", func() bool { _, err := x.textOf("x"); return err != nil && x.database() == nil })
		_ = x.failed(s.db, errDamaged)
		s.close()
	}()
	for _, done := range []chan struct{}{ended, closed} {
		select {
		case <-done:
		case <-time.After(time.Minute):
			t.Fatal("the search and the end wait for each other")
		}
	}
	x.open()
	defer x.close()
	if _ = x.failed(s.db, errDamaged); x.isDamaged() {
		t.Error("the new file counts as damaged")
	}
}
