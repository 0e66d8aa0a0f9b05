// SPDX-License-Identifier: Apache-2.0

package components

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// write creates an empty file with the given mode at path.
func write(t *testing.T, path string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, nil, mode); err != nil {
		t.Fatal(err)
	}
}

func TestDir_IsNearestLabBin(t *testing.T) {
	t.Setenv(EnvDir, "")
	root, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	want := filepath.Join(root, "lab", ".bin")
	for _, dir := range []string{want, filepath.Join(root, "lab", "headscale", "testdata"), filepath.Join(root, "impersonate")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, cwd := range []string{".", "lab", "lab/headscale", "lab/headscale/testdata", "impersonate"} {
		t.Chdir(filepath.Join(root, cwd))
		if got, err := Dir(); err != nil || got != want {
			t.Errorf("Dir() in %s = %q, %v; want %q", cwd, got, err, want)
		}
	}
}

func TestDir_EnvironmentOverrides(t *testing.T) {
	dir := t.TempDir()
	t.Setenv(EnvDir, dir)
	if got, err := Dir(); err != nil || got != dir {
		t.Errorf("Dir() = %q, %v; want %q", got, err, dir)
	}
}

func TestPath_EnvtestFolderOverrides(t *testing.T) {
	lab, assets := t.TempDir(), t.TempDir()
	t.Setenv(EnvDir, lab)
	t.Setenv(EnvKubernetes, assets)
	write(t, filepath.Join(lab, "headscale"), 0o755)
	write(t, filepath.Join(lab, "etcd"), 0o755)
	write(t, filepath.Join(assets, "etcd"), 0o755)
	for name, want := range map[string]string{
		"headscale": filepath.Join(lab, "headscale"),
		"etcd":      filepath.Join(assets, "etcd"),
	} {
		if got, err := Path(name); err != nil || got != want {
			t.Errorf("Path(%q) = %q, %v; want %q", name, got, err, want)
		}
	}
}

func TestPath_MissingBinaryNamesMakeTarget(t *testing.T) {
	dir := t.TempDir()
	t.Setenv(EnvKubernetes, "")
	write(t, filepath.Join(dir, "xcaddy"), 0o644)

	t.Setenv(EnvDir, dir)
	for name, reason := range map[string]string{
		"headscale": "headscale is not in " + dir,
		"xcaddy":    "is not an executable file",
	} {
		_, err := Path(name)
		if err == nil || !strings.Contains(err.Error(), reason) || !strings.Contains(err.Error(), hint) {
			t.Errorf("Path(%q): error %v; want %q and %q", name, err, reason, hint)
		}
	}

	t.Setenv(EnvDir, filepath.Join(dir, "gone"))
	if _, err := Dir(); err == nil || !strings.Contains(err.Error(), hint) {
		t.Errorf("Dir() with a missing folder: error %v; want %q", err, hint)
	}
	t.Setenv(EnvDir, "")
	t.Chdir(dir)
	if _, err := Dir(); err == nil || !strings.Contains(err.Error(), hint) {
		t.Errorf("Dir() outside the repository: error %v; want %q", err, hint)
	}
}
