// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"bufio"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// transports are the transports that the handler works in front of, with the headers
// that identify alice behind each.
var transports = []struct {
	name string
	want http.Header
}{
	{"$HTTP", proxytest.AliceHeaders},
	{"$KUBERNETES", proxytest.AliceAsProxy},
}

// forgeries are header lines, as raw bytes, with which a client could try to
// change who it is.
var forgeries = []string{
	"Connection: Impersonate-User, Impersonate-Group",
	"connection: impersonate-user,impersonate-group",
	"CONNECTION:IMPERSONATE-USER",
	"Connection: \t Impersonate-User \t , \t Impersonate-Group ",
	"Connection: Impersonate-User\r\nConnection: Impersonate-Group",
	"Connection: keep-alive\r\nConnection: Impersonate-Group",
	"Connection: close, Impersonate-Group, Authorization",
	"Connection: Authorization",
	"Connection: ,,Impersonate-User,,",
	"Connection: Impersonate-User;q=1, Impersonate-Group",
	"Connection: \"Impersonate-User\"",
	"Connection: Connection, Impersonate-User",
	"Connection:\r\nConnection: impersonate-USER",
	"Keep-Alive: Impersonate-User\r\nProxy-Connection: Impersonate-Group",
	"Te: trailers, Impersonate-User\r\nConnection: Te, Impersonate-User",
	"Impersonate-User: system:admin",
	"Impersonate-User: system:admin\r\nImpersonate-User: root\r\nimpersonate-group: system:masters",
	"IMPERSONATE-GROUP: system:masters",
	"Impersonate-Uid: 0\r\nImpersonate-Extra-Scopes: all\r\nImpersonate-Something: new",
	"Impersonate-User: x\r\nConnection: Impersonate-User",
	"X-Remote-User: system:admin\r\nX-Remote-Group: system:masters\r\nX-Remote-Extra-Scopes: all",
	"Authorization: Bearer stolen",
	"AUTHORIZATION: Basic c3RvbGVu\r\nauthorization: Bearer stolen",
	"X-Real-Ip: 127.0.0.1\r\nX-Forwarded-For: 127.0.0.1\r\nForwarded: for=127.0.0.1",
	"Sec-WebSocket-Protocol: v4.channel.k8s.io, base64url.bearer.authorization.k8s.io.c3RvbGVu",
	"X-Folded: a\r\n Impersonate-User: system:admin",
	"Trailer: Impersonate-User",
	"Host: system:admin",
	"Impersonate-User : system:admin",
	"Impersonate-User: a\rImpersonate-Group: system:masters",
	"Impersonate-User: a\x00b",
}

// mustBeInvalid reports whether lines are not valid HTTP/1.1, so that Caddy must refuse
// them.
func mustBeInvalid(lines string) bool {
	return strings.Contains(lines, " :") || strings.ContainsAny(strings.ReplaceAll(lines, "\r\n", ""), "\r\x00") || strings.HasPrefix(lines, "Host")
}

// upgrades are the header lines that follow the forged ones.
var upgrades = map[string]string{
	"plain":     "",
	"websocket": "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n",
	"SPDY":      "Connection: upgrade, Impersonate-User\r\nUpgrade: SPDY/3.1\r\n",
}

// With client_impersonation strip, the API server receives exactly the identity of the
// peer, whatever the client sends.
func TestForgedHeaders_HTTP1(t *testing.T) {
	for _, transport := range transports {
		t.Run(transport.name[1:], func(t *testing.T) {
			up := proxytest.NewAPIServer(t)
			s := proxytest.StartSite(t, up, `
				tailscale_impersonate {
					client_impersonation strip
				}
				reverse_proxy $UPSTREAM {
					`+transport.name+`
				}`, proxytest.AliceNode())
			for name, upgrade := range upgrades {
				for _, lines := range forgeries {
					t.Run(name+"/"+lines, func(t *testing.T) {
						resp := s.Get(t, "/api", lines+"\r\n"+upgrade)
						if mustBeInvalid(lines) {
							if resp.StatusCode != http.StatusBadRequest {
								t.Errorf("answered %s; want 400", resp.Status)
							}
							up.CheckNone(t)
							return
						}
						want := http.StatusOK
						if name != "plain" {
							want = http.StatusSwitchingProtocols
						}
						if resp.StatusCode != want {
							t.Errorf("answered %s; want %d", resp.Status, want)
						}
						up.CheckOne(t, transport.want)
					})
				}
			}
			t.Run("absolute-form target", func(t *testing.T) {
				if resp := s.Get(t, "http://k8s/api", "Connection: Impersonate-User\r\n"); resp.StatusCode != http.StatusOK {
					t.Errorf("answered %s", resp.Status)
				}
				up.CheckOne(t, transport.want)
			})
			t.Run("absolute-form target of another host", func(t *testing.T) {
				resp := s.Get(t, "http://rebound.example.com/api", "")
				proxytest.CheckRefused(t, resp, proxytest.Forbidden, "rebound.example.com")
				up.CheckNone(t)
			})
			t.Run("trailers", func(t *testing.T) {
				resp := s.HTTP1(t, proxytest.AliceAddr, "POST /api HTTP/1.1\r\nHost: k8s\r\nTransfer-Encoding: chunked\r\nTrailer: Impersonate-User, Authorization\r\nTe: trailers\r\n\r\n"+
					"4\r\nbody\r\n0\r\nImpersonate-User: system:admin\r\nAuthorization: Bearer stolen\r\n\r\n")
				if resp.StatusCode != http.StatusOK {
					t.Errorf("answered %s", resp.Status)
				}
				up.CheckOne(t, transport.want)
			})
			t.Run("pipelined behind a refused upgrade", func(t *testing.T) {
				conn := s.Dial(t, proxytest.AliceAddr)
				raw := "GET /api HTTP/1.1\r\nHost: k8s\r\nOrigin: https://evil.example.com\r\n" + upgrades["websocket"] + "\r\n" +
					"GET /api HTTP/1.1\r\nHost: k8s\r\nImpersonate-User: system:admin\r\nConnection: Impersonate-Group, close\r\n\r\n"
				if _, err := io.WriteString(conn, raw); err != nil {
					t.Fatal(err)
				}
				answers := bufio.NewReader(conn)
				proxytest.CheckRefused(t, proxytest.ReadResponse(t, answers), proxytest.Forbidden, "evil.example.com")
				if resp := proxytest.ReadResponse(t, answers); resp.StatusCode != http.StatusOK {
					t.Errorf("second request answered %s", resp.Status)
				}
				up.CheckOne(t, transport.want)
			})
		})
	}
}

// HTTP/2 sends header names and values as they are.
func TestForgedHeaders_HTTP2(t *testing.T) {
	for _, transport := range transports {
		t.Run(transport.name[1:], func(t *testing.T) {
			up := proxytest.NewAPIServer(t)
			s := proxytest.Config{API: up, TLS: true, Nodes: []*tailnet.Node{proxytest.AliceNode()}, Body: `
				tailscale_impersonate {
					client_impersonation strip
				}
				reverse_proxy $UPSTREAM {
					` + transport.name + `
				}`}.Start(t)
			for _, tt := range []struct {
				name   string
				fields [][2]string
				want   string // "200", or "" if it must not reach the API server
			}{
				{"nothing", nil, "200"},
				{"identity", [][2]string{{"impersonate-user", "system:admin"}, {"impersonate-group", "system:masters"}, {"impersonate-uid", "0"}, {"impersonate-extra-scopes", "all"}, {"impersonate-something", "x"}}, "200"},
				{"twice", [][2]string{{"impersonate-user", "system:admin"}, {"impersonate-user", "root"}}, "200"},
				{"front proxy", [][2]string{{"x-remote-user", "system:admin"}, {"x-remote-group", "system:masters"}}, "200"},
				{"credentials", [][2]string{{"authorization", "Bearer stolen"}, {"sec-websocket-protocol", "base64url.bearer.authorization.k8s.io.c3RvbGVu"}}, "200"},
				{"address", [][2]string{{"x-real-ip", "127.0.0.1"}}, "200"},
				{"te", [][2]string{{"te", "trailers"}, {"trailer", "impersonate-user"}}, "200"},

				{"connection", [][2]string{{"connection", "impersonate-user, impersonate-group"}}, ""},
				{"connection, other case", [][2]string{{"Connection", "Impersonate-User"}}, ""},
				{"upgrade", [][2]string{{"connection", "upgrade"}, {"upgrade", "websocket"}}, ""},
				{"upper case", [][2]string{{"Impersonate-User", "system:admin"}}, ""},
				{"line break in a value", [][2]string{{"x-a", "b\r\nimpersonate-user: system:admin"}}, ""},
				{"line break in a name", [][2]string{{"x-a\r\nimpersonate-user", "system:admin"}}, ""},
				{"NUL", [][2]string{{"impersonate-user", "a\x00b"}}, ""},
			} {
				t.Run(tt.name, func(t *testing.T) {
					fields := append([][2]string{{":method", "GET"}, {":scheme", "https"}, {":authority", "example.com"}, {":path", "/api"}}, tt.fields...)
					got := s.HTTP2(t, fields)
					if tt.want == "" {
						if got == "200" {
							t.Error("answered 200")
						}
						up.CheckNone(t)
						return
					}
					if got != tt.want {
						t.Errorf("answered %s; want %s", got, tt.want)
					}
					up.CheckOne(t, transport.want)
				})
			}
			t.Run("CONNECT", func(t *testing.T) {
				if got := s.HTTP2(t, [][2]string{{":method", "CONNECT"}, {":authority", "example.com"}}); got != "405" {
					t.Errorf("answered %s; want 405", got)
				}
				up.CheckNone(t)
			})
			t.Run("extended CONNECT", func(t *testing.T) {
				got := s.HTTP2(t, [][2]string{{":method", "CONNECT"}, {":protocol", "websocket"}, {":scheme", "https"}, {":authority", "example.com"}, {":path", "/api"}})
				if got != "405" && got != "reset" {
					t.Errorf("answered %s; want 405, or nothing", got)
				}
				up.CheckNone(t)
			})
			t.Run("trailers", func(t *testing.T) {
				fields := [][2]string{{":method", "POST"}, {":scheme", "https"}, {":authority", "example.com"}, {":path", "/api"}, {"trailer", "impersonate-user"}, {"te", "trailers"}}
				if got := s.HTTP2(t, fields, [2]string{"impersonate-user", "system:admin"}); got != "200" {
					t.Errorf("answered %s; want 200", got)
				}
				up.CheckOne(t, transport.want)
			})
		})
	}
}

// Caddy's listeners accept HTTP/2 without TLS, where no certificate proves the host.
func TestForgedHeaders_CleartextHTTP2(t *testing.T) {
	up := proxytest.NewAPIServer(t)
	s := proxytest.StartSite(t, up, proxytest.ToKubernetes, proxytest.AliceNode())
	request := func(host string, more ...[2]string) [][2]string {
		return append([][2]string{{":method", "GET"}, {":scheme", "http"}, {":authority", host}, {":path", "/api"}}, more...)
	}
	if got := s.HTTP2(t, request("k8s")); got != "200" {
		t.Errorf("answered %s; want 200", got)
	}
	up.CheckOne(t, proxytest.AliceAsProxy)
	for name, fields := range map[string][][2]string{
		"another host":             request("rebound.example.com"),
		"another host, https said": {{":method", "GET"}, {":scheme", "https"}, {":authority", "rebound.example.com"}, {":path", "/api"}},
		"identity":                 request("k8s", [2]string{"impersonate-user", "system:admin"}),
		"web page":                 request("k8s", [2]string{"origin", "http://k8s"}),
	} {
		if got := s.HTTP2(t, fields); got != "403" {
			t.Errorf("%s: answered %s; want 403", name, got)
		}
		up.CheckNone(t)
	}
}

func TestForgedHeaders_HTTP1Connect(t *testing.T) {
	up := proxytest.NewAPIServer(t)
	s := proxytest.StartSite(t, up, proxytest.ToKubernetes, proxytest.AliceNode())
	for _, target := range []string{"k8s:80", "kubernetes.default.svc:443"} {
		resp := s.HTTP1(t, proxytest.AliceAddr, "CONNECT "+target+" HTTP/1.1\r\nHost: k8s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
		proxytest.CheckRefused(t, resp, proxytest.MethodNotAllowed, "CONNECT")
	}
	up.CheckNone(t)
}

// Caddy can be told to accept header names with underscores and dots. A server that
// replaces these by hyphens reads them as identity.
func TestForgedHeaders_UnderscoresAndDots(t *testing.T) {
	up := proxytest.NewAPIServer(t)
	s := proxytest.Config{
		API:    up,
		Nodes:  []*tailnet.Node{proxytest.AliceNode()},
		Server: "expected_underscore_headers Impersonate_* X_Real_Ip\nexpected_dot_headers X.Remote.* Impersonate.User",
		Body: `
			tailscale_impersonate {
				client_impersonation strip
			}
			reverse_proxy $UPSTREAM {
				$HTTP
			}`,
	}.Start(t)
	resp := s.HTTP1(t, proxytest.AliceAddr, "GET /api HTTP/1.1\r\nHost: k8s\r\nImpersonate_User: system:admin\r\nimpersonate_group: system:masters\r\n"+
		"X.Remote.User: system:admin\r\nImpersonate.User: system:admin\r\nX_Real_Ip: 127.0.0.1\r\n\r\n")
	if resp.StatusCode != http.StatusOK {
		t.Errorf("answered %s", resp.Status)
	}
	up.CheckOne(t, proxytest.AliceHeaders)
}
