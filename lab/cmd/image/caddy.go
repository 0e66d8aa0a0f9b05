// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"debug/buildinfo"
	"debug/elf"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
)

// The modules that are looked for in a Caddy.
const (
	pluginModule         = "github.com/tailscale-impersonate/caddy-tailscale-impersonate"
	labModule            = pluginModule + "/lab"
	caddyModule          = "github.com/caddyserver/caddy/v2"
	caddyTailscaleModule = "github.com/tailscale/caddy-tailscale"

	// Mozilla's certificate authorities. Caddy's command trusts them where a machine has
	// none of its own, so that the image needs no file of certificates: their version
	// is pinned with the other modules, they obey the dates up to which Mozilla trusts
	// an authority, which a file cannot say, and a file that a user mounts at
	// /etc/ssl/certs/ca-certificates.crt replaces them.
	rootsModule = "golang.org/x/crypto/x509roots/fallback"
)

// architectures are those of the image. The order is that of its index.
var architectures = []string{"amd64", "arm64"}

// caddy is the Caddy of one architecture.
type caddy struct {
	path, arch string
	info       *debug.BuildInfo
	standIn    bool // instead of caddy-tailscale
}

// buildStandIn builds the lab's Caddy. Nothing of the machine goes into it: no C
// library, no paths, no state of the working copy.
func buildStandIn(ctx context.Context, root, arch, path string) error {
	path, err := filepath.Abs(path)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w -buildid=", "-o", path, "./cmd/caddy")
	cmd.Dir = filepath.Join(root, "lab")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch, "GOFLAGS=", "GOWORK=off", "GOAMD64=v1", "GOARM64=v8.0", "GOEXPERIMENT=")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("building Caddy for %s: %w", arch, err)
	}
	return nil
}

// inspect fails unless a file is a Caddy that runs in the image: static, as there is no
// C library, for the architecture, and with all modules.
func inspect(path, arch string) (caddy, error) {
	info, err := buildinfo.ReadFile(path)
	if err != nil {
		return caddy{}, err
	}
	c := caddy{path: path, arch: arch, info: info, standIn: info.Main.Path == labModule}
	modules := map[string]bool{info.Main.Path: true}
	for _, dep := range info.Deps {
		modules[dep.Path] = true
		c.standIn = c.standIn || dep.Path == labModule
	}
	for _, module := range []string{caddyModule, pluginModule, rootsModule} {
		if !modules[module] {
			return caddy{}, fmt.Errorf("%s has no module %s", path, module)
		}
	}
	if !c.standIn && !modules[caddyTailscaleModule] {
		return caddy{}, fmt.Errorf("%s has no module %s: build it with the --with flags of xcaddy.Dockerfile", path, caddyTailscaleModule)
	}
	for _, want := range []debug.BuildSetting{{Key: "GOOS", Value: "linux"}, {Key: "GOARCH", Value: arch}, {Key: "CGO_ENABLED", Value: "0"}} {
		if got := setting(info, want.Key); got != want.Value {
			return caddy{}, fmt.Errorf("%s was built with %s=%s; want %s", path, want.Key, got, want.Value)
		}
	}
	file, err := elf.Open(path)
	if err != nil {
		return caddy{}, fmt.Errorf("%s: %w", path, err)
	}
	defer func() { _ = file.Close() }()
	for _, segment := range file.Progs {
		if segment.Type == elf.PT_INTERP {
			return caddy{}, fmt.Errorf("%s is not static: it names a dynamic linker, which the image does not have", path)
		}
	}
	return c, nil
}

// setting returns how a program was built.
func setting(info *debug.BuildInfo, key string) string {
	for _, s := range info.Settings {
		if s.Key == key {
			return s.Value
		}
	}
	return ""
}
