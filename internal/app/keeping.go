// SPDX-License-Identifier: Apache-2.0

package app

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/directory"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/outbox"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/sessionrecording"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/recordings"
)

// Kept is what a handler does with recordings.
type Kept struct {
	// Dir is the directory that it records to.
	Dir *sessionrecording.Dir
	// Store says where recordings go from there. Without a storage, they stay.
	Store outbox.Settings
	// Readers are the groups whose members may read them.
	Readers []string
	// Page says that there is a page on which they can.
	Page bool
}

// places returns the places where k keeps recordings.
func (k *Kept) places() []place {
	places := []place{{directory.Place(realPath(k.Dir.Path())), true}}
	switch to := k.Store.Storage.(type) {
	case nil:
	case *directory.Storage:
		places = append(places, place{directory.Place(realPath(to.Path)), false})
	default:
		places = append(places, place{to.String(), false})
	}
	return places
}

// place is where recordings are.
type place struct {
	name string
	// written says that sessions are recorded there, and not only stored.
	written bool
}

// keeping is what the handlers of a config do with recordings.
type keeping struct {
	all    []Kept
	stores map[*sessionrecording.Dir]outbox.Settings
}

// KeepRecordings notes what a handler does with recordings, and has its storage get them once
// the config runs. What handlers of a config do must agree:
//
//   - A directory has one storage: what one has stored may be removed before another gets it.
//   - No storage is a directory that is recorded to: what is deleted there for its age, or
//     once it is stored, would be lost.
//   - The same place has the same readers: nobody reads the sessions of a site that does not
//     name them.
func (a *App) KeepRecordings(k Kept) error {
	if k.Store.Storage != nil {
		if other, ok := a.kept.stores[k.Dir]; ok && !k.Store.Same(other) {
			return fmt.Errorf("record_to: another handler stores the recordings in %s in %s, or differs in options of record_to or in record_remove_stored: use one storage for a directory, or two directories", k.Dir.Path(), other.Storage)
		}
	}
	k.Readers = slices.Compact(slices.Sorted(slices.Values(k.Readers)))
	a.kept.all = append(a.kept.all, k)
	for _, mine := range k.places() {
		for _, other := range a.kept.all {
			if err := k.agree(mine, &other); err != nil {
				return err
			}
		}
	}
	if k.Store.Storage == nil {
		return nil
	}
	if a.kept.stores == nil {
		a.kept.stores = make(map[*sessionrecording.Dir]outbox.Settings)
	}
	a.kept.stores[k.Dir] = k.Store
	return nil
}

// StorageOf returns the storage that gets the recordings in dir, nil if none does. All handlers
// of the config have to be provisioned: one of them may name it for the others.
func (a *App) StorageOf(dir *sessionrecording.Dir) recordings.Storage {
	return a.kept.stores[dir].Storage
}

// Outbox returns what sends the recordings in dir to a storage.
func (a *App) Outbox(dir *sessionrecording.Dir) *outbox.Outbox { return a.process.Outboxes.Of(dir) }

// agree returns an error if k and other both keep recordings in a place of k, and do not
// agree about it.
func (k *Kept) agree(mine place, other *Kept) error {
	for _, its := range other.places() {
		switch {
		case its.name != mine.name:
		case its.written != mine.written:
			return errors.New("record_to " + mine.name + ": sessions are recorded to that directory; store them in another one, or in another storage")
		case (k.Page || other.Page) && !slices.Equal(k.Readers, other.Readers):
			return fmt.Errorf("recordings: another site keeps its recordings in the same place (%s), and its recordings_readers are not the same; give each site a place of its own, or both the same readers", mine.name)
		}
	}
	return nil
}

// realPath returns the path of a directory without links: it may have several names, and
// may not exist yet.
func realPath(dir string) string {
	rest := ""
	for {
		if resolved, err := filepath.EvalSymlinks(dir); err == nil {
			return filepath.Join(resolved, rest)
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return filepath.Join(dir, rest)
		}
		dir, rest = parent, filepath.Join(filepath.Base(dir), rest)
	}
}
