// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// Caddy sorts directives such as handle before reverse_proxy. A reverse_proxy inside of
// them must still be behind the handler.
func TestRoutes_NestedReverseProxySendsIdentity(t *testing.T) {
	for _, transport := range transports {
		proxy := "reverse_proxy $UPSTREAM {\n" + transport.name + "\n}\n"
		for _, tt := range []struct {
			name, global, body, path string
		}{
			{"handle", "", "handle /api {\n" + proxy + "}\ntailscale_impersonate", "/api"},
			{"handle in handle", "", "handle /* {\nhandle /api {\n" + proxy + "}\n}\ntailscale_impersonate", "/api"},
			{"handle_path", "", "handle_path /cluster/* {\n" + proxy + "}\ntailscale_impersonate", "/cluster/api"},
			{"route", "", "route /api {\n" + proxy + "}\ntailscale_impersonate", "/api"},
			{"invoke", "&(cluster) {\n" + proxy + "}", "invoke cluster\ntailscale_impersonate", "/api"},
			{"invoke in route", "&(cluster) {\n" + proxy + "}", "route {\ntailscale_impersonate\ninvoke cluster\n}", "/api"},
			{"handler in the named route", "&(cluster) {\nroute {\nprovide_nodes\ntailscale_impersonate\n" + proxy + "}\n}", "invoke cluster", "/api"},
			{"handle_errors with a handler of its own", "", "route {\nerror 500\ntailscale_impersonate\n}\nhandle_errors {\ntailscale_impersonate\n" + proxy + "}", "/api"},
		} {
			t.Run(transport.name[1:]+"/"+tt.name, func(t *testing.T) {
				up := proxytest.NewAPIServer(t)
				s := proxytest.Config{API: up, Global: tt.global, Body: tt.body, Nodes: []*tailnet.Node{proxytest.AliceNode()}}.Start(t)
				resp := s.HTTP1(t, proxytest.AliceAddr, "GET "+tt.path+" HTTP/1.1\r\nHost: k8s\r\nConnection: Impersonate-User, Impersonate-Group\r\nAuthorization: Bearer stolen\r\n\r\n")
				if resp.StatusCode/100 == 3 || resp.StatusCode == http.StatusNotFound {
					t.Errorf("answered %s", resp.Status)
				}
				up.CheckOne(t, transport.want)
			})
		}
	}
}

// A reverse_proxy without the handler in front of it sends nothing as the proxy.
func TestRoutes_ProxyWithoutHandlerSendsNothing(t *testing.T) {
	const proxy = "reverse_proxy $UPSTREAM {\n$KUBERNETES\n}\n"
	for _, tt := range []struct{ name, global, body string }{
		{"nowhere", "", proxy},
		{"on another path", "", "tailscale_impersonate /other\n" + proxy},
		{"behind the proxy", "", "route {\n" + proxy + "tailscale_impersonate\n}"},
		{"in a sibling", "", "handle /other {\ntailscale_impersonate\n}\nhandle {\n" + proxy + "}"},
		{"in handle_errors after an error ahead of the handler", "", "route {\nerror 500\ntailscale_impersonate\n}\nhandle_errors {\n" + proxy + "}"},
		{"in handle_errors after an error behind the handler", "", "tailscale_impersonate\nerror 500\nhandle_errors {\n" + proxy + "}"},
		{"in an invoked route", "&(cluster) {\n" + proxy + "}", "invoke cluster"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			up := proxytest.NewAPIServer(t)
			s := proxytest.Config{API: up, Global: tt.global, Body: tt.body, Nodes: []*tailnet.Node{proxytest.AliceNode()}}.Start(t)
			for lines, words := range map[string][]string{
				"":                    {"no identity", "tailscale_impersonate"},
				upgrades["websocket"]: {"no identity", "tailscale_impersonate"},
				"Impersonate-User: system:admin\r\nAuthorization: Bearer stolen\r\n": nil, // a handler ahead of the error refuses it first
			} {
				resp := s.Get(t, "/api", lines)
				proxytest.CheckRefused(t, resp, proxytest.Forbidden, words...)
				up.CheckNone(t)
			}
		})
	}
}

// The headers that the handler wrote the first time are gone: the second time, it must
// not mistake them for a request to act as another user.
func TestRoutes_HandleErrorsAuthenticatesAgain(t *testing.T) {
	up := proxytest.NewAPIServer(t)
	s := proxytest.StartSite(t, up, `
		tailscale_impersonate
		handle_errors {
			tailscale_impersonate
			reverse_proxy $UPSTREAM {
				$HTTP
			}
		}
		error 404`, proxytest.AliceNode())
	s.Get(t, "/api", "")
	up.CheckOne(t, proxytest.AliceHeaders)
}

// Header operations in the config change neither the identity nor the credentials that
// the API server receives.
func TestHeaderOperations_DoNotChangeIdentity(t *testing.T) {
	const refused = "refused"
	for _, tt := range []struct {
		ops  string
		want string // refused if nothing may be sent
	}{
		{"header_up -Impersonate-User", ""},
		{"header_up -Impersonate-Group", ""},
		{"header_up -Impersonate-*", ""},
		{"header_up -*", ""},
		{"header_up Impersonate-User admin", ""},
		{"header_up impersonate-user admin", ""},
		{"header_up +Impersonate-User admin", ""},
		{"header_up +Impersonate-Group system:masters", ""},
		{"header_up Impersonate-Group tailnet-readers system:masters", ""},
		{"header_up Impersonate-Uid 0", ""},
		{"header_up Impersonate-Something 0", ""},
		{"header_up Impersonate_User admin", ""},
		{"header_up X-Remote-User admin", ""},
		{"header_up Authorization \"Bearer other\"", ""},
		{"header_up +Authorization \"Bearer other\"", ""},
		{"header_up -Authorization", ""},
		{"header_up Sec-WebSocket-Protocol base64url.bearer.authorization.k8s.io.b3RoZXI", ""},
		{"header_up Host evil.example.com", ""},
		{"header_up Connection Upgrade\nheader_up Upgrade h2c", refused},
		{"header_up Connection Upgrade", refused},
	} {
		t.Run(tt.ops, func(t *testing.T) {
			up := proxytest.NewAPIServer(t)
			s := proxytest.StartSite(t, up, "tailscale_impersonate\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n"+tt.ops+"\n}", proxytest.AliceNode())
			resp := s.Get(t, "/api", "")
			if tt.want == refused {
				proxytest.CheckRefused(t, resp, proxytest.BadRequest)
				up.CheckNone(t)
				return
			}
			if resp.StatusCode != http.StatusOK {
				t.Errorf("answered %s", resp.Status)
			}
			up.CheckOne(t, proxytest.AliceAsProxy)
		})
	}
	t.Run("request_header behind the handler", func(t *testing.T) {
		up := proxytest.NewAPIServer(t)
		s := proxytest.StartSite(t, up, "route {\ntailscale_impersonate\nrequest_header -Impersonate-Group\nrequest_header Impersonate-User admin\nrequest_header Authorization x\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}\n}", proxytest.AliceNode())
		s.Get(t, "/api", "")
		up.CheckOne(t, proxytest.AliceAsProxy)
	})
}

func TestHeaderOperations_ConnectionDoesNotNameIdentity(t *testing.T) {
	for _, ops := range []string{
		"header_up Connection Impersonate-User",
		"header_up Connection \"Upgrade, Impersonate-User\"\nheader_up Upgrade websocket",
	} {
		up := proxytest.NewAPIServer(t)
		s := proxytest.StartSite(t, up, "tailscale_impersonate\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n"+ops+"\n}", proxytest.AliceNode())
		s.Get(t, "/api", "")
		r := up.One(t)
		if c := r.Header["Connection"]; len(c) > 0 && (len(c) != 1 || c[0] != "Upgrade") {
			t.Errorf("%s: sent with Connection %q next to %q", ops, c, r.Header["Authorization"])
		}
	}
}

// The sites of a server are provisioned one after the other, in whatever order.
func TestUnguarded_WarningIsLoggedOnLoad(t *testing.T) {
	const plain, guarded = "reverse_proxy 127.0.0.1:9", "tailscale_impersonate\nreverse_proxy 127.0.0.1:9"
	for _, tt := range []struct {
		a, b string
		want bool
	}{{plain, guarded, true}, {guarded, plain, true}, {guarded, guarded, false}} {
		log, port := filepath.Join(t.TempDir(), "log"), proxytest.FreePort(t)
		config := proxytest.Adapt(t, fmt.Sprintf(`{
			admin off
			persist_config off
			auto_https off
			storage file_system %s
			log {
				output file %s
			}
		}
		http://a.example:%d {
			%s
		}
		http://b.example:%d {
			%s
		}`, t.TempDir(), log, port, tt.a, port, tt.b))
		if err := caddy.Load(config, true); err != nil {
			t.Fatal(err)
		}
		proxytest.StopCaddy(t)
		content, err := os.ReadFile(log)
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Contains(string(content), "without passing tailscale_impersonate"); got != tt.want {
			t.Errorf("%q, %q: warned: %t; want %t:\n%s", tt.a, tt.b, got, tt.want, content)
		}
	}
}

// Caddy removes the configuration of routes once it has provisioned them. While it
// provisions the handler, the configuration must still be there.
func TestBuffers_WarningIsLoggedOnLoad(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	config := proxytest.Adapt(t, fmt.Sprintf(`{
		admin off
		persist_config off
		auto_https off
		storage file_system %s
		log {
			output file %s
		}
	}
	http://127.0.0.1:%d {
		encode
		tailscale_impersonate
		reverse_proxy 127.0.0.1:9
	}`, t.TempDir(), log, proxytest.FreePort(t)))
	if err := caddy.Load(config, true); err != nil {
		t.Fatal(err)
	}
	if err := caddy.Stop(); err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(content), `"because_of":["encode"]`) {
		t.Errorf("the log has no warning of encode:\n%s", content)
	}
}
