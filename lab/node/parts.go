// SPDX-License-Identifier: Apache-2.0

package node

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/components"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/internal/machine"
)

// parts are the files that a node consists of.
type parts struct {
	kubernetes string // kubelet, kube-controller-manager, kube-scheduler and kube-proxy
	pause      string
	debian     string // the folder that the Debian packages are unpacked in
}

// debianPrograms are what the node runs of the Debian packages.
var debianPrograms = []string{
	"bin/busybox", "usr/bin/containerd", "usr/bin/containerd-shim-runc-v2", "usr/bin/ctr",
	"usr/lib/cni/host-local", "usr/lib/cni/loopback", "usr/lib/cni/ptp", "usr/sbin/nft", "usr/sbin/runc",
}

// findParts finds the parts that "make components" builds and unpacks.
func findParts() (p parts, err error) {
	if p.kubernetes, err = components.Path("kubernetes-node"); err != nil {
		return p, err
	}
	if p.pause, err = components.Path("pause"); err != nil {
		return p, err
	}
	dir, err := components.Dir()
	if err != nil {
		return p, err
	}
	p.debian = filepath.Join(dir, "debian")
	for _, program := range debianPrograms {
		if _, err := os.Stat(p.path(program)); err != nil {
			return p, fmt.Errorf("%s is not unpacked: run \"make components\" first", p.path(program))
		}
	}
	for _, program := range []string{"usr/sbin/nft", "usr/sbin/runc"} {
		cmd := exec.Command(p.path(program), "--version")
		cmd.Env = p.environment()
		if out, err := cmd.CombinedOutput(); err != nil {
			return p, fmt.Errorf("%s does not run: %w: %s", p.path(program), err, strings.TrimSpace(string(out)))
		}
	}
	return p, nil
}

// path returns the path of a file of the Debian packages.
func (p parts) path(name string) string { return filepath.Join(p.debian, name) }

// environment returns the environment of what runs on the node.
func (p parts) environment() []string {
	path := []string{p.path("usr/sbin"), p.path("usr/bin"), "/usr/sbin", "/usr/bin", "/sbin", "/bin"}
	var libraries []string
	for _, pattern := range []string{"usr/lib/*-linux-gnu*", "lib/*-linux-gnu*"} {
		found, _ := filepath.Glob(p.path(pattern)) // the pattern is valid
		libraries = append(libraries, found...)
	}
	return []string{
		"HOME=/root",
		"PATH=" + strings.Join(path, ":"),
		"LD_LIBRARY_PATH=" + strings.Join(libraries, ":"),
	}
}

// Unavailable returns why no node can run here, or nil.
func Unavailable() error {
	if err := machine.Supported(); err != nil {
		return fmt.Errorf("no real node: %w", err)
	}
	if _, err := findParts(); err != nil {
		return fmt.Errorf("no real node: %w", err)
	}
	return nil
}
