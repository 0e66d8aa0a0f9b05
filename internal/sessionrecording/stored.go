// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/recordings"
)

// abandoned is the time after which a partial recording that this process does not write
// is not written by another one either, which marks what it writes every listInterval.
const abandoned = 3 * listInterval

// markName matches the names of marks. A mark is an empty file beside a recording, which
// says that a storage has it.
var markName = regexp.MustCompile(`^(.*)(\.stored-[0-9a-f]{16})$`)

// Mark returns the ending of marks for the storage whose hash begins with sum.
func Mark(sum [8]byte) string {
	const digits = "0123456789abcdef"
	mark := []byte(".stored-")
	for _, b := range sum {
		mark = append(mark, digits[b>>4], digits[b&15])
	}
	return string(mark)
}

// Waiting is a recording that a storage does not have.
type Waiting struct {
	Name  string
	Size  int64
	Since time.Time // when it was last written
}

// Feed says that a storage with the given mark gets the recordings. complete is called
// with the name of each that becomes complete, and must not block. From now on, only what
// has the mark is deleted for its age.
func (d *Dir) Feed(mark string, complete func(name string)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mark, d.complete = mark, complete
}

// Open opens the recording with the given name.
func (d *Dir) Open(name string) (*os.File, error) { return os.Open(filepath.Join(d.path, name)) }

// Writing reports whether this process writes a recording, or has written one that Feed's
// function is not told of yet.
func (d *Dir) Writing() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.open)+d.announcing > 0
}

// announce calls release, and then what Feed was given.
func (d *Dir) announce(name string, release func()) {
	d.mu.Lock()
	d.announcing++
	d.mu.Unlock()
	defer func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.announcing--
	}()
	release()
	d.mu.Lock()
	complete := d.complete
	d.mu.Unlock()
	if complete != nil {
		complete(name)
	}
}

// storedIn returns a function that reports whether the recording with the given name may
// be deleted for its age: it does not wait for a storage. It may be a part of what the
// directory holds.
func (d *Dir) storedIn(entries []fs.DirEntry) func(name string) bool {
	d.mu.Lock()
	mark := d.mark
	d.mu.Unlock()
	if mark == "" {
		return func(string) bool { return true }
	}
	marked := make(map[string]bool)
	for _, entry := range entries {
		if match := markName.FindStringSubmatch(entry.Name()); match != nil && match[2] == mark {
			marked[match[1]] = true
		}
	}
	return func(name string) bool { return marked[name] }
}

// Unstored returns the recordings without the mark that are not written any more, and the
// names of those that have it. It deletes marks whose recordings are gone.
func (d *Dir) Unstored(mark string) (waiting []Waiting, stored []string, err error) {
	entries, err := os.ReadDir(d.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil // the first recording makes it
	}
	if err != nil {
		return nil, nil, err
	}
	marks := make(map[string][]string) // by the name of the recording
	for _, entry := range entries {
		if match := markName.FindStringSubmatch(entry.Name()); match != nil {
			marks[match[1]] = append(marks[match[1]], match[2])
		}
	}
	var errs []error
	for _, entry := range entries {
		name := entry.Name()
		id, complete, ok := recordings.ParseName(name)
		if !ok || !entry.Type().IsRegular() {
			continue
		}
		has := false
		for _, m := range marks[name] {
			has = has || m == mark
		}
		delete(marks, name)
		if has {
			stored = append(stored, name)
			continue
		}
		info, err := entry.Info()
		if err != nil {
			continue // it is gone
		}
		if !complete && (d.writes(id) || time.Since(info.ModTime()) < abandoned) {
			continue
		}
		waiting = append(waiting, Waiting{name, info.Size(), info.ModTime()})
	}
	for name, left := range marks {
		if _, _, ok := recordings.ParseName(name); !ok {
			continue
		}
		for _, m := range left {
			errs = append(errs, remove(filepath.Join(d.path, name+m)))
		}
	}
	return waiting, stored, errors.Join(errs...)
}

// SetMark marks the recording with the given name.
func (d *Dir) SetMark(name, mark string) error {
	f, err := os.OpenFile(filepath.Join(d.path, name+mark), os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	return f.Close()
}

// Remove removes the recording with the given name, which is not written any more.
func (d *Dir) Remove(name string) error {
	id, _, _ := recordings.ParseName(name)
	path := filepath.Join(d.path, name)
	info, err := os.Lstat(path)
	if err == nil {
		err = os.Remove(path)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.listed {
		d.used -= allocated(info.Size())
	}
	d.closed[id] = 0 // for a list that has seen it
	return nil
}

// remove removes a file, which may be gone.
func remove(path string) error {
	if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
