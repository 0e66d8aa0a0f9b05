// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"testing"

	"k8s.io/client-go/tools/clientcmd"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/whoami"
)

func TestKubeconfig_HasContextsForChoices(t *testing.T) {
	site := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_ = json.NewEncoder(w).Encode(whoami.Facts{User: "alice@example.com", ReadOnly: "readers", HeldBack: []whoami.Group{{Name: "readers"}, {Name: "system:masters"}}})
	}))
	defer site.Close()
	seen, err := look(t.Context(), site.URL)
	if err != nil || !seen.isFrom(nil) {
		t.Fatalf("got %v, %v", seen, err)
	}
	cmd := kubeconfigCommand()
	var out writer
	cmd.SetOut(&out)
	cmd.SetArgs([]string{"--server", site.URL, "--context", "prod"})
	if err := cmd.Execute(); err != nil {
		t.Fatal(err)
	}
	config, err := clientcmd.Load(out)
	if err != nil {
		t.Fatal(err)
	}
	admin := config.AuthInfos["prod-system-masters"]
	if len(config.Contexts) != 3 || config.CurrentContext != "prod-read-only" || admin == nil || admin.Impersonate != "alice@example.com" || admin.ImpersonateGroups[0] != "system:masters" {
		t.Errorf("got %s", out)
	}
}

type writer []byte

func (w *writer) Write(p []byte) (int, error) { *w = append(*w, p...); return len(p), nil }
