// SPDX-License-Identifier: Apache-2.0

// Package recstore reads recordings from where they are kept. It knows their names and
// sizes, and nothing of what is in them.
package recstore

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"regexp"
	"slices"
	"strings"
	"time"
)

// Entry is a recording in a store.
type Entry struct {
	// ID is the name of the recording without a suffix. IDs begin with the time at which
	// the session was requested, so they sort by it.
	ID string
	// Size is how many bytes the recording has.
	Size int64
	// Modified is when it was written to last.
	Modified time.Time
	// Complete says that the session has ended and nothing is missing. Otherwise it is
	// running, or its recording was cut off.
	Complete bool
}

// Store is where recordings are read from.
type Store interface {
	// List returns at most n recordings whose IDs sort after the ID after, in ascending
	// order. It returns fewer than n only if there are no more.
	List(ctx context.Context, after string, n int) ([]Entry, error)
	// Open opens a recording. The error is an [fs.ErrNotExist] if there is none. Reading
	// one that is not complete returns [io.EOF] at what is its end now, and may be tried
	// again later.
	Open(ctx context.Context, id string) (io.ReadCloser, Entry, error)
}

var validID = regexp.MustCompile(`^\d{8}T\d{6}Z-[a-z2-7]{26}$`)

// ValidID reports whether id has the form of the ID of a recording. No other may become
// a part of a path.
func ValidID(id string) bool { return validID.MatchString(id) }

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
// the first that is complete counts, or else the first.
func Union(stores ...Store) Store {
	if len(stores) == 1 {
		return stores[0]
	}
	return union(stores)
}

type union []Store

// List implements [Store].
func (u union) List(ctx context.Context, after string, n int) ([]Entry, error) {
	var all []Entry
	for _, s := range u {
		entries, err := s.List(ctx, after, n)
		if err != nil {
			return nil, err
		}
		all = append(all, entries...)
	}
	// Stable, so that the order of stores decides among those that are alike.
	slices.SortStableFunc(all, func(a, b Entry) int {
		switch {
		case a.ID != b.ID:
			return strings.Compare(a.ID, b.ID)
		case a.Complete == b.Complete:
			return 0
		case a.Complete:
			return -1
		}
		return 1
	})
	all = slices.CompactFunc(all, func(a, b Entry) bool { return a.ID == b.ID })
	return all[:min(n, len(all))], nil
}

// Open implements [Store].
func (u union) Open(ctx context.Context, id string) (io.ReadCloser, Entry, error) {
	var partial io.ReadCloser
	var cut Entry
	var errs []error
	for _, s := range u {
		r, entry, err := s.Open(ctx, id)
		switch {
		case err != nil:
			errs = append(errs, err)
		case entry.Complete:
			if partial != nil {
				_ = partial.Close() // it was not read
			}
			return r, entry, nil
		case partial == nil:
			partial, cut = r, entry
		default:
			_ = r.Close() // it was not read
		}
	}
	if partial != nil {
		return partial, cut, nil
	}
	if slices.ContainsFunc(errs, func(err error) bool { return !errors.Is(err, fs.ErrNotExist) }) {
		return nil, Entry{}, errors.Join(errs...)
	}
	return nil, Entry{}, fs.ErrNotExist
}
