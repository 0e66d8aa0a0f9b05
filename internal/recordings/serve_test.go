// SPDX-License-Identifier: Apache-2.0

package recordings

import (
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/authn"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recstore"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// onWrite is an answer that tells when it is written.
type onWrite struct {
	http.ResponseWriter
	wrote func()
}

func (w onWrite) Write(p []byte) (int, error) {
	w.wrote()
	return w.ResponseWriter.Write(p)
}

// A reader who does not read the list keeps nobody else from searching.
func TestSite_ListIsWrittenWithoutTurn(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, 1, session("alice@example.com", "default", "web", "text"))
	x, release := startIndex(t, dir)
	defer release()
	s := NewSite("/recordings", nil, nil, zap.NewNop())
	s.Index = x
	working := -1
	w := onWrite{httptest.NewRecorder(), func() { working = len(s.working) }}
	r := request{httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/recordings?text=text", nil), authn.Caller{}, "/recordings"}
	if err := s.serveList(w, r); err != nil || working != 0 {
		t.Errorf("got %v, and %d turns are taken", err, working)
	}
}

// The text of a recording that is not in the index counts as what its terminal needs.
func TestSite_TextCountsItsScreen(t *testing.T) {
	dir := t.TempDir()
	content := header + printed(1, "text\r\n")
	id := testID(1)
	for _, tt := range []struct {
		name, more string
		least      int64
	}{
		{"small", "", memoryOf(20, 4)},
		{"resized", `[2.0, "r", "300x100"]` + "\n", memoryOf(300, 100)},
	} {
		if err := os.WriteFile(filepath.Join(dir, id+".cast.partial"), []byte(content+tt.more), 0o600); err != nil {
			t.Fatal(err)
		}
		s := NewSite("/recordings", nil, nil, zap.NewNop())
		s.Index = NewIndex(recstore.Dir(dir), dir, zap.NewNop())
		r := request{httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/recordings/"+id+".txt", nil), authn.Caller{}, "/recordings"}
		held := holding{ctx: t.Context()}
		lines, err := s.lines(r, id, &held)
		if err != nil || len(lines) != 1 || lines[0].text != "text" {
			t.Fatalf("%s: got %v, %v", tt.name, lines, err)
		}
		if held.bytes < transcriptMemory+tt.least || held.bytes > transcriptMemory+tt.least+1<<20 {
			t.Errorf("%s: counts %d bytes, with a screen of %d", tt.name, held.bytes, tt.least)
		}
	}
}

// A token has an end, and lasts over a reload, which makes a new site.
func TestSite_TokensEnd(t *testing.T) {
	const addr = "100.64.0.1"
	ctx := tailnet.WithConn(t.Context(), netip.MustParseAddrPort(addr+":1"), netip.MustParseAddr("100.64.0.2"))
	newSite := func() *Site { return NewSite("/recordings", nil, nil, zap.NewNop()) }
	for ends, want := range map[time.Duration]bool{time.Hour: true, -time.Minute: false} {
		r := httptest.NewRequestWithContext(ctx, http.MethodGet, "/recordings/"+testID(1)+"/play", nil)
		r.Header.Set("Accept", "application/x-ndjson;token="+newSite().token(addr, testID(1), time.Now().Add(ends).Unix()))
		if got := newSite().IsFromPage(r); got != want {
			t.Errorf("a token that ends in %v is taken: %v", ends, got)
		}
	}
}
