// SPDX-License-Identifier: Apache-2.0

// Package directory is a Caddy module that stores session recordings in a directory, such
// as one that the replicas share.
package directory

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"sync"
	"syscall"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recstore"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/recordings"
)

// abandoned is the time after which no process is sending what it has not stored.
const abandoned = 24 * time.Hour

func init() { caddy.RegisterModule(new(Storage)) }

// Storage stores recordings in a directory other than that of `record`, such as one of a
// file server, which replicas share.
type Storage struct {
	// The path of the directory. It has to exist. Name one below the mount point of a file
	// server, such as `/archive/recordings` of `/archive`: the mount point itself exists also
	// when nothing is mounted there, and the recordings would go to the disk below.
	Path string `json:"path,omitempty"`

	mu      sync.Mutex
	removed time.Time // when removeTemporary last looked
}

// CaddyModule returns the Caddy module information.
func (*Storage) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  recordings.Namespace + ".directory",
		New: func() caddy.Module { return new(Storage) },
	}
}

// UnmarshalCaddyfile sets s from Caddyfile tokens. Syntax:
//
//	record_to directory <path>
func (s *Storage) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // the module's name
	if !d.NextArg() || d.Val() == "" {
		return d.Err("directory has no path")
	}
	s.Path = d.Val()
	if d.NextArg() {
		return d.Errf("unexpected argument %q after directory", d.Val())
	}
	if d.NextBlock(0) {
		return d.Err("directory takes no block")
	}
	return nil
}

// Provision sets up the storage.
func (s *Storage) Provision(caddy.Context) (err error) {
	if s.Path, err = caddy.NewReplacer().ReplaceOrErr(s.Path, true, true); err != nil {
		return fmt.Errorf("path: %w", err)
	}
	if !filepath.IsAbs(s.Path) {
		return fmt.Errorf("path %q: must be an absolute path", s.Path)
	}
	s.Path = filepath.Clean(s.Path)
	return nil
}

// String implements [recordings.Storage].
func (s *Storage) String() string { return Place(s.Path) }

// Place returns what the String of a storage in a directory is.
func Place(path string) string { return "directory " + path }

// Put implements [recordings.Storage]. A recording gets its name when all of it is on the
// disk.
func (s *Storage) Put(ctx context.Context, name string, content *io.SectionReader) (err error) {
	s.removeTemporary()
	f, err := os.CreateTemp(s.Path, "."+name+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close(), os.Remove(f.Name()))
		}
	}()
	if _, err = io.Copy(f, reader{ctx, content}); err != nil {
		return err
	}
	if err = f.Sync(); err != nil {
		return err
	}
	if err = os.Rename(f.Name(), filepath.Join(s.Path, name)); err != nil {
		return err
	}
	return errors.Join(f.Close(), syncDir(s.Path))
}

// removeTemporary removes what processes that were killed have left, now and then: a file
// server takes long to list many recordings. Another process may be sending what is recent.
// What cannot be removed takes room, and stops no recording.
func (s *Storage) removeTemporary() {
	s.mu.Lock()
	due := time.Since(s.removed) > abandoned
	if due {
		s.removed = time.Now()
	}
	s.mu.Unlock()
	if !due {
		return
	}
	entries, _ := os.ReadDir(s.Path) // Put says if there is no directory
	for _, entry := range entries {
		match := temporary.FindStringSubmatch(entry.Name())
		if match == nil || !entry.Type().IsRegular() {
			continue
		}
		if _, _, ok := recordings.ParseName(match[1]); !ok {
			continue
		}
		if info, err := entry.Info(); err == nil && time.Since(info.ModTime()) > abandoned {
			_ = os.Remove(filepath.Join(s.Path, entry.Name()))
		}
	}
}

// temporary matches the names of recordings while they are stored.
var temporary = regexp.MustCompile(`^\.(.+)\.[0-9]+$`)

// reader reads until ctx is done.
type reader struct {
	ctx context.Context
	io.Reader
}

// Read implements [io.Reader].
func (r reader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, context.Cause(r.ctx)
	}
	return r.Reader.Read(p)
}

// syncDir makes names in the directory at path survive a loss of power, on file systems
// that know how to.
func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	if err = d.Sync(); errors.Is(err, syscall.EINVAL) || errors.Is(err, errors.ErrUnsupported) {
		err = nil
	}
	return errors.Join(err, d.Close())
}

// List implements [recordings.Reader].
func (s *Storage) List(ctx context.Context, after string, n int) ([]recordings.Entry, error) {
	if _, err := os.Stat(s.Path); err != nil {
		return nil, err // where a file server is not mounted
	}
	return recstore.Dir(s.Path).List(ctx, after, n)
}

// Open implements [recordings.Reader].
func (s *Storage) Open(ctx context.Context, id string) (io.ReadCloser, recordings.Entry, error) {
	return recstore.Dir(s.Path).Open(ctx, id)
}

// Interface guards
var (
	_ caddy.Provisioner     = (*Storage)(nil)
	_ caddyfile.Unmarshaler = (*Storage)(nil)
	_ recordings.Storage    = (*Storage)(nil)
)
