// SPDX-License-Identifier: Apache-2.0

// Package components finds the binaries that the lab runs: Headscale, etcd,
// kube-apiserver, kubectl and other tools. "make components" builds them into a
// folder that git ignores.
package components

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// The environment variables with the folders of binaries.
const (
	// EnvDir names the folder that holds all of the lab's binaries.
	EnvDir = "LAB_BIN"

	// EnvKubernetes names the folder that holds etcd, kube-apiserver and kubectl.
	// envtest and its tools use the same variable.
	EnvKubernetes = "KUBEBUILDER_ASSETS"
)

// hint ends every error of this package, as the components have probably not been
// built.
const hint = `run "make components" first`

// Dir returns the folder of the lab's binaries: $LAB_BIN, or the nearest lab/.bin at
// or above the working directory.
func Dir() (string, error) {
	if dir := os.Getenv(EnvDir); dir != "" {
		if !isDir(dir) {
			return "", fmt.Errorf("%s=%s is not a folder: %s", EnvDir, dir, hint)
		}
		return filepath.Abs(dir)
	}
	start, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("find the lab's binaries: %w", err)
	}
	for dir := start; ; dir = filepath.Dir(dir) {
		// From inside the lab's module, or from the repository it is part of.
		if bin := filepath.Join(dir, ".bin"); filepath.Base(dir) == "lab" && isDir(bin) {
			return bin, nil
		}
		if bin := filepath.Join(dir, "lab", ".bin"); isDir(bin) {
			return bin, nil
		}
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("no lab/.bin at or above %s: %s", start, hint)
		}
	}
}

// Path returns the path of the named binary, such as "headscale". Kubernetes'
// binaries come from $KUBEBUILDER_ASSETS if it is set.
func Path(name string) (string, error) {
	dir, err := dirOf(name)
	if err != nil {
		return "", err
	}
	return In(dir, name)
}

// In returns the path of the named binary in the folder dir.
func In(dir, name string) (string, error) {
	path := filepath.Join(dir, name)
	fi, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "", fmt.Errorf("%s is not in %s: %s", name, dir, hint)
	case err != nil:
		return "", fmt.Errorf("find %s: %w", name, err)
	case !fi.Mode().IsRegular() || fi.Mode()&0o111 == 0:
		return "", fmt.Errorf("%s is not an executable file: %s", path, hint)
	}
	return path, nil
}

// dirOf returns the folder in which the named binary belongs.
func dirOf(name string) (string, error) {
	if slices.Contains([]string{"etcd", "kube-apiserver", "kubectl"}, name) {
		if dir := os.Getenv(EnvKubernetes); dir != "" {
			return filepath.Abs(dir)
		}
	}
	return Dir()
}

// isDir reports whether path is an existing folder.
func isDir(path string) bool {
	fi, err := os.Stat(path)
	return err == nil && fi.IsDir()
}
