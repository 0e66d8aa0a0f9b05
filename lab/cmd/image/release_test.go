// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

type step struct {
	Uses string
	Run  string
	With map[string]any
}

type job struct {
	Uses        string
	Permissions map[string]string
	Steps       []step
}

type workflow struct {
	Permissions map[string]string
	Jobs        map[string]job
}

// workflows returns the project's workflows by the name of their file, as text and parsed.
func workflows(t *testing.T) (root string, texts map[string]string, parsed map[string]workflow) {
	t.Helper()
	root, err := lab.Root()
	if err != nil {
		t.Fatal(err)
	}
	paths, err := filepath.Glob(filepath.Join(root, ".github", "workflows", "*.yml"))
	if err != nil || len(paths) < 2 {
		t.Fatalf("got the workflows %v: %v", paths, err)
	}
	texts, parsed = make(map[string]string), make(map[string]workflow)
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var w workflow
		if err := yaml.Unmarshal(text, &w); err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		texts[filepath.Base(path)], parsed[filepath.Base(path)] = string(text), w
	}
	return root, texts, parsed
}

// A tag can be moved to another commit. A digest names the version, and the same everywhere.
func TestWorkflows_ActionsArePinnedByDigest(t *testing.T) {
	_, texts, _ := workflows(t)
	pins := make(map[string]string)
	for name, text := range texts {
		for _, use := range regexp.MustCompile(`(?m)\buses: (.*)$`).FindAllStringSubmatch(text, -1) {
			if strings.HasPrefix(use[1], "./") {
				continue
			}
			action, pin, _ := strings.Cut(use[1], "@")
			if !regexp.MustCompile(`^[0-9a-f]{40} # v\d+\.\d+\.\d+$`).MatchString(pin) {
				t.Errorf("%s: %s is not pinned to a commit, with its version in a comment", name, use[1])
			}
			if other, ok := pins[action]; ok && other != pin {
				t.Errorf("%s is pinned to %s and to %s", action, pin, other)
			}
			pins[action] = pin
		}
	}
	if len(pins) == 0 {
		t.Error("the workflows use no action")
	}
}

// A workflow may read, and a job that may write says so itself. Only the job that publishes
// may write, and it does not build what it publishes.
func TestWorkflows_HaveNoUnneededPermissions(t *testing.T) {
	_, _, parsed := workflows(t)
	for name, w := range parsed {
		if w.Permissions == nil {
			t.Errorf("%s: without permissions, a workflow has those of the repository's settings", name)
		}
		for scope, access := range w.Permissions {
			if access != "read" {
				t.Errorf("%s: every job has %s: %s", name, scope, access)
			}
		}
		for id, j := range w.Jobs {
			writes := false
			for _, access := range j.Permissions {
				writes = writes || access == "write"
			}
			if want := name == "release.yml" && id == "publish"; writes != want {
				t.Errorf("%s: job %s may write: %t; want %t", name, id, writes, want)
			}
			for _, s := range j.Steps {
				if strings.HasPrefix(s.Uses, "actions/checkout@") && s.With["persist-credentials"] != false {
					t.Errorf("%s: job %s leaves its token in the working copy", name, id)
				}
				// An expression in a script is run as part of it, whatever is in it.
				if strings.Contains(s.Run, "${{") {
					t.Errorf("%s: job %s has an expression in a script: %s", name, id, s.Run)
				}
				if writes && regexp.MustCompile(`make (release-caddy|image|test)`).MatchString(s.Run) {
					t.Errorf("%s: job %s, which may write, builds: %s", name, id, s.Run)
				}
			}
		}
	}
}

// The same Go builds the image everywhere, or its bytes differ.
func TestWorkflows_UseTheGoOfTheDockerfile(t *testing.T) {
	root, texts, parsed := workflows(t)
	dockerfile, err := os.ReadFile(filepath.Join(root, "xcaddy.Dockerfile"))
	if err != nil {
		t.Fatal(err)
	}
	want := regexp.MustCompile(`(?m)^FROM golang:([\d.]+)-`).FindStringSubmatch(string(dockerfile))
	if want == nil {
		t.Fatal("xcaddy.Dockerfile names no version of Go")
	}
	for name, text := range texts {
		used := regexp.MustCompile(`(?m)^\s+go-version: (.*)$`).FindAllStringSubmatch(text, -1)
		if len(used) == 0 {
			t.Errorf("%s names no version of Go", name)
		}
		for _, version := range used {
			if version[1] != want[1] {
				t.Errorf("%s uses Go %s; want %s, as in xcaddy.Dockerfile", name, version[1], want[1])
			}
		}
	}
	ci := parsed["ci.yml"].Jobs["ci"].Steps
	if len(ci) == 0 || !strings.HasSuffix(ci[len(ci)-1].Run, " .ci/run") {
		t.Error("ci.yml does not run .ci/run")
	}
	if got := parsed["release.yml"].Jobs["test"].Uses; got != "./.github/workflows/ci.yml" {
		t.Errorf("release.yml tests with %q; want ci.yml", got)
	}
}

func TestReleaseNotes_AreThoseOfTheVersion(t *testing.T) {
	root, err := lab.Root()
	if err != nil {
		t.Fatal(err)
	}
	changelog := filepath.Join(t.TempDir(), "CHANGELOG.md")
	if err := os.WriteFile(changelog, []byte(`# Changelog

## Unreleased

Later.

## [1.2.30] - 2026-03-01

Another one.

## [1.2.3] - 2026-02-01

### Added

- This.

## [1.2.3-rc.1] - 2026-01-02

## [1.0.0] - 2026-01-01

- Earlier.
`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ version, want, wantErr string }{
		{version: "v1.2.3", want: "### Added\n\n- This.\n"},
		{version: "v1.0.0", want: "- Earlier.\n"},
		{version: "v1.2.3-rc.1", wantErr: "has nothing about 1.2.3-rc.1"},
		{version: "v1.2.4", wantErr: "has nothing about 1.2.4"},
		{version: "v1.2", wantErr: "is not a version"},
		{version: "v01.2.3", wantErr: "is not a version"},
		{version: "Unreleased", wantErr: "is not a version"},
	} {
		t.Run(tt.version, func(t *testing.T) {
			var stdout, stderr strings.Builder
			cmd := exec.CommandContext(t.Context(), filepath.Join(root, ".ci", "notes"), tt.version, changelog)
			cmd.Stdout, cmd.Stderr = &stdout, &stderr
			err := cmd.Run()
			if (err != nil) != (tt.wantErr != "") || !strings.Contains(stderr.String(), tt.wantErr) {
				t.Errorf("got %v: %s; want %q", err, &stderr, tt.wantErr)
			}
			if diff := cmp.Diff(tt.want, stdout.String()); diff != "" {
				t.Errorf("the notes differ (-want +got):\n%s", diff)
			}
		})
	}
}
