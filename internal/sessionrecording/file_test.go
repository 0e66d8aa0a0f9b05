// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// Other users of the proxy's host cannot read recordings, and a recording does not
// overwrite another one.
func TestCreateFile_ModeAndExclusive(t *testing.T) {
	old := syscall.Umask(0) // it would hide a wrong mode
	defer syscall.Umask(old)
	dir := filepath.Join(t.TempDir(), "new", "recordings")
	f, err := newDir(dir).create("s", 0)
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]fs.FileMode{filepath.Dir(dir): fs.ModeDir | 0o700, dir: fs.ModeDir | 0o700, f.Name(): 0o600} {
		if info, err := os.Stat(path); err != nil || info.Mode() != want {
			t.Errorf("%s: got mode %v, %v; want %v", path, info.Mode(), err, want)
		}
	}
	if _, err := newDir(dir).create("s", 0); !errors.Is(err, fs.ErrExist) {
		t.Errorf("creating the same file again: got error %v; want %v", err, fs.ErrExist)
	}
	if err := f.discard(); err != nil {
		t.Error(err)
	}
}

// Only a complete recording gets the name of one.
func TestFile_IncompleteStaysPartial(t *testing.T) {
	lost := errors.New("the disk is full")
	for _, tt := range []struct {
		name   string
		before func(*file) error
		err    error // of what was written
		want   error
		left   string
	}{
		{"complete", nil, nil, nil, "s.cast"},
		{"writing failed", nil, lost, lost, "s.cast.partial"},
		{"it cannot be synced and closed", func(f *file) error { return f.Close() }, nil, fs.ErrClosed, "s.cast.partial"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			f, err := newDir(dir).create("s", 0)
			if err != nil {
				t.Fatal(err)
			}
			if tt.before != nil {
				if err := tt.before(f); err != nil {
					t.Fatal(err)
				}
			}
			if err := f.complete(tt.err); !errors.Is(err, tt.want) {
				t.Errorf("got error %v; want %v", err, tt.want)
			}
			entries, err := os.ReadDir(dir)
			if err != nil || len(entries) != 1 || entries[0].Name() != tt.left {
				t.Errorf("the directory holds %v, %v; want %s", entries, err, tt.left)
			}
		})
	}
}
