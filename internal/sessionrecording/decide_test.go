// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"go.uber.org/zap"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
)

func TestWhatIsASession(t *testing.T) {
	const pod = "/api/v1/namespaces/default/pods/web"
	for _, tt := range []struct {
		method, target string
		upgrade        bool
		want           decision
	}{
		{"GET", pod + "/exec?command=sh", true, decision{exec, "default", "web", ""}},
		{"POST", pod + "/exec", false, decision{exec, "default", "web", ""}},
		{"GET", pod + "/attach", true, decision{attach, "default", "web", ""}},
		{"GET", pod + "/portforward", true, decision{forward, "default", "web", ""}},

		// What leads to a shell in another way.
		{"POST", pod + "/ephemeralcontainers", false, decision{door, "default", "web", ""}},
		{"DELETE", pod + "/ephemeralcontainers", false, decision{door, "default", "web", ""}},
		{"GET", pod + "/proxy/", false, decision{door, "default", "web", ""}},
		{"GET", "/api/v1/namespaces/default/services/s/proxy/", false, decision{door, "default", "s", ""}},
		{"POST", "/api/v1/nodes/n/proxy/run/default/web/main", false, decision{door, "", "n", ""}},
		{"GET", "/api/v1/namespaces/default/services/s/exec", true, decision{door, "default", "s", ""}},
		{"GET", "/apis/example.com/v1/namespaces/default/pods/web/exec", true, decision{door, "default", "web", ""}},
		{"GET", "/shell", true, decision{kind: door}},
		{"GET", "/api/v1/namespaces/default/pods/web%2Fexec", true, decision{ambiguous, "default", "web/exec", ""}},

		{"PATCH", pod + "/ephemeralcontainers", false, decision{kind: ordinary}},
		{"PUT", pod + "/ephemeralcontainers", false, decision{kind: ordinary}},
		{"GET", pod + "/ephemeralcontainers", false, decision{kind: ordinary}},
		{"GET", pod + "/log?follow=true", false, decision{kind: ordinary}},
		{"GET", "/version", false, decision{kind: ordinary}},
	} {
		r := httptest.NewRequestWithContext(t.Context(), tt.method, tt.target, nil)
		if tt.upgrade {
			r.Header.Set("Connection", "Upgrade")
			r.Header.Set("Upgrade", "websocket")
		}
		got := decide(r)
		if got.kind != ordinary && got.query != r.URL.RawQuery {
			t.Errorf("%s %s: got the query %q", tt.method, tt.target, got.query)
		}
		got.query = ""
		if got.kind == ambiguous {
			got.namespace, got.name = tt.want.namespace, tt.want.name // of which nothing is said
		}
		if got != tt.want {
			t.Errorf("%s %s: got %+v; want %+v", tt.method, tt.target, got, tt.want)
		}
	}
}

// For whom it is enforced, nothing leads past the recording.
func TestWhatCannotBeRecordedIsRefused(t *testing.T) {
	with := func(r *http.Request, headers ...string) *http.Request {
		for i := 0; i < len(headers); i += 2 {
			r.Header[headers[i]] = strings.Fields(headers[i+1])
		}
		return r
	}
	request := func(method, target string) *http.Request {
		return httptest.NewRequestWithContext(t.Context(), method, target, nil)
	}
	for _, tt := range []struct {
		name    string
		r       *http.Request
		enforce bool
		code    int32
	}{
		{"as it is to be", execRequest(t), false, 0},
		{"another way to a shell", request("POST", "/api/v1/namespaces/default/pods/web/ephemeralcontainers"), true, http.StatusForbidden},
		{"another way to a shell, if recording is not enforced", request("POST", "/api/v1/namespaces/default/pods/web/ephemeralcontainers"), false, 0},
		{"a path that might be anything", request("GET", "/api/v1/namespaces/default/pods/web%2Fexec"), false, http.StatusBadRequest},
		{"without its recorder", execRequest(t), true, http.StatusForbidden},
		{"no upgrade", request("POST", "/api/v1/namespaces/default/pods/web/exec"), false, http.StatusBadRequest},
		{"nothing to upgrade to", with(execRequest(t), "Upgrade", ""), false, http.StatusBadRequest},
		{"an upgrade that is not asked for", with(execRequest(t), "Connection", "keep-alive"), false, http.StatusBadRequest},
		{"two upgrades", with(execRequest(t), "Upgrade", "websocket SPDY/3.1"), false, http.StatusBadRequest},
		{"another upgrade, in another spelling", with(execRequest(t), "UPGRADE", "SPDY/3.1"), false, http.StatusBadRequest},
		{"another protocol", with(execRequest(t), "Upgrade", "h2c"), false, http.StatusBadRequest},
		{"no subprotocol", with(execRequest(t), "Sec-Websocket-Protocol", ""), false, http.StatusBadRequest},
		{"an unknown subprotocol besides", with(execRequest(t), "Sec-Websocket-Protocol", "v5.channel.k8s.io v9.channel.k8s.io"), false, http.StatusBadRequest},
	} {
		t.Run(tt.name, func(t *testing.T) {
			site := &Site{Dir: t.TempDir(), Logger: zap.NewNop(), Count: func(Outcome) {}}
			_, s, refused := site.Begin(tt.r, caller(impersonate.Recording{Enforce: tt.enforce}, nobody))
			if s != nil {
				s.Close()
			}
			code := int32(0)
			if refused != nil {
				code = refused.ErrStatus.Code
			}
			if code != tt.code {
				t.Errorf("got %d (%v); want %d", code, refused, tt.code)
			}
		})
	}
}

// What the API server is not offered it does not use.
func TestNoExtensionsAreOffered(t *testing.T) {
	r := execRequest(t)
	r.Header["Sec-Websocket-Extensions"] = []string{"permessage-deflate"}
	r.Header["sec-websocket-extensions"] = []string{"permessage-deflate"}
	site := &Site{Dir: t.TempDir(), Logger: zap.NewNop(), Count: func(Outcome) {}}
	r, s, refused := site.Begin(r, caller(impersonate.Recording{}, nobody))
	if refused != nil {
		t.Fatal(refused)
	}
	defer s.Close()
	if offered := field(r.Header, "Sec-Websocket-Extensions"); len(offered) > 0 {
		t.Errorf("the API server is offered %q; want nothing", offered)
	}
}

// What was decided about one request does not count for another.
func mustParse(t *testing.T, s string) *url.URL {
	t.Helper()
	u, err := url.Parse(s)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func TestARequestThatChangesIsNotConfirmed(t *testing.T) {
	for _, tt := range []struct{ name, from, to string }{
		{"it stays as it is", "/pods/web/exec", "/pods/web/exec"},
		{"another pod", "/pods/web/exec", "/pods/db/exec"},
		{"no session before", "/pods/web/log", "/pods/web/exec"},
		{"a session before", "/pods/web/exec", "/pods/web/log"},
		{"another kind", "/pods/web/exec", "/pods/web/portforward"},
		{"another way to a shell", "/pods/web/log", "/pods/web/proxy"},
		{"another command", "/pods/web/exec?command=date", "/pods/web/exec?command=sh"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			const namespace = "/api/v1/namespaces/default"
			r := execRequest(t)
			r.URL = mustParse(t, namespace+tt.from)
			site := &Site{Dir: t.TempDir(), Logger: zap.NewNop(), Count: func(Outcome) {}}
			r, s, refused := site.Begin(r, caller(impersonate.Recording{}, nobody))
			if refused != nil {
				t.Fatal(refused)
			}
			if s != nil {
				defer s.Close()
			}
			r.URL = mustParse(t, namespace+tt.to)
			if got := Confirm(r); (got == nil) != (tt.from == tt.to) {
				t.Errorf("got %v; want a refusal: %v", got, tt.from != tt.to)
			}
		})
	}
}

// What the API server has chosen has to be what was asked for and offered, or its
// frames are read in another way than they are written.
func TestWhatWasNotOfferedIsNotSpoken(t *testing.T) {
	const v4, v5 = "v4.channel.k8s.io", "v5.channel.k8s.io"
	for _, tt := range []struct {
		name    string
		upgrade string
		h       http.Header
		mention string // in the error, if it is to be one
	}{
		{"SPDY", spdyUpgrade, http.Header{"Upgrade": {"SPDY/3.1"}, "X-Stream-Protocol-Version": {v4}}, ""},
		{"SPDY, first version", spdyUpgrade, http.Header{"Upgrade": {"SPDY/3.1"}}, ""},
		{"SPDY, unknown version", spdyUpgrade, http.Header{"Upgrade": {"SPDY/3.1"}, "X-Stream-Protocol-Version": {"v9.channel.k8s.io"}}, "v9"},
		{"SPDY was not asked for", websocketUpgrade, http.Header{"Upgrade": {"SPDY/3.1"}, "Sec-Websocket-Protocol": {v5}}, "SPDY"},
		{"WebSocket was not asked for", spdyUpgrade, http.Header{"Upgrade": {"websocket"}}, "websocket"},
		{"WebSocket", websocketUpgrade, http.Header{"Upgrade": {"websocket"}, "Sec-WebSocket-Protocol": {v5}}, ""},
		{"WebSocket and more", websocketUpgrade, http.Header{"Upgrade": {"websocket", "SPDY/3.1"}, "Sec-WebSocket-Protocol": {v5}}, "SPDY"},
		{"nothing", websocketUpgrade, http.Header{"Sec-WebSocket-Protocol": {v5}}, "switched to"},
		{"WebSocket, without a version", websocketUpgrade, http.Header{"Upgrade": {"websocket"}}, "cannot be recorded"},
		{"WebSocket, unknown version", websocketUpgrade, http.Header{"Upgrade": {"websocket"}, "Sec-Websocket-Protocol": {"v9.channel.k8s.io"}}, "v9"},
		{"WebSocket, two versions", websocketUpgrade, http.Header{"Upgrade": {"websocket"}, "Sec-Websocket-Protocol": {v4, v5}}, "cannot be recorded"},
		{"WebSocket, extensions", websocketUpgrade, http.Header{"Upgrade": {"websocket"}, "Sec-WebSocket-Protocol": {v5}, "Sec-WebSocket-Extensions": {"permessage-deflate"}}, "extensions"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := &Session{kind: exec, upgrade: tt.upgrade}
			w := httptest.NewRecorder()
			for name, values := range tt.h {
				w.Header()[name] = values
			}
			if tt.mention == "" {
				if _, err := s.protocol(w.Header()); err != nil {
					t.Error(err)
				}
				return
			}
			if _, err := s.protocol(w.Header()); err == nil || !strings.Contains(err.Error(), tt.mention) {
				t.Errorf("got error %v; want one that mentions %q", err, tt.mention)
			}
			if _, _, err := s.Wrap(w).(http.Hijacker).Hijack(); err == nil || s.reason == nil {
				t.Errorf("taking over the connection: got %v, and %v as the reason to end; want errors", err, s.reason)
			}
		})
	}
}

// There are messages that close a channel in the newest version only.
func TestOnlyTheNewestVersionClosesChannels(t *testing.T) {
	for version, closes := range map[string]bool{"v4.channel.k8s.io": false, "v5.channel.k8s.io": true} {
		s := &Session{kind: exec, upgrade: websocketUpgrade}
		p, err := s.protocol(http.Header{"Upgrade": {"websocket"}, "Sec-Websocket-Protocol": {version}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.fromClient([]byte(wsClient("\xff\x00"))); (err == nil) != closes {
			t.Errorf("%s: got error %v; want one: %v", version, err, !closes)
		}
	}
}
