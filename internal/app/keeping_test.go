// SPDX-License-Identifier: Apache-2.0

package app_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/app"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/directory"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/outbox"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/sessionrecording"
)

// What two handlers do with recordings in the same place has to agree. Above all, nobody
// reads the sessions of a site that does not name them.
func TestKeepRecordings_HandlersAgree(t *testing.T) {
	links := t.TempDir()
	if err := os.Symlink(t.TempDir(), filepath.Join(links, "link")); err != nil {
		t.Fatal(err)
	}
	target, err := filepath.EvalSymlinks(filepath.Join(links, "link"))
	if err != nil {
		t.Fatal(err)
	}
	var dirs sessionrecording.Dirs
	kept := func(dir, storage string, page bool, readers ...string) app.Kept {
		k := app.Kept{Dir: dirs.At(dir), Readers: readers, Page: page}
		if storage != "" {
			k.Store = outbox.Settings{Storage: &directory.Storage{Path: storage}}
		}
		return k
	}
	const readers, storage, written = "recordings_readers", "use one storage", "sessions are recorded to that directory"
	removed := kept("/d", "/s", true, "a", "b")
	removed.Store.Remove = true
	locked := kept("/d", "/s", true, "a", "b")
	locked.Store.Config = `{"storage":"directory","path":"/s","object_lock":"governance"}`
	for _, tt := range []struct {
		name  string
		other app.Kept
		want  string // of the error
	}{
		{"the same", kept("/d", "/s", true, "b", "a"), ""},
		{"other places, other readers", kept("/e", "/t", true, "c"), ""},
		{"the same storage", kept("/e", "/s", true, "b", "a"), ""},
		{"no storage, in another directory", kept("/e", "", true, "c"), ""},
		{"more readers of the directory", kept("/d", "/s", true, "a", "b", "c"), readers},
		{"no page for the directory", kept("/d", "/s", false), readers},
		{"more readers of the storage", kept("/e", "/s", true, "a", "b", "c"), readers},
		{"no page for the storage", kept("/e", "/s", false), readers},
		{"another storage", kept("/d", "/t", true, "a", "b"), storage},
		{"removed, and not", removed, storage},
		{"the same storage with another option", locked, "options of record_to"},
		{"another name of the directory", kept(links+"/link/new", "", true, "c"), readers},
		{"another name of the directory, for a storage", kept("/e", links+"/link/new", true, "a", "b"), written},
		{"recorded to the storage", kept("/s", "", true, "a", "b"), written},
		{"stored in the directory", kept("/e", "/d", true, "a", "b"), written},
		{"stored where it is recorded", kept("/e", "/e", true, "a", "b"), written},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a := new(app.App)
			for _, k := range []app.Kept{kept("/d", "", true, "a", "b"), kept("/d", "/s", true, "a", "b"), kept(target+"/new", "", true, "a", "b")} {
				if err := a.KeepRecordings(k); err != nil {
					t.Fatal(err)
				}
			}
			// A handler without a storage does not change where the others' recordings go.
			if s := a.StorageOf(dirs.At("/d")); s == nil || s.String() != "directory /s" {
				t.Errorf("the storage of the directory is %v", s)
			}
			if s := a.StorageOf(dirs.At(target + "/new")); s != nil {
				t.Errorf("the storage of another directory is %v", s)
			}
			err := a.KeepRecordings(tt.other)
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v; want %q", err, tt.want)
			}
		})
	}
}
