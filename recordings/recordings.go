// SPDX-License-Identifier: Apache-2.0

// Package recordings says what a storage of session recordings has to do. A storage is a
// Caddy module in the namespace tailscale_impersonate.recordings, so that another
// repository can add one:
//
//	func init() { caddy.RegisterModule(new(Storage)) }
//
//	func (*Storage) CaddyModule() caddy.ModuleInfo {
//		return caddy.ModuleInfo{
//			ID:  recordings.Namespace + ".tape",
//			New: func() caddy.Module { return new(Storage) },
//		}
//	}
//
// A Caddyfile then names it as record_to tape. The module implements
// caddyfile.Unmarshaler for the arguments and the block that follow.
//
// A session is always written to the directory that record names, as it goes on. The
// storage gets what is complete, and is asked for it by those who read recordings. Who
// waits for a storage that is away, for how long, and what is tried again is not its
// concern.
package recordings

import (
	"context"
	"io"
	"regexp"
	"time"
)

// Namespace is the namespace of the Caddy modules that are a [Storage].
const Namespace = "tailscale_impersonate.recordings"

// Storage keeps recordings. Its methods may be called at the same time, also by other
// replicas that use the same place.
type Storage interface {
	Reader

	// String says where the recordings go, without credentials, such as
	// "s3 https://s3.example.com/bucket/prefix/". Storages with the same String are
	// the same place: what one has stored, the other has.
	String() string

	// Put stores a recording under its name, which [ParseName] understands. If it
	// returns nil, the storage has all of content, and keeps it: the proxy may delete
	// its own. A recording may be put again, with the same content.
	Put(ctx context.Context, name string, content *io.SectionReader) error
}

// Reader is where recordings are read.
type Reader interface {
	// List returns at most n recordings whose IDs sort after after, which is empty for
	// all, in ascending order of their IDs. If there are fewer, there are no more.
	List(ctx context.Context, after string, n int) ([]Entry, error)

	// Open opens a recording at its start, and ctx ends reading it. The error is an
	// fs.ErrNotExist if there is none. Whoever reads may pause for long between two
	// reads. Reading what is being written returns io.EOF at its end, and may be tried
	// again later.
	Open(ctx context.Context, id string) (io.ReadCloser, Entry, error)
}

// Entry is a recording in a storage.
type Entry struct {
	// ID is the session's ID. IDs sort by the time of the session's begin.
	ID string
	// Size is the number of bytes of the recording.
	Size int64
	// Modified is when the recording was last written.
	Modified time.Time
	// Complete says that the recording has the end of its session.
	Complete bool
}

// The endings of names. That of a complete recording is its ID and Ext.
const (
	Ext     = ".cast"
	Partial = ".partial" // behind Ext: the session is open, or its recording was cut off
)

var name = regexp.MustCompile(`^(\d{8}T\d{6}Z-[a-z2-7]{26})\.cast(\.partial)?$`)

// ParseName returns the ID in the name of a recording, and whether the recording is
// complete. It returns ok as false for any other name.
func ParseName(s string) (id string, complete, ok bool) {
	match := name.FindStringSubmatch(s)
	if match == nil {
		return "", false, false
	}
	return match[1], match[2] == "", true
}

// ValidID reports whether id is the ID of a recording.
func ValidID(id string) bool { return name.MatchString(id + Ext) }
