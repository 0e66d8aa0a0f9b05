// SPDX-License-Identifier: Apache-2.0

package recstore

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/recordings"
)

// Dir returns the store of the recordings in a directory. Whoever can write to it must not
// make Caddy read other files: links are no recordings.
func Dir(path string) Store { return dir(path) }

type dir string

// List implements [Store]. A directory that does not exist has no recordings.
func (d dir) List(ctx context.Context, after string, n int) ([]Entry, error) {
	f, err := os.Open(string(d))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	names, err := f.Readdirnames(-1)
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	// Only those that are asked for are worth a look at their size.
	names = slices.DeleteFunc(names, func(name string) bool {
		id, ok := idOf(name)
		return !ok || id <= after
	})
	slices.Sort(names) // a complete one comes before a partial one
	var entries []Entry
	for _, name := range names {
		id, _ := idOf(name)
		if len(entries) > 0 && entries[len(entries)-1].ID == id {
			continue
		}
		if len(entries) == n || ctx.Err() != nil {
			break
		}
		info, err := os.Lstat(filepath.Join(string(d), name))
		if err != nil || !info.Mode().IsRegular() {
			continue // it is gone, was completed just now, or is none of ours
		}
		entries = append(entries, entry(id, info))
	}
	return entries, ctx.Err()
}

// idOf returns the ID of the recording in a file of that name.
func idOf(name string) (string, bool) {
	id, _, ok := recordings.ParseName(name)
	return id, ok
}

func entry(id string, info fs.FileInfo) Entry {
	return Entry{ID: id, Size: info.Size(), Modified: info.ModTime(), Complete: !strings.HasSuffix(info.Name(), recordings.Partial)}
}

// Open implements [Store].
func (d dir) Open(_ context.Context, id string) (io.ReadCloser, Entry, error) {
	if !ValidID(id) {
		return nil, Entry{}, fs.ErrNotExist
	}
	path := filepath.Join(string(d), id+recordings.Ext)
	// A recording may be completed between the two.
	for _, path := range []string{path, path + recordings.Partial, path} {
		f, info, err := openRegular(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, Entry{}, err
		}
		return f, entry(id, info), nil
	}
	return nil, Entry{}, fs.ErrNotExist
}

// openRegular opens a file that is neither a link nor, for instance, a pipe, which would
// block. The error is a [fs.ErrNotExist] if it is one.
func openRegular(path string) (*os.File, fs.FileInfo, error) {
	before, err := os.Lstat(path)
	if err != nil {
		return nil, nil, err
	}
	if !before.Mode().IsRegular() {
		return nil, nil, fs.ErrNotExist
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, err
	}
	info, err := f.Stat()
	if err == nil && !os.SameFile(before, info) {
		err = fs.ErrNotExist
	}
	if err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	return f, before, nil
}

// Interface guards
var (
	_ Store = dir("")
	_ Store = union(nil)
)
