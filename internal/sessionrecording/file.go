// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"syscall"
)

// partial is the suffix of a file whose session has not ended, or whose recording was
// cut off because the proxy stopped.
const partial = ".partial"

// file is a recording on disk.
type file struct {
	*os.File
	dir   *Dir
	id    string
	quota int64  // of dir
	path  string // its path once it is complete
	size  int64

	// beyondQuota is called when the quota of dir is used up. From then on, nothing is
	// written. If it is nil, the quota is an error.
	beyondQuota func()
	cut         bool // beyondQuota has been called
}

// Write implements [io.Writer].
func (f *file) Write(p []byte) (int, error) {
	if f.cut {
		return len(p), nil
	}
	err := f.dir.take(f.id, allocated(f.size+int64(len(p))), f.quota)
	if err == nil {
		return f.write(p)
	}
	if f.beyondQuota == nil {
		return 0, err
	}
	f.cut = true
	f.beyondQuota()
	// Players do not read a part of a line.
	if n, err := f.write(p[:bytes.LastIndexByte(p, '\n')+1]); err != nil {
		return n, err
	}
	return len(p), f.dir.take(f.id, allocated(f.size), 0)
}

func (f *file) write(p []byte) (int, error) {
	n, err := f.File.Write(p)
	f.size += int64(n)
	return n, err
}

// complete closes the file and gives it its final name. If err is not nil, the file
// could not be written, and keeps the name of a partial one.
//
// Without an error, the recording is kept: it is on the disk with its name.
func (f *file) complete(err error) error {
	err = f.finish(err)
	release := func() { f.dir.release(f.id, true) }
	if err != nil {
		release()
		return err
	}
	f.dir.announce(filepath.Base(f.path), release)
	return nil
}

func (f *file) finish(err error) error {
	if f.cut {
		err = errors.Join(err, errQuota)
	}
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.path+partial, f.path); err != nil {
		return err
	}
	return syncDir(f.dir.path)
}

// syncDir makes names in the directory at path survive a loss of power, on file systems
// that know how to.
func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	err = d.Sync()
	if errors.Is(err, syscall.EINVAL) || errors.Is(err, errors.ErrUnsupported) {
		err = nil
	}
	return errors.Join(err, d.Close())
}

// discard closes and removes the file.
func (f *file) discard() error {
	defer f.dir.release(f.id, false)
	return errors.Join(f.Close(), os.Remove(f.path+partial))
}
