// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	auditv1 "k8s.io/apiserver/pkg/apis/audit/v1"
	"sigs.k8s.io/yaml"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

func TestBlocksOfTheImpersonationDocumentWork(t *testing.T) {
	root, err := lab.Root()
	if err != nil {
		t.Fatal(err)
	}
	document, err := os.ReadFile(filepath.Join(root, "docs", "impersonation.md"))
	if err != nil {
		t.Fatal(err)
	}
	used := make(map[string]int)
	for _, block := range blocks(t, string(document)) {
		used[block.language]++
		switch {
		case block.language == "caddyfile":
			validate(t, block.content)
		case block.language == "yaml" && strings.Contains(block.content, "audit.k8s.io"):
			if err := yaml.UnmarshalStrict([]byte(block.content), new(auditv1.Policy)); err != nil {
				t.Errorf("the audit policy: %v", err)
			}
		case block.language == "yaml":
			if err := theLab.Cluster.Apply(t.Context(), []byte(block.content)); err != nil {
				t.Errorf("the manifest: %v", err)
			}
		default:
			t.Errorf("a block of language %q is not tested", block.language)
		}
	}
	if used["caddyfile"] != 2 || used["yaml"] != 2 {
		t.Errorf("got blocks %v; want two of each", used)
	}
}
