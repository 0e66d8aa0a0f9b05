// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"errors"
	"os"
	"path/filepath"
)

// partial ends the name of a file whose session has not ended, or was cut off when
// the proxy was.
const partial = ".partial"

// file is a recording on disk.
type file struct {
	*os.File
	path string // when it is complete
}

// createFile creates the file of a session with that name in a directory, which it
// creates as well. Only the user that the proxy runs as can read them.
func createFile(dir, name string) (*file, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	path := filepath.Join(dir, name+".cast")
	f, err := os.OpenFile(path+partial, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	return &file{f, path}, nil
}

// complete gives the file its name, unless err is why it could not be written.
func (f *file) complete(err error) error {
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.path+partial, f.path)
}

// discard removes the file.
func (f *file) discard() error {
	return errors.Join(f.Close(), os.Remove(f.path+partial))
}
