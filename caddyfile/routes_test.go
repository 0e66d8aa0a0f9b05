// SPDX-License-Identifier: Apache-2.0

package caddyfile_test

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddytls"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/caddyfile"
)

// serverWith returns a server with a route of these handlers, in JSON.
func serverWith(t *testing.T, handlers string) *caddyhttp.Server {
	t.Helper()
	var raw []json.RawMessage
	if err := json.Unmarshal([]byte(handlers), &raw); err != nil {
		t.Fatal(err)
	}
	return &caddyhttp.Server{Routes: caddyhttp.RouteList{{HandlersRaw: raw}}}
}

func TestCheckRoutes_WarnsOfBuffers(t *testing.T) {
	const ours, proxy = `{"handler":"tailscale_impersonate"}`, `{"handler":"reverse_proxy"}`
	for _, tt := range []struct{ name, handlers, want string }{
		{"no buffer", `[` + ours + `,` + proxy + `]`, ""},
		{"encode", `[` + ours + `,{"handler":"encode"},` + proxy + `]`, "encode"},
		{"encode around a subroute", `[{"handler":"encode"},{"handler":"subroute","routes":[{"handle":[` + ours + `,` + proxy + `]}]}]`, "encode"},
		{"encode twice", `[{"handler":"encode"},` + ours + `,{"handler":"reverse_proxy","response_buffers":1024},{"handler":"encode"}]`, "encode, response_buffers of reverse_proxy"},
		{"response buffers", `[` + ours + `,{"handler":"reverse_proxy","response_buffers":1024}]`, "response_buffers of reverse_proxy"},
		{"request buffers", `[` + ours + `,{"handler":"subroute","routes":[{"handle":[{"handler":"reverse_proxy","request_buffers":-1}]}]}]`, "request_buffers of reverse_proxy"},
		{"encode in a route without the handler", `[{"handler":"encode"},` + proxy + `]`, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			core, logs := observer.New(zap.WarnLevel)
			if err := new(caddyfile.Config).CheckRoutes(zap.New(core), serverWith(t, tt.handlers)); err != nil {
				t.Fatal(err)
			}
			var causes []string
			for _, entry := range logs.FilterMessageSnippet("buffers").All() {
				for _, cause := range entry.ContextMap()["because_of"].([]any) {
					causes = append(causes, cause.(string))
				}
			}
			if got := strings.Join(causes, ", "); got != tt.want || (got == "") != (logs.FilterMessageSnippet("buffers").Len() == 0) {
				t.Errorf("warned because of %q; want %q", got, tt.want)
			}
		})
	}
}

func TestCheckRoutes_WarnsOfTailscaleAuth(t *testing.T) {
	const (
		ours = `{"handler":"tailscale_impersonate"}`
		auth = `{"handler":"authentication","providers":{"tailscale":{}}}` // as caddy-tailscale adapts tailscale_auth
	)
	for _, tt := range []struct {
		name, handlers string
		want           int
	}{
		{"none", `[` + ours + `]`, 0},
		{"in front", `[` + auth + `,` + ours + `]`, 1},
		{"around a subroute", `[` + auth + `,{"handler":"subroute","routes":[{"handle":[` + ours + `]}]}]`, 1},
		{"in front of another provider", `[` + auth + `,{"handler":"authentication","providers":{"http_basic":{}}},` + ours + `]`, 1},
		{"in a route without the handler", `[` + auth + `]`, 0},
		{"another provider", `[{"handler":"authentication","providers":{"http_basic":{}}},` + ours + `]`, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			core, logs := observer.New(zap.WarnLevel)
			if err := new(caddyfile.Config).CheckRoutes(zap.New(core), serverWith(t, tt.handlers)); err != nil {
				t.Fatal(err)
			}
			if got := logs.FilterMessageSnippet("tailscale_auth").Len(); got != tt.want {
				t.Errorf("got %d warnings; want %d", got, tt.want)
			}
		})
	}
}

func TestCheckRoutes_WarnsOfHTTP3(t *testing.T) {
	withTLS := caddytls.ConnectionPolicies{{}}
	for _, tt := range []struct {
		name   string
		server *caddyhttp.Server
		want   []string
	}{
		{"tailnet", &caddyhttp.Server{Listen: []string{"tailscale/k8s:443"}, Protocols: []string{"h1", "h2", "h3"}, TLSConnPolicies: withTLS}, []string{"tailscale/k8s:443"}},
		{"restricted", &caddyhttp.Server{Listen: []string{"tailscale/k8s:443"}, Protocols: []string{"h1", "h2"}, TLSConnPolicies: withTLS}, nil},
		{"without TLS", &caddyhttp.Server{Listen: []string{"tailscale/k8s:80"}, Protocols: []string{"h1", "h2", "h3"}}, nil},
		{"host", &caddyhttp.Server{Listen: []string{":443"}, Protocols: []string{"h1", "h2", "h3"}, TLSConnPolicies: withTLS}, nil},
		{"by listener", &caddyhttp.Server{
			Listen: []string{"tailscale/a:443", "tailscale/b:443", "tailscale/c:443"}, ListenProtocols: [][]string{{"h1"}, nil, {"h3"}}, Protocols: []string{"h1"}, TLSConnPolicies: withTLS,
		}, []string{"tailscale/c:443"}},
		{"by listener, which has none of its own", &caddyhttp.Server{
			Listen: []string{"tailscale/a:443", "tailscale/b:443"}, ListenProtocols: [][]string{{"h1"}, nil}, Protocols: []string{"h3"}, TLSConnPolicies: withTLS,
		}, []string{"tailscale/b:443"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			core, logs := observer.New(zap.WarnLevel)
			if err := new(caddyfile.Config).CheckRoutes(zap.New(core), tt.server); err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, entry := range logs.All() {
				got = append(got, entry.ContextMap()["listen"].(string))
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("listeners warned about (-want +got):\n%s", diff)
			}
		})
	}
}

func TestCheckRoutes_AuthorizeNeedsTransportKubernetes(t *testing.T) {
	const (
		authorizes = `{"handler":"tailscale_impersonate","client_impersonation":"authorize"}`
		rejects    = `{"handler":"tailscale_impersonate"}`
		plain      = `{"handler":"reverse_proxy","transport":{"protocol":"http"}}`
		kubernetes = `{"handler":"reverse_proxy","transport":{"protocol":"kubernetes"}}`
		invoke     = `{"handler":"invoke","name":"elsewhere"}`
	)
	for _, tt := range []struct {
		name, handlers string
		ok             bool
	}{
		{"default transport", `[` + authorizes + `,{"handler":"reverse_proxy"}]`, false},
		{"transport http", `[` + authorizes + `,` + plain + `]`, false},
		{"transport http in a subroute", `[` + authorizes + `,{"handler":"subroute","routes":[{"handle":[` + plain + `]}]}]`, false},
		{"transport http, and another handler behind the first", `[` + authorizes + `,` + rejects + `,` + plain + `]`, false},
		{"transport http, in a route of another handler", `[` + rejects + `,` + plain + `]`, true},
		{"transport kubernetes", `[` + authorizes + `,` + kubernetes + `]`, true},
		{"transport kubernetes beside another", `[` + authorizes + `,` + kubernetes + `,` + plain + `]`, true},
		{"transport http and an invoked route", `[` + authorizes + `,` + plain + `,` + invoke + `]`, true},
		{"no reverse_proxy", `[` + authorizes + `]`, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := caddyfile.Config{ClientImpersonation: caddyfile.Authorize}
			err := c.CheckRoutes(zap.NewNop(), serverWith(t, tt.handlers))
			if (err == nil) != tt.ok || (err != nil && !strings.Contains(err.Error(), "client_impersonation authorize needs transport kubernetes")) {
				t.Errorf("got error %v; want none: %t", err, tt.ok)
			}
		})
	}
}

func TestCheckRoutes_NotesDroppedDotHeaders(t *testing.T) {
	for _, tt := range []struct {
		name      string
		config    caddyfile.Config
		expecting []string
		want      int
	}{
		{"reject", caddyfile.Config{}, nil, 0},
		{"authorize", caddyfile.Config{ClientImpersonation: caddyfile.Authorize}, nil, 1},
		{"authorize, another header is expected", caddyfile.Config{ClientImpersonation: caddyfile.Authorize}, []string{"x-example.com"}, 1},
		{"authorize, the header is expected", caddyfile.Config{ClientImpersonation: caddyfile.Authorize}, []string{"Impersonate-Extra-example.com*"}, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			core, logs := observer.New(zap.InfoLevel)
			if err := tt.config.CheckRoutes(zap.New(core), &caddyhttp.Server{ExpectedDotHeaders: tt.expecting}); err != nil {
				t.Fatal(err)
			}
			if got := logs.FilterMessageSnippet("expected_dot_headers").Len(); got != tt.want {
				t.Errorf("got %d notes; want %d", got, tt.want)
			}
		})
	}
}
