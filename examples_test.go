// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// Without a grace period, one request that does not end keeps Caddy from exiting.
func TestExamples_HaveGracePeriod(t *testing.T) {
	var complete []string
	for _, pattern := range []string{"README.md", "docs/*.md", "examples/*.caddyfile", "examples/kubernetes/Caddyfile"} {
		files, err := filepath.Glob(pattern)
		if err != nil || len(files) == 0 {
			t.Fatalf("%s: got the files %v, %v", pattern, files, err)
		}
		for _, file := range files {
			content, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			texts := []string{string(content)}
			want := regexp.MustCompile(`(?m)^\t# .*\n\tgrace_period \d+s$`) // with its reason
			if filepath.Ext(file) == ".md" {
				texts = strings.Split(texts[0], "\n```")
				want = regexp.MustCompile(`(?m)^\tgrace_period \d+s$`)
			}
			for _, text := range texts {
				if !strings.Contains(text, "\n\tservers {\n") { // no complete Caddyfile
					continue
				}
				complete = append(complete, file)
				if !want.MatchString(text) {
					t.Errorf("%s: a Caddyfile has no grace_period with its reason:\n%s", file, text)
				}
			}
		}
	}
	if len(complete) < 12 {
		t.Errorf("only %v have a complete Caddyfile", complete)
	}
}
