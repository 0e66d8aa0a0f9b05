// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"errors"
	"os"
	"path/filepath"
)

// partial is the suffix of a file whose session has not ended, or whose recording was
// cut off because the proxy stopped.
const partial = ".partial"

// file is a recording on disk.
type file struct {
	*os.File
	path string // its path once it is complete
}

// createFile creates the file for the session with the given ID in dir, which it creates
// as well if it is missing. Only the user that the proxy runs as can read both.
func createFile(dir, id string) (*file, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	path := filepath.Join(dir, id+".cast")
	f, err := os.OpenFile(path+partial, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	return &file{f, path}, nil
}

// complete closes the file and gives it its final name. If err is not nil, the file
// could not be written, and keeps the name of a partial one.
func (f *file) complete(err error) error {
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.path+partial, f.path)
}

// discard closes and removes the file.
func (f *file) discard() error {
	return errors.Join(f.Close(), os.Remove(f.path+partial))
}
