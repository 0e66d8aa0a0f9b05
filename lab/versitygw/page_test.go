// SPDX-License-Identifier: Apache-2.0

package versitygw

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/authn"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/outbox"
	page "github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recordings"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recstore"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/sessionrecording"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/recordings"
)

// replica is what a replica does with recordings: it sends those of its directory to the
// storage, and shows those of both on a page. TestStorage_ReplicasShareOneList has all of
// it in Caddy.
type replica struct {
	dir     string
	storage recordings.Storage
	page    *page.Site
}

func startReplica(t *testing.T, s *Server) *replica {
	t.Helper()
	r := &replica{dir: t.TempDir(), page: page.NewSite("/recordings", []string{"auditors"}, nil, zap.NewNop())}
	r.storage = provision(t, options(s))
	var release func()
	r.page.Index, release = new(page.Indexes).Use(r.dir, recstore.Union(recstore.Dir(r.dir), recstore.Storage(r.storage)), zap.NewNop())
	t.Cleanup(release)
	return r
}

// send sends what is in the directory, as a replica does that was started again.
func (r *replica) send(t *testing.T) {
	t.Helper()
	send(t, new(sessionrecording.Dirs), new(outbox.Outboxes), r.dir, outbox.Settings{Storage: r.storage, Remove: true})
}

// record writes a recording whose session has just begun and ended.
func (r *replica) record(t *testing.T, text string) (id string) {
	t.Helper()
	id = time.Now().UTC().Format("20060102T150405Z") + "-" + (text + strings.Repeat("a", 26))[:26]
	header, err := json.Marshal(map[string]any{"version": 2, "width": 80, "height": 24, "timestamp": time.Now().Unix(), "srcNodeUser": "alice@example.com"})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(r.dir, id+recordings.Ext)
	content := fmt.Sprintf("%s\n[0.1, \"o\", \"%s\\r\\n\"]\n", header, text)
	if err := errors.Join(os.WriteFile(path+".new", []byte(content), 0o600), os.Rename(path+".new", path)); err != nil {
		t.Fatal(err)
	}
	return id
}

// get returns an answer of the page.
func (r *replica) get(t *testing.T, path string) (status int, body string) {
	t.Helper()
	w := httptest.NewRecorder()
	caller := authn.Caller{
		Identity: &impersonate.Identity{User: "dora@example.com", Groups: []string{"auditors"}},
		Conn:     &tailnet.Conn{Remote: netip.MustParseAddrPort("100.64.0.5:51820")},
	}
	err := r.page.Serve(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/recordings"+path, nil), caller, "")
	if refusal, refused := apistatus.From(err); refused {
		return int(refusal.Code), refusal.Message
	}
	if err != nil {
		t.Fatal(err)
	}
	return w.Code, w.Body.String()
}

// waitFor waits until the list has all of want.
func (r *replica) waitFor(t *testing.T, query string, want ...string) {
	t.Helper()
	wait(t, time.Minute, fmt.Sprintf("the list of %q lacks some of %q", query, want), func() bool {
		_, body := r.get(t, query)
		for _, text := range want {
			if !strings.Contains(body, text) {
				return false
			}
		}
		return true
	})
}

// Two replicas with a bucket show one list, and play what either has recorded, while the
// server is killed and started again.
func TestS3_ReplicasShareOneList(t *testing.T) {
	s := start(t)
	one, two := startReplica(t, s), startReplica(t, s)
	a := one.record(t, "apple")
	content, err := os.ReadFile(filepath.Join(one.dir, a+recordings.Ext))
	if err != nil {
		t.Fatal(err)
	}
	one.waitFor(t, "", a)
	one.send(t)
	wait(t, time.Minute, "the recording is not stored", isEmpty(t, one.dir))
	for name, r := range map[string]*replica{"one": one, "two": two} {
		r.waitFor(t, "?text=APPLE", a, "alice@example.com")
		if status, got := r.get(t, "/"+a+".cast"); status != http.StatusOK || got != string(content) {
			t.Errorf("replica %s: got %d, %q; want what was recorded", name, status, got)
		}
		if status, got := r.get(t, "/"+a+".txt"); status != http.StatusOK || got != "apple\n" {
			t.Errorf("replica %s: got %d, the text %q", name, status, got)
		}
		if status, got := r.get(t, "/"+a+"/play"); status != http.StatusOK || !strings.Contains(got, "apple") || !strings.Contains(got, `{"end":`) {
			t.Errorf("replica %s: got %d, played as %s", name, status, got)
		}
	}

	// Without the server, each replica has what it knows and what it records.
	s.Kill()
	b := two.record(t, "banana")
	two.send(t)
	two.waitFor(t, "", a, b, "The storage of the recordings does not answer.")
	if status, got := two.get(t, "/"+b+"/play"); status != http.StatusOK || !strings.Contains(got, "banana") {
		t.Errorf("what is recorded here: got %d, played as %s", status, got)
	}
	for _, path := range []string{"", ".cast", ".txt", "/play"} {
		if status, got := two.get(t, "/"+a+path); status != http.StatusServiceUnavailable || strings.Contains(got, s.URL) {
			t.Errorf("what is in the storage, %q: got %d, %s; want 503, and no address", path, status, got)
		}
	}
	if left(t, two.dir) != 1 {
		t.Errorf("the replica has %d recordings; want the one that waits", left(t, two.dir))
	}

	if err := s.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	wait(t, 2*time.Minute, "the recording is not stored", isEmpty(t, two.dir)) // more than the longest pause
	one.waitFor(t, "?text=banana", b)
	wait(t, time.Minute, "the list says that the storage does not answer", func() bool {
		_, list := one.get(t, "")
		return !strings.Contains(list, "does not answer") && strings.Contains(list, a) && strings.Contains(list, b)
	})
}
