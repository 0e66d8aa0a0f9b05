// SPDX-License-Identifier: Apache-2.0

package testcontrol

import (
	"fmt"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tailscale.com/tailcfg"
	tailscalecontrol "tailscale.com/tstest/integration/testcontrol"
	"tailscale.com/types/logger"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/internal/derptest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/internal/tempdir"
)

// Caddy asks Tailscale for the certificate of a ts.net name. Without certificates in the
// tailnet, handshakes fail, and the log says what to turn on.
func TestCertificates_TailnetWithoutThemIsLogged(t *testing.T) {
	t.Setenv("TS_NO_LOGS_NO_SUPPORT", "true")
	// With a domain, this control server has certificates.
	control := &tailscalecontrol.Server{DERPMap: derptest.Start(t), DNSConfig: &tailcfg.DNSConfig{Proxied: true}, Logf: logger.Discard}
	control.HTTPTestServer = httptest.NewServer(control)
	t.Cleanup(control.HTTPTestServer.Close)

	log := filepath.Join(t.TempDir(), "log")
	_, status := runCaddy(t, fmt.Sprintf(`{
	admin off
	persist_config off
	auto_https disable_redirects
	storage file_system %[1]s
	log default {
		output file %[2]s
		format json
	}
	tailscale {
		control_url %[3]s
		auth_key unused
		state_dir %[4]s
	}
	servers {
		protocols h1 h2
	}
}
https://k8s.%[5]s {
	bind tailscale/k8s
	tailscale_impersonate
}
`, filepath.Join(t.TempDir(), "caddy"), log, control.HTTPTestServer.URL, tempdir.New(t), domain))
	named := control.Node(status.Self.PublicKey)
	named.Name = "k8s." + domain + "."
	control.UpdateNode(named)

	const want = "sites need certificates from Tailscale, and the tailnet has none"
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		text, err := os.ReadFile(log)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(text), want) && strings.Contains(string(text), `"sites":["k8s.`+domain+`"]`) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the log does not say %q:\n%s", want, text)
		}
	}
}
