// SPDX-License-Identifier: Apache-2.0

package directory

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
)

// id returns the ID of the nth recording.
func id(n byte) string { return "20261130T120000Z-" + strings.Repeat(string('a'+rune(n)), 26) }

func section(text string) *io.SectionReader {
	return io.NewSectionReader(strings.NewReader(text), 0, int64(len(text)))
}

func TestStorage_PutListOpen(t *testing.T) {
	s := &Storage{Path: t.TempDir()}
	if err := s.Provision(caddy.Context{}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{id(1) + ".cast", id(2) + ".cast.partial", id(1) + ".cast.partial", id(3) + ".cast", id(3) + ".cast", "notes.cast"} {
		if err := s.Put(t.Context(), name, section(name)); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		after string
		n     int
		want  []string
	}{
		{"", 10, []string{id(1), id(2), id(3)}},
		{"", 2, []string{id(1), id(2)}},
		{id(1), 10, []string{id(2), id(3)}},
		{id(2), 1, []string{id(3)}},
		{id(3), 10, nil},
	} {
		entries, err := s.List(t.Context(), tt.after, tt.n)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, e := range entries {
			got = append(got, e.ID)
			if want := e.ID != id(2); e.Complete != want || e.Size == 0 || e.Modified.IsZero() {
				t.Errorf("got %+v", e)
			}
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("%d after %q: got %q; want %q", tt.n, tt.after, got, tt.want)
		}
	}
	body, entry, err := s.Open(t.Context(), id(1))
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	if content, err := io.ReadAll(body); err != nil || string(content) != id(1)+".cast" || !entry.Complete || entry.Size != int64(len(content)) {
		t.Errorf("got %q of %+v, %v", content, entry, err)
	}
	for _, id := range []string{id(4), "", "notes", "../" + filepath.Base(s.Path)} {
		if _, _, err := s.Open(t.Context(), id); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%q: got %v; want fs.ErrNotExist", id, err)
		}
	}
}

// What is not stored leaves nothing.
func TestPut_FailsWhole(t *testing.T) {
	s := &Storage{Path: t.TempDir()}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Put(ctx, id(1)+".cast", section("x")); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v; want that it was cancelled", err)
	}
	if left, err := os.ReadDir(s.Path); err != nil || len(left) > 0 {
		t.Errorf("the directory has %v, %v", left, err)
	}
	s.Path = filepath.Join(s.Path, "not mounted")
	if err := s.Put(t.Context(), id(1)+".cast", section("x")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v; want that there is no directory", err)
	}
}

// What a process that was killed has left is removed, and nothing that another process may be
// sending.
func TestPut_RemovesWhatIsLeft(t *testing.T) {
	s := &Storage{Path: t.TempDir()}
	name := id(1) + ".cast"
	for left, age := range map[string]time.Duration{
		"." + name + ".123":         abandoned + time.Minute,
		"." + name + ".456":         abandoned - time.Minute,
		"." + id(2) + ".cast.123":   abandoned + time.Minute,
		"." + name + ".partial.1":   abandoned + time.Minute,
		"." + name + "x":            abandoned + time.Minute,
		".notes.cast.123":           abandoned + time.Minute,
		name + ".stored-0123456789": abandoned + time.Minute,
	} {
		path := filepath.Join(s.Path, left)
		at := time.Now().Add(-age)
		if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Chtimes(path, at, at)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Put(t.Context(), name, section("x")); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(s.Path)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, entry := range entries {
		got = append(got, entry.Name())
	}
	if want := []string{"." + name + ".456", "." + name + "x", ".notes.cast.123", name, name + ".stored-0123456789"}; !slices.Equal(got, want) {
		t.Errorf("the directory has %q; want %q", got, want)
	}
}
