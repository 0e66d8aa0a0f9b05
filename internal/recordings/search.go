// SPDX-License-Identifier: Apache-2.0

package recordings

import (
	"bytes"
	"context"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/text/unicode/norm"
)

const (
	// pageSize is how many recordings a page lists.
	pageSize = 50
	// searchTime is how long a search reads text. The next page goes on where it ended.
	searchTime = 3 * time.Second
	// maxQuery is the length of the longest text to filter by.
	maxQuery = 256
	// maxSnippet is how many bytes of a line that was found are shown.
	maxSnippet = 160
)

// Filter selects recordings. What is empty selects all.
type Filter struct {
	// User is a part of the user's, the tags' or the device's name, Namespace a namespace,
	// Pod a part of the pod's or the container's name, Kind a kind of session.
	User, Namespace, Pod, Kind string
	// From and To bound when the session began.
	From, To time.Time
	// Text appeared on the screen, in any case.
	Text string
}

// matches reports whether f selects r, whatever its text is.
func (f *Filter) matches(r *Recording) bool {
	return (f.User == "" || contains(r.User, f.User) || contains(r.Node, f.User)) &&
		(f.Namespace == "" || r.Namespace == f.Namespace) &&
		(f.Pod == "" || contains(r.Pod, f.Pod) || contains(r.Container, f.Pod)) &&
		(f.Kind == "" || r.Kind == f.Kind) &&
		(f.From.IsZero() || !r.Start.Before(f.From)) && (f.To.IsZero() || r.Start.Before(f.To))
}

// contains reports whether s contains part, in any case.
func contains(s, part string) bool {
	return strings.Contains(strings.ToLower(s), strings.ToLower(part))
}

// Found is a recording that was found.
type Found struct {
	*Recording
	// Line is the first line with the text that was searched for, and At when it
	// appeared.
	Line string
	At   time.Duration
}

// Page is a page of recordings.
type Page struct {
	Found []Found
	// Older is the ID before which the next page begins, empty if this is the last one.
	Older string
	// Unfinished says that a search for text has ended for its time, at Older.
	Unfinished bool
	// Unsearched is how many recordings have no text in the index, and were not searched.
	Unsearched int
	State
}

// Page returns the newest recordings that f selects, before the ID before, or the newest of
// all if that is empty.
func (x *Index) Page(ctx context.Context, f Filter, before string) (Page, error) {
	all, state := x.Recordings(ctx)
	page := Page{State: state}
	end := len(all)
	if before != "" {
		end, _ = slices.BinarySearchFunc(all, before, func(r *Recording, id string) int { return strings.Compare(r.ID, id) })
	}
	text, err := x.newSearch(f.Text)
	if err != nil {
		return Page{}, err
	}
	defer text.close()
	deadline := time.Now().Add(searchTime)
	for i := end - 1; i >= 0; i-- {
		r := all[i]
		if !f.matches(r) {
			continue
		}
		if len(page.Found) == pageSize {
			page.Older = all[i+1].ID
			return page, nil
		}
		if ctx.Err() != nil {
			return Page{}, context.Cause(ctx)
		}
		found := Found{Recording: r}
		if text != nil {
			if time.Now().After(deadline) {
				page.Older, page.Unfinished = all[i+1].ID, true
				return page, nil
			}
			if !r.Text || !text.knows(r.ID) {
				page.Unsearched++
				continue
			}
			var ok bool
			if found.Line, found.At, ok = text.in(r.ID); !ok {
				continue
			}
		}
		page.Found = append(page.Found, found)
	}
	return page, nil
}

// search looks for a text in the index.
type search struct {
	index   *Index
	db      *bolt.DB
	tx      *bolt.Tx // nil if there is no text
	decoder decoder
	text    []byte // lower case
	buffer  []byte
	lower   []byte
}

type decoder interface {
	DecodeAll(input, dst []byte) ([]byte, error)
	Close()
}

// newSearch returns nil if text is empty.
func (x *Index) newSearch(text string) (*search, error) {
	if text == "" {
		return nil, nil
	}
	s := &search{index: x, text: appendLower(nil, norm.NFC.Bytes([]byte(text)))}
	var err error
	if s.decoder, err = newDecoder(); err != nil {
		return nil, err
	}
	x.mu.RLock()
	defer x.mu.RUnlock()
	if x.db == nil {
		return s, nil
	}
	s.db = x.db
	err = safely(func() (err error) { s.tx, err = s.db.Begin(false); return err })
	return s, err
}

func (s *search) close() {
	if s == nil {
		return
	}
	s.decoder.Close()
	if s.tx != nil {
		_ = s.tx.Rollback() // nothing was written
	}
}

// knows reports whether the text of a recording is in the index.
func (s *search) knows(id string) (known bool) {
	if s.tx == nil {
		return false
	}
	_ = s.index.failed(s.db, safely(func() error {
		known = len(s.tx.Bucket(textBucket).Get([]byte(id))) > 0
		return nil
	}))
	return known
}

// in returns the first line of a recording that contains the text, and when it appeared.
func (s *search) in(id string) (found string, at time.Duration, ok bool) {
	if s.tx == nil {
		return "", 0, false
	}
	err := s.index.failed(s.db, safely(func() (err error) {
		s.buffer, err = s.decoder.DecodeAll(s.tx.Bucket(textBucket).Get([]byte(id)), s.buffer[:0])
		return err
	}))
	if err != nil {
		return "", 0, false
	}
	text, _, _ := bytes.Cut(s.buffer, []byte{0})
	s.lower = appendLower(s.lower[:0], text)
	i := bytes.Index(s.lower, s.text)
	if i < 0 {
		return "", 0, false
	}
	// appendLower changes no lengths.
	n := bytes.Count(text[:i], []byte("\n"))
	for j, l := range decodeTranscript(s.buffer) {
		if j == n {
			return snippet(l.text, i-bytes.LastIndexByte(text[:i], '\n')-1), l.at, true
		}
	}
	return "", 0, false
}

// appendLower appends p with ASCII letters in lower case. It keeps the length.
func appendLower(b, p []byte) []byte {
	n := len(b)
	b = append(b, p...)
	for i := n; i < len(b); i++ {
		if c := b[i]; c >= 'A' && c <= 'Z' {
			b[i] = c + 'a' - 'A'
		}
	}
	return b
}

// snippet returns the part of l around position at.
func snippet(l string, at int) string {
	if len(l) <= maxSnippet {
		return l
	}
	from := max(0, min(at-maxSnippet/2, len(l)-maxSnippet))
	for from < len(l) && !utf8.RuneStart(l[from]) {
		from++
	}
	to := min(len(l), from+maxSnippet)
	for to < len(l) && !utf8.RuneStart(l[to]) {
		to--
	}
	out := l[from:to]
	if from > 0 {
		out = "…" + out
	}
	if to < len(l) {
		out += "…"
	}
	return out
}
