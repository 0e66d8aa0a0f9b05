// SPDX-License-Identifier: Apache-2.0

package recstore_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recstore"
)

// id returns the ID of the n-th recording.
func id(n int) string { return fmt.Sprintf("20260102T%06dZ-abcdefghijklmnopqrstuvwxyz", n) }

// write writes a file.
func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// ids returns the IDs of all recordings in s, listed n at a time.
func ids(t *testing.T, s recstore.Store, n int) (all []string) {
	t.Helper()
	after := ""
	for {
		entries, err := s.List(t.Context(), after, n)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			all = append(all, e.ID)
		}
		if len(entries) < n {
			return all
		}
		after = entries[n-1].ID
	}
}

func TestDir_ListsOnlyRecordings(t *testing.T) {
	dir := t.TempDir()
	var want []string
	for n := range 5 {
		want = append(want, id(n))
		write(t, filepath.Join(dir, id(n)+".cast"), "complete")
	}
	want = append(want, id(5))
	write(t, filepath.Join(dir, id(5)+".cast.partial"), "running")
	write(t, filepath.Join(dir, id(4)+".cast.partial"), "left over")
	write(t, filepath.Join(dir, "notes.txt"), "other")
	write(t, filepath.Join(dir, id(7)+".cast.bak"), "other")
	if err := os.Symlink("/etc/passwd", filepath.Join(dir, id(8)+".cast")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, id(9)+".cast"), 0o700); err != nil {
		t.Fatal(err)
	}
	s := recstore.Dir(dir)
	for _, n := range []int{1, 2, 6, 100} {
		if diff := cmp.Diff(want, ids(t, s, n)); diff != "" {
			t.Errorf("%d at a time (-want +got):\n%s", n, diff)
		}
	}
	entries, err := s.List(t.Context(), id(3), 10)
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != 2 || !entries[0].Complete || entries[0].Size != 8 || entries[1].Complete || entries[1].Size != 7 {
		t.Errorf("got %+v; want a complete one of 8 bytes and a running one of 7", entries)
	}
	if got := ids(t, recstore.Dir(filepath.Join(dir, "none")), 10); got != nil {
		t.Errorf("got %v from a directory that does not exist", got)
	}
}

// Nothing but a recording can be opened, whatever the ID.
func TestDir_OpensOnlyRecordings(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "secret.cast"), "secret")
	if err := os.Symlink("/etc/passwd", filepath.Join(dir, id(1)+".cast")); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"secret", "../" + filepath.Base(dir) + "/secret", "", ".", id(1), id(2), id(1) + "\n"} {
		if _, _, err := recstore.Dir(dir).Open(t.Context(), id); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%q: got %v", id, err)
		}
	}
}

// A recording that is completed while it is read goes on being read.
func TestDir_RunningRecordingGrows(t *testing.T) {
	path := filepath.Join(t.TempDir(), id(1)+".cast")
	write(t, path+".partial", "one ")
	r, entry, err := recstore.Dir(filepath.Dir(path)).Open(t.Context(), id(1))
	if err != nil || entry.Complete {
		t.Fatalf("got %+v, %v", entry, err)
	}
	defer r.Close()
	if b, err := io.ReadAll(r); err != nil || string(b) != "one " {
		t.Fatalf("got %q, %v", b, err)
	}
	f, err := os.OpenFile(path+".partial", os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteString("two")
	if err := errors.Join(err, f.Close(), os.Rename(path+".partial", path)); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(r); err != nil || string(b) != "two" {
		t.Fatalf("got %q, %v", b, err)
	}
}

// Of a recording that is in several stores, the first counts, also if it is not complete.
func TestUnion_FirstStoreCounts(t *testing.T) {
	first, second := t.TempDir(), t.TempDir()
	write(t, filepath.Join(first, id(1)+".cast.partial"), "start")
	write(t, filepath.Join(first, id(3)+".cast"), "of the first")
	write(t, filepath.Join(first, id(4)+".cast.partial"), "running")
	write(t, filepath.Join(second, id(1)+".cast"), "the whole")
	write(t, filepath.Join(second, id(2)+".cast"), "only here")
	write(t, filepath.Join(second, id(3)+".cast"), "of the second")
	u := recstore.Union(recstore.Dir(first), recstore.Dir(second))
	for n := 1; n < 6; n++ {
		if diff := cmp.Diff([]string{id(1), id(2), id(3), id(4)}, ids(t, u, n)); diff != "" {
			t.Errorf("%d at a time (-want +got):\n%s", n, diff)
		}
	}
	for n, want := range map[int]string{1: "start", 2: "only here", 3: "of the first", 4: "running"} {
		r, entry, err := u.Open(t.Context(), id(n))
		if err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(r); err != nil || string(b) != want || entry.Complete != (n == 2 || n == 3) {
			t.Errorf("%d: got %q, complete: %v, %v", n, b, entry.Complete, err)
		}
		r.Close()
	}
	if _, _, err := u.Open(t.Context(), id(5)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v; want that there is none", err)
	}
	failed := errors.New("out of order")
	if _, _, err := recstore.Union(recstore.Dir(first), failing{failed}).Open(t.Context(), id(5)); !errors.Is(err, failed) {
		t.Errorf("got %v; want %v", err, failed)
	}
}

type failing struct{ err error }

func (f failing) List(context.Context, string, int) ([]recstore.Entry, error) { return nil, f.err }

func (f failing) Open(context.Context, string) (io.ReadCloser, recstore.Entry, error) {
	return nil, recstore.Entry{}, f.err
}

func TestRequested_IsStartOfID(t *testing.T) {
	if got := recstore.Requested("20260102T030405Z-abcdefghijklmnopqrstuvwxyz").Format("2006-01-02 15:04:05"); got != "2026-01-02 03:04:05" {
		t.Errorf("got %s", got)
	}
	if !recstore.Requested("x").IsZero() {
		t.Error("an ID without a time has one")
	}
	if slices.ContainsFunc([]string{"", "a/b", id(1) + ".cast"}, recstore.ValidID) {
		t.Error("what is no ID is valid")
	}
}
