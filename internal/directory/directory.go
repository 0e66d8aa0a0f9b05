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
	"syscall"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recstore"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/recordings"
)

func init() { caddy.RegisterModule(new(Storage)) }

// Storage stores recordings in a directory other than that of `record`, such as one of a
// file server, which replicas share.
type Storage struct {
	// The path of the directory. It has to exist: where a file server is not mounted,
	// the recordings must not go to the disk below.
	Path string `json:"path,omitempty"`
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
