// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// Documentation names tests as proof of what it says.
func TestDocs_NamedTestsExist(t *testing.T) {
	declared := make(map[string]bool)
	declaration := regexp.MustCompile(`(?m)^func (Test\w+)\(`)
	if err := filepath.WalkDir(".", func(path string, _ fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		source, err := os.ReadFile(path)
		for _, match := range declaration.FindAllSubmatch(source, -1) {
			declared[string(match[1])] = true
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	documents, err := filepath.Glob("docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	named := 0
	for _, path := range append(documents, "README.md", "SECURITY.md") {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, match := range regexp.MustCompile("`(Test\\w+)`").FindAllSubmatch(text, -1) {
			named++
			if !declared[string(match[1])] {
				t.Errorf("%s names %s, which does not exist", path, match[1])
			}
		}
	}
	if named == 0 {
		t.Error("the documents name no test")
	}
}

// docs/compatibility.md names the versions of the clients that the lab pins. Python and
// Chromium are those of the distribution.
func TestDocs_CompatibilityNamesPinnedVersions(t *testing.T) {
	text, err := os.ReadFile("docs/compatibility.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ client, file, pin string }{
		{"kubectl", "lab/tools/kubernetes/go.mod", `k8s\.io/kubernetes v(\S+)`},
		{"`kubectl proxy`", "lab/tools/kubernetes/go.mod", `k8s\.io/kubernetes v(\S+)`},
		{"Helm", "lab/tools/helm/go.mod", `helm\.sh/helm/v4 v(\S+)`},
		{"client-go", "lab/go.mod", `k8s\.io/client-go v(\S+)`},
		{"JavaScript `@kubernetes/client-node`", "lab/tools/client-node/package.json", `"@kubernetes/client-node": "([^"]+)"`},
	} {
		pins, err := os.ReadFile(tt.file)
		if err != nil {
			t.Fatal(err)
		}
		pin := regexp.MustCompile(tt.pin).FindSubmatch(pins)
		if pin == nil {
			t.Errorf("%s does not match %s", tt.file, tt.pin)
			continue
		}
		if row := "\n| " + tt.client + " | " + string(pin[1]) + " | "; !strings.Contains(string(text), row) {
			t.Errorf("docs/compatibility.md has no row that begins with %q", strings.TrimSpace(row))
		}
	}
}

// docs/faults.md says for each fault what happens, and which test shows it.
func TestDocs_EachFaultNamesATest(t *testing.T) {
	text, err := os.ReadFile("docs/faults.md")
	if err != nil {
		t.Fatal(err)
	}
	faults := 0
	for line := range strings.Lines(string(text)) {
		if !strings.HasPrefix(line, "| ") || strings.HasPrefix(line, "| fault ") || strings.HasPrefix(line, "| --- ") {
			continue
		}
		faults++
		cells := strings.Split(strings.Trim(line, "| \n"), " | ")
		if len(cells) != 4 || !strings.Contains(cells[len(cells)-1], "`Test") {
			t.Errorf("%q has %d cells; want what fails, what callers and operators see, and a test", cells[0], len(cells))
		}
	}
	if faults < 11 {
		t.Errorf("got %d faults; want those of the table", faults)
	}
}
