// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// waitUntil waits until what holds. After failures, a storage is tried again within a minute.
func waitUntil(t *testing.T, message string, what func() bool) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !what(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal(message)
		}
	}
}

// waitForFile waits until a file is there.
func waitForFile(t *testing.T, path string) {
	t.Helper()
	waitUntil(t, "there is no "+path, func() bool {
		_, err := os.Stat(path)
		return err == nil
	})
}

// A session goes into the directory while it lasts, and to the storage when it is over.
func TestStorage_GetsSession(t *testing.T) {
	for _, remove := range []string{"", "record_remove_stored"} {
		t.Run(remove, func(t *testing.T) {
			dir, archive := t.TempDir(), t.TempDir()
			s := startRecordingSite(t, proxytest.NewPods(t), dir, proxytest.AliceNode(), "record_to directory "+archive, remove)
			since := proxytest.CountsSince(t, "recordings_stored_total")
			sh, resp := proxytest.OpenWebSocket(t, s, proxytest.ExecTarget)
			if sh == nil {
				t.Fatalf("got %s", resp.Status)
			}
			sh.Hear(t, "hello ")
			name := filepath.Base(onlyFile(t, dir, ".cast.partial"))
			name = strings.TrimSuffix(name, ".partial")
			sh.Leave()
			proxytest.WaitForCounts(t, since, map[string]float64{"recordings_stored_total stored": 1})
			b, err := os.ReadFile(filepath.Join(archive, name))
			if err != nil {
				t.Fatal(err)
			}
			if header, events := proxytest.ParseCast(t, b); header.SrcNodeUser == "" || len(events) == 0 {
				t.Errorf("the recording is %s", b)
			}
			_, err = os.Stat(filepath.Join(dir, name))
			if kept := err == nil; kept != (remove == "") {
				t.Errorf("the directory has its own: %v", kept)
			}
		})
	}
}

// While the storage is away, sessions that have to be recorded begin for as long as the
// config says, and nothing is deleted that is not stored. When the storage is back, it gets
// all.
func TestStorage_Away(t *testing.T) {
	dir, archive := t.TempDir(), filepath.Join(t.TempDir(), "archive")
	old := "20261128T093000Z-4jkq2rxcvb7mzhn5tw3dlfg6ye.cast"
	proxytest.WriteFile(t, filepath.Join(dir, old), "{}\n")
	at := time.Now().Add(-2 * time.Hour)
	if err := os.Chtimes(filepath.Join(dir, old), at, at); err != nil {
		t.Fatal(err)
	}
	since := proxytest.CountsSince(t, "recordings_stored_total")
	s := startRecordingSite(t, proxytest.NewPods(t), dir, proxytest.AliceNode(),
		"record_to directory "+archive, "record_required", "record_retention 1h", "record_store_within 1h")
	waitUntil(t, "nothing is tried", func() bool { return since()["recordings_stored_total failed"] > 0 })
	sh, resp := proxytest.OpenWebSocket(t, s, proxytest.ExecTarget)
	if sh != nil {
		t.Fatal("the session begins")
	}
	if body, _ := io.ReadAll(resp.Body); !strings.Contains(string(body), "the recordings of the proxy have not been stored within record_store_within") {
		t.Errorf("got %s: %s", resp.Status, body)
	}
	if _, err := os.Stat(filepath.Join(dir, old)); err != nil {
		t.Errorf("what waits was deleted: %v", err)
	}
	if err := os.Mkdir(archive, 0o700); err != nil {
		t.Fatal(err)
	}
	waitForFile(t, filepath.Join(archive, old))
	waitUntil(t, "no session begins once all is stored", func() bool {
		sh, _ = proxytest.OpenWebSocket(t, s, proxytest.ExecTarget)
		return sh != nil
	})
	sh.Leave()
}

// notStorage is a module in the namespace of storages that is none.
type notStorage struct{}

// CaddyModule returns the Caddy module information.
func (notStorage) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "tailscale_impersonate.recordings.not_a_storage", New: func() caddy.Module { return new(notStorage) }}
}

// UnmarshalCaddyfile implements [caddyfile.Unmarshaler].
func (*notStorage) UnmarshalCaddyfile(*caddyfile.Dispenser) error { return nil }

func init() { caddy.RegisterModule(notStorage{}) }

// What cannot work is an error of the config.
func TestStorage_InvalidConfigs(t *testing.T) {
	t.Setenv("STORAGE_TEST_X", "/x")
	for _, tt := range []struct{ name, text, want string }{
		{
			"two storages for a directory",
			":1 {\nhandle /a* {\ntailscale_impersonate {\nrecord /r\nrecord_to directory /x\n}\n}\nhandle {\ntailscale_impersonate {\nrecord /r\nrecord_to directory /y\n}\n}\n}",
			"use one storage for a directory, or two directories",
		},
		{
			"removed for one site, and kept for another",
			":1 {\nhandle /a* {\ntailscale_impersonate {\nrecord /r\nrecord_to directory /x\n}\n}\nhandle {\ntailscale_impersonate {\nrecord /r\nrecord_to directory /x\nrecord_remove_stored\n}\n}\n}",
			"differs in options of record_to or in record_remove_stored",
		},
		{
			"other options of a storage",
			":1 {\nhandle /a* {\ntailscale_impersonate {\nrecord /r\nrecord_to directory /x\n}\n}\nhandle {\ntailscale_impersonate {\nrecord /r\nrecord_to directory {env.STORAGE_TEST_X}\n}\n}\n}",
			"differs in options of record_to",
		},
		{"a path that is relative", ":1 {\ntailscale_impersonate {\nrecord /r\nrecord_to directory x\n}\n}", `path "x": must be an absolute path`},
		{"a module that is no storage", ":1 {\ntailscale_impersonate {\nrecord /r\nrecord_to not_a_storage\n}\n}", "is not a storage of recordings"},
		{"two handlers with one storage", ":1 {\nhandle /a* {\ntailscale_impersonate {\nrecord /r\nrecord_to directory /x\n}\n}\nhandle {\ntailscale_impersonate {\nrecord /r\nrecord_to directory /x\n}\n}\n}", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			adapter := caddyfile.Adapter{ServerType: httpcaddyfile.ServerType{}}
			config, _, err := adapter.Adapt([]byte("{\nadmin off\npersist_config off\nauto_https off\nstorage file_system "+t.TempDir()+"\nlog {\noutput discard\n}\n}\n"+tt.text), nil)
			if err == nil {
				var parsed caddy.Config
				if err = caddy.StrictUnmarshalJSON(config, &parsed); err == nil {
					err = caddy.Validate(&parsed)
				}
			}
			if tt.want == "" {
				if err != nil {
					t.Errorf("got %v; want none", err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v; want %s", err, tt.want)
			}
		})
	}
}

// Two handlers share a directory, and one names the storage: both pages list what is there,
// whichever starts last.
func TestStorage_OfDirectoryIsForAllHandlers(t *testing.T) {
	const name = "20261128T093000Z-4jkq2rxcvb7mzhn5tw3dlfg6ye"
	for _, first := range []bool{true, false} {
		dir, archive := t.TempDir(), t.TempDir()
		proxytest.WriteFile(t, filepath.Join(archive, name+".cast"), "{}\n")
		options := map[bool]string{true: "record_to directory " + archive}
		handler := func(stores bool) string {
			return "tailscale_impersonate {\nrecord " + dir + "\n" + options[stores] + "\n" + showing + "\n}\nreverse_proxy https://$UPSTREAM {\n$HTTP\n}"
		}
		s := proxytest.Config{
			API: proxytest.NewPods(t), Nodes: []*tailnet.Node{newReader().Node},
			Body: "handle_path /two/* {\n" + handler(first) + "\n}\nhandle {\n" + handler(!first) + "\n}",
		}.Start(t)
		for _, at := range []string{"", "/two"} {
			waitUntil(t, at+"/recordings does not list what is in the storage", func() bool {
				return strings.Contains(body(t, s.Get(t, at+"/recordings", ""), http.StatusOK), at+"/recordings/"+name)
			})
		}
	}
}

// Two replicas, with a directory each, list and play what either has recorded, from the
// storage that they share.
func TestStorage_ReplicasShareOneList(t *testing.T) {
	one, two, archive := t.TempDir(), t.TempDir(), t.TempDir()
	replica := func(dir string) string {
		return "tailscale_impersonate {\nrecord " + dir + "\nrecord_to directory " + archive + "\nrecord_remove_stored\n" + showing + "\n}\nreverse_proxy https://$UPSTREAM {\n$HTTP\n}"
	}
	s := proxytest.Config{
		API: proxytest.NewPods(t), Nodes: []*tailnet.Node{newReader().Node},
		Body: "handle_path /two/* {\n" + replica(two) + "\n}\nhandle {\n" + replica(one) + "\n}",
	}.Start(t)
	since := proxytest.CountsSince(t, "recordings_stored_total")
	sh := proxytest.MustOpenWebSocket(t, s)
	sh.Hear(t, "hello ")
	sh.Leave()
	proxytest.WaitForCounts(t, since, map[string]float64{"recordings_stored_total stored": 1})
	stored, err := filepath.Glob(filepath.Join(archive, "*.cast"))
	if err != nil || len(stored) != 1 {
		t.Fatalf("the storage has %q, %v", stored, err)
	}
	id := strings.TrimSuffix(filepath.Base(stored[0]), ".cast")
	file, err := os.ReadFile(stored[0])
	if err != nil {
		t.Fatal(err)
	}
	for _, at := range []string{"", "/two"} {
		waitUntil(t, at+"/recordings does not list the session", func() bool {
			return strings.Contains(body(t, s.Get(t, at+"/recordings?text=HELLO", ""), http.StatusOK), at+"/recordings/"+id)
		})
		if got := body(t, s.Get(t, at+"/recordings/"+id+".cast", ""), http.StatusOK); got != string(file) {
			t.Errorf("%s/recordings has %q; want what is in the storage", at, got)
		}
		if got := body(t, s.Get(t, at+"/recordings/"+id+"/play", ""), http.StatusOK); !strings.Contains(got, "hello") || !strings.Contains(got, `{"end":`) {
			t.Errorf("%s/recordings plays\n%s", at, got)
		}
	}
	if left, err := filepath.Glob(filepath.Join(two, "*.cast*")); err != nil || len(left) > 0 {
		t.Errorf("the other replica has %q, %v", left, err)
	}
}
