// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// maxWritten is how much one refused request may cost in the answer and in the log, each,
// in bytes.
const maxWritten = 8 << 10

// Whatever a megabyte of a request is in, it is neither answered nor logged: not by us, and
// not by Caddy because of an error of ours.
func TestWritten_MegabytesAreNotRepeated(t *testing.T) {
	raw, letters := strings.Repeat("\xff", 1_000_000), strings.Repeat("a", 1_000_000)
	for _, tt := range []struct{ name, target, lines string }{
		{"a target that is no path", "a:" + raw, ""},
		{"a path that is no path below the cluster's", "/api/" + letters + "/../..", ""},
		{"an ambiguous path", "/api//" + letters, ""},
		{"an ambiguous path, escaped", "/api//" + strings.Repeat("%ff", 300_000), ""},
		{"a path to act on", "/" + letters, "Impersonate-User: bob\r\n"},
		{"the name of an object to act on", "/api/v1/namespaces/default/pods/" + letters, "Impersonate-User: bob\r\n"},
		{"Origin of a program", "/api", "Origin: " + raw + "\r\n"},
		{"Origin of a page", "/api", "Origin: " + raw + "\r\nUser-Agent: Mozilla/5.0\r\n"},
		{"Sec-Fetch-Site", "/api", "Sec-Fetch-Site: " + raw + "\r\n"},
		{"Referer", "/api", "Sec-Fetch-Site: same-origin\r\nReferer: https://" + letters + "/\r\n"},
		{"Host", "/api", "Host: " + letters + "\r\nOrigin: https://evil.example\r\nUser-Agent: Mozilla/5.0\r\n"},
		{"Host for whoami", "/whoami", "Host: " + letters + "\r\n"},
		{"Host that is no host, for whoami", "/whoami", "Host: a%zz" + letters + "\r\n"},
		{"a user", "/api", "Impersonate-User: " + letters + "\r\n"},
		{"a user that is no name", "/api", "Impersonate-User: " + raw + "\r\n"},
		{"a group", "/api", "Impersonate-User: bob\r\nImpersonate-Group: " + letters + "\r\n"},
		{"many groups", "/api", "Impersonate-User: bob\r\n" + strings.Repeat("Impersonate-Group: a\r\n", 40_000)},
		{"an extra field", "/api", "Impersonate-User: bob\r\nImpersonate-Extra-" + letters + ": x\r\n"},
		{"an unknown impersonation header", "/api", "Impersonate-" + letters + ": x\r\n"},
		{"a protocol to upgrade to", "/api", "Connection: Upgrade\r\nUpgrade: " + raw + "\r\n"},
		{"many protocols to upgrade to", "/api", "Connection: Upgrade\r\n" + strings.Repeat("Upgrade: x\r\n", 240)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, secure := range []bool{false, true} {
				log := filepath.Join(t.TempDir(), "log")
				up := proxytest.NewAPIServer(t)
				s := proxytest.Config{
					API: up, Nodes: []*tailnet.Node{proxytest.AliceNode()}, TLS: secure, Log: log, Server: "max_header_size 2MiB",
					Body: "@ordinary kubernetes {\nclass ordinary\n}\n" +
						"route {\ntailscale_impersonate {\nwhoami /whoami\nclient_impersonation authorize\n}\n" +
						"header @ordinary X-Class ordinary\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}\n}",
				}.Start(t)
				lines := tt.lines
				if !strings.HasPrefix(lines, "Host:") {
					lines = "Host: k8s\r\n" + lines
				}
				before := sizeOf(t, log)
				conn := s.Dial(t, proxytest.AliceAddr, "http/1.1")
				go func() {
					_, _ = io.WriteString(conn, "GET "+tt.target+" HTTP/1.1\r\nConnection: close\r\n"+lines+"\r\n")
				}()
				answer, _ := io.ReadAll(conn) // it ends in a reset if the server has not read all
				_ = conn.Close()
				if !strings.Contains(string(answer), "tailscale_impersonate: ") {
					t.Errorf("TLS %t: answered %.300q; want a refusal", secure, answer)
				}
				if len(answer) > maxWritten {
					t.Errorf("TLS %t: answered with %d bytes; want at most %d", secure, len(answer), maxWritten)
				}
				if n := sizeOf(t, log) - before; n > maxWritten {
					t.Errorf("TLS %t: logged %d bytes; want at most %d", secure, n, maxWritten)
				}
				for _, r := range up.Take() {
					if r.Method != http.MethodPost || r.ContentLength > maxWritten {
						t.Errorf("TLS %t: %s with %d bytes arrived at the API server", secure, r.Method, r.ContentLength)
					}
				}
				proxytest.StopCaddy(t)
			}
		})
	}
}

// sizeOf returns the size of a file, 0 if there is none.
func sizeOf(t *testing.T, path string) int64 {
	t.Helper()
	info, err := os.Stat(path)
	if os.IsNotExist(err) {
		return 0
	}
	if err != nil {
		t.Fatal(err)
	}
	return info.Size()
}
