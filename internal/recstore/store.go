// SPDX-License-Identifier: Apache-2.0

// Package recstore reads recordings from where they are kept. It knows their names and
// sizes, and nothing of what is in them.
package recstore

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/recordings"
)

// Entry is a recording in a store.
type Entry = recordings.Entry

// Store is where recordings are read from.
type Store = recordings.Reader

// ValidID reports whether id has the form of the ID of a recording. No other may become
// a part of a path.
func ValidID(id string) bool { return recordings.ValidID(id) }

// idTime is the layout of the time at the start of an ID.
const idTime = "20060102T150405Z"

// Requested returns when the session of a recording was requested, the zero time if id is
// not valid.
func Requested(id string) time.Time {
	at, _, _ := strings.Cut(id, "-")
	t, err := time.Parse(idTime, at)
	if err != nil {
		return time.Time{}
	}
	return t
}

// Union returns a store with the recordings of several. Of a recording that is in several,
// the first counts.
func Union(stores ...Store) Store {
	if len(stores) == 1 {
		return stores[0]
	}
	return union(stores)
}

type union []Store

// Place says where a store has recordings besides the directory: the String of its storage,
// empty without one.
func Place(s Store) string {
	switch s := s.(type) {
	case union:
		var all []string
		for _, part := range s {
			if place := Place(part); place != "" {
				all = append(all, place)
			}
		}
		return strings.Join(all, " ")
	case *storage:
		return s.of.String()
	}
	return ""
}

// List implements [Store]. If a store is away, the error is an [Unavailable], and the list
// has the recordings of the others.
func (u union) List(ctx context.Context, after string, n int) ([]Entry, error) {
	var all []Entry
	var away error
	for _, s := range u {
		entries, err := s.List(ctx, after, n)
		if unavailable := (*Unavailable)(nil); errors.As(err, &unavailable) {
			away = err
		} else if err != nil {
			return nil, err
		}
		all = append(all, entries...)
	}
	// Stable, so that the order of stores decides.
	slices.SortStableFunc(all, func(a, b Entry) int { return strings.Compare(a.ID, b.ID) })
	all = slices.CompactFunc(all, func(a, b Entry) bool { return a.ID == b.ID })
	return all[:min(n, len(all))], away
}

// Open implements [Store].
func (u union) Open(ctx context.Context, id string) (io.ReadCloser, Entry, error) {
	for _, s := range u {
		r, entry, err := s.Open(ctx, id)
		if !errors.Is(err, fs.ErrNotExist) {
			return r, entry, err
		}
	}
	return nil, Entry{}, fs.ErrNotExist
}
