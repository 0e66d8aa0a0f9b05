// SPDX-License-Identifier: Apache-2.0

package recordings

import (
	"bytes"
	"context"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/authn"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// A browser plays a recording in the page's sandbox. It sends the token with the request for
// the recording itself, and not in its URL.
func TestPage_PlaysInBrowser(t *testing.T) {
	browser := ""
	for _, name := range []string{"chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"} {
		if path, err := exec.LookPath(name); err == nil {
			browser = path
		}
	}
	if browser == "" {
		t.Skip("Chromium is not installed; run apt-get install chromium-headless-shell")
	}
	dir := t.TempDir()
	id := put(t, dir, 1, header+printed(0.5, "played to \x1b[31malice"))
	x, release := startIndex(t, dir)
	defer release()
	s := NewSite("/recordings", nil, nil, zap.NewNop())
	s.Index = x
	reader := netip.MustParseAddrPort("100.64.0.1:1")
	var mu sync.Mutex
	var sent []string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r = r.WithContext(tailnet.WithConn(r.Context(), reader, netip.MustParseAddr("100.64.0.2")))
		if r.URL.Path != "/recordings/"+id {
			mu.Lock()
			sent = append(sent, r.Method+" "+r.URL.String()+" from "+r.Header.Get("Origin"))
			mu.Unlock()
			if !s.IsFromPage(r) {
				http.Error(w, "there is no token", http.StatusForbidden)
				return
			}
		}
		caller := authn.Caller{Identity: &impersonate.Identity{User: "alice@example.com"}, Conn: tailnet.AnyConnFrom(r.Context())}
		if err := s.Serve(w, r, caller, ""); err != nil {
			t.Errorf("%s: %v", r.URL, err)
		}
	}))
	defer server.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--user-data-dir="+t.TempDir(),
		"--disable-background-networking", "--no-first-run", "--virtual-time-budget=5000", "--dump-dom", server.URL+"/recordings/"+id+"?text=played") // from where that appeared
	var out, log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &log
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v\n%s", err, &log)
	}
	if strings.Contains(log.String(), "CONSOLE") {
		t.Errorf("the browser's console says:\n%s", &log)
	}
	_, screen, _ := strings.Cut(out.String(), `<div id="screen"`)
	screen, _, _ = strings.Cut(screen, `<div id="bar">`)
	if !strings.Contains(screen, "<div>played to <") || !strings.Contains(screen, ">alice</span>") {
		t.Errorf("the player shows\n%s", screen)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(sent) != 1 || sent[0] != "GET /recordings/"+id+"/play?at=0.500 from null" {
		t.Errorf("the page has sent %q", sent)
	}
}
