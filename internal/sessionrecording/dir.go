// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/recordings"
)

// errQuota says that the recordings of a directory take as much as they may.
var errQuota = errors.New("the recordings have reached record_max_size")

// listInterval is the time after which a directory is listed again: others may delete
// recordings as well, and some become too old.
const listInterval = 10 * time.Minute

// block is what a file takes at least, and what its size is a multiple of on most file
// systems. Otherwise many small files would take more than they are counted as.
const block = 4 << 10

// allocated returns how much a file of size bytes takes.
func allocated(size int64) int64 { return max(1, (size+block-1)/block) * block }

// Dirs are the directories that this process records to. All handlers and configs that
// name a directory share it.
type Dirs struct {
	mu  sync.Mutex
	all map[string]*Dir
}

// At returns the directory at path. A nil Dirs shares none.
func (d *Dirs) At(path string) *Dir {
	if absolute, err := filepath.Abs(path); err == nil {
		path = absolute
	}
	if d == nil {
		return newDir(path)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.all == nil {
		d.all = make(map[string]*Dir)
	}
	if d.all[path] == nil {
		d.all[path] = newDir(path)
	}
	return d.all[path]
}

// Dir is a directory with recordings. It counts what they take as they are written.
type Dir struct {
	path string

	listing sync.Mutex // held while the directory is listed

	mu     sync.Mutex
	listed bool  // at least once
	used   int64 // what all recordings take
	// open is what the recordings take that this process writes, by ID, and closed those
	// that it has closed since the directory was last listed.
	open, closed map[string]int64
	// announcing is how many recordings are complete, and not announced yet.
	announcing int
	// mark and complete are those of Feed, empty and nil if no storage is fed.
	mark     string
	complete func(name string)
}

func newDir(path string) *Dir {
	return &Dir{path: path, open: make(map[string]int64), closed: make(map[string]int64)}
}

// Path returns the path of the directory.
func (d *Dir) Path() string { return d.path }

// take makes the recording id take size bytes. It returns errQuota if all recordings
// would take more than quota, which has no effect if it is 0.
func (d *Dir) take(id string, size, quota int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	more := size - d.open[id]
	if more > 0 && quota > 0 && d.used+more > quota {
		return errQuota
	}
	d.open[id] = size
	d.used += more
	return nil
}

// release says that the recording id is no longer written, and whether it is kept.
func (d *Dir) release(id string, kept bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	size := d.open[id]
	delete(d.open, id)
	if !kept {
		d.used -= size
		size = 0
	}
	d.closed[id] = size
}

// create creates the file of a recording, and the directory if it is missing. Only the
// user that the proxy runs as can read both.
func (d *Dir) create(id string, quota int64) (*file, error) {
	if err := os.MkdirAll(d.path, 0o700); err != nil {
		return nil, err
	}
	if err := d.listOnce(); err != nil {
		return nil, err
	}
	if err := d.take(id, block, quota); err != nil {
		return nil, err
	}
	f := &file{dir: d, id: id, quota: quota, path: filepath.Join(d.path, id+".cast")}
	var err error
	if f.File, err = os.OpenFile(f.path+partial, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600); err != nil {
		d.release(id, false)
		return nil, err
	}
	return f, nil
}

// listOnce lists the directory unless it has been listed.
func (d *Dir) listOnce() error {
	d.mu.Lock()
	listed := d.listed
	d.mu.Unlock()
	if listed {
		return nil
	}
	_, err := d.list(0)
	return err
}

// list counts what the recordings take. It deletes those that have not been written to
// for longer than retention, unless that is 0 or they wait for a storage, and returns how
// many.
func (d *Dir) list(retention time.Duration) (deleted int, err error) {
	d.listing.Lock()
	defer d.listing.Unlock()
	d.mu.Lock()
	clear(d.closed) // they are listed now
	for id := range d.open {
		// For other processes that delete old recordings of the same directory.
		now := time.Now()
		_ = os.Chtimes(filepath.Join(d.path, id+".cast"+partial), now, now)
	}
	d.mu.Unlock()

	entries, err := os.ReadDir(d.path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	found := make(map[string]int64)
	stored := d.storedIn(entries)
	var errs []error
	for _, entry := range entries {
		id, _, ok := recordings.ParseName(entry.Name())
		if !ok || !entry.Type().IsRegular() {
			continue
		}
		info, err := entry.Info()
		if err != nil {
			continue // it is gone
		}
		if retention > 0 && time.Since(info.ModTime()) > retention && !d.writes(id) && stored(entry.Name()) {
			err := os.Remove(filepath.Join(d.path, entry.Name()))
			if err == nil {
				deleted++
				continue
			}
			errs = append(errs, err)
		}
		found[id] += allocated(info.Size())
	}

	d.mu.Lock()
	defer d.mu.Unlock()
	d.listed, d.used = true, 0
	for id, size := range found {
		if _, open := d.open[id]; open {
			continue
		}
		if _, closed := d.closed[id]; !closed {
			d.used += size
		}
	}
	for _, own := range []map[string]int64{d.open, d.closed} {
		for _, size := range own {
			d.used += size
		}
	}
	return deleted, errors.Join(errs...)
}

// writes reports whether this process writes the recording id.
func (d *Dir) writes(id string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	_, open := d.open[id]
	return open
}

// Maintain counts what the recordings in rec's directory take, and deletes those that are
// too old, until ctx is done.
func (rec *Recorder) Maintain(ctx context.Context) {
	if rec.Dir == nil {
		return
	}
	ticker := time.NewTicker(listInterval)
	defer ticker.Stop()
	for {
		deleted, err := rec.Dir.list(rec.Retention)
		if err != nil {
			rec.Logger.Error("old recordings cannot be found or deleted", zap.String("directory", rec.Dir.path), zap.Error(err))
		}
		if deleted > 0 {
			rec.Logger.Info("old recordings were deleted", zap.String("directory", rec.Dir.path), zap.Int("recordings", deleted))
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}
